"""convert and unconvert on models of diffusers, small and with random weights."""

import copy
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models import resnet
from torch import Tensor, nn

from triton_gn.convert import source
from triton_gn.convert.conversion import FoldedActivation, convert, unconvert

diffusers = pytest.importorskip("diffusers")
accelerate = pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[2]
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}


def make_conditioned_unet(**options: Any) -> nn.Module:
    model: nn.Module = diffusers.UNet2DConditionModel(
        **UNET | {"cross_attention_dim": 16, "in_channels": 4, "out_channels": 4} | options,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return model


def make_unet(down: str, up: str, **options: Any) -> nn.Module:
    model: nn.Module = diffusers.UNet2DModel(
        **UNET | options, down_block_types=(down, "DownBlock2D"), up_block_types=("UpBlock2D", up)
    )
    return model


def make_autoencoder() -> nn.Module:
    model: nn.Module = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    return model


def make_video_unet() -> nn.Module:
    model: nn.Module = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    return model


def make_video_decoder() -> nn.Module:
    model: nn.Module = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2
    )
    return model


def make_3d_unet() -> nn.Module:
    model: nn.Module = diffusers.UNet3DConditionModel(
        **UNET | {"cross_attention_dim": 16},
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    return model


def random(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run_unet(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x, torch.tensor([3, 700]), return_dict=False)[0]
    return y


def run_conditioned(model: nn.Module, x: Tensor) -> Tensor:
    text = random(2, 5, 16, dtype=x.dtype, seed=2)
    y: Tensor = model(x, torch.tensor([3, 700]), text, return_dict=False)[0]
    return y


def run_autoencoder(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x, return_dict=False)[0]
    return y


def run_video_unet(model: nn.Module, x: Tensor) -> Tensor:
    text = random(2, 1, 16, dtype=x.dtype, seed=2)
    ids = torch.tensor([[6.0, 127, 0.02]] * 2, dtype=x.dtype)
    y: Tensor = model(x, torch.tensor([3, 700]), text, ids, return_dict=False)[0]
    return y


def run_video_decoder(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x, num_frames=2, return_dict=False)[0]
    return y


class Case(NamedTuple):
    """A model, a call of it, the shape of its input; how many norms are folded, only replaced.

    ``alone`` activations run by themselves after the conversion.
    """

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor], Tensor]
    shape: tuple[int, ...]
    folded: int
    replaced: int
    alone: int = 0


IMAGE, VIDEO = (2, 3, 8, 8), (2, 2, 8, 4, 4)
SCALE_SHIFT = {"resnet_time_scale_shift": "scale_shift"}
CASES = {
    "conditioned": Case(make_conditioned_unet, run_conditioned, (2, 4, 8, 8), 17, 4),
    "conditioned, scale and shift": Case(
        lambda: make_conditioned_unet(**SCALE_SHIFT), run_conditioned, (2, 4, 8, 8), 17, 4
    ),
    "unconditioned": Case(
        lambda: make_unet("AttnDownBlock2D", "AttnUpBlock2D"), run_unet, IMAGE, 17, 4
    ),
    "scale and shift, resampling blocks": Case(
        lambda: make_unet("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", **SCALE_SHIFT),
        *(run_unet, IMAGE, 19, 0),
    ),
    "skips": Case(
        lambda: make_unet("SkipDownBlock2D", "SkipUpBlock2D", act_fn="gelu"),
        *(run_unet, IMAGE, 17, 3, 2),  # a filter with a constant tensor in its forward
    ),
    "autoencoder": Case(make_autoencoder, run_autoencoder, (2, 3, 16, 16), 22, 2),
    "video": Case(make_video_unet, run_video_unet, VIDEO, 33, 4),
    "video decoder": Case(make_video_decoder, run_video_decoder, (4, 3, 8, 8), 30, 2),
    "3d": Case(make_3d_unet, run_conditioned, (2, 4, 2, 4, 4), 49, 9),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Run on one thread: on layers this small, threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def prepare(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Add noise to all parameters, because zeros hide gradients, and switch dropout off."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return nn.Module.to(model, dtype)


def make(case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """The model and an input."""
    torch.manual_seed(0)
    return prepare(case.make(), dtype), random(*case.shape, dtype=dtype)


def step(
    model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> dict[str, Tensor]:
    """The output and the gradients of the input and of every parameter, for random gradients."""
    x = x.detach().requires_grad_()
    y = run(model, x)
    leaves = {"input": x} | dict(model.named_parameters())
    grads = torch.autograd.grad(
        y, list(leaves.values()), random(*y.shape, dtype=y.dtype, seed=3), allow_unused=True
    )
    found = zip(leaves, grads, strict=True)
    return {"output": y.detach()} | {name: grad for name, grad in found if grad is not None}


def assert_agree(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest value of each: the sums behind a gradient nearly cancel in places."""
    assert actual.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        # a parameter before a norm may have a gradient of 0, of which only rounding is left
        limit = tolerance * max(float(value.abs().max()), 1e-3 * scale)
        error = float((actual[name] - value).abs().max())
        assert error <= limit, f"{name}: {error:.1e} is more than {limit:.1e}"


def count_activations(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of all images that activation modules are called on from now on."""
    shapes: list[torch.Size] = []
    for kind in (nn.SiLU, nn.GELU):

        def forward(self: Any, input: Tensor, original: Any = kind.forward) -> Tensor:
            if input.ndim >= 4:
                shapes.append(input.shape)
            result: Tensor = original(self, input)
            return result

        monkeypatch.setattr(kind, "forward", forward)
    return shapes


# Whole models


def check_both_ways(model: nn.Module, case: Case, x: Tensor) -> None:
    """Compare the converted model with the original, and the restored one bit by bit."""
    kinds = [type(module) for module in model.modules()]
    names = [sorted(vars(module)) for module in model.modules()]
    before = step(model, case.run, x)
    assert len(before) > 100
    convert(model)
    assert [type(module) for module in model.modules()] != kinds
    # some twenty layers round differently, and a gradient sums up to some hundred products
    assert_agree(step(model, case.run, x), before, 1e-4 if x.dtype is torch.float32 else 1e-11)
    unconvert(model)
    assert [type(module) for module in model.modules()] == kinds
    assert [sorted(vars(module)) for module in model.modules()] == names
    after = step(model, case.run, x)
    assert all(value.equal(after[name]) for name, value in before.items())


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_model_computes_the_same(case: Case, dtype: torch.dtype) -> None:
    model, x = make(case, dtype)
    check_both_ways(model, case, x)


@pytest.mark.parametrize("name", list(CASES)[:6])
def test_channels_last_model_computes_the_same(name: str) -> None:
    """All but the models of videos, whose convolutions are of rank 5."""
    model, x = make(CASES[name])
    nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
    formats = []

    def remember_format(module: nn.Module, inputs: tuple[Tensor]) -> None:
        (y,) = inputs
        formats.append(y.is_contiguous(memory_format=torch.channels_last))

    last = model.get_submodule("decoder.conv_out" if name == "autoencoder" else "conv_out")
    last.register_forward_pre_hook(remember_format)
    check_both_ways(model, CASES[name], x.contiguous(memory_format=torch.channels_last))
    assert formats == [True] * 3


@each_case
def test_no_activation_runs_by_itself(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make(case)
    shapes = count_activations(monkeypatch)
    case.run(model, x)
    before = len(shapes)
    report = convert(model)
    counts = tuple(map(len, (report.folded, report.replaced, report.left)))
    assert counts == (case.folded, case.folded + case.replaced, 0)
    assert before >= case.folded  # the encoder of a conditioned decoder runs as often as it
    shapes.clear()
    case.run(model, x)
    assert len(shapes) == case.alone


def test_model_compiles_to_one_graph() -> None:
    case = CASES["conditioned"]
    model, x = make(case)
    convert(model)
    expected = case.run(model, x)
    torch._dynamo.reset()
    model.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(case.run(model, x), expected)


def test_checkpointing_computes_the_same() -> None:
    case = CASES["conditioned"]
    model, x = make(case)
    convert(model)
    before = step(model, case.run, x)
    model.train().enable_gradient_checkpointing()  # type: ignore[operator]
    shapes: list[torch.Size] = []
    block = next(m for m in model.modules() if isinstance(m, resnet.ResnetBlock2D))
    block.conv1.register_forward_hook(lambda module, inputs, y: shapes.append(y.shape))
    assert_agree(step(model, case.run, x), before, 1e-6)
    assert len(shapes) == 2  # again in the backward


def test_autocast_is_no_less_exact() -> None:
    case = CASES["conditioned"]
    model, x = make(case)
    exact = case.run(model, x)

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return float((case.run(model, x) - exact).detach().norm() / exact.detach().norm())

    before = error()
    convert(model)
    # bfloat16 rounds by 4e-3; which way differs in every layer
    assert 0 < error() <= 1.5 * before < 0.1


def test_checkpoints_move_both_ways(tmp_path: Path) -> None:
    case = CASES["autoencoder"]
    plain, x = make(case)
    converted = prepare(case.make())
    convert(converted)
    converted.load_state_dict(plain.state_dict())
    torch.testing.assert_close(case.run(converted, x), case.run(plain, x))
    converted.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = type(converted).from_pretrained(tmp_path, low_cpu_mem_usage=False)  # type: ignore[attr-defined]
    assert type(loaded.encoder.conv_norm_out) is nn.GroupNorm
    assert case.run(loaded.train(), x).equal(case.run(plain, x))


def test_copies_work_and_can_be_taken_back() -> None:
    case = CASES["conditioned"]
    model, x = make(case)
    before = case.run(model, x)
    convert(model)
    copied = copy.deepcopy(model)
    assert case.run(copied, x).equal(case.run(model, x))
    unconvert(copied)
    assert case.run(copied, x).equal(before)
    assert type(model.conv_act) is FoldedActivation


def test_pickled_model_works_in_another_process(tmp_path: Path) -> None:
    case = CASES["unconditioned"]
    model, x = make(case)
    convert(model)
    expected = case.run(model, x)
    torch.save((model, x, expected), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, x, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "y = model(x, torch.tensor([3, 700])).sample\n"
        "torch.testing.assert_close(y, expected)\n"
        "from triton_gn.convert import unconvert\n"
        "unconvert(model)\n"
        "assert not any('triton_gn' in type(m).__module__ for m in model.modules())\n"
        "torch.testing.assert_close(model(x, torch.tensor([3, 700])).sample, expected)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model.pt")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)


# Residual blocks

BLOCKS: dict[str, dict[str, Any]] = {
    "default": {},
    "scale and shift": {"time_embedding_norm": "scale_shift"},
    "no projection": {"temb_channels": None},
    "other channels, up": {"out_channels": 16, "up": True},
    "down": {"down": True},
    "up, fir": {"up": True, "kernel": "fir"},
    "down, sde_vp": {"down": True, "kernel": "sde_vp"},
    "scaled": {"output_scale_factor": 3.0, "use_in_shortcut": True, "conv_shortcut_bias": False},
    "activated embedding": {"skip_time_act": True, "non_linearity": "mish", "groups_out": 2},
    "dropout": {"dropout": 0.5, "conv_2d_out_channels": 24},
}


def make_block(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"in_channels": 8, "temb_channels": 12, "groups": 4} | options
    block: nn.Module = resnet.ResnetBlock2D(**arguments)
    return block.double()


def run_block(block: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(4)  # for the dropout
    temb = None if block.time_emb_proj is None else random(len(x), 12, dtype=x.dtype, seed=5)
    y: Tensor = block(x, temb)
    return y


@pytest.mark.parametrize("options", BLOCKS.values(), ids=list(BLOCKS))
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_block_computes_the_same(options: dict[str, Any], training: bool) -> None:
    block, x = make_block(**options).train(training), random(2, 8, 6, 6, dtype=torch.float64)
    before = step(block, run_block, x)
    report = convert(block)
    # an upsampling block asks for the size of the batch, which torch.fx cannot trace
    assert [name for name, _ in report.folded] == ([] if block.upsample else ["norm1", "norm2"])
    assert_agree(step(block, run_block, x), before, 1e-12)


@pytest.mark.parametrize("name", ["default", "scale and shift", "no projection"])
def test_block_compiles_to_one_graph(name: str) -> None:
    block, x = make_block(**BLOCKS[name]), random(2, 8, 6, 6, dtype=torch.float64)
    convert(block)
    before = step(block, run_block, x)
    torch._dynamo.reset()
    block.compile(backend="aot_eager", fullgraph=True)
    assert_agree(step(block, run_block, x), before, 1e-12)


def test_large_batch_is_upsampled() -> None:
    block = make_block(up=True)
    x = random(64, 8, 2, 2, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    before = run_block(block, x)
    convert(block)
    torch.testing.assert_close(run_block(block, x), before)


def test_embedding_without_projection_keeps_its_shapes() -> None:
    x, temb = (random(2, 8, 6, 6, dtype=torch.float64, seed=seed) for seed in (1, 2))
    for norm, needed in (("default", True), ("group", False)):
        block = make_block(temb_channels=None, time_embedding_norm=norm)
        before = block(x, temb)
        assert before.equal(block(x, None)) is not needed
        convert(block)
        torch.testing.assert_close(block(x, temb), before)


def test_block_of_frames_has_an_embedding_for_each() -> None:
    block = resnet.TemporalResnetBlock(32, 64, temb_channels=12)
    x, temb = random(2, 32, 3, 4, 4, dtype=torch.float32), random(2, 3, 12, dtype=torch.float32)
    before = block(x, temb)
    report = convert(block)
    assert [name for name, _ in report.folded] == ["norm1", "norm2"]
    torch.testing.assert_close(block(x, temb), before)


def test_deprecated_argument_still_warns() -> None:
    block = make_block()
    convert(block)
    x, temb = random(2, 8, 6, 6, dtype=torch.float64), random(2, 12, dtype=torch.float64)
    with pytest.warns(FutureWarning, match="`scale` argument is deprecated"):
        block(x, temb, scale=1.0)


def test_report_names_what_is_folded() -> None:
    fits = "where the shapes fit"
    assert convert(make_block()).folded == [("norm1", "silu"), ("norm2", f"pre_add, silu, {fits}")]
    assert convert(make_block(**BLOCKS["scale and shift"])).folded[1] == (
        "norm2",
        f"scale, residual, silu or scale, shift, silu, {fits}",
    )
    without = make_block(temb_channels=None, time_embedding_norm="group")
    assert convert(without).folded[1] == ("norm2", "silu")


def make_hooked() -> nn.Module:
    activation = nn.SiLU()
    activation.register_forward_hook(lambda *_: None)
    return activation


# What prevents folding, of the norms left over, and the reason given
OBSTACLES: dict[str, tuple[Callable[[nn.Module], object], list[str], str]] = {
    "hooks of a norm": (
        lambda block: block.get_submodule("norm1").register_forward_hook(lambda *_: None),
        ["norm1"],
        "its module has hooks or a forward of its own",
    ),
    "hooks of the activation": (
        lambda block: setattr(block, "nonlinearity", make_hooked()),
        ["norm1"],
        "is followed by SiLU, which cannot be fused",
    ),
    "replaced forward": (
        lambda block: setattr(block, "forward", functools.partial(block.forward)),
        ["norm1", "norm2"],
        "its parent, a ResnetBlock2D, has its forward replaced",
    ),
    "backward hooks of the block": (
        lambda block: block.register_full_backward_hook(lambda *_: None),
        ["norm1", "norm2"],
        "its parent, a ResnetBlock2D, has backward hooks, which may go by its class",
    ),
    "norm shared": (
        lambda block: setattr(block, "norm2", block.norm1),
        ["norm1"],
        "its parent, a ResnetBlock2D, uses norm2, which it holds in several places",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacle_prevents_folding(name: str) -> None:
    alter, unfolded, reason = OBSTACLES[name]
    block, x = make_block(), random(2, 8, 6, 6, dtype=torch.float64)
    alter(block)
    expected = run_block(block, x)
    report = convert(block)
    others = set(report.replaced) - set(report.folded)
    assert others == {(norm, reason) for norm in unfolded}
    torch.testing.assert_close(run_block(block, x), expected)


def offload(model: nn.Module, kind: str) -> None:
    cpu = torch.device("cpu")
    if kind == "accelerate":
        accelerate.cpu_offload(model, execution_device=cpu)
    elif kind == "casting":
        # else the norms are skipped by their names
        options: dict[str, Any] = {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32}
        diffusers.hooks.apply_layerwise_casting(model, skip_modules_pattern=(), **options)
    else:
        options = {"offload_type": kind, "num_blocks_per_group": 1}
        diffusers.hooks.apply_group_offloading(
            model, onload_device=cpu, offload_device=cpu, **options
        )


@pytest.mark.parametrize("kind", ["accelerate", "casting", "leaf_level", "block_level"])
def test_offloaded_model_computes_the_same_in_both_orders(kind: str) -> None:
    case = CASES["conditioned"]
    results = []
    for order in ("alone", "convert first", "convert last"):
        model, x = make(case)
        if order == "convert first":
            convert(model)
        offload(model, kind)
        if order == "convert last":
            report = convert(model)
            hooked = kind in ("accelerate", "leaf_level")
            assert len(report.left if hooked else report.replaced) == case.folded + case.replaced
        with torch.no_grad():
            results.append(case.run(model, x))
    alone, first, last = results
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, alone, rtol=1e-4, atol=1e-4)


def test_block_wrapped_since_is_not_taken_back() -> None:
    """Derive a class from that of the block, as FSDP2 does."""
    block = make_block()
    convert(block)
    fused = type(block)
    block.__class__ = type("Wrapped", (fused,), {})
    with pytest.raises(RuntimeError, match=r"'' of class Wrapped .* Take that back first"):
        unconvert(block)
    block.__class__ = fused
    unconvert(block)
    assert type(block) is resnet.ResnetBlock2D


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script_of_a_block_says_what_to_do() -> None:
    block = make_block()
    convert(block)
    with pytest.raises(RuntimeError, match=r"Call triton_gn\.unconvert on a converted model"):
        torch.jit.script(block)


def test_folding_can_be_switched_off() -> None:
    block = make_block()
    assert len(convert(block, fold_activations=False).replaced) == 2
    assert type(block) is resnet.ResnetBlock2D
    convert(block)
    assert type(block) is not resnet.ResnetBlock2D
    assert isinstance(block, resnet.ResnetBlock2D)


# What follows what

FOLLOWS = {
    "in a line": "x = self.norm(x)\nx = self.act(x)",
    "of another name": "x = self.norm(y)\nx = self.act(x)",
    "in a branch": "if self.norm is not None:\n    x = self.norm(x)\n    x = self.act(x)",
    "after branches": (
        "if y is None:\n    x = self.norm(x)\nelse:\n    x = self.norm(x, y)\nx = self.act(x)"
    ),
    "twice": "x = self.norm(x)\nx = self.act(x)\nx = self.norm(x)\nx = self.act(x)",
}
FOLLOWS_NOT = {
    "nothing": "x = self.norm(x)",
    "nowhere": "x = x + 1",
    "another value": "y = self.norm(x)\nx = self.act(x)",
    "a value used again": "x = self.norm(x)\ny = self.act(x)",
    "not at once": "x = self.norm(x)\nx = self.conv(x)\nx = self.act(x)",
    "elsewhere too": "x = self.norm(x)\nx = self.act(x)\nt = self.act(t)",
    "handed on": "x = self.norm(x)\nx = self.act(x)\nx = checkpoint(self.act, x)",
    "norm alone": "x = self.norm(x)\nx = self.act(x)\nx = self.norm(x)",
    "norm handed on": "x = self.norm(x)\nx = self.act(x)\nx = checkpoint(self.norm, x)",
    "one branch": "if y:\n    x = self.norm(x)\nx = self.act(x)",
    "another branch": "if y:\n    x = self.norm(x)\nelse:\n    x = y * 2\nx = self.act(x)",
    "another call": "if y:\n    x = self.norm(x)\nelse:\n    x = f(x)\nx = self.act(x)",
}


@pytest.mark.parametrize("text", FOLLOWS.values(), ids=list(FOLLOWS))
def test_source_shows_what_follows(text: str) -> None:
    assert source.follows(text, ("norm",), "act")


@pytest.mark.parametrize("text", FOLLOWS_NOT.values(), ids=list(FOLLOWS_NOT))
def test_source_shows_what_does_not_follow(text: str) -> None:
    assert not source.follows(text, ("norm",), "act")


class Untraceable(nn.Module):
    """Has a norm and an activation in a row; the number of channels decides what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.other = nn.GroupNorm(2, 8), nn.SiLU(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = self.act(x)
        return x if x.shape[0] > 1 else self.other(x)


class CallsElsewhere(Untraceable):
    """Calls the activation in a method, too."""

    def activate(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(x)
        return y


def test_activation_of_an_untraceable_forward_is_read_from_its_source() -> None:
    model, x = Untraceable(), random(1, 8, 5, dtype=torch.float32)
    expected = model(x)
    assert convert(model).folded == [("norm", "silu")]
    assert type(model) is Untraceable
    torch.testing.assert_close(model(x), expected)
    elsewhere = CallsElsewhere()
    (reason,) = convert(elsewhere).replaced
    assert "decides by the values or shapes of tensors" in reason[1]
    assert type(elsewhere.act) is nn.SiLU
