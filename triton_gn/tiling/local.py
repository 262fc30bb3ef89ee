"""Rules of operations that need the pixels of their own tile only, and the conditions for that."""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from triton_gn.tiling.layout import Dim, Layout, is_cut, joined, reshaped, size_of, whole
from triton_gn.tiling.tile import NO_DROPOUT, Tile, each, leaves, refuse, relaid

# Products


def linear(tile: Tile, func: Any, input: Tensor, weight: Tensor, bias: Any = None) -> Any:
    """Multiply along the last dimension, which must not be cut."""
    tile.require_uncut(func, (weight, bias))
    tile.require_whole(func, input, (-1,))
    y = func(input, weight, bias)
    return tile.mark(y, (*tile.layout(input)[:-1], whole(y.shape[-1])))


def matmul(tile: Tile, func: Any, input: Tensor, other: Tensor) -> Any:
    """Multiply matrices, if at most one has pixels, or if the product sums over all pixels."""
    a, b = tile.layout(input), tile.layout(other)
    if a[-1] == b[-2] and tile.is_all_cut(a[-1]):
        parts = tile.exchange(func, (a, b), func(input, other), torch.stack)
        return tile.mark(parts.sum(0))
    tile.require_whole(func, input, (-1,))
    tile.require_whole(func, other, (-2,))
    if is_cut(a[-2]) and is_cut(b[-1]):
        refuse(
            func,
            "multiplies each pixel with each other one",
            "Use torch.nn.functional.scaled_dot_product_attention.",
        )
    y = func(input, other)
    return tile.mark(y, (*tile.broadcast(func, (a[:-2], b[:-2])), a[-2], b[-1]))


# Value by value


def pointwise(tile: Tile, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Broadcast operands that are cut alike, and compute value by value."""
    layout = tile.broadcast(func, [tile.layout(t) for t in leaves((args, kwargs), Tensor)])
    y = func(*args, **kwargs)
    if y is NotImplemented:  # returned by == with an object that is not a number
        return y
    if not isinstance(y, Tensor):
        refuse(func, "is known with one result only")
    return tile.mark(y, layout)


def like_first(tile: Tile, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Convert, copy or fill a tensor, and keep its size."""
    return tile.mark(func(input, *args, **kwargs), tile.layout(input))


def dropout(
    tile: Tile,
    func: Any,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Any:
    """Apply dropout in evaluation, where it does nothing; refuse training."""
    if training and p:
        refuse(func, "draws random numbers in training", NO_DROPOUT)
    return tile.mark(func(input, p, False), tile.layout(input))


# Along one dimension, which must not be cut


def softmax(tile: Tile, func: Any, input: Tensor, dim: Any = None, *args: Any, **kw: Any) -> Any:
    """Compute a softmax along an uncut dimension."""
    if not isinstance(dim, int):
        refuse(func, "was called without a dimension", "Say which: dim=...")
    tile.require_whole(func, input, (dim,))
    return tile.mark(func(input, dim, *args, **kw), tile.layout(input))


def normalize(
    tile: Tile, func: Any, input: Tensor, p: float = 2.0, dim: Any = 1, *args: Any, **kw: Any
) -> Any:
    """Divide by the norm along uncut dimensions."""
    tile.require_whole(func, input, each(dim, 1))
    return tile.mark(func(input, p, dim, *args, **kw), tile.layout(input))


def reduce(
    tile: Tile, func: Any, input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Any:
    """Reduce uncut dimensions."""
    dims = range(input.ndim) if dim is None or dim == () else each(dim, 1)
    tile.require_whole(func, input, dims)
    reduced = {d % input.ndim for d in dims}
    layout = [
        () if i in reduced else dim
        for i, dim in enumerate(tile.layout(input))
        if keepdim or i not in reduced
    ]
    return tile.mark(func(input, dim, keepdim, **kwargs), tuple(layout))


def split(tile: Tile, func: Any, input: Tensor, *args: Any, dim: int = 0, **kwargs: Any) -> Any:
    """Split or chunk an uncut dimension."""
    size, dim = args[:1], (*args, dim)[1 if len(args) == 2 else -1]
    tile.require_whole(func, input, (dim,))
    kept = dict(enumerate(tile.layout(input)))
    del kept[dim % input.ndim]
    parts = func(input, *size, dim=dim, **kwargs)
    for part in parts:
        relaid(tile, part, kept)
    return parts


def unbind(tile: Tile, func: Any, input: Tensor, dim: int = 0) -> Any:
    """Return all slices along an uncut dimension."""
    tile.require_whole(func, input, (dim,))
    layout = list(tile.layout(input))
    del layout[dim]
    return tile.mark(func(input, dim), tuple(layout))


def cat(tile: Tile, func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Concatenate tensors that are cut alike along an uncut dimension."""
    dim %= tensors[0].ndim
    for tensor in tensors:
        tile.require_whole(func, tensor, (dim,))
    layouts = {tuple({**dict(enumerate(tile.layout(t))), dim: ()}.values()) for t in tensors}
    layout = _only(func, layouts)
    kept = {i: part for i, part in enumerate(layout) if i != dim}
    return relaid(tile, func(tensors, dim), kept)


def stack(tile: Tile, func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Stack tensors that are cut alike."""
    layout = list(_only(func, {tile.layout(tensor) for tensor in tensors}))
    layout.insert(dim % (len(layout) + 1), whole(len(tensors)))
    return tile.mark(func(tensors, dim), tuple(layout))


def getitem(tile: Tile, func: Any, input: Tensor, index: Any) -> Any:
    """Index uncut dimensions by numbers and slices."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(i is None or i is Ellipsis or type(i) in (int, slice) for i in items):
        refuse(func, "is known with numbers, slices, None and ... only")
    missing = input.ndim - sum(type(i) in (int, slice) for i in items)
    ellipsis_at = items.index(...) if ... in items else len(items)
    items[ellipsis_at : ellipsis_at + 1] = [slice(None)] * missing
    kept: dict[int, Dim] = {}
    input_dim = y_dim = 0
    for item in items:
        size = size_of(tile.layout(input)[input_dim]) if item is not None else 0
        if isinstance(item, slice) and item.indices(size) == (0, size, 1):
            kept[y_dim] = tile.layout(input)[input_dim]
        elif item is not None:
            tile.require_whole(func, input, (input_dim,))
        input_dim += item is not None
        y_dim += type(item) is not int
    return relaid(tile, func(input, index), kept)


# Shapes


def rearrange(tile: Tile, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Permute dimensions, and add or remove dimensions of size 1."""
    layout = tile.layout(input)
    # sizes that are all different show on a meta tensor where each dimension goes
    sizes = [i + 2 if dim else 1 for i, dim in enumerate(layout)]
    shape = func(torch.empty(sizes, device="meta"), *args, **kwargs).shape
    dims = tuple(() if size == 1 else layout[size - 2] for size in shape)
    y = func(input, *args, **kwargs)
    # func also removes a cut dimension where this tile has one pixel: it must stay
    return tile.mark(y if y.ndim == len(dims) else input.reshape(tile.own_sizes(dims)), dims)


def repeat(tile: Tile, func: Any, input: Tensor, *repeats: Any, **named: Any) -> Any:
    """Repeat along uncut dimensions."""
    times = _sizes(*repeats, *named.values())
    layout = [()] * (len(times) - input.ndim) + list(tile.layout(input))
    tile.require_whole(
        func, input, [-i for i, n in enumerate(times[::-1], 1) if n != 1 and i <= input.ndim]
    )
    kept = {i: dim for i, dim in enumerate(layout) if times[i] == 1}
    return relaid(tile, func(input, times), kept)


def reshape(tile: Tile, func: Any, input: Tensor, *shape: Any, **named: Any) -> Any:
    """Split and join dimensions; the shape is that of the whole tensor."""
    sizes = _sizes(*shape, *named.values())
    layout = reshaped(tile.layout(input), sizes)
    return tile.mark(func(input, tile.own_sizes(layout)), layout)


def flatten(tile: Tile, func: Any, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Join dimensions."""
    layout = tile.layout(input)
    start, end = start_dim % input.ndim, end_dim % input.ndim + 1
    inner = joined(itertools.chain.from_iterable(layout[start:end]))
    y = func(input, start_dim, end_dim)
    return tile.mark(y, (*layout[:start], inner, *layout[end:]))


def unflatten(tile: Tile, func: Any, input: Tensor, dim: int, sizes: Sequence[int]) -> Any:
    """Split a dimension."""
    layout = tile.layout(input)
    index = dim % input.ndim
    inner = reshaped((layout[index],), sizes)
    y = func(input, dim, tile.own_sizes(inner))
    return tile.mark(y, (*layout[:index], *inner, *layout[index + 1 :]))


def expand(tile: Tile, func: Any, input: Tensor, *shape: Any, **named: Any) -> Any:
    """Repeat dimensions that have size 1 in the whole tensor."""
    sizes = _sizes(*shape, *named.values())
    layout = [()] * (len(sizes) - input.ndim) + list(tile.layout(input))
    for i, size in enumerate(sizes):
        if size not in (-1, size_of(layout[i])):
            if layout[i]:
                refuse(func, f"to {tuple(sizes)} does not fit")
            layout[i] = whole(size)
    return tile.mark(func(input, tile.own_sizes(tuple(layout))), tuple(layout))


def shape(tile: Tile, func: Any, input: Tensor, dim: int | None = None) -> Any:
    """Return the shape of the whole tensor: the model computes with these sizes in one piece."""
    sizes = torch.Size(map(size_of, tile.layout(input)))
    return sizes if dim is None else sizes[dim]


def raise_if_illegal(tile: Tile, func: Any, args: Any, kwargs: Any, error: Exception) -> None:
    """Call the function on whole tensors of the meta device; raise if that call fails too."""

    def whole_of(part: Tensor) -> Tensor:
        return torch.empty(shape(tile, func, part), dtype=part.dtype, device="meta")

    whole_args, whole_kwargs = pytree.tree_map_only(Tensor, whole_of, (args, kwargs))
    try:
        func(*whole_args, **whole_kwargs)
    except (NotImplementedError, ArithmeticError):
        pass  # a call on real values may succeed
    except Exception as whole_error:
        raise (error if isinstance(error, RuntimeError) else whole_error) from None


def numel(tile: Tile, func: Any, input: Tensor) -> int:
    """Return the number of elements of the whole tensor."""
    return math.prod(map(size_of, tile.layout(input)))


def length(tile: Tile, func: Any, input: Tensor) -> int:
    """Return the first size of the whole tensor."""
    return size_of(tile.layout(input)[0])


def query(tile: Tile, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Return a property that is the same for all tiles."""
    return func(*args, **kwargs)


def _sizes(*shape: Any) -> list[int]:
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    return list(map(operator.index, sizes))


def _only(func: Any, layouts: set[Layout]) -> Layout:
    if len(layouts) > 1:
        refuse(func, "got tensors that are not cut alike")
    return layouts.pop()
