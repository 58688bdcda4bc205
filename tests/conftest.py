"""What every test shares: outputs never land in the checkout, and tests marked `data` know whether the real images are there."""
import os
import signal
import sys
from pathlib import Path

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


@pytest.fixture(autouse=True)
def real_images(request):
    "A test marked `data` needs the real images: without them it fails where CI is set and is skipped elsewhere."
    if request.node.get_closest_marker("data") is None:
        return
    from eq.core.paths import data_root

    root = data_root()
    if not (root / "em_vnc").is_dir():
        say = f"no real images in {root}; EQ__DATA__ROOT names another folder"
        pytest.fail(f"CI is set, but there are {say}") if os.environ.get("CI") else pytest.skip(say)
