"""Photos: what can't be seen has no answer, what can has the right one."""

from collections import Counter

import numpy as np

from vlmpipe.data.scenes import SHAPES
from vlmpipe.data.tasks.layouts import sample_layout
from vlmpipe.data.tasks.spoiled import UNANSWERABLE, WAYS, take_photo

RNG = np.random.default_rng(0)
PHOTOS = [take_photo(sample_layout(RNG, False), RNG) for _ in range(200)]


def test_ten_people_answer_and_most_agree():
    for photo in PHOTOS:
        assert len(photo.answers) == len(photo.confidences) == 10
        common, count = Counter(photo.answers).most_common(1)[0]
        assert count >= 7 and (common == UNANSWERABLE) == (photo.way is not None)
        assert (photo.answer_type == UNANSWERABLE) == (photo.way is not None)


def test_spoiled_pictures_show_nothing_and_the_others_everything():
    for photo in PHOTOS[:80]:
        pixels = np.asarray(photo.draw(64)).astype(int)
        contrast = np.abs(pixels - np.median(pixels, (0, 1))).max()
        assert (contrast < 75) == (photo.way in ("dark", "out of focus", "covered")), (photo.way, contrast)
        assert photo.draw(64).tobytes() == photo.draw(64).tobytes()


def test_what_is_absent_is_absent():
    for photo in PHOTOS:
        if photo.way == "absent":
            asked = photo.question.rstrip("?").split()[-1]
            assert asked in SHAPES and asked not in {item.shape for item in photo.scene.items}


def test_every_way_occurs():
    ways = Counter(photo.way for photo in PHOTOS)
    assert set(ways) == {None, *WAYS} and 0.5 < ways[None] / len(PHOTOS) < 0.7
