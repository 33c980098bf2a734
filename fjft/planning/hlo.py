"""Reads the compiler's text: what moves, how often, and where memory goes."""

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Instructions that name data and do not touch it.
_FREE = {
    "bitcast",
    "constant",
    "get-tuple-element",
    "parameter",
    "tuple",
    "after-all",
    "partition-id",
    "while",
    "conditional",
    "call",
}
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+\w*|c64|c128)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_OPERATION = re.compile(r"(?:^|[\s}\])])([a-z][a-z0-9-]*)\(")
_CALLED = re.compile(r"\b(?:calls|body|called_computations)=\{?%?([\w.-]+)")
# A collective of groups of one device each.
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}|\[\d+,1\])")
_LARGEST = 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: Its name.
      operation: What it does: `fusion`, `all-gather-start`.
      shape: What it gives.
      operands: Names of what it takes.
      rest: The line behind the operands.
      is_root: Whether it is what its computation gives.
    """

    name: str
    operation: str
    shape: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one step moves on one device.

    Attributes:
      memory_bytes: Read from and written to memory.
      collective_bytes: By kind, what arrives over the interconnect.
      collective_counts: By kind, how many there are, every turn of every loop.
      repeats: Results that the compiler works out again, for want of room to keep them.
    """

    memory_bytes: float
    collective_bytes: dict[str, float]
    collective_counts: dict[str, int]
    repeats: int


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A piece of temporary memory: its bytes, its shape, and what fills it."""

    nbytes: int
    shape: str
    made_by: str


class Text:
    """A compiled program's computations by name.

    Args:
      text: From `compiled.as_text()`.
    """

    def __init__(self, text: str):
        self._computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        body: list[Instruction] = []
        for line in text.splitlines():
            if header := _HEADER.match(line):
                body = self._computations.setdefault(header[1], [])
                self.entry = header[1] if line.startswith("ENTRY") else self.entry
            elif found := _INSTRUCTION.match(line):
                instruction = _parse(found[2], found[3], is_root=bool(found[1]))
                if instruction is not None:
                    body.append(instruction)

    def measure(self) -> Traffic:
        """What one step moves."""
        memory, volumes, counts = 0.0, dict[str, float](), dict[str, int]()
        repeats = 0
        for turns, is_fused, computation in self._walk(self.entry, 1, False):
            shapes = {i.name: i.shape for i in computation}
            for i in computation:
                kind = next((k for k in COLLECTIVES if i.operation.startswith(k)), "")
                is_end = i.operation.endswith("-done")
                if kind and not is_end and not _ALONE.search(i.rest):
                    volume = turns * self._arriving(i, kind, shapes)
                    volumes[kind] = volumes.get(kind, 0.0) + volume
                    counts[kind] = counts.get(kind, 0) + turns
                if not is_fused and not is_end and i.operation not in _FREE:
                    memory += turns * self._touched(i, shapes)
                    # XLA's name for such a copy of an instruction.
                    repeats += turns * (".remat" in i.name)
        return Traffic(memory, volumes, counts, repeats)

    def describe(self, name: str) -> str:
        """What an instruction belongs to in the model: the path that JAX gave it."""
        for computation in self._computations.values():
            for i in computation:
                if i.name == name:
                    found = re.search(r'op_name="([^"]*)"', i.rest)
                    return _shorten(found[1]) if found else i.operation
        return name

    def _walk(
        self, name: str, turns: int, is_fused: bool
    ) -> Iterator[tuple[int, bool, list[Instruction]]]:
        computation = self._computations.get(name, [])
        yield turns, is_fused, computation
        for i in computation:
            inner = turns * (self._trips(i) if i.operation == "while" else 1)
            fused = is_fused or i.operation == "fusion"
            for called in _CALLED.findall(i.rest):
                yield from self._walk(called, inner, fused)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop turns: the number that its condition compares with."""
        found = re.search(r'known_trip_count\D+"?(\d+)', loop.rest)
        if found:
            return int(found[1])
        condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
        limits = [
            int(number)
            for i in self._computations.get(condition[1] if condition else "", [])
            if i.operation == "constant"
            for number in re.findall(r"^(\d+)$", ",".join(i.operands))
        ]
        return max(limits, default=1)

    def _arriving(self, i: Instruction, kind: str, shapes: dict[str, str]) -> float:
        """Bytes that a collective brings to one device, at best."""
        out = _nbytes(i.shape)
        taken = sum(_nbytes(shapes.get(name, "")) for name in i.operands)
        if i.operation.endswith("-start"):
            out = max(out - taken, 0)  # gives its operand back beside its result
        if kind == "all-reduce":
            return 2.0 * taken
        return float(max(out - taken, 0) if kind == "all-gather" else taken)

    def _touched(self, i: Instruction, shapes: dict[str, str]) -> float:
        """Bytes that an instruction reads and writes."""
        inside = self._called(i)
        if i.operation in ("dynamic-slice", "slice", "gather"):
            return 2.0 * _nbytes(i.shape)
        if i.operation == "dynamic-update-slice":
            return 2.0 * _nbytes(shapes.get(i.operands[1], ""))
        if i.operation.endswith("-start"):
            return 2.0 * sum(_nbytes(shapes.get(name, "")) for name in i.operands)
        root = next((j for j in inside if j.is_root), i)
        # What is given may lie on the chip, which only the caller's shape says.
        total = float(min(self._written(root, inside), _nbytes(i.shape)))
        for number, operand in enumerate(i.operands):
            parameter = _parameter(inside, number)
            total += self._read(shapes.get(operand, ""), parameter, inside)
        return total

    def _written(self, i: Instruction, inside: list[Instruction]) -> int:
        """Bytes of what a fusion gives; an update of a part in place writes a part."""
        by_name = {j.name: j for j in inside}
        given = [by_name[name] for name in i.operands if name in by_name]
        if i.operation == "dynamic-update-slice":
            return _nbytes(given[1].shape)
        if i.operation in ("bitcast", "tuple") and given:
            return sum(self._written(j, inside) for j in given)
        nested = self._called(i) if by_name else []
        root = next((j for j in nested if j.is_root), None)
        return _nbytes(i.shape) if root is None else self._written(root, nested)

    def _read(self, shape: str, name: str | None, inside: list[Instruction]) -> int:
        """Bytes that a fusion reads of an operand: all, or the slices that it takes."""
        whole, taken = _nbytes(shape), 0
        for j in inside:
            if name is None or name not in j.operands:
                continue
            is_sliced = j.operands[0] == name
            if j.operation == "dynamic-slice" and is_sliced:
                taken += _nbytes(j.shape)
            elif j.operation == "bitcast":
                taken += self._read(shape, j.name, inside)
            elif j.operation == "fusion":
                nested = self._called(j)
                parameter = _parameter(nested, j.operands.index(name))
                taken += self._read(shape, parameter, nested)
            elif j.operation != "dynamic-update-slice" or not is_sliced:
                return whole
        return min(taken, whole) if inside else whole

    def _called(self, i: Instruction) -> list[Instruction]:
        """The instructions that a fusion stands for."""
        called = _CALLED.search(i.rest) if i.operation == "fusion" else None
        return self._computations.get(called[1], []) if called else []


def _parameter(inside: list[Instruction], number: int) -> str | None:
    """The name of a computation's parameter."""
    for i in inside:
        if i.operation == "parameter" and i.operands == (str(number),):
            return i.name
    return None


def _parse(name: str, text: str, *, is_root: bool) -> Instruction | None:
    """Takes `f32[2]{0} add(%a, %b), metadata=...` apart."""
    found = _OPERATION.search(text)
    if found is None:
        return None
    start = end = found.end()
    depth = 1
    while depth and end < len(text):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    inside = text[start : end - 1]
    operands = re.findall(r"%([\w.-]+)", inside)
    if not operands:
        operands = re.findall(r"[\w.-]+", inside)
    shape = text[: found.start(1)]
    return Instruction(name, found[1], shape, tuple(operands), text[end:], is_root)


def _nbytes(shape: str) -> int:
    """Bytes of all arrays of a shape that lie in main memory.

    `(f32[2,3]{1,0}, bf16[8]{0:T(8)S(1)})` is 24: `S(1)` is on the chip.
    """
    total = 0
    for dtype, sizes, layout in _SHAPE.findall(shape):
        if "S(" in layout:
            continue
        digits = re.match(r"[suf](\d+)", dtype)
        bits = _BITS.get(dtype) or int(digits[1] if digits else 32)
        total += math.prod(int(n) for n in sizes.split(",") if n) * bits // 8
    return total


def _shorten(op_name: str) -> str:
    """`jit(train_step)/jvp()/while/body/dot_general` without what says nothing."""
    dull = {"jit(train_step)", "while", "body", "closed_call", "jvp()", "shard_map"}
    parts = [p for p in op_name.split(";")[0].split("/") if p not in dull]
    return "/".join(parts) or op_name


def largest_buffers(assignment: str, names: Text | None) -> list[Buffer]:
    """The largest temporary buffers, largest first, one for each place in memory.

    Args:
      assignment: What XLA dumps as `...buffer-assignment.txt`.
      names: Says what the names in it belong to.
    """
    value = re.compile(
        r"value: <\d+ ([\w.-]+)\S* (?:\(phi\) )?@\d+> "
        r"\(size=(\d+),offset=(\d+)\): (\S+)"
    )
    found: dict[tuple[int, int], tuple[str, str]] = {}
    is_temporary = False
    for line in assignment.splitlines():
        if line.startswith("allocation "):
            is_temporary = "preallocated-temp" in line
        elif is_temporary and (hit := value.search(line)):
            found.setdefault((int(hit[2]), int(hit[3])), (hit[1], hit[4]))
    ranked = sorted(found, reverse=True)[:_LARGEST]
    return [
        Buffer(
            size,
            _SHAPE.sub(r"\1[\2]", found[size, offset][1]),
            names.describe(found[size, offset][0]) if names else found[size, offset][0],
        )
        for size, offset in ranked
    ]
