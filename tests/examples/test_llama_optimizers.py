"""Optimizers by name, their options and learning rates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.llama.config import Config, PretrainError
from examples.llama.optimizers import build
from microadam_jax import microadam

PARAMS = {"w": jnp.ones((4,))}
GRADIENTS = {"w": jnp.array([3.0, 0.0, -4.0, 0.0])}


def updates(optimizer: optax.GradientTransformation, steps: int) -> np.ndarray:
    """The updates of some steps with the same gradient."""
    state, collected = optimizer.init(PARAMS), []
    for _ in range(steps):
        update, state = optimizer.update(GRADIENTS, state, PARAMS)
        collected.append(update["w"])
    return np.stack(collected)


def built(**settings: object) -> dict[str, optax.GradientTransformation]:
    return build(dataclasses.replace(Config(), **{"embeddings_lr": ()} | settings))


def test_names_come_from_all_three_packages() -> None:
    names = ["microadam", "adamw", "muon"]
    assert list(built(optimizer=",".join(names))) == names


def test_options_reach_the_labelled_optimizer_only() -> None:
    optimizers = built(
        optimizer="plain=sgd,heavy=sgd",
        opt=("heavy.momentum=0.5", "heavy.nesterov=True"),
        lr=("1.0", "heavy=2.0"),
        schedule="constant",
        warmup=0.0,
        clip=0.0,
    )
    gradient = GRADIENTS["w"]
    np.testing.assert_allclose(updates(optimizers["plain"], 2), [-gradient, -gradient])
    heavy = updates(optax.sgd(2.0, momentum=0.5, nesterov=True), 2)
    np.testing.assert_allclose(updates(optimizers["heavy"], 2), heavy)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, *(1 - 0.9 * np.arange(1, 7) / 7)]),
        ("cosine", [0.25, 0.5, 0.75, 1, *(0.55 + 0.45 * np.cos(np.pi * np.arange(1, 7) / 7))]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    settings = {"optimizer": "sgd", "steps": 10, "lr": ("1",), "warmup": 0.3, "clip": 0.0}
    taken = updates(built(schedule=schedule, **settings)["sgd"], 10)
    np.testing.assert_allclose(taken[:, 0] / -GRADIENTS["w"][0], expected, rtol=1e-5)


def test_gradients_are_clipped_to_their_norm() -> None:
    settings = {"optimizer": "sgd", "schedule": "constant", "warmup": 0.0, "lr": ("1",)}
    [clipped] = updates(built(clip=1.0, **settings)["sgd"], 1)
    np.testing.assert_allclose(clipped, -GRADIENTS["w"] / 5, rtol=1e-6)


def test_bare_words_are_strings_and_override_what_suits_pretraining() -> None:
    optimizers = built(optimizer="microadam,fast=microadam", opt=("fast.layout=fast",))
    for label, layout in {"microadam": "pretrain", "fast": "fast"}.items():
        assert windows(optimizers[label]) == windows(microadam(1e-3, layout=layout))


def windows(optimizer: optax.GradientTransformation) -> tuple[int, ...]:
    """The shape of a window of gradients, which tells layouts apart."""
    state = jax.eval_shape(optimizer.init, {"w": jnp.ones((256, 256))})
    return optax.tree.get(state, "window_values")["w"].shape


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"optimizer": "microadan"}, "no optimizer 'microadan'; did you mean microadam or adan"),
        ({"optimizer": "zzzz"}, "there are .*adamw"),
        ({"optimizer": "adamw,adamw"}, "a different label for each run"),
        ({"optimizer": "../up=adamw"}, "a different label for each run"),
        ({"optimizer": "sm3"}, "add --schedule constant --warmup 0"),
        ({"optimizer": "lbfgs"}, "lbfgs does not work with these options: .*value_fn"),
        ({"opt": ("adamw.beta=1",)}, "adamw has no option 'beta'; it has b1, b2, .*nesterov"),
        ({"opt": ("lion.b1=1",)}, "is for 'lion', but this run trains adamw, microadam"),
        ({"opt": ("b1=1",)}, "does not have the form LABEL.OPTION=VALUE"),
        ({"opt": ("microadam.layout=slow",)}, "microadam does not work .*'slow'"),
        ({"lr": ("adamw=fast",)}, "--lr adamw=fast does not end in a number"),
        ({"lr": ("lion=1",)}, "is for 'lion'"),
        ({"lr": ("adamw=nan",)}, "--lr adamw=nan must end in a rate of at least 0"),
    ],
)
def test_mistakes_get_one_sentence(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(PretrainError, match=sentence) as caught:
        built(**settings)
    assert "\n" not in str(caught.value)


def test_embeddings_and_norms_have_a_rate_of_their_own() -> None:
    settings = {"optimizer": "sgd,slow=sgd", "schedule": "constant", "warmup": 0.0, "clip": 0.0}
    rates = {"lr": ("1", "slow=0.5"), "embeddings_lr": ("3", "slow=0.5")}
    gradients = {"embedding": jnp.ones(2), "mlp": {"kernel": jnp.ones(2)}}
    for label, embedding, kernel in [("sgd", -3, -1), ("slow", -0.5, -0.5)]:
        optimizer = built(**settings, **rates)[label]
        taken, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
        np.testing.assert_allclose(taken["embedding"], embedding)
        np.testing.assert_allclose(taken["mlp"]["kernel"], kernel)


def test_no_multiple_of_zero_is_a_rate() -> None:
    with pytest.raises(PretrainError, match=r"--lr of sgd is 0.*--embeddings-lr sgd=0"):
        built(optimizer="sgd", lr=("0",), embeddings_lr=("0.02",))
    assert built(optimizer="sgd", lr=("0",), embeddings_lr=("0",))
