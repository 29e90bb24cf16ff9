"""Ensembles: every way to be refused, fusion against longhand, the search, replay, and what a killed export leaves."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fer_nb import ensemble_plots, ensembles, weights
from fer_nb.artifacts import CLASSES, ArtifactError, GateError, UsageError, read_json, sha256_bytes, write_json
from fer_nb.calibration import macro_f1, nll, softmax
from fer_nb.evidence import EnsembleConfig, EnsembleGate, EnsembleMetrics
from fer_nb.integrity import VIEWS, Softlabels, check_alignment, load_softlabels, save_softlabels
from fer_nb.leaves import check_seal, seal_folder
from fer_nb.manifests import COLUMNS, dataset_index, freeze_manifest, labels_of, load_manifest
from fer_nb.members import SPACES, benchmark_rows, check_members, fuse, log_probs, member_names, require_members
from fer_nb.records import Calibration, ClassOrder, ManifestValidation, RunArgs
from fer_nb.resampling import paired_interval
from fer_nb.run_report import calibrate, report_run
from fer_nb.runs import chain_config, complete_profile, load_profile, project_root

ARCHS = ("RN18", "B3", "CNXT", "VIT")
PARTS = {"train": 70, "val": 210, "test": 210}


def make_rows(seed: int = 0) -> pd.DataFrame:
    rng, rows = np.random.default_rng(seed), []
    for split, n in PARTS.items():
        for i in range(n):
            key = f"{split}{i}"
            label = CLASSES[int(rng.choice(7, p=[.2, .05, .15, .2, .15, .1, .15]))]
            rows.append(dict(id=f"demo/{key}.png", path=f"{key}.png", label=label, split=split, source="studio" if i % 3 else "wild",
                             convention="demo", usage=split,
                             sha256=sha256_bytes(key.encode()), pixel_hash=sha256_bytes(b"p" + key.encode())[:16],
                             perceptual_hash="0"*16, group=f"g{key}", width=48, height=48, excluded="", votes=None, box=None,
                             confidence=None))
    return pd.DataFrame(rows)[list(COLUMNS)]


def freeze(df: pd.DataFrame, folder: Path):
    manifest = freeze_manifest(df, folder, dataset_index(df, "demo", 1, 0.1, 4))
    ManifestValidation(dataset_index_id=manifest.dataset_index_id, rows=len(df), excluded_rows=0, checked_rows=len(df), missing=0,
                       undecodable=0, bad_labels=0, changed=0, passed=True).save(folder)
    return load_manifest(folder, valid=True)


def make_member(folder: Path, arch: str, manifest, seed: int, source: str | None = None):
    "A run whose logits are right about two times in three, ten times too loud."
    rows = pd.concat(manifest.splits(source=source).values(), ignore_index=True)
    y, rng = labels_of(rows), np.random.default_rng(seed)
    shared = np.random.default_rng(99).normal(0, 1.0, (len(y), 1, 7))
    z = 10*(2.2*np.eye(7)[y][:, None] + shared + rng.normal(0, 1.2, (len(y), 2, 7)))
    z = z.astype(np.float32)
    val, test = (rows["split"].to_numpy() == s for s in ("val", "test"))
    index_id = manifest.dataset_index_id
    calibration, _ = calibrate(z[val, 0], y[val], z[test, 0], y[test], model_name=arch, dataset_index_id=index_id, resamples=20)
    RunArgs(stage="teacher", parameters={"arch": arch, "seed": 7, "train_view": "hq_train", "train_source": source or ""}).save(folder)
    ClassOrder().save(folder, "classes.json")
    calibration.save(folder)
    save_softlabels(folder/"softlabels", Softlabels(rows["id"].to_numpy(str), rows["sha256"].to_numpy(str), z, VIEWS,
                                                    calibration.selected_temperature, 30.0, index_id, rows["split"].to_numpy(str)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A manifest, four members, and a finished ensemble of three of them."
    root = tmp_path_factory.mktemp("ensembles")
    manifest = freeze(make_rows(), root/"manifests")
    for i, arch in enumerate(ARCHS): make_member(root/"teachers"/f"{arch}_seed7_stageA_img48", arch, manifest, i)
    out = root/"ensembles"/"trio"
    config = ensembles.search_ensemble(members_of(root)[:3], manifest, out)
    ensembles.export_ensemble(out, manifest)
    ensembles.evaluate_ensemble(out, manifest, resamples=50)
    assert config.name == "trio"
    return root


def members_of(root: Path): return [root/"teachers"/f"{a}_seed7_stageA_img48" for a in ARCHS]


@pytest.fixture
def world(base, tmp_path):
    "A copy of everything, to be broken."
    shutil.copytree(base, tmp_path/"w")
    return tmp_path/"w"


# --- the gate ---

def resave(member: Path, **changes): save_softlabels(member/"softlabels", replace(load_softlabels(member/"softlabels"), **changes))


def edit(model, member: Path, **changes): model.load(member).model_copy(update=changes).save(member)


def drop_last(m):
    s = load_softlabels(m/"softlabels")
    resave(m, ids=s.ids[:-1], sha256=s.sha256[:-1], logits=s.logits[:-1], splits=s.splits[:-1])


def add_row(m):
    s = load_softlabels(m/"softlabels")
    resave(m, ids=np.append(s.ids, "demo/new.png"), sha256=np.append(s.sha256, "0"*64), logits=np.append(s.logits, s.logits[:1], 0),
           splits=np.append(s.splits, "train"))


def swap_splits(m):
    s = load_softlabels(m/"softlabels")
    splits = s.splits.copy()
    i, j = np.flatnonzero(splits == "val")[0], np.flatnonzero(splits == "test")[0]
    splits[i], splits[j] = "test", "val"
    resave(m, splits=splits)


def foreign_bytes(m): resave(m, sha256=np.array(["f"*64, *load_softlabels(m/"softlabels").sha256[1:]]))
def flip_a_byte(m):
    path = m/"softlabels"/"softlabels.npz"
    data = bytearray(path.read_bytes()); data[len(data)//2] ^= 1
    path.write_bytes(bytes(data))


def one_view(m):
    s = load_softlabels(m/"softlabels")
    resave(m, logits=s.logits[:, :1], views=s.views[:1])


FAULTS = {
    "seal missing": (lambda m: (m/"softlabels"/"hash_manifest.json").unlink(), "unfinished", "sample_count_match"),
    "softlabels missing": (lambda m: shutil.rmtree(m/"softlabels"), "is missing", "class_order_match"),
    "seal broken": (flip_a_byte, "was changed after its folder was sealed", "sample_content_match"),
    "npz truncated": (lambda m: (m/"softlabels"/"softlabels.npz").write_bytes(b"PK"), "was changed", "sample_content_match"),
    "class order": (lambda m: write_json(m/"softlabels"/"class_order.json", {"classes": sorted(CLASSES)}), "class order",
                    "class_order_match"),
    "classes.json": (lambda m: write_json(m/"classes.json", {"classes": sorted(CLASSES)}), "class order", None),
    "another dataset": (lambda m: resave(m, dataset_index_id="other-0"), "made for dataset other-0", "index_id_match"),
    "a row too few": (drop_last, "softlabels hold 209 rows, the dataset has 210", "sample_count_match"),
    "a row too many": (add_row, "softlabels hold 71 rows, the dataset has 70", "sample_count_match"),
    "other bytes": (foreign_bytes, "other image bytes in 1 rows, first 'demo/train0.png'", "sample_content_match"),
    "splits swapped": (swap_splits, "val: no softlabel for 1 rows", "sample_content_match"),
    "other views": (lambda m: resave(m, views=("identity", "rotated")), "views identity, rotated are not identity, hflip", "views_match"),
    "one view": (one_view, "views identity are not identity, hflip", "views_match"),
    "no calibration": (lambda m: (m/"calibration.json").unlink(), "not calibrated: ", "calibrated"),
    "broken calibration": (lambda m: (m/"calibration.json").write_text("{"), "not calibrated: ", "calibrated"),
    "at the grid's bound": (lambda m: edit(Calibration, m, at_grid_bound=True), "stands at the bound of the grid", "calibrated"),
    "another temperature": (lambda m: edit(Calibration, m, selected_temperature=3.0), "calibration.json says T = 3", "calibrated"),
    "calibrated elsewhere": (lambda m: edit(Calibration, m, dataset_index_id="other-0"), "calibrated on dataset other-0", "calibrated"),
    "no args": (lambda m: (m/"args.json").unlink(), "args.json: is missing", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_names_the_member_and_the_reason(world, fault):
    tamper, reason, key = FAULTS[fault]
    members, out = members_of(world)[:3], world/"ensembles"/"trio"
    tamper(members[1])
    gate = check_members(members, world/"manifests", out)
    assert [c.passed for c in gate.members] == [True, False, True] and not gate.passed
    bad = gate.members[1]
    assert any(reason in r for r in bad.reasons), bad.reasons
    if key: assert getattr(bad, key) is False
    with pytest.raises(GateError) as e: require_members(gate)
    assert "B3_seed7_stageA_img48" in str(e.value) and reason in str(e.value)
    assert "RN18" not in str(e.value) and "CNXT" not in str(e.value)
    assert EnsembleGate.load(out) == gate  # written although it refuses ...
    with pytest.raises(ArtifactError, match="unfinished"): check_seal(out)  # ... and the earlier ensemble no longer passes
    with pytest.raises(ArtifactError, match="unfinished"): load_softlabels(out/"softlabels")


def test_a_refused_search_leaves_the_verdict_and_nothing_else(world):
    members, out = members_of(world)[:3], world/"ensembles"/"trio"
    drop_last(members[2])
    with pytest.raises(GateError, match="CNXT"): ensembles.search_ensemble(members, world/"manifests", out)
    assert sorted(p.name for p in out.iterdir() if p.is_file()) == ["ensemble_alignment_gate.json"]
    with pytest.raises(ArtifactError, match="ensemble_config.json"): ensembles.export_ensemble(out, world/"manifests")
    assert read_json(out/"ensemble_alignment_gate.json")["members"][2]["pass"] is False


def test_every_member_may_be_bad_and_nothing_raises(world):
    members = members_of(world)
    for m in members: shutil.rmtree(m/"softlabels")
    gate = check_members(members, world/"manifests")
    assert not any(c.passed for c in gate.members)
    with pytest.raises(GateError, match="4 of 4 members are refused"): require_members(gate)


def test_rows_in_another_order_are_joined_by_id(world):
    out, manifest = world/"ensembles"/"trio", load_manifest(world/"manifests")
    before, m = ensembles.replay(out), members_of(world)[1]
    s = load_softlabels(m/"softlabels")
    order = np.random.default_rng(0).permutation(len(s.ids))
    resave(m, ids=s.ids[order], sha256=s.sha256[order], logits=s.logits[order], splits=s.splits[order])
    config = ensembles.search_ensemble(members_of(world)[:3], manifest, out)
    assert config.ties == 1
    assert np.array_equal(ensembles.replay(out).logits, before.logits) and config.n == sum(PARTS.values())


def test_members_of_one_source_are_weighed_on_that_source_and_reported_on_all(base, tmp_path):
    manifest = load_manifest(base/"manifests")
    for i, arch in enumerate(ARCHS[:2]): make_member(tmp_path/arch, arch, manifest, i, source="wild")
    config = ensembles.search_ensemble([tmp_path/"RN18", tmp_path/"B3"], manifest, tmp_path/"out")
    assert (config.train_source, config.benchmark.n, config.benchmark.report_n) == ("wild", 70, 210)
    assert ensembles.export_ensemble(tmp_path/"out", manifest).rows == {"train": 24, "val": 70, "test": 210}
    metrics = ensembles.evaluate_ensemble(tmp_path/"out", manifest, resamples=20)
    assert set(metrics.ensemble.by_source) == {"studio", "wild"}
    with pytest.raises(GateError, match="B3_seed7_stageA_img48.*train: softlabels hold 70 rows, the dataset has 24"):
        ensembles.search_ensemble([tmp_path/"RN18", members_of(base)[1]], manifest, tmp_path/"out")  # one of all sources does not fit


def test_wrong_arguments_are_usage_errors(world):
    members, manifest, out = members_of(world), world/"manifests", world/"ensembles"/"new"
    def search(*a, **k): return ensembles.search_ensemble(*a, **k)
    with pytest.raises(UsageError, match="at least two"): search(members[:1], manifest, out)
    with pytest.raises(UsageError, match="given twice"): search([members[0], members[0]], manifest, out)
    with pytest.raises(UsageError, match="is no folder"): search([members[0], world/"nowhere"], manifest, out)
    with pytest.raises(UsageError, match="is a run of its own"): search(members, manifest, members[0])
    with pytest.raises(UsageError, match="space 'rank'"): search(members, manifest, out, space="rank")
    for ties in (-1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=f"ties {ties}: give standard errors"): search(members, manifest, out, ties=ties)
    with pytest.raises(UsageError, match="unknown preset 'six_way'"): search(members, manifest, out, preset="six_way")
    with pytest.raises(UsageError, match="unknown view"): search(members, manifest, out, benchmark="nowhere")
    assert (members[0]/"softlabels"/"hash_manifest.json").is_file()
    (manifest/"manifest_validation.json").unlink()
    with pytest.raises(ArtifactError, match="manifest_validation.json"): search(members, manifest, out)


# --- presets ---

@pytest.mark.parametrize(("preset", "weights"), [("pairwise", [.7, .3]), ("three_way", [.4, .4, .2]), ("four_way", [.25]*4)])
def test_presets_find_their_members_by_arch(base, tmp_path, preset, weights):
    config = ensembles.search_ensemble(members_of(base)[::-1], base/"manifests", tmp_path/preset, preset=preset)
    assert [m.arch for m in config.members] == list(ARCHS[:len(weights)])
    assert [m.weights for m in config.members] == [[w]*7 for w in weights]
    assert config.preset == preset and config.ties is None and not (tmp_path/preset/"ensemble_search.csv").exists()
    assert set(config.benchmark.member_macro_f1) == set(ARCHS[:len(weights)])


def test_a_preset_refuses_missing_and_double_architectures(world):
    members, manifest = members_of(world), world/"manifests"
    with pytest.raises(UsageError, match="needs a run of VIT"):
        ensembles.search_ensemble(members[:3], manifest, world/"x", preset="four_way")
    second = Path(shutil.copytree(members[0], world/"teachers"/"RN18_seed8"))
    with pytest.raises(UsageError, match="one run of RN18, and 2 are given"):
        ensembles.search_ensemble([*members, second], manifest, world/"x", preset="pairwise")
    assert member_names([members[0], second, members[1]]) == ["RN18_seed7_stageA_img48", "RN18_seed8", "B3"]


# --- fusion ---

def longhand(logits, temperatures, weights, space):
    "Fusion in plain Python floats: logits (M, K) of one row -> probabilities (K,)."
    log_p = []
    for z, t in zip(logits, temperatures):
        total = math.fsum(math.exp(v/t - max(z)/t) for v in z)
        log_p.append([v/t - max(z)/t - math.log(total) for v in z])
    k = range(len(log_p[0]))
    if space == "logit": raw = [math.exp(sum(weights[m][c]*log_p[m][c] for m in range(len(log_p)))) for c in k]
    else: raw = [sum(weights[m][c]*math.exp(log_p[m][c]) for m in range(len(log_p))) for c in k]
    return [v/math.fsum(raw) for v in raw]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("class_aware", [False, True])
def test_fusion_equals_longhand(space, class_aware):
    rng = np.random.default_rng(3)
    z, t = rng.normal(0, 6, (3, 20, 7)), np.array([0.7, 3.0, 6.0])
    w = rng.dirichlet([1, 1, 1], 7).T if class_aware else rng.dirichlet([1, 1, 1])
    fused = softmax(fuse([log_probs(a, b) for a, b in zip(z, t)], w, space))
    wk = w if class_aware else np.repeat(w[:, None], 7, 1)
    np.testing.assert_allclose(fused, [longhand(z[:, i], t, wk, space) for i in range(20)], rtol=1e-10)


def draw(seed: int, m: int, class_aware: bool):
    rng = np.random.default_rng(seed)
    w = rng.dirichlet(np.ones(m), 7).T if class_aware else rng.dirichlet(np.ones(m))
    return rng.normal(0, rng.uniform(0.1, 20), (m, 4, 2, 7)), rng.uniform(0.3, 8, m), w


cases = given(seed=st.integers(0, 2**32 - 1), m=st.integers(2, 5), space=st.sampled_from(SPACES), class_aware=st.booleans())


def calibrated(z, t): return np.stack([log_probs(a, b) for a, b in zip(z, t)])


@settings(max_examples=60)
@cases
def test_the_order_of_members_does_not_matter(seed, m, space, class_aware):
    z, t, w = draw(seed, m, class_aware)
    p, order = calibrated(z, t), np.random.default_rng(seed).permutation(m)
    np.testing.assert_allclose(fuse(p[order], w[order], space), fuse(p, w, space), atol=1e-9)


@settings(max_examples=60)
@cases
def test_a_constant_on_a_members_row_changes_nothing(seed, m, space, class_aware):
    z, t, w = draw(seed, m, class_aware)
    shifted = z + np.random.default_rng(seed).normal(0, 50, (m, 4, 2, 1))
    np.testing.assert_allclose(fuse(calibrated(shifted, t), w, space), fuse(calibrated(z, t), w, space), atol=1e-8)


@settings(max_examples=60)
@cases
def test_one_hot_weights_give_the_member_back(seed, m, space, class_aware):
    z, t, _ = draw(seed, m, False)
    p, one = calibrated(z, t), seed % m
    w = np.eye(m)[one] if not class_aware else np.repeat(np.eye(m)[one][:, None], 7, 1)
    fused = fuse(p, w, space)
    assert np.array_equal(fused, p[one]) if not class_aware else np.allclose(fused, p[one], atol=1e-12)


def test_calibration_comes_before_the_weights():
    "A member ten times as loud, calibrated by ten, counts no more than before."
    z = np.random.default_rng(0).normal(0, 2, (2, 50, 7))
    loud, plain = calibrated([z[0]*10, z[1]], [10, 1]), calibrated(z, [1, 1])
    np.testing.assert_allclose(fuse(loud, [.5, .5]), fuse(plain, [.5, .5]), atol=1e-12)


# --- the search ---

def noisy_members(n, sigmas, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 7, n)
    return np.stack([log_probs(2*np.eye(7)[y] + rng.normal(0, s, (n, 7))) for s in sigmas]), y


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), space=st.sampled_from(SPACES), m=st.integers(2, 4))
def test_the_search_never_ends_below_a_member(seed, space, m):
    p, y = noisy_members(80, np.random.default_rng(seed).uniform(0.5, 3, m), seed)
    found = weights.search_weights(p, y, space, step=0.25)
    assert found.macro_f1 >= max(macro_f1(q, y) for q in p) - 1e-12
    assert found.macro_f1 == pytest.approx(macro_f1(fuse(p, found.weights, space), y), abs=1e-12)
    assert found.nll == pytest.approx(nll(fuse(p, found.weights, space), y), abs=1e-9)
    assert found.macro_f1 >= found.table.macro_f1.max() - 1e-12
    assert abs(found.weights.sum() - 1) < 1e-9 and (found.weights >= 0).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ties_within_a_standard_error_go_to_nll(seed):
    p, y = noisy_members(600, (2.0, 2.2, 3.5), seed)
    bare, tied = (weights.search_weights(p, y, ties=t) for t in (0.0, 1.0))
    error = weights.macro_f1_error(fuse(p, bare.weights), y)
    assert 0.005 < error < 0.05
    assert tied.nll <= bare.nll + 1e-12 and tied.macro_f1 >= bare.macro_f1 - error - 1e-9
    within = tied.table[tied.table["macro_f1"] >= bare.macro_f1 - error - 1e-12]
    assert tied.nll <= within["nll"].min() + 1e-12  # of all that was tried, none in reach knows more
    assert tied.macro_f1 == pytest.approx(macro_f1(fuse(p, tied.weights), y))
    assert weights.search_weights(p[:1], y, ties=1.0).weights.tolist() == [1.0]


def test_the_search_finds_a_planted_optimum():
    "Member 2 is the truth plus noise, member 3 the same noise with the other sign: only their equal mixture is clean; member 1 is noise."
    rng = np.random.default_rng(0)
    y = rng.integers(0, 7, 700)
    noise = rng.normal(0, 5, (700, 7))
    truth = 2.0*np.eye(7)[y]
    p = np.stack([log_probs(z) for z in (rng.normal(0, 5, (700, 7)), truth + noise, truth - noise)])
    found = weights.search_weights(p, y, names=["noise", "plus", "minus"])
    assert found.macro_f1 == 1.0
    np.testing.assert_allclose(found.weights, [0, 0.5, 0.5], atol=0.03)


def test_the_refinement_finds_an_optimum_between_the_grids_points():
    "The noise cancels at 0.31 only, and the grid has 0.25 and 0.5."
    rng = np.random.default_rng(0)
    y = rng.integers(0, 7, 700)
    noise, truth = rng.normal(0, 40, (700, 7)), 2.0*np.eye(7)[y]
    p = np.stack([log_probs(z) for z in (truth + 0.69*noise, truth - 0.31*noise)])
    found = weights.search_weights(p, y, step=0.25)
    assert found.table[found.table.phase == "grid"].macro_f1.max() < 0.9 < found.macro_f1
    np.testing.assert_allclose(found.weights, [0.31, 0.69], atol=0.01)


@pytest.mark.parametrize("space", SPACES)
def test_class_scores_are_those_of_whole_weights(space):
    p, y = noisy_members(120, (1, 2, 3))
    w = np.random.default_rng(0).dirichlet([1, 1, 1], 7).T
    for c in range(7):
        tried = weights.transfers(w, 0.1, c)
        assert ((tried != w).any((0, 1)) == (np.arange(7) == c)).all()
        for quick, slow in zip(weights.class_weighted_scores(p, y, tried, c, space), weights.score_weights(p, y, tried, space)):
            np.testing.assert_allclose(quick, slow, atol=1e-10)


def test_the_refinement_leaves_the_grid():
    p, y = noisy_members(300, (1.5, 1.2, 1.9), seed=4)
    grid, fine = (weights.search_weights(p, y, step=0.5, refine=r) for r in (False, True))
    assert (fine.macro_f1, -fine.nll) >= (grid.macro_f1, -grid.nll) and set(fine.table.phase) == {"grid", "refine"}
    assert fine.macro_f1 > grid.macro_f1


def test_ties_go_to_the_lower_nll():
    "Two members that predict alike: macro-F1 is the same for all weights, and NLL must decide."
    y = np.array([0, 1, 2, 3, 4, 5, 6]*10)
    p = np.stack([log_probs(c*np.eye(7)[y]) for c in (0.5, 6.0)])
    found = weights.search_weights(p, y)
    assert set(found.table.macro_f1) == {1.0}
    assert found.weights.tolist() == [0.0, 1.0] and found.best_member == "1"
    assert found.nll == pytest.approx(found.table.nll.min())


def test_scores_are_the_metrics_of_calibration():
    p, y = noisy_members(200, (1, 2, 3))
    w = weights.simplex_grid(3, 0.25)
    for space in SPACES:
        f1, loss = weights.score_weights(p, y, w, space)
        fused = [fuse(p, x, space) for x in w]
        np.testing.assert_allclose(f1, [macro_f1(z, y) for z in fused], atol=1e-12)
        np.testing.assert_allclose(loss, [nll(z, y) for z in fused], atol=1e-10)


def test_class_weights_are_accepted_for_specialists_and_refused_for_noise():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 7, 1400)
    def specialist(good):
        return log_probs(2.5*np.eye(7)[y] + rng.normal(0, 1, (1400, 7))*np.where(np.isin(np.arange(7), good), 0.5, 3.5))
    p = np.stack([specialist([0, 1, 2]), specialist([3, 4, 5, 6])])
    scalar = weights.search_weights(p, y, step=0.1)
    found = weights.search_class_weights(p, y, scalar.weights, folds=3, step=0.1, resamples=200)
    assert found.report.accepted and found.report.cv_macro_f1_class > found.report.cv_macro_f1_scalar + 0.02
    assert (found.weights[0, :3] > 0.5).all() and (found.weights[1, 3:] > 0.5).all()
    np.testing.assert_allclose(found.weights.sum(0), 1, atol=1e-9)
    p, y = noisy_members(150, (1.5, 1.5), seed=2)
    scalar = weights.search_weights(p, y)
    refused = weights.search_class_weights(p, y, scalar.weights, folds=3, resamples=200)
    assert not refused.report.accepted and (refused.weights == scalar.weights[:, None]).all()
    assert refused.report.macro_f1_class >= refused.report.macro_f1_scalar  # the fit looks better, and is not believed


def test_a_class_aware_ensemble_replays_and_reports(base, tmp_path, monkeypatch):
    "Whole path with vectors: the acceptance is set, the rest is real."
    real = weights.search_class_weights
    def accepted(*a, **k):
        r = real(*a, **k)
        return replace(r, weights=r.fitted, report=r.report.model_copy(update={"accepted": True}))
    monkeypatch.setattr(ensembles, "search_class_weights", accepted)
    config = ensembles.search_ensemble(members_of(base)[:2], base/"manifests", tmp_path/"c", class_aware=True, folds=3, resamples=50)
    assert config.class_aware and len({w for m in config.members for w in m.weights}) > 2
    ensembles.export_ensemble(tmp_path/"c", base/"manifests")
    assert np.array_equal(ensembles.replay(tmp_path/"c").logits, load_softlabels(tmp_path/"c"/"softlabels").logits)
    ensembles.evaluate_ensemble(tmp_path/"c", base/"manifests", resamples=20)
    assert "one weight a class accepted" in str(EnsembleConfig.load(tmp_path/"c"))


def test_a_profile_asks_for_one_weight_a_class(tmp_path):
    "The entry passes the profile's parser, and reaches the notebook of its ensemble alone."
    config = chain_config(load_profile("full"))
    assert config["ensembles"]["by_class"] == {"class_aware": True, "members": list(config["teachers"])}
    (tmp_path/"profile.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    made = [f"ensembles/{e}/ensemble_config.json" for e in ("by_class", "searched")]
    done = subprocess.run([sys.executable, "-m", "snakemake", *made, "--snakefile", str(project_root()/"workflow"/"Snakefile"),
                           "--directory", str(tmp_path), "--configfile", str(tmp_path/"profile.yaml"), "--cores", "1", "--dry-run",
                           "--printshellcmds"], capture_output=True, text=True)
    commands = re.findall(r"notebook 04_ensembles .*--parameters '(\{.*\})'", done.stdout + done.stderr)
    asked = {p["name"]: p.get("class_aware", False) for p in map(json.loads, commands)}
    assert asked == {"by_class": True, "searched": False}, done.stderr
    with pytest.raises(UsageError, match="04_ensembles has no parameter 'by_class'"):
        complete_profile({"ensembles": {"mine": {"by_class": True}}}, "my.yaml")


# --- the benchmark ---

@pytest.mark.parametrize("view", ["test", "test_all_sources", "eval_only", "all", "hq_train", "train_all"])
def test_a_benchmark_with_test_or_training_rows_is_refused(base, tmp_path, view):
    with pytest.raises(GateError, match=f"benchmark '{view}' holds (test|training) rows"):
        ensembles.search_ensemble(members_of(base), base/"manifests", tmp_path/"x", benchmark=view)
    assert not (tmp_path/"x"/"ensemble_config.json").exists()


def test_a_benchmark_that_shares_a_picture_with_the_report_is_refused(tmp_path):
    df = make_rows()
    df.loc[df.id == "demo/val3.png", "pixel_hash"] = df.loc[df.id == "demo/test9.png", "pixel_hash"].item()
    manifest = freeze(df, tmp_path/"m")
    with pytest.raises(GateError, match="shares 1 pictures with the rows of the report, for instance demo/val3.png"):
        benchmark_rows(manifest)


# --- export, replay, evaluation ---

def test_replay_is_equal_bit_for_bit_and_aligned(base):
    out, manifest = base/"ensembles"/"trio", load_manifest(base/"manifests")
    exported, again = load_softlabels(out/"softlabels"), ensembles.replay(out)
    assert np.array_equal(exported.logits.view(np.uint32), again.logits.view(np.uint32))
    assert (exported.ids == again.ids).all() and exported.temperature == again.temperature and exported.scale == 1
    for split, view in (("train", "hq_train"), ("val", "val"), ("test", "test_all_sources")):
        rows = manifest.view(view)
        ids, sha = rows["id"].to_numpy(str), rows["sha256"].to_numpy(str)
        assert check_alignment(out/"softlabels", ids, sha, manifest.dataset_index_id, split).passed
        assert exported.of(split).ids.tolist() == rows["id"].tolist()
    check_seal(out)


def test_split_targets_give_the_fused_ones(base):
    out = base/"ensembles"/"trio"
    t, fused = ensembles.split_targets(out), load_softlabels(out/"softlabels")
    assert t.names == ["RN18", "B3", "CNXT"] and t.logits.shape == (3, 490, 2, 7) and t.logits.dtype == np.float32
    assert t.weights.shape == (3, 7) and (t.splits == fused.splits).all()
    again = fuse(calibrated(t.logits, t.temperatures), t.weights[:, 0])
    assert np.array_equal(again.astype(np.float32), fused.logits)


def test_a_changed_member_is_named_by_replay(world):
    out, member = world/"ensembles"/"trio", members_of(world)[2]
    s = load_softlabels(member/"softlabels")
    resave(member, logits=s.logits*np.float32(1.0001))
    with pytest.raises(GateError, match=r"member CNXT \(CNXT_seed7_stageA_img48\) has other softlabels"): ensembles.replay(out)
    with pytest.raises(GateError, match="member CNXT"): ensembles.evaluate_ensemble(out, world/"manifests", resamples=20)
    shutil.rmtree(member)
    with pytest.raises(GateError, match="member CNXT .* cannot be read"): ensembles.replay(out)


def test_a_moved_tree_replays(world):
    before = ensembles.replay(world/"ensembles"/"trio")
    moved = world.parent/"elsewhere"
    world.rename(moved)
    assert np.array_equal(ensembles.replay(moved/"ensembles"/"trio").logits, before.logits)


def test_changed_softlabels_or_config_are_not_evaluated(world):
    out = world/"ensembles"/"trio"
    s = load_softlabels(out/"softlabels")
    save_softlabels(out/"softlabels", replace(s, logits=s.logits + np.float32(0.5)*np.eye(7, dtype=np.float32)[0]))
    with pytest.raises(GateError, match="not what ensemble_config.json gives"):
        ensembles.evaluate_ensemble(out, world/"manifests", resamples=20)
    with pytest.raises(ArtifactError, match="unfinished"): ensembles.split_targets(out)


def test_the_report_is_on_test_rows_and_paired(base):
    out, manifest = base/"ensembles"/"trio", load_manifest(base/"manifests")
    m, rows = EnsembleMetrics.load(out), manifest.view("test_all_sources")
    y, s = labels_of(rows), load_softlabels(out/"softlabels")
    fused = s.logits[s.rows(rows["id"]), 0]
    assert m.n == m.ensemble.n == 210 and m.ensemble.macro_f1.value == pytest.approx(macro_f1(fused, y))
    assert m.ensemble.nll.value == pytest.approx(nll(fused, y, s.temperature))
    assert sum(v["n"] for v in m.ensemble.by_source.values()) == 210 and set(m.ensemble.by_source) == {"studio", "wild"}
    best = m.gain("macro_f1")
    assert best.over == m.benchmark.best_member == max(m.benchmark.member_macro_f1, key=m.benchmark.member_macro_f1.get)
    z = load_softlabels(members_of(base)[ARCHS.index(best.over)]/"softlabels")
    assert best.gain == paired_interval(macro_f1, z.logits[z.rows(rows["id"]), 0], fused, y, resamples=50, seed=1337)
    strict = m.gain("accuracy", "test_all_sources")
    assert strict.gain.value == pytest.approx(m.ensemble.accuracy.value - max(x.accuracy.value for x in m.members))
    e = np.load(out/"evaluation.npz")
    assert set(e["val_ids"]).isdisjoint(e["test_ids"]) and e["test_logits"].shape == (210, 7)
    assert m.ensemble.accuracy.value > max(x.accuracy.value for x in m.members)  # these members err independently
    for told in (m, EnsembleConfig.load(out), EnsembleGate.load(out)): assert "|" in told._repr_markdown_() and len(str(told)) > 100


def test_gains_are_over_the_members_best_on_each_set_of_rows(base):
    "A member that the benchmark preferred, and another that happens to lead on the report's rows."
    m = EnsembleMetrics.load(base/"ensembles"/"trio")
    y = np.arange(70) % 7
    right = {"RN18": 60, "B3": 40, "CNXT": 20}  # rows that each gets right on the report's rows
    z = {k: np.eye(7)[np.where(np.arange(70) < n, y, (y + 1) % 7)] for k, n in right.items()}
    bench = m.benchmark.model_copy(update={"best_member": "B3"})
    told = {(g.metric, g.chosen_on): g for g in ensembles.gains(np.eye(7)[y], z, y, bench, 20, 1)}
    assert [told["accuracy", k].over for k in ("val", "test_all_sources")] == ["B3", "RN18"]
    assert told["accuracy", "val"].gain.value == pytest.approx(30/70)
    assert told["accuracy", "test_all_sources"].gain.value == pytest.approx(10/70)


def test_gains_are_told_source_by_source_and_by_whose_labels(base):
    "A gain by the labels that were learned, a loss by others'; only the first is the ensemble's own, both are in the file."
    m = EnsembleMetrics.load(base/"ensembles"/"trio")
    y, bench = np.arange(140) % 7, m.benchmark.model_copy(update={"best_member": "B3"})
    own, shifted = np.arange(140) < 70, (y + 1) % 7
    rows = pd.DataFrame({"id": [f"x/{i}" for i in range(140)], "label": np.array(CLASSES)[np.where(own, y, shifted)],
                         "source": np.where(own, "ours", "theirs"), "convention": np.where(own, "ours", "theirs"),
                         "group": [f"g{i % 70}" for i in range(140)]})
    said = {"RN18": np.eye(7)[np.where(np.arange(140) % 70 < 40, y, shifted)], "B3": np.eye(7)[shifted]}
    found = ensembles.gains_by_source(np.eye(7)[y], said, rows, "ours", bench, 50, 1)
    told = {(g.source, g.metric, g.chosen_on): g for g in found}
    assert {(g.source, g.convention, g.n, g.pictures) for g in found} == {("all", "ours", 70, 70), ("ours", "ours", 70, 70),
                                                                        ("theirs", "theirs", 70, 70)}
    assert told["all", "accuracy", "val"].gain == told["ours", "accuracy", "val"].gain and told["all", "accuracy", "val"].gain.value == 1
    assert told["theirs", "accuracy", "val"].gain.value == -1  # its labels call the ensemble wrong everywhere
    assert [told[s, "accuracy", "test_all_sources"].over for s in ("ours", "theirs")] == ["RN18", "B3"]


def test_gains_draw_pictures(base):
    "The same rows written down twice: the interval stays, where rows would make it narrower."
    m, rng = EnsembleMetrics.load(base/"ensembles"/"trio"), np.random.default_rng(0)
    y = np.arange(200) % 7
    z = {k: np.eye(7)[np.where(rng.random(200) < p, y, (y + 1) % 7)] for k, p in (("RN18", .7), ("B3", .6))}
    fused, bench = np.eye(7)[np.where(rng.random(200) < .75, y, (y + 1) % 7)], m.benchmark.model_copy(update={"best_member": "B3"})
    once = ensembles.gains(fused, z, y, bench, 200, 1)
    again = ensembles.gains(np.tile(fused, (2, 1)), {k: np.tile(v, (2, 1)) for k, v in z.items()}, np.tile(y, 2), bench, 200, 1,
                            np.tile(np.arange(200), 2))
    assert [(g.over, g.gain.low, g.gain.high, g.pictures) for g in again] == [
        (g.over, pytest.approx(g.gain.low, abs=1e-12), pytest.approx(g.gain.high, abs=1e-12), 200) for g in once]


def finish_member(run: Path, manifest):
    "Give a member what a training run leaves: its report and its seal."
    z, rows = load_softlabels(run/"softlabels"), manifest.splits()
    val, test = rows["val"], rows["test"]
    report_run(run, z.logits[z.rows(val["id"]), 0], val, z.logits[z.rows(test["id"]), 0], test, convention="demo", model_name=run.name,
               dataset_index_id=manifest.dataset_index_id, resamples=20)
    (run/"best.pt").write_bytes(b"weights")
    seal_folder(run, manifest.dataset_index_id)


def test_a_folder_counted_again_gives_what_it_had(world):
    "Runs and ensembles of today are counted again to the same numbers; a member that was changed or is gone is named."
    manifest, out = load_manifest(world/"manifests"), world/"ensembles"/"trio"
    for run in members_of(world)[:3]: finish_member(run, manifest)
    before = EnsembleMetrics.load(out)
    done = ensembles.recount(world, world/"manifests")
    assert sorted(done["folder"]) == sorted(["ensembles/trio"]*2 + [f"teachers/{r.name}" for r in members_of(world)[:3]])
    after = EnsembleMetrics.load(out)
    assert after.gains == before.gains and after.ensemble == before.ensemble and after.members == before.members
    assert "by convention and picture" in after.recomputed and check_seal(out).rewritten.keys() >= {"ensemble_metrics.json"}
    run = members_of(world)[0]
    (run/"history.csv").write_text("epoch"); seal_folder(run, manifest.dataset_index_id); (run/"history.csv").write_text("changed")
    with pytest.raises(ArtifactError, match="was changed"): ensembles.recount_ensemble(out, manifest)
    shutil.rmtree(run)
    with pytest.raises(GateError, match="member RN18 .* is not there"): ensembles.recount_ensemble(out, manifest)


def killed_at(rename: int, stage) -> bool:
    "Run a stage in a child that is killed at its n-th rename; False where it came to its end."
    pid = os.fork()
    if pid == 0:
        done, real = [0], os.replace
        def counting(a, b):
            if done[0] == rename: os.kill(os.getpid(), signal.SIGKILL)
            done[0] += 1
            real(a, b)
        os.replace = counting
        try: stage()
        finally: os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("stage", ["search", "export", "evaluate"])
def test_a_killed_stage_leaves_nothing_that_is_accepted(world, stage):
    out, manifest, members = world/"ensembles"/"trio", load_manifest(world/"manifests"), members_of(world)[:3]
    wanted, fused = ensembles.replay(out), (out/"ensemble_metrics.json").read_bytes()
    stages = {"search": lambda: ensembles.search_ensemble(members, manifest, out),
              "export": lambda: ensembles.export_ensemble(out, manifest),
              "evaluate": lambda: ensembles.evaluate_ensemble(out, manifest, resamples=50)}
    kills = 0
    while killed_at(kills, stages[stage]):
        kills += 1
        with pytest.raises(ArtifactError, match="unfinished"): check_seal(out)
        with pytest.raises(ArtifactError, match="unfinished"): ensembles.split_targets(out)
        if stage == "search":
            assert not (out/"ensemble_config.json").exists()
            with pytest.raises(ArtifactError): load_softlabels(out/"softlabels")
        else:
            try: assert np.array_equal(load_softlabels(out/"softlabels").logits, wanted.logits)  # whole ...
            except ArtifactError as e: assert "unfinished" in str(e)  # ... or refused
    assert kills >= 3
    for s in list(stages)[list(stages).index(stage):]: stages[s]()
    check_seal(out)
    assert np.array_equal(load_softlabels(out/"softlabels").logits, wanted.logits) and (out/"ensemble_metrics.json").read_bytes() == fused


def test_the_seal_waits_for_all_stages(base, tmp_path):
    ensembles.search_ensemble(members_of(base)[:2], base/"manifests", tmp_path/"two", preset="pairwise")
    with pytest.raises(GateError, match="is unfinished"): ensembles.seal(tmp_path/"two")
    with pytest.raises(ArtifactError, match="unfinished"): ensembles.evaluate_ensemble(tmp_path/"two", base/"manifests", resamples=20)


def test_pictures_are_drawn_for_two_and_more_members(base):
    m = EnsembleMetrics.load(base/"ensembles"/"trio")
    for plot in (ensemble_plots.class_f1_plot, ensemble_plots.ece_plot, ensemble_plots.correlation_plot, ensemble_plots.source_plot):
        assert "n = 210" in plot(m).axes[0].get_title()
    p, y = noisy_members(60, (1, 1.5, 2, 3, 3))
    for k, fixed in ((2, 0), (3, 0), (5, 2)):
        w = np.full(k, 1/k)
        title = ensemble_plots.simplex_plot(p[:k], y, w, ARCHS[:2] if k == 2 else list("abcde")[:k], step=0.25).axes[0].get_title()
        assert title.count("fixed at") == fixed and "n = 60" in title


def test_the_module_needs_no_deep_learning_library():
    code = "import sys, fer_nb.ensembles; print([m for m in ('torch', 'timm', 'fastai') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
