"""The stopwatch of the tuner and of the benchmarks: GPU time per call, without the host's."""

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
_WARM_MS = 0.5  # of calls in one graph: far above an event's resolution and a graph's launch
_MAX_CALLS = 200  # in one graph
_HOST_CALLS = 100


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: the median, and between which the middle 60 % of the rounds lie.

    ``graphed``: False where the call cannot be captured, so that the host's time may be in it.
    """

    p20: float
    p50: float
    p80: float
    graphed: bool = True


def protocol(cold: bool) -> str:
    """What ``measure`` does, in words, for the records."""
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
    """GPU time of each call, as ``protocol(cold)`` says.

    Args:
        calls: each launches the same work whenever it is called.
        device: the GPU that they launch on.
        cold: whether L2 holds nothing of a call's operands when it starts, or else what the same
            call has left there.
        min_rounds: how often each call is timed at the least.
        max_rounds: and at the most.
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
        _, sample = _rounds(replays, prepare, 2)  # the first pays for much that comes but once
        rounds = int(budget_ms * len(calls) / sum(sample))
        times = _rounds(replays, prepare, max(min_rounds, min(max_rounds, rounds)))
    return [
        summary([ms / replay.calls for ms in of_one], replay.graphed)
        for replay, of_one in zip(replays, zip(*times, strict=True), strict=True)
    ]


def summary(milliseconds: Iterable[float], graphed: bool = True) -> Times:
    """The percentiles of at least two rounds."""
    deciles = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return Times(deciles[1], deciles[4], deciles[7], graphed)


@dataclass(frozen=True)
class _Replay:
    """So many calls in a row, ready to start."""

    run: Call
    calls: int
    graphed: bool

    def start(self) -> None:
        self.run()


def _captured(call: Call, count: int) -> _Replay:
    """The calls as a CUDA graph; where that fails, but for want of memory, as they are."""

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
        torch.cuda.set_stream(current)  # torch.cuda.graph stays on its own when a capture fails
        for cause in (error, error.__context__):  # the end of the capture fails as well
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
        return _Replay(partial(repeat, count), count, graphed=False)
    return _Replay(graph.replay, count, graphed=True)


def _repeated(call: Call) -> _Replay:
    """As many calls as take long enough for the events' resolution not to matter."""
    once = _captured(call, 1)
    *_, (ms,) = _rounds([once], _Replay.start, 3)
    count = max(1, min(_MAX_CALLS, math.ceil(_WARM_MS / ms)))
    return once if count == 1 else _captured(call, count)


def _flush(device: torch.device) -> Callable[[_Replay], object]:
    """What empties L2 of operands: it holds written lines instead, as after another layer."""
    size = max(_FLUSH_BYTES, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
    buffer = torch.empty(size, dtype=torch.int8, device=device)
    return lambda _: buffer.zero_()


def _rounds(
    replays: Sequence[_Replay], prepare: Callable[[_Replay], object], rounds: int
) -> list[list[float]]:
    """Milliseconds of each replay in each round; taking turns, all drift alike.

    What comes before each replay keeps the GPU busy until the host has queued it and its events.
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
    return [[start.elapsed_time(end) for start, end in one] for one in events]


def host_us(call: Call) -> float:
    """Median microseconds until the call returns, when no work waits on the GPU."""
    times = []
    for _ in range(_WARM_UPS + _HOST_CALLS):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(times[_WARM_UPS:])


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most that a call allocates on a GPU through PyTorch, above what was there before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
