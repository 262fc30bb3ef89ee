"""Compile plans for any GPU, present or not, and report what their kernels become."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from triton_gn.plan import TARGETS, UNVERIFIED, fields_of, heuristic_plan, plan_unverified
from triton_gn.tools import inspection, workloads
from triton_gn.tools.inspection import Case, Failure, Inspection
from triton_gn.tools.workloads import Workload

if TYPE_CHECKING:
    from rich.table import Table

_KERNEL_COLUMNS = {
    "grid": "grid", "warps": "num_warps", "registers": "registers", "spilled": "spill_bytes",
    "shared": "shared_bytes", "CTAs/SM": "ctas_per_multiprocessor", "waves": "waves",
    "instructions/element": "instructions",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``python -m triton_gn inspect``."""
    workloads.add_arguments(parser, direction="forward")
    parser.add_argument(
        "--target", choices=TARGETS, default="sm_90", help="the GPU to compile for (sm_90: an H100)"
    )
    parser.add_argument(
        "--allow-unverified",
        action="store_true",
        help="let the heuristic choose strategies that no GPU has proven yet",
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON for each direction")


def run(options: argparse.Namespace) -> int:
    """Inspect what the flags ask for; return 1 if a plan does not compile or a kernel spills."""
    choose = plan_unverified if options.allow_unverified else heuristic_plan
    device = TARGETS[options.target]
    cases = [
        Case(workload, problem, options.target, choose(problem, device))
        for workload in workloads.from_arguments(options)
        for problem in map(workload.problem, workloads.directions_of(options))
    ]
    results = list(_printed(inspection.inspect_all(cases), len(cases), options.json))
    if len(cases) > 1:
        print(Totals.of(results), file=sys.stderr)
    if len(cases) > 1 and not options.allow_unverified:
        allowed = [
            Case(case.workload, case.problem, case.target, plan_unverified(case.problem, device))
            for case in cases
        ]
        total = _summed(map(inspection.traffic, allowed))
        print(f"all, were {', '.join(UNVERIFIED)} allowed: {_ratios(total)}", file=sys.stderr)
    return int(any(isinstance(result, Failure) or result.spill_bytes for result in results))


def _printed(
    results: Iterable[Inspection | Failure], count: int, as_json: bool
) -> Iterator[Inspection | Failure]:
    """Yield the results, each printed as soon as it is there."""
    if as_json:
        for result in results:
            print(json.dumps(result.to_json()), flush=True)
            yield result
        return
    from rich.console import Console

    table = _summary()
    for result in inspection.tracked(results, count, "compiling"):
        if count > 1 or isinstance(result, Failure):
            table.add_row(*_row(result))
        else:
            _print_details(result)
        yield result
    if table.rows:
        Console().print(table)


def _print_details(result: Inspection) -> None:
    from rich.console import Console
    from rich.table import Table

    device, estimate = result.device, result.estimate
    fields = ", ".join(f"{name} {value}" for name, value in fields_of(result.config).items())
    print(
        f"{_described(result.workload)}, {result.problem.direction}\n"
        f"for {device.name} ({result.target}): {device.multiprocessors} multiprocessors, "
        f"{device.l2_bytes >> 20} MiB of L2, {device.dram_gb_per_s} GB/s of DRAM\n"
        f"plan: {fields}"
    )
    table = Table("kernel")
    for title in _KERNEL_COLUMNS:
        table.add_column(title, justify="right")
    for kernel in result.kernels:
        values = result.kernel_json(kernel)
        cells = (values[name] for name in _KERNEL_COLUMNS.values())
        table.add_row(kernel.name, *("-" if cell is None else str(cell) for cell in cells))
    Console().print(table)
    for kernel in result.kernels:
        widths = ", ".join(f"{name} {size}" for name, size in kernel.access_bytes.items())
        print(f"bytes per access of {kernel.name}: {widths}")
    moved = f"{result.bytes_moved / 1e6:.2f} MB, {result.bytes_moved / result.bytes_minimum:.2f}"
    print(
        f"moves {moved} of the minimum; {estimate.dram_bytes / 1e6:.2f} MB of them from or to "
        f"DRAM\npredicted, not measured: {estimate.us:.1f} us, bound by {estimate.bound}"
    )


def _described(workload: Workload) -> str:
    fused = "".join(f" + {name}" for name in workload.fused)
    return (
        f"{workload.shape_text}, {workload.groups} groups, {workload.dtype}, {workload.layout}, "
        f"{workload.activation}{fused}"
    )


def _summary() -> "Table":
    from rich.table import Table

    titles = "workload", "direction", "strategy", "bound"
    table = Table(*titles, caption="times are predicted, not measured")
    for title in ("registers", "spilled", "bytes/access", "bytes/minimum", "us"):
        table.add_column(title, justify="right")
    return table


def _row(result: Inspection | Failure) -> list[str]:
    head = [_described(result.workload), result.problem.direction]
    if isinstance(result, Failure):
        return [*head, result.error.splitlines()[0]]
    return [
        *head,
        result.config.strategy,
        result.estimate.bound,
        str(result.registers),
        str(result.spill_bytes),
        f"{result.access_bytes} of {result.widest_access_bytes}",
        f"{result.bytes_moved / result.bytes_minimum:.2f}",
        f"{result.estimate.us:.1f}",
    ]


_Bytes = tuple[int, int, int]  # minimum, moved, DRAM


@dataclass(frozen=True)
class Totals:
    """Counts and bytes of many inspections; prints as text."""

    plans: int
    failures: int
    spills: int
    narrow: int
    converted: int
    bytes_of_all: _Bytes
    bytes_of_one_tile: _Bytes  # plans whose groups fit one program
    one_tile: int

    @classmethod
    def of(cls, results: Sequence[Inspection | Failure]) -> Self:
        """Add the inspections up."""
        compiled = [result for result in results if isinstance(result, Inspection)]
        one_tile = [result for result in compiled if result.fits_one_program]
        return cls(
            len(results),
            len(results) - len(compiled),
            sum(result.spill_bytes > 0 for result in compiled),
            sum(result.access_bytes < result.widest_access_bytes for result in compiled),
            sum(result.converted_tiles > 0 for result in compiled),
            _summed(map(_bytes_of, compiled)),
            _summed(map(_bytes_of, one_tile)),
            len(one_tile),
        )

    def __str__(self) -> str:
        return (
            f"{self.plans} plans: {self.failures} do not compile, {self.spills} spill, "
            f"{self.narrow} have accesses narrower than their shape allows, "
            f"{self.converted} convert fragments to another layout\n"
            f"{self.one_tile} whose tile fits one program: {_ratios(self.bytes_of_one_tile)}\n"
            f"all: {_ratios(self.bytes_of_all)}"
        )


def _bytes_of(result: Inspection) -> _Bytes:
    return result.bytes_minimum, result.bytes_moved, result.estimate.dram_bytes


def _summed(counts: Iterable[_Bytes]) -> _Bytes:
    minimum, moved, dram = map(sum, zip((0, 0, 0), *counts, strict=True))
    return minimum, moved, dram


def _ratios(total: _Bytes) -> str:
    minimum, moved, dram = total
    if not minimum:
        return "none"
    return (
        f"{moved / 1e9:.2f} GB moved, {moved / minimum:.3f} of the minimum; "
        f"{dram / 1e9:.2f} GB of DRAM, {dram / minimum:.3f}"
    )
