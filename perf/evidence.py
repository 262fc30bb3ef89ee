"""Records of what is known without a GPU: a JSON file for each command, committed with the code."""

import ast
import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from perf import common, records
from perf.records import RESULTS
from triton_gn.tools.provenance import provenance

_PACKAGE = Path(__file__).parents[1] / "triton_gn"
_VERSIONS = ("torch", "triton", "numpy", "liger-kernel", "flag-gems")


def path_of(command: str) -> Path:
    """Return where the record of a command lies."""
    return RESULTS / f"{command}.json"


def save(command: str, path: Path, seconds: float, **content: Any) -> None:
    """Write a record: where it comes from, how long it took, and its content."""
    known = provenance()
    origin = {
        "command": f"python -m perf {command}",
        "date": common.now(),
        "commit": common.commit(known["commit"]),
        "versions": {"python": platform.python_version()} | dict(_installed_versions()),
        "cpu": platform.machine(),
        "seconds": round(seconds),
    }
    lines = ",\n".join(f"{json.dumps(k)}: {_lines(v)}" for k, v in (origin | content).items())
    records.replace(path, f"{{\n{lines}\n}}\n")


def _installed_versions() -> Iterator[tuple[str, str]]:
    for name in _VERSIONS:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _lines(value: Any) -> str:
    """Return JSON in which each item of a list of objects has its own line."""
    if isinstance(value, list):
        return "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n]"
    return json.dumps(value)


def load(command: str, path: Path | None = None) -> dict[str, Any]:
    """Read the record of a command.

    Raises:
        ValueError: there is none.
    """
    path = path or path_of(command)
    if not path.exists():
        raise ValueError(f"there must be a record {path}. Remedy: `python -m perf {command}`.")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def fingerprint_of_kernels() -> str:
    """Return a digest of the device code that comments, docstrings and formatting do not change."""
    digest = hashlib.sha256()
    for file in sorted((*(_PACKAGE / "kernels").glob("*.py"), _PACKAGE / "activations.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and _docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def _docstring(node: ast.Module | ast.FunctionDef | ast.ClassDef) -> str | None:
    return ast.get_docstring(node, clean=False)


def table(
    title: str, left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[object]]
) -> Table:
    """Return a table with columns of text and columns of numbers."""
    made = common.table(left, right, title=title, title_justify="left", padding=(0, 1, 0, 0))
    for row in rows:
        made.add_row(*map(str, row))
    return made


def show(*lines: Table | str) -> None:
    """Print tables and lines, with whole words even where the terminal is narrow."""
    console = Console(soft_wrap=False)
    wide = Console(width=max(console.width, 120))
    for line in lines:
        wide.print(line, markup=False, highlight=False, soft_wrap=isinstance(line, str))


def grouped(
    rows: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], Any]
) -> dict[Any, dict[str, dict[str, Any]]]:
    """Return the rows of each case by implementation, in order."""
    cases: dict[Any, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(key(row), {})[row["implementation"]] = row
    return cases
