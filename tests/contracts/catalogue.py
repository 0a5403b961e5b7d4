"""Every method and the other public transformations, for the suites that all of them must pass.

A method of ``microadam_jax.methods`` is here by its row; ``ARGUMENTS`` may add to its arguments.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from microadam_jax import (
    Blocks,
    Matrices,
    MicroAdamLayout,
    Partition,
    Refresh,
    Storage,
    Window,
    accumulate_into_residual,
    adamw8bit,
    compress,
    error_feedback,
    microadam,
    project_gradients,
    quantize_state,
    scale_by_window_adam,
    to_dense,
    top_k,
)
from microadam_jax.codecs import affine4, dynamic4, dynamic8, float8, int4, linear2, rank1_linear4
from microadam_jax.compressors import power_sgd
from microadam_jax.layout.axes import Axes
from microadam_jax.layout.subsets import Subsets
from microadam_jax.methods import METHODS
from microadam_jax.subspace import sampled_rows, srht

COMPRESSOR = top_k(count=3, blocks=Blocks(64), min_size=0, min_row=0)
SMALL = MicroAdamLayout(COMPRESSOR, affine4(Blocks(64)), Window(3))
PARTITION = Partition(
    (
        ("attention/kernel", Axes("in | (heads head_dim) -> heads", heads=8)),
        ("stacked", "layer in | out -> layer out"),
        ("odd", "token embed -> token"),
    )
)
STOCHASTIC = dataclasses.replace(SMALL, residual=affine4(Blocks(64), rounding="stochastic"))


def stored(codec: Any) -> Storage:
    """Everything in few bits: the contract's leaves are all small."""
    return Storage(codec, min_size=0, min_row=1)


THREE = Window(3, "float32")
MATRICES = Matrices(partition=PARTITION)
MU8, NU8 = stored(dynamic8(64)), stored(dynamic8(64, signed=False))
MU4 = stored(dynamic4(64, rounding="stochastic"))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A transformation under test.

    Attributes:
        factory: makes it from keyword arguments.
        arguments: with which it is made; the numbers among them may be injected.
        decays: whether it needs the parameters in ``update``.
        shares: whether elements share a moment: its state is smaller than the parameter along
            the axes of a block, and the mean over a block may cross devices.
        coarse: whether moments are rounded, so that the last bit of a number can move an element
            by a level.
        couples: whether every leaf's update depends on all leaves, through inner products of
            whole models: these are summed over devices, a leaf alone is another model, and a bad
            gradient reaches every leaf.
        projects: whether a matrix is updated as a whole: in a subspace, where states have a rank in
            place of an axis of the parameter, or orthogonalized. It may be gathered from all
            devices.
    """

    factory: Callable[..., optax.GradientTransformation]
    arguments: dict[str, Any]
    decays: bool = False
    shares: bool = False
    coarse: bool = False
    couples: bool = False
    projects: bool = False

    def make(self) -> optax.GradientTransformation:
        return self.factory(**self.arguments)


def window_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    return optax.chain(
        compress(COMPRESSOR), scale_by_window_adam(COMPRESSOR, Window(3), b1, b2, eps)
    )


def feedback(alpha: float | None, seed: int, residual: Any) -> optax.GradientTransformation:
    return optax.chain(error_feedback(COMPRESSOR, residual, alpha, seed), to_dense())


def accumulated(learning_rate: float) -> optax.GradientTransformation:
    return accumulate_into_residual(microadam(learning_rate), every_k=2)


def quantized_adamw(learning_rate: float) -> optax.GradientTransformation:
    return quantize_state(optax.adamw(learning_rate), {"mu": MU8, "nu": NU8})


def projected_momentum(decay: float) -> optax.GradientTransformation:
    refresh = Refresh(2, moments="reset")
    return project_gradients(optax.trace(decay), sampled_rows(4), refresh, matrices=MATRICES)


# Arguments beside those that `entry_of` gives to all methods that take them.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adam_mini": {"weight_decay": 0.1},
    "adam_sn": {"learning_rate": 1e-1, "weight_decay": 0.1},
    "adagrad_sn": {"learning_rate": 1.0, "subsets": Subsets("runs", reduction="mean")},
    "came": {"learning_rate": 1e-3, "weight_decay": 0.1},
    "adamw8bit": {"weight_decay": 0.0, "mu_codec": MU8, "nu_codec": NU8},
    "adamw_fp8": {
        "weight_decay": 0.0,
        "mu_codec": stored(float8(block=64, expansion=True)),
        "nu_codec": stored(float8(block=64, expansion=True)),
    },
    "adamw4bit": {"mu_codec": MU4, "nu_codec": stored(rank1_linear4(64))},
    "adamw4bit_factored": {"mu_codec": MU4},
    "adam_mini4bit": {"mu_codec": MU4},
    "lion4bit": {"learning_rate": 1e-3, "mu_codec": MU4},
    "muon8bit": {"mu_codec": MU8},
    "muon4bit": {"mu_codec": stored(int4(64, rounding="stochastic"))},
    "muon2bit": {"mu_codec": stored(linear2(64, rounding="stochastic"))},
    "sinkhorn4bit": {"mu_codec": MU4},
    "sinkhorn2bit": {"mu_codec": stored(linear2(64, rounding="stochastic"))},
    "sparse_mfac": {
        "damping": 1e-2,
        "compressor": COMPRESSOR,
        "residual": "bfloat16",
        "window": Window(3),
    },
    "lowrank_mfac": {
        "damping": 1e-2,
        "compressor": power_sgd(2, stacked="stacked"),
        "residual": "float32",
        "window": THREE,
    },
    "sparse_ggt": {"compressor": COMPRESSOR, "residual": "float32", "window": THREE},
    "mfac": {"damping": 1e-2, "window": THREE},
    "galore": {"update_interval": 3},
    "fira": {"subspace": srht(4), "update_interval": Refresh(3, stagger=True, moments="rotate")},
}
# Whose updates depend on norms or maxima that elements share.
NORMS = (
    *("adamw4bit", "muon8bit", "muon4bit", "muon2bit", "sinkhorn4bit", "sinkhorn2bit"),
    *("fira", "apollo", "apollo_mini", "snsm"),
)
# Whose composition is that of another; their numbers need a look of their own.
ALIKE = (
    *("adamw4bit_factored", "adamw_fp8", "adam_mini8bit", "sparse_ggt", "mfac"),
    *("fira", "apollo", "apollo_mini", "dct_adamw", "sinkhorn2bit"),
    *("muon4bit", "muon2bit"),
)


def entry_of(name: str) -> Entry:
    """The entry of a method of the library."""
    method = METHODS[name]
    common = {"learning_rate": 1e-2, "partition": PARTITION, "matrices": MATRICES}
    taken = {key: value for key, value in common.items() if key in method.parameters}
    arguments = taken | method.at_rank(4) | ARGUMENTS.get(name, {})
    decay = arguments.get("weight_decay", method.parameters["weight_decay"].default)
    return Entry(
        method.factory,
        arguments,
        decays=decay != 0,
        shares=name in NORMS or "partition" in arguments or method.kind == "full matrix",
        coarse=method.kind == "low bits",
        couples=method.kind == "full matrix",
        projects="matrices" in method.parameters,
    )


ENTRIES = {
    **{name: entry_of(name) for name in METHODS},
    "microadam, all compressed": Entry(
        microadam, {"learning_rate": 1e-2, "weight_decay": 0.1, "layout": SMALL}, decays=True
    ),
    "error_feedback": Entry(feedback, {"alpha": None, "seed": 0, "residual": "bfloat16"}),
    "quantize_state": Entry(quantized_adamw, {"learning_rate": 1e-2}, decays=True, coarse=True),
    "scale_by_window_adam": Entry(window_adam, {"b1": 0.9, "b2": 0.99, "eps": 1e-8}),
}

# Settings whose numbers need a look of their own, and whose composition does not.
VARIANTS = {
    "microadam, alpha and stochastic": Entry(
        microadam, {"learning_rate": 1e-2, "alpha": 0.1, "layout": STOCHASTIC}
    ),
    "micro-batches in the residual": Entry(accumulated, {"learning_rate": 1e-2}),
    "adamw8bit, as published": Entry(adamw8bit, {"learning_rate": 1e-2, "weight_decay": 0.0}),
    "project_gradients, sampled rows": Entry(projected_momentum, {"decay": 0.9}, projects=True),
}

# One of each way of keeping a state; the others differ in what they compute.
SAMPLE = (
    "microadam, all compressed",
    "adam_mini",
    "came",
    "adamw8bit",
    "sparse_mfac",
    "galore",
    "snsm",
)


def marks_of(name: str) -> tuple[pytest.MarkDecorator, ...]:
    """``make test`` takes the sample, ``make slow`` the others."""
    return () if name in SAMPLE else (pytest.mark.slow,)


def parameters(dtype: Any = jnp.float32) -> dict[str, Any]:
    """Matrices, stacked layers, odd rows, a vector, a scalar, a zero-size leaf and a None."""
    shapes = {
        "attention": {"kernel": (16, 512), "bias": (64,)},
        "stacked": (2, 8, 256),
        "odd": (3, 37),
        "scalar": (),
        "empty": (0, 4),
    }
    tree = jax.tree.map(
        lambda shape: jnp.full(shape, 0.5, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    return {**tree, "none": None}


SPECS = {
    "attention": {"kernel": P("fsdp", "tp"), "bias": P("tp")},
    "stacked": P(None, ("fsdp", "tp")),
    "odd": P(),
    "scalar": P(),
    "empty": P(),
    "none": None,
}


def gradients(params: Any, step: int = 0) -> Any:
    """Gradients of the parameters' structure and dtypes, other ones for each step."""
    # NumPy's, because a compiled generator may differ in the last bit from one mesh to another.
    random = np.random.default_rng(step)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype), params
    )
