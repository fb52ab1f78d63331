"""The explorer: every pair with every number that any stage wrote about it, in a page that opens from disk.

The page holds the columns (gzip in base64: a page on disk may not fetch) and one script; pictures lie beside it in
sheets that load as they come into view. What the page shows of a large pool is drawn by `explorer_sample`.
"""

import base64
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader

from vlmpipe.curate.groups import Words, believed, mentions
from vlmpipe.curate.regions import hosts, regions
from vlmpipe.errors import UserError
from vlmpipe.report.explorer_columns import (
    Shown,
    describe,
    flatten,
    pack,
    read_columns,
    shards_of,
    step_of,
    thresholds,
)
from vlmpipe.report.explorer_sample import Sample, draw
from vlmpipe.report.explorer_tiles import draw_sheets
from vlmpipe.shards import read_json, write_bytes_atomic

Lexicons = Mapping[str, Mapping[str, Words]]
PAGE, PICTURES = "explorer.html", "explorer"


@dataclass(frozen=True)
class ExplorerConfig:
    """samples: rows shown, some of every reason (0: no explorer); the twins of duplicates come on top. tile: pixels
    of a picture's long side. quality: of the pictures' JPEG. shards: common reasons are drawn from so many random
    shards.
    """

    samples: int = 20_000
    tile: int = 96
    quality: int = 80
    shards: int = 64

    def __post_init__(self):
        if self.samples < 0 or self.shards < 1:
            raise UserError(f"found samples {self.samples}, shards {self.shards}; expected samples from 0, shards "
                            f"from 1")
        if self.tile % 16 or not 32 <= self.tile <= 240:
            raise UserError(f"found tile {self.tile}; expected a multiple of 16 from 32 to 240")
        if not 1 <= self.quality <= 95:
            raise UserError(f"found quality {self.quality}; expected 1 to 95")


def explorer(
    root: Path, pools: list[Path], out: Path, config: ExplorerConfig, title: str, lexicons: Lexicons, seed: int = 0
) -> bool:
    """Write `out`/explorer.html and its pictures; False where there is no selection yet, or it is switched off.

    Args:
        lexicons: grouping -> group -> words, as in the audit: each grouping becomes a column.

    Raises:
        UserError: what earlier stages left is damaged, or does not fit together.
    """
    decisions, funnel = root / "selection" / "decisions.parquet", root / "selection" / "funnel.json"
    shutil.rmtree(out / PICTURES, ignore_errors=True)
    (out / PAGE).unlink(missing_ok=True)
    if not config.samples or not pools or not decisions.exists() or not funnel.exists():
        return False
    sample = draw(decisions, pools, config.samples, config.shards, seed)
    shown = read_columns(sample, root / "pools", root / "annotations")
    _add_made(shown, root, lexicons)
    tiles = _tiles(sample, shown, root / "pools", out, config)
    data = _packed(sample, shown, read_json(funnel), tiles, config, title, root.name)
    write_bytes_atomic(out / PAGE, _page(data, title, root.name).encode())
    return True


# --- columns made here -------------------------------------------------------------------------------------

def _add_made(shown: Shown, root: Path, lexicons: Lexicons) -> None:
    """Columns that no stage wrote: what rules compute from two others, planted faults, groups by captions."""
    columns = {name: values for name, (_, values) in shown.columns.items()}
    if {"original_width", "original_height"} <= columns.keys():
        width, height = columns["original_width"], columns["original_height"]
        longer, shorter = pc.max_element_wise(width, height), pc.min_element_wise(width, height)
        aspect = pc.divide(longer.cast(pa.float32()), shorter.cast(pa.float32()))
        shown.add("explorer", "original_shorter_side", shorter)
        shown.add("explorer", "original_aspect", aspect)
    plans = sorted(root.glob("world/*/planted.parquet"))
    if plans:
        shown.add("explorer", "planted_fault", _planted(plans[0], columns["url"], columns["caption"]))
    languages = columns.get("language")
    sure = None if languages is None else believed(languages, columns.get("language_score"))
    for grouping, groups in lexicons.items():
        shown.add("explorer", grouping, _groups(columns["caption"], groups, sure), f"{grouping}_group")
    shown.add("explorer", "url_region", regions(columns["url"]))
    shown.add("explorer", "url_host", hosts(columns["url"]))


def _planted(plan: Path, urls: pa.Array, captions: pa.Array) -> pa.Array:
    planned = pq.read_table(plan, columns=["url", "caption", "fault"])
    faults = dict(zip(zip(planned["url"].to_pylist(), planned["caption"].to_pylist()), planned["fault"].to_pylist()))
    return pa.array([faults.get(pair) for pair in zip(urls.to_pylist(), captions.to_pylist())], pa.string())


def _groups(captions: pa.Array, groups: Mapping[str, Words], languages: pa.Array | None) -> pa.Array:
    """The groups that each caption mentions, joined; null where it mentions none."""
    names: list[list[str]] = [[] for _ in captions]
    for group, places in mentions(captions, groups, languages).items():
        for place in places:
            names[place].append(group)
    return pa.array([" + ".join(found) or None for found in names], pa.string())


# --- pictures ----------------------------------------------------------------------------------------------

def _tiles(sample: Sample, shown: Shown, pools: Path, out: Path, config: ExplorerConfig) -> dict[str, np.ndarray]:
    """Draw the sheets: `tile` [S], the number of each row's picture or -1, and its width and height on the sheet."""
    has = pc.fill_null(pc.equal(shown.columns["status"][1], "downloaded"), False).to_numpy(zero_copy_only=False)
    number = np.where(has, np.cumsum(has) - 1, -1)
    uids = sample.rows["uid"].to_pylist()
    wanted = (
        (pools / pool, shard, {uids[place]: int(number[place]) for place in places if has[place]})
        for pool, shard, places in shards_of(sample)
    )
    count = int(has.sum())
    sizes = draw_sheets(out / PICTURES, wanted, count, config.tile,
                        config.quality)
    size = np.zeros((len(has), 2), np.uint8)
    size[has] = sizes
    number[size[:, 0] == 0] = -1
    return {"tile": number.astype(np.int32), "tile_width": size[:, 0], "tile_height": size[:, 1]}


# --- the page ----------------------------------------------------------------------------------------------

def _packed(
    sample: Sample, shown: Shown, funnel: dict, tiles: dict[str, np.ndarray], config: ExplorerConfig, title: str,
    profile: str,
) -> bytes:
    steps = funnel["steps"]
    columns, arrays = [], {f"#{name}": values for name, values in tiles.items()}
    for name, (source, values) in shown.columns.items():
        if values.null_count < len(values):
            facts, array = describe(name, source, values)
            columns.append(facts)
            arrays |= {} if array is None else {name: array}
    maps = []
    for name, embedding in shown.embeddings.items():
        if flat := flatten(embedding):
            arrays[f"#map {name}"] = flat[0]
            maps.append({"name": name, "shares": flat[1], "width": embedding.shape[1]})
    twin = pc.index_in(sample.rows["other_uid"], value_set=sample.rows["uid"].combine_chunks())
    arrays["#twin"] = pc.fill_null(twin, -1).to_numpy().astype(np.int32)
    arrays["#weight"] = sample.weight.astype(np.float32)
    reasons = {name: {"rows": count, "step": step_of(name, steps)} for name, count in sample.counts.items()}
    header: dict[str, Any] = {
        "title": title, "profile": profile, "rows": sum(sample.counts.values()), "shown": len(sample.position),
        "columns": columns, "maps": maps, "reasons": reasons, "thresholds": thresholds(shown, steps),
        "steps": [{key: step.get(key) for key in ("reason", "rows_out", "dropped", "unique")} |
                  {"config": {key: value for key, value in (step.get("config") or {}).items() if value is not None}}
                  for step in steps],
        "pictures": PICTURES, "tile_side": config.tile,
    }
    return pack(header, arrays)


def _page(data: bytes, title: str, profile: str) -> str:
    environment = Environment(loader=PackageLoader("vlmpipe.report"), autoescape=True)
    parts = {"js": ("explorer.js", "explorer_map.js", "explorer_views.js"), "css": ("explorer.css",)}
    sources = {kind: "".join(environment.loader.get_source(environment, name)[0] for name in names)
               for kind, names in parts.items()}
    hashes = {name: base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
              for name, source in sources.items()}
    return environment.get_template("explorer.html.j2").render(
        title=title, profile=profile, hashes=hashes, data=base64.b64encode(data).decode(), **sources
    )
