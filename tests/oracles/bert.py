"""A BERT encoder in float64 NumPy, one text at a time, from Devlin et al. (arXiv 1810.04805).

It reads the tensors by the names under which they are published, in their (out, in) layout.
"""

import math

import numpy as np


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def encode(
    tensors: dict[str, np.ndarray], tokens: list[int], heads: int, eps: float = 1e-12
) -> np.ndarray:
    """Returns the hidden states (embedding, then each layer's output) of one text, unpadded."""
    t = {name: array.astype(float) for name, array in tensors.items()}

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return layer_norm(x, t[f"{name}.weight"], t[f"{name}.bias"], eps)

    x = t["embeddings.word_embeddings.weight"][tokens]
    x = x + t["embeddings.position_embeddings.weight"][: len(tokens)]
    x = x + t["embeddings.token_type_embeddings.weight"][0]
    states = [norm(x, "embeddings.LayerNorm")]
    layer = 0
    while f"encoder.layer.{layer}.output.dense.weight" in t:
        at, x = f"encoder.layer.{layer}", states[-1]
        mixed = []
        for head in np.split(np.arange(x.shape[1]), heads):
            q, k, v = (
                linear(x, f"{at}.attention.self.{n}")[:, head] for n in ("query", "key", "value")
            )
            scores = q @ k.T / math.sqrt(len(head))
            weights = np.exp(scores - scores.max(1, keepdims=True))
            mixed.append(weights / weights.sum(1, keepdims=True) @ v)
        attended = linear(np.concatenate(mixed, 1), f"{at}.attention.output.dense")
        x = norm(x + attended, f"{at}.attention.output.LayerNorm")
        inner = linear(gelu(linear(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
        states.append(norm(x + inner, f"{at}.output.LayerNorm"))
        layer += 1
    return np.stack(states)
