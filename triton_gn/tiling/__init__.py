"""Run a model tile by tile, as exact as in one piece: for decoders of images and videos.

Each tile runs the model's own forward in its own thread, one tile at a time. A TorchFunctionMode
intercepts every PyTorch function that the forward calls. Where a function needs pixels of other
tiles, the tile waits until all tiles have reached the same call.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext
from torch.utils.weak import WeakTensorKeyDictionary

from triton_gn.ops import context, settings
from triton_gn.tiling.baton import Baton
from triton_gn.tiling.hooks import enter
from triton_gn.tiling.layout import Axis, Layout, NotExactError, is_cut, whole
from triton_gn.tiling.local import raise_if_illegal
from triton_gn.tiling.rules import ALIASES, ALWAYS_ASKED, RULES
from triton_gn.tiling.state import attributes, same, write_back
from triton_gn.tiling.tile import Tile, assembled, leaves, refuse

__all__ = ["NotExactError", "exact_tiles"]

_OPERATORS = "add sub mul truediv div floordiv mod pow and or xor lshift rshift matmul"
_IN_PLACE = {"__setitem__", "__set__", "__delitem__"} | {
    f"__i{name}__" for name in _OPERATORS.split()
}
_thread = threading.local()  # ``tile`` is set in the thread of a running tile


@contextlib.contextmanager
def exact_tiles(
    model: nn.Module, tile_size: int | tuple[int, ...] = 64, *, offload: bool = False
) -> Iterator[None]:
    """Run the model's forward tile by tile, with the same result as in one piece.

    The first argument (N, C, *) is cut along its last two spatial dimensions, or along as many as
    ``tile_size`` has sizes. An input no larger than a tile runs uncut. GroupNorm merges the
    statistics of all tiles, convolutions read the neighbours' pixels, attention reads all keys:
    results and gradients differ by rounding only. The model sees the sizes of the whole input. An
    operation that is not known to stay exact raises.

    Tiles wait for each other at each of these layers. The activations of waiting tiles stay in
    memory; temporaries exist for one tile at a time.

    Args:
        model: the module to tile. Only its own forward is replaced, until the context ends: hooks
            of PyTorch and accelerate see whole tensors, and ``with exact_tiles(vae.decoder):
            vae.decode(z)`` works. The model must draw no random numbers, and keep state only in
            lists and dicts that it gets as arguments. Hooks inside it may not move parameters.
        tile_size: the largest tile, in pixels of the model's input. All tiles have nearly the same
            size.
        offload: move the activations of waiting tiles to host memory, pinned for a GPU. The GPU
            then holds one tile's activations at a time, at the price of copies. Without gradients
            only.

    Raises:
        TypeError, ValueError: the model is not a module, a size is not a positive integer, or no
            argument has enough spatial dimensions.
        RuntimeError: the model is in such a context already, or is called inside another tile,
            under a compiler, a transform of torch.func or a mode.
        NotExactError: an operation needs pixels of other tiles, or is not known to do without.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"exact_tiles: model must be an nn.Module; got {type(model).__name__}.")
    sizes = tile_size if isinstance(tile_size, tuple) else (tile_size,)
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"exact_tiles: tile_size must be of integers; got {tile_size!r}.")
        if size < 1:
            raise ValueError(f"exact_tiles: tile_size must be at least 1; got {tile_size!r}.")
    if not sizes:
        raise ValueError("exact_tiles: tile_size must have a size or several; got ().")
    # accelerate's hooks call the forward by this name
    name = "_old_forward" if "_old_forward" in vars(model) else "forward"
    original = getattr(model, name)
    if getattr(original, "is_tiled", False):
        raise RuntimeError(
            "exact_tiles: the model is in such a context already. Leave that one first."
        )

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _forward(model, original, tile_size, offload, cuts, args, kwargs)

    cuts = WeakTensorKeyDictionary()  # tensor that the model returned: its axes and layout
    forward.is_tiled = True  # type: ignore[attr-defined]
    instance_forward = vars(model).get(name)  # None: the class has the forward
    setattr(model, name, forward)
    try:
        yield
    finally:
        if instance_forward is None:
            delattr(model, name)
        else:
            setattr(model, name, instance_forward)


def _forward(
    model: nn.Module,
    original: Callable[..., Any],
    tile_size: int | tuple[int, ...],
    offload: bool,
    cuts: WeakTensorKeyDictionary,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    _check_surroundings()
    if offload and torch.is_grad_enabled():
        raise RuntimeError(
            "exact_tiles: offload=True works without gradients, whose activations must stay. "
            "Call the model under torch.no_grad() or torch.inference_mode()."
        )
    values = [*args, *kwargs.values()]
    rank = len(tile_size) if isinstance(tile_size, tuple) else 1
    x_index = next(
        (i for i, v in enumerate(values) if isinstance(v, Tensor) and v.ndim >= rank + 2), None
    )
    if x_index is None:
        raise ValueError(
            f"exact_tiles: an argument must be a tensor (N, C, *) with {rank} or more spatial "
            f"dimensions; got {', '.join(type(value).__name__ for value in values) or 'none'}."
        )
    x: Tensor = values[x_index]
    layout = _cut(x, tile_size)
    axes = [factor for dim in layout for factor in dim if isinstance(factor, Axis)]
    if not axes or x.numel() == 0:
        return original(*args, **kwargs)

    other_values = [*values[:x_index], *values[x_index + 1 :]]
    operands = filter(torch.is_tensor, pytree.tree_leaves(other_values))
    known = WeakTensorKeyDictionary(
        dict.fromkeys([*operands, *model.parameters(), *model.buffers()])
    )
    grid = list(itertools.product(*(range(len(axis.sizes)) for axis in axes)))
    baton = Baton(len(grid))
    tiles = [Tile(baton, grid, index, known, offload) for index in range(len(grid))]
    surroundings = _surroundings(x)

    def run(tile: Tile) -> Any:
        def cut(tensor: Tensor) -> Tensor:
            known_axes, known_layout = cuts.get(tensor, (None, ()))
            return tile.cut(tensor, known_layout) if known_axes == axes else tensor

        with surroundings():
            _thread.tile = tile
            parts = pytree.tree_map_only(Tensor, cut, values)
            parts[x_index] = tile.cut(x, layout)
            named = dict(zip(kwargs, parts[len(args) :], strict=True))
            with _Mode(tile):
                y = enter(model, original, parts[: len(args)], named)
            return y, [*parts[:x_index], *parts[x_index + 1 :]]

    attributes_before = attributes(model)
    try:
        results = baton.run([functools.partial(run, tile) for tile in tiles])
    except NotExactError:
        raise
    except Exception as error:
        changed = [n for n, v in attributes(model).items() if not same(v, attributes_before.get(n))]
        if changed and baton.is_in_between:
            refuse(f"the attribute {changed[0]}", "changes, and all tiles share it", cause=error)
        raise
    whole_y, state = _whole_of(results, tiles, grid, lambda t, dims: cuts.update({t: (axes, dims)}))
    write_back(other_values, state)
    return whole_y


def _check_surroundings() -> None:
    if hasattr(_thread, "tile"):
        raise RuntimeError(
            "exact_tiles: the forward of a tiled model is called within a tile of another. "
            "Tile the outer one only."
        )
    if context.is_compiling() or context.in_functorch() or context.in_forward_mode():
        raise RuntimeError(
            "exact_tiles: it works in eager mode, not under torch.compile, torch.func or in "
            "forward mode. Call the model outside of these."
        )
    modes = _get_current_function_mode_stack()
    if context.has_mode() or not all(isinstance(mode, DeviceContext) for mode in modes):
        raise RuntimeError(
            "exact_tiles: a mode is active, which would not see what happens in the tiles. "
            "Call the model outside of it."
        )


def _cut(x: Tensor, tile_size: int | tuple[int, ...]) -> Layout:
    """Return the layout that cuts x into as few tiles as ``tile_size`` allows, of similar size."""
    sizes = tile_size if isinstance(tile_size, tuple) else (tile_size,) * min(2, x.ndim - 2)
    layout = [whole(size) for size in x.shape]
    number = 0
    for dim, size in enumerate(sizes, start=x.ndim - len(sizes)):
        count = -(-x.shape[dim] // size)
        if count > 1:
            small, num_larger = divmod(x.shape[dim], count)
            tile_sizes = [small + 1] * num_larger + [small] * (count - num_larger)
            layout[dim] = (Axis(number, tuple(tile_sizes)),)
            number += 1
    return tuple(layout)


def _surroundings(x: Tensor) -> Callable[[], contextlib.ExitStack]:
    """Return a function that enters the caller's thread-local state in another thread.

    The state is the grad mode, autocast, settings, device and stream.
    """
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    cache = torch.is_autocast_cache_enabled()
    autocasts = [
        (device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))
        for device_type in {"cpu", x.device.type}
        if torch.amp.is_autocast_available(device_type)
    ]
    current_settings, device = vars(settings.current()), torch.get_default_device()
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None

    def enter() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if stream is not None:
            stack.enter_context(torch.cuda.device(x.device))
            stack.enter_context(torch.cuda.stream(stream))
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        for device_type, dtype, enabled in autocasts:
            stack.enter_context(torch.autocast(device_type, dtype, enabled, cache))
        stack.enter_context(settings.Setting(current_settings))
        stack.enter_context(device)
        # a checkpoint would recompute its part of the forward without the other tiles
        stack.enter_context(
            torch.autograd.graph.disable_saved_tensors_hooks(
                "exact_tiles: hooks on saved tensors, such as those of torch.utils.checkpoint, do "
                "not see the other tiles. Turn checkpointing off."
            )
        )
        return stack

    return enter


class _Mode(TorchFunctionMode):
    """Interceptor of every PyTorch function that a tile calls; refuses unknown functions."""

    def __init__(self, tile: Tile) -> None:
        super().__init__()
        self._tile = tile

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Apply the function's rule, or call the function itself where no tensor is cut."""
        kwargs = kwargs or {}
        tile, rule = self._tile, RULES.get(func)
        tensors = list(leaves((args, kwargs), Tensor))
        tile.check(func, tensors)
        has_cut_tensor = any(map(tile.is_cut, tensors))
        changed = (args[:1] or tensors[:1]) if _is_in_place(func) else kwargs.get("out")
        tile.check_changes(func, changed)
        if has_cut_tensor and rule is None:
            refuse(func, "is not known to need pixels of its own tile only")
        if rule is not None and (has_cut_tensor or rule in ALWAYS_ASKED):
            named = {ALIASES.get(name, name): value for name, value in kwargs.items()}
            try:
                return rule(tile, func, *args, **named)
            except (NotExactError, NotImplementedError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise_if_illegal(tile, func, args, kwargs, error)
                reason = str(error).partition("\n")[0].rstrip(".")
                refuse(func, f"is not known in this form ({reason})", cause=error)
        if kwargs.get("generator") is not None or _is_random(_name(func)):
            refuse(func, "draws random numbers: each tile would draw its own")
        return tile.mark(func(*args, **kwargs))


def _name(func: Any) -> str:
    return getattr(func, "__name__", "")


def _is_in_place(func: Any) -> bool:
    name = _name(func)
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


@functools.cache
def _is_random(name: str) -> bool:
    """Return whether PyTorch's operator of this name draws random numbers."""
    packet = getattr(torch.ops.aten, name.split(".")[0], None)
    names = [] if packet is None else packet.overloads()
    overloads = [getattr(packet, overload_name) for overload_name in names]
    is_tagged = any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)
    return is_tagged or name == "gumbel_softmax"


def _whole_of(
    results: list[Any],
    tiles: list[Tile],
    grid: list[tuple[int, ...]],
    keep: Callable[[Tensor, Layout], None],
) -> Any:
    """Assemble the model's output from the results of its tiles."""
    flat = [pytree.tree_flatten(result) for result in results]
    spec = flat[0][1]
    if any(tile_spec != spec for _, tile_spec in flat):
        raise NotExactError("exact_tiles: the tiles gave outputs of different structures.")
    outputs = []
    for parts in zip(*(result_leaves for result_leaves, _ in flat), strict=True):
        y, layout = _put_together(parts, tiles, grid)
        outputs.append(y)
        if any(map(is_cut, layout)):
            keep(y, layout)
    return pytree.tree_unflatten(outputs, spec)


def _put_together(
    parts: tuple[Any, ...], tiles: list[Tile], grid: list[tuple[int, ...]]
) -> tuple[Any, Layout]:
    first = parts[0]
    if not all(isinstance(part, Tensor) for part in parts):
        if not all(same(part, first) for part in parts):
            raise NotExactError(
                f"exact_tiles: an output is each tile's own: {type(first).__name__}. "
                "Return tensors, alone or in tuples, lists and dicts."
            )
        return first, ()
    layout = tiles[0].output_layout(first)
    if any(tile.output_layout(part) != layout for tile, part in zip(tiles, parts, strict=True)):
        raise NotExactError("exact_tiles: the tiles gave outputs of different layouts.")
    if not any(map(is_cut, layout)):
        return first, layout
    dim_of_axis = {
        dim[0].number: i
        for i, dim in enumerate(layout)
        if len(dim) == 1 and isinstance(dim[0], Axis)
    }
    if len(dim_of_axis) != len(grid[0]):
        raise NotExactError(
            f"exact_tiles: an output of shape {tuple(first.shape)} in a tile is not spatial. "
            "Tile a part of the model whose outputs are (N, C, *)."
        )
    dims = [dim_of_axis[number] for number in sorted(dim_of_axis)]
    return assembled(dict(zip(grid, parts, strict=True)), dims), layout
