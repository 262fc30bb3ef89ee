"""Let a job's first step wait for nothing: compile its kernels, measure its plans."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton_gn.tools.warmup import Warmup


def warmup(
    model: Any, *inputs: Any, target: str | None = None, processes: int | None = None, **kwargs: Any
) -> "Warmup":
    """Compile every kernel that a step of a model needs into Triton's cache.

    The step, ``model(*inputs, **kwargs)`` and, if gradients are enabled, its backward, is not run:
    the model sees tensors without memory. The kernels are those of its calls of
    :func:`triton_gn.group_norm` and of the layers, in the caller's settings and autocast. Shapes,
    dtypes and memory formats are those of the inputs. Kernels for tensors that are not aligned to
    16 bytes, for statistics apart from their application, and for sharded inputs are not compiled.

    Args:
        model: a module or a function.
        inputs: its arguments, on any device. Tensors on a GPU let the model see one.
        target: such as "sm_90", for a GPU that need not be present; None for this machine's.
        processes: how many compile at once; None for one for each core.
        kwargs: keyword arguments of the model.

    Returns:
        The numbers of calls and kernels, and the seconds: ``print(warmup(model, x))``.

    Raises:
        ValueError: no kernel of triton_gn runs in the model, there is no GPU, or the target is
            unknown.
    """
    tool: Any = _tool("warmup")
    outcome: Warmup = tool.warmup(model, inputs, kwargs, target=target, processes=processes)
    return outcome


def tune(
    model: Any, *inputs: Any, candidates: int = 24, time_limit: float | None = None, **kwargs: Any
) -> int:
    """Measure plans for every kernel that a step of a model runs, and keep the faster ones.

    As ``python -m triton_gn tune``: problems that the table of this GPU has already are not
    measured again, and every result is kept at once. All later calls follow the table.

    Args:
        model: a module or a function on a GPU.
        inputs: its arguments. If its outputs require gradients, the backward runs too.
        candidates: the most plans to measure for a problem, at least 2.
        time_limit: seconds after which no further problem is begun; None for no limit.
        kwargs: keyword arguments of the model.

    Returns:
        The number of problems that are in the table now, of those that the model has.

    Raises:
        ValueError: there is no GPU, or no kernel of triton_gn runs in the model.
    """
    tool: Any = _tool("tune")
    known: int = tool.tune_model(model, inputs, kwargs, candidates, time_limit)
    return known


def _tool(name: str) -> ModuleType:
    """Return a module of triton_gn.tools, which print tables and bars with rich."""
    try:
        importlib.import_module("rich")
        return importlib.import_module(f"triton_gn.tools.{name}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"triton_gn.{name}: {error}. Remedy: pip install 'triton-gn[cli]'"
        ) from error
