"""A BERT encoder in Flax NNX, and the sentence embeddings of MiniLM read from safetensors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..llama.config import PretrainError


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The dimensions of one encoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    positions: int = 512
    epsilon: float = 1e-12


class Attention(nnx.Module):
    """Multi-head attention among the tokens of a text, both ways."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        """Draws the four projections."""
        self.heads = config.heads
        self.query, self.key, self.value, self.out = (
            _linear(config.hidden, config.hidden, rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Mixes positions of `x`, `(batch, position, hidden)`; `mask` is True at tokens."""
        query, key, value = (
            layer(x).reshape(*x.shape[:-1], self.heads, -1)
            for layer in (self.query, self.key, self.value)
        )
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        return self.out(mixed.reshape(x.shape))


class Block(nnx.Module):
    """One post-norm encoder layer."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        """Builds both halves of the layer."""
        self.attention = Attention(config, rngs=rngs)
        self.attention_norm = _norm(config, rngs)
        self.up = _linear(config.hidden, config.intermediate, rngs)
        self.down = _linear(config.intermediate, config.hidden, rngs)
        self.mlp_norm = _norm(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Applies attention and feed-forward, each with its residual, and normalizes after each."""
        x = self.attention_norm(x + self.attention(x, mask))
        return self.mlp_norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class Bert(nnx.Module):
    """Embeddings of words and positions, then a scan over stacked layers (layer axis first)."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        """Draws all weights; each layer has random numbers of its own."""

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        init = nnx.initializers.normal(0.02)
        self.embedding = nnx.Embed(config.vocab, config.hidden, embedding_init=init, rngs=rngs)
        # Of texts without a second sentence: the embedding of the first is added in here.
        self.positions = nnx.Embed(config.positions, config.hidden, embedding_init=init, rngs=rngs)
        self.embedding_norm = _norm(config, rngs)
        self.layers = stack(rngs)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns the input of the first layer, `(batch, position, hidden)`."""
        places = self.positions(jnp.arange(tokens.shape[1]))
        return self.embedding_norm(self.embedding(tokens) + places)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the last hidden states of `tokens`; `mask` is True at tokens."""
        scan = nnx.scan(lambda x, block: block(x, mask), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(self.embed(tokens), self.layers)


def mean_pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean of `hidden`, `(batch, position, channel)`, where `mask` is True."""
    weights = mask.astype(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / jnp.maximum(weights.sum(1), 1)


def read_config(folder: Path) -> BertConfig:
    """Reads `config.json` in the format of Hugging Face.

    Raises:
        PretrainError: If it is missing, or of another architecture.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
        if values["model_type"] != "bert" or values["hidden_act"] != "gelu":
            raise PretrainError(
                f"{path} describes a {values['model_type']} model with {values['hidden_act']}; "
                "only BERT with gelu can be read."
            )
        return BertConfig(
            hidden=values["hidden_size"],
            intermediate=values["intermediate_size"],
            layers=values["num_hidden_layers"],
            heads=values["num_attention_heads"],
            vocab=values["vocab_size"],
            positions=values["max_position_embeddings"],
            epsilon=values["layer_norm_eps"],
        )
    except (OSError, ValueError, KeyError) as error:
        raise PretrainError(f"{path} is not the configuration of a BERT: {error!r}.") from error


def load_bert(folder: Path) -> Bert:
    """Reads a BERT from `config.json` and `model.safetensors` in a directory.

    Raises:
        PretrainError: If a file is missing or damaged, or a tensor of it has another shape.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    config, path = read_config(folder), folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PretrainError(f"{path} is not a file of safetensors: {error}.") from error
    model = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
    graph, shapes = nnx.split(model)
    try:
        weights = _weights(tensors, config.layers)
    except (KeyError, ValueError) as error:
        raise PretrainError(f"{path} does not hold the tensors of a BERT: {error}.") from error
    expected = jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(shapes))
    found = jax.tree.map(lambda x: x.shape, weights)
    if found != expected:
        raise PretrainError(f"{path} holds tensors of other shapes than its config.json says.")
    nnx.replace_by_pure_dict(shapes, jax.tree.map(jnp.asarray, weights))
    return nnx.merge(graph, shapes)


def _weights(tensors: dict[str, np.ndarray], layers: int) -> dict[str, Any]:
    def stacked(name: str) -> np.ndarray:
        return np.stack([tensors[f"encoder.layer.{i}.{name}"] for i in range(layers)])

    def linear(name: str) -> dict[str, np.ndarray]:
        # Stored (out, in); a kernel of JAX is (in, out).
        kernel = stacked(f"{name}.weight").swapaxes(1, 2)
        return {"kernel": kernel, "bias": stacked(f"{name}.bias")}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": stacked(f"{name}.weight"), "bias": stacked(f"{name}.bias")}

    positions = tensors["embeddings.position_embeddings.weight"]
    first_sentence = tensors["embeddings.token_type_embeddings.weight"][0]
    return {
        "embedding": {"embedding": tensors["embeddings.word_embeddings.weight"]},
        "positions": {"embedding": positions + first_sentence},
        "embedding_norm": {
            "scale": tensors["embeddings.LayerNorm.weight"],
            "bias": tensors["embeddings.LayerNorm.bias"],
        },
        "layers": {
            "attention": {
                "query": linear("attention.self.query"),
                "key": linear("attention.self.key"),
                "value": linear("attention.self.value"),
                "out": linear("attention.output.dense"),
            },
            "attention_norm": norm("attention.output.LayerNorm"),
            "up": linear("intermediate.dense"),
            "down": linear("output.dense"),
            "mlp_norm": norm("output.LayerNorm"),
        },
    }


def _linear(n_in: int, n_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(n_in, n_out, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)


def _norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden, epsilon=config.epsilon, rngs=rngs)
