"""Hundreds of slides, several workers: the same files from every engine, workers killed and every tile still there, failed slides listed."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from eq.core.provenance import verify_run
from eq.core.results import CheckpointMeta, TileLedger
from eq.data.io import write_ome_tiff, write_png
from eq.models.checkpoint import save_checkpoint
from eq.models.unet import create_unet
from eq.workflows.bench_slide import workers_of

META = CheckpointMeta(
    task="glom", arch="unet", encoder="tu-mobilenetv3_small_050", in_channels=3, classes=("glomerulus",), mean=(0.5,) * 3, std=(0.25,) * 3, scale=1.0,
    px_size_um=0.5, tile=64, threshold=0.5, tta="none", min_area_px=20, data={}, params={}, metrics={}, code={}, parent=None, weights_sha256="0" * 64,
)
FILES = ("mask.ome.tif", "labels.ome.tif", "objects.geojson", "instances.csv", "overlay.png")
FIELDS = 1000 if os.environ.get("EQ_FULL_DOSE") else 60


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    "A checkpoint, one image of 36 tiles, and two broken files."
    folder = tmp_path_factory.mktemp("lab")
    save_checkpoint(folder / "model", create_unet("unet", META.encoder, seed=0), META)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (80, 80, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    write_ome_tiff(folder / "slides" / "large.ome.tif", picture, 0.5)
    write_png(folder / "slides" / "small.png", picture[:100, :90])
    (folder / "slides" / "empty.tif").write_bytes(b"")
    (folder / "slides" / "torn.png").write_bytes((folder / "slides" / "small.png").read_bytes()[:500])
    return folder


def command(lab: Path, out: Path, *more: object) -> list[str]:
    args = ["predict", lab / "slides", "--model", lab / "model", "--out", out, "--backend", "torch", "--device", "cpu", "--precision", "fp32", *more]
    return [sys.executable, "-m", "eq", *map(str, args)]


ENV = {**os.environ, "EQ__PREDICT__TILE": "224", "OMP_NUM_THREADS": "1"}


def run(lab: Path, out: Path, *more: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(lab, out, *more), env=ENV, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def local(lab: Path) -> Path:
    done = run(lab, lab / "local")
    assert done.returncode == 1, done.stderr  # two of four images are broken
    return lab / "local"


def check_same(local: Path, other: Path) -> None:
    "Same files, same ledgers, same failures."
    for name in ("large", "small"):
        for file in FILES:
            assert (local / name / file).read_bytes() == (other / name / file).read_bytes(), (name, file)
    ledgers = [json.loads((f / "manifest.json").read_text())["metrics"]["tiles"] for f in (local, other)]
    assert ledgers[0] == ledgers[1]
    ledger = TileLedger.from_dict(ledgers[1]["large"]).check()
    assert ledger.done == ledger.planned >= 30
    tables = [pd.read_csv(f / "summary.csv").drop(columns="seconds") for f in (local, other)]
    pd.testing.assert_frame_equal(*tables)
    assert verify_run(other).ok and not (other / ".work").exists()


def test_failed_slides_are_listed_and_the_rest_is_done(local):
    table = pd.read_csv(local / "summary.csv").set_index("image")
    assert {Path(i).name: s for i, s in table["status"].items()} == {"empty.tif": "failed", "large.ome.tif": "done", "small.png": "done", "torn.png": "failed"}
    assert all(table.loc[table["status"] == "failed", "note"].str.len() > 10)


def test_dask_gives_the_same_files(lab, local):
    done = run(lab, lab / "dask", "--engine", "dask", "--workers", "2")
    assert done.returncode == 1, done.stderr
    check_same(local, lab / "dask")


def test_killed_workers_lose_no_tile(lab, local, tmp_path):
    "A worker is killed again and again while tiles are computed; the rest takes over and nothing is missing or different."
    out, kills, said = lab / "killed", 0, tmp_path / "stderr.txt"
    with said.open("w") as err:  # a file: a pipe that nobody empties would stop the command for ever
        child = subprocess.Popen(command(lab, out, "--engine", "dask", "--workers", "2"), env=ENV, stdout=subprocess.DEVNULL, stderr=err)
    seen, store, known, lost, end = -1, out / ".work" / "large", set[str](), set[str](), time.monotonic() + 300
    while child.poll() is None and kills < 4 and time.monotonic() < end:
        time.sleep(0.05)
        now = {p.name for p in store.glob("0*.safetensors")}
        lost |= known - now if store.exists() else set()  # it goes when the slide is whole
        known, tiles = known | now, len(now)
        workers = workers_of(child.pid)
        if tiles > max(seen, 0) and workers:
            os.kill(workers[kills % len(workers)].pid, signal.SIGKILL)
            kills, seen = kills + 1, tiles
    try:
        child.wait(timeout=300)
    finally:
        child.kill()
    told = said.read_text()
    assert child.returncode == 1 and kills >= 2 and "Traceback" not in told, (kills, told)
    assert not lost, f"tiles that a worker had kept are gone: {lost}"
    check_same(local, out)


def test_many_small_fields(lab, tmp_path):
    rng = np.random.default_rng(1)
    for i in range(FIELDS):
        write_png(tmp_path / "slides" / f"f{i:04d}.png", rng.integers(0, 256, (8, 9, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1))
    args = [sys.executable, "-m", "eq", "predict", tmp_path / "slides", "--model", lab / "model", "--out", tmp_path / "out", "--backend", "torch"]
    done = subprocess.run([str(a) for a in args], env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert len(table) == FIELDS == table["folder"].nunique() and set(table["status"]) == {"done"}
    assert (table["tiles_done"] == table["tiles_planned"]).all() and verify_run(tmp_path / "out").ok


def test_bad_requests(lab, tmp_path):
    for more, why in ((("--engine", "dusk"), "did you mean 'dask'?"), (("--engine", "dask", "--scheduler", "tcp://127.0.0.1:9"), "no Dask scheduler answers")):
        done = run(lab, tmp_path / "no", *more)
        assert done.returncode == 2 and why in done.stderr and "Traceback" not in done.stderr, done.stderr
