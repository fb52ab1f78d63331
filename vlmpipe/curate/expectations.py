"""Great Expectations over metadata: what must hold of pools, annotations and the selection. Its only importer.

An empty frame or an all-null column passes most expectations, so suites are built by `suite` and `column`, which add a
row count and a not-null guard to everything. Frames are checked batch by batch, so memory does not grow with the pool.
"""

import datetime
import html
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from vlmpipe.curate.drift import Drift
from vlmpipe.errors import UserError
from vlmpipe.progress import progress
from vlmpipe.shards import write_bytes_atomic

Range = tuple[float | None, float | None]
# The Data Docs are a tracked output: equal inputs give equal bytes, so a run carries no clock of its own.
EPOCH = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
STATUSES = ("downloaded", "retriable", "refused")


@dataclass(frozen=True)
class ExpectationsConfig:
    """What is expected. A range is [lowest, highest], null for no limit.

    present: least share of rows that must carry an optional value (a caption, a score). sides: pixels of a stored
    picture. clip_quantiles: quantile -> range of the kept rows' raw cosine. languages: language -> range of its share
    among the kept rows. drift: how far the champion's data may be left, null: anywhere. batch_rows: rows validated
    together.
    """

    pool_rows: int = 1
    kept_rows: int = 1
    success_rate: Range = (0.5, 1.0)
    kept_fraction: Range = (0.01, 1.0)
    present: float = 0.9
    sides: Range = (1, 20_000)
    caption_chars: Range = (1, 10_000)
    clip_quantiles: dict[str, Range] = field(default_factory=lambda: {"0.05": (-1.0, 1.0), "0.5": (0.0, 1.0)})
    languages: dict[str, Range] = field(default_factory=dict)
    overlap: float = 0.0
    drift: Drift | None = field(default_factory=Drift)
    batch_rows: int = 250_000

    def __post_init__(self):
        ranges = {"success_rate": self.success_rate, "kept_fraction": self.kept_fraction, "sides": self.sides}
        ranges |= {"caption_chars": self.caption_chars}
        ranges |= {f"clip_quantiles.{key}": value for key, value in self.clip_quantiles.items()}
        ranges |= {f"languages.{key}": value for key, value in self.languages.items()}
        for name, (low, high) in ranges.items():
            if (low is None and high is None) or (low is not None and high is not None and low > high):
                raise UserError(f"{name}: found [{low}, {high}]; expected lowest <= highest and one of them given")
        for key in self.clip_quantiles:
            if not re.fullmatch(r"0?\.\d+|[01](\.0*)?", key):
                raise UserError(f"clip_quantiles: found '{key}'; expected quantiles from 0 to 1, like '0.05'")
        for name in ("present", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: found {getattr(self, name)}; expected a share from 0 to 1")
        for name in ("pool_rows", "kept_rows", "batch_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: found {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class Rule:
    """One expectation: the Great Expectations class by name, and its arguments."""

    kind: str
    arguments: Mapping[str, Any]

    @property
    def column(self) -> str | None:
        return self.arguments.get("column")


# --- suites ------------------------------------------------------------------------------------------------

def suite(*columns: Sequence[Rule], rows: int = 1) -> list[Rule]:
    """The rules of all columns behind a row count, without which an empty frame would pass them all."""
    return [Rule("ExpectTableRowCountToBeBetween", {"min_value": rows}), *(rule for rules in columns for rule in rules)]


def column(name: str, *rules: Rule, present: float = 1.0) -> list[Rule]:
    """The rules of one column behind a not-null guard: null rows are left out of every other expectation."""
    guard = {"column": name} | ({"mostly": present} if present < 1 else {})
    return [Rule("ExpectColumnValuesToNotBeNull", guard)] + [
        Rule(rule.kind, {"column": name, **rule.arguments}) for rule in rules
    ]


def between(limits: Range) -> Rule:
    given = {key: value for key, value in zip(("min_value", "max_value"), limits) if value is not None}
    return Rule("ExpectColumnValuesToBeBetween", given)


def one_of(*allowed: Any) -> Rule:
    return Rule("ExpectColumnValuesToBeInSet", {"value_set": list(allowed)})


def unique() -> Rule:
    return Rule("ExpectColumnValuesToBeUnique", {})


def quantiles(limits: Mapping[str, Range]) -> Rule:
    ordered = sorted(limits, key=float)
    ranges = {"quantiles": [float(key) for key in ordered], "value_ranges": [list(limits[key]) for key in ordered]}
    return Rule("ExpectColumnQuantileValuesToBeBetween", {"quantile_ranges": ranges})


def suite_name(kind: str, pool: str) -> str:
    """Great Expectations makes folders of the dots in a suite's name."""
    return f"{kind}-{pool.replace('.', '_')}"


def suites(pools: Sequence[str], config: ExpectationsConfig, scored: Sequence[str]) -> dict[str, list[Rule]]:
    """Every suite by name. `audit.frames` gives each the columns named here.

    Args:
        scored: the pools with scores. Of the others none is expected, nor of all pools together where one has none.
    """
    whole = set(pools) <= set(scored)
    found = {suite_name("pool", pool): _pool_suite(config) for pool in pools} | {"selection": _selection_suite(config)}
    found |= {suite_name("raw", pool): _raw_suite() for pool in pools}
    found |= {suite_name("annotated", pool): _annotated_suite(config, pool in scored) for pool in pools}
    found["selected"] = _selected_suite(config, whole)
    if whole:
        found["scores"] = suite(column("clip_score", between((-1, 1)), *_quantile_rules(config)), rows=config.kept_rows)
    return found


def _quantile_rules(config: ExpectationsConfig) -> list[Rule]:
    return [quantiles(config.clip_quantiles)] if config.clip_quantiles else []


def _pool_suite(config: ExpectationsConfig) -> list[Rule]:
    """One row: the totals of a pool."""
    return suite(
        column("rows", between((config.pool_rows, None))),
        column("success_rate", between(config.success_rate)),
        column("repeated_uids", one_of(0)),
        column("rows_without_decision", one_of(0)),
        column("decisions_without_row", one_of(0)),
        column("downloads_without_annotation", one_of(0)),
    )


def _selection_suite(config: ExpectationsConfig) -> list[Rule]:
    """One row: the totals of the selection."""
    languages = [column(f"language_{name}", between(limits)) for name, limits in sorted(config.languages.items())]
    return suite(
        column("kept", between((config.kept_rows, None))),
        column("kept_fraction", between(config.kept_fraction)),
        column("evaluation_images", between((1, None))),
        column("evaluation_overlap", between((None, config.overlap))),
        *languages,
    )


def _raw_suite() -> list[Rule]:
    return suite(
        column("uid", unique()),
        column("url"),
        column("status", one_of(*STATUSES)),
        column("explained", one_of(True)),
    )


def _annotated_suite(config: ExpectationsConfig, scored: bool) -> list[Rule]:
    return suite(
        column("uid", unique()),
        column("width", between(config.sides), present=config.present),
        column("height", between(config.sides), present=config.present),
        column("caption_chars", between((0, None)), present=config.present),
        column("phash", present=config.present),
        column("language", present=config.present),
        _score(scored, config.present),
    )


def _selected_suite(config: ExpectationsConfig, scored: bool) -> list[Rule]:
    return suite(
        column("uid", unique()),
        column("status", one_of("downloaded")),
        column("explained", one_of(True)),
        column("width", between(config.sides)),
        column("height", between(config.sides)),
        column("caption_chars", between(config.caption_chars)),
        _score(scored),
    )


def _score(scored: bool, present: float = 1.0) -> list[Rule]:
    return column("clip_score", between((-1, 1)), present=present) if scored else []


def packed_suites(splits: Sequence[str], rows: int, captions: float, scored: bool) -> dict[str, list[Rule]]:
    """The suites of packed data: its totals in one row, and one suite for each split.

    Args:
        rows: how many were to be written. captions: the least share of rows with one. scored: whether rows have scores.
    """
    totals = suite(
        column("rows", one_of(rows)),
        column("caption_share", between((captions, None))),
        column("repeated_pairs", one_of(0)),
        column("pictures_in_two_splits", one_of(0)),
    )
    split = suite(
        column("uid"),
        column("url"),
        column("pool"),
        column("sha256"),
        column("width", between((1, None))),
        column("height", between((1, None))),
        _score(scored, 0.9),
        column("image_bytes", between((1, None))),
        column("image_is_jpeg", one_of(True)),
    )
    return {"packed": totals} | {f"packed-{name}": split for name in splits}


# --- validation --------------------------------------------------------------------------------------------

def validate(
    rules: Mapping[str, Sequence[Rule]], frames: Mapping[str, Iterable[pd.DataFrame]], docs: Path,
    notes: Sequence[str] = (),
) -> list[dict]:
    """Check every suite on every batch of its frame, and write Data Docs that open from disk to `docs`.

    Args:
        notes: lines for the first page, such as what could not be checked.

    Returns:
        A record for each expectation: suite, expectation, column, success, observed, expected, fraction (of rows as
        expected; null where rows are not what is counted), message (null unless it failed). An expectation holds
        if it holds in every batch. A missing column or an error inside Great Expectations is a failure.
    """
    with tempfile.TemporaryDirectory(prefix="vlmpipe-audit-") as directory:
        context = _context(Path(directory), docs)
        records = []
        for name in progress(list(rules), len(rules), "expectations"):
            checks = _suite_checks(context, name, rules[name])
            results = [_run(context, checks, batch, i) for i, batch in enumerate(_some(frames[name]))]
            records += [_merge(name, rule, [batch[i] for batch in results]) for i, rule in enumerate(rules[name])]
        context.build_data_docs()
    _settle(docs, records, notes)
    return records


def _some(frames: Iterable[pd.DataFrame]) -> Iterable[pd.DataFrame]:
    """The batches, or one empty frame: no batch at all must fail the row count, not skip it."""
    empty = True
    for frame in frames:
        empty = False
        yield frame
    if empty:
        yield pd.DataFrame()


def _context(directory: Path, docs: Path) -> Any:
    # Some versions report their use, and read this variable while they are imported.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx

    context = gx.get_context(mode="file", project_root_dir=str(directory))
    context.variables.progress_bars = {"globally": False}
    for site in list(context.variables.data_docs_sites):
        context.delete_data_docs_site(site)
    context.add_data_docs_site("docs", {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder", "show_cta_footer": False},
    })
    return context


def _suite_checks(context: Any, name: str, rules: Sequence[Rule]) -> Any:
    """The checkpoint that validates one suite on a frame given at run time."""
    import great_expectations as gx
    import great_expectations.expectations as gxe

    expectations = [
        getattr(gxe, rule.kind)(**rule.arguments, meta={"rule": i}) for i, rule in enumerate(rules)
    ]
    stored = context.suites.add_or_update(gx.ExpectationSuite(name=name, expectations=expectations))
    asset = context.data_sources.add_or_update_pandas(name).add_dataframe_asset("rows")
    data = asset.add_batch_definition_whole_dataframe("all")
    definition = gx.ValidationDefinition(name=name, data=data, suite=stored)
    definition = context.validation_definitions.add_or_update(definition)
    checkpoint = gx.Checkpoint(name=name, validation_definitions=[definition], result_format="SUMMARY")
    return context.checkpoints.add_or_update(checkpoint)


def _run(context: Any, checkpoint: Any, batch: pd.DataFrame, number: int) -> list[dict]:
    """The results of one batch, in the order of the suite."""
    from great_expectations.core.run_identifier import RunIdentifier

    run = RunIdentifier(run_name=f"batch-{number:05d}", run_time=EPOCH)
    outcome = checkpoint.run(batch_parameters={"dataframe": batch}, run_id=run)
    (validation,) = outcome.run_results.values()
    found = {result.expectation_config.meta["rule"]: result.to_json_dict() for result in validation.results}
    return [found[i] for i in sorted(found)]


def _merge(name: str, rule: Rule, results: Sequence[dict]) -> dict:
    success = all(result["success"] for result in results)
    failed = next((result for result in results if not result["success"]), results[0])
    counts = [result["result"] for result in results if "unexpected_count" in result["result"]]
    elements = sum(count["element_count"] for count in counts)
    unexpected = sum(count["unexpected_count"] for count in counts)
    # Null rows are not counted as unexpected by a rule on values; they are no evidence for it either.
    seen = elements - sum(count.get("missing_count", 0) for count in counts)
    fraction = (seen - unexpected) / seen if seen else None
    return {
        "suite": name,
        "expectation": failed["expectation_config"]["type"],
        "column": rule.column,
        "success": success,
        "observed": _observed(failed, seen, unexpected),
        "expected": {key: value for key, value in rule.arguments.items() if key != "column"},
        "fraction": fraction,
        "batches": len(results),
        "message": None if success else _message(name, rule, failed, seen, unexpected),
    }


def _observed(result: dict, elements: int, unexpected: int) -> Any:
    found = result["result"]
    if "observed_value" in found:
        return found["observed_value"]
    examples = found.get("partial_unexpected_list", [])[:5]
    examples = [example for example in examples if example is not None]
    return {"rows": elements, "unexpected": unexpected, "examples": examples}


def _message(name: str, rule: Rule, result: dict, elements: int, unexpected: int) -> str:
    where = f"{name}.{rule.column}" if rule.column else name
    error = _exception(result)
    if error:
        return f"{where}: {result['expectation_config']['type']} could not be checked: {error}"
    expected = ", ".join(f"{key} {value}" for key, value in rule.arguments.items() if key != "column")
    observed = _observed(result, elements, unexpected)
    if elements == 1 and observed["examples"]:
        observed = f"found {observed['examples'][0]}"
    elif isinstance(observed, dict) and "unexpected" in observed:
        examples = ", ".join(map(str, observed["examples"]))
        observed = f"{unexpected} of {elements} rows not so" + (f" (such as {examples})" if examples else "")
    return f"{where}: {result['expectation_config']['type']}" + (f" ({expected})" if expected else "") + f": {observed}"


def _exception(result: dict) -> str | None:
    """The first error message: Great Expectations gives one record, or one for each metric it tried."""
    info = result.get("exception_info") or {}
    records = [info] if "raised_exception" in info else [value for value in info.values() if isinstance(value, dict)]
    errors = [str(record.get("exception_message")) for record in records if record.get("raised_exception")]
    return " ".join(errors[0].split()) if errors else None


# --- Data Docs that open from disk -------------------------------------------------------------------------

REMOTE = re.compile(
    r"""<script\b[^>]*\bsrc=["']https?://[^>]*>\s*</script>|<link\b[^>]*\bhref=["']https?://[^>]*>""", re.IGNORECASE
)
SCRIPT = re.compile(r"<script\b.*?</script>|<footer\b.*?</footer>", re.IGNORECASE | re.DOTALL)
BACKGROUND = re.compile(r"""url\(['"]?https?://[^)]*\)""")
# The logo's address carries the time and the context's id: a counter of who opens the page, and of when.
LOGO = re.compile(r"""(<img\b[^>]*?\bsrc=)["']https?://[^"']*["']""", re.IGNORECASE)
UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
CLOCK = re.compile(r"\b2\d{7}T\d{6}\.\d{6}Z\b")
UNUSED = ("static/images/glossary_scroller.gif", "static/images/validation_failed_unexpected_values.gif",
          "static/images/iterative-dev-loop.png", "static/images/logo-long-vector.svg",
          "static/images/short-logo-vector.svg", "static/images/short-logo.png")
STYLE = """<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; position: static }
table { border-collapse: collapse; margin: .5rem 0; width: 100% }
th, td { border: 1px solid #ccd; padding: .3rem .6rem; text-align: left; vertical-align: top }
img { max-height: 2.5rem } ul, ol { padding-left: 1.2rem }
.navbar { height: auto !important; max-height: none !important }
.card, [data-toggle=collapse] { display: none } /* they need scripts */
.fa-check-circle::before { content: "\\2714"; color: #2a7a2a }
.fa-times::before { content: "\\2718"; color: #b22 } .failed { color: #b22; font-weight: 600 }
</style>"""


def _settle(docs: Path, records: Sequence[dict], notes: Sequence[str]) -> None:
    """Make the pages plain files: nothing fetched when opened, nothing that differs between equal runs."""
    for name in UNUSED:
        (docs / name).unlink(missing_ok=True)
    styles = docs / "static" / "styles" / "data_docs_default_styles.css"
    if styles.exists():
        styles.write_text(BACKGROUND.sub("none", styles.read_text()))
    for page in sorted(docs.rglob("*.html")):
        up = "../" * (len(page.relative_to(docs).parts) - 1)
        text = _plain_page(page.read_text(encoding="utf-8"), f"{up}static/images/")
        write_bytes_atomic(page, text.encode())
    write_bytes_atomic(docs / "index.html", _index(docs, records, notes).encode())


def _plain_page(text: str, images: str) -> str:
    text = BACKGROUND.sub("none", SCRIPT.sub("", REMOTE.sub("", text)))
    text = LOGO.sub(rf'\1"{images}logo-long.png"', text).replace("</head>", f"{STYLE}</head>", 1)
    # Great Expectations counts one folder too few on the way up from a page of a run.
    text = re.sub(r"[./]*static/images/favicon", f"{images}favicon", text)
    text = CLOCK.sub(EPOCH.strftime("%Y%m%dT%H%M%S.%fZ"), text).replace("2000-01-01T00:00:00Z", "not recorded")
    numbers: dict[str, str] = {}
    return UUID.sub(lambda found: numbers.setdefault(found[0], f"id-{len(numbers)}"), text)


def _index(docs: Path, records: Sequence[dict], notes: Sequence[str]) -> str:
    """The entry page. Great Expectations' own is drawn by scripts from five other hosts."""
    rows = []
    for name in dict.fromkeys(record["suite"] for record in records):
        mine = [record for record in records if record["suite"] == name]
        failed = [record for record in mine if not record["success"]]
        pages = sorted(path.relative_to(docs).as_posix() for path in (docs / "validations" / name).rglob("*.html"))
        links = " ".join(f'<a href="{html.escape(page)}">batch {i}</a>' for i, page in enumerate(pages))
        messages = "".join(f'<div class="failed">{html.escape(record["message"])}</div>' for record in failed)
        rows.append(
            f'<tr><td><a href="expectations/{html.escape(name)}.html">{html.escape(name)}</a></td>'
            f"<td>{len(mine) - len(failed)} of {len(mine)} hold{messages}</td><td>{links}</td></tr>"
        )
    said = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Data Docs</title>{STYLE}</head><body>'
        '<p><img src="static/images/logo-long.png" alt="Great Expectations"></p><h1>Data Docs</h1>'
        "<table><thead><tr><th>Suite</th><th>Expectations</th><th>Validations</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>{said}</body></html>\n"
    )


def clear(docs: Path) -> None:
    """Remove the pages of an earlier run, whose suites may be others."""
    shutil.rmtree(docs, ignore_errors=True)
