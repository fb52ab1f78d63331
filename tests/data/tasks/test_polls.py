"""POPE's sampling: what is asked for that isn't there, by strategy."""

import numpy as np

from vlmpipe.data.records import DetectionRecord
from vlmpipe.data.tasks.polls import poll

# A table and a cup stand together in four of five pictures, a dog and a leash in three; an owl is rare.
SHOWN = [{"table", "cup"}, {"table", "cup", "dog"}, {"dog", "leash"}, {"dog", "leash"}, {"dog", "leash"},
         {"table", "cup"}, {"table"}, {"owl", "leash"}, {"table", "cup"}]


def record(number: int, labels) -> DetectionRecord:
    names = tuple(sorted(labels))
    return DetectionRecord(
        str(number), f"{number}.jpg", (8, 8), np.zeros((len(names), 4), np.float32), names,
        np.zeros(len(names), bool), (None,) * len(names),
    )


RECORDS = [record(number, labels) for number, labels in enumerate(SHOWN)]


def absent(strategy: str, picture: int, each: int = 1) -> list[str]:
    return [
        question.question.split()[3] for question in poll(RECORDS, each=each)
        if question.slices["strategy"] == strategy and question.images == (f"{picture}.jpg",)
        and question.answers == ("no",)
    ]


def test_half_of_the_answers_are_yes_and_all_are_true():
    for question in poll(RECORDS):
        name = question.question.removeprefix("Is there a").removeprefix("n").split()[0]
        assert question.question.startswith(f"Is there {'an' if name == 'owl' else 'a'} {name} in the image")
        assert (name in SHOWN[int(question.images[0].split(".")[0])]) == (question.answers == ("yes",))
    for strategy in ("random", "popular", "adversarial"):
        said = [question.answers[0] for question in poll(RECORDS) if question.slices["strategy"] == strategy]
        assert said.count("yes") == said.count("no") > 0


def test_popular_asks_for_the_commonest_and_adversarial_for_what_stands_with_what_is_there():
    assert absent("popular", 7) == ["table"]  # five pictures have one
    assert absent("adversarial", 6) == ["cup"]  # four of the five tables have one
    assert absent("adversarial", 7) == ["dog"]  # three of the four leashes have one
    assert set(absent("popular", 2, each=2)) == {"table", "cup"}


def test_the_same_records_have_the_same_questions():
    assert poll(RECORDS) == poll(RECORDS) and poll(RECORDS) != poll(RECORDS, seed=1)
    assert len({question.id for question in poll(RECORDS)}) == len(poll(RECORDS))
    found = poll([record(0, ()), record(1, {"a"}), record(2, {"a", "b"})])
    assert {question.images for question in found} == {("1.jpg",)}  # what the last doesn't show no picture shows
