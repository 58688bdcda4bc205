"""ImageNet weights come from a hub; no hub can be reached in CI, so a local server speaks its protocol (HEAD with ETag and commit, then GET)."""
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import save_file

from eq.models.unet import create_unet

PROGRAM = """
from eq.core.registry import EqError
from eq.models.unet import create_unet
try:
    net = create_unet('unet', 'resnet18', seed=0, pretrained=True)
    print('first weight', float(net.get_submodule('encoder').state_dict()['conv1.weight'].flatten()[0]))
except EqError as error:
    print('EqError', error)
"""


class Hub(BaseHTTPRequestHandler):
    "Answers /<repo>/resolve/<revision>/<file> from a folder; anything else is 404."

    def __init__(self, *args, folder: Path, **kwargs):
        self.folder = folder
        super().__init__(*args, **kwargs)

    def _answer(self, body: bool) -> None:
        file = self.folder / self.path.rsplit("/", 1)[-1]
        if "/resolve/" not in self.path or not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    "A running hub: its address, and the folder it serves."
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()


def ask(endpoint: str, cache: Path) -> str:
    "What a fresh process says that is sent to this hub with an empty cache."
    # what a cut-off machine sets to make the hub client answer at once would hide the server here
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, env=env, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_weights_are_fetched_and_used(hub: tuple[str, Path], tmp_path: Path) -> None:
    endpoint, folder = hub
    encoder = create_unet("unet", "resnet18", seed=42).get_submodule("encoder").state_dict()
    save_file({k: v.contiguous() for k, v in encoder.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    said = ask(endpoint, tmp_path / "cache")
    assert said.split()[-1] == str(float(encoder["conv1.weight"].flatten()[0]))


def test_missing_weights_are_an_error_never_random(hub: tuple[str, Path], tmp_path: Path) -> None:
    said = ask(hub[0], tmp_path / "cache")
    assert said.startswith("EqError ImageNet weights for 'resnet18' cannot be had"), said
    assert "pretrained=/path/model.safetensors" in said and "pretrained=False" in said


def test_no_hub_at_all(tmp_path: Path) -> None:
    assert "cannot be had" in ask("http://127.0.0.1:9", tmp_path / "cache")  # the discard port: nobody listens
