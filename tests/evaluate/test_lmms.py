"""lmms-eval's requests, through a stand-in of its interface."""

import abc
import sys
from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from tests.models.tiny import make, pictures
from vlmpipe.errors import UserError
from vlmpipe.evaluate import lmms
from vlmpipe.models import save
from vlmpipe.models.generate import GenerationConfig, answer, choose


class Base(abc.ABC):
    """What lmms-eval 0.7 asks of a model class, as far as its evaluator uses it."""

    is_simple = True

    def __init__(self):
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclass
class Request:
    args: tuple


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("model")
    save(*make("prefix"), place)
    return place


@pytest.fixture
def model(directory):
    made = lmms.adapter(Base)(pretrained=str(directory), batch_size="2", device="cuda", max_batch_size=None)
    first, second = pictures(2)
    made.task_dict = {"seen": {"test": [{"image": first}, {"image": second}, {"image": first}]}}
    return made


def seen(document):
    return [document["image"]]


def request(number, context, second, visual=seen):
    return Request((context, second, visual, number, "seen", "test"))


def test_answers_are_the_models_own_in_the_order_of_the_requests(model):
    asked = ["what color is the circle?", "how many?", "<image>\nwhat?"]
    short, long = {"max_new_tokens": 3, "temperature": 0}, {"max_new_tokens": 6, "until": ["\n\n"]}
    requests = [request(n, text, long if n == 1 else short) for n, text in enumerate(asked)]
    first, second = pictures(2)
    own = [
        answer(model.network, model.feed, [image], [text], limit)[0]
        for image, text, limit in [(first, asked[0], 3), (second, asked[1], 6), (first, "what?", 3)]
    ]
    assert model.generate_until(requests) == own and isinstance(model, Base) and model.is_simple
    assert requests[0].args[1] == {"max_new_tokens": 3, "temperature": 0}


def test_the_least_loss_is_the_likeliest_choice_and_greedy_says_what_is_written(model):
    choices = ["red circle", "two shapes", "blue"]
    found = model.loglikelihood([request(0, "what color?", f" {text}") for text in choices])
    prompts = [model.feed.encode_question("what color?")]
    for text, (loss, _) in zip(choices, found, strict=True):
        ids = lmms.said(model.feed, "what color?", text)
        batch = lmms.ask(model.network, model.feed, pictures(1), prompts)
        ((total,),) = lmms.log_likelihoods(model.network, batch, [[ids]])
        assert loss == pytest.approx(-total / len(ids), rel=1e-4)
    written = answer(model.network, model.feed, pictures(1), ["what color?"], 2)[0]
    assert choose(model.network, model.feed, pictures(1), ["what color?"], choices)[0] in choices
    ((_, greedy),) = model.loglikelihood([request(0, "what color?", lambda document: written)])
    ids = lmms.said(model.feed, "what color?", written)
    same = lmms.generate(model.network, model.feed, pictures(1), prompts, len(ids))[0][: len(ids)] == list(ids)
    assert greedy == same and not all(greedy for _, greedy in found)
    boxing = lmms.adapter(Base, lambda pair: ["boxed", pair])
    assert boxing.loglikelihood(model, [request(0, "what color?", choices[0])])[0][0] == "boxed"


def test_long_contexts_leave_room_for_the_whole_continuation(model):
    limit, text = model.feed.text_limit, "red circle and blue"
    short = lmms.said(model.feed, "what?", text)
    context = "what color is the circle " * limit
    assert lmms.said(model.feed, context, text) == short and len(short) > 2
    prompt = lmms.asked_before(model.feed, context, len(short))
    assert len(prompt.ids) + len(short) <= limit == model.feed.text_limit
    found = model.loglikelihood([request(0, context, one) for one in (text, "red")])
    batch = lmms.ask(model.network, model.feed, pictures(1), [prompt])
    ((total,),) = lmms.log_likelihoods(model.network, batch, [[short]])
    assert found[0][0] == pytest.approx(-total / len(short), rel=1e-4)
    assert lmms.asked_before(model.feed, "what color?", len(short)) == model.feed.encode_question("what color?")
    with pytest.raises(UserError, match=f"texts of at most {limit}; expected at most {limit - lmms.LEAST_CONTEXT}"):
        model.loglikelihood([request(0, "what?", text * limit)])


def test_several_pictures_are_shown_and_other_things_refused(model):
    both = lambda document: [document["image"], Image.new("L", (20, 30))]  # noqa: E731
    assert len(model.generate_until([request(0, "what?", {"max_new_tokens": 2}, both)])) == 1
    for visual, said in ((lambda document: ["film.mp4"], "found a str to look at"), (lambda document: None, "nothing")):
        with pytest.raises(UserError, match=f"{said}.*expected pictures"):
            model.generate_until([request(0, "what?", {}, visual)])
    with pytest.raises(UserError, match="several rounds"):
        model.generate_until_multi_round([])


@pytest.mark.parametrize("settings, expected", [
    ({"temperature": 0, "top_p": 1.0, "num_beams": 1}, GenerationConfig()),
    ({"num_beams": 3, "do_sample": False}, GenerationConfig("beam", beams=3)),
    ({"temperature": 0.5, "top_p": 0.9}, GenerationConfig("sample", temperature=0.5, top_p=0.9)),
])
def test_settings_in_our_words(settings, expected):
    assert lmms.chosen(settings) == expected


def test_texts_end_before_what_they_are_to_end_at():
    assert lmms.cut("yes. no\n", [". ", "\n"]) == "yes" and lmms.cut(" a b", None) == "a b" == lmms.cut("a b", "c")


def test_it_imports_without_lmms_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(ImportError):
        _ = lmms.Adapter
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        _ = lmms.Other
