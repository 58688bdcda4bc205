"`eq data` as a user types it: what is printed, what is written, and the exit code."

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from eq.core.registry import EqError
from eq.data.cohort import load_cohort
from eq.data.io import write_png
from eq.data.source import SOURCES, load_source
from eq.data.source_synthetic import load_synthetic
from eq.data.split import split_cohort
from eq.workflows.cli import main
from eq.workflows.data import app


def run(*args: object) -> tuple[int, str]:
    "Exit code and output of one command; an EqError comes out as it is."
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)


def disc(value: int = 255) -> np.ndarray:
    rows, cols = np.indices((16, 20))
    return (((rows - 8) ** 2 + (cols - 10) ** 2) < 25).astype(np.uint8) * value


LAYOUTS = {
    "side by side": ("images/{}.png", "masks/{}.png"),
    "below": ("{}.png", "masks/{}.png"),
    "same folder": ("{}.png", "{}_mask.png"),
    "both named": ("{}_image.png", "{}_label.png"),
    "other words": ("raw/{}.png", "ground_truth/{}_gt.png"),
    "parts above": ("train/images/{}.png", "train/masks/{}.png"),
    "parts below": ("images/train/{}.png", "masks/train/{}.png"),
}


def fill(folder: Path, layout: str, names: tuple[str, ...] = ("m1_a", "m1_b", "m2_a", "m3_a", "m4_a")) -> Path:
    for i, name in enumerate(names):
        image, mask = (folder / pattern.format(name) for pattern in LAYOUTS[layout])
        image.parent.mkdir(parents=True, exist_ok=True)
        mask.parent.mkdir(parents=True, exist_ok=True)
        write_png(image, picture(i))
        write_png(mask, disc())
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_organize_recognises_the_usual_layouts(tmp_path: Path, layout: str) -> None:
    folder = fill(tmp_path / "mine", layout)
    code, said = run("organize", folder, "--subject", "(m[0-9]+)_", "--task", "glom", "--px-size-um", "0.5")
    assert code == 0 and "5 pairs of image and mask, masks coded grey127" in said
    cohort = load_source(folder)
    assert (len(cohort), cohort.split_unit, cohort.units, cohort.task) == (5, "subject", ["m1", "m2", "m3", "m4"], "glom")
    assert set(cohort.table["px_size_um"]) == {0.5}
    assert set(cohort.table["part"]) == ({"train"} if "parts" in layout else {""})
    assert run("validate", folder) == (0, "5 images of mine: no problem found\n")


def test_what_organize_cannot_place_is_listed(tmp_path: Path) -> None:
    folder = fill(tmp_path / "mine", "side by side")
    write_png(folder / "images" / "alone.png", picture(9))
    write_png(folder / "masks" / "orphan.png", disc())
    (folder / "images" / "m1_a.tif").write_bytes(b"")
    code, said = run("organize", folder, "--out", tmp_path / "out" / "mine.csv")
    assert code == 0 and "4 pairs" in said
    assert "1 images without a mask; not in the cohort:" in said and "alone.png" in said
    assert "1 masks without an image:" in said and "orphan.png" in said
    assert "1 names that fit several files; not in the cohort:\n  m1_a: " in said
    assert "each image is its own unit of splitting" in said
    assert len(load_source(tmp_path / "out" / "mine.csv")) == 4


@pytest.mark.parametrize(("value", "coding"), [(255, "grey127"), (1, "label")])
def test_the_coding_of_masks_is_recognised(tmp_path: Path, value: int, coding: str) -> None:
    write_png(tmp_path / "a.png", picture(0))
    write_png(tmp_path / "a_mask.png", disc(value))
    assert f"masks coded {coding}" in run("organize", tmp_path)[1]
    assert run("validate", tmp_path)[0] == 0


def test_an_organised_folder_can_be_moved(tmp_path: Path) -> None:
    folder = fill(tmp_path / "before", "side by side")
    run("organize", folder)
    folder.rename(tmp_path / "after")
    assert run("validate", tmp_path / "after")[0] == 0


def test_what_was_edited_is_not_replaced(tmp_path: Path) -> None:
    folder = fill(tmp_path / "mine", "same folder")
    run("organize", folder)
    before = (folder / "cohort.csv").read_bytes()
    with pytest.raises(EqError, match="exists already"):
        run("organize", folder)
    assert (folder / "cohort.csv").read_bytes() == before


def test_parts_written_into_the_csv_are_used(tmp_path: Path) -> None:
    folder = fill(tmp_path / "mine", "same folder")
    run("organize", folder, "--subject", "(m[0-9]+)_")
    table = pd.read_csv(folder / "cohort.csv", dtype=str, keep_default_na=False)
    table["part"] = ["train", "train", "train", "validate", "test"]
    table.to_csv(folder / "cohort.csv", index=False)
    assert split_cohort(load_source(folder)).test.units == ["m4"]
    assert "split:          declared: train 3 images of 2 subjects" in run("show", folder)[1]
    table["part"] = ["train", "test", "train", "validate", "test"]
    table.to_csv(folder / "cohort.csv", index=False)
    with pytest.raises(EqError, match="subject 'm1' is in both train and test"):
        split_cohort(load_source(folder))
    assert "none (subject 'm1' is in both" in run("show", folder)[1]


@pytest.mark.parametrize("kind", ["csv", "xlsx"])
def test_scores_are_joined_and_leftovers_listed(tmp_path: Path, kind: str) -> None:
    folder = fill(tmp_path / "mine", "side by side")
    sheet = pd.DataFrame({"Picture": ["M1 A.tif", "m2_a.png", "m9_z", "m3_a"], "Endotheliosis grade": [2, 0.5, 1, None]})
    path = tmp_path / f"sheet.{kind}"
    sheet.to_csv(path, index=False) if kind == "csv" else sheet.to_excel(path, index=False)
    code, said = run("scores", path, "--source", folder, "--out", tmp_path / "scored.csv")
    assert code == 0 and "2 rows of the sheet matched by image" in said
    assert "1 names in the sheet without an image:\n  m9_z" in said
    assert "1 names in the sheet without a score:\n  m3_a" in said
    assert "3 images without a score:" in said and "m4_a.png" in said
    scored = load_cohort(tmp_path / "scored.csv").table
    assert [Path(p).stem for p in scored["image"]] == ["m1_a", "m1_b", "m2_a", "m3_a", "m4_a"]
    assert scored["score"].fillna(-1).tolist() == [2, -1, 0.5, -1, -1]
    assert run("scores", path, "--source", folder, "--out", tmp_path / "strict.csv", "--strict")[0] == 1


def test_scores_of_animals_go_to_their_images(tmp_path: Path) -> None:
    folder = fill(tmp_path / "mine", "side by side")
    run("organize", folder, "--subject", "(m[0-9]+)_")
    (tmp_path / "sheet.csv").write_text("mouse;score;treatment\nM1;1,5;treated\nM2;0;control\nM3;3;treated\nM4;2;control\n")
    code, said = run("scores", tmp_path / "sheet.csv", "--source", folder, "--out", tmp_path / "scored.csv", "--strict")
    assert code == 0 and "4 rows of the sheet matched by subject" in said
    scored = load_cohort(tmp_path / "scored.csv")
    assert scored.table["score"].tolist() == [1.5, 1.5, 0, 3, 2]
    assert set(split_cohort(scored, k=2).test.table["group"]) == {"control", "treated"}


def test_the_columns_can_be_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "mine", "side by side")
    (tmp_path / "sheet.csv").write_text("a,b\nm1_a,1\n")
    asked = ("scores", tmp_path / "sheet.csv", "--source", folder, "--out", tmp_path / "x.csv")
    with pytest.raises(EqError, match="no column for the subject"):
        run(*asked)
    assert run(*asked, "--column", "image=a", "--column", "score=b")[0] == 0


def spoil(folder: Path) -> dict[str, str]:
    "Break one pair in each way; what `validate` should call it."
    write_png(folder / "masks" / "m1_a.png", disc()[:-1])
    write_png(folder / "masks" / "m1_b.png", disc() * 0)
    write_png(folder / "images" / "m2_a.png", np.full((16, 20, 3), 7, np.uint8))
    (folder / "images" / "m3_a.png").write_bytes((folder / "images" / "m3_a.png").read_bytes()[:60])
    (folder / "masks" / "m4_a.png").unlink()
    return {"m1_a": "size mismatch", "m1_b": "empty mask", "m2_a": "constant image", "m3_a": "unreadable image", "m4_a": "unreadable mask"}


def test_validate_lists_every_bad_pair_at_once(tmp_path: Path) -> None:
    folder = fill(tmp_path / "mine", "side by side")
    run("organize", folder)
    wrong = spoil(folder)
    code, said = run("validate", folder)
    assert code == 1 and "5 problems in 5 of 5 images" in said
    for name, problem in wrong.items():
        assert any(line.strip().startswith(problem) and name in line for line in said.splitlines()), (name, problem, said)


def test_patches_are_a_source_and_keep_the_split(tmp_path: Path) -> None:
    folder = fill(tmp_path / "mine", "side by side")
    run("organize", folder, "--subject", "(m[0-9]+)_", "--task", "glom")
    code, said = run("export-patches", folder, "--out", tmp_path / "patches", "--size", "8", "--overlap", "2")
    assert code == 0 and "45 patches of 5 images" in said  # 3 x 3 tiles cover 16 x 20
    patches = load_source(said.rsplit(": ", 1)[-1].strip())
    assert (patches.units, patches.split_unit, patches.task) == (["m1", "m2", "m3", "m4"], "subject", "glom")
    assert run("validate", tmp_path / "patches" / "patches.csv", "--allow-empty")[0] == 0


def test_list_names_every_source_without_opening_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQ__DATA__ROOT", "/nonexistent")
    code, said = run("list")
    assert code == 0 and all(name in said for name in SOURCES)


@pytest.mark.parametrize("name", [n for n in SOURCES if not SOURCES[n].synthetic and n != "folder"])
def test_missing_images_say_where_they_should_be(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EQ__DATA__ROOT", "/nonexistent")
    assert main(["data", "show", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("eq: error: ") and error.count("\n") == 1 and "EQ__DATA__ROOT" in error


BAD = {
    "an unknown source": (["show", "em_vn"], "did you mean 'em_vnc'?"),
    "an unknown folder": (["organize", "no/folder"], "no folder of that name"),
    "a folder without images": (["organize", "{tmp}"], "no image"),
    "an unknown coding": (["organize", "{tmp}", "--coding", "gray127"], "did you mean 'grey127'?"),
    "a pattern without group": (["organize", "{tmp}", "--subject", "m1"], "has 0 groups"),
    "a source without --out": (["organize", "em_vnc"], "give --out"),
    "no sheet": (["scores", "{tmp}/none.csv", "--source", "{tmp}/cohort.csv", "--out", "{tmp}/x.csv"], "no score sheet"),
    "no such command": (["shwo"], "No such command"),
    "a bad number": (["organize", "{tmp}", "--px-size-um", "small"], "px-size-um"),
    "a negative pixel size": (["organize", "{full}", "--px-size-um", "-1"], "px_size_um"),
    "an output that is a file": (["organize", "{full}", "--out", "{full}/m1_a.png/x.csv"], "m1_a.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    full = fill(tmp_path / "full", "same folder")
    args, message = BAD[case]
    places = {"tmp": str(tmp_path / "empty"), "full": str(full)}
    if case == "no sheet":
        (tmp_path / "empty" / "cohort.csv").write_text("image\nx.png\n")
    assert main(["data", *(a.format(**places) for a in args)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("eq: error: ") and error.count("\n") == 1 and message in error, error
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".tmp")]


def test_listing_sources_imports_no_network() -> None:
    heavy = "[m for m in ('torch', 'fastai', 'cv2', 'skimage') if m in sys.modules]"
    code = f"import sys; from eq.workflows.cli import main; main(['data', 'list']); print({heavy})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"EQ__DATA__ROOT": "/nonexistent"})
    assert out.stdout.splitlines()[-1] == "[]", out.stdout + out.stderr


def test_an_interrupted_synthetic_cohort_is_painted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQ__OUTPUTS", str(tmp_path))
    first = load_synthetic("synthetic_em", seed=7, n_sections=3, size=96)
    image = Path(first.table["image"][0])
    before = image.read_bytes()
    (image.parent.parent / "cohort.csv").unlink()  # written last: without it the folder counts as unfinished
    image.write_bytes(b"half")
    again = load_synthetic("synthetic_em", seed=7, n_sections=3, size=96)
    assert image.read_bytes() == before and len(again) == 3 and again.synthetic


def test_a_mask_of_several_slices_is_said_to_be_read_at_one(tmp_path: Path) -> None:
    import nibabel

    write_png(tmp_path / "images" / "a.png", np.arange(48, dtype=np.uint8).reshape(6, 8))
    (tmp_path / "masks").mkdir()
    volume = np.zeros((8, 6, 5), np.uint8)
    volume[2:5, 2:4, 3] = 255
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "masks" / "a.nii")
    pd.DataFrame({"image": ["images/a.png"], "mask": ["masks/a.nii"], "mask_coding": ["grey127"]}).to_csv(tmp_path / "set.csv", index=False)
    code, said = run("validate", str(tmp_path / "set.csv"))
    assert code == 1 and "its largest value is [0, 0, 0]; 4 of 5 planes were not looked at: only Z=0 of 5 was read" in said, said
    code, said = run("validate", str(tmp_path / "set.csv"), "--allow-empty")
    assert code == 0 and f"1 files of which one plane is read:\n  {tmp_path / 'masks' / 'a.nii'}: 4 of 5 planes were not looked at" in said, said


def test_what_no_reader_takes_is_listed(tmp_path: Path) -> None:
    full = fill(tmp_path / "full", "same folder")
    (full / "c.czi").write_bytes(b"x")
    for args in (("validate", str(full)), ("organize", str(full), "--out", str(tmp_path / "x.csv"))):
        said = run(*args)[1]
        assert f"1 files of formats that eq does not read; not in the cohort:\n  {full / 'c.czi'}\n" in said, said
