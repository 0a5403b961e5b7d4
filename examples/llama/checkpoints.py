"""Checkpoints of one run, with the configuration they belong to."""

from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from .config import PretrainError, differences_of


class Checkpoints:
    """The checkpoints in a directory; a save that is cut short leaves the earlier ones intact."""

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        """Opens a directory of checkpoints.

        Args:
            directory: The directory; it need not exist.
            identity: JSON values on which a checkpoint must agree to be restored.
        """
        self._identity = identity
        self._directory = directory
        self._manager = ocp.CheckpointManager(
            directory.resolve(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2,
                # What a killed process left of an unfinished save.
                cleanup_tmp_directories=True,
                # The next step donates the arrays that are being saved.
                enable_async_checkpointing=False,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int:
        """Number of steps done at the latest checkpoint; 0 without one."""
        return self._manager.latest_step() or 0

    def save(self, step: int, state: Any) -> None:
        """Saves the state after `step` steps.

        The batches follow from the seed and the step, so the step is also the position in the
        data and the state of the random numbers.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_without_empty(state)),
                config=ocp.args.JsonSave(self._identity),
            ),
        )

    def restore(self, like: Any) -> Any:
        """Reads the latest checkpoint.

        Args:
            like: Shapes, dtypes and shardings of the state; the mesh may be another one than
                at the time of saving.

        Returns:
            The state.

        Raises:
            PretrainError: If the checkpoint is damaged or of another configuration.
        """
        self.require_same_configuration()
        state = self._read(state=ocp.args.StandardRestore(_without_empty(like)))
        return jax.tree.map(
            lambda shape, array: _empty(shape) if array is None else array, like, state
        )

    def require_same_configuration(self) -> None:
        """Refuses the latest checkpoint if it is of another configuration.

        Raises:
            PretrainError: If it is, or it cannot be read.
        """
        stored = self._read(config=ocp.args.JsonRestore())
        if differences := differences_of(stored, self._identity):
            raise PretrainError(
                f"The checkpoint in {self._directory} is of another configuration: {differences}."
            )

    def _read(self, **item: Any) -> Any:
        """One item of the latest checkpoint."""
        (name,), steps = item, sorted(self._manager.all_steps())
        try:
            return self._manager.restore(steps[-1], args=ocp.args.Composite(**item))[name]
        except (KeyError, OSError, TypeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            earlier = f"step {steps[-2]}" if len(steps) > 1 else "the start"
            raise PretrainError(
                f"The checkpoint {self._directory / str(steps[-1])} cannot be read ({reason}). "
                f"Remove it, and the run continues from {earlier}."
            ) from error


def _without_empty(tree: Any) -> Any:
    # Orbax refuses arrays without elements, which some optimizers have in their state.
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def _empty(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)
