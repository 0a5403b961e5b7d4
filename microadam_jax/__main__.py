"""What optimizers keep for a model, and what a training step needs per device.

``python -m microadam_jax memory llama2-7b``, ``python -m microadam_jax plan --model llama2-7b``
"""

import argparse

import jax.numpy as jnp
import optax

from microadam_jax.aliases import (
    adam_mini,
    adam_mini4bit,
    adam_mini8bit,
    adam_sn,
    adamw4bit,
    adamw8bit,
    adamw_fp8,
    apollo,
    apollo_mini,
    came,
    fira,
    galore,
    grass,
    ldadam,
    lowrank_mfac,
    microadam,
    snsm,
    sparse_mfac,
)
from microadam_jax.memory import GIB, MemoryReport, format_table, memory_report
from microadam_jax.models import MODELS, model_shapes
from microadam_jax.planner import command as plan
from microadam_jax.subspace import Matrices, gaussian, power_iteration, svd, top_k_rows

RANK = 512
LARGER = Matrices(side="larger", square="out")

OPTIMIZERS = {
    "MicroAdam, fast": microadam(1e-3),
    "MicroAdam, pretrain": microadam(1e-3, layout="pretrain"),
    "MicroAdam, paper": microadam(1e-3, layout="paper"),
    "Adam-mini": adam_mini(1e-3),
    "Adam-mini, first moment bfloat16": adam_mini(1e-3, mu_dtype="bfloat16"),
    "Adam-mini, 8 bits": adam_mini8bit(1e-3),
    "Adam-mini, 4 bits": adam_mini4bit(1e-3),
    "AdamW, 8 bits": adamw8bit(1e-3),
    "AdamW, FP8 expanded": adamw_fp8(1e-3),
    "AdamW, 4 bits": adamw4bit(1e-3),
    "AdamSN": adam_sn(1e-2),
    "CAME": came(1e-3),
    "Sparse M-FAC, window 32": sparse_mfac(1e-3),
    "Low-rank M-FAC, window 32": lowrank_mfac(1e-3),
    f"GaLore, rank {RANK}": galore(1e-2, subspace=svd(RANK)),
    f"Fira, rank {RANK}": fira(1e-2, subspace=svd(RANK)),
    f"APOLLO, rank {RANK}": apollo(1e-2, subspace=gaussian(RANK)),
    "APOLLO-Mini": apollo_mini(1e-2),
    f"Grass, {RANK} rows": grass(1e-2, subspace=top_k_rows(RANK)),
    f"LDAdam, rank {RANK}": ldadam(1e-3, subspace=power_iteration(RANK)),
    f"SNSM, rank {RANK}": snsm(1e-2, subspace=svd(RANK)),
    f"SNSM, {RANK} rows": snsm(1e-2, subspace=top_k_rows(RANK), matrices=LARGER),
    "AdamW, first moment bfloat16": optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
}


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m microadam_jax", description=__doc__)
    commands = parser.add_subparsers(required=True)
    memory = commands.add_parser("memory", help="bytes of optimizer state for a model")
    memory.add_argument("model", choices=sorted(MODELS), help="a model of the registry")
    memory.add_argument("--fields", action="store_true", help="each optimizer's state by field")
    memory.set_defaults(run=lambda options: print_memory(options.model, fields=options.fields))
    plan.add_flags(commands.add_parser("plan", help="memory of a training step per device"))
    options = parser.parse_args(arguments)
    options.run(options)


def print_memory(model: str, *, fields: bool = False) -> None:
    """Prints what AdamW and each optimizer of the library would keep for ``model``."""
    shapes = model_shapes(model)
    reports = {name: memory_report(tx, shapes) for name, tx in OPTIMIZERS.items()}
    paper = reports["MicroAdam, paper"]
    parameters = paper.parameters
    sizes = paper.adamw | {name: report.total for name, report in reports.items()}
    statistics = _bucket_statistics(paper)
    sizes["MicroAdam, paper, as published *"] = paper.total - statistics
    rows = [
        (name, f"{size / GIB:.2f}", f"{size / parameters:.3f}")
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])
    ]
    print(f"{model}: {parameters:,} parameters")
    print("\n".join(format_table([("optimizer state", "GiB", "bytes/param"), *rows])))
    print(
        "* The published count leaves out the minimum and maximum of each 4-bit bucket, which "
        f"add {statistics / GIB:.2f} GiB."
    )
    for name, report in reports.items():
        if fields:
            print(f"\n{name}: {report}")
            continue  # the report says its remarks itself
        for remark in report.remark_lines():
            print(f"{name}: {remark}")


def _bucket_statistics(report: MemoryReport) -> int:
    return sum(
        size for name, size in report.fields.items() if name.endswith(("residual.low", ".high"))
    )


if __name__ == "__main__":
    main()
