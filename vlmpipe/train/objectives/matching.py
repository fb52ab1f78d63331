"""Whether picture and text belong together.

Shapes: B rows of this process with a picture each, G rows of all processes, T words, E width of the shared space.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.models.collective import distributed, gather
from vlmpipe.train.objectives.base import Batch, Result, model_inputs, require
from vlmpipe.train.objectives.contrastive import text_ids
from vlmpipe.train.objectives.masked import head

WORDS = ("tokens", "segments", "positions", "types")


def matching_loss(logits_B2: Tensor, matches_B: Tensor) -> Result:
    """Cross entropy over equally many pairs in every process."""
    hits_B = logits_B2.argmax(dim=1) == matches_B
    return F.cross_entropy(logits_B2.float(), matches_B.long()), {"accuracy": hits_B.float().mean()}


def own_rows(rows: int, device: torch.device) -> Tensor:
    """[B] the numbers of this process's rows among all."""
    return torch.arange(rows, device=device) + (dist.get_rank() if distributed() else 0) * rows


def gather_words(batch: Batch) -> Batch:
    """The words of all processes' rows, filled up to the longest."""
    if not distributed():
        return {name: batch[name] for name in WORDS if name in batch}
    length = torch.tensor(batch["tokens"].shape[1], device=batch["tokens"].device)
    dist.all_reduce(length, dist.ReduceOp.MAX)
    return {name: gather(fill(batch[name], int(length))) for name in WORDS if name in batch}


def fill(words_BT: Tensor, length: int) -> Tensor:
    """Zeros on the right, which are padding in segments."""
    return F.pad(words_BT, (0, length - words_BT.shape[1]))


def others(batch: Batch) -> Tensor:
    """[B, G] true where another row has another text: what may be a negative."""
    ids_B = text_ids(batch)
    return ids_B[:, None] != gather(ids_B)


def draw(weights_BG: Tensor, own_B: Tensor) -> Tensor:
    """[B] a row for each by its weights, or its own where all are zero."""
    some_B = weights_BG.sum(dim=1) > 0
    drawn_B = torch.multinomial(torch.where(some_B[:, None], weights_BG, torch.ones_like(weights_BG)), 1)[:, 0]
    return torch.where(some_B, drawn_B, own_B)


@dataclass(frozen=True)
class Matching:
    """Half of the texts, at random, get the picture of another row of any process (BERT's next sentence for pictures:
    VisualBERT, ViLBERT, ViLT). Rows with the same text are no negatives of one another.

    Batch: images, tokens, segments, positions. `negatives` [B] instead of a draw: the row of the whole batch whose
    picture each text gets; its own is a match.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        require(self, batch, "images", "tokens", "segments", "positions")
        head(model, "matching")
        own_B = own_rows(len(batch["images"]), batch["images"].device)
        shown_B = batch["negatives"] if "negatives" in batch else self.choose(batch, own_B)
        inputs = model_inputs(batch, images=gather(batch["images"])[shown_B])
        return matching_loss(model(**inputs, heads=("matching",)).matching, shown_B == own_B)

    def choose(self, batch: Batch, own_B: Tensor) -> Tensor:
        other_B = draw(others(batch).float(), own_B)
        return torch.where(torch.rand(len(own_B), device=own_B.device) < 0.5, other_B, own_B)


@dataclass(frozen=True)
class HardMatching:
    """Each pair, each text with a picture that looks like its own, each picture with a text that reads like its own
    (ALBEF, arXiv 2107.07651, section 3.2): drawn from all processes' rows by the softmax of the contrastive similarity.

    Batch: images, tokens, segments, positions. `negative_images` and `negative_texts` [B] instead of a draw: rows of
    the whole batch, for each text and each picture.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        require(self, batch, "images", "tokens", "segments", "positions")
        head(model, "matching")
        head(model, "projection")
        if "negative_images" in batch:
            images_B, texts_B = batch["negative_images"], batch["negative_texts"]
        else:
            images_B, texts_B = self.choose(model, batch)
        words, images = gather_words(batch), batch["images"]
        own = own_rows(len(images), images.device)
        inputs = {name: torch.cat([rows[own], rows[own], rows[texts_B]]) for name, rows in words.items()}
        inputs["images"] = torch.cat([images, gather(images)[images_B], images])
        matches = torch.cat([torch.ones_like(own), images_B == own, texts_B == own])
        return matching_loss(model(**inputs, heads=("matching",)).matching, matches)

    @torch.no_grad()
    def choose(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """A picture for each text and a text for each picture."""
        image_BE = model.encode_image(batch["images"])
        text_BE = model.encode_text(batch["tokens"], batch["segments"], batch["positions"])
        scale, allowed_BG = model.projection.scale(), others(batch)
        own_B = own_rows(len(image_BE), image_BE.device)
        drawn = []
        for one_BE, all_BE in ((text_BE, image_BE), (image_BE, text_BE)):
            similar_BG = (scale * one_BE @ gather(all_BE).T).float().softmax(dim=1)
            drawn.append(draw(similar_BG * allowed_BG, own_B))
        return drawn[0], drawn[1]
