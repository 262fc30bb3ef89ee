"""Tests of the operands that group_norm fuses with the normalisation, on the CPU."""

import copy
import inspect
import itertools
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import triton_gn
from tests.support.activations import ACTIVATIONS
from tests.support.pairs import each_pair, pairwise
from tests.support.tensors import channels_innermost, random

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PER_SAMPLE = ("scale", "shift", "pre_add")
FUSED = (*PER_SAMPLE, "residual")
SUBSETS = [names for size in range(5) for names in itertools.combinations(FUSED, size)]
SHAPE, GROUPS = (2, 6, 5, 4), 3


def short(value: object) -> str:
    return "+".join(value) or "alone" if isinstance(value, tuple) else str(value).split(".")[-1]


LAYOUTS = (False, True)
each_layout = pytest.mark.parametrize("channels_last", [False, True], ids=["contig", "cl"])
each_per_sample = pytest.mark.parametrize("name", PER_SAMPLE)
OPERANDS = ["input", "weight", "bias", *FUSED]


def lay(x: Tensor, channels_last: bool) -> Tensor:
    """Copy x with its channels innermost or outside the pixels."""
    if channels_last:
        return channels_innermost(x)
    return x.clone(memory_format=torch.contiguous_format)


def make_operands(
    names: tuple[str, ...] = FUSED,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = SHAPE,
) -> dict[str, Tensor]:
    """The arguments of group_norm by name: weight is not 1, bias not 0, scale per sample, shift per
    channel, pre_add a row."""
    n, channels = shape[:2]
    values = {
        "input": lay(random(*shape), channels_last),
        "weight": random(channels, seed=1),
        "bias": random(channels, seed=2),
        "scale": random(n, channels, seed=3) / 2,
        "shift": random(channels, seed=4),
        "pre_add": random(1, channels, seed=5),
        "residual": lay(random(*shape, seed=6), channels_last),
    }
    return {
        name: value.to(dtype)
        for name, value in values.items()
        if name in ("input", "weight", "bias", *names)
    }


def composed(
    activation: str | None, operands: dict[str, Tensor], num_groups: int = GROUPS
) -> Tensor:
    """The formula, an operation after the other, each rounding to the dtype."""
    x = operands["input"]
    rows = {
        name: values.reshape(-1, x.shape[1], *[1] * (x.ndim - 2))
        for name, values in operands.items()
        if name in PER_SAMPLE
    }
    if "pre_add" in rows:
        x = x + rows["pre_add"]
    n = F.group_norm(x, num_groups, operands.get("weight"), operands.get("bias"))
    if "scale" in rows:
        n = n * (1 + rows["scale"])
    if "shift" in rows:
        n = n + rows["shift"]
    if "residual" in operands:
        n = n + operands["residual"]
    return ACTIVATIONS[activation or "none"](n)


def fused(activation: str | None, operands: dict[str, Any], num_groups: int = GROUPS) -> Tensor:
    return triton_gn.group_norm(num_groups=num_groups, activation=activation, **operands)


def step(
    group_norm: Callable[..., Tensor],
    activation: str | None,
    operands: dict[str, Tensor],
    dy: Tensor,
    num_groups: int = GROUPS,
) -> dict[str, Tensor]:
    """y, and the gradient of each operand by its name."""
    leaves = {name: value.detach().requires_grad_() for name, value in operands.items()}
    y = group_norm(activation, leaves, num_groups)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def in_float64(
    activation: str | None, operands: dict[str, Tensor], dy: Tensor, num_groups: int = GROUPS
) -> dict[str, Tensor]:
    doubled = {name: value.double() for name, value in operands.items()}
    return step(composed, activation, doubled, dy.double(), num_groups)


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


@each_pair(
    "shape activation dtype channels_last",
    [(0, 6, 5), (2, 6, 0), (2, 6, 0, 4), (2, 0, 5), (0, 6)],
    ["none", "silu"],
    [torch.bfloat16, torch.float32],
    LAYOUTS,
)
def test_empty_input_has_no_values_and_gradients_of_0(
    shape: tuple[int, ...], activation: str, dtype: torch.dtype, channels_last: bool
) -> None:
    operands = make_operands(channels_last=channels_last, dtype=dtype, shape=shape)
    results = step(fused, activation, operands, torch.ones(shape))
    assert results["y"].dtype is dtype
    assert results["y"].shape == shape
    for name, operand in operands.items():
        torch.testing.assert_close(results[name], torch.zeros_like(operand))


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


# Errors: the rule, the value received and, where there is one, the remedy

X = random(*SHAPE).float()


@pytest.mark.parametrize(
    ("activation", "error", "message"),
    [
        ("swish", ValueError, "one of none, relu, .*; got 'swish'. Apply any other to the"),
        ("SiLU", ValueError, "one of none, relu, .*; got 'SiLU'"),
        ("", ValueError, "one of none, relu, .*; got ''"),
        (nn.SiLU(), TypeError, r"None or a name, such as 'silu'; got SiLU\(\)"),
        (F.silu, TypeError, "None or a name, such as 'silu'; got <function silu"),
        (True, TypeError, "None or a name, such as 'silu'; got True"),
        (["silu"], TypeError, r"None or a name, such as 'silu'; got \['silu'\]"),
    ],
    ids=["swish", "SiLU", "nothing", "module", "function", "bool", "list"],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda activation: triton_gn.group_norm(X, GROUPS, activation=activation),
        lambda activation: triton_gn.group_norm(X[:0], GROUPS, activation=activation),
        lambda activation: triton_gn.GroupNorm(GROUPS, 6, activation=activation),
    ],
    ids=["function", "of nothing", "layer"],
)
def test_activation_is_checked(
    call: Callable[[Any], Any], activation: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"group_norm: activation must be {message}"):
        call(activation)


@each_per_sample
@pytest.mark.parametrize(
    "shape",
    [
        (), (7,), (1,), (2, 7), (3, 6), (0, 6), (6, 2), (6, 1), (6, 1, 1), (2, 6, 5, 4),
        (2, 6, 1, 4), (1, 6, 5), (1, 2, 6), (2, 6, 1, 1, 1), (1, 1, 1, 1),
    ],
    ids=str,
)  # fmt: skip
def test_shape_of_one_value_per_channel_is_checked(name: str, shape: tuple[int, ...]) -> None:
    rule = r"\(6,\), \(1, 6\) or \(2, 6\), also with trailing sizes of 1 up to input's rank"
    received = str(shape).replace("(", r"\(").replace(")", r"\)")
    message = f"group_norm: {name} must have shape {rule}; got {received}"
    with pytest.raises(ValueError, match=message):
        fused(None, {"input": X, name: torch.ones(shape)})


@pytest.mark.parametrize(
    "shape",
    [
        (), (6,), (2, 6), (6, 5, 4), (1, 6, 5, 4), (2, 1, 5, 4), (2, 6, 1, 1), (2, 6, 5, 1),
        (2, 6, 4, 5), (2, 6, 20), (1, 2, 6, 5, 4), (2, 6, 5, 4, 1), (3, 6, 5, 4),
    ],
    ids=str,
)  # fmt: skip
def test_shape_of_the_residual_is_checked(shape: tuple[int, ...]) -> None:
    """PyTorch's broadcasting would take half of them."""
    received = str(shape).replace("(", r"\(").replace(")", r"\)")
    rule = r"input's shape \(2, 6, 5, 4\)"
    with pytest.raises(ValueError, match=f"group_norm: residual must have {rule}; got {received}"):
        triton_gn.group_norm(X, GROUPS, residual=torch.ones(shape))


REFUSED: list[tuple[Callable[[Tensor], Any], type[Exception], str]] = [
    (torch.Tensor.int, TypeError, r"float16, .* got torch.int32\. .*\.float\(\)"),
    (torch.Tensor.bool, TypeError, r"float16, .* got torch.bool\. .*\.float\(\)"),
    (lambda t: t.to(torch.complex64), TypeError, "float16, .* got torch.complex64"),
    (lambda t: t.to(torch.float8_e4m3fn), TypeError, "float16, .* got torch.float8_e4m3fn"),
    (torch.Tensor.to_sparse, TypeError, r"dense; got layout .*sparse_coo\. .*\.to_dense\("),
    (lambda t: t.to("meta"), ValueError, r"on .* device cpu; got meta\. .*\.to\('cpu'\)"),
    (torch.Tensor.tolist, TypeError, "a Tensor; got list"),
    (torch.Tensor.numpy, TypeError, "a Tensor; got ndarray"),
    (lambda _: 1.0, TypeError, "a Tensor; got float"),
]


@pytest.mark.parametrize(("name", "n", "refused"), pairwise(FUSED, (0, 2), REFUSED))
def test_operands_are_checked(
    name: str, n: int, refused: tuple[Callable[[Tensor], Any], type[Exception], str]
) -> None:
    convert, error, message = refused
    operand = make_operands((name,), shape=(n, *SHAPE[1:]))[name]
    with pytest.raises(error, match=f"group_norm: {name} must be {message}"):
        fused(None, {"input": X[:n], name: convert(operand)})


def test_input_is_checked_in_a_fused_call() -> None:
    with pytest.raises(ValueError, match=r"6 channels .* into 4 groups; .*\(nearest: 3, 6\)"):
        triton_gn.group_norm(X, 4, activation="silu")
    with pytest.raises(ValueError, match=r"more than 1 value.*got shape \(1, 6\) with 6 groups"):
        triton_gn.group_norm(torch.ones(1, 6), 6, shift=torch.ones(6))


def test_fused_operands_are_named() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        triton_gn.group_norm(X, GROUPS, None, None, 1e-5, "silu")  # type: ignore[call-arg]


# The layer


def make_layer(activation: str | None = "silu", **rest: Any) -> triton_gn.GroupNorm:
    layer = triton_gn.GroupNorm(GROUPS, 6, activation=activation, **rest)
    operands = make_operands()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(operands[name])
    return layer


@pytest.mark.parametrize("activation", [None, "none", "gelu_tanh"])
def test_repr_shows_the_activation(activation: str | None) -> None:
    theirs = nn.GroupNorm(GROUPS, 6, eps=1e-3).extra_repr()
    added = "" if activation is None else f", activation={activation!r}"
    layer = triton_gn.GroupNorm(GROUPS, 6, eps=1e-3, activation=activation)
    assert repr(layer) == f"GroupNorm({theirs}{added})"


def test_state_dict_does_not_know_of_the_activation() -> None:
    ours, theirs = make_layer(), nn.GroupNorm(GROUPS, 6)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(X), F.silu(theirs(X)))
    other = triton_gn.GroupNorm(GROUPS, 6, activation="silu")
    other.load_state_dict(theirs.state_dict())
    assert torch.equal(other(X), ours(X))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copies_keep_the_activation(copied: Callable[[nn.Module], nn.Module]) -> None:
    layer = make_layer("mish")
    other = copied(layer)
    assert isinstance(other, triton_gn.GroupNorm)
    assert other.activation == "mish"
    assert torch.equal(other(X), layer(X))


def test_layer_pickled_before_there_were_activations_has_none() -> None:
    layer = make_layer(None)
    old = copy.deepcopy(layer)
    del old.__dict__["activation"]
    assert torch.equal(old(X), layer(X))
    assert repr(old) == repr(layer)


@pytest.mark.skipif(
    "bias" not in inspect.signature(nn.GroupNorm).parameters,
    reason="this version of PyTorch's layer has no bias keyword",
)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_layer_without_a_bias(activation: str | None) -> None:
    layer = make_layer(activation, bias=False)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    expected = composed(activation, {"input": X, "weight": layer.weight})
    torch.testing.assert_close(layer(X), expected)


def test_layer_refuses_keywords_that_pytorchs_does_not_have() -> None:
    with pytest.raises(TypeError, match="num_chanels"):
        triton_gn.GroupNorm(GROUPS, 6, num_chanels=6)


@pytest.mark.parametrize("names", SUBSETS, ids=short)
@each_layout
def test_layer_passes_its_operands_on(names: tuple[str, ...], channels_last: bool) -> None:
    operands = make_operands(names, channels_last)
    layer = make_layer("tanh")
    arguments = {name: operands[name] for name in ("input", *names)}
    assert torch.equal(layer(**arguments), fused("tanh", operands))
    positional = [operands.get(name) for name in ("input", "scale", "shift", "residual", "pre_add")]
    assert torch.equal(layer(*positional), fused("tanh", operands))


def test_layer_in_a_sequence() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(6, 6, 3), triton_gn.GroupNorm(GROUPS, 6, activation="relu"))
    theirs = nn.Sequential(ours[0], nn.GroupNorm(GROUPS, 6), nn.ReLU())
    torch.testing.assert_close(ours(X), theirs(X))


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
