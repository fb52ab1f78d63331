"""Pictures and words of a Hugging Face directory: as transformers makes them, behind our surface."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.models.tiny import TEXTS, pictures
from vlmpipe.config import parse
from vlmpipe.errors import UserError
from vlmpipe.models import VLMConfig, build, from_huggingface, load, save, to_huggingface
from vlmpipe.models.generate import answer
from vlmpipe.models.parity import TOLERANCE, failed, parity, random_module
from vlmpipe.models.pretrained import FAMILIES, HuggingFaceProcessor
from vlmpipe.models.processor import stack

DATA = Path(__file__).parents[3].parent / "shared/data"
WORDS = ["<pad>", "<eos>", "a", "red", "blue", "circle", "square", "above", "Question", ":", "Answer"]
SIDE = 20
CROP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
SQUASH = {"size": {"height": SIDE, "width": SIDE}}
IMAGE_PROCESSORS = {
    "clip": (transformers.CLIPImageProcessorPil, CROP),
    "siglip": (transformers.SiglipImageProcessorPil, SQUASH),
    "vit": (transformers.ViTImageProcessorPil, SQUASH),
}


@pytest.fixture(scope="module")
def tokenizer():
    ids = {name: index for index, name in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", model_max_length=16
    )


def directory_of(kind, directory, tokenizer=None, image_processor=True, **settings):
    """`settings`: of the image processor."""
    changes = {}
    if kind in ("clip", "siglip"):
        changes = {"text_config": {**FAMILIES[kind].tiny["text_config"], "eos_token_id": 1, "pad_token_id": 0}}
    _, theirs = random_module(kind, **changes)
    theirs.save_pretrained(directory)
    if image_processor:
        made, sizes = IMAGE_PROCESSORS[kind]
        made(**sizes, **settings).save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return theirs


def odd_pictures():
    """One of each colour mode, in odd sizes."""
    random = np.random.default_rng(0)

    def noise(*shape):
        return random.integers(0, 256, shape, np.uint8)

    return [
        Image.fromarray(noise(37, 51, 3)), Image.fromarray(noise(21, 90, 4), "RGBA"), Image.fromarray(noise(64, 23)),
        Image.fromarray(noise(30, 30, 4), "CMYK"), Image.fromarray(noise(19, 77)).convert("1"),
        Image.fromarray(noise(41, 33, 3)).convert("P"), Image.fromarray(noise(25, 40, 2), "LA"),
        Image.fromarray(noise(7, 13, 3)),
    ]


def real_pictures():
    """From the textbooks, each colour mode, and the odd files that decode."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(DATA / "textbooks/pairs.parquet", columns=["file"])["file"].to_pylist()
    files = [DATA / "textbooks/images" / Path(name).name for name in rows[:: len(rows) // 60]]
    index = json.loads((DATA / "hostile-images/index.json").read_text())
    files += [DATA / "hostile-images" / entry["file"] for entry in index if entry["decodes"]]
    found, modes = [], set()
    for file in files:
        image = Image.open(file)
        image.load()
        if not image.mode.startswith(("I", "F")) and image.mode != "LAB":  # which transformers doesn't convert
            found.append(image)
            modes.add(image.mode)
    assert {"RGB", "RGBA", "L", "CMYK"} <= modes
    return found


def assert_pictures_equal(kind, images, directory, **settings):
    directory_of(kind, directory, **settings)
    model, processor = from_huggingface(directory)
    expected = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    vision = getattr(model, "vision", model)
    for image in images:
        theirs = expected(images=image if expected.do_convert_rgb else image.convert("RGB"), return_tensors="pt")
        ours = processor.images([image])
        assert ours.dtype == torch.uint8
        assert (vision.normalise(ours) - theirs["pixel_values"]).abs().max() <= 2e-6


@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_odd_pictures_equal_transformers(kind, tmp_path):
    assert_pictures_equal(kind, odd_pictures(), tmp_path)


@pytest.mark.skipif(not (DATA / "textbooks").exists(), reason="no ../shared/data with real pictures")
@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_real_pictures_equal_transformers(kind, tmp_path):
    assert_pictures_equal(kind, real_pictures(), tmp_path)


@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_what_an_image_processor_does_not_normalise_no_model_does(kind, tmp_path):
    assert_pictures_equal(kind, pictures(2), tmp_path, do_normalize=False)


def test_an_image_processor_that_normalises_otherwise_gives_floats(tmp_path):
    directory_of("vit", tmp_path, image_processor=False)
    made = transformers.ViTImageProcessorPil(**SQUASH, rescale_factor=1 / 127.5)
    made.save_pretrained(tmp_path)
    _, processor = from_huggingface(tmp_path)
    (image,) = pictures(1)
    expected = made(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.images([image]), expected)


def test_a_model_is_normalised_as_its_image_processor_says(tmp_path):
    directory_of("vit", tmp_path, image_processor=False)
    transformers.ViTImageProcessorPil(**SQUASH, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    model, _ = from_huggingface(tmp_path)
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_embeddings_of_pictures_and_words_equal_transformers(kind, tokenizer, tmp_path):
    theirs = directory_of(kind, tmp_path, tokenizer)
    model, processor = from_huggingface(tmp_path)
    images, texts = pictures(2), ["a red circle", "blue square above a circle"]
    batch = stack([[processor.encode(text)] for text in texts])
    padding = {"siglip": {"padding": "max_length", "max_length": 16}, "clip": {"padding": True}}[kind]
    words = tokenizer(texts, return_tensors="pt", **padding)
    names = ("input_ids",) if kind == "siglip" else ("input_ids", "attention_mask")
    words = {name: words[name] for name in names}
    pixels = IMAGE_PROCESSORS[kind][0](**IMAGE_PROCESSORS[kind][1])(images=images, return_tensors="pt")
    with torch.no_grad():
        outputs = theirs(**words, **pixels)
        image = model.encode_image(processor.images(images))
        text = model.encode_text(batch["tokens"], batch["segments"], batch["positions"])
    assert (image - outputs.image_embeds).abs().max() <= 1e-5
    assert (text - outputs.text_embeds).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_parity_uses_the_directorys_processor(kind, tokenizer, tmp_path):
    directory_of(kind, tmp_path, tokenizer)
    assert not failed(parity(tmp_path), TOLERANCE)


def test_what_a_directory_lacks_is_none(tokenizer, tmp_path):
    directory_of("clip", tmp_path / "words", tokenizer, image_processor=False)
    directory_of("clip", tmp_path / "pictures")
    _, words = from_huggingface(tmp_path / "words")
    _, shown = from_huggingface(tmp_path / "pictures")
    assert words.pictures is None and words.tokenizer is not None and words.image_size == SIDE
    assert shown.tokenizer is None and shown.pictures is not None
    with pytest.raises(UserError, match=r"expected tokenizer\.json"):
        shown.encode("a")
    with pytest.raises(UserError, match=r"found no preprocessor_config\.json"):
        words.images(pictures(1))


def test_a_damaged_tokenizer_is_named(tokenizer, tmp_path):
    directory_of("clip", tmp_path, tokenizer)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="unreadable image processor"):
        from_huggingface(tmp_path)


@pytest.mark.parametrize(("kind", "file", "content"), [
    ("gpt2", "preprocessor_config.json", {"image_processor_type": "X", "auto_map": {"AutoImageProcessor": "code.X"}}),
    ("vit", "tokenizer_config.json", {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["code.X", None]}}),
])
def test_code_of_a_processor_is_neither_run_nor_asked_about(kind, file, content, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    random_module(kind)[1].save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')")
    with pytest.raises(UserError, match=r"found an unreadable .*contains custom code") as caught:
        from_huggingface(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "harm").exists()


def test_our_directory_keeps_a_hugging_face_processor(tokenizer, tmp_path):
    directory_of("clip", tmp_path / "theirs", tokenizer)
    model, processor = from_huggingface(tmp_path / "theirs")
    processor.answers = ("red", "blue")
    save(model, processor, tmp_path / "ours")
    again, restored = load(tmp_path / "ours")
    assert isinstance(restored, HuggingFaceProcessor) and restored.answers == ("red", "blue")
    assert restored.text_limit == processor.text_limit == 16 and restored.image_size == SIDE
    images = pictures(2)
    assert torch.equal(restored.images(images), processor.images(images))
    assert restored.encode("a red square") == processor.encode("a red square")
    assert answer(again, restored, images, ["a", "above"]) == answer(model, processor, images, ["a", "above"])
    to_huggingface(again, restored, tmp_path / "back")
    assert (tmp_path / "back/config.json").read_bytes() == (tmp_path / "theirs/config.json").read_bytes()


def test_prompts_end_where_answers_start(tokenizer):
    processor = HuggingFaceProcessor(None, tokenizer, 0, 12)
    text = processor.encode_answer("red", "blue square")
    prompt = processor.encode_question("red")
    assert text.ids[: text.start] == prompt.ids and text.ids[-1] == processor.eos
    assert processor.decode(text.ids[text.start :]) == "blue square"
    assert processor.encode_question("").ids == (processor.eos,)  # it has no other token to start from


def test_prompts_of_a_chat_model(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}Question : {{ m['content'] }}{% endfor %} Answer :"
    ids = HuggingFaceProcessor(None, chat, 0, 12).encode_question("red").ids
    assert ids == tuple(chat("Question : red Answer :", add_special_tokens=False)["input_ids"])


DUAL = {
    "vision": {
        "image_size": 20, "patch_size": 5, "stem_bias": False, "class_token": True, "pool": "class",
        "input_norm": True, "transformer": {"width": 24, "depth": 2, "heads": 3, "hidden": 40},
    },
    "text": {"context": 24, "transformer": {"width": 24, "depth": 2, "heads": 3, "hidden": 40}},
    "fusion": {"kind": "none"},
    "heads": {"projection": {"width": 18}},
}


def test_a_clip_of_our_own_goes_to_transformers_with_its_words_and_pictures(tmp_path):
    model, processor = build(parse(VLMConfig, DUAL, "dual"), TEXTS)
    to_huggingface(model, processor, tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    shown = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    images, texts = pictures(2), TEXTS[:2]
    batch = stack([[processor.encode(text)] for text in texts])
    words = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(processor.images(images), batch["tokens"], batch["segments"], batch["positions"])
        expected = theirs(
            pixel_values=shown(images=images, return_tensors="pt")["pixel_values"], input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
        )
    assert isinstance(theirs, transformers.CLIPModel)
    assert (found.image_embedding - expected.image_embeds).abs().max() <= 1e-5
    assert (found.text_embedding - expected.text_embeds).abs().max() <= 1e-5
    assert tokenizer.decode(words["input_ids"][0], skip_special_tokens=True).strip() == texts[0]


def test_what_no_family_can_say_is_refused(tmp_path):
    vision = {**DUAL["vision"], "stem": "conv", "patch_size": 4}
    model, processor = build(parse(VLMConfig, {**DUAL, "vision": vision}, "dual"), TEXTS)
    with pytest.raises(UserError, match="found an architecture that no Hugging Face family has"):
        to_huggingface(model, processor, tmp_path)
