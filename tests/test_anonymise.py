"""No identifier that stood in an original survives anywhere in the bytes of its copy."""
import os
import shutil
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import typer
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from eq.core.paths import data_root
from eq.data.anonymise import Salt, anonymise_tiff, looks_like_text
from eq.data.anonymise_dicom import anonymise_dicom
from eq.data.io import open_image
from eq.data.levels import level_table
from eq.data.tiff import open_tiff
from eq.workflows.anonymise import anonymise

SALT = Salt(b"0123456789abcdef")
SECRET = "Doe-Jane-4711"
TEXT_TAGS = {"DocumentName": 269, "Make": 271, "Model": 272, "PageName": 285, "Artist": 315, "HostComputer": 316, "Copyright": 33432, "private": 65001}


def survives(path: Path, secret: str = SECRET) -> bool:
    data = path.read_bytes()
    return any(secret.encode(code) in data for code in ("utf-8", "utf-16-le", "utf-16-be"))


def tissue(seed: int = 0, shape: tuple[int, int] = (64, 96)) -> np.ndarray:
    return np.random.default_rng(seed).normal(140, 12, (*shape, 3)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("tag", TEXT_TAGS)
def test_a_text_tag_does_not_cross(tmp_path: Path, tag: str) -> None:
    extra = [(TEXT_TAGS[tag], "s", 0, SECRET, True)]
    tifffile.imwrite(tmp_path / "a.tif", tissue(), photometric="rgb", extratags=extra, metadata=None, resolution=(40_000, 40_000), resolutionunit="CENTIMETER")
    assert survives(tmp_path / "a.tif")
    removed = anonymise_tiff(tmp_path / "a.tif", tmp_path / "b.tif", SALT)
    assert not survives(tmp_path / "b.tif") and any(r.action == "emptied" for r in removed)
    with tifffile.TiffFile(tmp_path / "b.tif") as tif:
        assert tif.pages[0].resolution == (40_000, 40_000) and (tif.asarray() == tissue()).all()


def test_free_text_dates_and_ome_do_not_cross(tmp_path: Path) -> None:
    about = {"axes": "YXS", "Name": SECRET, "Description": SECRET, "AcquisitionDate": "1961-04-07T10:11:12", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm",
             "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", tissue(), photometric="rgb", metadata=about, datetime="1961:04:07 10:11:12")
    tifffile.imwrite(tmp_path / "c.tif", tissue(), photometric="rgb", description=SECRET, software=SECRET, metadata=None)
    for name in ("a.ome.tif", "c.tif"):
        anonymise_tiff(tmp_path / name, tmp_path / f"new_{name}", SALT)
        assert not survives(tmp_path / f"new_{name}") and not survives(tmp_path / f"new_{name}", "1961")
        assert (tifffile.imread(tmp_path / f"new_{name}") == tissue()).all()
    with tifffile.TiffFile(tmp_path / "new_a.ome.tif") as tif:
        assert tif.pages[0].resolution == (20_000, 20_000)


@pytest.mark.parametrize("kind", ["grey8", "grey16", "rgb", "tiled", "levels", "palette"])
def test_pixels_pass_unchanged(tmp_path: Path, kind: str) -> None:
    grey = np.random.default_rng(1).integers(0, 60_000, (40, 50), dtype=np.uint16)
    with tifffile.TiffWriter(tmp_path / "a.tif") as out:
        if kind == "levels":
            out.write(tissue(), photometric="rgb", tile=(32, 32), metadata=None)
            out.write(tissue()[::2, ::2], photometric="rgb", tile=(32, 32), subfiletype=1, metadata=None)
        elif kind == "palette":
            out.write((grey % 7).astype(np.uint8), photometric="palette", colormap=np.zeros((3, 256), np.uint16), metadata=None)
        else:
            pixels = {"grey8": (grey % 256).astype(np.uint8), "grey16": grey}.get(kind, tissue())
            out.write(pixels, tile=(32, 32) if kind == "tiled" else None, metadata=None, photometric="rgb" if pixels.ndim == 3 else "minisblack")
    anonymise_tiff(tmp_path / "a.tif", tmp_path / "b.tif", SALT)
    with tifffile.TiffFile(tmp_path / "a.tif") as old, tifffile.TiffFile(tmp_path / "b.tif") as new:
        assert len(old.pages) == len(new.pages)
        for before, after in zip(old.pages, new.pages, strict=True):
            assert (before.asarray() == after.asarray()).all() and before.photometric == after.photometric


def test_writing_in_the_pixels_is_flagged(tmp_path: Path) -> None:
    flags = []
    for text in ("", "JANE DOE 1961-04-07", "MRN 4711 WARD 12"):
        picture = Image.fromarray(tissue(shape=(300, 500)))
        ImageDraw.Draw(picture).text((40, 60), text, fill=(255, 255, 255), font_size=20)
        picture.save(tmp_path / "a.tif")
        flags.append([r.action for r in anonymise_tiff(tmp_path / "a.tif", tmp_path / "b.tif", SALT)].count("flagged"))
    assert flags == [0, 1, 1]
    assert not looks_like_text(np.zeros((50, 50)))


def test_a_folder_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "in" / SECRET).mkdir(parents=True)
    for i in range(3):
        tifffile.imwrite(tmp_path / "in" / SECRET / f"{SECRET}_{i}.tif", tissue(i), photometric="rgb", description=SECRET, metadata=None)
    anonymise(tmp_path / "in", tmp_path / "out", tmp_path / "keys" / "salt", tmp_path / "keys" / "map.csv")
    for path in (tmp_path / "out").rglob("*"):
        assert SECRET not in path.name and not (path.is_file() and survives(path))
    names = pd.read_csv(tmp_path / "keys" / "map.csv")
    for old, new in zip(names["file"], names["copy"], strict=True):
        assert (tifffile.imread(tmp_path / "in" / old) == tifffile.imread(tmp_path / "out" / new)).all()
    anonymise(tmp_path / "in", tmp_path / "again", tmp_path / "keys" / "salt")
    assert sorted(os.listdir(tmp_path / "again")) == sorted(os.listdir(tmp_path / "out"))
    anonymise(tmp_path / "in", tmp_path / "other")
    assert not set(os.listdir(tmp_path / "other")) - {"audit.csv"} & set(os.listdir(tmp_path / "out"))

LABEL = np.random.default_rng(7).integers(0, 255, (40, 50, 3), dtype=np.uint8)  # uncompressed, so that its rows are found in the bytes of a copy
LABELS: dict[str, dict] = {
    "ome": {"metadata": {"Name": "label image"}},
    "ome_tiled": {"metadata": {"Name": "label image"}, "tile": (16, 16)},
    "ome_macro": {"metadata": {"Name": "macro image"}},
    "ome_overview": {"metadata": {"Name": "SlideOverview"}},
    "ome_thumbnail": {"metadata": {"Name": "Thumbnail_1"}, "tile": (16, 16)},
    "ome_unnamed": {"metadata": {"Name": "Series 2"}, "tile": (16, 16)},
    "description": {"description": "the label"},
    "page_name": {"extratags": [(285, "s", 0, "Label", True)]},
    "subfile_type": {"subfiletype": 9},
    "unnamed": {},
    "unnamed_tiled": {"tile": (16, 16)},
    "subifd": {"description": "slideLabel"},
    "subifd_unnamed": {"subfiletype": 1},
}


def shows(path: Path) -> bool:
    "Whether a piece of a row of the label stands in the file."
    return LABEL[20, :16].tobytes() in path.read_bytes()


@pytest.mark.parametrize("kind", LABELS)
def test_no_picture_of_a_label_crosses(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in").mkdir()
    ome, below = kind.startswith("ome"), int(kind.startswith("subifd"))
    with tifffile.TiffWriter(tmp_path / "in" / "a.tif", ome=ome) as out:
        out.write(tissue(), photometric="rgb", tile=(32, 32), subifds=below, metadata={"Name": "kidney"} if ome else None)
        out.write(LABEL, photometric="rgb", **({} if ome else {"metadata": None}) | LABELS[kind])
    assert shows(tmp_path / "in" / "a.tif")
    anonymise(tmp_path / "in", tmp_path / "out")
    copy = next((tmp_path / "out").glob("*.tif"))
    assert not shows(copy) and (tifffile.imread(copy, series=0) == tissue()).all()
    assert "dropped" in set(pd.read_csv(tmp_path / "out" / "audit.csv")["action"])


def test_a_picture_of_a_label_alone_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.ome.tif", LABEL, photometric="rgb", metadata={"Name": "label image", "axes": "YXS"})
    with pytest.raises(typer.Exit):
        anonymise(tmp_path / "in", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["audit.csv"]


def test_macrophages_are_no_macro_picture(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.ome.tif", tissue(), photometric="rgb", metadata={"Name": "macrophages, label-free", "axes": "YXS"})
    assert not [r for r in anonymise_tiff(tmp_path / "a.ome.tif", tmp_path / "b.tif", SALT) if r.action in ("dropped", "flagged")]


@pytest.mark.parametrize("where", ["page", "level"])
def test_writing_is_looked_for_on_every_page(tmp_path: Path, where: str) -> None:
    quiet = np.random.default_rng(0).normal(120, 9, (600, 1000)).astype(np.uint8)
    small = Image.fromarray(quiet[::2, ::2].copy())
    ImageDraw.Draw(small).text((40, 60), "JANE DOE 1961-04-07", fill=255, font_size=20)
    with tifffile.TiffWriter(tmp_path / "a.tif") as out:
        out.write(quiet, metadata=None, subifds=int(where == "level"))
        out.write(np.asarray(small if where == "level" else small.resize((1000, 600))), metadata=None)
    flags = [r.where for r in anonymise_tiff(tmp_path / "a.tif", tmp_path / "b.tif", SALT) if r.action == "flagged"]
    assert flags == [{"level": "page 0 level 1", "page": "page 1"}[where] + " pixels may hold writing"]


STACK = np.random.default_rng(3).normal(9000, 900, (2, 3, 64, 96)).astype(np.uint16)
UM = {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm", "Name": SECRET, "Channel": {"Name": [SECRET] * 3}}
STACKS: dict[str, tuple[np.ndarray, dict]] = {
    "ome_cyx": (STACK[0], {"ome": True, "metadata": {"axes": "CYX", **UM}}),
    "ome_zcyx": (STACK, {"ome": True, "metadata": {"axes": "ZCYX", **UM}, "compression": "zlib", "tile": (32, 32)}),
    "imagej": (STACK, {"imagej": True, "resolution": (2, 2), "metadata": {"axes": "ZCYX", "unit": "um", "Info": SECRET}}),
    "imagej_um": (STACK, {"imagej": True, "resolution": (2, 2), "metadata": {"axes": "ZCYX", "unit": "\\u00B5m"}}),
    "shaped": (STACK, {"metadata": {"axes": "TCYX", "who": SECRET}}),
    "big_endian": (STACK, {"metadata": {"axes": "TCYX", "who": SECRET}, "byteorder": ">", "bigtiff": True}),
}


@pytest.mark.parametrize("kind", STACKS)
def test_axes_and_pixel_size_stay(tmp_path: Path, kind: str) -> None:
    values, options = STACKS[kind]
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", **options)
    assert not [r for r in anonymise_tiff(tmp_path / "a.tif", tmp_path / "b.tif", SALT) if r.action == "flagged"]
    old, new = open_image(tmp_path / "a.tif").layout, open_image(tmp_path / "b.tif").layout
    assert old == new and old.channels == 3 and not survives(tmp_path / "b.tif")
    with tifffile.TiffFile(tmp_path / "a.tif") as a, tifffile.TiffFile(tmp_path / "b.tif") as b:
        assert (a.series[0].axes, a.series[0].shape) == (b.series[0].axes, b.series[0].shape)
        assert (a.asarray() == b.asarray()).all() and (a.byteorder, a.is_bigtiff) == (b.byteorder, b.is_bigtiff)


@pytest.mark.parametrize("ome", [True, False])
def test_levels_stay_and_tiles_are_the_same_bytes(tmp_path: Path, ome: bool) -> None:
    smooth = np.kron(np.random.default_rng(0).normal(140, 12, (64, 96, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=ome) as out:
        for k in (1, 2, 4):
            below = {"subifds": 2} if ome and k == 1 else {"subfiletype": int(k > 1)}
            about = {"metadata": UM if k == 1 else {}} if ome else {"metadata": None}
            out.write(smooth[::k, ::k].copy(), tile=(64, 64), compression="jpeg", photometric="rgb", **below, **about)
    assert not [r for r in anonymise_tiff(tmp_path / "a.tif", tmp_path / "b.tif", SALT) if r.action == "flagged"]
    with tifffile.TiffFile(tmp_path / "a.tif") as a, tifffile.TiffFile(tmp_path / "b.tif") as b:
        assert len(a.series[0].levels) == len(b.series[0].levels) == 3
        for before, after in zip(a.series[0].levels, b.series[0].levels, strict=True):
            assert (before.asarray() == after.asarray()).all() and before.keyframe.databytecounts == after.keyframe.databytecounts
            assert after.keyframe.compression == tifffile.COMPRESSION.JPEG
    assert (tmp_path / "b.tif").stat().st_size <= (tmp_path / "a.tif").stat().st_size


def test_what_cannot_be_kept_is_said(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as out:
        for k in range(3):
            out.write(STACK[0, k], metadata=None, description="ImageJ=1.54\nimages=3\nchannels=3\n" if k == 0 else None, subfiletype=8 * (k == 2))
    flags = [r.where for r in anonymise_tiff(tmp_path / "a.tif", tmp_path / "b.tif", SALT) if r.action == "flagged"]
    assert flags and flags[0].startswith("channels was 3, now reads as 1")


def test_a_comment_inside_a_jpeg_tile_does_not_cross(tmp_path: Path) -> None:
    from imagecodecs import jpeg_encode

    text = SECRET.encode()

    def tiles() -> Iterator[bytes]:
        stream = jpeg_encode(tissue(shape=(64, 96))[:64, :64].copy())
        yield stream[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + stream[2:]

    tifffile.imwrite(tmp_path / "a.tif", tiles(), shape=(64, 64, 3), dtype=np.uint8, photometric="ycbcr", subsampling=(2, 2), tile=(64, 64), compression="jpeg", metadata=None)
    assert survives(tmp_path / "a.tif")
    anonymise_tiff(tmp_path / "a.tif", tmp_path / "b.tif", SALT)
    assert not survives(tmp_path / "b.tif") and (tifffile.imread(tmp_path / "a.tif") == tifffile.imread(tmp_path / "b.tif")).all()


def test_more_than_two_thousand_million_values_in_little_memory(tmp_path: Path) -> None:
    side, tile = 46_592, 512
    data = zlib.compress(np.full((tile, tile), 9, np.uint8).tobytes())
    tiles = (data for _ in range((side // tile) ** 2))
    tifffile.imwrite(tmp_path / "a.tif", tiles, shape=(side, side), dtype=np.uint8, tile=(tile, tile), compression="zlib", metadata=None)
    tracemalloc.start()
    anonymise_tiff(tmp_path / "a.tif", tmp_path / "b.tif", SALT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert side**2 > 2**31 and peak < 300_000_000
    with tifffile.TiffFile(tmp_path / "b.tif") as tif:
        assert tif.pages[0].shape == (side, side) and tif.pages[0].databytecounts[0] == len(data)


def write_dicom(path: Path, place: float, series: str) -> None:
    "A slice of a series, of which two identifiers are longer than their VR once they are mapped."
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID, d.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{abs(hash(str(path)))}"
    d.SOPClassUID, d.SeriesInstanceUID, d.PatientName, d.PatientID, d.StudyID, d.AccessionNumber = CTImageStorage, series, SECRET, SECRET, "4711", "4711"
    d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = 6, 8, 1, "MONOCHROME2"
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation, d.PixelSpacing = 16, 12, 11, 0, [0.5, 0.5]
    d.ImagePositionPatient, d.ImageOrientationPatient, d.PixelData = [0, 0, place], [1, 0, 0, 0, 1, 0], np.arange(48, dtype="<u2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    d.save_as(path, enforce_file_format=True)


def test_series_stay_in_folders_of_their_own(tmp_path: Path) -> None:
    for k, folder in enumerate((f"{SECRET}/scan 1", f"{SECRET}/scan 2", "Roe-Richard")):
        for i, name in enumerate(("IM0001", "IM0002.dicom", f"IM3.{SECRET}", "4.dcm")):
            write_dicom(tmp_path / "in" / folder / name, 5.0 * i, f"1.2.{k}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pydicom warns of values that are too long
        anonymise(tmp_path / "in", tmp_path / "out", mapping=tmp_path / "map.csv")
    names = pd.read_csv(tmp_path / "map.csv")
    assert len(names) == 12 and not any(w in p for p in names["copy"] for w in (SECRET, "Roe", "scan", "IM"))
    assert [Path(p).suffix for p in names["copy"][:4]] == [".dcm", ".dcm", ".dicom", ".dcm"]
    for old, part in names.groupby(names["file"].map(lambda f: Path(f).parent.as_posix())):
        new = {Path(p).parent for p in part["copy"]}
        assert len(new) == 1
        before, after = open_image(tmp_path / "in" / str(old)), open_image(tmp_path / "out" / new.pop())
        assert before.planes == after.planes == 4 and before.px_size_um == after.px_size_um == 500


@pytest.mark.data
def test_real_slides_and_dicom(tmp_path: Path) -> None:
    fixtures = data_root() / "fixtures"
    slide = next(fixtures.glob("tcga*.svs"))
    with tifffile.TiffFile(slide) as tif:
        words = {w.split("=")[1].strip() for p in tif.pages for w in str(p.description).split("|") if "=" in w}
    secrets = {w for w in words if len(w) > 7}
    anonymise_tiff(slide, tmp_path / "slide.tif", SALT)
    assert secrets and not [w for w in secrets if survives(tmp_path / "slide.tif", w)]
    assert (tmp_path / "slide.tif").stat().st_size < slide.stat().st_size
    old, new = (open_tiff(p) for p in (slide, tmp_path / "slide.tif"))
    assert level_table(old) == level_table(new) and (old.read(1000, 1000, 300, 300) == new.read(1000, 1000, 300, 300)).all()
    for name in ("CT_small.dcm", "sm_image.dcm"):
        anonymise_dicom(fixtures / name, tmp_path / name, SALT)
    shutil.copytree(fixtures, tmp_path / "in")
    with pytest.raises(typer.Exit):  # NIfTI is not cleaned, the broken slide is refused: both are said
        anonymise(tmp_path / "in", tmp_path / "out", mapping=tmp_path / "map.csv")
    left = pd.read_csv(tmp_path / "map.csv", keep_default_na=False).set_index("file")["left_out"]
    assert left["broken.svs"] and "is not a format that is cleaned" in left["example_ct_sm.nii.gz"] and not left["CT_small.dcm"]
