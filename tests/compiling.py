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
from triton_gn.plan import Device, plan

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
    **override: Any,
) -> list[launch.Launch]:
    """The launches of a problem as planned for a GPU of the target, on tensors without memory."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    if channels_last:
        x = torch.empty_like(x.movedim(1, -1).contiguous()).movedim(-1, 1)
    problem, _ = launch.problem_of(direction, x, num_groups, channels_last)
    device = Device("AMD Instinct MI300X", 304, 4 * 2**20, 64) if "gfx" in target else Device()
    config = plan(problem, device, override=tuple(sorted(override.items())))
    weight, bias = (
        torch.empty(shape[1], dtype=param_dtype or dtype, device="meta") if there else None
        for there in affine
    )
    stats = launch.statistics(x, shape[0], num_groups, 3)
    if direction == "forward":
        return launch.forward_launches(
            problem, config, x, weight, bias, torch.empty_like(x), stats, 1e-5
        )
    return launch.backward_launches(
        problem, config, torch.empty_like(x), x, weight, stats, torch.empty_like(x), bias, weight
    )


def _source(one: launch.Launch) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(one.kernel.params):
        value = one.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp64"
        elif value == 1:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = 1
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
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
    compiled = triton.compile(
        _source(one),
        target=target_of(target),
        options=one.options(nvidia=target.startswith("sm_")),
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
