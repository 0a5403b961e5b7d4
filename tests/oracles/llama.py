"""A Llama's logits in float64 NumPy, one text at a time, from the tensors of a GGUF file.

Rotary positions turn neighbouring channels, as such files are laid out; quantized tensors are
decoded here from the description of their blocks.
"""

import numpy as np


def decode_q4_1(data: np.ndarray) -> np.ndarray:
    """Rows of blocks of 20 bytes: float16 scale and minimum, 32 nibbles, low halves first."""
    blocks = data.reshape(*data.shape[:-1], -1, 20)
    scale, minimum = np.moveaxis(blocks[..., :4].copy().view(np.float16).astype(float), -1, 0)
    codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1)
    values = codes * scale[..., None] + minimum[..., None]
    return values.reshape(*data.shape[:-1], -1)


def decode_q8_0(data: np.ndarray) -> np.ndarray:
    """Rows of blocks of 34 bytes: float16 scale, 32 signed bytes."""
    blocks = data.reshape(*data.shape[:-1], -1, 34)
    scale = blocks[..., :2].copy().view(np.float16).astype(float)
    return (blocks[..., 2:].copy().view(np.int8) * scale).reshape(*data.shape[:-1], -1)


def logits(
    t: dict[str, np.ndarray], tokens: list[int], heads: int, key_heads: int, base: float, eps: float
) -> np.ndarray:
    """Returns the logits after each token, `(position, vocab)`; the head is the embedding."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * t[name]

    def turn(x: np.ndarray) -> np.ndarray:
        channels = x.shape[-1]
        angles = np.arange(len(x))[:, None] * base ** (-np.arange(0, channels, 2) / channels)
        pairs = x.reshape(len(x), -1, 2)
        z = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    x = t["token_embd.weight"][tokens]
    causal = np.where(np.tri(len(tokens)) > 0, 0, -np.inf)
    layer = 0
    while f"blk.{layer}.attn_q.weight" in t:
        at = f"blk.{layer}"
        h = norm(x, f"{at}.attn_norm.weight")
        q, k, v = (
            np.split(h @ t[f"{at}.attn_{n}.weight"].T, count, axis=1)
            for n, count in (("q", heads), ("k", key_heads), ("v", key_heads))
        )
        mixed = []
        for head in range(heads):
            group = head * key_heads // heads
            scores = turn(q[head]) @ turn(k[group]).T / np.sqrt(q[head].shape[1]) + causal
            weights = np.exp(scores - scores.max(1, keepdims=True))
            mixed.append(weights / weights.sum(1, keepdims=True) @ v[group])
        x = x + np.concatenate(mixed, 1) @ t[f"{at}.attn_output.weight"].T
        h = norm(x, f"{at}.ffn_norm.weight")
        gate = h @ t[f"{at}.ffn_gate.weight"].T
        up = h @ t[f"{at}.ffn_up.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ t[f"{at}.ffn_down.weight"].T
        layer += 1
    return norm(x, "output_norm.weight") @ t["token_embd.weight"].T
