"""Training that goes on from a model of Hugging Face."""

import dataclasses

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.train.test_stages import CONFIG, INLINE, OPTIMIZER, losses, model, packed
from vlmpipe.errors import UserError
from vlmpipe.models import load, to_huggingface
from vlmpipe.models.parity import random_module
from vlmpipe.models.pretrained import FAMILIES, HuggingFaceProcessor
from vlmpipe.train.optim import Rule
from vlmpipe.train.stages import pretrain

__all__ = ["packed"]  # a fixture
WORDS = ["<pad>", "<eos>", "a", "red", "green", "blue", "white", "picture"]


def clip_directory(directory, tokenizer=True):
    text = {**FAMILIES["clip"].tiny["text_config"], "eos_token_id": 1, "pad_token_id": 0}
    random_module("clip", text_config=text)[1].save_pretrained(directory)
    size = {"height": 20, "width": 20}
    transformers.CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(directory)
    if not tokenizer:
        return
    words = Tokenizer(models.WordLevel({name: index for index, name in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    made.save_pretrained(directory)


def test_a_clip_is_trained_on_and_goes_back(packed, tmp_path):
    clip_directory(tmp_path / "clip")
    rules = (Rule(r"vision\.stem\..*", None),)
    config = dataclasses.replace(
        CONFIG, init=str(tmp_path / "clip"), optimizer=dataclasses.replace(OPTIMIZER, rules=rules)
    )
    pretrain(packed, tmp_path, tmp_path / "out", tmp_path / "state", model(), config, INLINE)
    trained, processor = load(tmp_path / "out")
    assert isinstance(processor, HuggingFaceProcessor)
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    to_huggingface(trained, processor, tmp_path / "back")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "back")
    before = transformers.CLIPModel.from_pretrained(tmp_path / "clip")
    stems = (part.vision_model.embeddings.patch_embedding.weight for part in (theirs, before))
    assert torch.equal(*stems) and not torch.equal(theirs.text_projection.weight, before.text_projection.weight)


def test_pictures_that_training_cannot_keep_are_refused_before_it(packed, tmp_path):
    clip_directory(tmp_path / "clip")
    size = {"height": 20, "width": 20}
    transformers.CLIPImageProcessorPil(size=size, crop_size=size, do_rescale=False).save_pretrained(tmp_path / "clip")
    config = dataclasses.replace(CONFIG, init=str(tmp_path / "clip"))
    with pytest.raises(UserError, match=r"makes float32 \[3, 20, 20\] of a picture; expected uint8 squares of 20 x 20"):
        pretrain(packed, tmp_path, tmp_path / "out", tmp_path / "state", model(), config, INLINE)
    assert not (tmp_path / "out").exists()


def test_parts_and_models_without_words_are_no_start(packed, tmp_path):
    clip_directory(tmp_path / "clip", tokenizer=False)
    random_module("gpt2")[1].save_pretrained(tmp_path / "gpt2")
    for name, found in (("clip", "found no tokenizer"), ("gpt2", "found a TextModel alone")):
        config = dataclasses.replace(CONFIG, init=str(tmp_path / name))
        with pytest.raises(UserError, match=found):
            pretrain(packed, tmp_path, tmp_path / "out", tmp_path / "state", model(), config, INLINE)
