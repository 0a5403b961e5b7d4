"""The pattern language, and that everything which takes a pattern speaks it."""

import optax
import pytest

from microadam_jax import Matrices, Partition, Storage, top_k, with_diagnostics
from microadam_jax.codecs import as_storage
from microadam_jax.compressors import power_sgd
from microadam_jax.layout.path_rules import PathRules, path_pattern
from microadam_jax.layout.stacks import is_small

EVERYBODY = {
    "partition": lambda pattern: Partition(((pattern, "in | out -> out"),)),
    "partition, stacked": lambda pattern: Partition(stacked=pattern),
    "storage": lambda pattern: Storage("dynamic8", rules=((pattern, "float32"),)),
    "storage, stacked": lambda pattern: Storage("dynamic8", stacked=pattern),
    "list of codecs": lambda pattern: as_storage([(pattern, "float32"), (".*", "dynamic8")]),
    "matrices, excluded": lambda pattern: Matrices(exclude=pattern),
    "matrices": lambda pattern: Matrices(dimension_numbers=((pattern, (0, 1)),)),
    "diagnostics": lambda pattern: with_diagnostics(optax.sgd(1.0), {"group": pattern}),
    "top_k": lambda pattern: top_k(stacked=pattern),
    "power_sgd": lambda pattern: power_sgd(stacked=pattern),
}


@pytest.mark.parametrize("take", EVERYBODY.values(), ids=EVERYBODY)
@pytest.mark.parametrize(
    ("pattern", "said"),
    [("(query", r"'\(query' is bad: .*position"), ("layers/", "'layers/' matches nothing")],
)
def test_bad_patterns_are_named_by_everybody(take, pattern: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        take(pattern)


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("(query|key)/kernel", "layers/0/query/kernel", True),
        ("(query|key)/kernel", "subquery/kernel", False),
        ("a|b", "x/b", True),
        ("embedding", "embedding/scale", False),
        ("embedding/.*", "embedding/scale", True),
        (".*embed.*", "my_embedding/scale", True),
        (".*", "", True),
        ("", "", True),
        ("", "w", False),
    ],
)
def test_patterns_are_for_whole_components_at_the_end(
    pattern: str, path: str, matches: bool
) -> None:
    assert (path_pattern(pattern).search(path) is not None) == matches
    assert list(PathRules([(pattern, 1)]).matching(path)) == [1] * matches


def test_rules_are_tuples_that_are_checked_once() -> None:
    rules = PathRules([["w", 1], ("w|b", 2)])  # as JSON has them
    assert PathRules(rules) is rules == (("w", 1), ("w|b", 2))
    assert list(rules.matching("a/w")) == [1, 2]
    for bad in (("w", "float32"), [("w",)], [(1, 2)]):
        with pytest.raises(ValueError, match="pair of a path pattern and a value"):
            PathRules(bad)


def test_an_end_for_any_path_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"\('\.\*', codec\); this one ends with ''"):
        as_storage([("embedding", "float32"), ("", "dynamic8")])


def test_small_is_a_question_of_layers_and_rows() -> None:
    assert not is_small((16, 256), None)
    assert is_small((16, 256), layer_axis=0)
    assert not is_small((16, 4096), layer_axis=0)
    assert is_small((4096, 8), None, min_row=16)
    assert is_small((), None)
    assert is_small((0, 5), layer_axis=0)
    assert not is_small((), None, min_size=0)


def test_labels_of_states_before_are_those_of_now() -> None:
    assert Storage("dynamic8", min_size=0, min_row=1).label == "dynamic8_b256_91999a75"
