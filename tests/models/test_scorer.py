"""Scorers from either world: the same numbers as their models give directly."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.models.tiny import pictures
from vlmpipe.errors import UserError
from vlmpipe.models import save
from vlmpipe.models.scorer import load_scorer

TEXTS = ["a red circle", "a blue square above a red circle", "circle"]


@pytest.fixture(scope="module")
def words():
    names = ["<pad>", "<eos>", "a", "red", "blue", "circle", "square", "above"]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", model_max_length=9
    )


TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 3}


def make_clip():
    torch.manual_seed(0)
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**TOWER, "vocab_size": 8, "max_position_embeddings": 9, "eos_token_id": 1},
            vision_config={**TOWER, "image_size": 16, "patch_size": 8},
            projection_dim=12,
        )
    ).eval()


def make_siglip():
    torch.manual_seed(0)
    return transformers.SiglipModel(
        transformers.SiglipConfig(
            text_config={**TOWER, "vocab_size": 8, "max_position_embeddings": 9, "projection_size": 24},
            vision_config={**TOWER, "image_size": 16, "patch_size": 8},
        )
    ).eval()


CLIP_PICTURES = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
CASES = {
    "clip": (make_clip, transformers.CLIPImageProcessorPil, CLIP_PICTURES, True),
    "siglip": (make_siglip, transformers.SiglipImageProcessorPil, {"size": {"height": 16, "width": 16}}, "max_length"),
}


@pytest.mark.parametrize("family", CASES)
def test_hugging_face_directory_gives_its_own_embeddings(family, words, tmp_path):
    make, pictures_class, size, padding = CASES[family]
    model, image_processor = make(), pictures_class(**size)
    for part in (model, image_processor, words):
        part.save_pretrained(tmp_path)
    scorer = load_scorer(tmp_path, device="cpu", batch_size=2)
    images = pictures(3)
    pixels = image_processor(images=images, return_tensors="pt")
    tokens = words(TEXTS, padding=padding, truncation=True, max_length=9, return_tensors="pt")
    with torch.no_grad():
        expected_images = torch.nn.functional.normalize(model.get_image_features(**pixels).pooler_output, dim=-1)
        expected_texts = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    torch.testing.assert_close(scorer.encode_images(images), expected_images)
    torch.testing.assert_close(scorer.encode_texts(TEXTS), expected_texts)


def test_own_directory_gives_unit_float32_rows_whatever_the_batch(dual, tmp_path):
    model, processor = dual
    save(model, processor, tmp_path)
    small, large = (load_scorer(tmp_path, device="cpu", batch_size=size) for size in (2, 64))
    images = pictures(5)
    found = small.encode_images(images)
    assert found.dtype == torch.float32 and found.shape == (5, 16)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(found, large.encode_images(images))
    torch.testing.assert_close(small.encode_texts(TEXTS), large.encode_texts(TEXTS))


def test_a_decoder_is_no_scorer(prefix, tmp_path):
    save(*prefix, tmp_path)
    with pytest.raises(UserError, match="expected a dual encoder"):
        load_scorer(tmp_path)


def test_another_hugging_face_model_is_refused(tmp_path):
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="found a 'gpt2' model; expected one of clip, siglip"):
        load_scorer(tmp_path)


def test_a_missing_directory_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="can't load the scorer") as caught:
        load_scorer(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


def test_nothing_to_embed_is_an_error(dual, tmp_path):
    save(*dual, tmp_path)
    with pytest.raises(ValueError, match="nothing to embed"):
        load_scorer(tmp_path).encode_images([])
