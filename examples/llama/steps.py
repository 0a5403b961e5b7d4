"""The loop over optimizer steps: when to look, evaluate, save and stop."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import optax

from .checkpoints import Checkpoints
from .metrics import Row
from .processes import anywhere


class Schedule(Protocol):
    """The settings that the loop reads."""

    steps: int
    batch: int
    seq_len: int
    log_every: int
    eval_every: int
    save_every: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Holds the end of the loop.

    Attributes:
        params: The parameters.
        state: The optimizer's state.
        rows: One for each step that was done, also before resuming.
        finished: Whether the last step was reached.
    """

    params: Any
    state: optax.OptState
    rows: list[Row]
    finished: bool


def run_steps(
    config: Schedule,
    step_fn: Callable[..., tuple[Any, optax.OptState, jax.Array]],
    params: Any,
    state: optax.OptState,
    *,
    start: int,
    next_batch: Callable[[int], Any],
    held_out_loss: Callable[[Any], jax.Array],
    rows: Sequence[Row] = (),
    checkpoints: Checkpoints | None = None,
    observe: Callable[[list[Row]], None] = lambda rows: None,
    observe_state: Callable[[int, optax.OptState], None] = lambda step, state: None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Takes the steps that are left.

    Args:
        config: How many steps there are, and how often to do what.
        step_fn: From parameters, state and batch to new parameters, new state and the loss.
        params: The parameters, which `step_fn` may donate.
        state: The optimizer's state, likewise.
        start: Number of steps done.
        next_batch: From the number of steps done to a batch.
        held_out_loss: From parameters to the loss on what is held out.
        rows: The rows up to `start`.
        checkpoints: Where to save to.
        observe: Is shown new rows, every `log_every` steps.
        observe_state: Is then shown the step and the optimizer's state.
        stop: Is asked after each step whether to save and return; one of many processes is
            asked every `log_every` steps.

    Returns:
        Parameters, state and rows.
    """
    rows = list(rows)
    losses: list[jax.Array] = []
    clock = time.perf_counter()
    for step in range(start + 1, config.steps + 1):
        params, state, loss = step_fn(params, state, next_batch(step - 1))
        losses.append(loss)
        done = step == config.steps
        looking = done or step % config.log_every == 0
        # Processes stop together, and asking them at every step would make each wait for the rest.
        stopping = anywhere(stop()) if looking or jax.process_count() == 1 else False
        evaluating = done or step % config.eval_every == 0
        saving = done or stopping or step % config.save_every == 0
        if not (evaluating or saving or looking):
            continue
        new = _rows(config, rows, step, jax.device_get(losses), clock)
        if evaluating:
            new[-1] = dataclasses.replace(new[-1], held_out_loss=float(held_out_loss(params)))
        rows += new
        observe(new)
        observe_state(step, state)
        if saving and checkpoints:
            checkpoints.save(step, (params, state))
        if stopping and not done:
            return Outcome(params, state, rows, finished=False)
        losses, clock = [], time.perf_counter()
    return Outcome(params, state, rows, finished=True)


def _rows(
    config: Schedule, before: Sequence[Row], step: int, losses: list[float], clock: float
) -> list[Row]:
    seconds = before[-1].seconds if before else 0.0
    each = (time.perf_counter() - clock) / len(losses)
    first = step - len(losses) + 1
    return [
        Row(
            step=first + i,
            tokens=(first + i) * config.batch * config.seq_len,
            seconds=seconds + (i + 1) * each,
            loss=float(loss),
        )
        for i, loss in enumerate(losses)
    ]
