"""Finds the axis of a parameter that stacks layers, and says which layers are small."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

from microadam_jax.layout.names import LORA, NORM
from microadam_jax.layout.path_rules import path_pattern
from microadam_jax.trees import KeyPath, LeafShape, Shape, box_path, path_name

# Containers of layers that nn.scan, nnx.vmap and MaxText stack: no number follows them. As a
# default it also asks the tree, see `layer_axes`.
STACKED = r"(\w*_)?(layers|blocks|stack|h|encoderblock)|(Scan|Vmap)\w*_\d+"

LAYER_AXIS_NAMES = ("layers", "layer", "blocks", "stack", "scan")

# Names that single layers have as often: a recurrent cell's hidden projection, an MLP's list.
_DOUBTFUL = path_pattern(r"\w+_h|hidden_layers|\w+_stack")
# `layer_0`, `Block_3`, `h_11`, `layers_2`; but the parts of a layer, such as `MoeBlock_0` and
# `Conv_0`, are numbered too.
_INDEXED = re.compile(
    r"(?!\w*(?:att|mlp|moe|ffn|expert))(?:\w*(?:layer|block|cell|stage|unit)s?|[lbh])_?(?P<index>\d+)",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d+")
_VECTOR = path_pattern(rf"b|beta|gamma|scale|offset|[^/]*[Bb]ias|{NORM}/(weight|kernel|w)")
_MATRIX = path_pattern(rf"kernel|w|embeddings?|[^/]*{LORA}")


def layer_axes(
    leaves: Sequence[LeafShape], stacked: str = STACKED, layer_axis: int = 0
) -> dict[str, int | None]:
    r"""Returns by path the axis along which each leaf of a tree stacks layers; None for none.

    A box that names its axes counts first, also for the leaves of its container that have none.
    Otherwise ``stacked`` must match the path of a
    container of the leaf, or of the leaf itself, and what follows must be no index of a layer:
    ``layers/0/``, ``layers/layer_0/`` and ``blocks/block_3/`` hold single layers.

    The default pattern knows names only, which single layers have too. So it is for containers,
    and also asks the leaves below one: a stack has one size along the layer axis in all of them, no
    kernel of two axes and no bias of one; where all have one size along the next axis too, and a
    smaller one, it is left open. Of names such as ``hidden_layers`` and ``conv_stack``
    it takes more to be a stack: a bias or norm scale that has a layer axis as well.

    Args:
        leaves: all leaves of the tree.
        stacked: a path pattern (:func:`path_pattern`) such as ``"trunk"`` for what stacks layers.
        layer_axis: the layer axis of those.

    Examples:
        >>> from microadam_jax.layout.stacks import layer_axes
        >>> from microadam_jax.trees import LeafShape
        >>> single = LeafShape("blocks/block_0/kernel", (4, 2, 2))
        >>> layer_axes([single, LeafShape("layers/kernel", (3, 4, 8))])
        {'blocks/block_0/kernel': None, 'layers/kernel': 0}
    """
    asks_tree = stacked == STACKED
    found = _stacks(leaves, layer_axis) if asks_tree else frozenset()

    named = {leaf.path: axis for leaf in leaves if (axis := _named_axis(leaf)) is not None}
    # What a box says of one leaf of a container holds for those that have none.
    told = {c: axis for path, axis in named.items() for c, _ in _parts(stacked, path)}

    def axis_of(leaf: LeafShape) -> int | None:
        rank = len(leaf.shape)
        if leaf.path in named:
            return named[leaf.path]
        known = next((told[c] for c, _ in _parts(stacked, leaf.path) if c in told), None)
        if known is not None:
            return known if rank > known else None
        if asks_tree:
            is_stacked = any(container in found for container, _ in _parts(stacked, leaf.path))
        else:
            is_stacked = bool(path_pattern(stacked).search(leaf.path)) or any(
                not _is_indexed(rest) for _, rest in _parts(stacked, leaf.path)
            )
        return layer_axis if is_stacked and rank > layer_axis else None

    return {leaf.path: axis_of(leaf) for leaf in leaves}


def one_layer(shape: Shape, layer_axis: int | None) -> Shape:
    """Returns the shape of one layer of a leaf that stacks layers along ``layer_axis``, if any."""
    return tuple(n for axis, n in enumerate(shape) if axis != layer_axis)


def is_small(shape: Shape, layer_axis: int | None, min_size: int = 4096, min_row: int = 1) -> bool:
    """Returns True if a leaf is too small for what saves bytes on larger ones only.

    Args:
        shape: of the whole leaf, never of a device's shard: no state depends on the mesh.
        layer_axis: the axis along which it stacks layers, one of which counts, if any.
        min_size: the least elements of a leaf that is not small.
        min_row: the least elements of its last axis.
    """
    few = math.prod(one_layer(shape, layer_axis)) < min_size
    return few or (shape[-1] if shape else 1) < min_row


@functools.lru_cache(maxsize=4096)
def layer_axis_of(path: KeyPath, shape: Shape, stacked: str) -> int | None:
    """Returns 0 if a leaf stacks layers along its first axis, else None.

    It is :func:`layer_axes` for whoever sees one leaf at a time.

    Args:
        path: the leaf's path.
        shape: its shape.
        stacked: as for :func:`layer_axes`.
    """
    name = path_name(box_path(path))
    return layer_axes([LeafShape(name, shape)], stacked)[name]


@dataclasses.dataclass
class _Group:
    """The leaves below one container: their paths from there, and their shapes."""

    container: str
    leaves: list[tuple[str, Shape]] = dataclasses.field(default_factory=list)

    def is_stack(self, layer_axis: int) -> bool:
        """Returns True if nothing speaks against a stack, and something for it where needed."""
        shapes = [shape for _, shape in self.leaves]
        if any(len(shape) <= layer_axis for shape in shapes):
            return False
        if len({shape[layer_axis] for shape in shapes}) > 1:
            return False
        if any(_NUMBER.fullmatch(rest.split("/")[0]) for rest, _ in self.leaves):
            return False
        if any(len(shape) <= _least_rank(rest, self.container) for rest, shape in self.leaves):
            return False
        # A torch-like linear map without bias; of several layers there would be norms, too.
        if [(rest, len(shape)) for rest, shape in self.leaves] == [("weight", 2)]:
            return False
        indices = [m["index"] for rest, _ in self.leaves if (m := _index(rest))]
        if any(int(index) for index in indices):
            return False
        if layer_axis == 0 and self._seems_stacked_along_axis_1():
            return False
        if indices or _DOUBTFUL.search(self.container):
            # A body that consists of one module calls it `Block_0`.
            return any(_VECTOR.search(f"{self.container}/{rest}") for rest, _ in self.leaves)
        return True

    def _seems_stacked_along_axis_1(self) -> bool:
        """True if layers could be along axis 1 as well, and would be fewer there.

        So are those that ``nn.scan`` stacks with ``variable_axes={"params": 1}``, where no kernel
        has another number of inputs than the norm has features.
        """
        kinds = {bool(_VECTOR.search(f"{self.container}/{rest}")) for rest, _ in self.leaves}
        shapes = {shape[:2] for _, shape in self.leaves}
        return len(kinds) == 2 and len(shapes) == 1 and max(shapes)[0] > max(shapes)[-1]


def _named_axis(leaf: LeafShape) -> int | None:
    """Returns the layer axis that a leaf's box names."""
    if len(leaf.axes) != len(leaf.shape):
        return None
    return next((i for i, name in enumerate(leaf.axes) if name in LAYER_AXIS_NAMES), None)


def _stacks(leaves: Sequence[LeafShape], layer_axis: int) -> frozenset[str]:
    """Returns the containers that are stacks."""
    groups: dict[str, _Group] = {}
    for leaf in leaves:
        for container, rest in _parts(STACKED, leaf.path):
            group = groups.setdefault(container, _Group(container))
            group.leaves.append((rest, leaf.shape))
    return frozenset(name for name, group in groups.items() if group.is_stack(layer_axis))


def _parts(pattern: str, name: str) -> Iterator[tuple[str, str]]:
    """Yields each container of a path that ``pattern`` matches, and the path from there."""
    for slash in re.finditer("/", name):
        if path_pattern(pattern).search(name[: slash.start()]):
            yield name[: slash.start()], name[slash.end() :]


def _index(rest: str) -> re.Match[str] | None:
    """Returns the match of a component such as ``layer_3`` at the start of a path that goes on."""
    first, slash, _ = rest.partition("/")
    return _INDEXED.fullmatch(first) if slash else None


def _is_indexed(rest: str) -> bool:
    """Returns True if a path goes on with the index of a layer after a container."""
    return bool(_NUMBER.fullmatch(rest.split("/")[0]) or _index(rest))


def _least_rank(rest: str, container: str) -> int:
    """Returns how many axes a leaf of this name has in a single layer, at least."""
    name = f"{container}/{rest}"
    if _VECTOR.search(name):
        return 1
    return 2 if _MATRIX.search(name) else 0
