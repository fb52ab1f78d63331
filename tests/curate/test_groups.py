"""groups.py and regions.py on captions in several scripts and on hostile URLs."""

import pyarrow as pa
import pytest

from vlmpipe.curate import groups
from vlmpipe.curate.regions import COUNTRIES, REGIONS, countries, hosts, regions


@pytest.mark.parametrize(
    "caption, found",
    [
        ("A WOMAN walks", True), ("women, two", True), ("the woman's hat", True), ("womanly", False), ("a man", False),
        ("Frau Müller", True), ("Fraüen", False), ("frau_1", False), ("a c++ (book)", True), ("ac++", False),
        ("两位女士在公园", True), ("une femme âgée", True), ("une femme age\u0301e", False), ("", False), (None, False),
    ],
)
def test_words_match_whole_in_any_case_and_script(caption, found):
    words = {"group": ["woman", "women", "frau", "c++", "女士", "femme âgée"]}
    assert bool(len(groups.mentions(pa.array([caption], pa.string()), words)["group"])) is found


def test_composed_and_decomposed_letters_are_one():
    assert len(groups.mentions(pa.array(["une personne a\u0302ge\u0301e"]), {"g": ["âgée"]})["g"]) == 1


def test_column_values_are_groups_and_null_is_none():
    found = groups.values(pa.array(["b", None, "a", "b"]))
    assert {name: rows.tolist() for name, rows in found.items()} == {"a": [2], "b": [0, 3]}


# --- lists by language -------------------------------------------------------------------------------------

LISTS = {"man": {"en": ("man", "men"), "de": ("Mann", "Männer")}, "woman": {"en": ("woman",), "de": ("Frau",)}}


def found(captions, languages):
    spoken = None if languages is None else pa.array(languages, pa.string())
    return {name: rows.tolist() for name, rows in groups.mentions(pa.array(captions), LISTS, spoken).items()}


def test_a_list_is_read_in_captions_of_its_language():
    """German "man" is "one", and no man."""
    captions = ["Wie man Brot backt", "a man bakes", "Ein Mann backt", "Frau Smith bakes"]
    assert found(captions, ["de", "en", "de", "en"]) == {"man": [1, 2], "woman": []}


def test_a_caption_of_unknown_or_unlisted_language_is_read_in_all_lists():
    captions = ["Ein Mann", "a man", "a woman", "Frau"]
    assert found(captions, [None, "nl", "pt", None]) == {"man": [0, 1], "woman": [2, 3]}
    assert found(captions, None) == {"man": [0, 1], "woman": [2, 3]}


def test_an_unsure_language_is_not_believed():
    languages = pa.chunked_array([pa.array(["de", "de", None])])
    sure = groups.believed(languages, pa.chunked_array([pa.array([0.9, 0.3, 0.9])]))
    assert sure.to_pylist() == ["de", None, None]
    assert groups.believed(languages, None).to_pylist() == ["de", "de", None]


def test_numbers_fall_into_ranges():
    column = pa.array([0.1, 0.2, 0.29, 0.3, None, float("nan")])
    found = {name: rows.tolist() for name, rows in groups.ranges(column, (0.2, 0.3)).items()}
    assert found == {"< 0.2": [0], "0.2 to 0.3": [1, 2], ">= 0.3": [3]}


# --- places ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "url, host, country, region",
    [
        ("http://www.example.co.uk/a.jpg", "www.example.co.uk", "uk", "northern_europe"),
        ("https://user:x@Bilder.Example.DE:8080/a?b=http://x.fr", "bilder.example.de", "de", "western_europe"),
        ("https://images.example.com/a.de/b.jpg", "images.example.com", None, None),
        ("https://cool.io/x.png", "cool.io", None, None),
        ("https://example.jp.", "example.jp", "jp", "eastern_asia"),
        ("http://[2001:db8::1]:80/x", "[2001:db8::1]", None, None),
        ("http://93.184.216.34/a.ke", "93.184.216.34", None, None),
        ("not a url", None, None, None),
        (None, None, None, None),
    ],
)
def test_the_place_of_a_url(url, host, country, region):
    urls = pa.array([url], pa.string())
    assert hosts(urls).to_pylist() == [host]
    assert countries(urls).to_pylist() == [country]
    assert regions(urls).to_pylist() == [region]


def test_endings_of_hosts_can_be_added_and_the_longest_wins():
    urls = pa.chunked_array([["http://a.example.test/1", "http://b.test/2", "http://xtest/3", "http://c.fr/4"]])
    found = regions(urls, {".test": "nowhere", "example.test": "somewhere", "fr": "elsewhere"})
    assert found.to_pylist() == ["somewhere", "nowhere", None, "elsewhere"]


def test_every_country_domain_has_one_region():
    listed = [domain for domains in REGIONS.values() for domain in domains.split()]
    assert len(listed) == len(set(listed)) and len(REGIONS) == 22 and len(COUNTRIES) > 200
