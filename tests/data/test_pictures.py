"""Pictures are found by name in a folder and in a shard directory, and nowhere else."""

import pytest

from vlmpipe.data.pictures import pictures, write_pictures
from vlmpipe.errors import UserError


def fill(folder, **files):
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_jpg", ".jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_names_of_a_folder(tmp_path):
    fill(tmp_path, COCO_val2014_000000262148_jpg=b"coco", deep__er__b7_jpg=b"deep")
    found = pictures(tmp_path)
    assert sorted(found) == ["COCO_val2014_000000262148.jpg", "deep/er/b7.jpg"]
    assert found[262148] == found["COCO_val2014_000000262148"] == b"coco"
    assert found["b7.jpg"] == found["b7"] == found["deep/er/b7.jpg"] == b"deep"
    assert "b7" in found and "b8" not in found and len(found) == 2


def test_of_two_pictures_with_a_name_neither_goes_by_it(tmp_path):
    fill(tmp_path, a__1_jpg=b"a", b__1_jpg=b"b")
    found = pictures(tmp_path)
    assert (found["a/1.jpg"], found["b/1.jpg"]) == (b"a", b"b")
    assert "1.jpg" not in found and "1" not in found


def test_a_full_name_goes_before_a_short_one(tmp_path):
    fill(tmp_path, a__1_jpg=b"deep")
    (tmp_path / "1.jpg").write_bytes(b"top")
    assert pictures(tmp_path)["1.jpg"] == b"top"


def test_no_name_leads_out_of_the_folder(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    fill(tmp_path / "images", a_jpg=b"a")
    found = pictures(tmp_path / "images")
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "a.jpg/../../secret.jpg"):
        with pytest.raises(UserError, match="no picture for"):
            found[name]


def test_a_shard_directory(tmp_path):
    write_pictures(tmp_path, [("video1/000.jpg", b"one"), ("7.png", b"seven")])
    found = pictures(tmp_path)
    assert dict(found) == {"video1/000": b"one", "7": b"seven"}
    assert found["video1/000.jpg"] == b"one" and found[7] == found["7.png"] == b"seven"
    (tmp_path / "00000.tar").write_bytes(b"damaged")
    with pytest.raises(UserError, match="corrupt shard"):
        pictures(tmp_path)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(UserError, match="found no folder"):
        pictures(tmp_path / "images")
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="found no pictures"):
        pictures(tmp_path / "images")
