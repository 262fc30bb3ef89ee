"""Trace the forward of one module into a graph, and the conditions under which it is right."""

import contextlib
import operator
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from triton_gn.convert.conditions import Conditions, UntraceableError

# What PyTorch keeps in every module, and torch.fx reads; reading it decides nothing in a forward.
_INTERNALS = frozenset(
    vars(nn.Module()).keys() - {"training", "_modules", "_parameters", "_buffers"} | {"forward"}
)
# Questions whose answer torch.fx would bake in; torch.is_grad_enabled becomes a condition instead.
_QUESTIONS = (
    *("is_autocast_enabled", "is_autocast_cpu_enabled", "get_autocast_dtype"),
    *("get_autocast_gpu_dtype", "is_inference_mode_enabled", "get_default_dtype"),
)

_TRACING = threading.Lock()  # torch.fx replaces methods of nn.Module while it traces
Key = tuple[Any, ...]


def structure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Key, list[Tensor]] | None:
    """Return the structure of a call's arguments, and the tensors among them.

    The structure tells which arguments are tensors, and the value of every other argument. None if
    one is neither a plain tensor nor a scalar, dtype or device.
    """
    key: list[Any] = []
    tensors = []
    for name, value in (*((None, arg) for arg in args), *kwargs.items()):
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            key.append((name, Tensor))
            tensors.append(value)
        elif value is None or kind in (bool, int, float, str, torch.dtype, torch.device):
            key.append((name, kind, value))
        else:
            return None
    return tuple(key), tensors


class _TensorProxy(fx.Proxy):
    """Proxy that behaves more like the tensor, or the size of one, that it stands for.

    isinstance takes it for a tensor. It tells the rank of an argument, and records operations in
    place as such: torch.fx would make ``y += x`` a new tensor, though others may refer to y.
    """

    tracer: "Tracer"

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Return the class for isinstance, which torch.fx does not know of a size."""
        if _is_size(self.node):
            raise UntraceableError("asks for the class of a size")
        return Tensor

    def __getattr__(self, name: str) -> Any:
        """Return the rank or a proxy of the shape, for code that asks for the length of either."""
        rank = self.tracer.rank_of(self.node) if name in ("ndim", "dim") else None
        if rank is not None:
            return rank if name == "ndim" else lambda: rank
        if name == "shape":
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what torch.fx needs; refuse attributes of tensors, such as requires_grad."""
        if name not in ("tracer", "node"):
            raise UntraceableError(f"sets an attribute of a tensor, {name}")
        object.__setattr__(self, name, value)

    def __len__(self) -> int:
        """Return the length of a shape, or of a slice of one."""
        node: Any = self.node
        part = slice(None)
        if node.target is operator.getitem and isinstance(node.args[1], slice):
            node, part = node.args[0], node.args[1]
        rank = None
        if node.target is getattr and node.args[1] == "shape":
            rank = self.tracer.rank_of(node.args[0])
        if rank is None:
            raise UntraceableError("decides by the values or shapes of tensors")
        return len(range(rank)[part])

    def __str__(self) -> str:
        """Refuse: a text may decide what happens next."""
        raise UntraceableError("reads a tensor or its attributes as text")

    def __format__(self, spec: str) -> str:
        """Refuse: a text may decide what happens next."""
        return str(self)


class _Attribute(fx.proxy.Attribute):
    """Attribute of a tensor, or a method until it is called."""

    __str__, __format__ = _TensorProxy.__str__, _TensorProxy.__format__


def _record_in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def operate(self: _TensorProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return operate


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
):
    setattr(_TensorProxy, f"__i{_name}__", _record_in_place(getattr(operator, f"i{_name}")))


def _is_size(node: fx.Node) -> bool:
    """Return whether a node's value is a shape, a size, or computed from sizes."""
    if node.target in ("size", "dim", "numel") or (node.target is getattr and "shape" in node.args):
        return True
    is_arithmetic = getattr(node.target, "__module__", "") == "_operator"
    return is_arithmetic and any(map(_is_size, node.all_input_nodes))


class Tracer(fx.Tracer):
    """Tracer of one module's forward for arguments of one structure.

    Args:
        root: the module.
        key: the structure of its arguments.
        ranks: the number of dimensions of each tensor among them.
        inlined: the modules inside it that are traced too. All others stay calls.

    Attributes:
        conditions: what must hold for the graph to be right.
    """

    def __init__(
        self, root: nn.Module, key: Key, ranks: Sequence[int], inlined: set[nn.Module]
    ) -> None:
        super().__init__()
        self.conditions = Conditions(root)
        self._key = key
        self._ranks = ranks
        self._inputs: list[fx.Node] = []
        self._inlined = inlined
        self._reading = False  # whether the forward itself runs now
        self._thread = threading.get_ident()
        tensors = (*root.named_parameters(), *root.named_buffers())
        self._tensors = {id(tensor): name for name, tensor in tensors}

    def run(self, root: nn.Module) -> fx.Graph:
        """Return the graph. Its placeholders are the module, then the tensors among the arguments.

        Raises:
            UntraceableError: the forward decides by values, reads what may change unseen, or more.
        """
        self._modes = _modes()
        try:
            with _TRACING, self._watching(), warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                code = self.trace(root)
        except UntraceableError:
            raise
        except fx.proxy.TraceError:
            raise UntraceableError("decides by the values or shapes of tensors") from None
        except Exception as error:  # whatever a forward does with a proxy that is no tensor
            raise UntraceableError(f"raises {type(error).__name__} under torch.fx") from None
        if told:
            raise UntraceableError("warns, which a graph would not")
        return code

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Return the function to trace, and its arguments: the placeholders."""
        forward = unfused_class(self.root).forward
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        self.create_proxy("placeholder", "block", (), {})
        for index, (name, kind, *value) in enumerate(self._key):
            argument = value[0] if value else None
            if kind is Tensor:
                argument = self.create_proxy("placeholder", f"input_{index}", (), {})
                self._inputs.append(argument.node)
            if name is None:
                args.append(argument)
            else:
                kwargs[name] = argument

        def function() -> Any:
            self._reading = True
            try:
                return forward(self.root, *args, **kwargs)
            finally:
                self._reading = False

        return function, []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy that isinstance takes for a tensor."""
        return _TensorProxy(node, self)

    def rank_of(self, node: Any) -> int | None:
        """Return the rank of an argument, which becomes a condition; None for other tensors."""
        if node not in self._inputs:
            return None
        index = self._inputs.index(node)
        self.conditions.add(f"tensors[{index}].ndim == {self._ranks[index]}")
        return self._ranks[index]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a call of the module stays a call."""
        return m not in self._inlined

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record the call of a module, or trace into it."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)  # torch.fx replaces nn.Module.__call__ for all
        self.conditions.path_of(m)
        if m in self._inlined:
            self.conditions.require_plain(m)
            return unfused_class(m).forward(m, *args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a proxy of a parameter or buffer, and anything else as it is."""
        if not isinstance(attr_val, Tensor) or threading.get_ident() != self._thread:
            return attr_val
        path = self._tensors.get(id(attr_val))
        if path is None:
            raise UntraceableError(f"reads {attr}, a tensor that is no parameter or buffer")
        return self.create_proxy("get_attr", path, (), {})

    def create_arg(self, a: Any) -> Any:
        """Return the node of a proxy; refuse tensors that were computed while tracing."""
        if type(a) is _TensorProxy:
            return a.node
        if isinstance(a, Tensor):
            raise UntraceableError("computes with a tensor that depends on no argument")
        if isinstance(a, float):
            return float(a)  # the text of a NumPy number would need NumPy
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record a node, unless the forward has switched gradients or autocast."""
        if _modes() != self._modes:
            raise UntraceableError("switches gradients or autocast")
        return super().create_node(*args, **kwargs)

    def _is_ours(self) -> bool:
        """Return whether the traced forward runs now, and not another thread's code."""
        return self._reading and threading.get_ident() == self._thread

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Record what the forward reads, and refuse what it writes."""
        lookup: Any = nn.Module.__getattribute__
        assign = nn.Module.__setattr__

        def read(module: nn.Module, name: str) -> Any:
            if name.startswith("__") or name in _INTERNALS or not self._is_ours():
                return lookup(module, name)
            try:
                value = lookup(module, name)
            except AttributeError:  # nn.Module.__getattr__ looks for it next
                self._reading = False
                try:
                    self.conditions.read_registered(module, name)
                finally:
                    self._reading = True
                raise
            self._reading = False
            try:
                self.conditions.read(module, name, value)
            finally:
                self._reading = True
            return value

        def write(module: nn.Module, name: str, value: Any) -> None:
            if self._is_ours():
                raise UntraceableError(f"sets an attribute, {name}")
            assign(module, name, value)

        def asks(question: str) -> Callable[..., Any]:
            original = getattr(torch, question)

            def ask(*args: Any, **kwargs: Any) -> Any:
                if self._is_ours():
                    raise UntraceableError(f"asks torch.{question}")
                return original(*args, **kwargs)

            return ask

        is_grad_enabled = torch.is_grad_enabled

        def ask_for_gradients() -> bool:
            answer = is_grad_enabled()
            if self._is_ours():
                self.conditions.add(f"torch.is_grad_enabled() is {answer}")
            return answer

        with contextlib.ExitStack() as stack:
            for question in _QUESTIONS:
                stack.enter_context(mock.patch.object(torch, question, asks(question)))
            stack.enter_context(mock.patch.object(torch, "is_grad_enabled", ask_for_gradients))
            stack.enter_context(mock.patch.object(nn.Module, "__setattr__", write))
            nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
            stack.callback(delattr, nn.Module, "__getattribute__")
            yield


def _modes(
    # bound here, before the tracer replaces them in torch
    gradients: Callable[[], bool] = torch.is_grad_enabled,
    inference: Callable[[], bool] = torch.is_inference_mode_enabled,
    autocast: Callable[[str], bool] = torch.is_autocast_enabled,
) -> tuple[bool, ...]:
    return gradients(), inference(), autocast("cpu"), autocast("cuda")


def unfused_class(module: nn.Module) -> Any:
    """Return a module's class, or the one that it had before ``convert``."""
    return getattr(type(module), "unfused", type(module))
