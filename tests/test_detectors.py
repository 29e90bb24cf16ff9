"Finding and following faces: what no picture in the notebook can show, faults of the network, and films of real people."
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fer_nb import detectors as d05
from fer_nb.artifacts import ArtifactError, Box, GateError, UsageError, sha256_file
from fer_nb.detectors import (
    MODEL_FILES,
    SSD,
    Detection,
    Haar,
    ModelFile,
    Tracker,
    YuNet,
    fetch,
    find_file,
    iou,
    open_detector,
    tidy,
)
from fer_nb.geometry import eye_angle
from fer_nb.painting import framed_face
from tests.conftest import model_paths, picture


@pytest.fixture(scope="module")
def yunet(): return YuNet(*model_paths("yunet"))


@pytest.fixture
def alone(monkeypatch, tmp_path):
    "No models of the user's: an empty cache, no FER_NB_MODELS."
    monkeypatch.delenv("FER_NB_MODELS", raising=False)
    monkeypatch.setattr(d05, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


# --- boxes ------------------------------------------------------------------------------------------------------------

sides = st.floats(0.5, 300)
boxes = st.tuples(st.floats(-200, 800), st.floats(-200, 600), sides, sides)


@given(st.lists(boxes, max_size=5), st.lists(boxes, max_size=5))
def test_iou_is_symmetric_and_in_range(a, b):
    overlap = iou(a, b)
    assert overlap.shape == (len(a), len(b))
    assert np.array_equal(overlap, iou(b, a).T)
    assert ((overlap >= 0) & (overlap <= 1)).all()


@given(boxes, st.floats(-50, 50), st.floats(0.5, 3))
def test_iou_is_one_for_the_same_box_only_and_knows_no_place_or_scale(box, shift, scale):
    box, other = np.array(box), np.array(box) + (box[2] / 3, 0, 0, 0)
    assert iou([box], [box])[0, 0] == pytest.approx(1, abs=1e-9)
    assert iou([box], [other])[0, 0] == pytest.approx(0.5, abs=1e-6)
    moved = [(v + (shift, shift, 0, 0)) * scale for v in (box, other)]
    assert iou([moved[0]], [moved[1]])[0, 0] == pytest.approx(0.5, abs=1e-6)
    assert iou([box], [box + (box[2] + 0.01, 0, 0, 0)])[0, 0] == 0


def test_iou_equals_counted_pixels():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (np.r_[rng.integers(0, 20, 2), rng.integers(1, 20, 2)] for _ in range(2))
        masks = np.zeros((2, 40, 40), bool)
        for m, (x, y, w, h) in zip(masks, (a, b)): m[y:y + h, x:x + w] = True
        assert iou([a], [b])[0, 0] == pytest.approx(masks.all(0).sum() / masks.any(0).sum())


def test_boxes_without_area_overlap_with_nothing(): assert iou([(3, 3, 0, 0)], [(3, 3, 0, 0), (0, 0, 9, 9)]).tolist() == [[0, 0]]


def face_at(box, *rest): return Detection(Box.from_xywh(box), *rest)


detections = st.builds(face_at, boxes, st.floats(0, 1))


@given(st.lists(detections, max_size=8), st.integers(0, 150), st.randoms())
def test_tidy_gives_usable_boxes_one_a_face_largest_first(faces, least, random):
    kept = tidy(faces, 360, 640, least)
    assert all(f.box.side >= least and f in faces for f in kept)
    assert [f.area for f in kept] == sorted((f.area for f in kept), reverse=True)
    for f in kept:
        x, y, w, h = f.box.xywh
        seen = max(0, min(x + w, 640) - max(x, 0)) * max(0, min(y + h, 360) - max(y, 0))
        assert seen >= 0.49 * w * h and min(w, h) >= 0.39 * max(w, h)
    assert tidy(kept, 360, 640, least) == kept
    if len({f.score for f in faces}) == len(faces):
        random.shuffle(faces)
        assert tidy(faces, 360, 640, least) == kept


# --- numbers that stay ------------------------------------------------------------------------------------------------

@settings(max_examples=60)
@given(st.lists(st.lists(boxes.map(face_at), max_size=5), max_size=12), st.randoms())
def test_ids_are_unique_in_a_frame_and_do_not_depend_on_the_order(frames, random):
    one, other, known = Tracker(), Tracker(), set()
    for faces in frames:
        ids = one.update(faces)
        assert len(set(ids)) == len(ids) == len(faces) and all(i >= 1 for i in ids)
        new = set(ids) - known
        assert all(i > max(known, default=0) for i in new)  # a number is never given again
        known |= new
        order = list(range(len(faces)))
        random.shuffle(order)
        again = other.update([faces[k] for k in order])
        if len({f.box for f in faces}) == len(faces): assert [ids[k] for k in order] == again


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(0, 6), st.integers(0, 10**6), st.randoms())
def test_faces_that_stand_apart_keep_their_numbers_through_gaps(people, keep, seed, random):
    rng, tracker, absent = np.random.default_rng(seed), Tracker(keep=keep), [0] * people
    speed = rng.uniform(-4, 4, (people, 2))  # a box has 100 px: after 7 frames unseen it still overlaps with its last place
    for k in range(25):
        shown = []
        for p in range(people):
            absent[p] = absent[p] + 1 if k and absent[p] < keep and rng.random() < 0.3 else 0
            if not absent[p]: shown.append((p, face_at((400.0 * p + k * speed[p, 0], 200 + k * speed[p, 1], 100 - p, 120))))
        random.shuffle(shown)
        assert [i - 1 for i in tracker.update([f for _, f in shown])] == [p for p, _ in shown]


@pytest.mark.parametrize("pace", [3, 5, 8, 12])
@pytest.mark.parametrize("lost", [0.25, 0.4, 0.6])
def test_two_faces_that_cross_keep_their_numbers(pace, lost):
    "The one behind is unseen while the boxes share `lost` or more; boxes tremble by 2 px."
    rng, tracker, ids = np.random.default_rng(int(pace * 100 * lost)), Tracker(keep=20), []
    hidden = 0
    for k in range(round(600 / pace)):
        a = face_at(np.r_[pace * k, 50, 100, 120] + rng.normal(0, 2, 4))
        b = face_at(np.r_[600 - pace * k, 58, 96, 118] + rng.normal(0, 2, 4))
        behind = iou([a.box], [b.box])[0, 0] >= lost
        hidden += behind
        ids.append(tuple(tracker.update([a] if behind else [b, a])))
    assert hidden > 0
    assert {i for i in ids if len(i) == 2} == {ids[0]} and {i for i in ids if len(i) == 1} == {(ids[0][1],)}


def test_a_tracker_starts_again_after_reset():
    tracker = Tracker()
    first = tracker.update([face_at((0, 0, 9, 9)), face_at((50, 0, 9, 10))])
    tracker.reset()
    assert tracker.update([face_at((0, 0, 9, 9)), face_at((50, 0, 9, 10))]) == first == [2, 1]


def test_a_tracker_forgets():
    tracker = Tracker(keep=3)
    for k in range(200): tracker.update([face_at((1000.0 * k, 0, 50, 50))])
    assert len(tracker.known) <= 5 and tracker.next == 201


# --- frames of every kind ---------------------------------------------------------------------------------------------

class FakeNet:
    "Stands for cv2.dnn's net: answers with the rows it was given, and remembers what it saw."
    def __init__(self, rows): self.rows = rows
    def setInput(self, blob): self.blob = blob
    def forward(self): return np.array([[0, 1, *r] for r in self.rows], np.float32).reshape(1, 1, -1, 7)


def fake_ssd(rows, **settings):
    ssd = SSD.__new__(SSD)
    ssd.threshold, ssd.min_face, ssd.net = settings.get("threshold", 0.5), settings.get("min_face", 20), FakeNet(rows)
    return ssd


def detector(name):
    if name == "haar": return Haar(min_face=24)
    if name == "dnn": return fake_ssd([(0.9, 0.2, 0.2, 0.6, 0.8)])
    return YuNet(*model_paths("yunet"), min_face=0)


@pytest.mark.parametrize("name", ["yunet", "haar", "dnn"])
def test_refused_frames(name):
    d = detector(name)
    for frame in (None, [[0]], np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 1), np.uint8), np.zeros((9, 9, 3), np.float32),
                  np.zeros((0, 9, 3), np.uint8), np.zeros((9,), np.uint8), np.zeros((2, 9, 9, 3), np.uint8)):
        with pytest.raises(UsageError, match="a frame is") as e: d.detect(frame)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["yunet", "haar"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 320), (320, 1), (1, 5000), (7, 5), (31, 33), (101, 57), (177, 319), (481, 641)])
def test_noise_of_any_size_holds_no_face(name, shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert detector(name).detect(noise) == []


@pytest.mark.parametrize("name", ["yunet", "haar"])
@pytest.mark.parametrize("frame", [(360, 640), (361, 639), (640, 360), (251, 1003), (720, 1280)])
def test_boxes_are_pixels_of_the_source_frame(name, frame):
    f = framed_face(3, size=200, frame=frame)
    (found,) = detector(name).detect(f.image)
    assert iou([found.box], [f.box])[0, 0] > 0.45
    if name == "yunet":
        apart = np.linalg.norm(f.eyes[1] - f.eyes[0])
        assert found.landmarks.shape == (5, 2) and np.abs(found.eyes - f.eyes).max() < 0.2 * apart
        eye, other, _, corner, opposite = found.landmarks[:, 0]
        assert eye < other and corner < opposite  # the person's right stands left in the picture
        assert found.landmarks[:2, 1].max() < found.landmarks[2, 1] < found.landmarks[3:, 1].min()


@pytest.mark.parametrize("name", ["yunet", "haar"])
def test_grey_and_strided_frames_give_the_same(name):
    image, d = framed_face(3, size=200, frame=(300, 400)).image, detector(name)
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    assert d.detect(grey) == d.detect(np.repeat(grey[..., None], 3, 2))
    wide = np.concatenate([image, image], 1)
    assert d.detect(wide[:, :400]) == d.detect(image)
    before = image.copy()
    assert len(d.detect(image[:, ::-1])) == 1
    assert np.array_equal(before, image)  # nobody draws into the frame


@pytest.mark.parametrize("name", ["yunet", "haar"])
def test_faces_under_the_limit_are_left_out(name):
    f = framed_face(3, size=110, frame=(360, 640))
    d = detector(name)
    (found,) = d.detect(f.image)
    d.min_face = found.box.side + 8  # Haar knows few sizes: it may answer with the next larger one
    assert all(g.box.side >= d.min_face for g in d.detect(f.image))
    d.min_face = 1.5 * found.box.side
    assert d.detect(f.image) == []


def test_yunet_sees_320_by_180(yunet):
    seen = []
    spy = YuNet(*model_paths("yunet"))
    net, spy.net = spy.net, SimpleNamespace(setInputSize=seen.append, detect=lambda im: (seen.append(im.shape), None))
    for shape in ((360, 640, 3), (640, 360, 3), (1080, 1920, 3), (100, 200, 3)): assert spy.detect(np.zeros(shape, np.uint8)) == []
    assert seen == [(320, 180), (180, 320, 3), (180, 320), (320, 180, 3), (320, 180), (180, 320, 3), (200, 100), (100, 200, 3)]
    assert net is not spy.net


def test_the_largest_face_comes_first(yunet):
    frame = np.full((400, 700, 3), 128, np.uint8)
    for i, size, x in ((3, 130, 20), (5, 190, 230), (1, 160, 480)):
        f = framed_face(i, 0, size, (size + 60, size + 20)).image
        frame[50:50 + f.shape[0], x:x + f.shape[1]] = f
    found = yunet.detect(frame)
    assert len(found) == 3 and [f.area for f in found] == sorted((f.area for f in found), reverse=True)
    assert found[0].box.left == pytest.approx(240, abs=60)


# --- the SSD, with a net of our own -----------------------------------------------------------------------------------

def test_ssd_scales_boxes_to_the_frame_and_feeds_300_pixels():
    ssd = fake_ssd([(0.9, 0.25, 0.5, 0.5, 0.75)])
    (found,) = ssd.detect(np.full((400, 640, 3), 104, np.uint8))
    assert found.box.xywh == pytest.approx((160, 200, 160, 100)) and found.score == pytest.approx(0.9) and found.landmarks is None
    assert ssd.net.blob.shape == (1, 3, 300, 300)
    assert ssd.net.blob[0, :, 0, 0] == pytest.approx((0, 104 - 177, 104 - 123))


@pytest.mark.parametrize("phantom", [
    (0.95, 0.974, 0.386, 1.305, 1.284),  # beyond the corner: 1% of it lies in the frame
    (0.95, 0.974, 0.386, 1.0, 1.0),  # the same, clipped by the network: a sliver
    (0.95, 1.019, 0.407, 1.331, 1.282), (0.95, -0.5, 0.1, -0.1, 0.6),  # outside
    (0.7, 0.22, 0.25, 0.6, 0.85), (0.7, 0.3, 0.4, 0.45, 0.6),  # the same face again; a part of it
    (0.9, 0.7, 0.7, 0.7, 0.9), (0.9, 0.9, 0.9, 0.7, 0.7), (0.9, np.nan, 0, 1, 1), (0.9, -1e20, 0, 1e20, 1),  # no boxes at all
    (0.3, 0.7, 0.2, 0.9, 0.5), (0.9, 0.8, 0.8, 0.82, 0.83),  # unsure; small
])
def test_ssd_phantoms_go(phantom):
    face = (0.92, 0.2, 0.2, 0.6, 0.8)
    frame = np.zeros((360, 640, 3), np.uint8)
    for rows in ([face, phantom], [phantom, face]):
        (found,) = fake_ssd(rows, min_face=30).detect(frame)
        assert found.score == pytest.approx(0.92)


def test_ssd_keeps_two_faces_and_one_at_the_border():
    rows = [(0.9, 0.1, 0.2, 0.3, 0.7), (0.8, 0.6, 0.2, 0.9, 0.9), (0.7, -0.05, 0.6, 0.08, 0.95)]
    found = fake_ssd(rows, min_face=30).detect(np.zeros((360, 640, 3), np.uint8))
    assert [round(f.score, 1) for f in found] == [0.8, 0.9, 0.7]
    assert fake_ssd([]).detect(np.zeros((360, 640, 3), np.uint8)) == []


# --- files ------------------------------------------------------------------------------------------------------------

DATA = b"not really a detector " * 5000


class Faulty(BaseHTTPRequestHandler):
    "A server with one fault a path."
    def log_message(self, *args): pass

    def do_GET(self):
        if self.path == "/slow": return time.sleep(1.5)
        if self.path in ("/gone", "/down"): return self.send_error({"/gone": 404, "/down": 503}[self.path])
        if self.path == "/nonsense": return self.wfile.write(b"this is no HTTP\r\n\r\n")
        body = {"/page": b"<html>please log in</html>", "/endless": DATA * 20}.get(self.path, DATA)
        self.send_response(200)
        if self.path != "/silent": self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2 if self.path in ("/half", "/silent", "/stalled") else len(body)
        self.wfile.write(body[:half])
        self.wfile.flush()
        if self.path == "/stalled": time.sleep(1.5)


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    server.handle_error = lambda *args: None  # a client that hangs up is what we test
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def file_at(url: str) -> ModelFile: return ModelFile("tiny.onnx", url, hashlib.sha256(DATA).hexdigest(), len(DATA))


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_good_file_is_fetched_once(site, alone, capfd, monkeypatch):
    file = file_at(f"{site}/good")
    assert find_file(file) is None
    path = d05.get_file(file)
    assert path == alone / "tiny.onnx" and path.read_bytes() == DATA and [p.name for p in alone.iterdir()] == ["tiny.onnx"]
    assert "tiny.onnx" in capfd.readouterr().err  # a bar was shown
    monkeypatch.setattr(d05, "fetch", lambda *a: pytest.fail("fetched twice"))
    assert d05.get_file(file) == path


@pytest.mark.parametrize("path, says", [
    ("/page", "broke off after 26 of"), ("/endless", "gave another file"), ("/half", "broke off after 55000 of 110000 bytes"),
    ("/silent", "broke off after 55000 of 110000 bytes"), ("/gone", "answered 404"), ("/down", "answered 503"),
    ("/slow", "no answer in time"), ("/stalled", "no answer in time"), ("/nonsense", "could not be fetched"),
])
def test_a_failed_download_leaves_nothing(site, tmp_path, path, says):
    began = time.perf_counter()
    with pytest.raises(GateError, match=says) as e: fetch(file_at(site + path), tmp_path / "cache", timeout=0.4, progress=False)
    assert "\n" not in str(e.value) and site in str(e.value)
    assert list((tmp_path / "cache").glob("*")) == [] and time.perf_counter() - began < 1.4


def test_a_wrong_hash_is_refused_and_an_old_file_stays(site, tmp_path):
    (tmp_path / "tiny.onnx").write_bytes(b"what was there before")
    with pytest.raises(GateError, match="gave another file .sha256 .*expected 000000000000"):
        fetch(replace(file_at(f"{site}/good"), sha256="0" * 64), tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.onnx"] and (tmp_path / "tiny.onnx").read_bytes() == b"what was there before"


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/x", "http://name.invalid/x", "no address", "ftp://127.0.0.1:{port}/x"])
def test_no_network_gives_haar_and_a_line_quickly(alone, url):
    url = url.format(port=closed_port())
    began = time.perf_counter()
    detector, note = open_detector(files={"yunet": (file_at(url),), "haar": ()}, timeout=2, progress=False)
    assert detector.name == "haar" and time.perf_counter() - began < 6
    assert "\n" not in note and all(part in note for part in ("tiny.onnx", url, "FER_NB_MODELS", str(alone)))


def test_a_silent_network_is_given_up_after_the_timeout(alone):
    "A server that accepts and says nothing: what a firewall looks like."
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/x"
        began = time.perf_counter()
        with pytest.raises(UsageError, match="tiny.onnx is not in .*no answer in time.*FER_NB_MODELS"):
            open_detector("yunet", files={"yunet": (file_at(url),)}, timeout=0.5, progress=False)
        assert time.perf_counter() - began < 3


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_one_line(site, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(GateError, match="Permission denied"): fetch(file_at(f"{site}/good"), tmp_path / "cache", progress=False)


def test_a_cache_that_is_a_file_is_one_line(site, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(GateError, match="could not be fetched"): fetch(file_at(f"{site}/good"), tmp_path / "cache", progress=False)


def test_folders_are_asked_in_order(alone, monkeypatch, tmp_path):
    file = file_at("http://name.invalid/x")
    folders = [tmp_path / n for n in ("named", "environment")]
    for f in (*folders, alone):
        f.mkdir()
        (f / file.name).write_bytes(DATA)
    monkeypatch.setenv("FER_NB_MODELS", str(folders[1]))
    assert find_file(file, folders[0]) == folders[0] / file.name
    (folders[0] / file.name).unlink()
    assert find_file(file, folders[0]) == folders[1] / file.name
    (folders[1] / file.name).unlink()
    assert find_file(file, folders[0]) == alone / file.name
    (alone / file.name).write_bytes(DATA[:-1])
    assert find_file(file, folders[0]) is None  # damaged: it is fetched anew
    monkeypatch.setenv("FER_NB_MODELS", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="FER_NB_MODELS names .*nowhere, which is not a folder"): open_detector()


def test_the_users_cache_is_the_systems(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux": assert d05.cache_folder() == tmp_path / "fer_nb" / "models"


def test_a_broken_file_of_the_users(alone, tmp_path):
    (tmp_path / MODEL_FILES["yunet"][0].name).write_bytes(b"garbage")
    for f in MODEL_FILES["dnn"]: (tmp_path / f.name).write_bytes(b"garbage")
    for name in ("yunet", "dnn"):
        with pytest.raises(ArtifactError, match="broken or") as e: open_detector(name, models=tmp_path, download=False)
        assert "\n" not in str(e.value) and e.value.exit_code == 1
    detector, note = open_detector(models=tmp_path, download=False)
    assert detector.name == "haar" and "is broken or not a YuNet" in note and "\n" not in note
    with pytest.raises(ArtifactError, match="is missing"): YuNet(tmp_path / "nothing.onnx")
    with pytest.raises(ArtifactError, match="is missing"): SSD(tmp_path / "nothing", tmp_path / "nothing")


def test_the_pinned_yunet(alone):
    (path,), (file,) = model_paths("yunet"), MODEL_FILES["yunet"]
    assert (sha256_file(path), path.stat().st_size) == (file.sha256, file.size)
    detector, note = open_detector(models=path.parent, download=False, width=480, min_face=50)
    assert (detector.name, note, detector.width, detector.min_face) == ("yunet", "", 480, 50)


def test_another_version_of_the_users_is_used_and_said(alone, tmp_path):
    (path,) = model_paths("yunet")
    (tmp_path / path.name).write_bytes(path.read_bytes() + b"\n\0")  # an empty field of protobuf's: another hash, the same network
    detector, note = open_detector("yunet", models=tmp_path, download=False)
    assert detector.name == "yunet" and "is not the pinned version" in note


def test_yunet_through_a_download(alone, tmp_path):
    "The whole way: a server that holds the pinned file, an empty cache, auto."
    (path,), (file,) = model_paths("yunet"), MODEL_FILES["yunet"]

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(path.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    files = {"yunet": (replace(file, url=f"http://127.0.0.1:{server.server_port}/{file.name}"),), "haar": ()}
    detector, note = open_detector(files=files, progress=False)
    server.shutdown()
    server.server_close()
    assert (detector.name, note) == ("yunet", "") and (alone / file.name).is_file()
    assert open_detector(files=files, progress=False)[0].name == "yunet"  # from the cache: the server is gone


@pytest.mark.parametrize("settings", [{"min_face": -1}, {"min_face": float("nan")}, {"width": 0}, {"width": 10**6}, {"width": 320.5},
                                      {"name": "mtcnn"}, {"models": "no such folder"}])
def test_wrong_settings(alone, settings):
    with pytest.raises(UsageError) as e: open_detector(**{"download": False, **settings})
    assert "\n" not in str(e.value)


def test_import_needs_no_torch():
    heavy = ("torch", "fastai", "timm", "matplotlib", "sklearn", "IPython")
    code = f"import fer_nb.detectors, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- real people ------------------------------------------------------------------------------------------------------

def frames_of(path, stride=1) -> list:
    if path.suffix == ".jpg": return [cv2.imread(str(path))]
    film, frames = cv2.VideoCapture(str(path)), []
    while (got := film.read())[0]: frames.append(got[1])
    return frames[::stride]


@pytest.fixture(scope="module")
def films(film_path): return lambda name, stride=1: frames_of(film_path(name), stride)


def test_yunet_finds_the_face_in_every_frame(yunet, films):
    frames = films("WolfgangLanger_Pexels.mp4", 4)
    assert [len(yunet.detect(f)) for f in frames] == [1] * 118
    assert [len(yunet.detect(f)) for f in films("single_face.mp4", 4)] == [1] * 18


def test_the_real_face_keeps_one_number(yunet, films):
    tracker = Tracker()
    assert {i for f in films("WolfgangLanger_Pexels.mp4", 4) for i in tracker.update(yunet.detect(f))} == {1}


def test_nobody_where_nobody_is(yunet, films):
    frames = films("no_face.mp4", 2)
    assert len(frames) == 48 and not any(yunet.detect(f) for f in frames)
    assert not any(Haar().detect(f) for f in frames[::4])


def test_several_faces_in_a_picture(yunet, films):
    (image,) = films("multi_face.jpg")
    found = yunet.detect(image)
    assert len(found) == 5 and all(f.box.side >= 96 for f in found)
    assert len(YuNet(*model_paths("yunet"), min_face=120).detect(image)) < 5
    assert len(set(Tracker().update(found))) == 5


def test_haar_finds_most(films):
    frames = films("WolfgangLanger_Pexels.mp4", 8)
    haar = Haar()
    hits = [len(haar.detect(f)) for f in frames]
    assert len(hits) == 59 and sum(h == 1 for h in hits) >= 56 and max(hits) == 1  # 58 where this was written


def test_eyes_follow_a_turned_head_in_part(films):
    "The share of a turn that YuNet's eyes follow: part of it at 320 px, most at 640. Alignment is as good as this."
    share = {}
    for width in (320, 640):
        detector, shares = YuNet(*model_paths("yunet"), width=width), []
        for frame in (*films("WolfgangLanger_Pexels.mp4", 60), *films("single_face.mp4", 18)):
            centre = detector.detect(frame)[0].box.centre
            upright = eye_angle(detector.detect(frame)[0].eyes)
            for turn in (-20, 20):
                m = cv2.getRotationMatrix2D(centre, turn, 1)
                turned = detector.detect(cv2.warpAffine(frame, m, frame.shape[1::-1], borderMode=cv2.BORDER_REPLICATE))
                if turned: shares.append((upright - eye_angle(turned[0].eyes)) / turn)
        share[width] = np.median(shares)
        assert len(shares) >= 20
    assert 0.1 < share[320] < share[640] and share[640] > 0.6, share


def test_ssd_with_its_weights(films):
    "Skipped where the weights are not at hand; phantoms on most frames before tidying, none after it."
    ssd, frames = SSD(*model_paths("dnn")), films("WolfgangLanger_Pexels.mp4", 16)
    hits, raw = [], []
    for f in frames:
        hits.append(len(ssd.detect(f)))
        rows = ssd.net.forward()[0, 0]
        raw.append((rows[:, 2] >= 0.5).sum())
    assert hits == [1] * 30 and np.mean(np.array(raw) > 1) > 0.5
    assert not any(ssd.detect(f) for f in films("no_face.mp4", 16))


def test_pictures_without_faces_and_faces_that_fill_the_frame(yunet):
    assert yunet.detect(picture(1, 300, colour=True)) == []
    f = framed_face(3, size=300, frame=(320, 300))
    (found,) = yunet.detect(f.image)
    assert iou([found.box], [f.box])[0, 0] > 0.5
