"""Two processes that train one network together, each with its share of every batch, end where one process with whole batches ends."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("accelerate", reason='needs pip install "eq[ddp]"')

WORKER = '''
import json, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from eq.core.results import CheckpointMeta
from eq.data.pictures import Pictures
from eq.models.classifier import create_classifier
from eq.training.ddp import join_team
from eq.training.classify_options import ClassifyOptions
from eq.training.fit_classify import fit_classify

rng = np.random.default_rng(0)
labels = np.arange(23) % 2  # 23 in batches of 8: shares of 4, of 4 and 3
images = np.clip(60 + 60 * labels[:, None, None, None] + rng.normal(0, 30, (23, 32, 32, 3)), 0, 255).astype(np.uint8)
train = Pictures(images, labels, ("dark", "light"), ("",) * 23, ("",) * 23, {})
base = ClassifyOptions(epochs=3, batch_size=8, lr=0.05, augment=False, precision="fp32", device="cpu", quiet=True, class_weights=True)
RUNS = {
    "cached": ("tu-test_efficientnet", replace(base, schedule="cosine", weight_decay=1e-3)),
    "thawed": ("tu-test_convnext", replace(base, freeze="until:0.5", augment=True, mixup=0.4, cutmix=1.0, lr=0.02, label_smoothing=0.1, l1=1e-5)),
    "probed": ("tu-test_convnext", replace(base, freeze="none", head="probe", ema=0.5, lr=0.02)),
}
team, out, rows = join_team("cpu"), Path(sys.argv[1]), {}
for name, (arch, options) in RUNS.items():
    meta = CheckpointMeta(task="classify", arch=arch, encoder="", in_channels=3, classes=train.classes, mean=(0.4,) * 3, std=(0.2,) * 3, scale=1.0,
                          px_size_um=None, tile=32, threshold=0.5, tta="none", min_area_px=0, data={}, params={}, metrics={}, code={}, parent=None,
                          weights_sha256="0" * 64)
    model = create_classifier(arch, dropout=0.0, seed=0)  # with dropout, masks that each process draws for itself would make two differ from one
    result = fit_classify(model, train, train.pick(range(10)), options, meta, out / name, team=team)
    rows[name] = result.history
(out / f"rank{team.rank}of{team.size}.json").write_text(json.dumps(rows))
(out / f"drawn{team.rank}of{team.size}.json").write_text(json.dumps(torch.rand(4).tolist()))  # what dropout would draw next
'''


def run_here(program: str, out: Path) -> None:
    """The worker as the only process: this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["worker.py", str(out)])
        exec(compile(program, "worker.py", "exec"), {"__name__": "__main__"})  # noqa: S102  the text above


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a run by one process and of the same run by two."""
    from eq.training.ddp import start_team

    folder = tmp_path_factory.mktemp("ddp")
    script, alone, both = folder / "worker.py", folder / "alone", folder / "both"
    script.write_text(WORKER)
    for out in (alone, both):
        out.mkdir()
    run_here(WORKER, alone)
    two = start_team([str(script), str(both)], processes=2, timeout_s=600)
    assert two.returncode == 0, two.stdout + two.stderr[-3000:]
    return alone, both


@pytest.mark.parametrize("name", ["cached", "thawed", "probed"])
def test_two_processes_equal_one(runs: tuple[Path, Path], name: str) -> None:
    """The last weights differ by rounding alone.

    The gradient of a batch is a mean over its pictures; two processes add the same numbers in another order. One such sum in float32 is off by
    about 1e-7 of its terms; nine steps of a rate of at most 0.05 on gradients of order 1 with a momentum of 0.9 (tenfold in the limit) can make
    9 * 0.05 * 10 * 1e-7 = 5e-7 of that directly, and the network's own curvature amplifies it. 2e-5 leaves room for that. A wrong weight of an
    unequal share, a picture seen twice or a gradient that is summed instead of averaged shows at twenty times that and more: `test_the_tolerance_sees_a_slip`.
    """
    from safetensors.torch import load_file

    one, two = (load_file(out / name / "checkpoints" / "last" / "model.safetensors") for out in runs)
    assert one.keys() == two.keys()
    worst = {k: float((one[k].float() - two[k].float()).abs().max()) for k in one}
    assert max(worst.values()) < 2e-5, max(worst.items(), key=lambda kv: kv[1])
    moved = max(float((one[k].float() - start(name)[k].float()).abs().max()) for k in one)
    assert moved > 2e-3, "the network has not learnt: equal weights say nothing"


def start(name: str) -> dict:
    """The network before training."""
    from eq.models.classifier import create_classifier

    return create_classifier("tu-test_efficientnet" if name == "cached" else "tu-test_convnext", dropout=0.0, seed=0).state_dict()


def test_both_processes_know_the_same(runs: tuple[Path, Path]) -> None:
    """History of rank 0, of rank 1 and of one process: the same decisions, all pictures counted, one writer."""
    alone, both = runs
    one = json.loads((alone / "rank0of1.json").read_text())
    first, second = (json.loads((both / f"rank{r}of2.json").read_text()) for r in (0, 1))
    for name in one:
        assert [r["images"] for r in one[name]] == [r["images"] for r in first[name]] == [*([0] if name == "probed" else []), 23, 46, 69]
        for column in ("train_loss", "valid_loss"):
            np.testing.assert_allclose([r[column] for r in first[name]], [r[column] for r in one[name]], atol=1e-4)
            assert [r[column] for r in first[name]] == [r[column] for r in second[name]]


def test_each_process_draws_for_itself(runs: tuple[Path, Path]) -> None:
    """The masks of dropout are not the same in both; process 0 draws what one process alone would draw."""
    alone, both = runs
    one, first, second = (json.loads((out / name).read_text()) for out, name in ((alone, "drawn0of1.json"), (both, "drawn0of2.json"), (both, "drawn1of2.json")))
    assert first == one and second != first


def test_the_tolerance_sees_a_slip(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Batches of 7 instead of 8, which moves as few pictures as an unweighted share would, end far outside of the tolerance."""
    from safetensors.torch import load_file

    run_here(WORKER.replace("batch_size=8", "batch_size=7").replace("RUNS.items()", "list(RUNS.items())[:1]"), tmp_path)
    one, slip = (load_file(out / "cached" / "checkpoints" / "last" / "model.safetensors") for out in (runs[0], tmp_path))
    assert max(float((one[k].float() - slip[k].float()).abs().max()) for k in one) > 4e-4


def test_one_fails_all_end(tmp_path: Path) -> None:
    """A process that fails ends the team at once: nobody waits for it until a timeout."""
    from eq.training.ddp import start_team

    script = tmp_path / "bad.py"
    script.write_text("import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit('rank 1 is gone')\ntime.sleep(300)\n")
    done = start_team([str(script)], processes=2, timeout_s=120)
    assert done.returncode != 0 and "rank 1 is gone" in done.stdout + done.stderr


def test_a_limit_ends_all(tmp_path: Path) -> None:
    """Processes that take too long are gone afterwards: `torchrun` starts them in sessions of their own, where killing it would leave them."""
    import os

    from eq.core.registry import EqError
    from eq.training.ddp import start_team

    script = tmp_path / "slow.py"
    script.write_text(f"import os, pathlib, time\npathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(str(os.getpid()))\ntime.sleep(300)\n")
    with pytest.raises(EqError, match="not done after 20 s"):
        start_team([str(script)], processes=2, timeout_s=20)
    for rank in "01":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / rank).read_text()), 0)
