"""What the evidence commands count and compute in the interpreter, here on small tensors."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch.nn import functional as F

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("counts in Triton's interpreter", allow_module_level=True)

from triton.runtime import interpreter

from perf import accuracy, interpreted, peers, traffic
from tests.support import memory as support
from tests.support.memory import GuardedMemory
from triton_gn.tools.workloads import Workload

LAYER = Workload("small", 2, 16, 2, (8, 12), "float32", activation="silu")
# a package of the same structure: one kernel, for float32 groups that fill whole blocks
STAND_IN = """
import torch, triton, triton.language as tl
from flag_gems.runtime import torch_device_fn
from flag_gems.utils import libentry, tl_extra_shim
from flag_gems.utils import triton_lang_extension as tle

rsqrt = tl_extra_shim.rsqrt

@libentry()
@triton.jit
def kernel(X, Y, W, B, size, pixels, channels, groups, eps, BLOCK: tl.constexpr):
    pid = tle.program_id(0)
    rows = tl.arange(0, 1)[:, None]
    offsets = tl.arange(0, BLOCK)[None, :]
    mask = rows < 1 and offsets < size
    x = tl.load(X + pid * size + offsets, mask=mask, other=0.0)
    mean = tl.sum(x) / size
    deviations = tl.where(mask, x - mean, 0.0)
    rstd = rsqrt(tl.sum(deviations * deviations) / size + eps)
    channel = pid % groups * channels + offsets // pixels
    w = tl.load(W + channel, mask=mask, other=0.0)
    b = tl.load(B + channel, mask=mask, other=0.0)
    tl.store(Y + pid * size + offsets, deviations * rstd * w + b, mask=mask)

def group_norm(x, weight, bias, n, channels, pixels, groups, eps):
    y = torch.empty_like(x)
    size = channels // groups * pixels
    with torch_device_fn.device(x.device):
        kernel[(n * groups,)](x, y, weight, bias, size, pixels, channels // groups, groups, eps,
                              triton.next_power_of_2(size))
    return y, None, None

def group_norm_backward(dy, x, mean, rstd, weight, n, channels, pixels, groups, mask):
    return dy.clone(), weight.clone(), weight.clone()
"""


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes with bfloat16 during a test."""
    for owner, name in (
        (interpreter.InterpreterBuilder, "binary_op"),
        (interpreter.InterpreterBuilder, "create_atomic_rmw"),
        (interpreter.ReduceOps, "sum"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # restored after the test
    interpreted.compute_in_bfloat16()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[peers.Peer]:
    """A package in FlagGems' place."""
    file = tmp_path / "flag_gems" / "ops" / "groupnorm.py"
    file.parent.mkdir(parents=True)
    (tmp_path / "flag_gems" / "__init__.py").write_text("raise RuntimeError('no GPU')")
    file.write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flag_gems", raising=False)
    peers._flag_gems.cache_clear()
    (peer,) = (peer for peer in peers.PEERS if peer.name == "flag_gems")
    assert peer.installed
    yield peer
    peers._flag_gems.cache_clear()


@pytest.fixture
def plain_memory(monkeypatch: pytest.MonkeyPatch, memory: GuardedMemory) -> None:
    """Allocates without guard zones, which are made by operators that would be counted."""
    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, name, getattr(support, f"_{name}"))


@pytest.mark.usefixtures("plain_memory")
def test_a_peer_is_loaded_without_importing_its_package(stand_in: peers.Peer) -> None:
    x, weight, bias = torch.randn(2, 6, 20), torch.randn(6), torch.randn(6)
    y, _ = stand_in.forward(x, 2, weight, bias)
    torch.testing.assert_close(y, F.group_norm(x, 2, weight, bias))
    assert "flag_gems" not in sys.modules
    assert accuracy.implementations().keys() >= {"flag_gems"}


@pytest.mark.usefixtures("plain_memory")
def test_a_peer_and_pytorchs_operators_are_counted(stand_in: peers.Peer) -> None:
    forward, backward = traffic.count_peer("flag_gems", LAYER)
    x, channels = 2 * 16 * 96 * 4, 16 * 4
    assert forward["launches"] == 2
    # the kernel, each channel's parameters once a program, and SiLU
    assert forward["loaded"] == x + 2 * 2 * channels + x
    assert forward["stored"] == 2 * x
    assert backward["launches"] == 4
    assert backward["loaded"] == 3 * x + 2 * channels


@pytest.mark.usefixtures("plain_memory")
def test_pytorchs_passes() -> None:
    """Forward: 2R + 1W and SiLU's 1R + 1W. Backward: SiLU's 2R + 1W and 4R + 1W."""
    large = Workload("", 1, 16, 2, (64, 64), "float32", activation="silu")
    forward, backward = traffic.count_torch(large)
    x = 16 * 64 * 64 * 4
    assert forward["loaded"] == pytest.approx(3 * x, rel=0.01)
    assert forward["stored"] == pytest.approx(2 * x, rel=0.01)
    assert backward["loaded"] == pytest.approx(6 * x, rel=0.01)
    assert backward["stored"] == pytest.approx(2 * x, rel=0.01)
    copied, _ = traffic.count_torch(
        Workload("", 1, 16, 2, (64, 64), "float32", layout="channels_last", activation="silu")
    )
    assert copied["loaded"] == forward["loaded"] + x


@pytest.mark.usefixtures("plain_memory")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ours_counts_what_inspect_states(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "MOST_ELEMENTS", 2**14)
    layer = Workload("", 4, 64, 8, (32, 32), "bfloat16", layout=layout, activation="silu")
    for row in traffic.count_ours(layer):
        assert row["scale"] < 1
        assert abs(traffic.excess(row)) < 0.01


@pytest.mark.usefixtures("plain_memory")
def test_an_operator_without_a_rule_is_refused() -> None:
    with interpreted.Traffic(), pytest.raises(ValueError, match=r"a rule.*got sin"):
        torch.zeros(3).sin()


@triton.jit
def _sum_kernel(x_ptr, y_ptr, total_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(y_ptr, tl.sum(x * x))
    tl.atomic_add(total_ptr, tl.sum(x))


@pytest.mark.usefixtures("bfloat16")
def test_bfloat16_rounds_each_operation() -> None:
    """A tree of 256 ones sums to 256; 257 would need another bit."""
    x = torch.ones(256, dtype=torch.bfloat16)
    y, total = torch.zeros(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16)
    _sum_kernel[(1,)](x, y, total, BLOCK=256)
    assert (y.item(), total.item()) == (256, 256)
    x.fill_(1.0078125)  # its square needs 14 bits
    _sum_kernel[(1,)](x, y, total, BLOCK=256)
    assert y.item() == 256 * 1.015625
