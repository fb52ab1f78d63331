"""Hugging Face datasets as pools, and lists recognised by their columns."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.curate.sources.places import encoded, ends, files_of, fill, rows_of, run
from vlmpipe import shards
from vlmpipe.curate.sources.flavours import Columns
from vlmpipe.curate.urls import read_list
from vlmpipe.errors import UserError

DATASET = {"kind": "dataset"}


def made(count, first=0):
    cells = [{"bytes": encoded(i), "path": f"{i}.jpg"} for i in range(first, first + count)]
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), "n": datasets.Value("int64")}
    facts = {"image": cells, "text": [f"caption {i}" for i in range(first, first + count)], "n": list(range(count))}
    return datasets.Dataset.from_dict(facts, features=datasets.Features(kinds))


def captions(out):
    return [row["caption"] for row in rows_of(out)]


def test_a_saved_dataset_and_its_splits(tmp_path):
    made(6).save_to_disk(tmp_path / "one", num_shards=2)
    out = run(tmp_path, tmp_path / "one", source=DATASET, columns={"extra": ["n"]})
    assert captions(out) == [f"caption {i}" for i in range(6)]
    assert [row["n"] for row in rows_of(out)] == list(range(6))
    assert rows_of(out)[5]["bytes"] == len(encoded(5)) and shards.read_manifest(out)["downloaded"] == 6
    datasets.DatasetDict(train=made(2), test=made(3, first=10)).save_to_disk(tmp_path / "two")
    assert captions(run(tmp_path / "2", tmp_path / "two", source=DATASET)) == ["caption 0", "caption 1"]
    test = run(tmp_path / "3", tmp_path / "two", source=DATASET | {"split": "test"})
    assert captions(test) == ["caption 10", "caption 11", "caption 12"]
    with pytest.raises(UserError, match="found splits train, test; expected 'tset'"):
        run(tmp_path / "4", tmp_path / "two", source=DATASET | {"split": "tset"})


def test_parquet_with_splits_row_groups_and_several_captions(tmp_path):
    made(2).to_parquet(tmp_path / "in" / "data" / "test-00000-of-00001.parquet")
    table = pa.table({"jpg": [encoded(i) for i in range(150)], "captions": [[f"a {i}", f"b {i}"] for i in range(150)],
                      "url": [f"http://a.test/{i}" for i in range(150)]})
    pq.write_table(table.slice(0, 150), tmp_path / "in" / "data" / "train-00000-of-00001.parquet", row_group_size=40)
    out = run(tmp_path, tmp_path / "in", source=DATASET | {"split": "train"}, samples_per_shard=70)
    rows = rows_of(out)
    assert [row["caption"] for row in rows] == [f"{kind} {i}" for i in range(150) for kind in "ab"]
    assert [row["url"] for row in rows[::2]] == table["url"].to_pylist()
    assert [row["bytes"] for row in rows[1::2]] == [len(encoded(i)) for i in range(150)]
    assert {row["status"] for row in rows} == {"downloaded"} and len({row["uid"] for row in rows}) == 300


def test_rows_without_a_usable_picture(tmp_path):
    fill(tmp_path / "in", {"beside.jpg": 7})
    fill(tmp_path, {"secret.jpg": 8})
    cells = [{"bytes": encoded(1), "path": None}, {"bytes": None, "path": None}, {"bytes": b"words", "path": None},
             {"bytes": b"\xff" * 9000, "path": None}, {"bytes": None, "path": "beside.jpg"},
             {"bytes": None, "path": "../secret.jpg"}, None]
    pq.write_table(pa.table({"image": cells, "text": list("abcdefg")}), tmp_path / "in" / "a.parquet")
    found = ends(run(tmp_path, tmp_path / "in", source=DATASET, max_bytes=8000))
    assert list(found.values()) == ["a", "no_image", "not_an_image", "too_large", "e", "outside", "no_image"]


def test_a_dataset_of_addresses_becomes_a_url_list(tmp_path):
    table = pa.table({"URL": ["http://10.0.0.1/a.jpg"], "TEXT": ["t"], "similarity": [0.3]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="private_address 1"):
        run(tmp_path, tmp_path / "a.parquet", source=DATASET)
    row = rows_of(tmp_path / "out")[0]
    assert (row["url"], row["caption"], row["similarity"]) == ("http://10.0.0.1/a.jpg", "t", 0.3)


def test_a_stream_of_the_hub_is_read_once(tmp_path, monkeypatch):
    """Through `datasets.load_dataset(..., streaming=True)`, of a local folder in the place of an id."""
    made(6).to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    source = DATASET | {"hub": str(tmp_path / "hub")}
    from vlmpipe.curate.sources import listing

    asked, load = [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append(k) or load(*a, **k))
    monkeypatch.setattr("vlmpipe.curate.fetch.map_shards", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tmp_path / "config.yaml", source=source)
    assert (tmp_path / "state" / listing.STAGED / "pictures").stat().st_size == sum(len(encoded(i)) for i in range(6))
    monkeypatch.undo()
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("streamed again"))
    out = run(tmp_path, tmp_path / "config.yaml", source=source)
    assert captions(out) == [f"caption {i}" for i in range(6)]
    assert not (tmp_path / "state" / listing.STAGED).exists()
    assert [(k["streaming"], k["split"]) for k in asked] == [(True, "train")] and "trust_remote_code" not in asked[0]
    monkeypatch.undo()
    assert files_of(out) == files_of(run(tmp_path / "again", tmp_path / "config.yaml", source=source))


def test_what_can_not_be_streamed_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"can't stream dataset .*/none .*; check source.hub") as caught:
        run(tmp_path, tmp_path / "config.yaml", source=DATASET | {"hub": str(tmp_path / "none")})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("table, source, message", [
    ({"a": [1], "b": [2]}, {}, r"found columns a, b; expected 'url'.*the columns of DataComp.*set source.image"),
    ({"image": [b"x"], "jpg": [b"x"], "text": ["t"]}, {}, "found pictures in image, jpg; expected one column"),
    ({"image": [b"x"], "b": ["t"]}, {}, "found columns image, b; expected a caption column"),
    ({"image": [1], "text": ["t"]}, {"image": "image"}, "expected pictures in 'image'"),
])
def test_unusable_datasets_fail_in_one_line(tmp_path, table, source, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, tmp_path / "a.parquet", source=DATASET | source)
    assert "\n" not in str(caught.value)


def test_damaged_files_of_a_dataset(tmp_path):
    made(3).save_to_disk(tmp_path / "one")
    file = next((tmp_path / "one").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-500])
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    for urls in ("one", "a.parquet"):
        with pytest.raises(UserError, match="found damaged"):
            run(tmp_path, tmp_path / urls, source=DATASET)


# --- lists recognised by their columns ---------------------------------------------------------------------

U = "http://a.test/1.jpg"
LISTS = {
    "LAION": ({"SAMPLE_ID": 1, "URL": U, "TEXT": "t", "WIDTH": 8, "HEIGHT": 9, "similarity": 0.3},
              {"SAMPLE_ID": 1, "WIDTH": 8, "HEIGHT": 9, "similarity": 0.3}),
    "PMD": ({"image_url": U, "texts": ["t", "u"], "source": "sbu", "meta": "{}"}, {"source": "sbu", "meta": "{}"}),
    "Conceptual Captions": ({"image_url": U, "caption": "t"}, {}),
    "DataComp": ({"uid": "a" * 32, "url": U, "text": "t", "original_width": 8, "original_height": 9,
                  "clip_b32_similarity_score": 0.2, "sha256": "ab"},
                 {"list_original_width": 8, "list_original_height": 9, "clip_b32_similarity_score": 0.2,
                  "list_sha256": "ab"}),
    "COYO": ({"id": 3, "url": U, "text": "t", "width": 4}, {"id": 3, "list_width": 4}),
}


@pytest.mark.parametrize("name", LISTS)
def test_metadata_is_recognised_and_its_other_columns_come_along(tmp_path, capsys, name):
    row, extra = LISTS[name]
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for file in ("a.jsonl", "a.parquet"):
        found = list(read_list(tmp_path / file, Columns()))
        assert [row["url"] for row in found] == [U] * len(found)
        assert [row["caption"] for row in found] == (["t", "u"] if name == "PMD" else ["t"])
        others = {k: v for k, v in found[0].items() if k not in ("uid", "url", "caption", "place")}
        assert others == extra
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and file in said and f": {name} metadata (url " in said
    if name == "DataComp":
        assert found[0]["uid"] == "a" * 32


@pytest.mark.parametrize("line, name", [(f'a "dog\t{U}', "CC3M"), (f'{U}\ta "dog', "CC12M")])
def test_conceptual_captions_have_no_header_and_no_quotes(tmp_path, line, name):
    (tmp_path / "cc.tsv").write_text(f'{line}\n"{line}'.replace('"http', "http") + "\n")
    rows = list(read_list(tmp_path / "cc.tsv", Columns()))
    assert rows[0]["url"] == U and rows[0]["caption"] == 'a "dog' and len(rows) == 2, name


def test_given_columns_are_taken_as_they_are(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("URL,TEXT,alt,similarity\nu,t,a,1\n")
    rows = list(read_list(tmp_path / "a.csv", Columns(url="URL", caption="alt")))
    assert {k: v for k, v in rows[0].items() if k != "uid"} == {"url": "u", "caption": "a", "place": None}
    rows = list(read_list(tmp_path / "a.csv", Columns(extra=("similarity",))))
    assert rows[0]["caption"] == "t" and set(rows[0]) == {"uid", "url", "caption", "similarity", "place"}
    capsys.readouterr()


def test_unknown_columns_are_one_clear_error(tmp_path):
    (tmp_path / "a.csv").write_text("link,words\nu,t\n")
    with pytest.raises(UserError, match=r"found columns link, words; expected 'url'.*or the columns of DataComp, PMD"):
        list(read_list(tmp_path / "a.csv", Columns()))


def test_the_files_of_one_list_are_of_one_kind(tmp_path):
    (tmp_path / "a.csv").write_text("URL,TEXT,n\nu,t,1\n")
    (tmp_path / "b.csv").write_text("url,caption\nu,t\n")
    with pytest.raises(UserError, match=r"b\.csv: found columns url, caption; expected 'URL'"):
        list(read_list(tmp_path, Columns()))


def test_real_web_metadata(tmp_path):
    urls = Path(__file__).resolve().parents[4] / "shared" / "data" / "url-lists" / "laion_like_10000.parquet"
    if not urls.exists():
        pytest.skip("no ../shared/data with the list of real web addresses")
    rows = list(read_list(urls, Columns()))
    table = pq.read_table(urls)
    assert [row["caption"] for row in rows] == [text or "" for text in table["TEXT"].to_pylist()]
    assert len({row["uid"] for row in rows}) == 10_000
