"""Rooms stay small, cells hold one idea, and examples show what is public."""
import json
import re

import pytest

from tests import house


@pytest.fixture(scope="module")
def counted():
    return house.count(house.files())


@pytest.mark.parametrize(("name", "most"), [("module, median lines", 350), ("module, most lines", 800), ("export cell, median lines", 12),
                                            ("export cell, most lines", 60), ("functions over 40 lines", 2)])
def test_rooms_and_cells_are_small(counted, name, most):
    assert counted[name] <= most


@pytest.mark.parametrize(("name", "least"), [("cells with one definition, of those with any", 1), ("public names in an example", 0.85)])
def test_cells_hold_one_idea_and_show_it(counted, name, least):
    assert counted[name] >= least


def test_the_counts_count():
    nb = {"cells": [{"cell_type": "code", "source": "#| export\ndef shown(): pass\n\n\ndef hidden(): pass"},
                    {"cell_type": "code", "source": "#| export\nclass _Own: pass"},
                    {"cell_type": "code", "source": "shown()"}]}
    texts = {"nbs/x.ipynb": json.dumps(nb), "fer_nb/x.py": "from .y import z\n\n\ndef f():\n    return 1\n", "fer_nb/y.py": "z = 1\n"}
    got = house.count(texts)
    assert (got["public names"], got["public names in an example"], got["cells with one definition, of those with any"]) == (2, 0.5, 0.5)
    assert (got["arrows between modules"], got["module, most lines"]) == (1, 5) and house.unshown(texts) == {"x": ["hidden"]}


def test_a_notebooks_first_cell_is_its_title_and_a_sentence():
    "Quarto's front matter is made of it, and nbdev drops whatever else stands there."
    firsts = {p: "".join(json.loads(text)["cells"][0]["source"]) for p, text in house.files().items() if p.endswith(".ipynb")}
    assert len(firsts) > 90
    assert [p for p, s in firsts.items() if not re.fullmatch(r"# [^\n]+\n\n> [^\n]+", s)] == []
