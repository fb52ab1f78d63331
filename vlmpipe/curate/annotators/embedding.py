"""What a dual encoder says: embeddings and their cosine, and linear probes on the picture's embedding."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from vlmpipe.curate.annotators.base import Annotator, Batch, Tools, embedding_rows, floats, several
from vlmpipe.errors import UserError

CHUNK = 16  # pictures that one thread makes ready for the model


class Embeddings(Annotator):
    """Raw cosine of picture and caption in float32, and both unit embeddings rounded to float16.

    `caption_prefix` goes before each caption when it is embedded ("A photo depicts " for CLIPScore as Hessel et al.
    publish it).
    """

    @dataclass(frozen=True)
    class Config:
        caption_prefix: str = ""

    uses_scorer = True

    def __init__(self, config: Config, tools: Tools):
        super().__init__(config, tools)
        embedding = several(pa.float16(), np.asarray(tools.scorer.encode_texts(["width"])).shape[1])
        self.fields = [
            floats("clip_score"), pa.field("image_embedding", embedding), pa.field("text_embedding", embedding),
        ]

    def prepare(self, batch: Batch, mapped: Callable) -> Any:
        chunks = [batch.images[at : at + CHUNK] for at in range(0, len(batch), CHUNK)]
        return list(mapped(self.tools.scorer.pixels, chunks))

    def __call__(self, batch: Batch) -> list[pa.Array]:
        scorer = self.tools.scorer
        pixels = batch.prepared.pop("embeddings", None) or self.prepare(batch, map)
        image_NE = np.asarray(scorer.encode_pixels(pixels))
        text_NE = np.asarray(scorer.encode_texts([self.tools.caption_prefix + text for text in batch.captions]))
        score_N = (image_NE * text_NE).sum(axis=1, dtype=np.float32)
        return [pa.array(score_N), _packed(image_NE), _packed(text_NE)]


def _packed(embedding_NE: np.ndarray) -> pa.Array:
    values = pa.array(embedding_NE.astype(np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, type=several(pa.float16(), embedding_NE.shape[1]))


class Probe(Annotator):
    """A linear head on the picture's unit embedding, from a file: aesthetic, NSFW, watermark, or one's own.

    `file` is safetensors or npz (never a pickle) with `weight` [E] or [1, E] and, if any, `bias` (one number). It must
    have been trained on embeddings of the same scorer. `activation`: `sigmoid` makes a probability of a logit.
    """

    @dataclass(frozen=True)
    class Config:
        file: Path
        activation: Literal["none", "sigmoid"] = "none"

    needs = ("image_embedding",)

    def __init__(self, config: Config, tools: Tools, name: str = "probe"):
        super().__init__(config, tools)
        self.fields = [floats(name)]
        self._weight_E, self._bias = read_head(config.file)

    @staticmethod
    def weights(config: Config) -> tuple[Path, ...]:
        return (config.file,)

    def __call__(self, batch: Batch) -> list[pa.Array]:
        rows_NE = embedding_rows(batch.columns["image_embedding"])
        if rows_NE.shape[1] != len(self._weight_E):
            raise UserError(
                f"{self.config.file}: found a weight of {len(self._weight_E)} numbers; expected {rows_NE.shape[1]}, "
                f"the width of this scorer's embeddings; use a head that was trained on this scorer"
            )
        logits = rows_NE @ self._weight_E + self._bias
        return [pa.array(1 / (1 + np.exp(-logits)) if self.config.activation == "sigmoid" else logits, pa.float32())]


def read_head(file: Path) -> tuple[np.ndarray, float]:
    """(weight float32 [E], bias) of a linear head.

    Raises:
        UserError: no such file, or not a linear head with one output.
    """
    tensors = _tensors(Path(file))
    weight, bias = (tensors.get(key, tensors.get(other)) for key, other in (("weight", "weights"), ("bias", "b")))
    if weight is None or weight.size != max(weight.shape, default=0) or (bias is not None and bias.size != 1):
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items())
        raise UserError(f"{file}: found {shapes or 'nothing'}; expected weight [E] or [1, E] and bias [1]")
    return weight.reshape(-1).astype(np.float32), 0.0 if bias is None else float(bias.reshape(-1)[0])


def _tensors(file: Path) -> Mapping[str, np.ndarray]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(file)
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise UserError(f"found no file {file}; expected a linear head as safetensors or npz; check the path, or take "
                        f"the probe out of curation.annotate.probes") from None
    except Exception as error:  # each format has exceptions of its own for damaged bytes
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: found no readable tensors ({said}); expected safetensors or npz") from None
