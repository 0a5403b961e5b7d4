"""One row for each optimizer: its factory, its paper, its bytes, and settings to try it with.

The command line, the planner, the benchmarks, the examples and the tests read this table, and tests
compare the tables of the pages with it. CONTRIBUTING.md describes how a method is added.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import optax

from microadam_jax import aliases

Factory = Callable[..., optax.GradientTransformation]
Kind = Literal["window", "shared moments", "low bits", "full matrix", "subspace"]


class Method(NamedTuple):
    """Describes an optimizer of the library.

    Attributes:
        factory: makes it from a learning rate, a number or a schedule.
        kind: the page that describes it, and the family whose options it has.
        paper: authors, short title and address.
        bytes_per_parameter: of a kernel of R inputs and C outputs whose rows the blocks divide, in
            Python's arithmetic; L is the larger of R and C, s the smaller, r the rank.
        learning_rate: to pre-train a small model with, as ``examples/pretrain_llama.py`` does.
        options: for the same, where the defaults are those of a paper that fine-tunes.
    """

    factory: Factory
    kind: Kind
    paper: str
    bytes_per_parameter: str
    learning_rate: float = 1e-3
    options: Mapping[str, Any] = MappingProxyType({})

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Returns the parameters of the factory by name."""
        return inspect.signature(self.factory).parameters

    def at_rank(self, rank: int) -> dict[str, Any]:
        """Returns the option that sets the rank; no option if the method takes none."""
        return {"rank": rank} if "rank" in self.parameters else {}

    @property
    def static_args(self) -> tuple[str, ...]:
        """Names the integers that shape a state, for ``optax.inject_hyperparams``."""
        return tuple(name for name in ("rank", "update_interval") if name in self.parameters)


MICROADAM = "Modoranu et al., MicroAdam (arXiv 2405.15593)"
ADAM_MINI = "Zhang et al., Adam-mini (arXiv 2406.16793)"
SUBSET_NORM = "Nguyen and Nguyen, subset-norm and subspace-momentum (arXiv 2411.07120)"
CAME = "Luo et al., CAME (arXiv 2307.02047)"
EIGHT_BITS = "Dettmers et al., 8-bit optimizers (arXiv 2110.02861)"
FOUR_BITS = "Li et al., 4-bit optimizers (arXiv 2309.01507)"
COAT = "Xi et al., COAT (arXiv 2410.19313)"
LION = "Chen et al., Lion (arXiv 2302.06675)"
MUON = "Liu et al., Muon is scalable for LLM training (arXiv 2502.16982)"
SINKHORN = "Scetbon et al., Gradient multi-normalization (arXiv 2502.06742)"
EFCP = "Modoranu et al., EFCP (arXiv 2306.06098)"
MFAC = "Frantar et al., M-FAC (arXiv 2107.03356)"
GALORE = "Zhao et al., GaLore (arXiv 2403.03507)"
FIRA = "Chen et al., Fira (NeurIPS 2025)"
APOLLO = "Zhu et al., APOLLO (arXiv 2412.05270)"
GRASS = "Muhamed et al., Grass (arXiv 2406.17660)"
LDADAM = "Robert et al., LDAdam (arXiv 2410.16103)"
DCT_ADAMW = "FFT-based dynamic subspace selection (arXiv 2505.17967)"

_ROWS = (
    Method(
        aliases.microadam,
        "window",
        MICROADAM,
        "1/2 + 8/256 + 10*3*3/256",
        2e-3,
        {"layout": "pretrain"},
    ),
    Method(aliases.adam_mini, "shared moments", ADAM_MINI, "4 + 4/R"),
    Method(aliases.adam_sn, "shared moments", SUBSET_NORM, "4 + 4/s", 2e-2),
    Method(aliases.adagrad_sn, "shared moments", SUBSET_NORM, "4 + 4/s", 1e-1),
    Method(aliases.came, "shared moments", CAME, "4 + 8/R + 8/C", 2e-4),
    Method(aliases.adamw8bit, "low bits", EIGHT_BITS, "2 + 8/256"),
    Method(aliases.adamw_fp8, "low bits", COAT, "2 + 10/128"),
    Method(aliases.adamw4bit, "low bits", FOUR_BITS, "1 + 4/128 + 4/R + 4/C"),
    Method(aliases.adamw4bit_factored, "low bits", FOUR_BITS, "1/2 + 4/128 + 4/R + 4/C"),
    Method(aliases.adam_mini8bit, "low bits", ADAM_MINI, "1 + 4/256 + 4/R"),
    Method(aliases.adam_mini4bit, "low bits", ADAM_MINI, "1/2 + 4/128 + 4/R"),
    Method(aliases.lion4bit, "low bits", LION, "1/2 + 4/128", 1.6e-3),
    Method(aliases.muon8bit, "low bits", MUON, "1 + 4/256", 4e-3),
    Method(aliases.muon4bit, "low bits", MUON, "1/2 + 4/128", 8e-3),
    Method(aliases.muon2bit, "low bits", MUON, "1/4 + 4/256", 8e-3),
    Method(aliases.sinkhorn4bit, "low bits", SINKHORN, "1/2 + 4/128", 2e-3),
    Method(aliases.sinkhorn2bit, "low bits", SINKHORN, "1/4 + 4/256", 2e-3),
    Method(aliases.sparse_mfac, "full matrix", EFCP, "1/2 + 8/256 + 32*3*3/256"),
    Method(aliases.lowrank_mfac, "full matrix", EFCP, "1/2 + 8/256 + 4*4/R + 2*32*4*(R + C)/(R*C)"),
    Method(aliases.sparse_ggt, "full matrix", EFCP, "1/2 + 8/256 + 32*3*3/256"),
    Method(aliases.mfac, "full matrix", MFAC, "4*32"),
    Method(aliases.galore, "subspace", GALORE, "4*(2*L*r + s*r)/(R*C)", 2e-2),
    Method(aliases.fira, "subspace", FIRA, "4*(2*L*r + s*r)/(R*C)", 5e-3),
    Method(aliases.apollo, "subspace", APOLLO, "4*2*L*r/(R*C)", 1e-2),
    Method(aliases.apollo_mini, "subspace", APOLLO, "4*2*L/(R*C)", 2.5e-3),
    Method(aliases.grass, "subspace", GRASS, "4*(2*L*r + r)/(R*C)", 5e-3),
    Method(aliases.ldadam, "subspace", LDADAM, "4*(2*L*r + s*r + L*s)/(R*C)", 4e-3),
    Method(aliases.dct_adamw, "subspace", DCT_ADAMW, "4*(2*L*r + r)/(R*C)", 4e-3),
    Method(aliases.snsm, "subspace", SUBSET_NORM, "4*(L*r + s*r + L)/(R*C)", 2e-2),
)
METHODS: Mapping[str, Method] = MappingProxyType({row.factory.__name__: row for row in _ROWS})
