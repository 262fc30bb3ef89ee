"""Run kernels in Triton's interpreter, in processes of their own, and count what they access."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from tests.support import interpreter as patches

# PyTorch's operators that launch no kernel
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "_unsafe_view",
    "set_",
    "copy_storage",
}
# passes over the input by the kernels that PyTorch publishes: aten/src/ATen/native/cuda/
# group_norm_kernel.cu, GroupNormKernelImplInternal and GroupNormBackwardKernelImplInternal
_LAUNCHES = {"native_group_norm": 3, "native_group_norm_backward": 5}


@contextmanager
def pool() -> Iterator[ProcessPoolExecutor]:
    """Start processes in which Triton's kernels run in its interpreter, on the CPU."""
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    spawn = get_context("spawn")
    with (
        mock.patch.dict(os.environ, environment),
        ProcessPoolExecutor(mp_context=spawn, initializer=prepare) as started,
    ):
        yield started


def prepare() -> None:
    """Make the interpreter round as a GPU does, and faster."""
    patches.round_to_bfloat16()
    patches.patch_language_once()
    patches.remember_types()
    compute_in_bfloat16()


def compute_in_bfloat16() -> None:
    """Compute with bfloat16 numbers: the interpreter does so with their bits as integers.

    Each operation rounds, also each addition of a sum, which takes pairs as a tree.
    """
    builder, reduce_ops = interpreter.InterpreterBuilder, interpreter.ReduceOps
    plain_binary, plain_sum = builder.binary_op, reduce_ops.sum
    plain_atomic, memory = builder.create_atomic_rmw, interpreter._interpreter

    def binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16:
            return plain_binary(self, lhs, rhs, op)
        result = op(*(_wide(handle.data) for handle in (lhs, rhs)))
        return interpreter.TensorHandle(_narrow(result), tl.bfloat16)

    def sum_of(self: Any, operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return plain_sum(self, operand)
        values = _wide(operand.handle.data)
        axis = self.axis
        values = values.reshape(-1) if axis is None else np.moveaxis(values, axis, 0)
        while len(values) > 1:  # sizes are powers of two
            half = len(values) // 2
            values = _wide(_narrow(values[:half] + values[half:]))
        result = _narrow(values[0])
        return self.to_tensor(result.item() if axis is None else result, operand.dtype)

    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if value.dtype.scalar != tl.bfloat16:
            return plain_atomic(self, operation, pointers, value, mask, *rest)
        # additions, to one address: what peers do
        bits = memory.load(pointers.data, mask.data, np.zeros_like(value.data), np.dtype("u2"))
        memory.store(pointers.data, _narrow(_wide(bits) + _wide(value.data)), mask.data)
        return interpreter.TensorHandle(bits, tl.bfloat16)

    builder.binary_op, reduce_ops.sum, builder.create_atomic_rmw = binary, sum_of, atomic


def _wide(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: Any) -> Any:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Traffic(TorchDispatchMode):
    """Count the bytes that kernels load and store, and the launches, while this is active.

    A load or store of a program counts each address once: the lanes of a warp share what they
    access together. Around the kernels, PyTorch's operators read each operand once and write each
    result once; of its group_norm count the passes of its published CUDA kernels.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.loaded = self.stored = self.launches = 0
        self._in_kernel = False

    def __enter__(self) -> Any:
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        plain = {
            name: getattr(builder, name)
            for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
        }
        launch = executor.__call__

        def load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self.loaded += _bytes_at(pointers, mask)
            return plain["create_masked_load"](builder, pointers, mask, *rest)

        def store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.stored += _bytes_at(pointers, mask)
            return plain["create_masked_store"](builder, pointers, value, mask, *rest)

        def atomic(
            builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *r: Any
        ) -> Any:
            self.loaded += _bytes_at(pointers, mask)
            self.stored += _bytes_at(pointers, mask)
            return plain["create_atomic_rmw"](builder, operation, pointers, value, mask, *r)

        def call(executor: Any, *arguments: Any, **options: Any) -> Any:
            self.launches += 1
            self._in_kernel = True
            try:
                return launch(executor, *arguments, **options)
            finally:
                self._in_kernel = False

        self._patches: list[Any] = [
            mock.patch.object(builder, "create_masked_load", load),
            mock.patch.object(builder, "create_masked_store", store),
            mock.patch.object(builder, "create_atomic_rmw", atomic),
            mock.patch.object(executor, "__call__", call),
        ]
        for patch in self._patches:
            patch.start()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = any(
            one.alias_info and not one.alias_info.is_write for one in func._schema.returns
        )
        if not self._in_kernel and not is_view and name not in _FREE:
            self._count(name, [t for t in args if isinstance(t, Tensor)], result)
        return result

    def _count(self, name: str, operands: list[Tensor], result: Any) -> None:
        results = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
        read, written = (sum(t.nbytes for t in tensors) for tensors in (operands, results))
        self.launches += _LAUNCHES.get(name, 1)
        if name in _LAUNCHES:
            read, written = _torch_group_norm(name, operands, results)
        elif name in ("zeros", "zeros_like", "new_zeros", "zero_", "fill_"):
            read = 0
        elif name not in ("clone", "_to_copy", "copy_", "silu", "silu_backward"):
            raise ValueError(f"there must be a rule for the traffic of each operator; got {name}.")
        self.loaded += read
        self.stored += written


def _bytes_at(pointers: Any, mask: Any) -> int:
    """Return the bytes at the addresses of a load or store, each counted once."""
    size: int = pointers.get_element_ty().primitive_bitwidth // 8
    used = pointers.data[mask.data]
    if used.size > 1 and int(used.max() - used.min()) // size + 1 < used.size:
        return len(np.unique(used)) * size
    count: int = used.size
    return count * size


def _torch_group_norm(name: str, operands: list[Tensor], results: list[Tensor]) -> tuple[int, int]:
    """Return the bytes that the CUDA kernels read and write: x, dy and numbers per channel.

    Forward: moments of x; a and b per channel; y = a x + b. Backward: per channel the sums of
    dy x and of dy; three coefficients per channel or group; dx = c1 dy + c2 x + c3; dweight and
    dbias from the sums.
    """
    if name == "native_group_norm":
        x, weight = operands[:2]
        per_channel = 4 * x.shape[0] * len(weight)  # one float for each
        return 2 * x.nbytes + 2 * per_channel, x.nbytes + 2 * per_channel
    dy, x = operands[:2]
    per_channel = 4 * x.shape[0] * x.shape[1]
    passes = 2 * (dy.nbytes + x.nbytes)
    return passes + 5 * per_channel, x.nbytes + 3 * per_channel + sum(t.nbytes for t in results[1:])
