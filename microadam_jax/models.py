"""Parameter shapes of well-known models, for counting bytes without holding any.

Kernels have their JAX shapes, ``(in, out)`` for a linear layer and ``(height, width, in, out)`` for
a convolution, because it is the last axis that blocks are cut from. Each layer is an entry of its
own. Attention heads do not appear: they split a projection's outputs without changing its shape.
"""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Shapes = dict[str, Any]  # nested dicts with ShapeDtypeStruct leaves


def model_shapes(name: str, dtype: DTypeLike = jnp.float32) -> Shapes:
    """Returns the trainable parameters of a model, as shapes.

    Args:
        name: a key of :data:`MODELS`.
        dtype: the dtype of every parameter.

    Returns:
        Nested dicts of ``jax.ShapeDtypeStruct``, fit for ``tx.init`` under ``jax.eval_shape`` and
        for :func:`memory_report`.

    Raises:
        ValueError: if there is no model of that name.

    Examples:
        >>> from microadam_jax.models import model_shapes
        >>> model_shapes("gpt2", "bfloat16")["wte"]["embedding"]
        ShapeDtypeStruct(shape=(50257, 768), dtype=bfloat16)
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"Unknown model {name!r}.{hint} Known models: {', '.join(MODELS)}.")
    return jax.tree.map(lambda leaf: leaf.update(dtype=jnp.dtype(dtype)), MODELS[name]())


def llama(
    *, hidden: int, intermediate: int, layers: int, vocab: int = 32000, kv_width: int | None = None
) -> Shapes:
    """Returns a Llama decoder: SwiGLU, RMSNorm, no biases, untied output.

    ``kv_width`` is that of keys and values where several query heads share one key head.

    Dimensions: Touvron et al., Llama 2 (arXiv 2307.09288) and its released ``config.json`` files
    for 7B, 13B and 70B; the ``configs/llama_*.json`` of GaLore (arXiv 2403.03507) for 60M to 1B.
    """
    attention = {f"{name}_proj": _linear(hidden, hidden) for name in "qo"}
    attention |= {f"{name}_proj": _linear(hidden, kv_width or hidden) for name in "kv"}
    mlp = {
        "gate_proj": _linear(hidden, intermediate),
        "up_proj": _linear(hidden, intermediate),
        "down_proj": _linear(intermediate, hidden),
    }
    layer = {
        "input_layernorm": _rms_norm(hidden),
        "self_attn": attention,
        "post_attention_layernorm": _rms_norm(hidden),
        "mlp": mlp,
    }
    return {
        "embed_tokens": _embedding(vocab, hidden),
        "layers": _repeat(layer, layers),
        "norm": _rms_norm(hidden),
        "lm_head": _linear(hidden, vocab),
    }


def bert(*, hidden: int, layers: int, vocab: int = 30522) -> Shapes:
    """Returns the BERT encoder with its pooler and without a task's head.

    Dimensions: Devlin et al. (arXiv 1810.04805) and the vocabulary of the uncased checkpoints.
    """
    layer = {
        "attention": {name: _dense(hidden, hidden) for name in ("query", "key", "value", "output")},
        "attention_norm": _layer_norm(hidden),
        "intermediate": _dense(hidden, 4 * hidden),
        "output": _dense(4 * hidden, hidden),
        "output_norm": _layer_norm(hidden),
    }
    return {
        "embeddings": {
            "word": _embedding(vocab, hidden),
            "position": _embedding(512, hidden),
            "token_type": _embedding(2, hidden),
            "norm": _layer_norm(hidden),
        },
        "encoder": _repeat(layer, layers),
        "pooler": _dense(hidden, hidden),
    }


def opt(*, hidden: int, layers: int, vocab: int = 50272) -> Shapes:
    """Returns an OPT decoder, output tied to the token embedding.

    Dimensions: Zhang et al. (arXiv 2205.01068) and the released ``config.json``. The position
    table has 2050 rows because the released code counts its 2048 positions from 2.
    """
    attention = {f"{name}_proj": _dense(hidden, hidden) for name in ("q", "k", "v", "out")}
    layer = {
        "self_attn_layer_norm": _layer_norm(hidden),
        "self_attn": attention,
        "final_layer_norm": _layer_norm(hidden),
        "fc1": _dense(hidden, 4 * hidden),
        "fc2": _dense(4 * hidden, hidden),
    }
    return {
        "embed_tokens": _embedding(vocab, hidden),
        "embed_positions": _embedding(2050, hidden),
        "layers": _repeat(layer, layers),
        "final_layer_norm": _layer_norm(hidden),
    }


def gpt2(*, hidden: int, layers: int, vocab: int = 50257, positions: int = 1024) -> Shapes:
    """Returns a GPT-2 decoder: tied output, and query, key and value in one kernel.

    Dimensions: Radford et al., Language Models are Unsupervised Multitask Learners (2019), and
    the released ``hparams.json``.
    """
    layer = {
        "ln_1": _layer_norm(hidden),
        "attn": {"c_attn": _dense(hidden, 3 * hidden), "c_proj": _dense(hidden, hidden)},
        "ln_2": _layer_norm(hidden),
        "mlp": {"c_fc": _dense(hidden, 4 * hidden), "c_proj": _dense(4 * hidden, hidden)},
    }
    return {
        "wte": _embedding(vocab, hidden),
        "wpe": _embedding(positions, hidden),
        "h": _repeat(layer, layers),
        "ln_f": _layer_norm(hidden),
    }


def resnet(*, stages: tuple[int, ...], classes: int = 1000) -> Shapes:
    """Returns a bottleneck ResNet for ImageNet, without the running averages of its batch norms.

    Dimensions: He et al. (arXiv 1512.03385), Table 1: stage ``i`` has ``stages[i]`` blocks of
    width ``64 * 2**i`` and four times as many outputs.
    """
    shapes: Shapes = {"stem": _convolution(7, 3, 64)}
    channels = 64
    for stage, blocks in enumerate(stages):
        width = 64 * 2**stage
        for block in range(blocks):
            shapes[f"stage_{stage}_block_{block}"] = {
                "reduce": _convolution(1, channels, width),
                "spatial": _convolution(3, width, width),
                "expand": _convolution(1, width, 4 * width),
                # Only the first block of a stage changes the number of channels.
                **({} if block else {"shortcut": _convolution(1, channels, 4 * width)}),
            }
            channels = 4 * width
    return shapes | {"head": _dense(channels, classes)}


def _weight(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _embedding(rows: int, width: int) -> Shapes:
    return {"embedding": _weight(rows, width)}


def _linear(n_in: int, n_out: int) -> Shapes:
    return {"kernel": _weight(n_in, n_out)}


def _dense(n_in: int, n_out: int) -> Shapes:
    return {"kernel": _weight(n_in, n_out), "bias": _weight(n_out)}


def _rms_norm(width: int) -> Shapes:
    return {"scale": _weight(width)}


def _layer_norm(width: int) -> Shapes:
    return {"scale": _weight(width), "bias": _weight(width)}


def _convolution(side: int, n_in: int, n_out: int) -> Shapes:
    """A square convolution without bias, and the affine part of the batch norm after it."""
    return {"conv": {"kernel": _weight(side, side, n_in, n_out)}, "norm": _layer_norm(n_out)}


def _repeat(layer: Shapes, count: int) -> Shapes:
    return {str(index): layer for index in range(count)}


MODELS: Mapping[str, Callable[[], Shapes]] = MappingProxyType(
    {
        "llama2-7b": partial(llama, hidden=4096, intermediate=11008, layers=32),
        "llama2-13b": partial(llama, hidden=5120, intermediate=13824, layers=40),
        "llama2-70b": partial(llama, hidden=8192, intermediate=28672, layers=80, kv_width=1024),
        "llama-60m": partial(llama, hidden=512, intermediate=1376, layers=8),
        "llama-130m": partial(llama, hidden=768, intermediate=2048, layers=12),
        "llama-350m": partial(llama, hidden=1024, intermediate=2736, layers=24),
        "llama-1b": partial(llama, hidden=2048, intermediate=5461, layers=24),
        "bert-base": partial(bert, hidden=768, layers=12),
        "bert-large": partial(bert, hidden=1024, layers=24),
        "opt-1.3b": partial(opt, hidden=2048, layers=24),
        "gpt2": partial(gpt2, hidden=768, layers=12),
        "resnet-50": partial(resnet, stages=(3, 4, 6, 3)),
    }
)
