"""What scores image-text pairs: a dual encoder of ours, or a CLIP or SigLIP from Hugging Face.

Shapes: N pictures or texts, E width of the shared space.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.images import to_rgb
from vlmpipe.models.directory import is_model, load
from vlmpipe.models.generate import embed_texts

# How each family was trained to see padding; a SigLIP that is fed shorter rows gives other embeddings.
TEXT_PADDING = {"clip": "longest", "siglip": "max_length", "siglip2": "max_length"}
Pixels = dict[str, Tensor]  # by the names that the model's family gives them, each [N, ...]


class Scorer:
    """Pictures and texts into one space, in batches, without gradients, float32 and unit norm.

    The cosine of a pair is the dot product of its rows.
    """

    def __init__(
        self, pixels: Callable, embed_pixels: Callable, embed_texts: Callable, device: torch.device, batch_size: int
    ):
        self._pixels, self._embed_pixels, self._embed_texts = pixels, embed_pixels, embed_texts
        self.device, self.batch_size = device, batch_size

    def pixels(self, images: Sequence[Image.Image]) -> Pixels:
        """What the model sees of N pictures, on the CPU. Threads may make it while the model is at work."""
        return self._pixels(images)

    @torch.inference_mode()
    def encode_pixels(self, parts: Sequence[Pixels]) -> Tensor:
        """[N, E] on the CPU, of all parts together."""
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        batches = zip(*(tensor.split(self.batch_size) for tensor in whole.values()))
        return _unit([self._embed_pixels(**self._placed(dict(zip(whole, batch)))) for batch in batches])

    def _placed(self, pixels: Pixels) -> Pixels:
        return {name: tensor.to(self.device) for name, tensor in pixels.items()}

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """[N, E] on the CPU."""
        return self._in_batches(lambda part: self._embed_pixels(**self._placed(self._pixels(part))), images)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """[N, E] on the CPU."""
        return self._in_batches(self._embed_texts, texts)

    @torch.inference_mode()
    def _in_batches(self, embed: Callable, items: Sequence) -> Tensor:
        if not items:
            raise ValueError("found nothing to embed; expected at least one picture or text")
        parts = [embed(items[at : at + self.batch_size]) for at in range(0, len(items), self.batch_size)]
        return _unit(parts)


def _unit(parts: Sequence[Tensor]) -> Tensor:
    return F.normalize(torch.cat(list(parts)).float(), dim=-1).cpu()


def load_scorer(source: str | Path, device: str | None = None, batch_size: int = 64) -> Scorer:
    """Load a scorer from a directory of ours, or a Hugging Face directory or hub id.

    Raises:
        UserError: nothing there, or a model that isn't a dual encoder.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if is_model(Path(source)):
        return load_own(Path(source), target, batch_size)
    return load_hugging_face(str(source), target, batch_size)


def load_own(directory: Path, device: torch.device, batch_size: int) -> Scorer:
    model, processor = load(directory, device)
    if model.projection is None:
        raise UserError(f"{directory}: found no shared space; expected a dual encoder, as model=clip trains")
    return Scorer(
        lambda images: {"images": processor.images(images)},
        lambda images: model.encode_image(images),
        lambda texts: embed_texts(model, processor, texts),
        device,
        batch_size,
    )


def load_hugging_face(source: str, device: torch.device, batch_size: int) -> Scorer:
    """Through transformers, with its PIL image processors: torchvision is not needed."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type not in TEXT_PADDING:
            raise UserError(f"{source}: found a '{config.model_type}' model; expected one of {', '.join(TEXT_PADDING)}")
        # safetensors only: a pickle could run code, as could that of the directory.
        model = AutoModel.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).to(device).eval()
        pictures = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"can't load the scorer '{source}' ({reason}); expected a model directory or a Hugging Face CLIP or SigLIP "
            f"with safetensors; check the path or the network"
        ) from None
    length = min(config.text_config.max_position_embeddings, tokenizer.model_max_length)
    padding = TEXT_PADDING[config.model_type]

    def pixels(images: Sequence[Image.Image]) -> Pixels:
        return dict(pictures(images=[to_rgb(image) for image in images], return_tensors="pt"))

    def embed_pixels(**values: Tensor) -> Tensor:
        return model.get_image_features(**values).pooler_output

    def embed_words(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt")
        return model.get_text_features(**tokens.to(device)).pooler_output

    return Scorer(pixels, embed_pixels, embed_words, device, batch_size)
