"""Sound files of five kinds, what may happen to them, and bombs: the material of faults.py. Writers are those of the tests."""
import gzip
import json
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import test_archive  # noqa: E402
import test_io_faults  # noqa: E402
import test_readers  # noqa: E402

from eq.data.annotations import labels_to_geojson, read_geojson, write_geojson  # noqa: E402
from eq.data.io import open_image  # noqa: E402

SIZE = (120, 150)
GREY, RGB = test_io_faults.GREY, test_io_faults.RGB
HOSTILE = test_archive.HOSTILE


def write_nifti(path: Path) -> None:
    import nibabel

    image = nibabel.Nifti1Image(np.stack([GREY.T.astype(np.int16)] * 2, axis=2), np.diag([0.7, 0.7, 2, 1]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def write_outlines(path: Path) -> None:
    labels = np.zeros(SIZE, np.int32)
    for n in range(8):
        labels[10 + 12 * n : 18 + 12 * n, 10 + 9 * n : 40 + 9 * n] = n + 1
    write_geojson(path, labels_to_geojson(labels))


Writers = dict[str, Callable[[Path], object]]
KINDS: dict[str, Writers] = {
    "PNG": {n: test_io_faults.WRITERS[n] for n in ("grey.png", "rgb.png", "deep.png", "palette.png")},
    "TIFF": {n: test_io_faults.WRITERS[n] for n in ("plain.tif", "tiled.tif", "predicted.tif", "lzw.tif", "ours.ome.tif")},
    "DICOM": {
        "ct.dcm": lambda p: test_readers.write_dicom(p, GREY.astype(np.int16)[None], PixelSpacing=[0.7, 0.7]),
        "cine.dcm": lambda p: test_readers.write_dicom(p, np.stack([RGB, RGB[::-1]])),
    },
    "NIfTI": {"volume.nii": write_nifti, "volume.nii.gz": write_nifti},
    "GeoJSON": {"objects.geojson": write_outlines},
}


def seen(path: Path) -> tuple[Any, ...]:
    "All that a measurement would take from a file: every pixel of every level and plane, their type, the pixel size; of outlines the objects."
    if path.suffix == ".geojson":
        labels = read_geojson(path, *SIZE)
        return labels.shape, labels.tobytes()
    image = open_image(path)
    found: list[Any] = [image.px_size_um, image.axes, image.dtype.str, image.layout.kind, image.layout.inverted, image.planes]
    for number, level in enumerate(image.levels):
        found.append((level.height, level.width, image.read(0, 0, level.height, level.width, number).tobytes()))
    if image.planes > 1:
        found.append(image.at_plane(image.planes - 1).read_all().tobytes())
    return tuple(found)


def protected(path: Path) -> Callable[[int], bool]:
    """Whether the format keeps a checksum over a byte of this sound file.

    PNG: CRC-32 over every chunk. Deflated TIFF: Adler-32 over each strip or tile, none over tags. nii.gz: CRC-32 of the whole stream.
    Plain and LZW TIFF, DICOM, plain NIfTI and GeoJSON have none: there only the hash in a run's manifest notices.
    """
    if path.suffix == ".png" or path.name.endswith(".nii.gz"):
        return lambda at: True
    spans: list[tuple[int, int]] = []
    if path.suffix == ".tif":
        with tifffile.TiffFile(path) as tif:
            for page in [p for series in tif.series for level in series.levels for p in level.pages]:
                if page is not None and page.compression in (8, 32946):
                    spans += [(o, o + n) for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
    return lambda at: any(start <= at < stop for start, stop in spans)


def damaged(data: bytes, n: int, rng: np.random.Generator) -> tuple[bytes, int]:
    "Every second one is cut short (-1), of the others one bit is flipped, at the place that is returned."
    if n % 2 == 0:
        return data[: int(rng.integers(0, len(data)))], -1
    out, at = bytearray(data), int(rng.integers(len(data)))
    out[at] ^= 1 << int(rng.integers(8))
    return bytes(out), at


# ---------------------------------------------------------------- bombs


def deflated_zeros(size: int) -> bytes:
    "A zlib stream that inflates to so many zeros, made without holding them."
    packer, block = zlib.compressobj(1), bytes(2**20)
    return b"".join([*(packer.compress(block) for _ in range(size // len(block))), packer.flush()])


def png(header: tuple[int, int], *chunks: tuple[bytes, bytes]) -> bytes:
    first = struct.pack(">IIBBBBB", *header, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", first), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(test_io_faults.png_chunk(kind, data) for kind, data in parts)


def set_tags(path: Path, **values: int) -> None:
    "Overwrites numbers of the first page of a little-endian TIFF."
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tif:
        for name, value in values.items():
            tag = tif.pages[0].tags[name]
            width = "<H" if int(tag.dtype) == 3 else "<I"
            data[tag.valueoffset : tag.valueoffset + struct.calcsize(width)] = struct.pack(width, value)
    path.write_bytes(bytes(data))


BOUNDED = ("pixels beyond the last row",)  # no lie in the declaration: the decoder stops where the image ends


def png_bombs(folder: Path, zeros: bytes) -> list[Path]:
    rows = zlib.compress(bytes(1000))
    sound = zlib.compress(bytes(65 * 64))
    made = {
        "declares 60,000 x 60,000": png((60_000, 60_000), (b"IDAT", rows)), "declares 2^31-1 squared": png((2**31 - 1, 2**31 - 1), (b"IDAT", rows)),
        "declares 1 x 2^31-1": png((1, 2**31 - 1), (b"IDAT", rows)), "pixels beyond the last row": png((64, 64), (b"IDAT", zeros)),
        "text that inflates": png((64, 64), (b"zTXt", b"Comment\0\0" + zeros), (b"IDAT", sound)),
    }
    for name, data in made.items():
        (folder / f"{name}.png").write_bytes(data)
    return [folder / f"{name}.png" for name in made]


def tiff_bombs(folder: Path, zeros: bytes) -> list[Path]:
    paths = [folder / f"{name}.tif" for name in ("strip inflates", "tile inflates", "declares 65,000 squared", "tile of 65,000 squared", "jpeg tile declares more")]
    test_io_faults.tiff_that_inflates(paths[0], zeros, 1000)
    tifffile.imwrite(paths[1], np.zeros((64, 64), np.uint8), compression="zlib", tile=(64, 64))
    at = len(paths[1].read_bytes())
    paths[1].write_bytes(paths[1].read_bytes() + zeros)
    set_tags(paths[1], TileOffsets=at, TileByteCounts=len(zeros))
    tifffile.imwrite(paths[2], np.zeros((64, 64), np.uint8), compression="zlib", rowsperstrip=64)
    set_tags(paths[2], ImageWidth=65_000, ImageLength=65_000, RowsPerStrip=65_000)
    tifffile.imwrite(paths[3], np.zeros((64, 64), np.uint8), compression="zlib", tile=(64, 64))
    set_tags(paths[3], ImageWidth=65_000, ImageLength=65_000, TileWidth=64_992, TileLength=64_992)
    tifffile.imwrite(paths[4], RGB, photometric="rgb", compression="jpeg", tile=(128, 128))
    data = bytearray(paths[4].read_bytes())
    with tifffile.TiffFile(paths[4]) as tif:
        start = tif.pages[0].dataoffsets[0]
    frame = data.index(b"\xff\xc0", start) + 5
    data[frame : frame + 4] = struct.pack(">HH", 65_000, 65_000)
    paths[4].write_bytes(bytes(data))
    return paths


def nifti_bombs(folder: Path, zeros: int) -> list[Path]:
    write_nifti(folder / "sound.nii")
    head = bytearray((folder / "sound.nii").read_bytes()[:352])
    with gzip.open(folder / "more.nii.gz", "wb", 1) as file:
        file.write(bytes(head) + bytes(2 * SIZE[0] * SIZE[1] * 2))
        for _ in range(zeros >> 20):
            file.write(bytes(2**20))
    head[42:48] = struct.pack("<hhh", 32_767, 32_767, 1000)
    (folder / "dims.nii.gz").write_bytes(gzip.compress(bytes(head) + bytes(5000)))
    return [folder / "more.nii.gz", folder / "dims.nii.gz"]


ARCHIVE_BOMBS = {
    "zip": ("zip: too large", "zip: lies about its size", "zip: overlap", "zip: too many", "zip: encrypted"),
    "gzip": ("gz: bomb", "gz: bomb within the quota", "tar.gz: bomb"),
}


# ---------------------------------------------------------------- pixel sizes


def ome_tiff(path: Path, x: float | None, y: float | None, unit: str) -> Path:
    sizes = {} if x is None else {"PhysicalSizeX": x, "PhysicalSizeY": y, "PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    tifffile.imwrite(path, RGB, photometric="rgb", ome=True, metadata={"axes": "YXS", **sizes})
    return path


def tag_tiff(path: Path, x: float | None, y: float | None, unit: str) -> Path:
    per_cm = None if x is None else tuple((int(1e4 / v), 1) if v else (0, 1) for v in (x, y or x))
    tifffile.imwrite(path, RGB, photometric="rgb", metadata=None, **({"resolution": per_cm, "resolutionunit": "CENTIMETER"} if per_cm else {}))
    return path


def dicom(path: Path, x: float | None, y: float | None, unit: str) -> Path:
    test_readers.write_dicom(path, GREY.astype(np.int16)[None], **({} if x is None else {"PixelSpacing": [(y or 0) / 1000, x / 1000]}))
    return path


def nifti(path: Path, x: float | None, y: float | None, unit: str) -> Path:
    write_nifti(path)
    data = bytearray(path.read_bytes())
    data[80:88] = struct.pack("<ff", *((x / 1000, (y or 0) / 1000) if x is not None else (0.7, 0.7)))
    data[123] = 2 if x is not None else 0  # millimetres, or no unit
    path.write_bytes(bytes(data))
    return path


def ome_zarr(path: Path, x: float | None, y: float | None, unit: str) -> Path:
    from eq.data.pyramid import write_zarr_pyramid
    from eq.data.write import TiffPlan

    write_zarr_pyramid(path, lambda: iter([RGB]), TiffPlan(*SIZE, np.uint8, 3, px_size_um=None if x is None else 0.25), kind="rgb")
    meta = json.loads((path / "zarr.json").read_text())
    scales = meta["attributes"]["ome"]["multiscales"][0]
    for entry in scales["datasets"] if x is not None else ():
        entry["coordinateTransformations"][0]["scale"][-2:] = [y, x]
    for axis in scales["axes"]:
        if axis["type"] == "space" and x is not None:
            axis["unit"] = {"µm": "micrometer", "nm": "nanometer"}[unit]
    (path / "zarr.json").write_text(json.dumps(meta))
    return path


SIZED: dict[str, tuple[str, Callable[[Path, float | None, float | None, str], Path]]] = {
    "OME-TIFF": (".ome.tif", ome_tiff), "TIFF tags": (".tif", tag_tiff), "DICOM": (".dcm", dicom), "NIfTI": (".nii", nifti), "OME-Zarr": (".ome.zarr", ome_zarr),
}
