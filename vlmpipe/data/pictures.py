"""The pictures of a dataset by name: a folder of files, or a shard directory.

A name is looked up in the list of what is there and never made into a path, so none leads anywhere else.
"""

import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from vlmpipe import shards
from vlmpipe.errors import UserError

KIND = "images"
Place = tuple[Path, int, int]  # file, offset and length of the encoded bytes


class Pictures(Mapping):
    """Name -> encoded bytes, read when asked for: there may be a hundred thousand.

    Iteration and length go by picture; each may be asked for by several names.
    """

    def __init__(self, places: Mapping[str, Place], aliases: Mapping[str, str], where: Path):
        self._places, self._aliases, self._where = places, aliases, where

    def __getitem__(self, name: int | str) -> bytes:
        path, start, size = self._place(str(name))
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)

    def _place(self, name: str) -> Place:
        place = self._places.get(name) or self._places.get(self._aliases.get(name, ""))
        if place is None:
            raise UserError(f"{self._where}: found no picture for {name!r}; expected one of {len(self)} there; "
                            f"check that the pictures belong to the annotations")
        return place

    def only(self, names: Iterable[str]) -> "Pictures":
        """Those of these names, by them.

        Raises:
            UserError: there is no such picture.
        """
        return Pictures({name: self._place(name) for name in names}, {}, self._where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return str(name) in self._places or str(name) in self._aliases


def pictures(directory: Path) -> Pictures:
    """The pictures below a directory.

    In a folder a picture goes by its path below the folder and, where only one has it, by its file name, the name
    without suffix and the number at the end of that: COCO_val2014_000000262148.jpg is picture 262148. In a shard
    directory it goes by its uid and by its file name.

    Raises:
        UserError: there is no such folder, it holds no picture, or a shard is damaged.
    """
    where = Path(directory)
    if not where.is_dir():
        raise UserError(f"found no folder {where}; expected the pictures of a dataset; put or link them there")
    found = _sharded(where) if (where / shards.MANIFEST).exists() else _folder(where)
    if not len(found):
        raise UserError(f"{where}: found no pictures; expected {', '.join(shards.IMAGE_SUFFIXES)}; fill the folder")
    return found


def _sharded(where: Path) -> Pictures:
    places: dict[str, Place] = {}
    aliases: dict[str, str] = {}
    for shard in shards.read_manifest(where)["shards"]:
        path = where / f"{shard['name']}.tar"
        if not path.exists() or shards.sha256_file(path) != shard["files"][path.name]:
            raise shards.corrupt(path, "its bytes are not the ones the manifest lists")
        with tarfile.open(path) as tar:
            for member in tar:
                stem, _, suffix = member.name.rpartition(".")
                if f".{suffix}" in shards.IMAGE_SUFFIXES:
                    places[stem] = path, member.offset_data, member.size
                    aliases[member.name] = stem
    return Pictures(places, aliases, where)


def _folder(where: Path) -> Pictures:
    files = [path for path in sorted(where.rglob("*")) if path.suffix.lower() in shards.IMAGE_SUFFIXES]
    places = {path.relative_to(where).as_posix(): (path, 0, path.stat().st_size) for path in files if path.is_file()}
    aliases: dict[str, str | None] = {}
    for name in places:
        for alias in _short_names(name):
            aliases[alias] = None if alias in aliases else name  # of two pictures with a name, neither goes by it
    return Pictures(places, {alias: name for alias, name in aliases.items() if name is not None}, where)


def _short_names(name: str) -> set[str]:
    path = Path(name)
    number = re.search(r"0*(\d+)$", path.stem)
    return {path.name, path.stem, *([number.group(1)] if number else [])} - {name}


def write_pictures(directory: Path, named: Iterable[tuple[str, bytes]]) -> None:
    """Write (file name, encoded bytes) as a shard directory."""
    named = list(named)
    stems = [name.rpartition(".")[0] for name, _ in named]
    table = pa.table({"uid": pa.array(stems, pa.string()), "bytes": [len(data) for _, data in named]})
    entry = shards.write_shard(directory, "00000", table, named)
    shards.write_manifest(directory, KIND, [entry])
