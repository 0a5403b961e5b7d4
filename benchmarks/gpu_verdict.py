"""Says what the rows of ``benchmarks.gpu_report`` mean, and draws them."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

Row = dict[str, Any]
BASE = "optax.adamw"
LARGE = ("llama-1b, stacked", "float32")  # the tree and dtype that the goals are about
GOALS = (("microadam", "after", 0.8), ("microadam", "fused", 0.55))
FASTER = ("adamw8bit", "adam_mini4bit", "adamw_fp8")
SHARE = 75  # percent of the bandwidth of a copy


def verdict(rows: Mapping[str, list[Row]]) -> list[str]:
    """Returns the lines that say what None should take, and which goals are reached.

    Args:
        rows: of each part of the report.
    """
    timed = [row for row in rows["step"] if "ms" in row]
    return [*fastest(timed), *reached(timed)]


def fastest(timed: list[Row]) -> list[str]:
    """Sets the implementations of each optimizer side by side, over the programs that all have."""
    lines = []
    for name in dict.fromkeys(row["optimizer"] for row in timed):
        times: dict[str, dict[tuple[str, ...], float]] = {}
        for row in timed:
            if row["optimizer"] == name:
                program = tuple(row[key] for key in ("device", "tree", "dtype", "applied"))
                times.setdefault(row["implementation"], {})[program] = row["ms"]
        common = set.intersection(*(set(own) for own in times.values()))
        if len(times) < 2 or not common:
            continue
        sums = {which: sum(own[key] for key in common) for which, own in times.items()}
        best = min(sums, key=sums.__getitem__)
        listed = ", ".join(f"{which} {ms:.2f} ms" for which, ms in sums.items())
        what = "XLA's program" if best == "None" else f"`{best}`"
        lines.append(f"* `{name}`: None should take {what} ({len(common)} programs: {listed}).")
    return lines or ["No kernel was timed: None takes XLA's program."]


def reached(timed: list[Row]) -> list[str]:
    """Compares the times on the large tree with the goals."""
    own = [row for row in timed if (row["tree"], row["dtype"]) == LARGE]
    base = [row["ms"] for row in own if row["optimizer"] == BASE]
    if not base:
        return []
    lines = []
    for name, applied, goal in (*GOALS, *((name, None, 1.0) for name in FASTER)):
        found = [
            row for row in own if row["optimizer"] == name and applied in (None, row["applied"])
        ]
        if not found:
            continue
        row = min(found, key=lambda row: row["ms"])
        ratio, share = row["ms"] / min(base), row.get("% of copy bandwidth")
        how = f"`{name}`, {row['implementation']}, {row['applied']}"
        said = "reached" if ratio <= goal else "missed"
        line = f"* {how}: {ratio:.2f} of AdamW's time, goal {goal:g}: {said}"
        if share is not None and name == "microadam":
            said = "reached" if share >= SHARE else "missed"
            line += f"; {share} % of the bandwidth of a copy, goal {SHARE} %: {said}"
        lines.append(line + ".")
    return lines


def draw_steps(rows: list[Row], folder: pathlib.Path) -> list[str]:
    """Draws a bar for each program that was timed; returns the lines that show the picture."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if "ms" in row]
    if not timed:
        return []
    trees = list(dict.fromkeys((row["tree"], row["dtype"]) for row in timed))
    figure = Figure(figsize=(8, 0.5 + 0.25 * len(timed) + 0.5 * len(trees)), layout="constrained")
    sizes = [sum((row["tree"], row["dtype"]) == tree for row in timed) for tree in trees]
    axes = figure.subplots(len(trees), squeeze=False, height_ratios=sizes)[:, 0]
    for axis, tree in zip(axes, trees, strict=True):
        own = [row for row in timed if (row["tree"], row["dtype"]) == tree]
        labels = [f"{row['optimizer']}, {row['implementation']}, {row['applied']}" for row in own]
        axis.barh(labels, [row["ms"] for row in own], color="#0072B2")
        axis.invert_yaxis()
        axis.set_title(", ".join(tree), fontsize="medium")
    axes[-1].set_xlabel(f"milliseconds a step, {timed[0]['device']}")
    return saved(figure, folder, "gpu_step", "Milliseconds of a step of each optimizer.")


def draw_losses(rows: list[Row], folder: pathlib.Path) -> list[str]:
    """Draws the held-out loss over the bytes of the state; returns the lines that show it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    for row in rows:
        if "held_out_loss" in row:
            at = float(row["state_bytes_per_parameter"]), float(row["held_out_loss"])
            axis.plot(*at, "o", color="#D55E00")
            axis.annotate(row["optimizer"], at, xytext=(5, 5), textcoords="offset points")
    axis.set_xlabel("state, bytes for each parameter")
    axis.set_ylabel("held-out loss")
    return saved(figure, folder, "gpu_pretrain", "Held-out losses over the bytes of the state.")


def saved(figure: Any, folder: pathlib.Path, name: str, alternative: str) -> list[str]:
    """Saves a picture, and returns the Markdown that shows it."""
    figure.savefig(folder / f"{name}.svg")
    return ["", f"![{alternative}](pictures/{name}.svg)"]


PICTURES: dict[str, Callable[[list[Row], pathlib.Path], list[str]]] = {
    "step": draw_steps,
    "pretrain": draw_losses,
}
