"""The parts of benchmarks/sabotage.py: faults in data, what is done to a champion, and how a verdict is read."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks import sabotage, sabotage_world
from vlmpipe.errors import UserError
from vlmpipe.evaluate.tasks import caption_loss
from vlmpipe.models.directory import TOKENIZER, build, load, save

TRAIN, TEST = (sabotage_world.draw(part, count) for part, count in (("train", 24), ("test", 8)))


@pytest.fixture(scope="module")
def champion(tmp_path_factory):
    directory = tmp_path_factory.mktemp("champion")
    config = sabotage.read_settings().model
    small = replace(config, vision=replace(config.vision, stem_width=4))
    save(*build(small, [q.text for asked in TRAIN.asked for q in asked], seed=1), directory)
    return directory


def answers(split):
    return [question.answer for asked in split.asked for question in asked]


def changed(fault):
    """(scene, question) of those training questions that the fault changes."""
    bad, _ = sabotage_world.FAULTS[fault](TRAIN, TEST)
    return [
        (scene, old) for scene, before, after in zip(TRAIN.scenes, TRAIN.asked, bad.asked)
        for old, new in zip(before, after) if old != new
    ]


def test_faults_change_what_they_say_and_nothing_else():
    assert sabotage_world.honest(TRAIN, TEST) == (TRAIN, TEST)
    destroyed, slighted = changed("slice_destroyed"), changed("group_slighted")
    assert {question.kind for _, question in destroyed} == {sabotage_world.DESTROYED}
    assert {scene.items[0].place for scene, _ in slighted} == {sabotage_world.SLIGHTED}
    for fault in ("slice_destroyed", "group_slighted"):
        assert Counter(answers(sabotage_world.FAULTS[fault](TRAIN, TEST)[0])) == Counter(answers(TRAIN))
    assert set(answers(sabotage_world.always_yes(TRAIN, TEST)[0])) == {"yes"}
    blind = sabotage_world.blind_captions(TRAIN, TEST)[0]
    assert blind.captions != TRAIN.captions and sorted(blind.captions) == sorted(TRAIN.captions)
    assert set(TEST.scenes) <= set(sabotage_world.contaminated(TRAIN, TEST)[0].scenes)
    for split in sabotage_world.leaked(TRAIN, TEST):
        assert all(q.text.endswith(f" {q.answer}") for asked in split.asked for q in asked)


def test_every_fault_is_a_sabotages_world_and_every_named_rule_is_in_the_gate():
    worlds = {case.world for case in sabotage.SABOTAGES}
    assert worlds == set(sabotage_world.FAULTS) and len(sabotage.SABOTAGES) == 10
    rules = sabotage.read_settings().gate.rules
    assert {case.rule for case in sabotage.SABOTAGES} <= rules.keys() | {sabotage.EVALUATION}


def test_a_slower_champion_says_the_same(champion, tmp_path):
    sabotage.slow_down(champion, tmp_path)
    (model, processor), (slow, _) = load(champion), load(tmp_path)
    assert len(slow.text.transformer.blocks) == sabotage.DEEPER * len(model.text.transformer.blocks)
    pictures = [scene.draw(sabotage_world.SIDE) for scene in TEST.scenes]
    said, slowly = (caption_loss(one, processor, pictures, TEST.captions) for one in (model, slow))
    assert [nll for nll, _ in said] == pytest.approx([nll for nll, _ in slowly])


def test_what_is_broken_is_broken(champion, tmp_path):
    for spoil in (sabotage.zero_layer, sabotage.nan_head, sabotage.shift_tokens):
        spoil(champion, tmp_path / spoil.__name__)
    zeroed, deaf = load(tmp_path / "zero_layer")[0], load(tmp_path / "nan_head")[0]
    assert not any(weight.any() for weight in zeroed.text.transformer.blocks[-1].parameters())
    assert zeroed.text.transformer.blocks[0].attention.qkv.weight.any()
    assert deaf.language_model.output.weight.isnan().all()
    before, after = (json.loads((place / TOKENIZER).read_text())["model"]["vocab"]
                     for place in (champion, tmp_path / "shift_tokens"))
    moved = [word for word in before if before[word] != after[word]]
    assert sorted(before.values()) == sorted(after.values()) and len(moved) == len(before) - 4


def test_the_named_rule_must_fail_and_an_honest_model_must_pass():
    checks = [
        {"name": "kinds", "slice": {"name": "question_type", "value": value}, "verdict": verdict}
        for value, verdict in (("color", "INCONCLUSIVE"), ("position", "FAIL"), ("shape", "PASS"))
    ]
    verdict = {"verdict": "FAIL", "rules": checks, "metrics": {}}
    assert sabotage.stopped_by(verdict) == ["(kinds:color)", "kinds:position"]
    case = sabotage.Case("one", "kinds", value="position")
    assert sabotage.as_it_should(case, verdict)
    assert not sabotage.as_it_should(replace(case, value="color"), verdict)
    assert not sabotage.as_it_should(sabotage.Case("honest"), verdict)
    assert sabotage.as_it_should(sabotage.Case("honest"), {"verdict": "PASS", "rules": [], "metrics": {}})
    refused = {"verdict": "refused", "rules": [], "metrics": {}, "why": "found a loss of nan"}
    broken = sabotage.Case("broken", sabotage.EVALUATION, value="nan")
    assert sabotage.as_it_should(broken, refused)
    assert not sabotage.as_it_should(broken, refused | {"why": "found no answered question"})


def test_a_workspace_is_of_one_setting(tmp_path):
    sabotage.open_workspace(tmp_path, 24, 8)
    sabotage.open_workspace(tmp_path, 24, 8)
    with pytest.raises(UserError, match="other settings"):
        sabotage.open_workspace(tmp_path, 24, 9)
