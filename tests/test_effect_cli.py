"""`eq effect` on painted discs: the whole way, what `eq verify` catches, and studies that cannot be whole."""
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

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


def asked(world):
    here, model = world
    given = StudyOptions(str(here / "cohort.csv"), str(model), str(here / "grades.csv"), grader="proportional_odds", features=("geometry", "lumen", "stain"))
    more = {"section": "sphere", "min_diameter": 20.0, "stain_normalise": "macenko"}  # replayed by `eq verify` like everything else
    return replace(given, dice_step=0.5, **more)  # one level beside what the network reached: each grades everything again


@pytest.fixture(scope="module")
def study(world):
    here, model = world
    report, made = make_study(asked(world), here / "run", quiet=True)
    return report, made


def test_the_whole_way(study):
    report, made = study
    assert {k: v for k, v in made.problems.items() if k != "sensitivity"} == {}
    effect = made.results["effects"].full[0]
    assert effect.groups == ("control", "drug") and effect.n_animals == 12 and effect.estimate > 0.3 and effect.p < 0.05 and stands(made)
    for name in ("leaks", "glomeruli", "ledger", "features", "ratings", "unplaced", "grades", "folds", "agreement", "pairs", "bias", "effect", "sensitivity", "queue"):
        table = pd.read_csv(report.parent / f"{name}.csv", dtype={"receipt": str})
        assert table["receipt"].dropna().str.fullmatch("[0-9a-f]{16}").all() and (report.parent / f"{name}.parquet").is_file(), name
        assert len(table) or name in ("leaks", "unplaced"), name
    text = report.read_text(encoding="utf-8")
    places = [text.index(f"<h2>{title}</h2>") for title in ("The effect", "The glomeruli", "Checks", "Receipts")]
    pairs = pd.read_csv(report.parent / "pairs.csv")["pair"].tolist()
    assert pairs == ["Anna and Ben", "Anna and eq", "Ben and eq"] and "<h2>Pairs of raters</h2>" in text and "<h2>Prediction sets against people</h2>" in text
    assert "hold one person&#39;s own score in 9 of 10" in text and "+nan" not in text
    assert places == sorted(places) and "<script" not in text and "://" not in text.split("</style>")[1]  # pictures in base64 can spell http
    done = subprocess.run([sys.executable, "-m", "eq", "verify", str(report.parent)], capture_output=True, text=True)  # a process that made no study
    assert done.returncode == 0 and "every number came out the same" in done.stdout, done.stdout + done.stderr
    params = read_json(report.parent / MANIFEST)["params"]
    assert (params["section"], params["min_diameter"], params["stain_normalise"], params["guard"]) == ("sphere", 20.0, "macenko", None)


def test_the_outlines_are_judged_by_what_the_network_reached(study, world):
    report, made = study
    dice = round(read_json(world[1] / "model.json")["metrics"]["validation_dice"], 3)
    levels = made.tables["sensitivity"]["dice"].tolist()
    assert {0.95, dice} <= set(levels) and made.results["sensitivity"].measured == dice
    assert f"the outlines have {dice:.2f} (Dice on validation images" in report.read_text(encoding="utf-8")


def test_outlines_of_the_queue_lie_beside_its_sheet(study):
    from eq.data.annotations import read_geojson

    folder = study[0].parent / "review"
    sheet = pd.read_csv(folder / "review.csv", dtype=str, keep_default_na=False)
    assert len(sheet) == len(study[1].tables["queue"]) and (sheet["geojson_id"] != "").all()
    first = sheet[sheet["image"] == sheet["image"][0]]
    drawn = read_geojson(folder / "outlines" / f"{Path(sheet['image'][0]).stem}.geojson", 280, 280)
    assert len(np.unique(drawn[drawn > 0])) == len(first)


def test_a_review_and_an_edited_figure(study, world, tmp_path, capsys):
    "A filled copy of the sheet changes the effect and leaves the first run whole. In the second run the only broken link is a figure that somebody edited."
    report, made = study
    own = report.parent / "review" / "review.csv"
    assert "--review" in report.read_text(encoding="utf-8")
    argv = ["effect", str(world[0] / "cohort.csv"), "--model", str(world[1]), "--out", str(tmp_path / "x"), "--review"]
    assert main([*argv, str(own)]) == 2 and "copy the sheet elsewhere" in capsys.readouterr().err
    sheet = pd.read_csv(own, dtype=str, keep_default_na=False)
    sheet["score"] = ["3" if n < 6 else "" for n in range(len(sheet))]
    sheet.to_csv(tmp_path / "filled.csv", index=False)
    again, reviewed = make_study(replace(asked(world), review=str(tmp_path / "filled.csv")), tmp_path / "run", quiet=True)
    assert verify_run(report.parent).ok and stands(reviewed)
    table = reviewed.tables["reviewed"].set_index("id")
    assert (table.loc[sheet["id"][:6], "grade"] == 3).all() and not set(sheet["id"][:6]) & set(reviewed.tables["queue"]["id"])
    assert reviewed.results["effects"].full[0].estimate != made.results["effects"].full[0].estimate
    assert str(tmp_path / "filled.csv") in {i["path"] for i in read_json(again.parent / MANIFEST)["inputs"]}
    page = again.read_text(encoding="utf-8")
    told = re.search(r"<b>([+-][\d.]+)</b><span>difference of mean grade", page)
    again.write_text(page.replace(told[0], told[0].replace(told[1], "+9.99")), encoding="utf-8")
    renew(again.parent, "report.html")
    assert verify_run(again.parent).ok
    assert main(["verify", str(again.parent)]) == 1
    said = capsys.readouterr().out
    assert f"broken at report.html, number effect: expected {told[1]} difference" in said and "found +9.99" in said and "more:" not in said


def renew(run, name):
    "Puts the hash of a file, and the seal, into the manifest, as somebody would who covers what was edited."
    manifest = read_json(run / MANIFEST)
    for entry in manifest["artefacts"]:
        if entry["path"] == name:
            entry |= {"sha256": sha256_file(run / name), "bytes": (run / name).stat().st_size}
    write_json(run / MANIFEST, manifest | {"seal": _seal(manifest)})


def test_outlines_weights_and_the_reference_of_stain(study):
    report, made = study
    table = pd.read_csv(report.parent / "glomeruli.csv")
    shapes = table["polygon"].map(shapely.from_wkt)
    assert table["polygon"].str.len().max() < 1000 and (shapes.map(lambda s: s.area) / table["area_px2"]).between(0.97, 1.03).all()
    assert (shapes.map(lambda s: s.bounds[0]) >= table["left"]).all() and (shapes.map(lambda s: s.bounds[3]) <= table["bottom"]).all()
    plain = count_instances(*labels_of(made, table["image"][0]))
    counted = plain["status"] == "counted"
    mean = table.loc[table["status"] == "counted", "eq_diameter_um"].mean()  # 1 um a pixel; one factor over all images
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
    renew(copy, "features.csv")
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
    given = {"grader": "proportional_odds", "features": ("lumen",), "dice_step": 0.5, **more}
    options = StudyOptions(str(csv), str(model), ratings, **given)
    return make_study(options, tmp_path / name, quiet=True)


def test_the_network_reads_the_pixels(world, tmp_path):
    "Grades from the encoder's view of each crop, whatever else is measured; made again by `eq verify`."
    report, made = changed(world, tmp_path, "seen", lambda t: t, grader="cnn", features=("geometry",), draws=20)
    columns = set(made.tables["features"].columns)
    assert {"encoder_000", "circularity"} <= columns and "effects" in made.results and "grades" not in made.problems
    assert main(["verify", str(report.parent)]) == 0


def test_one_group_only(world, tmp_path):
    report, made = changed(world, tmp_path, "one", lambda t: t.assign(group="control"))
    assert "effect" in made.problems and "group" in made.problems["effect"] and not stands(made)
    text = report.read_text(encoding="utf-8")
    assert "No effect can be given" in text and "Agreement of people" in text and "The glomeruli" in text


def test_three_groups_are_all_told(world, tmp_path):
    "The one that comes first in the alphabet did nothing, and the page does not stop there."
    names = {f"m{a:02d}": ("caffeine", "drug", "control", "drug")[a % 4] for a in range(12)}
    report, made = changed(world, tmp_path, "three", lambda t: t.assign(group=[names[s] for s in t["subject"]]), draws=20)
    none, drug = made.results["effects"].full
    assert (none.groups[1], none.clear, drug.groups[1], drug.clear) == ("caffeine", False, "drug", True) and drug.p < drug.p_holm < 0.05
    text = report.read_text(encoding="utf-8")
    assert "No effect of caffeine is shown" in text and "Glomeruli of drug are graded" in text and f"p = {drug.p_holm:.2g} adjusted for 2 comparisons" in text
    assert "sensitivity" not in made.problems and set(made.tables["sensitivity"]["group"]) == {"caffeine", "drug"} and "drug: The conclusion" in text
    assert made.tables["sensitivity"]["what"].is_unique and "effect of drug" in text


def test_one_animal_a_group_says_so_in_words(world, tmp_path):
    names = {f"m{a:02d}": f"g{a:02d}" if a else "control" for a in range(12)}
    report, made = changed(world, tmp_path, "single", lambda t: t.assign(group=[names[s] for s in t["subject"]]), draws=20)
    assert np.isnan(made.results["effects"].full[0].p)
    text = report.read_text(encoding="utf-8")
    head = text.split("</style>")[1].split("<h2>The effect</h2>")[0]
    assert "no interval" in head and "how much animals differ is unknown" in head and "nan" not in head


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
    lost = sheet.head(25).assign(image="gone.png")  # of an image that is not in the study
    pd.concat([apart, lost]).to_csv(tmp_path / "grades-apart.csv", index=False)
    report, made = changed(world, tmp_path, "apart", lambda t: t, ratings=str(tmp_path / "grades-apart.csv"))
    assert "effects" in made.results and any("overlap" in n or "same glomerul" in n for n in made.results["agreement"].notes)
    text = report.read_text(encoding="utf-8")
    unplaced = pd.read_csv(report.parent / "unplaced.csv")
    assert (unplaced["why"] == "no such image").sum() == 25 and f"The first 20 of {len(unplaced)}; all are in unplaced.csv." in text
    assert text.count("<td>no such image</td>") == 20 - (unplaced["why"][:20] != "no such image").sum()


def test_a_picture_that_stands_for_two_animals(world, tmp_path, capsys):
    def twice(table):
        shutil.copy(table["image"][0], tmp_path / "again.png")
        return table.assign(image=[str(tmp_path / "again.png") if s == "m03" else i for s, i in zip(table["subject"], table["image"], strict=True)])

    _, made = changed(world, tmp_path, "twice", twice)
    assert made.results["leaks"].fatal and not stands(made)
    leaks = pd.read_csv(tmp_path / "twice" / "leaks.csv")
    assert (leaks["verdict"] == "fatal").any() and "<h2>Leaks</h2>" in (tmp_path / "twice" / "report.html").read_text(encoding="utf-8")


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
