"""The command line: what it lists, what it hands on, and how it ends."""

import errno
import os
import re
from pathlib import Path

import pytest
import yaml

import vlmpipe.__main__ as program
from vlmpipe.__main__ import COMMANDS, main
from vlmpipe.errors import GateFailed, UserError, disk_full
from vlmpipe.stages import STAGES

DOWNLOAD = ["download", "p", "--urls", "s3://bucket/list.parquet", "--out", "data/pools/p", "--state", "data/state"]


def helped(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_lists_the_verbs_and_keeps_the_stages_below(capsys):
    listed, _, stages = helped(capsys).partition("Stages (")
    for verb, (_, _, text) in COMMANDS.items():
        assert re.search(rf"^ +{verb}\s+{re.escape(text[:20])}", listed, re.M), verb
    for stage in STAGES:
        assert stage in stages and not re.search(rf"^ +{stage}(  |$)", listed, re.M), stage


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_explains_itself(capsys, verb):
    assert " ".join(COMMANDS[verb][2].split()) in " ".join(helped(capsys, verb).split())


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_names_its_paths(capsys, name):
    stage, text = STAGES[name], " ".join(helped(capsys, name).split())
    usage = text.partition(f"Stage {name}: ")[0]
    for path in stage.paths:
        optional = f"[--{path}" in usage
        assert f"--{path} " in usage and optional == (path in stage.optional), path
    assert usage.rstrip().endswith(" name") == stage.named


def test_a_missing_path_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["download", "p", "--out", "x", "--state", "y"])
    assert ended.value.code == 2 and "--urls" in capsys.readouterr().err


@pytest.fixture
def params(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = {"pool": {"p": {"urls": "list.csv"}}}
    Path("params.yaml").write_text(yaml.safe_dump(facts))
    return facts


@pytest.fixture
def handed(monkeypatch):
    """What the command line gives to the stages."""
    calls = []
    monkeypatch.setattr(program, "run_stage", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(program, "die_with_parent", lambda: None)
    return calls


def test_a_stage_gets_its_paths_and_addresses_as_they_were_typed(params, handed):
    assert main(DOWNLOAD) == 0
    paths = {"urls": "s3://bucket/list.parquet", "out": Path("data/pools/p"), "state": Path("data/state")}
    assert handed == [("download", "p", paths, params, "params.yaml")]


def test_a_gate_gets_all_its_metrics_and_no_champion_where_there_is_none(params, handed):
    assert main(["gate", "data", "--metrics", "a.json", "b.json", "--out", "verdict.json"]) == 0
    given = {"metrics": [Path("a.json"), Path("b.json")], "out": Path("verdict.json")}
    assert handed[0][2] == {**dict.fromkeys(("champion", "samples", "costs", "waivers", "lock")), **given}


def test_explaining_a_gate_is_a_verb_beside_the_stage_of_its_name(params, handed, monkeypatch):
    calls = []
    monkeypatch.setitem(COMMANDS, "gate explain", (calls.append, *COMMANDS["gate explain"][1:]))
    assert main(["gate", "explain", "finetune", "--samples", "3", "--html", "page.html"]) == 0
    assert (calls[0].name, calls[0].samples, calls[0].html) == ("finetune", 3, Path("page.html")) and not handed
    assert main(["gate", "finetune", "--metrics", "a.json", "--out", "verdict.json"]) == 0
    assert handed[0][:2] == ("gate", "finetune") and len(calls) == 1


def ends(monkeypatch, capsys, error: BaseException | None, result: int | None = None) -> tuple[int, str]:
    def call(options):
        if error is not None:
            raise error
        return result

    monkeypatch.setitem(COMMANDS, "doctor", (call, lambda command: None, "fails"))
    return main(["doctor"]), capsys.readouterr().err


@pytest.mark.parametrize("error, status, line", [
    (GateFailed("gate data: accuracy 0.1, at least 0.9"), 1, "gate failed: gate data: accuracy 0.1, at least 0.9\n"),
    (UserError("found a; expected b; do c"), 2, "error: found a; expected b; do c\n"),
    (KeyboardInterrupt(), 130, "stopped; rerun to go on from here\n"),
])
def test_each_end_on_purpose_is_one_line_and_a_status(monkeypatch, capsys, error, status, line):
    assert ends(monkeypatch, capsys, error) == (status, line)


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    status, said = ends(monkeypatch, capsys, OSError(errno.ENOSPC, "No space left on device"))
    assert status == 2 and said.startswith("error: the disk is full") and said.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("ours"), PermissionError(errno.EACCES, "not yours")])
def test_a_fault_of_ours_has_its_traceback_and_a_status_of_its_own(monkeypatch, capsys, error):
    status, said = ends(monkeypatch, capsys, error)
    assert status == 3 and "Traceback" in said and f"{type(error).__name__}: {error}" in said


def test_the_status_of_a_command_passes_through(monkeypatch, capsys):
    assert ends(monkeypatch, capsys, None, 5) == (5, "")
    assert ends(monkeypatch, capsys, None) == (0, "")


def test_with_debug_on_the_error_itself_is_raised(monkeypatch, capsys):
    monkeypatch.setenv("VLMPIPE_DEBUG", "1")
    with pytest.raises(UserError, match="found a"):
        ends(monkeypatch, capsys, UserError("found a"))


def test_nothing_phones_home():
    assert os.environ["DO_NOT_TRACK"] == "1" and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false" and os.environ["GX_ANALYTICS_ENABLED"] == "false"


def test_a_chain_of_causes_that_leads_back_to_its_start_ends():
    first, second = ValueError("one"), KeyError("two")
    first.__cause__, second.__cause__ = second, first
    assert not disk_full(first)
    second.__cause__ = OSError(28, "No space left on device")
    assert disk_full(first)
