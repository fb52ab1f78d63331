"""Does the gate stop each of ten sabotaged models by the rule that should, and no honest rerun?

    make bench-sabotage        python benchmarks/sabotage.py [--workspace DIR] [--reruns N] [--only NAME]

One start is pretrained on captions, one champion fine-tuned from it on questions and captions of the embedded world.
Ten reruns differ from the champion by the seed of their fine-tuning alone. Ten sabotages are the champion with
something broken, or a training with a fault in its data (`sabotage_world.py`). Each is evaluated beside the champion
and judged by one gate (`sabotage.yaml`), all with the pipeline's own parts. A sabotage names the rule that must fail;
others may fail too. What is trained and evaluated is kept in the workspace; a run that was ended goes on.
"""

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sabotage_world import DESTROYED, FAULTS, draw, write_world
from vlmpipe.config import parse
from vlmpipe.dispatch import Cluster
from vlmpipe.errors import GateFailed, UserError
from vlmpipe.evaluate.gate import GateConfig, gate
from vlmpipe.evaluate.tasks import EvaluateConfig, evaluate
from vlmpipe.evaluate.verdict import check as check_seal
from vlmpipe.models.directory import TOKENIZER, is_model, load, save
from vlmpipe.models.vlm import VisionLanguageModel, VLMConfig
from vlmpipe.shards import read_json, sha256_file, write_json
from vlmpipe.train.loop import TrainConfig
from vlmpipe.train.stages import finetune, pretrain, publish

INLINE = Cluster(backend="inline", threads=1)
SETTINGS = Path(__file__).with_suffix(".yaml")
CHAMPION = "champion"
EVALUATION = "evaluation"  # what stops a model that gives no numbers, before any rule
DEEPER = 3
SHOWN = {
    "vqa.accuracy": "accuracy", "vqa.accuracy_wrong_image": "wrong picture", "captioning.image_gain": "captions' gain",
    "fairness.vqa.place.gap_low": "gap at least", "contamination.vqa": "seen before",
    "cost.seconds_ratio": "times slower",
}


@dataclass(frozen=True)
class Settings:
    """What sabotage.yaml holds."""

    model: VLMConfig
    pretrain: TrainConfig
    finetune: TrainConfig
    evaluate: EvaluateConfig
    gate: GateConfig


@dataclass(frozen=True)
class Case:
    """One challenger: how it comes to be, and the rule (and slice) that must stop it; None: nothing may.

    world: the fault in its data. spoil: what is done to the champion's directory; None: it is trained.
    """

    name: str
    rule: str | None = None
    value: str | None = None
    world: str = "honest"
    spoil: Callable[[Path, Path], None] | None = None
    seed: int = 0


# --- what is done to a champion -------------------------------------------------------------------------------------

def zero_layer(champion: Path, out: Path) -> None:
    """The weights of the language model's last block."""
    model, processor = load(champion)
    for weight in model.text.transformer.blocks[-1].parameters():
        weight.data.zero_()
    save(model, processor, out)


def nan_head(champion: Path, out: Path) -> None:
    model, processor = load(champion)
    for weight in model.language_model.parameters():
        weight.data.fill_(float("nan"))
    save(model, processor, out)


def shift_tokens(champion: Path, out: Path) -> None:
    """Each word has the number of the next one, but for those with a meaning of their own."""
    save(*load(champion), out)
    facts = json.loads((out / TOKENIZER).read_text())
    special = {token["content"] for token in facts["added_tokens"]}
    vocab = facts["model"]["vocab"]
    words = sorted((word for word in vocab if word not in special), key=vocab.__getitem__)
    numbers = [vocab[word] for word in words]
    vocab |= dict(zip(words, numbers[1:] + numbers[:1], strict=True))
    (out / TOKENIZER).write_text(json.dumps(facts))


def slow_down(champion: Path, out: Path) -> None:
    """As many blocks again and again; the new ones add nothing, so that the answers stay."""
    model, processor = load(champion)
    towers = {name: deeper(getattr(model.config, name)) for name in ("vision", "text")}
    slow = VisionLanguageModel(replace(model.config, **towers))
    known = model.state_dict()
    slow.load_state_dict({
        name: known[name] if name in known else torch.zeros_like(value) for name, value in slow.state_dict().items()
    })
    save(slow, processor, out)


def deeper(tower: Any) -> Any:
    return replace(tower, transformer=replace(tower.transformer, depth=DEEPER * tower.transformer.depth))


SABOTAGES = (
    Case("one layer zeroed", "champion", spoil=zero_layer),
    Case("tokenizer off by one", "accuracy", spoil=shift_tokens),
    Case("labels leaked", "wrong_image", world="leaked"),
    Case("one slice destroyed", "kinds", value=DESTROYED, world="slice_destroyed"),
    Case("always yes", "accuracy", world="always_yes"),
    Case("captions of the blind twin", "captions", world="blind_captions"),
    Case("a NaN head", EVALUATION, value="nan", spoil=nan_head),
    Case("twice slower", "slower", spoil=slow_down),
    Case("biased on one group", "gap", world="group_slighted"),
    Case("tested on its training data", "contamination", world="contaminated"),
)


# --- the run --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Bench:
    """The workspace, and how everything in it is made."""

    root: Path
    settings: Settings
    train: int
    test: int

    def world(self, fault: str) -> Path:
        place = self.root / "worlds" / fault
        if not (place / "packed" / "manifest.json").exists():
            write_world(place, *FAULTS[fault](draw("train", self.train), draw("test", self.test)))
        return place

    def start(self) -> Path:
        """The model that every training goes on from."""
        place, out = self.world("honest"), self.root / "models" / "start"
        if not is_model(out):
            state, model, config = self.root / "state" / "start", self.settings.model, self.settings.pretrain
            pretrain(place / "packed", out, out, state, model, config, INLINE)
        return out

    def model(self, case: Case) -> Path:
        out = self.root / "models" / slug(case.name)
        if is_model(out):
            return out
        if case.spoil is not None:
            champion = self.model(Case(CHAMPION))
            publish(out, lambda partial: case.spoil(champion, partial))
            return out
        place, config = self.world(case.world), replace(self.settings.finetune, seed=case.seed)
        state = self.root / "state" / slug(case.name)
        finetune(self.start(), place / "questions", place / "packed", out, state, config, INLINE)
        return out

    def judged(self, case: Case) -> dict[str, Any]:
        """The verdict, or what the evaluation says that can't score the model."""
        place, out = self.world(case.world), self.root / "results" / slug(case.name)
        champion, model = self.model(Case(CHAMPION)), self.model(case)
        metrics, samples, state = out / "metrics.json", out / "samples", out / "state"
        if not metrics.exists():
            # Captions are tested on sound pairs, whatever the training had.
            try:
                evaluate(
                    case.name, model, place / "packed", place / "questions", samples, metrics, self.settings.evaluate,
                    INLINE, champion=(CHAMPION, champion), state=state,
                )
            except UserError as error:
                return {"verdict": "refused", "rules": [], "metrics": {}, "why": str(error)}
        reigning = out / "champion.json"
        write_json(reigning, {"version": CHAMPION, "metrics": {}})
        verdict = out / "verdict.json"
        with contextlib.suppress(GateFailed):  # the verdict says so
            gate("sabotage", [metrics], reigning, verdict, self.settings.gate, samples, state / "costs.json")
        found = read_json(verdict)
        check_seal(found)
        if costs := (state / "costs.json").exists() and read_json(state / "costs.json"):
            found["metrics"] |= costs["metrics"]
        return found


def slug(name: str) -> str:
    return name.replace(" ", "-")


def stopped_by(verdict: dict) -> list[str]:
    """The rules that failed or could not be decided, with their slices; or that the evaluation found NaN."""
    if verdict["verdict"] == "refused":
        return [f"{EVALUATION}:nan" if re.search(r"\bnan\b", verdict["why"]) else EVALUATION]
    return [label(check) for check in verdict["rules"] if check["verdict"] != "PASS"]


def label(check: dict) -> str:
    name = f"{check['name']}:{check['slice']['value']}" if check["slice"] else check["name"]
    return name if check["verdict"] == "FAIL" else f"({name})"


def as_it_should(case: Case, verdict: dict) -> bool:
    """An honest model passes; a sabotaged one fails the rule that is named."""
    if case.rule is None:
        return verdict["verdict"] == "PASS"
    wanted = f"{case.rule}:{case.value}" if case.value else case.rule
    return wanted in stopped_by(verdict)


def read_settings() -> Settings:
    return parse(Settings, yaml.safe_load(SETTINGS.read_text()), SETTINGS.name)


def open_workspace(root: Path, train: int, test: int) -> Bench:
    """A workspace goes on with the settings that it was begun with; the gate may change, it is asked anew each time.

    Raises:
        UserError: it was begun with others.
    """
    settings = read_settings()
    made = {key: value for key, value in yaml.safe_load(SETTINGS.read_text()).items() if key != "gate"}
    facts = {"settings": made, "train": train, "test": test,
             "world": sha256_file(Path(__file__).with_name("sabotage_world.py"))}
    known = root / "settings.json"
    if known.exists() and read_json(known) != facts:
        raise UserError(f"{root}: found models of other settings; expected those of this run; choose another "
                        f"--workspace, or remove it")
    write_json(known, facts)
    return Bench(root, settings, train, test)


def cases(reruns: int, only: Sequence[str]) -> list[Case]:
    every = [*SABOTAGES, *(Case(f"honest rerun {seed}", seed=seed) for seed in range(1, reruns + 1))]
    return [case for case in every if not only or any(word in case.name for word in only)]


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    bench = open_workspace(options.workspace, options.train, options.test)
    start, found = time.monotonic(), []
    for number, case in enumerate(chosen := cases(options.reruns, options.only), 1):
        verdict = bench.judged(case)
        found.append((case, verdict))
        said = "as it should" if as_it_should(case, verdict) else "NOT as it should"
        print(f"{number} of {len(chosen)}: {case.name}: {verdict['verdict']} {stopped_by(verdict)}, {said}, "
              f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    Console(width=180).print(table(found))
    wrong = [case.name for case, verdict in found if not as_it_should(case, verdict)]
    write_json(options.workspace / "result.json", [summary(case, verdict) for case, verdict in found])
    if wrong:
        raise UserError(f"found {len(wrong)} models judged otherwise than they should: {', '.join(wrong)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workspace", type=Path, default=Path("data/benchmarks/sabotage"))
    parser.add_argument("--reruns", type=int, default=10, help="honest ones (default: 10)")
    parser.add_argument("--only", nargs="*", default=(), help="models whose names hold one of these words")
    parser.add_argument("--train", type=int, default=1500, help="training pictures")
    parser.add_argument("--test", type=int, default=300, help="test pictures")
    return parser.parse_args()


def summary(case: Case, verdict: dict) -> dict[str, Any]:
    return {
        "name": case.name, "expected": case.rule, "slice": case.value, "verdict": verdict["verdict"],
        "stopped_by": stopped_by(verdict), "as_it_should": as_it_should(case, verdict), "why": verdict.get("why"),
        "metrics": {name: verdict["metrics"].get(name) for name in SHOWN},
    }


def table(found: Sequence[tuple[Case, dict]]) -> Table:
    shown = Table(title="In brackets: could not be decided")
    for head in ("model", "verdict", "should be stopped by", "stopped by", *SHOWN.values()):
        shown.add_column(head)
    for case, verdict in found:
        wanted = f"{case.rule}:{case.value}" if case.value else case.rule or "nothing"
        numbers = (verdict["metrics"].get(name) for name in SHOWN)
        shown.add_row(
            case.name, verdict["verdict"], wanted, ", ".join(stopped_by(verdict)) or "nothing",
            *("" if number is None else f"{number:.3g}" for number in numbers),
        )
    return shown


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
