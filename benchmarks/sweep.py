"""Pre-trains a model with each setting and learning rate; one table of held-out losses.

Every run sees the same batches from the same initial weights. Results are appended to a CSV file
as they come, and a second call goes on where the first stopped.
"""

import argparse
import dataclasses
import functools
import itertools
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import optax

from benchmarks import results
from benchmarks.results import ROOT, Run
from examples.llama.config import Config
from examples.llama.data import load_corpus
from examples.llama.optimizers import with_faster_embeddings
from examples.llama.training import train

Setting = Callable[[optax.Schedule], optax.GradientTransformation]
MODELS = {
    "tiny": {},
    "10m": {"hidden": 320, "intermediate": 864, "layers": 8, "heads": 5},
    "words": {"tokenizer": "bpe", "vocab_size": 8192},
}


class Trial(NamedTuple):
    """Describes what one row of a table trains with.

    Attributes:
        setting: makes the optimizer from its learning rate schedule.
        rates: the learning rates to try, unless the command line names some.
        config: what differs from the job of the others.
        around: wraps the optimizer with its clip.
        others: the rate of embeddings and norms at its highest; None for that of all.
    """

    setting: Setting
    rates: Sequence[float]
    config: Mapping[str, Any] = MappingProxyType({})
    around: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda tx: tx
    others: float | None = None


def sweep(description: str, trials: Mapping[str, Trial]) -> None:
    """Reads the command line, trains what is not in the CSV file yet, and prints the table.

    Args:
        description: the first line of ``--help``.
        trials: by name; the first is what the others are compared with.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="the CSV file")
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument(
        "--seeds", nargs="*", type=int, default=[0], help="of the weights and the batches"
    )
    parser.add_argument("--settings", nargs="*", default=list(trials), choices=list(trials))
    parser.add_argument("--rates", nargs="*", type=float, help="for each of the settings")
    args = parser.parse_args()

    config = dataclasses.replace(
        Config(), steps=args.steps, eval_every=args.steps, log_every=100, **MODELS[args.model]
    )
    corpus = load_corpus(config)
    done = {(r.setting, r.rate, r.seed, r.model, r.steps) for r in results.read(args.out)}
    code = commit()
    for seed, name in itertools.product(args.seeds, args.settings):
        trial = trials[name]
        for rate in args.rates or trial.rates:
            if (name, rate, seed, args.model, args.steps) in done:
                continue
            tx = trial.around(clipped(trial, rate, args.steps))
            own = dataclasses.replace(config, seed=seed, **trial.config)
            result = train(own, tx, corpus)
            size = result.state_bytes / result.parameters
            loss = result.held_out_loss
            run = Run(name, rate, seed, args.model, args.steps, size, loss, jax.__version__, code)
            results.append(args.out, run)
            print(*run, flush=True)
    print("\n".join(results.table(results.read(args.out))))


def clipped(trial: Trial, rate: float, steps: int) -> optax.GradientTransformation:
    """Clips gradients, warms the learning rate up, and lets it fall to a tenth."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps, 0.1 * rate)
    tx = trial.setting(schedule)
    if trial.others is not None:
        tx = with_faster_embeddings(tx, trial.others / rate)
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


def commit() -> str:
    """Names the commit that is checked out, with a plus sign if files were changed."""
    git = functools.partial(subprocess.run, capture_output=True, text=True, cwd=ROOT, check=True)
    try:
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout
        return git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
