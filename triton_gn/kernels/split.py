"""Split: several programs share a group. The first launch computes a partial result per program,
the second merges the partials of its groups and applies them.

Each partial result has a place of its own, ``num_partials`` of them per group, so nothing is
atomic. Both halves are functions of a program's number: ``pipelined`` has them in one launch.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .epilogue import (
    DxHat,
    add_dz_sums,
    dx_hat_means,
    dz_of,
    load_affine,
    load_affine_to_activation,
    load_slope,
    write_dx,
    write_y,
    zero_dz_sums,
)
from .moments import (
    Moments,
    add_deviations,
    broadcast_stats,
    centre_of,
    combine,
    combine_all,
    empty_moments,
    load_stats,
    moments_of,
    rough_mean,
    rstd_of,
    store_stats,
    tile_count,
    zero_acc,
)
from .params import (
    compute_param_grads,
    dx_hat_terms,
    store_param_grads,
    sum_over_pixels,
    sum_params,
)
from .reduce import channel_sums, group_sums, zero_channel_acc
from .tile import (
    SIZES,
    block_of,
    groups_of,
    load_tiles,
    num_blocks,
    program_tile_of,
    store_channels,
    store_tile,
)

# blocks whose deviations are from the mean of the first of them: more would lose more of m2
BLOCKS_AT_ONCE = tl.constexpr(16)

# index of the channel tile: split and pipelined programs hold only one
ONLY_CHANNEL_TILE = tl.constexpr(0)

# fields of the partial results of a group
NUM_MOMENTS = tl.constexpr(4)  # count, mean, mean_lo, m2
NUM_SUMS = tl.constexpr(2)  # sum(dx_hat), sum(dx_hat * x_hat)


class SplitShape(NamedTuple):
    """Sizes of x, and how its groups are cut among programs."""

    groups: tl.tensor
    pixels: tl.tensor
    row_vecs: tl.tensor
    splits: tl.tensor  # parts that the pixels of a group are cut into
    split_vecs: tl.tensor  # length of a split: vectors if contiguous, pixels if channels-last
    num_partials: tl.tensor  # partial results of each group


@triton.jit
def _program_tile(pid, shape, TILE: tl.constexpr):
    return program_tile_of(pid, shape, shape.splits, shape.split_vecs, TILE)


@triton.jit
def _load_partials(
    ptr, group, mask, num_partials, first, FIELDS: tl.constexpr, PARTIALS: tl.constexpr
):
    """Load ``PARTIALS`` partial results of the groups, from the ``first`` on.

    ``ptr`` is (groups, FIELDS, num_partials). Returns a ``[groups, PARTIALS]`` for each field.
    """
    split_index = first + tl.arange(0, PARTIALS)[None, :]
    mask = mask[:, None] & (split_index < num_partials)
    fields = ()
    for field in tl.static_range(FIELDS):
        index = (group[:, None] * FIELDS + field) * num_partials + split_index
        # past L1, which does not see what other programs of this launch have stored
        values = tl.load(ptr + index, mask=mask, other=0.0, cache_modifier=".cg")
        fields = fields + (values,)
    return fields


@triton.jit
def _store_partials(ptr, fields, region, TILE: tl.constexpr):
    """Store a partial result of each group to ``ptr`` (N, G, len(fields), num_partials)."""
    group, mask = groups_of(region, TILE)
    num_partials = region.shape.num_partials
    index = group * len(fields) * num_partials + region.position.split_index
    for field in tl.static_range(len(fields)):
        tl.store(ptr + index + field * num_partials, fields[field], mask=mask)


@triton.jit
def _merge_some(partials_ptr, group, mask, num_partials, first, PARTIALS: tl.constexpr):
    count, mean, mean_lo, m2 = _load_partials(
        partials_ptr, group, mask, num_partials, first, NUM_MOMENTS, PARTIALS
    )
    return combine_all(Moments(count, mean, mean_lo, m2))


@triton.jit
def _merge_partials(partials_ptr, group, mask, num_partials, PARTIALS: tl.constexpr):
    """Compute the moments of the groups from all their partials, ``PARTIALS`` at a time."""
    moments = _merge_some(partials_ptr, group, mask, num_partials, 0, PARTIALS)
    for first in range(PARTIALS, num_partials, PARTIALS):
        moments = combine(
            moments, _merge_some(partials_ptr, group, mask, num_partials, first, PARTIALS)
        )
    return moments


@triton.jit
def compute_partial_moments(
    pid, x_ptr, affine_params, partials_ptr, shape, TILE: tl.constexpr, EVICT: tl.constexpr
):
    """Compute the moments of program tile ``pid``, to partials (N, G, 4, num_partials)."""
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    region = _program_tile(pid, shape, TILE)
    moments = empty_moments(TILE, dtype)
    blocks = num_blocks(region, TILE)
    for first in range(0, blocks, BLOCKS_AT_ONCE):
        # deviations from the mean of the first block, so that one reduction at the end is enough
        first_block = block_of(region, first, TILE)
        xs = load_tiles(x_ptr, first_block, TILE, EVICT)
        count = tile_count(first_block, TILE, dtype)
        reference = rough_mean(xs, affine_params.pre_add, first_block, TILE, dtype)
        deviations = add_deviations(
            zero_acc(TILE, dtype), xs, affine_params.pre_add, reference, first_block, TILE
        )
        for index in range(first + 1, tl.minimum(first + BLOCKS_AT_ONCE, blocks)):
            block = block_of(region, index, TILE)
            xs = load_tiles(x_ptr, block, TILE, EVICT)
            count += tile_count(block, TILE, dtype)
            deviations = add_deviations(
                deviations, xs, affine_params.pre_add, reference, block, TILE
            )
        moments = combine(moments, moments_of(deviations, reference, count, TILE))
    _store_partials(partials_ptr, moments, region, TILE)


@triton.jit
def apply_moments(
    pid, inputs, partials_ptr, y_ptr, stats_ptr, shape, eps, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Compute y of program tile ``pid``, and the stats of its groups if it is their first."""
    region = _program_tile(pid, shape, TILE)
    group, mask = groups_of(region, TILE)
    moments = _merge_partials(partials_ptr, group, mask, shape.num_partials, TILE.partials_at_once)
    rstd = rstd_of(moments, eps)
    if stats_ptr is not None:
        if region.position.split_index == 0:
            store_stats(stats_ptr, moments, rstd, region, TILE)
    stats = broadcast_stats(moments.mean, moments.mean_lo, rstd, TILE)
    c: tl.constexpr = ONLY_CHANNEL_TILE
    affine = load_affine(inputs.affine_params, stats, region, c, TILE)
    for index in range(0, num_blocks(region, TILE)):
        block = block_of(region, index, TILE)
        xs = load_tiles(inputs.x_ptr, block, TILE, EVICT)
        write_y(xs, inputs.residual_ptr, affine, y_ptr, block, c, TILE, ACTIVATION)


@triton.jit
def compute_partial_sums(
    pid, inputs, outputs, partials_ptr, shape, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """Compute sum(dx_hat) and sum(dx_hat * x_hat) of program tile ``pid``.

    They go to partials (N, G, 2, num_partials). Writes dresidual too, and the program's row of each
    of ``grads`` but pre_add.
    """
    x_ptr, affine_params, grads = inputs.x_ptr, inputs.affine_params, outputs.grads
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    c: tl.constexpr = ONLY_CHANNEL_TILE
    region = _program_tile(pid, shape, TILE)
    stats = load_stats(inputs.stats_ptr, region, TILE)
    centre, _ = centre_of(affine_params.pre_add, stats.mean, stats.mean_lo, region, c, TILE, dtype)
    affine = load_affine_to_activation(affine_params, stats, region, c, TILE, ACTIVATION)
    dz_acc = zero_dz_sums(TILE, dtype)
    for index in range(0, num_blocks(region, TILE)):
        block = block_of(region, index, TILE)
        xs = load_tiles(x_ptr, block, TILE, EVICT)
        dys = load_tiles(inputs.dy_ptr, block, TILE, EVICT)
        residuals = load_tiles(inputs.residual_ptr, block, TILE, EVICT)
        for p in tl.static_range(TILE.pixel_tiles):
            dz = dz_of(dys, residuals, xs, affine, block, c, p, TILE, ACTIVATION, dtype)
            if outputs.dresidual_ptr is not None:
                store_tile(outputs.dresidual_ptr, dz, block, c, p, TILE)
            dz_acc = add_dz_sums(dz_acc, dz, xs[p], centre, block, p, TILE)
    sums = sum_over_pixels(dz_acc, affine_params, stats, region, c, TILE)
    param_grads = compute_param_grads(sums, affine_params, grads, region, c, TILE, dtype)
    store_param_grads(grads, param_grads, region, c, TILE)
    terms = dx_hat_terms(sums, affine_params, region, c, TILE, dtype)
    group_totals = group_sums(terms.dx_hat, TILE), group_sums(terms.dx_hat_x_hat, TILE)
    _store_partials(partials_ptr, group_totals, region, TILE)


@triton.jit
def _add_partials(partials_ptr, region, TILE: tl.constexpr, dtype: tl.constexpr):
    """Add up the partial sums of the region's groups; without partials, the sums are 0."""
    dx_hat = tl.zeros([TILE.padded_groups], dtype)
    dx_hat_x_hat = tl.zeros([TILE.padded_groups], dtype)
    if partials_ptr is not None:
        group, mask = groups_of(region, TILE)
        num_partials = region.shape.num_partials
        for first in range(0, num_partials, TILE.partials_at_once):
            partials = _load_partials(
                partials_ptr, group, mask, num_partials, first, NUM_SUMS, TILE.partials_at_once
            )
            dx_hat += tl.sum(partials[0], axis=1)
            dx_hat_x_hat += tl.sum(partials[1], axis=1)
    return DxHat(dx_hat, dx_hat_x_hat)


@triton.jit
def apply_sums(
    pid, inputs, outputs, partials_ptr, shape, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """Compute dx of program tile ``pid`` and its row of dpre_add, each unless None.

    Without partials, the gradients are those at fixed statistics.
    """
    x_ptr, affine_params = inputs.x_ptr, inputs.affine_params
    dx_ptr, dpre_add_ptr = outputs.dx_ptr, outputs.grads.pre_add
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    c: tl.constexpr = ONLY_CHANNEL_TILE
    region = _program_tile(pid, shape, TILE)
    stats = load_stats(inputs.stats_ptr, region, TILE)
    means = dx_hat_means(_add_partials(partials_ptr, region, TILE, dtype), shape.pixels, TILE)
    affine = load_affine_to_activation(affine_params, stats, region, c, TILE, ACTIVATION)
    slope = load_slope(affine_params, stats, means, region, c, TILE)
    dx_acc = zero_channel_acc(TILE, dtype)
    for index in range(0, num_blocks(region, TILE)):
        block = block_of(region, index, TILE)
        xs = load_tiles(x_ptr, block, TILE, EVICT)
        dys = load_tiles(inputs.dy_ptr, block, TILE, EVICT)
        residuals = load_tiles(inputs.residual_ptr, block, TILE, EVICT)
        for p in tl.static_range(TILE.pixel_tiles):
            dz = dz_of(dys, residuals, xs, affine, block, c, p, TILE, ACTIVATION, dtype)
            dx_acc = write_dx(dx_acc, dz, xs[p], slope, dx_ptr, dpre_add_ptr, block, c, p, TILE)
    if dpre_add_ptr is not None:
        store_channels(dpre_add_ptr, channel_sums(dx_acc, TILE), region, c, TILE)


@triton.jit(do_not_specialize=SIZES)
def group_norm_forward_split_moments_kernel(
    x_ptr, affine_params, partials_ptr, groups, pixels, row_vecs, splits, split_vecs, num_partials,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program per split of ``TILE.groups`` groups of a sample.

    Reads x once, and pre_add. Writes partials (N, G, 4, num_partials): count, mean, mean_lo, m2.
    """
    shape = SplitShape(groups, pixels, row_vecs, splits, split_vecs, num_partials)
    compute_partial_moments(tl.program_id(0), x_ptr, affine_params, partials_ptr, shape, TILE, "")


@triton.jit(do_not_specialize=SIZES)
def group_norm_merge_moments_kernel(
    partials_ptr, merged_ptr, groups, num_partials, PARTIALS: tl.constexpr, GROUPS: tl.constexpr
):
    """One program per ``GROUPS`` of all samples' ``groups``.

    Reads partials (groups, 4, num_partials). Writes merged (4, groups): count, mean, mean_lo, m2.
    """
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    mask = group < groups
    moments = _merge_partials(partials_ptr, group, mask, num_partials, PARTIALS)
    for field in tl.static_range(NUM_MOMENTS):
        tl.store(merged_ptr + field * groups + group, moments[field], mask=mask)


@triton.jit(do_not_specialize=SIZES)
def group_norm_forward_split_apply_kernel(
    inputs, partials_ptr, y_ptr, stats_ptr, groups, pixels, row_vecs, splits, split_vecs,
    num_partials, eps: tl.float64, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One program per split of ``TILE.groups`` groups of a sample.

    Reads x and, unless None, residual once, ``affine_params`` and the partials of its groups
    (N, G, 4, num_partials). Writes y once, and stats (N, G, 3) unless None.
    """
    # backwards, to meet what the first launch read last while L2 still holds it
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    shape = SplitShape(groups, pixels, row_vecs, splits, split_vecs, num_partials)
    apply_moments(pid, inputs, partials_ptr, y_ptr, stats_ptr, shape, eps, TILE, ACTIVATION, "")


@triton.jit(do_not_specialize=SIZES)
def group_norm_backward_split_sums_kernel(
    inputs, outputs, partials_ptr, groups, pixels, row_vecs, splits, split_vecs, num_partials,
    TILE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One program per split of ``TILE.groups`` groups of a sample.

    Reads x and, unless None, dy and residual once, ``affine_params`` and stats (N, G, 3). Writes
    partials (N, G, 2, num_partials): sum(dx_hat), sum(dx_hat * x_hat). Writes dresidual once, and
    the program's row of each of ``grads`` (N * splits, C) but pre_add, each unless None.
    """
    shape = SplitShape(groups, pixels, row_vecs, splits, split_vecs, num_partials)
    compute_partial_sums(
        tl.program_id(0), inputs, outputs, partials_ptr, shape, TILE, ACTIVATION, ""
    )


@triton.jit(do_not_specialize=SIZES)
def group_norm_backward_split_apply_kernel(
    inputs, outputs, partials_ptr, reductions, samples, groups, pixels, row_vecs, splits,
    split_vecs, num_partials, apply_programs, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One program per split of ``TILE.groups`` groups of a sample: ``apply_programs`` of them.

    Each reads x and, unless None, dy and residual once, ``affine_params``, stats (N, G, 3) and,
    unless None, the partials of its groups (N, G, 2, num_partials). Writes dx once and its row of
    dpre_add (N * splits, C), each unless None.

    The programs after these do the ``reductions`` of partial gradients of the launch before.
    """
    if tl.program_id(0) < apply_programs:
        pid = apply_programs - 1 - tl.program_id(0)
        shape = SplitShape(groups, pixels, row_vecs, splits, split_vecs, num_partials)
        apply_sums(pid, inputs, outputs, partials_ptr, shape, TILE, ACTIVATION, "")
    else:
        pid = tl.program_id(0) - apply_programs
        sum_params(reductions, pid, samples * splits, groups * TILE.group_channels)
