"""What was hidden: words, patches, or both at once.

Shapes: B rows of this process, T words, M scored words, V vocabulary, n pictures, N patches, K codes or numbers of a
patch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.codebook import patchify
from vlmpipe.models.collective import mean
from vlmpipe.train.objectives.base import Batch, Result, model_inputs, require

IGNORED = -100
KEPT, RANDOM = 0.1, 0.1  # of the words that are to be predicted, shown as they are and as another word


# --- words -----------------------------------------------------------------------------------------------

def hide_words(batch: Batch, config, vocab_size: int, share: float) -> tuple[Tensor, Tensor]:
    """BERT's masking (arXiv 1810.04805, section 3.1): tokens [B, T] as shown, and labels [B, T], -100 where nothing is
    asked. Of the chosen words 80% are shown as the mask, 10% as a random word, 10% as they are.

    config: of the masked_text head, which knows the special tokens.
    """
    if "masked_tokens" in batch:
        return batch["masked_tokens"], batch["masked_labels"]
    tokens_BT = batch["tokens"]
    open_BT = (batch["segments"] != 0) & (tokens_BT >= config.first_word)
    chosen_BT, how_BT = (torch.rand(tokens_BT.shape, device=tokens_BT.device) for _ in range(2))
    chosen_BT = (chosen_BT < share) & open_BT
    others_BT = torch.randint_like(tokens_BT, config.first_word, vocab_size)
    shown_BT = torch.where(how_BT < RANDOM, others_BT, config.mask_token)
    shown_BT = torch.where(chosen_BT & (how_BT < 1 - KEPT), shown_BT, tokens_BT)
    return shown_BT, tokens_BT.masked_fill(~chosen_BT, IGNORED)


def word_loss(logits_MV: Tensor, labels_BT: Tensor) -> Result:
    """Cross entropy, the mean over all scored words of all processes."""
    labels_M = labels_BT[labels_BT != IGNORED]
    share = 1 / mean(logits_MV.new_tensor(labels_M.numel(), dtype=torch.float32)).clamp(min=1)
    hits = (logits_MV.argmax(dim=-1) == labels_M).sum()
    total = F.cross_entropy(logits_MV.float(), labels_M, reduction="sum")
    return total * share, {"accuracy": (hits * share).detach()}


@dataclass(frozen=True)
class MaskedText:
    """Masked language modelling (BERT; with the picture in sight as in ViLBERT, VisualBERT and ViLT).

    Batch: tokens, segments, positions, and images unless `alone` (a text without its picture, as FLAVA's unimodal
    loss). `masked_tokens` and `masked_labels` [B, T] instead of a draw.
    """

    share: float = 0.15
    alone: bool = False

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        require(self, batch, "tokens", "segments", "positions")
        config = head(model, "masked_text")
        tokens_BT, labels_BT = hide_words(batch, config, model.config.text.vocab_size, self.share)
        inputs = model_inputs(batch, tokens=tokens_BT, select=labels_BT != IGNORED)
        if self.alone:
            inputs = without(inputs, "images", "image_rows", "image_places", "frames", "grids")
        return word_loss(model(**inputs, heads=("masked_text",)).text_logits, labels_BT)


# --- patches ---------------------------------------------------------------------------------------------

def hide_patches(batch: Batch, patches: int, share: float) -> Tensor:
    """[n, N] bool: as many random patches of each picture, `share` of all."""
    if "patch_mask" in batch:
        return batch["patch_mask"]
    images = batch["images"]
    count = max(1, round(patches * share))
    order = torch.rand(len(images), patches, device=images.device).argsort(dim=1)
    return order < count


def patch_count(model: nn.Module, images: Tensor) -> int:
    """N; features of regions [n, N, D] come as patches."""
    if images.ndim == 3:
        return images.shape[1]
    patch = model.config.vision.patch_size
    return (images.shape[-2] // patch) * (images.shape[-1] // patch)


def patch_targets(model: nn.Module, batch: Batch) -> Tensor:
    """What the head predicts of every patch: [n, N, K] numbers or shares of classes, or [n, N] codes."""
    own, images = model.masked_image, batch["images"]
    if own.config.predicts == "features":
        return images.float()
    if own.config.predicts == "pixels":
        return patchify(model.vision.normalise(images), model.config.vision.patch_size)
    if "codes" in batch:
        return batch["codes"]
    if own.codebook is None:
        raise UserError("found no `codes` in the batch and no heads.masked_image.codebook; expected one of them")
    return own.codebook(images)


def patch_loss(outputs, target: Tensor, hidden_nN: Tensor) -> Tensor:
    """The mean over hidden patches of all processes: squared error, cross entropy with codes, or, where the target is a
    distribution over classes, the divergence of the prediction from it (ViLBERT)."""
    target_M = target[hidden_nN]
    if outputs.patch_logits is None:
        error_M = (outputs.patch_values[hidden_nN].float() - target_M).square().mean(dim=-1)
    elif target_M.ndim == 1:
        error_M = F.cross_entropy(outputs.patch_logits[hidden_nN].float(), target_M, reduction="none")
    else:
        logs_MK = outputs.patch_logits[hidden_nN].float().log_softmax(dim=-1)
        error_M = F.kl_div(logs_MK, target_M, reduction="none").sum(dim=-1)
    return error_M.sum() / mean(error_M.new_tensor(len(error_M))).clamp(min=1)


@dataclass(frozen=True)
class MaskedImage:
    """Masked image modelling on what the head predicts: pixels as MAE and SimMIM (arXiv 2111.06377, 2111.09886), codes
    as BEiT and FLAVA, features or classes of regions as ViLBERT.

    Batch: images; tokens, segments and positions unless `alone`. `codes` [n, N] int64, or [n, N, K] shares of
    classes, where the head predicts codes without a codebook. `patch_mask` [n, N] bool instead of a draw.
    """

    share: float = 0.4
    alone: bool = False

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        require(self, batch, "images", *([] if self.alone else ["tokens", "segments", "positions"]))
        head(model, "masked_image")
        hidden_nN = hide_patches(batch, patch_count(model, batch["images"]), self.share)
        inputs = model_inputs(batch, patch_mask=hidden_nN)
        if self.alone:
            inputs = without(inputs, "tokens", "segments", "positions", "types", "image_places", "image_rows")
        outputs = model(**inputs, heads=("masked_image",))
        return patch_loss(outputs, patch_targets(model, batch), hidden_nN), {}


@dataclass(frozen=True)
class MaskedMultimodal:
    """Words and patches hidden in the same pass, the sum of both losses (FLAVA's masked multimodal modelling).

    Batch: as of masked_text and masked_image.
    """

    text_share: float = 0.15
    image_share: float = 0.4

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        require(self, batch, "images", "tokens", "segments", "positions")
        config, vocab_size = head(model, "masked_text"), model.config.text.vocab_size
        head(model, "masked_image")
        tokens_BT, labels_BT = hide_words(batch, config, vocab_size, self.text_share)
        hidden_nN = hide_patches(batch, patch_count(model, batch["images"]), self.image_share)
        inputs = model_inputs(batch, tokens=tokens_BT, select=labels_BT != IGNORED, patch_mask=hidden_nN)
        outputs = model(**inputs, heads=("masked_text", "masked_image"))
        words, metrics = word_loss(outputs.text_logits, labels_BT)
        patches = patch_loss(outputs, patch_targets(model, batch), hidden_nN)
        return words + patches, {**metrics, "text": words.detach(), "image": patches.detach()}


def head(model: nn.Module, name: str):
    """The config of a head.

    Raises:
        UserError: the model has none.
    """
    config = getattr(model.config.heads, name)
    if config is None:
        raise UserError(f"found a model without heads.{name}; expected the head that this objective trains")
    return config


def without(inputs: dict, *names: str) -> dict:
    return {name: value for name, value in inputs.items() if name not in names}
