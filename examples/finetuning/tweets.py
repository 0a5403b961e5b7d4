"""Labelled texts, tokenized, with a fixed split."""

import collections
import csv
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers

from ..llama.config import PretrainError

LABELS = ("negative", "neutral", "positive")
_HELD_OUT_ONE_IN = 10


@dataclasses.dataclass(frozen=True)
class Texts:
    """Tokenized texts with labels.

    Attributes:
        tokens: int32 `(texts, seq_len)`, zeros after each text's end.
        mask: True at tokens, of the same shape.
        labels: int32 `(texts,)`, indices into `LABELS`.
    """

    tokens: np.ndarray
    mask: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: np.ndarray | slice) -> "Texts":
        return Texts(self.tokens[index], self.mask[index], self.labels[index])


def read_texts(table: bytes, source: str) -> list[tuple[str, int]]:
    """Reads the columns `text` and `sentiment` of a CSV file, each text once.

    Among the tweets are hundreds of copies, which would be in both parts of a split, and some
    texts with several labels, which are left out.

    Args:
        table: The file.
        source: Its name, for errors.

    Returns:
        Pairs of a text and a label, in the order of the file.

    Raises:
        PretrainError: If a column or a text is missing, or a label unknown.
    """
    # Bytes that are not UTF-8 are emoji that were lost before the file was published; a mark of the
    # byte order is what spreadsheets write.
    rows = csv.DictReader(io.StringIO(table.decode("utf-8-sig", errors="replace")))
    missing = {"text", "sentiment"} - set(rows.fieldnames or ())
    if missing:
        raise PretrainError(
            f"{source} has no column {sorted(missing)[0]!r}: its first line must name the columns "
            "text and sentiment."
        )
    labels: dict[str, set[int]] = collections.defaultdict(set)
    for number, row in enumerate(_records(rows, source), 2):
        if row["text"] is None:
            raise PretrainError(f"{source}, record {number}: there is no text.")
        if row["sentiment"] not in LABELS:
            raise PretrainError(
                f"{source}, record {number}: unknown label {row['sentiment']!r}; the labels are "
                f"{', '.join(LABELS)}."
            )
        labels[row["text"]].add(LABELS.index(row["sentiment"]))
    return [(text, found.pop()) for text, found in labels.items() if len(found) == 1]


def _records(rows: csv.DictReader, source: str) -> Iterator[dict[str, str | None]]:
    try:
        yield from rows
    except csv.Error as error:
        raise PretrainError(f"{source}, after line {rows.line_num}: {error}.") from error


def tokenize(texts: list[tuple[str, int]], tokenizer: Path, seq_len: int) -> Texts:
    """Encodes texts with a tokenizer's file, cut and padded to `seq_len` tokens.

    Raises:
        PretrainError: If the tokenizer cannot be read, or `seq_len` has no place for a word.
    """
    try:
        encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the package raises plain Exceptions
        raise PretrainError(f"{tokenizer} is not a tokenizer: {error}.") from error
    marks = encoder.num_special_tokens_to_add(False)
    if seq_len <= marks:
        raise PretrainError(
            f"--seq-len {seq_len} has no place for a word beside the {marks} marks that the "
            f"tokenizer puts around a text; take {marks + 1} or more."
        )
    encoder.enable_truncation(seq_len)
    encoder.enable_padding(length=seq_len)
    encoded = encoder.encode_batch([text for text, _ in texts])
    return Texts(
        tokens=np.array([e.ids for e in encoded], np.int32),
        mask=np.array([e.attention_mask for e in encoded], bool),
        labels=np.array([label for _, label in texts], np.int32),
    )


def split(texts: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Shuffles, always in the same way, and holds out a tenth: training and held-out texts."""
    order = np.random.default_rng(0).permutation(len(texts))
    held_out = len(texts) // _HELD_OUT_ONE_IN
    return [texts[i] for i in order[held_out:]], [texts[i] for i in order[:held_out]]
