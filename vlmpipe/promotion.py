"""What stands between a passed gate and the champion: the verdict must be the gate's own, and of what is promoted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmpipe.config import to_dict
from vlmpipe.errors import UserError
from vlmpipe.evaluate.verdict import check, difference, inputs, lineage
from vlmpipe.evaluate.waivers import read_waivers, refuse_expired, used, waivers_path
from vlmpipe.shards import read_json, sha256_directory, sha256_file

VERDICT = "verdict.json"


@dataclass(frozen=True)
class Promotion:
    """A model that is to become the champion.

    Args:
        root: the workspace; the other paths are relative to it.
        lock: dvc.lock, which holds `md5` for `model`.
        gate: whose verdict decides; verdicts that stages of the lock depend on have to stand too.
        champion: the version that reigns now.
        public_key: whose signature verdicts must carry; None takes unsigned ones.
    """

    root: Path
    results: str
    lock: Mapping[str, Any]
    model: str
    md5: str
    gate: str
    champion: str | None
    public_key: str | None

    @property
    def verdict_path(self) -> str:
        return f"{self.results}/gates/{self.gate}/{VERDICT}"

    def refuse_unless_covered(self) -> None:
        """Go through all that the verdict has to be right about.

        Raises:
            UserError: a verdict is missing, altered, unsigned though it must be signed, failed, rests on a waiver that
                no longer holds, or is about another model, data, code, params, metrics or champion.
        """
        for path in [*self._upstream_verdicts(), self.verdict_path]:
            self._refuse_unless_standing(path)
        verdict = read_json(self.root / self.verdict_path)
        self._refuse_other_metrics(verdict)
        self._refuse_other_model(verdict)
        self._refuse_other_lineage(verdict)
        if verdict["champion"] != self.champion:
            raise UserError(f"no promotion: the verdict compares with champion {verdict['champion'] or 'none'}; "
                            f"expected {self.champion or 'none'}, the champion now; score both anew (`dvc repro "
                            f"--single-item --force evaluate_{self.gate}`), {_again(self.gate)}")

    def _upstream_verdicts(self) -> list[str]:
        read = {path for stage in self.lock.get("stages", {}).values() for path in inputs(stage)}
        return sorted(path for path in read if path.startswith(f"{self.results}/") and path.endswith(f"/{VERDICT}"))

    def _refuse_unless_standing(self, path: str) -> None:
        gate = Path(path).parent.name
        if not (self.root / path).exists():
            raise UserError(f"no promotion: found no verdict {path}; expected the gate's; {_again(gate)}")
        verdict = read_json(self.root / path)
        check(verdict, self.public_key, f"no promotion: {path}")
        if not verdict["passed"]:
            raise UserError(f"no promotion: {path} says failed; expected passed; read its rules")
        refuse_expired(used(verdict), f"no promotion: {path}")
        file = waivers_path(self.results, gate)
        if used(verdict) and verdict["waivers"] != [to_dict(waiver) for waiver in read_waivers(self.root / file)]:
            raise UserError(f"no promotion: {path} rests on waivers that {file} doesn't hold as they were; expected "
                            f"the same; {_again(gate)}")

    def _refuse_other_metrics(self, verdict: Mapping[str, Any]) -> None:
        if not verdict["metric_files"]:
            raise UserError(f"no promotion: {self.verdict_path} names no metric file; expected at least one; "
                            f"{_again(self.gate)}")
        for file in verdict["metric_files"]:
            path = self.root / file["path"]
            if not path.exists() or sha256_file(path) != file["sha256"]:
                raise UserError(f"no promotion: {file['path']} is not what the verdict was made from; "
                                f"{_again(self.gate)}")

    def _refuse_other_model(self, verdict: Mapping[str, Any]) -> None:
        for stage, md5 in consumers(self.lock, self.model):
            if md5 != self.md5:
                raise UserError(f"no promotion: stage {stage} last saw another model than dvc.lock holds; `dvc repro`")
        if verdict.get("evaluation") is None:
            return
        judged, found = verdict["evaluation"]["models"]["challenger"], sha256_directory(self.root / self.model)
        if judged != found:
            raise UserError(f"no promotion: {self.model} has sha256 {found[:12]}…, the evaluated model {judged[:12]}…; "
                            f"expected the same; `dvc checkout {self.model}`, or `dvc repro`")

    def _refuse_other_lineage(self, verdict: Mapping[str, Any]) -> None:
        judged = (verdict.get("hashes") or {}).get("stages")
        if not judged:
            raise UserError(f"no promotion: {self.verdict_path} names no stage that led to it; expected those of "
                            f"dvc.lock; {_again(self.gate)}")
        now = lineage(self.lock, [file["path"] for file in verdict["metric_files"]])
        if self.model not in _outs(self.lock, now):
            raise UserError(f"no promotion: the metrics of {self.verdict_path} don't come from {self.model}; expected "
                            f"its evaluation; {_again(self.gate)}")
        if other := difference(judged, now):
            raise UserError(f"no promotion: {other} than when the gate judged; expected what {self.verdict_path} "
                            f"names; {_again(self.gate)}")


def consumers(lock: Mapping[str, Any], path: str) -> list[tuple[str, str | None]]:
    """(stage, hash that it saw) of every stage that depends on `path`."""
    stages = lock.get("stages", {})
    return [
        (name, dep.get("md5"))
        for name, stage in stages.items() for dep in stage.get("deps", []) if dep["path"] == path
    ]


def _outs(lock: Mapping[str, Any], stages: Sequence[str] | Mapping[str, Any]) -> set[str]:
    return {out["path"] for name in stages for out in lock["stages"][name].get("outs", [])}


def _again(gate: str) -> str:
    return f"rerun the gate (`dvc repro --single-item --force gate_{gate}`), then `vlmpipe run`"
