"""What optimizers warn of in ``init``: second moments nobody asked for, and more than AdamW."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import microadam_jax
from microadam_jax import (
    Partition,
    adam_mini,
    adam_mini4bit,
    adam_sn,
    adamw4bit_factored,
    adamw8bit,
    came,
    explain_partition,
    galore,
    ldadam,
    memory_report,
    microadam,
    snsm,
    sparse_mfac,
)
from microadam_jax.layout.names import transformer_rules
from microadam_jax.methods import METHODS

UNNAMED = {"wq": jnp.zeros((32, 16)), "w1": jnp.zeros((16, 64)), "norm": {"scale": jnp.zeros(16)}}


@pytest.mark.parametrize("factory", [adam_mini, adam_mini4bit, adam_sn])
def test_parameters_without_a_rule_are_warned_of_once(factory: Callable[..., Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        factory(1e-3).init(UNNAMED)
    (only,) = caught
    assert only.category is UserWarning
    text = str(only.message)
    assert "no rule of the partition names 2 of 3 parameters" in text
    assert "'w1' of shape (16, 64) with 4,096 bytes" in text
    assert "6,144 bytes" in text
    assert "('w1', 'in | out -> out')" in text


def test_the_rule_that_the_warning_proposes_helps() -> None:
    with pytest.warns(UserWarning, match="no rule of the partition names") as caught:
        adam_mini(1e-3).init({"trunk": {"w.1": jnp.zeros((4, 4, 8))}})
    assert r"('trunk/w\\.1', 'in in2 | out -> out')" in str(caught[0].message)
    rules = ((r"trunk/w\.1", "in in2 | out -> out"), *transformer_rules())
    tx = adam_mini(1e-3, partition=Partition(rules))
    state = tx.init({"trunk": {"w.1": jnp.zeros((4, 4, 8))}})
    assert state[0].nu["trunk"]["w.1"].shape == (1, 1, 8)


def test_factored_moments_are_warned_of_where_nothing_is_factored() -> None:
    adamw4bit_factored(1e-3).init(UNNAMED)
    with pytest.warns(UserWarning, match=r"'flat' of shape \(8192,\) with 32,768 bytes"):
        adamw4bit_factored(1e-3).init({"flat": jnp.zeros(8192)})


def test_vectors_and_reports_do_not_warn() -> None:
    adam_mini(1e-3).init({"temperature": jnp.zeros(7), "alpha": jnp.zeros(())})
    report = memory_report(adam_mini(1e-3), UNNAMED)
    assert report.remarks["no rule of the partition, one second moment for each element"] == (
        "w1",
        "wq",
    )


def test_elements_of_their_own_may_be_asked_for() -> None:
    rules = (("w.", "... -> ..."), *transformer_rules())
    adam_mini(1e-3, partition=Partition(rules)).init(UNNAMED)


def test_unknown_matrices_may_keep_one_number_for_each_output() -> None:
    partition = Partition(unknown="output")
    found = {
        a.path: a.sharing.moment_shape for a in explain_partition(UNNAMED, partition).assignments
    }
    assert found == {"w1": (1, 64), "wq": (1, 16), "norm/scale": (1,)}
    assert "in | out -> out, assumed (in, out)" in str(explain_partition(UNNAMED, partition))
    adam_mini(1e-3, partition=partition).init(UNNAMED)
    stacked = {"layers": {"w1": jnp.zeros((3, 16, 64)), "norm": {"scale": jnp.zeros((3, 16))}}}
    (w1, _) = sorted(explain_partition(stacked, partition).assignments, key=lambda a: a.path)[::-1]
    assert w1.sharing.moment_shape == (3, 1, 64)


def test_a_norm_is_no_unknown_matrix() -> None:
    report = explain_partition(
        {"norm": {"kernel": jnp.zeros((7, 16))}}, Partition(unknown="output")
    )
    assert report.assignments[0].sharing.moment_shape == (7, 16)


def test_unknown_parameters_may_be_refused() -> None:
    partition = Partition(unknown="error")
    with pytest.raises(ValueError, match=r"'w1' of shape \(16, 64\) follows no rule.*'in \| out"):
        adam_mini(1e-3, partition=partition).init(UNNAMED)
    with pytest.raises(ValueError, match="unknown='error'"):
        explain_partition({"w": jnp.zeros((2, 3, 4))}, partition)
    adam_mini(1e-3, partition=partition).init({"temperature": jnp.zeros(7)})
    with pytest.raises(ValueError, match="unknown must be one of"):
        Partition(unknown="row")  # pyrefly: ignore[bad-argument-type]


# --- More bytes than AdamW ------------------------------------------------------------------------

SKINNY = {"lora_a": jnp.zeros((4096, 8)), "lora_b": jnp.zeros((8, 4096))}


@pytest.mark.parametrize("factory", [galore, ldadam, microadam, sparse_mfac])
def test_skinny_matrices_that_take_more_than_adamw_are_warned_of(factory: Any) -> None:
    with pytest.warns(UserWarning, match="takes more bytes than AdamW's"):
        factory(1e-3).init(SKINNY)
    report = memory_report(factory(1e-3), SKINNY)
    assert "lora_a" in report.remarks["takes more bytes than AdamW in float32"]


@pytest.mark.parametrize("factory", [adam_mini, adamw8bit, adamw4bit_factored, snsm, came, adam_sn])
def test_others_take_no_more_and_do_not_warn(factory: Any) -> None:
    state = jax.eval_shape(factory(1e-3).init, SKINNY)
    adamw = jax.eval_shape(optax.adamw(1e-3).init, SKINNY)

    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    assert size(state) <= size(adamw) + 64
    report = memory_report(factory(1e-3), SKINNY)
    assert "takes more bytes than AdamW in float32" not in report.remarks


def test_a_column_takes_more_with_factors() -> None:
    with pytest.warns(UserWarning, match=r"'w' of shape \(8192, 1\), 98,312 in place of 65,536"):
        came(1e-3).init({"w": jnp.zeros((8192, 1))})


@pytest.mark.parametrize("name", METHODS)
def test_stacked_layers_are_warned_of_as_separate_ones(name: str) -> None:
    """A thousandth of a model of 48 layers does not become large because they are stacked."""

    def warns(params: Any) -> bool:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            jax.eval_shape(getattr(microadam_jax, name)(1e-3).init, params)
        return bool(caught)

    layer = {"mix": {"gain": (1600,)}, "gate": {"kernel": (1600, 2)}}
    separate, stacked = (
        jax.tree.map(
            lambda shape, n=n: jax.ShapeDtypeStruct((*n, *shape), jnp.float32),
            layer,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        for n in ((), (48,))
    )
    assert not warns({"h": {str(i): separate for i in range(48)}})
    assert not warns({"h": stacked})
