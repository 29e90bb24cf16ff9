"""Watching a run: the plan before it, lines while it goes, the failure it shows, what it refuses to throw away, and the table of runs."""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fer_nb.artifacts import UsageError, write_text
from fer_nb.cli import main, parser
from fer_nb.images import load_cache
from fer_nb.leaves import seal_folder
from fer_nb.manifests import load_manifest
from fer_nb.progress import EpochWatch, Forecast, Stage, between, epochs_done, makespan, span
from fer_nb.records import RunArgs
from fer_nb.runs import chain_config, load_profile, notebook_parameters, notebook_path, plan_chain, run_profile, source_of
from fer_nb.synthetic import write_dataset
from tests.conftest import ROOT

TINY = {"teachers": {"RN18": {"lr": 1.0e-3}}, "stages": ["CE"], "ensembles": {}, "notebooks": {"00a_synthetic_faces": {"n": 70}}}


def profile(folder, **changed):
    path = folder/"tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changed}))
    return str(path)


def state(folder):
    "Every path below a folder, with its size and time of change."
    return {p.relative_to(folder).as_posix(): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


@pytest.fixture()
def trained(tmp_path):
    "A run folder whose teacher is trained, as far as a plan looks."
    run = tmp_path/"run"
    config = chain_config(load_profile(profile(tmp_path)))
    write_text(run/"profile.yaml", yaml.safe_dump(config))
    stage = next(s for s in plan_chain(config, run, 2) if s.rule == "teacher")
    settings = {k: p.default for k, p in notebook_parameters(notebook_path("03_teachers")).items()} | stage.parameters
    RunArgs(stage="teacher", parameters=settings | {"device": "cpu", "convention": "synthetic"}).save(run/stage.name)
    write_text(run/stage.name/"checkpoint_last.pt", "weights")
    seal_folder(run/stage.name, "demo-0")
    return run


@pytest.mark.parametrize(("changed", "named"), [
    ({"teachers": {"RN18": {"lr": 5.0e-4}}}, "lr = 0.001, and now 0.0005 is asked"),
    ({"teachers": {"RN18": {"lr": 1.0e-3, "epochs": 1}}}, "epochs = 3, and now 1 is asked"),
    ({"notebooks": {**TINY["notebooks"], "03_teachers": {"mixup": 0.2}}}, "mixup = 0.0, and now 0.2 is asked")])
def test_a_finished_training_is_not_thrown_away(trained, tmp_path, capsys, changed, named):
    before = state(trained)
    for extra in ([], ["--dry-run"]):
        assert main(["run", "--profile", profile(tmp_path, **changed), "--out", str(trained), *extra]) == 2
        said = capsys.readouterr().err
        assert named in said and "RN18_seed1337_stageA_img48 was trained with" in said
        assert "set it back, give another --out, or delete" in said
        assert len(said.splitlines()) == 1
    def files(told): return {k: v for k, v in told.items() if not (trained/k).is_dir()}
    assert files(state(trained)) == files(before)


def test_more_epochs_and_other_devices_are_no_change(trained, tmp_path, capsys):
    more = {"teachers": {"RN18": {"lr": 1.0e-3, "epochs": 9, "device": "cpu"}}}
    assert main(["run", "--profile", profile(tmp_path, **more), "--out", str(trained), "--dry-run"]) == 0
    assert "9 epochs" in capsys.readouterr().out


def test_other_rows_under_finished_trainings_are_refused(trained, tmp_path, capsys):
    given = {"papermill": {"parameters": {"n": 70, "out": "synthetic"}}}
    write_text(trained/"synthetic"/"00a_synthetic_faces.ipynb", json.dumps({"metadata": given}))
    assert main(["run", "--profile", profile(tmp_path), "--out", str(trained), "--dry-run"]) == 0
    other = profile(tmp_path, notebooks={"00a_synthetic_faces": {"n": 700}})
    assert main(["run", "--profile", other, "--out", str(trained)]) == 2
    assert "synthetic was made, and networks learned from it, with n = 70, and now 700 is asked" in capsys.readouterr().err


def test_a_dry_run_says_what_and_why_and_touches_nothing(trained, tmp_path, capsys):
    write_text(trained/".snakemake"/"metadata"/"x", "{}")
    before = state(trained)
    assert main(["run", "--profile", profile(tmp_path), "--out", str(trained), "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert state(trained) == before
    assert any(re.match(r"  would run  synthetic/00a_synthetic_faces.ipynb +not made yet, 70 faces, about \d+ s$", x) for x in out), out
    assert re.search(r"^\d+ stages: \d+ up to date, \d+ would run, .* on \d+ cores; nothing was written$", out[-1])


def test_runs_go_below_the_current_folder(tmp_path, monkeypatch, capsys):
    given = profile(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run_profile(given, dry_run=True) == tmp_path/"runs"/"tiny"/"report"/"report.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.yaml"]


def test_a_failed_stage_is_told_in_three_lines_with_its_notebook(tmp_path):
    (tmp_path/"empty").mkdir()
    command = [sys.executable, "-m", "fer_nb.cli", "run", "--profile", profile(tmp_path), "--data", f"synthetic={tmp_path/'empty'}"]
    command += ["--out", "mine"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=280)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    at = next(i for i, x in enumerate(lines) if re.match(r"\[ *1/\d+\] manifests  failed after", x))
    told = [x.strip() for x in lines[at + 1:at + 4]]
    assert told[0].startswith("UsageError: ") and told[1].startswith("in cell [")
    assert told[2] == "executed notebook: mine/manifests/00_manifests.ipynb"
    assert (tmp_path/"mine"/"manifests"/"00_manifests.ipynb").is_file()
    assert "Error in rule" not in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert done.stderr.startswith("fer-nb: the chain of") and "1 stage failed" in done.stderr


def test_class_folders_are_recognised_and_wrong_profiles_refused(tmp_path, capsys):
    for part in ("train/happy", "train/sad"):
        (tmp_path/"faces"/part).mkdir(parents=True)
        for k in range(3): (tmp_path/"faces"/part/f"{k}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    faces = str(tmp_path/"faces")
    assert source_of(faces) == f"folder={faces}"
    assert main(["run", "--profile", "embedded", "--data", faces, "--out", str(tmp_path/"run")]) == 2
    said = capsys.readouterr().err
    assert "trains on the source 'synthetic_studio' (notebooks.03_teachers.train_source), and the data have folder" in said
    with pytest.raises(UsageError, match="has no test part, so nothing could judge"): chain_config(load_profile(profile(tmp_path)), [faces])
    assert chain_config(load_profile("own"), [faces])["sources"] == [f"folder={faces}"]
    assert not (tmp_path/"run").exists()


def test_a_cache_is_packed_by_one_command(tmp_path, capsys):
    write_dataset(tmp_path/"faces", n=70, size=48)
    m, cache = str(tmp_path/"m"), str(tmp_path/"cache")
    assert main(["manifest", "build", "--source", str(tmp_path/"faces"), "--out", m]) == 0  # recognised
    assert main(["manifest", "audit", m]) == 0
    assert main(["cache", "--manifest", m, "--out", cache, "--img-size", "32", "--framing-sample", "0"]) == 0
    packed = load_cache(cache, load_manifest(m))
    assert packed.geometry.size == 32 and len(packed.rows) == 70
    assert main(["cache", "--manifest", m, "--out", str(tmp_path/"faces")]) == 2  # never over a folder of something else
    assert (tmp_path/"faces"/"synthetic.json").is_file()


@pytest.mark.parametrize(("line", "near"), [("predct face.png", "predict"), ("teacher trian", "train"),
                                            ("student train --epocs 3", "--epochs"), ("run --profile quick --dry-rum", "--dry-run"),
                                            ("run --porfile quick", "--profile"), ("run --porfile=quick", "--profile"),
                                            ("manifest build --out m --sauce folder=x", "--source")])
def test_a_misspelt_word_is_answered_with_the_one_that_was_meant(line, near, capsys):
    with pytest.raises(SystemExit) as e: main(line.split())
    assert e.value.code == 2 and f"did you mean {near}?" in capsys.readouterr().err


@pytest.mark.parametrize(("line", "near"), [("run --profile quik", "quick"), ("notebook 03_techers out.ipynb", "03_teachers")])
def test_a_misspelt_name_is_answered_with_the_one_that_was_meant(line, near, capsys):
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert said.endswith(f": did you mean {near}?\n") and len(said) < 120


def test_shortened_flags_and_values_that_look_odd_are_still_read(capsys):
    a = parser().parse_args(["run", "--prof", "quick", "--dry", "--out=a--b"])
    assert (a.profile, a.dry_run, a.out) == ("quick", True, "a--b")
    with pytest.raises(SystemExit): main(["run", "--dry-run"])
    assert "required: --profile" in capsys.readouterr().err


def test_a_folder_below_a_file_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"afile").write_text("mine")
    for line in (["run", "--profile", "quick", "--dry-run", "--out", "afile/x"], ["cache", "--manifest", "m", "--out", "afile/x/y"],
                 ["notebook", "00_artifacts", "afile/x.ipynb"]):
        assert main(line) == 2 and "afile' is a file: give a folder" in capsys.readouterr().err
    with pytest.raises(UsageError, match="afile' is a file"): run_profile("quick", out=str(tmp_path/"afile"/"x"), dry_run=True)


def test_a_device_that_is_not_there_is_refused_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for line in (["run", "--profile", "quick"], ["teacher", "train"], ["student", "train"]):
        for device in ("cuda", "cuda:7", "gpu"):
            assert main([*line, "--device", device, "--out", str(tmp_path/"run")]) == 2
            said = capsys.readouterr().err
            assert f"--device '{device}'" in said or f"--device {device}: this machine has no CUDA device" in said
    assert not (tmp_path/"run").exists()


def test_epochs_are_told_once_and_in_time(tmp_path):
    history, heard = tmp_path/"history.csv", []
    rows = ["epoch,train_loss,valid_accuracy,valid_macro_f1,train_seconds,valid_seconds"]
    with EpochWatch(tmp_path, 3, heard.append, 0.01):
        for n in range(3):
            rows.append(f"{n},{2 - n/4},0.{n + 2},0.{n + 1},50,10")
            write_text(history, "\n".join(rows) + "\n")
            deadline = time.monotonic() + 5
            while len(heard) <= n and time.monotonic() < deadline: time.sleep(0.01)
    assert [h.partition(":")[0] for h in heard] == ["epoch 1 of 3", "epoch 2 of 3", "epoch 3 of 3"]
    assert "macro-F1 0.100, accuracy 0.200, 2 min left" in heard[0] and "left" not in heard[2]
    history.write_bytes(b"\xff\xfe broken")
    assert epochs_done(tmp_path) == []


CHAINS = st.lists(st.tuples(st.integers(1, 100), st.integers(1, 4), st.sets(st.integers(0, 7), max_size=3)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(CHAINS, st.integers(1, 4))
def test_a_chain_takes_no_less_than_its_longest_path_and_its_work(chain, cores):
    "A stage needs only stages before it; the forecast lies between the bounds of every schedule."
    stages = [Stage("x", str(i), tuple(f"{n}.made" for n in needs if n < i), (f"{i}.made",), threads)
              for i, (_, threads, needs) in enumerate(chain)]
    took = {s.log: float(seconds) for s, (seconds, *_) in zip(stages, chain)}
    longest: dict[str, float] = {}
    for s in stages: longest[s.log] = took[s.log] + max((longest[n.removesuffix(".made")] for n in s.needs), default=0)
    work = sum(took[s.log]*min(s.threads, cores) for s in stages)
    assert max(max(longest.values()), work/cores) - 1e-9 <= makespan(stages, took, cores) <= sum(took.values()) + 1e-9


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_ranges_are_ordered_words(a, b):
    low, high = sorted((a, b))
    said = between(low, high)
    assert said and "nan" not in said and not said.startswith("0 ")
    assert re.fullmatch(r"a moment|(about |up to )?(\d+ h )?\d+( s| min)?( to (\d+ h )?\d+ (s|min))?", said), said
    assert re.fullmatch(r"(\d+ h )?\d+ (s|min)", span(a))


def test_the_forecast_learns_how_fast_the_machine_is():
    stages = [Stage("synthetic", "a", makes=("a",)), Stage("manifests", "b", ("a",), ("b",)), Stage("report", "c", ("b",))]
    f = Forecast(stages, 1, 1000)
    least, most = f.left(0)
    f.took["a"] = 5*f.needed["a"]
    slow = f.left(100)
    assert least < f.needed["a"] + f.needed["b"] + f.needed["c"] < most
    assert slow[0] > f.needed["b"] + f.needed["c"] and slow[1] - slow[0] < 5*(f.needed["b"] + f.needed["c"])
    f.took |= {"b": 1.0, "c": 1.0}
    assert f.left(200) == (0.0, 0.0)


def test_status_names_what_runs_what_is_done_and_what_broke_off(trained, capsys):
    lost = trained/"students"/"mine"
    write_text(lost/"args.json", json.dumps({"schema_version": 1, "stage": "student", "parameters": {"epochs": 4}}))
    write_text(lost/"history.csv", "epoch,train_loss\n0,1.9\n1,1.8\n")
    assert main(["status", str(trained), "--fast"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"students/mine +interrupted +2 of 4 +– +–", out) and re.search(r"teachers/RN18_seed1337_stageA_img48 +finished", out)
    assert main(["status", str(trained)]) == 0
    assert re.search(r"students/mine +interrupted +2 of 4 +– +NO-GO", capsys.readouterr().out)
    assert main(["status", str(trained/"none")]) == 2 and main(["status", str(Path(trained)/"teachers"/"..")]) == 0
