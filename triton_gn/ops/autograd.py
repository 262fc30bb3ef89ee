"""The kernels as differentiable functions of their operands, to any order and under vmap."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_gn import reference
from triton_gn.ops import context, launcher, launches, layout
from triton_gn.ops.call import Call
from triton_gn.reference import Operands

_TENSORS = len(Operands._fields)


def group_norm(operands: Operands, call: Call) -> Tensor:
    """Return y of an eager call by the kernels."""
    if context.records(operands):
        y_recorded: Tensor = GroupNormFunction.apply(*operands, call)
        return y_recorded
    return forward(operands, call, with_stats=False)[0]


def forward(
    operands: Operands, call: Call, with_stats: bool, moments: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return y and, if asked for, stats (N, G, 3): mean, mean_lo, rstd.

    ``moments`` (N, G, 4, parts): precomputed statistics to normalise by.
    """
    operands = native(operands)
    x = operands.x
    y = layout.empty_like(x, call.y_dtype)
    stats = launches.statistics(x, x.shape[0], call.groups, 3) if with_stats else None
    launcher.forward(operands, call, y, stats, moments)
    return y, stats


def backward(
    dy: Tensor, stats: Tensor, operands: Operands, call: Call, needs: Sequence[bool]
) -> list[Tensor]:
    """Return the gradients that ``needs`` names; the residual's only if there is an activation."""
    operands = native(operands)
    grads = empty_gradients(operands, needs)
    dy = beside(dy, operands.x)
    launcher.backward(operands, call, dy, stats, grads)
    return list(grads.values())


def empty_gradients(
    operands: Operands, needs: Sequence[bool], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return an uninitialised gradient for each operand that ``needs`` names, by name.

    Those of x and the residual have the strides of x and their operand's dtype; the others are
    dense, of ``dtype`` or their operand's.
    """
    grads = {}
    for name, operand, needed in zip(Operands._fields, operands, needs, strict=True):
        if not needed or operand is None:
            continue
        if name in ("x", "residual"):
            grads[name] = layout.empty_like(operands.x, operand.dtype)
        else:
            grads[name] = torch.empty(
                operand.shape, dtype=dtype or operand.dtype, device=operand.device
            )
    return grads


def native(operands: Operands) -> Operands:
    """Return the operands as the kernels read them: dense, in memory that holds their values.

    A lazily negated tensor's memory does not, and zeros may have none.
    """
    x = layout.native(operands.x)[0]
    if x.is_neg() or x._is_zerotensor():
        x = x.clone()
    is_native = x is operands.x
    tensors: list[Any] = [x]
    for values in operands[1:-1]:
        if values is not None and (
            values.stride(-1) != 1 or values.is_neg() or values._is_zerotensor()
        ):
            is_native, values = False, values.clone(memory_format=torch.contiguous_format)
        tensors.append(values)
    residual = operands.residual
    tensors.append(None if residual is None else beside(residual, x))
    is_native = is_native and tensors[-1] is residual
    return operands if is_native else Operands(*tensors)


def beside(t: Tensor, x: Tensor) -> Tensor:
    """Return dy or the residual as the kernels read it beside a native x."""
    return layout.like(t.clone() if t.is_neg() or t._is_zerotensor() else t, x)


def keep(ctx: Any, operands: Operands, stats: Tensor, call: Call, *more: Tensor) -> None:
    """Save x, the operands per channel, the statistics and ``more`` for the backward.

    The residual is saved only if an activation follows, whose derivative needs it. Nothing of the
    output's size is saved.
    """
    residual = operands.residual
    ctx.call = call
    ctx.residual_dtype = None if residual is None else residual.dtype
    if call.activation == "none":
        residual = None
    ctx.save_for_backward(*operands._replace(residual=residual), stats, *more)


def gradient_of_sum(ctx: Any, dy: Tensor, needs: list[bool]) -> Tensor | None:
    """Return the residual's gradient if no activation follows: dy. Clear its entry of ``needs``."""
    if not needs[-1] or ctx.call.activation != "none":
        return None
    needs[-1] = False
    return dy.to(ctx.residual_dtype)


def gradients(ctx: Any, dy: Tensor, run: Any) -> list[Tensor | None]:
    """Return a gradient for each operand, None if not asked for, from ``run``: a ``backward``."""
    *kept, stats = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:_TENSORS])
    dresidual = gradient_of_sum(ctx, dy, needs)
    present = run(dy, stats, Operands(*kept), ctx.call, needs) if any(needs) else ()
    grads = reference.spread(present, needs)
    if dresidual is not None:
        grads[-1] = dresidual
    return grads


class GroupNormFunction(torch.autograd.Function):
    """Autograd function of eager calls, with the least work on the host."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        operands, call = Operands(*inputs[:_TENSORS]), inputs[_TENSORS]
        y, stats = forward(operands, call, with_stats=True)
        assert stats is not None
        keep(ctx, operands, stats, call)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # create_graph=True asks for a backward that is itself differentiable
        run = differentiable_backward if torch.is_grad_enabled() else backward
        return *gradients(ctx, dy, run), None


class TransformedGroupNormFunction(torch.autograd.Function):
    """Autograd function in the form that torch.func transforms."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        y, stats = forward(Operands(*inputs[:_TENSORS]), inputs[_TENSORS], with_stats=True)
        assert stats is not None
        return y, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        keep(ctx, Operands(*inputs[:_TENSORS]), output[1], inputs[_TENSORS])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *gradients(ctx, dy, differentiable_backward), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        fold = VmapFold(info.batch_size, inputs[0], in_dims[0])
        operands = fold.operands(inputs[:_TENSORS], in_dims[:_TENSORS])
        results = TransformedGroupNormFunction.apply(*operands, inputs[_TENSORS])
        return tuple(map(fold.undo, results)), (0, 0)


class BackwardFunction(torch.autograd.Function):
    """``backward`` as an autograd function: differentiable by the formulas, and under vmap."""

    @staticmethod
    def forward(
        call: Call, needs: Sequence[bool], dy: Tensor, stats: Tensor, *operands: Tensor | None
    ) -> tuple[Tensor, ...]:
        return tuple(backward(dy, stats, Operands._make(operands), call, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, ctx.needs = inputs[:2]
        dy, _, *operands = inputs[2:]
        ctx.save_for_backward(dy, *operands)

    @staticmethod
    def backward(ctx: Any, *d_grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, *operands = ctx.saved_tensors
        d_dy, *d_operands = double_backward(d_grads, dy, Operands(*operands), ctx.call, ctx.needs)
        return None, None, d_dy, None, *d_operands

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], call: Call, needs: Sequence[bool], *tensors: Any
    ) -> tuple[Any, Any]:
        (dy, stats, *operands), (dy_dim, stats_dim, *dims) = tensors, in_dims[2:]
        fold = VmapFold(info.batch_size, operands[0], dims[0])
        grads = BackwardFunction.apply(
            call,
            needs,
            fold.batched(dy, dy_dim),
            fold.batched(stats, stats_dim),
            *fold.operands(operands, dims, gradients=True),
        )
        grads = fold.undo_gradients(grads, operands, dims, needs)
        return grads, (0,) * len(grads)


def differentiable_backward(
    dy: Tensor, stats: Tensor, operands: Operands, call: Call, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Run ``backward`` so that autograd can differentiate it."""
    grads: tuple[Tensor, ...] = BackwardFunction.apply(call, needs, dy, stats, *operands)
    return grads


def double_backward(
    d_grads: Iterable[Tensor], dy: Tensor, operands: Operands, call: Call, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of dy and of each operand, None if absent, from those of ``backward``'s
    results."""
    is_present = [t is not None for t in operands]

    def grads_of(dy: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        same = Operands._make(reference.spread(tensors, is_present))
        grads = reference.gradients(dy, same, call.groups, call.eps, call.activation, needs)
        return tuple(grads)

    _, vjp, *_ = torch.func.vjp(grads_of, dy, *(t for t in operands if t is not None))
    d_dy, *d_operands = vjp(tuple(d_grads))
    return [d_dy, *reference.spread(d_operands, is_present)]


class VmapFold:
    """Fold a vmapped dimension into the batch, so that a vmap over group_norm is one group_norm."""

    def __init__(self, batch: int, x: Tensor, dim: int | None) -> None:
        self.batch, self.compute_dtype = batch, reference.compute_dtype(x)
        self.samples = (x if dim is None else x.movedim(dim, 0)[0]).shape[0]

    def batched(self, t: Tensor, dim: int | None) -> Tensor:
        """Fold (N, ...), with or without a vmapped dimension, to (batch * N, ...)."""
        t = t.expand(self.batch, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.flatten(0, 1)

    def undo(self, t: Tensor) -> Tensor:
        """Unfold (batch * N, ...) to (batch, N, ...)."""
        unfolded: Tensor = t.unflatten(0, (self.batch, self.samples))
        return unfolded

    def operands(
        self, operands: Sequence[Any], dims: Sequence[Any], gradients: bool = False
    ) -> Operands:
        """Fold all operands.

        For gradients each sample gets its own copy in the compute dtype: ``undo_gradients`` adds
        up the gradients of samples that share an operand.
        """
        folded: list[Tensor | None] = []
        for index, (t, dim) in enumerate(zip(operands, dims, strict=True)):
            if t is None:
                folded.append(None)
            elif index in (0, _TENSORS - 1):
                folded.append(self.batched(t, dim))
            elif dim is None and not gradients and (t.ndim == 1 or t.shape[0] == 1):
                folded.append(t)
            else:
                rows = t[None] if dim is None else t.movedim(dim, 0)
                rows = rows[:, None] if rows.ndim == 2 else rows
                rows = rows.expand(self.batch, self.samples, -1).flatten(0, 1)
                folded.append(rows.to(self.compute_dtype) if gradients else rows)
        return Operands._make(folded)

    def undo_gradients(
        self,
        grads: Iterable[Tensor],
        operands: Sequence[Any],
        dims: Sequence[int | None],
        needs: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        """Unfold the gradients of folded operands, the vmapped dimension first."""
        unfolded = []
        folded = iter(grads)
        for t, dim, needed in zip(operands, dims, needs, strict=True):
            if not needed:
                continue
            grad = self.undo(next(folded))
            shape = t.shape if dim is None else t.movedim(dim, 0).shape[1:]
            shared = len(shape) == 1 or (len(shape) == 2 and shape[0] == 1 < self.samples)
            if shared:
                grad = grad.sum(1).reshape(self.batch, *shape)
            unfolded.append(grad.to(t.dtype))
        return tuple(unfolded)
