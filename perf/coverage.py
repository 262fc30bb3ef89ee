"""Count what is fused in public models: by convert without a compiler, and under torch.compile.

What could be fused is counted in the calls of the unfused model: each operation after a norm that
alone uses its result, in the order of triton_gn's formula, and the sum before it. Values and
gradients are compared, in float64 where the model can run in it.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import triton_gn
import triton_gn.fuse
from perf import common
from perf.models import MODELS, Case
from perf.records import RESULTS, replace
from triton_gn.activations import TABLE

KINDS = ("activation", "residual", "scale", "shift", "pre_add")
RECORD = RESULTS / "coverage.json"
# of the differences over the largest value: some tens of layers add up
LIMITS = {"float64": 1e-10, "float32": 1e-4}
_NORMS = (F.group_norm, torch.group_norm)
_ACTIVATIONS = {row.function for row in TABLE.values() if row.function is not None}
_SUMS, _PRODUCTS = ("add", "iadd"), ("mul", "imul")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--model", default="", metavar="TEXT", help="only names that contain it")
    parser.add_argument("--out", type=Path, default=RECORD, metavar="FILE")


@dataclass
class Operation:
    """A recorded call: its name, shapes, the operations that it takes results of, its users."""

    name: str
    shapes: list[tuple[int, ...]]
    sources: list[int | None]
    result: tuple[int, ...]
    is_norm: bool
    is_identity: bool
    users: list[int] = field(default_factory=list)


class Recorder(TorchFunctionMode):
    """Record the calls of PyTorch's functions with tensors, and those of triton_gn.group_norm."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.fused: list[dict[str, Any]] = []
        self._sources: dict[int, int] = {}
        self._alive: list[Any] = []  # an id must not be used again

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [*_tensors((args, kwargs))]
        sources = [self._sources.get(id(tensor)) for tensor in inputs]
        shapes = [tuple(tensor.shape) for tensor in inputs]
        result = func(*args, **kwargs)
        if func is triton_gn.group_norm:
            self.fused.append(kwargs)
        outputs = [*_tensors(result)]
        if not outputs or not inputs:
            return result
        name = getattr(func, "__name__", "").strip("_").removesuffix("_")
        index = len(self.operations)
        same = outputs[0] is inputs[0] and name in ("contiguous", "to", "float", "type")
        self.operations.append(
            Operation(
                name, shapes, sources, tuple(outputs[0].shape), func in _NORMS,
                same or (name.startswith("dropout") and _drops_nothing(args, kwargs)),
            )
        )  # fmt: skip
        for source in {source for source in sources if source is not None}:
            self.operations[source].users.append(index)
        self._alive.append((args, kwargs, result))
        self._sources |= {id(tensor): index for tensor in outputs}
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _drops_nothing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    values = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    return values.get("training") is False or values.get("p") == 0


def foldable(operations: list[Operation]) -> Counter[str]:
    """Count what one call per norm could compute."""
    counts: Counter[str] = Counter()
    claimed: set[int] = set()  # of two norms whose sum is taken, one takes it
    for index, norm in enumerate(operations):
        if norm.is_norm:
            counts["norms"] += 1
            counts.update(_after(operations, index, claimed))
            before = None if norm.sources[0] is None else operations[norm.sources[0]]
            is_alone = before is not None and before.name in _SUMS and len(before.users) == 1
            if is_alone and before and {*map(_kind(norm.result), before.shapes)} == {"rows", "x"}:
                counts["pre_add"] += 1
    return counts


def _after(operations: list[Operation], index: int, claimed: set[int]) -> set[str]:
    """Return what follows a norm, in the order of the formula, each kind once."""
    kind = _kind(operations[index].result)
    found: set[str] = set()
    while True:
        users = sorted(set(operations[index].users))
        if len(users) == 2 and [operations[user].name for user in users] == ["sigmoid", "mul"]:
            return found | {"activation"}
        if len(users) != 1 or users[0] in claimed:
            return found
        operation = operations[users[0]]
        others = [
            kind(shape)
            for source, shape in zip(operation.sources, operation.shapes, strict=True)
            if source != index
        ]
        if operation.name in _ACTIVATIONS:
            return found | {"activation"}
        name = {"x": "residual", "rows": "shift"}.get(others[0]) if len(others) == 1 else None
        if operation.name in _PRODUCTS and others == ["rows"] and not found:
            name = "scale"
        elif not operation.is_identity and operation.name not in _SUMS:
            return found
        if not operation.is_identity:
            if name is None or name in found or kind(operation.result) != "x":
                return found
            found.add(name)
            claimed.add(users[0])
        index = users[0]


def _kind(x: tuple[int, ...]) -> Callable[[tuple[int, ...]], str]:
    """Return a function that tells x's shape from one value per sample and channel."""

    def kind(shape: tuple[int, ...]) -> str:
        if shape == x:
            return "x"
        rows = len(shape) == len(x) and shape[1:2] == x[1:2] and set(shape[2:]) <= {1}
        return "rows" if rows and shape[0] in (1, x[0]) else "other"

    return kind


def fused(calls: list[dict[str, Any]]) -> Counter[str]:
    """Count what calls of triton_gn.group_norm compute besides the norm, from their keywords."""
    counts = Counter({"norms": len(calls)})
    for call in calls:
        counts.update(name for name in KINDS if call.get(name) not in (None, "none"))
    return counts


def record(case: Case) -> Recorder:
    """Run a model and return the recorded calls."""
    recorder = Recorder()
    with torch.no_grad(), recorder:
        case.model(*case.args, **case.kwargs)
    return recorder


def compiled(case: Case, inner: Callable[..., Any]) -> tuple[Counter[str], nn.Module]:
    """Return what the backend fuses, and the compiled model."""
    calls: list[dict[str, Any]] = []

    def count(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        calls.extend(n.kwargs for n in graph.graph.nodes if n.target is triton_gn.group_norm)
        return inner(graph, inputs)

    torch._dynamo.reset()
    model: Any = torch.compile(case.model, backend=triton_gn.fuse.backend(count, always=True))
    with torch.no_grad():
        model(*case.args, **case.kwargs)
    return fused(calls), model


def step(case: Case, model: nn.Module) -> list[Tensor]:
    """Return the results, then the gradients of the parameters."""
    torch.manual_seed(1)
    results = model(*case.args, **case.kwargs)
    found = [y for y in _tensors(results) if _is_float(y)]
    loss = sum((y.square().sum() for y in found), torch.zeros(()))
    leaves = [p for p in case.model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [*found, *(grad for grad in grads if grad is not None)]


def difference(received: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference over the largest value of all."""
    scale = max(float(y.detach().abs().max()) for y in expected) or 1.0
    pairs = zip(received, expected, strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs) / scale


def measure(make: Callable[[], Case]) -> dict[str, Any]:
    """Return the counts of a model, unfused, converted and compiled, and the differences."""
    torch.manual_seed(0)
    case = make()
    case.model.eval().to(case.dtype)
    args = (arg.to(case.dtype) if _is_float(arg) else arg for arg in case.args)
    case = case._replace(args=tuple(args))
    row: dict[str, Any] = {"dtype": str(case.dtype).removeprefix("torch.")}
    row["foldable"] = foldable(record(case).operations)
    expected = step(case, case.model)
    row["compiled"], model = compiled(case, torch._dynamo.lookup_backend("aot_eager"))
    row["compiled_difference"] = difference(step(case, model), expected)
    torch._dynamo.reset()
    triton_gn.convert(case.model)
    row["converted_difference"] = difference(step(case, case.model), expected)
    with torch.no_grad():
        case.model(*case.args, **case.kwargs)  # traces what needs it, which a mode would prevent
    row["converted"] = fused(record(case).fused)
    return row


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def cell(row: dict[str, Any], kind: str) -> str:
    """Return what is fused of a kind, and of how many; both ways if they differ."""
    foldable = row["foldable"].get(kind, 0)
    fused = dict.fromkeys(str(row[way].get(kind, 0)) for way in ("converted", "compiled"))
    return f"{', '.join(fused)} of {foldable}" if foldable else ""


def run(options: argparse.Namespace) -> int:
    """Print the table and write the record; return the exit status, 1 if values differ."""
    chosen = {name: MODELS[name] for name in MODELS if options.model.lower() in name.lower()}
    rows: dict[str, Any] = {}
    for name, (package, make) in chosen.items():
        if importlib.util.find_spec(package) is None:
            print(f"{name}: not installed. Remedy: pip install {package}")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other packages, as the messages that they log
            logging.disable(logging.WARNING)
            start = time.monotonic()
            rows[name] = measure(make)
            logging.disable(logging.NOTSET)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    table = common.table(
        ["model"],
        ["norms", *KINDS, "differ"],
        title="what is fused: by convert, if not the same also compiled, of what can be",
        padding=(0, 1, 0, 0),
    )
    ways = ("converted", "compiled", "foldable")
    total = {way: sum((Counter(row[way]) for row in rows.values()), Counter()) for way in ways}
    for name, row in (*rows.items(), ("all", total)):
        both = [row.get(f"{way}_difference", 0.0) for way in ways[:2]]
        norms = str(row["foldable"]["norms"])
        table.add_row(name, norms, *(cell(row, kind) for kind in KINDS), f"{max(both):.0e}")
    Console().print(table)
    if rows and not options.model:
        versions = {p: importlib.metadata.version(p) for p in {MODELS[n][0] for n in rows}}
        text = json.dumps(
            {"versions": versions | {"torch": torch.__version__}, "models": rows}, indent=1
        )
        replace(options.out, text + "\n")
        print(options.out)
    wrong = [
        name
        for name, row in rows.items()
        if not max(row[f"{way}_difference"] for way in ways[:2]) <= LIMITS[row["dtype"]]
    ]
    if wrong:
        print(f"Values or gradients differ too much: {', '.join(wrong)}")
    return bool(wrong)
