"""python -m vlmpipe STAGE ... and the verbs that people type; stages are called by dvc.yaml."""

import argparse
import os
import sys
import traceback
from pathlib import Path

# Nothing phones home, whichever stage imports what.
os.environ.update(
    {
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "GX_ANALYTICS_ENABLED": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
)

from vlmpipe import compose
from vlmpipe.errors import GateFailed, UserError, disk_full
from vlmpipe.process import die_with_parent
from vlmpipe.stages import STAGES, run_stage, section, validate

USER, GATE, BUG = 2, 1, 3


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 done, 1 a gate said no, 2 unusable input, 3 a fault of ours (with traceback)."""
    options = _parser().parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    try:
        return options.call(options) or 0
    except GateFailed as failure:
        return _end(f"gate failed: {failure}", GATE)
    except UserError as error:
        return _end(f"error: {error}", USER)
    except KeyboardInterrupt:
        return _end("stopped; rerun to go on from here", 130)
    except Exception as error:
        if not disk_full(error):
            traceback.print_exc()
            return BUG
        where = " or ".join(str(path) for path in map(vars(options).get, ("out", "state", "metrics")) if path)
        return _end(
            f"error: the disk is full (writing {where or os.getcwd()}: {_first_line(error)}); expected free space; "
            f"free some and rerun: what is finished is kept", USER,
        )


def _joined(arguments: list[str]) -> list[str]:
    """Verbs that begin with a stage's name: `gate explain`, where the stage `gate` takes any other name, and `evaluate
    MODEL --task …`, where the stage `evaluate` has no such option."""
    both = " ".join(arguments[:2])
    asked = any(word.partition("=")[0] == "--task" for word in arguments)
    if arguments[:1] == ["evaluate"] and asked:
        return [EVALUATE, *arguments[1:]]
    return [both, *arguments[2:]] if both in COMMANDS else arguments


def _first_line(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).strip().splitlines()[0]


def _end(line: str, code: int) -> int:
    if os.environ.get("VLMPIPE_DEBUG"):
        raise  # what main is handling
    print(line, file=sys.stderr, flush=True)
    return code


# --- the parser --------------------------------------------------------------------------------------------

def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "vlmpipe",
        description="Image-text pairs to a curated dataset and a gated vision-language model.",
        epilog="Stages (called by dvc.yaml; `vlmpipe STAGE --help`): " + ", ".join(STAGES),
    )
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (call, describe, help_text) in COMMANDS.items():
        command = verbs.add_parser(name, help=help_text, description=help_text)
        describe(command)
        command.set_defaults(call=call)
    for name, stage in STAGES.items():
        # No help argument: stages stay out of the list that people read.
        command = verbs.add_parser(name, description=f"Stage {name}: {stage.run}", epilog=BESIDE.get(name))
        if stage.named:
            command.add_argument("name")
        for path in stage.paths:
            several = {"nargs": "+"} if path in stage.several else {}
            command.add_argument(f"--{path}", type=_place, required=path not in stage.optional, **several)
        command.add_argument("--params", type=Path, default=Path(compose.PARAMS), help="default: params.yaml")
        command.set_defaults(call=_run_stage, stage=name)
    return parser


def _run_stage(options: argparse.Namespace) -> None:
    die_with_parent()
    stage = STAGES[options.stage]
    paths = {path: getattr(options, path) for path in stage.paths}
    params = compose.read_params(options.params)
    run_stage(options.stage, getattr(options, "name", None), paths, params, str(options.params))


def _place(text: str) -> Path | str:
    """A path, or an address such as s3://bucket/list.parquet: a Path would make one slash of the two."""
    return text if "://" in text else Path(text)


def _profile_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--profile", default="scenes", help="a file in configs/profile/ (default: scenes)")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="swap a group (model=clip) or a value (curation.select.min_side=64); repeatable",
    )


# --- what people type --------------------------------------------------------------------------------------

def _compose(options: argparse.Namespace) -> None:
    params = compose.compose(options.profile, options.overrides)
    validate(params, "configs")
    changed = compose.write_params(params)
    print(f"params.yaml {'written' if changed else 'already says this'} (profile {options.profile})")


def _run(options: argparse.Namespace) -> int:
    from flows.launch import run

    return run(options.flow, options.profile, options.overrides, options.targets)


def _ui(options: argparse.Namespace) -> int:
    from flows.launch import ui

    return ui(options.host, options.port)


def _serve(options: argparse.Namespace) -> int:
    from flows.launch import serve

    cron = options.cron or (None if options.interval else "0 2 * * *")
    return serve(options.profile, options.overrides, cron=cron, interval_s=options.interval, flow=options.flow)


def _models(options: argparse.Namespace) -> None:
    from vlmpipe.publish import models

    models(compose.read_params())


def _rollback(options: argparse.Namespace) -> None:
    from vlmpipe.publish import rollback

    rollback(options.version, compose.read_params())


def _doctor(options: argparse.Namespace) -> int:
    from vlmpipe.doctor import doctor

    return doctor()


def _explain(options: argparse.Namespace) -> None:
    from vlmpipe.curate.explain import as_json, explain, show

    found = explain(options.uid, _root(options))
    print(as_json(found)) if options.json else show(found)


def _gate_explain(options: argparse.Namespace) -> None:
    from vlmpipe.config import parse
    from vlmpipe.data.task import TaskConfig
    from vlmpipe.report.gates import read_verdict, write_page
    from vlmpipe.report.gates_terminal import show
    from vlmpipe.report.pictures import TaskPictures

    params = compose.read_params()
    root, gates = Path(params["root"]), list(section(params, "gates", compose.PARAMS))
    verdict = read_verdict(Path(params["results"]) / "gates", gates, options.name)
    evaluation = root / "evaluation" / verdict["gate"]
    show(verdict, evaluation, options.samples)
    if options.html:
        task = parse(TaskConfig, section(params, "task", compose.PARAMS), f"{compose.PARAMS}: task")
        write_page(verdict, evaluation, TaskPictures(root / "packed", task), options.samples, options.html)
        print(f"the same with pictures: {options.html}")


def _gate_keygen(options: argparse.Namespace) -> None:
    from vlmpipe.evaluate.verdict import KEY_VARIABLE, keygen

    public = keygen(options.file)
    print(f"private key: {options.file}  (export {KEY_VARIABLE}={options.file.absolute()} where gates run)\n"
          f"publish.public_key={public}")


def _evaluate(options: argparse.Namespace) -> None:
    from vlmpipe.evaluate.command import options_of, run, show

    rows, out = run(**options_of(vars(options)))
    print(show(rows))
    print(f"answers and scores: {out}")


def _compare(options: argparse.Namespace) -> None:
    from vlmpipe.publish import selection_at
    from vlmpipe.report.compare import compare, show, write_page

    root, names = _root(options), (options.a, options.b)
    with selection_at(options.a, root) as a, selection_at(options.b, root) as b:
        found = compare(a, b)
    show(found, names)
    out = options.out or root / "compare" / "index.html"
    write_page(found, names, root / "pools", out, options.pictures)
    print(f"pictures of both sides: {out}")


def _embed(options: argparse.Namespace) -> None:
    from vlmpipe.curate.embed import embed

    print(f"{embed(options.pictures, options.scorer, options.out)} pictures embedded in {options.out}")


def _datacomp(options: argparse.Namespace) -> None:
    from vlmpipe.curate.datacomp import read_metadata

    pool, notes = (_root(options) / kind / options.name for kind in ("pools", "annotations"))
    print(f"{read_metadata(options.metadata, pool, notes, options.score)} rows in {pool} and {notes}")


def _ledger(options: argparse.Namespace) -> None:
    import json

    from vlmpipe.curate import ledger

    found = ledger.summary(_root(options) / "state" / "download" / _pool(options))
    print(json.dumps(found, indent=2)) if options.json else ledger.show(options.pool, found, options.hosts)


def _refresh(options: argparse.Namespace) -> int:
    from vlmpipe.curate.refresh import refresh

    return refresh(_pool(options), Path(compose.read_params()["root"]), options.all)


def _pool(options: argparse.Namespace) -> str:
    section(compose.read_params(), f"pool.{options.pool}", compose.PARAMS)
    return options.pool


def _root(options: argparse.Namespace) -> Path:
    return options.root or Path(compose.read_params()["root"])


def _ask(options: argparse.Namespace) -> None:
    from vlmpipe.models.generate import answer

    model, processor, image = _champion_and_image(options)
    print(answer(model, processor, [image], [options.question])[0])


def _caption(options: argparse.Namespace) -> None:
    from vlmpipe.models.generate import caption

    model, processor, image = _champion_and_image(options)
    print(caption(model, processor, [image])[0])


def _parity(options: argparse.Namespace) -> int:
    from vlmpipe.models.parity import failed, parity, table

    differences = parity(options.directory)
    print(table(differences, options.tolerance))
    wrong = failed(differences, options.tolerance)
    largest = max(each.relative for each in differences)
    print(f"largest relative difference {largest:.1e}, {len(wrong)} above {options.tolerance:.0e}")
    return GATE if wrong else 0


def _champion_and_image(options: argparse.Namespace):
    from vlmpipe.images import open_image
    from vlmpipe.models import load
    from vlmpipe.publish import champion_model

    image = open_image(options.image)
    directory = options.model or champion_model(compose.read_params())
    return *load(directory), image


def _image_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", type=Path)
    command.add_argument("--model", type=Path, help="a model directory (default: the champion)")


def _ask_options(command: argparse.ArgumentParser) -> None:
    _image_options(command)
    command.add_argument("question")


def _parity_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("directory", type=_place, help="a Hugging Face directory or hub id")
    command.add_argument(
        "--tolerance", type=float, default=1e-5, help="largest relative difference allowed (default: 1e-5)"
    )


def _run_options(command: argparse.ArgumentParser) -> None:
    _profile_options(command)
    _flow_option(command)
    command.add_argument(
        "targets", nargs="*", metavar="STAGE", help="run only these stages and what is above them (default: all)"
    )


def _flow_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--flow", choices=["pipeline", "curate", "train"], default="pipeline",
        help="pipeline: all; curate: up to the packed dataset; train: from pretrain on",
    )


def _ui_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--host", default="127.0.0.1")
    command.add_argument("--port", type=int, default=4200)


def _rollback_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("version", help="as `vlmpipe models` prints it, such as v0.0.1")


def _serve_options(command: argparse.ArgumentParser) -> None:
    _profile_options(command)
    _flow_option(command)
    command.add_argument("--cron", help="when it runs (default: '0 2 * * *', nightly at 02:00)")
    command.add_argument("--interval", type=float, metavar="SECONDS", help="run this often instead")


def _root_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--root", type=Path, help="the profile's data (default: root of params.yaml)")


def _explain_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("uid", help="a sample's uid or its beginning")
    command.add_argument("--json", action="store_true", help="print one json object")
    _root_option(command)


def _gate_explain_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", nargs="?", help="a gate of params.yaml (default: the last one with a verdict)")
    command.add_argument("--samples", type=int, default=5, help="of each metric and slice (default: 5)")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with their pictures, too")


def _gate_keygen_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, help="where the private key goes; keep it out of git")


def _evaluate_options(command: argparse.ArgumentParser) -> None:
    command.prog, command.epilog = "vlmpipe evaluate", "The stage of the pipeline: `vlmpipe evaluate NAME --help`."
    command.add_argument(
        "model", metavar="MODEL", help="a model directory, a Hugging Face directory or hub id, or `champion`"
    )
    command.add_argument("--task", required=True, help="such as vqa, captioning, classification, retrieval")
    command.add_argument(
        "--data", type=Path, metavar="DIR",
        help="its test/ holds official files, or a packed dataset for captioning (default: what params.yaml says)",
    )
    command.add_argument("--reader", help="of the official files, such as textvqa or nlvr2 (default: vqav2)")
    command.add_argument(
        "--limit", type=int, metavar="N", help="so many samples, drawn at random (default: all, or params.yaml's)"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="default: evaluations/MODEL-TASK")
    command.add_argument(
        "--batch-size", type=int, metavar="N", help="rows in one forward pass (default: 64, or params.yaml's)"
    )
    command.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    command.add_argument(
        "--export", nargs=2, metavar=("FORMAT", "DIR"), help="write samples and results as `lmms-eval` does, too"
    )


def _compare_options(command: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        command.add_argument(name, help="a selection's directory, or a git revision of this workspace")
    command.add_argument("--out", type=Path, help="the page (default: <root>/compare/index.html)")
    command.add_argument("--pictures", type=int, default=16, help="pictures of each change (default: 16)")
    _root_option(command)


def _ledger_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("pool")
    command.add_argument("--json", action="store_true", help="print one json object, every host in it")
    command.add_argument("--hosts", type=int, default=20, help="how many hosts to list (default: 20)")
    _root_option(command)


def _refresh_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("pool")
    command.add_argument("--all", action="store_true", help="retry the rows that still wait, too")


def _embed_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("pictures", type=Path, help="a shard directory or a folder of images")
    command.add_argument("--scorer", required=True, help="a model directory or a hub id, as annotate takes it")
    command.add_argument("--out", type=Path, required=True, help="a parquet file")


def _datacomp_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("metadata", type=Path, help="a folder of DataComp's metadata parquet files")
    command.add_argument("--name", default="datacomp", help="what the pool is called (default: datacomp)")
    command.add_argument("--score", default="clip_l14_similarity_score", help="the column that becomes clip_score")
    _root_option(command)


def _no_options(command: argparse.ArgumentParser) -> None:
    """This verb takes none."""


EVALUATE = "evaluate MODEL"
# What people type that begins with the name of a stage.
BESIDE = {
    "evaluate": "Any model on one task: `vlmpipe evaluate MODEL --task NAME`; its options: add --help to that.",
    "gate": "Why a gate said so: `vlmpipe gate explain --help`.",
}
COMMANDS = {
    "run": (_run, _run_options, "run a flow in Prefect: the whole pipeline, or curate or train alone"),
    "compose": (_compose, _profile_options, "write params.yaml from configs/"),
    "ui": (_ui, _ui_options, "start the Prefect server and its UI on loopback"),
    "serve": (_serve, _serve_options, "register scheduled deployments and run them as they fall due"),
    "models": (_models, _no_options, "list model versions with metrics, verdicts and data versions"),
    "rollback": (_rollback, _rollback_options, "move the champion back to an earlier version"),
    "ledger": (_ledger, _ledger_options, "what became of a pool's URLs, by outcome and by host"),
    "refresh": (_refresh, _refresh_options, "retry a pool's retriable URLs that are due, and never the refused ones"),
    "explain": (_explain, _explain_options, "every number, rule and neighbour that decided one sample"),
    EVALUATE: (_evaluate, _evaluate_options, "score any model on one task: `evaluate MODEL --task NAME`"),
    "gate explain": (
        _gate_explain, _gate_explain_options, "a verdict's rules and intervals, and the samples that got worse"
    ),
    "gate keygen": (_gate_keygen, _gate_keygen_options, "make a key pair that verdicts are signed and checked with"),
    "compare": (_compare, _compare_options, "what two selections keep differently, with pictures"),
    "embed": (_embed, _embed_options, "embed pictures for clusters near a reference set or for decontamination"),
    "datacomp": (_datacomp, _datacomp_options, "make a pool of DataComp's metadata, to select from without pictures"),
    "ask": (_ask, _ask_options, "ask the champion a question about an image"),
    "caption": (_caption, _image_options, "let the champion describe an image"),
    "parity": (_parity, _parity_options, "compare a Hugging Face model here and in transformers: outputs, gradients"),
    "doctor": (_doctor, _no_options, "what is installed, what is missing and what to do"),
}

if __name__ == "__main__":
    sys.exit(main())
