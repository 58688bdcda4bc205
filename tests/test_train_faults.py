"""Faults while training: kill -9, a full disk, Ctrl-C. Afterwards nothing half-written stands under a final name, the last finished
checkpoint loads, and `--resume` ends with the very bits of an undisturbed run.

Every run is a forked child of one server process that has imported torch and eq once, so that thirty runs cost seconds and not minutes.
A fault is armed inside the child: it strikes at the n-th file operation below the run's folder, or the parent sends a signal.
"""
import errno
import hashlib
import itertools
import json
import multiprocessing as mp
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

EPOCHS, STEPS = 4, 2  # four checkpoints; faults strike in the first and the second
LAST = Path("checkpoints") / "last"
FULL = bool(os.environ.get("EQ_FULL_DOSE"))  # 30 kills while training and 10 at random points of checkpoint writes take minutes


# ---- one training run in a child process -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and at which of the file operations (fsync, replace, safetensors write) below the run's folder; 0 is the first."""

    kind: str  # "kill", "half" (kill in the middle of writing tensors), "full" (no space left from here on)
    at: int


def _watch(out: Path, act: Callable[[int, str, Path], None]) -> None:
    """Call `act(count, operation, path)` before each file operation below `out`."""
    from eq.models import checkpoint

    count = itertools.count()
    fsync, replace, save_file = os.fsync, os.replace, checkpoint.save_file

    def seen(operation: str, path: object) -> None:
        if Path(os.fspath(path)).is_relative_to(out):  # type: ignore[call-overload]
            act(next(count), operation, Path(os.fspath(path)))  # type: ignore[call-overload]

    def watched_fsync(fd: int) -> None:
        seen("fsync", os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def watched_replace(source: str, target: str) -> None:
        seen("replace", target)
        replace(source, target)

    def watched_save(tensors: dict, path: Path) -> None:
        save_file(tensors, path)
        seen("tensors", path)

    os.fsync, os.replace, checkpoint.save_file = watched_fsync, watched_replace, watched_save  # type: ignore[assignment]


def _strike(fault: Fault) -> Callable[[int, str, Path], None]:
    """The action of a fault."""

    def act(n: int, operation: str, path: Path) -> None:
        if fault.kind == "full" and n >= fault.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if n == fault.at:
            if fault.kind == "half":
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def _child(args: list[str], out: Path, fault: Fault | None, events: Path | None, screen: Path) -> None:
    """Runs `eq ARGS`; called in the child."""
    fd = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    from eq.workflows.cli import main

    if fault is not None:
        _watch(out, _strike(fault))
    if events is not None:
        log = events.open("a", buffering=1)
        _watch(out, lambda n, operation, path: print(json.dumps([operation, str(path.relative_to(out))]), file=log))
    os._exit(main(args))


@dataclass(frozen=True)
class Bench:
    """A cohort and the server that forks training runs on it."""

    context: mp.context.ForkServerContext
    cohort: Path
    folder: Path

    def start(self, out: Path, *extra: str, fault: Fault | None = None, events: Path | None = None) -> mp.process.BaseProcess:
        """Start a training run; a repeated option in `extra` wins."""
        args = ["train", "mito", "--source", str(self.cohort), "--out", str(out), "--epochs", str(EPOCHS), "--steps-per-epoch", str(STEPS),
                "--encoder", "tu-test_efficientnet", "--crop", "64", "--batch-size", "2", "--scale", "1", "--seed", "0", *extra]
        child = self.context.Process(target=_child, args=(args, out, fault, events, screen(out)))
        child.start()
        return child

    def run(self, out: Path, *extra: str, fault: Fault | None = None, events: Path | None = None) -> int:
        """Run it to its end; the exit code, negative for a signal."""
        child = self.start(out, *extra, fault=fault, events=events)
        child.join(300)
        assert child.exitcode is not None, f"training hangs: {said(out)}"
        return child.exitcode

    def carry_on(self, out: Path) -> None:
        """Go on to the end after a fault; with no finished checkpoint that is from the first step."""
        assert self.run(out, "--resume") == 0, said(out)


def screen(out: Path) -> Path:
    """Where a run's screen goes: beside its folder, never on the disk under test."""
    return Path(os.environ["EQ_TEST_SCREENS"]) / f"{out.name}.txt"


def said(out: Path) -> str:
    """What a run has printed so far."""
    return screen(out).read_text() if screen(out).exists() else ""


# ---- what must hold ---------------------------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_whole(path: Path) -> bool:
    """Is a file complete, as far as its format can tell?"""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        header = int.from_bytes(data[:8], "little")
        ends = [v["data_offsets"][1] for k, v in json.loads(data[8 : 8 + header]).items() if k != "__metadata__"]
        return len(data) == 8 + header + max(ends)
    if path.suffix == ".json":
        return isinstance(json.loads(data), dict)
    if path.suffix == ".png":
        Image.open(path).load()
    return bool(data) and (path.suffix not in (".csv", ".html") or data.endswith(b"\n"))


def check_folder(out: Path) -> None:
    """Nothing half-written under a final name; what `last` and `best` point to, and the final network, have the hashes they state."""
    final = [p for p in out.rglob("*") if p.is_file() and not p.name.startswith(".tmp-") and p.suffix != ".jsonl"]
    assert not [str(p) for p in final if not is_whole(p)]
    for folder in (out / LAST, out / LAST.parent / "best", out):
        if (folder / "model.json").exists():
            assert json.loads((folder / "model.json").read_text())["weights_sha256"] == digest(folder / "model.safetensors")
    for link in (out / LAST, out / LAST.parent / "best"):
        assert not link.is_symlink() or link.resolve().is_dir(), f"{link} points to nothing"
    if (out / LAST).exists():
        assert json.loads((out / LAST / "resume.json").read_text())["sha256"] == digest(out / LAST / "resume.safetensors")


def weights(out: Path) -> str:
    """Hash of the final network of a finished run, after checking the whole folder."""
    check_folder(out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "done", manifest["error"]
    return digest(out / "model.safetensors")


# ---- fixtures ---------------------------------------------------------------------------------------------------------------------------


def write_cohort(folder: Path) -> Path:
    """Five grey images of 96 px with bright discs: two to train on, two to validate, one for testing."""
    rng, rows = np.random.default_rng(0), []
    y, x = np.mgrid[:96, :96]
    for i, part in enumerate(("train", "train", "validate", "validate", "test")):
        mask = np.zeros((96, 96), bool)
        for cy, cx, r in zip(rng.integers(10, 86, 5), rng.integers(10, 86, 5), rng.integers(5, 10, 5), strict=True):
            mask |= (y - cy) ** 2 + (x - cx) ** 2 < r**2
        image = np.clip(90 + 80 * mask + rng.normal(0, 15, mask.shape), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"image_{i}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"mask_{i}.png")
        rows.append({"image": f"image_{i}.png", "mask": f"mask_{i}.png", "mask_coding": "grey127", "subject": f"s{i}", "part": part})
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    return folder / "cohort.csv"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The cohort and the fork server."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "screens").mkdir()
    os.environ.update(EQ_TEST_SCREENS=str(folder / "screens"), OMP_NUM_THREADS="1", NO_ALBUMENTATIONS_UPDATE="1")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["eq.workflows.train", "eq.workflows.cli"])
    return Bench(context, write_cohort(folder), folder)


@dataclass(frozen=True)
class Reference:
    """An undisturbed run."""

    weights: str
    seconds: float
    events: list[tuple[str, str]]  # (operation, path below the run's folder) in order

    def find(self, operation: str, name: str, checkpoint: int = -1) -> int:
        """Number of the file operation on a file of the n-th checkpoint (the last that has it for -1), links included."""
        starts = [i for i, (kind, path) in enumerate(self.events) if kind == "tensors" and path.endswith("-model.safetensors") and "/step-" in path]
        first, end = (0, len(self.events)) if checkpoint < 0 else (starts[checkpoint], starts[checkpoint + 1])
        return max(i for i in range(first, end) if self.events[i][0] == operation and self.events[i][1].endswith(name))


@pytest.fixture(scope="module")
def reference(bench: Bench) -> Reference:
    """An undisturbed run with a record of its file operations; the first one, to warm the server up, is thrown away."""
    assert bench.run(bench.folder / "warm", "--epochs", "1") == 0, said(bench.folder / "warm")
    out, events, start = bench.folder / "reference", bench.folder / "events.txt", time.monotonic()
    assert bench.run(out, events=events) == 0, said(out)
    seconds = time.monotonic() - start
    return Reference(weights(out), seconds, [tuple(json.loads(line)) for line in events.read_text().splitlines()])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path | None]]:
    """Gives a function that mounts a disk of so many bytes, or None where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path | None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, check=False)
        return folder if done.returncode == 0 else None

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


# ---- the tests --------------------------------------------------------------------------------------------------------------------------


def test_same_seed_same_bits(bench: Bench, reference: Reference) -> None:
    """The same seed gives the same final network to the last bit, another seed another one."""
    assert bench.run(bench.folder / "again") == 0
    assert weights(bench.folder / "again") == reference.weights
    assert bench.run(bench.folder / "other", "--seed", "1") == 0
    assert weights(bench.folder / "other") != reference.weights


def kill_at_random(bench: Bench, reference: Reference, out: Path, rng: random.Random) -> int:
    """Kills a run at a random moment within the epoch after each checkpoint until it has come to its end; the number of kills."""
    kills = 0
    for attempt in range(8):
        seen = (out / LAST).resolve()
        child = bench.start(out, *(["--resume"] if attempt else []))
        while child.is_alive() and (out / LAST).resolve() == seen:
            time.sleep(0.005)
        child.join(rng.uniform(0, reference.seconds / (EPOCHS + 2)))
        if child.exitcode is not None:
            assert child.exitcode == 0, said(out)
            return kills
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
        check_folder(out)
    bench.carry_on(out)
    return kills


def test_kill_at_random_times(bench: Bench, reference: Reference) -> None:
    """Runs that are killed again and again at random moments end with the same bits."""
    rng, kills, wanted = random.Random(0), 0, 30 if FULL else 2
    for n in range(wanted):
        out = bench.folder / f"random-{n}"
        kills += kill_at_random(bench, reference, out, rng)
        assert weights(out) == reference.weights
        if kills >= wanted:
            break
    assert kills >= wanted


@pytest.mark.parametrize(
    ("checkpoint", "operation", "name"),
    [(0, "tensors", "-model.safetensors"), (0, "replace", "last"), (1, "tensors", "-model.safetensors"), (1, "replace", "model.json"),
     (1, "tensors", "-resume.safetensors"), (1, "fsync", "-resume.json"), (1, "replace", "last"), (-1, "replace", "best")],
)
def test_kill_inside_a_checkpoint_write(bench: Bench, reference: Reference, checkpoint: int, operation: str, name: str) -> None:
    """Killed half-way through writing tensors or just before a rename: the checkpoint before loads, and the end has the same bits."""
    at = reference.find(operation, name, checkpoint)
    out = bench.folder / f"inside-{at}"
    assert bench.run(out, fault=Fault("half" if operation == "tensors" else "kill", at)) == -signal.SIGKILL, said(out)
    check_folder(out)
    assert checkpoint == 0 or (out / LAST).exists(), "the checkpoint before it is gone"
    bench.carry_on(out)
    assert weights(out) == reference.weights


@pytest.mark.parametrize("n", range(10 if FULL else 1))
def test_kill_at_a_random_point_of_a_checkpoint_write(bench: Bench, reference: Reference, n: int) -> None:
    """The same at any file operation from the second checkpoint on; beside the points above, which are those that matter most."""
    first = reference.find("tensors", "-model.safetensors", 1)
    at = random.Random(n).choice([i for i, (_, path) in enumerate(reference.events) if i >= first and path.startswith("checkpoints")])
    out = bench.folder / f"anywhere-{n}"
    assert bench.run(out, fault=Fault("half" if reference.events[at][0] == "tensors" else "kill", at)) == -signal.SIGKILL, said(out)
    check_folder(out)
    assert (out / LAST).exists(), "the checkpoint before it is gone"
    bench.carry_on(out)
    assert weights(out) == reference.weights


def test_ctrl_c(bench: Bench, reference: Reference) -> None:
    """Ctrl-C: exit code 130, a manifest that says interrupted, whole files only, and a run that can go on."""
    out = bench.folder / "ctrl-c"
    child = bench.start(out)
    while not (out / LAST).exists() and child.is_alive():
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGINT)
    child.join(300)
    assert child.exitcode == 130, said(out)
    assert json.loads((out / "manifest.json").read_text())["status"] == "interrupted"
    check_folder(out)
    assert not list(out.rglob(".tmp-*"))
    assert not (out / "model.safetensors").exists()
    bench.carry_on(out)
    assert weights(out) == reference.weights


def check_full_disk(out: Path) -> None:
    """After a full disk: one clear line, whole files only, and an earlier checkpoint to go on from."""
    error = said(out)[said(out).index("eq: error: ") :]
    assert error.startswith("eq: error: disk full while writing ") and error.count("\n") == 1, error
    assert "Traceback" not in said(out)
    check_folder(out)
    assert (out / LAST).exists()


@pytest.mark.parametrize(("operation", "name", "checkpoint"), [("fsync", "-resume.safetensors", 1), ("replace", "manifest.json", -1)])
def test_disk_full_from_some_file_on(bench: Bench, reference: Reference, operation: str, name: str, checkpoint: int) -> None:
    """No space from one file operation on: exit code 2, the checkpoint before it intact, and a run that can go on."""
    out = bench.folder / f"full{name}"
    assert bench.run(out, fault=Fault("full", reference.find(operation, name, checkpoint))) == 2, said(out)
    check_full_disk(out)
    bench.carry_on(out)
    assert weights(out) == reference.weights


def test_small_disk(bench: Bench, reference: Reference, small_disk: Callable[[int], Path | None]) -> None:
    """A disk with room for one checkpoint and a half. Where nothing can be mounted the same is played by an injected ENOSPC."""
    one = sum(p.stat().st_size for p in (bench.folder / "reference" / LAST).resolve().iterdir())
    disk = small_disk(one + one // 2)
    out = (disk or bench.folder) / "small"
    fault = None if disk else Fault("full", reference.find("tensors", "-resume.safetensors", 1))
    assert bench.run(out, fault=fault) == 2, said(out)
    check_full_disk(out)
    if disk:
        subprocess.run(["mount", "-o", f"remount,size={10 * one}", str(disk)], check=True)
    bench.carry_on(out)
    assert weights(out) == reference.weights
