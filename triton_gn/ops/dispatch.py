"""Which path a call takes: the kernels or PyTorch."""

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

from triton_gn.ops import autograd, settings, torch_path

# Triton reads it when a kernel is defined; set later, it has no effect
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def why_not_kernels(x: Tensor) -> str | None:
    """Why x cannot run through the kernels; None if it can."""
    device = x.device.type
    if device == "cpu" and not _INTERPRETED:
        return "the input is on the CPU, where kernels run only under TRITON_INTERPRET=1"
    if device not in ("cpu", "cuda"):
        return f"the input is on {x.device}, for which there are no kernels"
    if not _triton_is_installed():
        return "Triton is not installed (remedy: pip install triton)"
    return None


def uses_kernels(x: Tensor, current: settings.Settings) -> bool:
    """Whether x runs through the kernels under these settings.

    Raises:
        RuntimeError: the backend is "triton" and it cannot.
    """
    if current.backend == "torch":
        return False
    reason = why_not_kernels(x)
    if reason is None:
        return True
    if current.backend == "triton":
        raise RuntimeError(
            f'group_norm: the backend is "triton", but {reason}. '
            'triton_gn.backend("auto") falls back to PyTorch.'
        )
    if x.is_cuda:
        _warn_once(f"triton_gn falls back to PyTorch's group_norm, which is slower: {reason}.")
    return False


def is_plain(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether PyTorch's group_norm is right for the call, or raises, without any help of ours.

    Few questions, for the sake of small layers on the CPU: most calls there are plain.
    """
    return (
        isinstance(x, Tensor)
        and x.is_cpu
        and not _INTERPRETED
        and settings.current().backend != "triton"
        and x.is_contiguous()
        and x.numel() not in (0, num_groups)
        and (weight is None) is (bias is None)
        and (weight is None or bias is None or weight.dtype is x.dtype is bias.dtype)
    )


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """y of x's shape, for operands that ``functional`` has checked."""
    current = settings.current()
    if x.numel() == 0 or not uses_kernels(x, current):
        return torch_path.group_norm(x, num_groups, weight, bias, eps)
    # PyTorch's autocast runs group_norm in float32 on the GPU; the kernels read x as it is
    autocast = x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype is not torch.float64
    y_dtype = torch.float32 if autocast else x.dtype
    return autograd.group_norm(x, weight, bias, num_groups, eps, y_dtype, current)
