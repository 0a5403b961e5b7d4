"""Mapping over parameter-shaped trees with several results per leaf."""

import zlib
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import KeyPath

from microadam_jax.boxes import without_boxes

PyTree = Any


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
    columns = [plain.flatten_up_to(without_boxes(other)) for other in rest]
    return treedef, [
        (path, leaf, *others) for (path, leaf), *others in zip(leaves, *columns, strict=True)
    ]


def columns_of(treedef: Any, rows: Sequence[tuple[Any, ...]], results: int) -> tuple[PyTree, ...]:
    """Gathers ``results`` values of each leaf in as many trees of the structure ``treedef``."""
    by_result = zip(*rows, strict=True) if rows else [()] * results
    return tuple(treedef.unflatten(values) for values in by_result)


def owner_of(path: KeyPath, parameters: Container[KeyPath]) -> KeyPath | None:
    """Returns the path of the parameter that a state array belongs to: the end of its own."""
    return next((path[cut:] for cut in range(len(path) + 1) if path[cut:] in parameters), None)


def path_name(path: KeyPath) -> str:
    """The path of a leaf as ``"layers/norm/scale"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_key(seed: jax.typing.ArrayLike, count: jax.Array, path: KeyPath) -> jax.Array:
    """A random key for the leaf at ``path`` in step ``count``: the same on any mesh."""
    key = jax.random.fold_in(jax.random.key(seed), count)
    return jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))


def leaf_keys(
    seed: jax.typing.ArrayLike, count: jax.Array, tree: PyTree, prefix: KeyPath = ()
) -> dict[KeyPath, jax.Array]:
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
    names = [zlib.crc32(path_name((*prefix, *path)).encode()) for path in paths]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.asarray(names, np.uint32))
    return {path: keys[i] for i, path in enumerate(paths)}
