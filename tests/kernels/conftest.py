"""Kernel tests run on the GPU or, under TRITON_INTERPRET=1, in Triton's interpreter."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.support import interpreter
from tests.support.memory import GuardedMemory

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]

if INTERPRETED:
    interpreter.round_to_bfloat16()
    interpreter.patch_language_once()
    interpreter.remember_types()
    interpreter.raise_on_overflow()


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[GuardedMemory]:
    """Allocate tensors as NaN between guard zones, and check the zones after the test."""
    guarded = GuardedMemory()
    monkeypatch.setattr(torch, "empty", guarded.empty)
    monkeypatch.setattr(torch, "empty_strided", guarded.empty_strided)
    yield guarded
    monkeypatch.undo()
    guarded.check()


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"
