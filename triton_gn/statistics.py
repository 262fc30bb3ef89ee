"""Statistics apart from apply, for inputs that are never in one piece: tiles, shards."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from triton_gn import reference
from triton_gn.functional import check, checked_eps, checked_groups, in_rows, is_overridden
from triton_gn.ops import context, dispatch
from triton_gn.reference import Moments, Operands


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
        for other in others:
            if not isinstance(other, GroupNormStats):
                raise TypeError(
                    "GroupNormStats.merge: each part must be a GroupNormStats; "
                    f"got {type(other).__name__}. Take it from group_norm_stats."
                )
            for field, ours, theirs in zip(self._fields, self, other, strict=True):
                if not _are_alike(ours, theirs):
                    raise ValueError(
                        "GroupNormStats.merge: the parts must have the same shape, dtype and "
                        f"device; got {field} {_described(ours)} and {_described(theirs)}. "
                        "Take them of parts of one input."
                    )
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
    _check_stats(stats, input)
    return dispatch.group_norm_apply(in_rows(operands), Moments(*stats), eps, activation or "none")


def _are_alike(a: Tensor, b: Tensor) -> bool:
    # size by size: torch.compile cannot compare tuples of symbols
    sizes = a.ndim == b.ndim and all(i == j for i, j in zip(a.shape, b.shape, strict=True))
    return sizes and a.dtype is b.dtype and a.device == b.device


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"


@context.untraced
def _check_stats(stats: GroupNormStats, input: Tensor) -> None:
    n, channels = input.shape[:2]
    dtype = reference.compute_dtype(input)
    for field, tensor in zip(stats._fields, stats, strict=True):
        wanted = torch.int64 if field == "count" else dtype
        if tensor.dtype is not wanted or tensor.device != input.device:
            raise ValueError(
                f"group_norm_apply: stats.{field} must be {wanted} on {input.device} for this "
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
    is_known = input.is_cpu and input.numel() > 0 and context.is_eager((input, *stats))
    if is_known and not stats.count.all():
        raise ValueError(
            "group_norm_apply: every group of a non-empty input must have a count above 0; "
            f"got counts {stats.count.tolist()}. Merge the statistics of all parts first."
        )
