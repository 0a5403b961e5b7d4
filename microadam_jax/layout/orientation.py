"""Which kernels are stored from outputs to inputs, and of which nothing can tell."""

import enum
import re
from collections.abc import Mapping

from microadam_jax.layout.path_rules import path_pattern
from microadam_jax.trees import Shape

_KERNEL = re.compile(r"(?:^|(?P<parent>.*)/)(?P<leaf>kernel|w)")
_BIASES = {"kernel": "bias", "w": "b"}
# Haiku's and Keras's transposed convolutions.
_ALWAYS = path_pattern(r"conv[123]_?d_transpose(_\d+)?")
# Linear maps of the GPT-2 of Hugging Face Flax, which others write with kernels (in, out).
_EXPANDS = path_pattern("c_attn|c_fc")
_CONTRACTS = path_pattern("mlp[^/]*/c_proj")
_FAMILY = path_pattern("c_attn|c_fc|c_proj|q_attn")
# Flax's have an option for it, `transpose_kernel`.
_TRANSPOSED = path_pattern(r"(\w*_)?[Cc]onv_?[Tt]ranspose\w*")


class Orientation(enum.Enum):
    """The order of a kernel's last two axes."""

    IN_OUT = "(in, out)"
    OUT_IN = "(out, in)"
    ASSUMED = "assumed (in, out)"


def orientations(shapes: Mapping[str, Shape]) -> dict[str, Orientation]:
    """Returns the kernels that are stored ``(out, in)``, and those that may be.

    A bias has the size of the outputs, so it tells where the two sizes differ. Else the name may:
    transposed convolutions of Haiku and Keras, and GPT-2's ``c_attn``, ``c_fc`` and ``c_proj``,
    which widen or narrow; a square one of these is as its neighbours are.

    Args:
        shapes: the shape of each leaf, of one layer where layers are stacked, by path.

    Returns:
        The orientation by path; a kernel that is missing is ``(in, out)``, as in Flax.

    Examples:
        >>> from microadam_jax.layout.orientation import orientations
        >>> shapes = {"up/kernel": (3, 3, 6, 5), "up/bias": (6,), "mlp/kernel": (6, 5)}
        >>> {path: found.value for path, found in orientations(shapes).items()}
        {'up/kernel': '(out, in)'}
    """
    found: dict[str, Orientation] = {}
    undecided: list[str] = []
    family: set[Orientation] = set()
    for path, shape in shapes.items():
        match = _KERNEL.fullmatch(path)
        if match is None or len(shape) < 2:
            continue
        parent, leaf = match["parent"] or "", match["leaf"]
        bias = shapes.get(f"{parent}/{_BIASES[leaf]}" if parent else _BIASES[leaf])
        known = _by_bias(shape, bias) or _by_name(parent, shape)
        in_family = _FAMILY.search(parent) is not None
        if known is Orientation.OUT_IN:
            found[path] = known
        elif known is None and (in_family or _TRANSPOSED.search(parent)):
            undecided.append(path)
        if known is not None and in_family:
            family.add(known)
    for path in undecided:
        parent = path.rpartition("/")[0]
        told = family if _FAMILY.search(parent) else set()
        if told != {Orientation.IN_OUT}:
            found[path] = (
                Orientation.OUT_IN if told == {Orientation.OUT_IN} else Orientation.ASSUMED
            )
    return found


def _by_bias(shape: Shape, bias: Shape | None) -> Orientation | None:
    first, last = shape[-2:]
    if first == last or bias not in ((first,), (last,)):
        return None
    return Orientation.IN_OUT if bias == (last,) else Orientation.OUT_IN


def _by_name(parent: str, shape: Shape) -> Orientation | None:
    first, last = shape[-2:]
    if _ALWAYS.search(parent):
        return Orientation.OUT_IN
    if len(shape) != 2 or first == last:
        return None
    if _EXPANDS.search(parent):
        return Orientation.OUT_IN if first > last else Orientation.IN_OUT
    if _CONTRACTS.search(parent):
        return Orientation.OUT_IN if first < last else Orientation.IN_OUT
    return None
