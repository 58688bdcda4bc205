"""Faults while a classifier is trained: kill -9, a full disk, memory that runs out. Afterwards nothing half-written stands under a final name, the
last finished checkpoint loads, and a resumed run ends with the very bits of an undisturbed one.

Runs are forked children of one server process that has imported torch and eq once; faults are armed as in test_train_faults.
"""
import json
import multiprocessing as mp
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from test_train_faults import LAST, Fault, _strike, _watch, check_folder, digest, small_disk  # noqa: F401  a fixture

EPOCHS = 4


def pictures(number: int, seed: int):  # noqa: ANN201
    """Dark and light noise."""
    from eq.data.pictures import Pictures

    rng, labels = np.random.default_rng(seed), np.arange(number) % 2
    images = np.clip(70 + 50 * labels[:, None, None, None] + rng.normal(0, 40, (number, 32, 32, 3)), 0, 255).astype(np.uint8)
    return Pictures(images, labels, ("dark", "light"), ("",) * number, ("",) * number, {})


def train(out: Path, resume: bool, **changes: object):  # noqa: ANN201
    """A run with everything in it that draws or remembers: dropout, turned and mixed pictures, averaged weights, Lookahead, a thaw half-way."""
    from dataclasses import replace

    from eq.core.results import CheckpointMeta
    from eq.models.classifier import create_classifier
    from eq.training.classify_options import ClassifyOptions
    from eq.training.fit_classify import fit_classify

    options = ClassifyOptions(epochs=EPOCHS, batch_size=8, lr=0.01, optimiser="ranger", schedule="plateau", weight_decay=0.01, label_smoothing=0.1,
                              mixup=0.3, cutmix=1.0, freeze="until:0.4", ema=0.5, precision="fp32", device="cpu", quiet=True)
    meta = CheckpointMeta(task="classify", arch="tu-test_efficientnet", encoder="", in_channels=3, classes=("dark", "light"), mean=(0.4,) * 3,
                          std=(0.2,) * 3, scale=1.0, px_size_um=None, tile=32, threshold=0.5, tta="none", min_area_px=0, data={}, params={},
                          metrics={}, code={}, parent=None, weights_sha256="0" * 64)
    model = create_classifier(meta.arch, dropout=0.3, seed=99 if resume and (out / LAST).exists() else 0)  # what is loaded replaces all of it
    return fit_classify(model, pictures(22, 0), pictures(10, 1), replace(options, **changes), meta, out, resume=resume)


def _child(out: Path, resume: bool, fault: Fault | None, events: Path | None, screen: Path) -> None:
    """One run; exit code 2 with a line for what a user can mend, as the command line does it."""
    fd = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    from eq.core.registry import EqError

    if fault is not None:
        _watch(out, _strike(fault))
    if events is not None:
        log = events.open("a", buffering=1)
        _watch(out, lambda n, operation, path: print(json.dumps([operation, str(path.relative_to(out))]), file=log))
    try:
        train(out, resume)
    except EqError as error:
        print(f"eq: error: {error}", flush=True)
        os._exit(2)
    os._exit(0)


@dataclass(frozen=True)
class Bench:
    """The server that forks runs."""

    context: mp.context.ForkServerContext
    folder: Path

    def start(self, out: Path, resume: bool = False, fault: Fault | None = None, events: Path | None = None) -> mp.process.BaseProcess:
        """Start a run."""
        child = self.context.Process(target=_child, args=(out, resume, fault, events, self.folder / f"{out.name}.txt"))
        child.start()
        return child

    def run(self, out: Path, resume: bool = False, fault: Fault | None = None, events: Path | None = None) -> int:
        """Run to the end; the exit code, negative for a signal."""
        child = self.start(out, resume, fault, events)
        child.join(300)
        assert child.exitcode is not None, f"training hangs: {self.said(out)}"
        return child.exitcode

    def said(self, out: Path) -> str:
        """What a run has printed."""
        screen = self.folder / f"{out.name}.txt"
        return screen.read_text() if screen.exists() else ""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The fork server."""
    os.environ.update(OMP_NUM_THREADS="1", NO_ALBUMENTATIONS_UPDATE="1")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["eq.training.fit_classify"])
    return Bench(context, tmp_path_factory.mktemp("classify"))


@dataclass(frozen=True)
class Reference:
    """An undisturbed run."""

    weights: str
    seconds: float
    events: list[tuple[str, str]]  # (operation, path below the run's folder) in order

    def find(self, operation: str, name: str, checkpoint: int) -> int:
        """Number of a file operation within the n-th checkpoint."""
        starts = [i for i, (kind, path) in enumerate(self.events) if kind == "tensors" and path.endswith("-model.safetensors") and "/step-" in path]
        first, end = starts[checkpoint], [*starts, len(self.events)][checkpoint + 1]
        return max(i for i in range(first, end) if self.events[i][0] == operation and self.events[i][1].endswith(name))


def weights(out: Path) -> str:
    """Hashes of the final network and of the last state of a finished run, after checking the whole folder."""
    check_folder(out)
    return digest(out / "model.safetensors") + digest(out / LAST / "model.safetensors")


@pytest.fixture(scope="module")
def reference(bench: Bench) -> Reference:
    """An undisturbed run with a record of its file operations; the one before it warms the server up."""
    assert bench.run(bench.folder / "warm") == 0, bench.said(bench.folder / "warm")
    out, events, start = bench.folder / "reference", bench.folder / "events.txt", time.monotonic()
    assert bench.run(out, events=events) == 0, bench.said(out)
    seconds = time.monotonic() - start
    assert weights(out) == weights(bench.folder / "warm")  # the same seed gives the same bits
    return Reference(weights(out), seconds, [tuple(json.loads(line)) for line in events.read_text().splitlines()])


def test_kill_at_random_times(bench: Bench, reference: Reference) -> None:
    """Killed again and again at random moments after a checkpoint, a run ends with the same bits."""
    out, rng, kills = bench.folder / "random", random.Random(0), 0
    for attempt in range(8):
        seen = (out / LAST).resolve()
        child = bench.start(out, resume=attempt > 0)
        while child.is_alive() and (out / LAST).resolve() == seen:
            time.sleep(0.002)
        child.join(rng.uniform(0, reference.seconds / (EPOCHS + 2)))
        if child.exitcode is not None:
            assert child.exitcode == 0, bench.said(out)
            break
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
        check_folder(out)
    else:
        assert bench.run(out, resume=True) == 0, bench.said(out)
    assert kills >= 1
    assert weights(out) == reference.weights


@pytest.mark.parametrize(
    ("checkpoint", "operation", "name"),
    [(0, "tensors", "-model.safetensors"), (1, "tensors", "-resume.safetensors"), (1, "replace", "model.json"), (1, "fsync", "-resume.json"),
     (2, "replace", "last")],
)
def test_kill_inside_a_checkpoint_write(bench: Bench, reference: Reference, checkpoint: int, operation: str, name: str) -> None:
    """Killed half-way through writing tensors or just before a rename: the checkpoint before loads, and the end has the same bits."""
    at = reference.find(operation, name, checkpoint)
    out = bench.folder / f"inside-{at}"
    assert bench.run(out, fault=Fault("half" if operation == "tensors" else "kill", at)) == -signal.SIGKILL, bench.said(out)
    check_folder(out)
    assert checkpoint == 0 or (out / LAST).exists(), "the checkpoint before it is gone"
    assert bench.run(out, resume=True) == 0, bench.said(out)
    assert weights(out) == reference.weights


def test_small_disk(bench: Bench, reference: Reference, small_disk: Callable[[int], Path | None]) -> None:  # noqa: F811
    """A disk with room for one checkpoint and a half. Where nothing can be mounted the same is played by an injected ENOSPC."""
    one = sum(p.stat().st_size for p in (bench.folder / "reference" / LAST).resolve().iterdir())
    disk = small_disk(one + one // 2)
    out = (disk or bench.folder) / "small"
    fault = None if disk else Fault("full", reference.find("tensors", "-resume.safetensors", 1))
    assert bench.run(out, fault=fault) == 2, bench.said(out)
    said = bench.said(out)
    assert said.startswith("eq: error: disk full while writing ") and said.count("\n") == 1 and "Traceback" not in said, said
    check_folder(out)
    assert (out / LAST).exists()
    if disk:
        subprocess.run(["mount", "-o", f"remount,size={10 * one}", str(disk)], check=True)
    assert bench.run(out, resume=True) == 0, bench.said(out)
    assert weights(out) == reference.weights


def test_memory_runs_out_in_the_backward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-way through a backward pass of the second epoch: the batch is halved, the epoch begins anew, no half gradient is left behind."""
    import torch

    from eq.training import fit_classify as module

    calls, halved = [], []

    def hungry(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits))
        if len(calls) == 5:  # 22 images in batches of 8 are three steps an epoch
            logits.register_hook(lambda _: (_ for _ in ()).throw(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")))
        return torch.nn.functional.cross_entropy(logits, targets)

    halve = module.ClassifyFit.halve

    def watched(fit: module.ClassifyFit) -> None:
        halve(fit)
        halved.append((fit.options.batch_size, len(fit.batches), all(p.grad is None for p in fit.model.parameters())))

    monkeypatch.setattr(module, "cross_entropy", hungry)
    monkeypatch.setattr(module.ClassifyFit, "halve", watched)
    result = train(tmp_path / "out", resume=False, freeze="none", mixup=0.0, cutmix=0.0)
    assert halved == [(4, 6, True)]
    assert calls == [8, 7, 7, 8, 7] + [4, 4, 4, 4, 3, 3] * 3
    assert [r["epoch"] for r in result.history] == [1, 2, 3, 4]
    assert [r["step"] for r in result.history] == [3, 10, 16, 22]  # one step of the epoch that was begun anew had been done
    assert result.history[-1]["images"] == 22 * 4 + 8


@pytest.mark.parametrize(("change", "said"), [({"batch_size": 0}, "batch_size = 0; valid: above 0"), ({"freeze": "until:2"}, "freeze = 'until:2'")])
def test_bad_choices_are_refused(tmp_path: Path, change: dict, said: str) -> None:
    """One line with the value and what is valid."""
    from eq.core.registry import EqError

    with pytest.raises(EqError, match=said.replace("(", "[(]")):
        train(tmp_path / "out", resume=False, **change)
    assert not (tmp_path / "out").exists()
