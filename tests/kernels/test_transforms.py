"""Kernels under torch.func, torch.compile, torch.export, modes and subclasses."""

import functools
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import triton_gn

# these run on the kernels here
from tests.api.test_integration import (  # noqa: F401
    fresh_dynamo,
    test_checkpoint_gives_the_same_bits,
    test_compiled_transforms,
    test_grad_is_autograds,
    test_subclasses_are_kept,
)
from triton_gn import reference
from triton_gn.ops import custom_op, dispatch, launcher, settings
from triton_gn.reference import Operands

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:DeprecationWarning"  # PyTorch's own use
)
FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "innermost"])
SHAPE, GROUPS = (2, 6, 4, 5), 3
ALL = tuple(range(len(Operands._fields)))


@pytest.fixture(autouse=True)
def memory() -> None:
    """Turn off the guarded memory: fake tensors need the functions that it replaces."""


@pytest.fixture(autouse=True)
def through_kernels() -> Iterator[None]:
    with triton_gn.backend("triton"):
        yield
    torch.compiler.reset()


def operands(
    device: str, channels_last: bool = False, shape: tuple[int, ...] = SHAPE, seed: int = 0
) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random).to(device)

    x, residual, (n, channels) = draw(*shape), draw(*shape), shape[:2]
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    per_channel = [draw(channels), draw(channels), draw(n, channels), draw(channels)]
    return [x, *per_channel, draw(n, channels), residual]


def fused(*tensors: Tensor, activation: str = "silu") -> Tensor:
    x, weight, bias, *fused_tensors = Operands(*tensors)
    named = dict(zip(Operands._fields[3:], fused_tensors, strict=True))
    return triton_gn.group_norm(x, GROUPS, weight, bias, activation=activation, **named)


def formulas(*tensors: Tensor, activation: str = "silu") -> Tensor:
    return reference.group_norm(Operands(*tensors), GROUPS, 1e-5, activation)


def loss(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return function(*tensors).square().sum()


def assert_close(results: object, expected: object) -> None:
    # float32 against float32: sums of some hundred terms of size 10
    torch.testing.assert_close(results, expected, rtol=2e-5, atol=2e-5)


# which operands have a dimension of examples: all but some, the input alone, the weight alone
@pytest.mark.parametrize(
    "dims",
    [(0, None, None, None, None, 0, 0), (0,) + (None,) * 6, (None, 0) + (None,) * 5, (1,) * 7],
    ids=["some", "input", "weight", "all"],
)
@FORMATS
def test_gradients_per_example(
    device: str, channels_last: bool, dims: tuple[int | None, ...]
) -> None:
    examples = [operands(device, channels_last, seed=seed) for seed in range(3)]
    batch = [
        examples[0][i] if dim is None else torch.stack([example[i] for example in examples], dim)
        for i, dim in enumerate(dims)
    ]
    grads = vmap(grad(functools.partial(loss, fused), argnums=ALL), dims)(*batch)
    for index, example in enumerate(examples):
        tensors = [b if dim is None else t for b, t, dim in zip(batch, example, dims, strict=True)]
        expected = grad(functools.partial(loss, formulas), argnums=ALL)(*tensors)
        assert_close([t[index] for t in grads], list(expected))


def test_vmap_within_vmap(device: str) -> None:
    x = torch.randn(2, 3, *SHAPE, device=device)
    parameters = operands(device)[1:]

    def with_input(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return vmap(vmap(lambda x: function(x, *parameters)))

    assert_close(with_input(fused)(x), with_input(formulas)(x))


def test_gradients_per_example_are_computed_by_the_kernels(device: str) -> None:
    x, *others = operands(device)
    with launcher.recording() as calls:
        vmap(grad(functools.partial(loss, fused)), (0,) + (None,) * 6)(torch.stack([x, x]), *others)
    assert {call.problem.direction for call in calls} == {"forward", "backward"}


@FORMATS
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_double_backward(device: str, channels_last: bool, activation: str) -> None:
    def penalty(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in operands(device, channels_last)]
        y = function(*leaves, activation=activation)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [t.detach() for t in (*first, *second)]

    for result, expected in zip(penalty(fused), penalty(formulas), strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5 * scale)


def test_create_graph_changes_no_bit_of_the_gradient(device: str) -> None:
    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in operands(device)]
        y = fused(*leaves).square().sum()
        return torch.autograd.grad(y, leaves, create_graph=create_graph)

    for plain, recorded in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recorded)
        assert recorded.requires_grad


def test_forward_mode_is_right_and_says_that_it_is_slow(device: str) -> None:
    tensors = operands(device, channels_last=True)
    tangents = tuple(torch.ones_like(t) for t in tensors)
    dispatch.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="forward-mode"):
        y, dy = jvp(fused, tuple(tensors), tangents)
    assert_close((y, dy), jvp(formulas, tuple(tensors), tangents))
    with forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        dual = fused(*map(forward_ad.make_dual, tensors, tangents))
        assert_close(forward_ad.unpack_dual(dual).tangent, dy)
        assert dual.stride() == tensors[0].stride()


@pytest.mark.filterwarnings("ignore:triton_gn runs forward-mode")
def test_hessian(device: str) -> None:
    x = torch.randn(1, 6, 3, device=device)

    def of(function: Callable[..., Tensor]) -> Tensor:
        def sum_of_squares(x: Tensor) -> Tensor:
            return function(x, *[None] * 6, activation="tanh").square().sum()

        return hessian(sum_of_squares)(x)

    assert_close(of(fused), of(formulas))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_breaks(device: str, dynamic: bool) -> None:
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for channels_last, shape in ((False, SHAPE), (True, (3, 6, 6, 5)), (False, (4, 6, 7, 5))):
        tensors = operands(device, channels_last, shape)
        results = []
        for function in (compiled, fused):
            leaves = [t.detach().requires_grad_() for t in tensors]
            y = function(*leaves)
            y.square().sum().backward()
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
            assert y.stride() == leaves[0].stride()
        for tensor, expected in zip(*results, strict=True):
            assert torch.equal(tensor, expected)  # the same kernels


def test_compile_runs_the_operator_and_no_activation(device: str) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    layer = triton_gn.GroupNorm(GROUPS, 6, activation="silu").to(device)
    torch.compile(layer, fullgraph=True, backend=keep)(operands(device)[0])
    (graph,) = graphs
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert any("triton_gn.group_norm" in name for name in called), called
    assert not any("silu" in name for name in called), called


def test_settings_are_those_of_the_compilation(device: str) -> None:
    """Settings hold in forward and backward, whatever is set when they run."""
    x = operands(device)[0].requires_grad_()
    expected = fused(x, *[None] * 6)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with triton_gn.plan_override(strategy="split", splits=2):
        override = settings.to_text(settings.current())
        compiled(x, *[None] * 6)
    with launcher.recording() as calls:
        y = compiled(x, *[None] * 6)
        y.sum().backward()
    seen = [(call.problem.direction, call.config.strategy) for call in calls]
    assert seen == [("forward", "split"), ("backward", "split")]
    assert_close(y, expected)
    assert settings.from_text(override).plan_override == (("splits", 2), ("strategy", "split"))


@FORMATS
def test_operators_pass_pytorchs_checks(device: str, channels_last: bool) -> None:
    leaves = [t.requires_grad_() for t in operands(device, channels_last)]
    text = settings.to_text(settings.current())
    constants = (GROUPS, 1e-5, "silu")
    torch.library.opcheck(custom_op.group_norm, (*leaves, *constants, torch.float32, text))
    y, stats = custom_op.group_norm(*leaves, *constants, torch.float32, text)
    dy = torch.randn_like(y).requires_grad_()
    arguments = (dy, stats.detach(), *leaves, *constants, text, [True] * 7)
    torch.library.opcheck(custom_op.group_norm_backward, arguments)


@pytest.mark.parametrize("strict", [False, True])
def test_export(device: str, strict: bool) -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = triton_gn.GroupNorm(GROUPS, 6, activation="silu").to(device)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.norm(x, scale=scale)

    n, height = torch.export.Dim("n", min=2), torch.export.Dim("height", min=2)
    x, scale = torch.randn(SHAPE, device=device), torch.randn(2, 6, device=device)
    network = Network()
    program = torch.export.export(
        network, (x, scale), dynamic_shapes=({0: n, 2: height}, {0: n}), strict=strict
    )
    called = [str(node.target) for node in program.graph.nodes]
    assert "triton_gn.group_norm.default" in called
    x, scale = torch.randn(5, 6, 9, 5, device=device), torch.randn(5, 6, device=device)
    assert torch.equal(program.module()(x, scale), network(x, scale))


@pytest.mark.parametrize("strict", [False, True])
def test_export_under_the_torch_backend_needs_pytorch_alone(device: str, strict: bool) -> None:
    layer, x = triton_gn.GroupNorm(GROUPS, 6, activation="silu").to(device), operands(device)[0]
    with triton_gn.backend("torch"):
        program = torch.export.export(layer, (x,), strict=strict)
        expected = layer(x)
    assert not [node for node in program.graph.nodes if "triton_gn" in str(node.target)]
    torch.testing.assert_close(program.module()(x), expected)


def test_tracing_sees_the_operator(device: str) -> None:
    tensors = operands(device)
    graph = make_fx(lambda *tensors: fused(*tensors))(*tensors)
    assert "triton_gn.group_norm.default" in [str(node.target) for node in graph.graph.nodes]
    assert torch.equal(graph(*tensors), fused(*tensors))


@pytest.mark.parametrize("per_example", [False, True])
def test_tracing_sees_through_transforms(device: str, per_example: bool) -> None:
    x, *others = operands(device)
    gradient = grad(lambda x: loss(fused, x, *others))
    if per_example:
        gradient, x = vmap(gradient), torch.stack([x, 2 * x])
    assert_close(make_fx(gradient)(x)(x), gradient(x))


def test_fake_tensors_have_the_right_strides(device: str) -> None:
    with FakeTensorMode():
        tensors = [t.requires_grad_() for t in operands(device, channels_last=True)]
        y = fused(*tensors)
        y.sum().backward()
    assert y.stride() == tensors[0].grad.stride() == tensors[0].stride()


def test_selective_checkpoints_see_the_operator(device: str) -> None:
    seen = []

    def policy(_: object, operator: object, *args: object, **options: object) -> CheckpointPolicy:
        seen.append(str(operator))
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    leaves = [t.requires_grad_() for t in operands(device)]
    y = checkpoint(fused, *leaves, use_reentrant=False, context_fn=contexts)
    y.sum().backward()
    assert "triton_gn.group_norm.default" in seen


def test_a_wrapper_goes_through_the_operator(device: str) -> None:
    class Wrapper(Tensor):
        seen: tuple[str, ...] = ()
        __torch_function__ = torch._C._disabled_torch_function_impl

        @staticmethod
        def __new__(cls, inner: Tensor):
            wrapper = Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
            )
            wrapper.inner = inner
            return wrapper

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            Wrapper.seen += (str(function),)
            args = (t.inner if isinstance(t, Wrapper) else t for t in args)
            return function(*args, **kwargs or {})

    x = torch.randn(SHAPE, device=device)
    y = triton_gn.group_norm(Wrapper(x), GROUPS, activation="relu")
    assert Wrapper.seen == ("triton_gn.group_norm.default",)
    assert torch.equal(y, triton_gn.group_norm(x, GROUPS, activation="relu"))


def test_autocast_policy(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatch asks for the fallback on a CUDA device; gpu/test_gpu.py checks the result."""
    asked = []
    monkeypatch.setattr(
        dispatch.fallback,
        "group_norm",
        lambda operands, call, _: asked.append(call.y_dtype) or operands.x,
    )

    class OnCuda(Tensor):
        is_cuda = True

    x = torch.randn(SHAPE).half().as_subclass(OnCuda)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    for policy in ("torch", "keep"):
        with triton_gn.autocast_policy(policy), triton_gn.backend("torch"):
            dispatch.group_norm(Operands(x), GROUPS, 1e-5, "none")
    assert asked == [torch.float32, torch.float16]
