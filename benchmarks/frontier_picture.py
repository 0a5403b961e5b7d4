"""Draws loss against bytes of state from the results of ``benchmarks.frontier``.

python -m benchmarks.frontier_picture
"""

import argparse

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from benchmarks.results import ROOT, best, mean_loss, read, size_of

RESULTS = ROOT / "benchmarks" / "results" / "frontier.csv"
PICTURE = ROOT / "docs" / "pictures" / "frontier.svg"
# Where a name may stand beside its point: right or left of it, higher or lower.
PLACES = [(x, y) for y in (4, -11, 14, -21, 24, -31, 34, -41) for x in (5, -5)]
SETTINGS = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "frontier"}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(8, 7), layout="constrained")
        axes = figure.subplots()
        chosen = best(read(RESULTS))
        points = {name: (size_of(r), mean_loss(r)) for name, r in chosen.items()}
        first = next(iter(points))
        lowest = float("inf")
        frontier = []
        for _, (size, loss) in sorted(points.items(), key=lambda item: item[1]):
            if loss < lowest:
                frontier.append((size, loss))
                lowest = loss
        axes.step(*zip(*frontier, strict=True), where="post", color="0.8", zorder=0)
        for name, (size, loss) in points.items():
            axes.plot(size, loss, "o", color="C1" if name == first else "C0")
        axes.axhline(points[first][1], color="C1", alpha=0.3)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="bytes of state per parameter", ylabel="held-out loss, nats per byte")
        figure.draw_without_rendering()  # gives points their place
        write_names(axes, points)
        figure.savefig(PICTURE, metadata={"Date": None})


def write_names(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Writes each name where it covers no point and no other name."""
    inside = axes.get_window_extent()
    centres = [axes.transData.transform(point) for point in points.values()]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in centres]
    for name, point in points.items():
        for x, y in PLACES:
            side = "left" if x > 0 else "right"
            text = axes.annotate(
                name, point, (x, y), textcoords="offset points", fontsize=8, ha=side
            )
            box = text.get_window_extent()
            if (
                inside.xmin <= box.xmin
                and box.xmax <= inside.xmax
                and not box.count_overlaps(taken)
            ):
                break
            text.remove()
        else:
            raise ValueError(f"No place is left for the name {name}. Give PLACES more.")
        taken.append(box)


if __name__ == "__main__":
    main()
