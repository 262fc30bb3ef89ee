"""Detect torch.compile, functorch, dispatch modes and tensor subclasses around a call."""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import ParamSpec

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

P = ParamSpec("P")


def is_compiling() -> bool:
    """Return True under torch.compile and torch.export."""
    return torch.compiler.is_compiling()


def in_functorch() -> bool:
    """Return True under torch.func's vmap, grad, vjp and transforms made of them."""
    return torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Return True under forward-mode derivatives, such as torch.func.jvp."""
    return forward_ad._current_level >= 0


def has_mode() -> bool:
    """Return True under a dispatch mode, which must see the operators that run."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_tracing() -> bool:
    """Return True under torch.jit.trace."""
    return torch._C._get_tracing_state() is not None


def wants_pytorch() -> bool:
    """Return True under torch.jit.trace and ONNX export, which know only PyTorch's operators."""
    return is_tracing() or (is_compiling() and torch.onnx.is_in_onnx_export())


def untraced(function: Callable[P, None]) -> Callable[P, None]:
    """Hide a function from torch.jit.trace: sizes are plain numbers in it, not recorded ones."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        state = torch._C._get_tracing_state()
        if state is None:
            return function(*args, **kwargs)
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            function(*args, **kwargs)
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]

    return run


def has_subclass(tensors: Iterable[Tensor | None]) -> bool:
    """Return True if the class of a tensor may redefine operators."""
    for t in tensors:
        if t is not None and type(t) is not Tensor and type(t) is not Parameter:
            return True
    return False


def is_expanded_weight(t: object) -> bool:
    """Return True for a parameter of torch.nn.utils' per-sample gradients."""
    module = sys.modules.get("torch.nn.utils._expanded_weights.expanded_weights_impl")
    return module is not None and isinstance(t, module.ExpandedWeight)


def is_eager(tensors: Iterable[Tensor | None]) -> bool:
    """Return True if the call has plain tensors, whose operators run as they are called."""
    return not is_transformed(tensors) and torch._C._len_torch_dispatch_stack() == 0


def is_transformed(tensors: Iterable[Tensor | None]) -> bool:
    """Return True if a compiler, a tracer, a transform or a tensor subclass takes part in the call.

    Questions asked elsewhere as ``is_compiling`` and so on are inline: every call asks them.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or has_subclass(tensors)
    )


def records(tensors: Iterable[Tensor | None]) -> bool:
    """Return True if autograd records operations on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def is_dtensor(x: Tensor) -> bool:
    """Return True for a torch.distributed DTensor, without loading its module to find out."""
    if type(x) in (Tensor, Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)
