"""Review: the queue beats chance, answers come back checked, and what a person settled is certain."""
import numpy as np
import pandas as pd
import pytest

from eq.core.registry import EqError
from eq.quantification.calibration import Calibration
from eq.quantification.effect import EffectPlan, estimate_effect
from eq.quantification.review import apply_review, export_review, read_review, review_curve, review_queue
from eq.quantification.trial import PROBABILITIES
from eq.workflows.bench_effect import scores_table
from eq.workflows.bench_world import World, simulate

KNOWN = Calibration(0.75, 0.1, 1.1, 1.1, 0.05, 0.06, 12, 240)
QUICK = EffectPlan(draws=40, permutations=99)


def graded(seed: int, animals: int = 6) -> tuple[pd.DataFrame, dict[str, int]]:
    cohort = simulate(World(grader_animal=0.5), 0.9, animals, 1, np.random.default_rng(seed))
    table = scores_table(cohort)
    return table, dict(zip(table["id"], cohort.human.astype(int), strict=True))


def test_the_queue_shrinks_the_interval_faster_than_chance():
    gain = []
    for seed in range(5):
        table, truth = graded(seed)
        chance = np.random.default_rng(seed).permutation(table["id"]).tolist()
        orders = (review_queue(table, KNOWN)["id"].tolist(), chance)
        queue, random = (review_curve(table, truth, order, KNOWN, (0, 30, 60, 120)).dropna() for order in orders)
        both = queue.merge(random, on="looks", suffixes=("_queue", "_random")).query("looks > 0")
        gain.append((both["width_random"] - both["width_queue"]).mean())
    assert np.mean(gain) > 0, gain


def test_all_reviewed_is_the_effect_of_people():
    table, truth = graded(1)
    done = apply_review(table, pd.DataFrame({"id": list(truth), "score": list(truth.values())}))
    full, human = estimate_effect(done, KNOWN, QUICK).effects[:2]
    assert full.low == pytest.approx(human.low, abs=1e-6) and full.estimate == pytest.approx(human.estimate, abs=1e-6)
    assert len(review_queue(done, KNOWN)) == 0


def test_out_and_back(tmp_path):
    table, truth = graded(2)
    queue = review_queue(table, KNOWN, most=12)
    path = export_review(queue, table, tmp_path)
    sheet = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert not {"group", *PROBABILITIES} & set(sheet.columns), "reviewers are blind"
    sheet["score"] = [str(truth[i]) for i in sheet["id"]]
    sheet.to_csv(path, index=False)
    review = read_review(path, table)
    assert review["score"].tolist() == [truth[i] for i in queue["id"]]
    done = apply_review(table, review).set_index("id")
    assert (done.loc[queue["id"], PROBABILITIES].to_numpy().argmax(1) == review["score"]).all()
    assert (done.drop(index=queue["id"])[PROBABILITIES].to_numpy() == table.set_index("id").drop(index=queue["id"])[PROBABILITIES].to_numpy()).all()


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("score", "5", "score '5'"),
        ("score", "1.5", "score '1.5'"),
        ("score", "-1", "score '-1'"),
        ("score", "two", "valid: 0, 1, 2, 3 or empty"),
        ("id", "x#9", "not in the scores ['x#9']"),
    ],
)
def test_answers_that_cannot_be_are_refused(tmp_path, column, value, words):
    table, _ = graded(3, 3)
    path = export_review(review_queue(table, most=4), table, tmp_path)
    sheet = pd.read_csv(path, dtype=str, keep_default_na=False)
    sheet.loc[1, column] = value
    sheet.to_csv(path, index=False)
    with pytest.raises(EqError) as told:
        read_review(path, table)
    assert words in str(told.value)


def test_a_sheet_of_another_kind(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(EqError, match="lacks the columns id and score"):
        read_review(tmp_path / "x.csv", graded(3, 3)[0])
