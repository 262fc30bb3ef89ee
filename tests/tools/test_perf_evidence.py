"""Records of machine code, accuracy and traffic: current, drawn, and quoted as they are."""

import copy
import json
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import triton

from perf import accuracy, coverage, evidence, evidence_figures, machine_code, traffic
from perf.__main__ import main
from perf.evidence_figures import mean_over_minimum
from perf.records import OURS
from triton_gn.tools.workloads import DIRECTIONS, Workload

ROOT = Path(__file__).parents[2]
WAYS = ("converted", "compiled", "foldable")
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def record_of(command: str) -> dict[str, Any]:
    return evidence.load(command, ROOT / evidence.path_of(command))


def test_machine_code_is_that_of_today() -> None:
    record = record_of("machine-code")
    if record["versions"]["triton"] != triton.__version__:
        pytest.skip("another version of Triton describes launches otherwise")
    changes = machine_code.stale(record)
    assert not changes, f"run `python -m perf machine-code` again: {', '.join(changes)} changed"


def test_a_changed_plan_or_kernel_makes_machine_code_stale() -> None:
    record = copy.deepcopy(record_of("machine-code"))
    before = machine_code.stale(record)
    row = next(row for row in record["rows"] if row["implementation"] == OURS)
    row["launches"], record["kernels"] = "another", "another"
    plan = f"the plan of {row['shape']}"
    assert "the kernels" in machine_code.stale(record)
    assert any(change.startswith(plan) for change in machine_code.stale(record))
    assert len(machine_code.stale(record)) >= len(before)


def test_comments_do_not_change_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "activations.py").write_text("TABLE = {}\n")
    monkeypatch.setattr(evidence, "_PACKAGE", tmp_path)
    fingerprints = []
    for text in (
        "def f(x):\n    return x",
        'def f(x):\n    "Doc."\n    return (x)  # why',
        "y = 1",
    ):
        (tmp_path / "kernels" / "a.py").write_text(text)
        fingerprints.append(evidence.fingerprint_of_kernels())
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_layers_of_machine_code_have_names_of_their_own() -> None:
    ours = [row for row in record_of("machine-code")["rows"] if row["implementation"] == OURS]
    assert len({machine_code.case(row) for row in ours}) == len(ours)


def test_compiles_and_compares_a_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "record.json"
    assert main(["machine-code", "--ours", "--match", "2x1280x8x8", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["direction"] for row in rows} == {"forward", "backward"}
    for row in rows:
        for code in row["codes"]:
            assert 0 < code["registers"] <= 255
            assert code["instructions"] >= code["loops"] >= 0
    said = capsys.readouterr().out
    assert "instructions per element, 1 layers" in said
    changed = copy.deepcopy(rows)
    changed[0]["codes"][0]["barriers"] += 1
    table, *sums = machine_code.differences(rows, changed)
    assert table.row_count == 1
    assert all("+0.0 %" in text for text in sums)


def test_counted_traffic_is_what_inspect_states() -> None:
    ours = [row for row in record_of("traffic")["rows"] if row["implementation"] == OURS]
    assert len(ours) == 2 * len(traffic.LAYERS)
    for row in ours:
        assert abs(traffic.excess(row)) < 0.01, row["layer"]


def test_kernels_move_no_more_than_when_they_were_counted() -> None:
    """What inspect states of today's plans for whole layers, over what was counted."""
    rows = record_of("traffic")["rows"]
    counted = {(r["layer"], r["direction"]): r for r in rows if r["implementation"] == OURS}
    for name, layer in traffic.layers().items():
        for direction in ("forward", "backward"):
            stated = traffic.stated_over_minimum(layer, direction)
            assert stated == pytest.approx(counted[name, direction]["over_minimum"], rel=0.02), (
                f"run `python -m perf traffic` again: {name}, {direction} changed"
            )


def test_ours_is_exact_at_any_mean() -> None:
    rows = [row for row in record_of("accuracy")["rows"] if row["implementation"] == OURS]
    for row in rows:
        limit = 1e-6 if row["dtype"] == "float32" else 4e-3  # half an ulp of bfloat16 is 2e-3
        assert all(row[name] is not None and row[name] < limit for name in accuracy.RESULTS), row


@pytest.mark.parametrize("module", [accuracy, traffic])
def test_documented_numbers_are_the_records(module: Any) -> None:
    record = record_of(module.COMMAND)
    assert module.markdown(record) in PERFORMANCE
    text = " ".join(PERFORMANCE.split())
    for sentence in module.findings(record):
        if "torch, CPU" not in sentence and "liger" not in sentence:
            assert sentence in text


def test_documented_instructions_are_the_records() -> None:
    text = " ".join(PERFORMANCE.split())
    for line in machine_code.totals(record_of("machine-code")["rows"]):
        assert " ".join(line.split()) in text


@pytest.mark.parametrize("name", evidence_figures.FIGURE_OF)
def test_figures_are_there_for_light_and_dark_pages(name: str) -> None:
    svg = (ROOT / "perf" / "figures" / f"{name}.svg").read_text()
    assert "prefers-color-scheme:dark" in svg
    variables = set(re.findall(r"var\((--c\d+)\)", svg))
    assert variables
    style = svg[: svg.index("</style>")]
    assert all(style.count(f"{variable}:") == 2 for variable in variables)
    assert not re.search(r"(fill|stroke): #", svg)


def test_figures_say_what_the_record_says(tmp_path: Path) -> None:
    record = record_of("traffic")
    text = evidence_figures.draw("traffic", record, tmp_path).read_text()
    for direction in ("forward", "backward"):
        mean = evidence_figures.mean_over_minimum(record, OURS, direction)
        assert f" {mean:.2f}<" in text
    committed = (ROOT / "perf" / "figures" / "traffic.svg").read_text()
    words = [re.findall(r">([^<>]+)</text>", svg) for svg in (text, committed)]
    assert words[0] == words[1]


def test_inductors_code_is_generated_and_read() -> None:
    """Forward: x is read for its moments and again for y, as the group is large."""
    layer = Workload("", 1, 512, 32, (128, 128), activation="silu")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # it changes PyTorch
        forward, backward = pool.submit(traffic.count_inductor, layer).result()
    x = 512 * 128 * 128 * 2
    assert forward["loaded"] == pytest.approx(2 * x, rel=0.01)
    assert forward["stored"] == pytest.approx(x, rel=0.01)
    assert backward["loaded"] >= 4 * x
    assert min(forward["launches"], backward["launches"]) >= 2


def test_a_missing_record_names_its_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Remedy: `python -m perf traffic`"):
        evidence.load("traffic", tmp_path / "traffic.json")


def test_readme_has_the_numbers_of_the_records() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    counted = record_of("traffic")
    sentences = {
        OURS: "moves {} times the minimum of bytes forward and {} times backward",
        "liger": "Liger's kernels {} and {} times",
    }
    for name, sentence in sentences.items():
        means = [mean_over_minimum(counted, name, direction) for direction in DIRECTIONS]
        assert sentence.format(*(f"{mean:.2f}" for mean in means)) in text
    ours = [row for row in counted["rows"] if row["implementation"] == OURS]
    split = {row["layer"] for row in ours if row["strategy"] == "split"}
    assert f"{len(split)} of these {len({row['layer'] for row in ours})} layers" in text
    errors = {
        row["implementation"]: row["y"]
        for row in record_of("accuracy")["rows"]
        if (row["over"], row["dtype"], row["layout"]) == ("mean", "float32", "contiguous")
        and row["ratio"] == 1e4
    }
    is_off = (
        f"y is off by {errors[OURS]:.0e} and PyTorch's on the CPU by {errors['torch, CPU']:.0e}"
    )
    assert is_off in text
    models = json.loads((ROOT / coverage.RECORD).read_text(encoding="utf-8"))["models"].values()
    totals = {way: sum((Counter(row[way]) for row in models), Counter()) for way in WAYS}
    assert f"Of {len(models)} public models with {totals['foldable']['norms']} GroupNorm" in text
    for kind in ("activation", "residual", "scale"):
        converted, compiled, foldable = (totals[way][kind] for way in WAYS)
        assert converted == compiled
        assert f"{converted} of {foldable} {kind}s" in text
