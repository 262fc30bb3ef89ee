"""Statistics apart from apply on the CPU: against float64, group_norm and numerical gradients."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_gn
from tests.support.pairs import each_pair
from tests.support.tensors import channels_innermost, random
from triton_gn import GroupNormStats, group_norm_apply, group_norm_stats, reference
from triton_gn.reference import Operands

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((3, 12), (2, 12, 7), (2, 12, 5, 4), (2, 12, 3, 2, 3))
FUSED = ((), ("pre_add",), ("scale", "shift"), ("scale", "shift", "pre_add", "residual"))
GROUPS = 3


def make_operands(
    shape: tuple[int, ...], fused: Iterable[str] = (), dtype: torch.dtype = torch.float64
) -> Operands:
    n, channels = shape[:2]
    sizes = {
        "weight": (channels,),
        "bias": (channels,),
        "scale": (n, channels),
        "shift": (1, channels),
        "pre_add": (n, channels),
        "residual": shape,
    }
    values = {
        name: random(*size, seed=seed).to(dtype)
        for seed, (name, size) in enumerate(sizes.items(), start=1)
        if name in ("weight", "bias", *fused)
    }
    return Operands((random(*shape) + 0.5).to(dtype), **values)


def tiled(*tensors: Tensor | None, sizes: tuple[int, ...], activation: str = "silu") -> Tensor:
    """Normalise tiles of a dimension beyond the channels, and put them together again."""
    x, weight, bias, scale, shift, pre_add, residual = tensors
    assert x is not None
    tiles = x.split(sizes, 2)
    residuals = [None] * len(tiles) if residual is None else residual.split(sizes, 2)
    parts = [group_norm_stats(tile, GROUPS, pre_add) for tile in tiles]
    stats = parts[0].merge(*parts[1:])
    fused: Any = {"scale": scale, "shift": shift, "pre_add": pre_add, "activation": activation}
    normalised = [
        group_norm_apply(tile, stats, weight, bias, residual=added, **fused)
        for tile, added in zip(tiles, residuals, strict=True)
    ]
    return torch.cat(normalised, 2)


def of_float64(x: Tensor, num_groups: int = GROUPS) -> tuple[Tensor, Tensor]:
    """Mean and m2."""
    groups = x.double().reshape(x.shape[0], num_groups, -1)
    mean = groups.mean(-1)
    return mean, (groups - mean[..., None]).square().sum(-1)


def assert_exact(stats: GroupNormStats, x: Tensor, bound: float = 1e-6) -> None:
    """Mean within ``bound`` of the standard deviation, m2 within ``bound`` of itself."""
    mean, m2 = of_float64(x, stats.mean.shape[1])
    assert (stats.count == x[0].numel() // stats.mean.shape[1]).all()
    std = (m2 / stats.count).sqrt()
    merged_mean = stats.mean.double() + stats.mean_lo.double()
    assert ((merged_mean - mean).abs() <= bound * std).all()
    assert ((stats.m2.double() - m2).abs() <= bound * m2).all()


# Both halves together


@each_pair("dtype shape fused channels_last", DTYPES, SHAPES, FUSED, (False, True))
def test_together_they_are_group_norm(
    dtype: torch.dtype, shape: tuple[int, ...], fused: tuple[str, ...], channels_last: bool
) -> None:
    operands = make_operands(shape, fused, dtype)
    if channels_last:
        operands = operands._replace(x=channels_innermost(operands.x))
    x, weight, bias, *_ = operands
    fused_operands = {name: getattr(operands, name) for name in fused}
    stats = group_norm_stats(x, GROUPS, operands.pre_add)
    y = group_norm_apply(x, stats, weight, bias, activation="gelu", **fused_operands)
    assert [tuple(t.shape) for t in stats] == [(shape[0], GROUPS)] * 4
    assert stats.count.dtype is torch.int64
    assert {t.dtype for t in stats[1:]} == {reference.compute_dtype(x)}
    assert y.dtype is dtype
    assert y.stride() == x.stride()
    exact = Operands._make(None if t is None else t.double() for t in operands)
    expected = reference.group_norm(exact, GROUPS, 1e-5, "gelu")
    rounding = 1e-14 if dtype is torch.float64 else 1e-6
    bound = rounding * expected.abs().max() + 0.51 * torch.finfo(dtype).eps * expected.abs()
    assert ((y.double() - expected).abs() <= bound).all()


def test_float32_parameters_of_a_16_bit_input() -> None:
    operands = make_operands((2, 12, 5), ("pre_add",), torch.float32)
    x = operands.x.bfloat16()
    stats = group_norm_stats(x, GROUPS, operands.pre_add)
    y = group_norm_apply(x, stats, operands.weight, operands.bias, pre_add=operands.pre_add)
    expected = triton_gn.group_norm(
        x, GROUPS, operands.weight, operands.bias, pre_add=operands.pre_add
    )
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 6), (2, 6, 1, 1)], ids=str)
def test_pre_add_of_any_shape(shape: tuple[int, ...]) -> None:
    x, pre_add = random(2, 6, 4, 5), random(*shape, seed=1)
    stats = group_norm_stats(x, 2, pre_add)
    y = group_norm_apply(x, stats, pre_add=pre_add)
    torch.testing.assert_close(y, triton_gn.group_norm(x, 2, pre_add=pre_add))


def test_a_tile_may_have_one_value_per_group() -> None:
    x = random(1, 3, 2)
    left, right = (group_norm_stats(tile, 3) for tile in x.split(1, 2))
    assert (left.m2 == 0).all()
    y = group_norm_apply(x, left.merge(right))
    torch.testing.assert_close(y, triton_gn.group_norm(x, 3))


# Merging


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (1e4, 0.1), (-3e6, 1)])
def test_unequal_tiles_merge_to_the_whole(mean: float, std: float) -> None:
    x = (random(2, 6, 4000) * std + mean).float()
    sizes = [1, 2, 3, 1000, 5, 0, 700, 1, 2000, 288]
    tiles = [group_norm_stats(tile, 3) for tile in x.split(sizes, 2)]
    assert_exact(tiles[0].merge(*tiles[1:]), x)
    assert_exact(tiles[-1].merge(*reversed(tiles[:-1])), x)
    total = None  # in a stream
    for tile in tiles:
        total = tile if total is None else total.merge(tile)
    assert total is not None
    assert_exact(total, x)


@pytest.mark.parametrize("parts", [*itertools.permutations(range(4))], ids=str)
def test_the_order_does_not_matter(parts: tuple[int, ...]) -> None:
    """A part far from all others is no worse as the reference of the merge than another."""
    x = random(1, 4, 600)
    x[..., :2] += 1e5
    sizes = (2, 98, 0, 500)
    tiles = [group_norm_stats(tile.float(), 2) for tile in x.split(sizes, 2)]
    first, *others = (tiles[i] for i in parts)
    assert_exact(first.merge(*others), x.float())


def test_many_parts_merge_at_once_and_without_drift() -> None:
    x = random(1, 2, 5000).float()
    tiles = [group_norm_stats(tile, 1) for tile in x.split(1, 2)]
    assert_exact(tiles[0].merge(*tiles[1:]), x, bound=2e-7)


def test_mean_0_beside_mean_2() -> None:
    parts = [torch.zeros(1, 2, 50), torch.full((1, 2, 50), 2.0)]
    stats = GroupNormStats.merge(*(group_norm_stats(part, 1) for part in parts))
    assert [float(field) for field in stats] == [200, 1, 0, 200]


def test_merging_nothing_is_the_part_itself() -> None:
    stats = group_norm_stats(random(2, 6, 5), 3)
    assert stats.merge() is stats


def test_what_an_empty_part_holds_does_not_matter() -> None:
    x = random(2, 6, 5)
    whole, empty = group_norm_stats(x, 3), group_norm_stats(x[..., :0], 3)
    assert all((field == 0).all() for field in empty)
    nothing = empty._replace(mean=torch.full_like(empty.mean, torch.nan), m2=empty.m2 + torch.inf)
    for part in (empty, nothing):
        for merged in (whole.merge(part), part.merge(whole), part.merge(part, whole, part)):
            torch.testing.assert_close(merged, whole, rtol=1e-15, atol=1e-15)
    assert (empty.merge(empty).count == 0).all()


def test_a_nan_stays_in_its_group() -> None:
    x = random(1, 4, 6)
    whole = group_norm_stats(x, 2)
    x[0, 0, 0] = torch.nan
    stats = GroupNormStats.merge(*(group_norm_stats(tile, 2) for tile in x.split(2, 2)))
    assert stats.mean[0, 0].isnan()
    assert stats.m2[0, 0].isnan()
    torch.testing.assert_close(stats.m2[0, 1], whole.m2[0, 1])


def test_a_constant_group_has_no_negative_m2() -> None:
    stats = group_norm_stats(torch.full((1, 2, 999), 0.1), 1)
    assert (stats.m2 >= 0).all()


# Gradients


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("fused", FUSED, ids=str)
def test_gradients_of_tiles_are_those_of_the_whole(fused: tuple[str, ...], activation: str) -> None:
    operands = make_operands((2, 6, 6, 3), fused)
    leaves = [t.requires_grad_() for t in operands if t is not None]
    dy = random(2, 6, 6, 3, seed=9)
    y = tiled(*operands, sizes=(1, 0, 3, 2), activation=activation)
    expected = reference.group_norm(operands, GROUPS, 1e-5, activation)
    grads, expected_grads = (torch.autograd.grad(output, leaves, dy) for output in (y, expected))
    torch.testing.assert_close(grads, expected_grads)


def test_gradients_of_a_large_mean() -> None:
    x = (random(2, 6, 300) * 0.1 + 1e4).float()
    dy = random(2, 6, 300, seed=1)

    def dx_of(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(norm(x), x, dy.to(x.dtype))
        return dx

    expected = dx_of(lambda x: reference.group_norm(Operands(x), GROUPS, 1e-5, "silu"), x.double())
    dx = dx_of(lambda x: tiled(x, *[None] * 6, sizes=(7, 200, 93)), x)
    assert (dx - expected).abs().max() < 1e-6 * expected.abs().max()


def test_numerical_gradients() -> None:
    fused = ("scale", "shift", "pre_add", "residual")
    operands = [t.requires_grad_() for t in make_operands((1, 3, 3), fused) if t is not None]

    def through(*tensors: Tensor) -> Tensor:
        return tiled(*tensors, sizes=(1, 2))

    assert torch.autograd.gradcheck(through, operands)
    assert torch.autograd.gradgradcheck(through, operands)


def test_numerical_gradients_of_statistics() -> None:
    """Check the gradients of mean and m2 by each part alone."""
    parts = [random(2, 6, size, seed=size).requires_grad_() for size in (2, 0, 3)]
    pre_add = random(6, seed=1).requires_grad_()

    def merged(pre_add: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        first, *others = (group_norm_stats(part, GROUPS, pre_add) for part in parts)
        stats = first.merge(*others)
        return stats.mean, stats.m2

    assert torch.autograd.gradcheck(merged, (pre_add, *parts))
    assert torch.autograd.gradgradcheck(merged, (pre_add, *parts))


def test_mean_lo_and_count_have_no_gradient() -> None:
    x = random(2, 6, 5).requires_grad_()
    stats = group_norm_stats(x, 3)
    for part in (stats, stats.merge(stats)):
        assert [field.requires_grad for field in part] == [False, True, False, True]


# Empty inputs


@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 6, 0), (2, 0, 4), (2, 6, 0, 3)], ids=str)
def test_an_empty_input(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    weight, pre_add = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1])
    stats = group_norm_stats(x, 3, pre_add)
    assert [tuple(field.shape) for field in stats] == [(shape[0], 3)] * 4
    y = group_norm_apply(x, stats, weight, pre_add=pre_add)
    assert y.shape == x.shape
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == x.shape
    assert (dweight == 0).all()


def test_an_empty_shard_of_something() -> None:
    x = random(2, 6, 5)
    pre_add = random(2, 6, seed=1).requires_grad_()
    stats = group_norm_stats(x[..., :0], 3, pre_add).merge(group_norm_stats(x, 3, pre_add))
    y = group_norm_apply(x[..., :0], stats, pre_add=pre_add)
    assert y.shape == (2, 6, 0)
    (dpre_add,) = torch.autograd.grad(y.sum(), pre_add)
    assert (dpre_add == 0).all()


# Errors


def stats_of(**changes: Any) -> GroupNormStats:
    return group_norm_stats(torch.ones(2, 6, 5), 3)._replace(**changes)


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        (
            group_norm_stats(torch.ones(1, 6, 5), 3),
            r"count must have shape \(2, num_groups\), .*; got \(1, 3\)",
        ),
        (group_norm_stats(torch.ones(2, 8, 5), 4), r"divisor of the 6 channels; got \(2, 4\)"),
        (stats_of(m2=torch.ones(2, 2)), r"stats.m2 must have shape .*; got \(2, 2\)"),
        (stats_of(mean=torch.ones(2)), r"stats.mean must have shape .*; got \(2,\)"),
        (
            stats_of(count=torch.ones(2, 3)),
            "stats.count must be torch.int64 .*; got .* of torch.float32",
        ),
        (
            group_norm_stats(torch.ones(2, 6, 5).double(), 3),
            "stats.mean must be torch.float32 .* of torch.float64",
        ),
        (
            group_norm_stats(torch.ones(2, 6, 5, device="meta"), 3),
            "int64 on cpu .*; got .* on meta",
        ),
        (group_norm_stats(torch.ones(2, 6, 0), 3), "must have a count above 0; got counts"),
    ],
    ids=["N", "G", "shapes", "rank", "count", "dtype", "device", "nothing"],
)
def test_stats_that_do_not_fit(stats: GroupNormStats, message: str) -> None:
    with pytest.raises(ValueError, match=f"group_norm_apply: .*{message}"):
        group_norm_apply(torch.ones(2, 6, 5), stats)


def test_float64_input_needs_float64_stats() -> None:
    with pytest.raises(ValueError, match=r"must be torch.float64 on cpu for this torch.float64"):
        group_norm_apply(torch.ones(2, 6, 5).double(), stats_of())


def test_stats_that_are_none() -> None:
    with pytest.raises(TypeError, match="stats must be a GroupNormStats; got tuple"):
        group_norm_apply(torch.ones(2, 6, 5), tuple(stats_of()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="each part must be a GroupNormStats; got int"):
        stats_of().merge(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "other",
    [
        group_norm_stats(torch.ones(2, 6, 5), 2),
        group_norm_stats(torch.ones(1, 6, 5), 3),
        group_norm_stats(torch.ones(2, 6, 5).double(), 3),
        group_norm_stats(torch.ones(2, 6, 5, device="meta"), 3),
    ],
    ids=["G", "N", "dtype", "device"],
)
def test_parts_that_do_not_merge(other: GroupNormStats) -> None:
    with pytest.raises(ValueError, match=r"merge: the parts must have the same .*; got .* and "):
        stats_of().merge(other)


def test_operands_are_checked_as_those_of_group_norm() -> None:
    x = torch.ones(2, 6, 5)
    with pytest.raises(ValueError, match=r"6 channels cannot be split into 4 groups"):
        group_norm_stats(x, 4)
    with pytest.raises(ValueError, match=r"pre_add must have shape \(6,\), .*; got \(5,\)"):
        group_norm_stats(x, 3, torch.ones(5))
    with pytest.raises(TypeError, match=r"input must be float16, .*; got torch.int64"):
        group_norm_stats(x.long(), 3)
    with pytest.raises(ValueError, match=r"weight must have shape \(6,\)"):
        group_norm_apply(x, stats_of(), torch.ones(3))
    with pytest.raises(ValueError, match="activation must be one of"):
        group_norm_apply(x, stats_of(), activation="softmax")


# Compilers and transforms


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic: bool) -> None:
    operands = make_operands((2, 6, 6, 3))
    x = operands.x.requires_grad_()

    def step(x: Tensor) -> Tensor:
        return tiled(x, *operands[1:], sizes=(2, 4))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    results = [torch.autograd.grad(norm(x).square().sum(), x) for norm in (compiled, step)]
    torch.testing.assert_close(*results)
    torch.compiler.reset()


# PyTorch's own use of torch.jit.script
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_vmap_and_jvp() -> None:
    x, tangent = random(3, 2, 6, 6), random(2, 6, 6, seed=1)

    def step(x: Tensor) -> Tensor:
        return tiled(x, *[None] * 6, sizes=(2, 4))

    def whole(x: Tensor) -> Tensor:
        return reference.group_norm(Operands(x), GROUPS, 1e-5, "silu")

    torch.testing.assert_close(torch.func.vmap(step)(x), torch.stack([*map(whole, x)]))
    results, expected = (torch.func.jvp(norm, (x[0],), (tangent,)) for norm in (step, whole))
    torch.testing.assert_close(results, expected)
