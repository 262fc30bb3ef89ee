"""Public functions: group_norm, and its two halves, statistics and normalisation."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from triton_gn import reference
from triton_gn.checks import (
    PER_SAMPLE,
    check,
    check_parts,
    check_stats,
    checked_eps,
    checked_groups,
)
from triton_gn.ops import context, dispatch
from triton_gn.reference import Moments, Operands


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
    """Normalise each group of channels of each sample, fused with the operations around it.

    ``n = norm(input + pre_add) * weight + bias`` and
    ``y = activation(n * (1 + scale) + shift + residual)``, where norm subtracts each group's mean
    and divides by ``sqrt(var + eps)``, with the biased variance (Wu and He 2018,
    https://arxiv.org/abs/1803.08494). Differentiable twice in every tensor.

    Args:
        input: (N, C, *) of float16, bfloat16, float32 or float64, contiguous or channels-last in
            any rank; other strides are copied once. The arithmetic is float32, float64 for float64.
        num_groups: number of groups; must divide C.
        weight: (C,), or None for 1. This and all further tensors may have any of these dtypes.
        bias: (C,), or None for 0.
        eps: added to the variance.
        activation: None, "silu", "gelu", "leaky_relu(0.2)" or another name from the list in
            docs/math.md.
        scale: (C,), (1, C) or (N, C), also with trailing sizes of 1 up to input's rank.
        shift: as scale; together they are AdaGN, also known as FiLM.
        residual: of input's shape, copied once if its strides differ.
        pre_add: as scale; for instance a time embedding, or the bias of the preceding convolution.

    Returns:
        y of input's shape, dtype and memory format. Under CUDA autocast y is float32, as PyTorch's,
        unless ``autocast_policy("keep")`` is set.

    Raises:
        TypeError: an operand is not a dense tensor of these dtypes, num_groups not an integer, eps
            not a float, or activation not a string.
        ValueError: the shapes or devices do not fit together, a group has one value, or the
            activation is unknown.
    """
    tensors = input, weight, bias, scale, shift, pre_add, residual
    if is_overridden(tensors):
        y: Tensor = _overridden(tensors, num_groups, eps, activation)
        return y
    if type(num_groups) is not int:
        num_groups = checked_groups(num_groups)
    if type(eps) is not float:
        eps = checked_eps(eps)
    operands = Operands(*tensors)
    check(operands, num_groups, activation)
    if scale is not None or shift is not None or pre_add is not None:
        operands = in_rows(operands)
    return dispatch.group_norm(operands, num_groups, eps, activation or "none")


def _overridden(tensors: Sequence[Any], num_groups: Any, eps: Any, activation: Any) -> Any:
    """Call group_norm through the ``__torch_function__`` of a mode or of an operand's class."""
    input, weight, bias, *fused_tensors = tensors
    fused: Any = dict(zip(Operands._fields[3:], fused_tensors, strict=True))
    if any(map(context.is_expanded_weight, tensors)):  # these support PyTorch's function only
        x = reference.prologue(input, fused["pre_add"])
        n = F.group_norm(x, num_groups, weight, bias, eps)
        n = reference.epilogue(n, Operands(input, **fused), activation or "none")
        return n.to(input.dtype)
    arguments = (input, num_groups, weight, bias, eps)
    return handle_torch_function(group_norm, tensors, *arguments, activation=activation, **fused)


class GroupNormStats(NamedTuple):
    """Statistics of the groups of an input or of a part of it. Statistics of parts can be merged.

    All fields are (N, G) on the input's device; count is int64, the others are float32, or float64
    for float64 input. mean and m2 are differentiable. The mean is the sum of mean and mean_lo; its
    whole gradient is that of mean, and mean_lo has none.
    """

    count: Tensor  # type: ignore[assignment]  # elements of a group; replaces a method of tuple
    mean: Tensor
    mean_lo: Tensor  # rounding error of mean: the accurate mean is mean + mean_lo
    m2: Tensor  # sum of squared deviations; the biased variance is m2 / count

    def merge(self, *others: "GroupNormStats") -> "GroupNormStats":
        """Return the statistics of all parts together.

        The parts are disjoint, and their order is free. All are merged at once in float64 (Chan,
        Golub, LeVeque 1979). Parts of count 0 are ignored. Differentiable.

        Raises:
            TypeError: a part is not a GroupNormStats.
            ValueError: shapes, dtypes or devices differ.
        """
        check_parts(self, others)
        if not others:
            return self
        parts = (torch.stack(fields, -1) for fields in zip(self, *others, strict=True))
        return GroupNormStats(*reference.merge(*parts))


def group_norm_stats(
    input: Tensor, num_groups: int, pre_add: Tensor | None = None
) -> GroupNormStats:
    """Return the statistics of each group of ``input + pre_add``, without normalising it.

    If an input never exists in one piece (VAE tiles, video shards), compute statistics per piece,
    merge them (:meth:`GroupNormStats.merge`), then normalise each piece by
    :func:`group_norm_apply`. Differentiable twice in both tensors; backward reads input once. Under
    torch.compile, torch.func and forward mode it runs in plain PyTorch operations.

    Args:
        input: (N, C, *) as for :func:`group_norm`. A group may have one element, or none.
        num_groups: number of groups; must divide C.
        pre_add: as for :func:`group_norm`.

    Raises:
        TypeError, ValueError: as :func:`group_norm`.
    """
    if is_overridden(tensors := (input, pre_add)):
        stats = handle_torch_function(group_norm_stats, tensors, input, num_groups, pre_add)
        return stats  # of any class
    num_groups = checked_groups(num_groups)
    operands = Operands(input, pre_add=pre_add)
    check(operands, num_groups, None, is_part=True)
    moments = dispatch.group_norm_stats(input, num_groups, in_rows(operands).pre_add)
    return GroupNormStats(*moments)


def group_norm_apply(
    input: Tensor,
    stats: GroupNormStats,
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
    """Compute :func:`group_norm` with precomputed statistics.

    With the statistics ``group_norm_stats(input, num_groups, pre_add)``, the result is that of
    ``group_norm`` up to rounding. Differentiable twice in every tensor but ``stats.mean_lo``.
    Gradients flow through merged statistics, so tiles or shards get the gradients of the whole
    input. Input's gradient has two terms, direct and through the statistics, each rounded to its
    dtype. Under torch.compile, torch.func and forward mode it runs in plain PyTorch operations.

    Args:
        input: (N, C, *), the input of the statistics, or a part of it. May be empty.
        stats: statistics (N, G) of the whole input; float64 for float64 input, else float32.
        weight, bias, eps, activation, scale, shift, residual: as for :func:`group_norm`.
        pre_add: the pre_add of the statistics.

    Returns:
        y of input's shape, dtype and memory format, as :func:`group_norm`.

    Raises:
        TypeError, ValueError: as :func:`group_norm`; stats is not a GroupNormStats, or does not fit
            input; on the CPU, a group of a non-empty input has count 0. On a GPU this check would
            have to synchronise: the group's y is NaN instead.
    """
    tensors = input, weight, bias, scale, shift, pre_add, residual
    fields = stats if isinstance(stats, tuple) else (stats,)
    if is_overridden((*tensors, *fields)):
        fused: Any = dict(zip(Operands._fields[3:], tensors[3:], strict=True))
        arguments = ((*tensors, *fields), input, stats, weight, bias, eps)
        y = handle_torch_function(group_norm_apply, *arguments, activation=activation, **fused)
        return y  # of any class
    eps = checked_eps(eps)
    operands = Operands(*tensors)
    if not isinstance(stats, GroupNormStats):
        raise TypeError(
            f"group_norm_apply: stats must be a GroupNormStats; got {type(stats).__name__}. "
            "Take it from group_norm_stats."
        )
    check(operands, 1, activation, is_part=True)
    check_stats(stats, input)
    return dispatch.group_norm_apply(in_rows(operands), Moments(*stats), eps, activation or "none")


def is_overridden(operands: Iterable[Any]) -> bool:
    """Return whether a mode or an operand's class overrides the call by ``__torch_function__``.

    torch.compile traces such overrides by itself.
    """
    return has_torch_function(operands) and not torch.compiler.is_compiling()


def in_rows(operands: Operands) -> Operands:
    """Remove the trailing sizes of 1 from scale, shift and pre_add."""
    for name in PER_SAMPLE:
        values = getattr(operands, name)
        if values is not None and values.ndim > 2:
            operands = operands._replace(**{name: values.flatten(1)})
    return operands
