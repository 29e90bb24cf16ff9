"""Numbers only, on this machine: a prediction and a session leave no file outside their folder and open no connection."""
import os
import re
import shutil
import subprocess
import sys

import cv2
import pytest

from fer_nb.synthetic import render_faces
from tests.conftest import ROOT

RUNS = {"predict": ["predict", "face.png", "--whole"],
        "demo": ["demo", "--source", "synthetic:2", "--headless", "--detector", "haar", "--out", "session"],
        "standalone": [str(ROOT/"examples"/"predict_standalone.py"), str(ROOT/"fer_nb"/"models"/"student.onnx"), "face.png"]}


def started(folder, name, *before) -> subprocess.CompletedProcess:
    "One of the runs, in a folder of its own with a home of its own."
    (folder/"here").mkdir(); (folder/"home").mkdir()
    cv2.imwrite(str(folder/"here"/"face.png"), render_faces(1, size=96, seed=3)[0][0][..., ::-1])
    unset = ("CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")  # each would silence it by itself
    home = {k: str(folder/"home") for k in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TMPDIR")}
    env = {k: v for k, v in os.environ.items() if k not in unset} | home | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *([] if name == "standalone" else ["-m", "fer_nb.cli"]), *RUNS[name]]
    return subprocess.run([*before, *command], cwd=folder/"here", env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", RUNS)
def test_no_file_is_left_outside(tmp_path, name):
    done = started(tmp_path, name)
    assert done.returncode == 0, done.stderr
    left = [p.relative_to(tmp_path/"home").as_posix() for p in (tmp_path/"home").rglob("*") if p.is_file()]
    assert [p for p in left if "matplotlib" not in p and "fontconfig" not in p] == []
    assert {p.name for p in (tmp_path/"here").iterdir()} == {"face.png", *(["session"] if name == "demo" else [])}


@pytest.mark.skipif(not shutil.which("strace"), reason="connections are seen by strace, which is not here")
@pytest.mark.parametrize("name", RUNS)
def test_no_connection_is_opened(tmp_path, name):
    done = started(tmp_path, name, "strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o", str(tmp_path/"calls"))
    if "PTRACE" in done.stderr or "Operation not permitted" in done.stderr: pytest.skip("strace may not look here")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"AF_INET6?\b.*", (tmp_path/"calls").read_text()) == []


def test_an_early_import_is_told_too():
    code = "import fer_nb, ctypes; g = ctypes.CDLL(None).getenv; g.restype = ctypes.c_char_p; print(g(b'ORT_DISABLE_TELEMETRY').decode())"
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "1\n"
