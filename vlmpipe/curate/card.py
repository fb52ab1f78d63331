"""The dataset card: README.md of a packed dataset, with the numbers behind it."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import yaml

from vlmpipe.curate.filters import DECISIONS

UNKNOWN = "unknown"
SHOWN = 20  # licences and groups of a table; what is left out is counted
MEANING = {
    "image": "the stored picture (RGB JPEG)", "caption": "the text that came with it", "uid": "never changes",
    "url": "where it was fetched from", "pool": "the list it comes from", "sha256": "of the bytes as fetched",
    "width": "as stored, pixels", "height": "as stored, pixels", "clip_score": "raw cosine of picture and caption",
    "licence": "as the list says, null where it says nothing",
}
OWN = "the list's own"


def card(
    facts: Mapping[str, Any], funnel: Mapping, extra: pa.Schema, entries: Sequence[Mapping], bias: Mapping | None
) -> str:
    """README.md: yaml that `datasets.load_dataset` and the Hub read, then what a person wants to know.

    Args:
        facts: those of the manifest: splits, pools, licences, clusters, version, selection, config.
        bias: the audit's bias tables; None: there was no audit, and the card says so.
    """
    splits = {name: count for name, count in facts["splits"].items() if count}
    rows = sum(splits.values())
    files = [[name, count, sum(e["name"].startswith(f"{name}/") for e in entries)] for name, count in splits.items()]
    groups, near = facts["clusters"], facts["config"]["near"]
    columns = [*MEANING.items(), *([name, OWN] for name in extra.names)]
    parts = [
        f"---\n{yaml.safe_dump(_head(facts, splits), sort_keys=False)}---\n\n# Curated image-text pairs",
        f"{rows} pairs kept of {funnel['rows']}, from the pools {', '.join(facts['pools'])}.",
        "## Splits\n\n" + markdown(["split", "rows", "files"], files),
        f"Pictures within {near['radius']} of 64 hash bits and a colour match of {near['match']:g}, directly or "
        f"through others, share a split: {groups['count']} clusters, {groups['of_several']} of several pictures, the "
        f"largest of {groups['largest']}.",
        "## Columns\n\n" + markdown(["column", "what"], columns),
        "## Licences\n\n" + _licences(facts["licences"], rows),
        "Pictures and captions belong to their authors; `url` and `licence` say what is known about each.",
        "## Selection\n\n" + markdown(
            ["rule", "rows in", "dropped", "rows out"],
            [[s["reason"], s["rows_in"], s["dropped"], s["rows_out"]] for s in funnel["steps"]],
        ),
        "## Groups before and after\n\n" + _groups(bias),
        "## Lineage\n\n" + _lineage(facts, funnel),
    ]
    return "\n\n".join(parts) + "\n"


def _head(facts: Mapping[str, Any], splits: Mapping[str, int]) -> dict:
    licences = [name for name in facts["licences"] if name != UNKNOWN]
    return {
        "license": "other" if licences else "unknown",
        "task_categories": ["image-to-text"],
        "configs": [{
            "config_name": "default",
            "data_files": [{"split": name, "path": f"{name}/*.parquet"} for name in splits],
        }],
    }


def _licences(found: Mapping[str, int], rows: int) -> str:
    most = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    table = [[name, count, f"{count / max(rows, 1):.1%}"] for name, count in most[:SHOWN]]
    if most[SHOWN:]:
        left = sum(count for _, count in most[SHOWN:])
        table.append([f"{len(most) - SHOWN} others", left, f"{left / max(rows, 1):.1%}"])
    return markdown(["licence", "rows", "share"], table)


def _groups(bias: Mapping | None) -> str:
    """The groups that were large enough to be tested, and the rules in breach."""
    if bias is None:
        return "No audit was made."
    parts = []
    for name, grouping in bias["groupings"].items():
        tested = sorted((g for g in grouping["groups"] if g["tested"]), key=lambda g: -g["total"])
        if not tested:
            continue
        impact = grouping["impact"]
        ratio = "not known" if impact["ratio"] is None else (
            f"{impact['ratio']:.3f} [{impact['low']:.3f}, {impact['high']:.3f}]"
        )
        left = f"; {len(tested) - SHOWN} further groups are in the audit" if tested[SHOWN:] else ""
        parts += [f"### {name}: impact ratio {ratio}{left}", markdown(
            ["group", "rows", "kept", "share before", "share after", "retention", "amplification"],
            [[g["group"], g["total"], g["kept"], f"{g['share_before']:.1%}", f"{g['share_after']:.1%}",
              f"{g['retention']:.1%} [{g['retention_low']:.1%}, {g['retention_high']:.1%}]",
              _number(g["amplification"])]
             for g in tested[:SHOWN]],
        )]
    rules = [
        f"- rule {r['reason']} drops {r['rate']:.1%} of {r['grouping']}={r['group']}, {r['against_rate']:.1%} of "
        f"{r['against']}" for r in bias["rules"]
    ]
    named = "Rules that drop one group far more than another, by more than noise:\n\n" + "\n".join(rules)
    parts.append(named if rules else "No rule drops one of these groups far more than another.")
    parts += [
        f"Rule {m['reason']} holds the groups' pass rates together ({m['method']}): impact ratio "
        f"{_number(m['impact_ratio_before'])} before, {_number(m['impact_ratio_after'])} after; "
        f"{m['rows_gained']} rows gained, {m['rows_lost']} lost; mean score {_number(m['mean_score_before'])} before, "
        f"{_number(m['mean_score_after'])} after." for m in bias.get("mitigations", ())
    ]
    intro = f"Groups of at least {bias['minimum_group']} rows, by words in the caption, by column or by the URL's host."
    return "\n\n".join([intro, *parts])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _lineage(facts: Mapping[str, Any], funnel: Mapping) -> str:
    pools = markdown(
        ["pool", "rows", "kept", "licence", "manifest sha256"],
        [[name, funnel["pools"][name]["rows"], funnel["pools"][name]["kept"],
          facts["config"]["licences"].get(name, "per row, or unknown"), digest]
         for name, digest in sorted(facts["pools"].items())],
    )
    return (
        f"Data version (sha256 of the sorted uids, a line each): {facts['version']}.\n\n{pools}\n\nSelection manifest "
        f"sha256: {facts['selection']}. Every row's decision, with the number behind it, is in the selection's "
        f"{DECISIONS}; `uid` is the key. `manifest.json` has the sha256 of each file, `croissant.json` the same for "
        f"tools that read Croissant."
    )


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    """Names come from the web: they neither end a cell nor start one, and are no markup."""
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())
