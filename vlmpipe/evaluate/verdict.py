"""What makes a verdict evidence: the hashes of all that led to it, a digest over every byte, a signature over that.

`hashes` follows dvc.lock from the judged metrics up to where the data came from, and takes down with which data, code
and params each stage on the way ran. The digest shows an accident or a careless edit; who means to deceive can compute
it anew, so where `VLMPIPE_SIGNING_KEY` names a private key (ed25519, PEM) the gate signs as well.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from vlmpipe.errors import UserError

KEY_VARIABLE = "VLMPIPE_SIGNING_KEY"
SEAL = ("digest", "signature", "public_key")
KINDS = ("data", "code", "config")
NAMED_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "scipy", "pillow")
SETTLED_S, ATTEMPTS = 0.1, 50


# --- digest and signature ----------------------------------------------------------------------------------

def seal(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict with `digest`, and where a key is configured with `signature` and `public_key` (hex) too.

    Raises:
        UserError: there is no ed25519 key where VLMPIPE_SIGNING_KEY says.
    """
    bare = {key: value for key, value in verdict.items() if key not in SEAL}
    sealed = {**bare, "digest": sha256_of(bare)}
    if path := os.environ.get(KEY_VARIABLE):
        key = _read_key(Path(path))
        sealed["signature"] = key.sign(_signed_bytes(sealed["digest"])).hex()
        sealed["public_key"] = key.public_key().public_bytes_raw().hex()
    return sealed


def check(verdict: Mapping[str, Any], public_key: str | None = None, where: str = "verdict.json") -> None:
    """Refuse a verdict that isn't what its gate wrote.

    Args:
        public_key: whose signature (hex) the verdict must carry; None takes an unsigned one too.

    Raises:
        UserError: it was altered, isn't signed though it must be, or is signed by somebody else.
    """
    bare = {key: value for key, value in verdict.items() if key not in SEAL}
    if verdict.get("digest") != sha256_of(bare, where):
        found = "another digest than its content has" if "digest" in verdict else "no digest"
        raise UserError(f"{where}: found {found}; expected it as its gate wrote it; it was altered: rerun the gate")
    if public_key is None and "signature" not in verdict:
        return
    if "signature" not in verdict:
        raise UserError(f"{where}: found no signature; expected one by {public_key[:12]}… (publish.public_key); "
                        f"set {KEY_VARIABLE} and rerun the gate")
    signer = str(verdict.get("public_key"))
    if public_key is not None and signer != public_key:
        raise UserError(f"{where}: found a signature by {signer[:12]}…; expected one by {public_key[:12]}… "
                        f"(publish.public_key); rerun the gate with its key")
    if not _signed_by(signer, verdict["digest"], str(verdict["signature"])):
        raise UserError(f"{where}: found a signature of something else; expected one of this verdict; it was altered: "
                        f"rerun the gate")


def keygen(path: Path) -> str:
    """Write a new private key, readable by its owner alone; the public one, for `publish.public_key`.

    Raises:
        UserError: something is there already: keys are not replaced by accident.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key.private_bytes(*form))
    except FileExistsError:
        raise UserError(f"found {path} already; expected no file: a key is not replaced; name another") from None
    return key.public_key().public_bytes_raw().hex()


def _read_key(path: Path):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{KEY_VARIABLE}={path}: found no private key without a password ({error}); expected a PEM "
                        f"file; `python -m vlmpipe gate keygen FILE` makes one") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{KEY_VARIABLE}={path}: found {type(key).__name__}; expected an ed25519 key; "
                        f"`python -m vlmpipe gate keygen FILE` makes one")
    return key


def _signed_bytes(digest: str) -> bytes:
    return f"vlmpipe verdict {digest}".encode()


def _signed_by(public_key: str, digest: str, signature: str) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        key.verify(bytes.fromhex(signature), _signed_bytes(digest))
    except (InvalidSignature, ValueError):
        return False
    return True


def sha256_of(value: Any, where: str = "what a verdict rests on") -> str:
    """Of the canonical json: sorted keys, no spaces, floats as their shortest exact text.

    Raises:
        UserError: it holds a NaN or an infinity, which no stage writes.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise UserError(f"{where}: found NaN or an infinity; expected finite numbers as stages write them; it was "
                        f"altered: rerun its stage") from None
    return hashlib.sha256(text.encode()).hexdigest()


# --- what led to it ----------------------------------------------------------------------------------------

def evidence_digest(
    files: Sequence[Mapping[str, str]], evaluation: Mapping | None, champion: str | None, rules_sha256: str
) -> str:
    """Digest of what a gate judges: metrics and costs (`sha256` of each file), what was scored, against which champion,
    and by which rules."""
    return sha256_of([sorted(file["sha256"] for file in files), evaluation, champion, rules_sha256])


def hashes(
    metric_paths: Iterable[Path | str], lock: Path | None = None, evaluation: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Hashes of data, code, config, environment and the versions of metrics behind these metric files.

    `stages` says for each stage that led to them with which data, code and params it ran, `data`, `code` and
    `config` are over all of them. Where the lock knows none, these are None: such a verdict promotes nothing.
    """
    stages = lineage(read_lock(lock), metric_paths) if lock is not None and Path(lock).exists() else {}
    totals = {kind: sha256_of({name: found[kind] for name, found in stages.items()}) if stages else None
              for kind in KINDS}
    versions = (evaluation or {}).get("metric_versions")
    return {**totals, "stages": stages or None, "environment": environment(), "metric_versions": versions}


def lineage(lock: Mapping[str, Any], paths: Iterable[Path | str]) -> dict[str, dict[str, str]]:
    """{stage: {data, code, config: sha256}} of the stages of dvc.lock that made `paths`, and of all above them."""
    stages = lock.get("stages") or {}
    outs = {name: [out["path"] for out in stage.get("outs", [])] for name, stage in stages.items()}
    pending, found = [Path(path).as_posix() for path in paths], {}
    while pending:
        path = pending.pop()
        makers = [name for name, made in outs.items() if name not in found and any(_meet(path, out) for out in made)]
        for name in makers:
            found[name] = _of_stage(stages[name])
            pending += inputs(stages[name])
    return dict(sorted(found.items()))


def inputs(stage: Mapping[str, Any]) -> list[str]:
    """What a stage of dvc.lock read: its deps, and files of which it took some values as params."""
    return [*(dep["path"] for dep in stage.get("deps", [])), *stage.get("params", {})]


def difference(before: Mapping[str, Mapping] | None, now: Mapping[str, Mapping]) -> str | None:
    """`stage finetune ran with other code`: where two lineages part, in words; None where they are one."""
    for name in sorted({*(before or {}), *now}):
        one, other = (before or {}).get(name), now.get(name)
        if one is None or other is None:
            return f"stage {name} is in one of them alone"
        for kind in KINDS:
            if one.get(kind) != other.get(kind):
                return f"stage {name} ran with other {kind}"
    return None


def read_lock(path: Path) -> dict[str, Any]:
    """dvc.lock, also while other stages write into it: DVC does so in place, so it is read until it keeps still.

    Raises:
        UserError: it stays half written.
    """
    text = None
    for _ in range(ATTEMPTS):
        before, text = text, Path(path).read_text(encoding="utf-8")
        if text == before:
            try:
                return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
            except yaml.YAMLError:
                pass  # half of it, and its writer stopped for a while
        time.sleep(SETTLED_S)
    raise UserError(f"{path}: found no whole yaml in it; expected DVC's record; `git checkout {path}`")


def environment() -> dict[str, str]:
    """Python, platform and packages: those that numbers depend on by version, all of them by one hash."""
    # What an uninstallation left behind has no metadata.
    facts = [found.metadata or {} for found in metadata.distributions()]
    installed = {found["Name"].lower(): found.get("Version") for found in facts if found.get("Name")}
    named = {name: installed[name] for name in NAMED_PACKAGES if name in installed}
    return {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}", **named,
            "packages_sha256": sha256_of(installed)}


def _meet(path: str, out: str) -> bool:
    """Whether one is the other or lies in it."""
    return path == out or path.startswith(f"{out}/") or out.startswith(f"{path}/")


def _of_stage(stage: Mapping[str, Any]) -> dict[str, str]:
    files = [*stage.get("deps", []), *stage.get("outs", [])]
    parts = {"code": [file for file in files if _is_code(file["path"])],
             "data": [file for file in files if not _is_code(file["path"])]}
    contents = {kind: sha256_of({file["path"]: _content(file) for file in found}) for kind, found in parts.items()}
    return {**contents, "config": sha256_of([stage.get("cmd"), stage.get("params")])}


def _is_code(path: str) -> bool:
    return path.endswith(".py") or path.startswith("vlmpipe/")


def _content(file: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in file.items() if key not in ("path", "size", "nfiles", "hash")}
