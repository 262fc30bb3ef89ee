"""group_norm of a spatially sharded input: the two halves of split with one small collective
between them."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from triton_gn import reference
from triton_gn.ops import autograd, context, launcher, layout
from triton_gn.ops.call import Call
from triton_gn.ops.launches import Half
from triton_gn.ops.stats import own_moments
from triton_gn.reference import Operands, compute_dtype

Shards = Sequence[dist.ProcessGroup]
_OF_INPUT = ("x", "pre_add")  # whose gradients need the sums over whole groups
_TENSORS = len(Operands._fields)


class Step(NamedTuple):
    """A call of one process: its part of the operands and, in a backward, dy and stats."""

    operands: Operands
    call: Call
    dy: Tensor | None = None
    stats: Tensor | None = None  # (N, G, 3), of all processes


class Way(Protocol):
    """Interface to the computation on a process's own part, by kernels or by formulas."""

    def moments(self, step: Step) -> Tensor:
        """Return count, mean, mean_lo and m2: (4, N, G)."""

    def apply(self, step: Step, parts: Tensor, with_stats: bool) -> tuple[Tensor, Tensor | None]:
        """Return y and, if asked for, stats, from the moments of all parts (N, G, 4, parts)."""

    def backward_reduce(
        self, step: Step, needs: Sequence[bool]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return both sums (N, G, 2), and all gradients but the input's, in the compute dtype."""

    def backward_apply(self, step: Step, sums: Tensor, needs: Sequence[bool]) -> dict[str, Tensor]:
        """Return the input's gradients; pre_add's is in the compute dtype.

        ``sums`` are divided by the elements that a group has in this process.
        """


class ByKernels:
    """Run the kernels, under settings of split."""

    def moments(self, step: Step) -> Tensor:
        return own_moments(step.operands, step.call)

    def apply(self, step: Step, parts: Tensor, with_stats: bool) -> tuple[Tensor, Tensor | None]:
        return autograd.forward(step.operands, step.call, with_stats, parts)

    def backward_reduce(
        self, step: Step, needs: Sequence[bool]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sums, grads = self._backward(step, needs, "reduce")
        assert sums is not None
        return sums.sum(-1), grads

    def backward_apply(self, step: Step, sums: Tensor, needs: Sequence[bool]) -> dict[str, Tensor]:
        return self._backward(step, needs, "apply", sums)[1]

    def _backward(
        self, step: Step, needs: Sequence[bool], half: Half, sums: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        operands = autograd.native(step.operands)
        grads = autograd.empty_gradients(operands, needs, compute_dtype(operands.x))
        assert step.dy is not None
        assert step.stats is not None
        dy = autograd.beside(step.dy, operands.x)
        sums = launcher.backward(operands, step.call, dy, step.stats, grads, half, sums)
        return sums, grads


class ByFormulas:
    """Run the formulas in plain PyTorch."""

    def moments(self, step: Step) -> Tensor:
        operands = step.operands
        count, *floats = reference.moments(operands.x, step.call.groups, operands.pre_add)
        return torch.stack([count.to(floats[0].dtype), *floats])

    def apply(self, step: Step, parts: Tensor, with_stats: bool) -> tuple[Tensor, Tensor | None]:
        operands, call = step.operands, step.call
        merged = reference.merge(*parts.unbind(2))
        y = reference.group_norm_apply(operands, merged, call.eps, call.activation)
        rstd = (merged.m2 / merged.count + call.eps).rsqrt()
        stats = torch.stack([merged.mean, merged.mean_lo, rstd], -1)
        return layout.like(y.to(call.y_dtype), layout.native(operands.x)[0]), stats

    def backward_reduce(
        self, step: Step, needs: Sequence[bool]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x_hat = _x_hat(step)
        names = [name for name, needed in zip(Operands._fields, needs, strict=True) if needed]
        dx_hat, *grads = _of_affine(step, x_hat, (True, *needs[1:]))
        products = torch.stack([dx_hat, dx_hat * x_hat])
        sums = products.reshape(2, x_hat.shape[0], step.call.groups, -1).sum(-1).movedim(0, -1)
        return sums, dict(zip(names, grads, strict=True))

    def backward_apply(self, step: Step, sums: Tensor, needs: Sequence[bool]) -> dict[str, Tensor]:
        x, pre_add, x_hat = step.operands.x, step.operands.pre_add, _x_hat(step)
        assert step.stats is not None
        (dx_hat,) = _of_affine(step, x_hat, (True, *[False] * (_TENSORS - 1)))
        means = sums / (x[0].numel() // step.call.groups)
        of_groups = (*means.unbind(-1), step.stats[..., 2])
        mean, mean_x_hat, rstd = (reference.per_group(t, x) for t in of_groups)
        dx = rstd * (dx_hat - mean - x_hat * mean_x_hat)
        grads = {"x": dx.to(x.dtype)} if needs[0] else {}
        if pre_add is not None and needs[Operands._fields.index("pre_add")]:
            per_sample = dx.reshape(*x.shape[:2], -1).sum(-1)
            grads["pre_add"] = per_sample.sum_to_size(pre_add.shape)
        return grads


def _x_hat(step: Step) -> Tensor:
    assert step.stats is not None
    return reference.normalise_by(step.operands, *step.stats.unbind(-1))


def _of_affine(step: Step, x_hat: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients of x_hat, in the place of x, and of the operands that ``needs`` names.

    All but the residual's are in the compute dtype.
    """

    def formulas(*tensors: Tensor | None) -> Tensor:
        operands = Operands._make(tensors)
        return reference.affine(operands.x, operands, step.call.activation)

    assert step.dy is not None
    *per_channel, residual = step.operands[1:]
    wide = (None if t is None else t.to(x_hat.dtype) for t in per_channel)
    return reference.pull_back(formulas, (x_hat, *wide, residual), needs, step.dy.to(x_hat.dtype))


def gathered(moments: Tensor, shards: Shards) -> Tensor:
    """Gather the (4, N, G) moments of each process to (N, G, 4, parts)."""
    _, n, groups = moments.shape
    # of the same meaning; the second name is deprecated where there is the first
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    for shard in shards:
        parts = moments.new_empty(dist.get_world_size(shard) * moments.shape[0], n, groups)
        all_gather(parts, moments, group=shard)
        moments = parts
    return moments.reshape(-1, 4, n, groups).permute(2, 3, 1, 0).contiguous()


def summed(tensors: Sequence[Tensor], shards: Shards) -> list[Tensor]:
    """Sum each tensor over all processes, in one message."""
    if not tensors:
        return []
    message = torch.cat([t.reshape(-1) for t in tensors])
    for shard in shards:
        dist.all_reduce(message, group=shard)
    parts = message.split([t.numel() for t in tensors])
    return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]


def group_norm(operands: Operands, call: Call, way: Way, shards: Shards) -> Tensor:
    """Return y of this process's x, which may be empty; the call has settings of split."""
    if context.records(operands):
        y_recorded: Tensor = _ShardedFunction.apply(*operands, call, way, shards)
        return y_recorded
    step = Step(operands, call)
    _, parts = _exchanged(step, way, shards)
    y, _ = _applied(step, way, parts, with_stats=False)
    return y


def _exchanged(step: Step, way: Way, shards: Shards) -> tuple[Tensor, Tensor]:
    """Return the moments of this process's part (4, N, G) and of all parts (N, G, 4, parts)."""
    x = step.operands.x
    if x.numel():
        own = way.moments(step)
    else:
        sizes = 4, x.shape[0], step.call.groups
        own = torch.zeros(sizes, dtype=compute_dtype(x), device=x.device)
    return own, gathered(own, shards)


def _applied(step: Step, way: Way, parts: Tensor, with_stats: bool) -> tuple[Tensor, Tensor | None]:
    """Return y and, if asked for, stats."""
    x = step.operands.x
    if x.numel():
        return way.apply(step, parts, with_stats)
    return torch.empty_like(x, dtype=step.call.y_dtype), parts.new_empty(*parts.shape[:2], 3)


class _ShardedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, call, way, shards = inputs
        operands = Operands(*tensors)
        step = Step(operands, call)
        own, parts = _exchanged(step, way, shards)
        y, stats = _applied(step, way, parts, with_stats=True)
        assert stats is not None
        share = own[0, ..., None] / parts[:, :, 0].sum(-1, keepdim=True)  # of a group's elements
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
        step = Step(operands, ctx.call, dy, stats)
        named = _backward(step, share, ctx.way, ctx.shards, needs)
        grads = [
            None if operand is None or name not in named else named[name].to(operand.dtype)
            for name, operand in operands._asdict().items()
        ]
        if dresidual is not None:
            grads[-1] = dresidual
        return *grads, None, None, None


def _backward(
    step: Step, share: Tensor, way: Way, shards: Shards, needs: list[bool]
) -> dict[str, Tensor]:
    """Return the gradients that ``needs`` names, summed over processes if the operand is shared."""
    operands, is_empty = step.operands, not step.operands.x.numel()
    of_input = [n and name in _OF_INPUT for n, name in zip(needs, Operands._fields, strict=True)]
    others = [n and not of_x for n, of_x in zip(needs, of_input, strict=True)]
    if is_empty:
        sums, grads = share.new_zeros(*share.shape[:2], 2), _zeros(operands, others)
    else:
        sums, grads = way.backward_reduce(step, others)
    shared = [name for name in grads if name != "residual"]
    to_sum = [grads[name] for name in shared]
    if any(of_input):
        to_sum.append(sums)
    totals = summed(to_sum, shards)
    grads.update(zip(shared, totals, strict=False))
    if any(of_input):
        # ``share`` makes up for the division by the elements of this process alone
        grads |= (
            _zeros(operands, of_input)
            if is_empty
            else way.backward_apply(step, totals[-1] * share, of_input)
        )
    if "pre_add" in grads:
        (grads["pre_add"],) = summed([grads["pre_add"]], shards)
    return grads


def _zeros(operands: Operands, needs: Iterable[bool]) -> dict[str, Tensor]:
    """Return the gradients of an empty x."""
    wide = compute_dtype(operands.x)
    return {
        name: torch.zeros_like(t, dtype=wide)
        for (name, t), needed in zip(operands._asdict().items(), needs, strict=True)
        if needed
    }
