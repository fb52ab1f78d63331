"""In which order samples are asked: those about the same pictures together, so that each picture is read once."""

from collections.abc import Sequence

from vlmpipe.evaluate.tasks.base import Sample


def neighbours(samples: Sequence[Sample]) -> list[Sample]:
    """All samples of a picture follow each other, and after them come those of the picture that is their wrong one."""
    groups: dict[object, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.image, []).append(sample)
    found: list[Sample] = []
    for image in list(groups):
        while image in groups:
            members = groups.pop(image)
            found += members
            image = members[0].wrong_image
    return found
