"""Number formats in which states are kept."""

from microadam_jax.codecs.affine import Affine4, AffineCodes, affine4
from microadam_jax.codecs.codec import Codec, as_codec, encoded_bytes
from microadam_jax.codecs.float8 import Float8, float8
from microadam_jax.codecs.low_bit import dynamic4, dynamic8, int4, linear2, linear4
from microadam_jax.codecs.nf4 import Nf4, Nf4Codes, nf4
from microadam_jax.codecs.plain import Plain, PlainValues
from microadam_jax.codecs.rank1 import RankOne, rank1_dynamic4, rank1_linear4
from microadam_jax.codecs.scaled import Scaled
from microadam_jax.codecs.storage import Storage, StoredLeaf, Unstored, as_storage

__all__ = [
    "Affine4",
    "AffineCodes",
    "Codec",
    "Float8",
    "Nf4",
    "Nf4Codes",
    "Plain",
    "PlainValues",
    "RankOne",
    "Scaled",
    "Storage",
    "StoredLeaf",
    "Unstored",
    "affine4",
    "as_codec",
    "as_storage",
    "dynamic4",
    "dynamic8",
    "encoded_bytes",
    "float8",
    "int4",
    "linear2",
    "linear4",
    "nf4",
    "rank1_dynamic4",
    "rank1_linear4",
]
