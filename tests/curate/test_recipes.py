"""Each named recipe against its published rule, on tables by hand, read from configs/ as a workspace would."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from tests.curate.made_pools import made_rows
from vlmpipe.compose import compose
from vlmpipe.config import parse
from vlmpipe.curate.annotate import AnnotateConfig
from vlmpipe.curate.filters import SelectConfig, decide
from vlmpipe.stages import validate

CURATION = Path(__file__).parents[2] / "configs" / "curation"


def recipe(name: str, **rules) -> SelectConfig:
    settings = yaml.safe_load((CURATION / f"{name}.yaml").read_text())["select"] | {"pools": []}
    for rule, changes in rules.items():
        settings["rules"][rule] = settings["rules"][rule] | changes
    return parse(SelectConfig, settings, name)


def kept(rows, config: SelectConfig) -> np.ndarray:
    decisions, steps = decide(rows, config.ordered())
    decisions.funnel(steps)
    return pa.concat_tables(decisions.tables())["kept"].to_numpy()


@pytest.mark.parametrize("path", sorted(CURATION.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(path):
    config = yaml.safe_load(path.read_text())
    assert recipe(path.stem).order[:2] == ("downloaded", "decoded")
    parse(AnnotateConfig, config["annotate"], path.stem)


@pytest.mark.parametrize("name", ["dfn", "t-mars"])
def test_a_recipe_is_swapped_in_and_its_numbers_are_set(name):
    rule = "top_score" if name == "dfn" else "top_masked"
    changes = [f"curation={name}", f"curation.select.rules.{rule}.top_fraction=0.2"]
    params = compose("tiny", changes, CURATION.parent)
    validate(params, "configs")
    assert params["curation"]["select"]["rules"][rule]["top_fraction"] == 0.2
    assert ("tmars" in params["curation"]["annotate"]) == (name == "t-mars")


def test_datacomp_basic():
    """facts: top-1 English, len(split) > 2, len > 5, min(w, h) >= 200, max / min <= 3.0; every edge is in the table."""
    rng = np.random.default_rng(5)
    n = 600
    columns = {
        "original_width": rng.choice([199, 200, 201, 600, 601, 660], n), "caption_words": rng.choice([1, 2, 3, 9], n),
        "original_height": rng.choice([199, 200, 220, 600], n), "caption_chars": rng.choice([4, 5, 6, 40], n),
        "language": rng.choice(["en", "de", "und"], n, p=[0.8, 0.1, 0.1]), "language_score": rng.random(n),
    }
    expected = [
        lang == "en" and words > 2 and chars > 5 and min(w, h) >= 200 and max(w, h) / min(w, h) <= 3.0
        for w, words, h, chars, lang, _ in zip(*columns.values())
    ]
    assert kept(made_rows(n, **columns), recipe("datacomp-basic")).tolist() == expected
    assert 0 < sum(expected) < n
    nothing = made_rows(1, original_width=[np.nan], language=[None])
    assert not kept(nothing, recipe("datacomp-basic")).any() and not len(kept(made_rows(0), recipe("datacomp-basic")))


def test_clip_top30_is_the_published_threshold_of_the_whole_pool():
    scores = np.random.default_rng(1).permutation(100) / 100
    rows = made_rows(100, clip_score=scores)
    expected = scores >= -np.sort(-scores)[int(100 * 0.3)]
    assert kept(rows, recipe("clip-top30")).tolist() == expected.tolist() and expected.sum() == 31
    tied = np.repeat([0.1, 0.2, 0.3], [50, 45, 5])
    assert kept(made_rows(100, clip_score=tied), recipe("clip-top30")).sum() == 50
    holes = np.where(np.arange(100) % 2, np.nan, scores)
    finite = holes[::2]
    expected = holes >= -np.sort(-finite)[15]
    assert kept(made_rows(100, clip_score=holes), recipe("clip-top30")).tolist() == expected.tolist()


def test_dfn_and_t_mars_keep_their_fraction_of_the_whole_pool():
    scores = np.random.default_rng(2).permutation(200) / 200
    assert (kept(made_rows(200, clip_score=scores), recipe("dfn")) == (scores >= 0.85)).all()
    masked = made_rows(200, masked_clip_score=scores)
    assert (kept(masked, recipe("t-mars")) == (scores >= 0.5)).all()


def test_image_based_and_clip_is_the_intersection_on_the_whole_pool(tmp_path):
    rng = np.random.default_rng(3)
    n, width = 300, 4
    vectors = rng.normal(size=(n, width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    centroids, reference = rng.normal(size=(8, width)), rng.normal(size=(3, width))
    scores, words, language = rng.permutation(n) / n, rng.choice([1, 2, 3], n), rng.choice(["en", "fr"], n)
    np.save(tmp_path / "centroids.npy", centroids)
    np.save(tmp_path / "reference.npy", reference)
    half = vectors.astype(np.float16)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(half.reshape(-1)), width)
    rows = made_rows(n, clip_score=scores, caption_words=words, language=language, image_embedding=embedding)
    files = {"reference": str(tmp_path / "reference.npy"), "centroids": str(tmp_path / "centroids.npy")}
    targets = set((reference @ centroids.T).argmax(axis=1).tolist())
    image_based = [(v @ centroids.T).argmax() in targets for v in half.astype(float)]
    text = (language == "en") & (words > 1)
    clip = scores >= -np.sort(-scores)[int(n * 0.3)]
    expected = np.array(image_based) & text & clip
    assert (kept(rows, recipe("image-based-and-clip", clusters=files)) == expected).all()
    assert 0 < expected.sum() < clip.sum()


def test_semdedup_equals_the_published_loop():
    rng = np.random.default_rng(4)
    centres = rng.normal(size=(12, 8))
    vectors = np.repeat(centres, 10, axis=0) + rng.normal(size=(120, 8)) * rng.choice([0.05, 0.6], 120)[:, None]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 8)
    config = recipe("semdedup", semantic_duplicate={"clusters": 1})
    found = kept(made_rows(120, image_embedding=embedding), config)
    unit = vectors.astype(np.float32) / np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True)
    unit = unit.astype(np.float16).astype(np.float32)
    centroid = unit.sum(axis=0) / np.linalg.norm(unit.sum(axis=0))
    order = np.argsort(unit @ centroid, kind="stable")  # farthest first
    similarity = np.triu(unit[order] @ unit[order].T, 1)
    np.fill_diagonal(similarity, -1)
    similarity[np.tril_indices(120)] = -1
    expected = np.empty(120, bool)
    expected[order] = similarity.max(axis=0) <= 1 - 0.05
    assert (found == expected).all() and 10 < expected.sum() < 110


def test_metaclip_thins_frequent_entries_and_drops_captions_without_one(tmp_path):
    (tmp_path / "metadata.json").write_text('["dog", "black cat", "cat", "owl"]')
    n = 4000
    texts = ["a dog", "dogs run", "black cat, dog", "an owl!"]
    captions = np.random.default_rng(6).choice(texts, n, p=[0.8, 0.1, 0.09, 0.01])
    config = recipe("metaclip", balance={"metadata": str(tmp_path / "metadata.json"), "cap": 300})
    found = kept(made_rows(n, caption=captions.tolist()), config)
    dog, cat = (captions == "a dog") | (captions == "black cat, dog"), captions == "black cat, dog"
    p_dog, p_cat = 300 / dog.sum(), min(1, 300 / cat.sum())
    assert not found[captions == "dogs run"].any() and found[captions == "an owl!"].all()
    assert abs(found[captions == "a dog"].mean() - p_dog) < 0.03
    chance = 1 - (1 - p_dog) * (1 - p_cat) ** 2
    assert abs(found[cat].mean() - chance) < 0.05
