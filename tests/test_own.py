"""From a folder of one's own faces to a student, a demo and a report, by the command that the guide gives."""
import os
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml

from fer_nb.cli import main
from fer_nb.gates import gates
from fer_nb.manifests import build_manifest, parts_by_name
from fer_nb.runs import chain_config, load_profile, project_root
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


def few(folder, **pictures):
    "Class folders of files that nobody need decode."
    for name, n in pictures.items():
        (folder/name).mkdir(parents=True)
        for k in range(n): (folder/name/f"{k}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return str(folder)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(("pictures", "said"), [
    ({"happy": 60}, "has pictures of Happy alone to train on"),
    ({"happy": 60, "gloomy": 60}, "has pictures of Happy alone to train on"),
    (dict.fromkeys(("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"), 1), "the test part of"),
    ({"happy": 2, "sad": 2, "fear": 1}, "the validation part of")])
def test_a_hopeless_folder_is_refused_before_anything_runs(pictures, said, dry, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--profile", "own", "--data", few(tmp_path/"faces", **pictures), *dry]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert err.endswith("add pictures, or adapt the model that ships to your faces: fer-nb adapt finetune\n")
    assert [p.name for p in tmp_path.iterdir()] == ["faces"]


def test_odd_folders_and_small_classes_are_told_before_a_run(tmp_path, monkeypatch, capsys):
    faces = few(tmp_path/"faces", happy=40, sad=30, hapines=3, grinning=1, fear=4)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--profile", "own", "--data", faces, "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == ("left out, for the folder's name is no class: hapines (3 pictures: did you mean happiness?), grinning (1 picture)")
    assert out[1] == "few pictures to train on (fewer than 20): Angry 0, Disgust 0, Fear 2, Surprise 0, Neutral 0"


def test_what_is_refused_is_what_would_end_empty(tmp_path):
    "The parts that names tell are those of a manifest over the same pictures, where none is a copy."
    rng = np.random.default_rng(3)
    for trial, n in enumerate([(1, 1), (2, 2), (3, 1), (3, 3), (7, 2), (12, 5), (2, 9, 1)]):
        folder = tmp_path/f"faces{trial}"
        for name, k in zip(("happy", "sad", "fear"), n):
            (folder/name).mkdir(parents=True)
            for i in range(k): cv2.imwrite(str(folder/name/f"{i}.png"), rng.integers(0, 255, (48, 48), np.uint8))
        named = parts_by_name([f"folder={folder}"], test_fraction=0.15)
        read = build_manifest([f"folder={folder}"], tmp_path/f"m{trial}", test_fraction=0.15, progress=False).manifest.df
        assert named.groupby(["label", "split"]).size().to_dict() == read.groupby(["label", "split"]).size().to_dict()


def test_a_folder_with_parts_and_a_zip_of_folders_are_counted_alike(tmp_path):
    few(tmp_path/"faces"/"train", joy=5, anger=5)
    few(tmp_path/"faces"/"test", joy=1, anger=1)
    zipped = shutil.make_archive(str(tmp_path/"faces"), "zip", tmp_path/"faces")
    for data in (str(tmp_path/"faces"), zipped):
        heard = []
        assert chain_config(load_profile("own"), [data], say=heard.append)["sources"] == [f"folder={data}"]
        assert heard == ["few pictures to train on (fewer than 20): Angry 4, Disgust 0, Fear 0, Happy 4, Sad 0, Surprise 0, Neutral 0"]
