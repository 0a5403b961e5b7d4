"""Which settings of MicroAdam pre-train best at 0.9 bytes of state per parameter or less?

Trains the tiny model of ``examples/pretrain_llama.py`` once for each setting and learning rate,
on the same batches from the same initial weights, and prints the held-out losses as one table.
Results are appended to a CSV file as they come; a second call goes on where the first stopped.

    python -m benchmarks.microadam_settings --out runs/microadam_settings.csv
"""

import argparse
import csv
import dataclasses
from pathlib import Path

import optax

from examples.llama.config import Config
from examples.llama.data import load_corpus
from examples.llama.training import train
from microadam_jax import (
    MicroAdamLayout,
    Window,
    affine4,
    error_feedback,
    microadam,
    to_dense,
    top_k,
)

RATES = (1e-3, 2e-3, 4e-3)


def layout(k: int, window: int | Window, **residual: str) -> MicroAdamLayout:
    """``k`` of 256 elements, a window of that many rows, 4-bit buckets of 256."""
    window = Window(window) if isinstance(window, int) else window
    return MicroAdamLayout(top_k(density=k / 256), affine4(**residual), window)


def sign_of_top_k(rate: optax.Schedule, k: int) -> optax.GradientTransformation:
    """Error feedback and the sign: what a window of one comes to, without keeping it."""
    return optax.chain(
        error_feedback(top_k(density=k / 256)),
        to_dense(),
        optax.scale_by_sign(),
        optax.scale_by_learning_rate(rate),
    )


EXACT = dataclasses.replace(layout(10, 3), residual="float32")
NORMALIZED = layout(10, Window(3, normalized=True))

SETTINGS = {
    "AdamW": lambda rate: optax.adamw(rate, weight_decay=0.0),
    "paper": lambda rate: microadam(rate, layout="paper"),
    "k = 3, window 10": lambda rate: microadam(rate, layout=layout(3, 10)),
    "k = 6, window 5": lambda rate: microadam(rate, layout=layout(6, 5)),
    "k = 10, window 3": lambda rate: microadam(rate, layout=layout(10, 3)),
    "k = 15, window 2": lambda rate: microadam(rate, layout=layout(15, 2)),
    "k = 30, window 1": lambda rate: microadam(rate, layout=layout(30, 1)),
    "sign of k = 30": lambda rate: sign_of_top_k(rate, 30),
    "sign of k = 64": lambda rate: sign_of_top_k(rate, 64),
    "k = 10, window 3, float32 residual": lambda rate: microadam(rate, layout=EXACT),
    "k = 10, window 3, stochastic rounding": lambda rate: microadam(
        rate, layout=layout(10, 3, rounding="stochastic")
    ),
    "k = 10, window 3, normalized": lambda rate: microadam(rate, layout=NORMALIZED),
    "k = 10, window 3, alpha = 0.1": lambda rate: microadam(rate, alpha=0.1, layout=layout(10, 3)),
    "k = 10, window 3, b2 = 0.99": lambda rate: microadam(rate, b2=0.99, layout=layout(10, 3)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/microadam_settings.csv"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    args = parser.parse_args()

    config = dataclasses.replace(Config(), steps=args.steps, eval_every=args.steps, log_every=100)
    corpus = load_corpus(config)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = read(args.out)
    for name in args.settings:
        for rate in args.rates:
            if (name, rate) in done:
                continue
            schedule = optax.warmup_cosine_decay_schedule(
                0.0, rate, args.steps // 20, args.steps, 0.1 * rate
            )
            tx = optax.chain(optax.clip_by_global_norm(1.0), SETTINGS[name](schedule))
            result = train(config, tx, corpus)
            done[name, rate] = (result.state_bytes / result.parameters, result.held_out_loss)
            with args.out.open("a", newline="") as file:
                csv.writer(file).writerow([name, rate, *done[name, rate]])
            print(name, rate, *done[name, rate], flush=True)
    print_table(done)


def read(path: Path) -> dict[tuple[str, float], tuple[float, float]]:
    """The results of earlier calls: bytes per parameter and held-out loss."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            (name, float(rate)): (float(size), float(loss))
            for name, rate, size, loss in csv.reader(file)
        }


def print_table(results: dict[tuple[str, float], tuple[float, float]]) -> None:
    """One row for each setting, as Markdown, best learning rate in the last column."""
    rates = sorted({rate for _, rate in results})
    print("| setting | bytes/param |", *(f"{rate:g} |" for rate in rates), "best |")
    print("|---|---|", *("---|" for _ in rates), "---|")
    for name in dict.fromkeys(name for name, _ in results):
        losses = {rate: results[name, rate][1] for rate in rates if (name, rate) in results}
        size = next(size for (other, _), (size, _) in results.items() if other == name)
        cells = [f"{losses[rate]:.3f} |" if rate in losses else "- |" for rate in rates]
        print(f"| {name} | {size:.2f} |", *cells, f"{min(losses.values()):.3f} |")


if __name__ == "__main__":
    main()
