"""One step of sharded GroupNorm on several ranks beside float64; what runs on a rank is here."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import triton_gn
from tests.support.oracle import Case, check
from tests.support.ranks import Ranks
from triton_gn.distributed import sharded_group_norm

ALL = ("scale", "shift", "pre_add", "residual")


@dataclass(frozen=True)
class Step:
    """The whole input and how its ``dim`` is cut, known to all ranks."""

    shape: tuple[int, ...]
    cut: tuple[int, ...]
    dim: int = 2
    groups: int = 2
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None
    fused: tuple[str, ...] = ()
    affine: tuple[bool, bool] = (True, True)
    activation: str = "none"
    channels_last: bool = False
    mean: float = 0.0
    std: float = 1.0
    backend: str = "torch"
    offsets: tuple[float, ...] = ()  # added to each part

    def case(self) -> Case:
        """The whole, the same on each rank."""
        n, channels = self.shape[:2]
        random = torch.Generator().manual_seed(0)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=random, dtype=torch.float64)

        def whole(values: Tensor) -> Tensor:
            values = values.to(self.dtype)
            return (
                values.movedim(1, -1).contiguous().movedim(-1, 1) if self.channels_last else values
            )

        x = draw(*self.shape) * self.std + self.mean
        for part, offset in zip(x.split(self.cut, self.dim), self.offsets, strict=False):
            part += offset
        # weight is not 1; shapes per channel of all kinds
        shapes = {"scale": (n, channels), "shift": (channels,), "pre_add": (n, channels)}
        if self.channels_last:
            shapes = {"scale": (1, channels), "shift": (n, channels), "pre_add": (1, channels)}
        params = {name: draw(*shapes[name]) for name in self.fused if name != "residual"}
        for name, is_present in zip(("weight", "bias"), self.affine, strict=True):
            if is_present:
                params[name] = draw(channels) + 1.5
        dtype = self.param_dtype or self.dtype
        operands: dict[str, Any] = {name: values.to(dtype) for name, values in params.items()}
        if "residual" in self.fused:
            operands["residual"] = whole(draw(*self.shape))
        return Case(
            whole(x), whole(draw(*self.shape)), self.groups, activation=self.activation, **operands
        )

    def part(self, t: Tensor, rank: int) -> Tensor:
        """Copy the rank's shard of a tensor like x, in the same memory format."""
        part: Tensor = t.split(self.cut, self.dim)[rank]
        if self.channels_last:
            return part.movedim(1, -1).contiguous().movedim(-1, 1)
        return part.contiguous()


def run_step(rank: int, group: dist.ProcessGroup, step: Step) -> dict[str, Any]:
    """Return one rank's y and gradients as float64 NumPy arrays with their dtypes."""
    whole = step.case()
    parts = {name: step.part(getattr(whole, name), rank) for name in ("x", "dy")}
    if whole.residual is not None:
        parts["residual"] = step.part(whole.residual, rank)
    # the kernels run on the GPU if there is one
    own = Case(
        **{  # type: ignore[arg-type]  # fields of a Case
            name: value.cuda()
            if isinstance(value, Tensor) and step.backend == "triton" and torch.cuda.is_available()
            else value
            for name, value in (vars(whole) | parts).items()
        }
    )

    def group_norm(*args: Any, **kwargs: Any) -> Tensor:
        y = sharded_group_norm(*args, process_group=group, **kwargs)
        strides = zip(y.shape, y.stride(), own.x.stride(), strict=True)
        assert all(size < 2 or a == b for size, a, b in strides)
        return y

    with triton_gn.backend(step.backend):
        results = own.through(group_norm)
        with torch.no_grad():
            fused = {name: getattr(own, name) for name in step.fused}
            y = group_norm(
                own.x, step.groups, own.weight, own.bias, activation=step.activation, **fused
            )
    assert torch.equal(y, results["y"])
    return {name: (t.double().cpu().numpy(), t.dtype) for name, t in results.items()}


def check_step(ranks: Ranks, step: Step) -> None:
    """Sharded is unsharded: within the rounding of what float64 says of the whole."""
    shards = ranks.run(run_step, len(step.cut), step)
    expected = step.case().expected()
    results = {}
    for name in expected:
        parts = [torch.from_numpy(shard[name][0]).to(shard[name][1]) for shard in shards]
        if name in ("y", "dx", "dresidual"):
            results[name] = torch.cat(parts, step.dim)
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs"
            results[name] = parts[0]
    for name, operand in step.case().operands._asdict().items():
        assert operand is None or results[f"d{name}"].dtype is operand.dtype
    check(results, expected)
