"""Scores against a longhand count, replays of every kind of session, tuning, and sessions that are broken."""
import csv
import json
import re
import shutil
import statistics
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from fer_nb import cli
from fer_nb.artifacts import CLASSES, ArtifactError, Box, FerError, GateError, UsageError, write_csv
from fer_nb.capture import Frame, Source, open_source
from fer_nb.detectors import Detection
from fer_nb.evidence import ScoreResults, StabiliserChoice
from fer_nb.geometry import Crop, Geometry
from fer_nb.realtime import Pipeline, session_info
from fer_nb.scoring import (
    accuracy_f1,
    count_labels,
    jitter,
    latency_plot,
    lock_times,
    make_track,
    not_yet_locked,
    restricted_mean,
    score_session,
    segment_intervals,
    timeline_plot,
    when_locked,
)
from fer_nb.sessions import CODES, COLUMNS, LABELS, PROBS, SessionLog, drawn_note, load_session, simulate_session
from fer_nb.stabiliser import NO_FACE, UNSTABLE, Stabiliser
from fer_nb.synthetic import make_timeline, write_video
from fer_nb.tuning import Tuning, choose, replay, replay_labels, tune, tuning_grid, tuning_plot

# ---- the score, longhand: strings, dictionaries and plain loops over the files, nothing of the library's


def rows_of(folder) -> list[dict]:
    "Main rows in the order of time, as per_frame.csv has them, with the truth that events.csv gives."
    with open(folder/"per_frame.csv", newline="") as f: rows = [r for r in csv.DictReader(f) if r["pred_label"]]
    rows.sort(key=lambda r: int(r["frame_index"]))
    with open(folder/"events.csv", newline="") as f: events = [e for e in csv.DictReader(f) if e["source"] == "manual"]
    for r in rows:
        r["us"], r["truth"], r["shown"], r["raw"] = round(float(r["time_sec"])*1_000_000), "", r["pred_label"], r["raw_label"] or NO_FACE
        for e in events:
            if int(e["start_frame"]) <= int(r["frame_index"]) <= int(e["end_frame"]): r["truth"] = e["label"]
    return rows


def segments_by_hand(rows: list[dict]) -> list[dict]:
    "Runs of one truth, with the rows in them; a pause ends one, too."
    steps = [b["us"] - a["us"] for a, b in zip(rows, rows[1:])]
    usual, segments = int(statistics.median(steps)) if steps else 0, []
    for i, r in enumerate(rows):
        if i == 0 or rows[i - 1]["truth"] != r["truth"] or is_pause(rows, i):
            segments.append({"truth": r["truth"], "rows": [], "start": r["us"], "end": None})
        segments[-1]["rows"].append(r)
        over = i + 1 == len(rows) or is_pause(rows, i + 1)
        segments[-1]["end"] = r["us"] + usual if over else rows[i + 1]["us"]
    return segments


def is_pause(rows, i) -> bool:
    "Whether so much time passed before a row that nothing was seen in it."
    steps = [b["us"] - a["us"] for a, b in zip(rows, rows[1:])]
    return steps[i - 1] > 2_000_000 and steps[i - 1] > 5*statistics.median(steps)


def changes_by_hand(rows, key) -> float | None:
    flips = time = 0
    steps = [b["us"] - a["us"] for a, b in zip(rows, rows[1:])]
    for a, b in zip(rows, rows[1:]):
        if a["raw"] == NO_FACE or b["raw"] == NO_FACE: continue
        if b["us"] - a["us"] > max(2_000_000, 5*statistics.median(steps)): continue
        time += b["us"] - a["us"]
        if a[key] != b[key]: flips += 1
    return flips*60e6/time if time else None


def lock_by_hand(segment, key) -> float | None:
    "Milliseconds until the label is right and stays right for 600 ms inside the segment."
    rows = segment["rows"]
    for i, r in enumerate(rows):
        if r[key] != segment["truth"]: continue
        until = segment["end"]
        for later in rows[i:]:
            if later[key] != segment["truth"]:
                until = later["us"]
                break
        if until - r["us"] >= 600_000: return (r["us"] - segment["start"])/1000
    return None


def survival_by_hand(segments, locks) -> tuple:
    "Median, p90 and restricted mean of the time to lock, its horizon: Kaplan and Meier with fractions, a segment at a time."
    if not segments: return None, None, None, None
    ends = [(s["end"] - s["start"])/1000 - 600 for s in segments]
    events = sorted((end if lock is None else lock, lock is None) for lock, end in zip(locks, ends))  # at one time locks come first
    left, open_, curve = Fraction(1), len(events), []
    for ms, censored in events:
        if not censored: left *= 1 - Fraction(1, open_)
        open_ -= 1
        curve.append((ms, left))
    horizon = min(3000, max(ends))
    area = past = 0
    before = Fraction(1)
    for ms, now in [*curve, (horizon, None)]:
        area, past = area + float(before)*(min(ms, horizon) - past), min(ms, horizon)
        before = now if now is not None else before
    def reached(share): return next((ms for ms, now in curve if now <= 1 - share), None)
    return reached(Fraction(1, 2)), reached(Fraction(9, 10)), area, horizon


def score_by_hand(rows: list[dict]) -> dict:
    segments = segments_by_hand(rows)
    long = [s for s in segments if s["truth"] and s["end"] - s["start"] >= 600_000]
    changes = [b["us"] for a, b in zip(rows, rows[1:]) if a["truth"] != b["truth"]]
    scored = [r for s in long for r in s["rows"] if all(abs(r["us"] - c) > 250_000 for c in changes)]
    out = {"scored": len(scored), "segments": len([s for s in segments if s["truth"]]), "long": len(long),
           "truth_changes": changes_by_hand(rows, "truth")}
    for key in ("shown", "raw"):
        classes = {}
        for c in CLASSES:
            hit = sum(r["truth"] == c and r[key] == c for r in scored)
            true, said = sum(r["truth"] == c for r in scored), sum(r[key] == c for r in scored)
            if true: classes[c] = (hit/said if said else 0, hit/true, 2*hit/(true + said), true)
        locks = [lock_by_hand(s, key) for s in long]
        locked = [x for x in locks if x is not None]
        out[key] = {
            "accuracy": sum(r[key] == r["truth"] for r in scored)/len(scored) if scored else None,
            "macro_f1": sum(f for _, _, f, _ in classes.values())/len(classes) if classes else None, "classes": classes,
            "unstable": sum(r[key] == UNSTABLE for r in scored), "no_face": sum(r[key] == NO_FACE for r in scored),
            "jitter": changes_by_hand(rows, key), "locked": len(locked), "of": len(locks),
            "lock": survival_by_hand(long, locks)}
    return out


def same(score, hand):
    "Compare a `SessionScore` with the longhand count."
    r = score.results
    assert (r.scored_frames, r.segments, r.scored_segments) == (hand["scored"], hand["segments"], hand["long"])
    assert r.truth_changes_per_min == pytest.approx(hand["truth_changes"])
    for key in ("shown", "raw"):
        got, want = getattr(r, key), hand[key]
        assert (got.accuracy and got.accuracy.value) == pytest.approx(want["accuracy"], abs=1e-12)
        assert (got.macro_f1 and got.macro_f1.value) == pytest.approx(want["macro_f1"], abs=1e-12)
        assert got.jitter_per_min == pytest.approx(want["jitter"])
        if n := hand["scored"]: assert (got.unstable, got.no_face) == pytest.approx((want["unstable"]/n, want["no_face"]/n))
        lock = got.time_to_lock
        assert (lock.locked, lock.segments) == (want["locked"], want["of"])
        assert (lock.median_ms, lock.p90_ms, lock.restricted_mean_ms, lock.horizon_ms) == pytest.approx(want["lock"])
    for key, prefix in (("shown", ""), ("raw", "raw_")):
        got = {c.name: (*(getattr(c, prefix + k) for k in ("precision", "recall", "f1")), c.support) for c in r.per_class}
        assert got == {k: pytest.approx(v) for k, v in hand[key]["classes"].items()}


def timeline(*parts) -> pd.DataFrame:
    "Events from (milliseconds, label)."
    ends = np.cumsum([ms for ms, _ in parts])
    return pd.DataFrame({"start_ms": ends - [ms for ms, _ in parts], "end_ms": ends, "label": [label for _, label in parts]})


KINDS = {
    "plain": dict(events=make_timeline(20, np.random.default_rng(1))),
    "short segments": dict(events=make_timeline(20, np.random.default_rng(2), hold=(0.3, 1.2)), fps=25),
    "gaps and no face": dict(
        events=timeline((2000, "Happy"), (700, ""), (1500, "Sad"), (590, "Fear"), (1800, "Neutral"), (900, ""), (2000, "Happy")),
        no_face=[(500, 900), (3000, 5200)], fps=29.97),
    "poor and slow": dict(events=make_timeline(15, np.random.default_rng(4)), skill=0.5, fps=8),
    "three frames a second": dict(events=make_timeline(15, np.random.default_rng(9), hold=(0.5, 1.5)), fps=3),
    "no face at all": dict(events=timeline((2000, "Happy"), (2000, "Sad")), no_face=[(0, 9000)]),
    "tuned, sought, two faces": dict(
        events=make_timeline(12, np.random.default_rng(5)), faces=2, no_face=[(4000, 4300)],
        order=[*range(100), *range(180, 240), *range(100, 150)],
        changes={30: {"ema": 0.9, "delta": 0.2}, 60: {"window": 5}, 70: {"min_count": 2, "bias_Happy": 0.3},
                 110: {"clahe": 0, **{f"threshold_{c}": 0.9 for c in CLASSES}}, 150: {"reset": 1}, 155: {"window": 31}}),
    "other settings": dict(events=make_timeline(10, np.random.default_rng(6)),
                           settings=dict(ema=0.0, delta=0.3, window=7, min_count=7, hold=0.1, thresholds=np.full(7, 0.3))),
}


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    root = tmp_path_factory.mktemp("sessions")
    return {k: simulate_session(root/k.replace(" ", "_").replace(",", ""), seed=i, **how) for i, (k, how) in enumerate(KINDS.items())}


@pytest.mark.parametrize("kind", KINDS)
def test_score_equals_the_count_by_hand(sessions, kind):
    hand = score_by_hand(rows_of(sessions[kind]))
    assert kind == "no face at all" or hand["scored"] > 5  # the example isn't empty
    same(score_session(sessions[kind], write=False, resamples=20), hand)


@given(st.data())
@settings(max_examples=60)
def test_random_tracks_score_as_by_hand(data):
    n = data.draw(st.integers(1, 60))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    us = np.cumsum(rng.integers(1, data.draw(st.sampled_from([60, 400, 900]))*1000, n))
    def labels(low, high): return np.repeat(rng.integers(low, high, n), rng.integers(1, 12, n))[:n]
    truth, shown, raw = labels(-1, 7), labels(0, 9), labels(0, 7)
    raw[shown == CODES[NO_FACE]] = CODES[NO_FACE]
    names = [*LABELS, ""]
    hand = score_by_hand([{"us": int(t), "truth": names[a], "shown": names[b], "raw": names[c]}
                          for t, a, b, c in zip(us, truth, shown, raw)])
    track = make_track(us, truth, shown, raw)
    assert (track.scored.sum(), len(track.segments), len(track.scored_segments)) == (hand["scored"], hand["segments"], hand["long"])
    for key, codes in (("shown", shown), ("raw", raw)):
        counts = count_labels(track, codes).sum(0)
        assert (counts[:, 7].sum(), counts[:, 8].sum(), counts.sum()) == (hand[key]["unstable"], hand[key]["no_face"], hand["scored"])
        assert jitter(track, codes) == pytest.approx(hand[key]["jitter"])
        lock = lock_times(track, codes)
        assert lock.locked == hand[key]["locked"]
        assert (lock.median_ms, lock.p90_ms, lock.restricted_mean_ms, lock.horizon_ms) == pytest.approx(hand[key]["lock"])
        if hand["scored"]:
            found = segment_intervals(count_labels(track, codes), count_labels(track, raw), 10)["shown"]
            assert [e.value for e in found] == pytest.approx([hand[key]["accuracy"], hand[key]["macro_f1"]])


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "no face at all"])
def test_f1_equals_scikit_learns(sessions, kind):
    score = score_session(sessions[kind], write=False, resamples=20)
    t = score.track
    truth, present = t.truth[t.scored], sorted(set(t.truth[t.scored].tolist()))
    for key in ("shown", "raw"):
        said, got = getattr(t, key)[t.scored], getattr(score.results, key)
        assert got.macro_f1.value == pytest.approx(f1_score(truth, said, labels=present, average="macro", zero_division=0))
        assert got.accuracy.value == pytest.approx(accuracy_score(truth, said))
        p, r, f, n = precision_recall_fscore_support(truth, said, labels=present, zero_division=0)
        prefix = "raw_" if key == "raw" else ""
        for i, c in enumerate(score.results.per_class):
            assert (c.name, c.support) == (CLASSES[present[i]], n[i])
            assert [getattr(c, prefix + k) for k in ("precision", "recall", "f1")] == pytest.approx([p[i], r[i], f[i]])


# ---- the rules, one by one


def scored_frames(folder) -> set:
    return set(np.flatnonzero(score_session(folder, write=False, resamples=20).track.scored).tolist())


@pytest.mark.parametrize(("ms", "there"), [(590, False), (599, False), (600, True), (610, True)])
def test_segments_shorter_than_600_ms_are_not_scored(tmp_path, ms, there):
    folder = simulate_session(tmp_path/"s", timeline((1000, "Happy"), (ms, "Sad"), (1000, "Fear")), fps=1000)
    inside = {k for k in scored_frames(folder) if 1000 <= k < 1000 + ms}
    assert inside == (set(range(1251, 1000 + ms - 250)) if there else set())


def test_frames_within_250_ms_of_a_change_are_not_scored(tmp_path):
    folder = simulate_session(tmp_path/"s", timeline((1000, "Happy"), (1000, ""), (1000, "Sad")), fps=1000)
    scored = scored_frames(folder)
    assert [k in scored for k in (749, 750, 751, 999)] == [True, False, False, False]  # 251, 250, 249 and 1 ms before the label ends
    assert [k in scored for k in (2000, 2249, 2250, 2251)] == [False, False, False, True]  # 249, 250 and 251 ms after one begins
    assert 0 in scored and 2999 in scored  # a session's start and end are no changes
    assert not scored & set(range(1000, 2000))  # unlabelled


def test_a_short_segment_takes_its_neighbours_edges_with_it(tmp_path):
    one = scored_frames(simulate_session(tmp_path/"a", timeline((1000, "Happy"), (300, "Sad"), (1000, "Happy")), fps=1000))
    assert one == set(range(750)) | set(range(1551, 2300))


def write_rows(folder, truth, shown, fps=20, faces=None):
    "A session by hand: labels as given, raw label = the truth's class."
    rows = []
    for i, (t, s) in enumerate(zip(truth, shown)):
        gone = s == NO_FACE
        raw = t if faces is None else faces[i]
        p = [""]*7 if gone else [0.94 if c == raw else 0.01 for c in CLASSES]
        rows.append([i, f"{i/fps:.6f}", "" if gone else 1, "" if gone else "1.0 1.0 9.0 9.0", t, "" if gone else raw, s, *p, "d", "m", 1.0])
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=COLUMNS["per_frame.csv"]).to_csv(folder/"per_frame.csv", index=False)
    return folder


def test_unstable_and_no_face_are_errors_in_accuracy_and_in_f1(tmp_path):
    truth = ["Happy"]*40 + ["Sad"]*40
    right = score_session(write_rows(tmp_path/"a", truth, truth), write=False).results
    assert (right.scored_frames, right.shown.accuracy.value, right.shown.macro_f1.value) == (35 + 34, 1, 1)
    for silence in (UNSTABLE, NO_FACE):
        shown = [silence if 10 <= i < 20 else t for i, t in enumerate(truth)]
        r = score_session(write_rows(tmp_path/silence, truth, shown), write=False).results
        n, hits = 69, 25  # of Happy's 35 scored frames ten are silent
        assert r.shown.accuracy.value == pytest.approx((n - 10)/n)
        assert r.shown.macro_f1.value == pytest.approx((2*hits/(35 + hits) + 1)/2)
        happy = next(c for c in r.per_class if c.name == "Happy")
        assert (happy.precision, happy.recall, happy.support, happy.predicted) == (1, hits/35, 35, hits)
        assert (r.shown.unstable, r.shown.no_face)[silence == NO_FACE] == pytest.approx(10/n)
        raw = (n - 10)/n if silence == NO_FACE else 1  # without a face the raw label is an error as well
        assert r.raw.accuracy.value == pytest.approx(raw)


def test_raw_stands_beside_shown_on_the_same_frames(tmp_path):
    truth, raw = ["Happy"]*40 + ["Sad"]*40, ["Happy", "Fear"]*40
    r = score_session(write_rows(tmp_path/"s", truth, truth, faces=raw), write=False).results
    assert r.shown.accuracy.value == 1 and r.raw.accuracy.value == pytest.approx(18/69)  # of Happy's 35 scored frames every other one
    assert r.gain_accuracy.value == pytest.approx(1 - 18/69)
    assert r.raw.macro_f1.value == pytest.approx(18/(35 + 18 + 17))  # half of Happy's F1; Fear doesn't occur


def test_jitter_counts_changes_where_two_rows_in_succession_have_a_face(tmp_path):
    truth = ["Happy"]*61
    shown = ["Happy"]*10 + [UNSTABLE]*10 + ["Happy"]*10 + [NO_FACE]*10 + ["Sad"]*21
    r = score_session(write_rows(tmp_path/"s", truth, shown, fps=10), write=False).results
    minutes = (29 + 20)*0.1/60  # steps inside the two stretches with a face
    assert r.shown.jitter_per_min == pytest.approx(2/minutes)  # to unstable and back; to and from no face don't count
    assert (r.raw.jitter_per_min, r.truth_changes_per_min) == (0, 0)


def test_time_to_lock(tmp_path):
    truth = ["Happy"]*40 + ["Sad"]*40 + ["Fear"]*40 + ["Angry"]*40  # 2 s each
    shown = ["Happy"]*40 + ["Happy"]*10 + ["Sad"]*11 + ["Happy"] + ["Sad"]*18  # right for 550 ms, one frame wrong, then right
    shown += ["Sad"]*28 + ["Fear"]*12  # right for exactly the last 600 ms
    shown += ["Fear"]*29 + ["Angry"]*11  # right for the last 550 ms only: never
    r = score_session(write_rows(tmp_path/"s", truth, shown), write=False).results
    lock = r.shown.time_to_lock
    assert (lock.segments, lock.locked) == (4, 3)
    # after 0, 1100 and 1400 ms 3/4, 2/4 and 1/4 are open; the fourth is censored at 2000 - 600, and a tenth is never reached
    assert (lock.median_ms, lock.p90_ms, lock.horizon_ms, lock.estimator) == (1100, None, 1400, "Kaplan-Meier")
    assert lock.restricted_mean_ms == pytest.approx(1100*3/4 + 300*2/4)
    never = score_session(write_rows(tmp_path/"n", truth, ["Disgust"]*160), write=False)
    assert never.results.shown.time_to_lock.locked == 0 and never.results.shown.time_to_lock.median_ms is None and "0 of 4" in str(never)
    assert never.results.shown.time_to_lock.restricted_mean_ms == 1400 and "not reached" in str(never)


@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=30))
def test_the_share_that_has_not_locked_is_scipys_survival_function(segments):
    ms, locked = np.array([100.0*t for t, _ in segments]), np.array([b for _, b in segments])
    at, left = not_yet_locked(ms, locked)
    want = stats.ecdf(stats.CensoredData(ms[locked], right=ms[~locked])).sf
    for t in np.arange(0, 4200, 50.0):
        got = left[at <= t][-1] if (at <= t).any() else 1.0
        assert got == pytest.approx(want.evaluate(t), abs=1e-12)
    grid = np.arange(0, 3000, 1.0)
    assert restricted_mean(at, left, 3000) == pytest.approx(want.evaluate(grid).mean()*3000, abs=3)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30))
def test_where_every_segment_locks_the_estimate_is_the_plain_one(times):
    ms = 100.0*np.array(times)
    curve = not_yet_locked(ms, np.full(len(ms), True))
    assert restricted_mean(*curve, 4000) == pytest.approx(ms.mean())
    assert when_locked(*curve, 0.5) == statistics.median_low(ms.tolist())


def test_giving_up_on_segments_is_not_quick(tmp_path):
    "Of two settings, the one that locks soon on three segments and never on the other five is the slower one."
    truth = [c for c in ["Happy", "Sad"]*4 for _ in range(60)]  # 3 s each
    gives_up = [t if i//60 < 3 else UNSTABLE for i, t in enumerate(truth)]
    late = [t if i % 60 >= 16 else UNSTABLE for i, t in enumerate(truth)]  # after 800 ms
    a, b = (score_session(write_rows(tmp_path/n, truth, x), write=False).results.shown.time_to_lock for n, x in
            (("a", gives_up), ("b", late)))
    assert (a.locked, a.median_ms, b.locked, b.median_ms) == (3, None, 8, 800)
    assert a.restricted_mean_ms == pytest.approx(5/8*2400) and b.restricted_mean_ms == pytest.approx(800)
    t = pd.DataFrame({"ema": [0.1, 0.2], "delta": 0.0, "window": 1, "min_count": 1, "macro_f1": 0.8, "jitter_per_min": 10,
                      "lock_median_ms": [a.median_ms, b.median_ms],
                      "lock_restricted_mean_ms": [a.restricted_mean_ms, b.restricted_mean_ms]})
    assert choose(t, 30)["ema"] == 0.2


def test_a_pause_is_no_observed_time(tmp_path):
    "A minute in which the camera stalled neither calms the label, nor lets it hold, nor joins what lies before and after."
    truth = ["Happy"]*80
    shown = ["Happy"]*38 + ["Sad", "Happy"] + ["Happy", "Sad"] + ["Happy"]*38
    folder = write_rows(tmp_path/"s", truth, shown)
    t = pd.read_csv(folder/"per_frame.csv", dtype=str, keep_default_na=False)
    t["time_sec"] = [f"{i/20 + 60*(i >= 40):.6f}" for i in range(80)]
    t.to_csv(folder/"per_frame.csv", index=False)
    r = score_session(folder, write=False).results
    assert (r.segments, r.scored_segments, r.pause_ms) == (2, 2, 2000)
    assert r.shown.jitter_per_min == pytest.approx(4/((39 + 39)*0.05/60))
    assert (r.shown.time_to_lock.median_ms, r.shown.time_to_lock.p90_ms) == (0, 100)


def test_scores_of_before_still_load(tmp_path):
    score_session(write_rows(tmp_path/"s", ["Happy"]*40, ["Happy"]*40))
    path = tmp_path/"s"/"score_results.json"
    data = json.loads(path.read_text()) | {"schema_version": 1}
    data.pop("pause_ms")
    for kind in ("shown", "raw"): data[kind]["time_to_lock"] = {"segments": 1, "locked": 1, "mean_ms": 5.0, "median_ms": 5.0, "p90_ms": 5.0}
    path.write_text(json.dumps(data))
    lock = ScoreResults.load(path).shown.time_to_lock
    assert (lock.estimator, lock.median_ms, lock.restricted_mean_ms) == ("locked segments only", 5.0, None)


def test_macro_f1_is_over_the_classes_that_occur(tmp_path):
    truth = ["Happy"]*40
    r = score_session(write_rows(tmp_path/"s", truth, ["Happy"]*30 + ["Sad"]*10), write=False).results
    assert [c.name for c in r.per_class] == ["Happy"] and r.shown.macro_f1.value == pytest.approx(2*30/70)
    table = pd.read_csv(score_session(tmp_path/"s").session.folder/"per_class_correctness.csv", index_col="class")
    assert list(table.index) == list(CLASSES) and table["support"].tolist() == [0, 0, 0, 40, 0, 0, 0]
    assert table["f1"].isna().tolist() == [c != "Happy" for c in CLASSES]


# ---- intervals, latency, summary


def test_intervals_come_from_whole_segments(sessions):
    t = score_session(sessions["plain"], write=False, resamples=20).track
    shown, raw = count_labels(t, t.shown), count_labels(t, t.raw)
    found, again = (segment_intervals(shown, raw, 400, seed=3) for _ in range(2))
    assert found == again != segment_intervals(shown, raw, 400, seed=4)
    rng, draws, k = np.random.default_rng(0), [], len(t.scored_segments)
    for _ in range(4000):  # a plain bootstrap, segment by segment
        rows = np.concatenate([np.flatnonzero(t.block == b) for b in rng.integers(0, k, k)])
        draws.append((t.shown[rows] == t.truth[rows]).mean())
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found["shown"][0].low == pytest.approx(low, abs=0.03) and found["shown"][0].high == pytest.approx(high, abs=0.03)
    assert found["gain"][1].value == pytest.approx(found["shown"][1].value - found["raw"][1].value)


def test_one_segment_gives_no_interval(tmp_path):
    score = score_session(write_rows(tmp_path/"s", ["Happy"]*40, ["Happy"]*40), write=False)
    assert (score.results.shown.accuracy.value, score.results.shown.accuracy.low, score.results.gain_macro_f1.low) == (1, None, None)
    assert "bootstrap" not in str(score)


def test_latency_by_stage_and_in_all(sessions):
    r = score_session(sessions["plain"], write=False, resamples=20).results
    t = pd.read_csv(sessions["plain"]/"latency.csv")
    stages = [c for c in t if c.endswith("_ms")]
    for name, values in {**{c.removesuffix("_ms"): t[c] for c in stages}, "total": t[stages].sum(axis=1)}.items():
        got = r.latency_ms[name]
        want = (values.mean(), *np.percentile(values, [50, 90, 99]))
        assert (got.mean, got.p50, got.p90, got.p99) == pytest.approx(want) and got.n == len(t)
    assert r.fps == pytest.approx(20)


def test_summary_has_one_row_a_session_and_scoring_again_replaces_it(tmp_path):
    for name, seed in (("one", 1), ("two", 2)): simulate_session(tmp_path/name, make_timeline(8, np.random.default_rng(seed)), seed=seed)
    for name in ("one", "two", "one"): score_session(tmp_path/name, resamples=20)
    path = tmp_path/"demo_results_summary.csv"
    table = pd.read_csv(path)
    assert table["session"].tolist() == ["one", "two"]
    fresh = score_session(tmp_path/"one", resamples=20, write=False).results
    assert table["macro_f1"][0] == pytest.approx(fresh.shown.macro_f1.value, rel=1e-5) and table["scored_frames"][0] == fresh.scored_frames
    other = table["macro_f1"][1]
    text = path.read_text().replace("session,", "remark,session,", 1)
    path.write_text(text.replace("\none,", "\n,one,").replace("\ntwo,", "\nfine,two,"))
    write_rows(tmp_path/"one", ["Happy"]*40, ["Sad"]*40)  # the session changes, and so does its row; what others wrote stays
    (tmp_path/"one"/"events.csv").unlink()
    score_session(tmp_path/"one", resamples=20)
    table = pd.read_csv(path)
    assert table["session"].tolist() == ["one", "two"] and table["macro_f1"].tolist() == pytest.approx([0, other])
    assert table["remark"][1] == "fine" and not list(tmp_path.glob(".*"))
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ArtifactError, match="has no column session"): score_session(tmp_path/"one", resamples=20)


def test_the_artifact_reads_back_and_the_result_reads_well(sessions):
    score = score_session(sessions["gaps and no face"], resamples=50)
    assert ScoreResults.load(score.session.folder) == score.results
    text = str(score)
    assert re.search(r"accuracy +\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", text), "three digits: a session has some hundred frames"
    assert "truth: manual labels" in text and "\x1b" not in text and "macro-F1" in text
    assert sum(x.startswith("|:---") for x in score._repr_markdown_().splitlines()) == 3  # kinds of label, classes, stages


# ---- replay


@pytest.mark.parametrize("kind", KINDS)
def test_replay_equals_the_session_exactly(sessions, kind):
    again = replay(sessions[kind])
    with open(sessions[kind]/"per_frame.csv", newline="") as f: logged = [r["pred_label"] for r in csv.DictReader(f) if r["pred_label"]]
    assert again.table["replayed_label"].tolist() == logged and again.differ == 0
    assert "labels are the session's" in str(again)


@given(st.data())
@settings(max_examples=25)
def test_replay_of_any_session_is_exact(tmp_path_factory, data):
    number, value = st.integers(0, 79), {
        "ema": st.floats(0, 0.99), "delta": st.floats(0, 1), "window": st.integers(1, 40), "min_count": st.integers(1, 40),
        "reset": st.just(1), "threshold_Happy": st.floats(0, 1), "threshold_Neutral": st.floats(0, 1)}
    names = st.lists(st.sampled_from(sorted(value)), max_size=3, unique=True)
    changes = {u: {k: data.draw(value[k]) for k in data.draw(names)} for u in data.draw(st.lists(number, max_size=5))}
    cut, gone = data.draw(number), data.draw(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 4000)), max_size=3))
    folder = simulate_session(
        tmp_path_factory.mktemp("s")/"s", make_timeline(4, np.random.default_rng(0), hold=(0.5, 1.5)), seed=data.draw(st.integers(0, 99)),
        skill=1.5, changes=changes, no_face=gone, order=[*range(cut, 80), *range(cut)], faces=data.draw(st.integers(1, 3)),
        close=data.draw(st.booleans()), settings={"vote_by": data.draw(st.sampled_from(["frames", "seconds"]))})
    assert replay(folder).differ == 0


def stall(folder, age: float):
    "Let a session's camera stall twice, for 0.9 s and for 3 s, and show what a stabiliser whose votes age so shows."
    t = pd.read_csv(folder/"per_frame.csv", dtype=str, keep_default_na=False)
    seconds = t["time_sec"].astype(float) + 0.9*(t.index >= 63) + 3*(t.index >= 122)
    s = Stabiliser(vote_age=age)
    shown = [s.update(p, x) for p, x in zip(t[PROBS].astype(float).to_numpy(), seconds.round(6))]
    t.assign(time_sec=seconds.map("{:.6f}".format), pred_label=shown).to_csv(folder/"per_frame.csv", index=False)
    return shown


def test_sessions_from_before_votes_aged_replay_as_they_ran(tmp_path):
    "Their session.json tells no `vote_age`; after a stall the labels of the two rules differ, and each session gives its own."
    events, shown = timeline((3000, "Happy"), (3000, "Sad"), (4000, "Happy")), {}
    for name, age in (("before", 0.0), ("now", 2.0)):
        shown[name] = stall(simulate_session(tmp_path/name, events, settings={"vote_age": age}), age)
        assert replay(tmp_path/name).differ == 0
    assert sum(a != b for a, b in zip(shown["before"], shown["now"])) >= 5
    path = tmp_path/"before"/"session.json"
    info = json.loads(path.read_text())
    del info["settings"]["vote_age"], info["clock"]
    path.write_text(json.dumps(info))
    again = replay(tmp_path/"before")
    assert again.differ == 0 and "ran before votes aged" in str(again) and "ran before" not in str(replay(tmp_path/"now"))
    assert replay(tmp_path/"before", ema=0.5).codes.tolist() != replay(tmp_path/"now", ema=0.5).codes.tolist()


def test_votes_by_seconds_are_logged_and_replayed_and_older_sessions_voted_by_frames(tmp_path):
    events = make_timeline(15, np.random.default_rng(3))
    slow = {unit: simulate_session(tmp_path/unit, events, fps=9, skill=1.5, settings={"vote_by": unit}) for unit in ("frames", "seconds")}
    shown = {unit: load_session(folder).main["pred_label"].tolist() for unit, folder in slow.items()}
    assert shown["frames"] != shown["seconds"] and load_session(slow["seconds"]).info.settings["vote_by"] == "seconds"
    for unit, other in (("frames", "seconds"), ("seconds", "frames")):
        assert replay(slow[unit]).differ == 0
        again = replay(slow[unit], vote_by=other)
        assert [CODES[x] for x in again.table["replayed_label"]] == shown[other] and f"vote_by {other}" in str(again)
    path = slow["frames"]/"session.json"
    info = json.loads(path.read_text())
    del info["settings"]["vote_by"]
    path.write_text(json.dumps(info))
    assert replay(slow["frames"]).differ == 0
    path.write_text(json.dumps(info | {"settings": info["settings"] | {"vote_by": "hours"}}))
    with pytest.raises(ArtifactError, match="vote_by is 'hours'"): replay(slow["frames"])


@pytest.mark.parametrize("unit", ["frames", "seconds"])
def test_tune_searches_by_frames_or_by_seconds_and_says_which(tmp_path, unit):
    folder = simulate_session(tmp_path/"s", make_timeline(15, np.random.default_rng(3)), fps=9, settings={"vote_by": unit})
    other = {"frames": "seconds", "seconds": "frames"}[unit]
    for by, told in ((None, unit), (other, other)):
        found = tune(folder, jitter_limit=1000, vote_by=by, emas=(0.7,), deltas=(0.08,), windows=(15,))
        again = replay(folder, vote_by=told)
        assert found.best["macro_f1"] == pytest.approx(accuracy_f1(count_labels(found.track, again.codes).sum(0))[1])
        assert ("30ths of a second" in str(found)) == (told == "seconds") and StabiliserChoice.load(folder).vote_by == told


def test_replay_with_other_settings_is_the_session_with_those_settings(tmp_path):
    events = make_timeline(15, np.random.default_rng(3))
    other = {"ema": 0.9, "delta": 0.3, "window": 5, "min_count": 4}
    ran = simulate_session(tmp_path/"ran", events, seed=1)
    changes = {50: {"ema": 0.2, "window": 3}, 120: {"ema": 0.5}, 130: {"threshold_Sad": 0.4}}
    tuned = simulate_session(tmp_path/"tuned", events, seed=1, changes=changes)
    want = load_session(simulate_session(tmp_path/"other", events, seed=1, settings=other))
    def labels(r): return [CODES[x] for x in r.table["replayed_label"]]
    assert labels(replay(ran, **other)) == want.main["pred_label"].tolist()
    assert labels(replay(tuned, **other, threshold_Sad=0)) == want.main["pred_label"].tolist()  # what is given holds to the end
    assert labels(replay(tuned, **other)) != want.main["pred_label"].tolist()  # the threshold in the log acts
    for k, v in other.items():
        if k != "min_count": assert replay(ran, **{k: v}).differ > 0, k
    assert replay(ran, ema=None, delta=None).differ == 0 and replay(ran, min_count=15).differ > 0


def test_replay_needs_every_change_of_the_log(sessions, tmp_path):
    calm = simulate_session(tmp_path/"calm", timeline((4000, "Happy")), changes={50: {"reset": 1}})
    for name in ("ema", "window", "min_count", "threshold", "reset"):
        folder = shutil.copytree(calm if name == "reset" else sessions["tuned, sought, two faces"], tmp_path/name)
        lines = (folder/"tuning.csv").read_text().splitlines(keepends=True)
        left = [x for x in lines if f",{name}" not in x]
        assert len(left) < len(lines)
        (folder/"tuning.csv").write_text("".join(left))
        if name != "min_count": assert replay(folder).differ > 0, name
    assert "should be the same" in str(replay(tmp_path/"ema"))


def test_replay_saves_its_table(sessions, tmp_path):
    again = replay(sessions["plain"], ema=0.5)
    table = pd.read_csv(again.save(tmp_path/"replay.csv"), keep_default_na=False)
    assert list(table) == ["frame_index", "time_sec", "true_label", "raw_label", "logged_label", "replayed_label"]
    assert (table["logged_label"] != table["replayed_label"]).sum() == again.differ > 0


def test_replay_refuses_what_no_stabiliser_has(sessions):
    with pytest.raises(UsageError, match="no 'emma'"): replay(sessions["plain"], emma=0.5)
    with pytest.raises(UsageError, match="ema is 1.5: give a number from 0 to 0.99"): replay(sessions["plain"], ema=1.5)


def test_replay_labels_makes_changes_before_the_update_that_they_name():
    p = [np.where(np.arange(7) == k, 0.94, 0.01) for k in (0, 0, 1, 1, 1)]
    rows = [(i, i/30, x) for i, x in enumerate(p)]
    s = {"ema": 0, "delta": 0, "window": 1}
    assert replay_labels(rows, s) == ["Angry"]*2 + ["Disgust"]*3
    assert replay_labels(rows, s, [(2, "delta", 1)]) == ["Angry"]*5
    assert replay_labels(rows, s, [(3, "delta", 1)]) == ["Angry"]*2 + ["Disgust"]*3


class Numbers(Source):
    "Empty pictures; what is in them the stand-ins below know."
    kind, name, seekable, fps = "video", "numbers", True, 25.0
    def __init__(self, n): self.frames, self.index = n, 0
    def read(self):
        if self.index >= self.frames: return None
        self.index += 1
        return Frame(self.index - 1, round((self.index - 1)/self.fps, 6), np.full((120, 160, 3), self.index % 251, np.uint8))
    def seek(self, index): self.index = index


def stand_ins(source, seed):
    "A detector whose faces come, go and change in size, and a predictor whose answers are drawn."
    rng = np.random.default_rng(seed)
    def detect(image):
        k = (source.index - 1)//15 % 4  # one face, two, another one larger, none
        boxes = [[(10, 10, 60, 60)], [(10, 10, 60, 60), (90, 20, 50, 50)], [(10, 10, 40, 40), (90, 20, 60, 60)], []][k]
        return [Detection(Box.from_xywh(b)) for b in boxes]
    def from_views(faces): return rng.dirichlet(np.full(7, 0.5), len(faces))
    predictor = SimpleNamespace(geometry=Geometry(size=16), name="drawn", from_views=from_views, bias=np.zeros(7), temperature=1.0,
                                checkpoint_sha256=None, dataset_index_id=None, convention="", crop_for=lambda d: (Crop(1.0), ""))
    return SimpleNamespace(name="drawn", detect=detect), predictor


def test_sessions_of_the_real_pipeline_replay_exactly(tmp_path):
    source, stabilizer = Numbers(200), Stabiliser(window=5, min_count=3, ema=0.5)
    detector, predictor = stand_ins(source, 1)
    acts = {20: lambda p: p.set("ema", 0.8), 30: lambda p: p.label(4), 50: lambda p: p.seek(10), 75: lambda p: p.set("window", 9),
            90: lambda p: p.seek(150), 100: lambda p: p.label(2), 120: lambda p: p.seek(60), 130: lambda p: p.set("threshold_Happy", 0.5),
            140: lambda p: p.undo(), 145: lambda p: p.label(6)}
    log = SessionLog(tmp_path/"s", session_info(source, detector, predictor, stabilizer))
    with Pipeline(source, detector, predictor, stabilizer, log) as p:
        for step in range(400):
            if step in acts: acts[step](p)
            if p.step() is None: break
    again = replay(tmp_path/"s")
    assert again.differ == 0 and len(again.table) == 190  # ten frames were skipped, ninety seen twice
    assert {"reset", "ema", "window", "threshold_Happy"} <= set(again.session.changes["name"])
    same(score_session(tmp_path/"s", write=False, resamples=20), score_by_hand(rows_of(tmp_path/"s")))


def test_a_synthetic_video_through_the_pipeline_scores_as_its_truth_says(tmp_path):
    events = write_video(tmp_path/"video", seconds=6, fps=20, size=(160, 120), seed=3)
    rng, source = np.random.default_rng(0), open_source(tmp_path/"video"/"video.avi")
    def from_views(faces):
        true = next(e.label for e in events.frame().itertuples() if e.start_ms <= (source.index - 1)*50 < e.end_ms)
        return rng.dirichlet(0.4 + 3*(np.array(CLASSES) == true), len(faces))
    detector, predictor = stand_ins(source, 0)
    predictor.from_views, stabilizer = from_views, Stabiliser(window=5, min_count=3)
    detector.detect = lambda image: [] if 40 <= source.index < 50 else [Detection(Box.from_xywh((30, 20, 90, 90)))]
    log = SessionLog(tmp_path/"s", session_info(source, detector, predictor, stabilizer))
    with Pipeline(source, detector, predictor, stabilizer, log) as p:
        while p.step(): pass
    rows = rows_of(tmp_path/"s")
    for r in rows: r["truth"] = next(e.label for e in events.frame().itertuples() if e.start_ms*1000 <= r["us"] < e.end_ms*1000)
    hand = score_by_hand(rows)
    assert len(rows) == 120 and hand["scored"] > 60 and hand["shown"]["no_face"] > 0
    score = score_session(tmp_path/"s", tmp_path/"video"/"events.csv", resamples=50)
    same(score, hand)
    assert replay(tmp_path/"s").differ == 0 and score.results.latency_ms["total"].n == 120
    assert score_session(tmp_path/"s", write=False).results.scored_frames == 0  # nobody labelled by hand


# ---- tuning

GRID = dict(emas=(0, 0.7, 0.9), deltas=(0, 0.16), windows=(1, 9))


def test_tune_finds_the_best_setting_within_the_limit(sessions):
    found = tune(sessions["plain"], jitter_limit=60, **GRID)
    scores = {}
    for e in GRID["emas"]:
        for d in GRID["deltas"]:
            for w in GRID["windows"]:
                again = replay(sessions["plain"], ema=e, delta=d, window=w, min_count=w//2 + 1)
                rows = rows_of(sessions["plain"])
                for r, x in zip(rows, again.table["replayed_label"]): r["shown"] = x
                hand = score_by_hand(rows)["shown"]
                scores[e, d, w] = hand["macro_f1"], hand["jitter"]
    for r in found.table.itertuples():
        assert (r.macro_f1, r.jitter_per_min) == pytest.approx(scores[r.ema, r.delta, r.window]) and r.min_count == r.window//2 + 1
    calm = {k: v for k, v in scores.items() if v[1] <= 60}
    assert 0 < len(calm) < len(scores)
    assert found.best["macro_f1"] == pytest.approx(max(f for f, _ in calm.values())) and found.best["jitter_per_min"] <= 60
    kept = StabiliserChoice.load(sessions["plain"])
    assert kept.settings == {k: found.best[k] for k in ("ema", "delta", "window", "min_count")} and kept.tried == 12
    table = pd.read_csv(sessions["plain"]/"tuning_results.csv")
    assert len(table) == 12 and table["within_limit"].sum() == len(calm)


def test_tune_says_when_no_setting_is_calm_enough(sessions):
    tune(sessions["plain"], jitter_limit=60, **GRID)
    found = tune(sessions["plain"], jitter_limit=0.5, **GRID)
    assert found.best is None and "No setting keeps the limit. The calmest, EMA 0.9" in str(found)
    assert not (sessions["plain"]/"stabiliser.json").exists()  # nothing of an earlier search passes for this one's
    assert len(pd.read_csv(sessions["plain"]/"tuning_results.csv")) == 12
    assert tuning_grid(found)[0].isna().all(axis=None) and tuning_plot(found)


def judged(own, best, limit=30.0, segments=20, truth=10.0, **more):
    "What a search says whose session and choice have these scores: (macro-F1, changes a minute)."
    half, step = 60_000_000/truth, np.arange(0, int(60e6*segments/truth), 500_000)
    track = make_track(step, (step//half).astype(int) % 2, (step//half).astype(int) % 2, np.zeros(len(step), int))
    def row(x): return {"macro_f1": x[0], "jitter_per_min": x[1], "ema": 0.7, "delta": 0.08, "window": 15, "min_count": 8} | more
    table = pd.DataFrame([row(best or (0.1, 99)) | {"first_macro_f1": 0.5}])
    return Tuning(SimpleNamespace(name="s"), track, table, limit, pd.Series(row(best)) if best else None, None, row(own), row(own), [])


def test_tune_says_why_it_recommends_less_than_the_session_had():
    "The session of a new user: 0.225 at a jitter above the limit, and 0.208 recommended."
    said, = judged((0.225, 48.0), (0.208, 29.0)).beside_own()
    assert said == ("The session's own settings score 0.225 at 48.0 changes a minute, above the limit of 30, so they can't be chosen; the "
                    "recommendation, 0.208 at 29.0 changes a minute, is the best that keeps it.")
    assert judged((0.225, 48.0), (0.3, 29.0)).beside_own() == []


def test_tune_says_what_else_a_reader_would_wonder_about():
    def one(*how, **more): return judged(*how, **more).beside_own()
    assert "there is nothing to change" in one((0.5, 20), (0.5, 20))[0]
    assert "better than all of the grid: keep them" in one((0.6, 20), (0.5, 20))[0]
    assert "better than all of the grid: keep them" in one((0.6, 20), None)[0]
    assert one((0.6, 40), None) == ["The session's own settings score 0.600 at 40.0 changes a minute, above the limit of 30 too."]
    assert re.match(r"The truth itself changes 5\d\.\d times a minute, above the limit of 30", one((0.5, 20), (0.6, 25), truth=60.0)[0])
    assert "turns every step off" in one((0.5, 20), (0.6, 25), ema=0.0, delta=0.0, window=1)[0]
    assert one((0.5, 20), (0.6, 25), segments=3) == ["3 scored segments are few, and the choice hangs on single moments: label more."]
    assert one((0.5, 20), (0.6, 25)) == []


def test_tune_says_it_where_the_search_is_a_real_one(sessions):
    own = tune(sessions["plain"], jitter_limit=1000, write=False, **GRID).own
    found = tune(sessions["plain"], jitter_limit=own["jitter_per_min"] - 0.1, write=False, emas=(0.9,), deltas=(0.16,), windows=(31,))
    assert found.best["macro_f1"] < own["macro_f1"] and "so they can't be chosen" in str(found)


def test_tune_has_no_honest_number_of_a_half_without_scored_frames():
    found = judged((0.5, 20), (0.6, 25))
    found.table["first_macro_f1"] = np.nan
    assert "has no scored frame, so the choice has no honest number" in found.halves()


def test_tune_reports_the_choice_of_one_half_on_the_other(sessions):
    found = tune(sessions["plain"], jitter_limit=80, write=False, **GRID)
    rows, own = rows_of(sessions["plain"]), found.half
    again = replay(sessions["plain"], ema=own["ema"], delta=own["delta"], window=int(own["window"]), min_count=int(own["min_count"]))
    for r, x in zip(rows, again.table["replayed_label"]): r["shown"] = x
    long = [s for s in segments_by_hand(rows) if s["truth"] and s["end"] - s["start"] >= 600_000]
    changes = [b["us"] for a, b in zip(rows, rows[1:]) if a["truth"] != b["truth"]]
    def f1(part):
        scored = [r for s in part for r in s["rows"] if all(abs(r["us"] - c) > 250_000 for c in changes)]
        truth, shown = [CODES[r["truth"]] for r in scored], [CODES[r["shown"]] for r in scored]
        return f1_score(truth, shown, labels=sorted(set(truth)), average="macro", zero_division=0)
    middle = len(long)//2
    assert (own["first_macro_f1"], own["second_macro_f1"]) == pytest.approx((f1(long[:middle]), f1(long[middle:])))
    split = long[middle]["rows"][0]["us"]
    assert own["first_jitter_per_min"] == pytest.approx(changes_by_hand([r for r in rows if r["us"] < split], "shown"))
    assert own["second_jitter_per_min"] == pytest.approx(changes_by_hand([r for r in rows if r["us"] >= split], "shown"))
    calm = found.table[found.table["first_jitter_per_min"] <= 80]
    assert own["first_macro_f1"] == calm["first_macro_f1"].max()
    assert f"reported on the other {len(long) - middle}: macro-F1 {own['second_macro_f1']:.3f}" in str(found)


def test_equal_settings_are_told_apart_by_calm_then_speed():
    t = pd.DataFrame({"ema": [0.1, 0.2, 0.3, 0.4], "delta": 0.0, "window": 1, "min_count": 1, "macro_f1": [0.8, 0.8, 0.8, 0.9],
                      "jitter_per_min": [20, 10, 10, 40.0], "lock_median_ms": [100, 300, 200, 100.0],
                      "lock_restricted_mean_ms": [300, 400, 500, 300.0]})
    assert choose(t, 30)["ema"] == 0.3 and choose(t, 40)["ema"] == 0.4 and choose(t, 9) is None
    assert choose(t.assign(lock_median_ms=None), 30)["ema"] == 0.2  # by the restricted mean
    assert choose(t.assign(lock_median_ms=[100, 300, None, 100.0]), 30)["ema"] == 0.2  # a median that isn't reached is no quick one


def test_tune_with_one_segment_has_no_second_half(tmp_path):
    folder = simulate_session(tmp_path/"s", timeline((3000, "Happy")))
    found = tune(folder, jitter_limit=1000, **GRID)
    assert found.half is None and "can't be halved" in str(found) and StabiliserChoice.load(folder).half_macro_f1 is None


def test_tune_keeps_the_thresholds_of_the_session(tmp_path):
    events = make_timeline(10, np.random.default_rng(0))
    grid = dict(emas=(0.7,), deltas=(0.08,), windows=(15,), jitter_limit=1000, write=False)
    high = simulate_session(tmp_path/"high", events, settings={"thresholds": np.full(7, 0.8)})
    plain = simulate_session(tmp_path/"plain", events)
    for folder in (high, plain): assert tune(folder, **grid).best["macro_f1"] == pytest.approx(tune(folder, **grid).own["macro_f1"])
    assert tune(high, **grid).best["unstable"] > tune(plain, **grid).best["unstable"]


def test_tune_refuses_sessions_without_truth_and_limits_that_are_none(sessions, tmp_path):
    folder = simulate_session(tmp_path/"mute", timeline((3000, "")))
    with pytest.raises(GateError, match="mute: nothing is labelled"): tune(folder, **GRID)
    with pytest.raises(UsageError, match="jitter limit -1"): tune(sessions["plain"], jitter_limit=-1)
    with pytest.raises(UsageError, match="the grid is empty"): tune(sessions["plain"], emas=())


# ---- the truth


def edit_events(folder, change):
    t = pd.read_csv(folder/"events.csv", keep_default_na=False)
    change(t).to_csv(folder/"events.csv", index=False)


@pytest.fixture
def plain(sessions, tmp_path):
    return shutil.copytree(sessions["plain"], tmp_path/"copy")


def test_events_win_over_the_rows(plain):
    def relabel(t):
        t.loc[t.index[t["source"] == "manual"][1], "label"] = "Disgust"
        return t.drop(t.index[t["source"] == "manual"][0])
    before = rows_of(plain)
    edit_events(plain, relabel)
    score, rows = score_session(plain, write=False, resamples=20), rows_of(plain)
    differ = sum(a["truth"] != b["truth"] for a, b in zip(before, rows))
    assert differ > 50 and f"events.csv labels {differ} frames otherwise" in str(score)
    same(score, score_by_hand(rows))


def test_all_labels_undone(plain):
    edit_events(plain, lambda t: t[t["source"] == "model"])
    r = score_session(plain, write=False, resamples=20).results
    assert (r.labelled_frames, r.shown.accuracy) == (0, None) and "nothing is labelled" in " ".join(r.notes)


def test_without_events_the_rows_count(plain):
    want = score_session(plain, write=False, resamples=20).results
    (plain/"events.csv").unlink()
    got = score_session(plain, write=False, resamples=20).results
    assert (got.shown, got.raw, got.notes) == (want.shown, want.raw, [])


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.assign(label="Smile"), "line 2 holds an unknown label"),
    (lambda t: t.assign(end_frame=t["start_frame"] - 1), "ends before it starts"),
    (lambda t: t.assign(start_frame=t["start_frame"] - 5), "this stretch overlaps another"),
    (lambda t: t.drop(columns="source"), "has no column source"),
    (lambda t: t.assign(start_frame="x"), "key 'start_frame': line 2 holds no number"),
])
def test_broken_events_are_refused(plain, change, said):
    edit_events(plain, lambda t: change(t[t["source"] == "manual"]))
    with pytest.raises(ArtifactError, match=said) as e: score_session(plain, write=False)
    assert "events.csv" in str(e.value) and "\n" not in str(e.value)


def test_truth_from_a_videos_events(plain, tmp_path):
    events = KINDS["plain"]["events"]
    write_csv(tmp_path/"events.csv", events)
    by_hand = score_session(plain, write=False, resamples=20).results
    edit_events(plain, lambda t: t[t["source"] == "model"])
    by_truth = score_session(plain, tmp_path/"events.csv", write=False, resamples=20).results
    assert (by_truth.shown, by_truth.raw, by_truth.truth) == (by_hand.shown, by_hand.raw, f"events of {tmp_path.name}/events.csv")
    late = events.assign(start_ms=events["start_ms"] + 400, end_ms=events["end_ms"] + 400)
    write_csv(tmp_path/"late.csv", late)
    rows = rows_of(plain)
    for r in rows: r["truth"] = next((e.label for e in late.frame().itertuples() if e.start_ms*1000 <= r["us"] < e.end_ms*1000), "")
    same(score_session(plain, tmp_path/"late.csv", write=False, resamples=20), score_by_hand(rows))
    with pytest.raises(UsageError, match="is no file: give an events.csv"): score_session(plain, tmp_path/"none.csv")


def test_truth_from_another_persons_session(plain, sessions):
    want = score_session(plain, write=False, resamples=20).results
    assert score_session(plain, sessions["plain"]/"events.csv", write=False, resamples=20).results.shown == want.shown


# ---- the earlier system


def as_earlier(folder, out, columns=(*PROBS[3:], *PROBS[:3]), change=lambda t: t):
    "The same rows as the earlier system would have written them."
    t = pd.read_csv(folder/"per_frame.csv", dtype=str, keep_default_na=False)
    t = t[t["pred_label"] != ""].sort_values("frame_index", key=lambda c: c.astype(int)).assign(ckpt="best.pth")
    out.mkdir(parents=True)
    t = change(t[["frame_index", "time_sec", "manual_label", "pred_label", *columns, "detector", "model", "ckpt"]])
    t.to_csv(out/"per_frame.csv", index=False)
    return out


@pytest.mark.parametrize("kind", ["plain", "gaps and no face"])
def test_sessions_of_the_earlier_system_load_score_and_replay(sessions, tmp_path, kind):
    old = as_earlier(sessions[kind], tmp_path/"old")
    ours, theirs = (score_session(f, resamples=50).results for f in (sessions[kind], old))
    assert (theirs.shown, theirs.raw, theirs.per_class) == (ours.shown, ours.raw, ours.per_class)  # classes found by name, in another order
    assert (theirs.fps, theirs.latency_ms, theirs.settings, theirs.notes) == (None, {}, {}, [])
    assert replay(old).differ == 0 and load_session(old).earlier  # the defaults were its settings
    assert tune(old, jitter_limit=100, **GRID).best is not None
    with pytest.raises(UsageError, match="has no latency.csv"): latency_plot(score_session(old, write=False))


def test_rows_of_the_earlier_system_without_a_label_are_errors(sessions, tmp_path):
    def mute(t):
        t = t.copy()
        t.loc[t.index[10:20], "pred_label"] = ""
        t.loc[t.index[20:30], ["pred_label", *PROBS]] = ""
        t.loc[t.index[30:40], "pred_label"] = NO_FACE
        t.loc[t.index[30:40], PROBS] = "0.0"
        return t
    session = load_session(as_earlier(sessions["plain"], tmp_path/"old", change=mute))
    assert [LABELS[c] for c in session.main["pred_label"][10:40:10]] == [UNSTABLE, NO_FACE, NO_FACE]
    assert session.notes == [f"20 rows without a label shown count as {UNSTABLE} or {NO_FACE}"]


# ---- broken sessions


def changed(line, column, value):
    "The text of a CSV with one field replaced; lines count from 1."
    def change(text):
        lines = [x.split(",") for x in text.split("\n")]
        lines[line - 1][lines[0].index(column)] = value
        return "\n".join(",".join(x) for x in lines)
    return change


def without_column(name):
    def change(text):
        lines = [x.split(",") for x in text.split("\n") if x]
        k = lines[0].index(name)
        return "\n".join(",".join(x[:k] + x[k + 1:]) for x in lines) + "\n"
    return change


@pytest.mark.parametrize(("name", "change", "said"), [
    *(("per_frame.csv", without_column(c), f"has no column {c}") for c in
      ("frame_index", "time_sec", "face_id", "box", "manual_label", "raw_label", "pred_label", "prob_Angry", "prob_Neutral")),
    ("per_frame.csv", lambda t: "", "is empty"),
    ("per_frame.csv", lambda t: t.split("\n")[0] + "\n", "holds no frame"),
    ("per_frame.csv", lambda t: t.split("\n")[0], "is empty"),
    ("per_frame.csv", lambda t: t[:9000] + t[9100:], "is broken"),
    ("per_frame.csv", lambda t: t[:9000] + "\n" + t[9000:], "is broken"),
    ("per_frame.csv", lambda t: t.replace("\n", "\n\n", 3), "line 2 is broken"),
    ("per_frame.csv", lambda t: t.replace("box", "face_id", 1), "has no column box|has a column twice"),
    ("per_frame.csv", changed(7, "pred_label", "Smile"), "key 'pred_label': line 7 holds an unknown label"),
    ("per_frame.csv", changed(7, "manual_label", "happy"), "key 'manual_label': line 7 holds an unknown label"),
    ("per_frame.csv", changed(7, "raw_label", "(unstable)"), "key 'raw_label': line 7 holds an unknown label"),
    ("per_frame.csv", changed(7, "raw_label", ""), "line 7: a face without a raw_label"),
    ("per_frame.csv", changed(7, "prob_Fear", "0.99"), "line 7 holds no probabilities"),
    ("per_frame.csv", changed(7, "prob_Fear", "-0.2"), "line 7 holds no probabilities"),
    ("per_frame.csv", changed(7, "prob_Fear", "nan"), "key 'prob_Fear': line 7 holds no number"),
    ("per_frame.csv", changed(7, "prob_Fear", "inf"), "key 'prob_Fear': line 7 holds no number"),
    ("per_frame.csv", changed(7, "prob_Fear", "much"), "line 7 holds no number"),
    ("per_frame.csv", changed(7, "prob_Fear", ""), "with gaps"),
    ("per_frame.csv", changed(7, "time_sec", "soon"), "key 'time_sec': line 7 holds no number"),
    ("per_frame.csv", changed(7, "time_sec", "0.01"), "line 7: time_sec is smaller than on the frame before"),
    ("per_frame.csv", changed(7, "frame_index", ""), "key 'frame_index': line 7 holds no number"),
    ("per_frame.csv", changed(7, "frame_index", "4"), "line 7: this frame has had a label shown before"),
    ("per_frame.csv", changed(7, "pred_label", ""), "frame 5 has no row with a label shown"),
    ("per_frame.csv", changed(7, "pred_label", NO_FACE), "line 7: .*contradict each other"),
    ("tuning.csv", lambda t: t + "5,5,emma,0.3\n", "tuning.csv: line 2: a setting that no stabiliser has"),
    ("tuning.csv", lambda t: t + "5,5,ema,3\n", "tuning.csv: line 2: ema is 3.0: give a number from 0 to 0.99"),
    ("tuning.csv", lambda t: t + "5,x,ema,0.3\n", "key 'update': line 2 holds no number"),
    ("tuning.csv", lambda t: t + "5,5,ema,\n", "key 'value': line 2 holds no number"),
    ("latency.csv", changed(7, "detect_ms", "slow"), "key 'detect_ms': line 7 holds no number"),
    ("session.json", lambda t: t[:100], "session.json: is not whole JSON"),
    ("session.json", lambda t: t.replace('"ema": 0.7', '"ema": 7'), "holds settings that no stabiliser can have: ema is 7"),
    ("session.json", lambda t: json.dumps({**json.loads(t), "settings": {"thresholds": {"Smile": 0.1}}}), "no 'threshold_Smile'"),
])
def test_broken_sessions_give_one_clear_line(plain, name, change, said):
    path = plain/name
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    with pytest.raises(ArtifactError, match=said) as e: load_session(plain)
    assert name in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 400


def test_files_that_are_no_text_and_folders_that_are_no_session(plain, tmp_path):
    (plain/"per_frame.csv").write_bytes(b"\xff\xfe\x00\x01\n")
    with pytest.raises(ArtifactError, match="is not text"): load_session(plain)
    for where in (tmp_path, tmp_path/"nowhere"):
        with pytest.raises(UsageError, match="holds no per_frame.csv"): load_session(where)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_log_cut_off_anywhere_in_its_last_line_loads_without_it(sessions, tmp_path, ending):
    "However many bytes of the last line a kill left."
    source = shutil.copytree(sessions["plain"], tmp_path/"s")
    whole = (source/"per_frame.csv").read_bytes().replace(b"\n", ending.encode())
    last = len(whole.rstrip().rsplit(b"\n", 1)[1])
    for cut in (0, *range(1, last + len(ending), 9)):
        (source/"per_frame.csv").write_bytes(whole[:len(whole) - cut])
        session = load_session(source)
        assert len(session.main) == 400 - (cut > 0)
        assert ["was cut off" in n for n in session.notes] == [True]*(cut > 0)
    (source/"per_frame.csv").write_bytes(whole.rsplit(b",", 3)[0] + b"\n")  # too short a line, though it has an end
    assert len(load_session(source).main) == 399


def test_a_killed_session_loads_scores_and_says_so(tmp_path):
    folder = simulate_session(tmp_path/"s", make_timeline(10, np.random.default_rng(0)), faces=2, close=False)
    for name in ("per_frame.csv", "latency.csv", "tuning.csv"):
        text = (folder/name).read_bytes()
        (folder/name).write_bytes(text[:max(len(text.split(b"\n")[0]) + 1, len(text) - 30)])
    score = score_session(folder, resamples=20)
    assert any("was not closed" in n for n in score.results.notes) and any("per_frame.csv was cut off" in n for n in score.results.notes)
    assert replay(folder).differ == 0 and score.results.frames == 200  # it was the second face's row that was cut off


def test_a_session_without_its_settings_is_replayed_with_the_defaults_and_says_so(plain):
    (plain/"session.json").unlink()
    again = replay(plain)
    assert again.differ == 0 and "session.json is missing" in str(again)


# ---- pictures, and what an import costs


def test_pictures_of_every_kind_of_session(sessions):
    for folder in sessions.values():
        score = score_session(folder, write=False, resamples=20)
        ax = timeline_plot(score).axes[0]
        assert [t.get_text() for t in ax.get_yticklabels()] == ["truth", "raw", "shown"]
        assert len(latency_plot(score).axes[0].get_yticklabels()) == 7
    found = tune(sessions["plain"], jitter_limit=60, write=False, **GRID)
    f1, text = tuning_grid(found)
    assert f1.shape == (3, 2) and f1.loc[found.best["ema"], found.best["delta"]] == f1.max(axis=None) == found.best["macro_f1"]
    assert text.isin([f"{v:.1f}/min" for v in found.table["jitter_per_min"]]).to_numpy().tolist() == f1.isna().to_numpy().tolist()
    assert tuning_plot(found)


def test_one_frame_is_a_session(tmp_path):
    score = score_session(write_rows(tmp_path/"s", ["Happy"], ["Happy"]))
    assert (score.results.scored_frames, score.results.shown.jitter_per_min, score.results.fps) == (0, None, None)
    assert timeline_plot(score) and replay(tmp_path/"s").differ == 1  # one vote makes no majority of eight


def test_scoring_needs_no_torch():
    code = "import sys, fer_nb.scoring; assert not {'torch', 'fastai', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_are_of_the_kind_that_the_command_line_tells(plain):
    (plain/"per_frame.csv").write_text("")
    with pytest.raises(FerError) as e: score_session(plain)
    assert e.value.exit_code == 1


@pytest.mark.parametrize(("drawn", "convention", "odd"), [(True, "ferplus", True), (True, "synthetic", False), (False, "ferplus", False)])
def test_scores_of_a_drawn_film_by_a_model_of_photographs_are_explained(tmp_path, drawn, convention, odd):
    folder = simulate_session(tmp_path/"s", make_timeline(10, np.random.default_rng(0)))
    path = folder/"session.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"drawn": drawn, "convention": convention}))
    said = (str(score_session(folder)), str(tune(folder, 1000, **GRID)), str(replay(folder)))
    assert all(("the film is drawn, and the model learned photographs (ferplus)" in x) == odd for x in said)


def test_the_command_that_is_offered_for_a_drawn_film_is_one_that_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def command(): return re.search(r"fer-nb (demo .*\.onnx)", drawn_note(True, "ferplus"))[1].split()
    a = cli.parser().parse_args(command())
    assert (a.source, a.headless, a.model) == ("synthetic:20", True, "runs/quick/onnx/model_fp32.onnx")
    assert "fer-nb run --profile quick makes" in drawn_note(True, "ferplus")
    (tmp_path/"runs"/"embedded"/"onnx").mkdir(parents=True)
    (tmp_path/"runs"/"embedded"/"onnx"/"model_fp32.onnx").touch()
    assert command()[-1] == "runs/embedded/onnx/model_fp32.onnx" and "makes" not in drawn_note(True, "ferplus")
