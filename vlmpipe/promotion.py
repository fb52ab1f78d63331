"""What stands between a passed gate and the champion: the verdict must be the gate's own, and of what is promoted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmpipe.config import parse, to_dict
from vlmpipe.errors import UserError
from vlmpipe.evaluate.verdict import check, difference, inputs, lineage, sha256_of
from vlmpipe.evaluate.waivers import read_waivers, refuse_expired, used, waivers_path
from vlmpipe.shards import read_json, sha256_directory, sha256_file

VERDICT = "verdict.json"
CHAMPIONS = "data/state/champions"  # where the files of earlier champions are kept


@dataclass(frozen=True)
class Promotion:
    """A model that is to become the champion.

    Args:
        root: the workspace; the other paths are relative to it.
        lock: dvc.lock, which holds `md5` for `model`.
        gate: whose verdict decides; verdicts that stages of the lock depend on have to stand too.
        gates: section of params.yaml with the rules of each gate.
        champion: the version that reigns now.
        champion_model: sha256 of its directory, as its own verdict says; None where it doesn't.
        public_key: whose signature verdicts must carry; None takes unsigned ones.
    """

    root: Path
    results: str
    lock: Mapping[str, Any]
    model: str
    md5: str
    gate: str
    gates: Mapping[str, Any]
    champion: str | None
    champion_model: str | None
    public_key: str | None

    @property
    def verdict_path(self) -> str:
        return f"{self.results}/gates/{self.gate}/{VERDICT}"

    def refuse_unless_covered(self) -> None:
        """Go through all that the verdict has to be right about.

        Raises:
            UserError: a verdict is missing, altered, unsigned though it must be signed, failed, rests on a waiver that
                no longer holds, or is about another gate, model, data, code, params, rules, metrics or champion.
        """
        verdicts = {path: self._standing(path) for path in self._verdicts}
        for path, verdict in verdicts.items():
            self._refuse_other_rules(path, verdict)
            self._refuse_other_metrics(path, verdict)
            if path == self.verdict_path:
                self._refuse_other_model(verdict)
            self._refuse_other_lineage(path, verdict)
        self._refuse_other_champion(verdicts[self.verdict_path])

    def _refuse_other_champion(self, verdict: Mapping[str, Any]) -> None:
        if verdict["champion"] != self.champion:
            raise UserError(f"no promotion: the verdict compares with champion {verdict['champion'] or 'none'}; "
                            f"expected {self.champion or 'none'}, the champion now; score both anew (`dvc repro "
                            f"--single-item --force evaluate_{self.gate}`), {self._again(self.verdict_path)}")
        if verdict.get("reigns"):  # the champion's own files never come here: its version is known
            raise UserError(f"no promotion: the verdict takes the model for champion {verdict['champion']} itself; "
                            f"expected a comparison with it; restore champion.json, {self._again(self.verdict_path)}")
        evaluation = verdict.get("evaluation") or {}
        # Scores beside an earlier champion decide no rule about this one.
        if self.champion_model is None or self.champion is None or evaluation.get("champion") != self.champion:
            return
        scored = str(evaluation["models"].get("champion"))
        if scored != self.champion_model:
            raise UserError(f"no promotion: champion {self.champion} was scored from files of sha256 {scored[:12]}…; "
                            f"expected {self.champion_model[:12]}…, as its own verdict says; delete its folder in "
                            f"{CHAMPIONS}, score both anew (`dvc repro --single-item --force evaluate_{self.gate}`), "
                            f"{self._again(self.verdict_path)}")

    @cached_property
    def _verdicts(self) -> list[str]:
        """Paths of the verdicts that have to stand: each behind those that it depends on, that of `gate` last."""
        read = {path for stage in self.lock.get("stages", {}).values() for path in inputs(stage)}
        above = {path for path in read if path.startswith(f"{self.results}/") and path.endswith(f"/{VERDICT}")}
        depth = {path: len(lineage(self.lock, [path])) for path in above - {self.verdict_path}}
        return [*sorted(depth, key=lambda path: (depth[path], path)), self.verdict_path]

    def _again(self, path: str) -> str:
        """How to judge anew: with the gates below, for the verdicts above them are part of their lineage."""
        stages = [f"gate_{_gate_of(verdict)}" for verdict in self._verdicts[self._verdicts.index(path):]]
        return f"rerun the gate (`dvc repro --single-item --force {' '.join(stages)}`), then `vlmpipe run`"

    def _standing(self, path: str) -> dict[str, Any]:
        """The verdict there, which is its gate's own and passed."""
        gate = _gate_of(path)
        if not (self.root / path).exists():
            raise UserError(f"no promotion: found no verdict {path}; expected the gate's; {self._again(path)}")
        verdict = read_json(self.root / path)
        check(verdict, self.public_key, f"no promotion: {path}")
        if not verdict["passed"]:
            raise UserError(f"no promotion: {path} says failed; expected passed; read its rules")
        refuse_expired(used(verdict), f"no promotion: {path}")
        file = waivers_path(self.results, gate)
        if used(verdict) and verdict["waivers"] != [to_dict(waiver) for waiver in read_waivers(self.root / file)]:
            raise UserError(f"no promotion: {path} rests on waivers that {file} doesn't hold as they were; expected "
                            f"the same; {self._again(path)}")
        return verdict

    def _refuse_other_rules(self, path: str, verdict: Mapping[str, Any]) -> None:
        from vlmpipe.evaluate.rules import GateConfig  # imports scipy, which nothing else here needs

        gate = _gate_of(path)
        if verdict.get("gate") != gate:
            raise UserError(f"no promotion: {path} is of gate '{verdict.get('gate')}'; expected '{gate}'; "
                            f"{self._again(path)}")
        rules = parse(GateConfig, self.gates.get(gate), f"params.yaml: gates.{gate}")
        if verdict.get("rules_sha256") != sha256_of(to_dict(rules)):
            raise UserError(f"no promotion: {path} was judged by other rules than gates.{gate} in params.yaml; "
                            f"expected those; {self._again(path)}")

    def _refuse_other_metrics(self, path: str, verdict: Mapping[str, Any]) -> None:
        if not verdict.get("metric_files"):
            raise UserError(f"no promotion: {path} names no metric file; expected at least one; {self._again(path)}")
        for file in verdict["metric_files"]:
            found = self.root / file["path"]
            # Where packed data alone was fetched to train on, its audit is missing; the lineage says what that was.
            if path != self.verdict_path and not found.exists():
                continue
            if not found.exists() or sha256_file(found) != file["sha256"]:
                raise UserError(f"no promotion: {file['path']} is not what the verdict was made from; "
                                f"{self._again(path)}")

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

    def _refuse_other_lineage(self, path: str, verdict: Mapping[str, Any]) -> None:
        judged = (verdict.get("hashes") or {}).get("stages")
        if not judged:
            raise UserError(f"no promotion: {path} names no stage that led to it; expected those of dvc.lock; "
                            f"{self._again(path)}")
        now = lineage(self.lock, [file["path"] for file in verdict["metric_files"]])
        if path == self.verdict_path and self.model not in _outs(self.lock, now):
            raise UserError(f"no promotion: the metrics of {path} don't come from {self.model}; expected its "
                            f"evaluation; {self._again(path)}")
        if other := difference(judged, now):
            raise UserError(f"no promotion: {other} than when the gate judged; expected what {path} names; "
                            f"{self._again(path)}")


def consumers(lock: Mapping[str, Any], path: str) -> list[tuple[str, str | None]]:
    """(stage, hash that it saw) of every stage that depends on `path`."""
    stages = lock.get("stages", {})
    return [
        (name, dep.get("md5"))
        for name, stage in stages.items() for dep in stage.get("deps", []) if dep["path"] == path
    ]


def _outs(lock: Mapping[str, Any], stages: Sequence[str] | Mapping[str, Any]) -> set[str]:
    return {out["path"] for name in stages for out in lock["stages"][name].get("outs", [])}


def _gate_of(path: str) -> str:
    return Path(path).parent.name
