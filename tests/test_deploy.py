"""The predictor: the same answers from .onnx and .pt and without this package; every refusal in one line; providers that tell the truth."""
import functools
import json
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from datetime import UTC, datetime
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fer_nb import deploy, geometry
from fer_nb.artifacts import CLASSES, ArtifactError, FerError, GateError, UsageError, sha256_file
from fer_nb.calibration import softmax
from fer_nb.callbacks import save_checkpoint
from fer_nb.deploy import SHIPPED, Predictor, prepared, probabilities, read_class_values, write_class_values
from fer_nb.distillation import STUDENT_BACKBONE, make_student
from fer_nb.geometry import Crop, Framing, Geometry, Sight, normalise, prepare_face
from fer_nb.leaves import seal_folder
from fer_nb.records import Calibration
from fer_nb.synthetic import render_faces
from tests.conftest import ROOT, picture

GEOMETRY = Geometry(size=48, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
HAAR = Sight(detector="haar", seen=100, found=90, ratio=(0.8, 0.9, 1.0, 1.1, 1.2), dx=0.02)
FRAMING = Framing(sights=[HAAR], crops={"expw": Crop(1.2)}, seed=3)


def calibration(index="demo-0", t=1.7, of=None):
    "A temperature, fitted to the checkpoint `of`."
    return Calibration(model_name="a student", dataset_index_id=index, selected_temperature=t, grid=[t], at_grid_bound=False, seed=0,
                       metrics=dict(NLL=[1.0], ECE=[0.1], macro_f1=[0.5]), calibration_date=datetime.now(UTC).isoformat(),
                       checkpoint_sha256=sha256_file(of) if of else "")


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    "A student of random weights whose answers differ from face to face; calibrated and sealed."
    folder = tmp_path_factory.mktemp("runs") / "student"
    torch.manual_seed(0)
    model = make_student()
    x = torch.from_numpy(normalise(prepared(faces(64, seed=9), GEOMETRY), GEOMETRY))
    with torch.no_grad():
        for _ in range(40): model.train()(x)  # the statistics of batch normalisation
        z = model.eval()(x)
        model.classifier.weight *= 0.4/z.std(0)[:, None]
        model.classifier.bias.copy_(-0.4*z.mean(0)/z.std(0))
    meta = {"classes": list(CLASSES), "backbone": STUDENT_BACKBONE, "head": "linear"}
    meta |= {"geometry": GEOMETRY.to_dict(), "framing": FRAMING.to_dict(), "dataset_index_id": "demo-0"}
    save_checkpoint(folder / "best.pt", model=model.state_dict(), meta=meta)
    calibration().save(folder)
    seal_folder(folder, "demo-0")
    return folder


@pytest.fixture(scope="session")
def exported(run_dir, tmp_path_factory):
    from fer_nb.exporting import export_model
    out = tmp_path_factory.mktemp("onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_model(run_dir, out, ("fp32",))
    return out / "model_fp32.onnx"


@pytest.fixture
def copy_of(exported, tmp_path):
    "A function that writes a copy of the model with changed metadata."
    def make(name="model_fp32.onnx", edit=None, **metadata):
        model = onnx.load(exported)
        said = {p.key: p.value for p in model.metadata_props} | {f"fer_nb.{k}": v for k, v in metadata.items()}
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, {k: v for k, v in said.items() if v is not None})
        if edit: edit(model)
        onnx.save(model, tmp_path / name)
        return tmp_path / name
    return make


@functools.cache
def rendered(): return render_faces(48, size=96, seed=7)[0][..., ::-1]


def faces(n, seed=0):
    "Embedded faces, BGR, of any shape."
    rng = np.random.default_rng(seed)
    return [cv2.resize(rendered()[i], tuple(int(v) for v in rng.integers(30, 130, 2))) for i in rng.integers(0, 48, n)]


# ---- the same answers, whichever way ----

def test_onnx_and_pt_agree_and_carry_the_same_facts(exported, run_dir):
    a, b, images = Predictor(exported), Predictor(run_dir / "best.pt"), faces(24)
    for name in ("geometry", "temperature", "name", "checkpoint_sha256", "dataset_index_id"): assert getattr(a, name) == getattr(b, name)
    assert a.geometry == GEOMETRY and a.temperature == 1.7 and a.framing == b.framing == FRAMING
    assert a.crop_for(SimpleNamespace(name="haar")) == (Crop(0.9, 0.02, wide=1.0), "")
    batch = prepared(images, GEOMETRY)
    assert np.abs(a.logits(batch) - b.logits(batch)).max() <= 1e-4
    np.testing.assert_allclose(a(images), b(images), atol=1e-5)
    assert len(set(a(images).argmax(1))) > 1 and a(images).std(0).max() > 0.01  # the answers depend on the faces


def test_probabilities_are_the_softmax_over_temperature_plus_bias(exported):
    p, batch = Predictor(exported), prepared(faces(5), GEOMETRY)
    np.testing.assert_allclose(p.from_prepared(batch), softmax(p.logits(batch), 1.7), atol=1e-12)
    np.testing.assert_allclose(p(faces(5)), p.from_prepared(batch), atol=1e-12)
    bias = np.linspace(-0.5, 0.5, 7)
    q = p.with_bias(bias)
    np.testing.assert_allclose(q.from_prepared(batch), softmax(p.logits(batch).astype(float)/1.7 + bias), atol=1e-12)
    assert not p.bias.any() and p.from_prepared(batch).dtype == np.float64


def test_colour_order(exported):
    p, images = Predictor(exported), faces(6)
    turned = [i[..., ::-1] for i in images]
    np.testing.assert_array_equal(p(images), p(turned, order="RGB"))
    assert np.abs(p(images) - p(turned)).max() > 1e-3
    grey = [picture(i, 70) for i in range(3)]
    np.testing.assert_array_equal(p(grey), p([cv2.cvtColor(g, cv2.COLOR_GRAY2BGR) for g in grey]))


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 200])
def test_any_number_of_faces(exported, n):
    p, batch = Predictor(exported), np.random.default_rng(n).integers(0, 256, (n, 48, 48, 3), dtype=np.uint8)
    got = p.from_prepared(batch)
    assert got.shape == (n, 7) and p.logits(batch).dtype == np.float32
    np.testing.assert_allclose(got.sum(1), 1)
    at = list(range(0, n, 31))
    for i in at: np.testing.assert_allclose(got[i], p.from_prepared(batch[i:i + 1])[0], atol=1e-5)


def test_no_pictures_and_one_as_a_batch(exported):
    p = Predictor(exported)
    assert p([]).shape == (0, 7) and p(np.zeros((0, 9, 9, 3), np.uint8)).shape == (0, 7)
    np.testing.assert_allclose(p(np.stack([picture(1, 40, True)]*2)), p([picture(1, 40, True)]*2))


@settings(max_examples=40)
@given(hnp.arrays(np.float64, (3, 7), elements=st.floats(-1e4, 1e4)), st.floats(0.05, 20),
       hnp.arrays(np.float64, 7, elements=st.floats(-0.5, 0.5)))
def test_probabilities_are_probabilities(z, t, bias):
    p = probabilities(z, t, bias)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)
    assert (p >= 0).all()
    np.testing.assert_allclose(p, probabilities(z + 3.0, t, bias), atol=1e-6)


# ---- refusals ----

def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(w in text for w in words), text


@pytest.mark.parametrize("change, words", [
    (dict(schema=None), ("fer_nb.schema", "make it with 'fer-nb export CHECKPOINT'")),
    (dict(schema="2"), ("fer_nb.schema", "expected 1", "got 2")),
    (dict(classes=json.dumps(sorted(CLASSES))), ("fer_nb.classes", "another class order")),
    (dict(classes=json.dumps([*CLASSES, "Contempt"])), ("fer_nb.classes", "another class order")),
    (dict(classes="Angry, Disgust"), ("fer_nb.classes", "is not JSON")),
    (dict(geometry=None), ("fer_nb.geometry", "is not there")),
    (dict(geometry=json.dumps({k: v for k, v in GEOMETRY.to_dict().items() if k != "margin"})), ("margin is missing",)),
    (dict(geometry=json.dumps(GEOMETRY.to_dict() | {"gamma": 1})), ("gamma is unknown",)),
    (dict(geometry=json.dumps(GEOMETRY.to_dict() | {"colour_order": "BGR"})), ("wrong colour_order",)),
    (dict(geometry=json.dumps(GEOMETRY.to_dict() | {"interpolation": "lanczos"})), ("wrong interpolation",)),
    (dict(geometry="[]"), ("is no geometry",)),
    (dict(geometry=json.dumps(GEOMETRY.to_dict() | {"size": 64})), ("another input or output", "64")),
    (dict(temperature="0"), ("fer_nb.temperature", "above 0")),
    (dict(temperature="NaN"), ("fer_nb.temperature",)),
    (dict(temperature="true"), ("fer_nb.temperature",)),
    (dict(temperature="-Infinity"), ("fer_nb.temperature",)),
    (dict(checkpoint_sha256=None), ("fer_nb.checkpoint_sha256", "is not there")),
    (dict(dataset_index_id=""), ("fer_nb.dataset_index_id", "is not there")),
    (dict(model_name=None), ("fer_nb.model_name", "is not there")),
])
def test_metadata_that_are_refused(copy_of, change, words):
    with pytest.raises(ArtifactError) as e: Predictor(copy_of(**change))
    one_line(e, "model_fp32.onnx", *words)


def test_a_fixed_batch_is_refused(copy_of):
    def fix(model):
        for v in (*model.graph.input, *model.graph.output): v.type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(ArtifactError) as e: Predictor(copy_of(edit=fix))
    one_line(e, "another input or output", "[N, 3, 48, 48]")


@pytest.mark.parametrize("data", [b"", b"\x00"*100, b"not a model", None, "half"])
def test_corrupt_files(exported, tmp_path, data, capfd):
    path = tmp_path / "model_fp32.onnx"
    whole = exported.read_bytes()
    if data == "half": path.write_bytes(whole[:len(whole)//2])
    elif data is not None: path.write_bytes(data)
    with pytest.raises(ArtifactError) as e: Predictor(path)
    one_line(e, "model_fp32.onnx")
    assert capfd.readouterr() == ("", "")  # onnxruntime says nothing of its own


@pytest.mark.parametrize("seed", range(6))
def test_a_changed_byte_never_ends_in_a_traceback_of_another_kind(exported, tmp_path, seed):
    data, rng = bytearray(exported.read_bytes()), np.random.default_rng(seed)
    for at in rng.integers(0, 3000 if seed % 2 else len(data), 40): data[at] = rng.integers(256)
    (tmp_path / "m.onnx").write_bytes(data)
    try: Predictor(tmp_path / "m.onnx")(faces(2))
    except FerError as e: assert "\n" not in str(e)


def test_names_that_are_refused(tmp_path, exported):
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "face.png", "is no model"), (".", "is a folder")):
        with pytest.raises(UsageError) as e: Predictor(path)
        one_line(e, words)
    for name in ("none.onnx", "none.pt"):
        with pytest.raises(ArtifactError) as e: Predictor(tmp_path / name)
        one_line(e, name, "is missing")
    with pytest.raises(UsageError) as e: Predictor(exported, threads=-1)
    one_line(e, "threads")


def test_checkpoints_that_are_refused(run_dir, tmp_path):
    ckpt = torch.load(run_dir / "best.pt", weights_only=True)
    save_checkpoint(tmp_path / "best.pt", **ckpt)
    with pytest.raises(ArtifactError) as e: Predictor(tmp_path / "best.pt")
    one_line(e, "calibration.json", "is missing", "let its run finish")
    calibration("another-1", of=tmp_path / "best.pt").save(tmp_path)
    with pytest.raises(ArtifactError) as e: Predictor(tmp_path / "best.pt")
    one_line(e, "belongs to another checkpoint", "another-1")
    calibration().save(tmp_path)
    with pytest.raises(ArtifactError) as e: Predictor(tmp_path / "best.pt")
    one_line(e, "names no weights, and no seal holds it together with best.pt")
    calibration(of=tmp_path / "best.pt").save(tmp_path)
    assert Predictor(tmp_path / "best.pt")(faces(1)).shape == (1, 7)
    save_checkpoint(tmp_path / "other.pt", **ckpt | {"meta": ckpt["meta"] | {"stage": "KD"}})  # CE's weights beside KD's temperature
    calibration(of=tmp_path / "other.pt").save(tmp_path)
    with pytest.raises(ArtifactError) as e: Predictor(tmp_path / "best.pt")
    one_line(e, "calibration.json", "was fitted to other weights than best.pt")
    calibration(of=tmp_path / "best.pt").save(tmp_path)
    seal_folder(tmp_path, "demo-0")
    calibration(t=2.5).save(tmp_path)  # changed after it was sealed
    with pytest.raises(ArtifactError) as e: Predictor(tmp_path / "best.pt")
    one_line(e, "calibration.json", "was changed after its folder was sealed")
    del ckpt["meta"]["geometry"]["clahe"]
    save_checkpoint(tmp_path / "best.pt", **ckpt)
    (tmp_path / "hash_manifest.json").unlink()
    calibration(of=tmp_path / "best.pt").save(tmp_path)
    with pytest.raises(ArtifactError) as e: Predictor(tmp_path / "best.pt")
    one_line(e, "clahe is missing")
    lacking = {k: v for i, (k, v) in enumerate(ckpt["model"].items()) if i % 8}
    save_checkpoint(tmp_path / "best.pt", model=lacking, meta=ckpt["meta"])  # seven eighths of the weights: the rest would be random
    with pytest.raises(GateError) as e: Predictor(tmp_path / "best.pt")
    one_line(e, "is not all of 'mobilenetv3_large_100'", "missing: ")
    (tmp_path / "best.pt").write_bytes(b"nothing")
    with pytest.raises(ArtifactError) as e: Predictor(tmp_path / "best.pt")
    one_line(e, "best.pt", "truncated")


def test_pictures_that_are_refused(exported):
    p = Predictor(exported)
    for images in ([np.zeros((9, 9, 4), np.uint8)], [np.zeros((9, 9, 3))], [np.zeros((0, 9, 3), np.uint8)], [None], picture(0, 9, True)):
        with pytest.raises(UsageError): p(images)
    for batch in (np.zeros((2, 48, 48), np.uint8), np.zeros((2, 3, 48, 48), np.uint8), np.zeros((2, 48, 48, 3), np.float32)):
        with pytest.raises(UsageError, match="expected prepared faces"): p.from_prepared(batch)
    with pytest.raises(UsageError, match="order"): p(faces(1), order="bgr")


def test_logits_that_are_not_finite_are_refused(copy_of):
    def spoil(model):
        last = [t for t in model.graph.initializer if list(t.dims) == [7]][0]
        last.CopyFrom(onnx.numpy_helper.from_array(np.full(7, np.inf, np.float32), last.name))
    with pytest.raises(GateError, match="not finite"): Predictor(copy_of(edit=spoil))(faces(1))


# ---- providers ----

def test_provider_names(exported, monkeypatch):
    assert Predictor(exported, "cpu").provider == Predictor(exported, "CPUExecutionProvider").provider == "CPUExecutionProvider"
    for name, words in (("GPU", "no provider 'GPU'"), ("CUDAExecutionProvidor", "did you mean CUDAExecutionProvider?"), ("", "''")):
        with pytest.raises(UsageError) as e: Predictor(exported, name)
        one_line(e, words)
    monkeypatch.setattr(deploy.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError) as e: Predictor(exported, "cuda")
    one_line(e, "CUDAExecutionProvider is not in this installation", "has CPUExecutionProvider")


@pytest.mark.skipif("CUDAExecutionProvider" in deploy.ort.get_available_providers(), reason="CUDA is really there")
def test_a_provider_that_onnxruntime_replaces_is_refused(exported, monkeypatch):
    here = deploy.ort.get_available_providers()
    monkeypatch.setattr(deploy.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", *here])  # it only says so
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(GateError) as e: Predictor(exported, "CUDAExecutionProvider")
    one_line(e, "CPUExecutionProvider took the place of CUDAExecutionProvider")


@pytest.mark.skipif("AzureExecutionProvider" not in deploy.ort.get_available_providers(), reason="this build has no AzureExecutionProvider")
def test_a_provider_that_stands_first_and_computes_nothing_is_refused(exported):
    with pytest.raises(GateError) as e: Predictor(exported, "AzureExecutionProvider")
    one_line(e, "AzureExecutionProvider computes 0 of")


def test_pt_runs_on_the_cpu_only(run_dir, monkeypatch):
    monkeypatch.setattr(deploy.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(UsageError, match="export it to run it with CUDAExecutionProvider"): Predictor(run_dir / "best.pt", "cuda")


def test_torch_keeps_its_threads(run_dir):
    before = torch.get_num_threads()
    Predictor(run_dir / "best.pt", threads=before + 1)(faces(1))
    assert torch.get_num_threads() == before


# ---- class values and bias ----

def test_bias_beside_the_model(copy_of):
    path = copy_of()
    plain = Predictor(path)(faces(3))
    assert write_class_values(path.parent / "logit_bias.json", {"Happy": 0.5, "Sad": -0.25}, -0.5, 0.5) == 1
    p = Predictor(path)
    np.testing.assert_array_equal(p.bias, [0, 0, 0, 0.5, -0.25, 0, 0])
    odds = p(faces(3))[:, 3]/p(faces(3))[:, 4] / (plain[:, 3]/plain[:, 4])
    np.testing.assert_allclose(odds, np.exp(0.75))
    p.bias = {"Fear": 0.1}
    assert p.bias[2] == 0.1 and p.bias.sum() == 0.1
    for wrong in ({"Fear": 0.51}, {"Joy": 0}, [0]*6, {"Fear": "much"}, np.full(7, np.nan)):
        with pytest.raises(UsageError): p.bias = wrong
    with pytest.raises(ValueError): p.bias[0] = 3
    assert p.bias[2] == 0.1


@pytest.mark.parametrize("text, words", [
    ('{"Happy": 0.6}', "Happy is 0.6"), ('{"Joy": 0.1}', "'Joy', which is no class"), ('{"Happy": "x"}', "is no list of numbers"),
    ('{"schema_version": 1, "values": {"Happy": 0.1}', "is not whole JSON"), ("[1]", "is foreign"),
    ('{"schema_version": 9, "values": {}}', "newer fer_nb"), ('{"schema_version": 1, "version": 0, "values": {}}', "version"),
])
def test_bias_files_that_are_refused(copy_of, text, words):
    path = copy_of()
    (path.parent / "logit_bias.json").write_text(text)
    with pytest.raises(ArtifactError) as e: Predictor(path)
    one_line(e, "logit_bias.json", words)


def test_class_values_keep_their_history(tmp_path):
    path = tmp_path / "thresholds.json"
    versions = [write_class_values(path, v, 0, 1) for v in ({"Sad": 0.2}, {"Sad": 0.2, "Fear": 0}, {"Sad": 0.3}, {"Fear": 1})]
    assert versions == [1, 1, 2, 3]
    data = json.loads(path.read_text())
    assert [h["version"] for h in data["history"]] == [1, 2] and data["history"][1]["values"]["Sad"] == 0.3
    np.testing.assert_array_equal(read_class_values(path, 0, 1), [0, 0, 1, 0, 0, 0, 0])
    with pytest.raises(ArtifactError): read_class_values(path, 0, 0.5)
    with pytest.raises(UsageError): write_class_values(path, {"Sad": -1}, 0, 1)
    assert json.loads(path.read_text()) == data  # a refused value changes nothing


# ---- without torch, and without this package ----

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}: raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
"""
HEAVY = ("torch", "torchvision", "timm", "fastai", "fastcore", "sklearn", "scipy", "matplotlib", "onnx", "onnxscript", "pandas", "pyarrow",
         "tqdm")


def run_blocked(names, code, cwd, *args):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", BLOCK.format(names=repr(set(names))) + code, *map(str, args)],
                          capture_output=True, text=True, cwd=cwd, env=env, timeout=120)


def test_the_onnx_path_needs_no_torch(exported, tmp_path):
    cv2.imwrite(str(tmp_path / "face.png"), faces(1)[0])
    code = """
import cv2, json
from fer_nb.deploy import Predictor
print(json.dumps(Predictor(sys.argv[1])([cv2.imread(sys.argv[2])]).tolist()))
"""
    done = run_blocked(HEAVY, code, ROOT, exported, tmp_path / "face.png")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), Predictor(exported)(faces(1)), atol=1e-12)


STANDALONE = ROOT / "examples" / "predict_standalone.py"
ALONE = """
import json, runpy
import cv2
Model = runpy.run_path(sys.argv[1])["Model"]
images = [cv2.imread(p, cv2.IMREAD_UNCHANGED) for p in sys.argv[3:]]
print(json.dumps(Model(sys.argv[2])(images).tolist()))
"""


@pytest.mark.parametrize("clahe, grey", [((2.0, 4), False), (None, False), ((2.0, 4), True)])
def test_the_standalone_example_gives_the_predictors_answers(copy_of, tmp_path, clahe, grey):
    model = copy_of(geometry=GEOMETRY.model_copy(update={"clahe": clahe, "grey": grey}).to_json())
    images = [*faces(8, seed=1), picture(3, 48, True), picture(4, 31), picture(5, 90)[:, :57]]
    paths = [tmp_path / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images): cv2.imwrite(str(path), image)
    blocked = (*HEAVY, "fer_nb", "pydantic")
    for bias in ({}, {"Happy": 0.4, "Neutral": -0.5}):
        write_class_values(tmp_path / "logit_bias.json", bias, -0.5, 0.5)
        done = run_blocked(blocked, ALONE, tmp_path, STANDALONE, model, *paths)
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(json.loads(done.stdout), Predictor(model)(images), atol=1e-6)


def test_the_standalone_example_as_a_command(exported, copy_of, tmp_path):
    cv2.imwrite(str(tmp_path / "face.png"), faces(1)[0])

    def run(*args): return subprocess.run([sys.executable, STANDALONE, *map(str, args)], capture_output=True, text=True, cwd=tmp_path)
    best = Predictor(exported)(faces(1))[0]
    done = run(exported, tmp_path / "face.png")
    assert done.returncode == 0 and f"{CLASSES[best.argmax()]} {best.max():.3f}" in done.stdout.split("  ")[1]
    foreign = copy_of(schema=None)
    for args, words in (((exported, "none.png"), "none.png is not there"), ((foreign, "face.png"), "no metadata"), ((), "python predict")):
        done = run(*args)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("interpolation", geometry.Geometry.model_fields["interpolation"].annotation.__args__)
def test_the_standalone_example_prepares_as_the_library_does(interpolation, grey):
    model = runpy.run_path(str(STANDALONE))["Model"]
    geometry = Geometry(size=48, interpolation=interpolation, grey=grey)
    alone = model.__new__(model)
    alone.geometry = geometry.to_dict()
    for i, (h, w) in enumerate([(48, 48), (20, 31), (31, 20), (97, 40), (40, 97), (48, 47), (1, 5), (200, 200), (96, 90), (300, 143)]):
        for image in (cv2.resize(picture(i, 60, True), (w, h)), cv2.resize(picture(i, 60), (w, h))):
            np.testing.assert_array_equal(alone.prepare(image), prepare_face(image, geometry))


def test_the_stride_of_the_stem_travels_into_the_onnx_file(run_dir, tmp_path):
    "The weights of two strides have the same shapes: the file says which it was trained with."
    ckpt = torch.load(run_dir / "best.pt", weights_only=True)
    save_checkpoint(tmp_path / "best.pt", **ckpt | {"meta": ckpt["meta"] | {"stem_stride": 1}})
    calibration(of=tmp_path / "best.pt").save(tmp_path)
    from fer_nb.deploy import open_checkpoint, read_facts
    facts, run = open_checkpoint(tmp_path / "best.pt", "cpu", 1)
    said = facts.to_metadata()
    assert facts.stem_stride == 1 and said["fer_nb.stem_stride"] == "1" and read_facts(said, "m.onnx").stem_stride == 1
    assert read_facts({k: v for k, v in said.items() if k != "fer_nb.stem_stride"}, "m.onnx").stem_stride == 0  # an older file
    with pytest.raises(ArtifactError, match="fer_nb.stem_stride.*is no stride"): read_facts(said | {"fer_nb.stem_stride": "one"}, "m.onnx")
    x = normalise(prepared(faces(3), GEOMETRY), GEOMETRY)
    assert np.abs(run(x) - open_checkpoint(run_dir / "best.pt", "cpu", 1)[1](x)).max() > 1e-3  # the same weights, another network


def test_a_shipped_student_with_a_flipped_bit_is_refused(tmp_path):
    folder = shutil.copytree(SHIPPED.parent, tmp_path/"models", ignore=shutil.ignore_patterns("*.safetensors"))
    assert Predictor(folder/SHIPPED.name).name  # untouched
    content = bytearray((folder/SHIPPED.name).read_bytes())
    content[len(content)//2] ^= 1
    (folder/SHIPPED.name).write_bytes(content)
    with pytest.raises(ArtifactError, match="is not the file that hash_manifest.json names"): Predictor(folder/SHIPPED.name)
