"""The library is what the notebooks export, and the notebooks are clean."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
RUN = set(re.findall(r'notebook\("(\w+)"\)', (ROOT / "workflow" / "Snakefile").read_text()))  # what the chain runs


def test_export_leaves_no_diff(tmp_path):
    for name in ("nbs", "fer_nb", "settings.ini", "setup.py", "pyproject.toml", "README.md"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    for module in (tmp_path / "fer_nb").glob("*.py"):
        if module.name not in ("cli.py", "flags.py", "__init__.py"): module.unlink()
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=tmp_path, check=True)
    ours = {p.name: p.read_text() for p in (ROOT / "fer_nb").glob("*.py")}
    theirs = {p.name: p.read_text() for p in (tmp_path / "fer_nb").glob("*.py")}
    assert sorted(ours) == sorted(theirs)
    assert [n for n in ours if ours[n] != theirs[n]] == []
    here, there = (sorted(p.name for p in (d / "fer_nb" / "static").iterdir()) for d in (ROOT, tmp_path))
    assert here == there, "scripts and styles are not exported, and not to be lost"


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
    assert "widgets" not in nb["metadata"], "a progress bar left its state here"
    text = json.dumps(nb)
    assert str(ROOT) not in text and "/root/" not in text and "/home/" not in text and "/site-packages/torch/" not in text
    tagged = sum("parameters" in c["metadata"].get("tags", []) for c in nb["cells"])
    assert tagged == 1 if path.stem in RUN else tagged <= 1, "one cell of parameters in what the chain runs, at most one elsewhere"


LAZY = {("deploy", "students"), ("runs", "teachers"),  # a .pt needs torch; an .onnx, which most people have, must do without
        ("surprises", "nl_verdicts"),
        ("runs", "manifests"),  # scipy takes a second, and only folders of one's own are counted before a run
        *(("pack_blocks", m) for m in ("nl_verdicts", "phase", "noise_study", "webcams"))}  # most reports hold none of these studies


def test_modules_import_only_what_comes_before():
    place = {}
    for i, p in enumerate(NOTEBOOKS):
        for cell in json.loads(p.read_text(encoding="utf-8"))["cells"]:
            for line in cell["source"]:
                if line.startswith("#| default_exp"): place[line.split()[-1]] = i
    seen = 0
    for module in place:
        for line in (ROOT / "fer_nb" / f"{module}.py").read_text().splitlines():
            found = re.match(r"(\s*)from (?:\.|fer_nb\.)(\w+) import", line)
            if not found: continue
            seen += 1
            assert place[found[2]] < place[module], f"{module} imports {found[2]}, which comes later"
            assert not found[1] or (module, found[2]) in LAZY, f"{module} hides an import of {found[2]} in a function"
    assert seen > 20
