"""The verbs around the classifier as a user types them: what they write, what they say, and what they say to wrong input."""
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image as PilImage

from eq.core.results import CheckpointMeta
from eq.workflows.cli import main

META = CheckpointMeta(
    task="classify", arch="resnet18", encoder="", in_channels=3, classes=("Normal", "Tumor"), mean=(0.5,) * 3, std=(0.25,) * 3, scale=1.0, px_size_um=None,
    tile=64, threshold=0.5, tta="none", min_area_px=0, data={"source": "made up", "terms": "none", "unit": "block"}, params={"body": False}, metrics={}, code={},
    parent=None, weights_sha256="0" * 64,
)
Say = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A checkpoint, a folder of numbered slices in two classes (bright squares are tumours), and a text that calls itself a picture."
    from eq.models.checkpoint import save_checkpoint
    from eq.models.classifier import create_classifier

    here, rng = tmp_path_factory.mktemp("verbs"), np.random.default_rng(0)
    save_checkpoint(here / "model", create_classifier("resnet18", seed=0), META)
    for label, level in (("Normal", 60), ("Tumor", 180)):
        (here / "set" / label).mkdir(parents=True)
        for i in range(70):
            PilImage.fromarray(np.clip(rng.normal(level, 15, (40, 40)), 0, 255).astype(np.uint8)).save(here / "set" / label / f"{label}- ({i}).png")
    (here / "set" / "Tumor" / "Tumor- (99).jpg").write_text("not a picture")
    return here


@pytest.fixture
def eq(capfd: pytest.CaptureFixture[str]) -> Say:
    "Exit code of a verb, and all that was printed by it and by what it started."

    def run(*args: object) -> tuple[int, str]:
        code = main(["classify", *map(str, args)])
        out, err = capfd.readouterr()
        return code, out + err

    return run


@pytest.fixture
def pipeline(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "Where the stages work, small and quick."
    values = {"arch": "resnet18", "weights": "none", "image_size": "[64, 64, 3]", "epochs": "1", "batch_size": "16", "freeze": "none", "learning_rate": "0.01",
              "body": "false", "tracker": "none", "augmentation": "false", "paths__source_url": str(made / "set")}
    values |= {f"paths__{k}": str(made / "stages" / k) for k in ("root_dir", "unzip_dir", "base_model", "updated_base_model", "trained_model", "scores", "plots")}
    for key, value in values.items():
        monkeypatch.setenv(f"EQ__CLASSIFY__{key.upper()}", value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return made / "stages"


def test_explain_does_the_good_and_lists_the_bad(made: Path, tmp_path: Path, eq: Say) -> None:
    one, two, bad = made / "set/Normal/Normal- (1).png", made / "set/Tumor/Tumor- (1).png", made / "set/Tumor/Tumor- (99).jpg"
    code, said = eq("explain", one, two, bad, "--model", made / "model", "--method", "layercam", "--target", "Tumor", "--out", tmp_path / "maps")
    assert code == 1 and f"failed: {bad}" in said and "2 done, 1 failed" in said and said.count("are not refused") == 1 and str(tmp_path / "maps" / "index.html") in said, said
    files = {p.name for p in (tmp_path / "maps").iterdir()}
    assert {f"{name}{end}" for name in ("Normal- (1)", "Tumor- (1)") for end in (".png", ".svg", "_surface.html")} <= files
    scores = pd.read_csv(tmp_path / "maps" / "scores.csv")
    assert scores["status"].tolist() == ["done", "done", "failed"] and scores["label"].tolist()[:2] == ["Tumor", "Tumor"]
    assert {"insertion", "deletion", "shuffled", "share_body"} <= set(scores)
    page = (tmp_path / "maps" / "index.html").read_text()
    assert "Tumor- (99).jpg" in page and "deletion" in page and "http" not in page.replace("http-equiv", "")
    assert main(["verify", str(tmp_path / "maps")]) == 0


def test_what_a_folder_holds_besides_is_told(made: Path, tmp_path: Path, eq: Say) -> None:
    for name in ("a.png", "sub/b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes((made / "set/Normal/Normal- (1).png").read_bytes())
    (tmp_path / "in" / "c.czi").write_bytes(b"x")
    for verb, out, table in (("predict", "p.csv", "p.csv"), ("explain", "maps", "maps/scores.csv")):
        code, said = eq(verb, tmp_path / "in", "--model", made / "model", "--no-gate", "--out", tmp_path / out)
        assert code == 0 and "1 done, 2 left out" in said.replace("2 left out, 1 done", "1 done, 2 left out"), said
        assert f"left out: {tmp_path / 'in' / 'c.czi'}: .czi is not read" in said and "for example b.png; folders below are not searched" in said, said
        assert sorted(pd.read_csv(tmp_path / table)["status"]) == ["done", "left out", "left out"]


def write_slice(path: Path, grey: np.ndarray, number: int) -> None:
    "A CT slice of a series."
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    path.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID, data.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"1.2.3.{number}"
    data.SOPClassUID, data.SeriesInstanceUID, data.InstanceNumber, data.ImagePositionPatient = CTImageStorage, "1.2.3", number, [0, 0, number]
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = *grey.shape, 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation, data.PixelData = 7, 0, grey.tobytes()
    data.save_as(path, enforce_file_format=True)


def test_what_is_no_single_picture(made: Path, tmp_path: Path, eq: Say) -> None:
    "The three verbs agree: the slices of a series are pictures, whatever they are called, an OME-Zarr is one, and planes that were not looked at are told."
    import zarr

    axes = [{"name": a, "type": "space", "unit": "micrometer"} for a in "yx"]
    sets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [0.25, 0.25]}]}]
    group = zarr.open_group(str(tmp_path / "x.zarr"), mode="w", zarr_format=3, attributes={"ome": {"version": "0.5", "multiscales": [{"axes": axes, "datasets": sets}]}})
    rng = np.random.default_rng(0)
    greys = [rng.integers(0, 255, (64, 64), dtype=np.uint8) for _ in range(5)]
    for i, name in enumerate(("IM1", "IM2", "3.dcm", "IM4", "IM5")):
        write_slice(tmp_path / "ct" / name, greys[i], i)
    PilImage.fromarray(greys[0]).save(tmp_path / "stack.tif", save_all=True, append_images=[PilImage.fromarray(g) for g in greys[1:3]])
    group.create_array("0", shape=(64, 64), chunks=(64, 64), dtype="uint8")[:] = greys[3]
    given = (tmp_path / "ct", tmp_path / "stack.tif", tmp_path / "x.zarr")
    for verb, table in (("predict", ""), ("explain", "scores.csv"), ("embed", "embedding.csv")):
        code, said = eq(verb, *given, "--model", made / "model", *([] if verb == "embed" else ["--no-gate"]), "--out", tmp_path / verb)
        assert code == 0 and "7 done" in said and "2 of 3 planes were not looked at" in said, said
        rows = pd.read_csv(tmp_path / verb / table if table else tmp_path / verb).set_index("image")
        assert {Path(p).name for p in rows.index} == {"IM1", "IM2", "3.dcm", "IM4", "IM5", "stack.tif", "x.zarr"}
        assert "2 of 3 planes" in str(rows["note"][str(tmp_path / "stack.tif")]), rows["note"]


def test_predict_to_a_file_names_what_it_did_not_do(made: Path, tmp_path: Path, eq: Say) -> None:
    bad = made / "set/Tumor/Tumor- (99).jpg"
    code, said = eq("predict", bad, made / "set/Tumor/Tumor- (1).png", "--model", made / "model", "--out", tmp_path / "p.csv")
    assert code == 1 and f"failed: {bad}" in said and "1 done, 1 failed" in said.replace("1 failed, 1 done", "1 done, 1 failed"), said
    (tmp_path / "nothing").mkdir()
    code, said = eq("predict", made / "set/Normal", tmp_path / "nothing", "--model", made / "model", "--out", tmp_path / "p.csv")
    assert code == 2 and f"no image in {tmp_path / 'nothing'}" in said, said


def test_a_gate_that_cannot_refuse_is_told_and_every_gate_is_asked(made: Path, tmp_path: Path, eq: Say) -> None:
    from eq.data.pictures import Pictures
    from eq.inference.picture_gate import fit_picture_gate

    one, rng = made / "set/Tumor/Tumor- (1).png", np.random.default_rng(0)
    code, said = eq("predict", one, "--model", made / "model", "--out", tmp_path / "p.csv")
    assert code == 0 and said.count("warning: pictures unlike the training pictures are not refused") == 1 and "model has no picture_gate.json" in said, said
    assert "are not refused" in pd.read_csv(tmp_path / "p.csv")["note"][0] and "done: " not in said
    assert "warning" not in eq("predict", one, "--model", made / "model", "--no-gate", "--out", tmp_path / "p.csv")[1]
    shutil.copytree(made / "model", tmp_path / "gated")
    dark = np.clip(rng.normal(60, 15, (30, 64, 64, 3)), 0, 255).astype(np.uint8)
    fit_picture_gate(tmp_path / "gated", Pictures(dark, np.arange(30) % 2, ("Normal", "Tumor"), ("x",) * 30, tuple(map(str, range(30))), {}), device="cpu")
    PilImage.fromarray(np.kron([[0, 255], [255, 0]], np.ones((32, 32))).astype(np.uint8)).save(tmp_path / "board.png")
    for models in (("gated",), ("bare", "gated"), ("gated", "bare")):
        named = [x for m in models for x in ("--model", tmp_path / "gated" if m == "gated" else made / "model")]
        code, said = eq("predict", tmp_path / "board.png", *named, "--out", tmp_path / "p.csv")
        assert code == 0 and f"refused: {tmp_path / 'board.png'}: unlike the training pictures" in said and "1 refused" in said and "warning" not in said, said


def test_predict_says_what_an_image_takes(made: Path, tmp_path: Path, eq: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    import re
    import time

    from eq.data.pictures import read_picture

    monkeypatch.setattr("eq.inference.classify.read_picture", lambda *a: (time.sleep(0.5), read_picture(*a))[1])
    code, said = eq("predict", made / "set/Tumor/Tumor- (1).png", "--model", made / "model", "--no-gate", "--out", tmp_path / "p.csv")
    found = re.search(r"an image took ([\d.]+) ms in the network alone \(batch size 1\), ([\d.]+) ms with reading", said)
    assert code == 0 and found and float(found[1]) > 0 and float(found[2]) >= 500, said  # reading counts


def test_explain_takes_kidney_masks(made: Path, tmp_path: Path, eq: Say) -> None:
    one, two = made / "set/Normal/Normal- (1).png", made / "set/Tumor/Tumor- (1).png"
    (tmp_path / "masks").mkdir()
    PilImage.fromarray(np.full((40, 40), 255, np.uint8)).save(tmp_path / "masks" / "Normal- (1).png")
    code, said = eq("explain", one, two, "--model", made / "model", "--kidney", tmp_path / "masks", "--out", tmp_path / "maps")
    assert code == 0 and "2 done" in said, said
    scores = pd.read_csv(tmp_path / "maps" / "scores.csv")
    assert scores["share_kidney"][0] == pytest.approx(1) and np.isnan(scores["share_kidney"][1]) and scores["kidney"][1] == "no mask of this name"
    assert main(["verify", str(tmp_path / "maps")]) == 0
    code, said = eq("explain", one, "--model", made / "model", "--kidney", tmp_path, "--out", tmp_path / "none")
    assert code == 2 and "has the name of a picture" in said, said


def test_embed_lists_what_no_reader_takes(made: Path, tmp_path: Path, eq: Say) -> None:
    for i in range(6):
        (tmp_path / "in" / "Normal").mkdir(parents=True, exist_ok=True)
        shutil.copy(made / "set" / "Normal" / f"Normal- ({i}).png", tmp_path / "in" / "Normal")
    for name in ("a.bmp", "b.webp"):
        (tmp_path / "in" / "Normal" / name).write_bytes(b"x")
    write_slice(tmp_path / "in" / "Normal" / "IM1", np.zeros((64, 64), np.uint8), 1)
    code, said = eq("embed", tmp_path / "in", "--model", made / "model", "--out", tmp_path / "alike")
    assert code == 0 and "6 done, 3 left out" in said and "add .dcm" in said and ".webp is not read" in said, said
    table = pd.read_csv(tmp_path / "alike" / "embedding.csv")
    assert [Path(p).name for p in table["image"][table["status"] == "left out"]] == ["IM1", "a.bmp", "b.webp"]


def test_embed_a_folder_of_classes(made: Path, tmp_path: Path, eq: Say) -> None:
    "Two unbroken runs a class, one of them longer than a block: no neighbour comes from the picture's own run, though its blocks touch."
    for label in ("Normal", "Tumor"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for i in (*range(20), *range(40, 50)):
            shutil.copy(made / "set" / label / f"{label}- ({i}).png", tmp_path / "set" / label)
    shutil.copy(made / "set" / "Tumor" / "Tumor- (99).jpg", tmp_path / "set" / "Tumor")
    code, said = eq("embed", tmp_path / "set", "--model", made / "model", "--dims", "3", "--out", tmp_path / "alike", "--neighbours", "3")
    assert code == 1 and "60 done, 1 failed" in said and "Rand index" in said and "slices of the same unbroken run are left out" in said, said
    assert "have the class of the picture, 30 % would by chance" in said, said  # (20 x 10/40 + 10 x 20/50) / 30
    table, near = (pd.read_csv(tmp_path / "alike" / name) for name in ("embedding.csv", "neighbours.csv"))
    assert table["label"].value_counts().to_dict() == {"Normal": 30, "Tumor": 30} and {"x", "y", "z", "cluster", "block", "run"} <= set(table)
    assert len(near) == 3 * 60 and np.mean(near["label"] == near["neighbour_label"]) > 0.9  # brightness alone tells these apart
    run = dict(zip(table["image"], table["run"], strict=True))
    assert not [pair for pair in zip(near["image"], near["neighbour"], strict=True) if run[pair[0]] == run[pair[1]]]
    assert "plotly" in (tmp_path / "alike" / "index.html").read_text()[:100_000].lower() and (tmp_path / "alike" / "embedding.png").stat().st_size > 1000


def test_export_compares_and_lists(made: Path, tmp_path: Path, eq: Say) -> None:
    code, said = eq("export", "--model", made / "model", "--format", "torch-export", "--images", made / "set" / "Tumor", "--out", tmp_path / "exports")
    assert code == 0 and f"skipped: {made / 'set/Tumor/Tumor- (99).jpg'}" in said and "100.0 %" in said, said
    table = pd.read_csv(tmp_path / "exports" / "exports.csv")
    assert table["format"].tolist() == ["torch", "torch-export"] and min(table["ms"]) > 0 and max(table["max_difference"]) < 1e-3
    assert (tmp_path / "exports" / "torch-export" / "model.pt2").is_file()


def test_card_takes_scores_of_this_network_only(made: Path, tmp_path: Path, eq: Say) -> None:
    assert eq("card", "--model", made / "model", "--out", tmp_path / "card.md", "--licence", "CC BY 4.0")[0] == 0
    text = (tmp_path / "card.md").read_text()
    assert "made up" in text and "CC BY 4.0" in text and "Not measured." in text and (made / "model").as_posix() in text
    (tmp_path / "scores.json").write_text(json.dumps({"verdict": "x", "weights_sha256": "f" * 64}))
    code, said = eq("card", "--model", made / "model", "--out", tmp_path / "card.md", "--scores", tmp_path / "scores.json")
    assert code == 2 and "run `eq classify evaluate` again" in said


WRONG = {
    "no model": (["explain", "{one}", "--model", "nowhere"], "nowhere"),
    "method": (["explain", "{one}", "--model", "{model}", "--method", "gradcam+"], "did you mean 'gradcam"),
    "class": (["explain", "{one}", "--model", "{model}", "--target", "tumour"], "choose from ['Normal', 'Tumor']"),
    "text as picture": (["explain", "{bad}", "--model", "{model}"], "none of 1 pictures could be explained"),
    "no picture": (["explain", "{model}", "--model", "{model}"], "no image in"),
    "layout": (["embed", "{set}", "--model", "{model}", "--method", "tsen"], "did you mean 'tsne'?"),
    "dimensions": (["embed", "{set}", "--model", "{model}", "--dims", "4"], "valid: 2 or 3"),
    "too few": (["embed", "{one}", "--model", "{model}"], "an embedding needs 5"),
    "embed what": (["embed", "{model}", "--model", "{model}"], "no image in"),
    "format": (["export", "--model", "{model}", "--format", "onx"], "did you mean 'onnx'?"),
    "export on what": (["export", "--model", "{model}", "--format", "onnx"], "--images FOLDER"),
    "steps": (["rate", "--steps", "3"], "10 steps or more"),
    "processes": (["train", "--processes", "0"], "--processes"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_input_is_one_clear_line(made: Path, tmp_path: Path, eq: Say, name: str) -> None:
    args, says = WRONG[name]
    places = {"one": made / "set/Normal/Normal- (1).png", "bad": made / "set/Tumor/Tumor- (99).jpg", "set": made / "set", "model": made / "model"}
    out = [] if args[0] == "train" else ["--out", str(tmp_path / "out")]
    code, said = eq(*[a.format(**places) for a in args], *out)
    lines = [line for line in said.splitlines() if line.startswith("eq: error: ")]
    assert code == 2 and len(lines) == 1 and says in lines[0] and "Traceback" not in said, said


def test_a_missing_library_names_its_extra(made: Path, tmp_path: Path, eq: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("plotly", "plotly.graph_objects"):
        monkeypatch.setitem(sys.modules, module, None)
    for verb, extra in (("embed", "eq[embed]"), ("explain", "eq[explain]")):
        code, said = eq(verb, made / "set", "--model", made / "model", "--out", tmp_path / verb)
        assert code == 2 and extra in said and not (tmp_path / verb).exists(), said


def test_a_rate_then_training_in_two_processes(pipeline: Path, eq: Say) -> None:
    "The stages as they are typed; two processes train, one of them writes, and what they print is seen."
    pytest.importorskip("accelerate", reason='needs pip install "eq[ddp]"')
    assert eq("train", "--processes", "2")[0] == 2  # nothing is there yet: said before anything is started
    for verb in ("ingest", "prepare"):
        assert eq(verb)[0] == 0
    code, said = eq("rate", "--steps", "12", "--low", "1e-4")
    assert code == 0 and "learning_rate is 0.01" in said and len(pd.read_csv(pipeline / "root_dir" / "rate" / "rates.csv")) <= 12, said
    code, said = eq("train", "--processes", "2")
    assert code == 0 and "valid_accuracy" in said and said.count("calibrated") == 1 and "Traceback" not in said, said
    run = pipeline / "trained_model"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "done" and "--processes 2" in manifest["command"] and main(["verify", str(run)]) == 0
    code, said = eq("train", "--processes", "2", "--resume")
    assert code == 2 and f"nothing to resume: no run was cut off in {run}.unfinished; that in {run} is finished" in said, said
    run.rename(pipeline / "trained_model.unfinished")  # as if it had been killed before it took its place
    assert "no finished training" in eq("evaluate")[1]
    code, said = eq("train", "--processes", "2", "--resume")
    assert code == 0 and "valid_accuracy" in said and json.loads((run / "manifest.json").read_text())["status"] == "done", said
    history = pd.read_csv(run / "history.csv")
    split = {row["part"]: row["images"] for row in manifest["metrics"]["split"]}
    assert history["images"].tolist() == [split["train"]]  # together they saw each picture once
