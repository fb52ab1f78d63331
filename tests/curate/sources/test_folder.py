"""A folder of pictures as a pool."""

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.curate.sources.places import encoded, ends, files_of, fill, rows_of, run
from vlmpipe import shards
from vlmpipe.dispatch import Cluster
from vlmpipe.errors import UserError

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
FOLDER = {"kind": "folder"}


def test_captions_beside_the_pictures(tmp_path):
    folder = fill(tmp_path / "mine", {
        "b.jpg": 1, "b.txt": " a bee\n", "a/deep/c.PNG": encoded(2, "PNG"),
        "a/deep/c.json": '{"text": "a sea", "n": 7}', "d.webp": encoded(3, "WEBP"),
        "d.webp.caption": "a deer", "notes.md": "no picture",
    })
    out = run(tmp_path, folder, source=FOLDER, columns={"extra": ["n"]})
    assert ends(out) == {"b.jpg": "a bee", "d.webp": "a deer", "a/deep/c.PNG": "a sea"}
    assert [row["n"] for row in rows_of(out)] == [None, None, 7]
    row = rows_of(out)[0]
    assert row["sha256"] == hashlib.sha256(encoded(1)).hexdigest() and row["bytes"] == len(encoded(1))
    assert (row["original_width"], row["original_height"], row["http_status"]) == (40, 30, None)
    uid, data = next(shards.iter_images(out, "00000"))
    assert uid == row["uid"] and Image.open(io.BytesIO(data)).size == (40, 30)
    assert "place" not in row


def test_what_is_no_good_pair_is_a_row_with_its_reason(tmp_path):
    folder = fill(tmp_path / "mine", {
        "good.jpg": 1, "good.txt": "good", "broken.jpg": encoded(2)[:-300], "broken.txt": "b", "text.jpg": "words",
        "text.txt": "t", "empty.jpg": "", "empty.txt": "e", "alone.jpg": 3, "odd.jpg": 4, "odd.json": "{",
        "none.jpg": 5, "none.json": '{"n": 1}', "large.jpg": b"\xff" * 9000, "large.txt": "l",
    })
    assert ends(run(tmp_path, folder, source=FOLDER, max_bytes=8000)) == {
        "alone.jpg": "no_caption", "broken.jpg": "broken_image", "empty.jpg": "not_an_image", "good.jpg": "good",
        "large.jpg": "too_large", "none.jpg": "bad_caption", "odd.jpg": "bad_caption", "text.jpg": "not_an_image",
    }


def test_nothing_outside_of_the_folder_is_read(tmp_path):
    secret = fill(tmp_path / "secret", {"a.jpg": 1, "a.txt": "s"})
    folder = fill(tmp_path / "mine", {
        "good.jpg": 2, "out.txt": "x", "theirs.jpg": 3, "inside.txt": "a link within", "pipe.txt": "p",
        "a::b*[c].jpg": 4, "a::b*[c].txt": "an odd name",
    })
    (folder / "out.jpg").symlink_to(secret / "a.jpg")
    (folder / "theirs.txt").symlink_to(secret / "a.txt")
    (folder / "all").symlink_to(secret)
    (folder / "inside.jpg").symlink_to(folder / "good.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    fill(folder, {"good.txt": "good", "gone.txt": "g"})
    (folder / "loop.txt").write_text("l")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nothing.jpg")
    assert ends(run(tmp_path, folder, source=FOLDER)) == {
        "a::b*[c].jpg": "an odd name", "all": "no_caption", "good.jpg": "good", "gone.jpg": "missing_file",
        "inside.jpg": "a link within", "loop.jpg": "missing_file", "out.jpg": "outside", "pipe.jpg": "not_a_file",
        "theirs.jpg": "outside",
    }


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_captions_in_one_file_as_imagefolder_has_them(tmp_path, kind):
    folder = fill(tmp_path / "mine", {"a.jpg": 1, "deep/b.jpg": 2, "extra.jpg": 3})
    rows = [{"file_name": name, "text": text} for name, text in (
        ("deep/b.jpg", "bee"), ("a.jpg", 'one, "two"'), ("gone.jpg", "g"), ("../secret.jpg", "s"),
        ("/etc/passwd", "p"))]
    fill(tmp_path, {"secret.jpg": 4})
    path = folder / f"metadata.{kind}"
    if kind == "csv":
        quoted = "".join(f'{row["file_name"]},"{row["text"].replace(chr(34), chr(34) * 2)}"\n' for row in rows)
        path.write_text("file_name,text\n" + quoted)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    found = ends(run(tmp_path, folder, source=FOLDER))
    outside = [reason for url, reason in found.items() if url.startswith("../")]
    assert outside == ["outside", "outside"]
    assert {url: end for url, end in found.items() if not url.startswith("../")} == {
        "deep/b.jpg": "bee", "a.jpg": 'one, "two"', "gone.jpg": "missing_file", "extra.jpg": "no_caption"}


def test_metadata_of_inner_folders_names_files_beside_it(tmp_path):
    folder = fill(tmp_path / "mine", {
        "x/a.jpg": 1, "x/metadata.csv": "file_name,text\na.jpg,ex\n",
        "y/a.jpg": 2, "y/metadata.csv": "file_name,text\na.jpg,why\n",
    })
    assert ends(run(tmp_path, folder, source=FOLDER)) == {"x/a.jpg": "ex", "y/a.jpg": "why"}


def test_a_captions_file_of_any_name_and_columns(tmp_path):
    folder = fill(tmp_path / "mine", {"a.jpg": 1, "notes/words.tsv": "pic\tsaid\twho\n../a.jpg\tay\tme\n"})
    out = run(tmp_path, folder, source=FOLDER | {"captions": "notes/words.tsv"},
              columns={"url": "pic", "caption": "said", "extra": ["who"]})
    assert ends(out) == {"a.jpg": "ay"} and rows_of(out)[0]["who"] == "me"


def test_names_as_captions_on_request(tmp_path):
    folder = fill(tmp_path / "mine", {"red_fox-in snow.jpg": 1, "owls/grey_owl.png": 2})
    assert ends(run(tmp_path, folder, source=FOLDER | {"captions": "name"})) == {
        "red_fox-in snow.jpg": "red fox in snow", "owls/grey_owl.png": "grey owl"}


@pytest.mark.parametrize("files, options, message", [
    ({"a.txt": "a"}, {}, "found no rows"),
    ({"a.jpg": 1}, {}, r"no image behind any of its 1 rows \(no_caption 1\)"),
    ({"metadata.csv": "a,b\n1,2\n", "a.jpg": 1}, {}, "found columns a, b; expected a column of file names"),
    ({"metadata.csv": "file_name,b\n1,2\n", "a.jpg": 1}, {}, "expected a caption column"),
    ({"a.jpg": 1}, {"captions": "words.csv"}, "found no captions file .*words.csv"),
])
def test_unusable_folders_fail_in_one_line(tmp_path, files, options, message):
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, fill(tmp_path / "mine", files), source=FOLDER | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source, message", [
    ({"kind": "folder", "hub": "a/b"}, "found hub with kind folder; expected captions"),
    ({"kind": "fodler"}, "did you mean 'folder'"),
    ({"kind": "dataset", "revision": "main"}, "without hub"),
])
def test_sources_are_checked(tmp_path, source, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, tmp_path, source=source)


def test_folders_are_local(tmp_path):
    with pytest.raises(UserError, match="expected a local folder"):
        run(tmp_path, "memory://pictures", source=FOLDER)
    with pytest.raises(UserError, match="found no folder"):
        run(tmp_path, tmp_path / "nothing", source=FOLDER)
    with pytest.raises(UserError, match="found serve"):
        run(tmp_path, tmp_path, source=FOLDER, serve={"kind": "folder", "path": "x"})


# --- doing it again ----------------------------------------------------------------------------------------

def numbered(folder, count):
    return fill(folder, {f"{i:02d}.jpg": i for i in range(count)} | {f"{i:02d}.txt": f"c {i}" for i in range(count)})


@pytest.mark.slow
def test_the_same_folder_gives_the_same_bytes_wherever_it_is(tmp_path):
    here = run(tmp_path / "1", numbered(tmp_path / "here", 10), source=FOLDER)
    workers = Cluster(backend="processes", tasks=2)
    there = run(tmp_path / "2", numbered(tmp_path / "there", 10), source=FOLDER, cluster=workers)
    assert files_of(here) == files_of(there)
    assert shards.read_manifest(here)["downloaded"] == 10 and len(shards.read_manifest(here)["shards"]) == 3


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    from vlmpipe.curate.pixels import Decoder
    from vlmpipe.curate.sources.read import Reader

    folder, read, decoded = numbered(tmp_path / "mine", 10), Reader.read, []
    decode = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, data: decoded.append(data) or decode(self, data))

    def stops(self, place):
        if place.file == "06.jpg":
            raise KeyboardInterrupt
        return read(self, place)

    monkeypatch.setattr(Reader, "read", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, folder, source=FOLDER)
    assert not (tmp_path / "out" / shards.MANIFEST).exists()
    monkeypatch.setattr(Reader, "read", read)
    out = run(tmp_path, folder, source=FOLDER)
    again = {data for data in decoded if decoded.count(data) > 1}
    assert len(set(decoded)) == 10 and again <= {encoded(4), encoded(5)}  # those that were under way
    assert files_of(out) == files_of(run(tmp_path / "whole", folder, source=FOLDER))


KILLED = """
import sys, time
from tests.curate.sources.places import run
from vlmpipe.curate.sources.read import Reader
from pathlib import Path
read = Reader.read
Reader.read = lambda self, place: time.sleep(0.3) or read(self, place)
run(Path(sys.argv[1]), sys.argv[2], source={"kind": "folder"})
"""


@pytest.mark.slow
def test_a_killed_run_keeps_what_was_finished(tmp_path):
    folder, root = numbered(tmp_path / "mine", 16), Path(__file__).resolve().parents[3]
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path, folder], cwd=root)
    while not (tmp_path / "out" / "00001.tar").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "out" / shards.MANIFEST).exists()
    kept = (tmp_path / "out" / "00000.tar").stat().st_mtime_ns
    out = run(tmp_path, folder, source=FOLDER)
    assert (out / "00000.tar").stat().st_mtime_ns == kept
    assert files_of(out) == files_of(run(tmp_path / "whole", folder, source=FOLDER))


def test_a_changed_folder_decodes_only_what_is_new(tmp_path, monkeypatch):
    from vlmpipe.curate.pixels import Decoder

    folder = numbered(tmp_path / "mine", 8)
    run(tmp_path, folder, source=FOLDER)
    fill(folder, {"03.jpg": 33, "99.jpg": 99, "99.txt": "new"})
    (folder / "05.jpg").unlink()
    decode, decoded = Decoder.decode, []
    monkeypatch.setattr(Decoder, "decode", lambda self, data: decoded.append(data) or decode(self, data))
    out = run(tmp_path, folder, source=FOLDER)
    assert decoded == [encoded(33), encoded(99)]
    assert files_of(out) == files_of(run(tmp_path / "fresh", folder, source=FOLDER))


def test_a_picture_that_changes_under_way_is_tried_again(tmp_path, monkeypatch):
    from vlmpipe.curate.sources import read

    folder = numbered(tmp_path / "mine", 3)
    whole = read.read_rows

    def late(*arguments):
        fill(folder, {"01.jpg": 50})
        (folder / "02.jpg").unlink()
        return whole(*arguments)

    monkeypatch.setattr("vlmpipe.curate.lane.read_rows", late)
    found = ends(run(tmp_path, folder, source=FOLDER))
    assert found == {"00.jpg": "c 0", "01.jpg": "changed", "02.jpg": "unreadable"}
    monkeypatch.undo()
    assert ends(run(tmp_path, folder, source=FOLDER)) == {"00.jpg": "c 0", "01.jpg": "c 1"}


def test_real_figures_from_their_folder(tmp_path):
    """CMYK, RGBA, grey: 40 figures of the textbooks with their captions."""
    if not (SHARED / "textbooks" / "pairs.parquet").exists():
        pytest.skip("no ../shared/data/textbooks")
    table = pq.read_table(SHARED / "textbooks" / "pairs.parquet")
    table = table.take(list(range(0, table.num_rows, 100)))
    folder = tmp_path / "figures"
    folder.mkdir()
    for file in table["file"].to_pylist():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        source = next(p for p in (SHARED / "textbooks" / file, SHARED / "textbooks" / "images" / file) if p.exists())
        (folder / file).write_bytes(source.read_bytes())
    pq.write_table(table, folder / "metadata.parquet")
    out = run(tmp_path, folder, source=FOLDER, columns={"extra": ["book", "module"]}, samples_per_shard=40)
    rows = rows_of(out)
    assert [row["caption"] for row in rows] == table["caption"].to_pylist()
    assert [row["book"] for row in rows] == table["book"].to_pylist()
    assert {row["status"] for row in rows} == {"downloaded"}
