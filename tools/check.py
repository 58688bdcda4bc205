"""What `make test` runs: the quick checks beside the notebooks, then pytest; ends with the times and pytest's own closing line.

export   nbdev's export and clean, done on a copy, change nothing in nbs/ or eq/ (so `git diff` stays empty)
layers   lint-imports: the floors in .importlinter
style    ruff over notebooks, tests, tools and the package
types    pyright over eq/
notebooks  every notebook's tests; cells flagged `data` run where the images are, and must where CI is set
pytest   tests/, with the coverage of eq/ by them
"""
import argparse
import contextlib
import filecmp
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LOGS = ROOT / "build" / "check"
COVER_AT_LEAST = 80
LONGEST = 50 * 60  # seconds of pytest; it takes ten minutes
STEPS = ("export", "layers", "style", "types", "notebooks", "pytest")


def data_is_there() -> bool:
    "Whether the real images can be read; where CI is set they must be."
    from eq.core.paths import data_root

    root = data_root()
    found = (root / "em_vnc").is_dir()
    if not found and os.environ.get("CI"):
        sys.exit(f"CI is set, but {root} has no em_vnc folder: the tests on real images must run here (EQ__DATA__ROOT names their folder)")
    if not found:
        print(f"no real images in {root}: the cells and tests that need them are listed as not run (EQ__DATA__ROOT names another folder)")
    return found


def unlike(left: Path, right: Path) -> list[str]:
    "Every file that differs between two folders, or is in one of them only."
    compared = filecmp.dircmp(left, right, ignore=["__pycache__", ".ipynb_checkpoints"])
    _, changed, errors = filecmp.cmpfiles(left, right, compared.common_files, shallow=False)
    here = [str(Path(left.name, name)) for name in sorted({*changed, *errors, *compared.left_only, *compared.right_only})]
    return here + [str(Path(left.name, name)) for sub in compared.common_dirs for name in unlike(left / sub, right / sub)]


def check_export() -> int:
    "Export and clean a copy of the notebooks and the package; nothing may differ from the original afterwards."
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for name in ("nbs", "eq"):
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        for name in ("settings.ini", "_quarto.yml", "params.yaml"):  # what links in nbs/ and eq/ lead to, too
            shutil.copy(ROOT / name, copy)
        for command in ("nbdev_export", "nbdev_clean"):
            done = subprocess.run([BIN / command], cwd=copy, check=False, env={**os.environ, "PYTHONPATH": str(copy)})
            if done.returncode:
                return done.returncode
        changed = unlike(ROOT / "nbs", copy / "nbs") + unlike(ROOT / "eq", copy / "eq")
    print("\n".join(f"changed by nbdev_export + nbdev_clean: {name}" for name in changed) or "export and clean change nothing")
    return 1 if changed else 0


def wrong(lines: list[str], most: int = 150) -> list[str]:
    "What a failed step said, without what went well: the end of it, and of each line 300 characters."
    return [line[:300] for line in lines if not line.startswith("ok  ")][-most:]


class Steps:
    "Runs steps, keeps their output in build/check/STEP.log and remembers how each went."

    def __init__(self, only: list[str]):
        self.only, self.results, self.lock = only, {}, threading.Lock()
        shutil.rmtree(LOGS, ignore_errors=True)
        LOGS.mkdir(parents=True)

    def run(self, name: str, command: list, **env: str) -> None:
        "One step, its output shown only if it fails."
        if name not in self.only:
            return
        start = time.time()
        with open(LOGS / f"{name}.log", "w", encoding="utf-8") as log:
            whole = [str(c) for c in command]
            code = subprocess.run(whole, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False, env=environment(**env)).returncode
        self.finish(name, code, time.time() - start)

    def finish(self, name: str, code: int, seconds: float) -> None:
        with self.lock:
            self.results[name] = (code, seconds)
            print(f"{'ok  ' if code == 0 else 'FAIL'} {seconds:6.1f} s  {name}", flush=True)
            text = (LOGS / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            told = [line for line in text if line.startswith(("not run", "UNSTEADY")) or " s  " in line] if name == "notebooks" else []
            shown = wrong(text) if code else told[-100:]
            print("".join(f"    {line}\n" for line in shown), end="", flush=True)

    def pytest(self, command: list, **env: str) -> str:
        "The last step, shown as it goes but for its closing line, which is returned. All that it started ends with it."
        start, held, closing, whole = time.time(), "", "no tests were run", [str(c) for c in command]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment(**env), "start_new_session": True}
        with open(LOGS / "pytest.log", "w", encoding="utf-8") as log, subprocess.Popen(whole, cwd=ROOT, **how) as process:
            watch = threading.Timer(LONGEST, os.killpg, (process.pid, signal.SIGKILL))  # what hangs shall not eat the time in which it could be told
            watch.start()
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    log.write(line)
                    print(held, end="", flush=True)
                    held = line
                code = process.wait()
            finally:
                watch.cancel()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        closing, extra = (held.strip(), "") if " in " in held and ("passed" in held or "failed" in held) else (closing, held)
        print(extra, end="")
        self.results["pytest"] = (code, time.time() - start)
        return closing


def environment(**more: str) -> dict[str, str]:
    "Two processes side by side on two cores: one thread each."
    fixed = {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "COVERAGE_FILE": str(ROOT / ".coverage"), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **fixed, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}", **more}


def measured() -> dict[str, str]:
    "Coverage goes to a folder of its own: pytest-cov erases and combines whatever lies beside its data file."
    folder = LOGS / "cover"
    folder.mkdir(parents=True, exist_ok=True)
    return {"COVERAGE_FILE": str(folder / ".coverage"), "COVERAGE_RCFILE": str(ROOT / ".coveragerc")}


def coverage(steps: Steps) -> None:
    "Put the parts together and hold them against the bar. Programs that tests start are not counted: it would slow each of their imports by half."
    command, start = [str(BIN / "coverage")], time.time()
    parts = [str(file) for file in sorted((LOGS / "cover").glob(".coverage*"))]  # of a folder it would skip a plain .coverage
    subprocess.run([*command, "combine", "--quiet", "--keep", *parts], cwd=ROOT, env=environment(), check=False)
    report = [*command, "report", f"--fail-under={COVER_AT_LEAST}", "--sort=cover"]
    done = subprocess.run(report, cwd=ROOT, env=environment(), check=False, capture_output=True, text=True)
    (LOGS / "coverage.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    lines = done.stdout.strip().splitlines()
    print("\n".join(["", "least covered modules of eq/ (by tests/ alone; what a notebook's cells try is not counted)", *lines[:12], "...", *lines[-3:]]))
    steps.results["coverage"] = (done.returncode, time.time() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="run these steps only")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 2), help="processes side by side")
    args = parser.parse_args()
    start, flags, steps = time.time(), ["data"] if data_is_there() else [], Steps(args.only)
    (ROOT / ".coverage").unlink(missing_ok=True)

    def quick() -> None:
        steps.run("layers", [BIN / "lint-imports"])
        steps.run("style", [BIN / "ruff", "check", "eq", "nbs", "tests", "tools"])
        steps.run("export", [sys.executable, __file__, "--export"])
        steps.run("types", [BIN / "pyright"])

    beside = threading.Thread(target=quick)
    beside.start()
    steps.run("notebooks", [sys.executable, "tools/nbtest.py", "--jobs", args.jobs, "--flags", " ".join(flags)])
    beside.join()
    closing = ""
    if "pytest" in args.only:
        spread = ["-n", args.jobs, "--dist", "worksteal"]
        shown = ["-q", "-ra", "--color=no", "--durations=15"]
        closing = steps.pytest([BIN / "pytest", "tests", *shown, "--cov", "--cov-report=", *spread], **measured())
        coverage(steps)
    print("\nwhere the time went")
    for name, (code, seconds) in steps.results.items():
        print(f"  {'ok  ' if code == 0 else 'FAIL'} {seconds:7.1f} s  {name}")
    failed = [name for name, (code, _) in steps.results.items() if code]
    for name in steps.results:  # once more, at the end: of a long log a record may keep nothing else
        text = (LOGS / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        if name != "pytest" and (name in failed or any(line.startswith("UNSTEADY") for line in text)):
            print("\n".join([f"\nwhat {name} said", *wrong(text, 60)]))
    verdict = f"failed: {', '.join(failed)} (logs in {LOGS.relative_to(ROOT)})" if failed else "everything passed"
    print(f"  total {time.time() - start:.0f} s; {verdict}")
    print(closing, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(check_export() if "--export" in sys.argv else main())
