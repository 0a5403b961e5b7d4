"""How much of real models TPU kernels take when nothing is named, from shapes alone."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from microadam_jax import top_k
from microadam_jax.codecs import as_storage, dynamic4, linear4
from microadam_jax.methods import METHODS
from microadam_jax.models import MODELS, model_shapes
from pallas_kernels import dispatch, topk_compress, window_update
from pallas_kernels.blockwise_codec.mosaic_tpu import unsupported as no_step
from pallas_kernels.topk_compress.mosaic_tpu import unsupported as no_top_k
from pallas_kernels.window_update.mosaic_tpu import unsupported as no_window

WINDOW = 10  # rows, as microadam has by default
# The default for nu has scales by rows.
BLOCKS = {"mu_codec": dynamic4(), "nu_codec": linear4(signed=False)}
# No kernel takes codes of 2 bits.
LOW_BIT = [name for name, m in METHODS.items() if m.kind == "low bits" and "2bit" not in name]


def low_bit(name: str, shapes: Any) -> Callable[..., bool]:
    parameters, chosen = METHODS[name].parameters, BLOCKS if name == "adamw4bit" else {}
    defaults = {
        key: chosen.get(key, parameters[key].default)
        for key in ("mu_codec", "nu_codec")
        if key in parameters
    }
    assigned = [as_storage(codec).assign(shapes) for codec in defaults.values()]

    def taken(path: Any, leaf: Any) -> bool:
        return no_step([codecs[path] for codecs in assigned], [leaf]) is None

    return taken


def micro_adam(path: Any, leaf: Any) -> bool:
    compressor = top_k()
    size = compressor.blocks.layout_of(leaf).size
    k = compressor.survivors(size)
    reasons = no_top_k(leaf.shape, size, k), no_window(leaf.shape, size, WINDOW * k)
    return not compressor.keeps_dense(path, leaf) and reasons == (None, None)


def stacked(shapes: Any) -> Any:
    """A leaf for all layers of one kind."""
    for name in ("layers", "h", "encoder"):
        if name in shapes:
            layers = list(shapes[name].values())
            stack = functools.partial(_stack, len(layers))
            shapes = {**shapes, name: jax.tree.map(stack, layers[0])}
    return shapes


def _stack(count: int, leaf: Any) -> Any:
    return leaf.update(shape=(count, *leaf.shape))


@functools.cache
def models() -> dict[str, list[Any]]:
    trees = {name: model_shapes(name) for name in MODELS}
    return {name: [tree, stacked(tree)] for name, tree in trees.items()}


@pytest.mark.parametrize("name", ["microadam", *LOW_BIT])
def test_kernels_take_nearly_all_of_every_model(name: str) -> None:
    for model, trees in models().items():
        for shapes in trees:
            taken = micro_adam if name == "microadam" else low_bit(name, shapes)
            leaves = jax.tree.leaves_with_path(shapes)
            sizes = [(math.prod(leaf.shape), taken(path, leaf)) for path, leaf in leaves]
            share = sum(size for size, here in sizes if here) / sum(size for size, _ in sizes)
            print(f"{name} {model} {100 * share:.2f} %")
            assert share >= 0.95, model


@pytest.mark.parametrize("name", ["topk_compress", "window_update"])
def test_what_the_operation_does_with_none_is_what_is_counted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of 11008 elements, in what is traced where programs may be compiled for TPUs."""
    monkeypatch.setattr(dispatch, "compiles_for_tpus", lambda: True)
    rows, blocks = 8, (8, 64)
    if name == "topk_compress":
        run = functools.partial(topk_compress.topk_compress, k=2)
        arrays = [((rows, 11008), "float32"), ((*blocks, 86), "uint8"), *[(blocks, "float32")] * 2]
    else:
        run = functools.partial(window_update.window_update, size=172, n=11008)
        window = (*blocks, WINDOW, 2)
        weights = [((WINDOW,), "float32")] * 2
        arrays = [(window, "bfloat16"), (window, "uint8"), *weights, ((), "float32")]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in arrays]
    one = jax.make_mesh((1,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    with jax.set_mesh(one):
        program = str(jax.make_jaxpr(run)(*shapes))
    assert "pallas_call" in program
