"The runs of a lent machine: filled in, in order, stopped in time, gone on with."
import importlib.util
import json
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


def test_the_plan_of_the_reference_asks_for_parameters_that_exist(lease, monkeypatch):
    monkeypatch.setattr("fer_nb.runs.PLACES", ())  # its folders are not here
    words = dict.fromkeys(("manifests", "cache", "weights", "device", "out"), "x") | {"amp": "no"} | dict.fromkeys(
        ("epochs", "teacher_epochs", "scratch_epochs", "scratch_batch", "scratch_lr"), 1)
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
