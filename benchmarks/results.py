"""Losses of pre-training runs, in CSV files of the repository, and the tables made of them.

python -m benchmarks.results    # writes each table into the page that has its place

The mark of a place is ``table of`` and the file; pages whose table is another than that of its file
are not built.
"""

import argparse
import csv
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.places import filled

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"<!-- (table of (\S+)) -->")


class Run(NamedTuple):
    """Records one run.

    Attributes:
        setting: the optimizer and what is special about it.
        rate: the peak learning rate.
        seed: of the weights and the batches.
        model: of ``benchmarks.sweep``.
        steps: of the optimizer.
        size: bytes of state per parameter.
        loss: on the held-out text after the last step, nats per token.
        jax: the version.
        commit: of this repository, with a plus sign if files were changed.
    """

    setting: str
    rate: float
    seed: int
    model: str
    steps: int
    size: float
    loss: float
    jax: str
    commit: str


def read(path: Path) -> list[Run]:
    """Reads the runs of earlier calls, if there were any."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        fields = Run.__annotations__
        return [
            Run(**{name: fields[name](text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def append(path: Path, run: Run) -> None:
    """Adds a run to a file, which is made with a header if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(Run._fields)
        writer.writerow(run)


def best(runs: Iterable[Run]) -> dict[str, dict[int, Run]]:
    """Returns the runs of each setting at its best learning rate, by seed.

    Rates that were tried with fewer seeds than another are not compared with it.
    """
    grouped: dict[str, dict[float, dict[int, Run]]] = {}
    for run in runs:
        grouped.setdefault(run.setting, {}).setdefault(run.rate, {})[run.seed] = run
    chosen = {}
    for setting, by_rate in grouped.items():
        most = max(map(len, by_rate.values()))
        full = [by_seed for by_seed in by_rate.values() if len(by_seed) == most]
        chosen[setting] = min(full, key=mean_loss)
    return chosen


def difference(runs: dict[int, Run], baseline: dict[int, Run]) -> tuple[float, float]:
    """Returns the mean difference of the losses of equal seeds, and its standard error.

    NaN where there are no such seeds, or too few for an error.
    """
    gaps = [run.loss - baseline[seed].loss for seed, run in runs.items() if seed in baseline]
    mean = statistics.mean(gaps) if gaps else math.nan
    return mean, statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan


def table(runs: Sequence[Run]) -> list[str]:
    """Returns a Markdown table of the best rates, largest state first, beside the first setting."""
    chosen = best(runs)
    first = next(iter(chosen), "")
    lines = [
        (
            "| setting | bytes per parameter | learning rate | seeds | held-out loss | beside "
            f"{first} |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for setting in sorted(chosen, key=lambda name: -size_of(chosen[name])):
        by_seed = chosen[setting]
        gap, error = difference(by_seed, chosen.get(first, {}))
        cell = "" if setting == first or math.isnan(gap) else f"{gap:+.3f}"
        if cell and not math.isnan(error):
            cell += f" ± {error:.3f}"
        rate = next(iter(by_seed.values())).rate
        lines.append(
            f"| {setting} | {size_of(by_seed):.2f} | {rate:g} | {len(by_seed)} "
            f"| {mean_loss(by_seed):.3f} | {cell} |"
        )
    return lines


def renewed(markdown: str) -> str:
    """Returns a page with the tables that its files give."""
    for mark, file in MARK.findall(markdown):
        markdown = filled(markdown, mark, table(read(ROOT / file)))
    return markdown


def mean_loss(runs: dict[int, Run]) -> float:
    """Returns the mean over seeds of one setting."""
    return statistics.mean(run.loss for run in runs.values())


def size_of(runs: dict[int, Run]) -> float:
    """Returns the bytes of state per parameter of one setting."""
    return next(iter(runs.values())).size


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for page in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md"):
        before = page.read_text()
        if (after := renewed(before)) != before:
            page.write_text(after)
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
