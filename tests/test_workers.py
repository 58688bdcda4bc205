"""Workers that die: at work, and their successors while they start. Dask gives the latter up, and whoever waits for an answer waits for ever."""
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys, threading, time
import psutil
from eq.core.registry import EqError
from eq.workflows import batch


def kill(times):
    "Worker processes, as soon as they appear."
    killed, deadline = set(), time.monotonic() + 60
    while len(killed) < times and time.monotonic() < deadline:
        for child in psutil.Process().children(recursive=True):
            try:
                if child.pid not in killed and "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
                    killed.add(child.pid)
            except psutil.Error:
                pass
        time.sleep(0.01)


if __name__ == "__main__":
    times = int(sys.argv[1])
    batch.ROUNDS = 2
    with batch.dask_engine(batch.Cluster("dask", workers=1, patience=2.0)) as run:
        killer = threading.Thread(target=kill, args=(times,), daemon=True)
        killer.start()
        try:
            print("answers", dict(run(time.sleep, [0.5, 0.1])), flush=True)
        except EqError as error:
            print("error", error, flush=True)
"""


def tried(tmp_path: Path, times: int) -> str:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "ignore", script, str(times)], capture_output=True, text=True, timeout=180)
    return done.stdout


def test_a_worker_that_dies_while_it_starts_is_replaced(tmp_path):
    "The first is killed at work, the second before it has said a word."
    assert "answers {0: None, 1: None}" in tried(tmp_path, 2)


def test_when_nobody_survives_the_run_ends_with_an_error(tmp_path):
    assert "error no worker for" in tried(tmp_path, 10**6)
