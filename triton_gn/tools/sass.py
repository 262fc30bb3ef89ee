"""Count the instructions that a thread of a compiled kernel executes, in the machine code."""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of cuobjdump's output: ``/*0080*/ @!P0 BRA 0x1200 ;``."""

    address: int
    is_conditional: bool
    name: str  # with its modifiers: LDG.E.128
    operands: str


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)\s*([^;]*);")


def disassembled(cubin: bytes) -> list[Instruction]:
    """Return the instructions of a kernel, by address.

    Raises:
        subprocess.CalledProcessError: cuobjdump, which comes with Triton, cannot read the code.
    """
    text = _cuobjdump("-sass", cubin)
    instructions = (
        Instruction(int(address, 16), bool(predicate), name, operands)
        for address, predicate, name, operands in _INSTRUCTION.findall(text)
    )
    return [instruction for instruction in instructions if instruction.name != "NOP"]


def resource_usage(cubin: bytes) -> str:
    """Return cuobjdump's report of registers and memory."""
    return _cuobjdump("-res-usage", cubin)


def _cuobjdump(flag: str, cubin: bytes) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def executed(code: Sequence[Instruction], iterations: int) -> int:
    """Count the instructions of a thread with ``iterations`` of its main loop, if it has one.

    Other loops count once: they merge partial results and mostly run once. Branches for rare cases,
    such as the slow path of a division, count as taken.
    """
    path = main_path(code)
    return len(path) + len(main_loop(path)) * (iterations - 1)


def main_loop(path: Sequence[Instruction]) -> Sequence[Instruction]:
    """Return the loop with most accesses to global memory, empty if there is none."""
    return max(innermost_loops(path), key=accesses, default=[])


def main_path(code: Sequence[Instruction]) -> Sequence[Instruction]:
    """Return the code without subroutines, and without the path of programs with other work."""
    ends = [
        i + 1
        for i, instruction in enumerate(code)
        if instruction.name == "EXIT" and not instruction.is_conditional
    ]
    parts = [code[i:j] for i, j in itertools.pairwise([0, *ends])]
    main = max(parts, key=accesses, default=code)
    if main is code or main is parts[0]:
        return main
    fork = next(
        i
        for i, instruction in enumerate(code)
        if instruction.name == "BRA" and instruction.is_conditional
    )
    return [*code[: fork + 1], *main]


def accesses(code: Sequence[Instruction]) -> tuple[int, int]:
    """Count stores to and loads from global memory: the work on tensors has the most."""
    names = [instruction.name.partition(".")[0] for instruction in code]
    return names.count("STG"), names.count("LDG")


def innermost_loops(code: Sequence[Instruction]) -> list[Sequence[Instruction]]:
    """Return the innermost of the loops that load or store tensors.

    Each is the code from the target of a backward branch to the branch.
    """
    index_of = {instruction.address: i for i, instruction in enumerate(code)}
    loops: list[tuple[int, int]] = []
    for i, instruction in enumerate(code):
        if not instruction.name.startswith("BRA"):
            continue
        target = re.search(r"0x([0-9a-f]+)", instruction.operands)
        start = index_of.get(int(target[1], 16), i) if target else i
        is_innermost = start < i and not any(start <= inner for inner, _ in loops)
        if is_innermost and any(accesses(code[start : i + 1])):
            loops.append((start, i + 1))
    return [code[start:end] for start, end in loops]
