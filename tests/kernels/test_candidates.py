"""The tuner with kernels that run, and times that are made up."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import triton_gn
from tests.support.memory import GuardedMemory
from tests.support.oracle import check, make_case
from triton_gn.ops import launcher
from triton_gn.ops.device import gpu_of
from triton_gn.plan import Config, Problem, fields_of, heuristic_plan, plan, planner, table
from triton_gn.tools import stopwatch, tune
from triton_gn.tools.model import made_by, problems_of
from triton_gn.tools.stopwatch import Times
from triton_gn.tools.verify import Verifier
from triton_gn.tools.workloads import Workload

FLAGS = "--shape 1x4x6x5 --groups 2 --dtype float32 --activation silu --candidates 4"
SHAPE = tuple(FLAGS.split(" "))
WORKLOAD = Workload("1x4x6x5", 1, 4, 2, (6, 5), "float32", activation="silu")
FORWARD, BACKWARD = (WORKLOAD.problem(direction) for direction in ("forward", "backward"))


class Stopwatch:
    """Makes times up: ``ms`` of a plan, 20 % of it between the percentiles."""

    def __init__(self, ms: Callable[[Config], float]) -> None:
        self.ms = ms
        self.timed: list[Config] = []
        self.calls = 0

    def __call__(
        self, calls: Sequence[Callable[[], object]], device: torch.device, *, cold: bool
    ) -> list[Times]:
        self.calls += 1
        configs = [call.args[1] for call in calls]
        self.timed += configs
        return [Times(0.9 * ms, ms, 1.1 * ms) for ms in map(self.ms, configs)]


def preferring(*favourites: Config, ms: float = 0.5) -> Stopwatch:
    return Stopwatch(lambda config: ms if config in favourites else 1.0)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache folder, empty."""

    def forget() -> None:
        planner.forget_plans()
        launcher.forget()

    monkeypatch.setenv("TRITON_GN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(table, "_warned", set())
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def gpu(device: str) -> torch.device:
    return torch.device(device)


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args(flags)


def others(problem: Problem, gpu: torch.device) -> list[Config]:
    """Return what the tuner tries besides the default config."""
    return tune.shortlist(problem, gpu_of(gpu), 4)[1:]


def entries(gpu: torch.device) -> dict[Problem, table.Entry]:
    device = gpu_of(gpu)
    path = table.path_of(table.cache_folder(), device)
    return {entry.problem: entry for entry in table.read(path, device)}


def test_what_is_faster_is_kept_and_used(
    memory: GuardedMemory, gpu: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    device = gpu_of(gpu)
    fast = [others(problem, gpu)[0] for problem in (FORWARD, BACKWARD)]
    case = make_case(memory, gpu.type, (1, 4, 6, 5), 2, activation="silu")
    case.through_kernels()  # with the default configs, which must not stay
    assert tune.run(options(*SHAPE), gpu, preferring(*fast)) == 0
    out = capsys.readouterr().out
    assert "1x4x6x5 forward: default 1000.0 us, best 500.0 us (2.00x), strategy=" in out
    assert "(4 timed)" in out
    for problem, config in zip((FORWARD, BACKWARD), fast, strict=True):
        entry = entries(gpu)[problem]
        assert (entry.default_us, entry.best_us, entry.noise_us) == pytest.approx((1000, 500, 200))
        assert entry.config == fields_of(config)
        assert plan(problem, device) == config != heuristic_plan(problem, device)
    with launcher.recording() as calls:
        results = case.through_kernels()
    assert [call.config for call in calls] == fast
    check(results, case.expected())


@pytest.mark.parametrize(("ms", "is_kept"), [(0.79, True), (0.81, False), (1.2, False)])
def test_gain_must_be_more_than_the_noise(gpu: torch.device, ms: float, is_kept: bool) -> None:
    fast = others(FORWARD, gpu)[1]
    assert tune.run(options(*SHAPE, "--direction", "forward"), gpu, preferring(fast, ms=ms)) == 0
    entry = entries(gpu)[FORWARD]
    assert (entry.config is not None) is is_kept
    assert entry.best_us == pytest.approx(1e3 * ms if is_kept else 1e3)
    device = gpu_of(gpu)
    assert plan(FORWARD, device) == (fast if is_kept else heuristic_plan(FORWARD, device))


def test_fastest_of_many_races_the_default_again(gpu: torch.device) -> None:
    """Fast by luck in the first round only: the second decides."""
    lucky, seen = others(FORWARD, gpu)[2], set()

    def ms(config: Config) -> float:
        is_first = config not in seen
        seen.add(config)
        return 0.5 if config == lucky and is_first else 1.0

    stopwatch = Stopwatch(ms)
    tune.run(options(*SHAPE, "--direction", "forward"), gpu, stopwatch)
    assert entries(gpu)[FORWARD].config is None
    default = heuristic_plan(FORWARD, gpu_of(gpu))
    assert stopwatch.timed == [default, *others(FORWARD, gpu), *[default, lucky] * 2]


def test_wrong_broken_and_spilling_plans_are_never_timed(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, broken, spilling = others(FORWARD, gpu)
    run = Verifier.run

    def corrupted(self: Verifier, direction: str, config: Config | None = None) -> None:
        if config == broken:
            raise RuntimeError("PassManager::run failed")
        run(self, direction, config)
        if config == wrong:
            self.outputs(direction)["y"][-1, -1, -1, -1] += 1e-3

    monkeypatch.setattr(Verifier, "run", corrupted)
    default = heuristic_plan(FORWARD, gpu_of(gpu))
    # the default config may spill
    monkeypatch.setattr(Verifier, "spills", lambda self, _, config: config in (spilling, default))
    stopwatch = preferring(wrong, broken, spilling)
    assert tune.run(options(*SHAPE, "--direction", "forward"), gpu, stopwatch) == 0
    assert set(stopwatch.timed) == {default}
    out = capsys.readouterr().out
    assert "(1 timed, 1 wrong, 1 failed, 1 spilled)" in out
    assert f"{fields_of(wrong)} wrong: y is off by" in out
    assert entries(gpu)[FORWARD].config is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda outputs: next(iter(outputs.values())).view(-1)[-1:].fill_(torch.nan),
        lambda outputs: next(iter(outputs.values())).mul_(1.0001),
        lambda outputs: [output.zero_() for output in outputs.values()],
    ],
    ids=["nan", "scaled", "zero"],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_check_finds_wrong_answers(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, direction: str, spoil: Callable
) -> None:
    verifier, run = Verifier(WORKLOAD, gpu), Verifier.run
    assert verifier.check(direction) is None

    def spoiled(self: Verifier, direction: str, config: Config | None = None) -> None:
        run(self, direction, config)
        spoil(self.outputs(direction))

    monkeypatch.setattr(Verifier, "run", spoiled)
    assert "is off by" in verifier.check(direction)


def test_check_finds_elements_that_are_not_written(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier = Verifier(WORKLOAD, gpu)
    assert verifier.check("forward") is None
    monkeypatch.setattr(launcher, "forward", lambda *_, **__: None)
    assert "y is off by inf" in verifier.check("forward")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("spatial", [(), (6,)], ids=len)
def test_right_answers_pass_with_everything_fused(
    gpu: torch.device, dtype: str, layout: str, spatial: tuple[int, ...]
) -> None:
    fused = ("scale", "shift", "pre_add", "residual")
    verifier = Verifier(
        Workload("", 1, 16, 2, spatial, dtype, "bfloat16", layout, "gelu", fused), gpu
    )
    assert verifier.check("forward") is None
    assert verifier.check("backward") is None
    assert verifier.outputs("backward").keys() == {"x", "weight", "bias", *fused}


def test_gradient_that_is_all_rounding_passes(gpu: torch.device) -> None:
    """pre_add shifts a group of one channel, and a norm does not see a shift."""
    verifier = Verifier(Workload("", 2, 2, 2, (30,), "float32", fused=("pre_add",)), gpu)
    assert verifier.expected("backward")["pre_add"].abs().max() < 1e-12
    assert verifier.check("backward") is None


def test_residual_without_activation_has_no_gradient_of_the_kernels(gpu: torch.device) -> None:
    verifier = Verifier(replace(WORKLOAD, activation="none", fused=("residual",)), gpu)
    assert verifier.check("backward") is None
    assert verifier.outputs("backward").keys() == {"x", "weight", "bias"}


def test_problem_that_the_default_gets_wrong_is_not_tuned(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    default = heuristic_plan(FORWARD, gpu_of(gpu))
    fault = tune._fault

    def fault_of_default(
        verifier: Verifier, direction: str, config: Config, **flags: bool
    ) -> str | None:
        is_wrong = (direction, config) == ("forward", default)
        return "wrong: all of it" if is_wrong else fault(verifier, direction, config, **flags)

    monkeypatch.setattr(tune, "_fault", fault_of_default)
    stopwatch = preferring()
    assert tune.run(options(*SHAPE), gpu, stopwatch) == 1
    assert "forward: not tuned: the default config" in capsys.readouterr().out
    assert entries(gpu).keys() == {BACKWARD}
    assert stopwatch.calls == 3  # of the backward


def test_interrupt_leaves_a_whole_table_and_the_next_run_goes_on(
    gpu: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(config: Config) -> float:
        if stopwatch.calls > 3:  # each problem takes three
            raise KeyboardInterrupt
        return 1.0

    stopwatch = Stopwatch(interrupt)
    assert tune.run(options(*SHAPE), gpu, stopwatch) == 130
    assert "1 of 2 problems are done" in capsys.readouterr().out
    assert entries(gpu).keys() == {FORWARD}

    for calls, flags in ((3, ()), (0, ()), (6, ("--retune",))):
        stopwatch = preferring()
        assert tune.run(options(*SHAPE, *flags), gpu, stopwatch) == 0
        assert stopwatch.calls == calls
        assert entries(gpu).keys() == {FORWARD, BACKWARD}


def test_other_versions_are_timed_again(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune.run(options(*SHAPE, "--direction", "forward"), gpu, preferring()) == 0
    now = tune.provenance()
    monkeypatch.setattr(tune, "provenance", lambda: now | {"date": "later", "commit": "other"})
    same = preferring()
    tune.run(options(*SHAPE, "--direction", "forward"), gpu, same)
    assert same.timed == []
    monkeypatch.setattr(tune, "provenance", lambda: now | {"driver": "newer"})
    newer = preferring()
    tune.run(options(*SHAPE, "--direction", "forward"), gpu, newer)
    assert newer.timed
    assert entries(gpu)[FORWARD].provenance["driver"] == "newer"


@pytest.fixture
def factories(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], None]]:
    """Writes a module into the current folder, with a factory ``make`` of these lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def write(*lines: str) -> None:
        source = (
            f"import torch, triton_gn\nfrom torch import nn\n\ndef make():\n    d = {device!r}\n"
        )
        (tmp_path / "model_to_tune.py").write_text(
            source + "".join(f"    {line}\n" for line in lines)
        )

    yield write
    sys.modules.pop("model_to_tune", None)


MODEL = "model = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.GroupNorm(4, 8)).to(d)"


def test_model_is_tuned_for_the_problems_that_it_meets(
    gpu: torch.device, factories: Callable[..., None]
) -> None:
    factories(
        MODEL,
        "triton_gn.convert(model)",
        "return model, (torch.randn(2, 8, 6, 5, device=d),)",
    )
    flags = "--model", "model_to_tune:make", "--candidates", "2"
    assert tune.run(options(*flags), gpu, preferring()) == 0
    first = Problem("forward", 2, 8, 2, 30, "float32", False, "silu")
    second = replace(first, groups=4, activation="none")
    expected = [
        first, second, replace(second, direction="backward"), replace(first, direction="backward")
    ]  # fmt: skip
    assert list(entries(gpu)) == expected


def test_model_without_gradients_meets_no_backward(factories: Callable[..., None]) -> None:
    factories(
        MODEL,
        "triton_gn.convert(model.requires_grad_(False))",
        "return model, {'input': torch.randn(2, 8, 6, 5, device=d)}",
    )
    assert [p.direction for p in problems_of(*made_by("model_to_tune:make"))] == ["forward"] * 2


def test_model_that_meets_no_kernel_is_refused(factories: Callable[..., None]) -> None:
    factories("return nn.Linear(2, 2), (torch.randn(2, 2),)")
    with pytest.raises(ValueError, match=r"no kernel .*triton_gn\.convert\(model\).*on the GPU"):
        problems_of(*made_by("model_to_tune:make"))


def test_calls_never_take_times(
    memory: GuardedMemory, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a call was timed")

    for module, name in ((stopwatch, "measure"), (tune, "tune"), (Verifier, "__init__")):
        monkeypatch.setattr(module, name, refuse)
    case = make_case(memory, device, (2, 8, 6, 5), 2)
    check(case.through_kernels(), case.expected())
    with torch.no_grad(), triton_gn.backend("triton"):
        triton_gn.group_norm(case.x, 4)
