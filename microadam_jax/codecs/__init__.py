"""Number formats in which states are kept."""

from microadam_jax.codecs.affine import Affine4, AffineCodes, affine4
from microadam_jax.codecs.codec import Codec, as_codec
from microadam_jax.codecs.plain import Plain, PlainValues

__all__ = ["Affine4", "AffineCodes", "Codec", "Plain", "PlainValues", "affine4", "as_codec"]
