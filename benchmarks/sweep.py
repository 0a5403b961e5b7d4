"""Pre-trains a model with each setting and learning rate; one table of held-out losses.

Every run sees the same batches from the same initial weights. Results are appended to a CSV file
as they come, and a second call goes on where the first stopped.
"""

import argparse
import csv
import dataclasses
import functools
import itertools
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import optax

from benchmarks import results
from benchmarks.results import ROOT, Run
from examples.llama.config import Config
from examples.llama.data import load_corpus
from examples.llama.training import train

Setting = Callable[[optax.Schedule], optax.GradientTransformation]
MODELS = {
    "tiny": {},
    "10m": {"hidden": 320, "intermediate": 864, "layers": 8, "heads": 5},
}


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
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument(
        "--seeds", nargs="*", type=int, default=[0], help="of the weights and the batches"
    )
    parser.add_argument("--settings", nargs="*", default=list(settings), choices=list(settings))
    parser.add_argument("--rates", nargs="*", type=float, help="for each of the settings")
    args = parser.parse_args()

    config = dataclasses.replace(
        Config(), steps=args.steps, eval_every=args.steps, log_every=100, **MODELS[args.model]
    )
    corpus = load_corpus(config)
    done = {(r.setting, r.rate, r.seed, r.model, r.steps) for r in results.read(args.out)}
    code = commit()
    for seed, name in itertools.product(args.seeds, args.settings):
        for rate in args.rates or rates[name]:
            if (name, rate, seed, args.model, args.steps) in done:
                continue
            tx = clipped(settings[name], rate, args.steps)
            result = train(dataclasses.replace(config, seed=seed), tx, corpus)
            size = result.state_bytes / result.parameters
            loss = result.held_out_loss
            run = Run(name, rate, seed, args.model, args.steps, size, loss, jax.__version__, code)
            results.append(args.out, run)
            print(*run, flush=True)
    print("\n".join(results.table(results.read(args.out))))


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


def commit() -> str:
    """Names the commit that is checked out, with a plus sign if files were changed."""
    git = functools.partial(subprocess.run, capture_output=True, text=True, cwd=ROOT, check=True)
    try:
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout
        return git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
