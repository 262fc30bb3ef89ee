"""The tuner around its measurements: flags, the table on disk, the stopwatch's arithmetic."""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_gn.plan import Device, Problem, candidates, estimate, heuristic_plan, table
from triton_gn.plan.table import Entry
from triton_gn.tools import provenance, stopwatch, tune
from triton_gn.tools.workloads import Workload

H100 = Device()
PROBLEM = Problem("forward", 2, 320, 32, 4096, "bfloat16", channels_last=False, activation="silu")
WORKLOAD = """\
model,layer,n,channels,groups,spatial,dtype,layout,activation,core
Net,first,2,320,32,64x64,bfloat16,contiguous,silu,yes
Net,second,2,320,32,,float16,channels_last,none,no
"""


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args(flags)


def entry_of(problem: Problem, us: float = 1.0) -> Entry:
    return Entry(problem, None, us, us, 0.1, us, us, {"driver": "1"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_what_can_be_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--shape", "2x8x6x5", "--groups", "2", "--out", str(tmp_path)
    assert tune.run(options(*flags)) == 2
    message = capsys.readouterr().err
    assert "torch.cuda.is_available() is False" in message
    assert "python -m perf sweep --target sm_90" in message
    assert "python -m triton_gn inspect" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "2x8x6x5"], "--shape needs --groups"),
        (["--shape", "two", "--groups", "2"], "such as 2x320x64x64; got 'two'"),
        (["--shape", "2x8x5", "--groups", "3"], "8 channels cannot be split into 3 groups"),
        (["--shape", "2x8x5", "--groups", "2", "--fused", "bias"], "fused operand .*got 'bias'"),
        (["--shape", "2x8x5", "--groups", "2", "--candidates", "1"], "at least 2; got 1"),
        (["--workloads", "missing.csv"], "No such file"),
        (["--model", "no_such_module:make"], "module:factory, .*got 'no_such_module:make'"),
        (["--model", "json:no_such_name"], "got 'json:no_such_name'"),
        (["--model", "a b"], "got 'a b'"),
    ],
)
def test_flags_that_name_nothing_are_refused(
    tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises((OSError, ValueError), match=message):
        tune.run(options(*flags, "--out", str(tmp_path)), torch.device("cpu"))


def test_folder_that_cannot_be_written_is_refused_before_anything_is_timed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    flags = "--shape", "2x8x6x5", "--groups", "2", "--out", str(tmp_path / "file")
    with pytest.raises(OSError, match="exists"):
        tune.run(options(*flags), torch.device("cpu"))


def test_file_of_workloads(tmp_path: Path) -> None:
    path = tmp_path / "workloads.csv"
    path.write_text(WORKLOAD)
    jobs = tune._jobs(options("--workloads", str(path)))
    names = [(workload.name, problem.direction) for problem, workload in jobs.items()]
    assert names == [(f"Net {n}", d) for n in ("first", "second") for d in ("forward", "backward")]
    assert next(iter(jobs)) == PROBLEM
    (job,) = tune._jobs(options("--workloads", str(path), "--core", "--direction", "backward"))
    assert job == replace(PROBLEM, direction="backward")


@pytest.mark.parametrize(
    "problem",
    [
        PROBLEM,
        replace(PROBLEM, channels_last=True, pre_add=True, residual=True),
        replace(PROBLEM, dtype="float64", activation="none", residual=True),
        replace(PROBLEM, pixels=1, channels_last=True, direction="backward"),
    ],
)
def test_command_of_a_warning_tunes_for_that_problem(problem: Problem) -> None:
    words = shlex.split(table.command(problem))
    assert words[:4] == ["python", "-m", "triton_gn", "tune"]
    assert problem in tune._jobs(options(*words[4:]))


def test_shape_with_everything() -> None:
    flags = (
        "--shape 2x8x6x5 --groups 2 --dtype float16 --param-dtype float32 --layout channels_last"
    )
    jobs = tune._jobs(
        options(*flags.split(), "--activation", "silu", "--fused", "scale,shift,pre_add")
    )
    (workload,) = set(jobs.values())
    assert workload == Workload(
        "2x8x6x5", 2, 8, 2, (6, 5), "float16", "float32", "channels_last", "silu",
        ("scale", "shift", "pre_add"),
    )  # fmt: skip
    assert [problem.direction for problem in jobs] == ["forward", "backward"]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pixels", [1, 30])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_workload_of_a_problem_poses_it(channels_last: bool, pixels: int, direction: str) -> None:
    problem = Problem(
        direction, 2, 8, 2, pixels, "float16", channels_last or pixels == 1, "relu",
        pre_add=True, residual=True, per_sample=pixels == 1,
    )  # fmt: skip
    assert tune._workload_of(problem).problem(direction) == problem


@pytest.mark.parametrize("most", [1, 2, 7, 1000])
def test_shortlist_has_the_default_first_and_all_strategies(most: int) -> None:
    shortlist = tune.shortlist(PROBLEM, H100, most)
    assert shortlist[0] == heuristic_plan(PROBLEM, H100)
    assert len(shortlist) == len(set(shortlist)) <= most
    if most > 3:
        assert {config.strategy for config in shortlist[:4]} == {"resident", "split", "pipelined"}
    best = min(estimate(PROBLEM, config, H100).us for config in candidates(PROBLEM, H100))
    assert all(estimate(PROBLEM, config, H100).us <= 3 * best for config in shortlist)
    assert len(tune.shortlist(PROBLEM, H100, 1000)) < len(candidates(PROBLEM, H100))


def test_shortlist_begins_with_the_default_also_where_the_model_prefers_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    *_, slow = candidates(PROBLEM, H100)
    monkeypatch.setattr(tune, "heuristic_plan", lambda *_: slow)
    assert tune.shortlist(PROBLEM, H100, 3) == [slow, *tune.shortlist(PROBLEM, H100, 1000)[1:3]]


def test_merge_replaces_older_entries_and_keeps_others(tmp_path: Path) -> None:
    path = table.path_of(tmp_path / "new", H100)
    other = replace(PROBLEM, n=3)
    assert tune.merge(path, H100, []) == []
    tune.merge(path, H100, [entry_of(PROBLEM), entry_of(other)])
    merged = tune.merge(path, H100, [entry_of(PROBLEM, 2.0)])
    assert merged == table.read(path, H100) == [entry_of(PROBLEM, 2.0), entry_of(other)]
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}.lock"}


def test_merge_makes_plans_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_GN_CACHE_DIR", str(tmp_path))
    path = table.path_of(tmp_path, H100)
    tune.merge(path, H100, [])
    assert table.lookup(PROBLEM, H100) is None
    tune.merge(path, H100, [entry_of(PROBLEM)])
    assert table.lookup(PROBLEM, H100) == table.Match(None, path, exact=True)


@pytest.mark.parametrize("make", [lambda p: p.write_text("no table"), Path.mkdir])
def test_merge_moves_aside_what_is_no_table(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    path = table.path_of(tmp_path, H100)
    make(path)
    assert tune.merge(path, H100, [entry_of(PROBLEM)]) == table.read(path, H100)
    assert path.with_name(f"{path.name}.refused").exists()


def test_table_never_grows_beyond_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table.path_of(tmp_path, H100)
    tune.merge(path, H100, [entry_of(replace(PROBLEM, n=n)) for n in (1, 2)])
    monkeypatch.setattr(table, "MAX_BYTES", path.stat().st_size)
    with pytest.raises(ValueError, match=f"bytes; got .* for 3 entries. Move {path} away"):
        tune.merge(path, H100, [entry_of(PROBLEM), entry_of(replace(PROBLEM, n=3))])
    assert len(table.read(path, H100)) == 2


def test_write_that_breaks_off_leaves_the_old_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table.path_of(tmp_path, H100)
    tune.merge(path, H100, [entry_of(PROBLEM)])

    def break_off(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", break_off)
    with pytest.raises(OSError, match="No space"):
        tune.merge(path, H100, [entry_of(replace(PROBLEM, n=3))])
    assert table.read(path, H100) == [entry_of(PROBLEM)]


def test_two_processes_lose_nothing_and_readers_see_whole_files(tmp_path: Path) -> None:
    path, each = table.path_of(tmp_path, H100), 40
    tune.merge(path, H100, [])
    code = textwrap.dedent(
        f"""
        import sys
        from dataclasses import replace
        from pathlib import Path
        from tests.tools.test_tune import H100, PROBLEM, entry_of
        from triton_gn.tools import tune
        print("ready", flush=True)
        sys.stdin.read()
        for i in range({each}):
            problem = replace(PROBLEM, n=1 + i, pixels=int(sys.argv[2]))
            tune.merge(Path(sys.argv[1]), H100, [entry_of(problem)])
        """
    )
    root = Path(__file__).parents[2]
    with contextlib.ExitStack() as processes:
        writers = [
            processes.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", code, str(path), pixels],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    cwd=root,
                )
            )
            for pixels in ("1", "2")
        ]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.close()  # both start
        while any(writer.poll() is None for writer in writers):
            table.read(path, H100)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(table.read(path, H100)) == 2 * each


def test_provenance_says_where_times_come_from() -> None:
    origin = provenance.provenance()
    assert origin["torch"] == torch.__version__
    assert origin["protocol"] == stopwatch.protocol(cold=True)
    assert origin.keys() >= {"driver", "triton", "triton_gn", "commit", "date"}
    assert provenance.output_of("no-such-command") == ""
    assert provenance.output_of(sys.executable, "-c", "raise SystemExit(1)") == ""


def test_only_a_gpu_is_timed() -> None:
    with pytest.raises(RuntimeError, match="device must be a GPU; got cpu"):
        stopwatch.measure([lambda: None], torch.device("cpu"), cold=True)


def test_summary_is_in_percentiles() -> None:
    times = stopwatch.summary([float(ms) for ms in (*range(100, 0, -1), 0)])
    assert times == stopwatch.Times(p20=20.0, p50=50.0, p80=80.0)


class FakeGPU:
    """A clock in milliseconds, moved by the calls that run; graphs that replay captured ones."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.graph: list[Callable[[], None]] | None = None  # that is being captured
        self.current = "main"

    def taking(self, name: str, ms: float, can_be_captured: bool = True) -> Callable[[], None]:
        def run() -> None:
            self.now += ms
            self.log.append(name)

        def call() -> None:
            if self.graph is None:
                run()
            elif can_be_captured:
                self.graph.append(run)
            else:
                raise RuntimeError("operation not permitted when stream is capturing")

        return call

    @contextlib.contextmanager
    def capture(self, graph: "FakeGraph", stream: object) -> Iterator[None]:
        self.graph, self.current = graph.calls, "capturing"
        try:
            yield
            self.current = "main"  # torch.cuda.graph does not come so far when a capture fails
        finally:
            self.graph = None


class FakeGraph:
    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    fake = FakeGPU()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = fake.now

        def elapsed_time(self, end: Any) -> float:
            return float(end.at - self.at)

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    def set_stream(stream: object) -> None:
        fake.current = "main"

    for name, value in {
        "CUDAGraph": FakeGraph,
        "Event": Event,
        "Stream": Stream,
        "current_stream": Stream,
        "device": contextlib.nullcontext,
        "graph": fake.capture,
        "set_stream": set_stream,
        "stream": contextlib.nullcontext,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    flush = fake.taking("flush", 10.0)
    monkeypatch.setattr(stopwatch, "_flush", lambda device: lambda _: flush())
    return fake


CUDA = torch.device("cuda", 0)


def test_cold_calls_take_turns_and_the_flush_before_each_is_not_timed(gpu: FakeGPU) -> None:
    calls = [gpu.taking("a", 1.0), gpu.taking("b", 2.0)]
    times = stopwatch.measure(calls, CUDA, cold=True, min_rounds=5, max_rounds=5)
    assert times == [stopwatch.Times(1.0, 1.0, 1.0), stopwatch.Times(2.0, 2.0, 2.0)]
    assert gpu.log[-20:] == ["flush", "a", "flush", "b"] * 5


@pytest.mark.parametrize(("budget_ms", "rounds"), [(1.0, 5), (20.0, 10), (1e6, 30)])
def test_rounds_are_as_many_as_the_budget_allows(
    gpu: FakeGPU, budget_ms: float, rounds: int
) -> None:
    calls = [gpu.taking("a", 1.0), gpu.taking("b", 3.0)]
    stopwatch.measure(calls, CUDA, cold=True, min_rounds=5, max_rounds=30, budget_ms=budget_ms)
    warm_ups, sample = 3, 2
    assert gpu.log.count("a") == warm_ups + sample + rounds


def test_short_warm_calls_are_timed_together(gpu: FakeGPU) -> None:
    calls = [gpu.taking("short", 0.01), gpu.taking("long", 1.0)]
    short, long = stopwatch.measure(calls, CUDA, cold=False, min_rounds=2, max_rounds=2)
    assert (short.p50, long.p50) == pytest.approx((0.01, 1.0))
    # a round: each replay follows one that is not timed
    assert gpu.log[-102:] == ["short"] * 100 + ["long"] * 2


@pytest.mark.parametrize("cold", [True, False])
def test_call_that_cannot_be_captured_is_timed_as_it_is(gpu: FakeGPU, cold: bool) -> None:
    calls = [gpu.taking("a", 1.0), gpu.taking("b", 2.0, can_be_captured=False)]
    graphed, plain = stopwatch.measure(calls, CUDA, cold=cold)
    assert (graphed.p50, graphed.graphed) == (1.0, True)
    assert (plain.p50, plain.graphed) == (2.0, False)
    assert gpu.current == "main"


@pytest.mark.parametrize("end_fails", [False, True])
def test_capture_without_memory_is_reported_as_that(gpu: FakeGPU, end_fails: bool) -> None:
    def call() -> None:
        if gpu.graph is not None:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                if end_fails:
                    raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        stopwatch.measure([call], CUDA, cold=True)
    assert gpu.current == "main"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copy_takes_as_long_as_its_bytes() -> None:
    device = torch.device("cuda", 0)
    x = torch.empty(2**28, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    small = [lambda: y[:4096].copy_(x[:4096])]
    for cold in (True, False):
        (times,) = stopwatch.measure([lambda: y.copy_(x)], device, cold=cold)
        assert times.graphed
        assert 2 * x.nbytes / 20e9 < times.p20 <= times.p50 <= times.p80 < 2 * x.nbytes / 50e6
        (short,) = stopwatch.measure(small, device, cold=cold)
        assert short.p50 < times.p50 / 4
    assert stopwatch.peak_bytes(lambda: torch.empty(2**20, device=device), device) >= 2**22


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tunes_on_a_gpu(tmp_path: Path) -> None:
    flags = "--shape", "2x320x32x32", "--groups", "32", "--candidates", "4", "--out", str(tmp_path)
    assert tune.run(options(*flags)) == 0
    (path,) = tmp_path.glob("*.json")
    assert len(json.loads(path.read_text())["entries"]) == 2


def test_host_time_of_a_call() -> None:
    calls: list[None] = []
    assert 0 < stopwatch.host_us(lambda: calls.append(None)) < 1e5
    assert len(calls) > 100


def test_first_calls_load_no_tuner() -> None:
    code = (
        "import sys, torch, triton_gn\n"
        "x = torch.randn(2, 8, 30, requires_grad=True)\n"
        "with triton_gn.backend('triton'):\n"
        "    triton_gn.group_norm(x, 2).sum().backward()\n"
        "names = ('tune', 'stopwatch', 'verify')\n"
        "tuner = {'rich', 'filelock', *(f'triton_gn.tools.{name}' for name in names)}\n"
        "assert not tuner & sys.modules.keys(), tuner & sys.modules.keys()\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
