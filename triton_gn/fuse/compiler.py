"""The pass inside torch.compile: as a backend, and as a pass of Inductor."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from triton_gn.fuse.rewrite import graph, rewrite, rewrite_all
from triton_gn.ops import settings
from triton_gn.report import Report

Compiler = Callable[..., Any]
_PASS = "pre_grad_custom_pass"


class GraphPass(CustomGraphPass):
    """The fusion as a pass of Inductor.

    ``torch._inductor.config.pre_grad_custom_pass = triton_gn.fuse.GraphPass()``

    Args:
        always: as for :func:`triton_gn.fuse.graph`.
    """

    def __init__(self, *, always: bool = False) -> None:
        self.always = always

    def __call__(self, graph: fx.Graph) -> None:
        """Fuse the operations around each group norm of the graph, in place."""
        if graph.owning_module is None:
            rewrite(graph, Report(), self.always)
        else:
            rewrite_all(graph.owning_module, self.always)

    def uuid(self) -> Any:
        """Return a key for Inductor's caches: the source, and all that decisions depend on."""
        files = tuple(str(path) for path in sorted(Path(__file__).parents[1].rglob("*.py")))
        return get_hash_for_files(files, settings.to_text(settings.current()) + str(self.always))


def backend(
    inner: str | Compiler = "inductor", *, always: bool = False, **options: Any
) -> Compiler:
    """Return a backend for torch.compile that fuses, then calls another.

    Args:
        inner: name of a backend, or a function of the fused graph and its example inputs.
        always: as for :func:`triton_gn.fuse.graph`.
        options: options of the inner backend. "inductor" takes its settings, such as
            ``max_autotune=True``; any other gets them as keyword arguments.
    """

    def compile_fused(
        graph_module: fx.GraphModule, example_inputs: Sequence[Any], **arguments: Any
    ) -> Any:
        return _compile(inner, graph_module, example_inputs, always, options, **arguments)

    return compile_fused


def compile_fused(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], **arguments: Any
) -> Any:
    """Fuse a graph and compile it with Inductor: ``torch.compile(model, backend="triton_gn")``.

    ``mode`` and ``options`` of torch.compile are those of Inductor.
    """
    return _compile("inductor", graph_module, example_inputs, False, {}, **arguments)


def _compile(
    inner: str | Compiler,
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    always: bool,
    inner_options: dict[str, Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Fuse a graph and call the inner backend; ``mode`` and ``options`` are torch.compile's."""
    if inner == "inductor":
        return _compile_with_inductor(
            graph_module, example_inputs, always, mode, inner_options | (options or {})
        )
    arguments = dict(inner_options)
    if mode is not None:
        arguments["mode"] = mode
    if options is not None:
        arguments["options"] = options
    graph(graph_module, always=always)
    if isinstance(inner, str):
        from torch._dynamo.backends.registry import lookup_backend

        inner = lookup_backend(inner)
    return inner(graph_module, list(example_inputs), **arguments)


def _compile_with_inductor(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    always: bool,
    mode: str | None,
    options: dict[str, Any],
) -> Any:
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(mode) if mode else {}) | options
    if patches.get(_PASS, getattr(config, _PASS)) is None:
        # as a pass of Inductor, whose caches then know the graph before it
        patches[_PASS] = GraphPass(always=always)
    else:
        graph(graph_module, always=always)
    return compile_fx(graph_module, list(example_inputs), config_patches=patches)
