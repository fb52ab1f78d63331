"""card.py on tables made by hand; croissant.py on what is no Croissant."""

import json

import pyarrow as pa
import pytest
import yaml

from vlmpipe.curate import croissant
from vlmpipe.curate.card import card, markdown
from vlmpipe.errors import UserError

FACTS = {
    "splits": {"train": 90, "validation": 10, "test": 0},
    "config": {"near": {"radius": 10, "match": 0.8}, "licences": {}},
    "pools": {"web": "abc"}, "licences": {"CC0": 60, "unknown": 40}, "version": "f00d", "selection": "beef",
    "clusters": {"count": 95, "of_several": 4, "largest": 3},
}
FUNNEL = {
    "rows": 200, "pools": {"web": {"rows": 200, "kept": 100}},
    "steps": [{"reason": "clip", "rows_in": 200, "dropped": 100, "rows_out": 100}],
}
ENTRIES = [{"name": "train/train-00000-of-00001", "files": {"train/train-00000-of-00001.parquet": "a" * 64}}]


def group(name: str, total: int, kept: int) -> dict:
    shares = {"share_before": total / 200, "share_after": kept / 100, "amplification": kept / total * 2}
    return {"group": name, "tested": total >= 50, "total": total, "kept": kept, "retention": kept / total,
            "retention_low": 0.1, "retention_high": 0.9} | shares


BIAS = {
    "minimum_group": 50,
    "groupings": {"gender": {
        "impact": {"ratio": 0.5, "low": 0.4, "high": 0.6},
        "groups": [group("woman", 80, 20), group("man|<b>", 80, 40), group("few", 9, 3)],
    }},
    "rules": [{"grouping": "gender", "reason": "clip", "group": "woman", "against": "man", "rate": 0.75,
               "against_rate": 0.5}],
    "mitigations": [{"reason": "fair", "method": "quota", "impact_ratio_before": 0.5, "impact_ratio_after": 0.9,
                     "rows_gained": 0, "rows_lost": 7, "mean_score_before": 0.3, "mean_score_after": 0.31}],
}


def test_the_card_tells_groups_licences_and_lineage():
    text = card(FACTS, FUNNEL, pa.schema([("alt", pa.string())]), ENTRIES, BIAS)
    head = yaml.safe_load(text.split("---")[1])
    assert [split["split"] for split in head["configs"][0]["data_files"]] == ["train", "validation"]
    assert "### gender: impact ratio 0.500 [0.400, 0.600]" in text
    assert "| woman | 80 | 20 | 40.0% | 20.0% | 25.0% [10.0%, 90.0%] | 0.500 |" in text
    assert "few" not in text
    assert "- rule clip drops 75.0% of gender=woman, 50.0% of man" in text
    assert "(quota): impact ratio 0.500 before, 0.900 after; 0 rows gained, 7 lost; mean score 0.300 before" in text
    assert "| CC0 | 60 | 60.0% |" in text and "| alt | the list's own |" in text
    assert "f00d" in text and "| web | 200 | 100 | per row, or unknown | abc |" in text


def test_names_from_the_web_are_no_markup():
    assert "man\\|&lt;b>" in card(FACTS, FUNNEL, pa.schema([]), ENTRIES, BIAS)
    assert markdown(["a"], [["x\ny | <script>"]]).splitlines()[2] == "| x y \\| &lt;script> |"


def test_what_is_no_croissant_is_told(tmp_path):
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary())])), ("uid", pa.string())])
    found = croissant.describe("packed", "text", ["CC0"], "1.0.0", ENTRIES, schema, {"image": "i", "uid": "u"})
    path = tmp_path / "croissant.json"
    path.write_text(json.dumps(found))
    assert croissant.validate(path) == {"train": 2}
    found["recordSet"][0]["field"][1]["source"]["fileSet"] = {"@id": "gone"}
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r'"gone".*expected valid Croissant'):
        croissant.validate(path)


def test_an_invalid_description_is_not_written():
    schema = pa.schema([("uid", pa.string()), ("uid", pa.string())])
    with pytest.raises(UserError, match=r"Duplicate nodes .*: train/uid.* expected valid Croissant"):
        croissant.describe("packed", "text", [], "1.0.0", ENTRIES, schema, {"uid": "u"})
