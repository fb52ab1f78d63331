"""A toy problem for the loop: rows whose sum is to be learned, and models that can."""

import json
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from tests.models.tiny import TRANSFORMER
from vlmpipe.models.layers import Block, Transformer, TransformerConfig
from vlmpipe.train.loop import TrainConfig
from vlmpipe.train.optim import OptimizerConfig, ScheduleConfig
from vlmpipe.train.parallel import place

OPTIMIZER = OptimizerConfig(lr=0.01, schedule=ScheduleConfig(warmup=2))
CONFIG = TrainConfig(steps=20, batch_size=6, optimizer=OPTIMIZER, checkpoint_every=5, log_every=2)


class Rows:
    """Thirty-two rows of numbers with their sums; each worker takes its part of a batch of `size` rows."""

    def __init__(self, size: int = CONFIG.batch_size, asked: Path | None = None):
        self.size, self.asked = size, asked
        self.rows = torch.randn(32, 5, generator=torch.Generator().manual_seed(1))

    def at(self, step: int) -> dict[str, Tensor]:
        rank, world = place()
        share = self.size // world
        start = step * self.size + rank * share
        places = torch.arange(start, start + share) % len(self.rows)
        if self.asked is not None:
            with open(self.asked, "a", encoding="utf-8") as file:
                file.write(json.dumps([step, rank, places.tolist()]) + "\n")
        return {"x": self.rows[places], "y": self.rows[places].sum(1)}


class Toy(nn.Module):
    """Two transformer blocks over the numbers of a row, with dropout, a scalar and a part that nothing uses."""

    def __init__(self, dropout: float = 0.2):
        super().__init__()
        self.embed = nn.Linear(1, 32)
        self.transformer = Transformer(TransformerConfig(**{**TRANSFORMER, "dropout": dropout}))
        self.read = nn.Linear(32, 1)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.unused = nn.Linear(3, 3)

    def forward(self, x_BT: Tensor) -> Tensor:
        x_BTD = self.transformer(self.embed(x_BT[..., None]))
        return self.scale * self.read(x_BTD.mean(dim=1))[:, 0]


def make_toy(dropout: float = 0.2) -> Toy:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    return Toy(dropout)


def blocks(model: nn.Module) -> list[Block]:
    return [part for part in model.modules() if isinstance(part, Block)]


def squared_error(model, batch):
    error = model(batch["x"]) - batch["y"]
    return error.square().mean(), {"error": error.abs().mean()}


def curve(state: Path) -> list[dict]:
    return [json.loads(line) for line in (state / "curves.jsonl").read_text().splitlines()]


def _rank(rank: int, world: int, port: int, function, arguments: tuple) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    function(*arguments)
    dist.destroy_process_group()


def on_processes(world: int, function, *arguments) -> None:
    """Call a module-level function on `world` processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_rank, (world, port, function, arguments), nprocs=world)
