"""Bytes that the kernels load and store, counted in the interpreter."""

import os

import pytest
import torch

import triton_gn
from tests.support.interpreter import Traffic
from tests.support.memory import GuardedMemory
from tests.support.oracle import make_case
from triton_gn.explain import Explanation
from triton_gn.ops import autograd, launcher, launches, layout
from triton_gn.ops.call import Call
from triton_gn.ops.settings import Settings
from triton_gn.plan import Device, plan
from triton_gn.tools import inspection
from triton_gn.tools.workloads import DIRECTIONS, FUSED, LAYOUTS, Workload

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("counts in Triton's interpreter", allow_module_level=True)

SHAPES = [((2, 20, 8, 8), 2), ((2, 16, 7, 7), 2), ((1, 30, 5, 3, 2), 3), ((3, 12), 4)]


@pytest.mark.parametrize(("strategy", "passes"), [("resident", 1), ("pipelined", 2), ("split", 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "innermost"])
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=str)
def test_each_tensor_is_read_and_written_once(
    memory: GuardedMemory,
    device: str,
    shape: tuple[int, ...],
    num_groups: int,
    channels_last: bool,
    dtype: torch.dtype,
    strategy: str,
    passes: int,
) -> None:
    """Resident reads each tensor once; split, which this shows to be counted, twice."""
    case = make_case(memory, device, shape, num_groups, channels_last=channels_last, dtype=dtype)
    x, dy = case.x.requires_grad_(), case.dy
    with triton_gn.plan_override(strategy=strategy), triton_gn.backend("triton"):
        with Traffic(x=x) as forward:
            y = triton_gn.group_norm(x, num_groups, case.weight, case.bias)
        with Traffic(x=x, dy=dy, y=y) as backward:
            (dx,) = torch.autograd.grad(y, x, dy)
        num_partials = {
            direction: triton_gn.explain(x, num_groups, direction=direction).config.num_partials
            for direction in ("forward", "backward")
        }
    assert forward.loaded["x"] == passes * x.nbytes
    assert backward.loaded["x"] == backward.loaded["dy"] == passes * x.nbytes
    assert forward.stored["x"] == backward.stored["x"] == backward.stored["dy"] == 0
    assert backward.loaded["y"] == 0
    # all that is stored: y or dx once, and numbers per group: mean, mean_lo and rstd for backward,
    # four or two for each partial of split
    itemsize = 8 if dtype is torch.float64 else 4
    per_group = {"forward": 3, "backward": 0}
    if strategy != "resident":
        per_group["forward"] += 4 * num_partials["forward"]
        per_group["backward"] += 2 * num_partials["backward"]
    numbers = shape[0] * num_groups * itemsize
    assert forward.stored["other"] == y.nbytes + per_group["forward"] * numbers
    assert backward.stored["other"] == dx.nbytes + per_group["backward"] * numbers


def test_nothing_is_computed_that_is_not_asked_for(memory: GuardedMemory, device: str) -> None:
    case = make_case(memory, device, (2, 6, 4, 4), 2)
    case.weight.requires_grad_()
    with triton_gn.backend("triton"):
        y = triton_gn.group_norm(case.x, 2, case.weight, case.bias)
        with Traffic(x=case.x, dy=case.dy) as traffic:
            y.backward(case.dy)
    assert traffic.stored["other"] < case.x.nbytes  # no dx
    with torch.no_grad(), triton_gn.backend("triton"), Traffic(x=case.x) as traffic:
        y = triton_gn.group_norm(case.x, 2, case.weight, case.bias)
    assert traffic.stored["other"] == y.nbytes  # no statistics


def numbers_of(problem: Explanation) -> int:
    """Count the statistics and partial results that a call stores besides its tensors."""
    groups = problem.problem.n * problem.problem.groups
    num_partials = problem.config.num_partials if problem.config.strategy != "resident" else 0
    forward = problem.problem.direction == "forward"
    return groups * ((3 if forward else 0) + (4 if forward else 2) * num_partials)


@pytest.mark.parametrize(("strategy", "passes"), [("resident", 1), ("pipelined", 2), ("split", 2)])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "innermost"])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(
    "fused", [(), ("scale", "shift"), ("pre_add",), ("residual",), ("pre_add", "residual")], ids=str
)
def test_fused_traffic(
    memory: GuardedMemory,
    device: str,
    fused: tuple[str, ...],
    activation: str,
    channels_last: bool,
    strategy: str,
    passes: int,
) -> None:
    """Forward: x, y and one read of the residual, which the first pass of split does not need.
    Backward: x, dy and dx; with an activation the residual is read for its derivative, and the
    residual's gradient is written; without one that is dy itself and no byte moves."""
    case = make_case(
        memory, device, (2, 20, 8, 8), 2, channels_last=channels_last, dtype=torch.bfloat16,
        activation=activation, fused=fused,
    )  # fmt: skip
    extras = {name: getattr(case, name) for name in fused}
    x, residual = case.x.requires_grad_(), case.residual
    if residual is not None:
        residual.requires_grad_()
    operands = {"x": x} | ({} if residual is None else {"residual": residual})
    with triton_gn.plan_override(strategy=strategy), triton_gn.backend("triton"):
        with Traffic(**operands) as forward:
            y = triton_gn.group_norm(x, 2, case.weight, case.bias, activation=activation, **extras)
        with Traffic(dy=case.dy, y=y, **operands) as backward:
            grads = torch.autograd.grad(y, list(operands.values()), case.dy)
        explained = [
            triton_gn.explain(
                x, 2, direction=direction, activation=activation, pre_add="pre_add" in fused,
                residual="residual" in fused and (direction == "forward" or activation != "none"),
            )
            for direction in ("forward", "backward")
        ]  # fmt: skip
    size = x.nbytes
    assert forward.loaded["x"] == passes * size
    assert forward.stored["other"] == size + 4 * numbers_of(explained[0])
    assert backward.loaded["x"] == backward.loaded["dy"] == passes * size
    assert backward.loaded["y"] == 0
    activated_residual = residual is not None and activation != "none"
    assert backward.stored["other"] == size * (1 + activated_residual) + 4 * numbers_of(
        explained[1]
    )
    if residual is not None:
        assert forward.loaded["residual"] == size
        assert backward.loaded["residual"] == (passes * size if activated_residual else 0)
        assert activated_residual or grads[1].data_ptr() == case.dy.data_ptr()


def test_what_is_per_channel_moves_little(memory: GuardedMemory, device: str) -> None:
    """Besides the tensors, a step with everything loads and stores less than a tenth of one."""
    fused = ("scale", "shift", "pre_add", "residual")
    case = make_case(memory, device, (2, 16, 32, 32), 2, activation="silu", fused=fused)
    extras = {name: getattr(case, name).requires_grad_() for name in fused}
    leaves = [case.x.requires_grad_(), case.weight.requires_grad_(), case.bias.requires_grad_()]
    tensors = {"x": case.x, "residual": case.residual, "dy": case.dy}
    with triton_gn.backend("triton"), Traffic(**tensors) as traffic:
        y = triton_gn.group_norm(case.x, 2, case.weight, case.bias, activation="silu", **extras)
        torch.autograd.grad(y, [*leaves, *extras.values()], case.dy)
    size = case.x.nbytes
    assert traffic.loaded["other"] < 0.1 * size
    assert 3 * size <= traffic.stored["other"] < 3.1 * size  # y, dx, dresidual


@pytest.mark.parametrize("strategy", ["resident", "pipelined", "split"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize(("activation", "fused"), [("none", ()), ("silu", FUSED)], ids=["", "all"])
def test_inspect_states_the_bytes_that_are_moved(
    activation: str, fused: tuple[str, ...], layout_name: str, direction: str, strategy: str
) -> None:
    workload = Workload(
        "", 2, 24, 3, (12, 16), "float32", layout=layout_name, activation=activation, fused=fused
    )
    problem = workload.problem(direction)
    config = plan(problem, Device(), override=(("strategy", strategy),))
    operands = workload.kernel_operands(workload.operands("cpu"), direction)
    stats = launches.statistics(operands.x, 2, 3, 3).zero_()
    call = Call(3, 1e-5, activation, operands.x.dtype, Settings())
    with Traffic() as counted:
        if direction == "forward":
            y = layout.empty_like(operands.x)
            launcher.forward(operands, call, y, stats, config=config)
        else:
            grads = autograd.empty_gradients(operands, [t is not None for t in operands])
            dy = layout.empty_like(operands.x).zero_()
            launcher.backward(operands, call, dy, stats, grads, config=config)
    moved = counted.loaded["other"] + counted.stored["other"]
    _, described = inspection.launches_of(workload, problem, config)
    stated = inspection.bytes_moved(described, problem, config)
    assert moved == pytest.approx(stated, rel=0.02)
