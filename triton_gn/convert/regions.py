"""Fuse the norms of a traced forward with the operations around them.

A traced graph knows no shapes: a sum may add a residual, a shift, or a tensor to be broadcast. So a
norm and the operations around it become one function, a :class:`Region`, which looks at the shapes
when it is called. For each case in which a single call of the kernels computes the same, the region
has a variant, found by the graph pass of :mod:`triton_gn.fuse`. In every other case it runs what
the pass can fuse without knowing shapes.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from triton_gn.functional import group_norm
from triton_gn.fuse.chain import NOTHING_FOLLOWS, Chain
from triton_gn.fuse.memory import may_write
from triton_gn.fuse.norms import Norm
from triton_gn.fuse.operations import called_name, is_barrier, operation, sum_with_one
from triton_gn.fuse.rewrite import rewrite
from triton_gn.report import Report

Function = Callable[..., Any]
_FULL, _ROWS = "full", "rows"  # of x's shape; one value per sample and channel


@dataclass(frozen=True)
class Variant:
    """The fused form of a region for tensors of certain kinds.

    ``x`` is the place of the norm's input among the arguments of the region. ``kinds`` holds the
    places of the other tensors that matter, and "full" or "rows" for each.
    """

    x: int
    kinds: tuple[tuple[int, str], ...]
    function: Function
    fused: str

    def holds(self, tensors: Sequence[Any]) -> bool:
        """Return whether the tensors are of these kinds."""
        x = tensors[self.x]
        for index, kind in self.kinds:
            tensor = tensors[index]
            if not isinstance(tensor, Tensor) or tensor.dtype is not x.dtype:
                return False
            shape = x.shape if kind == _FULL else x.shape[:2] + (1,) * (x.ndim - 2)
            if tensor.shape != shape or tensor.device != x.device:
                return False
        return True


class Region:
    """A function in place of a norm and the operations around it; it selects a variant."""

    allocates = True  # its result shares memory with none of its arguments

    def __init__(self, name: str, variants: Sequence[Variant], otherwise: Function) -> None:
        self.__name__ = name
        self.variants = variants
        self.otherwise = otherwise
        fused = " or ".join(dict.fromkeys(variant.fused for variant in variants))
        depends = any(variant.kinds for variant in variants)
        self.fused = f"{fused}, where the shapes fit" if depends else fused

    def __call__(self, *arguments: Any) -> Any:
        """Return the last operation's result. The arguments are the module and tensors."""
        for variant in self.variants:
            if variant.holds(arguments):
                return variant.function(*arguments)
        return self.otherwise(*arguments)


def call_layer(layer: Any, x: Tensor, **fused: Any) -> Tensor:
    """Call a triton_gn.GroupNorm with an activation that is not its own."""
    y: Tensor = layer._group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps, **fused)
    return y


class Candidates(Chain):
    """The operations around a norm that one call may compute, whatever the shapes.

    Attributes:
        nodes: the nodes of the region in order, the norm's own among them.
        is_returned: whether the forward returns what the region computes.
    """

    def __init__(self, norm: Norm) -> None:
        code = norm.node.graph
        order = {node: index for index, node in enumerate(code.nodes)}
        super().__init__(norm, order, [node for node in code.nodes if is_barrier(node)])
        self._sums_of_one: list[fx.Node] = []
        self.follow()
        self.nodes = sorted([norm.node, *self._sums_of_one, *self.taken], key=order.__getitem__)
        self.is_returned = self.stop == NOTHING_FOLLOWS

    def _unknown(self, node: fx.Node) -> str:
        return f"is followed by {called_name(node)}, which cannot be fused"

    def _arithmetic(self, node: fx.Node, current: fx.Node) -> str | None:
        """Take any sum or product of tensors; the shapes of each call decide."""
        call = operation(node)
        others = [argument for argument in node.args if argument is not current]
        if node.kwargs or not all(isinstance(other, fx.Node) for other in others):
            return "has a number among its operands"
        if call is not None and call.in_place and node.args[0] is not current:
            return "writes into its other operand"
        if self._is_written_later(others, node):
            return "has an operand that is written in place later"
        for other in node.all_input_nodes:
            found = sum_with_one(other) if list(other.users) == [node] else None
            if found is not None and found[1] is other:
                self._sums_of_one.append(other)  # the kernels take s of 1 + s
                self._read(found[0], other)
        return self._barrier_before(node)

    def _take_sum_before(self) -> None:
        """Take the sum that the norm reads, if nothing else reads it."""
        total = self.norm.operands["input"]
        call = operation(total)
        is_sum = call is not None and call.name == "add" and not call.in_place
        terms = total.all_input_nodes
        is_alone = list(total.users) == [self.norm.node] and len(terms) == len(total.args) == 2
        if is_sum and is_alone and not total.kwargs and not self._is_written_later(terms, total):
            for term in terms:
                self._read(term, total)
            if self._barrier_before(self.norm.node) is None:
                self.taken.append(total)

    def _is_written_later(self, operands: Sequence[Any], node: fx.Node) -> bool:
        """Return whether a known operation writes to operands of a node after it.

        A backward that needs them would fail: PyTorch's sum needs none.
        """
        return any(
            may_write(barrier, operands)
            for barrier in self._barriers
            if self._order[barrier] > self._order[node]
            and (barrier.op != "call_module" or operation(barrier) is not None)
        )


def _is_sum_with_one(node: fx.Node) -> bool:
    found = sum_with_one(node)
    return found is not None and found[1] is node


def fuse_region(found: Candidates, root: nn.Module) -> Region | None:
    """Replace the nodes of a region by a call of a function; return None if nothing can be fused.

    The first placeholder of the graph is the module itself, which the functions take first.
    """
    code = found.norm.node.graph
    block = next(iter(code.nodes))
    inside = set(found.nodes)
    sources = [source for node in found.nodes for source in node.all_input_nodes]
    tensors = [*dict.fromkeys(source for source in sources if source not in inside)]
    variants = [
        variant
        for kinds in _cases(found, tensors)
        if (variant := _variant(found, tensors, kinds, root)) is not None
    ]
    if not variants:
        return None
    rest, _ = _copy(found, tensors, root)
    rewrite(rest, Report(), always=True)  # without shapes: a directly following activation
    _call_the_layer(found.norm, rest)
    otherwise = compile_graph(rest, found.norm.node.name)
    region = Region(f"fused_{found.norm.node.name}", variants, otherwise)
    with code.inserting_before(found.last):
        y = code.call_function(region, (block, *tensors))
    found.last.replace_all_uses_with(y)
    for node in reversed(found.nodes):
        code.erase_node(node)
    return region


def _cases(found: Candidates, tensors: Sequence[fx.Node]) -> Iterator[dict[fx.Node, str]]:
    """Yield the kinds that the tensors of a region may have, "x" for the norm's input.

    Weight and bias, if they are among the tensors, have none.
    """
    read = found.norm.operands["input"]
    total = None if read in tensors else read
    for x in [read] if total is None else total.args:
        choices: dict[Any, tuple[str, ...]] = {x: ("x",)}
        for node in found.nodes:
            call = operation(node)
            if call is None or call.name not in ("add", "mul", "addcmul"):
                continue
            for index, term in enumerate(node.args):
                if term in tensors and term is not x:
                    is_term = call.name == "add" or (call.name == "addcmul" and index == 0)
                    is_full = is_term and not _is_sum_with_one(node) and node is not total
                    choices.setdefault(term, (_FULL, _ROWS) if is_full else (_ROWS,))
        for kinds in itertools.product(*choices.values()):
            yield dict(zip(choices, kinds, strict=True))


def _copy(
    found: Candidates, tensors: Sequence[fx.Node], root: nn.Module
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Return the region as a graph of its own, and the copy of each node."""
    owner: Any = root  # where nodes find their layers
    code = fx.Graph(owner)
    copies = {node: code.placeholder(node.name) for node in tensors}
    for node in found.nodes:
        copies[node] = code.node_copy(node, copies.__getitem__)
    code.output(copies[found.last])
    return code, copies


def _variant(
    found: Candidates, tensors: Sequence[fx.Node], kinds: dict[fx.Node, str], root: nn.Module
) -> Variant | None:
    """Return the region as the graph pass fuses it for tensors of these kinds, if it does."""
    code, copies = _copy(found, tensors, root)
    channels = 2 * found.norm.num_groups
    full = torch.empty(2, channels, 3, 5, device="meta")
    rows = torch.empty(2, channels, 1, 1, device="meta")
    for node, copy in copies.items():
        if node in kinds:
            copy.meta["val"] = rows if kinds[node] == _ROWS else full
        elif node not in tensors:
            copy.meta["val"] = rows if _is_sum_with_one(node) else full
    report = Report()
    rewrite(code, report, always=True)
    if not report.folded:
        return None
    _call_the_layer(found.norm, code)
    positions = {node: index + 1 for index, node in enumerate(tensors)}  # after the module
    (x,) = [positions[node] for node, kind in kinds.items() if kind == "x"]
    others = tuple((positions[node], kind) for node, kind in kinds.items() if kind != "x")
    ((_, reason),) = report.folded
    return Variant(x, others, compile_graph(code, found.norm.node.name), reason.partition(";")[0])


def _call_the_layer(norm: Norm, code: fx.Graph) -> None:
    """Give the fused call to the norm's layer, which may be a sharded one."""
    if norm.module is None:
        return
    calls = [node for node in code.nodes if node.target is group_norm]
    if not calls:
        return  # the layer is called as it was
    (call,) = calls
    with code.inserting_before(call):
        layer = code.get_attr(norm.module)
    call.target, call.args = call_layer, (layer, call.args[0])
    code.eliminate_dead_code()


def compile_graph(code: fx.Graph, name: str) -> Function:
    """Return a graph as a Python function of ``self``, the module, and the placeholders."""
    python = code.python_code("self")
    names = dict(python.globals)
    exec(compile(python.src, f"<triton_gn.convert: {name}>", "exec"), names)
    function: Function = names["forward"]
    return function
