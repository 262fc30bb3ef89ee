"""group_norm and GroupNorm on the CPU, against float64 and against PyTorch."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import triton_gn
from tests.support.calls import (
    AFFINES,
    DTYPES,
    FUSED,
    LAYOUTS,
    each_layout,
    fused,
    make_operands,
    short,
    step,
)
from tests.support.pairs import each_pair
from tests.support.tensors import channels_innermost, random
from triton_gn import reference

SHAPES = ((2, 6, 5), (2, 6, 5, 4), (2, 6, 5, 4, 3), (2, 6, 5, 4, 3, 2))
GROUPS = 2

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)
each_rank = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"rank{len(shape)}")


def pytorch(_: str | None, operands: Mapping[str, Tensor], num_groups: int) -> Tensor:
    """Compute F.group_norm of parameters in a form that it takes.

    Its backward needs a weight if there is a bias, and its CPU kernels mix no dtypes but 16-bit
    inputs with float32 parameters.
    """
    x, weight, bias = operands["input"], operands.get("weight"), operands.get("bias")
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    if any(p is not None and p.dtype is not x.dtype for p in (weight, bias)):
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    return F.group_norm(x, num_groups, weight, bias)


def by_reference(_: str | None, operands: Mapping[str, Tensor], num_groups: int) -> Tensor:
    x, weight, bias = operands["input"], operands.get("weight"), operands.get("bias")
    return reference.group_norm(reference.Operands(x, weight, bias), num_groups, 1e-5, "none")


def converted(operands: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: operand.to(dtype) for name, operand in operands.items()}


def errors(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative errors in the Euclidean norm."""
    return {
        name: float((results[name].double() - value).norm() / value.norm())
        for name, value in expected.items()
    }


def assert_as_exact_as_pytorch(
    operands: Mapping[str, Tensor],
    num_groups: int = GROUPS,
    *,
    pytorch_input: Tensor | None = None,
    factor: float = 1.5,
) -> None:
    """Assert errors of at most ``factor`` times PyTorch's, up to the rounding of the arithmetic.

    Another order of summation moves either side that far: in a parameter's gradient, which is one
    sum of values of either sign, by a rounding for the root of their number.
    """
    x = operands["input"]
    dy = random(*x.shape, seed=3).to(x.dtype)
    rounding = 1e-15 if x.dtype is torch.float64 else 1e-7
    terms = dict.fromkeys(("weight", "bias"), x.numel() // x.shape[1])
    relaid = {"input": x if pytorch_input is None else pytorch_input}
    ours = step(fused, None, operands, dy, num_groups)
    theirs = step(pytorch, None, {**operands, **relaid}, dy, num_groups)
    doubled = converted(operands, torch.float64)
    expected = step(by_reference, None, doubled, dy.double(), num_groups)
    dtypes = [{name: t.dtype for name, t in results.items()} for results in (ours, theirs)]
    assert dtypes[0] == dtypes[1]
    allowed = errors(theirs, expected)
    for name, error in errors(ours, expected).items():
        limit = factor * allowed[name] + rounding * math.sqrt(terms.get(name, 1))
        assert error <= limit, f"{name}: {error:.1e} is more than {limit:.1e}"


# The oracle


@each_pair("shape affine num_groups", SHAPES, AFFINES, [1, 2, 6])
def test_reference_is_pytorchs_float64(
    shape: tuple[int, ...], affine: tuple[str, ...], num_groups: int
) -> None:
    operands = make_operands((), False, torch.float64, shape, affine)
    operands["input"] += 2.0
    dy = random(*shape, seed=3)
    torch.testing.assert_close(
        step(by_reference, None, operands, dy, num_groups),
        step(pytorch, None, operands, dy, num_groups),
    )


# Values and gradients


@each_pair(
    "shape channels_last dtype affine num_groups", SHAPES, LAYOUTS, DTYPES, AFFINES, [1, 2, 6]
)
def test_as_exact_as_pytorch(
    shape: tuple[int, ...],
    channels_last: bool,
    dtype: torch.dtype,
    affine: tuple[str, ...],
    num_groups: int,
) -> None:
    operands = make_operands((), channels_last, dtype, shape, affine)
    assert_as_exact_as_pytorch(operands, num_groups)


@each_pair("dtype weight_dtype bias_dtype channels_last", DTYPES, DTYPES, DTYPES, LAYOUTS)
def test_dtypes_mix(
    dtype: torch.dtype, weight_dtype: torch.dtype, bias_dtype: torch.dtype, channels_last: bool
) -> None:
    operands = make_operands((), channels_last, dtype)
    parameters = {"weight": weight_dtype, "bias": bias_dtype}
    operands |= {name: random(6, seed=1).to(dtype) for name, dtype in parameters.items()}
    for affine in AFFINES[:3]:
        present = {name: operands[name] for name in ("input", *affine)}
        assert_as_exact_as_pytorch(present, num_groups=3)


# a shape and the view of it that has the strides
STRIDED: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "every other column": ((2, 6, 5, 8), lambda x: x[..., ::2]),
    "first channels": ((2, 12, 5, 4), lambda x: x[:, :6]),
    "channels-last, first channels": ((2, 12, 5, 4), lambda x: channels_innermost(x)[:, :6]),
    "channels-last, first rows": ((2, 6, 8, 4), lambda x: channels_innermost(x)[:, :, :5]),
    "one pixel of many": ((2, 6, 5), lambda x: x[..., :1]),
    "no pixels, transposed": ((6, 2), lambda x: x.t()),
    "no pixels, first channels": ((2, 12), lambda x: x[:, :6]),
    "samples and channels transposed": ((6, 2, 5), lambda x: x.transpose(0, 1)),
    "pixels transposed": ((2, 6, 5, 4), lambda x: x.transpose(2, 3)),
    "channels-last, pixels transposed": ((2, 4, 5, 6), lambda x: x.transpose(1, 3)),
    "channels-last, rank 5, pixels permuted": ((2, 3, 4, 5, 6), lambda x: x.permute(0, 4, 2, 1, 3)),
    "channels-last, rank 6, pixels permuted": (
        (2, 2, 3, 4, 5, 6),
        lambda x: x.permute(0, 5, 2, 1, 4, 3),
    ),
    # PyTorch reads the memory format from the strides of dimensions of 1 as well
    "channels-last, samples innermost": ((5, 4, 6, 1), lambda x: x.permute(3, 2, 0, 1)),
    "channels-last, rank 3, samples innermost": ((5, 6, 1), lambda x: x.permute(2, 1, 0)),
    "channels-last, rows innermost": ((2, 4, 6, 1), lambda x: x.permute(0, 2, 3, 1)),
    "channels-last, rank 5, columns innermost": (
        (2, 4, 3, 6, 1),
        lambda x: x.permute(0, 3, 1, 2, 4),
    ),
    "expanded samples": ((1, 6, 5, 4), lambda x: x.expand(2, 6, 5, 4)),
    "expanded channels": ((2, 1, 5, 4), lambda x: x.expand(2, 6, 5, 4)),
    "expanded pixels": ((2, 6, 5, 1), lambda x: x.expand(2, 6, 5, 4)),
}


@each_dtype
@pytest.mark.parametrize(("shape", "view"), STRIDED.values(), ids=list(STRIDED))
def test_strides_do_not_matter(
    shape: tuple[int, ...], view: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = view(random(*shape).to(dtype))
    assert not x.is_contiguous()
    assert_as_exact_as_pytorch(make_operands((), dtype=dtype) | {"input": x})


@each_pair("shape channels_last bias_dtype", SHAPES, LAYOUTS, [None, torch.float32, torch.bfloat16])
def test_output_has_the_inputs_strides(
    shape: tuple[int, ...], channels_last: bool, bias_dtype: torch.dtype | None
) -> None:
    x = make_operands((), channels_last, shape=shape)["input"]
    bias = None if bias_dtype is None else torch.ones(6, dtype=bias_dtype)
    assert triton_gn.group_norm(x, 2, None, bias).stride() == x.stride()


def test_values_of_a_ramp() -> None:
    """Known to four decimals from the groups' arithmetic series of 147 values."""
    y = triton_gn.group_norm(torch.arange(1470.0).reshape(5, 6, 7, 7), 2)
    assert [f"{value:.4f}" for value in y.flatten()[:3].tolist()] == [
        "-1.7203", "-1.6967", "-1.6732",
    ]  # fmt: skip


# Means far from zero


def make_far(
    shape: tuple[int, ...], dtype: torch.dtype, mean: float, std: float
) -> dict[str, Tensor]:
    operands = make_operands((), True, torch.float64, shape)
    return converted(operands | {"input": operands["input"] * std + mean}, dtype)


@each_rank
def test_channels_last_is_as_exact_as_contiguous_far_from_zero(shape: tuple[int, ...]) -> None:
    """PyTorch's channels-last kernel subtracts mean**2 from the mean of the squares: off by units
    here."""
    operands = make_far(shape, torch.float32, mean=1e4, std=0.1)
    contiguous = operands["input"].contiguous()
    assert_as_exact_as_pytorch(operands, pytorch_input=contiguous, factor=2)


@each_rank
@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [
        (torch.float16, 1e3, 1.0),
        (torch.bfloat16, 1e3, 10.0),
        (torch.float32, 1e2, 1.0),
        (torch.float64, 1e4, 0.1),
    ],
    ids=lambda value: str(value),
)
def test_never_less_exact_than_pytorch_far_from_zero(
    shape: tuple[int, ...], dtype: torch.dtype, mean: float, std: float
) -> None:
    """PyTorch's channels-last kernel knows ranks 4 and 5; in the others it copies and is exact."""
    assert_as_exact_as_pytorch(make_far(shape, dtype, mean, std))


def test_nan_in_one_sample_leaves_the_others_exact() -> None:
    x = make_far((2, 6, 5, 4), torch.float32, mean=1e4, std=0.1)["input"]
    alone = triton_gn.group_norm(x[1:], 2)
    x[0, 0, 0, 0] = math.nan
    y = triton_gn.group_norm(x, 2)
    torch.testing.assert_close(y[1:], alone)
    assert y[0, :3].isnan().all()


# Autograd


# the full product: PyTorch's crash takes all of layout, rank, operand and "alone"
@each_layout
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 5, 4), (0, 6, 5), (2, 6, 0)], ids=str)
@pytest.mark.parametrize("needed", ["input", "weight", "bias"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "of all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["same", "mixed"])
def test_each_operand_gets_its_gradient(
    shape: tuple[int, ...], needed: str, alone: bool, channels_last: bool, dtype: torch.dtype
) -> None:
    """PyTorch's channels-last backward on the CPU crashes unless x needs a gradient."""
    operands = make_operands((), channels_last, dtype, shape)
    operands["input"] = operands["input"].float()
    for name, operand in operands.items():
        operand.requires_grad_(name == needed or not alone)
    y = fused(None, operands, GROUPS)
    leaf, dy = operands[needed], random(*shape, seed=3)
    (grad,) = torch.autograd.grad(y, leaf, dy.to(y.dtype))
    assert grad.dtype is leaf.dtype
    if leaf.numel() and y.numel():
        doubled = converted(operands, torch.float64)
        expected = step(by_reference, None, doubled, dy, GROUPS)[needed]
        torch.testing.assert_close(grad, expected.to(leaf.dtype))


def test_no_grad_detaches() -> None:
    x = random(2, 6, 5).requires_grad_()
    with torch.no_grad():
        assert not triton_gn.group_norm(x, 2).requires_grad


@each_pair(
    "shape affine names activation channels_last dtype",
    [(0, 6, 5), (2, 0, 5), (2, 6, 0), (2, 6, 0, 4), (0, 6)],
    AFFINES,
    [(), FUSED],
    [None, "silu"],
    LAYOUTS,
    DTYPES,
)
def test_empty_input_has_no_values_and_gradients_of_0(
    shape: tuple[int, ...],
    affine: tuple[str, ...],
    names: tuple[str, ...],
    activation: str | None,
    channels_last: bool,
    dtype: torch.dtype,
) -> None:
    operands = make_operands(names, channels_last, dtype, shape, affine)
    results = step(fused, activation, operands, torch.ones(shape), GROUPS)
    for name, operand in (operands | {"y": operands["input"]}).items():
        torch.testing.assert_close(results[name], torch.zeros_like(operand))


def test_changing_the_input_before_backward_raises() -> None:
    x = random(2, 6, 5).requires_grad_() * 1
    y = triton_gn.group_norm(x, 2)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_pair("shape affine channels_last", [(2, 4, 3), (1, 4, 2, 2)], AFFINES, LAYOUTS)
def test_gradients_of_first_and_second_order(
    shape: tuple[int, ...], affine: tuple[str, ...], channels_last: bool
) -> None:
    operands = make_operands((), channels_last, torch.float64, shape, affine)
    leaves = [operand.requires_grad_() for operand in operands.values()]

    def group_norm(*leaves: Tensor) -> Tensor:
        return fused(None, dict(zip(operands, leaves, strict=True)), GROUPS)

    assert torch.autograd.gradcheck(group_norm, leaves)
    assert torch.autograd.gradgradcheck(group_norm, leaves)


# PyTorch's own samples


@functools.cache
def op_info() -> Any:
    """Imported on use: it takes seconds."""
    from torch.testing._internal.common_methods_invocations import op_db

    (group_norm,) = [op for op in op_db if op.name == "nn.functional.group_norm"]
    return group_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("inputs", ["sample_inputs", "reference_inputs"])
def test_pytorchs_samples_agree(inputs: str, dtype: torch.dtype) -> None:
    samples = list(getattr(op_info(), inputs)("cpu", dtype, requires_grad=True))
    assert samples
    for sample in samples:
        ours, theirs = (
            group_norm(sample.input, *sample.args, **sample.kwargs)
            for group_norm in (triton_gn.group_norm, F.group_norm)
        )
        leaves = [t for t in (sample.input, *sample.kwargs.values()) if isinstance(t, Tensor)]
        dy = random(*ours.shape).to(dtype)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        torch.testing.assert_close(
            torch.autograd.grad(ours, leaves, dy),
            torch.autograd.grad(theirs, leaves, dy),
            equal_nan=True,
        )


def test_pytorchs_error_samples_raise() -> None:
    samples = [error.sample_input for error in op_info().error_inputs("cpu")]
    assert samples
    for sample in samples:
        with pytest.raises((TypeError, ValueError), match="group_norm: "):
            triton_gn.group_norm(sample.input, *sample.args, **sample.kwargs)


# Properties


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A tensor of any strides, float32 or float64, and a number of groups for it."""
    num_groups, group_channels = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    pixels = draw(st.lists(st.integers(1, 5), max_size=3))
    shape = (draw(st.integers(1, 3)), num_groups * group_channels, *pixels)
    assume(math.prod(shape) > num_groups)
    rank = len(shape)
    order = draw(st.permutations(range(rank)))
    steps = draw(st.tuples(*[st.sampled_from([1, 1, 1, 2])] * rank))
    expanded = draw(st.none() | st.integers(0, rank - 1))
    mean = draw(st.sampled_from([0.0, 1.0, -3.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    sizes = [1 if dim == expanded else shape[dim] * steps[dim] for dim in range(rank)]
    memory = random(*(sizes[dim] for dim in order), seed=draw(st.integers(0, 2**32 - 1)))
    x = (memory + mean).to(dtype).permute([order.index(dim) for dim in range(rank)])
    return x[tuple(slice(None, None, step) for step in steps)].expand(shape), num_groups


# derandomize: the same examples in every run, so that a failure is a change's and not chance's
for_any_input = settings(max_examples=150, deadline=None, derandomize=True)


@for_any_input
@given(case=inputs())
def test_output_has_the_inputs_shape_dtype_and_memory_format(case: tuple[Tensor, int]) -> None:
    x, num_groups = case
    y = triton_gn.group_norm(x, num_groups)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert torch.ops.aten.is_non_overlapping_and_dense(y)
    if x.is_contiguous():
        assert y.is_contiguous()
    if x.movedim(1, -1).is_contiguous():
        assert y.movedim(1, -1).is_contiguous()


@for_any_input
@given(case=inputs(), exponent=st.integers(-8, 8))
def test_scale_changes_nothing_up_to_eps(case: tuple[Tensor, int], exponent: int) -> None:
    """A power of two scales every intermediate without rounding: the bits are the same."""
    x, num_groups = case
    x = x.clone()  # dense, so that x * scale has the same strides
    scale = 2.0**exponent
    scaled = triton_gn.group_norm(x * scale, num_groups, eps=1e-5 * scale**2)
    assert torch.equal(scaled, triton_gn.group_norm(x, num_groups, eps=1e-5))
