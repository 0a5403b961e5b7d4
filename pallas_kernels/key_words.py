"""Random keys as words that a hash and a kernel can take."""

import jax
import jax.numpy as jnp


def key_words(key: jax.Array) -> jax.Array:
    """Returns two words of a random key of any generator.

    They are the first and the last word of its data. Those of ``threefry2x32``, the default of
    JAX, are all that there is. A key of ``rbg`` consists of two equal threefry keys, so that it
    has the same two words, and what is drawn from them is the same with both generators. A key of
    ``unsafe_rbg`` has other words after ``jax.random.fold_in``, and other ones on another kind of
    device.

    Args:
        key: a typed random key, a scalar.

    Returns:
        int32, of shape ``(2,)``.

    Examples:
        >>> import jax
        >>> from pallas_kernels.key_words import key_words
        >>> for generator in ("threefry2x32", "rbg"):
        ...     print(key_words(jax.random.key(7, impl=generator)))
        [0 7]
        [0 7]
    """
    words = jax.random.key_data(key).astype(jnp.int32)
    return words if words.size == 2 else jnp.stack([words[0], words[-1]])
