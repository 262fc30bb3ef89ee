"""The benchmarks with kernels that run, and times that are made up."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perf import bench, ceilings, common, implementations, records, sweep
from perf.implementations import IMPLEMENTATIONS, PARTS, Implementation, checked
from perf.records import OURS, Record
from triton_gn.ops.device import gpu_of
from triton_gn.plan import Config, fields_of, heuristic_plan
from triton_gn.tools import stopwatch
from triton_gn.tools.stopwatch import Times
from triton_gn.tools.verify import Verifier
from triton_gn.tools.workloads import FUSED, Workload

WORKLOADS = """\
model,layer,n,channels,groups,spatial,dtype,layout,activation,core
Net,first,2,8,2,6x5,float32,contiguous,silu,yes
Net,second,2,6,3,7,float32,channels_last,none,
"""
MINE = [entry for entry in IMPLEMENTATIONS if entry.name.startswith(OURS)]
RUNNABLE = [*(entry.name for entry in MINE), "torch_eager"]
ONE_CASE = "--directions", "forward", "--cache", "cold"


class Stopwatch:
    """In the place of ``timing``: makes times up, 1 ms for the first call, 2 ms for the second."""

    def __init__(self) -> None:
        self.timed: list[list[Any]] = []
        self.before: Callable[[], None] = lambda: None

    def measure(self, calls: Sequence[Any], device: torch.device, *, cold: bool) -> list[Times]:
        self.before()
        self.timed.append(list(calls))
        times = range(1, len(calls) + 1)
        return [Times(0.9 * ms, ms, 1.1 * ms, graphed=ms > 1) for ms in times]


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    fake = Stopwatch()
    monkeypatch.setattr(stopwatch, "measure", fake.measure)
    monkeypatch.setattr(stopwatch, "peak_bytes", lambda call, device: 1024)
    monkeypatch.setattr(stopwatch, "host_us", lambda call: 12.5)
    return fake


Run = Callable[..., tuple[int, list[Record]]]


@pytest.fixture
def run(device: str, tmp_path: Path) -> Run:
    """Runs a bench; returns its status and all records of the day."""
    file, out = tmp_path / "workloads.csv", tmp_path / "out"
    file.write_text(WORKLOADS)

    def run(*flags: str) -> tuple[int, list[Record]]:
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        options = parser.parse_args(["--workloads", str(file), "--out", str(out), *flags])
        status = bench.run(options, torch.device(device))
        return status, list(records.read(out)) if out.exists() else []

    return run


@pytest.mark.parametrize(("part", "count"), [("forward", 1000), ("backward", 100_000)])
def test_speed_of_light_moves_as_many_bytes(device: str, part: str, count: int) -> None:
    call = implementations.speed_of_light(part, count, torch.device(device))
    *sources, target = tensors = call.args[:-1]
    call()
    assert torch.equal(target, sum(sources))
    assert len(sources) == {"forward": 1, "backward": 2}[part]
    assert count <= sum(t.nbytes for t in tensors) < count + 64 * len(tensors)


@pytest.mark.parametrize("direction", PARTS)
@pytest.mark.parametrize("implementation", MINE, ids=lambda entry: entry.name)
def test_ours_is_right(device: str, implementation: Implementation, direction: str) -> None:
    assert implementation.absent(torch.device(device)) is None
    workload = Workload("", 2, 8, 2, (6, 5), "float32", "float16", "channels_last", "silu", FUSED)
    verifier = Verifier(workload, torch.device(device))
    call, fields = checked(implementation, verifier, direction)
    assert call is not None, fields
    name = implementation.name.removeprefix(OURS).strip("[]")
    strategy = name or "resident"
    assert fields["strategy"] == strategy
    assert (fields["config"] or {"strategy": strategy})["strategy"] == strategy
    assert (fields["config"] is None) == (direction == "both")
    for again, first in zip(call(), call(), strict=True):
        assert torch.equal(again, first)


def test_records_are_complete(
    timer: Stopwatch, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    status, entries = run("--all")
    assert status == 0
    assert len(entries) == 2 * 2 * (3 * len(RUNNABLE) + 1 + 1 + 2)  # workloads, caches, directions
    for entry in entries:
        assert (entry.measured, entry.command, entry.skipped) == (True, "bench", None)
        assert entry.ms_p20 < entry.ms_p50 < entry.ms_p80
        assert stopwatch.protocol(entry.cache == "cold") in entry.protocol
        assert ("without a graph" in entry.protocol) == (entry.implementation == OURS)  # as made up
        assert entry.versions.keys() >= {"python", "torch", "triton", "triton_gn"}
        assert entry.date.endswith("+00:00")
        is_reference = entry.implementation in ("copy", "add")
        place = RUNNABLE.index(entry.implementation) + 1 if not is_reference else None
        first = len(RUNNABLE) + 1
        light = {"forward": first, "backward": first, "both": first + first + 1}[entry.direction]
        if is_reference:
            assert entry.share_of_copy is entry.error is entry.peak_bytes is None
            continue
        assert (entry.ms_p50, entry.share_of_copy) == (place, light / place)
        assert entry.peak_bytes == 1024
        assert entry.host_us == (None if "[" in entry.implementation else 12.5)
        assert 0 < entry.error < 1e-5
        assert (entry.strategy is None) == (entry.implementation == "torch_eager")
    cases = {(entry.workload, entry.direction, entry.cache) for entry in entries}
    assert len(cases) == 2 * 3 * 2
    copy, add = (
        next(entry for entry in entries if entry.implementation == name) for name in ("copy", "add")
    )
    x, params = 2 * 8 * 30 * 4, 2 * 8 * 4
    assert (copy.bytes_minimum, add.bytes_minimum) == (2 * x + params, 3 * x + 2 * params)
    captured = capsys.readouterr()
    assert "without liger: " in captured.err
    assert f"{len(entries)} records in " in captured.out


def test_wrong_answers_are_never_timed(
    timer: Stopwatch, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, *others = IMPLEMENTATIONS
    compute = ours.compute

    def spoilt(workload: Workload) -> implementations.Compute:
        right = compute(workload)
        return lambda operands: right(operands) * (1 + 1e-3)

    wrong = implementations.Implementation(OURS, spoilt, ours.absent, roundings=1)
    monkeypatch.setattr(bench, "IMPLEMENTATIONS", (wrong, *others))
    status, entries = run(*ONE_CASE)
    assert status == 1
    by_name = {entry.implementation: entry for entry in entries}
    assert by_name[OURS].skipped.startswith("wrong: y is off by 1.0e-03")
    assert by_name[OURS].ms_p50 is by_name[OURS].share_of_copy is by_name[OURS].error is None
    assert (
        by_name["torch_eager"].ms_p50 == len(implementations.FIXED) + 1
    )  # the first call is left out
    ((*calls, _),) = timer.timed
    assert len(calls) == len(RUNNABLE) - 1


def test_resume_times_what_is_missing(
    timer: Stopwatch, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = run(*ONE_CASE)
    assert run(*ONE_CASE) == (0, first)
    assert "has all of it already; --no-resume" in capsys.readouterr().out
    assert len(timer.timed) == 1
    _, more = run(*ONE_CASE, "--all")
    assert more[: len(first)] == first
    assert {entry.workload for entry in more[len(first) :]} == {"Net second"}
    _, again = run(*ONE_CASE, "--no-resume")
    assert len(again) == len(more) + len(first)


def test_other_commit_is_timed_again(
    timer: Stopwatch, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*ONE_CASE)
    monkeypatch.setattr(common, "commit", lambda _: "another")
    run(*ONE_CASE)
    assert len(timer.timed) == 2


def test_interrupt_keeps_what_is_done(
    timer: Stopwatch, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        if timer.timed:
            raise KeyboardInterrupt

    timer.before = interrupt
    status, entries = run(*ONE_CASE, "--all")
    assert status == 130
    assert {entry.workload for entry in entries} == {"Net first"}
    assert "rerun the same command to resume" in capsys.readouterr().err
    timer.before = lambda: None
    status, entries = run(*ONE_CASE, "--all")
    assert (status, len(timer.timed)) == (0, 2)
    assert {entry.workload for entry in entries} == {"Net first", "Net second"}


def test_what_does_not_fit_is_recorded(timer: Stopwatch, run: Run) -> None:
    def overflow() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    timer.before = overflow
    status, entries = run(*ONE_CASE)
    assert status == 1
    assert [entry.implementation for entry in entries] == RUNNABLE
    assert all("no room" in entry.skipped for entry in entries)


def test_predictions_are_refused_in_a_folder_of_measurements(timer: Stopwatch, run: Run) -> None:
    _, entries = run(*ONE_CASE)
    with pytest.raises(ValueError, match="below a folder 'predicted'"):
        run("--predict", "sm_90")
    assert run(*ONE_CASE) == (0, entries)


def swept(device: str, out: Path, *flags: str) -> tuple[int, list[Record]]:
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    shape = ["--shape", "2x8x6x5", "--groups", "2", "--dtype", "float32", "--direction", "forward"]
    options = parser.parse_args([*shape, "--candidates", "4", "--out", str(out), *flags])
    return sweep.run(options, torch.device(device)), list(records.read(out))


@pytest.fixture
def default(device: str) -> Config:
    problem = Workload("", 2, 8, 2, (6, 5), "float32").problem("forward")
    return heuristic_plan(problem, gpu_of(torch.device(device)))


def test_sweep_times_plans(
    timer: Stopwatch,
    device: str,
    tmp_path: Path,
    default: Config,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):  # the second replaces the first
        status, entries = swept(device, tmp_path)
        assert status == 0
    assert len(entries) == 4
    assert [entry.config for entry in entries if "default" in entry.config] == [
        fields_of(default) | {"default": True}
    ]
    strategies = ("resident", "pipelined", "split")
    assert {entry.implementation for entry in entries} == {f"{OURS}[{name}]" for name in strategies}
    for ms, entry in enumerate(entries, 1):
        assert (entry.measured, entry.command, entry.cache) == (True, "sweep", "cold")
        assert (entry.ms_p50, entry.spill_bytes, entry.bound) == (ms, 0, None)
        assert 0 < entry.error < 1e-5
        assert entry.strategy == entry.config["strategy"]
    assert "predicted" not in capsys.readouterr().out


def test_sweep_goes_on_after_what_does_not_fit(
    timer: Stopwatch, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def overflow() -> None:
        timer.before = lambda: None
        raise torch.OutOfMemoryError("CUDA out of memory")

    timer.before = overflow
    status, entries = swept(device, tmp_path, "--direction", "both")
    assert status == 1
    assert {entry.direction for entry in entries} == {"backward"}
    assert "forward: the GPU has no room" in capsys.readouterr().out


def test_sweep_never_times_a_wrong_plan(
    timer: Stopwatch,
    device: str,
    tmp_path: Path,
    default: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_plan = Verifier.run

    def spoilt(self: Verifier, direction: str, config: Config | None = None) -> None:
        run_plan(self, direction, config)
        if config == default:
            self.outputs(direction)["y"].mul_(1.001)

    monkeypatch.setattr(Verifier, "run", spoilt)
    status, entries = swept(device, tmp_path)
    assert status == 1
    (wrong,) = (entry for entry in entries if entry.skipped)
    assert wrong.config == fields_of(default) | {"default": True}
    assert wrong.skipped.startswith("wrong: y is off by")
    assert wrong.ms_p50 is wrong.error is None
    ((*calls,),) = timer.timed
    assert len(calls) == 3
    assert default not in [call.args[1] for call in calls]
    assert "1 of 4 plans wrong: y is off by" in capsys.readouterr().out


def test_ceilings(
    timer: Stopwatch, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made up: a copy of 1 MiB takes 1 ms, of 1.5 MiB 2 ms, of 2 MiB 3 ms."""
    parser = argparse.ArgumentParser()
    ceilings.add_arguments(parser)
    options = parser.parse_args(["--out", str(tmp_path), "--largest", str(2**22)])
    assert ceilings.run(options, torch.device(device)) == 0
    entries = list(records.read(tmp_path))
    sizes = [2**20, 3 * 2**19, 2**21, 3 * 2**20, 2**22]
    kinds = [("copy", "cold"), ("copy", "warm"), ("add", "cold"), ("add", "warm")]
    assert [(entry.implementation, entry.cache, entry.bytes_minimum) for entry in entries] == [
        (*kind, size) for kind in kinds for size in sizes
    ]
    assert [entry.ms_p50 for entry in entries] == [1, 2, 3, 4, 5] * 4
    moved = [sum(t.nbytes for t in call.args[:-1]) for call in timer.timed[0]]
    assert moved == sizes
    assert "Effective L2: " in capsys.readouterr().out
    warm = [replace(entry, ms_p50=entry.ms_p50 / 10) for entry in entries if entry.cache == "warm"]
    assert ceilings.effective_l2([*entries, *warm]) == 2**22
    cold = [replace(entry, cache="cold") for entry in entries]
    assert ceilings.effective_l2(cold) == 0
