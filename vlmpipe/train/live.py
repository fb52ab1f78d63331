"""What a training run says while it goes, where DVC's own tools look for it: dvclive's metrics and plots.

The only importer of dvclive, which writes files here and does nothing else: no experiment, no dvc.yaml, no commit, and
nothing goes to DVC Studio. Wall-clock facts are among what it writes, so its directory belongs under `state`.
"""

import os
from collections.abc import Callable
from pathlib import Path

# Of no interest as a curve: they say where the run is.
PLACES = ("step", "steps", "seconds_left")


def live(directory: Path, resumes: bool) -> Callable[[dict], None]:
    """A function that adds facts, numbers by name with their `step`, to the files in `directory`.

    `metrics.json` has the last of each, `plots/metrics/NAME.tsv` all of them by step. Outside a DVC repository, where
    nobody would read them and dvclive would make one, it writes nothing.

    Args:
        resumes: go on with the curves that are there, instead of clearing them.
    """
    here = Path.cwd()
    if not any((folder / ".dvc").is_dir() for folder in (here, *here.parents)):
        return lambda facts: None
    os.environ.update(DVC_NO_ANALYTICS="1", DVC_STUDIO_OFFLINE="true")
    from dvclive import Live

    log = Live(str(directory), resume=resumes, save_dvc_exp=False, dvcyaml=None, report=None)

    def add(facts: dict) -> None:
        log.step = facts["step"]
        for name, value in facts.items():
            if name not in PLACES:
                log.log_metric(name, value)
        log.make_summary()  # and never `end`, which adds files to git

    return add
