"""The files of a source below its root, local or at any fsspec address: patterns become names, names are opened."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

import fsspec
from braceexpand import UnbalancedBracesError, braceexpand

from vlmpipe.errors import UserError
from vlmpipe.shards import is_there, reaching

GLOB = "*?["
SUFFIXES = (".tar", ".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz")


def root_of(urls: str) -> str:
    """What a row's place is relative to: the folder `urls`, or the one that the file `urls` lies in."""
    address = urls.rstrip("/") if "://" in urls else str(Path(urls).absolute())
    return address.rpartition("/")[0] or "/" if address.endswith(SUFFIXES) else address


def root_and_files(urls: str, patterns: Sequence[str], suffixes: Sequence[str]) -> tuple[str, list[str]]:
    """The root of a source and its files below it, in the order of patterns and names.

    `urls` is a folder, or a file (or brace pattern of files) with one of `suffixes`. Without `patterns`, a folder
    stands for all its files with one of `suffixes`.

    Raises:
        UserError: a pattern that leads out of the root or matches nothing; a file that is not there; no files.
    """
    root, rest = root_of(urls), list(patterns)
    if not rest and urls.endswith(tuple(suffixes)):
        rest = [urls.rpartition("/")[2]]
    if not is_there(root):
        raise UserError(f"found no {root}; expected a folder with files of {', '.join(suffixes)}; set `urls`")
    names = [name for pattern in rest or [f"**/*{suffix}" for suffix in suffixes] for name in _match(root, pattern)]
    if not rest:
        names.sort()
    if not names:
        raise UserError(f"{root}: found no file of {', '.join(suffixes)}; expected at least one; set source.files")
    return root, list(dict.fromkeys(names))


def _match(root: str, pattern: str) -> Iterator[str]:
    if pattern.startswith("/") or ".." in PurePosixPath(pattern).parts or "://" in pattern:
        raise UserError(f"found source.files pattern '{pattern}'; expected one below {root}; set `urls` to its folder")
    try:
        for name in braceexpand(pattern):
            yield from _glob(root, name, pattern)
    except UnbalancedBracesError:
        raise UserError(f"found pattern '{pattern}'; expected braces in pairs such as {{00000..00010}}.tar") from None


def _glob(root: str, name: str, pattern: str) -> Iterator[str]:
    if not any(sign in name for sign in GLOB):
        if not is_there(f"{root}/{name}"):
            raise UserError(f"found no file {root}/{name}; expected every file of the pattern '{pattern}'")
        yield name
        return
    with reaching(root):
        filesystem, path = fsspec.core.url_to_fs(root)
        for found in sorted(filesystem.glob(f"{path.rstrip('/')}/{name}")):
            if filesystem.isfile(found):
                yield found[len(path.rstrip("/")) + 1:]


@contextmanager
def opened(root: str, name: str) -> Iterator[IO[bytes]]:
    """A file below the root, for reading at any place. Its name is only a name: fsspec would see `*` and `::` in it."""
    address = f"{root}/{name}"
    with reaching(address):
        filesystem, path = fsspec.core.url_to_fs(root)
        with filesystem.open(f"{path.rstrip('/')}/{name}", "rb") as file:
            yield file
