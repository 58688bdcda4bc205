"""Agreement of raters on tables that a careless lab would hand in."""
import numpy as np
import pandas as pd
import pytest

from eq.core.ordinal import qwk
from eq.core.registry import EqError
from eq.data.synthetic_raters import Panel, PanelSpec, Rater, draw_panel, rate
from eq.data.synthetic_table import TableDesign, simulate_table
from eq.quantification.agreement import COEFFICIENTS, rating_matrix
from eq.quantification.raters import agree, consensus


@pytest.fixture(scope="module")
def table():
    return simulate_table(TableDesign(animals=8), seed=3)


@pytest.fixture(scope="module")
def whose(table):
    return table.set_index("id")["subject"]


@pytest.mark.parametrize("bad", [4, -1, 1.5, np.nan, None, "high", np.inf])
def test_a_score_that_is_no_grade_is_named(bad):
    ratings = pd.DataFrame({"id": ["a", "b"], "rater": "X", "score": pd.Series([1, bad], dtype=object)})
    with pytest.raises(EqError, match=r"in row 1 is not a grade; valid: 0, 1, 2, 3"):
        rating_matrix(ratings)


@pytest.mark.parametrize("name", COEFFICIENTS.names())
def test_coefficients_do_not_depend_on_the_order_of_raters_or_glomeruli(name, table):
    values = rating_matrix(rate(table["id"], table["swelling"], draw_panel())).to_numpy()
    shuffled = np.random.default_rng(0).permutation(values)[:, ::-1]
    assert COEFFICIENTS[name].of(values) == pytest.approx(COEFFICIENTS[name].of(shuffled), abs=1e-12)


@pytest.mark.parametrize("name", COEFFICIENTS.names())
def test_perfect_agreement_is_one_and_chance_is_near_zero(name):
    rng = np.random.default_rng(1)
    column = rng.integers(0, 4, 30_000).astype(float)
    assert COEFFICIENTS[name].of(np.stack([column, column], 1)) == pytest.approx(1)
    # 1 / sqrt(30,000) is 0.006, and twice that for the mean of two raters: 0.05 is four standard errors or more
    assert abs(COEFFICIENTS[name].of(rng.integers(0, 4, (30_000, 2)).astype(float))) < 0.05


def test_missing_scores_only_cost_what_they_must(table, whose):
    whole = agree(rate(table["id"], table["swelling"], draw_panel()), whose, n=200)
    holes = agree(rate(table["id"], table["swelling"], draw_panel(PanelSpec(missing=0.4))), whose, n=200)
    a, b = (found.summary.set_index("statistic") for found in (whole, holes))
    assert b.loc["icc_2_1", "n_objects"] < b.loc["krippendorff_alpha", "n_objects"] < a.loc["krippendorff_alpha", "n_objects"]
    assert abs(a.loc["krippendorff_alpha", "estimate"] - b.loc["krippendorff_alpha", "estimate"]) < 0.15
    assert not holes.notes


def test_raters_who_never_overlap_get_a_message_and_the_rest_is_made(table, whose):
    ratings = rate(table["id"], table["swelling"], draw_panel(PanelSpec(overlap="apart")))
    model = table.set_index("id")["grade"]
    found = agree(ratings, whose, model, n=200)
    assert {"A and B never scored the same glomerulus", "A and C never scored the same glomerulus"} <= set(found.notes)
    assert np.isnan(found.mutual_qwk)
    beside = found.pairs[found.pairs["rater_b"] == "eq"]
    assert len(beside) == 3 and (beside["estimate"] > 0.4).all()
    assert found.bias.set_index("rater").loc["A", "note"] == "A shares no glomerulus with another rater"
    assert found.bias.set_index("rater").loc["eq", "n_objects"] == len(table)


def test_one_pair_that_never_meets_does_not_stop_the_others(table, whose):
    ratings = rate(table["id"], table["swelling"], draw_panel())
    first = set(table["id"][: len(table) // 2])
    keep = (ratings["rater"] == "A") | ((ratings["rater"] == "B") == ratings["id"].isin(first))
    found = agree(ratings[keep], whose, n=200)
    pairs = found.pairs.set_index(["rater_a", "rater_b"])
    assert np.isnan(pairs.loc[("B", "C"), "estimate"]) and np.isfinite(pairs.loc[("A", "B"), "estimate"]) and np.isfinite(pairs.loc[("A", "C"), "estimate"])
    assert np.isfinite(found.mutual_qwk) and "B and C never scored the same glomerulus" in found.notes


def test_one_animal_gives_no_interval_but_an_estimate(table, whose):
    own = table[table["subject"] == "a001"]
    found = agree(rate(own["id"], own["swelling"], draw_panel()), whose, n=200)
    alpha = found.summary.set_index("statistic").loc["krippendorff_alpha"]
    assert np.isfinite(alpha["estimate"]) and np.isnan(alpha["low"]) and "one unit only" in alpha["note"]


def test_bias_is_found_in_the_right_rater(table, whose):
    panel = Panel((Rater("X", bias=1.0, noise=0.3), Rater("Y", noise=0.3), Rater("Z", noise=0.3)))
    bias = agree(rate(table["id"], table["swelling"], panel), whose, n=400).bias.set_index("rater")
    assert bias.loc["X", "low"] > 0 > bias.loc["Y", "high"]


def test_consensus_is_better_than_its_raters(table):
    truth = table.set_index("id")["grade"]
    ratings = rate(table["id"], table["swelling"], draw_panel(PanelSpec(n=5)))
    alone = [qwk(truth.loc[r["id"]], r["score"]) for _, r in ratings.groupby("rater")]
    together = consensus(ratings)
    assert qwk(truth.loc[together.index], together) > np.mean(alone)
