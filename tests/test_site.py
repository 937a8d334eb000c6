"""The documentation as it is read: built, with no example, formula or signature garbled."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import hyperproto

ROOT = Path(__file__).parents[1]
PAGES = sorted(page.stem for page in (ROOT / "docs").glob("*.md"))
GROUPS = [
    "Convert",
    "Save and load",
    "Train",
    "Fit",
    "Deploy",
    "Banks",
    "Errors and warnings",
    "hyperproto.functional",
    "hyperproto.testing",
]
PUBLIC = [name for name in hyperproto.__all__ if not inspect.ismodule(getattr(hyperproto, name))]
CITED = re.compile(r"\[[1-4](?:, [1-4])*\]")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Article of each page, parsed, and the folder of the site."""
    for package in ("mkdocs", "mkdocstrings", "material"):
        pytest.importorskip(package, reason='the site is built with the packages of the extra "docs"')
    bs4 = pytest.importorskip("bs4", reason='the site is read with beautifulsoup4, of the extra "docs"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    files = {page: folder / ("index.html" if page == "index" else f"{page}/index.html") for page in PAGES}
    whole = {page: bs4.BeautifulSoup(file.read_text(), "html.parser") for page, file in files.items()}
    articles = {page: soup.find("article") for page, soup in whole.items()}
    return SimpleNamespace(folder=folder, files=files, whole=whole, articles=articles)


def headings(article, level):
    """Text of the headings of one level, in order, without their link and labels."""
    return [next(heading.stripped_strings) for heading in article.find_all(level)]


def prose(article):
    """Text outside code and formulas."""
    return " ".join(
        text
        for text in article.find_all(string=True)
        if not text.find_parent(["pre", "code", "script"]) and not text.find_parent(class_="arithmatex")
    )


def entry(article, name):
    """What stands under the heading of a name of the interface."""
    [heading] = article.find_all(["h3", "h4"], id=re.compile(rf"^hyperproto\.(\w+\.)?{name}$"))
    return heading.parent


@pytest.mark.parametrize("page", PAGES)
def test_no_markup_is_left_in_the_text(site, page):
    text = prose(site.articles[page])
    for left in (">>>", ".. math::", ":math:", "$", "\\(", "\\frac", "--8<--", "Example:", "```", "::: "):
        assert left not in text, left


@pytest.mark.parametrize("page", PAGES)
def test_formulas_are_marked_for_mathjax_and_balanced(site, page):
    for formula in site.articles[page].find_all(class_="arithmatex"):
        text = formula.get_text().strip()
        assert text.startswith(("\\(", "\\[")), text
        assert text.endswith(("\\)", "\\]")), text
        assert "$" not in text
        assert text.count("{") == text.count("}"), text
        assert ("&" in text) <= ("\\begin{aligned}" in text), text


def test_every_formula_and_example_of_the_interface_is_shown(site):
    article = site.articles["api"]
    for name in PUBLIC:
        source = inspect.getdoc(getattr(hyperproto, name))
        shown = entry(article, name)
        assert source.count("$$") == 2 * len(shown.select(":scope > .doc-contents > .arithmatex")), name
        code = "\n".join(block.get_text() for block in shown.select("pre"))
        for line in source.splitlines():
            assert ">>>" not in line or line.strip() in code, f"{name}: {line}"


def test_the_interface_shows_every_public_name_in_its_group(site):
    article = site.articles["api"]
    assert headings(article, "h2") == GROUPS
    names = headings(article, "h3")
    assert names[0] == "convert_model"
    assert len(names) == len(set(names))
    assert set(PUBLIC) <= set(names)
    assert set(hyperproto.functional.__all__) <= set(names)


def test_every_class_and_function_shows_its_signature(site):
    for heading in site.articles["api"].find_all("h3"):
        module, _, name = heading["id"].rpartition(".")
        value = getattr(importlib.import_module(module), name)
        if inspect.isclass(value) and issubclass(value, Exception):
            continue
        text = heading.parent.find(class_="doc-signature").get_text()
        assert text.startswith(f"{name}("), text
        # `composite` hides the first parameter of a strategy, which the page shows.
        assert set(inspect.signature(value).parameters) <= set(re.findall(r"\w+", text)), name


@pytest.mark.parametrize("page", PAGES)
def test_a_page_that_cites_lists_the_sources(site, page):
    article = site.articles[page]
    if CITED.search(prose(article)):
        [heading] = article.find_all("h2", id="sources")
        assert len(heading.find_next_sibling("ol").find_all("a", href=re.compile("^https://arxiv.org/abs/"))) == 4


@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_nothing_from_elsewhere(site, page):
    soup, file = site.whole[page], site.files[page]
    loaded = [tag["src"] for tag in soup.find_all(["script", "img", "iframe"], src=True)]
    loaded += [tag["href"] for tag in soup.find_all("link", href=True)]
    assert any(path.endswith("mathjax/tex-svg.js") for path in loaded)
    for path in loaded:
        assert (file.parent / path).exists(), path
    assert (site.folder / "mathjax/LICENSE").exists()
