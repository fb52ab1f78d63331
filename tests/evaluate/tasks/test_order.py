"""Samples about the same pictures are asked together."""

from vlmpipe.evaluate.tasks.base import Sample
from vlmpipe.evaluate.tasks.order import neighbours


def test_samples_follow_their_pictures_and_those_the_wrong_ones():
    pairs = [("a", "c"), ("b", "a"), ("c", "b"), ("a", "c"), ("d", "b"), ("b", "a")]
    samples = [Sample(str(number), right, wrong, "", ()) for number, (right, wrong) in enumerate(pairs)]
    found = neighbours(samples)
    assert [sample.image for sample in found] == ["a", "a", "c", "b", "b", "d"]
    assert sorted(found, key=lambda sample: sample.id) == samples
    assert [sample.id for sample in found[:2]] == ["0", "3"]
