"""What is known of the pictures that questions are asked about."""

import hashlib

import pytest

from tests.curate.made_pools import jpeg, picture, row, write_pool
from vlmpipe.curate.duplicates import look
from vlmpipe.curate.evaluation import evaluation_images
from vlmpipe.errors import UserError
from vlmpipe.images import decode_rgb


def test_shards_and_plain_folders_give_the_same_pictures_each_once(tmp_path):
    pictures = {"7": jpeg(picture(7)), "12": jpeg(picture(12)), "40": jpeg(picture(40))}
    write_pool(tmp_path / "test" / "images", [row(uid, data) for uid, data in pictures.items()])
    folder = tmp_path / "val" / "images"
    folder.mkdir(parents=True)
    for uid, data in pictures.items():
        (folder / f"COCO_val2014_{uid:0>12}.jpg").write_bytes(data)
    shards, plain = (evaluation_images(tmp_path, [split], chunk=2) for split in ("test", "val"))
    assert shards.uids.to_pylist() == list(pictures)
    assert plain.uids.to_pylist() == [f"COCO_val2014_{uid:0>12}.jpg" for uid in pictures]
    expected = look([decode_rgb(data) for data in pictures.values()])
    for found in (shards, plain):
        assert found.digests.to_pylist() == [hashlib.sha256(data).hexdigest() for data in pictures.values()]
        assert (found.looks.hashes == expected.hashes).all() and (found.looks.thumbnails == expected.thumbnails).all()
    assert len(evaluation_images(tmp_path, ["test", "val"])) == 6


def test_a_split_without_pictures_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*elsewhere/test/images"):
        evaluation_images(tmp_path / "elsewhere", ["test"])


def test_a_broken_evaluation_picture_is_refused(tmp_path):
    write_pool(tmp_path / "test" / "images", [row("5", jpeg(picture(1))[:-300])])
    with pytest.raises(UserError, match=r"test: found picture 5 broken"):
        evaluation_images(tmp_path, ["test"])
