"""Count, mean and m2 (sum of squared deviations) of groups, and how they merge.

The mean is a pair, ``mean + mean_lo``: one float32 cannot hold a mean of 1e4 to the precision that
a deviation of 0.1 asks for. docs/math.md derives the formulas.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .tile import group_sums, groups_of, load_channels, over_groups, over_pixels, zero_outside


class Moments(NamedTuple):
    """Of each group: ``[group_slots]``, or with one more axis for the parts of a group."""

    count: tl.tensor
    mean: tl.tensor
    mean_lo: tl.tensor
    m2: tl.tensor


class Stats(NamedTuple):
    """What normalises an element, made to broadcast against a sub-tile."""

    mean: tl.tensor
    mean_lo: tl.tensor
    rstd: tl.tensor


@triton.jit
def divide(a, b):
    """Correctly rounded; ``/`` on float32 is an approximation on the GPU."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def window_count(window, groups, TILE: tl.constexpr, dtype: tl.constexpr):
    """Elements of each group in the window: ``[group_slots]``."""
    if TILE.groups == 1:
        per_group = window.cols.to(dtype)
    else:
        per_group = tl.full([1], TILE.group_channels, dtype)
    _, mask = groups_of(window, groups, TILE)
    rows = 1 if TILE.stacked else window.rows
    return tl.where(mask, rows * per_group, 0.0)


@triton.jit
def _pair(reference, difference):
    """``reference + difference`` as a pair (Knuth's two-sum)."""
    hi = reference + difference
    rest = hi - reference
    return hi, (reference - (hi - rest)) + (difference - rest)


@triton.jit
def normalise(x, pre_add, stats, window, p: tl.constexpr, TILE: tl.constexpr):
    """x_hat of a sub-tile of pixel tile ``p``; ``pre_add`` per channel, or None.

    Never folded into ``a * x + b``: that would lose what ``mean_lo`` adds. For the same reason
    pre_add is taken from the mean, once per channel, where the sum is again a pair.
    """
    mean, mean_lo = stats.mean, stats.mean_lo
    if pre_add is not None:
        mean, rest = _pair(mean, -over_pixels(pre_add, window, p, TILE))
        mean_lo = mean_lo + rest
    return ((x.to(stats.mean.dtype) - mean) - mean_lo) * stats.rstd


@triton.jit
def window_moments(xs, pre_add, window, groups, TILE: tl.constexpr, dtype: tl.constexpr):
    """Moments of the window's elements, which ``xs`` holds as sub-tiles; of x + pre_add."""
    count = window_count(window, groups, TILE, dtype)
    n = tl.maximum(count, 1.0)
    total = tl.zeros([TILE.rows, TILE.cols], dtype)
    for c in tl.static_range(TILE.channel_tiles):
        if pre_add is not None:
            added = load_channels(pre_add, window, c, TILE, dtype)
        for p in tl.static_range(TILE.pixel_tiles):
            x = xs[c * TILE.pixel_tiles + p].to(dtype)
            if pre_add is not None:
                x = zero_outside(x + over_pixels(added, window, p, TILE), window, c, p, TILE)
            total += x
    mean = divide(group_sums(total, TILE), n)
    centre = Stats(over_groups(mean, TILE), 0.0, 1.0)
    deviations = tl.zeros([TILE.rows, TILE.cols], dtype)
    squares = tl.zeros([TILE.rows, TILE.cols], dtype)
    for c in tl.static_range(TILE.channel_tiles):
        added = None
        if pre_add is not None:
            added = load_channels(pre_add, window, c, TILE, dtype)
        for p in tl.static_range(TILE.pixel_tiles):
            x = xs[c * TILE.pixel_tiles + p]
            centred = normalise(x, added, centre, window, p, TILE)
            centred = zero_outside(centred, window, c, p, TILE)
            deviations += centred
            squares += centred * centred
    deviation = group_sums(deviations, TILE)
    mean_lo = divide(deviation, n)
    return Moments(count, mean, mean_lo, group_sums(squares, TILE) - mean_lo * deviation)


@triton.jit
def combine(a, b):
    """Moments of two disjoint parts; either may be empty."""
    count = a.count + b.count
    # relative to a mean that exists: from 0, a difference would not hold the low part of the pair
    reference = tl.where(a.count > 0, a.mean, b.mean)
    reference_lo = tl.where(a.count > 0, a.mean_lo, b.mean_lo)
    difference = (b.mean - reference) + (b.mean_lo - reference_lo)
    step = difference * divide(b.count, tl.maximum(count, 1.0))
    mean, mean_lo = _pair(reference, reference_lo + step)
    m2 = a.m2 + b.m2 + difference * step * a.count
    return Moments(count, mean, mean_lo, m2)


@triton.jit
def combine_all(parts):
    """Moments of all parts of each group at once: ``[group_slots, parts]`` to ``[group_slots]``.

    Flat and in a fixed order, relative to the first part that has elements; those of count 0 do not
    matter.
    """
    there = parts.count > 0
    count = tl.sum(parts.count, axis=1)
    index = tl.arange(0, parts.mean.shape[1])[None, :]
    first = tl.min(tl.where(there, index, parts.mean.shape[1]), axis=1)
    reference = tl.sum(tl.where(index == first[:, None], parts.mean, 0.0), axis=1)
    difference = tl.where(there, (parts.mean - reference[:, None]) + parts.mean_lo, 0.0)
    step = divide(tl.sum(difference * parts.count, axis=1), tl.maximum(count, 1.0))
    rest = difference - step[:, None]
    m2 = tl.sum(tl.where(there, parts.m2 + parts.count * (rest * rest), 0.0), axis=1)
    mean, mean_lo = _pair(reference, step)
    return Moments(count, mean, mean_lo, m2)


@triton.jit
def rstd_of(moments, eps):
    """``1 / sqrt(m2 / count + eps)``, correctly rounded."""
    # m2 of a constant group can round to just below 0; a NaN stays one
    m2 = tl.where(moments.m2 < 0, 0.0, moments.m2)
    variance = divide(m2, tl.maximum(moments.count, 1.0))
    variance += tl.full(variance.shape, eps, variance.dtype)
    one = tl.full(variance.shape, 1.0, variance.dtype)
    if variance.dtype == tl.float64:
        return one / tl.sqrt(variance)
    else:
        return tl.div_rn(one, tl.sqrt_rn(variance))


@triton.jit
def spread_stats(moments, rstd, TILE: tl.constexpr):
    return Stats(
        over_groups(moments.mean, TILE),
        over_groups(moments.mean_lo, TILE),
        over_groups(rstd, TILE),
    )


@triton.jit
def store_stats(ptr, moments, rstd, window, groups, TILE: tl.constexpr):
    """To ``ptr`` (N, G, 3): mean, mean_lo, rstd."""
    index, mask = groups_of(window, groups, TILE)
    tl.store(ptr + index * 3, moments.mean, mask=mask)
    tl.store(ptr + index * 3 + 1, moments.mean_lo, mask=mask)
    tl.store(ptr + index * 3 + 2, rstd, mask=mask)


@triton.jit
def load_stats(ptr, window, groups, TILE: tl.constexpr):
    index, mask = groups_of(window, groups, TILE)
    mean = tl.load(ptr + index * 3, mask=mask, other=0.0)
    mean_lo = tl.load(ptr + index * 3 + 1, mask=mask, other=0.0)
    rstd = tl.load(ptr + index * 3 + 2, mask=mask, other=0.0)
    return Stats(over_groups(mean, TILE), over_groups(mean_lo, TILE), over_groups(rstd, TILE))
