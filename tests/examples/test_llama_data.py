"""Where the text comes from, and that batches depend on seed and step alone."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from examples.llama.config import Config, PretrainError
from examples.llama.data import load_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files that each repeat their own letter pair, and some that are not text."""
    folder = tmp_path / "text"
    (folder / "sub").mkdir(parents=True)
    for i in range(40):
        path = folder / ("sub" if i % 2 else ".") / f"{i:02}.txt"
        path.write_text(f"{i:02} é " * 100, encoding="utf-8")
    (folder / "image.png").write_bytes(b"\xff\x00" * 1000)
    return folder


def config(text: Path | None, **settings: object) -> Config:
    return dataclasses.replace(Config(), text=text, seq_len=16, **settings)


def test_batches_follow_from_seed_and_step(folder: Path) -> None:
    first, second = load_corpus(config(folder)), load_corpus(config(folder))
    assert first.digest == second.digest
    batch = first.batch(seed=1, step=7, rows=4, seq_len=16)
    assert batch.shape == (4, 17)
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch, second.batch(seed=1, step=7, rows=4, seq_len=16))
    assert not np.array_equal(batch, first.batch(seed=1, step=8, rows=4, seq_len=16))
    assert not np.array_equal(batch, first.batch(seed=2, step=7, rows=4, seq_len=16))


def test_whole_files_are_held_out(folder: Path) -> None:
    corpus = load_corpus(config(folder))
    train, held_out = (
        {document[:2] for document in bytes(tokens).decode().split("\0")}
        for tokens in (corpus.train, corpus.held_out)
    )
    assert len(train) == 38
    assert len(held_out) == 2
    assert not train & held_out
    assert corpus.held_out_bytes_per_token == 1


def test_held_out_batches_are_spread_over_the_text(folder: Path) -> None:
    corpus = load_corpus(config(folder))
    batches = corpus.held_out_batches(batches=2, rows=3, seq_len=16)
    assert batches.shape == (2, 3, 17)
    np.testing.assert_array_equal(batches[0, 0], corpus.held_out[:17])
    np.testing.assert_array_equal(batches[-1, -1], corpus.held_out[-17:])


def test_one_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "book"
    path.write_text("0123456789" * 100)
    corpus = load_corpus(config(path))
    assert bytes(corpus.train) + bytes(corpus.held_out) == path.read_bytes()
    assert len(corpus.held_out) == 50


def test_amount_of_text_is_limited(folder: Path) -> None:
    corpus = load_corpus(config(folder, max_bytes=3000))
    assert 3000 <= len(corpus.train) + len(corpus.held_out) <= 1.5 * 3000


def test_standard_library_is_the_default() -> None:
    corpus = load_corpus(config(None, max_bytes=300_000))
    assert b"def " in bytes(corpus.train)
    assert corpus.digest != load_corpus(config(None, max_bytes=200_000)).digest


def test_byte_pairs(folder: Path) -> None:
    settings = config(folder, tokenizer="bpe", vocab_size=300, out=folder / "out")
    corpus = load_corpus(settings)
    assert corpus.vocab == 300
    assert corpus.train.max() < 300
    assert corpus.train.dtype == np.uint16
    held_out_bytes = len(load_corpus(config(folder)).held_out)
    assert corpus.held_out_bytes_per_token * len(corpus.held_out) == pytest.approx(held_out_bytes)
    assert corpus.held_out_bytes_per_token > 1.5
    [cached] = (folder / "out").iterdir()
    written = cached.stat().st_mtime_ns
    assert load_corpus(settings).digest == corpus.digest
    assert cached.stat().st_mtime_ns == written


def test_mistakes_get_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PretrainError, match=r"no file or directory .*nowhere"):
        load_corpus(config(tmp_path / "nowhere"))
    with pytest.raises(PretrainError, match="no text in"):
        load_corpus(config(tmp_path))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(PretrainError, match="no text in"):
        load_corpus(config(tmp_path))
    (tmp_path / "short.txt").write_text("a" * 100)
    with pytest.raises(PretrainError, match="has 5 tokens, but one sequence needs 17"):
        load_corpus(config(tmp_path / "short.txt"))
