"""What is installed suffices: the core answers without its extras, and a wheel walks the chain without a checkout."""
import json
import os
import subprocess
import sys
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import cv2
import pytest

from fer_nb import cli
from tests.conftest import ROOT

SETTINGS = ConfigParser(delimiters=["="], interpolation=None)
SETTINGS.read(ROOT/"settings.ini", encoding="utf-8")
OTHERS = {"torchvision", "traitlets", "nbclient", "fastprogress"}
HEAVY = sorted(OTHERS | {m for modules in cli.NEEDS.values() for m in modules})
ALONE = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {absent!r}: raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from fer_nb import cli
sys.exit(cli.main())
"""


def core(*args, absent=HEAVY):
    "A command of an installation that lacks these modules."
    done = subprocess.run([sys.executable, "-c", ALONE.format(absent=absent), *map(str, args)], capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    "A picture of four drawn people."
    from fer_nb.results import drawn_group
    path = tmp_path_factory.mktemp("pictures")/"group.png"
    cv2.imwrite(str(path), drawn_group()[..., ::-1])
    return path


def test_the_core_answers_without_its_extras(group, tmp_path):
    rc, out, err = core("predict", group, "--detector", "haar")
    assert rc == 0 and "Happy" in out, err
    rc, out, err = core("demo", "--source", "synthetic:3", "--headless", "--detector", "haar", "--out", tmp_path/"session")
    assert rc == 0 and (tmp_path/"session"/"per_frame.csv").is_file(), err
    rc, out, err = core("score", tmp_path/"session")
    assert rc == 0 and "macro-F1" in out and (tmp_path/"session"/"score_results.json").is_file(), err
    rc, out, err = core("bench", ROOT/"fer_nb"/"models"/"student.onnx", "--runs", "2", "--threads", "1", "--out", tmp_path)
    assert rc == 0 and "faces/s" in out and (tmp_path/"latency_benchmarks.csv").is_file(), err


@pytest.mark.parametrize(("args", "module", "extra"), [
    (("student", "train"), "torch", "train"), (("student", "train", "--help"), "torch", "train"),
    (("run", "--profile", "embedded"), "snakemake", "train"), (("manifest", "build", "--out", "x"), "pyarrow", "train"),
    (("demo", "--browser"), "voila", "notebooks"), (("bench", "a.onnx", "--manifest", "m"), "onnx", "train")])
def test_a_missing_extra_is_one_line(args, module, extra):
    rc, out, err = core(*args, absent=[module])
    line, = err.splitlines()
    assert rc == 1 and not out and f"needs {module}, which is not installed: pip install 'fer_nb[{extra}]'" in line
    assert line.startswith(f"fer-nb: {' '.join(a for a in args if a.isalpha())}"[:12])


def test_a_missing_module_in_the_midst_is_one_line(monkeypatch, capsys):
    "What no check before a command foresees, such as a run's best.pt where torch is missing."
    def needs_torch(_): raise ModuleNotFoundError("No module named 'torch._C'", name="torch._C")
    monkeypatch.setitem(cli.COMMANDS, "gates", (needs_torch, *cli.COMMANDS["gates"][1:]))
    assert cli.main(["gates", "."]) == 1
    assert capsys.readouterr().err == "fer-nb: this needs torch, which is not installed: pip install 'fer_nb[train]'\n"


def names(text): return {r.partition(";")[0].partition(">")[0].partition("<")[0] for r in text.split()}


def test_every_module_that_a_check_asks_for_is_in_its_extra():
    packages = {"sklearn": "scikit-learn", "yaml": "pyyaml", "pypandoc": "pypandoc-binary", "PIL": "pillow", "IPython": "ipython",
                "onnxconverter_common": "onnxconverter-common"}
    for extra, modules in cli.NEEDS.items():
        assert {packages.get(m, m) for m in modules} <= names(SETTINGS["DEFAULT"][f"{extra}_requirements"])
    assert not names(SETTINGS["DEFAULT"]["requirements"]) & {"torch", "fastai", "timm", "snakemake", "jupyterlab", "papermill"}


# ---- a wheel, built and installed ----

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel that a source archive of this checkout builds."
    out, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if name.startswith(("runs/", "tests/")) or not (ROOT/name).is_file(): continue
        (source/name).parent.mkdir(parents=True, exist_ok=True)
        (source/name).write_bytes((ROOT/name).read_bytes())
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert list(out.glob("*.tar.gz"))
    return next(out.glob("*.whl"))


def test_the_wheel_carries_what_the_chain_reads(wheel):
    held = {i.filename: i for i in zipfile.ZipFile(wheel).infolist()}
    shared = [*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("profiles/*.yaml"), *ROOT.glob("report/*.qmd"), ROOT/"workflow"/"Snakefile",
              ROOT/"workflow"/"provenance.rst", *ROOT.glob("workflow/*/config.yaml")]
    assert {f"fer_nb/share/{p.relative_to(ROOT).as_posix()}" for p in shared} == {n for n in held if n.startswith("fer_nb/share/")}
    assert {"fer_nb/py.typed", "fer_nb/models/student.onnx", "fer_nb/templates/MODEL_CARD.md"} <= set(held)
    nb = json.loads(zipfile.ZipFile(wheel).read("fer_nb/share/nbs/03_teachers.ipynb"))
    assert not any(c.get("outputs") for c in nb["cells"]) and any("parameters" in c["metadata"].get("tags", []) for c in nb["cells"])
    students = {n: i.file_size for n, i in held.items() if n.endswith(".onnx")}
    assert set(students) == {"fer_nb/models/student.onnx", "fer_nb/models/student_fer2013.onnx"}
    assert all(size < 5e6 for size in students.values()), students
    assert sum(i.file_size for i in held.values()) - sum(students.values()) < 6.5e6  # code, templates, notebooks without their outputs
    assert wheel.stat().st_size < 11e6  # what is downloaded


def test_the_chain_is_found_without_a_checkout(wheel, tmp_path):
    "The wheel's own files, unpacked; the modules that it needs are those of this environment."
    zipfile.ZipFile(wheel).extractall(tmp_path/"site")
    (tmp_path/"empty").mkdir()
    done = subprocess.run([sys.executable, "-m", "fer_nb.cli", "run", "--profile", "embedded", "--dry-run"], capture_output=True, text=True,
                          cwd=tmp_path/"empty", env={**os.environ, "PYTHONPATH": str(tmp_path/"site")})
    assert done.returncode == 0 and "would run  teachers/RN18_seed1337_stageA_img48/03_teachers.ipynb" in done.stdout, done.stderr
    assert not list((tmp_path/"empty").iterdir())  # a dry run writes nothing


def megabytes(site: Path) -> float:
    "What a folder of packages holds, less the pip and setuptools that every environment has."
    own = ("pip", "setuptools", "pkg_resources", "_distutils_hack")
    return sum(p.stat().st_size for d in site.iterdir() if not d.name.startswith(own) for p in (d, *d.rglob("*")) if p.is_file())/1e6


@pytest.mark.skipif(os.environ.get("FER_NB_CLEAN_VENV") != "1", reason="downloads 150 MB: set FER_NB_CLEAN_VENV=1")
def test_the_core_in_a_clean_environment(wheel, group, tmp_path):
    venv.create(tmp_path/"venv", with_pip=True)
    python = next(p for p in (tmp_path/"venv").glob("*/python*") if p.is_file())
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*args): return subprocess.run([python, *map(str, args)], capture_output=True, text=True, cwd=tmp_path, env=environment)
    done = run("-m", "pip", "install", "--quiet", wheel)
    assert done.returncode == 0, done.stderr
    if run("-c", "import cv2").returncode:  # a server without libGL: as the guide says
        assert run("-m", "pip", "uninstall", "--quiet", "--yes", "opencv-python").returncode == 0
        assert run("-m", "pip", "install", "--quiet", "opencv-python-headless>=4.14,<5").returncode == 0
    site = Path(run("-c", "import fer_nb, pathlib; print(pathlib.Path(fer_nb.__file__).parent.parent)").stdout.strip())
    assert megabytes(site) < 400
    here = {p.name.lower() for p in site.iterdir()}
    assert not here & {"torch", "fastai", "timm", "ipython", "snakemake", "papermill", "matplotlib", "scipy", "pandas"}
    assert "Happy" in run("-m", "fer_nb.cli", "predict", group, "--detector", "haar").stdout
    assert run("-m", "fer_nb.cli", "demo", "--source", "synthetic:2", "--headless", "--detector", "haar", "--out", "s").returncode == 0
    assert "macro-F1" in run("-m", "fer_nb.cli", "score", "s").stdout
    assert run("-m", "fer_nb.cli", "bench", site/"fer_nb"/"models"/"student.onnx", "--runs", 2, "--out", ".").returncode == 0
    code = "from fer_nb.deploy import Predictor; import numpy as np; print(Predictor()([np.zeros((64, 64, 3), np.uint8)]).shape)"
    assert run("-c", code).stdout.strip() == "(1, 7)"
    said = run("-m", "fer_nb.cli", "student", "train")
    assert said.returncode == 1 and "needs torch, which is not installed: pip install" in said.stderr and len(said.stderr.splitlines()) == 1
