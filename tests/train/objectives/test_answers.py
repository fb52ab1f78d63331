"""Answers and statements as classes, and mixtures."""

import json

import pytest
import torch
import torch.nn.functional as F

from tests.models.joined import batch, make
from tests.models.tiny import make as make_tiny
from vlmpipe.config import parse
from vlmpipe.errors import UserError
from vlmpipe.train.loop import TrainConfig, train
from vlmpipe.train.objectives import OBJECTIVES, check_objective, make_objective, objective_for
from vlmpipe.train.objectives.answers import Answers, Statements, soft_targets


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_soft_targets_are_vqa_scores():
    given = [["red"] * 1 + ["blue"] * 2 + ["two"] * 3 + ["yes"] * 4, ["unknown"] * 10]
    known = {"two": 0, "yes": 1, "red": 2, "blue": 3}
    torch.testing.assert_close(
        soft_targets(given, known, classes=5), torch.tensor([[0.9, 1.0, 0.3, 0.6, 0.0], [0.0] * 5])
    )


def test_answers_are_binary_cross_entropies_summed_over_answers():
    model, processor = make("single_stream")
    rows = {**batch(processor), "answers": torch.rand(4, 7)}
    loss, metrics = Answers()(model, rows)
    inputs = {name: rows[name] for name in ("images", "tokens", "segments", "positions")}
    logits, scores = model(**inputs, heads=("answers",)).answers, rows["answers"]
    sure = logits.sigmoid()
    expected = -(scores * sure.log() + (1 - scores) * (1 - sure).log()).sum(dim=1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["accuracy"], scores[torch.arange(4), logits.argmax(dim=1)].mean())


def pairs(processor):
    """Four statements about two pictures each."""
    rows = {**batch(processor, images=8), "image_rows": torch.arange(8) // 2}
    return {**rows, "statement_labels": torch.tensor([0, 1, 1, 0])}


def test_statements_read_both_pictures_in_order():
    model, processor = make("single_stream")
    rows = pairs(processor)
    loss, _ = Statements()(model, rows)
    words = {name: rows[name] for name in ("tokens", "segments", "positions")}
    pooled = []
    for number in (0, 1):
        frames = torch.full((4,), number)
        reading = []
        model.matching.register_forward_pre_hook(lambda _, given, kept=reading: kept.append(given[0].fused.pooled))
        model(rows["images"][number::2], **words, frames=frames, heads=("matching",))
        pooled.append(reading[0])
    logits = model.statement.output(torch.cat(pooled, dim=1))
    torch.testing.assert_close(loss, F.cross_entropy(logits, rows["statement_labels"]))


# --- mixtures ----------------------------------------------------------------------------------------------

def test_a_mixture_is_the_weighted_sum_and_tells_its_parts():
    model, processor = make("single_stream")
    rows = {**batch(processor), "answers": torch.rand(4, 7), "negatives": torch.tensor([0, 3, 2, 1])}
    config = parse(TrainConfig, {"objective": {"answers": 0.5, "matching": 2}}, "train")
    check_objective(config.objective)
    loss, metrics = make_objective(config.objective, model)(model, rows)
    parts = {name: OBJECTIVES[name]()(model, rows) for name in ("answers", "matching")}
    torch.testing.assert_close(loss, 0.5 * parts["answers"][0] + 2 * parts["matching"][0])
    assert sorted(metrics) == ["answers/accuracy", "answers/loss", "matching/accuracy", "matching/loss"]
    torch.testing.assert_close(metrics["matching/loss"], parts["matching"][0])
    assert not metrics["answers/loss"].requires_grad


class Same:
    """The same batch at every step."""

    def __init__(self, rows):
        self.rows = rows

    def at(self, step):
        return self.rows


def test_a_mixture_that_was_stopped_goes_on_to_the_bit(tmp_path):
    """Masks and negatives are drawn anew at every step, and again as they were."""
    objective = {"contrastive": 1, "matching_hard": 1, "masked_multimodal": 1, "masked_text_alone": 1}
    config = parse(TrainConfig, {
        "objective": objective, "steps": 4, "batch_size": 4, "log_every": 1, "prefetch": False,
    }, "train")
    curves = []
    for run, looks in (("whole", [False] * 4), ("cut", [False, True, False, False])):
        for _ in range(1 + any(looks)):
            model, processor = make("multimodal", masked_text={"tied": False, "alone": True})
            asked = iter(looks)
            train(
                model, make_objective(config.objective, model), Same(batch(processor)), config, tmp_path / run,
                stopped=lambda: next(asked),  # noqa: B023
            )
            looks = [False] * 4
        curves.append((tmp_path / run / "curves.jsonl").read_text())
    assert curves[0] == curves[1] and len(curves[0].splitlines()) == 4
    losses = [json.loads(line)["masked_multimodal/text"] for line in curves[0].splitlines()]
    assert len(set(losses)) == 4


def test_what_a_model_is_trained_with_unless_told():
    assert objective_for(make_tiny("dual")[0]) == OBJECTIVES["contrastive"]()
    names = [name for name, _, _ in objective_for(make("multimodal")[0]).parts]
    assert names == ["contrastive", "masked_text", "matching"]
    assert make_objective("matching", None) == OBJECTIVES["matching"]()


def test_wrong_mixtures_are_named():
    with pytest.raises(UserError, match="found objective 'maching'; did you mean 'matching'"):
        check_objective({"maching": 1.0})
    with pytest.raises(UserError, match=r"objective\.matching: found weight 0"):
        check_objective({"matching": 0})
    with pytest.raises(UserError, match="a mixture of nothing"):
        check_objective({})
    model, processor = make("single_stream")
    with pytest.raises(UserError, match="Answers: found no answers in the batch"):
        make_objective({"answers": 1.0}, model)(model, batch(processor))
