"""Pre-trains a model whose layers keep their activations in 8 bits.

python -m benchmarks.activations --out runs/activations.csv --seeds 0 1 2

Every run sees the same batches from the same initial weights. Results are appended to a CSV file
as they come, and a second call goes on where the first stopped.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import time
from pathlib import Path

import optax

from benchmarks.sweep import MODELS, append, clipped, rows
from examples.llama.config import Config
from examples.llama.data import load_corpus
from examples.llama.training import train
from microadam_jax import adamw_fp8

RATE = 1e-3
OPTIMIZERS = {"adamw": optax.adamw, "adamw_fp8": adamw_fp8}
# How the layers keep activations, and the optimizer. The last is all of COAT.
SETTINGS = [("exact", "adamw"), ("fp8", "adamw"), ("coat", "adamw"), ("coat", "adamw_fp8")]

Results = dict[tuple[str, str, int], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the CSV file")
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    args = parser.parse_args()

    base = dataclasses.replace(
        Config(), steps=args.steps, eval_every=args.steps, log_every=100, **MODELS[args.model]
    )
    corpus = load_corpus(base)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = read(args.out)
    for seed, (activations, name) in itertools.product(args.seeds, SETTINGS):
        if (activations, name, seed) in done:
            continue
        setting = functools.partial(OPTIMIZERS[name], weight_decay=0.0)
        tx = clipped(setting, RATE, args.steps)
        start = time.perf_counter()
        config = dataclasses.replace(base, seed=seed, activations=activations)
        loss = train(config, tx, corpus).held_out_loss
        done[activations, name, seed] = loss
        append(args.out, [activations, name, seed, loss])
        print(activations, name, seed, loss, f"{time.perf_counter() - start:.0f} s", flush=True)
    print_table(done)


def read(path: Path) -> Results:
    """The results of earlier calls."""
    return {
        (activations, name, int(seed)): float(loss) for activations, name, seed, loss in rows(path)
    }


def print_table(results: Results) -> None:
    """One row for each setting, as Markdown, beside exact activations of the same seeds."""
    print("| activations | optimizer | held-out loss of each seed | mean | beside exact |")
    print("|---|---|---|---|---|")
    for activations, name in dict.fromkeys(key[:2] for key in results):
        seeds = [seed for a, n, seed in results if (a, n) == (activations, name)]
        losses = [results[activations, name, seed] for seed in seeds]
        mean = statistics.mean(losses)
        exact = statistics.mean(results["exact", "adamw", seed] for seed in seeds)
        each = " ".join(f"{loss:.3f}" for loss in losses)
        print(
            f"| {activations} | {name} | {each} | {mean:.3f} | {100 * (mean / exact - 1):+.2f} % |"
        )


if __name__ == "__main__":
    main()
