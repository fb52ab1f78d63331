"""Every Hugging Face family here and in transformers: the same random weights and inputs, outputs and gradients.

    make bench-parity        python benchmarks/parity.py [--tolerance 1e-5] [--out docs/parity.md] [FAMILY ...]

Each family's tiny model of odd sizes is written by transformers, read by us, compared (`python -m vlmpipe parity`),
written by us and read by transformers again. Exits 1 where a family is above the tolerance or a weight changed.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from vlmpipe.models import from_huggingface, to_huggingface
from vlmpipe.models.parity import TOLERANCE, Difference, failed, parity, random_module, table
from vlmpipe.models.pretrained import FAMILIES
from vlmpipe.models.text import TextModel
from vlmpipe.models.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Row:
    """One family's largest errors."""

    family: str
    architecture: str
    kind: str  # whole model, vision or text
    parameters: int
    differences: tuple[Difference, ...]

    def worst(self, kind: str) -> Difference:
        return max((each for each in self.differences if each.kind == kind), key=lambda each: each.relative)


def measure(family: str, directory: Path) -> Row:
    """Both directions through files."""
    _, theirs = random_module(family)
    theirs.save_pretrained(directory / "theirs")
    model, processor = from_huggingface(directory / "theirs")
    differences = parity(directory / "theirs")
    to_huggingface(model, processor, directory / "ours")
    return Row(
        family, FAMILIES[family].architecture, kind_of(model), sum(part.numel() for part in theirs.parameters()),
        (*differences, back(theirs, directory / "ours")),
    )


def kind_of(model: torch.nn.Module) -> str:
    if isinstance(model, VisionLanguageModel):
        return "whole"
    return "text" if isinstance(model, TextModel) else "vision"


def back(theirs: torch.nn.Module, directory: Path) -> Difference:
    """What transformers reads of what we wrote, against what it had."""
    again, report = type(theirs).from_pretrained(directory, output_loading_info=True)
    lost = [*report["missing_keys"], *report["unexpected_keys"]]
    state, found = theirs.state_dict(), again.state_dict()
    changed = sorted(name for name in state if not torch.equal(state[name], found[name]))
    wrong = float(bool(lost or changed))
    return Difference("weights", f"{len(state)} written and read", (), wrong, wrong, ", ".join([*lost, *changed][:3]))


def markdown(rows: Sequence[Row], tolerance: float) -> str:
    lines = [
        "# Parity with transformers",
        "",
        f"Random weights of odd sizes in float32, transformers {transformers.__version__} and torch "
        f"{torch.__version__.split('+')[0]} on CPU. Largest relative difference of any output and of any parameter's "
        f"gradient (allowed: {tolerance:.0e}); every weight is the same to the bit after the trip from transformers to "
        "us and back. Made by `make bench-parity`; `python -m vlmpipe parity DIRECTORY` does it for your own weights.",
        "",
        "| family | transformers' class | | parameters | outputs | worst | gradients | worst | weights |",
        "|---|---|---|--:|--:|---|--:|---|---|",
    ]
    for row in rows:
        output, gradient = row.worst("output"), row.worst("gradient")
        kept = "to the bit" if row.worst("weights").relative == 0 else "changed"
        lines.append(
            f"| {row.family} | {row.architecture} | {row.kind} | {row.parameters:,} | {output.relative:.1e} | "
            f"{output.name} | {gradient.relative:.1e} | `{gradient.worst}` | {kept} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("families", nargs="*", metavar="FAMILY", help=f"default: all ({', '.join(FAMILIES)})")
    options.add_argument("--tolerance", type=float, default=TOLERANCE)
    options.add_argument("--out", type=Path, help="a markdown file")
    chosen = options.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rows, wrong = [], 0
    for family in chosen.families or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(family, Path(folder)))
        above = failed(rows[-1].differences, chosen.tolerance)
        wrong += bool(above)
        errors = ", ".join(f"{kind} {rows[-1].worst(kind).relative:.1e}" for kind in ("output", "gradient", "weights"))
        print(f"{family:22} {errors}" + ("  ABOVE" if above else ""), flush=True)
        if above:
            print(table(above, chosen.tolerance))
    if chosen.out:
        chosen.out.write_text(markdown(rows, chosen.tolerance))
    print(f"{len(rows)} families, {wrong} above {chosen.tolerance:.0e}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
