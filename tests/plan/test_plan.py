"""The planner: problems in, plans out, without tensors or a GPU."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.activations import ACTIVATIONS
from triton_gn.plan import (
    TARGETS,
    Config,
    Device,
    Problem,
    best_per_strategy,
    fits,
    is_always_resident,
    is_verified,
    partials_at_a_time,
    plan,
)
from triton_gn.plan.candidates import MAX_PARTIALS, block_extent, make_tile

H100 = Device()
REGISTERS = 65536  # of a multiprocessor, 32 bits each
CHANNELS_LAST = Problem("forward", 2, 320, 32, 256, "bfloat16", channels_last=True)
CONTIGUOUS = replace(CHANNELS_LAST, channels_last=False)
LARGE = replace(CONTIGUOUS, pixels=2**16)
# an odd group leaves one element per access, and so the most fragments for the same bytes
ODD = Problem("forward", 1, 15, 3, 4097, "bfloat16", channels_last=False)
# the cost model prefers split here, on a GPU that is otherwise idle
IDLE = Problem("backward", 1, 128, 1, 64, "float32", channels_last=False)
# 33 x 211 elements take a tile of 64 x 256
PADDED = Problem("backward", 1, 33, 1, 211, "bfloat16", channels_last=True)

# 10 channels a group: a row of one is 20 bytes, of four a multiple of 16 that does not fit on chip
NARROW = Problem("backward", 1, 80, 8, 321, "float16", channels_last=True)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any problem, with the sizes that networks use more often than chance would."""
    groups = draw(st.sampled_from([1, 2, 3, 7, 8, 32]) | st.integers(1, 512))
    group_channels = draw(st.sampled_from([1, 2, 4, 10, 16, 40]) | st.integers(1, 512))
    pixels = draw(
        st.sampled_from([1, 49, 256, 4096, 2**18]) | st.integers(1, 1024) | st.integers(1, 10**8)
    )
    return Problem(
        direction=draw(st.sampled_from(["forward", "backward"])),
        n=draw(st.sampled_from([1, 2, 64]) | st.integers(1, 10**5)),
        channels=groups * group_channels,
        groups=groups,
        pixels=pixels,
        dtype=draw(st.sampled_from(["float16", "bfloat16", "float32", "float64"])),
        channels_last=draw(st.booleans()),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        pre_add=draw(st.booleans()),
        residual=draw(st.booleans()),
        per_sample=pixels == 1 and draw(st.booleans()),
    )


# derandomize: the same examples in every run, so that a failure is a change's and not chance's
for_any_problem = settings(max_examples=150, deadline=None, derandomize=True)


def overridden(problem: Problem, **fields: Any) -> Config:
    return plan(problem, H100, override=tuple(sorted(fields.items())))


@for_any_problem
@given(problem=problems())
@example(problem=ODD)
@example(problem=replace(ODD, channels_last=True))
@example(problem=replace(ODD, direction="backward", dtype="float64"))
@example(problem=replace(ODD, direction="backward", dtype="float64", activation="gelu"))
def test_every_problem_has_a_plan_that_fits(problem: Problem) -> None:
    for device in (H100, TARGETS["gfx942"]):
        config = plan(problem, device)
        assert fits(problem, config, device) is None
    if problem.group_elements > REGISTERS:
        assert plan(problem, H100).strategy == "split"
        assert "resident" not in best_per_strategy(problem, H100)


@for_any_problem
@given(problem=problems().filter(is_always_resident))
@example(problem=IDLE)
@example(problem=PADDED)
@example(problem=NARROW)
def test_small_groups_are_resident(problem: Problem) -> None:
    """Unless only split can read them in the widest accesses that their channels allow."""
    assert problem.group_elements <= 8192
    config = plan(problem, H100)
    if config.strategy == "split":
        widest = problem.vec * problem.itemsize
        resident = overridden(problem, strategy="resident")
        assert problem.access_bytes(resident.tile.groups) < widest
        assert problem.access_bytes(config.tile.groups) == widest


def assert_covers(extent: int, length: int, count: int) -> None:
    """Assert that ``count`` pieces cover the extent and that the last is not empty."""
    assert (count - 1) * length < extent <= count * length


@for_any_problem
@given(problem=problems())
def test_fragments_and_splits_cover_the_block_and_none_is_empty(problem: Problem) -> None:
    config = plan(problem, H100)
    tile = config.tile
    rows, cols = block_extent(problem, tile.groups)
    parts_of_batch = problem.n
    if tile.batch_rows:
        rows = tile.rows  # each row is one sample
        parts_of_batch = math.ceil(problem.n / tile.rows)
    if problem.channels_last:
        channels, per_channel_tile, pixels, per_pixel_tile = cols, tile.cols, rows, tile.rows
    else:
        channels, per_channel_tile, pixels, per_pixel_tile = rows, tile.rows, cols, tile.cols
    vecs = problem.pixels if problem.channels_last else problem.row_vecs
    if config.strategy == "resident":
        assert_covers(channels, per_channel_tile, tile.channel_tiles)
        assert_covers(pixels, per_pixel_tile, tile.pixel_tiles)
        assert (config.splits, config.split_vecs) == (1, vecs)
        assert config.num_partials == 1
    else:
        assert_covers(vecs, config.split_vecs, config.splits)
        parts, remainder = divmod(config.num_partials, config.splits)
        assert remainder == 0
        assert_covers(channels, per_channel_tile * tile.channel_tiles, parts)
        # merged as a power of two of num_partials by one of groups
        at_a_time = partials_at_a_time(config.tile.padded_groups)
        assert at_a_time.bit_count() == 1
        assert at_a_time * tile.padded_groups <= MAX_PARTIALS
    blocks = math.ceil(problem.groups / tile.groups)
    assert config.programs(problem) == parts_of_batch * blocks * config.num_partials


def test_samples_of_one_pixel_share_a_program() -> None:
    """A program per sample would be tiny, and its partial gradients larger than the sample."""
    for direction in ("forward", "backward"):
        problem = Problem(direction, 4096, 1024, 16, 1, "bfloat16", channels_last=True)
        config = plan(problem, H100)
        assert config.tile.batch_rows
        assert config.tile.rows >= 8
        per_sample = replace(problem, per_sample=True)
        assert not plan(per_sample, H100).tile.batch_rows
        assert not plan(replace(problem, pixels=2), H100).tile.batch_rows


@for_any_problem
@given(problem=problems())
def test_masks_are_left_out_only_if_the_fragments_end_with_the_tensor(problem: Problem) -> None:
    config = plan(problem, H100)
    tile = config.tile
    rows, cols = block_extent(problem, tile.groups, tile.batch_rows)
    row_tiles, col_tiles = tile.channel_tiles, tile.pixel_tiles
    if problem.channels_last:
        row_tiles, col_tiles = col_tiles, row_tiles
    if not tile.mask_rows:
        assert rows % (tile.rows * row_tiles) == 0
    if not tile.mask_cols:
        assert cols % (tile.cols * col_tiles) == 0
        assert problem.groups % tile.groups == 0 or not problem.channels_last


@for_any_problem
@given(problem=problems(), n=st.integers(1, 10**5))
def test_batch_invariant_plan_ignores_the_batch(problem: Problem, n: int) -> None:
    other = replace(problem, n=n)
    assert plan(problem, H100, batch_invariant=True) == plan(other, H100, batch_invariant=True)


def test_batch_size_matters_otherwise() -> None:
    single, many = replace(LARGE, n=1), replace(LARGE, n=1024)
    assert plan(single, H100) != plan(many, H100)
    assert plan(single, H100) == plan(many, H100, batch_invariant=True)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("channels", [320, 640, 1280])
def test_sizes_of_an_image_share_the_tile_of_split(direction: str, channels: int) -> None:
    """A tile is compiled once; sizes differ in splits only."""
    sizes = [(128, 128), (144, 112), (152, 104), (168, 96), (88, 176), (80, 192), (64, 64)]
    problems = [
        Problem(direction, n, channels, 32, height * width, "float16", True, "silu")
        for n in (2, 4)
        for height, width in sizes
    ]
    plans = [overridden(problem, strategy="split") for problem in problems]
    assert len({replace(config.tile, mask_rows=True) for config in plans}) == 1
    assert len({config.splits for config in plans}) > 1


def test_rows_beyond_the_last_channel_count() -> None:
    """16 channels in 64 rows took four times the instructions."""
    problem = Problem("forward", 1, 512, 32, 5 * 64 * 64, "float16", False)
    tile = overridden(problem, strategy="split").tile
    assert tile.rows <= 16


def test_equal_problems_share_one_plan() -> None:
    config = plan(LARGE, H100)
    assert plan(replace(LARGE), Device()) is config
    assert {config: "usable as a key"}[replace(config)]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("channels", [96, 192, 320, 640])
def test_narrow_groups_lie_side_by_side_for_wide_accesses(
    direction: str, dtype: str, channels: int
) -> None:
    """One group alone is no multiple of 16 bytes wide here: its accesses would be narrower."""
    problem = Problem(direction, 2, channels, 32, 256, dtype, channels_last=True)
    assert problem.group_channels * problem.itemsize % 16 != 0
    assert plan(problem, H100).tile.groups * problem.group_channels * problem.itemsize % 16 == 0


@pytest.mark.parametrize("strategy", ["resident", "split"])
@pytest.mark.parametrize("problem", [CHANNELS_LAST, CONTIGUOUS], ids=["channels-last", "contig"])
def test_strategy_can_be_overridden(problem: Problem, strategy: str) -> None:
    assert overridden(problem, strategy=strategy).strategy == strategy


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_groups_can_be_overridden(groups: int) -> None:
    assert overridden(CHANNELS_LAST, groups=groups).tile.groups == groups


@pytest.mark.parametrize("strategy", ["resident", "split"])
@pytest.mark.parametrize(
    ("problem", "groups", "rows", "cols"),
    [
        (CHANNELS_LAST, 1, 64, 8),
        (CHANNELS_LAST, 4, 16, 64),
        (CHANNELS_LAST, 4, 32, 64),
        (CONTIGUOUS, 1, 1, 256),
        (CONTIGUOUS, 1, 4, 512),
    ],
)
def test_fragment_can_be_overridden(
    problem: Problem, groups: int, rows: int, cols: int, strategy: str
) -> None:
    config = overridden(problem, strategy=strategy, groups=groups, rows=rows, cols=cols)
    tile = config.tile
    assert (tile.groups, tile.rows, tile.cols) == (groups, rows, cols)


@pytest.mark.parametrize("num_warps", [1, 2, 4, 8, 16, 32])
def test_num_warps_can_be_overridden(num_warps: int) -> None:
    assert overridden(CONTIGUOUS, num_warps=num_warps).num_warps == num_warps


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_splits_can_be_overridden(splits: int) -> None:
    assert overridden(LARGE, strategy="split", splits=splits).splits == splits


def test_a_pipeline_takes_what_is_given() -> None:
    config = overridden(LARGE, strategy="pipelined", splits=4, blocks=2, persistent_programs=7)
    assert (config.splits, config.blocks, config.persistent_programs) == (4, 2, 7)
    assert config.grid(LARGE) == 7
    assert config.stages_per_sample(LARGE) == 16


@for_any_problem
@given(problem=problems())
def test_pipelines_fill_the_gpu_and_their_second_pass_is_late_enough(problem: Problem) -> None:
    """The second pass is behind by as many work items as there are programs, or by all items."""
    problem = replace(problem, n=min(problem.n, 64))  # or there may be more tickets than numbers
    config = overridden(problem, strategy="pipelined")
    stages = problem.n * config.stages_per_sample(problem)
    prefetch_distance, items = (
        config.prefetch_distance(problem),
        config.blocks * config.num_partials,
    )
    assert stages * items == config.programs(problem)
    assert 1 <= config.persistent_programs <= max(config.programs(problem), 1)
    assert (
        prefetch_distance == stages or (prefetch_distance - 1) * items >= config.persistent_programs
    )


@for_any_problem
@given(problem=problems())
@example(problem=ODD)
def test_the_heuristic_chooses_only_what_a_gpu_has_proven(problem: Problem) -> None:
    assert is_verified(plan(problem, H100))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("pixels", [49, 2**28 + 1, 2**29 + 2, 2**30 + 1, 2**30 + 3])
def test_rows_that_span_channels_are_counted_in_32_bits(pixels: int, dtype: str) -> None:
    """In 32 bits channel 3 of 4 of 2**30 + 1 pixels would have the parameters of channel 0."""
    problem = Problem("forward", 1, 8, 1, pixels, dtype, channels_last=False)
    assert problem.channels_per_row == 1 or problem.row_vecs * problem.vec < 2**31
    assert problem.channels_per_row > 1 or pixels > 49
    assert fits(problem, plan(problem, H100), H100) is None


def test_splits_are_at_most_the_iterations() -> None:
    config = overridden(CONTIGUOUS, strategy="split", splits=10**6)
    assert_covers(CONTIGUOUS.row_vecs, config.split_vecs, config.splits)


@pytest.mark.parametrize(
    ("problem", "fields", "message"),
    [
        (CONTIGUOUS, {"strategy": "fused"}, "one of resident, split, pipelined; got 'fused'"),
        (CONTIGUOUS, {"rows": 3}, "rows must be a power of two; got 3"),
        (CONTIGUOUS, {"rows": 0}, "rows .*got 0"),
        (CONTIGUOUS, {"cols": 0}, "cols .*got 0"),
        (CONTIGUOUS, {"cols": -8}, "cols .*got -8"),
        (CONTIGUOUS, {"num_warps": 3}, "num_warps must be a power of two up to 32; got 3"),
        (CONTIGUOUS, {"strategy": "split", "splits": 0}, "splits .*got 0"),
        (CONTIGUOUS, {"strategy": "split", "splits": -1}, "splits .*got -1"),
        (CONTIGUOUS, {"strategy": "resident", "splits": 2}, "add strategy='split'"),
        (CONTIGUOUS, {"groups": 2}, "2 whole groups"),
        (CHANNELS_LAST, {"groups": 33}, "33 whole groups"),
        # a split would end within an iteration, which has no mask there
        (
            CONTIGUOUS,
            {"strategy": "split", "cols": 4, "pixel_tiles": 3},
            "of the vector, 8; got 12",
        ),
        (CONTIGUOUS, {"strategy": "split", "cols": 2, "pixel_tiles": 1}, "of the vector, 8; got 2"),
        (CHANNELS_LAST, {"groups": 4, "cols": 16}, "cols must hold the 40 channels .*got 16"),
        (
            replace(LARGE, channels_last=True),
            {"strategy": "resident"},
            "no resident program can hold .* groups of 655360 elements in its registers. "
            "Leave strategy and groups to the planner",
        ),
    ],
)
def test_overrides_that_cannot_run_are_refused(
    problem: Problem, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"plan_override: .*{message}"):
        overridden(problem, **fields)


# 2**27 channels: 16 rows of them end beyond 2**31 elements
WIDE = Problem("forward", 1, 2**27, 2**21, 64, "bfloat16", channels_last=True)

PIPELINED = replace(CONTIGUOUS, activation="silu")

# groups of 40,960 elements: too large to be resident at any price
NOT_SMALL = Problem("forward", 2, 320, 32, 4096, "bfloat16", channels_last=False)


@pytest.mark.parametrize(
    ("problem", "config", "tile", "message"),
    [
        (CONTIGUOUS, {"strategy": "fused"}, {}, "one of resident, split, pipelined; got 'fused'"),
        (CONTIGUOUS, {}, {"rows": 3}, "rows must be a power of two; got 3"),
        (CONTIGUOUS, {}, {"cols": 0}, "cols must be a power of two; got 0"),
        (CONTIGUOUS, {"num_warps": 64}, {}, "num_warps .* up to 32; got 64"),
        (CONTIGUOUS, {}, {"groups": 2}, "one group; got groups=2"),
        (CHANNELS_LAST, {}, {"groups": 0}, "between 1 and 32; got 0"),
        (CHANNELS_LAST, {}, {"groups": 33}, "between 1 and 32; got 33"),
        (CHANNELS_LAST, {}, {"groups": 7}, "hold the 70 channels of 7 groups; got 64"),
        (CONTIGUOUS, {}, {"pixel_tiles": 17}, "at most 16 fragments; got 17"),
        (
            NOT_SMALL,
            {},
            {"rows": 64, "pixel_tiles": 5},
            r"20480 elements in 4 warps take 224 registers a thread; at most \d+ are free",
        ),
        (PIPELINED, {"blocks": 3}, {}, "blocks must divide the 32 of a sample; got 3"),
        (PIPELINED, {"blocks": 0}, {}, "blocks must divide .*got 0"),
        (
            PIPELINED,
            {"persistent_programs": 0},
            {},
            "persistent_programs must be between 1 and 65536; got 0",
        ),
        (PIPELINED, {"persistent_programs": 2**17}, {}, "persistent_programs .* got 131072"),
        (replace(PIPELINED, n=2**25), {}, {}, r"tickets must be less than 2\*\*31"),
        (CONTIGUOUS, {}, {"cols": 4}, "multiple of the vector, 8; got 4"),
        (CONTIGUOUS, {}, {"rows": 256}, "2048 elements a warp; 256 rows of 64 in 4 warps"),
        (CHANNELS_LAST, {}, {"groups": 32, "cols": 512}, "256 channels in all; 32 have 320"),
        (WIDE, {}, {"rows": 16}, r"within 2\*\*31 elements; 16 rows do not"),
    ],
)
def test_every_bound_can_fail(
    problem: Problem, config: dict[str, Any], tile: dict[str, Any], message: str
) -> None:
    """One change to a plan that fits."""
    good = Config("split", make_tile(problem, 1, 8, 64, 1, 1), 4, 1, 256)
    assert fits(problem, good, H100) is None
    if problem.activation == PIPELINED.activation:
        good = replace(good, strategy="pipelined", blocks=1, persistent_programs=1)
        assert fits(replace(problem, n=1), good, H100) is None
    reason = fits(problem, replace(good, tile=replace(good.tile, **tile), **config), H100)
    assert reason is not None
    assert re.search(message, reason), reason
