import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vlmpipe.config import parse
from vlmpipe.errors import UserError
from vlmpipe.evaluate.verdict import KEY_VARIABLE, keygen, seal
from vlmpipe.evaluate.waivers import Waiver, add_waivers, today
from vlmpipe.promotion import consumers
from vlmpipe.publish import PublishConfig, Registry, champion_model, models, out_md5, rollback
from vlmpipe.shards import sha256_directory

DVC_YAML = """
stages:
  audit:
    cmd: mkdir -p data/toy/audit && cp kept.json data/toy/audit/metrics.json
    deps: [kept.json]
    outs: [data/toy/audit]
  gate_data:
    cmd: python gate.py data data/toy/audit/metrics.json
    deps: [data/toy/audit/metrics.json]
    outs: [results/toy/gates/data/verdict.json: {cache: false}]
  pack:
    cmd: mkdir -p data/toy/packed && cp rows.txt data/toy/packed/
    deps: [rows.txt]
    outs: [data/toy/packed]
  finetune:
    cmd: mkdir -p data/toy/models/finetune && cp weights.txt data/toy/models/finetune/
    deps: [weights.txt, data/toy/packed]
    params: [results/toy/gates/data/verdict.json: [passed]]
    outs: [data/toy/models/finetune]
  evaluate_finetune:
    cmd: python evaluate.py
    deps: [data/toy/models/finetune]
    metrics: [results/toy/metrics/finetune.json: {cache: false}]
  gate_finetune:
    cmd: python gate.py finetune results/toy/metrics/finetune.json
    deps: [results/toy/metrics/finetune.json]
    outs: [results/toy/gates/finetune/verdict.json: {cache: false}]
"""

EVALUATE = """
import json
from pathlib import Path
value = float(Path("data/toy/models/finetune/weights.txt").read_text())
Path("results/toy/metrics").mkdir(parents=True, exist_ok=True)
Path("results/toy/metrics/finetune.json").write_text(json.dumps({"metrics": {"vqa.accuracy": value}, "n": {}}))
"""

GATE = """
import sys
from pathlib import Path
import yaml
from vlmpipe.config import parse
from vlmpipe.errors import GateFailed
from vlmpipe.evaluate.gate import GateConfig, gate
name, metrics = sys.argv[1:]
results = Path("results/toy")
rules = parse(GateConfig, yaml.safe_load(Path("params.yaml").read_text())["gates"][name], "params.yaml")
champion = results / "champion.json" if name == "finetune" else None
try:
    gate(name, [Path(metrics)], champion, results / f"gates/{name}/verdict.json", rules,
         waivers=results / f"waivers/{name}.yaml", lock=Path("dvc.lock"))
except GateFailed:
    sys.exit(1)
"""

KEPT = {"metrics": {"selection.kept": 5}, "n": {"selection.kept": 9}}
GATES = {
    "data": {"rules": {"kept": {"metric": "selection.kept", "min": 1}}},
    "finetune": {"rules": {"floor": {"metric": "vqa.accuracy", "min": 0.5}}},
}
PARAMS = {"profile": "toy", "root": "data/toy", "results": "results/toy", "publish": {}, "gates": GATES}


class Workspace:
    def __init__(self, root: Path):
        self.root = root

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=self.root, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def dvc(self, *arguments: str, check: bool = True) -> int:
        return subprocess.run(
            [sys.executable, "-m", "dvc", *arguments, "--quiet"], cwd=self.root, check=check, capture_output=True
        ).returncode

    def train(self, accuracy: float) -> None:
        (self.root / "weights.txt").write_text(str(accuracy))
        self.dvc("repro")

    def publish(self, **params) -> list[str]:
        return Registry(self.root, PARAMS | {"publish": params}).publish()

    def registry(self) -> Registry:
        return Registry(self.root, PARAMS)

    def champion(self) -> str | None:
        """As git's tags say, and champion.json has to agree."""
        champion = self.registry().champion()
        path = self.root / "results/toy/champion.json"
        assert (json.loads(path.read_text())["version"] if path.exists() else None) == (champion and champion.name)
        return champion and champion.name


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Workspace:
    # No identity from outside: a fresh machine knows nobody.
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.delenv(name, raising=False)
    workspace = Workspace(tmp_path)
    workspace.git("init", "--quiet")
    workspace.dvc("init")
    workspace.dvc("remote", "add", "--default", "local", "remote")
    files = {
        "dvc.yaml": DVC_YAML, "evaluate.py": EVALUATE, "gate.py": GATE, "rows.txt": "1", "weights.txt": "0",
        "kept.json": json.dumps(KEPT), ".gitignore": "/data/\n/remote/\n__pycache__/\n",
        "params.yaml": yaml.safe_dump(PARAMS),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    workspace.git("add", ".")
    workspace.git("-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "start")
    workspace.git("rm", "--quiet", "--cached", "weights.txt")
    monkeypatch.chdir(tmp_path)
    return workspace


def test_a_first_model_becomes_version_and_champion_and_again_nothing_happens(toy):
    toy.train(0.9)
    said = toy.publish()
    assert any("vlm-toy v0.0.1 is the champion" in line for line in said)
    assert toy.champion() == "v0.0.1"
    assert toy.git("tag").splitlines() == ["vlm-toy#champion#1", "vlm-toy@v0.0.1"]
    champion = json.loads((toy.root / "results/toy/champion.json").read_text())
    assert champion == {
        "version": "v0.0.1", "rev": toy.git("rev-parse", "vlm-toy@v0.0.1^{commit}"), "metrics": {"vqa.accuracy": 0.9},
        "audit": {"metrics": {"selection.kept": 5}, "n": {"selection.kept": 9}},
    }
    assert toy.git("status", "--porcelain", "--", "dvc.lock", "params.yaml", "results") == ""
    assert toy.git("log", "-1", "--format=%an") == "vlmpipe"
    head, tags = toy.git("rev-parse", "HEAD"), toy.git("tag")

    toy.publish()
    assert (toy.git("rev-parse", "HEAD"), toy.git("tag")) == (head, tags)
    assert toy.dvc("status", "--cloud") == 0


def test_only_the_record_is_committed(toy):
    (toy.root / "mine.txt").write_text("work in progress")
    (toy.root / "evaluate.py").write_text(EVALUATE + "# edited\n")
    toy.git("add", "mine.txt")
    toy.train(0.9)
    said = toy.publish()
    assert toy.git("diff", "--cached", "--name-only").splitlines() == ["mine.txt", "weights.txt"]
    assert toy.git("diff", "--name-only") == "evaluate.py"
    assert any("other changed file(s)" in line for line in said)


def test_the_next_model_is_the_next_version_and_rollback_moves_the_champion(toy, capsys):
    toy.train(0.8)
    toy.publish()
    toy.train(0.9)
    toy.publish()
    assert toy.champion() == "v0.0.2"
    models(PARAMS)
    table = capsys.readouterr().out
    assert "v0.0.1" in table and "v0.0.2" in table and "vqa.accuracy 0.9" in table
    newest, oldest = toy.registry().rows()
    assert (newest["champion"], oldest["champion"]) == (True, False)
    assert oldest["metrics"] == {"vqa.accuracy": 0.8} and oldest["verdict"] == "passed"
    assert newest["data"] == oldest["data"] and newest["model"] != oldest["model"]

    rollback("0.0.1", PARAMS)
    assert toy.champion() == "v0.0.1"
    assert (champion_model(PARAMS) / "weights.txt").read_text() == "0.8"
    toy.publish()  # the workspace still holds v0.0.2: what was taken back stays back
    assert toy.champion() == "v0.0.1"
    rollback("v0.0.2", PARAMS)
    assert toy.champion() == "v0.0.2"
    with pytest.raises(UserError, match=r"no version 'v0.0.3'.*did you mean.*v0.0.1, v0.0.2"):
        rollback("v0.0.3", PARAMS)


def test_the_champions_files_come_back_from_the_remote(toy):
    toy.train(0.9)
    toy.publish()
    subprocess.run(["rm", "-rf", ".dvc/cache", "data"], cwd=toy.root, check=True)
    directory = champion_model(PARAMS)
    assert (directory / "weights.txt").read_text() == "0.9"
    assert champion_model(PARAMS) == directory


def test_no_champion_is_said_plainly(toy):
    with pytest.raises(UserError, match="found no champion of vlm-toy"):
        champion_model(PARAMS)


def test_a_failed_gate_promotes_nothing(toy):
    toy.train(0.9)
    toy.publish()
    (toy.root / "weights.txt").write_text("0.2")
    assert toy.dvc("repro", check=False) == 255
    with pytest.raises(UserError, match="says failed"):
        toy.publish()
    assert toy.champion() == "v0.0.1" and len(toy.registry().versions) == 1


def test_a_verdict_that_does_not_cover_the_model_promotes_nothing(toy):
    toy.train(0.9)
    results = toy.root / "results/toy"
    verdict, metrics = results / "gates/finetune/verdict.json", results / "metrics/finetune.json"
    text = verdict.read_text()
    verdict.unlink()
    with pytest.raises(UserError, match="found no verdict"):
        toy.publish()
    judged = json.loads(text)
    verdict.write_text(json.dumps(judged | {"metrics": {"vqa.accuracy": 1.0}}))
    with pytest.raises(UserError, match=r"gates/finetune/verdict.json: found another digest.*altered"):
        toy.publish()
    verdict.write_text(json.dumps(seal(judged | {"metric_files": []})))
    with pytest.raises(UserError, match="names no metric file"):
        toy.publish()
    verdict.write_text(json.dumps(seal(judged | {"hashes": None})))
    with pytest.raises(UserError, match="names no stage that led to it"):
        toy.publish()
    verdict.write_text(text)
    metrics.write_text(metrics.read_text().replace("0.9", "0.99"))
    with pytest.raises(UserError, match="is not what the verdict was made from"):
        toy.publish()
    metrics.write_text(metrics.read_text().replace("0.99", "0.9"))
    toy.publish()
    assert toy.champion() == "v0.0.1"


def test_another_model_in_the_workspace_than_the_evaluated_one_is_not_promoted(toy):
    toy.train(0.9)
    verdict = toy.root / "results/toy/gates/finetune/verdict.json"
    judged = json.loads(verdict.read_text())
    evaluation = {"models": {"challenger": sha256_directory(toy.root / "data/toy/models/finetune")}}
    verdict.write_text(json.dumps(seal(judged | {"evaluation": {"models": {"challenger": "0" * 64}}})))
    with pytest.raises(UserError, match=r"data/toy/models/finetune has sha256 .*, the evaluated model 000000000000"):
        toy.publish()
    verdict.write_text(json.dumps(seal(judged | {"evaluation": evaluation})))
    toy.publish()
    assert toy.champion() == "v0.0.1"
    # By which its own gate knows it, when that runs again on the same scores.
    champion = json.loads((toy.root / "results/toy/champion.json").read_text())
    assert champion["model"] == evaluation["models"]["challenger"]
    again = judged | {"evaluation": evaluation, "champion": "v0.0.1", "reigns": True}
    verdict.write_text(json.dumps(seal(again)))
    assert any("the model is v0.0.1 as before" in line for line in toy.publish())
    assert len(toy.registry().versions) == 1 and toy.champion() == "v0.0.1"


def test_a_verdict_that_takes_a_new_model_for_the_champion_promotes_nothing(toy):
    toy.train(0.8)
    toy.publish()
    toy.train(0.9)
    verdict = toy.root / "results/toy/gates/finetune/verdict.json"
    verdict.write_text(json.dumps(seal(json.loads(verdict.read_text()) | {"reigns": True})))
    with pytest.raises(UserError, match=r"takes the model for champion v0\.0\.1 itself"):
        toy.publish()
    assert toy.champion() == "v0.0.1"


def test_an_altered_verdict_further_up_promotes_nothing(toy):
    data = toy.root / "results/toy/gates/data/verdict.json"
    toy.train(0.9)
    data.write_text(json.dumps(json.loads(data.read_text()) | {"n": {"selection.kept": 10}}))
    with pytest.raises(UserError, match=r"gates/data/verdict.json: found another digest.*rerun the gate"):
        toy.publish()


def test_a_verdict_of_other_data_promotes_nothing_and_absent_metrics_of_data_hinder_nothing(toy):
    data, metrics = toy.root / "results/toy/gates/data/verdict.json", toy.root / "data/toy/audit/metrics.json"
    toy.train(0.9)
    earlier = data.read_text()
    (toy.root / "kept.json").write_text(json.dumps(KEPT | {"metrics": {"selection.kept": 3}}))
    toy.train(0.95)
    now = data.read_text()
    data.write_text(earlier)
    with pytest.raises(UserError, match=r"audit/metrics.json is not what .*--force gate_data gate_finetune`"):
        toy.registry().promote()
    metrics.unlink()  # as where packed data alone was fetched to train on
    with pytest.raises(UserError, match=r"stage audit ran with other data than .* what results/toy/gates/data"):
        toy.registry().promote()
    data.write_text(json.dumps(seal(json.loads(now) | {"hashes": None})))
    with pytest.raises(UserError, match=r"gates/data/verdict.json names no stage that led to it"):
        toy.registry().promote()
    data.write_text(now)
    toy.publish(push=False)
    assert toy.champion() == "v0.0.1"


def test_a_verdict_of_another_gate_or_by_other_rules_promotes_nothing(toy):
    results = toy.root / "results/toy/gates"
    toy.train(0.9)
    for name, said in (("data", r"gates/data/verdict.json was"), ("finetune", r"gates/finetune/verdict.json was")):
        other = {"rules": GATES[name]["rules"] | {"more": {"metric": "m", "max": 1}}}
        with pytest.raises(UserError, match=f"{said} judged by other rules than gates.{name} in params.yaml"):
            Registry(toy.root, PARAMS | {"gates": GATES | {name: other}}).promote()
    (results / "finetune/verdict.json").write_text((results / "data/verdict.json").read_text())
    with pytest.raises(UserError, match=r"finetune/verdict.json is of gate 'data'; expected 'finetune'"):
        toy.registry().promote()


def test_the_champion_that_was_scored_has_to_be_the_one_that_was_promoted(toy):
    model, verdict = toy.root / "data/toy/models/finetune", toy.root / "results/toy/gates/finetune/verdict.json"

    def scored(**champion: str) -> str:
        evaluation = {"champion": "v0.0.1", "models": {"challenger": sha256_directory(model), **champion}}
        verdict.write_text(json.dumps(seal(json.loads(verdict.read_text()) | {"evaluation": evaluation})))
        return evaluation["models"]["challenger"]

    toy.train(0.8)
    first = scored()
    toy.publish()
    toy.train(0.9)
    for other in ({"champion": "0" * 64}, {}):
        scored(**other)
        with pytest.raises(UserError, match=rf"champion v0.0.1 was scored from .*; expected {first[:12]}.*delete its"):
            toy.registry().promote()
    scored(champion=first)
    toy.publish()
    assert toy.champion() == "v0.0.2"


def test_files_of_another_model_are_not_taken_for_the_champions(toy):
    left = toy.root / "data/state/champions/vlm-toy-v0.0.1"
    left.mkdir(parents=True)
    (left / "weights.txt").write_text("0.1")
    toy.train(0.9)
    toy.publish()
    directory = champion_model(PARAMS)
    assert directory.name == f"vlm-toy-v0.0.1-{toy.registry().champion().model[:8]}"
    assert (directory / "weights.txt").read_text() == "0.9"


@pytest.mark.parametrize("line, other, said", [
    ("    - path: weights.txt\n      hash: md5\n      md5: ", "0", "stage finetune ran with other data"),
    ("    cmd: mkdir -p data/toy/packed", " ", "stage pack ran with other config"),
])
def test_other_data_or_settings_than_the_judged_promote_nothing(toy, line, other, said):
    toy.train(0.9)
    lock = toy.root / "dvc.lock"
    text = lock.read_text()
    assert text.count(line) == 1
    lock.write_text(text.replace(line, line + other))
    with pytest.raises(UserError, match=f"{said} than when the gate judged"):
        toy.registry().promote()
    lock.write_text(text)
    toy.publish()
    assert toy.champion() == "v0.0.1"


def test_where_a_key_is_configured_nothing_unsigned_is_promoted(toy, tmp_path_factory, monkeypatch):
    path = tmp_path_factory.mktemp("keys") / "gate.pem"
    key = keygen(path)
    toy.train(0.9)
    with pytest.raises(UserError, match=r"gates/data/verdict.json: found no signature"):
        toy.publish(public_key=key)
    monkeypatch.setenv(KEY_VARIABLE, str(path))
    toy.dvc("repro", "--force")
    monkeypatch.delenv(KEY_VARIABLE)  # who promotes needs the public one alone
    toy.publish(public_key=key)
    assert toy.champion() == "v0.0.1"


def test_a_waiver_lets_a_model_through_and_is_seen_wherever_it_went(toy, capsys):
    waivers = toy.root / "results/toy/waivers/finetune.yaml"
    until = today().isoformat()
    add_waivers(waivers, [Waiver("floor", "Ada", "the floor is of last year's data", until)])
    toy.train(0.4)
    toy.publish()
    assert toy.champion() == "v0.0.1"
    said = f"'floor' waived by Ada until {until}: the floor is of last year's data"
    for tag in ("vlm-toy@v0.0.1", "vlm-toy#champion#1"):
        assert said in toy.git("tag", "--list", "--format=%(contents)", tag)
    [waiver] = json.loads((toy.root / "results/toy/champion.json").read_text())["waivers"]
    assert (waiver["rule"], waiver["by"], waiver["until"]) == ("floor", "Ada", until)
    [row] = toy.registry().rows()
    assert row["waivers"] == [waiver] and row["verdict"] == "passed"
    models(PARAMS)
    assert "'floor' waived by Ada" in capsys.readouterr().out
    assert toy.git("show", "HEAD~1:results/toy/waivers/finetune.yaml").startswith("- rule: floor")


def test_a_waiver_that_ended_or_was_taken_back_promotes_nothing_more(toy):
    waivers, verdict = (toy.root / "results/toy" / name for name in
                        ("waivers/finetune.yaml", "gates/finetune/verdict.json"))
    add_waivers(waivers, [Waiver("floor", "Ada", "because", today().isoformat())])
    toy.train(0.4)
    text = verdict.read_text()
    verdict.write_text(json.dumps(seal(json.loads(text.replace(today().isoformat(), "2020-01-01")))))
    with pytest.raises(UserError, match="the waiver of 'floor' by Ada expired on 2020-01-01"):
        toy.publish()
    verdict.write_text(text)
    waivers.unlink()
    with pytest.raises(UserError, match=r"rests on waivers that results/toy/waivers/finetune.yaml doesn't hold"):
        toy.publish()
    assert toy.registry().champion() is None


def test_another_model_than_the_evaluated_one_is_not_promoted(toy):
    toy.train(0.9)
    (toy.root / "weights.txt").write_text("0.95")
    toy.dvc("repro", "--single-item", "finetune")
    with pytest.raises(UserError, match="evaluate_finetune last saw another model"):
        toy.publish()


def test_a_verdict_against_an_earlier_champion_is_not_enough(toy):
    toy.train(0.8)
    toy.publish()
    toy.train(0.9)
    toy.publish()
    toy.train(0.95)  # its gate compared with v0.0.2
    rollback("v0.0.1", PARAMS)
    with pytest.raises(UserError, match=r"compares with champion v0.0.2; expected v0.0.1.*rerun the gate"):
        toy.publish()
    toy.dvc("repro", "--single-item", "--force", "gate_finetune")
    toy.publish()
    assert toy.champion() == "v0.0.3"


def test_a_promotion_that_was_cut_off_goes_on(toy, monkeypatch):
    toy.train(0.9)

    def killed(*_arguments):
        raise KeyboardInterrupt

    for method in ("_crown", "_write_champion"):
        with monkeypatch.context() as patch:
            patch.setattr(Registry, method, killed)
            with pytest.raises(KeyboardInterrupt):
                toy.publish()
    toy.publish()
    assert toy.champion() == "v0.0.1" and len(toy.registry().versions) == 1


def test_without_promotion_there_is_only_the_record(toy):
    toy.train(0.9)
    toy.registry().publish(promote=False)
    assert toy.git("tag") == "" and toy.git("log", "-1", "--format=%s") == "Record a run of profile toy"


def test_a_missing_remote_and_a_folder_without_git_are_users_errors(toy, tmp_path_factory):
    toy.train(0.9)
    toy.dvc("remote", "remove", "local")
    with pytest.raises(UserError, match=r"dvc push failed.*publish.push=false"):
        toy.publish()
    toy.publish(push=False)
    assert toy.champion() == "v0.0.1"
    with pytest.raises(UserError, match="is not a git repository"):
        Registry(tmp_path_factory.mktemp("bare"), PARAMS)


def test_out_md5_and_consumers_read_the_lock():
    stages = {"a": {"outs": [{"path": "x", "md5": "1"}]}, "b": {"deps": [{"path": "x", "md5": "2"}], "cmd": "c"}}
    assert out_md5({"stages": stages}, "x") == "1"
    assert out_md5({"stages": stages}, "y") is None and out_md5({}, "x") is None
    assert consumers({"stages": stages}, "x") == [("b", "2")]


@pytest.mark.parametrize("publish, said", [
    ({"name": "My Model"}, "publish: found name 'My Model'"), ({"public_key": "abc"}, "expected 64 hex digits"),
    ({"ask_hours": 0.0}, "found ask_hours 0.0"),
])
def test_odd_settings_are_refused(publish, said):
    with pytest.raises(UserError, match=said):
        parse(PublishConfig, publish, "params.yaml: publish")
