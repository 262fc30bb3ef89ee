"""A driver for Triton that launches nothing, to measure host cost without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

Launched = Callable[..., None]


class StandIn:
    """The part of a driver that compiling and launching on CPU tensors needs.

    ``launched`` is called instead of the GPU's launcher with its arguments: the grid, the stream,
    handles, metadata, hooks and the kernel's own.
    """

    def __init__(self, launched: Launched) -> None:
        self.utils = self
        self.launched = launched

    def launcher_cls(self, source: Any, metadata: Any) -> Launched:
        """Return a launcher for Triton to keep; it looks the driver up at each launch."""
        return lambda *arguments: driver.active.launched(*arguments)

    def load_binary(self, name: str, *_: Any) -> tuple[None, Any, int, int, int]:
        """Return module, function, registers, spills and the most threads of a program."""
        return None, name, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "max_num_regs": 65536}

    def get_current_device(self) -> int:
        return -1  # kernels are cached per device: no real device may find these

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def active(launched: Launched = lambda *_: None, kind: type[StandIn] = StandIn) -> Iterator[None]:
    """Make a stand-in Triton's driver for the duration of the context."""
    try:
        before = driver.active
    except RuntimeError:
        before = None  # no GPU: Triton will look again
    driver.set_active(kind(launched))
    try:
        yield
    finally:
        driver.set_active(before)
