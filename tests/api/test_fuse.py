"""The graph pass: what it fuses, in every spelling, and what it leaves alone, with the reason."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import triton_gn
from triton_gn import Report, fuse
from triton_gn.activations import TABLE

N, C, GROUPS = 2, 8, 4
Block = Callable[..., Any]


def operands(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return x, parameters and tensors around the norm, all of which need gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "x": (N, C, 3, 5),
        "w": (C,),
        "b": (C,),
        "s": (N, C),
        "t": (N, C),
        "c": (C, 1, 1),
        "r": (N, C, 3, 5),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def run(block: Block, tensors: dict[str, Tensor], grads: bool = True) -> list[Tensor]:
    """Return a block's results and the gradients of all operands, 0 for unused ones."""
    results = block(**tensors)
    results = results if isinstance(results, tuple) else (results,)
    if not grads:
        return list(results)
    loss = sum((y * (y.detach() + 1)).sum() for y in results)
    computed = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    zeros = (torch.zeros_like(tensor) for tensor in tensors.values())
    return [
        *results,
        *(zero if grad is None else grad for zero, grad in zip(zeros, computed, strict=True)),
    ]


def fused_in(
    block: Block,
    inner: str = "aot_eager",
    dynamic: bool = False,
    grads: bool = True,
    tolerance: float = 1e-10,
) -> Report:
    """Fuse a block that Dynamo traced, compare it with the eager block; return the report."""
    reports: list[Report] = []

    def compiler(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
        reports.append(fuse.graph(graph_module, always=True))
        return torch._dynamo.lookup_backend(inner)(graph_module, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=compiler, fullgraph=True, dynamic=dynamic)
    expected, received = (run(f, operands(), grads) for f in (block, compiled))
    torch.testing.assert_close(received, expected, rtol=tolerance, atol=tolerance)
    (report,) = reports
    return report


def only(entries: list[tuple[str, str]]) -> str:
    """Return the reason of the only entry."""
    ((_, reason),) = entries
    return reason


def norm(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.group_norm(x, GROUPS, w, b)


NORMS: dict[str, Block] = {
    "functional": lambda x, w, b, **_: F.silu(F.group_norm(x, GROUPS, w, b, 1e-3)),
    "keywords": lambda x, w, b, **_: F.silu(F.group_norm(x, num_groups=GROUPS, bias=b, weight=w)),
    "torch": lambda x, w, b, **_: F.silu(torch.group_norm(x, GROUPS, w, b, 1e-3)),
    "triton_gn": lambda x, w, b, **_: F.silu(triton_gn.group_norm(x, GROUPS, w, b)),
    "no parameters": lambda x, **_: F.silu(F.group_norm(x, GROUPS)),
    "instance_norm": lambda x, w, b, **_: F.silu(F.instance_norm(x, weight=w, bias=b, eps=1e-3)),
    "torch.instance_norm": lambda x, w, b, **_: F.silu(
        torch.instance_norm(x, w, b, None, None, True, 0.1, 1e-5, False)
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_every_spelling_of_the_norm_is_found(name: str) -> None:
    assert only(fused_in(NORMS[name]).folded).startswith("silu")


def silu_formula(y: Tensor) -> Tensor:
    return y * torch.sigmoid(y)


def silu_method(y: Tensor) -> Tensor:
    return y.sigmoid() * y


ACTIVATIONS: dict[str, tuple[Block, str]] = {
    "F.silu in place": (lambda y: F.silu(y, inplace=True), "silu"),
    "F.silu in place by position": (lambda y: F.silu(y, True), "silu"),
    "formula": (silu_formula, "silu"),
    "formula by method": (silu_method, "silu"),
    "torch.relu": (torch.relu, "relu"),
    "relu method": (lambda y: y.relu(), "relu"),
    "relu_ method": (lambda y: y.relu_(), "relu"),
    "F.relu_": (F.relu_, "relu"),
    "tanh method": (lambda y: y.tanh(), "tanh"),
    "F.gelu tanh": (lambda y: F.gelu(y, approximate="tanh"), "gelu_tanh"),
    "F.leaky_relu by position": (lambda y: F.leaky_relu(y, 0.01, True), "leaky_relu"),
    "other slope": (lambda y: F.leaky_relu(y, 0.2, True), "leaky_relu(0.2)"),
    "other alpha by name": (lambda y: F.elu(y, alpha=2), "elu(2.0)"),
    "dropout of 0": (lambda y: F.silu(F.dropout(y, 0.0)), "silu"),
    "dropout in eval": (lambda y: F.silu(F.dropout(y, 0.5, False)), "silu"),
    "contiguous": (lambda y: F.silu(y.contiguous()), "silu"),
    "own dtype": (lambda y: F.silu(y.to(torch.float64)), "silu"),
    "double": (lambda y: F.silu(y.double()), "silu"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_spelling_of_the_activation_is_fused(name: str) -> None:
    function, activation = ACTIVATIONS[name]
    report = fused_in(lambda x, w, b, **_: function(norm(x, w, b)))
    assert only(report.folded).startswith(activation + ";")


@pytest.mark.parametrize("name", [name for name in TABLE if name != "none"])
def test_the_whole_table_is_fused_as_function_and_as_module(name: str) -> None:
    row = TABLE[name]
    function = getattr(F, str(row.function))
    report = fused_in(lambda x, w, b, **_: function(norm(x, w, b), **row.arguments))
    assert only(report.folded).startswith(name + ";")
    module = getattr(nn, str(row.module))(**row.arguments)
    model = nn.Sequential(nn.GroupNorm(GROUPS, C), module).double()
    assert only(check_modules(model).folded).startswith(name + ";")


def check_modules(model: nn.Module, shape: tuple[int, ...] = (N, C, 3, 5)) -> Report:
    """Fuse a model that torch.fx traced, compare values and gradients; return the report."""
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    traced = fx.symbolic_trace(model)
    report = fuse.graph(traced, [x], always=True)
    variables = [x, *model.parameters()]
    received, expected = traced(x), model(x)
    torch.testing.assert_close(received, expected, rtol=1e-10, atol=1e-10)
    for y, other in zip(
        torch.autograd.grad(received.square().sum() + received.sum(), variables),
        torch.autograd.grad(expected.square().sum() + expected.sum(), variables),
        strict=True,
    ):
        torch.testing.assert_close(y, other, rtol=1e-10, atol=1e-10)
    return report


def adm(x: Tensor, w: Tensor, b: Tensor, s: Tensor, t: Tensor, **_: Tensor) -> Tensor:
    return F.silu(norm(x, w, b) * (1 + s[:, :, None, None]) + t[:, :, None, None])


AROUND: dict[str, tuple[Block, str]] = {
    "1 + s, indexed": (adm, "scale, shift, silu"),
    "unsqueezed outside": (
        lambda x, s, **_: norm(x) * (s + 1).unsqueeze(-1).unsqueeze(-1),
        "scale",
    ),
    "viewed": (
        lambda x, s, t, **_: norm(x) * (1 + s.view(-1, C, 1, 1)) + t.reshape(N, C, 1, 1),
        "scale, shift",
    ),
    "on the left": (
        lambda x, s, t, **_: t[..., None, None] + (1.0 + s[..., None, None]) * norm(x),
        "scale, shift",
    ),
    "methods": (
        lambda x, s, t, **_: norm(x).mul(s.add(1)[..., None, None]).add(t[..., None, None]),
        "scale, shift",
    ),
    "in place": (
        lambda x, s, t, **_: norm(x).mul_(1 + s[..., None, None]).add_(t[..., None, None]),
        "scale, shift",
    ),
    "addcmul": (
        lambda x, s, t, **_: torch.addcmul(t[..., None, None], norm(x), 1 + s[..., None, None]),
        "scale, shift",
    ),
    "addcmul of itself": (
        lambda x, s, t, **_: _addcmul_itself(norm(x), s[..., None, None]),
        "scale",
    ),
    "factor per channel": (lambda x, w, b, c, **_: norm(x, w, b) * c, "factor"),
    "factor without weight": (lambda x, c, **_: norm(x) * c + c[None], "factor, shift"),
    "factor and scale": (
        lambda x, w, b, c, s, **_: norm(x, w, b) * c * (1 + s[..., None, None]),
        "factor, scale",
    ),
    "shift per channel": (lambda x, c, **_: F.relu(norm(x) + c), "shift, relu"),
    "residual": (lambda x, w, b, r, **_: F.relu(norm(x, w, b) + r), "residual, relu"),
    "residual on the left": (lambda x, r, **_: F.relu(r + norm(x)), "residual, relu"),
    "residual in place": (lambda x, r, **_: _iadd(norm(x), r), "residual, relu"),
    "residual of the input": (lambda x, w, b, **_: F.silu(norm(x, w, b) + x), "residual, silu"),
    "residual and shift": (lambda x, r, c, **_: norm(x) + r + c, "residual, shift"),
    "torch.add": (lambda x, r, **_: torch.add(norm(x), r), "residual"),
    "pre_add": (lambda x, w, b, t, **_: norm(x + t[..., None, None], w, b).relu(), "pre_add, relu"),
    "pre_add on the left": (lambda x, c, **_: norm(c + x), "pre_add"),
    "everything": (
        lambda x, w, b, s, t, c, r, **_: F.silu(
            norm(x + c, w, b) * (1 + s[..., None, None]) + t[..., None, None] + r
        ),
        "pre_add, scale, shift, residual, silu",
    ),
}


def _addcmul_itself(y: Tensor, s: Tensor) -> Tensor:
    return torch.addcmul(y, y, s)


def _iadd(y: Tensor, r: Tensor) -> Tensor:
    y += r
    return F.relu(y, inplace=True)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", AROUND)
def test_every_spelling_of_what_is_around_is_fused(name: str, inner: str) -> None:
    block, names = AROUND[name]
    report = fused_in(block, inner)
    assert only(report.folded).partition(";")[0] == names


def test_pixels_are_one() -> None:
    def block(x: Tensor, w: Tensor, b: Tensor, t: Tensor, **_: Tensor) -> Tensor:
        pixel = x[:, :, :1, :1]
        return F.silu(norm(pixel, w, b) + t[..., None, None])

    assert only(fused_in(block).folded).startswith("shift, silu;")


def test_rank_2_and_3() -> None:
    def flat(x: Tensor, w: Tensor, b: Tensor, s: Tensor, t: Tensor, **_: Tensor) -> Tensor:
        return norm(x.mean((2, 3)), w, b) * (1 + s) + t

    def sequence(x: Tensor, w: Tensor, b: Tensor, c: Tensor, **_: Tensor) -> Tensor:
        return norm(x.flatten(2), w, b) * c[:, 0] + c[:, 0]

    assert only(fused_in(flat).folded).startswith("scale, shift;")
    assert only(fused_in(sequence).folded).startswith("factor, shift;")


@pytest.mark.parametrize("name", ["1 + s, indexed", "residual", "pre_add", "everything"])
def test_dynamic_shapes_are_fused(name: str) -> None:
    block, names = AROUND[name]
    assert only(fused_in(block, dynamic=True).folded).startswith(names + ";")


def test_inference_is_fused() -> None:
    with torch.no_grad():
        assert only(fused_in(adm, grads=False).folded).startswith("scale, shift, silu;")


REFUSED: dict[str, tuple[Block, str]] = {
    "two consumers": (lambda x, **_: _twice(norm(x)), "several places"),
    "view kept": (lambda x, **_: _view_kept(norm(x)), "several places"),
    "view": (lambda x, **_: norm(x).flatten(2).relu(), "flatten is not an operation"),
    "mutated input": (lambda x, r, **_: _mutates_between(x * 1, r), "may write to memory"),
    "mutated residual": (lambda x, r, **_: _mutates_after(norm(x), r * 1), "written in place"),
    "sum into the residual": (lambda x, r, **_: _into(norm(x), r * 1), "writes into its other"),
    "other dtype": (lambda x, **_: norm(x).float().relu(), "is not an operation"),
    "promoted": (lambda x, r, **_: norm(x.float()) + r, "changes the dtype"),
    "broadcast residual": (lambda x, r, **_: norm(x) + r[:, :, :1], "may need broadcasting"),
    "residual that broadcasts y": (lambda x, r, **_: norm(x[:1]) + r, "broadcasts the result"),
    "last dimension": (lambda x, r, **_: norm(x) * r[0, 0, 0], "not one value per channel"),
    "factor per sample": (lambda x, s, **_: norm(x) * s[..., None, None], "loses digits"),
    "number": (lambda x, **_: norm(x) * 2.0, "a number"),
    "alpha": (lambda x, r, **_: torch.add(norm(x), r, alpha=2), "further arguments"),
    "integer": (lambda x, r, **_: norm(x) + r.round().long(), "operand of torch.int64"),
    "slope as a tensor": (lambda x, c, **_: F.prelu(norm(x), c.flatten()), "is not an operation"),
    "unknown activation": (lambda x, **_: F.softplus(norm(x)), "is not an operation"),
    "dropout in training": (lambda x, **_: F.dropout(norm(x), 1.0).relu(), "is not an operation"),
    "no_grad in between": (lambda x, r, **_: _no_grad_between(norm(x), r), "may write to memory"),
    "twice": (lambda x, **_: _double(norm(x)), "uses the result of the norm twice"),
    "mutated scale": (lambda x, s, **_: _mutates_scale(x, s * 1), "reads its scale too early"),
}


def _twice(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.relu(), y


def _double(y: Tensor) -> Tensor:
    return y + y


def _view_kept(y: Tensor) -> tuple[Tensor, Tensor]:
    row = y[0]
    return y.relu(), row


def _mutates_between(x: Tensor, r: Tensor) -> Tensor:
    with torch.no_grad():  # else autograd refuses the mutation
        y = norm(x)
        x.mul_(2)
        return F.relu(y + r)


def _mutates_after(y: Tensor, r: Tensor) -> Tensor:
    y = F.relu(y + r)
    r.mul_(2)
    return y


def _into(y: Tensor, r: Tensor) -> Tensor:
    r += y
    return r


def _no_grad_between(y: Tensor, r: Tensor) -> Tensor:
    with torch.no_grad():
        factor = r.mean()
    return y.relu() * factor


def _mutates_scale(x: Tensor, s: Tensor) -> Tensor:
    factor = (1 + s)[..., None, None]
    s.zero_()
    return norm(x) * factor


@pytest.mark.parametrize("name", REFUSED)
def test_in_doubt_nothing_is_fused_and_the_reason_is_told(name: str) -> None:
    block, reason = REFUSED[name]
    tolerance = 1e-5 if name == "promoted" else 1e-10  # the norm is in float32
    report = fused_in(block, grads=name != "mutated input", tolerance=tolerance)
    assert report.folded == []
    assert reason in only(report.replaced)


def test_values_of_one_per_group_stay_with_pytorch() -> None:
    def block(x: Tensor, **_: Tensor) -> Tensor:
        return torch.group_norm(x[:1, :, :1, :1], C).relu()

    assert only(fused_in(block).left) == "each group has one value"


def test_running_statistics_are_left() -> None:
    model = nn.Sequential(nn.InstanceNorm2d(C, track_running_stats=True), nn.ReLU()).double().eval()
    assert only(check_modules_without_parameters(model).left) == "has running statistics"


def check_modules_without_parameters(model: nn.Module) -> Report:
    x = torch.randn(N, C, 3, 5, dtype=torch.float64)
    traced = fx.symbolic_trace(model)
    report = fuse.graph(traced, [x], always=True)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-10, atol=1e-10)
    return report


class Subclass(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "GroupNorm": (lambda: nn.Sequential(nn.GroupNorm(GROUPS, C), nn.SiLU(True)), "silu;"),
    "triton_gn.GroupNorm": (
        lambda: nn.Sequential(triton_gn.GroupNorm(GROUPS, C), nn.Identity(), nn.ReLU()),
        "relu;",
    ),
    "InstanceNorm": (
        lambda: nn.Sequential(nn.InstanceNorm2d(C, affine=True), nn.Dropout(0.0), nn.ReLU()),
        "relu;",
    ),
    "no parameters": (
        lambda: nn.Sequential(nn.Conv2d(C, C, 1), nn.GroupNorm(GROUPS, C, affine=False), nn.GELU()),
        "gelu;",
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_a_symbolic_trace_are_fused(name: str) -> None:
    build, fused = MODULES[name]
    assert only(check_modules(build().double()).folded).startswith(fused)


def test_modules_that_do_more_are_left() -> None:
    hooked = nn.Sequential(nn.GroupNorm(GROUPS, C), nn.ReLU()).double()
    hooked[0].register_forward_hook(lambda module, inputs, output: output * 2)
    assert "hooks" in only(check_modules(hooked).left)
    hooked = nn.Sequential(nn.GroupNorm(GROUPS, C), nn.ReLU()).double()
    hooked[1].register_forward_hook(lambda module, inputs, output: output * 2)
    assert "not an operation" in only(check_modules(hooked).replaced)
    dropout = nn.Sequential(nn.GroupNorm(GROUPS, C), nn.Dropout(0.5), nn.ReLU()).double().eval()
    assert check_modules(dropout).folded == []  # the graph module may go back to training
    assert only(check_modules(dropout).replaced).endswith("not an operation that can be fused")


def test_subclass_with_its_own_forward_is_left() -> None:
    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    model = nn.Sequential(Subclass(GROUPS, C), nn.ReLU())
    traced = fx.GraphModule(model, Leaves().trace(model))
    assert "a subclass" in only(fuse.graph(traced, always=True).left)


def test_without_shapes_activations_alone_are_fused() -> None:
    def block(x: Tensor, r: Tensor) -> Tensor:
        return F.silu(F.group_norm(F.group_norm(x, GROUPS) + r, GROUPS))

    traced = fx.symbolic_trace(block)
    report = fuse.graph(traced, always=True)
    first, second = report.replaced
    assert "pass example_inputs" in first[1]
    assert second[1].startswith("silu;")
    tensors = operands()
    torch.testing.assert_close(
        traced(tensors["x"], tensors["r"]), block(tensors["x"], tensors["r"]), rtol=1e-10, atol=0
    )


def test_operator_in_a_graph_keeps_its_settings() -> None:
    op = torch.ops.triton_gn.group_norm.default

    def block(x: Tensor, w: Tensor, t: Tensor, r: Tensor) -> Any:
        arguments = (x, w, None, None, None, None, None, GROUPS, 1e-5, "none", torch.float64, "{}")
        return F.relu(op(*arguments)[0] + t[..., None, None] + r)

    traced = fx.symbolic_trace(block)
    inputs = [operands()[name] for name in "xwtr"]
    modes = torch._subclasses.FakeTensorMode()
    fakes = dict(zip("xwtr", (modes.from_tensor(tensor) for tensor in inputs), strict=True))
    for node in traced.graph.nodes:
        is_y = node.target is operator.getitem and node.args[1] == 0
        if node.op == "placeholder":
            node.meta["val"] = fakes[node.name]
        elif node.target is operator.getitem and not is_y:
            node.meta["val"] = modes.from_tensor(torch.empty(N, C, 1, 1, dtype=torch.float64))
        elif node.op != "output":
            node.meta["val"] = fakes["x"]
    report = fuse.graph(traced, always=True)
    assert only(report.folded).startswith("shift, residual, relu;")
    (call,) = [node for node in traced.graph.nodes if node.target is op]
    assert call.args[7:] == (GROUPS, 1e-5, "relu", torch.float64, "{}")


def test_exported_program_is_fused_and_keeps_its_outputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(GROUPS, C)

        def forward(self, x: Tensor, s: Tensor) -> Tensor:
            return F.silu(self.norm(x) * (1 + s[:, :, None, None]), inplace=True)

    model = Model().double()
    inputs = operands()["x"].detach(), operands()["s"].detach()
    program = torch.export.export(model, inputs)
    report = fuse.graph(program.graph_module, always=True)
    assert only(report.folded).startswith("scale, silu;")
    torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=1e-10, atol=1e-10)


def test_graphs_inside_are_fused() -> None:
    def block(x: Tensor, w: Tensor, b: Tensor, **_: Tensor) -> Any:
        def inner(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return F.silu(norm(x, w, b))

        return torch.utils.checkpoint.checkpoint(inner, x, w, b, use_reentrant=False)

    assert only(fused_in(block).folded).startswith("silu;")


def test_report_and_log_name_each_norm(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.GroupNorm(GROUPS, C), nn.ReLU()).double()
    with caplog.at_level("INFO", "triton_gn.fuse"):
        report = check_modules(model)
    assert str(report).splitlines()[0].startswith("1 GroupNorm layer: 1 replaced")
    assert caplog.messages == ["_0 folded: relu; an activation comes last"]


# A GPU that is not there: fake tensors have its device, and graphs are looked at, not run.


def on_gpu(
    block: Block,
    dtype: torch.dtype = torch.float16,
    memory_format: torch.memory_format = torch.contiguous_format,
    shape: tuple[int, ...] = (N, C, 32, 32),
    always: bool = True,
) -> tuple[Report, fx.GraphModule]:
    """Fuse a block of x and a residual on a fake GPU; return the report and the graph."""
    traced = fx.symbolic_trace(block)
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(shape, device="cuda", dtype=dtype).to(memory_format=memory_format)
        return fuse.graph(traced, [x, torch.empty_like(x)], always=always), traced


def last_target(traced: fx.GraphModule) -> Any:
    """Return what the node before the output calls."""
    return list(traced.graph.nodes)[-2].target


def activated(x: Tensor, r: Tensor) -> Tensor:
    return F.silu(norm(x) + r)


def test_instance_norm_keeps_its_dtype_under_autocast() -> None:
    report, traced = on_gpu(lambda x, r: F.instance_norm(x).relu())
    assert only(report.folded).startswith("relu;")
    assert last_target(traced) == "to"
    report, traced = on_gpu(lambda x, r: F.instance_norm(x).relu(), torch.float32)
    assert last_target(traced) is triton_gn.group_norm


def test_autocast_to_float32_is_fused_as_the_kernels_follow_it() -> None:
    def block(x: Tensor, r: Tensor) -> Tensor:
        return norm(x).relu()

    traced = fx.symbolic_trace(block)
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(N, C, 4, 4, device="cuda", dtype=torch.float16)
        for node in traced.graph.nodes:
            if node.op != "output":
                node.meta["val"] = x if node.op == "placeholder" else x.float()
        with triton_gn.autocast_policy("keep"):
            assert "which that of the kernels would not be" in only(
                fuse.graph(traced, always=True).left
            )
        assert only(fuse.graph(traced, always=True).folded).startswith("relu;")


def test_channels_last_is_kept_unless_a_view_may_read_it() -> None:
    channels_last = torch.channels_last
    report, _ = on_gpu(activated, memory_format=channels_last)
    assert only(report.folded).startswith("residual, silu;")
    for reader in (
        lambda x, r: activated(x, r).view(N, C, -1),
        lambda x, r: torch.as_strided(activated(x, r) + 1, (3,), (1,)),
    ):
        report, _ = on_gpu(reader, memory_format=channels_last)
        assert "memory format would change" in only(report.left)
        report, _ = on_gpu(reader)
        assert only(report.folded).startswith("residual, silu;")


def test_autocast_boundary_is_not_crossed() -> None:
    def inside(x: Tensor, **_: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.relu(norm(x))

    def across(x: Tensor, **_: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = norm(x)
        return F.relu(y)

    assert only(fused_in(inside).folded).startswith("relu;")
    report = fused_in(across)
    assert report.folded == []
    assert "may write to memory or change a mode" in only(report.replaced)
