"""Two pretrained parts in one model: each does what it did alone."""

import pytest
import torch
import transformers

from tests.models.tiny import pictures
from vlmpipe.errors import UserError
from vlmpipe.models import join_huggingface, load, save
from vlmpipe.models.fusion import FusionConfig
from vlmpipe.models.generate import answer
from vlmpipe.models.heads import HeadsConfig, LanguageModelConfig
from vlmpipe.models.layers import CrossConfig
from vlmpipe.models.parity import random_module
from vlmpipe.models.pretrained import FAMILIES

PREFIX, WORDS = FusionConfig("prefix"), HeadsConfig(language_model=LanguageModelConfig())
SIDE = 20


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def clip(tmp_path):
    _, theirs = random_module("clip")
    theirs.save_pretrained(tmp_path / "clip")
    size = {"height": SIDE, "width": SIDE}
    transformers.CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def language_model(kind, directory, **changes):
    """With its head, and positions enough for a picture."""
    longer = {"n_positions": 60} if kind == "gpt2" else {"max_position_embeddings": 60}
    config = transformers.AutoConfig.for_model(kind, **{**FAMILIES[kind].tiny, **longer, **changes})
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(directory)
    return theirs


@pytest.mark.parametrize(
    ("kind", "changes"), [("gpt2", {}), ("llama", {}), ("qwen2", {"tie_word_embeddings": True})], ids=str
)
def test_without_pictures_the_language_model_is_as_it_was(kind, changes, clip, tmp_path):
    theirs = language_model(kind, tmp_path / "words", **changes)
    model, processor = join_huggingface(clip, tmp_path / "words", PREFIX, WORDS)
    assert (model.language_model.output is None) == (kind != "llama")
    tokens = torch.randint(3, 29, (2, 7))
    none = torch.zeros_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        found = model(None, tokens, torch.ones_like(tokens), torch.arange(7).expand(2, -1), image_places=none).logits
        expected = theirs(tokens).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert processor.pictures is not None and processor.text_limit == 60 - 16


def test_the_vision_tower_is_the_one_that_was_given(clip, tmp_path):
    language_model("gpt2", tmp_path / "words")
    model, processor = join_huggingface(clip, tmp_path / "words", PREFIX, WORDS, layer=-2)
    theirs = transformers.CLIPModel.from_pretrained(clip).vision_model
    pixels = processor.images(pictures(2))
    with torch.no_grad():
        expected = theirs(model.vision.normalise(pixels), output_hidden_states=True).hidden_states[-2]
        assert (model.vision(pixels) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_new_cross_attention_changes_nothing_before_it_is_trained(clip, tmp_path):
    theirs = language_model("gpt2", tmp_path / "words")
    model, processor = join_huggingface(clip, tmp_path / "words", FusionConfig("cross"), WORDS, CrossConfig("tanh"))
    tokens = torch.randint(3, 29, (2, 7))
    with torch.no_grad():
        given = processor.images(pictures(2)), tokens, torch.ones_like(tokens), torch.arange(7).expand(2, -1)
        found, expected = model(*given).logits, theirs(tokens).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_saved_and_loaded_it_answers_the_same(clip, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    language_model("gpt2", tmp_path / "words")
    words = Tokenizer(models.WordLevel({str(number): number for number in range(31)}, unk_token="30"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", pad_token="0")
    tokenizer.save_pretrained(tmp_path / "words")
    model, processor = join_huggingface(clip, tmp_path / "words", PREFIX, WORDS)
    said = answer(model, processor, pictures(2), ["3 4", "5"])
    save(model, processor, tmp_path / "ours")
    assert answer(*load(tmp_path / "ours"), pictures(2), ["3 4", "5"]) == said


def test_what_does_not_fit_is_refused(clip, tmp_path):
    language_model("gpt2", tmp_path / "words")
    random_module("llama")[1].save_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match=r"found no lm_head\.weight"):
        join_huggingface(clip, tmp_path / "headless", PREFIX, WORDS)
    with pytest.raises(UserError, match="vision: found TextModel"):
        join_huggingface(tmp_path / "words", tmp_path / "words", PREFIX, WORDS)
    with pytest.raises(UserError, match="found 19 positions with 16 image tokens before the words"):
        random_module("gpt2")[1].save_pretrained(tmp_path / "short")
        join_huggingface(clip, tmp_path / "short", PREFIX, WORDS)
