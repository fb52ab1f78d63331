"""Pictures at their own size: who sees whom, how they are packed, and what comes out of the whole model."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from PIL import Image

from tests.models.tiny import TEXTS
from vlmpipe.config import parse
from vlmpipe.errors import UserError
from vlmpipe.models import VLMConfig, build, from_huggingface, to_huggingface
from vlmpipe.models.generate import picture_inputs
from vlmpipe.models.layers import TransformerConfig, attend, attend_within
from vlmpipe.models.native import NativeConfig, fit, pack, plan
from vlmpipe.models.places import picture_positions, row_positions, token_count
from vlmpipe.models.text import PADDING, SHARED
from vlmpipe.models.vision import VisionConfig, build_vision

GRIDS = ((1, 4, 6), (2, 6, 4), (1, 2, 2), (1, 10, 8))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tower(**changes):
    native = NativeConfig(**{"window": 20, "full_layers": (1,), **changes})
    transformer = TransformerConfig(24, 3, 3, hidden=40, norm="rms", activation="silu", gated=True)
    config = VisionConfig(transformer, native=native, image_size=40, patch_size=5, positions="none")
    return build_vision(config).eval()


def patches(grids, model):
    return torch.randn(sum(t * y * x for t, y, x in grids), model.stem.in_features)


def run(model, pixels, grids):
    return model(pixels, grids=torch.tensor(grids))


def test_packing_changes_no_picture():
    """No token of one picture sees another's, and frames of a video see their own frame alone."""
    model = tower()
    pixels = patches(GRIDS, model)
    together = run(model, pixels, GRIDS)[0].split([token_count(grid, 2) for grid in GRIDS])
    for part, grid, tokens in zip(pixels.split([t * y * x for t, y, x in GRIDS]), GRIDS, together, strict=True):
        torch.testing.assert_close(run(model, part, [grid])[0], tokens)
    video = together[1].chunk(2)
    frame = pixels.split([t * y * x for t, y, x in GRIDS])[1][: 6 * 4]
    torch.testing.assert_close(run(model, frame, [(1, 6, 4)])[0], video[0])


@pytest.mark.parametrize("grid", [(1, 10, 8), (2, 6, 10)])
def test_layers_see_their_window_or_their_frame(grid):
    """Which patches each output depends on, by gradients, against the rule spelled out."""
    t, y, x = grid
    places = plan((grid,), 2, 4).places
    frames = np.repeat(np.arange(t), y * x)
    for full_layers in ((), (0,)):
        model = tower(full_layers=full_layers)
        model.transformer.blocks = model.transformer.blocks[:1]
        pixels = patches([grid], model).requires_grad_()
        tokens = run(model, pixels, [grid])[0].unflatten(1, (4, -1)).flatten(0, 1)  # a row for each patch
        for patch in (0, 1, len(tokens) // 3, len(tokens) - 1):
            gradient = torch.autograd.grad(tokens[patch].square().sum(), pixels, retain_graph=True)[0]
            seen = gradient.abs().sum(dim=1).numpy() > 0
            expected = frames == frames[patch]
            if not full_layers:
                expected = expected & (places // 4 == places[patch] // 4).all(axis=1)
            assert (seen == expected).all()


def test_spans_cover_every_patch_once():
    for window in (0, 2, 4, 6):
        found = plan(GRIDS, 2, window)
        total = sum(t * y * x for t, y, x in GRIDS)
        for order, spans in (found.windows, found.frames):
            assert sorted(order) == list(range(total))
            assert sum(count * length for count, length in spans) == total
            assert len({length for _, length in spans}) == len(spans)


def test_pictures_of_one_size_need_no_grids():
    model = tower()
    pictures = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (30, 40, 3), np.uint8)) for n in range(3)]
    packed, grids = pack([[picture] for picture in pictures], model.config)
    assert packed.dtype == torch.uint8 and grids.tolist() == [[1, 6, 8]] * 3
    square = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    tokens = model(square)
    assert tokens.shape == (3, 12, 96) and model.pool(tokens).shape == (3, 96)
    torch.testing.assert_close(tokens.flatten(0, 1), model(packed, grids=grids)[0])


@pytest.mark.parametrize("size", [(640, 480), (33, 71), (500, 31), (57, 57), (3000, 2000)])
@pytest.mark.parametrize("limits", [(3136, 1003520), (20000, 40000)])
def test_packing_equals_transformers(size, limits):
    """The sizes, the patches' order and their pixels, also of pictures that must shrink or grow."""
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), np.uint8)).resize(size)
    config = VisionConfig(
        TransformerConfig(8, 1, 1), native=NativeConfig(min_pixels=limits[0], max_pixels=limits[1]), image_size=1008,
        patch_size=14, positions="none",
    )
    theirs = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": limits[0], "longest_edge": limits[1]})
    expected = theirs(images=[picture], return_tensors="pt")
    found, grids = pack([[picture]], config)
    assert torch.equal(grids, expected["image_grid_thw"])
    assert grids[0, 1:].tolist() == [side // 14 for side in fit(size[1], size[0], 28, *limits)]
    normalised = build_vision(config).normalise(found.view(len(found), 3, -1)).view(len(found), -1)
    torch.testing.assert_close(normalised, expected["pixel_values"].float(), rtol=1e-5, atol=1e-5)


def test_videos_are_packed_in_time():
    model = tower()
    frames = [Image.fromarray(np.full((20, 10, 3), value, np.uint8)) for value in (10, 20, 30)]
    packed, grids = pack([frames], model.config)
    assert grids.tolist() == [[2, 4, 2]]  # the third frame is repeated
    packed = packed.view(2, 4 * 2, 3, 2, 25)
    assert packed[0, :, :, 0].unique().tolist() == [10] and packed[0, :, :, 1].unique().tolist() == [20]
    assert packed[1].unique().tolist() == [30]


def test_positions_spelled_out():
    assert picture_positions((2, 4, 4), 2, 2.5).tolist() == [
        [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [2, 0, 0], [2, 0, 1], [2, 1, 0], [2, 1, 1],
    ]
    # two words, a picture of 1 x 3 tokens, a word; a row of words; one whose picture all its texts share
    segments = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, PADDING], [SHARED] * 3 + [1, 2, 2]])
    places = torch.tensor([[0, 0, 1, 1, 1, 0], [0] * 6, [1, 1, 1, 0, 0, 0]]).bool()
    found = row_positions(segments, places, [(1, 2, 6), (1, 6, 2)], 2)
    assert found[0].tolist() == [[0] * 3, [1] * 3, [2, 2, 2], [2, 2, 3], [2, 2, 4], [5] * 3]
    assert found[1, :, 0].tolist() == [0, 1, 2, 0, 1, 0]
    assert found[2].tolist() == [[0, 0, 0], [0, 1, 0], [0, 2, 0], [3] * 3, [3] * 3, [4] * 3]
    with pytest.raises(UserError, match="expected it whole"):
        row_positions(segments[:1], places[:1], [(1, 2, 8)], 2)
    with pytest.raises(UserError, match="fewer grids"):
        row_positions(segments, places, [(1, 2, 6)], 2)
    with pytest.raises(UserError, match="more than 2 grids"):
        row_positions(segments, places, [(1, 2, 6), (1, 6, 2), (1, 2, 2)], 2)


def test_words_after_a_long_video_start_after_it():
    """One after the largest number before them, as in the paper."""
    segments, places = torch.ones(1, 5, dtype=torch.int64), torch.tensor([[True] * 4 + [False]])
    assert row_positions(segments, places, [(4, 2, 2)], 2, [3.0])[0, -1].tolist() == [10] * 3


# --- the whole model -------------------------------------------------------------------------------------

SMALL = {
    "vision": {
        "image_size": 32, "patch_size": 4, "positions": "none",
        "native": {"window": 16, "full_layers": [1], "min_pixels": 128},
        "transformer": {"width": 16, "depth": 2, "heads": 2, "hidden": 24, "norm": "rms", "gated": True},
    },
    "text": {
        "context": 96, "positions": "rotary", "rotary_sections": [1, 1, 2],
        "transformer": {"width": 32, "depth": 2, "heads": 4, "hidden": 48, "norm": "rms", "gated": True, "bias": False},
    },
    "fusion": {"kind": "prefix", "projector": "merger"},
    "heads": {"language_model": {}},
    "processor": {"resize": "native"},
}


def make(changes=()):
    model, processor = build(parse(VLMConfig, {**SMALL, **dict(changes)}, "native"), TEXTS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval(), processor


def noise(*sizes):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)) for height, width in sizes]


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_a_row_has_the_same_logits_alone(attention):
    """Pictures of several sizes before the rows, one row with two and one with none."""
    model, processor = make({"fusion": {**SMALL["fusion"], "attention": attention}}.items())
    packed, grids = pack([[each] for each in noise((24, 40), (16, 16), (30, 20))], model.config.vision)
    texts = [processor.encode(text).ids for text in ("a red circle", "blue", "a square")]
    length = max(map(len, texts))
    tokens = torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in texts])
    segments = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in texts])
    steps = torch.arange(length).expand_as(tokens)
    rows = torch.tensor([0, 0, 2])
    together = model(packed, tokens, segments, steps, image_rows=rows, grids=grids).logits
    parts = packed.split(grids.prod(dim=1).tolist())
    for row, ids in enumerate(texts):
        mine = [number for number, owner in enumerate(rows.tolist()) if owner == row]
        given = {"image_rows": torch.zeros(len(mine), dtype=torch.int64), "grids": grids[mine]} if mine else {}
        images = torch.cat([parts[number] for number in mine]) if mine else None
        alone = model(images, tokens[row : row + 1], segments[row : row + 1], steps[:1], **given).logits
        torch.testing.assert_close(together[row, : len(ids)], alone[0, : len(ids)], rtol=1e-4, atol=1e-5)


def test_before_the_row_is_in_the_row():
    """Where the pictures stand is data: the default is only a way to write it."""
    model, processor = make()
    packed, grids = pack([[each] for each in noise((24, 40))], model.config.vision)
    ids = torch.tensor([processor.encode("a red circle").ids])
    ones, steps = torch.ones_like(ids), torch.arange(ids.shape[1])[None]
    expected = model(packed, ids, ones, steps, grids=grids).logits
    count = token_count(tuple(grids[0].tolist()), 2)
    segments, places = F.pad(ones, (count, 0), value=SHARED), F.pad(ones * 0, (count, 0), value=1).bool()
    positions = row_positions(segments, places, [tuple(grids[0].tolist())], 2)
    found = model(packed, F.pad(ids, (count, 0)), segments, positions, image_places=places, grids=grids).logits
    assert torch.equal(found[:, count:], expected)


def test_uneven_patches_are_refused():
    model = tower()
    with pytest.raises(UserError, match="without grids"):
        model(patches(GRIDS, model))
    with pytest.raises(UserError, match=r"found 23 patches for grids .* expected 24"):
        run(model, patches(GRIDS, model)[:23], GRIDS[:1])
    with pytest.raises(UserError, match="sides that 2 divides"):
        run(model, patches([(1, 3, 4)], model), [(1, 3, 4)])
    with pytest.raises(UserError, match="expected multiples of 10"):
        model(torch.zeros(1, 3, 25, 40))
    with pytest.raises(UserError, match="within a factor of 200"):
        fit(1, 201, 28, 0, 10**6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 36, "patch_size": 4}, "multiples of 8"),
        ({"class_token": True}, "none of the others"),
        ({"positions": "learned"}, "positions: none"),
        ({"native": {"window": 12}}, "multiples of 8"),
        ({"native": {"window": 16, "full_layers": [2]}}, "expected under 2"),
        ({"native": {"min_pixels": 99, "max_pixels": 9}}, "over max_pixels"),
        ({"native": {"merge": 0}}, "expected at least 1"),
        ({"transformer": {"width": 12, "depth": 2, "heads": 2}}, "a multiple of 4"),
    ],
)
def test_configs_that_make_no_sense_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        parse(VisionConfig, {**SMALL["vision"], **change}, "vision")


def test_only_a_row_takes_pictures_of_several_sizes():
    projected = {"fusion": {"kind": "none"}, "heads": {"projection": {"width": 8}}}
    with pytest.raises(UserError, match=r"processor\.resize: found 'native' with vision\.native and fusion 'none'"):
        parse(VLMConfig, {**SMALL, **projected}, "native")
    parse(VLMConfig, {**SMALL, **projected, "processor": {"resize": "squash"}}, "native")


def test_attention_in_spans_is_attention_behind_a_mask():
    """What the windows' speed rests on."""
    spans = ((3, 4), (1, 5), (2, 1))
    query, key, value = torch.randn(3, 1, 2, 19, 8)
    owner = torch.tensor(list(itertools.chain.from_iterable(
        [number] * length for number, length in enumerate(length for count, length in spans for _ in range(count))
    )))
    mask = (owner[:, None] == owner[None])[None, None]
    torch.testing.assert_close(attend_within(query, key, value, spans), attend(query, key, value, mask, None))


def test_a_hugging_face_directory_brings_its_bounds_of_size(tmp_path):
    """And a model of our own, whatever its pictures' size, is one of Qwen2.5-VL's family."""
    config = yaml.safe_load((Path(__file__).parents[2] / "configs/model/qwen2.5-vl.yaml").read_text())["architecture"]
    model, _ = build(parse(VLMConfig, config, "qwen2.5-vl"), TEXTS)
    to_huggingface(model, None, tmp_path)
    transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 1600, "longest_edge": 9000}).save_pretrained(tmp_path)
    again, processor = from_huggingface(tmp_path)
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path), transformers.Qwen2_5_VLConfig)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    assert again.config.vision.native.max_pixels == 9000
    given = picture_inputs(again, processor, noise((300, 100)))
    assert given["grids"].tolist() == [[1, *(side // 8 for side in fit(300, 100, 16, 1600, 9000))]]
