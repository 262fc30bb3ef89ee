"""Describe how one problem is computed: strategy, program tile, warps, splits."""

from dataclasses import dataclass

from .problem import Problem


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
