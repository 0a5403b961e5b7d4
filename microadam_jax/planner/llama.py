"""A Llama whose layers are stacked for a scan, as a function of parameter shapes."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from microadam_jax.layers.head_loss import chunked_cross_entropy
from microadam_jax.models import model_shapes
from microadam_jax.planner.meshes import ROWS

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """Describes a model of the registry.

    Attributes:
        name: its name there.
        params: shapes of its parameters, a Llama's with the layer axis in front.
        llama: whether there is a training step for it.
    """

    name: str
    params: Params
    llama: bool

    @property
    def parameters(self) -> int:
        """Counts them."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))


def stacked_model(name: str, dtype: DTypeLike = jnp.float32) -> Model:
    """Returns the shapes of a model; a Llama's layers are stacked, and compile in seconds.

    Raises:
        ValueError: if there is no model of that name.

    Examples:
        >>> from microadam_jax.planner import stacked_model
        >>> model = stacked_model("llama2-7b", "bfloat16")
        >>> model.params["layers"]["mlp"]["down_proj"]["kernel"]
        ShapeDtypeStruct(shape=(32, 11008, 4096), dtype=bfloat16)
    """
    params = model_shapes(name, dtype)
    if not name.startswith("llama"):
        return Model(name, params, llama=False)
    layers = params["layers"]
    stack = jax.tree.map(lambda leaf: leaf.update(shape=(len(layers), *leaf.shape)), layers["0"])
    return Model(name, params | {"layers": stack}, llama=True)


class Pieces(NamedTuple):
    """A Llama in pieces, as :func:`update_in_backward` takes them; activations are bfloat16.

    Attributes:
        before: from the parameters outside of the layers and tokens to the first layer's input.
        layer: from a layer's weights and its input to its output.
        after: from parameters, the last output and tokens to the mean cross entropy, in chunks of
            the vocabulary.
    """

    before: Callable[[Params, jax.Array], jax.Array]
    layer: Callable[[Params, jax.Array], jax.Array]
    after: Callable[[Params, jax.Array, jax.Array], jax.Array]


def pieces(mesh: Mesh) -> Pieces:
    """Returns the pieces of a Llama.

    Args:
        mesh: with the axes data, fsdp and tp.
    """
    rows = NamedSharding(mesh, P(ROWS))

    def before(params: Params, tokens: jax.Array) -> jax.Array:
        return params["embed_tokens"]["embedding"].astype(jnp.bfloat16)[tokens]

    def layer(weights: Params, x: jax.Array) -> jax.Array:
        x = jax.lax.with_sharding_constraint(x, rows)
        x += _attention(weights["self_attn"], _rms_norm(weights["input_layernorm"], x))
        x += _mlp(weights["mlp"], _rms_norm(weights["post_attention_layernorm"], x))
        return jax.lax.with_sharding_constraint(x, rows)

    def after(params: Params, x: jax.Array, tokens: jax.Array) -> jax.Array:
        if mesh.shape["tp"] > 1:  # which cuts the vocabulary already
            return _head_loss(params, x, tokens, mesh)
        x, kernel = _rms_norm(params["norm"], x), params["lm_head"]["kernel"]
        return chunked_cross_entropy(x[:, :-1], kernel, tokens[:, 1:]).mean()

    return Pieces(before, layer, after)


def loss(params: Params, tokens: jax.Array, mesh: Mesh, *, remat: bool = True) -> jax.Array:
    """The mean cross entropy of each next token; activations are bfloat16.

    Args:
        params: of :func:`stacked_model`.
        tokens: int32 ``(batch, position)``.
        mesh: with the axes data, fsdp and tp.
        remat: whether each layer is computed again in the backward pass, which then keeps its
            input alone.
    """
    own = pieces(mesh)
    layer = jax.checkpoint(own.layer) if remat else own.layer
    x = own.before(params, tokens)
    x, _ = jax.lax.scan(lambda x, weights: (layer(weights, x), None), x, params["layers"])
    return _head_loss(params, x, tokens, mesh)


def _head_loss(params: Params, x: jax.Array, tokens: jax.Array, mesh: Mesh) -> jax.Array:
    logits = _linear(params["lm_head"], _rms_norm(params["norm"], x)).astype(jnp.float32)
    logits = jax.lax.with_sharding_constraint(logits, NamedSharding(mesh, P(ROWS, None, "tp")))
    # A one-hot product and not a gather: the vocabulary is cut over tp.
    targets = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1], dtype=jnp.bfloat16)
    picked = jnp.sum(logits[:, :-1] * targets, axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits[:, :-1], axis=-1) - picked)


def _linear(weights: Params, x: jax.Array) -> jax.Array:
    return x @ weights["kernel"].astype(x.dtype)


def _rms_norm(weights: Params, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    return (wide * scale * weights["scale"].astype(jnp.float32)).astype(x.dtype)


def _attention(weights: Params, x: jax.Array) -> jax.Array:
    # The registry does not say how projections split into heads; these widths are the published
    # ones.
    width = 128 if x.shape[-1] >= 4096 else 64

    def heads(name: str) -> jax.Array:
        return _linear(weights[name], x).reshape(*x.shape[:-1], -1, width)

    query, key, value = _rotate(heads("q_proj")), _rotate(heads("k_proj")), heads("v_proj")
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return _linear(weights["o_proj"], mixed.reshape(x.shape))


def _rotate(x: jax.Array) -> jax.Array:
    positions, width = x.shape[1], x.shape[-1]
    frequencies = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = (jnp.arange(positions, dtype=jnp.float32)[:, None] * frequencies)[:, None, :]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


def _mlp(weights: Params, x: jax.Array) -> jax.Array:
    gate = jax.nn.silu(_linear(weights["gate_proj"], x))
    return _linear(weights["down_proj"], gate * _linear(weights["up_proj"], x))
