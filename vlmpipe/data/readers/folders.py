"""A folder of pictures a class, as ImageNet and its many followers are laid out: <class>/<picture>."""

from pathlib import Path, PurePosixPath

from vlmpipe.data.pictures import pictures
from vlmpipe.data.records import ClassRecord
from vlmpipe.errors import UserError


def read_folders(directory: Path) -> list[ClassRecord]:
    """One record a picture; its class is the folder it lies in, with spaces for underscores.

    Raises:
        UserError: no pictures, or one that lies in no class's folder.
    """
    names = list(pictures(directory))
    loose = [name for name in names if "/" not in name]
    if loose:
        raise UserError(f"{directory}: found picture {loose[0]} outside of the classes' folders; expected "
                        f"<class>/<file>; move it")
    return [ClassRecord(name, name, PurePosixPath(name).parent.name.replace("_", " ")) for name in names]
