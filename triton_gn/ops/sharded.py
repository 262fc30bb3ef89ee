"""group_norm of an input whose pixels are shared out among processes: the two halves of split, with
one small collective between them."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from triton_gn import reference
from triton_gn.ops import autograd, layout, prepared
from triton_gn.ops.autograd import Call
from triton_gn.reference import Operands, compute_dtype

if TYPE_CHECKING:
    Shards = Sequence[dist.ProcessGroup]

_OF_INPUT = ("x", "pre_add")  # whose gradients need the sums over whole groups
_TENSORS = len(Operands._fields)


class Way(Protocol):
    """How a process does its own part, with x not empty."""

    def moments(self, operands: Operands, call: Call) -> Tensor:
        """(4, N, G): count, mean, mean_lo, m2."""

    def apply(
        self, operands: Operands, parts: Tensor, call: Call, with_stats: bool
    ) -> tuple[Tensor, Tensor | None]:
        """y and, if asked for, stats (N, G, 3), from the parts' moments (N, G, parts, 4)."""

    def first_half(
        self, dy: Tensor, stats: Tensor, operands: Operands, call: Call, needs: Sequence[bool]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Both sums (N, G, 2), and gradients but those of the input, in the compute dtype."""

    def second_half(
        self,
        dy: Tensor,
        sums: Tensor,
        stats: Tensor,
        operands: Operands,
        call: Call,
        needs: Sequence[bool],
    ) -> dict[str, Tensor]:
        """Gradients of the input, pre_add's in the compute dtype; the sums are divided by the
        elements that a group has here."""


class ByKernels:
    """Under settings of split."""

    def moments(self, operands: Operands, call: Call) -> Tensor:
        return prepared.moments(autograd.native(operands), call.groups, call.settings)

    def apply(
        self, operands: Operands, parts: Tensor, call: Call, with_stats: bool
    ) -> tuple[Tensor, Tensor | None]:
        return autograd.forward(operands, call, with_stats, parts)

    def first_half(
        self, dy: Tensor, stats: Tensor, operands: Operands, call: Call, needs: Sequence[bool]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        operands = autograd.native(operands)
        grads = autograd.empty_gradients(operands, needs, compute_dtype(operands.x))
        dy = layout.like(dy, operands.x)
        parts = prepared.first_half(
            dy, stats, operands, grads, call.groups, call.activation, call.settings
        )
        return parts.sum(2), grads

    def second_half(
        self,
        dy: Tensor,
        sums: Tensor,
        stats: Tensor,
        operands: Operands,
        call: Call,
        needs: Sequence[bool],
    ) -> dict[str, Tensor]:
        operands = autograd.native(operands)
        grads = autograd.empty_gradients(operands, needs, compute_dtype(operands.x))
        dy = layout.like(dy, operands.x)
        prepared.second_half(
            dy, sums, stats, operands, grads, call.groups, call.activation, call.settings
        )
        return grads


class ByFormulas:
    """In plain PyTorch."""

    def moments(self, operands: Operands, call: Call) -> Tensor:
        count, *rest = reference.moments(operands.x, call.groups, operands.pre_add)
        return torch.stack([count.to(rest[0].dtype), *rest])

    def apply(
        self, operands: Operands, parts: Tensor, call: Call, with_stats: bool
    ) -> tuple[Tensor, Tensor | None]:
        found = reference.merge(*parts.unbind(-1))
        y = reference.group_norm_apply(operands, found, call.eps, call.activation)
        rstd = (found.m2 / found.count + call.eps).rsqrt()
        stats = torch.stack([found.mean, found.mean_lo, rstd], -1)
        return layout.like(y.to(call.y_dtype), layout.native(operands.x)[0]), stats

    def first_half(
        self, dy: Tensor, stats: Tensor, operands: Operands, call: Call, needs: Sequence[bool]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x_hat = _x_hat(operands, stats)
        names = [name for name, needed in zip(Operands._fields, needs, strict=True) if needed]
        dx_hat, *found = _of_affine(dy, x_hat, operands, call, (True, *needs[1:]))
        products = torch.stack([dx_hat, dx_hat * x_hat])
        sums = products.reshape(2, x_hat.shape[0], call.groups, -1).sum(-1).movedim(0, -1)
        return sums, dict(zip(names, found, strict=True))

    def second_half(
        self,
        dy: Tensor,
        sums: Tensor,
        stats: Tensor,
        operands: Operands,
        call: Call,
        needs: Sequence[bool],
    ) -> dict[str, Tensor]:
        x, pre_add = operands.x, operands.pre_add
        x_hat, rstd = _x_hat(operands, stats), stats[..., 2]
        (dx_hat,) = _of_affine(dy, x_hat, operands, call, (True, *[False] * (_TENSORS - 1)))
        means = sums / (x[0].numel() // call.groups)
        mean, mean_x_hat, rstd = (_spread(t, x) for t in (*means.unbind(-1), rstd))
        dx = rstd * (dx_hat - mean - x_hat * mean_x_hat)
        grads = {"x": dx.to(x.dtype)} if needs[0] else {}
        if pre_add is not None and needs[Operands._fields.index("pre_add")]:
            per_sample = dx.reshape(*x.shape[:2], -1).sum(-1)
            grads["pre_add"] = per_sample.sum_to_size(pre_add.shape)
        return grads


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """(N, G) made to broadcast against x."""
    return reference.per_channel(values.repeat_interleave(x.shape[1] // values.shape[1], 1), x)


def _x_hat(operands: Operands, stats: Tensor) -> Tensor:
    mean, mean_lo, rstd = stats.unbind(-1)
    centred = reference.centred(operands.x, mean, mean_lo, operands.pre_add)
    return centred * _spread(rstd, operands.x)


def _of_affine(
    dy: Tensor, x_hat: Tensor, operands: Operands, call: Call, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x_hat, in the place of x, and of those operands that ``needs`` names; in the
    compute dtype, but the residual's."""

    def formulas(*tensors: Tensor | None) -> Tensor:
        given = Operands._make(tensors)
        return reference.affine(given.x, given, call.activation)

    *per_channel, residual = operands[1:]
    wide = (None if t is None else t.to(x_hat.dtype) for t in per_channel)
    return reference.pull_back(formulas, (x_hat, *wide, residual), needs, dy.to(x_hat.dtype))


def gathered(moments: Tensor, shards: "Shards") -> Tensor:
    """(N, G, parts, 4) of all processes, from the (4, N, G) of each."""
    _, n, groups = moments.shape
    # of the same meaning; the second name is deprecated where there is the first
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    for shard in shards:
        parts = moments.new_empty(dist.get_world_size(shard) * moments.shape[0], n, groups)
        all_gather(parts, moments, group=shard)
        moments = parts
    return moments.reshape(-1, 4, n, groups).permute(2, 3, 0, 1).contiguous()


def summed(tensors: Sequence[Tensor], shards: "Shards") -> list[Tensor]:
    """Each of them over all processes, in one message."""
    if not tensors:
        return []
    message = torch.cat([t.reshape(-1) for t in tensors])
    for shard in shards:
        dist.all_reduce(message, group=shard)
    parts = message.split([t.numel() for t in tensors])
    return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]


def group_norm(operands: Operands, call: Call, way: Way, shards: "Shards") -> Tensor:
    """y of this process's x, which may be empty; ``call`` with settings of split."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        y_recorded: Tensor = _ShardedFunction.apply(*operands, call, way, shards)
        return y_recorded
    y, _, _ = _forward(operands, call, way, shards, with_stats=False)
    return y


def _forward(
    operands: Operands, call: Call, way: Way, shards: "Shards", with_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, stats, and which share of each group's elements is here, (N, G, 1)."""
    x = operands.x
    if x.numel():
        moments = way.moments(operands, call)
    else:
        moments = torch.zeros((4, x.shape[0], call.groups), dtype=compute_dtype(x), device=x.device)
    parts = gathered(moments, shards)
    share = moments[0, ..., None] / parts[..., 0].sum(-1, keepdim=True)
    if not x.numel():
        return torch.empty_like(x, dtype=call.y_dtype), share.new_empty(*share.shape[:2], 3), share
    return *way.apply(operands, parts, call, with_stats), share


class _ShardedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, call, way, shards = inputs
        operands = Operands(*tensors)
        y, stats, share = _forward(operands, call, way, shards, with_stats=True)
        assert stats is not None
        autograd.keep(ctx, operands, stats, call, share)
        ctx.way, ctx.shards = way, shards
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ShardedGroupNorm has no double backward, for which create_graph=True asks. "
                "Merge group_norm_stats of the shards with a differentiable collective and "
                "normalise with group_norm_apply: these are differentiable twice."
            )
        *kept, stats, share = ctx.saved_tensors
        operands = Operands(*kept)
        needs = list(ctx.needs_input_grad[:_TENSORS])
        dresidual = autograd.gradient_of_sum(ctx, dy, needs)
        found = _backward(dy, stats, share, operands, ctx, needs)
        grads = [
            None if operand is None or name not in found else found[name].to(operand.dtype)
            for name, operand in operands._asdict().items()
        ]
        if dresidual is not None:
            grads[-1] = dresidual
        return *grads, None, None, None


def _backward(
    dy: Tensor, stats: Tensor, share: Tensor, operands: Operands, ctx: Any, needs: list[bool]
) -> dict[str, Tensor]:
    """Gradients of the operands that ``needs`` names, those that processes share summed up."""
    call, shards, x = ctx.call, ctx.shards, operands.x
    way: Way = ctx.way
    of_input = [n and name in _OF_INPUT for n, name in zip(needs, Operands._fields, strict=True)]
    others = [n and not of_x for n, of_x in zip(needs, of_input, strict=True)]
    sums, found = share.new_zeros(*share.shape[:2], 2), _zeros(operands, others)
    if x.numel():
        sums, found = way.first_half(dy, stats, operands, call, others)
    shared = [name for name in found if name != "residual"]
    to_sum = [found[name] for name in shared]
    if any(of_input):
        to_sum.append(sums)
    totals = summed(to_sum, shards)
    found.update(zip(shared, totals, strict=False))
    if not any(of_input):
        return found
    if x.numel():
        # it divides by what a group has here, and all of it is what counts
        found |= way.second_half(dy, totals[-1] * share, stats, operands, call, of_input)
    else:
        found |= _zeros(operands, of_input)
    if "pre_add" in found:
        (found["pre_add"],) = summed([found["pre_add"]], shards)
    return found


def _zeros(operands: Operands, needs: Iterable[bool]) -> dict[str, Tensor]:
    """Gradients of an empty x."""
    wide = compute_dtype(operands.x)
    return {
        name: torch.zeros_like(t, dtype=wide)
        for (name, t), needed in zip(operands._asdict().items(), needs, strict=True)
        if needed
    }
