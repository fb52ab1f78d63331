"""Losses against plain formulas, and over two processes against one."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F

from tests.models.tiny import make, pictures
from vlmpipe.models.processor import stack
from vlmpipe.train.objectives import OBJECTIVES, Contrastive, LanguageModeling, objective_for
from vlmpipe.train.objectives.contrastive import text_ids

WORDS = ["a red circle", "a blue square above a red circle", "two shapes", "how many shapes are there? two"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_batch(processor, decoder: bool):
    """Four rows; a decoder's hold different numbers of answers, so that processes score different numbers of tokens."""
    if decoder:
        rows = [[processor.encode_answer("what?", text) for text in WORDS[: count + 1]] for count in range(4)]
    else:
        rows = [[processor.encode(text)] for text in WORDS]
    return {"images": processor.images(pictures(4)), **stack(rows)}


def rows(batch, start, end):
    return {name: tensor[start:end] for name, tensor in batch.items()}


def statistics(model):
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name}


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# --- the formulas ------------------------------------------------------------------------------------------

def test_contrastive_is_the_mean_of_both_cross_entropies():
    model, processor = make("dual")
    batch = make_batch(processor, decoder=False)
    loss, metrics = Contrastive()(model, batch)
    image = model.encode_image(batch["images"])
    text = model.encode_text(batch["tokens"], batch["segments"], batch["positions"])
    logits = model.projection.logit_scale.exp() * image @ text.T
    target = torch.arange(4)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(loss, expected)
    right = (logits.argmax(1) == target).float().mean() + (logits.argmax(0) == target).float().mean()
    torch.testing.assert_close(metrics["accuracy"], right / 2)


def test_equal_texts_are_no_negatives():
    model, processor = make("dual")
    batch = make_batch(processor, decoder=False)
    for name in ("tokens", "segments", "positions"):
        batch[name][2] = batch[name][0]
    image = model.encode_image(batch["images"])
    text = model.encode_text(batch["tokens"], batch["segments"], batch["positions"])
    logits = model.projection.logit_scale.exp() * image @ text.T
    logits[0, 2] = logits[2, 0] = -torch.inf
    target = torch.arange(4)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(Contrastive()(model, batch)[0], expected)


def test_text_ids_tell_texts_apart_and_not_their_padding():
    _, processor = make("dual")
    texts = [processor.encode(text) for text in (*WORDS, "circle red a", WORDS[0])]
    together, short = stack([[text] for text in texts]), stack([[texts[0]]])
    ids = text_ids(together)
    assert ids[0] == ids[5] == text_ids(short)[0]
    assert len(set(ids.tolist())) == 5


def test_language_modeling_is_the_mean_over_answer_tokens_alone():
    model, processor = make("prefix")
    batch = make_batch(processor, decoder=True)
    loss, _ = LanguageModeling()(model, batch)
    logits = model(**{k: batch[k] for k in ("images", "tokens", "segments", "positions")}).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected)


def test_the_question_is_not_learned():
    _, processor = make("prefix")
    batch = stack([[processor.encode_answer("how many shapes are there?", "two")]])
    scored = batch["tokens"][0, 1:][batch["labels"][0, :-1] != -100].tolist()
    assert scored == [*processor.tokenizer.encode("two").ids, processor.eos]


def test_objective_for_fits_the_heads():
    assert objective_for(make("dual")[0]) == OBJECTIVES["contrastive"]()
    assert objective_for(make("prefix")[0]) == OBJECTIVES["language_modeling"]()


# --- several processes -------------------------------------------------------------------------------------

def one_rank(rank: int, world: int, port: int, preset: str, out: str) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model, processor = make(preset)
    model.train()  # batch norm too is over the whole batch
    batch = make_batch(processor, decoder=preset == "prefix")
    share = 4 // world
    loss, metrics = objective_for(model)(model, rows(batch, rank * share, (rank + 1) * share))
    loss.backward()
    result = {"loss": loss.detach(), **metrics, **gradients(model), **statistics(model)}
    # What DistributedDataParallel does: the mean over processes.
    for tensor in result.values():
        dist.all_reduce(tensor)
        tensor /= world
    if rank == 0:
        torch.save(result, out)
    dist.destroy_process_group()


@pytest.mark.parametrize("preset", ["dual", "prefix"])
def test_two_processes_equal_one_with_the_whole_batch(preset, tmp_path):
    model, processor = make(preset)
    model.train()
    loss, metrics = objective_for(model)(model, make_batch(processor, decoder=preset == "prefix"))
    loss.backward()
    expected = {"loss": loss.detach(), **metrics, **gradients(model), **statistics(model)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "result.pt"
    multiprocessing.spawn(one_rank, (2, port, preset, str(out)), nprocs=2)
    found = torch.load(out, weights_only=True)
    assert found.keys() == expected.keys()
    if preset == "dual":
        assert expected["projection.logit_scale"].abs() > 1e-4
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
