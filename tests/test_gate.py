"""The gate as a user meets it: written by training, asked by prediction, refused when it is damaged, absent in old checkpoints."""
import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import eq.inference.glance as glance
from eq.core.files import sha256_file
from eq.core.provenance import verify_run
from eq.core.registry import EqError
from eq.core.results import CheckpointMeta
from eq.data.cohort import Cohort
from eq.data.io import open_image, write_ome_tiff, write_png
from eq.inference.gate import BANK, REFERENCE, admit, fit_gate, load_gate
from eq.models.checkpoint import save_checkpoint
from eq.models.unet import create_unet
from eq.workflows.cli import main
from eq.workflows.train import TrainRequest, train_segmentation

ENCODER = "tu-mobilenetv3_small_050"  # small, so that tests are fast
META = CheckpointMeta(
    task="glom", arch="unet", encoder=ENCODER, in_channels=3, classes=("glomerulus",), mean=(0.5,) * 3, std=(0.25,) * 3, scale=2.0, px_size_um=0.5,
    tile=64, threshold=0.5, tta="none", min_area_px=20, data={}, params={}, metrics={}, code={}, parent=None, weights_sha256="0" * 64,
)


def field(seed: int, side: int = 160) -> np.ndarray:
    "A texture in pink, each a little different."
    yy, xx = np.mgrid[:side, :side]
    rng = np.random.default_rng(seed)
    waves = 150 + 45 * np.sin(xx / (3 + rng.uniform(0, 0.4)) + seed) * np.sin(yy / 4 + seed) + rng.normal(0, 12, (side, side))
    return np.clip(np.stack([waves, waves * 0.6, waves * 0.9], 2), 0, 255).astype(np.uint8)


def fields(folder: Path, seeds: range) -> Cohort:
    paths = [str(write_ome_tiff(folder / f"field{s}.ome.tif", field(s), 0.5)) for s in seeds]
    return Cohort(pd.DataFrame({"image": paths, "subject": [f"m{s}" for s in seeds]}))


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    "A folder with checkpoint `model` (with a gate), `old` (without), and images: one of the same kind, one blank."
    folder = tmp_path_factory.mktemp("lab")
    for name in ("model", "old"):
        save_checkpoint(folder / name, create_unet("unet", ENCODER, seed=0), META)
    fit_gate(folder / "model", fields(folder / "training", range(10)), fields(folder / "validation", range(10, 13)), device="cpu")
    (folder / "images").mkdir()
    write_ome_tiff(folder / "images" / "same.ome.tif", field(20), 0.5)
    write_ome_tiff(folder / "images" / "blank.ome.tif", np.full((160, 160, 3), 200, np.uint8), 0.5)
    return folder


def eq(capsys, *args: object) -> tuple[int, str, str]:
    "Exit code, standard output and error of one command, in this process."
    capsys.readouterr()
    code = main([str(a) for a in args])
    return code, *capsys.readouterr()


def predict(capsys, lab: Path, out: Path, *more: object, model: str = "model") -> tuple[int, str, str]:
    return eq(capsys, "predict", lab / "images", "--model", lab / model, "--out", out, "--backend", "torch", "--device", "cpu", *more)


# ---- prediction ------------------------------------------------------------------------------------------------------------------------


def test_a_refused_image_is_marked_and_segmented(lab, tmp_path, capsys):
    code, out, err = predict(capsys, lab, tmp_path / "out")
    assert code == 0, err
    assert "gate: " in out and "1 refuse" in out and "2 of 2 images segmented" in out
    table = pd.read_csv(tmp_path / "out" / "summary.csv", keep_default_na=False).set_index("folder")
    assert table["gate"].to_dict() == {"same": "accept", "blank": "refuse"} and table.loc["same", "gate_reasons"] == ""
    assert "blank: grey values vary" in table.loc["blank", "gate_reasons"] and float(table.loc["blank", "gate_distance"]) > 1
    assert (tmp_path / "out" / "blank" / "mask.ome.tif").is_file()
    result = json.loads((tmp_path / "out" / "blank" / "result.json").read_text())
    assert result["gate"] == "refuse" and result["status"] == "done"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert any("refused by the gate" in w for w in manifest["warnings"]) and manifest["metrics"]["gate"] == {"accept": 1, "refuse": 1}
    assert {Path(i["path"]).name for i in manifest["inputs"]} >= {BANK, REFERENCE} and verify_run(tmp_path / "out").ok


def test_enforce_skips_what_is_refused_and_off_does_not_look(lab, tmp_path, capsys):
    code, out, _ = predict(capsys, lab, tmp_path / "strict", "--gate", "enforce")
    table = pd.read_csv(tmp_path / "strict" / "summary.csv", keep_default_na=False)
    assert code == 0 and "1 of 2 images segmented" in out and not (tmp_path / "strict" / "blank").exists()
    assert sorted(table["status"]) == ["done", "refused"]
    code, out, _ = predict(capsys, lab, tmp_path / "off", "--gate", "off")
    assert code == 0 and set(pd.read_csv(tmp_path / "off" / "summary.csv")["gate"]) == {"off"}
    code, _, err = predict(capsys, lab, tmp_path / "bad", "--gate", "on")
    assert code == 2 and "choose from" in err and "enforce" in err and not (tmp_path / "bad").exists()
    code, _, err = predict(capsys, lab, tmp_path / "off", "--resume")
    assert code == 2 and "was begun with other settings: gate 'off', now 'mark'" in err


def test_a_checkpoint_without_a_gate_says_so(lab, tmp_path, capsys):
    code, out, _ = predict(capsys, lab, tmp_path / "out", model="old")
    table = pd.read_csv(tmp_path / "out" / "summary.csv", keep_default_na=False)
    assert code == 0 and "2 no-gate" in out and set(table["gate"]) == {"no-gate"} and "fit_gate" in table["gate_reasons"][0]


# ---- what is damaged or foreign --------------------------------------------------------------------------------------------------------


def copy(lab: Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for path in (lab / "model").iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("seed", range(12))
def test_one_flipped_bit_is_noticed(lab, tmp_path, seed):
    "In the embeddings anywhere; in the description a changed value that is still JSON may only pass when nothing else was changed by it."
    rng, model = np.random.default_rng(seed), copy(lab, tmp_path / "model")
    data = bytearray((model / BANK).read_bytes())
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    (model / BANK).write_bytes(data)
    with pytest.raises(EqError, match="damaged or from another checkpoint"):
        load_gate(model, "cpu")


@pytest.mark.parametrize("cut", [0, 1, 50, 400])
def test_a_torn_description_is_refused(lab, tmp_path, capsys, cut):
    model = copy(lab, tmp_path / "model")
    (model / REFERENCE).write_bytes((model / REFERENCE).read_bytes()[:cut])
    code, _, err = eq(capsys, "predict", lab / "images", "--model", model, "--out", tmp_path / "out", "--backend", "torch")
    assert code == 2 and "gate.json" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("change", [{"distance": "cosine"}, {"wider": "near"}, {"extra": 1}, {"usual": None}, {"weights_sha256": "0" * 64}])
def test_a_description_with_other_values_is_refused(lab, tmp_path, change):
    model = copy(lab, tmp_path / "model")
    (model / REFERENCE).write_text(json.dumps(json.loads((model / REFERENCE).read_text()) | change))
    with pytest.raises(EqError):
        load_gate(model, "cpu")


class Payload:
    "Writes a file when it is unpickled."

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_its_place_never_runs(lab, tmp_path):
    model = copy(lab, tmp_path / "model")
    (model / BANK).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    text = json.loads((model / REFERENCE).read_text())
    (model / REFERENCE).write_text(json.dumps(text | {"bank_sha256": sha256_file(model / BANK)}))  # whoever forges one forges the other
    with pytest.raises(EqError, match="not a safetensors file"):
        load_gate(model, "cpu")
    assert not (tmp_path / "ran").exists()


# ---- where it comes from ---------------------------------------------------------------------------------------------------------------


def test_the_same_images_give_the_same_gate(lab, tmp_path):
    "To the last bit, and in another folder: nothing is drawn."
    model = copy(lab, tmp_path / "model")
    before = (model / REFERENCE).read_bytes(), (model / BANK).read_bytes()
    fit_gate(model, fields(tmp_path / "t", range(10)), fields(tmp_path / "v", range(10, 13)), device="cpu")
    assert ((model / REFERENCE).read_bytes(), (model / BANK).read_bytes()) == before


def test_training_writes_a_gate_and_never_looks_at_test_images(tmp_path, monkeypatch):
    rng, rows = np.random.default_rng(0), []
    for i in range(6):
        mask = (np.hypot(*(np.mgrid[:96, :96] - rng.uniform(25, 70, (2, 1, 1)))) < 14).astype(np.uint8)
        write_png(tmp_path / f"{i}.png", np.clip(90 + 70 * mask[..., None] + rng.normal(0, 20, (96, 96, 3)), 0, 255).astype(np.uint8))
        write_png(tmp_path / f"{i}_mask.png", mask * np.uint8(255))
        part = ["train", "train", "train", "validate", "test", "test"][i]
        rows.append({"image": str(tmp_path / f"{i}.png"), "mask": str(tmp_path / f"{i}_mask.png"), "mask_coding": "grey127", "subject": f"m{i}", "part": part})
    opened: list[str] = []
    monkeypatch.setattr(glance, "open_image", lambda path, px=None: opened.append(Path(path).name) or open_image(path, px))
    fast = {"encoder": ENCODER, "epochs": 1, "steps_per_epoch": 2, "batch_size": 2, "crop": 64, "scale": 1.0, "precision": "fp32", "device": "cpu"}
    request = TrainRequest("glom", Cohort(pd.DataFrame(rows), task="glom"), tmp_path / "run", values=fast, quiet=True)
    folder = train_segmentation(request).folder
    gate = load_gate(folder, "cpu")
    assert gate is not None and (gate.reference.images, gate.reference.validation) == (3, 1)
    assert set(opened) == {"0.png", "1.png", "2.png", "3.png"}
    listed = {a["path"] for a in json.loads((folder / "manifest.json").read_text())["artefacts"]}
    assert {BANK, REFERENCE} <= listed and verify_run(folder).ok
    assert admit(open_image(tmp_path / "4.png"), gate).verdict in ("accept", "accept-wider")


def test_a_network_that_cannot_be_looked_into_is_kept(tmp_path, monkeypatch):
    import eq.workflows.train as train

    def no_gate(*args, **kwargs):
        raise EqError("network 'odd' has no encoder to embed with")

    monkeypatch.setattr(train, "fit_gate", no_gate)

    class Log:
        said: list[str] = []

        def warning(self, text: str) -> None:
            self.said.append(text)

    class Run:
        log = Log()

    train._add_gate(tmp_path, replace_split(), "cpu", Run())  # type: ignore[arg-type]
    assert Log.said == ["the checkpoint has no gate: network 'odd' has no encoder to embed with"]


def replace_split():
    "Enough of a split for `_add_gate`."
    return type("Split", (), {"train": None, "validate": None})()


def test_meta_is_untouched(lab):
    "The gate lies beside the checkpoint; the checkpoint itself is the same with and without."
    assert (lab / "model" / "model.json").read_bytes() == (lab / "old" / "model.json").read_bytes()
