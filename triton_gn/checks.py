"""Check the arguments of a call. An error gives the rule, the received value and the remedy."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_gn import activations, reference
from triton_gn.ops import context
from triton_gn.reference import Operands

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_NAMES = ("input", *Operands._fields[1:])
PER_SAMPLE = ("scale", "shift", "pre_add")  # may differ from sample to sample


def checked_groups(num_groups: Any) -> int:
    """Return num_groups as an int; like PyTorch, accept integers of other types such as NumPy's."""
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
    """Return eps as a float. PyTorch decides which types are floats; a tensor is read now."""
    if type(eps) is float:
        return eps
    try:
        torch.group_norm(torch.empty(1, 1, 0), 1, None, None, eps)  # raises for other types
    except TypeError:
        raise TypeError(
            f"group_norm: eps must be a float; got {eps!r} of type {type(eps).__name__}."
        ) from None
    return float(eps)


def check(
    operands: Operands, num_groups: int, activation: str | None, is_part: bool = False
) -> None:
    """Raise the errors that ``group_norm`` documents.

    With ``is_part`` a group may have one element: the input may hold only a part of it.
    """
    if context.is_tracing():
        return context.untraced(check)(operands, num_groups, activation, is_part)
    for name, tensor in zip(_NAMES, operands, strict=True):
        if tensor is not None and not (
            isinstance(tensor, Tensor)
            and tensor.dtype in _FLOATS
            and not tensor.is_nested
            and tensor.layout is torch.strided
        ):
            raise TypeError(_no_dense_float(name, tensor))
    input = operands.x
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
        if operand is None:
            continue
        shape = operand.shape
        per_channel = len(shape) == 1 and name != "residual"
        if not (shape[0] == channels if per_channel else _fits(name, shape, input.shape)):
            # format sizes only on failure: torch.compile specialises on a size that becomes text
            rule = _rule(name, input.shape)
            raise ValueError(f"group_norm: {name} must have {rule}; got {tuple(operand.shape)}.")
        if operand.device != input.device:
            raise ValueError(
                f"group_norm: {name} must be on input's device {input.device}; "
                f"got {operand.device}. Move it with {name}.to({str(input.device)!r})."
            )
    if not is_part and input.numel() == num_groups:
        raise ValueError(
            "group_norm: each group must have more than 1 value, else every output is 0; "
            f"got shape {tuple(input.shape)} with {num_groups} groups. Take fewer groups."
        )


def check_activation(activation: str | None) -> None:
    """Raise unless ``activation`` is None or a known name."""
    if activation is None or (isinstance(activation, str) and activations.lookup(activation)):
        return
    if not isinstance(activation, str):
        raise TypeError(
            f"group_norm: activation must be None or a name, such as 'silu'; got {activation!r}."
        )
    raise ValueError(
        f"group_norm: activation must be one of {activations.NAMES}; got {activation!r}. "
        "Apply any other to the result."
    )


def _no_dense_float(name: str, tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return f"group_norm: {name} must be a Tensor; got {type(tensor).__name__}."
    if tensor.dtype not in _FLOATS:
        return (
            f"group_norm: {name} must be float16, bfloat16, float32 or float64; "
            f"got {tensor.dtype}. Convert it first, e.g. with "
            f"{name}.{'dequantize' if tensor.is_quantized else 'float'}()."
        )
    if tensor.is_nested:
        return (
            f"group_norm: {name} must be dense; got a nested tensor. "
            f"Convert it first with torch.nested.to_padded_tensor, or normalise its parts."
        )
    return (
        f"group_norm: {name} must be dense; got layout {tensor.layout}. "
        f"Convert it first with {name}.to_dense()."
    )


def _fits(name: str, shape: Sequence[int], input_shape: Sequence[int]) -> bool:
    # size by size: torch.compile cannot compare tuples of symbols
    n, channels = input_shape[:2]
    if name == "residual":
        same = (a == b for a, b in zip(shape, input_shape, strict=False))
        return len(shape) == len(input_shape) and all(same)
    if name not in PER_SAMPLE or not 2 <= len(shape) <= len(input_shape):
        return False
    rows = shape[0] == 1 or shape[0] == n
    return rows and shape[1] == channels and all(size == 1 for size in shape[2:])


def _rule(name: str, input_shape: Sequence[int]) -> str:
    n, channels = input_shape[:2]
    if name == "residual":
        return f"input's shape {tuple(input_shape)}"
    if name not in PER_SAMPLE:
        return f"shape ({channels},), one value per channel of input"
    return (
        f"shape ({channels},), (1, {channels}) or ({n}, {channels}), also with trailing sizes of 1 "
        "up to input's rank"
    )


def _missing_batch(operands: Operands, num_groups: int) -> str:
    """Return a remedy if the first dimension looks like the channels, else ""."""
    shape, weight = operands.x.shape, operands.weight
    is_likely = shape[0] % num_groups == 0 if weight is None else weight.shape == shape[:1]
    hint = f" If {tuple(shape)} lacks the batch dimension, add it with input.unsqueeze(0)."
    return hint if shape[0] and is_likely else ""


def _nearest(channels: int, num_groups: int) -> str:
    """Return the divisors of ``channels`` next to ``num_groups``, below and above."""
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    below = [d for d in divisors if d < num_groups][-1:]
    above = [d for d in divisors if d > num_groups][:1]
    return ", ".join(map(str, below + above))


def _are_alike(a: Tensor, b: Tensor) -> bool:
    # size by size: torch.compile cannot compare tuples of symbols
    sizes = a.ndim == b.ndim and all(i == j for i, j in zip(a.shape, b.shape, strict=True))
    return sizes and a.dtype is b.dtype and a.device == b.device


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"


def check_parts(stats: Any, others: Iterable[Any]) -> None:
    """Raise unless the others are statistics that can be merged with ``stats``."""
    for other in others:
        if not isinstance(other, type(stats)):
            raise TypeError(
                "GroupNormStats.merge: each part must be a GroupNormStats; "
                f"got {type(other).__name__}. Take it from group_norm_stats."
            )
        for field, ours, theirs in zip(stats._fields, stats, other, strict=True):
            if not _are_alike(ours, theirs):
                raise ValueError(
                    "GroupNormStats.merge: the parts must have the same shape, dtype and "
                    f"device; got {field} {_described(ours)} and {_described(theirs)}. "
                    "Take them of parts of one input."
                )


@context.untraced
def check_stats(stats: Any, input: Tensor) -> None:
    """Raise unless the statistics fit the input's shape, dtype and device."""
    n, channels = input.shape[:2]
    dtype = reference.compute_dtype(input)
    for field, tensor in zip(stats._fields, stats, strict=True):
        expected = torch.int64 if field == "count" else dtype
        if tensor.dtype is not expected or tensor.device != input.device:
            raise ValueError(
                f"group_norm_apply: stats.{field} must be {expected} on {input.device} for this "
                f"{input.dtype} input; got {_described(tensor)}. Take stats of parts like input."
            )
        groups = tensor.shape[1] if tensor.ndim == 2 else 0
        fits = groups > 0 and channels % groups == 0 and tensor.shape[0] == n
        if not fits or groups != stats.count.shape[1]:
            raise ValueError(
                f"group_norm_apply: stats.{field} must have shape ({n}, num_groups), num_groups "
                f"the same for all and a divisor of the {channels} channels; "
                f"got {tuple(tensor.shape)}. Take stats of parts with all of input's channels."
            )
    can_read_counts = input.is_cpu and input.numel() > 0 and context.is_eager((input, *stats))
    if can_read_counts and not stats.count.all():
        raise ValueError(
            "group_norm_apply: every group of a non-empty input must have a count above 0; "
            f"got counts {stats.count.tolist()}. Merge the statistics of all parts first."
        )
