"""Runs notebooks and stores what their cells show, for the site. Run notebooks (nbs/runs) are not touched.

Cells flagged `data`, `slow` or `gpu` are not run and keep no output: no picture of a set that may not be redistributed gets into a file.
"""
import argparse
import json
import os
import sys
import time
from multiprocessing import get_context
from pathlib import Path

from execnb.shell import CaptureShell
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 950_000  # bytes of outputs in one notebook


def execute(path: Path) -> tuple[str, str, float]:
    "Run one notebook and store its outputs; says what went wrong, or nothing."
    os.environ["IN_TEST"] = "1"
    config, start = get_config(), time.time()
    flags = set(config.tst_flags.split())
    nb = json.loads(path.read_text(encoding="utf-8"))
    shown = NBProcessor(path).nb
    shell = CaptureShell(path, mpl_format="png")
    os.chdir(path.parent)
    for n, (stored, cell) in enumerate(zip(nb["cells"], shown.cells, strict=True)):
        if cell.cell_type != "code":
            continue
        directives = cell.directives_
        skipped = flags & directives.keys() or "nbdev_export" in cell.source or directives.get("eval:") == ["false"]
        stored["outputs"] = []
        if skipped:
            continue
        outputs = shell.run(cell.source)
        if shell.exc:
            return path.name, f"cell {n + 1}: {type(shell.exc).__name__}: {shell.exc}", time.time() - start
        if not {"hide", "export", "exporti"} & directives.keys():
            stored["outputs"] = [json.loads(json.dumps(o)) for o in outputs if o.get("name") != "stderr"]
    size = len(json.dumps([c.get("outputs") for c in nb["cells"]]))
    if size > LARGEST:
        return path.name, f"{size:,} bytes of outputs, more than {LARGEST:,}; show less", time.time() - start
    clean_nb(nb, allowed_cell_metadata_keys=config.get("allowed_cell_metadata_keys", "").split(), clean_ids=True)
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path.name, "", time.time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks to run, by a part of their name; default: all")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    paths = [p for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) if not args.names or any(n in p.name for n in args.names)]
    failed = []
    with get_context("fork").Pool(max(1, args.jobs), maxtasksperchild=1) as pool:  # a fresh process for each notebook
        for name, error, seconds in pool.imap_unordered(execute, paths, chunksize=1):
            print(f"{'FAIL' if error else 'ok  '} {seconds:6.1f} s  {name}  {error}", flush=True)
            failed += [name] if error else []
    print(f"{len(paths) - len(failed)} of {len(paths)} notebooks stored; run nbdev_clean if the export check complains")
    return 1 if failed else 0


if __name__ == "__main__":
    import execute_notebooks  # by its name: a notebook's shell takes the place of __main__, and workers must still find their function

    sys.exit(execute_notebooks.main())
