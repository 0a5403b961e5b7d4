"""Public docstrings open with a verb, and say what is raised where something is."""

import ast
import functools
import importlib
import inspect
import pathlib
import re
from typing import Any

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "api.md"
PARTS = ("aliases", "codecs", "compressors", "layers", "planner", "subspace", "transforms")
KERNELS = ("topk_compress", "window_update", "blockwise_step")
PLURALS = "Axes|Bits|Blocks|Buckets|Bytes|Codes|Columns|Elements|Lines|Rows|Sizes|Tensors|Zeros"


def is_ours(value: Any) -> bool:
    kind = inspect.isfunction(value) or inspect.isclass(value)
    return kind and value.__module__.startswith(("microadam_jax", "pallas_kernels"))


@functools.cache
def bodies(path: str) -> dict[int, list[ast.stmt]]:
    """Returns the bodies of a file's functions by their first lines, which may be decorators."""
    nodes = ast.walk(ast.parse(pathlib.Path(path).read_text()))
    defined = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return {min(x.lineno for x in (f, *f.decorator_list)): f.body for f in defined}


def raises(value: Any) -> bool:
    """Returns True if a function, or one that it calls by a global name, has a raise statement."""
    seen, todo = set(), [value]
    for value in todo:
        value = inspect.unwrap(value) if callable(value) else value
        if not is_ours(value) or value in seen:
            continue
        seen.add(value)
        if isinstance(value, type):
            todo += [vars(value).get(name) for name in ("__init__", "__post_init__")]
            continue
        code = value.__code__
        lines = {} if code.co_filename[0] == "<" else bodies(code.co_filename)
        for part in ast.walk(ast.Module(lines.get(code.co_firstlineno, []), [])):
            if isinstance(part, ast.Raise):
                return True
            if isinstance(part, ast.Call) and isinstance(part.func, ast.Name):
                todo.append(value.__globals__.get(part.func.id))
    return False


def test_public_docstrings() -> None:
    names = ["microadam_jax", *(f"microadam_jax.{part}" for part in PARTS)]
    listed = {(name, word) for name in names for word in importlib.import_module(name).__all__}
    listed |= set(re.findall(r"^::: (\S+)\.(\w+)$", PAGE.read_text(), re.M))
    listed |= {(f"pallas_kernels.{word.replace('step', 'codec')}", word) for word in KERNELS}
    found = {inspect.unwrap(getattr(importlib.import_module(name), word)) for name, word in listed}
    values = {value: (value.__doc__ or "nothing").split() for value in filter(is_ours, found)}
    verbs = re.compile(f"(?!({PLURALS})$)[A-Z][a-z]+s$")
    assert not {value: words[0] for value, words in values.items() if not verbs.match(words[0])}
    assert not [v for v, words in values.items() if raises(v) and "Raises:" not in words]


def test_the_reference_has_what_is_public() -> None:
    """All but types of parts and what parts ask each other."""
    internal = {"as_codec", "as_storage", "encoded_bytes", "of_rank", "refresh_every"}
    internal |= {"is_compressed", "require_compressor", "OUTPUT_HEAD", "Fp8ActivationCodes"}
    shown = set(re.findall(r"^::: \S+\.(\w+)$", PAGE.read_text(), re.M))
    for part in ("", ".transforms", ".subspace", ".layers"):
        public = set(importlib.import_module(f"microadam_jax{part}").__all__)
        assert not public - shown - internal, part
    for part in (".codecs", ".compressors"):
        names = importlib.import_module(f"microadam_jax{part}").__all__
        assert not {name for name in names if name.islower()} - shown - internal, part
