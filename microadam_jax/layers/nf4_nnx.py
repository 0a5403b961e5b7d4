"""Linear layers of Flax NNX with frozen weights in NF4."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from microadam_jax.codecs.nf4 import Nf4, Nf4Codes, nf4
from microadam_jax.layers.nf4_linear import nf4_linear

DEFAULTS = inspect.signature(nnx.Linear.__init__).parameters
PLACEMENT = "out_sharding", "mesh", "eager_sharding"  # of a Variable, in Flax


class FrozenWeight(nnx.Variable):
    """Holds an array of frozen weights; no ``nnx.Param``, so that gradients pass it by."""


class Nf4Linear(nnx.Module):
    """Replaces a trained ``nnx.Linear`` by one with a frozen kernel in double-quantized NF4.

    The bias stays an ``nnx.Param`` in its dtype. As ``base_module`` of ``nnx.LoRA`` it makes QLoRA.
    ``precision`` and ``preferred_element_type`` of the layer have no effect on it.

    Args:
        linear: the layer to quantize. Its kernel may have axes of stacked layers in front; then
            each layer is quantized by itself, and the module is to be used in a scan over them.
        codec: the format.

    Raises:
        TypeError: if ``linear`` is another layer, or ``codec`` another format.
        ValueError: if ``linear`` has a ``dot_general`` or a ``promote_dtype`` of its own.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from microadam_jax.layers.nnx import Nf4Linear
        >>> layer = Nf4Linear(nnx.Linear(64, 128, rngs=nnx.Rngs(0)))
        >>> layer(jnp.ones((3, 64))).shape, [x.shape for x in layer.codes]
        ((3, 128), [(64, 64), (64, 2), (1,), ()])

    Reference: Dettmers et al., QLoRA (arXiv 2305.14314), Section 3.
    """

    def __init__(self, linear: nnx.Linear, codec: Nf4 = nf4()) -> None:
        """Quantizes the kernel."""
        if not isinstance(codec, Nf4):
            raise TypeError(f"codec must be one that nf4() returns; got {codec!r}.")
        if not isinstance(linear, nnx.Linear):
            raise TypeError(f"Only an nnx.Linear can be quantized; got {type(linear).__name__}.")
        require_plain_product(linear)
        kernel = linear.kernel[...]
        encode = codec.encode
        for _ in kernel.shape[:-2]:
            encode = jax.vmap(encode)
        codes, *others = encode(kernel)
        # The codes have the kernel's axes, and its names for them.
        known = linear.kernel.get_metadata()
        self._codes = FrozenWeight(codes, **{k: known[k] for k in PLACEMENT if k in known})
        self._scales, self._groups, self._mean = map(FrozenWeight, others)
        self.bias = linear.bias
        self.in_features, self.out_features = kernel.shape[-2:]
        self.codec, self.dtype, self.param_dtype = codec, linear.dtype, kernel.dtype

    @property
    def codes(self) -> Nf4Codes:
        """Returns the quantized kernel."""
        return Nf4Codes(self._codes[...], self._scales[...], self._groups[...], self._mean[...])

    def __call__(self, inputs: jax.Array, *, out_sharding: Any = None) -> jax.Array:
        """Multiplies ``(..., in)`` by the kernel, and adds the bias if there is one.

        Args:
            inputs: ``(..., in)``.
            out_sharding: of the product, as for ``nnx.Linear``.

        Raises:
            ValueError: if the last axis of ``inputs`` is not ``in``, or the layer is a stack, which
                a scan takes apart.
        """
        x = inputs.astype(self.dtype or jnp.result_type(inputs, self.param_dtype))
        shape = self.in_features, self.out_features
        y = nf4_linear(x, self.codes, shape, self.codec, out_sharding=out_sharding)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def quantize_linears(model: nnx.Module, codec: Nf4 = nf4()) -> int:
    """Replaces each ``nnx.Linear`` inside a model by an :class:`Nf4Linear`, in place.

    Embeddings, norms and biases stay as they are, and so does ``nnx.LinearGeneral``, of which
    ``nnx.MultiHeadAttention`` consists. To keep a layer as well, such as an output
    head, pass the part of the model without it.

    Args:
        model: the model or a part of it, with weights. Stacked layers are fine.
        codec: the format.

    Returns:
        The number of layers replaced; stacked layers count once.

    Raises:
        TypeError: if ``codec`` is another format.
        ValueError: if there is none, or one has a ``dot_general`` or a ``promote_dtype`` of its
            own.

    Examples:
        >>> from flax import nnx
        >>> from microadam_jax.layers.nnx import quantize_linears
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(8, 64, rngs=rngs), nnx.relu)
        >>> quantize_linears(model)
        1
    """

    def quantized(linear: nnx.Linear | Nf4Linear) -> nnx.Module:
        return linear if isinstance(linear, Nf4Linear) else Nf4Linear(linear, codec)

    count = replace_linears(model, quantized)
    if not count:
        raise ValueError(
            f"There is no nnx.Linear to quantize in this {type(model).__name__}: pass a model that "
            "has some; a single layer is replaced by Nf4Linear(layer)."
        )
    return count


def require_plain_product(linear: nnx.Linear) -> None:
    """Refuses a layer that multiplies in another way than ``nnx.Linear`` by default.

    Raises:
        ValueError: if it has a ``dot_general`` or a ``promote_dtype`` of its own.
    """
    for name in "dot_general", "promote_dtype":
        if (given := getattr(linear, name)) is not DEFAULTS[name].default:
            raise ValueError(
                f"This layer multiplies by codes and cannot call {name}={given!r}. Leave it away, "
                "or keep this layer an nnx.Linear."
            )


def replace_linears(model: nnx.Module, make: Callable[[Any], nnx.Module]) -> int:
    """Replaces each ``nnx.Linear`` and :class:`Nf4Linear` inside a model, in place.

    Layers of a subclass, such as ``nnx.LoRALinear``, stay: they have more than a kernel. A layer
    that stands in several places is replaced by one.

    Args:
        model: the model.
        make: takes a layer and returns what is to be in its place, which may hold it.

    Returns:
        The number of layers replaced.

    Examples:
        QLoRA with Flax's own adapters:

        >>> from flax import nnx
        >>> from microadam_jax.layers.nnx import quantize_linears, replace_linears
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=rngs), nnx.relu)
        >>> quantize_linears(model)
        1
        >>> def adapted(base):
        ...     return nnx.LoRA(base.in_features, 4, base.out_features, base_module=base, rngs=rngs)
        >>> replace_linears(model, adapted)
        1
        >>> list(nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))["layers"][0])
        ['lora_a', 'lora_b']
    """
    new: dict[int, tuple[nnx.Module, nnx.Module]] = {}  # with the old, so that none gets its id

    def replaced(value: Any) -> Any:
        """``value``, or what is to be in its place."""
        if type(value) in (nnx.Linear, Nf4Linear):
            if id(value) not in new:
                new[id(value)] = value, make(value)
            return new[id(value)][1]
        if type(value) is list:
            value[:] = map(replaced, value)
        elif type(value) is dict:
            value |= {name: replaced(one) for name, one in value.items()}
        elif isinstance(value, tuple):
            items = list(map(replaced, value))
            if any(one is not old for one, old in zip(items, value, strict=True)):
                return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    for _, parent in list(nnx.iter_graph(model)):
        if isinstance(parent, nnx.Module):
            for name, child in list(vars(parent).items()):
                if (instead := replaced(child)) is not child:
                    setattr(parent, name, instead)
    return len(new)
