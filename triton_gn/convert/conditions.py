"""The state of a module in which a traced graph of its forward is right.

torch.fx bakes into a graph what Python decides while it traces: which branch an attribute selects,
which layers a list holds. Here every attribute that the forward reads becomes a condition, or, if
it could change unseen, a reason not to trace.
"""

import enum
import functools
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triton_gn.activations import function_of
from triton_gn.fuse.operations import HOOKS

Condition = Callable[[nn.Module, Sequence[Tensor]], bool]

_SCALARS = (bool, int, float, complex, str, bytes, type(None), enum.Enum)
_TORCH_VALUES = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type, functools.partial)


class UntraceableError(Exception):
    """A forward cannot be traced; the text continues "its forward ..."."""


class Conditions:
    """Python expressions over a module, ``self``, and the tensors of a call, ``tensors``.

    Args:
        root: the module.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.named_modules(remove_duplicate=False))
        self._paths: dict[nn.Module, str] = {module: name for name, module in modules}
        self._shared = {module for name, module in modules if self._paths[module] != name}
        self._expressions: dict[str, None] = {}  # a set that keeps its order
        self._constants: dict[str, Any] = {"torch": torch}  # that the expressions name
        self._names: dict[str, str] = {}  # variables of the modules inside, by their source

    def add(self, expression: str) -> None:
        """Require an expression to be true."""
        self._expressions[expression] = None

    def path_of(self, module: nn.Module) -> str:
        """Return the path of a module inside, which must have only one.

        Raises:
            UntraceableError: the module is elsewhere, or in several places.
        """
        path = self._paths.get(module)
        if path is None:
            raise UntraceableError(f"uses a {type(module).__name__} that it does not hold")
        if module in self._shared:
            raise UntraceableError(f"uses {path}, which it holds in several places")
        return path

    def _name(self, module: nn.Module) -> str:
        """Return the variable that stands for a module in the conditions."""
        path = self.path_of(module)
        name = "self"
        for part in filter(None, path.split(".")):
            source = f"{name}._modules[{part!r}]"
            name = self._names.setdefault(source, f"module_{len(self._names)}")
        return name

    def read(self, module: nn.Module, name: str, value: Any) -> None:
        """Make a condition of an attribute that the forward has read."""
        if isinstance(getattr(type(module), name, None), property):
            return  # what its function reads is a condition by itself
        path = f"{self._name(module)}.{name}"
        if name == "_modules":
            self.add(f"[*{path}] == {[*value]!r}")
        elif type(value) is float and math.isnan(value):
            raise UntraceableError(f"reads {name}, which is nan")
        elif _is_constant(value):
            self._require_equal(path, value)
        elif callable(value) and name not in vars(module):
            pass  # a method: what it reads is a condition by itself
        else:
            raise UntraceableError(f"reads {name}, a {type(value).__name__}, which may change")

    def read_registered(self, module: nn.Module, name: str) -> None:
        """Make a condition of a parameter, buffer or module, or of their absence."""
        owner = self._name(module)
        for registry in ("_parameters", "_buffers", "_modules"):
            registered = vars(module)[registry]
            if name in registered:
                kind = "is" if registered[name] is None else "is not"
                self.add(f"{owner}.{registry}[{name!r}] {kind} None")
                return
        self.add(f"not hasattr({owner}, {name!r})")

    def _require_equal(self, path: str, value: Any) -> None:
        if value is None or type(value) is bool:
            self.add(f"{path} is {value}")
            return
        constant = f"constant_{len(self._constants)}"
        self._constants[constant] = value
        self.add(f"{path} == {constant}")

    def require_plain(self, module: nn.Module) -> None:
        """Require that a module which is traced too has the class and the forward of now."""
        name, kind = self._name(module), f"class_{len(self._constants)}"
        self._constants[kind] = type(module)
        self.add(f"type({name}) is {kind}")
        hooks = (f"{name}.{hooks}" for hooks in HOOKS)
        self.add(f"not ('forward' in {name}.__dict__ or {' or '.join(hooks)})")

    def require_layer(self, layer: nn.Module) -> None:
        """Require that a layer which is fused keeps its class, its settings, and no hooks."""
        self.require_plain(layer)
        function = function_of(layer)
        settings = {
            name: getattr(layer, name) for name in ("activation", "p") if hasattr(layer, name)
        }
        for name, value in (settings | (function[1] if function else {})).items():
            self._require_equal(f"{self._name(layer)}.{name}", value)

    def function(self) -> Condition:
        """Return the function that tells whether the graph is right for a module and tensors."""
        # a look-up in _modules costs a tenth of one through nn.Module.__getattr__
        lines = [f"{name} = {source}" for source, name in self._names.items()]
        conditions = " and ".join(self._expressions) or "True"
        body = "\n        ".join([*lines, f"return {conditions}"])
        source = (
            f"def holds(self, tensors):\n    try:\n        {body}\n"
            "    except (AttributeError, KeyError):\n        return False\n"
        )
        names = dict(self._constants)
        exec(compile(source, "<triton_gn.convert: holds>", "exec"), names)
        holds: Condition = names["holds"]
        return holds


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return isinstance(value, (*_SCALARS, *_TORCH_VALUES, *_FUNCTIONS))
