"""MicroAdam, the chain of error feedback and a window."""

import dataclasses

import jax
from jax.typing import ArrayLike
from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from microadam_jax.arguments import if_traced
from microadam_jax.blocks import Blocks
from microadam_jax.codecs import Affine4, Codec, as_codec
from microadam_jax.compressors import TopK, top_k
from microadam_jax.engine.descent import descend
from microadam_jax.transforms import Window, error_feedback, scale_by_window_adam
from microadam_jax.transforms.decay import Mask
from microadam_jax.transforms.deferred import compressed_where_read


@dataclasses.dataclass(frozen=True)
class MicroAdamLayout:
    """Describes MicroAdam's state: what is selected, the residual's format, the window.

    Attributes:
        compressor: what is sent to the window in each step.
        residual: the format of what is not; a codec or its name.
        window: how much of what was sent is kept.
    """

    compressor: TopK = top_k()
    residual: Codec | str = Affine4()
    window: Window = Window()

    def with_settings(
        self, *, density: float | None, window: int | None, block_size: int | None
    ) -> "MicroAdamLayout":
        """Returns this layout with other numbers where they are given.

        Raises:
            TypeError: if a number is a traced array, or ``block_size`` is not an integer.
            ValueError: if a number is out of its range, as for :func:`microadam`.
        """
        settings = {"density": density, "window": window, "block_size": block_size}
        for name, value in settings.items():
            hint = if_traced(value, name)
            if hint:
                raise TypeError(f"{name} must be a number of Python; got {value!r}.{hint}")
        compressor, residual = self.compressor, self.residual
        if density is not None:
            compressor = dataclasses.replace(compressor, density=density, count=None)
        if block_size is not None:
            blocks = dataclasses.replace(compressor.blocks, size=block_size)
            if as_codec(residual) == Affine4(compressor.blocks):
                residual = Affine4(blocks)
            compressor = dataclasses.replace(compressor, blocks=blocks)
        kept = self.window if window is None else dataclasses.replace(self.window, length=window)
        return MicroAdamLayout(compressor, residual, kept)


MICROADAM_LAYOUTS = {
    "fast": MicroAdamLayout(),
    "pretrain": MicroAdamLayout(compressor=top_k(density=30 / 256), window=Window(1)),
    "paper": MicroAdamLayout(
        compressor=top_k(density=0.01, blocks=Blocks(size=32768, shards=1), min_size=0, min_row=0),
        residual=Affine4(Blocks(size=64, shards=1), statistics="bfloat16"),
    ),
}


def microadam(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    density: float | None = None,
    window: int | None = None,
    block_size: int | None = None,
    alpha: ArrayLike | None = None,
    layout: MicroAdamLayout | str = "fast",
) -> GradientTransformationExtraArgs:
    r"""Runs MicroAdam: Adam on a window of the largest gradient elements, the rest fed back.

    .. math::

        a_t &= g_t + Q^{-1}(e_t) \\
        c_t &= \mathrm{TopK}(a_t) \\
        e_{t+1} &= Q(a_t - c_t) \\
        \hat m_t &= \frac{1 - \beta_1}{1 - \beta_1^t} \sum_{r < \min(t, m)} \beta_1^r c_{t-r} \\
        \hat v_t &= \frac{1 - \beta_2}{1 - \beta_2^t} \sum_{r < \min(t, m)} \beta_2^r c_{t-r}^2 \\
        \theta_{t+1} &= \theta_t - \eta_t \left( \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}
            + \alpha\,Q^{-1}(e_{t+1}) + \lambda \theta_t \right)

    It is the chain of :func:`error_feedback` and :func:`scale_by_window_adam` with decoupled
    weight decay. The published settings are meant for fine-tuning; in pre-training from scratch
    they trail AdamW.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, outside the root.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        density: the share of each block that enters the window; None for the layout's.
        window: :math:`m`, the number of steps in the window; None for the layout's.
        block_size: elements :math:`B` of a block, at most, even; None for the layout's. Where the
            layout's buckets of the residual are its blocks, as in ``"fast"``, they stay so.
        alpha: the share :math:`\alpha` of the residual that is applied directly, in gradient
            units, and leaves it; None switches it off.
        layout: ``"fast"``: 3 of each 256 elements, a window of 10, 4-bit buckets of 256; any
            mesh shards it. ``"pretrain"``: the same 0.88 bytes per parameter spent on ten
            times the elements and a window of one, which pre-trains far better and makes each
            step a sign. ``"paper"``: 1 % of blocks of up to 32768, a window of 10, buckets of
            64: 0.96 bytes. Or a :class:`MicroAdamLayout`, which can say more.

    Returns:
        The optimizer.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, ``density``, ``window``
            or ``block_size`` is traced (``optax.inject_hyperparams`` needs ``static_args``),
            ``layout`` is of another class, ``weight_decay`` is a schedule, or a number is an array
            in fewer bits than float32; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, ``layout`` is not a
            known name, ``density`` is outside (0, 1], ``window`` is not a positive integer,
            ``block_size`` is not a positive even integer of at most 32768, or ``alpha`` is outside
            [0, 1); in ``update`` without ``params``, unless ``weight_decay`` is the number 0.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from microadam_jax import microadam
        >>> loss = lambda w: jnp.mean((w - 1.0) ** 2)
        >>> tx = microadam(learning_rate=0.1)
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> params = jnp.zeros((64, 256))
        >>> state = tx.init(params)
        >>> for _ in range(200):
        ...     params, state = step(params, state)
        >>> bool(loss(params) < 0.1)
        True

    Reference: Modoranu et al., MicroAdam (NeurIPS 2024, arXiv 2405.15593), Algorithm 1.
    """
    if isinstance(layout, str):
        if layout not in MICROADAM_LAYOUTS:
            raise ValueError(
                f"Unknown layout {layout!r}; choose one of {sorted(MICROADAM_LAYOUTS)} or pass a "
                "MicroAdamLayout."
            )
        layout = MICROADAM_LAYOUTS[layout]
    if not isinstance(layout, MicroAdamLayout):
        raise TypeError(
            f"layout must be one of {sorted(MICROADAM_LAYOUTS)} or a MicroAdamLayout; got "
            f"{layout!r}."
        )
    layout = layout.with_settings(density=density, window=window, block_size=block_size)
    return descend(
        error_feedback(layout.compressor, layout.residual, alpha),
        scale_by_window_adam(layout.compressor, layout.window, b1, b2, eps),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        together=compressed_where_read,
    )
