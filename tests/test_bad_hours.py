"""Bad hours: two runs in one folder, a run that is ended, a profile with ill intent, a setting that was mistyped."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from fer_nb import artifacts, callbacks, locks, runs, training
from fer_nb.artifacts import GateError, UsageError
from fer_nb.cli import main
from fer_nb.distillation import StudentLoss
from fer_nb.loading import make_loaders
from fer_nb.teachers import Teacher, export_softlabels
from fer_nb.training import embedded_data
from tests.conftest import ROOT


def python(code: str, **kwargs) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)


def test_the_second_run_in_a_folder_is_refused_at_once(tmp_path, capsys):
    code = "from fer_nb.locks import hold\nimport time\nwith hold({!r}): print('held', flush=True); time.sleep(60)"
    first = python(code.format(str(tmp_path/"run")))
    try:
        assert first.stdout.readline() == "held\n"
        (tmp_path/"run"/"profile.yaml").write_text("{}")
        began = time.monotonic()
        assert main(["run", "--profile", "embedded", "--out", str(tmp_path/"run")]) == 1
        said = capsys.readouterr().err
        assert time.monotonic() - began < 3 and f"pid {first.pid}, since 20" in said and "written by another run" in said
    finally:
        first.kill(); first.wait()
    with runs.hold(tmp_path/"run"): pass  # the kernel took the lock back with its holder


def test_a_dry_run_writes_nothing_and_a_foreign_folder_is_left_alone(tmp_path, capsys):
    assert main(["run", "--profile", "embedded", "--out", str(tmp_path/"new"), "--dry-run"]) == 0
    assert "would run  synthetic/00a_synthetic_faces.ipynb" in capsys.readouterr().out and not list(tmp_path.iterdir())
    (tmp_path/"photos").mkdir()
    (tmp_path/"photos"/"hash_manifest.json").write_text('{"dataset_index_id": "a-1", "files": {"gone.txt": "0"}}')
    for extra in ([], ["--dry-run"]):
        assert main(["run", "--profile", "embedded", "--out", str(tmp_path/"photos"), *extra]) == 2
        assert "holds something else than a run" in capsys.readouterr().err
    assert [p.name for p in (tmp_path/"photos").iterdir()] == ["hash_manifest.json"]
    (tmp_path/"file").write_text("")
    assert main(["run", "--profile", "embedded", "--out", str(tmp_path/"file")]) == 2


INTENTS = [({"teachers": {"a;touch HERE;b": {}}}, "teachers"), ({"teachers": {"$(touch HERE)": None}}, "teachers"),
           ({"ensembles": {"x`touch HERE`": {"members": ["RN18"]}}}, "ensembles"), ({"conventions": ["a&&touch HERE"]}, "conventions"),
           ({"teachers": ["../../etc"]}, "teachers"), ({"seeds": ["1; touch HERE"]}, "seeds"), ({"seeds": [True]}, "seeds"),
           ({"seeds": []}, "seeds"), ({"seeds": [-1]}, "seeds"), ({"seeds": [1, 1]}, "seeds"), ({"seeds": [2**32]}, "seeds"),
           ({"img_size": -3}, "img_size"), ({"img_size": "48; touch HERE"}, "img_size"), ({"img_size": 10**6}, "img_size"),
           ({"teachers": {}}, "teachers"), ({"teachers": {"RN81": {}}}, "RN81"), ({"stages": {"CE": {"epochs": 0}}}, "epochs"),
           ({"notebooks": {"05_students": {"batch_size": -1}}}, "batch_size"), ({"stage_b": {"img_size": "x"}}, "img_size"),
           ({"teachers": {"RN18": [1]}}, "RN18"), ({"notebooks": ["x"]}, "notebooks"), ({"stages": 7}, "7"), ({"nonsense": 1}, "nonsense"),
           ({"threads": "all"}, "threads"), (["a", "list"], "no names and values"), ({1: 2}, "no key")]


@pytest.mark.parametrize(("profile", "says"), INTENTS, ids=lambda x: str(x)[:40])
def test_a_profile_is_refused_before_anything_starts(tmp_path, monkeypatch, capsys, profile, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"my.yaml").write_text(yaml.safe_dump(profile))
    assert main(["run", "--profile", str(tmp_path/"my.yaml"), "--out", str(tmp_path/"run")]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["my.yaml"]


@pytest.mark.parametrize(("content", "says"), [
    (b"about: \xe4\xff", "not UTF-8"), (b"a: [", "no YAML"), (b"&a [*a, *a]", ""), (b"[" * 5000, "no YAML")])
def test_a_broken_profile_is_named(tmp_path, capsys, content, says):
    (tmp_path/"my.yaml").write_bytes(content)
    assert main(["run", "--profile", str(tmp_path/"my.yaml"), "--out", str(tmp_path/"run")]) == 2
    assert says in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="process groups")
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_what_a_run_has_started_ends_with_it(tmp_path, sign):
    "The child is asked to end when its parent ends, even by kill -9; it then has its own child, which it ends as Snakemake does."
    child = ("import subprocess, sys, time, os\\np = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\\n"
             "try: print(os.getpid(), p.pid, flush=True); time.sleep(60)\\nfinally: p.kill()")
    say = "lambda line: print(line, end='', flush=True)"
    parent = python(f"import sys\nfrom fer_nb.runs import _snakemake\n_snakemake([sys.executable, '-c', \"{child}\"], {say})",
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # it may be ignored where tests run
    pids = [int(x) for x in parent.stdout.readline().split()]
    parent.send_signal(sign)
    parent.wait(30)
    def alive(pid):
        try: return open(f"/proc/{pid}/stat").read().split()[2] != "Z"
        except OSError: return False
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline: time.sleep(0.1)
    assert len(pids) == 2 and not any(map(alive, pids))


def test_other_settings_leave_a_finished_run_as_it_is(tmp_path):
    config = callbacks.TrainConfig(epochs=2, warmup_epochs=0)
    callbacks.save_checkpoint(tmp_path/"checkpoint_last.pt", rows=[{}, {}], fingerprint=config.fingerprint(arm="a"))
    training.check_settings(tmp_path, config, arm="a")
    with pytest.raises(GateError, match="other settings"): training.check_settings(tmp_path, config, arm="b")
    shorter = callbacks.TrainConfig(epochs=1, warmup_epochs=0)
    with pytest.raises(GateError, match="2 epochs behind it"): training.check_settings(tmp_path, shorter, arm="a")


@pytest.mark.timeout(300)
def test_equal_seeds_leave_equal_bytes(tmp_path):
    manifest, cache = embedded_data(tmp_path/"data", n=300, img_size=32)
    data = training.open_data(manifest, cache)
    for name in ("one", "two"):
        callbacks.seed_everything(7)
        teacher = Teacher("RN18", img_size=32)
        loaders = make_loaders(data.train, data.own_val, 16, 7, augment=None)
        meta = {"geometry": data.geometry.to_dict(), "dataset_index_id": data.dataset_index_id, "scale": 30.0}
        training.train(teacher, *loaders, StudentLoss("CE"), callbacks.TrainConfig(epochs=6, seed=7), tmp_path/name, meta, bar=False)
        training.evaluate_run(teacher, data, tmp_path/name, "same", 7, resamples=20)
        export_softlabels(teacher, data, tmp_path/name, 1.5)
    for f in ("best.pt", "evaluation.npz", "softlabels/softlabels.npz"):
        assert (tmp_path/"one"/f).read_bytes() == (tmp_path/"two"/f).read_bytes(), f


def test_a_profile_that_runs_is_not_refused():
    for name in ("embedded", "fer2013", "fer2013_gpu", "full"): assert runs.load_profile(name)["seeds"]
    with pytest.raises(UsageError, match="unknown profile"): runs.load_profile("embeded")


@pytest.mark.skipif(os.name != "posix", reason="umask")
def test_files_and_folders_obey_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        artifacts.write_text(tmp_path/"note.txt", "mine")
        embedded_data(tmp_path/"data", n=40, img_size=32)
    finally: os.umask(before)
    wide = [p.name for p in tmp_path.rglob("*") if p.stat().st_mode & 0o077]
    assert wide == []


TINY = """
rule all:
    input: "b.txt"
rule a:
    output: "a.txt"
    shell: "sleep 4; echo first > {output}"
rule b:
    input: "a.txt"
    output: "b.txt"
    shell: "cat {input} > {output}; echo last >> {output}"
"""


@pytest.fixture
def tiny_run(tmp_path):
    "`fer-nb run` with a chain of two short jobs in place of ours: gives the command for a folder."
    root = tmp_path/"root"
    (root/"workflow").mkdir(parents=True)
    (root/"workflow"/"Snakefile").write_text(TINY)
    for name in ("nbs", "profiles"): (root/name).symlink_to(ROOT/name)
    code = ("import sys\nfrom pathlib import Path\nfrom fer_nb import cli, runs\n"
            f"runs.project_root = lambda *a: Path({str(root)!r})\n"
            "sys.exit(cli.main(['run', '--profile', 'embedded', '--cores', '2', '--out', sys.argv[1]]))")
    return lambda folder: [sys.executable, "-c", code, str(folder)]


def left_in(folder) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


@pytest.mark.skipif(os.name != "posix", reason="locks of the kernel")
@pytest.mark.timeout(300)
def test_of_two_runs_in_one_folder_the_first_ends_as_alone(tiny_run, tmp_path, capsys):
    alone, both = tmp_path/"alone", tmp_path/"both"
    assert subprocess.run(tiny_run(alone)).returncode == 0
    first = subprocess.Popen(tiny_run(both))
    until = time.monotonic() + 60
    while not (both/".snakemake"/"locks").is_dir() and time.monotonic() < until: time.sleep(0.02)
    began = time.monotonic()
    assert main(["run", "--profile", "embedded", "--out", str(both)]) == 1
    assert time.monotonic() - began < 3 and f"pid {first.pid}, since 20" in capsys.readouterr().err
    assert first.wait(120) == 0 and left_in(both) == left_in(alone)
    assert left_in(both).keys() == {"a.txt", "b.txt", "profile.yaml"}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells children")
@pytest.mark.timeout(300)
def test_a_killed_run_takes_its_jobs_along_and_the_next_one_goes_on(tiny_run, tmp_path):
    out = tmp_path/"run"
    first = subprocess.Popen(tiny_run(out))
    until = time.monotonic() + 60
    while not (out/".snakemake"/"incomplete").is_dir() and time.monotonic() < until: time.sleep(0.05)
    (out/".note.txt.a1b2c3d4.tmp.txt").write_text("half")
    first.kill(); first.wait()
    until = time.monotonic() + 30
    while locks.is_held(out) and time.monotonic() < until: time.sleep(0.1)  # as long as Snakemake lives
    assert subprocess.run(tiny_run(out)).returncode == 0
    assert left_in(out).keys() == {"a.txt", "b.txt", "profile.yaml"} and (out/"b.txt").read_text() == "first\nlast\n"


@pytest.mark.parametrize("line", ["manifest build --source synthetic={there} --out {held}", "score {held}", "keep {there} {held}",
                                  "adapt mine {there} --out {held}", "student train --out {held}", "demo --source synthetic:1 --out {held}",
                                  "manifest validate {held}", "notebook 05_students {there}/x.ipynb -p out {held}"])
def test_what_is_being_written_is_not_written_by_another(line, tmp_path, capsys):
    (tmp_path/"there").mkdir()
    with locks.hold(tmp_path/"held"):
        assert main(line.format(there=tmp_path/"there", held=tmp_path/"held").split()) == 1
    said = capsys.readouterr().err
    assert f"is being written by another run (pid {os.getpid()}, since 20" in said and said.count("\n") == 1


@pytest.mark.parametrize(("content", "says"), [
    (b"[" * 200_000, "nested deeper"), (b"9" * 6000, "not JSON that can be read"), (b"{", "not whole JSON"), (b"\xff", "not text")])
def test_json_that_no_stage_wrote_is_one_line(tmp_path, content, says):
    (tmp_path/"a.json").write_bytes(content)
    with pytest.raises(artifacts.ArtifactError, match=says): artifacts.read_json(tmp_path/"a.json")


def test_an_npz_that_unpacks_a_thousandfold_is_not_unpacked(tmp_path):
    np.savez_compressed(tmp_path/"bomb.npz", logits=np.zeros(40_000_000))
    assert (tmp_path/"bomb.npz").stat().st_size < 1_000_000
    with pytest.raises(artifacts.ArtifactError, match="would unpack to 320,000"): artifacts.read_npz(tmp_path/"bomb.npz")
    np.savez_compressed(tmp_path/"small.npz", logits=np.zeros(1_000_000))  # dense, but small
    assert len(artifacts.read_npz(tmp_path/"small.npz")["logits"]) == 1_000_000
