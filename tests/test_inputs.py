"""Datasets, pictures and films as they come: the cases that public reports led to, and others of each kind that are drawn here."""
import contextlib
import http.server
import os
import threading
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from fer_nb.archives import PICTURES, as_text, decode, is_picture, read_bytes
from fer_nb.artifacts import CLASSES, FerError, UsageError
from fer_nb.capture import SourceLost, open_source
from fer_nb.gates import gates
from fer_nb.geometry import Geometry
from fer_nb.images import prepare_row
from fer_nb.likeness import crop_box, face_box, pixel_hash
from fer_nb.manifests import build_manifest
from fer_nb.sources import read_source
from tests.conftest import ROOT
from tests.conftest import picture as drawn


@pytest.fixture
def case():
    "A function from the name of a case to its folder."
    def folder(name) -> Path:
        path = Path(os.environ.get("FER_NB_CASES", ROOT.parent/"shared"/"cases"))/name
        if not path.exists(): pytest.skip(f"the case {name} is not at hand: set FER_NB_CASES to the folder of cases")
        return path
    return folder


def build(source, out, **kwargs): return build_manifest([str(source)], out, progress=False, workers=1, **kwargs).manifest.df


def put(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def oriented(jpeg: bytes, orientation: int) -> bytes:
    "A JPEG with an EXIF orientation before its pixels."
    tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([orientation, 0, 0, 0]) + b"\0\0\0\0"
    body = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + jpeg[2:]


TURNS = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
         6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a)}


# --- the cases ---------------------------------------------------------------------------------------------------------

def test_copies_that_exif_turns_are_found(case, tmp_path):
    df = build(f"folder={case('exif-duplicate')}", tmp_path/"m")
    names = set(df[df.split == "test"].id.str.extract(r"(\d+)_phone")[0])
    twins = df[(df.usage == "train") & df.id.str.extract(r"/(\d+)\.")[0].isin(names)]
    assert len(names) and len(twins) and (twins.excluded == "duplicate of a test image").all()


@pytest.mark.parametrize("name, kind", [("exif-expw", "expw"), ("expw-box", "expw"), ("affectnet-box", "affectnet")])
def test_the_crop_that_is_hashed_is_the_crop_that_is_packed(case, tmp_path, name, kind):
    df = build(f"{kind}={case(name)}", tmp_path/"m")
    assert len(df) and (df.excluded == "").all()
    for row in df.itertuples():
        upright, box = decode(read_bytes(row.path)), face_box(row.box)
        assert row.pixel_hash == pixel_hash(crop_box(upright, box))
        assert (row.width, row.height) == upright.shape[1::-1]
        assert box.right <= row.width and box.bottom <= row.height  # the face lies in the upright picture


def test_annotations_in_npy(case, tmp_path):
    df = build(f"affectnet={case('affectnet-npy')}", tmp_path/"m")
    assert len(df) == 63 and set(df.split) == {"train", "val", "test"} and (df[df.usage == "val_set"].split == "test").all()
    wanted = ("Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Angry", "contempt")
    for row in df.itertuples():
        number = int(np.load(row.path.replace("/images/", "/annotations/").replace(".png", "_exp.npy")))
        assert row.label == wanted[number] or row.excluded == f"unmapped label: {wanted[number]}"


def test_windows_paths_in_a_table(case, tmp_path):
    df = build(f"affectnet={case('windows-csv')}", tmp_path/"m")
    assert not (df.excluded == "missing file").any() and (df.excluded == "").sum() > 20


@pytest.mark.parametrize("name", ["usage_lower", "usage_train_test", "float_labels", "cr_only"])
def test_fer2013_as_people_pass_it_around(case, tmp_path, name):
    df = build(f"fer2013_csv={case('fer2013-csv')/name}", tmp_path/"m")
    assert set(df.label) == set(CLASSES) and {"train", "test"} <= set(df.split) and (df.split != "test").sum() > 20


@pytest.mark.parametrize("name", ["backslash", "bzip2", "deflate", "lzma"])
def test_zips_however_they_are_packed(case, tmp_path, name):
    df = build(f"folder={case('zips')/name}.zip", tmp_path/"m")
    whole = build(f"folder={case('zips')/'deflate'}.zip", tmp_path/"d")
    assert list(df.id) == list(whole.id) and list(df.pixel_hash) == list(whole.pixel_hash) and (df.excluded == "").any()


def test_a_locked_zip_is_called_locked(case, tmp_path):
    with pytest.raises(UsageError, match="encrypted.zip: is locked with a password: unpack"):
        build(f"folder={case('zips')/'encrypted.zip'}", tmp_path/"m")


def test_a_class_folder_that_is_a_link(case):
    df = read_source(f"folder={case('linked-class')/'a'}")
    assert (df[df.usage == "train"].label == "Happy").any()


def test_a_header_that_promises_too_much(case, tmp_path):
    with pytest.raises(FerError, match="huge"): decode(read_bytes(str(case("huge-header")/"huge.png")), name="huge.png")
    for k, c in enumerate(CLASSES): put(tmp_path/f"d/{c}/{k}.png", drawn(k))
    (tmp_path/"d/Happy/huge.png").write_bytes((case("huge-header")/"huge.png").read_bytes())
    df = build(f"folder={tmp_path/'d'}", tmp_path/"m")
    assert df.set_index("id").excluded["folder/Happy/huge.png"] == "broken file" and (df.excluded == "").sum() == 7


def test_frames_in_the_order_of_their_numbers(case):
    assert [p.name for p in open_source(case("frame-order")).paths] == ["frame1.jpg", "frame2.jpg", "frame10.jpg"]


# --- others of each kind -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("orientation", TURNS)
def test_one_reading_for_every_orientation(tmp_path, orientation):
    image = np.full((60, 90, 3), 200, np.uint8)
    image[5:25, 8:38], image[30:50, 60:80] = (20, 60, 220), (200, 40, 10)
    turned = np.ascontiguousarray(TURNS[{6: 8, 8: 6}.get(orientation, orientation)](image))  # the inverse of what EXIF asks for
    for k in range(7): put(tmp_path/f"faces/image/{k}.png", drawn(k))
    jpeg = cv2.imencode(".jpg", turned, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    (tmp_path/"faces/image/phone.jpg").write_bytes(oriented(jpeg, orientation))
    lines = [f"{k}.png 0 0 0 30 30 90.0 {k}" for k in range(7)] + ["phone.jpg 0 5 8 38 25 90.0 3"]
    (tmp_path/"faces/label.lst").write_text("\n".join(lines))
    row = build(f"expw={tmp_path/'faces'}", tmp_path/"m").set_index("id").loc["expw/image/phone.jpg#0"]
    upright = decode(read_bytes(row.path))
    assert (row.width, row.height) == (90, 60) and np.abs(upright.astype(int) - image).mean() < 3
    face = crop_box(upright, face_box(row.box))
    assert row.pixel_hash == pixel_hash(face) and abs(face.reshape(-1, 3).mean(0) - (20, 60, 220)).max() < 12
    from fer_nb.pictures import read_picture
    assert (read_picture(row.path) == upright).all()
    geometry = Geometry(size=32, margin=0, clahe=None)
    packed = prepare_row(row, geometry)
    assert abs(packed[12:20, 12:20].reshape(-1, 3).mean(0) - (220, 60, 20)).max() < 12  # RGB of the same box, which a square is cut around


@pytest.mark.parametrize("kind", [".gif", ".avif", ".jfif", ".jpe", ".jp2", ".webp", ".tif", ".bmp", ".dib", ".png", ".ppm", ".pbm"])
def test_every_format_becomes_rows(tmp_path, kind):
    for k, c in enumerate(CLASSES):
        data = cv2.imencode({".jfif": ".jpg", ".jpe": ".jpg", ".dib": ".bmp"}.get(kind, kind), drawn(k, colour=kind != ".pbm"))[1].tobytes()
        for name in (f"a{kind}", f"b{kind.upper()}", "none", "wrong.dat"):
            (tmp_path/"d"/c).mkdir(parents=True, exist_ok=True)
            (tmp_path/"d"/c/name).write_bytes(data)
        (tmp_path/"d"/c/"notes.txt").write_text("no picture")
    df = build(f"folder={tmp_path/'d'}", tmp_path/"m", val_fraction=0)
    assert len(df) == 35 and (df.excluded == "").sum() == 28 and (df.excluded == "not a picture").sum() == 7
    assert open_source(tmp_path/"d"/"Happy").frames == 4  # the same list for films of pictures


def test_endings_and_beginnings_agree():
    for kind in (".png", ".jpg", ".gif", ".webp", ".avif", ".tif", ".jp2", ".bmp", ".pgm"):
        head = cv2.imencode(kind, drawn(1, colour=kind != ".pgm"))[1].tobytes()[:64]
        assert kind in PICTURES and is_picture("x", lambda head=head: head)
    assert not is_picture("notes.txt", lambda: b"no picture") and not is_picture("empty")


def test_links_are_followed_and_loops_end(tmp_path):
    for k, c in enumerate(CLASSES): put(tmp_path/f"real/{c}/{k}.png", drawn(k))
    root = tmp_path/"data"
    (root/"train").mkdir(parents=True)
    for c in CLASSES: (root/"train"/c).symlink_to(tmp_path/"real"/c)
    (root/"train"/"again").symlink_to(root)
    (tmp_path/"real"/"Happy"/"up").symlink_to(root)
    (tmp_path/"real"/"Sad"/"self").symlink_to(tmp_path/"real"/"Sad")
    df = read_source(f"folder={root}")
    assert len(df) == 7 and set(df.label) == set(CLASSES)
    (root/"test").mkdir()
    (root/"test"/"happy").symlink_to(tmp_path/"gone")
    with pytest.raises(UsageError, match="happy: leads to no folder"): read_source(f"folder={root}")


def test_ids_never_clash(tmp_path):
    places = ("a/train/happy/1.png", "b/train/happy/1.png", "c/train/happy/2.png", "train/x/happy/3.png", "a\\train\\happy\\1.png")
    for k, place in enumerate(places): put(tmp_path/"d"/place, drawn(k))
    with zipfile.ZipFile(tmp_path/"d"/"train"/"x.zip", "w") as z:
        for name in ("happy/3.png", "x/happy/3.png"): z.writestr(name, cv2.imencode(".png", drawn(len(name)))[1].tobytes())
    df = read_source(f"folder={tmp_path/'d'}")
    assert df.id.is_unique and df.path.is_unique and len(df) == 7
    assert {"folder/a/train/happy/1.png", "folder/b/train/happy/1.png", "folder/train/happy/2.png"} <= set(df.id)


def test_names_in_any_encoding(tmp_path):
    for k, c in enumerate(CLASSES): put(tmp_path/f"d/{c}/{k}.png", drawn(k))
    odd = os.fsencode(tmp_path/"d"/"Happy") + b"/caf\xe9.png"
    try: Path(os.fsdecode(odd)).write_bytes(cv2.imencode(".png", drawn(50))[1].tobytes())
    except OSError: pytest.skip("this disk takes names in UTF-8 only")
    put(tmp_path/"d/Happy/表情 🙂.png", drawn(51))
    df = build(f"folder={tmp_path/'d'}", tmp_path/"m")
    assert (df.excluded == "").all() and r"folder/Happy/caf\xe9.png" in set(df.id) and "folder/Happy/表情 🙂.png" in set(df.id)
    assert as_text("plain") == "plain"
    from fer_nb.audit import validate_manifest
    assert validate_manifest(tmp_path/"m", progress=False).report.passed


def fer_csv(sep=",", end="\n", usage=("Training", "PublicTest", "PrivateTest"), head=("emotion", "pixels", "Usage"), label=str, side=8):
    rows = [sep.join(head)]
    for k in range(28):
        pixels = " ".join(map(str, drawn(k, side).ravel()))
        rows.append(sep.join([label(k % 7), pixels, usage[k % len(usage)]][:len(head)]))
    return end.join(rows) + end


VARIANTS = {
    "utf-16": (dict(), "utf-16"), "utf-16-le without a mark": (dict(), "utf-16-le"), "utf-8 with a mark": (dict(), "utf-8-sig"),
    "semicolons": (dict(sep=";"), "utf-8"), "tabs": (dict(sep="\t"), "utf-8"), "carriage returns": (dict(end="\r"), "utf-8"),
    "windows": (dict(end="\r\n"), "utf-8"), "capitals": (dict(head=("Emotion", "Pixels", "usage")), "utf-8"),
    "spaces in the head": (dict(head=("emotion", " pixels", " Usage")), "utf-8"),
    "floats": (dict(label=lambda k: f"{k}.0"), "utf-8"), "parts in capitals": (
        dict(usage=("TRAINING", "PUBLICTEST", "privatetest")), "utf-8"),
    "parts with blanks": (dict(usage=("training", "Public Test", "private_test")), "utf-8"),
    "other parts": (dict(usage=("train", "val", "test")), "utf-8"), "long fields": (dict(side=260), "utf-8"),
    "semicolons, utf-16, returns": (dict(sep=";", end="\r"), "utf-16"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_spellings_of_a_csv(tmp_path, name):
    how, encoding = VARIANTS[name]
    (tmp_path/"fer2013.csv").write_bytes(fer_csv(**how).encode(encoding))
    df = build(f"fer2013_csv={tmp_path/'fer2013.csv'}", tmp_path/"m", val_fraction=0)
    assert len(df) == 28 and set(df.label) == set(CLASSES) and {"train", "test"} <= set(df.split)
    at = {r.id: r for r in df.itertuples()}
    for k in (0, 13, 27): assert (decode(read_bytes(at[f"fer2013/fer2013.csv/{k:06d}"].path)) == drawn(k, how.get("side", 8))).all()


@pytest.mark.parametrize("text, says", [
    (fer_csv(usage=("Training", "Held-Back")), "unknown part 'Held-Back'"), (fer_csv(usage=("Training", "")), "unknown part ''"),
    (fer_csv(head=("emotion", "pixels")), "lacks the column 'Usage"),
    ("emotion,pixels,Usage\n3,1 2 3 4,Training\n4\n", "is not a whole CSV")])
def test_what_is_refused_in_one_line(tmp_path, text, says):
    (tmp_path/"fer2013.csv").write_text(text)
    with pytest.raises(FerError, match=says) as e: build(f"fer2013_csv={tmp_path/'fer2013.csv'}", tmp_path/"m")
    assert len(str(e.value).splitlines()) == 1


def test_an_unknown_part_beside_known_ones_is_refused(tmp_path):
    for part in ("train", "test", "extra"): put(tmp_path/f"d/{part}/happy/1.png", drawn(1))
    with pytest.raises(UsageError, match="unknown part 'extra'"): read_source(f"folder={tmp_path/'d'}")


def test_a_missing_test_part_is_said_and_can_be_held_out(case, tmp_path):
    source = f"folder={case('no-test-part')}"
    built = build_manifest([source], tmp_path/"m", progress=False, workers=1)
    assert any("no test rows: hold some out with --test-fraction" in str(line) for line in built.lines())
    with pytest.raises(UsageError, match="the view test_all_sources has no rows: .*--test-fraction"): built.manifest.splits("train_all")
    noted = [line for line in gates(tmp_path).lines if "--test-fraction" in line.reason]
    assert len(noted) == 1 and noted[0].go
    held = [build(source, tmp_path/f"held{k}", test_fraction=0.2, seed=seed) for k, seed in enumerate((1, 1, 2))]
    assert held[0].equals(held[1]) and not held[0].split.equals(held[2].split)
    usable = held[0][held[0].excluded == ""]
    assert set(usable[usable.split == "test"].label) == set(CLASSES) and usable.groupby("group").split.nunique().max() == 1
    assert 0.15 < (usable.split == "test").mean() < 0.35


@pytest.mark.parametrize("name", ["cfr.mp4", "vfr.mp4", "vfr.webm", "jitter.mp4", "recorder.webm", "recorder_jitter.webm", "raw.h264"])
def test_no_frame_of_a_film_is_lost(case, name):
    "All seven films show the same 272 pictures; what their headers count and how their times run differs."
    source, times, seen = open_source(case("videos")/name), [], []
    while frame := source.read():
        times.append(frame.time_sec)
        seen.append(frame.image.tobytes())
    assert len(seen) == source.frames == 272 and (np.diff(times) > 0).all() and not source.mended
    assert (source.clock == "container") == (name != "raw.h264") == (not source.note)
    if name.startswith("vfr"): assert np.diff(times).max() > 1.5*np.diff(times).min()  # times are the container's, not the mean rate's
    for k in (136, 3, 271):
        source.seek(k)
        frame = source.read()
        assert (frame.index, frame.time_sec, frame.image.tobytes()) == (k, times[k], seen[k])


@pytest.mark.parametrize("address", ["rtsp://me:secret@127.0.0.1:9/stream", "http://127.0.0.1:9/film.mp4?key=secret", "nonsense://x"])
def test_an_address_that_gives_nothing_is_refused_as_one(address):
    with pytest.raises(UsageError, match="no film comes from this address") as e: open_source(address)
    assert "secret" not in str(e.value) and len(str(e.value).splitlines()) == 1


def test_a_picture_that_no_table_lists_is_counted(tmp_path):
    for k in range(9): put(tmp_path/f"d/image/{k}.png", drawn(k))
    (tmp_path/"d/label.lst").write_text("\n".join(f"{k}.png 0 0 0 30 30 90.0 {k}" for k in range(7)))
    (tmp_path/"a/image").mkdir(parents=True)
    for k in range(9): put(tmp_path/f"a/image/{k}.png", drawn(k))
    (tmp_path/"a/training.csv").write_text("image,label\n" + "".join(f"image\\{k}.png,{k}\n" for k in range(7)))
    for source, reason in ((f"expw={tmp_path/'d'}", "no label in label.lst"), (f"affectnet={tmp_path/'a'}", "no label in the tables")):
        df = read_source(source)
        assert len(df) == 9 and (df.excluded == reason).sum() == 2 and (df.excluded == "").sum() == 7


TURNED = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}  # how a phone says it: the matrix of the track


def a_film(path, fourcc="mp4v", turn=0):
    "A film of 12 frames, 96 by 64, bright in its upper left corner; its container says how far to turn it."
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), 12, (96, 64))
    for k in range(12):
        image = np.full((64, 96, 3), 20 + 3*k, np.uint8)
        image[:32, :48] = 230
        writer.write(image)
    writer.release()
    if turn:
        data, (a, b, c, d) = bytearray(path.read_bytes()), TURNED[turn]
        at = data.index(b"tkhd") + 4 + 40  # version 0: forty bytes before the matrix
        data[at:at + 36] = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("turn", [0, *TURNED])
def test_a_film_is_turned_as_its_container_says(tmp_path, turn):
    source = open_source(a_film(tmp_path/"film.mp4", turn=turn))
    frames = [f.image for f in iter(source.read, None)]
    assert len(frames) == 12 and {f.shape for f in frames} == {(96, 64, 3) if turn % 180 else (64, 96, 3)}
    h, w = frames[0].shape[:2]
    halves = {(y, x): frames[0][y*h//2:(y + 1)*h//2, x*w//2:(x + 1)*w//2].mean() for y in (0, 1) for x in (0, 1)}
    assert max(halves, key=halves.get) == {0: (0, 0), 90: (0, 1), 180: (1, 1), 270: (1, 0)}[turn]


class Camera(http.server.BaseHTTPRequestHandler):
    "A camera on the network: a film as a file, and pictures one after another that end when they end."
    protocol_version = "HTTP/1.0"
    def log_message(self, *args): pass

    def do_GET(self):
        self.send_response(200)
        if self.path.startswith("/film"):
            data = self.server.film.read_bytes()
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
        self.end_headers()
        for k in range(9):
            jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), 20*k, np.uint8))[1].tobytes()
            self.wfile.write(b"--next\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (len(jpeg), jpeg))


@pytest.mark.parametrize("what", ["film.avi", "live"])
def test_a_film_from_the_network_is_read(tmp_path, what):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    server.film = a_film(tmp_path/"film.avi", "MJPG")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        source, frames = open_source(f"http://127.0.0.1:{server.server_port}/{what}"), []
        with contextlib.suppress(SourceLost): frames.extend(iter(source.read, None))
        assert len(frames) >= (12 if what == "film.avi" else 8)  # the last picture of a stream ends when the next one begins
        assert [f.index for f in frames] == list(range(len(frames))) and (np.diff([f.time_sec for f in frames]) > 0).all()
        if what == "live": assert np.abs([f.image.mean() - 20*k for k, f in enumerate(frames)]).max() < 4
        source.close()
    finally: server.shutdown(); server.server_close()
