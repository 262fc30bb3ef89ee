"""What each operation does to layouts, and which of them need other tiles."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from triton_gn.functional import group_norm
from triton_gn.ops import settings
from triton_gn.statistics import group_norm_apply, group_norm_stats
from triton_gn.tiling.layout import (
    Axis,
    Dim,
    Layout,
    is_cut,
    joined,
    reshaped,
    size_of,
    whole,
)
from triton_gn.tiling.tile import Tile, leaves, refuse

Rule = Callable[..., Any]


# Norms


def norm(
    tile: Tile,
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """PyTorch's group_norm."""
    with settings.autocast_policy("torch"):
        return fused_norm(tile, func, input, num_groups, weight, bias, eps)


def fused_norm(
    tile: Tile,
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    **per_channel: Any,
) -> Tensor:
    """Two passes: the statistics of all tiles together, then each of them by these."""
    tile.require_whole(func, input, (0, 1))
    tile.require_uncut(func, (weight, bias, per_channel))
    layout = tile.layout(input)
    if residual is not None and tile.layout(residual) != layout:
        refuse(func, "got a residual that is not cut as its input is")
    stats = group_norm_stats(input, num_groups, per_channel.get("pre_add"))
    total = tile.exchange(func, (layout,), stats, lambda parts: parts[0].merge(*parts[1:]))
    y = group_norm_apply(
        *(input, total, weight, bias, eps),
        activation=activation,
        residual=residual,
        **per_channel,
    )
    return tile.mark(y, layout)  # type: ignore[no-any-return]


def batch_norm(
    tile: Tile,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """In evaluation only: an affine function of each channel."""
    if training or running_mean is None:
        refuse(func, "takes statistics of the pixels in training", "Call model.eval() first.")
    tile.require_whole(func, input, (1,))
    y = func(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return tile.mark(y, tile.layout(input))


def trailing_norm(
    tile: Tile, func: Any, input: Tensor, normalized_shape: Sequence[int], *args: Any, **kw: Any
) -> Any:
    """layer_norm and rms_norm: over the last dimensions."""
    tile.require_whole(func, input, range(-len(normalized_shape), 0))
    return tile.mark(func(input, normalized_shape, *args, **kw), tile.layout(input))


# What looks beyond a pixel


def conv(
    tile: Tile,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """On the tile with the neighbours' pixels around it, zeros at the true border only."""
    tile.require_uncut(func, (weight, bias))
    if input.ndim != weight.ndim:
        refuse(func, "got an input without a batch dimension", "Add one with unsqueeze(0).")
    tile.require_whole(func, input, (1,))
    rank = input.ndim - 2
    strides, dilations = _each(stride, rank), _each(dilation, rank)
    reaches = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
    if isinstance(padding, str):
        margins = [(r // 2, r - r // 2) if padding == "same" else (0, 0) for r in reaches]
    else:
        margins = [(p, p) for p in _each(padding, rank)]
    cut: dict[int, Dim] = {}
    needs, pads = {}, []
    for i, dim in enumerate(tile.layout(input)[2:]):
        before, after = margins[i]
        if is_cut(dim):
            axis = _axis(func, dim)
            cut[i + 2], needs[i + 2] = _windows(func, axis, reaches[i], strides[i], before, after)
            before = after = 0
        elif before != after:
            refuse(func, "pads one end of an uncut dimension more than the other", "Use F.pad.")
        pads.append(before)
    gathered = tile.gather(func, input, needs) if needs else input
    y = func(gathered, weight, bias, strides, pads, dilations, groups)
    return _relaid(tile, y, {0: tile.layout(input)[0], **cut})


def _windows(
    func: Any, axis: Axis, reach: int, stride: int, before: int, after: int
) -> tuple[Dim, list[tuple[int, int]]]:
    """The axis after a convolution, and what each tile needs of the axis before it.

    Where there is an output for each pixel, or for each one in ``stride``, a tile makes those of
    its own pixels, so that residuals fit; else those of the windows with their centre in it.
    """
    edges = axis.edges
    outputs = (edges[-1] + before + after - reach - 1) // stride + 1
    fits = outputs == -((sum(axis.padding) - edges[-1]) // stride)
    first_home = axis.padding[0] if fits else reach // 2 - before
    inner = [min(max(-((first_home - edge) // stride), 0), outputs) for edge in edges[1:-1]]
    spans = list(itertools.pairwise([0, *inner, outputs]))
    if any(first >= last for first, last in spans):
        refuse(func, f"leaves a tile of {axis.sizes} pixels without output", "Use larger tiles.")
    needs = [
        (first * stride - before, (last - 1) * stride - before + reach + 1) for first, last in spans
    ]
    return (Axis(axis.number, tuple(last - first for first, last in spans)),), needs


def attention(
    tile: Tile,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Any:
    """Each query of the tile over all keys: those of all tiles if they are cut."""
    if dropout_p:
        refuse(func, "draws random numbers with dropout_p > 0", "Call model.eval() first.")
    for tensor in (query, key, value):
        tile.require_whole(func, tensor, (-1,))
    q, k, v = (tile.layout(tensor) for tensor in (query, key, value))
    cut_tokens = is_cut(q[-2]) or is_cut(k[-2]) or is_cut(v[-2])
    cut_batch = any(map(is_cut, (*q[:-2], *k[:-2], *v[:-2])))
    if (attn_mask is not None and (cut_tokens or cut_batch)) or (is_causal and cut_tokens):
        refuse(func, "got a mask, which is of all pixels", "Attend without a mask.")
    if cut_batch and not q[:-2] == k[:-2] == v[:-2]:
        refuse(func, "got queries, keys and values whose batches are not cut alike")
    if k[-2] != v[-2]:
        refuse(func, "got keys and values that are not cut alike")
    if is_cut(k[-2]):
        if cut_batch:
            refuse(func, "got keys whose tokens and batch are both cut")
        # the softmax does not care about the order of the keys
        key, value = tile.exchange(
            func,
            (q, k),
            (key, value),
            lambda parts: [torch.cat(tensors, -2) for tensors in zip(*parts, strict=True)],
        )
    y = func(query, key, value, attn_mask, 0.0, is_causal, **kwargs)
    if not (cut_tokens or cut_batch):
        return tile.mark(y)
    return tile.mark(y, (*q[:-1], whole(y.shape[-1])))


def pad(
    tile: Tile,
    func: Any,
    input: Tensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> Any:
    """By the tiles at the border only: these have the pixels that are mirrored."""
    layout = tile.layout(input)
    local, cut = list(pad), {}
    for i, dim in enumerate(reversed(layout[-(len(pad) // 2) :])):
        before, after = pad[2 * i : 2 * i + 2]
        if not is_cut(dim) or not (before or after):
            cut[input.ndim - 1 - i] = dim if not (before or after) else None
            continue
        if mode == "circular" or before < 0 or after < 0:
            refuse(func, f"takes pixels of the other end or removes some: {mode} {tuple(pad)}")
        axis = _axis(func, dim)
        sizes = list(axis.sizes)
        sizes[0] += before
        sizes[-1] += after
        padding = (axis.padding[0] + before, axis.padding[1] + after)
        cut[input.ndim - 1 - i] = (Axis(axis.number, tuple(sizes), padding),)
        place = tile.coords[axis.number]
        local[2 * i] = before if place == 0 else 0
        local[2 * i + 1] = after if place == len(sizes) - 1 else 0
    kept = dict(enumerate(layout[: input.ndim - len(pad) // 2]))
    return _relaid(tile, func(input, local, mode, value), kept | cut)


def interpolate(
    tile: Tile,
    func: Any,
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    *args: Any,
    **kwargs: Any,
) -> Any:
    """To the nearest pixel and by powers of two, which the rounding of indices cannot disturb."""
    layout = tile.layout(input)
    rank = input.ndim - 2
    if mode not in ("nearest", "nearest-exact"):
        refuse(func, f"in mode {mode!r} weighs pixels of other tiles", "Use nearest.")
    cut = {0: layout[0], 1: layout[1]}
    sizes = []
    for i, dim in enumerate(layout[2:]):
        before = size_of(dim)
        if size is not None:
            after = _each(size, rank)[i]
        else:
            after = int(before * _each(scale_factor, rank)[i])
        factor = after // before
        if after != before * factor or factor.bit_count() != 1:
            refuse(func, f"from {before} to {after} pixels is by no power of two", "Use 2, 4, 8...")
        if is_cut(dim):
            cut[i + 2] = (_scaled(_axis(func, dim), factor),)
            after = input.shape[i + 2] * factor
        sizes.append(after)
    return _relaid(tile, func(input, tuple(sizes), mode=mode), cut)


def pixel_shuffle(tile: Tile, func: Any, input: Tensor, upscale_factor: int) -> Any:
    """From channels to pixels."""
    tile.require_whole(func, input, (-3,))
    *rest, _, high, wide = tile.layout(input)
    cut = dict(enumerate(rest))
    for i, dim in enumerate((high, wide), start=len(rest) + 1):
        if is_cut(dim):
            cut[i] = (_scaled(_axis(func, dim), upscale_factor),)
    return _relaid(tile, func(input, upscale_factor), cut)


def repeat_interleave(
    tile: Tile, func: Any, input: Tensor, repeats: int, dim: int | None = None
) -> Any:
    """Each value several times along a dimension."""
    if dim is None or not isinstance(repeats, int):
        refuse(func, "is known with one number of repeats and a dimension only")
    layout = dict(enumerate(tile.layout(input)))
    at = dim % input.ndim
    before = layout.pop(at)
    if is_cut(before):
        layout[at] = (_scaled(_axis(func, before), repeats),)
    return _relaid(tile, func(input, repeats, dim), layout)


# Products


def linear(tile: Tile, func: Any, input: Tensor, weight: Tensor, bias: Any = None) -> Any:
    """Along the last dimension."""
    tile.require_uncut(func, (weight, bias))
    tile.require_whole(func, input, (-1,))
    y = func(input, weight, bias)
    return tile.mark(y, (*tile.layout(input)[:-1], whole(y.shape[-1])))


def matmul(tile: Tile, func: Any, input: Tensor, other: Tensor) -> Any:
    """Of matrices with an uncut inner dimension; only one may have pixels."""
    if min(input.ndim, other.ndim) < 2:
        refuse(func, "is known for matrices only")
    tile.require_whole(func, input, (-1,))
    tile.require_whole(func, other, (-2,))
    a, b = tile.layout(input), tile.layout(other)
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
    """Operands broadcast."""
    layout = tile.broadcast(func, [tile.layout(t) for t in leaves((args, kwargs), Tensor)])
    y = func(*args, **kwargs)
    if not isinstance(y, Tensor):
        refuse(func, "is known with one result only")
    return tile.mark(y, layout)


def like_first(tile: Tile, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Conversions, copies, constants of the same size."""
    return tile.mark(func(input, *args, **kwargs), tile.layout(input))


def dropout(
    tile: Tile,
    func: Any,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Any:
    """Nothing in evaluation."""
    if training and p:
        refuse(func, "draws random numbers in training", "Call model.eval() first.")
    return tile.mark(func(input, p, False), tile.layout(input))


# Along one dimension, which must not be cut


def softmax(tile: Tile, func: Any, input: Tensor, dim: Any = None, *args: Any, **kw: Any) -> Any:
    """Keeps the sizes."""
    if not isinstance(dim, int):
        refuse(func, "was called without a dimension", "Say which: dim=...")
    tile.require_whole(func, input, (dim,))
    return tile.mark(func(input, dim, *args, **kw), tile.layout(input))


def normalize(
    tile: Tile, func: Any, input: Tensor, p: float = 2.0, dim: Any = 1, *args: Any, **kw: Any
) -> Any:
    """Keeps the sizes."""
    tile.require_whole(func, input, _each(dim, 1))
    return tile.mark(func(input, p, dim, *args, **kw), tile.layout(input))


def reduce(
    tile: Tile, func: Any, input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Any:
    """Takes dimensions away."""
    dims = range(input.ndim) if dim is None or dim == () else _each(dim, 1)
    tile.require_whole(func, input, dims)
    reduced = {d % input.ndim for d in dims}
    layout = [
        () if i in reduced else dim
        for i, dim in enumerate(tile.layout(input))
        if keepdim or i not in reduced
    ]
    return tile.mark(func(input, dim, keepdim, **kwargs), tuple(layout))


def split(tile: Tile, func: Any, input: Tensor, *args: Any, dim: int = 0, **kwargs: Any) -> Any:
    """split and chunk."""
    size, dim = args[:1], (*args, dim)[1 if len(args) == 2 else -1]
    tile.require_whole(func, input, (dim,))
    kept = dict(enumerate(tile.layout(input)))
    del kept[dim % input.ndim]
    parts = func(input, *size, dim=dim, **kwargs)
    for part in parts:
        _relaid(tile, part, kept)
    return parts


def unbind(tile: Tile, func: Any, input: Tensor, dim: int = 0) -> Any:
    """All slices along a dimension."""
    tile.require_whole(func, input, (dim,))
    layout = list(tile.layout(input))
    del layout[dim]
    return tile.mark(func(input, dim), tuple(layout))


def cat(tile: Tile, func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Of tensors that are cut alike."""
    dim %= tensors[0].ndim
    for tensor in tensors:
        tile.require_whole(func, tensor, (dim,))
    layouts = {tuple({**dict(enumerate(tile.layout(t))), dim: ()}.values()) for t in tensors}
    layout = _only(func, layouts)
    kept = {i: part for i, part in enumerate(layout) if i != dim}
    return _relaid(tile, func(tensors, dim), kept)


def stack(tile: Tile, func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Of tensors that are cut alike."""
    layout = list(_only(func, {tile.layout(tensor) for tensor in tensors}))
    layout.insert(dim % (len(layout) + 1), whole(len(tensors)))
    return tile.mark(func(tensors, dim), tuple(layout))


def getitem(tile: Tile, func: Any, input: Tensor, index: Any) -> Any:
    """By numbers and slices of what is not cut."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(i is None or i is Ellipsis or type(i) in (int, slice) for i in items):
        refuse(func, "is known with numbers, slices, None and ... only")
    missing = input.ndim - sum(type(i) in (int, slice) for i in items)
    at = items.index(...) if ... in items else len(items)
    items[at : at + 1] = [slice(None)] * missing
    kept: dict[int, Dim] = {}
    taken = made = 0
    for item in items:
        if item == slice(None):
            kept[made] = tile.layout(input)[taken]
        elif item is not None:
            tile.require_whole(func, input, (taken,))
        taken += item is not None
        made += type(item) is not int
    return _relaid(tile, func(input, index), kept)


# Shapes


def rearrange(tile: Tile, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Permutes dimensions, adds some of size 1 or takes them away: as with sizes all different."""
    layout = tile.layout(input)
    sizes = [i + 2 if dim else 1 for i, dim in enumerate(layout)]
    shape = func(torch.empty(sizes, device="meta"), *args, **kwargs).shape
    y = func(input, *args, **kwargs)
    if y.ndim != len(shape):
        refuse(func, "takes away a dimension of which other tiles have the rest", "Name others.")
    return tile.mark(y, tuple(() if size == 1 else layout[size - 2] for size in shape))


def reshape(tile: Tile, func: Any, input: Tensor, *shape: Any) -> Any:
    """Splits and joins dimensions; the sizes are those of the whole."""
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    if not all(isinstance(size, int) for size in sizes):
        refuse(func, "is known with sizes only")
    layout = _reshaped(func, tile.layout(input), sizes)
    return tile.mark(func(input, tile.own_sizes(layout)), layout)


def flatten(tile: Tile, func: Any, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Joins dimensions."""
    layout = tile.layout(input)
    start, end = start_dim % input.ndim, end_dim % input.ndim + 1
    inner = joined(itertools.chain.from_iterable(layout[start:end]))
    y = func(input, start_dim, end_dim)
    return tile.mark(y, (*layout[:start], inner, *layout[end:]))


def unflatten(tile: Tile, func: Any, input: Tensor, dim: int, sizes: Sequence[int]) -> Any:
    """Splits a dimension."""
    layout = tile.layout(input)
    at = dim % input.ndim
    inner = _reshaped(func, (layout[at],), sizes)
    y = func(input, dim, tile.own_sizes(inner))
    return tile.mark(y, (*layout[:at], *inner, *layout[at + 1 :]))


def expand(tile: Tile, func: Any, input: Tensor, *shape: Any) -> Any:
    """Repeats what has size 1 in the whole."""
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    layout = [()] * (len(sizes) - input.ndim) + list(tile.layout(input))
    for i, size in enumerate(sizes):
        if size not in (-1, size_of(layout[i])):
            tile_dim = layout[i]
            if tile_dim:
                refuse(func, f"to {tuple(sizes)} does not fit")
            layout[i] = whole(size)
    return tile.mark(func(input, tile.own_sizes(tuple(layout))), tuple(layout))


def shape(tile: Tile, func: Any, input: Tensor, dim: int | None = None) -> Any:
    """Of the whole, so that the model computes with the sizes that it has in one piece."""
    sizes = torch.Size(map(size_of, tile.layout(input)))
    return sizes if dim is None else sizes[dim]


def numel(tile: Tile, func: Any, input: Tensor) -> int:
    """Of the whole."""
    return math.prod(map(size_of, tile.layout(input)))


def length(tile: Tile, func: Any, input: Tensor) -> int:
    """Of the whole."""
    return size_of(tile.layout(input)[0])


def query(tile: Tile, func: Any, *args: Any, **kwargs: Any) -> Any:
    """What is no tensor and the same for all tiles."""
    return func(*args, **kwargs)


def _each(value: Any, rank: int) -> list[Any]:
    values = list(value) if isinstance(value, tuple | list) else [value] * rank
    return values * rank if len(values) == 1 else values


def _reshaped(func: Any, layout: Layout, sizes: Sequence[int]) -> Layout:
    found = reshaped(layout, sizes)
    if found is None:
        before = tuple(map(size_of, layout))
        refuse(func, f"from {before} to {tuple(sizes)} mixes pixels of several tiles")
    return found


def _axis(func: Any, dim: Dim) -> Axis:
    if len(dim) == 1 and isinstance(dim[0], Axis):
        return dim[0]
    refuse(func, "works along a dimension in which pixels are flattened")


def _scaled(axis: Axis, factor: int) -> Axis:
    return Axis(axis.number, tuple(size * factor for size in axis.sizes))


def _relaid(tile: Tile, y: Tensor, kept: dict[int, Any]) -> Any:
    """Mark a result whose dimensions are as in ``kept``, the others not cut."""
    dims = (kept.get(i) for i in range(y.ndim))
    layout = tuple(
        whole(size) if dim is None else dim for size, dim in zip(y.shape, dims, strict=True)
    )
    return tile.mark(y, layout)


def _only(func: Any, layouts: set[Layout]) -> Layout:
    if len(layouts) > 1:
        refuse(func, "got tensors that are not cut alike")
    return layouts.pop()


_NAMES: dict[Rule, str] = {
    norm: "group_norm",
    batch_norm: "batch_norm",
    trailing_norm: "layer_norm rms_norm",
    conv: "conv1d conv2d conv3d",
    attention: "scaled_dot_product_attention",
    pad: "pad",
    interpolate: "interpolate",
    pixel_shuffle: "pixel_shuffle",
    repeat_interleave: "repeat_interleave",
    linear: "linear",
    matmul: "matmul bmm mm __matmul__",
    dropout: "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout",
    softmax: "softmax log_softmax",
    normalize: "normalize",
    reduce: "mean sum amax amin",
    split: "split chunk",
    unbind: "unbind",
    cat: "cat concat concatenate",
    stack: "stack",
    getitem: "__getitem__",
    rearrange: "permute transpose swapaxes swapdims movedim moveaxis t T mT unsqueeze squeeze",
    reshape: "view reshape",
    expand: "expand broadcast_to",
    flatten: "flatten",
    unflatten: "unflatten",
    shape: "shape size",
    numel: "numel nelement",
    length: "__len__",
    like_first: "to float double half bfloat16 type type_as cpu cuda contiguous clone detach "
    "zeros_like ones_like full_like",
    query: "dtype device layout ndim dim requires_grad is_leaf grad_fn is_cuda is_cpu is_meta "
    "is_mps is_xpu is_sparse is_nested is_quantized is_contiguous is_floating_point is_complex "
    "element_size get_device __hash__",
    # and these in place, by their names with a line below
    pointwise: "add sub subtract mul multiply div divide true_divide floor_divide rsub pow "
    "remainder fmod maximum minimum clamp clamp_min clamp_max clip where lerp addcmul addcdiv "
    "masked_fill neg negative positive abs absolute sign floor ceil round trunc reciprocal "
    "sqrt rsqrt square "
    "exp exp2 expm1 log log2 log10 log1p sin cos tan erf sigmoid tanh nan_to_num isnan isinf "
    "isfinite eq ne lt le gt ge logical_and logical_or logical_not logical_xor copy "
    "relu relu6 leaky_relu elu selu celu gelu silu mish softplus softsign hardtanh hardswish "
    "hardsigmoid hardshrink softshrink tanhshrink threshold logsigmoid __add__ __sub__ __mul__ "
    "__truediv__ __floordiv__ __mod__ __pow__ __neg__ __pos__ __abs__ __eq__ __ne__ __lt__ __le__ "
    "__gt__ __ge__ __invert__ __and__ __or__ __xor__ __radd__ __rsub__ __rmul__ __rtruediv__ "
    "__rfloordiv__ __rmod__ __rpow__ __rdiv__ __div__ __iadd__ __isub__ __imul__ __itruediv__ "
    "__idiv__ __ifloordiv__ __ipow__",
}


def _functions(rule: Rule, name: str) -> Iterator[Any]:
    """All that PyTorch calls by this name."""
    in_place = f"{name}_" if rule in (pointwise, dropout) and not name.endswith("_") else name
    for home in (torch, Tensor, F, torch._C._nn):
        for alias in (name, in_place):
            found = getattr(home, alias, None)
            if callable(found):
                yield found
            elif inspect.isgetsetdescriptor(found):  # an attribute of tensors
                yield found.__get__


RULES: dict[Any, Rule] = {
    function: rule
    for rule, names in _NAMES.items()
    for name in names.split()
    for function in _functions(rule, name)
} | {group_norm: fused_norm}

# must be asked even where nothing is cut: they may draw random numbers or change buffers
ALWAYS_ASKED = {dropout, attention, batch_norm}
