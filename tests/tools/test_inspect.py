"""``inspect``: what it says of a plan is what the kernels do. No GPU is needed."""

import json
from pathlib import Path

import pytest

from triton_gn.__main__ import main
from triton_gn.plan import TARGETS, fields_of, heuristic_plan
from triton_gn.tools import inspection, workloads
from triton_gn.tools.compile import _access_bytes
from triton_gn.tools.inspect import Totals
from triton_gn.tools.inspection import Case, Failure, inspect
from triton_gn.tools.workloads import DIRECTIONS, FUSED, Workload

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
CORE = [one for one in workloads.read(ROOT / "perf/workloads.csv") if one.core]
SMALL = Workload("small", 2, 320, 32, (8, 8), layout="channels_last", activation="silu")
LARGE = Workload("large", 1, 128, 32, (512, 512), "float16", param_dtype="float32")
FLAGS = ("--shape", "2x320x8x8", "--groups", "32", "--layout", "channels_last")


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_compiles(target: str) -> None:
    """Both workloads, which is both strategies, and both directions; which of them together takes
    turns."""
    turn = 1 if list(TARGETS).index(target) % 2 else -1
    for workload, direction in zip((SMALL, LARGE), DIRECTIONS[::turn], strict=True):
        one = inspect(workload, direction, target)
        assert one.spill_bytes == 0
        assert one.access_bytes == one.widest_access_bytes == 16
        assert one.device is TARGETS[target]
        assert all(kernel.registers for kernel in one.kernels)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", CORE, ids=lambda one: f"{one.shape_text}-{one.dtype}")
def test_layers_of_real_models_compile_well(workload: Workload, direction: str) -> None:
    """``make compile-all`` checks all of perf/workloads.csv."""
    one = inspect(workload, direction, "sm_90")
    assert one.spill_bytes == 0
    assert one.access_bytes == one.widest_access_bytes
    if one.config.strategy == "resident":
        # besides, for each sample or stack of them: weight and bias read, parts of their gradients
        # written and read
        per_channel = 2 * 4 + 2 * (4 + 4)
        besides = per_channel * one.config.parts(one.problem) * workload.channels
        assert one.bytes_moved <= 1.01 * one.bytes_minimum + besides


@pytest.mark.parametrize(
    ("target", "strategy", "direction"),
    [  # any two of them meet
        ("sm_90", "resident", "backward"),
        ("sm_90", "split", "forward"),
        ("gfx942", "resident", "forward"),
        ("gfx942", "split", "backward"),
        ("sm_90", "pipelined", "backward"),
        ("gfx942", "pipelined", "forward"),
    ],
)
def test_every_pointer_has_its_access(target: str, strategy: str, direction: str) -> None:
    """Each is found in the compiled code, whether AMD reads it as a buffer or NVIDIA as PTX."""
    workload = Workload("", 4, 32, 4, (16, 16), activation="silu", fused=FUSED)
    problem = workload.problem(direction)
    config = heuristic_plan(problem, TARGETS[target], (strategy,))
    found = set().union(
        *(kernel.access_bytes for kernel in inspect(workload, direction, target, config).kernels)
    )
    per_channel = {"weight_ptr", "bias_ptr", "scale_ptr", "shift_ptr", "pre_add_ptr"}
    expected = {"x_ptr", "residual_ptr", "stats_ptr"} | per_channel
    if direction == "forward":
        expected |= {"y_ptr"}
    else:
        expected |= {"dy_ptr", "dx_ptr", "dresidual_ptr"}
        expected |= {f"d{name}" for name in per_channel}
    assert expected <= found
    assert ("partials_ptr" in found) is (strategy != "resident")


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ('%3 = call i32 asm "ld.global.v4.b32 { $0 }, [ $4 ];", "=r,l"(ptr addrspace(1) %2)', 16),
        (
            'call void asm "@$2 st.global.b16 [ $1 ];", "h,l,b"(i16 %9, ptr addrspace(1) %2, i1 1)',
            2,
        ),
        (
            "%3 = call <4 x i32> @llvm.amdgcn.raw.ptr.buffer.load.v4i32(ptr addrspace(8) %2)",
            16,
        ),
        ("call void @llvm.amdgcn.raw.ptr.buffer.store.i16(i16 %9, ptr addrspace(8) %2, i32 0)", 2),
        ("%3 = load <8 x bfloat>, ptr addrspace(1) %2, align 16", 16),
        ("store <1 x float> %9, ptr addrspace(1) %2, align 4", 4),
        ("store double %9, ptr addrspace(1) %2, align 8", 8),
        ("%3 = load <4 x float>, ptr addrspace(3) %2, align 16", None),
    ],
)
def test_accesses_are_read_from_llvm(line: str, size: int | None) -> None:
    text = f"  %2 = getelementptr i8, ptr addrspace(1) %1, i64 %7\n  {line}\n"
    assert _access_bytes(text, ["a", "b"]) == ({} if size is None else {"b": size})


def test_an_address_is_followed_through_loops_and_branches() -> None:
    text = """
  %2 = phi ptr addrspace(1) [ %0, %9 ], [ %3, %9 ]
  %3 = getelementptr i8, ptr addrspace(1) %2, i64 16
  %4 = select i1 %8, ptr addrspace(1) %3, ptr addrspace(1) %1
  %5 = load i32, ptr addrspace(1) %4
  %6 = load <4 x i32>, ptr addrspace(1) %1
"""
    assert _access_bytes(text, ["a", "b"]) == {"a": 4, "b": 4}


def test_resident_moves_the_minimum_and_split_reads_again() -> None:
    for direction, ratio in (("forward", 1.5), ("backward", 5 / 3)):
        one = inspect(SMALL, direction, "sm_90")
        assert one.config.strategy == "resident"
        assert one.bytes_moved == pytest.approx(one.bytes_minimum, rel=0.06)
        split = inspect(LARGE, direction, "sm_90")
        assert split.config.strategy == "split"
        assert split.bytes_moved == pytest.approx(ratio * split.bytes_minimum, rel=0.01)


def test_json_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    # one plan is compiled here, two would be in processes of their own: test_a_file_of_workloads
    assert main(["inspect", "--json", *FLAGS]) == 0
    (forward,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert forward["direction"] == "forward"
    assert forward["target"] == "sm_90"
    assert forward["predicted"] is True
    assert forward["strategy"] == forward["config"]["strategy"] == "resident"
    assert forward["problem"]["shape"] == "2x320x8x8"
    assert forward["device"]["name"] == TARGETS["sm_90"].name
    assert forward["bound"] in ("launch", "dram", "l2", "occupancy")
    assert forward["predicted_us"] > 0
    assert forward["bytes_minimum"] <= forward["bytes_moved"]
    (kernel,) = forward["kernels"]
    assert kernel["name"] == "group_norm_forward_resident_kernel"
    assert kernel["access_bytes"]["x_ptr"] == kernel["access_bytes"]["y_ptr"] == 16
    assert kernel.keys() >= {
        "grid", "num_warps", "registers", "spill_bytes", "shared_bytes",
        "ctas_per_multiprocessor", "waves",
    }  # fmt: skip


def test_a_table_for_one_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--target", "sm_80", *FLAGS]) == 0
    text = capsys.readouterr().out
    for part in ("predicted, not measured", "NVIDIA A100", "108 multiprocessors", "x_ptr 16"):
        assert part in text


def test_a_file_of_workloads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layers.csv"
    path.write_text(
        "model,layer,n,channels,groups,spatial,dtype,layout,activation,residual,scale_shift,core\n"
        "net,a,2,64,8,8x8,float16,channels_last,silu,,per_channel,yes\n"
        "net,b,2,64,8,,float32,contiguous,relu,after,,\n"
    )
    assert main(["inspect", "--workloads", str(path), "--direction", "both", "--json"]) == 0
    out, err = capsys.readouterr()
    plans = [json.loads(line) for line in out.splitlines()]
    assert [plan["problem"]["shape"] for plan in plans] == ["2x64x8x8"] * 2 + ["2x64"] * 2
    assert [plan["direction"] for plan in plans] == ["forward", "backward"] * 2
    assert "4 plans: 0 do not compile, 0 spill" in err
    assert "all, were pipelined allowed: " in err
    assert main(["inspect", "--workloads", str(path), "--core"]) == 0
    assert "2x64x8x8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "strategy"), [((), "split"), (("--allow-unverified",), "pipelined")]
)
def test_what_no_gpu_has_proven_is_chosen_on_request_only(
    flags: tuple[str, ...], strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = ("--shape", "1x512x16x90x160", "--groups", "32", "--activation", "silu", "--json")
    assert main(["inspect", *problem, *flags]) == 0
    assert json.loads(capsys.readouterr().out)["strategy"] == strategy


def test_what_is_wrong_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    good = inspect(SMALL, "forward", "sm_90")
    monkeypatch.setattr(inspection, "compile_launch", lambda *_: 1 / 0)
    case = Case(SMALL, good.problem, "sm_90", good.config)
    (failure,) = inspection.inspect_all([case])
    assert isinstance(failure, Failure)
    assert "ZeroDivisionError" in failure.error
    totals = Totals.of([good, failure])
    assert (totals.plans, totals.failures, totals.one_tile) == (2, 1, 1)
    monkeypatch.setattr(inspection, "inspect_all", lambda cases: iter([failure]))
    assert main(["inspect", *FLAGS]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "2x320"], "--shape needs --groups"),
        (["--shape", "2by320", "--groups", "32"], "such as 2x320x64x64; got '2by320'"),
        (["--shape", "2x320x0", "--groups", "32"], "sizes must be at least 1"),
        (["--shape", "2x320x8", "--groups", "31"], "the groups must divide the channels"),
        (["--shape", "2x320x8", "--groups", "32", "--fused", "gate"], "fused operand must be one"),
        (["--workloads", "nowhere.csv"], "No such file"),
    ],
)
def test_errors_say_what_to_do(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("2,x,8,8x8,,", "line 2: invalid literal"),
        ("2,64,7,8x8,,", "line 2: 64 channels cannot be split"),
        ("2,64,8,8x8,before,", "line 2: residual must be empty or one of after"),
        ("2,64,8,8x8,,per_pixel", "line 2: scale_shift must be empty or one of per_channel"),
    ],
)
def test_a_wrong_row_is_named(row: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "layers.csv"
    path.write_text(f"n,channels,groups,spatial,residual,scale_shift\n{row}\n")
    with pytest.raises(ValueError, match=message):
        list(workloads.read(path))


def test_a_plan_of_any_fields_is_inspected() -> None:
    problem = SMALL.problem("forward")
    config = heuristic_plan(problem, TARGETS["sm_90"], ("split",))
    assert inspect(SMALL, "forward", "sm_90", config).to_json()["config"] == fields_of(config)
