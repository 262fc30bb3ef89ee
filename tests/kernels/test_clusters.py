"""Groups that clusters of CTAs hold: the answers of their tiles.

The interpreter ignores that a program is a cluster. What its CTAs make of the sums is seen on a GPU
only, here and in tests/test_gpu.py; what they are compiled to, in tests/test_compile.py.
"""

from typing import Any

import pytest
import torch

import triton_gn
from tests.kernels.memory import GuardedMemory
from tests.kernels.oracle import check, check_poison_stays, make_case
from triton_gn.ops import launch, prepared

pytestmark = pytest.mark.skipif(
    launch.gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu")).clusters == 1,
    reason="no clusters with this Triton or on this GPU",
)
# a row for each CTA; one for all of them; more rows than channels, and columns than pixels; rows of
# 7x7 that span four channels
TILES: list[tuple[tuple[int, ...], int, dict[str, int]]] = [
    ((2, 16, 32, 32), 2, {"ctas": 2}),
    ((2, 6, 50, 40), 3, {"ctas": 2, "rows": 1, "cols": 1024, "num_warps": 4}),
    ((1, 10, 30, 30), 1, {"ctas": 8}),
    ((2, 32, 7, 7), 2, {"ctas": 4}),
]


@pytest.mark.parametrize(("shape", "num_groups", "fields"), TILES)
@pytest.mark.parametrize("fused", [(), ("scale", "shift", "pre_add", "residual")], ids=len)
def test_clusters(
    memory: GuardedMemory,
    device: str,
    shape: tuple[int, ...],
    num_groups: int,
    fields: dict[str, Any],
    fused: tuple[str, ...],
) -> None:
    activation = "silu" if fused else "none"
    case = make_case(memory, device, shape, num_groups, activation=activation, fused=fused)
    with triton_gn.plan_override(strategy="resident", **fields), prepared.recording() as calls:
        check(case.through_kernels(), case.expected())
    assert [call.config.ctas for call in calls] == [fields["ctas"]] * 2
    assert [call.launches[0].ctas for call in calls] == [fields["ctas"]] * 2


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's word for inf - inf
def test_poison_stays_in_its_group(memory: GuardedMemory, device: str) -> None:
    case = make_case(memory, device, (2, 12, 32, 32), 3)
    with triton_gn.plan_override(strategy="resident", ctas=4):
        clean = case.through_kernels()
        case.x[1, 5, 3, 2] = float("nan")  # sample 1, group 1: channels 4 to 7
        case.dy[1, 5, 0, 0] = float("nan")
        poisoned = case.through_kernels()
    touched = torch.zeros(2, 12, dtype=torch.bool)
    touched[1, 4:8] = True
    check_poison_stays(poisoned, clean, touched)
