"""Which group each picture of a split belongs to: a table beside the annotations, such as FairFace's own.

Format: csv with a header; `file` or `image` names the picture, every other column is a grouping. It is `groups.csv`, or
`fairface_label_*.csv` as https://github.com/joojs/fairface publishes it.
"""

import csv
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from vlmpipe.errors import UserError

FILES = ("groups.csv", "fairface_label_*.csv")
NAMES = ("file", "image")
Groups = dict[str, dict[str, str]]  # picture -> column -> group


def read_groups(split: Path) -> Groups:
    """The groups by picture, in the order of the file; an empty field is no group. Nothing where there is no file.

    Raises:
        UserError: two files, a missing column, a line that is too short, or a picture that stands twice.
    """
    files = [file for pattern in FILES for file in sorted(Path(split).glob(pattern))]
    if not files:
        return {}
    if len(files) > 1:
        raise UserError(f"{split}: found {len(files)} tables of groups, such as {files[1].name}; expected one")
    with open(files[0], newline="", encoding="utf-8-sig") as lines:
        table = csv.DictReader(lines)
        name = next((name for name in NAMES if name in (table.fieldnames or ())), None)
        if name is None or len(table.fieldnames) < 2:
            raise UserError(f"{files[0]}: found the columns {table.fieldnames}; expected 'file' or 'image', and groups")
        found: Groups = {}
        for row in table:
            if None in row or None in row.values() or not row[name] or row[name] in found:
                raise UserError(f"{files[0]}: line {table.line_num}: found {list(row.values())}; expected a picture "
                                f"that stands once and {len(table.fieldnames) - 1} groups; mend the file")
            found[row[name]] = {column: group for column, group in row.items() if column != name and group}
    return found


def write_groups(split: Path, groups: Groups) -> None:
    """Write `groups.csv`; every picture has the same columns."""
    columns = list(next(iter(groups.values())))
    with open(Path(split) / "groups.csv", "w", newline="", encoding="utf-8") as lines:
        table = csv.writer(lines, lineterminator="\n")
        table.writerow(["file", *columns])
        table.writerows([name, *(own[column] for column in columns)] for name, own in groups.items())


def groups_of(picture: str, groups: Mapping[str, dict[str, str]]) -> dict[str, str]:
    """Those of a picture, named as in the table or by its file name alone; nothing where it isn't there."""
    found = groups.get(picture)
    return found if found is not None else groups.get(PurePosixPath(picture).name, {})
