"""Where the elements of a program lie, for both memory formats.

A tensor is read as a matrix of *memory rows*, each ``row_vecs * TILE.vec`` elements long:

=============  ==========================================  ================  ==============
format         one memory row                              channels run      pixels run
=============  ==========================================  ================  ==============
contiguous     ``TILE.channels_per_row`` channels of one sample        down the rows     along a row
channels-last  one pixel of one sample, all its channels   along a row       down the rows
=============  ==========================================  ================  ==============

A program owns a *program_tile* of that matrix and holds it as ``channel_tiles * pixel_tiles`` equal
fragments ``[TILE.rows, TILE.cols]``. Only this file knows which axis is which: the kernels speak of
channel tiles, pixel tiles, channel sums and group sums.

``channels_per_row`` is above 1 only where H*W is no multiple of the vector, as for 7x7: that many channels
together are, so a row of them starts on a vector again.

With one pixel per sample a program takes a *stack* of samples: they are to it the pixels of one
sample, down the rows, and each row has a group of its own instead of a part of the same one.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# arguments of kernels that are not compiled for a value of 1 or for multiples of 16: no access to a
# tensor of x's size gets wider by these, and each model and each size of an image would compile
# kernels of its own
SIZES = (
    "samples", "pixels", "row_vecs", "splits", "split_vecs", "num_partials", "apply_programs", "rows",
)  # fmt: skip

# PTX that makes float32 of a pair of bfloat16 elements, $2
BFLOAT16 = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")


class Tile:
    """The constants of a plan's tile as a kernel argument: each field is a ``tl.constexpr``.

    Besides those of the plan: ``threads`` of a program, and whether the kernel is compiled for
    ``nvidia``.
    """

    def __init__(self, **fields):
        for name, value in fields.items():
            setattr(self, name, tl.constexpr(value))

    def on(self, nvidia):
        """The same, compiled for an NVIDIA GPU or not."""
        fields = {name: constant.value for name, constant in vars(self).items()}
        return Tile(**(fields | {"nvidia": nvidia}))

    def __repr__(self):
        # Triton keys compiled kernels by the text of their constants
        return f"Tile({', '.join(f'{name}={c.value}' for name, c in vars(self).items())})"

    def __eq__(self, other):
        return isinstance(other, Tile) and repr(self) == repr(other)

    def __hash__(self):
        return hash(repr(self))


class PerChannel(NamedTuple):
    """An operand with a value per channel, for each sample or (stride 0) for all of them."""

    ptr: tl.tensor
    stride: tl.tensor  # from one sample's values to the next one's


class Params(NamedTuple):
    """What there is per channel: operands as ``PerChannel``, gradients as pointers, or None.

    A kernel's argument of this kind is called ``affine_params``: ``params``, like ``specialization`` and
    ``options``, would collide with a variable of the function that Triton makes to launch it.
    """

    weight: tl.tensor
    bias: tl.tensor
    scale: tl.tensor
    shift: tl.tensor
    pre_add: tl.tensor


class ProgramTile(NamedTuple):
    """The part of the memory matrix that one program works on."""

    offset: tl.tensor  # of its first element, int64
    rows: tl.tensor  # that belong to it; at most what the fragments cover
    cols: tl.tensor
    row_vecs: tl.tensor  # length of a memory row of the tensor, in vectors
    pixels: tl.tensor  # H*W of the tensor
    pixel: (
        tl.tensor
    )  # its first column, contiguous only: which of the channels_per_row channels it is in
    sample: tl.tensor
    group: tl.tensor  # first group, counted within the sample
    channel: tl.tensor  # first channel, counted within the sample
    split_index: tl.tensor  # which part of its group it is: where its partial results go
    split: tl.tensor  # which part of the pixels it is


@triton.jit
def program_tile_of(pid, groups, pixels, row_vecs, splits, split_vecs, TILE: tl.constexpr):
    """ProgramTile of program ``pid``.

    The pixels of a group are cut into ``splits`` of ``split_vecs`` (vectors when contiguous, pixels
    when channels-last), its channels into blocks of ``channel_tiles`` fragments. A resident program
    owns whole groups: one split, one block.
    """
    if TILE.channels_last:
        block_channels: tl.constexpr = TILE.groups * TILE.group_channels
        part_channels: tl.constexpr = TILE.cols * TILE.channel_tiles
        parts: tl.constexpr = (block_channels + part_channels - 1) // part_channels
        # neighbouring programs own neighbouring channels, so together they read whole DRAM pages
        blocks = tl.cdiv(groups, TILE.groups)
        part = pid % parts
        group = pid // parts % blocks * TILE.groups
        split = pid // (parts * blocks) % splits
        sample = pid // (parts * blocks) // splits
        first_row = split * split_vecs
        rows = tl.minimum(pixels - first_row, split_vecs)
        first_col = part * part_channels
        channel = group * TILE.group_channels + first_col
        cols = tl.minimum(
            tl.minimum(block_channels - first_col, part_channels),
            row_vecs * TILE.vec - channel,
        )
        row = sample.to(tl.int64) * pixels + first_row
        offset = row * row_vecs * TILE.vec + channel
        pixel = first_col * 0
    else:
        group_rows: tl.constexpr = TILE.group_channels // TILE.channels_per_row
        part_rows: tl.constexpr = TILE.rows * TILE.channel_tiles
        parts: tl.constexpr = (group_rows + part_rows - 1) // part_rows
        split = pid % splits
        part = pid // splits % parts
        group = pid // (splits * parts) % groups
        sample = pid // (splits * parts) // groups
        first_row = part * part_rows
        rows = tl.minimum(group_rows - first_row, part_rows)
        first_vec = split * split_vecs
        cols = tl.minimum(row_vecs - first_vec, split_vecs) * TILE.vec
        channel = group * TILE.group_channels + first_row * TILE.channels_per_row
        row = (sample.to(tl.int64) * groups + group) * group_rows + first_row
        offset = (row * row_vecs + first_vec) * TILE.vec
        pixel = first_vec * TILE.vec
    split_index = part * splits + split
    return ProgramTile(
        offset, rows, cols, row_vecs, pixels, pixel, sample, group, channel, split_index, split
    )


@triton.jit
def whole_groups_tile(pid, groups, pixels, row_vecs, TILE: tl.constexpr):
    """ProgramTile of a resident program: whole groups, all their pixels; or a stack of ``pixels``."""
    if TILE.batch_rows:
        stacks = tl.cdiv(pixels, TILE.rows)
        return program_tile_of(pid, groups, pixels, row_vecs, stacks, TILE.rows, TILE)
    else:
        extent = pixels if TILE.channels_last else row_vecs
        return program_tile_of(pid, groups, pixels, row_vecs, 1, extent, TILE)


@triton.jit
def iterations_of(program_tile, TILE: tl.constexpr):
    """How many iterations of ``pixel_tiles`` fragments the pixels of a program_tile take."""
    if TILE.channels_last:
        return tl.cdiv(program_tile.rows, TILE.rows * TILE.pixel_tiles)
    else:
        return tl.cdiv(program_tile.cols, TILE.cols * TILE.pixel_tiles)


@triton.jit
def block_of(program_tile, step, TILE: tl.constexpr):
    """The ``step``-th of these iterations, as a program_tile of its own."""
    offset, rows, cols, pixel = (
        program_tile.offset,
        program_tile.rows,
        program_tile.cols,
        program_tile.pixel,
    )
    if TILE.channels_last:
        iteration: tl.constexpr = TILE.rows * TILE.pixel_tiles
        offset += program_tile.row_vecs.to(tl.int64) * (step * iteration) * TILE.vec
        rows = tl.minimum(rows - step * iteration, iteration)
    else:
        iteration: tl.constexpr = TILE.cols * TILE.pixel_tiles
        offset += step * iteration
        cols = tl.minimum(cols - step * iteration, iteration)
        pixel += step * iteration
    return ProgramTile(
        offset, rows, cols, program_tile.row_vecs, program_tile.pixels, pixel, program_tile.sample, program_tile.group,
        program_tile.channel, program_tile.split_index, program_tile.split,
    )  # fmt: skip


@triton.jit
def _inside_rows(program_tile, row_tile: tl.constexpr, TILE: tl.constexpr):
    return tl.arange(0, TILE.rows)[:, None] < program_tile.rows - row_tile * TILE.rows


@triton.jit
def _inside_cols(program_tile, col_tile: tl.constexpr, TILE: tl.constexpr):
    return tl.arange(0, TILE.cols)[None, :] < program_tile.cols - col_tile * TILE.cols


@triton.jit
def _place(program_tile, c: tl.constexpr, p: tl.constexpr, TILE: tl.constexpr):
    """Where the fragment of channel tile ``c`` and pixel tile ``p`` lies: an int64 start, int32
    steps from there, and the mask, which is constant along an axis that is covered exactly."""
    row_tile: tl.constexpr = p if TILE.channels_last else c
    col_tile: tl.constexpr = c if TILE.channels_last else p
    rows = tl.arange(0, TILE.rows)[:, None]
    cols = tl.arange(0, TILE.cols)[None, :]
    start = program_tile.offset + program_tile.row_vecs.to(tl.int64) * (
        row_tile * TILE.rows * TILE.vec
    )
    steps = rows * (program_tile.row_vecs * TILE.vec) + cols
    if not TILE.mask_rows:
        mask = _inside_cols(program_tile, col_tile, TILE)
    elif not TILE.mask_cols:
        mask = _inside_rows(program_tile, row_tile, TILE)
    else:
        mask = _inside_rows(program_tile, row_tile, TILE) & _inside_cols(
            program_tile, col_tile, TILE
        )
    return start + col_tile * TILE.cols, steps, mask


@triton.jit
def load_tile(
    ptr, program_tile, c: tl.constexpr, p: tl.constexpr, TILE: tl.constexpr, EVICT: tl.constexpr
):
    """Sub-tile of channel tile ``c`` and pixel tile ``p``; 0 outside the program_tile.

    ``EVICT``: what L2 should do with it, "evict_first" or "evict_last".
    """
    start, steps, mask = _place(program_tile, c, p, TILE)
    if TILE.mask_rows or TILE.mask_cols:
        return tl.load(ptr + start + steps, mask=mask, other=0.0, eviction_policy=EVICT)
    else:
        return tl.load(ptr + start + steps, eviction_policy=EVICT)


@triton.jit
def load_tiles(ptr, program_tile, TILE: tl.constexpr, EVICT: tl.constexpr):
    """All fragments, channel tiles outermost: fragment (c, p) is ``[c * pixel_tiles + p]``; none if
    ptr is None."""
    tiles = ()
    if ptr is not None:
        for c in tl.static_range(TILE.channel_tiles):
            for p in tl.static_range(TILE.pixel_tiles):
                tiles = tiles + (load_tile(ptr, program_tile, c, p, TILE, EVICT),)
    return tiles


@triton.jit
def unpacked(x, dtype: tl.constexpr, TILE: tl.constexpr):
    """The fragment x, in memory's dtype, as ``dtype``."""
    if TILE.nvidia and dtype == tl.float32 and x.dtype == tl.bfloat16:
        # an instruction less for two elements than Triton's own; "&": the first output is there
        # before the input is used a second time
        return tl.inline_asm_elementwise(
            BFLOAT16, "=&r,=&r,r", [x], tl.float32, is_pure=True, pack=2
        )  # fmt: skip
    else:
        return x.to(dtype)


@triton.jit
def store_tile(ptr, values, program_tile, c: tl.constexpr, p: tl.constexpr, TILE: tl.constexpr):
    start, steps, mask = _place(program_tile, c, p, TILE)
    values = values.to(ptr.dtype.element_ty)
    if TILE.mask_rows or TILE.mask_cols:
        tl.store(ptr + start + steps, values, mask=mask)
    else:
        tl.store(ptr + start + steps, values)


@triton.jit
def _zero_beyond(
    values, program_tile, tile: tl.constexpr, DOWN_ROWS: tl.constexpr, TILE: tl.constexpr
):
    if DOWN_ROWS and TILE.mask_rows:
        return tl.where(_inside_rows(program_tile, tile, TILE), values, 0.0)
    elif not DOWN_ROWS and TILE.mask_cols:
        return tl.where(_inside_cols(program_tile, tile, TILE), values, 0.0)
    else:
        return values


@triton.jit
def zero_beyond_pixels(values, program_tile, p: tl.constexpr, TILE: tl.constexpr):
    """Values of a fragment of pixel tile ``p``, 0 where there are no such pixels."""
    return _zero_beyond(values, program_tile, p, TILE.channels_last, TILE)


@triton.jit
def zero_beyond_channels(values, program_tile, c: tl.constexpr, TILE: tl.constexpr):
    """Per-channel or per-group values, 0 for those of channel tile ``c`` that do not exist."""
    return _zero_beyond(values, program_tile, c, not TILE.channels_last, TILE)


@triton.jit
def channels_of(program_tile, c: tl.constexpr, TILE: tl.constexpr):
    """Channels of channel tile ``c`` within the sample, and which exist.

    The shape, ``[1, cols]`` channels-last and ``[rows, channels_per_row]`` contiguous, is that of every
    per-channel value; it broadcasts against a fragment unless ``channels_per_row`` is above 1.
    """
    if TILE.channels_last:
        cols = c * TILE.cols + tl.arange(0, TILE.cols)[None, :]
        return program_tile.channel + cols, cols < program_tile.cols
    else:
        rows = c * TILE.rows + tl.arange(0, TILE.rows)[:, None]
        lanes = tl.arange(0, TILE.channels_per_row)[None, :]
        # all lanes exist: the comparison only gives the mask the shape of the channels
        return program_tile.channel + rows * TILE.channels_per_row + lanes, (
            rows < program_tile.rows
        ) & (lanes >= 0)


@triton.jit
def per_channel(value, TILE: tl.constexpr, dtype: tl.constexpr):
    """The same value for each channel, in the shape of ``channels_of``."""
    if TILE.channels_last:
        return tl.full([1, TILE.cols], value, dtype)
    else:
        return tl.full([TILE.rows, TILE.channels_per_row], value, dtype)


@triton.jit
def load_channels(operand, program_tile, c: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr):
    """A ``PerChannel`` operand of the channels of channel tile ``c``."""
    channels, mask = channels_of(program_tile, c, TILE)
    row = program_tile.sample.to(tl.int64) * operand.stride
    return tl.load(operand.ptr + row + channels, mask=mask, other=0.0).to(dtype)


@triton.jit
def _forget_layout(values, size: tl.constexpr, TILE: tl.constexpr):
    """The same ``size`` values. As many as there are threads keep the layout that they are loaded
    in, and the compiler would convert all fragments to it; what is gathered takes any."""
    if size >= TILE.threads:
        return tl.gather(values, tl.arange(0, size), 0)
    else:
        return values


@triton.jit
def as_tile_operand(values, TILE: tl.constexpr):
    """The same per-channel values, to be used together with fragments."""
    if TILE.channels_last:
        return _forget_layout(tl.reshape(values, [TILE.cols]), TILE.cols, TILE)[None, :]
    else:
        return values


@triton.jit
def store_channels(ptr, values, program_tile, c: tl.constexpr, groups, splits, TILE: tl.constexpr):
    """Per-channel values of this program_tile to its row of ``ptr`` (N * splits, C)."""
    channels, mask = channels_of(program_tile, c, TILE)
    row = (program_tile.sample.to(tl.int64) * splits + program_tile.split) * (
        groups * TILE.group_channels
    )
    tl.store(ptr + row + channels, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _lane_of(program_tile, p: tl.constexpr, TILE: tl.constexpr):
    """Which of the ``channels_per_row`` channels of a memory row each column of pixel tile ``p`` is in."""
    cols = program_tile.pixel + p * TILE.cols + tl.arange(0, TILE.cols)
    return (cols // program_tile.pixels)[None, :]


@triton.jit
def broadcast_channels(values, program_tile, p: tl.constexpr, TILE: tl.constexpr):
    """Per-channel or per-group values, made to broadcast against the fragments of pixel tile
    ``p``."""
    if TILE.channels_per_row == 1 or values.shape[1] == 1:
        return values
    else:
        lane = _lane_of(program_tile, p, TILE)
        lanes = tl.arange(0, TILE.channels_per_row)[None, :]
        spread = tl.zeros([TILE.rows, TILE.cols], values.dtype)
        for i in tl.static_range(TILE.channels_per_row):
            of_lane = tl.sum(tl.where(lanes == i, values, 0.0), axis=1, keep_dims=True)
            spread = tl.where(lane == i, of_lane, spread)
        return spread


@triton.jit
def zero_channel_acc(TILE: tl.constexpr, dtype: tl.constexpr):
    """Accumulator for ``add_to_channels``."""
    if TILE.channels_per_row == 1:
        return tl.zeros([TILE.rows, TILE.cols], dtype)
    else:
        return tl.zeros([TILE.rows, TILE.channels_per_row], dtype)


@triton.jit
def add_to_channels(sums, values, program_tile, p: tl.constexpr, TILE: tl.constexpr):
    """Add a fragment of pixel tile ``p``; the pixels are summed up only by ``channel_sums``."""
    if TILE.channels_per_row == 1:
        return sums + values
    else:
        lane = _lane_of(program_tile, p, TILE)
        lanes = tl.arange(0, TILE.channels_per_row)[None, :]
        for i in tl.static_range(TILE.channels_per_row):
            of_lane = tl.sum(tl.where(lane == i, values, 0.0), axis=1, keep_dims=True)
            sums += tl.where(lanes == i, of_lane, 0.0)
        return sums


@triton.jit
def channel_sums(sums, TILE: tl.constexpr):
    """Per-channel sums, in the shape of ``channels_of``."""
    if TILE.channels_last:
        return tl.sum(sums, axis=0, keep_dims=True)
    elif TILE.channels_per_row == 1:
        return tl.sum(sums, axis=1, keep_dims=True)
    else:
        return sums


@triton.jit
def group_sums(values, TILE: tl.constexpr):
    """Sum of a fragment, or of per-channel values, over each group: ``[padded_groups]``, of which
    those of no group hold anything."""
    if TILE.batch_rows:
        return tl.sum(values, axis=1)
    elif TILE.groups == 1:
        return tl.sum(values) + tl.zeros([1], values.dtype)
    else:
        # each group's channels to a row of their own, the last ones again where there are no more
        width: tl.constexpr = triton.next_power_of_2(TILE.group_channels)
        lanes = tl.arange(0, width)[None, :]
        channels = tl.arange(0, TILE.padded_groups)[:, None] * TILE.group_channels + lanes
        channels = tl.reshape(tl.minimum(channels, TILE.cols - 1), [TILE.padded_groups * width])
        of_channel = tl.gather(tl.sum(values, axis=0), channels, 0)
        of_channel = tl.reshape(of_channel, [TILE.padded_groups, width])
        return tl.sum(tl.where(lanes < TILE.group_channels, of_channel, 0.0), axis=1)


@triton.jit
def load_groups(ptr, mask, TILE: tl.constexpr):
    """Per-group values ``[padded_groups]``, 0 where there is no group."""
    return _forget_layout(tl.load(ptr, mask=mask, other=0.0), TILE.padded_groups, TILE)


@triton.jit
def broadcast_groups(values, TILE: tl.constexpr):
    """Per-group values ``[padded_groups]``, made to broadcast against a fragment."""
    if TILE.batch_rows:
        return values[:, None]
    elif TILE.groups == 1:
        return values[None, :]
    else:
        # columns of no group take any group's: they are 0, and never stored
        group = tl.minimum(tl.arange(0, TILE.cols) // TILE.group_channels, TILE.padded_groups - 1)
        return tl.gather(values, group, 0)[None, :]


@triton.jit
def group_count(pixels, TILE: tl.constexpr, dtype: tl.constexpr):
    """Elements of a group: ``[padded_groups]``."""
    of_group = 1 if TILE.batch_rows else pixels
    return tl.full([TILE.padded_groups], of_group, dtype) * TILE.group_channels


@triton.jit
def groups_of(program_tile, groups, TILE: tl.constexpr):
    """Groups of the program_tile, counted over the whole batch, and which exist: ``[padded_groups]``."""
    num_partials = tl.arange(0, TILE.padded_groups)
    if TILE.batch_rows:
        sample = (program_tile.split * TILE.rows + num_partials).to(tl.int64)
        return sample * groups + program_tile.group, num_partials < program_tile.rows
    else:
        mask = (num_partials < TILE.groups) & (program_tile.group + num_partials < groups)
        return program_tile.sample.to(tl.int64) * groups + program_tile.group + num_partials, mask


@triton.jit
def empty_kernel():
    """Nothing: whether Triton can compile and load a kernel shows in it."""
