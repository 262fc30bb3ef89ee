"""Program tiles: which elements of memory a program holds, and how it loads and stores them.

A tensor is a matrix of *memory rows*. A program owns a rectangle of this matrix, its program tile.
It works on the program tile in blocks, which it holds as equal fragments of ``TILE.rows`` by
``TILE.cols``::

    contiguous (N, C, H*W)                     channels-last (N, H*W, C)

              pixels of one channel                      channels of one pixel
             +------+------+------+                     +------+------+------+
    channel  |      | p=0  | p=1  |            pixel    |      | c=0  | c=1  |
    channel  |  c=0 |######|######|            pixel    |  p=0 |######|######|
    channel  |  c=1 |######|######|            pixel    |  p=1 |######|######|
    channel  |      |      |      |            pixel    |      |      |      |
             +------+------+------+                     +------+------+------+

``#`` marks a block of 2 channel tiles (``c``) and 2 pixel tiles (``p``): 4 fragments. The program
tile of a resident program is one block. Split and pipelined programs walk along the pixels of
theirs, one block per iteration. Only this file and ``reduce`` know which axis is which: the kernels
speak of channel tiles, pixel tiles, channel sums and group sums.

A memory row is ``row_vecs * TILE.vec`` elements long. Contiguous, it holds ``channels_per_row``
channels of one sample. This is above 1 only if H*W is no multiple of the vector, as for 7x7: that
many channels together are a multiple, so each memory row starts on a vector again.

With one pixel per sample, a program takes several samples (``batch_rows``). They take the place of
the pixels of one sample, down the rows, and each row is a group of its own.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Arguments that Triton must not specialise on a value of 1 or on multiples of 16: that widens no
# access to a tensor of x's size, and each model and image size would compile kernels of its own.
# They are plain arguments because Triton specialises all integers inside a tuple.
SIZES = (
    "samples", "pixels", "row_vecs", "splits", "split_vecs", "num_partials", "apply_programs",
    "rows",
)  # fmt: skip

# PTX that unpacks a pair of bfloat16 elements, $2, to float32
BFLOAT16 = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")


class Tile:
    """Constants of a program tile as a kernel argument: each field is a ``tl.constexpr``.

    Fields beside those of the plan: ``threads`` of a program, ``partials_at_once`` (partial results
    of a group that are merged at a time), and ``nvidia`` (the GPU that the kernel is compiled for).
    """

    def __init__(self, **fields):
        for name, value in fields.items():
            setattr(self, name, tl.constexpr(value))

    def on(self, nvidia):
        """Return a copy for an NVIDIA GPU, or for another one."""
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
    """Operand with a value per channel, for each sample or (stride 0) shared by all samples."""

    ptr: tl.tensor
    stride: tl.tensor  # from one sample's values to the next one's


class Params(NamedTuple):
    """Everything per channel, or None: operands as ``PerChannel``, gradients as pointers.

    A kernel's argument of this kind is called ``affine_params``: ``params``, like
    ``specialization`` and ``options``, would collide with a variable of the function that Triton
    makes to launch it.
    """

    weight: tl.tensor
    bias: tl.tensor
    scale: tl.tensor
    shift: tl.tensor
    pre_add: tl.tensor


class Inputs(NamedTuple):
    """Tensors that the kernels read; dy and stats (N, G, 3) only in the backward."""

    x_ptr: tl.tensor
    residual_ptr: tl.tensor  # or None
    affine_params: Params
    dy_ptr: tl.tensor = None
    stats_ptr: tl.tensor = None


class Outputs(NamedTuple):
    """Gradients that a backward kernel writes, each unless None.

    ``grads`` (rows, C): each sample and split, or each program tile of ``batch_rows``, has a row.
    """

    dx_ptr: tl.tensor
    dresidual_ptr: tl.tensor
    grads: Params


class Block(NamedTuple):
    """Rectangle of the memory matrix."""

    offset: tl.tensor  # of its first element, int64
    rows: tl.tensor  # that exist: at most as many as the fragments cover
    cols: tl.tensor
    first_pixel: tl.tensor  # contiguous only: column of the memory row that it starts at


class Position(NamedTuple):
    """Groups and channels that a program works on, and where its partial results go."""

    sample: tl.tensor
    group: tl.tensor  # first group, counted within the sample
    channel: tl.tensor  # first channel, counted within the sample
    split: tl.tensor  # which part of the pixels
    split_index: tl.tensor  # which partial result of its groups
    grads_row: tl.tensor  # which row of the partial gradients per channel


class Region(NamedTuple):
    """A program tile, or the block of it that one iteration reads."""

    block: Block
    position: Position
    shape: NamedTuple  # TensorShape of resident, SplitShape of split


@triton.jit
def program_tile_of(pid, shape, splits, split_vecs, TILE: tl.constexpr):
    """Compute the program tile of program ``pid``, a Region.

    The pixels of a group are cut into ``splits`` of ``split_vecs`` (vectors if contiguous, pixels
    if channels-last), its channels into parts of ``channel_tiles`` fragments. A resident program
    owns whole groups: one split, one part.
    """
    if TILE.channels_last:
        block_channels: tl.constexpr = TILE.groups * TILE.group_channels
        part_channels: tl.constexpr = TILE.cols * TILE.channel_tiles
        parts: tl.constexpr = (block_channels + part_channels - 1) // part_channels
        # neighbouring programs own neighbouring channels, so together they read whole DRAM pages
        blocks = tl.cdiv(shape.groups, TILE.groups)
        part = pid % parts
        group = pid // parts % blocks * TILE.groups
        split = pid // (parts * blocks) % splits
        sample = pid // (parts * blocks) // splits
        first_row = split * split_vecs
        rows = tl.minimum(shape.pixels - first_row, split_vecs)
        first_col = part * part_channels
        channel = group * TILE.group_channels + first_col
        cols = tl.minimum(
            tl.minimum(block_channels - first_col, part_channels),
            shape.row_vecs * TILE.vec - channel,
        )
        row = sample.to(tl.int64) * shape.pixels + first_row
        offset = row * shape.row_vecs * TILE.vec + channel
        first_pixel = first_col * 0
    else:
        group_rows: tl.constexpr = TILE.group_channels // TILE.channels_per_row
        part_rows: tl.constexpr = TILE.rows * TILE.channel_tiles
        parts: tl.constexpr = (group_rows + part_rows - 1) // part_rows
        split = pid % splits
        part = pid // splits % parts
        group = pid // (splits * parts) % shape.groups
        sample = pid // (splits * parts) // shape.groups
        first_row = part * part_rows
        rows = tl.minimum(group_rows - first_row, part_rows)
        first_vec = split * split_vecs
        cols = tl.minimum(shape.row_vecs - first_vec, split_vecs) * TILE.vec
        channel = group * TILE.group_channels + first_row * TILE.channels_per_row
        row = (sample.to(tl.int64) * shape.groups + group) * group_rows + first_row
        offset = (row * shape.row_vecs + first_vec) * TILE.vec
        first_pixel = first_vec * TILE.vec
    grads_row = sample.to(tl.int64) * splits + split
    return Region(
        Block(offset, rows, cols, first_pixel),
        Position(sample, group, channel, split, part * splits + split, grads_row),
        shape,
    )


@triton.jit
def whole_groups_tile(pid, shape, TILE: tl.constexpr):
    """Compute the program tile of a resident program: whole groups and all their pixels.

    With ``TILE.batch_rows``, one group of ``TILE.rows`` samples.
    """
    if TILE.batch_rows:
        return program_tile_of(pid, shape, tl.cdiv(shape.pixels, TILE.rows), TILE.rows, TILE)
    else:
        extent = shape.pixels if TILE.channels_last else shape.row_vecs
        return program_tile_of(pid, shape, 1, extent, TILE)


@triton.jit
def num_blocks(region, TILE: tl.constexpr):
    """Return how many blocks of ``pixel_tiles`` fragments the pixels of a program tile take."""
    if TILE.channels_last:
        return tl.cdiv(region.block.rows, TILE.rows * TILE.pixel_tiles)
    else:
        return tl.cdiv(region.block.cols, TILE.cols * TILE.pixel_tiles)


@triton.jit
def block_of(region, index, TILE: tl.constexpr):
    """Return block ``index`` of a program tile, as a Region."""
    offset, rows, cols, first_pixel = region.block
    if TILE.channels_last:
        height: tl.constexpr = TILE.rows * TILE.pixel_tiles
        offset += region.shape.row_vecs.to(tl.int64) * (index * height) * TILE.vec
        rows = tl.minimum(rows - index * height, height)
    else:
        width: tl.constexpr = TILE.cols * TILE.pixel_tiles
        offset += index * width
        cols = tl.minimum(cols - index * width, width)
        first_pixel += index * width
    return Region(Block(offset, rows, cols, first_pixel), region.position, region.shape)


@triton.jit
def _inside_rows(region, row_tile: tl.constexpr, TILE: tl.constexpr):
    return tl.arange(0, TILE.rows)[:, None] < region.block.rows - row_tile * TILE.rows


@triton.jit
def _inside_cols(region, col_tile: tl.constexpr, TILE: tl.constexpr):
    return tl.arange(0, TILE.cols)[None, :] < region.block.cols - col_tile * TILE.cols


@triton.jit
def _addresses(region, c: tl.constexpr, p: tl.constexpr, TILE: tl.constexpr):
    """Return where fragment (c, p) lies: an int64 start, int32 offsets from there, and the mask.

    The mask is constant along an axis that the fragments cover exactly.
    """
    row_tile: tl.constexpr = p if TILE.channels_last else c
    col_tile: tl.constexpr = c if TILE.channels_last else p
    row_vecs = region.shape.row_vecs
    rows = tl.arange(0, TILE.rows)[:, None]
    cols = tl.arange(0, TILE.cols)[None, :]
    start = region.block.offset + row_vecs.to(tl.int64) * (row_tile * TILE.rows * TILE.vec)
    offsets = rows * (row_vecs * TILE.vec) + cols
    if not TILE.mask_rows:
        mask = _inside_cols(region, col_tile, TILE)
    elif not TILE.mask_cols:
        mask = _inside_rows(region, row_tile, TILE)
    else:
        mask = _inside_rows(region, row_tile, TILE) & _inside_cols(region, col_tile, TILE)
    return start + col_tile * TILE.cols, offsets, mask


@triton.jit
def load_tile(
    ptr, region, c: tl.constexpr, p: tl.constexpr, TILE: tl.constexpr, EVICT: tl.constexpr
):
    """Load fragment (c, p), with 0 outside the region.

    ``EVICT``: hint to L2, "evict_first", "evict_last" or "".
    """
    start, offsets, mask = _addresses(region, c, p, TILE)
    if TILE.mask_rows or TILE.mask_cols:
        return tl.load(ptr + start + offsets, mask=mask, other=0.0, eviction_policy=EVICT)
    else:
        return tl.load(ptr + start + offsets, eviction_policy=EVICT)


@triton.jit
def load_tiles(ptr, region, TILE: tl.constexpr, EVICT: tl.constexpr):
    """Load all fragments of a region; fragment (c, p) is ``[c * pixel_tiles + p]``.

    The result is empty if ptr is None.
    """
    tiles = ()
    if ptr is not None:
        for c in tl.static_range(TILE.channel_tiles):
            for p in tl.static_range(TILE.pixel_tiles):
                tiles = tiles + (load_tile(ptr, region, c, p, TILE, EVICT),)
    return tiles


@triton.jit
def converted(x, dtype: tl.constexpr, TILE: tl.constexpr):
    """Convert a fragment from memory's dtype to ``dtype``."""
    if TILE.nvidia and dtype == tl.float32 and x.dtype == tl.bfloat16:
        # One instruction less for two elements than Triton's own conversion. "&": the first output
        # is written before the input is read a second time.
        return tl.inline_asm_elementwise(
            BFLOAT16, "=&r,=&r,r", [x], tl.float32, is_pure=True, pack=2
        )  # fmt: skip
    else:
        return x.to(dtype)


@triton.jit
def store_tile(ptr, values, region, c: tl.constexpr, p: tl.constexpr, TILE: tl.constexpr):
    """Store fragment (c, p), except what lies outside the region."""
    start, offsets, mask = _addresses(region, c, p, TILE)
    values = values.to(ptr.dtype.element_ty)
    if TILE.mask_rows or TILE.mask_cols:
        tl.store(ptr + start + offsets, values, mask=mask)
    else:
        tl.store(ptr + start + offsets, values)


@triton.jit
def _zero_beyond(values, region, tile: tl.constexpr, DOWN_ROWS: tl.constexpr, TILE: tl.constexpr):
    if DOWN_ROWS and TILE.mask_rows:
        return tl.where(_inside_rows(region, tile, TILE), values, 0.0)
    elif not DOWN_ROWS and TILE.mask_cols:
        return tl.where(_inside_cols(region, tile, TILE), values, 0.0)
    else:
        return values


@triton.jit
def zero_beyond_pixels(values, region, p: tl.constexpr, TILE: tl.constexpr):
    """Zero the values of a fragment of pixel tile ``p`` where the region has no such pixels."""
    return _zero_beyond(values, region, p, TILE.channels_last, TILE)


@triton.jit
def zero_beyond_channels(values, region, c: tl.constexpr, TILE: tl.constexpr):
    """Zero per-channel or per-group values where channel tile ``c`` has no such channels."""
    return _zero_beyond(values, region, c, not TILE.channels_last, TILE)


@triton.jit
def channels_of(region, c: tl.constexpr, TILE: tl.constexpr):
    """Return the channels of channel tile ``c``, counted within the sample, and which exist.

    Their shape, ``[1, cols]`` channels-last and ``[rows, channels_per_row]`` contiguous, is that of
    all per-channel values. It broadcasts against a fragment unless ``channels_per_row`` is above 1.
    """
    if TILE.channels_last:
        cols = c * TILE.cols + tl.arange(0, TILE.cols)[None, :]
        return region.position.channel + cols, cols < region.block.cols
    else:
        rows = c * TILE.rows + tl.arange(0, TILE.rows)[:, None]
        lanes = tl.arange(0, TILE.channels_per_row)[None, :]
        channels = region.position.channel + rows * TILE.channels_per_row + lanes
        # all lanes exist: the comparison only gives the mask the shape of the channels
        return channels, (rows < region.block.rows) & (lanes >= 0)


@triton.jit
def load_channels(operand, region, c: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr):
    """Load a ``PerChannel`` operand for the channels of channel tile ``c``."""
    channels, mask = channels_of(region, c, TILE)
    row = region.position.sample.to(tl.int64) * operand.stride
    return tl.load(operand.ptr + row + channels, mask=mask, other=0.0).to(dtype)


@triton.jit
def store_channels(ptr, values, region, c: tl.constexpr, TILE: tl.constexpr):
    """Store per-channel values to the program's row of ``ptr`` (rows, C)."""
    channels, mask = channels_of(region, c, TILE)
    row = region.position.grads_row * (region.shape.groups * TILE.group_channels)
    tl.store(ptr + row + channels, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def groups_of(region, TILE: tl.constexpr):
    """Return the region's groups, counted over the batch, and which exist: ``[padded_groups]``."""
    position, groups = region.position, region.shape.groups
    index = tl.arange(0, TILE.padded_groups)
    if TILE.batch_rows:
        sample = (position.split * TILE.rows + index).to(tl.int64)
        return sample * groups + position.group, index < region.block.rows
    else:
        mask = (index < TILE.groups) & (position.group + index < groups)
        return position.sample.to(tl.int64) * groups + position.group + index, mask


@triton.jit
def empty_kernel():
    """Do nothing: launching it shows whether Triton can compile and load a kernel."""
