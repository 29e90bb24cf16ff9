"Face boxes, from the files that a dataset's makers publish to known pixels in the prepared face."
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from fer_nb.archives import decode, read_bytes
from fer_nb.artifacts import ArtifactError, Box
from fer_nb.framing import row_image
from fer_nb.geometry import Crop, Framing, Geometry
from fer_nb.images import load_cache, measure_cache, pack_cache, prepare_row, row_hash
from fer_nb.likeness import crop_box, face_box, pixel_hash
from fer_nb.loading import LazyFaces
from fer_nb.manifests import build_manifest, load_manifest
from fer_nb.records import CacheIndex
from tests.conftest import ROOT

CASES = ROOT.parent/"shared"/"cases"
G = Geometry(size=64, clahe=None)
DISC = Box(300, 200, 400, 300)


def photograph(path, boxes=(DISC,), size=(480, 640)):
    "A black photograph with a white disc in each box."
    image = np.zeros((*size, 3), np.uint8)
    for b in boxes: cv2.circle(image, tuple(map(int, b.centre)), int(b.side/2), (255, 255, 255), -1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def expw(folder, faces):
    "ExpW as it is published: `label.lst` holds name, number, top, left, right, bottom, confidence, class."
    for name, boxes in faces.items(): photograph(folder/"image"/name, boxes)
    lines = [f"{n} {k} {b.top:g} {b.left:g} {b.right:g} {b.bottom:g} 90.0 3" for n, boxes in faces.items() for k, b in enumerate(boxes)]
    (folder/"label.lst").write_text("\n".join(lines))
    return f"expw={folder}"


def affectnet(folder, faces):
    "AffectNet as it is published: a corner and a size in `training.csv`."
    head = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"
    lines = []
    for name, (b,) in faces.items():
        photograph(folder/"1"/name, (b,))
        lines.append(f"1/{name},{b.left:g},{b.top:g},{b.width:g},{b.height:g},,1,0,0")
    (folder/"training.csv").write_text("\n".join([head, *lines]))
    return f"affectnet={folder}"


def white(face): return float(np.mean(face > 127))


@pytest.fixture(params=[expw, affectnet])
def discs(request, tmp_path):
    "A manifest of white discs in boxes of several shapes, and their boxes."
    boxes = [DISC, Box(40, 50, 160, 170), Box(250, 60, 350, 200), Box(400, 300, 520, 380)]
    source = request.param(tmp_path/"data", {f"p{k}.png": (b,) for k, b in enumerate(boxes)})
    build_manifest([source], tmp_path/"m", val_fraction=0)
    return load_manifest(tmp_path/"m"), boxes


def test_a_published_box_cuts_the_face_out(discs, tmp_path):
    manifest, boxes = discs
    cache = pack_cache(manifest, G, tmp_path/"cache", sample=0, progress=False)
    lazy = LazyFaces(manifest.df, G).gather(range(len(boxes)))
    for k, (row, b) in enumerate(zip(manifest.df.itertuples(), boxes, strict=True)):
        assert face_box(row.box) == b and f"p{k}" in row.id
        got = [white(f) for f in (cache.images[k], lazy[k], prepare_row(row, G))]
        assert got == pytest.approx([np.pi/4/1.3**2]*3, abs=0.03)  # the disc has the box's longer side
        assert row.pixel_hash == pixel_hash(crop_box(decode(read_bytes(row.path)), b))
    assert white(cache.images[0]) == pytest.approx(0.45, abs=0.03)


def test_what_was_measured_for_a_source_cuts_its_boxes(discs, tmp_path, monkeypatch):
    manifest, boxes = discs
    framing = Framing(crops={manifest.df.source[0]: Crop(2.0, 0.25, 0.0)})
    monkeypatch.setattr("fer_nb.images.measure_framing", lambda *args, **kwargs: framing)
    cache = pack_cache(manifest, G, tmp_path/"cache", progress=False)
    assert cache.framing == framing
    face = cache.images[0] > 127
    assert face.mean() == pytest.approx(np.pi/16, abs=0.02)
    centre = np.argwhere(face if face.ndim == 2 else face[..., 0]).mean(0)
    assert centre == pytest.approx((31.5, 31.5 - 64*0.25/2), abs=1)  # the square stands a quarter of a box to the right
    assert np.array_equal(LazyFaces(manifest.df, G, framing).gather([0])[0], cache.images[0])


@pytest.mark.parametrize("case", ["expw", "affectnet"])
def test_the_published_layouts(case, tmp_path):
    "Drawn heads in photographs, some off to a side: the box's pixels are hashed, and the square is cut around them."
    if not (CASES/f"{case}-box").is_dir(): pytest.skip("shared/cases is absent")
    build_manifest([f"{case}={CASES/f'{case}-box'}"], tmp_path/"m", val_fraction=0)
    manifest = load_manifest(tmp_path/"m")
    for row in manifest.df.itertuples():
        image, b = row_image(row), face_box(row.box)
        assert row.pixel_hash == pixel_hash(crop_box(decode(read_bytes(row.path)), b))
        side = round(b.side*1.3)
        left, top = (round(c - side/2) + side for c in b.centre)
        wide = np.pad(image, ((side, side), (side, side), (0, 0))[:image.ndim], mode="edge")
        squares = [wide[y:y + side, x:x + side] for y in range(top - 1, top + 2) for x in range(left - 1, left + 2)]  # to a pixel
        kernel = cv2.INTER_AREA if side > 64 else cv2.INTER_CUBIC
        want = [rgb(cv2.resize(s, (64, 64), interpolation=kernel)).astype(int) for s in squares]
        assert min(np.abs(prepare_row(row, G) - w).mean() for w in want) < 3


def rgb(image): return image if image.ndim == 2 else image[..., ::-1]


def test_a_table_without_a_box_for_a_row_leaves_the_row_out(tmp_path):
    affectnet(tmp_path/"data", {f"p{k}.png": (DISC,) for k in range(3)})
    table = tmp_path/"data"/"training.csv"
    table.write_text(table.read_text().replace("p1.png,300,200", "p1.png,nan,").replace("p2.png,300", "p2.png,left"))
    build_manifest([f"affectnet={tmp_path/'data'}"], tmp_path/"m", val_fraction=0)
    assert list(load_manifest(tmp_path/"m").df.excluded) == ["", "no face box", "no face box"]


def test_a_cache_of_wrong_boxes_is_refused_and_packed_again(discs, tmp_path):
    manifest, boxes = discs
    cache = pack_cache(manifest, G, tmp_path/"cache", sample=0, progress=False)
    right = cache.images[0].copy()
    before = {"framing": None, "row_hash": row_hash(manifest.df[["id", "sha256"]])}  # as it was before boxes had a type
    CacheIndex(**cache.index.model_dump() | before).save(tmp_path/"cache")
    with pytest.raises(ArtifactError, match="may have cut boxes wrongly.*pack the cache again"): load_cache(tmp_path/"cache", manifest)
    with pytest.raises(ArtifactError, match="opened without its manifest"): load_cache(tmp_path/"cache")
    with pytest.raises(ArtifactError, match="may have cut boxes wrongly"): measure_cache(tmp_path/"cache", manifest)
    again = pack_cache(manifest, G, tmp_path/"cache", sample=0, progress=False)
    assert np.array_equal(again.images[0], right) and again.framing == Framing(crops={manifest.df.source[0]: Crop(1.3)}, seed=1337)
    manifest.df["box"] = [[b.left + 3, *b.corners[1:]] for b in boxes]
    with pytest.raises(ArtifactError, match="other face boxes than the manifest"): load_cache(tmp_path/"cache", manifest)


def test_an_old_cache_without_boxes_opens_beside_its_manifest(tmp_path):
    for k in range(3): photograph(tmp_path/"data"/"train"/"happy"/f"{k}.png", (Box(10 + k, 10, 50, 50),), (64, 64))
    build_manifest([f"folder={tmp_path/'data'}"], tmp_path/"m", val_fraction=0)
    manifest = load_manifest(tmp_path/"m")
    cache = pack_cache(manifest, G, tmp_path/"cache", sample=0, progress=False)
    index = json.loads((tmp_path/"cache"/"cache_index.json").read_text())
    CacheIndex(**index | {"framing": None}).save(tmp_path/"cache")
    assert load_cache(tmp_path/"cache", manifest).framing is None
    assert cache.index.row_hash == row_hash(manifest.df[["id", "sha256"]])
