"""The examples run and say what they should."""

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triton_gn

ROOT = Path(__file__).parents[1]


def run_example(name: str, *, without: str = "") -> subprocess.CompletedProcess[str]:
    """Run it in a fresh interpreter, which fails to import the named module."""
    code = (
        "import runpy, sys\n"
        "path, without = sys.argv[1:]\n"
        "sys.modules.update({without: None} if without else {})\n"
        "runpy.run_path(path, run_name='__main__')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "examples" / name), without],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_swap_one_layer() -> None:
    result = run_example("swap_one_layer.py")
    assert result.returncode == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("output", "0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
    ]
    assert last.startswith("Largest difference: ")


def test_convert_diffusers() -> None:
    pytest.importorskip("diffusers")
    result = run_example("convert_diffusers.py")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "21 GroupNorm layers: 21 replaced, of which 17 folded, 0 left"
    assert sum("time embedding as pre_add" in line for line in lines) == 8
    assert lines[-1].startswith("Largest difference: output ")


def test_convert_diffusers_names_what_is_missing() -> None:
    result = run_example("convert_diffusers.py", without="diffusers")
    assert result.returncode == 1
    assert result.stderr.strip().endswith("Remedy: pip install diffusers")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_own_model() -> None:
    result = run_example("tune_own_model.py")
    assert result.returncode == 0, result.stderr
    *plans, last = result.stdout.strip().split("\n\n")
    assert [plan.partition(",")[0] for plan in plans] == [
        "0.body.0",
        "0.body.3",
        "1.body.0",
        "1.body.3",
    ]
    for plan in plans:
        assert re.search(r"forward: .*\n(resident|split) on .*H100.*\n.*backward: .*\n", plan)
        assert ", silu\n" in plan
    assert last == "On a GPU: python -m triton_gn tune --model examples.tune_own_model:make"


def test_factory_of_the_example_can_be_named_to_the_tuner() -> None:
    model, arguments = pkgutil.resolve_name("examples.tune_own_model:make")()
    assert sum(isinstance(layer, triton_gn.GroupNorm) for layer in model.modules()) == 4
    assert model(*arguments).shape == (2, 320, 16, 16)
