"""group_norm as a function: every error has its name here."""

import torch
from torch import Tensor

from triton_gn.ops import dispatch

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each group of channels of each sample, then scale and shift each channel.

    ``y = (input - mean) / sqrt(var + eps) * weight + bias``, with the mean and the biased variance
    of each group (Wu and He 2018, https://arxiv.org/abs/1803.08494). Differentiable, twice as well.

    Args:
        input: (N, C, *) of float16, bfloat16, float32 or float64, contiguous or channels-last in
            any rank; other strides are copied once. The arithmetic is float32, float64 for float64.
        num_groups: how many groups C is cut into; must divide C.
        weight: (C,) of any of these dtypes, or None for 1.
        bias: (C,) of any of these dtypes, or None for 0.
        eps: added to the variance.

    Returns:
        y of input's shape, dtype and memory format; float32 under CUDA autocast, as PyTorch's.

    Raises:
        TypeError: an operand is no dense tensor of these dtypes, or num_groups no integer.
        ValueError: the shapes or devices do not fit together, or there is one value per group.
    """
    try:
        if dispatch.is_plain(input, num_groups, weight, bias):
            return torch.group_norm(input, num_groups, weight, bias, eps)
    except Exception:  # whatever PyTorch says of bad operands, check says it better
        check(input, num_groups, weight, bias)
        raise
    check(input, num_groups, weight, bias)
    return dispatch.group_norm(input, num_groups, weight, bias, eps)


def check(input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise what ``group_norm`` promises to raise."""
    _check_tensor("input", input)
    if input.ndim < 2:
        raise ValueError(
            "group_norm: input must have at least 2 dimensions, (N, C, *); "
            f"got shape {tuple(input.shape)}. Add a batch dimension with input.unsqueeze(0)."
        )
    if not isinstance(num_groups, int | torch.SymInt) or isinstance(num_groups, bool):
        raise TypeError(
            f"group_norm: num_groups must be an int; got {num_groups!r} "
            f"of type {type(num_groups).__name__}."
        )
    channels = input.shape[1]
    if num_groups <= 0:
        raise ValueError(
            f"group_norm: num_groups must be at least 1; got {num_groups}. "
            f"A divisor of the {channels} channels is needed."
        )
    if channels % num_groups != 0:
        raise ValueError(
            f"group_norm: {channels} channels cannot be split into {num_groups} groups; "
            f"num_groups must divide num_channels (nearest: {_nearest(channels, num_groups)})."
        )
    if weight is not None:
        _check_parameter("weight", weight, input)
    if bias is not None:
        _check_parameter("bias", bias, input)
    if input.numel() == num_groups:
        raise ValueError(
            "group_norm: each group must have more than 1 value, else every output is 0; "
            f"got shape {tuple(input.shape)} with {num_groups} groups. Take fewer groups."
        )


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"group_norm: {name} must be a Tensor; got {type(tensor).__name__}.")
    if tensor.dtype not in _FLOATS:
        raise TypeError(
            f"group_norm: {name} must be float16, bfloat16, float32 or float64; "
            f"got {tensor.dtype}. Convert it first, e.g. with {name}.float()."
        )
    if tensor.is_nested:
        raise TypeError(
            f"group_norm: {name} must be dense; got a nested tensor. "
            f"Convert it first with torch.nested.to_padded_tensor, or normalise its parts."
        )
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"group_norm: {name} must be dense; got layout {tensor.layout}. "
            f"Convert it first with {name}.to_dense()."
        )


def _check_parameter(name: str, parameter: Tensor, input: Tensor) -> None:
    _check_tensor(name, parameter)
    channels = input.shape[1]
    if parameter.ndim != 1 or parameter.shape[0] != channels:
        raise ValueError(
            f"group_norm: {name} must have shape ({channels},), one value per channel of input; "
            f"got {tuple(parameter.shape)}."
        )
    if parameter.device != input.device:
        raise ValueError(
            f"group_norm: {name} must be on input's device {input.device}; "
            f"got {parameter.device}. Move it with {name}.to({str(input.device)!r})."
        )


def _nearest(channels: int, num_groups: int) -> str:
    """The divisors of ``channels`` next to ``num_groups``, below and above."""
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    below = [d for d in divisors if d < num_groups][-1:]
    above = [d for d in divisors if d > num_groups][:1]
    return ", ".join(map(str, below + above))
