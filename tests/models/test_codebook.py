"""Codes of patches. That the encoder of DALL-E equals FLAVA's: tests/models/pretrained."""

import pytest
import torch

from tests.models.joined import make
from vlmpipe.errors import UserError
from vlmpipe.models import load, save
from vlmpipe.models.codebook import CODEBOOKS, CodebookConfig, patchify


def test_patches_come_by_row_column_colour():
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4], images[1, :, 2:4, 2:4].permute(1, 2, 0).flatten())


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_a_code_a_patch(kind):
    torch.manual_seed(0)
    book = CODEBOOKS[kind](CodebookConfig(kind, width=4, blocks=1), 50, 8)
    images = torch.randint(0, 256, (3, 3, 16, 24), dtype=torch.uint8)
    codes = book(images)
    assert codes.shape == (3, 6) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < 50
    assert torch.equal(book(images[[1]]), codes[[1]])
    with pytest.raises(UserError, match="a codebook expects raw pixels"):
        book(images.float())


def test_random_codes_are_the_nearest_vectors_and_tell_colours_apart():
    torch.manual_seed(0)
    book = CODEBOOKS["random"](CodebookConfig(), 64, 4)
    flat = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8)
    images = flat[:, :, None, None].expand(4, 3, 4, 4)
    assert len(set(book(images)[:, 0].tolist())) == 4
    patch = (images[0].permute(1, 2, 0).flatten() / 255 - 0.5) @ book.projection
    distances = (patch / patch.norm() - book.codes).norm(dim=1)
    assert book(images)[0, 0] == distances.argmin()


def test_a_codebook_is_saved_and_never_trained(tmp_path):
    for codebook in ({}, {"kind": "dalle", "width": 4}):
        model, processor = make("multimodal", masked_image={"predicts": "codes", "codes": 9, "codebook": codebook})
        assert not any(parameter.requires_grad for parameter in model.masked_image.codebook.parameters())
        save(model, processor, tmp_path)
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        assert torch.equal(load(tmp_path)[0].masked_image.codebook(images), model.masked_image.codebook(images))
