"""`eq data quality` as a user types it: the table, the page, exit codes, and what people put into folders."""
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from eq.core.files import TEMP_PREFIX
from eq.data.cohort import Cohort, save_cohort
from eq.data.io import write_ome_tiff, write_png
from eq.reporting.cohort_sheet import write_cohort_sheet
from eq.workflows.cli import main


def waves(seed: int, side: int = 128) -> np.ndarray:
    yy, xx = np.mgrid[:side, :side]
    value = 150 + 50 * np.sin(xx / 3 + seed) * np.sin(yy / 4) + np.random.default_rng(seed).normal(0, 12, (side, side))
    return np.clip(np.stack([value, value * 0.6, value * 0.9], 2), 0, 255).astype(np.uint8)


def eq(capsys, *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["data", "quality", *(str(a) for a in args)])
    return code, *capsys.readouterr()


@pytest.fixture
def mine(tmp_path) -> Path:
    for i in range(8):
        write_png(tmp_path / "mine" / f"field{i}.png", waves(i))
    return tmp_path / "mine"


def test_all_is_well(mine, tmp_path, capsys):
    code, out, err = eq(capsys, mine, "--out", tmp_path / "out")
    assert code == 0, err
    assert out.strip().endswith(f"8 images: 8 accept, 0 warn, 0 refuse: {tmp_path / 'out' / 'index.html'}")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["index.html", "quality.csv"]


def test_everything_that_people_put_into_folders(mine, tmp_path, capsys):
    "Blank, NaN, empty, cut off, tiny, a name that is a script: each has its row and its card, and the exit code is 1."
    write_png(mine / "blank.png", np.full((128, 128, 3), 7, np.uint8))
    write_ome_tiff(mine / "nan.ome.tif", np.full((64, 64), np.nan, np.float32))
    (mine / "empty.tif").write_bytes(b"")
    (mine / "cut.png").write_bytes((mine / "field0.png").read_bytes()[:700])
    write_png(mine / "tiny.png", waves(0)[:9, :9])
    write_png(mine / "x.png", waves(3)).rename(mine / "<script>alert(1)<" "script>.png")
    before = {p: p.read_bytes() for p in mine.iterdir()}
    code, out, _ = eq(capsys, mine, "--out", tmp_path / "out", "--min-px", "32")
    assert code == 1 and "refused: " in out
    assert [line.count("empty.tif") for line in out.splitlines() if "empty.tif" in line] == [1]
    table = pd.read_csv(tmp_path / "out" / "quality.csv", keep_default_na=False)
    verdicts = {Path(r["image"]).name: r["verdict"] for r in table.to_dict("records")}
    assert len(verdicts) == 14 and {verdicts[n] for n in ("blank.png", "nan.ome.tif", "empty.tif", "cut.png", "tiny.png")} == {"refuse"}
    assert all(r["reasons"] for r in table.to_dict("records") if r["verdict"] != "accept")
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count("<article") == 14 and page.count("<script") == 1 and "&lt;script&gt;alert(1)&lt;script&gt;.png" in page
    assert page.count("cannot be read</div>") == 3  # NaN has no picture either
    assert {p: p.read_bytes() for p in mine.iterdir()} == before  # originals are as they were


def test_what_is_wrong_with_the_request(mine, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for args, said in (((mine, "--out", tmp_path / "full"), "not an empty folder"), (("no_such", "--out", tmp_path / "o"), "no_such"),
                       ((mine, "--out", tmp_path / "o", "--like", "no_such"), "no_such"), ((mine, "--out", tmp_path / "o", "--min-px", "-1"), "--min-px"),
                       ((mine, "--out", mine / "field0.png"), "not an empty folder"), ((mine,), "--out")):
        code, _, err = eq(capsys, *args)
        assert code == 2 and said in err, (args, err)
    assert not (tmp_path / "o").exists() and (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_nothing_readable_is_an_error_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    for i in range(3):
        (tmp_path / "bad" / f"{i}.png").write_bytes(b"\x89PNG")
    code, _, err = eq(capsys, tmp_path / "bad", "--out", tmp_path / "out")
    assert code == 2 and "none of 3 images could be measured" in err and not (tmp_path / "out").exists()


def test_a_ct_has_large_pixels_and_a_microscope_has_not(tmp_path, capsys):
    import nibabel

    for i in range(4):
        grey = nibabel.Nifti1Image(waves(i)[..., 0].T.astype(np.uint16), np.diag([0.7, 0.7, 1, 1]))
        grey.header.set_xyzt_units("mm")
        (tmp_path / "ct").mkdir(exist_ok=True)
        nibabel.save(grey, tmp_path / "ct" / f"{i}.nii.gz")
        write_ome_tiff(tmp_path / "converted" / f"{i}.ome.tif", waves(i)[..., 0].astype(np.int16) - 1000, 700.0)  # as eq data convert writes a CT
        write_ome_tiff(tmp_path / "slides" / f"{i}.ome.tif", waves(i), 700.0)
    for name, refused in (("ct", 0), ("converted", 0), ("slides", 4)):
        code, out, err = eq(capsys, tmp_path / name, "--out", tmp_path / f"out_{name}")
        assert code == (1 if refused else 0) and out.count("a wrong unit?") == refused and f"{refused} refuse" in out, (name, out, err)


def test_what_is_no_image_and_no_table(tmp_path, capsys):
    (tmp_path / "c.czi").write_bytes(b"ZISRAWFILE" + bytes(90))
    code, _, err = eq(capsys, tmp_path / "c.czi", "--out", tmp_path / "out")
    assert code == 2 and f"{tmp_path / 'c.czi'} is neither an image that eq reads" in err and "nor a cohort table" in err and err.count("\n") == 1
    code, _, err = eq(capsys, write_png(tmp_path / "a.png", waves(0)), "--out", tmp_path / "out")
    assert code == 2 and "a.png is an image; give the folder that it lies in" in err


def test_like_compares_with_other_images(mine, tmp_path, capsys):
    for i in range(5):
        write_png(tmp_path / "negative" / f"{i}.png", 255 - waves(i))
    assert eq(capsys, tmp_path / "negative", "--out", tmp_path / "a")[0] == 0  # alike among themselves
    code, out, _ = eq(capsys, tmp_path / "negative", "--out", tmp_path / "b", "--like", mine)
    assert code == 1 or "0 accept" in out


def test_a_cohort_with_two_raters_shows_each_image_once(mine, tmp_path, capsys):
    rows = [{"image": str(p), "rater": r, "subject": p.stem, "group": "control", "score": 1} for p in sorted(mine.iterdir()) for r in ("a", "b")]
    csv = save_cohort(Cohort(pd.DataFrame(rows)), tmp_path / "cohort.csv")
    code, _, err = eq(capsys, csv, "--out", tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "quality.csv")
    assert code == 0, err
    assert (len(table), set(table["group"]), table["subject"].tolist()[0]) == (8, {"control"}, "field0")


def test_a_thousand_images_on_one_page(mine, tmp_path):
    images = [str(p) for p in sorted(mine.iterdir())]
    rows = [{"image": images[i % 8], "verdict": ("accept", "warn", "refuse")[i % 3], "reasons": "soft; pale" if i % 3 else ""} for i in range(1000)]
    began = time.perf_counter()
    page = write_cohort_sheet(tmp_path / "index.html", pd.DataFrame(rows), "A thousand")
    text = page.read_text(encoding="utf-8")
    assert len(re.findall('<article class="(\\w+)"', text)) == 1000 and page.stat().st_size < 16e6
    assert time.perf_counter() - began < 120
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(TEMP_PREFIX)]
