"""What a plan is made of: the problem and the decision."""

import math
from dataclasses import dataclass

_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
ACCESS_BYTES = 16  # the widest load and store of one thread


@dataclass(frozen=True)
class Problem:
    """One GroupNorm launch, described without its tensors.

    ``pixels`` is the product of the spatial sizes, ``dtype`` the input's. ``channels_last`` means
    channels innermost in memory, in any rank. ``pre_add`` and ``residual``: is there one to read?
    ``per_sample``: do samples of one pixel, of which a program could take many, have values per
    channel of their own?
    """

    direction: str  # "forward" or "backward"
    n: int
    channels: int
    groups: int
    pixels: int
    dtype: str
    channels_last: bool
    activation: str = "none"
    pre_add: bool = False
    residual: bool = False
    per_sample: bool = False

    @property
    def fused(self) -> tuple[str, ...]:
        """Operands that pose this problem where a workload fuses them."""
        names = [name for name in ("pre_add", "residual") if getattr(self, name)]
        return tuple(["scale"] * (self.per_sample and not self.pre_add) + names)

    @property
    def itemsize(self) -> int:
        return _ITEMSIZE[self.dtype]

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def group_elements(self) -> int:
        return self.group_channels * self.pixels

    @property
    def vec(self) -> int:
        """Elements per memory access: as wide as the alignment of every group allows."""
        if self.channels_last:
            unit = self.channels
        elif self.itemsize < 8 and self.pixels * ACCESS_BYTES < 2**32:
            unit = self.group_elements
        else:
            # no span: float64 leaves it no registers, kernels count its elements in 32 bits
            unit = self.pixels
        return math.gcd(unit, ACCESS_BYTES // self.itemsize)

    def access_bytes(self, groups: int) -> int:
        """The widest access that blocks of ``groups`` whole groups allow."""
        elements = self.vec
        if self.channels_last:
            elements = math.gcd(elements, groups * self.group_channels)
        return elements * self.itemsize

    @property
    def span(self) -> int:
        """Contiguous: how many channels it takes to fill whole vectors (1 channels-last)."""
        return 1 if self.channels_last else self.vec // math.gcd(self.pixels, self.vec)

    @property
    def row_vecs(self) -> int:
        """Length of a memory row (kernels/tile.py) in vectors."""
        row = self.channels if self.channels_last else self.pixels * self.span
        return row // self.vec


@dataclass(frozen=True)
class Tile:
    """What one program holds on chip; kernels/tile.py says how it lies in memory."""

    channels_last: bool
    vec: int
    span: int
    group_channels: int
    groups: int  # whole groups side by side; above 1 only channels-last
    group_slots: int  # the next power of two; of a stack the rows, as each is another group
    rows: int  # one sub-tile is [rows, cols], both powers of two
    cols: int
    channel_tiles: int  # how many sub-tiles
    pixel_tiles: int
    mask_rows: bool  # do the sub-tiles stick out of the tensor?
    mask_cols: bool
    stacked: bool  # are the rows samples of one pixel each?

    @property
    def elements(self) -> int:
        return self.rows * self.cols * self.channel_tiles * self.pixel_tiles


@dataclass(frozen=True)
class Config:
    """The decision. ``chunks`` and ``chunk_vecs``: into how many parts, how long each (vectors when
    contiguous, pixels when channels-last), split cuts the pixels of a group; resident has one.
    Pipelined cuts as split does; ``workers`` programs work through it, unit by unit of ``blocks``
    adjacent blocks of groups."""

    strategy: str  # "resident", "pipelined" or "split"
    tile: Tile
    num_warps: int
    chunks: int
    chunk_vecs: int
    blocks: int = 0
    workers: int = 0

    @property
    def slots(self) -> int:
        """Programs that share a group."""
        tile = self.tile
        if tile.channels_last:
            channels, per_program = tile.groups * tile.group_channels, tile.cols
        else:
            channels, per_program = tile.group_channels // tile.span, tile.rows
        return self.chunks * -(-channels // (per_program * tile.channel_tiles))

    def parts(self, problem: Problem) -> int:
        """Samples or stacks of them, which have programs and partial gradients of their own."""
        return -(-problem.n // self.tile.rows) if self.tile.stacked else problem.n

    def programs(self, problem: Problem) -> int:
        """Programs; of pipelined the pieces of work, which its workers take one by one."""
        return self.parts(problem) * -(-problem.groups // self.tile.groups) * self.slots

    def grid(self, problem: Problem) -> int:
        """Programs that are launched."""
        return self.workers or self.programs(problem)

    def units_in_sample(self, problem: Problem) -> int:
        """Units of a pipelined plan."""
        return -(-problem.groups // self.tile.groups) // self.blocks

    def lag(self, problem: Problem) -> int:
        """By how many units the first pass is ahead of the second, so that nobody need wait."""
        in_work = -(-self.workers // (self.blocks * self.slots))
        return min(in_work + 1, problem.n * self.units_in_sample(problem))
