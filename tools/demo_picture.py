"""Writes nbs/images/demo.png, the picture of the README, from the folder of a demo run: one unseen synthetic field as it is, and outlined."""
import sys
from pathlib import Path

from PIL import Image

from eq.core.files import atomic_write
from eq.data.cohort import load_cohort
from eq.data.io import open_image
from eq.data.split import split_cohort
from eq.inference.evaluate import evaluate_cohort
from eq.inference.segment import Segmenter
from eq.reporting.overlay import contact_sheet
from eq.workflows.outcome import outlined, telling_images

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit("usage: tools/demo_picture.py RUN, the folder of an `eq demo`")
    run = Path(sys.argv[1])
    test = split_cohort(load_cohort(run / "images" / "kidney" / "cohort.csv")).test
    segmenter = Segmenter.from_checkpoint(run / "glom")
    evaluation = evaluate_cohort(segmenter, test)
    chosen = evaluation.images[telling_images(evaluation)["median"]]
    row = next(r for r in test.table.to_dict("records") if str(r["image"]) == chosen.image)
    titles = ["a synthetic field of an animal that training never saw", f"found (blue) and the truth (amber): Dice {chosen.pixel.dice:.2f}"]
    sheet = contact_sheet([open_image(chosen.image).rgb(), outlined(segmenter, row)], titles, columns=2, width=10.0)
    with atomic_write(ROOT / "nbs" / "images" / "demo.png") as temp:
        sheet.savefig(temp, format="png", dpi=110)
        with Image.open(temp) as picture:
            small = picture.convert("RGB").quantize(256)
        small.save(temp, format="PNG", optimize=True)
    print(f"nbs/images/demo.png written from {chosen.image}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
