"""Every reader, on a real or generated file of its format, through the same door and the same checks; and what damaged or lying files may do."""
import gzip
import json
import math
import pickle
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image as PilImage

from eq.core.registry import EqError
from eq.data.io import READERS, Image, find_images, open_image, write_ome_tiff, write_png
from eq.data.pyramid import write_tiff_pyramid, write_zarr_pyramid
from eq.data.write import TiffPlan

ROOT = Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (700, 900, 3), dtype=np.uint8)
DEEP = RGB[..., 0].astype(np.uint16) * 200
HU = RGB[..., 0].astype(np.int16) * 10 - 1000


def check_reader(path: Path, expected: dict[str, Any], truth: np.ndarray | None = None, part: int | None = None) -> Image:
    """The one check of all readers.

    Region equals the crop of a larger read, at every level and at odd places; levels shrink as their downsample says; pixel size, type and
    kind are as expected; what leaves the image is an error that names the file; pickling and opening again give the same image.
    `part` reads a corner of so many pixels instead of the whole, for files that take long to decode.
    """
    image = open_image(path)
    for name, value in expected.items():
        found = getattr(image, name, getattr(image.layout, name, None))
        assert found == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), f"{path.name}: {name} is {found}, expected {value}"
    assert image.levels[0].downsample == 1 and (image.levels[0].height, image.levels[0].width) == (image.height, image.width)
    for number, level in enumerate(image.levels):
        assert level.downsample == pytest.approx(image.width / level.width, rel=0.05)
        h, w = (min(n, part or n) for n in (level.height, level.width))
        whole = image.read(0, 0, h, w, number)
        assert whole.dtype == image.dtype and whole.shape[:2] == (h, w) and whole.ndim == len(image.axes)
        for y, x, rows, columns in ((0, 0, 1, 1), (h - 1, w - 1, 1, 1), (h // 3, w // 5, h // 2, w // 7 + 1), (h // 2 - 1, 0, 3, w)):
            assert np.array_equal(image.read(y, x, rows, columns, number), whole[y : y + rows, x : x + columns]), f"{path.name}: level {number} at {y}, {x}"
        assert image.rgb(0, 0, min(h, 9), min(w, 7), number).shape == (min(h, 9), min(w, 7), 3)
        for region in ((0, 0, level.height + 1, 1), (-1, 0, 2, 2), (level.height - 1, level.width, 1, 1), (0, 0, 0, 1)):
            with pytest.raises(EqError, match="does not lie inside") as caught:
                image.read(*region, number)
            assert str(path) in str(caught.value)
        if number == 0 and truth is not None:
            assert np.array_equal(whole, truth[:h, :w])
    with pytest.raises(EqError, match=f"level {len(image.levels)} does not exist"):
        image.read(0, 0, 1, 1, len(image.levels))
    with pytest.raises(EqError, match=f"plane {image.planes} does not exist"):
        open_image(path, plane=image.planes)
    again = pickle.loads(pickle.dumps(image))  # noqa: S301  our own
    corner = (image.height // 2, image.width // 2, 2, 3)
    assert np.array_equal(again.read(*corner), image.read(*corner)) and again.levels == image.levels
    assert open_image(path, px_size_um=0.7).px_size_um == 0.7
    if image.planes > 1:
        last = open_image(path, plane=image.planes - 1)
        assert np.array_equal(last.read(0, 0, 2, 2), image.at_plane(image.planes - 1).read(0, 0, 2, 2))
        assert pickle.loads(pickle.dumps(last)).plane == image.planes - 1  # noqa: S301
    return image


# ---------------------------------------------------------------- one file of every format


def bands_of(values: np.ndarray) -> Callable:
    return lambda: iter([values[:300], values[300:]])


def write_generic(path: Path, **options: Any) -> None:
    with tifffile.TiffWriter(path) as writer:
        for k in (1, 2, 4):
            tags = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER", "metadata": None, "photometric": "rgb"}
            writer.write(RGB[::k, ::k].copy(), subfiletype=int(k > 1), tile=(128, 128), **tags, **({"compression": "zlib"} | options))


def write_dicom(path: Path, frames: np.ndarray, **changes: Any) -> None:
    "Uncompressed: (n, rows, columns) or (n, rows, columns, 3)."
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    d, colour = Dataset(), frames.ndim == 4
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID, d.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    d.SOPClassUID, d.SeriesInstanceUID, d.NumberOfFrames = CTImageStorage, "1.2.3", len(frames)
    d.Rows, d.Columns, d.SamplesPerPixel = *frames.shape[1:3], 3 if colour else 1
    d.PhotometricInterpretation, bits = "RGB" if colour else "MONOCHROME2", frames.dtype.itemsize * 8
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = bits, bits, bits - 1, int(frames.dtype.kind == "i")
    if colour:
        d.PlanarConfiguration = 0
    for name, value in changes.items():
        setattr(d, name, value)
    d.PixelData = frames.tobytes() + bytes(frames.nbytes % 2)
    d["PixelData"].VR = "OW" if bits > 8 else "OB"
    path.parent.mkdir(exist_ok=True)
    d.save_as(path, enforce_file_format=True)


WSI = "1.2.840.10008.5.1.4.1.1.77.1.6"


def write_wsi(path: Path, values: np.ndarray, number: int, spacing: float, tile: int = 128) -> None:
    from pydicom.dataset import Dataset

    h, w = values.shape[:2]
    full = np.pad(values, [(0, -h % tile), (0, -w % tile), (0, 0)])
    frames = full.reshape(full.shape[0] // tile, tile, full.shape[1] // tile, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    measures, group = Dataset(), Dataset()
    measures.PixelSpacing = [spacing / 1000, spacing / 1000]
    group.PixelMeasuresSequence = [measures]
    size = {"TotalPixelMatrixRows": h, "TotalPixelMatrixColumns": w, "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]}
    own = {"SOPClassUID": WSI, "DimensionOrganizationType": "TILED_FULL", "InstanceNumber": number, "SharedFunctionalGroupsSequence": [group]}
    write_dicom(path, np.ascontiguousarray(frames), **size, **own)


def write_series(folder: Path) -> None:
    for n, name in ((1, "x"), (0, "y.dcm"), (2, "a")):
        place = {"PixelSpacing": [0.5, 0.5], "ImagePositionPatient": [0, 0, n * 3.0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        write_dicom(folder / name, (HU + n)[None], RescaleSlope=1, RescaleIntercept=-24, **place)


def write_nifti(path: Path) -> None:
    import nibabel

    volume = np.stack([HU.T, HU.T + 1], axis=2)
    image = nibabel.Nifti1Image(volume, np.diag([0.7, 0.7, 2, 1]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def write_zarr2(path: Path) -> None:
    import zarr

    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    sets = [{"path": f"s{k}", "coordinateTransformations": [{"type": "scale", "scale": [50, 4.0 * 2**k, 4.0 * 2**k]}]} for k in range(2)]
    group = zarr.open_group(str(path), mode="w", zarr_format=2, attributes={"multiscales": [{"version": "0.4", "axes": axes, "datasets": sets}]})
    for k in range(2):
        values = np.stack([DEEP, DEEP + 1])[:, :: 2**k, :: 2**k]
        key = {"name": "v2", "separator": "/"}
        group.create_array(f"s{k}", shape=values.shape, chunks=(1, 100, 128), dtype="uint16", chunk_key_encoding=key)[:] = values


PLAN = TiffPlan(700, 900, np.uint8, 3, px_size_um=0.25)
PYRAMID = [(700, 900), (350, 450)]

# name: how it is written, what is expected, the values of the full resolution (None where compression loses some)
FORMATS: dict[str, tuple[Callable[[Path], object], dict[str, Any], np.ndarray | None]] = {
    "rgb.png": (lambda p: PilImage.fromarray(RGB).save(p, dpi=(101_600, 101_600)), {"px_size_um": 0.25, "kind": "rgb"}, RGB),
    "deep.png": (lambda p: write_png(p, DEEP), {"px_size_um": None, "kind": "grey"}, DEEP),
    "rgb.jpg": (lambda p: PilImage.fromarray(RGB).save(p, quality=95), {"px_size_um": None, "kind": "rgb"}, None),
    "plain.tif": (lambda p: tifffile.imwrite(p, DEEP, resolution=(40_000, 40_000), resolutionunit="CENTIMETER"), {"px_size_um": 0.25}, DEEP),
    "big.btf": (lambda p: tifffile.imwrite(p, DEEP, bigtiff=True, tile=(64, 64), compression="zlib"), {"kind": "grey"}, DEEP),
    "lzw.tif": (lambda p: PilImage.fromarray(RGB).save(p, compression="tiff_lzw"), {"kind": "rgb"}, RGB),
    "generic.tif": (write_generic, {"px_size_um": 0.25, "kind": "rgb"}, RGB),
    "jpeg.tif": (lambda p: write_generic(p, compression="jpeg"), {"px_size_um": 0.25, "kind": "rgb"}, None),
    "jp2.tif": (lambda p: tifffile.imwrite(p, DEEP, tile=(256, 256), compression="jpeg2000"), {"kind": "grey"}, DEEP),
    "ours.ome.tif": (lambda p: write_ome_tiff(p, RGB, 0.25), {"px_size_um": 0.25, "px_size_source": "ome-xml"}, RGB),
    "pyramid.ome.tif": (lambda p: write_tiff_pyramid(p, bands_of(RGB), PLAN), {"px_size_um": 0.25}, RGB),
    "channels.ome.tif": (
        lambda p: write_tiff_pyramid(p, bands_of(RGB.astype(np.uint16)), TiffPlan(700, 900, np.uint16, 3)), {"kind": "channels"}, RGB.astype(np.uint16)
    ),
    "stack.ome.tif": (
        lambda p: tifffile.imwrite(p, np.stack([DEEP, DEEP + 1]), ome=True, compression="zlib", metadata={"axes": "ZYX"}), {"planes": 2}, DEEP
    ),
    "slide.svs": (write_generic, {"px_size_um": 0.25, "px_size_source": "openslide generic-tiff", "kind": "rgb"}, RGB),
    "new.ome.zarr": (lambda p: write_zarr_pyramid(p, bands_of(RGB), PLAN, kind="rgb"), {"px_size_um": 0.25, "px_size_source": "ome-zarr"}, RGB),
    "old.zarr": (write_zarr2, {"px_size_um": 0.004, "planes": 2, "kind": "grey"}, DEEP),
    "ct.dcm": (lambda p: write_dicom(p, HU[None], PixelSpacing=[0.7, 0.7]), {"px_size_um": 700.0, "kind": "grey"}, HU),
    "cine.dcm": (lambda p: write_dicom(p, np.stack([RGB, RGB[::-1]])), {"planes": 2, "kind": "rgb", "px_size_um": None}, RGB),
    "series": (write_series, {"planes": 3, "px_size_um": 500.0, "dtype": np.dtype("int32"), "plane": 0}, HU.astype(np.int32) - 24),
    "slide.dcm": (lambda p: write_wsi(p, RGB, 1, 0.5), {"px_size_um": 0.5, "kind": "rgb"}, RGB),
    "wsi": (
        lambda p: [write_wsi(p / f"{k}.dcm", np.ascontiguousarray(RGB[::k, ::k]), k, 0.5 * k) for k in (2, 1)], {"px_size_um": 0.5, "kind": "rgb"}, RGB
    ),
    "volume.nii": (write_nifti, {"planes": 2, "px_size_um": 700.0, "kind": "grey"}, HU),
    "volume.nii.gz": (write_nifti, {"planes": 2, "px_size_um": 700.0, "kind": "grey"}, HU),
}  # fmt: skip
LEVELS = {"generic.tif": 3, "jpeg.tif": 3, "slide.svs": 3, "pyramid.ome.tif": 2, "channels.ome.tif": 2, "new.ome.zarr": 2, "old.zarr": 2, "wsi": 2}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    for name, (write, _, _) in FORMATS.items():
        write(folder / name)
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_every_reader_passes_the_same_check(name: str, shelf: Path) -> None:
    _, expected, truth = FORMATS[name]
    size = {"height": 700, "width": 900, **({} if truth is None else {"dtype": truth.dtype})}
    image = check_reader(shelf / name, size | expected, truth)
    assert len(image.levels) == LEVELS.get(name, 1)


def test_every_reader_is_in_the_check(shelf: Path) -> None:
    from eq.data.io import image_format

    assert {image_format(shelf / name) for name in FORMATS} == set(READERS)
    assert {p.name for p in find_images(shelf)} == set(FORMATS)


def test_levels_show_the_same_place(shelf: Path) -> None:
    "A level of a generated pyramid is the mean of the full resolution at the same place."
    for name in ("pyramid.ome.tif", "new.ome.zarr"):
        image = open_image(shelf / name)
        full, half = image.read(100, 200, 60, 80).astype(float), image.read(50, 100, 30, 40, 1).astype(float)
        assert abs(full.reshape(30, 2, 40, 2, 3).mean(axis=(1, 3)) - half).max() <= 0.51
        assert np.array_equal(image.at(2.5).rgb(50, 100, 30, 40), half)


FIXTURES = {
    "tcga-cr-7395-01a-01-ts1.svs": {"height": 3567, "width": 4443, "px_size_um": None, "kind": "rgb"},
    "CT_small.dcm": {"height": 128, "width": 128, "px_size_um": 661.468, "dtype": np.dtype("int32"), "planes": 1},
    "sm_image.dcm": {"height": 50, "width": 50, "px_size_um": 0.499, "kind": "rgb"},
    "example_ct_sm.nii.gz": {"height": 101, "width": 122, "px_size_um": None, "planes": 30, "dtype": np.dtype("int16")},
    "someones_anatomy.nii.gz": {"height": 67, "width": 57, "px_size_um": 2750.0, "planes": 56, "dtype": np.dtype("float32")},
}


@pytest.mark.data
@pytest.mark.parametrize("name", FIXTURES)
def test_real_files(name: str) -> None:
    from eq.core.paths import data_root

    image = check_reader(data_root() / "fixtures" / name, FIXTURES[name], part=300)
    assert len(image.levels) == (2 if name.endswith(".svs") else 1)


@pytest.mark.data
def test_every_fixture_opens_or_is_refused_by_name() -> None:
    from eq.core.paths import data_root

    files = {p.name for p in (data_root() / "fixtures").iterdir()}
    assert files == {*FIXTURES, "broken.svs"}
    with pytest.raises(EqError, match="broken.svs: the suffix says slide, but the content is no slide") as caught:
        open_image(data_root() / "fixtures" / "broken.svs")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- damage


FILES = [n for n in FORMATS if n not in ("series", "wsi") and not n.endswith(".zarr") and not n.endswith((".png", ".jpg"))]  # those: test_io_faults


def attempt(path: Path) -> str:
    "Opens and reads as a prediction would: some of it, at every level and the last plane. Only EqError may come."
    try:
        image = open_image(path)
        for number, level in enumerate(image.levels):
            image.rgb(0, 0, min(level.height, 300), min(level.width, 300), number)
        image.at_plane(image.planes - 1).read(0, 0, 1, 1)
    except EqError as exc:
        text = str(exc)
        assert path.name in text and "\n" not in text and len(text) < 700, text
        return text
    return ""


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))


HURT = '''
import json, sys, time
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[4])
import test_readers
path, dose = Path(sys.argv[1]), int(sys.argv[3])
whole, rng, said, slowest = Path(sys.argv[2]).read_bytes(), np.random.default_rng(dose), [], 0.0
for n in range(dose):
    data = bytearray(whole)
    if n % 3 == 0:  # cut off
        del data[int(rng.integers(1, len(data))):]
    elif n % 3 == 1:  # the header overwritten
        for _ in range(int(rng.integers(1, 6))):
            data[int(rng.integers(min(1500, len(data))))] = int(rng.integers(256))
    else:  # flipped bits anywhere
        for _ in range(int(rng.integers(1, 30))):
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    began = time.process_time()
    said.append(test_readers.attempt(path))
    slowest = max(slowest, time.process_time() - began)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024
print(json.dumps({"refused": sum(map(bool, said)), "slowest": slowest, "peak": peak}))
'''


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_refused_by_name_or_read(name: str, shelf: Path, tmp_path: Path) -> None:
    "In a process of its own: a crash of a decoder would be seen. Nothing but EqError in one line that names the file; 5 s and 1 GB at most."
    done = subprocess.run(
        [sys.executable, "-c", HURT, str(tmp_path / name), str(shelf / name), "36", str(Path(__file__).parent)],
        cwd=ROOT, capture_output=True, text=True, timeout=900, preexec_fn=limited,
    )  # fmt: skip
    assert done.returncode == 0, f"{name}: exit {done.returncode}: {done.stderr[-1500:]}"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["refused"] >= 6 and found["slowest"] < 5 and found["peak"] < 1000, f"{name}: {found}"


@pytest.mark.parametrize("name", FILES)
def test_half_a_file_is_always_refused(name: str, shelf: Path, tmp_path: Path) -> None:
    whole = (shelf / name).read_bytes()
    for share in (0.0, 0.01, 0.3, 0.6, 0.95):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(EqError, match=name.split(".")[0]):
            image = open_image(tmp_path / name)
            for number in range(len(image.levels)):
                level = image.levels[number]
                image.read(0, 0, level.height, level.width, number)
            image.at_plane(image.planes - 1).read(0, 0, image.height, image.width)


def test_wrong_suffixes_are_said(shelf: Path, tmp_path: Path) -> None:
    for source, name, text in (
        ("ct.dcm", "a.nii", "the suffix says nifti, the content is dicom; rename it to a.dcm"),
        ("volume.nii", "b.svs", "the content is nifti"),
        ("rgb.png", "c.dcm", "the suffix says dicom, the content is png"),
        ("generic.tif", "d.nii.gz", "the content is tiff"),
        ("rgb.png", "e.zarr", "the suffix says ome-zarr, the content is png"),
    ):
        shutil.copy(shelf / source, tmp_path / name)
        with pytest.raises(EqError, match=text):
            open_image(tmp_path / name)
    shutil.copy(shelf / "ct.dcm", tmp_path / "IM00017")
    assert open_image(tmp_path / "IM00017").width == 900
    for empty in ("x.svs", "x.dcm", "x.nii.gz", "x.nii"):
        (tmp_path / empty).write_bytes(b"")
        with pytest.raises(EqError, match=r"is empty \(0 bytes\)"):
            open_image(tmp_path / empty)


# ---------------------------------------------------------------- bombs


BOMB = '''
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_readers
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024
for name in sys.argv[2:]:
    before, began = peak(), time.process_time()
    text = test_readers.attempt(Path(name))
    print(json.dumps([Path(name).name, text, time.process_time() - began, peak() - before]))
'''


def make_bombs(folder: Path, shelf: Path) -> dict[str, str]:
    "Files that declare much more than they hold, or hold much more than they declare; and what has to be said of them."
    head = bytearray((shelf / "volume.nii").read_bytes()[:352])
    (folder / "more.nii.gz").write_bytes(gzip.compress(bytes(head) + bytes(2_520_000) + bytes(900 * 2**20), 1))
    for name, pack in (("dims.nii.gz", gzip.compress), ("dims.nii", bytes)):
        lying = bytearray(head)
        lying[42:48] = struct.pack("<hhh", 32_767, 32_767, 1000)
        (folder / name).write_bytes(pack(bytes(lying) + bytes(5000)))
    shutil.copytree(shelf / "new.ome.zarr", folder / "huge.ome.zarr")
    meta = json.loads((folder / "huge.ome.zarr" / "0" / "zarr.json").read_text())
    (folder / "huge.ome.zarr" / "0" / "zarr.json").write_text(json.dumps(meta | {"shape": [3, 10**6, 10**6]}))
    shutil.copytree(shelf / "new.ome.zarr", folder / "chunk.ome.zarr")
    meta["chunk_grid"]["configuration"]["chunk_shape"] = [3, 60_000, 60_000]
    (folder / "chunk.ome.zarr" / "0" / "zarr.json").write_text(json.dumps(meta | {"shape": [3, 60_000, 60_000]}))
    dicom = (shelf / "ct.dcm").read_bytes()
    at = dicom.index(bytes.fromhex("2800 1000 5553 0200")) + 8
    (folder / "rows.dcm").write_bytes(dicom[:at] + struct.pack("<H", 65_535) + dicom[at + 2 :])
    wsi = (shelf / "slide.dcm").read_bytes()
    at = wsi.index(bytes.fromhex("4800 0600 554c 0400")) + 8  # TotalPixelMatrixColumns
    (folder / "matrix.dcm").write_bytes(wsi[:at] + struct.pack("<I", 10**6) + wsi[at + 4 :])
    for suffix in ("tif", "svs"):
        lying = bytearray((shelf / "generic.tif").read_bytes())
        with tifffile.TiffFile(shelf / "generic.tif") as tif:
            for code in (256, 257):
                tag = tif.pages[0].tags[code]
                lying[tag.valueoffset : tag.valueoffset + tag.dtype_bytes if hasattr(tag, "dtype_bytes") else tag.valueoffset + 2] = struct.pack("<H", 65_000)
        (folder / f"size.{suffix}").write_bytes(lying)
    return {
        "more.nii.gz": "inflates to more than", "dims.nii.gz": "cannot hold", "dims.nii": "cannot hold", "huge.ome.zarr": "more than the 100 Gpx",
        "chunk.ome.zarr": "GiB", "rows.dcm": "truncated", "matrix.dcm": "are not enough", "size.tif": "", "size.svs": "",
    }  # fmt: skip


def test_bombs_are_refused_before_they_go_off(shelf: Path, tmp_path: Path) -> None:
    bombs = make_bombs(tmp_path, shelf)
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(Path(__file__).parent), *(str(tmp_path / name) for name in bombs)],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.strip().splitlines():
        name, text, seconds, grown = json.loads(line)
        assert text and bombs[name] in text, f"{name}: {text}"
        assert seconds < 5 and grown < 200, f"{name}: {seconds:.1f} s, {grown} MiB: {text}"


FORK = """
import multiprocessing
import sys

import numpy as np

from eq.data.io import open_image

PLACES = [(y, x) for y in range(0, 600, 100) for x in range(0, 800, 100)]


def read_share(image, share, path):
    np.save(path, np.stack([image.read(y, x, 100, 100) for y, x in PLACES[share::4]]))


image = open_image(sys.argv[1])
image.read(0, 0, 10, 10)
context = multiprocessing.get_context("fork")
team = [context.Process(target=read_share, args=(image, share, f"{sys.argv[2]}/{share}.npy")) for share in range(4)]
for worker in team:
    worker.start()
read_share(image, 0, f"{sys.argv[2]}/parent.npy")
for worker in team:
    worker.join()
sys.exit(max(abs(worker.exitcode) for worker in team))
"""


def test_a_slide_handle_does_not_cross_a_fork(shelf: Path, tmp_path: Path) -> None:
    "Four forked workers and the parent read the same slide at once: every tile is right."
    # In a process of its own: forking one that has threads (other tests start some) may hang, whatever the reader does.
    done = subprocess.run([sys.executable, "-c", FORK, str(shelf / "slide.svs"), str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = [RGB[y : y + 100, x : x + 100] for y in range(0, 600, 100) for x in range(0, 800, 100)]
    for name, share in (("parent", 0), *((str(share), share) for share in range(4))):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), np.stack(wanted[share::4])), name


def test_a_missing_library_names_its_extra(tmp_path: Path, shelf: Path) -> None:
    "Without OpenSlide, pydicom or nibabel the error says what to install, and everything else opens."
    code = """
import sys
for name in ("openslide", "pydicom", "nibabel", "imagecodecs"):
    sys.modules[name] = None
from eq.core.registry import EqError
from eq.data.io import open_image
for path in sys.argv[1:]:
    try:
        print("read", open_image(path).read(0, 0, 1, 1).shape)
    except EqError as exc:
        print(exc)
"""
    names = ("slide.svs", "ct.dcm", "volume.nii", "jp2.tif", "generic.tif", "new.ome.zarr")
    done = subprocess.run([sys.executable, "-c", code, *(str(shelf / n) for n in names)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == len(names), done.stderr[-2000:]
    for line, extra in zip(lines, ("eq[wsi]", "eq[ct]", "eq[ct]", "eq[wsi]", "read", "read"), strict=True):
        assert extra in line, line


def test_memory_of_a_corner_does_not_depend_on_the_slide(tmp_path: Path) -> None:
    "A sparse OME-Zarr of 200,000 x 200,000: its corner costs a chunk."
    import zarr

    axes = [{"name": a, "type": "space", "unit": "micrometer"} for a in "yx"]
    sets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [0.25, 0.25]}]}]
    attrs = {"ome": {"version": "0.5", "multiscales": [{"axes": axes, "datasets": sets}]}}
    group = zarr.open_group(str(tmp_path / "sparse.zarr"), mode="w", zarr_format=3, attributes=attrs)
    array = group.create_array("0", shape=(200_000, 200_000), chunks=(512, 512), dtype="uint8")
    array[199_999, 199_999] = 7
    image = open_image(tmp_path / "sparse.zarr")
    assert (image.height, image.px_size_um, image.read(199_990, 199_990, 10, 10)[9, 9]) == (200_000, 0.25, 7)
    assert math.prod(image.read(0, 0, 600, 600).shape) == 360_000
