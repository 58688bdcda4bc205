"""Writes README.md from nbs/index.ipynb: its text, and the code and output of cells that are not hidden (`nbdev_readme` would need Quarto)."""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    "README.md as it should be."
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = ["<!-- Written by `make readme` from nbs/index.ipynb: edit that notebook, not this file. -->"]
    for cell in cells:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\(images/", "](nbs/images/", source))
        elif cell["cell_type"] == "code" and source and not re.search(r"^#\|\s*(hide|default_exp)", source, re.MULTILINE):
            parts.append(f"```python\n{source}\n```")
            text = "".join("".join(o.get("text", [])) for o in cell["outputs"] if o["output_type"] == "stream").rstrip()
            parts += [f"```\n{text}\n```"] if text else []
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> int:
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    print("README.md written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
