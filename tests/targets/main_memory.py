"""What a compiled TPU program reads from and writes to the main memory.

The compiler's own count of bytes accessed includes the chip's fast memory: an operand that is
fetched there ahead of time counts when it is fetched, when it arrives and when it is read. The
final program says of each array where it lies: ``S(1)`` and others are memories on the chip.
"""

import math
import re

ARRAY = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%[\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(?:, |$)")
# Names for what lies elsewhere, and the ends of transfers, which count where they begin.
MOVES_NOTHING = {
    "parameter",
    "constant",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "copy-done",
    "slice-done",
}


def bytes_moved(program: str) -> int:
    """Bytes by which the instructions of the program's entry read and write the main memory.

    Each array counts once for each instruction that reads or writes it, without the padding of
    tiles; of one that is updated in place, the part that is overwritten.
    """
    entry = program[program.index("\nENTRY") :]
    results: dict[str, str] = {}
    total = 0
    for line in entry.splitlines():
        if not (match := INSTRUCTION.match(line)):
            continue
        name, result, operation, operands = match.groups()
        results[name] = result
        if operation in MOVES_NOTHING:
            continue
        if operation in ("copy-start", "slice-start"):
            total += _transferred(result, sliced=operation == "slice-start")
        else:
            sources = dict.fromkeys(re.findall(r"%[\w.-]+", operands))
            arrays = [result, *map(results.__getitem__, sources)]
            if "dynamic-update-slice" in name:
                arrays.remove(result)  # the operand that has the result's place
                arrays[0] = _overwritten(program, line, result)
            total += sum(map(_in_main_memory, arrays))
    return total


def _overwritten(program: str, fusion: str, result: str) -> str:
    """The part of the result that a fusion around a dynamic-update-slice writes."""
    (called,) = re.findall(r"calls=(%[\w.-]+)", fusion)
    body = program[program.index(f"\n{called} (") :].split("\n}", 1)[0]
    parts = {match[1]: match for line in body.splitlines() if (match := INSTRUCTION.match(line))}
    (update,) = (match[4] for match in parts.values() if match[3] == "dynamic-update-slice")
    shape = ARRAY.search(parts[update.split(", ")[1]][2])
    assert shape
    return re.sub(r"\[.*?\]", f"[{shape[3]}]", result)


def _transferred(result: str, *, sliced: bool) -> int:
    """Bytes of a transfer, whose result names both ends: ``(to, from)``, or ``((from), to)``."""
    first, second = (match.group() for match in list(ARRAY.finditer(result))[:2])
    if sliced:
        # The source is the whole array, of which as much is read as arrives.
        source = re.sub(r"\[.*?\]", ARRAY.sub(r"[\3]", second), first)
        return _in_main_memory(second) + _in_main_memory(source)
    return _in_main_memory(first) + _in_main_memory(second)


def _in_main_memory(arrays: str) -> int:
    return sum(
        math.prod(map(int, filter(None, shape.split(",")))) * (int(bits or 8) // 8)
        for _, bits, shape, layout in ARRAY.findall(arrays)
        if "S(" not in layout
    )
