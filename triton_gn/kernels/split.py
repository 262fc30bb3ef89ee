"""Split: several programs share a group. The first launch leaves each program's partial sums, the
second merges the partials of its groups and applies them.

A partial result goes to a slot of its own, ``slots`` of them per group, so nothing is atomic. The
two halves are functions of a program's number: ``pipelined`` has them in one launch.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .epilogue import (
    add_dz_sums,
    dz_of,
    load_affine,
    load_affine_to_activation,
    load_slope,
    write_dx,
    write_y,
)
from .moments import (
    Moments,
    add_deviations,
    centre_of,
    combine,
    combine_all,
    divide,
    load_stats,
    moments_of,
    no_deviations,
    rough_mean,
    rstd_of,
    spread_stats,
    store_stats,
    window_count,
)
from .params import store_param_grads, sum_params
from .tile import (
    SIZES,
    channel_sums,
    group_count,
    group_sums,
    groups_of,
    load_tiles,
    no_channel_sums,
    over_groups,
    step_of,
    steps_of,
    store_channels,
    store_tile,
    window_of,
)

# whose deviations are from the mean of the first of them: more would lose more of m2
STEPS_AT_ONCE = tl.constexpr(16)


class Cut(NamedTuple):
    """How the tensor is cut among programs: ``chunks`` of ``chunk_vecs`` for each group, ``slots``
    for their partial results."""

    groups: tl.tensor
    pixels: tl.tensor
    row_vecs: tl.tensor
    chunks: tl.tensor
    chunk_vecs: tl.tensor
    slots: tl.tensor


@triton.jit
def _window(pid, cut, TILE: tl.constexpr):
    return window_of(pid, cut.groups, cut.pixels, cut.row_vecs, cut.chunks, cut.chunk_vecs, TILE)


@triton.jit
def _load_partials(
    ptr, group, mask, slots, first, field: tl.constexpr, FIELDS: tl.constexpr, SLOTS: tl.constexpr
):
    """``[groups, SLOTS]``: a field of the groups' partials (..., FIELDS, slots), from the
    ``first`` on."""
    slot = first + tl.arange(0, SLOTS)[None, :]
    index = (group[:, None] * FIELDS + field) * slots + slot
    # past L1, which does not hear of what other programs of this launch have stored
    return tl.load(
        ptr + index, mask=mask[:, None] & (slot < slots), other=0.0, cache_modifier=".cg"
    )


@triton.jit
def _some_merged(partials_ptr, group, mask, slots, first, SLOTS: tl.constexpr):
    parts = Moments(
        _load_partials(partials_ptr, group, mask, slots, first, 0, 4, SLOTS),
        _load_partials(partials_ptr, group, mask, slots, first, 1, 4, SLOTS),
        _load_partials(partials_ptr, group, mask, slots, first, 2, 4, SLOTS),
        _load_partials(partials_ptr, group, mask, slots, first, 3, 4, SLOTS),
    )
    return combine_all(parts)


@triton.jit
def _merged_moments(partials_ptr, group, mask, slots, SLOTS: tl.constexpr):
    """Moments of the groups, from all their partials."""
    merged = _some_merged(partials_ptr, group, mask, slots, 0, SLOTS)
    count, mean, mean_lo, m2 = merged.count, merged.mean, merged.mean_lo, merged.m2
    for first in range(SLOTS, slots, SLOTS):
        merged = combine(
            Moments(count, mean, mean_lo, m2),
            _some_merged(partials_ptr, group, mask, slots, first, SLOTS),
        )
        count, mean, mean_lo, m2 = merged.count, merged.mean, merged.mean_lo, merged.m2
    return Moments(count, mean, mean_lo, m2)


@triton.jit
def leave_moments(pid, x_ptr, coeffs, partials_ptr, cut, TILE: tl.constexpr, EVICT: tl.constexpr):
    """Of the ``pid``-th chunk, to its slot of partials (N, G, 4, slots): count, mean, mean_lo,
    m2."""
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    window = _window(pid, cut, TILE)
    none = tl.zeros([TILE.group_slots], dtype)
    count, mean, mean_lo, m2 = none, none, none, none
    steps = steps_of(window, TILE)
    for first in range(0, steps, STEPS_AT_ONCE):
        # deviations from the mean of the first stretch, so that a reduction at the end is enough
        part = step_of(window, first, TILE)
        xs = load_tiles(x_ptr, part, TILE, EVICT)
        elements = window_count(part, TILE, dtype)
        reference = rough_mean(xs, coeffs.pre_add, part, TILE, dtype)
        deviations = no_deviations(TILE, dtype)
        deviations = add_deviations(deviations, xs, coeffs.pre_add, reference, part, TILE)
        for step in range(first + 1, tl.minimum(first + STEPS_AT_ONCE, steps)):
            part = step_of(window, step, TILE)
            xs = load_tiles(x_ptr, part, TILE, EVICT)
            elements += window_count(part, TILE, dtype)
            deviations = add_deviations(deviations, xs, coeffs.pre_add, reference, part, TILE)
        merged = combine(
            Moments(count, mean, mean_lo, m2), moments_of(deviations, reference, elements, TILE)
        )
        count, mean, mean_lo, m2 = merged.count, merged.mean, merged.mean_lo, merged.m2
    group, mask = groups_of(window, cut.groups, TILE)
    index = group * 4 * cut.slots + window.slot
    tl.store(partials_ptr + index, count, mask=mask)
    tl.store(partials_ptr + index + cut.slots, mean, mask=mask)
    tl.store(partials_ptr + index + 2 * cut.slots, mean_lo, mask=mask)
    tl.store(partials_ptr + index + 3 * cut.slots, m2, mask=mask)


@triton.jit
def apply_moments(
    pid, x_ptr, residual_ptr, coeffs, partials_ptr, y_ptr, stats_ptr, cut, eps,
    SLOTS: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """y of the ``pid``-th chunk, and the stats of its groups where it is their first."""
    window = _window(pid, cut, TILE)
    group, mask = groups_of(window, cut.groups, TILE)
    moments = _merged_moments(partials_ptr, group, mask, cut.slots, SLOTS)
    rstd = rstd_of(moments, eps)
    if stats_ptr is not None:
        if window.slot == 0:
            store_stats(stats_ptr, moments, rstd, window, cut.groups, TILE)
    affine = load_affine(coeffs, spread_stats(moments, rstd, TILE), window, 0, TILE)
    for step in range(0, steps_of(window, TILE)):
        part = step_of(window, step, TILE)
        xs = load_tiles(x_ptr, part, TILE, EVICT)
        write_y(xs, residual_ptr, affine, y_ptr, part, 0, TILE, ACTIVATION)


@triton.jit
def leave_sums(
    pid, dy_ptr, x_ptr, residual_ptr, coeffs, stats_ptr, partials_ptr, dresidual_ptr, grads, cut,
    TILE: tl.constexpr, ACTIVATION: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Of the ``pid``-th chunk, to its slot of partials (N, G, 2, slots): sum(dx_hat),
    sum(dx_hat * x_hat); its dresidual, and its row of each of ``grads`` but pre_add."""
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    window = _window(pid, cut, TILE)
    stats = load_stats(stats_ptr, window, cut.groups, TILE)
    centre, _ = centre_of(coeffs.pre_add, stats.mean, stats.mean_lo, window, 0, TILE, dtype)
    affine = load_affine_to_activation(coeffs, stats, window, 0, TILE, ACTIVATION)
    sums = no_channel_sums(TILE, dtype), no_channel_sums(TILE, dtype)
    for step in range(0, steps_of(window, TILE)):
        part = step_of(window, step, TILE)
        xs = load_tiles(x_ptr, part, TILE, EVICT)
        dys = load_tiles(dy_ptr, part, TILE, EVICT)
        residuals = load_tiles(residual_ptr, part, TILE, EVICT)
        for p in tl.static_range(TILE.pixel_tiles):
            dz = dz_of(dys, residuals, xs, affine, part, 0, p, TILE, ACTIVATION, dtype)
            if dresidual_ptr is not None:
                store_tile(dresidual_ptr, dz, part, 0, p, TILE)
            sums = add_dz_sums(sums, dz, xs[p], centre, part, p, TILE)
    dx_hat_sums, dx_hat_x_hat_sums = store_param_grads(
        sums, coeffs, stats, grads, window, 0, cut.groups, cut.chunks, TILE
    )
    group, mask = groups_of(window, cut.groups, TILE)
    index = group * 2 * cut.slots + window.slot
    tl.store(partials_ptr + index, group_sums(dx_hat_sums, TILE), mask=mask)
    tl.store(partials_ptr + index + cut.slots, group_sums(dx_hat_x_hat_sums, TILE), mask=mask)


@triton.jit
def apply_sums(
    pid, dy_ptr, x_ptr, residual_ptr, coeffs, stats_ptr, partials_ptr, dx_ptr, dpre_add_ptr, cut,
    SLOTS: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """dx of the ``pid``-th chunk and its row of dpre_add, each unless None.

    Without partials, those at fixed statistics.
    """
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    window = _window(pid, cut, TILE)
    stats = load_stats(stats_ptr, window, cut.groups, TILE)
    dx_hat_sum = tl.zeros([TILE.group_slots], dtype)
    dx_hat_x_hat_sum = tl.zeros([TILE.group_slots], dtype)
    if partials_ptr is not None:
        group, mask = groups_of(window, cut.groups, TILE)
        for first in range(0, cut.slots, SLOTS):
            parts = _load_partials(partials_ptr, group, mask, cut.slots, first, 0, 2, SLOTS)
            dx_hat_sum += tl.sum(parts, axis=1)
            parts = _load_partials(partials_ptr, group, mask, cut.slots, first, 1, 2, SLOTS)
            dx_hat_x_hat_sum += tl.sum(parts, axis=1)
    count = group_count(cut.pixels, TILE, dtype)
    dx_hat_mean = over_groups(divide(dx_hat_sum, count), TILE)
    dx_hat_x_hat_mean = over_groups(divide(dx_hat_x_hat_sum, count), TILE)
    affine = load_affine_to_activation(coeffs, stats, window, 0, TILE, ACTIVATION)
    slope = load_slope(coeffs, stats, dx_hat_mean, dx_hat_x_hat_mean, window, 0, TILE)
    dx_sums = no_channel_sums(TILE, dtype)
    for step in range(0, steps_of(window, TILE)):
        part = step_of(window, step, TILE)
        xs = load_tiles(x_ptr, part, TILE, EVICT)
        dys = load_tiles(dy_ptr, part, TILE, EVICT)
        residuals = load_tiles(residual_ptr, part, TILE, EVICT)
        for p in tl.static_range(TILE.pixel_tiles):
            dz = dz_of(dys, residuals, xs, affine, part, 0, p, TILE, ACTIVATION, dtype)
            dx_sums = write_dx(dx_sums, dz, xs[p], slope, dx_ptr, dpre_add_ptr, part, 0, p, TILE)
    if dpre_add_ptr is not None:
        dpre_add = channel_sums(dx_sums, TILE)
        store_channels(dpre_add_ptr, dpre_add, window, 0, cut.groups, cut.chunks, TILE)


@triton.jit(do_not_specialize=SIZES)
def group_norm_forward_split_moments_kernel(
    x_ptr, coeffs, partials_ptr, groups, pixels, row_vecs, chunks, chunk_vecs, slots,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program per chunk of ``TILE.groups`` groups of a sample.

    Reads x once, and pre_add; writes partials (N, G, 4, slots): count, mean, mean_lo, m2.
    """
    cut = Cut(groups, pixels, row_vecs, chunks, chunk_vecs, slots)
    leave_moments(tl.program_id(0), x_ptr, coeffs, partials_ptr, cut, TILE, "")


@triton.jit(do_not_specialize=SIZES)
def group_norm_merge_moments_kernel(
    partials_ptr, merged_ptr, groups, slots, SLOTS: tl.constexpr, GROUPS: tl.constexpr
):
    """One program per ``GROUPS`` of all samples' ``groups``.

    Reads partials (groups, 4, slots), writes merged (4, groups): count, mean, mean_lo, m2.
    """
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    mask = group < groups
    moments = _merged_moments(partials_ptr, group, mask, slots, SLOTS)
    tl.store(merged_ptr + group, moments.count, mask=mask)
    tl.store(merged_ptr + groups + group, moments.mean, mask=mask)
    tl.store(merged_ptr + 2 * groups + group, moments.mean_lo, mask=mask)
    tl.store(merged_ptr + 3 * groups + group, moments.m2, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def group_norm_forward_split_apply_kernel(
    x_ptr, residual_ptr, coeffs, partials_ptr, y_ptr, stats_ptr, groups, pixels, row_vecs, chunks,
    chunk_vecs, slots, eps: tl.float64, SLOTS: tl.constexpr, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One program per chunk of ``TILE.groups`` groups of a sample.

    Reads x once, residual once unless None, ``coeffs`` and the partials of its groups; writes y
    once and stats (N, G, 3) unless None.
    """
    # backwards, to meet what the first launch read last while L2 still holds it
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    cut = Cut(groups, pixels, row_vecs, chunks, chunk_vecs, slots)
    apply_moments(
        pid, x_ptr, residual_ptr, coeffs, partials_ptr, y_ptr, stats_ptr, cut, eps, SLOTS, TILE,
        ACTIVATION, "",
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def group_norm_backward_split_sums_kernel(
    dy_ptr, x_ptr, residual_ptr, coeffs, stats_ptr, partials_ptr, dresidual_ptr, grads, groups,
    pixels, row_vecs, chunks, chunk_vecs, slots, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One program per chunk of ``TILE.groups`` groups of a sample.

    Reads dy, x and, unless None, residual once, ``coeffs``, stats (N, G, 3). Writes partials
    (N, G, 2, slots): sum(dx_hat), sum(dx_hat * x_hat); dresidual once, and the chunk's row of each
    of ``grads`` (N * chunks, C) but pre_add; each unless None.
    """
    cut = Cut(groups, pixels, row_vecs, chunks, chunk_vecs, slots)
    leave_sums(
        tl.program_id(0), dy_ptr, x_ptr, residual_ptr, coeffs, stats_ptr, partials_ptr,
        dresidual_ptr, grads, cut, TILE, ACTIVATION, "",
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def group_norm_backward_split_apply_kernel(
    dy_ptr, x_ptr, residual_ptr, coeffs, stats_ptr, partials_ptr, dx_ptr, dpre_add_ptr, reductions,
    samples, groups, pixels, row_vecs, chunks, chunk_vecs, slots, apply_programs,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The first ``apply_programs`` programs: one per chunk of ``TILE.groups`` groups of a sample.

    Read x and, unless None, dy and residual once, ``coeffs``, stats, the partials of their groups
    unless None; write dx once and their row of dpre_add (N * chunks, C), each unless None. The
    programs after them do the ``reductions`` of what the launch before has left.
    """
    if tl.program_id(0) < apply_programs:
        pid = apply_programs - 1 - tl.program_id(0)
        cut = Cut(groups, pixels, row_vecs, chunks, chunk_vecs, slots)
        apply_sums(
            pid, dy_ptr, x_ptr, residual_ptr, coeffs, stats_ptr, partials_ptr, dx_ptr,
            dpre_add_ptr, cut, SLOTS, TILE, ACTIVATION, "",
        )  # fmt: skip
    else:
        sum_params(
            reductions, tl.program_id(0) - apply_programs, samples * chunks,
            groups * TILE.group_channels, ROWS, COLS,
        )  # fmt: skip
