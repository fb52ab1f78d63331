"""The verb `embed`: pictures in no pool, embedded by the scorer that `annotate` uses."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.curate.made_pools import jpeg, row, write_pool
from tests.models.tiny import make, pictures
from vlmpipe.__main__ import main
from vlmpipe.curate.vectors import read_vectors
from vlmpipe.images import decode_rgb
from vlmpipe.models import save
from vlmpipe.models.scorer import load_scorer


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A tiny random CLIP."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("scorer")
    save(*make("dual"), directory)
    return directory


def embedded(scorer, where, out) -> dict[str, np.ndarray]:
    assert main(["embed", str(where), "--scorer", str(scorer), "--out", str(out)]) == 0
    table = pq.read_table(out)
    return dict(zip(table["uid"].to_pylist(), np.array(table["image_embedding"].to_pylist(), np.float16)))


def test_a_folder_and_a_shard_directory_give_the_scorers_embeddings(scorer, tmp_path, capsys):
    data = {name: jpeg(image) for name, image in zip(("a", "b", "c"), pictures(3))}
    (tmp_path / "folder" / "below").mkdir(parents=True)
    for name, place in (("a", "a.jpg"), ("b", "below/b.jpeg"), ("c", "c.JPG")):
        (tmp_path / "folder" / place).write_bytes(data[name])
    (tmp_path / "folder" / "notes.txt").write_text("no picture")
    write_pool(tmp_path / "pool", [row("a", data["a"]), row("gone")], [row("b", data["b"]), row("c", data["c"])])
    files = embedded(scorer, tmp_path / "folder", tmp_path / "reference.parquet")
    assert f"3 pictures embedded in {tmp_path / 'reference.parquet'}" in capsys.readouterr().out
    pool = embedded(scorer, tmp_path / "pool", tmp_path / "pool.parquet")
    assert list(files) == ["a.jpg", "below/b.jpeg", "c.JPG"] and list(pool) == ["a", "b", "c"]
    expected = load_scorer(scorer).encode_images([decode_rgb(one) for one in data.values()]).numpy()
    for found in (files, pool):
        assert np.allclose(np.stack(list(found.values())), expected, atol=1e-3)
    names, vectors = read_vectors(tmp_path / "pool.parquet")
    assert names == list(pool) and np.array_equal(vectors, np.stack(list(pool.values())))


def test_nothing_and_a_broken_picture_are_refused(scorer, tmp_path, capsys):
    words = ["--scorer", str(scorer), "--out", str(tmp_path / "out.parquet")]
    (tmp_path / "folder").mkdir()
    assert main(["embed", str(tmp_path / "folder"), *words]) == 2
    assert "found no picture in" in capsys.readouterr().err
    (tmp_path / "folder" / "cut.jpg").write_bytes(jpeg(pictures(1)[0])[:-300])
    assert main(["embed", str(tmp_path / "folder"), *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: found picture cut.jpg broken")
    assert not (tmp_path / "out.parquet").exists()
