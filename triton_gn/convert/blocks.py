"""Give modules a forward that fuses their norms with the operations around them.

The forward is traced, once for each structure of arguments and each state of the module that it
depends on; :mod:`triton_gn.convert.regions` fuses the graph. In any state that has no graph the
module's own forward runs.
"""

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from triton_gn.convert.conditions import Condition, UntraceableError
from triton_gn.convert.regions import Candidates, compile_graph, fuse_region
from triton_gn.convert.trace import Key, Tracer, structure
from triton_gn.distributed import ShardedGroupNorm
from triton_gn.fuse.norms import emit, find
from triton_gn.fuse.operations import activation_of, is_hooked, module_of
from triton_gn.module import GroupNorm
from triton_gn.ops import context
from triton_gn.ops.dispatch import warn_once

_MOST_TRACES = 8  # of one module; a forward that needs more runs as it is
FORWARDS = "_fused_forwards"  # attribute of a module: its Forwards


@dataclass(frozen=True)
class Trace:
    """A fused forward, and when it is right.

    Attributes:
        key: the structure of the arguments.
        holds: whether the graph is right for a module, in its present state, and tensors.
        function: the forward, of the module twice and the tensors; None to run the module's own.
        fates: for the path of each norm, "folded" or "replaced", and the reason.
        is_open: whether the forward returns the result of a norm, possibly scaled or shifted, which
            a caller may give to more operations that one call can compute.
        is_fused: whether the function differs from the module's own forward.
    """

    key: Key
    holds: Condition
    function: Callable[..., Any] | None
    fates: dict[str, tuple[str, str]]
    is_open: bool = False
    is_fused: bool = True

    def __deepcopy__(self, memo: object) -> "Trace":
        """Return itself: it holds no module and no tensor."""
        return self


class Forwards:
    """The fused forwards of one module.

    Attributes:
        inlined: paths of the modules inside it that are traced too.
        traces: filled as calls of other structures, or in other states, come.
    """

    def __init__(self, inlined: tuple[str, ...], traces: list[Trace]) -> None:
        self.inlined = inlined
        self.traces = traces

    def __getstate__(self) -> dict[str, Any]:
        """Return what can be pickled: a copy traces again."""
        return {"inlined": self.inlined, "traces": []}

    def __deepcopy__(self, memo: object) -> "Forwards":
        """Return forwards of a copied module: functions take the module as an argument."""
        return Forwards(self.inlined, [*self.traces])


def trace(module: nn.Module, key: Key, ranks: Sequence[int], inlined: Sequence[str]) -> Trace:
    """Trace the forward of a module and fuse its norms.

    Raises:
        UntraceableError: the forward cannot be traced.
    """
    children = dict(module.named_modules())  # one that was inlined may have gone since
    tracer = Tracer(module, key, ranks, {children[path] for path in inlined if path in children})
    code = tracer.run(module)
    owned: Any = code
    owned.owning_module = module  # where the nodes of the graph find their layers
    fates: dict[str, tuple[str, str]] = {}
    is_open = is_fused = False
    for node in list(code.nodes):
        norm = find(node)
        if norm is None:
            continue
        path = _path_of(node)
        is_call = node.op == "call_module"
        if is_call and "_converted" not in vars(module.get_submodule(path)):
            continue  # PyTorch's, or one that the model has had from the start
        if isinstance(norm, str) or type(norm.num_groups) is not int:
            reason = norm if isinstance(norm, str) else "its number of groups is computed"
            fates[path] = "replaced", reason
            continue
        if norm.module is None and not norm.is_ours:
            norm, is_fused = _replace(norm), True
        found = Candidates(norm)
        is_open = is_open or found.is_returned
        region = fuse_region(found, module) if len(found.nodes) > 1 else None
        if region is not None:
            fates[path], is_fused = ("folded", region.fused), True
            for layer in filter(None, map(module_of, found.nodes)):
                tracer.conditions.require_layer(layer)
        else:
            fates[path] = "replaced", found.stop
    return Trace(
        key,
        tracer.conditions.function(),
        compile_graph(code, type(module).__name__),
        fates,
        is_open,
        is_fused,
    )


def _path_of(node: fx.Node) -> str:
    """Return the path of the layer that a norm belongs to, "" for the traced module itself."""
    if node.op == "call_module":
        return str(node.target)
    parameters = [source for source in node.all_input_nodes if source.op == "get_attr"]
    return str(parameters[0].target).rpartition(".")[0] if parameters else ""


def _replace(norm: Any) -> Any:
    """Replace a call of PyTorch's function by one of triton_gn's; return its norm."""
    node = norm.node
    with node.graph.inserting_before(node):
        ours = emit(norm)
    node.replace_all_uses_with(ours)
    node.graph.erase_node(node)
    return find(ours)


def select(module: nn.Module, key: Key, tensors: Sequence[Tensor]) -> Trace | None:
    """Return the fused forward for a call, None if the module's own must run."""
    if _has_any_global_hook() or context.is_tracing():
        return None
    forwards = vars(module).get(FORWARDS)
    if forwards is None:  # a new instance of the class, such as a slice of a Sequential
        return None
    for known in forwards.traces:
        if known.key == key and known.holds(module, tensors):
            return known  # type: ignore[no-any-return]
    watched = torch._C._len_torch_function_stack() > 0 or context.has_mode()
    if context.is_compiling() or watched:
        return None
    if len(forwards.traces) >= _MOST_TRACES:
        warn_once(
            f"triton_gn.convert fuses a module in at most {_MOST_TRACES} states and kinds of "
            f"arguments; a {type(module).__name__} has come in more, which run unfused. Pass what "
            "changes from call to call as a tensor."
        )
        return None
    try:
        new = trace(module, key, [tensor.ndim for tensor in tensors], forwards.inlined)
    except UntraceableError:
        new = Trace(key, lambda module, tensors: True, None, {})
    forwards.traces.append(new)
    return new


@functools.cache
def fused_class(kind: Any) -> Any:
    """Return a subclass, of the same name, whose forward is the fused one."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        known = structure(args, kwargs)
        chosen = None if known is None else select(self, *known)
        if known is None or chosen is None or chosen.function is None:
            return kind.forward(self, *args, **kwargs)
        return chosen.function(self, self, *known[1])

    def reduce(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = kind.__reduce_ex__(self, protocol)
        _, args, *state = reduced
        return _restored, (kind, *args[1:]), *state

    names = {"unfused": kind, "forward": forward, "__reduce_ex__": reduce}
    names |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    names |= {"__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), names)


def _restored(kind: type[nn.Module], *args: Any) -> Any:
    """Return an empty instance of a fused class, for pickle and copy."""
    fused: Any = fused_class(kind)  # type: ignore[arg-type]
    return fused.__new__(fused, *args)


def why_not(module: nn.Module) -> str | None:
    """Return why a module's forward must not be replaced, None if it may be."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by TorchScript"
    if "forward" in vars(module):
        return "has its forward replaced"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has backward hooks, which may go by its class"
    if parametrize.is_parametrized(module):
        return "is parametrized"
    if (kind.__reduce_ex__, kind.__reduce__) != (object.__reduce_ex__, object.__reduce__):
        return "is pickled in a way of its own"
    return None


def _key_of(module: nn.Module) -> Key:
    """Return the structure of a call with tensors for all arguments that have no default."""
    key: list[tuple[Any, ...]] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.default is not parameter.empty:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            key.append((parameter.name, Tensor))
        elif parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            key.append((None, Tensor))
    return tuple(key)


@dataclass
class Outcome:
    """The fate of each norm of a model, and why each other module could not be traced."""

    fates: dict[nn.Module, tuple[str, str]]
    untraced: dict[nn.Module, str]


def fuse_blocks(model: nn.Module, sharded: bool) -> Outcome:
    """Give the modules of a model that hold norms a fused forward, from the innermost outwards.

    A module that returns the result of a norm is traced as part of its parent too, as is one that
    is an activation. Subclasses of torch.nn.GroupNorm stay as they are if the norms are
    ``sharded``.
    """
    parents = _parents(model)
    outcome = Outcome({}, {})
    candidates: set[nn.Module] = set()
    inlined = set(filter(_is_activation, model.modules()))
    for module in reversed([*model.modules()]):
        if isinstance(module, nn.GroupNorm):
            candidates.update(_owners(module, parents))
            if sharded or type(module) in (nn.GroupNorm, GroupNorm, ShardedGroupNorm):
                continue
        elif module not in candidates:
            continue
        if FORWARDS in vars(module):  # by an earlier conversion
            continue
        inside = tuple(name for name, child in module.named_modules() if child in inlined and name)
        reason = why_not(module)
        try:
            if reason is not None:
                raise UntraceableError(reason)
            traced, inside = _first_trace(module, inside)
        except UntraceableError as error:
            outcome.untraced[module] = f"its parent, a {type(module).__name__}, {error}"
            continue
        if traced.is_open:
            inlined.add(module)
            candidates.update(_owners(module, parents))
        for path, fate in traced.fates.items():
            norm = module.get_submodule(path)
            if outcome.fates.get(norm, ("",))[0] != "folded":
                outcome.fates[norm] = fate
        if traced.is_fused:
            vars(module)[FORWARDS] = Forwards(inside, [traced])
            module.__class__ = fused_class(type(module))  # type: ignore[arg-type]
    return outcome


def _first_trace(module: nn.Module, inlined: tuple[str, ...]) -> tuple[Trace, tuple[str, ...]]:
    """Trace a module before any call, and return what could be traced inside it too.

    Tensors count as images, of rank 4. A call with others traces anew if that matters.
    """
    key = _key_of(module)
    ranks = [4] * len(key)
    try:
        return trace(module, key, ranks, inlined), inlined
    except UntraceableError:
        if not inlined:
            raise
        return trace(module, key, ranks, ()), ()


def _parents(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    parents: dict[nn.Module, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for child in filter(None, module._modules.values()):
            parents[child].append(module)
    return parents


def _owners(module: nn.Module, parents: dict[nn.Module, list[nn.Module]]) -> Iterator[nn.Module]:
    """Yield the modules that may call a module: its parents, and those of a list that holds it."""
    for parent in parents[module]:
        is_list = isinstance(parent, (nn.ModuleList, nn.ModuleDict))
        yield from _owners(parent, parents) if is_list else (parent,)


def _is_activation(module: nn.Module) -> bool:
    """Return whether a module that is not PyTorch's does nothing but apply an activation."""
    if type(module).__module__.startswith("torch.") or is_hooked(module):
        return False
    if module._modules or module._parameters or module._buffers:
        return False
    try:
        code = Tracer(module, ((None, Tensor),), [4], set()).run(module)
    except UntraceableError:
        return False
    *placeholders, last, output = code.nodes
    is_whole = output.args == (last,) and len(placeholders) == 2
    return is_whole and activation_of(last, placeholders[-1]) is not None
