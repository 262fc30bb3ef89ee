"""The public functions: group_norm, and its statistics apart from the normalisation."""

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
        activation: None, or the name of one: "silu", "gelu", "relu" and others that docs/math.md
            lists.
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
            activation is unknown.
    """
    tensors = input, weight, bias, scale, shift, pre_add, residual
    if has_torch_function(tensors) and not torch.compiler.is_compiling():
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
    """Call group_norm as a mode or the class of an operand asks for."""
    input, weight, bias, *rest = tensors
    fused: Any = dict(zip(Operands._fields[3:], rest, strict=True))
    if any(map(context.is_expanded_weight, tensors)):  # it knows PyTorch's function only
        x = reference.prologue(input, fused["pre_add"])
        n = F.group_norm(x, num_groups, weight, bias, eps)
        n = reference.epilogue(n, Operands(input, **fused), activation or "none")
        return n.to(input.dtype)
    arguments = (input, num_groups, weight, bias, eps)
    return handle_torch_function(group_norm, tensors, *arguments, activation=activation, **fused)


class GroupNormStats(NamedTuple):
    """Statistics of the groups of an input or of a part of one; those of parts merge.

    All (N, G) on the input's device; count int64, the others float32, float64 for float64 input.
    mean and m2 are differentiable. The mean is one number in two parts, all of whose gradient goes
    by the first one: mean_lo has none.
    """

    count: Tensor  # type: ignore[assignment]  # elements of a group; no longer a tuple's method
    mean: Tensor
    mean_lo: Tensor  # what float32 cannot hold of the mean: it is mean + mean_lo
    m2: Tensor  # sum of squared deviations; the biased variance is m2 / count

    def merge(self, *others: "GroupNormStats") -> "GroupNormStats":
        """Return the statistics of all parts together.

        The parts are disjoint and come in any order; all are merged at once (Chan, Golub, LeVeque
        1979), in float64. Parts of count 0 do not matter. Differentiable.

        Raises:
            TypeError: another is no GroupNormStats.
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

    Where an input is never in one piece, those of its tiles, or of its shards, are merged
    (:meth:`GroupNormStats.merge`) before :func:`group_norm_apply` normalises each of them.
    Differentiable in both tensors, twice; its backward reads input once. Under torch.compile,
    torch.func and forward mode it runs in plain PyTorch operations.

    Args:
        input: (N, C, *) as for :func:`group_norm`. A group may have one element, or none.
        num_groups: how many groups C is cut into; must divide C.
        pre_add: as for :func:`group_norm`.

    Raises:
        TypeError, ValueError: as :func:`group_norm`.
    """
    if is_overridden(tensors := (input, pre_add)):
        found = handle_torch_function(group_norm_stats, tensors, input, num_groups, pre_add)
        return found  # of whatever class
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
    """Normalise by given statistics what :func:`group_norm` normalises by its own.

    With those of ``group_norm_stats(input, num_groups, pre_add)`` it is ``group_norm``, to the
    rounding. Differentiable in every tensor but ``stats.mean_lo``, twice, so that the gradients of
    tiles or shards by way of their merged statistics are those of the whole; input's is the sum of
    its own and what comes by way of the statistics, each rounded to its dtype. Under torch.compile,
    torch.func and forward mode it runs in plain PyTorch operations.

    Args:
        input: (N, C, *), all that the statistics are of, or a part of it. May be empty.
        stats: N and the number of groups are theirs; float64 for float64 input, else float32.
        weight, bias, eps, activation, scale, shift, residual: as for :func:`group_norm`.
        pre_add: the one that the statistics were taken with.

    Returns:
        y of input's shape, dtype and memory format, as :func:`group_norm`.

    Raises:
        TypeError, ValueError: as :func:`group_norm`; stats are none, or do not fit input; on the
            CPU, a group of a non-empty input has count 0. On a GPU, which would have to be waited
            for, its y is NaN.
    """
    tensors = input, weight, bias, scale, shift, pre_add, residual
    fields = stats if isinstance(stats, tuple) else (stats,)
    if is_overridden((*tensors, *fields)):
        fused: Any = dict(zip(Operands._fields[3:], tensors[3:], strict=True))
        arguments = ((*tensors, *fields), input, stats, weight, bias, eps)
        y = handle_torch_function(group_norm_apply, *arguments, activation=activation, **fused)
        return y  # of whatever class
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
    """Whether a mode or the class of an operand has its own idea of the call, as of PyTorch's
    functions; torch.compile sees through that by itself."""
    return has_torch_function(operands) and not torch.compiler.is_compiling()


def in_rows(operands: Operands) -> Operands:
    """Scale, shift and pre_add without their trailing sizes of 1."""
    for name in PER_SAMPLE:
        values = getattr(operands, name)
        if values is not None and values.ndim > 2:
            operands = operands._replace(**{name: values.flatten(1)})
    return operands
