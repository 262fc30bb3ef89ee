"""Follow the operations after a norm, and the sum before it, as far as one call can compute them.

The call computes ``activation(n * (1 + scale) + shift + residual)`` with
``n = norm(input + pre_add) * weight + bias``: in this order, each once.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, fx

from triton_gn.fuse.memory import may_write
from triton_gn.fuse.norms import Norm
from triton_gn.fuse.operations import (
    FLOATS,
    activation_of,
    described,
    equal,
    is_identity,
    is_written,
    operation,
    same_shape,
    sum_with_one,
    value,
)

NOTHING_FOLLOWS = "nothing follows it"
_UNKNOWN_SHAPES = "shapes and dtypes are not known; pass example_inputs"
Kind = Literal["channel", "sample"]


class Chain:
    """The nodes that one call replaces, and why the next node is not among them.

    Attributes:
        norm: the norm, whose operands grow with each node that is taken.
        taken: the nodes that the call replaces, besides the norm's own.
        last: the node whose value the call returns.
        kinds: the operands with one value per channel, or per sample and channel.
        factors: per-channel factors, to be multiplied into weight and bias.
        stop: the reason why the node after ``last`` is not fused.
    """

    def __init__(self, norm: Norm, order: dict[fx.Node, int], barriers: list[fx.Node]) -> None:
        self.norm = norm
        self.taken: list[fx.Node] = []
        self.last = norm.output
        self.kinds: dict[str, Kind] = {}
        self.factors: list[fx.Node] = []
        self.stop = ""
        self._order = order
        self._barriers = [node for node in barriers if node in order]  # others are fused already
        # what will be read at the place of the call, and where it is read now
        self._reads: dict[fx.Node, int] = {}
        for operand in norm.operands.values():
            self._read(operand, norm.node)
        self._y = value(norm.output)

    def follow(self) -> None:
        """Take every node that can be taken."""
        self._take_sum_before()
        current = self.norm.output
        identities: list[fx.Node] = []
        while self.norm.activation is None:
            nodes = silu_formula(current) or list(current.users)
            if len(nodes) == 1 and is_identity(nodes[0], current):
                problem = self._barrier_before(nodes[0], identities)
                if problem is None:
                    current = nodes[0]
                    identities.append(current)
                    continue
            else:
                problem = self._take(nodes, current, identities)
            if problem is not None:
                self.stop = problem
                return
            self.taken += [*identities, *nodes]
            identities = []
            self.last = current = nodes[-1]
        self.stop = "an activation comes last"

    def _take(
        self, nodes: list[fx.Node], current: fx.Node, identities: list[fx.Node]
    ) -> str | None:
        """Fuse the nodes after ``current``, or return why that is not possible."""
        is_formula = len(nodes) == 2 and nodes == silu_formula(current)
        if len(nodes) != 1 and not is_formula:
            return "its result is used in several places" if nodes else "its result is not used"
        node = nodes[-1]
        if node.op == "output":
            return NOTHING_FOLLOWS
        activation = "silu" if is_formula else activation_of(node, current)
        call = operation(node)
        if activation is None and (call is None or call.name not in ("add", "mul", "addcmul")):
            return self._unknown(node)
        problem = self._barrier_before(node, identities) or self._dtype_change(node)
        if problem is not None:
            return problem
        if activation is not None:
            self.norm.activation = activation
            self.norm.fused.append(activation)
            return None
        before = dict(self.norm.operands), dict(self.kinds), list(self.factors)
        names, reads = list(self.norm.fused), dict(self._reads)
        problem = self._arithmetic(node, current)
        if problem is not None:  # of two operations in one node, the first may have been fused
            self.norm.operands, self.kinds, self.factors = before
            self.norm.fused, self._reads = names, reads
            return f"{node.name} {problem}"
        for operand in node.all_input_nodes:
            if operand is not current:
                self._read(operand, node)
        return None

    def _unknown(self, node: fx.Node) -> str:
        """Return the reason to stop at an operation that no call computes."""
        return f"{described(node)} is not an operation that can be fused"

    def _arithmetic(self, node: fx.Node, current: fx.Node) -> str | None:
        """Fuse a sum, a product or both, or return why not, as what follows the node's name."""
        call, result = operation(node), value(node)
        assert call is not None
        if self._y is None or result is None:
            return f"cannot be judged: {_UNKNOWN_SHAPES}"
        if not same_shape(result, self._y):
            return "broadcasts the result of the norm"
        if call.in_place and call.args[0] is not current:
            return "writes into its other operand"
        if any(number != 1 for number in call.kwargs.values()):
            return "has further arguments"
        if call.name == "addcmul":
            if len(call.args) != 3:
                return "has further arguments"
            addend, *factors = call.args
            others = [factor for factor in factors if factor is not current]
            if len(others) != 1:
                return "does not multiply the result of the norm"
            if addend is current:  # y + y * s
                return self._scale(others[0], with_one=True)
            return self._scale(others[0]) or self._add(addend)
        others = [term for term in call.args if term is not current]
        if len(others) != 1:
            return "uses the result of the norm twice"
        return self._scale(others[0]) if call.name == "mul" else self._add(others[0])

    def _add(self, term: Any) -> str | None:
        """Fuse a term as residual or shift."""
        tensor = self._operand(term)
        if isinstance(tensor, str):
            return tensor
        assert self._y is not None
        kind = kind_of(tensor, self._y)
        if kind is not None and not self.norm.has("shift"):
            self._set("shift", term, kind)
            return None
        if same_shape(tensor, self._y):
            if self.norm.has("residual"):
                return "adds a second residual"
            self._set("residual", term, None)
            return None
        if kind is not None:
            return "adds a second shift"
        return f"adds a tensor that may need broadcasting: {_shape(tensor)} to {_shape(self._y)}"

    def _scale(self, factor: Any, with_one: bool = False) -> str | None:
        """Fuse a factor 1 + s as scale, or a factor per channel into weight and bias.

        With ``with_one`` the factor is 1 + ``factor``.
        """
        tensor = self._operand(factor)
        if isinstance(tensor, str):
            return tensor
        assert self._y is not None
        kind = kind_of(tensor, self._y)
        if kind is None:
            return (
                f"multiplies by {_shape(tensor)}, which is not one value per channel, "
                "or per sample and channel"
            )
        if self.norm.has("shift") or self.norm.has("residual"):
            return "multiplies after a sum"
        sum_of_one = (factor, None) if with_one else sum_with_one(factor)
        if sum_of_one is not None and not self.norm.has("scale"):
            scale, node = sum_of_one
            if _holds(value(scale), kind, self._y):
                if node is not None:
                    self._read(scale, node)
                    problem = self._barrier_before(self.last)
                    if problem is not None:
                        return f"reads its scale too early: {problem}"
                self._set("scale", scale, kind)
                return None
        if kind == "channel" and not with_one:
            self.factors.append(factor)
            self.norm.fused.append("factor")
            return None
        if self.norm.has("scale"):
            return "multiplies by a second scale"
        return "multiplies by a factor per sample that is not 1 + s: s = factor - 1 loses digits"

    def _operand(self, node: Any) -> Tensor | str:
        """Return the fake tensor of an operand, or why the operand cannot be fused."""
        if not isinstance(node, fx.Node):
            return "has a number as its other operand"
        tensor = value(node)
        if tensor is None:
            return f"has an operand of unknown shape, {node.name}"
        assert self._y is not None
        if tensor.dtype not in FLOATS:
            return f"has an operand of {tensor.dtype}"
        if tensor.device != self._y.device:
            return f"has an operand on {tensor.device}"
        if is_written(node):
            return f"has an operand that is written in place, {node.name}"
        return tensor

    def _set(self, name: str, node: fx.Node, kind: Kind | None) -> None:
        self.norm.operands[name] = node
        self.norm.fused.append(name)
        if kind is not None:
            self.kinds[name] = kind

    def _take_sum_before(self) -> None:
        """Fuse the sum with one value per channel, if it is what the norm reads."""
        total = self.norm.operands["input"]
        if not isinstance(total, fx.Node) or self.norm.has("pre_add"):
            return
        call, x = operation(total), value(total)
        if call is None or call.name != "add" or call.in_place or x is None or self._y is None:
            return
        if list(total.users) != [self.norm.node] or len(call.args) != 2 or call.kwargs:
            return
        for term, other in (call.args, call.args[::-1]):
            tensor, values = value(term), value(other)
            if tensor is None or values is None or term is other:
                continue
            is_input = same_shape(tensor, x) and tensor.dtype is x.dtype
            kind = kind_of(values, x)
            is_shift = isinstance(self._operand(other), Tensor) and kind is not None
            if is_input and is_shift and not is_written(term):
                before = dict(self._reads)
                self._read(term, total)
                self._read(other, total)
                if self._barrier_before(self.norm.node) is not None:
                    self._reads = before
                    return
                self.norm.operands["input"] = term
                self._set("pre_add", other, kind)
                self.taken.append(total)
                return

    def _dtype_change(self, node: fx.Node) -> str | None:
        before, after = self._y, value(node)
        if before is None or after is None or before.dtype is after.dtype:
            return None
        return f"{node.name} changes the dtype from {before.dtype} to {after.dtype}"

    def _read(self, operand: Any, reader: fx.Node) -> None:
        """Remember that a node reads an operand, which the call will read later."""
        if isinstance(operand, fx.Node):
            position = self._order[reader]
            self._reads[operand] = min(position, self._reads.get(operand, position))

    def _barrier_before(self, node: fx.Node, identities: Sequence[fx.Node] = ()) -> str | None:
        """Return a reason if reads would move past a node that may change what they read."""
        ours = {*self.taken, *identities, self.norm.node, node}
        for barrier in self._barriers:
            position = self._order[barrier]
            if barrier in ours or position >= self._order[node]:
                continue
            reads = [read for read, first in self._reads.items() if first < position]
            if reads and may_write(barrier, reads):
                return f"{described(barrier)}, in between, may write to memory or change a mode"
        return None


def kind_of(values: Tensor, x: Tensor) -> Kind | None:
    """Return whether values broadcast to x as one per channel, or one per sample and channel."""
    sizes = values.shape
    if len(sizes) == x.ndim - 1 and len(sizes) > 0:
        per_channel = equal(sizes[0], x.shape[1]) and all(equal(size, 1) for size in sizes[1:])
        return "channel" if per_channel else None
    if len(sizes) != x.ndim or not equal(sizes[1], x.shape[1]):
        return None
    if not all(equal(size, 1) for size in sizes[2:]):
        return None
    if equal(sizes[0], 1):
        return "channel"
    return "sample" if equal(sizes[0], x.shape[0]) else None


def _holds(values: Tensor | None, kind: Kind, x: Tensor) -> bool:
    """Return whether values (C,), (N, C) or with sizes of 1 are the operand that a view broadcasts.

    A view of them is known to broadcast as ``kind``.
    """
    if values is None or values.dtype not in FLOATS or values.ndim == 0:
        return False
    if kind == "channel":
        return equal(values.numel(), x.shape[1])
    sizes = values.shape
    rows = len(sizes) >= 2 and equal(sizes[0], x.shape[0]) and equal(sizes[1], x.shape[1])
    return rows and all(equal(size, 1) for size in sizes[2:])


def silu_formula(node: fx.Node) -> list[fx.Node]:
    """Return the nodes of y * sigmoid(y) if they are all that uses y, else an empty list."""
    if len(node.users) != 2:
        return []
    for sigmoid, product in (list(node.users), list(node.users)[::-1]):
        call = operation(product)
        is_product = call is not None and call.name == "mul" and not call.in_place
        alone = activation_of(sigmoid, node) == "sigmoid" and list(sigmoid.users) == [product]
        first = operation(sigmoid)
        if is_product and alone and first is not None and not first.in_place:
            assert call is not None
            if set(call.args) == {node, sigmoid} and not call.kwargs:
                return [sigmoid, product]
    return []


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
