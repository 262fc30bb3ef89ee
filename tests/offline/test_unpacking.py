"""Run the PTX that unpacks pairs of bfloat16 elements to float32; no interpreter of Triton does."""

import re

import numpy as np
import pytest

from tests.support.ptx import Code, Threads
from triton_gn.kernels import tile

pytest.importorskip("triton", reason="device code")

_ALL = np.arange(2**16, dtype=np.uint32)


def _run(ptx: str, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Run a thread for each pair; return the bits of both float32 outputs."""
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
