"""Pre-trains the tiny model with each setting and learning rate; one table of held-out losses.

Every run sees the same batches from the same initial weights. Results are appended to a CSV file
as they come, and a second call goes on where the first stopped.
"""

import argparse
import csv
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import optax

from examples.llama.config import Config
from examples.llama.data import load_corpus
from examples.llama.training import train

Setting = Callable[[optax.Schedule], optax.GradientTransformation]
# From setting, learning rate and seed to bytes per parameter and held-out loss.
Results = dict[tuple[str, float, int], tuple[float, float]]


def sweep(
    description: str, settings: Mapping[str, Setting], rates: Mapping[str, Sequence[float]]
) -> None:
    """Reads the command line, trains what is not in the CSV file yet, and prints the table.

    Args:
        description: the first line of ``--help``.
        settings: makes each optimizer from its learning rate schedule.
        rates: the learning rates to try with each setting, unless the command line names some.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="the CSV file")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument(
        "--seeds", nargs="*", type=int, default=[0], help="of the weights and the batches"
    )
    parser.add_argument("--settings", nargs="*", default=list(settings), choices=list(settings))
    parser.add_argument("--rates", nargs="*", type=float, help="for each of the settings")
    args = parser.parse_args()

    config = dataclasses.replace(Config(), steps=args.steps, eval_every=args.steps, log_every=100)
    corpus = load_corpus(config)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = read(args.out)
    for seed, name in itertools.product(args.seeds, args.settings):
        for rate in args.rates or rates[name]:
            if (name, rate, seed) in done:
                continue
            tx = clipped(settings[name], rate, args.steps)
            result = train(dataclasses.replace(config, seed=seed), tx, corpus)
            numbers = (result.state_bytes / result.parameters, result.held_out_loss)
            done[name, rate, seed] = numbers
            append(args.out, [name, rate, seed, *numbers])
            print(name, rate, seed, *numbers, flush=True)
    print_table(done)


def read(path: Path) -> Results:
    """The results of earlier calls."""
    return {
        (name, float(rate), int(seed)): (float(size), float(loss))
        for name, rate, seed, size, loss in rows(path)
    }


def clipped(setting: Setting, rate: float, steps: int) -> optax.GradientTransformation:
    """Clips gradients, warms the learning rate up, and lets it fall to a tenth."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps, 0.1 * rate)
    return optax.chain(optax.clip_by_global_norm(1.0), setting(schedule))


def rows(path: Path) -> list[list[str]]:
    """Reads the rows that earlier calls wrote, if there were any."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.reader(file))


def append(path: Path, row: Sequence[object]) -> None:
    """Writes one more row."""
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(row)


def print_table(results: Results) -> None:
    """One row for each setting, as Markdown: the losses by learning rate, and the best mean."""
    print("| setting | bytes/param | learning rate: held-out loss of each seed | best mean |")
    print("|---|---|---|---|")
    for name in dict.fromkeys(name for name, _, _ in results):
        runs = {(rate, seed): run for (n, rate, seed), run in results.items() if n == name}
        by_rate: dict[float, list[float]] = {}
        for (rate, _), (_, loss) in sorted(runs.items()):
            by_rate.setdefault(rate, []).append(loss)
        size = next(size for size, _ in runs.values())
        cells = [
            f"{rate:g}: {' '.join(f'{loss:.3f}' for loss in losses)}"
            for rate, losses in by_rate.items()
        ]
        # Rates that were tried with fewer seeds are no match for a mean.
        most = max(map(len, by_rate.values()))
        best = min(statistics.mean(x) for x in by_rate.values() if len(x) == most)
        print(f"| {name} | {size:.2f} | {', '.join(cells)} | {best:.3f} |")
