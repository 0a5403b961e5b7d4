"""Which rule each parameter of well-known models follows, and what it makes of them."""

import dataclasses
import warnings
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from examples.llama.model import ModelConfig, init_params
from microadam_jax import Matrices, Partition, explain_partition, memory_report, scale_by_adam_mini
from microadam_jax.layout.axes import Axes, AxesError, Fused, Shape
from microadam_jax.layout.names import transformer_rules
from microadam_jax.layout.partition import Assignment
from microadam_jax.models import MODELS, model_shapes

# A model of 4 query heads, of which 2 share a key head, each of 4 elements.
EMBED, HEADS, KV, DIM, HIDDEN, VOCAB, LAYERS, EXPERTS = 16, 4, 2, 4, 24, 32, 3, 5
FLAX = Partition(transformer_rules(heads=HEADS, kv_heads=KV))
TORCH = Partition(transformer_rules(heads=HEADS, kv_heads=KV, weight="out in"))


def tree(**shapes: Shape) -> dict[str, Any]:
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}


def assign(path: str, shape: Shape, partition: Partition) -> Assignment:
    (assignment,) = explain_partition(tree(**{path: shape}), partition).assignments
    assert assignment.path == path
    return assignment


@dataclasses.dataclass(frozen=True)
class Row:
    """What is expected of one parameter; ``blocks`` are the numbers kept unless given."""

    path: str
    shape: Shape
    moment_shape: Shape
    blocks: int | None = None

    def check(self, partition: Partition) -> None:
        assignment = assign(self.path, self.shape, partition)
        assert assignment.rule is not None
        assert assignment.sharing.moment_shape == self.moment_shape
        numbers = assignment.bytes // 4
        assert assignment.sharing.blocks == (numbers if self.blocks is None else self.blocks)


def rows(*table: tuple) -> Any:
    """Cases that are called as their parameters are."""
    cases = [Row(*row) for row in table]
    names = [f"{row.path}-{'x'.join(map(str, row.shape))}" for row in cases]
    return pytest.mark.parametrize("row", cases, ids=names)


def is_elementwise(assignment: Assignment) -> bool:
    return assignment.rule is None and assignment.sharing.moment_shape == assignment.shape


# --- The tables of the published code, and of Flax's layouts --------------------------------------


@rows(
    ("layers/0/attn/wv/weight", (8, 16), (8, 1)),
    ("lm_head/weight", (32, 16), (32, 1)),
    ("layers/0/mlp/fc1/weight", (24, 16), (24, 1)),
    ("blocks/0/attn/proj/weight", (16, 16), (16, 1)),
    ("layers/0/self_attn/q_proj/weight", (16, 16), (4, 1)),
    ("layers/0/self_attn/k_proj/weight", (8, 16), (2, 1)),
    ("layers/0/self_attn/q_proj/bias", (16,), (16,)),
    ("layers/0/mlp/fc1/bias", (24,), (24,)),
    ("in_proj_bias", (48,), (48,)),
    ("layers/0/self_attn/q_norm/weight", (4,), (1,)),
    ("layers/0/self_attn/k_norm/weight", (4,), (1,)),
    ("h/0/ln_1/weight", (16,), (1,)),
    ("ln_f/weight", (16,), (1,)),
    ("blocks/0/mlp/norm/weight", (24,), (1,)),
    ("layer/0/attention/output/LayerNorm/weight", (16,), (1,)),
    ("stem/conv/weight", (16, 3, 3, 3), (16, 1, 1, 1)),
    ("patch_embed/proj/weight", (16, 3, 4, 4), (16, 1, 1, 1)),
    ("pos_embed", (1, 9, 16), (1, 9, 1)),
    ("cls_token", (1, 1, 16), (1, 1, 1)),
    ("attn/qkv_proj/weight", (32, 16), (32, 1), 4 + 2 + 8),
    ("self_attn/in_proj_weight", (32, 16), (32, 1), 4 + 2 + 8),
    ("head/weight", (10, 16), (10, 1)),
    ("layer/0/intermediate/dense/weight", (24, 16), (24, 1)),
    ("layer/0/output/dense/weight", (16, 24), (16, 1)),
    ("transformer/wpe/weight", (9, 16), (9, 1)),
    ("mlp/experts/gate_up_proj", (5, 16, 48), (5, 1, 48)),
    ("mlp/experts/down_proj", (5, 24, 16), (5, 1, 16)),
    ("self_attn/q_proj/lora_A", (2, 16), (2, 1)),
    ("self_attn/q_proj/lora_A/weight", (2, 16), (2, 1)),
    ("self_attn/q_proj/lora_B/default/weight", (16, 2), (16, 1)),
    ("embeddings/word_embeddings/weight", (32, 16), (32, 1)),
    ("transformer/wte/weight", (32, 16), (32, 1)),
    ("model/embed_tokens/weight", (32, 16), (32, 1)),
    ("encoder/conv1/weight", (16, 8, 3), (16, 1, 1)),
    ("video/conv/weight", (16, 3, 2, 2, 2), (16, 1, 1, 1, 1)),
)
def test_the_published_table(row: Row) -> None:
    """Table of what the authors' code does, without the rows that crash there or are cut wrong."""
    row.check(TORCH)


@rows(
    ("blocks/0/attn/qkv/weight", (48, 16), (48, 1), 4 + 4 + 16),
    ("self_attn/in_proj_weight", (48, 16), (48, 1), 4 + 4 + 16),
)
def test_fused_projections_of_as_many_keys_as_queries(row: Row) -> None:
    row.check(Partition(transformer_rules(heads=HEADS, weight="out in")))


@rows(
    ("h/0/mlp/c_fc/weight", (16, 64), (1, 64)),
    ("h/0/mlp/c_proj/weight", (64, 16), (1, 16)),
    ("h/0/attn/c_attn/weight", (16, 48), (1, 48), 4 + 4 + 16),
    ("h/0/attn/c_proj/weight", (16, 16), (1, 16)),
    ("h/0/ln_1/weight", (16,), (1,)),
    ("wpe/weight", (9, 16), (9, 1)),
)
def test_weights_that_lie_the_other_way(row: Row) -> None:
    """Hugging Face's GPT-2, whose ``Conv1D`` is a linear map from rows to columns."""
    row.check(Partition(transformer_rules(heads=HEADS, weight="in out")))


@rows(
    ("mlp/Dense_0/kernel", (16, 24), (1, 24)),
    ("embed/embedding", (32, 16), (32, 1)),
    ("lm_head/kernel", (16, 32), (1, 32)),
    ("attention/query/kernel", (16, 4, 4), (1, 4, 1)),
    ("attention/key/kernel", (16, 2, 4), (1, 2, 1)),
    ("attention/value/kernel", (16, 2, 4), (1, 2, 4)),
    ("attention/out/kernel", (4, 4, 16), (1, 1, 16)),
    ("attention/query/kernel", (16, 16), (1, 4)),
    ("attention/key/kernel", (16, 8), (1, 2)),
    ("attention/value/kernel", (16, 8), (1, 8)),
    ("attention/out/kernel", (16, 16), (1, 16)),
    ("attention/qkv/kernel", (16, 3, 4, 4), (1, 3, 4, 4), 4 + 4 + 16),
    ("attention/qkv_proj/kernel", (16, 3, 16), (1, 3, 16)),
    ("attention/qkv/kernel", (16, 32), (1, 32), 4 + 2 + 8),
    ("attention/query/bias", (4, 4), (4, 4)),
    ("mlp/Dense_0/bias", (24,), (24,)),
    ("norm/scale", (16,), (1,)),
    ("LayerNorm_0/scale", (16,), (1,)),
    ("Conv_0/kernel", (3, 3, 8, 16), (1, 1, 1, 16)),
    ("Conv_0/kernel", (5, 8, 16), (1, 1, 16)),
    ("Conv_0/kernel", (3, 3, 3, 8, 16), (1, 1, 1, 1, 16)),
    ("stem/kernel", (7, 7, 3, 16), (1, 1, 1, 16)),
    ("patch_embed/proj/kernel", (4, 4, 3, 16), (1, 1, 1, 16)),
    ("pos_embed", (1, 9, 16), (1, 9, 1)),
    ("posembed_input/pos_embedding", (1, 9, 16), (1, 9, 1)),
    ("pos_embedding", (9, 16), (9, 1)),
    ("cls", (1, 1, 16), (1, 1, 1)),
    ("moe/experts/wi", (5, 16, 24), (5, 1, 24)),
    ("MoeBlock_0/wo", (5, 24, 16), (5, 1, 16)),
    ("attn/lora_a", (16, 2), (1, 2)),
    ("attn/lora_b/kernel", (2, 16), (1, 16)),
)
def test_the_table_of_flax_layouts(row: Row) -> None:
    row.check(FLAX)


# --- Heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "shape", "moment_shape"),
    [
        ("q_proj/weight", (16, 8), (2, 1)),
        ("k_proj/weight", (8, 8), (1, 1)),
        ("v_proj/weight", (8, 8), (8, 1)),
        ("o_proj/weight", (8, 16), (8, 1)),
        ("q_proj/kernel", (8, 16), (1, 2)),
        ("query/kernel", (8, 2, 8), (1, 2, 1)),
        ("key/kernel", (8, 1, 8), (1, 1, 1)),
    ],
)
def test_heads_may_be_larger_than_their_share_of_the_features(
    path: str, shape: Shape, moment_shape: Shape
) -> None:
    """Two heads of 8 over 8 features, as in Qwen3 and Gemma; the authors' code cuts across them."""
    rules = transformer_rules(heads=2, kv_heads=1, weight="out in")
    Row(path, shape, moment_shape).check(Partition(rules))


def test_each_query_head_of_a_group_has_its_own_number() -> None:
    rules = Partition(transformer_rules(heads=8, kv_heads=2))
    Row("q_proj/kernel", (16, 32), (1, 8)).check(rules)
    Row("k_proj/kernel", (16, 8), (1, 2)).check(rules)
    Row("qkv/kernel", (16, 48), (1, 48), 8 + 2 + 8).check(rules)


@rows(
    ("q_proj/kernel", (16, 16), (1, 16)),
    ("k_proj/kernel", (16, 8), (1, 8)),
    ("qkv/kernel", (16, 48), (1, 48)),
    ("qkv/kernel", (16, 3, 4, 4), (1, 3, 4, 4), 24),
    ("query/kernel", (16, 4, 4), (1, 4, 1)),
    ("q_proj/weight", (16, 16), (16, 1)),
    ("in_proj_weight", (48, 16), (48, 1)),
)
def test_without_a_number_of_heads_each_output_has_its_own(row: Row) -> None:
    row.check(Partition(transformer_rules(weight="out in")))


@rows(
    ("q_proj/kernel", (16, 18), (1, 18)),
    ("qkv/kernel", (16, 30), (1, 30)),
    ("q_proj/weight", (18, 16), (18, 1)),
)
def test_outputs_that_are_no_whole_heads_have_their_own(row: Row) -> None:
    row.check(TORCH)


@rows(
    ("query_key_value/kernel", (16, 48), (1, 48)),
    ("query_key_value/weight", (48, 16), (48, 1)),
    ("query_key_value/kernel", (16, 3, 4, 4), (1, 3, 4, 4), 24),
)
def test_a_projection_that_may_go_head_by_head_is_cut_only_by_its_axes(row: Row) -> None:
    """``query_key_value`` of BLOOM and GPT-NeoX has query, key and value of one head together."""
    rules = transformer_rules(heads=HEADS, weight="out in")
    row.check(Partition(rules))


@pytest.mark.parametrize(
    "name",
    [
        "word",
        "two",
        "network",
        "key_value_store",
        "keyboard",
        "value_head",
        "output",
        "subquery",
        "query_norm_mlp",
        "linear_attention_gate",
        "wqx",
    ],
)
def test_parts_of_names_match_no_rule_of_attention(name: str) -> None:
    """The authors' code looks for ``wo``, ``key`` and ``value`` anywhere in a name."""
    Row(f"{name}/kernel", (16, 16), (1, 16)).check(FLAX)
    Row(f"{name}/weight", (16, 16), (16, 1)).check(TORCH)
    assert is_elementwise(assign(f"{name}/kernel", (16, 4, 4), FLAX))


def test_a_container_with_the_name_of_a_layer_matches_nothing() -> None:
    Row("query/dense/kernel", (16, 16), (1, 16)).check(FLAX)
    Row("key/norm/scale", (16,), (1,)).check(FLAX)
    assert is_elementwise(assign("embedding/table", (32, 16), FLAX))


def test_weights_follow_no_rule_unless_it_is_said_how_they_lie() -> None:
    assert is_elementwise(assign("mlp/fc1/weight", (24, 16), FLAX))
    assert is_elementwise(assign("q_proj/weight", (16, 16), FLAX))
    Row("norm/weight", (16,), (1,)).check(FLAX)
    Row("embed_tokens/weight", (32, 16), (32, 1)).check(FLAX)


# --- Models ---------------------------------------------------------------------------------------


@rows(
    ("model/embed_tokens/weight", (32, 16), (32, 1)),
    ("model/layers/0/self_attn/q_proj/weight", (16, 16), (4, 1)),
    ("model/layers/0/self_attn/k_proj/weight", (8, 16), (2, 1)),
    ("model/layers/0/self_attn/v_proj/weight", (8, 16), (8, 1)),
    ("model/layers/0/self_attn/o_proj/weight", (16, 16), (16, 1)),
    ("model/layers/0/mlp/gate_proj/weight", (24, 16), (24, 1)),
    ("model/layers/0/mlp/up_proj/weight", (24, 16), (24, 1)),
    ("model/layers/0/mlp/down_proj/weight", (16, 24), (16, 1)),
    ("model/layers/0/input_layernorm/weight", (16,), (1,)),
    ("model/layers/0/post_attention_layernorm/weight", (16,), (1,)),
    ("model/norm/weight", (16,), (1,)),
    ("lm_head/weight", (32, 16), (32, 1)),
    ("model/layers/0/self_attn/q_proj/kernel", (16, 16), (1, 4)),
    ("model/layers/0/self_attn/k_proj/kernel", (16, 8), (1, 2)),
)
def test_hugging_face_llama(row: Row) -> None:
    row.check(TORCH)


@rows(
    ("params/transformer/wte/embedding", (32, 16), (32, 1)),
    ("params/transformer/h/0/attention/wq/kernel", (16, 16), (1, 4)),
    ("params/transformer/h/0/attention/wk/kernel", (16, 8), (1, 2)),
    ("params/transformer/h/0/attention/wv/kernel", (16, 8), (1, 8)),
    ("params/transformer/h/0/attention/wo/kernel", (16, 16), (1, 16)),
    ("params/transformer/h/0/feed_forward/w1/kernel", (16, 24), (1, 24)),
    ("params/transformer/h/0/feed_forward/w2/kernel", (24, 16), (1, 16)),
    ("params/transformer/h/0/attention_norm/kernel", (16,), (1,)),
    ("params/transformer/h/0/ffn_norm/kernel", (16,), (1,)),
    ("params/transformer/ln_f/kernel", (16,), (1,)),
    ("params/lm_head/kernel", (16, 32), (1, 32)),
)
def test_easylm(row: Row) -> None:
    row.check(FLAX)


@rows(
    ("transformer/embedder/input_embedding", (32, 16), (32, 1)),
    ("transformer/layer_0/attn/q_einsum/w", (4, 16, 4), (4, 1, 1)),
    ("transformer/layer_0/attn/kv_einsum/w", (2, 2, 16, 4), (2, 2, 1, 4), 2 + 2 * 4),
    ("transformer/layer_0/attn/qkv_einsum/w", (3, 4, 16, 4), (3, 4, 1, 4), 4 + 4 + 4 * 4),
    ("transformer/layer_0/attn/attn_vec_einsum/w", (4, 4, 16), (1, 1, 16)),
    ("transformer/layer_0/mlp/linear", (24, 16), (1, 16)),
    ("transformer/layer_0/pre_attention_norm/scale", (16,), (1,)),
    ("transformer/final_norm/scale", (16,), (1,)),
)
def test_gemma(row: Row) -> None:
    row.check(Partition())


def test_the_gating_kernel_of_gemma_shares_nothing() -> None:
    """Some versions have it from inputs to outputs and some from outputs to inputs."""
    for path in ("layer_0/mlp/gating_einsum", "layer_0/mlp/gating_einsum/w"):
        assert is_elementwise(assign(path, (2, 16, 24), Partition()))


@rows(
    ("encoder/block/0/layer/0/SelfAttention/q/kernel", (16, 16), (1, 4)),
    ("encoder/block/0/layer/0/SelfAttention/k/kernel", (16, 16), (1, 4)),
    ("encoder/block/0/layer/0/SelfAttention/v/kernel", (16, 16), (1, 16)),
    ("encoder/block/0/layer/0/SelfAttention/o/kernel", (16, 16), (1, 16)),
    ("encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding", (9, 4), (9, 1)),
    ("encoder/block/0/layer/0/layer_norm/weight", (16,), (1,)),
    ("encoder/block/0/layer/1/DenseReluDense/wi_0/kernel", (16, 24), (1, 24)),
    ("encoder/block/0/layer/1/DenseReluDense/wo/kernel", (24, 16), (1, 16)),
    ("encoder/final_layer_norm/weight", (16,), (1,)),
    ("shared/embedding", (32, 16), (32, 1)),
    ("decoder/layers_0/encoder_decoder_attention/query/kernel", (16, 16), (1, 4)),
    ("decoder/layers_0/pre_cross_attention_layer_norm/scale", (16,), (1,)),
    ("token_embedder/embedding", (32, 16), (32, 1)),
)
def test_t5(row: Row) -> None:
    row.check(Partition(transformer_rules(heads=HEADS)))


VIT = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0"


@rows(
    ("embedding/kernel", (4, 4, 3, 16), (1, 1, 1, 16)),
    ("pos_embedding", (1, 9, 16), (1, 9, 1)),
    ("cls", (1, 1, 16), (1, 1, 1)),
    (f"{VIT}/query/kernel", (16, 4, 4), (1, 4, 1)),
    (f"{VIT}/value/kernel", (16, 4, 4), (1, 4, 4)),
    (f"{VIT}/out/kernel", (4, 4, 16), (1, 1, 16)),
    (f"{VIT}/query/bias", (4, 4), (4, 4)),
    ("Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel", (16, 24), (1, 24)),
    ("Transformer/encoderblock_0/LayerNorm_0/scale", (16,), (1,)),
    ("Transformer/encoder_norm/scale", (16,), (1,)),
    ("head/kernel", (16, 10), (1, 10)),
    ("patch_embed/proj/kernel", (4, 4, 3, 16), (1, 1, 1, 16)),
    ("cls_token", (1, 1, 16), (1, 1, 1)),
    ("reg_token", (1, 4, 16), (1, 4, 1)),
    ("blocks/0/norm1/scale", (16,), (1,)),
    ("blocks/0/attn/qkv/kernel", (16, 48), (1, 48), 4 + 4 + 16),
    ("blocks/0/attn/proj/kernel", (16, 16), (1, 16)),
    ("blocks/0/mlp/fc1/kernel", (16, 24), (1, 24)),
    ("vit/embeddings/patch_embeddings/projection/kernel", (4, 4, 3, 16), (1, 1, 1, 16)),
    ("vit/embeddings/position_embeddings", (1, 9, 16), (1, 9, 1)),
    ("vit/embeddings/cls_token", (1, 1, 16), (1, 1, 1)),
)
def test_vision_transformers(row: Row) -> None:
    row.check(Partition(transformer_rules(heads=HEADS)))


MAXTEXT = (
    ("params/token_embedder/embedding", (32, 16), (32, 1)),
    ("params/decoder/decoder_norm/scale", (16,), (1,)),
    ("params/decoder/logits_dense/kernel", (16, 32), (1, 32)),
    ("params/decoder/layers_0/self_attention/query/kernel", (16, 4, 4), (1, 4, 1)),
    ("params/decoder/layers/self_attention/query/kernel", (16, 3, 4, 4), (1, 3, 4, 1)),
    ("params/decoder/layers/self_attention/key/kernel", (16, 3, 2, 4), (1, 3, 2, 1)),
    ("params/decoder/layers/self_attention/value/kernel", (16, 3, 2, 4), (1, 3, 2, 4)),
    ("params/decoder/layers/self_attention/out/kernel", (4, 3, 4, 16), (1, 3, 1, 16)),
    ("params/decoder/layers/self_attention/qkv_proj/kernel", (16, 3, 3, 4, 4), (1, 3, 3, 4, 4), 72),
    ("params/decoder/layers/mlp/wi_0/kernel", (16, 3, 24), (1, 3, 24)),
    ("params/decoder/layers/mlp/wi_1/kernel", (16, 3, 24), (1, 3, 24)),
    ("params/decoder/layers/mlp/wo/kernel", (24, 3, 16), (1, 3, 16)),
    ("params/decoder/layers/mlp/wo/bias", (16, 3), (16, 3)),
    ("params/decoder/layers/pre_self_attention_layer_norm/scale", (16, 3), (1, 3)),
    ("params/decoder/moe_layers/MoeBlock_0/gate/kernel", (16, 3, 5), (1, 3, 5)),
    ("params/decoder/moe_layers/MoeBlock_0/wi_0", (5, 3, 16, 24), (5, 3, 1, 24)),
    ("params/decoder/moe_layers/MoeBlock_0/wo", (5, 3, 24, 16), (5, 3, 1, 16)),
)


@rows(*MAXTEXT)
def test_maxtext(row: Row) -> None:
    """Its layers are stacked along the second axis."""
    row.check(Partition(transformer_rules(heads=HEADS), layer_axis=1))


# --- Stacked layers -------------------------------------------------------------------------------

# Shapes of one layer, with what is kept of each.
LAYER = (
    ("attention/query/kernel", (16, 4, 4), (1, 4, 1)),
    ("attention/query/kernel", (16, 16), (1, 4)),
    ("attention/key/kernel", (16, 8), (1, 2)),
    ("attention/value/kernel", (16, 2, 4), (1, 2, 4)),
    ("attention/out/kernel", (4, 4, 16), (1, 1, 16)),
    ("attention/out/kernel", (16, 16), (1, 16)),
    ("attention/qkv/kernel", (16, 32), (1, 32)),
    ("attention/qkv/kernel", (16, 3, 4, 4), (1, 3, 4, 4)),
    ("attention/qkv_proj/kernel", (16, 3, 16), (1, 3, 16)),
    ("attention/query/bias", (4, 4), (4, 4)),
    ("attention/in_proj_weight", (32, 16), (32, 1)),
    ("attn/q_proj/weight", (16, 16), (4, 1)),
    ("attn/q_einsum/w", (4, 16, 4), (4, 1, 1)),
    ("attn/kv_einsum/w", (2, 2, 16, 4), (2, 2, 1, 4)),
    ("attn/qkv_einsum/w", (3, 4, 16, 4), (3, 4, 1, 4)),
    ("attn/attn_vec_einsum/w", (4, 4, 16), (1, 1, 16)),
    ("attn/lora_a/kernel", (16, 2), (1, 2)),
    ("mlp/linear", (24, 16), (1, 16)),
    ("mlp/wi/kernel", (16, 24), (1, 24)),
    ("mlp/proj/kernel", (16, 24), (1, 24)),
    ("mlp/wi/bias", (24,), (24,)),
    ("mlp/fc1/weight", (24, 16), (24, 1)),
    ("moe/experts/wi", (5, 16, 24), (5, 1, 24)),
    ("norm/scale", (16,), (1,)),
    ("norm/weight", (16,), (1,)),
    ("norm/bias", (16,), (16,)),
    ("Conv_0/kernel", (3, 8, 16), (1, 1, 16)),
    ("Conv_0/kernel", (3, 3, 8, 16), (1, 1, 1, 16)),
    ("Conv_0/kernel", (3, 3, 3, 8, 16), (1, 1, 1, 1, 16)),
    ("conv/weight", (16, 8, 3, 3), (16, 1, 1, 1)),
    ("relative/embedding", (9, 4), (9, 1)),
    ("pos_embed", (1, 9, 16), (1, 9, 1)),
)


def stack(shape: Shape, axis: int, layers: int = 7) -> Shape:
    return (*shape[:axis], layers, *shape[axis:])


@pytest.mark.parametrize("container", ["layers", "blocks", "dense_layers", "encoderblock", "h"])
@rows(*LAYER)
def test_each_layer_of_a_stack_has_the_blocks_of_one(row: Row, container: str) -> None:
    single = assign(f"{container}/0/{row.path}", row.shape, TORCH)
    stacked = assign(f"{container}/{row.path}", stack(row.shape, 0), TORCH)
    assert single.layer_axis is None
    assert single.sharing.moment_shape == row.moment_shape
    assert stacked.layer_axis == 0
    assert stacked.rule == single.rule
    assert stacked.sharing == single.sharing.with_axis(0, 7)
    assert stacked.sharing.moment_shape == (7, *row.moment_shape)
    assert stacked.sharing.blocks == 7 * single.sharing.blocks


@rows(*LAYER)
def test_layers_may_be_stacked_along_the_second_axis(row: Row) -> None:
    partition = dataclasses.replace(TORCH, layer_axis=1)
    stacked = assign(f"layers/{row.path}", stack(row.shape, 1), partition)
    assert stacked.layer_axis == 1
    assert stacked.sharing.moment_shape == stack(row.moment_shape, 1)


@pytest.mark.parametrize("container", ["ScanLayer_0", "Scan_1/layer", "VmapBlock_0", "enc/layers"])
def test_names_that_flax_gives_to_stacks(container: str) -> None:
    assert assign(f"{container}/norm/scale", (7, 16), FLAX).sharing.moment_shape == (7, 1)


def test_another_pattern_may_say_what_is_stacked() -> None:
    partition = Partition(stacked="trunk")
    assert assign("trunk/norm/scale", (7, 16), partition).sharing.moment_shape == (7, 1)
    assert is_elementwise(assign("layers/norm/scale", (7, 16), partition))


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("layers/odd/weight", (7, 16)),
        ("layers/wq_b/kernel", (7, 7, 4, 4)),
        ("layers/gating_einsum/w", (7, 7, 16, 24)),
        ("layers/out/kernel", (7, 7, 7, 4, 16)),
        ("layers/Conv_0/kernel", (7, 7, 7, 3, 4, 16)),
        ("layers/Conv_0/kernel", (7, 7, 3, 8, 16)),
        ("layers/temperature", (7,)),
    ],
)
def test_layers_of_which_no_rule_fits_one_are_not_averaged(path: str, shape: Shape) -> None:
    """Not even where a rule would fit them all."""
    assignment = assign(path, shape, Partition(transformer_rules(weight="in out")))
    assert is_elementwise(assignment)
    assert assignment.layer_axis == 0


def test_what_only_sounds_like_a_stack_is_none_if_its_rule_leaves_the_layers_alone() -> None:
    Row("layers/first/kernel", (16, 24), (1, 24)).check(FLAX)
    assert assign("layers/first/kernel", (16, 24), FLAX).layer_axis is None
    Row("layers/first/weight", (24, 16), (24, 1)).check(TORCH)
    assert assign("layers/first/weight", (24, 16), TORCH).layer_axis is None
    Row("layers/3/mlp/kernel", (16, 24), (1, 24)).check(FLAX)
    assert assign("layers/3/mlp/kernel", (16, 24), FLAX).layer_axis is None


@pytest.mark.parametrize("weight", [None, "in out", "out in"])
@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("layers", [7, 4, 16])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_layers_of_an_unmarked_stack_are_never_averaged(
    weight: Any, heads: int | None, layers: int, axis: int
) -> None:
    """Also where there are as many layers as heads, or as features."""
    partition = Partition(transformer_rules(heads=heads, weight=weight))
    stacks = {f"{i}/{path}": stack(shape, axis, layers) for i, (path, shape, _) in enumerate(LAYER)}
    for assignment in explain_partition(tree(**stacks), partition).assignments:
        assert assignment.layer_axis is None
        assert assignment.sharing.moment_shape[axis] == layers, assignment.path


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("trunk/query/kernel", (12, 64, 64)),
        ("trunk/query/kernel", (12, 64, 4, 16)),
        ("trunk/value/kernel", (12, 64, 64)),
        ("trunk/out/kernel", (12, 64, 64)),
        ("trunk/out/kernel", (12, 48, 64)),
        ("trunk/out/kernel", (26, 1024, 1152)),
        ("trunk/out/kernel", (12, 4, 16, 64)),
        ("trunk/out/kernel", (12, 12, 16, 64)),
        ("trunk/out/kernel", (48, 12, 64)),
        ("trunk/qkv/kernel", (12, 64, 192)),
        ("trunk/qkv/kernel", (12, 64, 3, 64)),
        ("trunk/mlp/up/kernel", (12, 64, 256)),
        ("trunk/mlp/proj/kernel", (12, 64, 256)),
        ("trunk/mlp/wo/kernel", (12, 256, 64)),
        ("trunk/q_einsum/w", (8, 8, 64, 16)),
        ("trunk/norm/scale", (12, 64)),
        ("trunk/norm/weight", (12, 64)),
        ("trunk/fc1/weight", (12, 256, 64)),
        ("trunk/fc1/weight", (12, 64, 64)),
        ("trunk/Conv_0/kernel", (12, 3, 64, 64)),
        ("trunk/Conv_0/kernel", (12, 3, 3, 64, 64)),
    ],
)
@pytest.mark.parametrize("weight", [None, "in out", "out in"])
def test_what_may_be_a_stack_shares_nothing(path: str, shape: Shape, weight: Any) -> None:
    partition = Partition(transformer_rules(heads=4, weight=weight))
    assert is_elementwise(assign(path, shape, partition))


# --- Names of axes --------------------------------------------------------------------------------


def logical(init: nn.initializers.Initializer, *names: str) -> Any:
    return nn.with_logical_partitioning(init, names)


class LinenLayer(nn.Module):
    """A layer in boxes that name its axes; the attention's bias has none."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        ones, zeros, normal = (
            nn.initializers.ones,
            nn.initializers.zeros,
            nn.initializers.lecun_normal(),
        )
        x = nn.RMSNorm(scale_init=logical(ones, "embed"))(x)
        x = nn.MultiHeadDotProductAttention(
            num_heads=4, kernel_init=nn.with_partitioning(normal, (None, "heads", None))
        )(x)
        return nn.Dense(
            16, kernel_init=logical(normal, "embed", "mlp"), bias_init=logical(zeros, "mlp")
        )(x), None


class LinenModel(nn.Module):
    """Layers in a scan, which says where their axis is."""

    layer_axis: int = 0
    name_of_axis: str = "layers"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nn.scan(
            LinenLayer,
            variable_axes={"params": self.layer_axis},
            split_rngs={"params": True},
            length=7,
            metadata_params={nn.PARTITION_NAME: self.name_of_axis},
        )
        return scan(name="trunk")(x, None)[0]


def by_path(params: Any, partition: Partition | None = None) -> dict[str, Assignment]:
    return {a.path: a for a in explain_partition(params, partition).assignments}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["layers", "blocks"])
def test_linen_boxes_tell_the_layer_axis(axis: int, name: str) -> None:
    model = LinenModel(axis, name)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 5, 16)))["params"]
    found = by_path(params)
    attention = "trunk/MultiHeadDotProductAttention_0"
    expected = {
        "trunk/RMSNorm_0/scale": (1,),
        "trunk/Dense_0/kernel": (1, 16),
        "trunk/Dense_0/bias": (16,),
        f"{attention}/query/kernel": (1, 4, 1),
        f"{attention}/value/kernel": (1, 4, 4),
    }
    for path, moment_shape in expected.items():
        assert found[path].sharing.moment_shape == stack(moment_shape, axis), path
        assert found[path].layer_axis == axis
    assert found[f"{attention}/query/bias"].sharing.blocks == 7 * 16


def test_the_name_of_the_axis_counts_more_than_the_partition() -> None:
    params = jax.eval_shape(LinenModel(1).init, jax.random.key(0), jnp.zeros((2, 5, 16)))["params"]
    found = by_path(params, Partition(stacked="trunk", layer_axis=0))
    assert found["trunk/Dense_0/kernel"].sharing.moment_shape == (1, 7, 16)


def test_boxes_of_single_layers_change_nothing() -> None:
    params = jax.eval_shape(LinenLayer().init, jax.random.key(0), jnp.zeros((2, 5, 16)))["params"]
    boxed, plain = by_path(params), by_path(nn.unbox(params))
    assert {path: a.sharing for path, a in boxed.items()} == {
        path: a.sharing for path, a in plain.items()
    }
    assert all(a.rule is not None and a.layer_axis is None for a in boxed.values())


# --- Modules --------------------------------------------------------------------------------------


class LinenModules(nn.Module):
    """One of each."""

    @nn.compact
    def __call__(self, tokens: jax.Array, image: jax.Array) -> None:
        x = nn.Embed(32, 16)(tokens)
        x = nn.LayerNorm()(x)
        x = nn.MultiHeadDotProductAttention(num_heads=4)(x)
        nn.Dense(24)(x)
        nn.Conv(8, (3, 3))(image)
        nn.Conv(8, (5,))(x)


MODULES = {
    "embedding": (32, 1),
    "norm/scale": (1,),
    "norm/bias": (16,),
    "query/kernel": (1, 4, 1),
    "key/kernel": (1, 4, 1),
    "value/kernel": (1, 4, 4),
    "out/kernel": (1, 1, 16),
    "query/bias": (4, 4),
    "out/bias": (16,),
    "linear/kernel": (1, 24),
    "linear/bias": (24,),
    "image/kernel": (1, 1, 1, 8),
    "image/bias": (8,),
    "text/kernel": (1, 1, 8),
}


def check_modules(params: Any, paths: dict[str, str]) -> None:
    report = explain_partition(params)
    assert report.unnamed == ()
    found = {a.path: a.sharing.moment_shape for a in report.assignments}
    for path, module in paths.items():
        assert found[path] == MODULES[module], path


def test_linen_modules() -> None:
    params = jax.eval_shape(
        LinenModules().init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((2, 5), jnp.int32),
        jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32),
    )["params"]
    attention = "MultiHeadDotProductAttention_0"
    paths = {"Embed_0/embedding": "embedding"}
    paths |= {f"LayerNorm_0/{leaf}": f"norm/{leaf}" for leaf in ("scale", "bias")}
    paths |= {f"{attention}/{n}/kernel": f"{n}/kernel" for n in ("query", "key", "value", "out")}
    paths |= {f"{attention}/{n}/bias": f"{n}/bias" for n in ("query", "out")}
    paths |= {f"Dense_0/{leaf}": f"linear/{leaf}" for leaf in ("kernel", "bias")}
    paths |= {f"Conv_0/{leaf}": f"image/{leaf}" for leaf in ("kernel", "bias")}
    check_modules(params, paths | {"Conv_1/kernel": "text/kernel"})


class NnxModules(nnx.Module):
    """One of each."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(32, 16, rngs=rngs)
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, rngs=rngs)
        self.linear = nnx.Linear(16, 24, rngs=rngs)
        self.image = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.text_conv = nnx.Conv(16, 8, (5,), rngs=rngs)


def test_nnx_modules() -> None:
    model = nnx.eval_shape(lambda: NnxModules(rngs=nnx.Rngs(0)))
    paths = {"embed/embedding": "embedding", "norm/scale": "norm/scale"}
    paths |= {f"attention/{n}/kernel": f"{n}/kernel" for n in ("query", "key", "value", "out")}
    paths |= {f"attention/{n}/bias": f"{n}/bias" for n in ("query", "out")}
    paths |= {p: p for p in ("linear/kernel", "linear/bias", "image/kernel", "image/bias")}
    paths |= {"text_conv/kernel": "text/kernel"}
    params = nnx.state(model, nnx.Param)
    check_modules(params, paths)
    check_modules(nnx.to_pure_dict(params), paths)


def test_equinox_modules() -> None:
    """Its weights are from outputs to inputs."""
    key = jax.random.key(0)
    model = eqx.filter_eval_shape(
        lambda: {
            "attention": eqx.nn.MultiheadAttention(HEADS, EMBED, key=key),
            "linear": eqx.nn.Linear(EMBED, HIDDEN, key=key),
            "embed": eqx.nn.Embedding(VOCAB, EMBED, key=key),
            "pos": eqx.nn.Embedding(VOCAB, EMBED, key=key),
            "norm": eqx.nn.LayerNorm(EMBED),
            "conv": eqx.nn.Conv2d(3, 8, 3, key=key),
        }
    )
    params = eqx.filter(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    report = explain_partition(params, Partition(transformer_rules(HEADS, weight="out in")))
    assert report.unnamed == ()
    seen = dict(Matrices().list(params))
    assert seen["embed/weight"] is seen["pos/weight"] is None
    assert seen["linear/weight"] is not None
    assert {a.path: a.sharing.moment_shape for a in report.assignments} == {
        "attention/query_proj/weight": (4, 1),
        "attention/key_proj/weight": (4, 1),
        "attention/value_proj/weight": (16, 1),
        "attention/output_proj/weight": (16, 1),
        "linear/weight": (24, 1),
        "linear/bias": (24,),
        "embed/weight": (32, 1),
        "pos/weight": (32, 1),
        "norm/weight": (1,),
        "norm/bias": (16,),
        "conv/weight": (8, 1, 1, 1),
        "conv/bias": (8, 1, 1),
    }


@pytest.mark.parametrize("heads", [None, 4])
def test_the_pretraining_example_has_rules_for_all(heads: int | None) -> None:
    config = ModelConfig(hidden=16, intermediate=24, layers=7, heads=4, vocab=32)
    params = jax.eval_shape(lambda: init_params(config, 0))
    report = explain_partition(params, Partition(transformer_rules(heads=heads)))
    assert report.unnamed == ()
    found = {a.path: a.sharing.moment_shape for a in report.assignments}
    assert found["layers/attention/query/kernel"] == (7, 1, 4 if heads else 16)
    assert found["layers/attention/out/kernel"] == (7, 1, 16)
    assert found["layers/mlp/gate/kernel"] == (7, 1, 24)
    assert found["layers/mlp_norm/scale"] == (7, 1)
    assert found["norm/scale"] == (1,)
    assert found["embedding/embedding"] == (32, 1)
    assert found["head/kernel"] == (1, 32)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_rules_for_all(name: str) -> None:
    report = explain_partition(model_shapes(name))
    assert report.unnamed == ()
    shared = [a for a in report.assignments if not a.path.endswith("bias")]
    assert all(a.sharing.blocks < max(a.shape) + 1 for a in shared)


# --- Which rule counts ----------------------------------------------------------------------------


def test_the_first_rule_that_matches_and_fits_counts() -> None:
    rules = (
        ("kernel", Axes("a b c -> c")),
        ("special/kernel", "in | out ->"),
        ("kernel", "in | out -> out"),
        ("kernel", "in | out -> in"),
    )
    partition = Partition(rules)
    assert assign("special/kernel", (3, 5), partition).sharing.moment_shape == (1, 1)
    assert assign("other/kernel", (3, 5), partition).sharing.moment_shape == (1, 5)
    assert assign("special/kernel", (3, 5, 2), partition).sharing.moment_shape == (1, 1, 2)
    with pytest.warns(UserWarning, match="do not fit the shape"):
        assert is_elementwise(assign("special/kernel", (3,), partition))


def test_a_rule_that_nothing_can_follow_is_warned_of() -> None:
    tree = {"layers": [{"router": {"kernel": jnp.ones((4, 6))}, "bias": jnp.ones(6)}] * 2}

    def assigned(*rules: tuple[str, str]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Partition((*rules, *transformer_rules(heads=3))).assign(tree)

    assigned(("router/kernel", "in | out ->"))
    assigned((".*", "in | out -> out"))  # which does not fit the biases
    assigned(("router/kernel", "a b | c -> c"), ("router/kernel", "in | out ->"))
    with pytest.raises(UserWarning, match="'rooter/kernel' in a Partition matches none of 4"):
        assigned(("rooter/kernel", "in | out ->"))
    with pytest.raises(UserWarning, match=r"do not fit the shape \(4, 6\)"):
        assigned(("router/kernel", "a b | c -> c"))


def test_rules_of_transformers_need_not_match() -> None:
    for weight in (None, "in out", "out in"):
        for heads, kv_heads in ((None, None), (4, 2)):
            rules = transformer_rules(heads, kv_heads, weight=weight)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                Partition(rules).assign({"w": jnp.ones(heads or 1)})


def test_own_rules_before_the_preset_override_it() -> None:
    """One number for each value matrix, which the authors advise for short runs."""
    value = ("(value|v_proj)/kernel", "embed | out ->")
    partition = Partition((value, *transformer_rules(heads=HEADS)))
    assert assign("layers/0/v_proj/kernel", (16, 16), partition).sharing.blocks == 1
    assert assign("layers/v_proj/kernel", (7, 16, 16), partition).sharing.blocks == 7
    assert assign("layers/0/q_proj/kernel", (16, 16), partition).sharing.blocks == 4
    late = Partition((*transformer_rules(heads=HEADS), value))
    assert assign("layers/0/v_proj/kernel", (16, 16), late).sharing.blocks == 16


def test_a_fused_rule_may_be_ones_own() -> None:
    kv = Fused((Axes("embed | (h d) -> h", h=2), Axes("embed | out -> out")))
    partition = Partition((("kv/kernel", kv), *transformer_rules()))
    assignment = assign("layers/kv/kernel", (7, 16, 16), partition)
    assert assignment.rule == kv
    assert assignment.sharing.moment_shape == (7, 1, 16)
    assert assignment.sharing.blocks == 7 * (2 + 8)


@pytest.mark.parametrize(
    ("path", "matches"),
    [
        ("query/kernel", True),
        ("layers/0/query/kernel", True),
        ("key/kernel", True),
        ("subquery/kernel", False),
        ("query/kernel/value", False),
        ("query/kernels", False),
    ],
)
def test_patterns_are_for_whole_components_at_the_end(path: str, matches: bool) -> None:
    partition = Partition((("(query|key)/kernel", "in | out -> out"),))
    assert (assign(path, (16, 16), partition).rule is not None) == matches


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_parameters_without_elements_share_nothing(shape: Shape) -> None:
    assert is_elementwise(assign("mlp/kernel", shape, FLAX))
    assert assign("mlp/bias", shape, FLAX).sharing.blocks == 0


def test_a_bad_notation_is_named() -> None:
    with pytest.raises(AxesError, match="'in out' with sizes"):
        Partition((("kernel", "in out"),))


def test_a_bad_layer_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="layer_axis must be an integer of at least 0; got -1"):
        Partition(layer_axis=-1)


def test_a_bad_layout_of_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'in out', 'out in' or None; got 'in, out'"):
        transformer_rules(weight="in, out")  # pyrefly: ignore


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 3), (4, 8), (None, 2)])
def test_key_heads_that_do_not_divide_the_query_heads_are_refused(
    heads: int | None, kv_heads: int | None
) -> None:
    with pytest.raises(ValueError, match=rf"must divide heads={heads}"):
        transformer_rules(heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize(("name", "count"), [("heads", 0), ("kv_heads", 0), ("heads", 4.0)])
def test_heads_are_counted(name: str, count: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a positive integer; got {count}"):
        transformer_rules(**{"heads": 4, name: count})  # pyrefly: ignore


# --- Reports --------------------------------------------------------------------------------------

REPORTED = {
    "layers/norm/scale": (7, 16),
    "mixer/state": (6, 8),
    "q_proj/kernel": (16, 16),
    "q_proj/log_scale": (1, 1),
    "slots/kernel": (16, 12),
}


def test_the_report_has_a_line_for_every_parameter() -> None:
    expected = """
parameter          shape     blocks  bytes  rule
layers/norm/scale  (7, 16)        7     28  feature ->, for each of 7 layers
mixer/state        (6, 8)        48    192  no rule, elementwise
q_proj/kernel      (16, 16)       4     16  embed | (heads head_dim) -> heads (heads=4)
q_proj/log_scale   (1, 1)         1      4  no rule, elementwise
slots/kernel       (16, 12)       8     48  a | (h d) -> h (h=2) + a | out -> out
total                            68    288  Adam: 2,436 bytes
No rule for 2 of 5 parameters, each of whose elements has its own: mixer/state, q_proj/log_scale
"""
    slots = Fused((Axes("a | (h d) -> h", h=2), Axes("a | out -> out")))
    partition = Partition((("slots/kernel", slots), *FLAX.rules))
    lines = str(explain_partition(tree(**REPORTED), partition)).splitlines()
    assert set(lines.pop(1)) == {"-"}
    assert lines == expected.strip().splitlines()


def test_the_report_counts_what_adam_mini_keeps() -> None:
    params = model_shapes("gpt2")
    state = jax.eval_shape(scale_by_adam_mini().init, params)
    kept = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.nu))
    report = explain_partition(params)
    assert kept == sum(a.bytes for a in report.assignments)
    assert "No rule" not in str(report)


def test_the_memory_report_tells_of_parameters_without_a_rule() -> None:
    tx = scale_by_adam_mini(partition=FLAX)
    report = memory_report(tx, tree(**REPORTED))
    # One element is one block either way.
    text = "no rule of the partition, one second moment for each element"
    assert report.remarks == {text: ("mixer/state",)}
    assert f"{text} (1): mixer/state" in str(report)


def test_the_report_of_no_parameters() -> None:
    assert explain_partition({}).assignments == ()
    assert "total" in str(explain_partition({}))
