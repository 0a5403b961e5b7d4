"""The example on digits, for a few steps."""

from pathlib import Path

import numpy as np
import pytest

from examples import digits

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.slow
def test_compressed_m_fac_learns_from_a_fraction_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("AdamW", "M-FAC", "Sparse M-FAC", "Low-rank M-FAC")
    for name in names:
        factory, _ = digits.OPTIMIZERS[name]
        rate = 1e-2 if name == "AdamW" else 3e-2
        monkeypatch.setitem(digits.OPTIMIZERS, name, (factory, (rate,)))
    runs = {name: digits.train(name, steps=60) for name in names}
    for run in runs.values():
        assert np.isfinite(run.losses).all()
        assert run.losses[-10:].mean() < 0.5 * run.losses[:5].mean()
        assert run.accuracy > 0.7
    whole = runs["M-FAC"].bytes_per_parameter
    assert runs["Sparse M-FAC"].bytes_per_parameter < whole / 20
    assert runs["Low-rank M-FAC"].bytes_per_parameter < whole / 5
    assert all(name in digits.table(runs) for name in names)
    digits.draw(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
