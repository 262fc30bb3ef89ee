"""The benchmarks without a GPU: workloads, implementations, predictions, comparisons, costs."""

import argparse
import json
import math
import pickle
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
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
from perf.records import OURS, Record, case
from triton_gn.plan import TARGETS, candidates, fields_of, heuristic_plan
from triton_gn.tools import inspection, workloads
from triton_gn.tools.verify import Verifier, fault_of
from triton_gn.tools.workloads import FUSED, LAYOUTS, Workload

CPU = torch.device("cpu")
H100 = TARGETS["sm_90"]
SMALL = Workload("small", 2, 8, 2, (6, 5), "float32", activation="silu")
SHAPE = ["sweep", "--shape", "2x8x6x5", "--groups", "2", "--direction", "forward"]
CORE = [workload for workload in workloads.read(common.WORKLOADS) if workload.core]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def implementation(name: str) -> Implementation:
    (entry,) = (entry for entry in IMPLEMENTATIONS if entry.name == name)
    return entry


def test_implementations_say_why_they_are_absent() -> None:
    assert [entry.name for entry in IMPLEMENTATIONS] == [
        OURS, f"{OURS}[resident]", f"{OURS}[split]", f"{OURS}[pipelined]", "torch_eager",
        "torch_compile", "liger", "flag_gems",
    ]  # fmt: skip
    reasons = {entry.name: entry.absent(CPU) for entry in IMPLEMENTATIONS}
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

    def group_norm(x: Tensor, weight: Tensor, bias: Tensor, *sizes: Any) -> Any:
        return torch.native_group_norm(x.contiguous(), weight, bias, *sizes)

    def group_norm_backward(dy: Tensor, x: Tensor, *arguments: Any) -> Any:
        function = torch.ops.aten.native_group_norm_backward
        return function(dy.contiguous(), x.contiguous(), *arguments)

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
    assert all(entry.roundings == 1 for entry in IMPLEMENTATIONS if entry.name.startswith(OURS))
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
    message = capsys.readouterr().err
    assert "torch.cuda.is_available() is False" in message
    assert f"`{remedy}`" in message
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
    predictions = list(records.read(path))
    assert f"{len(predictions)} records in {path}" in capsys.readouterr().out
    cases: dict[Any, dict[str, Record]] = {}
    for entry in predictions:
        assert (entry.measured, entry.command, entry.cache) == (False, "bench", "cold")
        assert entry.device == H100.name
        assert "predicted" in entry.protocol
        assert (
            entry.ms_p20 is entry.ms_p80 is entry.error is entry.peak_bytes is entry.host_us is None
        )
        assert entry.versions["torch"] == torch.__version__
        cases.setdefault(case(entry), {})[entry.implementation] = entry
    assert len(cases) == len(CORE) * len(PARTS)
    for row in cases.values():
        ours = row[OURS]
        references = [row[name] for name in ("copy", "add") if name in row]
        assert [entry.implementation for entry in references] == {
            "forward": ["copy"], "backward": ["add"], "both": ["copy", "add"],
        }[ours.direction]  # fmt: skip
        assert sum(entry.bytes_minimum for entry in references) == ours.bytes_minimum
        assert f"{OURS}[pipelined]" in row
        strategies = [entry for name, entry in row.items() if name.startswith(f"{OURS}[")]
        for entry in (ours, *strategies):
            assert entry.ms_p50 is not None
            share = sum(copy.ms_p50 or 0 for copy in references) / entry.ms_p50
            assert entry.share_of_copy == pytest.approx(share)
            assert 0 < share <= 1.01
            assert entry.bound in ("dram", "l2", "occupancy", "launch")
            assert (entry.config is None) == (entry.direction == "both")
        assert ours.strategy is not None
        if "+" not in ours.strategy:
            assert ours.ms_p50 == row[f"{OURS}[{ours.strategy}]"].ms_p50
    tiny = [
        entry
        for entry in predictions
        if entry.shape == "32x2048x1" and entry.implementation == "copy"
    ]
    assert {entry.bound for entry in tiny} == {"launch"}
    assert main([*arguments, "--match", "32x2048x1"]) == 0
    assert {entry.shape for entry in records.read(path)} == {"32x2048x1"}


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
    plans = list(records.read(path))
    assert len(plans) == 3
    assert len({json.dumps(plan.config) for plan in plans}) == 3
    problem = Workload("", 2, 8, 2, (6, 5), activation="silu").problem("forward")
    (default,) = (plan for plan in plans if (plan.config or {}).get("default"))
    assert default.config == fields_of(heuristic_plan(problem, H100)) | {"default": True}
    for plan in plans:
        assert (plan.measured, plan.command, plan.device) == (False, "sweep", H100.name)
        assert plan.implementation == f"{OURS}[{plan.strategy}]"
        assert plan.ms_p50
        assert plan.registers
        assert plan.spill_bytes is not None
        assert plan.bound in ("dram", "l2", "occupancy", "launch")
        assert (plan.ms_p20, plan.error, plan.skipped) == (None, None, None)
    printed = capsys.readouterr().out
    assert "predicted, not measured" in printed
    assert "1*" in printed or "2*" in printed or "3*" in printed


@no_gpu
@pytest.mark.usefixtures("inline")
def test_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SWEEP", " ".join([*SHAPE[1:], "--candidates"]))
    monkeypatch.setattr(plot, "save", lambda _, stem, folder: [folder / f"{stem}-light.png"])
    assert main(["demo", "--candidates", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("predicted, not measured") == 3
    assert "no data" not in printed
    pictures = printed.partition("Pictures:\n")[2].split()
    targets = [TARGETS[name] for name in demo.TARGETS.split(",")]
    assert {record.device for record in records.read(demo.FOLDER)} == {
        record.name for record in targets
    }
    assert sorted(pictures) == sorted(
        f"demo/predicted-sweep-2x8x6x5-forward-{records.slug(target.name)}-light.png"
        for target in targets
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
    sweep_of_small = sweep.Sweep(SMALL, problem, H100, "sm_90", tuple(plans[:2]))
    assert pickle.loads(pickle.dumps(sweep_of_small.cases)) == sweep_of_small.cases
    results = list(inspection.inspect_all(sweep_of_small.cases))
    assert [result.config for result in results] == plans[:2]
    assert all(isinstance(result, inspection.Inspection) for result in results)


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
    printed = capsys.readouterr().out
    for row in (host.LOOK_UP, host.READY, host.OWN, host.COPY):
        assert (
            len(re.findall(rf"^ ?{re.escape(row)} +[\d.]+ +[\d.]+ +[\d.]+ *$", printed, re.M)) == 2
        )
    assert printed.count("The look-up takes") == 2
    for row in ("group_norm", "GroupNorm", "GroupNorm and SiLU"):
        for kind in ("no gradient", "recording", "and backward"):
            assert re.search(rf"^ ?{row}, {kind} +[\d.]+ +[\d.]+ +[\d.]+ *$", printed, re.M)


def test_costs_are_ratios_of_rounds() -> None:
    costs = {"a": [1.0, 2.0, 3.0], "b": [2.0, 2.0, 1.0]}
    assert host._ratio(costs["a"], costs["b"]) == 1.0
    calls: list[str] = []
    appends = {name: partial(calls.append, name) for name in "ab"}
    rounds = host.cost(appends, number=2, rounds=2)
    assert "".join(calls) == "ab" + "aabb" * 2
    assert [len(of_rounds) for of_rounds in rounds.values()] == [2, 2]
