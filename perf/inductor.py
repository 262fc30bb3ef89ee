"""Generate what Inductor would run on an H100, without a GPU, and count what it accesses.

Tensors are fake: they say that they are on a GPU and have no memory. AOT Autograd traces the
function and partitions it into a forward and a backward, Inductor generates their code, and the
code's wrapper runs on tensors without memory, where each kernel is read instead of launched: every
``tl.load`` and ``tl.store`` in a kernel's text counts its tensor once. A loop over a group is one
place in the text, so that a tensor that a kernel walks over twice counts twice.

Everything here changes PyTorch for the whole process: run it in a process of its own.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo import device_interface
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import async_compile, config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._triton import has_triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from perf.standin import StandIn

_H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
    total_memory=80 << 30, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, warp_size=32, L2_cache_size=50 << 20,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, gcnArchName="", is_integrated=0,
    is_multi_gpu_board=0, uuid="0", pci_bus_id=0,
)  # fmt: skip


@dataclass
class Generated:
    """Bytes that the generated code of one direction accesses, and the text of its kernels."""

    loaded: int = 0
    stored: int = 0
    kernels: list[str] = field(default_factory=list)


def generate(function: Callable[..., Tensor], operands: Sequence[Tensor]) -> list[Generated]:
    """Return what Inductor's forward and backward of a function access.

    ``operands`` have shapes, strides and dtypes only; all of them need gradients.
    """
    graphs: list[tuple[Any, Sequence[Any]]] = []

    def compiler(gm: Any, example_inputs: Sequence[Any]) -> Any:
        graphs.append((gm, example_inputs))
        return gm.forward

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:  # on the CPU: autograd would look for CUDA itself
        traced = aot_function(
            function,
            fw_compiler=compiler,
            bw_compiler=compiler,
            partition_fn=_partition,
            decompositions=select_decomp_table(),
        )
        y = traced(*(_like(t, "cpu").requires_grad_() for t in operands))
        y.backward(torch.empty_like(y))
        _pretend_to_have_a_gpu()
        return [_read(*_code_of(graph, inputs, mode)) for graph, inputs in graphs]


def _partition(joint: Any, inputs: Sequence[Any], **options: Any) -> tuple[Any, Any]:
    """Divide a joint graph into a forward and a backward, as Inductor does."""
    joint_graph_passes(joint)
    forward, backward = min_cut_rematerialization_partition(
        joint, inputs, compiler="inductor", **options
    )
    return forward, backward


def _like(value: Any, device: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def _pretend_to_have_a_gpu() -> None:
    """Answer PyTorch's and Triton's questions about the GPU as an H100 would."""
    stream = SimpleNamespace(cuda_stream=0, stream_id=0)
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "init": None,
        "_lazy_init": None, "is_initialized": True, "get_device_properties": _H100,
        "get_device_capability": (9, 0), "get_device_name": _H100.name, "current_stream": stream,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, _always(answer))
    interface = device_interface.CudaInterface
    answers |= {
        "get_compute_capability": 90, "maybe_exchange_device": 0, "exchange_device": 0,
        "synchronize": None, "is_triton_capable": True, "raise_if_triton_unavailable": None,
        "is_bf16_supported": True,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(interface, name, staticmethod(_always(answer)))
    worker: Any = interface.Worker
    worker.get_device_properties = staticmethod(_always(_H100))
    worker.current_device = staticmethod(_always(0))
    driver.set_active(_Driver(lambda *_: None))
    has_triton.cache_clear()  # it may have been asked before
    config.compile_threads = 1
    config.fx_graph_cache = False
    config.triton.autotune_at_compile_time = False


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


class _Driver(StandIn):
    """A driver for Triton that says it has an H100."""

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def is_active(self) -> bool:
        return True


def _code_of(graph: Any, inputs: Sequence[Any], mode: FakeTensorMode) -> tuple[str, Sequence[Any]]:
    """Return Inductor's Python code for a graph of ATen operators on a GPU, and its operands."""
    inputs = [_like(value, "cuda") for value in inputs]
    graph = make_fx(graph, tracing_mode="real")(*inputs)
    view_to_reshape(graph)
    with V.set_fake_mode(mode):
        post_grad_passes(graph, is_inference=False)
    lowering = GraphLowering(graph, example_inputs=inputs, shape_env=None, is_inference=False)
    handlers = (
        V.set_graph_handler(lowering),
        V.set_fake_mode(mode),
        V.set_debug_handler(DebugContext()),
    )
    with contextlib.ExitStack() as stack:
        for handler in handlers:
            stack.enter_context(handler)
        lowering.run(*inputs)
        wrapper, _ = lowering.codegen()
    return wrapper.value, inputs


def _read(code: str, inputs: Sequence[Any]) -> Generated:
    """Run generated code on tensors without memory, and count what its kernels access."""
    generated = Generated()

    def kernel(compiler: Any, name: str, text: str, *_: Any, **__: Any) -> Any:
        names = re.search(rf"def {name}\((.*?)\):", text, re.DOTALL)
        assert names is not None
        parameters = [part.split(":")[0].strip() for part in names[1].split(",")]

        def run(*arguments: Any, **options: Any) -> None:
            by_name = dict(zip(parameters, arguments, strict=False))
            generated.kernels.append(text)
            generated.loaded += _accessed(text, "load", by_name)
            generated.stored += _accessed(text, "store", by_name)

        return SimpleNamespace(run=run)

    def empty(shape: Any, stride: Any, dtype: Any) -> Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    with (
        mock.patch.object(async_compile.AsyncCompile, "triton", kernel),
        mock.patch("torch._C._dynamo.guards._empty_strided_cuda", empty),
        mock.patch("torch._C._cuda_getCurrentRawStream", _always(0), create=True),
        mock.patch("torch.cuda._DeviceGuard", _always(contextlib.nullcontext())),
        mock.patch("torch.cuda.set_device", _always(None)),
    ):
        namespace: dict[str, Any] = {"__name__": "generated", "__file__": __file__}
        exec(compile(code, "generated", "exec"), namespace)
        namespace["call"]([_like(value, "meta") for value in inputs])
    return generated


def _accessed(text: str, what: str, arguments: dict[str, Any]) -> int:
    """Return the bytes of the tensors of all loads or stores in a kernel's text."""
    names = re.findall(rf"tl\.{what}\((\w+)\b", text)
    return sum(arguments[name].nbytes for name in names)
