"""What stands behind a verdict: the samples that got worse, the worst first, and what each rule asked."""

import math

import numpy as np
import pytest

from tests.evaluate.scored import asked, check, means, verdict, write_evaluation
from vlmpipe.evaluate import explain
from vlmpipe.evaluate.explain import Answer, Measured, findings
from vlmpipe.evaluate.metrics.matches import average_precision
from vlmpipe.evaluate.store import CHALLENGER, CHAMPION, Counts

SAMPLES = [
    asked("a", kind="color"), asked("b", kind="color", answers=("blue", "blue", "navy")), asked("c", kind="shape"),
    asked("d", kind="shape", image=("d1.png", "d2.png")),
]
SAID = {CHALLENGER: dict(zip("abcd", ("green", "red", "red", None))), CHAMPION: dict(zip("abcd", ("red",) * 4))}


def scored(directory, challenger, champion=None):
    """An evaluation with the accuracy of each of the four samples."""
    sides = {CHALLENGER: challenger} | ({CHAMPION: champion} if champion else {})
    counts = {model: {"accuracy": means(dict(zip("abcd", values)))} for model, values in sides.items()}
    said = {model: SAID[model] for model in sides}
    return write_evaluation(directory, "vqa", SAMPLES, said, counts)


def test_the_samples_that_got_worse_come_worst_first_with_both_answers(tmp_path):
    place = scored(tmp_path, [0, 0.3, 1, 1], [1, 0.6, 0, 1])
    (found,) = findings(verdict([check("accuracy", "vqa.accuracy")]), place, limit=5)
    assert (found.worse, found.better, found.same, found.compared) == (2, 1, 1, True)
    assert [shown.sample_id for shown in found.samples] == ["a", "b"]
    first = found.samples[0]
    assert (first.images, first.question, first.truth) == (("a.png",), "what color?", ("red",))
    assert (first.champion, first.challenger) == (Answer("red", 1.0), Answer("green", 0.0))
    assert first.slices == {"kind": "color"} and found.samples[1].truth == ("blue", "blue", "navy")


def test_a_slice_shows_its_own_samples_and_a_limit_the_worst_of_them(tmp_path):
    place = scored(tmp_path, [0, 0, 0.5, 0], [1, 1, 1, 1])
    shape = {"name": "kind", "value": "shape"}
    found = findings(verdict([check("kinds", "vqa.accuracy", slice=shape)]), place, limit=1)
    assert [(one.slice, one.worse) for one in found] == [(("kind", "shape"), 2)]
    assert [(shown.sample_id, shown.images) for shown in found[0].samples] == [("d", ("d1.png", "d2.png"))]
    assert found[0].samples[0].challenger == Answer(None, 0.0)


def test_rules_of_one_metric_share_their_samples_and_passed_ones_have_none(tmp_path):
    place = scored(tmp_path, [0, 1, 1, 1], [1, 1, 1, 1])
    found = findings(verdict([
        check("floor", "vqa.accuracy"), check("champion", "vqa.accuracy", "INCONCLUSIVE"),
        check("fine", "vqa.accuracy", "PASS"), check("audit", "selection.kept"),
        check("gone", "vqa.accuracy", slice={"name": "kind", "value": "count"}),
    ]), place, limit=5)
    assert [[one["name"] for one in each.checks] for each in found] == [["floor", "champion"]]


def test_without_a_champion_the_lowest_are_shown(tmp_path):
    place = scored(tmp_path, [1, 0.5, 0, 0.7])
    (found,) = findings(verdict([check("accuracy", "vqa.accuracy")]), place, limit=2)
    assert not found.compared and found.worse == 4
    assert [(shown.sample_id, shown.champion) for shown in found.samples] == [("c", None), ("b", None)]


def test_scores_that_cannot_be_compared_are_told(tmp_path):
    place = scored(tmp_path, [1, math.nan, 0, 0.7], [1, 1, 1, 1])
    (found,) = findings(verdict([check("accuracy", "vqa.accuracy")]), place, limit=2)
    assert "NaN" in found.note and found.samples == ()


def test_where_nothing_got_worse_nothing_is_shown(tmp_path):
    place = scored(tmp_path, [0, 1, 0, 0], [0, 0, 0, 0])
    (found,) = findings(verdict([check("accuracy", "vqa.accuracy")]), place, limit=5)
    assert (found.worse, found.better, found.same, found.samples) == (0, 1, 3, ())


def test_samples_of_a_later_evaluation_are_not_shown_as_the_verdicts(tmp_path):
    place = scored(tmp_path, [0, 1, 0, 0], [1, 1, 1, 1])
    (found,) = findings(verdict([check("accuracy", "vqa.accuracy")], evaluation={"champion": "v0"}), place, limit=5)
    assert found.samples == () and "rerun the gate" in found.note


def test_a_gate_without_an_evaluation_has_no_samples(tmp_path):
    assert findings(verdict([check("kept", "selection.kept")]), tmp_path, limit=2) == []


def test_a_rule_on_wrong_pictures_shows_those_and_what_was_said_to_them(tmp_path):
    said = {model: {key: {"prediction": "red", "wrong_prediction": f"{model} {key}"} for key in "abcd"}
            for model in (CHALLENGER, CHAMPION)}
    counts = {model: {"accuracy_wrong_image": means(dict(zip("abcd", values)))} for model, values in
              ((CHALLENGER, (1, 0, 0, 0)), (CHAMPION, (0, 0, 0, 0)))}
    place = write_evaluation(tmp_path, "vqa", SAMPLES, said, counts)
    (found,) = findings(verdict([check("looks", "vqa.accuracy_wrong_image")]), place, limit=4)
    (shown,) = found.samples  # who is right without looking is worse
    assert shown.images == ("other.png",) and shown.challenger == Answer("challenger a", 1.0)


def test_where_less_is_better_more_is_worse(tmp_path):
    nats = {CHALLENGER: (4.0, 1.0, 1.0, 6.0), CHAMPION: (1.0, 2.0, 1.0, 1.0)}
    tokens = (1, 1, 1, 10)
    counts = {model: {"perplexity": Counts("exp_ratio", dict(zip("abcd", zip(values, tokens))))}
              for model, values in nats.items()}
    place = write_evaluation(tmp_path, "captioning", SAMPLES, SAID, counts)
    (found,) = findings(verdict([check("words", "captioning.perplexity")]), place, limit=4)
    # Sample d lost most nats, though per token hardly any; a's are of one word.
    assert [shown.sample_id for shown in found.samples] == ["d", "a"] and found.better == 1
    assert found.samples[1].challenger.value == pytest.approx(math.exp(4))


@pytest.mark.parametrize("form, counts", [
    ("ratio", [[1, 2], [3, 1]]), ("f1", [[1, 2, 0], [0, 1, 3]]), ("exp_ratio", [[2.0, 1.0], [1.0, 3.0]]),
])
def test_a_loss_is_the_metric_with_the_champions_answer_to_that_sample_alone(form, counts):
    ours, theirs = np.array(counts, float), np.array(counts[::-1], float)
    found = Measured(form, ("a", "b"), ({}, {}), {CHALLENGER: ours, CHAMPION: theirs}, {})
    metric = explain.FORMS[form]
    expected = [metric(np.stack(mixed).sum(0)) - metric(ours.sum(0)) for mixed in
                ((theirs[0], ours[1]), (ours[0], theirs[1]))]
    assert explain.losses(found) == pytest.approx(expected)


def test_metrics_whose_counts_do_not_add_up_are_compared_sample_by_sample():
    right, missed = [1, 1, 1, 1, 0.9, 1], [1, 1, 1, 0, 0, 0]  # one IoU, one label, one box there; found or not
    counts = {CHALLENGER: np.array([missed, right], float), CHAMPION: np.array([right, right], float)}
    alone = {model: np.array([average_precision(np.ones((1, 1)), row[None])[0] for row in rows])
             for model, rows in counts.items()}
    found = Measured("average_precision", ("a", "b"), ({}, {}), counts, alone)
    assert explain.losses(found) == pytest.approx([1.0, 0.0])


def test_what_rules_ask_is_said_in_words():
    sliced = check("kinds", "vqa.accuracy", slice={"name": "kind", "value": "color"}, rule="margin", margin=0.02)
    assert (explain.title(sliced), explain.asked(sliced), explain.bound(sliced)) == (
        "kinds · kind = color", "drop < 0.02", -0.02)
    gain = check("better", "vqa.accuracy", rule="gain", margin=0.0)
    assert (explain.asked(gain), explain.bound(gain)) == ("gain > 0", 0.0)
    floor = check("floor", "vqa.accuracy")
    assert (explain.title(floor), explain.asked(floor), explain.bound(floor)) == ("floor", "≥ 0.85", None)
    assert explain.asked(check("gone", "vqa.accuracy", limit=None)) == "–"


def test_rates_share_a_scale_and_other_metrics_have_their_own():
    interval = {"difference": 0.1, "interval": [0.0, 0.2], "champion": 0.4}
    checks = [check("a", "vqa.accuracy", **interval), check("b", "cost.latency", **interval | {"champion": 80.0}),
              check("c", "vqa.gain", **interval), check("d", "vqa.floor")]
    scales = explain.scales(checks)
    assert {scale: [one["name"] for one in each] for scale, each in scales.items()} == {
        "rates": ["a", "c"], "cost.latency": ["b"]}
