"""Is a task tested on what it was trained on? Test pictures with a near twin among those of training."""

from collections.abc import Sequence
from pathlib import Path

from vlmpipe.curate.evaluation import twins
from vlmpipe.curate.twins import EvaluationOverlap
from vlmpipe.data.task import TaskConfig, read_pictures


def contamination(tasks: Sequence[str], questions: Path, files: TaskConfig) -> dict[str, dict]:
    """`contamination.TASK` as metrics, counts and details: the share of the task's test pictures that look like one of
    its training pictures, by the rule that keeps test pictures out of the pool. Nothing without training pictures.

    Raises:
        UserError: a picture does not decode.
    """
    if not tasks or not (questions / "train" / files.images).is_dir():
        return {"metrics": {}, "n": {}, "details": {}}
    asked, trained = (read_pictures(questions / split, files) for split in ("test", "train"))
    found = twins(asked, trained, EvaluationOverlap(), questions)
    pairs = [f"{name} like {twin}" for name, twin in sorted(found.items())]
    said = "; ".join(pairs[:3]) + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "") or "none"
    names = [f"contamination.{task}" for task in tasks]
    return {
        "metrics": dict.fromkeys(names, len(found) / len(asked)), "n": dict.fromkeys(names, len(asked)),
        "details": dict.fromkeys(names, said),
    }
