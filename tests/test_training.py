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

from fer_nb.artifacts import GateError, TrainingHistory
from fer_nb.images import FaceBatches, eval_loader
from fer_nb.training import TrainConfig, load_checkpoint, resume_point, seed_everything, train
from tests.conftest import ROOT

RUN = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch
from torch.nn import functional as F
from fer_nb.geometry import Geometry
from fer_nb.images import Augment, FaceBatches, eval_loader
from fer_nb.students import make_student
from fer_nb.synthetic import render_faces
from fer_nb.training import TrainConfig, seed_everything, train
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
        from fer_nb.calibration import labels_of
        from fer_nb.geometry import Geometry
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
    while not last.exists() and process.poll() is None: time.sleep(0.05)
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
