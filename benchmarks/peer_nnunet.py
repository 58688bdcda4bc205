"""Train nnU-Net v2 2D for a given number of minutes on given cases and predict given images (a peer of `eq bench em|glom`).

    python benchmarks/peer_nnunet.py --cases cases.json --minutes 8 --seed 0 --out DIR [--threads 2]

`cases.json`: `{"channels": 1|3, "train": [{"image": ..., "mask": ...}], "validate": [...], "test": [{"image": ...}]}`; masks are 8-bit PNG
with 0/1 or 0/255. Any Python may start it: it goes on inside `.venv-peers` (`make peers`), where nnU-Net lives.

Written to DIR: `probabilities/test_NNN_STEM.npy` (float32, height x width, foreground probability at the size of the image; with
`--predict-validate` also `validate_NNN_STEM.npy`) and, last, `nnunet.json` (seconds, iterations, crops seen, versions, settings, which
file belongs to which image).

What is nnU-Net's own and what is changed, so that the comparison can be judged:
- own: fingerprint, planning rules, normalisation, network, loss with deep supervision, SGD, augmentation, foreground oversampling,
  sliding-window prediction with Gaussian weights, half overlap and mirroring. fp32, as nnU-Net has no autocast on CPU.
- changed: its planner is told that images are no larger than `--patch`, so that patch *and* network depth follow from its rules (its own
  plan for 1024 px takes about 30 s an iteration on 2 cores); `--batch-size`; the polynomial learning rate follows elapsed time, so that
  the run is one complete schedule whatever the machine; the online validation passes are left out, because the final weights are
  used and not the best ones: all the minutes go into training. The clock covers batch loading, augmentation and steps; planning
  before it and prediction after it are reported and not counted.
The seed fixes initial weights and the order of crops; the number of iterations depends on the machine's speed.
"""
import argparse
import json
import logging
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
NAME = "Dataset001_eq"
log = logging.getLogger("peer_nnunet")


def parse_args() -> argparse.Namespace:
    """The command line."""
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    cli.add_argument("--cases", type=Path, required=True, help="JSON file with train, validate, test and channels")
    cli.add_argument("--out", type=Path, required=True, help="new or empty folder for probabilities and nnunet.json")
    cli.add_argument("--minutes", type=float, default=8.0, help="wall-clock minutes of training")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--threads", type=int, default=2, help="CPU threads for training and prediction")
    cli.add_argument("--patch", type=int, default=256, help="side of the training patch, px")
    cli.add_argument("--batch-size", type=int, default=8)
    cli.add_argument("--no-mirroring", action="store_true", help="predict without nnU-Net's averaging over flips (4 times faster)")
    cli.add_argument("--predict-validate", action="store_true", help="write the probabilities of the validation images too")
    return cli.parse_args()


def read_cases(path: Path) -> dict:
    """The case list, checked: three parts, channels 1 or 3, every file present."""
    cases = json.loads(path.read_text(encoding="utf-8"))
    if cases.get("channels") not in (1, 3):
        raise SystemExit(f"peer_nnunet: {path}: channels is {cases.get('channels')!r}; valid: 1 or 3")
    for part, keys in (("train", ("image", "mask")), ("validate", ("image", "mask")), ("test", ("image",))):
        if not cases.get(part):
            raise SystemExit(f"peer_nnunet: {path}: no cases under {part!r}; each of train, validate and test needs one or more")
        missing = [case.get(key) for case in cases[part] for key in keys if not Path(case.get(key) or "/absent").is_file()]
        if missing:
            raise SystemExit(f"peer_nnunet: {path}: {part}: {len(missing)} files missing, first {missing[0]!r}")
    return cases


def write_dataset(cases: dict, raw: Path) -> dict[str, list[str]]:
    """Write the train and validate cases as an nnU-Net raw dataset; returns the case names of its one fold."""
    import numpy as np
    from PIL import Image

    mode = {1: "L", 3: "RGB"}[cases["channels"]]
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    fold: dict[str, list[str]] = {"train": [], "val": []}
    for part, key in (("train", "train"), ("validate", "val")):
        for index, case in enumerate(cases[part]):
            name = f"{part}_{index:03d}"
            mask = np.asarray(Image.open(case["mask"]))
            if mask.ndim != 2 or not set(np.unique(mask)) <= {0, 1, 255}:
                raise SystemExit(f"peer_nnunet: mask {case['mask']} has shape {mask.shape} and other values than 0, 1, 255")
            Image.open(case["image"]).convert(mode).save(raw / "imagesTr" / f"{name}_0000.png")
            Image.fromarray((mask > 0).astype(np.uint8)).save(raw / "labelsTr" / f"{name}.png")
            fold[key].append(name)
    channels = {"L": ("grey",), "RGB": ("red", "green", "blue")}[mode]
    description = {"channel_names": {str(i): name for i, name in enumerate(channels)}, "labels": {"background": 0, "foreground": 1},
                   "numTraining": sum(map(len, fold.values())), "file_ending": ".png"}
    (raw / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return fold


def plan_and_preprocess(args: argparse.Namespace, preprocessed: Path, fold: dict[str, list[str]]) -> dict:
    """Run nnU-Net's fingerprint, planning and preprocessing with the patch capped; returns the plans."""
    import numpy as np
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, preprocess

    class CappedPlanner(ExperimentPlanner):
        """nnU-Net's planner, told that images are at most `--patch` px wide."""

        def get_plans_for_configuration(self, spacing, median_shape, *rest, **kw) -> dict:
            """Plan as for small images, with our batch size."""
            plan = super().get_plans_for_configuration(spacing, np.minimum(median_shape, args.patch), *rest, **kw)
            return {**plan, "batch_size": args.batch_size}

    extract_fingerprints([1], num_processes=args.threads, verbose=False, show_progress_bar=False)
    CappedPlanner(1).plan_experiment()
    preprocess([1], configurations=["2d"], num_processes=[args.threads], show_progress_bar=False)
    (preprocessed / "splits_final.json").write_text(json.dumps([fold]), encoding="utf-8")
    return json.loads((preprocessed / "nnUNetPlans.json").read_text(encoding="utf-8"))


def train(args: argparse.Namespace, plans: dict, preprocessed: Path):
    """Train one fold for `--minutes`; returns the trainer, with `seconds`, `losses` and the final network in it."""
    import numpy as np
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class TimedTrainer(nnUNetTrainer):
        """nnU-Net's trainer with one schedule of a fixed length in seconds in place of epochs."""

        def plot_network_architecture(self) -> None:
            """Left out: it needs packages that are not installed."""

        def run_training(self) -> None:
            """Step until the time is up; the learning rate falls as (1 - share of time gone) ** 0.9, as in nnU-Net."""
            self.on_train_start()
            self.network.train()
            self.losses, budget, start, cpu = [], args.minutes * 60, time.perf_counter(), time.process_time()
            while (gone := time.perf_counter() - start) < budget:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.initial_lr * (1 - gone / budget) ** 0.9
                self.losses.append(float(self.train_step(next(self.dataloader_train))["loss"]))
                if len(self.losses) % 20 == 0:
                    log.info("%4d iterations, %3.0f of %.0f s, loss %.3f", len(self.losses), gone, budget, np.mean(self.losses[-20:]))
            self.seconds, self.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu

    # No augmentation processes: the network keeps the cores busy, and only one process draws the same crops for the same seed.
    os.environ["nnUNet_n_proc_DA"] = "0"  # planning refuses 0
    random.seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002  nnU-Net draws from the global generator
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    dataset = json.loads((preprocessed / "dataset.json").read_text(encoding="utf-8"))
    trainer = TimedTrainer({**plans, "continue_training": False}, "2d", 0, dataset, device=torch.device("cpu"))
    trainer.run_training()
    return trainer


def predict(args: argparse.Namespace, trainer, cases: dict) -> list[dict]:
    """Write the foreground probability of every test (and validation) image; returns one row a file."""
    import numpy as np
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from PIL import Image

    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(use_mirroring=not args.no_mirroring, device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(trainer.network, trainer.plans_manager, trainer.configuration_manager,
                                    [trainer.network.state_dict()], trainer.dataset_json, "TimedTrainer",
                                    trainer.inference_allowed_mirroring_axes)
    folder, rows = args.out / "probabilities", []
    folder.mkdir(parents=True)
    for part in ("validate", "test") if args.predict_validate else ("test",):
        for index, case in enumerate(cases[part]):
            pixels = np.asarray(Image.open(case["image"]).convert({1: "L", 3: "RGB"}[cases["channels"]]), dtype=np.float32)
            pixels = np.atleast_3d(pixels).transpose(2, 0, 1)[:, None]  # nnU-Net holds 2D images as channel, 1, y, x
            start = time.perf_counter()
            probability = predictor.predict_single_npy_array(pixels, {"spacing": (999, 1, 1)}, None, None, True)[1][1, 0]
            seconds = time.perf_counter() - start
            if probability.shape != pixels.shape[2:] or not np.isfinite(probability).all():
                raise SystemExit(f"peer_nnunet: prediction of {case['image']} has shape {probability.shape} or values that are not finite")
            path = folder / f"{part}_{index:03d}_{Path(case['image']).stem}.npy"
            np.save(path, probability.astype(np.float32))
            rows.append({"part": part, "image": case["image"], "probability": str(path.relative_to(args.out)), "seconds": round(seconds, 2)})
            log.info("%s %s: %.1f s", part, case["image"], seconds)
    return rows


def run(args: argparse.Namespace, cases: dict, work: Path) -> dict:
    """Prepare, train and predict with every nnU-Net folder under `work`; returns the report."""
    folders = {name: work / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    os.environ.update({name: str(folder) for name, folder in folders.items()})  # nnU-Net reads these when it is imported
    start = time.perf_counter()
    fold = write_dataset(cases, folders["nnUNet_raw"] / NAME)
    plans = plan_and_preprocess(args, folders["nnUNet_preprocessed"] / NAME, fold)
    prepared = time.perf_counter()
    trainer = train(args, plans, folders["nnUNet_preprocessed"] / NAME)
    predictions = predict(args, trainer, cases)
    own, iterations = plans["configurations"]["2d"], len(trainer.losses)
    tenth = max(1, iterations // 10)
    return {
        "method": "nnU-Net v2 2D", "version": version("nnunetv2"), "torch": version("torch"), "python": platform.python_version(),
        "seconds_prepare": round(prepared - start, 1), "seconds_trained": round(trainer.seconds, 1),
        "cores_used": round(trainer.cpu_seconds / trainer.seconds, 2),  # well below `threads`: something else ran beside it
        "seconds_predict": round(sum(row["seconds"] for row in predictions), 1), "minutes": args.minutes,
        "iterations": iterations, "crops_seen": iterations * own["batch_size"], "batch_size": own["batch_size"],
        "patch": list(own["patch_size"]), "stages": own["architecture"]["arch_kwargs"]["n_stages"],
        "parameters": sum(p.numel() for p in trainer.network.parameters()), "precision": "fp32", "mirroring": not args.no_mirroring,
        "loss_first_tenth": sum(trainer.losses[:tenth]) / tenth, "loss_last_tenth": sum(trainer.losses[-tenth:]) / tenth,
        "seed": args.seed, "threads": args.threads, "cases": {part: len(cases[part]) for part in ("train", "validate", "test")},
        "predictions": predictions,
    }


def main() -> None:
    """Check the arguments, move into the peers' environment, run, and write the report last."""
    args = parse_args()
    if Path(sys.prefix).resolve() != PEER_PYTHON.parent.parent.resolve():
        if not PEER_PYTHON.exists():
            raise SystemExit(f"peer_nnunet: {PEER_PYTHON} does not exist; `make peers` makes it")
        os.execv(PEER_PYTHON, [str(PEER_PYTHON), *sys.argv])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    cases = read_cases(args.cases)
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"peer_nnunet: {args.out} is not empty; give a new folder")
    os.environ.update({"OMP_NUM_THREADS": str(args.threads), "nnUNet_n_proc_DA": str(args.threads),
                       "nnUNet_def_n_proc": str(args.threads), "nnUNet_compile": "f", "nnUNet_wandb_enabled": "0"})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copies of the images below go whatever ends the run
    work = Path(tempfile.mkdtemp(prefix="eq-nnunet-"))
    try:
        report = run(args, cases, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    part = args.out / "nnunet.json.part"
    part.write_text(json.dumps(report, indent=1), encoding="utf-8")
    part.rename(args.out / "nnunet.json")
    log.info("%d iterations in %.0f s; %s", report["iterations"], report["seconds_trained"], args.out / "nnunet.json")


if __name__ == "__main__":
    main()
