"""PyTorch and Triton as they are on a machine with one H100, which is not there.

Tensors of the CPU say that they are on cuda:0. Triton's NVIDIA driver, its compiler and its
launcher are the real ones, over ``libcuda.c``, and the PTX of each launch runs on the CPU. Both
libraries are changed for good: ``start`` is for processes of their own.
"""

import contextlib
import ctypes
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.support.ptx import Kernel

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
)
_CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


def build(folder: Path) -> None:
    """Compile the driver to ``folder``/libcuda.so.1."""
    import triton

    include = Path(triton.__file__).parent / "backends/nvidia/include"
    source, library = Path(__file__).with_name("libcuda.c"), folder / "libcuda.so.1"
    flags = ("-shared", "-fPIC", f"-I{include}", f"-Wl,-soname,{library.name}", "-o", str(library))
    subprocess.run(["cc", *flags, str(source)], check=True)


class Stream:
    """Work on it is done at once."""

    _numbers = itertools.count()

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream, self.device = next(self._numbers), torch.device("cuda", 0)

    def wait_stream(self, other: "Stream") -> None:
        pass

    def synchronize(self) -> None:
        pass


class Event:
    """It knows the host's time."""

    def __init__(self, **_: Any) -> None:
        self._time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return max(1e-3, 1e3 * (end._time - self._time))


class Graph:
    """Launches, kept by the arguments that they have had."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], object]] = []

    def replay(self) -> None:
        for run in self.launches:
            run()


class Gpu:
    """What happens on the GPU, and how to spoil it.

    ``launches``: names of the kernels launched, in order. ``faults``: what went wrong in them.
    ``computes_timed``: whether launches on side streams and of graphs, as timed ones are, compute.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.launches: list[str] = []
        self.faults: list[Exception] = []
        self.computes_timed = True
        self.stream = self.default = Stream()
        self.graph: Graph | None = None
        self.tensors: list[Tensor] = []  # of the launch that is under way
        self._compiled: dict[int, Any] = {}
        self._kernels: dict[int, Kernel] = {}

    def loaded(self, compiled: Any) -> None:
        """A kernel has got its handle."""
        self._compiled[compiled.function] = SimpleNamespace(
            name=compiled.name, ptx=compiled.asm["ptx"]
        )

    def launched(self, module: int, grid: int, shared: int, stream: int, parameters: Any) -> None:
        """What the driver tells of a launch: exceptions would be lost in it."""
        try:
            one = self._compiled[module]
            self.launches.append(one.name)
            if self.stream is not self.default and not self.computes_timed:
                return
            kernel = self._kernels.setdefault(module, Kernel(one.ptx))
            bits = [
                int.from_bytes(ctypes.string_at(parameters[i], size), "little")
                for i, size in enumerate(kernel.parameter_bytes)
            ]
            tensors = self.tensors

            def run() -> object:
                return kernel.run_on(grid, bits, tensors, at_a_time=3)

            if self.graph is not None:
                self.graph.launches.append(run)
            else:
                run()
        except Exception as error:
            self.faults.append(error)

    @contextlib.contextmanager
    def capture(self, graph: Graph, stream: Stream | None = None, **_: Any) -> Iterator[None]:
        """torch.cuda.graph"""
        before, self.stream, self.graph = self.stream, stream or Stream(), graph
        self.library.standin_capturing(1)
        yield  # as PyTorch's own: its stream stays current when a capture fails
        self.stream, self.graph = before, None
        self.library.standin_capturing(0)

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """torch.cuda.stream"""
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def synchronize(self, *_: Any) -> None:
        if self.graph is not None:
            raise RuntimeError("operation not permitted when stream is capturing")


_gpu: Gpu


def start(capability: int = 90) -> Gpu:
    """Let there be a GPU in this process, by the driver that TRITON_LIBCUDA_PATH points to."""
    global _gpu
    path = os.path.join(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1")
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    _gpu = Gpu(library)
    library.standin_capability(capability)
    _gpu.callback = callback = _CALLBACK(_gpu.launched)  # type: ignore[attr-defined]  # kept alive
    library.standin_callback(callback)
    _change_tensors()
    _change_cuda(_gpu, capability)
    _change_triton(_gpu)
    return _gpu


def _on_host(device: Any) -> Any:
    """The device that PyTorch has for it."""
    if device is None or isinstance(device, Tensor):
        return device
    return _CPU if isinstance(device, int) or torch.device(device).type == "cuda" else device


def _change_tensors() -> None:
    own_device = torch._C.TensorBase.device.__get__

    def device(tensor: Tensor) -> torch.device:
        own: torch.device = own_device(tensor)
        return torch.device("cuda", 0) if own == _CPU else own

    changed: Any = torch.Tensor
    changed.device = property(device)
    changed.is_cuda = property(lambda tensor: tensor.device.type == "cuda")
    changed.is_cpu = property(lambda tensor: tensor.device.type == "cpu")
    changed.cuda = changed.cpu = lambda tensor, *_, **__: tensor
    for owner, names in ((torch, _FACTORIES), (changed, ["to"]), (torch.nn.Module, ["to"])):
        for name in names:
            setattr(owner, name, _with_device(getattr(owner, name)))

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> "Generator":
            return super().__new__(cls, _on_host(device))  # type: ignore[call-arg]

        def __init__(self, device: Any = "cpu") -> None:
            pass

    torch.Generator = Generator  # type: ignore[misc]


def _with_device(function: Callable[..., Any]) -> Callable[..., Any]:
    def changed(*arguments: Any, **keywords: Any) -> Any:
        if "device" in keywords:
            keywords["device"] = _on_host(keywords["device"])
        named = (_on_host(one) if isinstance(one, torch.device | str) else one for one in arguments)
        return function(*named, **keywords)

    return changed


def _change_cuda(gpu: Gpu, capability: int) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=capability // 10, minor=capability % 10,
        multi_processor_count=132, L2_cache_size=50 * 2**20, warp_size=32, total_memory=80 * 2**30,
    )  # fmt: skip
    changes: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda _: contextlib.nullcontext(),
        "set_device": lambda _: None,
        "get_device_properties": lambda _=0: properties,
        "get_device_capability": lambda _=0: divmod(capability, 10),
        "get_device_name": lambda _=0: properties.name,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": gpu.capture,
        "stream": gpu.on,
        "current_stream": lambda _=0: gpu.stream,
        "default_stream": lambda _=0: gpu.default,
        "set_stream": lambda stream: setattr(gpu, "stream", stream),
        "synchronize": gpu.synchronize,
        "is_current_stream_capturing": lambda: gpu.graph is not None,
        "memory_allocated": lambda _=0: 0,
        "max_memory_allocated": lambda _=0: 0,
        "reset_peak_memory_stats": lambda _=0: None,
        "empty_cache": lambda: None,
    }
    for name, value in changes.items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = "13.0"
    torch._C._cuda_getCurrentRawStream = lambda device: gpu.stream.cuda_stream


def _change_triton(gpu: Gpu) -> None:
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.compiler import CompiledKernel

    own_init, own_call = CompiledKernel._init_handles, CudaLauncher.__call__

    def init_handles(compiled: Any) -> None:
        own_init(compiled)
        gpu.loaded(compiled)

    def call(launcher: Any, *arguments: Any) -> None:
        gpu.tensors = [*_tensors_in(arguments)]
        own_call(launcher, *arguments)
        if gpu.faults:
            raise gpu.faults[0]

    CompiledKernel._init_handles = init_handles
    CudaLauncher.__call__ = call


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from _tensors_in(one)
