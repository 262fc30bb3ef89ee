"""Forwards that convert has traced: what they fuse, and that they compute the same."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.support.blocks import (
    BLOCKS,
    GROUPS,
    IMAGE,
    ROWS,
    Base,
    C,
    N,
    calls_of,
    check,
    each_block,
    make,
    tensor,
)
from triton_gn import convert, unconvert
from triton_gn.ops import dispatch

OPERATOR = torch.ops.triton_gn.group_norm.default


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@each_block
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_block_computes_the_same_in_fewer_calls(kind: type[nn.Module], training: bool) -> None:
    shapes, expected = BLOCKS[kind]
    calls = check(make(kind).train(training), *(tensor(*shape) for shape in shapes))
    assert sorted(calls) == sorted(expected)


@each_block
def test_block_is_taken_back(kind: type[nn.Module]) -> None:
    model = make(kind)
    before = [(type(m), sorted(vars(m))) for m in model.modules()]
    keys = [*model.state_dict()]
    convert(model)
    assert [*model.state_dict()] == keys
    assert isinstance(model, kind)
    unconvert(model)
    assert [(type(m), sorted(vars(m))) for m in model.modules()] == before


@each_block
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"]
)
def test_copies_fuse_with_their_own_parameters(
    kind: type[nn.Module], copied: Callable[[nn.Module], nn.Module]
) -> None:
    shapes, expected = BLOCKS[kind]
    args = [tensor(*shape) for shape in shapes]
    model = make(kind).eval()
    convert(model)
    model(*args)
    other = copied(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    plain = copy.deepcopy(other)
    unconvert(plain)
    torch.testing.assert_close(other(*args), plain(*args), rtol=1e-10, atol=1e-10)
    assert sorted(calls_of(other, *args)) == sorted(expected)


@each_block
def test_compiled_block_has_the_fused_operators(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, fused = BLOCKS[kind]
    args = [tensor(*shape) for shape in shapes]
    model = make(kind).eval()
    convert(model)
    expected = model(*args)
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*args), expected)
    monkeypatch.setattr(dispatch, "uses_kernels", lambda *_: True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=refuse(graphs), fullgraph=True)
    with pytest.raises(NotImplementedError, match="no kernel runs here"):
        compiled(*args)
    operators = [node for node in graphs[-1].graph.nodes if node.target is OPERATOR]
    assert len(operators) == len(fused)
    activations = [node.args[9] for node in operators]
    assert sum(name != "none" for name in activations) == sum("activation" in f for f in fused)
    assert sum(node.args[6] is not None for node in operators) == sum(
        "residual" in f for f in fused
    )


def refuse(graphs: list[fx.GraphModule]) -> Any:
    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*args: Any) -> Any:
            raise NotImplementedError("no kernel runs here")

        graphs.append(graph)
        return run

    return backend


def test_shapes_of_each_call_decide() -> None:
    class Adds(Base):
        def forward(self, x: Tensor, r: Tensor) -> Any:
            return F.relu(self.norm1(x) + r)

    model = make(Adds)
    for shape, fused in {
        IMAGE: ["activation", "residual"],
        (N, C, 1, 1): ["activation", "shift"],
        (N, 1, 4, 5): [],
        (C, 1, 1): [],
        (5,): [],
        (): [],
        (3, N, C, 4, 5): [],
    }.items():
        assert check(model, tensor(), torch.randn(shape, dtype=torch.float64)) == [fused], shape
    for shape in ((N, C), (N, C, 7), (1, C, 2, 3, 2), (0, C, 4, 5)):
        assert check(model, tensor(*shape), tensor(*shape)) == [["activation", "residual"]], shape


def test_another_dtype_or_a_number_is_not_fused() -> None:
    class Adds(Base):
        def forward(self, x: Tensor, r: Tensor) -> Any:
            return F.relu(self.norm1(x) + r) + F.relu(self.norm2(x) + 1)

    assert check(make(Adds), tensor(), tensor().float()) == [[], []]


def test_mutation_in_between_is_seen() -> None:
    class Mutates(Base):
        def forward(self, x: Tensor) -> Any:
            x = x * 1
            y = self.norm1(x)
            x.add_(1)
            return F.silu(y) * x

    class MutatesAnother(Base):
        def forward(self, x: Tensor) -> Any:
            x, other = self.conv1(x), self.conv2(x)
            y = self.norm1(x)
            other.mul_(2)
            return F.silu(y + other)

    class Overwrites(Base):
        def forward(self, x: Tensor) -> Any:
            x = self.conv1(x)
            y = self.norm1(x)
            view = x[:, :1]
            view.zero_()
            return F.silu(y) + x

    with torch.no_grad():  # a backward would refuse tensors that were written to
        assert check(make(Mutates), tensor()) == [[]]
        assert check(make(Overwrites), tensor()) == [[]]
    assert check(make(MutatesAnother), tensor()) == [["activation", "residual"]]


def test_operand_that_is_written_later_is_not_kept_for_the_backward() -> None:
    class Accumulates(Base):
        def forward(self, x: Tensor) -> Any:
            n, x = self.norm1(self.conv2(x)), self.conv1(x)
            y = F.silu(n + x)
            x += y
            return x * 2

    class Adds(Base):
        def forward(self, x: Tensor, emb: Tensor) -> Any:
            x = self.conv1(x)
            y = F.silu(self.norm1(x + emb[:, :, None, None]))
            x.mul_(2)
            return x + y

    assert check(make(Accumulates), tensor()) == [[]]
    assert check(make(Adds), tensor(), tensor(*ROWS)) == [["activation"]]


def test_sum_into_another_tensor_is_written_there() -> None:
    class Accumulates(Base):
        def forward(self, x: Tensor) -> Any:
            total = self.conv1(x)
            total += self.norm1(x)
            z = total * 2
            return F.relu(total) + z

    assert check(make(Accumulates), tensor()) == [[]]


def test_names_of_one_tensor_see_each_others_writes() -> None:
    class Aliases(Base):
        def forward(self, x: Tensor) -> Any:
            first = self.conv1(x)
            second = first
            second += 1
            second *= 2
            y = F.relu(self.norm1(first))
            keep = y
            y -= first
            return keep + y

    with torch.no_grad():  # a backward would refuse tensors that were written to
        assert check(make(Aliases), tensor()) == [["activation"]]


def test_slice_of_a_fused_sequence_runs_as_it_is() -> None:
    net = nn.Sequential(nn.GroupNorm(GROUPS, C), nn.Identity(), nn.SiLU()).double()
    x = tensor()
    expected = net[:1](x)
    assert convert(net).folded == [("0", "silu")]
    torch.testing.assert_close(net[:1](x), expected)
    torch.testing.assert_close(net(x), F.silu(expected))


def test_result_that_is_used_twice_is_not_fused() -> None:
    class Twice(Base):
        def forward(self, x: Tensor) -> Any:
            y = self.norm1(x)
            return F.silu(y) + y.sum()

    assert check(make(Twice), tensor()) == [[]]
