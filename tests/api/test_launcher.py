"""Compare what Triton's launch and ours hand to the launcher. No GPU is needed."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from perf import standin
from triton_gn.kernels.activations import device_functions
from triton_gn.ops import launcher, launches, layout
from triton_gn.ops.call import Call
from triton_gn.ops.device import gpu_of
from triton_gn.ops.settings import Settings
from triton_gn.plan import TARGETS
from triton_gn.tools.workloads import FUSED, Workload

_HANDLES = 9  # grid, stream, function, metadata and hooks come before a kernel's own arguments
Launches = list[tuple[str, tuple[Any, ...]]]


@pytest.fixture
def launched() -> Iterator[Launches]:
    """The kernel's name, the grid and its arguments, of each launch."""
    seen: Launches = []
    launcher.forget()
    with standin.active(
        lambda *handed: seen.append((handed[4], (*handed[:3], *handed[_HANDLES:])))
    ):
        yield seen
    launcher.forget()


def run(
    direction: str, workload: Workload, strategy: str, seed: int = 0, **fields: Any
) -> list[Tensor]:
    """The tensors of a call, in no order."""
    operands = workload.operands("cpu", seed)
    settings = Settings(plan_override=(*fields.items(), ("strategy", strategy)))
    x = operands.x
    stats = launches.statistics(x, workload.n, workload.groups, 3)
    call = Call(workload.groups, 1e-5, workload.activation, x.dtype, settings)
    present = [t for t in operands if t is not None]
    if direction == "forward":
        y = torch.empty_like(x)
        launcher.forward(operands, call, y, stats)
        return [*present, y, stats]
    grads = {name: torch.empty_like(t) for name, t in operands._asdict().items() if t is not None}
    dy = layout.empty_like(x)
    launcher.backward(operands, call, dy, stats, grads)
    return [*present, dy, stats, *grads.values()]


def flat(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in flat(item)] if isinstance(value, tuple) else [value]


# the full product of strategies and directions: each has launches of its own
@pytest.mark.parametrize("strategy", ["resident", "pipelined", "split"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("fused", "memory_format"),
    [((), "contiguous"), (FUSED, "channels_last")],
    ids=["plain", "fused"],
)
def test_a_repeated_call_launches_what_the_first_did(
    launched: Launches, strategy: str, direction: str, fused: tuple[str, ...], memory_format: str
) -> None:
    """The first goes through Triton's own launch, the second past it, on tensors of its own."""
    workload = Workload("", 2, 24, 3, (8, 8), layout=memory_format, activation="silu", fused=fused)
    first = run(direction, workload, strategy)
    count = len(launched)
    assert count >= (2 if strategy == "split" else 1)
    second = run(direction, workload, strategy, seed=1)
    assert len(launched) == 2 * count
    bound = {
        id(tensor): place for tensors in (first, second) for place, tensor in enumerate(tensors)
    }
    for before, after in zip(launched[:count], launched[count:], strict=True):
        assert before[0] == after[0]
        for old, new in zip(flat(before[1]), flat(after[1]), strict=True):
            if not isinstance(old, Tensor):
                assert old == new
                continue
            assert new is not old, "a tensor of an earlier call is launched again"
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
            assert bound.get(id(new)) == bound.get(id(old))
    places = {
        bound.get(id(value)) for _, values in launched for value in flat(values)
        if isinstance(value, Tensor)
    }  # fmt: skip
    assert set(range(len(first))) <= places, "a tensor of the call reaches no kernel"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("sm_70", "sm_75"), ("sm_87", "sm_86"), ("sm_103", "sm_100"), ("sm_110", "sm_100"),
        ("sm_121", "sm_120"), ("gfx908", "gfx90a"), ("gfx1100", "gfx950"), ("gfx1201", "gfx950"),
        ("sm_90", "sm_90"),
    ],
)  # fmt: skip
def test_an_unknown_gpu_is_planned_for_as_the_nearest_of_its_maker(
    name: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = name.removeprefix("sm_")
    properties = SimpleNamespace(
        name="a GPU", major=digits[:-1], minor=digits[-1], gcnArchName=f"{name}:xnack-",
        multi_processor_count=12, L2_cache_size=2**22, warp_size=32,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.version, "hip", None if name.startswith("sm") else "7.0")
    device, known = gpu_of.__wrapped__(torch.device("cuda", 0)), TARGETS[nearest]
    assert device.registers == known.registers
    scaled = known.dram_gb_per_s * 12 // known.multiprocessors
    assert device.dram_gb_per_s == (known.dram_gb_per_s if name == nearest else scaled)


def test_the_second_call_is_past_triton(
    launched: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = Workload("", 2, 24, 3, (8, 8))
    run("forward", workload, "resident")
    kernel = launches._kernels().resident.group_norm_forward_resident_kernel
    monkeypatch.setattr(type(kernel), "run", lambda *_, **__: pytest.fail("asked Triton again"))
    run("forward", workload, "resident")
    assert len(launched) == 2


def test_another_thread_may_launch_during_the_first_call(
    launched: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its launch comes after Triton has compiled the kernel, while the call is not yet ready."""
    workload, lookups = Workload("", 2, 24, 3, (8, 8)), []

    def get_current_stream(self: standin.StandIn) -> Any:
        lookups.append(self)
        if len(lookups) == 2:  # the first is Triton's own
            run("forward", workload, "resident")
        return lambda device: 0

    monkeypatch.setattr(standin.StandIn, "get_current_stream", property(get_current_stream))
    run("forward", workload, "resident")
    run("forward", workload, "resident")
    assert len(launched) == 3


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_hears_of_each_launch(launched: Launches, hook: str) -> None:
    """A profiler adds a hook; Triton hands it to the launcher."""
    from triton import knobs

    workload = Workload("", 2, 24, 3, (8, 8))
    run("forward", workload, "resident")
    kernel = launches._kernels().resident.group_norm_forward_resident_kernel
    handed: list[Any] = []
    chain = getattr(knobs.runtime, hook)
    listener = handed.append
    chain.add(listener)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(kernel), "run", lambda *_, **__: handed.append("told"))
            run("forward", workload, "resident")
    finally:
        chain.remove(listener)
    assert handed == ["told"]


@pytest.mark.parametrize("hook", [None, lambda _: None])
def test_a_plain_hook_or_none_is_borne(
    launched: Launches, hook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user may replace Triton's chain of hooks by one hook or None."""
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
    for _ in range(2):
        run("forward", Workload("", 2, 24, 3, (8, 8)), "resident")
    assert len(launched) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.narrow(0, 0, 1),
        lambda x: x.float(),
        lambda x: torch.randn(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape),
    ],
    ids=["shape", "dtype", "alignment"],
)
def test_another_signature_is_compiled_anew(launched: Launches, change: Any) -> None:
    """Triton compiles for the dtype and the alignment of pointers: a handle fits no others."""
    operands = Workload("", 2, 24, 3, (8, 8)).operands("cpu")

    def call(x: Tensor) -> launcher.Prepared:
        with launcher.recording() as calls:
            constants = Call(3, 1e-5, "none", x.dtype, Settings())
            launcher.forward(operands._replace(x=x), constants, layout.empty_like(x), None)
        return calls[0]

    entry = call(operands.x)
    assert call(operands.x.clone()) is entry
    assert call(change(operands.x)) is not entry
    assert call(operands.x) is entry


def test_values_of_a_parameter_do_not_share_a_compiled_kernel() -> None:
    names = ("leaky_relu", "leaky_relu(0.2)", "leaky_relu(0.3)", "leaky_relu(0.20)")
    forwards: list[Any] = [device_functions(name).forward for name in names]
    keys = [forward.cache_key for forward in forwards]
    assert len({*keys}) == 3
    assert keys[1] == keys[3]
