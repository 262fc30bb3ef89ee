"""InstanceNorm layers on the CPU, against float64 and against PyTorch's layers."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import triton_gn
from tests.support.pairs import each_pair
from tests.support.tensors import channels_innermost, random
from triton_gn.reference import activation_function

RANKS = (1, 2, 3)
SPATIAL = (5, 4, 3)


def layers(rank: int, **arguments: Any) -> tuple[nn.Module, nn.Module]:
    """Return our layer and PyTorch's, with the same random parameters."""
    activation = arguments.pop("activation", None)
    name = f"InstanceNorm{rank}d"
    theirs = getattr(nn, name)(6, **arguments)
    for seed, parameter in enumerate(theirs.parameters()):
        parameter.data = random(6, seed=seed + 1, dtype=parameter.dtype)
    ours = getattr(triton_gn, name)(6, activation=activation, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def step(layer: nn.Module, x: Tensor, activation: str = "none") -> list[Tensor]:
    """Return y and the gradients of x and the parameters."""
    x = x.detach().requires_grad_()
    y = activation_function(activation)(layer(x))
    leaves = [x, *layer.parameters()]
    dy = random(*x.shape, seed=9).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@each_pair(
    "rank affine activation channels_last dtype batched",
    RANKS,
    (True, False),
    (None, "relu", "leaky_relu(0.2)"),
    (False, True),
    (torch.float32, torch.float64),
    (True, False),
)
def test_matches_float64(
    rank: int,
    affine: bool,
    activation: str | None,
    channels_last: bool,
    dtype: torch.dtype,
    batched: bool,
) -> None:
    ours, theirs = layers(rank, affine=affine, activation=activation, dtype=dtype)
    x = random(2, 6, *SPATIAL[:rank], dtype=dtype)
    x = channels_innermost(x) if channels_last else x
    x = x if batched else x[0]
    results = step(ours, x)
    expected = step(theirs.double(), x.double(), activation or "none")
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), value, rtol=tolerance, atol=tolerance)
    assert results[0].stride() == x.stride()


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_are_pytorchs(training: bool) -> None:
    ours, theirs = layers(2, affine=True, track_running_stats=True, activation="silu")
    for seed in (3, 4):
        x = random(2, 6, 5, 4, seed=seed, dtype=torch.float32)
        expected = nn.functional.silu(theirs(x))
        assert torch.equal(ours(x), expected)
        ours.train(training)
        theirs.train(training)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def outcome(layer: nn.Module, x: Tensor) -> tuple[type, str] | list[str]:
    """Return the error of a call, or its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            layer(x)
        except ValueError as error:
            return type(error), str(error)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(6,), (2, 6, 5, 4, 3), (2, 5, 4, 4), (5, 4, 4), (2, 6, 1, 1), (6, 1, 1)],
    ids=str,
)
def test_errors_and_warnings_are_pytorchs(shape: tuple[int, ...], affine: bool) -> None:
    ours, theirs = layers(2, affine=affine)
    x = torch.randn(shape)
    expected = outcome(theirs, x)
    assert expected, "PyTorch complains"
    assert outcome(ours, x) == expected


@pytest.mark.parametrize("shape", [(0, 6, 5, 4), (2, 0, 5, 4), (2, 6, 0, 4)], ids=str)
@pytest.mark.filterwarnings("ignore:input's size at dim")
def test_empty_inputs_are_taken(shape: tuple[int, ...]) -> None:
    ours, theirs = layers(2)
    assert ours(torch.empty(shape)).shape == theirs(torch.empty(shape)).shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_keeps_the_dtype_as_pytorch_does(dtype: torch.dtype, compiled: bool) -> None:
    ours, theirs = layers(2, affine=True)
    layer = torch.compile(ours, backend="eager", fullgraph=True) if compiled else ours
    x = torch.randn(2, 6, 5, 4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is theirs(x).dtype is dtype


def test_cuda_autocast_keeps_the_dtype() -> None:
    """On a fake GPU, whose autocast makes group_norm float32."""
    layer = triton_gn.InstanceNorm2d(6)
    torch.set_autocast_enabled("cuda", True)  # torch.autocast asks for a real GPU
    try:
        with FakeTensorMode(), triton_gn.backend("torch"):
            x = torch.empty(2, 6, 5, 4, dtype=torch.float16, device="cuda")
            assert triton_gn.group_norm(x, 6).dtype is torch.float32
            assert layer(x).dtype is torch.float16
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("rank", RANKS)
def test_layer_is_a_torch_layer(rank: int) -> None:
    ours, theirs = layers(rank, affine=True, eps=1e-3)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    activated, _ = layers(rank, affine=True, activation="silu")
    x = random(2, 6, *SPATIAL[:rank], dtype=torch.float32)
    for copied in (copy.deepcopy(activated), pickle.loads(pickle.dumps(activated))):
        assert repr(copied).endswith("activation='silu')")
        assert torch.equal(copied(x), activated(x))


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="activation must be one of"):
        triton_gn.InstanceNorm2d(6, activation="swoosh")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script_names_the_remedy() -> None:
    with pytest.raises(RuntimeError, match="got a InstanceNorm2d"):
        torch.jit.script(triton_gn.InstanceNorm2d(6))
