"""After the DAG: git keeps the record, the DVC remote the data, registry tags the versions and the champion.

A version is a git tag `<name>-<profile>@vX.Y.Z` on the commit whose dvc.lock holds the model; the champion is the
version with the latest tag `<name>-<profile>#champion#N`. GTO writes these tags and its documented format is read
here from git. `results/<profile>/champion.json` repeats what gates compare with. Each step looks at what is there
first, so that a publication that was cut off goes on when it is run again.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from vlmpipe.config import nearest, parse
from vlmpipe.errors import UserError, disk_full
from vlmpipe.evaluate import waivers
from vlmpipe.process import run_lock
from vlmpipe.promotion import CHAMPIONS, VERDICT, Promotion
from vlmpipe.shards import write_json

CHAMPION = "champion"
IDENTITY = {"NAME": "vlmpipe", "EMAIL": "vlmpipe@localhost"}
SEMVER = re.compile(r"v\d+\.\d+\.\d+")
MODEL_STAGE = "finetune"


@dataclass(frozen=True)
class PublishConfig:
    """What follows a run.

    name: versions are called `<name>-<profile>`. remote: a DVC remote, null for the default one; push: whether data
    goes there after each run. public_key: whose signature (ed25519, hex, as `keygen` prints it) verdicts must carry;
    null promotes on unsigned ones. ask: whether a run pauses at a gate that is INCONCLUSIVE until a person has answered
    in Prefect's UI, for at most ask_hours.
    """

    name: str = "vlm"
    remote: str | None = None
    push: bool = True
    public_key: str | None = None
    ask: bool = False
    ask_hours: float = 24.0

    def __post_init__(self):
        if not re.fullmatch(r"[a-z][a-z0-9-]*", self.name):
            raise UserError(f"found name '{self.name}'; expected lower-case letters, digits and dashes; rename it")
        if self.public_key is not None and not re.fullmatch(r"[0-9a-f]{64}", self.public_key):
            raise UserError(f"found public_key '{self.public_key}'; expected 64 hex digits; "
                            f"`python -m vlmpipe gate keygen FILE` prints them")
        if not self.ask_hours > 0:
            raise UserError(f"found ask_hours {self.ask_hours}; expected more than 0; set ask=false to ask nobody")


@dataclass(frozen=True)
class Version:
    """A registered model: its version, its commit and what that commit says about it."""

    name: str
    rev: str
    model: str | None
    data: str | None
    verdict: Mapping[str, Any] | None
    waivers: tuple[Mapping[str, Any], ...] = ()  # of all its gates


# --- what callers use --------------------------------------------------------------------------------------

@contextlib.contextmanager
def selection_at(place: str, root: Path) -> Iterator[Path]:
    """A selection's directory: `place` itself where it is one, else `<root>/selection` as it was at a git revision.

    Raises:
        UserError: it is neither, or what that revision names is not in cache or remote.
    """
    if Path(place).is_dir():
        yield Path(place)
        return
    from dvc.api import DVCFileSystem

    with tempfile.TemporaryDirectory(prefix="vlmpipe-") as folder:
        here = Path(folder) / "selection"
        try:
            DVCFileSystem(".", rev=place).get(f"{root}/selection", str(here), recursive=True)
        except Exception as error:  # DVC's own, git's, and those of each kind of storage
            if disk_full(error):
                raise
            raise UserError(f"found neither a directory nor a revision with {root}/selection in '{place}' "
                            f"({_reasons(error)}); expected one of them; see `git log`, or `dvc pull` first") from None
        yield here


def models(params: Mapping[str, Any], root: Path | None = None) -> None:
    """Print the table of versions, with the metrics that their gate judged."""
    from rich.console import Console
    from rich.table import Table

    registry = Registry(root or Path.cwd(), params)
    table = Table("version", "", "verdict", "metrics", "data", "commit", title=registry.name)
    for row in registry.rows():
        mark = "champion" if row["champion"] else ""
        judged = {key: row["metrics"].get(key) for key in row["judged"]}
        metrics = "\n".join(f"{key} {value:.4g}" for key, value in judged.items() if value is not None)
        verdict = "\n".join([row["verdict"], *map(waivers.line, row["waivers"])])
        table.add_row(row["version"], mark, verdict, metrics, (row["data"] or "?")[:8], row["rev"][:8])
    for column in table.columns:
        column.no_wrap = True
    Console().print(table if table.row_count else f"no version of {registry.name} yet; `vlmpipe run` makes one")


def rollback(version: str, params: Mapping[str, Any], root: Path | None = None) -> None:
    """Move the champion to an earlier (or later) registered version.

    Raises:
        UserError: there is no such version, or a run is going.
    """
    registry = Registry(root or Path.cwd(), params)
    with run_lock(registry.root / "data/state/run.lock"):
        print(registry.roll_back(version if version.startswith("v") else f"v{version}"))


def champion_model(params: Mapping[str, Any], root: Path | None = None) -> Path:
    """The champion's model directory as of its commit, from the DVC cache or the remote; kept once fetched.

    Raises:
        UserError: there is no champion, or its files are in neither place.
    """
    registry = Registry(root or Path.cwd(), params)
    champion = registry.champion()
    if champion is None:
        raise UserError(f"found no champion of {registry.name}; expected a promoted model; `vlmpipe run` makes one")
    return registry.materialise(champion)


# --- the registry of one profile ---------------------------------------------------------------------------

class Registry:
    """Versions of one profile's model in one workspace.

    Raises:
        UserError: the workspace is not a git repository.
    """

    def __init__(self, root: Path, params: Mapping[str, Any]):
        self.root = Path(root)
        self.config = parse(PublishConfig, params.get("publish"), "params.yaml: publish")
        self.profile = str(params["profile"])
        self.name = f"{self.config.name}-{re.sub('[^a-z0-9]+', '-', self.profile.lower())}"
        self.results, data = str(params["results"]), str(params["root"])
        self.model_path, self.data_path = f"{data}/models/{MODEL_STAGE}", f"{data}/packed"
        self.verdict_path = f"{self.results}/gates/{MODEL_STAGE}/verdict.json"
        self.champion_path = f"{self.results}/champion.json"
        self.gates = params.get("gates") or {}
        self.record = ["dvc.lock", "params.yaml", self.results]
        if not self._git("rev-parse", "--git-dir", check=False):
            raise UserError(f"{self.root} is not a git repository; expected one: versions are its tags; `git init`")

    def publish(self, promote: bool = True) -> list[str]:
        """Commit the record of a run, push its data, and promote its model if that is new and its gate said yes.

        Args:
            promote: False for runs that end before the last gate.

        Returns:
            A line for each thing done or left as it was.

        Raises:
            UserError: no remote to push to, or a promotion that the verdict doesn't cover.
        """
        said = [self.commit(f"Record a run of profile {self.profile}", self.record)]
        if self.config.push:
            said.append(self.push())
        if promote:
            said += self.promote()
        return said

    def commit(self, message: str, paths: Sequence[str]) -> str:
        """Commit these paths and nothing else, if they changed."""
        present = [path for path in paths if (self.root / path).exists() or self._git("ls-files", "--", path)]
        if not present or not self._git("status", "--porcelain", "--untracked-files=all", "--", *present):
            return "git: nothing new to commit"
        self._git("add", "--", *present)
        self._git("commit", "--quiet", "-m", message, "--", *present)
        others = self._git("status", "--porcelain", "--untracked-files=no").splitlines()
        note = f"; {len(others)} other changed file(s) are not in it" if others else ""
        return f"git: committed {self._git('rev-parse', '--short', 'HEAD')}{note}"

    def push(self) -> str:
        """Push what dvc.lock names to the remote."""
        from dvc.repo import Repo

        try:
            with contextlib.closing(Repo(str(self.root))) as repo:
                remote = self.config.remote or repo.config["core"].get("remote")
                count = repo.push(remote=self.config.remote)
        except Exception as error:  # DVC's own, and those of each kind of storage
            if disk_full(error):
                raise
            raise UserError(
                f"dvc push failed: {_reasons(error)}; expected a reachable remote (`dvc remote list`); "
                f"mend it and rerun, or set publish.push=false"
            ) from None
        return f"dvc: {count} file(s) pushed to remote '{remote}'"

    def promote(self) -> list[str]:
        """Register this workspace's model and make it the champion, once."""
        lock = yaml.safe_load((self.root / "dvc.lock").read_text(encoding="utf-8")) or {}
        model = out_md5(lock, self.model_path)
        if model is None:
            return [f"registry: dvc.lock holds no {self.model_path}; nothing to register"]
        known = next((version for version in self.versions if version.model == model), None)
        champion = self.champion()
        if known and self._was_champion(known):
            said = f"registry: the model is {known.name} as before; the champion is {champion.name}"
            return [said, *self._write_champion(champion)]
        Promotion(
            self.root, self.results, lock, self.model_path, model, MODEL_STAGE, self.gates,
            champion.name if champion else None, _judged_model(champion), self.config.public_key,
        ).refuse_unless_covered()
        version = known or self._register()
        return [self._crown(version), *self._write_champion(version)]

    def roll_back(self, version: str) -> str:
        found = next((known for known in self.versions if known.name == version), None)
        if found is None:
            names = [known.name for known in self.versions]
            raise UserError(f"found no version '{version}' of {self.name}{nearest(version, names)}; "
                            f"expected one of: {', '.join(names) or 'none yet'}")
        before = self.champion()
        said = f"the champion is {version} already" if before == found else self._crown(found)
        self._write_champion(found)
        return said

    def rows(self) -> list[dict[str, Any]]:
        """Plain rows of the table of versions, newest first."""
        champion = self.champion()
        return [
            {
                "version": version.name, "rev": version.rev, "champion": version == champion, "data": version.data,
                "model": version.model, "metrics": dict((version.verdict or {}).get("metrics", {})),
                "judged": list(dict.fromkeys(check["metric"] for check in (version.verdict or {}).get("rules", []))),
                "verdict": _in_words(version.verdict),
                "waivers": list(version.waivers),
            }
            for version in reversed(self.versions)
        ]

    @cached_property
    def versions(self) -> list[Version]:
        """Registered versions, oldest first."""
        tags = self._tags(f"{self.name}@*")
        names = [tag.partition("@")[2] for tag in tags if f"{tag}!" not in tags]  # `!` takes a registration back
        names = sorted(filter(SEMVER.fullmatch, names), key=lambda name: tuple(map(int, name[1:].split("."))))
        return [self._version(name, tags[f"{self.name}@{name}"]) for name in names]

    def champion(self) -> Version | None:
        # The counter decides: tags of one second have no other order.
        assigned = sorted((int(tag.rpartition("#")[2]), rev) for tag, rev in self._assignments().items())
        return next((version for version in self.versions if assigned and version.rev == assigned[-1][1]), None)

    def materialise(self, version: Version) -> Path:
        from dvc.api import DVCFileSystem

        target = self.root / CHAMPIONS / f"{self.name}-{version.name}-{(version.model or '')[:8]}"
        if target.exists():
            return target
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        model_path = f"{self._params_at(version.rev)['root']}/models/{MODEL_STAGE}"
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            then = DVCFileSystem(str(self.root), rev=version.rev, config=self._remotes())
            then.get(model_path, str(partial), recursive=True)
            partial.rename(target)
        except Exception as error:  # DVC's own, and those of each kind of storage
            if disk_full(error):
                raise
            raise UserError(
                f"the files of {self.name} {version.name} come from neither the DVC cache nor the remote "
                f"({_reasons(error)}); expected one of them; see `dvc remote list`, or roll back"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def _remotes(self) -> dict[str, Any]:
        """The remotes as they are now: an earlier commit may name another one, or by a path that leads nowhere here."""
        from dvc.repo import Repo

        with contextlib.closing(Repo(str(self.root))) as repo:
            remote = self.config.remote or repo.config["core"].get("remote")
            return {"remote": dict(repo.config["remote"]), **({"core": {"remote": remote}} if remote else {})}

    # --- tags and files ---

    def _register(self) -> Version:
        import gto.api

        rev = self._git("rev-parse", "HEAD")
        message = self._message(self._version("", rev))
        with self._identity():
            name = gto.api.register(str(self.root), self.name, rev, message=message).version
        del self.versions
        return next(version for version in self.versions if version.name == name)

    def _message(self, version: Version) -> str:
        """What a tag says: the model, the verdict and every waiver under it."""
        digest = (version.verdict or {}).get("digest")
        return "\n".join([f"{self.name}: model {version.model}, verdict {digest}", *map(waivers.line, version.waivers)])

    def _crown(self, version: Version) -> str:
        import gto.api

        with self._identity():
            message = self._message(version)
            gto.api.assign(str(self.root), self.name, CHAMPION, version=version.name, message=message, force=True)
        return f"registry: {self.name} {version.name} is the champion"

    def _write_champion(self, version: Version) -> list[str]:
        metrics = (version.verdict or {}).get("metrics", {})
        champion = {"version": version.name, "rev": version.rev, "metrics": metrics}
        # By which a gate that judges this very model again, on scores from before it reigned, knows it.
        if model := _judged_model(version):
            champion["model"] = model
        if version.waivers:
            champion["waivers"] = list(version.waivers)
        # What the next audit compares its data with.
        data = read_verdict(self._text(version.rev, f"{self.results}/gates/data/verdict.json"))
        if data and data["passed"]:
            champion["audit"] = {"metrics": data["metrics"], "n": data["n"]}
        write_json(self.root / self.champion_path, champion)
        said = self.commit(f"{self.name}: {version.name} is the champion", [self.champion_path])
        return [] if "nothing" in said else [said]

    def _version(self, name: str, rev: str) -> Version:
        lock = yaml.safe_load(self._text(rev, "dvc.lock") or "") or {}
        root = self._params_at(rev).get("root")
        gates = self._git("ls-tree", "-r", "--name-only", rev, "--", f"{self.results}/gates").splitlines()
        verdicts = {path: read_verdict(self._text(rev, path)) for path in gates if path.endswith(f"/{VERDICT}")}
        waived = tuple(waiver for verdict in verdicts.values() for waiver in waivers.used(verdict))
        model, data = out_md5(lock, f"{root}/models/{MODEL_STAGE}"), out_md5(lock, f"{root}/packed")
        return Version(name, rev, model, data, verdicts.get(self.verdict_path), waived)

    def _params_at(self, rev: str) -> Mapping[str, Any]:
        return yaml.safe_load(self._text(rev, "params.yaml") or "") or {}

    def _was_champion(self, version: Version) -> bool:
        return version.rev in self._assignments().values()

    def _assignments(self) -> dict[str, str]:
        return self._tags(f"{self.name}#{CHAMPION}#*")

    def _tags(self, pattern: str) -> dict[str, str]:
        """Commit of each tag."""
        form = "%(refname:strip=2) %(objectname) %(*objectname)"
        lines = self._git("for-each-ref", f"--format={form}", f"refs/tags/{pattern}").splitlines()
        return {line.split()[0]: line.split()[-1] for line in lines}

    def _text(self, rev: str | None, path: str) -> str | None:
        """A file as of a commit, or of the workspace; None where there is none."""
        if rev is not None:
            return self._git("show", f"{rev}:./{path}", check=False) or None
        file = self.root / path
        return file.read_text(encoding="utf-8") if file.exists() else None

    def _git(self, *arguments: str, check: bool = True) -> str:
        environment = {**self._fallback_identity, **os.environ} if arguments[0] == "commit" else None
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=self.root, env=environment, capture_output=True, text=True, check=check
            )
        except FileNotFoundError:
            raise UserError("found no git; expected it on the PATH; install it") from None
        except subprocess.CalledProcessError as error:
            raise UserError(f"git {arguments[0]} failed: {' '.join((error.stderr or error.stdout).split())}; "
                            f"expected a repository that takes commits; mend it and rerun") from None
        return done.stdout.strip() if done.returncode == 0 else ""

    @cached_property
    def _fallback_identity(self) -> dict[str, str]:
        """Author and committer for machines where git knows nobody; what is configured stands."""
        return {
            f"GIT_{role}_{key}": value
            for key, value in IDENTITY.items() if not self._git("config", f"user.{key.lower()}", check=False)
            for role in ("AUTHOR", "COMMITTER")
        }

    @contextlib.contextmanager
    def _identity(self):
        """The same for GTO, which takes it from the environment."""
        added = {key: value for key, value in self._fallback_identity.items() if key not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for key in added:
                del os.environ[key]


def _reasons(error: BaseException | None) -> str:
    """What an error says, and what the errors behind it say, in one line."""
    said = []
    while error is not None:
        said.append(" ".join(str(error).split()) or type(error).__name__)
        error = error.__cause__
    return ": ".join(dict.fromkeys(said))


def _judged_model(version: Version | None) -> str | None:
    """sha256 of the directory that the version's verdict is about; None where it doesn't say."""
    evaluation = ((version and version.verdict) or {}).get("evaluation") or {}
    return evaluation.get("models", {}).get("challenger")


def _in_words(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None:
        return "none"
    undecided = " (inconclusive)" if verdict.get("verdict") == "INCONCLUSIVE" else ""
    return ("passed" if verdict["passed"] else "failed") + undecided


def read_verdict(text: str | None) -> dict[str, Any] | None:
    return None if text is None else json.loads(text)


def out_md5(lock: Mapping[str, Any], path: str) -> str | None:
    """The hash that dvc.lock holds for an out."""
    return next((out.get("md5") for out in _entries(lock, "outs") if out["path"] == path), None)


def _entries(lock: Mapping[str, Any], kind: str) -> Iterable[Mapping[str, Any]]:
    return (entry for stage in lock.get("stages", {}).values() for entry in stage.get(kind, []))
