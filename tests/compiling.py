"""Compile launches for a GPU that need not be present, and read what came out."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_gn.ops import launch
from triton_gn.plan import TARGETS, plan
from triton_gn.reference import Operands

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
FORBIDDEN = ("tf32", "sqrt.approx", "rsqrt.approx", "div.full")


@dataclass(frozen=True)
class Compiled:
    name: str
    registers: int
    spills: int  # bytes of stack on NVIDIA, registers on AMD
    shared_bytes: int
    load_bytes: tuple[int, ...]  # of each load from global memory, widest first
    store_bytes: tuple[int, ...]
    forbidden: tuple[str, ...]


def target_of(name: str) -> GPUTarget:
    """ "sm_90" or "gfx942"."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def launches_of(
    direction: str,
    shape: tuple[int, ...],
    num_groups: int,
    dtype: torch.dtype,
    channels_last: bool,
    param_dtype: torch.dtype | None = None,
    affine: tuple[bool, bool] = (True, True),
    target: str = "sm_90",
    activation: str = "none",
    fused: tuple[str, ...] = (),
    **override: Any,
) -> list[launch.Launch]:
    """The launches of a problem as planned for a GPU of the target, on tensors without memory.

    ``fused``: which of scale, shift, pre_add and residual there are, per sample.
    """
    x = torch.empty(shape, dtype=dtype, device="meta")
    if channels_last:
        x = torch.empty_like(x.movedim(1, -1).contiguous()).movedim(-1, 1)
    n, channels = shape[:2]
    param_dtype = param_dtype or dtype
    weight, bias = (
        torch.empty(channels, dtype=param_dtype, device="meta") if there else None
        for there in affine
    )
    per_sample = {
        name: torch.empty(n, channels, dtype=param_dtype, device="meta")
        for name in fused
        if name != "residual"
    }
    residual = torch.empty_like(x) if "residual" in fused else None
    operands = Operands(x, weight, bias, **per_sample, residual=residual)
    if direction == "backward" and activation == "none":
        operands = operands._replace(residual=None)
    problem = launch.problem_of(direction, operands, num_groups, activation)
    config = plan(problem, TARGETS[target], override=tuple(sorted(override.items())))
    stats = launch.statistics(x, n, num_groups, 3)
    if direction == "forward":
        y = torch.empty_like(x)
        return launch.forward_launches(problem, config, operands, y, stats, 1e-5)
    grads = {name: torch.empty_like(t) for name, t in operands._asdict().items() if t is not None}
    dy = torch.empty_like(x)
    return launch.backward_launches(problem, config, dy, operands, stats, grads)


def _typed(value: Any, path: tuple[int, ...], constants: Any, attributes: Any) -> Any:
    """The signature of an argument or of a tuple's field, as Triton's JIT would see it."""
    if isinstance(value, tuple):
        fields = (_typed(v, (*path, i), constants, attributes) for i, v in enumerate(value))
        return type(value)(*fields)
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp64"
    if value is None or value == 1:
        constants[path] = value
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if value < 2**31 else "i64"


def _source(one: launch.Launch, nvidia: bool) -> ASTSource:
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    arguments = one.arguments_on(nvidia)
    for index, parameter in enumerate(one.kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = _typed(value, (index,), constants, attributes)
    return ASTSource(fn=one.kernel, signature=signature, constexprs=constants, attrs=attributes)


_AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}


def _ptx_accesses(ptx: str, instruction: str) -> tuple[int, ...]:
    sizes = []
    for text in re.findall(rf"{instruction}\.global[.\w:]*", ptx):
        vector, bits = re.search(r"\.v(\d)", text), _found(r"\.[bfus](\d+)$", text)
        sizes.append((int(vector.group(1)) if vector else 1) * int(bits) // 8)
    return tuple(sorted(sizes, reverse=True))


def _amd_accesses(text: str, instruction: str) -> tuple[int, ...]:
    widths = re.findall(rf"(?:global|buffer)_{instruction}_([a-z0-9]+)", text)
    return tuple(sorted((_AMD_WIDTHS.get(width, 0) for width in widths), reverse=True))


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, f"{pattern} not in: {text[:200]}"
    return found.group(1)


def compile_launch(one: launch.Launch, target: str) -> Compiled:
    """Compile for "sm_90" or "gfx942", as ``launch.run`` would on such a GPU."""
    nvidia = target.startswith("sm_")
    compiled = triton.compile(
        _source(one, nvidia), target=target_of(target), options=one.options(nvidia)
    )
    name, shared = one.kernel.__name__, compiled.metadata.shared
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spills = (
            int(_found(rf"\.{key}:\s+(\d+)", text)) for key in ("vgpr_count", "vgpr_spill_count")
        )
        loads, stores = _amd_accesses(text, "load"), _amd_accesses(text, "store")
        return Compiled(name, registers, spills, shared, loads, stores, ())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    ptx = compiled.asm["ptx"]
    return Compiled(
        name,
        int(_found(r"REG:(\d+)", usage)),
        int(_found(r"STACK:(\d+)", usage)),
        shared,
        _ptx_accesses(ptx, "ld"),
        _ptx_accesses(ptx, "st"),
        tuple(word for word in FORBIDDEN if word in ptx),
    )
