"""Tampering: whatever is changed, cut, swapped or foreign is refused, and the refusal names it."""
import json

import numpy as np
import pytest

from fer_nb.artifacts import (
    CLASSES,
    Artifact,
    ArtifactError,
    GateError,
    atomic_path,
    class_order_hash,
    read_json,
    sha256_file,
    write_json,
    write_npz,
)
from fer_nb.calibration import simulate_logits
from fer_nb.evidence import AlignmentReport
from fer_nb.gates import gates
from fer_nb.integrity import (
    VIEWS,
    Softlabels,
    backbone_guard,
    check_alignment,
    environment,
    load_softlabels,
    require_alignment,
    require_backbone,
    save_softlabels,
    smoke_verdict,
    write_provenance,
)
from fer_nb.leaves import OTHER_NAMES, artifact_models, check_seal, inventory, reseal, seal_folder
from fer_nb.records import Calibration, ClassOrder
from fer_nb.run_report import calibrate
from fer_nb.selective import conformal_threshold, prediction_sets, selective_report

N, INDEX = 12, "test-0123456789ab"


@pytest.fixture
def soft():
    rng = np.random.default_rng(1)
    return Softlabels(np.array([f"a/{i}.png" for i in range(N)]), np.array([f"{i:064x}" for i in range(N)]),
                      rng.normal(0, 10, (N, 2, 7)).astype("f4"), VIEWS, 6.5, 30.0, INDEX)


@pytest.fixture
def folder(tmp_path, soft):
    save_softlabels(tmp_path / "teacher" / "softlabels", soft)
    return tmp_path / "teacher" / "softlabels"


def aligned(folder, soft, ids=None, sha=None, index=INDEX):
    return check_alignment(folder, soft.ids if ids is None else ids, soft.sha256 if sha is None else sha, index)


def test_untouched_softlabels_pass_in_any_row_order(folder, soft):
    order = np.random.default_rng(0).permutation(N)
    assert aligned(folder, soft, soft.ids[order], soft.sha256[order]).passed
    assert load_softlabels(folder).rows(soft.ids[order]).tolist() == order.tolist()


def test_swapped_class_order(folder, soft):
    names = list(CLASSES)
    names[0], names[1] = names[1], names[0]
    write_json(folder / "class_order.json", {"classes": names, "class_order_hash": class_order_hash(names)})
    report = aligned(folder, soft)
    assert not report.passed and not report.class_order_match
    with pytest.raises(GateError, match="class order"): require_alignment(report)


@pytest.mark.parametrize("name", ["softlabels.npz", "softlabels_index.jsonl", "sample_count.txt"])
def test_one_changed_byte(folder, soft, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    report = aligned(folder, soft)
    assert not report.passed and not report.hash_manifest_match
    assert name in report.notes[0]
    with pytest.raises(ArtifactError, match=name): load_softlabels(folder)


def test_one_missing_row(folder, soft):
    report = aligned(folder, soft, [*soft.ids, "a/new.png"], [*soft.sha256, "f" * 64])
    assert not report.passed and not report.sample_count_match and not report.sample_content_match
    assert "a/new.png" in " ".join(report.notes)


def test_one_row_swapped_for_another_of_the_same_count(folder, soft):
    report = aligned(folder, soft, [*soft.ids[:-1], "a/new.png"], soft.sha256)
    assert report.sample_count_match and not report.sample_content_match and not report.passed


def test_one_changed_image(folder, soft):
    report = aligned(folder, soft, sha=np.array([*soft.sha256[:-1], "e" * 64]))
    assert not report.passed and soft.ids[-1] in report.notes[0]


def test_another_dataset(folder, soft):
    assert "another-0" in aligned(folder, soft, index="another-0").notes[0]


def test_truncated_npz_that_was_sealed_again(folder, soft):
    "Even with a fitting seal, a truncated array file is no softlabels."
    data = (folder / "softlabels.npz").read_bytes()
    (folder / "softlabels.npz").write_bytes(data[: len(data) // 2])
    seal_folder(folder, INDEX)
    with pytest.raises(ArtifactError, match="truncated"): load_softlabels(folder)


def test_softlabels_without_seal_are_unfinished(folder, soft):
    (folder / "hash_manifest.json").unlink()
    assert "unfinished" in aligned(folder, soft).notes[0]


@pytest.mark.parametrize("spoil", ["nan", "shape", "twice", "temperature"])
def test_impossible_softlabels_are_never_written(tmp_path, soft, spoil):
    if spoil == "nan": soft.logits[3, 1, 2] = np.nan
    if spoil == "shape": soft.logits = soft.logits[:, :1]
    if spoil == "twice": soft.ids = np.array([soft.ids[0]] * N)
    if spoil == "temperature": soft.temperature = 0.0
    with pytest.raises(ArtifactError): save_softlabels(tmp_path, soft)
    assert not (tmp_path / "hash_manifest.json").exists()


def test_foreign_checkpoint():
    a = {"stem.weight": np.zeros((8, 3, 3, 3)), "head.weight": np.zeros((7, 8))}
    b = {"stem.weight": np.zeros((16, 3, 3, 3)), "head.weight": np.zeros((7, 8))}
    guard = backbone_guard(a, b, "mobilenetv3_large_100", "resnet18")
    assert guard.param_count_match_ratio == pytest.approx(56 / (216 + 56))
    with pytest.raises(GateError, match="'resnet18' is foreign to 'mobilenetv3_large_100'"): require_backbone(guard)


@pytest.mark.parametrize("kept", [0.0, 0.59, 0.61, 1.0])
def test_guard_counts_parameters_not_layers(kept):
    expected = {f"w{i}": np.zeros(10) for i in range(100)}
    found = {k: v for i, (k, v) in enumerate(expected.items()) if i < kept * 100}
    assert backbone_guard(expected, found, "a", "a").passed == (kept >= 0.60)


@pytest.mark.parametrize("model", artifact_models().values(), ids=lambda m: m.__name__)
def test_json_cut_short_names_the_file(tmp_path, model):
    path = tmp_path / model.filename
    path.write_text('{"schema_version": 1, "notes": ["half')
    with pytest.raises(ArtifactError, match=model.filename): model.load(tmp_path)


def test_every_truncation_of_an_artifact_is_refused(tmp_path):
    text = ClassOrder().save(tmp_path).read_text().rstrip()
    for n in range(len(text)):
        (tmp_path / "class_order.json").write_text(text[:n])
        with pytest.raises(ArtifactError, match=r"class_order\.json"): ClassOrder.load(tmp_path)


def test_old_spellings_load(tmp_path):
    old = {"datasetindexid": "d-1", "classordermatch": True, "classorderhash": class_order_hash(), "samplecountmatch": True,
           "hashmanifestmatch": True, "teacherdir": "teachers/rn18", "pass": True, "notes": [], "author": "an earlier system"}
    (tmp_path / "alignmentreport.json").write_text(json.dumps(old))
    report = AlignmentReport.load(tmp_path)
    assert report.passed and report.dataset_index_id == "d-1"
    (tmp_path / "calibration.json").write_text(json.dumps({
        "modelname": "rn18", "datasetindexid": "d-1", "selectedtemperature": 5.0, "grid": [1.0, 5.0], "atgridbound": True, "seed": 1,
        "metrics": {"NLL": [1.0, 0.5], "ECE": [0.2, 0.1], "macro_f1": [0.5, 0.5]}, "calibrationdate": "2024-01-01"}))
    assert Calibration.load(tmp_path).at_grid_bound


def test_wrong_type_names_key_and_value(tmp_path):
    write_json(tmp_path / "alignment_report.json", {"dataset_index_id": "d", "class_order_match": "perhaps"})
    with pytest.raises(ArtifactError, match=r"alignment_report\.json: key 'class_order_match'.*perhaps"): AlignmentReport.load(tmp_path)


def test_misspelt_field_is_an_error_when_writing():
    with pytest.raises(ValueError, match="clases"): ClassOrder(clases=list(CLASSES))


def test_interrupted_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"v": 1})
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a.json") as tmp:
        tmp.write_text('{"v": ')
        raise ZeroDivisionError
    assert read_json(tmp_path / "a.json") == {"v": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_every_artifact_model_has_a_file_and_a_schema_version():
    for model in Artifact.__subclasses__():
        assert (model.filename.endswith(".json") or model in OTHER_NAMES.values()) and model.model_fields["schema_version"].default >= 1


def test_inventory_tells_whole_from_broken(tmp_path):
    ClassOrder().save(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "smoke_test.json").write_text("{")
    assert inventory(tmp_path).set_index("folder")["state"].map(lambda s: s == "whole").to_dict() == {"a": True, "b": False}


@pytest.mark.parametrize("losses, go", [([2.0, 1.5, 1.0], True), ([1.0, 1.0, 1.0], False), ([1.0], False), ([2.0, float("inf")], False)])
def test_smoke_needs_a_falling_finite_loss(losses, go):
    assert (smoke_verdict(losses, True, True, True, True).go_no_go == "GO") == go


@pytest.mark.parametrize("test_ids, split, go", [(["c"], "test", True), (["b"], "test", False), (["c"], "val", False)])
def test_gates_refuse_a_report_on_the_rows_that_chose_the_temperature(tmp_path, test_ids, split, go):
    rng = np.random.default_rng(0)
    y = np.arange(210) % 7
    z = rng.normal(0, 1, (210, 7)) + 2 * np.eye(7)[y]
    calibration, metrics = calibrate(z, y, z[::-1] + 0.1, y[::-1], model_name="m", dataset_index_id=INDEX, resamples=50,
                                     val_ids=[f"v{i}" for i in range(210)], test_ids=[f"t{i}" for i in range(210)])
    write_provenance(tmp_path, "teacher", {}, 1, environment())
    calibration.save(tmp_path)
    metrics.model_copy(update={"split": split}).save(tmp_path)
    write_npz(tmp_path / "evaluation.npz", val_ids=np.array(["a", "b"]), test_ids=np.array(test_ids))
    line = next(x for x in gates(tmp_path).lines if x.question.startswith("reported on rows"))
    assert line.go == go, line.reason


def promise(tmp_path, labels, **how):
    "The line of the checklist on prediction sets, for a run of the convention 'ours' that is tested on these labels."
    z, y = simulate_logits(800, 2.5, seed=1)
    zt, yt = simulate_logits(800, 2.5, seed=2)
    named = dict(model_name="m", dataset_index_id=INDEX, resamples=20, convention="ours")
    write_provenance(tmp_path, "teacher", {"convention": "ours"}, 1, environment())
    report = selective_report(z, y, zt, labels(yt), 2.5, **named | how)
    report.save(tmp_path)
    line, = (x for x in gates(tmp_path).lines if x.question == "prediction sets keep their promise")
    return line, report


def test_a_kept_promise_is_go(tmp_path):
    line, report = promise(tmp_path, lambda y: y)
    assert line.go and line.file == "selective.json" and report.promise.kept


def test_a_broken_promise_is_no_go_with_its_numbers(tmp_path):
    "A third of the test labels follow another convention, under the name of the run's own."
    line, report = promise(tmp_path, lambda y: np.where(np.arange(800) % 3, y, (y + 1) % 7))
    p = report.promise
    told = f"90% is promised, and {p.covered} of 800 pictures are covered ({p.covered/800:.3f})"
    assert not line.go and told in line.reason


def test_a_class_whose_promise_is_broken_is_named(tmp_path):
    line, report = promise(tmp_path, lambda y: np.where(y == 2, 4, y), class_conditional=True)  # Fear is called Sad
    assert not line.go and f"Sad {report.by_class['Sad'].coverage:.3f}" in line.reason and "Happy" not in line.reason


def test_a_picture_in_many_rows_is_asked_once(tmp_path):
    "Ten of 100 pictures, whose label changed, stand in ten rows each: by row nearly half of the sets miss, by picture few do."
    z, y = simulate_logits(800, 2.5, seed=1)
    zt, yt = simulate_logits(400, 2.5, seed=2)
    inside = prediction_sets(zt, conformal_threshold(z, y, 2.5), 2.5)[np.arange(400), yt]
    often = np.flatnonzero(~inside)[:10]
    rows = np.concatenate([np.arange(400), np.repeat(often, 20)])
    named = dict(model_name="m", dataset_index_id=INDEX, resamples=20)
    by_picture = selective_report(z, y, zt[rows], yt[rows], 2.5, groups=rows, **named)
    assert by_picture.promise.kept and by_picture.promise.pictures == 400 and by_picture.coverage.value < 0.75
    assert not selective_report(z, y, zt[rows], yt[rows], 2.5, **named).promise.kept


@pytest.mark.parametrize(("how", "says"), [
    ("older", "fer-nb recount"), ("missing", "is missing"), ("another's threshold", "those of theirs chose its threshold"),
    ("no such rows", "no test row has them")])
def test_what_proves_no_promise_is_no_go(tmp_path, how, says):
    line, report = promise(tmp_path, lambda y: y, conventions=np.full(800, "theirs" if how == "no such rows" else "ours"))
    match how:
        case "older": report.model_copy(update={"schema_version": 1, "promise": None}).save(tmp_path)
        case "missing": (tmp_path/"selective.json").unlink()
        case "another's threshold": report.model_copy(update={"calibrated_on": "theirs"}).save(tmp_path)
    line, = (x for x in gates(tmp_path).lines if x.question == "prediction sets keep their promise")
    assert not line.go and says in line.reason


def test_rewritten_files_are_sealed_with_what_they_replaced(tmp_path):
    (tmp_path/"a.json").write_text("1"); (tmp_path/"b.json").write_text("1")
    first = seal_folder(tmp_path, INDEX)
    (tmp_path/"a.json").write_text("2")
    with pytest.raises(ArtifactError, match="was changed"): check_seal(tmp_path)
    assert reseal(tmp_path, ["a.json", "b.json"]).rewritten == {"a.json": first.files["a.json"]}  # b is what it was
    check_seal(tmp_path)
    (tmp_path/"a.json").write_text("3")
    assert reseal(tmp_path, ["a.json"]).rewritten == {"a.json": first.files["a.json"]}  # the run's own, not the second


def test_gates_of_softlabels_alone_have_nothing_to_judge(folder):
    with pytest.raises(GateError, match="nothing to judge"): gates(folder.parent)


def test_an_export_is_judged_by_its_proofs_and_its_files(tmp_path):
    parity = {"file": "model_fp32.onnx", "max_logit_diff": 1e-6, "mean_logit_diff": 0, "max_prob_diff": 0, "mean_prob_diff": 0,
              "argmax_agreement": 1.0, "limits": {"max_logit_diff": 1e-4}, "pass": True}
    common = {"model_name": "m", "checkpoint_hash": "c", "dataset_index_id": "d-1", "temperature": 1.0, "date": "2026-01-01"}
    (tmp_path / "model_fp32.onnx").write_bytes(b"weights")
    sha256 = sha256_file(tmp_path / "model_fp32.onnx")
    compared = {**common, "faces": "drawn", "n": 9, "provider": "CPU", "resamples": 9, "seed": 1, "pass": True}
    write_json(tmp_path / "onnx_parity.json", {**compared, "variants": {"fp32": {**parity, "sha256": sha256}}})
    check = {"n": 9, "inputs": "drawn", "mean_abs_diff": 0, "max_abs_diff": 1e-6, "limit": 1e-4, "pass": True}
    report = {**common, "opset": 18, "precision": ["fp32"], "input_shape": ["batch", 3, 8, 8], "geometry": {}, "versions": {},
              "files": {"fp32": {"file": "model_fp32.onnx", "sha256": sha256, "bytes": 7}}, "parity_check": check}
    write_json(tmp_path / "onnx_export_report.json", report)
    assert [x.reason for x in gates(tmp_path).lines if not x.go] == [f"hash_manifest.json: is missing: {tmp_path.name} is unfinished; "
                                                                     "run its stage again"]
    seal_folder(tmp_path, "d-1")
    assert gates(tmp_path).go
    write_json(tmp_path / "onnx_export_report.json", {**report, "parity_check": {**check, "pass": False}})
    assert "was changed after its folder was sealed" in [x for x in gates(tmp_path).lines if not x.go][-1].reason
    seal_folder(tmp_path, "d-1")
    assert [x.question for x in gates(tmp_path).lines if not x.go] == ["the export computes what PyTorch computes"]
    write_json(tmp_path / "onnx_export_report.json", report)
    (tmp_path / "model_fp32.onnx").write_bytes(b"others")
    seal_folder(tmp_path, "d-1")
    bad = [x for x in gates(tmp_path).lines if not x.go]
    assert [x.reason for x in bad] == ["model_fp32.onnx (fp32) is not the file that was compared"]
    (tmp_path / "onnx_parity.json").unlink()
    assert not gates(tmp_path).go
