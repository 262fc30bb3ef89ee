"""The PTX that turns pairs of 16-bit elements into float32, which no interpreter runs: its
instructions, done here."""

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="device code")

from tests.ptx import Code, Threads
from triton_gn.kernels import tile

_ALL = np.arange(2**16, dtype=np.uint32)
_SELECTORS = {3: 0x1044, 4: 0x1044, 5: 0x3244, 6: 0x3244}


def _run(ptx: str, pairs: np.ndarray, inputs: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What the two outputs hold, a thread for each pair: float32, as their bits."""
    threads = Threads(Code(".reg .b32 %r<9>;" + re.sub(r"\$(\d)", r"%r\1", ptx)), len(pairs))
    threads.registers["%r2"] = pairs
    for i, value in inputs.items():
        threads.registers[f"%r{i}"] = np.full_like(pairs, value)
    threads.run()
    return threads.bits("%r0"), threads.bits("%r1")


def _from_half(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)


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
