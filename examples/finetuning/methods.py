"""Full fine-tuning, LoRA, QLoRA and Quantized Side Tuning as changes of a model."""

from typing import Any

from flax import nnx

from microadam_jax.layers.nnx import Nf4Linear, quantize_linears, replace_linears

from .config import Config
from .jobs import Job

Params = dict[str, Any]


def prepare(job: Job, method: str, config: Config) -> tuple[Any, Params, Params]:
    """Builds the model of a job for a method.

    Args:
        job: The job.
        method: `full`, `lora`, `qlora` or `qst`.
        config: Sets the sizes of what is added, and the seed of new weights.

    Returns:
        The graph that `nnx.merge` turns, with both others, into a callable model; the weights that
        are trained; and those that are not.
    """
    model = job.make_model(config.seed)
    rngs = nnx.Rngs(config.seed + 1)
    if method in ("qlora", "qst"):
        quantize_linears(model.backbone.layers)
    if method in ("lora", "qlora"):
        replace_linears(model.backbone.layers, lambda base: _with_lora(base, config.rank, rngs))
    if method == "qst":
        model.side = nnx.data(job.make_side(config, rngs))
    trained = nnx.Param if method == "full" else nnx.All(nnx.Param, _is_new)
    graph, trainable, frozen = nnx.split(model, trained, ...)
    return graph, nnx.to_pure_dict(trainable), nnx.to_pure_dict(frozen)


def _is_new(path: tuple[Any, ...], value: Any) -> bool:
    return path[0] in ("side", "head") or isinstance(value, nnx.LoRAParam)


def _with_lora(base: nnx.Linear | Nf4Linear, rank: int, rngs: nnx.Rngs) -> nnx.LoRA:
    """Wraps a layer, or one for all layers of a stack, into an adapter of Flax."""
    kernel = base._codes if isinstance(base, Nf4Linear) else base.kernel

    def make(rngs: nnx.Rngs) -> nnx.LoRA:
        return nnx.LoRA(base.in_features, rank, base.out_features, rngs=rngs)

    for size in kernel.shape[:-2]:
        make = nnx.split_rngs(splits=size)(nnx.vmap(make))
    adapter = make(rngs)
    adapter.base_module = nnx.data(base)
    return adapter
