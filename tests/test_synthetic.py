"""Synthetic faces: anatomy as properties, the same pixels anywhere, interrupted writes, and what a face detector sees."""
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fer_nb import anatomy, painting
from fer_nb import synthetic as sy
from fer_nb.artifacts import CLASSES, UsageError, sha256_bytes

UNITS = sorted(anatomy.AU_NAMES)
aus_strategy = st.dictionaries(st.sampled_from(UNITS), st.floats(0, 1), max_size=8)
people = st.integers(0, 2**40).map(lambda k: anatomy.make_identity(3, k))


def area(polygon):
    x, y = np.asarray(polygon).T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


@settings(deadline=None, max_examples=150)
@given(people, aus_strategy, st.floats(-0.5, 0.5))
def test_any_action_units_give_a_drawable_face(who, aus, asymmetry):
    shape, depth = anatomy.face_shape(who, aus, asymmetry)
    assert all(np.isfinite(p).all() and np.abs(p).max() < 3 for p in shape.values())
    assert all(0 < d <= 1 for d in depth.values()) and set(depth) <= set(shape)
    mouth = shape["mouth"]
    assert (mouth[12:][::-1, 1] >= mouth[:12, 1] - 1e-9).all(), "the lower lip never passes the upper"


@settings(deadline=None, max_examples=60)
@given(people, aus_strategy, st.floats(-0.5, 0.5))
def test_asymmetry_mirrors(who, aus, asymmetry):
    one, other = anatomy.face_shape(who, aus, asymmetry)[0], anatomy.face_shape(who, aus, -asymmetry)[0]
    for part in ("eye", "brow", "lid", "nose_wing"):
        np.testing.assert_allclose(one[part + "L"] * (-1, 1), other[part + "R"], atol=1e-9)
    np.testing.assert_allclose(one["corners"] * (-1, 1), other["corners"][::-1], atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(people)
def test_action_units_move_what_facs_says(who):
    def shape(*units): return anatomy.face_shape(who, dict.fromkeys(units, 1.0))[0]
    rest = shape()
    brow = {u: (shape(u)["browR"] - rest["browR"]) for u in (1, 2, 4)}  # [0] and [-1] are the inner end
    assert brow[1][0, 1] < -0.05 and abs(brow[1][11, 1]) < 0.02, "AU1 raises the inner end only"
    assert brow[2][11, 1] < -0.05 and abs(brow[2][0, 1]) < 0.02, "AU2 raises the outer end only"
    assert brow[4][0, 1] > 0.05 and brow[4][0, 0] < 0, "AU4 lowers the inner end and draws it to the midline"
    eye = area(rest["eyeR"])
    assert area(shape(5)["eyeR"]) > 1.2 * eye > eye > 1.2 * area(shape(7)["eyeR"]) and area(shape(45)["eyeR"]) < 0.1 * eye
    corner = {u: shape(u)["corners"][1] - rest["corners"][1] for u in (12, 15, 20, 23)}
    assert corner[12][1] < -0.1 and corner[12][0] > 0 and corner[15][1] > 0.1 and corner[20][0] > 0.05 and corner[23][0] < 0
    gaps = [area(shape(*u)["mouth"]) for u in ((), (25,), (26,), (27,))]
    assert gaps == sorted(gaps) and gaps[3] > 0.05
    assert shape(27)["head"][:, 1].max() > rest["head"][:, 1].max() + 0.1, "the chin falls with the jaw"


@given(st.dictionaries(st.sampled_from(UNITS), st.sampled_from([0.2, 0.4, 0.6, 0.8, 1.0])))
def test_facs_notation_round_trip(aus):
    levels = {0.2: "A", 0.4: "B", 0.6: "C", 0.8: "D", 1.0: "E"}
    assert anatomy.parse_aus("+".join(f"{k}{levels[v]}" for k, v in aus.items())) == aus


def test_emfacs_prototypes():
    units = {c: set(anatomy.parse_aus(v[0])) for c, v in anatomy.EMOTION_AUS.items()}
    assert units["Happy"] == {6, 12} and units["Sad"] == {1, 4, 15} and units["Surprise"] == {1, 2, 5, 26}
    assert units["Fear"] == {1, 2, 4, 5, 7, 20, 26} and units["Angry"] == {4, 5, 7, 23} and units["Neutral"] == set()
    assert units["Disgust"] >= {9, 15, 16}


def test_same_pixels_in_another_process_and_order():
    here, _ = sy.render_faces(6, start=40, size=48, seed=11)
    code = ("import hashlib; from fer_nb.synthetic import render_faces\n"
            "for i in reversed(range(40, 46)):\n"
            "    print(hashlib.sha256(render_faces(1, start=i, size=48, seed=11)[0].tobytes()).hexdigest())")
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert there[::-1] == [sha256_bytes(i.tobytes()) for i in here]


def test_seed_and_size_and_noise_change_only_what_they_should():
    base = sy.render_faces(30, size=48, seed=1, label_noise=0.0)[1]
    assert not base.equals(sy.render_faces(30, size=48, seed=2, label_noise=0.0)[1])
    larger = sy.render_faces(30, size=64, seed=1, label_noise=0.4)[1]
    assert base.drop(columns="label").equals(larger.drop(columns="label"))
    assert (base.label == base.true_label).all() and (larger.label != larger.true_label).any()


@pytest.mark.parametrize("imbalance", [1.0, 6.0])
def test_every_prefix_is_balanced_over_class_split_source(imbalance):
    recipe = sy.Recipe(imbalance=imbalance)
    table = sy.plan_table([sy.plan_face(recipe, i) for i in range(1400)])
    for n in (350, 700, 1400):
        got = table[:n].true_label.value_counts(normalize=True).reindex(CLASSES).to_numpy()
        np.testing.assert_allclose(got, sy.class_shares(imbalance), atol=0.02)
        joint = pd.crosstab(table[:n].true_label, [table[:n].split, table[:n].source]).to_numpy()
        assert joint.min() >= 1, "each class stands in each split of each source"
        assert abs((table[:n].split == "train").mean() - 0.7) < 0.02


def test_people_stay_in_one_split():
    table = sy.plan_table([sy.plan_face(sy.Recipe(), i) for i in range(1500)])
    assert (table.groupby("identity").split.nunique() == 1).all()
    assert table.identity.nunique() > 200


@pytest.mark.parametrize(("kwargs", "names"), [
    ({"n": 0}, "n"), ({"n": 2.5}, "n"), ({"size": 8}, "size"), ({"size": 64.0}, "size"), ({"seed": -1}, "seed"),
    ({"label_noise": 1.0}, "label_noise"), ({"label_noise": -0.1}, "label_noise"), ({"imbalance": 0.5}, "imbalance"),
    ({"sources": ()}, "sources"), ({"sources": ("moon",)}, "sources"), ({"train": 0.9, "val": 0.2}, "train"),
    ({"intensity": (0.9, 0.1)}, "intensity"), ({"intensity": (0.1,)}, "intensity"), ({"label_noise": float("nan")}, "label_noise"),
])
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, kwargs, names):
    with pytest.raises(UsageError, match=names): sy.write_dataset(tmp_path / "faces", **{"n": 3, **kwargs})
    assert not (tmp_path / "faces").exists()


def _digests(folder):
    return {p.relative_to(folder).as_posix(): sha256_bytes(p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_interrupted_dataset_is_unfinished_and_can_be_written_again(tmp_path, monkeypatch):
    sy.write_dataset(tmp_path / "whole", n=12, size=48)
    draw, count = sy.draw, iter(range(100))

    def draw_until_power_fails(recipe, plan):
        if next(count) == 5: raise KeyboardInterrupt
        return draw(recipe, plan)
    monkeypatch.setattr(sy, "draw", draw_until_power_fails)
    with pytest.raises(KeyboardInterrupt): sy.write_dataset(tmp_path / "cut", n=12, size=48)
    assert not (tmp_path / "cut/synthetic.json").exists()
    monkeypatch.setattr(sy, "draw", draw)
    sy.write_dataset(tmp_path / "cut", n=12, size=48)
    assert _digests(tmp_path / "cut") == _digests(tmp_path / "whole")


def test_replacing_a_dataset_never_reaches_outside_its_folder(tmp_path):
    sy.write_dataset(tmp_path / "faces", n=3, size=48)
    precious = tmp_path / "precious.txt"
    precious.write_text("keep")
    table = pd.read_csv(tmp_path / "faces/labels.csv")
    table.loc[0, "file"] = "../precious.txt"
    table.to_csv(tmp_path / "faces/labels.csv", index=False)
    sy.write_dataset(tmp_path / "faces", n=3, size=48)
    assert precious.read_text() == "keep"


def test_video_truth_and_smoothness(tmp_path):
    events = sy.write_video(tmp_path, seconds=5, fps=10, size=(256, 192), seed=2)
    frames, stored = pd.read_csv(tmp_path / "frames.csv"), pd.read_csv(tmp_path / "events.csv")
    assert stored.equals(events.frame()) and list(stored) == ["start_ms", "end_ms", "label"]
    assert stored.start_ms[0] == 0 and stored.end_ms.iloc[-1] == 5000 and set(stored.label) <= set(CLASSES)
    for f in frames.itertuples():
        assert f.label == stored[(stored.start_ms <= f.ms) & (f.ms < stored.end_ms)].label.item()
    reader = cv2.VideoCapture(str(tmp_path / "video.avi"))
    assert round(reader.get(cv2.CAP_PROP_FPS)) == 10
    count = sum(1 for _ in iter(lambda: reader.read()[0], False))
    assert count == len(frames) == 50
    film = sy.plan_film(5, (256, 192), 2)
    quiet = sy.replace(film, camera=sy.replace(film.camera, noise=0.0))
    pictures = [sy.film_frame(quiet, k, k * 20).astype(float) for k in range(100)]
    steps = [np.abs(b - a).mean() for a, b in zip(pictures, pictures[1:], strict=False)]
    assert max(steps) < 4, "no frame jumps"
    assert np.abs(pictures[0] - pictures[-1]).mean() > max(steps), "but the film moves"


@pytest.mark.parametrize("source", sorted(painting.SOURCES))
def test_haar_cascade_finds_faces_of_all_skin_tones(source):
    haar = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_default.xml")
    rates, tones = [], []
    for seed in range(14):
        film = sy.plan_film(12, (320, 240), seed, source)
        grey = [cv2.cvtColor(sy.film_frame(film, k, 50 * k), cv2.COLOR_RGB2GRAY) for k in range(0, 240, 20)]
        rates.append(np.mean([len(haar.detectMultiScale(g, 1.1, 5, minSize=(60, 60))) > 0 for g in grey]))
        tones.append(np.mean(film.who.skin))
    rates = np.array(rates)[np.argsort(tones)]
    assert rates.mean() >= 0.9, rates
    assert rates[:5].mean() >= 0.8 and rates[-5:].mean() >= 0.8, rates
