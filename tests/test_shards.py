import os
import tarfile

import pyarrow as pa
import pytest

from vlmpipe import shards
from vlmpipe.errors import UserError


def make(directory, name="00000"):
    digest = shards.write_tar(directory / f"{name}.tar", [("a.jpg", b"1"), ("a.txt", b"t"), ("b.png", b"22")])
    shards.write_table(directory / f"{name}.parquet", pa.table({"uid": ["a", "b"], "n": [1, 2]}))
    shard = {"name": name, "rows": 2, "files": {f"{name}.tar": digest}}
    shards.write_manifest(directory, "pool", [shard], source="here")
    return directory


def test_what_was_written_is_read(tmp_path):
    directory = make(tmp_path)
    assert list(shards.iter_images(directory, "00000")) == [("a", b"1"), ("b", b"22")]
    assert shards.read_rows(directory, ["uid"]).to_pydict() == {"uid": ["a", "b"]}
    manifest = shards.read_manifest(directory, "pool")
    assert manifest["rows"] == 2 and manifest["source"] == "here"


def test_equal_samples_are_equal_bytes(tmp_path):
    first, second = make(tmp_path / "1"), make(tmp_path / "2")
    for name in ("00000.tar", "00000.parquet", "manifest.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_directory_without_manifest_is_never_read(tmp_path):
    directory = make(tmp_path)
    (directory / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"incomplete.*rerun"):
        shards.read_rows(directory)


def test_a_manifest_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="found kind 'pool'; expected 'packed'"):
        shards.read_manifest(make(tmp_path), "packed")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_corrupt_tar_is_named_before_anything_is_read(tmp_path, damage):
    tar = make(tmp_path) / "00000.tar"
    data = bytearray(tar.read_bytes())
    if damage == "flip":
        data[512] ^= 1
        tar.write_bytes(data)
    elif damage == "cut":
        tar.write_bytes(data[:700])
    else:
        tar.unlink()
    with pytest.raises(UserError, match=r"corrupt shard .*00000\.tar.*rerun") as error:
        next(shards.iter_images(tmp_path, "00000"))
    assert "\n" not in str(error.value)


def test_a_corrupt_parquet_is_named(tmp_path):
    (make(tmp_path) / "00000.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"corrupt shard .*00000\.parquet"):
        shards.read_rows(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    shards.write_json(path, {"a": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        shards.write_json(path, {"a": 2})
    assert shards.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError, match=r"NaN|nan"):
        shards.write_json(tmp_path / "x.json", {"a": float("nan")})


def test_tars_carry_no_time_and_no_owner(tmp_path):
    make(tmp_path)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}
