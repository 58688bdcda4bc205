"""What image files, archives, pixel sizes, checkpoints and other writers may do to eq: `python benchmarks/faults.py [--dose full|small] [--only ROW]`.

Each attempt runs in a forked child that is limited to 5 s of CPU and 1 GiB of memory beyond what it began with; whichever of its limits it
meets, the attempt has failed. Outcomes: `refused` (one line that names the file), `correct` (everything a measurement uses is as in the
sound file), `unprotected` (a flipped bit in bytes over which the format keeps no checksum: the hash in a run's manifest differs, and that is
checked), and four that must not happen: `crash` (an exception other than EqError, or death), `hang`, `silent` (opened, and something differs
although the format could have noticed: cut files, and flips under a checksum), `unnamed` (refused without naming the file, or in several lines).
A checkpoint must be refused for what was done to it: another reason is a `crash`, one that loads is `silent`.
Rows go to benchmarks/results/faults.csv.
"""
import argparse
import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # pandas' own pool reserves a gigabyte at its first string, which is the limit here

import fault_files as files
import numpy as np
import pandas as pd

from eq.core.contain import Limits, limit_process
from eq.core.files import read_json, sha256_file, staged_folder, write_json
from eq.core.logs import Logger, read_log
from eq.core.provenance import start_run
from eq.core.registry import EqError
from eq.data.archive import extract
from eq.data.members import Limits as Quota
from eq.data.quality import FIGURES, Reference, px_size_rule
from eq.quantification.instances import ArrayLabels, instance_table
from eq.workflows.bench import COLUMNS, Row, Sitting

SECONDS, MEMORY, WALL = 5, 2**30, 120
GOOD, BAD = ("refused", "correct", "unprotected"), ("unnamed", "crash", "hang", "silent")
DOSES = {"full": {"malformed": 1000, "bombs": 1200, "rounds": 20, "each": 10}, "small": {"malformed": 100, "bombs": 64, "rounds": 3, "each": 2}}


@dataclass(frozen=True)
class Attempt:
    "One try: `act` says how it ended, or raises."

    group: str
    name: str
    act: Callable[[], str]


@dataclass(frozen=True)
class Result:
    "How it ended."

    group: str
    name: str
    outcome: str
    note: str
    seconds: float
    peak: int  # Bytes beyond what the child held before


# ---------------------------------------------------------------- attempts in limited children


def resident(key: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))


def one(attempt: Attempt) -> tuple[str, str]:
    "Outcome and note. Only EqError may come out of eq."
    try:
        return attempt.act(), ""
    except EqError as error:
        text = str(error)
        named = "/" in text and "\n" not in text and len(text) < 900
        return ("refused" if named else "unnamed"), text[-160:]
    except BaseException as error:  # noqa: BLE001  whatever it is, it is what this script looks for
        return "crash", f"{type(error).__name__}: {error}"[:160]


def in_child(attempts: list[Attempt], first: int, pipe: int) -> None:
    limit_process(Limits(3600, MEMORY, 2**32))
    faulthandler.disable()  # a death is counted, not described
    for stream in (1, 2):  # what eq logs meanwhile is not the table
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    for n, attempt in enumerate(attempts[first:], first):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        held, began = resident("VmRSS"), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
        outcome, note = one(attempt)
        signal.setitimer(signal.ITIMER_PROF, 0)
        line = json.dumps([n, outcome, note, time.process_time() - began, max(0, resident("VmHWM") - held)])
        os.write(pipe, line.encode() + b"\n")
        if outcome == "crash":
            os._exit(0)  # memory may be gone: the next one begins in a fresh child


def lines_until_end(read: int, pid: int) -> Iterator[list]:
    rest = b""
    while True:
        if not select.select([read], [], [], WALL)[0]:
            os.kill(pid, signal.SIGKILL)
        data = os.read(read, 65_536)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from map(json.loads, whole)


def run_limited(attempts: list[Attempt]) -> list[Result]:
    "Every attempt once; one that ends its process is counted, and the next goes on in another."
    results: list[Result] = []
    while len(results) < len(attempts):
        sys.stdout.flush()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            try:
                in_child(attempts, len(results), write)
            finally:
                os._exit(0)
        os.close(write)
        for n, outcome, note, seconds, peak in lines_until_end(read, pid):
            results.append(Result(attempts[n].group, attempts[n].name, outcome, note, seconds, peak))
        os.close(read)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            number, a = os.WTERMSIG(status), attempts[len(results)]
            results.append(Result(a.group, a.name, "hang" if number in (signal.SIGPROF, signal.SIGKILL) else "crash", signal.Signals(number).name, SECONDS, 0))
    return results


# ---------------------------------------------------------------- malformed images


def judge(path: Path, whole: bytes, n: int, seed: tuple[int, ...], truth: tuple, covered: Callable[[int], bool]) -> str:
    data, at = files.damaged(whole, n, np.random.default_rng([*seed, n]))
    if data == whole:
        raise AssertionError("nothing was damaged")
    path.write_bytes(data)
    same = files.seen(path) == truth  # raises EqError where it is refused
    if same:
        return "correct"
    return "silent" if at < 0 or covered(at) else "unprotected"


def malformed(folder: Path, dose: int) -> list[Attempt]:
    "Cut short or one bit flipped: as many of each kind, over its files in turn."
    attempts = []
    for number, (kind, writers) in enumerate(files.KINDS.items()):
        sound = {}
        for name, write in writers.items():
            path = folder / "sound" / name
            path.parent.mkdir(exist_ok=True)
            write(path)
            sound[name] = (path.read_bytes(), files.seen(path), files.protected(path))
        for n in range(dose // len(files.KINDS)):
            name = list(sound)[n // 2 % len(sound)]
            whole, truth, covered = sound[name]
            call = lambda p=folder / name, w=whole, n=n, s=(7, number), t=truth, c=covered: judge(p, w, n, s, t, c)
            attempts.append(Attempt(kind, f"{name} {n}", call))
    return attempts


def hash_notices(folder: Path, dose: int) -> int:
    "Of so many damaged files, how many have another SHA-256 than the sound one. Raises AssertionError unless all: the manifest would be no use."
    count = 0
    for writers in files.KINDS.values():
        name = next(iter(writers))
        path = folder / "sound" / name
        before, whole = sha256_file(path), path.read_bytes()
        for n in range(dose // len(files.KINDS)):
            (folder / name).write_bytes(files.damaged(whole, n, np.random.default_rng([9, n]))[0])
            count += sha256_file(folder / name) != before
    if count != dose:
        raise AssertionError(f"SHA-256 notices {count} of {dose} damaged files")
    return count


# ---------------------------------------------------------------- bombs and archives


def opened(path: Path) -> str:
    "What declares more than it holds must not open; what holds more than a sound declaration is read as declared and no further."
    found = files.seen(path)
    return "correct" if path.stem in files.BOUNDED and found[-1] == (64, 64, bytes(64 * 64)) else "silent"


def unpacked(name: str, folder: Path) -> str:
    make = files.HOSTILE[name][0]
    inside, out = folder / "in", folder / "out"
    for place in (inside, out):
        place.mkdir(parents=True)
    archive = make(inside)
    before = archive.read_bytes()
    try:
        extract(archive, out / "new", Quota(members=50, bytes=10**9 if "within" in name else 50_000_000), quiet=True)
    finally:
        whole = not list(out.iterdir()) and archive.read_bytes() == before and sorted(p.name for p in folder.iterdir()) == ["in", "out"]
        shutil.rmtree(folder, ignore_errors=True)
        if not whole:
            raise AssertionError(f"{name}: something was written")
    return "silent"


def bombs(folder: Path, megabytes: int) -> list[Attempt]:
    zeros = files.deflated_zeros(megabytes * 2**20)
    made = {"PNG": files.png_bombs(folder, zeros), "TIFF": files.tiff_bombs(folder, zeros), "gzip": files.nifti_bombs(folder, megabytes * 2**20)}
    attempts = [Attempt(kind, p.name, lambda p=p: opened(p)) for kind, paths in made.items() for p in paths]
    return attempts + [Attempt(kind, n, lambda n=n: unpacked(n, folder / "a")) for kind, names in files.ARCHIVE_BOMBS.items() for n in names]


def archives(folder: Path, dose: int) -> list[Attempt]:
    return [Attempt(name.split(":")[0], name, lambda n=name: unpacked(n, folder / "a")) for name in files.HOSTILE]


# ---------------------------------------------------------------- pixel sizes

USUAL = 0.25
SIZES: dict[str, tuple[float | None, float | None, str]] = {
    "missing": (None, None, "µm"), "zero": (0.0, 0.0, "µm"), "ten times": (2.5, 2.5, "µm"), "a tenth": (0.025, 0.025, "µm"), "um for nm": (250.0, 250.0, "µm"),
    "nm for um": (0.25, 0.25, "nm"), "not square": (0.25, 0.5, "µm"),
}
NO_SIZE = ("missing", "zero", "not square")  # these must leave the size unknown; the others are a number that only a cohort can contradict


def sized(kind: str, fault: str, folder: Path) -> str:
    "The size is unknown (then areas are in px2 only), or the rule of data.quality speaks up beside a cohort of the usual size."
    suffix, write = files.SIZED[kind]
    x, y, unit = SIZES[fault]
    if unit == "nm" and kind not in ("OME-TIFF", "OME-Zarr"):
        x, y = x / 1000, y / 1000  # formats with a fixed unit: the number is a thousandth
    path = write(folder / f"{kind} {fault}{suffix}", x, y, unit)
    size = files.open_image(path).px_size_um
    if size is not None and fault in NO_SIZE:
        return "silent"
    if size is None:
        return "correct" if "area_um2" not in instance_table(ArrayLabels(np.eye(3, dtype=np.int32)), None) else "silent"
    reference = Reference(dict.fromkeys(FIGURES, 0.0), dict.fromkeys(FIGURES, 1.0), USUAL)
    return "correct" if px_size_rule({"px_size_um": size}, reference) else "silent"


def doubled(px: float) -> str:
    labels = ArrayLabels(np.kron(np.arange(1, 13).reshape(3, 4), np.ones((7, 9), int)).astype(np.int32))
    one_, two = (instance_table(labels, size)["area_um2"].to_numpy() for size in (px, 2 * px))
    return "correct" if (two == 4 * one_).all() and (one_ > 0).all() else "silent"


def pixel_sizes(folder: Path, dose: int) -> list[Attempt]:
    found = [Attempt(kind, f"{kind} {fault}", lambda k=kind, f=fault: sized(k, f, folder)) for kind in files.SIZED for fault in SIZES]
    return found + [Attempt("doubling", f"{px} um", lambda px=px: doubled(px)) for px in (0.0046, 0.25, 0.5, 1 / 3, 700.0)]


# ---------------------------------------------------------------- checkpoints


def checkpoints(folder: Path, each: int) -> list[Attempt]:
    import fault_checkpoints as nets  # torch takes seconds

    sound, attempts = nets.make_sound(folder / "sound"), []
    for number, (kind, fault) in enumerate(nets.FAULTS.items()):
        attempts += [Attempt(kind, f"{kind} {n}", lambda f=fault, n=n, s=(11, number): nets.try_to_load(sound, f, n, s)) for n in range(each)]
    return attempts


# ---------------------------------------------------------------- two writers


@contextmanager
def together(*acts: Callable[[], str]) -> Iterator[list[str]]:
    "Runs each in a process of its own, released at the same moment; gives what they answered."
    gate, pids, answers = os.pipe(), [], []
    for act in acts:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(gate[1])
            os.read(gate[0], 1)
            try:
                said = act()
            except EqError as error:
                said = f"refused: {error}"
            except BaseException as error:  # noqa: BLE001  told to the parent
                said = f"crash: {type(error).__name__}: {error}"
            os.write(write, said.encode()[:4000])
            os._exit(0)
        os.close(write)
        pids.append((pid, read))
    os.close(gate[0])
    os.close(gate[1])
    for pid, read in pids:
        with os.fdopen(read, "rb") as file:
            answers.append(file.read().decode())
        os.waitpid(pid, 0)
    if broken := [a for a in answers if not a or a.startswith("crash")]:
        raise AssertionError(f"a writer died: {broken}")
    yield answers


def two_on_a_file(folder: Path) -> str:
    target = folder / "shared.json"
    acts = [lambda who=who: [write_json(target, {"who": who, "text": who * 200_000}) for _ in range(5)] and "done" for who in "ab"]
    with together(*acts):
        found = read_json(target)
    return "correct" if found["text"] == found["who"] * 200_000 and [p.name for p in folder.iterdir()] == ["shared.json"] else "silent"


def two_on_a_table(folder: Path) -> str:
    acts = [lambda who=who: [Sitting("toy", "x", who).append([Row(f"{who}{n}", "m", 1.0)], folder) for n in range(5)] and "done" for who in "ab"]
    with together(*acts):
        table = pd.read_csv(folder / "toy.csv")
    return "correct" if sorted(table["variant"]) == [f"{who}{n}" for who in "ab" for n in range(5)] and list(table.columns) == COLUMNS else "silent"


def two_on_a_run(folder: Path) -> str:
    def act(who: str) -> str:
        with start_run("toy", folder / "run") as run:
            (run.dir / "who.txt").write_text(who)
            time.sleep(0.05)
        return who

    with together(lambda: act("a"), lambda: act("b")) as answers:
        done = [a for a in answers if not a.startswith("refused")]
    return "correct" if len(done) == 1 and (folder / "run" / "who.txt").read_text() == done[0] and read_json(folder / "run" / "manifest.json") else "silent"


def two_on_a_folder(folder: Path) -> str:
    def act(who: str) -> str:
        with staged_folder(folder / "image") as temp:
            for n in range(20):
                (temp / f"{n}").write_text(who)
        return who

    with together(lambda: act("a"), lambda: act("b")) as answers:
        done = [a for a in answers if not a.startswith("refused")]
    return "correct" if len(done) == 1 and {p.read_text() for p in (folder / "image").iterdir()} == set(done) and len(list(folder.iterdir())) == 1 else "silent"


def two_on_a_log(folder: Path) -> str:
    def act(who: str) -> str:
        log = Logger(folder / "log.jsonl", level="error")
        for n in range(100):
            log.info("line", who=who, n=n)
        return who

    with together(lambda: act("a"), lambda: act("b")):
        found = sorted((r["who"], r["n"]) for r in read_log(folder / "log.jsonl"))
    return "correct" if found == [(who, n) for who in "ab" for n in range(100)] else "silent"


WRITERS = {"one file": two_on_a_file, "one table": two_on_a_table, "one run": two_on_a_run, "one image folder": two_on_a_folder, "one log": two_on_a_log}


def two_writers(folder: Path, rounds: int) -> list[Attempt]:
    def call(act: Callable[[Path], str], n: int) -> str:
        place = Path(tempfile.mkdtemp(dir=folder, prefix=f"{n}-"))
        return act(place)

    return [Attempt(name, f"{name} {n}", lambda a=act, n=n: call(a, n)) for n in range(rounds) for name, act in WRITERS.items()]


# ---------------------------------------------------------------- the table

@dataclass(frozen=True)
class Plan:
    "A row of RELIABILITY."

    make: Callable[[Path, int], list[Attempt]]
    dose: str  # Name in DOSES
    claims: Callable[[int], int]  # Attempts that the row speaks of at such a dose


ROWS = {
    "malformed": Plan(malformed, "malformed", lambda dose: dose), "bombs": Plan(bombs, "bombs", lambda megabytes: 20),
    "pixel_size": Plan(pixel_sizes, "rounds", lambda rounds: 40), "archives": Plan(archives, "rounds", lambda rounds: 30),
    "checkpoints": Plan(checkpoints, "each", lambda each: 13 * each), "two_writers": Plan(two_writers, "rounds", lambda rounds: 5 * rounds),
}


def run_row(name: str, dose: str = "full") -> list[Result]:
    "All attempts of a row of RELIABILITY. Raises AssertionError where they are fewer than the row claims."
    plan, size = ROWS[name], DOSES[dose][ROWS[name].dose]
    with tempfile.TemporaryDirectory(prefix="eq-faults-") as folder:
        results = run_limited(plan.make(Path(folder), size))
    if len(results) < plan.claims(size):
        raise AssertionError(f"{name}: {len(results)} attempts, but dose {dose!r} claims {plan.claims(size)}")
    return results


def outcome_table(name: str, results: list[Result]) -> pd.DataFrame:
    "One line a group, and the largest time and memory."
    lines = []
    for group in dict.fromkeys(r.group for r in results):
        mine = [r for r in results if r.group == group]
        counts = Counter(r.outcome for r in mine)
        line = {"row": name, "group": group, "attempts": len(mine), **{o: counts[o] for o in GOOD + BAD}}
        lines.append(line | {"slowest_s": round(max(r.seconds for r in mine), 2), "peak_mb": round(max(r.peak for r in mine) / 2**20)})
    return pd.DataFrame(lines)


def csv_rows(table: pd.DataFrame) -> list[Row]:
    units = {"slowest_s": "s", "peak_mb": "MiB"}
    found = []
    for line in table.to_dict("records"):
        variant = f"{line.pop('row')}: {line.pop('group')}"
        found += [Row(variant, metric, float(value), units.get(metric, "attempts")) for metric, value in line.items()]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dose", choices=list(DOSES), default="full")
    parser.add_argument("--only", choices=list(ROWS), action="append", help="rows to try; all without it")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    words = ["python benchmarks/faults.py", f"--dose {given.dose}", *(f"--only {r}" for r in given.only or [])]
    sitting, tables, bad = Sitting("faults", " ".join(words)), [], []
    for name in given.only or ROWS:
        began = time.perf_counter()
        results = run_row(name, given.dose)
        tables.append(outcome_table(name, results))
        bad += [r for r in results if r.outcome in BAD]
        print(f"{tables[-1].to_string(index=False)}\n{time.perf_counter() - began:.0f} s\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        list(malformed(Path(folder), len(files.KINDS)))
        dose = DOSES[given.dose]["malformed"]
        print(f"SHA-256 notices {hash_notices(Path(folder), dose)} of {dose} damaged files, whatever the format")
    path = sitting.append(csv_rows(pd.concat(tables)))
    for r in bad[:40]:
        print(f"{r.outcome}: {r.group}, {r.name}: {r.note}")
    print(f"{sum(len(t) for t in tables)} groups, {len(bad)} of {int(pd.concat(tables)['attempts'].sum())} attempts ended badly; {path}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
