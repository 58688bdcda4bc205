"""eq plan: the table, the picture and the sentence, and predicted power against counted power."""
import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from eq.core.provenance import verify_run
from eq.quantification.design import Components, Design, power
from eq.workflows.bench_plan import CASES, measure_plan
from eq.workflows.cli import main


def plan(capsys, *args) -> tuple[int, str, str]:
    code = main(["plan", *[str(a) for a in args]])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def ratings(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for a in range(12):
        level = 1.1 + 0.5 * (a >= 6) + rng.normal(0, 0.4)
        for j in range(10):
            true = level + rng.normal(0, 0.6)
            rows += [(f"{a}#{j}", f"m{a}", "drug" if a >= 6 else "vehicle", r, int(np.clip(round(true + rng.normal(0, 0.3)), 0, 3))) for r in ("A", "B")]
    path = tmp_path / "ratings.csv"
    pd.DataFrame(rows, columns=["id", "subject", "group", "rater", "score"]).to_csv(path, index=False)
    return path


def test_from_given_variances(capsys, tmp_path):
    code, out, _ = plan(capsys, "--effect", 0.7, "--between", 0.2, "--within", 0.5, "--rater", 0.1, "--raters", "1,2", "--animals", "4,8", "--out", tmp_path / "p")
    assert code == 0 and "is the better buy" in out and "animals a group for 80% power" in out
    table = pd.read_csv(tmp_path / "p" / "power.csv").set_index(["raters", "glomeruli", "animals"])["power"]
    df, away = 14, 0.7 / np.sqrt(2 * (0.2 + 0.6 / 20) / 8)
    by_hand = stats.nct.sf(stats.t.ppf(0.975, df), df, away) + stats.nct.cdf(-stats.t.ppf(0.975, df), df, away)
    assert table[1, 20, 8] == pytest.approx(by_hand) and table[2, 20, 8] > table[1, 20, 8] > table[1, 5, 8]
    assert (tmp_path / "p" / "power.png").read_bytes().startswith(b"\x89PNG")
    assert verify_run(tmp_path / "p").ok


def test_from_a_pilot(capsys, tmp_path, ratings):
    code, out, _ = plan(capsys, "--effect", 0.7, "--pilot", ratings, "--out", tmp_path / "p")
    assert code == 0 and "The variances come from 12 animals" in out
    found = json.loads((tmp_path / "p" / "plan.json").read_text())["components"]
    assert 0.02 < found["rater"] < 0.25 and found["n_animals"] == 12 and found["df"] == 10
    table = pd.read_csv(tmp_path / "p" / "power.csv")
    assert (table["low"] < table["power"]).all() and (table["power"] < table["high"]).all()
    manifest = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert any(e["path"].endswith("ratings.csv") for e in manifest["inputs"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--effect", 0.7], "give --pilot FILE, or --between and --within"),
        (["--effect", 0.7, "--pilot", "none.csv"], "none.csv does not exist"),
        (["--effect", 0.7, "--between", -1, "--within", 1], "variance between = -1.0"),
        (["--effect", 0.7, "--between", 0.1, "--within", 1, "--animals", "4,x"], "--animals '4,x'"),
        (["--effect", 0.7, "--between", 0.1, "--within", 1, "--animals", "1"], "at least 2 animals a group"),
        (["--effect", 0, "--between", 0.1, "--within", 1], "an effect that is not 0"),
        (["--effect", 0.7, "--between", 0.1, "--within", 1, "--power", 1], "power above 0 and below 1"),
        (["--effect", 0.7, "--between", 0.1, "--within", 1, "--cost", 0, 1], "valid: above 0"),
        (["--between", 0.1, "--within", 1], "--effect"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, args, words):
    code, _, err = plan(capsys, *args)
    assert code == 2 and words in err and err.count("\n") == 1


def test_a_table_that_is_no_pilot(capsys, tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    assert "neither p0 to p3 nor score" in plan(capsys, "--effect", 1, "--pilot", tmp_path / "x.csv")[2]


def test_predicted_power_is_near_counted_power():
    "300 experiments for each of three designs: within three Monte-Carlo standard errors; `eq bench plan` does 2,000, within 3 points."
    table = measure_plan(300, seed=2, cases=CASES[:3])
    assert ((table["predicted"] - table["simulated"]).abs() < 0.03 + 3 * 0.025).all(), table


def test_no_number_of_glomeruli_replaces_animals():
    few = [power(Components(0.3, 0.4), Design(4, g), 0.7) for g in (10, 100, 10_000)]
    assert few[0] < few[1] < few[2] < power(Components(0.3, 0.4), Design(8, 10), 0.7)
