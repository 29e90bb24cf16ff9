"""The study of label noise: labels that are wrong by design, losses that do what they say, and files that nobody can embellish."""
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fer_nb.artifacts import ArtifactError, UsageError, write_csv, write_npz
from fer_nb.negl import NegLConfig, guided_table, negative_rows, uniform_table
from fer_nb.noise import (
    NOISE_ARMS, LabelLoss, NLNLLoss, NoisyBatch, NoisyFaces, SwapLoss, arm_loss, drawn_faces, fit, flip_consistency, flip_labels, nlnl_rows,
    small_loss,
)
from fer_nb.noise_study import (
    NoiseCell, NoiseReport, cell_of, gather_noise, noise_table, noise_verdicts, picture_interval, read_noise, real_faces, run_cell,
    summarise_noise,
)

TRUE = np.random.default_rng(0).integers(0, 7, 4000)


def batch(z, y, done=1.0, wrong=None):
    z, wrong = z.clone().requires_grad_(), torch.zeros(len(y), dtype=torch.bool) if wrong is None else wrong
    return NoisyBatch(z, z.detach().flip(0), y, torch.arange(len(y)), wrong, done)


# ---- wrong labels ----

@settings(max_examples=30)
@given(st.floats(0, 0.9), st.integers(0, 5))
def test_exactly_the_share_is_wrong_and_no_label_is_its_own(rate, seed):
    given_ = flip_labels(TRUE, rate, uniform_table(), seed)
    assert (given_ != TRUE).sum() == round(rate*len(TRUE))
    more = flip_labels(TRUE, min(0.95, rate + 0.05), uniform_table(), seed)
    assert (more[given_ != TRUE] == given_[given_ != TRUE]).all()  # a higher rate adds, and changes nothing


def test_symmetric_noise_takes_every_other_class_alike():
    given_ = flip_labels(TRUE, 0.9, uniform_table(), 1)
    bad = given_ != TRUE
    counts = np.zeros((7, 7)); np.add.at(counts, (TRUE[bad], given_[bad]), 1)
    assert np.abs(counts/counts.sum(1, keepdims=True) - uniform_table()).max() < 0.05


def test_shaped_noise_follows_its_table():
    table = guided_table(np.diag([50]*7) + 3*np.eye(7, k=1).astype(int) + np.eye(7, k=-1).astype(int), top_k=6, min_support=0)
    given_ = flip_labels(TRUE, 0.5, table, 1)
    bad = given_ != TRUE
    assert table[TRUE[bad], given_[bad]].min() > 0  # only what the table allows
    assert np.mean(given_[bad & (TRUE == 3)] == 4) == pytest.approx(0.75, abs=0.06)


def test_seeds_differ_and_repeat():
    a, b, again = (flip_labels(TRUE, 0.4, uniform_table(), s) for s in (1, 2, 1))
    assert (a == again).all() and 0.2 < ((a != TRUE) & (b != TRUE)).mean()/0.4 < 0.6


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_an_impossible_rate_is_refused(rate):
    with pytest.raises(UsageError, match="noise rate"): flip_labels(TRUE, rate, uniform_table(), 0)


# ---- losses ----

def test_small_loss_keeps_all_at_first_and_the_believed_later():
    losses = torch.tensor([5.0, 0.1, 4.0, 0.2, 0.3, 3.0])
    assert small_loss(losses, 0.5, 0.0).all()
    assert small_loss(losses, 0.5, 0.125).sum() == 5  # half way up the ramp: a quarter of six, rounded down
    assert small_loss(losses, 0.5, 1.0).tolist() == [False, True, False, True, True, False]


def test_flip_consistency_is_symmetric_and_bounded():
    a, b = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1)).mul(20)
    assert flip_consistency(a, b).item() == pytest.approx(flip_consistency(b, a).item(), rel=1e-5)
    assert 0 < flip_consistency(a, b) <= np.log(2) + 1e-6
    assert torch.isfinite(flip_consistency(1e4*a, b)).all()


def test_the_loss_without_anything_is_cross_entropy():
    z, y = torch.randn(16, 7), torch.arange(16) % 7
    assert LabelLoss()(batch(z, y)).item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-6)
    assert LabelLoss(smoothing=0.1)(batch(z, y)).item() == pytest.approx(F.cross_entropy(z, y, label_smoothing=0.1).item(), rel=1e-6)


def test_a_suspect_label_is_taught_by_its_negatives_all_the_same():
    "Why a gate that swaps CE for negative learning can't ignore a wrong label: over all ȳ the loss is least at p_y = 1."
    z = torch.zeros(1, 7)
    for _ in range(300):
        z.requires_grad_()
        (d,) = torch.autograd.grad(negative_rows(z, torch.tensor([[0, 1, 2, 4, 5, 6]])).mean(), z)
        z = (z - 5*d).detach()
    assert z.softmax(-1)[0, 3] > 0.95


def test_the_swap_is_the_loss_of_a_student():
    z, y = torch.randn(32, 7, generator=torch.Generator().manual_seed(3)), torch.arange(32) % 7
    config = NegLConfig(replace_ce=True, global_negative_ratio=0.25, uncertainty_gate={"by": "label"})
    loss = SwapLoss(config, rows=32, seed=0)
    (d,) = torch.autograd.grad(loss(b := batch(z, y)), b.logits)
    suspects = F.cross_entropy(z, y, reduction="none").topk(8).indices
    assert sorted(suspects.tolist()) == loss.suspect.nonzero()[:, 0].tolist()
    p = z.softmax(-1)
    kept = ~loss.suspect
    np.testing.assert_allclose(d[kept], ((p - F.one_hot(y, 7))/32)[kept], atol=1e-6)  # CE's gradient, untouched
    assert (d.gather(-1, loss.bar.clamp_min(0))[loss.suspect] > 0).all()  # ȳ falls


def test_the_phases_of_nlnl():
    z, y = torch.zeros(3, 7), torch.zeros(3, dtype=torch.long)
    z[0, 0], z[1, 0], z[2, 0] = 5, 0.5, -5  # trusted, likelier than chance, unlikely
    loss, chosen = NLNLLoss(0), []
    for done in (0.0, 0.5, 0.9):
        loss(batch(z, y, done)); chosen.append((~loss.suspect).tolist())
    assert chosen == [[True, True, True], [True, True, False], [True, False, False]]
    assert loss(batch(z, y, 0.9)).item() == pytest.approx(F.cross_entropy(z[:1], y[:1]).item()/3, rel=1e-5)
    with pytest.raises(UsageError, match="NL, SelNL or SelPL"): nlnl_rows(z, y, "all")


@pytest.mark.parametrize("arm", list(NOISE_ARMS))
def test_every_arm_gives_a_finite_gradient_at_huge_logits(arm):
    z, y = 100*torch.randn(8, 7, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 7
    (d,) = torch.autograd.grad(arm_loss(arm, 0.4, 8, 0, uniform_table())(b := batch(z, y)), b.logits)
    assert torch.isfinite(d).all()


# ---- training ----

@pytest.fixture(scope="module")
def faces(): return drawn_faces(260, 200, size=24)


def test_the_wrong_labels_are_marked_and_watched(faces):
    noisy = NoisyFaces(faces.x, flip_labels(faces.true, 0.4, uniform_table(), 1), faces.true, faces.test_x, faces.test_y)
    assert noisy.wrong.mean() == pytest.approx(0.4, abs=0.003)
    looks, said = fit(noisy, "right labels alone", 0.4, 1, epochs=2, batch_size=32, width=4, every=1)
    assert looks["suspect_wrong"].tolist() == [1.0, 1.0] and looks["caught"].tolist() == [1.0, 1.0]
    assert len(said) == len(faces.test_y) and looks["accuracy"].iloc[-1] == pytest.approx((said == faces.test_y).mean())


def test_the_share_of_negative_labels_is_the_configs_throughout(faces):
    for arm, share in (("NegL for suspects", 0.4), ("NegL for suspects, p averaged", 0.4), ("NegL for all, 6 labels", 1.0)):
        looks, _ = fit(faces, arm, 0.4, 1, epochs=3, batch_size=40, width=4, every=1)
        assert looks["suspect"].between(0.8*share, 1.2*share).all(), arm


def test_too_few_faces_for_a_batch_are_told(faces):
    with pytest.raises(UsageError, match="smaller batches"): fit(faces, "CE", 0, 1, batch_size=500)


# ---- the study's files ----

@pytest.fixture
def study(faces, tmp_path):
    "Two arms, two seeds, one epoch."
    for seed in (1, 2):
        for arm in ("CE", "NLNL"):
            run_cell(faces, NoiseCell("drawn", "symmetric", 0.4, arm, seed), tmp_path/"cells", epochs=1, batch_size=50, width=4)
    gather_noise(tmp_path/"cells", tmp_path, {"drawn": faces}, {"drawn": 1})
    return tmp_path


def test_a_cell_is_not_trained_twice(faces, study):
    path = study/"cells"/NoiseCell("drawn", "symmetric", 0.4, "CE", 1).file
    before = path.stat().st_mtime_ns
    run_cell(faces, NoiseCell("drawn", "symmetric", 0.4, "CE", 1), study/"cells", epochs=1)
    assert path.stat().st_mtime_ns == before


def test_the_summary_is_what_the_answers_say(faces, study):
    about, summary, looks = read_noise(study)
    assert about.cells == 4 and len(looks) == 4 and set(summary["arm"]) == {"CE", "NLNL"}
    with np.load(study/"label_noise_answers.npz") as z:
        hits = dict(zip(z["cells"].tolist(), (z["drawn_said"] == faces.test_y).mean(1)))
    for _, r in summary.iterrows():
        own = [v for f, v in hits.items() if cell_of(f).arm == r["arm"]]
        assert r["accuracy"] == pytest.approx(np.mean(own), abs=1e-4) and r["low"] <= r["accuracy"] <= r["high"]
    lead = summary.set_index("arm").loc["NLNL"]
    assert lead["over CE"] == pytest.approx(np.diff([summary.set_index("arm").loc[a, "accuracy"] for a in ("CE", "NLNL")])[0], abs=2e-4)
    assert "NLNL" in str(NoiseReport(study)) and "200 training rows" not in str(about)


@pytest.mark.parametrize("spoil", ["summary", "answers", "name"])
def test_embellished_files_are_found_out(study, spoil):
    table = pd.read_csv(study/"label_noise.csv")
    with np.load(study/"label_noise_answers.npz") as z: kept = dict(z)
    if spoil == "summary": write_csv(study/"label_noise.csv", table.assign(accuracy=table["accuracy"] + 0.01))
    if spoil == "answers": write_npz(study/"label_noise_answers.npz", **kept | {"drawn_said": np.zeros_like(kept["drawn_said"])})
    if spoil == "name": write_npz(study/"label_noise_answers.npz", **kept | {"cells": np.array(["drawn.npz"]*4)})
    with pytest.raises(ArtifactError): read_noise(study)


def test_intervals_are_of_pictures_and_not_of_rows():
    rng = np.random.default_rng(0)
    values = (rng.random(300) < 0.7).astype(float)
    rows, pictures = picture_interval(np.repeat(values, 4)), picture_interval(np.repeat(values, 4), np.repeat(np.arange(300), 4))
    assert (pictures.high - pictures.low) == pytest.approx(2*(rows.high - rows.low), rel=0.2)


def test_the_bars_are_the_ones_that_were_asked():
    y = np.zeros(1000, int)
    def said(right): return np.r_[np.zeros(right, int), np.ones(1000 - right, int)]
    cells = {NoiseCell("drawn", "symmetric", 0.4, a, s): said(n) for a, n in
             (("CE", 500), ("label smoothing", 515), ("small loss from the start", 600), ("NegL for suspects", 520), ("NLNL", 535)) for s in (1, 2)}
    did = {"epoch": 1, "accuracy": 0.5, "by_heart": 0.5, "truth_seen": 0.1, "caught": 0.2, "bar_is_truth": 0.1}
    looks = pd.DataFrame([{**c._asdict(), **did} for c in cells])
    table = summarise_noise(cells, looks, {"drawn": (y, None)})
    told = noise_verdicts(table).reset_index().set_index("arm")
    assert told["bars"].to_dict() == {"NegL for suspects": "missed", "NLNL": "passed"}
    assert told.loc["NLNL", "over CE"] == "+3.5" and told.loc["NLNL", "than leaving out"] == "worse"
    with pytest.raises(UsageError, match="has no"): noise_table(table, "fer2013", "real", 0)


def test_real_faces_come_with_both_labels(tmp_path):
    "A manifest with one source can't judge itself by another."
    from fer_nb.training import embedded_data
    manifest, cache = embedded_data(tmp_path/"embedded", n=60, img_size=24)
    with pytest.raises(UsageError, match="has no source 'fer2013'"): real_faces(manifest, cache)
