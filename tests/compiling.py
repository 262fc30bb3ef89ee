"""Compile launches for a GPU that need not be present, and read what came out."""

import re
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_gn.ops import launch
from triton_gn.ops.settings import Settings

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
_PTX_TYPE = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}
FORBIDDEN = ("tf32", "sqrt.approx", "rsqrt.approx", "div.full")


@dataclass(frozen=True)
class Compiled:
    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    load_bytes: tuple[int, ...]  # of each load from global memory, widest first
    store_bytes: tuple[int, ...]
    forbidden: tuple[str, ...]


def target_of(name: str) -> GPUTarget:
    """"sm_90" or "gfx942"."""
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
    **override: Any,
) -> list[launch.Launch]:
    """The launches of a problem, on tensors without memory."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    if channels_last:
        x = torch.empty_like(x.movedim(1, -1).contiguous()).movedim(-1, 1)
    settings = Settings(plan_override=tuple(sorted(override.items())))
    problem, config = launch.plan_for(direction, x, num_groups, channels_last, settings)
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


def _access_bytes(ptx: str, instruction: str) -> tuple[int, ...]:
    sizes = []
    for text in re.findall(rf"{instruction}\.global[.\w:]*", ptx):
        vector = re.search(r"\.v(\d)", text)
        bits = re.search(r"\.[bfus](\d+)$", text)
        sizes.append((int(vector.group(1)) if vector else 1) * int(bits.group(1)) // 8)
    return tuple(sorted(sizes, reverse=True))


def compile_launch(one: launch.Launch, target: str) -> Compiled:
    compiled = triton.compile(
        _source(one),
        target=target_of(target),
        options=one.options(nvidia=target.startswith("sm_")),
    )
    name = one.kernel.__name__
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        read = lambda key: int(re.search(rf"{key}:\s+(\d+)", text).group(1))  # noqa: E731
        return Compiled(
            name, read(r"\.vgpr_count"), read(r"\.vgpr_spill_count"), compiled.metadata.shared,
            (), (), (),
        )  # fmt: skip
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    ptx = compiled.asm["ptx"]
    return Compiled(
        name, registers, stack, compiled.metadata.shared, _access_bytes(ptx, "ld"),
        _access_bytes(ptx, "st"), tuple(word for word in FORBIDDEN if word in ptx),
    )  # fmt: skip
