"""`eq predict` and `eq evaluate` as a user types them: what is written, what is refused, exit codes, faults while writing, memory."""
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile

from eq.core.files import TEMP_PREFIX
from eq.core.provenance import verify_run
from eq.core.results import CheckpointMeta, TileLedger
from eq.data.annotations import read_geojson
from eq.data.cohort import Cohort, save_cohort
from eq.data.io import TiffPlan, open_image, write_ome_tiff, write_ome_tiff_bands, write_png
from eq.inference.segment import Engine, Segmenter, predict_probability
from eq.models.autoencoder import create_autoencoder
from eq.models.checkpoint import load_checkpoint, save_checkpoint
from eq.models.unet import create_unet
from eq.workflows.cli import main

ENCODER = "tu-mobilenetv3_small_050"  # small, so that tests are fast; what it finds means nothing
META = CheckpointMeta(
    task="glom", arch="unet", encoder=ENCODER, in_channels=3, classes=("glomerulus",), mean=(0.5,) * 3, std=(0.25,) * 3, scale=2.0, px_size_um=0.5,
    tile=64, threshold=0.5, tta="none", min_area_px=20, data={}, params={}, metrics={}, code={}, parent=None, weights_sha256="0" * 64,
)


def blobs(height: int, width: int, seed: int = 0, noise: float = 10.0) -> np.ndarray:
    "A picture with structure at every scale; without noise it deflates quickly."
    rng = np.random.default_rng(seed)
    coarse = cv2.resize(rng.random((height // 20 + 2, width // 20 + 2, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(255 * coarse + rng.normal(0, noise, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    "An untrained checkpoint whose threshold is the median of what it predicts, so that about half of any picture is object."
    folder = tmp_path_factory.mktemp("checkpoint")
    net = create_unet("unet", ENCODER, seed=0)
    save_checkpoint(folder, net, META)
    seen = predict_probability(Segmenter.from_checkpoint(folder, Engine("cpu", "fp32", "torch")), blobs(256, 320))
    save_checkpoint(folder, net, replace(META, threshold=float(np.median(seen))))
    return folder


def eq(capsys, *args: object) -> tuple[int, str, str]:
    "Exit code, standard output and error of one command, in this process."
    capsys.readouterr()
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


# ---- what is written -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_everything_about_one_image(model, tmp_path, capsys, backend):
    path = write_ome_tiff(tmp_path / "slide.ome.tif", blobs(400, 500), px_size_um=0.25)
    code, out, err = eq(capsys, "predict", path, "--model", model, "--out", tmp_path / "out", "--backend", backend, "--rois", "--probability")
    assert code == 0, err
    assert out.strip().endswith(str(tmp_path / "out"))  # ends with the path of what it wrote
    folder = tmp_path / "out" / "slide"
    assert {p.name for p in folder.iterdir()} == {
        "mask.ome.tif", "labels.ome.tif", "probability.zarr", "instances.csv", "objects.geojson", "overlay.png", "rois", "result.json",
    }
    labels, mask, table = open_image(folder / "labels.ome.tif"), open_image(folder / "mask.ome.tif"), pd.read_csv(folder / "instances.csv")
    numbers = labels.read_all()
    assert labels.px_size_um == mask.px_size_um == 0.25 and len(table) == numbers.max() > 3
    assert set(np.unique(mask.read_all())) == {0, 255} and ((mask.read_all() > 0) == (numbers > 0)).all()
    assert np.allclose(table["area_um2"], table["area_px2"] * 0.0625) and table["area_px2"].min() >= 80  # 20 px at 0.5 um are 80 at 0.25 um
    assert (read_geojson(folder / "objects.geojson", 400, 500) == numbers).all()
    assert len(list((folder / "rois").glob("roi_*_mask.png"))) == len(table)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    ledger = TileLedger.from_dict(manifest["metrics"]["tiles"]["slide"]).check()
    assert (manifest["status"], ledger.planned, ledger.done, manifest["params"]["backend"]) == ("done", 1, 1, backend)
    assert manifest["params"]["weights_sha256"] == load_checkpoint(model)[1].weights_sha256
    assert verify_run(tmp_path / "out").ok


def test_backends_agree(model, tmp_path, capsys):
    path = write_png(tmp_path / "a.png", blobs(300, 420))
    masks = {}
    for backend, precision in (("torch", "fp32"), ("openvino", "fp32")):
        assert eq(capsys, "predict", path, "--model", model, "--out", tmp_path / backend, "--backend", backend, "--precision", precision)[0] == 0
        masks[backend] = open_image(tmp_path / backend / "a" / "mask.ome.tif").read_all() > 0
    both = masks["torch"] & masks["openvino"]
    assert 2 * both.sum() / (masks["torch"].sum() + masks["openvino"].sum()) > 0.999


def test_the_same_twice(model, tmp_path, capsys):
    "Same image, same weights, same engine: the same bytes, but for times."
    path = write_png(tmp_path / "a.png", blobs(200, 300))
    for name in ("one", "two"):
        assert eq(capsys, "predict", path, "--model", model, "--out", tmp_path / name, "--backend", "torch")[0] == 0
    for name in ("mask.ome.tif", "labels.ome.tif", "instances.csv", "objects.geojson", "overlay.png"):
        assert (tmp_path / "one" / "a" / name).read_bytes() == (tmp_path / "two" / "a" / name).read_bytes(), name


def test_unknown_pixel_size_gives_no_um(model, tmp_path, capsys):
    path = write_png(tmp_path / "a.png", blobs(200, 300))
    code, _, err = eq(capsys, "predict", path, "--model", model, "--out", tmp_path / "none", "--backend", "torch")
    assert code == 0 and "pixel size unknown for 1 of 1 images" in err
    assert not [c for c in pd.read_csv(tmp_path / "none" / "a" / "instances.csv").columns if "um" in c]
    areas = {}
    for px in (0.5, 1.0):
        args = ("predict", path, "--model", model, "--out", tmp_path / f"px{px}", "--backend", "torch", "--px-size-um", px)
        assert eq(capsys, *args)[0] == 0
        areas[px] = pd.read_csv(tmp_path / f"px{px}" / "a" / "instances.csv")
    assert np.allclose(areas[0.5]["area_um2"], areas[0.5]["area_px2"] * 0.25) and np.allclose(areas[1.0]["area_um2"], areas[1.0]["area_px2"])


# ---- bad images ------------------------------------------------------------------------------------------------------------------------


def truncated(path: Path) -> Path:
    write_ome_tiff(path, blobs(600, 600))
    path.write_bytes(path.read_bytes()[:-60_000])
    return path


def misnamed(path: Path) -> Path:
    write_png(path.with_suffix(".png"), blobs(64, 64))
    return path.with_suffix(".png").rename(path)


def all_nan(path: Path) -> Path:
    tifffile.imwrite(path, np.full((64, 64), np.nan, np.float32))
    return path


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


BAD = {
    "zero.tif": (empty, "is empty (0 bytes)"),
    "short.tif": (truncated, "short.tif"),
    "jpeg.jpg": (misnamed, "the suffix says jpeg, the content is png"),
    "nan.tif": (all_nan, "NaN"),
    "absent.tif": (lambda path: path, "no such file"),
}


def test_bad_images_are_listed_and_the_rest_is_done(model, tmp_path, capsys):
    good = write_png(tmp_path / "good.png", blobs(100, 120))
    bad = [make(tmp_path / name) for name, (make, _) in BAD.items()]
    code, out, err = eq(capsys, "predict", *bad, good, "--model", model, "--out", tmp_path / "out", "--backend", "torch")
    table = pd.read_csv(tmp_path / "out" / "summary.csv").set_index("image")
    assert code == 1 and f"1 of {len(bad) + 1} images segmented" in out
    for path, (_, why) in zip(bad, BAD.values(), strict=True):
        assert table.loc[str(path), "status"] == "failed" and why in table.loc[str(path), "note"], table.loc[str(path), "note"]
        line = next(line for line in err.splitlines() if line.startswith(f"failed: {path}: "))
        assert line.count(str(path)) == 1, line
    assert table.loc[str(good), "status"] == "done" and (tmp_path / "out" / "good" / "mask.ome.tif").exists()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"good", "summary.csv", "manifest.json", "log.jsonl", "request.json"}
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_text())["metrics"]["failed"]) == len(bad)


def test_a_hole_of_nan_is_in_the_ledger(model, tmp_path, capsys):
    values = blobs(2000, 900)[..., 0].astype(np.float32)
    values[1950:1960, 850:860] = np.nan
    path = tmp_path / "hole.tif"
    tifffile.imwrite(path, values, tile=(128, 128), compression="zlib")
    code, _, err = eq(capsys, "predict", path, "--model", model, "--out", tmp_path / "out", "--backend", "torch", "--px-size-um", "1")  # factor 1
    ledger = TileLedger.from_dict(json.loads((tmp_path / "out" / "manifest.json").read_text())["metrics"]["tiles"]["hole"]).check()
    assert code == 0 and len(ledger.refused) >= 1 and "NaN" in ledger.refused[0].reason and "tiles were refused" in err
    mask = open_image(tmp_path / "out" / "hole" / "mask.ome.tif").read_all()
    assert (mask[1950:1960, 850:860] == 0).all() and (mask[:500] > 0).mean() > 0.2


def test_constant_and_16_bit_images(model, tmp_path, capsys):
    flat = write_png(tmp_path / "flat.png", np.full((64, 64), 7, np.uint8))
    deep = write_ome_tiff(tmp_path / "deep.ome.tif", blobs(128, 128)[..., 0].astype(np.uint16) * 200)
    assert eq(capsys, "predict", flat, deep, "--model", model, "--out", tmp_path / "out", "--backend", "torch")[0] == 0
    notes = pd.read_csv(tmp_path / "out" / "summary.csv").set_index("folder")["note"]
    assert "constant image: every value is 7" in notes["flat"] and "constant" not in notes["deep"]
    assert not pd.read_csv(tmp_path / "out" / "deep" / "instances.csv").isna().any(axis=None)


# ---- what is not looked at is told -----------------------------------------------------------------------------------------------------


def test_planes_that_are_not_looked_at(model, tmp_path, capsys):
    "A ZYX OME-TIFF and a NIfTI volume: the plane that was asked for, and a word on the others."
    import nibabel

    planes = np.stack([blobs(64, 80, seed)[..., 0] for seed in range(7)])
    tifffile.imwrite(tmp_path / "stack.ome.tif", planes, ome=True, metadata={"axes": "ZYX"}, photometric="minisblack")
    nibabel.save(nibabel.Nifti1Image(planes.transpose(2, 1, 0).astype(np.int16), np.eye(4)), tmp_path / "ct.nii.gz")
    args = ("predict", tmp_path / "stack.ome.tif", tmp_path / "ct.nii.gz", "--model", model, "--backend", "torch", "--plane")
    masks = {}
    for plane in (0, 3):
        code, out, err = eq(capsys, *args, plane, "--out", tmp_path / f"out{plane}")
        assert code == 0 and "2 of 2 images segmented" in out, err
        assert f"2 of 2 images are stacks of which plane {plane} was segmented; 12 planes were not looked at: --plane chooses another" in err
        table = pd.read_csv(tmp_path / f"out{plane}" / "summary.csv")
        assert table["plane"].tolist() == [plane] * 2 and table["planes"].tolist() == [7] * 2
        assert all(f"6 of 7 planes were not looked at: only Z={plane} of 7 was read" in note for note in table["note"])
        manifest = json.loads((tmp_path / f"out{plane}" / "manifest.json").read_text())
        assert manifest["params"]["plane"] == plane and any("12 planes were not looked at" in w for w in manifest["warnings"])
        masks[plane] = open_image(tmp_path / f"out{plane}" / "stack" / "mask.ome.tif").read_all()
    alone = write_ome_tiff(tmp_path / "alone.ome.tif", planes[3])
    assert eq(capsys, "predict", alone, "--model", model, "--backend", "torch", "--out", tmp_path / "alone")[0] == 0
    assert np.array_equal(masks[3], open_image(tmp_path / "alone" / "alone" / "mask.ome.tif").read_all()) and not np.array_equal(masks[0], masks[3])
    code, _, err = eq(capsys, *args, 1, "--out", tmp_path / "out3", "--resume")
    assert code == 2 and "was begun with other settings: plane 3, now 1" in err
    code, _, err = eq(capsys, *args, 7, "--out", tmp_path / "out7")
    assert code == 1 and "plane 7 does not exist; choose from 0 to 6" in err


def test_a_folder_with_more_than_its_images(model, tmp_path, capsys):
    for name in ("a.png", "sub/b.png"):
        write_png(tmp_path / "in" / name, blobs(64, 64))
    for name in ("c.czi", "d.nd2", "e.jp2", "notes.txt"):
        (tmp_path / "in" / name).write_bytes(b"x")
    code, out, err = eq(capsys, "predict", tmp_path / "in", "--model", model, "--out", tmp_path / "out", "--backend", "torch")
    assert code == 0 and "1 of 1 images segmented, 4 left out" in out, err
    told = [line for line in err.splitlines() if line.startswith("left out: ")]
    assert [Path(line.split(": ")[1]).name for line in told] == ["c.czi", "d.nd2", "e.jp2", "sub"] and "name it as well" in told[-1]
    table = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert table["status"].tolist() == ["done"] + ["left out"] * 4 and ".czi is not read" in table["note"][1]
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_text())["metrics"]["left_out"]) == 4
    code, out, _ = eq(capsys, "predict", tmp_path / "in", tmp_path / "in" / "sub", "--model", model, "--out", tmp_path / "both", "--backend", "torch")
    assert code == 0 and "2 of 2 images segmented, 3 left out" in out
    (tmp_path / "in" / "a.png").unlink()
    code, _, err = eq(capsys, "predict", tmp_path / "in", "--model", model, "--out", tmp_path / "none")
    assert code == 2 and "no image in" in err and "left out: c.czi: .czi is not read" in err and err.count("\n") == 1


# ---- bad requests: one line, exit code 2, nothing written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--model", "nowhere"), "no checkpoint here"),
        (("--model", "net.pkl"), "pickled models can run code"),
        (("--model", "MODEL", "--px-size-um", "0"), "pixel size 0.0 um is not valid"),
        (("--model", "MODEL", "--px-size-um", "nm"), "px-size-um"),
        (("--model", "MODEL", "--backend", "tourch"), "did you mean 'torch'?"),
        (("--model", "MODEL", "--device", "cuda:99"), "cuda:99"),
        (("--model", "MODEL", "--precision", "fp8"), "choose from"),
    ],
)
def test_bad_requests(model, tmp_path, capsys, args, why):
    path = write_png(tmp_path / "a.png", blobs(64, 64))
    given = [str(model) if a == "MODEL" else a for a in args]
    code, out, err = eq(capsys, "predict", path, *given, "--out", tmp_path / "out")
    assert (code, out) == (2, "") and why in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_the_output_folder(model, tmp_path, capsys):
    path = write_png(tmp_path / "a.png", blobs(64, 64))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for out, why in ((tmp_path / "full", "is not empty"), (path, "is a file"), (path / "below", "a.png")):
        code, _, err = eq(capsys, "predict", path, "--model", model, "--out", out)
        assert code == 2 and why in err and err.startswith("eq: error:"), err
    assert (tmp_path / "full" / "x").read_text() == "mine" and len(list((tmp_path / "full").iterdir())) == 1


def test_a_damaged_checkpoint(model, tmp_path, capsys):
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1000] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    code, _, err = eq(capsys, "predict", write_png(tmp_path / "a.png", blobs(64, 64)), "--model", tmp_path)
    assert code == 2 and "the file is damaged" in err


# ---- faults while it runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def long_run(model, tmp_path) -> Iterator[subprocess.Popen]:
    "A command that takes long, on a small image and a large one; given when it has begun with the large one."
    first = write_png(tmp_path / "first.png", blobs(64, 64))
    large = tmp_path / "large.ome.tif"
    band = np.repeat(blobs(1, 2048, noise=0), 512, axis=0)
    write_ome_tiff_bands(large, (band for _ in range(24)), TiffPlan(24 * 512, 2048, np.uint8, 3, px_size_um=1.0))  # 25 Mpx at factor 1
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    args = ["predict", first, large, "--model", model, "--out", tmp_path / "out", "--backend", "torch"]
    child = subprocess.Popen([sys.executable, "-m", "eq", *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 240
    while len(list((tmp_path / "out").glob(".work/large/0*.safetensors"))) < 3 and child.poll() is None:
        assert time.monotonic() < end, "the run did not reach the large image"
        time.sleep(0.05)
    yield child
    if child.poll() is None:
        child.kill()
        child.communicate()


def test_ctrl_c(long_run, tmp_path):
    assert long_run.poll() is None, long_run.communicate()
    long_run.send_signal(signal.SIGINT)
    _, err = long_run.communicate(timeout=240)
    assert long_run.returncode == 130 and "interrupted" in err.splitlines()[-1] and "Traceback" not in err, err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"first", "summary.csv", "log.jsonl", "manifest.json", "request.json", ".work"}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["status"] == "interrupted"
    assert verify_run(tmp_path / "out").ok and len(pd.read_csv(tmp_path / "out" / "summary.csv")) == 1


def test_kill_9(long_run, model, tmp_path, capsys):
    assert long_run.poll() is None, long_run.communicate()
    long_run.kill()
    long_run.communicate()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {n for n in names if not n.startswith(TEMP_PREFIX)} == {"first", "summary.csv", "log.jsonl", "request.json", ".work"}  # no manifest: not a finished run
    assert open_image(tmp_path / "out" / "first" / "mask.ome.tif").read_all().shape == (64, 64)
    finished, tiles = (tmp_path / "out" / "first" / "mask.ome.tif").stat().st_mtime_ns, {p.name for p in (tmp_path / "out" / ".work" / "large").glob("0*")}
    args = ["predict", tmp_path / "first.png", tmp_path / "large.ome.tif", "--model", model, "--backend", "torch"]
    assert eq(capsys, *args, "--out", tmp_path / "out", "--resume")[0] == 0
    assert eq(capsys, *args, "--out", tmp_path / "undisturbed")[0] == 0
    for name in ("mask.ome.tif", "labels.ome.tif", "objects.geojson"):
        assert (tmp_path / "out" / "large" / name).read_bytes() == (tmp_path / "undisturbed" / "large" / name).read_bytes()
    assert (tmp_path / "out" / "first" / "mask.ome.tif").stat().st_mtime_ns == finished and len(tiles) >= 3
    ledger = TileLedger.from_dict(json.loads((tmp_path / "out" / "manifest.json").read_text())["metrics"]["tiles"]["large"]).check()
    assert ledger.done == ledger.planned and verify_run(tmp_path / "out").ok and not (tmp_path / "out" / ".work").exists()
    code, _, err = eq(capsys, *args, "--out", tmp_path / "out", "--resume", "--probability")
    assert code == 2 and "was begun with other settings: probability False, now True" in err


def test_resume_touches_no_other_image(model, tmp_path, capsys, monkeypatch):
    "Two images of one name: whichever is named when a run is resumed, and however, the result of the other stays, and only what changed is done again."
    for place, seed in (("A", 1), ("B", 2)):
        write_png(tmp_path / place / "x.png", blobs(64, 80, seed))
    monkeypatch.chdir(tmp_path)
    fixed = ("--model", model, "--backend", "torch", "--out", tmp_path / "out")
    stamps = lambda: {name: (tmp_path / "out" / name / "mask.ome.tif").stat().st_mtime_ns for name in ("x", "x_2")}
    rows = lambda: pd.read_csv(tmp_path / "out" / "summary.csv")[["image", "folder"]].fillna("").apply(tuple, axis=1).tolist()
    assert eq(capsys, "predict", "A/x.png", "B/x.png", *fixed)[0] == 0
    made, found = stamps(), open_image(tmp_path / "out" / "x" / "mask.ome.tif").read_all()
    code, _, err = eq(capsys, "predict", "B/x.png", *fixed, "--resume")
    assert code == 0 and stamps() == made and rows() == [("B/x.png", "x_2")] and "1 results of an earlier run were left alone" in err, err
    full = [str(tmp_path / place / "x.png") for place in "BA"]
    assert eq(capsys, "predict", *full, *fixed, "--resume")[0] == 0 and stamps() == made  # absolute, and in another order
    assert rows() == list(zip(full, ("x_2", "x"), strict=True)) and verify_run(tmp_path / "out").ok
    monkeypatch.chdir(tmp_path / "B")
    assert eq(capsys, "predict", "x.png", *fixed, "--resume")[0] == 0 and stamps() == made and rows() == [("x.png", "x_2")]  # not the x.png that gave its name
    (tmp_path / "A" / "x.png").rename(tmp_path / "A" / "moved.png")
    assert eq(capsys, "predict", tmp_path / "A" / "moved.png", *fixed, "--resume")[0] == 0 and stamps() == made  # known by its content
    write_png(tmp_path / "A" / "x.png", blobs(64, 80, 3))
    assert eq(capsys, "predict", *full, *fixed, "--resume")[0] == 0
    assert stamps()["x"] > made["x"] and stamps()["x_2"] == made["x_2"]
    assert (open_image(tmp_path / "out" / "x" / "mask.ome.tif").read_all() != found).any()


def test_resume_with_an_image_that_became_unreadable(model, tmp_path, capsys):
    "It is one failed row, the result that it had stays, and the images behind it are done."
    paths = [write_png(tmp_path / f"{name}.png", blobs(64, 80, seed)) for seed, name in enumerate("abc")]
    fixed = ("--model", model, "--backend", "torch", "--out", tmp_path / "out")
    assert eq(capsys, "predict", *paths[:2], *fixed)[0] == 0
    paths[0].write_bytes(paths[0].read_bytes()[:500])
    code, out, err = eq(capsys, "predict", *paths, *fixed, "--resume")
    table = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert code == 1 and "2 of 3 images segmented" in out and table["status"].tolist() == ["failed", "done", "done"], err
    assert f"failed: {paths[0]}: " in err and (tmp_path / "out" / "a" / "mask.ome.tif").is_file()


def test_resume_needs_a_run(model, tmp_path, capsys):
    path = write_png(tmp_path / "a.png", blobs(64, 64))
    (tmp_path / "empty").mkdir()
    for more in ((), ("--out", tmp_path / "nowhere"), ("--out", tmp_path / "empty")):
        code, out, err = eq(capsys, "predict", path, "--model", model, *more, "--resume")
        assert (code, out) == (2, "") and "nothing to resume in" in err and "give --out the folder of the run" in err and err.count("\n") == 1, err
    assert not (tmp_path / "nowhere").exists() and not list((tmp_path / "empty").iterdir())


SMALL_DISK = "300k"


def test_full_disk(model, small_disk, tmp_path, capsys):
    path = write_png(tmp_path / "a.png", blobs(700, 700))
    code, out, err = eq(capsys, "predict", path, "--model", model, "--out", small_disk / "out", "--backend", "torch", "--probability")
    assert code == 2 and "disk full while writing" in err and "Traceback" not in err and out == "", err
    assert not (small_disk / "out" / "a").exists() and not list((small_disk / "out").glob(f"{TEMP_PREFIX}*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert eq(capsys, "predict", path, "--model", model, "--out", small_disk / "again", "--backend", "torch", "--probability")[0] == 0


# ---- memory ----------------------------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from eq.workflows.cli import main

def peak():  # of this program: ru_maxrss would count the test runner that it was forked from
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024

code = main(sys.argv[1:])
print("peak", peak())
sys.exit(code)
"""


def test_memory_does_not_grow_with_the_image(model, tmp_path):
    "Three times the rows, 100 Mpx in all: a mask alone would be 67 MB more, probabilities 268 MB."
    coarse = tmp_path / "coarse"
    net, meta = load_checkpoint(model)
    save_checkpoint(coarse, net, replace(meta, scale=16.0, px_size_um=None))
    peaks = {}
    for rows in (8 * 2048, 24 * 2048):  # both higher than one tile, which spans 8192 rows at this scale
        band = blobs(512, 2048, noise=0)
        write_ome_tiff_bands(tmp_path / f"{rows}.ome.tif", (band for _ in range(rows // 512)), TiffPlan(rows, 2048, np.uint8, 3))
        args = ["predict", tmp_path / f"{rows}.ome.tif", "--model", coarse, "--out", tmp_path / f"out{rows}", "--backend", "torch", "--device", "cpu"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, args)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks[rows] = int(done.stdout.split("peak")[-1])
    low, high = peaks.values()
    print(f"peak memory: {low} MB, {high} MB")
    assert high < 1.3 * low and high - low < 67, peaks


# ---- evaluate --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder, rows = tmp_path_factory.mktemp("cohort"), []
    for i in range(4):
        picture = blobs(96, 128, seed=i)
        write_png(folder / f"{i}.png", picture)
        mask = write_png(folder / f"{i}_mask.png", cv2.GaussianBlur(picture[..., 0], (0, 0), 4) > 130)
        rows.append({"image": str(folder / f"{i}.png"), "mask": str(mask), "mask_coding": "grey127", "subject": f"animal{i // 2}"})
    return save_cohort(Cohort(pd.DataFrame(rows), name="blobs", task="glom"), folder / "cohort.csv")


def test_evaluate_prints_writes_and_bars(model, cohort, tmp_path, capsys):
    args = ("evaluate", "--model", model, "--source", cohort, "--backend", "torch")
    code, out, err = eq(capsys, *args, "--out", tmp_path / "low", "--min", "dice=0.0", "--min", "detection=0")
    assert code == 0, err
    assert "blobs, all images: the network was trained on another source: 4 images, intervals over subject" in out
    assert ">= 0 reached" in out and "only 2 units" in out and out.strip().endswith(str(tmp_path / "low"))
    metrics = json.loads((tmp_path / "low" / "metrics.json").read_text())
    images = pd.read_csv(tmp_path / "low" / "images.csv")
    dice = 2 * images["tp"].sum() / (2 * images["tp"] + images["fp"] + images["fn"]).sum()
    assert metrics["metrics"]["dice"]["estimate"] == pytest.approx(dice)
    assert metrics["metrics"]["mean_dice"]["estimate"] == pytest.approx(images["dice"].mean())
    assert verify_run(tmp_path / "low").ok
    code, out, _ = eq(capsys, *args, "--out", tmp_path / "high", "--min", "dice=1.01", "--min", "recall=0")
    assert code == 1 and ">= 1.01 NOT REACHED" in out
    assert list(json.loads((tmp_path / "high" / "metrics.json").read_text())["below"]) == ["dice"]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--min", "dise=0.5"), "unknown metric 'dise'; did you mean 'dice'? choose from ['accuracy', 'detection'"),
        (("--min", "dice"), "valid: NAME=NUMBER"),
        (("--min", "dice=much"), "no number after ="),
        (("--part", "tset"), "did you mean 'test'?"),
        (("--source", "em_vnk"), "did you mean 'em_vnc'?"),
    ],
)
def test_evaluate_refuses(model, cohort, tmp_path, capsys, args, why):
    source = () if "--source" in args else ("--source", cohort)
    code, out, err = eq(capsys, "evaluate", "--model", model, *source, *args, "--out", tmp_path / "out")
    assert (code, out) == (2, "") and why in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_evaluate_lists_what_cannot_be_scored(model, cohort, tmp_path, capsys):
    table = pd.read_csv(cohort, dtype=str, keep_default_na=False)
    for column in ("image", "mask"):
        table[column] = [str(cohort.parent / p) if p else p for p in table[column]]
    write_png(tmp_path / "small.png", np.zeros((9, 9), np.uint8))
    table.loc[0, "mask"] = str(tmp_path / "small.png")
    bad = save_cohort(Cohort(table, name="blobs", task="glom"), tmp_path / "bad.csv")
    code, out, err = eq(capsys, "evaluate", "--model", model, "--source", bad, "--out", tmp_path / "out", "--backend", "torch")
    assert code == 1 and "3 images" in out and "mask is (9, 9), its image" in err


def test_masks_of_another_coding_are_refused(model, cohort, tmp_path, capsys):
    "A CSV by hand has no column `mask_coding`: 0 and 1 would be read as no object, and a network that finds nothing as perfect."
    rows = []
    for i in range(3):
        write_png(tmp_path / f"{i}.png", blobs(96, 128, seed=i))
        write_png(tmp_path / f"{i}_mask.png", np.kron(np.eye(12, 16), np.ones((8, 8))).astype(np.uint8) * np.uint8(i))
        rows.append({"image": f"{i}.png", "mask": f"{i}_mask.png"})
    pd.DataFrame(rows).to_csv(tmp_path / "by_hand.csv", index=False)
    args = ("evaluate", "--model", model, "--source", tmp_path / "by_hand.csv", "--backend", "torch")
    code, out, err = eq(capsys, *args, "--out", tmp_path / "out")
    assert code == 1 and "1 images" in out and err.count("failed: ") == 2  # the first mask is all zeros: empty in every coding
    assert "the mask holds 0, 1: 768 pixels from 1 to 127 would be lost" in err and "label (numbers are classes) or instances" in err
    pd.DataFrame(rows).assign(mask_coding="label").to_csv(tmp_path / "by_hand.csv", index=False)
    code, out, err = eq(capsys, *args, "--out", tmp_path / "told")
    assert code == 0 and "3 images" in out, err


@pytest.mark.parametrize(("task", "verb"), [("anomaly", "`eq evaluate anomaly`"), ("classify", "`eq classify predict`")])
def test_checkpoints_of_another_kind_are_refused(task, verb, cohort, tmp_path, capsys):
    net = create_autoencoder("unet", 64, 8, 0.25)
    save_checkpoint(tmp_path / task, net, replace(META, task=task, in_channels=1, mean=(0.5,), std=(0.25,), params={"network": {"latent": 8, "width": 0.25}}))
    for args in (("predict", cohort.parent / "0.png"), ("evaluate", "--source", cohort)):
        code, out, err = eq(capsys, *args, "--model", tmp_path / task, "--out", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", 1) and f"a checkpoint of task {task!r}" in err and verb in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_help_shows_an_example(capsys, verb):
    code, out, _ = eq(capsys, verb, "--help")
    assert code == 0 and "Examples:" in out and f"eq {verb} " in out
