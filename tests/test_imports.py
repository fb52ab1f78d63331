"""Heavy dependencies stay behind one importing place each, and data flows through the tree one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("vlmpipe/**/*.py"), *ROOT.glob("flows/**/*.py")])

PLACES = {
    "ray": {"vlmpipe/cluster.py", "vlmpipe/dispatch.py"},
    "prefect": {"flows/"},
    "dvc": {"flows/", "vlmpipe/publish.py"},
    "dvclive": {"vlmpipe/train/live.py"},
    "gto": {"vlmpipe/publish.py"},
    "great_expectations": {"vlmpipe/curate/expectations.py"},
    "mlcroissant": {"vlmpipe/curate/croissant.py"},
    "img2dataset": {"vlmpipe/curate/fetch.py"},
    "hydra": {"vlmpipe/compose.py"},
    "cryptography": {"vlmpipe/evaluate/verdict.py"},
    "peft": {"vlmpipe/train/adapters.py"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", PLACES)
def test_one_importing_place(package):
    importers = {
        str(path.relative_to(ROOT)) for path in SOURCES if any(n.partition(".")[0] == package for n in imported(path))
    }
    stray = [path for path in importers if not any(path.startswith(place) for place in PLACES[package])]
    assert importers, f"nothing imports {package}: is the table stale?"
    assert not stray


def test_the_library_knows_nothing_of_flows():
    entry = {"vlmpipe/__main__.py"}
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        if name.startswith("vlmpipe/") and name not in entry:
            assert not any(n.partition(".")[0] == "flows" for n in imported(path)), name


@pytest.mark.parametrize(("package", "never"), [
    ("data", {"models", "train", "evaluate", "report"}),
    ("models", {"data", "curate", "train", "evaluate", "report", "dispatch", "shards"}),
    ("train", {"curate", "evaluate", "report"}),
    ("evaluate", {"train", "report"}),
])
def test_data_flows_one_way(package, never):
    for path in (ROOT / "vlmpipe" / package).rglob("*.py"):
        stray = {name for name in imported(path) if name.startswith(tuple(f"vlmpipe.{other}" for other in never))}
        assert not stray, path.relative_to(ROOT)


def test_training_code_runs_on_a_bare_gpu_machine():
    """models and the loop need torch, transformers and what those bring; nothing of the pipeline."""
    code = (
        "import sys\n"
        "import vlmpipe.models, vlmpipe.train.loop\n"
        "heavy = {'ray', 'prefect', 'dvc', 'datasets', 'great_expectations', 'img2dataset', 'hydra', 'pandas',\n"
        "         'dvclive', 'peft'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
