"""Pre-trains the tiny model with each setting and learning rate; one table of held-out losses.

Every run sees the same batches from the same initial weights. Results are appended to a CSV file
as they come, and a second call goes on where the first stopped.
"""

import argparse
import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import optax

from examples.llama.config import Config
from examples.llama.data import load_corpus
from examples.llama.training import train

Setting = Callable[[optax.Schedule], optax.GradientTransformation]
Results = dict[tuple[str, float], tuple[float, float]]  # bytes per parameter, held-out loss


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
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--settings", nargs="*", default=list(settings), choices=list(settings))
    parser.add_argument("--rates", nargs="*", type=float, help="for each of the settings")
    args = parser.parse_args()

    config = dataclasses.replace(
        Config(), steps=args.steps, eval_every=args.steps, log_every=100, seed=args.seed
    )
    corpus = load_corpus(config)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = read(args.out)
    for name in args.settings:
        for rate in args.rates or rates[name]:
            if (name, rate) in done:
                continue
            schedule = optax.warmup_cosine_decay_schedule(
                0.0, rate, args.steps // 20, args.steps, 0.1 * rate
            )
            tx = optax.chain(optax.clip_by_global_norm(1.0), settings[name](schedule))
            result = train(config, tx, corpus)
            done[name, rate] = (result.state_bytes / result.parameters, result.held_out_loss)
            with args.out.open("a", newline="") as file:
                csv.writer(file).writerow([name, rate, *done[name, rate]])
            print(name, rate, *done[name, rate], flush=True)
    print_table(done)


def read(path: Path) -> Results:
    """The results of earlier calls."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            (name, float(rate)): (float(size), float(loss))
            for name, rate, size, loss in csv.reader(file)
        }


def print_table(results: Results) -> None:
    """One row for each setting, as Markdown: every learning rate with its loss, and the best."""
    print("| setting | bytes/param | learning rate: held-out loss | best |")
    print("|---|---|---|---|")
    for name in dict.fromkeys(name for name, _ in results):
        losses = {rate: loss for (other, rate), (_, loss) in results.items() if other == name}
        size = next(size for (other, _), (size, _) in results.items() if other == name)
        cells = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sorted(losses.items()))
        print(f"| {name} | {size:.2f} | {cells} | {min(losses.values()):.3f} |")
