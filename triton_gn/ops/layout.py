"""Memory formats: read from strides, kept in outputs, repaired by copies."""

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes that Triton compiles a pointer for


def is_channels_last(x: Tensor) -> bool | None:
    """Return True if channels are innermost, False if they are outside the pixels, else None.

    GroupNorm does not care about the order of the pixels, so the spatial dimensions may lie in any
    order as long as the tensor is dense. One pixel counts as channels-last: its channels are
    adjacent either way.
    """
    n, channels = x.shape[:2]
    if x.is_contiguous():
        return x.numel() == n * channels
    if x.movedim(1, -1).is_contiguous():
        return True
    stride_n, stride_c = x.stride()[:2]
    pixels = 1
    for stride, size in sorted(zip(x.stride()[2:], x.shape[2:], strict=True)):
        if size > 1:
            if pixels == 1:
                innermost = stride
            elif stride != innermost * pixels:
                return None
            pixels *= size
    if n > 1 and stride_n != channels * pixels:
        return None
    if pixels == 1:
        return True if channels == 1 or stride_c == 1 else None
    if innermost == 1 and (channels == 1 or stride_c == pixels):
        return False
    if innermost == channels and (channels == 1 or stride_c == 1):
        return True
    return None


def realigned(t: Tensor) -> Tensor:
    """Return t, or a copy if hooks on saved tensors have changed its strides or its alignment."""
    return t if t.is_contiguous() and t.data_ptr() % ALIGNMENT == 0 else t.clone().contiguous()


def native(x: Tensor) -> tuple[Tensor, bool]:
    """Return x, or a dense copy if the kernels cannot read it, and whether it is channels-last."""
    channels_last = is_channels_last(x)
    if channels_last is not None:
        return x, channels_last
    if x.shape[1] > 1 and x.stride(1) == 1:
        return x.movedim(1, -1).contiguous().movedim(-1, 1), True
    x = x.contiguous()
    return x, x.shape[1] * x.shape[0] == x.numel()


def like(x: Tensor, other: Tensor) -> Tensor:
    """Return x with the strides of ``other``: itself, or a copy where they differ."""
    strides = other.stride()
    for size, a, b in zip(other.shape, x.stride(), strides, strict=True):
        if a != b and size != 1:
            # a new tensor of x's own kind: under vmap and fake tensors, torch.empty_strided is not
            return x.new_empty_strided(other.shape, strides).copy_(x)
    return x


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised tensor with exactly the strides of the dense tensor x."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device=x.device)
