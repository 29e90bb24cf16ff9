"""The stabiliser's properties, labels by hand, sessions that are killed, disks that are full, cameras that vanish, and privacy."""
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fer_nb import capture, cli, deploy, window
from fer_nb.artifacts import CLASSES, Box, FerError, GateError, UsageError
from fer_nb.capture import CameraSource, PushedSource, SourceLost, SyntheticSource, open_source
from fer_nb.detectors import Detection, Haar, YuNet
from fer_nb.evidence import SessionInfo
from fer_nb.realtime import Pipeline, live, open_pipeline
from fer_nb.scoring import score_session
from fer_nb.sessions import PROBS, Timeline
from fer_nb.stabiliser import NO_FACE, UNSTABLE, Stabiliser
from fer_nb.synthetic import write_video
from fer_nb.tuning import replay
from fer_nb.window import BAR, LINE, Player, bar_class_at, draw, run_demo
from tests.conftest import model_paths

ROOT = Path(__file__).resolve().parent.parent
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".avi", ".mp4", ".webp", ".npy", ".npz", ".gif", ".tif", ".tiff"}


@st.composite
def streams(draw_, least=1, most=60):
    "Probabilities and the times of their frames."
    n = draw_(st.integers(least, most))
    rng = np.random.default_rng(draw_(st.integers(0, 2**32 - 1)))
    return rng.dirichlet(np.full(7, draw_(st.sampled_from([0.2, 1.0, 5.0]))), n), np.cumsum(rng.uniform(0.005, 0.2, n))


settings_ = st.fixed_dictionaries({"ema": st.floats(0, 0.99), "delta": st.floats(0, 1),
                                   "window": st.integers(1, 40), "min_count": st.integers(1, 40)})


@given(settings_, st.integers(0, 6), st.floats(0.2, 1))
def test_a_constant_input_locks_and_stays(settings, k, top):
    p = np.full(7, (1 - top)/6)
    p[k] = top
    s = Stabiliser(**settings)
    labels = [s.update(p, i/30) for i in range(60)]
    first = min(settings["min_count"], settings["window"]) - 1
    assert labels == [UNSTABLE]*first + [CLASSES[k]]*(60 - first)


@given(streams(), st.integers(1, 20))
def test_delta_one_never_switches(stream, window):
    s = Stabiliser(delta=1.0, window=window)
    labels = {s.update(p, t) for p, t in zip(*stream, strict=True)} - {UNSTABLE}
    assert labels <= {CLASSES[stream[0][0].argmax()]}


@given(streams(), st.floats(0, 0.99), st.floats(0, 1), st.integers(1, 40))
def test_window_one_is_no_vote(stream, ema, delta, min_count):
    s = Stabiliser(ema=ema, delta=delta, window=1, min_count=min_count)
    for p, t in zip(*stream, strict=True): assert s.update(p, t) == CLASSES[s.held]


@given(streams())
def test_with_everything_off_the_label_is_the_largest_probability(stream):
    s = Stabiliser(ema=0, delta=0, window=1)
    assert [s.update(p, t) for p, t in zip(*stream, strict=True)] == [CLASSES[p.argmax()] for p in stream[0]]


def cast(labels, t, window, vote_by):
    "The votes that are counted at a time: of the last `window` frames, or of that many 30ths of a second and of three frames at least."
    if vote_by == "frames": return labels[-window:]
    return [v for k, v in enumerate(labels, 1) if len(labels) - k < min(3, window) or t - v[0] <= (window - 0.5)/30]


def longhand(probs, times, ema, delta, window, min_count, vote_age=2.0, hold=0.5, vote_by="frames"):
    "METHODS' stabiliser once more, with lists and loops; votes are told by the frame that they were cast in."
    smooth, held, labels, out, first = None, None, [], [], 0
    for i, (p, t) in enumerate(zip(probs.tolist(), times.tolist(), strict=True)):
        steps = [b - a for a, b in zip(times[first:i], times[first + 1:i], strict=False)][-15:]
        usual = statistics.median_low(steps) if steps else None
        if vote_age and steps and t - times[i - 1] > max(hold, 3*usual): smooth, held, labels, first, steps = None, None, [], i, []
        if smooth is None: smooth = p
        else:
            past = ema**(30*(t - times[i - 1]))
            smooth = [past*a + (1 - past)*b for a, b in zip(smooth, p, strict=True)]
        span = 0 if not steps else window*usual if vote_by == "frames" else max(window/30, 3*usual)
        if vote_age and steps: labels = [v for v in labels if t - v[0] <= max(hold, vote_age*span) + 1e-9]
        if not labels: held = None
        top = max(range(7), key=lambda k: smooth[k])
        if held is None or smooth[top] > smooth[held] + delta: held = top
        counts_for = 1 if vote_by == "frames" or i == first else min(30*(t - times[i - 1]), max(1, window/2))
        labels = cast([*labels, (t, held, counts_for)], t, window, vote_by)
        votes, need = [k for _, k, _ in labels], min(min_count, window)
        counts = {k: sum(n for _, v, n in labels if v == k) for k in votes}
        most = max(round(n, 2) for n in counts.values())
        winners = [k for k, n in counts.items() if round(n, 2) == most]
        winner = held if held in winners else next(k for k in votes if k in winners)
        enough = counts[winner] >= need if vote_by == "frames" else counts[winner] >= need - 0.5 - 1e-6
        enough = enough and votes.count(winner) >= min(2, need)
        out.append(CLASSES[winner] if enough else UNSTABLE)
    return out


ages = st.sampled_from([0, 1, 2.0, 10])


units = st.sampled_from(["frames", "seconds"])


@given(streams(), settings_, ages, units)
def test_it_is_the_formula_of_the_plan(stream, settings, age, unit):
    more = settings | {"vote_age": age, "vote_by": unit}
    s = Stabiliser(**more)
    assert [s.update(p, t) for p, t in zip(*stream, strict=True)] == longhand(*stream, **more)


@given(streams(least=10), st.lists(st.tuples(st.integers(1, 59), st.floats(0.1, 20)), max_size=4), settings_, ages, units)
def test_it_is_the_formula_with_stalls_too(stream, stalls, settings, age, unit):
    probs, times = stream
    for at, seconds in stalls: times = times + seconds*(np.arange(len(times)) >= at)
    more = settings | {"vote_age": age, "vote_by": unit}
    s = Stabiliser(**more)
    assert [s.update(p, t) for p, t in zip(probs, times, strict=True)] == longhand(probs, times, **more)


def sure(k): return np.where(np.arange(7) == k, 0.94, 0.01)


def turn(times, when, **settings):
    "The labels of a face that is Happy before `when` and Sad from there on."
    s = Stabiliser(**settings)
    return [s.update(sure(3 if t < when else 4), t) for t in times]


@given(st.integers(0, 2**32 - 1), settings_)
def test_thirty_frames_a_second_vote_alike_by_frames_and_by_seconds(seed, settings):
    probs, times = np.random.default_rng(seed).dirichlet(np.ones(7), 60), (np.arange(60)/30).round(6)
    frames, seconds = (Stabiliser(**settings, vote_by=unit) for unit in ("frames", "seconds"))
    for p, t in zip(probs, times, strict=True): assert frames.update(p, t) == seconds.update(p, t)


def answers_after(fps, phase, **settings):
    "Seconds from a change to the new label, and to the sign that it is coming."
    s, times = Stabiliser(**settings), (np.arange(8*fps) + phase)/fps
    seen = [(t - 4, s.update(sure(3 if t < 4 else 4), t), s.coming) for t in times]
    after = [(t, label, coming) for t, label, coming in seen if t >= 0]
    return next(t for t, label, _ in after if label == "Sad"), next(t for t, label, coming in after if "Sad" in (label, coming))


@pytest.mark.parametrize("fps", [5, 7, 14, 20, 28, 30, 60])
def test_a_slow_camera_is_answered_as_soon_as_a_quick_one(fps):
    "By seconds; by frames the wait grows with the time that a frame takes. The sign is there within a fifth of a second."
    waits = {unit: [answers_after(fps, phase/10 + 0.01, vote_by=unit) for phase in range(10)] for unit in ("frames", "seconds")}
    assert max(label for label, _ in waits["seconds"]) < 0.4
    assert max(sign for _, sign in waits["seconds"]) < 0.21
    assert max(label for label, _ in waits["frames"]) > 7/fps


@pytest.mark.parametrize("fps", [1, 2, 4, 7, 15, 30, 60])
def test_one_wrong_frame_changes_no_label(fps):
    s = Stabiliser(vote_by="seconds", ema=0)
    labels = [s.update(sure(4 if i % 20 == 19 else 3), i/fps) for i in range(100)]
    assert labels.index("Happy") <= max(2, fps//3) and set(labels[labels.index("Happy"):]) == {"Happy"}


@given(st.integers(1, 120), st.integers(1, 120), st.floats(0.5, 60))
def test_every_vote_can_be_won_at_every_rate(window, min_count, fps):
    s = Stabiliser(vote_by="seconds", window=window, min_count=min_count)
    assert [s.update(sure(3), i/fps) for i in range(300)][-1] == "Happy"


def test_the_sign_is_of_what_leads_and_is_not_shown():
    s = Stabiliser()
    seen = [(s.update(None if 30 <= i < 33 else sure(3 if i < 20 else 4), i/30), s.coming) for i in range(40)]
    assert seen[0] == (UNSTABLE, "Happy") and seen[10] == ("Happy", "") and seen[24] == ("Happy", "Sad")
    assert seen[31] == (NO_FACE, "") and seen[39] == ("Sad", "")
    assert all(label != coming for label, coming in seen)


@pytest.mark.parametrize("seconds", [0.6, 1, 3, 60])
@pytest.mark.parametrize("fps", [15, 30, 60])
def test_no_old_label_is_shown_after_a_stall(seconds, fps):
    times = [*np.arange(40)/fps, *(39/fps + seconds + np.arange(20)/fps)]
    labels = turn(times, times[40])
    assert labels[39] == "Happy" and "Happy" not in labels[40:] and labels[40:] == [UNSTABLE]*7 + ["Sad"]*13
    assert "Happy" in turn(times, times[40], vote_age=0)[40:]  # the rule of sessions before


@pytest.mark.parametrize("fps", [0.2, 1, 2, 5, 8, 15, 60])
def test_a_slow_source_is_no_stall(fps):
    times = np.cumsum(np.random.default_rng(0).uniform(0.7, 1.3, 40))/fps
    assert turn(times, 1e9) == turn(times, 1e9, vote_age=0) == [UNSTABLE]*7 + ["Happy"]*33


def test_a_camera_that_becomes_half_as_fast_does_not_blink():
    times = np.cumsum([1/30]*30 + [1/15]*30 + [1/30]*30)
    assert UNSTABLE not in turn(times, 1e9)[8:]


def test_frames_without_a_face_keep_the_pace():
    "A face that is gone for less than `hold` goes on where it was, however many frames saw that; so do its votes."
    s, labels = Stabiliser(), []
    for i in range(40): labels.append(s.update(None if 20 <= i < 30 else sure(3), i/30))
    assert labels[19:31] == ["Happy"] + [NO_FACE]*10 + ["Happy"]
    with pytest.raises(UsageError, match="time of a frame"): s.update(None, np.nan)


@given(streams(least=5), st.integers(1, 100))
def test_changes_in_mid_stream_keep_what_was_seen(stream, window):
    "A window that is made shorter, then longer again, never holds more than it may."
    s = Stabiliser()
    for i, (p, t) in enumerate(zip(*stream, strict=True)):
        s.set(window=window if i % 2 else 15)
        s.update(p, t)
        assert len(s.votes) <= s.window and abs(s.smoothed.sum() - 1) < 1e-9


def test_the_old_spelling_stays_importable_for_one_version():
    from fer_nb import realtime, stabiliser
    assert stabiliser.Stabilizer is realtime.Stabilizer is Stabiliser


def test_what_it_refuses():
    s = Stabiliser()
    for bad in ([0.5]*6, [np.nan]*7): pytest.raises(UsageError, s.update, bad, 0.0)
    with pytest.raises(UsageError, match="ema is 1.5: give a number from 0 to 0.99"): s.set(ema=1.5)
    with pytest.raises(UsageError, match="threshold_Sad is -1"): s.set(threshold_Sad=-1)
    with pytest.raises(UsageError, match="window is 'ten'"): s.set(window="ten")
    assert s.settings == Stabiliser().settings


paints = st.lists(st.tuples(st.sampled_from(["paint", "clear", "split", "merge", "relabel"]), st.integers(0, 7), st.integers(0, 40),
                            st.integers(0, 12)), max_size=25)


@given(paints)
def test_a_timeline_is_a_label_a_frame(acts):
    "Whatever is painted, cleared, cut and joined: stretches stay in order, apart, and say what a list of labels says."
    t, plain = Timeline(), [0]*60
    for what, label, start, more in acts:
        stretch = next((s for s in t.stretches if s.start <= start <= s.end), None)
        before = t.stretches[t.stretches.index(stretch) - 1] if stretch and t.stretches.index(stretch) else None
        if what == "paint": t.paint(label, start, start + more)
        elif what == "clear": t.clear(start, start + more)
        else:
            with contextlib.suppress(UsageError): getattr(t, what)(start, *([label] if what == "relabel" else []))
        if what in ("paint", "clear"): plain[start:start + more + 1] = [label if what == "paint" else 0]*(more + 1)
        elif what == "merge" and before: plain[before.start:stretch.end + 1] = [before.label]*(stretch.end + 1 - before.start)
        elif what == "relabel" and stretch: plain[stretch.start:stretch.end + 1] = [label]*(stretch.end + 1 - stretch.start)
        assert [t.at(f) for f in range(60)] == plain
        assert all(a.end < b.start for a, b in zip(t.stretches, t.stretches[1:], strict=False))
        assert all(s.start <= s.end and s.label for s in t.stretches)


class Finder:
    "A detector that knows where the drawn head is."
    name = "known"
    def __init__(self, boxes=((80, 40, 160, 160),)): self.boxes = boxes
    def detect(self, frame): return [Detection(Box.from_xywh(b)) for b in self.boxes]


def rows(folder, name="per_frame.csv"): return pd.read_csv(Path(folder)/name, keep_default_na=False)


def test_a_session_leaves_numbers_and_one_shown_label_a_frame(demo_model, tmp_path):
    source = SyntheticSource(4, 20, seed=3)
    with open_pipeline(source, demo_model, Finder(), tmp_path/"s", say=lambda _: None) as p:
        while r := p.step():
            if r.index == 9: p.label(4)
            if r.index == 29: p.label(0)
            if r.index == 39: p.set("ema", 0.5)
    t = rows(tmp_path/"s")
    assert t.frame_index.tolist() == list(range(80)) and (t.pred_label != "").all()
    assert t.manual_label.tolist() == [""]*10 + ["Happy"]*20 + [""]*50
    p = t[PROBS].astype(float).to_numpy()
    assert np.allclose(p.sum(1), 1, atol=4e-6) and t.raw_label.tolist() == [CLASSES[k] for k in p.argmax(1)]
    assert rows(tmp_path/"s", "tuning.csv").to_numpy().tolist() == [[40, 40, "ema", 0.5]]
    events = rows(tmp_path/"s", "events.csv").query("source == 'manual'")
    assert events.iloc[:, :5].to_numpy().tolist() == [["Happy", 10, 29, 0.5, 1.45]]
    info = SessionInfo.load(tmp_path/"s")
    assert (info.frames, info.end_reason, info.source, info.images_written) == (80, "closed", "synthetic", False)
    assert not [f for f in (tmp_path/"s").rglob("*") if f.suffix.lower() in PICTURES]
    assert str(tmp_path) not in "".join(f.read_text() for f in (tmp_path/"s").iterdir())  # names, not places
    with pytest.raises(UsageError, match="holds a session already"): open_pipeline(SyntheticSource(1), demo_model, Finder(), tmp_path/"s")


def test_several_faces_have_a_row_each_and_the_largest_is_labelled(demo_model, tmp_path):
    finder = Finder(((20, 40, 100, 100), (180, 40, 120, 120)))
    with open_pipeline(SyntheticSource(1, 20), demo_model, finder, tmp_path/"s") as p:
        while r := p.step(): assert r.main is r.faces[1]
    t = rows(tmp_path/"s")
    assert len(t) == 40 and t.groupby("frame_index").face_id.apply(set).tolist() == [{1, 2}]*20
    assert set(t[t.pred_label != ""].box) == {"180.0 40.0 120.0 120.0"} and set(t[t.pred_label == ""].box) == {"20.0 40.0 100.0 100.0"}


def test_another_largest_face_makes_the_stabiliser_forget(demo_model, tmp_path):
    finder = Finder(((20, 40, 100, 100), (180, 40, 120, 120)))
    with open_pipeline(SyntheticSource(2, 20), demo_model, finder, tmp_path/"s") as p:
        while r := p.step():
            if r.index == 10: finder.boxes = ((20, 40, 129, 129), (180, 40, 120, 120))  # larger, by less than a fifth of its area
            if r.index == 20: finder.boxes = ((20, 40, 140, 140), (180, 40, 120, 120))
    left = rows(tmp_path/"s").query("pred_label != ''").set_index("frame_index").box.str.startswith("20.0")
    assert not left[:21].any() and left[21:].all()
    assert rows(tmp_path/"s", "tuning.csv").to_numpy().tolist() == [[21, 21, "reset", 1]]


class Script(Finder):
    "A detector that finds in each frame what a function says, by the frame's number."
    def __init__(self, source, boxes): self.source, self.at = source, boxes
    def detect(self, frame): return [Detection(Box.from_xywh(b)) for b in self.at(self.source.index - 1)]


LEFT, RIGHT, FAR = (20, 40, 100, 100), (180, 40, 96, 96), (110, 140, 150, 100)


def seen_as(folder, boxes=(LEFT, RIGHT, FAR)) -> str:
    "Which of the boxes has the label in each frame: 0, 1 ...; - where nobody has."
    shown = rows(folder).query("pred_label != ''").set_index("frame_index")
    assert ((shown.face_id == "") == (shown.pred_label == NO_FACE)).all() and shown.index.tolist() == list(range(len(shown)))
    texts = [" ".join(f"{v:.1f}" for v in b) for b in boxes]
    return "".join("-" if not b else str(texts.index(b)) for b in shown.box)


def watched(demo_model, folder, boxes, frames=40, fps=20) -> str:
    "Who is labelled in a session with these boxes; the session can be replayed and scored."
    source = SyntheticSource(frames/fps, fps)
    with open_pipeline(source, demo_model, Script(source, boxes), folder) as p:
        p.label(4)
        while p.step(): pass
    assert replay(folder).differ == 0 and score_session(folder, write=False, resamples=2).results.frames == frames
    return seen_as(folder)


def test_one_missed_detection_doesnt_change_whose_face_it_is(demo_model, tmp_path):
    who = watched(demo_model, tmp_path/"s", lambda k: [RIGHT] if k == 20 else [LEFT, RIGHT])
    assert who == "0"*20 + "-" + "0"*19
    t = rows(tmp_path/"s")
    assert t[t.frame_index == 20][["face_id", "pred_label", "manual_label"]].to_numpy().tolist() == [["2", "", ""], ["", NO_FACE, "Happy"]]
    assert rows(tmp_path/"s", "tuning.csv").empty and not t[t.frame_index > 20].pred_label.eq(UNSTABLE).any()  # nothing was forgotten


@pytest.mark.parametrize("missed", [1, 2, 5, 9])
def test_the_labelled_face_is_waited_for_through_the_hold(demo_model, tmp_path, missed):
    who = watched(demo_model, tmp_path/"s", lambda k: [RIGHT] if 20 <= k < 20 + missed else [LEFT, RIGHT])
    assert who == "0"*20 + "-"*missed + "0"*(20 - missed)


def test_a_face_that_is_gone_for_longer_gives_its_place_away(demo_model, tmp_path):
    who = watched(demo_model, tmp_path/"s", lambda k: [RIGHT] if 15 <= k < 30 else [LEFT, RIGHT])
    assert who == "0"*15 + "-"*10 + "1"*15  # back again, and not a fifth larger
    assert rows(tmp_path/"s", "tuning.csv").to_numpy().tolist() == [[25, 25, "reset", 1]]


def test_the_hold_is_the_stabilisers_and_counts_seconds(demo_model, tmp_path):
    for fps, hold, missed in ((60, 0.5, 28), (10, 0.5, 4), (20, 1.5, 28)):
        source = SyntheticSource(3, fps)
        gone = range(fps, fps + missed)
        finder = Script(source, lambda k, gone=gone: [RIGHT] if k in gone else [LEFT, RIGHT])
        folder = tmp_path/f"{fps}_{hold}"
        with open_pipeline(source, demo_model, finder, folder, hold=hold) as p:
            while p.step(): pass
        assert seen_as(folder) == "0"*fps + "-"*missed + "0"*(2*fps - missed)
        assert set(rows(folder).face_id) - {""} == {"1", "2"}  # the tracker knows it as long as it is waited for


def test_a_phantom_takes_nobodys_place(demo_model, tmp_path):
    assert watched(demo_model, tmp_path/"a", lambda k: [LEFT, FAR] if k in (15, 16, 30) else [LEFT]) == "0"*40
    assert watched(demo_model, tmp_path/"b", lambda k: [LEFT, FAR] if k == 0 else [LEFT]) == "2" + "0"*39  # nor does it keep one
    assert watched(demo_model, tmp_path/"c", lambda k: [LEFT, FAR] if k >= 15 else [LEFT]) == "0"*25 + "2"*15  # a person who stays


def test_a_face_that_is_half_covered_for_a_moment_stays_the_labelled_one(demo_model, tmp_path):
    half = (20, 40, 80, 80)
    source = SyntheticSource(2, 20)
    with open_pipeline(source, demo_model, Script(source, lambda k: [half if 20 <= k < 25 else LEFT, RIGHT]), tmp_path/"s") as p:
        while p.step(): pass
    assert seen_as(tmp_path/"s", (LEFT, RIGHT, half)) == "0"*20 + "2"*5 + "0"*15


def test_two_people_who_change_places(demo_model, tmp_path):
    "They walk past each other; the one behind, whose face is labelled, is hidden for some frames."
    def boxes(k):
        a, b = (5 + 5.0*k, 60, 90, 100), (215 - 5.0*k, 64, 86, 98)
        return [b] if abs(a[0] - b[0]) < 40 else [a, b]
    source, places = SyntheticSource(2.2, 20), {}
    with open_pipeline(source, demo_model, Script(source, boxes), tmp_path/"s") as p:
        while r := p.step(): places[r.index] = r.main and r.main.detection.box.left
    hidden = [k for k, x in places.items() if x is None]
    assert 0 < len(hidden) < 10 and all(places[k] == 5 + 5*k for k in places if k not in hidden)


def test_no_number_means_two_people_after_a_jump(demo_model, tmp_path):
    source = SyntheticSource(4, 20)
    finder = Script(source, lambda k: [LEFT, RIGHT] if k < 40 else [FAR, RIGHT])
    with open_pipeline(source, demo_model, finder, tmp_path/"s") as p:
        for _ in range(10): p.step()
        p.seek(50)
        r = p.step()
        assert r.main.detection.box.xywh == FAR and {f.id for f in r.faces} == {3, 4}


def test_going_back_logs_no_frame_twice_and_repaints(demo_model, tmp_path):
    with open_pipeline(SyntheticSource(3, 20), demo_model, Finder(), tmp_path/"s") as p:
        player = Player(p)
        for _ in range(30): player.tick()
        player.press("4")
        for _ in range(20): player.tick()  # 30 to 49 are Happy
        p.seek(35)
        player.press("5")
        for _ in range(5): player.tick()  # 35 to 39 become Sad
        player.press("0")
        while player.tick(): pass  # the rest has no label
        player.press("u")  # … it goes on as Sad after all
    t = rows(tmp_path/"s")
    assert t.frame_index.tolist() == list(range(60))
    assert t.manual_label.tolist() == [""]*30 + ["Happy"]*5 + ["Sad"]*25
    assert rows(tmp_path/"s", "tuning.csv")[["frame_index", "update", "name"]].to_numpy().tolist() == [[35, 50, "reset"], [50, 50, "reset"]]


def test_labels_on_a_video_that_stands_still(demo_model, tmp_path):
    with open_pipeline(SyntheticSource(2, 20), demo_model, Finder(), tmp_path/"s") as p:
        player = Player(p)
        player.press("2")
        for _ in range(10): player.tick()
        player.press(" ")
        assert player.paused and player.tick().index == 9
        player.press("7")
        assert player.tick().index == 9 and player.result.manual == 7
        player.press(".")
        assert player.result.index == 10 and not player.message
        player.press(",")
        player.press(",")
        assert player.result.index == 8 and player.result.manual == 2
        player.press("k")
        player.press("j")
        player.press("k")
        player.press("k")
        assert player.message == "no label to cut at frame 8"
    assert rows(tmp_path/"s").manual_label.tolist() == ["Disgust"]*9 + ["Neutral"]*2
    events = rows(tmp_path/"s", "events.csv").query("source == 'manual'")
    assert events[["start_frame", "end_frame"]].to_numpy().tolist() == [[0, 7], [8, 8], [9, 10]]


def test_a_digit_after_r_is_for_the_whole_stretch(demo_model, tmp_path):
    with open_pipeline(SyntheticSource(1, 20), demo_model, Finder(), tmp_path/"s") as p:
        player = Player(p)
        player.press("2")
        for _ in range(8): player.tick()
        player.press("r")
        assert "which label" in player.message
        player.press("6")
        assert player.result.manual == 6 and not player.message
        player.press("r")
        player.press("u")  # something else after `r`: it is meant as always
        assert player.result.manual == 2
        player.press("0")
        player.tick()
        player.press("r")
        player.press("5")
        assert player.message == "no label to change at frame 8"
    assert rows(tmp_path/"s").manual_label.tolist() == ["Disgust"]*8 + [""]


def test_every_key_that_tunes_is_logged(demo_model, tmp_path):
    with open_pipeline(SyntheticSource(1, 20), demo_model, Finder(), tmp_path/"s") as p:
        player = Player(p)
        player.tick()
        for key in "[]]-=vbnmc": player.press(key)
        player.press("o")
        assert not player.overlay and not player.done
        player.press("q")
        assert player.done
    changes = rows(tmp_path/"s", "tuning.csv")
    assert changes.name.tolist() == ["ema", "ema", "ema", "delta", "delta", "window", "window", "min_count", "min_count", "clahe"]
    assert changes.value.tolist() == [0.65, 0.7, 0.75, 0.07, 0.08, 14, 15, 7, 8, 0]


def test_thresholds_and_bias_have_versions(demo_model, tmp_path):
    with open_pipeline(SyntheticSource(1, 20), demo_model, Finder(), tmp_path/"s") as p:
        p.step()
        p.set("threshold_Sad", 0.4)
        p.set("bias_Happy", -0.2)
        p.set("bias_Happy", 0.5)
        with pytest.raises(UsageError, match="from -0.5 to 0.5"): p.set("bias_Happy", 0.6)
        with pytest.raises(UsageError, match="there is no setting 'bias_Joy'"): p.set("bias_Joy", 0.1)
        assert p.predictor.bias[3] == 0.5
    bias, thresholds = (json.loads((tmp_path/"s"/f).read_text()) for f in ("logit_bias.json", "thresholds.json"))
    assert (bias["version"], bias["values"]["Happy"], [h["values"]["Happy"] for h in bias["history"]]) == (3, 0.5, [0, -0.2])
    assert (thresholds["version"], thresholds["values"]["Sad"]) == (2, 0.4)


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
from fer_nb.detectors import Haar
from fer_nb.capture import SyntheticSource
from fer_nb.realtime import open_pipeline
p = open_pipeline(SyntheticSource(600, 30), {model!r}, Haar(60), {out!r}, say=print)
p.label(3)
while p.step(): print(p.last.index, time.time(), flush=True)
"""


def test_a_killed_session_keeps_all_but_its_last_second(demo_model, tmp_path):
    code = SLOW.format(root=str(ROOT), model=str(demo_model), out=str(tmp_path/"s"))
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    seen = [run.stdout.readline().split() for _ in range(3)]
    end = time.time() + 3.5
    while time.time() < end: seen.append(run.stdout.readline().split())
    run.send_signal(signal.SIGKILL)
    killed = time.time()
    seen += [line.split() for line in run.stdout.read().splitlines()]
    run.wait()
    text = (tmp_path/"s"/"per_frame.csv").read_text()
    last = int(text[:text.rindex("\n")].rsplit("\n", 1)[-1].split(",")[0])
    at = {int(i): float(t) for i, t in (s for s in seen if len(s) == 2)}
    lost = [t for i, t in at.items() if i > last]
    assert last > 5 and (not lost or killed - min(lost) < 1.5), "more than a second (and a frame) is lost"
    events = rows(tmp_path/"s", "events.csv").query("source == 'manual'")
    assert events.label.tolist() == ["Fear"] and abs(events.end_frame.iloc[0] - last) <= 40
    assert SessionInfo.load(tmp_path/"s").ended is None


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on a file's size here")
def test_a_full_disk_ends_with_one_line_and_saved_rows(demo_model, tmp_path):
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from fer_nb.cli import main
sys.exit(main(["demo", "--source", "synthetic:60", "--headless", "--detector", "haar", "--min-face", "60",
               "--model", {str(demo_model)!r}, "--out", {str(tmp_path/'s')!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the session can't be written any further: File too large" in done.stderr.strip().splitlines()[-1]
    text = (tmp_path/"s"/"per_frame.csv").read_text()
    whole = text[:text.rindex("\n")].splitlines()
    assert len(whole) > 50 and all(len(line.split(",")) == len(whole[0].split(",")) for line in whole)


class Unplugged:
    "A camera that gives five pictures and is gone."
    def __init__(self, *_): self.left = 5
    def isOpened(self): return True
    def get(self, _): return 30.0
    def set(self, *_): return True
    def release(self): pass
    def read(self):
        self.left -= 1
        return (True, np.full((240, 320, 3), 90, np.uint8)) if self.left >= 0 else (False, None)


def test_a_camera_that_vanishes(demo_model, tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "_capture", Unplugged)
    source = CameraSource(0, patience=0.1)
    said = []
    with pytest.raises(SourceLost, match="camera 0 gives no more pictures .after frame 5.: was it unplugged"):
        run_demo(source, demo_model, Finder(), tmp_path/"s", headless=True, say=said.append)
    assert len(rows(tmp_path/"s")) == 5 and "unplugged" in SessionInfo.load(tmp_path/"s").end_reason
    assert "5 frames in" in said[-1] and "session:" in said[-1]


def test_a_video_that_breaks_off(demo_model, tmp_path, capsys):
    film, whole = SyntheticSource(3, 20), tmp_path/"whole.avi"
    writer = cv2.VideoWriter(str(whole), cv2.VideoWriter_fourcc(*"MJPG"), 20, (320, 240))
    while frame := film.read(): writer.write(frame.image)
    writer.release()
    part = tmp_path/"part.avi"
    part.write_bytes(whole.read_bytes()[:whole.stat().st_size//2])
    args = ["demo", "--source", str(part), "--model", str(demo_model), "--detector", "haar", "--min-face", "60", "--headless"]
    assert cli.main([*args, "--out", str(tmp_path/"s")]) == 1
    said = capsys.readouterr()
    assert said.err.strip().startswith("fer-nb: part.avi breaks off after frame") and "Traceback" not in said.err
    logged = rows(tmp_path/"s").frame_index.tolist()
    assert 20 < len(logged) < 40 and logged == list(range(len(logged)))
    assert SessionInfo.load(tmp_path/"s").end_reason.startswith("part.avi breaks off") and "session:" in said.out


class Screen:
    "OpenCV's windows without a screen: keys come from a list, and what is shown is kept."
    def __init__(self, keys, clicks=()): self.keys, self.clicks, self.views, self.mouse = list(keys), dict(clicks), [], None
    def install(self, monkeypatch):
        monkeypatch.setattr(window, "window_problem", lambda: None)
        for name, f in {"namedWindow": lambda *a: None, "setMouseCallback": lambda title, f: setattr(self, "mouse", f),
                        "imshow": lambda title, view: self.views.append(view), "waitKey": self.wait,
                        "getWindowProperty": lambda *a: 1.0, "destroyAllWindows": lambda: None}.items():
            monkeypatch.setattr(cv2, name, f)
    def wait(self, ms):
        assert ms >= 1  # 0 would wait for ever
        k = self.clicks.get(len(self.views))
        if k is not None:
            h, w = self.views[-1].shape[:2]
            self.mouse(cv2.EVENT_LBUTTONDOWN, round((k + 0.5)*w/8), h - LINE - BAR//2, 0, None)
        return ord(self.keys.pop(0)) if self.keys else ord("q")


def test_the_window_takes_keys_and_clicks(demo_model, tmp_path, monkeypatch):
    screen = Screen("..3.]..o.. q", {8: 6})
    screen.install(monkeypatch)
    run_demo(SyntheticSource(3, 20), demo_model, Finder(), tmp_path/"s", say=lambda _: None)
    manual = rows(tmp_path/"s").manual_label
    assert set(manual) >= {"Fear", "Surprise"} and SessionInfo.load(tmp_path/"s").end_reason == "the window was closed"
    assert rows(tmp_path/"s", "tuning.csv").name.tolist() == ["ema"]
    assert screen.views[0].shape[1] > screen.views[-1].shape[1]  # without its panel after `o`


def test_no_camera_is_one_line(capsys):
    if any(Path("/dev").glob("video*")) or sys.platform != "linux": pytest.skip("there may be a camera here")
    assert cli.main(["demo", "--source", "0", "--headless", "--model", "x.onnx"]) != 0
    with pytest.raises(UsageError, match="no camera 0 can be opened"): open_source("0")


def test_pictures_are_kept_only_when_asked_for_twice(demo_model, tmp_path):
    for flags in ({"save_clips": True}, {"consent": True}):
        with pytest.raises(UsageError, match="--save-clips and --consent together"):
            open_pipeline(SyntheticSource(1), demo_model, Finder(), tmp_path/"no", **flags)
    assert not (tmp_path/"no").exists()
    with open_pipeline(SyntheticSource(1, 20), demo_model, Finder(), tmp_path/"yes", save_clips=True, consent=True) as p:
        while p.step(): pass
    clip = open_source(tmp_path/"yes"/"clips"/"frame_0000000.avi")
    assert clip.frames == 20 and SessionInfo.load(tmp_path/"yes").images_written


def test_a_click_hits_the_label_that_is_drawn_there(demo_model):
    p = Pipeline(SyntheticSource(1, 20), Finder(), deploy.Predictor(demo_model))
    view = draw(p.step(), p)
    h, w = view.shape[:2]
    hits = [bar_class_at(round((k + 0.5)*w/8), h - LINE - BAR//2, w, h) for k in range(8)]
    assert hits == list(range(8))
    assert {bar_class_at(x, h - LINE - BAR//2, w, h) for x in range(w)} == set(range(8))
    assert bar_class_at(5, 5, w, h) is None and bar_class_at(5, h - 2, w, h) is None


def test_a_pipeline_without_a_session_writes_nothing_and_labels_nothing(demo_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_pipeline(SyntheticSource(1, 20), demo_model, Finder()) as p:
        player = Player(p)
        player.tick()
        player.press("3")
        assert player.message == "labels need a session: give --out"
        while player.tick(): pass
    assert not list(tmp_path.iterdir()) and p.tally.labels.total() == 20


def test_the_command_without_a_window(demo_model, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    args = ["demo", "--source", "synthetic:2", "--model", str(demo_model), "--detector", "haar", "--min-face", "60",
            "--out", str(tmp_path/"s")]
    if sys.platform == "linux":
        assert cli.main(args) == 2
        assert "no window can be opened" in capsys.readouterr().err and not (tmp_path/"s").exists()
    assert not cli.main([*args, "--headless", "--ema", "0.5"])
    out = capsys.readouterr().out
    assert "40 frames in" in out and "p99" in out and "No picture is stored" in out
    assert SessionInfo.load(tmp_path/"s").settings["ema"] == 0.5
    with pytest.raises(SystemExit, match="2"): cli.main([*args, "--headless", "--out", str(tmp_path/"t"), "--ema", "2"])
    assert "--ema: '2': give a number from 0 to 0.99" in capsys.readouterr().err and not (tmp_path/"t").exists()
    for bad, says in ((["--source", "nowhere.mp4"], "nowhere.mp4 doesn't exist"),
                      (["--detector", "best"], "there is no detector 'best'"), (["--save-clips"], "--save-clips and --consent together")):
        assert cli.main([*args, "--headless", "--out", str(tmp_path/"t"), *bad]) == 2
        assert says in capsys.readouterr().err and not (tmp_path/"t").exists()


# ---- the time of videos

CASES = ROOT.parent/"shared"/"cases"/"videos"
TIMED = ("cfr.mp4", "vfr.mp4", "vfr.webm", "jitter.mp4", "recorder.webm", "recorder_jitter.webm")


def case(name) -> Path:
    if not (CASES/name).is_file(): pytest.skip(f"the film {name} is not at hand")
    return CASES/name


def packet_times(path) -> list[float]:
    "Seconds since the first frame, from the container's packets, nothing decoded."
    raw, out = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG), []
    assert raw.set(cv2.CAP_PROP_FORMAT, -1)
    while raw.grab(): out.append(raw.get(cv2.CAP_PROP_POS_MSEC)/1000)
    return [round(t - min(out), 6) for t in sorted(out)]


def small(frame): return frame.image[::16, ::16].tobytes()


@pytest.mark.parametrize("name", TIMED)
def test_a_videos_time_is_its_containers(name):
    source = open_source(case(name))
    frames = [f[:2] for f in iter(source.read, None)]
    assert frames == list(enumerate(packet_times(case(name)))) and len(frames) == 272 == source.frames  # none lost, the end is the end
    assert (source.clock, source.note, source.mended) == ("container", "", 0) and source.read() is None
    steps = np.diff([t for _, t in frames])
    assert (steps > 0).all() and (name in ("cfr.mp4",) or np.ptp(steps) > 0.01)  # the others have no constant rate


@pytest.mark.parametrize("name", [*TIMED, "raw.h264"])
def test_a_frame_is_the_same_wherever_reading_began(name):
    source = open_source(case(name))
    whole = [(f.index, f.time_sec, small(f)) for f in iter(source.read, None)]
    fresh = open_source(case(name))
    for k in (60, 61, 10, 200, 0, 199, 199, 271, 270, 30):
        for s in (source, fresh):
            s.seek(k)
            assert [(f.index, f.time_sec, small(f)) for f in (s.read(), s.read()) if f] == whole[k:k + 2], (name, k)
    fresh.seek(10**6)
    assert (fresh.read().index, fresh.read()) == (271, None)
    fresh.seek(-5)
    assert fresh.read().index == 0


@pytest.mark.parametrize("name", TIMED)
def test_how_long_a_frame_stays_is_told_without_losing_one(name):
    source, out = open_source(case(name)), []
    while f := source.read(): out.append((f.time_sec, source.lasts()))
    assert len(out) == 272 and [t + s for t, s in out[:-1]] == pytest.approx([t for t, _ in out[1:]])


def test_a_stream_without_times_says_so_in_one_line(demo_model, tmp_path):
    said = []
    run_demo(case("raw.h264"), demo_model, Finder(), tmp_path/"s", headless=True, say=said.append)
    assert "raw.h264 holds no times of its frames: they are frame number / 25." in said
    assert rows(tmp_path/"s").time_sec.tolist() == [round(k/25, 6) for k in range(272)]
    assert SessionInfo.load(tmp_path/"s").clock == "frame number / fps"


def test_a_session_on_a_film_without_a_constant_rate(demo_model, tmp_path):
    said = []
    run_demo(case("vfr.mp4"), demo_model, Finder(), tmp_path/"s", headless=True, say=said.append)
    assert rows(tmp_path/"s").time_sec.tolist() == packet_times(case("vfr.mp4")) and not any("no times" in x for x in said)
    info = SessionInfo.load(tmp_path/"s")
    assert (info.clock, info.frames, info.end_reason) == ("container", 272, "the source came to its end")
    assert replay(tmp_path/"s").differ == 0


def test_two_seconds_are_two_seconds_on_such_a_film(demo_model):
    times = packet_times(case("vfr.mp4"))
    with open_pipeline(case("vfr.mp4"), demo_model, Finder()) as p:
        player = Player(p)
        for _ in range(250): player.tick()
        for _ in range(3):
            before = player.result.time_sec
            player.press("<")
            assert before - 2.13 < player.result.time_sec <= before - 2 and player.result.time_sec == times[player.result.index]


def test_a_webm_that_breaks_off_still_says_so(tmp_path):
    part = tmp_path/"part.webm"
    part.write_bytes(case("vfr.webm").read_bytes()[:600_000])
    source = open_source(part)
    with pytest.raises(SourceLost, match="part.webm breaks off after frame"):
        while source.read(): pass


class Stamped:
    "OpenCV's reader of a film with these milliseconds; whatever is asked of it, it can't seek."
    stamps, rate = (), 25.0
    def __init__(self, *_): self.at = -1
    def isOpened(self): return True
    def release(self): pass
    def set(self, *_): return False
    def grab(self): self.at += 1; return self.at < len(self.stamps)
    def retrieve(self): return self.at < len(self.stamps), np.full((8, 8, 3), self.at, np.uint8)
    def get(self, what):
        return {cv2.CAP_PROP_FPS: self.rate, cv2.CAP_PROP_FRAME_COUNT: -1.0}.get(what, self.stamps[self.at] if self.at >= 0 else 0.0)


@given(st.lists(st.one_of(st.floats(0, 1e4), st.just(float("nan"))), min_size=1, max_size=30), st.data())
def test_time_runs_forwards_whatever_a_container_says(stamps, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "_capture", type("Reader", (Stamped,), {"stamps": stamps}))
        source = capture.VideoSource("film.mp4")
        frames = [(f.index, f.time_sec) for f in iter(source.read, None)]
        times = [t for _, t in frames]
        assert len(frames) == len(stamps) and times[0] == 0 and all(a < b for a, b in zip(times, times[1:], strict=False))
        if not np.isnan(stamps).any() and all(a + 1e-3 < b for a, b in zip(stamps, stamps[1:], strict=False)):
            assert times == pytest.approx([(x - stamps[0])/1000 for x in stamps], abs=1e-6) and not source.mended
        k = data.draw(st.integers(0, len(stamps) - 1))
        source.seek(k)
        assert [(f.index, f.time_sec) for f in iter(source.read, None)] == frames[k:]


def test_pictures_of_a_folder_come_by_their_numbers(tmp_path):
    names = ["frame1.png", "frame2.png", "frame10.png", "frame10b.png", "frame٣.png", "x²1.png"]
    for k, name in enumerate(names): (tmp_path/name).write_bytes(cv2.imencode(".png", np.full((8, 8, 3), k, np.uint8))[1].tobytes())
    order = [f.image[0, 0, 0] for f in iter(open_source(tmp_path).read, None)]
    assert [names[k] for k in order] == ["frame1.png", "frame2.png", "frame٣.png", "frame10.png", "frame10b.png", "x²1.png"]


def test_a_senders_clock_never_runs_backwards():
    source, out = capture.PushedSource(), []
    for t in (5.0, 5.1, 4.0, 5.2):
        source.push(np.zeros((8, 8, 3), np.uint8), t)
        out.append(source.read().time_sec)
    assert out == [5.0, 5.1, 5.1, 5.2]


# ---- real video


def test_a_real_face_is_found_and_labelled_in_every_frame(demo_model, tmp_path, film_path):
    film = film_path("WolfgangLanger_Pexels.mp4")
    tally = run_demo(film, demo_model, YuNet(*model_paths("yunet")), tmp_path/"s", headless=True, say=lambda _: None)
    t = rows(tmp_path/"s")
    assert tally.labels.total() == 472 and len(t) == 472 and (t.pred_label != NO_FACE).all() and set(t.face_id) == {1}


def test_a_video_without_a_face_says_so_and_nothing_else(demo_model, tmp_path, film_path):
    run_demo(film_path("no_face.mp4"), demo_model, YuNet(*model_paths("yunet")), tmp_path/"s", headless=True, say=lambda _: None)
    t = rows(tmp_path/"s")
    assert len(t) and set(t.pred_label) == {NO_FACE} and (t[["face_id", "box", "raw_label", *PROBS]] == "").all(axis=None)


def test_a_picture_of_several_people_gives_a_row_a_face(demo_model, tmp_path, film_path):
    crowd, finder = film_path("multi_face.jpg"), YuNet(*model_paths("yunet"), width=640, min_face=20)
    faces = len(finder.detect(cv2.imread(str(crowd))))
    run_demo(crowd, demo_model, finder, tmp_path/"s", headless=True, say=lambda _: None)
    t = rows(tmp_path/"s")
    assert faces >= 2 and len(t) == faces == t.face_id.nunique() and (t.pred_label != "").sum() == 1


def test_haar_serves_where_nothing_else_is_at_hand(demo_model, tmp_path):
    run_demo("synthetic:3", demo_model, Haar(60), tmp_path/"s", headless=True, say=lambda _: None)
    assert (rows(tmp_path/"s").pred_label != NO_FACE).mean() > 0.7


def test_errors_are_ours():
    assert issubclass(SourceLost, GateError) and issubclass(GateError, FerError)


def test_thresholds_beside_a_model_reach_the_stabiliser(tmp_path):
    from fer_nb.deploy import SHIPPED
    (tmp_path/"m.onnx").write_bytes(SHIPPED.read_bytes())
    (tmp_path/"thresholds.json").write_text(json.dumps({"Sad": 0.4}))
    with open_pipeline(SyntheticSource(1, 20), tmp_path/"m.onnx", Finder()) as p:
        assert p.stabilizer.thresholds.tolist() == [0, 0, 0, 0, 0.4, 0, 0]


# ---- the loop in four lines, and what votes by seconds


class Kept(SyntheticSource):
    "A drawn film that knows whether it was closed."
    closed = False
    def close(self): self.closed = True


def test_the_loop_gives_every_frame_and_closes_its_source(demo_model):
    source = Kept(1, 20)
    frames = list(live(source, demo_model, Finder(), say=lambda _: None))
    assert [f.index for f in frames] == list(range(20)) and source.closed
    assert all(f.label in (*CLASSES, UNSTABLE, NO_FACE) for f in frames)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_loop_closes_the_camera_however_it_is_left(demo_model, tmp_path, error):
    source = Kept(5, 20)
    def loop():
        for frame in live(source, demo_model, Finder(), out=tmp_path/"s", say=lambda _: None):
            if frame.index == 3 and error: raise error
            if frame.index == 3: break
    with contextlib.suppress(ValueError, KeyboardInterrupt): loop()
    assert source.closed and SessionInfo.load(tmp_path/"s").frames == 4  # and the log is whole


def test_the_loop_works_on_a_film_and_refuses_what_is_none(demo_model, tmp_path):
    write_video(tmp_path/"film", seconds=1, fps=10)
    frames = list(live(tmp_path/"film"/"video.avi", demo_model, Finder(), say=lambda _: None))
    assert len(frames) == 10 and repr(frames[0]).startswith("frame 0 at 0.00 s: (unstable)")
    with pytest.raises(UsageError, match=r"none.mp4 doesn't exist"): next(live(tmp_path/"none.mp4", demo_model))


def test_a_camera_votes_by_seconds_and_a_film_by_frames_unless_told_otherwise(demo_model, tmp_path):
    for name, source, more, unit in (("film", SyntheticSource(1, 20), {}, "frames"), ("page", PushedSource(), {}, "seconds"),
                                     ("asked", SyntheticSource(1, 20), {"vote_by": "seconds"}, "seconds"),
                                     ("plan", PushedSource(), {"vote_by": "frames"}, "frames")):
        open_pipeline(source, demo_model, Finder(), tmp_path/name, say=lambda _: None, **more).close()
        assert SessionInfo.load(tmp_path/name).settings["vote_by"] == unit, name
    with pytest.raises(UsageError, match="vote_by is 'hours': give frames or seconds"):
        open_pipeline(SyntheticSource(1), demo_model, Finder(), vote_by="hours")


def test_the_window_shows_what_is_coming_in_words(demo_model):
    p = open_pipeline(SyntheticSource(1, 20), demo_model, Finder(), say=lambda _: None, vote_by="seconds")
    result = replace(p.step(), label="Happy", coming="")
    soon = replace(result, coming="Surprise")
    assert window.turning(soon) == "Happy -> Surprise?" and window.turning(result) == "Happy"
    for drawn in (window.draw_faces, lambda r: window.draw_panel(p, r)): assert (drawn(soon) != drawn(result)).any()
    player = Player(p)
    player.press("b")
    assert player.message == "window 0.53s" and p.settings["window"] == 16


def test_a_drawn_film_before_a_model_of_photographs_is_told(demo_model):
    def said(convention):
        lines, predictor = [], deploy.Predictor(demo_model)
        predictor.convention = convention
        run_demo(SyntheticSource(0.2, 20), predictor, Finder(), headless=True, say=lines.append)
        return "\n".join(lines)
    assert "Note: the film is drawn, and the model learned photographs (ferplus)" in said("ferplus") and "drawn" not in said("synthetic")
