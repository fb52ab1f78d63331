"""Signs: letters stand where the boxes say, and questions and captions say what is written."""

import numpy as np

from vlmpipe.data.tasks.signs import QUESTIONS, WORDS, Sign, Street, captions, questions, sample_street

SIDE = 64


def sample(count: int, held_out: bool = False) -> list[Street]:
    rng = np.random.default_rng(0)
    return [sample_street(rng, held_out) for _ in range(count)]


def letters(image: np.ndarray, dark: bool) -> np.ndarray:
    return image.max(-1) < 110 if dark else image.min(-1) > 200


def test_letters_stand_where_the_boxes_say():
    for street in sample(60):
        image = np.asarray(street.draw(SIDE)).astype(int)
        for sign, text in zip(street.signs, street.texts(SIDE)):
            left, top, right, bottom = (round(edge * SIDE) for edge in text.box)
            assert text.word == sign.word
            board_left, board_top, board_right, board_bottom = (round(edge * SIDE) for edge in sign.box)
            assert board_left < left < right < board_right and board_top < top < bottom < board_bottom
            seen = letters(image, sign.color in ("yellow", "orange"))
            on_board = np.zeros_like(seen)
            on_board[board_top + 2:board_bottom - 2, board_left + 2:board_right - 2] = True
            within = np.zeros_like(seen)
            within[top:bottom, left:right] = True
            assert (seen & within).sum() > 0.15 * within.sum()
            assert not (seen & on_board & ~within).any()
            assert bottom - top >= 8, sign.word  # high enough to read


def test_words_look_different():
    drawn = {word: Street((Sign(word, "blue", "top"),), (), 0).draw(SIDE).tobytes() for word in WORDS}
    assert len(set(drawn.values())) == len(WORDS)


def test_questions_are_answered_by_what_is_written():
    for street in sample(60):
        known = {sign.color: sign for sign in street.signs} | {sign.place: sign for sign in street.signs}
        for kind in QUESTIONS:
            for question in questions(street, kind):
                words = question.text.rstrip("?").split()
                if question.text.startswith(("What does", "What is written at")):
                    sign, = (known[word] for word in words if word in known)
                    assert question.answer == sign.word
                elif question.text.startswith("What is written"):
                    assert question.answer == street.signs[0].word and words[-1] == street.items[0].shape
                elif kind == "count":
                    assert question.answer == str(len(street.signs))
                else:
                    sign, = (sign for sign in street.signs if sign.word == words[-1])
                    assert question.answer in (sign.color, sign.place)


def test_captions_have_every_word_once_or_more():
    rng = np.random.default_rng(1)
    for street in sample(60):
        said = captions(street, rng)
        assert len(set(said)) == 5
        words = [text.replace(",", "").split() for text in said]
        assert all(sign.word in found for sign in street.signs for found in words)


def test_no_test_street_is_a_training_street():
    shown = [{(street.signs, tuple(i.shape for i in street.items)) for street in sample(300, held)} for held in (0, 1)]
    assert not shown[0] & shown[1]
