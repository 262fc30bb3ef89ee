"""Report of what was fused, and why the rest was not."""

from dataclasses import dataclass, field


@dataclass
class Report:
    """Result of :func:`convert` or :func:`triton_gn.fuse.graph` for each norm, as (name, reason).

    The names of convert are those of ``model.named_modules()``, "" for the model itself; the names
    of fuse.graph are those of the graph's nodes.

    Attributes:
        replaced: all replaced layers; the reason says what was folded, or why nothing was.
        folded: the replaced layers with folded operations; the reason names the operations.
        left: layers left unchanged; the reason says why.
    """

    replaced: list[tuple[str, str]] = field(default_factory=list)
    folded: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        """Return a line of totals, then a line for each layer."""
        folded = {name for name, _ in self.folded}
        rows = [
            ("folded" if name in folded else fate, name or "(the model)", reason)
            for fate, layers in (("replaced", self.replaced), ("left", self.left))
            for name, reason in layers
        ]
        replaced, left = len(self.replaced), len(self.left)
        totals = f"{replaced} replaced, of which {len(folded)} folded, {left} left"
        layers = "layer" if len(rows) == 1 else "layers"
        width = max((len(name) for _, name, _ in rows), default=0)
        lines = [f"{fate:<8}  {name:<{width}}  {reason}" for fate, name, reason in rows]
        return "\n".join([f"{len(rows)} GroupNorm {layers}: {totals}", *lines])
