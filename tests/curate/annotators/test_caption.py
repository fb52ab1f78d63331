"""Rules on captions, held to answers worked out by hand."""

import pytest

from vlmpipe.curate.annotators.base import Batch, NoConfig, Tools
from vlmpipe.curate.annotators.caption import (
    PersonalData,
    Text,
    char_repetition,
    is_iban,
    luhn,
    personal_data,
    special_characters,
    strip_special,
    word_repetition,
)
from vlmpipe.errors import UserError


def text(*captions: str, **config) -> list[dict]:
    annotator = Text(Text.Config(**config), Tools())
    arrays = annotator(Batch([], list(captions)))
    names = [field.name for field in annotator.fields]
    return [dict(zip(names, values)) for values in zip(*(array.to_pylist() for array in arrays))]


def test_repeated_words_count_by_their_ngrams():
    assert word_repetition("a b c d e f".split(), 2) == 0
    # ab bc ca ab bc: of five pairs, ab and bc come twice
    assert word_repetition("a b c a b c".split(), 2) == pytest.approx(4 / 5)
    assert word_repetition(["a"] * 4, 5) == 0
    assert text("Buy, buy! BUY? buy buy buy buy", word_ngram=5)[0]["word_repetition"] == 1


def test_repeated_characters_are_those_of_the_most_frequent_ngrams():
    assert char_repetition("abcdefghij", 3) == 0 and char_repetition("ab", 3) == 0 and char_repetition("", 3) == 0
    # "aaaaaa" has one distinct trigram, four times
    assert char_repetition("aaaaaa", 3) == 1
    # ab ba ab ba ab b. .c: counts 3 2 1 1, int(sqrt(4)) = 2 of them count, both repeated: 5 of 7
    assert char_repetition("ababab.c", 2) == pytest.approx(5 / 7)


def test_special_characters_are_neither_letters_nor_marks():
    assert special_characters("abcé") == 0
    assert special_characters("a1 !🦊") == pytest.approx(4 / 5)
    assert special_characters("की") == 0  # a vowel sign is a mark
    assert special_characters("") == 0
    assert [strip_special(word) for word in ("(a1b)", "12", "x", "“été”")] == ["a1b", "", "x", "été"]


def test_counts_are_those_of_datacomp():
    found = text("a  red\tbox", "")
    assert [(row["caption_chars"], row["caption_words"]) for row in found] == [(10, 3), (0, 0)]


@pytest.mark.parametrize(("caption", "matches"), [
    ("IMG_1234.jpg", True), ("DSC 0042", True), ("holiday-photo.JPEG", True), ("https://a.test/b?c", True),
    ("Click here to see more", True), ("A dog. All Rights Reserved.", True), ("stock photo of a dog", True),
    ("a dog on a beach", False), ("image of a dog taken in 2019", False), ("he clicks the shutter", False),
    ("photograph of Alamo square", False), ("", False),
])
def test_boilerplate_names_its_pattern(caption, matches):
    assert (text(caption)[0]["boilerplate"] is not None) == matches


def test_boilerplate_patterns_are_the_users():
    assert text("Lorem IPSUM dolor", boilerplate=("nothing", "lorem ipsum"))[0]["boilerplate"] == "lorem ipsum"
    assert text("Lorem ipsum", boilerplate=())[0]["boilerplate"] is None
    with pytest.raises(UserError, match=r"found boilerplate pattern '\('"):
        Text.Config(boilerplate=("(",))


@pytest.mark.parametrize(("caption", "kinds"), [
    ("write to jane.doe+x@mail.example.co.uk now", "email"),
    ("call +44 20 7946 0958", "phone"), ("call (212) 555-0123 today", "phone"), ("1-212-555-0123", "phone"),
    ("from 192.168.0.17.", "ip"), ("host 2001:db8::8a2e:370:7334 is up", "ip"),
    ("card 4111 1111 1111 1111", "card"), ("pay to GB82 WEST 1234 5698 7654 32 please", "iban"),
    ("a@b.org or +49 30 901820 from 10.0.0.1", "email,phone,ip"),
])
def test_personal_data_is_found(caption, kinds):
    assert ",".join(personal_data(caption)) == kinds


@pytest.mark.parametrize("caption", [
    "the war of 1914-1918", "at 12:30:45 on 2020-05-06", "version 1.2.3.4.5", "256.300.1.1", "size 1920x1080",
    "card 4111 1111 1111 1112", "GB82 WEST 1234 5698 7654 33", "me @ home", "0000 0000 0000 0000", "3.14159265358979",
    "ISBN 978-3-16-148410-0", "a: b :: c", "$1,234,567.89", "",
])
def test_numbers_that_are_nobodys_are_left_alone(caption):
    assert list(personal_data(caption)) == []


def test_checksums():
    assert luhn("79927398713") and not luhn("79927398710")
    assert is_iban("DE89370400440532013000") and not is_iban("DE88370400440532013000")
    assert PersonalData(NoConfig(), Tools())(Batch([], ["x", "a@b.org"]))[0].to_pylist() == [None, "email"]
