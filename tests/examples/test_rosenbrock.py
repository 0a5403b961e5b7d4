"""Error feedback straightens the path of Top-K Adam on Rosenbrock's function."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from examples.rosenbrock import CHAINS, START, STEPS, draw, rosenbrock, table, trajectory, turns


@pytest.fixture(scope="module")
def trajectories() -> dict[str, np.ndarray]:
    return {name: trajectory(tx) for name, tx in CHAINS.items()}


@pytest.mark.parametrize(
    ("name", "turn"),
    [("Adam", 0.008), ("Top-K Adam", 1.008), ("Top-K Adam with error feedback", 0.020)],
)
def test_the_mean_turn_is_that_of_an_independent_run(
    trajectories: dict[str, np.ndarray], name: str, turn: float
) -> None:
    assert turns(trajectories[name]).mean() == pytest.approx(turn, rel=0.2)


def test_error_feedback_restores_most_of_the_smoothness(
    trajectories: dict[str, np.ndarray],
) -> None:
    adam, top_k, fed_back = (turns(points).mean() for points in trajectories.values())
    assert adam < fed_back < 0.1 * top_k


def test_every_trajectory_starts_at_the_start_and_descends(
    trajectories: dict[str, np.ndarray],
) -> None:
    for points in trajectories.values():
        assert points.shape == (STEPS + 1, 2)
        assert tuple(points[0]) == START
        assert rosenbrock(points[-1]) < 0.01 * rosenbrock(points[0])


def test_turns_measures_angles() -> None:
    points = np.array([[0, 0], [1, 0], [2, 0], [2, 3], [2, 1]])
    np.testing.assert_allclose(turns(points), [0, 1, 2])


def test_rosenbrock_is_zero_at_its_minimum() -> None:
    assert rosenbrock(jnp.ones(2)) == 0


def test_the_table_and_the_figure_are_made(
    trajectories: dict[str, np.ndarray], tmp_path: Path
) -> None:
    assert all(name in table(trajectories) for name in CHAINS)
    draw(trajectories, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
