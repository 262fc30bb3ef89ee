"""Calls in unusual surroundings: other scalars, in-place neighbours, hooks, tracers, subclasses.

Here on PyTorch's path; tests/kernels runs the same on the kernels.
"""

import copy
import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import triton_gn
from triton_gn import group_norm, group_norm_apply, group_norm_stats

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
each_format = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=list(FORMATS))
PUBLIC: dict[str, Callable[..., Any]] = {
    "function": group_norm,
    "fused": lambda x, groups, eps=1e-5: group_norm(x, groups, eps=eps, activation="silu"),
    "layer": lambda x, groups, eps=1e-5: triton_gn.GroupNorm(groups, x.shape[1], eps)(x),
    "apply": lambda x, groups, eps=1e-5: group_norm_apply(x, group_norm_stats(x, groups), eps=eps),
}
each_entry = pytest.mark.parametrize("entry", PUBLIC.values(), ids=list(PUBLIC))


def image(seed: int = 0, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    x = torch.randn(2, 8, 4, 5, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=memory_format)


# Scalars


@each_entry
@each_format
@pytest.mark.parametrize(
    "groups", [np.int64(4), np.gcd(4, 8), torch.tensor(4)], ids=["int64", "gcd", "tensor"]
)
def test_number_of_groups_is_any_index(
    entry: Callable[..., Tensor], memory_format: torch.memory_format, groups: Any
) -> None:
    x = image(memory_format=memory_format)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(entry(x.to(dtype), groups), entry(x.to(dtype), 4))


@each_entry
@pytest.mark.parametrize(
    "groups", [True, 4.0, np.float64(4), "4", None, np.array([4, 4])], ids=repr
)
def test_number_of_groups_is_nothing_else(entry: Callable[..., Tensor], groups: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        entry(image(), groups)


@each_entry
@pytest.mark.parametrize(
    "eps",
    [1, True, np.float32(0.5), np.int64(2), torch.tensor(0.5), torch.tensor(2)],
    ids=lambda eps: f"{type(eps).__name__} {eps}",
)
def test_eps_is_what_pytorch_takes(entry: Callable[..., Tensor], eps: Any) -> None:
    F.group_norm(image(), 4, eps=eps)
    assert torch.equal(entry(image(), 4, eps=eps), entry(image(), 4, eps=float(eps)))


@each_entry
@pytest.mark.parametrize(
    "eps",
    ["10", b"10", None, 1j, torch.tensor([1e-5]), torch.tensor(1e-5, requires_grad=True)],
    ids=repr,
)
def test_eps_is_nothing_else(entry: Callable[..., Tensor], eps: Any) -> None:
    with pytest.raises(TypeError):
        F.group_norm(image(), 4, eps=eps)
    with pytest.raises(TypeError, match="group_norm: eps must be a float; got"):
        entry(image(), 4, eps=eps)


@each_entry
def test_eps_of_a_tensor_is_read_at_each_call(entry: Callable[..., Tensor]) -> None:
    eps = torch.tensor(1e-5)
    assert torch.equal(entry(image(), 4, eps=eps), entry(image(), 4, eps=float(eps)))
    eps.fill_(10.0)
    assert torch.equal(entry(image(), 4, eps=eps), entry(image(), 4, eps=10.0))


def test_missing_batch_dimension_is_said() -> None:
    with pytest.raises(ValueError, match=r"16 channels cannot.*lacks the batch.*unsqueeze\(0\)"):
        triton_gn.GroupNorm(32, 512)(torch.randn(512, 16, 16))
    with pytest.raises(ValueError, match=r"\(nearest: 16\)\.$"):
        group_norm(torch.randn(2, 16, 16), 32)


# In-place neighbours


@each_format
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_what_follows_may_change_y(
    memory_format: torch.memory_format, in_place: bool, activation: str | None
) -> None:
    x, weight = image(memory_format=memory_format), torch.randn(8)

    def run(norm: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = norm(*leaves)
        if in_place:
            y += leaves[0]
            y = F.leaky_relu_(y, 0.2)
        else:
            y = F.leaky_relu(y + leaves[0], 0.2)
        return (y.detach(), *torch.autograd.grad(y.square().sum(), leaves))

    def theirs(x: Tensor, weight: Tensor) -> Tensor:
        y = F.group_norm(x, 4, weight)
        return y if activation is None else F.silu(y)

    ours = run(lambda x, weight: group_norm(x, 4, weight, activation=activation))
    torch.testing.assert_close(ours, run(theirs), rtol=1e-4, atol=1e-4)


@each_format
def test_converted_model_with_in_place_activations_trains(
    memory_format: torch.memory_format,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(4, 8), nn.LeakyReLU(0.2, inplace=True))
    model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
    converted = copy.deepcopy(model)
    triton_gn.convert(converted)
    for each in (model, converted):
        each(image(memory_format=memory_format)).square().sum().backward()
    for p, q in zip(model.parameters(), converted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


# Hooks on saved tensors


def offloaded(t: Tensor) -> Tensor:
    """Copy a saved tensor as save_on_cpu does with pinned memory."""
    return torch.empty(t.size(), dtype=t.dtype, layout=t.layout).copy_(t)


@each_format
@pytest.mark.parametrize("pack", [Tensor.contiguous, offloaded], ids=["contiguous", "offloaded"])
@pytest.mark.parametrize("shape", [(2, 8, 4, 5), (2, 8, 7), (2, 8, 2, 3, 4), (2, 8, 1, 3)], ids=str)
def test_hooks_may_give_saved_tensors_other_strides(
    memory_format: torch.memory_format, pack: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    x, weight, dy = torch.randn(shape), torch.randn(8), torch.randn(shape)
    if memory_format is torch.channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    results = []
    for norm in (group_norm, F.group_norm):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = norm(leaves[0], 4, leaves[1])
        results.append(torch.autograd.grad(y, leaves, dy))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 8, 4, 5), (2, 8, 7), (2, 8, 2, 3, 4)], ids=str)
def test_hooks_may_stride_statistics_too(shape: tuple[int, ...]) -> None:
    """Channels-last: contiguous, PyTorch's own backward on the CPU reads them as dense ones."""

    def strided(t: Tensor) -> Tensor:
        buffer = torch.zeros(2 * t.numel(), dtype=t.dtype)
        return buffer.as_strided(t.shape, [2 * s for s in t.contiguous().stride()]).copy_(t)

    x = torch.randn(shape).movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    weight, dy = torch.randn(8, requires_grad=True), torch.randn(shape)
    expected = torch.autograd.grad(F.group_norm(x, 4, weight), (x, weight), dy)
    with torch.autograd.graph.saved_tensors_hooks(strided, lambda t: t):
        y = group_norm(x, 4, weight)
    grads = torch.autograd.grad(y, (x, weight), dy)
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)


# Tracers


@contextmanager
def deprecated() -> Iterator[None]:
    """torch.jit is, and a trace of sizes that PyTorch's own group_norm compares warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*Python boolean", module="torch.nn.functional")
        yield


def everything(x: Tensor, p: Tensor) -> Tensor:
    return group_norm(x, 4, p, p, activation="gelu", scale=p, shift=p, residual=x, pre_add=p)


TRACED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda x, p: group_norm(x, 4),
    "affine": lambda x, p: group_norm(x, 4, p, p),
    "bias alone": lambda x, p: group_norm(x, 4, None, p, activation="silu"),
    "everything": everything,
    "statistics": lambda x, p: group_norm_apply(x, group_norm_stats(x, 4, p), p, pre_add=p),
}


@each_format
@pytest.mark.parametrize("function", TRACED.values(), ids=list(TRACED))
def test_traces_record_pytorchs_operations(
    function: Callable[[Tensor, Tensor], Tensor], memory_format: torch.memory_format
) -> None:
    p = torch.randn(8)
    with deprecated():
        traced = torch.jit.trace(function, (image(memory_format=memory_format), p))
    assert {node.kind().split("::")[0] for node in traced.graph.nodes()} <= {"aten", "prim"}
    for example in (image(1), image(1, torch.channels_last), torch.randn(3, 8, 6, 7)):
        torch.testing.assert_close(traced(example, p), function(example, p), rtol=1e-5, atol=1e-5)


def test_traced_layer_can_be_saved() -> None:
    layer = triton_gn.GroupNorm(4, 8, activation="silu")
    with deprecated():
        traced = torch.jit.trace(layer, image(memory_format=torch.channels_last))
        torch.jit.save(traced, file := io.BytesIO())
        file.seek(0)
        loaded = torch.jit.load(file)
    torch.testing.assert_close(loaded(image(1)), layer(image(1)))


def test_trace_checks_what_it_is_given() -> None:
    with deprecated(), pytest.raises(ValueError, match="cannot be split into 3 groups"):
        torch.jit.trace(lambda x: group_norm(x, 3), image())


@pytest.mark.parametrize("name", ["weight", "bias", "scale", "shift", "residual", "pre_add"])
def test_symbolic_trace_of_any_operand(name: str) -> None:
    x, function = image(), cast(Any, group_norm)
    operand = image() if name == "residual" else torch.randn(8)
    graph = torch.fx.symbolic_trace(lambda operand: function(x, 4, **{name: operand}))
    assert any(node.target is group_norm for node in graph.graph.nodes)
    assert torch.equal(graph(operand), function(x, 4, **{name: operand}))


def test_symbolic_trace_of_statistics() -> None:
    x = image()
    mean = torch.fx.symbolic_trace(lambda x: group_norm_stats(x, 4).mean)
    assert torch.equal(mean(x), group_norm_stats(x, 4).mean)
    stats = group_norm_stats(x, 4)
    applied = torch.fx.symbolic_trace(lambda x: group_norm_apply(x, stats, activation="silu"))
    assert torch.equal(applied(x), group_norm_apply(x, stats, activation="silu"))
    both = torch.fx.symbolic_trace(lambda x: group_norm_apply(x, group_norm_stats(x, 4)))
    assert torch.equal(both(x), group_norm_apply(x, group_norm_stats(x, 4)))


class Mode(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_see_each_public_function_with_all_operands() -> None:
    x, p, layer = image(), torch.randn(8), triton_gn.GroupNorm(4, 8)
    expected = everything(x, p)
    with Mode() as mode:
        stats = group_norm_stats(x, 4)
        group_norm_apply(x, stats)
        y = everything(x, p)
        layer(x)
    assert mode.seen == [group_norm_stats, group_norm_apply, group_norm, group_norm]
    assert torch.equal(y, expected)


class Tagged(Tensor):
    """A subclass that intercepts every function."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (
            "heard" if func in (group_norm, group_norm_apply, group_norm_stats) else NotImplemented
        )


def test_every_operands_class_is_asked() -> None:
    x, tagged = image(), torch.randn(8).as_subclass(Tagged)
    function: Any = group_norm
    apply: Any = group_norm_apply
    for name in ("weight", "bias", "scale", "shift", "pre_add"):
        assert function(x, 4, **{name: tagged}) == "heard"
        assert apply(x, group_norm_stats(x, 4), **{name: tagged}) == "heard"
    stats = group_norm_stats(x, 4)
    tagged_stats = stats._replace(m2=stats.m2.as_subclass(Tagged))
    assert apply(x, tagged_stats) == "heard"
    assert function(x, 4, residual=x.as_subclass(Tagged)) == "heard"
    statistics: Any = group_norm_stats
    assert statistics(x, 4, pre_add=tagged) == "heard"


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_per_sample_of_expanded_weights(activation: str | None) -> None:
    layer = triton_gn.GroupNorm(2, 8, activation=activation)
    nn.init.normal_(layer.weight)
    x = torch.randn(3, 8, 4, 5)
    call_for_per_sample_grads(layer)(x).square().sum().backward()
    for i in range(3):
        alone = copy.deepcopy(layer)
        alone.zero_grad()
        alone(x[i : i + 1]).square().sum().backward()
        for p, q in zip(layer.parameters(), alone.parameters(), strict=True):
            of_sample = p.grad_sample[i]  # type: ignore[attr-defined]
            torch.testing.assert_close(of_sample, q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Tanh()], ids=repr)
def test_converted_model_is_exported_to_onnx(activation: nn.Module) -> None:
    pytest.importorskip("onnxscript")
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(4, 8), activation).eval()
    triton_gn.convert(model)
    program = torch.onnx.export(model, (image(),), dynamo=True, verbose=False)
    assert program is not None
    domains = {node.domain for node in program.model.graph}
    assert domains <= {""}


# Values


@each_format
@pytest.mark.parametrize("value", [1e10, -1e10, 3.0, 1e-20, 0.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_constant_groups_give_the_bias(
    memory_format: torch.memory_format, value: float, with_bias: bool
) -> None:
    x = torch.full((2, 6, 9, 7), value).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(6), torch.randn(6) if with_bias else None
    y = group_norm(x, 2, weight, bias)
    expected = torch.zeros(6) if bias is None else bias
    # the kernels hold a mean as a pair of floats, in 48 bits
    lost = abs(value) * 2**-48 / math.sqrt(1e-5)
    expected = expected[:, None, None].expand(2, 6, 9, 7)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6 + 16 * lost)


@each_format
def test_lazily_negated_tensors(memory_format: torch.memory_format) -> None:
    x, p = image(memory_format=memory_format), torch.randn(8)
    dense = group_norm(-x, 4, -p, -p, scale=-p, shift=-p, residual=-x, pre_add=-p)
    neg = torch._neg_view
    y = group_norm(
        neg(x), 4, neg(p), neg(p), scale=neg(p), shift=neg(p), residual=neg(x), pre_add=neg(p)
    )
    assert torch.equal(y, dense)
    leaf = x.clone().requires_grad_()
    y = group_norm(leaf, 4, activation="silu")
    grads = [torch.autograd.grad(y, leaf, dy, retain_graph=True)[0] for dy in (-x, neg(x))]
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_strided_rows_give_the_bits_of_dense_ones(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(4, 24).to(dtype)[:, ::2], torch.randn(4, 12).to(dtype)
    results = []
    for each in (x, x.contiguous()):
        leaves = each.detach().requires_grad_(), torch.ones(12, dtype=dtype, requires_grad=True)
        y = group_norm(leaves[0], 3, leaves[1])
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 6, 9, 7), (2, 6, 63), (2, 6, 3, 3, 7)], ids=str)
def test_one_nan_hides_no_constant_group(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 1e10)
    x[0, 0] = math.nan
    y = group_norm(x, 2)
    assert (y[1] == 0).all()
    assert (y[0, 3:] == 0).all()
