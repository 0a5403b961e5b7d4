"""What error feedback repairs, on two parameters: Figure 1 of the MicroAdam paper.

Adam walks along Rosenbrock's valley in a smooth curve. Shown only the larger of the two gradient
coordinates at each step, it zigzags about the valley's floor. Error feedback adds what was withheld
to the next gradient, and the curve is smooth again. Each of the three is a chain of links from
``microadam_jax`` and Optax.

The learning rate and the number of steps are ours, chosen to show the effect. The last value is
not the point: Top-K alone ends as low as Adam here, only not along a smooth curve.

Run it from the root of the repository; it takes seconds on a CPU::

    python examples/rosenbrock.py --figure rosenbrock.png
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from microadam_jax import compress, error_feedback, to_dense, top_k

START = (-0.5, 1.0)
STEPS = 500
LEARNING_RATE = 0.1

# The parameter is tiny, so the thresholds that would keep it dense are switched off.
ONE_OF_TWO = top_k(count=1, min_size=0, min_row=0)

CHAINS = {
    "Adam": optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(LEARNING_RATE)),
    "Top-K Adam": optax.chain(
        compress(ONE_OF_TWO),
        to_dense(),
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(LEARNING_RATE),
    ),
    "Top-K Adam with error feedback": optax.chain(
        error_feedback(ONE_OF_TWO, residual="float32"),
        to_dense(),
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(LEARNING_RATE),
    ),
}

# Okabe and Ito's palette, which stays distinct under the common colour blindnesses.
COLORS = dict(zip(CHAINS, ("#56B4E9", "#D55E00", "#000000"), strict=True))
# Adam's line lies below and is wide, so that it shows where another follows it.
WIDTHS = dict(zip(CHAINS, (4.0, 1.2, 1.2), strict=True))


def rosenbrock(point: jax.Array) -> jax.Array:
    """A curved valley along y = x^2 that falls gently towards its minimum, 0 at (1, 1)."""
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def trajectory(tx: optax.GradientTransformation, steps: int = STEPS) -> np.ndarray:
    """The points that ``tx`` visits, ``(steps + 1, 2)``, from the start on."""
    start = jnp.array(START)

    def step(
        carry: tuple[jax.Array, optax.OptState], _: None
    ) -> tuple[tuple[jax.Array, optax.OptState], jax.Array]:
        point, state = carry
        updates, state = tx.update(jax.grad(rosenbrock)(point), state, point)
        point = optax.apply_updates(point, updates)
        return (point, state), point

    _, visited = jax.lax.scan(step, (start, tx.init(start)), length=steps)
    return np.concatenate([start[None], visited]).astype(np.float64)


def turns(points: np.ndarray) -> np.ndarray:
    """1 - cos of the angle between consecutive steps: 0 straight on, 1 square, 2 back."""
    steps = np.diff(points, axis=0)
    directions = steps / np.linalg.norm(steps, axis=1, keepdims=True)
    return 1 - np.sum(directions[1:] * directions[:-1], axis=1)


def table(trajectories: dict[str, np.ndarray]) -> str:
    """One line for each chain: how much it turns, and where it ends."""
    lines = [f"{'':32}{'mean 1 - cos':>14}{'last point':>20}{'last value':>12}"]
    for name, points in trajectories.items():
        (x, y), value = points[-1], rosenbrock(points[-1])
        last = f"({x:.3f}, {y:.3f})"
        lines.append(f"{name:32}{turns(points).mean():>14.4f}{last:>20}{value:>12.4f}")
    return "\n".join(lines)


def draw_valley(axes: Axes, trajectories: dict[str, np.ndarray]) -> None:
    """The trajectories on the contours of the function, and a close look at the valley's floor."""
    closeup = axes.inset_axes(
        (0.38, 0.47, 0.38, 0.5), xlim=(0.60, 0.70), ylim=(0.37, 0.49), xticks=[], yticks=[]
    )
    x, y = np.meshgrid(np.linspace(-1.15, 1.15, 300), np.linspace(-0.3, 1.2, 300))
    height = np.log10(rosenbrock(np.stack([x, y])))
    for panel in (axes, closeup):
        panel.contour(
            x, y, height, levels=np.arange(-2, 3, 0.5), colors="0.8", linewidths=0.7, linestyles="-"
        )
        for name, points in trajectories.items():
            panel.plot(*points.T, color=COLORS[name], linewidth=WIDTHS[name], label=name)
    closeup.spines[:].set_visible(True)
    axes.indicate_inset_zoom(closeup, edgecolor="0.3")
    for label, point in {"start": START, "minimum": (1.0, 1.0)}.items():
        axes.plot(*point, "ko", markersize=5)
        axes.annotate(label, point, xytext=(5, 7), textcoords="offset points", ha="right")
    axes.set(xlabel="x", ylabel="y", title=f"{STEPS} steps in Rosenbrock's valley")


def draw_turns(axes: Axes, trajectories: dict[str, np.ndarray], window: int = 25) -> None:
    """How much each trajectory turns, as a moving average over ``window`` turns."""
    for name, points in trajectories.items():
        turn = turns(points)
        smooth = np.convolve(turn, np.full(window, 1 / window), mode="valid")
        steps = np.arange(len(smooth)) + 2 + window // 2
        label = f"{name}: {turn.mean():.3f} on average"
        axes.semilogy(steps, smooth, color=COLORS[name], linewidth=WIDTHS[name], label=label)
    axes.set(
        xlabel="step",
        ylabel=f"1 - cos(turn), moving average of {window}",
        title="Turn between consecutive steps",
        xlim=(0, STEPS),
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower left", frameon=False)


def draw(trajectories: dict[str, np.ndarray], path: Path) -> None:
    """Writes the two panels to ``path``."""
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        valley, turn = figure.subplots(1, 2)
        draw_valley(valley, trajectories)
        draw_turns(turn, trajectories)
        figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, default=Path("rosenbrock.png"))
    arguments = parser.parse_args()

    trajectories = {name: trajectory(tx) for name, tx in CHAINS.items()}
    print(table(trajectories))
    draw(trajectories, arguments.figure)
    print(f"Wrote {arguments.figure}.")


if __name__ == "__main__":
    main()
