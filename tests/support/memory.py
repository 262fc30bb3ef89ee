"""Tensors between guard zones: reading a zone gives NaN, and writing to a zone is detected."""

from typing import Any

import torch
from torch import Tensor

_GUARD = 128  # elements on each side: keeps the tensor's 16-byte alignment
# for each dtype, a NaN that no arithmetic produces; for integers, a number that no counter reaches
_BITS = {
    torch.float16: (torch.int16, 0x7EBE),
    torch.bfloat16: (torch.int16, 0x7FBE),
    torch.float32: (torch.int32, 0x7FC0BEEF),
    torch.float64: (torch.int64, 0x7FF8BEEFBEEFBEEF),
    torch.int32: (torch.int32, 0x7FC0BEEF),
}
_empty, _empty_strided = torch.empty, torch.empty_strided


class GuardedMemory:
    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int]] = []  # with the bits of their guard zones

    def empty_strided(
        self, shape: Any, stride: Any, *, dtype: torch.dtype, device: Any = "cpu", **options: Any
    ) -> Tensor:
        is_real = torch.device(device).type != "meta" and not torch._C._len_torch_dispatch_stack()
        if options or dtype not in _BITS or not is_real:
            return _empty_strided(shape, stride, dtype=dtype, device=device, **options)
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        extent = 0 if 0 in shape else extent
        bits_dtype, bits = _BITS[dtype]
        buffer = _empty(extent + 2 * _GUARD, dtype=bits_dtype, device=device).fill_(bits)
        self._buffers.append((buffer, bits))
        # not a view: autograd forbids changing views in place
        return _empty(0, dtype=dtype, device=device).set_(
            buffer.untyped_storage(), _GUARD, torch.Size(shape), tuple(stride)
        )

    def empty(self, *shape: Any, dtype: Any = None, device: Any = "cpu", **options: Any) -> Tensor:
        sizes = shape[0] if shape and not isinstance(shape[0], int) else shape
        if options or dtype not in _BITS:
            return _empty(sizes, dtype=dtype, device=device, **options)
        strides = [1]
        for size in reversed(sizes[1:]):
            strides.insert(0, strides[0] * max(size, 1))
        return self.empty_strided(sizes, strides[: len(sizes)], dtype=dtype, device=device)

    def guarded(self, x: Tensor) -> Tensor:
        """Return a copy of the dense x, with its strides."""
        return self.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)

    def check(self) -> None:
        for buffer, bits in self._buffers:
            zones = torch.cat([buffer[:_GUARD], buffer[-_GUARD:]])
            assert (zones == bits).all(), "a guard zone was written to"
