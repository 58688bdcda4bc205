"""Grading: animals never leak, biology is never contradicted, and bad tables are refused by name."""
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eq.core.ordinal import qwk
from eq.core.registry import EqError
from eq.data.synthetic_raters import Panel, draw_panel, rate
from eq.data.synthetic_table import FEATURES, TableDesign, simulate_table
from eq.quantification.conformal import calibrate_sets, prediction_sets, subjects_needed
from eq.quantification.grade import grade_glomeruli, grade_quality
from eq.quantification.grade_model import GradeOptions, fit_grader, grading_data, score_table
from eq.quantification.grader import GRADERS, Examples, directions_of, try_grader
from eq.quantification.panel import fit_panel
from eq.quantification.raters import agree

ODDS = GradeOptions("proportional_odds", outer=3, inner=3)
HERE = [n for n in GRADERS if n != "xgboost" or find_spec("xgboost")]


def three(seed: int, animals: int = 13) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    "Features, glomeruli, ratings."
    table = simulate_table(TableDesign(animals=animals), seed)
    return table[["id", *FEATURES]], table, rate(table["id"], table["swelling"], draw_panel(seed=seed), seed)


@pytest.fixture(scope="module")
def tables():
    return three(0)


@pytest.mark.parametrize("name", HERE)
def test_every_registered_grader_passes_the_shared_test(name):
    train, test = (simulate_table(TableDesign(animals=n), s) for n, s in ((24, 0), (8, 1)))
    made = [Examples(t[list(FEATURES)].to_numpy(float), t["grade"].to_numpy(), np.ones(len(t)), directions_of(FEATURES)) for t in (train, test)]
    if name == "cnn":
        made = [replace(e, directions=(0,) * len(FEATURES)) for e in made]
    chances = try_grader(GRADERS[name], *made)
    assert qwk(made[1].y, (chances > 0.5).sum(1)) > 0.75


@pytest.mark.skipif(bool(find_spec("xgboost")), reason="XGBoost is installed")
def test_a_missing_library_says_how_to_get_it(tables):
    with pytest.raises(EqError, match="pip install xgboost"):
        grade_glomeruli(*tables, replace(ODDS, model="xgboost"))


@pytest.mark.parametrize("name", ["cumulative_lightgbm", "proportional_odds"])
def test_less_open_lumen_cannot_lower_the_grade(name, tables):
    "Not of the bare model only: of everything that a user gets, calibration included."
    data = grading_data(*tables)
    model = fit_grader(data, replace(ODDS, model=name))
    closed = data.features.assign(open_fraction=data.features["open_fraction"] * np.random.default_rng(0).random(len(data.features)))
    before, after = model.above(data.features), model.above(closed)
    assert (after >= before - 1e-9).all() and after.mean() > before.mean()
    grades = [score_table(model, replace(data, features=f))["grade"] for f in (data.features, closed)]
    assert (grades[1] >= grades[0]).all()


def test_grades_of_an_animal_do_not_depend_on_its_own_scores(tables):
    "Held out means held out: other scores for the animals of a fold leave their grades and sets alone."
    features, table, ratings = tables
    result = grade_glomeruli(features, table, ratings, ODDS)
    held = result.folds["held_out"].iloc[0].split(", ")
    own = table.loc[table["subject"].isin(held), "id"]
    luck = np.random.default_rng(0).permutation(int(ratings["id"].isin(own).sum()))
    mixed = ratings.copy()
    mixed.loc[ratings["id"].isin(own), "score"] = ratings.loc[ratings["id"].isin(own), "score"].to_numpy()[luck]
    train = [s for s in sorted(table["subject"].unique()) if s not in held]
    one, two = (grading_data(features, table, r) for r in (ratings, mixed))
    a, b = (score_table(fit_grader(d.of(train), ODDS), d.of(held)) for d in (one, two))
    pd.testing.assert_frame_equal(a, b)
    pd.testing.assert_frame_equal(a, result.scores[result.scores["id"].isin(own)].reset_index(drop=True))


def test_the_same_tables_give_the_same_grades(tables):
    features, table, ratings = tables
    a = grade_glomeruli(features, table, ratings, ODDS).scores
    shuffled = ratings.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(a, grade_glomeruli(features, table, shuffled, ODDS).scores)


def test_the_grader_beats_the_people_it_learned_from():
    features, table, ratings = three(2, animals=24)
    result = grade_glomeruli(features, table, ratings, replace(ODDS, outer=4))
    real = grade_quality(result.scores, table.set_index("id")["grade"])
    people = agree(ratings, table.set_index("id")["subject"], n=100).mutual_qwk
    assert 0.4 < people < 0.8 and real.grades.qwk.estimate >= max(0.8, people)
    mean = result.scores["expected"].groupby(pd.qcut(table["swelling"], 8)).mean()
    assert (np.diff(mean) > 0).all(), "monotone in the latent swelling"
    assert real.sets.coverage.estimate >= 0.9
    assert real.sets.mean_size.estimate <= 2 and real.sets.abstained.estimate <= 0.15
    assert result.sets is not None and abs(result.sets.coverage.estimate - real.sets.coverage.estimate) < 0.06, "the panel model is right here"


def test_where_people_share_no_glomerulus_sets_are_about_a_score_and_the_notes_say_so(tables):
    features, table, ratings = tables
    one = grade_glomeruli(features, table, ratings[ratings["rater"] == "A"], ODDS)
    same = grade_glomeruli(features, table, ratings[ratings["rater"] == "A"], replace(ODDS, target="score"))
    pd.testing.assert_frame_equal(one.scores, same.scores)
    assert one.sets is None and one.behind.empty and set(one.folds["target"]) == {"score"}
    assert any("next score of a person" in n and "fewer than 20 glomeruli with two scores" in n for n in one.notes)
    three, chances = grade_glomeruli(features, table, ratings, ODDS), ["p0", "p1", "p2", "p3"]
    assert set(three.folds["target"]) == {"grade"} and three.scores[chances].max(axis=1).mean() > one.scores[chances].max(axis=1).mean()


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 1.0), st.integers(2, 5))
def test_chances_of_the_grade_are_chances_whatever_people_did(seed, share, people):
    "Sparse sheets, people who hardly scored, two to five of them: chances stay chances, and rise with the grader's answer."
    rng = np.random.default_rng(seed)
    answer = np.sort(rng.normal(0, 2, 60))
    scores = np.where(rng.random((60, people)) < share, rng.integers(0, 4, (60, people)), -1)
    panel = fit_panel(answer, scores, [str(i) for i in range(people)], least=0)
    above, behind = panel.above(answer), panel.behind(answer, scores)
    assert (np.diff(above, axis=0) >= -1e-12).all() and (np.diff(above, axis=1) <= 1e-12).all()
    assert (behind >= -1e-12).all() and np.allclose(behind.sum(1), 1)
    blank = panel.behind(answer, np.full_like(scores, -1))
    inner = np.abs(answer) < 2
    assert np.abs(1 - np.cumsum(blank, 1)[inner, :3] - above[inner]).max() < 0.05, "without scores both ways agree"


def test_missing_scores_are_no_obstacle(tables):
    features, table, ratings = tables
    few = ratings.sample(frac=0.3, random_state=0)
    result = grade_glomeruli(features, table, few, ODDS)
    assert len(result.scores) == len(table) and np.isfinite(result.scores["expected"]).all()
    assert any("have no score of a person" in note for note in result.notes)


def test_raters_who_never_overlap_can_be_learned_from(tables):
    features, table, _ = tables
    ratings = rate(table["id"], table["swelling"], Panel(draw_panel().raters, "apart"))
    result = grade_glomeruli(features, table, ratings, ODDS)
    assert qwk(table["grade"], result.scores["grade"]) > 0.6


def test_bad_tables_are_refused_by_name(tables):
    features, table, ratings = tables
    one = ratings[ratings["id"].isin(table.loc[table["subject"] == "a001", "id"])]
    wrong = {
        "no ratings": lambda: grade_glomeruli(features, table, ratings.iloc[:0]),
        r"1 scored animals \(a001\).*at least 3 animals": lambda: grade_glomeruli(features, table, one),
        "every score is 2": lambda: grade_glomeruli(features, table, ratings.assign(score=2), ODDS),
        "score 7 in row 0 is not a grade; valid: 0, 1, 2, 3": lambda: grade_glomeruli(features, table, ratings.assign(score=7)),
        "lack the columns": lambda: grade_glomeruli(features, table, ratings[["id", "score"]]),
        "more than once": lambda: grade_glomeruli(features, table, ratings.assign(rater="A")),
        "hold values that are not numbers": lambda: grade_glomeruli(features.assign(texture=np.inf), table, ratings),
        "has no subject": lambda: grade_glomeruli(features, table.assign(subject=None), ratings),
        "unknown grader 'lightgbm'": lambda: grade_glomeruli(features, table, ratings, replace(ODDS, model="lightgbm")),
        "level = 1.5": lambda: grade_glomeruli(features, table, ratings, replace(ODDS, level=1.5)),
    }
    for message, act in wrong.items():
        with pytest.raises(EqError, match=message):
            act()


def test_too_few_animals_for_a_set_say_so_and_still_get_grades():
    features, table, ratings = three(1, animals=6)
    result = grade_glomeruli(features, table, ratings, ODDS)
    assert result.scores["abstained"].all() and (result.scores["set_size"] == 4).all()
    assert result.scores["reason"].str.contains("a 90% set cannot be given: 4 calibration animals, at least 9 are needed").all()
    assert result.scores["grade"].nunique() > 1


@pytest.mark.parametrize("strangeness", ["mass", "hull"])
def test_sets_cover_unseen_animals(strangeness):
    "Animals whose model error they share: per-glomerulus calibration would fail here."
    covered, naive = [], []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        animal = np.repeat(np.arange(13), 20)
        latent, shift = rng.normal(0, 1.5, len(animal)), rng.normal(0, 1.2, 13)[animal]
        above = 1 / (1 + np.exp(-2 * (latent[:, None] - np.array([-1.0, 0.0, 1.0]))))
        p = -np.diff(np.concatenate([np.ones((len(above), 1)), above, np.zeros((len(above), 1))], 1), axis=1)
        truth = (latent + shift > np.array([[-1.0], [0.0], [1.0]])).sum(0)
        new = animal == 12
        for units, out in ((animal[~new], covered), (np.arange((~new).sum()), naive)):
            sets = prediction_sets(p[new], calibrate_sets(p[~new], truth[~new], units, 0.9, max_size=4, strangeness=strangeness))
            out.append(((sets["low"] <= truth[new]) & (truth[new] <= sets["high"])).mean())
    assert np.mean(covered) >= 0.885 and np.mean(covered) >= np.mean(naive)
    assert subjects_needed(0.9) == 9
