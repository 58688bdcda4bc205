"""No identifier that stood in an original survives anywhere in the bytes of its copy."""
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import typer
from PIL import Image, ImageDraw

from eq.core.paths import data_root
from eq.data.anonymise import Salt, anonymise_tiff, looks_like_text
from eq.data.anonymise_dicom import anonymise_dicom
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
        assert SECRET not in path.name and not survives(path)
    names = pd.read_csv(tmp_path / "keys" / "map.csv")
    for old, new in zip(names["file"], names["copy"], strict=True):
        assert (tifffile.imread(tmp_path / "in" / old) == tifffile.imread(tmp_path / "out" / new)).all()
    anonymise(tmp_path / "in", tmp_path / "again", tmp_path / "keys" / "salt")
    assert sorted(os.listdir(tmp_path / "again")) == sorted(os.listdir(tmp_path / "out"))
    anonymise(tmp_path / "in", tmp_path / "other")
    assert not set(os.listdir(tmp_path / "other")) - {"audit.csv"} & set(os.listdir(tmp_path / "out"))


@pytest.mark.data
def test_real_slides_and_dicom(tmp_path: Path) -> None:
    fixtures = data_root() / "fixtures"
    slide = next(fixtures.glob("tcga*.svs"))
    with tifffile.TiffFile(slide) as tif:
        words = {w.split("=")[1].strip() for p in tif.pages for w in str(p.description).split("|") if "=" in w}
    secrets = {w for w in words if len(w) > 7}
    anonymise_tiff(slide, tmp_path / "slide.tif", SALT)
    assert secrets and not [w for w in secrets if survives(tmp_path / "slide.tif", w)]
    for name in ("CT_small.dcm", "sm_image.dcm"):
        anonymise_dicom(fixtures / name, tmp_path / name, SALT)
    shutil.copytree(fixtures, tmp_path / "in")
    with pytest.raises(typer.Exit):  # NIfTI is not cleaned, the broken slide is refused: both are said
        anonymise(tmp_path / "in", tmp_path / "out", mapping=tmp_path / "map.csv")
    left = pd.read_csv(tmp_path / "map.csv", keep_default_na=False).set_index("file")["left_out"]
    assert left["broken.svs"] and "is not a format that is cleaned" in left["example_ct_sm.nii.gz"] and not left["CT_small.dcm"]
