"""A function that keeps codes, not arrays, for its backward pass."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from microadam_jax.codecs.codec import Codec, ResidualCodec, as_codec
from microadam_jax.layers.fp8_activation import Fp8Activation
from microadam_jax.layers.known_values import UNKNOWN, known_outputs
from microadam_jax.layers.saved_codes import in_turn, when_needed, with_codes

CODED = ("float32", "bfloat16", "float16")


def compress_residuals(
    f: Callable[..., Any],
    *,
    codec: Codec | ResidualCodec | str = Fp8Activation(),
    min_size: int = 4096,
) -> Callable[..., Any]:
    r"""Returns ``f`` with its backward pass reading codes of what it would have kept.

    Differentiation keeps residuals :math:`r_1, r_2, \dots` of the forward pass, and the gradient
    is a function of them. With a codec :math:`Q`,

    .. math::

        y = f(\theta, x), \qquad
        \nabla f(\theta, x)^T \dot y \approx
            g(\theta, Q^{-1}(Q(r_1)), Q^{-1}(Q(r_2)), \dots; \dot y) .

    The value :math:`y` is exact. Kept as they are: arrays below ``min_size`` elements, those that
    codes would not make smaller, and what is no float32, bfloat16 or float16. Not kept at all:
    what follows from the parameters alone, such as the parameters themselves or a cast of them to
    bfloat16; it is computed again.

    What is kept and what is saved by ``jax.checkpoint`` in ``f`` is one thing, so
    ``compress_residuals(jax.checkpoint(f, policy=...))`` quantizes what the policy saves, or
    without a policy the inputs alone. Around the result,
    ``jax.checkpoint(..., policy=save_only_these_names("compressed_residuals"))`` saves the codes.

    A group of elements that holds a NaN or an infinity becomes NaN, and with it the gradient.
    Values beyond the range of the residual's dtype after rounding become its largest number.

    Args:
        f: ``f(params, *inputs)``, each a pytree of arrays, such as ``model.apply`` of Linen or
            ``lambda layer, x: layer(x)`` for an NNX layer. Arrays it closes over are parameters
            too. Statistics and random numbers of an NNX module are updated as usual.
        codec: the format, an :func:`fp8_activation` or any signed codec of the package, or a
            codec's name such as ``"dynamic8"`` or ``"dynamic4"``.
        min_size: residuals with fewer elements are kept as they are.

    Returns:
        A function of the same arguments. It takes ``key=``, a typed random key, if the codec
        rounds stochastically; then each quantized residual is unbiased. It has no forward-mode
        derivative.

    Raises:
        TypeError: if ``codec`` is neither a codec nor a name; when called, for keyword arguments
            of ``f``, which are to be bound before.
        ValueError: if there is no codec of this name or it holds no negative numbers, and when
            called, if there are parameters and no inputs, if a key is missing or not needed, or if
            ``f`` changed in place what is no NNX module.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from microadam_jax.layers import compress_residuals
        >>> w, x = (jax.random.normal(jax.random.key(n), (n, 64)) for n in (64, 128))
        >>> layer = lambda w, x: jnp.square(x @ w).sum()
        >>> exact, coded = jax.grad(layer)(w, x), jax.grad(compress_residuals(layer))(w, x)
        >>> bool(jnp.linalg.norm(coded - exact) < 0.05 * jnp.linalg.norm(exact))
        True

    Reference: Xi et al., COAT (arXiv 2410.19313), Section 5, for the format; the forward pass of
    COAT is quantized too, see :func:`fp8_linear`.
    """
    chosen = _residual_codec(codec)

    @functools.wraps(f)
    def compressed(params: Any, *inputs: Any, key: jax.Array | None = None, **others: Any) -> Any:
        _require_key(chosen, key)
        if others:
            raise TypeError(
                f"compress_residuals passes on no keyword argument; got {', '.join(others)}. Bind "
                "it before: compress_residuals(functools.partial(f, train=True))."
            )
        if not inputs:
            raise ValueError(
                "compress_residuals(f) was called with one argument. That is the parameters, and "
                "what follows from them alone is computed again and never kept in codes. Pass "
                "activations behind them: compress_residuals(lambda params, x: ...)(params, x)."
            )
        arguments = (params, *inputs)
        traced, shapes = jax.make_jaxpr(_with_changes(f), return_shape=True)(*arguments)
        plan = _Plan(traced.jaxpr, len(traced.consts), chosen, min_size)
        kept = [*traced.consts, *jax.tree.leaves(params)]
        results = _call(plan, kept, jax.tree.leaves(inputs), key)
        outputs, changed = jax.tree.unflatten(jax.tree.structure(shapes), results)
        _write(arguments, changed)
        return outputs

    return compressed


class _Plan:
    """Holds what is known of a call when it is traced; equal to nothing but itself."""

    def __init__(self, jaxpr: Any, consts: int, codec: ResidualCodec, min_size: int) -> None:
        self.jaxpr, self.consts, self.codec, self.min_size = jaxpr, consts, codec, min_size

    def forward(self, kept: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        consts, params = kept[: self.consts], kept[self.consts :]
        return core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, consts))(*params, *inputs)

    def store(self, residual: jax.Array, key: jax.Array | None, index: int) -> Any:
        """Returns the codes of the residual with this index, or itself."""
        if not self._is_coded(residual):
            return residual
        key = None if key is None else jax.random.fold_in(key, index)
        return self.codec.encode(residual.astype(jnp.float32), key)

    def restored(self, stored: Any, like: Any) -> jax.Array:
        """Returns the residual of the shape and dtype of ``like``."""
        if not self._is_coded(like):
            return stored
        largest = float(jnp.finfo(like.dtype).max)
        values = self.codec.decode(stored, like.shape)
        return jnp.clip(values, -largest, largest).astype(like.dtype)

    def _is_coded(self, x: Any) -> bool:
        """True for a large array of a float dtype that becomes smaller by it."""
        if x.size < self.min_size or x.dtype not in CODED:
            return False
        shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        key = jax.eval_shape(lambda: jax.random.key(0)) if self.codec.needs_key else None
        codes = jax.eval_shape(self.codec.encode, shape, key)
        return sum(c.size * c.dtype.itemsize for c in codes) < x.size * jnp.dtype(x.dtype).itemsize


class _Linear:
    """The linearized function and how to find its residuals; equal to nothing but itself.

    Attributes:
        traced: from parameters and inputs to outputs and residuals.
        vjp: the structure of the function from cotangents to gradients.
        sources: for each residual which of the stored arrays it is; None if it is known.
    """

    def __init__(self, traced: core.ClosedJaxpr, vjp: Any, sources: list[int | None]) -> None:
        self.traced, self.vjp, self.sources = traced, vjp, sources


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kept", "stored"], meta_fields=["linear"]
)
class _Saved:
    """Holds what a call leaves for its backward pass."""

    def __init__(self, kept: list[jax.Array], stored: list[Any], linear: _Linear) -> None:
        self.kept, self.stored, self.linear = kept, stored, linear


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _call(plan: _Plan, kept: list[Any], inputs: list[Any], key: jax.Array | None) -> list[Any]:
    del key
    return plan.forward(kept, inputs)


def _forward(
    plan: _Plan, kept: list[Any], inputs: list[Any], key: jax.Array | None
) -> tuple[list[Any], _Saved]:
    traced, (shapes, vjp) = jax.make_jaxpr(
        lambda kept, inputs: jax.vjp(plan.forward, kept, inputs), return_shape=True
    )(kept, inputs)
    values = core.jaxpr_as_fun(traced)(*kept, *inputs)
    known = known_outputs(traced, [*kept, *[UNKNOWN] * len(inputs)])
    outputs, residuals = values[: len(shapes)], values[len(shapes) :]
    place: dict[Any, int] = {}
    sources: list[int | None] = []
    stored: list[Any] = []
    for variable, residual, value in zip(
        traced.jaxpr.outvars[len(shapes) :], residuals, known[len(shapes) :], strict=True
    ):
        if value is not UNKNOWN:
            sources.append(None)
            continue
        if variable not in place:
            place[variable] = len(stored)
            if stored:
                residual, stored[-1] = in_turn(residual, stored[-1])
            stored.append(plan.store(residual, key, len(stored)))
        sources.append(place[variable])
    outputs, stored = with_codes(outputs, stored)
    return outputs, _Saved(kept, stored, _Linear(traced, jax.tree.structure(vjp), sources))


def _backward(plan: _Plan, saved: _Saved, cotangents: list[Any]) -> tuple[Any, Any, None]:
    linear = saved.linear
    unknown = [UNKNOWN] * (len(linear.traced.in_avals) - len(saved.kept))
    known = known_outputs(linear.traced, [*saved.kept, *unknown])[len(cotangents) :]
    floats = [c for c in cotangents if c.dtype != jax.dtypes.float0]
    # Each on its own, so that not all codes of a layer have to be there for the first.
    stored = [when_needed(floats, codes)[1] for codes in saved.stored]
    shapes = linear.traced.out_avals[len(cotangents) :]
    residuals = [
        value if source is None else plan.restored(stored[source], shape)
        for value, source, shape in zip(known, linear.sources, shapes, strict=True)
    ]
    gradients = jax.tree.unflatten(linear.vjp, residuals)(cotangents)
    return *gradients, None


_call.defvjp(_forward, _backward)


def _residual_codec(codec: Codec | ResidualCodec | str) -> ResidualCodec:
    chosen = codec if isinstance(codec, ResidualCodec) else as_codec(codec)
    if not chosen.signed:
        raise ValueError(
            f"compress_residuals needs a codec of negative numbers too; {chosen.name} has none. "
            "Take one such as 'dynamic8', 'linear4' or 'e4m3'."
        )
    return chosen


def _require_key(codec: ResidualCodec, key: jax.Array | None) -> None:
    if codec.needs_key and key is None:
        raise ValueError(
            f"{codec.name} rounds stochastically: call the function with key=, a random key that "
            "differs from step to step and from layer to layer."
        )
    if not codec.needs_key and key is not None:
        raise ValueError(
            f"{codec.name} rounds to nearest and needs no key; got one. Leave key= away, or take "
            "a codec with rounding='stochastic'."
        )


def _with_changes(f: Callable[..., Any]) -> Callable[..., Any]:
    """Returns also what ``f`` put in the place of arrays in its arguments, by their index."""

    def both(*arguments: Any) -> tuple[Any, dict[int, jax.Array]]:
        before = jax.tree.leaves(arguments)
        outputs = f(*arguments)
        after = jax.tree.leaves(arguments)
        if len(after) != len(before):
            raise ValueError(
                "The function given to compress_residuals makes new variables in a module, as "
                "nnx.Module.sow does. Make them before, or leave them out."
            )
        pairs = enumerate(zip(before, after, strict=True))
        return outputs, {index: new for index, (old, new) in pairs if new is not old}

    return both


def _write(arguments: tuple[Any, ...], changed: dict[int, jax.Array]) -> None:
    """Puts changed arrays where the caller sees them: in modules of NNX."""
    if not changed:
        return
    leaves, structure = jax.tree.flatten(arguments)
    renewed = jax.tree.unflatten(
        structure, [changed.get(index, leaf) for index, leaf in enumerate(leaves)]
    )
    nnx = sys.modules.get("flax.nnx")  # who has a module has imported it
    for argument, new in zip(arguments, renewed, strict=True):
        if nnx and isinstance(argument, nnx.Module):
            nnx.update(argument, nnx.state(new))
        elif any(a is not b for a, b in zip(*map(jax.tree.leaves, (argument, new)), strict=True)):
            raise ValueError(
                "The function given to compress_residuals changed an argument in place that is no "
                f"NNX module but {type(argument).__name__}. Let it return what is new."
            )
