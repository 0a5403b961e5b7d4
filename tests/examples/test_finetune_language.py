"""SmolLM2's format and the questions of arithmetic, on small random weights in a GGUF file."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from examples.finetuning import language
from examples.finetuning.config import JOBS, Config
from examples.finetuning.training import train
from examples.llama import optimizers
from examples.llama.config import PretrainError
from tests.oracles import llama as oracle

gguf = pytest.importorskip("gguf")
smollm = pytest.importorskip("examples.finetuning.smollm")
pytestmark = pytest.mark.usefixtures("quick_compilation")

HIDDEN, FF, LAYERS, HEADS, KEY_HEADS, BASE, EPS = 64, 96, 2, 4, 2, 1e5, 1e-5
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Bytes as GPT-2 writes them: those that are no printable characters are moved up by 256.
LETTERS = [chr(b) if 33 <= b <= 126 else chr(256 + b) for b in range(128)]
TOKENS = [*CONTROL, *LETTERS, "ĠĊ"]
QUIET = Console(quiet=True)
NARROW = KEY_HEADS * HIDDEN // HEADS


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FF)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(["Ġ Ċ"])

    def add(name: str, *shape: int, kind: str = "Q4_1") -> None:
        x = (rng.standard_normal(shape) / 6).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", 1 + x)
            return
        quantized = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(x, quantized)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=quantized)

    add("token_embd", len(TOKENS), HIDDEN, kind="Q8_0")
    add("output_norm", HIDDEN)
    for i in range(LAYERS):
        add(f"blk.{i}.attn_norm", HIDDEN)
        add(f"blk.{i}.ffn_norm", HIDDEN)
        for name, n_out, n_in in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", NARROW, HIDDEN),
            ("attn_v", NARROW, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", FF, HIDDEN),
            ("ffn_up", FF, HIDDEN),
            ("ffn_down", HIDDEN, FF),
        ):
            add(f"blk.{i}.{name}", n_out, n_in)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_logits_equal_an_independent_computation(weights: Path) -> None:
    decode = {"Q4_1": oracle.decode_q4_1, "Q8_0": oracle.decode_q8_0}
    tensors = {
        t.name: decode.get(t.tensor_type.name, lambda x: x.astype(float))(t.data)
        for t in gguf.GGUFReader(weights).tensors
    }
    tokens = [1, 40, 7, 99, 12, 2]
    expected = oracle.logits(tensors, tokens, HEADS, KEY_HEADS, BASE, EPS)
    file = smollm.GgufFile(weights)
    assert file.config().tied
    np.testing.assert_allclose(file.model()(jnp.array([tokens]))[0], expected, atol=2e-4)


def test_prompts_are_in_no_loss(weights: Path) -> None:
    bpe = smollm.GgufFile(weights).tokenizer()
    made = language.dialogues([("1+1?", "2"), ("x" * 99, "1")], bpe, 48)
    assert len(made) == 1
    (tokens,), (answers,) = made.tokens, made.answers
    learned = [TOKENS[t] for t in tokens[1:][answers]]
    assert learned == ["2", "<|im_end|>"]
    assert [TOKENS[t] for t in tokens[:1]] == ["<|im_start|>"]
    with pytest.raises(PretrainError, match="No question and answer fits into --seq-len 8"):
        language.dialogues([("1+1?", "2")], bpe, 8)


def test_methods_train_and_exact_match_is_counted(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def few(wheel: Path, count: int) -> list[tuple[str, str]]:
        return [(f"{i}+1?", "3") for i in range(count)]

    monkeypatch.setattr(language, "questions", few)
    monkeypatch.setattr(language, "packages", SimpleNamespace(MATHEMATICS=0, fetch=lambda *_: 0))
    config = dataclasses.replace(
        JOBS["language"],
        weights=weights,
        examples=32,
        held_out=8,
        seq_len=56,
        steps=12,
        batch=4,
        rank=4,
        reduction=4,
        eval_every=6,
        clip=0.0,
        warmup=0.0,
        lr=("3e-2",),
        method="full,qlora,qst",
        optimizer="adamw",
    )
    job = language.Arithmetic(config, QUIET)
    built = optimizers.named(config.named_optimizers(), clip=config.clip)
    results = {
        label: train(config, job, method, built[label]) for label, method in config.runs().items()
    }
    for label, result in results.items():
        assert result.rows[-1].loss < result.rows[0].loss / 2, label
        assert len(result.correct) == 8
    # Every answer is "3": whoever has learned it has learned them all.
    assert results["adamw"].accuracy in (0.0, 1.0)
    assert results["qst"].weight_bytes < results["adamw"].weight_bytes


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"nothing at all, and more than a header takes")
    with pytest.raises(PretrainError, match=r"broken\.gguf is not a GGUF file"):
        smollm.GgufFile(path)
    with pytest.raises(PretrainError, match="is not a GGUF file"):
        smollm.GgufFile(tmp_path / "missing.gguf")


def test_texts_are_for_classification() -> None:
    with pytest.raises(PretrainError, match="--texts is for classification"):
        dataclasses.replace(Config(), job="language", texts=Path("x")).check()
