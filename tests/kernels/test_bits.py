"""Which bits may depend on what: not on the run, not on other groups, and on request not on the
batch."""

import pytest
import torch

import triton_gn
from tests.support.memory import GuardedMemory
from tests.support.oracle import check_poison_stays, make_case

STRATEGIES = pytest.mark.parametrize("strategy", ["resident", "pipelined", "split"])
FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "innermost"])


@STRATEGIES
@FORMATS
def test_same_input_same_bits(
    memory: GuardedMemory, device: str, strategy: str, channels_last: bool
) -> None:
    case = make_case(memory, device, (3, 12, 9, 7), 4, channels_last=channels_last)
    with triton_gn.plan_override(strategy=strategy):
        first, second = case.through_kernels(), case.through_kernels()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@FORMATS
@pytest.mark.parametrize(
    ("shape", "num_groups"), [((4, 12, 8, 8), 4), ((4, 4, 96, 100), 1)], ids=["small", "large"]
)
def test_batch_invariant(
    memory: GuardedMemory, device: str, shape: tuple[int, ...], num_groups: int, channels_last: bool
) -> None:
    case = make_case(memory, device, shape, num_groups, channels_last=channels_last)
    with triton_gn.batch_invariant(True):
        batch = case.through_kernels()
        case.x, case.dy = case.x[2:3], case.dy[2:3]
        alone = case.through_kernels()
    assert torch.equal(alone["y"], batch["y"][2:3])
    assert torch.equal(alone["dx"], batch["dx"][2:3])


def test_batch_invariance_changes_the_plan() -> None:
    """Otherwise the plan of this problem depends on its batch: the test above can fail."""
    alone, batch = (torch.empty(n, 4, 96, 100) for n in (1, 64))
    configs = [triton_gn.explain(x, 1).config for x in (alone, batch)]
    assert configs[0] != configs[1]


@STRATEGIES
@FORMATS
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's word for inf - inf
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_group(
    memory: GuardedMemory, device: str, strategy: str, channels_last: bool, poison: float
) -> None:
    # a group to a program, or (innermost) four
    case = make_case(memory, device, (2, 12, 9, 7), 4, channels_last=channels_last)
    with triton_gn.plan_override(strategy=strategy):
        clean = case.through_kernels()
        case.x[1, 4, 3, 2] = poison  # sample 1, group 1: channels 3 to 5
        case.dy[1, 4, 0, 0] = poison
        poisoned = case.through_kernels()
    touched = torch.zeros(2, 12, dtype=torch.bool)
    touched[1, 3:6] = True
    check_poison_stays(poisoned, clean, touched)
