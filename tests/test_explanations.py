"""Explanations as a user meets them: every method on every kind of network, nothing changed behind the caller's back, and scores beside each map."""
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch

from eq.core.registry import EqError
from eq.core.results import CheckpointMeta
from eq.inference.classify import Classifier
from eq.inference.explain import METHODS, explain
from eq.inference.explain_score import region_shares, score_map
from eq.models.checkpoint import save_checkpoint
from eq.models.classifier import create_classifier, freeze_features
from eq.reporting.explain_figure import Exhibit, explanation_report, write_surface
from eq.reporting.render import write_report

META = CheckpointMeta(
    task="classify", arch="resnet18", encoder="", in_channels=3, classes=("Normal", "Tumor"), mean=(0.5,) * 3, std=(0.25,) * 3, scale=1.0, px_size_um=None,
    tile=64, threshold=0.5, tta="none", min_area_px=0, data={}, params={"body": False}, metrics={}, code={}, parent=None, weights_sha256="0" * 64,
)


def scene(side: int = 64) -> np.ndarray:
    "A disc with a bright spot on black, and noise in it."
    yy, xx = np.mgrid[:side, :side] / side - 0.5
    grey = np.where(yy**2 + xx**2 < 0.16, 90 + np.random.default_rng(0).normal(0, 20, (side, side)), 0)
    grey[(yy - 0.1) ** 2 + (xx - 0.15) ** 2 < 0.006] = 230
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, 2)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Classifier:
    "A ResNet from a checkpoint, with a frozen body as after transfer learning: its weights ask for no gradients."
    folder = tmp_path_factory.mktemp("model")
    net = create_classifier("resnet18", seed=0)
    freeze_features(net, "resnet18")
    save_checkpoint(folder, net, META)
    return Classifier.from_checkpoint(folder, device="cpu", precision="fp32")


@pytest.mark.parametrize("method", list(METHODS))
def test_a_frozen_network_is_explained_and_left_as_it_was(classifier, method):
    before = {k: v.clone() for k, v in classifier.network.state_dict().items()}
    found = explain(classifier, scene(), method, target=1)
    assert found.map.shape == (64, 64) and found.map.dtype == np.float32 and 0 <= found.map.min() <= found.map.max() <= 1
    assert found.flat or found.map.max() == 1
    assert found.probability == pytest.approx(classifier.probabilities(scene()[None])[0, 1], abs=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in classifier.network.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in classifier.network.parameters())
    assert not any(m._forward_hooks for m in classifier.network.modules())
    assert np.array_equal(explain(classifier, scene(), method, target=1).map, found.map)


def test_both_classes_differ(classifier):
    "A map of Normal that equals that of Tumor would be a map of the picture."
    maps = [explain(classifier, scene(), "gradcam", target=t) for t in (0, 1)]  # its channel weights are signed
    assert not np.allclose(maps[0].map, maps[1].map, atol=0.05)


@pytest.mark.parametrize("arch, side", [("tu-test_vit", 160), ("tu-test_convnext", 64), ("densenet121", 64)])
def test_other_architectures(arch, side):
    from dataclasses import replace

    net = Classifier(create_classifier(arch, seed=0).eval(), replace(META, arch=arch, tile=side))
    found = explain(net, scene(side), "layercam", target=0)
    assert found.map.shape == (side, side) and min(found.grid) > 1


def test_a_hot_frame_is_seen(classifier):
    from dataclasses import replace

    found = explain(classifier, scene(), "layercam", target=1)
    frame = np.ones((64, 64), np.float32)
    frame[8:-8, 8:-8] = 0
    shares = region_shares(replace(found, map=frame, flat=""), scene()).set_index("region")
    assert shares["share"]["frame"] > 0.8 and shares["ratio"]["frame"] > 1.5


def test_page_and_surface_stand_alone(classifier, tmp_path):
    found = explain(classifier, scene(), "layercam", target=1)
    exhibit = Exhibit(scene(), found, score_map(classifier, scene(), found), "<b>slice</b>")
    page = write_report(tmp_path / "page.html", explanation_report([exhibit])).read_text(encoding="utf-8")
    assert "<b>slice" not in page and "&lt;b&gt;slice" in page and "<script" not in page
    assert "insertion" in page and "rank correlation" in page
    surface = write_surface(tmp_path / "surface.html", scene(), found).read_text(encoding="utf-8")
    assert "<script src" not in surface and "default-src 'none'" in surface


def test_missing_packages_name_the_extra(classifier, tmp_path):
    with patch.dict(sys.modules, {"pytorch_grad_cam": None}), pytest.raises(EqError, match=r"pip install 'eq\[explain\]'"):
        explain(classifier, scene())
    found = explain(classifier, scene())
    with patch.dict(sys.modules, {"plotly": None, "plotly.graph_objects": None}), pytest.raises(EqError, match=r"pip install 'eq\[explain\]'"):
        write_surface(tmp_path / "s.html", scene(), found)
    assert not list(tmp_path.iterdir())
