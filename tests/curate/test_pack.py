"""Packing: what `datasets` reads back, who shares a split, and what an interruption leaves."""

import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.curate.annotators.test_faces import portrait
from tests.curate.made_pools import FakeScorer, jpeg, picture, row, write_pool
from vlmpipe import shards
from vlmpipe.config import parse
from vlmpipe.curate import annotate as annotation
from vlmpipe.curate import croissant
from vlmpipe.curate import pack as module
from vlmpipe.curate.annotators.faces import Faces
from vlmpipe.curate.duplicates import THUMBNAIL, Looks, Near, look
from vlmpipe.curate.filters import SelectConfig, select
from vlmpipe.curate.pack import SPLITS, PackConfig, assign_splits, pack
from vlmpipe.dispatch import Cluster
from vlmpipe.errors import UserError

CONFIG = PackConfig(validation=0.2, test=0.2, rows_per_file=7, check=False)
ORDER = ("downloaded", "decoded", "exact_duplicate")


def near_twin(seed: int) -> bytes:
    return jpeg(picture(seed).resize((56, 56), Image.Resampling.BICUBIC), 60)


def rows_of(seeds, prefix="s", **extra):
    return [row(f"{prefix}{seed}", jpeg(picture(seed)), f"caption {seed} of {prefix}", **extra) for seed in seeds]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two pools: 30 pictures in two shards, and near-duplicates of ten of them in another; one failure, one broken."""
    monkeypatch.setattr("vlmpipe.models.scorer.load_scorer", lambda source, batch_size: FakeScorer())
    annotation._annotators.cache_clear()
    (tmp_path / "scorer").mkdir()
    pools = tmp_path / "pools"
    extra = {"section": pa.string(), "license": pa.string(), "rank": pa.int64()}
    write_pool(
        pools / "a", [*rows_of(range(18), section="x", license="CC0", rank=3), row("gone")], rows_of(range(18, 30)),
        extra=extra,
    )
    twins = [row(f"t{seed}", near_twin(seed), None) for seed in range(10)]
    write_pool(pools / "b", [row("broken", jpeg(picture(50))[:-300]), *twins])
    for name in "ab":
        settings = annotation.AnnotateConfig()
        annotation.annotate(
            name, pools / name, tmp_path / "scorer", tmp_path / "annotations" / name, settings, Cluster("inline")
        )
    annotation._annotators.cache_clear()
    paths = (pools, tmp_path / "annotations", tmp_path / "selection")
    select(*paths[:2], tmp_path / "nowhere", paths[2], SelectConfig(order=ORDER))
    return paths, tmp_path / "packed"


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def load(directory: Path, cache: Path):
    import datasets

    return datasets.load_dataset(str(directory), cache_dir=str(cache))


# --- through datasets --------------------------------------------------------------------------------------

def test_datasets_reads_back_every_kept_pair(world, tmp_path):
    pack(*world[0], world[1], CONFIG)
    dataset = load(world[1], tmp_path / "cache")
    assert list(dataset) == list(SPLITS)
    found = {r["uid"]: r for split in dataset.values() for r in split}
    assert sum(len(split) for split in dataset.values()) == len(found) == 40
    assert {f"s{i}" for i in range(30)} | {f"t{i}" for i in range(10)} == set(found)
    scores = {r["uid"]: r["clip_score"] for name in "ab" for r in shards.read_rows(world[0][1] / name).to_pylist()}
    stored = {uid: data for name in "ab" for s in ("00000", "00001")[: 2 if name == "a" else 1]
              for uid, data in shards.iter_images(world[0][0] / name, s)}
    for uid, entry in found.items():
        assert np.array_equal(np.asarray(entry["image"]), np.asarray(Image.open(io.BytesIO(stored[uid]))))
        assert entry["clip_score"] == scores[uid] and entry["url"] == f"http://images.test/{uid}.jpg"
        assert entry["pool"] == ("a" if uid[0] == "s" else "b") and len(entry["sha256"]) == 64
    assert found["s3"]["caption"] == "caption 3 of s" and found["t3"]["caption"] is None
    assert (found["s3"]["section"], found["s3"]["rank"], found["s3"]["licence"]) == ("x", 3, "CC0")
    assert (found["s20"]["section"], found["s20"]["licence"], found["t3"]["rank"]) == (None, None, None)


def test_with_the_embeddings_off_nothing_asks_for_scores(world, tmp_path):
    (pools, notes, selection), out = world
    for name in "ab":
        settings = annotation.AnnotateConfig(embeddings=None)
        annotation.annotate(name, pools / name, tmp_path / "scorer", notes / name, settings, Cluster("inline"))
    assert not [name for name in "ab" if "clip_score" in shards.read_rows(notes / name).column_names]
    select(pools, notes, tmp_path / "nowhere", selection, SelectConfig(order=ORDER, prefer="pixels"))
    pack(pools, notes, selection, out, replace(CONFIG, check=True))
    table = shards.read_rows(out, ["uid", "clip_score"])
    assert len(table) == table["clip_score"].null_count == 40
    checked = {record["column"] for record in shards.read_json(out / "expectations.json")}
    assert "sha256" in checked and "clip_score" not in checked


def test_near_duplicates_never_straddle(world):
    pack(*world[0], world[1], CONFIG)
    split, looks = {}, {}
    for name in SPLITS:
        for file in sorted((world[1] / name).glob("*.parquet")):
            for entry in pq.read_table(file, columns=["uid", "image"]).to_pylist():
                split[entry["uid"]] = name
                looks[entry["uid"]] = look([Image.open(io.BytesIO(entry["image"]["bytes"]))])
    for seed in range(10):
        assert np.bitwise_count(looks[f"s{seed}"].hashes ^ looks[f"t{seed}"].hashes)[0] <= CONFIG.near.radius
        assert split[f"s{seed}"] == split[f"t{seed}"]
    assert {split[f"s{seed}"] for seed in range(10, 30)} == set(SPLITS)


def test_manifest_and_card_hold_the_facts(world):
    pack(*world[0], world[1], parse(PackConfig, {"licences": {"b": "CC-BY-4.0"}, "rows_per_file": 7}, "pack"))
    manifest = shards.read_manifest(world[1], "packed")
    written = files(world[1])
    listed = {file: digest for shard in manifest["shards"] for file, digest in shard["files"].items()}
    docs = {file for file in written if file.startswith("data_docs/")}
    assert set(written) - docs == {*listed, "README.md", "manifest.json", "croissant.json", "expectations.json"}
    checked = shards.read_json(world[1] / "expectations.json")
    assert all(record["success"] for record in checked) and len(checked) > 50
    assert {record["suite"] for record in checked} == {"packed", *(f"packed-{name}" for name in SPLITS)}
    assert "data_docs/index.html" in docs
    uids = sorted(shards.read_rows(world[1], ["uid"])["uid"].to_pylist())
    assert manifest["version"] == hashlib.sha256("".join(f"{uid}\n" for uid in uids).encode()).hexdigest()
    assert all(shards.sha256_file(world[1] / file) == digest for file, digest in listed.items())
    assert manifest["rows"] == sum(manifest["splits"].values()) == 40
    assert manifest["clusters"]["of_several"] >= 10
    assert manifest["pools"]["a"] == shards.sha256_file(world[0][0] / "a" / "manifest.json")
    assert max(shard["rows"] for shard in manifest["shards"]) == 7
    assert len(shards.read_rows(world[1], ["uid"])) == 40
    text = (world[1] / "README.md").read_text()
    for line in ("| downloaded | 42 | 1 | 41 |", "| decoded | 41 | 1 | 40 |", "| section | the list's own |"):
        assert line in text
    assert "| b | 11 | 10 | CC-BY-4.0 |" in text
    assert "| CC0 | 18 | 45.0% |" in text and "| unknown | 12 | 30.0% |" in text
    assert manifest["licences"] == {"CC0": 18, "CC-BY-4.0": 10, "unknown": 12}
    assert "No audit was made." in text and manifest["version"] in text
    licences = shards.read_rows(world[1], ["pool", "licence"]).to_pylist()
    assert {r["licence"] for r in licences if r["pool"] == "b"} == {"CC-BY-4.0"}


def test_packed_data_unlike_what_is_expected_is_no_dataset(world):
    """10 of 40 have no caption. What was written stays beside, for a look."""
    with pytest.raises(UserError, match=r"packed\.caption_share: .*found 0\.75; .*packed\.failed/data_docs"):
        pack(*world[0], world[1], parse(PackConfig, {"captions": 0.9}, "pack"))
    assert not world[1].exists()
    records = shards.read_json(world[1].with_name("packed.failed") / "expectations.json")
    assert [record["column"] for record in records if not record["success"]] == ["caption_share"]
    pack(*world[0], world[1], CONFIG)
    assert world[1].exists() and not world[1].with_name("packed.failed").exists()


def test_croissant_is_valid_and_reads_the_same_rows(world):
    import mlcroissant

    pack(*world[0], world[1], CONFIG)
    assert set(croissant.validate(world[1] / "croissant.json")) == set(SPLITS)
    described = shards.read_json(world[1] / "croissant.json")
    assert described["license"] == "CC0"
    data = mlcroissant.Dataset(str(world[1] / "croissant.json"))
    for name in SPLITS:
        found = {entry[f"{name}/uid"].decode(): entry for entry in data.records(name)}
        table = pa.concat_tables(pq.read_table(file) for file in sorted((world[1] / name).glob("*.parquet")))
        assert set(found) == set(table["uid"].to_pylist())
        for expected in table.slice(0, 2).to_pylist():
            entry = found[expected["uid"]]
            assert entry[f"{name}/url"].decode() == expected["url"]
            assert entry[f"{name}/image"].size == (expected["width"], expected["height"])
            assert entry[f"{name}/clip_score"] == pytest.approx(expected["clip_score"])


def test_equal_inputs_give_equal_bytes_and_a_seed_another_split(world, tmp_path):
    pack(*world[0], world[1], CONFIG)
    first = files(world[1])
    pack(*world[0], world[1], CONFIG)
    pack(*world[0], tmp_path / "again", CONFIG)
    assert files(world[1]) == files(tmp_path / "again") == first
    pack(*world[0], tmp_path / "other", PackConfig(validation=0.2, test=0.2, rows_per_file=7, seed=1, check=False))
    uids = [pq.read_table(d / "train", columns=["uid"])["uid"].to_pylist() for d in (world[1], tmp_path / "other")]
    assert uids[0] != uids[1]


def test_nothing_is_written_outside_and_nothing_is_asked_of_the_network(world, tmp_path):
    """A fresh process with an empty home and refused sockets."""
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from pathlib import Path\n"
        "from vlmpipe.curate.pack import pack, PackConfig\n"
        "pack(*map(Path, sys.argv[1:]), PackConfig())\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    subprocess.run(
        [sys.executable, "-c", code, *map(str, world[0]), str(world[1])], check=True, capture_output=True,
        env=environment | {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert list(home.rglob("*")) == [] and (world[1] / "manifest.json").exists()


def test_an_interrupted_pack_leaves_no_dataset(world, monkeypatch):
    write, calls = module.SplitWriter.write, []

    def dies(self, table, images):
        calls.append(len(table))
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, table, images)

    monkeypatch.setattr(module.SplitWriter, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        pack(*world[0], world[1], CONFIG)
    assert not world[1].exists() and not list(world[1].parent.glob(".packed*"))


def test_a_killed_pack_leaves_the_old_dataset_or_none(world, monkeypatch):
    """SIGKILL runs no clean-up: what stands at the place is whole, and the next run sweeps the rest."""
    pack(*world[0], world[1], CONFIG)
    before = files(world[1])
    partial = world[1].with_name(".packed.partial")
    (partial / "train").mkdir(parents=True)
    (partial / "train" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    assert files(world[1]) == before
    pack(*world[0], world[1], CONFIG)
    assert files(world[1]) == before and not partial.exists()


def test_a_corrupt_tar_is_named(world):
    path = world[0][0] / "a" / "00001.tar"
    path.write_bytes(path.read_bytes()[:-512] + b"x" * 512)
    with pytest.raises(UserError, match=r"corrupt shard .*a/00001\.tar"):
        pack(*world[0], world[1], CONFIG)
    assert not world[1].exists()


def test_a_pool_that_changed_after_the_selection_is_refused(world):
    manifest = json.loads((world[0][0] / "b" / "manifest.json").read_text())
    shards.write_json(world[0][0] / "b" / "manifest.json", manifest | {"note": "touched"})
    with pytest.raises(UserError, match=r"pools/b changed after .*rerun `select`"):
        pack(*world[0], world[1], CONFIG)


def test_pools_that_disagree_about_a_column_are_refused(tmp_path):
    write_pool(tmp_path / "a", [row("a", section="x")], extra={"section": pa.string()})
    write_pool(tmp_path / "b", [row("b", section=3)], extra={"section": pa.int64()})
    with pytest.raises(UserError, match="section has incompatible types"):
        module.extra_schema(tmp_path, ["a", "b"])
    write_pool(tmp_path / "c", [row("c", clip_score=1.0)], extra={"clip_score": pa.float32()})
    with pytest.raises(UserError, match=r"extra columns \['clip_score'\]"):
        module.extra_schema(tmp_path, ["c"])


# --- the split ---------------------------------------------------------------------------------------------

def digests(rows: int, rng) -> np.ndarray:
    return np.array([bytes(rng.integers(97, 123, 64, dtype=np.uint8)) for _ in range(rows)], "S64")


def far_looks(rows: int, rng) -> Looks:
    return Looks(rng.integers(0, 2**63, rows, dtype=np.uint64), np.zeros((rows, THUMBNAIL), np.uint8))


def test_shares_are_about_right_and_rows_keep_their_split_when_others_come():
    rng = np.random.default_rng(0)
    sha256, looks, config = digests(3000, rng), far_looks(3000, rng), PackConfig(near=Near(0))
    split, _ = assign_splits(sha256, looks, config)
    counts = np.bincount(split, minlength=3)
    assert counts.sum() == 3000 and all(110 <= count <= 190 for count in counts[1:])
    part, _ = assign_splits(sha256[:2000], looks.take(np.arange(2000)), config)
    assert np.array_equal(part, split[:2000])
    order = rng.permutation(3000)
    shuffled, _ = assign_splits(sha256[order], looks.take(order), config)
    assert np.array_equal(shuffled, split[order])


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_never_cut(seed):
    rng = np.random.default_rng(seed)
    looks = far_looks(60, rng).take(rng.integers(0, 60, 400))
    hashes = looks.hashes ^ (np.uint64(1) << rng.integers(0, 64, 400).astype(np.uint64))
    config = PackConfig(validation=0.3, test=0.3, near=Near(4, -1))
    split, cluster = assign_splits(digests(400, rng), Looks(hashes, looks.thumbnails), config)
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    assert (split[:, None] == split[None, :])[distance <= 4].all()
    assert all(len(set(split[cluster == label])) == 1 for label in set(cluster))
    assert set(split) == {0, 1, 2}


def test_one_template_repeated_does_not_become_the_test_set():
    rng = np.random.default_rng(1)
    template = np.concatenate([np.zeros(500, np.uint64), far_looks(500, rng).hashes])
    for seed in range(30):
        config = PackConfig(validation=0.2, test=0.2, seed=seed)
        split, _ = assign_splits(digests(1000, rng), Looks(template, np.zeros((1000, THUMBNAIL), np.uint8)), config)
        assert set(split[:500]) == {0}


@pytest.mark.parametrize("rows", [3, 4, 10])
def test_few_rows_still_fill_every_split(rows):
    rng = np.random.default_rng(rows)
    for seed in range(20):
        split, _ = assign_splits(digests(rows, rng), far_looks(rows, rng), PackConfig(seed=seed, near=Near(0)))
        assert set(split) == {0, 1, 2}


def test_too_few_rows_are_refused_unless_no_split_is_asked():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="found 2 kept rows in 2 clusters"):
        assign_splits(digests(2, rng), far_looks(2, rng), PackConfig())
    split, _ = assign_splits(digests(2, rng), far_looks(2, rng), PackConfig(validation=0, test=0))
    assert split.tolist() == [0, 0]


@pytest.mark.parametrize("wrong", [{"test": -0.1}, {"test": 0.5, "validation": 0.5}, {"rows_per_file": 0}])
def test_config_refuses_nonsense(wrong):
    with pytest.raises(UserError):
        parse(PackConfig, wrong, "curation.pack")


# --- faces -------------------------------------------------------------------------------------------------

def test_blur_faces_asks_for_the_annotator(world):
    paths, out = world
    with pytest.raises(UserError, match=r"found no face_boxes in .*; add `faces: \{\}` to curation\.annotate"):
        pack(*paths, out, PackConfig(blur_faces=True))


def test_faces_are_blurred_and_other_pictures_keep_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmpipe.models.scorer.load_scorer", lambda source, batch_size: FakeScorer())
    annotation._annotators.cache_clear()
    (tmp_path / "scorer").mkdir()
    rows = [*rows_of(range(12)), row("face", jpeg(portrait()), "a portrait of a person")]
    write_pool(tmp_path / "pools/a", rows)
    settings = annotation.AnnotateConfig(faces=Faces.Config())
    annotated = tmp_path / "annotations"
    annotation.annotate("a", tmp_path / "pools/a", tmp_path / "scorer", annotated / "a", settings, Cluster("inline"))
    annotation._annotators.cache_clear()
    select(tmp_path / "pools", annotated, tmp_path / "nowhere", tmp_path / "selection", SelectConfig(order=ORDER))
    pack(tmp_path / "pools", annotated, tmp_path / "selection", tmp_path / "out", PackConfig(blur_faces=True))
    packed = pq.read_table(tmp_path / "out/train", columns=["uid", "image"]).to_pylist()
    packed += pq.read_table(tmp_path / "out/validation", columns=["uid", "image"]).to_pylist()
    packed += pq.read_table(tmp_path / "out/test", columns=["uid", "image"]).to_pylist()
    stored = {r["uid"]: r["data"] for r in rows}
    assert [r["uid"] for r in packed if r["image"]["bytes"] != stored[r["uid"]]] == ["face"]
