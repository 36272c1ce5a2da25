"""Models: parameter counts from the papers, shapes, shortcuts by hand, initialisation, and that every norm trains."""

import copy
import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from noisysam.core.errors import UserError
from noisysam.core.registry import summary
from noisysam.models import MODELS, Architecture, build
from noisysam.models.blocks import NORMS, BasicBlock, BatchNorm, PadShortcut, PreActBlock
from noisysam.models.compilation import compiled

PINNED = {
    "resnet8": 75_290,
    "resnet14": 172_506,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet32-wide": 29_442_378,
    "preact-resnet18": 11_172_170,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "wrn-28-10": 36_479_194,
    "cnn9": 4_432_522,
    "cnn8": 1_638_762,
}
# Millions of parameters as the papers print them (arXiv 1512.03385 table 6, arXiv 1605.07146 table 4).
PUBLISHED = {
    "resnet20": 0.27,
    "resnet32": 0.46,
    "resnet44": 0.66,
    "resnet56": 0.85,
    "resnet110": 1.7,
    "wrn-28-10": 36.5,
}
SMALL = {name: 0.0625 if count > 5e6 else 0.5 for name, count in PINNED.items()}  # widths that keep the tests fast


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def stage(inputs: int, outputs: int, blocks: int) -> int:
    """Weights of the 3x3 convolutions of a stage of two-convolution blocks."""
    return 9 * inputs * outputs + 9 * outputs * outputs * (2 * blocks - 1)


def test_every_model_is_pinned_and_says_where_it_comes_from() -> None:
    assert list(MODELS) == list(PINNED)
    for _, architecture in MODELS.items():
        assert architecture.source
        assert architecture.revision >= 1
        assert summary(architecture).endswith(".")


@pytest.mark.parametrize("name", PINNED)
def test_parameter_count(name: str) -> None:
    with torch.device("meta"):
        network = MODELS[name](10, 3, lambda width: width, "batch")
    assert parameters(network) == PINNED[name]
    if name in PUBLISHED:
        assert PINNED[name] / 1e6 == pytest.approx(PUBLISHED[name], abs=0.05 if PUBLISHED[name] > 1 else 0.005)


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 56, 110])
def test_he_family_by_formula(depth: int) -> None:
    n = (depth - 2) // 6
    convolutions = 27 * 16 + stage(16, 16, n) + stage(16, 32, n) + stage(32, 64, n)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    assert PINNED[f"resnet{depth}"] == convolutions + norms + 64 * 10 + 10


def test_larger_models_by_formula() -> None:
    body = stage(64, 64, 2) + stage(64, 128, 2) + stage(128, 256, 2) + stage(256, 512, 2)
    projections = 64 * 128 + 128 * 256 + 256 * 512
    norms = 2 * (64 + 4 * (64 + 128 + 256 + 512) + 128 + 256 + 512)
    assert PINNED["resnet18"] == 27 * 64 + body + projections + norms + 5130
    opening = 2 * (64 + 64 + 64 + 128 + 128 + 256 + 256 + 512)  # the norm before each block; the next line: inside
    inside = 2 * 2 * (64 + 128 + 256 + 512)
    assert PINNED["preact-resnet18"] == 27 * 64 + body + projections + opening + inside + 2 * 512 + 5130

    body = stage(64, 128, 5) + stage(128, 256, 5) + stage(256, 512, 5)
    opening = 2 * (64 + 4 * 128 + 128 + 4 * 256 + 256 + 4 * 512)
    assert PINNED["resnet32-wide"] == 27 * 64 + body + opening + 2 * 5 * (128 + 256 + 512) + 2 * 512 + 5130

    body = stage(16, 160, 4) + stage(160, 320, 4) + stage(320, 640, 4)
    projections = 16 * 160 + 160 * 320 + 320 * 640
    opening = 2 * (16 + 3 * 160 + 160 + 3 * 320 + 320 + 3 * 640)
    inside = 2 * 4 * (160 + 320 + 640)
    assert PINNED["wrn-28-10"] == 27 * 16 + body + projections + opening + inside + 2 * 640 + 6410


def test_plain_networks_by_formula() -> None:
    """The authors' have biases of 2,304 (Co-teaching) and 1,032 (APL) before their norms, which take them away."""
    pairs = [(3, 128), (128, 128), (128, 128), (128, 256), (256, 256), (256, 256), (256, 512), (512, 256), (256, 128)]
    convolutions = sum(9 * i * o for i, o in pairs)
    assert PINNED["cnn9"] == convolutions + 2 * sum(o for _, o in pairs) + 128 * 10 + 10
    pairs = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 196), (196, 196)]
    dense = 4 * 4 * 196 * 256
    assert PINNED["cnn8"] == sum(9 * i * o for i, o in pairs) + dense + 2 * (sum(o for _, o in pairs) + 256) + 2570


def test_nine_convolutions_beside_the_authors_forward() -> None:
    """bhanML/Co-teaching model.py, evaluated: pooling after three and six layers, no padding in the last three."""
    network = build("cnn9", 10, width=0.125).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(1))
            module.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    x = h = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(convolutions) == 9
    for layer, (convolution, norm) in enumerate(zip(convolutions, norms, strict=True), start=1):
        h = F.conv2d(h, convolution.weight, padding=0 if layer > 6 else 1)
        h = F.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        h = F.leaky_relu(h, 0.01)
        h = F.max_pool2d(h, 2) if layer in (3, 6) else h
    assert h.shape[2:] == (2, 2)
    expected = F.linear(F.avg_pool2d(h, 2).flatten(1), network.head.weight, network.head.bias)
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
    assert sum(isinstance(m, nn.Dropout2d) and m.p == 0.25 for m in network.modules()) == 2


def test_eight_layers_beside_the_authors_forward() -> None:
    """HanxunH/Active-Passive-Losses models.py ToyModel, evaluated: its dense layer reads the flattened 4 x 4 image."""
    network = build("cnn8", 10, width=0.25).eval()
    x = h = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer, (convolution, norm) in enumerate(zip(convolutions, norms, strict=True), start=1):
        if layer < 7:
            h = F.conv2d(h, convolution.weight, padding=1)
        else:
            h = F.linear(h.flatten(1), convolution.weight.flatten(1))[:, :, None, None]
        h = F.relu(F.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias))
        h = F.max_pool2d(h, 2) if layer in (2, 4, 6) else h
    torch.testing.assert_close(network(x), F.linear(h.flatten(1), network.head.weight, network.head.bias))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", PINNED)
def test_shapes_blocks_and_features(name: str, norm: str) -> None:
    network = build(name, 7, 1, width=SMALL[name], norm=norm).eval()
    x = torch.rand(3, 1, 8, 8)
    features = network.features(x)
    assert features.shape == (3, network.head.in_features)
    assert network(x).shape == (3, 7)
    assert torch.equal(network(x), network.head(features))
    names = [block for block, _ in network.named_blocks()]
    assert names == ["stem", *(f"stage{i + 1}" for i in range(len(MODELS[name].widths))), "head"]
    held = [id(parameter) for _, block in network.named_blocks() for parameter in block.parameters()]
    assert sorted(held) == sorted(map(id, network.parameters()))


@pytest.mark.parametrize("name", ["resnet20", "resnet32-wide", "preact-resnet18", "wrn-28-10"])
def test_cifar_inputs_resolution_and_memory_format(name: str) -> None:
    network = build(name, 10, width=SMALL[name]).eval()
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    stages = len(MODELS[name].widths)
    assert network.blocks(torch.rand(2, 3, 32, 32)).shape[2:] == (32 >> (stages - 1),) * 2
    weight = network.blocks.get_submodule("stage2.0.conv1").weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_odd_sizes_work_with_parameter_free_shortcuts() -> None:
    for name in ("resnet8", "resnet32-wide"):
        assert build(name, 10, width=SMALL[name]).eval()(torch.rand(2, 3, 30, 30)).shape == (2, 10)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build("resnet8", 10, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second = build("resnet8", 10, seed=5).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = build("resnet8", 10, seed=6).state_dict()
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert not torch.equal(first["blocks.stem.0.weight"], other["blocks.stem.0.weight"])


@pytest.mark.parametrize("name", ["resnet18", "wrn-28-10"])
def test_convolutions_are_kaiming_normal_by_fan_out(name: str) -> None:
    network = build(name, 10, width=0.25)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            expected = math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
            assert module.bias is None


def test_option_a_shortcut_by_hand() -> None:
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    out = PadShortcut(2, 5, 2, pool=False)(x)
    assert out.shape == (1, 5, 2, 2)
    assert out[0, 1].tolist() == [[0, 2], [8, 10]]
    assert out[0, 2].tolist() == [[16, 18], [24, 26]]
    assert out[0, [0, 3, 4]].abs().sum() == 0


def test_pooled_shortcut_by_hand() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    out = PadShortcut(1, 3, 2, pool=True)(x)
    assert out[0, 1].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert out[0, [0, 2]].abs().sum() == 0


def test_without_norms_a_network_starts_as_its_shortcuts() -> None:
    x = torch.randn(4, 3, 32, 32)
    network = build("resnet20", 10, norm="none")
    stem = F.conv2d(x, network.blocks.get_submodule("stem.0").weight, padding=1).relu()
    expected = torch.zeros(4, 64)
    expected[:, 24:40] = stem[:, :, ::4, ::4].mean((2, 3))
    torch.testing.assert_close(network.features(x), expected)

    network = build("resnet32-wide", 10, width=0.125, norm="none")
    stem = F.leaky_relu(F.conv2d(x, network.blocks.get_submodule("stem.0").weight, padding=1), 0.1)
    expected = torch.zeros(4, 64)
    expected[:, 28:36] = F.leaky_relu(F.avg_pool2d(stem, 4), 0.1).mean((2, 3))
    torch.testing.assert_close(network.features(x), expected)


def test_without_norms_convolutions_have_biases_and_scaled_branches() -> None:
    network = build("resnet20", 10, norm="none")
    blocks = [module for module in network.modules() if isinstance(module, BasicBlock)]
    assert len(blocks) == 9
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            assert module.bias.abs().sum() == 0
    for block in blocks:
        expected = math.sqrt(2 / (9 * block.conv1.out_channels)) / 3  # 9 blocks: scaled by 9 ** -0.5
        assert block.conv1.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert block.conv2.weight.abs().sum() == 0


def test_projection_reads_the_activated_input_and_identity_the_raw_one() -> None:
    network = build("preact-resnet18", 10, width=0.125, norm="none")
    x = torch.randn(2, 8, 8, 8)
    plain, projecting = network.blocks.get_submodule("stage1.0"), network.blocks.get_submodule("stage2.0")
    assert isinstance(plain, PreActBlock)
    assert isinstance(projecting, PreActBlock)
    torch.testing.assert_close(plain(x), x)
    torch.testing.assert_close(projecting(x), F.conv2d(x.relu(), projecting.shortcut.weight, stride=2))


def test_mentormix_stem_activates_then_normalises() -> None:
    network = build("resnet32-wide", 10, width=0.125)
    stem = network.blocks.get_submodule("stem")
    assert [type(layer) for layer in stem.children()] == [nn.Conv2d, nn.LeakyReLU, BatchNorm]
    assert isinstance(network.blocks.get_submodule("stage1.0.open"), nn.Identity)
    assert {m.eps for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)} == {0.1}
    assert not any(isinstance(m, nn.ReLU) for m in network.modules())


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("name", ["resnet8", "preact-resnet18", "resnet18"])
def test_rows_are_independent_without_batch_norm(name: str, norm: str) -> None:
    network = build(name, 10, width=0.25, norm=norm).train()
    with torch.no_grad():
        for parameter in network.parameters():  # away from the zeros of the initialisation
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    changed[1:] = 3 * changed[1:] + 1
    assert torch.allclose(network(x)[0], network(changed)[0], atol=1e-5)
    assert not torch.allclose(network(x)[1], network(changed)[1], atol=1e-2)


def test_width_multiplies_and_group_norm_keeps_whole_groups() -> None:
    assert build("resnet8", 10, width=0.5).head.in_features == 32
    assert build("resnet8", 10, width=1.3).head.in_features == 83
    assert build("resnet8", 10, width=0.001).head.in_features == 1
    assert build("resnet8", 10, width=1.3, norm="group").head.in_features == 80
    assert build("resnet8", 10, width=0.001, norm="group").head.in_features == 16
    groups = [m for m in build("resnet8", 10, norm="group").modules() if isinstance(m, nn.GroupNorm)]
    assert {m.num_channels // m.num_groups for m in groups} == {2, 4, 8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet33"}, "did you mean"),
        ({"name": "resnet8", "norm": "layer"}, "batch, group, none"),
        ({"name": "resnet8", "width": 0.0}, "positive"),
        ({"name": "resnet8", "width": -1.0}, "positive"),
        ({"name": "resnet8", "width": math.nan}, "positive"),
        ({"name": "resnet8", "width": math.inf}, "positive"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(classes=10, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "width", "norm"),
    [
        ("resnet8", 0.5, "batch"),
        ("resnet8", 0.5, "group"),
        ("resnet8", 0.5, "none"),
        ("resnet44", 0.5, "none"),
        ("resnet32-wide", 0.125, "none"),
        ("preact-resnet18", 0.125, "group"),
        ("cnn9", 0.125, "batch"),
        ("cnn8", 0.25, "group"),
    ],
)
def test_a_few_steps_reduce_the_loss(name: str, width: float, norm: str) -> None:
    rows, columns = torch.arange(8.0)[:, None].expand(8, 8), torch.arange(8.0).expand(8, 8)
    stripes = torch.stack([t % 2 * 2 - 1 for t in (rows, columns, rows + columns, rows // 2)])[:, None]
    labels = torch.arange(32) % 4
    x = stripes[labels] + 0.3 * torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network = build(name, 4, 1, width=width, norm=norm).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 3
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("name", ["resnet8", "resnet32-wide", "cnn9", "cnn8"])
def test_bf16_autocast_and_whole_graph_compilation(name: str) -> None:
    network = build(name, 10, width=SMALL[name]).eval()
    x = torch.rand(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), network(x), atol=0.1)
    whole = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.allclose(whole(x), network(x), atol=1e-5)


@pytest.mark.slow
def test_every_form_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many a run has, past torch's own limit: a run that resumes late compiles the last ones too."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, dynamic, options: real(module, dynamic=dynamic, backend=count))
    forward = compiled(build("resnet8", 10, width=0.25).eval())
    for rows in range(2, 14):
        forward(torch.rand(rows, 3, 8, 8))
    assert len(graphs) == 12


SMALLEST = {
    "post-activation": Architecture("Two blocks.", BasicBlock, 16, (16, 32), (1, 1), "subsample"),
    "pre-activation": Architecture("Two leaky blocks.", PreActBlock, 16, (16, 32), (1, 1), "pool", slope=0.1),
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
@pytest.mark.parametrize("name", SMALLEST)
def test_compiled_for_a_cpu_a_network_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    plain = SMALLEST[name](10, 3, lambda count: count, "batch").to(memory_format=torch.channels_last)
    other = copy.deepcopy(plain)
    fast = compiled(other)
    x = (3 + 2 * torch.randn(16, 3, 8, 8)).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (16,))
    for network, forward in ((plain, plain), (other, fast)):
        F.cross_entropy(forward(x), labels).backward()
        network.eval()
    for (place, p), q in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert torch.allclose(p.grad, q.grad, atol=1e-5), place
    for (place, b), c in zip(plain.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(b, c, atol=1e-5), place
    with torch.no_grad():
        assert torch.allclose(plain(x), fast(x), atol=1e-5)


# networks of other libraries


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        ("timm:resnet18", 8, 1),
        ("timm:mobilenetv3_small_050", 32, 3),
        ("timm:vit_tiny_patch16_224", 32, 1),
        ("timm:resnetv2_50", 64, 3),
        ("torchvision:resnet18", 16, 1),
        ("torchvision:mobilenet_v3_small", 96, 4),
        pytest.param("torchvision:vit_b_16", 32, 3, marks=pytest.mark.slow),
    ],
)
def test_networks_of_other_libraries(name: str, size: int, channels: int) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="needs the extra 'timm'")
    state = torch.get_rng_state()
    network = build(name, 7, channels, size=size, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(0))
    network.eval()
    assert network(x).shape == (3, 7)
    if name != "timm:resnetv2_50":  # its last layer is a convolution
        assert network.features(x).shape == (3, network.head.in_features)
        torch.testing.assert_close(network.head(network.features(x)), network(x))
    same, other = build(name, 7, channels, size=size, seed=1), build(name, 7, channels, size=size, seed=2)
    pairs = zip(network.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(same.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_small_images_get_the_stem_of_the_cifar_networks(library: str) -> None:
    """As ``resnet18`` of this package, whose parameters it then has."""
    pytest.importorskip(library)
    theirs = build(f"{library}:resnet18", 10, size=32)
    assert parameters(theirs) == parameters(build("resnet18", 10))
    sides = []
    theirs.body.layer4.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    theirs.eval()(torch.zeros(1, 3, 32, 32))
    assert sides == [4]
    assert build(f"{library}:resnet18", 10, size=224).body.conv1.stride == (2, 2)


def test_a_network_that_shrinks_small_images_says_so() -> None:
    pytest.importorskip("timm", reason="needs the extra 'timm'")
    with pytest.warns(UserWarning, match="shrinks images of 32 pixels to 1 x 1"):
        build("timm:convnext_atto", 10, size=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "timm:resnet81"}, "unknown timm model 'resnet81', did you mean"),
        ({"name": "timm:hf-hub:somebody/something"}, "unknown timm model"),
        ({"name": "torchvision:resnet81"}, "unknown torchvision model"),
        ({"name": "torchvision:fasterrcnn_resnet50_fpn"}, "unknown torchvision model"),
        ({"name": "torchvision:resnet18", "width": 0.5}, "has no --width"),
        ({"name": "torchvision:resnet18", "norm": "group"}, "has no --norm"),
        ({"name": "torchvision:vit_b_16", "size": 20}, "does not take images of 20 x 20 x 3"),
    ],
)
def test_faults_of_other_libraries_are_told_in_one_line(arguments: dict[str, Any], message: str) -> None:
    if arguments["name"].startswith("timm"):
        pytest.importorskip("timm", reason="needs the extra 'timm'")
    with pytest.raises(UserError, match=message) as caught:
        build(classes=10, **arguments)
    assert "\n" not in str(caught.value)


def test_weights_of_a_run_and_of_a_library(tmp_path: Any) -> None:
    from noisysam.models import weights_file
    from noisysam.runs.record import RunFolder

    trained = build("resnet8", 10, 1, width=0.25, seed=5)
    (tmp_path / "run").mkdir()
    RunFolder(tmp_path, "run").write_weights([trained])
    path = tmp_path / "run" / "weights.safetensors"
    same = build("resnet8", 10, 1, width=0.25, weights=path)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), same.parameters(), strict=True))
    fewer = build("resnet8", 4, 1, width=0.25, weights=path)  # another head
    assert torch.equal(fewer.blocks.stem[0].weight, trained.blocks.stem[0].weight)
    assert torch.equal(fewer.head.weight, build("resnet8", 4, 1, width=0.25).head.weight)
    with pytest.raises(UserError, match=r"is not in it, or in another shape: it is another network's"):
        build("resnet8", 10, 3, width=0.25, weights=path)
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bad.pt: cannot be read as weights") as caught:
        build("resnet8", 10, weights=tmp_path / "bad.pt")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        weights_file("resnet8", str(tmp_path / "nowhere.pt"))
    with pytest.raises(UserError, match="cache is for timm"):
        weights_file("resnet8", "cache")


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pretrained_weights_of_a_library(library: str, channels: int, tmp_path: Any) -> None:
    """The file as the library saves it; another number of classes leaves the head new."""
    made = pytest.importorskip(library)
    if library == "timm":
        theirs = made.create_model("resnet18", num_classes=1000)
    else:
        theirs = made.models.resnet18(num_classes=1000)
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    ours = build(f"{library}:resnet18", 10, channels, size=32, weights=path)
    assert torch.equal(ours.body.layer3[0].conv1.weight, theirs.layer3[0].conv1.weight)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    if channels == 3:  # no stem of ours: the weights are for theirs
        theirs.fc = nn.Identity()
        torch.testing.assert_close(ours.eval().features(x), theirs.eval()(x))
    else:  # a grey image stands for three equal channels
        theirs.fc = nn.Identity()
        grey = x[:, :1]
        torch.testing.assert_close(ours.eval().features(grey), theirs.eval()(grey.expand(-1, 3, -1, -1)))


def test_weights_not_in_the_cache_are_one_line() -> None:
    pytest.importorskip("timm", reason="needs the extra 'timm'")
    from noisysam.models import weights_file

    with pytest.raises(UserError, match="are not in the local cache of huggingface_hub"):
        weights_file("timm:resnet18", "cache")
