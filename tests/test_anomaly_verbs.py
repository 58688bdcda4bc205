"""`eq train anomaly` and `eq evaluate anomaly` as a user types them, and what labels of test images can change: nothing before the verdict."""

import re
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from eq.core.files import read_json, write_json
from eq.core.provenance import verify_run
from eq.data.cohort import Cohort, save_cohort
from eq.inference.anomaly_places import map_names
from eq.models.checkpoint import read_meta
from eq.workflows.anomaly_judge import evaluate_anomaly
from eq.workflows.anomaly_lesson import split_normals
from eq.workflows.anomaly_settings import anomaly_settings
from eq.workflows.anomaly_train import AnomalyRequest, train_anomaly
from eq.workflows.cli import main

SMALL = {"size": 32, "latent": 8, "width": 0.05, "normal": "well", "epochs": 1, "batch_size": 16, "tracker": "none"}


@pytest.fixture(scope="module")
def ward(tmp_path_factory) -> Cohort:
    "Thirty-two pictures of noise around a disc; rings are ill, dim ones are ill in another way."
    folder = tmp_path_factory.mktemp("ward")
    y, x = np.mgrid[:40, :40]
    rng, rows = np.random.default_rng(0), []
    for i in range(32):
        label = "well" if i < 20 else "ring" if i < 26 else "dim"
        inside = (np.hypot(y - 20, x - 20) < 11) & (np.hypot(y - 20, x - 20) >= (6 if label == "ring" else 0))
        grey = (60 + 120 * inside + rng.normal(0, 40, (40, 40))) * (0.6 if label == "dim" else 1)
        Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        rows.append({"image": str(folder / f"{i}.png"), "label": label, "subject": f"s{i // 2}"})
    return Cohort(pd.DataFrame(rows), name="ward", task="classify", synthetic=True)


def options(**more) -> list[str]:
    return [word for k, v in (SMALL | more).items() for word in ("--" + k.replace("_", "-"), str(v))]


def test_labels_of_test_images_change_nothing_before_the_verdict(ward, tmp_path):
    "Tested images change their labels, well for ill, and pixels of the ill are mixed: weights, epoch and thresholds stay, to the last bit; the verdict does not."
    table = ward.table.assign(not_for_training=["held out" if i >= 16 else "" for i in range(32)])  # whatever their label: the same parts for training
    other, ill, held = table.copy(), table["label"] != "well", table["not_for_training"] != ""
    other.loc[ill, "image"] = other.loc[ill, "image"].to_numpy()[::-1]
    other.loc[held, "label"] = other.loc[held, "label"].map({"ring": "well", "well": "ring", "dim": "dim"})
    assert (other["label"] != table["label"]).sum() == 10
    cohorts = [Cohort(t, name="ward", task="classify", synthetic=True) for t in (table, other)]
    runs = [train_anomaly(AnomalyRequest(source=c, out=tmp_path / n, values=SMALL | {"epochs": 2}, allow_leak="drawn alike", quiet=True))
            for n, c in zip("ab", cohorts, strict=True)]
    for arch in runs[0]:
        metas = [run[arch].meta for run in runs]
        assert metas[0].weights_sha256 == metas[1].weights_sha256 and metas[0].metrics["epoch"] == metas[1].metrics["epoch"], arch
        assert metas[0].data["parts"] == metas[1].data["parts"] and [r["valid_loss"] for r in runs[0][arch].history] == [r["valid_loss"] for r in runs[1][arch].history]
    reports = [evaluate_anomaly([r.folder for r in run.values()], c, tmp_path / f"j{i}", ("pca",), quiet=True)
               for i, (run, c) in enumerate(zip(runs, cohorts, strict=True))]
    for name, first in reports[0].witnesses.items():
        assert np.array_equal(first.validate, reports[1].witnesses[name].validate), name
    thresholds, aurocs = ([{n: f(s) for n, s in next(v for v in r.verdicts if v.contrast == "ring").scores.items()} for r in reports]
                          for f in (lambda s: s.threshold, lambda s: s.auroc.estimate))
    assert thresholds[0] == thresholds[1] and {"unet", "reversed", "pca"} <= set(thresholds[0])
    assert aurocs[0] != aurocs[1]


def test_pixels_of_normal_test_images_change_nothing_before_the_verdict(ward, tmp_path):
    "Normal test images are replaced by others: weights, and thresholds of networks and baselines, stay to the last bit; only what is said of them changes."
    tested = split_normals(ward, anomaly_settings(SMALL)).test.table
    mine = set(tested.loc[tested["label"] == "well", "image"])
    assert len(mine) >= 2
    other, rng = ward.table.copy(), np.random.default_rng(5)
    for i, image in enumerate(sorted(mine)):
        Image.fromarray(rng.integers(0, 255, (40, 40), dtype=np.uint8)).save(tmp_path / f"other{i}.png")
        other.loc[other["image"] == image, "image"] = str(tmp_path / f"other{i}.png")
    changed = Cohort(other, name="ward", task="classify", synthetic=True)
    runs = [train_anomaly(AnomalyRequest(source=c, out=tmp_path / n, values=SMALL, allow_leak="drawn alike", quiet=True))
            for n, c in (("a", ward), ("b", changed))]
    assert [r.meta.weights_sha256 for r in runs[0].values()] == [r.meta.weights_sha256 for r in runs[1].values()]
    for reading in ({}, {"map": "by_place"}):
        reports = [evaluate_anomaly([r.folder for r in run.values()], c, tmp_path / f"j{i}{len(reading)}", ("pca",), quiet=True, reading=reading)
                   for i, (run, c) in enumerate(zip(runs, (ward, changed), strict=True))]
        thresholds = [{n: s.threshold for n, s in r.verdicts[0].scores.items()} for r in reports]
        assert thresholds[0] == thresholds[1] and {"unet", "reversed", "pca"} <= set(thresholds[0])
        assert not np.array_equal(reports[0].witnesses["unet"].test.scores, reports[1].witnesses["unet"].test.scores)


def test_train_resume_and_judge_from_the_command_line(ward, tmp_path, capsys):
    save_cohort(ward, tmp_path / "ward.csv")
    out = tmp_path / "run"
    said = ["--source", str(tmp_path / "ward.csv"), "--out", str(out), "--allow-leak", "drawn alike"]
    assert main(["train", "anomaly", "--arch", "unet", *said, *options()]) == 0
    assert "checkpoint:" in capsys.readouterr().out and verify_run(out / "unet").ok
    assert main(["train", "anomaly", "--resume", str(out / "unet" / "checkpoints" / "last"), "--epochs", "2", "--keep-epochs", "--tracker", "none", "--allow-leak", "x"]) == 0
    assert read_meta(out / "unet").metrics["epoch"] in (1, 2) and len(pd.read_csv(out / "unet" / "history.csv")) == 2
    capsys.readouterr()
    asked = ["--model", str(out / "unet"), "--baseline", "brightness", "--out", str(tmp_path / "judged")]  # it knows its images itself
    assert main(["evaluate", "anomaly", *asked]) == 0
    told = capsys.readouterr().out
    assert "AUROC" in told and "report.html" in told and (tmp_path / "judged" / "report.html").is_file()
    capsys.readouterr()
    assert main(["evaluate", "anomaly", *asked[:-1], str(tmp_path / "again"), "--map", "ssim", "--reduce", "top", "--quantile", "0.8"]) == 0
    params = read_json(tmp_path / "again" / "manifest.json")["params"]
    assert params["reading"] == {"map": "ssim", "reduce": "top", "quantile": 0.8} == {k: params["config"][k] for k in params["reading"]}
    assert read_json(tmp_path / "judged" / "manifest.json")["params"]["reading"] == {"map": "l1", "reduce": "mean", "quantile": 0.95}
    second = out / "unet" / "checkpoints" / "epoch-002"  # kept, and one to be judged; not one to go on from
    assert main(["evaluate", "anomaly", "--model", str(second), "--baseline", "brightness", "--out", str(tmp_path / "second")]) == 0
    assert main(["train", "anomaly", "--resume", str(second), "--epochs", "3"]) == 2
    assert f"epoch-002 is not the last checkpoint, and only that holds what it takes to go on; valid: {out / 'unet' / 'checkpoints' / 'last'}" in capsys.readouterr().err
    images = pd.read_csv(tmp_path / "judged" / "images.csv")
    trained = set(read_meta(out / "unet").data["parts"]["train"])
    assert not trained & set(images["image"]) and {"unet", "brightness"} <= set(images.columns)


def test_a_folder_with_a_folder_a_class_is_trained_on_and_judged(ward, tmp_path, capsys):
    "No table: folders are labels, names tell patients. One class is enough to learn from, and not to judge."
    folder = tmp_path / "set"
    for i, row in enumerate(ward.table.itertuples()):
        target = folder / row.label / f"{row.subject}_{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path(row.image).read_bytes())
    train = ["train", "anomaly", "--arch", "unet", "--allow-leak", "drawn alike", *options()]
    judge = ["evaluate", "anomaly", "--baseline", "brightness", "--model"]
    assert main([*train, "--source", str(folder), "--out", str(tmp_path / "run")]) == 0
    assert main([*judge, str(tmp_path / "run" / "unet"), "--out", str(tmp_path / "judged")]) == 0
    data, images = read_meta(tmp_path / "run" / "unet").data, pd.read_csv(tmp_path / "judged" / "images.csv")
    assert data["unit"] == "subject" and {Path(p).parent.name for part in data["parts"].values() for p in part} == {"well"}
    assert set(images["label"]) == {"well", "ring", "dim"} and set(images["subject"]) >= {f"s{i}" for i in range(10, 16)}
    assert main([*train, "--source", str(folder / "well"), "--out", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    assert main([*judge, str(tmp_path / "one" / "unet")]) == 2
    said = capsys.readouterr().err
    assert "the test part holds ['well']; valid: 'well' and another label at least" in said and "Traceback" not in said
    assert main([*train, "--source", str(folder), "--normal", "healthy", "--out", str(tmp_path / "no")]) == 2
    assert "unknown label of normal images 'healthy'" in capsys.readouterr().err


def test_a_network_from_a_stream_is_judged_on_the_patients_that_it_held_out(ward, tmp_path, capsys):
    "Not on the stream, which keeps no image; on the unpacked set, whose files say by their names who was held out."
    folder, table = tmp_path / "set", ward.table
    for row in table.itertuples():
        target = folder / ("well" if row.label == "well" else "ill") / row.image.rsplit("/", 1)[-1]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path(row.image).read_bytes())
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        [archive.write(p, p.relative_to(folder)) for p in sorted(folder.rglob("*.png"))]
    assert main(["train", "anomaly", "--arch", "unet", "--source", str(tmp_path / "set.zip"), "--out", str(tmp_path / "run"), *options()]) == 0
    asked = ["evaluate", "anomaly", "--model", str(tmp_path / "run" / "unet"), "--baseline", "brightness"]
    capsys.readouterr()
    for more in ([], ["--source", "kaggle:owner/set"], ["--source", str(tmp_path / "set.zip")]):
        assert main([*asked, *more]) == 2
        assert "give --source FOLDER or CSV of images that took no part" in capsys.readouterr().err
    assert main([*asked, "--source", str(folder), "--out", str(tmp_path / "judged")]) == 0
    data, images = read_meta(tmp_path / "run" / "unet").data, pd.read_csv(tmp_path / "judged" / "images.csv")
    tested = {Path(i).name for i in images.loc[images["label"] == "well", "image"]}
    assert len(tested) == data["held"]["images"] > 0 and not tested & {Path(n).name for part in data["parts"].values() for n in part}


def test_the_example_on_arrays_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    "Line by line as it stands there, with small numbers."
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "create_autoencoder" in block]
    for key in ("size", "latent", "width", "epochs"):
        monkeypatch.setenv(f"EQ__ANOMALY__{key.upper()}", str(SMALL[key]))
    monkeypatch.chdir(tmp_path)
    train, valid, test = (np.random.default_rng(n).random((n, 32, 32), np.float32) for n in (16, 4, 12))
    exec(example, {"train": train, "valid": valid, "test": test, "ill": np.arange(12) % 3 == 0, "patients": np.arange(12)})
    assert re.match(r"[01]\.\d+ \(", capsys.readouterr().out) and read_meta(tmp_path / "outputs" / "mine").task == "anomaly"


@pytest.mark.parametrize("args, said", [
    (["train", "anomaly", "--arch", "unit"], "did you mean 'unet'?"),
    (["train", "anomaly", "--normal", "healthy"], "unknown label of normal images 'healthy'"),
    (["train", "anomaly", "--size", "100"], "valid: a multiple of 32"),
    (["train", "anomaly", "--intensity", "standart"], "did you mean 'standard'?"),
    (["train", "anomaly", "--map", "l3"], "unknown anomaly map 'l3'"),
    (["train", "anomaly", "--no-wandb", "--wandb-project", "x"], "valid: one of them"),
    (["train", "anomaly", "--resume", "nowhere"], "nothing to resume at nowhere"),
    (["train", "anomaly", "--source", "kaggle:owner"], "kaggle"),
    (["train", "anomaly", "--resume", "otherverb"], "nothing to resume at otherverb"),
    (["train", "anomaly", "--reduce", "max"], "unknown reduction of a map 'max'"),
    (["evaluate", "anomaly", "--model", "nowhere"], "no checkpoint here"),
    (["evaluate", "anomaly"], "--model"),
])
def test_wrong_input_is_answered_in_one_line(args, said, capsys, monkeypatch, tmp_path, ward):
    monkeypatch.chdir(tmp_path)
    save_cohort(ward, tmp_path / "ward.csv")
    write_json(tmp_path / "otherverb" / "request.json", {"verb": "mito", "source": "em"})  # as other verbs leave one
    more = ["--source", "ward.csv"] if "--normal" in args else []
    assert main([*args, *more]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and len(error.strip().splitlines()) == 1, error


def test_help_names_every_option(capsys):
    assert main(["train", "anomaly", "--help"]) == 0
    told = capsys.readouterr().out
    assert main(["evaluate", "anomaly", "--help"]) == 0
    maps = capsys.readouterr().out
    assert all(f"--{name}" in maps for name in ("map", "reduce", "quantile")) and all(name in maps for name in map_names())
    assert all(f"--{name}" in told for name in ("arch", "samples", "epochs", "resume", "no-wandb", "wandb-project", "patience", "delta")) and "Examples:" in told
