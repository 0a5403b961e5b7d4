"""Optimizers by name: from this library, from Optax and from optax.contrib."""

import math
import re
import warnings
from collections.abc import Iterable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import optax

import microadam_jax
from microadam_jax.methods import METHODS, Factory
from microadam_jax.optimizer_names import factory_named, option_value

from .config import Config, PretrainError

DEFAULT_LEARNING_RATE = 2e-3  # of the optimizers of Optax: the best of AdamW
RANK = 32  # a quarter of this model's width


class Named(Protocol):
    """The settings that say which optimizers there are."""

    optimizer: str
    opt: tuple[str, ...]
    lr: tuple[str, ...]
    schedule: Literal["constant", "cosine", "linear"]
    warmup: float
    steps: int


def named(config: Named, *, clip: float) -> dict[str, optax.GradientTransformation]:
    """Builds the optimizers that a configuration names, with their learning rates.

    Args:
        config: The configuration.
        clip: The global norm to which gradients are clipped first; 0 for no clip.

    Returns:
        The optimizers by label, in the order of the configuration.

    Raises:
        PretrainError: If a name, an option or a value is not understood.
    """
    names = _names_by_label(config.optimizer)
    options = _options(config.opt, names)
    peaks = _rates_of_matrices(config)
    built = {}
    for label, name in names.items():
        method = METHODS.get(name)
        suited = {} if method is None else {**method.options, **method.at_rank(RANK)}
        optimizer = _call(
            label, name, _learning_rate(config, peaks[label]), suited | options[label]
        )
        if clip:
            optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
        built[label] = optimizer
    return built


def build(config: Config) -> dict[str, optax.GradientTransformation]:
    """Builds the optimizers of a pre-training run, with clipping, rounding and diagnostics.

    Args:
        config: The configuration.

    Returns:
        The optimizers by label, in the order of the configuration.

    Raises:
        PretrainError: If a name, an option or a value is not understood.
    """
    # If layers are updated in the backward pass, the training loop clips.
    built = named(config, clip=0 if config.update_in_backward else config.clip)
    relative = _relative_rates(config)
    for label, optimizer in built.items():
        if relative[label] != 1:
            optimizer = with_faster_embeddings(optimizer, relative[label])
        if config.rounding != "nearest":
            # Around the clip, which would round gradients once more.
            optimizer = microadam_jax.round_updates(optimizer, config.rounding, seed=config.seed)
        if config.diagnostics or loses_updates(config):
            optimizer = microadam_jax.with_diagnostics(
                optimizer, {"attention": "attention/.*", "feed-forward": "mlp/.*"}
            )
        built[label] = optimizer
    return built


def loses_updates(config: Config) -> bool:
    """Returns True if parameters are rounded so that small updates are lost, which is looked at."""
    looked_at = not config.update_in_backward  # the shares are of all layers together
    return looked_at and config.param_dtype == "bfloat16" and config.rounding == "nearest"


def _names_by_label(text: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for entry in text.split(","):
        label, _, name = entry.partition("=")
        # A label is also the name of a directory and may stand in other flags.
        if not re.fullmatch(r"[\w-]+", label) or label in names:
            raise PretrainError(
                f"--optimizer {text} must be a list such as adamw,microadam or "
                "fast=microadam,paper=microadam, with a different label for each run."
            )
        names[label] = name or label
    return names


def _options(flags: Iterable[str], labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    options: dict[str, dict[str, Any]] = {label: {} for label in labels}
    for flag in flags:
        target, equals, value = flag.partition("=")
        label, dot, option = target.partition(".")
        if not (equals and dot):
            example = f"{next(iter(options))}.{option or label or 'b1'}={value or '0.9'}"
            raise PretrainError(
                f"--opt {flag} does not have the form LABEL.OPTION=VALUE, such as {example}."
            )
        _require_label("--opt", flag, label, options)
        options[label][option] = option_value(value)
    return options


def with_faster_embeddings(
    optimizer: optax.GradientTransformation, factor: float
) -> optax.GradientTransformation:
    """Moves what is no linear map, so embeddings and norms, `factor` times as far."""

    def others(params: optax.Params) -> optax.Params:
        return jax.tree.map_with_path(lambda path, _: path[-1].key != "kernel", params)

    return optax.chain(optimizer, optax.masked(optax.scale(factor), others))


def _rates_of_matrices(config: Named) -> dict[str, float]:
    defaults = {
        label: METHODS[name].learning_rate if name in METHODS else DEFAULT_LEARNING_RATE
        for label, name in _names_by_label(config.optimizer).items()
    }
    return _learning_rates("--lr", config.lr, defaults)


def _learning_rates(
    option: str, flags: Iterable[str], defaults: dict[str, float]
) -> dict[str, float]:
    rates = dict(defaults)
    for flag in flags:
        label, equals, value = flag.rpartition("=")
        if equals:
            _require_label(option, flag, label, rates)
        try:
            rate = float(value)
        except ValueError:
            raise PretrainError(f"{option} {flag} does not end in a number.") from None
        if not 0 <= rate < math.inf:
            raise PretrainError(f"{option} {flag} must end in a rate of at least 0.")
        rates |= dict.fromkeys([label] if equals else rates, rate)
    return rates


def _relative_rates(config: Config) -> dict[str, float]:
    """Divides the rate of embeddings and norms by that of matrices, for each label."""
    matrices = _rates_of_matrices(config)
    others = _learning_rates("--embeddings-lr", config.embeddings_lr, matrices)
    for label, rate in matrices.items():
        if not rate and others[label]:
            raise PretrainError(
                f"--lr of {label} is 0, of which no multiple is {others[label]:g}: name a small "
                f"rate, or --embeddings-lr {label}=0."
            )
    return {label: others[label] / rate if rate else 1.0 for label, rate in matrices.items()}


def _require_label(option: str, flag: str, label: str, labels: Iterable[str]) -> None:
    if label not in labels:
        raise PretrainError(
            f"{option} {flag} is for {label!r}, but this run trains {', '.join(labels)}."
        )


def _learning_rate(config: Named, peak: float) -> float | optax.Schedule:
    warmup = min(round(config.warmup * config.steps), config.steps - 1)
    rest = config.steps - warmup
    if config.schedule == "constant" and not warmup:
        return peak  # A few optimizers, such as optax.sm3, take nothing but a number.
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=0.1),
        "linear": optax.linear_schedule(peak, 0.1 * peak, rest),
    }[config.schedule]
    if not warmup:
        return after
    # The first step is not spent on a rate of zero.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def _call(
    label: str, name: str, learning_rate: float | optax.Schedule, options: dict[str, Any]
) -> optax.GradientTransformation:
    try:
        factory = factory_named(name, options)
    except ValueError as error:
        raise PretrainError(str(error)) from error
    error = _failure(factory, learning_rate)
    if error and callable(learning_rate) and not _failure(factory, 1e-3):
        raise PretrainError(
            f"{name} takes a number as learning rate and no schedule: add --schedule constant "
            "--warmup 0."
        )
    if error:
        reason = str(error).partition("\n")[0]
        raise PretrainError(f"{label} does not work with these options: {reason}") from error
    return factory(learning_rate)


def _failure(factory: Factory, learning_rate: float | optax.Schedule) -> Exception | None:
    """What a factory, or the first update of its optimizer, objects to."""

    def update_once(params: jax.Array) -> optax.Updates:
        optimizer = optax.with_extra_args_support(factory(learning_rate))
        return optimizer.update(params, optimizer.init(params), params, value=jnp.float32(0))

    try:
        with warnings.catch_warnings():
            # Of a matrix that has no name; the model's parameters are warned of by themselves.
            warnings.simplefilter("ignore")
            jax.eval_shape(update_once, jnp.zeros((256, 256)))
    except Exception as error:  # any kind of exception can come out of another's code
        return error
    return None
