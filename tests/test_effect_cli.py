"""`eq effect` on painted discs: the whole way, what `eq verify` catches, and studies that cannot be whole."""
import json
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
import shapely

from eq.core.files import read_json, sha256_file, write_json
from eq.core.provenance import MANIFEST, _seal, verify_run
from eq.core.registry import EqError
from eq.data.cohort import Cohort, save_cohort
from eq.data.write import write_png
from eq.quantification.counting import count_instances
from eq.quantification.features import columns_of
from eq.quantification.instances import instance_table
from eq.workflows.cli import main
from eq.workflows.effect import make_study, stands
from eq.workflows.study import STAIN_REFERENCE, measure_glomeruli, opened
from eq.workflows.study_options import StudyOptions
from eq.workflows.train import TrainRequest, train_segmentation

SPOTS = [(60, 60), (60, 170), (165, 55), (150, 165)]


def paint(rng, level):
    "Four discs; the higher the level, the fewer light lumens they have."
    yy, xx = np.mgrid[:280, :280]
    cloud = cv2.resize(rng.normal(0, 9, (14, 14)), (280, 280), interpolation=cv2.INTER_CUBIC)  # so that no two fields look alike
    image = np.array([226, 190, 208]) + cloud[..., None] + rng.normal(0, 4, (280, 280, 3))
    mask, grades = np.zeros((280, 280), np.uint8), []
    spots = [(y + int(rng.integers(-14, 15)), x + int(rng.integers(-14, 15))) for y, x in SPOTS]
    for y, x in spots:
        swelling = float(np.clip(level + rng.normal(0, 0.15), 0, 1))
        disc = np.hypot(yy - y, xx - x) < 34
        image[disc] = np.array([168, 92, 160]) + rng.normal(0, 8, (int(disc.sum()), 3))
        for _ in range(round(14 * (1 - swelling))):
            angle, far = rng.uniform(0, 2 * np.pi), 24 * np.sqrt(rng.random())
            hole = np.hypot(yy - y - far * np.sin(angle), xx - x - far * np.cos(angle)) < 4
            image[hole] = 246
        mask[disc] = 1
        grades.append(int(np.searchsorted([0.25, 0.5, 0.75], swelling)))
    return np.clip(image, 0, 255).astype(np.uint8), mask, list(zip(spots, grades, strict=True))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Twelve animals in two groups, two raters, a network."
    here, rng, rows, scores = tmp_path_factory.mktemp("world"), np.random.default_rng(5), [], []
    for a in range(12):
        image, mask, grades = paint(rng, (0.3, 0.75)[a % 2] + rng.normal(0, 0.05))
        name = f"m{a:02d}.png"
        write_png(here / name, image)
        write_png(here / f"m{a:02d}_mask.png", mask * np.uint8(255))
        rows.append({"image": str(here / name), "mask": str(here / f"m{a:02d}_mask.png"), "mask_coding": "grey127", "subject": f"m{a:02d}",
                     "group": ("control", "drug")[a % 2], "px_size_um": 1.0, "part": ["train"] * 8 + ["validate"] * 2 + ["test"] * 2})
        rows[-1]["part"] = rows[-1]["part"][a]
        for rater in ("Anna", "Ben"):
            for (y, x), grade in grades:
                scores.append({"image": name, "x": x, "y": y, "rater": rater, "score": int(np.clip(grade + rng.choice([-1, 0, 0, 0, 1]), 0, 3))})
    # a network for other pictures of the same kind: its training images are no study images
    other = here / "other"
    other.mkdir()
    strange = []
    for i in range(6):
        image, mask, _ = paint(rng, 0.5)
        write_png(other / f"t{i}.png", image)
        write_png(other / f"t{i}_mask.png", mask * np.uint8(255))
        strange.append({"image": str(other / f"t{i}.png"), "mask": str(other / f"t{i}_mask.png"), "mask_coding": "grey127", "subject": f"t{i}",
                        "part": ["train"] * 4 + ["validate", "test"], "px_size_um": 1.0})
        strange[-1]["part"] = strange[-1]["part"][i]
    values = {"arch": "unet", "encoder": "tu-mobilenetv3_small_050", "epochs": 8, "steps_per_epoch": 8, "batch_size": 4, "crop": 96, "scale": 2.0, "lr": 3e-3}
    model = train_segmentation(TrainRequest("glom", Cohort(table=pd.DataFrame(strange), name="strange", task="glom"), here / "model", values=values, quiet=True)).folder
    save_cohort(Cohort(table=pd.DataFrame(rows), name="discs", task="glom"), here / "cohort.csv")
    pd.DataFrame(scores).to_csv(here / "grades.csv", index=False)
    return here, model


@pytest.fixture(scope="module")
def study(world):
    here, model = world
    more = {"section": "sphere", "min_diameter": 20.0, "stain_normalise": "macenko"}  # replayed by `eq verify` like everything else
    options = StudyOptions(str(here / "cohort.csv"), str(model), str(here / "grades.csv"), grader="proportional_odds", features=("geometry", "lumen", "stain"), **more)
    report, made = make_study(options, here / "run", quiet=True)
    return report, made


def test_the_whole_way(study):
    report, made = study
    assert {k: v for k, v in made.problems.items() if k != "sensitivity"} == {}
    effect = made.results["effects"].full[0]
    assert effect.groups == ("control", "drug") and effect.n_animals == 12 and effect.estimate > 0.3 and effect.p < 0.05 and stands(made)
    for name in ("glomeruli", "features", "ratings", "grades", "effect"):
        table = pd.read_csv(report.parent / f"{name}.csv", dtype={"receipt": str})
        assert table["receipt"].str.fullmatch("[0-9a-f]{16}").all() and (report.parent / f"{name}.parquet").is_file(), name
    text = report.read_text(encoding="utf-8")
    places = [text.index(f"<h2>{title}</h2>") for title in ("The effect", "The glomeruli", "Checks", "Receipts")]
    assert places == sorted(places) and "<script" not in text and "://" not in text.split("</style>")[1]  # pictures in base64 can spell http
    params = read_json(report.parent / MANIFEST)["params"]
    assert (params["section"], params["min_diameter"], params["stain_normalise"], params["guard"]) == ("sphere", 20.0, "macenko", None)
    alone = subprocess.run([sys.executable, "-m", "eq", "verify", str(report.parent)], capture_output=True, text=True)  # this process knows all stages already
    assert alone.returncode == 0 and "every number came out the same" in alone.stdout, alone.stdout + alone.stderr


def test_outlines_weights_and_the_reference_of_stain(study):
    report, made = study
    table = pd.read_csv(report.parent / "glomeruli.csv")
    shapes = table["polygon"].map(shapely.from_wkt)
    assert table["polygon"].str.len().max() < 1000 and (shapes.map(lambda s: s.area) / table["area_px2"]).between(0.97, 1.03).all()
    assert (shapes.map(lambda s: s.bounds[0]) >= table["left"]).all() and (shapes.map(lambda s: s.bounds[3]) <= table["bottom"]).all()
    plain = count_instances(*labels_of(made, table["image"][0]))
    counted = plain["status"] == "counted"
    mean = plain["eq_diameter_px"][counted].mean()
    here = table[table["image"] == table["image"][0]]
    assert np.allclose(here["weight"][counted.to_numpy()], plain["weight"][counted] * mean / plain["eq_diameter_px"][counted])
    stain = [r for r in made.book if r.kind == "stain"]
    assert len(stain) == 1 and (report.parent / STAIN_REFERENCE).is_file() and "are levelled" in report.read_text(encoding="utf-8")
    assert all(stain[0].id in made.book.by_id[r].parents for r in made.tables["features"]["receipt"])


def labels_of(made, image):
    "Predicted labels of an image, and their table."
    labels = next(found.read(0, 0, found.height, found.width) for row, _, found in opened(made) if str(row["image"]) == image)
    return labels, instance_table(labels)


@pytest.fixture
def copy(study, tmp_path):
    "The run, copied so that it can be spoilt."
    shutil.copytree(study[0].parent, tmp_path / "run")
    return tmp_path / "run"


def test_one_flipped_pixel(study, world, capsys):
    from eq.data.io import open_image

    path = world[0] / "m03.png"
    kept = path.read_bytes()
    pixels = open_image(path).rgb()
    pixels[140, 140, 0] ^= 1
    write_png(path, pixels)
    try:
        assert main(["verify", str(study[0].parent)]) == 1
    finally:
        path.write_bytes(kept)
    assert "broken at input" in (said := capsys.readouterr().out) and "m03.png" in said
    assert verify_run(study[0].parent).ok


def test_one_edited_cell(copy, capsys):
    table = copy / "features.csv"
    lines = table.read_text().splitlines()
    lines[3] = lines[3].replace(lines[3].split(",")[1], "12345.0", 1)
    table.write_text("\n".join(lines) + "\n")
    assert main(["verify", str(copy), "--hashes-only"]) == 1
    assert "features.csv" in capsys.readouterr().out


def test_an_edited_cell_with_all_its_hashes(copy, capsys):
    "Somebody who also renews the manifest is found by the receipt of the row."
    table = copy / "features.csv"
    lines = table.read_text().splitlines()
    name = lines[3].split(",")[0]
    lines[3] = lines[3].replace(lines[3].split(",")[1], "12345.0", 1)
    table.write_text("\n".join(lines) + "\n")
    manifest = read_json(copy / MANIFEST)
    for entry in manifest["artefacts"]:
        if entry["path"] == "features.csv":
            entry |= {"sha256": sha256_file(table), "bytes": table.stat().st_size}
    write_json(copy / MANIFEST, manifest | {"seal": _seal(manifest)})
    assert verify_run(copy).ok
    assert main(["verify", str(copy)]) == 1
    assert f"broken at features {name}" in capsys.readouterr().out


def test_a_swapped_checkpoint(study, world, capsys):
    weights = world[1] / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + b"\0\0\0\1")
    try:
        assert main(["verify", str(study[0].parent)]) == 1
    finally:
        weights.write_bytes(kept)
    assert "model.safetensors" in capsys.readouterr().out


def changed(world, tmp_path, name, change, **more):
    "A study of a changed cohort: the report is made in any case."
    here, model = world
    table = pd.read_csv(here / "cohort.csv", dtype={"subject": str, "group": str})
    table["image"], table["mask"] = [str(here / i) for i in table["image"]], [str(here / m) for m in table["mask"]]
    csv = save_cohort(Cohort(table=change(table), name=name, task="glom"), tmp_path / f"{name}.csv")
    ratings = more.pop("ratings", str(here / "grades.csv"))
    options = StudyOptions(str(csv), str(model), ratings, **{"grader": "proportional_odds", "features": ("lumen",), **more})
    return make_study(options, tmp_path / name, quiet=True)


def test_one_group_only(world, tmp_path):
    report, made = changed(world, tmp_path, "one", lambda t: t.assign(group="control"))
    assert "effect" in made.problems and "group" in made.problems["effect"] and not stands(made)
    text = report.read_text(encoding="utf-8")
    assert "No effect can be given" in text and "Agreement of people" in text and "The glomeruli" in text


def test_a_subject_in_two_groups(world, tmp_path):
    _, made = changed(world, tmp_path, "both", lambda t: t.assign(subject=["m00" if s == "m01" else s for s in t["subject"]]))
    assert "m00" in made.problems["effect"] and "agreement" in made.results


def test_nobody_graded(world, tmp_path):
    report, made = changed(world, tmp_path, "none", lambda t: t, ratings=None, grader="cnn")
    assert "nobody's grades were given" in made.problems["ratings"] and made.problems["effect"] == made.problems["ratings"]
    assert "glomeruli" in made.tables and "features" in made.tables and "nobody" in report.read_text(encoding="utf-8")
    features = pd.read_csv(report.parent / "features.csv", float_precision="round_trip")
    seen = columns_of(features.drop(columns="receipt"), ["encoder"])  # what the grader reads is measured beside what was asked for
    assert len(seen) > 100 and "open_fraction" in features and features[seen].std().max() > 0
    made.results.pop("encoder")  # loaded again, it sees the same
    np.testing.assert_allclose(measure_glomeruli(made, made.tables["glomeruli"])[seen], features[seen], rtol=1e-6)


def test_raters_who_never_overlap(world, tmp_path):
    sheet = pd.read_csv(world[0] / "grades.csv")
    apart = sheet[(sheet["rater"] == "Anna") == sheet["image"].isin([f"m{a:02d}.png" for a in range(6)])]
    apart.to_csv(tmp_path / "grades-apart.csv", index=False)
    _, made = changed(world, tmp_path, "apart", lambda t: t, ratings=str(tmp_path / "grades-apart.csv"))
    assert "effects" in made.results and any("overlap" in n or "same glomerul" in n for n in made.results["agreement"].notes)


def test_a_picture_that_stands_for_two_animals(world, tmp_path, capsys):
    def twice(table):
        shutil.copy(table["image"][0], tmp_path / "again.png")
        return table.assign(image=[str(tmp_path / "again.png") if s == "m03" else i for s, i in zip(table["subject"], table["image"], strict=True)])

    _, made = changed(world, tmp_path, "twice", twice)
    assert made.results["leaks"].fatal and not stands(made)


def test_bad_input_is_one_line(world, tmp_path, capsys):
    here, model = world
    assert main(["effect", str(here / "cohort.csv"), "--model", str(model), "--ratings", "nowhere.csv", "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert "no sheet of grades" in said and said.count("\n") == 1 and not (tmp_path / "x").exists()


def test_options_of_the_command_reach_the_study(world, tmp_path, monkeypatch, capsys):
    here, model = world
    asked = ["effect", str(here / "cohort.csv"), "--model", str(model), "--ratings", str(here / "grades.csv"), "--out", str(tmp_path / "x")]
    for wrong, said in ((["--features", "encodr"], "did you mean 'encoder'?"), (["--stain-normalise", "x"], "choose from ['macenko', 'none', 'reinhard']"),
                        (["--section", "cube"], "choose from ['profile', 'sphere']"), (["--guard", "9", "1", "1", "9"], "belongs to the counting rule 'frame'")):
        assert main([*asked, *wrong]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "x").exists(), wrong
    seen = []

    def stop(options, out):
        seen.append(options)
        raise EqError("stop")

    monkeypatch.setattr("eq.workflows.effect.make_study", stop)
    assert main(asked) == 2 and main([*asked, "--rule", "whole_section"]) == 2
    main([*asked, "--count-rule", "frame", "--guard", "9", "1", "1", "9", "--section", "sphere", "--min-diameter", "30",
          "--features", "lumen", "--features", "encoder", "--stain-normalise", "reinhard", "--grader", "cnn"])  # fmt: skip
    assert seen[0].features == StudyOptions.features and (seen[0].rule, seen[0].guard, seen[1].rule) == ("border_weights", None, "whole_section")
    o = seen[2]
    assert (o.rule, o.guard, o.section, o.min_diameter) == ("frame", (9, 1, 1, 9), "sphere", 30.0)
    assert (o.features, o.stain_normalise, o.grader) == (("lumen", "encoder"), "reinhard", "cnn")


def test_json_of_the_manifest_holds_the_numbers(study):
    metrics = json.loads((study[0].parent / MANIFEST).read_text())["metrics"]
    assert metrics["effect"][0]["n_animals"] == 12 and metrics["grades"]["qwk"]["estimate"] > 0.3
