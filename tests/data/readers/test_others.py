"""Lists of addresses, folders of classes, questions on clips, VQAv2 as records; and damage to any of the files."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmpipe.data.pictures import write_pictures
from vlmpipe.data.readers import READERS
from vlmpipe.data.readers.folders import read_folders
from vlmpipe.data.readers.listings import read_listing
from vlmpipe.data.readers.videos import read_video_questions
from vlmpipe.data.readers.vqav2 import read_vqav2
from vlmpipe.data.records import CaptionRecord, ClassRecord
from vlmpipe.data.task_world import TASKS, write_tasks
from vlmpipe.data.vqa import VqaExample, write_vqa
from vlmpipe.errors import UserError

LAION = Path(__file__).parents[4] / "shared/data/url-lists/laion_like_10000.parquet"
PAIRS = [CaptionRecord("1", ("http://a.test/1.jpg",), ('a "red" star', "a star")),
         CaptionRecord("2", ("http://a.test/2.jpg",), ("two circles",))]


def write_conceptual(path, pairs):
    """A tsv of caption and address without a header, as CC3M is."""
    path.write_text("".join(f"{caption}\t{pair.images[0]}\n" for pair in pairs for caption in pair.captions))


def write_laion(path, pairs):
    rows = [{"URL": pair.images[0], "TEXT": caption} for pair in pairs for caption in pair.captions]
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_pmd(path, pairs):
    """All captions of a picture in one row."""
    rows = [{"image_url": pair.images[0], "texts": pair.captions, "source": "scenes", "meta": "{}"} for pair in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("write", "name"), [
    (write_conceptual, "train.tsv"), (write_laion, "part.parquet"), (write_pmd, "pmd.jsonl"),
])
def test_lists_that_are_written_are_read(tmp_path, write, name):
    write(tmp_path / name, PAIRS)
    records = read_listing(tmp_path / name)
    assert [(r.images, r.captions) for r in records] == [(p.images, (c,)) for p in PAIRS for c in p.captions]
    assert len({record.id for record in records}) == 3 and all(len(record.id) == 32 for record in records)


def test_both_forms_of_conceptual_captions(tmp_path):
    """CC3M has the caption first, CC12M the address; neither has a header or quotes."""
    (tmp_path / "cc3m.tsv").write_text('a "bird\thttp://a.test/1.jpg\nfish\thttp://a.test/2.jpg\n')
    (tmp_path / "cc12m.tsv").write_text("http://a.test/1.jpg\ta \"bird\nhttp://a.test/2.jpg\tfish\n")
    assert read_listing(tmp_path / "cc3m.tsv") == read_listing(tmp_path / "cc12m.tsv")
    assert read_listing(tmp_path / "cc3m.tsv")[0].captions == ('a "bird',)


def test_ids_are_those_of_the_pool(tmp_path):
    """So a downloaded pool's pictures are found by the record's id."""
    from vlmpipe.curate.sources.flavours import Columns
    from vlmpipe.curate.urls import read_list

    pq.write_table(pa.table({"URL": ["http://a.test/1.jpg"], "TEXT": ["x"]}), tmp_path / "laion.parquet")
    assert [r.id for r in read_listing(tmp_path)] == [row["uid"] for row in read_list(tmp_path, Columns())]


def test_folders_are_classes(tmp_path):
    for name in ("train/red_circle/1.jpg", "train/star/2.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    assert read_folders(tmp_path / "train") == [
        ClassRecord("red_circle/1.jpg", "red_circle/1.jpg", "red circle"),
        ClassRecord("star/2.png", "star/2.png", "star"),
    ]
    (tmp_path / "train/loose.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"found picture loose\.jpg outside"):
        read_folders(tmp_path / "train")


def test_questions_on_clips(tmp_path):
    rows = [{"id": 5, "video_id": 3, "question": "What moves?", "answer": "star", "category_id": 0}]
    (tmp_path / "train_qa.json").write_text(json.dumps(rows))
    write_pictures(tmp_path / "images", [(f"video{v}/{n:03d}.jpg", b"x") for v in (3, 4) for n in (1, 0, 2)])
    record, = read_video_questions(tmp_path)
    assert record.images == ("video3/000", "video3/001", "video3/002") and record.answers == ("star",)
    (tmp_path / "train_qa.json").write_text(json.dumps([rows[0] | {"video_id": 9}]))
    with pytest.raises(UserError, match=r"video_id: found int 9; expected one of the 2 clips"):
        read_video_questions(tmp_path)


def test_vqav2(tmp_path):
    write_vqa(tmp_path, [VqaExample(10, 1, "How many?", ("2",) * 10, "number", "count")], [(1, b"one")], "train")
    record, = read_vqav2(tmp_path)
    assert (record.id, record.images, record.answers) == ("10", ("1",), ("2",) * 10)
    assert record.slices == {"question_type": "count", "answer_type": "number"} and record.answerable is None


def test_every_reader_says_what_is_missing(tmp_path):
    for name, read in READERS.items():
        with pytest.raises(UserError, match="found") as caught:
            read(tmp_path / "nowhere")
        assert "\n" not in str(caught.value), name


ODD = (None, True, -1, 10**30, float("nan"), "", "\ud800", [], {}, [[1, 2]], "../x")


def changed(value, rng):
    """A copy in which a few values are odd and a few fields are gone."""
    if rng.random() < 0.004:
        return ODD[int(rng.integers(len(ODD)))]
    if isinstance(value, dict):
        return {key: changed(inner, rng) for key, inner in value.items() if rng.random() > 0.001}
    return [changed(inner, rng) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("classes", "statements", "pairs", "objects")])
def test_whatever_stands_in_a_file_it_is_read_or_named(tmp_path, name):
    """Random damage ends in records or in one line of a user's error, and in nothing else."""
    write_tasks(tmp_path, 8, 0, tasks=(name,))
    rng = np.random.default_rng(0)
    refused = 0
    for file in (tmp_path / name / "train").glob("*.json"):
        whole = file.read_text()
        for _ in range(8):
            file.write_text(json.dumps(changed(json.loads(whole), rng)))
            try:
                READERS[TASKS[name].reader](tmp_path / name / "train")
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
        file.write_text(whole)
    assert refused


@pytest.mark.skipif(not LAION.is_file(), reason=f"needs the real list of web rows in {os.path.relpath(LAION)}")
def test_real_rows_of_the_web():
    records = read_listing(LAION)
    assert len(records) == 10_000 and len({record.id for record in records}) == 10_000
    addresses = [record for record in records if record.images[0].startswith("http")]
    assert len(addresses) == 9_999  # the columns of one published row are shifted
    assert all(record.captions[0] for record in records)
