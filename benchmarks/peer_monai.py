"""MONAI's SlidingWindowInferer on one image, timed on request (a peer of `eq bench tiles`).

    python benchmarks/peer_monai.py --model CHECKPOINT --image image.npy [--precision fp32|bf16] [--threads 2]

The checkpoint is eq's own folder (model.safetensors, model.json), so the weights are the same; the network is built from
segmentation-models-pytorch. Settings: roi 512, overlap 0.25, Gaussian weights, 4 windows a batch, on the CPU. `--precision bf16` gives
MONAI a network as eq would run it in PyTorch: channels last, under bf16 autocast. The image (uint8, height x width x 3) is normalised
before the clock starts, and the sigmoid is not counted: both in MONAI's favour.

Any Python may start it: it goes on inside `.venv-peers` (`make peers`). It then reads commands from standard input, one a line, and
answers each with one line of JSON: `run` predicts the whole image and says how many seconds that took, `save PATH` writes the
probabilities of the last run (float16, .npy), `quit` ends. Waiting between commands costs no time, so that several such processes can be
measured in turns.
"""
import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"


def parse_args() -> argparse.Namespace:
    """The command line."""
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    cli.add_argument("--model", type=Path, required=True, help="checkpoint folder of eq")
    cli.add_argument("--image", type=Path, required=True, help=".npy, uint8, height x width x 3")
    cli.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    cli.add_argument("--threads", type=int, default=2)
    return cli.parse_args()


def load_model(folder: Path, channels_last: bool):
    """The network with its weights, and its description."""
    import segmentation_models_pytorch as smp
    import torch
    from safetensors.torch import load_file

    meta = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    if meta["arch"] != "unet":
        raise SystemExit(f"peer_monai: arch {meta['arch']!r}; valid: 'unet' of segmentation-models-pytorch")
    model = smp.Unet(meta["encoder"], encoder_weights=None, in_channels=meta["in_channels"], classes=len(meta["classes"]))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format), meta


def main() -> None:
    """Load, warm up, answer commands."""
    if Path(sys.prefix).resolve() != PEER_PYTHON.parent.parent.resolve():
        if not PEER_PYTHON.exists():
            raise SystemExit(f"peer_monai: {PEER_PYTHON} does not exist; `make peers` makes it")
        os.execv(PEER_PYTHON, [str(PEER_PYTHON), *sys.argv])
    args = parse_args()
    import numpy as np
    import torch
    from monai.inferers import SlidingWindowInferer

    torch.set_num_threads(args.threads)
    model, meta = load_model(args.model, args.precision == "bf16")
    pixels = torch.from_numpy(np.load(args.image)).float().permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(meta[k]).reshape(1, -1, 1, 1) for k in ("mean", "std"))
    image = ((pixels - mean) / std).contiguous()
    inferer = SlidingWindowInferer(roi_size=(512, 512), sw_batch_size=4, overlap=0.25, mode="gaussian")
    low = args.precision == "bf16"

    def predict(x):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
            return inferer(x, model)

    def say(**values: object) -> None:
        print(json.dumps(values), flush=True)

    predict(image[..., :512, :896])
    say(ready=True, monai=version("monai"), torch=version("torch"), threads=args.threads)
    logits = None
    for line in sys.stdin:
        command, _, rest = line.strip().partition(" ")
        if command == "run":
            start = time.perf_counter()
            logits = predict(image)
            say(seconds=time.perf_counter() - start)
        elif command == "save" and logits is not None:
            np.save(rest, torch.sigmoid(logits[0, 0].float()).half().numpy())
            say(saved=rest)
        elif command == "quit":
            break
        else:
            say(error=f"unknown command {line.strip()!r}; valid: run, save PATH after a run, quit")


if __name__ == "__main__":
    main()
