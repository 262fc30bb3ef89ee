"""exact_tiles as a context: hooks, errors, surroundings, memory."""

import contextvars
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import triton_gn
from tests.support.tensors import random
from tests.support.tiles import Run, check, difference, fill, make_decoder
from triton_gn.ops import settings
from triton_gn.tiling import NotExactError, exact_tiles, spatial


def cast_before(module: nn.Module, args: Any) -> None:
    module.to(torch.float64)


def cast_after(module: nn.Module, args: Any, y: Any) -> None:
    module.to(torch.float32)


def hook_with_pytorch(model: nn.Module) -> str:
    for module in model.children():
        module.register_forward_pre_hook(cast_before)
        module.register_forward_hook(cast_after)
    return "cast_before"


def hook_with_accelerate(model: nn.Module) -> str:
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")
    return "AlignDevicesHook.pre_forward"


def hook_groups_with_diffusers(model: nn.Module) -> str:
    hooks = pytest.importorskip("diffusers.hooks")
    cpu = torch.device("cpu")
    hooks.apply_group_offloading(
        model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
    )
    return "GroupOffloadingHook.pre_forward"


def hook_dtypes_with_diffusers(model: nn.Module) -> str:
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_layerwise_casting(model, torch.bfloat16, torch.float64)
    return "LayerwiseCastingHook.pre_forward"


def make_small() -> nn.Module:
    return fill(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU()))


@pytest.mark.parametrize(
    "hook",
    [
        hook_with_pytorch,
        hook_with_accelerate,
        hook_groups_with_diffusers,
        hook_dtypes_with_diffusers,
    ],
)
def test_hooks_that_move_parameters_are_named(hook: Callable[[nn.Module], str]) -> None:
    model = make_small()
    name = hook(model)
    message = rf"the hook {name} .*enable_model_cpu_offload"
    with torch.no_grad(), exact_tiles(model, 3), pytest.raises(NotExactError, match=message):
        model(random(2, 3, 6, 7))


def test_remedies_of_hooks() -> None:
    """The same hooks around the whole, on the model itself or taken away."""
    accelerate = pytest.importorskip("accelerate")
    x = random(2, 3, 6, 7)
    expected = make_small()(x)
    around, _ = accelerate.cpu_offload_with_hook(nn.Sequential(make_small()), "cpu")
    itself, _ = accelerate.cpu_offload_with_hook(make_small(), "cpu")
    removed = make_small()
    hook_with_accelerate(removed)
    accelerate.hooks.remove_hook_from_submodules(removed)
    for outer, tiled in ((around, around[0]), (itself, itself), (removed, removed)):
        with exact_tiles(tiled, 3):
            assert difference(outer(x), expected) < 1e-12
            with pytest.raises(RuntimeError, match="already"), exact_tiles(tiled, 3):
                pass
        assert difference(outer(x), expected) < 1e-12


def test_model_is_restored() -> None:
    model = make_decoder()
    own = model.forward
    vars(model)["forward"] = replaced = lambda x: own(x) * 2
    x = random(2, 3, 6, 7)
    expected = model(x)
    with exact_tiles(model, 3):
        assert difference(model(x), expected) < 1e-12
    assert vars(model)["forward"] is replaced
    del model.forward
    with pytest.raises(KeyError), exact_tiles(model, 3):
        raise KeyError
    assert "forward" not in vars(model)


def test_nested_use_is_refused() -> None:
    model = make_decoder()
    with (
        exact_tiles(model, 3),
        pytest.raises(RuntimeError, match="already"),
        exact_tiles(model, 2),
    ):
        pass
    inner = model.get_submodule("0")
    with (
        exact_tiles(model, 3),
        exact_tiles(inner, 2),
        pytest.raises(RuntimeError, match="within a tile"),
    ):
        model(random(2, 3, 6, 7))


def test_hooks_see_whole_tensors() -> None:
    model, seen = make_decoder(), []
    model.register_forward_hook(lambda _, args, y: seen.append((args[0].shape, y.shape)))
    with exact_tiles(model, 3):
        model(random(2, 3, 6, 7))
    assert seen == [((2, 3, 6, 7), (2, 3, 24, 28))]


class Fault(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, Fault, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [0, 1, 5])
def test_an_error_in_a_tile_stops_all(error: type[BaseException], failing: int) -> None:
    calls: list[int] = []

    def fail_here(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == failing + 1:
            raise error("at fault")
        return x

    norm = nn.GroupNorm(1, 3)
    model = Run(lambda x: fail_here(norm(x)), norm).double()
    with exact_tiles(model, 3), pytest.raises(error, match="at fault") as raised:
        model(random(2, 3, 6, 7))
    assert raised.traceback[-1].name == "fail_here"
    assert len(calls) == failing + 1


def test_an_interrupted_caller_stops_all() -> None:
    """Ctrl-C is raised in the main thread, while a tile runs."""
    calls: list[int] = []

    def model(x: Tensor) -> Tensor:
        calls.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # until the main thread has it
        return F.group_norm(x, 1)

    run = Run(model)
    # a job in the background of a shell is started deaf to it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with exact_tiles(run, 3), pytest.raises(KeyboardInterrupt):
            run(random(2, 3, 6, 7))
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == [1]


def test_tiles_run_in_the_surroundings_of_the_call() -> None:
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(
            (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
                torch.get_default_device().type,
                settings.current(),
                variable.get(),
            )
        )
        return x

    variable = contextvars.ContextVar("variable", default=0)
    run, x = Run(model), random(2, 3, 6, 7)

    def compare() -> None:
        seen.clear()
        run(x)
        with exact_tiles(run, 3):
            run(x)
        assert len(seen) == 7
        assert len(set(seen)) == 1

    compare()
    variable.set(1)
    with torch.no_grad(), triton_gn.backend("torch"), triton_gn.batch_invariant():
        compare()
    with torch.inference_mode(), torch.device("meta"):
        compare()
    with torch.autocast("cpu", torch.float16):
        compare()


def test_autocast_is_as_in_one_piece() -> None:
    decoder, x = make_decoder().float(), random(2, 3, 6, 7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        check(decoder, x, bound=4e-2)


def test_two_passes_per_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile is read once for its statistics and once to normalise it."""
    calls = []
    for name in ("group_norm_stats", "group_norm_apply"):
        original = getattr(spatial, name)

        def counted(*args: Any, _name: str = name, _of: Any = original, **kwargs: Any) -> Any:
            calls.append(_name)
            return _of(*args, **kwargs)

        monkeypatch.setattr(spatial, name, counted)
    check(make_decoder(), random(2, 3, 6, 7), tile_size=3)
    tiles, norms = 6, 2
    assert calls.count("group_norm_stats") == calls.count("group_norm_apply") == tiles * norms


def test_a_small_input_runs_as_it_is() -> None:
    threads = []

    def flipped(x: Tensor) -> Tensor:
        threads.append(threading.current_thread())
        return x.flip(-1)

    with exact_tiles(model := Run(flipped)):
        y = model(random(2, 3, 64, 64))
    assert torch.equal(y, random(2, 3, 64, 64).flip(-1))
    assert threads == [threading.main_thread()]


def test_tiles_are_of_nearly_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()
    stats_of = vars(spatial)["group_norm_stats"]

    def seen(x: Tensor, *args: Any) -> Any:
        shapes.add(tuple(x.shape))
        return stats_of(x, *args)

    monkeypatch.setattr(spatial, "group_norm_stats", seen)
    check(nn.GroupNorm(1, 2).double(), random(1, 2, 9, 13), tile_size=(4, 6))
    assert shapes == {(1, 2, 3, 5), (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((lambda x: x,), TypeError, "nn.Module; got function"),
        ((nn.Identity(), 0), ValueError, "at least 1; got 0"),
        ((nn.Identity(), ()), ValueError, "a size or several"),
        ((nn.Identity(), 2.0), TypeError, "integers; got 2.0"),
        ((nn.Identity(), (2, True)), TypeError, "integers"),
    ],
)
def test_wrong_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), exact_tiles(*arguments):
        pass


def test_wrong_inputs_and_surroundings() -> None:
    model = nn.Identity()
    with exact_tiles(model, 3):
        for args in ((), (random(2, 3),), ("image",)):
            with pytest.raises(ValueError, match="must be a tensor"):
                model(*args)
        with pytest.raises(RuntimeError, match="eager"):
            torch.func.vmap(model)(random(2, 2, 3, 6, 7))
        with pytest.raises(RuntimeError, match="mode"), FlopCounterMode(display=False):
            model(random(2, 3, 6, 7))
    with exact_tiles(model, (3, 3, 3)), pytest.raises(ValueError, match="3 or more spatial"):
        model(random(2, 3, 6, 7))


def live_bytes(monkeypatch: pytest.MonkeyPatch, offload: bool) -> int:
    """The most bytes that the inputs and outputs of norms have had at a time, in all tiles."""
    seen: list[weakref.ref[Tensor]] = []
    most = [0]
    apply = vars(spatial)["group_norm_apply"]

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = apply(x, *args, **kwargs)
        seen.extend([weakref.ref(x), weakref.ref(y)])
        alive = [t.untyped_storage() for ref in seen if (t := ref()) is not None]
        most.append(sum({s.data_ptr(): s.nbytes() for s in alive}.values()))
        return y

    conv, norm = fill(nn.Conv2d(4, 4, 3, padding=1)), nn.GroupNorm(2, 4).double()
    model = Run(lambda x: x + conv(norm(conv(norm(conv(x))))), conv, norm)
    x = random(1, 4, 16, 16)
    expected = model(x)
    with monkeypatch.context() as patch, torch.no_grad(), exact_tiles(model, 4, offload=offload):
        patch.setattr(spatial, "group_norm_apply", counted)
        assert difference(model(x), expected) < 1e-12
    return max(most)


def test_waiting_tiles_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = 16 * 16 * 4 * 8
    assert live_bytes(monkeypatch, offload=False) > whole
    assert live_bytes(monkeypatch, offload=True) == 2 * whole // 16
