"""Measures the time of a step that updates layers in its backward pass against the ordinary one.

python -m benchmarks.backward_updates

A Transformer of GPT-2's size (12 layers of width 768, 50257 words) in float32. Both steps compute
each layer twice and have the same pieces; in one process they take turns, after one step each that
does not count.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from microadam_jax.layers import chunked_cross_entropy, update_in_backward
from microadam_jax.optimizer_names import optimizer

LAYERS, WIDTH, HEADS, VOCAB = 12, 768, 12, 50257
Step = Callable[[Any, Any, jax.Array], tuple[Any, Any, jax.Array]]


def params_of(key: jax.Array) -> dict[str, Any]:
    """Draws parameters."""
    keys = iter(jax.random.split(key, 6))

    def draw(*shape: int) -> dict[str, jax.Array]:
        return {"kernel": 0.02 * jax.random.normal(next(keys), shape)}

    layers = {
        "norm_1": {"scale": jnp.ones((LAYERS, WIDTH))},
        "qkv": draw(LAYERS, WIDTH, 3 * WIDTH),
        "out": draw(LAYERS, WIDTH, WIDTH),
        "norm_2": {"scale": jnp.ones((LAYERS, WIDTH))},
        "up": draw(LAYERS, WIDTH, 4 * WIDTH),
        "down": draw(LAYERS, 4 * WIDTH, WIDTH),
    }
    embedding = {"embedding": draw(VOCAB, WIDTH)["kernel"]}
    return {"embed": embedding, "layers": layers, "lm_head": draw(WIDTH, VOCAB)}


def before(rest: Any, tokens: jax.Array) -> jax.Array:
    """Looks the tokens up."""
    return rest["embed"]["embedding"][tokens[:, :-1]]


def layer(weights: Any, x: jax.Array) -> jax.Array:
    """Attention, and two linear maps."""
    h = _normed(weights["norm_1"], x) @ weights["qkv"]["kernel"]
    query, key, value = jnp.split(h.reshape(*h.shape[:-1], HEADS, -1), 3, axis=-1)
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x += mixed.reshape(x.shape) @ weights["out"]["kernel"]
    h = jax.nn.gelu(_normed(weights["norm_2"], x) @ weights["up"]["kernel"])
    return x + h @ weights["down"]["kernel"]


def after(rest: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean cross entropy of the next token."""
    return chunked_cross_entropy(x, rest["lm_head"]["kernel"], tokens[:, 1:]).mean()


def ordinary(tx: optax.GradientTransformation) -> Step:
    """The step with a tree of gradients, whose layers are rematerialized."""

    def loss_of(params: Any, tokens: jax.Array) -> jax.Array:
        x = before(params, tokens)
        x, _ = jax.lax.scan(lambda x, w: (jax.checkpoint(layer)(w, x), None), x, params["layers"])
        return after(params, x, tokens)

    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def main() -> None:
    """Prints seconds of both steps, the medians, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", default="adam_mini4bit")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    tx = optimizer(options.optimizer)
    training = update_in_backward(tx, before, layer, after)
    steps = {"ordinary": ordinary(tx), "in the backward pass": training.step}
    shape = (options.batch, options.seq + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, VOCAB)
    runs, seconds = {}, {name: [] for name in steps}
    for name, step in steps.items():
        params = jax.jit(params_of)(jax.random.key(0))
        state = jax.jit(training.init)(params)
        program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens).compile()
        runs[name] = [program, params, state]
        memory: Any = program.memory_analysis()
        size = memory.temp_size_in_bytes / 2**20
        print(f"{options.optimizer}, {name}: temporaries {size:.0f} MiB", flush=True)
    for turn in range(1 + options.steps):
        for name, run in runs.items():
            program, params, state = run
            start = time.perf_counter(), time.process_time()
            params, state, loss = jax.block_until_ready(program(params, state, tokens))
            run[1:] = params, state
            took = time.perf_counter() - start[0], time.process_time() - start[1]
            print(f"{name}: {took[0]:.2f} s, CPU {took[1]:.2f} s, loss {loss:.6f}", flush=True)
            if turn:
                seconds[name].append(took)
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in seconds.items()
    }
    for name, (wall, cpu) in medians.items():
        print(f"median {name}: {wall:.2f} s, CPU {cpu:.2f} s")
    plain, own = medians.values()
    print(f"ratio: {own[0] / plain[0]:.3f}, of CPU time {own[1] / plain[1]:.3f}")


def _normed(weights: Any, x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * weights["scale"]


if __name__ == "__main__":
    main()
