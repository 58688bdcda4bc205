"""The house itself: what is tracked, what must never be in it, and that its papers agree with each other."""
import configparser
import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FLAGS = re.compile(r"^#\|\s*(data|slow|gpu)\s*$", re.MULTILINE)


def tracked() -> list[Path]:
    "Files that git holds or would add; without git, everything that is not ignored by the folders' names."
    done = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def notebooks() -> list[Path]:
    return sorted((ROOT / "nbs").rglob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict]:
    return [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


@pytest.mark.data
def test_no_shared_image_is_in_the_project():
    "Byte for byte: several sets may be evaluated but not passed on."
    from eq.core.paths import data_root

    if data_root().is_relative_to(ROOT):
        pytest.skip("the real images lie in data/, which git ignores")
    known = {hashlib.sha256(p.read_bytes()).hexdigest(): p for p in data_root().rglob("*") if p.is_file() and p.name != "README.md"}
    copies = [f"{p} is a copy of {known[h]}" for p in tracked() if (h := hashlib.sha256(p.read_bytes()).hexdigest()) in known]
    assert not copies, "\n".join(copies)


def test_pictures_are_few_and_where_they_belong():
    "A picture in the repository is one that eq made: docs images only."
    pictures = [p for p in tracked() if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".svs", ".dcm", ".gz", ".zip", ".bmp"}]
    rooms = (ROOT / "nbs" / "images", ROOT / "benchmarks")
    outside = [p for p in pictures if not any(p.is_relative_to(room) for room in rooms)]
    assert not outside, f"pictures outside nbs/images and benchmarks: {outside}"
    assert sum(p.stat().st_size for p in pictures) < 8_000_000


@pytest.mark.parametrize("notebook", notebooks(), ids=lambda p: p.stem)
def test_cells_on_real_images_store_no_output(notebook):
    for cell in code_cells(notebook):
        if FLAGS.search("".join(cell["source"])) or notebook.parent.name == "runs":
            assert not cell["outputs"], f"{notebook.name}: a flagged cell stores its output:\n{''.join(cell['source'])[:300]}"


@pytest.mark.parametrize("notebook", notebooks(), ids=lambda p: p.stem)
def test_outputs_stay_small_and_show_no_error(notebook):
    cells = code_cells(notebook)
    assert len(json.dumps([c["outputs"] for c in cells])) < 1_000_000, f"{notebook.name} stores too much output"
    assert not [o for c in cells for o in c["outputs"] if o["output_type"] == "error"], f"{notebook.name} stores an error"


@pytest.mark.parametrize("name", ["mitochondria", "glomeruli", "endotheliosis"])
def test_run_notebooks_have_one_cell_of_parameters(name):
    from eq.workflows.run import find_notebook, notebook_parameters

    assert (ROOT / "nbs" / "runs" / ".notest").exists()
    notebook = find_notebook(name)
    parameters = notebook_parameters(notebook)
    assert {"out", "seed"} <= set(parameters)
    imports = [line for c in code_cells(notebook) for line in "".join(c["source"]).splitlines() if re.match(r"\s*(import|from)\s", line)]
    assert imports and all(re.match(r"from (eq|pathlib)\b", line) for line in imports), f"{name} calls into eq only: {imports}"


def test_the_parameters_tag_survives_cleaning():
    "Without it papermill injects at the top, and the notebook's defaults silently win."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    assert "tags" in config["DEFAULT"]["allowed_cell_metadata_keys"].split()


def test_readme_is_the_index_notebook():
    import build_readme

    assert (ROOT / "README.md").read_text(encoding="utf-8") == build_readme.readme(), "run: make readme"


def test_readme_opens_with_what_and_how():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for needed in ("make demo", "make test", "nbs/images/", "Python >= 3.11", "opencv-python-headless", "EQ__DATA__ROOT"):
        assert needed in text, f"README.md does not mention {needed}"
    assert text.index("nbs/images/") < text.index("make demo") < 3000
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (ROOT / target).exists(), f"README.md links to {target}, which does not exist"


def settings() -> configparser.SectionProxy:
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]


def test_the_lock_holds_every_requirement():
    lines = re.findall(r"^([A-Za-z0-9._-]+)(?:\[\w+\])?==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    names = {re.sub(r"[-_.]+", "-", line.lower()) for line in lines}
    values = settings()
    wanted = " ".join(values[key] for key in values if key.endswith("requirements")).split()
    for requirement in wanted:
        name = re.sub(r"[-_.]+", "-", re.split(r"[<>=!\[;~]", requirement)[0].lower())
        assert name in names, f"{name} is required by settings.ini but not in requirements.lock; run: make lock"


def test_versions_agree():
    import eq

    version = settings()["version"]
    assert eq.__version__ == version
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version and citation["license"] == "Apache-2.0"
    assert version in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8") and (ROOT / "LICENSE").stat().st_size > 10_000


def test_what_nbdev_must_not_have():
    assert not (ROOT / "pyproject.toml").exists(), "nbdev writes it unless update_pyproject is False; setup.py reads settings.ini"
    assert (ROOT / "nbs" / "_quarto.yml").is_symlink() and (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_no_registry_is_named_and_no_secret_is_kept():
    hosts = ["py" + "pi.org", "files.python" + "hosted", "registry.npm" + "js", "conda.ana" + "conda.org"]
    secret = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|ghp_[A-Za-z0-9]{36}")
    for path in tracked():
        if path.suffix in {".py", ".ipynb", ".md", ".txt", ".lock", ".yml", ".yaml", ".ini", ".toml", ".cfg", ".sh", ".json", ".cff", ""}:
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not [h for h in hosts if h in text], f"{path} names a package registry's host"
            assert not secret.search(text), f"{path} holds something that looks like a key"


def test_params_match_the_configuration():
    from eq.core.config import load_config

    for mode in ("development", "production", "debug"):
        load_config(ROOT / "params.yaml", mode=mode)


@pytest.mark.parametrize("target", ["install", "demo", "test", "docs", "bench", "lock", "readme", "execute", "run-notebooks"])
def test_make_knows_the_target(target):
    done = subprocess.run(["make", "--dry-run", "--no-print-directory", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_install_explains_a_python_that_is_too_old(tmp_path):
    "With nothing but an old Python in sight, one line says what is needed and how to name one."
    for name in ("python3", "python", "python3.11", "python3.12", "python3.13"):
        (tmp_path / name).write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n')
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", str(ROOT / "tools" / "install.sh"), str(tmp_path / "venv")], env=env, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("\n") == 1
    assert "Python >= 3.11" in done.stderr and "Python 3.9.2" in done.stderr and "EQ_PYTHON=" in done.stderr


@pytest.mark.parametrize(("ci", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_what_a_machine_cannot_test_fails_in_ci(ci, outcome, monkeypatch):
    "A skip there would say that full disks and real images are tested when they are not."
    from conftest import not_here

    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="no tmpfs"):
        not_here("no tmpfs can be mounted here")
