"""Export, parity and latency: what the files hold, what a failed export leaves behind, what a comparison finds, how times are taken."""
import json
import os
import re
import warnings
import zipfile

import cv2
import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from onnx import TensorProto, numpy_helper
from sklearn.metrics import f1_score, precision_recall_fscore_support

from fer_nb import artifacts, exporting, timing
from fer_nb.artifacts import CLASSES, ArtifactError, FerError, GateError, UsageError, sha256_file
from fer_nb.calibration import softmax
from fer_nb.callbacks import save_checkpoint
from fer_nb.deploy import Predictor, card_of, prepared
from fer_nb.evidence import ExportReport, OnnxParity
from fer_nb.exporting import (
    PRECISIONS,
    check_parity,
    compare_logits,
    export_checkpoint,
    export_model,
    open_run,
    packed_faces,
    require_parity,
    save_checked,
    torch_logits,
)
from fer_nb.geometry import Geometry
from fer_nb.latency import answers, bench, compare_accuracy, measure_latency, plain_export
from fer_nb.leaves import check_seal
from fer_nb.manifests import labels_of, load_manifest
from fer_nb.records import RunArgs
from fer_nb.run_report import report_run
from fer_nb.shipping import ship, told_latency
from fer_nb.teachers import Teacher
from fer_nb.timing import file_precision, interleaved
from fer_nb.training import embedded_data
from tests.test_deploy import GEOMETRY, calibration, faces, one_line, run_dir  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's exporter about itself


@pytest.fixture(scope="session")
def train_faces(): return prepared(faces(64, seed=5), GEOMETRY)


@pytest.fixture(scope="session")
def exported(run_dir, train_faces, tmp_path_factory):  # noqa: F811
    "A folder with all three files."
    out = tmp_path_factory.mktemp("all") / "onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_model(run_dir, out, calibration_faces=train_faces)
    return out


@pytest.fixture
def traced(exported, monkeypatch):
    "Tracing takes ten seconds: this student was traced already."
    monkeypatch.setattr(exporting, "to_fp32", lambda _, facts: exporting.describe(onnx.load(exported / "model_fp32.onnx"), facts))


@pytest.fixture
def copied(exported, tmp_path):
    "A copy of that folder, to be spoilt."
    for p in exported.iterdir(): (tmp_path / p.name).write_bytes(p.read_bytes())
    return tmp_path


def spoil(path, amount=1e-3):
    "Move the last bias of a model a little."
    model = onnx.load(path)
    last = next(t for t in model.graph.initializer if list(t.dims) == [7] and t.data_type == TensorProto.FLOAT)
    last.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(last) + np.float32(amount)*np.eye(7, dtype=np.float32)[0], last.name))
    onnx.save(model, path)


# ---- the files ----

def test_files_are_whole_and_say_nothing_of_this_machine(exported, run_dir):  # noqa: F811
    assert sorted(p.name for p in exported.iterdir()) == [
        "model_fp16.onnx", "model_fp32.onnx", "model_int8.onnx", "model_w8.onnx", "onnx_export_report.json"]
    facts = open_run(run_dir)[1]
    for p in PRECISIONS:
        path = exported / f"model_{p}.onnx"
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(str(path), full_check=True)
        assert {o.domain: o.version for o in model.opset_import}[""] == 18
        assert not [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
        assert {q.key: q.value for q in model.metadata_props} == facts.to_metadata()
        assert model.graph.input[0].type.tensor_type.elem_type == model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        data = path.read_bytes()
        for word in (b".py", b"site-packages", b"stack_trace", os.fsencode(os.getcwd())): assert word not in data
        assert file_precision(path) == p
    sizes = [(exported / f"model_{p}.onnx").stat().st_size for p in PRECISIONS]
    assert sizes[1] < 0.52*sizes[0] and sizes[2] < 0.3*sizes[0] and sizes[3] < 0.3*sizes[0]


def test_batch_normalisation_is_folded_and_numbers_are_what_they_should_be(exported):
    kinds = {p: onnx.load(exported / f"model_{p}.onnx").graph for p in PRECISIONS}
    assert "BatchNormalization" not in {n.op_type for n in kinds["fp32"].node}
    weights = [t for t in kinds["fp16"].initializer if np.prod(t.dims) > 100]
    assert weights and all(t.data_type == TensorProto.FLOAT16 for t in weights)
    assert [n.op_type for n in kinds["fp16"].node].count("Cast") == 2  # at both ends
    held = {t.name: numpy_helper.to_array(t) for t in kinds["int8"].initializer}
    weights = [(held[n.input[0]], held[n.input[1]]) for n in kinds["int8"].node
               if n.op_type == "DequantizeLinear" and n.input[0] in held and held[n.input[0]].ndim == 4]
    assert len(weights) == sum(n.op_type == "Conv" for n in kinds["fp32"].node)
    for w, scale in weights:
        assert w.dtype == np.int8 and np.abs(w.astype(int)).max() <= 64  # seven bits
        assert scale.shape == (w.shape[0],)  # a scale a channel
    held, plain = ({t.name: numpy_helper.to_array(t) for t in kinds[k].initializer} for k in ("w8", "fp32"))
    rounded = {name: w for name, w in plain.items() if f"{name}_whole" in held}
    exact = {name: w for name, w in plain.items() if name not in rounded}
    assert all(np.array_equal(held[name], w) for name, w in exact.items())
    assert max(w.size for w in exact.values()) <= min(w.size for w in rounded.values())  # the smallest ones
    whole = sum(w.size for w in plain.values())
    assert 0.95 <= sum(w.size for w in rounded.values())/whole < 0.96
    for name, w in rounded.items():  # a whole number and a scale a channel, within half a step of the weight
        assert held[f"{name}_whole"].dtype == np.int8 and held[f"{name}_scale"].size == len(w)
        assert (np.abs(held[f"{name}_whole"]*held[f"{name}_scale"] - w) <= 0.501*held[f"{name}_scale"]).all()


def test_report(exported, run_dir):  # noqa: F811
    data = json.loads((exported / "onnx_export_report.json").read_text())
    assert {"model_name", "checkpoint_hash", "opset", "precision", "input_shape", "parity_check", "date"} <= set(data)
    assert {"mean_abs_diff", "max_abs_diff", "pass"} <= set(data["parity_check"]) and data["parity_check"]["pass"] is True
    report = ExportReport.load(exported)
    assert report.precision == [*PRECISIONS] and report.files["int8"].calibration_faces == 64
    assert report.checkpoint_hash == Predictor(run_dir / "best.pt").checkpoint_sha256 and report.input_shape == ["batch", 3, 48, 48]
    for f in report.files.values(): assert artifacts.sha256_file(exported / f.file) == f.sha256


def test_exporting_twice_gives_the_same_bytes_and_replaces_what_was_there(run_dir, copied):  # noqa: F811
    (copied / "onnx_parity.json").write_text("{}")
    (copied / "notes.txt").write_text("mine")
    before = (copied / "model_fp32.onnx").read_bytes()
    export_model(run_dir, copied)
    assert (copied / "model_fp32.onnx").read_bytes() == before
    assert sorted(p.name for p in copied.iterdir()) == [
        "model_fp16.onnx", "model_fp32.onnx", "model_w8.onnx", "notes.txt", "onnx_export_report.json"]


def test_a_teacher_is_exported_with_its_scale(tmp_path):
    torch.manual_seed(0)
    teacher = Teacher("RN18", 30.0, img_size=48)
    meta = {"classes": list(CLASSES), "backbone": "resnet18", "head": "arcface", "scale": 30.0, "geometry": GEOMETRY.to_dict(),
            "dataset_index_id": "demo-0"}
    save_checkpoint(tmp_path / "best.pt", model=teacher.state_dict(), meta=meta)
    calibration(t=4.0, of=tmp_path / "best.pt").save(tmp_path)
    export_model(tmp_path, tmp_path / "onnx")
    batch = prepared(faces(16), GEOMETRY)
    parity = check_parity(tmp_path / "onnx", tmp_path, batch)
    assert parity.passed and parity.variants["fp32"].max_logit_diff <= 1e-4
    assert np.abs(Predictor(tmp_path / "onnx" / "model_fp32.onnx").logits(batch)).max() > 1


# ---- exports that fail ----

def test_what_can_not_be_exported_leaves_nothing(run_dir, traced, train_faces, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "onnx"
    for precisions, words in ((("fp32", "int4"), "'int4' is unknown"), (("int8",), "fp32 can't be left out"),
                              (("fp32", "int8"), "int8 needs training faces")):
        with pytest.raises(UsageError) as e: export_model(run_dir, out, precisions)
        one_line(e, words)
    with pytest.raises(ArtifactError, match="is missing"): export_model(tmp_path / "nowhere.pt", out)
    save_checkpoint(tmp_path / "best.pt", **torch.load(run_dir / "best.pt", weights_only=True))
    with pytest.raises(ArtifactError, match="calibration.json: is missing"): export_model(tmp_path, out)
    with pytest.raises(UsageError, match="no faces to calibrate"): export_model(run_dir, out, None, train_faces[:0])
    monkeypatch.setattr(exporting, "to_fp16", lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): export_model(run_dir, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt"]


def test_an_export_that_computes_something_else_is_refused_and_the_old_one_stays(run_dir, copied, monkeypatch):  # noqa: F811
    before = {p.name: p.read_bytes() for p in copied.iterdir()}

    spoil(copied / "model_fp32.onnx")
    changed = onnx.load(copied / "model_fp32.onnx")
    (copied / "model_fp32.onnx").write_bytes(before["model_fp32.onnx"])
    monkeypatch.setattr(exporting, "to_fp32", lambda *_: changed)
    with pytest.raises(GateError) as e: export_model(run_dir, copied)
    one_line(e, "differs from it by 0.001 in a logit", "nothing was written")
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before


def test_the_checker_stands_before_the_file(exported, tmp_path):
    model = onnx.load(exported / "model_fp32.onnx")
    model.graph.node[3].input[0] = "nothing_makes_this"
    with pytest.raises(onnx.checker.ValidationError): save_checked(model, tmp_path / "m.onnx")
    model = onnx.load(exported / "model_fp32.onnx")
    del model.metadata_props[:]
    with pytest.raises(ArtifactError, match="fer_nb.schema"): save_checked(model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


# ---- parity ----

def test_parity_of_an_honest_export(copied, run_dir):  # noqa: F811
    batch = prepared(faces(200, seed=3), GEOMETRY)
    labels = np.random.default_rng(0).integers(0, 7, 200)
    p = check_parity(copied, run_dir, batch, labels, "smooth noise", resamples=100)
    assert p.passed and list(p.variants) == [*PRECISIONS] and p.n == 200
    require_parity(p, copied)
    assert OnnxParity.load(copied) == p
    truth = torch_logits(open_run(run_dir)[0], batch, GEOMETRY)
    for k, v in p.variants.items():
        z = Predictor(copied / f"model_{k}.onnx").logits(batch)
        assert v.max_logit_diff == pytest.approx(np.abs(z - truth).max()) and v.argmax_agreement == (z.argmax(1) == truth.argmax(1)).mean()
        assert v.max_prob_diff == pytest.approx(np.abs(softmax(z, 1.7) - softmax(truth, 1.7)).max(), abs=1e-9)
        f1 = [f1_score(labels, x.argmax(1), average="macro", labels=range(7), zero_division=0) for x in (z, truth)]
        assert v.macro_f1 == pytest.approx(f1[0]) and v.macro_f1_change.value == pytest.approx(100*(f1[0] - f1[1]), abs=1e-9)
    order = [p.variants[k].mean_logit_diff for k in PRECISIONS]
    assert order == sorted(order) and order[0] < order[3]


def test_parity_finds_a_file_that_was_changed(copied, run_dir):  # noqa: F811
    spoil(copied / "model_fp32.onnx")
    with pytest.raises(ArtifactError, match="is not the file that onnx_export_report.json names"):
        check_parity(copied, run_dir, prepared(faces(8), GEOMETRY))
    report = ExportReport.load(copied)  # forged as well: the answers still tell
    report.files["fp32"].sha256 = sha256_file(copied / "model_fp32.onnx")
    report.save(copied)
    p = check_parity(copied, run_dir, prepared(faces(8), GEOMETRY))
    assert not p.passed and not p.variants["fp32"].passed and p.variants["fp16"].passed and p.variants["fp32"].macro_f1 is None
    with pytest.raises(GateError) as e: require_parity(p, copied)
    one_line(e, "model_fp32.onnx", "max_logit_diff 0.001", "limit 0.0001")


def test_int8_is_judged_by_its_own_bar_and_shuts_no_gate():
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 3, (400, 7))
    labels = truth.argmax(1)
    bad = compare_logits("int8", truth, rng.normal(0, 3, (400, 7)), 1.0, labels, 50)
    assert not bad["passed"] and bad["macro_f1_change"].value < -50
    worse = truth.copy()
    worse[:12] = rng.normal(0, 3, (12, 7))
    assert compare_logits("int8", worse, truth, 1.0, labels, 50)["passed"]  # a gain is no loss
    other = compare_logits("int8", rng.normal(0, 3, (400, 7)), truth, 1.0, labels, 50)
    assert other["macro_f1_change"].value > 50 and not other["passed"]  # better, but another model
    assert not compare_logits("fp16", rng.normal(0, 3, (400, 7)), truth, 1.0, labels, 50)["passed"]


@pytest.mark.parametrize("precision, size, passed", [
    ("fp32", 9e-5, True), ("fp32", 1.1e-4, False), ("fp16", 1e-2, True), ("fp16", 4e-2, False)])
def test_limits(precision, size, passed):
    truth = np.tile([3.0, 0, 0, 0, 0, 0, 2.5], (50, 1))
    got = truth + size*np.eye(7)[0]
    assert compare_logits(precision, truth, got, 1.0)["passed"] is passed


def test_parity_refuses_foreign_files(copied, run_dir, tmp_path):  # noqa: F811
    other = tmp_path / "other"
    ckpt = torch.load(run_dir / "best.pt", weights_only=True)
    ckpt["model"]["classifier.bias"] += 1
    save_checkpoint(other / "best.pt", **ckpt)
    calibration(of=other / "best.pt").save(other)
    with pytest.raises(ArtifactError) as e: check_parity(copied, other, prepared(faces(2), GEOMETRY))
    one_line(e, "model_fp32.onnx", "another checkpoint")
    with pytest.raises(ArtifactError) as e: check_parity(other, other, prepared(faces(2), GEOMETRY))
    one_line(e, "holds no exported model")
    with pytest.raises(UsageError): check_parity(copied, run_dir, np.zeros((2, 64, 64, 3), np.uint8))


def test_parity_on_two_thousand_real_faces(exported, run_dir, real_data, tmp_path):  # noqa: F811
    "The weights are random; the faces are not. (Reference runs hold the same for trained weights.)"
    with zipfile.ZipFile(real_data / "fer2013.zip") as z:
        names = sorted(n for n in z.namelist() if n.lower().endswith((".jpg", ".png")))
        some = [names[i] for i in np.random.default_rng(0).choice(len(names), 2000, replace=False)]
        images = [cv2.imdecode(np.frombuffer(z.read(n), np.uint8), cv2.IMREAD_GRAYSCALE) for n in some]
    for p in ("fp32", "fp16"): (tmp_path / f"model_{p}.onnx").write_bytes((exported / f"model_{p}.onnx").read_bytes())
    parity = check_parity(tmp_path, run_dir, prepared(images, GEOMETRY), what="real", resamples=10)
    assert parity.n == 2000 and parity.variants["fp32"].max_logit_diff <= 1e-4
    assert parity.variants["fp16"].max_prob_diff <= 5e-3 and parity.variants["fp16"].argmax_agreement >= 0.995


# ---- latency ----

def test_rounds_are_fair():
    seen, now = [], [0.0]
    calls = [lambda i=i: (seen.append(i), now.__setitem__(0, now[0] + i + 1)) for i in range(3)]
    times = interleaved(calls, 40, 5, np.random.default_rng(0), clock=lambda: now[0])
    rounds = np.array(seen).reshape(45, 3)
    assert (np.sort(rounds, 1) == [0, 1, 2]).all() and len({tuple(r) for r in rounds}) > 3  # each once a round, in changing order
    np.testing.assert_allclose(times, np.tile([1.0, 2, 3], (40, 1)))


def test_latency_table(exported):
    models = {p: exported / f"model_{p}.onnx" for p in ("fp32", "fp16", "int8")}
    t = measure_latency(models, (1, 3), (1,), ["CPUExecutionProvider"], runs=12, warmup=2, progress=False)
    assert len(t) == 6 and list(t["model"]) == list(t["precision"]) == ["fp32", "fp32", "fp16", "fp16", "int8", "int8"]
    assert (t["batch"] == [1, 3]*3).all() and (t["size"] == 48).all() and (t["runs"] == 12).all()
    assert (t["min_ms"] <= t["p50_ms"]).all() and (t["p50_ms"] <= t["p90_ms"]).all() and (t["p90_ms"] <= t["p99_ms"]).all()
    np.testing.assert_allclose(t["faces_per_s"], 1000*t["batch"]/t["p50_ms"])
    both = measure_latency({"a": exported / "model_fp32.onnx"}, (1,), (1, 2), ["cpu"], runs=2, warmup=0, progress=False)
    assert list(both["threads"]) == [1, 2]


def test_providers_that_compute_nothing_are_left_out(exported):
    t = measure_latency({"a": exported / "model_fp32.onnx"}, (1,), (1,), runs=2, warmup=0, progress=False)
    assert "CPUExecutionProvider" in set(t["provider"]) and "AzureExecutionProvider" not in set(t["provider"])
    if "AzureExecutionProvider" in timing.ort.get_available_providers():
        assert "computes 0 of" in t.attrs["left_out"]["AzureExecutionProvider"]
        with pytest.raises(GateError, match="computes 0 of"):
            measure_latency({"a": exported / "model_fp32.onnx"}, providers=["AzureExecutionProvider"], runs=2)
    for wrong in ("GPU", "TensorrtExecutionProvider"):
        with pytest.raises(UsageError): measure_latency({"a": exported / "model_fp32.onnx"}, providers=[wrong], runs=2)


def test_bench_writes_a_table_and_tells_names_apart(exported, copied):
    models = [exported / "model_fp32.onnx", copied / "model_fp32.onnx", copied / "model_int8.onnx"]
    result = bench(models, copied, batches=(1,), threads=(1,), runs=3, warmup=0, progress=False)
    names = [f"{exported.name}/model_fp32", f"{copied.name}/model_fp32", "model_int8"]
    assert list(pd.read_csv(copied / "latency_benchmarks.csv")["model"]) == names
    assert "of the first" in str(result) and "interleaved" in str(result) and "latency_benchmarks.csv" in str(result)
    with pytest.raises(UsageError): bench([])
    (copied / "model_fp32.onnx").write_bytes(b"")
    with pytest.raises(ArtifactError): bench([copied / "model_fp32.onnx"])


def test_the_plain_export_says_what_it_is(tmp_path):
    p = Predictor(plain_export(tmp_path / "plain.onnx", 64))
    assert p.geometry.size == 64 and "untrained" in p.name and p.checkpoint_sha256 == "none"


# ---- in one command ----

@pytest.fixture(scope="session")
def dataset(tmp_path_factory): return embedded_data(tmp_path_factory.mktemp("embedded"), 120, 48, 3)


@pytest.fixture
def own_run(run_dir, dataset, tmp_path):  # noqa: F811
    "The student, said to be trained on the embedded dataset, in the geometry of its cache."
    ckpt = torch.load(run_dir / "best.pt", weights_only=True)
    ckpt["meta"]["geometry"] = Geometry(size=48).to_dict()
    save_checkpoint(tmp_path / "run" / "best.pt", **ckpt)
    calibration(of=tmp_path / "run" / "best.pt").save(tmp_path / "run")
    return tmp_path / "run"


def test_accuracy_is_compared_on_the_same_rows_each_in_its_own_size(exported, dataset, tmp_path):
    "Against scikit-learn, on faces packed in the model's size, and on the pictures themselves for another size."
    ours, plain = exported / "model_int8.onnx", plain_export(tmp_path / "plain.onnx", 96)
    table = compare_accuracy({"plain": plain, "ours": ours}, dataset[0], resamples=200, progress=False)
    table = table[table["source"] == "all"].set_index("model")
    rows = load_manifest(dataset[0]).view("test_all_sources")
    y = [CLASSES.index(c) for c in rows["label"]]
    for name, path in (("plain", plain), ("ours", ours)):
        predict = Predictor(path)
        said = [predict([cv2.imread(r.path, cv2.IMREAD_UNCHANGED)])[0].argmax() for r in rows.itertuples()]
        assert np.mean(answers(path, rows, progress=False, block=7).argmax(1) == said) == 1
        assert table.loc[name, "accuracy"] == pytest.approx(np.mean(np.equal(said, y)))
        assert table.loc[name, "macro_f1"] == pytest.approx(f1_score(y, said, average="macro", labels=range(7), zero_division=0))
    assert table.loc["plain", "change"] == 0 == table.loc["plain", "change_high"]
    change = 100*(table.loc["ours", "macro_f1"] - table.loc["plain", "macro_f1"])
    assert table.loc["ours", "change"] == pytest.approx(change)
    assert table.loc["ours", "change_low"] <= change <= table.loc["ours", "change_high"]


def test_bench_sets_accuracy_beside_speed(exported, copied, dataset):
    models = [exported / "model_fp32.onnx", copied / "model_int8.onnx"]
    result = bench(models, copied, dataset[0], batches=(1,), threads=(1,), runs=3, warmup=0, progress=False)
    found = pd.read_csv(copied / "accuracy_benchmarks.csv")
    assert list(found["model"]) == ["model_fp32", "model_int8"]*found["source"].nunique() and "points of it over the first" in str(result)
    assert all(f"{f1:.4f}" in str(result) for f1 in found["macro_f1"])
    with pytest.raises(UsageError, match="no_such"): bench([copied / "model_int8.onnx"], copied, dataset[0], "no_such", runs=2)


def test_a_shipped_student_is_described_from_its_artifacts(own_run, traced, dataset, tmp_path):
    "Its numbers, its teacher and its latencies; nothing typed by hand."
    manifest, rng = load_manifest(dataset[0]), np.random.default_rng(0)
    val, test = manifest.view("val"), manifest.view("test_all_sources")
    zv, zt = (2*rng.standard_normal((len(rows), 7)) + 3*np.eye(7)[labels_of(rows)] for rows in (val, test))
    report_run(own_run, zv, val, zt, test, model_name="a student", dataset_index_id="demo-0", resamples=100,
               checkpoint_sha256=sha256_file(own_run / "best.pt"))
    root = tmp_path / "root"
    run = root / "students" / "net_seed1_KD"
    run.parent.mkdir(parents=True); own_run.rename(run)
    settings = {"stage": "KD", "epochs": 6, "seed": 1, "init_from": "students/net_seed1_CE/best.pt",
                "softlabels": "teachers/big/softlabels"}
    RunArgs(stage="student", parameters=settings).save(run)
    RunArgs(stage="teacher", parameters={"arch": "RN18", "weights_loaded": "some.pth (sha256 12, 100%)"}).save(root / "teachers" / "big")
    export_checkpoint(run, None, *dataset, calibration=32, precisions=["fp32", "int8"])
    bench([run / "onnx" / "model_fp32.onnx"], run / "onnx", batches=(1,), threads=(1,), runs=2, warmup=0, progress=False)
    path = ship(run, run / "onnx", "int8", tmp_path / "shipped")
    card = card_of(path).read_text()
    with pytest.raises(UsageError, match="learned other labels: give a folder"): ship(run, run / "onnx", "int8")
    assert path.read_bytes() == (run / "onnx" / "model_int8.onnx").read_bytes()
    assert "6 epochs from the best weights of `net_seed1_CE`" in card and "`big`: big (weights some.pth)" in card
    said = np.load(run / "onnx" / "answers_int8.npz")  # what the file that ships answers, not its parent
    scores = precision_recall_fscore_support(said["test_labels"], said["test_logits"].argmax(1), labels=range(7), zero_division=0)
    for name, precision, recall, _, n in zip(CLASSES, *scores):
        assert [c.strip() for c in card.split(f"| {name} ")[1].split("|")[1:4]] == [str(n), f"{precision:.3f}", f"{recall:.3f}"]
    shown = prepared([cv2.imread(r.path, cv2.IMREAD_UNCHANGED) for r in test.itertuples()], Geometry(size=48))
    np.testing.assert_allclose(said["test_logits"], Predictor(path, threads=1).logits(shown), atol=1e-3)
    (run / "onnx" / "model_int8.onnx").write_bytes((run / "onnx" / "model_fp32.onnx").read_bytes())
    with pytest.raises(ArtifactError, match="is not the file that onnx_export_report.json names"):
        ship(run, run / "onnx", "int8", tmp_path / "shipped")
    assert "interleaved runs each" in card and "trained as well" not in card and not set("{}") & set(card)
    path = run / "onnx"
    pd.DataFrame({"source": "all", "model": ["big", "small"], "macro_f1": [0.5, 0.49], "change": [0, -1.0], "change_low": [0, -1.5],
                  "change_high": [0, -0.5]}).to_csv(path / "accuracy_reference.csv")
    times = pd.read_csv(path / "latency_benchmarks.csv").iloc[[0, 0]].assign(model=["big", "small"], p50_ms=[8.0, 2.0])
    times.to_csv(path / "latency_reference.csv")
    assert re.search(r"small +\| 2.00 +\| 0.25 +\| 0.4900 +\| -1.00 \[-1.50, -0.50\]", "\n".join(told_latency(path)))


def test_export_with_a_dataset(own_run, traced, dataset):
    result = export_checkpoint(own_run, None, *dataset, calibration=32, seed=1)
    out = own_run / "onnx"
    test, labels = packed_faces(*dataset, "test_all_sources", Geometry(size=48))
    assert result.parity.n == len(test) == len(labels) and test.shape[1:] == (48, 48, 3)
    assert sorted(p.name for p in out.iterdir()) == [
        *(f"answers_{p}.npz" for p in sorted(PRECISIONS)), "hash_manifest.json",
        *(f"model_{p}.onnx" for p in sorted(PRECISIONS)), "onnx_export_report.json", "onnx_parity.json"]
    assert set(check_seal(out).files) == {p.name for p in out.iterdir()} - {"hash_manifest.json"}
    assert "test_all_sources" in str(result) and "model_int8.onnx" in str(result)
    assert ExportReport.load(out).files["int8"].calibration_faces == 32
    some, _ = packed_faces(*dataset, "hq_train", Geometry(size=48), 10, seed=4)
    again, _ = packed_faces(*dataset, "hq_train", Geometry(size=48), 10, seed=4)
    assert len(some) == 10 and (some == again).all()


def test_export_without_a_dataset_and_refusals(own_run, traced, run_dir, dataset):  # noqa: F811
    result = export_checkpoint(own_run / "best.pt", own_run / "elsewhere")
    assert "no int8" in str(result) and "embedded" in str(result) and result.parity.macro_f1 is None
    assert "int8" not in str(export_checkpoint(own_run, own_run / "elsewhere", precisions=["fp32"]))  # not asked for, not missed
    with pytest.raises(UsageError, match="go together"): export_checkpoint(own_run, manifest_dir=dataset[0])
    with pytest.raises(FerError) as e: export_checkpoint(run_dir, own_run / "x", *dataset)  # its mean is not the cache's
    one_line(e, "geometry", "mean")
