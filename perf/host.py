"""Measure the host cost of a call, as ratios of medians within one run of calls in turn.

Launches go to the GPU or, without one, to a stand-in for its driver that launches nothing. Calls on
a small tensor, on the CPU and on the GPU, are compared with PyTorch's.
"""

import argparse
import contextlib
import timeit
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional as F

import triton_gn
from perf import common, standin
from perf.implementations import speed_of_light
from triton_gn.ops import autograd, launcher, launches, layout
from triton_gn.ops.call import Call as Constants
from triton_gn.ops.launches import Launch
from triton_gn.ops.settings import Settings
from triton_gn.tools.stopwatch import Call
from triton_gn.tools.verify import EPS
from triton_gn.tools.workloads import Workload

WORKLOAD = Workload("", 2, 320, 32, (64, 64), activation="silu")
LOOK_UP, READY = "its look-up", "the ready call"
OWN, COPY = "kernel[grid] of its kernels", "kernel[grid] of a copy"

_QUEUED = 100  # calls of a few launches each; the GPU's queue holds about a thousand launches

Calls = Mapping[str, Call]
Costs = dict[str, list[float]]  # microseconds of each call by round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--calls", type=int, default=2000, metavar="N", help="calls in a round")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")


def run(options: argparse.Namespace) -> int:
    """Print the cost of launches, then of calls on small tensors; return the exit status."""
    torch.set_num_threads(1)
    costs = partial(cost, number=options.calls, rounds=options.rounds)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    name = torch.cuda.get_device_name() if has_gpu else "a stand-in for a GPU's driver"
    launcher.forget()
    with contextlib.nullcontext() if has_gpu else standin.active():
        for direction in ("forward", "backward"):
            title = f"{direction}, {WORKLOAD.shape_text}, {WORKLOAD.dtype}, silu\non {name}"
            report_launching(title, costs(launching(WORKLOAD, direction, device)))
    launcher.forget()
    calls = on_small((2, 6, 2, 2), 2, device="cpu", dtype=torch.float32)
    report_on_small("on the CPU, 2x6x2x2, float32", calls, costs)
    if has_gpu:
        calls = on_small((2, 320, 16, 16), 32, device=device, dtype=torch.bfloat16)
        report_on_small(f"on {name}, 2x320x16x16, bfloat16", calls, costs)
    return 0


def cost(calls: Calls, number: int, rounds: int) -> Costs:
    """Return the microseconds of each call, in rounds of ``number`` calls of each in turn."""
    costs: Costs = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            costs[name].append(_timed(call, number) / number * 1e6)
    return costs


def _timed(call: Call, number: int) -> float:
    """Return the seconds of ``number`` calls, in runs that fit the GPU's queue."""
    total = 0.0
    for first in range(0, number, _QUEUED):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        total += timeit.timeit(call, number=min(_QUEUED, number - first))
    return total


def launching(workload: Workload, direction: str, device: torch.device) -> Calls:
    """Return a repeated call, its parts, and launches by Triton's ``kernel[grid]`` to compare."""
    operands = workload.operands(device)
    x, groups = operands.x, workload.groups
    constants = Constants(groups, EPS, workload.activation, x.dtype, Settings())
    stats = launches.statistics(x, workload.n, groups, 3).zero_()
    y = dy = layout.empty_like(x).zero_()
    grads = autograd.empty_gradients(operands, [t is not None for t in operands])
    describe: Callable[..., list[Launch]]
    ready: Call
    arguments: dict[str, Any]
    tensors: tuple[Tensor | None, ...]
    if direction == "forward":
        ready = partial(launcher.forward, operands, constants, y, None)
        tensors = (*operands, y, None, None)
        describe, arguments = launches.forward_launches, {"y": y, "stats": None, "eps": EPS}
    else:
        ready = partial(launcher.backward, operands, constants, dy, stats, grads)
        tensors = (*operands, dy, stats, *grads.values(), None)
        describe, arguments = launches.backward_launches, {"dy": dy, "stats": stats, "grads": grads}
    look_up = f"prepare_{direction}"
    find = getattr(launcher, look_up)
    ready()  # the cache keeps the key of this call; later calls bring a key of their own
    with launcher.recording() as calls, mock.patch.object(launcher, look_up, wraps=find) as spy:
        ready()
    (call,) = calls
    own = describe(call.problem, call.config, operands=operands, **arguments)
    return {
        LOOK_UP: partial(find, *spy.call_args.args),
        "its binding and launches": partial(call, tensors),
        READY: ready,
        OWN: by_triton(own, device),
        COPY: speed_of_light("forward", x.nbytes, device),
    }


def by_triton(launches: Sequence[Launch], device: torch.device) -> Callable[[], None]:
    """Return a function that calls ``kernel[grid]`` for each launch."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    calls = []
    for launch in launches:
        arguments = launch.arguments_on(nvidia)
        values = [arguments[name] for name in launch.kernel.arg_names]
        calls.append(partial(launch.kernel[(launch.grid,)], *values, **launch.options(nvidia)))

    def run_all() -> None:
        for call in calls:
            call()

    return run_all


def report_launching(title: str, costs: Costs) -> None:
    """Print the costs, and their ratios to Triton's own launches."""
    table = common.table([""], ["us", f"over {OWN}", f"over {COPY}"], title=title)
    for column in table.columns[1:]:
        column.max_width = 16
    for name, rounds in costs.items():
        ratios = (f"{_ratio(rounds, costs[other]):.3f}" for other in (OWN, COPY))
        table.add_row(Text(name), f"{median(rounds):.2f}", *ratios)
    Console().print(table)
    share = _ratio(costs[LOOK_UP], costs[COPY])
    print(f"The look-up takes {share:.3f} of {COPY}; at most 0.2 is asked for.\n")


def on_small(shape: tuple[int, ...], groups: int, **placement: Any) -> dict[str, tuple[Call, Call]]:
    """Return calls of PyTorch and of triton_gn on a tensor so small that only host time counts."""
    channels, dy = shape[1], torch.randn(shape, **placement)
    pairs: dict[str, tuple[Call, Call]] = {}
    for kind in ("no gradient", "recording", "and backward"):
        torchs = nn.GroupNorm(groups, channels, **placement)
        mine = triton_gn.GroupNorm(groups, channels, **placement)
        fused = triton_gn.GroupNorm(groups, channels, **placement, activation="silu")
        unfused = nn.Sequential(torchs, nn.SiLU())
        x = torch.randn(shape, **placement)
        for leaf in (torchs, mine, fused, x):
            leaf.requires_grad_(kind != "no gradient")
        arguments = x, groups, torchs.weight, torchs.bias
        call = _and_backward if kind == "and backward" else _forward
        for name, theirs, ours, inputs in (
            ("group_norm", F.group_norm, triton_gn.group_norm, arguments),
            ("GroupNorm", torchs, mine, (x,)),
            ("GroupNorm and SiLU", unfused, fused, (x,)),
        ):
            pairs[f"{name}, {kind}"] = (
                partial(call, theirs, inputs, dy),
                partial(call, ours, inputs, dy),
            )
    return pairs


def _forward(function: Any, arguments: Any, _: Tensor) -> None:
    function(*arguments)


def _and_backward(function: Any, arguments: Any, dy: Tensor) -> None:
    function(*arguments).backward(dy)


def report_on_small(
    title: str, calls: Mapping[str, tuple[Call, Call]], costs: Callable[[Calls], Costs]
) -> None:
    """Print the costs of triton_gn's calls and their ratios to PyTorch's."""
    table = common.table([""], ["PyTorch us", "triton_gn us", "over PyTorch"], title=title)
    for name, (theirs, ours) in calls.items():
        measured = costs({"theirs": theirs, "ours": ours})
        medians = (f"{median(rounds):.2f}" for rounds in measured.values())
        table.add_row(name, *medians, f"{_ratio(measured['ours'], measured['theirs']):.3f}")
    Console().print(table)


def _ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return median(x / y for x, y in zip(a, b, strict=True))
