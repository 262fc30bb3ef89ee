"""The layer GroupNorm on the CPU: a torch.nn.GroupNorm with an activation and fused operands."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import triton_gn
from tests.support.calls import (
    DTYPES,
    GROUPS,
    SHAPE,
    SUBSETS,
    composed,
    each_layout,
    fused,
    make_operands,
    short,
)
from tests.support.copies import through_file
from tests.support.tensors import random

X = random(*SHAPE).float()
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)


def make_layer(activation: str | None = "silu", **options: Any) -> triton_gn.GroupNorm:
    layer = triton_gn.GroupNorm(GROUPS, 6, activation=activation, **options)
    operands = make_operands()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(operands[name])
    return layer


def test_constructor_is_pytorchs() -> None:
    assert isinstance(make_layer(), nn.GroupNorm)
    theirs, ours = (
        {p.name: (p.kind, p.default) for p in inspect.signature(kind).parameters.values()}
        for kind in (nn.GroupNorm, triton_gn.GroupNorm)
    )
    positional = [name for name, (kind, _) in theirs.items() if kind.name != "KEYWORD_ONLY"]
    assert list(ours)[: len(positional)] == positional
    assert all(ours[name] == theirs[name] for name in positional)


@pytest.mark.parametrize("activation", [None, "none", "gelu_tanh"])
def test_repr_shows_the_activation(activation: str | None) -> None:
    theirs = nn.GroupNorm(GROUPS, 6, eps=1e-3).extra_repr()
    added = "" if activation is None else f", activation={activation!r}"
    layer = triton_gn.GroupNorm(GROUPS, 6, eps=1e-3, activation=activation)
    assert repr(layer) == f"GroupNorm({theirs}{added})"


def test_state_dict_moves_both_ways_without_the_activation() -> None:
    ours, theirs = make_layer(), nn.GroupNorm(GROUPS, 6)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(X), F.silu(theirs(X)))
    other = triton_gn.GroupNorm(GROUPS, 6, activation="silu")
    other.load_state_dict(theirs.state_dict())
    assert torch.equal(other(X), ours(X))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer)), through_file],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_copies_are_the_layer(copied: Callable[[nn.GroupNorm], nn.GroupNorm]) -> None:
    layer = make_layer("mish", eps=1e-3)
    other = copied(layer)
    assert type(other) is triton_gn.GroupNorm
    assert other.activation == "mish"
    assert (other.weight is layer.weight) is (copied is copy.copy)
    assert torch.equal(other(X), layer(X))


def test_layer_pickled_before_there_were_activations_has_none() -> None:
    layer = make_layer(None)
    old = copy.deepcopy(layer)
    del old.__dict__["activation"]
    assert torch.equal(old(X), layer(X))
    assert repr(old) == repr(layer)


@pytest.mark.skipif(
    "bias" not in inspect.signature(nn.GroupNorm).parameters,
    reason="this version of PyTorch's layer has no bias keyword",
)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_layer_without_a_bias(activation: str | None) -> None:
    layer = make_layer(activation, bias=False)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    expected = composed(activation, {"input": X, "weight": layer.weight})
    torch.testing.assert_close(layer(X), expected)


def test_layer_refuses_keywords_that_pytorchs_does_not_have() -> None:
    with pytest.raises(TypeError, match="num_chanels"):
        triton_gn.GroupNorm(GROUPS, 6, num_chanels=6)


@pytest.mark.parametrize("names", SUBSETS, ids=short)
@each_layout
def test_layer_passes_its_operands_on(names: tuple[str, ...], channels_last: bool) -> None:
    operands = make_operands(names, channels_last)
    layer = make_layer("tanh")
    arguments = {name: operands[name] for name in ("input", *names)}
    assert torch.equal(layer(**arguments), fused("tanh", operands))
    positional = [operands.get(name) for name in ("input", "scale", "shift", "residual", "pre_add")]
    assert torch.equal(layer(*positional), fused("tanh", operands))


def test_layer_on_the_meta_device_gives_shapes() -> None:
    y = triton_gn.GroupNorm(GROUPS, 6, device="meta")(X.to("meta"))
    assert (y.shape, y.device.type) == (SHAPE, "meta")


@each_dtype
def test_layer_takes_a_dtype(dtype: torch.dtype) -> None:
    layer = triton_gn.GroupNorm(GROUPS, 6, dtype=dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert layer(X.to(dtype)).dtype is dtype


def test_layer_without_affine_has_no_parameters() -> None:
    layer = triton_gn.GroupNorm(GROUPS, 6, affine=False)
    assert not list(layer.parameters())
    assert torch.equal(layer(X), F.group_norm(X, GROUPS))


def test_layer_passes_its_eps() -> None:
    layer = triton_gn.GroupNorm(GROUPS, 6, eps=0.5)
    torch.testing.assert_close(layer(X / 10), F.group_norm(X / 10, GROUPS, eps=0.5))


def test_layer_runs_its_hooks() -> None:
    layer, called = triton_gn.GroupNorm(GROUPS, 6), []
    layer.register_forward_pre_hook(lambda *_: called.append("before"))
    layer.register_forward_hook(lambda *_: called.append("after"))
    layer.register_full_backward_hook(lambda *_: called.append("backward"))
    layer(X.clone().requires_grad_()).sum().backward()
    assert called == ["before", "after", "backward"]


def test_layer_is_the_same_in_evaluation() -> None:
    layer = make_layer()
    assert torch.equal(layer.train()(X), layer.eval()(X))


@each_dtype
@each_layout
def test_layer_follows_autocast_as_pytorchs(dtype: torch.dtype, channels_last: bool) -> None:
    x = make_operands((), channels_last, dtype)["input"]
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    ours, theirs = triton_gn.GroupNorm(GROUPS, 6), nn.GroupNorm(GROUPS, 6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            ours.to(parameter_dtype)(x), theirs.to(parameter_dtype)(x), rtol=1e-6, atol=1e-6
        )
