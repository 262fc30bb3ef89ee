"""Calls foreseen on tensors without memory launch nothing, and disturb no other thread."""

from threading import Thread

import torch

import triton_gn
from tests.support.memory import GuardedMemory
from tests.support.oracle import make_case
from triton_gn.ops import autograd, launcher
from triton_gn.ops.call import Call
from triton_gn.ops.settings import Settings
from triton_gn.plan import TARGETS
from triton_gn.reference import Operands


def test_other_threads_launch_meanwhile(memory: GuardedMemory, device: str) -> None:
    case = make_case(memory, device, (2, 8, 6, 5), 2)
    results: list[torch.Tensor] = []

    def elsewhere() -> None:
        with torch.no_grad(), triton_gn.backend("triton"):
            results.append(triton_gn.group_norm(case.x, 2, case.weight, case.bias))

    def foreseen() -> None:
        thread = Thread(target=elsewhere)
        thread.start()
        thread.join()
        x = torch.empty(4, 64, 8, 8, dtype=torch.bfloat16, device="meta")
        call = Call(4, 1e-5, "none", x.dtype, Settings())
        autograd.forward(Operands(x), call, with_stats=False)

    (launch,) = launcher.foresee(TARGETS["sm_80"], foreseen)
    assert launch.arguments["inputs"].x_ptr.shape == (4, 64, 8, 8)
    expected = torch.nn.functional.group_norm(case.x, 2, case.weight, case.bias)
    torch.testing.assert_close(results[0], expected)
