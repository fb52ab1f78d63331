"""SugarCrepe and Winoground as published."""

import json

import pytest

from vlmpipe.data.readers.contrast import read_sugarcrepe, read_winoground
from vlmpipe.errors import UserError

SUGAR = {"filename": "000000085329.jpg", "caption": "A dog chases a cat.", "negative_caption": "A cat chases a dog."}
PAIR = {"id": 7, "image_0": "ex_7_img_0", "image_1": "ex_7_img_1", "caption_0": "a dog on a mat",
        "caption_1": "a mat on a dog", "tag": "Noun", "secondary_tag": "", "num_main_preds": 1,
        "collapsed_tag": "Object"}


def test_each_file_of_sugarcrepe_is_a_kind_of_swap(tmp_path):
    (tmp_path / "swap_obj.json").write_text(json.dumps({"0": SUGAR, "1": SUGAR}))
    (tmp_path / "add_att.json").write_text(json.dumps([SUGAR]))
    records = read_sugarcrepe(tmp_path)
    assert [(record.id, record.slices["swap"]) for record in records] == [
        ("add_att-0", "add_att"), ("swap_obj-0", "swap_obj"), ("swap_obj-1", "swap_obj"),
    ]
    assert (records[0].image, records[0].caption, records[0].false) == (
        "000000085329.jpg", "A dog chases a cat.", ("A cat chases a dog.",)
    )
    assert len(read_sugarcrepe(tmp_path / "swap_obj.json")) == 2


def test_winogrounds_pictures_have_each_others_sentences_as_false_ones(tmp_path):
    (tmp_path / "examples.jsonl").write_text(json.dumps(PAIR) + "\n")
    one, other = read_winoground(tmp_path)
    assert (one.id, other.id, one.group, other.group) == ("7-0", "7-1", "7", "7")
    assert one.caption == other.false[0] == "a dog on a mat" and other.caption == one.false[0]
    assert (one.image, other.image, one.slices) == ("ex_7_img_0", "ex_7_img_1", {"swap": "Object"})


@pytest.mark.parametrize(("read", "name", "content", "said"), [
    (read_sugarcrepe, "a.json", json.dumps({"3": {**SUGAR, "caption": 1}}), r"3\.caption: found int 1"),
    (read_sugarcrepe, "a.json", json.dumps({"3": {**SUGAR, "negative_caption": SUGAR["caption"]}}), "another text"),
    (read_sugarcrepe, "a.json", json.dumps("x"), "found str; expected SugarCrepe's object"),
    (read_sugarcrepe, "a.json", "{}", "found 0 pairs of sentences"),
    (read_winoground, "a.jsonl", json.dumps({**PAIR, "image_1": None}), r"line 1\.image_1: found nothing"),
    (read_winoground, "a.jsonl", json.dumps({**PAIR, "caption_1": PAIR["caption_0"]}), "another text than caption_0"),
])
def test_what_is_wrong_is_named(tmp_path, read, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        read(tmp_path)
