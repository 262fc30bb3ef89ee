"""Split: several programs share a group. The first launch leaves each program's partial sums, the
second merges the partials of its groups and applies them.

A partial result goes to a split_index of its own, ``num_partials`` of them per group, so nothing is atomic. The
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
    rough_mean,
    rstd_of,
    spread_stats,
    store_stats,
    tile_count,
    zero_acc,
)
from .params import store_param_grads, sum_params
from .tile import (
    SIZES,
    block_of,
    broadcast_groups,
    channel_sums,
    group_count,
    group_sums,
    groups_of,
    iterations_of,
    load_tiles,
    program_tile_of,
    store_channels,
    store_tile,
    zero_channel_acc,
)

# whose deviations are from the mean of the first of them: more would lose more of m2
STEPS_AT_ONCE = tl.constexpr(16)


class SplitShape(NamedTuple):
    """How the tensor is cut among programs: ``splits`` of ``split_vecs`` for each group, ``num_partials``
    for their partial results."""

    groups: tl.tensor
    pixels: tl.tensor
    row_vecs: tl.tensor
    splits: tl.tensor
    split_vecs: tl.tensor
    num_partials: tl.tensor


@triton.jit
def _program_tile(pid, cut, TILE: tl.constexpr):
    return program_tile_of(
        pid, cut.groups, cut.pixels, cut.row_vecs, cut.splits, cut.split_vecs, TILE
    )


@triton.jit
def _load_partials(
    ptr,
    group,
    mask,
    num_partials,
    first,
    field: tl.constexpr,
    FIELDS: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """``[groups, PARTIALS]``: a field of the groups' partials (..., FIELDS, num_partials), from the
    ``first`` on."""
    split_index = first + tl.arange(0, PARTIALS)[None, :]
    index = (group[:, None] * FIELDS + field) * num_partials + split_index
    # past L1, which does not hear of what other programs of this launch have stored
    return tl.load(
        ptr + index,
        mask=mask[:, None] & (split_index < num_partials),
        other=0.0,
        cache_modifier=".cg",
    )


@triton.jit
def _some_merged(partials_ptr, group, mask, num_partials, first, PARTIALS: tl.constexpr):
    parts = Moments(
        _load_partials(partials_ptr, group, mask, num_partials, first, 0, 4, PARTIALS),
        _load_partials(partials_ptr, group, mask, num_partials, first, 1, 4, PARTIALS),
        _load_partials(partials_ptr, group, mask, num_partials, first, 2, 4, PARTIALS),
        _load_partials(partials_ptr, group, mask, num_partials, first, 3, 4, PARTIALS),
    )
    return combine_all(parts)


@triton.jit
def _merged_moments(partials_ptr, group, mask, num_partials, PARTIALS: tl.constexpr):
    """Moments of the groups, from all their partials."""
    merged = _some_merged(partials_ptr, group, mask, num_partials, 0, PARTIALS)
    count, mean, mean_lo, m2 = merged.count, merged.mean, merged.mean_lo, merged.m2
    for first in range(PARTIALS, num_partials, PARTIALS):
        merged = combine(
            Moments(count, mean, mean_lo, m2),
            _some_merged(partials_ptr, group, mask, num_partials, first, PARTIALS),
        )
        count, mean, mean_lo, m2 = merged.count, merged.mean, merged.mean_lo, merged.m2
    return Moments(count, mean, mean_lo, m2)


@triton.jit
def compute_partial_moments(
    pid, x_ptr, affine_params, partials_ptr, cut, TILE: tl.constexpr, EVICT: tl.constexpr
):
    """Of the ``pid``-th split, to its split_index of partials (N, G, 4, num_partials): count, mean, mean_lo,
    m2."""
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    program_tile = _program_tile(pid, cut, TILE)
    none = tl.zeros([TILE.padded_groups], dtype)
    count, mean, mean_lo, m2 = none, none, none, none
    steps = iterations_of(program_tile, TILE)
    for first in range(0, steps, STEPS_AT_ONCE):
        # deviations from the mean of the first iteration, so that a reduction at the end is enough
        part = block_of(program_tile, first, TILE)
        xs = load_tiles(x_ptr, part, TILE, EVICT)
        elements = tile_count(part, TILE, dtype)
        reference = rough_mean(xs, affine_params.pre_add, part, TILE, dtype)
        deviations = zero_acc(TILE, dtype)
        deviations = add_deviations(deviations, xs, affine_params.pre_add, reference, part, TILE)
        for step in range(first + 1, tl.minimum(first + STEPS_AT_ONCE, steps)):
            part = block_of(program_tile, step, TILE)
            xs = load_tiles(x_ptr, part, TILE, EVICT)
            elements += tile_count(part, TILE, dtype)
            deviations = add_deviations(
                deviations, xs, affine_params.pre_add, reference, part, TILE
            )
        merged = combine(
            Moments(count, mean, mean_lo, m2), moments_of(deviations, reference, elements, TILE)
        )
        count, mean, mean_lo, m2 = merged.count, merged.mean, merged.mean_lo, merged.m2
    group, mask = groups_of(program_tile, cut.groups, TILE)
    index = group * 4 * cut.num_partials + program_tile.split_index
    tl.store(partials_ptr + index, count, mask=mask)
    tl.store(partials_ptr + index + cut.num_partials, mean, mask=mask)
    tl.store(partials_ptr + index + 2 * cut.num_partials, mean_lo, mask=mask)
    tl.store(partials_ptr + index + 3 * cut.num_partials, m2, mask=mask)


@triton.jit
def apply_moments(
    pid, x_ptr, residual_ptr, affine_params, partials_ptr, y_ptr, stats_ptr, cut, eps,
    PARTIALS: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """y of the ``pid``-th split, and the stats of its groups where it is their first."""
    program_tile = _program_tile(pid, cut, TILE)
    group, mask = groups_of(program_tile, cut.groups, TILE)
    moments = _merged_moments(partials_ptr, group, mask, cut.num_partials, PARTIALS)
    rstd = rstd_of(moments, eps)
    if stats_ptr is not None:
        if program_tile.split_index == 0:
            store_stats(stats_ptr, moments, rstd, program_tile, cut.groups, TILE)
    affine = load_affine(affine_params, spread_stats(moments, rstd, TILE), program_tile, 0, TILE)
    for step in range(0, iterations_of(program_tile, TILE)):
        part = block_of(program_tile, step, TILE)
        xs = load_tiles(x_ptr, part, TILE, EVICT)
        write_y(xs, residual_ptr, affine, y_ptr, part, 0, TILE, ACTIVATION)


@triton.jit
def compute_partial_sums(
    pid, dy_ptr, x_ptr, residual_ptr, affine_params, stats_ptr, partials_ptr, dresidual_ptr, grads, cut,
    TILE: tl.constexpr, ACTIVATION: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Of the ``pid``-th split, to its split_index of partials (N, G, 2, num_partials): sum(dx_hat),
    sum(dx_hat * x_hat); its dresidual, and its row of each of ``grads`` but pre_add."""
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    program_tile = _program_tile(pid, cut, TILE)
    stats = load_stats(stats_ptr, program_tile, cut.groups, TILE)
    centre, _ = centre_of(
        affine_params.pre_add, stats.mean, stats.mean_lo, program_tile, 0, TILE, dtype
    )
    affine = load_affine_to_activation(affine_params, stats, program_tile, 0, TILE, ACTIVATION)
    sums = zero_channel_acc(TILE, dtype), zero_channel_acc(TILE, dtype)
    for step in range(0, iterations_of(program_tile, TILE)):
        part = block_of(program_tile, step, TILE)
        xs = load_tiles(x_ptr, part, TILE, EVICT)
        dys = load_tiles(dy_ptr, part, TILE, EVICT)
        residuals = load_tiles(residual_ptr, part, TILE, EVICT)
        for p in tl.static_range(TILE.pixel_tiles):
            dz = dz_of(dys, residuals, xs, affine, part, 0, p, TILE, ACTIVATION, dtype)
            if dresidual_ptr is not None:
                store_tile(dresidual_ptr, dz, part, 0, p, TILE)
            sums = add_dz_sums(sums, dz, xs[p], centre, part, p, TILE)
    dx_hat_sums, dx_hat_x_hat_sums = store_param_grads(
        sums, affine_params, stats, grads, program_tile, 0, cut.groups, cut.splits, TILE
    )
    group, mask = groups_of(program_tile, cut.groups, TILE)
    index = group * 2 * cut.num_partials + program_tile.split_index
    tl.store(partials_ptr + index, group_sums(dx_hat_sums, TILE), mask=mask)
    tl.store(
        partials_ptr + index + cut.num_partials, group_sums(dx_hat_x_hat_sums, TILE), mask=mask
    )


@triton.jit
def apply_sums(
    pid, dy_ptr, x_ptr, residual_ptr, affine_params, stats_ptr, partials_ptr, dx_ptr, dpre_add_ptr, cut,
    PARTIALS: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """dx of the ``pid``-th split and its row of dpre_add, each unless None.

    Without partials, those at fixed statistics.
    """
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    program_tile = _program_tile(pid, cut, TILE)
    stats = load_stats(stats_ptr, program_tile, cut.groups, TILE)
    dx_hat_sum = tl.zeros([TILE.padded_groups], dtype)
    dx_hat_x_hat_sum = tl.zeros([TILE.padded_groups], dtype)
    if partials_ptr is not None:
        group, mask = groups_of(program_tile, cut.groups, TILE)
        for first in range(0, cut.num_partials, PARTIALS):
            parts = _load_partials(
                partials_ptr, group, mask, cut.num_partials, first, 0, 2, PARTIALS
            )
            dx_hat_sum += tl.sum(parts, axis=1)
            parts = _load_partials(
                partials_ptr, group, mask, cut.num_partials, first, 1, 2, PARTIALS
            )
            dx_hat_x_hat_sum += tl.sum(parts, axis=1)
    count = group_count(cut.pixels, TILE, dtype)
    dx_hat_mean = broadcast_groups(divide(dx_hat_sum, count), TILE)
    dx_hat_x_hat_mean = broadcast_groups(divide(dx_hat_x_hat_sum, count), TILE)
    affine = load_affine_to_activation(affine_params, stats, program_tile, 0, TILE, ACTIVATION)
    slope = load_slope(affine_params, stats, dx_hat_mean, dx_hat_x_hat_mean, program_tile, 0, TILE)
    dx_sums = zero_channel_acc(TILE, dtype)
    for step in range(0, iterations_of(program_tile, TILE)):
        part = block_of(program_tile, step, TILE)
        xs = load_tiles(x_ptr, part, TILE, EVICT)
        dys = load_tiles(dy_ptr, part, TILE, EVICT)
        residuals = load_tiles(residual_ptr, part, TILE, EVICT)
        for p in tl.static_range(TILE.pixel_tiles):
            dz = dz_of(dys, residuals, xs, affine, part, 0, p, TILE, ACTIVATION, dtype)
            dx_sums = write_dx(dx_sums, dz, xs[p], slope, dx_ptr, dpre_add_ptr, part, 0, p, TILE)
    if dpre_add_ptr is not None:
        dpre_add = channel_sums(dx_sums, TILE)
        store_channels(dpre_add_ptr, dpre_add, program_tile, 0, cut.groups, cut.splits, TILE)


@triton.jit(do_not_specialize=SIZES)
def group_norm_forward_split_moments_kernel(
    x_ptr, affine_params, partials_ptr, groups, pixels, row_vecs, splits, split_vecs, num_partials,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program per split of ``TILE.groups`` groups of a sample.

    Reads x once, and pre_add; writes partials (N, G, 4, num_partials): count, mean, mean_lo, m2.
    """
    cut = SplitShape(groups, pixels, row_vecs, splits, split_vecs, num_partials)
    compute_partial_moments(tl.program_id(0), x_ptr, affine_params, partials_ptr, cut, TILE, "")


@triton.jit(do_not_specialize=SIZES)
def group_norm_merge_moments_kernel(
    partials_ptr, merged_ptr, groups, num_partials, PARTIALS: tl.constexpr, GROUPS: tl.constexpr
):
    """One program per ``GROUPS`` of all samples' ``groups``.

    Reads partials (groups, 4, num_partials), writes merged (4, groups): count, mean, mean_lo, m2.
    """
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    mask = group < groups
    moments = _merged_moments(partials_ptr, group, mask, num_partials, PARTIALS)
    tl.store(merged_ptr + group, moments.count, mask=mask)
    tl.store(merged_ptr + groups + group, moments.mean, mask=mask)
    tl.store(merged_ptr + 2 * groups + group, moments.mean_lo, mask=mask)
    tl.store(merged_ptr + 3 * groups + group, moments.m2, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def group_norm_forward_split_apply_kernel(
    x_ptr, residual_ptr, affine_params, partials_ptr, y_ptr, stats_ptr, groups, pixels, row_vecs, splits,
    split_vecs, num_partials, eps: tl.float64, PARTIALS: tl.constexpr, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One program per split of ``TILE.groups`` groups of a sample.

    Reads x once, residual once unless None, ``affine_params`` and the partials of its groups; writes y
    once and stats (N, G, 3) unless None.
    """
    # backwards, to meet what the first launch read last while L2 still holds it
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    cut = SplitShape(groups, pixels, row_vecs, splits, split_vecs, num_partials)
    apply_moments(
        pid, x_ptr, residual_ptr, affine_params, partials_ptr, y_ptr, stats_ptr, cut, eps, PARTIALS, TILE,
        ACTIVATION, "",
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def group_norm_backward_split_sums_kernel(
    dy_ptr, x_ptr, residual_ptr, affine_params, stats_ptr, partials_ptr, dresidual_ptr, grads, groups,
    pixels, row_vecs, splits, split_vecs, num_partials, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One program per split of ``TILE.groups`` groups of a sample.

    Reads dy, x and, unless None, residual once, ``affine_params``, stats (N, G, 3). Writes partials
    (N, G, 2, num_partials): sum(dx_hat), sum(dx_hat * x_hat); dresidual once, and the split's row of each
    of ``grads`` (N * splits, C) but pre_add; each unless None.
    """
    cut = SplitShape(groups, pixels, row_vecs, splits, split_vecs, num_partials)
    compute_partial_sums(
        tl.program_id(0), dy_ptr, x_ptr, residual_ptr, affine_params, stats_ptr, partials_ptr,
        dresidual_ptr, grads, cut, TILE, ACTIVATION, "",
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def group_norm_backward_split_apply_kernel(
    dy_ptr, x_ptr, residual_ptr, affine_params, stats_ptr, partials_ptr, dx_ptr, dpre_add_ptr, reductions,
    samples, groups, pixels, row_vecs, splits, split_vecs, num_partials, apply_programs,
    PARTIALS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The first ``apply_programs`` programs: one per split of ``TILE.groups`` groups of a sample.

    Read x and, unless None, dy and residual once, ``affine_params``, stats, the partials of their groups
    unless None; write dx once and their row of dpre_add (N * splits, C), each unless None. The
    programs after them do the ``reductions`` of what the launch before has left.
    """
    if tl.program_id(0) < apply_programs:
        pid = apply_programs - 1 - tl.program_id(0)
        cut = SplitShape(groups, pixels, row_vecs, splits, split_vecs, num_partials)
        apply_sums(
            pid, dy_ptr, x_ptr, residual_ptr, affine_params, stats_ptr, partials_ptr, dx_ptr,
            dpre_add_ptr, cut, PARTIALS, TILE, ACTIVATION, "",
        )  # fmt: skip
    else:
        sum_params(
            reductions, tl.program_id(0) - apply_programs, samples * splits,
            groups * TILE.group_channels, ROWS, COLS,
        )  # fmt: skip
