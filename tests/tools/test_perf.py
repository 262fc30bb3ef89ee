"""The benchmarks without a GPU: workloads, implementations, predictions, comparisons, costs."""

import argparse
import csv
import itertools
import json
import math
import pickle
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perf import (
    calls,
    common,
    compare,
    cpu,
    demo,
    host,
    implementations,
    kernels,
    plot,
    records,
    sweep,
)
from perf.__main__ import main
from perf.implementations import IMPLEMENTATIONS, PARTS, Implementation, checked
from perf.records import OURS, Record, case, save
from triton_gn.plan import TARGETS, candidates, fields_of, heuristic_plan
from triton_gn.tools import inspection, workloads
from triton_gn.tools.verify import Verifier, fault_of
from triton_gn.tools.workloads import DTYPES, FUSED, LAYOUTS, Workload

CPU = torch.device("cpu")
H100 = TARGETS["sm_90"]
SMALL = Workload("small", 2, 8, 2, (6, 5), "float32", activation="silu")
SHAPE = ["sweep", "--shape", "2x8x6x5", "--groups", "2", "--direction", "forward"]
CORE = [one for one in workloads.read(common.WORKLOADS) if one.core]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def strategy(workload: Workload, direction: str) -> str:
    return heuristic_plan(workload.problem(direction), H100).strategy


def megabytes(workload: Workload) -> float:
    return math.prod(workload.shape) * DTYPES[workload.dtype].itemsize / 1e6


def test_file_of_workloads() -> None:
    with common.WORKLOADS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(list(workloads.read(common.WORKLOADS))) == 341
    assert {row["core"] for row in rows} == {"", "yes"}
    assert all(None not in row and row["source"] for row in rows)
    assert 20 <= len(CORE) <= 28


REGIMES: dict[str, Callable[[Workload], bool]] = {
    "launch-bound": lambda w: megabytes(w) < 0.5,
    "8x8": lambda w: w.spatial == (8, 8),
    "fits L2": lambda w: 5 < megabytes(w) < 40,
    "video of more than 1 GB": lambda w: megabytes(w) > 1000 and len(w.spatial) == 3,
    "few groups": lambda w: w.n * w.groups <= 8,
    "a million groups": lambda w: w.n * w.groups >= 2**20,
    "channels per group no power of two": lambda w: (w.channels // w.groups).bit_count() > 1,
    "one channel per group": lambda w: w.channels == w.groups,
    "one group": lambda w: w.groups == 1,
    "1-D": lambda w: len(w.spatial) == 1 and w.spatial[0] > 1,
    "1-D channels-last": lambda w: len(w.spatial) == 1 and w.layout == "channels_last",
    "2-D": lambda w: len(w.spatial) == 2,
    "3-D": lambda w: len(w.spatial) == 3,
    "3-D channels-last": lambda w: len(w.spatial) == 3 and w.layout == "channels_last",
    "one pixel": lambda w: w.spatial == (1,),
    "7x7 contiguous": lambda w: w.spatial == (7, 7) and w.layout == "contiguous",
    "7x7 channels-last": lambda w: w.spatial == (7, 7) and w.layout == "channels_last",
    "odd number of pixels": lambda w: math.prod(w.spatial) % 2 == 1 and w.spatial != (1,),
    "parameters of another dtype": lambda w: w.param_dtype != w.dtype,
    "scale and shift": lambda w: w.fused == ("scale", "shift"),
    "residual": lambda w: w.fused == ("residual",),
    "pre_add": lambda w: w.fused == ("pre_add",),
    "detection": lambda w: "fpn" in w.name,
    "medical": lambda w: "MONAI" in w.name,
    "audio": lambda w: "Demucs" in w.name,
    "diffusion": lambda w: "UNet" in w.name,
    "VAE at 1024x1024 contiguous": lambda w: "VAE" in w.name and w.spatial == (1024, 1024)
    and w.layout == "contiguous",
    "VAE at 1024x1024 channels-last": lambda w: "VAE" in w.name and w.spatial == (1024, 1024)
    and w.layout == "channels_last",
    **{f"published {s}": partial(lambda s, w: w.shape_text == s, s)
       for s in ("1x512x16x180x320", "1x512x16x90x160", "1x512x8x45x80")},
    **{dtype: partial(lambda d, w: w.dtype == d, dtype)
       for dtype in ("float16", "bfloat16", "float32")},
    **{f"activation {name}": partial(lambda n, w: w.activation == n, name)
       for name in ("silu", "relu", "gelu", "none")},
    **{f"{layout} {s} {d}": partial(
        lambda layout, s, d, w: w.layout == layout and strategy(w, d) == s, layout, s, d)
       for layout, s, d in itertools.product(
           LAYOUTS, ("resident", "split"), ("forward", "backward"))},
}  # fmt: skip


@pytest.mark.parametrize("regime", REGIMES)
def test_core_covers_every_regime(regime: str) -> None:
    assert any(REGIMES[regime](one) for one in CORE)


def implementation(name: str) -> Implementation:
    (found,) = (one for one in IMPLEMENTATIONS if one.name == name)
    return found


def test_implementations_say_why_they_are_absent() -> None:
    assert [one.name for one in IMPLEMENTATIONS] == [
        OURS, f"{OURS}[resident]", f"{OURS}[split]", f"{OURS}[pipelined]", "torch_eager",
        "torch_compile", "liger", "flag_gems",
    ]  # fmt: skip
    reasons = {one.name: one.absent(CPU) for one in IMPLEMENTATIONS}
    assert reasons.pop("torch_eager") is None
    assert re.search(
        "on the CPU, where kernels run only under TRITON_INTERPRET", str(reasons[OURS])
    )
    assert re.search("needs a GPU", str(reasons["torch_compile"]))
    assert re.search(r"pip install flag-gems|needs a GPU", str(reasons["flag_gems"]))
    assert re.search(r"pip install liger-kernel|needs a GPU", str(reasons["liger"]))


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages in the place of the peers', with their signatures and PyTorch's operators."""

    class LigerGroupNormFunction:
        @staticmethod
        def apply(
            x: Tensor, weight: Tensor, bias: Tensor, channels: int, groups: int, eps: float
        ) -> Tensor:
            assert x.shape[1] == channels
            assert x.ndim == 3
            return F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)

    def group_norm(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Any:
        return torch.native_group_norm(x.contiguous(), weight, bias, *rest)

    def group_norm_backward(dy: Tensor, x: Tensor, *rest: Any) -> Any:
        function = torch.ops.aten.native_group_norm_backward
        return function(dy.contiguous(), x.contiguous(), *rest)

    modules: dict[str, dict[str, Any]] = {
        "liger_kernel.ops.group_norm": {"LigerGroupNormFunction": LigerGroupNormFunction},
        "flag_gems": {"group_norm": group_norm, "group_norm_backward": group_norm_backward},
    }
    monkeypatch.setattr(
        implementations, "import_module", lambda name: SimpleNamespace(**modules[name])
    )


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("direction", PARTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["torch_eager", "liger", "flag_gems"])
def test_peers_compute_the_same(name: str, layout: str, direction: str) -> None:
    for dtype, param_dtype, activation in (
        ("float32", "float32", "silu"),
        ("float16", "float32", "none"),
    ):
        if name == "flag_gems":
            param_dtype = dtype  # PyTorch's operators in its place take no other
        workload = Workload("", 2, 8, 2, (6, 5), dtype, param_dtype, layout, activation, FUSED)
        verifier = Verifier(workload, CPU)
        answers = implementations.answers_of(verifier, direction)
        call, fields = checked(implementation(name), verifier, direction)
        assert call is not None, fields
        assert 0 < fields["error"] < (1e-6 if dtype == "float32" else 4e-3)
        assert set(answers) <= set(call.names)
        for again, first in zip(call(), call(), strict=True):
            assert torch.equal(again, first)


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (lambda x: 1.001 * x, "wrong: y is off by .* rounding explains"),
        (lambda x: torch.full_like(x, math.nan), "wrong: y is off by inf"),
        (lambda x: x[:, 1:], "failed: RuntimeError: "),
    ],
)
def test_wrong_answers_are_found(compute: Callable[[Tensor], Tensor], reason: str) -> None:
    verifier = Verifier(SMALL, CPU)
    eager = implementation("torch_eager").compute(SMALL)
    spoilt = replace(
        implementation("torch_eager"), compute=lambda _: lambda operands: compute(eager(operands))
    )
    call, fields = checked(spoilt, verifier, "forward")
    assert call is None
    assert re.match(reason, fields["skipped"])


def test_peers_may_round_more_often_than_ours() -> None:
    x = torch.ones(1, dtype=torch.bfloat16)
    errors, results = {"y": 0.02}, {"y": x}
    assert fault_of(errors, results, x)
    assert fault_of(errors, results, x, implementation("torch_eager").roundings) is None
    assert all(one.roundings == 1 for one in IMPLEMENTATIONS if one.name.startswith(OURS))
    assert fault_of({"y": math.nan}, results, x)


def test_bytes_that_must_be_touched() -> None:
    x, params = 2 * 8 * 30 * 4, 2 * 8 * 4
    assert implementations.bytes_minimum(SMALL, "forward") == 2 * x + params
    assert implementations.bytes_minimum(SMALL, "backward") == 3 * x + 2 * params
    assert implementations.bytes_minimum(SMALL, "both") == 5 * x + 3 * params
    everything = replace(SMALL, fused=FUSED)
    params += 3 * 2 * 8 * 4
    assert implementations.bytes_minimum(everything, "forward") == 3 * x + params
    assert implementations.bytes_minimum(everything, "backward") == 5 * x + 2 * params
    linear = replace(everything, activation="none")
    assert implementations.bytes_minimum(linear, "backward") == 3 * x + 2 * params


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
    for found in [record(measured=not measured)], [kept, record(measured=not measured)]:
        with pytest.raises(ValueError, match=r"below a folder 'predicted'.*Remedy: another --out"):
            save(path, found, anew)
    assert list(records.read(path)) == [kept]


def test_saving_adds_or_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for groups in 1, 2:
        save(path, [record(groups=groups)])
    assert [one.groups for one in records.read(path)] == [1, 2]
    save(path, [record(groups=3)], anew=True)
    assert [one.groups for one in records.read(path)] == [3]
    assert list(tmp_path.iterdir()) == [path]


@no_gpu
@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["bench"], "python -m perf bench --predict sm_90"),
        (["sweep", "--shape", "2x8x6", "--groups", "2"], "python -m perf sweep --target sm_90"),
        (["compare", "--revisions", "HEAD", "HEAD"], "python -m perf compare OLD NEW"),
        (["ceilings"], "python -m perf bench --predict sm_90"),
        (["gpu"], "python -m perf gpu --list"),
    ],
)
def test_without_a_gpu_it_says_what_can_be_done(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    remedy: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "torch.cuda.is_available() is False" in said
    assert f"`{remedy}`" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "bench --match nosuch",
            "has no core row with 'nosuch'. Remedy: another --match",
        ),
        ("bench --directions sideways --predict sm_90", "got sideways"),
        ("bench --workloads nosuch.csv", "No such file"),
        ("sweep --shape 2x8x6 --groups 2 --candidates 0", "at least 1; got 0"),
        ("sweep --shape 2x8x6 --groups 2 --target sm_1", "got sm_1"),
        ("sweep --shape 2x8x6 --groups 2 --match nosuch", "has 'nosuch'"),
        ("compare", "OLD and NEW, or --revisions OLD NEW"),
        ("compare nosuch nosuch", "there is no nosuch"),
    ],
)
def test_errors_name_the_remedy(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "sweep", "compare", "plot", "demo", "host", "cpu"])
def test_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"python -m perf {command}" in capsys.readouterr().out


def test_ctrl_c_ends_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(host, "run", interrupt)
    assert main(["host"]) == 130


def test_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "--predict", "sm_90"]
    assert main(arguments) == 0
    path = records.PREDICTED / "nvidia-h100-80gb-hbm3" / "bench.jsonl"
    found = list(records.read(path))
    assert f"{len(found)} records in {path}" in capsys.readouterr().out
    cases: dict[Any, dict[str, Record]] = {}
    for one in found:
        assert (one.measured, one.command, one.cache) == (False, "bench", "cold")
        assert one.device == H100.name
        assert "predicted" in one.protocol
        assert one.ms_p20 is one.ms_p80 is one.error is one.peak_bytes is one.host_us is None
        assert one.versions["torch"] == torch.__version__
        cases.setdefault(case(one), {})[one.implementation] = one
    assert len(cases) == len(CORE) * len(PARTS)
    for row in cases.values():
        ours = row[OURS]
        references = [row[name] for name in ("copy", "add") if name in row]
        assert [one.implementation for one in references] == {
            "forward": ["copy"], "backward": ["add"], "both": ["copy", "add"],
        }[ours.direction]  # fmt: skip
        assert sum(one.bytes_minimum for one in references) == ours.bytes_minimum
        assert f"{OURS}[pipelined]" in row
        strategies = [one for name, one in row.items() if name.startswith(f"{OURS}[")]
        for one in (ours, *strategies):
            assert one.ms_p50 is not None
            share = sum(copy.ms_p50 or 0 for copy in references) / one.ms_p50
            assert one.share_of_copy == pytest.approx(share)
            assert 0 < share <= 1.01
            assert one.bound in ("dram", "l2", "occupancy", "launch")
            assert (one.config is None) == (one.direction == "both")
        assert ours.strategy is not None
        if "+" not in ours.strategy:
            assert ours.ms_p50 == row[f"{OURS}[{ours.strategy}]"].ms_p50
    tiny = [one for one in found if one.shape == "32x2048x1" and one.implementation == "copy"]
    assert {one.bound for one in tiny} == {"launch"}
    assert main([*arguments, "--match", "32x2048x1"]) == 0
    assert {one.shape for one in records.read(path)} == {"32x2048x1"}


class Inline(Executor):
    """Runs tasks at once, in this process."""

    def __init__(self, *_: Any) -> None:
        pass

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], **_: Any) -> Iterator[Any]:
        return map(fn, *iterables)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "ProcessPoolExecutor", Inline)


@pytest.mark.usefixtures("inline")
def test_sweep_compiles_for_a_gpu_that_is_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predicted"
    flags = [*SHAPE, "--activation", "silu", "--target", "sm_90", "--candidates", "3"]
    for _ in range(2):  # the second replaces the first
        assert main([*flags, "--out", str(out)]) == 0
    (path,) = out.iterdir()
    name = "sweep-sm-90-2x8x6x5-g2-bfloat16-bfloat16-contiguous-silu-forward.jsonl"
    assert path.name == name
    found = list(records.read(path))
    assert len(found) == 3
    assert len({json.dumps(one.config) for one in found}) == 3
    problem = Workload("", 2, 8, 2, (6, 5), activation="silu").problem("forward")
    (default,) = (one for one in found if (one.config or {}).get("default"))
    assert default.config == fields_of(heuristic_plan(problem, H100)) | {"default": True}
    for one in found:
        assert (one.measured, one.command, one.device) == (False, "sweep", H100.name)
        assert one.implementation == f"{OURS}[{one.strategy}]"
        assert one.ms_p50
        assert one.registers
        assert one.spill_bytes is not None
        assert one.bound in ("dram", "l2", "occupancy", "launch")
        assert (one.ms_p20, one.error, one.skipped) == (None, None, None)
    said = capsys.readouterr().out
    assert "predicted, not measured" in said
    assert "1*" in said or "2*" in said or "3*" in said


@no_gpu
@pytest.mark.usefixtures("inline")
def test_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SWEEP", " ".join([*SHAPE[1:], "--candidates"]))
    monkeypatch.setattr(plot, "save", lambda _, stem, folder: [folder / f"{stem}-light.png"])
    assert main(["demo", "--candidates", "1"]) == 0
    said = capsys.readouterr().out
    assert said.count("predicted, not measured") == 3
    assert "no data" not in said
    pictures = said.partition("Pictures:\n")[2].split()
    targets = [TARGETS[name] for name in demo.TARGETS.split(",")]
    assert {one.device for one in records.read(demo.FOLDER)} == {one.name for one in targets}
    assert sorted(pictures) == sorted(
        f"demo/predicted-sweep-2x8x6x5-forward-{records.slug(one.name)}-light.png"
        for one in targets
    )
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_demo_is_ignored_by_git() -> None:
    ignored = (common.WORKLOADS.parents[1] / ".gitignore").read_text().splitlines()
    assert f"/{demo.FOLDER}/" in ignored


def test_results_and_figures_do_not_make_a_commit_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        user = "-c", "user.name=a", "-c", "user.email=a@b"
        subprocess.run(["git", "-C", str(tmp_path), *user, *arguments], check=True)

    files = [tmp_path / folder / "a" for folder in (records.RESULTS, records.FIGURES, ".")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("before")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "a")
    monkeypatch.setattr(common, "_ROOT", tmp_path)
    for file, commit in zip(files, ("abc", "abc", "abc-dirty"), strict=True):
        file.write_text("after")
        assert common.commit("abc") == commit
    assert common.commit("") == ""


@pytest.mark.usefixtures("inline")
def test_plan_that_does_not_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("out of registers\nin some pass")

    monkeypatch.setattr(inspection, "compile_launch", refuse)
    flags = [*SHAPE, "--target", "gfx942", "--candidates", "2"]
    assert main([*flags, "--out", str(tmp_path / "predicted")]) == 1
    assert "2 of 2 plans failed: RuntimeError: out of registers\n" in capsys.readouterr().out


def test_plans_are_compiled_in_other_processes() -> None:
    problem = SMALL.problem("forward")
    plans = candidates(problem, H100)
    assert sweep._plans(problem, H100, None) == plans
    one = sweep.Sweep(SMALL, problem, H100, "sm_90", tuple(plans[:2]))
    assert pickle.loads(pickle.dumps(one.cases)) == one.cases
    results = list(inspection.inspect_all(one.cases))
    assert [result.config for result in results] == plans[:2]
    assert all(isinstance(result, inspection.Inspection) for result in results)


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
    said = capsys.readouterr().out
    assert f"{ms:.3f}" in said
    assert f"{math.sqrt(ms):.3f}" in said  # the geometric mean of both


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
            found = record(ms_p20=ms - 0.5, ms_p50=ms, ms_p80=ms + 0.5)
            save(Path(command[-1]) / "day.jsonl", [found])

    monkeypatch.setattr(compare, "run_command", fake)
    old, new = compare.time_revisions(["v1", "v2"], ["--core"], tmp_path)
    assert [one.split(" -")[0].split()[:2] for one in commands if "bench" not in one] == [
        ["perf", "worktree"]
    ] * 4
    assert [one.split()[0] for one in commands if "bench --core --out" in one] == [
        "old", "new", "new", "old",
    ]  # fmt: skip
    assert [one.split()[2] for one in commands if "worktree" in one] == [
        "add", "add", "remove", "remove",
    ]  # fmt: skip
    assert [(one.ms_p20, one.ms_p50, one.ms_p80) for one in old] == [(0.5, 2.0, 3.5)]
    assert [(one.ms_p20, one.ms_p50, one.ms_p80) for one in new] == [(4.5, 6.0, 7.5)]


def test_command_of_a_revision_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exit status 3"):
        compare.run_command(["sh", "-c", "exit 3"], tmp_path)
    compare.run_command(["sh", "-c", "exit 1"], tmp_path)


def test_calls_stay_below_the_goals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calls"]) == 0
    assert capsys.readouterr().out.count(" of at most ") == len(calls.GOALS)


def test_sizes_of_images_share_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = argparse.Namespace(workloads=common.WORKLOADS, target="sm_90")
    assert kernels.run(arguments) == 0
    counts = {}
    for line in capsys.readouterr().out.splitlines()[1:]:
        count, model = line.split(maxsplit=1)
        counts[model] = int(count)
    assert counts["SD1.5 UNet 512px"] <= 43
    assert counts["SDXL UNet 1024px, 15 sizes of images"] <= 65
    assert counts["the same, batches of (1, 2, 4)"] <= 80


@no_gpu
def test_cpu_path_beside_pytorch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "LAYERS", (Workload("tiny", 2, 8, 2, (4, 5), activation="silu"),))
    threads = torch.get_num_threads()
    assert cpu.run(argparse.Namespace(seconds=0.0)) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    tables = 1 if threads == 1 else 2
    ratios = [float(text) for text in re.findall(r"\b\d+\.\d\d\b", printed)]
    assert len(ratios) == tables * 2 * 3 * 2 + 1
    assert printed.count("channels-last") == tables
    assert f"{len(ratios) - 1} ratios, the largest {max(ratios):.2f};" in printed


def test_host_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert host.run(argparse.Namespace(calls=2, rounds=3)) == 0
    said = capsys.readouterr().out
    for row in (host.LOOK_UP, host.READY, host.OWN, host.COPY):
        assert len(re.findall(rf"^ ?{re.escape(row)} +[\d.]+ +[\d.]+ +[\d.]+ *$", said, re.M)) == 2
    assert said.count("The look-up takes") == 2
    for row in ("group_norm", "GroupNorm", "GroupNorm and SiLU"):
        for kind in ("no gradient", "recording", "and backward"):
            assert re.search(rf"^ ?{row}, {kind} +[\d.]+ +[\d.]+ +[\d.]+ *$", said, re.M)


def test_costs_are_ratios_of_rounds() -> None:
    costs = {"a": [1.0, 2.0, 3.0], "b": [2.0, 2.0, 1.0]}
    assert host._ratio(costs["a"], costs["b"]) == 1.0
    calls: list[str] = []
    found = host.cost({name: partial(calls.append, name) for name in "ab"}, number=2, rounds=2)
    assert "".join(calls) == "ab" + "aabb" * 2
    assert [len(of_rounds) for of_rounds in found.values()] == [2, 2]
