"""A driver for Triton that launches nothing: what a launch costs the host, without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

Launched = Callable[..., None]


class StandIn:
    """As much of a driver as compiling and launching on the CPU's tensors takes.

    ``launched`` is called in place of the GPU's launcher, with its arguments: the grid, the stream,
    handles, metadata and hooks, then the kernel's own.
    """

    def __init__(self, launched: Launched) -> None:
        self.utils = self
        self.launched = launched

    def launcher_cls(self, source: Any, metadata: Any) -> Launched:
        """Triton keeps a kernel and its launcher for longer than a driver is active."""
        return lambda *arguments: driver.active.launched(*arguments)

    def load_binary(self, name: str, *_: Any) -> tuple[None, str, int, int, int]:
        """Module, function, registers, spills and the most threads of a program."""
        return None, name, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "max_num_regs": 65536}

    def get_current_device(self) -> int:
        return -1  # kernels are kept per device: no real one may meet what was loaded here

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def active(launched: Launched = lambda *_: None) -> Iterator[None]:
    """Triton launches for the stand-in while it is the active context."""
    try:
        before = driver.active
    except RuntimeError:
        before = None  # no GPU: Triton looks again at the next need
    driver.set_active(StandIn(launched))
    try:
        yield
    finally:
        driver.set_active(before)
