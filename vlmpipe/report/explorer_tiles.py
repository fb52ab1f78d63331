"""Small pictures in sheets of many, so that a page of thousands loads tens of files, and only those it shows."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from vlmpipe.images import NotAnImage, opened, to_rgb
from vlmpipe.report.pictures import jpeg_bytes
from vlmpipe.shards import iter_images, read_manifest, write_bytes_atomic

ACROSS, DOWN = 16, 16  # tiles of a sheet


class Sheets:
    """Sheets of tiles, written as soon as all of their pictures have come.

    Picture k of `count` stands on sheet k // 256, row by row, in the upper left of its tile. A tile is a multiple of
    16 pixels wide, the largest block of a jpeg: no picture bleeds into its neighbour.
    """

    def __init__(self, directory: Path, count: int, tile: int, quality: int):
        self._directory, self._tile, self._quality = directory, tile, quality
        self._missing = np.bincount(np.arange(count) // (ACROSS * DOWN))
        self._open: dict[int, Image.Image] = {}
        self.sizes = np.zeros((count, 2), np.uint8)  # width and height of each; 0: not a picture

    def put(self, k: int, data: bytes | None) -> None:
        """Draw picture k; each is put once, None where there is none."""
        sheet, place = divmod(k, ACROSS * DOWN)
        small = None if data is None else self._small(data)
        if small is not None:
            if sheet not in self._open:
                self._open[sheet] = self._blank(sheet)
            self._open[sheet].paste(small, (place % ACROSS * self._tile, place // ACROSS * self._tile))
            self.sizes[k] = small.size
        self._missing[sheet] -= 1
        if not self._missing[sheet]:
            self._write(sheet)

    def _small(self, data: bytes) -> Image.Image | None:
        try:
            with opened(data) as whole:
                whole.draft(None, (self._tile, self._tile))  # a jpeg is then decoded no larger than needed
                image = to_rgb(whole)
        except NotAnImage:  # the selection's decisions say so
            return None
        image.thumbnail((self._tile, self._tile), Image.Resampling.BICUBIC)
        return image

    def _blank(self, sheet: int) -> Image.Image:
        rows = -(-min(len(self.sizes) - sheet * ACROSS * DOWN, ACROSS * DOWN) // ACROSS)
        return Image.new("RGB", (ACROSS * self._tile, rows * self._tile), (128, 128, 128))

    def _write(self, sheet: int) -> None:
        canvas = self._open.pop(sheet, None)
        if canvas is not None:
            write_bytes_atomic(self._directory / f"{sheet:04d}.jpg", jpeg_bytes(canvas, self._quality))


def draw_sheets(
    directory: Path, wanted: Iterable[tuple[Path, str, dict[str, int]]], count: int, tile: int, quality: int
) -> np.ndarray:
    """Write the sheets of `count` pictures; returns their sizes uint8 [count, 2], 0 where there is none.

    `wanted`: pool directory, shard, and the number of each picture there by uid.
    """
    sheets = Sheets(directory, count, tile, quality)
    for pool, shard, numbers in wanted:
        left = dict(numbers)
        for uid, data in iter_images(pool, shard) if left and _has_pictures(pool, shard) else ():
            if uid in left:
                sheets.put(left.pop(uid), data)
        for number in left.values():
            sheets.put(number, None)
    return sheets.sizes


def _has_pictures(pool: Path, shard: str) -> bool:
    """Not so of a pool that is another's metadata."""
    return any(f"{shard}.tar" in entry["files"] for entry in read_manifest(pool)["shards"] if entry["name"] == shard)
