"""What a training step needs per device: by arithmetic, or from the compiler of the real device."""

from microadam_jax.planner.arithmetic import Plan, arithmetic_plan
from microadam_jax.planner.compiled import CompiledPlan, compiled_plan
from microadam_jax.planner.llama import Model, stacked_model
from microadam_jax.planner.meshes import parse_mesh

__all__ = [
    "CompiledPlan",
    "Model",
    "Plan",
    "arithmetic_plan",
    "compiled_plan",
    "parse_mesh",
    "stacked_model",
]
