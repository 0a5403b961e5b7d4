"""Selecting the largest elements of each block, and keeping the rest in four bits."""

from pallas_kernels.topk_compress.api import topk_compress
from pallas_kernels.topk_compress.reference import (
    MAX_UNROLLED,
    decode,
    encode,
    extremes,
    select_top_k,
)

__all__ = ["MAX_UNROLLED", "decode", "encode", "extremes", "select_top_k", "topk_compress"]
