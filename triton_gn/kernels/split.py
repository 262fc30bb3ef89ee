"""Split: several programs share a group. The first launch leaves each program's partial sums, the
second merges the partials of its groups and applies them.

A partial result goes to a slot of its own, ``slots`` of them per group, so nothing is atomic.
"""

import triton
import triton.language as tl

from .epilogue import add_dz_sums, load_dzs, no_dz_sums, write_dx, write_y
from .moments import (
    Moments,
    combine,
    combine_all,
    divide,
    load_stats,
    rstd_of,
    spread_stats,
    store_stats,
    window_moments,
)
from .params import store_param_grads, sum_params
from .tile import (
    channel_sums,
    group_count,
    groups_of,
    load_tiles,
    no_channel_sums,
    over_groups,
    step_of,
    steps_of,
    store_channels,
    window_of,
)


@triton.jit
def _slots(window, groups, first, slots, SLOTS: tl.constexpr, TILE: tl.constexpr):
    """Indices and mask ``[group_slots, SLOTS]`` of partials ``first`` onwards of the groups."""
    group, mask = groups_of(window, groups, TILE)
    slot = first + tl.arange(0, SLOTS)[None, :]
    return group[:, None] * slots + slot, mask[:, None] & (slot < slots)


@triton.jit
def _merged_moments(
    partials_ptr, window, groups, slots, dtype: tl.constexpr, SLOTS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Moments of the window's groups, from all their partials."""
    none = tl.zeros([TILE.group_slots], dtype)
    count, mean, mean_lo, m2 = none, none, none, none
    for first in range(0, slots, SLOTS):
        index, mask = _slots(window, groups, first, slots, SLOTS, TILE)
        parts = Moments(
            tl.load(partials_ptr + index * 4, mask=mask, other=0.0),
            tl.load(partials_ptr + index * 4 + 1, mask=mask, other=0.0),
            tl.load(partials_ptr + index * 4 + 2, mask=mask, other=0.0),
            tl.load(partials_ptr + index * 4 + 3, mask=mask, other=0.0),
        )
        merged = combine(Moments(count, mean, mean_lo, m2), combine_all(parts))
        count, mean, mean_lo, m2 = merged.count, merged.mean, merged.mean_lo, merged.m2
    return Moments(count, mean, mean_lo, m2)


@triton.jit
def group_norm_forward_split_moments_kernel(
    x_ptr, coeffs, partials_ptr, groups, pixels, row_vecs, chunks, chunk_vecs, slots,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program per chunk of ``TILE.groups`` groups of a sample.

    Reads x once, and pre_add; writes partials (N, G, slots, 4): count, mean, mean_lo, m2.
    """
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    window = window_of(tl.program_id(0), groups, pixels, row_vecs, chunks, chunk_vecs, TILE)
    none = tl.zeros([TILE.group_slots], dtype)
    count, mean, mean_lo, m2 = none, none, none, none
    for step in range(0, steps_of(window, TILE)):
        part = step_of(window, step, TILE)
        xs = load_tiles(x_ptr, part, TILE)
        merged = combine(
            Moments(count, mean, mean_lo, m2),
            window_moments(xs, coeffs.pre_add, part, groups, TILE, dtype),
        )
        count, mean, mean_lo, m2 = merged.count, merged.mean, merged.mean_lo, merged.m2
    group, mask = groups_of(window, groups, TILE)
    index = (group * slots + window.slot) * 4
    tl.store(partials_ptr + index, count, mask=mask)
    tl.store(partials_ptr + index + 1, mean, mask=mask)
    tl.store(partials_ptr + index + 2, mean_lo, mask=mask)
    tl.store(partials_ptr + index + 3, m2, mask=mask)


@triton.jit
def group_norm_forward_split_apply_kernel(
    x_ptr, residual_ptr, coeffs, partials_ptr, y_ptr, stats_ptr, groups, pixels, row_vecs, chunks,
    chunk_vecs, slots, eps: tl.float64, SLOTS: tl.constexpr, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """One program per chunk of ``TILE.groups`` groups of a sample.

    Reads x once, residual once unless None, ``coeffs`` and the partials of its groups; writes y
    once and stats (N, G, 3) unless None.
    """
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    # backwards, to meet what the first launch read last while L2 still holds it
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    window = window_of(pid, groups, pixels, row_vecs, chunks, chunk_vecs, TILE)
    moments = _merged_moments(partials_ptr, window, groups, slots, dtype, SLOTS, TILE)
    rstd = rstd_of(moments, eps)
    if stats_ptr is not None:
        if window.slot == 0:
            store_stats(stats_ptr, moments, rstd, window, groups, TILE)
    stats = spread_stats(moments, rstd, TILE)
    for step in range(0, steps_of(window, TILE)):
        part = step_of(window, step, TILE)
        xs = load_tiles(x_ptr, part, TILE)
        write_y(xs, residual_ptr, coeffs, stats, y_ptr, part, TILE, ACTIVATION, NVIDIA)


@triton.jit
def group_norm_backward_split_sums_kernel(
    dy_ptr, x_ptr, residual_ptr, coeffs, stats_ptr, partials_ptr, dresidual_ptr, grads, groups,
    pixels, row_vecs, chunks, chunk_vecs, slots, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """One program per chunk of ``TILE.groups`` groups of a sample.

    Reads dy, x and, unless None, residual once, ``coeffs``, stats (N, G, 3). Writes partials
    (N, G, slots, 2): sum(dx_hat), sum(dx_hat * x_hat); dresidual once, and the chunk's row of each
    of ``grads`` (N * chunks, C) but pre_add; each unless None.
    """
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    window = window_of(tl.program_id(0), groups, pixels, row_vecs, chunks, chunk_vecs, TILE)
    stats = load_stats(stats_ptr, window, groups, TILE)
    dz_sums, dz_x_hat_sums = no_dz_sums(TILE, dtype)
    for step in range(0, steps_of(window, TILE)):
        part = step_of(window, step, TILE)
        xs = load_tiles(x_ptr, part, TILE)
        dzs = load_dzs(
            dy_ptr, residual_ptr, dresidual_ptr, xs, coeffs, stats, part, TILE, ACTIVATION, NVIDIA
        )
        dz_sums, dz_x_hat_sums = add_dz_sums(
            (dz_sums, dz_x_hat_sums), dzs, xs, coeffs, stats, part, 0, TILE
        )
    dx_hat_sum, dx_hat_x_hat_sum = store_param_grads(
        (dz_sums, dz_x_hat_sums), coeffs, grads, window, 0, groups, chunks, TILE, dtype
    )
    group, mask = groups_of(window, groups, TILE)
    index = (group * slots + window.slot) * 2
    tl.store(partials_ptr + index, dx_hat_sum, mask=mask)
    tl.store(partials_ptr + index + 1, dx_hat_x_hat_sum, mask=mask)


@triton.jit
def group_norm_backward_split_apply_kernel(
    dy_ptr, x_ptr, residual_ptr, coeffs, stats_ptr, partials_ptr, dx_ptr, dpre_add_ptr, reductions,
    samples, groups, pixels, row_vecs, chunks, chunk_vecs, slots, apply_programs,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """The first ``apply_programs`` programs: one per chunk of ``TILE.groups`` groups of a sample.

    Read dy, x and, unless None, residual once, ``coeffs``, stats, the partials of their groups;
    write dx once and their row of dpre_add (N * chunks, C), each unless None. The programs after
    them do the ``reductions`` of what the launch before has left.
    """
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    if tl.program_id(0) < apply_programs:
        pid = apply_programs - 1 - tl.program_id(0)
        window = window_of(pid, groups, pixels, row_vecs, chunks, chunk_vecs, TILE)
        stats = load_stats(stats_ptr, window, groups, TILE)
        dx_hat_sum = tl.zeros([TILE.group_slots], dtype)
        dx_hat_x_hat_sum = tl.zeros([TILE.group_slots], dtype)
        for first in range(0, slots, SLOTS):
            index, mask = _slots(window, groups, first, slots, SLOTS, TILE)
            first_sums = tl.load(partials_ptr + index * 2, mask=mask, other=0.0)
            second_sums = tl.load(partials_ptr + index * 2 + 1, mask=mask, other=0.0)
            dx_hat_sum += tl.sum(first_sums, axis=1)
            dx_hat_x_hat_sum += tl.sum(second_sums, axis=1)
        count = group_count(pixels, TILE, dtype)
        dx_hat_mean = over_groups(divide(dx_hat_sum, count), TILE)
        dx_hat_x_hat_mean = over_groups(divide(dx_hat_x_hat_sum, count), TILE)
        dx_sums = no_channel_sums(TILE, dtype)
        for step in range(0, steps_of(window, TILE)):
            part = step_of(window, step, TILE)
            xs = load_tiles(x_ptr, part, TILE)
            dzs = load_dzs(
                dy_ptr, residual_ptr, None, xs, coeffs, stats, part, TILE, ACTIVATION, NVIDIA
            )
            dx_sums = write_dx(
                dx_sums, dzs, xs, coeffs, stats, dx_hat_mean, dx_hat_x_hat_mean, dx_ptr,
                dpre_add_ptr, part, 0, TILE,
            )  # fmt: skip
        if dpre_add_ptr is not None:
            dpre_add = channel_sums(dx_sums, TILE)
            store_channels(dpre_add_ptr, dpre_add, window, 0, groups, chunks, TILE)
    else:
        sum_params(
            reductions, tl.program_id(0) - apply_programs, samples * chunks,
            groups * TILE.group_channels, ROWS, COLS,
        )  # fmt: skip
