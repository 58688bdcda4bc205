"""An effect: false alarms, coverage, what an independent implementation says, and what cannot be compared is said in one line."""
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from eq.core.registry import EqError
from eq.core.results import Result
from eq.quantification.calibration import Calibration, calibrate, fit_calibration
from eq.quantification.effect import FULL, HUMAN, NONE, Effect, EffectPlan, estimate_effect
from eq.quantification.mixed import fit_mixed
from eq.quantification.peers import permutation_test
from eq.quantification.trial import PROBABILITIES
from eq.workflows.bench_effect import generator_hash, measure_effect, scores_table
from eq.workflows.bench_world import World, simulate

QUICK = EffectPlan(draws=20, permutations=199)


def cohort(animals: int = 6, effect: float = 0.8, seed: int = 0) -> pd.DataFrame:
    return scores_table(simulate(World(), effect, animals, 1, np.random.default_rng(seed)))


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], float]:
    "The 200 of `make test`: 200 null and 200 effect cohorts at 6 animals a group; `eq bench effect` does 2,000 at 6 and at 12."
    table = measure_effect(6, 200, seed=5)
    return table.set_index(["variant", "metric"])["value"].to_dict()


def test_false_alarms_and_coverage_are_as_they_should_be(measured):
    "Wide bounds for 200 cohorts: four Monte-Carlo standard errors around 5 % and 95 %."
    assert measured["eq", "type1"] < 0.05 + 4 * 0.0154
    assert measured["eq", "coverage_null"] > 0.95 - 4 * 0.0154
    assert measured["eq", "coverage_effect"] > 0.95 - 4 * 0.0154
    assert abs(measured["eq", "bias_effect"]) < 0.1
    assert measured["eq_own", "type1"] < 0.05 + 4 * 0.0154 and measured["eq_own", "coverage_effect"] > 0.95 - 4 * 0.0154
    assert abs(measured["eq_own", "bias_effect"]) < 0.15 and measured["eq_own", "uncalibrated_effect"] < 0.5


def test_the_naive_test_and_the_interval_without_the_grader_are_shown_for_what_they_are(measured):
    assert measured["naive", "type1"] > 0.2
    assert measured["human_only", "bias_effect"] < -0.04  # the grader shrinks the effect, and points do not know it
    assert measured["human_only", "width_effect"] < measured["eq", "width_effect"]
    assert measured["naive", "width_effect"] < measured["human_only", "width_effect"]


def test_the_fast_reml_is_that_of_statsmodels():
    import statsmodels.formula.api as smf

    rng = np.random.default_rng(3)
    sizes = rng.integers(2, 40, 18)
    animal = np.repeat(np.arange(18), sizes)
    group = np.repeat([0, 1, 2], 6)
    table = pd.DataFrame({"animal": animal, "group": group[animal]})
    table["y"] = rng.normal(0, 0.6, 18)[animal] + 0.3 * table["group"] + rng.normal(0, 0.8, len(animal))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = smf.mixedlm("y ~ C(group)", table, groups="animal").fit(reml=True, method=["powell", "lbfgs"])
    by = table.groupby("animal")["y"]
    fit = fit_mixed(by.mean().to_numpy(), sizes, ((table["y"] - by.transform("mean")) ** 2).sum(), group)
    ours = [fit.mean[0, 0], fit.contrast(1, 0)[0][0], fit.contrast(2, 0)[0][0], fit.between[0], fit.within[0]]
    theirs = [*peer.fe_params, peer.cov_re.iloc[0, 0], peer.scale]
    assert np.allclose(ours, theirs, atol=1e-4), (ours, theirs)
    assert 10 < fit.contrast(1, 0)[2][0] < 20


def test_with_equal_numbers_of_human_grades_it_is_the_t_test_of_animal_means():
    rng = np.random.default_rng(1)
    animal = np.repeat(np.arange(10), 12)
    grade = np.clip(np.round(1.3 + 0.6 * (animal >= 5) + rng.normal(0, 0.5, 10)[animal] + rng.normal(0, 0.7, 120)), 0, 3).astype(int)
    table = pd.DataFrame(np.eye(4)[grade], columns=PROBABILITIES).assign(subject=animal, group=np.where(animal < 5, "control", "drug"))
    means = np.bincount(animal, grade) / 12
    theirs = stats.ttest_ind(means[5:], means[:5])
    full, human = estimate_effect(table, plan=QUICK).effects[:2]
    for ours in (full, human):
        assert ours.p == pytest.approx(theirs.pvalue, abs=1e-4) and ours.df == pytest.approx(8, abs=1e-3)
        assert ours.low == pytest.approx(theirs.confidence_interval().low, abs=1e-4)


def test_every_way_stands_beside_and_the_table_survives_json():
    table = cohort()
    found = estimate_effect(table, Calibration(0.75, 0.08, 1.2, 1.2, 0.04, 0.02, 12, 240), QUICK)
    assert [e.noise for e in found.effects] == [FULL, HUMAN, HUMAN, HUMAN, NONE]
    assert all(isinstance(e, Result) and Effect.from_dict(e.to_dict()).model == e.model for e in found.effects)
    assert found.effects[3].p == permutation_test(*_means(table))[0]
    assert len(found.table()) == 5 and 0 < found.share[0] < 0.9


def _means(table: pd.DataFrame) -> list[np.ndarray]:
    grade = (np.cumsum(table[PROBABILITIES].to_numpy(), 1)[:, :3] < 0.5).sum(1)
    by = pd.Series(grade).groupby([table["group"], table["subject"]]).mean()
    return [by[g].to_numpy() for g in ("control", "treated")]


def test_counting_weights_change_the_estimate_as_they_should():
    "Weights that repeat a glomerulus change an animal's mean as repeating it would."
    table = cohort(3)
    rng = np.random.default_rng(0)
    times = rng.integers(1, 4, len(table))
    weighted = estimate_effect(table.assign(weight=times.astype(float)), plan=QUICK).effects
    repeated = estimate_effect(table.loc[table.index.repeat(times)], plan=QUICK).effects
    assert weighted[2].estimate == pytest.approx(repeated[2].estimate)
    assert weighted[1].n_objects == len(table) and estimate_effect(table.assign(weight=7.0), plan=QUICK).effects[1].low == pytest.approx(
        estimate_effect(table, plan=QUICK).effects[1].low)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.assign(group="control"), "only one group with scores, 'control' (12 animals); an effect needs two groups"),
        (lambda t: t.assign(subject=t["subject"].where(t.index > 0, t["subject"].iloc[-1])), "subjects in more than one group: ['a11']"),
        (lambda t: t.assign(p0=np.nan), "none of the"),
        (lambda t: t.assign(p0=-0.2), "no probabilities"),
        (lambda t: t.drop(columns="subject"), "scores lack ['subject']"),
        (lambda t: t.assign(group=t["group"].map({"control": "a", "treated": "b"})), "name it, for example control='a'"),
        (lambda t: t.assign(weight=0.0), "none of the"),
    ],
    ids=["one group", "two groups for one animal", "no scores", "no probabilities", "no subject", "no control", "nothing counted"],
)
def test_what_cannot_be_compared_is_said_in_one_line(change, words):
    with pytest.raises(EqError) as told:
        estimate_effect(change(cohort()), plan=QUICK)
    assert words in str(told.value) and "\n" not in str(told.value)


def test_one_animal_a_group_still_gives_an_estimate_and_says_why_there_is_no_interval():
    found = estimate_effect(cohort(1), plan=QUICK)
    assert np.isfinite(found.full[0].estimate) and np.isnan(found.full[0].low) and np.isnan(found.full[0].p)
    assert any("one animal in each group" in n for n in found.notes) and "no interval" in str(found.full[0])


def test_missing_scores_are_counted_by_group():
    table = cohort()
    table.loc[table.index[:3], PROBABILITIES] = np.nan
    assert "3 of " in estimate_effect(table, plan=QUICK).notes[0] and "{'control': 3}" in estimate_effect(table, plan=QUICK).notes[0]


def test_no_variance_gives_no_test():
    table = cohort()
    table[PROBABILITIES] = np.eye(4)[np.where(table["group"] == "control", 1, 2)]
    for effect in estimate_effect(table, plan=QUICK).effects[:2]:
        assert effect.estimate == 1 and not effect.clear and np.isnan(effect.p) and "do not differ at all" in effect.note


def test_an_uncertain_slope_widens_the_interval_but_not_the_test():
    table, sure = cohort(), Calibration(0.8, 0.0, 1.2, 1.2, 0.0, 0.02, 20, 400)
    exact, unsure = (estimate_effect(table, c, QUICK).full[0] for c in (sure, replace(sure, slope_se=0.12)))
    assert unsure.p == pytest.approx(exact.p) and unsure.high > exact.high + 0.05
    assert (unsure.low > 0) == (unsure.p < 0.05)
    hopeless = estimate_effect(table, replace(sure, slope_se=0.7), QUICK).full[0]
    assert np.isnan(hopeless.high) and "known too badly" in hopeless.note


def test_a_calibration_needs_animals_that_people_scored():
    rng = np.random.default_rng(0)
    with pytest.raises(EqError, match="needs at least 5 animals"):
        fit_calibration(rng.random(40), rng.integers(0, 4, 40), np.repeat(np.arange(4), 10))
    table = pd.DataFrame(rng.dirichlet(np.ones(4), 120), columns=PROBABILITIES).assign(subject=np.repeat(np.arange(12), 10), score=rng.integers(0, 4, 120))
    with pytest.raises(EqError, match="12 animals with 120 scored glomeruli are too few, or too alike"):
        calibrate(table)
    severity = np.repeat(rng.normal(1.5, 0.8, 30), 20)  # animals differ, and the grader looks elsewhere
    seen = np.clip(np.rint(np.repeat(rng.normal(1.5, 0.8, 30), 20)), 0, 3).astype(int)
    blind = pd.DataFrame(np.eye(4)[seen], columns=PROBABILITIES).assign(subject=np.repeat(np.arange(30), 20))
    with pytest.raises(EqError, match="does not follow its human mean grade"):
        calibrate(blind.assign(score=np.clip(np.rint(severity), 0, 3)))


def test_more_groups_are_adjusted_together():
    table = cohort()
    third = cohort(seed=1).query("group == 'treated'").assign(group="other", subject=lambda t: "o" + t["subject"])
    found = estimate_effect(pd.concat([table, third]), plan=QUICK)
    assert [e.groups for e in found.full] == [("control", "other"), ("control", "treated")]
    low, high = sorted(e.p for e in found.full)
    assert sorted(e.p_holm for e in found.full) == pytest.approx([min(1, 2 * low), min(1, max(2 * low, high))])


def test_the_generator_is_known_by_its_hash():
    digest, modules = generator_hash()
    assert len(digest) == 64 and modules >= 9 and digest == generator_hash()[0]
