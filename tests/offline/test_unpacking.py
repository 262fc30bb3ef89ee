"""The PTX that turns pairs of bfloat16 elements into float32, which no interpreter runs: its
instructions, done here."""

import re

import numpy as np
import pytest

from tests.support.ptx import Code, Threads
from triton_gn.kernels import tile

pytest.importorskip("triton", reason="device code")

_ALL = np.arange(2**16, dtype=np.uint32)


def _run(ptx: str, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the two outputs hold, a thread for each pair: float32, as their bits."""
    threads = Threads(Code(".reg .b32 %r<9>;" + re.sub(r"\$(\d)", r"%r\1", ptx)), len(pairs))
    threads.registers["%r2"] = pairs
    threads.run()
    return threads.bits("%r0"), threads.bits("%r1")


def test_unpacks_every_value() -> None:
    for partner in (0, 0x8000, 0xFFFF, 0x3C01):
        low, _ = _run(tile.BFLOAT16.value, _ALL | np.uint32(partner << 16))
        _, high = _run(tile.BFLOAT16.value, _ALL << 16 | np.uint32(partner))
        np.testing.assert_array_equal(low, _ALL << 16)
        np.testing.assert_array_equal(high, _ALL << 16)
