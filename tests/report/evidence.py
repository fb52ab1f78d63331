"""A small finished workspace, written by hand, whose every free text is hostile."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from tests.curate.made_pools import jpeg, picture, row, write_pool
from tests.evaluate.scored import asked, check, means, verdict, write_evaluation
from vlmpipe.evaluate.store import CHALLENGER, CHAMPION
from vlmpipe.shards import write_bytes_atomic, write_json, write_manifest, write_shard, write_table

HOSTILE = '<script>alert("caption")</script><img src=http://evil.test/x.png onerror=alert(1)>'
GROUP = "<script>group</script>"
THRESHOLD = 0.25
# (caption, reason of the drop, planted fault, whether it recovers): six rows of the pool `p`.
ROWS = (
    ("a red circle", None, None, False), (HOSTILE, None, "busy", True), ("a green star", "clip", "swapped", False),
    ("a blue star", "clip", None, False), ("gone", "download:http_404", "dead_404", False),
    ("a red circle again", "near_duplicate", "near_duplicate", False),
)


def url(place: int) -> str:
    return f"http://images.test/{place}.jpg"


def uid(place: int) -> str:
    return hashlib.sha256(f"{url(place)}\0{ROWS[place][0]}\0{0}".encode()).hexdigest()[:32]


def write_all(root: Path, results: Path) -> None:
    """Everything that the stages before the report leave."""
    write_curation(root)
    write_selection(root)
    write_audit(root)
    write_models(root, results)
    write_gate(results, "data", True)
    write_gate(results, "pretrain", True)
    write_gate(results, "finetune", False)


def write_curation(root: Path) -> None:
    """World, pool and annotations."""
    columns = ("url", "caption", "fault", "recovers")
    plan = [dict(zip(columns, (url(i), caption, fault, recovers))) for i, (caption, _, fault, recovers) in
            enumerate(ROWS)]
    twins = [url(0) if fault == "near_duplicate" else None for _, _, fault, _ in ROWS]
    table = pa.Table.from_pylist(plan).append_column("twin_url", pa.array(twins, pa.string()))
    write_table(root / "world" / "scenes" / "planted.parquet", table)
    pictures = [None if reason == "download:http_404" else jpeg(picture(i)) for i, (_, reason, *_) in enumerate(ROWS)]
    write_pool(root / "pools" / "p", [
        row(uid(i), data, caption=ROWS[i][0], url=url(i)) for i, data in enumerate(pictures)
    ])
    here = [i for i, data in enumerate(pictures) if data is not None]
    notes = pa.table({
        "uid": [uid(i) for i in here], "clip_score": pa.array([0.5, 0.4, 0.1, 0.2, 0.6], pa.float32()),
        "caption_words": [3, 4, 3, 3, 4], "aspect": [1.0, 1.0, 1.5, 1.0, 1.0],
        "image_embedding": [[0.0, 1.0]] * len(here),
    })
    directory = root / "annotations" / "p"
    write_manifest(directory, "annotations", [write_shard(directory, "00000", notes, [])])


def write_selection(root: Path) -> None:
    decided = [
        {"uid": uid(i), "pool": "p", "kept": reason is None, "reason": reason} for i, (_, reason, *_) in enumerate(ROWS)
    ]
    numbers = {"clip": {"value": 0.125, "threshold": THRESHOLD}, "near_duplicate": {"other_uid": uid(0)}}
    decided = [decision | numbers.get(decision["reason"], {}) for decision in decided]
    schema = pa.schema({"uid": pa.string(), "pool": pa.string(), "kept": pa.bool_(), "reason": pa.string(),
                        "value": pa.float64(), "threshold": pa.float64(), "other_uid": pa.string()})
    write_table(root / "selection" / "decisions.parquet", pa.Table.from_pylist(decided, schema=schema))
    steps = [{"reason": "downloaded", "rows_out": 5, "dropped": 1}, {"reason": "clip", "rows_out": 3, "dropped": 2},
             {"reason": "near_duplicate", "rows_out": 2, "dropped": 1}]
    reasons = {"clip": 2, "download:http_404": 1, "near_duplicate": 1}
    write_json(root / "selection" / "funnel.json", {"rows": 6, "kept": 2, "steps": steps, "reasons": reasons})
    write_manifest(root / "selection", "selection", [], pools={"p": "sha256 of its manifest"})


def write_audit(root: Path) -> None:
    reasons = [{"reason": "clip", "excess": 0.2}, {"reason": "small", "excess": -0.1}]
    groups = [
        {"group": name, "total": total, "kept": kept, "share_before": total / 100, "share_after": share, "tested": True,
         "amplification": share / (total / 100), "retention": kept / total, "retention_low": 0.1, "retention_high": 0.9,
         "reasons": reasons}
        for name, total, kept, share in (("woman", 40, 10, 0.25), (GROUP, 60, 30, 0.75))
    ]
    impact = {"ratio": 0.5, "low": 0.4, "high": 0.6, "breach": True}
    findings = [{"grouping": "gender", "group": GROUP, "kind": "rule", "reason": "clip", "effect": -0.2, "q": 0.001}]
    rule = {"grouping": "gender", "reason": "clip", "group": GROUP, "against": "woman", "rate": 0.5,
            "against_rate": 0.25, "dropped": 30, "reached": 60, "samples": [{"uid": uid(1), "caption": HOSTILE}]}
    write_json(root / "audit" / "bias.json", {
        "rules": [rule],
        "groupings": {"gender": {"groups": groups, "impact": impact}}, "findings": findings, "tests": 4, "limit": 0.8,
        "minimum_group": 20,
    })
    record = {"suite": "selected", "column": "uid", "expectation": "expect_column_values_to_be_unique", "expected": {}}
    failed = {"suite": "selected", "column": "clip_score", "expectation": "expect_column_values_to_be_between",
              "expected": {"min_value": 0.2}, "success": False, "message": f"clip_score of {HOSTILE} is 0.1"}
    write_json(root / "audit" / "expectations.json", [{**record, "success": True, "message": None}, failed])
    (root / "audit" / "data_docs").mkdir()
    (root / "audit" / "data_docs" / "index.html").write_text("<p>Data Docs</p>")
    packed = {**record, "suite": "packed-train", "success": True, "message": None}
    write_json(root / "packed" / "expectations.json", [packed])
    (root / "packed" / "data_docs").mkdir()
    (root / "packed" / "data_docs" / "index.html").write_text("<p>Docs of packed data</p>")


def write_models(root: Path, results: Path) -> None:
    for name, loss in (("scorer", 3.0), ("models/pretrain", 2.0), ("models/finetune", 1.0)):
        (root / name).mkdir(parents=True)
        lines = [{"step": step, "loss": loss, "lr": 1e-3 * step, "grad_norm": 1 / step} for step in range(1, 31)]
        lines[9] |= {"skipped": [9, 10]} if name == "models/pretrain" else {}
        curve = [json.dumps(line) for line in lines]
        (root / name / "curves.jsonl").write_text("\n".join(curve) + "\n")
    for name, accuracy in (("pretrain", 0.25), ("finetune", 0.875)):
        metrics = {"vqa.accuracy": accuracy} | ({"vqa.accuracy_wrong_image": 0.375} if name == "finetune" else {})
        write_json(results / "metrics" / f"{name}.json", {"metrics": metrics, "n": dict.fromkeys(metrics, 80)})
    write_scores(root, root.parent / "questions")
    place = root / "evaluation" / "finetune"
    (place / "attention").mkdir()
    for seed, key in enumerate(("1", "2")):
        arrays = {"picture": np.asarray(picture(seed)), "map": np.eye(4, dtype=np.float32)}
        np.savez(place / "attention" / f"vqa-{key}.npz", **arrays)


def write_scores(root: Path, questions: Path) -> None:
    """The last evaluation, with a champion beside it, and the pictures that were asked about."""
    samples = [asked("1", HOSTILE, kind="color"), asked("2", "Where?", ["left"] * 7 + ["there"] * 3, kind=HOSTILE),
               asked("3", "How many?", ["two"], ("1.png", "3.png"), kind="count")]
    for seed in (1, 2):
        write_bytes_atomic(questions / "test" / "images" / f"{seed}.png", jpeg(picture(seed)))
    ours, theirs = (1.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    said = {
        CHALLENGER: [{"prediction": "red", "score": 1.0, "wrong_prediction": ""},
                     {"prediction": HOSTILE, "score": 0.0, "wrong_prediction": HOSTILE},
                     {"prediction": "six", "score": 0.0, "wrong_prediction": "six"}],
        CHAMPION: ["red", HOSTILE, "two"],
    }
    said = {model: dict(zip("123", answers)) for model, answers in said.items()}
    counts = {model: {"accuracy": means(dict(zip("123", values)))} for model, values in
              ((CHALLENGER, ours), (CHAMPION, theirs))}
    write_evaluation(root / "evaluation" / "finetune", "vqa", samples, said, counts)


def write_gate(results: Path, name: str, passed: bool) -> None:
    """Rules that passed; or one that failed, one that is waived and one that passed."""
    floor = check("accuracy", "vqa.accuracy", "PASS" if passed else "FAIL", value=0.4321, detail=HOSTILE)
    waiver = {"rule": "kinds", "by": "Ada", "reason": HOSTILE, "until": "2026-12-01"}
    compared = {"rule": "margin", "margin": 0.05, "champion": 1.0, "value": 0.75, "interval": [-0.5, 0.0],
                "difference": -0.25, "p": 0.9, "p_adjusted": 1.0, "power": 0.25, "samples_needed": 1234, "limit": 0.95}
    others = [
        check("kinds", "vqa.accuracy", "INCONCLUSIVE", slice={"name": "kind", "value": HOSTILE}, waived=waiver,
              note="too few", **compared),
        check("guard", "vqa.accuracy", "PASS", **compared | {
            "interval": [-0.04, 0.0], "difference": -0.02, "samples_needed": None}),
    ]
    found = verdict([floor, *(() if passed else others)], "PASS" if passed else "FAIL", gate=name)
    write_json(results / "gates" / name / "verdict.json", found)
