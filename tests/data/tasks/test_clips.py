"""Clips: what moves, and which way, is seen in the frames and only there."""

import numpy as np

from vlmpipe.data.tasks.clips import FRAMES, Clip, questions, sample_clip

SIDE = 64


def sample(count: int) -> list[Clip]:
    rng = np.random.default_rng(0)
    return [sample_clip(rng, False) for _ in range(count)]


def test_the_changed_pixels_move_the_way_that_is_said():
    for clip in sample(40):
        frames = np.stack([np.asarray(frame) for frame in clip.draw(SIDE)]).astype(int)
        assert frames.shape == (FRAMES, SIDE, SIDE, 3)
        still = np.median(frames, 0)
        centres = []
        for frame in frames[[0, -1]]:
            rows, columns = np.nonzero(np.abs(frame - still).max(-1) > 60)
            centres.append((columns.mean(), rows.mean()))
        (x0, y0), (x1, y1) = centres
        way = ("right" if x1 > x0 else "left") if abs(x1 - x0) > abs(y1 - y0) else ("down" if y1 > y0 else "up")
        assert way == clip.way


def test_everything_stays_in_the_picture_and_apart():
    for clip in sample(100):
        for frame in clip.frames():
            boxes = [item.box for item in frame.items]
            assert all(min(box) >= 0 and max(box) <= 1 for box in boxes)
            if len(boxes) == 2:
                a, b = boxes
                assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def test_answers():
    for clip in sample(20):
        kinds = ("way", "mover shape", "mover color", "count")
        answers = {kind: {q.answer for q in questions(clip, kind)} for kind in kinds}
        assert answers == {"way": {clip.way}, "mover shape": {clip.mover.shape}, "mover color": {clip.mover.color},
                           "count": {str(len(clip.others))}}


def test_a_way_is_no_more_likely_where_the_shape_starts_in_the_middle_frames():
    """Every way is as frequent, so a single frame says at most along which axis."""
    ways = [clip.way for clip in sample(400)]
    assert all(70 < ways.count(way) < 130 for way in ("left", "right", "up", "down"))
