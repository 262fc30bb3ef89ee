"""Tables of measured plans: which entry is used, and that no file can do harm."""

import copy
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.plan.test_plan import problems
from triton_gn.plan import (
    Config,
    Device,
    Problem,
    candidates,
    fields_of,
    fits,
    heuristic_plan,
    plan,
    planner,
    table,
)
from triton_gn.plan.table import Entry

H100 = Device()
PROBLEM = Problem("forward", 2, 320, 32, 4096, "bfloat16", channels_last=False, activation="silu")
PROVENANCE = {"driver": "570.1", "torch": "2.13"}


def another_plan(problem: Problem) -> Config:
    """Return a plan that can run and is not the default."""
    default = heuristic_plan(problem, H100)
    return next(config for config in candidates(problem, H100) if config != default)


def entry_of(problem: Problem, config: Config | None) -> Entry:
    fields = None if config is None else fields_of(config)
    return Entry(problem, fields, 12.5, 10.25, 0.5, 9.0, 8.0, PROVENANCE)


def tuned_to(problem: Problem) -> Entry:
    return entry_of(problem, another_plan(problem))


ENTRY = tuned_to(PROBLEM)
TUNED = another_plan(PROBLEM)
SPLIT = next(config for config in candidates(PROBLEM, H100) if config.strategy == "split")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache folder, empty; nothing is shipped and nothing has been warned of."""
    monkeypatch.setenv("TRITON_GN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(table, "_warned", set())
    planner.forget_plans()
    yield tmp_path
    planner.forget_plans()


def write(folder: Path, *entries: Entry, device: Device = H100) -> Path:
    folder.mkdir(exist_ok=True)
    path = table.path_of(folder, device)
    path.write_text(table.text_of(device, entries))
    return path


def test_without_tables_the_heuristic_plans(folder: Path) -> None:
    assert table.lookup(PROBLEM, H100) is None
    assert plan(PROBLEM, H100) == heuristic_plan(PROBLEM, H100)


def test_entry_of_the_problem_itself_is_used(folder: Path) -> None:
    path = write(folder, ENTRY)
    assert table.lookup(PROBLEM, H100) == table.Match(TUNED, path, exact=True)
    assert plan(PROBLEM, H100) == TUNED != heuristic_plan(PROBLEM, H100)


def test_entry_without_a_config_means_the_default(folder: Path) -> None:
    path = write(folder, entry_of(PROBLEM, None))
    assert table.lookup(PROBLEM, H100) == table.Match(None, path, exact=True)
    assert plan(PROBLEM, H100) == heuristic_plan(PROBLEM, H100)
    # the same for a problem near it, without a warning
    assert plan(replace(PROBLEM, n=3), H100) == heuristic_plan(replace(PROBLEM, n=3), H100)


def test_override_goes_before_tables(folder: Path) -> None:
    write(folder, ENTRY)
    default = heuristic_plan(PROBLEM, H100)
    override = (("num_warps", default.num_warps),)
    assert plan(PROBLEM, H100, override=override) == default


def test_batch_invariant_plan_is_that_of_one_sample(folder: Path) -> None:
    sample = replace(PROBLEM, n=1)
    write(folder, ENTRY, tuned_to(sample))
    assert plan(PROBLEM, H100, batch_invariant=True) == another_plan(sample)


def test_table_is_read_once_until_plans_are_forgotten(folder: Path) -> None:
    path = write(folder, ENTRY)
    assert plan(PROBLEM, H100) == TUNED
    path.unlink()
    assert plan(PROBLEM, H100) == table.lookup(PROBLEM, H100).config == TUNED  # type: ignore[union-attr]
    planner.forget_plans()
    assert plan(PROBLEM, H100) == heuristic_plan(PROBLEM, H100)


def test_near_match_is_used_and_warned_of_once_with_the_command(folder: Path) -> None:
    write(folder, ENTRY)
    near = replace(PROBLEM, n=3)
    with pytest.warns(UserWarning, match="similar problem") as caught:
        config = plan(near, H100)
    plan(replace(PROBLEM, pixels=4032), H100)  # a second warning would be an error
    assert (config.strategy, config.tile.rows, config.tile.cols) == (
        TUNED.strategy, TUNED.tile.rows, TUNED.tile.cols,
    )  # fmt: skip
    assert len(caught) == 1
    assert (
        "python -m triton_gn tune --shape 3x320x4096 --groups 32 --dtype bfloat16 "
        "--layout contiguous --activation silu." in str(caught[0].message)
    )
    match = table.lookup(near, H100)
    assert match is not None
    assert not match.exact


def test_command_names_what_is_fused() -> None:
    problem = replace(PROBLEM, channels_last=True, pre_add=True, residual=True)
    assert table.command(problem).endswith(
        "--layout channels_last --activation silu --fused pre_add,residual"
    )


@pytest.mark.parametrize(
    ("sizes", "is_near"),
    [
        ({"n": 4}, True),
        ({"n": 1}, True),
        ({"n": 5}, False),
        ({"pixels": 8192}, True),
        ({"pixels": 8200}, False),
        ({"n": 3, "pixels": 6144}, False),  # each is near, together they are not
        ({"channels": 640, "groups": 64}, True),
        ({"channels": 640}, True),
        ({"channels": 960}, False),
    ],
)
def test_how_near_is_near(folder: Path, sizes: dict[str, Any], is_near: bool) -> None:
    write(folder, entry_of(PROBLEM, None))
    assert (table.lookup(replace(PROBLEM, **sizes), H100) is not None) == is_near


@pytest.mark.parametrize(
    "other",
    [
        {"direction": "backward"},
        {"dtype": "float16"},
        {"channels_last": True},
        {"activation": "relu"},
        {"pre_add": True},
        {"residual": True},
    ],
)
def test_kinds_do_not_mix(folder: Path, other: dict[str, Any]) -> None:
    write(folder, ENTRY)
    assert table.lookup(replace(PROBLEM, **other), H100) is None


@pytest.mark.filterwarnings("ignore:triton_gn found no measured plan")
def test_the_nearest_entry_whose_plan_can_run_is_taken(folder: Path) -> None:
    # 128 columns hold 8 groups of 16 channels, but not of 20; and 4 groups of 28 or of 20
    problem = Problem("forward", 2, 640, 32, 64, "bfloat16", channels_last=True)
    nearest, next_nearest = replace(problem, channels=512), replace(problem, channels=896)
    wide = next(c for c in candidates(nearest, H100) if (c.tile.groups, c.tile.cols) == (8, 128))
    fitting = next(c for c in candidates(next_nearest, H100) if c.tile.groups == 4)
    write(folder, entry_of(nearest, wide), entry_of(next_nearest, fitting))
    match = table.lookup(problem, H100)
    assert match is not None
    assert match.config is not None
    assert match.config.tile.groups == 4
    assert fits(problem, match.config, H100) is None


def test_the_nearest_of_several_is_taken(folder: Path) -> None:
    far, near = replace(PROBLEM, n=4), replace(PROBLEM, n=3)
    path = write(folder, entry_of(far, TUNED), entry_of(near, None))
    assert table.lookup(PROBLEM, H100) == table.Match(None, path, exact=False)


def test_plans_that_read_otherwise_are_not_taken_over(folder: Path) -> None:
    """49 pixels a row and 64 are near, but the former's rows channels_per_row eight channels."""
    problem = Problem("forward", 2, 512, 32, 64, "bfloat16", channels_last=False)
    write(folder, tuned_to(problem))
    assert table.lookup(replace(problem, pixels=49), H100) is None


@pytest.mark.filterwarnings("ignore:triton_gn found no measured plan")
def test_of_equally_near_entries_the_first_is_taken(folder: Path) -> None:
    fewer, more = replace(PROBLEM, n=1), replace(PROBLEM, n=4)
    config = heuristic_plan(PROBLEM, H100)
    entries = entry_of(fewer, None), entry_of(more, config)
    path = write(folder, *entries)
    assert table.lookup(PROBLEM, H100) == table.Match(None, path, exact=False)
    write(folder, *reversed(entries))
    planner.forget_plans()
    assert table.lookup(PROBLEM, H100) == table.Match(config, path, exact=False)


def test_user_table_comes_before_the_shipped_one(folder: Path) -> None:
    shipped = write(table.SHIPPED, ENTRY)
    assert table.lookup(PROBLEM, H100) == table.Match(TUNED, shipped, exact=True)
    users = write(folder, entry_of(PROBLEM, None))
    planner.forget_plans()
    assert table.lookup(PROBLEM, H100) == table.Match(None, users, exact=True)


def test_shipped_entry_of_the_problem_itself_comes_before_the_user_table_near_it(
    folder: Path,
) -> None:
    shipped = write(table.SHIPPED, ENTRY)
    write(folder, entry_of(replace(PROBLEM, n=3), None))
    assert table.lookup(PROBLEM, H100) == table.Match(TUNED, shipped, exact=True)


def test_environment_variable_moves_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert table.cache_folder() == folder
    monkeypatch.setenv("TRITON_GN_CACHE_DIR", str(folder / "elsewhere"))
    write(folder / "elsewhere", ENTRY)
    assert plan(PROBLEM, H100) == TUNED
    monkeypatch.setenv("TRITON_GN_CACHE_DIR", "")
    empty = table.cache_folder()
    monkeypatch.delenv("TRITON_GN_CACHE_DIR")
    assert empty == table.cache_folder() != Path()
    assert empty.name == "triton-gn"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3.json"),
        ("AMD Instinct MI300X", "amd-instinct-mi300x.json"),
        ("../../etc/passwd", "etc-passwd.json"),
        ("", "gpu.json"),
    ],
)
def test_file_is_named_by_the_gpu(name: str, file: str) -> None:
    assert table.path_of(Path("here"), Device(name)) == Path("here") / file


def test_table_says_what_was_written(tmp_path: Path) -> None:
    entries = [ENTRY, entry_of(replace(PROBLEM, n=3), None), entry_of(replace(PROBLEM, n=1), SPLIT)]
    assert table.read(write(tmp_path, *entries), H100) == entries


@settings(max_examples=50, deadline=None, derandomize=True)
@given(problem=problems())
@example(problem=PROBLEM)
def test_every_plan_of_a_search_can_be_kept(problem: Problem) -> None:
    for config in candidates(problem, H100):
        assert entry_of(problem, config).plan_for(problem, H100) == config


def test_shipped_tables_can_be_read() -> None:
    for path in table.SHIPPED.glob("*.json"):
        name = json.loads(path.read_text())["device"]
        device = Device(name["name"], name["multiprocessors"])
        assert path == table.path_of(table.SHIPPED, device)
        assert len(table._table(path, device)) == len(table.read(path, device))


# Files that are not to be trusted.

VALID = json.loads(table.text_of(H100, [ENTRY]))


def changed(value: Any, *keys: Any) -> bytes:
    """The table with one value in it replaced."""
    content = copy.deepcopy(VALID)
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return json.dumps(content).encode()


IN_PROBLEM = ("entries", 0, "problem")
IN_CONFIG = ("entries", 0, "config")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(VALID).encode()[:-9], "Unterminated string"),
        (b"\xff\xfe{", "can't decode byte"),
        (b"[]", "it is damaged .TypeError: "),
        (b"{}", "it is damaged .KeyError: 'schema'"),
        (b"[" * 200_000, "it is damaged .RecursionError: "),
        (changed("NVIDIA A10", "device", "name"), "device must be {.*NVIDIA H1.*'NVIDIA A10"),
        (changed(114, "device", "multiprocessors"), "multiprocessors': 132}; got .*114"),
        (changed({"a": 1}, "entries"), "it is damaged .TypeError: "),
        (changed(1, "entries", 0, "more"), "unexpected keyword argument 'more'"),
        (changed(1, "entries", 0, "more" * 1000), "unexpected keyword argument 'moremore"),
        (changed([], "entries", 0, "provenance"), r"provenance must be of type dict; got \[\]"),
        (changed(float("nan"), "entries", 0, "default_us"), "default_us must be .*got nan"),
        (changed(float("inf"), "entries", 0, "default_us"), "default_us must be .*got inf"),
        (changed(-1.0, "entries", 0, "best_us"), r"best_us must be of type float .*got -1\.0"),
        (changed(True, "entries", 0, "best_us"), "best_us must be of type float .*got True"),
        (changed(12345, *IN_PROBLEM, "n").replace(b"12345", b"9" * 100_000), "Exceeds the limit"),
        (changed(2**31 + 1, *IN_PROBLEM, "n"), "n must be of type int from 1 to 2147483648"),
        (changed(0, *IN_PROBLEM, "groups"), "groups must be of type int from 1"),
        (changed(True, *IN_PROBLEM, "n"), "n must be of type int .*got True"),
        (changed(1, *IN_PROBLEM, "channels_last"), "channels_last must be of type bool; got 1"),
        (changed("int8", *IN_PROBLEM, "dtype"), "must be one of GroupNorm; got Problem"),
        (changed(7, *IN_PROBLEM, "groups"), "must be one of GroupNorm; got Problem"),
        (changed([], *IN_CONFIG), "config must be of type dict"),
        (changed(2, *IN_CONFIG, "strategy"), "strategy must be of type str; got 2"),
        (changed(1, *IN_CONFIG, "color"), "unexpected keyword argument 'color'"),
        (changed("8", *IN_CONFIG, "rows"), "rows must be of type int"),
    ],
)  # fmt: skip
def test_no_table_is_ignored_with_a_warning_that_says_why(
    folder: Path, content: bytes, message: str
) -> None:
    path = table.path_of(folder, H100)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=message) as caught:
        assert plan(PROBLEM, H100) == heuristic_plan(PROBLEM, H100)
    planner.forget_plans()
    assert plan(PROBLEM, H100) == heuristic_plan(PROBLEM, H100)  # and once is enough
    text = str(caught[0].message)
    assert len(caught) == 1
    assert str(path) in text
    assert "Remedy: run `python -m triton_gn tune` again" in text
    assert len(text) < 1000


def make_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(100 * 2**20)


def make_unreadable(path: Path) -> None:
    path.write_text(json.dumps(VALID))
    path.chmod(0)


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "no regular file"),
        (Path.mkdir, "no regular file"),
        (make_large, "more than 4194304 bytes"),
        (make_endless, "no regular file"),
        (make_loop, "symbolic links"),
        pytest.param(
            make_unreadable,
            "Permission denied",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may read any file"),
        ),
    ],
)
def test_what_is_no_readable_file_is_ignored(folder: Path, make: Any, message: str) -> None:
    make(table.path_of(folder, H100))
    with pytest.warns(UserWarning, match=message):
        assert plan(PROBLEM, H100) == heuristic_plan(PROBLEM, H100)


def test_folder_that_is_a_file_is_ignored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_GN_CACHE_DIR", str(write(folder, ENTRY)))
    with pytest.warns(UserWarning, match="Not a directory"):
        assert plan(PROBLEM, H100) == heuristic_plan(PROBLEM, H100)


@pytest.mark.parametrize(
    "fields",
    [
        {"strategy": "fused"},
        {"num_warps": 3},
        {"rows": 3},
        {"groups": 33},
        {"rows": 2**31},
        {"rows": 1024, "cols": 1024},
        {"cols": 2},
        {"num_warps": 2**31},
        {"strategy": "split", "rows": 1, "cols": 1, "pixel_tiles": 1, "splits": 1},
    ],
)
def test_entries_whose_plans_cannot_run_are_skipped(folder: Path, fields: dict[str, Any]) -> None:
    # a group this small is held to no limit of registers
    small = replace(PROBLEM, pixels=64)
    good = fields_of(heuristic_plan(small, H100))
    bad = replace(tuned_to(small), config=good | fields)
    path = write(folder, bad, ENTRY)
    with pytest.warns(UserWarning, match=f"1 of the 2 entries of its table {path}: their plans"):
        assert plan(small, H100) == heuristic_plan(small, H100)
    assert plan(PROBLEM, H100) == TUNED


def test_table_of_an_older_schema_is_ignored_with_a_warning(folder: Path) -> None:
    path = write(folder, ENTRY)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": table.SCHEMA - 1}))
    with pytest.warns(UserWarning, match=f"{path}: schema must be {table.SCHEMA}; got 4. Remedy"):
        assert plan(PROBLEM, H100) == heuristic_plan(PROBLEM, H100) != TUNED
    plan(replace(PROBLEM, n=1), H100)  # without another warning, which would be an error


def test_groups_side_by_side_are_bounded(folder: Path) -> None:
    """They are summed up by selection, and split has no room for a partial of each of 2048."""
    problem = Problem("forward", 1, 2048, 2048, 64, "float32", channels_last=True)
    fields = {"groups": 2048, "rows": 1, "cols": 2048, "num_warps": 8}
    fields |= {"pixel_tiles": 1, "splits": 2}
    write(folder, replace(ENTRY, problem=problem, config={"strategy": "split"} | fields))
    with pytest.warns(UserWarning, match="cannot run"):
        assert plan(problem, H100) == heuristic_plan(problem, H100)


# Random files: nothing is raised, and no plan comes out that cannot run.

NEAR = [PROBLEM, replace(PROBLEM, n=3), replace(PROBLEM, pixels=2100), replace(PROBLEM, n=1)]
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([0, 1, 2, 8, 64, 2**20, 2**31, "split", "resident", "forward", "float64"])
)  # fmt: skip
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3)
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid table of two entries in which up to three values are others."""
    split = entry_of(replace(PROBLEM, n=1), SPLIT)
    content: Any = json.loads(table.text_of(H100, [ENTRY, split]))
    for _ in range(draw(st.integers(0, 3))):
        part = content
        while True:
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            key = draw(st.sampled_from(keys))
            if not isinstance(part[key], dict | list) or not part[key] or draw(st.booleans()):
                break
            part = part[key]
        part[key] = draw(values)
    return json.dumps(content).encode()


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=st.binary(max_size=200) | values.map(lambda v: json.dumps(v).encode()) | mutated())
def test_random_files_do_no_harm(folder: Path, content: bytes) -> None:
    table.path_of(folder, H100).write_bytes(content)
    table._warned.clear()
    planner.forget_plans()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for problem in NEAR:
            assert fits(problem, plan(problem, H100), H100) is None
