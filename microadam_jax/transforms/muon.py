"""Muon: matrices move along their orthogonalized momentum, all else as Adam-mini moves it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.codecs import Codec, Storage, Unstored, as_storage
from microadam_jax.leaf_loops import each_kind
from microadam_jax.leafwise import Arrays, Leaf, leafwise
from microadam_jax.partition import remark_assignment, require_shape, warn_unnamed
from microadam_jax.sharding import explicit_sharding, place_on, unused_factor
from microadam_jax.subspace.matrices import OUTPUT_HEAD, Assigned, Matrices
from microadam_jax.subspace.view import WHOLE
from microadam_jax.transforms.descent import as_it_is, finishes, read_by
from microadam_jax.transforms.moments import moving_average, one_minus_power
from microadam_jax.transforms.transformation import transformation
from microadam_jax.trees import KeyPath, map_with_path

NS_STEPS = 5
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class ScaleByMuonState(NamedTuple):
    """A momentum for each parameter, and second moments for what is no matrix.

    Attributes:
        count: int32 scalar, steps taken.
        mu: momenta of the parameters' shapes, in float32 or as ``mu_codec`` stores them.
        nu: float32 second moments of Adam-mini's blocks; a single byte for a matrix.
    """

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_muon(
    beta: ArrayLike = 0.95,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    consistent_rms: ArrayLike = 0.2,
    matrices: Matrices = Matrices(exclude=OUTPUT_HEAD),
    mu_codec: Storage | Codec | str | None = None,
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates of matrices as Muon does, and all others as Adam-mini does.

    With a matrix :math:`X` of :math:`R` inputs and :math:`C` outputs,

    .. math::

        m_t &= \beta m_{t-1} + (1 - \beta)\, g_t \\
        n_t &= \beta \frac{m_t}{1 - \beta^{t+1}} + (1 - \beta) \frac{g_t}{1 - \beta^t} \\
        u_t &= c \sqrt{\max(R, C)}\; p^5\!\left( \frac{n_t}{\|n_t\|_F + \epsilon} \right),
        \qquad p(X) = a_0 X + a_1 (X X^T) X + a_2 (X X^T)^2 X

    where :math:`p^5`, five steps of Newton and Schulz with the coefficients 3.4445, -4.7750 and
    2.0315, brings all singular values near 1. The layers of a stack are matrices of their own and
    are orthogonalized one after another, so that only one of them has temporaries. For parameters
    that are no matrices see :func:`scale_by_adam_mini`.

    Args:
        beta: :math:`\beta`, in [0, 1): the decay of a matrix's momentum.
        b1: the decay of other parameters' first moment, in [0, 1).
        b2: the decay of other parameters' second moment, in [0, 1).
        eps: :math:`\epsilon`, and Adam-mini's.
        consistent_rms: :math:`c`, the root mean square of a matrix's update. AdamW's is about 0.2,
            so that its learning rate and decay suit all parameters.
        matrices: which parameters are matrices: by default all linear maps but the output head.
        mu_codec: stores :math:`m` in few bits; None keeps it in float32. See
            :func:`quantize_state`.
        seed: of a codec that rounds stochastically.

    Returns:
        The transformation. On a mesh with Explicit axes each device orthogonalizes whole matrices,
        gathered from the others.

    Raises:
        TypeError: if a number is an array in fewer bits than float32.
        ValueError: if ``mu_codec`` has no negative numbers; in ``update``, if the state was made
            for other matrices or stored otherwise.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.transforms import scale_by_muon
        >>> tx = scale_by_muon()
        >>> params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
        >>> grads = {"kernel": jnp.array([[3.0, 0, 0], [0, 4, 0]]), "bias": jnp.ones(3)}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> with jnp.printoptions(precision=2, suppress=True):
        ...     print(updates["kernel"])
        [[0.25 0.   0.  ]
         [0.   0.39 0.  ]]

    Reference: Jordan et al., Muon (2024); Liu et al., Muon is scalable for LLM training (arXiv
        2502.16982), Section 2.2.
    """
    storage = Unstored() if mu_codec is None else as_storage(mu_codec).signed("mu")

    def init(leaf: Leaf) -> tuple[jax.Array]:
        if leaf.layout.view is not None:
            return (unused_factor(leaf.value),)
        remark_assignment(leaf.path, leaf.layout.assignment)
        return (leaf.zeros(leaf.layout.assignment.sharing.moment_shape),)

    def inspect(leaves: list[Leaf]) -> None:
        others = [leaf.layout.assignment for leaf in leaves if leaf.layout.view is None]
        warn_unnamed("scale_by_muon", [(assignment, assignment.bytes) for assignment in others])

    def reduce(leaf: Leaf, nu: jax.Array) -> tuple[Arrays, Arrays]:
        if leaf.layout.view is not None:
            require_shape(leaf.path, nu, (1,) * leaf.value.ndim)
            return (nu,), ()
        blocks = leaf.layout.assignment.sharing
        require_shape(leaf.path, nu, blocks.moment_shape)
        nu = moving_average(b2, nu, blocks.mean(leaf.squares))
        return (nu,), (blocks.spread(jnp.sqrt(nu / one_minus_power(b2, leaf.t))) + eps,)

    def rule(t: jax.Array, g: jax.Array, mu: jax.Array, *root: jax.Array) -> Arrays:
        if root:
            mu = moving_average(b1, mu, g)
            return mu / one_minus_power(b1, t) / root[0], mu
        mu = moving_average(beta, mu, g)
        ahead = mu / one_minus_power(beta, t + 1)
        return moving_average(beta, ahead, g / one_minus_power(beta, t)), mu

    momentum = leafwise(
        ScaleByMuonState,
        {"mu": storage},
        rule,
        init,
        reduce,
        matrices.assign,
        inspect=inspect,
        hyperparams={"beta": beta, "b1": b1, "b2": b2, "eps": eps},
        seed=seed,
    )

    def update(
        updates: optax.Updates,
        state: ScaleByMuonState,
        params: optax.Params | None = None,
        *,
        finish: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByMuonState]:
        assign = matrices.assign(updates)
        seen = {path: assign(path, g) for path, g in jax.tree.leaves_with_path(updates)}
        targets = updates if params is None else params
        finish = finishes(finish, updates)

        def of_others(path: KeyPath, g: jax.Array, end: Any) -> tuple[Any]:
            del g
            return (end if seen[path].view is None else as_it_is,)

        (early,) = map_with_path(of_others, 1, updates, finish)
        found: Any = momentum.update(updates, state, params, finish=early, **extra_args)
        moved, state = found
        kinds, leaves = [], []
        for path, n in jax.tree.leaves_with_path(moved):
            assigned = seen[path]
            if assigned.view is not None:
                static = _Matrix(assigned, eps)
                kinds.append((assigned.view, assigned.assignment.layer_axis, jax.typeof(n)))
                leaves.append((static, n))
        orthogonal = iter(each_kind(_Matrix.orthogonalized, kinds, leaves))

        def scale(path: KeyPath, u: jax.Array, target: jax.Array, end: Any) -> tuple[jax.Array]:
            view = seen[path].view
            if view is None:
                return (u,)
            size = jnp.float32(consistent_rms) * max(view.rows, view.columns) ** 0.5
            u = (size * next(orthogonal)).astype(target.dtype)
            return (end(u, *read_by(end, target)),)

        (scaled,) = map_with_path(scale, 1, moved, targets, finish)
        return scaled, state

    return transformation(momentum.init, update, consistent_rms=consistent_rms)


class _Matrix(NamedTuple):
    """A parameter of one matrix or several.

    Attributes:
        assigned: its axes.
        eps: beside the norm.
    """

    assigned: Assigned
    eps: ArrayLike

    def orthogonalized(self, x: jax.Array) -> jax.Array:
        """The matrices of ``x`` in float32, their singular values near 1."""
        assert self.assigned.view is not None
        view, axis = self.assigned.view, self.assigned.assignment.layer_axis
        folded = view.fold(x.astype(jnp.float32))
        whole = place_on(folded, folded, range(len(view.batch)))
        sharding = explicit_sharding(whole)
        if axis is None or (sharding is not None and sharding.spec[view.batch.index(axis)]):
            return view.unfold(self._polynomials(whole), WHOLE, x)
        at = view.batch.index(axis)
        layers = jax.lax.map(self._polynomials, jnp.moveaxis(whole, at, 0))
        return view.unfold(jnp.moveaxis(layers, 0, at), WHOLE, x)

    def _polynomials(self, x: jax.Array) -> jax.Array:
        """Five steps of Newton and Schulz on matrices ``(..., rows, columns)``."""
        rows, columns = x.shape[-2:]
        x = jnp.matrix_transpose(x) if rows > columns else x
        x = x / (jnp.sqrt(jnp.sum(jnp.square(x), (-2, -1), keepdims=True)) + self.eps)
        first, third, fifth = NS_COEFFICIENTS

        def step(_: int, x: jax.Array) -> jax.Array:
            gram = x @ jnp.matrix_transpose(x)
            return first * x + (third * gram + fifth * gram @ gram) @ x

        x = jax.lax.fori_loop(0, NS_STEPS, step, x)
        return jnp.matrix_transpose(x) if rows > columns else x
