"""Interleaved documents: texts with pictures between them, in order. Each picture becomes a row of the pool, and what
stood around it is kept in `documents.parquet`, so that training can put the document together from the kept uids.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from vlmpipe.curate.sources.files import root_of
from vlmpipe.curate.sources.flavours import Columns
from vlmpipe.curate.sources.folder import place_of
from vlmpipe.curate.sources.pairs import Pair, as_text
from vlmpipe.curate.urls import json_objects, list_files
from vlmpipe.errors import UserError
from vlmpipe.shards import reaching

FILE = "documents.parquet"
OBELICS = ("images", "texts")
MMC4 = ("image_info", "text_list")
# A part is a text or a picture; `uid` is that of the picture's row, downloaded or not.
SCHEMA = pa.schema({
    "document_id": pa.string(), "url": pa.string(),
    "parts": pa.list_(pa.struct({"text": pa.string(), "image": pa.string(), "uid": pa.string()})),
})
GROUP = 1000  # documents written together


@dataclass
class Document:
    """Parts in order: `{text, image, uid}`, one of text and image null. `captions`: of the pictures, by position."""

    document_id: str
    url: str | None
    parts: list[dict[str, str | None]]
    captions: dict[int, str]


def pairs(urls: str, columns: Columns, max_bytes: int, layouts: "Layouts") -> Iterator[Pair]:
    """The pictures of all documents with the text nearest to each; the documents themselves go to `layouts`.

    A picture is an address, or a file beside the documents.

    Raises:
        UserError: a file is damaged, or holds no documents of a known form.
    """
    seen: dict[str, int] = {}
    for file in list_files(urls):
        for where, row in _rows(file):
            document = _document(row, where, seen)
            layouts.begin(document)
            for position, caption in document.captions.items():
                yield _pair(document, position, caption, row, columns, (urls, file, max_bytes))


def _pair(document: Document, position: int, caption: str, row: dict, columns: Columns, lies: tuple) -> Pair:
    urls, file, max_bytes = lies
    address = str(document.parts[position]["image"])
    extra = {"document_id": document.document_id, "position": position}
    extra |= {name: row.get(name) for name in columns.extra}
    if "://" in address or "://" in urls:
        return Pair(address, caption, extra)
    name = os.path.relpath(Path(file.removeprefix("file://")).parent / address, root_of(urls))
    return Pair(address, caption, extra, place=place_of(Path(root_of(urls)), name, max_bytes))


def _rows(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with reaching(file):
        try:
            if file.endswith(".parquet"):
                with fsspec.open(file, "rb") as stream:
                    number = 0
                    for batch in pq.ParquetFile(stream).iter_batches(batch_size=256):
                        for row in batch.to_pylist():
                            yield f"{file}, row {number}", row
                            number += 1
            else:
                yield from ((f"{file}, line {number}", row) for number, row in json_objects(file))
        except (json.JSONDecodeError, UnicodeDecodeError, pa.ArrowInvalid, EOFError, RecursionError) as error:
            raise UserError(f"{file}: found damaged documents ({str(error).splitlines()[0]}); expected json lines or "
                            f"parquet; mend it") from None


# --- one document ------------------------------------------------------------------------------------------

def _document(row: dict[str, Any], where: str, seen: dict[str, int]) -> Document:
    if all(isinstance(row.get(name), list) for name in OBELICS):
        parts, captions = _obelics(row["images"], row["texts"])
    elif all(isinstance(row.get(name), list) for name in MMC4):
        parts, captions = _mmc4(row["image_info"], row["text_list"], where)
    else:
        raise UserError(f"{where}: found columns {', '.join(row)}; expected documents as OBELICS has them (lists "
                        f"images and texts) or MMC4 (lists image_info and text_list)")
    own = hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode(errors="replace")).hexdigest()[:32]
    seen[own] = seen.get(own, -1) + 1
    document_id = own if not seen[own] else hashlib.sha256(f"{own}{seen[own]}".encode()).hexdigest()[:32]
    return Document(document_id, _url(row), parts, captions)


def _url(row: dict[str, Any]) -> str | None:
    url = row.get("url")
    if url is None and isinstance(row.get("general_metadata"), str):  # where OBELICS has it
        try:
            url = json.loads(row["general_metadata"]).get("url")
        except (ValueError, AttributeError):
            url = None
    return None if url is None else as_text(url)


def _part(text: Any = None, image: Any = None) -> dict[str, str | None]:
    kept = {"text": text, "image": image, "uid": None}
    return {name: None if value is None else as_text(value) for name, value in kept.items()}


def _obelics(images: list, texts: list) -> tuple[list[dict[str, str | None]], dict[int, str]]:
    """`images[i]` or `texts[i]` is null. Source: the card of HuggingFaceM4/OBELICS."""
    parts = []
    for image, text in zip_longest(images, texts):
        parts += [_part(image=image)] if image else []
        parts += [_part(text=text)] if text else []
    return parts, {i: _nearest(parts, i) for i, part in enumerate(parts) if part["image"]}


def _nearest(parts: list[dict[str, str | None]], position: int) -> str:
    """The paragraph nearest to a picture; of two as near, the one below it, where captions stand."""
    for distance in range(1, len(parts)):
        for place, end in ((position + distance, 0), (position - distance, -1)):
            if 0 <= place < len(parts) and (text := (parts[place]["text"] or "").strip()):
                return text.split("\n\n")[end].strip()
    return ""


def _mmc4(infos: list, texts: list, where: str) -> tuple[list[dict[str, str | None]], dict[int, str]]:
    """A picture stands before the sentence that it was matched with. Source: github.com/allenai/mmc4."""
    try:
        matched = sorted(((info["matched_text_index"], info["raw_url"]) for info in infos), key=lambda pair: pair[0])
        parts, captions = [], {}
        for index, text in enumerate(texts):
            while matched and matched[0][0] <= index:
                captions[len(parts)] = as_text(text)
                parts.append(_part(image=matched.pop(0)[1]))
            parts.append(_part(text=text))
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: found image_info without {error}; expected raw_url and matched_text_index") from None
    if matched:
        raise UserError(f"{where}: found matched_text_index {matched[0][0]}; expected one of {len(texts)} texts")
    return parts, captions


# --- the layout beside the shards --------------------------------------------------------------------------

class Layouts:
    """Writes documents.parquet while rows go by: a document is whole when the next one begins."""

    def __init__(self, path: Path):
        self.writer, self.current = pq.ParquetWriter(path, SCHEMA, compression="zstd"), None
        self.ready: list[dict[str, Any]] = []

    def begin(self, document: Document) -> None:
        self._end()
        self.current = document

    def fill(self, row: dict[str, Any]) -> None:
        """Note the uid of a picture's row."""
        self.current.parts[row["position"]]["uid"] = row["uid"]

    def _end(self) -> None:
        if self.current is not None:
            document = self.current
            self.ready.append({"document_id": document.document_id, "url": document.url, "parts": document.parts})
            self.current = None
        if len(self.ready) >= GROUP:
            self._flush()

    def _flush(self) -> None:
        if self.ready:
            self.writer.write_table(pa.Table.from_pylist(self.ready, SCHEMA))
        self.ready = []

    def close(self) -> None:
        self._end()
        self._flush()
        self.writer.close()


@contextmanager
def laid_out(path: Path) -> Iterator[Layouts]:
    """Layouts that are written to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    layouts = Layouts(partial)
    try:
        yield layouts
        layouts.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_documents(pool: Path, kept: Collection[str]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Documents of a pool in order, with the pictures in `kept`: (document_id, [("text", words) or ("image", uid)])."""
    for batch in pq.ParquetFile(Path(pool) / FILE).iter_batches():
        for row in batch.to_pylist():
            parts = [("text", part["text"]) if part["text"] is not None else ("image", part["uid"])
                     for part in row["parts"] if part["text"] is not None or part["uid"] in kept]
            yield row["document_id"], parts
