"""Finds values for leaves by patterns of their paths: the one pattern language of the library."""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

Value = TypeVar("Value")


@functools.cache
def path_pattern(pattern: str) -> re.Pattern[str]:
    """Returns the compiled form of a path pattern, whose ``search`` takes a path.

    Args:
        pattern: a regular expression for the end of a path, whole components of it:
            ``"(query|key)/kernel"`` matches ``"layers/0/query/kernel"`` but not
            ``"subquery/kernel"``, ``"attention/.*"`` all that stands below an ``attention``, and
            ``".*"`` every path.

    Raises:
        ValueError: if the pattern is no regular expression, or ends with a slash, which no path
            does.

    Examples:
        >>> from microadam_jax.layout.path_rules import path_pattern
        >>> paths = ("decoder/embedding", "embedding/scale", "my_embedding")
        >>> [path for path in paths if path_pattern("embedding").search(path)]
        ['decoder/embedding']
        >>> [path for path in paths if path_pattern(".*embedding.*").search(path)]
        ['decoder/embedding', 'embedding/scale', 'my_embedding']
    """
    if pattern.endswith("/"):
        raise ValueError(
            f"The path pattern {pattern!r} matches nothing, as no path ends with a slash. Write "
            f"{pattern[:-1]!r} for a container of layers, {pattern + '.*'!r} for what is below it."
        )
    try:
        re.compile(pattern)
        return re.compile(rf"(?:^|/)(?:{pattern})$")
    except re.error as error:
        raise ValueError(
            f"The path pattern {pattern!r} is bad: {error}. Give a regular expression for the end "
            "of a path, such as 'embedding' or '(query|key)/kernel'."
        ) from error


def matches_none(paths: Sequence[str]) -> str:
    """Says of a pattern that no path of several matches it, and what it would have to be."""
    return (
        f"matches none of {len(paths)} leaves, such as {paths[0]!r}. A pattern matches the end of "
        "a path: 'embedding', or 'embedding/.*' for what stands below one"
    )


class PathRules(tuple[tuple[str, Value], ...], Generic[Value]):
    """Pairs of a path pattern (:func:`path_pattern`) and a value, in the order in which they count.

    Raises:
        ValueError: if a rule is no such pair, or a pattern is bad.
    """

    def __new__(cls, rules: Iterable[tuple[str, Value]]) -> "PathRules[Value]":
        """Checks the rules; those that were checked before come back."""
        if isinstance(rules, cls):
            return rules
        pairs = [rule if isinstance(rule, str) else tuple(rule) for rule in rules]
        for pair in pairs:
            if isinstance(pair, str) or len(pair) != 2 or not isinstance(pair[0], str):
                raise ValueError(f"A rule is a pair of a path pattern and a value; got {pair!r}.")
            path_pattern(pair[0])
        return super().__new__(cls, pairs)  # pyrefly: ignore

    def matching(self, path: str) -> Iterator[Value]:
        """Yields the values whose patterns match ``path``; the first is the one that counts."""
        return (value for pattern, value in self if path_pattern(pattern).search(path))
