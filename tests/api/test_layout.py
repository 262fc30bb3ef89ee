"""How strides are read: contiguous, channels-last, or neither."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from triton_gn.ops import layout


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def channels_innermost(*shape: int) -> Tensor:
    return tensor(*shape).movedim(1, -1).contiguous().movedim(-1, 1)


CONTIGUOUS: dict[str, Callable[[], Tensor]] = {
    "rank 3": lambda: tensor(2, 6, 5),
    "rank 4": lambda: tensor(2, 6, 5, 4),
    "rank 6": lambda: tensor(2, 6, 5, 4, 3, 2),
    "pixels permuted": lambda: tensor(2, 6, 5, 4).transpose(2, 3),
    "pixels permuted, rank 5": lambda: tensor(2, 6, 5, 4, 3).permute(0, 1, 4, 2, 3),
    "one sample": lambda: tensor(1, 6, 5, 4),
    "one channel": lambda: tensor(2, 1, 5, 4),
    "one row": lambda: tensor(2, 6, 1, 4),
    "one column": lambda: tensor(2, 6, 5, 1),
    "first channels of one sample": lambda: tensor(1, 6, 5, 4)[:, :3],
    "first samples": lambda: tensor(4, 6, 5, 4)[:2],
    "one channel, channels_last": lambda: channels_innermost(2, 1, 5, 4),
}
CHANNELS_LAST: dict[str, Callable[[], Tensor]] = {
    "channels_last": lambda: tensor(2, 6, 5, 4).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: tensor(2, 6, 5, 4, 3).to(memory_format=torch.channels_last_3d),
    "rank 3": lambda: tensor(2, 5, 6).transpose(1, 2),
    "rank 6": lambda: channels_innermost(2, 6, 5, 4, 3, 2),
    "pixels permuted": lambda: channels_innermost(2, 6, 5, 4).transpose(2, 3),
    "pixels permuted, rank 5": lambda: channels_innermost(2, 6, 5, 4, 3).permute(0, 1, 4, 2, 3),
    "one sample": lambda: channels_innermost(1, 6, 5, 4),
    "one row": lambda: channels_innermost(2, 6, 1, 4),
    "one column": lambda: channels_innermost(2, 6, 5, 1),
    "sizes of 1 around, rank 6": lambda: channels_innermost(1, 6, 1, 4, 1, 3),
    "first samples": lambda: channels_innermost(4, 6, 5, 4)[:2],
    "one pixel": lambda: tensor(2, 6, 1, 1),
    "one pixel, channels_last": lambda: channels_innermost(2, 6, 1, 1),
    "no pixel dimension": lambda: tensor(2, 6),
    "one pixel of one channel": lambda: tensor(2, 1, 1),
}
NEITHER: dict[str, Callable[[], Tensor]] = {
    "every other column": lambda: tensor(2, 6, 5, 8)[..., ::2],
    "first columns": lambda: tensor(2, 6, 5, 8)[..., :4],
    "first rows": lambda: tensor(2, 6, 8, 4)[:, :, :5],
    "first channels": lambda: tensor(2, 12, 5, 4)[:, :6],
    "every other sample": lambda: tensor(4, 6, 5, 4)[::2],
    "one pixel of many": lambda: tensor(2, 6, 5)[..., :1],
    "one pixel of one sample": lambda: tensor(1, 6, 5)[..., :1],
    "channels_last, first channels": lambda: channels_innermost(2, 12, 5, 4)[:, :6],
    "channels_last, first columns": lambda: channels_innermost(2, 6, 5, 8)[..., :4],
    "no pixel dimension, transposed": lambda: tensor(6, 2).t(),
    "samples transposed with channels": lambda: tensor(6, 2, 5).transpose(0, 1),
    "channels between the pixels": lambda: tensor(2, 5, 6, 4).transpose(1, 2),
    "expanded samples": lambda: tensor(1, 6, 5, 4).expand(2, 6, 5, 4),
    "expanded channels": lambda: tensor(2, 1, 5, 4).expand(2, 6, 5, 4),
    "expanded pixels": lambda: tensor(2, 6, 5, 1).expand(2, 6, 5, 4),
}


def parametrised(*layouts: dict[str, Callable[[], Tensor]]) -> pytest.MarkDecorator:
    cases = [pytest.param(make, id=name) for cases in layouts for name, make in cases.items()]
    return pytest.mark.parametrize("make", cases)


@parametrised(CONTIGUOUS)
def test_contiguous_is_recognised(make: Callable[[], Tensor]) -> None:
    assert layout.is_channels_last(make()) is False


@parametrised(CHANNELS_LAST)
def test_channels_last_is_recognised(make: Callable[[], Tensor]) -> None:
    assert layout.is_channels_last(make()) is True


@parametrised(NEITHER)
def test_neither_is_recognised(make: Callable[[], Tensor]) -> None:
    assert layout.is_channels_last(make()) is None


@pytest.mark.parametrize("stride", [0, 1, 7, 10**6])
def test_strides_of_dimensions_of_one_do_not_matter(stride: int) -> None:
    contiguous = tensor(1, 6, 1, 4).as_strided((1, 6, 1, 4), (stride, 4, stride, 1))
    channels_last = tensor(1, 6, 1, 4).as_strided((1, 6, 1, 4), (stride, 1, stride, 6))
    one_channel = tensor(2, 1, 5).as_strided((2, 1, 5), (5, stride, 1))
    assert layout.is_channels_last(contiguous) is False
    assert layout.is_channels_last(channels_last) is True
    assert layout.is_channels_last(one_channel) is False


@parametrised(CONTIGUOUS, CHANNELS_LAST)
def test_native_layouts_are_not_copied(make: Callable[[], Tensor]) -> None:
    x = make()
    native, channels_last = layout.native(x)
    assert native.data_ptr() == x.data_ptr()
    assert native.stride() == x.stride()
    assert channels_last is layout.is_channels_last(x)


@parametrised(NEITHER)
def test_other_layouts_are_copied_to_a_native_one(make: Callable[[], Tensor]) -> None:
    x = make()
    native, channels_last = layout.native(x)
    assert native.data_ptr() != x.data_ptr()
    assert torch.equal(native, x)
    assert layout.is_channels_last(native) is channels_last


def test_copies_keep_the_channels_innermost() -> None:
    _, channels_last = layout.native(channels_innermost(2, 12, 5, 4)[:, :6])
    assert channels_last
    _, channels_last = layout.native(tensor(2, 12, 5, 4)[:, :6])
    assert not channels_last


def test_like_copies_only_to_change_strides() -> None:
    contiguous, channels_last = tensor(2, 6, 5, 4), channels_innermost(2, 6, 5, 4)
    assert layout.like(contiguous, torch.empty(2, 6, 5, 4)) is contiguous
    copy = layout.like(contiguous.bfloat16(), channels_last)
    assert copy.stride() == channels_last.stride()
    assert copy.dtype is torch.bfloat16
    assert torch.equal(copy, contiguous.bfloat16())


def test_like_ignores_strides_of_dimensions_of_one() -> None:
    x = tensor(1, 6, 1, 4)
    assert layout.like(x, x.as_strided(x.shape, (7, 4, 9, 1))) is x


@parametrised(CONTIGUOUS, CHANNELS_LAST)
def test_empty_like_has_exactly_the_same_strides(make: Callable[[], Tensor]) -> None:
    x = make()
    empty = layout.empty_like(x, torch.float64)
    assert empty.stride() == x.stride()
    assert empty.dtype is torch.float64
    assert layout.empty_like(x).dtype is x.dtype
