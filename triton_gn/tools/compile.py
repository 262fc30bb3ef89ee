"""Compile launches for a GPU that need not be present, and read the compiled code."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triton_gn.ops.launches import Launch
from triton_gn.plan import TARGETS
from triton_gn.tools import sass

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
}
# prefixes of the names of the fields of arguments that are tuples
_PREFIXES = {
    "inputs": "",
    "affine_params": "",
    "outputs": "",
    "grads": "d",
    "reductions": "d",
    "pipeline": "",
}


@dataclass(frozen=True)
class Kernel:
    """One compiled launch.

    ``access_bytes`` maps each pointer to its narrowest access to global memory.
    ``converted_tiles`` counts Triton's conversions of a whole fragment to another layout, through
    shared memory. ``instructions`` are those that a thread executes for each element of its tile,
    as ``sass`` counts them, or None where it cannot.
    """

    name: str
    grid: int
    num_warps: int  # of a program
    registers: int  # of a thread
    spill_bytes: int  # of a thread
    shared_bytes: int  # of a program
    access_bytes: dict[str, int]
    converted_tiles: int
    instructions: float | None


def pointers_of(launch: Launch) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of a launch's pointers, also in tuples, in the kernel's order."""
    for name in launch.kernel.arg_names:
        for leaf, value in _leaves(name, launch.arguments_on(True)[name]):
            if isinstance(value, Tensor):
                yield leaf, value


def arguments_in_code(launch: Launch) -> list[tuple[str, Any]]:
    """Return names and values of the arguments that compiled code still has: no constants."""
    return [
        (name, value)
        for parameter in launch.kernel.params
        if not parameter.is_constexpr
        for name, value in _leaves(parameter.name, launch.arguments[parameter.name])
        if value is not None
        and (isinstance(value, Tensor) or value != 1 or parameter.do_not_specialize)
    ]


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the compiled code's arguments: each field of a tuple is an argument of its own."""
    if not isinstance(value, tuple):
        is_named = name.endswith("_ptr") or not isinstance(value, Tensor)
        yield name if is_named else f"{name}_ptr", value
        return
    fields = type(value)._fields  # type: ignore[attr-defined]  # a NamedTuple
    prefix = _PREFIXES.get(name, f"{name}_")
    for field, field_value in zip(fields, value, strict=True):
        yield from _leaves(f"{prefix}{field}", field_value)


def compile_launch(launch: Launch, target: str) -> Kernel:
    """Compile as Triton would on a GPU of the target, with all pointers aligned."""
    compiled = _compiled(launch, target)
    instructions = None
    if _is_nvidia(target):
        registers, spills = nvidia_usage(compiled.asm["cubin"])
        instructions = _instructions(launch, compiled.asm["cubin"])
    else:
        registers, spills = _amd_usage(compiled.asm["amdgcn"])
    return Kernel(
        launch.kernel.__name__,
        launch.grid,
        launch.num_warps,
        registers,
        spills,
        compiled.metadata.shared,
        _access_bytes(compiled.asm["llir"], [name for name, _ in arguments_in_code(launch)]),
        _converted_tiles(launch, compiled.asm["ttgir"]),
        instructions,
    )


def assembly_of(launch: Launch, target: str) -> str:
    """Return PTX, or AMD's assembly, of a launch compiled for a target."""
    text: str = _compiled(launch, target).asm["ptx" if _is_nvidia(target) else "amdgcn"]
    return text


def compile_into_cache(launch: Launch, target: str) -> None:
    """Compile under the key that a launch on a GPU of the target will look for in Triton's cache.

    The steps are those of ``JITFunction.run``, which asks a GPU for its target.
    """
    from triton import knobs
    from triton.compiler import ASTSource
    from triton.compiler.compiler import compile as compile_source
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, nvidia = launch.kernel, _is_nvidia(target)
    backend = make_backend(_triton_target(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options: dict[str, Any] = {"debug": kernel.debug or knobs.runtime.debug}
    for name in ("instrumentation_mode", "fpsan_homomorphic_casts"):
        if hasattr(knobs.compilation, name):  # by the version of Triton
            options[name] = getattr(knobs.compilation, name)
    options |= launch.options(nvidia)
    arguments = launch.arguments_on(nvidia)
    bound, specialization, more = bind(*(arguments[name] for name in kernel.arg_names), **options)
    known, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, more
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compile_source(source, target=_triton_target(target), options=known.__dict__)


def cache_key(launch: Launch, target: str) -> tuple[str, ...]:
    """Return the key of Triton's cache of kernels, if all pointers are aligned."""
    nvidia = _is_nvidia(target)
    source = source_of(launch, nvidia)
    parts = source.signature, source.constants, source.attrs, launch.options(nvidia)
    return launch.kernel.__name__, *map(str, parts)


def cubin_of(launch: Launch, target: str) -> bytes:
    """Return the machine code of a launch compiled for an NVIDIA target."""
    code: bytes = _compiled(launch, target).asm["cubin"]
    return code


def _is_nvidia(target: str) -> bool:
    return target.startswith("sm_")


def _compiled(launch: Launch, target: str) -> Any:
    import triton

    nvidia = _is_nvidia(target)
    return triton.compile(
        source_of(launch, nvidia), target=_triton_target(target), options=launch.options(nvidia)
    )


def _triton_target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if _is_nvidia(name):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, TARGETS[name].warp_size)


def source_of(launch: Launch, nvidia: bool) -> Any:
    """Return the source that Triton's own launch would hand to its compiler."""
    from triton.compiler import ASTSource

    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    arguments = launch.arguments_on(nvidia)
    for index, parameter in enumerate(launch.kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            known = None if parameter.do_not_specialize else attributes
            signature[parameter.name] = _type_of(value, (index,), constants, known)
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _type_of(value: Any, path: tuple[int, ...], constants: Any, attributes: Any) -> Any:
    """Return the type of an argument or of its field; add what Triton specialises on.

    Facts about the value go to ``constants`` and ``attributes``. Without attributes, the kernel is
    not specialised on the integer.
    """
    if isinstance(value, tuple):
        types = (_type_of(v, (*path, i), constants, attributes) for i, v in enumerate(value))
        return type(value)(*types)
    if isinstance(value, Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp64"
    if value is None or (value == 1 and attributes is not None):
        constants[path] = value
        return "constexpr"
    if attributes is not None and value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if value < 2**31 else "i64"


def _access_bytes(llvm: str, names: list[str]) -> dict[str, int]:
    """Return the narrowest access to global memory through each argument, from LLVM's text."""
    definitions = dict(re.findall(r"^ *(%[\w.]+) = (.*)$", llvm, re.MULTILINE))

    def arguments_behind(value: str, seen: set[str]) -> set[str]:
        """Return the arguments that an address is computed from."""
        if value in seen:
            return set()
        seen.add(value)
        if value not in definitions:
            return {names[int(value[1:])]}
        pointers = _pointers_of_definition(definitions[value])
        return set().union(*(arguments_behind(pointer, seen) for pointer in pointers))

    narrowest: dict[str, int] = {}
    for size, pointer in _accesses(llvm):
        for name in arguments_behind(pointer, set()):
            narrowest[name] = min(size, narrowest.get(name, size))
    return narrowest


def _pointers_of_definition(text: str) -> list[str]:
    if text.startswith("phi ptr"):
        return re.findall(r"\[ (%[\w.]+),", text)
    return re.findall(r"ptr(?: addrspace\(\d\))? (%[\w.]+)", text)


_ADDRESS = r"ptr addrspace\([18]\) (%[\w.]+)"  # global memory, or AMD's view of it as a buffer
_ACCESSES = (
    # PTX in a call: ld.global.v4.b32
    re.compile(rf"(?:ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[bf](\d+) .*?{_ADDRESS}"),
    # AMD's buffers: @llvm.amdgcn.raw.ptr.buffer.load.v4i32
    re.compile(rf"buffer\.(?:load|store)\.(?:v(\d+))?[a-z]+(\d+)\(.*?{_ADDRESS}"),
    # LLVM's own: load <8 x i16>, ptr
    re.compile(
        rf"(?:= load|^ *store) (?:<(\d+) x )?(\w+)>?(?: %[\w.]+)?, {_ADDRESS}", re.MULTILINE
    ),
)
_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}


def _accesses(llvm: str) -> Iterator[tuple[int, str]]:
    """Yield bytes and address of each load and store."""
    for pattern in _ACCESSES:
        for count, kind, address in pattern.findall(llvm):
            bits = _BITS[kind] if kind in _BITS else int(kind.removeprefix("i"))
            yield int(count or 1) * bits // 8, address


def nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Return registers, and bytes of stack, which the kernels have only for spills."""
    usage = sass.resource_usage(cubin)
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Return vector registers, and bytes of those spilled."""
    spilled = _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    return _number(r"\.vgpr_count:\s+(\d+)", assembly), 4 * spilled


def _instructions(launch: Launch, cubin: bytes) -> float | None:
    iterations = main_loop_iterations(launch)
    if iterations is None:
        return None
    tile = _tile_of(launch)
    executed = sass.executed(sass.disassembled(cubin), iterations)
    fragments = tile["channel_tiles"] * tile["pixel_tiles"] * _blocks(launch, tile)
    per_element: float = (
        executed * 32 * launch.num_warps / (tile["rows"] * tile["cols"] * fragments)
    )
    return round(per_element, 1)


def main_loop_iterations(launch: Launch) -> int | None:
    """Return how often a program executes its main loop, None if programs differ in their work."""
    if "TILE" not in launch.arguments or "pipeline" in launch.arguments:
        return None  # no tensors of x's size; or pipelined
    blocks = _blocks(launch, _tile_of(launch))
    if not launch.kernel.__name__.endswith("moments_kernel"):
        return blocks
    from triton_gn.kernels.split import BLOCKS_AT_ONCE

    # the first block of each is read before the main loop
    at_once: int = BLOCKS_AT_ONCE.value
    return blocks - math.ceil(blocks / at_once)


def _tile_of(launch: Launch) -> dict[str, Any]:
    return {name: field.value for name, field in vars(launch.arguments["TILE"]).items()}


def _blocks(launch: Launch, tile: dict[str, Any]) -> int:
    """Return the number of blocks of pixels that a program walks over."""
    if "split_vecs" not in launch.arguments:
        return 1
    along, vec = ("rows", 1) if tile["channels_last"] else ("cols", tile["vec"])
    vecs: int = launch.arguments["split_vecs"]
    block_vecs: int = tile[along] * tile["pixel_tiles"] // vec
    return math.ceil(vecs / block_vecs)


def _converted_tiles(launch: Launch, ttgir: str) -> int:
    if "TILE" not in launch.arguments:
        return 0
    tile = launch.arguments["TILE"]
    shape = f"tensor<{tile.rows.value}x{tile.cols.value}x"
    return len(re.findall(rf"ttg\.convert_layout [^\n]*: {shape}", ttgir))


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's report has no {pattern}; it begins: {text[:200]}")
    return int(match.group(1))
