"""Patches of Triton's interpreter, which make it round as the GPU does, and run fast enough."""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def round_to_bfloat16() -> None:
    """Round in casts to bfloat16: the interpreter truncates, and reinterprets float64."""
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
    """Patch triton.language once per launch.

    The interpreter does it at each call of a device function, which takes most of its time.
    """
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


def remember_types() -> None:
    """Cache the type and the shape of results; the values are still computed by the interpreter.

    Computing types and shapes anew for each result takes most of the remaining time.
    """
    core, semantic = tl.core, type(interpreter.interpreter_semantic)
    plain_np_dtype, plain_block_type = interpreter._get_np_dtype, core.block_type.__init__
    plain_tensor, plain_equal = core.tensor.__init__, core.dtype.__eq__
    plain_promoted, plain_broadcast = semantic.computation_type_impl, semantic.broadcast_impl_value
    np_dtypes: dict[str, Any] = {}
    block_types: dict[Any, dict[str, Any]] = {}
    shapes: dict[str, dict[str, Any]] = {}
    promoted_types: dict[Any, Any] = {}
    broadcast_shapes: dict[Any, tuple[tuple[int, ...] | None, ...]] = {}

    def np_dtype(kind: Any) -> Any:
        if kind.name not in np_dtypes:
            np_dtypes[kind.name] = plain_np_dtype(kind)
        return np_dtypes[kind.name]

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *shape
        if key not in block_types:
            plain_block_type(self, element_ty, shape)
            block_types[key] = dict(vars(self))
        vars(self).update(block_types[key], element_ty=element_ty)

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        if kind.name not in shapes:
            plain_tensor(self, handle, kind)
            shapes[kind.name] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(shapes[kind.name], handle=handle, type=kind, dtype=kind.scalar)

    def equal(self: Any, other: Any) -> Any:
        return self is other or plain_equal(self, other)

    def promoted(self: Any, a: Any, a_is_scalar: bool, b: Any, *others: bool) -> Any:
        key = a.name, a_is_scalar, b.name, *others
        if key not in promoted_types:
            promoted_types[key] = plain_promoted(self, a, a_is_scalar, b, *others)
        return promoted_types[key]

    def broadcast(self: Any, *operands: Any) -> Any:
        key = tuple(operand.type.name for operand in operands)
        if key not in broadcast_shapes:
            results = plain_broadcast(self, *operands)
            broadcast_shapes[key] = tuple(
                None if result is operand else tuple(result.type.shape)
                for result, operand in zip(results, operands, strict=True)
            )
        return tuple(map(spread, operands, broadcast_shapes[key]))

    def spread(operand: Any, shape: tuple[int, ...] | None) -> Any:
        if shape is None:
            return operand
        values = np.broadcast_to(operand.handle.data, shape)
        kind = core.block_type(operand.dtype, list(shape))
        return core.tensor(interpreter.TensorHandle(values, kind.scalar), kind)

    interpreter._get_np_dtype = np_dtype
    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor
    core.dtype.__eq__ = equal
    semantic.computation_type_impl = promoted
    semantic.broadcast_impl_value = broadcast


def raise_on_overflow() -> None:
    """Raise if a 32-bit sum, difference or product overflows.

    The interpreter's own check takes a dozen operations, and reports nothing with ``debug`` off.
    """
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    limits = {np.dtype(kind): (np.iinfo(kind).min, np.iinfo(kind).max) for kind in ("i4", "u4")}

    def check(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        kind = lhs.handle.data.dtype
        if kind in limits:
            name = operation.__name__
            values = exact[name](lhs.handle.data, rhs.handle.data, dtype=np.int64)
            lowest, highest = limits[kind]
            if values.min() < lowest or values.max() > highest:
                raise OverflowError(f"{name} of {kind}")

    type(interpreter.interpreter_semantic).binary_op_sanitize_overflow_impl = check


class Traffic:
    """Context that counts the bytes that kernels load and store, for each tensor."""

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

        def counted_load(builder: Any, pointers: Any, mask: Any, *others: Any) -> Any:
            self._count(self.loaded, pointers, mask)
            return load(builder, pointers, mask, *others)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
            self._count(self.stored, pointers, mask)
            return store(builder, pointers, value, mask, *others)

        builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
        return self

    def __exit__(self, *_: object) -> None:
        builder = interpreter.InterpreterBuilder
        builder.create_masked_load, builder.create_masked_store = self._plain
