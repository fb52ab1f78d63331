"""Examples before the question, chained descriptions, and maps over pictures that are not square."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.models.fusion.small import make_small
from tests.models.test_native import make as make_native
from tests.models.tiny import TEXTS, make, pictures
from vlmpipe.config import parse
from vlmpipe.errors import UserError
from vlmpipe.models import VLMConfig, build, from_huggingface
from vlmpipe.models.generate import (
    DescribeConfig,
    Example,
    answer,
    ask,
    attention_map,
    choose,
    describe,
    interleave,
    picture_inputs,
)
from vlmpipe.models.parity import random_module
from vlmpipe.models.text import SHARED

ROW = {
    "vision": {
        "image_size": 32, "patch_size": 16, "resnet": {"widths": [16, 24, 32], "depths": [1, 1, 1], "stem_width": 8}
    },
    "text": {"context": 90, "transformer": {"width": 32, "depth": 2, "heads": 4, "hidden": 48}},
    "fusion": {"kind": "prefix", "projector": "linear"},
    "heads": {"language_model": {}},
}


def make_row():
    model, processor = build(parse(VLMConfig, ROW, "row"), TEXTS)
    return model.eval(), processor


def examples():
    first, second = pictures(2, seed=7)
    return [Example(first, "what color is the circle?", "red"), Example(second, "", "a blue square")]


def test_a_row_of_examples_spelled_out():
    model, processor = make_row()
    shown, prompt = examples(), processor.encode_question("how many?")
    batch = ask(model, processor, pictures(1), [prompt], shown)
    texts = [processor.encode_answer(each.question, each.answer).ids for each in shown] + [prompt.ids]
    places = [place for text in texts for place in [True] * 4 + [False] * len(text)]
    words = [token for text in texts for token in [0] * 4 + list(text)]
    assert batch["image_places"][0].tolist() == places and batch["tokens"][0].tolist() == words
    assert batch["segments"].unique().tolist() == [1] and batch["positions"][0].tolist() == list(range(len(words)))
    assert batch["images"].shape[0] == 3 and batch["image_rows"].tolist() == [0, 0, 0]


def test_tokens_that_look_both_ways_do_so_among_examples():
    model, processor = make("prefix")
    batch = ask(model, processor, pictures(1), [processor.encode_question("")], examples()[1:])
    assert (batch["segments"][batch["image_places"]] == SHARED).all()


@pytest.mark.parametrize("kind", ["row", "native", "flamingo"])
def test_answers_after_examples_depend_on_all_of_them_and_not_on_the_batch(kind):
    model, processor = {"row": make_row, "native": make_native, "flamingo": lambda: make_small("flamingo")}[kind]()
    shown, seen = examples(), pictures(2)
    questions = ["what color?", "how many shapes are there?"]
    together = answer(model, processor, seen, questions, 5, examples=shown)
    alone = [
        answer(model, processor, [image], [question], 5, examples=shown)[0]
        for image, question in zip(seen, questions, strict=True)
    ]
    assert together == alone
    prompt = [processor.encode_question("what color?")]
    logits = [
        model(**ask(model, processor, seen[:1], prompt, given)).logits[0, -1]
        for given in (shown, [Example(seen[1], shown[0].question, "red"), shown[1]], [shown[0], examples()[0]])
    ]
    if kind != "flamingo":  # whose words see the last picture alone, but the words before them
        assert not torch.allclose(logits[0], logits[1], atol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-4)
    assert choose(model, processor, seen, questions, ("red", "two"), examples=shown)[0] in ("red", "two")


def test_pictures_before_a_row_are_an_interleaved_row_of_one():
    for model, processor in (make_row(), make_native()):
        prompt, image = processor.encode_question("how many?"), pictures(1)
        expected = model(**ask(model, processor, image, [prompt])).logits
        found = model(**interleave(model, processor, [[(image[0], prompt)]])).logits[:, -expected.shape[1] :]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_longer_than_the_model_are_refused():
    model, processor = make_row()
    with pytest.raises(UserError, match=r"text\.context 90; give fewer examples"):
        answer(model, processor, pictures(1), ["what?"], examples=examples() * 9)


def wide():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 48, 3), np.uint8))


@pytest.mark.parametrize(
    ("kind", "shape"), [("row", (2, 2)), ("native", (2, 6)), ("flamingo", None), ("visualgpt", None), ("simvlm", None)]
)
def test_a_map_has_the_grid_of_its_picture(kind, shape):
    makers = {"row": make_row, "native": make_native}
    model, processor = makers[kind]() if kind in makers else make_small(kind)
    found = attention_map(model, processor, wide(), "what color is the circle?")
    shape = (model.config.vision.side,) * 2 if shape is None else shape
    assert found.shape == shape
    assert found.min() >= 0 and found.sum().item() == pytest.approx(1)
    other = attention_map(model, processor, pictures(1, seed=5)[0].resize((48, 16)), "what color is the circle?")
    assert not torch.allclose(found, other)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_descriptions_are_chained():
    model, processor = make_row()
    config = DescribeConfig("objects?", "roles {objects}?", "all {objects} {roles}", limit=3)
    found = describe(model, processor, pictures(2), config)
    for image, said in zip(pictures(2), found, strict=True):
        objects = answer(model, processor, [image], ["objects?"], 3)[0]
        roles = answer(model, processor, [image], [f"roles {objects}?"], 3)[0]
        text = answer(model, processor, [image], [f"all {objects} {roles}"], 3)[0]
        assert (said.objects, said.roles, said.text) == (objects, roles, text)


@pytest.mark.parametrize(
    "change", [{"objects": "{objects}"}, {"roles": "{roles}"}, {"synthesis": "{"}, {"limit": 0}]
)
def test_recipes_that_make_no_sense_are_refused(change):
    with pytest.raises(UserError, match="expected"):
        DescribeConfig(**change)


def test_a_dual_encoder_describes_nothing(dual):
    with pytest.raises(UserError, match="expected a language head"):
        describe(*dual, pictures(1))


@pytest.mark.parametrize("kind", ["row", "native", "full"])
def test_a_picture_asked_about_twice_is_read_once(kind):
    model, processor = {"row": make_row, "native": make_native, "full": lambda: make("prefix")}[kind]()
    first, second = pictures(2)
    images = [first, second, first.copy(), first, wide()]
    questions = ["what color?", "", "how many shapes are there?", "what?", ""]
    read = []
    hook = model.vision.register_forward_hook(lambda module, inputs, tokens: read.append(tokens))
    together = answer(model, processor, images, questions, 6)
    hook.remove()
    assert [tokens.flatten(0, -2).shape for tokens in read] == [image_tokens(model, processor, images[:2] + images[4:])]
    pairs = list(zip(images, questions, strict=True))
    assert together == [answer(model, processor, [image], [question], 6)[0] for image, question in pairs]
    chosen = choose(model, processor, images, questions, ("red", "two"))
    assert chosen == [choose(model, processor, [image], [question], ("red", "two"))[0] for image, question in pairs]


def image_tokens(model, processor, images):
    inputs = picture_inputs(model, processor, images)
    return model.vision(inputs["images"], grids=inputs.get("grids")).flatten(0, -2).shape


TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}ASSISTANT:"
)


def test_a_chat_template_says_where_the_picture_stands(tmp_path):
    """A LLaVA directory is asked as transformers asks it, and reads what comes before a question once a picture."""
    _config, theirs = random_module("llava", image_token_index=3)
    _, own = make("prefix")
    theirs.resize_token_embeddings(own.vocab_size + 1)
    theirs.save_pretrained(tmp_path)
    words = own.tokenizer
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    mark = tokenizer.convert_tokens_to_ids("<image>")
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**facts, "image_token_index": mark}))
    transformers.CLIPImageProcessorPil(size={"height": 20, "width": 20}, do_center_crop=False).save_pretrained(tmp_path)
    model, processor = from_huggingface(tmp_path)
    seen, questions, read = [*pictures(2), *pictures(1)], ["what color is the circle?", "how many?", "what?"], []
    with model.vision.register_forward_hook(lambda module, inputs, tokens: read.append(len(tokens))):
        found = answer(model, processor, seen, questions, 5)
    assert read == [2]
    theirs.config.image_token_index = theirs.model.config.image_token_index = mark
    for image, question, text in zip(seen, questions, found, strict=True):
        asked = tokenizer.encode(f"USER: <image> {question} ASSISTANT:", add_special_tokens=False)
        at = asked.index(mark)
        ids = torch.tensor([[*asked[:at], *[mark] * 16, *asked[at + 1 :]]])
        pixels = processor.pictures(images=[image], return_tensors="pt")["pixel_values"]
        said = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=5, do_sample=False,
            eos_token_id=processor.eos, pad_token_id=processor.pad,
        )
        assert text == processor.decode(said[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("kind", ["row", "native", "flamingo"])
def test_the_one_place_that_is_wanted_has_the_logits_that_it_has_among_all(kind):
    model, processor = {"row": make_row, "native": make_native, "flamingo": lambda: make_small("flamingo")}[kind]()
    batch = ask(model, processor, pictures(2), [processor.encode_question(text) for text in ("how many?", "")])
    only = torch.tensor([batch["tokens"].shape[1] - 1, 1])
    expected = model(**batch).logits[torch.arange(2), only]
    found = model(**batch, only=only, heads=("language_model",)).logits
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-4, atol=1e-5)
