"""group_norm and GroupNorm on the CPU, against float64 and against PyTorch."""

import copy
import functools
import inspect
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import triton_gn
from tests.support.pairs import each_pair
from tests.support.tensors import channels_innermost, random
from triton_gn import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((2, 6, 5), (2, 6, 5, 4), (2, 6, 5, 4, 3), (2, 6, 5, 4, 3, 2))
AFFINES = ((True, True), (True, False), (False, True), (False, False))  # weight, bias


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


LAYOUTS = (False, True)


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)
each_rank = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"rank{len(shape)}")
each_layout = pytest.mark.parametrize("channels_last", [False, True], ids=["contig", "cl"])


def make_input(
    shape: tuple[int, ...],
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    x = (random(*shape) * std + mean).to(dtype)
    return channels_innermost(x) if channels_last else x


def make_parameters(
    channels: int, weight: torch.dtype | None, bias: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    return (
        None if weight is None else random(channels, seed=1).to(weight),
        None if bias is None else random(channels, seed=2).to(bias),
    )


def step(
    group_norm: Callable[..., Tensor],
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """y and the gradient of every operand, for random gradients of y."""
    operands = {"x": x, "weight": weight, "bias": bias}
    leaves = {name: t.detach().requires_grad_() for name, t in operands.items() if t is not None}
    y = group_norm(leaves["x"], num_groups, leaves.get("weight"), leaves.get("bias"))
    grads = torch.autograd.grad(y, list(leaves.values()), random(*x.shape, seed=3).to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def float64_step(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None
) -> dict[str, Tensor]:
    """Run the formulas of the reference in float64, and return what ``step`` does."""
    dy = random(*x.shape, seed=3).to(x.dtype).double()
    operands = {"x": x, "weight": weight, "bias": bias}
    leaves = {n: t.detach().double().requires_grad_() for n, t in operands.items() if t is not None}
    y = reference.group_norm(reference.Operands(**leaves), num_groups, 1e-5, "none")
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def pytorch(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """F.group_norm, handed its parameters in a form that it takes: its backward wants a weight if
    there is a bias, and its CPU kernels mix no dtypes but 16-bit inputs with float32 parameters."""
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    if any(p is not None and p.dtype is not x.dtype for p in (weight, bias)):
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    return F.group_norm(x, num_groups, weight, bias)


def errors(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors in the Euclidean norm."""
    return {
        name: float((results[name].double() - value).norm() / value.norm())
        for name, value in expected.items()
    }


def assert_as_exact_as_pytorch(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    pytorch_input: Tensor | None = None,
    factor: float = 1.5,
) -> None:
    """The errors are at most ``factor`` times PyTorch's, up to the rounding of the arithmetic.

    Another order of summation moves either side that far: in a parameter's gradient, which is one
    sum of values of either sign, by a rounding for the root of their number.
    """
    rounding = 1e-15 if x.dtype is torch.float64 else 1e-7
    terms = {"dweight": x.numel() // x.shape[1], "dbias": x.numel() // x.shape[1]}
    ours = step(triton_gn.group_norm, x, num_groups, weight, bias)
    theirs = step(pytorch, x if pytorch_input is None else pytorch_input, num_groups, weight, bias)
    expected = float64_step(x, num_groups, weight, bias)
    assert {name: t.dtype for name, t in ours.items()} == {
        name: t.dtype for name, t in theirs.items()
    }
    allowed = errors(theirs, expected)
    for name, error in errors(ours, expected).items():
        limit = factor * allowed[name] + rounding * math.sqrt(terms.get(name, 1))
        assert error <= limit, f"{name}: {error:.1e} is more than {limit:.1e}"


# The oracle


@each_pair("shape affine num_groups", SHAPES, AFFINES, [1, 2, 6])
def test_reference_is_pytorchs_float64(
    shape: tuple[int, ...], affine: tuple[bool, bool], num_groups: int
) -> None:
    x = make_input(shape, dtype=torch.float64, mean=2.0)
    weight, bias = make_parameters(6, *(torch.float64 if there else None for there in affine))
    torch.testing.assert_close(
        float64_step(x, num_groups, weight, bias), step(pytorch, x, num_groups, weight, bias)
    )


# Values and gradients


@each_pair("shape channels_last dtype affine", SHAPES, LAYOUTS, DTYPES, AFFINES)
def test_as_exact_as_pytorch(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, affine: tuple[bool, bool]
) -> None:
    weight, bias = make_parameters(6, *(dtype if there else None for there in affine))
    assert_as_exact_as_pytorch(make_input(shape, channels_last, dtype), 2, weight, bias)


@each_pair("dtype weight_dtype bias_dtype channels_last", DTYPES, DTYPES, DTYPES, LAYOUTS)
def test_dtypes_mix(
    dtype: torch.dtype, weight_dtype: torch.dtype, bias_dtype: torch.dtype, channels_last: bool
) -> None:
    weight, bias = make_parameters(6, weight_dtype, bias_dtype)
    x = make_input((2, 6, 5, 4), channels_last, dtype)
    assert_as_exact_as_pytorch(x, 3, weight, bias)
    assert_as_exact_as_pytorch(x, 3, weight)
    assert_as_exact_as_pytorch(x, 3, None, bias)


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
    assert_as_exact_as_pytorch(x, 2, *make_parameters(6, dtype, dtype))


@each_pair("shape channels_last bias_dtype", SHAPES, LAYOUTS, [None, torch.float32, torch.bfloat16])
def test_output_has_the_inputs_strides(
    shape: tuple[int, ...], channels_last: bool, bias_dtype: torch.dtype | None
) -> None:
    x = make_input(shape, channels_last)
    _, bias = make_parameters(6, None, bias_dtype)
    assert triton_gn.group_norm(x, 2, None, bias).stride() == x.stride()


def test_values_of_a_ramp() -> None:
    """Known to four decimals from the groups' arithmetic series of 147 values."""
    y = triton_gn.group_norm(torch.arange(1470.0).reshape(5, 6, 7, 7), 2)
    assert [f"{value:.4f}" for value in y.flatten()[:3].tolist()] == [
        "-1.7203", "-1.6967", "-1.6732",
    ]  # fmt: skip


@each_rank
@each_layout
def test_one_group_is_layer_norm(shape: tuple[int, ...], channels_last: bool) -> None:
    x = make_input(shape, channels_last, torch.float64)
    torch.testing.assert_close(triton_gn.group_norm(x, 1), F.layer_norm(x, shape[1:]))


@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda shape: f"rank{len(shape)}")
@each_layout
def test_a_group_per_channel_is_instance_norm(shape: tuple[int, ...], channels_last: bool) -> None:
    x = make_input(shape, channels_last, torch.float64)
    weight, bias = make_parameters(6, torch.float64, torch.float64)
    torch.testing.assert_close(
        triton_gn.group_norm(x, 6, weight, bias), F.instance_norm(x, weight=weight, bias=bias)
    )


# Means far from zero


@each_rank
def test_channels_last_is_as_exact_as_contiguous_far_from_zero(shape: tuple[int, ...]) -> None:
    """PyTorch's channels-last kernel subtracts mean**2 from the mean of the squares: off by units
    here."""
    x = make_input(shape, channels_last=True, mean=1e4, std=0.1)
    weight, bias = make_parameters(6, torch.float32, torch.float32)
    assert_as_exact_as_pytorch(x, 2, weight, bias, pytorch_input=x.contiguous(), factor=2)


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
    x = make_input(shape, channels_last=True, dtype=dtype, mean=mean, std=std)
    assert_as_exact_as_pytorch(x, 2, *make_parameters(6, dtype, dtype))


def test_nan_in_one_sample_leaves_the_others_exact() -> None:
    x = make_input((2, 6, 5, 4), channels_last=True, mean=1e4, std=0.1)
    alone = triton_gn.group_norm(x[1:], 2)
    x[0, 0, 0, 0] = math.nan
    y = triton_gn.group_norm(x, 2)
    torch.testing.assert_close(y[1:], alone)
    assert y[0, :3].isnan().all()


# Autograd


# the full product: PyTorch's crash takes all of layout, rank, operand and "alone"
@each_layout
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 5, 4), (0, 6, 5), (2, 6, 0)], ids=str)
@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "of all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["same", "mixed"])
def test_each_operand_gets_its_gradient(
    shape: tuple[int, ...], needed: str, alone: bool, channels_last: bool, dtype: torch.dtype
) -> None:
    """PyTorch's channels-last backward on the CPU crashes unless x needs a gradient."""
    x = make_input(shape, channels_last)
    weight, bias = random(6, seed=1).to(dtype), random(6, seed=2).to(dtype)
    operands = {"x": x, "weight": weight, "bias": bias}
    for name, operand in operands.items():
        operand.requires_grad_(name == needed or not alone)
    y = triton_gn.group_norm(x, 2, weight, bias)
    leaf = operands[needed]
    (grad,) = torch.autograd.grad(y, leaf, random(*shape, seed=3).to(y.dtype))
    assert grad.dtype is leaf.dtype
    if x.numel():
        expected = float64_step(x, 2, weight, bias)[f"d{needed}"]
        torch.testing.assert_close(grad, expected.to(leaf.dtype))


def test_no_grad_detaches() -> None:
    x = make_input((2, 6, 5)).requires_grad_()
    with torch.no_grad():
        assert not triton_gn.group_norm(x, 2).requires_grad


@each_pair(
    "shape affine channels_last dtype",
    [(0, 6, 5), (2, 0, 5), (2, 6, 0), (2, 6, 0, 4), (0, 6)],
    AFFINES,
    LAYOUTS,
    DTYPES,
)
def test_empty_input_has_no_values_and_gradients_of_0(
    shape: tuple[int, ...], affine: tuple[bool, bool], channels_last: bool, dtype: torch.dtype
) -> None:
    x = make_input(shape, channels_last, dtype)
    weight, bias = make_parameters(shape[1], *(dtype if there else None for there in affine))
    results = step(triton_gn.group_norm, x, 2, weight, bias)
    for name, operand in {"y": x, "dx": x, "dweight": weight, "dbias": bias}.items():
        if operand is not None:
            torch.testing.assert_close(results[name], torch.zeros_like(operand))


def test_changing_the_input_before_backward_raises() -> None:
    x = make_input((2, 6, 5)).requires_grad_() * 1
    y = triton_gn.group_norm(x, 2)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_pair("shape affine channels_last", [(2, 4, 3), (1, 4, 2, 2)], AFFINES, LAYOUTS)
def test_gradients_of_first_and_second_order(
    shape: tuple[int, ...], affine: tuple[bool, bool], channels_last: bool
) -> None:
    weight, bias = make_parameters(4, *(torch.float64 if there else None for there in affine))
    operands = {"input": make_input(shape, channels_last, torch.float64)}
    operands |= {name: p for name, p in (("weight", weight), ("bias", bias)) if p is not None}
    leaves = [operand.requires_grad_() for operand in operands.values()]

    def group_norm(*leaves: Tensor) -> Tensor:
        by_name = dict(zip(operands, leaves, strict=True))
        return triton_gn.group_norm(by_name["input"], 2, by_name.get("weight"), by_name.get("bias"))

    assert torch.autograd.gradcheck(group_norm, leaves)
    assert torch.autograd.gradgradcheck(group_norm, leaves)


# The layer


def test_layer_is_pytorchs_with_its_constructor_and_repr() -> None:
    layer = triton_gn.GroupNorm(2, 6, eps=1e-3, affine=False)
    assert isinstance(layer, nn.GroupNorm)
    assert repr(layer) == repr(nn.GroupNorm(2, 6, eps=1e-3, affine=False))
    theirs, ours = (
        {p.name: (p.kind, p.default) for p in inspect.signature(kind).parameters.values()}
        for kind in (nn.GroupNorm, triton_gn.GroupNorm)
    )
    positional = [name for name, (kind, _) in theirs.items() if kind.name != "KEYWORD_ONLY"]
    assert list(ours)[: len(positional)] == positional
    assert all(ours[name] == theirs[name] for name in positional)


def randomised(layer: nn.GroupNorm) -> nn.GroupNorm:
    with torch.no_grad():
        layer.weight.copy_(random(layer.num_channels, seed=1))
        layer.bias.copy_(random(layer.num_channels, seed=2))
    return layer


@pytest.mark.parametrize(
    ("source", "target"),
    [(nn.GroupNorm, triton_gn.GroupNorm), (triton_gn.GroupNorm, nn.GroupNorm)],
    ids=["from PyTorch", "to PyTorch"],
)
def test_state_dict_moves_both_ways(source: type[nn.GroupNorm], target: type[nn.GroupNorm]) -> None:
    trained, fresh = randomised(source(2, 6)), target(2, 6)
    fresh.load_state_dict(trained.state_dict())
    x = make_input((2, 6, 5))
    assert torch.equal(fresh(x), trained(x))


def saved_and_loaded(layer: nn.GroupNorm) -> nn.GroupNorm:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: nn.GroupNorm = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_layer_can_be_copied(copied: Callable[[nn.GroupNorm], nn.GroupNorm]) -> None:
    layer = randomised(triton_gn.GroupNorm(2, 6, eps=1e-3))
    other = copied(layer)
    x = make_input((2, 6, 5))
    assert type(other) is triton_gn.GroupNorm
    assert other.weight is not layer.weight
    assert torch.equal(other(x), layer(x))


def test_layer_on_the_meta_device_gives_shapes() -> None:
    layer = triton_gn.GroupNorm(2, 6, device="meta")
    y = layer(torch.empty(2, 6, 5, device="meta", dtype=torch.float32))
    assert (y.shape, y.device.type) == ((2, 6, 5), "meta")


@each_dtype
def test_layer_takes_a_dtype(dtype: torch.dtype) -> None:
    layer = triton_gn.GroupNorm(2, 6, dtype=dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert layer(make_input((2, 6, 5), dtype=dtype)).dtype is dtype


def test_layer_without_affine_has_no_parameters() -> None:
    layer = triton_gn.GroupNorm(2, 6, affine=False)
    assert not list(layer.parameters())
    x = make_input((2, 6, 5))
    assert torch.equal(layer(x), F.group_norm(x, 2))


def test_layer_passes_its_eps() -> None:
    x = make_input((2, 6, 5), std=0.1)
    layer = triton_gn.GroupNorm(2, 6, eps=0.5)
    torch.testing.assert_close(layer(x), F.group_norm(x, 2, eps=0.5))


def test_layer_runs_its_hooks() -> None:
    layer, called = triton_gn.GroupNorm(2, 6), []
    layer.register_forward_pre_hook(lambda *_: called.append("before"))
    layer.register_forward_hook(lambda *_: called.append("after"))
    layer.register_full_backward_hook(lambda *_: called.append("backward"))
    layer(make_input((2, 6, 5)).requires_grad_()).sum().backward()
    assert called == ["before", "after", "backward"]


def test_layer_is_the_same_in_evaluation() -> None:
    layer, x = randomised(triton_gn.GroupNorm(2, 6)), make_input((2, 6, 5))
    assert torch.equal(layer.train()(x), layer.eval()(x))


@each_dtype
@each_layout
def test_layer_follows_autocast_as_pytorchs(dtype: torch.dtype, channels_last: bool) -> None:
    x = make_input((2, 6, 5, 4), channels_last, dtype)
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    ours, theirs = triton_gn.GroupNorm(2, 6), nn.GroupNorm(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            ours.to(parameter_dtype)(x), theirs.to(parameter_dtype)(x), rtol=1e-6, atol=1e-6
        )


# Errors: the rule, the value received and, where there is one, the remedy

X = make_input((2, 6, 5))
ONES = torch.ones(6)
PARAMETERS = {
    "none": (None, None), "weight": (ONES, None), "affine": (ONES, ONES),
}  # fmt: skip


@pytest.mark.parametrize(("weight", "bias"), PARAMETERS.values(), ids=list(PARAMETERS))
@pytest.mark.parametrize(
    ("num_groups", "error", "message"),
    [
        (4, ValueError, r"6 channels .* into 4 groups; .* must divide .*\(nearest: 3, 6\)"),
        (5, ValueError, r"6 channels .* into 5 groups; .* must divide .*\(nearest: 3, 6\)"),
        (12, ValueError, r"6 channels .* into 12 groups; .* must divide .*\(nearest: 6\)"),
        (0, ValueError, "num_groups must be at least 1; got 0. A divisor of the 6 channels"),
        (-2, ValueError, "num_groups must be at least 1; got -2. A divisor of the 6 channels"),
        (2.0, TypeError, r"num_groups must be an int; got 2\.0 of type float"),
        (True, TypeError, "num_groups must be an int; got True of type bool"),
        ("2", TypeError, "num_groups must be an int; got '2' of type str"),
        (None, TypeError, "num_groups must be an int; got None of type NoneType"),
    ],
)
def test_num_groups_is_checked(
    num_groups: Any, error: type[Exception], message: str, weight: Tensor, bias: Tensor
) -> None:
    with pytest.raises(error, match=f"group_norm: {message}"):
        triton_gn.group_norm(X, num_groups, weight, bias)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("other", [None, ONES], ids=["alone", "with the other"])
@pytest.mark.parametrize(
    ("parameter", "error", "message"),
    [
        (torch.ones(7), ValueError, r"must have shape \(6,\).*got \(7,\)"),
        (torch.ones(6, 1), ValueError, r"must have shape \(6,\).*got \(6, 1\)"),
        (torch.tensor(1.0), ValueError, r"must have shape \(6,\).*got \(\)"),
        (
            torch.ones(6, device="meta"),
            ValueError,
            r"must be on .* device cpu; got meta. .*\.to\('cpu'\)",
        ),
        (
            torch.ones(6, dtype=torch.int64),
            TypeError,
            r"must be float16, .*got torch.int64. .*\.float\(",
        ),
        (torch.ones(6).to_sparse(), TypeError, r"must be dense; got .*sparse_coo. .*\.to_dense\("),
        ([1.0] * 6, TypeError, "must be a Tensor; got list"),
    ],
    ids=["too long", "rank 2", "rank 0", "meta", "int64", "sparse", "list"],
)
def test_parameters_are_checked(
    name: str, parameter: Any, other: Tensor | None, error: type[Exception], message: str
) -> None:
    parameters = {"weight": other, "bias": other, name: parameter}
    with pytest.raises(error, match=f"group_norm: {name} {message}"):
        triton_gn.group_norm(X, 2, **parameters)


@pytest.mark.parametrize(("weight", "bias"), PARAMETERS.values(), ids=list(PARAMETERS))
@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_dtype_of_the_input_is_checked(dtype: torch.dtype, weight: Tensor, bias: Tensor) -> None:
    message = rf"input must be float16, .* or float64; got {dtype}\. Convert it"
    with pytest.raises(TypeError, match=message):
        triton_gn.group_norm(X.to(dtype), 2, weight, bias)


def quantised(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(("weight", "bias"), PARAMETERS.values(), ids=list(PARAMETERS))
@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (torch.Tensor.to_sparse_coo, r"must be dense; got layout torch.sparse_coo.*to_dense\("),
        (torch.Tensor.to_sparse_csr, r"must be dense; got layout torch.sparse_csr.*to_dense\("),
        (quantised, "float32 or float64; got torch.qint8"),
        (torch.Tensor.tolist, "must be a Tensor; got list"),
        (torch.Tensor.numpy, "must be a Tensor; got ndarray"),
    ],
    ids=["coo", "csr", "quantised", "list", "array"],
)
# PyTorch warns of making them; the test is about how they are refused
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning")
def test_only_dense_tensors_are_taken(
    convert: Callable[[Tensor], Any], message: str, weight: Tensor, bias: Tensor
) -> None:
    with pytest.raises(TypeError, match=f"group_norm: input .*{message}"):
        triton_gn.group_norm(convert(X), 2, weight, bias)


@pytest.mark.parametrize("shape", [(), (6,)], ids=["rank0", "rank1"])
@pytest.mark.parametrize(("weight", "bias"), PARAMETERS.values(), ids=list(PARAMETERS))
def test_rank_of_the_input_is_checked(shape: tuple[int, ...], weight: Tensor, bias: Tensor) -> None:
    with pytest.raises(ValueError, match=r"at least 2 dimensions, \(N, C, \*\); got shape \("):
        triton_gn.group_norm(torch.ones(shape), 2, weight, bias)


def refuses(group_norm: Callable[[Tensor, int], Tensor], x: Tensor, num_groups: int) -> bool:
    try:
        group_norm(x, num_groups)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((1, 6), 6), ((1, 6, 1), 6), ((1, 6, 1, 1), 6), ((1, 1), 1), ((1, 6), 3), ((1, 6, 2), 6),
        ((2, 6), 6), ((6, 1), 1), ((2, 3), 3), ((1, 1, 2), 1), ((0, 6), 6), ((1, 6, 0), 6),
    ],
    ids=str,
)  # fmt: skip
def test_one_value_per_group_is_refused_where_pytorch_does(
    shape: tuple[int, ...], num_groups: int
) -> None:
    x = torch.ones(shape)
    assert refuses(triton_gn.group_norm, x, num_groups) == refuses(F.group_norm, x, num_groups)


def test_one_value_per_group_says_what_to_do() -> None:
    message = r"more than 1 value.*got shape \(1, 6\) with 6 groups. Take fewer groups"
    with pytest.raises(ValueError, match=message):
        triton_gn.group_norm(torch.ones(1, 6), 6)


# PyTorch's own samples


@functools.cache
def op_info() -> Any:
    """Imported on use: it takes seconds."""
    from torch.testing._internal.common_methods_invocations import op_db

    (found,) = [op for op in op_db if op.name == "nn.functional.group_norm"]
    return found


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


def bound(x: Tensor, num_groups: int) -> Tensor:
    """How far x_hat may be off, (N, C, *).

    A value loses |x| * rstd roundings when the mean is taken off, and the variance may lose that
    squared, where it is mean(x**2) - mean**2. 32 times that for sums of up to 500 values.
    """
    grouped = x.double().reshape(x.shape[0], num_groups, -1)
    rstd = (grouped.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    lost = grouped.abs().amax(-1, keepdim=True) * rstd
    roundings = 32 * torch.finfo(x.dtype).eps * (1 + lost.square())
    return roundings.expand_as(grouped).reshape(x.shape)


# derandomize: the same examples in every run, so that a failure is a change's and not chance's
for_any_input = settings(max_examples=150, deadline=None, derandomize=True)


@for_any_input
@given(case=inputs(), affine=st.sampled_from(AFFINES))
def test_any_input_is_normalised(case: tuple[Tensor, int], affine: tuple[bool, bool]) -> None:
    x, num_groups = case
    weight, bias = make_parameters(x.shape[1], *(x.dtype if there else None for there in affine))
    y = triton_gn.group_norm(x, num_groups, weight, bias)
    expected = float64_step(x, num_groups, weight, bias)["y"]
    # parameters are below 4
    assert ((y - expected).abs() <= 4 * bound(x, num_groups)).all()


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
@given(case=inputs(), shift=st.floats(-10, 10))
def test_a_constant_on_all_values_changes_nothing(case: tuple[Tensor, int], shift: float) -> None:
    x, num_groups = case
    shifted = x + shift
    difference = triton_gn.group_norm(shifted, num_groups) - triton_gn.group_norm(x, num_groups)
    assert (difference.abs() <= bound(x, num_groups) + bound(shifted, num_groups)).all()


@for_any_input
@given(case=inputs(), exponent=st.integers(-8, 8))
def test_scale_changes_nothing_up_to_eps(case: tuple[Tensor, int], exponent: int) -> None:
    """A power of two scales every intermediate without rounding: the bits are the same."""
    x, num_groups = case
    x = x.clone()  # dense, so that x * scale has the same strides
    scale = 2.0**exponent
    scaled = triton_gn.group_norm(x * scale, num_groups, eps=1e-5 * scale**2)
    assert torch.equal(scaled, triton_gn.group_norm(x, num_groups, eps=1e-5))


@for_any_input
@given(case=inputs(), data=st.data())
def test_pixels_can_be_permuted_before_or_after(case: tuple[Tensor, int], data: Any) -> None:
    x, num_groups = case
    assume(x.ndim > 2)
    order = data.draw(st.permutations(range(x.shape[-1])))
    before = triton_gn.group_norm(x[..., order], num_groups)
    after = triton_gn.group_norm(x, num_groups)[..., order]
    assert ((before - after).abs() <= 2 * bound(x, num_groups)).all()
