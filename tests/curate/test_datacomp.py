"""DataComp's metadata in, its subset file out: the basic filter against the expression of its own tools."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.curate.test_recipes import CURATION
from vlmpipe.__main__ import main
from vlmpipe.curate.datacomp import read_metadata
from vlmpipe.errors import UserError
from vlmpipe.shards import read_rows

ENGLISH, GERMAN = "two dogs are running on the green grass", "zwei Hunde laufen auf der grünen Wiese herum"


@pytest.fixture
def metadata(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "metadata"
    folder.mkdir()
    for shard in range(2):
        rows = 40
        pq.write_table(pa.table({
            "uid": [rng.bytes(16).hex() for _ in range(rows)], "url": [f"http://a.test/{i}" for i in range(rows)],
            "text": rng.choice([ENGLISH, GERMAN, "a dog", "the cat"], rows).tolist(),
            "original_width": rng.choice([199, 200, 601], rows), "original_height": rng.choice([200, 300], rows),
            "clip_b32_similarity_score": rng.random(rows), "clip_l14_similarity_score": rng.random(rows),
        }), folder / f"{shard:03d}.parquet")
    np.savez(folder / "000.npz", b32_img=np.ones((40, 4)), l14_img=np.full((40, 6), 2.0))
    return folder


def test_metadata_in_and_the_published_subset_out(metadata, tmp_path, monkeypatch):
    root = tmp_path / "data"
    assert main(["datacomp", str(metadata), "--root", str(root), "--score", "clip_b32_similarity_score"]) == 0
    settings = yaml.safe_load((CURATION / "datacomp-basic.yaml").read_text())["select"]
    params = {"curation": {"select": settings | {"pools": ["datacomp"], "subset": True}}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    places = [f"--{name}={root / name}" for name in ("pools", "annotations", "questions")]
    assert main(["select", *places, f"--out={root}/selection", f"--params={tmp_path}/params.yaml"]) == 0
    expected = [
        (int(row["uid"][:16], 16), int(row["uid"][16:32], 16))
        for file in sorted(metadata.glob("*.parquet")) for row in pq.read_table(file).to_pylist()
        if row["text"] == ENGLISH and min(row["original_width"], row["original_height"]) >= 200
        and max(row["original_width"], row["original_height"]) / min(row["original_width"], row["original_height"]) <= 3
    ]
    found = np.load(root / "selection" / "subset.npy")
    assert found.dtype == np.dtype("u8,u8") and found.tolist() == sorted(expected) and 5 < len(found) < 40
    notes = read_rows(root / "annotations" / "datacomp")
    assert notes["clip_score"].to_pylist()[:40] == pytest.approx(
        pq.read_table(metadata / "000.parquet")["clip_b32_similarity_score"].to_pylist()
    )


def test_embeddings_are_those_of_the_scores_model(metadata, tmp_path):
    (metadata / "001.parquet").unlink()
    read_metadata(metadata, tmp_path / "p", tmp_path / "n")
    column = read_rows(tmp_path / "n")["image_embedding"]
    assert column.type.list_size == 6 and column[0].as_py() == [2.0] * 6
    np.savez(metadata / "000.npz", l14_img=np.ones((3, 6)))
    with pytest.raises(UserError, match="found 3 embeddings; expected 40"):
        read_metadata(metadata, tmp_path / "p", tmp_path / "n")


def test_missing_columns_and_files_are_named(metadata, tmp_path):
    with pytest.raises(UserError, match=r"000\.parquet: found columns .*expected clip_x too; name the score column"):
        read_metadata(metadata, tmp_path / "p", tmp_path / "n", "clip_x")
    with pytest.raises(UserError, match=r"no \.parquet file"):
        read_metadata(tmp_path, tmp_path / "p", tmp_path / "n")
