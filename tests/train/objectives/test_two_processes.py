"""Masked, matching and answering objectives over two processes give the loss and the gradients of one."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.models.joined import batch, make
from vlmpipe.train.objectives import OBJECTIVES, make_objective

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
    words = ("tokens", "segments", "positions", "masked_tokens", "masked_labels")
    return {name: value[:, :length] if name in words else value for name, value in found.items()}


def result(name, rank, world):
    """Loss, metrics and gradients of one process."""
    heads = {"masked_image": CODES} if name == "mixture" else {}
    model, processor = make(CASES[name], **heads)
    rows = part(statements(processor) if name == "statements" else whole_batch(processor), rank, world)
    loss, metrics = make_objective(MIXTURE if name == "mixture" else name, model)(model, rows)
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
