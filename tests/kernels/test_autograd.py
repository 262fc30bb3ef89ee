"""Gradients of the kernels under autograd."""

import threading

import pytest
import torch

import triton_gn
from tests.support.activations import ACTIVATIONS
from tests.support.memory import GuardedMemory
from tests.support.oracle import check, make_case
from triton_gn.ops import autograd, launcher, settings
from triton_gn.ops.call import Call


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(device: str, activation: str) -> None:
    index = list(ACTIVATIONS).index(activation)
    channels_last, strategy = index % 2 == 1, ("resident", "pipelined", "split")[index // 2 % 3]
    random = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    x, residual = draw(1, 4, 3, 1), draw(1, 4, 3, 1)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    tensors = (x, draw(4), draw(4), draw(1, 4), draw(4), draw(4), residual)
    operands = tuple(t.to(device).requires_grad_() for t in tensors)

    def group_norm(*operands: torch.Tensor) -> torch.Tensor:
        x, weight, bias, scale, shift, pre_add, residual = operands
        with triton_gn.backend("triton"), triton_gn.plan_override(strategy=strategy):
            return triton_gn.group_norm(
                x, 2, weight, bias, activation=activation, scale=scale, shift=shift,
                pre_add=pre_add, residual=residual,
            )  # fmt: skip

    assert torch.autograd.gradcheck(group_norm, operands, fast_mode=True)
    if activation in (
        "none",
        "silu",
    ):  # the formulas are the same on every path: api/test_fused
        assert torch.autograd.gradgradcheck(group_norm, operands, fast_mode=True)


@pytest.mark.parametrize("strategy", ["resident", "pipelined", "split"])
@pytest.mark.parametrize("needs", range(1, 8))
def test_any_subset_of_gradients(
    memory: GuardedMemory, device: str, strategy: str, needs: int
) -> None:
    case = make_case(memory, device, (2, 6, 5, 3), 3)
    names = ("dx", "dweight", "dbias")
    operands = dict(zip(names, (case.x, case.weight, case.bias), strict=True))
    asked = [name for bit, name in enumerate(names) if needs >> bit & 1]
    for name in asked:
        operands[name].requires_grad_()
    with triton_gn.plan_override(strategy=strategy), triton_gn.backend("triton"):
        y = triton_gn.group_norm(case.x, 3, case.weight, case.bias)
    y.backward(case.dy)
    expected = case.expected()
    check({name: operands[name].grad for name in asked}, {name: expected[name] for name in asked})
    assert all(t.grad is None for name, t in operands.items() if name not in asked)


def test_change_in_place_of_a_saved_input_raises(memory: GuardedMemory, device: str) -> None:
    case = make_case(memory, device, (2, 6, 5, 3), 3)
    leaf = case.x.requires_grad_()
    for change in ("input", "weight"):
        x, weight = leaf * 1, case.weight.clone()
        with triton_gn.backend("triton"):
            y = triton_gn.group_norm(x, 3, weight, case.bias)
        (x if change == "input" else weight).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(case.dy)


def test_settings_of_the_forward_hold_in_the_backward(memory: GuardedMemory, device: str) -> None:
    """Backward runs in another thread, or after the ``with`` block has been left."""
    case = make_case(memory, device, (2, 6, 5, 3), 3)
    with launcher.recording() as calls:
        with triton_gn.plan_override(strategy="split"), triton_gn.backend("triton"):
            y = triton_gn.group_norm(case.x.requires_grad_(), 3)
        thread = threading.Thread(target=y.backward, args=(case.dy,))
        thread.start()
        thread.join()
    seen = [(call.problem.direction, call.config.strategy) for call in calls]
    assert seen == [("forward", "split"), ("backward", "split")]


@pytest.mark.parametrize("strategy", ["resident", "pipelined", "split"])
def test_y_in_float32_from_a_16_bit_input(
    memory: GuardedMemory, device: str, strategy: str
) -> None:
    """Autocast asks for this: no copy of the input in float32."""
    case = make_case(memory, device, (2, 6, 5, 3), 3, dtype=torch.bfloat16)
    options = settings.Settings(plan_override=(("strategy", strategy),))
    x = case.x.requires_grad_()
    call = Call(3, 1e-5, "none", torch.float32, options)
    y = autograd.GroupNormFunction.apply(*case.operands, call)
    (dx,) = torch.autograd.grad(y, x, case.dy.float())
    assert y.dtype is torch.float32
    assert dx.dtype is torch.bfloat16
    expected = case.expected()
    check({"y": y.detach(), "dx": dx}, {name: expected[name] for name in ("y", "dx")})


def test_empty_inputs_reach_no_kernel(device: str) -> None:
    weight = torch.ones(6, device=device, requires_grad=True)
    for shape in ((0, 6, 4), (2, 6, 0)):
        x = torch.randn(shape, device=device, requires_grad=True)
        with triton_gn.backend("triton"):
            y = triton_gn.group_norm(x, 3, weight)
        dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
        assert dx.shape == shape
        assert torch.equal(dweight, torch.zeros_like(weight))
