"""The site: every page opens, every internal link and anchor leads somewhere, and the navigation is the same for Quarto and nbconvert."""
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import build_docs
import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The nbconvert site, built in a temporary folder by a process of its own, which coverage does not slow down."
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, ROOT / "tools" / "build_docs.py", "--nbconvert", "--out", folder], check=True)
    return folder / "_docs"


@pytest.fixture(scope="module")
def soups(site) -> dict[Path, BeautifulSoup]:
    "Every page, read once."
    return {p: BeautifulSoup(p.read_text(encoding="utf-8"), "html.parser") for p in sorted(site.rglob("*.html"))}


def test_the_navigation_is_current():
    "nbs/sidebar.yml is what Quarto reads; `make docs` writes it."
    assert (ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8") == build_docs.sidebar(build_docs.pages()), "run: make docs"


def test_every_notebook_is_in_the_navigation():
    contents = yaml.safe_load(build_docs.sidebar(build_docs.pages()))["website"]["sidebar"]["contents"]
    listed = {name for entry in contents for name in ([entry] if isinstance(entry, str) else entry["contents"])}
    there = {str(p.relative_to(ROOT / "nbs")) for p in (ROOT / "nbs").rglob("[!_.]*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert listed == there


def test_every_page_opens_and_leads_on(soups):
    assert len(soups) == len(build_docs.pages())
    for path, soup in soups.items():
        assert soup.h1 and soup.h1.get_text().strip(), f"{path.name} has no title"
        assert soup.main.get_text().strip() and soup.select("nav a.here"), path.name
        assert "#|" not in soup.main.get_text(), f"{path.name} shows a directive"
        assert ":::" not in soup.main.get_text(), f"{path.name} shows markup of Quarto"


def test_every_internal_link_leads_somewhere(soups):
    anchors = {path: {tag["id"] for tag in soup.select("[id]")} for path, soup in soups.items()}
    broken = []
    for path, soup in soups.items():
        for tag in soup.select("a[href], img[src], link[href]"):
            address = urlparse(str(tag.get("href") or tag.get("src")))
            if address.scheme or address.netloc:
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            if not target.is_file():
                broken.append(f"{path.name}: {address.geturl()}")
            elif address.fragment and unquote(address.fragment) not in anchors.get(target, set()):
                broken.append(f"{path.name}: {address.geturl()} (no such heading)")
    assert not broken, "\n".join(broken)


def test_exported_names_are_documented_on_their_page(site):
    page = (site / "core.registry.html").read_text(encoding="utf-8")
    for name in ("EqError", "unknown_name", "Registry"):
        assert f'id="{name.lower()}"' in page
    assert "What was wrong, the value seen" in page


def test_nothing_is_loaded_from_elsewhere(soups):
    for path, soup in soups.items():
        for tag in soup.select("script[src], link[href], img[src], iframe[src]"):
            address = urlparse(str(tag.get("src") or tag.get("href")))
            assert address.scheme in ("", "data"), f"{path.name} loads {address.geturl()[:80]}"
