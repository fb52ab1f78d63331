"""Is a task tested on what it was trained on? Test pictures with a near twin among those of training."""

from collections.abc import Collection, Mapping
from pathlib import Path

from vlmpipe.curate.evaluation import twins
from vlmpipe.curate.twins import EvaluationOverlap
from vlmpipe.data.task import TaskConfig, names_of, read_pictures, read_records, teaches


def contamination(asked: Mapping[str, Collection[str]], questions: Path, files: TaskConfig) -> dict[str, dict]:
    """`contamination.TASK` as metrics, counts and details: the share of the test pictures that the task asks about
    which look like one of its training pictures, by the rule that keeps test pictures out of the pool. Pictures that
    lie in either folder and stand in no record count for nothing: official files often share one folder.

    Args:
        asked: of each task the names of its test pictures.

    Returns:
        Nothing where nothing is asked or learned from.

    Raises:
        UserError: no such picture or one that does not decode, or damaged annotations.
    """
    names, trained = sorted(set().union(*asked.values())), trained_on(questions / "train", files)
    found: dict[str, dict] = {"metrics": {}, "n": {}, "details": {}}
    if not names or not trained:
        return found
    used = (read_pictures(questions / split, files).only(some) for split, some in (("test", names), ("train", trained)))
    twin_of = twins(*used, EvaluationOverlap(), questions)
    for task, own in asked.items():
        pairs = [f"{name} like {twin_of[name]}" for name in sorted(own) if name in twin_of]
        said = "; ".join(pairs[:3]) + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "") or "none"
        found["metrics"][f"contamination.{task}"] = len(pairs) / len(own)
        found["n"][f"contamination.{task}"] = len(own)
        found["details"][f"contamination.{task}"] = said
    return found


def trained_on(train: Path, files: TaskConfig) -> list[str]:
    """The pictures of the records that teach; none where there are no pictures."""
    if not (train / files.images).is_dir():
        return []
    return sorted({name for record in read_records(train, files) if teaches(record) for name in names_of(record)})
