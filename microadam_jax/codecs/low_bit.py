"""Codecs of 8, 4 and 2 bits over the scale of a block."""

import dataclasses

from microadam_jax.blocks import Blocks
from microadam_jax.codecs.maps import (
    DYNAMIC4,
    DYNAMIC4_SYMMETRIC,
    DYNAMIC4_UNSIGNED,
    INT4,
    LINEAR2,
    LINEAR4,
    LINEAR4_UNSIGNED,
    Dynamic8,
)
from microadam_jax.codecs.scaled import Scaled, as_blocks


def dynamic8(
    block: int | Blocks = 256,
    *,
    signed: bool = True,
    rounding: str = "nearest",
    keep_sign: bool = False,
    symmetric: bool = False,
) -> Scaled:
    """Returns 8 bits on the dynamic exponent map: seven decades, finest at the top.

    Args:
        block: the largest number of elements that share a scale, or the rule that cuts rows.
        signed: False spends the sign's bit on a finer map, for second moments.
        rounding: ``"nearest"`` or ``"stochastic"``.
        keep_sign: whether a negative number never becomes zero; without a sign, a positive one.
        symmetric: whether -1 has a code, in place of 0. As published, a block whose largest
            element is negative loses 0.7 % of it each time.

    Returns:
        The codec.

    Raises:
        TypeError: if ``block`` is neither an integer nor a :class:`Blocks`.
        ValueError: if ``block`` is not positive and even, ``rounding`` is not one of those, or
            options contradict each other, such as ``symmetric=True`` and ``signed=False``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.codecs import dynamic8
        >>> codec = dynamic8()
        >>> x = jnp.array([0.9, -0.9, 0.05, 1e-4])
        >>> print(codec.encode(x).codes)
        [255   0 175 134]

    Reference: Dettmers et al. (arXiv 2110.02861), Section 2.2.
    """
    if symmetric and not signed:
        raise ValueError("symmetric=True asks for a code of -1, which signed=False rules out.")
    return Scaled(Dynamic8(signed, symmetric), as_blocks(block), rounding, keep_sign)


def dynamic4(
    block: int | Blocks = 128,
    *,
    signed: bool = True,
    rounding: str = "nearest",
    keep_sign: bool = False,
    symmetric: bool = False,
) -> Scaled:
    """Returns 4 bits on the dynamic exponent map: three decades, finest at the top.

    Args:
        block: the largest number of elements that share a scale, or the rule that cuts rows.
        signed: False takes the unsigned map without zero ("DE-0"), for second moments.
        rounding: ``"nearest"`` or ``"stochastic"``.
        keep_sign: whether a negative number never becomes zero; there is no zero without a sign.
        symmetric: whether -1 has a code, in place of 0. As published, a block whose largest
            element is negative loses 11 % of it each time.

    Returns:
        The codec.

    Raises:
        TypeError: if ``block`` is neither an integer nor a :class:`Blocks`.
        ValueError: if ``block`` is not positive and even, ``rounding`` is not one of those, or
            options contradict each other, such as ``symmetric=True`` and ``signed=False``.

    Reference: Li et al., 4-bit optimizers (arXiv 2309.01507), Section 3 and Appendix E.
    """
    if symmetric and not signed:
        raise ValueError("symmetric=True asks for a code of -1, which signed=False rules out.")
    signed_map = DYNAMIC4_SYMMETRIC if symmetric else DYNAMIC4
    return Scaled(
        signed_map if signed else DYNAMIC4_UNSIGNED, as_blocks(block), rounding, keep_sign
    )


def linear2(block: int | Blocks = 256, *, rounding: str = "nearest") -> Scaled:
    """Returns 2 bits: half a root mean square of the block and one and a half, of either sign.

    These are nearly the four numbers with the least error for what is normally distributed. What
    is beyond one and a half is cut; rounding is unbiased up to there if it is stochastic, which a
    momentum needs: to nearest, small changes are always lost.

    Args:
        block: the largest number of elements that share a scale, or the rule that cuts rows.
        rounding: ``"nearest"`` or ``"stochastic"``.

    Returns:
        The codec.

    Raises:
        TypeError: if ``block`` is neither an integer nor a :class:`Blocks`.
        ValueError: if ``block`` is no positive multiple of 4, or ``rounding`` is not one of those.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.codecs import linear2
        >>> x = jnp.array([2.0, -3, 0.2, 0])
        >>> codec = linear2()
        >>> print(codec.decode(codec.encode(x), x.shape))
        [ 3. -3.  1. -1.]
    """
    rule = block if isinstance(block, Blocks) else Blocks(block, multiple=4)
    return Scaled(LINEAR2, dataclasses.replace(rule, multiple=4), rounding, deviations=1.5)


def linear4(block: int | Blocks = 128, *, signed: bool = True, rounding: str = "nearest") -> Scaled:
    """Returns 4 bits on evenly spaced numbers.

    Args:
        block: the largest number of elements that share a scale, or the rule that cuts rows.
        signed: sixteen numbers from -1 to 1; False: from 1/16 to 1, without zero, so that no
            second moment vanishes.
        rounding: ``"nearest"`` or ``"stochastic"``.

    Returns:
        The codec.

    Raises:
        TypeError: if ``block`` is neither an integer nor a :class:`Blocks`.
        ValueError: if ``block`` is not positive and even, or ``rounding`` is not one of those.

    Reference: Li et al., 4-bit optimizers (arXiv 2309.01507), Section 4.1.
    """
    return Scaled(LINEAR4 if signed else LINEAR4_UNSIGNED, as_blocks(block), rounding)


def int4(
    block: int | Blocks = 128, *, rounding: str = "nearest", deviations: float | None = 2.5
) -> Scaled:
    """Returns 4 bits on the integers from -7 to 7, for numbers that are normally distributed.

    Of one block's numbers the largest are two and a half to three root mean squares. So the steps
    of a scale that is two and a half are a little finer, little is cut, and one large number does
    not take the bits of all others. Zero stays zero.

    Args:
        block: the largest number of elements that share a scale, or the rule that cuts rows.
        rounding: ``"nearest"`` or ``"stochastic"``, which has no bias up to the cut.
        deviations: the scale in root mean squares of what is not zero in a block, beyond which
            numbers are cut; None for the largest magnitude, which cuts none.

    Returns:
        The codec.

    Raises:
        TypeError: if ``block`` is neither an integer nor a :class:`Blocks`.
        ValueError: if ``block`` is not positive and even, ``rounding`` is not one of those, or
            ``deviations`` is not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.codecs import int4
        >>> x = jnp.array([7.0, -3.2, 0.4, 0])
        >>> codec = int4()
        >>> print(codec.decode(codec.encode(x), x.shape))
        [ 7. -3.  0.  0.]
    """
    return Scaled(INT4, as_blocks(block), rounding, deviations=deviations)
