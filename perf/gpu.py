"""Run tests, ceilings, the core benchmark, a short tune and the figures on this GPU.

Interrupt at any time; rerun to resume.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from perf import common, records
from perf.implementations import IMPLEMENTATIONS
from perf.records import OURS, folder_of
from triton_gn.ops.device import gpu_of

_PASSED = (0, 5)  # 5: pytest found no test, since all of a file need the interpreter
_SANITIZED = "tests/kernels/test_bits.py"
_MODULES = ("pytest", "xdist", "hypothesis", "numpy", "filelock", "matplotlib")
_NAMES = ",".join(i.name for i in IMPLEMENTATIONS if i.is_fixed or i.name in (OURS, "torch_eager"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--match", default="", metavar="TEXT", help="only steps whose name has it")
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    parser.add_argument("--timeout", type=float, metavar="S", help="time limit of a step")
    common.add_out(parser)


@dataclass(frozen=True)
class Step:
    """A command and its result."""

    name: str
    command: tuple[str, ...]
    commit: str = ""
    status: int | None = None
    seconds: float = 0.0

    def run(self, commit: str, timeout: float | None) -> "Step":
        """Run the command and return the step with its result."""
        print(f"\n=== {self.name}: {shlex.join(self.command)}", flush=True)
        start = time.monotonic()
        # the kernels run on the GPU, not in the interpreter
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        # in a process group of its own, so that its children end with it
        process = subprocess.Popen(self.command, env=environment, start_new_session=True)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - start
        return Step(self.name, self.command, commit, status, round(seconds, 1))


def steps() -> Iterator[Step]:
    """Yield all steps, short ones first."""
    python = sys.executable
    yield Step("ceilings", (python, "-m", "perf", "ceilings"))
    own = Path("tests/gpu/test_gpu.py")
    for path in (own, *sorted(Path("tests/kernels").glob("test_*.py"))):
        # tensors beyond 2**31 elements leave a GPU of 24 GB no room for a second worker
        processes = 1 if path == own else min(8, os.cpu_count() or 1)
        pytest = (python, "-m", "pytest", "-q", "-n", str(processes), str(path))
        yield Step(f"test {path.stem}", pytest)
    if sanitizer := shutil.which("compute-sanitizer"):
        test = (python, "-m", "pytest", "-q", "-k", "same_input", _SANITIZED)
        yield Step("sanitizer", (sanitizer, "--error-exitcode", "1", *test))
    core = ("bench", "--core", "--cache", "cold", "--implementations", _NAMES)
    yield Step("bench", (python, "-m", "perf", *core))
    tune = ("--workloads", "perf/workloads.csv", "--core", "--candidates", "6")
    yield Step("tune", (python, "-m", "triton_gn", "tune", *tune))
    yield Step("host", (python, "-m", "perf", "host"))
    yield Step("plot", (python, "-m", "perf", "plot"))


def run(options: argparse.Namespace) -> int:
    """Run the steps that this commit has not passed yet on this GPU.

    Returns:
        The exit status: 0 if all have passed, 1 if one has not, 130 after Ctrl-C.
    """
    wanted = [step for step in steps() if options.match in step.name]
    if options.list:
        print(*(f"{step.name}: {shlex.join(step.command)}" for step in wanted), sep="\n")
        return 0
    if missing := [name for name in _MODULES if find_spec(name) is None]:
        raise ValueError(
            f"the tests need {', '.join(missing)}, which are not installed. "
            "Remedy: pip install -e '.[test]'"
        )
    gpu = gpu_of(common.current_gpu("python -m perf gpu --list"))
    path = (options.out or folder_of(gpu.name, measured=True)) / "steps.json"
    commit = common.origin("gpu", gpu, measured=True)["commit"]
    done = {step.name: step for step in _read(path) if step.commit == commit}
    interrupted = 0
    try:
        for step in wanted:
            if done.get(step.name, step).status not in _PASSED:
                done[step.name] = step.run(commit, options.timeout)
                text = json.dumps([asdict(step) for step in done.values()], indent=1)
                records.replace(path, f"{text}\n")
    except KeyboardInterrupt:
        interrupted = common.interrupted()
    results = [done.get(step.name, step) for step in wanted]
    report(results, gpu.name)
    return interrupted or int(any(step.status not in _PASSED for step in results))


def _read(path: Path) -> list[Step]:
    if not path.exists():
        return []
    steps = json.loads(path.read_text())
    return [Step(**step | {"command": tuple(step["command"])}) for step in steps]


def report(done: Sequence[Step], device: str) -> None:
    """Print the result of each step."""
    table = common.table(["step"], ["status", "seconds"], title=device)
    words = {None: "not run", 0: "passed", 5: "no tests", 124: "timed out"}
    for step in done:
        status = words.get(step.status, f"failed ({step.status})")
        table.add_row(step.name, status, f"{step.seconds:.0f}" if step.seconds else "")
    Console().print(table)
