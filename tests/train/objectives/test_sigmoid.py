"""The sigmoid loss against transformers' own SigLIP, in parts and over two processes."""

import pytest
import torch

from tests.models.tiny import PRESETS, make, pictures
from tests.train.rows import on_processes
from vlmpipe.config import parse
from vlmpipe.errors import UserError
from vlmpipe.models import VLMConfig, build
from vlmpipe.models.parity import random_module
from vlmpipe.models.pretrained import convert
from vlmpipe.models.processor import stack
from vlmpipe.train import cached
from vlmpipe.train.objectives import OBJECTIVES, Contrastive, objective_for
from vlmpipe.train.objectives.sigmoid import Sigmoid

WORDS = ["a red circle", "a blue square", "two shapes", "how many shapes are there? two"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_siglip():
    preset = PRESETS["dual"]
    vision = {**preset["vision"], "stem": "patch", "pool": "attention"}
    heads = {"projection": {"width": 32, "temperature": 0.1, "image": "none", "text": "affine", "bias": -3.0}}
    return build(parse(VLMConfig, {**preset, "vision": vision, "heads": heads}, "siglip"), WORDS)


def make_batch(processor, words=WORDS):
    return {"images": processor.images(pictures(len(words))), **stack([[processor.encode(text)] for text in words])}


def test_loss_and_gradients_equal_transformers():
    config, theirs = random_module("siglip")
    model = convert(config.to_dict(), theirs.state_dict())
    torch.manual_seed(0)
    tokens, pixels = torch.randint(3, 29, (4, 7)), torch.randn(4, 3, 20, 20)
    places = torch.arange(7).expand(4, -1)
    loss, _ = Sigmoid()(
        model, {"images": pixels, "tokens": tokens, "segments": torch.ones_like(tokens), "positions": places}
    )
    expected = theirs(input_ids=tokens, pixel_values=pixels, return_loss=True).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for ours, other in (
        (model.projection.logit_bias, theirs.logit_bias), (model.projection.logit_scale, theirs.logit_scale),
        (model.vision.pooling.probe, theirs.vision_model.head.probe),
        (model.text.token_embedding.weight, theirs.text_model.embeddings.token_embedding.weight),
    ):
        assert (ours.grad.flatten() - other.grad.flatten()).abs().max() <= 1e-5 * other.grad.abs().max()


def test_equal_texts_of_other_pictures_do_not_count():
    model, processor = make_siglip()
    batch = make_batch(processor, ["a red circle", "a blue square", "a red circle"])
    embedded = Sigmoid().embed(model, batch)
    logits = embedded["scale"] * embedded["image"] @ embedded["text"].T + embedded["bias"]
    signs = 2 * torch.eye(3) - 1
    terms = -torch.nn.functional.logsigmoid(signs * logits)
    terms[0, 2] = terms[2, 0] = 0
    torch.testing.assert_close(Sigmoid().loss(embedded)[0], terms.sum() / 3)


def test_the_bias_is_what_chooses_the_objective_and_is_asked_for():
    model, _ = make_siglip()
    assert objective_for(model) == OBJECTIVES["sigmoid"]() == Sigmoid()
    plain, processor = make("dual")
    assert isinstance(objective_for(plain), Contrastive) and not isinstance(objective_for(plain), Sigmoid)
    with pytest.raises(UserError, match=r"heads\.projection\.bias: found none"):
        Sigmoid()(plain, make_batch(processor))


def test_accuracy_is_of_each_pictures_likeliest_text():
    embedded = {
        "image": torch.eye(3), "text": torch.eye(3)[[0, 2, 1]], "ids": torch.arange(3), "scale": torch.tensor(5.0),
        "bias": torch.tensor(-1.0),
    }
    assert Sigmoid().loss(embedded)[1]["accuracy"] == pytest.approx(1 / 3)


def result(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Loss and gradients of a process's rows."""
    model, processor = make_siglip()
    share = len(WORDS) // world
    rows = {name: value[rank * share : (rank + 1) * share] for name, value in make_batch(processor).items()}
    loss, _ = Sigmoid()(model, rows)
    loss.backward()
    learned = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {"loss": loss.detach(), **learned}


def on_two(out: str) -> None:
    found = result(torch.distributed.get_rank(), 2)
    for value in found.values():  # what DistributedDataParallel does: the mean over processes
        torch.distributed.all_reduce(value)
        value /= 2
    if torch.distributed.get_rank() == 0:
        torch.save(found, out)


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    on_processes(2, on_two, str(tmp_path / "result.pt"))
    found, expected = torch.load(tmp_path / "result.pt", weights_only=True), result(0, 1)
    assert found.keys() == expected.keys() and {"projection.logit_bias", "projection.logit_scale"} < found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_batch_in_parts_can_have_the_loss_of_the_whole():
    assert isinstance(Sigmoid(), cached.Cacheable)
    model, processor = make_siglip()
    batch = make_batch(processor)
    halves = [{name: value[at : at + 2] for name, value in batch.items()} for at in (0, 2)]
    joined = cached.join([Sigmoid().embed(model, half) for half in halves])
    torch.testing.assert_close(Sigmoid().loss(joined)[0], Sigmoid()(model, batch)[0])
