"""Optax's own generic suites, run against our aliases.

The suites read their lists of optimizers when their classes are made, so the lists are replaced
while the modules are imported. Nothing of Optax is copied or changed.
"""

import contextlib
import functools
import importlib
import inspect
import os
import warnings
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax.contrib
import pytest
from absl.testing import parameterized
from optax._src import alias

from microadam_jax import Blocks, MicroAdamLayout, Window, microadam, top_k
from microadam_jax.codecs import affine4
from microadam_jax.methods import METHODS, Method

# The warnings have tests of their own: here parameters follow no rule, or are narrow, on purpose.
pytestmark = [
    pytest.mark.usefixtures("fewer_optimizations"),
    pytest.mark.filterwarnings("ignore:.*no rule of the partition names:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*takes more bytes than AdamW:UserWarning"),
]

# Optax 0.2.8 compares versions as text and would skip its sharding tests from JAX 0.10 on.
_VERSION = mock.patch.object(jax, "__version__", "9.9.9")

EVERYTHING = MicroAdamLayout(
    top_k(count=1, blocks=Blocks(64), min_size=0, min_row=0), affine4(64), Window()
)


def microadam_compressed(
    learning_rate: optax.ScalarOrSchedule, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """MicroAdam with no leaf kept dense: the suites' leaves are all small."""
    return microadam(learning_rate, eps=eps, layout=EVERYTHING)


def without_static_args(method: Method) -> Any:
    """The factory without integers that shape a state: the suites inject all that they see."""
    if not method.static_args:
        return method.factory

    @functools.wraps(method.factory)
    def factory(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
        return method.factory(*args, **kwargs)

    seen = [p for name, p in method.parameters.items() if name not in method.static_args]
    factory.__signature__ = inspect.Signature(seen)
    return factory


FACTORIES = {name: without_static_args(method) for name, method in METHODS.items()}
FACTORIES["microadam_compressed"] = microadam_compressed
# Learning rates that solve the suites' problems; 0.1 does it for the others.
RATES = {
    "microadam": 1e-2,
    "microadam_compressed": 3e-4,
    "adagrad_sn": 1.0,
    "came": 1e-2,
    "lion4bit": 1e-2,
    "sparse_ggt": 1e-2,
}
OPTIONS = {
    # M-FAC's step grows while gradients shrink, up to g / damping: without noise it wants more.
    "mfac": {"damping": 100.0},
    "sparse_mfac": {"damping": 100.0},
    "lowrank_mfac": {"damping": 100.0},
    # A traced 0.9999 is a float32, whose distance from 1 is off by more than the suites tolerate.
    "came": {"b3": 0.99},
    "adamw8bit": {"weight_decay": 1e-4},
    "adamw4bit": {"weight_decay": 1e-4},
    "adamw_fp8": {"weight_decay": 1e-4},
    "adamw4bit_factored": {"weight_decay": 1e-4},
}
CASES = tuple(
    {
        "opt_name": name,
        "opt_kwargs": {"learning_rate": RATES.get(name, 1e-1)} | OPTIONS.get(name, {}),
    }
    for name in FACTORIES
)
# One of each way of keeping a state, which Optax's wrappers could disturb.
SAMPLE = {
    *("microadam_compressed", "adam_mini", "adamw8bit", "adam_mini4bit", "sparse_mfac"),
    *("galore", "snsm", "muon8bit"),
}
UNWRAPPED = {"wrapper_name": None, "wrapper_kwargs": None}

_product, _named_parameters = parameterized.product, parameterized.named_parameters


def _our_product(*sequences: Any, cases: Any = CASES, **grid: Any) -> Any:
    ours = [
        [case | (UNWRAPPED if "wrapper_name" in theirs[0] else {}) for case in cases]
        if "opt_name" in theirs[0]
        else theirs
        for theirs in sequences
    ]
    if "dtype" in grid:
        # Real numbers only, as for every optimizer that compares magnitudes.
        grid["dtype"] = [d for d in grid["dtype"] if jnp.dtype(d).kind != "c"]
    return _product(*ours, **grid)


def _our_instances(*named: Any) -> Any:
    if len(named) > 1:  # not the list of optimizers
        return _named_parameters(*named)
    if isinstance(named[0], list):  # of float64_test: name, factory, arguments
        return _named_parameters([(n, f, {"learning_rate": 1e-3}) for n, f in FACTORIES.items()])
    return _named_parameters((name, factory(1e-3)) for name, factory in FACTORIES.items())


def _contrib_suite(*names: str) -> type:
    """The suite that runs optimizers through Optax's wrappers."""
    cases = [case for case in CASES if case["opt_name"] in names]
    product = functools.partial(_our_product, cases=cases)
    with mock.patch.object(parameterized, "product", product):
        from optax.contrib import _common_test

        return importlib.reload(_common_test).ContribTest


# The sharding suite asks for its devices through the environment; ours has them already.
with _VERSION, mock.patch.dict(os.environ), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    with mock.patch.object(parameterized, "product", _our_product):
        from optax._src.alias_test import AliasTest
    with mock.patch.object(parameterized, "named_parameters", _our_instances):
        from optax._src.float64_test import Float64Test
        from optax._src.sharding_test import ShardingTest
    ContribTest = pytest.mark.slow(_contrib_suite(*SAMPLE))
    OtherContribTest = pytest.mark.matrix(_contrib_suite(*FACTORIES.keys() - SAMPLE))

__all__ = ["AliasTest", "ContribTest", "Float64Test", "OtherContribTest", "ShardingTest"]


@pytest.fixture(autouse=True)
def _ours_where_the_suites_look() -> Any:
    """Only while a suite runs: Optax has a `galore` of its own, which other tests call."""
    with _VERSION, contextlib.ExitStack() as stack:
        for module in (optax.contrib, alias):
            stack.enter_context(mock.patch.multiple(module, create=True, **FACTORIES))
        yield
