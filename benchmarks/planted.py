"""Does the curation find what was planted? The embedded web at 20,000 pairs, and real figures with swapped captions.

    make bench-planted        python benchmarks/planted.py [--pairs N] [--figures N] [--out DIR]

Both pools go through the pipeline's own stages from download to select, by the command line, with the default
settings; the plan of what was planted is read only here. Mechanical faults (dead, refused, broken, tiny, wide,
foreign, too short, duplicate) must be caught; sound rows must not fall to the duplicate search; the pair score
must rank swapped captions below true ones. On the figures 20% of the captions change places at random, among the rows
that the scorer was not trained on, and the same ranking is measured: how far a scorer that was trained here in a
minute carries on real pictures.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from vlmpipe.compose import compose, write_params
from vlmpipe.curate.planted import SWAPPED, caught
from vlmpipe.curate.urls import Columns, read_list
from vlmpipe.errors import UserError
from vlmpipe.shards import read_rows, write_json, write_table

RECALL, FALSE_DROPS, AREA = 0.99, 0.01, 0.95
SHARE_SWAPPED = 0.2
SEED = 0


@dataclass(frozen=True)
class Workspace:
    """A folder with the outputs of one pool's stages, and the settings that they ran with."""

    root: Path
    profile: str
    overrides: Sequence[str]

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    def compose(self) -> Mapping[str, Any]:
        self.root.mkdir(parents=True, exist_ok=True)
        places = [f"root={self.root}", f"trusted={self.root}/world/{self.profile}/trusted",
                  f"questions={self.root}/world/{self.profile}/questions"]
        params = compose(self.profile, [*places, *self.overrides])
        write_params(params, self.params)
        return params

    def stage(self, *words: str | Path) -> None:
        command = [sys.executable, "-m", "vlmpipe", *map(str, words), "--params", str(self.params)]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"{words[0]} failed; the line above says why")

    def curate(self) -> None:
        """World to selection; what is there already is kept, so that a run that was ended goes on."""
        root, name = self.root, self.profile
        urls, pool, scorer = root / f"list-{name}.parquet", root / "pools" / name, root / "scorer"
        self.stage("download", name, "--urls", urls, "--out", pool, "--state", root / "state/download" / name)
        self.stage("scorer", "--trusted", root / "world" / name / "trusted", "--out", scorer,
                   "--state", root / "state/scorer")
        self.stage("annotate", name, "--pool", pool, "--scorer", scorer, "--out", root / "annotations" / name)
        self.stage("select", "--pools", root / "pools", "--annotations", root / "annotations",
                   "--questions", root / "world" / name / "questions", "--out", root / "selection")

    def scores(self) -> dict[str, float]:
        """Pair score by uid; rows that could not be scored are not in it."""
        table = read_rows(self.root / "annotations" / self.profile, ["uid", "clip_score"])
        found = zip(table["uid"].to_pylist(), table["clip_score"].to_pylist(), strict=True)
        return {uid: score for uid, score in found if score is not None and score == score}


def main() -> None:
    options = parse_arguments()
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        results = {"scenes": measure_scenes(out / "scenes", options.pairs)}
        show_scenes(console, results["scenes"])
        if options.figures:
            results["textbooks"] = measure_textbooks(out / "textbooks", options.figures)
            show_textbooks(console, results["textbooks"])
        if options.out:
            write_json(out / "result.json", results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs of the embedded web")
    parser.add_argument("--figures", type=int, default=4000, help="figures of the textbook pool; 0: leave it out")
    parser.add_argument("--out", type=Path, help="keep the outputs there, and go on from them")
    return parser.parse_args()


# --- the embedded web --------------------------------------------------------------------------------------

def measure_scenes(root: Path, pairs: int) -> dict:
    """Recall by kind, false drops of the duplicate search, area under the curve of the swapped captions."""
    few = "world.scenes.questions.train_pictures=100"  # nothing is trained on questions here
    work = Workspace(root.absolute(), "scenes", [f"world.scenes.pools.scenes={pairs}", few])
    work.compose()
    world = work.root / "world/scenes"
    if not world.exists():
        work.stage("world", "scenes", "--out", world)
    listed = work.root / "list-scenes.parquet"
    write_table(listed, pq.read_table(world / "pools/scenes.parquet"))
    work.curate()
    decisions = work.root / "selection/decisions.parquet"
    found = caught(world / "planted.parquet", decisions)
    plan = list(read_list(world / "planted.parquet", Columns(extra=("fault", "twin_url"))))
    faults = {row["uid"]: row["fault"] for row in plan}
    return {
        "rows": [row for row in found["rows"] if row["kind"] != SWAPPED],
        "false_drops": false_drops(plan, decisions),
        "swapped": found["swapped"] | {"area": area_by_fault(work.scores(), faults)},
    }


def false_drops(plan: Sequence[Mapping], decisions: Path) -> dict:
    """Sound rows that a rule dropped, by rule, as shares of all sound rows.

    Where a planted copy stayed in place of the row that it repeats, one of the two was rightly dropped.
    """
    table = pq.read_table(decisions, columns=["uid", "reason"])
    reasons = dict(zip(table["uid"].to_pylist(), table["reason"].to_pylist(), strict=True))
    replaced = {row["twin_url"] for row in plan if row["twin_url"] and reasons.get(row["uid"], "unseen") is None}
    sound = [row for row in plan if row["fault"] is None and row["uid"] in reasons]
    dropped = Counter(reasons[row["uid"]] for row in sound if row["url"] not in replaced)
    shares = {rule: count / len(sound) for rule, count in sorted(dropped.items(), key=str) if rule}
    return shares | {"sound": len(sound)}


def area_by_fault(scores: Mapping[str, float], faults: Mapping[str, str | None]) -> float:
    """How well the score tells swapped rows from sound ones."""
    true = [score for uid, score in scores.items() if uid in faults and faults[uid] is None]
    swapped = [score for uid, score in scores.items() if faults.get(uid) == SWAPPED]
    return area(true, swapped)


def area(higher: Sequence[float], lower: Sequence[float]) -> float:
    """Area under the ROC curve: the chance that one of `higher` exceeds one of `lower`, ties half (Mann-Whitney)."""
    values = np.concatenate([higher, lower])
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    above = ranks[: len(higher)].sum() - len(higher) * (len(higher) + 1) / 2
    return float(above / (len(higher) * len(lower)))


# --- real figures ------------------------------------------------------------------------------------------

def measure_textbooks(root: Path, figures: int) -> dict:
    """Swap a fifth of the captions at random and rank the pairs by a scorer trained on other figures."""
    work = Workspace(root.absolute(), "textbooks", [f"world.textbooks.pools.textbooks={figures}"])
    work.compose()
    world = work.root / "world/textbooks"
    if not world.exists():
        work.stage("world", "textbooks", "--out", world)
    pairs = pq.read_table(world / "pools/textbooks.parquet")
    trusted = set(read_rows(world / "trusted", ["caption"])["caption"].to_pylist())
    listed, swapped = swap(pairs, trusted)
    write_table(work.root / "list-textbooks.parquet", listed)
    work.curate()
    # Captions that other figures share are no error where they land on one of these.
    unseen = [row for row in read_list(work.root / "list-textbooks.parquet", Columns())
              if row["caption"] not in trusted]
    scores = work.scores()
    scored = [(scores[row["uid"]], row["url"] in swapped) for row in unseen if row["uid"] in scores]
    true, wrong = ([score for score, is_swapped in scored if is_swapped == side] for side in (False, True))
    return {"area": area(true, wrong), "true": len(true), "swapped": len(wrong), "trusted": len(trusted)}


def swap(pairs: pa.Table, trusted: set[str]) -> tuple[pa.Table, set[str]]:
    """The list with the captions of a random fifth of the unseen rows moved on by one, and those rows' URLs."""
    rng = np.random.default_rng(SEED)
    captions = pairs["caption"].to_pylist()
    unseen = [index for index, text in enumerate(captions) if text not in trusted]
    chosen = rng.permutation(unseen)[: int(len(unseen) * SHARE_SWAPPED)]
    moved = list(captions)
    for index, source in zip(chosen, np.roll(chosen, 1)):
        moved[index] = captions[source]
    urls = pairs["url"].to_pylist()
    changed = {urls[index] for index in chosen if moved[index] != captions[index]}
    return pairs.set_column(pairs.schema.get_field_index("caption"), "caption", pa.array(moved)), changed


# --- what it says ------------------------------------------------------------------------------------------

def show_scenes(console: Console, found: Mapping[str, Any]) -> None:
    table = Table("fault", "planted", "caught", "recall", f"at least {RECALL}", title="The embedded web")
    for row in found["rows"]:
        recall = row["caught"] / row["planted"]
        table.add_row(row["kind"], str(row["planted"]), str(row["caught"]), f"{recall:.4f}", yes(recall >= RECALL))
    console.print(table)
    drops = found["false_drops"]
    near = drops.get("near_duplicate", 0.0) + drops.get("exact_duplicate", 0.0)
    every = ", ".join(f"{rule} {share:.2%}" for rule, share in drops.items() if rule != "sound") or "none"
    console.print(f"Sound rows taken for duplicates: {near:.2%} of {drops['sound']} (at most {FALSE_DROPS:.0%}: "
                  f"{yes(near <= FALSE_DROPS)}); sound rows dropped by rule: {every}")
    area_found = found["swapped"]["area"]
    console.print(f"Swapped captions ({found['swapped']['planted']}): area under the curve {area_found:.4f} "
                  f"(at least {AREA}: {yes(area_found >= AREA)})")


def show_textbooks(console: Console, found: Mapping[str, Any]) -> None:
    console.print(f"Real figures: area under the curve {found['area']:.4f} for {found['swapped']} swapped against "
                  f"{found['true']} true captions; the scorer saw {found['trusted']} others (chance: 0.5)")


def yes(held: bool) -> str:
    return "yes" if held else "NO"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
