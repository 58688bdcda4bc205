"""Classifying files as a user meets it: calibrated, gated, with bad files among good ones, and nothing lost."""
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image as PilImage

from eq.core.registry import EqError
from eq.core.results import CheckpointMeta
from eq.data.pictures import Pictures
from eq.inference.classify import Classifier, Ensemble, predict_files
from eq.inference.picture_gate import BANK, REFERENCE, fit_picture_gate, load_picture_gate
from eq.inference.temperature import calibrate_checkpoint
from eq.models.checkpoint import save_checkpoint
from eq.models.classifier import create_classifier

SIDE = 64
META = CheckpointMeta(
    task="classify", arch="efficientnet_lite0", encoder="", in_channels=3, classes=("Normal", "Tumor"), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    scale=1.0, px_size_um=None, tile=SIDE, threshold=0.5, tta="none", min_area_px=0, data={}, params={"body": False}, metrics={}, code={}, parent=None,
    weights_sha256="0" * 64,
)


def slices(seeds: range) -> Pictures:
    "Grey ellipses with organs, three to a block."
    yy, xx = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    images = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        grey = np.where((xx / rng.uniform(0.4, 0.48)) ** 2 + (yy / rng.uniform(0.3, 0.38)) ** 2 < 1, 90.0, 0.0)
        for _ in range(6):
            x, y, r = rng.uniform(-0.25, 0.25), rng.uniform(-0.2, 0.2), rng.uniform(0.04, 0.09)
            grey[((xx - x) ** 2 + (yy - y) ** 2 < r**2) & (grey > 0)] = rng.uniform(110, 220)
        grey += rng.normal(0, 5, grey.shape) * (grey > 0)
        images.append(np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, 2))
    names = tuple(f"{s}.png" for s in seeds)
    return Pictures(np.stack(images), np.array([s % 2 for s in seeds]), ("Normal", "Tumor"), names, tuple(f"b{s // 3}" for s in seeds), {})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A checkpoint with ImageNet's features, calibrated, with a gate."
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, create_classifier("efficientnet_lite0", pretrained=True, seed=0), META)
    fit_picture_gate(folder, slices(range(24)), slices(range(24, 33)), device="cpu")
    calibrate_checkpoint(folder, slices(range(24, 33)), device="cpu")
    return folder


def test_calibration_keeps_the_gate_and_every_decision(model):
    gate, calibrated = load_picture_gate(model, "cpu"), Classifier.from_checkpoint(model, "cpu", "fp32")
    assert gate is not None and calibrated.temperature != 1
    bare = replace(calibrated, meta=replace(calibrated.meta, params={**calibrated.meta.params, "temperature": 1.0}))
    images = slices(range(40, 48)).images
    assert (bare.probabilities(images).argmax(1) == calibrated.probabilities(images).argmax(1)).all()


def test_a_folder_of_everything(model, tmp_path):
    from skimage.data import chelsea

    PilImage.fromarray(slices(range(60, 61)).images[0]).save(tmp_path / "slice.png")
    PilImage.fromarray(chelsea()).save(tmp_path / "cat.jpg")
    PilImage.fromarray(np.zeros((80, 80), np.uint8)).save(tmp_path / "black.png")
    (tmp_path / "text.jpg").write_text("not an image")
    PilImage.new("1", (30_000, 8_000)).save(tmp_path / "bomb.png")
    paths = sorted(tmp_path.iterdir())
    predictor = Ensemble([Classifier.from_checkpoint(model, "cpu", "fp32")] * 2)
    table = predict_files(predictor, paths, load_picture_gate(model, "cpu"), tta="flip").set_index("image")
    status = {p.name: table["status"][str(p)] for p in paths}
    assert status == {"slice.png": "done", "cat.jpg": "refused", "black.png": "refused", "text.jpg": "failed", "bomb.png": "failed"}
    assert (table["note"][table["status"] != "done"] != "").all() and table["p_Tumor"].notna().sum() == 1
    row = table.loc[str(tmp_path / "slice.png")]
    assert row["p_Normal"] + row["p_Tumor"] == pytest.approx(1) and row["label"] in ("Normal", "Tumor") and row["ms"] > 0


def test_a_gate_that_cannot_be_trusted_is_refused(model, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    (folder / BANK).write_bytes((folder / BANK).read_bytes()[:-9])
    with pytest.raises(EqError, match="damaged"):
        load_picture_gate(folder, "cpu")
    (folder / BANK).unlink()
    with pytest.raises(EqError, match=BANK):
        load_picture_gate(folder, "cpu")
    (folder / REFERENCE).unlink()
    assert load_picture_gate(folder, "cpu") is None


def test_a_segmentation_checkpoint_is_no_classifier(tmp_path):
    from eq.models.unet import create_unet

    net = create_unet("unet", "tu-mobilenetv3_small_050", seed=0)
    save_checkpoint(tmp_path, net, replace(META, task="glom", arch="unet", encoder="tu-mobilenetv3_small_050", classes=("glomerulus",)))
    with pytest.raises(EqError, match="needed is 'classify'"):
        Classifier.from_checkpoint(tmp_path)


@pytest.mark.data
def test_real_slices_pass_and_photographs_do_not(tmp_path):
    "Learnt from half of the blocks, judged by a quarter, asked about the last: few are turned away, and no photograph gets in."
    import cv2
    from skimage.data import astronaut, chelsea, coffee, rocket

    from eq.data.pictures import load_pictures
    from eq.data.source import load_source

    ct = load_source("kidney_ct")
    thin = load_pictures(replace(ct, table=ct.table.iloc[::5].reset_index(drop=True)), side=SIDE, quiet=True)
    units = sorted(set(thin.units))
    quarter = [thin.pick(np.isin(thin.units, units[k::4])) for k in range(4)]
    known = thin.pick(np.isin(thin.units, units[::4] + units[1::4]))
    save_checkpoint(tmp_path, create_classifier("efficientnet_lite0", pretrained=True, seed=0), META)
    fit_picture_gate(tmp_path, known, quarter[2], device="cpu")
    gate = load_picture_gate(tmp_path, "cpu")
    assert gate is not None
    photographs = np.stack([cv2.resize(photo, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for photo in (astronaut(), chelsea(), coffee(), rocket())])
    assert all(gate.refusals(photographs))
    assert sum(bool(r) for r in gate.refusals(quarter[3].images)) <= 0.1 * len(quarter[3])
