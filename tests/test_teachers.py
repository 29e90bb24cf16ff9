"""Teachers against second implementations and against interruptions: the margin, class weights, mixup, averaged weights, exports."""
import math
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from fastai.callback.core import Callback
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.nn import functional as F

from fer_nb import training
from fer_nb.artifacts import CLASSES, ArtifactError, FerError, GateError, UsageError
from fer_nb.augment import Augment, normalise_unit, unit_batch
from fer_nb.calibration import confusion, macro_f1
from fer_nb.callbacks import EMA, Mixup, TrainConfig, load_checkpoint, save_checkpoint, seed_everything
from fer_nb.geometry import Geometry
from fer_nb.integrity import VIEWS, check_alignment, load_softlabels
from fer_nb.leaves import seal_folder
from fer_nb.loading import FaceBatches, PackedFaces, eval_loader
from fer_nb.teachers import (
    ArcFaceHead,
    ArcFaceLoss,
    Teacher,
    add_margin,
    effective_number_weights,
    export_out_of_fold,
    export_softlabels,
    leave_out,
    load_pretrained,
    log_prior,
    make_backbone,
    margin_at,
    pool_out_of_fold,
    start_as_identity,
    start_from_stage_a,
)
from fer_nb.training import predict
from tests.conftest import ROOT

S, M = 30.0, 0.35


# ---- the margin ----

def longhand(cosine: float, s: float = S, m: float = M) -> float:
    "ArcFace's target logit for one cosine, by its definition."
    theta = math.acos(max(-1.0, min(1.0, cosine)))
    return s*(math.cos(theta + m) if theta < math.pi - m else math.cos(theta) - m*math.sin(math.pi - m))


ANGLES = [0.0, 1e-9, 1e-6, 1e-4, 0.01, 0.5, math.pi/2, 2.0, math.pi - M - 1e-4, math.pi - M + 1e-4, 3.0, math.pi - 1e-4, math.pi - 1e-9,
          math.pi]


@pytest.mark.parametrize("m", [0.0, 0.2, M, 1.0])
@pytest.mark.parametrize("s", [1.0, S, 64.0])
def test_add_margin_is_the_definition_in_float64(s, m):
    angles = torch.tensor([a for a in (*ANGLES, math.pi - m - 1e-6, math.pi - m + 1e-6) if 0 <= a <= math.pi], dtype=torch.float64)
    others = torch.linspace(-s, s, 6, dtype=torch.float64).expand(len(angles), 6)  # s cos at its limits too
    for column in (0, 3, 6):
        plain = torch.cat([others[:, :column], s*angles.cos()[:, None], others[:, column:]], 1)
        got = add_margin(plain, torch.full((len(angles),), column), s, m)
        assert got.dtype == torch.float64
        for i, a in enumerate(angles.tolist()):
            assert got[i, column].item() == pytest.approx(longhand(math.cos(a), s, m), abs=2e-6*s), a
        keep = [k for k in range(7) if k != column]
        torch.testing.assert_close(got[:, keep], plain[:, keep], rtol=1e-12, atol=1e-12)


def test_the_two_branches_meet_where_they_should():
    at = math.pi - M
    plain = torch.zeros(2, 7, dtype=torch.float64)
    plain[0, 0], plain[1, 0] = S*math.cos(at - 1e-7), S*math.cos(at + 1e-7)
    near, past = add_margin(plain, torch.zeros(2, dtype=torch.int64), S, M)[:, 0].tolist()
    assert near == pytest.approx(-S, abs=1e-4)  # cos(pi)
    assert past == pytest.approx(S*(math.cos(at) - M*math.sin(at)), abs=1e-4)


def plane_head(m: float = M) -> tuple[ArcFaceHead, nn.Parameter]:
    "A head of seven orthogonal weights of odd lengths, with one free direction (the eighth)."
    head = ArcFaceHead(8, s=S, m=m)
    with torch.no_grad(): head.weight.copy_(torch.eye(7, 8)*torch.arange(1, 8)[:, None])
    return head


@pytest.mark.parametrize("theta", ANGLES)
def test_the_head_at_an_angle(theta):
    e = torch.zeros(1, 8, dtype=torch.float64)
    e[0, 2], e[0, 7] = 5*math.cos(theta), 5*math.sin(theta)
    head, own = plane_head(), torch.tensor([2])
    with torch.no_grad(): plain, got = head(e)[0], head(e, own)[0]
    assert plain.dtype == got.dtype == torch.float32
    assert plain[2].item() == pytest.approx(S*math.cos(theta), abs=1e-4)
    assert got[2].item() == pytest.approx(longhand(math.cos(theta)), abs=1e-2 if theta < 0.05 else 1e-4)
    assert (got[[0, 1, 3, 4, 5, 6]] == 0).all()


@pytest.mark.parametrize("theta", [0.0, math.pi, 1e-8, math.pi - 1e-8])
def test_gradients_are_finite_at_the_poles(theta):
    head, e = plane_head(), torch.zeros(1, 8)
    e[0, 2], e[0, 7] = math.cos(theta), 0.0 if theta in (0.0, math.pi) else math.sin(theta)
    e.requires_grad_()
    F.cross_entropy(head(e, torch.tensor([2])), torch.tensor([2])).backward()
    assert torch.isfinite(e.grad).all() and torch.isfinite(head.weight.grad).all()
    plain = torch.full((2, 7), S, dtype=torch.float64).mul_(torch.tensor([[1.0], [-1.0]])).requires_grad_()
    add_margin(plain, torch.tensor([0, 0]), S, M).sum().backward()
    assert torch.isfinite(plain.grad).all()


vectors = hnp.arrays(np.float32, (3, 5), elements=st.floats(-100, 100, width=32))


@given(e=vectors, w=hnp.arrays(np.float32, (7, 5), elements=st.floats(-10, 10, width=32)),
       y=st.lists(st.integers(0, 6), min_size=3, max_size=3), m=st.floats(0, 1), k=st.floats(0.01, 1000))
@settings(max_examples=100)
def test_the_head_on_any_embedding(e, w, y, m, k):
    assume((np.linalg.norm(e, axis=1) > 1e-2).all() and (np.linalg.norm(w, axis=1) > 1e-2).all())
    head = ArcFaceHead(5, s=S, m=m)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(w))
        plain, got = head(torch.from_numpy(e)), head(torch.from_numpy(e), torch.tensor(y))
        scaled = head(torch.from_numpy(e)*k)
    assert plain.abs().max() <= S*(1 + 1e-6) and got.min() >= -S*(1 + m) - 1e-4 and got.max() <= S*(1 + 1e-6)
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-4)  # only the direction counts
    for i in range(3):
        for c in range(7):
            a, b = e[i].astype(float).tolist(), w[c].astype(float).tolist()
            cosine = sum(p*q for p, q in zip(a, b))/math.sqrt(sum(p*p for p in a))/math.sqrt(sum(q*q for q in b))
            assert plain[i, c].item() == pytest.approx(S*cosine, abs=1e-4)
            if c != y[i]:
                assert got[i, c].item() == pytest.approx(S*cosine, abs=1e-4)
            else:
                theta = math.acos(max(-1.0, min(1.0, cosine)))
                if abs(cosine - math.cos(math.pi - m)) < 1e-6: continue  # either branch, in float32
                pole = theta < 0.05 or theta > math.pi - 0.05  # there float32's sine is coarse
                assert got[i, c].item() == pytest.approx(longhand(cosine, S, m), abs=3e-2 if pole else 1e-3)


def test_evaluation_logits_carry_no_margin():
    seed_everything(1)
    teacher, x, y = Teacher("test_resnet", s=17.0, drop_rate=0.5), torch.randn(6, 3, 32, 32), torch.arange(6)
    teacher.eval()
    with torch.no_grad():
        e, w = teacher.backbone(x).double(), teacher.head.weight.double()
        expected = 17*(e/e.norm(dim=1, keepdim=True)) @ (w/w.norm(dim=1, keepdim=True)).T
        before = teacher(x)
    torch.testing.assert_close(before.double(), expected, rtol=0, atol=1e-4)
    for m in (0.0, 0.35, 1.2):
        loss = ArcFaceLoss(17.0, m, warmup=0, ramp=0)
        loss.at_step(50, 100)
        assert loss.margin == m
        z = teacher(x)
        with_grad = loss(z, y, None, None)
        with torch.no_grad():
            assert torch.equal(teacher(x), before)
            assert loss(before, y, None, None) == F.cross_entropy(before, y)
        assert (with_grad > F.cross_entropy(z, y)) == (m > 0)


# ---- schedules and class weights ----

@given(total=st.integers(1, 5000), m=st.floats(0, 1.5), warmup=st.floats(0, 0.9), ramp=st.floats(0, 0.9))
def test_the_margin_schedule(total, m, warmup, ramp):
    steps = np.unique(np.linspace(0, total, min(total + 1, 200)).astype(int))
    got = np.array([margin_at(int(s), total, m, warmup, ramp) for s in steps])
    assert (got[steps/total <= warmup] == 0).all() and (np.diff(got) >= 0).all()
    assert (got[steps/total >= warmup + max(ramp, 1e-9) + 1e-9] == m).all() and (got <= m).all()
    inside = (steps/total > warmup + 1e-9) & (steps/total < warmup + ramp - 1e-9)
    np.testing.assert_allclose(got[inside], m*(steps[inside]/total - warmup)/max(ramp, 1e-9), atol=1e-9)


@given(counts=st.lists(st.integers(1, 800), min_size=7, max_size=7), beta=st.sampled_from([0.9, 0.99, 0.999, 0.9999]))
@settings(max_examples=20)
def test_effective_number_weights_are_cui_s(counts, beta):
    raw = [1/sum(beta**j for j in range(n)) for n in counts]  # E_n is the sum of a geometric series
    np.testing.assert_allclose(effective_number_weights(counts, beta), np.array(raw)/(sum(raw)/7), rtol=1e-5)


@given(counts=st.lists(st.integers(1, 10**6), min_size=7, max_size=7), tau=st.floats(0, 2))
def test_log_prior_is_tau_times_log_of_the_share(counts, tau):
    np.testing.assert_allclose(log_prior(counts, tau), [tau*math.log(n/sum(counts)) for n in counts], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("f", [effective_number_weights, log_prior])
@pytest.mark.parametrize("k", range(7))
def test_a_class_without_rows_is_refused_by_name(f, k):
    counts = [9]*7
    counts[k] = 0
    with pytest.raises(UsageError, match=f"class '{CLASSES[k]}' has no training row"): f(counts)


# ---- mixup, averaged weights, interruptions ----

class Faces:
    "Noise in memory, with what a loader needs of a dataset."
    geometry = Geometry(size=32)
    def __init__(self, n=60):
        rng = np.random.default_rng(0)
        self.labels = np.arange(n) % 7
        self.images = np.clip(rng.integers(0, 90, (n, 32, 32)) + 22*self.labels[:, None, None], 0, 255).astype(np.uint8)
    def __len__(self): return len(self.images)
    def gather(self, index): return self.images[index]


class Record(Callback):
    "What each batch and each optimiser step saw; may stop the run in mid-epoch, as a lost machine would."
    order = 9  # after_cancel_step: before EMA's
    def __init__(self, stop=None): self.stop, self.batches, self.steps, self.averages, self.mixed_in_validation = stop, [], [], {}, []

    def before_fit(self): self.start = {k: v.clone() for k, v in self.model.state_dict().items()}
    def before_batch(self):
        if not self.training: self.mixed_in_validation.append((getattr(self.loss_func, "mixed", None), self.xb[0].clone()))
    def before_backward(self):
        at = self.learn.epoch_seed.first + self.epoch, self.iter
        if at == self.stop: raise ConnectionError("the machine is gone")
        self.batches.append((at, self.loss_func.margin, self.xb[0].clone(), self.loss_func.mixed))
    def after_cancel_step(self): self.steps.append({k: v.clone() for k, v in self.model.state_dict().items()})


class Snapshot(Callback):
    "The average at the end of each epoch."
    order = 55
    def __init__(self): self.at = {}
    def after_epoch(self):
        epoch = self.learn.epoch_seed.first + self.epoch
        self.at[epoch] = {k: v.clone() for k, v in self.learn.ema.state_dict().items()}


def fit(folder, extras=(), stop=None, epochs=4):
    seed_everything(5)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), ArcFaceHead(8*64))
    data, record = Faces(), Record(stop)
    training.train(net, FaceBatches(data, 12, train=True, seed=5, augment=Augment()), eval_loader(data, batch_size=32), ArcFaceLoss(),
                   TrainConfig(epochs, 3e-3, accumulate=2, warmup_epochs=1, seed=5), folder, {}, [record, *extras], bar=False)
    return record, net


def equal(a, b, path=""):
    "Two nested structures of tensors and numbers, bit for bit."
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a: equal(a[k], b[k], f"{path}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (p, q) in enumerate(zip(a, b)): equal(p, q, f"{path}.{i}")
    elif isinstance(a, torch.Tensor): assert torch.equal(a, b), path
    else: assert a == b, path


CASES = {"plain": lambda: [], "mixup": lambda: [Mixup(0.4, 5)], "ema": lambda: [EMA(0.5)], "both": lambda: [EMA(0.9), Mixup(0.4, 5)]}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop", [(1, 2), (2, 1)])
def test_a_run_stopped_in_mid_epoch_resumes_bit_equal(tmp_path, case, stop):
    whole, _ = fit(tmp_path/"whole", CASES[case]())
    with pytest.raises(ConnectionError): fit(tmp_path/"cut", CASES[case](), stop)
    done = len(load_checkpoint(tmp_path/"cut"/"checkpoint_last.pt", ("rows",))["rows"])
    assert done == stop[0]
    resumed, _ = fit(tmp_path/"cut", CASES[case]())
    a, b = (load_checkpoint(tmp_path/d/"checkpoint_last.pt") for d in ("whole", "cut"))
    for k in ("model", "optimizer", "callbacks", "step"): equal(a[k], b[k], k)
    assert ("ema" in a["callbacks"]) == (case in ("ema", "both"))
    equal(*(load_checkpoint(tmp_path/d/"best.pt") for d in ("whole", "cut")))
    tail = [x for x in whole.batches if x[0][0] >= done]
    equal(tail, resumed.batches, "batches")  # the same margins, pictures and mixes
    margins = [x[1] for x in whole.batches]
    assert margins[0] == 0 and margins[-1] == M and any(0 < m < M for m in margins)


def test_mixup_blends_pictures_and_labels_and_leaves_nothing_behind(tmp_path):
    record, _ = fit(tmp_path/"a", [Mixup(0.4, 5)], epochs=2)
    plain, _ = fit(tmp_path/"b", epochs=2)
    shares = []
    for (at, _, mixed_x, (rows, share)), (_, _, x, none) in zip(record.batches, plain.batches, strict=True):
        rng = np.random.default_rng([5, *at])
        expected, order = rng.beta(0.4, 0.4), rng.permutation(12)
        assert none is None and share == pytest.approx(expected) and torch.equal(rows, torch.from_numpy(order))
        torch.testing.assert_close(mixed_x, share*x + (1 - share)*x[torch.from_numpy(order)])
        shares.append(share)
    assert len(set(shares)) == len(shares) == 10 and all(0 <= s <= 1 for s in shares)
    clean = [x for x, *_ in eval_loader(Faces(), batch_size=32)]
    assert len(record.mixed_in_validation) == 4
    for i, (mixed, x) in enumerate(record.mixed_in_validation): assert mixed is None and torch.equal(x, clean[i % 2])


def test_the_loss_of_a_mixed_batch_is_of_both_labels():
    z = 30*F.normalize(torch.randn(5, 7, generator=torch.Generator().manual_seed(2)).double())
    z.requires_grad_()
    y, order, weights = torch.arange(5), torch.tensor([3, 3, 0, 2, 1]), torch.linspace(0.5, 2, 7)
    prior = log_prior([1, 2, 3, 4, 5, 6, 7])
    loss = ArcFaceLoss(S, M, weights, 0, 0, prior)
    loss.at_step(1, 1)
    loss.mixed = order, 0.3

    def cross_entropy(labels):
        total = norm = 0.0
        for i, label in enumerate(labels.tolist()):
            row = [longhand(v/S) if k == label else v for k, v in enumerate(z[i].tolist())]
            row = [v + p for v, p in zip(row, prior.tolist())]
            total += weights[label].item()*(math.log(sum(math.exp(v) for v in row)) - row[label])
            norm += weights[label].item()
        return total/norm

    assert loss(z, y, None, None).item() == pytest.approx(0.3*cross_entropy(y) + 0.7*cross_entropy(y[order]), abs=1e-4)


def test_the_average_is_timm_s_and_best_pt_holds_it(tmp_path):
    snapshot, ema = Snapshot(), EMA(0.6)
    record, net = fit(tmp_path, [ema, snapshot])
    average = {k: v.double() for k, v in record.start.items()}
    decays = []
    for t, weights in enumerate(record.steps, 1):
        d = 0.0 if t == 1 else min(0.6, 1 - (1 + (t - 1))**(-2/3))
        decays.append(d)
        average = {k: d*average[k] + (1 - d)*v.double() if v.is_floating_point() else v for k, v in weights.items()}
    assert len(record.steps) == 4*3 and 0 < decays[1] < 0.6 == decays[-1]  # 5 batches in windows of 2
    for k, v in load_checkpoint(tmp_path/"checkpoint_last.pt")["callbacks"]["ema"].items():
        torch.testing.assert_close(v.double(), average[k].double(), rtol=1e-5, atol=1e-6)
    best, rows = load_checkpoint(tmp_path/"best.pt"), load_checkpoint(tmp_path/"checkpoint_last.pt", ("rows",))["rows"]
    equal(best["model"], snapshot.at[best["meta"]["epoch"]], "best")
    assert not torch.equal(best["model"]["5.weight"], load_checkpoint(tmp_path/"checkpoint_last.pt")["model"]["5.weight"])
    net.load_state_dict(best["model"])
    z, y, _ = predict(net, eval_loader(Faces()))
    assert macro_f1(z, y) == pytest.approx(rows[best["meta"]["epoch"]]["valid_macro_f1"])  # judged by what is kept
    for d in (0.0, 1.0, -0.1):
        with pytest.raises(UsageError, match="EMA decay"): EMA(d)


# ---- backbones and their weights ----

def saved(path, name="test_resnet", seed=3, **kwargs):
    torch.manual_seed(seed)
    net = timm.create_model(name, num_classes=0, **kwargs)
    torch.save(net.state_dict(), path)
    return net


def test_weights_are_read_by_name_and_by_order(tmp_path):
    net = saved(tmp_path/"own.pth")
    foreign_names = {f"module_{i}": v for i, v in enumerate(net.state_dict().values())}
    torch.save(foreign_names, tmp_path/"renamed.pth")
    torch.save({**foreign_names, "fc.w": torch.zeros(1000, net.num_features), "fc.b": torch.zeros(1000)}, tmp_path/"classifier.pth")
    for file, how in (("own", "by name"), ("renamed", "by order"), ("classifier", "by order")):
        got, words = make_backbone("test_resnet", str(tmp_path/f"{file}.pth"))
        equal(got.state_dict(), net.state_dict())
        assert words.startswith(f"{file}.pth (sha256 ") and words.endswith(f"100% of the parameters, {how})")
        teacher = Teacher("test_resnet", weights=str(tmp_path/f"{file}.pth"))
        equal(teacher.backbone.state_dict(), net.state_dict())  # nothing is reset after loading
        assert teacher.weights_loaded == words


def test_foreign_and_broken_weights_are_refused_in_one_line(tmp_path):
    saved(tmp_path/"foreign.pth", "test_efficientnet")
    saved(tmp_path/"own.pth")
    whole = (tmp_path/"own.pth").read_bytes()
    for n in (0, 10, 1000, len(whole)//2, len(whole) - 1):
        (tmp_path/"cut.pth").write_bytes(whole[:n])
        with pytest.raises(GateError, match="cut.pth: no checkpoint of plain tensors") as e:
            make_backbone("test_resnet", str(tmp_path/"cut.pth"))
        assert "\n" not in str(e.value)
    (tmp_path/"cut.safetensors").write_bytes(whole[:999])
    for name, words in (("foreign.pth", "foreign to 'test_resnet'"), ("cut.safetensors", "no checkpoint of plain tensors")):
        with pytest.raises(GateError, match=words) as e: make_backbone("test_resnet", str(tmp_path/name))
        assert "\n" not in str(e.value)
    for odd in ({"epoch": 3, "conv1.weight": torch.zeros(2)}, {"epoch": 3, "weights": {"a": torch.zeros(2)}}, torch.zeros(3), [1]):
        torch.save(odd, tmp_path/"odd.pth")
        with pytest.raises(GateError, match="odd.pth: no checkpoint of plain tensors"):
            make_backbone("test_resnet", str(tmp_path/"odd.pth"))
    with pytest.raises(UsageError, match="is no file"): make_backbone("test_resnet", str(tmp_path/"nowhere.pth"))
    with pytest.raises(UsageError, match="unknown backbone"): make_backbone("RN1")


def test_a_network_is_untouched_by_refused_weights(tmp_path):
    saved(tmp_path/"foreign.pth", "test_efficientnet")
    net = timm.create_model("test_resnet", num_classes=0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(GateError): load_pretrained(net, str(tmp_path/"foreign.pth"), "test_resnet")
    equal(net.state_dict(), before)


def test_transformer_weights_of_another_image_size_are_resampled(tmp_path):
    small = saved(tmp_path/"vit.pth", "test_vit", img_size=64)
    got, words = make_backbone("test_vit", str(tmp_path/"vit.pth"), 96)
    assert "100% of the parameters, by name" in words and got.pos_embed.shape != small.pos_embed.shape
    p = small.num_prefix_tokens
    torch.testing.assert_close(got.pos_embed[:, :p], small.pos_embed[:, :p])
    for a, b in zip(*(n.pos_embed[:, p:].mean(1) for n in (got, small))): torch.testing.assert_close(a, b, rtol=0, atol=0.05)
    rest = {k: v for k, v in small.state_dict().items() if k != "pos_embed"}
    equal({k: got.state_dict()[k] for k in rest}, rest)
    assert got(torch.zeros(1, 3, 96, 96)).shape == (1, small.num_features)
    same, _ = make_backbone("test_vit", str(tmp_path/"vit.pth"), 64)
    assert torch.equal(same.pos_embed, small.pos_embed)


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("no weights")])
def test_auto_falls_back_to_scratch_and_says_so(monkeypatch, error):
    create = timm.create_model

    def offline(name, pretrained=False, **kwargs):
        if pretrained: raise error
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    teacher = Teacher("test_vit", weights="auto", img_size=32)
    assert teacher.weights_loaded == f"none: timm's weights could not be had ({type(error).__name__})"
    assert teacher.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", ["tf_efficientnet_b3", "mobilenetv3_small_050"])
def test_a_fresh_block_with_a_skip_is_the_identity(name):
    torch.manual_seed(0)
    net, blocks = timm.create_model(name, num_classes=0), []
    start_as_identity(net)
    for b in net.modules():
        if getattr(b, "has_skip", False): b.register_forward_hook(lambda m, x, y: blocks.append((x[0].clone(), y.clone())))
    with torch.no_grad(): net.eval()(torch.randn(2, 3, 48, 48))
    assert blocks
    for x, y in blocks: assert torch.equal(x, y)


def zeroed(model: nn.Module) -> list[bool]:
    "Whether the last batch norm of each block with a skip has no gain."
    blocks = [b for b in model.modules() if getattr(b, "has_skip", False)]
    return [not (b.bn3 if hasattr(b, "bn3") else b.bn2).weight.any() for b in blocks]


def test_every_teacher_from_scratch_starts_so_and_a_loaded_one_does_not(tmp_path):
    saved(tmp_path/"w.pth", "mobilenetv3_small_050")
    fresh, loaded = Teacher("mobilenetv3_small_050"), Teacher("mobilenetv3_small_050", weights=str(tmp_path/"w.pth"))
    assert zeroed(fresh) and all(zeroed(fresh)) and not any(zeroed(loaded))


@pytest.mark.parametrize(("arch", "width"), [
    ("resnet18", 512), ("tf_efficientnet_b3", 1536), ("tf_efficientnet_lite0", 1280), ("convnext_tiny", 768),
    ("vit_small_patch16_224", 384), ("mobilenetv3_large_100", 1280), ("vgg11", 4096)])
def test_the_head_fits_what_a_backbone_gives(arch, width):
    "Trained teachers keep the shapes that they have; backbones that widen behind their pooling can be trained as well."
    with torch.device("meta"):
        teacher = Teacher(arch).eval()
        assert teacher.head.weight.shape == (7, width) and teacher.backbone(torch.zeros(2, 3, 224, 224)).shape == (2, width)


# ---- a small dataset: stages, folds, export ----

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return training.embedded_data(tmp_path_factory.mktemp("embedded"), n=240, img_size=32)


@pytest.fixture(scope="module")
def data(folders): return training.open_data(*folders)


@pytest.fixture
def stage_a(tmp_path, data):
    "A finished stage A, made by the real loop."
    seed_everything(2)
    teacher = Teacher("test_resnet")
    meta = {"backbone": "test_resnet", "stage": "A", "dataset_index_id": data.dataset_index_id}
    training.train(teacher, FaceBatches(data.train, 64, train=True, seed=2), eval_loader(data.own_val), ArcFaceLoss(),
                   TrainConfig(1, 1e-3, warmup_epochs=0, seed=2), tmp_path/"a", meta, bar=False)
    seal_folder(tmp_path/"a", data.dataset_index_id)
    return tmp_path/"a"


def again(run, **meta):
    "The same run under another story, sealed again."
    ckpt = load_checkpoint(run/"best.pt")
    save_checkpoint(run/"best.pt", model=ckpt["model"], meta=ckpt["meta"] | meta)
    seal_folder(run, "any")


def test_stage_b_takes_over_stage_a_exactly(stage_a, data):
    torch.manual_seed(9)
    b = Teacher("test_resnet")
    before = b.head.weight.clone()
    guard = start_from_stage_a(b, stage_a, "test_resnet", data.dataset_index_id)
    best = load_checkpoint(stage_a/"best.pt")["model"]
    equal(dict(b.state_dict()), dict(best))
    assert guard.passed and guard.param_count_match_ratio == 1 and not torch.equal(before, b.head.weight)


def test_stage_b_of_another_size_resamples_a_transformer(tmp_path, data):
    a, b = Teacher("test_vit", img_size=32), Teacher("test_vit", img_size=64)
    meta = {"classes": list(CLASSES), "backbone": "test_vit", "stage": "A", "dataset_index_id": data.dataset_index_id}
    save_checkpoint(tmp_path/"best.pt", model=a.state_dict(), meta=meta)
    seal_folder(tmp_path, data.dataset_index_id)
    assert start_from_stage_a(b, tmp_path, "test_vit", data.dataset_index_id).param_count_match_ratio == 1
    assert b.backbone.pos_embed.shape[1] > a.backbone.pos_embed.shape[1] and torch.equal(a.head.weight, b.head.weight)


def test_what_is_no_finished_stage_a_of_this_network_and_dataset_is_refused(stage_a, data):
    def refused(error, words, arch="test_resnet", index=data.dataset_index_id):
        teacher = Teacher(arch)
        before = {k: v.clone() for k, v in teacher.state_dict().items()}
        with pytest.raises(error, match=words) as e: start_from_stage_a(teacher, stage_a, arch, index)
        equal(dict(teacher.state_dict()), before)
        assert "\n" not in str(e.value)

    refused(GateError, "was trained on .*, not on another: train stage A on this dataset", index="another")
    refused(GateError, "is 'test_resnet', stage B is 'test_efficientnet': give a run of the same backbone", arch="test_efficientnet")
    again(stage_a, backbone="resnet18")  # the same tensors, said to be of another network
    refused(GateError, "is 'resnet18', stage B is 'test_resnet'")
    again(stage_a, backbone="test_resnet", stage="B")
    refused(GateError, "is stage B: stage B starts from stage A")
    again(stage_a, stage="A")
    start_from_stage_a(Teacher("test_resnet"), stage_a, "test_resnet", data.dataset_index_id)
    whole = load_checkpoint(stage_a/"best.pt")
    save_checkpoint(stage_a/"best.pt", model=Teacher("test_resnet").state_dict(), meta=whole["meta"])  # whole, but another
    refused(ArtifactError, "best.pt.*was changed after its folder was sealed")
    (stage_a/"best.pt").write_bytes((stage_a/"best.pt").read_bytes()[:5000])
    seal_folder(stage_a, "any")
    refused(ArtifactError, "best.pt.*truncated")
    (stage_a/"hash_manifest.json").unlink()
    refused(ArtifactError, "a is unfinished; run its stage again")


def twins(data):
    "The data, with groups of two to five training rows said to be the same picture."
    rows, rng = data.train.rows.copy(), np.random.default_rng(4)
    order = rng.permutation(len(rows))
    for k in range(12):
        at = order[5*k:5*k + 2 + k % 4]
        rows.loc[at, "pixel_hash"] = f"twin{k}"
    return replace(data, train=PackedFaces(data.train.cache, rows))


@pytest.mark.parametrize("folds, seed", [(2, 0), (3, 1), (5, 2), (5, 1337)])
def test_folds_are_disjoint_whole_and_stratified(data, folds, seed):
    data = twins(data)
    parts = [leave_out(data, k, folds, seed) for k in range(folds)]
    everything = set(data.train.rows["id"])
    held = [set(h.rows["id"]) for _, h in parts]
    assert sum(map(len, held)) == len(everything) and set().union(*held) == everything
    totals = np.bincount(data.train.labels, minlength=7)
    for (kept, h), ids in zip(parts, held):
        assert set(kept.train.rows["id"]) == everything - ids and len(kept.train) + len(h) == len(everything)
        assert not set(kept.train.rows["pixel_hash"]) & set(h.rows["pixel_hash"])
        assert kept.val is data.val and kept.test is data.test and kept.dataset_index_id == data.dataset_index_id
        assert (np.abs(np.bincount(h.labels, minlength=7) - totals/folds) <= 5).all()  # a group has five rows at most
        np.testing.assert_array_equal(h.labels, [CLASSES.index(c) for c in h.rows["label"]])
    assert [set(leave_out(data, k, folds, seed)[1].rows["id"]) for k in range(folds)] == held
    assert [set(leave_out(data, k, folds, seed + 1)[1].rows["id"]) for k in range(folds)] != held


def test_no_folds_hold_out_the_validation_rows_and_wrong_ones_are_refused(data):
    with pytest.raises(UsageError, match="fold is 2, and folds is 0"): leave_out(data, 2, 0, 7)
    kept, held = leave_out(data, 0, 0, 1)
    assert kept is data and list(held.rows["id"]) == list(data.own_val.rows["id"])
    for fold, folds in ((5, 5), (-1, 5), (0, 1), (0, -2)):
        with pytest.raises(UsageError, match="give fold 0 to folds - 1"): leave_out(data, fold, folds, 1)
    with pytest.raises(UsageError, match="folds is 150: no class has so many training rows"): leave_out(data, 0, 150, 1)


def test_out_of_fold_confusions_are_pooled_and_no_fold_twice(data, tmp_path):
    seed_everything(3)
    teacher, counts, z, y = Teacher("test_resnet"), [], [], []
    for k in range(3):
        _, held = leave_out(data, k, 3, 7)
        counts.append(export_out_of_fold(teacher, held, tmp_path/str(k)))
        file = np.load(tmp_path/str(k)/"out_of_fold.npz")
        np.testing.assert_array_equal(file["ids"], held.rows["id"].to_numpy(str))
        z.append(file["logits"]); y.append(file["labels"])
    pooled = pool_out_of_fold([tmp_path/str(k) for k in range(3)])
    np.testing.assert_array_equal(pooled, sum(counts))
    np.testing.assert_array_equal(pooled, confusion(np.concatenate(z), np.concatenate(y)))
    assert pooled.sum() == len(data.train)
    with pytest.raises(GateError, match="hold out the same rows"): pool_out_of_fold([tmp_path/"0", tmp_path/"1", tmp_path/"0"])
    with pytest.raises(ArtifactError, match="is missing"): pool_out_of_fold([tmp_path/"0", tmp_path/"9"])


def rows_of(data):
    parts = (data.train, data.val, data.test)
    return (np.concatenate([p.rows[k].to_numpy(str) for p in parts]) for k in ("id", "sha256"))


def seeded_teacher():
    seed_everything(11)
    return Teacher("test_resnet")


EXPORT = """
import os, signal, sys, warnings
warnings.filterwarnings("ignore")
import torch
torch.set_num_threads(1)
from fer_nb import integrity, teachers, training
from tests.test_teachers import seeded_teacher

def die(f, call):
    "The function, until it is called for the call-th time."
    n = [0]
    def dying(*args, **kwargs):
        n[0] += 1
        if n[0] == call: os.kill(os.getpid(), signal.SIGKILL)
        return f(*args, **kwargs)
    return dying

data, teacher = training.open_data(sys.argv[1], sys.argv[2]), seeded_teacher()
for fault in sys.argv[4:]:
    child = os.fork()
    if not child:
        where, name, call = fault.split(":")
        module = {"teachers": teachers, "integrity": integrity}[where]
        setattr(module, name, die(getattr(module, name), int(call)))
        teachers.export_softlabels(teacher, data, f"{sys.argv[3]}/{fault.replace(':', '_')}", 2.5)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, fault
"""
FAULTS = ["teachers:predict:3", "teachers:save_softlabels:1", "integrity:write_npz:1", "integrity:write_text:1", "integrity:seal_folder:1"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or sys.platform != "linux", reason="processes are forked and killed on Linux only")
@pytest.mark.timeout(120)
def test_a_killed_export_leaves_nothing_that_the_gate_accepts(folders, data, tmp_path):
    ids, sha = rows_of(data)
    old = {f: tmp_path/f.replace(":", "_") for f in FAULTS[::2]}  # some of them stand over an older, finished export
    for folder in old.values(): export_softlabels(seeded_teacher(), data, folder, 1.0)
    p = subprocess.run([sys.executable, "-c", EXPORT, *map(str, folders), str(tmp_path), *FAULTS], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-2000:]
    assert (tmp_path/"integrity_seal_folder_1"/"softlabels"/"softlabels.npz").is_file()  # killed after the data, before the seal
    for fault in FAULTS:
        run = tmp_path/fault.replace(":", "_")
        with pytest.raises(FerError, match="unfinished|missing"): load_softlabels(run/"softlabels")
        report = check_alignment(run/"softlabels", ids, sha, data.dataset_index_id)
        assert not report.passed and report.notes, fault
        assert export_softlabels(seeded_teacher(), data, run, 2.5).passed
        assert check_alignment(run/"softlabels", ids, sha, data.dataset_index_id).passed
        assert load_softlabels(run/"softlabels").temperature == 2.5
    contents = [load_softlabels(tmp_path/f.replace(":", "_")/"softlabels").logits for f in FAULTS]
    assert all(np.array_equal(contents[0], c) for c in contents)


def test_an_export_holds_every_split_and_view_as_a_direct_forward_pass_gives_them(data, tmp_path):
    teacher = seeded_teacher()
    report = export_softlabels(teacher, data, tmp_path, 2.0, 30.0)
    ids, sha = rows_of(data)
    s = load_softlabels(tmp_path/"softlabels")
    assert report.passed and s.views == VIEWS and (s.temperature, s.scale) == (2.0, 30.0)
    np.testing.assert_array_equal(s.ids, ids)
    np.testing.assert_array_equal(s.sha256, sha)
    parts = {"train": data.train, "val": data.val, "test": data.test}
    assert s.splits.tolist() == [k for k, p in parts.items() for _ in range(len(p))]
    pixels = np.concatenate([p.gather(np.arange(len(p))) for p in parts.values()])
    batches = [unit_batch(torch.from_numpy(np.ascontiguousarray(x))) for x in (pixels, pixels[:, :, ::-1])]
    with torch.no_grad(): direct = [teacher.eval()(normalise_unit(x, data.geometry)) for x in batches]
    np.testing.assert_allclose(s.logits, torch.stack(direct, 1), atol=2e-4)
    assert np.abs(s.logits[:, 0] - s.logits[:, 1]).max() > 1e-2  # the views do differ
