"""A Llama and its tokenizer, read from a GGUF file."""

from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from gguf.quants import dequantize

from ..llama.config import PretrainError
from ..llama.model import Llama, ModelConfig

_CONTROL = 3  # the type of tokens such as <|im_start|>


class GgufFile:
    """A decoder of the Llama kind in a GGUF file of any quantization that `gguf` can read."""

    def __init__(self, path: Path) -> None:
        """Opens a file.

        Raises:
            PretrainError: If it is missing, damaged, or of another architecture.
        """
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
            architecture = self._value("general.architecture")
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise PretrainError(f"{path} is not a GGUF file: {error}.") from error
        if architecture != "llama":
            raise PretrainError(f"{path} holds a model of the kind {architecture}, not llama.")

    def config(self) -> ModelConfig:
        """The dimensions of the decoder.

        Raises:
            PretrainError: If one is missing.
        """
        try:
            embedding = self._shape("token_embd.weight")
            return ModelConfig(
                hidden=self._value("llama.embedding_length"),
                intermediate=self._value("llama.feed_forward_length"),
                layers=self._value("llama.block_count"),
                heads=self._value("llama.attention.head_count"),
                vocab=embedding[0],
                key_heads=self._value("llama.attention.head_count_kv"),
                rope_base=self._value("llama.rope.freq_base"),
                epsilon=self._value("llama.attention.layer_norm_rms_epsilon"),
                tied=all(tensor.name != "output.weight" for tensor in self._reader.tensors),
            )
        except KeyError as error:
            raise PretrainError(f"{self.path} does not say {error}.") from error

    def model(self) -> Llama:
        """Reads the weights as float32.

        Raises:
            PretrainError: If a tensor is missing or of another shape.
        """
        config = self.config()
        try:
            weights = self._weights(config)
        except (KeyError, ValueError) as error:
            raise PretrainError(f"{self.path} does not hold a whole Llama: {error}.") from error
        graph, shapes = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
        expected = jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(shapes))
        if jax.tree.map(lambda x: x.shape, weights) != expected:
            raise PretrainError(f"{self.path} holds tensors of other shapes than it says.")
        nnx.replace_by_pure_dict(shapes, jax.tree.map(jnp.asarray, weights))
        return nnx.merge(graph, shapes)

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Builds the byte-pair encoding.

        Raises:
            PretrainError: If the file has none.
        """
        try:
            tokens = self._value("tokenizer.ggml.tokens")
            merges = [tuple(m.split(" ")) for m in self._value("tokenizer.ggml.merges")]
            types = self._value("tokenizer.ggml.token_type")
        except KeyError as error:
            raise PretrainError(f"{self.path} has no tokenizer: {error} is missing.") from error
        vocabulary = {token: index for index, token in enumerate(tokens)}
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        bpe.decoder = tokenizers.decoders.ByteLevel()
        control = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
        bpe.add_special_tokens(control)
        return bpe

    def _value(self, name: str) -> Any:
        field = self._reader.get_field(name)
        if field is None:
            raise KeyError(name)
        return field.contents()

    def _shape(self, name: str) -> tuple[int, ...]:
        # GGUF lists axes in the order of their strides, the shortest first.
        return tuple(int(n) for n in reversed(self._tensor(name).shape))

    def _tensor(self, name: str) -> Any:
        for tensor in self._reader.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)

    def _array(self, name: str) -> np.ndarray:
        tensor = self._tensor(name)
        values = dequantize(tensor.data, tensor.tensor_type)
        return np.asarray(values, np.float32).reshape(self._shape(name))

    def _weights(self, config: ModelConfig) -> dict[str, Any]:
        def stacked(name: str) -> np.ndarray:
            return np.stack([self._array(f"blk.{i}.{name}.weight") for i in range(config.layers)])

        def linear(name: str) -> dict[str, np.ndarray]:
            # Stored (out, in); a kernel of JAX is (in, out).
            return {"kernel": stacked(name).swapaxes(1, 2)}

        def turned(name: str, heads: int) -> dict[str, np.ndarray]:
            # GGUF rotates neighbouring channels of a head, we channel i with i + channels / 2.
            rows = stacked(name)
            pairs = rows.reshape(config.layers, heads, -1, 2, rows.shape[-1])
            return {"kernel": pairs.swapaxes(2, 3).reshape(rows.shape).swapaxes(1, 2)}

        weights = {
            "embedding": {"embedding": self._array("token_embd.weight")},
            "layers": {
                "attention_norm": {"scale": stacked("attn_norm")},
                "attention": {
                    "query": turned("attn_q", config.heads),
                    "key": turned("attn_k", config.key_heads or config.heads),
                    "value": linear("attn_v"),
                    "out": linear("attn_output"),
                },
                "mlp_norm": {"scale": stacked("ffn_norm")},
                "mlp": {
                    "gate": linear("ffn_gate"),
                    "up": linear("ffn_up"),
                    "down": linear("ffn_down"),
                },
            },
            "norm": {"scale": self._array("output_norm.weight")},
        }
        if not config.tied:
            weights["head"] = {"kernel": self._array("output.weight").T}
        return weights
