"""When a forward is traced, that the graph is right in every state, and why a forward is not."""

import copy
import functools
import pickle
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.support.blocks import (
    BLOCKS,
    GROUPS,
    IMAGE,
    ROWS,
    Base,
    C,
    ConvNorm,
    Embedding,
    Listed,
    N,
    Nested,
    NormAct,
    Residual,
    calls_of,
    check,
    make,
    tensor,
)
from triton_gn import convert, unconvert
from triton_gn.convert.trace import unfused_class


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# The state of the module


class Branches(Base):
    """Reads attributes that decide what it computes."""

    def forward(self, x: Tensor, y: Tensor | None = None, power: int = 1) -> Any:
        z = self.norm1(self.conv1(x))
        if self.flag:
            z = self.act(z)
        if self.training:
            z = z + 1
        if y is not None:
            z = z + y
        if torch.is_grad_enabled() and self.conv2 is not None:
            z = self.conv2(z)
        return z**power


def set_(name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model, name, value)


def add_hook(name: str) -> Callable[[nn.Module], object]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * 2

    return lambda model: model.get_submodule(name).register_forward_hook(hook)


def replace_forward(name: str) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model.get_submodule(name), "forward", lambda x: x.cos())


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "flag": set_("flag", False),
    "evaluation": lambda model: model.eval(),
    "another activation": set_("act", nn.Tanh()),
    "unknown activation": set_("act", nn.Softplus()),
    "another slope": set_("act", nn.LeakyReLU(0.3)),
    "no convolution": set_("conv2", None),
    "another norm": set_("norm1", nn.GroupNorm(1, C).double()),
    "no norm": set_("norm1", nn.Identity()),
    "hook of the norm": add_hook("norm1"),
    "hook of the activation": add_hook("act"),
    "hook of a convolution": add_hook("conv1"),
    "forward of the norm": replace_forward("norm1"),
    "forward of the activation": replace_forward("act"),
    "eps": lambda model: setattr(model.norm1, "eps", 0.5),
    "activation of the layer": lambda model: setattr(model.norm1, "activation", "relu"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_after_the_conversion_counts(name: str) -> None:
    model = make(Branches)
    x, y = tensor(), tensor()
    convert(model)
    for args in ((x,), (x, y), (x, None, 2)):
        model(*args)
    CHANGES[name](model)
    for args, kwargs in (((x,), {}), ((x, y), {}), ((x,), {"power": 2}), ((x,), {"y": y})):
        expected = unfused_class(model).forward(model, *args, **kwargs)
        torch.testing.assert_close(model(*args, **kwargs), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(model(x), unfused_class(model).forward(model, x))


def test_change_inside_an_inlined_module_counts() -> None:
    model, x = make(Nested), tensor()
    convert(model)
    assert calls_of(model, x) == [["activation"], ["activation", "residual"]]
    for change in (
        set_("first", make(ConvNorm)),
        lambda model: setattr(model.first.bn, "act", nn.Tanh()),
        add_hook("first"),
        add_hook("first.bn"),
        set_("last", nn.Conv2d(C, C, 1).double()),
    ):
        change(model)
        plain = copy.deepcopy(model)
        unconvert(plain)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-10, atol=1e-10)


def test_list_of_layers_may_grow() -> None:
    model, x = make(Listed), tensor()
    convert(model)
    before = model(x)
    model.layers.append(nn.Tanh())
    torch.testing.assert_close(model(x), before.tanh())
    del model.layers[-1]
    torch.testing.assert_close(model(x), before)


def test_changing_state_ends_in_the_own_forward() -> None:
    class Counts(Base):
        def forward(self, x: Tensor) -> Any:
            return self.act(self.norm1(x)) * self.factor

    model, x = make(Counts), tensor()
    model.factor = 1
    convert(model)
    y = model(x)
    for factor in range(2, 9):
        model.factor = factor
        torch.testing.assert_close(model(x), y * factor)
    model.factor = 9
    with pytest.warns(RuntimeWarning, match="at most 8 states .* a Counts has come in more"):
        torch.testing.assert_close(model(x), y * 9)
    model.factor = 10
    torch.testing.assert_close(model(x), y * 10)
    model.factor = 3
    assert calls_of(model, x) == [["activation"]]


def test_hook_of_the_norm_sees_its_result() -> None:
    model, x = make(Residual), tensor()
    seen: list[Tensor] = []
    convert(model)
    model(x)
    model.norm2.register_forward_hook(lambda module, inputs, y: seen.append(y.clone()))
    model(x)
    assert seen[0].min() < 0


def test_global_hook_sees_every_layer() -> None:
    model, x = make(Residual), tensor()
    convert(model)
    expected = model(x)
    seen: list[type[nn.Module]] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, y: seen.append(type(module))
    )
    try:
        torch.testing.assert_close(model(x), expected)
    finally:
        handle.remove()
    assert seen.count(nn.ReLU) == 2


# Forwards that cannot be traced


def reads_text(self: Any, x: Tensor) -> Any:
    y = F.silu(self.norm1(x))
    return y * 2 if "float64" in str(x.dtype) else y


def formats_a_size(self: Any, x: Tensor) -> Any:
    return F.silu(self.norm1(x)) * len(f"{x.shape[0]}")


def sets_an_attribute_of_a_tensor(self: Any, x: Tensor) -> Any:
    y: Any = F.silu(self.norm1(x))
    y.note = "seen"
    return y


def asks_for_the_class_of_a_size(self: Any, x: Tensor) -> Any:
    y = F.silu(self.norm1(x))
    return y * 2 if isinstance(x.shape[0] + 1, int) else y


def reads_a_list(self: Any, x: Tensor) -> Any:
    return self.act(self.norm1(x)) * self.items[0]


def sets_an_attribute(self: Any, x: Tensor) -> Any:
    self.last = x
    return self.act(self.norm1(x))


def decides_by_values(self: Any, x: Tensor) -> Any:
    return self.act(self.norm1(x)) if x.sum() > 0 else x


def decides_by_shapes(self: Any, x: Tensor) -> Any:
    return F.silu(self.norm1(x)) if x.shape[0] > 1 else x


def switches_gradients(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = self.norm1(x)
    return F.silu(y)


def switches_autocast(self: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return F.silu(self.norm1(x))


def asks_for_autocast(self: Any, x: Tensor) -> Any:
    return F.silu(self.norm1(x)) * (2 if torch.is_autocast_enabled("cpu") else 1)


def draws_a_constant(self: Any, x: Tensor) -> Any:
    return F.silu(self.norm1(x)) * torch.rand(1)


def warns(self: Any, x: Tensor) -> Any:
    warnings.warn("a reason", stacklevel=1)
    return F.silu(self.norm1(x))


def reads_a_plain_tensor(self: Any, x: Tensor) -> Any:
    return F.silu(self.norm1(x)) * self.plain


ELSEWHERE = nn.Conv2d(C, C, 1).double()


def calls_what_it_does_not_hold(self: Any, x: Tensor) -> Any:
    return ELSEWHERE(F.silu(self.norm1(x)))


UNTRACEABLE: dict[Callable[[Any, Tensor], Any], str] = {
    reads_a_list: "reads items, a list, which may change",
    sets_an_attribute: "sets an attribute, last",
    decides_by_values: "decides by the values or shapes of tensors",
    decides_by_shapes: "decides by the values or shapes of tensors",
    switches_gradients: "switches gradients or autocast",
    switches_autocast: "asks torch.is_autocast_enabled",
    asks_for_autocast: "asks torch.is_autocast_enabled",
    draws_a_constant: "computes with a tensor that depends on no argument",
    warns: "warns, which a graph would not",
    reads_a_plain_tensor: "reads plain, a Tensor, which may change",
    sets_an_attribute_of_a_tensor: "sets an attribute of a tensor, note",
    reads_text: "reads a tensor or its attributes as text",
    formats_a_size: "reads a tensor or its attributes as text",
    asks_for_the_class_of_a_size: "asks for the class of a size",
    calls_what_it_does_not_hold: "uses a Conv2d that it does not hold",
}


@pytest.mark.parametrize("forward", UNTRACEABLE, ids=lambda forward: forward.__name__)
@pytest.mark.filterwarnings("ignore:a reason")
def test_forward_that_cannot_be_traced_stays(forward: Callable[[Any, Tensor], Any]) -> None:
    kind: Any = type("Block", (Base,), {"forward": forward})
    x = tensor()
    model = make(kind)
    model.items, model.plain = [2], torch.ones(1)
    names = set(vars(model))
    torch.manual_seed(1)
    expected = model(x)
    report = convert(model)
    reasons = {reason for _, reason in report.replaced}
    assert f"its parent, a Block, {UNTRACEABLE[forward]}" in reasons
    assert type(model) is kind
    assert set(vars(model)) - {"last"} == names - {"last"}
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


def test_computed_number_of_groups_is_left_to_the_call() -> None:
    class Computes(NormAct):
        def forward(self, x: Tensor) -> Any:
            return self.act(F.group_norm(x, x.shape[1] // 2, self.weight, self.bias))

    model, x = make(Computes), tensor()
    expected = model(x)
    report = convert(model)
    assert not report.replaced
    assert report.left[0][1].endswith("Computes, a subclass with a forward of its own")
    torch.testing.assert_close(model(x), expected)


# Arguments and surroundings


def test_arguments_of_every_kind() -> None:
    class Takes(Base):
        def forward(self, x: Any, *others: Any, scale: Any = None, **options: Any) -> Any:
            x = x[0] if isinstance(x, (list, tuple)) else x
            y = self.act(self.norm1(x))
            for other in others:
                y = y + other
            return y if scale is None else y * scale

    model, x = make(Takes), tensor()
    plain = copy.deepcopy(model)
    convert(model)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}),
        (([x],), {}),
        ((x, 2.5, x), {}),
        ((x, True), {"scale": x}),
        ((x, 1), {"scale": 2, "other": "text"}),
        ((nn.Parameter(x),), {"other": object()}),
        ((), {"x": x}),
    ]
    for args, kwargs in calls:
        torch.testing.assert_close(model(*args, **kwargs), plain(*args, **kwargs))
    assert calls_of(model, x, 2.5, x) == [["activation"]]
    assert calls_of(model, [x]) == [[]]


def test_tracers_and_transforms_get_a_right_graph() -> None:
    model, x = make(Residual).eval(), tensor()
    convert(model)
    expected = model(x)
    traced = fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(model, x, check_trace=False)
    torch.testing.assert_close(scripted(x), expected)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    many = torch.func.vmap(model)(torch.stack([x, x]))
    torch.testing.assert_close(many[1], expected)
    slope = torch.func.grad(lambda x: model(x).sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(slope, torch.autograd.grad(model(leaf).sum(), leaf)[0])


def test_autocast_and_subclasses_are_right() -> None:
    class Subclass(Tensor):
        pass

    model, x = make(Residual).float().eval(), tensor().float()
    plain = copy.deepcopy(model)
    convert(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), plain(x), rtol=2e-2, atol=2e-2)
    received = model(x.as_subclass(Subclass))
    torch.testing.assert_close(received.as_subclass(Tensor), plain(x))


def test_replicas_use_their_own_layers() -> None:
    """torch.nn.DataParallel copies a module's dictionary onto another device."""
    model, x = make(Embedding), tensor()
    convert(model)
    replica = model._replicate_for_data_parallel()
    for name, child in make(Embedding).named_children():
        replica._modules[name] = child
    received = replica(x, tensor(*ROWS) * 0)
    expected = unfused_class(model).forward(replica, x, tensor(*ROWS) * 0)
    torch.testing.assert_close(received, expected)


def test_bound_forward_and_wrapped_class_work() -> None:
    model, x = make(Residual), tensor()
    expected = model(x)
    convert(model)
    model.forward = functools.partial(model.forward)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(RuntimeError, match="Take that back first"):
        unconvert(model)


class Conditional(nn.Module):
    """A norm with a scale and shift of its own, which asks for the rank of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.GroupNorm(GROUPS, C, affine=False), nn.Linear(C, 2 * C)

    def forward(self, x: Tensor, emb: Tensor) -> Any:
        emb = self.mlp(emb)
        for _ in range(len(x.shape[2:])):
            emb = emb.unsqueeze(-1)
        scale, shift = emb.chunk(2, dim=1)
        return self.norm(x) * (scale + 1.0) + shift


class Ranks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = Conditional(), nn.SiLU()

    def forward(self, x: Tensor, emb: Tensor) -> Any:
        y = self.act(self.norm(x, emb))
        return y.flatten(2) if x.ndim == 4 and x.dim() == 4 and len(emb.shape) == 2 else y


@pytest.mark.parametrize("shape", [IMAGE, (N, C, 7), (N, C, 2, 3, 4), (N, C)])
def test_rank_of_an_argument_may_decide(shape: tuple[int, ...]) -> None:
    model = make(Ranks)
    shift = "shift" if len(shape) > 2 else "residual"  # without pixels they are the same
    assert check(model, tensor(*shape), tensor(*ROWS)) == [["activation", "scale", shift]]
    assert check(model.norm, tensor(*shape), tensor(*ROWS)) == [["scale", shift]]


def test_other_threads_may_call_modules_meanwhile() -> None:
    """torch.fx replaces methods of nn.Module while it traces, which a first call may do."""
    x = tensor()
    other = nn.Sequential(nn.Conv2d(C, C, 1), nn.GroupNorm(GROUPS, C), nn.SiLU()).double()
    with torch.no_grad():
        expected = other(x)
        running, wrong = threading.Event(), []

        def run() -> None:
            running.set()
            with torch.no_grad():
                while running.is_set():
                    other.flag = True  # type: ignore[assignment]
                    if not torch.equal(other(x), expected):
                        wrong.append("a value")

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                return model(x)  # type: ignore[no-any-return]

        caller = threading.Thread(target=run)
        caller.start()
        try:
            for _ in range(5):
                model = make(Residual)
                plain = copy.deepcopy(model)
                convert(model)
                copies = [pickle.loads(pickle.dumps(model)) for _ in range(4)]  # trace again
                with ThreadPoolExecutor(4) as pool:
                    for y in pool.map(call, copies):
                        torch.testing.assert_close(y, plain(x))
                assert sorted(calls_of(copies[0], x)) == sorted(BLOCKS[Residual][1])
        finally:
            running.clear()
            caller.join()
    assert not wrong
    assert "__getattribute__" not in vars(nn.Module)
