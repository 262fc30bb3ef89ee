"""Calls of group_norm by name, the same operation by operation in PyTorch, and their gradients."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import triton_gn
from tests.support.activations import ACTIVATIONS
from tests.support.tensors import channels_innermost, random

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PER_SAMPLE = ("scale", "shift", "pre_add")
FUSED = (*PER_SAMPLE, "residual")
OPERANDS = ("input", "weight", "bias", *FUSED)
SUBSETS = [names for size in range(5) for names in itertools.combinations(FUSED, size)]
AFFINES = (("weight", "bias"), ("weight",), ("bias",), ())
SHAPE, GROUPS = (2, 6, 5, 4), 3
LAYOUTS = (False, True)
each_layout = pytest.mark.parametrize("channels_last", LAYOUTS, ids=["contig", "cl"])


def short(value: object) -> str:
    return "+".join(value) or "alone" if isinstance(value, tuple) else str(value).split(".")[-1]


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
    affine: tuple[str, ...] = ("weight", "bias"),
) -> dict[str, Tensor]:
    """Draw the arguments of group_norm by name.

    weight is not 1, bias not 0, scale per sample, shift per channel, pre_add one row.
    """
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
    present = ("input", *affine, *names)
    return {name: value.to(dtype) for name, value in values.items() if name in present}


def composed(
    activation: str | None, operands: Mapping[str, Tensor], num_groups: int = GROUPS
) -> Tensor:
    """Compute the formula, an operation after the other, each rounding to the dtype."""
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


def fused(activation: str | None, operands: Mapping[str, Any], num_groups: int = GROUPS) -> Tensor:
    return triton_gn.group_norm(num_groups=num_groups, activation=activation, **operands)


def step(
    group_norm: Callable[..., Tensor],
    activation: str | None,
    operands: Mapping[str, Tensor],
    dy: Tensor,
    num_groups: int = GROUPS,
) -> dict[str, Tensor]:
    """Return y, and the gradient of each operand by its name."""
    leaves = {name: value.detach().requires_grad_() for name, value in operands.items()}
    y = group_norm(activation, leaves, num_groups)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def in_float64(
    activation: str | None, operands: Mapping[str, Tensor], dy: Tensor, num_groups: int = GROUPS
) -> dict[str, Tensor]:
    doubled = {name: value.double() for name, value in operands.items()}
    return step(composed, activation, doubled, dy.double(), num_groups)
