"""Run the PTX of a compiled kernel on the CPU: what no interpreter of Triton's language can show.

All that comes between the kernels and the machine is in it: layouts, conversions through shared
memory, shuffles, barriers, predicates, the width of each access, inline assembly. The threads of a
warp run in step, warps and programs in any order that barriers allow, so that a missing barrier
shows. An access that is not aligned or leaves its tensor is an error, as is an instruction that is
not known here; shared memory is NaN until it is written.
"""

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Any  # of NumPy, a number for each thread

_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_TYPES: dict[str, Any] = {
    "pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip
_LANES = 32
_SHARED_BYTES = 227 * 1024


class Fault(Exception):
    """Access or instruction that must not occur, and that a GPU may not report."""


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``guard`` is its predicate, or "!" and its negated predicate."""

    text: str
    guard: str
    name: str
    kinds: tuple[str, ...]  # what follows the name, after points
    operands: tuple[str, ...]

    @property
    def is_barrier(self) -> bool:
        """True if all warps of a program wait here for each other."""
        return (self.name, *self.kinds[:1]) == ("bar", "sync")


class Code:
    """Instructions, targets of labels, and types of registers."""

    def __init__(self, body: str) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.types: dict[str, Any] = {}
        body = re.sub(r"(?m)//.*$|^\s*\.(loc|file|pragma)\b.*$", "", body)
        for statement in body.split(";"):
            self._add(statement.lstrip(_AROUND).rstrip())

    def _add(self, statement: str) -> None:
        while label := re.match(r"([$\w]+):\s*", statement):
            self.labels[label[1]] = len(self.instructions)
            statement = statement[label.end() :].lstrip(_AROUND)
        if declared := re.match(r"\.reg \.(\w+)\s+(.*)", statement):
            for name in declared[2].split(","):
                self.types[name.strip().partition("<")[0]] = _TYPES[declared[1]]
        elif statement and not statement.startswith("."):
            guard, name, rest = _groups(r"(?:@(\S+)\s+)?([\w.:]+)\s*(.*)", statement)
            first, *kinds = name.replace("::", ".").split(".")
            operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^\s,]+", rest)
            self.instructions.append(
                Instruction(statement, guard or "", first, tuple(kinds), tuple(operands))
            )

    def type_of(self, register: str) -> Any:
        """Return the type of a register: its own, or for "%r12" that of "%r"."""
        return self.types.get(register) or self.types[register.rstrip("0123456789")]


_AROUND = "{} \t\n"  # blocks, in front of a statement


class Kernel:
    """PTX of a kernel, to be launched on CPU tensors."""

    def __init__(self, ptx: str) -> None:
        signature, header, body = _groups(r".*?\.entry \w+\((.*?)\)(.*?)\n(\{.*?\n\}).*", ptx)
        self.parameters = re.findall(r"\w+_param_\d+", signature)
        self.parameter_bytes = [int(b) // 8 for b in re.findall(r"\.param \.[a-z](\d+)", signature)]
        self.threads = int(_groups(r".*\.reqntid (\d+).*", header)[0])
        self.code = Code(body)

    def run(
        self,
        grid: int,
        arguments: Iterable[Tensor | float],
        seed: int = 0,
        at_a_time: int = 1,
        fuses: bool = False,
    ) -> Counter[tuple[int, str]]:
        """Launch.

        Args:
            grid: how many programs.
            arguments: as in the kernel's signature, without constants and what the compiler adds.
            seed: of the order of warps and programs.
            at_a_time: how many programs run beside each other.
            fuses: whether float32 products that are added are not rounded before. PTX leaves that
                to ptxas.

        Returns:
            How many bytes all threads have loaded ("ld") and stored ("st") of tensors, by their
            addresses.
        """
        values = [*arguments]
        bits = [*map(_bits, values), *[0] * (len(self.parameters) - len(values))]
        tensors = [tensor for tensor in values if isinstance(tensor, Tensor)]
        return self.run_on(grid, bits, tensors, seed, at_a_time, fuses)

    def run_on(
        self,
        grid: int,
        bits: Iterable[int],
        tensors: Iterable[Tensor],
        seed: int = 0,
        at_a_time: int = 1,
        fuses: bool = False,
    ) -> Counter[tuple[int, str]]:
        """Launch with the bits of the parameters, and the tensors that they point into."""
        memory = _Memory(tensors)
        values = dict(zip(self.parameters, bits, strict=True))
        order = random.Random(seed)
        programs = (
            _Program(self, memory, values, program, grid, fuses).run(order)
            for program in range(grid)
        )
        running = list(itertools.islice(programs, at_a_time))
        with np.errstate(all="ignore"):
            while running:
                program = order.choice(running)
                barriers = order.choice((1, 10, 1000))  # so many, while the others stand still
                if sum(1 for _ in itertools.islice(program, barriers)) < barriers:
                    running.remove(program)
                    running += itertools.islice(programs, 1)
        return memory.traffic


def _groups(pattern: str, text: str) -> tuple[Any, ...]:
    found = re.fullmatch(pattern, text, re.DOTALL)
    if found is None:
        raise Fault(f"not understood: {text}")
    return found.groups()


def _bits(value: Tensor | float) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return int(np.float64(value).view(np.uint64)) if isinstance(value, float) else value


class _Memory:
    """Global memory: the tensors of a launch."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.traffic: Counter[tuple[int, str]] = Counter()
        self._spans = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            self._spans.append((storage.data_ptr(), data, tensor.data_ptr()))

    def at(self, addresses: Array, size: int, name: str) -> tuple[Array, Array]:
        """Return the memory, and the places in it, of ``size`` bytes at each address."""
        for start, data, tensor in self._spans:
            if start <= addresses[0] < start + len(data):
                self.traffic[tensor, name] += size * len(addresses)
                return data, _places(addresses.astype(np.int64) - start, size, len(data))
        raise Fault("an access is to no tensor of the launch")


def _places(offsets: Array, size: int, length: int) -> Array:
    if (offsets % size).any():
        raise Fault(f"an access of {size} bytes is not aligned")
    if offsets.min() < 0 or offsets.max() + size > length:
        raise Fault(f"an access leaves the {length} bytes that there are")
    return offsets[:, None] + np.arange(size)


class Threads:
    """Registers of a number of threads."""

    def __init__(self, code: Code, count: int) -> None:
        self.code, self.count = code, count
        self.registers: dict[str, Array] = {}
        self.parameters: dict[str, int] = {}
        self.special: dict[str, Any] = {"global_smem": 0}
        self.fuses = False
        self.products: dict[str, Array] = {}  # of registers, before rounding; NaN for others

    def value(self, name: str, kind: Any) -> Array:
        """Return an operand of each thread, its bits read as a kind of number."""
        if name.startswith("!"):
            return ~self.value(name[1:], kind)
        if name in self.special:
            numbers = np.asarray(self.special[name], np.dtype(f"u{np.dtype(kind).itemsize}"))
            bits = np.ascontiguousarray(np.broadcast_to(numbers, self.count))
        elif name.startswith("%") or name in self.code.types:
            bits = self.bits(name)
        else:
            bits = np.full(self.count, _immediate(name, kind))
        return bits if bits.dtype == kind else bits.view(kind)

    def bits(self, name: str) -> Array:
        """Return the bits of a register; until it is written they are all ones, a NaN."""
        if name not in self.registers:
            kind = self.code.type_of(name)
            kind = kind if kind == np.bool_ else _UNSIGNED[np.dtype(kind).itemsize]
            self.registers[name] = ~np.zeros(self.count, kind)
        return self.registers[name]

    def write(self, name: str, value: Array, mask: Array) -> None:
        """Write to the threads' register, whatever its kind of number."""
        if name == "_":
            return
        before = self.bits(name)
        if before.dtype != np.bool_:
            value = np.ascontiguousarray(value)
            if value.itemsize != before.itemsize:
                raise Fault(f"{value.itemsize} bytes go to {name}, which has {before.itemsize}")
            value = value.view(before.dtype)
        self.registers[name] = np.where(mask, value, before)
        self.keep_product(name, np.nan, mask)

    def product(self, name: str) -> Array:
        """Return the unrounded product in a register; NaN where the register holds no product."""
        return self.products.get(name, np.full(self.count, np.nan))

    def keep_product(self, name: str, product: Array, mask: Array) -> None:
        if name in self.products or not np.isscalar(product):
            self.products[name] = np.where(mask, product, self.product(name))

    def reach(
        self, instruction: Instruction, address: str, size: int, mask: Array
    ) -> tuple[Array, Array]:
        """Return the memory, and the places in it, where threads access ``size`` bytes each."""
        raise Fault("there is no memory here")

    def run(self) -> None:
        """Run the instructions once; they must not branch."""
        everyone = np.ones(self.count, bool)
        for instruction in self.code.instructions:
            _execute(self, instruction, everyone)


class _Program(Threads):
    """One program of a launch."""

    def __init__(
        self,
        kernel: Kernel,
        memory: _Memory,
        parameters: dict[str, int],
        program: int,
        grid: int,
        fuses: bool,
    ) -> None:
        super().__init__(kernel.code, kernel.threads)
        self.fuses = fuses
        self._memory, self.parameters = memory, parameters
        thread = np.arange(self.count)
        self._shared = np.full(_SHARED_BYTES, 0xFF, np.uint8)
        self.special |= {
            "%tid.x": thread, "%laneid": thread % _LANES,
            "%ctaid.x": program, "%ctaid.y": 0, "%ctaid.z": 0,
            "%nctaid.x": grid, "%nctaid.y": 1, "%nctaid.z": 1,
        }  # fmt: skip

    def run(self, order: random.Random) -> Iterator[None]:  # type: ignore[override]
        """Run until all threads have returned, and yield at each barrier.

        Between barriers one warp runs after the other, in any order.
        """
        warps = [
            _Warp(self, np.arange(self.count) // _LANES == warp)
            for warp in range(self.count // _LANES)
        ]
        while warps:
            for warp in order.sample(warps, len(warps)):
                warp.advance()
            if not (warps := [warp for warp in warps if not warp.ended]):
                return
            at_barrier = len({warp.barrier for warp in warps}) == 1
            if not at_barrier or len(warps) < self.count // _LANES:
                raise Fault(f"some threads never come to {warps[0].barrier.text}")
            for warp in warps:
                warp.release()
            yield

    def reach(
        self, instruction: Instruction, address: str, size: int, mask: Array
    ) -> tuple[Array, Array]:
        name, offset = _groups(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\d+))?\s*\]", address)
        if "global" in instruction.kinds:
            start = self.value(name, np.uint64)[mask] + np.uint64(int(offset or 0))
            return self._memory.at(start, size, instruction.name)
        start = self.value(name, np.uint32)[mask].astype(np.int64) + int(offset or 0)
        return self._shared, _places(start, size, _SHARED_BYTES)


class _Warp:
    """Positions of the threads of a warp; of diverged threads, the hindmost run first."""

    def __init__(self, program: _Program, mask: Array) -> None:
        self._program = program
        self._places = {0: mask}

    @property
    def ended(self) -> bool:
        return not self._places

    @property
    def barrier(self) -> Instruction:
        """Return the barrier that the warp waits at."""
        return self._program.code.instructions[min(self._places)]

    def release(self) -> None:
        (place,) = self._places
        self._places = {place + 1: self._places[place]}

    def advance(self) -> None:
        """Run to the next barrier, or to the end."""
        while self._places:
            place = min(self._places)
            instruction = self._program.code.instructions[place]
            if instruction.is_barrier:
                if len(self._places) > 1:
                    raise Fault(f"threads are elsewhere: {instruction.text}")
                return
            mask = executed = self._places.pop(place)
            if instruction.guard:
                executed = mask & self._program.value(instruction.guard, np.bool_)
            if instruction.name == "bra":
                self._go(self._program.code.labels[instruction.operands[0]], executed)
                mask = mask & ~executed
            elif instruction.name in ("ret", "exit"):
                mask = mask & ~executed
            elif executed.any():
                try:
                    _execute(self._program, instruction, executed)
                except (KeyError, Fault) as error:
                    raise Fault(f"{error}: {instruction.text}") from error
            self._go(place + 1, mask)

    def _go(self, place: int, mask: Array) -> None:
        if mask.any():
            self._places[place] = self._places.get(place, False) | mask


def _immediate(text: str, kind: Any) -> Array:
    if text.startswith("0f"):
        return np.uint32(int(text[2:], 16)).view(np.float32)
    if text.startswith("0d"):
        return np.uint64(int(text[2:], 16)).view(np.float64)
    if kind is np.bool_:
        return np.bool_(int(text, 0) != 0)
    size = np.dtype(kind).itemsize
    return np.dtype(_UNSIGNED[size]).type(int(text.rstrip("U"), 0) % (1 << 8 * size)).view(kind)


Operation = Callable[..., Array]


def _execute(threads: Threads, instruction: Instruction, mask: Array) -> None:
    if instruction.name in _MEMORY:
        _MEMORY[instruction.name](threads, instruction, mask)
        return
    if instruction.name in _IGNORED:
        return
    kinds = [kind for kind in instruction.kinds if kind not in _WITHOUT_EFFECT]
    target, *names = instruction.operands
    if "{" in target + names[0]:
        _move_parts(threads, mask, target, *names)
        return
    result = _OPERATIONS[instruction.name](threads, kinds, names)
    product = None
    if threads.fuses and kinds == ["f32"] and "rn" not in instruction.kinds:
        if instruction.name == "mul":
            left, right = (threads.value(name, np.float32).astype(np.float64) for name in names)
            product = left * right
        elif instruction.name in ("add", "sub"):
            result = _fused_sum(threads, instruction.name, names, result)
    threads.write(target, result, mask)
    if product is not None:
        threads.keep_product(target, product, mask)


_IGNORED = ("bar", "createpolicy")
_WITHOUT_EFFECT = ("ftz", "rn", "approx", "sync")


def _fused_sum(threads: Threads, operation: str, names: list[str], rounded: Array) -> Array:
    """Add with the first product among the operands unrounded; without a product, round."""
    exact = [threads.value(name, np.float32).astype(np.float64) for name in names]
    products = [threads.product(name) for name in names]
    first = np.isnan(products[0])
    left = np.where(first, exact[0], products[0])
    right = np.where(first & ~np.isnan(products[1]), products[1], exact[1])
    fused = left + right if operation == "add" else left - right
    return np.where(first & np.isnan(products[1]), rounded, fused.astype(np.float32))


def _move_parts(threads: Threads, mask: Array, target: str, source: str) -> None:
    """Move one register to several smaller ones, or the other way round."""
    if source.startswith("{"):
        parts = [threads.bits(name) for name in _names(source)]
        whole = np.stack(parts, 1).view(_UNSIGNED[parts[0].itemsize * len(parts)])[:, 0]
        threads.write(target, whole, mask)
        return
    names = _names(target)
    whole = threads.bits(source)
    parts = whole[:, None].view(_UNSIGNED[whole.itemsize // len(names)]).T
    for name, part in zip(names, parts, strict=True):
        threads.write(name, part, mask)


def _names(operand: str) -> list[str]:
    return re.findall(r"[%$\w.]+", operand)


# arithmetic: each makes its result of the instruction's kinds and the names of its sources


def _plain(compute: Operation) -> Operation:
    """Return an operation that applies ``compute`` to numbers of the last kind, or to pairs."""

    def operation(threads: Threads, kinds: list[str], names: list[str]) -> Array:
        if kinds[-1] == "f32x2":
            pairs = (threads.value(name, np.uint64).view(np.float32) for name in names)
            return compute(*pairs).view(np.uint64)
        kind = _TYPES[kinds[-1]]
        result = compute(*(threads.value(name, kind) for name in names))
        return result.astype(kind, copy=False)

    return operation


def _fma(a: Array, b: Array, c: Array) -> Array:
    """Multiply and add with one rounding: in float64, or for float64 from exact parts."""
    if a.dtype == np.float32:
        exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
        return exact.astype(np.float32)
    product = a * b
    halves = []
    for factor in (a, b):
        high = factor * 134217729.0
        high = high - (high - factor)
        halves.append((high, factor - high))
    (ah, al), (bh, bl) = halves
    rest = ((ah * bh - product) + ah * bl + al * bh) + al * bl
    total = product + c
    back = total - product
    rounded = (product - (total - back)) + (c - back)
    exact = total + (rounded + rest)
    return np.where(np.isfinite(exact), exact, total)


def _multiplied(threads: Threads, kinds: list[str], names: list[str]) -> Array:
    """Run mul and mad of integers (lower half, upper half or all), and mul of floats."""
    if kinds[-1][0] == "f":
        return _plain(np.multiply)(threads, kinds, names)
    kind = _TYPES[kinds[-1]]
    factors = [threads.value(name, kind) for name in names[:2]]
    if kinds[0] == "wide":
        wide = _TYPES[f"{kinds[-1][0]}{2 * int(kinds[-1][1:])}"]
        result = factors[0].astype(wide) * factors[1].astype(wide)
    elif kinds[0] == "hi":
        bits = 8 * np.dtype(kind).itemsize
        wide = _TYPES[f"{kinds[-1][0]}{2 * bits}"]
        result = (factors[0].astype(wide) * factors[1].astype(wide) >> bits).astype(kind)
    else:
        result = factors[0] * factors[1]
    return result + threads.value(names[2], result.dtype.type) if len(names) == 3 else result


def _quotient(a: Array, b: Array) -> Array:
    """Divide integers towards 0; a quotient by 0 must not be used."""
    if np.issubdtype(a.dtype, np.floating):
        return a / b
    b = np.where(b == 0, 1, b)
    return (a - _rest(a, b)) // b


def _rest(a: Array, b: Array) -> Array:
    return np.fmod(a, np.where(b == 0, 1, b)).astype(a.dtype)


def _shifted(threads: Threads, kinds: list[str], names: list[str], left: bool) -> Array:
    kind = _TYPES[kinds[-1]]
    value, by = threads.value(names[0], kind), threads.value(names[1], np.uint32)
    bits = 8 * value.itemsize
    within = np.minimum(by, bits - 1).astype(kind)
    result = value << within if left else value >> within
    is_signed = np.issubdtype(kind, np.signedinteger)
    return result if is_signed and not left else np.where(by < bits, result, kind(0))


def _compared(threads: Threads, kinds: list[str], names: list[str]) -> Array:
    relation, kind = kinds[0], _TYPES[kinds[1]]
    a, b = (threads.value(name, kind) for name in names)
    result: Array = _RELATIONS[relation.removesuffix("u")](a, b)
    if np.issubdtype(kind, np.floating):
        unordered = np.isnan(a) | np.isnan(b)
        result = result | unordered if relation.endswith("u") else result & ~unordered
    return result


_RELATIONS: dict[str, Operation] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _selected(threads: Threads, kinds: list[str], names: list[str]) -> Array:
    kind = _TYPES[kinds[-1]]
    yes, no = (threads.value(name, kind) for name in names[:2])
    return np.where(threads.value(names[2], np.bool_), yes, no)


def _converted(threads: Threads, kinds: list[str], names: list[str]) -> Array:
    to, source = kinds[-2:]
    values = [
        threads.value(name, np.uint16).astype(np.uint32) << 16
        if source == "bf16"
        else threads.value(name, _TYPES[source])
        for name in names
    ]
    if source == "bf16":
        values = [value.view(np.float32) for value in values]
    if to.endswith("x2"):  # the first is the upper half
        high, low = (_narrowed(value, to.removesuffix("x2")) for value in values)
        return high.astype(np.uint32) << 16 | low
    if to in ("bf16", "f16"):
        return _narrowed(values[0], to)
    if "rni" in kinds:
        return np.rint(values[0]).astype(_TYPES[to])
    return values[0].astype(_TYPES[to])


def _narrowed(value: Array, to: str) -> Array:
    """Return the bits of 16-bit floats, rounded to the nearest, ties to even."""
    if to == "f16":
        return value.astype(np.float16).view(np.uint16)
    bits = value.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def _permuted(threads: Threads, kinds: list[str], names: list[str]) -> Array:
    low, high, selectors = (threads.value(name, np.uint32).astype(np.uint64) for name in names)
    both, result = low | high << np.uint64(32), np.zeros(threads.count, np.uint64)
    for i in range(4):
        selector = selectors >> np.uint64(4 * i)
        byte = both >> (selector & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        sign = np.where(byte >> np.uint64(7), np.uint64(0xFF), np.uint64(0))
        byte = np.where(selector & np.uint64(8), sign, byte)
        result |= byte << np.uint64(8 * i)
    return result.astype(np.uint32)


def _extracted(threads: Threads, kinds: list[str], names: list[str]) -> Array:
    """Run bfe: extract a bit field of a register as a number."""
    value = threads.value(names[0], _TYPES[kinds[-1]])
    first, count = (threads.value(name, np.uint32).astype(value.dtype) for name in names[1:])
    bits = value.dtype.type(8 * value.itemsize)
    return value << (bits - first - count) >> (bits - count)


def _shuffled(threads: Threads, kinds: list[str], names: list[str]) -> Array:
    value = threads.value(names[0], np.uint32)
    by = threads.value(names[1], np.uint32)
    if threads.value(names[2], np.uint32)[0] != _LANES - 1:
        raise Fault("shuffles within parts of a warp are not known here")
    lane = np.arange(threads.count, dtype=np.uint32)
    warp, lane = lane // _LANES * _LANES, lane % _LANES
    source = {"bfly": lane ^ by, "idx": by % _LANES}[kinds[0]]
    return value[warp + source]


_OPERATIONS: dict[str, Operation] = {
    "mov": _plain(lambda a: a),
    "add": _plain(np.add),
    "sub": _plain(np.subtract),
    "mul": _multiplied,
    "mad": _multiplied,
    "fma": _plain(_fma),
    "div": _plain(_quotient),
    "rem": _plain(_rest),
    "neg": _plain(np.negative),
    "abs": _plain(np.abs),
    "min": _plain(np.fmin),
    "max": _plain(np.fmax),
    "and": _plain(np.bitwise_and),
    "or": _plain(np.bitwise_or),
    "xor": _plain(np.bitwise_xor),
    "not": _plain(np.invert),
    "sqrt": _plain(np.sqrt),
    "rcp": _plain(np.reciprocal),
    "ex2": _plain(np.exp2),
    "shl": partial(_shifted, left=True),
    "shr": partial(_shifted, left=False),
    "setp": _compared,
    "selp": _selected,
    "cvt": _converted,
    "prmt": _permuted,
    "bfe": _extracted,
    "shfl": _shuffled,
}


# memory


def _access(instruction: Instruction) -> tuple[int, Any]:
    """Return how many numbers a thread loads or stores, and their kind."""
    count = next((int(kind[1:]) for kind in instruction.kinds if re.fullmatch(r"v\d", kind)), 1)
    return count, _TYPES[instruction.kinds[-1]]


def _load(threads: Threads, instruction: Instruction, mask: Array) -> None:
    count, kind = _access(instruction)
    target, address, *_ = instruction.operands
    if "param" in instruction.kinds:
        bits = threads.parameters[address.strip("[]")]
        value = np.full(threads.count, _immediate(str(bits), kind))
        wide = _UNSIGNED[np.dtype(threads.code.type_of(target)).itemsize]
        threads.write(target, value if value.dtype.kind == "f" else value.astype(wide), mask)
        return
    size = np.dtype(kind).itemsize
    data, places = threads.reach(instruction, address, size * count, mask)
    found = np.zeros((threads.count, count), kind)
    found[mask] = np.ascontiguousarray(data[places]).view(kind)
    for name, value in zip(_names(target), found.T, strict=True):
        threads.write(name, value, mask)


def _store(threads: Threads, instruction: Instruction, mask: Array) -> None:
    count, kind = _access(instruction)
    address, source, *_ = instruction.operands
    data, places = threads.reach(instruction, address, np.dtype(kind).itemsize * count, mask)
    values = np.stack([threads.value(name, kind)[mask] for name in _names(source)], 1)
    data[places] = values.view(np.uint8).reshape(places.shape)


def _add_to(threads: Threads, instruction: Instruction, mask: Array) -> None:
    """Run atom and red, one thread after the other."""
    if "add" not in instruction.kinds:
        raise Fault("atomics but additions are not known here")
    *target, address, source = instruction.operands
    data, places = threads.reach(instruction, address, 4, mask)
    added = threads.value(source, np.uint32)[mask]
    before = np.zeros(threads.count, np.uint32)
    for thread, place, value in zip(np.flatnonzero(mask), places, added, strict=True):
        number = data[place].view(np.uint32)
        before[thread] = number[0]
        data[place] = (number + value).view(np.uint8)
    for name in target:
        threads.write(name, before, mask)


def _matrix(threads: Threads, instruction: Instruction, mask: Array) -> None:
    """Run ldmatrix and stmatrix: 8 rows of 16 bytes each, at the addresses of 8 lanes."""
    registers, address = (
        instruction.operands if instruction.name == "ldmatrix" else instruction.operands[::-1]
    )
    lanes = np.flatnonzero(mask)
    if len(lanes) != _LANES:
        raise Fault("matrices by some threads of a warp are not known here")
    for j, register in enumerate(_names(registers)):
        of_rows = np.zeros(threads.count, bool)
        of_rows[lanes[8 * j : 8 * j + 8]] = True
        data, places = threads.reach(instruction, address, 16, of_rows)
        places = places.reshape(8, 8, 2)
        if "trans" in instruction.kinds:
            places = places.swapaxes(0, 1)
        places = places.reshape(_LANES, 4)
        if instruction.name == "ldmatrix":
            value = np.zeros(threads.count, np.uint32)
            value[lanes] = data[places].view(np.uint32)[:, 0]
            threads.write(register, value, mask)
        else:
            value = threads.value(register, np.uint32)[lanes]
            data[places] = value[:, None].view(np.uint8)


_MEMORY: dict[str, Callable[[Threads, Instruction, Array], None]] = {
    "ld": _load, "st": _store, "atom": _add_to, "red": _add_to,
    "ldmatrix": _matrix, "stmatrix": _matrix,
}  # fmt: skip
