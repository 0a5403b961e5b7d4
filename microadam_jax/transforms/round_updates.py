"""Parameters in bfloat16 that learn as those in float32 do."""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.arguments import as_transformation
from microadam_jax.codecs import Codec, as_codec
from microadam_jax.codecs.rounding import bfloat16_stochastic
from microadam_jax.codecs.split import Split
from microadam_jax.diagnostics import observe_rounding
from microadam_jax.engine.stored_step import typed_key
from microadam_jax.engine.transformation import transformation
from microadam_jax.execution import remark
from microadam_jax.state_arrays import unused_factor
from microadam_jax.state_format import setting
from microadam_jax.transforms.first_moment import FirstMoment
from microadam_jax.trees import (
    KeyPath,
    boxed_blocks,
    boxed_like,
    columns_of,
    leaf_keys,
    map_with_path,
    path_name,
    rows_of,
)

Rounding = Literal["stochastic", "compensated", "momentum"]


class RoundUpdatesState(NamedTuple):
    """Holds the state of an optimizer whose parameters are rounded.

    Attributes:
        count: int32 scalar, steps taken.
        error: what the parameters lack of float32. If they are compensated, a dictionary with one
            key, the name of the codec, and below it a tree of the parameters' structure for each
            of its arrays; else empty.
        inner_state: of the optimizer, as for float32 parameters.
    """

    count: jax.Array
    error: dict[str, dict[str, Any]]
    inner_state: Any


def round_updates(
    inner: optax.GradientTransformation,
    rounding: Rounding = "stochastic",
    *,
    error: Split | Codec | str = "int8",
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets parameters in bfloat16 learn as those in float32 do.

    A bfloat16 has 8 binary digits: an update below half a unit in the last place, about
    :math:`2^{-9} |\theta|`, is lost, and so is a weight decay of :math:`\eta \lambda < 2^{-9}`,
    in every step anew. Here the optimizer :math:`f` computes in float32, of

    .. math::

        w_t = \theta_t + \epsilon_t, \qquad
        x_t = w_t + f(g_t, w_t), \qquad
        \theta_{t+1} = Q(x_t), \qquad
        e_t = x_t - \theta_{t+1}

    and what becomes of the error :math:`e_t` is chosen:

    - ``"stochastic"``: :math:`Q` takes either neighbour, without bias, and no error is kept.
    - ``"compensated"``: :math:`Q` takes the nearest, and :math:`\epsilon_{t+1} = C(e_t)` is kept
      through a codec :math:`C`: one more byte per parameter for ``"int8"``.
    - ``"momentum"``: :math:`Q` takes either neighbour, without bias, and the first moment of the
      optimizer takes up the error: no byte more.

    The first moment changes so that the next updates sum up to :math:`e_t` more:

    .. math::

        m_t \leftarrow m_t + (1 - \beta_1) \Big(\frac{\partial u_t}{\partial m_{t-1}}\Big)^{-1} e_t
        = m_t + \frac{1 - \beta_1^t}{\eta_t} \Big(1 - \frac{1}{\beta_1}\Big)
            \left(\sqrt{\hat v_t} + \epsilon\right) e_t

    of which the right side is that of Adam. The derivative comes from the optimizer itself, so
    that its learning rate and moments need not be told.

    The update that is returned is the float32 difference :math:`\theta_{t+1} - \theta_t`, which
    ``optax.apply_updates`` adds in float32 and rounds to :math:`\theta_{t+1}` exactly. Give
    gradients and parameters to the whole, as an optimizer in bfloat16 would round its own updates:
    this wraps it, and is not the last of a chain. Parameters in float32 or float64 are left alone.

    Args:
        inner: any optimizer, learning rate and weight decay included. Its state is that for
            float32 parameters.
        rounding: ``"stochastic"``, ``"compensated"`` or ``"momentum"``.
        error: the codec :math:`C` of ``"compensated"``: ``"int8"``, 24-bit parameters in 3 bytes,
            stochastically rounded; ``"int16"``, which restores every float32 exactly;
            ``"float32"``; or another codec, rounded stochastically, or its name.
        seed: of stochastic rounding, which draws from the seed, the step, the leaf's path and the
            position in the leaf: the same on any mesh.

    Returns:
        The optimizer. Its ``update`` needs the parameters.

    Raises:
        TypeError: if ``inner`` is no transformation; in ``init``, for parameters in float16.
        ValueError: if there is no such rounding or codec, or the codec rounds to nearest or has no
            -1; with ``"momentum"``, in ``init``, if the optimizer has no first moment in float32,
            as low-bit optimizers, or its update is no smooth function of each element's own, as
            that of Lion or Muon; in ``update``, without ``params``, or if the state was stored
            through another codec.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from microadam_jax import round_updates
        >>> params, gradient = jnp.ones(1000, jnp.bfloat16), jnp.ones(1000, jnp.bfloat16)
        >>> def after(tx, params, steps=200):
        ...     def step(_, carry):
        ...         params, state = carry
        ...         updates, state = tx.update(gradient, state, params)
        ...         return optax.apply_updates(params, updates), state
        ...     params, _ = jax.lax.fori_loop(0, steps, step, (params, tx.init(params)))
        ...     return round(float(params.astype(jnp.float32).mean()), 2)
        >>> after(optax.adam(1e-3), params)  # should be 0.8
        1.0
        >>> after(round_updates(optax.adam(1e-3)), params)
        0.8

    Reference: ECO (arXiv 2601.22101) for ``"momentum"``; FlashOptim (arXiv 2602.23349) for the
    split of ``"int8"`` and ``"int16"``.
    """
    inner = as_transformation(inner=inner)
    if rounding not in get_args(Rounding):
        raise ValueError(
            f"rounding must be one of {', '.join(map(repr, get_args(Rounding)))}; got {rounding!r}."
        )
    codec = _codec(error)

    def init(params: optax.Params) -> RoundUpdatesState:
        setting("parameters rounded", rounding)
        _require(params)
        wide = jax.tree.map(_wide, params)
        inner_state = inner.init(wide)
        if rounding == "momentum":
            FirstMoment.find(inner_state, wide).require_elementwise(inner, inner_state, wide)
        kept = _zeros(codec, params) if rounding == "compensated" else {}
        return RoundUpdatesState(jnp.zeros([], jnp.int32), kept, inner_state)

    def update(
        updates: optax.Updates,
        state: RoundUpdatesState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RoundUpdatesState]:
        if params is None:
            raise ValueError(
                "round_updates rounds the parameters: call tx.update(updates, state, params)."
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        keys = leaf_keys(seed, state.count, updates)
        columns = _columns(codec, state.error) if rounding == "compensated" else ()

        def restore(path: KeyPath, g: jax.Array, p: jax.Array, *stored: Any) -> tuple[Any, ...]:
            whole = _restored(codec, p, stored) if stored and _rounded(p) else _wide(p)
            return _wide(g), whole

        def move(path: KeyPath, u: Any, p: Any, w: Any, *stored: Any) -> tuple[Any, ...]:
            observe_rounding(path, u, p)
            if not _rounded(p):
                return u, jnp.zeros_like(u), *stored
            new = w + u.astype(jnp.float32)
            if stored:
                near, stored = _kept(codec, new, typed_key(keys[path]))
            else:
                near = bfloat16_stochastic(new, typed_key(keys[path]))
            near, p = near.astype(jnp.float32), p.astype(jnp.float32)
            # An infinite parameter that does not move would else become NaN.
            return jnp.where(near == p, 0, near - p), jnp.where(near == new, 0, new - near), *stored

        gradients, whole = map_with_path(restore, 2, updates, params, *columns)
        tx_state, response, moment = state.inner_state, None, None
        if rounding == "momentum":
            moment = FirstMoment.find(tx_state, whole)
            moved, tx_state, response = moment.update(inner, gradients, tx_state, whole, extra_args)
        else:
            moved, tx_state = inner.update(gradients, tx_state, whole, **extra_args)
        results = 2 + len(columns)
        moved, errors, *new = map_with_path(move, results, moved, params, whole, *columns)
        if moment is not None and response is not None:
            tx_state = moment.with_error(tx_state, response, jax.tree.leaves(errors))
        stored = [boxed_like(tree, before) for tree, before in zip(new, columns, strict=True)]
        kept = _field(codec, stored) if stored else {}
        return moved, RoundUpdatesState(count, kept, tx_state)

    return transformation(init, update)


def _codec(error: Split | Codec | str) -> Split | Codec:
    """The codec that ``error`` is or names."""
    if error in ("int8", "int16"):
        return Split(int(str(error)[3:]))
    try:
        codec = as_codec(error)  # pyrefly: ignore
    except ValueError as unknown:
        raise ValueError(f"{unknown} For rounding errors there are int8 and int16 too.") from None
    numbers = getattr(codec, "map", None)
    if numbers is not None and numbers.values[0] > -1:
        raise ValueError(
            f"error={codec.name} has no -1: a block whose largest error is negative would lose a "
            "part of it at every step. Take 'int8', 'int16', 'float32', or one with symmetric=True."
        )
    if getattr(codec, "rounding", "stochastic") == "stochastic":
        return codec
    if isinstance(error, str):
        return dataclasses.replace(codec, rounding="stochastic")  # pyrefly: ignore
    raise ValueError(
        f"error={codec.name} is rounded to nearest, which loses small errors at every step as the "
        "parameters do. Give it rounding='stochastic', or 'int8' or 'int16'."
    )


def _rounded(parameter: Any) -> bool:
    return parameter.dtype == jnp.bfloat16


def _wide(x: Any) -> Any:
    """``x`` in float32 if it is in fewer bits."""
    if not _rounded(x):
        return x
    return x.update(dtype=jnp.float32) if isinstance(x, jax.ShapeDtypeStruct) else _cast(x)


def _cast(x: Any) -> Any:
    return x.astype(jnp.float32)


def _require(params: optax.Params) -> None:
    for path, leaf in jax.tree.leaves_with_path(params):
        if leaf.dtype == jnp.float16:
            raise TypeError(
                f"The parameter {path_name(path)!r} is in float16, whose range ends at 65504 and "
                "at 6e-8, where no rounding helps. Keep parameters in bfloat16 or float32."
            )
        if not _rounded(leaf):
            remark(path, f"in {leaf.dtype}: updates are not rounded")


def _zeros(codec: Any, params: optax.Params) -> dict[str, dict[str, Any]]:
    slots = len(codec.Encoded._fields)
    treedef, rows = rows_of(params)
    arrays = [codec.zeros(p) if _rounded(p) else (unused_factor(p),) * slots for _, p in rows]
    columns = columns_of(treedef, [tuple(own) for own in arrays], slots)
    return _field(codec, [boxed_blocks(column, params) for column in columns])


def _field(codec: Any, columns: Any) -> dict[str, dict[str, Any]]:
    return {codec.name: dict(zip(codec.Encoded._fields, columns, strict=True))}


def _columns(codec: Any, field: dict[str, dict[str, Any]]) -> tuple[Any, ...]:
    if tuple(field) != (codec.name,):
        raise ValueError(
            f"The state keeps rounding errors in {', '.join(field) or 'no codec'}, and this "
            f"optimizer in {codec.name}. Restore it with the codec it was saved with."
        )
    return tuple(field[codec.name][slot] for slot in codec.Encoded._fields)


def _restored(codec: Any, p: jax.Array, stored: Any) -> jax.Array:
    """The parameter with its error, in float32."""
    if isinstance(codec, Split):
        return codec.join(p, codec.Encoded(*stored))
    return p.astype(jnp.float32) + codec.decode(codec.Encoded(*stored), p.shape)


def _kept(codec: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The bfloat16 next to ``x``, and the arrays that hold the rest."""
    own = key if codec.needs_key else None
    if isinstance(codec, Split):
        return codec.split(x, own)
    near = x.astype(jnp.bfloat16)
    finite = jnp.isfinite(x)
    rest = jnp.where(finite, x, 0) - jnp.where(finite, near.astype(jnp.float32), 0)
    return near, tuple(codec.encode(rest, own))
