"""The leaves of a tree of parameters: their paths, the boxes they may be in, and rows of them.

Boxes are Flax's, and carry names of axes. Flax itself is not needed: Linen's are known by ``unbox``
and ``names``, NNX's variables by ``get_metadata``.
"""

import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import KeyPath

PyTree = Any
Shape = tuple[int, ...]
AxisNames = tuple[Any, ...]
NNX_NAMES = ("out_sharding", "sharding_names", "sharding")


class Compressed:
    """Marks an update in fewer numbers, a leaf of its tree though it may be a pytree node."""


def is_compressed(node: object) -> bool:
    """Returns True if ``node`` is a compressed update; for ``is_leaf`` of tree functions."""
    return isinstance(node, Compressed)


class LeafShape(NamedTuple):
    """A leaf as rules see it. Trees of equal ones have equal layouts, which are found once.

    Attributes:
        path: its path, ``"layers/0/attention/query/kernel"``.
        shape: its shape.
        axes: the names of its axes, if a box names them.
    """

    path: str
    shape: Shape
    axes: AxisNames = ()


def leaf_shapes(tree: Any) -> dict[KeyPath, LeafShape]:
    """Returns the leaves of ``tree`` that are arrays, or shapes of some, by their paths."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = dict(axis_names(tree))
    return {
        path: LeafShape(path_name(box_path(path)), tuple(leaf.shape), names.get(box_path(path), ()))
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def map_with_path(
    function: Callable[..., tuple[Any, ...]],
    results: int,
    tree: PyTree,
    *rest: PyTree,
    is_leaf: Callable[[Any], bool] | None = None,
) -> tuple[PyTree, ...]:
    """Maps ``function(path, leaf, *rest_leaves)`` and gathers each of its results in a tree.

    Args:
        function: returns a tuple of ``results`` values.
        results: how many values that is; a tree without leaves cannot tell.
        tree: its structure is the structure of every resulting tree; ``None`` and
            ``MaskedNode`` entries hold no leaf and stay as they are.
        *rest: trees with the structure of ``tree``; Flax boxes in them may have other metadata.
        is_leaf: what to treat as a leaf of ``tree`` although it is a pytree node.

    Returns:
        One tree for each result.
    """
    treedef, rows = rows_of(tree, *rest, is_leaf=is_leaf)
    return columns_of(treedef, [function(*row) for row in rows], results)


def rows_of(
    tree: PyTree, *rest: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[Any, list[tuple[Any, ...]]]:
    """Lists the leaves of trees side by side.

    Args:
        tree: its structure counts; ``None`` and ``MaskedNode`` entries hold no leaf.
        *rest: trees with that structure; Flax boxes in them may have other metadata.
        is_leaf: what to treat as a leaf of ``tree`` although it is a pytree node.

    Returns:
        The structure, and for each leaf its path, the leaf, and those of ``rest``.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    plain = jax.tree.structure(without_boxes(tree), is_leaf=is_leaf)
    columns = [_flattened_up_to(plain, other) for other in rest]
    return treedef, [
        (path, leaf, *others) for (path, leaf), *others in zip(leaves, *columns, strict=True)
    ]


def _flattened_up_to(plain: Any, other: PyTree) -> list[Any]:
    try:
        return plain.flatten_up_to(without_boxes(other))
    except ValueError as error:
        # JAX's own sentence prints the arrays.
        found = jax.tree.structure(without_boxes(other))
        raise ValueError(
            f"Trees that belong together differ: the gradients have {plain.num_leaves} arrays, and "
            f"the state or the parameters {found.num_leaves} in another structure. Give update the "
            "parameters, gradients and state of one tree; a parameter whose gradient is None must "
            "have been None in init."
        ) from error


def columns_of(treedef: Any, rows: Sequence[tuple[Any, ...]], results: int) -> tuple[PyTree, ...]:
    """Gathers ``results`` values of each leaf in as many trees of the structure ``treedef``."""
    return tuple(treedef.unflatten(values) for values in turned(rows, results))


def turned(rows: Sequence[tuple[Any, ...]], results: int) -> list[tuple[Any, ...]]:
    """Gathers each of ``results`` values of all leaves; without leaves, nothing for each."""
    return list(zip(*rows, strict=True)) if rows else [()] * results


def owner_of(path: KeyPath, parameters: Container[KeyPath]) -> KeyPath | None:
    """Returns the path of the parameter that a state array belongs to: the end of its own."""
    return next((path[cut:] for cut in range(len(path) + 1) if path[cut:] in parameters), None)


def path_name(path: KeyPath) -> str:
    """The path of a leaf as ``"layers/norm/scale"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


class LeafKey(NamedTuple):
    """The random key of a leaf among those of its tree.

    Loops over leaves take it from the array of all: to cut each from it would be a kernel to
    compile for each leaf.

    Attributes:
        keys: typed, of all leaves.
        index: int32 scalar, which of them it is.
    """

    keys: jax.Array
    index: jax.Array | np.int32


def leaf_key(seed: jax.typing.ArrayLike, count: jax.Array, path: KeyPath) -> jax.Array:
    """A random key for the leaf at ``path`` in step ``count``: the same on any mesh."""
    key = jax.random.fold_in(jax.random.key(seed), count)
    return jax.random.fold_in(key, zlib.crc32(path_name(box_path(path)).encode()))


def leaf_keys(
    seed: jax.typing.ArrayLike, count: jax.Array, tree: PyTree, prefix: KeyPath = ()
) -> dict[KeyPath, LeafKey]:
    """The key that :func:`leaf_key` gives to each leaf of ``tree``, by path, in one operation.

    Args:
        seed: of all keys.
        count: the step.
        tree: the leaves.
        prefix: what stands before their paths.
    """
    paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
    if not paths:
        return {}
    key = jax.random.fold_in(jax.random.key(seed), count)
    names = [zlib.crc32(path_name(box_path((*prefix, *path))).encode()) for path in paths]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.asarray(names, np.uint32))
    return {path: LeafKey(keys, np.int32(i)) for i, path in enumerate(paths)}


def unstored_arrays(name: str, field: Any, leaves: Mapping[KeyPath, LeafShape]) -> list[jax.Array]:
    """Returns the arrays of a field that is kept as it is.

    Raises:
        ValueError: if the field was stored through a codec, or for leaves of other shapes.
    """
    if isinstance(field, dict) and len(field) == 1:
        (label, arrays) = next(iter(field.items()))
        if isinstance(arrays, dict) and "codes" in arrays:
            raise ValueError(
                f"The state's field {name!r} was stored with {label}, and this optimizer "
                "stores it without codec. Restore it with the codec it was saved with."
            )
    arrays = leaves_for(name, field, leaves)
    for path, x in zip(leaves, arrays, strict=True):
        if x.shape != leaves[path].shape:
            raise ValueError(
                f"The state of {path_name(path)!r} has shape {x.shape} where its parameter "
                f"has {leaves[path].shape}."
            )
    return arrays


def leaves_for(name: str, field: Any, leaves: Mapping[KeyPath, LeafShape]) -> list[Any]:
    """Returns the arrays of a field of a state, one for each of the parameters.

    Args:
        name: of the field.
        field: a tree with the paths of the parameters.
        leaves: of the gradients.

    Raises:
        ValueError: if it holds arrays for other parameters.
    """
    found = jax.tree.leaves_with_path(field)
    own, asked = [path_name(box_path(path)) for path, _ in found], [x.path for x in leaves.values()]
    if own != asked:
        both = zip([*own, "none"], [*asked, "none"], strict=False)
        kept, wanted = next(pair for pair in both if pair[0] != pair[1])
        raise ValueError(
            f"The state's field {name!r} holds {len(own)} parameters and the gradients have "
            f"{len(asked)}, of which the first that differ are {kept!r} and {wanted!r}. Give "
            "gradients and a state of the same parameters; one whose gradient is None must have "
            "been None in init."
        )
    return [x for _, x in found]


def axis_names(params: Any) -> Iterator[tuple[KeyPath, AxisNames]]:
    """The paths of Linen's boxes with the names of their axes.

    NNX's variables have names too, but ``nnx.Optimizer`` shows them to ``init`` and not to
    ``update``, and a partition that forgets them in between would be none.
    """
    for path, box in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)[0]:
        if is_box(box) and getattr(box, "names", None):
            yield path, tuple(box.names)


def box_path(path: KeyPath) -> KeyPath:
    """The path of the box around a leaf, or of the leaf."""
    if path and getattr(path[-1], "name", None) in ("value", "raw_value"):
        return path[:-1]
    return path


def is_box(node: Any) -> bool:
    """Returns True if ``node`` is a box of Linen or a variable of NNX."""
    return hasattr(node, "unbox") or hasattr(node, "get_metadata")


def without_boxes(tree: Any) -> Any:
    """``tree`` with each box replaced by what is in it."""
    return jax.tree.map(_content, tree, is_leaf=is_box)


def boxed_moments(moments: Any, params: Any) -> Any:
    """``moments`` in the boxes of ``params``, less the names of axes that have another size.

    A trainer that turns names into shardings would otherwise cut axes of size 1.
    """
    return _renamed(moments, params, lambda size, whole: size == whole)


def boxed_blocks(arrays: Any, params: Any) -> Any:
    """``arrays`` of blocks in the boxes of ``params``, less the names of axes that have size 1.

    Other axes count the blocks of a named axis and are cut as it is.
    """
    return _renamed(arrays, params, lambda size, whole: size != 1 or whole == 1)


def _renamed(moments: Any, params: Any, keeps_name: Callable[[int, int], bool]) -> Any:
    def rename(moment: Any, parameter: Any) -> Any:
        if not is_box(parameter):
            return moment
        content, shape = _content(moment), _content(parameter).shape

        def kept(names: AxisNames) -> AxisNames:
            sizes = zip(names, content.shape, shape, strict=False)
            return tuple(name if keeps_name(n, size) else None for name, n, size in sizes)

        if hasattr(parameter, "names"):
            return moment.replace(names=kept(parameter.names))
        metadata = parameter.get_metadata()
        names = {key: kept(metadata[key]) for key in NNX_NAMES if metadata.get(key)}
        return type(parameter)(content, **(metadata | names)) if names else moment

    return jax.tree.map(rename, moments, params, is_leaf=is_box)


def boxed_like(moments: Any, before: Any) -> Any:
    """``moments`` in the boxes of those from the step before."""
    return jax.tree.unflatten(jax.tree.structure(before), jax.tree.leaves(moments))


def _content(node: Any) -> Any:
    if not is_box(node):
        return node
    # The child, not the leaves: a compressed update is a node of several arrays.
    (content,) = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    return content
