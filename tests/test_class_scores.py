"""Scores of classes against brute force and scikit-learn, for any labels and any ties; intervals that know what is independent."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from eq.core.classification import auroc, auroc_interval, class_intervals, class_scores, expected_calibration_error, reliability_table
from eq.core.registry import EqError

LABELS = st.lists(st.integers(0, 1), min_size=2, max_size=40)


@settings(max_examples=200, deadline=None)
@given(LABELS, st.integers(1, 6), st.integers(0, 2**31))
def test_auroc_counts_pairs(labels, levels, seed):
    y, score = np.array(labels), np.random.default_rng(seed).integers(0, levels, len(labels))
    if len(set(labels)) < 2:
        assert np.isnan(auroc(score, y == 1))
        return
    pairs = [(a > b) + 0.5 * (a == b) for a in score[y == 1] for b in score[y == 0]]
    assert auroc(score, y == 1) == pytest.approx(np.mean(pairs))
    assert auroc(score, y == 1) == pytest.approx(sk.roc_auc_score(y, score))
    assert auroc(-score, y == 1) == pytest.approx(1 - auroc(score, y == 1))
    assert auroc(np.exp(score), y == 1) == auroc(score, y == 1)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 5), st.integers(1, 60), st.integers(0, 2**31))
def test_scores_are_those_of_scikit_learn(classes, n, seed):
    rng = np.random.default_rng(seed)
    p, y = rng.dirichlet(np.ones(classes), n), rng.integers(0, classes, n)
    found = class_scores(p, y, [str(i) for i in range(classes)])
    assert found.accuracy == pytest.approx(sk.accuracy_score(y, p.argmax(1)))
    assert found.log_loss == pytest.approx(sk.log_loss(y, p, labels=range(classes)))
    assert np.array_equal(found.confusion, sk.confusion_matrix(y, p.argmax(1), labels=range(classes)))
    assert sum(map(sum, found.confusion)) == found.images == n
    table = reliability_table(p, y)
    assert table["images"].sum() == n and (table["images"] * (table["confidence"] - table["accuracy"]).abs()).sum() / n == pytest.approx(found.ece)
    assert 0 <= expected_calibration_error(p, y) <= 1
    if classes == 2 and set(y) == {0, 1}:
        wanted = sk.precision_score(y, p.argmax(1), zero_division=0), sk.recall_score(y, p.argmax(1)), sk.f1_score(y, p.argmax(1))
        assert (found.precision, found.recall, found.f1) == pytest.approx(wanted)
        assert found.brier == pytest.approx(sk.brier_score_loss(y, p[:, 1]))


def test_an_interval_knows_when_images_are_copies():
    "Ten times the same forty images are still forty: units keep the width, images shrink it."
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 40)
    p = np.clip(0.5 + 0.2 * (2 * y - 1) + rng.normal(0, 0.25, 40), 0.01, 0.99)
    chance, units = np.stack([1 - p, p], 1), np.arange(40)
    once, copied = class_intervals(chance, y, units), class_intervals(np.tile(chance, (10, 1)), np.tile(y, 10), np.tile(units, 10))
    for name in once:
        assert (once[name].low, once[name].high, once[name].n_units) == pytest.approx((copied[name].low, copied[name].high, 40)), name
    blind = auroc_interval(np.tile(p, 10), np.tile(y, 10) == 1, np.arange(400))
    assert blind.high - blind.low < 0.5 * (once["auroc"].high - once["auroc"].low)


def test_one_unit_gives_no_interval_and_perfect_blocks_say_how_few_they_are():
    y = np.array([0, 0, 1, 1])
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8]])
    alone = class_intervals(p, y, ["a"] * 4)["auroc"]
    assert np.isnan(alone.low) and "one unit only" in alone.note and alone.estimate == 1
    pair = class_intervals(p, y, ["a", "a", "b", "b"])
    assert "only 2 units" in pair["auroc"].note and "only 2 units" in pair["accuracy"].note


HALVES = np.full((2, 2), 0.5)


@pytest.mark.parametrize("p, y", [(np.zeros((0, 2)), []), (HALVES * np.nan, [0, 1]), (HALVES, [0, 2]), (HALVES, [0, -1]), (np.ones(3), [0, 1, 1])])
def test_what_is_no_probability_is_refused(p, y):
    with pytest.raises(EqError, match="valid|holds"):
        class_scores(p, y, "ab")
