"""The published methods, one chain each."""

from microadam_jax.aliases.efcp import lowrank_mfac, mfac, sparse_ggt, sparse_mfac
from microadam_jax.aliases.galore import apollo, apollo_mini, fira, galore
from microadam_jax.aliases.low_bit import adamw4bit, adamw4bit_factored, adamw8bit, adamw_fp8
from microadam_jax.aliases.low_bit_adam_mini import adam_mini4bit, adam_mini8bit
from microadam_jax.aliases.low_bit_momentum import lion4bit, sinkhorn2bit, sinkhorn4bit
from microadam_jax.aliases.low_bit_muon import muon2bit, muon4bit, muon8bit
from microadam_jax.aliases.shared_moments import adagrad_sn, adam_mini, adam_sn, came
from microadam_jax.aliases.subspace import dct_adamw, grass, ldadam, snsm
from microadam_jax.aliases.windowed import MicroAdamLayout, microadam

__all__ = [
    "MicroAdamLayout",
    "adagrad_sn",
    "adam_mini",
    "adam_mini4bit",
    "adam_mini8bit",
    "adam_sn",
    "adamw4bit",
    "adamw4bit_factored",
    "adamw8bit",
    "adamw_fp8",
    "apollo",
    "apollo_mini",
    "came",
    "dct_adamw",
    "fira",
    "galore",
    "grass",
    "ldadam",
    "lion4bit",
    "lowrank_mfac",
    "mfac",
    "microadam",
    "muon2bit",
    "muon4bit",
    "muon8bit",
    "sinkhorn2bit",
    "sinkhorn4bit",
    "snsm",
    "sparse_ggt",
    "sparse_mfac",
]
