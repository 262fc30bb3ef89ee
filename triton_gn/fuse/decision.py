"""Decide where the kernels help: a norm that they would slow down stays with the compiler."""

from torch import Tensor, fx

from triton_gn.fuse.norms import Norm, find
from triton_gn.fuse.operations import same_shape, value
from triton_gn.ops import dispatch, layout, settings
from triton_gn.ops.device import gpu_of
from triton_gn.plan import Problem, best_per_strategy
from triton_gn.plan.cost_model import speed_of_light

_CACHED_SHARE = 0.5  # fraction of L2 that still holds x when Inductor reads it again
_NO_POINTWISE = ("conv", "linear", "pool", "matmul", "bmm", "interpolate", "attention")


def why_no_kernels(norm: Norm) -> str | None:
    """Return why a norm cannot run through the kernels, None if it can."""
    x = value(norm.operands["input"])
    if x is None:
        return "its device is not known; pass example_inputs, or always=True"
    if settings.current().backend == "torch":
        return 'the backend is "torch"'
    return dispatch.why_not_kernels(x)


def why_slower(norm: Norm) -> str | None:
    """Return why the kernels are predicted to be slower for a norm with nothing fused.

    Inductor reads x twice, the second time from L2 if it fits, and writes y once, after it has
    applied the pointwise operation that follows. After the kernels that operation takes a read and
    a write of its own.
    """
    x = value(norm.operands["input"])
    sizes = () if x is None else (*x.shape, *x.stride(), norm.num_groups)
    if x is None or not all(type(size) is int for size in sizes):
        return "its sizes are not known, so that its time cannot be predicted"
    if x.numel() == 0 or layout.is_channels_last(x) is None:
        return "its input is empty or would be copied"
    ours, pointwise = predicted_us(x, norm)
    device = gpu_of(x.device)
    tensor = x.numel() * x.element_size()
    reads = 1 if tensor <= _CACHED_SHARE * device.l2_bytes else 2
    theirs, _ = speed_of_light((reads + 1) * tensor, device)
    extra = ""
    if pointwise is not None:
        ours += speed_of_light(2 * tensor, device)[0]
        extra = f" with {pointwise} after it"
    if ours <= theirs:
        return None
    return f"predicted {ours:.1f} us{extra}, Inductor's own {theirs:.1f} us"


def predicted_us(x: Tensor, norm: Norm) -> tuple[float, str | None]:
    """Return the predicted microseconds of the forward, and the pointwise operation after it."""
    n, channels = x.shape[:2]
    problem = Problem(
        "forward",
        n,
        channels,
        norm.num_groups,
        x.numel() // (n * channels),
        str(x.dtype).removeprefix("torch."),
        bool(layout.is_channels_last(x)),
    )
    us = min(best_per_strategy(problem, gpu_of(x.device)).values())
    return us, next((user.name for user in norm.output.users if _is_pointwise(user)), None)


def _is_pointwise(node: fx.Node) -> bool:
    """Return whether a node may be an operation that Inductor applies while it writes y.

    Unknown operations of the same shape count: in doubt the norm stays with Inductor.
    """
    if node.op not in ("call_function", "call_method", "call_module") or find(node) is not None:
        return False
    name = getattr(node.target, "__name__", str(node.target))
    if any(part in name for part in _NO_POINTWISE):
        return False
    before, after = value(node.args[0] if node.args else None), value(node)
    return before is not None and after is not None and same_shape(before, after)
