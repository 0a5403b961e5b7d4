"""Text from files, its tokens, and batches that depend on nothing but a seed and a step."""

import dataclasses
import hashlib
import os
import socket
import sysconfig
from pathlib import Path

import numpy as np
import tokenizers

from .config import Config, PretrainError

_SUFFIXES = {".md", ".py", ".rst", ".txt"}
# Tests and character tables are long and repetitive, installed packages differ between machines.
_SKIPPED = {"dist-packages", "encodings", "idle_test", "site-packages", "test", "tests"}
_HELD_OUT_ONE_IN = 20
_SEPARATOR = "\0"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenized text, part of which is held out."""

    train: np.ndarray
    held_out: np.ndarray
    vocab: int
    held_out_bytes_per_token: float
    digest: str

    def batch(
        self, seed: int, step: int, rows: int, seq_len: int, only: np.ndarray | None = None
    ) -> np.ndarray:
        """Draws random training sequences; equal arguments give equal batches.

        Args:
            seed: Seed of the run.
            step: Index of the optimizer step.
            rows: Number of sequences.
            seq_len: Number of predicted tokens per sequence.
            only: Which of the sequences to read, where others are another process's; all by
                default.

        Returns:
            An int32 array `(rows, seq_len + 1)`: inputs and, shifted by one, targets; in place of
            `rows`, the shape of `only`.
        """
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(len(self.train) - seq_len, size=rows)
        return _windows(self.train, starts if only is None else starts[only], seq_len)

    def held_out_batches(self, batches: int, rows: int, seq_len: int) -> np.ndarray:
        """Cuts equally spaced sequences from the held-out text.

        Args:
            batches: Number of batches.
            rows: Sequences per batch.
            seq_len: Number of predicted tokens per sequence.

        Returns:
            An int32 array `(batches, rows, seq_len + 1)`.
        """
        starts = np.linspace(0, len(self.held_out) - seq_len - 1, batches * rows).astype(int)
        return _windows(self.held_out, starts.reshape(batches, rows), seq_len)


def _windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
    return tokens[starts[..., None] + np.arange(seq_len + 1)].astype(np.int32)


def load_corpus(config: Config) -> Corpus:
    """Collects, splits and tokenizes the text of a run.

    Args:
        config: Names the text and the tokenizer; a trained tokenizer is kept in its `out`.

    Returns:
        The tokens; of the text's files, the last twentieth is held out.

    Raises:
        PretrainError: If there is no text, or too little of it.
    """
    train_text, held_out_text = _split(_documents(config.text, config.max_bytes))
    if config.tokenizer == "byte":
        vocab = 256
        train, held_out = _bytes_of(train_text), _bytes_of(held_out_text)
    else:
        bpe = _byte_pairs(train_text, config.vocab_size, config.out)
        vocab = bpe.get_vocab_size()
        train, held_out = _encode(bpe, train_text), _encode(bpe, held_out_text)
    shortest = min(len(train), len(held_out))
    if shortest <= config.seq_len:
        raise PretrainError(
            f"The text is too short: its smaller part has {shortest} tokens, but one sequence "
            f"needs {config.seq_len + 1}. Give more --text, raise --max-bytes {config.max_bytes} "
            f"or lower --seq-len {config.seq_len}."
        )
    return Corpus(
        train=train,
        held_out=held_out,
        vocab=vocab,
        held_out_bytes_per_token=len(held_out_text.encode()) / len(held_out),
        digest=_digest(train.tobytes() + held_out.tobytes()),
    )


def _documents(text: Path | None, max_bytes: int) -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"]) if text is None else text
    if not root.exists():
        raise PretrainError(f"There is no file or directory {root} to read text from.")
    skipped = _SKIPPED if text is None else set()
    # A fixed order, whatever the seed of the run: runs of different seeds share the held-out text.
    files = sorted(_text_files(root, skipped))
    documents, size = [], 0
    for index in np.random.default_rng(0).permutation(len(files)):
        if size >= max_bytes:
            break
        with files[index].open(encoding="utf-8", errors="replace") as stream:
            document = stream.read(max_bytes - size)
        documents.append(document)
        size += len(document)
    if not size:
        raise PretrainError(
            f"There is no text in {root}: name a file that is not empty, or a directory "
            f"with {', '.join(sorted(_SUFFIXES))} files."
        )
    return documents


def _text_files(root: Path, skipped: set[str]) -> list[Path]:
    if root.is_file():
        return [root]
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - skipped  # os.walk then stays out of them
        found += [Path(folder, name) for name in names if Path(name).suffix in _SUFFIXES]
    return found


def _split(documents: list[str]) -> tuple[str, str]:
    ends = np.cumsum([len(document) for document in documents])
    cut = ends[-1] - ends[-1] // _HELD_OUT_ONE_IN
    if len(documents) == 1:
        return documents[0][:cut], documents[0][cut:]
    whole = int(np.searchsorted(ends, cut, side="right"))
    whole = min(max(whole, 1), len(documents) - 1)
    return _SEPARATOR.join(documents[:whole]), _SEPARATOR.join(documents[whole:])


def _bytes_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _encode(bpe: tokenizers.Tokenizer, text: str) -> np.ndarray:
    return np.array(bpe.encode(text).ids, np.min_scalar_type(bpe.get_vocab_size() - 1))


def _byte_pairs(text: str, vocab_size: int, cache: Path) -> tokenizers.Tokenizer:
    path = cache / f"bpe-{vocab_size}-{_digest(text.encode())}.json"
    if path.exists():
        return tokenizers.Tokenizer.from_file(str(path))
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text.split(_SEPARATOR), trainer)
    cache.mkdir(parents=True, exist_ok=True)
    # Other processes of the run may be looking for it: it appears whole or not at all.
    unfinished = path.with_suffix(f".{os.getpid()}.{socket.gethostname()}")
    bpe.save(str(unfinished))
    unfinished.replace(path)
    return bpe


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
