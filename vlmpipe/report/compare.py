"""What two selections keep differently: counts by what reasons turned into, and a page with pictures of both sides."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader

from vlmpipe.curate.filters import DECISIONS, KIND
from vlmpipe.report.pictures import thumbnails
from vlmpipe.shards import MANIFEST, read_manifest, read_rows, write_bytes_atomic

KEPT, ABSENT = "kept", "not in this pool"


@dataclass(frozen=True)
class Comparison:
    """Two selections side by side: `rows` has uid, pool and each side's outcome (`kept`, a reason, or not there)."""

    rows: pa.Table

    @property
    def counts(self) -> dict[str, int]:
        a, b = (pc.equal(self.rows[side], KEPT).to_numpy() for side in ("a", "b"))
        return {"both": int((a & b).sum()), "only_a": int((a & ~b).sum()), "only_b": int((b & ~a).sum()),
                "neither": int((~a & ~b).sum())}

    @property
    def transitions(self) -> list[tuple[str, str, int]]:
        """(outcome in A, outcome in B, rows) wherever one side keeps and the other does not, the most first."""
        changed = self.changed
        pairs = Counter(zip(changed["a"].to_pylist(), changed["b"].to_pylist()))
        return sorted(((a, b, count) for (a, b), count in pairs.items()), key=lambda row: (-row[2], row[:2]))

    @property
    def changed(self) -> pa.Table:
        return self.rows.filter(pc.xor(pc.equal(self.rows["a"], KEPT), pc.equal(self.rows["b"], KEPT)))


def compare(a: Path, b: Path) -> Comparison:
    """Match the rows of two selection directories by pool and uid.

    Raises:
        UserError: one of them is no finished selection.
    """
    sides = [_outcomes(Path(path), name) for path, name in ((a, "a"), (b, "b"))]
    joined = sides[0].join(sides[1], ["pool", "uid"], join_type="full outer")
    joined = joined.sort_by([("pool", "ascending"), ("uid", "ascending")])
    filled = {side: pc.fill_null(joined[side], ABSENT) for side in ("a", "b")}
    return Comparison(pa.table({"uid": joined["uid"], "pool": joined["pool"], **filled}))


def _outcomes(selection: Path, name: str) -> pa.Table:
    read_manifest(selection, KIND)
    table = pq.read_table(selection / DECISIONS, columns=["uid", "pool", "reason"])
    return pa.table({"uid": table["uid"], "pool": table["pool"], name: pc.fill_null(table["reason"], KEPT)})


def write_page(found: Comparison, names: tuple[str, str], pools: Path, out: Path, each: int = 16) -> None:
    """Write `out`, one file that opens from disk: up to `each` pictures of every transition, spread evenly."""
    changed = found.changed
    chosen = {row[:2]: _spread(changed, *row[:2], each) for row in found.transitions}
    shown = pa.concat_tables([*chosen.values(), changed.slice(0, 0)])
    pictures, captions = _looked_up(Path(pools), shown)
    walls = [
        {"a": a, "b": b, "count": count, "cards": [
            {"uid": uid, "caption": captions.get(uid, ""), "picture": pictures.get(uid)}
            for uid in chosen[a, b]["uid"].to_pylist()
        ]}
        for a, b, count in found.transitions
    ]
    # Captions are hostile text: everything is escaped.
    environment = Environment(loader=PackageLoader("vlmpipe.report"), autoescape=True, trim_blocks=True)
    page = environment.get_template("compare.html.j2").render(names=names, counts=found.counts, walls=walls)
    write_bytes_atomic(Path(out), page.encode())


def _spread(changed: pa.Table, a: str, b: str, each: int) -> pa.Table:
    rows = changed.filter(pc.and_(pc.equal(changed["a"], a), pc.equal(changed["b"], b)))
    return rows.take(np.unique(np.linspace(0, len(rows) - 1, min(each, len(rows))).astype(int)))


def _looked_up(pools: Path, shown: pa.Table) -> tuple[dict[str, str], dict[str, Any]]:
    pictures, captions = {}, {}
    for name in pc.unique(shown["pool"]).to_pylist():
        uids = shown.filter(pc.equal(shown["pool"], name))["uid"]
        if (pools / name / MANIFEST).exists():
            pictures |= thumbnails(pools / name, uids.to_pylist())
            rows = read_rows(pools / name, ["uid", "caption"])
            rows = rows.filter(pc.is_in(rows["uid"], value_set=uids.combine_chunks()))
            captions |= dict(zip(rows["uid"].to_pylist(), rows["caption"].to_pylist()))
    return pictures, captions


def show(found: Comparison, names: Sequence[str]) -> None:
    """Print the counts."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, counts = Console(), found.counts
    console.print(f"A {escape(names[0])}\nB {escape(names[1])}\nkept by both {counts['both']:,}, only by A "
                  f"{counts['only_a']:,}, only by B {counts['only_b']:,}, by neither {counts['neither']:,}")
    table = Table("in A", "in B", "rows")
    for a, b, count in found.transitions:
        table.add_row(escape(a), escape(b), f"{count:,}")
    console.print(table)
