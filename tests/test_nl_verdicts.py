"""A matrix of NL and NegL: what its runs have in common, what each arm leads by, and verdicts that follow from the files."""
import numpy as np
import pandas as pd
import pytest

from fer_nb.arms import simulate_student
from fer_nb.artifacts import ArtifactError, UsageError, read_npz, write_csv, write_npz
from fer_nb.calibration import accuracy, macro_f1
from fer_nb.negl import NegLConfig
from fer_nb.nl_verdicts import MatrixReport, NLMatrix, applied_within, gather_matrix, lead_interval, matrix_table, read_matrix, yardstick

SEEDS = (1337, 2025, 42)


def finished(folder, arm, skill, seed, applied=(0.2, 0.21), **more):
    "A simulated run with a history."
    run = simulate_student(folder/f"{arm}_seed{seed}", {"stage": "KD", "seed": seed, "epochs": 2, "rows": 300, **more}, skill, n=400)
    columns = {"train_negl_applied": applied} if more.get("negl") else {}
    write_csv(run/"history.csv", pd.DataFrame({"epoch": [0, 1], "train_seconds": 2.0, "skipped_steps": 0, **columns}))
    if more.get("negl"): NegLConfig(**more["negl"]).save(run)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {"AdamW": [finished(folder, "AdamW", 2.0, s) for s in SEEDS],
            "NegL": [finished(folder, "NegL", 2.0, s, negl={"replace_ce": False}) for s in SEEDS],
            "few": [finished(folder, "few", 2.0, s, applied=(0.2, 0.1), negl={"replace_ce": True}) for s in SEEDS],
            "bad": [finished(folder, "bad", 1.2, s, optimizer="deep_momentum") for s in SEEDS]}


@pytest.fixture(scope="module")
def matrix(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("matrix")
    gather_matrix(sum(runs.values(), []), out)
    return out


def test_arms_are_named_by_what_they_change(matrix):
    about = NLMatrix.load(matrix)
    assert sorted({r.arm for r in about.runs}) == ["AdamW", "DeepMomentum", "NegL", "NegL_replace"]
    assert {r.arm: r.share for r in about.runs} == {"AdamW": None, "DeepMomentum": None, "NegL": 0.2, "NegL_replace": 0.2}


def test_the_table_follows_from_the_answers(matrix):
    about, _, z, gate = read_matrix(matrix)
    table = matrix_table(matrix)
    for arm in table.index:
        own = [v.astype(float)/r.temperature for r, v in zip(about.runs, z["logits"]) if r.arm == arm]
        assert table.loc[arm, "macro-F1"].startswith(f"{np.mean([macro_f1(v, z['labels']) for v in own]):.3f}")
    assert table["verdict"].to_dict() == {"AdamW": "baseline"} | {a: v.verdict for a, v in gate.parts.items()}
    assert table.loc["DeepMomentum", "verdict"] == "inferior" and table.loc["DeepMomentum", "than equal runs"] == "more apart"


def test_a_share_that_is_not_kept_is_told(matrix):
    applied = matrix_table(matrix)["applied"]
    assert applied["NegL"].endswith("kept)") and "not kept" not in applied["NegL"] and "not kept" in applied["NegL_replace"]
    assert not applied_within([0.2, 0.26], 0.2) and applied_within([0.16, 0.24], 0.2)


def test_a_lead_is_paired_and_of_pictures():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 7, 300)
    a = np.eye(7)[y] + rng.normal(0, 1, (300, 7))
    b = a + 0.5*np.eye(7)[y]
    one = lead_interval(accuracy, [(a, b)], y)
    assert one.value == pytest.approx(accuracy(b, y) - accuracy(a, y)) and one.low <= one.value <= one.high
    twice = lead_interval(accuracy, [(np.repeat(a, 2, 0), np.repeat(b, 2, 0))], np.repeat(y, 2), np.repeat(np.arange(300), 2))
    assert twice.high - twice.low == pytest.approx(one.high - one.low, rel=0.3)


def test_the_yardstick_is_the_largest_difference_of_equal_runs():
    assert yardstick({1: 0.5, 2: 0.52, 3: 0.47}) == pytest.approx(0.05) and yardstick({1: 0.5}) == 0


def test_two_seeds_get_no_verdict(runs, tmp_path):
    gather_matrix([*runs["AdamW"], *runs["NegL"][:2]], tmp_path)
    assert MatrixReport(tmp_path).table.loc["NegL", "verdict"] == "too few seeds"


def test_runs_of_another_cost_are_refused(runs, tmp_path):
    longer = finished(tmp_path, "longer", 2.0, 7, optimizer="multi_frequency", weight_decay=0.1)
    with pytest.raises(UsageError, match="differ in weight_decay"): gather_matrix([*runs["AdamW"], longer], tmp_path/"out")
    with pytest.raises(UsageError, match="no run is of the baseline"): gather_matrix(runs["NegL"], tmp_path/"out")


def test_answers_of_other_runs_are_refused(matrix, tmp_path):
    for name in ("nl_matrix.json", "nl_matrix_epochs.csv", "nl_matrix_answers.npz", "nl_phase_gate.json"):
        (tmp_path/name).write_bytes((matrix/name).read_bytes())
    z = read_npz(matrix/"nl_matrix_answers.npz", ["logits", "labels"])
    write_npz(tmp_path/"nl_matrix_answers.npz", **z | {"logits": z["logits"][1:]})
    with pytest.raises(ArtifactError, match="other runs"): read_matrix(tmp_path)
