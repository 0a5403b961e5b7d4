"""Flax's boxes around parameters, and the axis names they carry.

Flax itself is not needed: Linen's boxes are known by ``unbox`` and ``names``, NNX's variables by
``get_metadata``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.tree_util import KeyPath

AxisNames = tuple[Any, ...]
NNX_NAMES = ("out_sharding", "sharding_names", "sharding")


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
