"""Caption metrics against published and official numbers."""

import json
import re
from pathlib import Path

import pytest

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import bleu, cider, rouge_l
from vlmpipe.evaluate.metrics.captions import longest_common

CAPTIONS = Path(__file__).parents[4] / "shared/data/captions"
SAID = {"cat": "a cat sits on a mat", "dog": "a dog runs in the park", "horse": "a man rides a horse"}
TRUE = {
    "cat": ["a cat is sitting on a mat", "the cat sits on the mat"],
    "dog": ["a dog running in a park", "the brown dog runs"],
    "horse": ["a man riding a brown horse", "man on a horse"],
}
METRICS = [bleu, rouge_l, cider]


def test_golden_numbers_of_the_official_scorers():
    result = bleu(SAID, TRUE)
    assert [round(result.details[f"bleu{n}"], 5) for n in (1, 2, 3)] == [0.94118, 0.77784, 0.47915]
    assert f"{result.details['bleu4']:.4e}" == "6.0895e-05" and result.value == result.details["bleu4"]
    assert {sample: round(score, 5) for sample, score in rouge_l(SAID, TRUE).per_sample.items()} == {
        "cat": 0.75871, "dog": 0.66667, "horse": 0.76972
    }
    assert round(cider(SAID, TRUE).value, 7) == 2.7901466


@pytest.mark.parametrize(
    "which, bleus, rouge, cider_d",
    [
        ("good", [0.6667, 0.4899, 0.3469, 0.0], 0.4280, 0.5637),
        ("bad", [0.4815, 0.2404, 0.1359, 0.0], 0.3121, 0.2790),
    ],
)
def test_published_numbers_of_the_clipscore_example(which, bleus, rouge, cider_d):
    said, true = (example(f"{which}_captions.json"), example("refs.json"))
    plain = re.compile(r"[^\w\s]")
    for tokenize in ("ptb", lambda text: plain.sub("", text.lower()).split()):
        result = bleu(said, true, tokenize)
        assert [round(result.details[f"bleu{n}"], 4) for n in (1, 2, 3, 4)] == bleus
        assert round(rouge_l(said, true, tokenize).value, 4) == rouge
        assert round(cider(said, true, tokenize).value, 4) == cider_d


def example(name):
    path = CAPTIONS / "clipscore-example" / name
    if not path.exists():
        pytest.skip(f"no {path}: the published example is not part of the project")
    return json.loads(path.read_text())


def test_numbers_of_the_official_tools_on_coco():
    """The first caption of 500 pictures against their others: pycocoevalcap 1.2 with its own tokenizer, run by hand."""
    path = CAPTIONS / "coco_captions_val2017.json"
    if not path.exists():
        pytest.skip(f"no {path}: the real captions are not part of the project")
    captions = {}
    for row in json.loads(path.read_text())["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    chosen = dict(list(captions.items())[:500])
    said, true = ({i: texts[0] for i, texts in chosen.items()}, {i: texts[1:] for i, texts in chosen.items()})
    bleus = bleu(said, true).details
    assert [bleus[f"bleu{n}"] for n in (1, 2, 3, 4)] == pytest.approx(
        [0.6453297234576203, 0.44988831480318375, 0.3079795706721808, 0.2101294176344053], rel=1e-12
    )
    assert rouge_l(said, true).value == pytest.approx(0.47688460780753744, rel=1e-12)
    assert cider(said, true).value == pytest.approx(0.8443852841058193, rel=1e-12)


def test_a_single_picture_has_no_cider():
    assert cider({"cat": SAID["cat"]}, {"cat": TRUE["cat"]}).value == 0.0


def test_repeating_a_caption_s_own_words():
    same = {sample: texts[0] for sample, texts in TRUE.items()}
    single = {sample: [text] for sample, text in same.items()}
    assert rouge_l(same, single).value == pytest.approx(1.0)
    assert bleu(same, single).value == pytest.approx(1.0)
    assert cider(same, single).value == pytest.approx(10.0)


def test_bleu_punishes_what_is_too_short_and_takes_the_closest_reference():
    true = {1: ["a b c d e f g h", "a b c d"]}
    assert bleu({1: "a b c d"}, true).value == pytest.approx(1.0)
    short = bleu({1: "a b c d"}, {1: ["a b c d e f g h"]})
    assert short.details["bleu1"] == pytest.approx(2.718281828 ** (1 - 8 / 4))
    assert short.details["length_ratio"] == 0.5
    # Six words are as far from four as from eight: the shorter counts, so nothing is taken off.
    assert bleu({1: "a b c d e f"}, true).details["bleu1"] == pytest.approx(1.0)


def test_bleu_counts_a_word_no_oftener_than_a_reference_has_it():
    result = bleu({1: "the the the the"}, {1: ["the cat the mat", "the dog sat here"]})
    assert result.details["bleu1"] == pytest.approx(0.5)


def test_an_empty_caption_scores_nothing():
    said = SAID | {"cat": "..."}
    for metric in METRICS:
        assert metric(said, TRUE).per_sample["cat"] == 0.0
    assert bleu({1: ""}, {1: ["a", "."]}).value == 0.0


def test_tokenizers():
    said, true = {1: "A Cat."}, {1: ["a cat"]}
    assert rouge_l(said, true).value == pytest.approx(1.0)
    assert rouge_l(said, true, "plain").value == 0.0
    assert rouge_l(said, true, lambda text: text.strip(".").lower().split()).value == pytest.approx(1.0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "said, true, tokenize, message",
    [
        ({}, {}, "ptb", "no samples"),
        ({1: "a"}, {1: ["a"], 2: ["b"]}, "ptb", "no prediction for .*2"),
        ({1: "a", 2: "b"}, {1: ["a"]}, "ptb", "unknown samples .*2"),
        ({1: None}, {1: ["a"]}, "ptb", "None"),
        ({1: float("nan")}, {1: ["a"]}, "ptb", "nan"),
        ({1: "a"}, {1: "a"}, "ptb", "list of texts"),
        ({1: "a"}, {1: []}, "ptb", "no word in the references"),
        ({1: "a"}, {1: ["!"]}, "ptb", "no word in the references"),
        ({1: "a"}, {1: ["a"]}, "pbt", "'pbt'"),
    ],
)
def test_what_cannot_be_scored_is_refused(metric, said, true, tokenize, message):
    with pytest.raises(UserError, match=message):
        metric(said, true, tokenize)


@pytest.mark.parametrize(
    ("one", "other", "length"), [("abcd", "xbyd", 2), ("", "a", 0), ("aaa", "aa", 2), ("ab", "ba", 1)]
)
def test_longest_common(one, other, length):
    assert longest_common(one, other) == length == longest_common(other, one)
