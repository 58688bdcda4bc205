"""Checkpoints that are damaged, foreign or no checkpoints at all, made from a tiny network: the material of a row of faults.py."""
import io
import json
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eq.core.files import sha256_file
from eq.core.registry import EqError
from eq.core.results import CheckpointMeta
from eq.models.checkpoint import META, SEAL, WEIGHTS, load_checkpoint, load_tensors, save_checkpoint, save_tensors
from eq.models.unet import create_unet

ENCODER = "tu-test_efficientnet"
ABOUT = CheckpointMeta(
    task="glom", arch="unet", encoder=ENCODER, in_channels=3, classes=("glomerulus",), mean=(0.5,) * 3, std=(0.25,) * 3, scale=2.0, px_size_um=0.5,
    tile=64, threshold=0.5, tta="none", min_area_px=20, data={}, params={}, metrics={}, code={}, parent=None, weights_sha256="0" * 64,
)
RAN = "payload-ran"  # a pickle that is opened leaves this file beside the checkpoint
Spoil = Callable[[Path, int, np.random.Generator], dict[str, Any] | None]  # Folder, number of the attempt; what the caller then asks of the checkpoint


def make_sound(folder: Path) -> Path:
    "A checkpoint that loads: what is refused below is refused for what was done to it."
    torch.set_num_threads(1)  # children are forked from this process
    save_checkpoint(folder, create_unet("unet", ENCODER, seed=0), ABOUT)
    load_checkpoint(folder, ABOUT.task, ABOUT.in_channels, ABOUT.classes)
    return folder


def unsealed(folder: Path) -> dict[str, Any]:
    "The description without its hash, as an older version wrote it: what is changed in it has to be found by itself."
    return {k: v for k, v in json.loads((folder / META).read_text()).items() if k != SEAL}


def describe(folder: Path, **values: Any) -> None:
    "Changes the description; the hash of the weights is put right unless it is given."
    known = unsealed(folder)
    if (folder / WEIGHTS).is_file():
        known["weights_sha256"] = sha256_file(folder / WEIGHTS)
    (folder / META).write_text(json.dumps(known | values))


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    if path.name == WEIGHTS:
        describe(path.parent)


def cut(name: str, honest: bool) -> Spoil:
    "A file cut short by two bytes or more; `honest`: the description states the hash of what is left."

    def spoil(folder: Path, n: int, rng: np.random.Generator) -> None:
        data = (folder / name).read_bytes()
        short = data[: int(rng.integers(0, len(data) - 1))]
        put(folder / name, short) if honest else (folder / name).write_bytes(short)

    return spoil


def flip(name: str) -> Spoil:
    "One bit of a file."

    def spoil(folder: Path, n: int, rng: np.random.Generator) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        (folder / name).write_bytes(data)

    return spoil


def wrong_hash(folder: Path, n: int, rng: np.random.Generator) -> None:
    digits = list(sha256_file(folder / WEIGHTS))
    at = int(rng.integers(64))
    digits[at] = "0" if digits[at] != "0" else "1"
    describe(folder, weights_sha256="".join(digits))


def other_json(folder: Path, n: int, rng: np.random.Generator) -> None:
    known = unsealed(folder)
    lacking = {k: v for k, v in known.items() if k != "scale"}
    wrong = {"classes": []}, {"threshold": 2}, {"mean": [0.5]}, {"std": [0, 0, 0]}, {"tile": "64"}, {"colour": "red"}, {"weights_sha256": "none"}
    made = [[known], None, lacking, *(known | one for one in wrong)]
    (folder / META).write_text(json.dumps(made[n % len(made)]))


def other_task(folder: Path, n: int, rng: np.random.Generator) -> dict[str, Any]:
    return {"task": ("mito", "classify", "anomaly", "Glom", "")[n % 5]}


def other_classes(folder: Path, n: int, rng: np.random.Generator) -> dict[str, Any]:
    asked = {"classes": ("mitochondrion",)}, {"classes": ()}, {"classes": ("glomerulus", "tubule")}, {"in_channels": 1}, {"in_channels": 4}
    return asked[n % 5]


def other_tensors(folder: Path, n: int, rng: np.random.Generator) -> None:
    "One tensor lacks, is too many, is called or shaped otherwise; or all are of another network. The hash is right."
    tensors = load_tensors(folder / WEIGHTS, sha256_file(folder / WEIGHTS))
    name = sorted(tensors)[int(rng.integers(len(tensors)))]
    changed = {k: v for k, v in tensors.items() if k != name}
    made = (
        changed, tensors | {"more": torch.ones(3)}, changed | {f"{name}.old": tensors[name]}, changed | {name: tensors[name][None]},
        create_unet("unet", ENCODER, in_channels=1 + n % 2, classes=2, seed=n).state_dict(),
    )
    save_tensors(folder / WEIGHTS, made[n % len(made)])
    describe(folder)


def other_network(folder: Path, n: int, rng: np.random.Generator) -> None:
    "A sound file of weights with the description of a network that is not theirs."
    one = {"in_channels": 1, "mean": [0.5], "std": [0.5]}
    made = (
        one, {"classes": ["glomerulus", "tubule"]}, {"arch": "fpn"}, {"encoder": "tu-test_resnet"}, {"params": {"members": 2}}, {"arch": "unknown"},
        {"encoder": "tu-unknown"}, {"task": "classify"}, {"task": "anomaly"}, {"params": {"members": "two"}},
    )
    describe(folder, **made[n % len(made)])


class Payload:
    "Writes a file when it is unpickled."

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def pickled(folder: Path, n: int, rng: np.random.Generator) -> None:
    "Pickles of each protocol and files of torch.save, under the name and with the hash of the weights."
    evil = {"state_dict": Payload(folder.parent / RAN)}
    if n % 10 < 6:
        put(folder / WEIGHTS, pickle.dumps(evil, protocol=n % 10))
        return
    stream = io.BytesIO()
    torch.save(evil | {"w": torch.ones(n)}, stream, _use_new_zipfile_serialization=n % 2 == 0)
    put(folder / WEIGHTS, stream.getvalue())


def no_checkpoint(folder: Path, n: int, rng: np.random.Generator) -> None:
    "Empty files, text, folders and nothing, in the place of either file or of both."
    kind, names = n % 4, ([WEIGHTS], [META], [WEIGHTS, META])[n // 4 % 3]
    for name in names:
        if kind < 2:
            put(folder / name, (b"", b"not what it is called\n")[kind]) if name == WEIGHTS else (folder / name).write_bytes((b"", b"{ text }\n")[kind])
        else:
            (folder / name).unlink()
        if kind == 2:
            (folder / name).mkdir()


@dataclass(frozen=True)
class Fault:
    "What is done to a copy of a sound checkpoint, and what the refusal has to say."

    spoil: Spoil
    said: str  # A regular expression


FAULTS = {
    "weights cut short": Fault(cut(WEIGHTS, honest=False), "SHA-256 is"),
    "weights cut short, hash put right": Fault(cut(WEIGHTS, honest=True), "not a safetensors file"),
    "weights with a flipped bit": Fault(flip(WEIGHTS), "SHA-256 is"),
    "wrong hash": Fault(wrong_hash, "SHA-256 is"),
    "description cut short": Fault(cut(META, honest=False), "is not JSON"),
    "description with a flipped bit": Fault(flip(META), "is not JSON|is not what was written|CheckpointMeta"),
    "other JSON": Fault(other_json, "CheckpointMeta|checkpoint (classes|threshold|mean|std|weights_sha256) = "),
    "another task wanted": Fault(other_task, "has task 'glom', needed is"),
    "other classes or channels wanted": Fault(other_classes, "has (classes|in_channels) .*, needed is"),
    "other tensors": Fault(other_tensors, "do not fit the network"),
    "description of another network": Fault(other_network, "do not fit the network|no network can be built from it"),
    "pickle called safetensors": Fault(pickled, "not a safetensors file"),
    "empty, text, a folder, nothing": Fault(no_checkpoint, "no checkpoint here|not a safetensors file|is not JSON"),
}


def try_to_load(sound: Path, fault: Fault, n: int, seed: tuple[int, ...]) -> str:
    "Spoils a copy and loads it. The EqError of a right refusal goes on to the caller; a payload that ran or a wrong reason is an AssertionError."
    place = Path(tempfile.mkdtemp(dir=sound.parent))
    folder = place / "net"
    shutil.copytree(sound, folder)
    asked = fault.spoil(folder, n, np.random.default_rng([*seed, n])) or {}
    try:
        load_checkpoint(folder, **asked)
    except EqError as error:
        if not re.search(fault.said, str(error)):
            raise AssertionError(f"refused for another reason: {error}") from error
        if str(folder) not in str(error):
            return "unnamed"
        raise
    finally:
        ran = (place / RAN).exists()
        shutil.rmtree(place)
        if ran:
            raise AssertionError("a pickle was run")
    return "silent"
