"""Words of captions as the official tokenizer gives them."""

import pytest

from vlmpipe.evaluate.metrics import ptb_tokens


@pytest.mark.parametrize(
    "text, words",
    [
        ("A man, riding a horse.", "a man riding a horse"),
        ("Don't touch John's t-shirt!", "do n't touch john 's t-shirt"),
        ("They've said it's what we'd cannot", "they 've said it 's what we 'd can not"),
        ("the dogs' bowls", "the dogs bowls"),
        ('A sign that says "STOP" -- or so...', "a sign that says stop or so"),
        ("Mr. Smith of the U.S. at 5 p.m.", "mr. smith of the u.s. at 5 p.m."),
        ("3,000 and 3.5 at 10:30", "3,000 and 3.5 at 10:30"),
        ("black and/or white", "black and/or white"),
        ("$5 for 50%", "$ 5 for 50 %"),
        ("10:30am, b&w.. J. Doe's street.A", "10:30 am b & w j. doe 's street.a"),
        ("wow!! (big)", "wow !! -lrb- big -rrb-"),
        ("black-and-white 1/2 w/ it", "black-and-white 1/2 w / it"),
        ("a man’s “hat” – old", "a man 's hat old"),
        (" two\n lines ", "two lines"),
        ("", ""),
        ("?", ""),
    ],
)
def test_words(text, words):
    assert ptb_tokens(text) == words.split()
