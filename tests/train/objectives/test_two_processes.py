"""Masked, matching, answering and writing objectives over two processes give the loss and the gradients of one."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.models.fusion.small import images, make_small
from tests.models.joined import WORDS, batch, make
from vlmpipe.models.processor import stack
from vlmpipe.train.objectives import OBJECTIVES, PrefixLM, make_objective
from vlmpipe.train.objectives.prefix_lm import cut

CODES = {"predicts": "codes", "codes": 9, "codebook": {}}
CASES = {
    "masked_text": "single_stream",
    "masked_image": "multimodal",
    "masked_multimodal": "co_attention",
    "matching": "single_stream",
    "matching_hard": "multimodal",
    "answers": "co_attention",
    "statements": "single_stream",
    "mixture": "multimodal",
    "prefix_lm": "simvlm",
    "image_tokens": "text-to-image",
}
MIXTURE = {"contrastive": 1.0, "matching_hard": 0.5, "masked_multimodal": 2.0}


def whole_batch(processor):
    """Four rows, with uneven numbers of hidden words and patches."""
    rows = batch(processor)
    labels = torch.full_like(rows["tokens"], -100)
    for row, places in enumerate(([1], [1, 2, 4], [2], [3])):
        labels[row, places] = rows["tokens"][row, places]
    hidden = torch.zeros(4, 16, dtype=torch.bool)
    hidden[:, 3], hidden[0, :4] = True, True
    generator = torch.Generator().manual_seed(5)
    return {
        **rows,
        "masked_tokens": rows["tokens"].masked_fill(labels != -100, 4), "masked_labels": labels, "patch_mask": hidden,
        "answers": torch.rand(4, 7, generator=generator),
        "negatives": torch.tensor([0, 3, 1, 3]),
        "negative_images": torch.tensor([2, 0, 3, 1]), "negative_texts": torch.tensor([3, 2, 0, 1]),
    }


def statements(processor):
    rows = batch(processor, images=8)
    return {**rows, "image_rows": torch.arange(8) // 2, "statement_labels": torch.tensor([0, 1, 1, 0])}


def made(name):
    """(model, objective, whole batch) of a case, with nothing left to chance: each process would draw for itself."""
    if name == "prefix_lm":
        model, processor = make_small(CASES[name])
        return model, PrefixLM(random=False), beginnings(processor)
    if name == "image_tokens":
        model, processor = make_small(CASES[name])
        return model, make_objective(name, model), {"images": images(4), **captions(processor)}
    model, processor = make(CASES[name], **({"masked_image": CODES} if name == "mixture" else {}))
    objective = make_objective(MIXTURE if name == "mixture" else name, model)
    return model, objective, statements(processor) if name == "statements" else whole_batch(processor)


def captions(processor):
    found = stack([[processor.encode(text)] for text in WORDS])
    return {name: found[name] for name in ("tokens", "segments", "positions")}


def beginnings(processor):
    """Rows of one to four texts, cut at random: processes learn different numbers of words."""
    rows = stack([[processor.encode_answer("what?", text) for text in WORDS[: count + 1]] for count in range(4)])
    torch.manual_seed(2)
    prefix, labels = cut(rows["segments"], rows["labels"], rows["prefix"])
    assert (prefix != rows["prefix"]).any()
    return {**rows, "images": images(4), "prefix": prefix, "labels": labels}


def part(rows, rank, world):
    """The rows of a process; its words are cut to its own longest."""
    share = 4 // world
    found = {}
    for name, value in rows.items():
        count = share * len(value) // 4
        found[name] = value[rank * count : (rank + 1) * count]
    if "image_rows" in found:
        found["image_rows"] = found["image_rows"] - rank * share
    length = int((found["segments"] != 0).sum(dim=1).max())
    words = ("tokens", "segments", "positions", "masked_tokens", "masked_labels", "prefix", "labels")
    return {name: value[:, :length] if name in words else value for name, value in found.items()}


def result(name, rank, world):
    """Loss, metrics and gradients of one process."""
    model, objective, rows = made(name)
    loss, metrics = objective(model, part(rows, rank, world))
    loss.backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    return {"loss": loss.detach(), **metrics, **gradients}


def one_rank(rank, world, port, out):
    os.environ.update(GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    results = {}
    for name in CASES:
        found = result(name, rank, world)
        # What DistributedDataParallel does: the mean over processes.
        for value in found.values():
            dist.all_reduce(value)
            value /= world
        results[name] = found
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(one_rank, (2, port, str(tmp_path / "result.pt")), nprocs=2)
    results = torch.load(tmp_path / "result.pt", weights_only=True)
    assert set(CASES) - {"mixture"} < set(OBJECTIVES)
    for name in CASES:
        expected, found = result(name, 0, 1), results[name]
        assert found.keys() == expected.keys() and len(found) > 20
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, where=f"{name} {key}": f"{where}: {text}"
            )
