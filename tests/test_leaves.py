"""One table of what a run leaves: nobody keeps a list of their own, and the guide says what the table says."""
import ast
import json
import re

import pytest

from fer_nb.leaves import LEAVES, leaves_markdown
from fer_nb.results import between_marks
from tests.conftest import ROOT

NAMES = {x.file.rpartition("/")[2] for leaves in LEAVES.values() for x in leaves}
MODULES = sorted(p for p in (ROOT/"fer_nb").glob("*.py") if p.name not in ("leaves.py", "_modidx.py"))


def lists(source):
    "Literal tuples, lists and sets that name more than two artifacts: line, names. A mapping says something about each, and may."
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Tuple, ast.List, ast.Set)): continue
        named = {p.value.rpartition("/")[2] for p in node.elts if isinstance(p, ast.Constant) and isinstance(p.value, str)} & NAMES
        if len(named) > 2: yield node.lineno, sorted(named)


def test_a_second_list_is_seen():
    assert list(lists('A = 1\nB = ("args.json", "seed.txt", "best.pt")')) == [(2, ["args.json", "best.pt", "seed.txt"])]
    assert [names for _, names in lists('f(["t/args.json", "seed.txt", "best.pt"])')] == [["args.json", "best.pt", "seed.txt"]]
    assert list(lists('C = ("args.json", "seed.txt", "holiday.png")')) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_no_module_tells_the_list_again(path):
    assert list(lists(path.read_text(encoding="utf-8"))) == [], f"{path.name}: ask fer_nb.leaves"


def test_the_workflow_tells_no_list():
    rules = (ROOT/"workflow"/"Snakefile").read_text(encoding="utf-8")
    for at, line in enumerate(rules.splitlines(), 1):
        if line.strip().startswith("output:"):
            assert len({n.rpartition("/")[2] for n in re.findall(r'"([^"]+)"', line)} & NAMES) < 3, f"line {at}: ask fer_nb.leaves"


@pytest.mark.parametrize("page", [ROOT/"docs"/"USE.md", ROOT/"README.md"], ids=lambda p: p.name)
def test_pages_tell_no_list_but_the_table(page):
    text = page.read_text(encoding="utf-8").replace(leaves_markdown(), "")
    for line in text.splitlines(): assert len(set(re.findall(r"`([^`]+)`", line)) & NAMES) < 4, f"{line[:80]}: say it in fer_nb.leaves"


def test_the_guide_has_the_table():
    guide = (ROOT/"docs"/"USE.md").read_text(encoding="utf-8")
    assert between_marks(guide, leaves_markdown()) == guide, "make results"


def test_notebooks_export_no_second_list():
    "The same in the notebooks, should an export be forgotten."
    for path in sorted((ROOT/"nbs").glob("*.ipynb")):
        if path.name == "00_artifacts_table.ipynb": continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and source.startswith("#| export"): assert list(lists(source)) == [], f"{path.name} {cell['id']}"
