"""The smaller dose of benchmarks/faults.py: the same attempts, in the same limited children."""
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import faults  # noqa: E402


@pytest.mark.parametrize("row", faults.ROWS)
def test_nothing_ends_badly(row: str) -> None:
    results = faults.run_row(row, "small")
    bad = [r for r in results if r.outcome in faults.BAD]
    assert results and not bad, "\n".join(f"{r.outcome}: {r.group}, {r.name}: {r.note}" for r in bad)
    assert max(r.seconds for r in results) < faults.SECONDS and max(r.peak for r in results) < faults.MEMORY


def test_a_failure_would_be_seen() -> None:
    "Each bad ending, on purpose: the script counts it and goes on with the next."
    def forever() -> str:
        while True:
            pass

    def deep() -> str:
        import ctypes

        return str(ctypes.string_at(0))

    def unnamed() -> str:
        raise faults.EqError("two\nlines")

    acts = {"memory": lambda: "correct" if bytearray(2**31) else "", "deep": deep, "raise": lambda: str(1 / 0), "unnamed": unnamed, "good": lambda: "correct"}
    seconds, faults.SECONDS = faults.SECONDS, 1
    try:
        results = faults.run_limited([faults.Attempt("toy", name, act) for name, act in (acts | {"forever": forever, "last": acts["good"]}).items()])
    finally:
        faults.SECONDS = seconds
    assert {r.name: r.outcome for r in results} == {
        "memory": "crash", "deep": "crash", "raise": "crash", "unnamed": "unnamed", "good": "correct", "forever": "hang", "last": "correct",
    }  # fmt: skip


def test_the_rows_are_long_form(tmp_path: Path) -> None:
    table = faults.outcome_table("toy", [faults.Result("PNG", "a", "refused", "", 0.5, 2**20)])
    rows = faults.csv_rows(table)
    assert {(r.metric, r.value) for r in rows} >= {("attempts", 1.0), ("refused", 1.0), ("silent", 0.0), ("peak_mb", 1.0)} and rows[0].variant == "toy: PNG"


def test_a_dose_is_what_was_injected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Damage that damages nothing, and a row with fewer attempts than it claims, are noticed."
    dose = len(faults.files.KINDS)
    attempts = faults.malformed(tmp_path, dose)
    assert faults.hash_notices(tmp_path, dose) == dose == len(attempts)
    monkeypatch.setattr(faults.files, "damaged", lambda data, n, rng: (data, -1))
    with pytest.raises(AssertionError, match=f"notices 0 of {dose}"):
        faults.hash_notices(tmp_path, dose)
    with pytest.raises(AssertionError, match="nothing was damaged"):
        attempts[0].act()
    short = faults.Plan(lambda folder, each: [faults.Attempt("toy", "one", lambda: "correct")], "each", lambda each: each)
    monkeypatch.setitem(faults.ROWS, "toy", short)
    with pytest.raises(AssertionError, match="toy: 1 attempts, but dose 'full' claims 10"):
        faults.run_row("toy")


def test_each_checkpoint_fault_has_its_refusal(tmp_path: Path) -> None:
    "A checkpoint that nothing was done to loads, and is counted; so is one that is refused for another reason."
    import fault_checkpoints as nets

    sound = nets.make_sound(tmp_path / "sound")
    assert nets.try_to_load(sound, nets.Fault(lambda folder, n, rng: None, "any"), 0, (0,)) == "silent"
    with pytest.raises(AssertionError, match="for another reason"):
        nets.try_to_load(sound, nets.Fault(nets.flip(nets.WEIGHTS), "no such word"), 0, (0,))
    with pytest.raises(AssertionError, match="a pickle was run"):
        nets.try_to_load(sound, nets.Fault(lambda folder, n, rng: (folder.parent / nets.RAN).touch(), "any"), 0, (0,))
    assert [p.name for p in tmp_path.iterdir()] == ["sound"] and len(nets.FAULTS) == 13
