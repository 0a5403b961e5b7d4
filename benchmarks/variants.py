"""Trains with what was tried beside the methods: what their papers have, other bits, other shapes.

python -m benchmarks.variants --out benchmarks/results/low_bits.csv --settings AdamW ...

One file for each page that shows some of them, beside the same AdamW as on the frontier.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import optax

from benchmarks import frontier
from benchmarks.frontier import ADAM, EVERY, MUON, NORMS, RANK, evenly
from benchmarks.sweep import Trial, sweep
from benchmarks.unbiased_roots import ze_eden, zip_sr
from examples.llama.config import Config
from microadam_jax import (
    Matrices,
    MicroAdamLayout,
    Partition,
    Refresh,
    Storage,
    Window,
    adam_mini,
    adam_mini4bit,
    adam_sn,
    adamw4bit,
    adamw4bit_factored,
    adamw_fp8,
    error_feedback,
    grass,
    ldadam,
    microadam,
    muon2bit,
    muon4bit,
    muon8bit,
    quantize_state,
    sinkhorn2bit,
    sinkhorn4bit,
    snsm,
    to_dense,
    top_k,
)
from microadam_jax.blocks import Blocks
from microadam_jax.codecs import affine4, dynamic4, int4, linear2, linear4
from microadam_jax.codecs.maps import NF4, TableMap
from microadam_jax.codecs.scaled import Scaled
from microadam_jax.layout.names import transformer_rules
from microadam_jax.layout.subsets import Subsets
from microadam_jax.subspace import Discard, sampled_rows, top_k_rows
from microadam_jax.transforms import scale_by_muon

TWO, FOUR = linear2(rounding="stochastic"), dynamic4(rounding="stochastic")
EVEN_FOUR = linear4(rounding="stochastic")
CUT_FOUR = dataclasses.replace(EVEN_FOUR, deviations=2.5)
INT_FOUR = int4(rounding="stochastic")
NORMAL_FOUR = Scaled(NF4, Blocks(128))
TERNARY = Scaled(
    TableMap("ternary", (-1.0, 0.0, 1.0)), Blocks(256, multiple=4), "stochastic", deviations=1.5
)
BY_HEAD = Partition(transformer_rules(heads=Config().heads))
ROWS = Matrices(side="larger", square="out")


def window_of(k: int, window: int) -> MicroAdamLayout:
    """``k`` of 256 elements, that many rows, 4-bit buckets of 256."""
    return MicroAdamLayout(top_k(density=k / 256), affine4(), Window(window))


def sign_of_top_k(
    rate: optax.Schedule, weight_decay: float, k: int
) -> optax.GradientTransformation:
    """Error feedback and the sign: what a window of one comes to, without keeping it."""
    del weight_decay
    return optax.chain(
        error_feedback(top_k(density=k / 256)),
        to_dense(),
        optax.scale_by_sign(),
        optax.scale_by_learning_rate(rate),
    )


def stored_in_four(
    factory: Callable[..., optax.GradientTransformation],
) -> Callable[..., optax.GradientTransformation]:
    """An optimizer with its first moment in 4 bits as it is, not divided by roots."""
    return lambda rate, **options: quantize_state(factory(rate, **options), {"mu": FOUR})


def muon2bit_as_it_is(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """muon2bit whose first moments of embeddings and head are not divided by roots."""
    del weight_decay
    link = quantize_state(scale_by_muon(0.8), {"mu": TWO})
    return optax.chain(link, optax.scale_by_learning_rate(rate))


def with_slower_head(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Muon whose output head moves a quarter as far, which Adam-mini would move at Muon's rate."""

    def head(params: optax.Params) -> optax.Params:
        return jax.tree.map_with_path(lambda path, _: path[0].key == "head", params)

    tx = muon4bit(rate, weight_decay=weight_decay)
    return optax.chain(tx, optax.masked(optax.scale(1 / 4), head))


# Beside the AdamW of the frontier, whose settings may be named too.
SETTINGS: dict[str, Trial] = {
    "AdamW, one rate for all": Trial(functools.partial(optax.adamw, weight_decay=0.0), ADAM),
    "AdamW, embeddings at 0.005": evenly(optax.adamw, ADAM, others=5e-3),
    "AdamW, embeddings at 0.01": evenly(optax.adamw, ADAM, others=1e-2),
    # The search for the lowest loss.
    "Sinkhorn, float32": evenly(sinkhorn4bit, ADAM, mu_codec="float32"),
    "Sinkhorn, float32, beta = 0.8": evenly(sinkhorn4bit, ADAM, beta=0.8, mu_codec="float32"),
    "Sinkhorn, 4 bits to nearest": evenly(sinkhorn4bit, ADAM, mu_codec="dynamic4"),
    "Sinkhorn, 2 bits, beta = 0.8": evenly(sinkhorn2bit, ADAM, beta=0.8),
    "Sinkhorn, 2 bits, 4 for embeddings and head": evenly(
        sinkhorn2bit, ADAM, mu_codec=Storage(TWO, rules=[(".*(embedding|head).*", FOUR)])
    ),
    "Muon, 4 bits": evenly(muon8bit, MUON, mu_codec=FOUR),
    "Muon, even 4 bits": evenly(muon8bit, MUON, mu_codec=EVEN_FOUR),
    "Muon, even 4 bits, beta = 0.9": evenly(muon8bit, MUON, beta=0.9, mu_codec=EVEN_FOUR),
    "Muon, even 4 bits, cut": evenly(muon8bit, MUON, mu_codec=CUT_FOUR),
    "Muon, even 4 bits, cut, beta = 0.9": evenly(muon8bit, MUON, beta=0.9, mu_codec=CUT_FOUR),
    "Muon, int4, beta = 0.95": evenly(muon4bit, MUON, beta=0.95),
    "Muon, 8 bits, beta = 0.9": evenly(muon8bit, MUON, beta=0.9),
    "Muon, 2 bits, beta = 0.9": evenly(muon2bit, MUON, beta=0.9),
    "Muon, ternary": evenly(muon2bit, MUON, mu_codec=TERNARY),
    "Muon, ternary, cut at 2": evenly(
        muon2bit, MUON, mu_codec=dataclasses.replace(TERNARY, deviations=2.0)
    ),
    "Sinkhorn, ternary": evenly(sinkhorn2bit, ADAM, mu_codec=TERNARY),
    "Sinkhorn, int4, beta = 0.9": evenly(sinkhorn4bit, ADAM, beta=0.9, mu_codec=INT_FOUR),
    "Adam-mini, int4": evenly(adam_mini4bit, ADAM, mu_codec=INT_FOUR),
    "Adam-mini, 2 bits": evenly(adam_mini4bit, ADAM, mu_codec=TWO),
    "Adam-mini, 2 bits, b1 = 0.8": evenly(adam_mini4bit, ADAM, mu_codec=TWO, b1=0.8),
    "Adam, factored, 2 bits": evenly(adamw4bit_factored, ADAM, mu_codec=TWO),
    "Adam, m in 8 bits, v in 4": evenly(adamw4bit, ADAM, mu_codec="dynamic8"),
    # The head as far as AdamW moves it at its best rate, with matrices at four times that.
    "muon4bit, head at a quarter": evenly(with_slower_head, MUON),
    "adam_mini4bit, m as it is": evenly(stored_in_four(adam_mini), ADAM),
    "muon2bit, m as it is": evenly(muon2bit_as_it_is, MUON),
    # Other bits.
    "AdamW, FP8, not expanded": evenly(adamw_fp8, ADAM, mu_codec="e4m3", nu_codec="e4m3"),
    "AdamW, 4 bits, v in blocks": evenly(adamw4bit, ADAM, nu_codec="linear4_unsigned"),
    "AdamW, 4 bits, m to nearest": evenly(adamw4bit, ADAM, mu_codec="dynamic4"),
    "AdamW, 4 bits, ZIP-SR": evenly(adamw4bit, ADAM, mu_codec=NORMAL_FOUR, nu_codec=zip_sr()),
    "AdamW, 4 bits, ZE-EDEN": evenly(adamw4bit, ADAM, mu_codec=NORMAL_FOUR, nu_codec=ze_eden()),
    "AdamW, 4 bits, m unbiased, ZE-EDEN": evenly(adamw4bit, ADAM, nu_codec=ze_eden()),
    "AdamW, 4 bits, m unbiased, ZIP-SR": evenly(adamw4bit, ADAM, nu_codec=zip_sr()),
    "Adam-mini, 4 bits to nearest": evenly(adam_mini4bit, ADAM, mu_codec="dynamic4"),
    "Adam-mini, even 4 bits": evenly(adam_mini4bit, ADAM, mu_codec=EVEN_FOUR),
    "Adam-mini, 4 bits, blocks of 64": evenly(
        adam_mini4bit, ADAM, mu_codec=dynamic4(64, rounding="stochastic")
    ),
    # Other blocks of second moments.
    "Adam-mini, query and key by head": evenly(adam_mini, ADAM, partition=BY_HEAD),
    "AdamSN, means": evenly(adam_sn, ADAM, subsets=Subsets(reduction="mean")),
    "AdamSN, 4 bits": evenly(stored_in_four(adam_sn), NORMS),
    # Other subspaces.
    "SNSM, momentum kept": evenly(
        snsm, NORMS, rank=RANK, update_interval=Refresh(EVERY, first=0, moments="keep")
    ),
    "SNSM, momentum rotated": evenly(
        snsm, NORMS, rank=RANK, update_interval=Refresh(EVERY, moments="rotate_first")
    ),
    "SNSM, largest rows": evenly(
        snsm, NORMS, update_interval=EVERY, subspace=top_k_rows(RANK), matrices=ROWS
    ),
    "Grass, sampled rows": evenly(grass, ADAM, subspace=sampled_rows(RANK), update_interval=EVERY),
    "LDAdam, no feedback": evenly(ldadam, ADAM, rank=RANK, complement=Discard()),
    # Other windows and densities.
    "MicroAdam, paper": evenly(microadam, ADAM, layout="paper"),
    "MicroAdam, k = 3, window 10": evenly(microadam, ADAM, layout=window_of(3, 10)),
    "MicroAdam, k = 10, window 3": evenly(microadam, ADAM, layout=window_of(10, 3)),
    "MicroAdam, k = 15, window 2": evenly(microadam, ADAM, layout=window_of(15, 2)),
    "sign of k = 30, no window": evenly(sign_of_top_k, ADAM, k=30),
}

if __name__ == "__main__":
    sweep(__doc__.splitlines()[0], frontier.TRIALS | SETTINGS)
