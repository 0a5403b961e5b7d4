"""What of a gradient reaches the state."""

from microadam_jax.compressors.block_sparse import BlockSparse
from microadam_jax.compressors.compressor import Compressor, Deferred, require_compressor
from microadam_jax.compressors.dense import Dense
from microadam_jax.compressors.low_rank import LowRank
from microadam_jax.compressors.power_sgd import PowerSGD, power_sgd
from microadam_jax.compressors.top_k import TopK, top_k
from microadam_jax.trees import is_compressed

__all__ = [
    "BlockSparse",
    "Compressor",
    "Deferred",
    "Dense",
    "LowRank",
    "PowerSGD",
    "TopK",
    "is_compressed",
    "power_sgd",
    "require_compressor",
    "top_k",
]
