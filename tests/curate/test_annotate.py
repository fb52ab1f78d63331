"""Annotation: what the columns hold, what a rerun does again, and what a damaged pool says."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.curate.made_pools import FakeScorer, jpeg, picture, row, write_pool
from vlmpipe import shards
from vlmpipe.config import parse
from vlmpipe.curate import annotate as module
from vlmpipe.curate.annotate import AnnotateConfig, annotate
from vlmpipe.curate.annotators.base import NoConfig
from vlmpipe.curate.annotators.embedding import Embeddings, Probe
from vlmpipe.curate.annotators.negative import NegClipLossConfig, batch_losses
from vlmpipe.curate.duplicates import look
from vlmpipe.dispatch import Cluster
from vlmpipe.errors import UserError

INLINE = Cluster(backend="inline")
FRENCH = "un cercle rouge et bleu dans un carré vert"
TOWER = {"width": 32, "depth": 1, "heads": 2, "hidden": 48}
DUAL_ENCODER = {
    "vision": {"image_size": 32, "patch_size": 8, "stem": "conv", "stem_width": 8, "transformer": TOWER},
    "text": {"context": 32, "causal": False, "pool": "mean", "transformer": TOWER},
    "fusion": {"kind": "none"},
    "heads": {"projection": {"width": 16}},
}
BROKEN = jpeg(picture(9))[:-300]


@pytest.fixture
def scorer(tmp_path, monkeypatch):
    """A scorer directory, and the fake that stands for it."""
    directory = tmp_path / "scorer"
    directory.mkdir()
    (directory / "weights").write_text("first")
    fake = FakeScorer()
    monkeypatch.setattr("vlmpipe.models.scorer.load_scorer", lambda source, batch_size: fake)
    module._annotators.cache_clear()
    yield directory, fake
    module._annotators.cache_clear()


@pytest.fixture
def pool(tmp_path):
    red = jpeg(Image.new("RGB", (60, 30), (250, 0, 0)), 95)
    return write_pool(
        tmp_path / "pools" / "web",
        [row("a", red, "a red box"), row("b"), row("c", BROKEN), row("d", jpeg(picture(1)), FRENCH)],
        [row("e", jpeg(picture(2)), None), row("f", jpeg(picture(3)), "12 34")],
    )


def read(directory):
    return {r["uid"]: r for r in shards.read_rows(directory).to_pylist()}


def run(pool, scorer, out, **config):
    annotate("web", pool, scorer[0], out, AnnotateConfig(**config), INLINE)
    return out


def test_columns_hold_what_they_say(pool, scorer, tmp_path):
    rows = read(run(pool, scorer, tmp_path / "out"))
    assert list(rows) == ["a", "c", "d", "e", "f"]
    a = rows["a"]
    assert (a["width"], a["height"], a["aspect"], a["caption_chars"], a["caption_words"]) == (60, 30, 2.0, 9, 3)
    red = scorer[1].encode_images([Image.new("RGB", (9, 9), (250, 0, 0))])[0]
    text = scorer[1].encode_texts(["a red box"])[0]
    assert a["clip_score"] == pytest.approx(float(red @ text), abs=0.02)
    assert np.allclose(a["image_embedding"], red, atol=0.02) and np.allclose(a["text_embedding"], text, atol=1e-3)
    assert a["error"] is None
    assert rows["d"]["language"] == "fr" and rows["d"]["language_score"] > 0.5
    assert rows["a"]["language"] == "en"


def test_the_hash_is_the_one_of_the_stored_picture(pool, scorer, tmp_path):
    rows = read(run(pool, scorer, tmp_path / "out"))
    for uid, data in shards.iter_images(pool, "00001"):
        looks = look([Image.open(io.BytesIO(data))])
        assert rows[uid]["phash"] == looks.hashes[0] and rows[uid]["thumbnail"] == looks.thumbnails[0].tobytes()


def test_a_row_that_does_not_decode_has_an_error_and_nulls(pool, scorer, tmp_path):
    broken = read(run(pool, scorer, tmp_path / "out"))["c"]
    assert broken.pop("error") == "broken_image" and broken.pop("uid") == "c"
    assert set(broken.values()) == {None}


def test_captions_without_letters_have_no_language(pool, scorer, tmp_path):
    rows = read(run(pool, scorer, tmp_path / "out"))
    assert [(rows[u]["language"], rows[u]["language_score"]) for u in "ef"] == [("und", 0.0)] * 2
    assert rows["e"]["caption_chars"] == 0


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batches_do_not_change_the_columns(pool, scorer, tmp_path, batch_size):
    reference, other = run(pool, scorer, tmp_path / "a"), run(pool, scorer, tmp_path / "b", batch_size=batch_size)
    assert shards.read_rows(reference).equals(shards.read_rows(other))


def test_shards_of_failures_only_fit_with_the_others(scorer, tmp_path):
    pool = write_pool(tmp_path / "p", [row("a")], [row("b", BROKEN)], [row("c", jpeg(picture(1)))])
    rows = read(run(pool, scorer, tmp_path / "out"))
    assert [r["error"] for r in rows.values()] == ["broken_image", None]
    assert [s["rows"] for s in shards.read_manifest(tmp_path / "out")["shards"]] == [0, 1, 1]


def test_a_second_run_measures_nothing(pool, scorer, tmp_path):
    out = run(pool, scorer, tmp_path / "out")
    before, done = {p.name: p.read_bytes() for p in out.iterdir()}, scorer[1].pictures
    run(pool, scorer, out, batch_size=3)
    assert scorer[1].pictures == done == 4
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_killed_run_goes_on_where_it_stopped(pool, scorer, tmp_path):
    whole = run(pool, scorer, tmp_path / "whole")
    out = run(pool, scorer, tmp_path / "out")
    (out / "manifest.json").unlink()
    (out / "00001.parquet").unlink()
    (out / ".00001.parquet.77.partial").write_bytes(b"PAR1 half")
    done = scorer[1].pictures
    run(pool, scorer, out)
    assert scorer[1].pictures == done + 2
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_what_moved_is_done_again_and_leftovers_go(pool, scorer, tmp_path):
    out = run(pool, scorer, tmp_path / "out")
    done = scorer[1].pictures
    write_pool(pool, [row("x", jpeg(picture(8)), "a red box")])
    run(pool, scorer, out)
    assert sorted(p.name for p in out.iterdir()) == ["00000.parquet", "manifest.json"]
    assert scorer[1].pictures == done + 1 and list(read(out)) == ["x"]
    (scorer[0] / "weights").write_text("second")
    run(pool, scorer, out)
    assert scorer[1].pictures == done + 2
    run(pool, scorer, out, embeddings=Embeddings.Config("A photo depicts "))
    assert scorer[1].pictures == done + 3


def test_an_interrupted_redo_is_not_read_as_whole(pool, scorer, tmp_path, monkeypatch):
    out = run(pool, scorer, tmp_path / "out")
    (scorer[0] / "weights").write_text("second")
    write = shards.write_table

    def dies_on_the_second(path, table):
        if path.name == "00001.parquet":
            raise KeyboardInterrupt
        write(path, table)

    monkeypatch.setattr(shards, "write_table", dies_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(pool, scorer, out)
    with pytest.raises(UserError, match="incomplete"):
        shards.read_manifest(out)


def test_a_pool_whose_tar_and_table_disagree_is_named(scorer, tmp_path):
    pool = write_pool(tmp_path / "p", [row("a", jpeg(picture(1))), row("b", jpeg(picture(2)))])
    manifest = json.loads((pool / "manifest.json").read_text())
    digest = shards.write_tar(pool / "00000.tar", [("b.jpg", jpeg(picture(2)))])
    manifest["shards"][0]["files"]["00000.tar"] = digest
    shards.write_json(pool / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"corrupt shard .*00000\.tar: found picture b where its table lists a"):
        run(pool, scorer, tmp_path / "out")


def test_an_incomplete_pool_is_refused(scorer, tmp_path):
    (tmp_path / "pool").mkdir()
    with pytest.raises(UserError, match=r"no manifest\.json"):
        run(tmp_path / "pool", scorer, tmp_path / "out")


def test_a_real_scorer_gives_cosines_and_unit_embeddings_in_any_process(pool, tmp_path):
    import torch

    from vlmpipe.models.directory import build, save
    from vlmpipe.models.vlm import VLMConfig

    torch.set_num_threads(1)
    model, processor = build(parse(VLMConfig, DUAL_ENCODER, "dual encoder"), ["a red box"])
    save(model, processor, tmp_path / "scorer")
    module._annotators.cache_clear()
    annotate("web", pool, tmp_path / "scorer", tmp_path / "out", AnnotateConfig(), INLINE)
    workers = Cluster(backend="processes", tasks=2)
    annotate("web", pool, tmp_path / "scorer", tmp_path / "other", AnnotateConfig(), workers)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
    for r in read(tmp_path / "out").values():
        if r["error"] is None:
            assert -1 <= r["clip_score"] <= 1
            assert np.linalg.norm(r["image_embedding"]) == pytest.approx(1, abs=5e-3)
            assert np.dot(r["image_embedding"], r["text_embedding"]) == pytest.approx(r["clip_score"], abs=5e-3)


def test_language_needs_no_network():
    """The detector's own model is used: every socket is refused in a fresh process."""
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "from vlmpipe.curate.annotators.base import Batch, Tools\n"
        "from vlmpipe.curate.annotators.caption import Language\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "captions = ['ein roter Kreis neben einem blauen Quadrat', 'DER KREIS IST \\n\\r ROT UND RUND', '']\n"
        "print(Language(Language.Config(100), Tools())(Batch([], captions))[0].to_pylist())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['de', 'de', 'und']"


# --- what is on, off and kept ------------------------------------------------------------------------------

CHEAP = {"embeddings": None}


def columns(directory) -> list[str]:
    return shards.read_rows(directory).column_names


def test_without_embeddings_no_scorer_is_asked_for(pool, tmp_path):
    annotate("web", pool, tmp_path / "no such scorer", tmp_path / "out", AnnotateConfig(**CHEAP), INLINE)
    rows = read(tmp_path / "out")
    assert rows["a"]["sharpness"] is not None and "clip_score" not in rows["a"]
    assert shards.read_manifest(tmp_path / "out")["scorer"] is None


def test_switching_one_annotator_measures_that_one(pool, scorer, tmp_path):
    whole = run(pool, scorer, tmp_path / "whole", pii=NoConfig())
    out = run(pool, scorer, tmp_path / "out", pii=None)
    assert "pii" not in columns(out)
    done = scorer[1].pictures
    run(pool, scorer, out, pii=NoConfig())
    assert scorer[1].pictures == done
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    run(pool, scorer, out, quality=None)
    assert "sharpness" not in columns(out) and "sharpness_error" not in columns(out) and scorer[1].pictures == done


def test_nothing_on_still_says_which_rows_decode(pool, scorer, tmp_path):
    off = dict.fromkeys(("geometry", "quality", "hashes", "text", "language", "pii", "embeddings"))
    assert columns(run(pool, scorer, tmp_path / "out", **off)) == ["uid", "error"]
    assert read(tmp_path / "out")["c"] == {"uid": "c", "error": "broken_image"}


def test_a_probe_reads_the_embeddings_that_are_there(pool, scorer, tmp_path):
    head = tmp_path / "head.npz"
    np.savez(head, weight=np.array([1.0, 0, 0]), bias=np.zeros(1))
    out = run(pool, scorer, tmp_path / "out")
    done = scorer[1].pictures
    probes = {"red": Probe.Config(head)}
    run(pool, scorer, out, probes=probes)
    rows = read(out)
    assert rows["a"]["probe_red"] == pytest.approx(rows["a"]["image_embedding"][0]) and scorer[1].pictures == done
    np.savez(head, weight=np.array([2.0, 0, 0]), bias=np.zeros(1))
    run(pool, scorer, out, probes=probes)
    assert read(out)["a"]["probe_red"] == pytest.approx(2 * rows["a"]["probe_red"]) and scorer[1].pictures == done
    head.unlink()
    with pytest.raises(UserError, match=r"found no file .*head\.npz; expected the weights of probe_red"):
        run(pool, scorer, out, probes=probes)


def test_neg_clip_loss_is_the_pools_and_survives_a_kill(pool, scorer, tmp_path):
    settings = {"neg_clip_loss": NegClipLossConfig(batch=4, repeats=1)}
    out = run(pool, scorer, tmp_path / "out", **settings)
    rows = [row for row in read(out).values() if row["error"] is None]
    images, texts = (np.array([r[f"{side}_embedding"] for r in rows], np.float32) for side in ("image", "text"))
    assert [r["neg_clip_loss"] for r in rows] == pytest.approx(batch_losses(images, texts, 0.01), abs=1e-6)
    assert read(out)["c"]["neg_clip_loss_error"] == "no image_embedding"
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    plain = run(pool, scorer, tmp_path / "plain")
    (out / "00001.parquet").write_bytes((plain / "00001.parquet").read_bytes())
    (out / "manifest.json").unlink()
    run(pool, scorer, out, **settings)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    run(pool, scorer, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in plain.iterdir()}


def test_failures_are_counted_and_said(pool, scorer, tmp_path, monkeypatch, capfd):
    fine = FakeScorer.encode_texts

    def fails(self, texts):
        if "a red box" in texts:
            raise RuntimeError("no red today")
        return fine(self, texts)

    monkeypatch.setattr(FakeScorer, "encode_texts", fails)
    out = run(pool, scorer, tmp_path / "out")
    row = read(out)["a"]
    assert row["error"] is None and row["embeddings_error"] == "RuntimeError: no red today"
    assert row["clip_score"] is None and row["sharpness"] is not None and read(out)["d"]["clip_score"] is not None
    assert shards.read_manifest(out)["failed"]["embeddings"] == 1
    assert "annotate web: embeddings failed on 1 rows" in capfd.readouterr().err


def test_what_is_off_by_default_names_what_it_needs():
    where = "params.yaml: curation.annotate"
    assert parse(AnnotateConfig, {"faces": {}, "language": None}, where).faces is not None
    with pytest.raises(UserError, match=r"found tmars without ocr; expected both; add `ocr: \{\}`"):
        parse(AnnotateConfig, {"tmars": {}}, where)
    with pytest.raises(UserError, match="found probes without embeddings"):
        parse(AnnotateConfig, {"probes": {"x": {"file": "x.npz"}}, "embeddings": None}, where)
    with pytest.raises(UserError, match=r"unknown key 'curation\.annotate\.faces|unknown key 'size'"):
        parse(AnnotateConfig, {"faces": {"size": 1}}, where)


def test_config_refuses_nonsense():
    with pytest.raises(UserError, match="batch_size 0"):
        AnnotateConfig(batch_size=0)
    with pytest.raises(UserError, match="threads -1"):
        AnnotateConfig(threads=-1)
