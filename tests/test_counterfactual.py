"""The healthy counterfactual as a user meets it: what is not known does not leak, what was trained is not trained again, what is wrong is said in a line."""
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest

from eq.core.files import read_json
from eq.core.registry import EqError
from eq.data.write import write_png
from eq.models.checkpoint import read_meta
from eq.quantification.counterfactual import DEPARTURES, View
from eq.workflows.counterfactual import OPTIONS, command, predict_counterfactual, requested
from eq.workflows.counterfactual_data import Glomeruli, with_ratings
from eq.workflows.counterfactual_folds import NetworkPlan, compare_glomeruli, cross_fit, deal_animals, fit_healthy, load_healthy

SIDE = 32
PLAN = NetworkPlan(side=SIDE, latent=8, width=0.05, epochs=1, lr=0.003, device="cpu")


def discs(animals: int = 9, each: int = 20) -> Glomeruli:
    "Discs that darken as they swell."
    from eq.data.synthetic_kidney import grade_of

    rng, rows, views = np.random.default_rng(4), [], {}
    yy, xx = np.mgrid[:SIDE, :SIDE] - SIDE / 2 + 0.5
    for a in range(animals):
        for i in range(each):
            swelling = float(np.clip(rng.beta(0.5, 1.3), 0.001, 0.999))
            tuft = xx**2 + yy**2 < (rng.uniform(0.3, 0.42) * SIDE) ** 2
            views[f"a{a}#{i}"] = View((tuft * (0.3 + 0.4 * swelling)).astype(np.float32), tuft)
            rows.append((f"a{a}#{i}", f"a{a}", "ct"[a % 2], swelling, int(grade_of(swelling)), rng.normal()))
    table = pd.DataFrame(rows, columns=["id", "subject", "group", "swelling", "grade", "x"])
    return with_ratings(Glomeruli(table.drop(columns="x"), table[["id", "x"]].assign(problems=""), views))


def draw(folder, name, grades, rng) -> dict:
    "Sixteen round glomeruli in uneven rows, so that no two animals look alike; the higher the grade, the fewer the holes."
    rgb, mask = np.full((560, 560, 3), (238, 228, 240), np.uint8), np.zeros((560, 560), np.uint8)
    for n, grade in enumerate(grades):
        at = 70 + 140 * (n % 4) + int(rng.integers(-9, 10)), 70 + 140 * (n // 4) + int(rng.integers(-9, 10))
        cv2.circle(rgb, at, 58, (150, 80, 140), 2)
        cv2.circle(rgb, at, 50, (186, 96, 158), -1)
        for r, angle in zip(42 * np.sqrt(rng.random(34 - 10 * grade)), rng.uniform(0, 6.28, 34 - 10 * grade), strict=True):
            cv2.circle(rgb, (round(at[0] + r * np.cos(angle)), round(at[1] + r * np.sin(angle))), 4, (236, 226, 238), -1)
        cv2.circle(mask, at, 59, 255, -1)
    noisy = np.clip(rgb + rng.normal(0, 4, rgb.shape), 0, 255).astype(np.uint8)
    files = {"image": write_png(folder / f"{name}.png", noisy), "mask": write_png(folder / f"{name}_mask.png", mask)}
    return {k: str(v) for k, v in files.items()} | {"subject": name, "mask_coding": "grey127", "px_size_um": 1.0}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    "Nine animals, and grades.csv beside them."
    here, rng, rows, sheet = tmp_path_factory.mktemp("k"), np.random.default_rng(0), [], ["id,rater,score"]
    for a in range(9):
        grades = rng.choice(4, 16, p=(0.75, 0.1, 0.1, 0.05))
        rows.append(draw(here, f"m{a}", grades, rng) | {"group": "ct"[a % 2]})
        sheet += [f"m{a}#{n + 1},Anna,{g}" for n, g in enumerate(grades)]
    pd.DataFrame(rows).to_csv(here / "cohort.csv", index=False)
    (here / "grades.csv").write_text("\n".join(sheet))
    return here / "cohort.csv"


def ask(cohort, out, **changes):  # noqa: ANN201
    values = {name: default for name, (_, default, _) in OPTIONS.items()}
    values |= {"cohort": cohort, "ratings": cohort.with_name("grades.csv"), "out": out, "folds": 3, "side": SIDE, "latent": 8, "width": 0.05, "epochs": 3, "lr": 0.01,
               "device": "cpu", "grader": "proportional_odds"}
    return replace(requested(values | changes), features=("open_fraction",), quiet=True)


def test_nothing_of_held_out_animals_reaches_network_or_threshold(tmp_path, fold=1):
    "Their views, their grades and their true grades are turned into nonsense: weights, limits and what is usual stay, to the last bit."
    toy = discs()
    folds = deal_animals(toy, 3)
    theirs = [i for i in toy.views if folds[i.split("#")[0]] == fold]
    rng = np.random.default_rng(0)
    views = {i: View(rng.random((SIDE, SIDE), np.float32), v.tuft) if i in theirs else v for i, v in toy.views.items()}
    wrong = np.where(toy.ratings["id"].isin(theirs), 3 - toy.ratings["score"], toy.ratings["score"])
    spoilt = replace(toy, views=views, ratings=toy.ratings.assign(score=wrong), table=toy.table.assign(grade=3 - toy.table["grade"], swelling=1 - toy.table["swelling"]))
    for which, name in ((toy, "as_it_is"), (spoilt, "spoilt")):
        for n in (fold, 2):  # without this fold alone, and without another one too
            fit_healthy(which, {a for a, f in folds.items() if f not in (fold, n)}, PLAN, tmp_path / name / str(n))
    for n in (fold, 2):
        a, b = (read_meta(tmp_path / name / str(n)) for name in ("as_it_is", "spoilt"))
        assert (a.weights_sha256, a.params["counterfactual"]) == (b.weights_sha256, b.params["counterfactual"])
        assert not set(a.data["glomeruli"]["learn"] + a.data["glomeruli"]["choose"] + a.data["glomeruli"]["held"]) & set(theirs)


def test_every_residual_comes_from_a_network_that_has_not_met_the_animal(tmp_path):
    toy = discs()
    folds = deal_animals(toy, 3)
    found = cross_fit(toy, folds, PLAN, tmp_path)
    assert [len(t) for t in found.values()] == [len(toy.table)] * 3
    for folder in tmp_path.iterdir():
        without = {int(n) - 1 for n in folder.name.split("-")[1:]}
        assert {folds[a] for a in read_meta(folder).data["animals"]} <= set(range(3)) - without
    model = load_healthy(tmp_path / "without-1-3")
    for outer, fold in ((0, 2), (2, 0)):  # a pair of folds shares its network, whichever of the two is held out
        mine = [i for i in toy.views if folds[i.split("#")[0]] == fold]
        pd.testing.assert_frame_equal(found[outer].loc[mine], compare_glomeruli(toy, mine, model))


def test_a_stopped_run_goes_on_where_it_was(cohort, tmp_path):
    whole = predict_counterfactual(ask(cohort, tmp_path / "run"))
    manifest, models = tmp_path / "run" / "manifest.json", sorted((tmp_path / "run" / "networks").glob("*/model.json"))
    assert read_json(manifest)["status"] == "done" and len(models) == 6
    times = [p.stat().st_mtime_ns for p in models[1:]]
    models[0].unlink()
    manifest.unlink()
    again = predict_counterfactual(ask(cohort, tmp_path / "run", resume=True))
    pd.testing.assert_frame_equal(again.found.table, whole.found.table)
    assert [p.stat().st_mtime_ns for p in models[1:]] == times, "networks that were there are not trained again"
    assert again.found.table[list(DEPARTURES)].notna().any().any() and len(again.found.table) == 144


def test_what_is_wrong_is_said(cohort, tmp_path):
    healthy_nowhere = tmp_path / "grades.csv"
    healthy_nowhere.write_text(cohort.with_name("grades.csv").read_text().replace("Anna,0", "Anna,1"))
    with pytest.raises(EqError, match="0 animals have healthy glomeruli; at least 3 are needed"):
        predict_counterfactual(ask(cohort, tmp_path / "a", ratings=healthy_nowhere))
    assert read_json(tmp_path / "a" / "manifest.json")["status"] == "failed"
    with pytest.raises(EqError, match="did you mean 'reversed'"):
        predict_counterfactual(ask(cohort, tmp_path / "b", arch="reverse"))
    with pytest.raises(EqError, match="no checkpoint here"):
        predict_counterfactual(ask(cohort, tmp_path / "c", checkpoint=tmp_path))
    with pytest.raises(EqError, match="no cohort CSV at"):
        predict_counterfactual(ask(tmp_path / "none.csv", tmp_path / "d"))
    assert "Redraw glomeruli as healthy" in (command.__doc__ or "")
