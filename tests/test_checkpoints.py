"""A foreign checkpoint builds no other network than one of ours, fetches nothing, and takes no memory that its weights don't fill."""
import builtins
import os
import socket

import pytest
import torch

from fer_nb.artifacts import CLASSES, GateError
from fer_nb.callbacks import load_checkpoint, save_checkpoint
from fer_nb.students import load_model
from fer_nb.teachers import Teacher

META = {"classes": list(CLASSES), "backbone": "resnet18", "head": "arcface", "scale": 30.0, "geometry": {"size": 32}, "model_args": {}}


@pytest.fixture(scope="module")
def weights(): return Teacher("RN18", img_size=32).state_dict()


STEERED = {"url": {"model_args": {"pretrained": True, "pretrained_cfg": {"url": "http://127.0.0.1:9/w.pth"}}},
           "overlay": {"model_args": {"pretrained_cfg_overlay": {"file": "/etc/passwd"}}},
           "path": {"model_args": {"checkpoint_path": "/etc/passwd"}},
           "hub": {"backbone": "hf-hub:someone/something"}, "local": {"backbone": "local-dir:/tmp"}, "dots": {"backbone": "../../resnet18"},
           "layer": {"model_args": {"act_layer": "os.system"}}, "width": {"model_args": {"base_width": 10**9}},
           "size": {"geometry": {"size": 10**7}}, "nothing": {"geometry": {}}, "stride": {"stem_stride": "2; id"},
           "type": {"model_args": [1]},
           "scale": {"scale": float("nan")}, "class": {"classes": CLASSES[::-1]}, "names": {"classes": 7}, "head": {"head": ["arcface"]}}


@pytest.mark.parametrize("name", STEERED)
def test_a_meta_that_steers_is_refused_and_nothing_is_fetched(name, weights, tmp_path, monkeypatch):
    save_checkpoint(tmp_path/"best.pt", model=weights, meta=META | STEERED[name])
    def no(*a, **k): raise AssertionError("a connection was opened")
    monkeypatch.setattr(socket.socket, "connect", no)
    opened, real = [], builtins.open
    monkeypatch.setattr(builtins, "open", lambda f, *a, **k: (opened.append(str(f)), real(f, *a, **k))[1])
    with pytest.raises(GateError, match="best.pt") as e: load_model(tmp_path/"best.pt")
    assert str(e.value).count("\n") == 0 and "/etc/passwd" not in opened


@pytest.mark.parametrize("args", [{"base_width": 4096}, {"output_stride": 8, "base_width": 8000}])
def test_a_network_that_its_weights_do_not_fill_is_not_built(args, weights, tmp_path):
    save_checkpoint(tmp_path/"best.pt", model=weights, meta=META | {"backbone": "resnet50", "model_args": args})
    with pytest.raises(GateError): load_model(tmp_path/"best.pt")


def test_code_in_a_checkpoint_does_not_run(weights, tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f"touch {tmp_path}/ran",)
    torch.save({"model": weights, "meta": META | {"note": Evil()}}, tmp_path/"best.pt")
    with pytest.raises(GateError, match="no checkpoint of plain tensors"): load_checkpoint(tmp_path/"best.pt")
    assert not (tmp_path/"ran").exists()


def test_a_transformer_loads(tmp_path):
    "Its first stride is the side of its patches."
    small = {"embed_dim": 48, "depth": 1, "num_heads": 3}
    teacher = Teacher("VIT", img_size=32, model_args=small)
    assert teacher.stem_stride == 16
    save_checkpoint(tmp_path/"best.pt", model=teacher.state_dict(), meta=META | {
        "backbone": "vit_small_patch16_224", "model_args": small, "stem_stride": teacher.stem_stride})
    assert load_model(tmp_path/"best.pt")[1]["stem_stride"] == 16


def test_ours_load_as_before(weights, tmp_path):
    save_checkpoint(tmp_path/"best.pt", model=weights, meta=META | {"amp": "no", "epoch": 3, "framing": None, "valid_macro_f1": 0.5})
    model, meta = load_model(tmp_path/"best.pt")
    assert meta["epoch"] == 3 and all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    save_checkpoint(tmp_path/"best.pt", model={**weights, "head.weight": [1]}, meta=META)
    with pytest.raises(GateError, match="head.weight"): load_checkpoint(tmp_path/"best.pt")
