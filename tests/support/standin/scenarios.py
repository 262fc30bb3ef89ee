"""Scenarios on the stand-in GPU: python -m tests.support.standin.scenarios NAME."""

import gc
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

import triton_gn
from perf import kernels
from tests.support.standin import gpu
from triton_gn import reference
from triton_gn.kernels import params, resident, split, tile
from triton_gn.ops import launches
from triton_gn.plan import TARGETS, plan
from triton_gn.reference import Operands
from triton_gn.tools import stopwatch
from triton_gn.tools.verify import errors_of, tolerance
from triton_gn.tools.workloads import FUSED, Workload

GPU = gpu.start()

EPS = 1e-5
stopwatch._HOST_CALLS = 1
stopwatch._flush = lambda device: lambda _: None  # it takes a CPU long, and there is no L2 cache


def check(operands: Operands, groups: int, activation: str, dy: Tensor) -> None:
    """Compare the forward and backward of a call with float64."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in operands]
    x, weight, bias, *fused = leaves
    assert x is not None
    names = Operands._fields[3:]
    with triton_gn.backend("triton"):
        y = triton_gn.group_norm(
            x, groups, weight, bias, EPS, activation=activation,
            **dict(zip(names, fused, strict=True)),
        )  # fmt: skip
        present = [t for t in leaves if t is not None]
        grads = torch.autograd.grad(y, present, dy)
    exact = Operands._make(None if t is None else t.double() for t in operands)
    expected: dict[str, Tensor] = {"y": reference.group_norm(exact, groups, EPS, activation)}
    outputs = {"y": y.detach()}
    needs = [t is not None for t in exact]
    answers = reference.gradients(dy.double(), exact, groups, EPS, activation, needs)
    wanted = [name for name, needed in zip(Operands._fields, needs, strict=True) if needed]
    expected |= dict(zip(wanted, answers, strict=True))
    outputs |= dict(zip(wanted, grads, strict=True))
    for name, error in errors_of(outputs, expected).items():
        assert error <= tolerance(outputs[name], operands.x), (name, error)


def calls(strategy: str, layout: str, dtype: str, fused: str) -> None:
    """Launch the first call through Triton and later calls directly, on other memory."""
    names = FUSED if fused == "fused" else ()
    workload = Workload("", 2, 24, 3, (8, 8), dtype, layout=layout, fused=names)
    kept, counts = [], []
    for seed in range(3):
        operands = workload.operands("cuda", seed)
        dy = torch.empty_like(operands.x).normal_()
        kept.append(operands)  # so that no later call has its memory
        before = len(GPU.launches)
        with triton_gn.plan_override(strategy=strategy):
            check(operands, workload.groups, "silu", dy)
        counts.append(len(GPU.launches) - before)
    assert counts[0] == counts[1] == counts[2] > 1, counts


def misaligned(strategy: str, dtype: str) -> None:
    """Use tensors that begin anywhere, after aligned tensors and before them."""
    kind = getattr(torch, dtype)

    def at(offset: int, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        return torch.randn(size + offset, dtype=kind)[offset:].view(shape)

    for offset in (0, 1, 4, 0):
        x, residual, dy = at(offset, 2, 24, 8, 8), at(offset // 2, 2, 24, 8, 8), at(1, 2, 24, 8, 8)
        operands = Operands(x, at(1 - offset % 2, 24), at(offset, 24), residual=residual)
        with triton_gn.plan_override(strategy=strategy):
            check(operands, 3, "silu", dy)


def strided(kind: str) -> None:
    """Use per-channel operands that are views of other tensors, twice each."""
    for _ in range(2):
        x, dy = torch.randn(2, 24, 8, 8), torch.randn(2, 24, 8, 8)
        weight, scale, shift = torch.randn(24), torch.randn(2, 24), torch.randn(2, 24)
        if kind == "step":
            weight = torch.randn(24, 2)[:, 1]
        elif kind == "expanded":
            weight = torch.randn(1).expand(24)
        elif kind == "unbind":
            shift, scale = torch.randn(2, 24, 2).unbind(-1)
        elif kind == "transposed":
            scale = torch.randn(24, 2).t()
        check(Operands(x, weight, torch.randn(24), scale, shift), 3, "silu", dy)


def handles() -> None:
    """A direct launch keeps its compiled kernel alive."""
    workload = Workload("", 2, 24, 3, (8, 8), "float32")
    operands = workload.operands("cuda")
    for _ in range(2):
        check(operands, 3, "none", torch.randn_like(operands.x))
    for module in vars(launches._kernels()).values():
        for kernel in vars(module).values() if hasattr(module, "__file__") else ():
            # empty_kernel only tests whether kernels can be loaded; it is never launched
            if hasattr(kernel, "device_caches") and kernel is not tile.empty_kernel:
                kernel.device_caches.clear()
    gc.collect()
    check(operands, 3, "none", torch.randn_like(operands.x))
    assert GPU.library.standin_unloaded() == 0


def captured() -> None:
    """A graph replays its captured launches, whatever has been called since."""
    x = torch.randn(2, 24, 8, 8)
    triton_gn.group_norm(x, 3)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = triton_gn.group_norm(x, 3)
    x.copy_(torch.randn(2, 24, 8, 8))
    graph.replay()
    torch.testing.assert_close(y, torch.group_norm(x, 3), rtol=1e-5, atol=1e-5)


def counted() -> None:
    """`perf kernels` counts the kernels that calls compile, for sizes with one tile and others."""
    layers = [
        Workload("", 1, 32, 2, size, "float16", layout="channels_last", activation=activation)
        for size in ((4, 4), (3, 5), (64, 64), (60, 90))
        for activation in ("silu", "none")
    ]
    strategies = {plan(layer.problem("forward"), TARGETS["sm_90"]).strategy for layer in layers}
    assert strategies == {"resident", "split"}, strategies
    for layer in layers:
        operands = layer.operands("cuda")
        leaves = [t.requires_grad_() for t in operands if t is not None]
        x, weight, bias = operands[:3]
        y = triton_gn.group_norm(x, layer.groups, weight, bias, activation=layer.activation)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    caches = [
        value.device_caches[0][0]
        for module in (params, resident, split)
        for value in vars(module).values()
        if isinstance(value, triton.JITFunction) and value.__name__.endswith("_kernel")
    ]
    compiled = sum(map(len, caches))
    assert compiled == kernels.count(layers, "sm_90"), compiled


_MODEL = """
import torch, triton_gn
def make():
    norm = torch.nn.GroupNorm(4, 16, dtype=torch.bfloat16)
    model = torch.nn.Sequential(norm, torch.nn.SiLU(), torch.nn.GroupNorm(2, 16), torch.nn.Tanh())
    triton_gn.convert(model)
    return model, (torch.randn(2, 16, 12, 12),)
"""


def warmed() -> None:
    """After warmup on a machine without a GPU, a step on one compiles nothing."""
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    (cache / "warmed_model.py").write_text(_MODEL)
    command = (sys.executable, "-m", "triton_gn", "warmup", "--target", "sm_90", "--processes", "1")
    model = ("--model", "warmed_model:make")
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    for flags in ((), ("--inference",)):
        subprocess.run((*command, *model, *flags), cwd=cache, env=environment, check=True)
    compiled = {*cache.rglob("*.cubin")}
    assert len(compiled) > 4
    sys.path.insert(0, str(cache))
    from warmed_model import make  # type: ignore[import-not-found]

    network, (x,) = make()
    y = network(x)
    y.backward(torch.ones_like(y))
    with torch.no_grad():
        network(x)
    new = {path.name for path in {*cache.rglob("*.cubin")} - compiled}
    assert new <= {"empty_kernel.cubin"}, new


def refused(how: str) -> None:
    """If no kernel can be built or loaded, PyTorch computes, and explain says why."""
    if how == "no compiler":
        os.environ["CC"] = "/nowhere/gcc"
    elif how == "no image":
        GPU.library.standin_load_error(209)
    x = torch.randn(2, 24, 8, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.testing.assert_close(triton_gn.group_norm(x, 3), torch.group_norm(x, 3))
    (message,) = (str(one.message) for one in caught)
    assert "falls back" in message, message
    assert "remedy: a C compiler and Python's headers" in message, message
    assert "Triton cannot build a kernel" in triton_gn.explain(x, 3).reason
    with triton_gn.backend("triton"), pytest.raises(RuntimeError, match="remedy: a C compiler"):
        triton_gn.group_norm(x, 3)
    assert not GPU.launches


def tune() -> None:
    from triton_gn.__main__ import main

    GPU.computes_timed = False
    with tempfile.TemporaryDirectory() as folder:
        for spatial in ("4x4", "8x8"):
            shape = ("--shape", f"2x24x{spatial}", "--groups", "3", "--candidates", "2")
            assert main(("tune", *shape, "--out", folder)) == 0
        assert list(Path(folder).glob("*.json"))


def bench() -> None:
    from perf.__main__ import main

    GPU.computes_timed = False
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "two.csv")
        head = "n,channels,groups,spatial,dtype,core"
        file.write_text(f"{head}\n2,24,3,4x4,float32,yes\n2,24,3,8x8,bfloat16,yes\n")
        flags = (
            "--workloads",
            str(file),
            "--implementations",
            "triton_gn,triton_gn[split],torch_eager",
        )
        assert main(("bench", *flags, "--out", folder)) == 0


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    name, *arguments = sys.argv[1:]
    globals()[name](*arguments)
    assert GPU.launches or name == "refused", "no kernel was launched"
    print(f"{len(GPU.launches)} launches in process {os.getpid()}")
