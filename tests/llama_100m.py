"""The shapes of a model whose step takes a minute to compile and not an hour."""

from typing import Any

import jax
import jax.numpy as jnp


def llama_100m() -> dict[str, Any]:
    """Shapes of a Llama of 110 million parameters, its layers stacked."""
    layers, width, hidden, tokens = 12, 768, 2048, 16000
    shapes = {
        "embed_tokens": {"embedding": (tokens, width)},
        "layers": {
            **{f"{name}_proj": {"kernel": (layers, width, width)} for name in "qkvo"},
            "gate_proj": {"kernel": (layers, width, hidden)},
            "up_proj": {"kernel": (layers, width, hidden)},
            "down_proj": {"kernel": (layers, hidden, width)},
            "norm": {"scale": (layers, width)},
        },
        "lm_head": {"kernel": (width, tokens)},
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
