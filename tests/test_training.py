"""A run that is killed at any step resumes to the same weights, bit for bit."""
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fer_nb import callbacks
from fer_nb.artifacts import GateError, UsageError
from fer_nb.callbacks import TrainConfig, choose_amp, load_checkpoint, seed_everything
from fer_nb.loading import FaceBatches, eval_loader
from fer_nb.records import TrainingHistory
from fer_nb.training import check_settings, resume_point, train
from tests.conftest import ROOT

RUN = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch
from torch.nn import functional as F
from fer_nb.geometry import Geometry
from fer_nb.augment import Augment
from fer_nb.loading import FaceBatches, eval_loader
from fer_nb.distillation import make_student
from fer_nb.synthetic import render_faces
from fer_nb.callbacks import TrainConfig, seed_everything
from fer_nb.training import train
from tests.test_training import Faces

torch.set_num_threads(1)
out, delay = sys.argv[1], float(sys.argv[2])
data = Faces(96)
class Slow:
    terms = {}
    def __call__(self, z, y, index, view):
        import time; time.sleep(delay)
        return F.cross_entropy(z, y)
seed_everything(7)
train(make_student(), FaceBatches(data, 16, train=True, seed=7, augment=Augment()), eval_loader(data), Slow(),
      TrainConfig(epochs=4, lr=1e-3, accumulate=2, warmup_epochs=1, seed=7), out, {"backbone": "mobilenetv3_large_100"}, bar=False)
"""


class Faces:
    "Embedded faces in memory, with what a loader needs of a dataset."
    def __init__(self, n):
        from fer_nb.geometry import Geometry
        from fer_nb.manifests import labels_of
        from fer_nb.synthetic import render_faces
        images, table = render_faces(n, size=32, seed=3)
        self.images, self.labels, self.geometry = images, labels_of(table), Geometry(size=32)
    def __len__(self): return len(self.images)
    def gather(self, index): return self.images[index]


def start(out, delay=0.0):
    return subprocess.Popen([sys.executable, "-c", RUN, str(out), str(delay)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(out):
    process = start(out)
    errors = process.communicate()[1].decode()
    assert process.returncode == 0, errors[-2000:]
    return load_checkpoint(out / "checkpoint_last.pt", ("model", "optimizer", "rows", "step"))


@pytest.mark.timeout(400)
def test_killed_at_a_random_step_and_resumed_is_bit_equal(tmp_path):
    whole = finish(tmp_path / "whole")
    process = start(tmp_path / "killed", delay=0.2)
    last = tmp_path / "killed" / "checkpoint_last.pt"
    while process.poll() is None and not (last.exists() and load_checkpoint(last, ("rows",))["rows"]): time.sleep(0.05)
    time.sleep(random.uniform(0.0, 2.0))  # somewhere inside a later epoch
    process.send_signal(signal.SIGKILL); process.wait()
    done = len(load_checkpoint(last, ("rows",))["rows"])
    assert 1 <= done < 4, "the kill came too late to prove anything"
    resumed = finish(tmp_path / "killed")
    assert resumed["step"] == whole["step"]
    for k, v in whole["model"].items(): assert torch.equal(v, resumed["model"][k]), k
    for i, state in whole["optimizer"]["state"].items():
        for k, v in state.items(): assert torch.equal(torch.as_tensor(v), torch.as_tensor(resumed["optimizer"]["state"][i][k])), (i, k)
    a, b = (load_checkpoint(tmp_path / d / "best.pt") for d in ("whole", "killed"))
    assert a["meta"] == b["meta"] and all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    kept = [np.load(tmp_path / d / "valid_logits.npz")["logits"] for d in ("whole", "killed")]
    np.testing.assert_array_equal(*kept)
    columns = ["train_loss", "valid_nll", "valid_macro_f1", "lr", "grad_norm"]
    rows = [[[r[c] for c in columns] for r in TrainingHistory.load(tmp_path / d).rows] for d in ("whole", "killed")]
    np.testing.assert_array_equal(*rows)
    cfg = TrainConfig(epochs=4, lr=1e-3, accumulate=2, warmup_epochs=1, seed=7)
    with pytest.raises(GateError, match="nothing left to train: 4 epochs are done"):
        resume_point(tmp_path / "killed", cfg, cfg.fingerprint())
    with pytest.raises(GateError, match="other settings"): resume_point(tmp_path / "killed", cfg, "another")


@pytest.mark.parametrize("amp, accumulate", [("no", 1), ("no", 4), ("bf16", 3)])
def test_every_precision_and_window_trains_with_float32_losses(tmp_path, amp, accumulate):
    seen = []

    def loss(z, y, index, view):
        seen.append(z.dtype)
        return F.cross_entropy(z, y)

    data = Faces(60)
    seed_everything(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 7))
    config = TrainConfig(epochs=2, lr=3e-3, accumulate=accumulate, amp=amp, warmup_epochs=0, seed=1)
    history = train(net, FaceBatches(data, 12, train=True, seed=1), eval_loader(data), loss, config, tmp_path, {}, bar=False)
    assert set(seen) == {torch.float32}
    assert history.rows[-1]["steps"] == 2 * -(-5 // accumulate)  # the last window is partial
    assert history.rows[-1]["train_loss"] < history.rows[0]["train_loss"]


def test_settings_that_came_later_leave_older_runs_their_fingerprint():
    first = "5ffd033a6d1bac2e329281bb335232a11ca8ecf1c34b911306ef3bcbf06dd012"  # of the defaults, before there was an optimiser to choose
    assert TrainConfig().fingerprint() == first
    old = TrainConfig(3, 1e-3, 0.01, 1.0, 2, 5.0, "bf16", 42, "cpu").fingerprint(stage="KD")
    assert old == "7aa95619ea10219b562f8894621a4e69c1596ba438d022a33d6484ece7fb0341"
    kinds = [TrainConfig(), TrainConfig(optimizer="sgd"), TrainConfig(best_by="nll"), TrainConfig(optimizer="sgd", momentum=0.8)]
    assert len({k.fingerprint() for k in kinds}) == 4


def small_net(seed=1):
    seed_everything(seed)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 7))


def ce(z, y, index, view): return F.cross_entropy(z, y)


@pytest.mark.parametrize("optimizer, lr", [("adamw", 3e-3), ("sgd", 0.05)])
def test_bf16_ends_within_noise_of_fp32(tmp_path, optimizer, lr):
    data, held = Faces(280), Faces(280)
    held.images = held.images[..., ::-1, :].copy()  # mirrored: other pixels

    def nll(amp, seed):
        config = TrainConfig(epochs=4, lr=lr, amp=amp, warmup_epochs=0, seed=seed, optimizer=optimizer)
        loader, folder = FaceBatches(data, 20, train=True, seed=seed), tmp_path / f"{amp}{seed}"
        return train(small_net(seed), loader, eval_loader(held), ce, config, folder, {}, bar=False).rows[-1]["valid_nll"]

    exact, half = (np.array([nll(amp, seed) for seed in range(4)]) for amp in ("no", "bf16"))
    assert (exact < np.log(7)).all() and (half < np.log(7)).all()  # both learn
    noise = exact.std(ddof=1)
    assert abs(half.mean() - exact.mean()) < 3*noise*np.sqrt(2/4) + 0.01, (exact, half)


def test_auto_precision_is_chosen_once_a_run(tmp_path, monkeypatch):
    seconds = {"no": 2.0, "bf16": 1.0}
    monkeypatch.setattr(callbacks, "step_seconds", lambda model, x, amp: seconds[amp])
    net, shape = small_net(), (4, 3, 32, 32)
    assert choose_amp("auto", net, shape) == "bf16"
    data = Faces(40)
    config = TrainConfig(epochs=1, amp="bf16", warmup_epochs=0)
    train(net, FaceBatches(data, 20, train=True, seed=1), eval_loader(data), ce, config, tmp_path, {}, bar=False)
    seconds["bf16"] = 3.0  # a busy moment
    assert choose_amp("auto", net, shape) == "no" and choose_amp("auto", net, shape, run_dir=tmp_path) == "bf16"
    assert choose_amp("no", net, shape, run_dir=tmp_path) == "no"  # what is asked for by name is done


@pytest.mark.parametrize("until", ["best.pt", "checkpoint_last.pt"])
def test_a_kill_beside_the_first_best_pt_leaves_a_run_that_can_be_trained(tmp_path, monkeypatch, until):
    "Killed before best.pt is written, and after it but before the first epoch stands in checkpoint_last.pt."
    data, config = Faces(40), TrainConfig(epochs=2, warmup_epochs=0, seed=1)
    def run(folder): train(small_net(), FaceBatches(data, 20, train=True, seed=1), eval_loader(data), ce, config, folder, {}, bar=False)
    run(tmp_path / "whole")
    save = callbacks.save_checkpoint

    def killed(path, **content):
        if path.name == until and content.get("rows", [1]): raise KeyboardInterrupt
        save(path, **content)

    monkeypatch.setattr(callbacks, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt): run(tmp_path / "killed")
    monkeypatch.undo()
    assert (tmp_path / "killed" / "best.pt").exists() == (until == "checkpoint_last.pt")
    check_settings(tmp_path / "killed", config)
    run(tmp_path / "killed")
    a, b = (load_checkpoint(tmp_path / d / "best.pt") for d in ("whole", "killed"))
    assert a["meta"] == b["meta"] and all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())


def test_a_warm_up_that_never_ends_is_refused(tmp_path):
    with pytest.raises(UsageError, match="warmup_epochs is -1"): TrainConfig(warmup_epochs=-1)
    with pytest.raises(UsageError, match="warmup_epochs is nan"): TrainConfig(warmup_epochs=float("nan"))
    with pytest.raises(UsageError, match="warmup_epochs is 2.5 of 2 epochs: the learning rate would never be reached"):
        check_settings(tmp_path, TrainConfig(epochs=2, warmup_epochs=2.5))
    for warmup in (0, 0.5, 2): check_settings(tmp_path, TrainConfig(epochs=2, warmup_epochs=warmup))
    assert callbacks.lr_factor(19, 20, 20) == 1  # all of the run warms up: the rate is reached in its last step


def test_weights_whose_last_checkpoint_was_not_kept_are_not_overwritten(tmp_path):
    data, config = Faces(40), TrainConfig(epochs=1, warmup_epochs=0, seed=1)
    (tmp_path / "best.pt").write_bytes(b"somebody's")
    with pytest.raises(GateError, match="holds weights that this would overwrite: give another folder"): check_settings(tmp_path, config)
    with pytest.raises(GateError, match="holds weights that this would overwrite"):
        train(small_net(), FaceBatches(data, 20, train=True, seed=1), eval_loader(data), ce, config, tmp_path, {}, bar=False)
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"] and (tmp_path / "best.pt").read_bytes() == b"somebody's"


def test_every_epochs_validation_logits_are_kept_and_best_follows_the_rule(tmp_path):
    data = Faces(140)
    history = train(small_net(), FaceBatches(data, 20, train=True, seed=1), eval_loader(data), ce,
                    TrainConfig(epochs=5, lr=5e-3, warmup_epochs=0, seed=1, best_by="nll"), tmp_path, {}, bar=False)
    kept = np.load(tmp_path / "valid_logits.npz")
    assert kept["logits"].shape == (5, 140, 7) and kept["logits"].dtype == np.float16 and np.array_equal(kept["labels"], data.labels)
    nll = [float(F.cross_entropy(torch.from_numpy(z.astype(np.float32)), torch.from_numpy(data.labels))) for z in kept["logits"]]
    np.testing.assert_allclose(nll, [r["valid_nll"] for r in history.rows], atol=2e-3)
    assert history.best_by == "nll" and history.best_epoch == int(np.argmin([r["valid_nll"] for r in history.rows]))
    assert load_checkpoint(tmp_path / "best.pt")["meta"]["epoch"] == history.best_epoch


def test_faces_grow_and_the_history_says_so(tmp_path):
    data = Faces(60)
    loader = FaceBatches(data, 20, train=True, seed=1, sizes=[[0, 16], [1, 24], [3, 32]])
    seen = []

    class Look(nn.Module):
        def __init__(self): super().__init__(); self.net = small_net()
        def forward(self, x):
            if self.training: seen.append(x.shape[-1])
            return self.net(x)

    rows = train(Look(), loader, eval_loader(data), ce, TrainConfig(epochs=4, warmup_epochs=0, seed=1), tmp_path, {}, bar=False).rows
    assert seen == [16]*3 + [24]*6 + [32]*3 and [r["size"] for r in rows] == [16, 24, 24, 32]
