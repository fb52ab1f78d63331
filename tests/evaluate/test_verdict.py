import copy
import json
import stat

import pytest
import yaml

from vlmpipe.errors import UserError
from vlmpipe.evaluate import verdict as verdicts
from vlmpipe.evaluate.verdict import (
    KEY_VARIABLE,
    check,
    difference,
    environment,
    hashes,
    keygen,
    lineage,
    read_lock,
    seal,
    sha256_of,
)

VERDICT = {
    "gate": "finetune", "passed": True, "rules": [{"name": "a", "value": 0.1, "limit": 1e-17, "verdict": "PASS"}],
    "metrics": {"vqa.accuracy": 0.30000000000000004, "größe": 2},
}
LOCK = {"stages": {
    "world": {"cmd": "world", "outs": [{"path": "d/world", "md5": "w"}]},
    "audit": {"cmd": "audit", "deps": [{"path": "d/world/a", "md5": "l"}], "outs": [{"path": "d/audit", "md5": "a"}]},
    "train": {
        "cmd": "train", "params": {"params.yaml": {"train": {"lr": 0.1}}}, "outs": [{"path": "d/model", "md5": "m"}],
        "deps": [{"path": "d/world", "md5": "w", "size": 3}, {"path": "vlmpipe/train/loop.py", "md5": "c"}],
    },
    "evaluate": {
        "cmd": "evaluate", "deps": [{"path": "d/model", "md5": "m"}], "outs": [{"path": "r/metrics.json", "md5": "j"}],
    },
}}


@pytest.fixture
def key(tmp_path, monkeypatch) -> str:
    public = keygen(tmp_path / "keys/gate.pem")
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "keys/gate.pem"))
    return public


def test_a_sealed_verdict_survives_its_file_and_no_change_of_a_single_value(tmp_path):
    sealed = seal(VERDICT)
    assert sealed == seal(sealed) and sealed["digest"] == sha256_of(VERDICT) and "signature" not in sealed
    path = tmp_path / "verdict.json"
    path.write_text(json.dumps(sealed, indent=2))
    check(json.loads(path.read_text()))
    for change in ({"passed": False}, {"metrics": {"vqa.accuracy": 0.3}}, {"new": None}, {"digest": "0" * 64}):
        with pytest.raises(UserError, match="was altered"):
            check(sealed | change)
    deep = copy.deepcopy(sealed)
    deep["rules"][0]["verdict"] = "FAIL"
    with pytest.raises(UserError, match="was altered"):
        check(deep)
    with pytest.raises(UserError, match="found no digest"):
        check(VERDICT)


def test_a_number_that_no_gate_writes_is_an_altered_verdict():
    altered = seal(VERDICT) | {"metrics": {"vqa.accuracy": float("nan")}}
    with pytest.raises(UserError, match=r"data/verdict.json: found NaN or an infinity.*altered"):
        check(altered, where="data/verdict.json")


def test_a_distribution_without_metadata_changes_nothing(tmp_path, monkeypatch):
    before = environment()
    (tmp_path / "gone-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert environment() == before


def test_a_signature_is_of_this_verdict_by_this_key(key, tmp_path, monkeypatch):
    sealed = seal(VERDICT)
    assert sealed == seal(VERDICT)  # ed25519 signs the same bytes the same way
    check(sealed, key)
    check(sealed)
    with pytest.raises(UserError, match="was altered"):  # whoever alters it can make a digest, not a signature
        check(sealed | {"passed": False, "digest": sha256_of(VERDICT | {"passed": False})}, key)
    other = seal(VERDICT | {"gate": "data"})
    with pytest.raises(UserError, match="signature of something else"):
        check(sealed | {"signature": other["signature"]}, key)
    with pytest.raises(UserError, match="signature of something else"):
        check(sealed | {"signature": "no hex"})
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(UserError, match=r"found no signature.*set VLMPIPE_SIGNING_KEY"):
        check(seal(VERDICT), key)
    with pytest.raises(UserError, match="found a signature by"):
        check(sealed, keygen(tmp_path / "theirs.pem"))


def test_keys_are_private_and_never_replaced(key, tmp_path, monkeypatch):
    path = tmp_path / "keys/gate.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(bytes.fromhex(key)) == 32
    with pytest.raises(UserError, match="a key is not replaced"):
        keygen(path)
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "none.pem"))
    with pytest.raises(UserError, match=r"none.pem: found no private key.*keygen"):
        seal(VERDICT)


def test_lineage_goes_up_from_the_metrics_and_nowhere_else():
    assert list(lineage(LOCK, ["r/metrics.json"])) == ["evaluate", "train", "world"]
    assert list(lineage(LOCK, ["d/audit/metrics.json"])) == ["audit", "world"]  # a file in an out
    assert lineage(LOCK, ["elsewhere.json"]) == {} and lineage({}, ["r/metrics.json"]) == {}


@pytest.mark.parametrize("path, value, said", [
    (["train", "deps", 0, "md5"], "x", "stage train ran with other data"),
    (["train", "deps", 1, "md5"], "x", "stage train ran with other code"),
    (["train", "params", "params.yaml", "train", "lr"], 0.2, "stage train ran with other config"),
    (["evaluate", "outs", 0, "md5"], "x", "stage evaluate ran with other data"),
    (["world", "cmd"], "world --big", "stage world ran with other config"),
    (["train", "deps", 0, "size"], 4, None), (["audit", "cmd"], "x", None),
])
def test_two_lineages_part_where_a_stage_ran_otherwise(path, value, said):
    changed = copy.deepcopy(LOCK)
    place = changed["stages"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    before, now = (lineage(lock, ["r/metrics.json"]) for lock in (LOCK, changed))
    assert difference(before, now) == said


def test_a_stage_more_is_a_difference():
    assert difference({}, lineage(LOCK, ["d/world"])) == difference(None, lineage(LOCK, ["d/world"]))
    assert difference({}, {}) is None


def test_hashes_name_what_there_is(tmp_path):
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(LOCK))
    found = hashes(["r/metrics.json"], tmp_path / "dvc.lock", {"metric_versions": {"vqa": 1}})
    assert found["stages"] == lineage(LOCK, ["r/metrics.json"]) and found["metric_versions"] == {"vqa": 1}
    assert found["environment"]["python"].count(".") == 2 and "torch" in found["environment"]
    assert found == hashes(["r/metrics.json"], tmp_path / "dvc.lock", {"metric_versions": {"vqa": 1}})
    bare = hashes(["r/metrics.json"])
    assert [bare[name] for name in ("data", "code", "config", "stages")] == [None] * 4


def test_a_lock_under_its_writers_hand_is_read_once_whole(tmp_path, monkeypatch):
    path, whole = tmp_path / "dvc.lock", yaml.safe_dump(LOCK)
    path.write_text("stages:\n  world: {cmd")
    steps = iter(["stages:\n", "stages:\n  a: {", whole, whole])
    monkeypatch.setattr(verdicts.time, "sleep", lambda _s: path.write_text(next(steps)))
    assert read_lock(path) == LOCK and not list(steps)
    monkeypatch.setattr(verdicts.time, "sleep", lambda _s: None)
    path.write_text("stages:\n  world: {cmd")
    with pytest.raises(UserError, match="no whole yaml"):
        read_lock(path)
