"""Tables of groups: ours, FairFace's, and broken ones."""

import pytest

from vlmpipe.data.groups import groups_of, read_groups, write_groups
from vlmpipe.errors import UserError

FAIRFACE = """file,age,gender,race,service_test
val/1.jpg,3-9,Male,East Asian,False
val/2.jpg,50-59,Female,East Asian,True
"""


def test_fairfaces_table(tmp_path):
    (tmp_path / "fairface_label_val.csv").write_text(FAIRFACE)
    found = read_groups(tmp_path)
    assert list(found) == ["val/1.jpg", "val/2.jpg"]
    assert found["val/2.jpg"] == {"age": "50-59", "gender": "Female", "race": "East Asian", "service_test": "True"}
    assert groups_of("val/1.jpg", found)["gender"] == "Male" and groups_of("3.jpg", found) == {}


def test_what_is_written_is_read_and_found_by_the_file_name_too(tmp_path):
    groups = {"a.jpg": {"size": "small", "place": "left, top"}, "b.jpg": {"size": "large", "place": "right"}}
    write_groups(tmp_path, groups)
    assert read_groups(tmp_path) == groups
    assert groups_of("some/folder/b.jpg", groups) == groups["b.jpg"]


def test_no_table_is_no_groups_and_an_empty_field_none(tmp_path):
    assert read_groups(tmp_path) == {}
    (tmp_path / "groups.csv").write_text("image,size\na.jpg,\n")
    assert read_groups(tmp_path) == {"a.jpg": {}}


@pytest.mark.parametrize(
    "text, message",
    [
        ("name,size\na.jpg,small\n", "expected 'file' or 'image'"),
        ("file\na.jpg\n", "expected 'file' or 'image', and groups"),
        ("file,size\na.jpg,small\na.jpg,large\n", "line 3: .*stands once"),
        ("file,size\na.jpg\n", "line 2: .*1 groups"),
        ("file,size\na.jpg,small,more\n", "line 2"),
        ("", "found the columns None"),
    ],
)
def test_broken_tables_are_refused_by_line(tmp_path, text, message):
    (tmp_path / "groups.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_groups(tmp_path)


def test_two_tables_are_one_too_many(tmp_path):
    for name in ("groups.csv", "fairface_label_val.csv"):
        (tmp_path / name).write_text(FAIRFACE)
    with pytest.raises(UserError, match="2 tables"):
        read_groups(tmp_path)
