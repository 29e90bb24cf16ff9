"""Negative learning: the sign of its gradient first, then what it draws, gates, protects, and leaves in a run."""
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.nn import functional as F

from fer_nb.artifacts import CLASSES, ArtifactError, UsageError, write_csv
from fer_nb.callbacks import Mixup, TrainConfig, load_checkpoint, seed_everything
from fer_nb.distillation import Distillation, StudentLoss, Supervision
from fer_nb.loading import FaceBatches, eval_loader
from fer_nb.negl import (
    MinorityProtection, Negatives, NegativeLoss, NegLConfig, doubt, draw_complementary, guided_table, negative_loss, negative_rows,
    negl_rules, protection, quantile_gate, read_confusions, threshold_gate, uniform_table, write_negl,
)
from fer_nb.reliability import confusion_table
from fer_nb.training import train
from tests.test_training import Faces, small_net

logits = hnp.arrays(np.float64, (4, 7), elements=st.floats(-30, 30, width=32))
huge = hnp.arrays(np.float64, (4, 7), elements=st.sampled_from([-100.0, 0.0, 100.0]))
rows4 = hnp.arrays(np.int64, 4, elements=st.integers(0, 6))
counts = hnp.arrays(np.int64, (7, 7), elements=st.integers(0, 60))


# ---- the loss ----

@settings(max_examples=60)
@given(hnp.arrays(np.float64, (4, 7), elements=st.floats(-8, 8, width=32)), rows4)
def test_a_step_downhill_lowers_the_complementary_class(z, bar):
    z, bar = torch.from_numpy(z).requires_grad_(), torch.from_numpy(bar)[:, None]
    (d,) = torch.autograd.grad(negative_loss(z, bar), z)
    before, after = (x.softmax(-1).gather(-1, bar) for x in (z, z - 0.5*d))
    assert (after < before).all()
    assert (d.gather(-1, bar) > 0).all()


@settings(max_examples=60)
@given(logits, rows4)
def test_the_loss_and_its_gradient_are_their_formulas(z, bar):
    x, b = torch.from_numpy(z).requires_grad_(), torch.from_numpy(bar)
    (d,) = torch.autograd.grad(negative_loss(x, b), x)
    total, own = 0.0, np.eye(7)[bar].astype(bool)
    for row, c in zip(z, bar):
        e = np.exp(row - row.max())
        rest = np.delete(e, c).sum()
        total += np.log1p(e[c]/rest)  # -log(1 - p), without a difference
    assert negative_loss(x, b).item() == pytest.approx(total/4, rel=1e-9, abs=1e-12)
    p = x.detach().softmax(-1).numpy()
    rest = np.where(own, 0.0, p)
    closed = p[own][:, None]*(own - rest/np.maximum(rest.sum(1, keepdims=True), 1e-300))/4
    np.testing.assert_allclose(d.numpy(), closed, rtol=1e-6, atol=1e-9)


def test_gradcheck():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, 7, generator=g, dtype=torch.float64, requires_grad=True)
    bar = torch.tensor([[0, 1], [6, -1], [3, 2], [-1, -1], [4, 5]])
    weight = torch.rand(5, 2, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: negative_loss(x, bar, weight), (z,))


@settings(max_examples=40)
@given(huge, rows4, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_huge_logits_in_half_precision_stay_finite_and_bounded(z, bar, dtype):
    x, b = torch.from_numpy(z).to(dtype).requires_grad_(), torch.from_numpy(bar)
    loss = negative_loss(x, b)
    (d,) = torch.autograd.grad(loss, x)
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(d).all()
    assert (4*d.double().abs().sum(-1) <= 2.01).all()


def test_weights_scale_and_nothing_is_nothing():
    g = torch.Generator().manual_seed(1)
    z, bar = torch.randn(8, 7, generator=g).requires_grad_(), torch.arange(8) % 7
    def grad(w): return torch.autograd.grad(negative_loss(z, bar, w), z)[0]
    whole, half = grad(torch.ones(8)), grad(torch.full((8,), 0.5))
    torch.testing.assert_close(half, whole/2)
    shut = torch.full((8, 2), -1)
    assert negative_loss(z, shut).item() == 0 and not torch.autograd.grad(negative_loss(z, shut), z)[0].any()
    assert not grad(torch.zeros(8)).any()
    some = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])  # over the batch, not over the weights
    torch.testing.assert_close(grad(some)[0], whole[0])
    pair = torch.stack([bar, (bar + 1) % 7], -1)
    torch.testing.assert_close(negative_loss(z, pair), negative_rows(z, pair).mean())


# ---- what is drawn ----

@settings(max_examples=60)
@given(counts, st.integers(1, 6), st.integers(0, 60), st.integers(1, 6), st.integers(0, 1000))
def test_a_complementary_label_is_never_the_label_and_follows_the_confusions(c, top_k, min_support, n, seed):
    table = guided_table(c, top_k, min_support)
    np.testing.assert_allclose(table.sum(1), 1)
    labels = np.arange(70) % 7
    bar = draw_complementary(labels, table, np.random.default_rng(seed), n)
    assert (bar != labels[:, None]).all() and bar.shape == (70, n) and (bar[:, 0] >= 0).all()
    for y, row in zip(labels, bar):
        real = row[row >= 0]
        assert len(set(real)) == len(real) and (table[y, real] > 0).all() and len(real) == min(n, (table[y] > 0).sum())
    for y in range(7):
        wrong = np.delete(c[y], y)
        if c[y].sum() < min_support or not wrong.any(): np.testing.assert_array_equal(table[y], uniform_table()[y])
        else:
            assert (table[y] > 0).sum() <= top_k
            assert min(c[y][table[y] > 0]) >= max([0, *(v for k, v in enumerate(c[y]) if k != y and table[y, k] == 0)])


def test_draws_have_the_table_s_shares_and_repeat_with_the_seed():
    c = np.full((7, 7), 1) + np.diag([40]*7)
    c[0, 2], c[0, 4] = 30, 10
    labels = np.zeros(8000, int)
    bar = draw_complementary(labels, guided_table(c), np.random.default_rng(5))[:, 0]
    assert np.mean(bar == 2) == pytest.approx(0.75, abs=0.02) and np.mean(bar == 4) == pytest.approx(0.25, abs=0.02)
    np.testing.assert_array_equal(bar, draw_complementary(labels, guided_table(c), np.random.default_rng(5))[:, 0])


def test_confusions_of_several_teachers_are_summed_and_foreign_ones_refused(tmp_path):
    for name in "ab": write_csv(tmp_path/name/"confusion_out_of_fold.csv", confusion_table(np.eye(7, dtype=int)*4), index=True)
    np.testing.assert_array_equal(read_confusions([tmp_path/"a", tmp_path/"b"]), np.eye(7)*8)
    with pytest.raises(ArtifactError, match="is missing"): read_confusions([tmp_path/"c"])
    wrong = tmp_path/"wrong.csv"
    wrong.write_text("true,Angry\nAngry,1\n")
    with pytest.raises(ArtifactError, match="other classes"): read_confusions([wrong])
    write_csv(wrong, confusion_table(np.eye(7)*0.5), index=True)
    with pytest.raises(ArtifactError, match="something else than counts"): read_confusions([wrong])
    wrong.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError): read_confusions([wrong])


# ---- the gate ----

def test_the_threshold_gate_is_its_two_rules():
    p = torch.tensor([[0.59, 0.41, 0, 0, 0, 0, 0], [0.7, 0.3, 0, 0, 0, 0, 0], [0.62, *[0.38/6]*6]])
    assert threshold_gate(p).tolist() == [True, False, True]  # unlikely; sure; an entropy of 1.34 nats
    assert threshold_gate(p, 1.4).tolist() == [True, False, False]


@settings(max_examples=40)
@given(st.integers(1, 130), st.floats(0.01, 1.0), st.integers(0, 100))
def test_the_quantile_gate_opens_for_the_most_doubtful(n, share, seed):
    g = torch.Generator().manual_seed(seed)
    d, eligible = torch.rand(n, generator=g), torch.rand(n, generator=g) < 0.8
    gate = quantile_gate(d, share, eligible, np.random.default_rng(seed))
    assert not (gate & ~eligible).any() and int(gate.sum()) <= min(math.floor(share*n) + 1, int(eligible.sum()))
    if gate.any() and (eligible & ~gate).any(): assert d[gate].min() >= d[eligible & ~gate].max()


def test_doubt_grows_from_sure_to_even():
    p = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0], [0.6, 0.4, 0, 0, 0, 0, 0], [1/7]*7])
    for by in ("entropy", "confidence", "label"): assert (doubt(p, torch.tensor([0, 0, 0]), by).diff() > 0).all()
    assert doubt(p, None)[-1].item() == pytest.approx(math.log(7))


# ---- protection ----

def test_both_sides_of_a_weak_class_are_protected():
    assert protection(np.array([0.9, 0.69, 0.7, np.nan, 0, 1, 0.5]), MinorityProtection()).tolist() == [1, 0.5, 1, 1, 0.5, 1, 0.5]
    loss = NegativeLoss("CE", NegLConfig(global_negative_ratio=1.0, class_negative_ratio={"Angry": 0.8}))
    loss.factor = protection(np.array([0.1, 1, 1, 1, 1, 1, 1]), MinorityProtection())
    y = torch.tensor([0, 1]*40)
    bar, weight = loss.choose(torch.zeros(80, 7), y, torch.arange(80), torch.zeros(80, dtype=torch.long))
    as_label, as_complement = (y == 0)[:, None], bar == 0
    assert (weight[as_label] == pytest.approx(0.4)) and as_complement.any()
    assert set(weight[as_complement].tolist()) == {0.5} and set(weight[~as_label & ~as_complement].tolist()) == {1.0}


# ---- the student's loss ----

def some(n=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    z, y = (2*torch.randn(n, 7, generator=g)).requires_grad_(), torch.randint(7, (n,), generator=g)
    return z, y, torch.arange(n), torch.zeros_like(y)


def teacher(n=48, seed=3):
    return Supervision(torch.randn(2, n, 1, 7, generator=torch.Generator().manual_seed(seed)), torch.full((2, 7), 0.5))


@pytest.mark.parametrize("stage", ["CE", "KD", "DKD"])
def test_beside_ce_it_adds_exactly_its_term(stage):
    batch, soft = some(), None if stage == "CE" else teacher()
    config = NegLConfig(global_negative_ratio=0.3, weight=0.7, labels_per_sample=2)
    ours, plain = NegativeLoss(stage, config, soft, Distillation()), StudentLoss(stage, soft, Distillation())
    assert ours(*batch).item() == pytest.approx(plain(*batch).item() + float(ours.terms["negl"]), rel=1e-5)
    assert 0 < ours.terms["negl_applied"] <= 0.32
    with torch.no_grad(): assert torch.equal(ours(*batch), F.cross_entropy(batch[0], batch[1]))


@pytest.mark.parametrize("mode", ["threshold", "quantile"])
def test_all_gated_out_is_the_plain_loss_and_gradient(mode):
    batch = some()
    gate = {"mode": "threshold", "entropy_threshold": 9, "max_confidence": 0}
    config = NegLConfig(uncertainty_gate=gate) if mode == "threshold" else NegLConfig(global_negative_ratio=1e-9)
    for replace in (False, True):
        loss = NegativeLoss("CE", config.model_copy(update={"replace_ce": replace}))
        (got,), (want,) = (torch.autograd.grad(f(*batch), batch[0]) for f in (loss, StudentLoss("CE")))
        torch.testing.assert_close(got, want)
        assert loss.terms["negl"] == 0 and loss.terms["negl_applied"] == 0 and not loss.applied.any()


@pytest.mark.parametrize("stage", ["CE", "KD"])
def test_replace_ce_swaps_the_gated_samples(stage):
    batch, soft = some(), None if stage == "CE" else teacher()
    z, y, index, view = batch
    config = NegLConfig(global_negative_ratio=0.25, replace_ce=True, uncertainty_gate={"by": "label"})
    loss = NegativeLoss(stage, config, soft, Distillation(), label_smoothing=0.1, seed=4)
    total = loss(*batch)
    loss.rng = np.random.default_rng(4)
    bar, weight = loss.choose(z, y, index, view)
    kept, ce = (bar < 0)[:, 0], F.cross_entropy(z, y, reduction="none", label_smoothing=0.1)
    assert 0 < (~kept).sum() <= 13
    ce = (ce*kept).sum()/48 + negative_loss(z, bar, weight)
    alpha = loss.alpha
    want = ce
    if stage == "KD": want = (1 - alpha)*ce + alpha*StudentLoss("KD", soft, Distillation()).distil(z, y, soft.logits[:, index, 0])["kd"]
    assert total.item() == pytest.approx(want.item(), rel=1e-5)


def test_what_the_soft_label_finds_likely_is_left_out():
    z, y, index, view = some(400)
    soft = teacher(400)
    told = soft.logits[:, :, 0].softmax(-1).mean(0)
    for skip in (True, False):
        config = NegLConfig(global_negative_ratio=1.0, labels_per_sample=3, teacher_guidance={"skip_likely": skip})
        bar, _ = NegativeLoss("KD", config, soft, Distillation()).choose(z, y, index, view)
        likelier = (told.gather(-1, bar.clamp_min(0)) >= told.gather(-1, y[:, None])) & (bar >= 0)
        assert bool(likelier.any()) != skip


def test_blended_faces_and_a_gate_without_rows_are_refused():
    loss = NegativeLoss("CE", NegLConfig())
    loss.mixed = torch.arange(48), 0.5
    with pytest.raises(UsageError, match="no meaning for blended faces"): loss(*some())
    with pytest.raises(UsageError, match="give rows"): NegativeLoss("CE", NegLConfig(uncertainty_gate={"average": 0.9}))


def test_the_averaged_p_belongs_to_the_row():
    z, y, index, view = some()
    loss = NegativeLoss("CE", NegLConfig(uncertainty_gate={"average": 0.75}), rows=60)
    first, other = z.detach().softmax(-1), z.detach().flip(0).softmax(-1)
    torch.testing.assert_close(loss.probabilities(z, index), first)
    torch.testing.assert_close(loss.probabilities(z.flip(0), index), 0.75*first + 0.25*other)
    assert not loss.seen[48:].any()


# ---- files ----

def test_the_config_has_the_plan_s_keys_and_refuses_nonsense(tmp_path):
    write_negl(tmp_path, NegLConfig(class_negative_ratio={"Fear": 0.5}))
    data = json.loads((tmp_path/"negl_config.json").read_text())
    assert {"class_names", "global_negative_ratio", "class_negative_ratio"} <= set(data)
    assert data["class_negative_ratio"] == {c: 0.5 if c == "Fear" else 1.0 for c in CLASSES}
    assert {"entropy_threshold", "max_confidence"} <= set(data["uncertainty_gate"])
    assert {"source_models", "use_confusion_top_k", "min_support"} <= set(data["teacher_guidance"])
    assert {"min_recall_target", "reduce_ratio_factor"} <= set(data["minority_protection"])
    rules = (tmp_path/"negl_rules.md").read_text()
    assert "Fear 0.5" in rules and "drawn uniformly" in rules and rules == negl_rules(NegLConfig.load(tmp_path))
    for key, value in (("global_negative_ratio", 0), ("global_negative_ratio", 1.2), ("class_names", list(reversed(CLASSES))),
                       ("class_negative_ratio", {"Angry": -1}), ("uncertainty_gate", {"mode": "luck"}), ("labels_per_sample", 7)):
        (tmp_path/"negl_config.json").write_text(json.dumps(data | {key: value}))
        with pytest.raises(ArtifactError, match=key): NegLConfig.load(tmp_path)


# ---- in the loop ----

GATE = {"by": "label", "average": 0.5}


def plain(seed=1):
    seed_everything(seed)
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 7))


def run(out, cut=None, epochs=6, make=small_net, **config):
    data, guard = Faces(112), Faces(40)
    loss = NegativeLoss("CE", NegLConfig(**{"global_negative_ratio": 0.25, "uncertainty_gate": GATE, **config}), rows=len(data))
    how = TrainConfig(epochs, 3e-3, warmup_epochs=0, seed=1)
    model = make()
    history = train(model, FaceBatches(data, 16, train=True, seed=1), eval_loader(data), loss, how, out, {},
                    callbacks=[Negatives(out, 1, guard), *([cut] if cut else [])], bar=False)
    return model, history, loss


@pytest.mark.parametrize("by", ["entropy", "label"])
def test_the_applied_fraction_is_the_config_s_throughout(tmp_path, by):
    _, history, _ = run(tmp_path, epochs=16, make=plain, uncertainty_gate={"by": by})
    applied = [r["train_negl_applied"] for r in history.rows]
    assert history.rows[-1]["train_ce"] < 0.75*history.rows[0]["train_ce"]  # training did sharpen
    assert all(abs(a/0.25 - 1) <= 0.2 for a in applied)
    table = pd.read_csv(tmp_path/"negl_applied.csv")
    assert (table["label"] != table["complementary"]).all()
    np.testing.assert_allclose(table.groupby("epoch")["applied"].sum()/112, applied, atol=1e-6)


def test_a_fixed_threshold_decays_as_training_sharpens(tmp_path):
    _, history, _ = run(tmp_path, epochs=16, make=plain, uncertainty_gate={"mode": "threshold"})
    applied = [r["train_negl_applied"] for r in history.rows]
    assert applied[0] > 0.9 and applied[-1] < 0.75*applied[0]


@pytest.mark.parametrize("replace", [False, True])
def test_a_cut_run_resumes_bit_equal(tmp_path, replace):
    class Cut(Callback):
        order = 5
        def before_batch(self):
            if self.training and self.epoch == 3 and self.iter == 3: raise ConnectionError("power cut")

    whole, history, loss = run(tmp_path/"whole", replace_ce=replace)
    with pytest.raises(ConnectionError): run(tmp_path/"cut", Cut(), replace_ce=replace)
    again, resumed, other = run(tmp_path/"cut", replace_ce=replace)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    assert [r["train_loss"] for r in history.rows] == [r["train_loss"] for r in resumed.rows]
    assert torch.equal(loss.seen, other.seen)
    assert (tmp_path/"whole"/"negl_applied.csv").read_text() == (tmp_path/"cut"/"negl_applied.csv").read_text()
    last = history.rows[-1]
    assert {f"guard_recall_{c}" for c in CLASSES} <= set(last)
    weak = sum(last[f"guard_recall_{c}"] < 0.7 for c in CLASSES)
    assert last["negl_protected"] == weak == (loss.factor == 0.5).sum()
    kept = load_checkpoint(tmp_path/"cut"/"checkpoint_last.pt", ("callbacks",))["callbacks"]["negatives"]
    assert kept["factor"].tolist() == loss.factor.tolist()


def test_mixup_is_refused_in_the_loop(tmp_path):
    data, loss = Faces(32), NegativeLoss("CE", NegLConfig())
    with pytest.raises(UsageError, match="blended"):
        train(small_net(), FaceBatches(data, 16, train=True, seed=1), eval_loader(data), loss, TrainConfig(1, 1e-3, seed=1), tmp_path, {},
              callbacks=[Negatives(tmp_path, 1), Mixup(0.4, 1)], bar=False)
