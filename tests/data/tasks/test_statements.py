"""Statements on pairs: labels are true, and sentences alone say nothing of them."""

from collections import Counter

import numpy as np

from vlmpipe.data.scenes import COLORS, SHAPES
from vlmpipe.data.tasks.statements import CLAIMS, sample_set


def truth(sentence: str, pair) -> bool:
    """Judged here from the words, apart from the code that made them."""
    words = sentence.replace("circles", "circle").replace("squares", "square").replace("triangles", "triangle")
    words = words.replace("stars", "star").replace(" shapes", " shape").split()
    color = next((word for word in words if word in COLORS), None)
    shape = next((word for word in words if word in SHAPES), None)
    counts = [sum(color in (None, i.color) and shape in (None, i.shape) for i in scene.items) for scene in pair]
    if sentence.startswith("some"):
        seen = [{getattr(item, words[1]) for item in scene.items} for scene in pair]
        return bool(seen[0] & seen[1])
    if "more" in words:
        return counts[0] > counts[1] if words[1] == "left" else counts[1] > counts[0]
    if "total" in words:
        return sum(counts) == (1 if "one" in words else int(words[2]))
    if words[0] == "exactly":
        return sum(count > 0 for count in counts) == 1
    if words[0] == "both":
        return all(counts)
    return counts[0 if "left" in words else 1] > 0


def test_labels_are_true_and_half_of_them_are_yes():
    rng = np.random.default_rng(0)
    kinds = Counter()
    for _ in range(150):
        found = sample_set(rng, False)
        assert [truth(found.sentence, pair) for pair in found.pairs] == list(found.labels), found.sentence
        assert sum(found.labels) == 2 and len(found.pairs) == 4
        kinds[found.kind] += 1
    assert set(kinds) == set(CLAIMS) and min(kinds.values()) >= 5
