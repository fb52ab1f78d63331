"""Pictures from words: the codes of a picture are sampled one after another, then looked up.

Shapes: B captions, N codes of a picture, K codes to choose from.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.generate.rows import to_device
from vlmpipe.models.layers import Cache
from vlmpipe.models.processor import EncodedText, Processor, stack
from vlmpipe.models.vlm import VisionLanguageModel


def draw(
    model: VisionLanguageModel,
    processor: Processor,
    captions: Sequence[str],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    guidance: float = 1.0,
    seed: int | Sequence[int] = 0,
) -> list[Image.Image]:
    """One picture per caption.

    Args:
        temperature: 0 takes the likeliest code each time.
        top_k: sample among so many of the likeliest codes only; 0: among all.
        guidance: how far to go from the logits without a caption to those with it, and beyond at more than 1
            (arXiv 2207.12598); 1 asks the model once instead of twice.
        seed: picture number i is drawn with seed + i, or with its own of as many.

    Raises:
        UserError: the model writes no pictures, or a number makes no sense.
    """
    if model.image_tokens is None:
        raise UserError("found a model without an image_tokens head; expected one; use model=text-to-image")
    if temperature < 0 or top_k < 0:
        raise UserError(f"found temperature {temperature}, top_k {top_k}; expected at least 0")
    codes_BN = sample_codes(model, processor, captions, temperature, top_k, guidance, seed)
    pixels = model.codes.decode(codes_BN).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


@torch.no_grad()
def picture_loss(model: VisionLanguageModel, processor: Processor, images: Tensor, captions: Sequence[str]) -> Tensor:
    """[B] summed negative log-likelihood in nats of the codes of each picture, uint8 [B, C, Y, X], given its caption.

    With another picture's captions it tells how much the words count.
    """
    words = to_device(stack([[processor.encode(caption)] for caption in captions]), model)
    outputs = model(images=images.to(model.device), **words)
    losses_BN = F.cross_entropy(outputs.image_logits.float().transpose(1, 2), outputs.image_codes, reduction="none")
    return losses_BN.sum(dim=1)


@torch.no_grad()
def sample_codes(model, processor, captions, temperature, top_k, guidance, seed) -> Tensor:
    """[B, N]."""
    rows = [[processor.encode(caption)] for caption in captions]
    if guidance != 1:
        rows += [[EncodedText((processor.bos,), 0)]] * len(captions)
    words = to_device(stack(rows), model)
    seeds = [seed + place for place in range(len(captions))] if isinstance(seed, int) else seed
    generators = [torch.Generator().manual_seed(own) for own in seeds]
    cache, written = Cache(), []
    next_B1 = torch.full((len(rows), 1), model.codes.config.start, device=model.device)
    for _ in range(model.codes.config.length):
        logits_BK = model(**words, codes=next_B1, cache=cache).image_logits[:, -1].float()
        if guidance != 1:
            with_caption, without = logits_BK.chunk(2)
            logits_BK = without + guidance * (with_caption - without)
        code_B = choose(logits_BK, temperature, top_k, generators).to(model.device)
        written.append(code_B)
        next_B1 = code_B.repeat(len(rows) // len(captions))[:, None]
    return torch.stack(written, dim=1)


def choose(logits_BK: Tensor, temperature: float, top_k: int, generators: Sequence[torch.Generator]) -> Tensor:
    """[B] one code per row, each drawn with its own generator."""
    if temperature == 0:
        return logits_BK.argmax(dim=-1)
    logits_BK = logits_BK.cpu() / temperature
    if top_k:
        least = logits_BK.topk(min(top_k, logits_BK.shape[1])).values[:, -1:]
        logits_BK = logits_BK.masked_fill(logits_BK < least, -torch.inf)
    chances_BK = logits_BK.softmax(dim=-1)
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(chances_BK, generators, strict=True)]
    return torch.cat(drawn)
