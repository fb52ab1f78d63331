"""Croissant metadata of a packed dataset (MLCommons Croissant 1.0): what tools other than `datasets` read.

The only importer of mlcroissant, which builds and validates it; nothing is asked of the network.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlmpipe.errors import UserError

FILE = "croissant.json"
PARQUET = "application/x-parquet"


def describe(
    name: str, text: str, licences: Sequence[str], version: str, entries: Sequence[Mapping], schema: pa.Schema,
    meaning: Mapping[str, str],
) -> dict[str, Any]:
    """The JSON-LD of a dataset, validated.

    Args:
        version: of the data, any text. entries: of the manifest: `name` is `<split>/<file>`, `files` name -> sha256.
        schema: the columns; `image` is a struct with the picture's `bytes`. meaning: of each column.

    Raises:
        UserError: mlcroissant finds it invalid.
    """
    import mlcroissant as mlc

    splits = list(dict.fromkeys(entry["name"].partition("/")[0] for entry in entries))
    files = {file: digest for entry in entries for file, digest in sorted(entry["files"].items())}
    distribution = [
        mlc.FileObject(id=file, name=file, content_url=file, encoding_formats=[PARQUET], sha256=digest)
        for file, digest in files.items()
    ]
    distribution += [
        mlc.FileSet(id=f"{split}-files", name=f"{split}-files", includes=[f"{split}/*.parquet"],
                    encoding_formats=[PARQUET])
        for split in splits
    ]
    try:
        return mlc.Metadata(
            name=name, description=text, license=list(licences) or None, version=version, distribution=distribution,
            record_sets=[_records(mlc, split, schema, meaning) for split in splits],
        ).to_json()
    except mlc.ValidationError as error:
        told = " ".join(str(error).split())
        raise UserError(f"{FILE}: found {told}; expected valid Croissant; rename the column that it names") from None


def _records(mlc: Any, split: str, schema: pa.Schema, meaning: Mapping[str, str]) -> Any:
    fields = [
        mlc.Field(
            id=f"{split}/{column.name}", name=column.name, description=meaning[column.name],
            data_types=[mlc.DataType.IMAGE_OBJECT if column.name == "image" else _type(mlc, column.type)],
            source=mlc.Source(
                file_set=f"{split}-files", extract=mlc.Extract(column=column.name),
                transforms=[mlc.Transform(json_path="bytes")] if column.name == "image" else [],
            ),
        )
        for column in schema
    ]
    return mlc.RecordSet(id=split, name=split, description=f"The pairs of the {split} split.", fields=fields)


def _type(mlc: Any, kind: pa.DataType) -> Any:
    if pa.types.is_boolean(kind):
        return mlc.DataType.BOOL
    if pa.types.is_integer(kind):
        return mlc.DataType.INTEGER
    return mlc.DataType.FLOAT if pa.types.is_floating(kind) else mlc.DataType.TEXT


def validate(path: Path) -> dict[str, int]:
    """Read a croissant file with mlcroissant; returns the number of columns of each split.

    Raises:
        UserError: it is not valid; the first error is named.
    """
    import mlcroissant as mlc

    quiet = logging.getLogger("absl")
    level = quiet.level
    # No citation and no date: who publishes adds them. It warns of each.
    quiet.setLevel(logging.ERROR)
    try:
        found = mlc.Dataset(jsonld=str(path)).metadata
    except (mlc.ValidationError, json.JSONDecodeError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{path}: found {told}; expected valid Croissant; rerun `pack`") from None
    finally:
        quiet.setLevel(level)
    return {records.name: len(records.fields) for records in found.record_sets}
