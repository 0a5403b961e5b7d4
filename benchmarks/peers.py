"""Are our optimizers those that their authors released? Both, from the same weights and gradients.

make peers
make peers ARGS="--only GaLore APOLLO --steps 20"
make peers ARGS="--out docs/peers.csv --page docs/peers.md"

Each pair takes the same gradients, which depend on the step alone, so that differences do not feed
back. The difference of the parameters is divided by how far the released optimizer has moved them
so far, once by the largest elements and once by root mean squares, for each leaf and step; the
largest of all is shown. Times are medians over the steps, in which all four optimizers of a pair
take turns, so that refreshes of subspaces fall out.
"""

import argparse
import csv
import dataclasses
import datetime
import functools
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.places import filled
from benchmarks.scale import step_of
from microadam_jax import (
    Partition,
    adam_mini,
    adamw4bit,
    adamw8bit,
    adamw_fp8,
    apollo,
    apollo_mini,
    came,
    galore,
    memory_report,
)
from microadam_jax.blocks import Blocks
from microadam_jax.codecs import dynamic8, float8
from microadam_jax.layout.names import transformer_rules
from microadam_jax.subspace.subspace import Arrays, KeepsVectors

HEADS, RANK, INTERVAL, STEPS = 12, 64, 20, 30
SHAPES = {
    "attention/q_proj/kernel": (768, 768),
    "mlp/up_proj/kernel": (768, 1000),
    "mlp/down_proj/kernel": (1000, 768),
    "norm/scale": (768,),
}
# Rows of 1024 are cut into blocks of 128 and 256 by ours and by torchao, those of 1000 are not.
WIDE = {"mlp/wide_proj/kernel": (768, 1024), "norm/scale": (768,)}
COLUMNS = (
    "package",
    "optimizer",
    "largest difference",
    "rms difference",
    "bytes/param: released",
    "ours",
    "time / own AdamW: released",
    "ours",
)
MARK = "python -m benchmarks.peers"

Tensors = dict[str, np.ndarray]  # by the path in SHAPES, in the layout of JAX


@dataclasses.dataclass(frozen=True)
class Pair:
    """A released optimizer and ours.

    Attributes:
        package: on the Python Package Index.
        name: of the released optimizer, and what was set.
        released: makes it from torch parameters by name.
        ours: the same.
        shipped: what bytes and times are taken of, where ``ours`` was given random numbers.
        shapes: of the parameters, by path.
        transposed: whether torch has kernels as ``(out, in)``; as it has, but for blocks of rows.
        timed: whether the released step is run as its authors mean it to be.
    """

    package: str
    name: str
    released: Callable[[dict[str, Any]], Any]
    ours: optax.GradientTransformation
    shipped: optax.GradientTransformation | None = None
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=lambda: SHAPES)
    transposed: bool = True
    timed: bool = True


@dataclasses.dataclass(frozen=True)
class Result:
    """Holds the measurements of a pair.

    Attributes:
        largest: difference of the largest elements, over the largest move.
        rms: difference of root mean squares, over that of the move.
        released_bytes: of state, per parameter.
        our_bytes: the same.
        released_time: of a step, over that of torch's AdamW; None if not measured.
        our_time: over that of Optax's AdamW, both compiled.
    """

    largest: float
    rms: float
    released_bytes: float
    our_bytes: float
    released_time: float | None
    our_time: float


@dataclasses.dataclass(frozen=True)
class Given(KeepsVectors):
    """A random basis from NumPy, which torch can have too."""

    seeks: ClassVar[bool] = False

    def find(self, matrix: jax.Array, kept: Arrays, first: jax.Array, key: jax.Array) -> Arrays:
        """The same numbers for all matrices with as many rows."""
        del first, key
        numbers = random_basis(matrix.shape[-2], kept[0].shape[-1])
        return (jnp.broadcast_to(numbers, kept[0].shape),)


def random_basis(rows: int, rank: int) -> np.ndarray:
    """Normal numbers of variance 1 / rank, ``(rows, rank)``."""
    numbers = np.random.default_rng(rows).normal(size=(rows, rank)) / np.sqrt(rank)
    return numbers.astype(np.float32)


def weights(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Initial weights of the usual size."""
    rng = np.random.default_rng(0)
    drawn = {path: rng.normal(0, 0.02, shape) for path, shape in shapes.items()}
    return {path: value.astype(np.float32) for path, value in drawn.items()}


@functools.cache
def gradients(step: int) -> Tensors:
    """Gradients of all leaves, as of a few hundred tokens.

    They have a decaying spectrum, some noise, and rows of uneven size. Singular values are 5 %
    apart, so that rounding does not decide which subspace is found.
    """
    rng = np.random.default_rng(step + 1)
    drawn: Tensors = {}
    for index, (path, shape) in enumerate((SHAPES | WIDE).items()):
        fixed = np.random.default_rng(1000 + index)  # what all steps share
        if len(shape) == 1:
            drawn[path] = 1e-3 * (fixed.normal(size=shape) + rng.normal(size=shape))
            continue
        rows, columns = shape
        components = min(200, *shape)
        spectrum = 1.05 ** -np.arange(components)
        left = fixed.normal(size=(rows, components)) + rng.normal(size=(rows, components))
        right = rng.normal(size=(components, columns))
        uneven = np.exp(0.5 * fixed.normal(size=(rows, 1)))
        drawn[path] = 1e-4 * uneven * (left * spectrum @ right + 0.01 * rng.normal(size=shape))
    return {path: value.astype(np.float32) for path, value in drawn.items()}


def nested(tensors: Tensors) -> dict[str, Any]:
    """The tree whose paths are the names."""
    tree: dict[str, Any] = {}
    for path, tensor in tensors.items():
        *above, last = path.split("/")
        level = tree
        for part in above:
            level = level.setdefault(part, {})
        level[last] = tensor
    return tree


def flat(tree: Any) -> Tensors:
    """The inverse of :func:`nested`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def torch_name(path: str) -> str:
    """``mlp.up_proj.weight`` of ``mlp/up_proj/kernel``."""
    return ".".join((*path.split("/")[:-1], "weight"))


def released_pairs() -> Iterator[Pair]:
    """The pairs, by package."""

    def matrices(named: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
        """Torch's parameter groups: vectors, and matrices with ``settings``."""
        return [
            {"params": [p for p in named.values() if p.ndim == 1]},
            {"params": [p for p in named.values() if p.ndim > 1], **settings},
        ]

    def spared(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    def released_adam_mini(named: dict[str, Any]) -> Any:
        from adam_mini import Adam_mini

        return Adam_mini(
            named_parameters=named.items(),
            lr=1e-3,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            dim=768,
            n_heads=HEADS,
            verbose=False,
        )

    partition = Partition(transformer_rules(heads=HEADS))
    ours = adam_mini(1e-3, b2=0.95, weight_decay=0.1, mask=spared, partition=partition)
    yield Pair("adam-mini", "Adam-mini", released_adam_mini, ours)

    def released_came(named: dict[str, Any]) -> Any:
        from came_pytorch import CAME

        return CAME(named.values(), lr=1e-4, weight_decay=0.1)

    yield Pair("came-pytorch", "CAME", released_came, came(1e-4, weight_decay=0.1))

    def released_galore(named: dict[str, Any]) -> Any:
        from galore_torch import GaLoreAdamW

        settings = {"rank": RANK, "update_proj_gap": INTERVAL, "scale": 0.25, "proj_type": "std"}
        groups = matrices(named, **settings)
        return GaLoreAdamW(groups, lr=1e-2, weight_decay=0.1, no_deprecation_warning=True)

    def galore_with_our_signs(named: dict[str, Any]) -> Any:
        from galore_torch import galore_projector

        projector = galore_projector.GaLoreProjector
        original = projector.get_orthogonal_matrix

        def signed(self: Any, weights: Any, rank: int, type: str) -> Any:  # noqa: A002
            basis = with_our_signs(original(self, weights, rank, type), type)
            self.ortho_matrix = basis
            return basis

        optimizer = released_galore(named)
        return Patched(optimizer, projector, "get_orthogonal_matrix", signed)

    ours = galore(1e-2, weight_decay=0.1, rank=RANK, update_interval=INTERVAL)
    yield Pair("galore-torch", "GaLore", released_galore, ours)
    yield Pair("galore-torch", "GaLore, signs of vectors as ours", galore_with_our_signs, ours)

    def released_apollo(named: dict[str, Any], mini: bool = False) -> Any:
        from apollo_torch import APOLLOAdamW, random_projector

        def given(self: Any, weights: Any, rank: int, type: str, seed: int) -> Any:  # noqa: A002
            import torch

            del self, seed
            basis = torch.from_numpy(random_basis(min(weights.shape), rank))
            return basis if type == "left" else basis.T

        settings = {
            "rank": 1 if mini else RANK,
            "proj": "random",
            "scale_type": "tensor" if mini else "channel",
            "scale": 128 if mini else 1,
            "update_proj_gap": 10 * STEPS,
            "proj_type": "std",
        }
        optimizer = APOLLOAdamW(
            matrices(named, **settings), lr=1e-2, weight_decay=0.1, no_deprecation_warning=True
        )
        return Patched(
            optimizer, random_projector.GradientProjector, "get_orthogonal_matrix", given
        )

    yield Pair(
        "apollo-torch",
        "APOLLO, one basis, given",
        released_apollo,
        apollo(1e-2, weight_decay=0.1, subspace=Given(RANK), update_interval=10 * STEPS),
        apollo(1e-2, weight_decay=0.1, rank=RANK),
    )
    yield Pair(
        "apollo-torch",
        "APOLLO-Mini, one basis, given",
        lambda named: released_apollo(named, mini=True),
        apollo_mini(1e-2, weight_decay=0.1, subspace=Given(1), update_interval=10 * STEPS),
        apollo_mini(1e-2, weight_decay=0.1),
    )

    # Ours would choose 128, so that eight devices can have whole blocks of a row of 1024.
    blocks = Blocks(256, shards=1)
    low_bit = {
        "AdamW8bit": adamw8bit(
            1e-3, mu_codec=dynamic8(blocks), nu_codec=dynamic8(blocks, signed=False)
        ),
        # Released code rounds first moments to nearest, ours do not unless they are told to.
        "AdamW4bit": adamw4bit(1e-3, mu_codec="dynamic4", nu_codec="linear4_unsigned"),
        "AdamWFp8": adamw_fp8(1e-3, mu_codec=float8(block=blocks), nu_codec=float8(block=blocks)),
    }
    for name, tx in low_bit.items():

        def released_torchao(named: dict[str, Any], name: str = name) -> Any:
            import torch
            import torchao.optim

            # Its compilation takes minutes and a compiler, and does not change the arithmetic.
            torch.compiler.set_stance("force_eager")
            return getattr(torchao.optim, name)(list(named.values()), lr=1e-3, weight_decay=1e-2)

        for rows, shapes in {"the same blocks": WIDE, "blocks of rows": SHAPES}.items():
            yield Pair(
                "torchao",
                f"{name}, {rows}",
                released_torchao,
                tx,
                shapes=shapes,
                transposed=False,
                timed=False,
            )


def with_our_signs(basis: Any, side: str) -> Any:
    """The singular vectors, the largest element of each positive.

    Args:
        basis: torch's, ``(n, r)``, or ``(r, n)`` if ``side`` is ``"right"``.
        side: where the basis is multiplied.
    """
    import torch

    axis = 1 if side == "right" else 0
    largest = basis.abs().argmax(axis, keepdim=True)
    return basis * torch.sign(torch.take_along_dim(basis, largest, axis))


@dataclasses.dataclass
class Patched:
    """A torch optimizer during whose steps a method of its projector is another."""

    optimizer: Any
    owner: type
    name: str
    method: Callable[..., Any]

    @property
    def state(self) -> Any:
        """That of the optimizer."""
        return self.optimizer.state

    def step(self) -> None:
        """Takes a step with the other method."""
        original = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.method)
        try:
            self.optimizer.step()
        finally:
            setattr(self.owner, self.name, original)


@dataclasses.dataclass
class OurRun:
    """A compiled step of an Optax optimizer, and where it is."""

    params: Any
    state: Any
    compiled: Any

    @classmethod
    def start(cls, tx: optax.GradientTransformation, initial: Tensors) -> "OurRun":
        """Compiles the step for these parameters."""
        params = jax.tree.map(jnp.array, nested(initial))
        state = tx.init(params)
        lowered = jax.jit(step_of(tx), donate_argnums=(0, 1)).lower(params, state, params)
        return cls(params, state, lowered.compile())

    def step(self, grads: Tensors) -> float:
        """Takes one; returns its seconds."""
        placed = jax.block_until_ready(jax.tree.map(jnp.array, nested(grads)))
        start = time.perf_counter()
        self.params, self.state = jax.block_until_ready(
            self.compiled(self.params, self.state, placed)
        )
        return time.perf_counter() - start

    def current(self) -> Tensors:
        """The parameters now."""
        return flat(self.params)


@dataclasses.dataclass
class TorchRun:
    """A torch optimizer and its parameters."""

    named: dict[str, Any]
    optimizer: Any
    transposed: bool

    @classmethod
    def start(
        cls, make: Callable[[dict[str, Any]], Any], initial: Tensors, transposed: bool
    ) -> "TorchRun":
        """Makes the optimizer for these parameters."""
        import torch

        named = {
            torch_name(path): torch.nn.Parameter(cls.tensor(value, transposed))
            for path, value in initial.items()
        }
        return cls(named, make(named), transposed)

    @staticmethod
    def tensor(value: np.ndarray, transposed: bool) -> Any:
        """A copy in torch's layout."""
        import torch

        return torch.from_numpy(np.array(value.T if transposed else value, order="C"))

    def step(self, grads: Tensors) -> float:
        """Takes one; returns its seconds."""
        for path, grad in grads.items():
            self.named[torch_name(path)].grad = self.tensor(grad, self.transposed)
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start

    def current(self, paths: Sequence[str]) -> Tensors:
        """The parameters now, in the layout of JAX."""
        values = {path: self.named[torch_name(path)].detach().numpy() for path in paths}
        return {path: value.T if self.transposed else value for path, value in values.items()}

    def state_bytes(self) -> int:
        """Bytes of all tensors in the state, those inside of other objects included."""
        return sum(tensor_bytes(dict(self.optimizer.state), set()))


def tensor_bytes(value: Any, seen: set[int]) -> Iterator[int]:
    """The bytes of each tensor in a state, once."""
    import torch

    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from tensor_bytes(getattr(value, name), seen)
    elif isinstance(value, torch.Tensor):
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            yield value.numel() * value.element_size()
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensor_bytes(inner, seen)
    elif hasattr(value, "__dict__"):
        yield from tensor_bytes(vars(value), seen)


def difference(ours: Tensors, released: Tensors, initial: Tensors) -> tuple[float, float]:
    """Measures how far apart they are, beside how far ``released`` went; the largest of the leaves.

    Returns:
        By the largest elements, and by root mean squares.
    """
    largest, rms = 0.0, 0.0
    for path, start in initial.items():
        apart = np.abs(ours[path] - released[path], dtype=np.float64)
        moved = np.abs(released[path] - start, dtype=np.float64)
        largest = max(largest, float(apart.max() / moved.max()))
        rms = max(rms, float(np.sqrt(np.mean(apart**2) / np.mean(moved**2))))
    return largest, rms


def compare(pair: Pair, steps: int) -> Result:
    """Walks all four optimizers side by side."""
    import torch

    initial = weights(pair.shapes)
    ours = OurRun.start(pair.ours, initial)
    shipped = ours if pair.shipped is None else OurRun.start(pair.shipped, initial)
    optax_adamw = OurRun.start(optax.adamw(1e-3), initial)
    released = TorchRun.start(pair.released, initial, pair.transposed)
    torch_adamw = TorchRun.start(
        lambda named: torch.optim.AdamW(named.values(), lr=1e-3), initial, pair.transposed
    )
    differences, times = [], []
    for step in range(steps):
        grads = {path: gradients(step)[path] for path in pair.shapes}
        if shipped is not ours:
            ours.step(grads)
        runs = (shipped, optax_adamw, released, torch_adamw)
        times.append([run.step(grads) for run in runs])
        differences.append(difference(ours.current(), released.current(list(pair.shapes)), initial))
    our_time, optax_time, released_time, torch_time = map(
        statistics.median, zip(*times, strict=True)
    )
    largest, rms = map(max, zip(*differences, strict=True))
    size = sum(value.size for value in initial.values())
    report = memory_report(pair.shipped or pair.ours, nested(initial))
    return Result(
        largest,
        rms,
        released.state_bytes() / size,
        report.total / size,
        released_time / torch_time if pair.timed else None,
        our_time / optax_time,
    )


def row_of(pair: Pair, result: Result, steps: int) -> dict[str, str]:
    """Returns the row of a pair in the file."""
    numbers = {
        name: "" if value is None else f"{value:.4g}"
        for name, value in dataclasses.asdict(result).items()
    }
    return {
        "package": pair.package,
        "version": version(pair.package),
        "optimizer": pair.name,
        "steps": str(steps),
        **numbers,
        "torch": version("torch"),
        "jax": jax.__version__,
        "date": str(datetime.date.today()),
    }


def read(path: Path) -> list[dict[str, str]]:
    """The rows of earlier calls."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Writes all rows, in the order of the pairs."""
    order = [(pair.package, pair.name) for pair in released_pairs()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            sorted(rows, key=lambda row: order.index((row["package"], row["optimizer"])))
        )


def table(rows: Sequence[dict[str, str]]) -> str:
    """One row for each pair, as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        apart = " | ".join(f"{float(row[name]):.1e}" for name in ("largest", "rms"))
        kept = " | ".join(f"{float(row[name]):.3f}" for name in ("released_bytes", "our_bytes"))
        took = " | ".join(
            f"{float(row[name]):.1f}" if row[name] else "-"
            for name in ("released_time", "our_time")
        )
        package = f"`{row['package']}` {row['version']}"
        lines.append(f"| {package} | {row['optimizer']} | {apart} | {kept} | {took} |")
    return "\n".join(lines)


def version(package: str) -> str:
    """Of what is installed; nothing if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of optimizers' names")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/peers.csv"), help="the file of all results"
    )
    parser.add_argument("--page", type=Path, help="the page that has a place for the table")
    args = parser.parse_args()

    for pair in released_pairs():
        if not pair.name.startswith(tuple(args.only)):
            continue
        row = row_of(pair, compare(pair, args.steps), args.steps)
        key = (row["package"], row["optimizer"])
        others = [old for old in read(args.out) if (old["package"], old["optimizer"]) != key]
        write(args.out, [*others, row])
        print(table([row]).splitlines()[-1], flush=True)
    text = table(read(args.out))
    print(text)
    if args.page is not None:
        args.page.write_text(filled(args.page.read_text(), MARK, [text]))


if __name__ == "__main__":
    main()
