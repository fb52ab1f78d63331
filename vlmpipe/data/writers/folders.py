"""A folder of pictures a class."""

from collections.abc import Iterable
from pathlib import Path

from vlmpipe.data.records import ClassRecord


def write_folders(directory: Path, pictures: Iterable[tuple[ClassRecord, bytes]]) -> None:
    """Records whose image is `<class>/<file>`, with underscores for spaces."""
    for record, data in pictures:
        path = Path(directory) / record.image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
