"""The webcam cell: what ends a session, the browser's part in a real browser, and the whole cell in JupyterLab and as a page."""
import contextlib
import json
import os
import re
import shutil
import socket
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import pandas as pd
import pytest

from fer_nb import page, widget
from fer_nb.artifacts import CLASSES, FerError, GateError, UsageError
from fer_nb.browser import STATIC, Camera, LabelBar, Picture, as_jpeg
from fer_nb.capture import SyntheticSource
from fer_nb.detectors import Haar
from fer_nb.evidence import SessionInfo
from fer_nb.page import cell_notebook
from fer_nb.runner import Runner
from fer_nb.widget import WebcamCell
from tests.conftest import picture

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = {"per_frame.csv", "latency.csv", "tuning.csv", "events.csv", "session.json", "thresholds.json", "logit_bias.json"}
CHROMIUM = os.environ.get("FER_NB_CHROMIUM") or next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge"))), None)


def until(true, seconds=60, what="it"):
    "Wait until something is so."
    end = time.monotonic() + seconds
    while not (answer := true()):
        assert time.monotonic() < end, f"{what} takes longer than {seconds} s"
        time.sleep(0.05)
    return answer


def rows(folder, name="per_frame.csv"): return pd.read_csv(Path(folder)/name, keep_default_na=False)


def cell_of(demo_model, tmp_path, source="synthetic:3", **more):
    return WebcamCell(demo_model, source, Haar(min_face=60), tmp_path/"demo", **more)


# The session, without a browser


def test_it_needs_no_torch():
    heavy = {"torch", "fastai", "timm", "onnx", "nbformat", "playwright", "voila"}
    code = f"import sys, fer_nb.widget; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_session_in_its_thread_leaves_the_kernel_free_and_writes_numbers_only(demo_model, tmp_path):
    cell = cell_of(demo_model, tmp_path, "synthetic:20")
    cell.start()
    until(lambda: len(cell.runner.pipeline.log.times) > 8)
    cell.press("4")
    cell.sliders["delta"].value = 0.2
    until(lambda: cell.labels.hand == 4)
    seen = len(cell.runner.pipeline.log.times)
    until(lambda: len(cell.runner.pipeline.log.times) > seen + 5)
    cell.end()
    frames, tuning = rows(cell.folder), rows(cell.folder, "tuning.csv")
    assert {"", "Happy"} == set(frames.manual_label)
    assert tuning[["name", "value"]].values.tolist() == [["delta", 0.2]]
    assert {p.name for p in cell.folder.rglob("*")} == WRITTEN | {"truth.csv"}
    assert not any(thread.name == "fer_nb session" for thread in threading.enumerate())


def test_a_cameras_vote_is_by_seconds_and_its_sliders_say_so(demo_model, tmp_path):
    film, camera = cell_of(demo_model, tmp_path/"film"), cell_of(demo_model, tmp_path/"page", "browser")
    assert [film.sliders[k].description for k in ("window", "min_count")] == ["Window, frames", "Votes, frames"]
    assert [camera.sliders[k].description for k in ("window", "min_count")] == ["Window, seconds", "Votes, seconds"]
    assert [round(camera.sliders[k].value, 2) for k in ("window", "min_count")] == [0.5, 0.27]
    asked = cell_of(demo_model, tmp_path/"asked", vote_by="seconds")
    asked.sliders["window"].value = 0.8
    asked.run(3)
    asked.press("b")
    assert round(asked.sliders["window"].value, 2) == 0.83
    asked.sliders["min_count"].value = 0.4
    asked.run(2)
    asked.end()
    settings = SessionInfo.load(asked.folder).settings
    assert (settings["vote_by"], settings["window"], settings["min_count"]) == ("seconds", 24, 8)
    assert rows(asked.folder, "tuning.csv")[["name", "value"]].values.tolist() == [["window", 25], ["min_count", 12]]


def test_the_readout_says_what_is_coming_in_words_and_never_as_markup():
    said = widget.readout_html("Happy", coming="<Surprise>")
    assert "→ &lt;Surprise&gt;?" in said and "fer-coming" not in widget.readout_html("Happy")


def test_the_headline_changes_with_its_frame_and_the_bars_five_times_a_second(demo_model, tmp_path):
    cell = cell_of(demo_model, tmp_path)
    cell.run(1)
    seen, result = [], cell.runner.player.result
    cell.readout.observe(lambda change: seen.append(change.new), "value")
    cell.refreshed = time.monotonic() + 100  # the bars wait
    for label, coming in (("Happy", ""), ("Happy", ""), ("Happy", "Sad"), ("Sad", "")):
        cell._refresh(replace(result, label=label, coming=coming))
        cell.refreshed = time.monotonic() + 100
    assert ["→ Sad?" in x for x in seen] == [False, True, False]


class Uneven(SyntheticSource):
    "A film whose frames stay for these seconds."
    stays = (0.05, 0.05, 0.4, 0.05, 0.05)
    def lasts(self): return self.stays[self.index - 1]


def test_each_frame_of_a_video_stays_for_as_long_as_it_lasts(demo_model, tmp_path):
    cell, shown = cell_of(demo_model, tmp_path), []
    cell.start(thread=False)
    source = Uneven(0.25, 20)
    cell.runner.pipeline.source = source
    cell.runner.shown = lambda result: shown.append((result.index, time.perf_counter()))
    cell.runner.start()
    until(lambda: len(shown) == 5)
    cell.end()
    steps = np.diff([t for _, t in shown])
    assert [k for k, _ in shown] == list(range(5)) and steps[2] > 0.35 and max(*steps[:2], steps[3]) < 0.3


def test_a_key_while_a_frame_stays_doesnt_hurry_the_video(demo_model, tmp_path):
    cell, shown = cell_of(demo_model, tmp_path), []
    cell.start(thread=False)
    cell.runner.pipeline.source = source = Uneven(0.25, 20)
    source.stays = (1.2, 0.05, 0.05, 0.05, 0.05)
    cell.runner.shown = lambda result: shown.append(time.perf_counter())
    cell.runner.start()
    until(lambda: shown)
    cell.press("4")
    until(lambda: len(shown) == 2)
    cell.end()
    assert shown[1] - shown[0] > 1.1 and rows(cell.folder).manual_label.tolist()[1] == "Happy"


CASES = ROOT.parent/"shared"/"cases"/"videos"


@pytest.mark.parametrize("name", ["recorder.webm", "raw.h264"])
def test_a_video_that_tells_no_length_can_be_run_and_sought(demo_model, tmp_path, name):
    if not (CASES/name).is_file(): pytest.skip(f"the film {name} is not at hand")
    cell = cell_of(demo_model, tmp_path, str(CASES/name))
    cell.run(20)
    assert ("holds no times" in cell.status.value) == (name == "raw.h264")
    cell.seek.value = 5
    assert cell.runner.player.result.index == 5
    cell.run(100)
    cell._refresh(cell.runner.player.result, whole=True)
    assert cell.seek.max == cell.seek.value == 105 and "105" not in cell.strip.value
    cell.end()
    assert rows(cell.folder).frame_index.unique().tolist() == list(range(106))


def test_an_error_nobody_thought_of_is_one_line_and_keeps_the_log(demo_model, tmp_path, monkeypatch):
    cell = cell_of(demo_model, tmp_path)
    inner, calls = cell.detector.detect, []
    def detect(frame):
        calls.append(1)
        if len(calls) > 5: raise ZeroDivisionError("division\nby zero")
        return inner(frame)
    cell.detector.detect = detect
    cell.start()
    cell.runner.thread.join(60)
    assert "ZeroDivisionError: division by zero" in cell.status.value and "data-kind='bad'" in cell.status.value
    assert isinstance(cell.runner.error, ZeroDivisionError)
    assert SessionInfo.load(cell.folder).frames == len(rows(cell.folder).frame_index.unique()) == 5
    cell.start()  # and the cell is good for another one
    assert not cell.runner.closed
    cell.end()


def test_a_full_disk_ends_with_one_line(demo_model, tmp_path, monkeypatch):
    cell = cell_of(demo_model, tmp_path)
    cell.start(thread=False)
    cell.run(3)
    class Full:
        def writerow(self, row): raise OSError(28, "No space left on device")
    cell.runner.pipeline.log.rows["per_frame.csv"] = Full()
    cell.run(3)
    assert cell.runner.closed and "No space left on device" in cell.status.value and "\n" not in cell.status.value


def test_a_page_that_falls_silent_ends_the_session_unless_it_is_paused(demo_model, tmp_path):
    cell = cell_of(demo_model, tmp_path, "synthetic:20")
    cell.patience = 0.3
    cell.start()
    until(lambda: cell.runner.player.result)
    time.sleep(0.5)
    assert not cell.runner.closed  # no page was ever heard of: a script may run it
    cell.pause()
    cell.picture._handle_custom_msg({"kind": "seen", "index": 1}, [])
    time.sleep(0.6)
    assert not cell.runner.closed
    cell.start()
    cell.runner.thread.join(60)
    assert SessionInfo.load(cell.folder).end_reason == "the page was closed"


def test_a_cell_that_starts_once_more_ends_the_other_one_s_session(demo_model, tmp_path):
    first = cell_of(demo_model, tmp_path)
    first.run(1)
    second = cell_of(demo_model, tmp_path)
    second.run(1)
    first.run(1)  # its page is still there, and somebody presses New session
    assert [c.runner.closed for c in (first, second)] == [False, True]
    assert SessionInfo.load(second.folder).end_reason == "another cell was started"
    widget.end_earlier()
    assert first.runner.closed


def test_pictures_go_as_messages_and_are_gone_at_the_end(demo_model, tmp_path):
    cell = cell_of(demo_model, tmp_path)
    sent = []
    cell.picture.send = lambda content, buffers=None: sent.append((content["kind"], buffers))
    cell.run(3)
    cell.end()
    assert [kind for kind, _ in sent][-1] == "blank" and "picture" in [kind for kind, _ in sent]
    for part in (cell, *cell.children, cell.picture, cell.readout):
        assert not any(isinstance(v, (bytes, memoryview)) for v in part.get_state().values())


def test_pictures_are_kept_only_with_both_switches(demo_model, tmp_path):
    cell = cell_of(demo_model, tmp_path, save_clips=True)
    cell.start()
    assert "consent" in cell.status.value and cell.runner is None and not (tmp_path/"demo").exists()
    cell = cell_of(demo_model, tmp_path, save_clips=True, consent=True)
    assert any("PICTURES ARE STORED" in getattr(c, "value", "") for c in cell.children)
    cell.run(3)
    cell.end()
    assert [p.suffix for p in cell.folder.rglob("*.avi")] == [".avi"]


def test_sessions_never_share_a_folder(demo_model, tmp_path, monkeypatch):
    monkeypatch.setattr(widget.time, "strftime", lambda f: "20260101-000000")
    cell, names = cell_of(demo_model, tmp_path), []
    for _ in range(3):
        cell.run(1)
        cell.end()
        names.append(cell.folder.name)
    assert names == ["20260101-000000", "20260101-000000_1", "20260101-000000_2"]


def test_what_is_wrong_is_said_before_anything_opens(demo_model, tmp_path):
    with pytest.raises(FerError, match=r"none\.onnx: is missing"): WebcamCell(tmp_path/"none.onnx")
    with pytest.raises(UsageError, match="no detector 'harr'"): WebcamCell(demo_model, "synthetic", "harr")
    with pytest.raises(UsageError, match="ema is 2"): cell_of(demo_model, tmp_path, ema=2)
    with pytest.raises(TypeError, match="emma"): cell_of(demo_model, tmp_path, emma=0.5)
    assert not (tmp_path/"demo").exists()


def test_a_camera_that_goes_off_pauses_and_one_that_lies_ends(demo_model, tmp_path):
    cell = cell_of(demo_model, tmp_path, "browser")
    cell.start()
    film = SyntheticSource(1)
    def send(k, data): cell.camera._handle_custom_msg({"kind": "frame", "page": 1, "index": k, "time": 50*k}, [data])
    send(1, as_jpeg(film.read().image))
    until(lambda: cell.runner.player.result)
    cell.camera.set_state({"running": False, "state": "ended", "message": "The camera went away."})  # as the page does it
    until(lambda: "Paused" in cell.status.value)
    assert cell.play.description == "Continue" and not cell.runner.closed
    cell.start()
    assert cell.camera.running
    send(2, b"\xff\xd8 no picture")
    cell.runner.thread.join(60)
    assert "no whole JPEG" in cell.status.value and len(rows(cell.folder)) == 1 and not cell.camera.running


def test_messages_of_no_known_kind_change_nothing():
    camera, bar, shown = Camera(), LabelBar(), Picture()
    for content in ({}, {"kind": "frame"}, {"kind": "key"}, {"kind": "key", "key": "rm"}, {"kind": "key", "key": ""}, {"kind": "seen"}):
        for part in (camera, bar): part._handle_custom_msg(content, [])
    shown._handle_custom_msg({"kind": "seen", "index": 10**9}, [])
    assert camera.take() is None and camera.received == 0 and shown.seen == 0


def test_wishes_are_granted_between_frames_in_the_session_s_thread(demo_model, tmp_path):
    cell = cell_of(demo_model, tmp_path, "synthetic:20")
    cell.start()
    where = []
    for _ in range(50): cell.runner.ask(lambda: where.append(threading.current_thread().name))
    until(lambda: len(where) == 50)
    assert set(where) == {"fer_nb session"}
    def wrong(): raise UsageError("no label to cut at frame 3")
    cell.runner.ask(wrong)
    until(lambda: "no label to cut" in cell.status.value)
    assert not cell.runner.closed
    cell.end()
    assert isinstance(cell.runner, Runner) and cell.runner.closed


def test_serving_is_refused_in_a_line(demo_model, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="doesn't exist"): page.serve_cell(demo_model, tmp_path/"none.mp4")
    monkeypatch.setattr(page, "VOILA", ("--no-such-flag=1",))
    monkeypatch.setattr(page.sys, "executable", shutil.which("false"))
    with pytest.raises(GateError, match="Voilà has ended"): page.serve_cell(demo_model, "synthetic", out=tmp_path, show=False)


# Scripts and styles


def bare(text: str, javascript: bool) -> str:
    "A script or a style without its comments, strings and templates' words; what stands in `${…}` of a template stays out, too."
    parts = [r"/\*.*?\*/", r'"(?:\\.|[^"\\\n])*"', *([r"//[^\n]*", r"`(?:\\.|[^`\\])*`"] if javascript else [])]
    return re.sub("|".join(parts), "", text, flags=re.DOTALL)


@pytest.mark.parametrize("path", sorted(p for p in STATIC.iterdir() if p.suffix in (".css", ".js")), ids=lambda p: p.name)
def test_scripts_and_styles_are_well_formed(path, tmp_path):
    "Brackets close in the order in which they open, and node, where it is at hand, can parse a script."
    text, script = path.read_text(encoding="utf-8"), path.suffix == ".js"
    assert text.endswith("}\n") or text.endswith(";\n")
    for n, line in enumerate(text.splitlines(), 1): assert len(line) <= 140 and line == line.rstrip() and "\t" not in line, f"line {n}"
    rest, ends = bare(text, script), []
    for c in rest:
        if c in "([{": ends.append(")]}"["([{".index(c)])
        elif c in ")]}": assert ends and ends.pop() == c, f"a {c} that closes nothing"
    assert not ends and not re.search(r"[\"'`]", rest), "a bracket or a string is left open"
    if not script: return
    assert not re.search(r"\bvar\b|console\.|debugger|[^=!]==[^=]|!=[^=]|\beval\b", rest)
    assert re.search(r"^export default \{.*\brender\};$", text, re.MULTILINE)
    if node := shutil.which("node"):
        module = shutil.copy(path, tmp_path/"script.mjs")
        said = subprocess.run([node, "--check", module], capture_output=True, text=True, timeout=60)
        assert said.returncode == 0, said.stderr


def test_scripts_and_styles_come_with_the_package():
    assert {".js", ".css"} <= {p.suffix for p in STATIC.iterdir()} and '"static/*"' in (ROOT/"setup.py").read_text()
    for part in (Camera, LabelBar, Picture):
        there = part()
        assert "export default" in there._esm and there._css.startswith(".fer-")


# In a browser


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    "What the fake camera sees: a drawn person, as Motion JPEG."
    path = tmp_path_factory.mktemp("camera")/"film.mjpeg"
    drawn = SyntheticSource(2, 10, (640, 480), seed=8)
    with open(path, "wb") as f:
        while frame := drawn.read(): f.write(as_jpeg(frame.image, quality=90))
    return path


def test_haar_finds_the_person_before_the_fake_camera(film):
    pictures = [np.frombuffer(b"\xff\xd8\xff" + part, np.uint8) for part in film.read_bytes().split(b"\xff\xd8\xff")[1:]]
    found = [bool(Haar().detect(cv2.imdecode(p, cv2.IMREAD_COLOR))) for p in pictures]
    assert len(found) == 20 and sum(found) >= 18


@pytest.fixture(scope="module")
def chromium(film):
    "A headless browser with a fake camera."
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if not CHROMIUM: pytest.skip("no Chromium, Chrome or Edge on this machine: install one, or name it in FER_NB_CHROMIUM")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--use-fake-device-for-media-stream",
             f"--use-file-for-fake-video-capture={film}"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(chromium, permissions=("camera",)):
    "An empty page, which has to end without errors of its own."
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, permissions=list(permissions))
    context.set_default_timeout(120_000)  # a limit for what hangs: a slow machine is no failure
    page, errors = context.new_page(), []
    page.on("pageerror", lambda e: errors.append(str(e)))
    try:
        yield page
        assert not errors, errors
    except BaseException:
        if shots := os.environ.get("FER_NB_SHOTS"): page.screenshot(path=f"{shots}/{int(time.time())}.png")  # for whoever looks why
        raise
    finally: context.close()


FAKE_MODEL = """
async ([code, state]) => {
  const listeners = {}, sent = [], original = navigator.mediaDevices?.getUserMedia.bind(navigator.mediaDevices);
  window.model = {
    sent, state, answer: true, streams: [], get: k => state[k],
    set(k, v) { if (state[k] !== v) { state[k] = v; this.fire(`change:${k}`); } },
    save_changes() {},
    on(name, f) { (listeners[name] ??= []).push(f); },
    off() {},
    fire(name, ...more) { (listeners[name] ?? []).forEach(f => f(...more)); },
    send(content, callbacks, buffers) {
      sent.push({...content, bytes: buffers?.[0].byteLength});
      if (this.answer) setTimeout(() => this.fire("msg:custom", {kind: "ack", through: content.index}), 5);
    },
  };
  if (original) navigator.mediaDevices.getUserMedia = async wishes => {
    if (window.refusal) throw new DOMException("", window.refusal);
    const stream = await original(wishes);
    window.model.streams.push(stream);
    if (window.slowly) await window.slowly;
    return stream;
  };
  const widget = (await import(URL.createObjectURL(new Blob([code], {type: "text/javascript"})))).default;
  const el = document.body.appendChild(document.createElement("div"));
  window.tidy = [widget.initialize?.({model: window.model}), widget.render({model: window.model, el})];
}
"""


def load(page, part, origin="http://localhost", **state):
    "Show a widget's browser side alone, before a model that only listens."
    page.route("**/*", lambda route: route.fulfill(content_type="text/html", body="<!doctype html><body></body>"))
    page.goto(f"{origin}/")
    values = {k: v for k, v in part.get_state().items() if not k.startswith("_") and isinstance(v, (bool, int, float, str, list))}
    page.evaluate(FAKE_MODEL, [part._esm, values | state])


def value(page, name): return page.evaluate(f"model.get('{name}')")
def becomes(page, state):
    "Wait for a state; where it does not come, say what stands instead."
    try: page.wait_for_function(f"model.get('state') === '{state}'")
    except Exception as e: pytest.fail(f"waited for {state}, there is {value(page, 'state')}: {value(page, 'message')} {type(e).__name__}")


def live(page): return page.evaluate("model.streams.flatMap(s => s.getTracks()).filter(t => t.readyState === 'live').length")


def test_the_camera_sends_no_more_than_the_kernel_takes(chromium):
    with opened(chromium) as page:
        load(page, Camera(fps=20))
        page.click("button")
        page.wait_for_function("model.sent.length > 20")
        sent = page.evaluate("model.sent")
        assert value(page, "state") == "live" and "Camera on: 640×480" in page.inner_text(".words")
        rate = (len(sent) - 1)/(sent[-1]["time"] - sent[0]["time"])*1000
        assert 3 < rate < 22, rate
        assert [m["index"] for m in sent] == list(range(1, len(sent) + 1)) and min(m["bytes"] for m in sent) > 2000
        page.evaluate("model.answer = false")
        page.wait_for_timeout(700)
        stuck = page.evaluate("model.sent.length")
        page.wait_for_timeout(700)
        assert page.evaluate("model.sent.length") == stuck  # two wait for the kernel: no third one is sent
        page.evaluate("model.answer = true; model.fire('msg:custom', {kind: 'ack', through: model.sent.length})")
        page.wait_for_function(f"model.sent.length > {stuck + 3}")
        page.click("button")
        assert live(page) == 0 and value(page, "state") == "off"


@pytest.mark.parametrize("error,state,words", [
    ("NotFoundError", "absent", "No camera was found"), ("NotReadableError", "taken", "another program may be using it"),
    ("AbortError", "failed", "could not be opened: AbortError")])
def test_a_camera_that_does_not_open_says_why(chromium, error, state, words):
    with opened(chromium) as page:
        load(page, Camera())
        page.evaluate(f"window.refusal = '{error}'")
        page.click("button")
        page.wait_for_function(f"model.get('state') === '{state}'")
        assert words in page.inner_text(".words") and not value(page, "running") and page.inner_text("button") == "Start the camera"


def test_a_refusal_and_plain_http_are_explained(chromium):
    with opened(chromium, permissions=()) as page:
        load(page, Camera())
        page.click("button")
        becomes(page, "refused")
        assert "was not allowed to use the camera" in page.inner_text(".words")
    with opened(chromium) as page:
        load(page, Camera(), origin="http://notebooks.example")
        page.click("button")
        assert value(page, "state") == "insecure" and "ssh -L" in page.inner_text(".words")


def test_the_camera_never_films_for_nobody(chromium):
    with opened(chromium) as page:
        load(page, Camera())
        page.evaluate("void (window.slowly = new Promise(f => { window.go = f; }))")
        page.click("button")  # asked ...
        page.wait_for_function("model.streams.length === 1")
        page.click("button")  # ... and stopped before the answer came
        page.evaluate("go()")
        page.wait_for_function("model.streams[0].getTracks()[0].readyState === 'ended'")
        assert value(page, "state") == "off"
        page.evaluate("window.slowly = null")
        page.click("button")
        page.wait_for_function("model.sent.length > 0")
        page.evaluate("model.streams.at(-1).getTracks()[0].dispatchEvent(new Event('ended'))")  # unplugged
        assert value(page, "state") == "ended" and live(page) == 0
        page.evaluate("model.answer = false; const now = performance.now.bind(performance); window.later = 0; "
                      "performance.now = () => now() + window.later")
        before = page.evaluate("model.sent.length")
        page.click("button")
        becomes(page, "live")
        page.wait_for_function(f"model.sent.length > {before}")  # a picture is on its way, and nobody will answer
        page.evaluate("window.later = 31000")
        becomes(page, "silent")
        assert live(page) == 0 and "not answered for 30 s" in page.inner_text(".words")
        page.evaluate("const play = HTMLMediaElement.prototype.play; HTMLMediaElement.prototype.play = async function () {"
                      " await new Promise(f => setTimeout(f, 1500)); return play.call(this); }; null")
        page.click("button")  # the camera takes its time, and the pictures from before are still unanswered
        becomes(page, "live")
        page.evaluate("tidy.forEach(f => f?.())")  # the widget is taken away
        assert live(page) == 0


def test_keys_of_the_cell_are_caught_before_the_notebook_and_no_others(chromium):
    with opened(chromium) as page:
        load(page, LabelBar())
        page.evaluate("window.heard = []; document.addEventListener('keydown', e => heard.push(e.key), true); "
                      "document.body.insertAdjacentHTML('beforeend', '<input>')")
        page.focus("button[data-label='1']")
        for key in ("3", "x", "d", "Control+s", "]", "Enter"): page.keyboard.press(key)
        page.focus("input")
        page.keyboard.press("5")
        assert [m["key"] for m in page.evaluate("model.sent")] == ["3", "]", "1"]  # Enter presses the button that has the focus
        assert page.evaluate("heard") == ["Control", "s", "Enter", "5"]
        page.evaluate("model.set('hand', 3); model.set('shown', 6)")
        for which, label in (("[aria-pressed=true]", "3"), (".shown", "6")):
            assert page.get_attribute(f"button{which}", "data-label") == label


def test_the_picture_is_shown_acknowledged_and_forgotten(chromium):
    with opened(chromium) as page:
        load(page, Picture())
        data = list(as_jpeg(picture(3, 64, colour=True)))
        page.evaluate("data => [1, 2].forEach(i => model.fire('msg:custom', {kind: 'picture', index: i}, [new Uint8Array(data)]))", data)
        page.wait_for_function("model.sent.some(m => m.kind === 'seen' && m.index === 2)")
        page.wait_for_function("document.querySelector('img').naturalWidth === 64")
        page.evaluate("model.fire('msg:custom', {kind: 'blank'}, [])")
        assert page.is_visible(".blank") and page.evaluate("document.querySelector('img').getAttribute('src')") is None


# In JupyterLab, and as a page


def ended(process, how=signal.SIGTERM):
    "Stop a server that this test has started."
    process.send_signal(how)
    try: process.wait(40)
    except subprocess.TimeoutExpired: process.kill()


@pytest.fixture
def lab(tmp_path):
    "JupyterLab on a free port, with a folder and settings of its own: (its address, its token)."
    own = {f"JUPYTER_{k}_DIR": str(tmp_path/".own"/k) for k in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{k}_DIR": str(tmp_path/".own"/k) for k in ("SETTINGS", "WORKSPACES")}
    own["IPYTHONDIR"] = str(tmp_path/".own"/"ipython")
    news = tmp_path/".own"/"SETTINGS"/"@jupyterlab"/"apputils-extension"/"notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    token = "a-token-of-this-test"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path}", "--LabApp.expose_app_in_browser=True"]
    with open(tmp_path/"lab.log", "w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **own, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    def answers():
        assert process.poll() is None, (tmp_path/"lab.log").read_text()[-2000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/api", timeout=2): return True
    try:
        until(answers, 120, "JupyterLab's start")
        yield f"http://localhost:{port}", token
    finally: ended(process)


def open_notebook(page, lab, name):
    "Show a notebook and run it."
    url, token = lab
    page.goto(f"{url}/lab/tree/{name}?token={token}")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
    page.evaluate("async () => { const { context, sessionContext } = jupyterapp.shell.currentWidget;"
                  " await context.ready; await sessionContext.ready; await sessionContext.session.kernel.info; }")
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=120_000)
    page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_selector(".fer-labels button", timeout=120_000)


def logged(page) -> int:
    "Frames in the log, as the status line has it."
    words = page.inner_text(".fer-status").split(" frames logged")[0].split()
    return int(words[-1]) if words and words[-1].isdigit() else 0


def start_camera(page, frames=10):
    page.click("button:has-text('Start')")
    until(lambda: logged(page) >= frames, 120, "the first frames")


@pytest.mark.timeout(600)
def test_a_session_in_jupyterlab(chromium, lab, demo_model, tmp_path):
    shutil.copy(demo_model, tmp_path/"model.onnx")
    code = "from fer_nb.widget import WebcamCell\ncell = WebcamCell('model.onnx', detector='haar', out='demo')\ncell"
    (tmp_path/"nb.ipynb").write_text(json.dumps(cell_notebook(code)))
    with opened(chromium) as page:
        open_notebook(page, lab, "nb.ipynb")
        assert "no picture is stored" in page.inner_text(".fer-privacy") and page.is_visible(".fer-picture .blank")
        assert not (tmp_path/"demo").exists()  # nothing begins, and no camera goes on, before Start
        start_camera(page)
        page.wait_for_selector(".fer-picture img[src^=blob]")
        assert "Camera on: 640×480" in page.inner_text(".fer-camera .words")

        page.click(".fer-labels button[data-label='4']")  # Happy, on the bar
        page.wait_for_selector(".fer-labels button[data-label='4'][aria-pressed=true]")
        seen = logged(page)
        until(lambda: logged(page) > seen + 1, what="frames under that label")
        page.locator(".fer-cell .noUi-handle").first.focus()  # EMA
        for _ in range(3): page.keyboard.press("ArrowRight")
        until(lambda: "0.73" in page.inner_text(".fer-cell .widget-slider >> nth=0"), what="the slider")
        page.click(".fer-picture")
        for key in ("5", "x", "b"): page.keyboard.press(key)  # Sad; a key of JupyterLab's; the vote's window longer
        page.wait_for_selector(".fer-labels button[data-label='5'][aria-pressed=true]")
        seen = logged(page)
        until(lambda: logged(page) > seen + 5, what="more frames")
        assert page.locator(".jp-Cell").count() == 1 and "0.73" in page.inner_text(".fer-cell .widget-slider >> nth=0")

        page.keyboard.press(" ")
        page.wait_for_selector(".fer-camera[data-state=off]")
        page.wait_for_selector(".fer-status:has-text('Paused: the camera is off')")
        page.click("button:has-text('Continue')")
        page.wait_for_selector(".fer-camera[data-state=live]")
        page.click("button:has-text('End session')")
        page.wait_for_selector(".fer-status:has-text('The session has ended: ended by hand')")
        assert page.is_visible(".fer-picture .blank") and page.locator(".fer-camera[data-state=off]").count() == 1
        page.evaluate("void jupyterapp.commands.execute('docmanager:save')")
        page.wait_for_function("!document.querySelector('.jp-mod-dirty')")

    [session] = (tmp_path/"demo").iterdir()
    frames, tuning, events = rows(session), rows(session, "tuning.csv"), rows(session, "events.csv")
    assert list(dict.fromkeys(frames.manual_label)) == ["", "Happy", "Sad"]
    assert [label for label in events[events.source == "manual"].label] == ["Happy", "Sad"]
    changed = {name: group.value.tolist() for name, group in tuning.groupby("name")}
    assert list(changed) == ["ema", "window"] and changed["window"] == [16]
    assert changed["ema"][-1] == pytest.approx(0.73)  # of changes in quick succession the page may send the last alone
    assert frames.time_sec[0] == 0 and frames.time_sec.is_monotonic_increasing and set(frames.detector) == {"haar"}
    assert (frames.box != "").mean() > 0.8 and set(frames.pred_label) & set(CLASSES)
    info = SessionInfo.load(session)
    assert (info.source, info.end_reason, info.images_written) == ("pushed", "ended by hand", False)
    assert info.frames == len(frames.frame_index.unique())
    assert {p.name for p in session.rglob("*")} == WRITTEN
    saved = json.loads((tmp_path/"nb.ipynb").read_text())
    assert "widgets" not in saved["metadata"] and "image/" not in json.dumps(saved["cells"])
    assert not [p for p in tmp_path.rglob("*") if p.suffix in {".jpg", ".jpeg", ".png", ".avi", ".mp4", ".webp"}]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_session_on_a_page_of_its_own(chromium, demo_model, tmp_path, how):
    pytest.importorskip("voila", reason="Voilà is not installed: pip install voila")
    told = f"{str(demo_model)!r}, detector='haar', out={str(tmp_path/'demo')!r}, show=False"
    code = f"from fer_nb.page import serve_cell; serve_cell({told})"
    process = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=open(tmp_path/"stderr", "w"), text=True,  # noqa: SIM115
                               env={**os.environ, "OMP_NUM_THREADS": "1"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # it may be ignored where tests run
    try:
        url = process.stdout.readline().strip()
        assert "token=" in url
        with urllib.request.urlopen(url.split("?")[0]) as answer: assert "/login" in answer.url  # without the token: no page
        asked = []
        with opened(chromium) as page:
            page.on("request", lambda request: asked.append(request.url))
            page.on("requestfailed", lambda request: asked.remove(request.url))  # what the page is refused never left
            page.goto(url)
            page.wait_for_selector(".fer-labels button", timeout=120_000)
            assert page.inner_text(".fer-cell").count("Window, seconds") == 1
            sign = page.evaluate("getComputedStyle(document.querySelector('.fer-cell i.fa-play'), '::before').content")
            start_camera(page)
            page.click(".fer-labels button[data-label='6']")
            page.wait_for_selector(".fer-labels button[data-label='6'][aria-pressed=true]")
            seen = logged(page)
            until(lambda: logged(page) > seen + 3, what="more frames")
    finally: ended(process, how)
    hosts = {urlsplit(x).hostname for x in asked if x.startswith("http")}
    assert hosts == {"localhost"}, hosts  # nothing is fetched from elsewhere
    assert "▶" in sign
    assert "encrypt" not in (tmp_path/"stderr").read_text().lower()  # no kernel that warns of an open line
    with pytest.raises(OSError): urllib.request.urlopen(url, timeout=2)  # no server is left behind
    [session] = (tmp_path/"demo").iterdir()
    assert "Surprise" in set(rows(session).manual_label)
    assert SessionInfo.load(session).end_reason == "the kernel was shut down"
    assert {p.name for p in session.rglob("*")} == WRITTEN


def test_every_icon_of_the_cell_has_a_sign_of_its_own():
    css = (STATIC/"labels.css").read_text()
    icons = {"play", "pause", "stop", *(icon for _, icon, _ in widget.EDITS.values()), *(icon for icon, _ in widget.MOVES.values())}
    for icon in icons: assert f".fer-cell button i.fa-{icon}::before {{ content:" in css, icon
    assert "url(" not in css and "@import" not in css


def test_the_page_may_fetch_from_this_machine_alone_and_its_kernel_has_no_open_port(tmp_path):
    sources = {s for part in page.POLICY.split("; ") for s in part.split()[1:]}
    assert sources <= {"'self'", "'unsafe-inline'", "'unsafe-eval'", "data:", "blob:", "ws:"}
    assert page.kernel_sockets("/tmp/x") == ["--KernelManager.transport=ipc"]*(os.name == "posix")
    assert page.kernel_sockets("/" + "x"*100) == []
