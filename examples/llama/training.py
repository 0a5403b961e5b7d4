"""The training loop: one optimizer, from initial weights or a checkpoint to the last step."""

import dataclasses
import functools
import math
import os
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax.layers import UpdateInBackward, update_in_backward

from .checkpoints import Checkpoints
from .config import Config, PretrainError
from .data import Corpus
from .metrics import Row
from .model import Llama, Params, graph_of, init_params, pieces_of
from .partitioning import place
from .steps import run_steps


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of training with one optimizer.

    Attributes:
        rows: One for each step that was done, also before resuming.
        parameters: Number of parameters.
        state_bytes: Bytes of the optimizer's state, over all devices but without replicas.
        finished: Whether the last step was reached.
    """

    rows: list[Row]
    parameters: int
    state_bytes: int
    finished: bool

    @property
    def held_out_loss(self) -> float:
        """The latest loss on the held-out text, nats per token; NaN before there is one."""
        losses = [row.held_out_loss for row in self.rows if row.held_out_loss is not None]
        return losses[-1] if losses else math.nan

    @property
    def step_seconds(self) -> float:
        """Median time of a step; NaN before there is one."""
        if not self.rows:
            return math.nan
        times = [0.0, *(row.seconds for row in self.rows)]
        return statistics.median([after - before for before, after in pairwise(times)])


def train(
    config: Config,
    optimizer: optax.GradientTransformation,
    corpus: Corpus,
    *,
    checkpoints: Checkpoints | None = None,
    rows: Sequence[Row] = (),
    observe: Callable[[list[Row]], None] = lambda rows: None,
    observe_state: Callable[[int, optax.OptState], None] = lambda step, state: None,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Trains the model of a configuration.

    Args:
        config: The model, the batches and the number of steps; what it says about optimizers
            is not read here.
        optimizer: Any Optax transformation.
        corpus: The text.
        checkpoints: Where to continue from and to save to.
        rows: The rows up to the latest checkpoint.
        observe: Is shown new rows, every `log_every` steps.
        observe_state: Is then shown the step and the optimizer's state.
        stop: Is asked after each step whether to save and return; one of many processes is
            asked every `log_every` steps.

    Returns:
        Losses, times and sizes.

    Raises:
        PretrainError: If the mesh does not fit, the step does not fit in memory, or the checkpoint
            is of another configuration.
    """
    rows = list(rows)
    micro_rows = config.batch // config.accumulation
    placement = place(config, corpus.vocab)
    model = config.model(corpus.vocab)
    graph = graph_of(model)

    param_shapes = jax.eval_shape(lambda: init_params(model, config.seed))
    state_shapes = state_shapes_of(config, optimizer, corpus.vocab)
    shardings = (placement.params, placement.state(optimizer, param_shapes))
    result = Result(rows, size_of(param_shapes), bytes_of(state_shapes), finished=True)

    start = checkpoints.latest_step if checkpoints else 0
    if checkpoints and start == config.steps:  # nothing to do, nor gigabytes to read
        checkpoints.require_same_configuration()
        return result
    if checkpoints and start:
        params, state = checkpoints.restore(placed((param_shapes, state_shapes), shardings))
    else:
        init = jax.jit(init_params, static_argnums=(0, 1), out_shardings=shardings[0])
        params = init(model, config.seed)
        state = jax.jit(optimizer.init, out_shardings=shardings[1])(params)

    def next_batch(step: int) -> jax.Array:
        def read(index: tuple[slice, ...]) -> np.ndarray:
            only = positions[index[:2]]
            return corpus.batch(config.seed, step, config.batch, config.seq_len, only)

        # Each process reads the sequences of its own devices.
        shape = (*positions.shape, config.seq_len + 1)
        return jax.make_array_from_callback(shape, placement.batches, read)

    positions = np.arange(config.batch).reshape(config.accumulation, micro_rows)
    held_out_batches = corpus.held_out_batches(config.eval_batches, micro_rows, config.seq_len)
    held_out = jax.make_array_from_callback(
        held_out_batches.shape, placement.batches, lambda index: held_out_batches[index]
    )
    if config.update_in_backward:
        advance = _step_in_backward(config, optimizer, corpus.vocab)
    else:
        advance = _step_function(graph, optimizer)
    # Compiled ahead, so that no step's time contains it.
    step_fn = (
        jax.jit(
            advance,
            donate_argnums=(0, 1),
            # The loss is whole on each device, for each process to read.
            out_shardings=(*shardings, NamedSharding(placement.mesh, P())),
        )
        .lower(params, state, next_batch(start))
        .compile()
    )
    _require_memory(step_fn, config, placement.mesh.size // jax.process_count())

    outcome = run_steps(
        config,
        step_fn,
        params,
        state,
        start=start,
        next_batch=next_batch,
        held_out_loss=lambda params: _mean_loss(graph, params, held_out),
        rows=rows,
        checkpoints=checkpoints,
        observe=observe,
        observe_state=observe_state,
        stop=stop,
    )
    return dataclasses.replace(result, rows=outcome.rows, finished=outcome.finished)


def _require_memory(step_fn: jax.stages.Compiled, config: Config, devices: int) -> None:
    # Of a device's memory XLA says so itself; from a host's the process is killed without a word.
    if jax.default_backend() != "cpu" or not hasattr(os, "sysconf"):
        return
    sizes = step_fn.memory_analysis()
    needed = devices * (sizes.temp_size_in_bytes + sizes.argument_size_in_bytes)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise PretrainError(
            f"A step takes {needed / 2**30:.0f} GiB and this machine has {there / 2**30:.0f}: cut "
            f"its {config.batch} sequences into more micro-batches than {config.accumulation} with "
            "--accumulation, recompute activations with --remat, or choose a smaller --batch."
        )


def _loss(graph: nnx.GraphDef[Llama], params: Params, tokens: jax.Array) -> jax.Array:
    logits = nnx.merge(graph, params)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


# Compiled once for all optimizers: the graph is a part of the key.
@functools.partial(jax.jit, static_argnums=0)
def _mean_loss(graph: nnx.GraphDef[Llama], params: Params, batches: jax.Array) -> jax.Array:
    return jax.lax.map(lambda tokens: _loss(graph, params, tokens), batches).mean()


def _step_function(
    graph: nnx.GraphDef[Llama], optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Params, optax.OptState, jax.Array]]:
    # Some optimizers want the loss as well.
    optimizer = optax.with_extra_args_support(optimizer)

    def step(
        params: Params, state: optax.OptState, micro_batches: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array]:
        loss, gradient = _mean_gradient(graph, params, micro_batches)
        updates, state = optimizer.update(gradient, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    return step


# The comparison asks before the first optimizer is trained, and `train` again.
@functools.cache
def state_shapes_of(config: Config, optimizer: optax.GradientTransformation, vocab: int) -> Any:
    """The shapes of an optimizer's state.

    Args:
        config: The model, and how it is updated.
        optimizer: Any Optax transformation.
        vocab: Number of tokens of the tokenizer.

    Raises:
        PretrainError: If the optimizer is not suited to the parameters or the way they are updated.
    """
    shapes = jax.eval_shape(lambda: init_params(config.model(vocab), config.seed))
    try:
        if config.update_in_backward:
            return jax.eval_shape(_in_backward(config, optimizer, vocab).init, shapes)
        return jax.eval_shape(optimizer.init, shapes)
    except ValueError as error:  # as of a rounding that the optimizer does not allow
        raise PretrainError(str(error)) from error


def _step_in_backward(
    config: Config, optimizer: optax.GradientTransformation, vocab: int
) -> Callable[..., tuple[Params, optax.OptState, jax.Array]]:
    step = _in_backward(config, optimizer, vocab).step
    # The state is the optimizer's own, whichever way it is updated.
    return lambda params, state, batches: step(params, state, batches[0])


def _in_backward(
    config: Config, optimizer: optax.GradientTransformation, vocab: int
) -> UpdateInBackward:
    return update_in_backward(
        optimizer,
        *pieces_of(config.model(vocab)),
        clip="global" if config.clip else None,
        max_norm=config.clip or 1.0,
        shardings=place(config, vocab).params,
    )


def _mean_gradient(
    graph: nnx.GraphDef[Llama], params: Params, micro_batches: jax.Array
) -> tuple[jax.Array, Params]:
    loss_and_gradient = jax.value_and_grad(lambda params, tokens: _loss(graph, params, tokens))
    count = len(micro_batches)
    if count == 1:
        return loss_and_gradient(params, micro_batches[0])

    def add(total: Any, tokens: jax.Array) -> tuple[Any, None]:
        new = loss_and_gradient(params, tokens)
        return jax.tree.map(lambda total, part: total + part / count, total, new), None

    # Sums of bfloat16 gradients would lose small terms; this float32 sum ends with the step.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), (jnp.float32(0), params))
    (loss, gradient), _ = jax.lax.scan(add, zeros, micro_batches)
    return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, params)


def placed(shapes: Any, shardings: Any) -> Any:
    """Gives shapes their shardings, as a restore needs them."""
    return jax.tree.map(lambda shape, sharding: shape.update(sharding=sharding), shapes, shardings)


def size_of(shapes: Any) -> int:
    """Counts the elements of arrays, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def bytes_of(shapes: Any) -> int:
    """Counts the bytes of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
