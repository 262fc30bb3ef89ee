"""Operands of any strides through the kernels: each is read where its values lie."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn

import triton_gn
from tests.support import strides
from tests.support.memory import GuardedMemory
from triton_gn.ops import autograd, launcher, launches
from triton_gn.reference import Operands


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # an example takes half a second: shrinking one would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(problem=strides.problems())
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")
def test_strides_of_no_operand_matter(memory: GuardedMemory, problem: strides.Problem) -> None:
    with triton_gn.backend("triton"):
        strides.check(problem)


PER_CHANNEL: dict[str, Callable[[Tensor], Tensor]] = {
    "column": lambda t: t[:, 0],
    "every other one": lambda t: t.flatten()[::2],
    "reversed twice": lambda t: t.flip(0)[:, 0],
    "one value": lambda t: t[0, :1].expand(6),
    "of a transpose": lambda t: t.t().contiguous().t()[:, 0],
    "parameter that is a view": lambda t: nn.Parameter(t[:, 1]),
}


@pytest.mark.parametrize("view", PER_CHANNEL.values(), ids=list(PER_CHANNEL))
@pytest.mark.parametrize("name", ["weight", "bias", "scale", "shift", "pre_add"])
def test_operand_that_is_not_dense(name: str, view: Callable[[Tensor], Tensor]) -> None:
    for seed in (0, 1):
        random = torch.Generator().manual_seed(seed)
        x, p = torch.randn(2, 6, 3, 4, generator=random), torch.randn(6, 2, generator=random)
        with triton_gn.backend("triton"):
            y = triton_gn.group_norm(x, 2, **{name: view(p)})
            expected = triton_gn.group_norm(x, 2, **{name: view(p).clone().contiguous()})
        assert torch.equal(y, expected)


def test_scale_and_shift_unbound_of_their_last_dimension() -> None:
    x, both = torch.randn(2, 6, 3, 4), torch.randn(2, 12)
    scale, shift = both.view(2, 6, 2).unbind(-1)
    with triton_gn.backend("triton"):
        y = triton_gn.group_norm(x, 2, scale=scale, shift=shift)
    rows = (t[..., None, None] for t in (1 + scale, shift))
    torch.testing.assert_close(y, F.group_norm(x, 2) * next(rows) + next(rows))


def test_vmap_over_a_later_dimension_of_a_weight() -> None:
    x, weights = torch.randn(2, 6, 3, 4), torch.randn(6, 3)
    with triton_gn.backend("triton"):
        y = torch.func.vmap(lambda w: triton_gn.group_norm(x, 2, w), in_dims=1)(weights)
    expected = torch.stack([F.group_norm(x, 2, w) for w in weights.unbind(1)])
    torch.testing.assert_close(y, expected)


def test_statistics_and_apply_of_views() -> None:
    x, p = torch.randn(2, 6, 3, 4), torch.randn(6, 2)
    with triton_gn.backend("triton"):
        stats = triton_gn.group_norm_stats(x, 2, pre_add=p[:, 0])
        y = triton_gn.group_norm_apply(x, stats, p[:, 1], p[:, 0], pre_add=p[:, 0])
    shifted = x + p[:, 0, None, None]
    torch.testing.assert_close(y, F.group_norm(shifted, 2, p[:, 1], p[:, 0]))


def test_zeros_without_memory() -> None:
    """PyTorch's derivatives give such tensors."""
    x, zeros = torch.randn(2, 6, 3, 4), torch._efficientzerotensor((6,))
    with triton_gn.backend("triton"):
        assert torch.equal(triton_gn.group_norm(x, 2, bias=zeros), triton_gn.group_norm(x, 2))


def test_hooks_may_give_saved_tensors_other_strides_and_addresses() -> None:
    def moved(t: Tensor) -> Tensor:
        buffer = torch.zeros(t.numel() * 2 + 1, dtype=t.dtype)[1:]
        return buffer.as_strided(t.shape, [2 * s for s in t.contiguous().stride()]).copy_(t)

    x = torch.randn(2, 6, 3, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, dy = torch.randn(6, requires_grad=True), torch.randn(2, 6, 3, 4)
    with triton_gn.backend("triton"):
        expected = torch.autograd.grad(triton_gn.group_norm(x, 2, weight), (x, weight), dy)
        with torch.autograd.graph.saved_tensors_hooks(moved, lambda t: t):
            y = triton_gn.group_norm(x, 2, weight)
        torch.testing.assert_close(torch.autograd.grad(y, (x, weight), dy), expected)


def test_launches_take_only_dense_operands_and_declared_workspaces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Launches raise for a tensor that a repeated call could not bind."""
    launcher.forget()
    x, weight = torch.randn(2, 6, 3, 4), torch.randn(6, 2)[:, 0]
    with monkeypatch.context() as patch, triton_gn.backend("triton"):
        patch.setattr(autograd, "native", lambda operands: operands)
        with pytest.raises(RuntimeError, match="adjacent in memory"):
            triton_gn.group_norm(x, 2, weight)
    problem = launches.problem_of("forward", Operands(x), 2, "none")
    y = torch.empty_like(x)
    config = launcher._config(problem, x.device, False, (("strategy", "split"),), None)
    described = launches.forward_launches(problem, config, Operands(x), y, None, 1e-5)
    launcher.Prepared(problem, config, described, (x, y), x.device)
    with pytest.raises(RuntimeError, match="neither"):
        launcher.Prepared(problem, config, described, (x,), x.device)
