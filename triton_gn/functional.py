"""group_norm as a function: every error has its name here."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from triton_gn import reference
from triton_gn.ops import context, dispatch, torch_path
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
        TypeError: an operand is no dense tensor of these dtypes, num_groups no integer, eps no
            float, activation no string.
        ValueError: the shapes or devices do not fit together, there is one value per group, or the
            activation is none of those above.
    """
    tensors = input, weight, bias, scale, shift, pre_add, residual
    if is_overridden(tensors):
        fused: Any = dict(zip(Operands._fields[3:], tensors[3:], strict=True))
        if any(map(context.is_expanded_weight, tensors)):  # it knows PyTorch's function only
            x = reference.prologue(input, pre_add)
            n = F.group_norm(x, num_groups, weight, bias, eps)
            n = reference.epilogue(n, Operands(input, **fused), activation or "none")
            return n.to(input.dtype)
        arguments = (input, num_groups, weight, bias, eps)
        y = handle_torch_function(group_norm, tensors, *arguments, activation=activation, **fused)
        return y  # of whatever class
    if type(num_groups) is not int:
        num_groups = checked_groups(num_groups)
    if type(eps) is not float:
        eps = checked_eps(eps)
    if scale is None and shift is None and residual is None and pre_add is None:
        try:
            plain = torch_path.plain(input, num_groups, weight, bias, eps, activation)
        except Exception:  # whatever PyTorch says of bad operands, check says it better
            check(Operands(input, weight, bias), num_groups, activation)
            raise
        if plain is not None:
            return plain
    operands = Operands(*tensors)
    check(operands, num_groups, activation)
    return dispatch.group_norm(in_rows(operands), num_groups, eps, activation or "none")


def is_overridden(operands: Iterable[Any]) -> bool:
    """Whether a mode or the class of an operand has its own idea of the call, as of PyTorch's
    functions; torch.compile sees through that by itself."""
    return has_torch_function(operands) and not torch.compiler.is_compiling()


def in_rows(operands: Operands) -> Operands:
    """Scale, shift and pre_add without their trailing sizes of 1."""
    for name in _PER_SAMPLE:
        values = getattr(operands, name)
        if values is not None and values.ndim > 2:
            operands = operands._replace(**{name: values.flatten(1)})
    return operands


def checked_groups(num_groups: Any) -> int:
    """num_groups as PyTorch takes it: an int, or what has its index, such as NumPy's integers."""
    if type(num_groups) is int or isinstance(num_groups, torch.SymInt):
        return num_groups  # type: ignore[return-value]
    try:
        if isinstance(num_groups, bool):
            raise TypeError
        return operator.index(num_groups)
    except TypeError:
        raise TypeError(
            f"group_norm: num_groups must be an int; got {num_groups!r} "
            f"of type {type(num_groups).__name__}."
        ) from None


def checked_eps(eps: Any) -> float:
    """eps as a float, of whatever PyTorch takes for one: a tensor is read now."""
    if type(eps) is float:
        return eps
    try:
        torch.group_norm(torch.empty(1, 1, 0), 1, None, None, eps)  # says what that is
    except TypeError:
        raise TypeError(
            f"group_norm: eps must be a float; got {eps!r} of type {type(eps).__name__}."
        ) from None
    return float(eps)


@context.untraced
def check(
    operands: Operands, num_groups: int, activation: str | None, is_part: bool = False
) -> None:
    """Raise what ``group_norm`` promises to raise.

    ``is_part``: a group may have one value, since there is more of it elsewhere.
    """
    input = operands.x
    _check_tensor("input", input)
    if input.ndim < 2:
        raise ValueError(
            "group_norm: input must have at least 2 dimensions, (N, C, *); "
            f"got shape {tuple(input.shape)}. Add a batch dimension with input.unsqueeze(0)."
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
            f"{_missing_batch(operands, num_groups)}"
        )
    check_activation(activation)
    for name, operand in zip(operands._fields[1:], operands[1:], strict=True):
        if operand is not None:
            _check_operand(name, operand, input)
    if not is_part and input.numel() == num_groups:
        raise ValueError(
            "group_norm: each group must have more than 1 value, else every output is 0; "
            f"got shape {tuple(input.shape)} with {num_groups} groups. Take fewer groups."
        )


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
            f"got {tensor.dtype}. Convert it first, e.g. with "
            f"{name}.{'dequantize' if tensor.is_quantized else 'float'}()."
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


def _missing_batch(operands: Operands, num_groups: int) -> str:
    """A remedy where the first dimension looks like the channels."""
    shape, weight = operands.x.shape, operands.weight
    is_likely = shape[0] % num_groups == 0 if weight is None else weight.shape == shape[:1]
    hint = f" If {tuple(shape)} lacks the batch dimension, add it with input.unsqueeze(0)."
    return hint if shape[0] and is_likely else ""


def _nearest(channels: int, num_groups: int) -> str:
    """The divisors of ``channels`` next to ``num_groups``, below and above."""
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    below = [d for d in divisors if d < num_groups][-1:]
    above = [d for d in divisors if d > num_groups][:1]
    return ", ".join(map(str, below + above))
