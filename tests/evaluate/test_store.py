"""The score store: sums of counts are the metrics, and only the same samples are compared."""

import math

import numpy as np
import pytest

from vlmpipe.data.records import DetectionRecord
from vlmpipe.errors import UserError
from vlmpipe.evaluate import metrics
from vlmpipe.evaluate.compare import compare, lower_is_better, resample
from vlmpipe.evaluate.metrics.matches import average_precision, detection_counts
from vlmpipe.evaluate.store import CHALLENGER, CHAMPION, Counts, metric_of, read_scores, tables, write_scores
from vlmpipe.shards import write_json

IDS = tuple("abcdef")
CLUSTERS = dict(zip(IDS, "112233", strict=True))
SLICES = {key: {"kind": "color" if key in "abc" else "shape", "shown": key} for key in IDS}


def means(values, ids=IDS) -> Counts:
    return Counts("ratio", {key: [value, 1.0] for key, value in zip(ids, values, strict=True)})


def store(directory, challenger, champion=None, slices=SLICES, clusters=CLUSTERS):
    parts = [*tables(CHALLENGER, challenger, clusters, SLICES)]
    parts += tables(CHAMPION, champion or {}, CLUSTERS, slices)
    write_scores(directory, parts)
    write_json(directory / "evaluation.json", {"champion": "v1.0.0" if champion else None})
    return read_scores(directory)


def test_what_is_written_is_read_whole_by_slice_and_in_pairs(tmp_path):
    ours, theirs = means([1, 0, 1, 1, 0, 0]), means([0, 0, 1, 1, 1, 0][::-1], IDS[::-1])
    found = store(tmp_path, {"vqa.accuracy": ours}, {"vqa.accuracy": theirs})
    assert found.metrics == ("vqa.accuracy",) and found.champion == "v1.0.0"
    assert found.value("vqa.accuracy") == 0.5 and found.value("vqa.accuracy", slice=("kind", "color")) == 2 / 3
    assert found.values("vqa.accuracy", CHAMPION)["f"] == 0 and found.slice_values("vqa.accuracy", "kind") == [
        "color", "shape"
    ]
    pair = found.pair("vqa.accuracy")
    assert pair.ids == IDS and pair.clusters_N.tolist() == list("112233")
    assert pair.champion_NM[:, 0].tolist() == [0, 0, 1, 1, 1, 0]
    assert found.pair("vqa.accuracy", ("kind", "shape")).ids == ("d", "e", "f")


@pytest.mark.parametrize("change, said", [
    ({"champion": {}}, "no scores of the champion"),
    ({"champion": {"m": means([1, 1, 0, 0, 0], "abcde")}}, "one model alone, such as 'f'"),
    ({"champion": {"m": means([1, 1, 0, 0, 0, math.nan])}}, "NaN"),
    ({"champion": {"m": Counts("f1", {key: [1, 1, 1] for key in IDS})}}, "another form"),
    ({"slices": {key: {} for key in IDS}}, "another form, slices"),
    ({"clusters": dict.fromkeys(IDS, "1")}, "clusters"),
])
def test_what_does_not_belong_together_is_not_paired(tmp_path, change, said):
    counts = {"m": means([1, 1, 0, 0, 0, 0])}
    with pytest.raises(UserError, match=said):
        store(tmp_path, **({"challenger": counts, "champion": counts} | change)).pair("m")


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(UserError, match="run `evaluate` first"):
        read_scores(tmp_path)
    found = store(tmp_path, {"vqa.accuracy": means([1, 1, 0, 0, 0, 0])})
    with pytest.raises(UserError, match=r"'vqa.acuracy'; did you mean 'vqa.accuracy'"):
        found.scored("vqa.acuracy")
    with pytest.raises(UserError, match="kind=size"):
        found.scored("vqa.accuracy", slice=("kind", "size"))


def test_sums_of_counts_are_the_metrics():
    nll, tokens = dict(zip(IDS, [3.0, 1, 4, 1, 5, 9])), dict(zip(IDS, [2, 1, 3, 2, 3, 4]))
    counts_NM = np.array([[nll[key], tokens[key]] for key in IDS])
    assert metric_of("exp_ratio", np.ones((1, 6)), counts_NM)[0] == pytest.approx(metrics.perplexity(nll, tokens).value)
    assert metric_of("f1", np.ones((1, 2)), np.array([[3.0, 1, 0], [0, 0, 2]]))[0] == pytest.approx(6 / 9)
    said = {"a": "a dog runs in the park", "b": "two cats sleep", "c": "a red bus in the street"}
    true = {"a": ["a dog runs in a park"], "b": ["two cats are asleep", "cats"], "c": ["the red bus in the street"]}
    counts = metrics.bleu_counts(said, true)
    counts_NM = np.array([counts[key] for key in "abc"], float)
    assert metric_of("bleu", np.ones((1, 3)), counts_NM)[0] == pytest.approx(metrics.bleu(said, true).value, rel=1e-12)
    some = {key: said[key] for key in "ac"}
    alone = metrics.bleu(some, {key: true[key] for key in "ac"}).value
    assert metric_of("bleu", np.array([[1.0, 0, 1]]), counts_NM)[0] == pytest.approx(alone, rel=1e-12)


# --- average precision ---------------------------------------------------------------------------------------

def scene(seed: int, pictures: int = 12):
    """Boxes of two labels, some found well, some badly, some not there, and a crowd."""
    draw = np.random.default_rng(seed)
    truth, found = {}, {}
    for picture in map(str, range(pictures)):
        count = int(draw.integers(1, 5))
        corner = draw.uniform(0, 60, (count, 2))
        boxes = np.hstack([corner, corner + draw.uniform(10, 40, (count, 2))])
        labels = tuple(draw.choice(["cat", "dog"], count).tolist())
        crowd = tuple((draw.random(count) < 0.15).tolist())
        truth[picture] = DetectionRecord(picture, picture, (100, 100), boxes, labels, crowd, ())
        others = draw.uniform([0, 0, 50, 50], [50, 50, 100, 100], (3, 4))
        more = np.vstack([boxes + draw.normal(0, 3, boxes.shape), others])
        more = np.hstack([np.minimum(more[:, :2], more[:, 2:]), np.maximum(more[:, :2], more[:, 2:])])
        found[picture] = metrics.Detections(more, draw.random(count + 3), (*labels, "cat", "dog", "cat"))
    return found, truth


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_of_weights_is_cocos_of_copies(seed):
    found, truth = scene(seed)
    counts = detection_counts(found, truth)
    width = max(map(len, counts.values()))
    counts_NM = np.array([row + [0.0] * (width - len(row)) for row in counts.values()])
    whole = metrics.detection_map(found, truth)
    assert average_precision(np.ones((1, 12)), counts_NM)[0] == pytest.approx(whole.value, abs=1e-12)
    weights = np.random.default_rng(seed).multinomial(12, np.ones(12) / 12).astype(float)
    copies = [(key, copy) for key, weight in zip(truth, weights, strict=True) for copy in range(int(weight))]
    drawn = metrics.detection_map({one: found[one[0]] for one in copies}, {one: truth[one[0]] for one in copies})
    assert average_precision(weights[None], counts_NM)[0] == pytest.approx(drawn.value, abs=1e-12)


# --- comparisons ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("counts", [
    means([1, 0, 1, 1, 0, 0]),
    Counts("exp_ratio", {key: [index + 1.0, 2.0 + index % 2] for index, key in enumerate(IDS)}),
    Counts("average_precision", {key: [1.0, 1.0, 1.0, 1.0, 0.1 * index, index % 2] for index, key in enumerate(IDS)}),
])
def test_a_champion_that_is_the_challenger_differs_by_nothing(tmp_path, counts):
    pair = store(tmp_path, {"m": counts}, {"m": counts}).pair("m")
    difference = compare(pair, seed=0, replicates=200)
    assert difference.estimate == 0 and not difference.replicates.any()
    assert difference.samples == 6 and difference.clusters == 3


def test_higher_is_better_whatever_the_metric(tmp_path):
    ours = Counts("exp_ratio", {key: [1.0 + index % 2, 2.0] for index, key in enumerate(IDS)})
    theirs = Counts("exp_ratio", {key: [2.0 + index % 2, 2.0] for index, key in enumerate(IDS)})
    pair = store(tmp_path, {"m": ours}, {"m": theirs}).pair("m")
    assert lower_is_better("captioning.perplexity") and lower_is_better("vqa.accuracy_wrong_image.color")
    assert not lower_is_better("vqa.accuracy") and not lower_is_better("captioning.perplexity_gain")
    better = compare(pair, 0, 200, lower_is_better=True)
    assert better.estimate == pytest.approx(math.exp(2.5 / 2) - math.exp(1.5 / 2)) and (better.replicates > 0).all()
    assert compare(pair, 0, 200).estimate == -better.estimate


@pytest.mark.parametrize("metric", [
    "fairness.size.max_skew@50", "fairness.size.max_skew@50_blind", "fairness.size.ndkl", "fairness.vqa.size.gap",
    "fairness.vqa.size.gap_low", "fairness.vqa.size.gap_high", "fairness.association.side.effect",
    "retrieval.text_to_image_median_rank", "text_to_image.fid", "classification.calibration_error",
    "generalisation.gap", "robustness.drop", "robustness.drop.noise", "hallucination.chair.s", "hallucination.chair.i",
    "captioning.perplexity", "text_prior.accuracy_blank", "text_prior.accuracy_blank.light",
    "text_to_image.clip_score_wrong_caption", "detection.ap@0.5_wrong_image", "matching.auc_wrong_image",
])
def test_what_is_better_lower(metric):
    assert lower_is_better(metric)


@pytest.mark.parametrize("metric", [
    "vqa.accuracy", "vqa.accuracy.color", "retrieval.recall@1", "retrieval.recall@10.seen", "detection.ap@0.5",
    "segmentation.precision@0.5", "text_prior.gain_over_blank", "vqa.gain_over_blind", "vqa.accuracy_blind",
    "captioning.image_gain", "text_to_image.caption_gain", "text_to_image.clip_score", "few_shot.accuracy.k4",
    "fairness.vqa.size.worst_low", "fairness.association.side.p",
    # A model that looks at what is wrong finds the text unlikely, and names what isn't in the right picture.
    "captioning.perplexity_wrong_image", "text_to_image.perplexity_wrong_caption", "hallucination.chair.s_wrong_image",
])
def test_what_is_better_higher(metric):
    assert not lower_is_better(metric)


def test_a_metric_is_read_once_and_slices_are_taken_of_it(tmp_path, monkeypatch):
    found, read = store(tmp_path, {"m": means([1, 0, 1, 1, 0, 0])}), []
    monkeypatch.setattr(found, "_read", lambda *which, read_it=found._read: read.append(which) or read_it(*which))
    kinds = {value: found.value("m", slice=("kind", value)) for value in ("color", "shape")}
    assert kinds == {"color": 2 / 3, "shape": 1 / 3} and found.value("m") == 0.5
    assert read == [("m", CHALLENGER)]


@pytest.mark.parametrize("form, saturated", [
    ("roc_area", (2.0, -2.0)), ("ranked_precision", (0.9, 1.0)), ("calibration", (0.0, 0.0, 1.0)),
])
def test_two_pictures_without_a_mistake_show_no_small_margin(tmp_path, form, saturated):
    counts = {"m": Counts(form, dict.fromkeys("ac", saturated))}
    found = compare(store(tmp_path, counts, counts).pair("m"), 0, 1000)
    assert (found.estimate, found.clusters) == (0, 2)
    assert found.p_at_most(-0.01) > 0.05


def test_a_rate_leaves_room_for_what_was_not_drawn(tmp_path):
    pixels, f1 = Counts("ratio", dict.fromkeys(IDS, (30, 40))), Counts("f1", dict.fromkeys(IDS, (1, 1, 0)))
    all_counts = {"m": means([1] * 6), "gain": means([-1] * 6), "cumulative": pixels, "f1": f1}
    all_counts["loss"] = means([2.0] * 6)
    found = store(tmp_path, all_counts, all_counts)
    for metric in all_counts:
        reach = None if metric == "loss" else 1
        assert resample(found.scored(metric), 0, 200).reach == reach, metric
        assert compare(found.pair(metric), 0, 200).reach == reach, metric
    # Three clusters that agree don't show that a drop is below a half.
    assert compare(found.pair("cumulative"), 0, 200).p_at_most(-0.5) > 0.05
    assert resample(found.scored("m"), 0, 200).interval()[0] < 0.5
