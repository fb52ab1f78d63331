"""What a shard has so far: an append-only file of finished rows that survives a killed process."""

import fcntl
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

HEADER = struct.Struct(">4sIII")  # magic, bytes of facts, bytes of image, crc32 of both
MAGIC = b"row1"


class Spool:
    """Finished rows by uid: facts (a json mapping) and the stored image. Locked while open, so it has one writer.

    Opening drops a half-written last record. One `write` call per record: what a killed process wrote stays.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._file, fcntl.LOCK_EX)  # a worker that outlived its killed parent may still write
        self._facts: dict[str, dict] = {}
        self._images: dict[str, tuple[int, int]] = {}
        os.lseek(self._file, self._load(), os.SEEK_SET)

    def _load(self) -> int:
        size, offset = os.fstat(self._file).st_size, 0
        while offset + HEADER.size <= size:
            magic, head, body, crc = HEADER.unpack(os.pread(self._file, HEADER.size, offset))
            data = os.pread(self._file, head + body, offset + HEADER.size)
            if magic != MAGIC or len(data) < head + body or zlib.crc32(data) != crc:
                break
            self._remember(json.loads(data[:head]), offset + HEADER.size + head, body)
            offset += HEADER.size + head + body
        os.ftruncate(self._file, offset)
        return offset

    def _remember(self, facts: dict, offset: int, length: int) -> None:
        self._facts[facts["uid"]] = facts
        self._images[facts["uid"]] = (offset, length)

    def __contains__(self, uid: str) -> bool:
        return uid in self._facts

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def append(self, facts: dict, image: bytes | None = None) -> None:
        """Add a finished row. `facts` holds its `uid`."""
        head, body = json.dumps(facts, ensure_ascii=False).encode(), image or b""
        start = os.lseek(self._file, 0, os.SEEK_CUR)
        record = HEADER.pack(MAGIC, len(head), len(body), zlib.crc32(head + body)) + head + body
        view = memoryview(record)
        try:
            while view:
                view = view[os.write(self._file, view):]
        except OSError:
            os.ftruncate(self._file, start)  # a full disk: leave whole records only
            os.lseek(self._file, start, os.SEEK_SET)
            raise
        self._remember(facts, start + HEADER.size + len(head), len(body))

    def uids(self) -> list[str]:
        return list(self._facts)

    def facts(self, uid: str) -> dict:
        return self._facts[uid]

    def image(self, uid: str) -> bytes:
        offset, length = self._images[uid]
        return os.pread(self._file, length, offset)
