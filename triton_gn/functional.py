"""group_norm as a function: every error has its name here."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from triton_gn.ops import dispatch
from triton_gn.reference import ACTIVATIONS, Operands

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_PER_SAMPLE = ("scale", "shift", "pre_add")  # may differ from sample to sample


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    pre_add: Tensor | None = None,
) -> Tensor:
    """Normalise each group of channels of each sample, with what surrounds it in networks fused in.

    ``n = norm(input + pre_add) * weight + bias`` and
    ``y = activation(n * (1 + scale) + shift + residual)``, where norm takes from each group its
    mean and divides by its standard deviation, ``sqrt(var + eps)`` with the biased variance
    (Wu and He 2018, https://arxiv.org/abs/1803.08494). Differentiable in every tensor, twice.

    Args:
        input: (N, C, *) of float16, bfloat16, float32 or float64, contiguous or channels-last in
            any rank; other strides are copied once. The arithmetic is float32, float64 for float64.
        num_groups: how many groups C is cut into; must divide C.
        weight: (C,), or None for 1. Like every tensor that follows, of any of these dtypes.
        bias: (C,), or None for 0.
        eps: added to the variance.
        activation: "none" or None, "relu", "leaky_relu" (slope 0.01), "silu", "gelu", "gelu_tanh",
            "mish", "sigmoid" or "tanh".
        scale: (C,), (1, C) or (N, C), also with trailing sizes of 1 up to input's rank.
        shift: as scale; together they are AdaGN, also known as FiLM.
        residual: of input's shape, copied once where its strides differ.
        pre_add: as scale; for instance a time embedding, or the bias of the convolution before.

    Returns:
        y of input's shape, dtype and memory format; float32 under CUDA autocast, as PyTorch's,
        unless ``autocast_policy("keep")`` says otherwise.

    Raises:
        TypeError: an operand is no dense tensor of these dtypes, num_groups no integer, activation
            no string.
        ValueError: the shapes or devices do not fit together, there is one value per group, or the
            activation is none of those above.
    """
    # as PyTorch's own functions, for modes and subclasses; torch.compile sees through this one
    if has_torch_function_unary(input) and not torch.compiler.is_compiling():
        y = handle_torch_function(
            group_norm,
            (input,),
            input,
            num_groups,
            weight,
            bias,
            eps,
            activation=activation,
            scale=scale,
            shift=shift,
            residual=residual,
            pre_add=pre_add,
        )
        return y
    bare = scale is None and shift is None and residual is None and pre_add is None
    try:
        if bare and dispatch.is_plain(input, num_groups, weight, bias, activation):
            y = torch.group_norm(input, num_groups, weight, bias, eps)
            return y if activation is None else ACTIVATIONS[activation](y)
    except Exception:  # whatever PyTorch says of bad operands, check says it better
        check(Operands(input, weight, bias), num_groups, activation)
        raise
    operands = Operands(input, weight, bias, scale, shift, pre_add, residual)
    check(operands, num_groups, activation)
    return dispatch.group_norm(in_rows(operands), num_groups, eps, activation or "none")


def in_rows(operands: Operands) -> Operands:
    """Scale, shift and pre_add without their trailing sizes of 1."""
    flattened = {
        name: values.flatten(1)
        for name in _PER_SAMPLE
        if (values := getattr(operands, name)) is not None and values.ndim > 2
    }
    return operands._replace(**flattened) if flattened else operands


def check(operands: Operands, num_groups: int, activation: str | None) -> None:
    """Raise what ``group_norm`` promises to raise."""
    check_operands(operands, num_groups, activation)
    if operands.x.numel() == num_groups:
        raise ValueError(
            "group_norm: each group must have more than 1 value, else every output is 0; "
            f"got shape {tuple(operands.x.shape)} with {num_groups} groups. Take fewer groups."
        )


def check_operands(operands: Operands, num_groups: int, activation: str | None) -> None:
    """As ``check``, but a group may have one value: there may be more of it elsewhere."""
    input = operands.x
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
    check_activation(activation)
    for name, operand in zip(operands._fields[1:], operands[1:], strict=True):
        if operand is not None:
            _check_operand(name, operand, input)


def check_activation(activation: str | None) -> None:
    """Raise unless ``activation`` names one of ours."""
    if activation is None or (isinstance(activation, str) and activation in ACTIVATIONS):
        return
    if not isinstance(activation, str):
        raise TypeError(
            f"group_norm: activation must be None or a name, such as 'silu'; got {activation!r}."
        )
    raise ValueError(
        f"group_norm: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}. "
        "Apply any other to the result."
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


def _check_operand(name: str, operand: Tensor, input: Tensor) -> None:
    _check_tensor(name, operand)
    if not _fits(name, operand.shape, input.shape):
        # said only here: under torch.compile, text of a size would fix the size
        rule = _rule(name, input.shape)
        raise ValueError(f"group_norm: {name} must have {rule}; got {tuple(operand.shape)}.")
    if operand.device != input.device:
        raise ValueError(
            f"group_norm: {name} must be on input's device {input.device}; "
            f"got {operand.device}. Move it with {name}.to({str(input.device)!r})."
        )


def _fits(name: str, shape: Sequence[int], input_shape: Sequence[int]) -> bool:
    # size by size: torch.compile cannot compare tuples of symbols
    n, channels = input_shape[:2]
    if name == "residual":
        same = (a == b for a, b in zip(shape, input_shape, strict=False))
        return len(shape) == len(input_shape) and all(same)
    if len(shape) == 1:
        return shape[0] == channels
    if name not in _PER_SAMPLE or not 2 <= len(shape) <= len(input_shape):
        return False
    rows = shape[0] == 1 or shape[0] == n
    return rows and shape[1] == channels and all(size == 1 for size in shape[2:])


def _rule(name: str, input_shape: Sequence[int]) -> str:
    n, channels = input_shape[:2]
    if name == "residual":
        return f"input's shape {tuple(input_shape)}"
    if name not in _PER_SAMPLE:
        return f"shape ({channels},), one value per channel of input"
    return (
        f"shape ({channels},), (1, {channels}) or ({n}, {channels}), also with trailing sizes of 1 "
        "up to input's rank"
    )


def _nearest(channels: int, num_groups: int) -> str:
    """The divisors of ``channels`` next to ``num_groups``, below and above."""
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    below = [d for d in divisors if d < num_groups][-1:]
    above = [d for d in divisors if d > num_groups][:1]
    return ", ".join(map(str, below + above))
