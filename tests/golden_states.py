"""Updates and states of every optimizer, to compare one version of the code with another.

python -m tests.golden_states write DIR      # before a change
python -m tests.golden_states compare DIR    # after it: bit for bit

The files hold for one machine, as many of its cores and one JAX: others sum in another order.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from microadam_jax.methods import METHODS
from tests.contracts.catalogue import ENTRIES, VARIANTS, gradients, parameters

STEPS = 4
# Leaves that go in chunks, in layers, in rows of blocks that 128 does not divide; and small ones.
LARGE = {
    "wte": {"embedding": (5025, 96)},
    "layers": {
        "mlp": {"kernel": (3, 256, 1376)},
        "attention": {"query": {"kernel": (3, 256, 4, 64)}},
        "norm": {"scale": (3, 256)},
    },
    "h": {
        "0": {"mlp": {"kernel": (768, 1000), "bias": (1000,)}},
        "11": {"norm": {"scale": (768,)}},
    },
    "lm_head": {"kernel": (96, 5025)},
}


def cases() -> Iterator[tuple[str, Any, Any]]:
    """Names, optimizers and parameters."""
    for name, entry in (ENTRIES | VARIANTS).items():
        for dtype in ("float32", "bfloat16"):
            yield f"{name}, {dtype}", entry.make(), parameters(dtype)
    for name, method in METHODS.items():
        tree = jax.tree.map(
            lambda shape: jnp.full(shape, 0.5), LARGE, is_leaf=lambda x: isinstance(x, tuple)
        )
        yield f"{name}, large leaves", method.factory(1e-3), tree


def run(tx: Any, params: Any) -> dict[str, np.ndarray]:
    """The arrays after some steps, by path."""
    state, updates = jax.jit(tx.init)(params), None
    update = jax.jit(tx.update)
    for step in range(STEPS):
        updates, state = update(gradients(params, step), state, params)
    leaves = jax.tree_util.tree_leaves_with_path({"updates": updates, "state": state})
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--only", default="", help="part of the names")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    worse = 0
    for name, tx, params in cases():
        if args.only not in name:
            continue
        path = args.directory / f"{name}.npz"
        found = run(tx, params)
        raw = {k: np.atleast_1d(x) for k, x in found.items()}
        raw = {k: x.view(np.uint8) if x.dtype.kind == "V" else x for k, x in raw.items()}
        if args.action == "write":
            np.savez(path, **raw)
            continue
        if not path.exists():
            print(f"new   {name}", flush=True)
            continue
        with np.load(path) as before:
            differing = [
                f"{key}: {_difference(before[key], x)}" if key in before else f"{key}: new"
                for key, x in raw.items()
                if key not in before or not _same(before[key], x)
            ] + [f"{key}: gone" for key in before if key not in raw]
        worse += bool(differing)
        print(f"{'DIFFERS' if differing else 'same'}  {name}", *differing, sep="\n    ", flush=True)
    return min(worse, 1)


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and np.array_equal(np.atleast_1d(one).view(np.uint8), np.atleast_1d(other).view(np.uint8))
    )


def _difference(one: np.ndarray, other: np.ndarray) -> str:
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{one.dtype}{one.shape} became {other.dtype}{other.shape}"
    count = (one.view(np.uint8) != other.view(np.uint8)).reshape(-1, one.itemsize).any(-1).sum()
    size = np.abs(one.astype(np.float64) - other.astype(np.float64)).max()
    return f"{count} of {one.size} elements, by {size:.3g} at most (of {np.abs(one).max():.3g})"


if __name__ == "__main__":
    sys.exit(main())
