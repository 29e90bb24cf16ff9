"""The site of the docs: links lead somewhere, nothing is fetched, code is folded, and what is broken is named."""
import json
import re
import sys

import pytest

from tests.conftest import ROOT

sys.path.append(str(ROOT/"workflow"))
import docs_site

SOME = ("index", "02_calibration", "02_calibration_reliability", "09a_progress", "09_onnx_export", "09c_results")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A site of a few notebooks; what leads to the others is not there, and nothing else may be wrong."
    out = tmp_path_factory.mktemp("site")/"docs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docs_site, "SHOWN", docs_site.SHOWN | {".ipynb"})  # the others are shown as they are written
        return out, docs_site.build(out, SOME)


def test_every_link_of_a_small_site_leads_somewhere(site):
    out, wrong = site
    assert wrong == []
    assert {p.stem for p in (out/"nbs").glob("*.html") if not p.name.endswith(".ipynb.html")} == set(SOME)


def test_no_page_asks_a_network(site):
    for page in site[0].rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loads = docs_site.asked(text)[2]
        assert [x for x in loads if re.match(r"(https?:)?//", x)] == [] or "report/reference" in page.as_posix(), page
    css, js = ((site[0]/n).read_text() for n in ("site.css", "site.js"))
    assert "//" not in css.replace("/*", "").replace("*/", "") and "http" not in js + css


def test_what_the_library_gets_is_folded_and_results_come_first(site):
    page = (site[0]/"nbs"/"02_calibration.html").read_text(encoding="utf-8")
    assert re.search(r'<details class="code">\s*<summary>the code: <code>softmax</code></summary>', page)
    assert "#| export" not in page and "#| hide" not in page and "default_exp" not in page and "<math" in page
    nb = json.loads((ROOT/"nbs"/"02_calibration.ipynb").read_text())
    drawn = sum("image/png" in o.get("data", {}) for c in nb["cells"] for o in c.get("outputs", ()))
    assert page.count('src="data:image/png') == drawn > 0
    picture = {"output_type": "display_data", "data": {"image/png": "AAAA"}}
    cell = {"source": "import matplotlib.pyplot as plt\nplt.plot(x)", "outputs": [picture]}
    made = docs_site.code_cell(cell, lambda raw: raw)
    assert made.index("<img") < made.index("plt.plot")


def test_the_api_says_what_docments_say(site):
    page = (site[0]/"api"/"progress.html").read_text(encoding="utf-8")
    at = page.index('<h2 id="between">')
    entry = page[at:page.index("<h2", at + 4)]
    assert "between(low, high)" in entry and "<td>seconds</td>" in entry and "A range" in entry
    assert '<h3 id="Walk.hear">' in page and '<h3 id="Walk.tick">' in page, "methods, also patched ones"
    assert "_told" not in re.findall(r'id="Walk\.(\w+)"', page)
    notebook = (site[0]/"nbs"/"09a_progress.html").read_text(encoding="utf-8")
    assert 'href="../api/progress.html"' in notebook


def test_search_knows_pages_headings_and_names(site):
    rows = json.loads((site[0]/"search-index.js").read_text(encoding="utf-8").removeprefix("const FOUND = ").rstrip(";\n"))
    places = {name: where for name, where, _ in rows}
    assert places["Calibration"] == "nbs/02_calibration.html" and places["fit_temperature"] == "api/calibration.html#fit_temperature"
    assert places["The null ECE"] == "nbs/02_calibration.html#the-null-ece"


def test_a_broken_link_is_named(tmp_path):
    page = docs_site.page("docs/X.md", '<h1 id="x">X</h1><a href="GONE.md">a</a> <a href="USE.md#nowhere">b</a><a href="#x">c</a>')
    site = docs_site.Site([page, docs_site.guide_page("docs/USE.md")])
    for p in site.pages.values():
        to = tmp_path/docs_site.at(p.source)
        to.parent.mkdir(exist_ok=True)
        to.write_text(site.linked(p) if p is page else '<h1 id="using">USE</h1><img src="https://example.org/a.png">')
    assert "docs/X.md: GONE.md" in site.lost
    assert docs_site.check(tmp_path) == ["docs/USE.html loads https://example.org/a.png", "docs/X.html: GONE.md leads nowhere",
                                         "docs/X.html: USE.html#nowhere has no such place"]
