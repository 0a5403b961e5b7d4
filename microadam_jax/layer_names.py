"""What the layers of transformers and convolutional networks are called, and what their axes are.

The names are those of Flax Linen and NNX, Hugging Face, MaxText, Gemma, timm and their torch
originals.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from microadam_jax.axes import ELEMENTWISE, Axes, Fused

Rule = tuple[str, Axes | Fused]

# Containers of layers that nn.scan, nnx.vmap and MaxText stack: no number follows them.
STACKED = r"(^|/)(\w*_)?(layers|blocks|stack|h)/(?!\d+(/|$))|(^|/)(Scan|Vmap)\w*_\d+/"

QUERY = r"(query|q_proj|wq|q|to_q|c_q)"
KEY = r"(key|k_proj|wk|k|to_k|c_k)"
VALUE = r"(value|v_proj|wv|v|to_v|c_v)"
FUSED = r"(qkv|qkv_proj|c_attn|Wqkv|to_qkv|query_key_value)"
OUTPUT = r"(out|o_proj|out_proj|wo|to_out|proj)"
NORM = r"([^/]*[Nn]orm(_?\d+)?|ln(_?\w+)?)"
LORA = r"lora_?(a|b|A|B|down|up)"
EXPERTS = r"[^/]*([Ee]xperts?|[Mm][Oo][Ee]|MoeBlock)(_\d+)?"
CONVOLUTION = r"[^/]*[Cc]onv[^/]*"
EMBEDDINGS = (
    r"(embed_tokens|embed_positions|(word|token|tok|position|token_type)_embeddings?|"
    r"embedding|shared|wte|wpe)"
)
POSITIONS = r"(pos(ition)?_?embed(ding)?s?|posemb\w*|wpe)"
TOKENS = r"((cls|dist|mask|reg|register|class)(_tokens?)?)"


def transformer_rules(
    heads: int | None = None,
    kv_heads: int | None = None,
    weight: Literal["in out", "out in"] | None = None,
) -> tuple[Rule, ...]:
    r"""Adam-mini's blocks, by the names that frameworks give to layers.

    One second moment for each head of a query or key, for each output of any other linear map
    or convolution, for each token of an embedding, for each position of a position embedding,
    and for a whole norm scale; biases share nothing. Convolutions and positions are cut finer
    than in the paper, which has one number for the whole tensor.

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
        ValueError: if ``weight`` is none of those, or ``kv_heads`` does not divide ``heads``.

    Reference: Adam-mini (arXiv 2406.16793), Algorithm 3 and Section 2.3.
    """
    if weight not in (None, "in out", "out in"):
        raise ValueError(f"weight must be 'in out', 'out in' or None; got {weight!r}.")
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads is not None and (heads is None or kv_heads < 1 or heads % kv_heads):
        raise ValueError(f"kv_heads={kv_heads} must divide heads={heads}.")
    return (
        (r"b|beta|[^/]*[Bb]ias", ELEMENTWISE),
        (rf"scale|gamma|{NORM}/(weight|kernel|w)", Axes("feature ->")),
        (rf"(embeddings?|input_embedding|{EMBEDDINGS}/weight|wte)", Axes("token embed -> token")),
        (POSITIONS, Axes("position embed -> position")),
        (rf"{POSITIONS}|{TOKENS}", Axes("one position embed -> position", one=1)),
        (rf"{EXPERTS}/(.*/)?[^/]+", Axes("expert in | out -> expert out")),
        *_gemma(),
        *_linear_maps("(kernel|w)", heads, kv_heads),
        *(_linear_maps("weight", heads, kv_heads) if weight == "in out" else ()),
        *(_torch_linear_maps(heads, kv_heads) if weight == "out in" else ()),
    )


def _linear_maps(leaf: str, heads: int | None, kv_heads: int | None) -> Iterator[Rule]:
    """Kernels from ``in`` to ``out``."""
    yield rf"[^/]*{LORA}(/{leaf})?", Axes("in | out -> out")
    for name, count in ((QUERY, heads), (KEY, kv_heads)):
        if count is not None:
            yield (
                rf"{name}/{leaf}",
                Axes("embed | (heads head_dim) -> heads", heads=count),
            )
        yield rf"{name}/{leaf}", Axes("embed | heads head_dim -> heads", where=_few_heads)
    yield rf"{VALUE}/{leaf}", Axes("embed | heads head_dim -> heads head_dim", where=_few_heads)
    yield rf"{OUTPUT}/{leaf}", Axes("heads head_dim | embed -> embed", where=_small_heads)
    if heads is not None and kv_heads is not None:
        yield (
            rf"{FUSED}/{leaf}",
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
    yield rf"{CONVOLUTION}/{leaf}", Axes("depth height width in | out -> out")
    yield leaf, Axes("height width in | out -> out")
    yield leaf, Axes("in | out -> out")


def _torch_linear_maps(heads: int | None, kv_heads: int | None) -> Iterator[Rule]:
    """Weights from ``in`` to ``out`` that lie the other way, as in torch and Equinox."""
    yield rf"[^/]*{LORA}(/weight)?", Axes("out | in -> out")
    if heads is not None and kv_heads is not None:
        query, key = (Axes("(heads head_dim) | embed -> heads", heads=n) for n in (heads, kv_heads))
        yield rf"{QUERY}/weight", query
        yield rf"{KEY}/weight", key
        yield (
            rf"{FUSED}/weight|in_proj_weight",
            Fused(
                (query, key, Axes("out | embed -> out")),
                axis=0,
                shares=(heads, kv_heads, kv_heads),
            ),
        )
    yield "in_proj_weight", Axes("out | in -> out")
    for space in ("", "width", "height width", "depth height width"):
        yield "weight", Axes(f"out | in {space} -> out")


def _gemma() -> Iterator[Rule]:
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


# What tells (embed, heads, head_dim) and (heads, head_dim, embed) from a stack of matrices that
# nothing has marked as one: a model has fewer heads, and fewer elements in each, than features.
def _few_heads(sizes: Mapping[str, int]) -> bool:
    return sizes["heads"] <= sizes["embed"]


def _small_heads(sizes: Mapping[str, int]) -> bool:
    return sizes["head_dim"] < sizes["embed"] or sizes["heads"] == 1
