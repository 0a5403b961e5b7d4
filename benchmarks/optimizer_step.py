"""How long an optimizer's step takes beside AdamW's: interleaved runs in one process, medians.

python -m benchmarks.optimizer_step
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from microadam_jax import (
    adam_mini,
    adam_mini4bit,
    adam_mini8bit,
    adam_sn,
    adamw4bit,
    adamw4bit_factored,
    adamw8bit,
    adamw_fp8,
    came,
    memory_report,
    microadam,
)

OPTIMIZERS = {
    "AdamW": optax.adamw(1e-3),
    "Adam-mini": adam_mini(1e-3),
    "Adam-mini, first moment bfloat16": adam_mini(1e-3, mu_dtype="bfloat16"),
    "Adam-mini, 8 bits": adam_mini8bit(1e-3),
    "Adam-mini, 4 bits": adam_mini4bit(1e-3),
    "AdamW, 8 bits": adamw8bit(1e-3),
    "AdamW, FP8 expanded": adamw_fp8(1e-3),
    "AdamW, 4 bits, blocks": adamw4bit(1e-3, nu_codec="linear4_unsigned"),
    "AdamW, 4 bits, factored": adamw4bit_factored(1e-3),
    "AdamSN": adam_sn(1e-2),
    "CAME": came(1e-3),
    "MicroAdam, fast": microadam(1e-3),
    "MicroAdam, pretrain": microadam(1e-3, layout="pretrain"),
    "MicroAdam, paper": microadam(1e-3, layout="paper"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    params = {"kernel": jnp.zeros(args.shape)}
    gradient = {"kernel": jax.random.normal(jax.random.key(0), args.shape)}
    states = {name: tx.init(params) for name, tx in OPTIMIZERS.items()}
    steps = {
        name: jax.jit(tx.update, donate_argnums=1).lower(gradient, states[name], params).compile()
        for name, tx in OPTIMIZERS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for _ in range(args.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            _, states[name] = jax.block_until_ready(step(gradient, states[name], params))
            seconds[name].append(time.perf_counter() - start)

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    size = params["kernel"].size
    print(f"{size:,} parameters on {jax.devices()[0].device_kind}, JAX {jax.__version__}")
    print("| optimizer | bytes/param | ms | of AdamW's time |\n|---|---|---|---|")
    for name, median in medians.items():
        kept = memory_report(OPTIMIZERS[name], params).bytes_per_parameter
        ratio = median / medians["AdamW"]
        print(f"| {name} | {kept:.2f} | {1e3 * median:.1f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
