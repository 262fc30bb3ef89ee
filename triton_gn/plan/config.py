"""Describe how one problem is computed: strategy, program tile, warps, splits."""

from dataclasses import dataclass

from .problem import Problem


@dataclass(frozen=True)
class Tile:
    """What one program holds on chip; kernels/tile.py says how it lies in memory."""

    channels_last: bool
    vec: int
    channels_per_row: int
    group_channels: int
    groups: int  # whole groups side by side; above 1 only channels-last
    padded_groups: int  # the next power of two; of a stack the rows, as each is another group
    rows: int  # one fragment is [rows, cols], both powers of two
    cols: int
    channel_tiles: int  # how many fragments
    pixel_tiles: int
    mask_rows: bool  # do the fragments stick out of the tensor?
    mask_cols: bool
    batch_rows: bool  # are the rows samples of one pixel each?

    @property
    def elements(self) -> int:
        return self.rows * self.cols * self.channel_tiles * self.pixel_tiles


@dataclass(frozen=True)
class Config:
    """The decision.

    Split cuts the pixels of a group into ``splits`` parts of ``split_vecs`` (vectors if contiguous,
    pixels if channels-last); resident has one part. Pipelined cuts as split does;
    ``persistent_programs`` work through the parts, stage by stage of ``blocks`` adjacent blocks of
    groups.
    """

    strategy: str  # "resident", "pipelined" or "split"
    tile: Tile
    num_warps: int
    splits: int
    split_vecs: int
    blocks: int = 0
    persistent_programs: int = 0

    @property
    def num_partials(self) -> int:
        """Programs that share a group."""
        tile = self.tile
        if tile.channels_last:
            channels, per_program = tile.groups * tile.group_channels, tile.cols
        else:
            channels, per_program = tile.group_channels // tile.channels_per_row, tile.rows
        return self.splits * -(-channels // (per_program * tile.channel_tiles))

    def parts(self, problem: Problem) -> int:
        """Samples or stacks of them, which have programs and partial gradients of their own."""
        return -(-problem.n // self.tile.rows) if self.tile.batch_rows else problem.n

    def programs(self, problem: Problem) -> int:
        """Return the number of programs; of pipelined, the number of work items."""
        return self.parts(problem) * -(-problem.groups // self.tile.groups) * self.num_partials

    def grid(self, problem: Problem) -> int:
        """Programs that are launched."""
        return self.persistent_programs or self.programs(problem)

    def units_in_sample(self, problem: Problem) -> int:
        """Units of a pipelined plan."""
        return -(-problem.groups // self.tile.groups) // self.blocks

    def prefetch_distance(self, problem: Problem) -> int:
        """By how many units the first pass is ahead of the second, so that nobody need wait."""
        in_work = -(-self.persistent_programs // (self.blocks * self.num_partials))
        return min(in_work + 1, problem.n * self.units_in_sample(problem))
