"""Every setting of a pre-training run, with the published presets."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, get_args, get_origin, get_type_hints

import tyro

from .model import ModelConfig

# Settings that change where a run happens or what it reports, and not what it computes.
_FREE_TO_CHANGE = {
    "coordinator",
    "eval_every",
    "log_every",
    "mesh",
    "out",
    "overwrite",
    "process_id",
    "processes",
    "resume",
    "save_every",
}
# Settings that may be others in each of several processes; a directory may be mounted elsewhere.
_OF_ONE_PROCESS = {"coordinator", "out", "overwrite", "process_id", "resume"}


class PretrainError(Exception):
    """A mistake the person can correct; its text is the one sentence they are shown."""


@contextlib.contextmanager
def naming(label: str) -> Generator[None]:
    """Names the run that a mistake is in.

    Raises:
        PretrainError: The one that is raised inside, with `label` before it.
    """
    try:
        yield
    except PretrainError as error:
        raise PretrainError(f"{label}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Config:
    """Pre-trains a Llama-style decoder with one optimizer after another, on the same batches.

    Without flags: the tiny model, AdamW and MicroAdam, on the sources of the Python standard
    library, in about five minutes on two CPU cores.
    """

    preset: Literal["tiny", "60m", "130m", "350m", "1b"] = "tiny"
    """Published size; sets the defaults of hidden, intermediate, layers, heads, seq-len, batch
    and steps."""
    hidden: int = 128
    """Width of the residual stream."""
    intermediate: int = 344
    """Width of the feed-forward layers."""
    layers: int = 4
    """Number of decoder layers."""
    heads: int = 4
    """Number of attention heads."""
    seq_len: int = 128
    """Tokens per sequence."""

    text: Path | None = None
    """File or directory to train on; by default the Python standard library."""
    max_bytes: int = 8 * 2**20
    """Stop collecting text after about this many bytes."""
    tokenizer: Literal["byte", "bpe"] = "byte"
    """Bytes, or a byte-pair encoding trained on the text."""
    vocab_size: int = 4096
    """Number of tokens of the byte-pair encoding."""

    optimizer: str = "adamw,microadam"
    """Comma-separated names from microadam_jax, optax or optax.contrib; LABEL=NAME tells two
    runs of one optimizer apart."""
    opt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """LABEL.OPTION=VALUE sets an option of one optimizer, e.g. adamw.b2=0.95; repeatable."""
    lr: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Peak learning rate: VALUE for all optimizers, LABEL=VALUE for one; repeatable."""
    embeddings_lr: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ("0.02",)
    """Peak learning rate of embeddings and norms, likewise. This is AdamW's best here and ten times
    that of matrices; with one rate for all, a baseline is a tenth above what it can reach."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Course of the learning rate after warm-up; cosine and linear end at a tenth of the peak."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises linearly to its peak."""
    clip: float = 1.0
    """Clip gradients to this global norm; 0 turns clipping off."""

    steps: int = 600
    """Optimizer steps."""
    batch: int = 8
    """Sequences per optimizer step."""
    accumulation: int = 1
    """Micro-batches per step; gradients are averaged inside the step, so that no accumulator
    outlives it (optax.MultiSteps would keep one in the optimizer state)."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the parameters."""
    rounding: Literal["nearest", "stochastic", "compensated", "momentum"] = "nearest"
    """Rounding of bfloat16 parameters after each update: nearest loses updates below half a
    unit in the last place; the others are those of microadam_jax.round_updates."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of activations; the loss is always float32."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of storing its activations."""
    update_in_backward: bool = False
    """Update each layer as soon as the backward pass has its gradient, so that the gradients of
    all are never there together; layers are recomputed, and --clip takes a second backward pass."""
    activations: Literal["exact", "fp8", "coat"] = "exact"
    """Store activations for the backward pass: exact, as they are; fp8, in 8 bits, from exact
    values; coat, in 8 bits, of which the forward pass computes too, as COAT does."""
    seed: int = 0
    """Seed of the initial weights and of the batches."""
    mesh: str = ""
    """Devices along the axes data, fsdp and tensor, e.g. data=2,fsdp=4; by default one device."""
    coordinator: str | None = None
    """Join a run on many hosts, each started with the same flags and sharing --out: HOST:PORT of
    process 0, or auto to let JAX ask Slurm, Open MPI, Kubernetes or Cloud TPU. --mesh then has
    to use every device, and log_every also says how often the processes look whether one of
    them was told to stop."""
    processes: int | None = None
    """Number of processes, where the coordinator is given by address."""
    process_id: int | None = None
    """Index of this process, from 0."""

    eval_every: int = 100
    """Steps between evaluations on the held-out text."""
    eval_batches: int = 16
    """Number of batches, always the same, of one evaluation."""
    log_every: int = 10
    """Steps between looks at the losses, which stay on the device in between."""
    diagnostics: bool = False
    """Write diagnostics.csv: what compression does to attention, feed-forward and other
    parameters at each look at the losses. Without error feedback only update_norm is filled in."""
    save_every: int = 500
    """Steps between checkpoints."""
    out: Path = Path("runs/pretrain")
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
        if self.hidden % (2 * self.heads):
            raise PretrainError(
                f"--hidden {self.hidden} does not split into {self.heads} heads of even width, "
                "which rotary positions need."
            )
        if self.tokenizer == "bpe" and self.vocab_size < 256:
            raise PretrainError(
                f"--vocab-size {self.vocab_size} must be at least 256, as the byte-pair encoding "
                "has a token for each byte."
            )
        if self.batch % self.accumulation:
            raise PretrainError(
                f"--batch {self.batch} does not split into {self.accumulation} equal micro-batches."
            )
        if self.rounding != "nearest" and self.param_dtype != "bfloat16":
            raise PretrainError(
                f"--rounding {self.rounding} is for parameters in bfloat16: add --param-dtype "
                "bfloat16, or leave it out."
            )
        if self.update_in_backward:
            unusable = [
                flag
                for flag, used in {
                    "--accumulation": self.accumulation > 1,
                    "--diagnostics": self.diagnostics,
                    "--activations fp8": self.activations == "fp8",
                }.items()
                if used
            ]
            if unusable:
                raise PretrainError(
                    f"--update-in-backward leaves no gradients of all layers to add up or to look "
                    f"at, and recomputes activations: leave out {' and '.join(unusable)}."
                )

    def model(self, vocab: int) -> ModelConfig:
        """Describes the decoder for a tokenizer of `vocab` tokens."""
        return ModelConfig(
            hidden=self.hidden,
            intermediate=self.intermediate,
            layers=self.layers,
            heads=self.heads,
            vocab=vocab,
            param_dtype=self.param_dtype,
            compute_dtype=self.compute_dtype,
            remat=self.remat,
            activations=self.activations,
        )

    def to_json(self) -> dict[str, Any]:
        """Lists the settings as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    def identity(self) -> dict[str, Any]:
        """Lists, as JSON values, the settings that two parts of one run must share."""
        return {k: v for k, v in self.to_json().items() if k not in _FREE_TO_CHANGE}

    def shared(self) -> dict[str, Any]:
        """Lists, as JSON values, the settings that all processes of a run must share."""
        return {k: v for k, v in self.to_json().items() if k not in _OF_ONE_PROCESS}


def check_run(config: Any) -> None:
    """Checks the settings that every training run has.

    Args:
        config: A dataclass of settings.

    Raises:
        PretrainError: If one of them cannot be.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) is not int:
            continue
        least = 0 if field.name in ("seed", "process_id") else 1
        flag = field.name.replace("_", "-")
        if value < least:
            raise PretrainError(f"--{flag} must be at least {least}, not {value}.")
        if value >= 2**31:
            raise PretrainError(f"--{flag} must be below {2**31}, not {value}.")
    if config.resume is not None and config.out != config.resume:
        raise PretrainError(f"--out {config.out} is not the run to resume, {config.resume}.")
    if not 0 <= config.clip < math.inf:
        raise PretrainError(f"--clip {config.clip} must be a norm, or 0 for no clip.")
    if not 0 <= config.warmup < 1:
        raise PretrainError(
            f"--warmup {config.warmup} must be a share of the steps, at least 0 and below 1."
        )


def _published(
    preset: Literal["60m", "130m", "350m", "1b"],
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    steps: int,
) -> Config:
    return Config(
        preset=preset,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        seq_len=256,
        batch=512,
        steps=steps,
    )


# The sizes on which low-memory optimizers are usually compared (GaLore and its successors).
PRESETS: dict[str, Config] = {
    "tiny": Config(),
    "60m": _published("60m", 512, 1376, 8, 8, 10_000),
    "130m": _published("130m", 768, 2048, 12, 12, 20_000),
    "350m": _published("350m", 1024, 2736, 24, 16, 60_000),
    "1b": _published("1b", 2048, 5461, 24, 32, 100_000),
}


def unchecked(flags: list[str] | None = None) -> Config:
    """Reads only what the command-line flags say, by default those of the process."""
    return tyro.cli(Config, args=flags)


def from_flags(flags: list[str] | None = None) -> Config:
    """Reads a configuration from command-line flags.

    Args:
        flags: The flags; by default those of the process.

    Returns:
        The configuration: flags on top of the run to resume, or else of the preset. Which
        processes take part is never resumed.

    Raises:
        PretrainError: If the settings contradict each other or there is no run to resume.
    """
    given = unchecked(flags)
    base = PRESETS[given.preset] if given.resume is None else load(given.resume)
    config = continued(tyro.cli(Config, args=flags, default=base), base)
    config.check()
    return config


def continued(config: Any, base: Any) -> Any:
    """Leaves out entries of lists that the run to resume has already, and refuses other settings.

    Args:
        config: The settings from flags on top of that run's.
        base: The settings of that run.

    Raises:
        PretrainError: If settings differ that two parts of one run must share.
    """
    if config.resume is None:
        return config
    lists = {f.name for f in dataclasses.fields(base) if isinstance(getattr(base, f.name), tuple)}
    repeated = {
        name: getattr(base, name)
        for name in lists
        if set(getattr(config, name)) <= set(getattr(base, name))
    }
    config = dataclasses.replace(config, **repeated)
    if differences := differences_of(base.identity(), config.identity()):
        raise PretrainError(
            f"The run in {config.resume} is of another configuration: {differences}. Leave these "
            "flags out, or start another run with --out."
        )
    return config


def differences_of(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Names the settings that are others than they were; nothing if all are the same."""
    differences = [
        f"{name} was {before.get(name)} and is now {now.get(name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    more = len(differences) - 3
    return "; ".join(differences[:3] + [f"{more} more differ"] * (more > 0))


class Settings(Protocol):
    """A configuration that is kept with its run."""

    out: Path

    def to_json(self) -> dict[str, Any]:
        """Lists the settings as JSON values."""
        ...


def save(config: Settings) -> None:
    """Writes the configuration into its output directory."""
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")


def saved(run: Path, paths: Iterable[str]) -> dict[str, Any]:
    """Reads the settings of the run in a directory, which is to be resumed.

    Args:
        run: The directory.
        paths: Names of settings that are paths or None.

    Raises:
        PretrainError: If there is none.
    """
    path = run / "config.json"
    if not path.is_file():
        raise PretrainError(f"There is no run to resume in {run}: it has no {path.name}.")
    try:
        values = json.loads(path.read_text())
        return values | {
            "out": run,
            "resume": run,
            "opt": tuple(values["opt"]),
            "lr": tuple(values["lr"]),
            **{name: values[name] and Path(values[name]) for name in paths},
        }
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, repr(error)) from error


def restored(kind: type[Any], run: Path, values: dict[str, Any]) -> Any:
    """Makes a configuration of the settings that :func:`saved` read.

    Args:
        kind: Its class.
        run: The directory of the run.
        values: The settings.

    Raises:
        PretrainError: If some are missing or of another version or type.
    """
    wrong = [f"{name} is unknown here" for name in values if name not in kind.__annotations__]
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        value = values.get(field.name, field.default)
        allowed = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else ()
        same = field.default is None or isinstance(value, type(field.default))
        if isinstance(field.default, tuple):
            same = isinstance(value, tuple) and all(isinstance(entry, str) for entry in value)
        if not same or (allowed and value not in allowed):
            wrong.append(f"{field.name} is {value!r}")
    if wrong:
        raise _damaged(run / "config.json", "; ".join(wrong))
    return kind(**values)


def _damaged(path: Path, reason: str) -> PretrainError:
    return PretrainError(
        f"{path} is damaged or of another version ({reason}), and the run cannot be resumed by it. "
        "Give its flags again with --out elsewhere, or mend the file."
    )


def load(run: Path) -> Config:
    """Reads the configuration of the run in a directory.

    Raises:
        PretrainError: If there is none.
    """
    values = saved(run, ["text"])
    values |= {
        # Runs of earlier versions had one rate for all.
        "embeddings_lr": tuple(values.get("embeddings_lr", ())),
        "coordinator": None,
        "processes": None,
        "process_id": None,
    }
    return restored(Config, run, values)
