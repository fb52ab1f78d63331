"""WebDataset tars as a pool, hostile ones too."""

import gzip
import io
import json
import tarfile

import fsspec
import pytest

from tests.curate.sources.places import encoded, ends, files_of, rows_of, run
from vlmpipe import shards
from vlmpipe.errors import UserError

TARS = {"kind": "webdataset"}


def tar_of(path, members, **changes):
    """A tar of {name: bytes or text}; `changes`: {name: fields of its TarInfo}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in changes.get(name, {}).items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


def sample(seed, key=None, caption=None):
    key = key or f"{seed:05d}"
    return {f"{key}.jpg": encoded(seed), f"{key}.txt": caption or f"caption {seed}"}


def test_tars_with_texts_and_json(tmp_path):
    tar_of(tmp_path / "in" / "00000.tar", {
        "000.jpg": encoded(0), "000.txt": "zero", "000.json": json.dumps({"url": "http://a.test/0.jpg", "n": 5}),
        "sub/001.png": encoded(1, "PNG"), "sub/001.json": '{"caption": "one"}', "002.seg.png": b"no picture",
        "003.webp": encoded(3, "WEBP"), "003.caption": "three\n", "__key__": "noise",
    })
    tar_of(tmp_path / "in" / "00001.tar", sample(4))
    out = run(tmp_path, tmp_path / "in", source=TARS, columns={"extra": ["n"]})
    assert ends(out) == {"http://a.test/0.jpg": "zero", "00000.tar/sub/001.png": "one", "00000.tar/003.webp": "three",
                         "00001.tar/00004.jpg": "caption 4"}
    assert [row["n"] for row in rows_of(out)] == [5, None, None, None]
    assert rows_of(out)[0]["bytes"] == len(encoded(0))


def test_our_own_shards_and_img2datasets_can_be_a_source(tmp_path):
    tar_of(tmp_path / "in" / "a.tar", sample(1) | sample(2))
    first = run(tmp_path, tmp_path / "in", source=TARS)
    again = run(tmp_path / "again", first, source=TARS, image_size=20)
    assert [row["caption"] for row in rows_of(again)] == [row["caption"] for row in rows_of(first)]
    assert {row["width"] for row in rows_of(again)} == {20}


@pytest.mark.parametrize("urls, files", [
    ("in", ["{00000..00002}.tar"]), ("in/{00000..00002}.tar", []), ("in", ["0000[0-2].tar"]),
    ("in", ["*0.tar", "*1.tar", "*2.tar"]),
])
def test_patterns(tmp_path, urls, files):
    for number in range(4):
        tar_of(tmp_path / "in" / f"{number:05d}.tar", sample(number))
    found = ends(run(tmp_path, tmp_path / urls, source=TARS | {"files": files}))
    assert list(found) == [f"{number:05d}.tar/{number:05d}.jpg" for number in range(3)]


def test_tars_on_object_storage(tmp_path):
    tar_of(tmp_path / "a.tar", sample(1) | sample(2))
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/shards/in/a.tar", (tmp_path / "a.tar").read_bytes())
    out = run(tmp_path, "memory://shards/in", source=TARS)
    assert ends(out) == {"a.tar/00001.jpg": "caption 1", "a.tar/00002.jpg": "caption 2"}


def test_several_pictures_in_a_sample(tmp_path):
    tar_of(tmp_path / "in" / "a.tar", {"1.jpg": encoded(1), "1.png": encoded(2, "PNG"), "1.txt": "t"})
    with pytest.raises(UserError, match="several_pictures 2"):
        run(tmp_path, tmp_path / "in", source=TARS)
    assert ends(run(tmp_path, tmp_path / "in", source=TARS | {"image": "png"})) == {"a.tar/1.png": "t"}


# --- hostile ones ------------------------------------------------------------------------------------------

def test_hostile_members_are_rows_with_a_reason_and_nothing_is_unpacked(tmp_path):
    members = {
        "../../escape.jpg": encoded(1), "../../escape.txt": "e", "/abs.jpg": encoded(2), "/abs.txt": "a",
        "link.jpg": b"", "link.txt": "l", "hard.jpg": b"", "hard.txt": "h", "pipe.jpg": b"", "pipe.txt": "p",
        "big.jpg": b"\0" * 9000, "big.txt": "b", "words.jpg": encoded(3), "words.txt": b"w" * ((1 << 20) + 1),
        "odd.jpg": encoded(4), "odd.json": "[1]", "alone.jpg": encoded(5), "deep.jpg": encoded(6),
        "deep.json": "[" * 100_000, "good.jpg": encoded(7), "good.txt": b"g\xff\xfeod",
    }
    changes = {
        "link.jpg": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        "hard.jpg": {"type": tarfile.LNKTYPE, "linkname": "../../secret"}, "pipe.jpg": {"type": tarfile.FIFOTYPE},
    }
    tar_of(tmp_path / "in" / "a.tar", members, **changes)
    before = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".jpg", ".txt"))
    found = ends(run(tmp_path, tmp_path / "in", source=TARS, max_bytes=8000))
    assert {url.removeprefix("a.tar/"): end for url, end in found.items()} == {
        "../../escape.jpg": "unsafe_name", "/abs.jpg": "unsafe_name", "link.jpg": "not_a_file",
        "hard.jpg": "not_a_file", "pipe.jpg": "not_a_file", "big.jpg": "too_large", "words.jpg": "bad_caption",
        "odd.jpg": "bad_caption", "alone.jpg": "bad_caption", "deep.jpg": "bad_caption", "good.jpg": "g\ufffd\ufffdod",
    }
    assert sorted(path for path in tmp_path.rglob("*") if path.suffix in (".jpg", ".txt")) == before


def header(name, size, kind=tarfile.REGTYPE):
    """The 512 bytes before a member that claims `size`."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def damaged(tmp_path):
    """{what is wrong: the bytes of a tar}"""
    good = tar_of(tmp_path / "good.tar", sample(1) | sample(2)).read_bytes()
    with tarfile.open(tmp_path / "good.tar") as tar:
        members = tar.getmembers()
    second = members[2].offset
    negative = header("1.jpg", -(1 << 40))
    return {
        "cut in a picture": good[:members[2].offset_data + 100], "cut in a header": good[:second + 100],
        "cut between members": good[:second], "rubbish for a header": good[:second] + b"x" * 2000,
        "a size of terabytes": header("1.jpg", 1 << 42) + encoded(1), "a negative size": negative + b"\0" * 1024,
        "a long name of gigabytes": header("@", 1 << 33, tarfile.GNUTYPE_LONGNAME) + b"a" * 1024,
        "a long name of a negative size": header("@", -512, tarfile.GNUTYPE_LONGNAME) + b"a" * 1024,
        "long names without end": header("@", 512, tarfile.GNUTYPE_LONGNAME) + b"".join(
            b"a" * 512 + header("@", 512, tarfile.GNUTYPE_LONGNAME) for _ in range(2000)),
        "a header of gigabytes": header("@", 1 << 33, tarfile.XHDTYPE) + b"a" * 1024, "no tar": b"PK\3\4" * 400,
        "empty": b"", "compressed": gzip.compress(good),
    }


def test_a_damaged_tar_is_one_clear_line(tmp_path):
    for what, data in damaged(tmp_path).items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / "a.tar").write_bytes(data)
        with pytest.raises(UserError, match=r"corrupt tar .*/in/a\.tar: .+; expected a plain, whole tar") as caught:
            run(tmp_path, tmp_path / "in", source=TARS)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400, what
        assert not (tmp_path / "out" / shards.MANIFEST).exists(), what


def test_a_sample_without_end_is_refused(tmp_path):
    tar_of(tmp_path / "in" / "a.tar", {f"1.{number}.x": b"" for number in range(200)})
    with pytest.raises(UserError, match="more than 100 files of sample '1'"):
        run(tmp_path, tmp_path / "in", source=TARS)


@pytest.mark.parametrize("files, message", [
    (["../*.tar"], "expected one below"), (["/etc/*.tar"], "expected one below"),
    (["{0..3}.tar"], "found no file .*/0.tar"),
    (["{0..3.tar"], "braces in pairs"), (["*.parquet"], "found no file of .tar"),
])
def test_patterns_that_lead_nowhere(tmp_path, files, message):
    tar_of(tmp_path / "in" / "a.tar", sample(1))
    with pytest.raises(UserError, match=message):
        run(tmp_path, tmp_path / "in", source=TARS | {"files": files})


# --- doing it again ----------------------------------------------------------------------------------------

def test_a_stopped_run_goes_on_and_ends_alike(tmp_path, monkeypatch):
    from vlmpipe.curate import lane

    tar_of(tmp_path / "in" / "a.tar", {k: v for seed in range(10) for k, v in sample(seed).items()})
    whole = files_of(run(tmp_path / "whole", tmp_path / "in", source=TARS))
    assemble, made = lane.assemble, []

    def stops(task, *rest):
        if task.name == "00001" and not made:
            made.append(task.name)
            raise KeyboardInterrupt
        return assemble(task, *rest)

    monkeypatch.setattr(lane, "assemble", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tmp_path / "in", source=TARS)
    kept = (tmp_path / "out" / "00000.tar").stat().st_mtime_ns
    out = run(tmp_path, tmp_path / "in", source=TARS)
    assert files_of(out) == whole and (out / "00000.tar").stat().st_mtime_ns == kept
