"""Stages of one workspace on a Ray cluster that somebody else started, joined by RAY_ADDRESS."""

import os
import shutil
from pathlib import Path

import pytest

from tests.by_hand import ANNOTATE, PRETRAIN, change, contents, curate, lay_out, refused, typed
from tests.test_dispatch import apart, two_nodes  # noqa: F401  fixtures
from vlmpipe import shards


@pytest.mark.slow
def test_annotate_and_pretrain_go_to_a_cluster_of_two_nodes(two_nodes, tmp_path, monkeypatch):  # noqa: F811
    lay_out(tmp_path)
    curate(tmp_path)
    monkeypatch.chdir(tmp_path)
    here = contents(Path("data/annotations/p"))
    shutil.rmtree("data/annotations/p")
    change("cluster", {"backend": "ray", "workers": 2})
    joined = {key: os.environ[key] for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")} | {"RAY_ADDRESS": two_nodes}

    said = typed(*ANNOTATE, **joined)
    assert said.status == 0, said.text[-3000:]
    assert contents(Path("data/annotations/p")) == here  # the same bytes wherever they are made

    said = typed(*PRETRAIN, **joined)  # a node has one CPU, so the two workers are on both
    assert said.status == 0, said.text[-3000:]
    assert "pretrain: 6/6 (100%)" in said.text
    assert len(Path("data/models/pretrain/curves.jsonl").read_text().splitlines()) == 6
    assert shards.read_json(Path("data/state/pretrain/timing.json"))["steps"] == 6

    change("cluster.workers", 3)
    shutil.rmtree("data/models/pretrain")
    refused(typed(*PRETRAIN, **joined), "found 3 worker(s) asked for", "1 CPU/0 GPU + 1 CPU/0 GPU")
