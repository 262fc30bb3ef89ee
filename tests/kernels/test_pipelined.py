"""Pipelined: the order of its tickets, and that nothing depends on who takes which.

The interpreter runs one program after the other, so the first takes all tickets: what runs at the
same time is proven on a GPU only, in tests/gpu/test_gpu.py.
"""

import itertools

import pytest
import torch
import triton
import triton.language as tl

import triton_gn
from tests.support.memory import GuardedMemory
from tests.support.oracle import check, make_case
from triton_gn.kernels.pipelined import Units, _phase, _program
from triton_gn.kernels.tile import Tile
from triton_gn.ops import launcher, layout
from triton_gn.ops.call import Call
from triton_gn.ops.settings import Settings

FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "innermost"])


@triton.jit
def list_tickets(out_ptr, order, splits, TILE: tl.constexpr):
    for ticket in range(0, 2 * order.units * order.items):
        unit, is_first = _phase(ticket, order)
        tl.store(out_ptr + 3 * ticket, unit)
        tl.store(out_ptr + 3 * ticket + 1, is_first.to(tl.int32))
        tl.store(
            out_ptr + 3 * ticket + 2, _program(unit, ticket % order.items, order, splits, TILE)
        )


def tickets(
    device: str,
    units: int,
    in_sample: int,
    items: int,
    prefetch_distance: int,
    splits: int,
    channels_last: bool,
) -> list[tuple[int, bool, int]]:
    """Unit, whether it is the first pass, and the number of the program, of each ticket."""
    out = torch.full((2 * units * items, 3), -1, dtype=torch.int32, device=device)
    order = Units(units, in_sample, items, prefetch_distance)
    list_tickets[(1,)](out, order, splits, Tile(channels_last=channels_last))
    return [(unit, bool(first), program) for unit, first, program in out.tolist()]


@FORMATS
@pytest.mark.parametrize(
    ("units", "prefetch_distance"), [(1, 1), (2, 1), (2, 2), (6, 1), (6, 4), (6, 6)]
)
def test_tickets_are_in_order(
    device: str, units: int, prefetch_distance: int, channels_last: bool
) -> None:
    splits = 3
    items = 2 * splits
    listed = tickets(
        device, units, 2 if units % 2 == 0 else 1, items, prefetch_distance, splits, channels_last
    )
    for is_first in (True, False):
        of_pass = [one for one in listed if one[1] is is_first]
        assert [unit for unit, *_ in of_pass] == [i // items for i in range(units * items)]
        assert sorted(program for *_, program in of_pass) == list(range(units * items))
    phases = [next(phase)[:2] for _, phase in itertools.groupby(listed, lambda one: one[:2])]
    assert len(phases) == 2 * units
    for unit in range(units):
        first, second = phases.index((unit, True)), phases.index((unit, False))
        # prefetch_distance - 1 pairs and one first pass lie between, as far as there are any
        assert first < second <= first + 2 * prefetch_distance
    # whoever waits, waits for earlier tickets only
    assert [unit for unit, is_first in phases if is_first][:prefetch_distance] == list(
        range(prefetch_distance)
    )


def test_units_are_adjacent_groups_of_a_sample(device: str) -> None:
    """Channels-last, 6 blocks of groups in units of 2, 3 splits: programs are numbered as split's,
    blocks innermost, then splits, then samples."""
    listed = tickets(device, 6, 3, 6, 1, 3, channels_last=True)
    for unit, is_first, program in listed:
        if is_first:
            sample, block = program // 18, program % 6
            assert (sample, block // 2) == divmod(unit, 3)


@FORMATS
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_bits_do_not_depend_on_the_pipeline(
    memory: GuardedMemory, device: str, channels_last: bool, activation: str
) -> None:
    """Nor on there being one: they are those of split."""
    case = make_case(
        memory, device, (3, 16, 12, 16), 4, channels_last=channels_last, activation=activation,
        fused=("pre_add", "residual"),
    )  # fmt: skip
    cut = {"pixel_tiles": 1, "splits": 2}
    with triton_gn.plan_override(strategy="split", **cut):
        expected = case.through_kernels()
    check(expected, case.expected())
    for fields in (
        {"persistent_programs": 1},
        {"persistent_programs": 5},
        {"persistent_programs": 64, "blocks": 1},
    ):
        with triton_gn.plan_override(strategy="pipelined", **cut, **fields):
            for name, value in case.through_kernels().items():
                assert torch.equal(value, expected[name]), name


def test_counters_start_at_zero_in_each_call(memory: GuardedMemory, device: str) -> None:
    case = make_case(memory, device, (2, 8, 6, 6), 2)
    options = Settings(plan_override=(("strategy", "pipelined"), ("persistent_programs", 2)))
    expected = case.expected()["y"]
    call = Call(2, 1e-5, "none", case.x.dtype, options)
    with launcher.recording() as calls:
        for _ in range(3):
            y = layout.empty_like(case.x).fill_(float("nan"))
            launcher.forward(case.operands, call, y, None)
            check({"y": y}, {"y": expected})
    assert calls[0] is calls[1] is calls[2]


def test_parameter_gradients_alone_take_one_pass(memory: GuardedMemory, device: str) -> None:
    case = make_case(memory, device, (2, 8, 6, 6), 2)
    weight = case.weight.requires_grad_()
    with triton_gn.plan_override(strategy="pipelined"), triton_gn.backend("triton"):
        y = triton_gn.group_norm(case.x, 2, weight, case.bias)
        with launcher.recording() as calls:
            y.backward(case.dy)
    check({"dweight": weight.grad}, {"dweight": case.expected()["dweight"]})
    assert not [one for one in calls[0].launches if "pipelined" in one.kernel.__name__]
