"""How long is a training step of a wide layer, if only selected rows of its gradient are formed?

python -m benchmarks.grass_dense --batch 2048 --width 2048 --rows 256
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from microadam_jax import grass
from microadam_jax.selected_gradients import grass_dense


def seconds(step: Callable[..., object], *args: object, repeats: int) -> float:
    """The shortest of some runs, after one that compiles."""
    jax.block_until_ready(step(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2048, help="tokens in a batch")
    parser.add_argument("--width", type=int, default=2048, help="of a square kernel")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()

    keys = jax.random.split(jax.random.key(0), args.layers + 1)
    x = jax.random.normal(keys[-1], (args.batch, args.width))
    params = [
        jax.random.normal(key, (args.width, args.width)) / args.width**0.5 for key in keys[1:]
    ]
    tx = grass(1e-3, rank=args.rows, update_interval=10**6)

    def step(x: jax.Array, params: list[jax.Array], state: tuple, *, selected: bool) -> object:
        def loss(params: list[jax.Array]) -> jax.Array:
            y = x
            for kernel, chosen in zip(params, state[0].basis.indices, strict=True):
                y = jnp.tanh(grass_dense(y, kernel, chosen) if selected else y @ kernel)
            return jnp.mean(y**2)

        return tx.update(jax.grad(loss)(params), state, params)

    plain, rows = (jax.jit(functools.partial(step, selected=each)) for each in (False, True))
    _, state = plain(x, params, tx.init(params))
    print(f"{args.layers} layers of {args.width}, {args.batch} tokens, on {jax.devices()[0]}")
    for name, run in {"the whole gradient": plain, f"{args.rows} rows of it": rows}.items():
        print(f"{name}: {1e3 * seconds(run, x, params, state, repeats=args.repeats):.1f} ms")


if __name__ == "__main__":
    main()
