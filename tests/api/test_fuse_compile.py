"""The fusion inside torch.compile: as a backend by name, around other backends, in Inductor."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor import config

import triton_gn
from triton_gn import fuse

# PyTorch warns of its own use of TorchScript while it loads Inductor
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

ROOT = Path(__file__).parents[2]
GROUPS, C = 2, 8


class Block(nn.Module):
    """A residual block, as most models have one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, C), nn.GroupNorm(GROUPS, C)
        self.embed = nn.Linear(4, 2 * C)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv(F.silu(self.norm1(x)))
        scale, shift = self.embed(embedding)[:, :, None, None].chunk(2, 1)
        return F.relu(self.norm2(h) * (1 + scale) + shift + x, inplace=True)


def inputs(n: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, C, 4, 6, dtype=dtype, requires_grad=True)
    return x, torch.randn(n, 4, dtype=dtype, requires_grad=True)


def assert_equal(model: nn.Module, compiled: Callable[..., Any], n: int = 2) -> None:
    """Compare values and all gradients."""
    arguments = inputs(n)
    expected, received = model(*arguments), compiled(*arguments)
    torch.testing.assert_close(received, expected, rtol=1e-10, atol=1e-10)
    variables = [*arguments, *model.parameters()]
    for y, other in zip(
        torch.autograd.grad(received.square().sum(), variables),
        torch.autograd.grad(expected.square().sum(), variables),
        strict=True,
    ):
        torch.testing.assert_close(y, other, rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    # a graph that a cache holds is not fused again
    caches = torch._functorch.config.patch(enable_autograd_cache=False)
    with caches, config.patch(fx_graph_cache=False):
        yield


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level("INFO", "triton_gn.fuse")
    return lambda: [
        record.getMessage() for record in caplog.records if record.name == "triton_gn.fuse"
    ]


FOLDED = ["folded: silu;", "folded: scale, shift, residual, relu;"]


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_backend_fuses_and_calls_another(inner: str, messages: Callable[[], list[str]]) -> None:
    model = Block().double()
    compiled = torch.compile(model, backend=fuse.backend(inner, always=True), fullgraph=True)
    assert_equal(model, compiled)
    assert [any(text in line for line in messages()) for text in FOLDED] == [True, True]


def test_inner_backend_may_be_a_function_with_options() -> None:
    received = {}

    def inner(graph_module: fx.GraphModule, example_inputs: list[Any], **options: Any) -> Any:
        received.update(options)
        received["targets"] = [node.target for node in graph_module.graph.nodes]
        return graph_module

    model = Block().double()
    backend = fuse.backend(inner, always=True, speed="high")
    assert_equal(model, torch.compile(model, backend=backend, options={"level": 3}))
    assert received["speed"] == "high"
    assert received["options"] == {"level": 3}
    assert received["targets"].count(triton_gn.group_norm) == 2
    assert F.silu not in received["targets"]


def test_dynamic_batch_is_compiled_once() -> None:
    model = Block().double()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    backend = fuse.backend(counter, always=True)
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    assert_equal(model, compiled, 2)
    graphs = counter.frame_count
    for n in (3, 5):
        assert_equal(model, compiled, n)
    assert counter.frame_count == graphs


def test_graph_break_inside_a_block() -> None:
    def block(x: Tensor) -> Tensor:
        y = F.group_norm(x, GROUPS)
        torch._dynamo.graph_break()
        return F.silu(y) + F.silu(F.group_norm(y, GROUPS))

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=fuse.backend(counter, always=True))
    x = torch.randn(2, C, 5, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-10, atol=1e-10)
    assert counter.frame_count == 2


@pytest.mark.skipif(
    triton_gn.ops.settings.INTERPRETED, reason="the interpreter has kernels for the CPU"
)
def test_without_kernels_the_graph_is_left_to_the_inner_backend(
    messages: Callable[[], list[str]],
) -> None:
    targets: list[Any] = []

    def inner(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        targets.extend(node.target for node in graph_module.graph.nodes)
        return graph_module

    model = Block().double()
    assert_equal(model, torch.compile(model, backend=fuse.backend(inner)))
    assert triton_gn.group_norm not in targets
    assert all("left: the input is on the CPU" in line for line in messages())


def test_backend_torch_leaves_the_graph(messages: Callable[[], list[str]]) -> None:
    model = Block().double()
    with triton_gn.backend("torch"):
        assert_equal(model, torch.compile(model, backend=fuse.backend("eager")))
    assert all('left: the backend is "torch"' in line for line in messages())


def test_pass_of_inductor_keeps_its_caches_right() -> None:
    uuid = fuse.GraphPass().uuid()
    assert uuid == fuse.GraphPass().uuid()
    assert uuid != fuse.GraphPass(always=True).uuid()
    with triton_gn.backend("torch"):
        assert uuid != fuse.GraphPass().uuid()


def test_pass_of_inductor_fuses(messages: Callable[[], list[str]]) -> None:
    model = Block().double()
    graph_pass = fuse.GraphPass(always=True)
    with config.patch(pre_grad_custom_pass=graph_pass):
        assert_equal(model, torch.compile(model, fullgraph=True))
        # the backend finds the pass there, and both agree
        torch._dynamo.reset()
        assert_equal(model, torch.compile(model, backend=fuse.backend(always=True)))
    assert [any(text in line for line in messages()) for text in FOLDED] == [True, True]
    assert any("a call of triton_gn already" in line for line in messages())


def test_backend_is_found_by_its_name(tmp_path: Path) -> None:
    """With the entry point of pyproject.toml installed, no import of triton_gn is needed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the kernels need Triton")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (entry,) = project["entry-points"]["torch_dynamo_backends"].items()
    metadata = tmp_path / "fusion_entry_point-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fusion-entry-point\nVersion: 0"
    )
    (metadata / "entry_points.txt").write_text(
        f"[torch_dynamo_backends]\n{' = '.join(entry)}\n", encoding="utf-8"
    )
    code = (
        "import logging, sys, torch\n"
        "from torch import nn\n"
        "logging.basicConfig(stream=sys.stdout)\n"
        "logging.getLogger('triton_gn.fuse').setLevel(logging.INFO)\n"
        "model, x = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), torch.randn(2, 4, 8)\n"
        "compiled = torch.compile(model, backend='triton_gn', options={'max_autotune': False})\n"
        "torch.testing.assert_close(compiled(x), model(x))\n"
        # the fused call is one operator of the kernels to the compiler, in both directions
        "import triton_gn.fuse\n"
        "from functorch.compile import make_boxed_func\n"
        "from torch._dynamo.backends.common import aot_autograd\n"
        "code = []\n"
        "def show(graph_module, inputs):\n"
        "    code.append(graph_module.code)\n"
        "    return make_boxed_func(graph_module)\n"
        "backend = triton_gn.fuse.backend(aot_autograd(fw_compiler=show))\n"
        "torch.compile(model, backend=backend)(x).sum().backward()\n"
        "forward, backward = code\n"
        "assert forward.count('torch.ops.triton_gn.group_norm.default(') == 1, forward\n"
        "assert 'sigmoid' not in forward and 'native_group_norm' not in forward, forward\n"
        "assert backward.count('torch.ops.triton_gn.group_norm_backward.default(') == 1, backward\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "TRITON_INTERPRET": "1",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "folded: silu;" in result.stdout
