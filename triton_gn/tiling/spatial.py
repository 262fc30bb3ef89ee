"""Rules of operations that need the pixels of other tiles, or change the number of pixels."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_gn.functional import group_norm_apply, group_norm_stats
from triton_gn.ops import settings
from triton_gn.tiling.layout import Axis, Dim, is_cut, scaled, size_of, whole
from triton_gn.tiling.tile import NO_DROPOUT, Tile, axis_of, each, refuse, relaid

# Norms


def norm(tile: Tile, func: Any, *args: Any, cudnn_enabled: bool = True, **kwargs: Any) -> Tensor:
    """Compute PyTorch's group_norm by the rule of triton_gn's."""
    with settings.autocast_policy("torch"):
        return fused_norm(tile, func, *args[:5], **kwargs)


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
    """Merge the statistics of all tiles, then normalise each tile."""
    tile.require_whole(func, input, (0, 1))
    tile.require_uncut(func, (weight, bias, per_channel))
    layout = tile.layout(input)
    if residual is not None and tile.layout(residual) != layout:
        refuse(func, "got a residual that is not cut as its input is")
    stats = group_norm_stats(input, num_groups, per_channel.get("pre_add"))
    total = tile.exchange(func, (layout,), stats, lambda parts: parts[0].merge(*parts[1:]))
    y = group_norm_apply(
        *(input, total, weight, bias, eps), activation=activation, residual=residual, **per_channel
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
    """Apply an affine function to each channel, in evaluation only."""
    if training or running_mean is None:
        remedy = "Call model.eval() first." if running_mean is not None else ""
        refuse(func, "takes statistics of the pixels", remedy)
    tile.require_whole(func, input, (1,))
    tile.require_uncut(func, (running_mean, running_var, weight, bias))
    y = func(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return tile.mark(y, tile.layout(input))


def trailing_norm(
    tile: Tile, func: Any, input: Tensor, normalized_shape: Sequence[int], *args: Any, **kw: Any
) -> Any:
    """Normalise by layer_norm or rms_norm over the last dimensions, which must not be cut."""
    tile.require_whole(func, input, range(-len(normalized_shape), 0))
    tile.require_uncut(func, (args, kw))
    return tile.mark(func(input, normalized_shape, *args, **kw), tile.layout(input))


# Neighbourhoods and sizes


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
    """Convolve the tile with its neighbours' pixels around it, and zeros at the image's border."""
    tile.require_uncut(func, (weight, bias))
    if input.ndim != weight.ndim:
        refuse(func, "got an input without a batch dimension", "Add one with unsqueeze(0).")
    tile.require_whole(func, input, (1,))
    rank = input.ndim - 2
    strides, dilations = each(stride, rank), each(dilation, rank)
    reaches = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
    if isinstance(padding, str):
        margins = [(r // 2, r - r // 2) if padding == "same" else (0, 0) for r in reaches]
    else:
        margins = [(p, p) for p in each(padding, rank)]
    cut: dict[int, Dim] = {}
    needs, pads = {}, []
    for i, dim in enumerate(tile.layout(input)[2:]):
        before, after = margins[i]
        if is_cut(dim):
            axis = axis_of(func, dim)
            cut[i + 2], needs[i + 2] = _windows(func, axis, reaches[i], strides[i], before, after)
            before = after = 0
        elif before != after:
            refuse(func, "pads one end of an uncut dimension more than the other", "Use F.pad.")
        pads.append(before)
    gathered = tile.gather(func, input, needs) if needs else input
    y = func(gathered, weight, bias, strides, pads, dilations, groups)
    return relaid(tile, y, {0: tile.layout(input)[0], **cut})


def _windows(
    func: Any, axis: Axis, reach: int, stride: int, before: int, after: int
) -> tuple[Dim, list[tuple[int, int]]]:
    """Return the axis after a convolution, and the range of input pixels that each tile needs.

    If the convolution has one output per ``stride`` pixels, a tile computes the outputs of its own
    pixels, so that residuals fit. Otherwise it computes the outputs of the windows centred in it.
    """
    edges = axis.edges
    outputs = (edges[-1] + before + after - reach - 1) // stride + 1
    if outputs < 1:
        raise ValueError(f"no window fits into {edges[-1]} pixels")
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
    """Attend from the tile's queries to all keys; gather cut keys from all tiles."""
    if dropout_p:
        refuse(func, "draws random numbers with dropout_p > 0", NO_DROPOUT)
    tile.require_uncut(func, attn_mask)
    for tensor in (query, key, value):
        tile.require_whole(func, tensor, (-1,))
    q, k, v = (tile.layout(tensor) for tensor in (query, key, value))
    cut_tokens = is_cut(q[-2]) or is_cut(k[-2]) or is_cut(v[-2])
    cut_batch = any(map(is_cut, (*q[:-2], *k[:-2], *v[:-2])))
    if k[-2] != v[-2] or (cut_batch and not q[:-2] == k[:-2] == v[:-2]):
        refuse(func, "got queries, keys and values that are not cut alike")
    columns = _places(tile, k[-2], key.device)
    if is_cut(k[-2]):
        if cut_batch or not tile.is_all_cut(k[-2]):
            refuse(func, "got keys whose tokens and batch are both cut")
        key, value, columns = tile.exchange(
            func,
            (q, k),
            (key, value, columns),
            lambda parts: [torch.cat(tensors, -2) for tensors in zip(*parts, strict=True)],
        )
    # gathered keys are in tile order: reorder the mask alike, as softmax ignores the order
    if attn_mask is not None:
        for i, dim in enumerate((k[-2], *q[-2::-1]), 1):
            if is_cut(dim) and i <= attn_mask.ndim and attn_mask.shape[-i] != 1:
                places = columns if i == 1 else _places(tile, dim, key.device)
                attn_mask = attn_mask.index_select(-i, places[:, 0])
    elif is_causal and cut_tokens:
        attn_mask, is_causal = _places(tile, q[-2], key.device) >= columns.T, False
    y = func(query, key, value, attn_mask, 0.0, is_causal, **kwargs)
    if not (cut_tokens or cut_batch):
        return tile.mark(y)
    return tile.mark(y, (*q[:-1], whole(y.shape[-1])))


def _places(tile: Tile, dim: Dim, device: torch.device) -> Tensor:
    """Return the positions (size, 1) of the tile's values along a dimension of the whole tensor."""
    sizes = [size_of((factor,)) for factor in dim]
    places = torch.arange(size_of(dim), device=device).reshape(sizes)
    return tile.cut(places, [(factor,) for factor in dim]).reshape(-1, 1)


def pad(
    tile: Tile,
    func: Any,
    input: Tensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> Any:
    """Pad the tiles at the image's border only; these hold the pixels to mirror."""
    layout = tile.layout(input)
    local, cut = list(pad), {}
    for i, dim in enumerate(reversed(layout[-(len(pad) // 2) :])):
        before, after = pad[2 * i : 2 * i + 2]
        if not is_cut(dim) or not (before or after):
            cut[input.ndim - 1 - i] = dim if not (before or after) else None
            continue
        if mode == "circular" or before < 0 or after < 0:
            refuse(func, f"takes pixels of the other end or removes some: {mode} {tuple(pad)}")
        axis = axis_of(func, dim)
        if mode == "reflect" and (before >= axis.sizes[0] or after >= axis.sizes[-1]):
            refuse(func, f"reflects more than a tile: {tuple(pad)}", "Use larger tiles.")
        sizes = list(axis.sizes)
        sizes[0] += before
        sizes[-1] += after
        padding = (axis.padding[0] + before, axis.padding[1] + after)
        cut[input.ndim - 1 - i] = (Axis(axis.number, tuple(sizes), padding),)
        place = tile.coords[axis.number]
        local[2 * i] = before if place == 0 else 0
        local[2 * i + 1] = after if place == len(sizes) - 1 else 0
    kept = dict(enumerate(layout[: input.ndim - len(pad) // 2]))
    return relaid(tile, func(input, local, mode, value), kept | cut)


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
    """Upsample to the nearest pixel by powers of two, where index rounding cannot matter."""
    layout = tile.layout(input)
    rank = input.ndim - 2
    if mode not in ("nearest", "nearest-exact"):
        refuse(func, f"in mode {mode!r} weighs pixels of other tiles", "Use nearest.")
    cut = {0: layout[0], 1: layout[1]}
    sizes = []
    for i, dim in enumerate(layout[2:]):
        before = size_of(dim)
        if size is not None:
            after = each(size, rank)[i]
        else:
            after = int(before * each(scale_factor, rank)[i])
        factor = after // before
        if after != before * factor or factor.bit_count() != 1:
            refuse(func, f"from {before} to {after} pixels is by no power of two", "Use 2, 4, 8...")
        if is_cut(dim):
            cut[i + 2] = (scaled(axis_of(func, dim), factor),)
            after = input.shape[i + 2] * factor
        sizes.append(after)
    return relaid(tile, func(input, tuple(sizes), mode=mode), cut)


def pixel_shuffle(tile: Tile, func: Any, input: Tensor, factor: int) -> Any:
    """Turn channels into pixels, or back."""
    tile.require_whole(func, input, (-3,))
    *batch, channels, height, width = tile.layout(input)
    y = func(input, factor)
    ratio = (1, factor) if y.shape[-3] > size_of(channels) else (factor,)
    cut = dict(enumerate(batch))
    for i, dim in enumerate((height, width), start=len(batch) + 1):
        if is_cut(dim):
            cut[i] = (scaled(axis_of(func, dim), *ratio),)
    return relaid(tile, y, cut)


def repeat_interleave(
    tile: Tile, func: Any, input: Tensor, repeats: int, dim: int | None = None, **output_size: Any
) -> Any:
    """Repeat each value along a dimension."""
    if dim is None or not isinstance(repeats, int):
        refuse(func, "is known with an int of repeats and a dimension only")
    layout = dict(enumerate(tile.layout(input)))
    index = dim % input.ndim
    repeated = layout.pop(index)
    if is_cut(repeated):
        layout[index] = (scaled(axis_of(func, repeated), repeats),)
    return relaid(tile, func(input, repeats, dim), layout)
