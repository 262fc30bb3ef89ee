"""perf coverage: what could be fused is counted without asking the package."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perf import coverage
from perf.__main__ import main
from perf.models import MODELS, Case

ROOT = Path(__file__).parents[2]
C = 8


class Block(nn.Module):
    """Has one of each: an activation, a residual, scale and shift, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(2, C) for _ in range(3)])
        self.mlp = nn.Linear(4, 2 * C)

    def forward(self, x: Tensor, embedding: Tensor) -> Any:
        rows = self.mlp(embedding)[:, :, None, None]
        scale, shift = rows.chunk(2, dim=1)
        y = F.dropout(self.norms[0](x), 0.5, self.training)
        y = F.silu(y * (1 + scale) + shift)
        y = self.norms[1](y + shift)
        y += x
        y = F.relu(y)
        z = self.norms[2](y)
        return z + z.sigmoid()


def case() -> Case:
    return Case(Block(), (torch.randn(2, C, 4, 5), torch.randn(2, 4)), {})


def test_what_can_be_fused_is_counted() -> None:
    made = case()
    made.model.eval()
    expected = {"norms": 3, "activation": 2, "scale": 1, "shift": 1, "pre_add": 1, "residual": 1}
    assert coverage.foldable(coverage.record(made).operations) == Counter(expected)
    made.model.train()
    in_training = coverage.foldable(coverage.record(made).operations)
    assert in_training == Counter({"norms": 3, "activation": 1, "pre_add": 1, "residual": 1})


def test_both_ways_are_measured() -> None:
    row = coverage.measure(case)
    assert row["converted"] == row["compiled"] == row["foldable"]
    assert max(row["converted_difference"], row["compiled_difference"]) < 1e-12


def test_wrong_values_are_told(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(coverage, "MODELS", {"mine": ("torch", case)})
    assert main(["coverage", "--model", "mine"]) == 0
    assert "2 of 2" in capsys.readouterr().out
    monkeypatch.setattr(coverage, "difference", lambda *_: float("nan"))
    assert main(["coverage", "--model", "mine"]) == 1
    assert "differ too much: mine" in capsys.readouterr().out


def test_model_of_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(coverage, "MODELS", {"mine": ("no_such_package", case)})
    assert main(["coverage"]) == 0
    assert "Remedy: pip install no_such_package" in capsys.readouterr().out


def test_docs_have_the_numbers_of_the_record() -> None:
    models = json.loads((ROOT / coverage.RECORD).read_text(encoding="utf-8"))["models"]
    assert models.keys() == MODELS.keys()
    text = (ROOT / "docs" / "fusion.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| ([\w+, ]+) \| (\d+ \| .*) \|$", text, re.MULTILINE))
    for name, row in models.items():
        cells = [str(row["foldable"]["norms"])]
        cells += [coverage.cell(row, kind) for kind in coverage.KINDS]
        assert table[name] == " | ".join(cells), name
        differences = row["converted_difference"], row["compiled_difference"]
        assert max(differences) <= coverage.LIMITS[row["dtype"]], name
