"""The plan of the house: imports go down only, a module has one notebook whose number names its floor, and nothing outgrows its room."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("core", "data", "models", "training", "inference", "quantification", "reporting", "workflows", "serving")
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
MODULES = [p for p in sorted((ROOT / "eq").rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def code(notebook: Path) -> list[str]:
    return ["".join(c["source"]) for c in cells(notebook) if c["cell_type"] == "code"]


def exported_to(notebook: Path) -> str:
    names = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(code(notebook)), re.MULTILINE)
    assert len(names) == 1, f"{notebook.name} exports to {names}; a notebook is one module"
    return names[0]


def test_imports_go_down_only():
    done = subprocess.run([Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("source", ["inference", "quantification"])
def test_training_is_not_needed_to_apply_a_network(source):
    "The same contract from outside: importing every module of the floor loads no module of training."
    names = [f"eq.{source}.{p.stem}" for p in sorted((ROOT / "eq" / source).glob("[!_]*.py"))]
    look = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; print(*[m for m in sys.modules if m.startswith('eq.training')])"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr[-2000:]


def test_core_and_data_start_without_a_network_library():
    "The command answers quickly because its lower floors are light."
    look = "import sys, eq.workflows.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_one_module_on_its_floor(notebook):
    number, _, name = notebook.stem.partition("_")
    if number.startswith("9"):
        return
    floor = name.split(".")[0]
    assert FLOORS[int(number[0])] == floor, f"{notebook.name}: the tens digit {number[0]} is the floor {FLOORS[int(number[0])]}"
    assert exported_to(notebook) in (name, "__main__")
    assert "nbdev_export()" in code(notebook)[-1]
    assert any(re.search(r"\b(test_\w+\(|assert\b)", c) for c in code(notebook)), f"{notebook.name} asserts nothing"
    first = "".join(cells(notebook)[0]["source"])
    assert re.match(r"# .+\n\s*\n?> .+", first), f"{notebook.name} opens with a title and one sentence"


def test_numbers_are_used_once():
    numbers = [p.stem.partition("_")[0] for p in NOTEBOOKS]
    assert sorted(numbers) == sorted(set(numbers))


def test_every_module_comes_from_a_notebook():
    from_notebooks = {exported_to(p).replace(".", "/") + ".py" for p in NOTEBOOKS if not p.stem.startswith("9")}
    assert {str(p.relative_to(ROOT / "eq")) for p in MODULES} == from_notebooks


@pytest.mark.parametrize("module", MODULES, ids=lambda p: str(p.relative_to(ROOT / "eq")))
def test_nothing_outgrows_its_room(module):
    text = module.read_text(encoding="utf-8")
    assert text.count("\n") <= 300, f"{module}: {text.count(chr(10))} lines; split it by noun"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines, parameters = node.end_lineno - node.lineno + 1, len(node.args.args) + len(node.args.kwonlyargs)
            assert lines <= 46, f"{module.name}: {node.name} has {lines} lines"
            assert parameters <= 9, f"{module.name}: {node.name} has {parameters} parameters; make a dataclass"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module.name}:{node.lineno}: a bare except"


def test_no_pickle_is_ever_loaded():
    "Weights and states are safetensors and JSON: no line of the package can run a payload."
    for module in MODULES:
        if module.relative_to(ROOT / "eq").as_posix() == "models/unpickle.py":
            continue  # the contained child of `eq models extract-weights`, whose classes are stand-ins: tests/test_extract_weights.py
        text = module.read_text(encoding="utf-8")
        for forbidden in ("load_learner(", "pickle.load", "torch.load(", "joblib.load", "allow_pickle=True", "np.load(", ".Unpickler"):
            assert forbidden not in text, f"{module.name} uses {forbidden}"
