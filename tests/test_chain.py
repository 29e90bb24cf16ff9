"""The chain end to end, by the command that users type: every artifact, up-to-date runs skipped, lost files noticed, tampering refused."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml

from fer_nb.artifacts import read_npz, write_npz
from fer_nb.calibration import fit_temperature
from fer_nb.gates import gates
from fer_nb.leaves import inventory, leaves_of
from fer_nb.records import Calibration, HashManifest
from tests.attacks import ATTACKS
from tests.conftest import ROOT

STUDIO = {"train_source": "synthetic_studio", "epochs": 2}
PROFILE = {
    "img_size": 48, "threads": 1, "stages": {"CE": None, "KD": None, "DKD": {"epochs": 1, "beta": 1.0}}, "seeds": [1337],
    "stage_b": {"img_size": 64, "epochs": 1, "ema": 0.9, "mixup": 0.2},
    # two that learn something from 560 faces in ten seconds: a transformer is still at chance then, and nothing calibrates chance
    "teachers": {"RN18": None,
                 "CNXT": {"epochs": 4, "model_args": {"depths": [1, 1, 2, 1], "dims": [48, 96, 192, 384], "ls_init_value": 1.0}}},
    "ensembles": {"pair": None},
    "notebooks": {
        "00a_synthetic_faces": {"n": 1600, "video_seconds": 4, "measure_n": 120, "intensity": [1.0, 1.0], "label_noise": 0.0},
        "03_teachers": {**STUDIO, "margin": 0.0}, "05_students": STUDIO, "06_realtime_demo": {"source": "synthetic:4"},
        # FP16 flips near ties, and a student of two epochs has many: test_exporting.py holds its parity
        "09_onnx_latency": {"precisions": ["fp32", "int8"], "runs": 10, "reference_size": 0, "calibration": 64}}}
pytestmark = pytest.mark.timeout(1800)  # against standing still: it takes some five minutes, and machines differ


def fer_nb(*args):
    "What the command answers; nothing that it started goes on after it."
    command = [sys.executable, "-m", "fer_nb.cli", *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True) as p:
        try: out, err = p.communicate()
        except BaseException:
            os.killpg(p.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, p.returncode, out, err)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    profile = folder / "tiny.yaml"
    profile.write_text(yaml.safe_dump(PROFILE))
    command = ["run", "--profile", profile, "--out", folder / "run"]
    done = fer_nb(*command)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "epoch 1 of 2: loss" in done.stdout and re.search(r"\n\[(\d+)/\1\] report  done in", done.stdout)
    page = os.path.relpath(folder/"run"/"report"/"report.html", ROOT)
    assert "verdict       GO: " in done.stdout and f"report        {page}" in done.stdout
    return folder / "run", command


def students(run, stage): return run / "students" / f"mobilenetv3_large_100_img48_seed1337_{stage}"


def test_leaves_every_artifact_and_all_lines_go(chain):
    run, _ = chain
    teacher, ensemble = run / "teachers" / "RN18_seed1337_stageB_img64", run / "ensembles" / "pair"
    held = {"teacher": (teacher, "since they are kept"), "ensemble": (ensemble,), "student": (students(run, "CE"), "since they are kept")}
    held |= {"faces": (run/"synthetic"/"faces",), "video": (run/"synthetic"/"video",), "manifest": (run/"manifests",),
             "cache": (run/"cache"/"img48",), "students": (run/"students",), "export": (run/"onnx",),
             "session": (run/"demo"/"first", "scored"), "sessions": (run/"demo",), "report": (run/"report",)}
    for kind, (folder, *holds) in held.items():
        assert [f for f in leaves_of(kind, *holds) if not (folder / f).is_file()] == [], kind
    assert [f for f in leaves_of("student", "softlabels") if not (students(run, "KD") / f).is_file()] == []
    assert json.loads((teacher / "args.json").read_text())["parameters"]["init_from"] == "teachers/RN18_seed1337_stageA_img48"
    for stage, before in (("KD", "CE"), ("DKD", "KD")):
        args = json.loads((students(run, stage) / "args.json").read_text())["parameters"]
        assert args["softlabels"] == "ensembles/pair/softlabels"
        assert args["init_from"] == f"students/mobilenetv3_large_100_img48_seed1337_{before}/best.pt"
    assert json.loads((students(run, "DKD") / "history.json").read_text())["epochs_done"] == 1
    summary = pd.read_csv(run / "students" / "results_summary_students.csv")
    assert list(dict.fromkeys(summary["arm"])) == ["CE", "KD pair", "DKD pair"]
    for folder in (teacher, ensemble, students(run, "KD")):
        assert list(folder.glob("*.ipynb")), "no executed notebook"
    for folder in (teacher, ensemble):
        assert sorted(p.name for p in (folder / "softlabels").iterdir()) == sorted(leaves_of("softlabels"))
    assert json.loads((run / "onnx" / "onnx_parity.json").read_text())["pass"]
    assert json.loads((run / "demo" / "first" / "score_results.json").read_text())["frames"] == 80
    assert set(inventory(run)["state"]) == {"whole"}
    assert gates(run).go
    done = fer_nb("gates", run)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("lines hold")
    page = (run / "report" / "report.html").read_text()
    words = ("In one minute", "一分鐘摘要", "Go or no-go", "Exported files", "Live", "Calibration", "KD pair", "teacher", "data:image/png")
    assert [w for w in words if w not in page] == [] and (run / "report" / "report.pdf").read_bytes()[:5] == b"%PDF-"
    history = json.loads((students(run, "KD") / "history.json").read_text())["rows"]
    assert {"train_ce", "train_kd", "train_alpha", "loader_bound_fraction"} <= set(history[-1])
    assert all(0 < row["loader_bound_fraction"] < 1 for row in history)


def test_provenance_is_told_in_one_page_that_asks_no_network(chain):
    run, command = chain
    page = run/"report"/"provenance.html"
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text) and "import(" not in text
    for word in ("distilled_student", "teacher_stage_b", "onnx_parity.json", "reliability_metrics.json", "How this run came about"):
        assert word in text, word
    page.unlink()
    assert fer_nb(*command, "--dry-run").returncode == 0 and not page.exists()
    again = fer_nb(*command)
    assert again.returncode == 0 and page.is_file() and "provenance.html" in again.stdout, "it is made again after a dry run"


def test_second_run_does_nothing_and_a_lost_file_is_made_again(chain):
    run, command = chain
    again = fer_nb(*command)
    assert again.returncode == 0 and "done in" in again.stdout and "students/" not in again.stdout.split("best student")[0]
    lost = students(run, "DKD") / "reliability_metrics.json"
    before = (students(run, "DKD") / "best.pt").read_bytes()
    lost.unlink()
    told = fer_nb(*command, "--dry-run").stdout.splitlines()
    would = [line.split()[2] for line in told if line.startswith("  would run")]
    assert "students/mobilenetv3_large_100_img48_seed1337_DKD/05_students.ipynb" in would
    assert not any("03_teachers" in x for x in would) and not lost.exists()
    assert any(line.startswith("  up to date teachers/RN18") for line in told) and "nothing was written" in told[-1]
    repaired = fer_nb(*command)
    assert repaired.returncode == 0, (repaired.stdout + repaired.stderr)[-3000:]
    walked = repaired.stdout.split("best student")[0]
    assert lost.is_file() and "] students/mobilenetv3_large_100_img48_seed1337_DKD  done in" in walked and "teachers/" not in walked
    assert (students(run, "DKD") / "best.pt").read_bytes() == before, "a trained student was trained again"


def test_tampering_is_caught(chain, tmp_path):
    run, _ = chain
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns(".snakemake"))
    index = copy / "teachers" / "RN18_seed1337_stageA_img48" / "softlabels" / "softlabels_index.jsonl"
    index.write_text(index.read_text().replace('"row": 0', '"row": 1', 1))
    calibration = students(copy, "CE") / "calibration.json"
    calibration.write_text(calibration.read_text()[:200])
    done = fer_nb("gates", copy)
    assert done.returncode == 1
    assert "softlabels_index.jsonl: was changed" in done.stdout and "calibration.json: is not whole JSON" in done.stdout


@pytest.fixture(scope="module")
def whole(chain, tmp_path_factory):
    "A finished run without what no attack touches, small enough to be copied often."
    copy = tmp_path_factory.mktemp("whole")/"run"
    shutil.copytree(chain[0], copy, ignore=shutil.ignore_patterns(".snakemake", "synthetic", "*.ipynb", "report"))
    assert gates(copy).go  # untouched
    return copy


def fitted_again(folder):
    "T by the validation logits that a folder holds, on the rows that chose it."
    z = read_npz(folder/"evaluation.npz")
    fit = np.isin([i.split("/")[0] for i in z["val_ids"].tolist()], Calibration.load(folder).sources)
    return fit_temperature(z["val_logits"][fit].astype(float), z["val_labels"][fit].astype(int)).temperature


def test_a_kept_copy_proves_itself(chain, tmp_path):
    run, kept = chain[0], tmp_path/"kept"
    assert fer_nb("keep", run, kept).returncode == 0
    done = fer_nb("gates", kept)
    assert done.returncode == 0, done.stdout[-2000:]
    assert not [p for p in kept.rglob("*.json") if run.as_posix() in p.read_text()], "a path of the machine"
    seals = [HashManifest.load(p.parent) for p in kept.rglob("hash_manifest.json")]
    assert len(seals) > 5 and all(s.original for s in seals)
    folder = kept/students(run, "KD").relative_to(run)
    assert HashManifest.load(folder).original == HashManifest.load(students(run, "KD")).files
    assert fitted_again(folder) == pytest.approx(Calibration.load(folder).selected_temperature, rel=2e-3), "T from half precision"
    z = read_npz(folder/"evaluation.npz")
    write_npz(folder/"evaluation.npz", **z | {"val_logits": z["val_logits"][::-1]})  # no score is about these rows
    told = fer_nb("gates", kept)
    assert told.returncode == 1 and "evaluation.npz: was changed after its folder was sealed" in told.stdout
    (kept/"students").rename(kept/"elsewhere")
    assert fer_nb("gates", kept).returncode == 1


@pytest.mark.parametrize("name", ATTACKS)
def test_no_forgery_passes_the_gates(whole, tmp_path, name):
    do, says = ATTACKS[name]
    shutil.copytree(whole, tmp_path/"run")
    try:
        do(tmp_path/"run")
        checklist = gates(tmp_path/"run")
    finally: shutil.rmtree(tmp_path)  # so many copies would fill a disk
    bad = [str(line) for line in checklist.lines if not line.go]
    assert not checklist.go and any(re.search(says, line) for line in bad), bad
    assert len(checklist.lines) > 20  # one broken file doesn't end the list


def test_a_foreign_checkpoint_stops_the_student(chain, tmp_path):
    run, _ = chain
    p = {"manifest_dir": str(run / "manifests"), "cache_dir": str(run / "cache" / "img48"), "out": str(tmp_path / "kd"), "stage": "KD",
         "softlabels": str(run / "ensembles/pair/softlabels"), **STUDIO,
         "init_from": str(run / "teachers/RN18_seed1337_stageA_img48/best.pt")}
    done = fer_nb("notebook", "05_students", tmp_path / "kd.ipynb", "--parameters", json.dumps(p))
    assert done.returncode == 1
    assert "checkpoint of 'resnet18' is foreign to 'mobilenetv3_large_100'" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "kd" / "best.pt").exists() and not (tmp_path / "kd" / "hash_manifest.json").exists()
