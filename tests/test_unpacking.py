"""The PTX that turns pairs of 16-bit elements into float32, which no interpreter runs: its
instructions, done here."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="device code")

from triton_gn.kernels import tile

_ALL = np.arange(2**16, dtype=np.uint32)
_SELECTORS = {3: 0x1044, 4: 0x1044, 5: 0x3244, 6: 0x3244}


def _run(ptx: str, pairs: np.ndarray, inputs: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What the two outputs hold: float32, as their bits."""
    values: dict[str, np.ndarray] = {"$2": pairs}
    values |= {f"${i}": np.full_like(pairs, value) for i, value in inputs.items()}

    def value(name: str) -> np.ndarray:
        return values[name] if name in values else np.full_like(pairs, int(name, 0))

    for operation, operands in _instructions(ptx):
        target, *names = operands
        sources = [value(name) for name in names]
        if operation == "mov.b32":  # a pair's halves
            low, high = re.findall(r"\w+", target)
            values[low], values[high] = sources[0] & 0xFFFF, sources[0] >> 16
        else:
            values[target] = _OPERATIONS[operation](*sources)
    return values["$0"], values["$1"]


def _instructions(ptx: str) -> Iterator[tuple[str, list[str]]]:
    for statement in re.sub(r"^\{|\}$", "", ptx).split(";"):
        operation, _, operands = statement.strip().partition(" ")
        if operation and operation != ".reg":
            yield operation, re.findall(r"\{[^}]*\}|[$\w]+", operands)


def _permuted(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    found = np.zeros_like(a)
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    for i in range(4):
        which = (selectors >> (4 * i) & 7).astype(np.uint64)
        byte = (both >> (which * np.uint64(8))).astype(np.uint32) & 0xFF
        found |= byte << (8 * i)
    return found


def _from_half(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)


_OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "shl.b32": lambda a, count: a << count,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "prmt.b32": _permuted,
    "cvt.f32.f16": _from_half,
}


@pytest.mark.parametrize(
    ("ptx", "inputs", "expected"),
    [
        (tile.BFLOAT16, {}, _ALL << 16),
        (tile.BFLOAT16_ANEW, _SELECTORS, _ALL << 16),
        (tile.FLOAT16_ANEW, {3: 0, 4: 0}, _from_half(_ALL)),
    ],
    ids=["bfloat16", "bfloat16 anew", "float16 anew"],
)
def test_unpacks_every_value(ptx: Any, inputs: dict[int, int], expected: np.ndarray) -> None:
    for partner in (0, 0x8000, 0xFFFF, 0x3C01):
        low, _ = _run(ptx.value, _ALL | np.uint32(partner << 16), inputs)
        _, high = _run(ptx.value, _ALL << 16 | np.uint32(partner), inputs)
        np.testing.assert_array_equal(low, expected)
        np.testing.assert_array_equal(high, expected)
