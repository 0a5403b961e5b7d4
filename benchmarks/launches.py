"""Counts the kernels that a compiled GPU program launches, and the bytes that each moves.

The text of the optimized program has one instruction for each launch: a fusion, a copy, a custom
call. Loops are counted as often as they run. A fusion reads of an operand what its slices take and
writes of an array that is updated in place what is overwritten. Each operand counts once for each
kernel, whatever caches hold.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

ARRAY = re.compile(r"([a-z]+)(\d*)[a-z\d]*\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?(%[\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^  (ROOT )?(%[\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CALLED = re.compile(r"(?:calls|to_apply|body)=(%[\w.-]+)")
BRANCHES = re.compile(
    r"(?:true_computation|false_computation)=(%[\w.-]+)|branch_computations=\{(.*?)\}"
)
# Names for arrays that are there, and the ends of what counts where it begins.
NO_LAUNCH = {
    "after-all",
    "async-done",
    "async-update",
    "bitcast",
    "constant",
    "copy-done",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
SLICES = {"dynamic-slice", "slice", "gather"}
SAME_ARRAY = {"bitcast", "copy", "reshape"}


@dataclasses.dataclass
class Totals:
    """Counts the work of a program, or of a part of it.

    Attributes:
        launches: kernels and copies.
        read: bytes that they read.
        written: bytes that they write.
    """

    launches: int = 0
    read: int = 0
    written: int = 0

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def add(self, other: "Totals", times: int = 1) -> None:
        """Adds what a part does so many times."""
        self.launches += times * other.launches
        self.read += times * other.read
        self.written += times * other.written


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
        name: of the result.
        result: its type.
        operation: such as ``fusion``.
        operands: names, in order.
        line: all of it.
    """

    name: str
    result: str
    operation: str
    operands: tuple[str, ...]
    line: str
    root: bool


class Program:
    """The computations of a compiled program, by name.

    Args:
        text: of the optimized module, ``compiled.as_text()``.
    """

    def __init__(self, text: str) -> None:
        """Reads the text."""
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        body: list[Instruction] = []
        for line in text.splitlines():
            if match := COMPUTATION.match(line):
                body = self.computations[match[1]] = []
                if line.startswith("ENTRY"):
                    self.entry = match[1]
            elif match := INSTRUCTION.match(line):
                operands = tuple(re.findall(r"%[\w.-]+", _operands(match[5])))
                body.append(
                    Instruction(match[2], match[3], match[4], operands, line, bool(match[1]))
                )
        if not self.entry:
            raise ValueError("This is not the text of a compiled program: it has no ENTRY.")

    def totals(self) -> Totals:
        """Counts the work of one run.

        Raises:
            ValueError: if a loop does not say how often it runs.
        """
        return self._of(self.entry)

    def listing(self, count: int = 20) -> list[str]:
        """The launches that move most, a line each."""
        found: list[tuple[int, str]] = []
        self._visit(self.entry, 1, found)
        return [line for _, line in sorted(found, reverse=True)[:count]]

    def _visit(self, computation: str, times: int, found: list[tuple[int, str]]) -> None:
        for one, part in self._launches(computation):
            if isinstance(part, str):
                self._visit(part, times * (_trips(one) if one.operation == "while" else 1), found)
            else:
                moved = times * part.moved
                found.append(
                    (moved, f"{moved:>12} bytes {times:>4} x {one.name} {one.result[:80]}")
                )

    @functools.cache  # noqa: B019 -- a program lives as long as one count
    def _of(self, computation: str) -> Totals:
        total = Totals()
        for one, part in self._launches(computation):
            whole = self._of(part) if isinstance(part, str) else part
            total.add(whole, _trips(one) if one.operation == "while" else 1)
        return total

    def _launches(self, computation: str) -> Iterator[tuple[Instruction, "Totals | str"]]:
        """Each instruction that launches something: what it does, or what it calls."""
        body = self.computations[computation]
        types, same = {one.name: one.result for one in body}, _same_arrays(body)
        for one in body:
            if one.operation in NO_LAUNCH:
                continue
            if one.operation in ("while", "call", "async-start"):
                yield one, self._called(one)
            elif one.operation == "conditional":
                yield one, max(_branches(one), key=lambda branch: self._of(branch).moved)
            elif one.operation == "fusion":
                yield one, self._fusion(one, types, same)
            else:
                arrays = {same[name]: name for name in one.operands}.values()
                read = sum(bytes_of(types[name]) for name in arrays)
                yield one, Totals(1, read, bytes_of(one.result))

    def _called(self, one: Instruction) -> str:
        match = CALLED.search(one.line)
        assert match is not None, one.line
        return match[1]

    def _fusion(self, one: Instruction, types: dict[str, str], same: dict[str, str]) -> Totals:
        """A fusion: of each operand what is read, of each result what is written."""
        body = self.computations[self._called(one)]
        named = {inner.name: inner for inner in body}
        users: dict[str, list[Instruction]] = {}
        for inner in body:
            for name in inner.operands:
                users.setdefault(name, []).append(inner)
        read: dict[str, int] = {}
        for inner in body:
            if inner.operation != "parameter":
                continue
            number = int(re.search(r"parameter\((\d+)\)", inner.line)[1])  # type: ignore[index]
            operand = one.operands[number]
            whole, array = bytes_of(types[operand]), same[operand]
            read[array] = min(whole, read.get(array, 0) + _read(inner.name, whole, users))
        (root,) = (inner for inner in body if inner.root)
        results = root.operands if root.operation == "tuple" else (root.name,)
        written = sum(_written(name, named) for name in results)
        return Totals(1, sum(read.values()), written)


def _same_arrays(body: list[Instruction]) -> dict[str, str]:
    """For each name of a computation the first name of the same array."""
    same: dict[str, str] = {}
    tuples = {one.name: one.operands for one in body if one.operation == "tuple"}
    for one in body:
        first = one.name
        if one.operation == "bitcast":
            first = same[one.operands[0]]
        elif one.operation == "get-tuple-element" and one.operands[0] in tuples:
            number = int(re.search(r"index=(\d+)", one.line)[1])  # type: ignore[index]
            first = same[tuples[one.operands[0]][number]]
        same[one.name] = first
    return same


def _operands(rest: str) -> str:
    """Returns the text between the parentheses of an operation, given the line from there on."""
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:i]
    return rest


def _trips(one: Instruction) -> int:
    if not (match := TRIPS.search(one.line)):
        raise ValueError(f"The loop {one.name} does not say how often it runs.")
    return int(match[1])


def _branches(one: Instruction) -> list[str]:
    found = BRANCHES.findall(one.line)
    return [name for single, many in found for name in ([single] if single else many.split(", "))]


def _read(name: str, whole: int, users: dict[str, list[Instruction]]) -> int:
    """Bytes of a fusion's parameter that its users read."""
    total = 0
    for user in users.get(name, ()):
        if user.operation in SLICES and user.operands[0] == name:
            total += bytes_of(user.result)
        elif user.operation == "dynamic-update-slice" and user.operands[0] == name:
            continue  # written in place
        elif user.operation in SAME_ARRAY:
            total += _read(user.name, whole, users)
        elif user.operation == "tuple":
            continue
        else:
            return whole
    return total


def _written(name: str, named: dict[str, Instruction]) -> int:
    """Bytes of a fusion's result that it writes."""
    one = named[name]
    while one.operation in SAME_ARRAY:
        one = named[one.operands[0]]
    if one.operation == "dynamic-update-slice":
        return bytes_of(named[one.operands[1]].result)
    if one.operation == "parameter":
        return 0
    return bytes_of(named[name].result)


def bytes_of(result: str) -> int:
    """Bytes of an array's type, or of all arrays of a tuple's.

    >>> bytes_of("(f32[2,3]{1,0}, u8[4]{0}, pred[])")
    29
    """
    return sum(
        math.prod(map(int, filter(None, shape.split(",")))) * max(1, int(bits or 8) // 8)
        for _, bits, shape in ARRAY.findall(result)
    )
