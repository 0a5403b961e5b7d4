"""Tests benchmarks/peers.py as far as it needs no torch: its measure, and writing its page."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.peers import (
    MARK,
    SHAPES,
    Given,
    OurRun,
    difference,
    flat,
    nested,
    random_basis,
    read,
    released_pairs,
    table,
    torch_name,
)
from benchmarks.places import filled


def test_a_difference_is_measured_by_the_way_that_was_gone() -> None:
    initial = {"a": np.zeros(4, np.float32), "b": np.ones((2, 2), np.float32)}
    released = {"a": np.full(4, 2.0), "b": np.full((2, 2), 5.0)}
    ours = {"a": np.array([2.0, 2, 2, 3]), "b": released["b"]}
    assert difference(ours, released, initial) == pytest.approx((1 / 2, 1 / 4))


def test_the_page_has_what_its_file_says() -> None:
    docs = pathlib.Path(__file__).parents[1] / "docs"
    page = (docs / "peers.md").read_text()
    assert filled(page, MARK, [table(read(docs / "peers.csv"))]) == page


def test_trees_and_names() -> None:
    tensors = {path: np.zeros(shape, np.float32) for path, shape in SHAPES.items()}
    assert flat(nested(tensors)).keys() == tensors.keys()
    assert torch_name("mlp/up_proj/kernel") == "mlp.up_proj.weight"


def test_pairs_are_made_without_torch() -> None:
    packages = [pair.package for pair in released_pairs()]
    assert set(packages) == {"adam-mini", "came-pytorch", "galore-torch", "apollo-torch", "torchao"}


def test_a_given_basis_is_the_one_of_numpy() -> None:
    kept = (jnp.zeros((8, 3)),)
    (vectors,) = Given(3).find(jnp.ones((8, 5)), kept, jnp.array(True), jax.random.key(0))
    np.testing.assert_array_equal(vectors, random_basis(8, 3))


def test_our_run_takes_the_optimizers_steps() -> None:
    run = OurRun.start(optax.sgd(0.5), {"a/b": np.ones(3, np.float32)})
    assert run.step({"a/b": np.full(3, 2.0, np.float32)}) > 0
    np.testing.assert_allclose(run.current()["a/b"], np.zeros(3))
