"""The kernels of Liger and FlagGems, from their installed packages and without a GPU.

Each peer is called by its own launchers, as its autograd function calls them. FlagGems refuses to
be imported without a GPU, so that its one file with GroupNorm is loaded beside stand-ins for the
helpers that the file imports.
"""

import ast
import atexit
import contextlib
import math
import operator
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

EPS = 1e-5
INSTALL = "pip install --no-deps liger-kernel flag-gems"

Saved = tuple[Any, ...]
Arguments = Mapping[str, Any]


class InterpretedFloat(float):
    """A float argument of a kernel that the interpreter runs: there it has no ``to``."""

    def to(self, dtype: Any) -> "InterpretedFloat":
        return self


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _program_id(axis):  # type: ignore[no-untyped-def,unused-ignore]
    return tl.program_id(axis).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _interpreted_rsqrt(x):  # type: ignore[no-untyped-def,unused-ignore]
    return 1 / tl.sqrt(x)


def _rsqrt() -> Any:
    """Return the function that peers take from libdevice, which the interpreter lacks."""
    return _interpreted_rsqrt if triton.knobs.runtime.interpret else libdevice.rsqrt


def _eps() -> float:
    return InterpretedFloat(EPS) if triton.knobs.runtime.interpret else EPS


@dataclass(frozen=True)
class Peer:
    """A package with a GroupNorm in Triton, for contiguous x (N, C, pixels) without an activation.

    ``forward`` takes x, groups, weight and bias, and returns y and what ``backward`` needs besides
    dy to return dx, dweight and dbias. ``tile`` is the number of elements of a program's largest
    tile, given x's shape and the groups. ``loop_iterations`` maps a kernel's name to how often a
    program executes each of its loops, given the kernel's arguments by name.
    """

    name: str
    package: str
    module: Callable[[], ModuleType]
    forward: Callable[[Tensor, int, Tensor, Tensor], tuple[Tensor, Saved]]
    backward: Callable[[Tensor, Saved], tuple[Tensor, Tensor, Tensor]]
    tile: Callable[[int, int, int, int], int]  # n, channels, pixels, groups
    loop_iterations: Mapping[str, Callable[[Arguments], int]]

    def arguments(self, kernel: str, values: Iterable[Any]) -> Arguments:
        """Return a kernel's arguments by name."""
        names = getattr(self.module(), kernel).arg_names
        return dict(zip(names, values, strict=True))

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None


@cache
def _liger() -> ModuleType:
    with mock.patch.object(libdevice, "rsqrt", _rsqrt(), create=True):
        return import_module("liger_kernel.ops.group_norm")


def _liger_forward(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Saved]:
    channels = x.shape[1]
    results = _liger().group_norm_forward(x, channels, groups, weight, bias, _eps())
    y, x, mean, rstd = results[:4]
    return y, (x, weight, bias, mean, rstd, channels, groups)


def _liger_backward(dy: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _liger().group_norm_backward(dy, *saved)
    return dx, dweight, dbias


def _helpers_of_flag_gems() -> dict[str, ModuleType]:
    """Return modules with the names that FlagGems' file imports."""

    def module(name: str, **values: Any) -> ModuleType:
        made = ModuleType(name)
        vars(made).update(values)
        return made

    no_device = SimpleNamespace(device=lambda _: contextlib.nullcontext())
    helpers = (
        module("flag_gems"),
        module("flag_gems.runtime", torch_device_fn=no_device),
        module(
            "flag_gems.utils",
            libentry=lambda: lambda kernel: kernel,
            tl_extra_shim=module("tl_extra_shim", rsqrt=_rsqrt()),
            triton_lang_extension=module("triton_lang_extension", program_id=_program_id),
        ),
    )
    return {helper.__name__: helper for helper in helpers}


class _AndOfTensors(ast.NodeTransformer):
    """Write ``a and b`` as ``a & b``: for tensors Triton's compiler takes both as the same."""

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        is_mask = isinstance(node.op, ast.And) and len(node.values) == 2
        return ast.BinOp(node.values[0], ast.BitAnd(), node.values[1]) if is_mask else node


def _interpretable(file: Path) -> Path:
    """Return a copy of a file for the interpreter, in which ``and`` takes its second operand."""
    tree = ast.fix_missing_locations(_AndOfTensors().visit(ast.parse(file.read_text())))
    copy = Path(tempfile.mkdtemp(prefix="triton-gn-")) / file.name
    atexit.register(shutil.rmtree, copy.parent, ignore_errors=True)
    copy.write_text(ast.unparse(tree))
    return copy


@cache
def _flag_gems() -> ModuleType:
    package = find_spec("flag_gems")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "ops" / "groupnorm.py"
    if triton.knobs.runtime.interpret:
        file = _interpretable(file)
    spec = spec_from_file_location("flag_gems_groupnorm", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    with mock.patch.dict(sys.modules, _helpers_of_flag_gems()):
        spec.loader.exec_module(module)
    return module


def _flag_gems_forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Saved]:
    sizes = *x.shape[:2], math.prod(x.shape[2:]), groups
    y, mean, rstd = _flag_gems().group_norm(x, weight, bias, *sizes, EPS)
    return y, (x, mean, rstd, weight, *sizes)


def _flag_gems_backward(dy: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _flag_gems().group_norm_backward(dy, *saved, [True] * 3)
    return dx, dweight, dbias


PEERS = (
    Peer(
        "liger",
        "liger_kernel",
        _liger,
        _liger_forward,
        _liger_backward,
        lambda n, channels, pixels, groups: min(
            65536, triton.next_power_of_2(channels // groups * pixels)
        ),
        {
            "_group_norm_forward_kernel": lambda a: triton.cdiv(a["hidden_size"], a["BLOCK_SIZE"]),
            "_group_norm_backward_kernel": lambda a: operator.mul(
                a["channels_per_group"], triton.cdiv(a["hidden_size"], a["BLOCK_SIZE"])
            ),
        },
    ),
    Peer(
        "flag_gems",
        "flag_gems",
        _flag_gems,
        _flag_gems_forward,
        _flag_gems_backward,
        lambda n, channels, pixels, groups: (
            triton.next_power_of_2(pixels) * triton.next_power_of_2(max(n, channels // groups))
        ),
        {"group_norm_backward_kernel": lambda a: triton.cdiv(a["HW"], a["BLOCK_HW_SIZE"])},
    ),
)


def installed() -> Iterator[Peer]:
    """Yield the peers whose packages are there."""
    return (peer for peer in PEERS if peer.installed)


def how_to_install() -> str:
    """Return a line on how to get the missing peers, empty if none is missing."""
    missing = " and ".join(peer.name for peer in PEERS if not peer.installed)
    return f"Without {missing}, not installed here: {INSTALL}" if missing else ""
