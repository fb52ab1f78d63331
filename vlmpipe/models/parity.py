"""Our model against transformers' on one Hugging Face directory: the same weights and inputs, outputs and gradients.

`python -m vlmpipe parity DIRECTORY`; benchmarks/parity.py does it for a random model of every family.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.pretrained.families import FAMILIES, model_type
from vlmpipe.models.pretrained.family import Family, Inputs
from vlmpipe.models.pretrained.keys import KeyMap, matches, to_theirs
from vlmpipe.models.pretrained.load import convert, family_of, load_theirs, locate, read_config
from vlmpipe.models.pretrained.processor import read_processor

TOLERANCE = 1e-5
# Some gradients are zero but for rounding, such as those of a key's bias: such a difference is told in shares of this
# share of the largest gradient beside it.
FLOOR = 0.1


@dataclass(frozen=True)
class Difference:
    """How far ours is from theirs in one output, or in the worst weight or gradient of a group."""

    kind: str  # output, gradient or weights
    name: str
    shape: tuple[int, ...]
    absolute: float  # the largest difference
    relative: float  # that over the largest value of theirs
    worst: str = ""  # the parameter of the group that this is about, as they call it


def parity(source: str | Path, seed: int = 0) -> list[Difference]:
    """Load a directory in both libraries and compare them.

    Raises:
        UserError: it can't be loaded, see `from_huggingface`.
    """
    directory = locate(source)
    config = read_config(directory)
    family = family_of(config.to_dict())
    theirs = load_theirs(directory, family)
    processor = read_processor(directory, config.to_dict(), family.fills_text)
    return compare(config, theirs, processor, seed)


def compare(config: Any, theirs: nn.Module, processor: Any = None, seed: int = 0) -> list[Difference]:
    """The same for a module of transformers in memory."""
    content = config.to_dict()
    family = family_of(content)
    ours = convert(content, theirs.state_dict(), processor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs = family.inputs(content, processor)
    found, expected = run(ours, family.found, inputs, seed), run(theirs, family.expected, inputs, seed)
    if found.keys() != expected.keys():
        raise UserError(f"outputs: found {sorted(found)} of ours and {sorted(expected)} of theirs; expected the same")
    keys = family.keys(ours.config)
    outputs = [output(name, found[name], expected[name]) for name in found]
    return [*outputs, *gradients(ours, theirs, keys, family), weights(ours, theirs, keys)]


def run(model: nn.Module, outputs_of: Any, inputs: Inputs, seed: int) -> dict[str, Tensor]:
    """The outputs; gradients of a random weighing of all of them are left in the model."""
    model.zero_grad(set_to_none=True)
    outputs = outputs_of(model, inputs)
    generator = torch.Generator().manual_seed(seed)
    shares = {name: torch.randn(outputs[name].shape, generator=generator) for name in sorted(outputs)}
    torch.stack([(outputs[name] * shares[name]).sum() for name in shares]).sum().backward()
    return {name: value.detach() for name, value in outputs.items()}


def output(name: str, found: Tensor, expected: Tensor) -> Difference:
    if found.shape != expected.shape:
        raise UserError(f"{name}: found shape {tuple(found.shape)} of ours and {tuple(expected.shape)} of theirs")
    absolute = largest(found - expected)
    return Difference("output", name, tuple(found.shape), absolute, absolute / max(largest(expected), 1e-30))


def gradients(ours: nn.Module, theirs: nn.Module, keys: KeyMap, family: Family) -> list[Difference]:
    """The worst parameter of each group, in the order of their model; what is never learned here has none."""
    learned = {name: gradient(parameter) for name, parameter in ours.named_parameters() if parameter.requires_grad}
    found = to_theirs(learned, {name: rows for name, rows in keys.items() if name in learned})
    fixed = {name for ours_name, rows in keys.items() if ours_name not in learned for name in rows.names}
    expected = {name: gradient(parameter) for name, parameter in theirs.named_parameters() if name not in fixed}
    unseen = [name for name in expected.keys() - found.keys() if not matches(name, family.ignored)]
    unseen = sorted(name for name in unseen if largest(expected[name]) > 0)
    if unseen:
        raise UserError(f"gradients: found {', '.join(unseen[:5])} in theirs alone; expected a map that covers them")
    groups: dict[str, list[str]] = {}
    for name in expected:
        if name in found:
            groups.setdefault(group_of(name), []).append(name)
    return [worst_gradient(group, names, found, expected) for group, names in groups.items()]


def gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()


def group_of(name: str) -> str:
    """The part of the model that a parameter belongs to: its name up to the first layer number, at most three words."""
    words = name.split(".")[:-1] or [name]
    words = words[: next((place for place, word in enumerate(words) if word.isdigit()), len(words))]
    return ".".join(words[:3])


def worst_gradient(
    group: str, names: Sequence[str], found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Difference:
    floor = FLOOR * max(largest(expected[name]) for name in names)
    differences = []
    for name in names:
        absolute = largest(found[name] - expected[name])
        relative = absolute / max(largest(expected[name]), floor, 1e-30)
        differences.append(Difference("gradient", group, tuple(expected[name].shape), absolute, relative, name))
    return max(differences, key=lambda difference: difference.relative)


def weights(ours: nn.Module, theirs: nn.Module, keys: KeyMap) -> Difference:
    """Our weights carried back: there must be no difference at all."""
    back, state = to_theirs(ours.state_dict(), keys), theirs.state_dict()
    absolute, worst = max((largest(back[name].float() - state[name].float()), name) for name in back)
    different = sum(not torch.equal(back[name].float(), state[name].float()) for name in back)
    name = f"{len(back)} there and back" if not different else f"{different} of {len(back)} changed there and back"
    return Difference("weights", name, (), absolute, absolute, worst if different else "")


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def failed(differences: Iterable[Difference], tolerance: float) -> list[Difference]:
    """Those above the tolerance, or not numbers; weights may not differ at all."""
    return [
        each for each in differences if not each.relative <= (0.0 if each.kind == "weights" else tolerance)
    ]


def table(differences: Sequence[Difference], tolerance: float) -> str:
    """Text for a terminal."""
    wrong = failed(differences, tolerance)
    heads = ("", "", "shape", "absolute", "relative", "")
    rows = [
        (
            each.kind, each.name, "x".join(map(str, each.shape)), f"{each.absolute:.1e}", f"{each.relative:.1e}",
            f"{'ABOVE ' if each in wrong else ''}{each.worst}",
        )
        for each in differences
    ]
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(5)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[5]]) for row in (heads, *rows)]
    return "\n".join(line.rstrip() for line in lines)


def random_module(kind: str, seed: int = 0, **changes: Any) -> tuple[Any, nn.Module]:
    """Their config and module of a family at its tiny size, with weights that make every place count.

    Norms start at one and biases at zero, where a swapped pair would not show; here nothing does.
    """
    import transformers

    family = FAMILIES[kind]
    config = transformers.AutoConfig.for_model(model_type(kind), **{**family.tiny, **changes})
    config.architectures = [family.architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        theirs = getattr(transformers, family.architecture)(config)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return config, theirs.eval()
