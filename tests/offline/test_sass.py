"""Count instructions in machine code: in listings made by hand, and in the kernels."""

import pytest
import torch

from tests.support.compiling import launches_of
from triton_gn.tools.compile import compile_launch
from triton_gn.tools.sass import Instruction, executed

pytest.importorskip("triton")


def listing(text: str) -> list[Instruction]:
    """One instruction a word, 16 bytes apart: "@" makes it conditional, ">3" a branch to the third
    after the first."""
    found = []
    for number, word in enumerate(text.split()):
        name, _, target = word.removeprefix("@").partition(">")
        operands = f"{int(target) * 16:#x}" if target else "R0"
        found.append(Instruction(number * 16, word.startswith("@"), name, operands))
    return found


def test_straight_code_counts_once() -> None:
    assert executed(listing("LDG.E.128 FADD STG.E.128 EXIT"), 1) == 4


def test_a_loop_counts_as_often_as_it_runs() -> None:
    code = listing("MOV LDG FADD STG @BRA>1 EXIT")
    assert executed(code, 1) == 6
    assert executed(code, 5) == 6 + 4 * 4
    assert executed(code, 0) == 2


def test_the_loop_that_writes_is_the_main_one() -> None:
    code = listing("LDG LDG LDG LDG @BRA>0 LDG FADD STG @BRA>5 EXIT")
    assert executed(code, 3) == 10 + 2 * 4


def test_subroutines_do_not_count() -> None:
    code = listing("LDG CALL>5 FADD STG EXIT FCHK MUFU RET BRA>8")
    assert executed(code, 1) == 5


@pytest.mark.parametrize("work_first", [True, False])
def test_programs_with_other_work_do_not_count(work_first: bool) -> None:
    work, other = "LDG FADD STG STG EXIT", "LDG LDG LDG STG EXIT"
    parts = (work, other) if work_first else (other, work)
    code = listing(f"MOV @BRA>7 {parts[0]} {parts[1]}")
    assert executed(code, 1) == 2 + 5


@pytest.mark.parametrize(
    ("direction", "channels_last", "activation", "most"),
    [
        # by pass, 5 % more than docs/measured.md has
        ("forward", False, "silu", (5.5, 10.6)),
        ("backward", False, "silu", (16.2, 17.0)),
        ("forward", True, "silu", (6.2, 11.0)),
        ("backward", True, "silu", (17.7, 18.6)),
        ("forward", False, "none", (5.5, 5.4)),
        ("backward", False, "none", (6.6, 7.5)),
    ],
)
def test_few_instructions_for_each_element(
    direction: str, channels_last: bool, activation: str, most: tuple[float, float]
) -> None:
    """An H100 has 44 for each element that it copies (docs/measured.md)."""
    launches = launches_of(
        direction, (1, 256, 512, 512), 32, torch.bfloat16, channels_last, torch.bfloat16,
        (True, True), "sm_90", activation=activation,
    )  # fmt: skip
    found = [compile_launch(launch, "sm_90").instructions for launch in launches]
    assert len(found) == 2
    for count, limit in zip(found, most, strict=True):
        assert count is not None
        assert limit / 2 < count <= limit, found
