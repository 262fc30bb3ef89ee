"""The layering: which module may import what, and what importing the package may do."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from triton_gn.activations import TABLE

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "triton_gn"

# A layer is a module with everything below it; a rule on a name covers everything below that too.
NEVER = {
    "triton_gn": {"tests", "perf", "matplotlib"},
    "triton_gn.kernels": {"os", "torch", "triton_gn.plan"},
    "triton_gn.plan": {"torch", "triton", "triton_gn.kernels", "triton_gn.ops"},
    "triton_gn.ops": {
        "triton_gn.functional",
        "triton_gn.module",
        "triton_gn.checks",
        "triton_gn.fuse",
        "triton_gn.tiling",
        "triton_gn.tools",
    },
    # it loads torch.fx and the compiler, which most users of the package never need
    "triton_gn.__init__": {"triton_gn.fuse"},
    "triton_gn.fuse": {"triton_gn.kernels", "triton_gn.tiling", "triton_gn.tools"},
}
# Besides the standard library.
ONLY = {
    "triton_gn.kernels": {"triton", "triton_gn.kernels", "triton_gn.activations"},
    "triton_gn.reference": {"torch", "triton_gn.activations"},
    # names of the device code, for type checkers: nothing but the standard library is loaded
    "triton_gn.activations": {"triton.language", "triton_gn.kernels.activations"},
}


def is_within(name: str, parent: str) -> bool:
    return f"{name}.".startswith(f"{parent}.")


def imported_names(module: str, source: str) -> Iterator[str]:
    """Yield the absolute name of everything imported anywhere, in functions as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A package is named "package.__init__", so that one dot always drops the last part.
            base = module.split(".")[: -node.level] if node.level else []
            parts = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """Return the imports in a module's source that break a rule of its layers."""
    violating = []
    for name in imported_names(module, source):
        never = [part for layer in NEVER if is_within(module, layer) for part in NEVER[layer]]
        violating += [f"{module} imports {name}" for part in never if is_within(name, part)]
        for layer in ONLY:
            allowed = sys.stdlib_module_names | ONLY[layer]
            if is_within(module, layer) and not any(is_within(name, part) for part in allowed):
                violating.append(f"{module} imports {name}")
    return sorted(set(violating))


def run_python(code: str, folder: Path = ROOT, **environment: str) -> str:
    """Run code in a fresh interpreter that finds the package in the folder first."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=folder, env=env | environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_package_keeps_its_layers() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    assert paths
    violating = []
    for path in paths:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        violating += violations(module, path.read_text(encoding="utf-8"))
    assert violating == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("triton_gn.cli", "import tests.helpers"),
        ("triton_gn.tools.tune", "def plot():\n    from matplotlib import pyplot"),
        ("triton_gn.plan.cost_model", "from perf import timing"),
        ("triton_gn.kernels.forward", "import torch"),
        ("triton_gn.kernels.forward", "from os import environ"),
        ("triton_gn.kernels.forward", "from ..plan import Plan"),
        ("triton_gn.kernels.forward", "from triton_gn.ops import forward"),
        ("triton_gn.kernels.__init__", "from .. import functional"),
        ("triton_gn.kernels.forward", "import triton_gn"),
        ("triton_gn.kernels.forward", "import numpy"),
        ("triton_gn.plan.cost_model", "import torch.nn"),
        ("triton_gn.plan.cost_model", "import triton.language as tl"),
        ("triton_gn.plan.__init__", "from ..kernels import forward"),
        ("triton_gn.plan.cost_model", "from triton_gn import ops"),
        ("triton_gn.ops.forward", "from ..functional import group_norm"),
        ("triton_gn.ops", "from .module import GroupNorm"),
        ("triton_gn.ops.__init__", "from triton_gn.tools.tune import load"),
        ("triton_gn.ops.stats", "from triton_gn.functional import GroupNormStats"),
        ("triton_gn.ops.dispatch", "from triton_gn.fuse import graph"),
        ("triton_gn.__init__", "from triton_gn import fuse"),
        ("triton_gn.fuse.chain", "from triton_gn.tools import tune"),
        ("triton_gn.reference", "import numpy"),
        ("triton_gn.reference", "from . import plan"),
    ],
)
def test_layering_rules_can_fail(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("triton_gn.kernels.forward", "import math\nimport triton\nfrom .welford import merge"),
        ("triton_gn.kernels.__init__", "from .forward import forward\nfrom . import backward"),
        ("triton_gn.plan.cost_model", "import os\nfrom .spec import Spec"),
        ("triton_gn.ops.forward", "import torch\nfrom ..kernels import forward\nimport triton"),
        ("triton_gn.reference", "from __future__ import annotations\nimport torch"),
        ("triton_gn.planning", "import torch"),
    ],
)
def test_layering_rules_let_allowed_imports_pass(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_version_is_a_literal_and_matches_the_installed_metadata() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (version,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and [ast.unparse(target) for target in node.targets] == ["__version__"]
    ]
    assert isinstance(version, str)
    try:
        installed = importlib.metadata.version("triton-gn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("triton-gn is not installed: there is no metadata to compare")
    assert installed == version, "The metadata is stale. Remedy: pip install -e ."


def test_import_neither_loads_triton_nor_initialises_cuda() -> None:
    run_python(
        "import sys, torch, triton_gn\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'triton']\n"
        "assert 'triton_gn.fuse' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_forked_child_can_normalise() -> None:
    run_python(
        "import os, torch, triton_gn\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    y = triton_gn.group_norm(torch.randn(2, 6, 5), 2)\n"
        "    os._exit(0 if y.isfinite().all() else 1)\n"
        "_, status = os.waitpid(child, 0)\n"
        "assert os.waitstatus_to_exitcode(status) == 0"
    )


def test_bare_checkout_works_without_metadata_and_gpu(tmp_path: Path) -> None:
    """The package's folder alone is enough: no installation, no other file, no GPU."""
    shutil.copytree(PACKAGE, tmp_path / "triton_gn")
    location = run_python(
        "import importlib.metadata, torch\n"
        "def hide(name):\n"
        "    raise importlib.metadata.PackageNotFoundError(name)\n"
        "importlib.metadata.version = importlib.metadata.distribution = hide\n"
        "import triton_gn\n"
        "triton_gn.group_norm(torch.randn(2, 6, 5), 2)\n"
        "print(triton_gn.__file__)",
        folder=tmp_path,
        CUDA_VISIBLE_DEVICES="",
    )
    assert Path(location) == tmp_path / "triton_gn" / "__init__.py"


def test_docs_have_a_line_for_each_activation() -> None:
    text = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    section = text.partition("## Activations")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| (\w+)", section, re.MULTILINE)
    assert documented == [name for name in TABLE if name != "none"]
