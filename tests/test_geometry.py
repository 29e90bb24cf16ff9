"The one way from a picture to a face: properties, second implementations, and that it needs no torch."
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fer_nb import geometry
from fer_nb.artifacts import Box, GateError, UsageError
from fer_nb.augment import normalise_unit, unit_batch
from fer_nb.geometry import Crop, Geometry, check_geometry, normalise, prepare_face, prepare_pixels, square_crop
from tests.conftest import picture

G = Geometry(size=32)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.floats(-20, 80), st.floats(-20, 80), st.floats(1, 120), st.floats(1, 120),
       st.floats(-80, 80), st.booleans(), st.sampled_from([None, (2.0, 4), (3.0, 8)]))
def test_any_face_becomes_a_square(height, width, x, y, w, h, roll, colour, clahe):
    image = picture(1, 90, colour)[:height, :width]
    eyes = np.array([[0, 0], [np.cos(np.radians(roll)), np.sin(np.radians(roll))]]) * 20 + 10
    small = Geometry(size=24, clahe=clahe)
    if x < width and y < height and x + w > 0 and y + h > 0:
        face = prepare_face(image, small, Box.from_xywh((x, y, w, h)), eyes)
        assert face.shape == (24, 24, 3) and face.dtype == np.uint8
        assert np.array_equal(face, prepare_face(image, small, Box.from_xywh((x, y, w, h)), eyes[::-1]))
    else:
        with pytest.raises(UsageError, match="does not lie in an image"): prepare_face(image, small, Box.from_xywh((x, y, w, h)), eyes)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(list(geometry.KERNELS)), st.integers(20, 80), st.booleans())
def test_grey_is_the_same_with_one_channel_or_three(seed, kernel, size, box):
    image, how = picture(seed, size), Geometry(size=32, interpolation=kernel)
    args = (Box(2, 3, 16, 14), ((5, 6), (12, 8))) if box else ()
    one, three = prepare_pixels(image, how, *args), prepare_pixels(np.repeat(image[..., None], 3, 2), how, *args)
    assert one.ndim == 2 and all(np.array_equal(one, three[..., c]) for c in range(3))


@pytest.mark.parametrize("box", [(5, 7, 20, 20), (-6, -3, 30, 20), (25, 30, 30, 40), (3, 3, 11, 8)])
def test_crop_equals_padding_and_slicing(box):
    image = picture(3, 50, colour=True)
    x, y, w, h = box
    side = max(1, round(max(w, h) * 1.3))
    left, top = (np.floor(np.array([x + w / 2 - side / 2, y + h / 2 - side / 2]) + 0.5 - 1e-9) + 100).astype(int)
    wide = np.pad(image, ((100, 100), (100, 100), (0, 0)), mode="edge")
    near = [wide[t:t + side, le:le + side] for t in (top - 1, top, top + 1) for le in (left - 1, left, left + 1)]
    crop = square_crop(image, Crop(1.3), Box.from_xywh(box))
    assert any(np.array_equal(crop, n) for n in near)  # whole pixels, the centre within one of them
    if (side - w) % 2 == 0 and (side - h) % 2 == 0: assert np.array_equal(crop, near[4])


def test_alignment_undoes_a_known_rotation():
    image, eyes = picture(4, 101), np.array([[35.0, 45.0], [65.0, 45.0]])
    upright = square_crop(image, Crop(1), Box(20, 20, 80, 80), eyes).astype(int)
    for roll in (-50, -15, 30):
        m = cv2.getRotationMatrix2D((49.5, 49.5), -roll, 1)
        rolled = cv2.warpAffine(image, m, (101, 101), flags=cv2.INTER_CUBIC)
        got = square_crop(rolled, Crop(1), Box(20, 20, 80, 80), eyes @ m[:, :2].T + m[:, 2]).astype(int)
        assert np.abs(got - upright)[8:-8, 8:-8].mean() < 4
        assert np.abs(square_crop(rolled, Crop(1), Box(20, 20, 80, 80)).astype(int) - upright)[8:-8, 8:-8].mean() > 15


@pytest.mark.parametrize("side", [150, 330, 700, 1400])
@pytest.mark.parametrize("eyes", [None, ((0.3, 0.42), (0.7, 0.36))])
def test_a_large_face_is_what_the_full_resolution_gives(side, eyes):
    "Made smaller while it is warped, a face differs from the slow way, crop at full resolution and then area, by next to nothing."
    image = cv2.resize(picture(6, 200, colour=True), (side*2, side*2), interpolation=cv2.INTER_CUBIC)
    noise = np.random.default_rng(1).normal(0, 25, image.shape)
    image = np.clip(image + noise, 0, 255).astype(np.uint8)  # what aliasing would show in
    box = Box.from_xywh((side/2, side/2, side, side))
    eyes = None if eyes is None else (np.array(eyes) + 0.5)*side
    how = Geometry(size=64, clahe=None)
    slow = cv2.resize(square_crop(image, Crop(1 + how.margin), box, eyes), (64, 64), interpolation=cv2.INTER_AREA)
    gap = np.abs(prepare_face(image, how, box, eyes).astype(int) - slow[..., ::-1])
    assert gap.mean() < 4.0 and abs(prepare_face(image, how, box, eyes).std() - slow.std()) < 2


def test_normalise_against_float64():
    faces = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    want = (np.moveaxis(faces, -1, 1) / 255 - np.array(G.mean)[:, None, None]) / np.array(G.std)[:, None, None]
    got = normalise(faces, G)
    assert got.dtype == np.float32 and np.abs(got - want).max() < 1e-6
    assert np.array_equal(normalise_unit(unit_batch(torch.from_numpy(faces)), G).numpy(), got)


def test_clahe_against_opencv_on_luminance():
    face = picture(5, 32, colour=True)
    ycc = cv2.cvtColor(face, cv2.COLOR_BGR2YCrCb)
    luma = cv2.createCLAHE(2.0, (4, 4)).apply(np.ascontiguousarray(ycc[..., 0]))
    want = cv2.cvtColor(np.dstack([luma, ycc[..., 1:]]), cv2.COLOR_YCrCb2RGB)
    assert np.array_equal(prepare_face(face, G), want)


@pytest.mark.parametrize("change", [{"size": 48}, {"margin": 0.2}, {"clahe": None}, {"interpolation": "linear-linear"},
                                    {"colour_order": "BGR"}, {"mean": [0.5] * 3}, {"std": [0.5] * 3}])
def test_every_mismatch_is_named(change):
    check_geometry(G, G.to_json())
    with pytest.raises(GateError, match=next(iter(change))): check_geometry(G, G.to_dict() | change, "a model")


def test_geometry_with_missing_or_foreign_fields_is_refused():
    with pytest.raises(GateError, match="margin: expected 0.3, got absent"):
        check_geometry(G, {k: v for k, v in G.to_dict().items() if k != "margin"})
    with pytest.raises(GateError, match="rotation: expected absent, got 3"): check_geometry(G, G.to_dict() | {"rotation": 3})
    with pytest.raises(GateError, match="not JSON"): check_geometry(G, "{")


def test_geometry_hash_is_the_same_in_another_process():
    code = "from fer_nb.geometry import Geometry; print(Geometry(size=32).hash)"
    env = os.environ | {"PYTHONHASHSEED": "99"}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout.strip() == G.hash


@pytest.mark.parametrize("image", [np.zeros((9, 9), np.float32), np.zeros((9, 9, 4), np.uint8), np.zeros((0, 9), np.uint8)])
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(UsageError, match="expected a uint8 image"): prepare_face(image, G)


def test_the_module_needs_no_torch():
    code = "import sys, fer_nb.geometry; sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'fastai', 'matplotlib.pyplot')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
