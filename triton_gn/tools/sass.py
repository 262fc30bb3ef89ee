"""How many instructions a thread of a compiled kernel executes, counted in the machine code."""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of what cuobjdump prints: ``/*0080*/ @!P0 BRA 0x1200 ;``."""

    address: int
    is_conditional: bool
    name: str  # with its modifiers: LDG.E.128
    operands: str


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)\s*([^;]*);")


def disassembled(cubin: bytes) -> list[Instruction]:
    """The instructions of a kernel, by address.

    Raises:
        subprocess.CalledProcessError: cuobjdump, which comes with Triton, cannot read it.
    """
    text = _cuobjdump("-sass", cubin)
    found = (
        Instruction(int(address, 16), bool(predicate), name, operands)
        for address, predicate, name, operands in _INSTRUCTION.findall(text)
    )
    return [one for one in found if one.name != "NOP"]


def resource_usage(cubin: bytes) -> str:
    """What cuobjdump reports of registers and memory."""
    return _cuobjdump("-res-usage", cubin)


def _cuobjdump(flag: str, cubin: bytes) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def executed(code: Sequence[Instruction], rounds: int) -> int:
    """Instructions of a thread that goes ``rounds`` times through its main loop, if it has one.

    Other loops count once: they merge partial results, and once is what they mostly take. Branches
    that handle what is rare, as the slow path of a division, count as if they were taken.
    """
    path = _main_path(code)
    loop = max(_loops(path), key=_accesses, default=[])
    return len(path) + len(loop) * (rounds - 1)


def _main_path(code: Sequence[Instruction]) -> Sequence[Instruction]:
    """Without subroutines, and without the work of those programs that have another."""
    ends = [i + 1 for i, one in enumerate(code) if one.name == "EXIT" and not one.is_conditional]
    parts = [code[i:j] for i, j in itertools.pairwise([0, *ends])]
    main = max(parts, key=_accesses, default=code)
    if main is code or main is parts[0]:
        return main
    fork = next(i for i, one in enumerate(code) if one.name == "BRA" and one.is_conditional)
    return [*code[: fork + 1], *main]


def _accesses(code: Sequence[Instruction]) -> tuple[int, int]:
    """How often global memory is written and read: most often by the work on tensors."""
    names = [one.name.partition(".")[0] for one in code]
    return names.count("STG"), names.count("LDG")


def _loops(code: Sequence[Instruction]) -> list[Sequence[Instruction]]:
    """What lies between a branch backwards and its target; of nested loops the innermost."""
    places = {one.address: i for i, one in enumerate(code)}
    loops: list[tuple[int, int]] = []
    for i, one in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", one.operands) if one.name.startswith("BRA") else None
        start = places.get(int(target[1], 16), i) if target else i
        if start < i and not any(start <= inner for inner, _ in loops):
            loops.append((start, i + 1))
    return [code[start:end] for start, end in loops]
