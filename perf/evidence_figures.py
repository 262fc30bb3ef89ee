"""Figures of the evidence records."""

from pathlib import Path
from typing import Any


def draw(command: str, record: dict[str, Any]) -> list[Path]:
    return []
