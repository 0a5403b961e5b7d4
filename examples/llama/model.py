"""A Llama-style decoder in Flax NNX: RMSNorm, rotary positions, SwiGLU, one scan over layers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from microadam_jax.layers import (
    chunked_cross_entropy,
    compress_residuals,
    fp8_linear,
    fp8_silu_gate,
)
from microadam_jax.layers.nnx import Fp8Linear, Fp8RMSNorm

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The dimensions and number formats of one decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: bool = False
    activations: str = "exact"
    key_heads: int | None = None  # of grouped queries; None has one for each query head
    rope_base: float = 10_000.0
    epsilon: float = 1e-6
    tied: bool = False  # the embedding is the output head too

    @property
    def coat(self) -> bool:
        """Returns True if layers compute with activations in FP8."""
        return self.activations == "coat"


def _linear(config: ModelConfig, n_in: int, n_out: int, std: float, rngs: nnx.Rngs) -> nnx.Linear:
    return (Fp8Linear if config.coat else nnx.Linear)(
        n_in,
        n_out,
        use_bias=False,
        kernel_init=nnx.initializers.normal(std),
        dtype=jnp.dtype(config.compute_dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


def _norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return (Fp8RMSNorm if config.coat else nnx.RMSNorm)(
        config.hidden,
        epsilon=config.epsilon,
        dtype=jnp.dtype(config.compute_dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


def rotate(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Encodes positions by rotating pairs of channels (RoPE).

    Args:
        x: Queries or keys, `(batch, position, head, channel)`, with an even number of channels.
        base: The longest wavelength is about `2 * pi * base` positions.

    Returns:
        The rotated array; channel `i` is paired with channel `i + channels / 2`.
    """
    positions, channels = x.shape[1], x.shape[-1]
    frequencies = base ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
    angles = jnp.arange(positions, dtype=jnp.float32)[:, None] * frequencies
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


class Attention(nnx.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Draws the four projections."""
        self.heads, self.activations = config.heads, config.activations
        self.rope_base = config.rope_base
        hidden = config.hidden
        narrow = hidden // config.heads * (config.key_heads or config.heads)
        self.query = _linear(config, hidden, hidden, 0.02, rngs)
        self.key = _linear(config, hidden, narrow, 0.02, rngs)
        self.value = _linear(config, hidden, narrow, 0.02, rngs)
        self.out = _linear(config, hidden, hidden, _residual_std(config), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Mixes positions of `x`, `(batch, position, hidden)`."""
        channels = x.shape[-1] // self.heads
        query, key, value = (
            h.reshape(*x.shape[:-1], -1, channels)
            for h in _together(x, self.query, self.key, self.value)
        )
        mix = functools.partial(jax.nn.dot_product_attention, is_causal=True)
        if self.activations != "exact":
            # As FlashAttention does, for the backward pass only the inputs are kept.
            mix = jax.checkpoint(mix)
        query, key = (rotate(h, self.rope_base) for h in (query, key))
        return self.out(mix(query, key, value).reshape(x.shape))


def _together(x: jax.Array, *layers: nnx.Linear) -> tuple[jax.Array, ...]:
    """Applies layers to one input; in FP8 they share its codes."""
    if isinstance(layers[0], Fp8Linear):
        return fp8_linear(x, tuple(layer.kernel[...] for layer in layers))
    return tuple(layer(x) for layer in layers)


class SwiGLU(nnx.Module):
    """The gated feed-forward layer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Draws the three projections."""
        self.product = fp8_silu_gate if config.coat else _silu_gate
        self.gate = _linear(config, config.hidden, config.intermediate, 0.02, rngs)
        self.up = _linear(config, config.hidden, config.intermediate, 0.02, rngs)
        self.down = _linear(config, config.intermediate, config.hidden, _residual_std(config), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Transforms each position of `x` on its own."""
        return self.down(self.product(*_together(x, self.gate, self.up)))


def _silu_gate(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def _residual_std(config: ModelConfig) -> float:
    # Each layer adds two outputs to the residual stream: this keeps its variance independent
    # of the depth at initialization.
    return 0.02 / (2 * config.layers) ** 0.5


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Builds both halves of the layer."""
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies attention and feed-forward to `x`, each with its residual."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """Embedding, a scan over stacked layers (layer axis first), final norm and a head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Draws all weights; each layer has random numbers of its own."""

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.embedding = nnx.Embed(
            config.vocab,
            config.hidden,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=jnp.dtype(config.compute_dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )
        self.layers = stack(rngs)
        self.remat, self.activations = config.remat, config.activations
        config = dataclasses.replace(config, activations="exact")
        self.norm = _norm(config, rngs)
        self.head = (
            None if config.tied else _linear(config, config.hidden, config.vocab, 0.02, rngs)
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns float32 logits for the token after each position of `tokens`."""

        def apply(block: Block, x: jax.Array) -> jax.Array:
            return block(x)

        if self.remat:
            apply = jax.checkpoint(apply)
        if self.activations == "fp8":
            apply = compress_residuals(apply)  # of what is recomputed from, too
        scan = nnx.scan(
            lambda x, block: apply(block, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return self.logits(self.norm(scan(self.embedding(tokens), self.layers)))

    def logits(self, x: jax.Array) -> jax.Array:
        """Returns float32 logits from the normalized last hidden state."""
        head = self.embedding.attend if self.head is None else self.head
        return head(x).astype(jnp.float32)


def init_params(config: ModelConfig, seed: int) -> Params:
    """Draws the initial weights as a plain nested dict of arrays (trace it with `jax.jit`).

    They are drawn in float32 and then rounded, so that all formats start from the same weights.
    """
    drawn = Llama(dataclasses.replace(config, param_dtype="float32"), rngs=nnx.Rngs(seed))
    params = nnx.to_pure_dict(nnx.state(drawn, nnx.Param))
    return jax.tree.map(lambda x: x.astype(config.param_dtype), params)


def graph_of(config: ModelConfig) -> nnx.GraphDef[Llama]:
    """The structure that `nnx.merge` turns, with weights, back into a callable model."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param)[0]


def pieces_of(config: ModelConfig) -> tuple[Callable[..., Any], ...]:
    """Returns what comes before the layers, one of them, and the loss after them, as functions.

    They are those that `microadam_jax.layers.update_in_backward` takes.
    """
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    embedding, norm = (nnx.split(part, nnx.Param)[0] for part in (model.embedding, model.norm))
    block = nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))), nnx.Param)[0]

    def before(rest: Params, tokens: jax.Array) -> jax.Array:
        return nnx.merge(embedding, rest["embedding"])(tokens[:, :-1])

    def layer(weights: Params, x: jax.Array) -> jax.Array:
        return nnx.merge(block, weights)(x)

    def after(rest: Params, x: jax.Array, tokens: jax.Array) -> jax.Array:
        x = nnx.merge(norm, rest["norm"])(x)
        return chunked_cross_entropy(x, rest["head"]["kernel"], tokens[:, 1:]).mean()

    return before, layer, after
