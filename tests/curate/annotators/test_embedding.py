"""Linear probes on embeddings, from files that run no code."""

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file

from vlmpipe.curate.annotators.base import Batch, Tools
from vlmpipe.curate.annotators.embedding import Probe, read_head
from vlmpipe.errors import UserError

EMBEDDINGS = pa.FixedSizeListArray.from_arrays(pa.array(np.array([1, 0, 0, 0.5, 0.25, 0], np.float16)), 3)


def probe(file, **config) -> list[float]:
    annotator = Probe(Probe.Config(file, **config), Tools(), "probe_x")
    assert [field.name for field in annotator.fields] == ["probe_x"]
    return annotator(Batch([], ["", ""], {"image_embedding": EMBEDDINGS}))[0].to_pylist()


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1)])
def test_a_probe_is_a_dot_product_and_a_bias(tmp_path, shape):
    weight = np.array([2, 4, 8], np.float32).reshape(shape)
    save_file({"weight": weight, "bias": np.array([0.5], np.float32)}, tmp_path / "head.safetensors")
    np.savez(tmp_path / "head.npz", weight=weight, bias=np.float64(0.5))
    assert probe(tmp_path / "head.safetensors") == probe(tmp_path / "head.npz") == [2.5, 2.5]
    expected = 1 / (1 + np.exp(-2.5))
    assert probe(tmp_path / "head.npz", activation="sigmoid") == pytest.approx([expected] * 2)


def test_a_head_without_bias(tmp_path):
    np.savez(tmp_path / "head.npz", weights=np.ones(3))
    assert read_head(tmp_path / "head.npz")[1] == 0 and probe(tmp_path / "head.npz") == [1.0, 0.75]


def test_files_that_are_no_head_say_so(tmp_path):
    with pytest.raises(UserError, match=r"found no file .*gone\.npz"):
        read_head(tmp_path / "gone.npz")
    np.savez(tmp_path / "pickle.npz", weight=np.array([{"a": 1}], object))
    with pytest.raises(UserError, match=r"pickle\.npz: found no readable tensors"):
        read_head(tmp_path / "pickle.npz")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    with pytest.raises(UserError, match="found no readable tensors"):
        read_head(tmp_path / "noise.safetensors")
    np.savez(tmp_path / "two.npz", weight=np.ones((2, 3)))
    with pytest.raises(UserError, match=r"found weight \[2, 3\]; expected weight \[E\]"):
        read_head(tmp_path / "two.npz")
    np.savez(tmp_path / "wide.npz", weight=np.ones(7))
    with pytest.raises(UserError, match="found a weight of 7 numbers; expected 3"):
        probe(tmp_path / "wide.npz")
