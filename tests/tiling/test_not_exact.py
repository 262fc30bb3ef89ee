"""exact_tiles refuses by name what would not be exact."""

import operator
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.support.tensors import random
from tests.support.tiles import Run, check, difference, fill
from triton_gn.tiling import NotExactError, exact_tiles

REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "sum": lambda x: x.sum(),
    "var": lambda x: x.var(1),
    "amax": lambda x: x.amax(-1),
    "max": lambda x: x.max(),
    "instance_norm": F.instance_norm,
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "softmax": lambda x: x.flatten(2).softmax(-1),
    "normalize": lambda x: F.normalize(x, dim=2),
    "linear": lambda x: F.linear(x, torch.ones(3, 7, dtype=x.dtype)),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, 1),
    "cumsum": lambda x: x.cumsum(1),
    "cat": lambda x: torch.cat([x, x], 2),
    "chunk": lambda x: x.chunk(2, -1)[0],
    "split": lambda x: x.flatten(2).split(2, 2)[0],
    "__getitem__": lambda x: x[..., 0],
    "unbind": lambda x: x.unbind(-1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, torch.ones(4, 4, 2, 2, dtype=x.dtype)),
    "conv2d": lambda x: F.conv2d(x.transpose(1, 2), torch.ones(1, 6, 1, 1, dtype=x.dtype)),
    "group_norm": lambda x: F.group_norm(x.transpose(1, 2), 1),
    "pad": lambda x: F.pad(x, (1, 1), mode="circular"),
    "matmul": lambda x: x.flatten(2).transpose(1, 2) @ x.flatten(2),
    "randn_like": torch.randn_like,
    "randn": lambda x: x + torch.randn(1, dtype=x.dtype),
    "dropout": lambda x: F.dropout(x, 0.5),
    "normal_": lambda x: x.clone().normal_(),
    "item": lambda x: x * x[0, 0].max().item() if x.dim() == 0 else x.item(),
    "numpy": lambda x: x.numpy(),
    "data_ptr": lambda x: x.data_ptr(),
    "add": lambda x: x + torch.arange(x.shape[-1]),
    "sub": lambda x: x - torch.zeros(x.shape[-2:]),
    "where": lambda x: torch.where(x),
    "bmm": lambda x: torch.bmm(x.flatten(0, 1), x.flatten(0, 1)),
    "new_zeros": lambda x: x + x.new_zeros(1),
    "mul": lambda x: x * x.transpose(2, 3),
    "aten.silu": torch.ops.aten.silu,
    "view": lambda x: x.view(2, 4, -1, 2),
    "reshape": lambda x: x.transpose(1, 2).reshape(2, 3, 8, 7),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(F.pad(x, (0, 1)), 2),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "repeat": lambda x: x.repeat(1, 1, 2, 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_local_is_refused_by_name(name: str) -> None:
    model = Run(REFUSED[name])
    x = random(2, 4, 6, 7)
    with exact_tiles(model, (3, 4)), pytest.raises(NotExactError, match=rf"\b{name}\b"):
        model(x)
    assert "forward" not in vars(model)


def test_gradients_need_all_tiles() -> None:
    conv = fill(nn.Conv2d(4, 4, 3, padding=1))
    x = random(2, 4, 6, 7).requires_grad_()
    reentrant = Run(lambda x: checkpoint(conv, x, use_reentrant=True), conv)
    with exact_tiles(reentrant, 3), pytest.raises(NotExactError, match=r"conv2d .* checkpoint"):
        reentrant(x)
    saving = Run(lambda x: checkpoint(conv, x, use_reentrant=False), conv)
    with exact_tiles(saving, 3), pytest.raises(RuntimeError, match="Turn checkpointing off"):
        saving(x)


def test_compiled_parts_are_refused() -> None:
    conv = torch.compile(nn.Conv2d(3, 3, 3, padding=1), backend="eager")
    with exact_tiles(model := Run(conv), 3), pytest.raises(NotExactError, match="compile no part"):
        model(random(2, 3, 6, 7, dtype=torch.float32))


def test_tensors_from_elsewhere_are_refused() -> None:
    """Plain attributes may hold what another tile has put there; parameters and buffers do not."""
    model = Run(lambda x: x * model.constant)
    model.constant = random(4, 1, 1)
    with exact_tiles(model, 3), pytest.raises(NotExactError, match="register_buffer"):
        model(random(2, 4, 6, 7))
    del model.constant
    model.register_buffer("constant", random(4, 1, 1))
    check(model, random(2, 4, 6, 7))


def test_pixels_as_parameters_are_refused() -> None:
    """The other operand is not cut, so only the parameter shows that pixels are involved."""
    uncut = random(3, 3, 3, 3)

    def masked(x: Tensor, u: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(u, u, u, x > 0)

    for function in (
        masked,
        lambda x, u: F.conv2d(u, x),
        lambda x, u: F.layer_norm(u, (3, 3), x[0, 0], None),
        lambda x, u: F.group_norm(u, 1, x.flatten()),
        lambda x, u: F.linear(u, x[0, 0]),
        lambda x, u: nn.Parameter(x) * u,
    ):
        with exact_tiles(model := Run(function), 3), pytest.raises(NotExactError):
            model(random(3, 3, 6, 3), uncut)


ILLEGAL: dict[str, Callable[[Tensor], Any]] = {
    "divisible by num_groups": lambda x: F.group_norm(x, 3),
    "3 channels": lambda x: F.conv2d(x, torch.ones(3, 3, 1, 1, dtype=x.dtype)),
    "non-empty": lambda x: x + torch.cat([]),
    "out of range": lambda x: x.mean(9),
    "Padding": lambda x: F.pad(x, (1,)),
}


@pytest.mark.parametrize("message", ILLEGAL)
def test_errors_of_the_model_are_those_of_the_whole(message: str) -> None:
    model, x = Run(ILLEGAL[message]), random(2, 4, 6, 7)
    with pytest.raises(Exception, match=message) as expected:
        model(x)
    with exact_tiles(model, 3), pytest.raises(expected.type, match=message) as raised:
        model(x)
    assert type(raised.value) is expected.type is not NotExactError


UNKNOWN_FORMS: dict[str, Callable[[Tensor], Any]] = {
    "linear": lambda x: F.linear(x.movedim(1, 3), torch.ones(4, dtype=x.dtype)),
    "batch_norm": lambda x: torch.batch_norm(
        x, None, None, torch.ones(4).double(), torch.ones(4).double(), False, 0.1, 1e-5, False
    ),
    "view": lambda x: x.view(torch.int64),
    "cat": lambda x: torch.cat([x, x], 1, out=torch.zeros_like(torch.cat([x, x], 1))),
    "matmul": lambda x: x.movedim(1, 3) @ torch.ones(4, dtype=x.dtype),
}


@pytest.mark.parametrize("name", UNKNOWN_FORMS)
def test_forms_that_no_rule_knows_are_refused_by_name(name: str) -> None:
    model, x = Run(UNKNOWN_FORMS[name]), random(2, 4, 6, 7)
    model(x)
    with exact_tiles(model, 3), pytest.raises(NotExactError, match=rf"\b{name} .*form") as raised:
        model(x)
    assert raised.value.__cause__ is not None


def test_remedies_are_not_in_vain() -> None:
    """Norms without running statistics take those of the pixels in evaluation too."""
    model = nn.BatchNorm2d(4, track_running_stats=False).double().eval()
    with exact_tiles(model, 3), pytest.raises(NotExactError, match=r"batch_norm (?!.*eval)"):
        model(random(2, 4, 6, 7))


class Recurrent(nn.Module):
    """Keeps its state in a dict or a list of the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor, state: dict[str, Any], calls: list[int], *more: Any) -> Any:
        kept = state["h"] if state else x * 0
        state["h"] = h = torch.tanh(self.conv(torch.cat([x, kept], 1)))
        calls.append(len(calls))
        nested = state.setdefault("nested", deque([[None]], maxlen=1))
        nested[0][0] = h * 2 if nested[0][0] is None else nested[0][0] + h
        return F.interpolate(h, scale_factor=2), (h,)


def test_state_in_arguments_is_kept_whole() -> None:
    model = fill(Recurrent())

    def run() -> list[Tensor]:
        state: dict[str, Any] = {}
        calls: list[int] = []
        for seed in range(3):
            y, (h,) = model(random(1, 2, 6, 7, seed=seed), state, calls)
        assert calls == [0, 1, 2]
        grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        return [y, h, state["h"], state["nested"][0][0], *grads]

    expected = run()
    for tile_size in (3, (6, 2)):
        with exact_tiles(model, tile_size):
            for tensor, exact in zip(run(), expected, strict=True):
                assert difference(tensor, exact) < 1e-12


def test_state_in_attributes_is_named() -> None:
    """Each tile counts on, as the others have not finished."""

    def model(x: Tensor) -> Tensor:
        run.at = 0
        for _ in range(2):
            x = F.group_norm(x, 1) * [1, 2][run.at]
            run.at += 1
        return x

    run: Any = Run(model)
    with exact_tiles(run, 3), pytest.raises(NotExactError, match=r"attribute at ") as raised:
        run(random(2, 4, 6, 7))
    assert isinstance(raised.value.__cause__, IndexError)
    run(random(2, 4, 6, 7))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda total: total.add_(1),
    "a view": lambda total: total.view(1).add_(1),
    "by keyword": lambda total: torch.add(total, 1, out=total),
    "in a list": lambda total: torch._foreach_add_([torch.zeros_like(total), total], 1),
    "by assignment": lambda total: operator.setitem(total.view(1), 0, 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_tiles_share_is_not_changed(name: str) -> None:
    model = Run(lambda x: (CHANGES[name](model.get_buffer("total")), x))
    model.register_buffer("total", torch.zeros((), dtype=torch.float64))
    with exact_tiles(model, 3), pytest.raises(NotExactError, match=r" each tile would change it"):
        model(random(2, 4, 6, 7))
    assert not model.get_buffer("total")


@pytest.mark.parametrize("ends", [False, True], ids=["elsewhere", "at its end"])
def test_tiles_that_part_ways_are_refused(ends: bool) -> None:
    calls: list[int] = []

    def model(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            return x if ends else F.conv2d(x, torch.ones(3, 3, 1, 3, dtype=x.dtype), padding="same")
        return F.group_norm(x, 1)

    with exact_tiles(run := Run(model), 4), pytest.raises(NotExactError, match="must do the same"):
        run(random(2, 3, 6, 7))


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "not spatial": lambda x: x.flatten(2),
    "each tile's own": lambda x: object(),
    "register_buffer": lambda x: torch.utils.dlpack.from_dlpack(torch.ones(2)),
}


@pytest.mark.parametrize("message", OUTPUTS)
def test_outputs_that_cannot_be_put_together(message: str) -> None:
    model = Run(OUTPUTS[message])
    with exact_tiles(model, 3), pytest.raises(NotExactError, match=message):
        model(random(2, 3, 6, 7))


def test_structured_outputs() -> None:
    constant = random(3)
    model = Run(lambda x, c: {"y": (x * 2, [c + 1]), "none": None, "size": x.shape[-1]})
    with exact_tiles(model, 3):
        outputs = model(random(2, 3, 6, 7), c=constant)
    assert torch.equal(outputs["y"][0], random(2, 3, 6, 7) * 2)
    assert torch.equal(outputs["y"][1][0], constant + 1)
    assert (outputs["none"], outputs["size"]) == (None, 7)
