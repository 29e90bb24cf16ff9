"""Networks of grey pictures: what they learned is said, and colours never reach them."""

import cv2
import numpy as np
import onnx
import pytest
import torch

from fer_nb.artifacts import CLASSES, ArtifactError
from fer_nb.augment import Augment, batch_generator, draw_augment
from fer_nb.deploy import STUDENTS, Predictor, read_facts
from fer_nb.detectors import open_detector
from fer_nb.geometry import Box, Crop, Geometry, luminance, normalise, prepare_face, prepare_pixels, prepare_views
from fer_nb.images import load_cache, pack_cache, prepare_row
from fer_nb.loading import PackedFaces, eval_loader
from fer_nb.manifests import build_manifest
from fer_nb.pictures import faces_of
from fer_nb.starts import open_start
from fer_nb.synthetic import render_faces
from fer_nb.training import open_data

PLAIN, GREY = Geometry(size=48), Geometry(size=48, grey=True)


def coloured(seed=0, shape=(120, 160)): return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("model", STUDENTS)
def test_the_students_that_ship_say_that_they_learned_grey_pictures(model):
    "In the file that ships and in its trainable weights."
    said = {p.key: p.value for p in onnx.load(STUDENTS[model]).metadata_props}
    assert read_facts(said, "it").geometry.grey and Predictor(model).geometry.grey
    assert open_start(STUDENTS[model].with_suffix(".safetensors"))[1]["geometry"]["grey"] is True


def test_every_way_in_takes_the_colours_out():
    image, box, marks = coloured(), Box(40, 30, 110, 100), np.array([(60, 50), (90, 52), (75, 65), (62, 80), (88, 82)], float)
    grey, crop = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), Crop(1.2, shape=tuple(map(tuple, (marks - 40)/70)))
    np.testing.assert_array_equal(prepare_pixels(image, GREY, box, marks), prepare_pixels(grey, PLAIN, box, marks))
    np.testing.assert_array_equal(prepare_face(image, GREY), prepare_face(grey, PLAIN))
    np.testing.assert_array_equal(prepare_views(image, GREY, box, marks, crop), prepare_views(grey, PLAIN, box, marks, crop))
    faces = np.stack([prepare_face(image, PLAIN)])
    np.testing.assert_array_equal(normalise(faces, GREY), normalise(luminance(faces, "RGB"), PLAIN))
    assert np.ptp(normalise(faces, GREY)*np.array(GREY.std)[:, None, None] + np.array(GREY.mean)[:, None, None], axis=1).max() < 1e-5


@pytest.mark.parametrize("model", STUDENTS)
def test_colour_changes_no_answer(model):
    "Of a picture that is a face, of one prepared elsewhere, and of one that a detector finds."
    p, faces = Predictor(model), render_faces(24, size=96, seed=5)[0]
    np.testing.assert_array_equal(p(list(faces), order="RGB"), p([luminance(f, "RGB") for f in faces]))
    frame = np.full((360, 480, 3), 90, np.uint8)
    frame[60:300, 120:360] = cv2.resize(render_faces(1, size=240, seed=1)[0][0][..., ::-1], (240, 240))
    finder, _ = open_detector("haar", min_face=48)
    a, b = (faces_of(x, finder, p) for x in (frame, luminance(frame)))
    assert len(a) == len(b)
    for x, y in zip(a, b): np.testing.assert_array_equal(x.probs, y.probs)


def test_what_was_made_before_keeps_its_hashes():
    assert PLAIN.to_json() == ('{"clahe": [2.0, 4], "colour_order": "RGB", "interpolation": "area-cubic", "margin": 0.3, '
                               '"mean": [0.485, 0.456, 0.406], "size": 48, "std": [0.229, 0.224, 0.225]}')
    assert GREY.hash != PLAIN.hash and GREY.pixel_hash == PLAIN.pixel_hash
    assert "grey" not in Augment().model_dump() and "grey" not in Augment().model_dump_json()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "A grey source and a coloured one in one manifest, packed together."
    root, rng = tmp_path_factory.mktemp("both"), np.random.default_rng(0)
    for source in ("grey", "colour"):
        for part in ("train", "test"):
            for c in CLASSES:
                folder = root/source/part/c.lower()
                folder.mkdir(parents=True)
                for k in range(8):
                    image = cv2.resize(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), (48, 48), interpolation=cv2.INTER_CUBIC)
                    cv2.imwrite(str(folder/f"{source}{k}.png"), luminance(image) if source == "grey" else image)
    built = build_manifest([f"fer2013_folder={root/'grey'}", f"folder={root/'colour'}"], root/"m", name="both", seed=1)
    return root, built.manifest


def test_a_cache_of_grey_pictures_says_so_and_a_mixed_one_does_not(both, tmp_path):
    root, manifest = both
    mixed = pack_cache(manifest, PLAIN, tmp_path/"mixed", sample=0, progress=False)
    rows = manifest.view("train_all")
    grey, colour = rows[rows.source == "fer2013"], rows[rows.source != "fer2013"]
    alone = pack_cache(manifest, PLAIN, tmp_path/"alone", rows=grey, sample=0, progress=False)
    assert not mixed.geometry.grey and mixed.images.ndim == 4 and alone.geometry.grey and alone.images.ndim == 3
    assert PackedFaces(mixed, grey).is_grey() and not PackedFaces(mixed, colour).is_grey() and not PackedFaces(mixed, rows).is_grey()


def test_a_network_of_grey_pictures_uses_a_cache_of_colours(both, tmp_path):
    root, manifest = both
    pack_cache(manifest, PLAIN, tmp_path/"c", sample=0, progress=False)
    rows = manifest.view("train_all")
    seen = PackedFaces(load_cache(tmp_path/"c", manifest, GREY), rows)
    assert seen.geometry.grey and seen.gather(np.arange(9)).shape == (9, 48, 48)
    x = eval_loader(seen).one_batch()[0]*torch.tensor(GREY.std)[:, None, None] + torch.tensor(GREY.mean)[:, None, None]
    assert (x.amax(1) - x.amin(1)).max() < 1e-5


def test_a_cache_without_its_colours_is_no_cache_for_who_learned_them(both, tmp_path):
    root, manifest = both
    made = pack_cache(manifest, GREY, tmp_path/"c", sample=0, progress=False)
    row = manifest.view().iloc[-1]
    np.testing.assert_array_equal(made.images[len(made) - 1], prepare_row(row, GREY))
    with pytest.raises(ArtifactError, match="geometry.grey"): load_cache(tmp_path/"c", manifest, PLAIN)
    again = pack_cache(manifest, PLAIN, tmp_path/"c", sample=0, progress=False)  # replaced
    assert again.images.ndim == 4
    assert pack_cache(manifest, GREY, tmp_path/"c", sample=0, progress=False).images.ndim == 3


def test_training_on_the_grey_part_of_a_mixed_cache_is_training_on_grey(both, tmp_path):
    from fer_nb.audit import audit_manifest, validate_manifest
    root, manifest = both
    pack_cache(manifest, PLAIN, tmp_path/"c", sample=0, progress=False)
    validate_manifest(root/"m"); audit_manifest(root/"m")
    grey = open_data(root/"m", tmp_path/"c", view="train_all", source="fer2013")
    assert all(part.geometry.grey for part in (grey.train, grey.val, grey.test, grey.own_val))
    assert grey.test.gather(np.arange(len(grey.test))).ndim == 3
    colour = open_data(root/"m", tmp_path/"c", view="train_all", source="folder")
    assert not colour.geometry.grey and colour.test.gather(np.arange(3)).ndim == 4


def test_random_grey_leaves_the_other_draws_alone():
    a, b = (draw_augment(Augment(grey=g), 64, batch_generator(4)) for g in (0, 0.3))
    for name in ("view", "theta", "gain", "offset", "patch", "shade"): assert torch.equal(getattr(a, name), getattr(b, name))
    assert not a.grey.any() and 5 < b.grey.sum() < 35
