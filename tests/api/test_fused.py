"""Tests of the operands that group_norm fuses with the normalisation, on the CPU."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.activations import ACTIVATIONS
from tests.support.calls import (
    DTYPES,
    FUSED,
    LAYOUTS,
    OPERANDS,
    PER_SAMPLE,
    SHAPE,
    SUBSETS,
    composed,
    each_layout,
    fused,
    in_float64,
    lay,
    make_operands,
    short,
    step,
)
from tests.support.pairs import each_pair, pairwise
from tests.support.tensors import random

each_per_sample = pytest.mark.parametrize("name", PER_SAMPLE)


def roundings(result: Tensor, expected: Tensor) -> float:
    """The largest error in units of the last place, beyond float32's errors of the largest value.

    Nothing in a 16-bit format is nearer than half a unit.
    """
    info = torch.finfo(result.dtype)
    _, exponent = torch.frexp(expected)
    unit = torch.exp2(exponent.double() - 1).clamp(min=info.smallest_normal) * info.eps
    error = (result.double() - expected).abs() - 2e-6 * expected.abs().max()
    return float((error / unit).max())


def worst(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).abs().max())


# Values and gradients


@each_pair("activation names channels_last dtype", tuple(ACTIVATIONS), SUBSETS, LAYOUTS, DTYPES)
def test_as_exact_as_the_operations_one_by_one(
    activation: str, names: tuple[str, ...], channels_last: bool, dtype: torch.dtype
) -> None:
    operands = make_operands(names, channels_last, dtype)
    dy = lay(random(*SHAPE, seed=7).to(dtype), not channels_last)
    ours = step(fused, activation, operands, dy)
    theirs = step(composed, activation, operands, dy)
    expected = in_float64(activation, operands, dy)
    assert ours["y"].stride() == operands["input"].stride()
    for name, value in expected.items():
        assert ours[name].dtype is dtype
        assert ours[name].shape == value.shape
        if torch.finfo(dtype).bits == 16 and not names:
            # PyTorch's own two operations: one in float32 took twice their time
            assert torch.equal(ours[name], theirs[name]), name
        elif torch.finfo(dtype).bits == 16:
            # the arithmetic is float32 and rounds once
            assert roundings(ours[name], value) <= 0.51, name
        else:
            largest = float(value.abs().max())
            rounding = 1e-7 if dtype is torch.float32 else 1e-15
            limit = 1.5 * worst(theirs[name], value) + rounding * largest
            assert worst(ours[name], value) <= limit, name


@each_pair("activation names channels_last dtype", tuple(ACTIVATIONS), SUBSETS, LAYOUTS, DTYPES[:2])
def test_16_bits_round_less_than_the_operations_one_by_one(
    activation: str, names: tuple[str, ...], channels_last: bool, dtype: torch.dtype
) -> None:
    operands = make_operands(names, channels_last, dtype)
    expected = in_float64(activation, operands, operands["input"])["y"]
    ours, theirs = (group_norm(activation, operands) for group_norm in (fused, composed))
    # n is rounded once; of a rounded n, relu needs no rounding
    activated = ACTIVATIONS[activation](composed("none", operands).double())
    rounds_again = bool(names) or not torch.equal(activated.to(dtype).double(), activated)
    assert (roundings(theirs, expected) > 0.51) is rounds_again
    assert float((ours.double() - expected).norm()) <= float((theirs.double() - expected).norm())


@each_layout
def test_no_activation_has_a_name(channels_last: bool) -> None:
    operands = make_operands(channels_last=channels_last)
    assert torch.equal(fused("none", operands), fused(None, operands))
    assert torch.equal(fused("none", make_operands(())), fused(None, make_operands(())))


def trailing_ones(rank: int) -> list[tuple[int, ...]]:
    """The shapes that a scale may have for an input of this rank and two samples."""
    rows = [(samples, 6, *[1] * ones) for samples in (1, 2) for ones in range(rank - 1)]
    return [(6,), *rows]


@each_pair(
    "name rank_and_shape channels_last",
    PER_SAMPLE,
    [(rank, shape) for rank in (2, 3, 4, 5) for shape in trailing_ones(rank)],
    LAYOUTS,
)
def test_one_value_per_channel_takes_any_of_its_shapes(
    name: str, rank_and_shape: tuple[int, tuple[int, ...]], channels_last: bool
) -> None:
    rank, shape = rank_and_shape
    operands = make_operands((), channels_last, torch.float64, (2, 6, 5, 4, 3)[:rank])
    operands[name] = random(*shape, seed=8)
    dy = random(*operands["input"].shape, seed=7)
    results = step(fused, "silu", operands, dy)
    assert results["y"].stride() == operands["input"].stride()
    torch.testing.assert_close(results, in_float64("silu", operands, dy))


@each_per_sample
def test_square_operands_are_per_sample(name: str) -> None:
    """With as many samples as channels, the rows are samples."""
    operands = make_operands((), dtype=torch.float64, shape=(6, 6, 5))
    operands[name] = random(6, 6, 1, seed=8)
    torch.testing.assert_close(fused("silu", operands), composed("silu", operands))


DTYPE_MIXES = [
    {"input": torch.bfloat16, "scale": torch.float32, "residual": torch.float16},
    {"input": torch.float16, "weight": torch.float32, "shift": torch.bfloat16},
    {"input": torch.float32, "bias": torch.bfloat16, "scale": torch.float64},
    {"input": torch.float32, "pre_add": torch.float16, "residual": torch.float64},
    {"input": torch.float64, "weight": torch.float16, "residual": torch.float32},
    {"input": torch.bfloat16, "pre_add": torch.float64, "shift": torch.float16},
]


@each_layout
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("mix", DTYPE_MIXES, ids=lambda mix: "+".join(map(short, mix.values())))
def test_operands_mix_dtypes(
    mix: dict[str, torch.dtype], activation: str, channels_last: bool
) -> None:
    operands = {
        name: value.to(mix.get(name, torch.float32))
        for name, value in make_operands(channels_last=channels_last, dtype=torch.float64).items()
    }
    dy = random(*SHAPE, seed=7).to(mix["input"])
    results = step(fused, activation, operands, dy)
    expected = in_float64(activation, operands, dy)
    assert results["y"].dtype is mix["input"]
    for name, value in expected.items():
        result = results[name]
        if name != "y":
            assert (result.dtype, result.shape) == (operands[name].dtype, operands[name].shape)
        if torch.finfo(result.dtype).bits == 16:
            assert roundings(result, value) <= 0.51, name
        else:
            assert worst(result, value) <= 1e-6 * float(value.abs().max()), name


# a shape and the view of it that has the input's shape
RESIDUALS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "contiguous": ((2, 6, 5, 4), lambda x: x),
    "channels-last": ((2, 5, 4, 6), lambda x: x.permute(0, 3, 1, 2)),
    "pixels transposed": ((2, 6, 4, 5), lambda x: x.transpose(2, 3)),
    "samples and channels transposed": ((6, 2, 5, 4), lambda x: x.transpose(0, 1)),
    "every other column": ((2, 6, 5, 8), lambda x: x[..., ::2]),
    "expanded samples": ((1, 6, 5, 4), lambda x: x.expand(SHAPE)),
    "expanded channels": ((2, 1, 5, 4), lambda x: x.expand(SHAPE)),
    "expanded pixels": ((2, 6, 1, 1), lambda x: x.expand(SHAPE)),
    "one number": ((1, 1, 1, 1), lambda x: x.expand(SHAPE)),
}


@pytest.mark.parametrize(("shape", "view"), RESIDUALS.values(), ids=list(RESIDUALS))
@each_layout
def test_residual_has_any_strides(
    shape: tuple[int, ...], view: Callable[[Tensor], Tensor], channels_last: bool
) -> None:
    operands = make_operands((), channels_last, torch.float64)
    operands["residual"] = random(*shape, seed=6)

    def viewed(
        group_norm: Callable[..., Tensor],
        activation: str,
        operands: dict[str, Tensor],
        num_groups: int,
    ) -> Tensor:
        residual = {"residual": view(operands["residual"])}
        return group_norm(activation, operands | residual, num_groups)

    dy = random(*SHAPE, seed=7)
    ours, theirs = (
        step(partial(viewed, group_norm), "silu", operands, dy) for group_norm in (fused, composed)
    )
    assert ours["y"].stride() == operands["input"].stride()
    torch.testing.assert_close(ours, theirs)


@each_layout
@pytest.mark.parametrize("ones", [0, 2])
def test_scale_and_shift_can_be_halves_of_a_projection(channels_last: bool, ones: int) -> None:
    operands = make_operands((), channels_last, torch.float64)
    projected = random(2, 12, *[1] * ones, seed=8).requires_grad_()
    scale, shift = projected.chunk(2, dim=1)
    assert not scale.is_contiguous()
    ours, theirs = (
        group_norm("silu", operands | {"scale": scale, "shift": shift})
        for group_norm in (fused, composed)
    )
    torch.testing.assert_close(ours, theirs)
    dy = random(*SHAPE, seed=7)
    torch.testing.assert_close(
        torch.autograd.grad(ours, projected, dy), torch.autograd.grad(theirs, projected, dy)
    )


@pytest.mark.parametrize("view", [lambda x: x[..., ::2], lambda x: x.transpose(2, 3)])
def test_input_has_any_strides(view: Callable[[Tensor], Tensor]) -> None:
    operands = make_operands(dtype=torch.float64)
    operands["input"] = view(random(2, 6, 4, 8))[:, :, :, :4]
    operands["residual"] = random(*operands["input"].shape, seed=6)
    dy = random(*operands["input"].shape, seed=7)
    torch.testing.assert_close(step(fused, "mish", operands, dy), in_float64("mish", operands, dy))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=short)
def test_infinities_and_nans_are_those_of_the_operations_one_by_one(dtype: torch.dtype) -> None:
    """Compare in float32: PyTorch's gelu of infinity is NaN there, but not in 16 bits."""
    operands = make_operands(dtype=dtype)
    operands["residual"][0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    operands["input"][1, 0, 0, 0] = math.nan
    in_float32 = {name: operand.float() for name, operand in operands.items()}
    for activation in ACTIVATIONS:
        ours, theirs = fused(activation, operands), composed(activation, in_float32)
        assert torch.equal(ours.isnan(), theirs.isnan()), activation
        assert torch.equal(ours.isinf(), theirs.isinf()), activation


# Autograd


@each_pair(
    "name activation dtype channels_last",
    OPERANDS,
    ["none", "silu"],
    [torch.float16, torch.float32],
    LAYOUTS,
)
def test_each_operand_alone_gets_its_gradient(
    name: str, activation: str, dtype: torch.dtype, channels_last: bool
) -> None:
    """The operand that needs a gradient gets it, and the others get none."""
    operands = make_operands(channels_last=channels_last, dtype=dtype)
    operands[name].requires_grad_()
    y = fused(activation, operands)
    assert y.requires_grad
    dy = random(*SHAPE, seed=7).to(dtype)
    y.backward(dy)
    assert [other for other, operand in operands.items() if operand.grad is not None] == [name]
    grad = operands[name].grad
    assert grad is not None
    expected = in_float64(activation, operands, dy)[name]
    torch.testing.assert_close(grad.double(), expected, rtol=2e-3, atol=1e-5)


@each_pair("name activation channels_last", OPERANDS, ["none", "silu"], LAYOUTS)
def test_no_second_derivative_is_detached(name: str, activation: str, channels_last: bool) -> None:
    operands = make_operands(channels_last=channels_last, dtype=torch.float64)
    operands[name].requires_grad_()
    dy = random(*SHAPE, seed=7).requires_grad_()
    y = fused(activation, operands)
    (grad,) = torch.autograd.grad(y, operands[name], dy, create_graph=True)
    assert grad.requires_grad


def test_one_tensor_in_two_roles_gets_both_gradients() -> None:
    operands = make_operands(("scale",), dtype=torch.float64)
    x, weight = operands["input"].requires_grad_(), operands["weight"].requires_grad_()
    operands |= {"residual": x, "shift": weight}
    dy = random(*SHAPE, seed=7)
    ours, theirs = (
        torch.autograd.grad(group_norm("silu", operands), [x, weight], dy)
        for group_norm in (fused, composed)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("activation", "channels_last", "names"),
    [
        (activation, channels_last, tuple(itertools.compress(FUSED, chosen)))
        for activation, channels_last, *chosen in pairwise([*ACTIVATIONS], *[LAYOUTS] * 5)
    ],
    ids=short,
)
def test_derivatives_of_first_and_second_order(
    activation: str, channels_last: bool, names: tuple[str, ...]
) -> None:
    shape, groups = (2, 4, 2, 2), 2
    operands = make_operands(names, channels_last, torch.float64, shape)
    before = composed("none", operands, groups)
    # finite differences of 1e-6 must not step over the kink of relu
    assert float(before.abs().min()) > 1e-4
    leaves = [operand.requires_grad_() for operand in operands.values()]

    def y_of(*leaves: Tensor) -> Tensor:
        return fused(activation, dict(zip(operands, leaves, strict=True)), groups)

    assert torch.autograd.gradcheck(y_of, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(y_of, leaves, fast_mode=True)


# Properties


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Tensor], int]:
    """The operands of a call in float64, some of them missing, of any accepted shape and layout."""
    groups, group_channels = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    n, channels = draw(st.integers(1, 3)), groups * group_channels
    pixels = draw(st.lists(st.integers(1, 5), max_size=3))
    if n * group_channels * math.prod(pixels) == 1:
        n = 2
    shape = (n, channels, *pixels)
    seed = draw(st.integers(0, 2**31))
    operands = {"input": lay(random(*shape, seed=seed), draw(st.booleans()))}
    for name in draw(st.sets(st.sampled_from(["weight", "bias"]))):
        operands[name] = random(channels, seed=seed + len(name))
    for name in draw(st.sets(st.sampled_from(PER_SAMPLE))):
        row = (draw(st.sampled_from([1, n])), channels, *[1] * draw(st.integers(0, len(pixels))))
        operands[name] = random(*draw(st.sampled_from([(channels,), row])), seed=seed + len(name))
    if draw(st.booleans()):
        operands["residual"] = lay(random(*shape, seed=seed + 1), draw(st.booleans()))
    return operands, groups


# derandomize: the same examples in every run, so that a failure is a change's and not chance's
for_any_call = settings(max_examples=100, deadline=None, derandomize=True)


@for_any_call
@given(call=calls(), activation=st.sampled_from([None, *ACTIVATIONS]))
def test_any_call_is_the_operations_one_by_one(
    call: tuple[dict[str, Tensor], int], activation: str | None
) -> None:
    operands, groups = call
    x = operands["input"]
    dy = random(*x.shape, seed=7)
    ours = step(fused, activation, operands, dy, groups)
    # PyTorch's backward raises for a bias without a weight
    theirs = operands | {"weight": operands.get("weight", x.new_ones(x.shape[1]))}
    expected = in_float64(activation, theirs, dy, groups)
    # the stride of a size of 1 means nothing, and PyTorch's own group_norm does not keep it
    strides = zip(x.shape, ours["y"].stride(), x.stride(), strict=True)
    assert all(size == 1 or a == b for size, a, b in strides)
    # groups of a few values that happen to be near amplify the last place
    torch.testing.assert_close(ours, {name: expected[name] for name in ours}, rtol=1e-6, atol=1e-8)


@for_any_call
@given(call=calls(), activation=st.sampled_from([None, *ACTIVATIONS]))
def test_samples_do_not_see_each_other(
    call: tuple[dict[str, Tensor], int], activation: str | None
) -> None:
    operands, groups = call
    y = fused(activation, operands, groups)
    n = y.shape[0]
    if y.numel() // n == groups:
        return  # alone, a sample would have one value per group
    for sample in range(n):
        alone = {
            name: value[sample : sample + 1] if value.ndim > 1 and value.shape[0] == n else value
            for name, value in operands.items()
        }
        torch.testing.assert_close(fused(activation, alone, groups), y[sample : sample + 1])
