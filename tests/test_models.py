"""The registered shapes against the parameter counts that were published."""

import math

import jax
import jax.numpy as jnp
import pytest

from microadam_jax.models import MODELS, model_shapes

PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama-60m": 58_073_600,
    "llama-130m": 134_105_856,
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "opt-1.3b": 1_315_758_080,
    "gpt2": 124_439_808,
    "resnet-50": 25_557_032,
}


def llama_count(hidden: int, intermediate: int, layers: int) -> int:
    """Embedding and output, then four projections, three of the MLP, two norms per layer."""
    layer = 4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden
    return 2 * 32000 * hidden + layers * layer + hidden


# GaLore prints these two only as "350M" and "1B".
BY_ARITHMETIC = {"llama-350m": llama_count(1024, 2736, 24), "llama-1b": llama_count(2048, 5461, 24)}


@pytest.mark.parametrize("name", MODELS)
def test_totals_are_exact(name: str) -> None:
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model_shapes(name)))
    assert total == (PUBLISHED | BY_ARITHMETIC)[name]


def test_arithmetic_agrees_with_a_published_count() -> None:
    assert llama_count(4096, 11008, 32) == PUBLISHED["llama2-7b"]


def test_kernels_end_in_their_outputs_and_layers_are_entries() -> None:
    shapes = model_shapes("llama2-7b")
    assert shapes["layers"]["31"]["mlp"]["up_proj"]["kernel"].shape == (4096, 11008)
    assert shapes["layers"]["0"]["mlp"]["down_proj"]["kernel"].shape == (11008, 4096)
    assert shapes["lm_head"]["kernel"].shape == (4096, 32000)
    assert len(shapes["layers"]) == 32
    assert model_shapes("resnet-50")["stem"]["conv"]["kernel"].shape == (7, 7, 3, 64)


@pytest.mark.parametrize("dtype", [jnp.float32, "bfloat16"])
def test_every_leaf_has_the_dtype_asked_for(dtype: str) -> None:
    assert {leaf.dtype for leaf in jax.tree.leaves(model_shapes("gpt2", dtype))} == {
        jnp.dtype(dtype)
    }


def test_trees_do_not_share_nodes() -> None:
    layers = model_shapes("gpt2")["h"]
    assert layers["0"] is not layers["1"]


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'llama-7b'.*Did you mean 'llama2-7b'.*resnet-50"):
        model_shapes("llama-7b")
    with pytest.raises(ValueError, match=r"'zzz'\. Known models: llama2-7b"):
        model_shapes("zzz")
