"""The page of results and the README say what the artifacts hold, and nothing else stands where they can't be checked."""
import ast
import json
import re
import subprocess
import sys

import cv2
import pytest

from fer_nb import results
from tests.conftest import ROOT

REFERENCE, README = ROOT/"runs"/"reference", (ROOT/"README.md").read_text(encoding="utf-8")
USE = (ROOT/"docs"/"USE.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_artifacts_make():
    assert results.results_page(REFERENCE) == (REFERENCE/"RESULTS.md").read_text(encoding="utf-8"), "make results"


def test_the_readme_has_the_table_that_the_artifacts_make():
    assert results.between_marks(README, results.readme_table(REFERENCE)) == README, "make results"
    assert sum(line.startswith("|") for line in results.readme_table(REFERENCE).splitlines()) == 2 + 5


def test_what_people_make_of_the_tables_repeats_no_number():
    for path in REFERENCE.glob("reading_*.md"): assert not re.findall(r"\d\.\d", path.read_text(encoding="utf-8")), path.name


def test_the_page_never_mixes_conventions():
    "A table of models judges by one convention; whoever's labels don't judge says so in the head of the column."
    parts = re.split(r"^## ", (REFERENCE/"RESULTS.md").read_text(encoding="utf-8"), flags=re.M)
    judged = {c: p for p in parts for c in results.SAID.values() if p.startswith(f"Models that learned {c}'s")}
    assert set(judged) == set(results.SAID.values())
    for c, text in judged.items():
        other, = set(results.SAID.values()) - {c}
        heads = [cell for line in text.splitlines() if line.startswith(("| model |", "| arm |")) for cell in line.split("|")]
        assert heads and all("no judgement" in cell for cell in heads if other in cell)


def test_the_readme_is_for_a_stranger():
    assert len(README.encode()) < 9000 and "make run" in README and "make test" in README
    assert not re.search(r"/(root|home|work|tmp)/|https?://", README)


def test_every_link_leads_somewhere():
    for page, folder in ((README, ROOT), (USE, ROOT/"docs"), ((REFERENCE/"RESULTS.md").read_text(encoding="utf-8"), REFERENCE)):
        for target in re.findall(r"\]\(([^)]+)\)", page):
            path, _, anchor = target.partition("#")
            assert (folder/path).exists(), target
            if not anchor: continue
            text = (folder/path).read_text(encoding="utf-8") if path else page
            heads = [re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)]
            assert anchor in heads, target


def run_lines(lines, folder):
    "What lines of Python print."
    done = subprocess.run([sys.executable, "-c", lines], cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_readme_s_lines_of_python_run(tmp_path):
    pictures, loop = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(pictures.splitlines()) == 7 and len([x for x in loop.splitlines() if x]) <= 4
    cv2.imwrite(str(tmp_path/"face.jpg"), results.drawn_group()[80:262, 60:232, ::-1])
    cv2.imwrite(str(tmp_path/"group.jpg"), results.drawn_group()[..., ::-1])
    *table, answer = run_lines(pictures, tmp_path)
    probs = ast.literal_eval(answer)
    assert max(probs, key=probs.get) == "Happy" and abs(sum(probs.values()) - 1) < 0.05 and "group.jpg" in "".join(table)
    assert loop.count("live():") == 1
    said = run_lines(loop.replace("live():", "live('synthetic:1', detector='haar', say=lambda line: None):"), tmp_path)
    assert len(said) == 20 and said[0].startswith("0.0 (")


def test_the_index_has_a_row_for_every_notebook():
    cells = json.loads((ROOT/"nbs"/"index.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells)
    rows = re.findall(r"^\| \[[^\]]+\]\((\w+)\.ipynb\) \|", text, re.M)
    assert rows == sorted(p.stem for p in (ROOT/"nbs").glob("*.ipynb") if p.stem != "index")


def test_the_picture_is_small_and_shows_what_is_drawn():
    path = ROOT/"docs"/"predict.webp"
    h, w = cv2.imread(str(path)).shape[:2]
    assert path.stat().st_size < 150_000 and 1000 < w < 1600 and h < 800
    assert "predict.webp" in README


@pytest.mark.parametrize("detector", ["haar", "yunet"])
def test_the_student_knows_the_drawn_people(detector, monkeypatch):
    if detector == "yunet":
        from tests.conftest import model_paths
        monkeypatch.setenv("FER_NB_MODELS", str(model_paths("yunet")[0].parent))
    group = results.drawn_group()
    faces = results.faces_of(group[..., ::-1].copy(), results.open_detector(detector)[0], results.Predictor())
    said = [f.label for f in sorted(faces, key=lambda f: f.detection.box.xywh[0])]
    assert said == [name for _, name in results.GROUP]
