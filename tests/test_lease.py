"The runs of a lent machine: filled in, in order, stopped in time, gone on with."
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fer_nb.phase import arm_name
from fer_nb.runs import check_parameters, notebook_path

ROOT = Path(__file__).parent.parent


@pytest.fixture
def lease(monkeypatch):
    spec = importlib.util.spec_from_file_location("lease", ROOT/"workflow"/"lease.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RUN", (  # a stand-in for a notebook: fails, sleeps or leaves its seal
        "import json, sys, time, pathlib; p = json.loads(sys.argv[3]); time.sleep(p.get('sleep', 0)); p.get('fail') and sys.exit(1);"
        "pathlib.Path(p['out'], 'hash_manifest.json').write_text('{}')"))
    return module


def test_a_plan_is_repeated_over_its_lists_and_filled_in(lease):
    plan = [{"name": "s{seed}_{way}", "for": {"seed": [1, 2], "way": ["CE", "KD"]}, "notebook": "05_students",
             "parameters": {"seed": "{seed}", "lr": 0.1, "augment": {"rotate": 15}, "cache_dir": "{cache}/img80"}}]
    runs = lease.expand(plan, {"cache": "C", "out": "R"})
    assert [r["name"] for r in runs] == ["s1_CE", "s1_KD", "s2_CE", "s2_KD"]
    assert runs[2]["parameters"] == {"seed": 2, "lr": 0.1, "augment": {"rotate": 15}, "cache_dir": "C/img80"}
    whose = [{"c": "x", "t": "votes"}, {"c": "y", "t": "labels"}]
    pairs = [{"name": "{c}", "for": {"whose": whose}, "notebook": "n", "parameters": {"t": "{t}"}}]
    assert [(r["name"], r["parameters"]["t"]) for r in lease.expand(pairs, {})] == [("x", "votes"), ("y", "labels")]
    with pytest.raises(SystemExit, match="needs b, which is no run"): lease.expand([{"name": "a", "notebook": "n", "needs": ["b"]}], {})
    with pytest.raises(SystemExit, match="names a twice"): lease.expand([{"name": "a", "notebook": "n"}]*2, {})
    assert lease.typed("40") == 40 and lease.typed("no") == "no"


def test_what_needs_a_failed_run_waits_and_a_second_call_goes_on(lease, tmp_path):
    runs = [{"name": "a", "notebook": "n", "needs": [], "parameters": {}},
            {"name": "b", "notebook": "n", "needs": ["a"], "parameters": {"fail": True}},
            {"name": "c", "notebook": "n", "needs": ["b"], "parameters": {}}]
    told = lease.walk(runs, tmp_path, side_by_side=2, until=60)
    assert [told[n]["state"] for n in "abc"] == ["done", "failed", "not begun"]
    assert json.loads((tmp_path/"lease.json").read_text()) == told
    runs[1]["parameters"] = {}
    told = lease.walk(runs, tmp_path, side_by_side=2, until=60)
    assert [told[n]["state"] for n in "abc"] == ["done before", "done", "done"]


def test_what_is_unfinished_when_the_time_is_up_is_stopped(lease, tmp_path):
    runs = [{"name": "long", "notebook": "n", "needs": [], "parameters": {"sleep": 60}},
            {"name": "after", "notebook": "n", "needs": ["long"], "parameters": {}}]
    told = lease.walk(runs, tmp_path, side_by_side=2, until=1)
    assert told["long"]["state"] == "stopped" and told["long"]["seconds"] < 30 and told["after"]["state"] == "not begun"


TRAINS = {"name": "students/{way}", "for": {"way": ["CE", "KD"]}, "notebook": "05_students",
          "parameters": {"stage": "{way}", "epochs": "{epochs}"}}  # a plan's entry with names that exist
FOUR = {"name": "ensembles/four", "notebook": "04_ensembles", "parameters": {"name": "four"}}


@pytest.fixture
def call(lease, tmp_path, capsys):
    "A call of the script: its exit code, and what it told."
    def call(plan, *more):
        (tmp_path/"plan.yaml").write_text(plan if isinstance(plan, str) else yaml.safe_dump(plan))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended: lease.main([str(tmp_path/"plan.yaml"), "--out", str(tmp_path/"runs"), *more])
        return int(ended.value.code), "".join(capsys.readouterr())
    return call


def test_changed_words_are_told_and_nothing_is_run_for_them(call, tmp_path):
    assert call([TRAINS], "--set", "epochs=2")[0] == 0
    assert json.loads((tmp_path/"runs/students/KD/run.json").read_text()) == {"notebook": "05_students", "stage": "KD", "epochs": 2}
    assert call([TRAINS], "--set", "epochs=2")[0] == 0
    rc, told = call([TRAINS], "--set", "epochs=60")
    assert rc == 1 and told.count("done with other settings: epochs 2, now 60") == 2
    (tmp_path/"runs/students/KD/run.json").unlink()  # as of an older call
    states = {n: t["state"] for n, t in json.loads((tmp_path/"runs/lease.json").read_text()).items()}
    assert states == dict.fromkeys(["students/CE", "students/KD"], "done with other settings: epochs 2, now 60")
    rc, told = call([TRAINS], "--set", "epochs=60", "--only", "students/KD")
    assert rc == 0 and "other settings" not in told


def test_what_needs_a_run_of_other_settings_waits(lease, tmp_path):
    runs = [{"name": "a", "notebook": "n", "needs": [], "parameters": {"epochs": 2}},
            {"name": "b", "notebook": "n", "needs": ["a"], "parameters": {}}]
    lease.walk(runs[:1], tmp_path, side_by_side=1, until=60)
    runs[0]["parameters"] = {"lr": 1}
    told = lease.walk(runs, tmp_path, side_by_side=1, until=60)
    assert told["a"]["state"] == "done with other settings: epochs 2, now not given; lr not given, now 1"
    assert told["b"] == {"state": "not begun", "needs": ["a"]}


def test_settings_are_the_same_wherever_the_runs_lie(lease, tmp_path):
    plan = [{"name": "a", "notebook": "n", "parameters": {"init_from": "{out}/b/best.pt", "place": "{out}"}}]
    lease.walk(lease.expand(plan, {"out": str(tmp_path/"here")}), tmp_path/"here", side_by_side=1, until=60)
    (tmp_path/"here").rename(tmp_path/"there")
    told = lease.walk(lease.expand(plan, {"out": str(tmp_path/"there")}), tmp_path/"there", side_by_side=1, until=60)
    assert told["a"]["state"] == "done before"


def test_a_need_that_only_left_out_counts_when_it_is_done(call, tmp_path):
    plan = [FOUR, TRAINS | {"needs": ["ensembles/four"]}]
    rc, told = call(plan, "--set", "epochs=2", "--only", "students/")
    assert rc == 1 and told.count("(needs ensembles/four)") == 2 and "not begun    students/CE" in told
    assert call(plan, "--set", "epochs=2", "--only", "ens")[0] == 0
    assert call(plan, "--set", "epochs=2", "--only", "students/CE", "--only", "students/KD")[0] == 0
    assert sorted(json.loads((tmp_path/"runs/lease.json").read_text())) == ["students/CE", "students/KD"]
    (tmp_path/"runs/students/KD/hash_manifest.json").unlink()
    rc, told = call([FOUR | {"parameters": {"name": "five"}}, plan[1]], "--set", "epochs=2", "--only", "students/")
    assert rc == 0 and 'taken as is  ensembles/four  (done with other settings: name "four", now "five")' in told


@pytest.mark.parametrize(("plan", "more", "words"), [
    ([TRAINS], ["--only", "studentz"], "--only studentz: no run's name begins so; did you mean students/? there are students/"),
    ([TRAINS], ["--side-by-side", "0"], "--side-by-side 0: give 1 or more"),
    ([TRAINS], ["--until", "nan"], "--until nan: give seconds, more than 0"),
    ([TRAINS], ["--set", "epochs"], "--set epochs: give WORD=VALUE"),
    ([TRAINS], ["--set", "epoch=3"], "'{epochs}' has a word that is not set: give --set epochs=VALUE"),
    ("- name: [", [], "plan.yaml is no YAML: "), ("when: 2025-13-45", [], "plan.yaml is no YAML: month must be"),
    ("", [], "holds no list of runs, each with name, notebook"), ("name: a", [], "holds no list of runs"),
    ("[3]", [], "entry 1 is 3: give name"), ("[{notebook: n}]", [], "entry 1 has no name"), ("[{name: a}]", [], "entry 1 has no notebook"),
    ("[{name: a, notebook: n, for: {seed: 1337}}]", [], "entry 1 has seed: 1337 under for: give a list of values"),
    ("[{name: a, notebook: n, for: [1]}]", [], "entry 1 has for: [1]: give words, each with a list"),
    ("[{name: a, notebook: n, needs: b}]", [], "has needs: 'b': give a list"),
    ("[{name: a, notebook: n, parameters: [1]}]", [], "has parameters: [1]: give names and values"),
    ("[{name: {way}, notebook: n}]", [], "has name: {'way': None}: give a text"),
    ("[{name: a, notebook: n, need: [b]}]", [], "has 'need', which is none of name, notebook, parameters, needs, for"),
    ("[{name: 'a{', notebook: n}]", [], "'a{' can't be filled in"), ("[{name: ../a, notebook: n}]", [], "is no name of a folder below"),
    ("[{name: a, notebook: n, parameters: {day: 2025-01-02}}]", [], "a: its parameters are no JSON"),
    ([TRAINS | {"notebook": "05_student"}], [], "students/CE: unknown notebook '05_student': did you mean 05_students?"),
    ([TRAINS, FOUR | {"parameters": {"nane": "x"}}], [], "ensembles/four: 04_ensembles has no parameter 'nane'")])
def test_what_can_not_be_run_is_refused_in_one_sentence_before_anything_starts(call, tmp_path, plan, more, words):
    rc, told = call(plan, *([] if "--set" in more else ["--set", "epochs=2"]), *more)
    assert rc == 2 and told.startswith("lease.py: ") and words in told and told.count("\n") == 1, told
    assert not [*tmp_path.glob("runs/*/*")]


def test_a_plan_that_is_not_there_and_a_file_in_the_place_of_the_runs(tmp_path):
    def told(*given):
        said = subprocess.run([sys.executable, ROOT/"workflow"/"lease.py", *given], capture_output=True, text=True)
        return said.returncode, said.stdout + said.stderr
    assert told("none.yaml", "--out", tmp_path) == (2, "lease.py: none.yaml can't be read: No such file or directory\n")
    (tmp_path/"plan.yaml").write_text("[{name: a, notebook: n}]")
    rc, said = told(tmp_path/"plan.yaml", "--out", tmp_path/"plan.yaml")
    assert rc == 2 and said.endswith("plan.yaml: File exists\n")


def test_what_the_plan_will_write_may_be_missing_before_the_start(lease, tmp_path):
    runs = [{"name": "e", "notebook": "04_ensembles", "needs": [], "parameters": {}},
            {"name": "s", "notebook": "05_students", "needs": ["e"], "parameters": {"softlabels": f"{tmp_path}/e/softlabels"}}]
    lease.check_runs(runs, runs, tmp_path)
    with pytest.raises(SystemExit, match="s: 05_students: softlabels is .* it does not exist"):
        lease.check_runs(runs[1:], runs[1:], tmp_path)


def test_where_the_check_can_not_be_imported_the_runs_start_without_it(call, lease, monkeypatch):
    monkeypatch.setattr(lease, "CHECK", lease.CHECK.replace("fer_nb.runs", "no_such_package"))
    rc, told = call([TRAINS | {"parameters": {"nane": 1}}])
    assert rc == 0 and "are not checked before the start: No module named 'no_such_package'" in told


def test_a_failed_run_is_told_with_its_log(lease, tmp_path, capsys):
    lease.walk([{"name": "a", "notebook": "n", "needs": [], "parameters": {"fail": True}}], tmp_path, side_by_side=1, until=60)
    assert f"failed       a  ({tmp_path}/a/log.txt)" in capsys.readouterr().out and (tmp_path/"a/log.txt").is_file()


def test_the_plan_of_the_reference_asks_for_parameters_that_exist(lease, monkeypatch):
    monkeypatch.setattr("fer_nb.runs.PLACES", ())  # its folders are not here
    words = dict.fromkeys(("manifests", "cache", "weights", "device", "out"), "x") | {"amp": "no"} | dict.fromkeys(
        ("epochs", "teacher_epochs", "scratch_epochs", "scratch_batch", "scratch_lr"), 2)
    runs = lease.expand(yaml.safe_load((ROOT/"workflow"/"lease.yaml").read_text()), words)
    assert len(runs) == 4 + 4 + 2 + 12
    for r in runs: check_parameters(notebook_path(r["notebook"]), r["parameters"])
    assert len({r["parameters"]["epochs"] for r in runs if r["notebook"] == "05_students"}) == 1  # at equal cost


def test_the_matrix_of_nl_has_every_optimiser_with_every_use_of_negative_labels(lease, monkeypatch):
    monkeypatch.setattr("fer_nb.runs.PLACES", ())  # its folders are not here
    words = dict.fromkeys(("manifests", "cache", "softlabels", "init", "init_origin", "smoke", "phase", "convention", "device", "out"), "x")
    words |= {"targets": "votes", "amp": "no", "source": "", "rows": 0}
    runs = lease.expand(yaml.safe_load((ROOT/"workflow"/"nl_matrix.yaml").read_text()), words | {"epochs": 2})
    assert len(runs) == 2*3*3*3
    for r in runs: check_parameters(notebook_path(r["notebook"]), r["parameters"])
    kd = [r for r in runs if r["name"].startswith("students/")]
    assert {arm_name(r["parameters"]["optimizer"], r["parameters"]["negl"]) for r in kd} == {
        "", "NegL", "NegL_replace", *(f"{o}{n}" for o in ("DeepMomentum", "MultiFrequency") for n in ("", "+NegL", "+NegL_replace"))}
    alike = [{k: v for k, v in r["parameters"].items() if k not in ("seed", "optimizer", "optimizer_args", "negl")} for r in kd]
    assert all(a == alike[0] for a in alike)  # one start, one cost
    ramped = {r["parameters"]["optimizer"] for r in kd if r["parameters"]["optimizer_args"]}
    assert ramped == {"deep_momentum"}  # the one optimiser with a setting of its own
