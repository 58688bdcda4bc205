"""What image files may do to a program: damage of every kind, bombs, full disks, kill -9, files that change while they are read."""
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image as PilImage

from eq.core.registry import EqError
from eq.data.annotations import labels_to_geojson, read_geojson, write_geojson
from eq.data.cohort import Cohort
from eq.data.io import TiffPlan, is_image_path, open_image, write_ome_tiff, write_ome_tiff_bands, write_png
from eq.data.mask import read_labels, read_mask, validate_pairs
from eq.data.patch import plan_tiles, stitch

Y, X = np.mgrid[:120, :150]
GREY = ((Y * 3 + X) % 256).astype(np.uint8)
RGB = np.dstack([GREY, 255 - GREY, (Y % 256).astype(np.uint8)])
DEEP = GREY.astype(np.uint16) * 200
STACK = np.stack([np.stack([DEEP // i] * 3) for i in (1, 2)])  # Z, C, Y, X
ZIP = {"compression": "zlib", "tile": (32, 32)}
NOISE = np.random.default_rng(0).integers(0, 256, (512, 512), dtype=np.uint8)
ROOT = Path(__file__).resolve().parent.parent

WRITERS: dict[str, Callable[[Path], object]] = {
    "grey.png": lambda p: write_png(p, GREY),
    "rgb.png": lambda p: write_png(p, RGB),
    "deep.png": lambda p: write_png(p, DEEP),
    "deep_rgb.png": lambda p: cv2.imwrite(str(p), RGB.astype(np.uint16) * 200),
    "palette.png": lambda p: PilImage.fromarray(RGB).quantize(16).save(p),
    "rgb.jpg": lambda p: PilImage.fromarray(RGB).save(p),
    "plain.tif": lambda p: tifffile.imwrite(p, RGB, photometric="rgb"),
    "tiled.tif": lambda p: tifffile.imwrite(p, RGB, photometric="rgb", **ZIP),
    "strips.tif": lambda p: tifffile.imwrite(p, GREY, compression="zlib", rowsperstrip=20),
    "predicted.tif": lambda p: tifffile.imwrite(p, RGB, photometric="rgb", predictor=True, **ZIP),
    "big.tif": lambda p: tifffile.imwrite(p, GREY, bigtiff=True, byteorder=">", **ZIP),
    "real.tif": lambda p: tifffile.imwrite(p, (GREY / 7).astype(np.float32), **ZIP),
    "bits.tif": lambda p: tifffile.imwrite(p, GREY > 99),
    "stack.ome.tif": lambda p: tifffile.imwrite(p, STACK, ome=True, metadata={"axes": "ZCYX"}),
    "ours.ome.tif": lambda p: write_ome_tiff(p, RGB, 0.5),
    "imagej.tif": lambda p: tifffile.imwrite(p, STACK, imagej=True, metadata={"axes": "ZCYX"}),
    "lzw.tif": lambda p: PilImage.fromarray(RGB).save(p, compression="tiff_lzw"),
    "jpeg.tif": lambda p: PilImage.fromarray(RGB).save(p, compression="jpeg"),
    "fax.tif": lambda p: PilImage.fromarray(GREY > 99).save(p, compression="group4"),
}
CHECKED = [n for n in WRITERS if n.endswith(".png")]  # every byte that matters stands under a checksum


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("sound")
    for name, write in WRITERS.items():
        write(folder / name)
    return {name: (folder / name).read_bytes() for name in WRITERS}


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    "Cut short, bits flipped, header overwritten, a hole of zeros, or bytes overwritten everywhere."
    out, kind = bytearray(data), int(rng.integers(5))
    if kind == 0:
        return bytes(out[: int(rng.integers(1, len(out)))])
    if kind == 1:
        out[int(rng.integers(len(out)))] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        for _ in range(int(rng.integers(1, 6))):
            out[int(rng.integers(min(400, len(out))))] = int(rng.integers(256))
    elif kind == 3:
        at = int(rng.integers(len(out)))
        out[at : at + 64] = bytes(len(out[at : at + 64]))
    else:
        for _ in range(int(rng.integers(1, 30))):
            out[int(rng.integers(len(out)))] = int(rng.integers(256))
    return bytes(out)


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files_are_refused_by_name_or_read(name: str, sound: dict[str, bytes], tmp_path: Path) -> None:
    "Nothing but EqError, in one line that names the file, in less than 5 seconds. A PNG is never silently different."
    rng, path, whole = np.random.default_rng(sum(name.encode())), tmp_path / name, sound[name]
    path.write_bytes(whole)
    truth = open_image(path).read_all()
    refused = 0
    for _ in range(55):
        path.write_bytes(damage(whole, rng))
        start = time.process_time()
        try:
            image = open_image(path)
            image.rgb(0, 0, min(256, image.height), min(256, image.width))
            if name in CHECKED:
                assert np.array_equal(image.read_all(), truth)
        except EqError as exc:
            refused += 1
            assert str(path) in str(exc) and "\n" not in str(exc) and len(str(exc)) < 600, exc
        assert time.process_time() - start < 5
    assert refused >= 8, f"only {refused} of 55 damaged files were noticed"


@pytest.mark.parametrize("name", WRITERS)
def test_half_a_file_is_always_refused(name: str, sound: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / name
    for share in (0.02, 0.3, 0.5, 0.8, 0.97):
        path.write_bytes(sound[name][: int(len(sound[name]) * share)])
        with pytest.raises(EqError, match="truncated|damaged|the content is no"):
            open_image(path).read_all()


# ---------------------------------------------------------------- bombs


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_declares(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def tiff_that_inflates(path: Path, strips: bytes, side: int) -> None:
    "A deflated TIFF of side x side pixels whose single strip inflates to something else."
    tifffile.imwrite(path, np.zeros((side, side), np.uint8), compression="zlib", rowsperstrip=side)
    with tifffile.TiffFile(path) as tif:
        places = {code: tif.pages[0].tags[code].valueoffset for code in (273, 279)}
    data = bytearray(path.read_bytes())
    data[places[273] : places[273] + 4] = struct.pack("<I", len(data))
    data[places[279] : places[279] + 4] = struct.pack("<I", len(strips))
    path.write_bytes(bytes(data) + strips)


TRY = """
import sys
from eq.core.registry import EqError
from eq.data.io import open_image

def peak():  # of this program: ru_maxrss would count the test runner that it was forked from
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024

def attempt(path):
    try:
        image = open_image(path)
        image.rgb(0, 0, min(64, image.height), min(64, image.width))
        return "read"
    except EqError as exc:
        return str(exc)
"""


def lines_of(code: str, *args: object) -> list[str]:
    "What Python code prints in a process of its own, whose peak memory is its own too."
    done = subprocess.run([sys.executable, "-c", TRY + code, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()


def test_bombs_are_refused_before_they_go_off(tmp_path: Path) -> None:
    (tmp_path / "huge.png").write_bytes(png_that_declares(60_000, 60_000))
    (tmp_path / "wide.png").write_bytes(png_that_declares(2**31 - 1, 2**31 - 1))
    tiff_that_inflates(tmp_path / "inflates.tif", zlib.compress(bytes(700 * 2**20), 1), 1000)
    tifffile.imwrite(tmp_path / "strip.tif", np.zeros((64, 64), np.uint8), compression="zlib", rowsperstrip=64)
    data = bytearray((tmp_path / "strip.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "strip.tif") as tif:
        for code in (256, 257, 278):
            tag = tif.pages[0].tags[code]
            data[tag.valueoffset : tag.valueoffset + 2] = struct.pack("<H", 65_000)
    (tmp_path / "strip.tif").write_bytes(data)
    jpeg = bytearray(WRITERS["rgb.jpg"](tmp_path / "x.jpg") or (tmp_path / "x.jpg").read_bytes())
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_000, 65_000)
    (tmp_path / "huge.jpg").write_bytes(jpeg)
    expected = {
        "huge.png": "declares more than the 179 Mpx",
        "wide.png": "cannot be decoded|declares more than",
        "inflates.tif": "inflates to more than the 1000000 bytes",
        "strip.tif": "cannot hold|GiB",
        "huge.jpg": "declares more than the 179 Mpx",
    }
    said = lines_of("for path in sys.argv[1:]: print(peak(), attempt(path))", *(tmp_path / name for name in expected))
    for (name, text), line in zip(expected.items(), said, strict=True):
        assert any(t in line for t in text.split("|")) and name in line, line
        assert int(line.split()[0]) < 500, f"{name}: {line}"


def test_a_corner_of_a_large_image_costs_a_corner(tmp_path: Path) -> None:
    "8192 rows of 16384: the corner decodes a few tiles; walking over all of it keeps a bounded number of them."
    plan = TiffPlan(8192, 16_384, np.uint8, px_size_um=0.25)
    band = np.broadcast_to(np.arange(16_384).astype(np.uint8)[None, :], (512, 16_384))
    write_ome_tiff_bands(tmp_path / "large.ome.tif", (band for _ in range(16)), plan)
    code = """
print(peak())
print(attempt(sys.argv[1]), peak())
image = open_image(sys.argv[1])
total = sum(int(image.rgb(y, x, 512, 512)[7, 7, 1]) for y in range(0, 8192, 512) for x in range(0, 16384, 512))
print(total, peak())
"""
    base, corner, walk = (line.split() for line in lines_of(code, tmp_path / "large.ome.tif"))
    assert corner[0] == "read" and int(corner[1]) - int(base[0]) < 40, (base, corner)
    assert int(walk[0]) == 16 * sum((x + 7) % 256 for x in range(0, 16_384, 512))
    assert int(walk[1]) - int(base[0]) < 110, (base, walk)


# ---------------------------------------------------------------- other things users have


def test_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "empty.tif").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    write_png(tmp_path / "real.png", GREY)
    (tmp_path / "png.jpg").write_bytes((tmp_path / "real.png").read_bytes())
    (tmp_path / "folder.tif").mkdir()
    (tmp_path / "gone.tif").symlink_to(tmp_path / "nowhere.tif")
    for name, text in {
        "empty.tif": "is empty (0 bytes)",
        "text.png": "the content is no png",
        "png.jpg": "the suffix says jpeg, the content is png; rename it to png.png",
        "folder.tif": "is a folder",
        "gone.tif": "no such file",
        "none.tif": "no such file",
        "x.svs": "no such file",
    }.items():
        with pytest.raises(EqError) as caught:
            open_image(tmp_path / name)
        assert text in str(caught.value) and name in str(caught.value)


def test_nan_constant_and_inverted_images(tmp_path: Path) -> None:
    for name, values in {"nan": np.full((8, 8), np.nan, np.float32), "inf": np.where(X[:8, :8] == 3, np.inf, 1).astype(np.float32)}.items():
        with pytest.raises(EqError, match="NaN or infinite"):
            open_image(write_ome_tiff(tmp_path / f"{name}.ome.tif", values)).rgb()
    for dtype in (np.uint8, np.uint16, np.int32, np.float32, np.float64):
        picture = open_image(write_ome_tiff(tmp_path / "flat.ome.tif", np.full((8, 8), 7, dtype))).rgb()
        assert picture.dtype == np.uint8 and (picture == picture[0, 0]).all()
    tifffile.imwrite(tmp_path / "white.tif", GREY, photometric="miniswhite")
    image = open_image(tmp_path / "white.tif")
    assert np.array_equal(image.read_all(), GREY) and np.array_equal(image.rgb()[..., 0], 255 - GREY)


@pytest.mark.parametrize("px", [0, -1, float("nan"), float("inf"), "0.25 um"])
def test_impossible_pixel_sizes(px: object, tmp_path: Path) -> None:
    with pytest.raises(EqError, match="expected a positive number"):
        open_image(write_png(tmp_path / "a.png", GREY), px_size_um=px)  # type: ignore[arg-type]


def test_every_bad_pair_is_listed_at_once(tmp_path: Path) -> None:
    "Ninety pairs, sixty of them bad in six ways: sixty problems, none hides another."
    mask = (GREY > 128) * np.uint8(255)
    rows = []
    for i in range(90):
        image, where = tmp_path / f"{i}.png", tmp_path / f"{i}_mask.png"
        write_png(image, GREY)
        write_png(where, mask)
        kind = i % 9
        if kind == 0:
            image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
        elif kind == 1:
            write_png(where, mask[:50])
        elif kind == 2:
            write_png(where, mask * 0)
        elif kind == 3:
            where.unlink()
        elif kind == 4:
            write_png(image, GREY * 0 + 9)
        elif kind == 5:
            image = write_ome_tiff(tmp_path / f"{i}.ome.tif", np.where(X == 5, np.nan, Y).astype(np.float32))
        rows.append({"image": str(image), "mask": str(where), "mask_coding": "grey127"})
    found = validate_pairs(Cohort(table=pd.DataFrame(rows), name="ninety"))
    problems = ["unreadable image", "size mismatch", "empty mask", "unreadable mask", "constant image", "NaN image"]
    assert [p.problem for p in found] == problems * 10
    assert all(Path(p.image).stem.split(".")[0] == str(i) for p, i in zip(found, [i for i in range(90) if i % 9 < 6], strict=True))


def test_many_images_open_at_once(tmp_path: Path) -> None:
    "An opened image holds no file: a cohort may be larger than the number of files a process may open."
    for i in range(80):
        tifffile.imwrite(tmp_path / f"{i}.tif", GREY, **ZIP)
        write_png(tmp_path / f"{i}.png", GREY)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        images = [open_image(p) for p in sorted(tmp_path.iterdir())]
        assert all(np.array_equal(image.read(3, 4, 50, 60), GREY[3:53, 4:64]) for image in images)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_threads_share_an_image(tmp_path: Path) -> None:
    image = open_image(write_ome_tiff(tmp_path / "n.ome.tif", np.tile(NOISE, (4, 4))))
    tiles = plan_tiles(2048, 2048, 300, 40) * 2
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda t: image.read(t.y, t.x, t.h, t.w), tiles))
    assert all(np.array_equal(part, np.tile(NOISE, (4, 4))[t.slices]) for t, part in zip(tiles, parts, strict=True))


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "tile": (32, 32)}], ids=["plain", "tiled"])
def test_a_file_that_shrinks_while_it_is_read(options: dict, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, NOISE, **options)
    image = open_image(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(EqError, match="became shorter while it was read"):
        image.read(400, 0, 100, 512)


def test_a_foreign_multi_file_set_is_not_followed(tmp_path: Path) -> None:
    "OME-XML may name other files; only the one that was asked for is opened."
    tifffile.imwrite(tmp_path / "other.ome.tif", GREY, ome=True)
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" Type="uint8" '
        'DimensionOrder="XYCZT" SizeX="150" SizeY="120" SizeC="2" SizeZ="1" SizeT="1"><TiffData IFD="0" FirstC="0"/><TiffData IFD="0" FirstC="1">'
        '<UUID FileName="other.ome.tif">urn:uuid:00000000-0000-0000-0000-000000000000</UUID></TiffData></Pixels></Image></OME>'
    )
    tifffile.imwrite(tmp_path / "set.ome.tif", GREY, description=xml, metadata=None)
    try:
        assert open_image(tmp_path / "set.ome.tif").channels == 1
    except EqError as exc:
        assert "set.ome.tif" in str(exc)


# ---------------------------------------------------------------- writing


SMALL_DISK = "256k"
BANDS = TiffPlan(2048, 512, np.uint8)
OUTPUTS: dict[str, Callable[[Path], object]] = {
    "a.png": lambda p: write_png(p, np.tile(NOISE, (2, 1))),
    "a.ome.tif": lambda p: write_ome_tiff(p, np.tile(NOISE, (4, 1))),
    "b.ome.tif": lambda p: write_ome_tiff_bands(p, (NOISE for _ in range(4)), BANDS),
    "a.geojson": lambda p: write_geojson(p, labels_to_geojson((NOISE[:192, :192] > 100).astype(np.int32))),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_full_disk(name: str, small_disk: Path) -> None:
    "One clear error, the previous version stays whole, and it works again once there is room."
    path = small_disk / name
    path.write_bytes(b"previous version")
    with pytest.raises(EqError, match="disk full while writing"):
        OUTPUTS[name](path)
    assert path.read_bytes() == b"previous version" and os.listdir(small_disk) == [name]
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    OUTPUTS[name](path)
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("name", OUTPUTS)
def test_unwritable_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EqError, match="cannot write"):
        OUTPUTS[name](tmp_path / "file" / name)


def test_kill_9_while_a_prediction_is_streamed(tmp_path: Path) -> None:
    "Nothing stands under the final name, and what is left over is not taken for an image."
    code = """
import sys, time
import numpy as np
from eq.data.io import TiffPlan, write_ome_tiff_bands
def bands():
    for i in range(100):
        yield np.full((512, 2048), i, np.uint8)
        print("band", flush=True)
        time.sleep(0.05)
write_ome_tiff_bands(sys.argv[1], bands(), TiffPlan(51200, 2048))
"""
    for stop_after in (1, 6):
        path = tmp_path / f"{stop_after}.ome.tif"
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(stop_after):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not path.exists()
    assert not any(is_image_path(p) for p in tmp_path.iterdir())


def test_stitched_bands_stream_into_a_file(tmp_path: Path) -> None:
    "Tiles in, tiles blended, rows out, read back: the same image."
    image, plan = np.tile(NOISE, (2, 3))[:1000, :1300], plan_tiles(1000, 1300, 256, 32)
    bands = (band.values.astype(np.uint8) for band in stitch(plan, (image[t.slices] for t in plan)))
    path = write_ome_tiff_bands(tmp_path / "s.ome.tif", bands, TiffPlan(1000, 1300, np.uint8, px_size_um=0.25))
    assert np.array_equal(open_image(path).read_all(), image) and open_image(path).px_size_um == 0.25


# ---------------------------------------------------------------- masks and annotations


def test_damaged_annotations(tmp_path: Path) -> None:
    labels = read_labels(write_png(tmp_path / "l.png", ((Y // 30) * 5 + X // 30 + 1).astype(np.uint8)))
    path = write_geojson(tmp_path / "a.geojson", labels_to_geojson(labels))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    assert np.array_equal(read_geojson(path, *labels.shape), labels)
    refused = 0
    for _ in range(300):
        path.write_bytes(damage(whole, rng))
        try:
            found = read_geojson(path, *labels.shape)
            assert found.shape == labels.shape and found.dtype == np.int32
        except EqError as exc:
            refused += 1
            assert str(path) in str(exc) and "\n" not in str(exc)
    assert refused > 100
    for text in ("[]", "{}", "null", "3", '{"features": 3}', '{"type": "FeatureCollection", "features": [null]}', json.dumps([[1]]), "[" * 100_000):
        path.write_text(text)
        try:
            assert not read_geojson(path, 4, 4).any()
        except EqError as exc:
            assert str(path) in str(exc)


def test_masks_of_the_wrong_coding_say_so(tmp_path: Path) -> None:
    red = np.dstack([(GREY > 128) * np.uint8(255), GREY * 0, GREY * 0])
    write_png(tmp_path / "i.png", GREY)
    write_png(tmp_path / "m.png", red)
    row = {"image": str(tmp_path / "i.png"), "mask": str(tmp_path / "m.png")}
    (problem,) = validate_pairs(Cohort(table=pd.DataFrame([row | {"mask_coding": "grey127"}]), name="x"))
    assert problem.problem == "unreadable mask" and "holds 0, (255, 0, 0)" in problem.detail and "for example red127" in problem.detail
    assert validate_pairs(Cohort(table=pd.DataFrame([row | {"mask_coding": "red127"}]), name="x")) == []
    (problem,) = validate_pairs(Cohort(table=pd.DataFrame([row | {"mask_coding": "red"}]), name="x"))
    assert "did you mean 'red127'?" in problem.detail
    with pytest.raises(EqError, match="neither black, green nor red"):
        read_mask(write_png(tmp_path / "b.png", RGB | np.uint8(128)), "glom_viable_sclerosed")
