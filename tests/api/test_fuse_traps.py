"""What surrounds a norm in real programs, and random programs: fused values and gradients agree."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import triton_gn
from triton_gn import Report, fuse

N, C, GROUPS = 2, 6, 3
Block = Callable[..., Any]


def norm(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.group_norm(x, GROUPS, w, b)


def compiled_like(block: Block, *inputs: Any, dynamic: bool = False) -> list[Report]:
    """Compare a block with itself compiled and fused; return the report of each graph."""
    reports: list[Report] = []

    def compiler(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        reports.append(fuse.graph(graph_module, always=True))
        return torch._dynamo.lookup_backend("aot_eager")(graph_module, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=compiler, dynamic=dynamic)
    variables = [tensor for tensor in inputs if tensor.requires_grad]
    results = []
    for function in (block, compiled):
        y = function(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum() + y.sum(), variables)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    return reports


def image(**options: Any) -> Tensor:
    return torch.randn(N, C, 3, 4, dtype=torch.float64, requires_grad=True, **options)


def test_hook_on_the_result_of_the_norm() -> None:
    def block(x: Tensor) -> Tensor:
        y = norm(x)
        y.register_hook(lambda dy: dy * 2)
        return F.silu(y)

    (report,) = compiled_like(block, image())
    assert report.folded == []


class BasicBlock(nn.Module):
    """A block of a ResNet, with layers in place as torchvision has them."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, C, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(C, C, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, C), nn.GroupNorm(GROUPS, C)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            convolution = nn.Conv2d(C, C, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.GroupNorm(GROUPS, C))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += identity
        return self.relu(y)  # type: ignore[no-any-return]


def test_resnet() -> None:
    model = nn.Sequential(BasicBlock(1), BasicBlock(2), BasicBlock(1)).double()
    (report,) = compiled_like(lambda x: model(x), image())
    fused = [reason.partition(";")[0] for _, reason in report.folded]
    assert fused == ["relu", "residual, relu"] * 3


def test_control_flow() -> None:
    def block(x: Tensor) -> Tensor:
        y: Tensor = torch.cond(
            x.sum() > 0, lambda x: F.silu(norm(x)), lambda x: F.relu(norm(x) + 1), (x,)
        )
        return y

    (report,) = compiled_like(block, image())
    assert [reason.partition(";")[0] for _, reason in report.folded] == ["silu"]


def test_transforms_of_torch_func_are_left() -> None:
    def block(x: Tensor) -> Tensor:
        dx: Tensor = torch.func.grad(lambda x: F.silu(norm(x)).square().sum())(x)
        return dx

    (report,) = compiled_like(block, image())
    assert {reason for _, reason in report.left} == {"torch.func transforms calls of this graph"}


def test_sizes_that_depend_on_data_are_left() -> None:
    def block(x: Tensor, keep: Tensor) -> Tensor:
        return F.silu(norm(x[keep]))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (report,) = compiled_like(block, image(), torch.tensor([True, False]))
    assert [reason for _, reason in report.left] == ["its sizes depend on data"]


def test_tensor_subclass_is_left() -> None:
    def block(x: Tensor) -> Tensor:
        return F.silu(norm(x))

    from torch.testing._internal.two_tensor import TwoTensor

    reports: list[Report] = []

    def compiler(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        reports.append(fuse.graph(graph_module, always=True))
        return graph_module

    torch._dynamo.reset()
    torch.compile(block, backend=compiler)(TwoTensor(image().detach(), image().detach()))
    ((_, reason),) = reports[0].left
    assert reason == "its input is a tensor subclass"


def test_residual_and_shift_are_told_apart_with_a_dynamic_batch() -> None:
    def block(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return F.relu(norm(x) + r + t[:, :, None, None])

    t = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    reports = compiled_like(block, image(), image(), t, dynamic=True)
    fused = [reason.partition(";")[0] for report in reports for _, reason in report.folded]
    assert fused == ["residual, shift, relu"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(C, C, 1), nn.GroupNorm(GROUPS, C), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def test_wrapped_by_ddp(tmp_path: Path) -> None:
    model = Model().double()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        reports = compiled_like(wrapped, image())
    finally:
        torch.distributed.destroy_process_group()
    fused = [reason.partition(";")[0] for report in reports for _, reason in report.folded]
    assert fused == ["silu"]


def test_diffusers_unet_is_fused_but_for_norms_before_attention() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    ).double()

    def block(x: Tensor, context: Tensor) -> Any:
        return model(x, 3, context)[0]

    x = torch.randn(N, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    (report,) = compiled_like(block, x, torch.randn(N, 5, 8, dtype=torch.float64))
    norms = [layer for layer in model.modules() if isinstance(layer, nn.GroupNorm)]
    embeddings = [reason for _, reason in report.folded if reason.startswith("pre_add, silu;")]
    activations = [reason for _, reason in report.folded if "silu" in reason]
    assert len(report.replaced) == len(norms)
    assert len(embeddings) == len(
        [name for name, _ in model.named_modules() if "time_emb_proj" in name]
    )
    assert len(norms) - len(activations) == 4  # in front of attention: nothing pointwise follows


# What may stand around a norm, alone or in any order. r and q have y's shape, the others broadcast.
STEPS: dict[str, Block] = {
    "y * (1 + s)": lambda y, v: y * (1 + v["s"][..., None, None]),
    "y * s": lambda y, v: y * v["s"][..., None, None],
    "y * c": lambda y, v: v["c"] * y,
    "y + t": lambda y, v: v["t"][..., None, None] + y,
    "y + c": lambda y, v: y + v["c"],
    "y + r": lambda y, v: y + v["r"],
    "q += y": lambda y, v: (v["q"] * 1).add_(y),
    "y += r": lambda y, v: y.add_(v["r"]),
    "addcmul": lambda y, v: torch.addcmul(v["r"], y, 1 + v["s"][..., None, None]),
    "y + y * s": lambda y, v: torch.addcmul(y, y, v["c"]),
    "silu": lambda y, v: F.silu(y),
    "relu_": lambda y, v: F.relu(y, inplace=True),
    "formula": lambda y, v: y * torch.sigmoid(y),
    "dropout": lambda y, v: F.dropout(y, 0.3, False),
    "contiguous": lambda y, v: y.contiguous(),
    "2 y": lambda y, v: 2 * y,
    "y + y": lambda y, v: y + y,
    "exp": lambda y, v: torch.tanh(y).exp(),
    "norm": lambda y, v: norm(y, v["w"], v["b"]),
    "our norm": lambda y, v: triton_gn.group_norm(y, GROUPS, v["w"], shift=v["t"]),
    "instance": lambda y, v: F.instance_norm(y, weight=v["b"]),
}
SHAPES = {
    "x": (N, C, 3, 2),
    "r": (N, C, 3, 2),
    "q": (N, C, 3, 2),
    "s": (N, C),
    "t": (N, C),
    "c": (C, 1, 1),
    "w": (C,),
    "b": (C,),
}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    before=st.lists(st.sampled_from(sorted(STEPS)), max_size=2),
    after=st.lists(st.sampled_from(sorted(STEPS)), max_size=5),
)
def test_any_program_keeps_its_values_and_gradients(before: list[str], after: list[str]) -> None:
    generator = torch.Generator().manual_seed(len(before) + 10 * len(after))
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in SHAPES.items()
    }

    def block(x: Tensor, r: Tensor, q: Tensor, *others: Tensor) -> Tensor:
        values = dict(zip(SHAPES, (x, r, q, *others), strict=True))
        y = x * 1
        for step in [*before, "norm", *after]:
            y = STEPS[step](y, values)
        return y

    names = ", ".join(SHAPES)
    scope: dict[str, Any] = {"block": block}
    exec(f"def program({names}):\n    return block({names})", scope)
    program: Any = scope["program"]
    fused = fx.symbolic_trace(program)
    inputs = list(tensors.values())
    fuse.graph(fused, inputs, always=True)
    expected = program(*inputs)
    try:
        grads = gradients(expected, inputs)
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):  # the program itself is wrong
            reject()
        raise
    received = fused(*inputs)
    torch.testing.assert_close(received, expected, rtol=1e-9, atol=1e-9)
    for grad, other in zip(gradients(received, inputs), grads, strict=True):
        assert (grad is None) == (other is None)
        if grad is not None and other is not None:
            scale = max(1.0, float(other.abs().max()))
            torch.testing.assert_close(grad / scale, other / scale, rtol=1e-8, atol=1e-8)


def gradients(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    loss = y.square().sum() + y.sum()
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(loss, inputs, allow_unused=True)
    return grads
