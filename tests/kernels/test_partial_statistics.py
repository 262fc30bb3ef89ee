"""Kernels of separate statistics and apply: against float64, tile by tile, and their bytes."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import triton_gn
from tests.support.memory import GuardedMemory
from tests.support.oracle import Case, check, make_case, ulp
from triton_gn import GroupNormStats, group_norm_apply, group_norm_stats
from triton_gn.ops import dispatch, launcher
from triton_gn.ops.settings import Settings
from triton_gn.ops.stats import split_settings
from triton_gn.reference import Moments, Operands

FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "innermost"])
ALL = ("scale", "shift", "pre_add", "residual")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((2, 12, 8, 8), (3, 10, 7, 7), (1, 12, 5, 3, 2), (2, 6, 9), (3, 8))
FUSED = ((), ("pre_add",), ("scale", "shift", "residual"), ALL)
CASES = [
    (dtype, SHAPES[(i + j) % 5], channels_last, fused, ("none", "silu")[(i + j // 2) % 2])
    for i, dtype in enumerate(DTYPES)
    for j, fused in enumerate(FUSED)
    for channels_last in (False, True)
]


def in_tiles(*sizes: int) -> Callable[..., Tensor]:
    """group_norm of tiles, put together again; of the whole without ``sizes``."""

    def group_norm(
        x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, **fused: object
    ) -> Tensor:
        residual, pre_add = fused.pop("residual", None), fused.get("pre_add")
        tiles = x.split(sizes, 2) if sizes else [x]
        residuals = [None] * len(tiles)
        if residual is not None:
            residuals = residual.split(sizes, 2) if sizes else [residual]
        parts = [group_norm_stats(tile, num_groups, pre_add) for tile in tiles]
        stats = GroupNormStats.merge(*parts)
        ys = [
            group_norm_apply(tile, stats, weight, bias, eps, residual=one, **fused)
            for tile, one in zip(tiles, residuals, strict=True)
        ]
        return torch.cat(ys, 2) if sizes else ys[0]

    return group_norm


def through_kernels(case: Case, *sizes: int) -> dict[str, Tensor]:
    with triton_gn.backend("triton"):
        return case.through(in_tiles(*sizes))


@pytest.mark.parametrize(
    ("dtype", "shape", "channels_last", "fused", "activation"),
    CASES,
    ids=lambda value: str(value).removeprefix("torch.").replace(" ", ""),
)
def test_matches_float64(
    memory: GuardedMemory,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    channels_last: bool,
    fused: tuple[str, ...],
    activation: str,
) -> None:
    case = make_case(
        memory, device, shape, 2, channels_last=channels_last, dtype=dtype, fused=fused,
        activation=activation,
    )  # fmt: skip
    results, expected = through_kernels(case), case.expected()
    assert results["y"].stride() == case.x.stride()
    for name in ("dx", "dpre_add"):
        if dtype.itemsize == 2 and name in results:
            # what comes by way of the statistics is a gradient of its own, rounded on its own
            value = expected.pop(name)
            error = (results[name].double() - value).abs().max()
            assert error <= 2 * ulp(value.abs().max(), dtype)
    check(results, expected)


@FORMATS
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e4, 0.1)])
def test_tiles_match_float64(
    memory: GuardedMemory, device: str, channels_last: bool, mean: float, std: float
) -> None:
    fused = () if mean else ALL  # a pre_add of size 1 would be the standard deviation
    case = make_case(
        memory, device, (2, 12, 9, 8), 3, channels_last=channels_last, fused=fused,
        activation="silu", mean=mean, std=std,
    )  # fmt: skip
    check(through_kernels(case, 1, 0, 6, 2), case.expected())


@FORMATS
def test_unequal_tiles_merge_to_the_whole(
    memory: GuardedMemory, device: str, channels_last: bool
) -> None:
    case = make_case(
        memory, device, (2, 6, 2100), 2, channels_last=channels_last, mean=1e4, std=0.1
    )
    with triton_gn.backend("triton"):
        parts = [group_norm_stats(tile, 2) for tile in case.x.split([1, 2000, 3, 96], 2)]
        found = [parts[0].merge(*parts[1:]), parts[3].merge(parts[1], parts[0], parts[2])]
        found.append(group_norm_stats(case.x, 2))
    groups = case.x.double().reshape(2, 2, -1)
    std, mean = torch.std_mean(groups, -1, correction=0)
    m2 = std.square() * groups.shape[-1]
    for one in found:
        assert (one.count == groups.shape[-1]).all()
        assert ((one.mean.double() + one.mean_lo.double() - mean).abs() <= 1e-6 * std).all()
        assert ((one.m2.double() - m2).abs() <= 1e-6 * m2).all()


@pytest.mark.parametrize("num_warps", [1, 8])
def test_follows_the_settings(memory: GuardedMemory, device: str, num_warps: int) -> None:
    case = make_case(memory, device, (2, 8, 200), 2)
    with triton_gn.plan_override(num_warps=num_warps), launcher.recording() as calls:
        check(through_kernels(case), case.expected())
    assert [one.config.strategy for one in calls] == ["split"] * 4
    assert {one.config.num_warps for one in calls} == {num_warps}


def test_an_override_of_another_strategy_is_not_for_split() -> None:
    override = (("blocks", 2), ("strategy", "pipelined"))
    split = split_settings(Settings(batch_invariant=True, plan_override=override))
    assert split == Settings(batch_invariant=True, plan_override=(("strategy", "split"),))


def test_only_what_is_asked_for(memory: GuardedMemory, device: str) -> None:
    """Each gradient on its own: statistics alone, parameters alone, x alone."""
    case = make_case(memory, device, (2, 6, 40), 2, fused=("pre_add",), activation="silu")
    case.pre_add.requires_grad_()
    with triton_gn.backend("triton"):
        stats = group_norm_stats(case.x, 2, case.pre_add)
        leaves = [field.detach().requires_grad_() for field in (stats.mean, stats.m2)]
        given = stats._replace(mean=leaves[0], m2=leaves[1])
        leaves += [case.x.requires_grad_(), case.weight.requires_grad_(), case.pre_add]
        grads = []
        for leaf in leaves:
            for one in leaves:
                one.requires_grad_(one is leaf)
            y = group_norm_apply(
                case.x, given, case.weight, activation="silu", pre_add=case.pre_add
            )
            grads += torch.autograd.grad(y, leaf, case.dy)
        (dpre_add,) = torch.autograd.grad(stats.m2.sum(), case.pre_add)
    for leaf in leaves:
        leaf.requires_grad_()
    with triton_gn.backend("torch"):
        y = group_norm_apply(case.x, given, case.weight, activation="silu", pre_add=case.pre_add)
        stats = group_norm_stats(case.x, 2, case.pre_add)
    torch.testing.assert_close(grads, list(torch.autograd.grad(y, leaves, case.dy)))
    torch.testing.assert_close(dpre_add, *torch.autograd.grad(stats.m2.sum(), case.pre_add))


def test_double_backward(memory: GuardedMemory, device: str) -> None:
    """Double backward of the kernels equals that of the formulas, which gradcheck has verified."""
    case = make_case(
        memory, device, (2, 6, 5), 2, dtype=torch.float64, fused=ALL, activation="silu"
    )
    leaves = [t.requires_grad_() for t in case.operands]
    fused = {name: getattr(case, name) for name in ALL}

    def second(backend: str) -> tuple[Tensor, ...]:
        with triton_gn.backend(backend):
            y = in_tiles(2, 3)(case.x, 2, case.weight, case.bias, 1e-5, activation="silu", **fused)
            grads = torch.autograd.grad(y, leaves, case.dy, create_graph=True)
            return torch.autograd.grad(sum(one.square().sum() for one in grads), leaves)

    torch.testing.assert_close(second("triton"), second("torch"))


def test_nothing_to_normalise_by_is_nan(memory: GuardedMemory, device: str) -> None:
    """Where counts are not checked, as on a GPU, NaN is better than a number."""
    case = make_case(memory, device, (2, 4, 8), 2)
    with triton_gn.backend("triton"):
        stats = group_norm_stats(case.x, 2)
        for field in stats:
            field[1] = 0
        y = dispatch.group_norm_apply(Operands(case.x), Moments(*stats), 1e-5, "none")
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the interpreter")
@FORMATS
@pytest.mark.parametrize("shape", [(2, 20, 8, 8), (2, 16, 7, 7), (3, 12)], ids=str)
def test_bytes(
    memory: GuardedMemory, device: str, shape: tuple[int, ...], channels_last: bool
) -> None:
    """Statistics read x once and store four numbers for each part of a group; apply reads x once
    and stores y once. Backward: apply as group_norm by split; statistics read x and store dx."""
    from tests.support.interpreter import Traffic

    case = make_case(memory, device, shape, 2, channels_last=channels_last, dtype=torch.bfloat16)
    x, groups = case.x.requires_grad_(), 2 * shape[0]
    with triton_gn.backend("triton"), launcher.recording() as calls:
        with Traffic(x=x) as taken:
            stats = group_norm_stats(x, 2)
        given = stats._replace(m2=stats.m2.detach().requires_grad_(), mean=stats.mean.detach())
        with Traffic(x=x) as applied:
            y = group_norm_apply(x, given, case.weight)
        with Traffic(x=x, dy=case.dy) as apply_backward:
            torch.autograd.grad(y, (x, given.m2), case.dy)
        with Traffic(x=x) as stats_backward:
            torch.autograd.grad(stats.m2.sum(), x)
    num_partials = [one.config.num_partials for one in calls]
    assert [one.loaded["x"] for one in (taken, applied)] == [x.nbytes] * 2
    assert taken.stored["other"] == 4 * 4 * groups * (num_partials[0] + 1)  # merged: one part more
    assert applied.stored["other"] == y.nbytes + 4 * 3 * groups  # and what backward needs
    assert apply_backward.loaded["x"] == apply_backward.loaded["dy"] == 2 * x.nbytes
    assert apply_backward.stored["other"] == x.nbytes + 4 * 2 * groups * num_partials[2]
    assert stats_backward.loaded["x"] == x.nbytes
    assert stats_backward.stored["other"] == x.nbytes
    with triton_gn.backend("triton"), torch.no_grad(), Traffic(x=x) as applied:
        y = group_norm_apply(x, stats, case.weight)
    assert applied.stored["other"] == y.nbytes
