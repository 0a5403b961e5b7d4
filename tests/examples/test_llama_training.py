"""The training loop: exact resume, accumulation, number formats, meshes."""

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from examples.llama.checkpoints import Checkpoints
from examples.llama.config import Config, PretrainError
from examples.llama.data import Corpus, load_corpus
from examples.llama.metrics import MetricsFile, Row
from examples.llama.model import init_params
from examples.llama.partitioning import place
from examples.llama.training import Result, train
from microadam_jax import microadam, round_updates

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = dataclasses.replace(
    Config(),
    hidden=64,
    intermediate=96,
    layers=2,
    heads=2,
    seq_len=16,
    batch=4,
    steps=8,
    eval_every=4,
    eval_batches=2,
    log_every=3,
    max_bytes=100_000,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(SMALL)


def losses(result: Result) -> list[tuple[float, float | None]]:
    return [(row.loss, row.held_out_loss) for row in result.rows]


def after(steps: int) -> Iterator[bool]:
    """Answers to `stop`: yes after some steps."""
    yield from [False] * (steps - 1)
    yield True


def test_loss_falls_and_rows_are_complete(corpus: Corpus) -> None:
    seen: list[Row] = []
    config = dataclasses.replace(SMALL, steps=41)
    result = train(config, optax.adam(3e-3), corpus, observe=seen.extend)
    assert result.finished
    assert result.rows == seen
    assert [row.step for row in seen] == list(range(1, 42))
    assert [row.tokens for row in seen] == [64 * step for step in range(1, 42)]
    assert all(before.seconds < row.seconds for before, row in pairwise(seen))
    evaluated = [row.step for row in seen if row.held_out_loss is not None]
    assert evaluated == [*range(4, 41, 4), 41]
    assert seen[0].loss == pytest.approx(np.log(256), abs=0.2)
    assert result.held_out_loss < 4.5
    assert result.state_bytes == 8 * result.parameters + 4


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-2), microadam(1e-2)], ids=["adamw", "micro"])
def test_resuming_is_exact(
    optimizer: optax.GradientTransformation, corpus: Corpus, tmp_path: Path
) -> None:
    straight = Checkpoints(tmp_path / "straight", {})
    expected = train(SMALL, optimizer, corpus, checkpoints=straight)

    with Checkpoints(tmp_path / "broken", {}) as first:
        # Five steps: neither a logged nor an evaluated nor a saved one.
        answers = after(5)
        half = train(SMALL, optimizer, corpus, checkpoints=first, stop=lambda: next(answers))
    assert not half.finished
    with Checkpoints(tmp_path / "broken", {}) as second:
        assert second.latest_step == 5
        resumed = train(SMALL, optimizer, corpus, checkpoints=second, rows=half.rows)
        assert losses(resumed) == losses(expected)

        like = init_state(optimizer)
        jax.tree.map(np.testing.assert_array_equal, second.restore(like), straight.restore(like))


def test_layers_updated_in_the_backward_pass_resume_and_learn_the_same(
    corpus: Corpus, tmp_path: Path
) -> None:
    optimizer = round_updates(optax.adamw(1e-2))
    config = dataclasses.replace(
        SMALL, update_in_backward=True, param_dtype="bfloat16", rounding="stochastic", steps=6
    )
    expected = train(config, optimizer, corpus)
    clipped = optax.chain(optax.clip_by_global_norm(config.clip), optax.adamw(1e-2))
    plain = dataclasses.replace(config, update_in_backward=False)
    ordinary = train(plain, round_updates(clipped), corpus)
    assert expected.state_bytes == ordinary.state_bytes
    assert expected.held_out_loss == pytest.approx(ordinary.held_out_loss, rel=1e-2)
    answers = after(3)
    with Checkpoints(tmp_path, config.identity()) as checkpoints:
        half = train(config, optimizer, corpus, checkpoints=checkpoints, stop=lambda: next(answers))
        resumed = train(config, optimizer, corpus, checkpoints=checkpoints, rows=half.rows)
    assert losses(resumed) == losses(expected)


@pytest.mark.parametrize("activations", ["fp8", "coat"])
def test_activations_in_codes_learn_and_resume(
    activations: str, corpus: Corpus, tmp_path: Path
) -> None:
    exact = train(SMALL, optax.adamw(1e-2), corpus)
    config = dataclasses.replace(SMALL, activations=activations)
    expected = train(config, optax.adamw(1e-2), corpus)
    assert losses(expected) != losses(exact)
    assert expected.held_out_loss == pytest.approx(exact.held_out_loss, rel=0.02)
    answers = after(4)
    with Checkpoints(tmp_path, config.identity()) as checkpoints:
        half = train(
            config, optax.adamw(1e-2), corpus, checkpoints=checkpoints, stop=lambda: next(answers)
        )
        resumed = train(config, optax.adamw(1e-2), corpus, checkpoints=checkpoints, rows=half.rows)
    assert losses(resumed) == losses(expected)
    with (
        Checkpoints(tmp_path, SMALL.identity()) as checkpoints,
        pytest.raises(PretrainError, match=f"activations was {activations} and is now exact"),
    ):
        train(
            dataclasses.replace(SMALL, steps=9), optax.adamw(1e-2), corpus, checkpoints=checkpoints
        )


def init_state(optimizer: optax.GradientTransformation) -> object:
    """Shapes and shardings of parameters and optimizer state on one device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def init() -> object:
        params = init_params(SMALL.model(256), SMALL.seed)
        return params, optimizer.init(params)

    return jax.tree.map(lambda leaf: leaf.update(sharding=device), jax.eval_shape(init))


def test_state_without_elements_can_be_saved(corpus: Corpus, tmp_path: Path) -> None:
    optimizer = optax.GradientTransformation(
        lambda params: {"empty": jnp.zeros((0, 3)), "full": jnp.ones(3)},
        lambda updates, state, params: (updates, state),
    )
    config = dataclasses.replace(SMALL, steps=1)
    with Checkpoints(tmp_path, {}) as checkpoints:
        train(config, optimizer, corpus, checkpoints=checkpoints)
        again = train(config, optimizer, corpus, checkpoints=checkpoints)
    assert again.finished


def test_other_configurations_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, steps=1)
    with Checkpoints(tmp_path, {"steps": 1, "clip": 1.0}) as checkpoints:
        train(config, optax.sgd(1.0), corpus, checkpoints=checkpoints)
    with (
        Checkpoints(tmp_path, {"steps": 2, "clip": 1.0, "seed": 3}) as checkpoints,
        pytest.raises(PretrainError, match="steps was 1 and is now 2; seed was None and is now 3"),
    ):
        train(config, optax.sgd(1.0), corpus, checkpoints=checkpoints)


def test_accumulation_averages(corpus: Corpus) -> None:
    parts = dataclasses.replace(SMALL, accumulation=4)
    # Held-out batches have as many rows as a micro-batch, so only training losses compare.
    expected, actual = (
        [row.loss for row in train(config, optax.adamw(1e-2), corpus).rows]
        for config in (SMALL, parts)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_bfloat16_throughout(corpus: Corpus) -> None:
    config = dataclasses.replace(
        SMALL,
        steps=30,
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
        remat=True,
        accumulation=2,
    )
    result = train(config, optax.adam(3e-3), corpus)
    assert result.held_out_loss < 5
    assert result.state_bytes == 4 * result.parameters + 4


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [optax.adamw(1e-2), microadam(1e-2)], ids=["adamw", "micro"])
def test_mesh_computes_the_same(optimizer: optax.GradientTransformation, corpus: Corpus) -> None:
    meshed = dataclasses.replace(SMALL, mesh="data=2,fsdp=2,tensor=2")
    expected, actual = (train(config, optimizer, corpus) for config in (SMALL, meshed))
    np.testing.assert_allclose(
        [row.loss for row in actual.rows], [row.loss for row in expected.rows], rtol=1e-4
    )
    assert actual.held_out_loss == pytest.approx(expected.held_out_loss, rel=1e-4)


def test_resuming_on_another_mesh(corpus: Corpus, tmp_path: Path) -> None:
    expected = train(SMALL, optax.adamw(1e-2), corpus)
    meshed = dataclasses.replace(SMALL, mesh="data=2,fsdp=2,tensor=2")
    answers = after(4)
    with Checkpoints(tmp_path, {}) as checkpoints:
        half = train(
            meshed, optax.adamw(1e-2), corpus, checkpoints=checkpoints, stop=lambda: next(answers)
        )
        resumed = train(SMALL, optax.adamw(1e-2), corpus, checkpoints=checkpoints, rows=half.rows)
    assert resumed.held_out_loss == pytest.approx(expected.held_out_loss, rel=1e-4)


def test_state_lives_where_its_parameter_does() -> None:
    # Wide enough that the blocks of a row split over the tensor axis.
    config = dataclasses.replace(SMALL, hidden=2048, mesh="fsdp=2,tensor=2")
    placement = place(config, vocab=256)
    optimizer = microadam(1e-3)
    shapes = jax.eval_shape(lambda: init_params(config.model(256), 0))
    shardings = placement.state(optimizer, shapes)
    windows = optax.tree.get(shardings, "window_values")
    assert windows["layers"]["attention"]["query"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert windows["layers"]["mlp"]["down"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert windows["embedding"]["embedding"].spec == P("tensor", "fsdp")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mesh": "data=16"}, "needs 16 devices, but there are 8 here"),
        ({"mesh": "rows=2"}, "must be a list such as data=2,fsdp=2"),
        ({"mesh": "data=two"}, "must be a list such as data=2,fsdp=2"),
        ({"mesh": "data=8"}, "does not divide the 4 sequences of a micro-batch"),
        ({"mesh": "tensor=2", "intermediate": 97}, r"does not divide layers.mlp.down.kernel"),
    ],
)
def test_meshes_that_do_not_fit(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(PretrainError, match=sentence):
        place(dataclasses.replace(SMALL, **settings), vocab=256)


def test_rows_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    rows = [
        Row(step, 10 * step, 0.5 * step, 1 / step, step if step == 2 else None)
        for step in (1, 2, 3)
    ]
    file = MetricsFile(tmp_path / "metrics.csv", last_step=0)
    file.append(rows)
    again = MetricsFile(tmp_path / "metrics.csv", last_step=2)
    assert again.rows == rows[:2]
    again.append(rows[2:])
    assert MetricsFile(tmp_path / "metrics.csv", last_step=3).rows == rows
