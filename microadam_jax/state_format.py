"""What a saved state was made with, so that another optimizer does not take it for its own."""

import zlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import optax

from microadam_jax.arguments import require_transformation
from microadam_jax.execution import scope, within
from microadam_jax.memory import named_leaves
from microadam_jax.trees import path_name

# Raised when arrays of the same names, shapes and dtypes come to mean something else.
STATE_FORMAT = 1
ARRAYS, SUBSET_NORMS = "arrays", "subset norms"
SINCE_2026_11_29 = (ARRAYS, SUBSET_NORMS)  # formats that were saved before lack them


def setting(name: str, value: object) -> None:
    """Tells the state format being made, if any, a setting that the state depends on."""
    settings = scope().settings
    if settings is not None:
        again = sum(known.split(" #")[0] == name for known in settings)
        settings[f"{name} #{again + 1}" if again else name] = str(value)


def state_format(tx: optax.GradientTransformation, params: optax.Params) -> dict[str, Any]:
    """Returns what the state of ``tx`` depends on, as JSON to save beside it.

    A restore into other shapes fails with two shapes, which do not say what to change, and one
    into other dtypes may cast without a word. Save this with each checkpoint, and call
    :func:`require_state_format` before restoring.

    Args:
        tx: any Optax transformation.
        params: the parameters, or ``jax.ShapeDtypeStruct`` of them; nothing is allocated.

    Returns:
        The library's format version, a digest of where its arrays are and of their shapes, the
        settings of its links, and for each state field the dtypes of its arrays and how many
        numbers are in them.

    Raises:
        TypeError: if ``tx`` is not a transformation.

    Examples:
        >>> import jax
        >>> from microadam_jax import microadam, state_format
        >>> params = {"w": jax.ShapeDtypeStruct((512, 1024), "float32")}
        >>> saved = state_format(microadam(1e-3), params)
        >>> saved["window"], saved["ScaleByWindowAdamState.window_indices"]
        ('10 in bfloat16', 'uint8: 81,920')
    """
    require_transformation(tx=tx)
    settings: dict[str, str] = {}
    with within(settings=settings):
        # A fresh function each time: eval_shape would answer a known one without running it.
        state = jax.eval_shape(lambda params: tx.init(params), params)
    places = [(path_name(path), leaf.shape) for path, leaf in jax.tree.leaves_with_path(state)]
    dtypes: dict[str, dict[str, None]] = defaultdict(dict)
    numbers: dict[str, int] = defaultdict(int)
    for field, leaf in named_leaves(state, params):
        dtypes[field][str(leaf.dtype)] = None
        numbers[field] += leaf.size
    fields = {name: f"{', '.join(kinds)}: {numbers[name]:,}" for name, kinds in dtypes.items()}
    digest = f"{zlib.crc32(repr(places).encode()):08x}"
    return {"state format": STATE_FORMAT, ARRAYS: digest, **settings, **fields}


def require_state_format(
    saved: Mapping[str, Any], tx: optax.GradientTransformation, params: optax.Params
) -> None:
    """Refuses a saved state that ``tx`` would not go on with.

    Args:
        saved: what :func:`state_format` returned when the state was saved.
        tx: the optimizer that is to go on.
        params: the parameters, or ``jax.ShapeDtypeStruct`` of them.

    Raises:
        ValueError: if anything differs; it names each setting as it was and as it is.

    Examples:
        >>> import jax
        >>> from microadam_jax import microadam, require_state_format, state_format
        >>> params = {"w": jax.ShapeDtypeStruct((512, 1024), "float32")}
        >>> saved = state_format(microadam(1e-3), params)
        >>> require_state_format(saved, microadam(1e-4), params)  # the learning rate may change
    """
    now = state_format(tx, params)
    unknown = () if ARRAYS in saved else SINCE_2026_11_29
    differences = [
        f"{name} was {saved.get(name, 'not there')} and is now {now.get(name, 'not there')}"
        for name in dict(saved) | now
        if saved.get(name) != now.get(name) and name not in (ARRAYS, *unknown)
    ]
    if not differences and ARRAYS not in unknown and saved[ARRAYS] != now[ARRAYS]:
        differences.append(
            "its arrays have other shapes or other places, as with another partition, another side "
            "of matrices or other links in the chain"
        )
    if differences:
        more = f"; {len(differences) - 4} more differ" if len(differences) > 4 else ""
        raise ValueError(
            f"The checkpoint is of another optimizer: {'; '.join(differences[:4])}{more}. "
            "Restore it with the settings and the version it was saved with."
        )
