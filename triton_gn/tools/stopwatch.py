"""Measure GPU time per call without host time, for the tuner and the benchmarks."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

Call = Callable[[], object]

_WARM_UPS = 3
_FLUSH_BYTES = 256 * 2**20  # at least: as much as the last-level cache of an MI300X
_WARM_MS = 0.5  # calls in one graph: far above an event's resolution and a graph's launch
_MAX_CALLS = 200  # per graph
_HOST_CALLS = 100


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: the median and the range of the middle 60 % of the rounds.

    ``graphed`` is False if the call cannot be captured; the time may then include the host's.
    """

    p20: float
    p50: float
    p80: float
    graphed: bool = True


def protocol(cold: bool) -> str:
    """Describe what ``measure`` does, for the records."""
    state = (
        "before each replay of one call a write of twice the L2 cache, at least 256 MiB"
        if cold
        else f"calls back to back for about {_WARM_MS} ms a replay, before each an untimed one"
    )
    return (
        f"CUDA graphs after {_WARM_UPS} calls on a side stream; {state}; CUDA events around each "
        "replay, its start included; all calls in turn in each round; percentiles of the rounds"
    )


def measure(
    calls: Sequence[Call],
    device: torch.device,
    *,
    cold: bool,
    min_rounds: int = 20,
    max_rounds: int = 200,
    budget_ms: float = 100.0,
) -> list[Times]:
    """Measure the GPU time of each call as ``protocol(cold)`` describes.

    Args:
        calls: functions that launch the same work at every call.
        device: the GPU that they launch on.
        cold: whether L2 is flushed before each call; otherwise the same call has just run.
        min_rounds: lower bound of the number of rounds.
        max_rounds: upper bound of it.
        budget_ms: GPU time to spend on each call, within these bounds.

    Raises:
        RuntimeError: the device is no GPU.
    """
    if device.type != "cuda":
        raise RuntimeError(
            f"measure: the device must be a GPU; got {device}. "
            "Run it where torch.cuda.is_available()."
        )
    with torch.cuda.device(device):
        replays = [_captured(call, 1) if cold else _repeated(call) for call in calls]
        prepare = _flush(device) if cold else _Replay.start
        _, sample = _rounds(replays, prepare, 2)  # the first round includes one-time costs
        rounds = int(budget_ms * len(calls) / sum(sample))
        times = _rounds(replays, prepare, max(min_rounds, min(max_rounds, rounds)))
    return [
        summary([ms / replay.calls for ms in rounds_of_call], replay.graphed)
        for replay, rounds_of_call in zip(replays, zip(*times, strict=True), strict=True)
    ]


def summary(milliseconds: Iterable[float], graphed: bool = True) -> Times:
    """Return the percentiles of at least two rounds."""
    deciles = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return Times(deciles[1], deciles[4], deciles[7], graphed)


@dataclass(frozen=True)
class _Replay:
    """A number of calls in a row, ready to start."""

    run: Call
    calls: int
    graphed: bool

    def start(self) -> None:
        self.run()


def _captured(call: Call, count: int) -> _Replay:
    """Capture the calls in a CUDA graph; if that fails, replay them without one.

    Running out of memory is raised.
    """

    def repeat(count: int) -> None:
        for _ in range(count):
            call()

    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        repeat(_WARM_UPS)
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            repeat(count)
    except RuntimeError as error:
        torch.cuda.set_stream(current)  # a failed capture leaves its own stream current
        for cause in (error, error.__context__):  # ending the capture raises as well
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
        return _Replay(partial(repeat, count), count, graphed=False)
    return _Replay(graph.replay, count, graphed=True)


def _repeated(call: Call) -> _Replay:
    """Repeat a call until the resolution of events does not matter."""
    once = _captured(call, 1)
    *_, (ms,) = _rounds([once], _Replay.start, 3)
    count = max(1, min(_MAX_CALLS, math.ceil(_WARM_MS / ms)))
    return once if count == 1 else _captured(call, count)


def _flush(device: torch.device) -> Callable[[_Replay], object]:
    """Return a function that evicts operands from L2, as another layer's output would."""
    size = max(_FLUSH_BYTES, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
    buffer = torch.empty(size, dtype=torch.int8, device=device)
    return lambda _: buffer.zero_()


def _rounds(
    replays: Sequence[_Replay], prepare: Callable[[_Replay], object], rounds: int
) -> list[list[float]]:
    """Return the milliseconds of each replay in each round; in turns, so that all drift alike.

    ``prepare`` keeps the GPU busy until the host has queued the replay and its events.
    """

    def timed(replay: _Replay) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        prepare(replay)
        start.record()
        replay.start()
        end.record()
        return start, end

    events = [[timed(replay) for replay in replays] for _ in range(rounds)]
    torch.cuda.synchronize()
    return [[start.elapsed_time(end) for start, end in pairs] for pairs in events]


def host_us(call: Call) -> float:
    """Return the median microseconds until a call returns while the GPU is idle."""
    times = []
    for _ in range(_WARM_UPS + _HOST_CALLS):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(times[_WARM_UPS:])


def peak_bytes(call: Call, device: torch.device) -> int:
    """Return the peak memory that a call allocates on a GPU through PyTorch."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
