"""One tile: the layouts of its tensors, and what it asks of the others."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

from triton_gn.tiling.baton import Baton
from triton_gn.tiling.hooks import running_hook
from triton_gn.tiling.layout import Axis, Dim, Layout, NotExactError, is_cut, own_size, whole

NO_DROPOUT = "Call model.eval(), and drop nothing in evaluation: training=False, dropout_p=0."
Needs = Mapping[int, Sequence[tuple[int, int]]]  # by dimension, of each tile along it: from, to


def refuse(func: Any, reason: str, remedy: str = "", cause: Exception | None = None) -> NoReturn:
    """Raise NotExactError."""
    name = func if isinstance(func, str) else resolve_name(func) or func.__name__
    remedy = remedy or "Tile a part of the model that does without it, or run the model untiled."
    raise NotExactError(f"exact_tiles: {name} {reason}. {remedy}") from cause


def refuse_hook() -> None:
    """Raise NotExactError where a hook runs that does what a model's forward may not."""
    if (hook := running_hook()) is not None:
        refuse(
            f"the hook {hook}",
            "moves or changes parameters, or brings in tensors, and tiles share these",
            "Remove it, with the parameters back in place, or move a larger part as one, as "
            "enable_model_cpu_offload of a pipeline of diffusers does.",
        )


def leaves(value: Any, kind: type) -> Iterator[Any]:
    """All instances of ``kind`` in nested tuples, lists, dicts and slices."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from leaves(part, kind)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()), kind)
    elif isinstance(value, slice):
        yield from leaves((value.start, value.stop, value.step), kind)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def assembled(parts: Mapping[tuple[int, ...], Tensor], dims: Sequence[int]) -> Tensor:
    """One tensor of parts that lie on a grid over some dimensions."""
    if not dims:
        (part,) = parts.values()
        return part
    rows: dict[int, dict[tuple[int, ...], Tensor]] = {}
    for (first, *rest), part in parts.items():
        rows.setdefault(first, {})[tuple(rest)] = part
    tensors = [assembled(rows[first], dims[1:]) for first in sorted(rows)]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dims[0])


class Tile:
    """Knows of each tensor that it has made which dimensions are cut.

    ``known`` are the other tensors that a model may use, the same for all tiles. One that is none
    of these came into being unseen, and may hold pixels.
    """

    def __init__(
        self,
        baton: Baton,
        grid: Sequence[tuple[int, ...]],
        index: int,
        known: WeakTensorKeyDictionary,
        offload: bool,
    ) -> None:
        self.coords = grid[index]
        self._baton = baton
        self._index = index
        self._indices = {coords: i for i, coords in enumerate(grid)}
        self._known = known
        self._offload = offload
        self._records = torch.is_grad_enabled()
        self._layouts = WeakTensorKeyDictionary()  # None: not cut

    def check(self, func: Any, tensors: Sequence[Tensor]) -> None:
        """Unwind if another tile failed; refuse tensors that came from elsewhere."""
        self._baton.check()
        for tensor in tensors:
            if tensor not in self._layouts and tensor not in self._known:
                refuse_hook()
                refuse(
                    func,
                    f"got a tensor of shape {tuple(tensor.shape)} that is no parameter, buffer or "
                    "argument of the model, nor made by PyTorch's functions in this tile: it may "
                    "hold pixels",
                    "Register a constant with register_buffer, keep no state, compile no part.",
                )

    def check_changes(self, func: Any, targets: Any) -> None:
        """Refuse changes of what tiles share."""
        for target in leaves(targets, Tensor):
            shared = not self.is_cut(target) and any(
                torch._C._is_alias_of(target, tensor)  # type: ignore[attr-defined]
                for tensor in self._known
            )
            if shared:
                refuse_hook()
                refuse(func, "changes what belongs to no tile: each tile would change it again")

    def layout(self, tensor: Tensor) -> Layout:
        """Of any tensor that a tile may use."""
        found: Layout | None = self._layouts.get(tensor)
        return tuple(map(whole, tensor.shape)) if found is None else found

    def output_layout(self, tensor: Tensor) -> Layout:
        """Of a tensor that the model returns."""
        self.check("an output of the model", (tensor,))
        return self.layout(tensor)

    def cut(self, tensor: Tensor, layout: Sequence[Dim]) -> Tensor:
        """Return this tile's part of a tensor of the whole, dense as that is."""
        for dim, factors in enumerate(layout):
            for axis in factors:
                if isinstance(axis, Axis):
                    place = self.coords[axis.number]
                    tensor = tensor.narrow(dim, axis.edges[place], axis.sizes[place])
        return self.mark(tensor.clone(), tuple(layout))  # type: ignore[no-any-return]

    def is_cut(self, tensor: Any) -> bool:
        """Whether it is a tensor of which tiles have parts."""
        return isinstance(tensor, Tensor) and any(map(is_cut, self.layout(tensor)))

    def mark(self, result: Any, layout: Layout | None = None) -> Any:
        """Remember the layout of all tensors in a result, and return it; None: they are not cut."""
        for tensor in leaves(result, Tensor):
            self._layouts[tensor] = layout
            if layout is None:
                continue
            expected = self.own_sizes(layout)
            axes = [f.number for dim in layout for f in dim if isinstance(f, Axis)]
            if tuple(tensor.shape) != expected or len(set(axes)) != len(axes):
                raise ValueError(f"a tile has {tuple(tensor.shape)} where {expected} is expected")
        return result

    def is_all_cut(self, dim: Dim) -> bool:
        """Return whether a dimension holds all pixels, so that each tile has its own part."""
        return sum(isinstance(factor, Axis) for factor in dim) == len(self.coords)

    def own_sizes(self, layout: Layout) -> tuple[int, ...]:
        """Of a tensor of this tile."""
        return tuple(own_size(dim, self.coords) for dim in layout)

    def broadcast(self, func: Any, layouts: Sequence[Layout]) -> Layout:
        """The layout of what operands broadcast to; refuses pixels beside what is not cut alike."""
        dims: list[Dim] = []
        for candidates in itertools.zip_longest(*map(reversed, layouts), fillvalue=()):
            alike = set(candidates) - {()}
            if len(alike) > 1:
                refuse(
                    func,
                    f"got operands that are not cut alike: {_described(alike)}",
                    "What has a value for each pixel must come from the input that is tiled.",
                )
            dims.append(alike.pop() if alike else ())
        return tuple(reversed(dims))

    def require_whole(self, func: Any, tensor: Tensor, dims: Sequence[int]) -> None:
        """Refuse if one of the dimensions is cut."""
        layout = self.layout(tensor)
        for dim in dims:
            if is_cut(layout[dim]):
                refuse(
                    func,
                    f"works along dimension {dim} of a tensor of shape {tuple(tensor.shape)}, of "
                    "which other tiles have the rest",
                )

    def require_uncut(self, func: Any, tensors: Any) -> None:
        """Refuse if one of the tensors is cut."""
        for tensor in leaves(tensors, Tensor):
            if self.is_cut(tensor):
                refuse(func, f"takes pixels of shape {tuple(tensor.shape)} as a parameter")

    def exchange(
        self, func: Any, key: tuple[Any, ...], part: Any, combine: Callable[[list[Any]], Any]
    ) -> Any:
        """``combine`` of the parts of all tiles, in their order."""
        if self._records and not torch.is_grad_enabled():
            refuse(
                func,
                "is called without gradients in a forward with gradients: in a checkpoint, in an "
                "autograd.Function or under no_grad, whose backward would not see other tiles",
                "Turn checkpointing off, or call the model under torch.no_grad().",
            )
        waiting = self._waiting(part)
        return self._baton.exchange(self._index, (func.__name__, *key), part, combine, waiting)

    @contextlib.contextmanager
    def _waiting(self, kept: Any) -> Iterator[None]:
        """Offload what this tile has made, but not ``kept``."""
        if not self._offload:
            yield
            return
        stays = {tensor.untyped_storage()._cdata for tensor in leaves(kept, Tensor)}
        storages = [t.untyped_storage() for t in list(self._layouts) if self.is_cut(t)]
        copies = []
        for storage in {storage._cdata: storage for storage in storages}.values():
            if storage._cdata not in stays:
                host = torch.empty(
                    storage.nbytes(), dtype=torch.uint8, pin_memory=storage.is_cuda
                ).copy_(_bytes_of(storage), non_blocking=True)
                copies.append((storage, host))
                storage.resize_(0)
        yield
        while copies:
            storage, host = copies.pop()
            storage.resize_(host.nbytes)
            _bytes_of(storage).copy_(host, non_blocking=True)

    def gather(self, func: Any, x: Tensor, needs: Needs) -> Tensor:
        """The pixels of the whole that this tile needs, zeros where there are none.

        Each tile hands in copies of what others need of it, as it may change x before they read.
        """
        layout = self.layout(x)
        axes = {dim: axis for dim in needs for axis in layout[dim] if isinstance(axis, Axis)}
        edges = {dim: axis.edges for dim, axis in axes.items()}
        here = {dim: self.coords[axis.number] for dim, axis in axes.items()}

        def overlap(dim: int, source: int, target: int) -> slice | None:
            """What the target needs of the source's pixels, as the source counts them."""
            start, stop = edges[dim][source : source + 2]
            first, last = needs[dim][target]
            first, last = max(first, start), min(last, stop)
            return slice(first - start, last - start) if first < last else None

        def cut_out(sources: Mapping[int, int], targets: Mapping[int, int]) -> Tensor:
            slices = [slice(None)] * x.ndim
            for dim in axes:
                slices[dim] = overlap(dim, sources[dim], targets[dim]) or slice(0, 0)
            return x[tuple(slices)]

        def others(overlaps: Callable[[int, int], Any]) -> Iterator[tuple[int, dict[int, int]]]:
            """Index and place of the tiles for which it holds in all dimensions."""
            fitting = [
                [i for i in range(len(axis.sizes)) if overlaps(dim, i)]
                for dim, axis in axes.items()
            ]
            for places in itertools.product(*fitting):
                there = dict(zip(axes, places, strict=True))
                coords = list(self.coords)
                for dim, axis in axes.items():
                    coords[axis.number] = there[dim]
                yield self._indices[tuple(coords)], there

        stays_inside = all(
            start <= first and last <= stop
            for dim in axes
            for (first, last), (start, stop) in zip(
                needs[dim], itertools.pairwise(edges[dim]), strict=True
            )
        )
        handed_in: list[dict[int, Tensor]] = []
        if not stays_inside:
            strips = {
                index: cut_out(here, there).clone()
                for index, there in others(lambda dim, i: overlap(dim, here[dim], i))
                if index != self._index
            }
            key = (layout, tuple(needs.items()))
            handed_in = self.exchange(func, key, strips, list)
        parts = {
            tuple(there.values()): (
                cut_out(here, here) if index == self._index else handed_in[index][self._index]
            )
            for index, there in others(lambda dim, i: overlap(dim, i, here[dim]))
        }
        if not parts:  # all that the windows need is padding
            spans = {dim: needs[dim][here[dim]] for dim in axes}
            sizes = [spans[i][1] - spans[i][0] if i in spans else n for i, n in enumerate(x.shape)]
            return x.new_zeros(sizes)
        gathered = assembled(parts, list(axes))
        margins = [0] * (2 * x.ndim)
        for dim in axes:
            first, last = needs[dim][here[dim]]
            margins[2 * (x.ndim - 1 - dim)] = max(0, -first)
            margins[2 * (x.ndim - 1 - dim) + 1] = max(0, last - edges[dim][-1])
        return F.pad(gathered, margins) if any(margins) else gathered


def _described(dims: set[Dim]) -> str:
    texts = (
        " x ".join(f"{f} values" if isinstance(f, int) else f"tiles of {f.sizes}" for f in dim)
        for dim in dims
    )
    return " beside ".join(sorted(texts))


def each(value: Any, rank: int) -> list[Any]:
    """One value for each dimension, of one or of as many."""
    values = list(value) if isinstance(value, tuple | list) else [value] * rank
    return values * rank if len(values) == 1 else values


def axis_of(func: Any, dim: Dim) -> Axis:
    """The axis that a cut dimension is; refuses flattened ones."""
    if len(dim) == 1 and isinstance(dim[0], Axis):
        return dim[0]
    refuse(func, "works along a dimension in which pixels are flattened")


def relaid(tile: Tile, y: Tensor, kept: dict[int, Any]) -> Any:
    """Mark a result whose dimensions are as in ``kept``, the others not cut."""
    dims = (kept.get(i) for i in range(y.ndim))
    layout = tuple(
        whole(size) if dim is None else dim for size, dim in zip(y.shape, dims, strict=True)
    )
    return tile.mark(y, layout)
