"""Settings of a thread, and what explain() says under them."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_gn
from triton_gn.ops import settings
from triton_gn.plan import Config, Problem

ROOT = Path(__file__).parents[2]
SETTINGS: list[Any] = [
    pytest.param(lambda: triton_gn.backend("torch"), {"backend": "torch"}, id="backend"),
    pytest.param(
        lambda: triton_gn.batch_invariant(), {"batch_invariant": True}, id="batch_invariant"
    ),
    pytest.param(
        lambda: triton_gn.autocast_policy("keep"),
        {"autocast_policy": "keep"},
        id="autocast_policy",
    ),
    pytest.param(
        lambda: triton_gn.plan_override(strategy="split", splits=2),
        {"plan_override": (("splits", 2), ("strategy", "split"))},
        id="plan_override",
    ),
]
each_setting = pytest.mark.parametrize(("change", "changed"), SETTINGS)


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    with (
        triton_gn.backend("auto"),
        triton_gn.autocast_policy("torch"),
        triton_gn.batch_invariant(False),
        triton_gn.plan_override(),
    ):
        yield


def changes() -> dict[str, Any]:
    """Return the settings of this thread that differ from the defaults."""
    current, defaults = vars(settings.current()), vars(settings.Settings())
    return {name: value for name, value in current.items() if value != defaults[name]}


def in_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


@each_setting
def test_call_sets_for_this_thread_alone(
    change: Callable[[], settings.Setting], changed: dict[str, Any]
) -> None:
    change()
    assert changes() == changed
    assert in_thread(changes) == {}


@each_setting
def test_context_restores_on_exit(
    change: Callable[[], settings.Setting], changed: dict[str, Any]
) -> None:
    with change():
        assert changes() == changed
    assert changes() == {}


@each_setting
def test_context_restores_after_an_exception(
    change: Callable[[], settings.Setting], changed: dict[str, Any]
) -> None:
    with pytest.raises(KeyError), change():
        raise KeyError
    assert changes() == {}


def test_contexts_nest() -> None:
    with triton_gn.backend("torch"):
        with triton_gn.backend("triton"):
            assert changes() == {"backend": "triton"}
        assert changes() == {"backend": "torch"}


def test_context_restores_only_what_it_set() -> None:
    with triton_gn.backend("torch"):
        triton_gn.batch_invariant()
        triton_gn.backend("triton")
    assert changes() == {"batch_invariant": True}


def test_another_threads_changes_stay_there() -> None:
    in_thread(lambda: triton_gn.backend("torch"))
    assert changes() == {}


def test_settings_can_be_switched_off() -> None:
    triton_gn.batch_invariant()
    triton_gn.plan_override(rows=8)
    triton_gn.batch_invariant(False)
    triton_gn.plan_override()
    assert changes() == {}


def test_threads_start_from_the_environment() -> None:
    result = python(
        "import threading, triton_gn\n"
        "from triton_gn.ops.settings import current\n"
        "print(current().backend)\n"
        "triton_gn.backend('triton')\n"
        "threading.Thread(target=lambda: print(current().backend)).start()",
        TRITON_GN_BACKEND="torch",
    )
    assert result.stdout.split() == ["torch", "torch"], result.stderr


def test_unknown_backend_in_the_environment_is_refused() -> None:
    result = python("import triton_gn", TRITON_GN_BACKEND="cuda")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == (
        "ValueError: TRITON_GN_BACKEND: the backend must be one of auto, triton, torch; got 'cuda'."
    )


@pytest.mark.parametrize("name", ["cuda", "Torch", "", None])
def test_unknown_backend_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=f"one of auto, triton, torch; got {name!r}"):
        triton_gn.backend(name)
    assert changes() == {}


@pytest.mark.parametrize("name", ["float32", "Keep", "", None])
def test_unknown_autocast_policy_is_refused(name: Any) -> None:
    message = f"autocast_policy: the policy must be one of torch, keep; got {name!r}"
    with pytest.raises(ValueError, match=message):
        triton_gn.autocast_policy(name)
    assert changes() == {}


def test_unknown_override_is_refused() -> None:
    message = "unknown field stages, warps; fields are strategy, groups, rows, cols, num_warps"
    with pytest.raises(TypeError, match=message):
        triton_gn.plan_override(warps=4, stages=2, rows=8)
    assert changes() == {}


@pytest.mark.parametrize("affine", [False, True])
def test_triton_backend_refuses_the_cpu(affine: bool) -> None:
    x = torch.randn(2, 6, 5)
    parameter = torch.ones(6) if affine else None
    message = 'on the CPU, where kernels run only under TRITON_INTERPRET=1.*backend\\("auto"\\)'
    with triton_gn.backend("triton"), pytest.raises(RuntimeError, match=message):
        triton_gn.group_norm(x, 2, parameter, parameter)


def test_torch_backend_works() -> None:
    x = torch.randn(2, 6, 5)
    with triton_gn.backend("torch"):
        assert torch.equal(triton_gn.group_norm(x, 2), torch.group_norm(x, 2))


@pytest.fixture
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that TRITON_INTERPRET=1 is set; explain() launches nothing."""
    monkeypatch.setattr(settings, "INTERPRETED", True)


def test_explain_says_why_there_are_no_kernels() -> None:
    with triton_gn.plan_override(rows=1, cols=32, num_warps=2):
        explanation = triton_gn.explain(torch.empty(4, 64, 8, 8), 32)
    assert explanation.path == "torch"
    assert str(explanation) == (
        "torch path, forward: the input is on the CPU, where kernels run only under "
        "TRITON_INTERPRET=1; the kernels would run\n"
        "resident on NVIDIA H100 80GB HBM3: 128 programs of 2 warps, each 4 fragments of 1 x 32"
    )


@pytest.mark.usefixtures("kernels_on_the_cpu")
@pytest.mark.parametrize(
    ("shape", "override", "expected"),
    [
        ((4, 64, 8, 8), {}, r"triton path, forward: groups of 128 elements stay on chip\nresident"),
        (
            (1, 64, 128, 128),
            {},
            r"groups of 32768 elements; resident is estimated at [\d.]+ us, "
            r"split is estimated at [\d.]+ us\n",
        ),
        (
            (1, 32, 512, 512),
            {},
            r"groups of 262144 elements; split is estimated at [\d.]+ us\n"
            r"split on .*, \d+ splits? a group$",
        ),
        (
            (4, 64, 8, 8),
            {"strategy": "split"},
            r"plan_override\(strategy='split'\)\nsplit on .*, 1 split a group$",
        ),
        (
            (4, 64, 60, 60),
            {"strategy": "pipelined"},
            r"\npipelined on .*\nno GPU has proven plans of this kind yet$",
        ),
    ],
)
def test_explain_gives_strategy_and_reason(
    shape: tuple[int, ...], override: dict[str, Any], expected: str
) -> None:
    with triton_gn.plan_override(**override):
        explanation = triton_gn.explain(torch.empty(shape), 32)
    assert explanation.path == "triton"
    assert re.search(expected, str(explanation)), explanation


def test_explain_follows_the_settings() -> None:
    def config(n: int) -> Config:
        return triton_gn.explain(torch.empty(n, 320, 256, 256, device="meta"), 32).config

    assert config(1) != config(64)
    with triton_gn.batch_invariant():
        assert config(1) == config(64)
    with triton_gn.plan_override(num_warps=2):
        assert config(1).num_warps == 2


@pytest.mark.usefixtures("kernels_on_the_cpu")
def test_explain_says_that_the_backend_is_torch() -> None:
    with triton_gn.backend("torch"):
        explanation = triton_gn.explain(torch.empty(2, 6, 5), 2)
    assert explanation.path == "torch"
    assert explanation.reason == 'the backend is "torch"; the kernels would run'


def test_explain_describes_the_backward_and_the_layout() -> None:
    x = torch.empty(2, 6, 4, 5).to(memory_format=torch.channels_last)
    explanation = triton_gn.explain(x, 3, direction="backward")
    assert explanation.problem == Problem("backward", 2, 6, 3, 20, "float32", channels_last=True)
    assert str(explanation).startswith("torch path, backward: ")


@pytest.mark.parametrize(
    ("x", "num_groups", "direction", "message"),
    [
        (torch.empty(0, 6, 5), 2, "forward", r"explain: .*empty input .*got shape \(0, 6, 5\)"),
        (torch.empty(2, 6, 5), 2, "sideways", "explain: .*forward or backward; got 'sideways'"),
        (torch.empty(2, 6, 5), 4, "forward", "6 channels cannot be split into 4 groups"),
    ],
)
def test_explain_refuses(x: Tensor, num_groups: int, direction: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        triton_gn.explain(x, num_groups, direction=direction)
