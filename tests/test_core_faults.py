"""What the core floor promises when things go wrong: full disk, no permission, kill -9, Ctrl-C, flipped bytes, many writers at once."""
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from safetensors.numpy import save_file

from eq.core.files import TEMP_PREFIX, atomic_write, list_files, read_json, sha256_bytes, write_json, write_text
from eq.core.logs import Logger, read_log
from eq.core.paths import new_run_dir
from eq.core.provenance import LOG, MANIFEST, start_run, verify_run
from eq.core.registry import EqError

NOBODY = 65534
SMALL_DISK = "64k"


@contextmanager
def ordinary_user() -> Iterator[None]:
    "Root may write anywhere, so permissions are tried as nobody."
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


NOISE = np.random.default_rng(0).integers(0, 256, (512, 512), dtype=np.uint8)  # 256 KiB that do not compress
WRITERS = {
    "bytes": lambda path: path.write_bytes(NOISE.tobytes()),
    "numpy": lambda path: np.save(path, NOISE),
    "png": lambda path: Image.fromarray(NOISE).save(path),
    "tiff": lambda path: tifffile.imwrite(path, NOISE, compression="zlib"),
    "safetensors": lambda path: save_file({"w": NOISE}, path),
    "text": lambda path: path.write_text("number,area\n" * 30_000),
}
SUFFIX = {"bytes": ".bin", "numpy": ".npy", "png": ".png", "tiff": ".tif", "safetensors": ".safetensors", "text": ".csv"}


@pytest.mark.parametrize("kind", WRITERS)
def test_full_disk_keeps_the_previous_version(small_disk: Path, kind: str) -> None:
    target = small_disk / f"result{SUFFIX[kind]}"
    write_text(target, "previous version")
    with pytest.raises(EqError, match="disk full while writing .*free some space"), atomic_write(target) as temp:
        WRITERS[kind](temp)
    assert target.read_text() == "previous version"
    assert [p.name for p in small_disk.iterdir()] == [target.name]
    assert write_text(target, "works again once there is space").read_text().startswith("works")


def test_full_disk_stops_a_run_with_the_reason(small_disk: Path) -> None:
    folder = small_disk / "run"
    with pytest.raises(EqError, match="disk full while writing"), start_run("predict", folder) as run, atomic_write(run.dir / "mask.npy") as temp:
        np.save(temp, NOISE)
    manifest = read_json(folder / MANIFEST)  # the temporary file is gone, so there is room to say why
    assert manifest["status"] == "failed" and "disk full" in manifest["error"]
    assert verify_run(folder).ok


def test_full_disk_while_logging_and_in_the_manifest(small_disk: Path) -> None:
    folder = small_disk / "run"
    with pytest.raises(EqError, match=r"disk full while writing .*log\.jsonl"), start_run("predict", folder) as run:
        (run.dir / "kept.bin").write_bytes(b"x" * 40_000)
        for n in range(1000):
            run.log.debug("a line that fills the disk", n=n, text="x" * 200)
    left = {p.name for p in folder.iterdir()}
    assert {"kept.bin", LOG} <= left and not any(name.startswith(TEMP_PREFIX) for name in left)
    assert MANIFEST not in left or read_json(folder / MANIFEST)["status"] == "failed"
    assert read_log(folder / LOG)[0]["message"] == "run started"


def test_unwritable_folder_is_named() -> None:
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o755)  # nobody may reach the folder, but not write to it
        locked = Path(base) / "locked"
        locked.mkdir(mode=0o555)
        with ordinary_user():
            for attempt in (
                lambda: new_run_dir("predict", locked),
                lambda: new_run_dir("predict", locked / "deeper"),
                lambda: start_run("predict", locked),
                lambda: write_json(locked / "a.json", {}),
                lambda: Logger(locked / LOG),
            ):
                with pytest.raises(EqError, match=r"cannot write .*locked.*: Permission denied"):
                    attempt()
        assert list(locked.iterdir()) == []


KILL_WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
from eq.core.files import atomic_write, list_files

target, draw, seen = Path(sys.argv[1]), random.Random(0), set()
for round in range(30):
    child = os.fork()
    if child == 0:
        n = round * 1000
        while True:
            n += 1
            with atomic_write(target) as temp, temp.open("wb") as f:
                for _ in range(64):
                    f.write(b"%08d" % n * 512)
    time.sleep(draw.uniform(0.005, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    content = target.read_bytes() if target.exists() else b""
    assert content == content[:8] * (64 * 512 if content else 0), "not one whole version under the final name"
    assert all(p == target for p in list_files(target.parent)), "something half-written counts as a result"
    seen.add(content[:8])
print(len(seen), "versions,", len(list(target.parent.iterdir())) - 1, "left half-written")
"""


def test_kill_9_inside_a_write_leaves_a_whole_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILL_WRITERS, str(tmp_path / "state.bin")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    versions, half = (int(word) for word in done.stdout.split() if word.isdigit())
    assert versions > 5 and half > 5, f"the kills have to hit writes: {done.stdout}"


RUN_FOREVER = """
import sys, time
from eq.core.provenance import start_run
with start_run("train", sys.argv[1], params={"seed": 3}) as run:
    (run.dir / "epoch1.txt").write_text("kept")
    run.add_metrics({"dice": 0.5})
    run.log.info("epoch", n=1)
    print("ready", flush=True)
    time.sleep(60)
"""


def stopped_run(folder: Path, how: signal.Signals) -> int:
    "Start a run in a process of its own, stop it by a signal, return its exit status."
    with subprocess.Popen([sys.executable, "-c", RUN_FOREVER, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(how)
        return process.wait(timeout=30)


def test_ctrl_c_writes_a_manifest(tmp_path: Path) -> None:
    assert stopped_run(tmp_path / "run", signal.SIGINT) != 0
    manifest = read_json(tmp_path / "run" / MANIFEST)
    assert (manifest["status"], manifest["metrics"], manifest["params"]) == ("interrupted", {"dice": 0.5}, {"seed": 3})
    found = verify_run(tmp_path / "run")
    assert found.ok and "interrupted" in found.notes[0]


def test_kill_9_leaves_no_manifest_and_can_be_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert stopped_run(folder, signal.SIGKILL) == -signal.SIGKILL
    with pytest.raises(EqError, match=r"no manifest\.json.*was killed"):
        verify_run(folder)
    assert (folder / "epoch1.txt").read_text() == "kept"
    with start_run("train", folder, resume=True) as run:
        (run.dir / "epoch2.txt").write_text("new")
    found = verify_run(folder)
    assert found.ok and found.checked == 4 and found.notes == []
    assert [r["message"] for r in read_log(folder / LOG)].count("run started") == 2


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    source = tmp_path / "image.bin"
    source.write_bytes(NOISE[:64].tobytes())
    with start_run("predict", tmp_path / "run") as run:
        run.add_input(source)
        (run.dir / "mask.bin").write_bytes(NOISE[64:128].tobytes())
        run.add_metrics({"dice": 0.9})
    assert verify_run(run.dir).ok
    names = {source: f"input {source.resolve()}", run.dir / "mask.bin": "artefact mask.bin", run.dir / LOG: f"artefact {LOG}"}
    draw = random.Random(0)
    for _ in range(30):
        for path, name in names.items():
            whole = path.read_bytes()
            at, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            found = verify_run(run.dir)
            assert [b.what for b in found.broken] == [name]
            path.write_bytes(whole)
    manifest, whole = run.dir / MANIFEST, (run.dir / MANIFEST).read_text()
    for digit in [i for i, c in enumerate(whole) if c.isdigit()][::7]:  # a number changed anywhere in the manifest
        manifest.write_text(whole[:digit] + str((int(whole[digit]) + 1) % 10) + whole[digit + 1 :])
        try:
            found = verify_run(run.dir)
            assert not found.ok and found.broken[0].what == MANIFEST
        except EqError:
            pass  # no longer JSON, or no longer a manifest: refused by name
    manifest.write_text(whole)
    assert verify_run(run.dir).ok


def test_many_writers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQ__OUTPUTS", str(tmp_path / "outputs"))
    target = tmp_path / "shared.json"
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda n: new_run_dir("predict"), range(40)))
        list(pool.map(lambda n: write_json(target, {"writer": n, "text": "x" * 5000}), range(40)))
        log = Logger(tmp_path / LOG, level="error")
        list(pool.map(lambda n: log.info("line", n=n), range(400)))
    assert len(set(folders)) == 40
    assert len(read_json(target)["text"]) == 5000 and len(list_files(tmp_path)) == 2
    assert sorted(r["n"] for r in read_log(tmp_path / LOG)) == list(range(400))


def test_hash_of_an_input_is_of_what_was_read(tmp_path: Path) -> None:
    image = tmp_path / "image.bin"
    image.write_bytes(b"as read")
    with start_run("predict", tmp_path / "run") as run:
        run.add_input(image)
        image.write_bytes(b"changed while the run went on")
    assert read_json(run.dir / MANIFEST)["inputs"][0]["sha256"] == sha256_bytes(b"as read")
    assert verify_run(run.dir).broken[0].what.startswith("input ")
