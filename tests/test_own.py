"""From a folder of one's own faces to a student, a demo and a report, by the command that the guide gives."""
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from fer_nb.gates import gates
from fer_nb.runs import load_profile, project_root
from fer_nb.sources import to_class
from fer_nb.synthetic import write_dataset
from tests.conftest import ROOT

pytestmark = pytest.mark.timeout(1800)  # a whole chain: some four minutes on two quiet cores


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    "A folder a class, as people have them: no parts, names of their own."
    folder = tmp_path_factory.mktemp("mine")
    write_dataset(folder/"drawn", n=980, size=64, intensity=(1.0, 1.0), label_noise=0.0)
    labels = pd.read_csv(folder/"drawn"/"labels.csv")
    path, label = (next(c for c in labels.columns if c in names) for names in (("path", "file"), ("label", "class", "expression")))
    for i, row in enumerate(labels.itertuples()):
        name = {"Happy": "joy", "Angry": "anger"}.get(getattr(row, label), getattr(row, label).lower())
        assert to_class(name)[0] == getattr(row, label)
        (folder/"faces"/name).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder/"drawn"/getattr(row, path), folder/"faces"/name/f"{i}.png")
    return folder/"faces"


def test_a_folder_of_faces_becomes_a_student_a_demo_and_a_report(faces, tmp_path):
    given = yaml.safe_load((project_root()/"profiles"/"own.yaml").read_text())
    assert load_profile("own")["notebooks"]["00_manifests"]["test_fraction"] > 0
    del given["teachers"]["RN18"], given["ensembles"]  # the same way in less time: one teacher, which is the one that teaches
    given["teachers"]["CNXT"]["epochs"], given["notebooks"]["05_students"]["epochs"] = 8, 2
    given["notebooks"]["06_realtime_demo"] = {"source": "synthetic:4"}
    given["notebooks"]["09_onnx_latency"] = {"precisions": ["fp32"], "runs": 5, "reference_size": 0}
    (tmp_path/"own.yaml").write_text(yaml.safe_dump(given))
    command = [sys.executable, "-m", "fer_nb.cli", "run", "--profile", "own.yaml", "--data", str(faces)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    run = tmp_path/"runs"/"own"
    assert (run/"report"/"report.html").is_file() and (run/"onnx"/"model_fp32.onnx").is_file()
    assert (run/"demo"/"first"/"score_results.json").is_file()
    manifest = pd.read_csv(run/"manifests"/"manifest.csv")
    assert set(manifest["source"]) == {"folder"} and 0.1 < (manifest["split"] == "test").mean() < 0.2
    assert re.search(r"best student  mobilenetv3_large_100_img48_seed1337_\w+: macro-F1 0\.\d{3}", done.stdout)
    assert "report        runs/own/report/report.html" in done.stdout and "--model runs/own/onnx/model_fp32.onnx" in done.stdout
    assert gates(run).go, str(gates(run))[-1500:]
