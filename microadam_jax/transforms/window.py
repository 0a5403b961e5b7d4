"""How a window of gradients is kept."""

import dataclasses

import jax

from microadam_jax.arguments import if_traced, require_positive


@dataclasses.dataclass(frozen=True)
class Window:
    r"""Describes a window of the latest updates.

    Args:
        length: rows :math:`m`, one for each of the latest steps.
        dtype: of the stored values, ``"bfloat16"`` or ``"float32"``.
        normalized: False for the published statistics. MicroAdam's divide the sum over the
            window by :math:`1 - \beta^t` and so grow the step of an element that is always
            selected up to 6.5 times over the first :math:`1 / (1 - \beta_2)` steps; M-FAC's
            divide by :math:`m` before :math:`m` rows are filled. True divides by
            :math:`1 - \beta^{\min(t, m)}`, a weighted mean over the window with no such
            growth and thus another learning rate, and by :math:`\min(t, m)`.

    Raises:
        ValueError: if ``length`` is not a positive integer, or ``dtype`` is another.
    """

    length: int = 10
    dtype: str = "bfloat16"
    normalized: bool = False

    def __post_init__(self) -> None:
        require_positive("Window.length", self.length, "window")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"Window.dtype must be 'bfloat16' or 'float32'; got {self.dtype!r}.")


def as_window(window: Window | int | jax.Array) -> Window:
    """``window``, or a :class:`Window` of that length.

    Raises:
        TypeError: if the length is a traced array, or neither an integer nor a :class:`Window`.
        ValueError: if the length is not positive.
    """
    window = Window(window) if isinstance(window, int) else window
    if not isinstance(window, Window):
        raise TypeError(
            f"window must be a number of steps or a Window, Window(10); got {window!r}."
            + if_traced(window, "window")
        )
    return window
