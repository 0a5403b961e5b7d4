"""Selecting the largest elements of each block."""

from pallas_kernels.topk_compress.reference import select_top_k

__all__ = ["select_top_k"]
