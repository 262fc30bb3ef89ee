"""What the tests change in Triton's interpreter: it must round as the GPU does, and fast enough."""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def round_to_bfloat16() -> None:
    """Casts to bfloat16 truncate in the interpreter, and casts from float64 reinterpret: round."""
    plain_cast = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        data = source.data
        if before == tl.bfloat16:
            data = (data.astype(np.uint32) << 16).view(np.float32)
            source = interpreter.TensorHandle(data, tl.float32)
        if after != tl.bfloat16:
            return plain_cast(self, source, target)
        bits = np.ascontiguousarray(data.astype(np.float32)).view(np.uint32)
        to_nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(data), 0x7FC0, to_nearest_even).astype(np.uint16)
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    interpreter.InterpreterBuilder.cast_impl = cast


def patch_language_once() -> None:
    """The interpreter patches triton.language at each call of a device function, which takes most
    of its time. Once per launch is enough."""
    patch = interpreter._patch_lang
    scopes: dict[tuple[str, ...], Any] = {}

    class Launch:
        def restore(self) -> None:
            for scope in reversed(scopes.values()):
                scope.restore()
            scopes.clear()

    class Nested:
        def restore(self) -> None:
            pass

    def patch_once(fn: Any) -> Any:
        modules = (
            name for name, value in fn.__globals__.items() if value is tl or value is tl.core
        )
        nested = bool(scopes)
        key = tuple(sorted(modules))
        if key not in scopes:
            scopes[key] = patch(fn)
        return Nested() if nested else Launch()

    interpreter._patch_lang = patch_once


class Traffic:
    """Bytes that kernels load and store, per tensor, while it is the active context."""

    def __init__(self, **tensors: Any) -> None:
        self._ranges = {
            name: (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
            for name, tensor in tensors.items()
        }
        self.loaded = dict.fromkeys([*tensors, "other"], 0)
        self.stored = dict.fromkeys([*tensors, "other"], 0)

    def _count(self, totals: dict[str, int], pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        used = pointers.data[mask.data]
        if used.size == 0:
            return
        for name, (start, end) in self._ranges.items():
            if start <= used.min() and used.max() < end:
                totals[name] += used.size * size
                return
        totals["other"] += used.size * size

    def __enter__(self) -> "Traffic":
        builder = interpreter.InterpreterBuilder
        self._plain = builder.create_masked_load, builder.create_masked_store
        load, store = self._plain

        def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._count(self.loaded, pointers, mask)
            return load(builder, pointers, mask, *rest)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._count(self.stored, pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
        return self

    def __exit__(self, *_: object) -> None:
        builder = interpreter.InterpreterBuilder
        builder.create_masked_load, builder.create_masked_store = self._plain
