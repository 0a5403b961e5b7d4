"""Fine-tuning in one way: from pretrained weights or a checkpoint to the measured accuracy."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax import state_shardings
from microadam_jax.layers import saved_bytes

from ..llama.checkpoints import Checkpoints
from ..llama.config import PretrainError, naming
from ..llama.metrics import Row
from ..llama.partitioning import make_mesh
from ..llama.steps import run_steps
from ..llama.training import Result, bytes_of, placed, size_of
from .config import Config
from .jobs import Batch, Job
from .methods import Params, prepare


@dataclasses.dataclass(frozen=True)
class Finetuned(Result):
    """Holds the result of one run; `parameters` are those that were trained.

    Attributes:
        weight_bytes: Bytes of all weights, trained or not.
        gradient_bytes: Bytes of the gradient.
        saved_bytes: Bytes of what the forward pass keeps for the backward pass.
        correct: Whether each held-out example was answered correctly; empty if not finished.
    """

    weight_bytes: int = 0
    gradient_bytes: int = 0
    saved_bytes: int = 0
    correct: tuple[bool, ...] = ()

    @property
    def step_bytes(self) -> int:
        """Bytes of everything that a step keeps: weights, gradient, state, saved activations."""
        return self.weight_bytes + self.gradient_bytes + self.state_bytes + self.saved_bytes

    @property
    def training_loss(self) -> float:
        """Mean over the last tenth of the steps; NaN before there is one."""
        if not self.rows:
            return math.nan
        last = [row.loss for row in self.rows][-max(1, len(self.rows) // 10) :]
        return sum(last) / len(last)

    @property
    def accuracy(self) -> float:
        """Share of the held-out examples that were answered correctly."""
        return float(np.mean(self.correct)) if self.correct else math.nan

    @property
    def standard_error(self) -> float:
        """Of the accuracy, for examples drawn at random."""
        p = self.accuracy
        return math.sqrt(p * (1 - p) / max(1, len(self.correct)))


def require_fit(
    config: Config, job: Job, chosen: Mapping[str, optax.GradientTransformation]
) -> None:
    """Refuses a mesh, a model or an optimizer that does not fit, from shapes alone.

    Args:
        config: The settings of all runs.
        job: The job.
        chosen: The optimizer of each run, by the run's label.

    Raises:
        PretrainError: If one of them does not; it names the run.
    """

    @functools.cache  # a method reads and converts all weights
    def trained(method: str) -> Params:
        return jax.eval_shape(lambda: prepare(job, method, config)[1])

    for label, method in config.runs().items():
        with naming(label):
            _mesh_of(config)
            try:
                jax.eval_shape(chosen[label].init, trained(method))
            except ValueError as error:
                raise PretrainError(str(error)) from error


def train(
    config: Config,
    job: Job,
    method: str,
    optimizer: optax.GradientTransformation,
    *,
    folder: Path | None = None,
    checkpoints: Checkpoints | None = None,
    rows: Sequence[Row] = (),
    observe: Callable[[list[Row]], None] = lambda rows: None,
    stop: Callable[[], bool] = lambda: False,
) -> Finetuned:
    """Fine-tunes the model of a job.

    Args:
        config: Batches, number of steps and mesh.
        job: Model and examples.
        method: What is trained.
        optimizer: Any Optax transformation.
        folder: Where `held_out.json` keeps what was answered correctly.
        checkpoints: Where to continue from and to save to.
        rows: The rows up to the latest checkpoint.
        observe: Is shown new rows, every `log_every` steps.
        stop: Is asked after each step whether to save and return.

    Returns:
        Losses, times, sizes and accuracy.

    Raises:
        PretrainError: If the mesh does not fit, or the checkpoint is of another configuration.
    """
    mesh = _mesh_of(config)
    graph, params, frozen = prepare(job, method, config)
    shardings, frozen_shardings = _shardings(params, mesh), _shardings(frozen, mesh)
    params = jax.device_put(params, shardings)
    frozen = jax.device_put(frozen, frozen_shardings)
    shapes = jax.eval_shape(lambda tree: tree, params)
    state_shapes = jax.eval_shape(optimizer.init, shapes)
    where = (shardings, state_shardings(optimizer, shapes, shardings))
    batches = NamedSharding(mesh, P(("data", "fsdp")))

    def next_batch(step: int) -> Batch:
        return jax.device_put(job.batch(step), batches)

    def loss(params: Params, frozen: Params, batch: Batch) -> jax.Array:
        return job.loss(nnx.merge(graph, params, frozen), batch)

    result = Finetuned(
        rows=list(rows),
        parameters=size_of(params),
        state_bytes=bytes_of(state_shapes),
        finished=True,
        weight_bytes=bytes_of((params, frozen)),
        gradient_bytes=bytes_of(params),
        saved_bytes=_saved(loss, params, frozen, job.batch(0)),
    )

    start = checkpoints.latest_step if checkpoints else 0
    if checkpoints and start:
        params, state = checkpoints.restore(placed((shapes, state_shapes), where))
    else:
        state = jax.jit(optimizer.init, out_shardings=where[1])(params)
    if start == config.steps and folder and (correct := _answers(folder / "held_out.json")):
        return dataclasses.replace(result, correct=correct)

    optimizer = optax.with_extra_args_support(optimizer)

    def step(
        params: Params, state: optax.OptState, frozen: Params, batch: Batch
    ) -> tuple[Params, optax.OptState, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, frozen, batch)
        updates, state = optimizer.update(gradient, state, params, value=value)
        return optax.apply_updates(params, updates), state, value

    step_fn = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*where, NamedSharding(mesh, P())))
    # Compiled ahead, so that no step's time contains it.
    compiled = step_fn.lower(params, state, frozen, next_batch(start)).compile()
    held_out = jax.device_put(job.held_out_batches(), NamedSharding(mesh, P()))

    @jax.jit
    def held_out_loss(params: Params, frozen: Params, held_out: Batch) -> jax.Array:
        return jax.lax.map(lambda batch: loss(params, frozen, batch), held_out).mean()

    outcome = run_steps(
        config,
        lambda params, state, batch: compiled(params, state, frozen, batch),
        params,
        state,
        start=start,
        next_batch=next_batch,
        held_out_loss=lambda params: held_out_loss(params, frozen, held_out),
        rows=rows,
        checkpoints=checkpoints,
        observe=observe,
        stop=stop,
    )
    result = dataclasses.replace(result, rows=outcome.rows, finished=outcome.finished)
    if not outcome.finished:
        return result
    correct = job.correct(lambda both: nnx.merge(graph, *both), (outcome.params, frozen))
    if folder:
        text = json.dumps("".join("1" if c else "0" for c in correct))
        (folder / "held_out.json").write_text(text)
    return dataclasses.replace(result, correct=tuple(correct))


def _mesh_of(config: Config) -> Mesh:
    mesh = make_mesh(config.mesh)
    rows_over = mesh.shape["data"] * mesh.shape["fsdp"]
    if mesh.shape["tensor"] > 1 or config.batch % rows_over:
        raise PretrainError(
            f"--mesh {config.mesh} must have the axes data and fsdp only, and their product "
            f"{rows_over} divide --batch {config.batch}."
        )
    return mesh


def _answers(path: Path) -> tuple[bool, ...]:
    """Reads what was answered correctly; nothing if that is to be measured again."""
    try:
        return tuple(c == "1" for c in json.loads(path.read_text()))
    except (OSError, TypeError, ValueError):
        return ()


def _saved(loss: Callable[..., jax.Array], params: Params, frozen: Params, batch: Batch) -> int:
    # Frozen weights are no arguments here: nothing is kept for gradients that nobody asks for.
    def of_trained(params: Params, batch: Batch) -> jax.Array:
        return loss(params, frozen, batch)

    return saved_bytes(of_trained, params, batch, after=of_trained).totals[0]


def _shardings(tree: Any, mesh: Mesh) -> Any:
    """Cuts each array along its longest axis that fsdp divides; whole on every device if none."""
    size = mesh.shape["fsdp"]

    def cut(leaf: jax.Array) -> NamedSharding:
        axes = [axis for axis in range(leaf.ndim) if size > 1 and leaf.shape[axis] % size == 0]
        if not axes:
            return NamedSharding(mesh, P())
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*("fsdp" if a == longest else None for a in range(leaf.ndim))))

    return jax.tree.map(cut, tree)
