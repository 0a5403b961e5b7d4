"""What of a gradient reaches the state."""

from microadam_jax.compressors.block_sparse import BlockSparse, is_block_sparse
from microadam_jax.compressors.compressor import Compressor
from microadam_jax.compressors.top_k import TopK, top_k

__all__ = ["BlockSparse", "Compressor", "TopK", "is_block_sparse", "top_k"]
