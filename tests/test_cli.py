"""The `eq` command from outside: quick help, one clear line for bad input, exit codes."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EQ = Path(sys.executable).with_name("eq")
VERBS = ("demo", "data", "train", "predict", "evaluate", "run", "bench", "models", "classify", "verify", "audit", "effect", "plan",
         "train anomaly", "evaluate anomaly", "predict counterfactual")


def eq(*args: object, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([EQ, *map(str, args)], capture_output=True, text=True, env={**os.environ, **env})


def test_help_answers_at_once():
    "Loading no network: the fastest of five, because the machine may be busy."
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = eq("--help")
        times.append(time.perf_counter() - start)
        if times[-1] < 0.6:
            break
    assert done.returncode == 0 and all(f"  {verb} " in done.stdout for verb in VERBS)
    limit = 0.6 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert min(times) < limit, f"eq --help took {min(times):.2f} s"


def test_python_m_eq_is_eq():
    done = subprocess.run([sys.executable, "-m", "eq", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, eq("--help").stdout)
    assert eq("--version").stdout.startswith("eq ")


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_shows_an_example(verb):
    done = eq(*verb.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert "Examples:" in done.stdout and f"  eq {verb}" in done.stdout, done.stdout
    assert "Usage: eq " + verb in done.stdout


@pytest.mark.parametrize("verb", [verb for verb in VERBS if " " in verb])
def test_a_verb_of_two_words_stands_in_the_help_of_the_first(verb):
    assert f"  eq {verb}  " in eq(verb.split()[0], "--help").stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["trian"], "did you mean 'train'?"),
        (["run", "mitocondria"], "did you mean 'mitochondria'?"),
        (["run", "mitochondria", "-p", "minuts", "1"], "did you mean 'minutes'?"),
        (["run", "mitochondria", "-p", "minutes", "soon"], "it must be float"),
        (["run", "mitochondria", "--nonsense"], "--nonsense"),
        (["verify", "no/such/folder"], "no manifest.json in no/such/folder"),
        (["verify"], "RUN"),
        (["demo", "--animals", "few"], "--animals"),
        (["predict", "no_such_image.png", "--model", "no_such_model", "--out", "x"], "no_such"),
        (["evaluate", "--model", "no_such_model", "--source", "synthetic_em"], "no_such_model"),
        (["data", "show", "em_vcn"], "did you mean 'em_vnc'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(args, says, tmp_path):
    done = subprocess.run([EQ, *args], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("eq: error: ") and done.stderr.count("\n") == 1, done.stderr
    assert says.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_unwritable_output_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = eq("demo", "--out", tmp_path / "file" / "below")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert str(tmp_path / "file") in done.stderr


def write_run(folder: Path) -> None:
    from eq.core.provenance import start_run

    with start_run("toy", out=folder) as run:
        (run.dir / "table.csv").write_text("a\n1\n")


def test_verify_says_whole_or_names_the_break(tmp_path):
    write_run(tmp_path / "run")
    assert eq("verify", tmp_path / "run").returncode == 0
    (tmp_path / "run" / "table.csv").write_text("a\n2\n")
    done = eq("verify", tmp_path / "run")
    assert done.returncode == 1 and "table.csv" in done.stdout


def toy_notebook(folder: Path, last: str) -> Path:
    cells = ["seconds = 0.0\nout = ''", "import time\nfrom pathlib import Path", "(Path(out) / 'begun').touch()", last]
    empty = {"cell_type": "code", "execution_count": None, "outputs": []}
    made = [{**empty, "id": f"cell-{n}", "metadata": {}, "source": c} for n, c in enumerate(cells)]
    made[0]["metadata"] = {"tags": ["parameters"]}
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    path = folder / "toy.ipynb"
    path.write_text(json.dumps({"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}))
    return path


KILL = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(("last", "says"), [("1 / 0", "ZeroDivisionError"), (KILL, "kernel")], ids=["cell fails", "kernel killed"])
def test_a_failed_notebook_is_marked_and_kept(last, says, tmp_path):
    from eq.core.registry import EqError
    from eq.workflows.run import run_notebook

    with pytest.raises(EqError, match=says):
        run_notebook(toy_notebook(tmp_path, last), {}, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["status"] == "failed" and says in manifest["error"]
    assert (tmp_path / "out" / "toy.ipynb").exists()


def test_ctrl_c_is_130_and_the_manifest_says_interrupted(tmp_path):
    notebook, script = toy_notebook(tmp_path, "time.sleep(seconds)"), tmp_path / "go.py"
    script.write_text("import sys\nfrom eq.workflows import cli\ncli.add_verb('toy', 'toy_verb', 'A toy.', 'eq toy')\nsys.exit(cli.main(['toy']))\n")
    verb = "from pathlib import Path\nfrom eq.workflows.run import run_notebook\n\n\ndef command() -> None:\n    'A toy.'\n"
    (tmp_path / "toy_verb.py").write_text(f"{verb}    run_notebook(Path({str(notebook)!r}), {{'seconds': 60.0}}, {str(tmp_path / 'out')!r})\n")
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.time() + 120
    while not (tmp_path / "out" / "begun").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the kernel is told too
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.rstrip().splitlines()[-1].startswith("eq: interrupted"), said  # before it, the kernel may say that it was cut off in mid-sentence
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["status"] == "interrupted"
