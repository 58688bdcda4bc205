"""What every test shares: outputs never land in the checkout, and what a test needs and this machine lacks is skipped, or fails where CI is set."""
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a server or `cmd &` ignores it, and children inherit that: tests of Ctrl-C would wait for ever
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("EQ__TRAIN__PRETRAINED", "false")  # tests take small encoders, whose weights no installed package holds
os.environ.setdefault("EQ__GLOM__PAINTED", "0")
os.environ.setdefault("EQ__GLOM__REHEARSAL", "0")  # painting takes a minute; what a rehearsal does is tested in its notebook


@pytest.fixture(scope="session", autouse=True)
def outputs_elsewhere(tmp_path_factory):
    "Runs without --out go to a temporary folder."
    given = os.environ.get("EQ__OUTPUTS")
    os.environ["EQ__OUTPUTS"] = str(tmp_path_factory.mktemp("outputs"))
    yield
    if given is None:
        del os.environ["EQ__OUTPUTS"]
    else:
        os.environ["EQ__OUTPUTS"] = given


def not_here(say: str) -> NoReturn:
    "What this machine cannot test is listed as skipped; CI must be able to test everything."
    if os.environ.get("CI"):
        pytest.fail(f"CI is set, but {say}")
    pytest.skip(say)


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    "A disk of the size that the test's module gives as SMALL_DISK. The notebooks show a full disk with a simulated error, for machines that may not mount one."
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={request.module.SMALL_DISK}", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        not_here(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(autouse=True)
def real_images(request):
    "A test marked `data` needs the real images: without them it fails where CI is set and is skipped elsewhere."
    if request.node.get_closest_marker("data") is None:
        return
    from eq.core.paths import data_root

    root = data_root()
    if not (root / "em_vnc").is_dir():
        not_here(f"there are no real images in {root}; EQ__DATA__ROOT names another folder")
