"""Accuracy of fine-tuning over learning rates and seeds, one line of a CSV file for each run.

python -m benchmarks.finetuning_sweep adamw:1e-4 microadam:3e-4 qst:2e-3 --seeds 0,1,2

Runs that are in the file already are passed over, so that a sweep can be continued or extended.
All runs of one seed see the same new weights and the same batches; with each run stands what it
answered correctly, so that `--compare` can pair them.
"""

import argparse
import collections
import csv
import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from examples.finetuning.comparison import job_of
from examples.finetuning.config import JOBS, Config
from examples.finetuning.training import train
from examples.llama import optimizers
from examples.llama.config import PretrainError

FIELDS = (
    *("run", "rate", "seed", "steps", "accuracy", "training_loss", "held_out_loss"),
    *("state_bytes", "step_bytes", "step_seconds", "correct"),
)
LAYOUTS = ("fast", "paper", "pretrain")  # of microadam


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", help="LABEL:RATE, of an optimizer or a method")
    parser.add_argument("--job", default="classification", choices=sorted(JOBS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--packages", type=Path, default=Config().packages)
    parser.add_argument("--out", type=Path, default=Path("runs/finetuning_sweep.csv"))
    parser.add_argument("--compare", metavar="LABEL", help="print means, paired with this run's")
    options = parser.parse_args()
    config = dataclasses.replace(JOBS[options.job], packages=options.packages)
    config = dataclasses.replace(config, steps=options.steps or config.steps)
    try:
        for seed in map(int, options.seeds.split(",")):
            for entry in options.runs:
                label, _, rate = entry.partition(":")
                if (label, rate, str(seed), str(config.steps)) not in _done(options.out):
                    _run(dataclasses.replace(config, seed=seed), label, rate, options.out)
    except (PretrainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.compare:
        _print(_read(options.out), options.compare)
    return 0


def _run(config: Config, label: str, rate: str, out: Path) -> None:
    method = label if label in ("lora", "qlora", "qst") else "full"
    name = "microadam" if label in LAYOUTS else label
    name = "adamw" if method != "full" else name
    settings = dataclasses.replace(
        config,
        optimizer=f"{label}={name}",
        opt=(f"{label}.layout={label}",) if label in LAYOUTS else (),
        lr=(f"{label}={rate}",),
    )
    built = optimizers.named(settings, clip=settings.clip)
    result = train(settings, job_of(config, Console()), method, built[label])
    line = (
        *(label, rate, config.seed, config.steps, result.accuracy, result.training_loss),
        *(result.held_out_loss, result.state_bytes, result.step_bytes, result.step_seconds),
        "".join("1" if c else "0" for c in result.correct),
    )
    new = not out.exists()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if new:
            writer.writerow(FIELDS)
        writer.writerow(line)
    print(*(f"{x:.4g}" if isinstance(x, float) else x for x in line[:-1]), flush=True)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _done(path: Path) -> set[tuple[str, ...]]:
    return {(line["run"], line["rate"], line["seed"], line["steps"]) for line in _read(path)}


def _print(lines: list[dict[str, str]], baseline: str) -> None:
    """The best rate of each run by its mean accuracy, and how far it is from the baseline's.

    Rates that were tried with fewer seeds than another are not compared with it.
    """
    groups = collections.defaultdict(list)
    for line in lines:
        groups[line["run"], line["steps"], line["rate"]].append(line)
    rates = collections.defaultdict(list)
    for (label, steps, _), group in groups.items():
        rates[label, steps].append(group)
    best = {run: max(tried, key=lambda g: (len(g), _mean(g))) for run, tried in rates.items()}
    of_baseline = next(run for run in best if run[0] == baseline)
    reference = {line["seed"]: line["correct"] for line in best[of_baseline]}
    print("| run | rate | seeds | accuracy | difference | state MiB | step MiB | ms |")
    print("|---|---|---|---|---|---|---|---|")
    for (label, steps), group in best.items():
        label += "" if steps == of_baseline[1] else f", {steps} steps"
        accuracies = np.array([float(line["accuracy"]) for line in group])
        pairs = [(line["correct"], reference.get(line["seed"])) for line in group]
        gaps = np.array([[int(a) - int(b) for a, b in zip(*p, strict=True)] for p in pairs if p[1]])
        # Examples and seeds are both drawn: the error is that of the examples' mean gaps, with
        # the spread over seeds inside.
        error = gaps.std() / math.sqrt(gaps.size) if gaps.size else math.nan
        examples = len(group[0]["correct"])
        own = math.sqrt(accuracies.mean() * (1 - accuracies.mean()) / examples)
        print(
            f"| {label} | {group[0]['rate']} | {len(group)} | {100 * accuracies.mean():.1f} ± "
            f"{100 * own:.1f} | {100 * gaps.mean():+.1f} ± {100 * error:.1f} | "
            f"{int(group[0]['state_bytes']) / 2**20:.2f} | "
            f"{int(group[0]['step_bytes']) / 2**20:.0f} | "
            f"{1000 * float(group[0]['step_seconds']):.0f} |"
        )


def _mean(group: list[dict[str, str]]) -> float:
    return float(np.mean([float(line["accuracy"]) for line in group]))


if __name__ == "__main__":
    sys.exit(main())
