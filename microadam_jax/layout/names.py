"""What the layers of transformers and convolutional networks are called, and what their axes are.

The names are those of Flax Linen and NNX, Hugging Face, MaxText, Gemma, timm and their torch
originals.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from microadam_jax.arguments import require_positive
from microadam_jax.layout.axes import ELEMENTWISE, Axes, Fused, Kernel

Rule = tuple[str, Axes | Fused | Kernel]

QUERY = r"(query|query_proj|q_proj|wq|q|to_q|c_q)"
KEY = r"(key|key_proj|k_proj|wk|k|to_k|c_k)"
VALUE = r"(value|value_proj|v_proj|wv|v|to_v|c_v)"
# All queries, then all keys, then all values. `query_key_value` has them head by head in some
# models, so it is cut only where it has an axis for them.
CONCATENATED = r"(qkv|qkv_proj|c_attn|Wqkv|to_qkv)"
FUSED = rf"({CONCATENATED}|query_key_value)"
OUTPUT = r"(out|o_proj|out_proj|wo|to_out)"
NORM = r"([^/]*[Nn]orm(_?(\d+|f|final|out|pre|post))?|ln(_?\w+)?)"
LORA = r"lora_?(a|b|A|B|down|up)"
EXPERTS = r"[^/]*([Ee]xperts?|[Mm][Oo][Ee]|MoeBlock)(_\d+)?"
CONVOLUTION = r"([^/]*[Cc]onv[^/]*|[^/]*patch_embed[^/]*/proj(ection)?)"
EMBEDDINGS = (
    r"(embed_(tokens|positions)|((word|token|tok|position(al)?|pos|token_type)_)?emb(ed(d(ing|er))?s?)?|"
    r"pos|shared|wte|wpe)"
)
POSITIONS = r"(pos(ition)?_?embed(ding)?s?|posemb\w*|wpe)"
TOKENS = r"((cls|dist|mask|reg|register|class)(_tokens?)?)"


def transformer_rules(
    heads: int | None = None,
    kv_heads: int | None = None,
    weight: Literal["in out", "out in"] | None = None,
) -> tuple[Rule, ...]:
    r"""Returns Adam-mini's blocks, by the names that frameworks give to layers.

    One second moment for each head of a query or key, for each output of any other linear map
    or convolution, for each token of an embedding, for each position of a position embedding,
    and for a whole norm scale; biases share nothing. Convolutions and positions are cut finer
    than in the paper, which has one number for the whole tensor. A kernel that may as well be a
    stack of layers, such as a convolution of uneven sides, follows no rule.

    Args:
        heads: how many query heads the kernels ``(embed, heads * head_dim)`` have. Kernels
            ``(embed, heads, head_dim)`` tell it themselves. None: such a kernel keeps a number
            for each output, which is finer than for each head and takes hardly more memory.
        kv_heads: how many key and value heads; None means as many as ``heads``.
        weight: the axes of matrices that are called ``weight``: ``"in out"`` or, as in torch and
            Equinox, ``"out in"``. None: the name does not tell, so they follow no rule.

    Returns:
        Pairs of a path pattern and the axes, for :class:`Partition`.

    Raises:
        ValueError: if ``weight`` is not one of those, a number of heads is not a positive integer,
            or ``kv_heads`` does not divide ``heads``.

    Reference: Adam-mini (arXiv 2406.16793), Algorithm 3 and Section 2.3.
    """
    if weight not in (None, "in out", "out in"):
        raise ValueError(f"weight must be 'in out', 'out in' or None; got {weight!r}.")
    for name, count in (("heads", heads), ("kv_heads", kv_heads)):
        if count is not None:
            require_positive(name, count)
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads is not None and (heads is None or heads % kv_heads):
        raise ValueError(f"kv_heads={kv_heads} must divide heads={heads}.")
    return (
        (r"b|beta|offset|[^/]*[Bb]ias", ELEMENTWISE),
        (rf"scale|gamma|{NORM}/(weight|kernel|w)", Axes("feature ->")),
        (rf"(embeddings?|input_embedding|{EMBEDDINGS}/weight|wte)", Axes("token embed -> token")),
        (POSITIONS, Axes("position embed -> position")),
        (rf"{POSITIONS}|{TOKENS}", Axes("one position embed -> position", one=1)),
        (rf"{EXPERTS}/(.*/)?[^/]+", Axes("expert in | out -> expert out")),
        (rf"{EXPERTS}/(.*/)?[^/]+", Axes("layer expert in | out -> layer expert out")),
        *_gemma(),
        *(_linear_maps("weight", heads, kv_heads) if weight == "in out" else ()),
        *(_torch_linear_maps(heads, kv_heads) if weight == "out in" else ()),
        *((name, Kernel(axes)) for name, axes in _linear_maps("(kernel|w)", heads, kv_heads)),
    )


def _linear_maps(
    leaf: str, heads: int | None, kv_heads: int | None
) -> Iterator[tuple[str, Axes | Fused]]:
    """Kernels from ``in`` to ``out``."""
    yield rf"[^/]*{LORA}(/{leaf})?", Axes("in | out -> out")
    for name, count in ((QUERY, heads), (KEY, kv_heads)):
        if count is not None:
            yield (rf"{name}/{leaf}", Axes("embed | (heads head_dim) -> heads", heads=count))
        yield rf"{name}/{leaf}", Axes("embed | heads head_dim -> heads", where=_few_heads)
    yield rf"{VALUE}/{leaf}", Axes("embed | heads head_dim -> heads head_dim", where=_few_heads)
    yield (
        rf"({OUTPUT}|[^/]*[Aa]tt[^/]*/proj)/{leaf}",
        Axes("heads head_dim | embed -> embed", where=_small_heads),
    )
    if heads is not None and kv_heads is not None:
        yield (
            rf"{CONCATENATED}/{leaf}",
            Fused(
                (
                    Axes("embed | (heads head_dim) -> heads", heads=heads),
                    Axes("embed | (heads head_dim) -> heads", heads=kv_heads),
                    Axes("embed | out -> out"),
                ),
                shares=(heads, kv_heads, kv_heads),
            ),
        )
    head = Axes("embed | slot heads head_dim -> slot heads", slot=1)
    each = Axes("embed | slot heads head_dim -> slot heads head_dim", slot=1)
    yield rf"{FUSED}/{leaf}", Fused((head, head, each), axis=1)
    yield rf"{FUSED}/{leaf}", Axes("embed | slot out -> slot out", slot=3)
    yield rf"{CONVOLUTION}/{leaf}", Axes("width in | out -> out")
    for space in ("height width", "depth height width"):
        image = Axes(f"{space} in | out -> out", where=_even_sides_or_one)
        yield rf"{CONVOLUTION}/{leaf}", image
    attention = rf"({QUERY}|{KEY}|{VALUE}|{FUSED}|{OUTPUT}|proj|\w*einsum)"
    yield _unless(attention, leaf), Axes("height width in | out -> out", where=_even_sides)
    yield _unless(NORM, leaf), Axes("in | out -> out")


def _torch_linear_maps(
    heads: int | None, kv_heads: int | None
) -> Iterator[tuple[str, Axes | Fused]]:
    """Weights from ``in`` to ``out`` that lie the other way, as in torch and Equinox."""
    yield rf"[^/]*{LORA}(/weight)?", Axes("out | in -> out")
    if heads is not None and kv_heads is not None:
        query, key = (Axes("(heads head_dim) | embed -> heads", heads=n) for n in (heads, kv_heads))
        yield rf"{QUERY}/weight", query
        yield rf"{KEY}/weight", key
        yield (
            rf"{CONCATENATED}/weight|in_proj_weight",
            Fused(
                (query, key, Axes("out | embed -> out")), axis=0, shares=(heads, kv_heads, kv_heads)
            ),
        )
    yield "in_proj_weight", Axes("out | in -> out")
    yield rf"{CONVOLUTION}/weight", Axes("out | in width -> out")
    volume = Axes("out | in depth height width -> out", where=_even_sides)
    yield rf"{CONVOLUTION}/weight", volume
    yield "weight", Axes("out | in height width -> out", where=_even_sides)
    yield _unless(NORM, "weight"), Axes("out | in -> out")


def _gemma() -> Iterator[tuple[str, Axes | Fused]]:
    """The einsum kernels of Gemma, whose heads come first.

    Its gating kernel ``(2, in, out)`` is ``(2, out, in)`` in some versions, so no rule names it.
    """
    key = Axes("slot heads embed head_dim -> slot heads", slot=1)
    value = Axes("slot heads embed head_dim -> slot heads head_dim", slot=1)
    yield "q_einsum/w", Axes("heads embed head_dim -> heads")
    yield "kv_einsum/w", Fused((key, value), axis=0)
    yield "qkv_einsum/w", Fused((key, key, value), axis=0)
    yield "attn_vec_einsum/w", Axes("heads head_dim | embed -> embed")
    yield "mlp/linear", Axes("in | out -> out")


def _unless(layer: str, leaf: str) -> str:
    """A pattern for ``leaf`` in anything but ``layer``."""
    return rf"^{leaf}|(?!{layer}/)[^/]+/{leaf}"


# What tells (embed, heads, head_dim), (heads, head_dim, embed) and (height, width, in, out) from a
# stack of matrices that nothing has marked as one: a model has fewer heads, and fewer elements in
# each, than features, about as many in all, and its convolutions are mostly square.
def _few_heads(sizes: Mapping[str, int]) -> bool:
    return sizes["heads"] < sizes["embed"]


def _small_heads(sizes: Mapping[str, int]) -> bool:
    heads, head_dim, embed = sizes["heads"], sizes["head_dim"], sizes["embed"]
    return heads == 1 or (max(heads, head_dim) < embed and heads * head_dim <= 4 * embed)


def _even_sides(sizes: Mapping[str, int]) -> bool:
    return len({sizes[name] for name in ("depth", "height", "width") if name in sizes}) == 1


def _even_sides_or_one(sizes: Mapping[str, int]) -> bool:
    return _even_sides(sizes) or sizes.get("depth", sizes["height"]) == 1
