"""TensorBoard gets what history.csv holds, also after an interruption; without it one line says what to install."""
import importlib.util
import math
from itertools import product

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fer_nb.artifacts import GateError
from fer_nb.callbacks import TrainConfig, seed_everything
from fer_nb.cli import main
from fer_nb.loading import FaceBatches, eval_loader
from fer_nb.scalars import Scalars, scalars_of
from fer_nb.training import train
from tests.test_training import Faces

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="pip install 'fer_nb[tensorboard]'")


def fit(folder, epochs):
    torch.manual_seed(3)
    seed_everything(7)
    data, model = Faces(28), nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 7))
    return train(model, FaceBatches(data, 14, train=True, seed=7), eval_loader(data), lambda z, y, index, view: F.cross_entropy(z, y),
                 TrainConfig(epochs=epochs, lr=1e-3, warmup_epochs=0, seed=7), folder, {"backbone": "linear"}, [Scalars(folder)], bar=False)


def written(folder):
    "Step -> numbers, as TensorBoard reads them."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder/"tensorboard"))
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


@needs_tensorboard
def test_curves_are_the_history_also_of_a_run_that_went_on(tmp_path):
    fit(tmp_path, 2)
    assert set(written(tmp_path)["train/loss"]) == {1, 2}
    fit(tmp_path, 4)
    rows, curves = pd.read_csv(tmp_path/"history.csv"), written(tmp_path)
    for name, column in (("train/loss", "train_loss"), ("valid/macro_f1", "valid_macro_f1"), ("run/lr", "lr")):
        assert curves[name] == {e + 1: pytest.approx(v, rel=1e-6) for e, v in zip(rows["epoch"], rows[column])}, name
    assert len(list((tmp_path/"tensorboard").iterdir())) == 1 and len(rows) == 4


def test_without_tensorboard_it_is_one_line(tmp_path, monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else there(name, *a))
    with pytest.raises(GateError, match=r"pip install 'fer_nb\[tensorboard\]'"): Scalars(tmp_path)
    for stage, asked in product(("student", "teacher"), (["--tensorboard"], ["-p", "tensorboard", "true"])):
        assert main([stage, "train", "--out", str(tmp_path/"run"), *asked]) == 1
        assert capsys.readouterr().err == "fer-nb: TensorBoard was asked for and is not installed: pip install 'fer_nb[tensorboard]'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("asked", "got"), [("", {}), ("--tensorboard", {"tensorboard": True}),
                                            ("-p tensorboard true", {"tensorboard": True}),
                                            ("--tensorboard -p tensorboard false", {"tensorboard": False})])
@pytest.mark.parametrize("stage", ["student", "teacher"])
def test_the_flag_is_the_notebooks_parameter(stage, asked, got, monkeypatch):
    seen = []
    monkeypatch.setattr("fer_nb.cli._stage", lambda name, out, parameters: seen.append(parameters))
    assert main([stage, "train", *asked.split()]) == 0
    assert {k: v for k, v in seen[0].items() if k == "tensorboard"} == got


def test_only_finite_numbers_are_curves():
    row = {"epoch": 0, "train_loss": math.nan, "valid_nll": 1, "size": None, "note": "x", "whole": True}
    assert scalars_of(row) == {"valid/nll": 1.0}
