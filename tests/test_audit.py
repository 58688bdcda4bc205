"""Leaks that careless exports make are found, declared gaps and different fields are let through."""
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from eq.core.registry import EqError
from eq.data.cohort import Cohort, save_cohort
from eq.data.io import write_png
from eq.data.leakage import FATAL, check_leaks, find_leaks, without_leaks
from eq.data.split import split_cohort


def texture(seed: int, height: int = 320, width: int = 320) -> np.ndarray:
    noise = cv2.GaussianBlur(np.random.default_rng(seed).normal(0, 1, (height, width)).astype(np.float32), (0, 0), 5)
    return np.clip(127 + noise / noise.std() * 40, 0, 255).astype(np.uint8)


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 0)


CHANGES = {
    "half": lambda g: cv2.resize(g, (160, 160), interpolation=cv2.INTER_AREA),
    "jpeg": lambda g: jpeg(g, 30),
    "crop": lambda g: g[12:-4, 8:-8],
    "bright": lambda g: np.clip(g * 0.7 + 50, 0, 255).astype(np.uint8),
    "noise": lambda g: np.clip(g + np.random.default_rng(9).normal(0, 8, g.shape), 0, 255).astype(np.uint8),
    "quarter turn": np.rot90,
    "half turn": lambda g: g[::-1, ::-1],
    "three quarters": lambda g: np.rot90(g, 3),
    "mirror": lambda g: g[:, ::-1],
    "upside down": lambda g: g[::-1],
    "transposed": lambda g: g.T,
    "other diagonal": lambda g: np.rot90(g[:, ::-1]).copy(),
    "all at once": lambda g: jpeg(np.ascontiguousarray(g[8:, 6:][:, ::-1] * 0.8 + 20).astype(np.uint8), 50),
}


@pytest.fixture
def herd(tmp_path: Path) -> Cohort:
    names = [f"m{i}_{j}" for i in range(6) for j in range(2)]
    for seed, name in enumerate(names):
        write_png(tmp_path / f"{name}.png", texture(seed))
    return Cohort(pd.DataFrame({"image": [str(tmp_path / f"{n}.png") for n in names], "subject": [n[:2] for n in names]}), name="herd")


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_under_another_name_is_fatal(change, herd):
    split = split_cohort(herd)
    assert not find_leaks(split).leaks
    train, test = split.train.table["image"][0], split.test.table["image"][0]
    original = cv2.imread(test, cv2.IMREAD_GRAYSCALE)
    write_png(Path(train), np.ascontiguousarray(CHANGES[change](original)))
    found = find_leaks(split)
    assert [(set(k.images), k.verdict) for k in found.leaks] == [({train, test}, FATAL)]
    with pytest.raises(EqError, match="1 leaks between the parts"):
        check_leaks(split)
    assert check_leaks(split, "known").allowed == "known"
    assert not find_leaks(without_leaks(split, found)).fatal


def test_fields_that_overlap_by_half_are_fatal(tmp_path, herd):
    slide = texture(99, 600, 900)
    split = split_cohort(herd)
    write_png(Path(split.train.table["image"][0]), np.ascontiguousarray(slide[:600, :600]))
    write_png(Path(split.test.table["image"][0]), np.ascontiguousarray(slide[:600, 300:]))
    (leak,) = find_leaks(split).leaks
    assert (leak.kind, leak.verdict) == ("overlap", FATAL)


def test_flat_and_empty_images_are_no_leak(herd):
    "A black field and a white one have no detail to compare; the same black field twice is the same picture."
    split = split_cohort(herd)
    images = split.train.table["image"][0], split.test.table["image"][0]
    write_png(Path(images[0]), np.zeros((64, 64), np.uint8))
    write_png(Path(images[1]), np.full((64, 64), 255, np.uint8))
    assert not find_leaks(split).leaks


def test_a_slide_in_two_folds_and_a_unit_finer_than_the_animal(herd):
    finer = Cohort(herd.table.assign(slide=["s1", "s2"] * 6), name="herd", split_unit="image")
    kinds = {leak.kind for leak in find_leaks(split_cohort(finer)).fatal}
    assert "shared slide" in kinds
    with pytest.raises(EqError, match="shared"):
        check_leaks(split_cohort(finer))


def test_the_command(tmp_path, herd):
    import typer

    from eq.workflows.audit import command

    app = typer.Typer()
    app.command()(command)
    csv = save_cohort(herd, tmp_path / "herd.csv")
    done = CliRunner().invoke(app, [str(csv), "--out", str(tmp_path / "one")])
    assert done.exit_code == 0 and "0 fatal" in done.output
    other = replace(herd, table=herd.table.head(2).assign(subject="z"), name="z")
    done = CliRunner().invoke(app, [str(csv), "--against", str(save_cohort(other, tmp_path / "z.csv")), "--out", str(tmp_path / "two")])
    assert done.exit_code == 1 and "same file" in done.output
    assert (tmp_path / "two" / "report.html").stat().st_size > 10_000
    assert set(pd.read_csv(tmp_path / "two" / "leaks.csv")["verdict"]) == {"fatal"}


@pytest.mark.data
@pytest.mark.parametrize("name", ["em_vnc", "glom_pas", "kidney_ct"])
def test_real_sets_train_without_a_flag(name):
    from eq.data.cohort import USES
    from eq.data.source import load_source

    cohort = load_source(name)
    report = check_leaks(split_cohort(cohort, purpose=USES[cohort.use][0]))
    assert not report.fatal


@pytest.mark.data
def test_sections_dealt_at_random_leak():
    "The mistake that flatters EM results most: neighbours of tested sections in training."
    from eq.data.source import load_source

    stack = load_source("em_vnc")
    report = find_leaks({"train": stack.subset(range(0, 16, 2)), "test": stack.subset(range(1, 16, 2))})
    assert len(report.fatal) >= 8 and {leak.kind for leak in report.fatal} == {"neighbouring sections"}
