"""Students: the losses against longhand float64, supervision joined by id, votes as targets, stages that really train, any view."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax, logsumexp
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from fer_nb import callbacks, distillation, students, teachers, training
from fer_nb.artifacts import CLASSES, GateError, UsageError
from fer_nb.calibration import macro_f1
from fer_nb.callbacks import TrainConfig, load_checkpoint, save_checkpoint, seed_everything
from fer_nb.distillation import Distillation, StudentLoss, Supervision, dkd_loss, kd_loss
from fer_nb.ensembles import SplitTargets
from fer_nb.geometry import Geometry
from fer_nb.images import pack_cache
from fer_nb.integrity import VIEWS, Softlabels, load_softlabels, save_softlabels
from fer_nb.leaves import seal_folder
from fer_nb.loading import FaceBatches, eval_loader
from fer_nb.manifests import labels_of, load_manifest
from fer_nb.records import SelectiveReport
from fer_nb.students import start_from
from fer_nb.training import predict
from tests.conftest import ROOT

logits = hnp.arrays(np.float64, (4, 7), elements=st.floats(-30, 30, width=32))
huge = hnp.arrays(np.float64, (4, 7), elements=st.sampled_from([-1000.0, -64.0, 0.0, 64.0, 1000.0]))
rows4 = hnp.arrays(np.int64, 4, elements=st.integers(0, 6))
temperatures = st.sampled_from([0.5, 1.0, 2.0, 4.0])


# ---- the losses ----

def longhand_kd(s, t, T):
    ls, lt = log_softmax(s/T, -1), log_softmax(t/T, -1)
    return T*T*np.mean(np.sum(np.exp(lt)*(lt - ls), -1))


def longhand_parts(s, t, y, T):
    "TCKD and NCKD of every row, from the definition, one row at a time."
    out = []
    for zs, zt, c in zip(s/T, t/T, y):
        rest = [k for k in range(7) if k != c]
        bs, bt = ([z[c] - logsumexp(z), logsumexp(z[rest]) - logsumexp(z)] for z in (zs, zt))
        tckd = sum(np.exp(b)*(b - a) for a, b in zip(bs, bt))
        ls, lt = log_softmax(zs[rest]), log_softmax(zt[rest])
        out.append((tckd, float(np.sum(np.exp(lt)*(lt - ls)))))
    return np.array(out)


def near(got, want): assert abs(float(torch.as_tensor(got).detach()) - want) <= 1e-6*max(1.0, abs(want))


@settings(max_examples=60)
@given(logits, logits, rows4, temperatures, st.sampled_from([torch.float32, torch.float64]))
def test_losses_are_their_formulas_in_float64(s, t, y, T, dtype):
    a, b, c = torch.from_numpy(s).to(dtype), torch.from_numpy(t).to(dtype), torch.from_numpy(y)
    near(kd_loss(a, b, T), longhand_kd(s, t, T))
    parts = longhand_parts(s, t, y, T)
    near(dkd_loss(a, b, c, 0.5, 4.0, T), T*T*np.mean(parts @ [0.5, 4.0]))
    assert kd_loss(a, b, T).dtype == dtype


@settings(max_examples=40)
@given(logits, logits, rows4, temperatures)
def test_kd_is_the_sum_of_its_decoupled_parts(s, t, y, T):
    parts, p = longhand_parts(s, t, y, T), np.exp(log_softmax(t/T, -1))[np.arange(4), y]
    near(kd_loss(torch.from_numpy(s), torch.from_numpy(t), T), T*T*np.mean(parts[:, 0] + (1 - p)*parts[:, 1]))


@settings(max_examples=60)
@given(huge, huge, rows4, temperatures, st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_values_and_gradients_are_finite_at_a_thousand(s, t, y, T, dtype):
    a, b, c = torch.from_numpy(s).to(dtype).requires_grad_(), torch.from_numpy(t).to(dtype), torch.from_numpy(y)
    for loss in (kd_loss(a, b, T), dkd_loss(a, b, c, 0.5, 4.0, T)):
        gradient, = torch.autograd.grad(loss, a)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all() and loss >= -1e-9


@settings(max_examples=30, deadline=None)
@given(logits, rows4, st.sampled_from([0.5, 1.0, 2.0]))
def test_the_prior_of_rare_classes_is_menon_s_and_only_trains(s, y, tau):
    counts, rows = [4, 1, 1, 9, 4, 3, 5], torch.arange(4)
    loss, z = StudentLoss("CE", prior=teachers.log_prior(counts, tau)), torch.tensor(s, requires_grad=True)
    adjusted = s + tau*np.log(np.array(counts)/sum(counts))
    want = -log_softmax(adjusted, -1)[np.arange(4), y].mean()  # Menon et al. 2021, eq. 10
    assert float(loss(z, torch.tensor(y), rows, rows).detach()) == pytest.approx(want, abs=1e-5)
    with torch.no_grad():
        assert float(loss(z, torch.tensor(y), rows, rows)) == pytest.approx(-log_softmax(s, -1)[np.arange(4), y].mean(), abs=1e-9)


@pytest.mark.parametrize("tau", [-1, float("nan"), float("inf")])
def test_a_prior_that_is_none_is_refused(tau):
    with pytest.raises(UsageError, match=f"logit_adjustment {tau}: give a number of at least 0"): teachers.log_prior([1]*7, tau)


def test_autocast_does_not_reach_the_losses():
    torch.manual_seed(0)
    a, b = torch.randn(8, 7)*4, torch.randn(8, 7)*4
    y = torch.arange(8) % 7
    with torch.autocast("cpu", torch.bfloat16): inside = kd_loss(a, b), dkd_loss(a, b, y)
    assert torch.equal(inside[0], kd_loss(a, b)) and torch.equal(inside[1], dkd_loss(a, b, y))


@pytest.mark.parametrize("broken", [
    lambda s, t, T=2.0: F.kl_div(F.log_softmax(s/T, -1), F.softmax(t/T, -1), reduction="batchmean"),  # no T^2
    lambda s, t, T=2.0: T*T*F.kl_div(F.log_softmax(s/T, -1), F.softmax(t/T, -1), reduction="none").mean(),  # a seventh
])
def test_the_unit_test_fails_where_a_loss_is_wrong(monkeypatch, broken):
    assert distillation.dkd_unit_test().passed
    monkeypatch.setattr(distillation, "kd_loss", broken)
    assert not distillation.dkd_unit_test().passed


def test_the_unit_test_notices_t_squared_on_the_labels(monkeypatch):
    right = StudentLoss.__call__
    monkeypatch.setattr(StudentLoss, "__call__", lambda self, *a: right(self, *a)*self.how.T**2)
    verdict = distillation.dkd_unit_test()
    assert not verdict.passed and verdict.gradient_max_error > 1e-3


def test_the_unit_test_notices_a_target_class_term_of_its_own_kind(monkeypatch):
    def half(s, t, y, T):  # -p_t log p_s alone in place of the binary KL
        right = distillation.__dict__["_right"](s, t, y, T)
        own = F.log_softmax(s.double()/T, -1).gather(-1, y[:, None])[:, 0]
        return -(t.double()/T).softmax(-1).gather(-1, y[:, None])[:, 0]*own, right[1]
    monkeypatch.setattr(distillation, "_right", distillation.tckd_nckd, raising=False)
    monkeypatch.setattr(distillation, "tckd_nckd", half)
    assert not distillation.dkd_unit_test().passed


# ---- schedule ----

@settings(max_examples=60)
@given(st.integers(1, 500), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_weights_rise_monotonously_by_global_step(total, start, end, ramp, warm):
    how = Distillation(alpha_start=start, alpha=end, ramp=ramp, kd_warmup=warm)
    alphas, shares = zip(*(how.at(i, total) for i in range(total + 1)))
    assert alphas[0] == pytest.approx(start) and alphas[-1] == pytest.approx(end)
    assert all((b - a)*(end - start) >= -1e-12 for a, b in zip(alphas, alphas[1:]))
    assert shares[-1] == 1 and all(b >= a for a, b in zip(shares, shares[1:])) and (warm == 0 or shares[0] == 0)


@pytest.mark.parametrize("wrong, said", [({"T": 0}, "above 0"), ({"T": float("nan")}, "above 0"), ({"alpha": 1.2}, "alpha is 1.2"),
                                         ({"beta": -1}, "beta is -1"), ({"kd_warmup": 2}, "kd_warmup is 2")])
def test_weights_out_of_range_are_refused(wrong, said):
    with pytest.raises(UsageError, match=said): Distillation(**wrong)


# ---- a small dataset ----

@pytest.fixture(scope="module")
def folders(tmp_path_factory): return training.embedded_data(tmp_path_factory.mktemp("faces"), n=160, img_size=32, seed=5)


@pytest.fixture(scope="module")
def data(folders): return training.open_data(*folders)


def teach(folder, data, seed=0, views=VIEWS, **change):
    "Softlabels of the training rows that know the label, in a folder of a teacher."
    rows, rng = data.train.rows, np.random.default_rng(seed)
    z = 6*np.eye(7)[labels_of(rows)][:, None] + rng.normal(0, 2, (len(rows), len(views), 7))
    order = rng.permutation(len(rows))  # never the student's order
    what = dict(ids=rows["id"].to_numpy(str)[order], sha256=rows["sha256"].to_numpy(str)[order], logits=z[order].astype(np.float32),
                views=tuple(views), temperature=2.0, scale=1.0, dataset_index_id=data.dataset_index_id,
                splits=np.full(len(rows), "train")) | change
    save_softlabels(folder, Softlabels(**what))
    return folder


def two_members(data, fused, weights=(0.6, 0.4)):
    rng, n, v, k = np.random.default_rng(3), *fused.logits.shape
    z = rng.normal(0, 3, (2, n, v, k)).astype(np.float32)
    w = np.repeat(np.array(weights)[:, None], 7, 1)
    return SplitTargets(["a", "b"], fused.ids, fused.sha256, fused.splits, z, np.array([1.5, 3.0]), fused.views, data.dataset_index_id, w)


def test_supervision_is_joined_by_id_not_by_position(tmp_path, data):
    soft = load_softlabels(teach(tmp_path / "t" / "softlabels", data))
    ids = data.train.rows["id"].to_numpy(str)
    table = distillation.fused_supervision(soft, ids)
    where = {i: n for n, i in enumerate(soft.ids.tolist())}
    for row in (0, 7, len(ids) - 1):
        for view in (0, 1):
            got, w = table.of(torch.tensor([row]), torch.tensor([view]), torch.tensor([2]))
            assert np.allclose(got[0, 0].numpy(), soft.logits[where[ids[row]], view]/2.0) and w.tolist() == [[1.0]]
    split = two_members(data, soft)
    got, w = distillation.split_supervision(split, ids).of(torch.tensor([7]), torch.tensor([1]), torch.tensor([0]))
    for m, t in enumerate((1.5, 3.0)): assert np.allclose(got[m, 0].numpy(), split.logits[m, where[ids[7]], 1]/t, atol=1e-6)
    assert np.allclose(w[:, 0].numpy(), [0.6, 0.4])


def test_class_aware_weights_are_those_of_the_true_class(data):
    z = torch.randn(2, 3, 1, 7)
    w = torch.rand(2, 7)
    table, y = Supervision(z, w/w.sum(0)), torch.tensor([0, 4, 6])
    x, index, view = torch.randn(3, 7), torch.arange(3), torch.zeros(3, dtype=torch.int64)
    loss = StudentLoss("KD", table, Distillation(alpha_start=1, alpha=1))
    with torch.enable_grad(): got = loss(x.requires_grad_(), y, index, view)
    want = sum(float(table.weights[m, y[i]])*longhand_kd(x[[i]].detach().double().numpy(), z[m, i].double().numpy(), 2.0)
               for m in range(2) for i in range(3))/3
    near(got, want)


@pytest.mark.parametrize("change, said", [
    ({"dataset_index_id": "other-1"}, "made for dataset other-1"),
    ({"sha256": None}, "other content"),
    ({"views": ("identity",)}, "no view 'hflip'"),
    ({"splits": None}, "row"),
])
def test_softlabels_of_another_kind_are_refused(tmp_path, data, change, said):
    rows = data.train.rows
    if "views" in change: folder = teach(tmp_path / "t" / "softlabels", data, views=change["views"])
    else:
        fill = {"sha256": np.array(["0"*64]*len(rows)), "splits": np.full(len(rows), "test")}
        folder = teach(tmp_path / "t" / "softlabels", data, **{k: fill.get(k) if v is None else v for k, v in change.items()})
    try:
        report, table = distillation.open_supervision(folder, "fused", data)
        assert table is None and not report.passed
        heard = " ".join(report.notes)
    except GateError as e: heard = str(e)
    assert said in heard or said == "other content" and not report.sample_content_match


def test_softlabels_of_another_class_order_are_refused(tmp_path, data):
    folder = teach(tmp_path / "t" / "softlabels", data)
    order = json.loads((folder / "class_order.json").read_text())
    (folder / "class_order.json").write_text(json.dumps(order | {"classes": order["classes"][::-1]}))
    seal_folder(folder, data.dataset_index_id)
    report, table = distillation.open_supervision(folder, "fused", data)
    assert table is None and not report.class_order_match


def test_split_supervision_needs_an_ensemble(tmp_path, data):
    folder = teach(tmp_path / "t" / "softlabels", data)
    with pytest.raises(UsageError, match="split_targets.npz is missing"): distillation.supervision_files(str(folder), "split")
    with pytest.raises(UsageError, match="give fused or split"): distillation.supervision_files(str(folder), "both")
    with pytest.raises(UsageError, match="give an ensemble's softlabels"): distillation.supervision_files("", "split")
    assert [p.name for p in distillation.supervision_files(str(folder))] == ["softlabels.npz"]
    for kind in ("fused", "split"):  # the run's folder, in which the softlabels folder stands
        with pytest.raises(UsageError, match=r"t holds no softlabels.npz: give the softlabels folder of a teacher or an ensemble"):
            distillation.supervision_files(str(folder.parent), kind)


def test_votes_are_shares_and_rows_without_keep_their_label():
    rows = pd.DataFrame({"label": ["Happy", "Fear", "Sad"], "votes": [[0, 0, 0, 8, 0, 1, 1], [0]*7, None]})
    assert np.allclose(teachers.vote_targets(rows).numpy(), [[0, 0, 0, .8, 0, .1, .1], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0]])


# ---- training ----

CONFIG = dict(lr=2e-3, warmup_epochs=0, seed=3, clip=5.0)


def fit(folder, data, stage, soft=None, epochs=1, init="", targets=None, callbacks=(), sizes=(), stem_stride=2, **more):
    seed_everything(3)
    model = distillation.make_student(stem_stride=stem_stride)
    start_from(model, init)
    meta = {"backbone": distillation.STUDENT_BACKBONE, "head": "linear", "stage": stage, "geometry": data.geometry.to_dict(),
            "dataset_index_id": data.dataset_index_id}
    history = training.train(model, FaceBatches(data.train, 32, train=True, seed=3, sizes=sizes), eval_loader(data.own_val),
                             StudentLoss(stage, soft, targets=targets), TrainConfig(epochs, **{**CONFIG, **more}), folder,
                             meta | {"stem_stride": stem_stride}, callbacks, bar=False, stage=stage)
    return model, history


@pytest.fixture(scope="module")
def stages(tmp_path_factory, data):
    "CE, then KD from its best weights."
    root = tmp_path_factory.mktemp("stages")
    soft = distillation.fused_supervision(load_softlabels(teach(root / "t" / "softlabels", data)), data.train.rows["id"].to_numpy(str))
    fit(root / "ce", data, "CE")
    fit(root / "kd", data, "KD", soft, init=root / "ce" / "best.pt")
    return root, soft


def test_dkd_trains_its_own_epochs_whatever_it_starts_from(stages, data, tmp_path):
    root, soft = stages
    start = load_checkpoint(root / "kd" / "best.pt")["model"]
    _, history = fit(tmp_path / "dkd", data, "DKD", soft, epochs=2, init=root / "kd" / "best.pt")
    assert [r["epoch"] for r in history.rows] == [0, 1] and history.rows[-1]["steps"] == 2*(len(data.train)//32)
    end = load_checkpoint(tmp_path / "dkd" / "checkpoint_last.pt", ("model",))["model"]
    moved = [k for k in start if k.endswith("conv_pw.weight") and not torch.equal(start[k], end[k])]
    assert len(moved) == sum(k.endswith("conv_pw.weight") for k in start) > 0
    assert {"train_ce", "train_tckd", "train_nckd", "train_alpha"} <= set(history.rows[-1])


def test_dkd_asked_for_no_epoch_refuses(stages, data, tmp_path):
    root, soft = stages
    with pytest.raises(UsageError, match="epochs is 0: give at least 1"): TrainConfig(0)
    fit(tmp_path / "dkd", data, "DKD", soft, init=root / "kd" / "best.pt")
    with pytest.raises(GateError, match="nothing left to train: 1 epochs are done"):
        fit(tmp_path / "dkd", data, "DKD", soft, init=root / "kd" / "best.pt")


def test_a_dkd_run_that_was_interrupted_trains_the_rest(stages, data, tmp_path):
    root, soft = stages
    whole, _ = fit(tmp_path / "whole", data, "DKD", soft, epochs=2, init=root / "kd" / "best.pt")

    class Stop(Exception): pass
    right = callbacks.History.after_epoch

    def stop(self):
        right(self)
        if len(self.rows) == 2: raise Stop("power cut")

    with pytest.MonkeyPatch.context() as m:
        m.setattr(callbacks.History, "after_epoch", stop)
        with pytest.raises(Stop): fit(tmp_path / "parts", data, "DKD", soft, epochs=2, init=root / "kd" / "best.pt")
    again, history = fit(tmp_path / "parts", data, "DKD", soft, epochs=2, init=root / "kd" / "best.pt")
    assert history.epochs_done == 2
    a, b = whole.state_dict(), again.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_training_never_runs_a_teacher(stages, data, tmp_path, monkeypatch):
    root, soft = stages

    def never(*_, **__): raise AssertionError("a teacher ran")
    monkeypatch.setattr(teachers.Teacher, "forward", never)
    monkeypatch.setattr(teachers.Teacher, "__init__", never)
    fit(tmp_path / "kd", data, "KD", soft)  # from scratch too


@pytest.mark.parametrize("stage", ["CE", "KD", "DKD"])
def test_the_whole_recipe_resumes_bit_equal(stages, data, tmp_path, stage):
    "Mixup, averaged weights, SGD, growing faces, a fine stem: cut after the first epoch, and in one go."
    _, soft = stages
    recipe = dict(soft=None if stage == "CE" else soft, epochs=2, sizes=[[0, 24], [1, 32]], stem_stride=1, optimizer="sgd", lr=0.05,
                  best_by="nll")

    class Cut(callbacks.Callback):
        order = 5
        def before_batch(self):
            if self.training and self.epoch == 1 and self.iter == 2: raise ConnectionError("power cut")

    def extras(): return [callbacks.EMA(0.9), callbacks.Mixup(0.4, 3)]
    whole, history = fit(tmp_path / "whole", data, stage, callbacks=extras(), **recipe)
    with pytest.raises(ConnectionError): fit(tmp_path / "cut", data, stage, callbacks=[*extras(), Cut()], **recipe)
    again, resumed = fit(tmp_path / "cut", data, stage, callbacks=extras(), **recipe)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    assert [r["train_loss"] for r in history.rows] == [r["train_loss"] for r in resumed.rows] and history.best_by == "nll"
    model, meta = students.load_model(tmp_path / "cut" / "best.pt")
    assert meta["stem_stride"] == 1 and model.conv_stem.stride == (1, 1)
    with pytest.raises(GateError, match="stem_stride 1, this student has 2"):
        start_from(distillation.make_student(), tmp_path / "cut" / "best.pt")


def test_votes_teach_and_validation_stays_on_labels(data, tmp_path):
    targets = torch.full((len(data.train), 7), 1/7)  # nothing to learn
    _, history = fit(tmp_path, data, "CE", targets=targets)
    assert history.rows[-1]["train_ce"] >= np.log(7) - 1e-3  # the entropy of the targets
    assert history.rows[-1]["valid_macro_f1"] < 0.5


def test_foreign_starting_weights_are_refused_before_any_is_loaded(data, tmp_path):
    teacher = teachers.Teacher("RN18")
    save_checkpoint(tmp_path / "best.pt", model=teacher.state_dict(), meta={"classes": list(CLASSES), "backbone": "resnet18"})
    model = distillation.make_student()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(GateError, match="checkpoint of 'resnet18' is foreign"): start_from(model, tmp_path / "best.pt")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    save_checkpoint(tmp_path / "best.pt", model=before, meta={"classes": [*CLASSES[::-1]], "backbone": distillation.STUDENT_BACKBONE})
    with pytest.raises(GateError, match="another class order"): start_from(model, tmp_path / "best.pt")


def test_a_student_whose_meta_says_stride_0_can_be_gone_on_from(tmp_path):
    "0 asks for the network's own stride, 2: older runs wrote down what was asked, runs of today write what the network has."
    model = distillation.make_student(stem_stride=0)
    meta = {"classes": list(CLASSES), "backbone": distillation.STUDENT_BACKBONE}
    for said in ({}, {"stem_stride": None}, {"stem_stride": 0}, {"stem_stride": teachers.set_stem_stride(model)}):
        save_checkpoint(tmp_path / "best.pt", model=model.state_dict(), meta=meta | said)
        assert start_from(distillation.make_student(), tmp_path / "best.pt").passed
        with pytest.raises(GateError, match="stem_stride 2, this student has 1"):
            start_from(distillation.make_student(stem_stride=1), tmp_path / "best.pt")
    run = "".join("".join(c["source"]) for c in json.loads((ROOT/"nbs"/"05_students.ipynb").read_text())["cells"])
    assert run.index("stem_stride = teachers.set_stem_stride(student)") < run.index("stem_stride=(stem_stride, 2)") < run.index(
        '"stem_stride": stem_stride')


# ---- any checkpoint on any view ----

@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    "A run whose student knows something: random features, and a classifier fitted to them."
    folder = tmp_path_factory.mktemp("finished") / "ce"
    seed_everything(3)
    model = distillation.make_student().eval()
    with torch.no_grad(): x, y = (torch.cat(v) for v in zip(*[(model.forward_head(model.forward_features(x), pre_logits=True), y)
                                                             for faces in (data.train, data.val) for x, y, *_ in eval_loader(faces)]))
    fitted = LogisticRegression(C=0.003, max_iter=2000).fit(x.numpy()/x.std().item(), y.numpy())
    assert fitted.classes_.tolist() == list(range(7))
    model.classifier.weight.data = torch.from_numpy(fitted.coef_/x.std().item()).float()
    model.classifier.bias.data = torch.from_numpy(fitted.intercept_).float()
    meta = {"classes": list(CLASSES), "backbone": distillation.STUDENT_BACKBONE, "head": "linear", "geometry": data.geometry.to_dict(),
            "dataset_index_id": data.dataset_index_id}
    save_checkpoint(folder / "best.pt", model=model.state_dict(), meta=meta)
    training.evaluate_run(model, data, folder, "ce", 3, resamples=20)
    seal_folder(folder, data.dataset_index_id)
    return folder.parent


def test_a_view_of_test_rows_gives_the_run_s_own_numbers(finished, folders, data, tmp_path):
    report = students.evaluate_checkpoint(finished / "ce", *folders, out=tmp_path / "v", resamples=20)
    own = np.load(finished / "ce" / "evaluation.npz")
    assert report.metrics.macro_f1.value == pytest.approx(macro_f1(own["test_logits"], own["test_labels"]))
    kept = np.load(tmp_path / "v" / "evaluation.npz")
    np.testing.assert_allclose(kept["test_logits"], own["test_logits"], atol=1e-4)  # kernels may be chosen anew between two passes
    assert SelectiveReport.load(tmp_path / "v").n == len(own["test_labels"])
    source = data.test.rows["source"].iloc[0]
    alone = students.evaluate_checkpoint(finished / "ce" / "best.pt", *folders, source=source, resamples=20)
    assert alone.metrics.n == (data.test.rows["source"] == source).sum() < report.metrics.n
    assert "prediction sets for 90%" in str(alone)


def test_a_run_whose_weights_were_changed_is_refused(finished, folders, tmp_path):
    copy = shutil.copytree(finished / "ce", tmp_path / "ce")
    ckpt = load_checkpoint(copy / "best.pt")
    save_checkpoint(copy / "best.pt", model=ckpt["model"], meta=ckpt["meta"] | {"epoch": 9})
    with pytest.raises(GateError, match="best.pt: was changed"): students.evaluate_checkpoint(copy, *folders, resamples=20)
    (copy / "hash_manifest.json").unlink()
    with pytest.raises(GateError, match="unfinished"): students.evaluate_checkpoint(copy, *folders, resamples=20)


def test_rows_that_chose_are_refused_and_trained_ones_are_named(finished, folders):
    with pytest.raises(GateError, match="chose the model's epoch and temperature"):
        students.evaluate_checkpoint(finished / "ce", *folders, view="val", resamples=20)
    seen = students.evaluate_checkpoint(finished / "ce", *folders, view="hq_train", resamples=20)
    assert "may have trained on" in str(seen)


def test_a_teacher_s_checkpoint_is_rebuilt_from_its_meta(data, tmp_path):
    torch.manual_seed(0)
    small = {"embed_dim": 48, "depth": 1, "num_heads": 2, "img_size": 32}
    teacher = teachers.Teacher("VIT", 20.0, img_size=32, model_args=small).eval()
    meta = {"classes": list(CLASSES), "backbone": "vit_small_patch16_224", "head": "arcface", "scale": 20.0, "model_args": small,
            "geometry": data.geometry.to_dict()}
    save_checkpoint(tmp_path / "best.pt", model=teacher.state_dict(), meta=meta)
    again, _ = students.load_model(tmp_path / "best.pt")
    faces = eval_loader(data.val)
    assert np.array_equal(predict(teacher, faces)[0], predict(again, faces)[0])


def test_a_cache_of_another_size_is_refused(finished, folders, tmp_path):
    pack_cache(load_manifest(folders[0]), Geometry(size=40), tmp_path / "img40", progress=False)
    with pytest.raises(GateError, match="size: expected 32, got 40"):
        students.evaluate_checkpoint(finished / "ce", folders[0], tmp_path / "img40", resamples=20)
