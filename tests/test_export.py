"""The library is what the notebooks export, and the notebooks are clean."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


def test_export_leaves_no_diff(tmp_path):
    for name in ("nbs", "fer_nb", "settings.ini", "setup.py", "pyproject.toml", "README.md"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    for module in (tmp_path / "fer_nb").glob("*.py"):
        if module.name not in ("cli.py", "__init__.py"): module.unlink()
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=tmp_path, check=True)
    ours = {p.name: p.read_text() for p in (ROOT / "fer_nb").glob("*.py")}
    theirs = {p.name: p.read_text() for p in (tmp_path / "fer_nb").glob("*.py")}
    assert sorted(ours) == sorted(theirs)
    assert [n for n in ours if ours[n] != theirs[n]] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_executed_small_and_clean(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    code = [c for c in nb["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    assert any(c["outputs"] for c in code), "not executed"
    for cell in code:
        assert set(cell["metadata"]) <= {"tags"}
        assert len("".join(cell["source"]).splitlines()) <= 60
        assert len(json.dumps(cell["outputs"])) < 100_000
        assert not [o for o in cell["outputs"] if o["output_type"] == "error"]
    text = json.dumps(nb)
    assert str(ROOT) not in text and "/root/" not in text and "/home/" not in text
    if path.stem[0].isdigit():
        assert sum("parameters" in c["metadata"].get("tags", []) for c in nb["cells"]) == 1


def test_modules_import_only_what_comes_before():
    order = [p.stem for p in NOTEBOOKS]
    module_of = {}
    for p in NOTEBOOKS:
        for cell in json.loads(p.read_text(encoding="utf-8"))["cells"]:
            for line in cell["source"]:
                if line.startswith("#| default_exp"): module_of[line.split()[-1]] = order.index(p.stem)
    for module, place in module_of.items():
        for line in (ROOT / "fer_nb" / f"{module}.py").read_text().splitlines():
            words = line.split()
            if line.lstrip().startswith("from fer_nb."):
                other = words[1].removeprefix("fer_nb.")
                assert module_of[other] < place, f"{module} imports {other}, which comes later"
                assert line.startswith("from"), f"{module} hides an import of {other} in a function"
