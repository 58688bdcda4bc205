"""The classifier's pipeline under DVC: the second run does nothing, a changed value reruns what depends on it and nothing else."""
import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("data_ingestion", "prepare_base_model", "training", "evaluation")
SMALL = {"arch": "resnet18", "weights": "none", "image_size": [64, 64, 3], "epochs": 1, "batch_size": 16, "freeze": "none", "learning_rate": 0.01, "body": False}


def archive(path: Path, seed: int = 0) -> Path:
    "Two classes of numbered slices: bright squares are tumours; one file is no image."
    rng, one = np.random.default_rng(seed), path.with_suffix(".png")
    with zipfile.ZipFile(path, "w") as target:
        for label, level in (("Normal", 60), ("Tumor", 180)):
            for i in range(80):
                Image.fromarray(np.clip(rng.normal(level, 15, (40, 40)), 0, 255).astype(np.uint8)).save(one)
                target.write(one, f"ct/{label}/{label}- ({i}).png")
        target.writestr("ct/Tumor/Tumor- (99).png", "no image")
    return path


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    "A checkout of its own, so that outputs and DVC's files land there."
    here = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "eq", here / "eq", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "dvc.yaml", ".dvcignore"):  # the tracker is the default one: a store below outputs/
        shutil.copy(ROOT / name, here / name)
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["classify"] |= SMALL
    values["classify"]["paths"]["source_url"] = str(archive(here / "ct.zip"))
    (here / "params.yaml").write_text(yaml.safe_dump(values))
    dvc(here, "init", "--no-scm")
    return here


def dvc(here: Path, *args: str, fails: bool = False) -> str:
    "What a DVC command says; it has to succeed, or to fail where that is asked for."
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {k: v for k, v in os.environ.items() if not k.startswith("EQ__")}
    env = {**given, "PATH": path, "PYTHONPATH": str(here), "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([Path(sys.executable).parent / "dvc", *args], cwd=here, env=env, capture_output=True, text=True, timeout=600)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def change(here: Path, **values: object) -> None:
    "Other values in section classify."
    known = yaml.safe_load((here / "params.yaml").read_text())
    known["classify"] |= values
    (here / "params.yaml").write_text(yaml.safe_dump(known))


def ran(said: str) -> set[str]:
    "The stages that DVC says it ran."
    return {stage for stage in STAGES if f"Running stage '{stage}'" in said}


def test_stages_rerun_only_when_they_must(checkout):
    assert ran(dvc(checkout, "repro")) == set(STAGES)
    made = checkout / "outputs" / "classify"
    scores = json.loads((made / "scores.json").read_text())
    assert scores["verdict"] and scores["units"] >= 2 and 0 <= scores["network.accuracy"]["estimate"] <= 1
    assert pd.read_csv(made / "images" / "skipped.csv")["image"].str.contains("99").tolist() == [True]
    assert {"base_model", "base_model_updated", "model"} <= {p.name for p in made.iterdir()}
    assert ran(dvc(checkout, "repro")) == set()
    change(checkout, epochs=2)
    assert ran(dvc(checkout, "repro")) == {"training", "evaluation"}
    change(checkout, dropout=0.1)
    said = dvc(checkout, "repro", "--dry")
    assert "prepare_base_model" in ran(said) and "data_ingestion" not in ran(said), said  # what follows depends on what it makes, which a dry run cannot know
    assert json.loads((made / "model" / "model.json").read_text())["params"]["classify"]["epochs"] == 2
    assert "accuracy" in dvc(checkout, "metrics", "show")
    for name, mark, axes in (("confusion", "rect", ("actual", "predicted")), ("roc", "line", ("fpr", "tpr")), ("calibration", "point", ("confidence", "accuracy"))):
        drawn = dvc(checkout, "plots", "show", f"outputs/classify/plots/{name}.csv", "--show-vega")
        assert f'"type": "{mark}"' in drawn and all(f'"field": "{axis}"' in drawn for axis in axes), drawn[:2000]
    with contextlib.closing(sqlite3.connect(checkout / "outputs" / "mlflow.db")) as store:
        runs = store.execute("select status from runs").fetchall()
        told = dict(store.execute("select key, value from params where key in ('epochs', 'dropout') order by rowid").fetchall())
    before = {f: (made / f / "model.safetensors").read_bytes() for f in ("base_model", "base_model_updated", "model")}
    change(checkout, weights=str(checkout / "gone.safetensors"))
    assert "gone.safetensors" in dvc(checkout, "repro", fails=True)
    assert {f: (made / f / "model.safetensors").read_bytes() for f in before} == before, "a stage that fails takes nothing away"
    change(checkout, weights="none")
    assert runs == [("FINISHED",)] * 2 and told == {"epochs": "2", "dropout": "0.5"}, (runs, told)


def test_other_images_and_other_code_are_noticed(checkout):
    change(checkout, epochs=2, dropout=0.5)
    dvc(checkout, "repro")
    known = yaml.safe_load((checkout / "dvc.lock").read_text())["stages"].values()
    folders = [d for stage in known for d in stage.get("deps", []) if d["path"] in ("eq/core", "eq/data", "eq/inference", "eq/models", "eq/training")]
    assert len(folders) == 13 and all(d["nfiles"] > 5 for d in folders), folders  # a folder that .dvcignore names counts as empty
    with zipfile.ZipFile(checkout / "ct.zip", "a") as target:  # another file, the same images
        target.comment = b"packed again"
    look = ("repro", "-f", "-s", "data_ingestion")
    assert ran(dvc(checkout, *look)) == {"data_ingestion"} and ran(dvc(checkout, "repro")) == set()
    archive(checkout / "ct.zip", seed=1)
    assert ran(dvc(checkout, *look)) == {"data_ingestion"}
    with (checkout / "eq" / "models" / "classifier.py").open("a") as code:
        code.write("# another line\n")
    said = dvc(checkout, "status")
    waiting = {stage: said.partition(f"\n{stage}:\n")[2].partition(":\n\tchanged")[0] for stage in STAGES}
    assert "data_ingestion" not in said and "eq/models" in said, said
    assert "images/content.csv" in waiting["training"] and "images/content.csv" in waiting["evaluation"], said


def test_ingestion_tells_what_it_skipped_and_no_secret(tmp_path):
    paths = {"ROOT_DIR": tmp_path, "UNZIP_DIR": tmp_path / "images", "SOURCE_URL": archive(tmp_path / "ct.zip")}
    env = {**os.environ, "EQ__CLASSIFY__TRACKING_URI": "postgresql://me:secretpw@db/x", **{f"EQ__CLASSIFY__PATHS__{k}": str(v) for k, v in paths.items()}}

    def say(**more: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-m", "eq", "classify", "ingest"], env=env | more, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout + done.stderr

    code, said = say()
    assert code == 0 and "skipped: 1, listed with the reason in" in said, said
    assert "secretpw" not in "".join(p.read_text() for p in (tmp_path / "images").glob("*.*") if p.is_file())
    code, said = say(EQ__CLASSIFY__PATHS__SOURCE_URL="~nobody-of-this-name/x.zip")
    assert code == 2 and "no registered source" in said and "Traceback" not in said, said
    code, said = say(EQ__CLASSIFY__PATHS__SOURCE_URL="http://127.0.0.1:99999/x.zip?X-Amz-Signature=secretpw")
    assert code == 2 and "secretpw" not in said + "".join((tmp_path / "images.unfinished" / name).read_text() for name in ("manifest.json", "log.jsonl")), said


def test_dvc_watches_what_the_stages_depend_on():
    "Whatever a stale base model is refused for makes DVC prepare a new one; every value that DVC watches exists."
    from eq.core.config_pictures import ClassifyConfig, ClassifyPaths
    from eq.workflows.classify_stages import PREPARED

    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    watched = {name: {p.removeprefix("classify.") for p in stage["params"] if p.startswith("classify.")} for name, stage in stages.items()}
    assert watched["prepare_base_model"] == set(PREPARED)
    assert {"precision", "device"} <= watched["training"]
    assert set().union(*watched.values()) <= {*ClassifyConfig.model_fields, *(f"paths.{name}" for name in ClassifyPaths.model_fields)}
    assert all((ROOT / path).is_file() for stage in stages.values() for path in stage.get("deps", ()) if path.endswith(".py"))


def test_a_stage_without_its_forerunner_says_so(tmp_path):
    env = {**os.environ, "EQ__CLASSIFY__PATHS__UNZIP_DIR": str(tmp_path / "none")}
    done = subprocess.run([sys.executable, "-m", "eq", "classify", "train"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "run `eq classify ingest` first" in done.stderr, done.stderr
