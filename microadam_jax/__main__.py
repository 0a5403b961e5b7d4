"""What optimizers keep for a model, and what a training step needs per device.

``python -m microadam_jax memory llama2-7b``, ``python -m microadam_jax plan --model llama2-7b``
"""

import argparse

from microadam_jax.memory import GIB, MemoryReport, format_table, memory_report
from microadam_jax.methods import METHODS
from microadam_jax.models import MODELS, model_shapes
from microadam_jax.optimizer_names import optimizer
from microadam_jax.planner import command as plan

RANK = 512
PAPER = "microadam:layout=paper"
OTHER_SETTINGS = (
    "microadam:layout=pretrain",
    PAPER,
    "adam_mini:mu_dtype=bfloat16",
    "adamw:mu_dtype=bfloat16",
)


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
    """Prints what AdamW and each optimizer of the library keep for ``model``."""
    shapes = model_shapes(model)
    optimizers = {text: optimizer(text) for text in OTHER_SETTINGS}
    for name, method in METHODS.items():
        label = f"{name}, rank {RANK}" if method.at_rank(RANK) else name
        optimizers[label] = method.factory(method.learning_rate, **method.at_rank(RANK))
    reports = {label: memory_report(tx, shapes) for label, tx in optimizers.items()}
    paper = reports[PAPER]
    parameters = paper.parameters
    sizes = paper.adamw | {name: report.total for name, report in reports.items()}
    statistics = _bucket_statistics(paper)
    sizes[f"{PAPER}, as published *"] = paper.total - statistics
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
            continue  # its remarks are in it
        for remark in report.remark_lines():
            print(f"{name}: {remark}")


def _bucket_statistics(report: MemoryReport) -> int:
    return sum(
        size for name, size in report.fields.items() if name.endswith(("residual.low", ".high"))
    )


if __name__ == "__main__":
    main()
