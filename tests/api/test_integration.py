"""group_norm inside the rest of PyTorch, on the CPU: compilers, transforms, modes, parallelism."""

import functools
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import checkpoint

import triton_gn
from tests.support import calls
from tests.support.calls import LAYOUTS, each_layout
from tests.support.pairs import each_pair
from tests.support.tensors import random

# PyTorch's own compiler and forward-mode formulas use what PyTorch warns of
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script.* is deprecated:DeprecationWarning"
)

GROUPS = 2
ACTIVATIONS = (None, "silu")
each_fusion = pytest.mark.parametrize("activation", ACTIVATIONS, ids=["plain", "fused"])


def make_operands(
    activation: str | None = "silu",
    channels_last: bool = False,
    shape: tuple[int, ...] = (2, 4, 5, 3),
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:
    """Draw input, weight and bias; with an activation all the others too, in their order."""
    names = calls.FUSED if activation else ()
    return tuple(calls.make_operands(names, channels_last, dtype, shape).values())


def group_norm(activation: str | None, *operands: Tensor) -> Tensor:
    return calls.fused(activation, dict(zip(calls.OPERANDS, operands, strict=False)), GROUPS)


def composed(activation: str | None, *operands: Tensor) -> Tensor:
    return calls.composed(activation, dict(zip(calls.OPERANDS, operands, strict=False)), GROUPS)


def step(
    function: Callable[..., Tensor], operands: tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """y and the gradient of each operand."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    y = function(*leaves)
    y.backward(random(*y.shape, seed=9).to(y.dtype))
    return y.detach(), [leaf.grad for leaf in leaves]


# Compilers


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


SHAPES = ((2, 4, 5, 3), (2, 4, 7, 3), (3, 4, 7, 6))


@pytest.mark.usefixtures("fresh_dynamo")
@each_pair("activation channels_last dynamic", ACTIVATIONS, LAYOUTS, [False, True])
def test_compiled_is_eager(activation: str | None, channels_last: bool, dynamic: bool) -> None:
    eager = functools.partial(group_norm, activation)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in SHAPES[: 3 if dynamic else 1]:
        operands = make_operands(activation, channels_last, shape)
        y, grads = step(compiled, operands)
        assert y.stride() == operands[0].stride()
        torch.testing.assert_close((y, grads), step(eager, operands))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor_is_eager() -> None:
    eager = functools.partial(group_norm, "silu")
    compiled = torch.compile(eager, fullgraph=True, dynamic=True)
    for shape in SHAPES[::2]:
        operands = make_operands("silu", True, shape, torch.float32)
        y, grads = step(compiled, operands)
        assert y.stride() == operands[0].stride()
        torch.testing.assert_close((y, grads), step(eager, operands))


@pytest.mark.usefixtures("fresh_dynamo")
@each_pair("activation channels_last dynamic", ACTIVATIONS, LAYOUTS, [True, None, False])
def test_another_size_is_not_compiled_again(
    activation: str | None, channels_last: bool, dynamic: bool | None
) -> None:
    """PyTorch learns from the second size, unless told, that sizes vary."""
    counter = CompileCounter()
    compiled = torch.compile(
        functools.partial(group_norm, activation),
        backend=counter,
        fullgraph=True,
        dynamic=dynamic,
    )
    for shape in ((2, 4, 5, 6), (3, 4, 7, 8), (4, 4, 9, 10)):
        compiled(*make_operands(activation, channels_last, shape))
    assert counter.frame_count == {True: 1, None: 2, False: 3}[dynamic]


@pytest.mark.usefixtures("fresh_dynamo")
@each_layout
def test_layer_compiles_in_a_network(channels_last: bool) -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1),
        triton_gn.GroupNorm(GROUPS, 4, activation="silu"),
        nn.Conv2d(4, 4, 1),
        triton_gn.GroupNorm(GROUPS, 4),
    ).double()
    x = make_operands(None, channels_last)[0]
    results = []
    for run in (network, torch.compile(network, backend="aot_eager", fullgraph=True)):
        network.zero_grad()
        y = run(x)
        y.square().mean().backward()
        results.append((y, [parameter.grad for parameter in network.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("fresh_dynamo")
def test_settings_hold_under_compile() -> None:
    compiled = torch.compile(
        functools.partial(group_norm, "silu"), backend="aot_eager", fullgraph=True
    )
    operands = make_operands()
    with triton_gn.backend("triton"), pytest.raises(RuntimeError, match='backend is "triton"'):
        compiled(*operands)
    with triton_gn.backend("torch"):
        torch.testing.assert_close(compiled(*operands), composed("silu", *operands))


@pytest.mark.usefixtures("fresh_dynamo")
def test_settings_can_be_made_inside_what_is_compiled() -> None:
    @torch.compile(backend="aot_eager")
    def set_inside(*operands: Tensor) -> Tensor:
        with triton_gn.backend("torch"):
            return group_norm("silu", *operands)

    operands = make_operands()
    with triton_gn.backend("triton"):  # which has no kernels here
        torch.testing.assert_close(set_inside(*operands), composed("silu", *operands))


@pytest.mark.usefixtures("fresh_dynamo")
def test_errors_are_the_same_under_compile() -> None:
    compiled = torch.compile(functools.partial(group_norm, "silu"), backend="aot_eager")
    x, weight, bias, scale, *_ = make_operands()
    with pytest.raises(ValueError, match=r"scale must have shape \(4,\), .*; got \(2, 3\)"):
        compiled(x, weight, bias, scale[:, :3])


class Norm(nn.Module):
    def __init__(self, activation: str | None) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, *operands: Tensor) -> Tensor:
        return group_norm(self.activation, *operands)


@each_pair("activation channels_last strict", ACTIVATIONS, LAYOUTS, [True, False])
def test_exported_takes_other_sizes(
    activation: str | None, channels_last: bool, strict: bool
) -> None:
    image = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("height", min=2)}
    per_operand = [image, None, None, {0: image[0]}, None, None, image]
    operands = make_operands(activation, channels_last, (2, 4, 5, 3))
    exported = torch.export.export(
        Norm(activation),
        operands,
        dynamic_shapes=(tuple(per_operand[: len(operands)]),),
        strict=strict,
    )
    for shape in ((2, 4, 5, 3), (3, 4, 8, 3), (5, 4, 2, 3)):
        others = make_operands(activation, channels_last, shape)
        y = exported.module()(*others)
        assert y.stride() == others[0].stride()
        torch.testing.assert_close(y, group_norm(activation, *others))


# Transforms


def loss(function: Callable[..., Tensor], activation: str | None, *operands: Tensor) -> Tensor:
    return function(activation, *operands).pow(3).sum()


@each_fusion
@each_layout
def test_grad_is_autograds(activation: str | None, channels_last: bool) -> None:
    operands = make_operands(activation, channels_last)
    everything = tuple(range(len(operands)))
    ours, theirs = (
        grad(functools.partial(loss, function, activation), argnums=everything)(*operands)
        for function in (group_norm, composed)
    )
    torch.testing.assert_close(ours, theirs)


@each_pair("activation channels_last dim", ACTIVATIONS, LAYOUTS, [0, 2])
def test_vmap_is_a_loop(activation: str | None, channels_last: bool, dim: int) -> None:
    one_by_one = [make_operands(activation, channels_last, (2, 4, 5, size)) for size in (3, 3, 3)]
    one_by_one = [tuple(t + i for t in operands) for i, operands in enumerate(one_by_one)]
    dims = [dim if t.ndim > 2 else 0 for t in one_by_one[0]]
    stacked = [
        torch.stack(ts, d) for ts, d in zip(zip(*one_by_one, strict=True), dims, strict=True)
    ]
    function = functools.partial(group_norm, activation)
    y = vmap(function, in_dims=tuple(dims))(*stacked)
    torch.testing.assert_close(y, torch.stack([function(*operands) for operands in one_by_one]))


@each_layout
@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (None, None, 0)])
def test_vmap_over_one_operand(in_dims: tuple[int | None, ...], channels_last: bool) -> None:
    operands = list(make_operands(None, channels_last))
    batched = in_dims.index(0)
    others = [t + 1 if i == batched else t for i, t in enumerate(operands)]
    one_by_one = [composed(None, *operands), composed(None, *others)]
    operands[batched] = torch.stack([operands[batched], others[batched]])
    y = vmap(functools.partial(group_norm, None), in_dims=in_dims)(*operands)
    torch.testing.assert_close(y, torch.stack(one_by_one))


@pytest.mark.usefixtures("fresh_dynamo")
@each_layout
@pytest.mark.parametrize("per_example", [False, True])
def test_compiled_transforms(channels_last: bool, per_example: bool) -> None:
    operands = make_operands("silu", channels_last)
    argnums = tuple(range(len(operands)))
    gradient = grad(functools.partial(loss, group_norm, "silu"), argnums=argnums)
    examples = (operands, tuple(t + 1 for t in operands)) if per_example else (operands,)
    expected = [gradient(*example) for example in examples]
    if per_example:
        gradient = vmap(gradient)
        operands = tuple(torch.stack(pair) for pair in zip(*examples, strict=True))
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    results = compiled(*operands)
    for i, grads in enumerate(expected):
        torch.testing.assert_close(tuple(t[i] for t in results) if per_example else results, grads)


@each_fusion
@each_layout
def test_gradients_per_sample_of_a_layer(activation: str | None, channels_last: bool) -> None:
    layer = triton_gn.GroupNorm(GROUPS, 4, activation=activation, dtype=torch.float64)
    parameters = dict(layer.state_dict(keep_vars=True))
    x, *_ = make_operands(None, channels_last, (3, 4, 5, 3))

    def loss_of(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        y: Tensor = functional_call(layer, parameters, (sample[None],))
        return y.pow(3).sum()

    detached = {name: parameter.detach() for name, parameter in parameters.items()}
    together = vmap(grad(loss_of), in_dims=(None, 0))(detached, x)
    for sample in range(3):
        alone = torch.autograd.grad(loss_of(parameters, x[sample]), list(parameters.values()))
        torch.testing.assert_close(alone, tuple(values[sample] for values in together.values()))


def output(function: Callable[..., Tensor], activation: str | None, *operands: Tensor) -> Tensor:
    return function(activation, *operands)


@each_fusion
@each_layout
@pytest.mark.parametrize(("transform", "of"), [(jacrev, output), (jacfwd, output), (hessian, loss)])
def test_jacobians_and_hessian(
    transform: Callable[..., Any],
    of: Callable[..., Tensor],
    activation: str | None,
    channels_last: bool,
) -> None:
    # PyTorch has none of them in channels-last
    laid, contiguous = (
        make_operands(activation, cl, (2, 4, 2, 2)) for cl in (channels_last, False)
    )
    argnums = tuple(range(len(laid)))
    ours = transform(functools.partial(of, group_norm, activation), argnums)(*laid)
    theirs = transform(functools.partial(of, composed, activation), argnums)(*contiguous)
    torch.testing.assert_close(ours, theirs)


@each_fusion
@each_layout
def test_jvp_and_dual_numbers(activation: str | None, channels_last: bool) -> None:
    operands = make_operands(activation, channels_last)
    tangents = tuple(random(*t.shape, seed=20 + i) for i, t in enumerate(operands))
    function = functools.partial(group_norm, activation)
    # two reverse modes make a forward mode
    expected = torch.autograd.functional.jvp(
        functools.partial(composed, activation), operands, tangents
    )
    torch.testing.assert_close(jvp(function, operands, tangents), expected)
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(operand, tangent)
            for operand, tangent in zip(operands, tangents, strict=True)
        ]
        result = forward_ad.unpack_dual(function(*duals))
    torch.testing.assert_close((result.primal, result.tangent), expected)


# Modes


@each_pair(
    "activation channels_last mode", ACTIVATIONS, LAYOUTS, [torch.no_grad, torch.inference_mode]
)
def test_nothing_is_recorded(
    mode: Callable[[], AbstractContextManager[None]], activation: str | None, channels_last: bool
) -> None:
    operands = [t.requires_grad_() for t in make_operands(activation, channels_last)]
    with mode():
        y = group_norm(activation, *operands)
    assert not y.requires_grad
    assert y.is_inference() is (mode is torch.inference_mode)
    torch.testing.assert_close(y, group_norm(activation, *operands).detach())


@each_fusion
@each_layout
def test_inference_tensors_are_taken(activation: str | None, channels_last: bool) -> None:
    with torch.inference_mode():
        operands = make_operands(activation, channels_last)
    expected = group_norm(activation, *make_operands(activation, channels_last))
    torch.testing.assert_close(group_norm(activation, *operands), expected)


def faked(operands: tuple[Tensor, ...]) -> list[Tensor]:
    with FakeTensorMode() as mode:
        return [mode.from_tensor(operand) for operand in operands]


def on_meta(operands: tuple[Tensor, ...]) -> list[Tensor]:
    return [operand.to("meta") for operand in operands]


@each_pair(
    "activation channels_last dtype emptied",
    ACTIVATIONS,
    LAYOUTS,
    [torch.bfloat16, torch.float32],
    [faked, on_meta],
)
def test_without_memory_there_are_shapes_dtypes_and_strides(
    emptied: Callable[[tuple[Tensor, ...]], list[Tensor]],
    dtype: torch.dtype,
    activation: str | None,
    channels_last: bool,
) -> None:
    operands = make_operands(activation, channels_last, dtype=dtype)
    leaves = [t.requires_grad_() for t in emptied(operands)]
    y, expected = group_norm(activation, *leaves), group_norm(activation, *operands)
    assert type(y) is type(leaves[0])
    assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())
    grads = torch.autograd.grad(y.sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in operands]


@each_pair(
    "activation channels_last tracing_mode", ACTIVATIONS, LAYOUTS, ["real", "fake", "symbolic"]
)
def test_traced_with_its_gradients(
    tracing_mode: Literal["real", "fake", "symbolic"], activation: str | None, channels_last: bool
) -> None:
    def gradients(dy: Tensor, *operands: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = tuple(operand.detach().requires_grad_() for operand in operands)
        y = group_norm(activation, *leaves)
        return y.detach(), torch.autograd.grad(y, leaves, dy)

    operands = make_operands(activation, channels_last)
    dy = random(*operands[0].shape, seed=9)
    traced = make_fx(gradients, tracing_mode=tracing_mode)(dy, *operands)
    others = tuple(t + 1 for t in (dy, *make_operands(activation, channels_last)))
    torch.testing.assert_close(traced(*others), gradients(*others))


@each_fusion
@each_layout
def test_saved_tensors_can_be_packed(activation: str | None, channels_last: bool) -> None:
    operands = make_operands(activation, channels_last)
    function = functools.partial(group_norm, activation)
    expected = step(function, operands)
    packed = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.clone()):
        torch.testing.assert_close(step(function, operands), expected, rtol=0, atol=0)
    assert any(t.shape == operands[0].shape for t in packed)
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(step(function, operands), expected, rtol=0, atol=0)


def selective() -> Any:
    return checkpoint.create_selective_checkpoint_contexts(
        [torch.ops.aten.native_group_norm.default]
    )


@each_fusion
@each_layout
@pytest.mark.parametrize(
    "how",
    [
        {"use_reentrant": True},
        {"use_reentrant": False},
        {"use_reentrant": False, "context_fn": selective},
    ],
    ids=["reentrant", "not reentrant", "selective"],
)
def test_checkpoint_gives_the_same_bits(
    how: dict[str, Any], activation: str | None, channels_last: bool
) -> None:
    operands = make_operands(activation, channels_last)

    def function(*operands: Tensor) -> Tensor:
        return group_norm(activation, *operands).exp()

    def checkpointed(*operands: Tensor) -> Tensor:
        y: Tensor = checkpoint.checkpoint(function, *operands, **how)
        return y

    torch.testing.assert_close(
        step(checkpointed, operands), step(function, operands), rtol=0, atol=0
    )


@each_pair(
    "activation channels_last dtype autocast",
    ACTIVATIONS,
    LAYOUTS,
    [torch.float16, torch.bfloat16, torch.float32, torch.float64],
    [torch.float16, torch.bfloat16],
)
def test_autocast_gives_the_dtype_of_the_operations_one_by_one(
    activation: str | None, channels_last: bool, dtype: torch.dtype, autocast: torch.dtype
) -> None:
    operands = make_operands(activation, channels_last, dtype=dtype)
    with torch.autocast("cpu", autocast):
        ours, theirs = (function(activation, *operands) for function in (group_norm, composed))
        assert ours.dtype is theirs.dtype
        ours.sum()
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_subclasses_are_kept(compiled: bool) -> None:
    class Image(Tensor):
        pass

    def normalise(x: Tensor) -> Tensor:
        return triton_gn.group_norm(x, GROUPS, activation="silu")

    x = make_operands()[0]
    called = torch.compile(normalise, fullgraph=True, backend="eager") if compiled else normalise
    y = called(x.as_subclass(Image))
    assert type(y) is Image
    torch.testing.assert_close(y.as_subclass(Tensor), normalise(x))


def test_compiled_in_the_context_of_a_device() -> None:
    x, *_ = make_operands()
    compiled = torch.compile(triton_gn.group_norm, fullgraph=True, backend="eager")
    with torch.device("cpu"):
        torch.testing.assert_close(compiled(x, GROUPS), triton_gn.group_norm(x, GROUPS))
