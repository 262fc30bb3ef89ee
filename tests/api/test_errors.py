"""Errors of group_norm on the CPU: the rule, the value received and, where there is one, the
remedy."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triton_gn
from tests.support.calls import GROUPS, OPERANDS, PER_SAMPLE, SHAPE, fused, make_operands
from tests.support.pairs import pairwise
from tests.support.tensors import random

X = random(*SHAPE).float()


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
def test_num_groups_is_checked(num_groups: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"group_norm: {message}"):
        triton_gn.group_norm(X, num_groups)


@pytest.mark.parametrize("shape", [(), (6,)], ids=["rank0", "rank1"])
def test_rank_of_the_input_is_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"at least 2 dimensions, \(N, C, \*\); got shape \("):
        triton_gn.group_norm(torch.ones(shape), 2)


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


REFUSED: list[tuple[Callable[[Tensor], Any], str]] = [
    (torch.Tensor.int, r"float16, .* got torch.int32\. Convert it .*\.float\(\)"),
    (torch.Tensor.bool, r"float16, .* got torch.bool\. Convert it .*\.float\(\)"),
    (lambda t: t.to(torch.complex64), "float16, .* got torch.complex64"),
    (lambda t: t.to(torch.float8_e4m3fn), "float16, .* got torch.float8_e4m3fn"),
    (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        r"float16, .*qint8.*\.dequantize\(\)",
    ),
    (torch.Tensor.to_sparse, r"dense; got layout .*sparse_coo\. .*\.to_dense\("),
    (torch.Tensor.tolist, "a Tensor; got list"),
    (torch.Tensor.numpy, "a Tensor; got ndarray"),
    (lambda _: 1.0, "a Tensor; got float"),
]


@pytest.mark.parametrize(("name", "n", "refused"), pairwise(OPERANDS, (0, 2), REFUSED))
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning")
def test_only_dense_tensors_of_floats_are_taken(
    name: str, n: int, refused: tuple[Callable[[Tensor], Any], str]
) -> None:
    convert, message = refused
    operands: dict[str, Any] = make_operands(shape=(n, *SHAPE[1:]))
    operands[name] = convert(operands[name])
    with pytest.raises(TypeError, match=f"group_norm: {name} must be {message}"):
        fused(None, operands)


@pytest.mark.parametrize("name", OPERANDS[1:])
def test_devices_are_checked(name: str) -> None:
    operand = make_operands()[name].to("meta")
    message = rf"{name} must be on .* device cpu; got meta\. .*{name}\.to\('cpu'\)"
    with pytest.raises(ValueError, match=f"group_norm: {message}"):
        fused(None, {"input": X, name: operand})


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


# the names of operands, their rule, and shapes that break it; PyTorch would broadcast many of them
WRONG_SHAPES: list[tuple[tuple[str, ...], str, list[tuple[int, ...]]]] = [
    (("weight", "bias"), "shape (6,), one value per channel of input", [(), (7,), (6, 1), (1, 6)]),
    (
        PER_SAMPLE,
        "shape (6,), (1, 6) or (2, 6), also with trailing sizes of 1 up to input's rank",
        [
            (), (7,), (1,), (2, 7), (3, 6), (0, 6), (6, 2), (6, 1), (6, 1, 1), (2, 6, 5, 4),
            (2, 6, 1, 4), (1, 6, 5), (1, 2, 6), (2, 6, 1, 1, 1), (1, 1, 1, 1),
        ],
    ),
    (
        ("residual",),
        "input's shape (2, 6, 5, 4)",
        [
            (), (6,), (2, 6), (6, 5, 4), (1, 6, 5, 4), (2, 1, 5, 4), (2, 6, 1, 1), (2, 6, 5, 1),
            (2, 6, 4, 5), (2, 6, 20), (1, 2, 6, 5, 4), (2, 6, 5, 4, 1), (3, 6, 5, 4),
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rule", "shape"),
    [
        pytest.param(name, rule, shape, id=f"{name} {shape}")
        for names, rule, shapes in WRONG_SHAPES
        for name in names
        for shape in shapes
    ],
)
def test_shapes_are_checked(name: str, rule: str, shape: tuple[int, ...]) -> None:
    message = re.escape(f"group_norm: {name} must have {rule}; got {shape}")
    with pytest.raises(ValueError, match=message):
        fused(None, {"input": X, name: torch.ones(shape)})


def test_fused_operands_are_named() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        triton_gn.group_norm(X, GROUPS, None, None, 1e-5, "silu")  # type: ignore[call-arg]
