"""Films and pictures with what was seen in them."""

import csv
import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

from fer_nb.artifacts import UsageError
from fer_nb.capture import SourceLost, SyntheticSource, VideoSource
from fer_nb.detectors import Haar
from fer_nb.painting import framed_face
from fer_nb.sessions import COLUMNS
from fer_nb.written import FilmWriter, predict_film


def fer_nb(*args, cwd):
    return subprocess.run([sys.executable, "-m", "fer_nb.cli", *map(str, args)], capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    "A drawn person, as an uneven film would be cut from 30 frames."
    path, source = tmp_path_factory.mktemp("film")/"in.avi", SyntheticSource(3, 10, seed=3)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (320, 240))
    for frame in iter(source.read, None): writer.write(frame.image)
    writer.release()
    return path


def frames(path):
    source = VideoSource(path)
    found = [f for f in iter(source.read, None)]
    source.close()
    return found


def test_the_command_writes_a_film_and_its_rows(film, tmp_path):
    out = tmp_path/"drawn.mp4"
    drawn = ("--annotate", out, "--consent", "--json", "--out", "answer.json")
    done = fer_nb("predict", "--video", film, "--detector", "haar", *drawn, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    drawn, plain = frames(out), frames(film)
    assert len(drawn) == len(plain) == 30 and drawn[0].image.shape == (480, 640, 3)
    with open(tmp_path/"drawn.csv", newline="", encoding="utf-8") as f: head, *rows = csv.reader(f)
    assert head == COLUMNS["per_frame.csv"] and {int(r[0]) for r in rows} == set(range(30))
    told = json.loads((tmp_path/"answer.json").read_text(encoding="utf-8"))
    assert told["frames"] == 30 and len(told["rows"]) == len(rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answer.json", "drawn.csv", "drawn.mp4"]


@pytest.mark.parametrize("args, words", [
    (("--video", "{film}", "--annotate", "o.mp4"), "--consent"), (("--video", "{film}", "--consent"), "--consent"),
    (("{film}", "--draw", "d"), "--consent"), (("{film}", "--annotate", "o.mp4", "--consent"), "does not go with pictures"),
    (("--video", "{film}", "--draw", "d", "--consent"), "does not go with --video"),
    (("--video", "{film}", "--whole"), "does not go with --video"),
    ((), "give pictures, or one film"), (("{film}", "--video", "{film}"), "give pictures, or one film"),
    (("--video", "0"), "fer-nb demo"), (("--video", "none.mp4"), "doesn't exist"),
    (("--video", "{film}", "--annotate", "o.gif", "--consent"), ".mp4 or .avi"),
    (("--video", "{film}", "--annotate", "{film}", "--consent"), "drawn from")])
def test_what_is_refused_writes_nothing(film, tmp_path, args, words):
    before = film.read_bytes()
    done = fer_nb("predict", *(a.format(film=film) for a in args), cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir()) and film.read_bytes() == before


def test_pictures_are_drawn_into_a_folder_of_their_own(tmp_path):
    for name, k in (("a", 3), ("b", 5)):
        (tmp_path/name).mkdir()
        cv2.imwrite(str(tmp_path/name/"me.png"), framed_face(k, size=150, frame=(240, 320)).image)
    args = "predict", tmp_path/"a", tmp_path/"b", "--detector", "haar", "--csv", "--consent"
    done = fer_nb(*args, "--draw", "drawn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path/"drawn").iterdir()) == ["me.jpg", "me_2.jpg"]
    again = fer_nb(*args, "--draw", "drawn", cwd=tmp_path)
    assert again.returncode == 2 and "not an empty folder" in again.stderr
    assert fer_nb(*args, "--draw", "a", cwd=tmp_path).returncode == 2 and [p.name for p in (tmp_path/"a").iterdir()] == ["me.png"]


@pytest.mark.parametrize("times", [[0, 0.1, 0.2, 0.3], [3, 3.5, 3.6, 4.6], [0, 0.001, 0.002, 1.0], [0, 5]])
def test_a_drawn_film_lasts_as_long_as_its_source(tmp_path, times):
    writer = FilmWriter(tmp_path/"f.avi", 20)
    for k, t in enumerate(times): writer.add(np.full((32, 48, 3), 40*k, np.uint8), t)
    writer.close(times[-1] + 0.25)
    assert len(frames(tmp_path/"f.avi")) == round((times[-1] + 0.25 - times[0])*20)


class Breaks(SyntheticSource):
    def read(self):
        if self.index == 7: raise SourceLost("the film breaks off after frame 7 of 20")
        return super().read()


def test_a_film_that_breaks_off_is_drawn_as_far_as_it_goes(tmp_path):
    lines = []
    found = predict_film(Breaks(2, 10), detector=Haar(60), annotate=tmp_path/"o.avi", consent=True, say=lines.append, progress=False)
    assert found.exit_code == 3 and "breaks off" in lines[-1] and found.labels.total() == 7 and len(frames(tmp_path/"o.avi")) == 7
    assert json.loads(found.to_json())["error"] == found.problem and found.to_df().frame_index.nunique() == 7


class Stops(SyntheticSource):
    def read(self):
        if self.index == 5: raise KeyboardInterrupt
        return super().read()


def test_a_run_that_is_stopped_leaves_no_half_film(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        predict_film(Stops(2, 10), detector=Haar(60), annotate=tmp_path/"o.avi", consent=True, say=print, progress=False)
    assert not list(tmp_path.iterdir())


def test_the_film_is_never_written_over_itself(film, tmp_path):
    with pytest.raises(UsageError, match="drawn from"): predict_film(film, annotate=film.parent/"."/"in.avi", consent=True)
