"""Who else is at work on a call: compilers, transforms, modes. Each asks for a way of its own."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter


def is_compiling() -> bool:
    """torch.compile and torch.export."""
    return torch.compiler.is_compiling()


def in_functorch() -> bool:
    """torch.func: vmap, grad, vjp and what is made of them."""
    return torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Forward-mode derivatives, torch.func.jvp among them."""
    return forward_ad._current_level >= 0


def has_mode() -> bool:
    """A dispatch mode, which must see the operators that run."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_tracing() -> bool:
    """make_fx, which records what runs on real tensors too."""
    if not has_mode():
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def has_subclass(tensors: Iterable[Tensor | None]) -> bool:
    """A tensor whose class has its own idea of what an operator does."""
    return any(t is not None and type(t) not in (Tensor, Parameter) for t in tensors)


def is_dtensor(x: Tensor) -> bool:
    """A torch.distributed DTensor, without loading its module for the sake of the question."""
    if type(x) in (Tensor, Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)
