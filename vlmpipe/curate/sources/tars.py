"""WebDataset tars: the members with the same name up to its first dot are one sample, a picture and its caption.

A tar is untrusted: nothing is unpacked, so a member's name never becomes a path; what is no plain file is refused;
sizes are bounded before reading.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import IO, Any

from vlmpipe.curate.sources.files import opened
from vlmpipe.curate.sources.flavours import CAPTIONS, Columns
from vlmpipe.curate.sources.folder import MAX_CAPTION, BadCaption, caption_in, json_object
from vlmpipe.curate.sources.pairs import Pair, Place, as_text, refused
from vlmpipe.errors import UserError

PICTURES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "caption", "text")
MAX_HEADER = 1 << 20  # bytes of a member's extended header: tarfile reads it whole into memory
MAX_MEMBERS = 100


def pairs(root: str, names: Sequence[str], columns: Columns, image: str | None, max_bytes: int) -> Iterator[Pair]:
    """The pairs of tars, in their order.

    Raises:
        UserError: a tar is damaged, cut off or compressed.
    """
    for name in names:
        with opened(root, name) as file:
            for key, group in groupby(_members(file, f"{root}/{name}"), key=_key):
                members = list(islice(group, MAX_MEMBERS + 1))
                if len(members) > MAX_MEMBERS:
                    raise UserError(f"corrupt tar {root}/{name}: found more than {MAX_MEMBERS} files of sample "
                                    f"'{as_text(key)[:80]}'; expected a picture and its texts; leave the tar out")
                yield from _Sample(file, name, key, members).pairs(columns, image, max_bytes)


class _Bounded:
    """A tar's file as tarfile reads it for headers: a header that wants much memory is a damaged one."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)


def _members(file: IO[bytes], where: str) -> Iterator[tarfile.TarInfo]:
    try:
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        with tarfile.open(fileobj=_Bounded(file), mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.isreg() and not member.issparse() and not 0 <= member.size <= length - member.offset_data:
                    raise tarfile.ReadError(f"'{as_text(member.name)[:80]}' is cut off")
                tar.members = []  # tarfile remembers all of them
                yield member
            _check_end(file, tar.offset)
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"corrupt tar {where}: {why}; expected a plain, whole tar; get it again, or leave it out "
                        f"with source.files") from None


def _check_end(file: IO[bytes], offset: int) -> None:
    """tarfile takes a damaged or missing header for the end of the tar, and says nothing."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it is cut off before its end mark")
    if any(block):
        raise tarfile.ReadError(f"a damaged header at byte {offset}")


def _key(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _suffix(member: tarfile.TarInfo) -> str:
    return member.name.rpartition("/")[2].partition(".")[2].lower()


class _Sample:
    """The members of one key."""

    def __init__(self, file: IO[bytes], tar: str, key: str, members: list[tarfile.TarInfo]):
        self.file, self.tar, self.key, self.members = file, tar, key, members

    def pairs(self, columns: Columns, image: str | None, max_bytes: int) -> Iterator[Pair]:
        """A pair of each picture: the only one, or the one that ends with `image`."""
        pictures = [member for member in self.members if _suffix(member) in ((image,) if image else PICTURES)]
        for member in pictures:
            place, caption, extra = None, "", dict.fromkeys(columns.extra)
            if len(pictures) > 1:
                place = refused("several_pictures", "more than one picture in a sample; choose one with source.image")
            try:
                caption, extra, url = self._caption(columns)
            except BadCaption as error:
                url, place = None, place or refused("bad_caption", str(error))
            place = place or self._place(member, max_bytes)
            yield Pair(url or as_text(f"{self.tar}/{member.name}"), caption, extra, place=place)

    def _place(self, member: tarfile.TarInfo, max_bytes: int) -> Place:
        if not member.isreg() or member.issparse():
            return refused("not_a_file", "a link, a device or a sparse file in the tar")
        parts = member.name.split("/")
        if member.name.startswith("/") or ".." in parts or "\0" in member.name:
            return refused("unsafe_name", "its name leads out of the tar")
        if member.size > max_bytes:
            return refused("too_large", f"{member.size} bytes; at most {max_bytes}")
        digest = hashlib.sha256(self._bytes(member)).hexdigest()
        return Place(self.tar, offset=member.offset_data, size=member.size, sha256=digest)

    def _caption(self, columns: Columns) -> tuple[str, dict[str, Any], str | None]:
        """(caption, extra columns, url): the text file's words before those of the json, which has the rest."""
        by_suffix = {_suffix(member): member for member in self.members}
        extra, caption, url = dict.fromkeys(columns.extra), None, None
        if "json" in by_suffix:
            data = self._text(by_suffix["json"])
            facts = json_object(data.decode("utf-8-sig", errors="replace"))
            extra = {name: facts.get(name) for name in columns.extra}
            url = as_text(facts.get(columns.url or "url")) or None
            if any(facts.get(name) is not None for name in ((columns.caption,) if columns.caption else CAPTIONS)):
                caption, _ = caption_in(".json", data, columns)
        text = next((by_suffix[suffix] for suffix in TEXTS if suffix in by_suffix), None)
        if text is not None and not (columns.caption and caption is not None):
            caption, _ = caption_in(".txt", self._text(text), columns)
        if caption is None:
            raise BadCaption("no .txt, .caption or .json with a caption in the sample")
        return caption, extra, url

    def _text(self, member: tarfile.TarInfo) -> bytes:
        if not member.isreg() or member.issparse():
            raise BadCaption("a link, a device or a sparse file in the tar")
        if member.size > MAX_CAPTION:
            raise BadCaption(f"more than {MAX_CAPTION} bytes")
        return self._bytes(member)

    def _bytes(self, member: tarfile.TarInfo) -> bytes:
        self.file.seek(member.offset_data)
        return self.file.read(member.size)
