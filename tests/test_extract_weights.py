"""Weights out of old models: a real fastai export comes out equal, and no payload runs, with trust or without."""
import contextlib
import functools
import importlib
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from eq.core.registry import EqError
from eq.models.checkpoint import checkpoint_folder
from eq.models.extract import ExtractRequest, extract_weights
from eq.models.unpickle import Refused, read_guarded, weights_in
from eq.workflows.cli import main


def typed(*args: object) -> tuple[int, str]:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(a) for a in args])
    return code, err.getvalue()


def only_here(path: str) -> int:
    "Stands for the function of a notebook that old exports name and nobody has any more."
    return len(path)


def picture(n: int) -> torch.Tensor:
    return torch.full((3, 8, 8), n / 8)


def side(n: int) -> torch.Tensor:
    return torch.tensor(n % 2)


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import fastai.callback.progress  # noqa: F401  gives Learner its no_bar
    from fastai.data.core import Datasets
    from fastai.learner import Learner

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    loaders = Datasets(range(8), [[picture], [side]], splits=[range(4), range(4, 8)]).dataloaders(bs=4, device="cpu", num_workers=0)
    learn = Learner(loaders, net, loss_func=nn.CrossEntropyLoss(), path=tmp_path_factory.mktemp("fastai"))
    learn.get_y = only_here
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    return learn


def same(found: dict[str, torch.Tensor], learn: Any) -> bool:
    expected = learn.model.state_dict()
    return list(found) == list(expected) or set(found) == set(expected) and all(torch.equal(found[k], expected[k]) for k in expected)


def test_a_fastai_export_needs_trust_and_comes_out_equal(learner: Any, tmp_path: Path) -> None:
    export = tmp_path / "export.pkl"
    learner.export(export)
    code, said = typed("models", "extract-weights", export, "--out", tmp_path / "out")
    assert (code, said.count("\n")) == (2, 1) and "a pickle is a program that runs when it is opened" in said and "--trust-pickle" in said and not (tmp_path / "out").exists()
    found = extract_weights(ExtractRequest(export, tmp_path / "out", trust=True))
    assert same(load_file(found.path), learner) and (found.where, found.how) == ("a pickled module in 'model'", "stand-ins")
    about = json.loads(found.path.with_suffix(".json").read_text())
    assert about["guards"] and about["tensors"]["0.weight"] == ["float32", [4, 3, 3, 3]]


def test_weights_alone_need_no_trust_and_an_optimiser_does(learner: Any, tmp_path: Path) -> None:
    "fastai's `learn.save` keeps hyperparameters in a list class of its own; with_opt=False leaves tensors only."
    code, said = typed("models", "extract-weights", learner.save("m", with_opt=False), "--out", tmp_path / "w.safetensors")
    assert (code, said) == (0, "") and same(load_file(tmp_path / "w.safetensors"), learner)
    with open(learner.save("n", with_opt=True), "rb") as file:
        assert same(weights_in(read_guarded(file))[0], learner)


def test_an_export_whose_classes_are_gone(tmp_path: Path) -> None:
    "The module that defined the network does not exist here: stand-ins do not need it."
    (tmp_path / "gone.py").write_text("from torch import nn\nclass Old(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(2, 3)\n")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import torch, gone; torch.manual_seed(0); torch.save(gone.Old(), sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(tmp_path / "old.pkl")], check=True)
    (tmp_path / "gone.py").unlink()
    with open(tmp_path / "old.pkl", "rb") as file:
        found = weights_in(read_guarded(file))[0]
    torch.manual_seed(0)
    assert torch.equal(found["fc.weight"], nn.Linear(2, 3).weight)


# ---------------------------------------------------------------- payloads


class Call:
    "A pickle of this calls a function when it is loaded."

    def __init__(self, function: Any, *args: Any, state: Any = None):
        self.function, self.args, self.state = function, args, state

    def __reduce__(self) -> tuple:
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


def calls(mark: Path) -> Iterator[tuple[str, Any]]:
    "What attackers call, each leaving a mark."
    touch, write = f"touch {mark}", f"open({str(mark)!r}, 'w').close()"
    yield "os.system", Call(os.system, touch)
    yield "os.popen", Call(os.popen, touch)
    yield "subprocess.call", Call(subprocess.call, ["touch", str(mark)])
    yield "subprocess.Popen", Call(subprocess.Popen, ["touch", str(mark)])
    yield "subprocess.check_output", Call(subprocess.check_output, ["touch", str(mark)])
    yield "eval", Call(eval, write)
    yield "exec", Call(exec, write)
    yield "open", Call(open, str(mark), "w")
    yield "os.mkdir", Call(os.mkdir, str(mark))
    yield "os.open", Call(os.open, str(mark), os.O_CREAT | os.O_WRONLY)
    yield "os.symlink", Call(os.symlink, "/etc", str(mark))
    yield "os.execv", Call(os.execv, "/bin/touch", ["touch", str(mark)])
    yield "os.posix_spawn", Call(os.posix_spawn, "/bin/touch", ["touch", str(mark)], {})
    yield "shutil.copy", Call(shutil.copy, "/etc/hostname", str(mark))
    yield "shutil.rmtree", Call(shutil.rmtree, str(mark.parent / "victim"))
    yield "Path.touch", Call(Path.touch, mark)
    yield "Path.write_text", Call(Path.write_text, mark, "x")
    yield "__import__", Call(__import__, "antigravity")
    yield "import_module", Call(importlib.import_module, "this")
    yield "partial", Call(functools.partial(os.system, touch))
    yield "partial called", Call(functools.reduce, os.system, [touch, ""])
    yield "map in list", Call(list, Call(map, os.system, [touch]))
    yield "getattr", Call(getattr, Call(importlib.import_module, "os"), "system")
    yield "socket", Call(socket.create_connection, ("127.0.0.1", 9))
    yield "zipfile", Call(zipfile.ZipFile, str(mark), "w")
    yield "torch.load", Call(torch.load, str(mark.parent / "inner.pt"))
    yield "torch.hub", Call(torch.hub.load, "a/b", "c")
    yield "pickle.loads", Call(pickle.loads, pickle.dumps(Call(os.system, touch)))  # noqa: S301
    yield "setstate", Call(dict, state={"__class__": Call(os.system, touch)})
    yield "code", Call(compile, write, "x", "exec")


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    "Each call alone, inside a state dictionary, in torch's zip, its older format, beside tensors, and under a name that says otherwise."
    mark = folder / "ran"
    for n, (name, call) in enumerate(calls(mark)):
        try:
            plain = pickle.dumps(call, protocol=2 + n % 3)
        except (TypeError, AttributeError, pickle.PicklingError):
            continue  # modules cannot be pickled by the ordinary way; what remains is enough
        (folder / f"{n}-{name}.pkl").write_bytes(plain)
        yield f"{name}, plain", folder / f"{n}-{name}.pkl"
        inside = {"model": {"w": torch.ones(2), "b": call}}
        torch.save(inside, folder / f"{n}-{name}.pth", _use_new_zipfile_serialization=bool(n % 2))
        yield f"{name}, in a dictionary", folder / f"{n}-{name}.pth"


HAND_WRITTEN = {  # opcodes that no library writes
    "GLOBAL": b"cposix\nsystem\n(S'touch {mark}'\ntR.", "INST": b"(S'touch {mark}'\niposix\nsystem\n.", "OBJ": b"(cposix\nsystem\nS'touch {mark}'\no.",
    "py2 name": b"cos\nsystem\n(S'touch {mark}'\ntR.", "two pickles": b"N.cposix\nsystem\n(S'touch {mark}'\ntR.",
    "dotted": b"\x80\x04\x8c\x05torch\x8c\x0chub.os.system\x93\x8c\x0ctouch {mark}\x85R.",
}


def test_fifty_payloads_never_run(tmp_path: Path) -> None:
    "Without trust all are refused; the stand-ins that trust would use do not run them either. In this process, where a payload would be seen."
    (tmp_path / "victim").mkdir()
    mark, found = tmp_path / "ran", list(files(tmp_path))
    for name, code in HAND_WRITTEN.items():
        (tmp_path / f"{name}.pkl").write_bytes(code.replace(b"{mark}", str(mark).encode()))
        found.append((name, tmp_path / f"{name}.pkl"))
    assert len(found) >= 50, len(found)
    for name, path in found:
        with open(path, "rb") as file:
            with pytest.raises(Exception) as unsafe:  # noqa: B017, PT011  torch's own guard; every kind of error is a refusal
                weights_in(torch.load(file, weights_only=True))
            assert not isinstance(unsafe.value, AssertionError), name
            file.seek(0)
            with contextlib.suppress(Refused, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError):
                read_guarded(file)
        assert not mark.exists() and not mark.is_symlink() and (tmp_path / "victim").is_dir(), f"{name} ran"
        with pytest.raises(EqError, match="eq models extract-weights"):
            checkpoint_folder(path)


@pytest.mark.parametrize(("name", "trust"), [("GLOBAL", False), ("GLOBAL", True), ("tensors beside it", True), ("torn", False)])
def test_a_payload_is_refused_by_the_verb(name: str, trust: bool, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "x.pkl"
    data = {"torn": b"\x80\x04\x95", "tensors beside it": pickle.dumps({"model": {"w": 1.0}, "x": Call(os.system, f"touch {mark}")})}
    path.write_bytes(data.get(name, HAND_WRITTEN.get(name, b"")).replace(b"{mark}", str(mark).encode()))
    code, said = typed("models", "extract-weights", path, "--out", tmp_path / "out", *(["--trust-pickle"] if trust else []))
    assert (code, said.count("\n")) == (2, 1) and str(path) in said, said
    assert ("--trust-pickle" in said) is not trust, said
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_what_is_no_pickle_is_said_to_be_none(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "notes.pkl").write_text("weights are in the other folder")
    for name, what in (("model.safetensors", "it is a safetensors file: its weights are out already"), ("notes.pkl", "it is no pickle")):
        for trust in ([], ["--trust-pickle"]):
            code, said = typed("models", "extract-weights", tmp_path / name, "--out", tmp_path / "out", *trust)
            assert (code, said.count("\n")) == (2, 1) and what in said and "--trust-pickle" not in said, said


ESCAPE = """
import json, os, socket, subprocess, sys, urllib.request
from pathlib import Path
from eq.core.contain import Limits, contain
home, out, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
guards, met = contain(home, Limits(20, 2**28, 2**20)), {}
def act(name, call):
    try:
        call(); met[name] = True
    except BaseException as error:
        met[name] = False
act("socket", lambda: socket.create_connection(("127.0.0.1", port), 2))
act("url", lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2))
act("write", lambda: (out / "a").write_text("x"))
act("remove", lambda: (out / "kept").unlink())
act("run", lambda: subprocess.run(["/bin/true"]))
act("system", lambda: os.system("true") == 0 or 1 / 0)
act("large", lambda: (home / "big").write_bytes(bytes(2**21)))
act("memory", lambda: bytearray(2**30))
act("inside", lambda: (home / "ok").write_text("x"))
print(json.dumps([guards, met]))
"""


def test_what_is_contained_even_if_something_ran(tmp_path: Path) -> None:
    "Were there a hole in the stand-ins: no network, nothing written outside, no programs, little memory."
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    out.mkdir()
    (out / "kept").write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = subprocess.run([sys.executable, "-c", ESCAPE, home, out, str(server.getsockname()[1])], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    guards, met = json.loads(done.stdout.splitlines()[-1])
    assert guards and met == dict.fromkeys(met, False) | {"inside": True}, (guards, met)
    assert (out / "kept").exists() and not (out / "a").exists()


# ---------------------------------------------------------------- everything else refuses


def test_every_other_door_refuses_pickles_by_name(tmp_path: Path) -> None:
    mark, outputs = tmp_path / "ran", tmp_path / "out"
    evil = pickle.dumps(Call(os.system, f"touch {mark}"))
    for name in ("model.pkl", "model.pth", "model.ckpt", "model.bin"):
        (tmp_path / name).write_bytes(evil)
        for args in (
            ("predict", tmp_path / "a.png", "--model", tmp_path / name, "--out", outputs),
            ("train", "glom", "--source", "synthetic_kidney", "--from", tmp_path / name, "--out", outputs),
            ("evaluate", "--model", tmp_path / name, "--source", "synthetic_kidney"),
        ):
            code, said = typed(*args)
            assert (code, said.count("\n")) == (2, 1) and "eq models extract-weights" in said, (args, said)
    assert not mark.exists() and not outputs.exists()


def test_a_zarr_with_a_pickle_codec_is_refused(tmp_path: Path) -> None:
    from eq.data.io import open_image

    axes = [{"name": a, "type": "space"} for a in "yx"]
    for n, codecs in enumerate(({"compressor": {"id": "pickle"}, "filters": None}, {"compressor": None, "filters": [{"id": "pickle"}]})):
        folder = tmp_path / f"{n}.zarr"
        (folder / "0" / "0").mkdir(parents=True)
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text(json.dumps({"multiscales": [{"version": "0.4", "axes": axes, "datasets": [{"path": "0"}]}]}))
        about = {"zarr_format": 2, "shape": [8, 8], "chunks": [8, 8], "dtype": "|u1", "fill_value": 0, "order": "C", "dimension_separator": "/"}
        (folder / "0" / ".zarray").write_text(json.dumps(about | codecs))
        (folder / "0" / "0" / "0").write_bytes(pickle.dumps(Call(os.system, f"touch {tmp_path / 'ran'}")))
        with pytest.raises(EqError, match=f"{n}.zarr"):
            open_image(folder).read_all()
    assert not (tmp_path / "ran").exists()
