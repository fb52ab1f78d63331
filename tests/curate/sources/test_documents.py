"""Interleaved documents as a pool."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.curate.sources.places import ends, files_of, fill, rows_of, run
from vlmpipe import shards
from vlmpipe.curate.sources.documents import read_documents
from vlmpipe.errors import UserError

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
DOCUMENTS = {"kind": "documents"}
OBELICS = [
    {"images": [None, "a.jpg", None, "b.jpg"], "texts": ["Intro.\n\nAbove a.", None, "Below a.\n\nAbove b.", None],
     "general_metadata": '{"url": "http://page.test/1"}', "lang": "en"},
    {"images": [None], "texts": ["No picture here."], "general_metadata": "{}", "lang": "en"},
    {"images": ["gone.jpg", "a.jpg", None], "texts": [None, None, "Far below."], "general_metadata": None,
     "lang": "de"},
]
MMC4 = {"url": "http://page.test/2", "text_list": ["One.", "Two.", "Three."], "image_info": [
    {"image_name": "x", "raw_url": "b.jpg", "matched_text_index": 2, "matched_sim": 0.3},
    {"image_name": "y", "raw_url": "a.jpg", "matched_text_index": 0, "matched_sim": 0.2}]}


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_obelics(tmp_path, name):
    fill(tmp_path / "in", {"a.jpg": 1, "b.jpg": 2})
    out = run(tmp_path, write(tmp_path / "in" / name, OBELICS), source=DOCUMENTS, columns={"extra": ["lang"]})
    rows = rows_of(out)
    assert [(row["url"], row["caption"], row["position"], row["lang"], row["reason"]) for row in rows] == [
        ("a.jpg", "Below a.", 1, "en", None), ("b.jpg", "Above b.", 3, "en", None),
        ("gone.jpg", "Far below.", 0, "de", "missing_file"), ("a.jpg", "Far below.", 1, "de", None)]
    layout = pq.read_table(out / "documents.parquet").to_pylist()
    assert [row["url"] for row in layout] == ["http://page.test/1", None, None]
    assert [row["document_id"] for row in rows] == [layout[i]["document_id"] for i in (0, 0, 2, 2)]
    assert len({row["document_id"] for row in layout}) == 3
    for row in rows:
        document = next(d for d in layout if d["document_id"] == row["document_id"])
        assert document["parts"][row["position"]] == {"text": None, "image": row["url"], "uid": row["uid"]}
    assert shards.read_manifest(out)["documents"] == "documents.parquet"


def test_a_document_is_put_together_from_kept_rows(tmp_path):
    fill(tmp_path / "in", {"a.jpg": 1, "b.jpg": 2})
    out = run(tmp_path, write(tmp_path / "in" / "d.jsonl", OBELICS), source=DOCUMENTS)
    uids = [row["uid"] for row in rows_of(out)]
    parts = [parts for _, parts in read_documents(out, {uids[1], uids[3]})]
    assert parts == [
        [("text", "Intro.\n\nAbove a."), ("text", "Below a.\n\nAbove b."), ("image", uids[1])],
        [("text", "No picture here.")], [("image", uids[3]), ("text", "Far below.")]]


def test_mmc4(tmp_path):
    fill(tmp_path / "in", {"a.jpg": 1, "b.jpg": 2})
    out = run(tmp_path, write(tmp_path / "in" / "d.jsonl", [MMC4, MMC4]), source=DOCUMENTS)
    rows = rows_of(out)
    assert [(row["url"], row["caption"], row["position"]) for row in rows] == [
        ("a.jpg", "One.", 0), ("b.jpg", "Three.", 3)] * 2
    assert len({row["uid"] for row in rows}) == 4 and len({row["document_id"] for row in rows}) == 2
    layout = pq.read_table(out / "documents.parquet").to_pylist()
    parts = [part["text"] or part["image"] for part in layout[0]["parts"]]
    assert parts == ["a.jpg", "One.", "Two.", "b.jpg", "Three."]


def test_addresses_are_fetched_and_files_stay_below_the_documents(tmp_path):
    fill(tmp_path / "in", {"a.jpg": 1})
    fill(tmp_path, {"secret.jpg": 2})
    images = ["a.jpg", "http://10.0.0.1/x.jpg", "file:///etc/passwd", "../secret.jpg", "/etc/passwd"]
    out = run(tmp_path, write(tmp_path / "in" / "d.jsonl", [{"images": images, "texts": ["t"]}]), source=DOCUMENTS)
    assert list(ends(out).values()) == ["t", "private_address", "scheme", "outside", "outside"]


@pytest.mark.parametrize("rows, message", [
    ([{"a": 1}], "line 1: found columns a; expected documents as OBELICS"),
    ([{"images": "x", "texts": ["t"]}], "expected documents as OBELICS"),
    ([{**MMC4, "image_info": [{"raw_url": "x"}]}], "found image_info without 'matched_text_index'"),
    ([{**MMC4, "image_info": [{"raw_url": "x", "matched_text_index": 7}]}], "index 7; expected one of 3 texts"),
    ([OBELICS[1]], "found no rows"),
])
def test_unusable_documents_fail_in_one_line(tmp_path, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, write(tmp_path / "in" / "d.jsonl", rows), source=DOCUMENTS)
    assert "\n" not in str(caught.value)


def test_doing_it_again_leaves_the_same_bytes(tmp_path):
    fill(tmp_path / "in", {"a.jpg": 1, "b.jpg": 2})
    documents = write(tmp_path / "in" / "d.jsonl", [*OBELICS, MMC4])
    first = files_of(run(tmp_path, documents, source=DOCUMENTS))
    (tmp_path / "out" / "documents.parquet").unlink()
    assert files_of(run(tmp_path, documents, source=DOCUMENTS)) == first
    assert files_of(run(tmp_path / "fresh", documents, source=DOCUMENTS)) == first


def test_figures_of_a_textbook_module_are_a_document(tmp_path):
    if not (SHARED / "textbooks" / "pairs.parquet").exists():
        pytest.skip("no ../shared/data/textbooks")
    rows = pq.read_table(SHARED / "textbooks" / "pairs.parquet").to_pylist()
    module = [row for row in rows if row["module"] == rows[0]["module"]]
    module.sort(key=lambda row: row["position"])
    for row in module:
        fill(tmp_path / "in", {row["file"]: (SHARED / "textbooks" / row["file"]).read_bytes()})
    images = [value for row in module for value in (row["file"], None)]
    texts = [value for row in module for value in (None, row["caption"] or row["alt"])]
    documents = write(tmp_path / "in" / "d.parquet", [{"images": images, "texts": texts}])
    out = run(tmp_path, documents, source=DOCUMENTS, samples_per_shard=50)
    assert {row["status"] for row in rows_of(out)} == {"downloaded"}
    _, parts = next(read_documents(out, {row["uid"] for row in rows_of(out)}))
    assert [kind for kind, _ in parts] == ["image", "text"] * len(module)
