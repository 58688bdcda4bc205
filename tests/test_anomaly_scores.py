"""Anomaly detectors from the outside: what other tested images must not be able to do, what a damaged or hostile checkpoint must not do.
"""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eq.core.files import read_json, write_json
from eq.core.registry import EqError
from eq.core.results import CheckpointMeta
from eq.inference import anomaly, anomaly_metrics
from eq.models.baselines import baseline_of, create_baseline
from eq.models.checkpoint import META, WEIGHTS, fill, load_tensors, read_meta, save_checkpoint

META_0 = CheckpointMeta(task="anomaly", arch="", encoder="", in_channels=1, classes=("anomaly",), mean=(0.0,), std=(1.0,), scale=1.0, px_size_um=None,
                        tile=32, threshold=0.5, tta="none", min_area_px=0, data={}, params={}, metrics={}, code={}, parent=None, weights_sha256="0" * 64)
SMALL = {"brightness": {}, "pca": {"components": 6}, "knn": {"embedding": "pixels"}, "padim": {"dims": 8}, "patchcore": {"bank": 30}}


def normals(number: int, seed: int) -> np.ndarray:
    """Soft ribs on grey."""
    rng, (yy, xx) = np.random.default_rng(seed), np.mgrid[:32, :32] / 32
    drawn = [0.2 * np.sin(25 * yy + rng.normal(0, 0.3)) * np.cos(3 * (xx - 0.5)) + rng.normal(0, 0.02, (32, 32)) for _ in range(number)]
    return (0.5 + np.stack(drawn)).clip(0, 1).astype(np.float32)


def spoilt(images: np.ndarray) -> np.ndarray:
    yy, xx = np.mgrid[:32, :32]
    return np.where((xx - 20) ** 2 + (yy - 12) ** 2 < 30, np.float32(0.95), images)


def load(folder: Path):  # noqa: ANN201
    meta = read_meta(folder)
    model = baseline_of(meta)
    fill(model, load_tensors(folder / WEIGHTS, meta.weights_sha256), str(folder))
    return model


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each small baseline."""
    folders = {}
    for name, options in SMALL.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model = create_baseline(name, 32, **options).fit_normals(normals(30, 0))
        save_checkpoint(folders[name], model, replace(META_0, arch=name, params={"network": model.describe()}))
    return folders


@pytest.mark.parametrize("name", SMALL)
def test_what_is_tested_changes_nothing(name: str, fitted: dict[str, Path]) -> None:
    "A score depends on its image alone: not on what else is in the batch, in which order, or how many of it are ill."
    model, good, ill = load(fitted[name]), normals(6, 1), spoilt(normals(6, 2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    alone = model.find(good).scores
    mixed = model.find(np.concatenate([ill, good, ill]), batch_size=5).scores[6:12]
    np.testing.assert_allclose(mixed, alone, rtol=1e-4, atol=1e-5)
    assert all((v == before[k]).all() for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_ill_images_score_higher(name: str, fitted: dict[str, Path]) -> None:
    model = load(fitted[name])
    good, ill = model.find(normals(12, 3)).scores, model.find(spoilt(normals(12, 4))).scores
    judged = anomaly_metrics.judge(np.r_[good, ill], np.arange(24) >= 12, range(24), anomaly.normal_threshold(model.find(normals(20, 5)).scores), n=200)
    assert judged.auroc.estimate > 0.9, name
    assert judged.sensitivity is not None and judged.sensitivity.estimate > 0.5


def test_hostile_descriptions_are_refused(fitted: dict[str, Path], tmp_path: Path) -> None:
    "A description from elsewhere can neither fill the memory nor name code."
    meta = read_meta(fitted["pca"]).to_dict()
    network = meta["params"]["network"]
    bad = [{**network, "tables": {"mean": [10**9], "axes": [10**6, 10**6]}}, {**network, "tables": {"mean": [-1], "axes": [2, 3]}},
           {**network, "tables": {"mean": [1024], "axes": [6, 1024], "more": [3]}}, {**network, "options": {"components": 6, "hook": "os.system"}},
           {"options": {}}, "pca", {**network, "tables": {"mean": [1024], "axes": [7, 1024]}}]
    for i, told in enumerate(bad):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / WEIGHTS).write_bytes((fitted["pca"] / WEIGHTS).read_bytes())
        write_json(folder / META, {**meta, "params": {"network": told}})
        with pytest.raises(EqError):
            load(folder)
    assert read_json(fitted["pca"] / META)["arch"] == "pca"


def test_chance_is_chance() -> None:
    "Scores that know nothing: the interval holds one half in about 95 of 100 cohorts, with three images a patient."
    held = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        patient = np.repeat(np.arange(60), 3)
        scores = rng.normal(size=60)[patient] + 0.5 * rng.normal(size=180)
        found = anomaly_metrics.ranking_interval(scores, patient % 2 == 0, patient, n=200, seed=seed)
        held.append(found.low <= 0.5 <= found.high)
    assert 0.89 <= np.mean(held) <= 0.99
