"""CREMA-D in its layout, with drawn faces: whose votes count, which films are taken, and what is told of a broken copy."""
import subprocess
import sys

import cv2
import pandas as pd
import pytest

from fer_nb.artifacts import CLASSES, ArtifactError, UsageError
from fer_nb.capture import SyntheticSource
from fer_nb.film_collections import LETTERS, find_films, pick_films, read_crema
from fer_nb.sessions import load_session, truth_of
from fer_nb.webcam_sets import load_webcam_set

CLIPS = [f"{actor}_{line}_{what}_XX" for actor in (1001, 1002, 1003, 1004) for line, what in (("IEO", "ANG"), ("DFA", "HAP"))]
TABLE = "processedResults/tabulatedVotes.csv"


def votes_of(clips, **other):
    "Raters of the face see what was meant, those of the voice sadness, those of both nothing clearly."
    rows = []
    for k, clip in enumerate(clips, 1):
        seen = other.get(clip, {clip[9]: 8, "N": 2})
        for first, counts in (("1", {"S": 9}), ("2", seen), ("3", {"A": 4, "F": 4})):
            told = {c: counts.get(c, 0) for c in LETTERS}
            rows.append({"": f"{first}{k:05}", **told, "fileName": clip, "numResponses": sum(counts.values())})
    return pd.DataFrame(rows).sort_values("")


@pytest.fixture(scope="module")
def crema(tmp_path_factory):
    root = tmp_path_factory.mktemp("crema")
    for folder in ("processedResults", "VideoFlash"): (root/folder).mkdir()
    votes_of(CLIPS).to_csv(root/TABLE, index=False)
    for k, clip in enumerate(CLIPS):
        source = SyntheticSource(1.5, 10, seed=k)
        frames = [f.image for f in iter(source.read, None)]
        film = cv2.VideoWriter(str(root/"VideoFlash"/f"{clip}.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, frames[0].shape[1::-1])
        for f in frames: film.write(f)
        film.release()
    return root


def test_a_face_is_labelled_by_those_who_saw_it(crema):
    assert list(read_crema(crema)["label"]) == ["Happy", "Angry"]*4 and set(read_crema(crema, "voice")["label"]) == {"Sad"}
    assert set(read_crema(crema, "clip")["label"]) == {""}  # two answers lead
    assert (read_crema(crema)["agreement"] == 0.8).all()


def test_films_of_all_classes_and_actors_in_turn(crema):
    picked = pick_films(read_crema(crema), most=4)
    assert picked["label"].value_counts().to_dict() == {"Angry": 2, "Happy": 2} and picked.groupby("label")["actor"].nunique().min() == 2
    assert len(pick_films(read_crema(crema), least_agreement=0.8)) == 8
    with pytest.raises(UsageError, match="no film has a label that 90%"): pick_films(read_crema(crema), least_agreement=0.9)


BROKEN = {
    "no count": (lambda t: t.drop(columns="D"), "lacks a column"), "no name": (lambda t: t.drop(columns="fileName"), "lacks a column"),
    "a half vote": (lambda t: t.assign(A="0.5"), "no whole number"), "below nothing": (lambda t: t.assign(A=-1), "below 0"),
    "another name": (lambda t: t.assign(fileName="one"), "names a film 'one'"),
    "a film twice": (lambda t: pd.concat([t, t.iloc[10:11].assign(**{"": "200099"})]), "twice by face"),
    "voices only": (lambda t: t[t[""].str.startswith("1")], "begins with 2"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_table_that_is_another(tmp_path, name):
    change, says = BROKEN[name]
    (tmp_path/TABLE).parent.mkdir()
    change(votes_of(CLIPS)).to_csv(tmp_path/TABLE, index=False)
    with pytest.raises(ArtifactError, match=says): read_crema(tmp_path)


def test_a_clone_without_its_films(tmp_path):
    (tmp_path/"VideoFlash").mkdir()
    with pytest.raises(UsageError, match="holds no films"): find_films(tmp_path)
    (tmp_path/"VideoFlash"/f"{CLIPS[0]}.flv").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UsageError, match="git lfs pull"): find_films(tmp_path)


def test_the_command_leaves_sessions_with_truth_and_a_set_by_actor(crema, tmp_path):
    words = ("adapt", "films", "--data", crema, "--out", tmp_path/"out", "--most", 6, "--detector", "haar")
    command = [sys.executable, "-m", "fer_nb.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "6 films of" in done.stdout and "no film of Disgust" in done.stdout, done.stdout + done.stderr
    films = pd.read_csv(tmp_path/"out"/"collection.csv", dtype=str)
    for clip, label in zip(films["clip"], films["label"]):
        truth, told, _ = truth_of(load_session(tmp_path/"out"/"sessions"/clip))
        assert {CLASSES[k] for k in truth} == {label} and told.startswith("truth.csv")
    assert films.groupby("actor")["part"].nunique().max() == 1 and set(films["part"]) == {"val", "test"}
    assert not load_webcam_set(tmp_path/"out"/"set").frames.empty and not list((tmp_path/"out").rglob("crops*"))
    times = {p: p.stat().st_mtime_ns for p in (tmp_path/"out"/"sessions").rglob("per_frame.csv")}
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert times == {p: p.stat().st_mtime_ns for p in times}  # what was watched is not watched again
    heard = subprocess.run([*command, "--votes", "voice"], capture_output=True, text=True)
    assert heard.returncode == 0, heard.stderr
    for clip in pd.read_csv(tmp_path/"out"/"collection.csv")["clip"]:  # what was kept has the labels that are asked for now
        assert {CLASSES[k] for k in truth_of(load_session(tmp_path/"out"/"sessions"/clip))[0]} == {"Sad"}
    first = next((tmp_path/"out"/"sessions").iterdir())
    (first/"truth.csv").unlink(); (first/"mine.txt").write_text("not a session's")
    other = subprocess.run([*command, "--model", "fer2013"], capture_output=True, text=True)
    assert other.returncode == 1 and "give another folder" in other.stderr
    assert subprocess.run(command, capture_output=True).returncode == 0 and (first/"mine.txt").is_file()
