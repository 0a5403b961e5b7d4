"""The notation for axes, and blocks against a brute-force grouping by block number."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microadam_jax.layout.axes import (
    ELEMENTWISE,
    Axes,
    AxesError,
    Fused,
    Shape,
    Sharing,
    Sides,
    elementwise,
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the sizes that an axis consists of."""

    size: int
    kept: bool


Layout = list[list[Part]]  # for each axis its parts

PARTS = st.builds(Part, size=st.integers(1, 4), kept=st.booleans())
LAYOUTS = st.lists(st.lists(PARTS, min_size=1, max_size=3), max_size=4).filter(
    lambda layout: math.prod(shape_of(layout)) <= 400
)


def shape_of(layout: Layout) -> Shape:
    return tuple(math.prod(part.size for part in axis) for axis in layout)


def axes_of(layout: Layout) -> Axes:
    """The notation of ``layout``, with sizes for all but the last part of an axis."""
    names = [[f"n{i}_{j}" for j in range(len(axis))] for i, axis in enumerate(layout)]
    pairs = [
        (name, part)
        for axis_names, axis in zip(names, layout, strict=True)
        for name, part in zip(axis_names, axis, strict=True)
    ]
    left = " ".join(f"({' '.join(axis)})" if len(axis) > 1 else axis[0] for axis in names)
    kept = " ".join(name for name, part in pairs if part.kept)
    last = {axis[-1] for axis in names}
    return Axes(f"{left} -> {kept}", **{n: part.size for n, part in pairs if n not in last})


def block_ids(layout: Layout) -> np.ndarray:
    """The number of the block that each element belongs to."""
    parts = [part for axis in layout for part in axis]
    ids = np.zeros([part.size for part in parts], int)
    for position, part in enumerate(parts):
        if part.kept:
            index = np.arange(part.size).reshape([-1] + [1] * (len(parts) - position - 1))
            ids = ids * part.size + index
    return ids.reshape(shape_of(layout))


def grouped_mean(x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """For each element the mean over its block."""
    _, inverse = np.unique(ids, return_inverse=True)
    inverse = inverse.reshape(-1)
    sums = np.bincount(inverse, weights=x.reshape(-1))
    return (sums / np.bincount(inverse))[inverse].reshape(x.shape)


def values(shape: Shape) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def mean_and_spread_of(sharing: Sharing) -> Callable[[np.ndarray], tuple[jax.Array, jax.Array]]:
    """Gives the mean over each block, and for each element the mean over its block."""

    @jax.jit
    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        moment = sharing.mean(x)
        return moment, jnp.broadcast_to(sharing.spread(moment), x.shape)

    return both


def assert_blocks(sharing: Sharing | None, ids: np.ndarray) -> None:
    """``sharing`` has exactly the blocks ``ids``."""
    assert sharing is not None
    x = values(ids.shape)
    moment, spread = mean_and_spread_of(sharing)(x)
    assert moment.shape == sharing.moment_shape
    assert moment.ndim == x.ndim
    assert sharing.blocks == len(np.unique(ids))
    np.testing.assert_allclose(spread, grouped_mean(x, ids), rtol=1e-5, atol=1e-6)


# --- The notation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "shape", "moment_shape"),
    [
        (Axes("in | out -> out"), (3, 5), (1, 5)),
        (Axes("out | in -> out"), (5, 3), (5, 1)),
        (Axes("token embed -> token"), (7, 3), (7, 1)),
        (Axes("embed | heads head_dim -> heads"), (6, 2, 4), (1, 2, 1)),
        (Axes("embed | heads head_dim -> heads head_dim"), (6, 2, 4), (1, 2, 4)),
        (Axes("heads head_dim | embed -> embed"), (2, 4, 6), (1, 1, 6)),
        (Axes("embed | (heads head_dim) -> heads", heads=2), (6, 8), (1, 2)),
        (Axes("embed | (heads head_dim) -> heads", head_dim=4), (6, 8), (1, 2)),
        (Axes("embed | (heads head_dim) -> head_dim", heads=2), (6, 8), (1, 4)),
        (Axes("(heads head_dim) | embed -> heads", heads=2), (8, 6), (2, 1)),
        (Axes("(a b c) -> a c", a=2, c=5), (30,), (10,)),
        (Axes("(a b) -> a b", a=2), (6,), (6,)),
        (Axes("(embed) | out -> out"), (3, 5), (1, 5)),
        (Axes("  in|out->out "), (3, 5), (1, 5)),
        (Axes("() out -> out"), (1, 5), (1, 5)),
        (Axes("feature ->"), (5,), (1,)),
        (Axes("->"), (), ()),
        (ELEMENTWISE, (), ()),
        (ELEMENTWISE, (3, 5), (3, 5)),
    ],
)
def test_what_is_kept(axes: Axes, shape: Shape, moment_shape: Shape) -> None:
    sharing = axes.fit(shape)
    assert sharing is not None
    assert sharing.moment_shape == moment_shape
    assert sharing.blocks == math.prod(moment_shape)


@pytest.mark.parametrize(
    ("notation", "sizes"),
    [
        ("in out", {}),
        ("", {}),
        ("in in -> in", {}),
        ("in (heads in) -> heads", {"heads": 2}),
        ("in out -> heads", {}),
        ("in out -> in out extra", {}),
        ("in out -> out", {"heads": 2}),
        ("in | mid | out -> out", {}),
        ("(heads | head_dim) embed -> heads", {}),
        ("(heads head_dim embed -> heads", {}),
        ("heads head_dim) embed -> heads", {}),
        ("((heads head_dim) embed) -> heads", {}),
        ("in -> out -> out", {}),
        ("in out -> (in out)", {}),
        ("in out -> in | out", {}),
        ("in, out -> out", {}),
        ("... out -> out", {}),
        ("...->...", {}),
        ("... -> ...", {"heads": 2}),
    ],
)
def test_what_cannot_be_read_is_refused_with_an_example(notation: str, sizes: dict) -> None:
    with pytest.raises(AxesError) as error:
        Axes(notation, **sizes)
    assert repr(notation) in str(error.value)
    assert str(sizes) in str(error.value)
    assert "'embed | (heads head_dim) -> heads' with heads=8" in str(error.value)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        (Axes("in | out -> out"), (5,)),
        (Axes("in | out -> out"), (3, 5, 2)),
        (Axes("->"), (1,)),
        (Axes("slot out -> slot", slot=3), (2, 5)),
        (Axes("() out -> out"), (2, 5)),
        (Axes("embed (heads head_dim) -> heads", heads=3), (6, 8)),
        (Axes("embed (heads head_dim) -> heads", heads=2, head_dim=3), (6, 8)),
        (Axes("embed (heads head_dim) -> heads"), (6, 8)),
        (Axes("embed (heads head_dim) -> heads", heads=0), (6, 8)),
        (Axes("(a b c) -> a", a=2), (30,)),
    ],
)
def test_another_rank_or_other_sizes_do_not_fit(axes: Axes, shape: Shape) -> None:
    assert axes.fit(shape) is None


def test_where_sees_the_sizes_by_name() -> None:
    seen: list[dict[str, int]] = []

    def few(sizes: dict[str, int]) -> bool:
        seen.append(dict(sizes))
        return sizes["heads"] <= 4

    axes = Axes("embed | (heads head_dim) -> heads", where=few, head_dim=4)
    assert axes.fit((6, 20)) is None
    fitting = axes.fit((6, 8))
    assert fitting is not None
    assert fitting.moment_shape == (1, 2)
    assert seen == [
        {"embed": 6, "heads": 5, "head_dim": 4},
        {"embed": 6, "heads": 2, "head_dim": 4},
    ]


@pytest.mark.parametrize(
    ("axes", "shape", "sides"),
    [
        (Axes("in | out -> out"), (3, 5), ((0,), (1,))),
        (Axes("out | in -> out"), (5, 3), ((1,), (0,))),
        (Axes("in | out ->"), (3, 5), ((0,), (1,))),
        (Axes("in | out -> in out"), (3, 5), ((0,), (1,))),
        (Axes("(group in) | out -> group out", group=2), (6, 5), ((0,), (1,))),
        (Axes("embed | heads head_dim -> heads"), (6, 2, 4), ((0,), (1, 2))),
        (Axes("heads head_dim | embed -> embed"), (2, 4, 6), ((0, 1), (2,))),
        (Axes("embed | (heads head_dim) -> heads", heads=2), (6, 8), ((0,), (1,))),
        (Axes("(heads head_dim) | embed -> heads", heads=2), (8, 6), ((1,), (0,))),
        (Axes("(heads head_dim) | embed -> embed", heads=2), (8, 6), ((0,), (1,))),
        (Axes("out | in height width -> out"), (5, 2, 3, 3), ((1, 2, 3), (0,))),
        (Axes("height width in | out -> out"), (3, 3, 2, 5), ((0, 1, 2), (3,))),
        (Axes("expert in | out -> expert out"), (4, 3, 5), ((1,), (2,))),
        (Axes("token embed -> token"), (7, 3), None),
        (Axes("feature ->"), (5,), None),
        (ELEMENTWISE, (3, 5), None),
    ],
)
def test_the_sides_of_a_linear_map(axes: Axes, shape: Shape, sides: Sides | None) -> None:
    sharing = axes.fit(shape)
    assert sharing is not None
    assert sharing.matrix == sides


def test_text_shows_the_sizes_that_were_given() -> None:
    assert str(Axes("in | out -> out")) == "in | out -> out"
    text = str(Axes("embed | (kv heads head_dim) -> heads", kv=2, heads=4))
    assert text == "embed | (kv heads head_dim) -> heads (heads=4, kv=2)"


def test_equal_descriptions_are_equal_and_hash_alike() -> None:
    one, other = (Axes("embed | (h d) -> h", h=2) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Axes("embed | (h d) -> h", h=4)


# --- Blocks of whole axes and of parts of axes ----------------------------------------------------


@settings(max_examples=30)
@given(LAYOUTS)
def test_mean_and_spread_are_those_of_the_blocks(layout: Layout) -> None:
    assert_blocks(axes_of(layout).fit(shape_of(layout)), block_ids(layout))


@given(LAYOUTS)
def test_what_is_kept_has_the_parameters_rank_and_one_number_a_block(layout: Layout) -> None:
    sharing = axes_of(layout).fit(shape_of(layout))
    assert sharing is not None
    assert sharing.moment_shape == tuple(
        math.prod(part.size for part in axis if part.kept) for axis in layout
    )
    assert sharing.blocks == math.prod(sharing.moment_shape) == len(np.unique(block_ids(layout)))


@settings(max_examples=10)
@given(LAYOUTS, st.data())
def test_a_stack_is_the_single_ones(layout: Layout, data: st.DataObject) -> None:
    single = axes_of(layout).fit(shape_of(layout))
    assert single is not None
    axis = data.draw(st.integers(0, len(layout)))
    assert_stack(single, shape_of(layout), axis)


def assert_stack(single: Sharing, shape: Shape, axis: int, layers: int = 3) -> None:
    stacked = single.with_axis(axis, layers)
    x = values((layers, *shape))
    moments, full = zip(*map(mean_and_spread_of(single), x), strict=True)
    moment, spread = mean_and_spread_of(stacked)(np.moveaxis(x, 0, axis))
    assert moment.shape == stacked.moment_shape
    assert stacked.blocks == layers * single.blocks
    np.testing.assert_allclose(moment, np.stack(moments, axis), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(spread, np.stack(full, axis), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("axis", "sides"), [(0, ((1, 2), (3,))), (1, ((0, 2), (3,))), (3, ((0, 1), (2,)))]
)
def test_the_new_axis_of_a_stack_is_on_no_side(axis: int, sides: Sides) -> None:
    sharing = Axes("heads head_dim | embed -> embed").fit((2, 4, 6))
    assert sharing is not None
    assert sharing.with_axis(axis, 3).matrix == sides


def test_a_stack_of_what_is_no_map_is_none() -> None:
    assert elementwise((3, 5)).with_axis(1, 2).matrix is None


def test_elementwise_blocks_leave_everything_as_it_is() -> None:
    x = jnp.asarray(values((3, 5)))
    sharing = elementwise((3, 5))
    np.testing.assert_array_equal(sharing.mean(x), x)
    np.testing.assert_array_equal(sharing.spread(x), x)
    assert sharing.blocks == 15


# --- Several tensors side by side -----------------------------------------------------------------


HEADS = Axes("embed | (heads head_dim) -> heads", heads=4)
KV_HEADS = Axes("embed | (heads head_dim) -> heads", heads=2)
OUTPUTS = Axes("embed | out -> out")
SLOT_HEADS = Axes("embed | slot heads head_dim -> slot heads", slot=1)
SLOT_OUTPUTS = Axes("embed | slot heads head_dim -> slot heads head_dim", slot=1)
PARTLY = Axes("slot (heads head_dim) -> slot heads", slot=1, heads=2)


def side_by_side(layouts: Iterable[Layout], axis: int) -> np.ndarray:
    """Block numbers of several tensors along one axis."""
    ids = [block_ids(layout) for layout in layouts]
    starts = itertools.accumulate((part.max() + 1 for part in ids), initial=0)
    return np.concatenate([i + start for i, start in zip(ids, starts, strict=False)], axis)


def heads_layout(embed: int, heads: int, head_dim: int) -> Layout:
    return [[Part(embed, False)], [Part(heads, True), Part(head_dim, False)]]


def outputs_layout(embed: int, outputs: int) -> Layout:
    return [[Part(embed, False)], [Part(outputs, True)]]


def slot_layout(embed: int, heads: int, head_dim: int, *, each: bool) -> Layout:
    return [[Part(embed, False)], [Part(1, True)], [Part(heads, True)], [Part(head_dim, each)]]


PARTLY_LAYOUT = [[Part(1, True)], [Part(2, True), Part(3, False)]]


@pytest.mark.parametrize(
    ("fused", "shape", "layouts", "axis", "moment_shape"),
    [
        (
            Fused((HEADS, KV_HEADS, OUTPUTS), shares=(4, 2, 2)),
            (5, 24),
            [heads_layout(5, 4, 3), heads_layout(5, 2, 3), outputs_layout(5, 6)],
            1,
            (1, 24),
        ),
        (
            Fused((HEADS, HEADS, OUTPUTS)),
            (5, 36),
            [heads_layout(5, 4, 3), heads_layout(5, 4, 3), outputs_layout(5, 12)],
            1,
            (1, 36),
        ),
        (
            Fused((SLOT_HEADS, SLOT_HEADS, SLOT_OUTPUTS), axis=1),
            (5, 3, 2, 4),
            [slot_layout(5, 2, 4, each=each) for each in (False, False, True)],
            1,
            (1, 3, 2, 4),
        ),
        (
            Fused((SLOT_HEADS, SLOT_HEADS), axis=-3),
            (5, 2, 2, 4),
            [slot_layout(5, 2, 4, each=False) for _ in range(2)],
            1,
            (1, 2, 2, 1),
        ),
        (Fused((PARTLY, PARTLY), axis=0), (2, 6), [PARTLY_LAYOUT] * 2, 0, (2, 6)),
        (Fused((OUTPUTS,)), (5, 6), [outputs_layout(5, 6)], 1, (1, 6)),
    ],
)
def test_fused_tensors_have_the_blocks_of_their_parts(
    fused: Fused, shape: Shape, layouts: list[Layout], axis: int, moment_shape: Shape
) -> None:
    sharing = fused.fit(shape)
    assert sharing is not None
    assert sharing.moment_shape == moment_shape
    assert_blocks(sharing, side_by_side(layouts, axis))
    for layer_axis in (axis, axis + 1):
        assert_stack(sharing, shape, layer_axis)


def test_fused_tensors_are_one_linear_map() -> None:
    sharing = Fused((SLOT_HEADS, SLOT_HEADS, SLOT_OUTPUTS), axis=1).fit((5, 3, 2, 4))
    assert sharing is not None
    assert sharing.matrix == ((0,), (1, 2, 3))
    assert sharing.with_axis(0, 7).matrix == ((1,), (2, 3, 4))
    assert sharing.with_axis(1, 7).matrix == ((0,), (2, 3, 4))
    assert sharing.with_axis(1, 7).axis == 2
    assert sharing.with_axis(2, 7).axis == 1


@pytest.mark.parametrize(
    ("fused", "shape"),
    [
        (Fused((HEADS, HEADS, OUTPUTS)), (5, 35)),
        (Fused((HEADS, HEADS, OUTPUTS)), (5, 30)),
        (Fused((HEADS, HEADS, OUTPUTS)), (36,)),
        (Fused((HEADS, HEADS), axis=2), (5, 36)),
        (Fused((HEADS, HEADS), axis=-3), (5, 36)),
        (Fused((HEADS, HEADS)), ()),
        (Fused((SLOT_HEADS, SLOT_HEADS), axis=1), (5, 3, 2, 4)),
        (Fused((SLOT_HEADS, OUTPUTS), axis=1), (5, 2, 2, 4)),
    ],
)
def test_parts_that_do_not_fit_make_none(fused: Fused, shape: Shape) -> None:
    assert fused.fit(shape) is None


def test_shares_are_as_many_as_parts() -> None:
    with pytest.raises(AxesError, match=r"Fused got 2 parts and shares \(4, 2, 2\)"):
        Fused((HEADS, OUTPUTS), shares=(4, 2, 2))


def test_fused_text_names_every_part() -> None:
    assert str(Fused((HEADS, OUTPUTS))) == (
        "embed | (heads head_dim) -> heads (heads=4) + embed | out -> out"
    )
