"""The file of workloads: what its core covers."""

import csv
import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest

from perf import (
    common,
)
from triton_gn.plan import TARGETS, heuristic_plan
from triton_gn.tools import workloads
from triton_gn.tools.workloads import DTYPES, LAYOUTS, Workload

H100 = TARGETS["sm_90"]
CORE = [workload for workload in workloads.read(common.WORKLOADS) if workload.core]


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
    assert any(REGIMES[regime](workload) for workload in CORE)
