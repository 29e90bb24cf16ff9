"""The smoke test and the phase gate of NL and NegL: each way to be stopped, and a run of the students' notebook with both."""
import json

import numpy as np
import pandas as pd
import papermill
import pytest

from fer_nb.arms import simulate_student
from fer_nb.artifacts import CLASSES, GateError, UsageError
from fer_nb.cli import main
from fer_nb.evidence import SmokeTest
from fer_nb.manifests import load_manifest
from fer_nb.negl import NegLConfig
from fer_nb.phase import (
    ARMS, ArmSmoke, NLSmoke, PhaseGate, arm_parameters, judge_part, judge_smoke, nl_smoke, phase_gate, require_arm, require_phase,
    require_smoke,
)
from fer_nb.records import RunArgs, TrainingHistory
from fer_nb.training import embedded_data
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return embedded_data(tmp_path_factory.mktemp("faces"), n=300, img_size=32)


@pytest.mark.timeout(400)
def test_the_smoke_test_logs_every_arm_and_full_runs_ask_for_it(prepared, tmp_path):
    arms = ("AdamW", "DeepMomentum", "NegL_replace")
    smoke = nl_smoke(*prepared, tmp_path, arms=arms, epochs=2, rows=160, batch_size=16, accumulate=4)
    assert NLSmoke.load(tmp_path) == smoke and list(smoke.arms) == list(arms) and smoke.rows == 160
    for name in arms:
        history = TrainingHistory.load(tmp_path/name)
        assert {"grad_norm", "clipped_fraction", "optimizer_state_mb", "skipped_steps", "peak_memory_mb"} <= set(history.rows[0])
        assert smoke.arms[name].loss_curve == [r["train_loss"] for r in history.rows]
    assert smoke.arms["DeepMomentum"].memory_r2 is not None and smoke.arms["AdamW"].memory_r2 is None
    assert smoke.arms["NegL_replace"].applied == pytest.approx(0.2, rel=0.2)
    assert {"negl_config.json", "negl_rules.md", "negl_applied.csv"} <= {p.name for p in (tmp_path/"NegL_replace").iterdir()}
    for arm in (n for n in arms if not smoke.arms[n].reasons): require_smoke(tmp_path, arm, smoke.dataset_index_id)
    with pytest.raises(GateError, match="'NegL' was not smoked"): require_smoke(tmp_path, "NegL", smoke.dataset_index_id)
    with pytest.raises(GateError, match="not on elsewhere"): require_smoke(tmp_path, "AdamW", "elsewhere")
    with pytest.raises(GateError, match="is missing"): require_smoke(tmp_path/"none", "AdamW", smoke.dataset_index_id)


def history(loss, applied=None, skipped=0):
    more = {} if applied is None else {"train_negl_applied": applied}
    rows = [{"train_loss": v, "skipped_steps": skipped, "train_seconds": 1.0, "grad_norm": 1.0, "peak_memory_mb": None,
             "optimizer_state_mb": 1.0, **more} for v in loss]
    return TrainingHistory(rows=rows, epochs_done=len(rows), epochs_total=len(rows), best_epoch=0, best_macro_f1=0.0)


@pytest.mark.parametrize("given, reason", [
    ((history([1.0, 0.9]), 1.0), None), ((history([1.0, 1.0]), 1.0), "does not fall"), ((history([1.0, float("inf")]), 1.0), "not finite"),
    ((history([1.0, 0.9], skipped=1), 1.0), "2 steps were skipped"), ((history([1.0, 0.9], 0.25), 1.0, 0.2), "applied to 0.250"),
    ((history([1.0, 0.9], 0.17), 1.0, 0.2), None)])
def test_every_reason_stops_an_arm(given, reason):
    got = judge_smoke(*given)
    assert got.go_no_go == ("NO-GO" if reason else "GO") and (not reason or reason in got.reasons[0])


def test_arms_combine_and_clash():
    assert arm_parameters("MultiFrequency+NegL")["optimizer"] == "multi_frequency"
    assert arm_parameters("AdamW") == {"optimizer": "adamw", "optimizer_args": None, "negl": {}}
    for name in ARMS: arm_parameters(name)
    with pytest.raises(UsageError, match="sets negl twice"): arm_parameters("NegL+NegL_replace")
    with pytest.raises(UsageError, match="is no arm"): arm_parameters("NL")


BASE = {1: (0.60, 0.03), 2: (0.61, 0.04), 3: (0.59, 0.02), 4: (0.60, 0.03)}


@pytest.mark.parametrize("by, ece, verdict", [
    ((0, 0, 0, 0), 0, "non-inferior"), ((-0.004, -0.004, -0.004, -0.004), 0.01, "non-inferior"),
    ((0.02, -0.02, 0.02, -0.02), 0, "not shown"),
    ((-0.006, -0.006, -0.006, -0.006), 0, "inferior"), ((0.05, 0.05, 0.05, 0.05), 0.011, "inferior")])
def test_the_margin_is_asked_of_the_interval_s_end(by, ece, verdict):
    arm = {s: (f + d, e + ece - 1e-12) for (s, (f, e)), d in zip(BASE.items(), by)}
    got = judge_part(arm, BASE)
    assert got.verdict == verdict and got.lower <= got.macro_f1_difference <= got.upper
    differences = np.array(by)
    assert got.upper - got.lower == pytest.approx(2*2.3533634*differences.std(ddof=1)/2, abs=1e-6)  # t of 3 degrees, 95%


def test_fewer_than_three_seeds_are_refused():
    with pytest.raises(GateError, match="share 2 seeds: train at least 3"): judge_part({1: (1, 0), 2: (1, 0), 9: (1, 0)}, BASE)


def test_the_gate_opens_only_where_each_part_passes(tmp_path):
    def runs(name, skill, **kw):
        return [simulate_student(tmp_path/f"{name}_seed{s}", {"stage": "KD", "seed": s}, skill, **kw) for s in (1, 2, 3)]
    plain, good, bad = runs("plain", 2.0), runs("good", 2.5), runs("bad", 1.0)
    assert phase_gate(plain, {"NL": good, "NegL": good}, tmp_path/"open").passed
    require_phase(tmp_path/"open")
    shut = phase_gate(plain, {"NL": good, "NegL": bad}, tmp_path/"shut")
    assert not shut.passed and PhaseGate.load(tmp_path/"shut") == shut and "inferior" in str(shut)
    with pytest.raises(GateError, match="'NegL' alone is inferior"): require_phase(tmp_path/"shut")
    with pytest.raises(GateError, match="has not judged 'NegL'"):
        phase_gate(plain, {"NL": good}, tmp_path/"half")
        require_phase(tmp_path/"half")
    with pytest.raises(GateError, match="is missing"): require_phase(tmp_path/"none")
    other = runs("other", 2.5, dataset_index_id="other-1")
    with pytest.raises(GateError, match="give runs of one dataset"): phase_gate(plain, {"NL": other})
    with pytest.raises(UsageError, match="one seed"): phase_gate(plain + plain, {"NL": good})
    with pytest.raises(UsageError, match="no parts"): phase_gate(plain, {})
    (good[0]/"evaluation.npz").write_bytes(b"broken")
    with pytest.raises(GateError): phase_gate(plain, {"NL": good})


def test_an_arm_with_dkd_asks_for_its_own_parts(tmp_path):
    "A matrix's gate names its arms, `fer-nb nl gate` may say NL and NegL."
    runs = {name: [simulate_student(tmp_path/f"{name}_seed{s}", {"stage": "KD", "seed": s}, skill) for s in (1, 2, 3)]
            for name, skill in (("plain", 2.0), ("DeepMomentum", 2.5), ("NegL_replace", 2.5), ("NegL", 1.0))}
    plain = runs.pop("plain")
    index_id = phase_gate(plain, runs, tmp_path/"gate").dataset_index_id
    smoked = ArmSmoke(loss_curve=[2.0, 1.9], skipped_steps=0, seconds=1.0, time_ratio=1.0, optimizer_state_mb=1.0, go_no_go="GO")
    arms = dict.fromkeys((*ARMS, "DeepMomentum+NegL", "DeepMomentum+NegL_replace", "MultiFrequency+NegL_replace"), smoked)
    NLSmoke(dataset_index_id=index_id, stage="KD", rows=64, epochs=2, seed=1, arms=arms).save(tmp_path/"smoke")
    def ask(optimizer, replace): return require_arm(optimizer, {"replace_ce": replace}, "DKD", index_id, tmp_path/"smoke", tmp_path/"gate")
    assert ask("deep_momentum", True) == "DeepMomentum+NegL_replace"
    with pytest.raises(GateError, match="'NegL' alone is inferior"): ask("deep_momentum", False)
    with pytest.raises(GateError, match="has not judged 'NL'"): ask("multi_frequency", True)


@pytest.mark.timeout(600)
def test_the_students_notebook_runs_with_both(prepared, tmp_path):
    manifest, cache = map(str, prepared)
    negl = {"replace_ce": True, "uncertainty_gate": {"by": "label", "average": 0.5}}
    parameters = dict(manifest_dir=manifest, cache_dir=cache, out=str(tmp_path/"run"), epochs=2, accumulate=2, optimizer="deep_momentum",
                      optimizer_args={"ramp": 4}, negl=negl)
    def execute(**more):
        return papermill.execute_notebook(str(ROOT/"nbs"/"05_students.ipynb"), str(tmp_path/"run.ipynb"), parameters | more,
                                          kernel_name="python3", cwd=str(ROOT/"nbs"), progress_bar=False)
    with pytest.raises(papermill.PapermillExecutionError, match="was not smoked"): execute()
    run = tmp_path/"run"
    assert not run.exists()  # refused before anything is written
    arm = ArmSmoke(loss_curve=[2.0, 1.9], skipped_steps=0, seconds=1.0, time_ratio=1.0, optimizer_state_mb=1.0, go_no_go="GO")
    index_id = load_manifest(manifest).dataset_index_id
    NLSmoke(dataset_index_id=index_id, stage="CE", rows=64, epochs=2, seed=1, arms=dict.fromkeys(ARMS, arm)).save(tmp_path/"smoke")
    nb = execute(nl_smoke=str(tmp_path/"smoke"))
    assert NegLConfig.load(run).uncertainty_gate.by == "label" and "in place of" in (run/"negl_rules.md").read_text()
    assert SmokeTest.load(run).go_no_go == "GO"
    rows = TrainingHistory.load(run).rows
    assert rows[-1]["memory_gamma"] == 0.3 and all(abs(r["train_negl_applied"]/0.2 - 1) <= 0.2 for r in rows)
    assert set(pd.read_csv(run/"negl_applied.csv")["label"]) <= set(CLASSES)
    assert RunArgs.load(run).parameters["optimizer_args"] == {"ramp": 4}
    assert "R²" in json.dumps(nb["cells"], ensure_ascii=False)


def test_the_commands_smoke_and_gate(prepared, tmp_path, capsys):
    manifest, cache = map(str, prepared)
    small = ["--epochs", "1", "--rows", "64", "--batch-size", "16", "--accumulate", "2"]
    given = ["nl", "smoke", "--manifest", manifest, "--cache", cache]
    code = main([*given, "--out", str(tmp_path/"smoke"), "--arms", "AdamW", "NegL", *small])
    smoke = NLSmoke.load(tmp_path/"smoke")
    assert list(smoke.arms) == ["AdamW", "NegL"] and code == int(any(a.reasons for a in smoke.arms.values()))
    assert "AdamW" in capsys.readouterr().out
    assert main([*given, "--out", str(tmp_path/"no"), "--arms", "Foo"]) == 2
    assert "'Foo' is no arm" in capsys.readouterr().err and not (tmp_path/"no").exists()
    plain, good, bad = ([str(simulate_student(tmp_path/f"{n}{s}", {"stage": "KD", "seed": s}, skill)) for s in (1337, 2025, 42)]
                        for n, skill in (("plain", 2.0), ("good", 2.4), ("bad", 1.2)))
    gate = ["nl", "gate", "--baseline", *plain, "--part", "NL", *good]
    assert main([*gate, "--out", str(tmp_path/"gate")]) == 0 and PhaseGate.load(tmp_path/"gate").passed
    assert main([*gate, "--part", "NegL", *bad]) == 1 and "shut" in capsys.readouterr().out
    assert main([*gate, "--part", "NL", *bad]) == 2 and "given twice" in capsys.readouterr().err
    assert main(["nl", "gate", "--baseline", plain[0], "--part", "NL", good[0]]) == 1
    assert "share 1 seeds" in capsys.readouterr().err


def test_a_full_run_asks_for_what_the_plan_asks(tmp_path):
    assert require_arm("adamw", {}, "DKD", "any") == require_arm("sgd", {}, "KD", "any") == ""
    arm = ArmSmoke(loss_curve=[2.0, 1.9], skipped_steps=0, seconds=1.0, time_ratio=1.0, optimizer_state_mb=1.0, go_no_go="GO")
    NLSmoke(dataset_index_id="a-1", stage="KD", rows=64, epochs=2, seed=1, arms=dict.fromkeys(ARMS, arm)).save(tmp_path)
    assert require_arm("multi_frequency", {}, "DKD", "a-1", tmp_path) == "MultiFrequency"
    assert require_arm("deep_momentum", {"weight": 2}, "KD", "a-1", tmp_path) == "DeepMomentum+NegL"  # not with DKD: no phase gate yet
    with pytest.raises(GateError, match="parts judged alone"): require_arm("deep_momentum", {"weight": 2}, "DKD", "a-1", tmp_path)
    good = [simulate_student(tmp_path/f"{n}{s}", {"stage": "KD", "seed": s}, k) for n, k in (("a", 2.0), ("b", 2.4)) for s in (1, 2, 3)]
    gate = phase_gate(good[:3], {"NL": good[3:], "NegL": good[3:]}, tmp_path)
    with pytest.raises(GateError, match="judged on"): require_arm("deep_momentum", {"weight": 2}, "DKD", "a-1", tmp_path, tmp_path)
    NLSmoke(dataset_index_id=gate.dataset_index_id, stage="KD", rows=9, epochs=2, seed=1, arms=dict.fromkeys(ARMS, arm)).save(tmp_path)
    assert require_arm("deep_momentum", {"weight": 2}, "DKD", gate.dataset_index_id, tmp_path, tmp_path) == "DeepMomentum+NegL"
