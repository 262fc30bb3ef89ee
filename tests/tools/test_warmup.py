"""warmup foresees the kernels of a step without running it, and compiles each once."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_gn
from triton_gn.__main__ import main
from triton_gn.tools import warmup as tool
from triton_gn.tools.model import foreseen

pytest.importorskip("triton", reason="compiles")


def make_model() -> nn.Sequential:
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.GroupNorm(4, 16)
    model = nn.Sequential(*layers)
    triton_gn.convert(model)
    return model


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that would be compiled."""
    names: list[str] = []

    def record(launch: Any, target: str) -> None:
        names.append(launch.kernel.__name__)

    monkeypatch.setattr(tool, "compile_into_cache", record)
    return names


def test_each_kernel_of_a_step_is_compiled_once(compiled: list[str]) -> None:
    model, x = make_model(), torch.randn(2, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcome = triton_gn.warmup(model, x, target="sm_90", processes=1)
    assert outcome.calls == 4  # two norms, forward and backward
    assert len(compiled) == outcome.kernels
    assert {name.split("_")[2] for name in compiled} >= {"forward", "backward"}
    assert str(outcome).startswith(f"{outcome.kernels} of {outcome.kernels} kernels for 4 calls")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model[0].weight) is nn.Parameter
    assert model(x).isfinite().all()


def test_inference_needs_the_forward_alone(compiled: list[str]) -> None:
    with torch.no_grad():
        outcome = triton_gn.warmup(
            make_model(), torch.randn(2, 3, 8, 8), target="sm_90", processes=1
        )
    assert outcome.calls == 2
    assert all("forward" in name for name in compiled)


def test_functions_and_keyword_arguments(compiled: list[str]) -> None:
    def function(x: Tensor, *, residual: Tensor) -> Tensor:
        return triton_gn.group_norm(x, 4, residual=residual, activation="relu")

    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    assert triton_gn.warmup(function, x, residual=x, target="sm_80", processes=1).calls == 2
    (forward, backward) = foreseen(function, (x,), {"residual": x})
    assert (forward.direction, backward.direction) == ("forward", "backward")
    assert x.grad is None


def test_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of registers")

    monkeypatch.setattr(tool, "compile_into_cache", fail)
    outcome = triton_gn.warmup(make_model(), torch.randn(2, 3, 8, 8), target="sm_90", processes=1)
    assert str(outcome).startswith(f"0 of {outcome.kernels} kernels")
    assert "RuntimeError: out of registers" in str(outcome)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_target_is_needed() -> None:
    with pytest.raises(ValueError, match=r"False here\. Name another with target, one of sm_75"):
        triton_gn.warmup(make_model(), torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="is False here"):
        triton_gn.tune(make_model(), torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="candidates must be at least 2; got 1"):
        triton_gn.tune(make_model(), torch.randn(2, 3, 8, 8), candidates=1)


def test_unknown_target_and_model_without_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the target must be one of .*; got 'sm_1'"):
        triton_gn.warmup(make_model(), torch.randn(2, 3, 8, 8), target="sm_1")
    with pytest.raises(ValueError, match=r"no kernel .* Remedy: call triton_gn\.convert\(model\)"):
        triton_gn.warmup(nn.ReLU(), torch.randn(2), target="sm_90")


def test_command_compiles_in_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_to_warm.py").write_text(
        "import torch, triton_gn\n"
        "def make():\n"
        "    return triton_gn.GroupNorm(2, 8), {'input': torch.randn(2, 8, 4, 4)}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}")
    flags = "--model", "model_to_warm:make", "--target", "sm_90", "--processes", "2"
    assert main(["warmup", *flags]) == 0
    assert " of " in capsys.readouterr().out
    names = {path.stem for path in (tmp_path / "cache").rglob("*.cubin")}
    assert {"group_norm_forward_resident_kernel", "group_norm_backward_resident_kernel"} <= names
