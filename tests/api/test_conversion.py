"""convert and unconvert on modules of PyTorch alone."""

import copy
import functools
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import triton_gn
from tests.support.copies import through_file
from triton_gn.activations import TABLE
from triton_gn.convert.conversion import FoldedActivation, convert, unconvert

ROOT = Path(__file__).parents[2]

# every layer of PyTorch that is an activation of ours, and the variants that change nothing
ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "relu in place": (lambda: nn.ReLU(inplace=True), "relu"),
    "silu in place": (lambda: nn.SiLU(inplace=True), "silu"),
    "other slope": (lambda: nn.LeakyReLU(0.2), "leaky_relu(0.2)"),
    "other alpha": (lambda: nn.ELU(2), "elu(2.0)"),
} | {
    name: (partial(getattr(nn, row.module), **row.arguments), name)
    for name, row in TABLE.items()
    if row.module is not None
}
# How to add each kind of hook; none of them changes anything.
HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "forward": lambda module: module.register_forward_hook(lambda *_: None),
    "forward with kwargs": lambda module: module.register_forward_hook(
        lambda *_: None, with_kwargs=True
    ),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
}
each_hook = pytest.mark.parametrize("add_hook", HOOKS.values(), ids=list(HOOKS))


def hooks(direction: str) -> pytest.MarkDecorator:
    names = [name for name in HOOKS if name.startswith(direction)]
    return pytest.mark.parametrize("add_hook", [HOOKS[name] for name in names], ids=names)


each_forward_hook, each_backward_hook = hooks("forward"), hooks("backward")


class Block(nn.Module):
    """A residual block: the sum of two branches that end in a norm, then an activation."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *(nn.Conv2d(channels, out_channels, 3, stride, 1), nn.GroupNorm(4, out_channels)),
            nn.ReLU(inplace=True),
            *(nn.Conv2d(out_channels, out_channels, 3, 1, 1), nn.GroupNorm(4, out_channels)),
        )
        self.skip = nn.Sequential(
            nn.Conv2d(channels, out_channels, 1, stride), nn.GroupNorm(1, out_channels, eps=1e-3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.skip(x))


def make_resnet() -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.GroupNorm(2, 16), nn.SiLU())
    blocks = nn.Sequential(Block(16, 16, 1), Block(16, 24, 2))
    return nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))


def make_net(*after: nn.Module) -> nn.Sequential:
    """A convolution, a GroupNorm and what comes after it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), *after)
    for parameter in net[1].parameters():
        nn.init.normal_(parameter)
    return net


def make_input(dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    x = torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of the input and of every parameter, for random gradients."""
    x = x.detach().requires_grad_()
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    leaves = {"input": x} | dict(model.named_parameters())
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"output": y.detach()} | dict(zip(leaves, grads, strict=True))


def state(model: nn.Module) -> dict[str, Any]:
    """The identity of every module, its class, and the identity of all that it holds."""
    return {
        name: (
            id(module),
            type(module),
            {key: value if isinstance(value, bool) else id(value) for key, value in own.items()},
            {key: id(child) for key, child in module._modules.items()},
            {key: id(parameter) for key, parameter in module._parameters.items()},
        )
        for name, module in model.named_modules()
        for own in [vars(module)]
    }


def compile_(model: nn.Module, **options: Any) -> nn.Module:
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, **options)
    assert isinstance(compiled, nn.Module)
    return compiled


def types(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


# Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_resnet_computes_the_same(dtype: torch.dtype, channels_last: bool) -> None:
    model = make_resnet().to(dtype)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = make_input(dtype, channels_last)
    before = step(model, x)
    report = convert(model)
    with_residual = "residual, relu or shift, relu, where the shapes fit"
    assert report.folded == [
        ("0.1", "silu"),
        *(("1.0.branch.1", "relu"), ("1.0.branch.4", with_residual)),
        *(("1.1.branch.1", "relu"), ("1.1.branch.4", with_residual)),
    ]
    assert nn.GroupNorm not in types(model)
    after = step(model, x)
    assert after.keys() == before.keys()
    # another order of summation: some roundings of the largest gradients, which are sums of 160
    tolerance = 1e-5 if dtype is torch.float32 else 1e-13
    for name, expected in before.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            after[name], expected, rtol=tolerance, atol=tolerance * scale + tolerance, msg=name
        )


@pytest.mark.parametrize(("activation", "name"), ACTIVATIONS.values(), ids=list(ACTIVATIONS))
def test_each_activation_is_folded(activation: Callable[[], nn.Module], name: str) -> None:
    net = make_net(activation())
    x = make_input()
    before = step(net, x)
    assert convert(net).folded == [("1", name)]
    assert net[1].activation == name
    torch.testing.assert_close(step(net, x), before)


def test_folded_activation_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    silu = nn.SiLU.forward

    def forward(self: nn.SiLU, input: Tensor) -> Tensor:
        calls.append(input.shape)
        return silu(self, input)

    monkeypatch.setattr(nn.SiLU, "forward", forward)
    net = make_net(nn.SiLU())
    net(make_input())
    assert len(calls) == 1
    convert(net)
    net(make_input())
    assert len(calls) == 1
    unconvert(net)
    net(make_input())
    assert len(calls) == 2


def test_compiles_to_one_graph() -> None:
    model, x = make_resnet(), make_input()
    convert(model)
    expected = step(model, x)
    compiled = compile_(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close([*step(compiled, x).values()], [*expected.values()])


def test_compiled_model_can_be_converted() -> None:
    model, x = make_net(nn.SiLU()), make_input()
    compiled = compile_(model, backend="eager")
    expected = compiled(x)
    assert convert(compiled).folded == [("_orig_mod.1", "silu")]
    torch.testing.assert_close(compiled(x), expected)
    unconvert(compiled)
    assert types(model) == types(make_net(nn.SiLU()))


# What is folded


class Plain(nn.Sequential):
    """Runs as an nn.Sequential does."""


class Forward(nn.Sequential):
    """Runs backwards."""

    def forward(self, input: Tensor) -> Tensor:
        for module in reversed(list(self)):
            input = module(input)
        return input


class Iterates(Plain):
    """Skips the last."""

    def __iter__(self) -> Any:
        return iter(list(self._modules.values())[:-1])


class SubclassOfSiLU(nn.SiLU):
    """Is recognised by its forward."""


UNKNOWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "prelu": (nn.PReLU, "is followed by PReLU(num_parameters=1)"),
    "dropout": (lambda: nn.Sequential(nn.SiLU()), "is followed by Sequential()"),
}


@pytest.mark.parametrize(("following", "reason"), UNKNOWN.values(), ids=list(UNKNOWN))
def test_what_is_no_activation_of_ours_stays(
    following: Callable[[], nn.Module], reason: str
) -> None:
    net = make_net(following(), nn.SiLU())
    expected = net(make_input())
    report = convert(net)
    assert report.replaced == [("1", f"{reason}, which cannot be folded")]
    assert not report.folded
    assert FoldedActivation not in types(net)
    torch.testing.assert_close(net(make_input()), expected)


def test_subclass_of_an_activation_is_known_by_its_forward() -> None:
    net = make_net(SubclassOfSiLU())
    expected = net(make_input())
    assert convert(net).folded == [("1", "silu")]
    torch.testing.assert_close(net(make_input()), expected)


def test_activation_that_holds_something_stays() -> None:
    activation = nn.SiLU()
    activation.register_buffer("kept", torch.ones(1))
    net = make_net(activation)
    assert not convert(net).folded
    assert "2.kept" in net.state_dict()


def test_last_of_a_sequence_has_nothing_to_fold() -> None:
    assert convert(make_net()).replaced == [("1", "nothing follows it")]


def test_outside_a_sequence_nothing_is_known() -> None:
    layers = nn.ModuleList([nn.GroupNorm(2, 8), nn.SiLU()])
    assert convert(layers).replaced == [("0", "nothing that can be folded is known to follow it")]


def test_folding_can_be_switched_off_and_made_up_for() -> None:
    net = make_net(nn.SiLU())
    assert convert(net, fold_activations=False).replaced == [("1", "folding is switched off")]
    assert types(net)[-2:] == [triton_gn.GroupNorm, nn.SiLU]
    report = convert(net)
    assert report.folded == report.replaced == [("1", "silu")]
    assert report.left == []


def test_second_conversion_changes_nothing() -> None:
    model = make_resnet()
    convert(model)
    before = state(model)
    report = convert(model)
    assert report.replaced == report.folded
    assert not report.folded
    assert [reason for _, reason in report.left] == ["is a triton_gn.GroupNorm already"] * 7
    assert state(model) == before


@each_forward_hook
def test_forward_hooks_of_the_norm_prevent_folding(add_hook: Callable[[nn.Module], object]) -> None:
    net = make_net(nn.SiLU())
    add_hook(net[1])
    reason = "has hooks, which would see the activation's output"
    assert convert(net).replaced == [("1", reason)]
    assert type(net[2]) is nn.SiLU


def test_hooks_of_the_norm_see_what_they_saw() -> None:
    net, seen = make_net(nn.SiLU()), []
    net[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    net(make_input())
    convert(net)
    net(make_input())
    before, after = seen
    torch.testing.assert_close(after, before)


@each_hook
def test_hooks_of_the_activation_prevent_folding(add_hook: Callable[[nn.Module], object]) -> None:
    net = make_net(nn.SiLU())
    add_hook(net[2])
    reason = "is followed by SiLU(), which has hooks or its forward replaced"
    assert convert(net).replaced == [("1", reason)]
    assert type(net[2]) is nn.SiLU


def test_replaced_forwards_are_kept() -> None:
    for index in range(1, 3):
        net = make_net(nn.SiLU())
        net[index].forward = torch.zeros_like
        report = convert(net)
        assert not report.folded
        torch.testing.assert_close(net(make_input()).sum(), torch.tensor(0.0))
    net = make_net(nn.SiLU())
    vars(net)["forward"] = net[0].forward
    reason = "its parent, a Sequential, has its forward replaced"
    assert convert(net).replaced == [("1", reason)]


def test_norm_in_two_places_is_not_folded() -> None:
    net = make_net(nn.SiLU())
    net.append(net[1])
    expected = net(make_input())
    report = convert(net)
    assert report.replaced == [("1", "is used in 2 places: 1, 3")]
    torch.testing.assert_close(net(make_input()), expected)


def test_parent_in_two_places_is_folded() -> None:
    """A shared parent runs its norm and its activation together in each place."""
    block = make_net(nn.SiLU())
    model = nn.ModuleDict({"a": block, "b": block})
    assert convert(model).folded == [("a.1", "silu")]


def test_activation_in_several_places_is_folded_in_each() -> None:
    activation = nn.SiLU()
    net = nn.Sequential(nn.GroupNorm(1, 4), activation, nn.GroupNorm(2, 4), activation, activation)
    x = torch.randn(2, 4, 5)
    expected = net(x)
    before = state(net)
    assert convert(net).folded == [("0", "silu"), ("2", "silu")]
    assert net[4] is activation
    torch.testing.assert_close(net(x), expected)
    unconvert(net)
    assert net[1] is net[3] is net[4] is activation
    assert state(net) == before


@pytest.mark.parametrize(
    ("kind", "folded"), [(Forward, []), (Iterates, [("0", "silu")])], ids=["reversed", "iterates"]
)
def test_sequence_with_its_own_ways_is_folded_in_its_own_order(
    kind: type[nn.Sequential], folded: list[tuple[str, str]]
) -> None:
    net = kind(nn.GroupNorm(2, 8), nn.SiLU(), nn.Identity())
    x = torch.randn(2, 8, 5)
    expected = net(x)
    assert convert(net).folded == folded
    torch.testing.assert_close(net(x), expected)


def test_subclass_that_runs_in_sequence_is_folded() -> None:
    assert convert(Plain(nn.GroupNorm(2, 8), nn.SiLU())).folded == [("0", "silu")]


def test_sequence_keeps_its_places() -> None:
    net = make_net(nn.SiLU(), nn.Flatten(), nn.Linear(8 * 48, 2))
    modules = list(net)
    convert(net)
    assert len(net) == 5
    assert [old is new for old, new in zip(modules, net, strict=True)] == [1, 1, 0, 1, 1]
    assert list(dict(net.named_modules())) == ["", "0", "1", "2", "3", "4"]
    assert "(2): FoldedActivation(SiLU())" in repr(net)


# What is left


class Derived(nn.GroupNorm):
    """A subclass without a forward of its own."""


class Overriding(nn.GroupNorm):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Hooked(Derived):
    """A subclass that another tool has hooked."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_full_backward_hook(lambda *_: None)


def test_subclasses_keep_their_class_and_what_they_compute() -> None:
    net = nn.Sequential(Derived(2, 4), nn.SiLU(), Overriding(2, 4), nn.SiLU())
    x, before = torch.randn(2, 4, 5), state(net)
    expected = net(x)
    report = convert(net)
    assert report.folded == [("0", "silu")]
    assert [name for name, _ in report.replaced] == ["0", "2"]
    assert isinstance(net[0], Derived)
    assert isinstance(net[2], Overriding)
    torch.testing.assert_close(net(x), expected)
    unconvert(net)
    assert state(net) == before


def test_own_layers_are_left_by_both() -> None:
    net = nn.Sequential(triton_gn.GroupNorm(2, 4, activation="relu"), nn.SiLU())
    before = state(net)
    assert convert(net).left == [("0", "is a triton_gn.GroupNorm already")]
    unconvert(net)
    assert state(net) == before


def test_parametrized_norm_is_left() -> None:
    net = make_net(nn.SiLU())
    parametrize.register_parametrization(net[1], "weight", nn.Softplus())
    report = convert(net)
    assert report.left == [
        ("1", "is parametrized, which made its class ParametrizedGroupNorm; convert before that")
    ]


def test_reparametrized_norm_is_replaced() -> None:
    net = make_net(nn.SiLU())
    net[1].weight = nn.Parameter(torch.randn(8))
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(net[1])
    before = step(net, make_input())
    assert [name for name, _ in convert(net).replaced] == ["1"]
    torch.testing.assert_close(step(net, make_input()), before)


def test_attribute_in_the_way_is_left() -> None:
    net = make_net(nn.SiLU())
    net[1].activation = nn.Tanh()
    ((name, reason),) = convert(net).left
    assert (name, reason.partition(",")[0]) == ("1", "has an attribute named activation")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_norm_is_left() -> None:
    net = nn.Sequential(make_net(nn.SiLU()), torch.jit.script(make_net(nn.SiLU())))
    report = convert(net)
    assert report.folded == [("0.1", "silu")]
    assert report.left == [("1.1", "is compiled by TorchScript, which has no Triton kernels")]


class Recorder:
    """Looks up, in backward, what it does with a layer by the layer's exact class."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[str] = []
        for module in model.modules():
            module.register_full_backward_hook(self.look_up)

    def look_up(self, module: nn.Module, *_: object) -> None:
        names: dict[type[nn.Module], str] = {nn.Conv2d: "convolution", nn.GroupNorm: "norm"}
        if list(module.parameters(recurse=False)):
            self.seen.append(names[type(module)])


def test_tool_that_goes_by_the_class_in_backward_still_finds_it() -> None:
    net, x = make_net(nn.SiLU()), make_input().requires_grad_()
    recorder = Recorder(net)
    report = convert(net)
    assert not report.replaced
    net(x).sum().backward()
    assert recorder.seen == ["norm", "convolution"]


@each_backward_hook
def test_layer_with_backward_hooks_is_left(add_hook: Callable[[nn.Module], object]) -> None:
    reason = "has backward hooks, which may go by its class; add them after the conversion"
    net, x = make_net(nn.SiLU()), make_input()
    add_hook(net[1])
    before = step(net, x)
    assert convert(net).left == [("1", reason)]
    assert types(net)[2:] == [nn.GroupNorm, nn.SiLU]
    torch.testing.assert_close(step(net, x), before, rtol=0, atol=0)
    later = make_net(nn.SiLU())
    convert(later)
    add_hook(later[1])
    torch.testing.assert_close(step(later, x), before)


def test_layer_with_a_module_inside_is_left() -> None:
    net = make_net(nn.SiLU())
    net[1].add_module("observer", nn.Identity())
    reason = "holds observer, whose owner may go by the layer's class"
    assert convert(net).left == [("1", reason)]


# What stays the same


def test_root_can_be_the_norm() -> None:
    norm = nn.GroupNorm(2, 4)
    report = convert(norm)
    assert [name for name, _ in report.replaced] == [""]
    assert type(norm) is triton_gn.GroupNorm
    unconvert(norm)
    assert type(norm) is nn.GroupNorm
    assert vars(norm).keys() == vars(nn.GroupNorm(2, 4)).keys()


def test_layer_keeps_all_it_has() -> None:
    norm = nn.GroupNorm(2, 4, eps=1e-3, device="meta", dtype=torch.bfloat16).eval()
    norm.weight.requires_grad_(False)
    norm.register_buffer("counter", torch.zeros(1))
    calls: list[nn.Module] = []
    norm.register_forward_hook(lambda module, *_: calls.append(module))
    held = {name: id(tensor) for name, tensor in norm.state_dict(keep_vars=True).items()}
    convert(norm)
    assert {name: id(tensor) for name, tensor in norm.state_dict(keep_vars=True).items()} == held
    assert (norm.eps, norm.training, norm.weight.requires_grad) == (1e-3, False, False)
    assert (norm.weight.device.type, norm.weight.dtype) == ("meta", torch.bfloat16)
    norm(torch.empty(2, 4, 3, device="meta", dtype=torch.bfloat16))
    assert calls == [norm]


def test_optimizer_of_before_trains_the_converted_model() -> None:
    model = make_resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model)
    old = model.get_parameter("0.1.weight").detach().clone()
    model(make_input()).sum().backward()
    optimizer.step()
    assert not model.get_parameter("0.1.weight").equal(old)


def test_checkpoints_move_both_ways() -> None:
    torch.manual_seed(3)
    plain, converted = make_resnet(), make_resnet()
    convert(converted)
    assert list(plain.state_dict()) == list(converted.state_dict())
    for source, target in ((plain, converted), (converted, plain)):
        for parameter in source.parameters():
            nn.init.normal_(parameter)
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target(make_input()), source(make_input()))


def through_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file])
def test_copies_work_and_can_be_taken_back(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = make_net(nn.SiLU())
    before, kinds = step(model, make_input()), types(model)
    convert(model)
    copy_of_it = copied(model)
    assert types(copy_of_it) == types(model)
    assert not set(copy_of_it.modules()) & set(model.modules())
    torch.testing.assert_close(step(copy_of_it, make_input()), step(model, make_input()))
    unconvert(copy_of_it)
    assert types(copy_of_it) == kinds
    assert all(map(torch.equal, step(copy_of_it, make_input()).values(), before.values()))
    assert types(model) != kinds


def test_taken_back_is_as_before() -> None:
    model, x = make_resnet(), make_input()
    before, expected = state(model), step(model, x)
    convert(model)
    assert state(model) != before
    unconvert(model)
    assert state(model) == before
    assert all(map(torch.equal, step(model, x).values(), expected.values()))


def test_untouched_model_is_not_taken_back() -> None:
    model = make_resnet()
    before = state(model)
    unconvert(model)
    assert state(model) == before


def test_layer_takes_over_one_activation_only() -> None:
    net = make_net(nn.SiLU())
    convert(net)
    net[2] = nn.ReLU()
    assert not convert(net).folded
    assert net[1].activation == "silu"


def test_modes_are_kept() -> None:
    net = make_net(nn.SiLU()).eval()
    convert(net)
    assert not any(module.training for module in net.modules())
    unconvert(net)
    assert not any(module.training for module in net.modules())


def test_modes_set_while_converted_are_kept() -> None:
    net = make_net(nn.SiLU())
    convert(net)
    net.eval()
    unconvert(net)
    assert not any(module.training for module in net.modules())


WRAPPED: dict[str, Callable[[nn.Module], object]] = {
    "forward": lambda norm: setattr(norm, "forward", functools.partial(norm.forward)),
    "class": lambda norm: setattr(norm, "__class__", type("Wrapped", (type(norm),), {})),
    "parametrized": lambda norm: parametrize.register_parametrization(
        norm, "weight", nn.Softplus()
    ),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=list(WRAPPED))
def test_layer_wrapped_since_is_not_taken_back(wrap: Callable[[nn.Module], object]) -> None:
    net = make_net(nn.SiLU(), nn.GroupNorm(2, 8))
    convert(net)
    wrap(net[3])
    kinds = types(net)
    with pytest.raises(RuntimeError, match=r"'3' of class .* Take that back first"):
        unconvert(net)
    assert types(net) == kinds


@each_hook
def test_hooked_folded_activation_is_not_taken_back(
    add_hook: Callable[[nn.Module], Any],
) -> None:
    """Taking the activation back would lose its hooks."""
    net = make_net(nn.SiLU())
    convert(net)
    handle = add_hook(net[2])
    with pytest.raises(RuntimeError, match=r"'2' of class FoldedActivation .* Take"):
        unconvert(net)
    handle.remove()
    unconvert(net)
    assert types(net) == types(make_net(nn.SiLU()))


def wrap_forward(module: nn.Module) -> None:
    """Replace the forward of a module as accelerate and diffusers do."""
    vars(module)["before"] = module.forward
    vars(module)["forward"] = functools.partial(type(module).forward, module)


def unwrap_forward(module: nn.Module) -> None:
    vars(module)["forward"] = vars(module).pop("before")


def test_wrapped_layers_are_left_until_they_are_unwrapped() -> None:
    """Unwrapping leaves a forward behind that is bound to the class of that time."""
    net, x = make_net(nn.SiLU()), make_input()
    before = step(net, x)
    for module in net.modules():
        wrap_forward(module)
    assert convert(net).left == [("1", "has its forward replaced")]
    torch.testing.assert_close(step(net, x), before, rtol=0, atol=0)
    for module in net.modules():
        unwrap_forward(module)
    assert convert(net).folded == [("1", "silu")]
    torch.testing.assert_close(step(net, x), before)
    for module in net.modules():
        wrap_forward(module)
    torch.testing.assert_close(step(net, x), before)
    with pytest.raises(RuntimeError, match="Take that back first"):
        unconvert(net)
    for module in net.modules():
        unwrap_forward(module)
    unconvert(net)
    assert types(net) == types(make_net(nn.SiLU()))
    torch.testing.assert_close(step(net, x), before, rtol=0, atol=0)


# Other tools


def per_sample_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Compute the gradients of the sum of squares, (N, *), sample by sample."""
    parameters = dict(model.named_parameters())
    per_sample = [
        torch.autograd.grad(model(sample[None]).square().sum(), list(parameters.values()))
        for sample in x
    ]
    return dict(zip(parameters, map(torch.stack, zip(*per_sample, strict=True)), strict=True))


def convert_model(model: nn.Module) -> nn.Module:
    convert(model)
    return model


@pytest.mark.parametrize("order", ["convert first", "convert last", "convert after a step"])
@pytest.mark.parametrize("functorch", [False, True], ids=["samplers", "functorch"])
# opacus hooks the first layer too, whose input needs no gradient
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_opacus_gives_the_gradients_of_each_sample(order: str, functorch: bool) -> None:
    from opacus.grad_sample import GradSampleModule

    model, x = make_net(nn.SiLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8)), make_input()
    expected = per_sample_gradients(model, x)
    if order == "convert first":
        convert(model)
    wrapped: Any = GradSampleModule(model, loss_reduction="sum", force_functorch=functorch)
    if order == "convert after a step":
        wrapped(x).sum().backward()
        wrapped.zero_grad()
    if order != "convert first":
        assert [name for name, _ in convert(wrapped).left] == ["_module.1", "_module.4"]
    wrapped(x).square().sum().backward()
    found = {name: vars(parameter)["grad_sample"] for name, parameter in model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to_save", [["1"], ["2"], ["1", "2"]], ids=["norm", "silu", "both"])
@pytest.mark.parametrize("convert_first", [True, False])
def test_peft_trains_and_disables_what_it_saves(to_save: list[str], convert_first: bool) -> None:
    import peft

    model, x = make_net(nn.SiLU()), make_input()
    expected = model(x)
    if convert_first:
        convert(model)
    config = peft.LoraConfig(target_modules=["0"], modules_to_save=to_save)
    adapted = peft.get_peft_model(model, config)
    if not convert_first:
        reasons = {reason for _, reason in convert(adapted).replaced}
        inside = "its parent, a ModulesToSaveWrapper, reads _adapters, a set, which may change"
        wrapped = "is followed by ModulesToSaveWrapper(), which cannot be folded"
        unfolded = "nothing that can be folded is known to follow it"  # of the copy that is kept
        assert reasons == ({inside, unfolded} if "1" in to_save else {wrapped})
    torch.testing.assert_close(adapted(x), expected)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted(x).sum().backward()
    optimizer.step()
    trained = adapted(x)
    assert not torch.allclose(trained, expected)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(x), expected)
    unconvert(adapted)
    torch.testing.assert_close(adapted(x), trained)
    assert FoldedActivation not in types(adapted)


@pytest.mark.parametrize("convert_first", [True, False])
@pytest.mark.parametrize("how", ["hooks", "offload", "dispatch"])
def test_accelerate_can_hook_every_layer(how: str, convert_first: bool) -> None:
    import accelerate
    from accelerate import hooks

    model, x = make_net(nn.SiLU()), make_input()
    expected = step(model, x)
    if convert_first:
        convert(model)
    if how == "hooks":
        for module in list(model.modules()):
            hooks.add_hook_to_module(module, hooks.ModelHook())
    elif how == "offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        places = dict.fromkeys(dict(model.named_children()), "cpu")
        accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    if not convert_first:
        assert convert(model).left == [("1", "has its forward replaced")]
    torch.testing.assert_close(model(x), expected["output"])
    if how == "hooks":
        torch.testing.assert_close(step(model, x), expected)
        hooks.remove_hook_from_submodules(model)
        unconvert(model)
        assert types(model) == types(make_net(nn.SiLU()))
        torch.testing.assert_close(step(model, x), expected, rtol=0, atol=0)


def prune_weight(norm: nn.Module) -> object:
    return prune.l1_unstructured(norm, "weight", 0.5)


def parametrize_weight(norm: nn.Module) -> object:
    return parametrize.register_parametrization(norm, "weight", nn.Softplus())


@pytest.mark.parametrize("change", [prune_weight, parametrize_weight])
def test_converted_layer_can_be_reparametrized(change: Callable[[nn.Module], object]) -> None:
    plain, converted = make_net(nn.SiLU()), convert_model(make_net(nn.SiLU()))
    x = make_input()
    for net in (plain, converted):
        change(net.get_submodule("1"))
    torch.testing.assert_close(step(converted, x), step(plain, x))


# PyTorch's own warnings of the operations and the flow
quantises = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:Please use quant_min and quant_max:UserWarning",
    "ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning",
)


def make_quantisable() -> nn.Module:
    from torch.ao import quantization

    torch.manual_seed(0)
    norm = nn.Sequential(nn.GroupNorm(2, 6), nn.ReLU())
    model: Any = quantization.QuantWrapper(norm)
    model.qconfig = quantization.default_qconfig
    return nn.Sequential(nn.Conv2d(3, 6, 1), model).eval()


@quantises
@pytest.mark.parametrize("when", ["before, taken back", "when observed", "when quantised"])
def test_quantised_as_without_conversion(when: str) -> None:
    from torch.ao import quantization

    plain, model = (quantization.prepare(make_quantisable()) for _ in range(2))
    name, x = "1.module.0", make_input()
    if when == "before, taken back":
        converted = make_quantisable()
        convert(converted)
        unconvert(converted)
        model = quantization.prepare(converted)
    plain(x), model(x)
    if when == "when observed":
        reason = "holds activation_post_process, whose owner may go by the layer's class"
        assert convert(model).left == [(name, reason)]
    plain, model = quantization.convert(plain), quantization.convert(model)
    if when == "when quantised":
        assert [left for left, _ in convert(model).left] == [name]
    assert type(model.get_submodule(name)) is torch.ao.nn.quantized.GroupNorm
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)


@quantises
def test_quantised_input_of_a_converted_layer_raises() -> None:
    from torch.ao import quantization

    model = make_quantisable()
    convert(model)
    observed = quantization.prepare(model)
    observed(make_input())
    with pytest.raises(TypeError, match=r"got torch\.quint8"):
        quantization.convert(observed)(make_input())


class NamingTracer(torch.fx.Tracer):
    """Names each node by the module that it comes from, as torchvision's feature extraction."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, torch.fx.Node] = {}
        self.path = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf: bool = super().is_leaf_module(m, module_qualified_name)
        return leaf or isinstance(m, nn.GroupNorm)

    def call_module(self, m: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outer, self.path = self.path, self.path_of_module(m)
        try:
            return super().call_module(m, *args, **kwargs)
        finally:
            self.path = outer

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        proxy = super().create_proxy(*args, **kwargs)
        self.names[self.path] = proxy.node
        return proxy


@pytest.mark.parametrize("inplace", [False, True])
def test_folded_activation_has_a_node_of_its_own(inplace: bool) -> None:
    net, x = make_net(nn.ReLU(inplace), nn.Conv2d(8, 2, 1)), make_input()
    model, expected = nn.Sequential(net), net[:3](x)
    convert(model)
    tracer = NamingTracer()
    graph = tracer.trace(model)
    (output,) = graph.find_nodes(op="output")
    output.args = (tracer.names["0.2"],)
    features = torch.fx.GraphModule(model, graph)
    graph.eliminate_dead_code()
    features.recompile()
    torch.testing.assert_close(features(x), expected)
    for copied in (copy.deepcopy, through_pickle):
        torch.testing.assert_close(copied(features)(x), expected)


def test_folded_activation_returns_its_input() -> None:
    x = make_input()
    assert FoldedActivation(nn.SiLU())(x) is x


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script_says_what_to_do_and_changes_nothing() -> None:
    inner, x = make_net(nn.SiLU()), make_input()
    net = nn.Sequential(inner)
    expected = step(net, x)
    convert(net)
    before = state(net)
    for module in (net, inner[1], triton_gn.GroupNorm(2, 8, activation="silu")):
        message = "got a GroupNorm. Call triton_gn.unconvert on a converted model first, or use"
        with pytest.raises(RuntimeError, match=message):
            torch.jit.script(module)
    assert state(net) == before
    unconvert(net)
    torch.testing.assert_close(step(torch.jit.script(net), x), expected)


def test_replicas_work() -> None:
    """nn.DataParallel makes replicas of each module."""
    net = make_net(nn.SiLU())
    expected = net(make_input())
    convert(net)
    replica: Any = net._replicate_for_data_parallel()
    for name, module in net._modules.items():
        assert module is not None
        part: Any = module._replicate_for_data_parallel()
        part._parameters = module._parameters
        replica._modules[name] = part
    torch.testing.assert_close(replica(make_input()), expected)


# What is said


def test_report_reads_as_a_table() -> None:
    net = nn.Sequential(make_net(nn.SiLU()), Overriding(2, 8), nn.GroupNorm(2, 8), Hooked(2, 8))
    assert str(convert(net)).splitlines() == [
        "4 GroupNorm layers: 3 replaced, of which 1 folded, 1 left",
        "folded    0.1  silu",
        "replaced  1    add has a number among its operands",
        "replaced  2    is followed by Hooked(2, 8, eps=1e-05, affine=True, bias=True), which "
        "cannot be folded",
        f"left      3    is a {__name__}.Hooked, a subclass",
    ]
    assert str(convert(nn.GroupNorm(2, 8))).splitlines() == [
        "1 GroupNorm layer: 1 replaced, of which 0 folded, 0 left",
        "replaced  (the model)  nothing that can be folded is known to follow it",
    ]
    assert str(convert(nn.ReLU())) == "0 GroupNorm layers: 0 replaced, of which 0 folded, 0 left"


@pytest.mark.parametrize("function", [convert, unconvert])
def test_what_is_no_module_raises(function: Callable[[Any], object]) -> None:
    message = f"{function.__name__}: model must be a torch.nn.Module; got list. Pass its modules"
    with pytest.raises(TypeError, match=message):
        function([nn.GroupNorm(2, 4)])


def test_diffusers_is_not_imported() -> None:
    code = (
        "import sys\n"
        "from torch import nn\n"
        "from triton_gn.convert import convert\n"
        "convert(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()))\n"
        "assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)
