"""Training on normal images: killed at any moment and resumed, it ends with the very bits of an undisturbed run. (That labels of a test set reach neither
the weights nor the moment to stop is shown in test_anomaly_verbs.)

Runs are forked children of one server process that has imported torch and eq once; faults are armed as in test_train_faults.
"""
import os
import random
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from test_train_faults import LAST, Fault, _strike, _watch, check_folder, digest

EPOCHS = 3


def normals(number: int, seed: int) -> np.ndarray:
    """Noise with a bright half."""
    images = np.random.default_rng(seed).random((number, 32, 32), np.float32) * 0.5
    images[:, 16:] += 0.4
    return images


def train(out: Path, arch: str, resume: bool = False, valid_seed: int = 1, **changes: object):  # noqa: ANN201
    """A run with everything in it that draws or remembers: drawn vectors, noise, turned images, averaged weights, a rate that depends on the past."""
    from dataclasses import replace

    from eq.core.results import CheckpointMeta
    from eq.models.autoencoder import create_autoencoder
    from eq.training.fit_anomaly import AnomalyOptions, fit_anomaly

    options = AnomalyOptions(epochs=EPOCHS, batch_size=4, lr=0.003, schedule="plateau", ema=0.5, plain=0.3, precision="fp32", device="cpu", quiet=True)
    meta = CheckpointMeta(task="anomaly", arch=arch, encoder="", in_channels=1, classes=("anomaly",), mean=(0.0,), std=(1.0,), scale=1.0, px_size_um=None,
                          tile=32, threshold=0.5, tta="none", min_area_px=0, data={}, params={"network": {"latent": 4, "width": 0.05}}, metrics={},
                          code={}, parent=None, weights_sha256="0" * 64)
    model = create_autoencoder(arch, 32, 4, 0.05, seed=99 if resume and (out / LAST).exists() else 0)  # what is loaded replaces all of it
    return fit_anomaly(model, normals(10, 0), normals(4, valid_seed), replace(options, **changes), meta, out, resume=resume)


def _child(out: Path, arch: str, resume: bool, fault: Fault | None, precision: str = "fp32") -> None:
    """One run; exit code 2 for what a user can mend."""
    from eq.core.registry import EqError

    if fault is not None:
        _watch(out, _strike(fault))
    try:
        train(out, arch, resume, precision=precision)
    except EqError as error:
        print(f"eq: error: {error}", flush=True)
        os._exit(2)
    os._exit(0)


@pytest.fixture(scope="module")
def context():  # noqa: ANN201
    """The fork server."""
    os.environ.update(OMP_NUM_THREADS="1", NO_ALBUMENTATIONS_UPDATE="1")
    found = get_context("forkserver")
    found.set_forkserver_preload(["eq.training.fit_anomaly"])
    return found


def run(context, out: Path, arch: str, resume: bool = False, fault: Fault | None = None, precision: str = "fp32") -> int:  # noqa: ANN001
    """Run to the end; the exit code, negative for a signal."""
    child = context.Process(target=_child, args=(out, arch, resume, fault, precision))
    child.start()
    child.join(120)
    assert child.exitcode is not None, "training hangs"
    return child.exitcode


def weights(out: Path) -> str:
    """Hashes of the final network and of the last state of a finished run, after checking the whole folder."""
    check_folder(out)
    return digest(out / "model.safetensors") + digest(out / LAST / "model.safetensors")


@pytest.fixture(scope="module")
def reference(context, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float]]:  # noqa: ANN001
    """Undisturbed runs: hashes and seconds. One more of the first warms the server up, and shows that the same seed gives the same bits."""
    folder, found = tmp_path_factory.mktemp("reference"), {}
    for name, arch in (("warm", "reversed"), ("a", "reversed"), ("b", "unet")):
        start = time.monotonic()
        assert run(context, folder / name, arch) == 0
        found[arch] = (weights(folder / name), time.monotonic() - start)
    assert weights(folder / "warm") == found["reversed"][0]
    return found


@pytest.mark.parametrize("arch", ["reversed", "unet"])
def test_kill_at_random_times(context, reference: dict, arch: str, tmp_path: Path) -> None:  # noqa: ANN001
    """Killed again and again at random moments after a checkpoint, a run ends with the same bits."""
    out, rng, kills = tmp_path / "random", random.Random(0), 0
    for attempt in range(6):
        seen = (out / LAST).resolve()
        child = context.Process(target=_child, args=(out, arch, attempt > 0, None))
        child.start()
        while child.is_alive() and (out / LAST).resolve() == seen:
            time.sleep(0.002)
        child.join(rng.uniform(0, reference[arch][1] / (EPOCHS + 3)))
        if child.exitcode is not None:
            assert child.exitcode == 0
            break
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
        check_folder(out)
    else:
        assert run(context, out, arch, resume=True) == 0
    assert kills >= 1
    assert weights(out) == reference[arch][0]


@pytest.mark.parametrize("operation", range(3, 19, 5))
def test_kill_or_full_disk_inside_a_checkpoint(context, reference: dict, operation: int, tmp_path: Path) -> None:  # noqa: ANN001
    """At some file operation of the first two checkpoints the run is killed, or the disk is full: what is there loads, the end has the same bits."""
    kind = "full" if operation % 2 else "kill"
    out = tmp_path / "inside"
    assert run(context, out, "reversed", fault=Fault(kind, operation)) == (2 if kind == "full" else -signal.SIGKILL)
    check_folder(out)
    assert run(context, out, "reversed", resume=True) == 0
    assert weights(out) == reference["reversed"][0]


@pytest.mark.parametrize("arch", ["reversed", "unet"])
def test_resume_is_exact_in_the_precision_that_auto_picks(context, arch: str, tmp_path: Path) -> None:  # noqa: ANN001
    """bf16 where this processor multiplies it, fp32 elsewhere: killed in the second checkpoint and resumed, the same bits."""
    assert run(context, tmp_path / "whole", arch, precision="auto") == 0
    assert run(context, tmp_path / "killed", arch, fault=Fault("kill", 24), precision="auto") == -signal.SIGKILL
    assert (tmp_path / "killed" / LAST).exists(), "killed before the first checkpoint"
    assert run(context, tmp_path / "killed", arch, resume=True, precision="auto") == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_validation_images_stop_a_run_and_teach_it_nothing(tmp_path: Path) -> None:
    """Other normal images to validate by change the validation loss and not one bit of what the steps did."""
    runs = [train(tmp_path / f"{seed}", "unet", valid_seed=seed, schedule="constant") for seed in (1, 2)]
    losses = [[r["valid_loss"] for r in run.history] for run in runs]
    assert all(a != b for a, b in zip(*losses, strict=True))
    assert digest(tmp_path / "1" / LAST / "model.safetensors") == digest(tmp_path / "2" / LAST / "model.safetensors")
    assert runs[0].meta.metrics["valid_loss"] == min(losses[0])


@pytest.mark.parametrize(("change", "said"), [({"batch_size": 0}, "batch_size = 0; valid: above 0"), ({"rotate": 200.0}, "rotate = 200")])
def test_bad_choices_are_refused(tmp_path: Path, change: dict, said: str) -> None:
    """One line with the value and what is valid."""
    from eq.core.registry import EqError

    with pytest.raises(EqError, match=said):
        train(tmp_path / "out", "unet", **change)
    assert not (tmp_path / "out").exists()
