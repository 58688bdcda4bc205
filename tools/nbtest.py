"""Runs the notebooks' tests as `nbdev_test` does, side by side, with tracebacks that point at the package.

A notebook runs its own copy of what it exports. Here an exported cell is compiled under the file and the lines that it has in `eq/`:
tracebacks, `inspect` and, where somebody asks for it (`coverage run tools/nbtest.py`), coverage then speak of the package.
"""
import argparse
import ast
import os
import re
import sys
import time
import traceback
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import nbdev.test
from execnb.shell import CaptureShell
from IPython.core.compilerop import CachingCompiler
from nbdev.config import get_config
from nbdev.process import NBProcessor

HEADER = re.compile(r"^# %% (\S+\.ipynb) #?(\S+)$")
ROOT = Path(__file__).resolve().parent.parent


@cache
def exported_blocks() -> dict[tuple[str, str], tuple[Path, int, int]]:
    "(notebook name, cell id) -> (file in eq, line of the block's header, lines of the block)."
    found = {}
    for module in sorted((ROOT / "eq").rglob("*.py")):
        lines = module.read_text(encoding="utf-8").splitlines()
        heads = [(n, m) for n, line in enumerate(lines, 1) if line.startswith("# %% ") and (m := HEADER.match(line))]
        ends = [line for line, _ in heads[1:]] + [len(lines) + 1]
        for (at, match), end in zip(heads, ends, strict=False):
            size = len("\n".join(lines[at : end - 1]).strip().splitlines())
            found[Path(match[1]).name, match[2]] = (module, at, size)
    return found


class PlacedCompiler(CachingCompiler):
    "Compiles a cell under the place that `target` names, or as IPython does where there is none."

    target: tuple[Path, int] | None = None

    def __call__(self, source, filename, *args, **kwargs):
        if self.target and isinstance(source, ast.AST):
            path, line = self.target
            source, filename = ast.increment_lineno(source, line), str(path)
        return super().__call__(source, filename, *args, **kwargs)


class PlacedShell(CaptureShell):
    "A notebook shell whose exported cells count as lines of `eq/`."

    compiler_class = PlacedCompiler

    def __init__(self, path, **kwargs):
        super().__init__(path, **kwargs)
        self.notebook, self._cell_idx = Path(path).name, 0

    def cell(self, cell, *args, **kwargs):
        place = exported_blocks().get((self.notebook, getattr(cell, "id", "")))
        lead = len(cell.source) - len(cell.source.lstrip("\n")) if cell.source else 0
        same = place is not None and place[2] == len(cell.source.strip().splitlines()) and lead == 0
        self.compile.target = (place[0], place[1]) if place is not None and same else None
        return super().cell(cell, *args, **kwargs)


def run_one(job: tuple[Path, list[str]]) -> tuple[str, bool, float]:
    "Test one notebook in this process."
    path, flags = job
    config = get_config()
    nbdev.test.CaptureShell = PlacedShell
    os.chdir(config.nbs_path)
    try:
        passed, seconds = nbdev.test.test_nb(path, skip_flags=config.tst_flags.split(), force_flags=flags, basepath=config.config_path)
    except Exception:  # not a failing cell, which test_nb reports itself: shown, and counted as a failure
        traceback.print_exc()
        passed, seconds = False, 0.0
    return path.name, passed, seconds


def preload() -> None:
    "Import what most notebooks need once; every notebook is then a fork of its own, with registries as empty as in a fresh kernel."
    for name in ("torch", "fastai.vision.all", "segmentation_models_pytorch", "albumentations", "skimage.measure", "matplotlib.pyplot", "pandas"):
        import_module(name)
    assert not any(name.startswith("eq.") for name in sys.modules), "the package must not be loaded before the fork"


def flagged_cells(paths: list[Path]) -> dict[str, dict[str, int]]:
    "Flag -> notebook -> number of cells that carry it."
    flags, found = get_config().tst_flags.split(), {}
    for path in paths:
        for cell in NBProcessor(path).nb.cells:
            for flag in flags:
                if flag in cell.directives_:
                    of_flag = found.setdefault(flag, {})
                    of_flag[path.name] = of_flag.get(path.name, 0) + 1
    return found


def run_all(paths: list[Path], flags: list[str], jobs: int, results: dict[str, bool]) -> None:
    "Test notebooks side by side, each in a fork of its own; what became of each is put into `results`."
    with get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        for name, passed, seconds in pool.imap_unordered(run_one, [(p, flags) for p in paths], chunksize=1):
            results[name] = passed
            print(f"{'ok  ' if passed else 'FAIL'} {seconds:6.1f} s  {name}", flush=True)
        pool.close()
        pool.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks to test, by a part of their name; default: all")
    parser.add_argument("--flags", default="", help="flags whose cells are run as well, for example 'data slow'")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    flags = args.flags.split()
    paths = [p for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) if not args.names or any(n in p.name for n in args.names)]
    results, start = {}, time.time()
    preload()
    # largest first: two workers then end at about the same time
    run_all(sorted(paths, key=lambda p: -p.stat().st_size), flags, max(1, args.jobs), results)
    once = sorted(name for name, passed in results.items() if not passed)
    if once:  # alone on the machine: what fails twice is broken, what fails once leans on time or on its neighbours, and is told
        print(f"once more, one at a time: {', '.join(once)}", flush=True)
        run_all([p for p in paths if p.name in once], flags, 1, results)
        print("".join(f"UNSTEADY, failed beside others and passed alone: {name}\n" for name in once if results[name]), end="", flush=True)
    for flag, notebooks in flagged_cells(paths).items():
        if flag not in flags:
            cells = ", ".join(f"{name} ({count})" for name, count in notebooks.items())
            print(f"not run, flag {flag!r}: {sum(notebooks.values())} cells in {cells}")
    failed = sorted(name for name, passed in results.items() if not passed)
    print(f"{len(results) - len(failed)} of {len(results)} notebooks passed in {time.time() - start:.0f} s; failed: {', '.join(failed) or 'none'}")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    import nbtest  # by its name: a notebook's shell takes the place of __main__, and workers must still find their function

    sys.exit(nbtest.main())
