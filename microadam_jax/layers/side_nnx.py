"""Quantized Side Tuning in Flax NNX: a narrow network beside a frozen backbone."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from microadam_jax.arguments import require_positive
from microadam_jax.layers.side_network import (
    adapter,
    average_pool,
    fuse,
    low_rank,
    max_pool,
    mix_hidden_states,
    require_mix,
)

Downsampling = Literal["adapter", "lora", "max", "average"]
Mix = Literal["paper", "released", "residual"]
# PyTorch's default for a linear layer, which the released code has everywhere: uniform with
# limits of 1 / sqrt(fan in).
FAN_IN_UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LowRankMap(nnx.Module):
    """Downsamples with two factors, as LoRA; see :func:`microadam_jax.layers.low_rank`."""

    def __init__(self, width: int, reduction: int, rank: int, *, rngs: nnx.Rngs) -> None:
        """Draws both factors."""
        self.a = nnx.Param(FAN_IN_UNIFORM(rngs.params(), (width, rank)))
        self.b = nnx.Param(FAN_IN_UNIFORM(rngs.params(), (rank, width // reduction)))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Maps ``(..., d)`` to ``(..., d / r)``."""
        return low_rank(hidden, *_like(hidden, self.a, self.b))


class Adapter(nnx.Module):
    """Downsamples through a bottleneck, then normalizes; :func:`microadam_jax.layers.adapter`."""

    def __init__(self, width: int, reduction: int, rank: int, *, rngs: nnx.Rngs) -> None:
        """Draws both factors."""
        self.a = nnx.Param(FAN_IN_UNIFORM(rngs.params(), (width, rank)))
        self.b = nnx.Param(FAN_IN_UNIFORM(rngs.params(), (rank, width // reduction)))
        self.norm = nnx.LayerNorm(width // reduction, rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Maps ``(..., d)`` to ``(..., d / r)``."""
        return self.norm(adapter(hidden, *_like(hidden, self.a, self.b))).astype(hidden.dtype)


class Pool(nnx.Module):
    """Downsamples without weights: :func:`microadam_jax.layers.max_pool` or ``average_pool``."""

    def __init__(self, reduction: int, kind: Literal["max", "average"]) -> None:
        """Keeps what to do."""
        self.reduction, self.kind = reduction, kind

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Maps ``(..., d)`` to ``(..., d / r)``.

        Raises:
            ValueError: if ``r`` does not divide ``d``.
        """
        return (max_pool if self.kind == "max" else average_pool)(hidden, self.reduction)


class SideNetwork(nnx.Module):
    r"""Learns at width :math:`d / r` beside a frozen backbone of width :math:`d`.

    With the backbone's hidden states :math:`h_{f,0}` (its embedding) to :math:`h_{f,N}`, side
    layers :math:`g_i`, downsamplings :math:`D_i` and :math:`\beta_i = \sigma(\gamma_i)`,

    .. math::

        h_{g,0} &= D_0(\bar h_{f,0}), \\
        h_{g,i} &= g_i\big((1 - \beta_i) D_i(\bar h_{f,i}) + \beta_i h_{g,i-1}\big), \\
        h &= \alpha \bar h_{f,N} + (1 - \alpha)\, U(\mathrm{norm}(h_{g,N})) ,

    where the bar is ``stop_gradient``: nothing of the backbone is kept for the backward pass but
    the states that a downsampling with weights reads, and none with ``"max"`` or ``"average"``.
    The backbone's own head reads :math:`h`. Its final norm, where it has one, comes before the
    mix.

    Args:
        make_layer: makes one side layer of width :math:`d / r` from random numbers.
        layers: :math:`N`.
        width: :math:`d`.
        reduction: :math:`r`, a divisor of ``width``; 16 in the paper.
        downsample: ``"adapter"``, ``"lora"``, ``"max"`` or ``"average"``.
        rank: of the bottleneck of the first two.
        gate: ``"scalar"``, :math:`\gamma = 0` for each layer as in the paper; or ``"channel"``,
            :math:`\gamma = 1/2` for each channel as in the released code.
        mix: ``"paper"``, ``"released"`` or ``"residual"``, see
            :func:`microadam_jax.layers.mix_hidden_states`.
        make_norm: makes the norm before :math:`U` from the width and random numbers.
        rngs: random numbers.

    Raises:
        ValueError: if a size is not a positive integer, ``reduction`` does not divide ``width`` or
            an option has another value.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from microadam_jax.layers.nnx import SideNetwork
        >>> side = SideNetwork(
        ...     lambda rngs: nnx.Linear(4, 4, rngs=rngs), layers=2, width=64, rngs=nnx.Rngs(0)
        ... )
        >>> hidden = jax.random.normal(jax.random.key(0), (3, 8, 64))  # of N + 1 layers
        >>> mixed = side.mixed(hidden[-1], side(hidden))
        >>> bool(jnp.all(mixed == hidden[-1]))  # from the backbone's own predictions
        True

    Reference: Zhang et al., Quantized Side Tuning (arXiv 2401.07159), Section 3. The released code
    shares :math:`D_0` with the first layer.
    """

    def __init__(
        self,
        make_layer: Callable[[nnx.Rngs], nnx.Module],
        *,
        layers: int,
        width: int,
        reduction: int = 16,
        downsample: Downsampling = "adapter",
        rank: int = 16,
        gate: Literal["scalar", "channel"] = "scalar",
        mix: Mix = "paper",
        make_norm: Callable[..., nnx.Module] = nnx.RMSNorm,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws all weights; side layers and downsamplings are stacked, layer axis first."""
        require_mix(mix)
        sizes = {"layers": layers, "width": width, "reduction": reduction, "rank": rank}
        for name, size in sizes.items():
            require_positive(name, size)
        if width % reduction:
            raise ValueError(
                f"reduction {reduction} does not divide the width {width}; choose a divisor."
            )
        if gate not in ("scalar", "channel"):
            raise ValueError(f"gate must be 'scalar' or 'channel'; got {gate!r}.")
        narrow = width // reduction

        def make_downsampling(rngs: nnx.Rngs) -> nnx.Module:
            return _downsampling(downsample, width, reduction, rank, rngs)

        def stacked(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
            return nnx.split_rngs(splits=layers)(nnx.vmap(make))(rngs)

        self.depth, self.width, self.mix = layers, width, mix
        self.first = make_downsampling(rngs)
        self.downsamplings = stacked(make_downsampling)
        self.layers = stacked(make_layer)
        self.gammas = nnx.Param(
            jnp.zeros(layers) if gate == "scalar" else jnp.full((layers, narrow), 0.5)
        )
        self.norm = make_norm(narrow, rngs=rngs)
        zero = nnx.initializers.zeros_init()
        self.up = nnx.Linear(
            narrow, width, kernel_init=zero if mix == "residual" else FAN_IN_UNIFORM, rngs=rngs
        )
        start = {"paper": jnp.ones(()), "released": jnp.ones(width), "residual": None}[mix]
        self.alpha = None if start is None else nnx.Param(start)

    def __call__(self, hidden: Iterable[jax.Array], *inputs: Any) -> jax.Array:
        """Reads the hidden states of any backbone.

        Args:
            hidden: the embedding and the output of each layer, ``(..., d)`` each; a generator is
                read layer by layer.
            *inputs: what each side layer takes after its hidden state, such as a mask.

        Returns:
            :math:`U(h_{g,N})`, ``(..., d)``.

        Raises:
            ValueError: if there are not as many states as layers and one, or their last axis is
                not ``d``.
        """
        states = iter(hidden)
        parts = self.layers, self.downsamplings
        side, count = None, -1
        for count, state in enumerate(states):
            self._require_width(state)
            if side is None:
                side = self.first(jax.lax.stop_gradient(state))
                continue
            if count > self.depth:
                break
            taken = [_Taken.of(part, count - 1) for part in parts]
            layer, down = (one.layer for one in taken)
            side = _side_layer(layer, down, self.gammas[...][count - 1], state, side, inputs)
            for one in taken:
                one.put_back()
        if side is None or count != self.depth:
            found = "more" if count > self.depth else count + 1
            raise ValueError(
                f"A side network of {self.depth} layers reads {self.depth + 1} hidden states, the "
                f"embedding and one for each layer; got {found}."
            )
        return self._upsampled(side)

    def along(
        self,
        backbone: nnx.Module,
        embedded: jax.Array,
        *inputs: Any,
        apply: Callable[..., jax.Array] = lambda layer, hidden, *inputs: layer(hidden, *inputs),
    ) -> tuple[jax.Array, jax.Array]:
        """Runs stacked layers of a backbone and the side network in one scan.

        Args:
            backbone: the layers, stacked along the first axis of each of their arrays.
            embedded: :math:`h_{f,0}`, ``(..., d)``.
            *inputs: what each layer of both takes after its hidden state.
            apply: ``apply(layer, hidden, *inputs)`` calls a layer of the backbone.

        Returns:
            :math:`h_{f,N}` and :math:`U(h_{g,N})`, ``(..., d)`` each.

        Raises:
            ValueError: if the backbone has not as many stacked layers as the side network, or the
                last axis of ``embedded`` is not ``d``.
        """
        self._require_width(embedded)
        depths = {x.shape[:1] for x in jax.tree.leaves(nnx.state(backbone))}
        if depths != {(self.depth,)}:
            raise ValueError(
                f"A side network of {self.depth} layers goes along a backbone of {self.depth} "
                "stacked layers, which are the first axis of each of its arrays; got first axes of "
                f"{sorted(depths)}. Of layers that are not stacked, give their states to the call."
            )
        embedded = jax.lax.stop_gradient(embedded)
        # As arrays, the backbone may be one that a differentiated function does not take, but sees.
        graph, stacked = nnx.split(backbone)

        def both(
            carry: tuple[jax.Array, jax.Array],
            layers: tuple[Any, nnx.Module, nnx.Module, jax.Array],
        ) -> tuple[tuple[jax.Array, jax.Array], Any]:
            (state, side), (arrays, layer, down, gamma) = carry, layers
            frozen = nnx.merge(graph, arrays)
            state = jax.lax.stop_gradient(apply(frozen, state, *inputs))
            changed = nnx.to_pure_dict(nnx.state(frozen, nnx.Not(nnx.Param)))
            return (state, _side_layer(layer, down, gamma, state, side, inputs)), changed

        scan = nnx.scan(both, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        arrays = nnx.to_pure_dict(stacked)
        layers = (arrays, self.layers, self.downsamplings, self.gammas[...])
        (state, side), changed = scan((embedded, self.first(embedded)), layers)
        if jax.tree.leaves(changed):
            nnx.update(backbone, changed)
        return state, self._upsampled(side)

    def mixed(self, backbone: jax.Array, up: jax.Array) -> jax.Array:
        """Returns the hidden state for the backbone's head.

        Args:
            backbone: :math:`h_{f,N}` after the backbone's final norm, ``(..., d)``.
            up: what :meth:`__call__` or :meth:`along` returned.
        """
        alpha = None if self.alpha is None else self.alpha[...]
        return mix_hidden_states(jax.lax.stop_gradient(backbone), up, alpha, self.mix)

    def _require_width(self, hidden: jax.Array) -> None:
        if hidden.shape[-1:] != (self.width,):
            raise ValueError(
                f"A side network of width {self.width} reads hidden states (..., {self.width}); "
                f"got {hidden.shape}."
            )

    def _upsampled(self, side: jax.Array) -> jax.Array:
        return self.up(self.norm(side)).astype(side.dtype)


def _side_layer(
    layer: Any, down: Any, gamma: jax.Array, state: jax.Array, side: jax.Array, inputs: Any
) -> jax.Array:
    state = jax.lax.stop_gradient(state)
    return layer(fuse(down(state), side, gamma), *inputs)


def _downsampling(kind: str, width: int, reduction: int, rank: int, rngs: nnx.Rngs) -> nnx.Module:
    if kind in ("max", "average"):
        return Pool(reduction, kind)
    if kind not in ("adapter", "lora"):
        raise ValueError(f"downsample must be 'adapter', 'lora', 'max' or 'average'; got {kind!r}.")
    return (Adapter if kind == "adapter" else LowRankMap)(width, reduction, rank, rngs=rngs)


class _Taken(NamedTuple):
    """A layer taken from stacked ones.

    Attributes:
        stack: the module of stacked layers.
        index: which of them.
        layer: a module of its own.
    """

    stack: Any
    index: int
    layer: Any

    @classmethod
    def of(cls, stack: Any, index: int) -> "_Taken":
        graph, state = nnx.split(stack)
        return cls(stack, index, nnx.merge(graph, jax.tree.map(lambda x: x[index], state)))

    def put_back(self) -> None:
        """Writes into the stack what a call changes: counts of random numbers, running means."""
        whole, own = (nnx.state(part, nnx.Not(nnx.Param)) for part in (self.stack, self.layer))
        if jax.tree.structure(whole) != jax.tree.structure(own):
            raise ValueError(
                "A side layer made a new variable in its call, as nnx.Module.sow does. Make it in "
                "__init__, or leave it out."
            )
        if jax.tree.leaves(whole):
            nnx.update(
                self.stack, jax.tree.map(lambda x, new: x.at[self.index].set(new), whole, own)
            )


def _like(hidden: jax.Array, *params: nnx.Param) -> list[jax.Array]:
    return [param[...].astype(hidden.dtype) for param in params]
