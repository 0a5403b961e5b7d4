"""Subspaces of gradients: which matrices, what spans them, when they change, and the rest."""

from microadam_jax.layout.matrices import OUTPUT_HEAD, Matrices, MatrixDimensionNumbers
from microadam_jax.subspace.complement import (
    Complement,
    Discard,
    FeedBack,
    NormMatchedRest,
    RawRest,
    ScaledGradient,
    SignOfRest,
)
from microadam_jax.subspace.dense import (
    gaussian,
    orthogonal_gaussian,
    power_iteration,
    randomized_svd,
    srht,
    svd,
)
from microadam_jax.subspace.refresh import Refresh, refresh_every
from microadam_jax.subspace.selected import dct_columns, sampled_rows, top_k_rows, uniform_rows
from microadam_jax.subspace.subspace import Subspace, of_rank

__all__ = [
    "OUTPUT_HEAD",
    "Complement",
    "Discard",
    "FeedBack",
    "Matrices",
    "MatrixDimensionNumbers",
    "NormMatchedRest",
    "RawRest",
    "Refresh",
    "ScaledGradient",
    "SignOfRest",
    "Subspace",
    "dct_columns",
    "gaussian",
    "of_rank",
    "orthogonal_gaussian",
    "power_iteration",
    "randomized_svd",
    "refresh_every",
    "sampled_rows",
    "srht",
    "svd",
    "top_k_rows",
    "uniform_rows",
]
