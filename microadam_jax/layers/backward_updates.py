"""A training step that updates each layer inside the backward pass."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr

from microadam_jax.arguments import as_transformation
from microadam_jax.engine.leaf_loops import once
from microadam_jax.execution import within
from microadam_jax.layers.clips import Clip, ClipName, sum_of_squares
from microadam_jax.layers.state_of_layers import (
    StateParts,
    len_of_stack,
    require_each_alone,
    subtree,
)
from microadam_jax.transforms.round_updates import RoundUpdatesState
from microadam_jax.trees import KeyPath, path_name, without_boxes

Params = dict[str, Any]


class LastNormState(NamedTuple):
    """The state where gradients are clipped by the norm of the step before.

    Attributes:
        norm: float32 scalar, the global norm of the last gradients; 0 before the first step.
        inner_state: of the optimizer.
    """

    norm: jax.Array
    inner_state: Any


class UpdateInBackward(NamedTuple):
    """Runs a training step that has no tree of gradients.

    Attributes:
        init: from parameters to the state, which is that of the optimizer.
        step: ``step(params, state, batch) -> (params, state, loss)``. Compile it with
            ``jax.jit(step, donate_argnums=(0, 1))``.
    """

    init: Callable[[Params], Any]
    step: Callable[[Params, Any, Any], tuple[Params, Any, jax.Array]]


def update_in_backward(
    tx: optax.GradientTransformation,
    before: Callable[[Params, Any], Any],
    layer: Callable[[Any, Any], Any],
    after: Callable[[Params, Any, Any], jax.Array],
    *,
    layers: str = "layers",
    clip: ClipName | None = None,
    max_norm: float = 1.0,
    shardings: Any = None,
) -> UpdateInBackward:
    r"""Updates each layer as soon as the backward pass has its gradient.

    The forward pass keeps the inputs :math:`x_l` of the layers. The backward pass goes through
    them in a loop: it computes a layer again, and from the gradient of its output
    :math:`\bar x_{l+1}`

    .. math::

        (\bar \theta_l, \bar x_l) = \Big(\frac{\partial f(\theta_l, x_l)}{\partial (\theta_l, x_l)}
            \Big)^T \bar x_{l+1}, \qquad
        \theta_l \leftarrow \theta_l + u(\bar \theta_l, s_l, \theta_l)

    so that no more than one layer's gradient :math:`\bar \theta_l` is there at a time. Parameters
    and state are what the loop carries: donated, they are updated in place. State and numbers are
    those of a step with ``jax.grad`` and ``tx.update``, but for last bits that a compiler rounds
    otherwise, so that a run can go on with either. A layer's parameters are updated one by one.

    Args:
        tx: any optimizer that updates each leaf by itself; of the stack each layer counts as a
            leaf, as if it stood alone. :func:`round_updates` goes around it as ever.
        before: ``before(rest, batch) -> x`` computes the input of the first layer. ``rest`` holds
            all parameters but the stack.
        layer: ``layer(weights, x) -> x`` computes a layer from its own weights.
        after: ``after(rest, x, batch) -> loss`` computes the loss from the last layer's output. An
            embedding that is used here too may be tied.
        layers: the name of the stack in the parameters, whose arrays have the layers along their
            first axes. Codecs and partitions have to know it for one: they know ``"layers"``, and
            others by their ``stacked=``.
        clip: None, or how gradients are clipped: ``"value"``, each number to ``[-max_norm,
            max_norm]``; ``"layer"``, each layer, and what is outside of the layers, by the norm of
            its own; ``"global"``, by the norm of all, which a backward pass of its own finds
            first; ``"last_global"``, by the norm of all in the step before, and not in the first.
        max_norm: the largest norm, or magnitude.
        shardings: of the parameters on a mesh with Auto axes: a tree of ``NamedSharding``. Each
            layer's gradient is then sharded as its parameters are, inside the loop.

    Returns:
        The functions ``init`` and ``step``.

    Raises:
        TypeError: if ``tx`` is no transformation; in ``init``, if the parameters are no dict or one
            is not a floating-point array; in ``step``, if the loss is not a scalar.
        ValueError: if there is no such clip, or ``max_norm`` is not positive; in ``init``, if the
            parameters have no such stack, if layers share a part of the state, if the optimizer
            needs the gradients of several parameters at a time, as ``optax.clip_by_global_norm``,
            M-FAC, ``optax.apply_if_finite`` and ``optax.MultiSteps`` do, if it takes the layers for
            an axis of a kernel, as ``optax.adaptive_grad_clip`` does, or if it projects on
            subspaces drawn at random, as APOLLO does.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from microadam_jax.layers import update_in_backward
        >>> params = {"layers": {"w": jnp.zeros((3, 4, 4))}, "head": jnp.ones((4, 1))}
        >>> train = update_in_backward(
        ...     optax.adam(0.01),
        ...     before=lambda rest, batch: batch["x"],
        ...     layer=lambda weights, x: x + jnp.tanh(x @ weights["w"]),
        ...     after=lambda rest, x, batch: jnp.mean((x @ rest["head"] - batch["y"]) ** 2),
        ... )
        >>> batch = {"x": jnp.eye(4), "y": jnp.arange(4.0)[:, None]}
        >>> step = jax.jit(train.step, donate_argnums=(0, 1))
        >>> state = train.init(params)
        >>> for _ in range(100):
        ...     params, state, loss = step(params, state, batch)
        >>> bool(loss < 0.01)
        True

    Reference: LOMO (arXiv 2306.09782), fused backward.
    """
    clipping, by_last = Clip.named(clip, max_norm), clip == "last_global"
    tx = as_transformation(tx=tx)

    def init(params: Params) -> Any:
        require_layerwise(tx, params, layers)
        state = tx.init(params)
        return LastNormState(jnp.zeros([], jnp.float32), state) if by_last else state

    def step(params: Params, state: Any, batch: Any) -> tuple[Params, Any, jax.Array]:
        last = state.norm if by_last else None
        inner_state = state.inner_state if by_last else state
        # What is clipped is not rounded once more where the optimizer computes in float32.
        in_float32 = isinstance(inner_state, RoundUpdatesState)
        chosen = clipping._replace(in_float32=in_float32)
        run = _Step(tx, before, layer, after, layers, chosen, shardings)
        params, inner_state, loss, norm = run(params, inner_state, batch, last)
        return params, LastNormState(norm, inner_state) if by_last else inner_state, loss

    return UpdateInBackward(init, step)


def require_layerwise(
    tx: optax.GradientTransformationExtraArgs, params: Params, layers: str
) -> None:
    """Refuses an optimizer that needs the gradients of other layers to update one.

    Args:
        tx: the optimizer.
        params: the parameters, or their shapes.
        layers: the name of the stack.

    Raises:
        TypeError: if the parameters are no dict, or one is not a floating-point array.
        ValueError: if there is no such stack, or the optimizer looks at several layers.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"The parameters must be a dict with the stack {layers!r}; got {type(params).__name__}."
        )
    if layers not in params:
        raise ValueError(
            f"The parameters have no stack {layers!r}; they have {', '.join(params)}. Give layers= "
            "its name."
        )
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"The parameter {path_name(path)!r} has dtype {jnp.result_type(leaf)}, of which "
                "there is no gradient. Let before, layer and after take it from elsewhere."
            )
    len_of_stack(params[layers], layers)
    extra_args = {"value": jnp.zeros([], jnp.float32)}
    used = require_each_alone(tx, jax.eval_shape(lambda p: p, params), layers, extra_args)
    StateParts.of(tx, params, layers).require_unused(used)


class _Step(NamedTuple):
    """One step; the attributes are the arguments of :func:`update_in_backward`."""

    tx: optax.GradientTransformationExtraArgs
    before: Callable[[Params, Any], Any]
    layer: Callable[[Any, Any], Any]
    after: Callable[[Params, Any, Any], jax.Array]
    layers: str
    clip: Clip
    shardings: Any

    def __call__(
        self, params: Params, state: Any, batch: Any, last_norm: jax.Array | None
    ) -> tuple[Params, Any, jax.Array, jax.Array]:
        stack = params[self.layers]
        rest = {name: part for name, part in params.items() if name != self.layers}
        parts = StateParts.of(self.tx, params, self.layers)
        x, into = jax.vjp(lambda rest: self.before(rest, batch), rest)

        def forward(x: Any, weights: Any) -> tuple[Any, Any]:
            return self.layer(weights, x), x

        x, inputs = jax.lax.scan(forward, x, stack)
        loss, out = jax.vjp(lambda rest, x: self.after(rest, x, batch), rest, x)
        if jax.tree.structure(loss) != jax.tree.structure(0) or loss.shape:
            raise TypeError(
                "after(rest, x, batch) must return a loss that is a scalar, and nothing beside it; "
                f"got {jax.tree.map(jax.typeof, loss)}."
            )
        d_after, dx = out(jnp.ones_like(loss))
        used_before, used_after = self._used(rest, batch, x)
        shapes = jax.eval_shape(lambda params: params, params)
        run = _Backward(self, parts, shapes, inputs, {"value": loss.astype(jnp.float32)})
        squares = jnp.zeros([], jnp.float32)
        norm: jax.Array | None = last_norm

        def of_rest(d_before: Any, keep: Callable[[KeyPath], bool]) -> Any:
            def add(path: KeyPath, one: jax.Array, other: jax.Array) -> Any:
                if not keep(path):
                    return None
                if path not in used_before:
                    return one
                return one + other if path in used_after else other

            return jax.tree.map_with_path(add, d_after, d_before)

        if self.clip.name == "global":
            # Nothing is updated: the pass only finds the norm.
            dx_first, squares = run.norm(stack, dx)
            gradients = of_rest(into(dx_first)[0], lambda path: True)
            norm = jnp.sqrt(squares + sum_of_squares(gradients))
        early = {path for path in used_after if path not in used_before}
        leaves = jax.tree.leaves(state)
        # What the loss alone reads is updated first, so that its gradient does not outlive it.
        gradients = subtree(d_after, lambda path: path in early)
        squares = sum_of_squares(gradients)
        moved, leaves = run.rest(gradients, leaves, rest, norm)
        # Else a compiler may update the head after the layers, and keep its gradient until then.
        dx, moved, leaves = jax.lax.optimization_barrier((dx, moved, leaves))
        stack, leaves, dx, of_layers = run.stack(stack, leaves, dx, norm)
        late = {path for path, _ in jax.tree.leaves_with_path(rest)} - early
        gradients = of_rest(into(dx)[0], lambda path: path in late)
        squares = squares + of_layers + sum_of_squares(gradients)
        last, leaves = run.rest(gradients, leaves, rest, norm)
        leaves = run.counted(leaves)
        moved |= last
        rest = jax.tree.map_with_path(lambda path, _: moved[keystr(path)], rest)
        new = {name: stack if name == self.layers else rest[name] for name in params}
        by_path = dict(jax.tree.leaves_with_path(new))
        # What is no dict, such as a FrozenDict, stays what it is.
        new = jax.tree.map_with_path(lambda path, _: by_path[path], params)
        return new, parts.structure.unflatten(leaves), loss, jnp.sqrt(squares)

    def _used(self, rest: Params, batch: Any, x: Any) -> tuple[set[KeyPath], set[KeyPath]]:
        """The paths of the parameters that are read before the layers, and after them."""
        paths = [path for path, _ in jax.tree.leaves_with_path(rest)]

        def used(function: Callable[..., Any], *arguments: Any) -> set[KeyPath]:
            program = jax.make_jaxpr(function)(rest, *arguments).jaxpr
            read = {id(v) for eqn in program.eqns for v in eqn.invars} | {
                id(v) for v in program.outvars
            }
            own = zip(paths, program.invars, strict=False)
            return {path for path, variable in own if id(variable) in read}

        return used(self.before, batch), used(self.after, x, batch)

    def placed(self, weights: Any) -> Any:
        """A layer's weights or gradients, sharded as its parameters are."""
        if self.shardings is None:
            return weights
        given = without_boxes(self.shardings[self.layers])
        each = jax.tree.broadcast(given, weights)
        return jax.tree.map(
            lambda x, s: jax.lax.with_sharding_constraint(
                x, NamedSharding(s.mesh, PartitionSpec(*s.spec[1:]))
            ),
            weights,
            each,
        )


class _Backward(NamedTuple):
    """The backward pass of a step.

    Attributes:
        step: the step.
        parts: of the state.
        shapes: of all parameters.
        inputs: of the layers, stacked.
        extra_args: of the optimizer.
    """

    step: _Step
    parts: StateParts
    shapes: Params
    inputs: Any
    extra_args: dict[str, Any]

    def norm(self, stack: Any, dx: Any) -> tuple[Any, jax.Array]:
        """The gradient of the first layer's input, and the sum of the layers' squared gradients."""

        def body(turn: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            dx, squares = carry
            gradients, dx = self._gradients(_at(stack, self._layer(turn)), turn, dx)
            return dx, squares + sum_of_squares(gradients)

        return jax.lax.fori_loop(0, self._count, body, (dx, jnp.zeros([], jnp.float32)))

    def stack(
        self, stack: Any, leaves: list[Any], dx: Any, norm: jax.Array | None
    ) -> tuple[Any, list[Any], Any, jax.Array]:
        """New layers and state, the gradient of the first input, and the sum of squares."""
        places = [i for i, cut in enumerate(self.parts.cut) if cut]
        name = self.step.layers

        def body(turn: jax.Array, carry: Any) -> Any:
            stack, own, dx, squares = carry
            gradients, dx = self._gradients(_at(stack, self._layer(turn)), turn, dx)
            squares = squares + sum_of_squares(gradients)
            clipped = self.step.clip.of(gradients, norm)

            def move(path: KeyPath, weights: jax.Array, gradient: jax.Array) -> jax.Array:
                path = (jax.tree_util.DictKey(name), *path)
                mine = [place for place in own if self.parts.owners[place] == path]

                def update(before: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                    own = dict(zip(mine, before[1:], strict=True))
                    one = clipped(gradient)[None]
                    return self._of_layer(turn, path, one, leaves, before[0], own)

                # A loop of its own, so that its temporaries are gone before the next one has any.
                before = weights, *(own[place] for place in mine)
                weights, *arrays = once(turn >= 0, update, before)
                own.update(zip(mine, arrays, strict=True))
                return weights

            return jax.tree.map_with_path(move, stack, gradients), own, dx, squares

        carry = (stack, {i: leaves[i] for i in places}, dx, jnp.zeros([], jnp.float32))
        stack, own, dx, squares = jax.lax.fori_loop(0, self._count, body, carry)
        return stack, [own.get(i, leaf) for i, leaf in enumerate(leaves)], dx, squares

    def _of_layer(
        self,
        turn: jax.Array,
        path: KeyPath,
        gradient: jax.Array,
        leaves: list[Any],
        weights: jax.Array,
        own: dict[int, jax.Array],
    ) -> tuple[jax.Array, ...]:
        """Stacked weights and state of a parameter, after the update of one layer's."""
        i = self._layer(turn)
        given = list(leaves)
        for place, array in own.items():
            given[place] = jax.lax.dynamic_slice_in_dim(array, i, 1)
        # In the place of the stack, with one layer: paths and layer axes are what they were.
        with within(layer=i):
            weight = jax.lax.dynamic_slice_in_dim(weights, i, 1)
            moved, new = self._updated(path, gradient, given, weight)
        written = moved, *(new[place] for place in own)
        return tuple(
            _put(stack, layer, i, turn)
            for stack, layer in zip((weights, *own.values()), written, strict=True)
        )

    def rest(
        self, gradients: Any, leaves: list[Any], rest: Params, norm: jax.Array | None
    ) -> tuple[dict[str, jax.Array], list[Any]]:
        """The parameters that have gradients after their update, by path, and the state."""
        params, moved = dict(jax.tree.leaves_with_path(rest)), {}
        leaves = list(leaves)
        clipped = self.step.clip.of(gradients, norm)
        for path, gradient in jax.tree.leaves_with_path(gradients):
            moved[keystr(path)], new = self._updated(path, clipped(gradient), leaves, params[path])
            for place, array in new.items():
                leaves[place] = array
        return moved, leaves

    def counted(self, leaves: list[Any]) -> list[Any]:
        """The state after what belongs to no parameter, such as the step count, took its step."""
        nothing = subtree(self.shapes, lambda path: False)
        _, new = self.parts.update(self.step.tx, nothing, leaves, nothing, (), self.extra_args)
        return [new.get(i, leaf) for i, leaf in enumerate(leaves)]

    def _updated(
        self, path: KeyPath, gradient: jax.Array, leaves: list[Any], parameter: jax.Array
    ) -> tuple[jax.Array, dict[int, jax.Array]]:
        """A parameter after its update, and its new arrays of the state."""

        def alone(leaf: jax.Array) -> Any:
            return jax.tree.map_with_path(lambda p, _: leaf if p == path else None, self.shapes)

        params = alone(parameter)
        with within(parameters=self.shapes):
            updates, new = self.parts.update(
                self.step.tx, alone(gradient), leaves, params, (path,), self.extra_args
            )
        (moved,) = jax.tree.leaves(optax.apply_updates(params, updates))
        return moved, {place: x for place, x in new.items() if self.parts.owners[place] == path}

    def _gradients(self, weights: Any, turn: jax.Array, dx: Any) -> tuple[Any, Any]:
        x = _at(self.inputs, self._layer(turn))
        _, backward = jax.vjp(self.step.layer, self.step.placed(weights), x)
        gradients, dx = backward(dx)
        return self.step.placed(gradients), dx

    @property
    def _count(self) -> int:
        return jax.tree.leaves(self.inputs)[0].shape[0]

    def _layer(self, turn: jax.Array) -> jax.Array:
        return self._count - 1 - turn


def _at(stack: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stack)


def _put(stack: jax.Array, layer: jax.Array, i: jax.Array, turn: jax.Array) -> jax.Array:
    """Writes a layer in place."""

    def put(before: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return (jax.lax.dynamic_update_slice_in_dim(before[0], layer, i, 0),)

    # Always true, which the compiler cannot know: a CPU's would fuse what reads a layer with what
    # writes it, and copy all layers to do so.
    return once(turn >= 0, put, (stack,))[0]
