"""`eq data convert` on every readable format: values, levels and pixel size survive, memory stays, and an interrupted batch goes on."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_readers import FORMATS

from eq.core.files import sha256_path
from eq.core.registry import EqError
from eq.data.convert import TARGETS, ConvertOptions, convert_image, pixels_sha256
from eq.data.io import TiffPlan, open_image, write_ome_tiff_bands
from eq.data.pyramid import Halver, cascade, halve, level_sizes
from eq.workflows.convert import MANIFEST, ConvertRequest, convert_images, read_manifest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("deep.png", "generic.tif", "channels.ome.tif", "slide.svs", "old.zarr", "ct.dcm", "slide.dcm", "volume.nii.gz")


@pytest.mark.parametrize("name", NAMES)
def test_formats_travel_without_loss(name: str, tmp_path: Path) -> None:
    "Source -> every lossless target that takes it -> back to OME-TIFF: the same values and the same micrometres."
    FORMATS[name][0](tmp_path / name)
    image = open_image(tmp_path / name)
    truth, taken = image.read_all(), []
    for to in ("tiff", "ome-tiff", "ome-zarr", "png"):
        out = tmp_path / f"out{TARGETS[to].suffix}"
        try:
            made = convert_image(image, out, to)
        except EqError as exc:
            assert "choose" in str(exc) and str(image.path) in str(exc) and not out.exists()
            continue
        taken.append(to)
        found = open_image(out)
        assert np.array_equal(found.read_all(), truth) and made.pixels_sha256 == pixels_sha256(image)
        assert found.px_size_um == (None if image.px_size_um is None else pytest.approx(image.px_size_um, rel=1e-6))
        back = convert_image(found, tmp_path / "back.ome.tif", "ome-tiff")
        assert back.pixels_sha256 == made.pixels_sha256 and back.px_size_um == pytest.approx(made.px_size_um)
    assert {"ome-tiff", "ome-zarr"} <= set(taken)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 3), st.sampled_from(["u1", "u2", "i2", "f4"]), st.data())
def test_levels_do_not_depend_on_how_rows_come(height: int, width: int, count: int, dtype: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    whole = (rng.random((height, width)) * 60_000).astype(dtype)
    cuts = sorted(data.draw(st.sets(st.integers(1, height), max_size=8)) | {0, height})
    halvers, got = [Halver() for _ in range(count)], {n: [] for n in range(1, count + 1)}
    for a, b in zip(cuts, cuts[1:], strict=False):
        cascade(whole[a:b], halvers, lambda n, rows: got[n].append(rows))
    cascade(None, halvers, lambda n, rows: got[n].append(rows))
    expected = whole
    for n in range(1, count + 1):
        expected = halve(expected)
        assert np.array_equal(np.concatenate(got[n]), expected)
    sizes = level_sizes(height * 30, width * 30)
    assert max(sizes[-1]) <= 512 and all(b == (-(-a[0] // 2), -(-a[1] // 2)) for a, b in zip(sizes, sizes[1:], strict=False))


MEMORY = """
import sys
from pathlib import Path
from eq.data.convert import convert_image
from eq.data.io import open_image

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024

import zarr, tifffile
image = open_image(sys.argv[1])
image.read(0, 0, 256, image.width)
before = peak()
convert_image(image, Path(sys.argv[2]), sys.argv[3])
print(peak() - before)
"""


def grown(source: Path, out: Path, to: str) -> int:
    done = subprocess.run([sys.executable, "-c", MEMORY, str(source), str(out), to], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.parametrize("to", ["ome-tiff", "ome-zarr"])
def test_memory_does_not_grow_with_the_height(to: str, tmp_path: Path) -> None:
    "Four times the rows, the same memory (within 60 MiB of noise)."
    band = np.random.default_rng(0).integers(0, 256, (512, 2048), dtype=np.uint8)
    peaks = []
    for rows in (2048, 8192):
        path = write_ome_tiff_bands(tmp_path / f"{rows}.ome.tif", (band for _ in range(rows // 512)), TiffPlan(rows, 2048, np.uint8, px_size_um=0.5))
        peaks.append(grown(path, tmp_path / f"out{rows}{TARGETS[to].suffix}", to))
    assert peaks[1] < peaks[0] + 60 and peaks[1] < 250, peaks


def test_a_killed_batch_goes_on_where_it_was(tmp_path: Path) -> None:
    "SIGKILL in the middle: nothing half-made stands under a name, and the second run makes only what is missing."
    band = np.random.default_rng(0).integers(0, 256, (512, 1024), dtype=np.uint8)
    for n in range(6):
        write_ome_tiff_bands(tmp_path / "in" / f"{n}.ome.tif", (band + np.uint8(n) for _ in range(6)), TiffPlan(3072, 1024, np.uint8, px_size_um=0.5))
    run = [sys.executable, "-m", "eq", "data", "convert", str(tmp_path / "in"), "--to", "ome-zarr", "--out", str(tmp_path / "out"), "--quiet"]
    process = subprocess.Popen(run, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    waited = time.monotonic()
    while process.poll() is None and time.monotonic() - waited < 400:
        rows = read_manifest(tmp_path / "out") if (tmp_path / "out").is_dir() else {}
        if len(rows) >= 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {row["output"]: row["out_sha256"] for row in read_manifest(tmp_path / "out").values()}
    for path in (tmp_path / "out").glob("*.ome.zarr"):
        assert open_image(path).height == 3072
    assert all(sha256_path(tmp_path / "out" / name) == digest for name, digest in done.items())
    for path in (tmp_path / "out").glob("*.ome.zarr"):  # finished, but killed before the manifest knew
        if path.name not in done:
            os.rename(path, tmp_path / f"moved-{path.name}")
    again = convert_images(ConvertRequest((tmp_path / "in",), "ome-zarr", tmp_path / "out", quiet=True))
    assert again == {"done": 6 - len(done), "kept": len(done), "failed": 0}
    for n in range(6):
        assert np.array_equal(open_image(tmp_path / "out" / f"{n}.ome.zarr").read(1000, 0, 24, 1024), np.roll(band, -488, axis=0)[:24] + np.uint8(n))


def test_the_command(tmp_path: Path) -> None:
    FORMATS["volume.nii.gz"][0](tmp_path / "ct.nii.gz")
    FORMATS["generic.tif"][0](tmp_path / "slide.svs")
    (tmp_path / "bad.svs").write_text("no slide")
    run = [sys.executable, "-m", "eq", "data", "convert", *(str(tmp_path / n) for n in ("ct.nii.gz", "slide.svs", "bad.svs"))]
    done = subprocess.run([*run, "--to", "jpeg", "--out", str(tmp_path / "out"), "--quiet"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr
    assert "1 converted, 0 kept, 3 failed" in done.stdout and "JPEG cannot hold grey pixels of type int16" in done.stderr
    rows = read_manifest(tmp_path / "out")
    assert open_image(tmp_path / "out" / "slide.jpg").px_size_um == pytest.approx(0.25) and (tmp_path / "out" / MANIFEST).is_file()
    assert {row["status"] for row in rows.values()} == {"done", "failed"}
    done = subprocess.run([*run[:5], str(tmp_path / "slide.svs"), "--to", "gif", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown target format 'gif'" in done.stderr and done.stderr.count("\n") == 1


def test_what_a_folder_holds_besides_is_told(tmp_path: Path) -> None:
    for name in ("a.tif", "sub/b.tif"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        FORMATS["generic.tif"][0](tmp_path / "in" / name)
    for name in ("c.czi", "d.nd2", "e.jp2"):
        (tmp_path / "in" / name).write_bytes(b"x")
    run = [sys.executable, "-m", "eq", "data", "convert", str(tmp_path / "in"), "--to", "png", "--out", str(tmp_path / "out"), "--quiet"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "1 converted, 0 kept, 0 failed, 4 left out" in done.stdout, done.stderr
    assert [line.split(": ")[1].split("/")[-1] for line in done.stderr.splitlines()] == ["c.czi", "d.nd2", "e.jp2", "sub"]
    rows = read_manifest(tmp_path / "out")
    assert sorted(row["status"] for row in rows.values()) == ["done"] + ["left out"] * 4 and all(row["note"] for row in rows.values() if row["status"] != "done")


def test_labels_keep_their_numbers_at_every_level(tmp_path: Path) -> None:
    labels = np.kron(np.arange(1, 101, dtype=np.int32).reshape(10, 10), np.ones((110, 110), np.int32))
    path = write_ome_tiff_bands(tmp_path / "l.ome.tif", iter([labels]), TiffPlan(1100, 1100, np.int32))
    for to in ("ome-tiff", "ome-zarr"):
        convert_image(open_image(path), tmp_path / f"out{TARGETS[to].suffix}", to, ConvertOptions(labels=True))
        image = open_image(tmp_path / f"out{TARGETS[to].suffix}")
        for number, level in enumerate(image.levels):
            assert set(np.unique(image.read(0, 0, level.height, level.width, number))) == set(range(1, 101))
