"""Describe how one problem is computed: strategy, program tile, warps, splits."""

from dataclasses import dataclass

from .problem import Problem


@dataclass(frozen=True)
class Tile:
    """The elements that a program holds on chip; kernels/tile.py has their layout in memory."""

    channels_last: bool
    vec: int
    channels_per_row: int
    group_channels: int
    groups: int  # whole adjacent groups; above 1 only if channels-last
    padded_groups: (
        int  # the next power of two; with batch_rows the rows, since each is another group
    )
    rows: int  # one fragment is [rows, cols], both powers of two
    cols: int
    channel_tiles: int  # number of fragments along the channels
    pixel_tiles: int
    mask_rows: bool  # the fragments extend beyond the tensor
    mask_cols: bool
    batch_rows: bool  # each row is a sample of one pixel

    @property
    def elements(self) -> int:
        return self.rows * self.cols * self.channel_tiles * self.pixel_tiles


@dataclass(frozen=True)
class Config:
    """Describe how a problem is computed.

    Split divides the pixels of a group into ``splits`` parts of ``split_vecs`` (vectors if
    contiguous, pixels if channels-last); resident has one part. Pipelined divides them like split.
    Its ``persistent_programs`` take the parts in stages of ``blocks`` adjacent blocks of groups.
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
        """Number of programs that share a group."""
        tile = self.tile
        if tile.channels_last:
            channels, per_program = tile.groups * tile.group_channels, tile.cols
        else:
            channels, per_program = tile.group_channels // tile.channels_per_row, tile.rows
        return self.splits * -(-channels // (per_program * tile.channel_tiles))

    def parts(self, problem: Problem) -> int:
        """Return the number of samples, or of batches of rows, with programs of their own."""
        return -(-problem.n // self.tile.rows) if self.tile.batch_rows else problem.n

    def programs(self, problem: Problem) -> int:
        """Return the number of programs; for pipelined the number of work items."""
        return self.parts(problem) * -(-problem.groups // self.tile.groups) * self.num_partials

    def grid(self, problem: Problem) -> int:
        """Return the number of launched programs."""
        return self.persistent_programs or self.programs(problem)

    def stages_per_sample(self, problem: Problem) -> int:
        """Return the number of stages of a pipelined config in a sample."""
        return -(-problem.groups // self.tile.groups) // self.blocks

    def prefetch_distance(self, problem: Problem) -> int:
        """Return the stages between first and second pass, enough that no program waits."""
        in_flight = -(-self.persistent_programs // (self.blocks * self.num_partials))
        return min(in_flight + 1, problem.n * self.stages_per_sample(problem))
