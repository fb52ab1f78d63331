"""Does the bias gate catch a skew that a filter plants, and stay silent where there is none?

    make bench-bias        python benchmarks/bias.py [--repeats N] [--rows N]

Each repeat draws a table of pairs: captions in four languages that name women, men or nobody, occupations, hosts of
many countries, sizes and scores. Three filters select (size, caption words, score), the shipped word lists
(configs/audit) say who is in which group, and the audit's own tables and the gate's own rules judge. Without a skew
nothing depends on a group, so that every alarm is false. With one, the score filter alone sees women's pairs as worse.
Then the same pools with the score filter mitigated (`fair_score`), and what that costs.
"""

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from vlmpipe.compose import compose
from vlmpipe.config import parse
from vlmpipe.curate.audit import bias_metrics
from vlmpipe.curate.bias import BiasConfig, measure
from vlmpipe.curate.groups import mentions, values
from vlmpipe.curate.mitigation import FairScore
from vlmpipe.curate.regions import regions
from vlmpipe.errors import GateFailed
from vlmpipe.evaluate.gate import GateConfig, gate
from vlmpipe.progress import progress
from vlmpipe.shards import read_json, write_json

TARGET = 0.05  # share of pools without a skew on which the gate may fail
REASONS = ["small", "caption_words", "clip"]
THRESHOLD = 0.27  # of the score filter
TEMPLATES = {
    "en": ("a woman with {}", "a man with {}", "a street and {}", ("a nurse", "an engineer", "a dog")),
    "de": ("eine Frau mit {}", "ein Mann mit {}", "wie man {} malt", ("Krankenschwester", "Ingenieur", "Hund")),
    "fr": ("une femme et {}", "un homme et {}", "une rue et {}", ("une infirmière", "un ingénieur", "un chien")),
    "es": ("una mujer con {}", "un hombre con {}", "una calle con {}", ("una enfermera", "un ingeniero", "un perro")),
}
HOSTS = ("com", "co.uk", "de", "fr", "es", "com.br", "jp", "ke", "in", "org")
GROUPINGS = ("gender", "language", "url_region")


@dataclass
class Pool:
    """Pairs as columns, and what the filters made of them: 0 kept, r + 1 dropped by REASONS[r]."""

    captions: pa.Array
    languages: pa.Array
    urls: pa.Array
    scores: np.ndarray
    outcome: np.ndarray


def draw(rows: int, skew: float, generator: np.random.Generator) -> Pool:
    """A pool of pairs. `skew`: by how many standard deviations the scorer sees women's pairs as worse."""
    codes = generator.choice(list(TEMPLATES), rows, p=[0.55, 0.2, 0.15, 0.1])
    who = generator.choice(3, rows, p=[0.3, 0.35, 0.35])
    what = generator.integers(0, 3, rows)
    captions = [TEMPLATES[c][w].format(TEMPLATES[c][3][o]) for c, w, o in zip(codes, who, what)]
    urls = [f"https://images.example.{host}/{i}.jpg" for i, host in enumerate(generator.choice(HOSTS, rows))]
    scores = generator.normal(0.28, 0.05, rows) - np.where(who == 0, skew * 0.05, 0)
    dropped = [generator.lognormal(6, 0.6, rows) < 250, generator.random(rows) < 0.08, scores < THRESHOLD]
    outcome = np.select(dropped, [1, 2, 3], 0)
    return Pool(pa.array(captions), pa.array(codes), pa.array(urls), scores.astype(np.float32), outcome)


def audited(pool: Pool, config: BiasConfig) -> dict:
    """The bias tables, from captions, languages and URLs as the audit reads them."""
    identities = {name: mentions(pool.captions, lists, pool.languages) for name, lists in config.lexicons.items()}
    attributes = mentions(pool.captions, config.attributes, pool.languages)
    columns = {"language": values(pool.languages), "url_region": values(regions(pool.urls))}
    return measure(identities, columns, attributes, pool.outcome, REASONS, pool.scores, config)


def rules() -> GateConfig:
    """Every kind of bound on every grouping, at the values that configs/gates ship for gender."""
    bounds = {
        "impact_ratio_upper": {"min": 0.8}, "rule_impact_ratio_upper": {"min": 0.8}, "rule_gap_lower": {"max": 0.1},
        "amplification_min_upper": {"min": 0.8}, "score_gap_lower": {"max": 0.1}, "groups_tested": {"min": 2},
    }
    found = {
        f"{grouping}_{name}": {"metric": f"bias.{grouping}.{name}"} | bound
        for grouping in GROUPINGS for name, bound in bounds.items()
    }
    found["association"] = {"metric": "bias.gender.npmi_shift_lower", "max": 0.1}
    found["rules"] = {"metric": "bias.rules", "max": 0}
    return parse(GateConfig, {"rules": found}, "benchmarks/bias.py")


def judged(table: dict, config: GateConfig, place: Path) -> list[str]:
    """The names of the gate's rules that fail."""
    write_json(place / "metrics.json", bias_metrics(table))
    try:
        gate("data", [place / "metrics.json"], None, place / "verdict.json", config)
    except GateFailed:
        return [rule["name"] for rule in read_json(place / "verdict.json")["rules"] if not rule["passed"]]
    return []


def repeat(skew: float, repeats: int, rows: int, config: BiasConfig, seed: int = 0) -> list[dict]:
    """Fresh pools, each audited and judged: the failed rules, the rules named, and how many findings there were."""
    found, generators = [], np.random.default_rng(seed).spawn(repeats)
    with tempfile.TemporaryDirectory() as place:
        for generator in progress(generators, repeats, f"skew {skew:g}"):
            table = audited(draw(rows, skew, generator), config)
            found.append({
                "failed": judged(table, rules(), Path(place)), "findings": len(table["findings"]),
                "tests": table["tests"], "named": [(r["grouping"], r["reason"], r["group"]) for r in table["rules"]],
            })
    return found


def mitigated(pool: Pool, method: str, config: BiasConfig) -> tuple[Pool, dict]:
    """The pool with its score filter held to equal pass rates of women and men, and what that costs."""
    lexicon = config.lexicons["gender"]
    rule = FairScore(min=THRESHOLD, lexicon=lexicon, method=method, ratio=0.95)
    reached = np.flatnonzero((pool.outcome == 0) | (pool.outcome == 3))
    members = mentions(pool.captions.take(pa.array(reached)), lexicon, pool.languages.take(pa.array(reached)))
    limit, cost = rule.limits(pool.scores[reached].astype(float), members, THRESHOLD)
    outcome = pool.outcome.copy()
    outcome[reached] = np.where(pool.scores[reached] >= limit, 0, 3)
    return replace(pool, outcome=outcome), cost


def mitigation_table(repeats: int, rows: int, config: BiasConfig) -> Table:
    shown = Table(title="one standard deviation of skew, mitigated")
    for head in ("method", "rules in breach", "rows kept", "their mean score"):
        shown.add_column(head)
    for method in ("per_group_threshold", "quota"):
        costs, breaches = [], 0
        for generator in np.random.default_rng(0).spawn(repeats):
            pool, cost = mitigated(draw(rows, 1.0, generator), method, config)
            breaches += bool(audited(pool, config)["rules"])
            costs.append(cost)
        kept, mean = (
            np.mean([cost[f"{what}_after"] / cost[f"{what}_before"] - 1 for cost in costs])
            for what in ("kept", "mean_score")
        )
        shown.add_row(method, f"in {breaches} of {repeats} pools", f"{kept:+.1%}", f"{mean:+.2%}")
    return shown


def shipped() -> BiasConfig:
    """The audit's configuration with the lists of all four languages."""
    params = compose("scenes", ["audit=multilingual"], Path(__file__).parents[1] / "configs")
    return parse(BiasConfig, params["audit"]["bias"], "configs/audit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20, help="pools of each kind (default: 20)")
    parser.add_argument("--rows", type=int, default=4000, help="pairs in a pool (default: 4000)")
    arguments = parser.parse_args()
    config = shipped()
    shown = Table(title=f"{arguments.repeats} pools of {arguments.rows} pairs each")
    for head in ("skew planted by the score filter", "gate fails", "named: clip, woman", "any corrected test"):
        shown.add_column(head)
    counts = {}
    for skew in (0.0, 0.25, 0.5, 1.0):
        found = repeat(skew, arguments.repeats, arguments.rows, config)
        counts[skew] = sum(bool(one["failed"]) for one in found)
        named = sum(("gender", "clip", "woman") in one["named"] for one in found)
        shown.add_row(
            f"{skew:g} standard deviations" if skew else "none", f"{counts[skew]} of {len(found)}",
            f"{named} of {len(found)}", f"{sum(bool(one['findings']) for one in found)} of {len(found)}",
        )
    Console().print(shown, mitigation_table(arguments.repeats, arguments.rows, config))
    false = counts[0.0] / arguments.repeats
    print(f"false alarms: {counts[0.0]} of {arguments.repeats} = {false:.1%} (target: at most {TARGET:.0%})")
    print(f"a skew of one standard deviation: caught in {counts[1.0]} of {arguments.repeats} (target: all)")


if __name__ == "__main__":
    main()
