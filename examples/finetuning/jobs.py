"""What a job gives to the training loop."""

from typing import Any, Protocol

import jax
from flax import nnx

from microadam_jax.layers.nnx import SideNetwork

from .config import Config

Batch = dict[str, Any]  # arrays with an axis of examples in front


class Job(Protocol):
    """A pretrained model with examples to fine-tune it on.

    A model of a job has its pretrained part under `backbone`, optionally a side network under
    `side`, and new weights, if any, under `head`.
    """

    @property
    def digest(self) -> str:
        """Of examples and weights: runs are only resumed on the same."""
        ...

    def make_model(self, seed: int) -> nnx.Module:
        """Builds the model, with pretrained weights and new ones from a seed."""
        ...

    def make_side(self, config: Config, rngs: nnx.Rngs) -> SideNetwork:
        """Builds the side network for it."""
        ...

    def batch(self, step: int) -> Batch:
        """Draws the examples of a step; equal steps give equal batches."""
        ...

    def held_out_batches(self) -> Batch:
        """A few held-out batches, with an axis for them in front."""
        ...

    def loss(self, model: Any, batch: Batch) -> jax.Array:
        """The mean loss of a batch."""
        ...

    def correct(self, model_of: Any, params: Any) -> list[bool]:
        """Whether each held-out example is answered correctly by `model_of(params)`."""
        ...
