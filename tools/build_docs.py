"""Renders the site into _docs from the notebooks as they are stored, with Quarto where it is installed, else with nbconvert.

Both ways start from the same processed notebooks (_proc) and the same navigation (nbs/sidebar.yml, written here). Nothing is executed but
`show_doc`, in the namespace of the exported module.
"""
import argparse
import importlib
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

import yaml
from bs4 import BeautifulSoup
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, exec_show_docs

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


@dataclass(frozen=True)
class Page:
    "A notebook and where it goes."

    notebook: Path  # Below nbs/
    section: str  # Heading in the navigation
    title: str
    lead: str
    target: str  # Relative to _docs, as nbdev's own links expect it


def pages() -> list[Page]:
    "Every notebook that becomes a page, in the order of the navigation."
    found = [NBS / "index.ipynb"] if (NBS / "index.ipynb").exists() else []
    found += sorted(NBS.glob("[0-9]*.ipynb")) + sorted((NBS / "runs").glob("[!_.]*.ipynb"))
    return [page_of(path) for path in found]


def page_of(path: Path) -> Page:
    "What a notebook says of itself in its first cells."
    nb = read_nb(path)
    head = next((c.source for c in nb.cells if c.cell_type == "markdown"), "")
    title = next((line[2:].strip() for line in head.splitlines() if line.startswith("# ")), path.stem)
    lead = next((line[2:].strip() for line in head.splitlines() if line.startswith("> ")), "")
    if path.name == "index.ipynb":
        return Page(path, "", "Overview", lead, "index.html")
    if path.parent != NBS:
        return Page(path, "Run notebooks", title, lead, f"{path.parent.name}/{path.stem}.html")
    number, _, module = path.stem.partition("_")
    section = module.split(".")[0].capitalize() if not number.startswith("9") else "Tutorials"
    exported = next((m[1] for c in nb.cells if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", c.source, re.MULTILINE))), module)
    return Page(path, section, title, lead, f"{exported}.html")


def sidebar(found: list[Page]) -> str:
    "The navigation as Quarto reads it."
    contents: list = []
    for page in found:
        name = str(page.notebook.relative_to(NBS))
        if not page.section:
            contents.append(name)
            continue
        if not contents or not isinstance(contents[-1], dict) or contents[-1]["section"] != page.section:
            contents.append({"section": page.section, "contents": []})
        contents[-1]["contents"].append(name)
    return yaml.safe_dump({"website": {"sidebar": {"contents": contents}}}, sort_keys=False)


class ShowDocs(Processor):
    "Runs `show_doc` where the exported module's names are known; nbdev would run every cell that has an import."

    def begin(self):
        self.shell = CaptureShell()
        self.shell.run("from nbdev.showdoc import show_doc")
        names = [c.directives_["default_exp"][0] for c in self.nb.cells if "default_exp" in (getattr(c, "directives_", None) or {})]
        if names:
            self.shell.user_ns.update(vars(importlib.import_module(f"eq.{names[0]}")))
            self.shell.run("from nbdev.showdoc import show_doc")

    def __call__(self, cell):
        if cell.cell_type == "code" and re.search(r"^show_doc\(", cell.source or "", re.MULTILINE):
            self.shell.cell(cell)
            if self.shell.exc:
                raise self.shell.exc


class Filters(FilterDefaults):
    "nbdev's processors with that one replaced."

    def base_procs(self):
        return [ShowDocs if p is exec_show_docs else p for p in super().base_procs()]


def process(found: list[Page], proc: Path) -> None:
    "nbs/ -> _proc/, as nbdev does it."
    NbdevLookup()  # reads eq/_modidx.py once
    shutil.rmtree(proc, ignore_errors=True)
    for page in found:
        nb = read_nb(page.notebook)
        Filters()(nb)
        target = proc / page.notebook.relative_to(NBS)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, target)
    for name in ("sidebar.yml", "styles.css"):
        shutil.copy(NBS / name, proc / name)
    shutil.copytree(NBS / "images", proc / "images", dirs_exist_ok=True)


def render_quarto(proc: Path, docs: Path) -> None:
    "Let Quarto make the site."
    from nbdev.quarto import _nbdev_yml

    config = get_config()
    values = {k: config[k] for k in ("title", "description", "branch", "git_url", "doc_host", "doc_baseurl")}
    (proc / "nbdev.yml").write_text(_nbdev_yml.format(**values, doc_path="_docs"), encoding="utf-8")
    shutil.copy(ROOT / "_quarto.yml", proc / "_quarto.yml")
    subprocess.run(["quarto", "render", "--no-execute", "--to", "html"], cwd=proc, check=True)
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(proc / "_docs", docs)


def slug(text: str) -> str:
    "A heading's id, as pandoc makes it."
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", text.strip().lower()))


def to_markdown(cell: dict) -> dict:
    "A `show_doc` cell becomes what it shows; other code cells lose their directives."
    if cell["cell_type"] == "code" and "show_doc(" in cell["source"] and cell["outputs"]:
        text = "".join(cell["outputs"][0]["data"].get("text/markdown", ""))
        text = re.sub(r"^---\s*", "", text)
        if re.search(r"^```python\s*def [A-Z]\w*\(", text, re.MULTILINE):  # nbdev writes a class as the function that makes it
            text = re.sub(r"^\)(->None)?:$", ")", text.replace("\ndef ", "\nclass ", 1), count=1, flags=re.MULTILINE)
        text = re.sub(r"\[source\]\(([^)]*)\)\{[^}]*\}", r'<a class="source" href="\1">source</a>', text)
        return {"cell_type": "markdown", "metadata": {}, "source": text, "id": cell.get("id", "shown")}
    if cell["cell_type"] == "code":
        cell["source"] = "\n".join(line for line in cell["source"].split("\n") if not line.startswith("#|"))
    return cell


@cache
def exporter():
    "nbconvert's, whose templates take longer to load than a page to render."
    from nbconvert import HTMLExporter

    return HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)


def body_of(page: Page, proc: Path) -> BeautifulSoup:
    "A processed notebook as HTML."
    import nbformat

    nb = nbformat.read(proc / page.notebook.relative_to(NBS), 4)
    cells = [to_markdown(c) for c in nb.cells if c["cell_type"] != "raw" and "AUTOGENERATED" not in c["source"]]
    nb.cells = [nbformat.from_dict(c) for c in cells if c["source"].strip() or c.get("outputs")]
    if page.target == "index.html" or page.notebook.parent != NBS:
        nb.cells = [c for c in nb.cells if not c["source"].startswith(f"# {page.title}\n")]
    soup = BeautifulSoup(exporter().from_notebook_node(nb)[0], "html.parser")
    for mark in soup.select("a.anchor-link"):
        mark.decompose()
    for heading in soup.select("h1, h2, h3, h4"):
        heading["id"] = slug(heading.get_text())
    for link in soup.select("a.source"):
        heading = link.find_next(["h2", "h3", "h4"])
        if heading is not None:
            heading["class"] = "api"
            heading.append(link.extract())
    return soup


def with_code(text: str) -> str:
    "Escaped text whose backticks mark code."
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def mend_links(soups: dict[str, BeautifulSoup]) -> None:
    "Links to this site's published address become relative; a method without an anchor of its own leads to its class."
    config = get_config()
    base = f"{config['doc_host']}{config['doc_baseurl']}/"
    anchors = {target: {tag["id"] for tag in soup.select("[id]")} for target, soup in soups.items()}
    for target, soup in soups.items():
        up = "../" * target.count("/")
        for link in soup.select("a[href]"):
            href = str(link["href"])
            if href.startswith(base):
                name, _, anchor = href[len(base) :].partition("#")
                if name not in anchors:
                    link.unwrap()
                    continue
                anchor = next((a for a in (anchor, anchor.partition(".")[0]) if a in anchors[name]), "")
                link["href"] = up + name + (f"#{anchor}" if anchor else "")
            elif href.endswith(".ipynb") and "://" not in href:
                found = next((t for t in anchors if Path(t).stem == re.sub(r"^\d+[a-z]?_", "", Path(href).stem)), None)
                link["href"] = up + found if found else href


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} | eq</title><meta name="description" content="{about}">
<link rel="stylesheet" href="{up}styles.css"><link rel="stylesheet" href="{up}code.css"></head>
<body class="fallback"><nav class="side"><a class="brand" href="{up}index.html">eq</a>
<p class="claim">From kidney images to a treatment effect that can be defended</p>
{navigation}</nav><main><header><h1>{heading}</h1><p class="lead">{lead}</p></header>
{body}<footer class="turn">{turn}</footer></main>{contents}</body></html>
"""


def navigation(found: list[Page], here: Page, up: str) -> str:
    "The sidebar, the section of the page shown open."
    html, section = "", None
    for page in found:
        if page.section != section:
            html += "</ul></details>" if section else ""
            unfolded = " open" if page.section == here.section or not here.section else ""
            html += f"<details{unfolded}><summary>{escape(page.section)}</summary><ul>" if page.section else ""
            section = page.section
        current = ' class="here" aria-current="page"' if page == here else ""
        link = f'<a{current} href="{up}{page.target}">{with_code(page.title)}</a>'
        html += f"<li>{link}</li>" if page.section else f'<p class="top">{link}</p>'
    return html + ("</ul></details>" if section else "")


def on_this_page(soup: BeautifulSoup) -> str:
    "Headings of the page, where there are a few."
    heads = list(soup.select("h2, h3"))
    if len(heads) < 2:
        return ""
    name = [str(h.find(string=True)) for h in heads]  # without the link to the source
    items = "".join(f'<li class="{h.name}"><a href="#{escape(h["id"])}">{escape(n)}</a></li>' for h, n in zip(heads, name, strict=True))
    return f'<aside><p>On this page</p><ul>{items}</ul></aside>'


def render_nbconvert(found: list[Page], proc: Path, docs: Path) -> None:
    "Make the site without Quarto."
    from pygments.formatters import HtmlFormatter

    shutil.rmtree(docs, ignore_errors=True)
    docs.mkdir(parents=True)
    shutil.copytree(proc / "images", docs / "images", dirs_exist_ok=True)
    shutil.copy(NBS / "styles.css", docs / "styles.css")
    (docs / "code.css").write_text(HtmlFormatter(style="friendly").get_style_defs(".highlight"), encoding="utf-8")
    soups = {page.target: body_of(page, proc) for page in found}
    mend_links(soups)
    for n, page in enumerate(found):
        up = "../" * page.target.count("/")
        before, after = (found[n - 1] if n else None), (found[n + 1] if n + 1 < len(found) else None)
        turn = "".join(f'<a class="{c}" href="{up}{p.target}">{with_code(p.title)}</a>' for c, p in (("before", before), ("after", after)) if p)
        soup = soups[page.target]
        shown, plain = (page.title, page.lead), (escape(t.replace("`", "")) for t in (page.title, page.lead))
        about = dict(zip(("heading", "lead", "title", "about"), (*map(with_code, shown), *plain), strict=True)) | {"up": up, "turn": turn}
        text = PAGE.format(**about, navigation=navigation(found, page, up), body=soup, contents=on_this_page(soup))
        (docs / page.target).parent.mkdir(exist_ok=True)
        (docs / page.target).write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sidebar", action="store_true", help="write nbs/sidebar.yml and stop")
    parser.add_argument("--nbconvert", action="store_true", help="do without Quarto even where it is installed")
    parser.add_argument("--out", type=Path, help="folder that gets _proc and _docs; nbs/sidebar.yml stays as it is [default: the checkout]")
    args = parser.parse_args()
    found = pages()
    if args.out is None:
        (NBS / "sidebar.yml").write_text(sidebar(found), encoding="utf-8")
    if args.sidebar:
        return 0
    proc, docs = ((args.out or ROOT) / name for name in ("_proc", "_docs"))
    process(found, proc)
    if shutil.which("quarto") and not args.nbconvert:
        render_quarto(proc, docs)
    else:
        render_nbconvert(found, proc, docs)
    print(f"{len(found)} pages in {docs / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
