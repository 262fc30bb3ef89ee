"""Compare the machine code of triton_gn's kernels with that of its peers', without a GPU.

Kernels are compiled for a GPU that need not be present, and their instructions counted. A loop
counts as often as a program executes it. Peers read contiguous tensors and fuse no activation.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from perf import common, compare, evidence, peers
from perf.records import OURS
from perf.standin import StandIn, active
from triton_gn.plan import TARGETS, plan
from triton_gn.tools import sass, workloads
from triton_gn.tools.compile import cache_key, cubin_of, main_loop_iterations, nvidia_usage
from triton_gn.tools.inspection import launches_of, tracked
from triton_gn.tools.workloads import DIRECTIONS, Workload

COMMAND = "machine-code"
PLAIN = f"{OURS}, unfused"  # what peers do
TARGET = "sm_90"
# a tile of more elements takes ptxas minutes, and spills nearly all of them
MAX_PEER_TILE = 2**17
_THREADS = 32  # of a warp
_HANDLES = 9  # grid, stream, function, metadata and hooks come before a kernel's own arguments


@dataclass(frozen=True)
class Code:
    """One kernel: ``loops`` and ``instructions`` are executed for each element of x by a thread."""

    name: str
    registers: int
    spill_bytes: int
    barriers: int
    shuffles: int
    loads_first: int  # loads from global memory before the first barrier
    loops: float
    instructions: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--workloads", type=Path, default=common.WORKLOADS, metavar="FILE")
    parser.add_argument("--match", default="", metavar="TEXT", help="only names or shapes with it")
    parser.add_argument(
        "--compare", metavar="REVISION", help="a git revision: print the differences from it"
    )
    text = "default: perf/results, unless --match is given"
    parser.add_argument("--out", type=Path, metavar="FILE", help=text)
    parser.add_argument("--ours", action="store_true", help="without peers")


def run(options: argparse.Namespace) -> int:
    """Compile, print and write the record; return the exit status.

    Raises:
        ValueError: the flags name no workload, or a revision that does not have this command.
    """
    start = time.monotonic()
    rows = measure(options)
    seconds = time.monotonic() - start
    out = options.out or (None if options.match else evidence.path_of(COMMAND))
    if out is not None:
        kernels = evidence.fingerprint_of_kernels()
        evidence.save(COMMAND, out, seconds, target=TARGET, kernels=kernels, rows=rows)
    evidence.show(*tables(rows), *totals(rows), peers.how_to_install())
    if options.compare:
        evidence.show(*differences(rows_of_revision(options), rows))
    evidence.show(f"{seconds:.0f} s" + (f"; written to {out}" if out else ""))
    return 0


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each workload, direction and implementation."""
    layers = [w for w in workloads.read(options.workloads) if w.core]
    layers = [layer for layer in layers if common.matches(layer, options.match)]
    if not layers:
        raise ValueError(f"--match must name core workloads; got {options.match!r}.")
    others = [] if options.ours else [peer.name for peer in peers.installed()]
    tasks: list[Callable[[], list[dict[str, Any]]]] = [
        *(partial(rows_of_ours, layer) for layer in layers),
        *(partial(rows_of_peer, name, layer) for name in others for layer in layers),
    ]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        done = tracked(pool.map(_call, tasks), len(tasks), "Compiling")
        return [row for rows in done for row in rows]


def _call(task: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return task()


def rows_of_ours(layer: Workload) -> list[dict[str, Any]]:
    """Compile the default plans of a layer and, if it fuses anything, of the layer without that."""
    rows = _rows_of_plans(layer, OURS)
    plain = replace(layer, activation="none", fused=())
    return rows if plain == layer else [*rows, *_rows_of_plans(plain, PLAIN)]


def _rows_of_plans(layer: Workload, name: str) -> list[dict[str, Any]]:
    rows = []
    for direction in DIRECTIONS:
        problem = layer.problem(direction)
        config = plan(problem, TARGETS[TARGET])
        _, launches = launches_of(layer, problem, config)
        codes = []
        for launch in launches:
            iterations = main_loop_iterations(launch)
            if iterations is None:
                continue  # sums of partial gradients at the end
            path = sass.main_path(sass.disassembled(cubin := cubin_of(launch, TARGET)))
            repeated = len(sass.main_loop(path))
            threads = config.programs(problem) * _THREADS * launch.num_warps
            count = [n * threads / x_elements(layer) for n in executed(path, repeated, iterations)]
            codes.append(code_of(launch.kernel.__name__, cubin, path, *count))
        row = {"strategy": config.strategy, "launches": digest_of(launches)}
        rows.append(_row(layer, direction, name) | row | {"codes": list(map(asdict, codes))})
    return rows


def executed(path: Sequence[object], repeated: int, iterations: int) -> tuple[int, int]:
    """Return instructions in loops and in all, if ``repeated`` of a path are in loops."""
    return repeated * iterations, len(path) + repeated * (iterations - 1)


def digest_of(launches: Sequence[Any]) -> str:
    """Return a digest of what Triton would compile for launches, besides the kernels' source."""
    keys = [(launch.grid, *cache_key(launch, TARGET)) for launch in launches]
    return hashlib.sha256(repr(keys).encode()).hexdigest()[:16]


def code_of(
    name: str, cubin: bytes, path: Sequence[sass.Instruction], loops: float, instructions: float
) -> Code:
    """Count what a kernel's main path has."""
    names = [instruction.name.partition(".")[0] for instruction in path]
    first = names.index("BAR") if "BAR" in names else len(names)
    loads = sum(one in ("LDG", "LDGSTS") for one in names[:first])
    counts = names.count("BAR"), names.count("SHFL"), loads
    return Code(name, *nvidia_usage(cubin), *counts, round(loops, 1), round(instructions, 1))


class _Compiler(StandIn):
    """A driver that keeps the machine code of the kernels that it is given."""

    def load_binary(self, name: str, *rest: Any) -> tuple[None, Any, int, int, int]:
        _, _, registers, spills, threads = super().load_binary(name, *rest)
        return None, (name, rest[0]), registers, spills, threads


def rows_of_peer(name: str, layer: Workload) -> list[dict[str, Any]]:
    """Compile a peer's kernels as its launchers launch them on a layer."""
    (peer,) = (peer for peer in peers.PEERS if peer.name == name)
    x, weight, bias = (t for t in layer.operands("meta")[:3] if t is not None)
    x = x.reshape(*x.shape[:2], -1).contiguous()
    n, channels, pixels = x.shape
    tile = peer.tile(n, channels, pixels, layer.groups)
    if tile > MAX_PEER_TILE:
        fields = {"tile": tile, "codes": []}
        return [_row(layer, direction, name) | fields for direction in DIRECTIONS]
    codes: list[Code] = []

    def launched(*handed: Any) -> None:
        kernel, cubin = handed[4]
        arguments = peer.arguments(kernel, handed[_HANDLES:])
        loops = peer.loop_iterations.get(kernel)
        iterations = loops(arguments) if loops else 1
        path = sass.main_path(sass.disassembled(cubin))
        repeated = sum(map(len, sass.innermost_loops(path)))
        threads = handed[0] * handed[1] * handed[2] * _THREADS * handed[5][0]
        count = [n * threads / x_elements(layer) for n in executed(path, repeated, iterations)]
        codes.append(code_of(kernel, cubin, path, *count))

    with active(launched, _Compiler):
        _, saved = peer.forward(x, layer.groups, weight, bias)
        forward = len(codes)
        peer.backward(torch.empty_like(x), saved)
    return [
        _row(layer, direction, name) | {"codes": list(map(asdict, part))}
        for direction, part in zip(DIRECTIONS, (codes[:forward], codes[forward:]), strict=True)
    ]


def x_elements(layer: Workload) -> int:
    """Return the number of elements of x."""
    return torch.Size(layer.shape).numel()


def _row(layer: Workload, direction: str, implementation: str) -> dict[str, Any]:
    fields = common.fields_of_workload(layer) | {"direction": direction}
    return fields | {"implementation": implementation}


NUMBERS = ("registers", "spills", "barriers", "shuffles", "loads first", "in loops", "in all")


def numbers(row: dict[str, Any]) -> list[str]:
    """Return a row's cells: kernels of a call joined by "+", instructions summed."""
    fields = "registers", "spill_bytes", "barriers", "shuffles", "loads_first"
    cells = ["+".join(str(code[field]) for code in row["codes"]) for field in fields]
    return [*cells, *(f"{instructions(row, field):.1f}" for field in ("loops", "instructions"))]


def instructions(row: dict[str, Any], field: str = "instructions") -> float:
    """Return the instructions per element of all kernels of a call."""
    total: float = sum(code[field] for code in row["codes"])
    return total


def case(row: dict[str, Any]) -> tuple[str, str]:
    """Return what rows of several implementations share."""
    mark = " CL" if row["layout"] == "channels_last" else ""
    return f"{row['shape']}{mark} {row['dtype']}", row["direction"]


def tables(rows: list[dict[str, Any]]) -> list[Any]:
    """Return a table for each direction, and a note."""
    made: list[Any] = []
    for direction in DIRECTIONS:
        here = [row for row in rows if row["direction"] == direction]
        cells = [
            ["" if i else layer, name, *(numbers(row) if row["codes"] else "-" * len(NUMBERS))]
            for (layer, _), by_name in evidence.grouped(here, case).items()
            for i, (name, row) in enumerate(by_name.items())
        ]
        title = f"Machine code for {TARGET}, {direction}; instructions per element of x"
        made.append(evidence.table(title, ["layer", "implementation"], NUMBERS, cells))
    if any(not row["codes"] for row in rows):
        made.append(f"-: not compiled, a program's tile has more than {MAX_PEER_TILE:,} elements")
    return made


def totals(rows: list[dict[str, Any]]) -> list[str]:
    """Return sentences on the sum over all layers, and on peers where they compile."""
    lines = []
    for direction in DIRECTIONS:
        here = [row for row in rows if row["direction"] == direction]
        cases = list(evidence.grouped(here, case).values())
        total = sum(instructions(by_name[OURS]) for by_name in cases)
        lines.append(f"{direction}: {total:.1f} instructions per element, {len(cases)} layers")
        for name in sorted({row["implementation"] for row in here} - {OURS, PLAIN}):
            ratios = [
                instructions(by_name[name]) / instructions(by_name.get(PLAIN, by_name[OURS]))
                for by_name in cases
                if by_name[name]["codes"]
            ]
            fewer = sum(ratio < 1 for ratio in ratios)
            lines.append(
                f"    {name}: {geometric_mean(ratios):.2f} times as many as {PLAIN}, at the "
                f"geometric mean of {len(ratios)} layers; fewer on {fewer}"
            )
    return lines


def rows_of_revision(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run this command in a worktree of a git revision, and return its rows of triton_gn."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        flags = [
            "--ours",
            "--match",
            options.match,
            "--workloads",
            str(options.workloads.resolve()),
        ]
        command = [sys.executable, "-m", "perf", COMMAND, *flags, "--out", str(out)]
        with compare.worktree(options.compare, Path(folder) / "tree"):
            compare.run_command(command, Path(folder) / "tree")
        rows: list[dict[str, Any]] = evidence.load(COMMAND, out)["rows"]
        return rows


def differences(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[Any]:
    """Return a table of the layers whose numbers differ, and the sums of both revisions."""
    before = {case(row): row for row in old if row["implementation"] == OURS}
    after = {case(row): row for row in new if row["implementation"] == OURS}
    common_cases = [key for key in after if key in before]
    cells = []
    for key in common_cases:
        pairs = list(zip(numbers(before[key]), numbers(after[key]), strict=True))
        if any(a != b for a, b in pairs):
            cells.append([*key, *("" if a == b else f"{a} → {b}" for a, b in pairs)])
    sums = []
    for direction in DIRECTIONS:
        keys = [key for key in common_cases if key[1] == direction]
        a, b = (sum(instructions(rows[key]) for key in keys) for rows in (before, after))
        if keys:
            sums.append(f"{direction}: {a:.1f} → {b:.1f} instructions, {100 * (b / a - 1):+.1f} %")
    title = f"What differs, in {len(cells)} of {len(common_cases)} calls"
    return [evidence.table(title, ["layer", "direction"], NUMBERS, cells), *sums]


def stale(record: dict[str, Any]) -> list[str]:
    """Return what has changed since a record was made: device code, and plans of layers."""
    changes = []
    if record["kernels"] != evidence.fingerprint_of_kernels():
        changes.append("the kernels")
    digests = {
        case(row): row["launches"] for row in record["rows"] if row["implementation"] == OURS
    }
    layers = [layer for layer in workloads.read(common.WORKLOADS) if layer.core]
    for layer in layers:
        for direction in DIRECTIONS:
            key = case(_row(layer, direction, OURS))
            problem = layer.problem(direction)
            _, launches = launches_of(layer, problem, plan(problem, TARGETS[TARGET]))
            if digests.get(key) != digest_of(launches):
                changes.append(f"the plan of {key[0]}, {direction}")
    return changes
