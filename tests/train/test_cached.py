"""Parts of a batch with the loss of the whole: every gradient, dropout and the learned scale included."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.models.tiny import PRESETS, pictures
from tests.train.rows import curve, on_processes
from vlmpipe.config import parse
from vlmpipe.models import VLMConfig, build
from vlmpipe.models.processor import stack
from vlmpipe.train import cached
from vlmpipe.train.loop import Loss, TrainConfig, Trainer, train
from vlmpipe.train.objectives import OBJECTIVES
from vlmpipe.train.objectives.mixture import mixture
from vlmpipe.train.parallel import place

WORDS = ("red", "blue", "green", "white", "one red circle", "two", "a blue square above", "shapes")
CONFIG = TrainConfig(steps=3, batch_size=8, log_every=1, checkpoint_every=3)


def make_dual(dropout: float):
    """A dual encoder without batch norm, whose statistics are of the rows that it sees together."""
    preset = PRESETS["dual"]
    transformer = {**preset["text"]["transformer"], "dropout": dropout}
    preset = {
        **preset, "vision": {**preset["vision"], "stem": "patch", "transformer": transformer},
        "text": {**preset["text"], "transformer": transformer},
    }
    torch.set_num_threads(1)
    return build(parse(VLMConfig, preset, "dual"), WORDS)


class Parts:
    """Eight pictures with a text each, the same in every step, in `parts` parts; a worker has its rows of each."""

    def __init__(self, processor, parts: int):
        self.images, self.parts = processor.images(pictures(8)), parts
        self.texts = [processor.encode(word) for word in WORDS]

    def at(self, number: int):
        rank, world = place()
        size = 8 // self.parts // world
        start = (number % self.parts) * size * world + rank * size
        return {"images": self.images[start : start + size], **stack([[t] for t in self.texts[start : start + size]])}


def trainer(model, batches, parts: int, tmp_path) -> Trainer:
    config = dataclasses.replace(CONFIG, accumulation=parts)
    return Trainer(model, OBJECTIVES["contrastive"](), batches, config, tmp_path, "", None)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def same(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 or not gradient.any(), name
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error <= tolerance or gradient.norm() < 1e-9, f"{name}: {error:g}"


def test_parts_have_the_gradient_of_one_graph_dropout_included(tmp_path):
    """The reference embeds each part with a graph, from the same random state, and differentiates once."""
    model, processor = make_dual(0.3)
    parts = trainer(model.double(), Parts(processor, 4), 4, tmp_path)
    row = parts.gradient()
    found = gradients(model)
    model.zero_grad()
    objective = OBJECTIVES["contrastive"]()
    embedded = [parts.forward(number, Parts(processor, 4).at(number), embeds=True) for number in range(4)]
    joined = {
        name: torch.cat([part[name] for part in embedded]) if embedded[0][name].ndim else embedded[0][name]
        for name in embedded[0]
    }
    loss, _ = objective.loss(joined)
    loss.backward()
    assert row[0] == pytest.approx(loss.item(), rel=1e-6)
    same(found, gradients(model), 1e-6)


def test_parts_have_the_gradient_of_the_whole_batch_and_the_scale_counts_once(tmp_path):
    model, processor = make_dual(0.0)
    trainer(model.double(), Parts(processor, 1), 1, tmp_path).gradient()
    expected = gradients(model)
    model.zero_grad()
    trainer(model, Parts(processor, 4), 4, tmp_path).gradient()
    assert expected["projection.logit_scale"].abs() > 1e-4
    same(gradients(model), expected, 1e-6)


def test_dropout_is_on_in_the_proof(tmp_path):
    model, processor = make_dual(0.3)
    losses = {float(trainer(model, Parts(processor, parts), parts, tmp_path).gradient()[0]) for parts in (1, 2, 4)}
    assert len(losses) == 3  # other masks, other losses


def test_an_objective_in_one_step_is_not_cached():
    assert cached.compares(OBJECTIVES["contrastive"]())
    assert not cached.compares(OBJECTIVES["language_modeling"]())
    assert cached.compares(mixture({"contrastive": 1.0, "language_modeling": 1.0}, OBJECTIVES))
    assert not cached.compares(mixture({"language_modeling": 1.0}, OBJECTIVES))


def spread(model, batch):
    """An objective that is a mean over rows."""
    image = model.encode_image(batch["images"])
    return image[:, 0].square().mean(), {"first": image[:, 0].mean().detach()}


def test_a_mixture_compares_what_is_to_be_compared_and_averages_the_rest(tmp_path):
    model, processor = make_dual(0.0)
    model.double()
    objective = mixture({"contrastive": 0.7, "spread": 3.0}, {**OBJECTIVES, "spread": lambda: spread})
    rows, found = [], []
    for parts in (1, 4):
        model.zero_grad()
        config = dataclasses.replace(CONFIG, accumulation=parts)
        rows.append(Trainer(model, objective, Parts(processor, parts), config, tmp_path, "", None).gradient())
        found.append(gradients(model))
    torch.testing.assert_close(*rows)
    same(*found, 1e-6)


def test_running_statistics_move_once_a_batch():
    model = nn.BatchNorm1d(2)
    with cached.buffers_kept(model):
        model(torch.randn(4, 2))
    with pytest.raises(ZeroDivisionError), cached.buffers_kept(model):
        model(torch.randn(4, 2))
        raise ZeroDivisionError  # they come back whatever happens
    assert model.num_batches_tracked == 0 and not model.running_mean.any()


def train_in_parts(parts: int, kind: str, state: str) -> None:
    model, processor = make_dual(0.0)
    config = dataclasses.replace(CONFIG, accumulation=parts, parallel=kind)
    train(model, OBJECTIVES["contrastive"](), Parts(processor, parts), config, state)


def on_one_of_two(state: str) -> None:
    for kind in ("ddp", "fsdp"):
        train_in_parts(2, kind, f"{state}/{kind}")


def test_it_composes_with_several_processes(tmp_path):
    train_in_parts(1, "ddp", str(tmp_path / "one"))
    on_processes(2, on_one_of_two, str(tmp_path))
    for kind in ("ddp", "fsdp"):
        for found, expected in zip(curve(tmp_path / kind), curve(tmp_path / "one"), strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


def test_loss_says_what_it_wraps():
    model, processor = make_dual(0.0)
    loss = Loss(model, OBJECTIVES["contrastive"]())
    assert loss(Parts(processor, 2).at(0), embeds=True)["image"].shape == (4, 16)
