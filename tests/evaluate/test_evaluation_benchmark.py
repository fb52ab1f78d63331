"""What the evaluation benchmark counts and compares."""

import pytest

from benchmarks.evaluation import TINY, Shape, compare, draw, floating_point, products
from vlmpipe.evaluate.tasks.order import neighbours


def test_questions_are_as_many_a_picture_as_asked():
    samples, pictures = draw(27, 5.4)
    assert len(samples) == 27 and len(pictures) == 5 and {sample.image for sample in samples} == set(pictures)
    assert all(sample.image != sample.wrong_image for sample in samples)
    assert [sample.image for sample in samples] == [sample.image for sample in neighbours(samples)]


def test_operations_by_hand():
    """One block of width 2 each: 4 matrices of 2 x 2 and 2 or 3 of 2 x 3; 4 patches."""
    shape = Shape((2, 2, 1, 3), (2, 1, 1, 3), image=32, patch=16)
    see, read = 2 * (16 + 12), 2 * (16 + 18)
    assert (see, read) == (products(2, 3, 2), products(2, 3, 3))
    ours, theirs = floating_point(shape, [[("a", 3, 1), ("a", 5, 2), ("b", 4, 1)]])
    assert theirs * 1e9 == pytest.approx(3 * (see * 2 * 5 + read * (4 + 5 + 2)))
    assert ours * 1e9 == pytest.approx(2 * (see * 5 + read * 4) + read * (3 * 5 + 4))
    assert TINY.patches == 4


def test_one_answer_that_differs_ends_it():
    compare({"a": ("x", "y")}, {"a": ["x", "y"]})
    with pytest.raises(SystemExit, match=r"1 of 2 answers differ: \('z',\) and \['y'\]"):
        compare({"a": ("x",), "b": ("z",)}, {"a": ["x"], "b": ["y"]})
