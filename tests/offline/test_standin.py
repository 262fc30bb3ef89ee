"""Run whole calls without a GPU, on a stand-in driver (tests/support/standin)."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.standin import gpu

pytest.importorskip("triton", reason="launches")

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the driver; return its folder, which also holds what Triton compiles for it."""
    folder = tmp_path_factory.mktemp("standin")
    gpu.build(folder)
    return folder


def run(library: Path, *scenario: str, **environment: str) -> str:
    """Run a scenario in a process of its own, and return its output."""
    paths = {"TRITON_LIBCUDA_PATH": library, "TRITON_CACHE_DIR": library / "cache"}
    known = os.environ | {name: str(path) for name, path in paths.items()} | environment
    known["LD_LIBRARY_PATH"] = f"{library}:{known.get('LD_LIBRARY_PATH', '')}"
    command = (sys.executable, "-m", "tests.support.standin.scenarios", *scenario)
    done = subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


LAYOUTS, DTYPES = ("contiguous", "channels_last"), ("float32", "bfloat16")


@pytest.mark.parametrize("strategy", ["resident", "split"])
@pytest.mark.parametrize(
    ("layout", "dtype", "fused"),
    [
        (layout, dtype, ("plain", "fused")[(i + j) % 2])
        for (i, layout), (j, dtype) in itertools.product(enumerate(LAYOUTS), enumerate(DTYPES))
    ],
)
def test_calls(library: Path, strategy: str, layout: str, dtype: str, fused: str) -> None:
    run(library, "calls", strategy, layout, dtype, fused)


@pytest.mark.parametrize("strategy", ["resident", "split"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_tensors(library: Path, strategy: str, dtype: str) -> None:
    run(library, "misaligned", strategy, dtype)


@pytest.mark.parametrize("kind", ["step", "expanded", "unbind", "transposed"])
def test_strided_parameters(library: Path, kind: str) -> None:
    run(library, "strided", kind)


@pytest.mark.parametrize("scenario", ["handles", "captured", "counted", "tune", "bench"])
def test_scenarios(library: Path, scenario: str) -> None:
    run(library, scenario)


@pytest.mark.parametrize("how", ["no compiler", "no image"])
def test_refused(library: Path, how: str, tmp_path: Path) -> None:
    run(library, "refused", how, TRITON_CACHE_DIR=str(tmp_path))


def test_warmup_compiles_all_that_a_step_needs(library: Path, tmp_path: Path) -> None:
    run(library, "warmed", TRITON_CACHE_DIR=str(tmp_path))
