"Framing, measured with detectors, and what is left of a model once a detector has to find the faces."
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score

from fer_nb import cli, framing
from fer_nb.artifacts import CLASSES, Box, GateError, UsageError
from fer_nb.deploy import Predictor
from fer_nb.detectors import Detection
from fer_nb.framing import faces_through, measure_framing
from fer_nb.geometry import DEFAULT_SIGHTS, Crop, Framing, Geometry, Sight, prepare_face, prepare_views
from fer_nb.images import load_cache, measure_cache, pack_cache
from fer_nb.loading import LazyFaces
from fer_nb.manifests import build_manifest, load_manifest
from fer_nb.pictures import faces_of
from fer_nb.records import ThroughDetector
from fer_nb.sources import read_source
from fer_nb.through import compare
from tests.conftest import model_paths

G = Geometry(size=48, clahe=None)


class Discs:
    "A detector of white discs: its box is a sixth smaller than the disc, and stands a tenth of the disc too low."
    name = "haar"
    def detect(self, frame):
        grey = frame if frame.ndim == 2 else frame[..., 0]
        boxes = cv2.connectedComponentsWithStats((grey > 127).astype(np.uint8))[2][1:]
        return [Detection(Box.from_xywh((x + w/12, y + h/12 + 0.1*h, w*5/6, h*5/6))) for x, y, w, h, _ in boxes.tolist()]


@pytest.fixture
def discs(monkeypatch):
    monkeypatch.setattr(framing, "at_hand", lambda models=None: [("haar", 0)])
    monkeypatch.setattr(framing, "_open", lambda *args: Discs())


def picture(path, side, box):
    "A black picture with a white disc."
    image = np.zeros((side, side), np.uint8)
    cv2.circle(image, tuple(round(v) for v in box.centre), round(box.side/2), 255, -1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


@pytest.fixture
def mixed(tmp_path):
    "Pictures whose disc has 0.8 of their side, and ExpW's photographs with boxes that are just the disc."
    for k in range(100, 160): picture(tmp_path/"whole"/"train"/"happy"/f"{k}.png", k, Box(0.1*k, 0.1*k, 0.9*k, 0.9*k))
    rng, lines = np.random.default_rng(0), []
    for k in range(60):
        b = Box.from_xywh((*rng.integers(40, 200, 2), *[60 + k]*2))
        picture(tmp_path/"expw"/"image"/f"p{k}.png", 400, b)
        lines.append(f"p{k}.png 0 {b.top:g} {b.left:g} {b.right:g} {b.bottom:g} 90 3")
    (tmp_path/"expw"/"label.lst").write_text("\n".join(lines))
    build_manifest([f"folder={tmp_path/'whole'}", f"expw={tmp_path/'expw'}"], tmp_path/"m", val_fraction=0)
    manifest = load_manifest(tmp_path/"m")
    manifest.df["group"] = manifest.df["id"]  # discs are near-copies of each other
    return manifest


# --- measuring --------------------------------------------------------------------------------------------------------

def test_sources_with_boxes_are_brought_to_the_framing_of_the_others(mixed, discs, tmp_path):
    cache = pack_cache(mixed, G, tmp_path/"cache", progress=False)
    (seen,) = cache.framing.sights
    assert (seen.detector, seen.seen, seen.found) == ("haar", 120, 120)
    assert seen.ratio[2] == pytest.approx(1/(0.8*5/6), rel=0.03) and seen.dy == pytest.approx(-0.12, abs=0.02)  # a disc is 6/5 boxes
    assert cache.framing.crops["expw"] == pytest.approx((1/0.8, 0, 0, None, None), abs=0.03) and "folder" not in cache.framing.crops
    covered = pd.Series([np.mean(f > 127) for f in cache.images]).groupby(mixed.df.source.to_numpy()).mean()
    assert covered.to_numpy() == pytest.approx(np.pi/4*0.8**2, abs=0.02)  # both sources show the same
    assert load_cache(tmp_path/"cache", mixed).framing == cache.framing
    assert np.array_equal(LazyFaces(mixed.df, G, cache.framing).gather([0, 119]), cache.images[[0, 119]])


def test_a_detector_is_cut_as_the_training_pictures_were(mixed, discs, tmp_path):
    "The loop closes: what inference cuts over the detector's boxes is the picture that was packed."
    cache = pack_cache(mixed, G, tmp_path/"cache", progress=False)
    through = faces_through(mixed.df, G, cache.framing, "haar", progress=False)
    assert through.found.all() and not through.note
    for k in (0, 30, 90): assert np.abs(through.views[k][0].mean(-1) - cache.images[k].astype(float)).mean() < 8


def test_framing_can_be_measured_later_and_keeps_the_crops(mixed, discs, tmp_path):
    cache = pack_cache(mixed, G, tmp_path/"cache", progress=False, sample=0)
    assert cache.framing.sights == () and cache.framing.crops == {"expw": Crop(1.3)}
    again = measure_cache(tmp_path/"cache", mixed, sample=200, progress=False)
    assert again.crops == cache.framing.crops and again.sights[0].measured
    assert load_cache(tmp_path/"cache", mixed, full=True).framing == again
    boxed = measure_framing(mixed.view(source="expw"), crops={"expw": Crop(1.3)}, progress=False)
    assert boxed.sights[0].ratio[2] == pytest.approx(1.3*6/5, rel=0.03)  # of the squares that were packed, not of the boxes


def test_where_no_detector_finds_a_face_the_counts_say_so(tmp_path):
    for k in range(3): picture(tmp_path/"data"/"train"/"happy"/f"{k}.png", 64, Box(20, 20, 40, 40))
    build_manifest([f"folder={tmp_path/'data'}"], tmp_path/"m", val_fraction=0)
    found = measure_framing(load_manifest(tmp_path/"m").view().assign(group=["a", "b", "c"]), progress=False)
    assert [(s.detector, s.seen, s.found, s.measured) for s in found.sights if s.detector == "haar"] == [("haar", 3, 0, False)]
    crop, line = found.crop("haar")
    assert crop == next(s for s in DEFAULT_SIGHTS if s.detector == "haar").crop and "was not measured for this model: the default" in line
    with pytest.raises(UsageError, match="sample is -1"): measure_framing(pd.DataFrame(), -1)
    with pytest.raises(UsageError, match="names nowhere, which is not a folder"): measure_framing(pd.DataFrame(), 9, models="nowhere")


def test_the_sample_is_seeded(mixed, discs):
    a, b, c = (measure_framing(mixed.df, 40, seed=s, progress=False, threads=t) for s, t in ((1, 1), (1, 3), (2, 1)))
    assert a == b != c


def test_the_nearest_measure_is_taken_and_said():
    own = Sight(detector="yunet", width=640, seen=100, found=90, ratio=(0.8, 0.9, 1, 1.1, 1.2), dx=0.01)
    f = Framing(sights=[own])
    assert f.crop("yunet", 640) == (own.crop, "")
    for name, width, crop in (("yunet", 500, own.crop), ("haar", 0, DEFAULT_SIGHTS[2].crop), ("dnn", 0, DEFAULT_SIGHTS[1].crop)):
        got, line = f.crop(name, width)
        assert got == crop and len(line.splitlines()) == 1 and "not measured" in line
    assert Framing().crop("yunet", 320)[0] == DEFAULT_SIGHTS[1].crop


# --- inference --------------------------------------------------------------------------------------------------------

def test_what_was_measured_is_what_pictures_and_pipeline_cut(demo_model):
    from fer_nb.capture import PushedSource
    from fer_nb.realtime import Pipeline
    image = np.random.default_rng(0).integers(0, 256, (200, 240, 3), np.uint8)
    face = Detection(Box(60, 50, 140, 150), landmarks=np.array([(80, 90), (115, 95), (95, 115), (80, 130), (110, 132)], float))
    sight = Sight(detector="known", seen=99, found=99, ratio=(1, 1.25, 1.5, 1.6, 1.7), dx=0.05, dy=-0.1, shape=DEFAULT_SIGHTS[0].shape)
    model, finder = Predictor(demo_model), SimpleNamespace(name="known", detect=lambda frame: [face])
    model.framing, asked = Framing(sights=[sight]), []
    model._run = lambda x: (asked.append(x), np.zeros((len(x), 7), np.float32))[1]
    faces_of(image, finder, model)
    want = prepare_views(image, model.geometry, face.box, face.landmarks, sight.crop)
    assert len(want) == 2 and [len(x) for x in asked] == [1, 1]  # logits of zero are in doubt: a second look
    source = PushedSource()
    with Pipeline(source, finder, model) as p:
        source.push(image, 0.0)
        p.step()
    assert np.array_equal(asked[2], asked[0]) and np.array_equal(asked[3], asked[1])
    box_only = prepare_face(image, model.geometry, face.box, face.landmarks, Crop(1.25, 0.05, -0.1))
    assert np.array_equal(want[0], box_only)


def test_two_views_are_one_answer(demo_model):
    model, rng = Predictor(demo_model), np.random.default_rng(0)
    views = [rng.integers(0, 256, (k, 48, 48, 3), np.uint8) for k in (2, 1, 2)]
    def softmax(z): return np.exp(z)/np.exp(z).sum()
    def said(faces): return softmax(model.logits(faces).mean(0, dtype=float)/model.temperature + model.bias)
    for v, p in zip(views, model.from_views(views, sure=1), strict=True): assert p == pytest.approx(said(v), abs=1e-6)
    for v, p in zip(views, model.from_views(views, sure=0), strict=True): assert p == pytest.approx(said(v[:1]), abs=1e-6)
    assert model.from_views([]).shape == (0, 7)


def test_a_second_look_is_prepared_for_doubtful_faces_alone(demo_model):
    model, asked = Predictor(demo_model), []
    class Counted(list):
        def __getitem__(self, i):
            asked.append(i)
            return super().__getitem__(i)
    lead = {0: (9.0, 0), 1: (0.1, 0), 2: (0.1, 9.0)}  # by the first pixel: the logits of Angry and of Happy
    def run(x): return np.stack([np.eye(7, dtype=np.float32)[0]*lead[k][0] + np.eye(7, dtype=np.float32)[3]*lead[k][1] for k in key(x)])
    def key(x): return [round(float(v*255)) for v in (x[:, 0, 0, 0]*model.geometry.std[0] + model.geometry.mean[0])]
    model._run = run
    def face(k): return np.full((48, 48, 3), k, np.uint8)
    sure, torn = Counted([face(0), face(2)]), Counted([face(1), face(2)])
    got = model.from_views([sure, torn])
    assert asked == [0, 0, 1] and got.argmax(1).tolist() == [0, 3]


def test_a_run_takes_the_framing_of_its_cache(mixed, discs, tmp_path):
    from fer_nb.callbacks import load_checkpoint, save_checkpoint
    from fer_nb.loading import PackedFaces
    from fer_nb.training import FaceData
    faces = PackedFaces(pack_cache(mixed, G, tmp_path/"cache", progress=False), mixed.df)
    meta = {"classes": list(CLASSES), "framing": FaceData(mixed.dataset_index_id, faces, faces, faces).framing}
    save_checkpoint(tmp_path/"best.pt", model={}, meta=meta)
    got = Framing.model_validate(load_checkpoint(tmp_path/"best.pt")["meta"]["framing"])
    assert got == faces.framing and got.sights[0].measured and got.crops["expw"].ratio > 1.1


def test_a_broken_framing_is_refused(tmp_path, demo_model):
    import onnx
    model = onnx.load(demo_model)
    onnx.helper.set_model_props(model, {p.key: p.value for p in model.metadata_props} | {"fer_nb.framing": '{"sights": [{"detector": 3}]}'})
    onnx.save(model, tmp_path/"m.onnx")
    with pytest.raises(GateError, match="m.onnx is broken at sights.0.detector"): Predictor(tmp_path/"m.onnx")


# --- scores -----------------------------------------------------------------------------------------------------------

def test_compare_against_scikit_learn(mixed, discs, demo_model):
    rows, model = mixed.df.assign(label=[CLASSES[k % 5] for k in range(120)]), Predictor(demo_model)
    through = faces_through(rows, model.geometry, Framing(), "haar", progress=False)
    keep = np.arange(120) % 7 != 0  # some are missed
    through = through._replace(found=keep, views=[v for v, k in zip(through.views, keep) if k])
    got, y = compare(model, rows, through, resamples=50), np.arange(120) % 5
    direct = model([cv2.imread(p, 0)[..., None].repeat(3, 2) for p in rows.path[rows.source == "folder"]]).argmax(1)
    said, all_said = model.from_views(through.views).argmax(1), np.full(120, 7)
    all_said[keep] = said
    assert (got["n"], got["missed"]) == (120, 18)
    assert got["through_found"].accuracy.value == pytest.approx(accuracy_score(y[keep], said))
    assert got["through_found"].macro_f1.value == pytest.approx(f1_score(y[keep], said, labels=range(7), average="macro", zero_division=0))
    assert got["through_all"].accuracy.value == pytest.approx(accuracy_score(y, all_said))
    assert got["through_all"].macro_f1.value == pytest.approx(f1_score(y, all_said, labels=range(7), average="macro", zero_division=0))
    assert got["change"].accuracy.value == pytest.approx(got["through_found"].accuracy.value - got["direct_found"].accuracy.value)
    assert len(direct) == 60 and got["direct"].accuracy.low <= got["direct"].accuracy.value <= got["direct"].accuracy.high


def test_the_command_line_judges_an_onnx_and_keeps_other_rows(mixed, demo_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(framing, "_open", lambda *args: Discs())
    mixed.df["split"] = "test"
    monkeypatch.setattr("fer_nb.through.load_manifest", lambda *args, **kwargs: mixed)
    judge = ["student", "evaluate", str(demo_model), "--manifest", "m"]
    for name in ("haar", "yunet:320"):
        assert cli.main([*judge, "--through", name, "--source", "folder", "--out", str(tmp_path/"o")]) == 0
    said = capsys.readouterr().out
    assert "yunet 320" in said and "was not measured for this model" in said
    kept = [(r.detector, r.width, r.n, r.measured) for r in ThroughDetector.load(tmp_path/"o").rows]
    assert kept == [("haar", 0, 60, False), ("yunet", 320, 60, False)]
    assert "folder has the labels of folder, the model learned those of" in said and "no judgement" in said
    haar = ["--through", "haar"]
    for wrong in ([], ["--through", "yunet:wide"], ["--through", "yolo"], [*haar, "--convention", "rafdb"],
                  [*haar, "--source", "folder", "--convention", "expw"]): assert cli.main(judge + wrong) == 2


def test_framing_is_written_into_no_model_but_one_of_these_pictures(mixed, discs, demo_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fer_nb.manifests.load_manifest", lambda *args, **kwargs: mixed)
    monkeypatch.setattr("fer_nb.images.measure_cache", lambda *args, **kwargs: pytest.fail("measured before the model was looked at"))
    (tmp_path/"junk.onnx").write_bytes(b"no model")
    before = demo_model.read_bytes()
    wrong = {tmp_path/"junk.onnx": "no model that onnxruntime can open", demo_model: "measure the framing of its own pictures"}
    for model, words in wrong.items():
        assert cli.main(["framing", "cache", "--manifest", "m", "--model", str(model)]) == 1
        assert words in capsys.readouterr().err.splitlines()[0]
    assert demo_model.read_bytes() == before


# --- the shipped student, real faces ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ferplus(real_data):
    "The pictures of FERPlus's validation part that judge."
    rows = read_source(f"ferplus={real_data/'ferplus.zip'}")
    rows = rows[(rows.usage == "FER2013Valid") & (rows.excluded == "")]
    from fer_nb.archives import read_bytes
    from fer_nb.artifacts import sha256_bytes
    return rows.assign(sha256=[sha256_bytes(read_bytes(p)) for p in rows.path])


@pytest.mark.parametrize("detector, width", [("yunet", 640), ("yunet", 320), ("haar", 0)])
def test_the_shipped_student_keeps_its_scores_behind_a_detector(ferplus, detector, width):
    "Within 2 points of accuracy and 4 of macro-F1 of the direct crop, on the faces that the detector found."
    models = model_paths(detector)[0].parent if detector == "yunet" else None
    student = Predictor()
    through = faces_through(ferplus, student.geometry, student.framing, detector, width, models=models, progress=False)
    assert not through.note and through.found.mean() > 0.6
    got = compare(student, ferplus, through, resamples=50)
    assert got["n"] - got["missed"] >= 1000 or detector == "haar"
    assert got["change"].accuracy.value > -0.02 and got["change"].macro_f1.value > -0.04, got["change"]
