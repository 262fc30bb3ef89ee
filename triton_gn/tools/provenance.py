"""Record where times come from: versions, commit, protocol."""

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton

import triton_gn
from triton_gn.tools import stopwatch


def provenance() -> dict[str, str]:
    """Return the versions, the commit and the protocol behind the times of this process."""
    package = Path(triton_gn.__file__).parent
    is_checkout = (package.parent / ".git").exists()  # not a repository around site-packages
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "driver": driver.partition("\n")[0],
        "runtime": torch.version.cuda or torch.version.hip or "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "triton_gn": triton_gn.__version__,
        "commit": output_of("git", "-C", str(package), "rev-parse", "HEAD") if is_checkout else "",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol": stopwatch.protocol(cold=True),
    }


def output_of(*command: str) -> str:
    """Return what a command prints; empty if it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
