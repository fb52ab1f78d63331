"""Rules on embeddings: decontamination, chains of semantic duplicates, missing vectors, and where vectors come from."""

import numpy as np
import pyarrow as pa
import pytest

from tests.curate.made_pools import made_rows
from tests.curate.test_rules import judged
from vlmpipe import shards
from vlmpipe.curate.vectors import greatest_before, kmeans, nearest_rows, read_vectors
from vlmpipe.errors import UserError


def embeddings(vectors, mask=None) -> pa.Array:
    vectors = np.asarray(vectors, np.float16)
    values = pa.array(vectors.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, vectors.shape[1], mask=None if mask is None else pa.array(mask))


def angle(degrees: float) -> list[float]:
    return [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]


def test_rows_near_an_evaluation_picture_are_dropped_and_it_is_named(tmp_path):
    asked = {"uid": ["q1", "q2"], "image_embedding": embeddings([angle(0), angle(90)])}
    shards.write_table(tmp_path / "a.parquet", pa.table(asked))
    np.save(tmp_path / "b.npy", np.array([angle(200)]))
    pool = embeddings([angle(5), angle(40), angle(130), angle(0), angle(201)], [False] * 3 + [True, False])
    rule = {"kind": "evaluation_embedding", "min_cosine": 0.9,
            "references": [str(tmp_path / "a.parquet"), str(tmp_path / "b.npy")]}
    table, steps = judged(made_rows(5, image_embedding=pool), e=rule)
    shards.write_json(tmp_path / "funnel.json", steps)  # the settings hold paths
    assert shards.read_json(tmp_path / "funnel.json")[-1]["config"]["references"] == rule["references"]
    assert [row["other_uid"] for row in table] == ["q1", None, None, None, "b[0]"]
    assert [row["reason"] for row in table] == ["e", None, None, "e:missing", "e"]
    assert table[0]["value"] == pytest.approx(np.cos(np.radians(5)), abs=1e-3) and table[0]["threshold"] == 0.9


def test_a_chain_of_semantic_duplicates_names_the_row_that_stayed():
    pool = embeddings([angle(0), angle(8), angle(16), angle(100), angle(60)])
    rule = {"kind": "semantic_duplicate", "clusters": 1, "eps": 0.02}
    table, _ = judged(made_rows(5, image_embedding=pool), s=rule)
    kept = {row["uid"] for row in table if row["kept"]}
    assert len(kept) == 3 and {"u3", "u4"} < kept
    (stayed,) = kept - {"u3", "u4"}
    assert {row["other_uid"] for row in table if not row["kept"]} == {stayed}
    assert all(row["value"] > row["threshold"] for row in table if not row["kept"])


@pytest.mark.parametrize("kind", ["semantic_duplicate", "image_clusters"])
def test_rows_without_a_vector_are_dropped_as_missing(kind, tmp_path):
    np.save(tmp_path / "r.npy", np.array([angle(0)]))
    pool = embeddings([angle(0), angle(0), [np.nan, 0]], [False, True, False])
    rule = {"kind": kind} | ({"reference": str(tmp_path / "r.npy")} if kind == "image_clusters" else {})
    table, _ = judged(made_rows(3, image_embedding=pool), r=rule)
    assert [row["reason"] for row in table] == [None, "r:missing", "r:missing"]


def test_kmeans_finds_what_is_apart_and_depends_on_the_seed_alone():
    rng = np.random.default_rng(0)
    centres = np.eye(4)[:3]
    vectors = np.repeat(centres, 50, axis=0) + rng.normal(size=(150, 4)) * 0.05
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = kmeans(vectors, 3, 30, seed=3)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5) and np.array_equal(found, kmeans(vectors, 3, 30, 3))
    labels = nearest_rows(vectors, found)[0].reshape(3, 50)
    assert kmeans(vectors[:2], 5, 5, 0).shape == (2, 4) and kmeans(vectors[:0], 5, 5, 0).shape == (0, 4)
    assert (labels == labels[:, :1]).mean() > 0.6


def test_greatest_before_is_the_lower_triangle(monkeypatch):
    monkeypatch.setattr("vlmpipe.curate.vectors.CHUNK", 40)
    vectors = np.random.default_rng(1).normal(size=(23, 3)).astype(np.float32)
    best, who = greatest_before(vectors)
    products = vectors @ vectors.T
    assert best[0] == -np.inf and who[0] == 0
    for row in range(1, 23):
        before = products[row, :row]
        assert who[row] == before.argmax() and best[row] == pytest.approx(before.max(), rel=1e-5)


def test_vectors_of_another_width_or_none_are_refused(tmp_path):
    np.save(tmp_path / "wide.npy", np.ones((2, 5)))
    rule = {"kind": "evaluation_embedding", "references": [str(tmp_path / "wide.npy")]}
    with pytest.raises(UserError, match=r"wide.npy: found vectors of width 5; expected 2"):
        judged(made_rows(1, image_embedding=embeddings([angle(0)])), e=rule)
    with pytest.raises(UserError, match=r"can't read vectors from .*nowhere\.npy"):
        read_vectors(tmp_path / "nowhere.npy")
    np.save(tmp_path / "flat.npy", np.ones(3))
    with pytest.raises(UserError, match="expected an array"):
        read_vectors(tmp_path / "flat.npy")
    with pytest.raises(UserError, match="of type string; expected embeddings"):
        judged(made_rows(1), s={"kind": "semantic_duplicate", "column": "language"})
