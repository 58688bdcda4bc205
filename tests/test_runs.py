"""The run notebooks end to end: `eq run NAME` on small painted cohorts leaves notebook, report, metrics and a manifest that verifies."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

EQ = Path(sys.executable).with_name("eq")
SECONDS = 3 / 60  # of training, in minutes


@pytest.fixture(scope="module")
def painted(tmp_path_factory) -> dict[str, Path]:
    "One section or field a unit, 256 px: enough to run through."
    from eq.data.synthetic import write_em_cohort, write_kidney_cohort

    folder = tmp_path_factory.mktemp("painted")
    return {
        "em": write_em_cohort(folder / "em", n_sections=6, seed=3, size=256),
        "kidney": write_kidney_cohort(folder / "kidney", n_animals=6, sections=1, fields=1, seed=3, size=256),
    }


def run(name: str, out: Path, *flags: str, **parameters: object) -> subprocess.CompletedProcess:
    pairs = [word for key, value in parameters.items() for word in ("-p", key, str(value))]
    return subprocess.run([EQ, "run", name, *pairs, "--out", out, *flags], capture_output=True, text=True, env={**os.environ, "EQ__EVALUATE__DRAWS": "200"})


def check(done: subprocess.CompletedProcess, name: str, out: Path) -> dict:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip().endswith("report.html")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Synthetic images" in page and page.count("data:image/png;base64,") >= 2 and "<script" not in page
    metrics, manifest = (json.loads((out / file).read_text()) for file in ("metrics.json", "manifest.json"))
    assert 0 <= metrics["scores"]["dice"]["estimate"] <= 1 and manifest["status"] == "done"
    listed = {a["path"] for a in manifest["artefacts"]}
    assert {f"{name}.ipynb", "report.html", "metrics.json", "scores.csv"} <= listed
    cells = json.loads((out / f"{name}.ipynb").read_text())["cells"]
    assert any("injected-parameters" in c["metadata"].get("tags", []) for c in cells)
    assert any(o.get("data", {}).get("image/png") for c in cells for o in c.get("outputs", [])), "no figure in the executed notebook"
    assert list((out / "predictions").rglob("overlay.png")) and list((out / "predictions").rglob("objects.geojson"))
    verified = subprocess.run([EQ, "verify", out], capture_output=True, text=True)
    assert verified.returncode == 0, verified.stdout
    return metrics


def test_mitochondria(painted, tmp_path):
    out = tmp_path / "run"
    check(run("mitochondria", out, source=painted["em"], minutes=SECONDS, seed=1), "mitochondria", out)


def test_glomeruli(painted, tmp_path):
    "Gone on with after it was done: the same weights, not trained again."
    out = tmp_path / "run"
    given = {"source": painted["kidney"], "minutes": SECONDS}
    first = check(run("glomeruli", out, **given), "glomeruli", out)
    weights = (out / "train" / "model.safetensors").read_bytes()
    assert "is not empty" in run("glomeruli", out, **given).stderr
    assert "begun with other settings: seed 0, now 1" in run("glomeruli", out, "--resume", **given, seed=1).stderr
    assert check(run("glomeruli", out, "--resume", **given), "glomeruli", out)["scores"] == first["scores"]
    assert (out / "train" / "model.safetensors").read_bytes() == weights


def test_endotheliosis(painted, tmp_path):
    out = tmp_path / "run"
    done = run("endotheliosis", out, em_source=painted["em"], source=painted["kidney"], mito_minutes=SECONDS, minutes=SECONDS)
    check(done, "endotheliosis", out)
    assert json.loads((out / "glom" / "model.json").read_text())["parent"], "the second network starts from the first"
    assert (out / "objects.csv").exists()


@pytest.mark.parametrize("name", ["glomeruli", "endotheliosis"])
def test_pixel_sizes_are_looked_at_before_the_minutes_are_spent(name, painted, tmp_path):
    "A test part of two pixel sizes cannot be predicted in one go: nothing is trained first."
    from eq.data.cohort import load_cohort, save_cohort

    cohort, out = load_cohort(painted["kidney"]), tmp_path / "run"
    cohort.table.loc[cohort.table.index[cohort.table["part"] == "test"][0], "px_size_um"] = 0.125
    done = run(name, out, source=save_cohort(cohort, tmp_path / "mixed.csv"), **({"em_source": painted["em"]} if name == "endotheliosis" else {}))
    assert done.returncode == 2 and "pixel sizes [0.125, " in done.stderr and "are mixed; valid: images of one pixel size" in done.stderr, done.stderr[-2000:]
    assert not list(out.rglob("model.safetensors")) and not (out / "mito").exists() and not (out / "train").exists()


def class_folder(root: Path) -> Path:
    "Two classes of numbered slices, bright squares are tumours, and a text that calls itself a picture."
    rng = np.random.default_rng(0)
    for label, level in (("Normal", 60), ("Tumor", 180)):
        (root / label).mkdir(parents=True)
        for i in range(90):
            Image.fromarray(np.clip(rng.normal(level, 15, (40, 40)), 0, 255).astype(np.uint8)).save(root / label / f"{label}- ({i}).png")
    (root / "Tumor" / "Tumor- (99).png").write_text("no picture")
    return root


def test_kidney_ct(tmp_path, monkeypatch):
    "A folder of class folders; gone on with, nothing is trained again, and other settings are refused."
    for key, value in {"IMAGE_SIZE": "[64, 64, 3]", "BODY": "false", "BATCH_SIZE": "16"}.items():
        monkeypatch.setenv(f"EQ__CLASSIFY__{key}", value)
    out, given = tmp_path / "run", {"source": class_folder(tmp_path / "set"), "arch": "tu-test_efficientnet", "weights": "none", "minutes": SECONDS}
    done = run("kidney_ct", out, **given)
    assert done.returncode == 0, done.stderr[-4000:]
    manifest, metrics = (json.loads((out / name).read_text()) for name in ("manifest.json", "metrics.json"))
    assert {"kidney_ct.ipynb", "report.html", "metrics.json", "scores.json", "predictions.csv", "train/picture_gate.json"} <= {a["path"] for a in manifest["artefacts"]}
    assert manifest["metrics"]["scores"] == metrics["scores"] and 0 <= metrics["scores"]["accuracy"]["estimate"] <= 1 and metrics["verdict"]
    page, table = (out / "report.html").read_text(encoding="utf-8"), pd.read_csv(out / "predictions.csv")
    assert "Tumor- (99).png" in page and "gradcam: Normal" in page and "gradcam: Tumor" in page  # each map is of the class of its slice
    assert len(table) == json.loads((out / "scores.json").read_text())["images"] and set(table["truth"]) == {"Normal", "Tumor"}
    weights = (out / "train" / "model.safetensors").stat().st_mtime_ns
    assert "begun with other settings: seed 0, now 1" in run("kidney_ct", out, "--resume", **given, seed=1).stderr
    again = run("kidney_ct", out, "--resume", **given)
    assert again.returncode == 0 and (out / "train" / "model.safetensors").stat().st_mtime_ns == weights, again.stderr[-4000:]
    assert json.loads((out / "metrics.json").read_text())["scores"] == metrics["scores"]


def test_anomaly(tmp_path, monkeypatch):
    "Both networks on discs and rings, one table, and report and metrics where every run has them."
    for key, value in {"SIZE": "32", "LATENT": "8", "BATCH_SIZE": "16"}.items():
        monkeypatch.setenv(f"EQ__ANOMALY__{key}", value)
    y, x = np.mgrid[:40, :40]
    rng, rows, out = np.random.default_rng(0), [], tmp_path / "run"
    for i in range(28):
        ring = i >= 20
        inside = (np.hypot(y - 20, x - 20) < 11) & (np.hypot(y - 20, x - 20) >= 6 * ring)
        Image.fromarray(np.clip(60 + 120 * inside + rng.normal(0, 40, (40, 40)), 0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "label": "ring" if ring else "well", "subject": f"s{i // 2}"})
    pd.DataFrame(rows).to_csv(tmp_path / "cohort.csv", index=False)
    given = {"source": tmp_path / "cohort.csv", "normal": "well", "minutes": SECONDS, "width": 0.05, "allow_leak": "drawn alike"}
    done = run("anomaly", out, **given)
    assert done.returncode == 0 and done.stdout.strip().endswith("report.html"), done.stderr[-4000:]
    manifest, metrics = (json.loads((out / name).read_text()) for name in ("manifest.json", "metrics.json"))
    assert {"anomaly.ipynb", "report.html", "metrics.json", "judged/scores.csv", "train/unet/model.safetensors"} <= {a["path"] for a in manifest["artefacts"]}
    found = metrics["scores"]["ring"]
    assert {"unet", "reversed", "pca", "knn"} <= set(found) and 0 <= found["unet"]["auroc"]["estimate"] <= 1
    assert metrics["verdict"] in (out / "report.html").read_text(encoding="utf-8") and manifest["metrics"]["verdict"] == metrics["verdict"]


def test_a_bad_source_fails_in_its_cell_and_says_why(tmp_path):
    out = tmp_path / "run"
    done = run("mitochondria", out, source="em_vcn", minutes=SECONDS)
    assert done.returncode == 2, done.stderr
    assert "did you mean 'em_vnc'?" in done.stderr and "Traceback" not in done.stderr.splitlines()[-1]
    assert json.loads((out / "manifest.json").read_text())["status"] == "failed" and (out / "mitochondria.ipynb").exists()


def test_the_demo_fails_when_the_network_learned_nothing(tmp_path):
    "Exit code 1, and a report that says why."
    out = tmp_path / "demo"
    small = ["--mito-minutes", "0.02", "--glom-minutes", "0.02", "--animals", "6", "--size", "256", "--study-animals", "4", "--out", str(out)]
    done = subprocess.run([EQ, "demo", *small], capture_output=True, text=True, env={**os.environ, "EQ__DEMO__MIN_DICE": "0.999"})
    assert done.returncode == 1, done.stderr[-3000:]
    assert "NO   Dice on unseen animals is at least 1.00" in done.stdout and done.stdout.strip().endswith("report.html")
    assert "the treatment effect can be told" in done.stdout and (out / "images" / "study" / "ratings.csv").is_file()
    assert "checks failed" in (out / "report.html").read_text(encoding="utf-8")
