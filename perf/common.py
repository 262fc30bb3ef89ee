"""Flags, origins of records and tables that several commands share."""

import argparse
import platform
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from perf.records import FIGURES, PREDICTED, RESULTS
from triton_gn.plan import Device
from triton_gn.tools import stopwatch
from triton_gn.tools.provenance import output_of, provenance
from triton_gn.tools.stopwatch import Times
from triton_gn.tools.workloads import Workload

WORKLOADS = Path(__file__).with_name("workloads.csv")
NO_ROOM = "the GPU has no room for it beside its answer in float64"
_ROOT = Path(__file__).parents[1]


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the folder of the results."""
    text = f"default: {RESULTS}/<GPU>; for predictions {PREDICTED}/<GPU>"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=text)


def current_gpu(remedy: str) -> torch.device:
    """Return the GPU to time on.

    Raises:
        ValueError: there is none; the message has a command that needs none.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "kernels are timed on a GPU, but torch.cuda.is_available() is False here. "
            f"Without one, there is `{remedy}`."
        )
    return torch.device("cuda", torch.cuda.current_device())


def interrupted() -> int:
    """Say how to resume, and return the exit status of Ctrl-C."""
    print("Interrupted: rerun the same command to resume.", file=sys.stderr)
    return 130


def matches(workload: Workload, text: str) -> bool:
    """Return whether the name or the shape of a workload contains a text."""
    return text.lower() in f"{workload.name} {workload.shape_text}".lower()


def listed(text: str, allowed: Iterable[str]) -> list[str]:
    """Return the names in "a,b", in the order of the allowed ones."""
    names, wanted = list(allowed), text.split(",")
    if unknown := sorted(set(wanted) - set(names)):
        raise ValueError(f"names must be of {', '.join(names)}; got {', '.join(unknown)}.")
    return [name for name in names if name in wanted]


def origin(command: str, device: Device, measured: bool) -> dict[str, Any]:
    """Return the fields that all records of a run share."""
    known = provenance()
    names = ("driver", "runtime", "torch", "triton", "triton_gn")
    versions = {name: known[name] for name in names if known[name]}
    return {
        "command": command,
        "measured": measured,
        "device": device.name,
        "versions": {"python": platform.python_version()} | versions,
        "commit": commit(known["commit"]),
    }


def commit(name: str) -> str:
    """Append "-dirty" to a commit if files other than results and figures have changed."""
    status = "git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no", "--"
    changed = name and output_of(*status, ".", f":!{RESULTS}", f":!{FIGURES}")
    return f"{name}-dirty" if changed else name


def now() -> str:
    """Return the date and time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def fields_of_workload(workload: Workload) -> dict[str, Any]:
    """Return the fields of a record that describe a workload."""
    names = "groups", "dtype", "param_dtype", "layout", "activation", "fused"
    same = {name: getattr(workload, name) for name in names}
    return {"workload": workload.name, "shape": workload.shape_text} | same


def fields_of_times(times: Times, cold: bool) -> dict[str, Any]:
    """Return the fields of a record that describe times."""
    protocol = stopwatch.protocol(cold)
    if not times.graphed:
        protocol += "; this call without a graph, so that the host's time may be in it"
    return {"ms_p20": times.p20, "ms_p50": times.p50, "ms_p80": times.p80, "protocol": protocol}


def table(left: Sequence[str], right: Sequence[str], **options: Any) -> Table:
    """Return an empty table with columns of text and columns of numbers."""
    values: dict[str, Any] = {"box": SIMPLE_HEAD, "show_edge": False} | options
    empty = Table(**values)
    for title in left:
        empty.add_column(Text(title))
    for title in right:
        empty.add_column(Text(title), justify="right")
    return empty
