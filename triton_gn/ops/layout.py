"""How a tensor lies in memory, read from its strides."""

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes that Triton compiles a pointer for


def is_channels_last(x: Tensor) -> bool | None:
    """Whether channels are innermost (True) or outside the pixels (False); None if neither.

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


def real(x: Tensor) -> Tensor:
    """x, or a copy where memory holds something else than its values: PyTorch's lazily negated
    tensors and zeros without memory."""
    return x.clone() if x.is_neg() or x._is_zerotensor() else x


def rows(values: Tensor) -> Tensor:
    """(C,) or (N, C), or a copy where the channels of a row are not adjacent in memory."""
    values = real(values)
    return values if values.stride(-1) == 1 or values.shape[-1] == 1 else values.contiguous()


def packed(t: Tensor) -> Tensor:
    """t as PyTorch allocates it, or a copy: hooks on saved tensors may have given it any strides
    and address."""
    return t if t.is_contiguous() and t.data_ptr() % ALIGNMENT == 0 else t.clone().contiguous()


def native(x: Tensor) -> tuple[Tensor, bool]:
    """x, or where the kernels cannot read it a dense copy, and whether it is channels-last."""
    channels_last = is_channels_last(x)
    if channels_last is not None:
        return x, channels_last
    if x.shape[1] > 1 and x.stride(1) == 1:
        return x.movedim(1, -1).contiguous().movedim(-1, 1), True
    x = x.contiguous()
    return x, x.shape[1] * x.shape[0] == x.numel()


def like(x: Tensor, other: Tensor) -> Tensor:
    """x with the strides of ``other``, copied only where they differ."""
    same = all(
        size == 1 or a == b
        for size, a, b in zip(other.shape, x.stride(), other.stride(), strict=True)
    )
    # of x's own kind: under vmap and fake tensors, torch.empty_strided is not
    return x if same else x.new_empty_strided(other.shape, other.stride()).copy_(x)


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, with exactly the strides of the dense tensor x."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device=x.device)
