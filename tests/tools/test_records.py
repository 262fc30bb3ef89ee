"""Records of the benchmarks: saved, and compared between two files or revisions."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from perf import common, compare, records
from perf.__main__ import main
from perf.records import OURS, Record, save
from triton_gn.tools.workloads import Workload

SMALL = Workload("small", 2, 8, 2, (6, 5), "float32", activation="silu")


def record(**changes: Any) -> Record:
    values = {
        "measured": True, "command": "bench", "device": "Test GPU", "direction": "forward",
        "implementation": OURS, "ms_p20": 0.9, "ms_p50": 1.0, "ms_p80": 1.1, "date": "2026-01-02",
    }  # fmt: skip
    return Record(**common.fields_of_workload(SMALL) | values | changes)


@pytest.mark.parametrize("anew", [True, False])
@pytest.mark.parametrize("measured", [True, False])
def test_predictions_and_measurements_never_share_a_folder(
    tmp_path: Path, measured: bool, anew: bool
) -> None:
    folders = {True: tmp_path / "gpu", False: tmp_path / "predicted" / "gpu"}
    path = folders[measured] / "a.jsonl"
    save(path, [record(measured=measured)], anew)
    (kept,) = records.read(path)
    assert kept.measured is measured
    for mixed in [record(measured=not measured)], [kept, record(measured=not measured)]:
        with pytest.raises(ValueError, match=r"below a folder 'predicted'.*Remedy: another --out"):
            save(path, mixed, anew)
    assert list(records.read(path)) == [kept]


def test_saving_adds_or_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for groups in 1, 2:
        save(path, [record(groups=groups)])
    assert [saved.groups for saved in records.read(path)] == [1, 2]
    save(path, [record(groups=3)], anew=True)
    assert [saved.groups for saved in records.read(path)] == [3]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ((1.2, 1.3, 1.4), "slower"),
        ((1.05, 1.3, 1.4), ""),  # the ranges overlap
        ((0.6, 0.7, 0.8), "faster"),
        ((0.6, 0.7, 0.95), ""),
        ((None, 1.2, None), "slower"),  # a prediction
    ],
)
def test_only_what_exceeds_the_noise_has_a_verdict(
    new: tuple[float | None, float, float | None], verdict: str
) -> None:
    fields = dict(zip(("ms_p20", "ms_p50", "ms_p80"), new, strict=True))
    pair = compare.Pair(record(), record(**fields))
    assert pair.verdict == verdict
    assert pair.ratio == new[1]


def test_newest_times_of_the_same_call_are_compared() -> None:
    old = [record(date="2026-01-03", ms_p50=2.0), record(date="2026-01-01"), record(groups=4)]
    new = [record(ms_p50=3.0), record(groups=8), record(groups=4, ms_p50=None, skipped="wrong: y")]
    new += [record(command="sweep", ms_p50=9.0), record(measured=False, ms_p50=9.0)]
    (pair,) = compare.paired(old, new)
    assert (pair.old.ms_p50, pair.new.ms_p50) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("ms", "limit", "status"), [(1.3, "1.2", 1), (1.3, "1.4", 0), (0.5, "1.0", 0), (1.05, "1.0", 0)]
)
def test_regressions_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ms: float, limit: str, status: int
) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new"
    save(old, [record(), record(groups=4)])
    changed = record(ms_p20=0.9 * ms, ms_p50=ms, ms_p80=1.1 * ms)
    save(new / "day.jsonl", [changed, record(groups=4)])
    assert main(["compare", str(old), str(new), "--fail-over", limit]) == status
    printed = capsys.readouterr().out
    assert f"{ms:.3f}" in printed
    assert f"{math.sqrt(ms):.3f}" in printed  # the geometric mean of both


def test_compared_predictions_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "predicted" / "a.jsonl"
    save(file, [record(measured=False, ms_p20=None, ms_p80=None)])
    assert main(["compare", str(file), str(file)]) == 0
    assert capsys.readouterr().out.count(" predicted") == 2  # the call, the mean


def test_results_without_a_common_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for groups, path in enumerate(paths, 1):
        save(path, [record(groups=groups)])
    assert main(["compare", *map(str, paths)]) == 2
    assert "no call in common" in capsys.readouterr().err


def test_revisions_take_turns_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []
    times = iter([1.0, 5.0, 7.0, 3.0])

    def fake(command: Sequence[str], folder: Path) -> None:
        words = [word.replace(str(tmp_path), "") for word in command[1:]]
        commands.append(" ".join([folder.name, *words]))
        if "bench" in command:
            ms = next(times)
            timed = record(ms_p20=ms - 0.5, ms_p50=ms, ms_p80=ms + 0.5)
            save(Path(command[-1]) / "day.jsonl", [timed])

    monkeypatch.setattr(compare, "run_command", fake)
    old, new = compare.time_revisions(["v1", "v2"], ["--core"], tmp_path)
    others = [line.split() for line in commands if "bench" not in line]
    assert [words[:2] for words in others] == [["perf", "worktree"]] * 4
    assert [words[2] for words in others] == ["add", "add", "remove", "remove"]
    assert [line.split()[0] for line in commands if "bench --core --out" in line] == [
        "old", "new", "new", "old",
    ]  # fmt: skip
    assert [(r.ms_p20, r.ms_p50, r.ms_p80) for r in old] == [(0.5, 2.0, 3.5)]
    assert [(r.ms_p20, r.ms_p50, r.ms_p80) for r in new] == [(4.5, 6.0, 7.5)]


def test_command_of_a_revision_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exit status 3"):
        compare.run_command(["sh", "-c", "exit 3"], tmp_path)
    compare.run_command(["sh", "-c", "exit 1"], tmp_path)
