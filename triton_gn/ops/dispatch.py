"""Choose the path of a call: kernels, PyTorch operator, formulas or PyTorch's own group_norm."""

import functools
import importlib.util
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from triton_gn import reference
from triton_gn.ops import (
    autograd,
    context,
    custom_op,
    fallback,
    layout,
    settings,
    sharded,
    stats,
)
from triton_gn.ops.call import Call
from triton_gn.ops.settings import Settings
from triton_gn.ops.sharded import Shards
from triton_gn.reference import Moments, Operands

_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def why_not_kernels(x: Tensor) -> str | None:
    """Return why x cannot run through the kernels, or None if it can."""
    device = x.device.type
    if device == "cpu" and not settings.INTERPRETED:
        return "the input is on the CPU, where kernels run only under TRITON_INTERPRET=1"
    if device not in ("cpu", "cuda"):
        return f"the input is on {x.device}, for which there are no kernels"
    if not _TRITON_IS_INSTALLED:
        return "Triton is not installed (remedy: pip install triton)"
    return _when_loaded(x.device) if device == "cuda" and not settings.INTERPRETED else None


def _when_loaded(device: torch.device) -> str | None:
    return why_not_loaded(device)


_when_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]  # no compiler traces it


@functools.cache
def why_not_loaded(device: torch.device) -> str | None:
    """Return why Triton cannot compile and load kernels for a GPU, or None if it can.

    An empty kernel is compiled and loaded, but not launched: a CUDA graph may be under capture.
    """
    from triton_gn.kernels.tile import empty_kernel

    try:
        with torch.cuda.device(device):
            _ = empty_kernel.warmup(grid=(1,), enable_fp_fusion=True).run  # loads it
    except Exception as error:  # the C compiler's, ptxas', the driver's
        text = str(error).strip().partition("\n")[0]
        return (
            f"Triton cannot build a kernel for {torch.cuda.get_device_name(device)}: "
            f"{type(error).__name__}: {text} (remedy: a C compiler and Python's headers, such as "
            "apt-get install gcc python3-dev, or a Triton that supports this GPU)"
        )
    return None


def uses_kernels(x: Tensor, backend: str) -> bool:
    """Return True if x runs through the kernels.

    Raises:
        RuntimeError: the backend is "triton" and it cannot.
    """
    if backend == "torch":
        return False
    reason = why_not_kernels(x)
    if reason is None:
        return True
    if backend == "triton":
        raise RuntimeError(
            f'group_norm: the backend is "triton", but {reason}. '
            'triton_gn.backend("auto") falls back to PyTorch.'
        )
    if x.is_cuda:
        warn_once(f"triton_gn falls back to PyTorch's group_norm, which is slower: {reason}.")
    return False


def _y_dtype(x: Tensor, autocast_policy: str) -> torch.dtype:
    # PyTorch's autocast runs group_norm in float32 on the GPU; the kernels read x as it is
    autocast = (
        x.is_cuda
        and torch.is_autocast_enabled("cuda")
        and x.dtype is not torch.float64
        and autocast_policy == "torch"
    )
    return torch.float32 if autocast else x.dtype


def group_norm(operands: Operands, num_groups: int, eps: float, activation: str) -> Tensor:
    """Return y of x's shape, for operands that ``functional`` has checked."""
    if not context.is_eager(operands):
        return _group_norm_in_context(operands, num_groups, eps, activation)
    x, current = operands.x, settings.current()
    call = Call(num_groups, eps, activation, _y_dtype(x, current.autocast_policy), current)
    if x.numel() == 0 or not uses_kernels(x, current.backend):
        return fallback.group_norm(operands, call)
    return autograd.group_norm(operands, call)


def _group_norm_in_context(
    operands: Operands, num_groups: int, eps: float, activation: str
) -> Tensor:
    """group_norm under a compiler, tracer, transform or mode, or of a tensor subclass."""
    x, compiling = operands.x, context.is_compiling()
    if context.is_dtensor(x):
        from triton_gn.ops import dtensor

        return dtensor.group_norm(operands, num_groups, eps, activation)
    if compiling:
        backend, autocast_policy, settings_text = settings.when_compiled()
        current = Settings()
    else:
        current = settings.current()
        backend, autocast_policy = current.backend, current.autocast_policy
    call = Call(num_groups, eps, activation, _y_dtype(x, autocast_policy), current)
    if context.wants_pytorch() or x.numel() == 0 or not uses_kernels(x, backend):
        return fallback.group_norm(operands, call, context.is_transformed(operands))
    as_operator = compiling or context.has_mode() or context.has_subclass(operands)
    # torch.func cannot differentiate a PyTorch operator that is written in Python
    if context.in_forward_mode() or (as_operator and context.in_functorch()):
        if not as_operator:
            warn_once(
                "triton_gn runs forward-mode derivatives in plain PyTorch operations, which are "
                "slower: the kernels have none."
            )
        y = reference.group_norm(operands, num_groups, eps, activation)
        return layout.like(y.to(call.y_dtype), layout.native(x)[0])
    if as_operator:
        if not compiling:
            settings_text = settings.to_text(current)
        constants = (num_groups, eps, activation, call.y_dtype, settings_text)
        y_of_operator: Tensor = custom_op.group_norm(*operands, *constants)[0]
        return y_of_operator
    y_transformed: Tensor = autograd.TransformedGroupNormFunction.apply(*operands, call)[0]
    return y_transformed


def _for_kernels(x: Tensor, tensors: Iterable[Tensor | None]) -> Settings | None:
    """Return the settings if kernels compute statistics or apply them, else None.

    Compilers and transforms take the formulas in plain PyTorch as they are.
    """
    if not context.is_eager(tensors) or x.numel() == 0:
        return None
    current = settings.current()
    return current if uses_kernels(x, current.backend) else None


def group_norm_stats(x: Tensor, num_groups: int, pre_add: Tensor | None) -> Moments:
    """Return the moments of x + pre_add, for operands that ``functional`` has checked."""
    current = _for_kernels(x, (x, pre_add))
    if current is None:
        return reference.moments(x, num_groups, pre_add)
    return stats.moments(x, pre_add, num_groups, current)


def group_norm_apply(operands: Operands, moments: Moments, eps: float, activation: str) -> Tensor:
    """Return y of x's shape, for operands and moments that ``functional`` has checked."""
    x = operands.x
    if context.is_compiling():
        _, autocast_policy, _ = settings.when_compiled()
    else:
        autocast_policy = settings.current().autocast_policy
    y_dtype = _y_dtype(x, autocast_policy)
    current = _for_kernels(x, (*operands, *moments))
    if current is None:
        y = reference.group_norm_apply(operands, moments, eps, activation).to(y_dtype)
        # a compiler cannot sort strides that are symbols, and keeps the format by itself; a trace
        # would keep those of its example
        if context.is_compiling() or context.is_tracing():
            return y
        return layout.like(y, layout.native(x)[0])
    call = Call(moments.mean.shape[1], eps, activation, y_dtype, current)
    return stats.apply(operands, moments, call)


def sharded_group_norm(
    operands: Operands, num_groups: int, eps: float, activation: str, shards: Shards
) -> Tensor:
    """Return y of this process's part of x, for operands that ``functional`` has checked."""
    # nothing of it is for a graph: launches, and collectives of processes that may differ
    run = _sharded_group_norm
    if context.is_compiling():
        run = torch.compiler.disable(run, reason="its processes' parts may differ")
    return run(operands, num_groups, eps, activation, shards)


def _sharded_group_norm(
    operands: Operands, num_groups: int, eps: float, activation: str, shards: Shards
) -> Tensor:
    x, current = operands.x, settings.current()
    if x.shape[0] == 0:
        return group_norm(operands, num_groups, eps, activation)
    by_kernels = x.numel() > 0 and uses_kernels(x, current.backend)
    way = sharded.ByKernels() if by_kernels else sharded.ByFormulas()
    y_dtype = _y_dtype(x, current.autocast_policy)
    split = stats.split_settings(current)
    call = Call(num_groups, eps, activation, y_dtype, split)
    return sharded.group_norm(operands, call, way, shards)
