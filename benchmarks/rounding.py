"""Pre-trains with parameters in bfloat16, rounded in each way, beside parameters in float32.

Every run of a seed sees the same batches from the same initial weights, and computes activations
in float32, so that the parameters' format is all that differs. Results are appended to a CSV file
as they come, and a second call goes on where the first stopped.

python -m benchmarks.rounding --out rounding.csv --seeds 0 1 2
python -m benchmarks.rounding --out rounding10m.csv --seeds 0 1 2 --hidden 320 --layers 8
"""

import argparse
import dataclasses
import itertools
import statistics
from pathlib import Path

from benchmarks.sweep import append, clipped, rows
from examples.llama.config import Config
from examples.llama.data import load_corpus
from examples.llama.training import train
from microadam_jax import round_updates
from microadam_jax.optimizer_names import factory_named

SETTINGS = ("float32", "nearest", "stochastic", "compensated", "momentum")


def main() -> None:
    parser = argparse.ArgumentParser(description="Parameters in bfloat16 beside float32.")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="weights and batches")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--optimizer", default="adamw", help="of the library or of Optax")
    parser.add_argument("--rate", type=float, default=1e-3, help="the peak learning rate")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()

    config = dataclasses.replace(
        Config(),
        hidden=args.hidden,
        intermediate=args.hidden * 8 // 3,
        layers=args.layers,
        steps=args.steps,
        eval_every=args.steps,
        log_every=100,
    )
    corpus = load_corpus(config)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    losses = {(name, int(seed)): float(loss) for name, seed, _, loss in rows(args.out)}
    for seed, name in itertools.product(args.seeds, args.settings):
        if (name, seed) in losses:
            continue
        tx = clipped(factory_named(args.optimizer, {}), args.rate, args.steps)
        if name not in ("float32", "nearest"):
            tx = round_updates(tx, name, seed=seed)
        dtype = "float32" if name == "float32" else "bfloat16"
        result = train(dataclasses.replace(config, seed=seed, param_dtype=dtype), tx, corpus)
        losses[name, seed] = result.held_out_loss
        size = result.state_bytes / result.parameters
        append(args.out, [name, seed, size, result.held_out_loss])
        print(name, seed, f"{size:.2f}", result.held_out_loss, flush=True)
    print_table(losses)


def print_table(losses: dict[tuple[str, int], float]) -> None:
    """One row for each setting, as Markdown: losses, and by how much they exceed float32's."""
    print("| parameters | held-out loss of each seed | above float32, of each seed | mean |")
    print("|---|---|---|---|")
    for name in dict.fromkeys(name for name, _ in losses):
        own = {seed: loss for (n, seed), loss in losses.items() if n == name}
        pairs = [(loss, losses.get(("float32", seed))) for seed, loss in own.items()]
        gaps = [100 * (loss / full - 1) for loss, full in pairs if full is not None]
        cells = " ".join(f"{loss:.4f}" for loss in own.values())
        each = " ".join(f"{gap:+.2f} %" for gap in gaps)
        mean = f"{statistics.mean(gaps):+.2f} %" if gaps else ""
        print(f"| {name} | {cells} | {each} | {mean} |")


if __name__ == "__main__":
    main()
