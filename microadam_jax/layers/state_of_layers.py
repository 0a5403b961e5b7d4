"""An optimizer's state in parts: that of one layer of a stack, that of some parameters."""

import dataclasses
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from microadam_jax.execution import within
from microadam_jax.layers.dependence import dependences, mixed_first_axis
from microadam_jax.trees import KeyPath, owner_of, path_name


def one_layer(tree: Any) -> Any:
    """Returns the shapes of stacked arrays with one layer."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), tree)


@dataclasses.dataclass(frozen=True)
class StateParts:
    """Assigns the arrays of a flattened state to parameters.

    Attributes:
        structure: of the state.
        owners: for each array the path of its parameter; None for what belongs to none.
        stacked: the paths of the parameters that stack layers.
        cut: for each array whether it has a layer axis, its first.
    """

    structure: Any
    owners: tuple[KeyPath | None, ...]
    stacked: frozenset[KeyPath]
    cut: tuple[bool, ...]

    @classmethod
    def of(
        cls, tx: optax.GradientTransformation, params: dict[str, Any], layers: str
    ) -> "StateParts":
        """Finds the parts of ``tx.init(params)``.

        Args:
            tx: the optimizer.
            params: the parameters, or their shapes.
            layers: the name of the stack among them.

        Raises:
            ValueError: if layers share an array of the state.
        """
        shapes = jax.eval_shape(lambda params: params, params)
        single = {**shapes, layers: one_layer(shapes[layers])}
        # Functions of their own, as eval_shape would answer a known one from its cache.
        state, state_of_one = (
            jax.eval_shape(lambda p: tx.init(p), tree) for tree in (shapes, single)
        )
        paths = {path for path, _ in jax.tree.leaves_with_path(shapes)}
        stacked = frozenset(path for path, _ in jax.tree.leaves_with_path({layers: shapes[layers]}))
        count = len_of_stack(shapes[layers], layers)
        leaves, structure = jax.tree.flatten(state)
        named = jax.tree.leaves_with_path(state)
        owners = tuple(owner_of(path, paths) for path, _ in named)
        others = jax.tree.leaves(state_of_one)
        if len(others) != len(leaves):
            raise ValueError(_shares("its state", "has another structure for one layer"))
        cut = []
        for (path, leaf), owner, one in zip(named, owners, others, strict=True):
            is_cut = owner in stacked and leaf.shape == (count, *one.shape[1:]) != ()
            # Arrays that a leaf does not need hold one element; `require_unused` looks at them.
            if owner in stacked and not (is_cut and one.shape[:1] == (1,)) and leaf.size != 1:
                raise ValueError(
                    _shares(
                        path_name(path),
                        f"has the shape {leaf.shape} for {count} layers and {one.shape} for one",
                    )
                )
            cut.append(is_cut)
        return cls(structure, owners, stacked, tuple(cut))

    def require_unused(self, used: Container[int]) -> None:
        """Refuses a state of which layers share an array that is used.

        Args:
            used: the indices of the arrays that something depends on.

        Raises:
            ValueError: if one of these belongs to a stack and has no layer axis.
        """
        named = jax.tree.leaves_with_path(self.structure.unflatten(range(len(self.owners))))
        for (path, i), owner, cut in zip(named, self.owners, self.cut, strict=True):
            if owner in self.stacked and not cut and i in used:
                raise ValueError(_shares(path_name(path), "has one element for all layers"))

    def places(self, paths: Container[KeyPath]) -> list[int]:
        """Returns the indices of the arrays of some parameters, and of what belongs to none."""
        return [i for i, own in enumerate(self.owners) if own is None or own in paths]

    def update(
        self,
        tx: optax.GradientTransformationExtraArgs,
        gradients: Any,
        leaves: Sequence[Any],
        params: Any,
        paths: Container[KeyPath],
        extra_args: dict[str, Any],
    ) -> tuple[Any, dict[int, jax.Array]]:
        """Takes a step on some parameters.

        Args:
            tx: the optimizer.
            gradients: in the structure of all parameters, None where there is none.
            leaves: the flattened state.
            params: as ``gradients``.
            paths: of the parameters that are there.
            extra_args: of ``tx.update``.

        Returns:
            The updates, and the new arrays of the state by their indices.

        Raises:
            ValueError: if the optimizer does not take parameters one at a time.
        """
        places = self.places(paths)
        given: list[Any] = [None] * len(self.owners)
        for i in places:
            given[i] = leaves[i]
        state = self.structure.unflatten(given)
        try:
            updates, state = tx.update(gradients, state, params, **extra_args)
        except ValueError as error:
            raise ValueError(
                "The optimizer does not update a parameter with None in the place of all others. "
                "Masks and labels that are functions see that None: give optax.masked, "
                "optax.partition and the like trees, as mask(params) is one."
            ) from error
        return updates, dict(zip(places, jax.tree.leaves(state), strict=True))


def require_each_alone(
    tx: optax.GradientTransformationExtraArgs,
    params: dict[str, Any],
    layers: str,
    extra_args: dict[str, Any],
) -> set[int]:
    """Refuses an optimizer that needs the gradients of several parameters at a time.

    Returns:
        The indices of the arrays of the flattened state that are used: the update or another array
        depends on them, or they depend on a gradient.

    Raises:
        ValueError: if the update of a parameter, or what is kept for none or another, depends on
            the gradient of a parameter, if a reduction mixes the layers of a stack, or if its
            random numbers would not be those of a stack.
    """
    single = {**params, layers: one_layer(params[layers])}
    single = jax.eval_shape(lambda tree: tree, single)
    state = jax.eval_shape(lambda p: tx.init(p), single)
    for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.MultiStepsState)):
        if isinstance(node, optax.MultiStepsState):
            raise ValueError(
                "optax.MultiSteps keeps a gradient of every parameter, which updating in the "
                "backward pass is to do without. Leave it out, or use accumulate_into_residual."
            )
    for path, leaf in jax.tree.leaves_with_path(state):
        if path_name(path).endswith("rng_key") or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"The optimizer draws random numbers for all parameters from {path_name(path)!r}, "
                "and would draw the same for each if layers are updated one after another. Leave "
                "optax.add_noise and the like out."
            )
    paths = [path for path, _ in jax.tree.leaves_with_path(single)]

    def update(gradients: Any, state: Any, params: Any) -> Any:
        with within(layer=jnp.zeros([], jnp.int32)):
            return tx.update(gradients, state, params, **extra_args)

    try:
        program = jax.make_jaxpr(update)(single, state, single)
    except TypeError as error:
        raise TypeError(
            "The optimizer cannot be updated with gradients, state and parameters alone "
            f"({error}). A line search, as of optax.lbfgs, needs the loss function, and has no "
            "place in a backward pass."
        ) from error
    stacks = {leaf.shape for leaf in jax.tree.leaves(single[layers]) if leaf.ndim > 1}
    if (reduced := mixed_first_axis(program.jaxpr, stacks)) is not None:
        raise ValueError(
            f"The optimizer takes the layers of {layers!r} for an axis of a kernel: it reduces an "
            f"array of the shape {reduced}, of one layer, over its first axis and not over all. It "
            "would mix the layers of the stack. Of a clip of each layer give clip='layer' in place "
            "of optax.adaptive_grad_clip."
        )
    found = dependences(program)
    updates, kept = found[: len(paths)], found[len(paths) :]
    owners = [owner_of(path, set(paths)) for path, _ in jax.tree.leaves_with_path(state)]
    gradients = (1 << len(paths)) - 1
    for path, depends in [*zip(paths, updates, strict=True), *zip(owners, kept, strict=True)]:
        own = 0 if path is None else 1 << paths.index(path)
        others = depends & gradients & ~own
        if others:
            other = path_name(paths[others.bit_length() - 1])
            what = "A number of the state" if path is None else f"The update of {path_name(path)!r}"
            raise ValueError(
                f"{what} depends on the gradient of {other!r}, which is not there at the same time "
                "if layers are updated in the backward pass. Of a clip by global norm give "
                "clip='global' and max_norm here, in place of the transformation; M-FAC, GGT, "
                "optax.apply_if_finite and others that look at all gradients cannot be used."
            )
    used = set()
    for i, depends in enumerate(kept):
        others = [*updates, *kept[:i], *kept[i + 1 :]]
        own = 1 << (len(paths) + i)
        if depends & gradients or any(other & own for other in others):
            used.add(i)
    return used


def len_of_stack(stack: Any, name: str) -> int:
    """Counts the layers of a stack.

    Raises:
        ValueError: if its arrays do not all have them along their first axes.
    """
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(stack)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"params[{name!r}] must be arrays of stacked layers, with one size along their first "
            f"axes; they have {sorted(sizes)}."
        )
    return next(iter(sizes))[0]


def subtree(tree: Any, keep: Callable[[KeyPath], bool]) -> Any:
    """Returns ``tree`` with None for the leaves that are not kept."""
    return jax.tree.map_with_path(lambda path, leaf: leaf if keep(path) else None, tree)


def _shares(name: str, what: str) -> str:
    return (
        f"Layers share a part of the optimizer's state, or it does not know the stack for one, so "
        f"that they cannot be updated one after another: {name} {what}. Name the stack in the "
        "stacked= of its Storage or Partition, or choose an optimizer whose state has the layers "
        "in front."
    )
