"""The zero-shot detector at its published size, OWL-ViT B/32."""

import torch
import transformers

from tests.models.published.test_clipseg import config, count
from vlmpipe.models import VisionLanguageModel


def test_it_has_the_parameters_of_the_released_one():
    with torch.device("meta"):
        model = VisionLanguageModel(config("detector-owlvit-b32"))
        # Defaults are those of google/owlvit-base-patch32.
        theirs = transformers.OwlViTForObjectDetection(transformers.OwlViTConfig())
    assert count(model) == count(theirs)


def test_the_small_one_parses_and_gives_a_box_for_every_patch():
    model = VisionLanguageModel(config("detector").with_vocab(64)).eval()
    assert 0.9e6 < count(model) < 2e6
    words = {"tokens": torch.ones(2, 3, dtype=torch.int64)}
    words |= {"segments": words["tokens"], "positions": torch.arange(3).expand(2, -1)}
    with torch.no_grad():
        outputs = model(images=torch.zeros(1, 3, 64, 64), image_rows=torch.tensor([0]), **words)
    assert outputs.boxes.shape == (1, 64, 4) and outputs.classes.shape == (1, 64, 2)
