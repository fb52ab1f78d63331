"""Residual networks: parity that the table of families does not ask; CLIP's own kind against a plain reference."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from vlmpipe.errors import UserError
from vlmpipe.models.parity import random_module
from vlmpipe.models.pretrained import convert
from vlmpipe.models.pretrained.keys import to_theirs
from vlmpipe.models.pretrained.resnet import keys
from vlmpipe.models.resnet import ResNetConfig
from vlmpipe.models.vision import VisionConfig, build_vision

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def shaken(model, seed=0):
    """Weights and statistics of the norms that make every place count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.normal_(generator=generator)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
    return model


VARIANTS = [
    {},
    {"layer_type": "basic"},
    {"downsample_in_bottleneck": True},
    {"downsample_in_first_stage": True},
    {"hidden_sizes": [8, 12], "depths": [1, 2]},
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("changes", VARIANTS)
def test_equals_transformers_with_the_statistics_of_either_mode(changes, training):
    config, theirs = random_module("resnet", **changes)
    shaken(theirs)
    ours = convert(config.to_dict(), theirs.state_dict())
    ours.train(training), theirs.train(training)
    pixels = torch.randn(3, 3, 67, 75)
    found, expected = ours(pixels), theirs(pixels).last_hidden_state.flatten(2).transpose(1, 2)
    assert error(found, expected) <= TOLERANCE
    share = torch.randn_like(found)
    (found * share).sum().backward()
    (expected * share).sum().backward()
    names = keys(ours.config)
    gradients = {name: weight.grad for name, weight in ours.named_parameters()}
    gradients = to_theirs(gradients, {name: rows for name, rows in names.items() if name in gradients})
    assert gradients.keys() == dict(theirs.named_parameters()).keys()
    for name, weight in theirs.named_parameters():
        # Gradients of weights before a norm are sums that almost cancel.
        assert error(gradients[name], weight.grad) <= (10 * TOLERANCE if training else TOLERANCE), name
    state = to_theirs(ours.state_dict(), names)
    for name, value in theirs.state_dict().items():
        assert torch.allclose(state[name], value, rtol=1e-5, atol=1e-6), name


def test_a_frozen_network_keeps_its_statistics():
    model = build_vision(VisionConfig(resnet=ResNetConfig((8, 16), (1, 1)), patch_size=8, image_size=32)).train()
    model.requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_buffers()}
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(pixels), model.eval()(pixels))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


# --- CLIP's kind, written from section 2.4 of arXiv 2103.00020 and the released weights' names ---------------------


class Norm(torch.nn.BatchNorm2d):
    pass


class PlainBlock(torch.nn.Module):
    def __init__(self, before, inner, stride):
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(before, inner, 1, bias=False), Norm(inner)
        self.conv2, self.bn2 = torch.nn.Conv2d(inner, inner, 3, padding=1, bias=False), Norm(inner)
        self.conv3, self.bn3 = torch.nn.Conv2d(inner, 4 * inner, 1, bias=False), Norm(4 * inner)
        self.stride = stride
        self.down = None
        if stride > 1 or before != 4 * inner:
            self.down = torch.nn.Conv2d(before, 4 * inner, 1, bias=False)
            self.down_norm = Norm(4 * inner)

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = F.avg_pool2d(y, self.stride)
        y = self.bn3(self.conv3(y))
        if self.down is not None:
            x = self.down_norm(self.down(F.avg_pool2d(x, self.stride)))
        return (x + y).relu()


class Plain(torch.nn.Module):
    """A stem of three convolutions, stages of blocks, and torch's own attention as the pool."""

    def __init__(self, width, depths, side, heads):
        super().__init__()
        half = width // 2
        self.convs = torch.nn.ModuleList(
            [
                torch.nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False),
                torch.nn.Conv2d(half, half, 3, padding=1, bias=False),
                torch.nn.Conv2d(half, width, 3, padding=1, bias=False),
            ]
        )
        self.norms = torch.nn.ModuleList([Norm(half), Norm(half), Norm(width)])
        blocks, before = [], width
        for stage, depth in enumerate(depths):
            for number in range(depth):
                blocks.append(PlainBlock(before, width * 2**stage, 2 if stage and number == 0 else 1))
                before = 4 * width * 2**stage
        self.blocks = torch.nn.Sequential(*blocks)
        self.places = torch.nn.Parameter(torch.randn(side**2 + 1, before))
        self.attention = torch.nn.MultiheadAttention(before, heads, batch_first=True)
        self.attention.out_proj = torch.nn.Linear(before, 10)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms):
            x = norm(conv(x)).relu()
        tokens = self.blocks(F.avg_pool2d(x, 2)).flatten(2).transpose(1, 2)
        row = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.places
        query = row[:, :1]
        weights = self.attention
        row, query = row.transpose(0, 1), query.transpose(0, 1)
        return tokens, F.multi_head_attention_forward(
            query, row, row, row.shape[2], weights.num_heads, weights.in_proj_weight, weights.in_proj_bias,
            None, None, False, 0.0, weights.out_proj.weight, weights.out_proj.bias, need_weights=False,
        )[0][0]


def plain_to_ours(plain, depths):
    """Our state, of the encoder and of the projection after it."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    source, state = plain.state_dict(), {}

    def layer(ours, number, conv, bn):
        state[f"{ours}.{number}.weight"] = source[f"{conv}.weight"]
        state.update({f"{ours}.{number + 1}.{name}": source[f"{bn}.{name}"] for name in norm})

    for number in range(3):
        layer("stem", 3 * number, f"convs.{number}", f"norms.{number}")
    at = 0
    for stage, depth in enumerate(depths):
        for block in range(depth):
            ours, theirs = f"stages.{stage}.{block}", f"blocks.{at}"
            halves = stage > 0 and block == 0
            layer(f"{ours}.branch", 0, f"{theirs}.conv1", f"{theirs}.bn1")
            layer(f"{ours}.branch", 3, f"{theirs}.conv2", f"{theirs}.bn2")
            layer(f"{ours}.branch", 7 if halves else 6, f"{theirs}.conv3", f"{theirs}.bn3")
            if block == 0:
                layer(f"{ours}.shortcut", 1 if halves else 0, f"{theirs}.down", f"{theirs}.down_norm")
            at += 1
    for kind in ("weight", "bias"):
        parts = source[f"attention.in_proj_{kind}"].chunk(3)
        state |= {f"attention_pool.{name}.{kind}": part for name, part in zip(("query", "key", "value"), parts)}
    state["attention_pool.position_embedding"] = source["places"]
    return state


@pytest.mark.parametrize("training", [False, True])
def test_clips_kind_equals_a_plain_reference(training):
    width, depths = 4, (2, 1, 1)
    config = ResNetConfig(
        widths=(16, 32, 64), depths=depths, stem="triple", stem_width=width, shrink="average", pool_heads=4
    )
    ours = build_vision(VisionConfig(resnet=config, patch_size=16, image_size=48))
    plain = shaken(Plain(width, depths, 3, 4))
    ours.load_state_dict(plain_to_ours(plain, depths))
    ours.train(training), plain.train(training)
    projection = torch.nn.Linear(64, 10)
    projection.load_state_dict(plain.attention.out_proj.state_dict())
    pixels = torch.randn(2, 3, 48, 48)
    tokens = ours(pixels)
    found = projection(ours.pool(tokens))
    expected_tokens, expected = plain(pixels)
    assert error(tokens, expected_tokens) <= TOLERANCE and error(found, expected) <= TOLERANCE
    share = torch.randn_like(found)
    (found * share).sum().backward()
    (expected * share).sum().backward()
    for ours_weight, plain_weight in (
        (ours.stem[0], plain.convs[0]), (ours.stages[1][0].branch[7], plain.blocks[2].conv3),
        (ours.stages[1][0].shortcut[1], plain.blocks[2].down), (projection, plain.attention.out_proj),
    ):
        assert error(ours_weight.weight.grad, plain_weight.weight.grad) <= 10 * TOLERANCE
    assert error(ours.attention_pool.position_embedding.grad, plain.places.grad) <= TOLERANCE


def test_an_attention_pool_wants_its_size():
    config = ResNetConfig(widths=(16, 32), depths=(1, 1), pool_heads=4)
    model = build_vision(VisionConfig(resnet=config, patch_size=8, image_size=32))
    with pytest.raises(UserError, match="found 24 places; the attention pool expects 16"):
        model.pool(model(torch.randn(1, 3, 32, 48)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1,)}, "expected one a stage"),
        ({"widths": (6, 8)}, "multiples of 4"),
        ({"block": "basic", "shrink": "average"}, "expected 'middle'"),
        ({"pool_heads": 3}, "expected a divisor of 8"),
        ({"stem_width": 0}, "expected at least 1"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ResNetConfig(**{"widths": (8, 8), "depths": (1, 1), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 16}, "expected 8, the stride of this resnet"),
        ({"class_token": True}, "expected none of them"),
        ({"resnet": None}, "expected exactly one"),
    ],
)
def test_so_are_encoders(changes, message):
    given = {"resnet": ResNetConfig((8, 8), (1, 1)), "patch_size": 8, "image_size": 32}
    with pytest.raises(UserError, match=message):
        VisionConfig(**{**given, **changes})


def test_transformers_has_its_published_size():
    """What the count of ResNet-50 in tests/models/published rests on."""
    with torch.device("meta"):
        theirs = transformers.ResNetModel(transformers.ResNetConfig())
        ours = build_vision(VisionConfig(resnet=ResNetConfig(), patch_size=32))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 23_508_032
