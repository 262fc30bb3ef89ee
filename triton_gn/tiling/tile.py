"""Tile: the layouts of its tensors, and its exchanges with other tiles."""

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
Needs = Mapping[int, Sequence[tuple[int, int]]]  # dimension: (start, stop) for each tile along it


def refuse(func: Any, reason: str, remedy: str = "", cause: Exception | None = None) -> NoReturn:
    """Raise NotExactError that names the function, the reason and the remedy."""
    name = func if isinstance(func, str) else resolve_name(func) or func.__name__
    remedy = remedy or "Tile a part of the model that does without it, or run the model untiled."
    raise NotExactError(f"exact_tiles: {name} {reason}. {remedy}") from cause


def refuse_hook() -> None:
    """Raise NotExactError if a hook is running: it did what a model's forward may not do."""
    if (hook := running_hook()) is not None:
        refuse(
            f"the hook {hook}",
            "moves or changes parameters, or brings in tensors, and tiles share these",
            "Remove it, with the parameters back in place, or move a larger part as one, as "
            "enable_model_cpu_offload of a pipeline of diffusers does.",
        )


def leaves(value: Any, kind: type) -> Iterator[Any]:
    """Yield all instances of ``kind`` in nested tuples, lists, dicts and slices."""
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
    """Concatenate the parts of a grid, whose axes are ``dims``, into one tensor."""
    if not dims:
        (part,) = parts.values()
        return part
    rows: dict[int, dict[tuple[int, ...], Tensor]] = {}
    for (row, *columns), part in parts.items():
        rows.setdefault(row, {})[tuple(columns)] = part
    tensors = [assembled(rows[row], dims[1:]) for row in sorted(rows)]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dims[0])


class Tile:
    """Position of a tile in the grid, and the layouts of the tensors that the tile has made.

    ``known`` holds the other tensors that a model may use, the same for all tiles. Any further
    tensor was created unseen, and may hold pixels.
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
        self._layouts = WeakTensorKeyDictionary()  # tensor: its layout, None if it is not cut

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
        """Refuse to change a tensor that tiles share."""
        for target in leaves(targets, Tensor):
            shared = not self.is_cut(target) and any(
                torch._C._is_alias_of(target, tensor)  # type: ignore[attr-defined]
                for tensor in self._known
            )
            if shared:
                refuse_hook()
                refuse(func, "changes what belongs to no tile: each tile would change it again")

    def layout(self, tensor: Tensor) -> Layout:
        """Return the layout of a tensor that the tile may use."""
        layout: Layout | None = self._layouts.get(tensor)
        return tuple(map(whole, tensor.shape)) if layout is None else layout

    def output_layout(self, tensor: Tensor) -> Layout:
        """Return the layout of a tensor that the model returns."""
        self.check("an output of the model", (tensor,))
        return self.layout(tensor)

    def cut(self, tensor: Tensor, layout: Sequence[Dim]) -> Tensor:
        """Return a copy of this tile's part of a whole tensor, in the same memory format."""
        for dim, factors in enumerate(layout):
            for axis in factors:
                if isinstance(axis, Axis):
                    index = self.coords[axis.number]
                    tensor = tensor.narrow(dim, axis.edges[index], axis.sizes[index])
        return self.mark(tensor.clone(), tuple(layout))  # type: ignore[no-any-return]

    def is_cut(self, tensor: Any) -> bool:
        """Return whether the value is a tensor with a cut dimension."""
        return isinstance(tensor, Tensor) and any(map(is_cut, self.layout(tensor)))

    def mark(self, result: Any, layout: Layout | None = None) -> Any:
        """Record the layout of all tensors in a result, None if they are not cut; return it."""
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
        """Return the sizes of this tile's part of a tensor with the layout."""
        return tuple(own_size(dim, self.coords) for dim in layout)

    def broadcast(self, func: Any, layouts: Sequence[Layout]) -> Layout:
        """Return the layout that operands broadcast to; refuse operands that are not cut alike."""
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
        """Return ``combine`` of the parts of all tiles, in the grid's order."""
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
    def _waiting(self, part: Any) -> Iterator[None]:
        """Offload the tensors that this tile has made, except ``part``, until the context ends."""
        if not self._offload:
            yield
            return
        part_storages = {tensor.untyped_storage()._cdata for tensor in leaves(part, Tensor)}
        storages = [t.untyped_storage() for t in list(self._layouts) if self.is_cut(t)]
        copies = []
        for storage in {storage._cdata: storage for storage in storages}.values():
            if storage._cdata not in part_storages:
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
        """Return the pixels of the whole tensor that this tile needs, with zeros outside of it.

        Each tile hands in copies of the pixels that others need, because it may change x before
        they read them.
        """
        layout = self.layout(x)
        axes = {dim: axis for dim in needs for axis in layout[dim] if isinstance(axis, Axis)}
        edges = {dim: axis.edges for dim, axis in axes.items()}
        own_place = {dim: self.coords[axis.number] for dim, axis in axes.items()}

        def common(dim: int, source: int, target: int) -> slice | None:
            """Return the source's pixels that the target needs, counted from the source's first."""
            start, stop = edges[dim][source : source + 2]
            first, last = needs[dim][target]
            first, last = max(first, start), min(last, stop)
            return slice(first - start, last - start) if first < last else None

        def cut_out(sources: Mapping[int, int], targets: Mapping[int, int]) -> Tensor:
            slices = [slice(None)] * x.ndim
            for dim in axes:
                slices[dim] = common(dim, sources[dim], targets[dim]) or slice(0, 0)
            return x[tuple(slices)]

        def tiles(is_common: Callable[[int, int], Any]) -> Iterator[tuple[int, dict[int, int]]]:
            """Yield index and place of the tiles that have pixels in common."""
            candidates = [
                [i for i in range(len(axis.sizes)) if is_common(dim, i)]
                for dim, axis in axes.items()
            ]
            for indices in itertools.product(*candidates):
                place = dict(zip(axes, indices, strict=True))
                coords = list(self.coords)
                for dim, axis in axes.items():
                    coords[axis.number] = place[dim]
                yield self._indices[tuple(coords)], place

        stays_inside = all(
            start <= first and last <= stop
            for dim in axes
            for (first, last), (start, stop) in zip(
                needs[dim], itertools.pairwise(edges[dim]), strict=True
            )
        )
        strips_of_tiles: list[dict[int, Tensor]] = []  # strips_of_tiles[source][target]
        if not stays_inside:
            strips = {
                index: cut_out(own_place, place).clone()
                for index, place in tiles(lambda dim, i: common(dim, own_place[dim], i))
                if index != self._index
            }
            key = (layout, tuple(needs.items()))
            strips_of_tiles = self.exchange(func, key, strips, list)
        parts = {
            tuple(place.values()): (
                cut_out(own_place, own_place)
                if index == self._index
                else strips_of_tiles[index][self._index]
            )
            for index, place in tiles(lambda dim, i: common(dim, i, own_place[dim]))
        }
        if not parts:  # the windows of this tile see padding only
            spans = {dim: needs[dim][own_place[dim]] for dim in axes}
            sizes = [spans[i][1] - spans[i][0] if i in spans else n for i, n in enumerate(x.shape)]
            return x.new_zeros(sizes)
        gathered = assembled(parts, list(axes))
        margins = [0] * (2 * x.ndim)
        for dim in axes:
            first, last = needs[dim][own_place[dim]]
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
    """Return one value for each dimension, from one value or from one for each."""
    values = list(value) if isinstance(value, tuple | list) else [value] * rank
    return values * rank if len(values) == 1 else values


def axis_of(func: Any, dim: Dim) -> Axis:
    """Return the axis of a cut dimension; refuse flattened pixels."""
    if len(dim) == 1 and isinstance(dim[0], Axis):
        return dim[0]
    refuse(func, "works along a dimension in which pixels are flattened")


def relaid(tile: Tile, y: Tensor, kept: dict[int, Any]) -> Any:
    """Mark a result: its dimensions are those of ``kept``, the others are not cut."""
    dims = (kept.get(i) for i in range(y.ndim))
    layout = tuple(
        whole(size) if dim is None else dim for size, dim in zip(y.shape, dims, strict=True)
    )
    return tile.mark(y, layout)
