"""Draws loss against bytes of state from the results of ``benchmarks.frontier``.

python -m benchmarks.frontier_picture
"""

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.results import ROOT, best, mean_loss, read, size_of

RESULTS = ROOT / "benchmarks" / "results" / "frontier.csv"
PICTURE = ROOT / "docs" / "pictures" / "frontier.svg"
SETTINGS = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "frontier"}


def main() -> None:
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(8, 5), layout="constrained")
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
            axes.annotate(name, (size, loss), (4, 4), textcoords="offset points", fontsize=8)
        axes.axhline(points[first][1], color="C1", alpha=0.3)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="bytes of state per parameter", ylabel="held-out loss, nats per byte")
        figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
