"""What a person sees: help that teaches, one clear line for each wrong input, and the right exit code."""
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path

import cv2
import nbformat
import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper
from tqdm.auto import tqdm

from fer_nb import cli
from fer_nb.artifacts import CLASSES, GateError, UsageError, write_npz
from fer_nb.calibration import simulate_logits
from fer_nb.deploy import Predictor
from fer_nb.race import Rival, open_rival, race, read_rivals
from fer_nb.runs import run_notebook
from fer_nb.sessions import simulate_session
from fer_nb.synthetic import make_timeline
from fer_nb.training import embedded_data
from tests.conftest import ROOT


def fer_nb(*args, cwd=ROOT):
    done = subprocess.run([sys.executable, "-m", "fer_nb.cli", *map(str, args)], capture_output=True, text=True, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def answered(capsys, *args):
    "What a command answers, in this process: where a module takes seconds to import, it does so once."
    try: code = cli.main([str(a) for a in args])
    except SystemExit as e: code = e.code
    return code, *capsys.readouterr()


def refused(capsys, code, *args, says=()):
    rc, out, err = answered(capsys, *args)
    assert rc == code, err
    assert "started" not in out, out
    lines = [x for x in err.splitlines() if x.strip()]
    assert len(lines) == 1 and lines[0].startswith("fer-nb: "), err
    assert "Traceback" not in err
    for word in says: assert word in lines[0], lines[0]


def test_version_and_help():
    assert fer_nb("--version")[1].strip() == f"fer-nb {metadata.version('fer_nb')}"
    rc, out, _ = fer_nb("--help")
    assert rc == 0
    for word in ("manifest", "run", "gates", "examples:", "exit codes"): assert word in out
    assert "--source" in fer_nb("manifest", "build", "--help")[1]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_flag_has_a_help_that_its_function_tells(name):
    p = cli.Parser()
    cli.COMMANDS[name][2](p)
    assert [a.dest for a in p._actions if not a.help] == []
    p.format_help()


def test_flags_are_what_the_signature_says():
    told = cli.told("manifests.build_manifest")
    assert told["val_fraction"] == ("of training rows; 0 draws none", "float", 0.1, False)
    assert told["sources"].needed and not told["name"].needed
    stage = cli.told("03_teachers")
    assert stage["mixup"].default == 0.0 and "alpha" in stage["mixup"].about and stage["seed"].kind == "int"


@pytest.mark.parametrize("args, says", [
    ((), ["COMMAND"]),
    (("fly",), ["fly"]),
    (("manifest", "build", "--out", "x"), ["--source"]),
    (("manifest", "build", "--source", "fer2013_folder=nowhere/at/all", "--out", "{tmp}"), ["nowhere/at/all"]),
    (("manifest", "build", "--source", "fer2013_folder={empty}", "--out", "{tmp}"), ["empty"]),
    (("manifest", "build", "--source", "fer2014={empty}", "--out", "{tmp}"), ["fer2014", "fer2013_folder", "affectnet"]),
    (("manifest", "build", "--source", "justapath", "--out", "{tmp}"), ["justapath", "="]),
    (("manifest", "validate", "{empty}"), ["manifest"]),
    (("run", "--profile", "embeded"), ["embeded", "did you mean embedded?"]),
    (("run", "--profile", "mine"), ["mine", "embedded", "fer2013"]),
    (("run", "--profile", "fer2013"), ["--data", "fer2013_folder"]),
    (("run", "--profile", "fer2013", "--data", "missing.zip"), ["missing.zip"]),
    (("gates", "no/such/folder"), ["no/such/folder"]),
    (("notebook", "03_teecher", "x.ipynb"), ["03_teecher", "03_teachers"]),
    (("notebook", "03_teachers", "x.ipynb", "-p", "epoch", "3"), ["epoch", "epochs"]),
    (("notebook", "03_teachers", "x.ipynb", "--parameters", "{{"), ["JSON"]),
    (("teacher", "train", "--manifest", "{empty}"), ["--manifest and --cache"]),
    (("teacher", "train", "--out", "{tmp}", "-p", "epoch", "3"), ["epoch", "epochs"]),
    (("teacher", "export", "{empty}"), ["args.json", "is missing"]),
    (("student", "train", "--stage", "XX"), ["XX", "CE", "KD", "DKD"]),
    (("student", "train", "--stage", "KD"), ["KD", "needs soft labels", "--softlabels"]),
    (("student", "train", "--softlabels", "{empty}"), ["CE", "takes no soft labels"]),
    (("student", "train", "--cache", "{empty}"), ["--manifest and --cache"]),
    (("student", "train", "--out", "{tmp}", "-p", "epoch", "3"), ["epoch", "epochs"]),
    (("student", "evaluate", "{empty}", "--manifest", "{empty}", "--cache", "{empty}"), ["best.pt", "is missing"]),
    (("student", "summarise", "{empty}"), ["holds no student run"]),
    (("student", "summarise", "no/such/folder"), ["no/such/folder"]),
    (("ensemble", "search", "{empty}", "--manifest", "{empty}"), ["--out"]),
    (("ensemble", "search", "a", "b", "--manifest", "{empty}", "--out", "{tmp}", "--preset", "six_way"), ["six_way", "four_way"]),
    (("ensemble", "search", "a", "b", "--manifest", "{empty}", "--out", "{tmp}", "--space", "log"), ["log", "probability"]),
    (("tune", "{empty}", "--plot", "{empty}/map.xyz"), ["map.xyz", ".png"]),
    (("tune", "{empty}", "--plot", "no/such/map.png"), ["no/such/map.png", "a folder that exists"]),
    (("ensemble", "evaluate", "{empty}", "--manifest", "{empty}"), ["is missing"]),
    (("adapt",), ["ACTION"]),
    (("adapt", "mine"), ["SESSION"]),
    (("adapt", "mine", "{empty}"), ["holds no per_frame.csv"]),
    (("adapt", "mine", "{empty}", "--most", "-1"), ["'-1'", "from 0 to"]),
    (("adapt", "finetune", "--data", "{empty}"), ["--out"]),
    (("adapt", "finetune", "--data", "no/such/folder", "--out", "{tmp}"), ["no/such/folder"]),
    (("adapt", "finetune", "--data", "{empty}", "--out", "{tmp}", "--manifest", "{empty}"), ["--manifest and --cache"]),
    (("adapt", "finetune", "--data", "{empty}", "--out", "{tmp}", "--mode", "tail"), ["tail", "full, head, norm"]),
    (("adapt", "finetune", "--data", "{empty}", "--out", "{tmp}", "--epochs", "40"), ["40", "at most 10"]),
    (("adapt", "finetune", "--data", "{empty}", "--out", "{tmp}", "--checkpoint", "weights.bin"), ["weights.bin", ".safetensors"]),
    (("adapt", "webcams", "--manifest", "{empty}", "--cache", "{empty}", "--out", "{tmp}", "--left-out", "rain"), ["rain", "motion_blur"]),
    (("adapt", "gate", "--out", "{tmp}"), ["--offline"]),
    (("adapt", "gate", "--offline", "a.npz", "--out", "{tmp}"), ["--offline"]),
    (("adapt", "gate", "--offline", "{empty}", "{empty}", "--out", "{tmp}"), ["evaluation.npz", "is missing"]),
])
def test_wrong_arguments_exit_with_2_and_one_line(tmp_path, capsys, args, says):
    (tmp_path / "empty").mkdir()
    given = [a.format(tmp=tmp_path / "out", empty=tmp_path / "empty") for a in args]
    shut = {"validate", "export", "evaluate"}  # a folder without its artifacts is a shut gate
    expected = 1 if shut & set(args) or "gate" in args and args.count("{empty}") == 2 else 2
    refused(capsys, expected, *given, says=says)
    assert not (tmp_path / "out" / "manifest.parquet").exists()


def test_debug_shows_the_traceback():
    rc, _, err = fer_nb("--debug", "gates", "no/such/folder")
    assert rc != 0 and "Traceback" in err


def test_empty_folder_is_no_pass(tmp_path, capsys):
    refused(capsys, 1, "gates", tmp_path, says=["nothing to judge"])


def test_tune_draws_its_heat_map_where_it_is_asked_to(tmp_path):
    session = shutil.copytree(ROOT/"runs"/"reference"/"fer2013"/"demo"/"first", tmp_path/"first")
    before = {p.name for p in session.iterdir()}
    rc, out, err = fer_nb("tune", session, "--plot", tmp_path/"map.png")
    assert rc == 0 and "macro-F1" in out, err
    assert cv2.imread(str(tmp_path/"map.png")).std() > 10
    assert not any(name.endswith(".png") for name in {p.name for p in session.iterdir()} - before)


def test_mistakes_are_mined_from_sessions(tmp_path):
    for k in range(2): simulate_session(tmp_path/f"s{k}", make_timeline(20, np.random.default_rng(k)), seed=k, skill=1.5)
    rc, out, err = fer_nb("adapt", "mine", tmp_path/"s0", tmp_path/"s1", "--out", tmp_path/"out", "--most", 2)
    assert rc == 0 and "2 sessions" in out, err
    with open(tmp_path/"out"/"hard_samples.csv", newline="", encoding="utf-8") as f: rows = list(csv.DictReader(f))
    assert rows and max(Counter(r["truth"] for r in rows).values()) <= 2


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    "Answers of an incumbent, a better model and one that gave a class up, and their sessions of one film."
    folder, events = tmp_path_factory.mktemp("judged"), make_timeline(60, np.random.default_rng(4))
    z, y = simulate_logits(900, seed=1)
    better, harmful = z + 0.5*np.eye(7)[y], z - 9*(np.arange(7) == 2)
    for name, logits, skill in (("old", z, 2.2), ("better", better, 3.2), ("harmful", harmful, 3.2)):
        write_npz(folder/name/"evaluation.npz", test_logits=logits, test_labels=y, test_ids=np.array([f"drawn/{i}" for i in range(900)]))
        simulate_session(folder/f"{name}_session", events, seed=7, skill=skill)
    return folder


@pytest.mark.parametrize("name, code, verdict", [("better", 0, "PROMOTE"), ("harmful", 1, "REJECT"), ("old", 1, "REJECT")])
def test_the_gate_says_promote_or_reject_with_every_number(judged, tmp_path, name, code, verdict):
    rc, out, err = fer_nb("adapt", "gate", "--offline", judged/"old", judged/name/"evaluation.npz", "--out", tmp_path,
                          "--session", judged/"old_session", judged/f"{name}_session")
    assert rc == code and err == "" and out.startswith(f"{verdict}: {name} in the place of old"), err
    written = json.loads((tmp_path/"dual_gate.json").read_text(encoding="utf-8"))
    assert written["verdict"] == verdict
    (offline,), (live,) = written["offline"], written["replays"]
    for found, keys in ((offline, ("macro_f1", "lowest_three")), (live, ("macro_f1", "raw_macro_f1"))):
        for key in keys:
            for when in ("before", "after"): assert f"{found[f'{key}_{when}']:.4f}" in out
    assert "label changes a minute" in out and "≥ -0.01" in out and "≥ -0.02" in out


def test_the_gate_refuses_what_it_can_not_compare(judged, tmp_path, capsys):
    gate = ("adapt", "gate", "--out", tmp_path/"out")
    z, y = simulate_logits(300, seed=1)
    write_npz(tmp_path/"short"/"evaluation.npz", test_logits=z, test_labels=y)
    write_npz(tmp_path/"wide"/"evaluation.npz", test_logits=z[:, :5], test_labels=y)
    refused(capsys, 1, *gate, "--offline", judged/"old", tmp_path/"short", says=["300 and 900 rows"])
    refused(capsys, 1, *gate, "--offline", judged/"old", tmp_path/"wide", says=["test_logits", "(300, 7)"])
    simulate_session(tmp_path/"other", make_timeline(10, np.random.default_rng(1)))
    refused(capsys, 1, *gate, "--offline", judged/"old", judged/"better", "--session", judged/"old_session", tmp_path/"other",
            says=["not one session"])
    assert not (tmp_path/"out").exists()


def test_start_is_light():
    "Help must not wait for torch."
    code = "import sys, fer_nb.cli as c; c.parser(); sys.exit(any(m in sys.modules for m in ('torch', 'fastai', 'timm', 'papermill')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no Unix sockets: kernels are reached over TCP there")
@pytest.mark.parametrize("folder, transport", [("t", "ipc"), ("a-folder-whose-name-leaves-a-socket-no-room" * 3, "tcp")])
def test_kernels_take_no_port_that_another_could_take_first(tmp_path, monkeypatch, folder, transport):
    asks = nbformat.v4.new_code_cell("from ipykernel.connect import get_connection_info; print(get_connection_info())")
    nbformat.write(nbformat.v4.new_notebook(cells=[asks]), tmp_path / "asks.ipynb")
    (tmp_path / folder).mkdir()
    if transport == "tcp": monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / folder))
    run_notebook(str(tmp_path / "asks.ipynb"), tmp_path / "answer.ipynb")
    answer = json.loads(nbformat.read(tmp_path/"answer.ipynb", 4).cells[0].outputs[0].text)
    assert answer["transport"] == transport
    if transport == "ipc": assert Path(answer["ip"]).is_absolute() and not Path(answer["ip"]).parent.exists()  # one kernel's own, and gone


def test_a_stage_runs_the_run_of_its_notebook_and_another_notebook_whole(tmp_path):
    run_notebook("06a_session_scores", tmp_path/"scores.ipynb")
    cells = nbformat.read(tmp_path/"scores.ipynb", 4).cells
    whole = nbformat.read(ROOT/"nbs"/"06a_session_scores.ipynb", 4).cells
    assert len(cells) < len(whole)/2 and cells[0].source == whole[0].source and "Only the run of `06a_session_scores`" in cells[1].source
    assert all(c.execution_count for c in cells if c.cell_type == "code" and c.source.strip()), "a cell was left out"
    own = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('a story')"),
                                          nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]})],
                                   metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}})
    nbformat.write(own, tmp_path/"own.ipynb")
    run_notebook(str(tmp_path/"own.ipynb"), tmp_path/"done.ipynb", {"x": 2})
    assert nbformat.read(tmp_path/"done.ipynb", 4).cells[0].outputs[0].text == "a story\n"


# --- beside other tools' models


@pytest.mark.parametrize(("wrong", "words"), [
    (["--against", "rivals.yaml"], "--against needs test rows: give --manifest"),
    (["--against", "none.yaml", "--manifest", "m"], "none.yaml: no such file; give a YAML list of models"),
    (["--against", "rivals.yaml", "--manifest", "m"], "must hold a list of models")])
def test_a_race_without_what_it_needs_is_refused_in_one_line(wrong, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"rivals.yaml").write_text("a: 1")
    assert cli.main(["bench", "fer2013", *wrong]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and words in said[0]


@pytest.fixture
def rival(tmp_path):
    "A function that writes another tool's model, which answers any face with these seven numbers and the face's own light."
    def rival(answers, light=0.0, last="Identity", **words):
        weights = numpy_helper.from_array(np.full((48*48, 7), light, np.float32), "w")
        bias = numpy_helper.from_array(np.array([answers], np.float32), "b")
        steps = [("Flatten", ["face"], "flat"), ("MatMul", ["flat", "w"], "lit"), ("Add", ["lit", "b"], "sum"), (last, ["sum"], "out")]
        nodes = [helper.make_node(op, ins, [out]) for op, ins, out in steps]
        shapes = {"face": ["n", 1, 48, 48], "out": ["n", 7]}
        ends = [[helper.make_tensor_value_info(k, TensorProto.FLOAT, shape)] for k, shape in shapes.items()]
        onnx.save(helper.make_model(helper.make_graph(nodes, "other", *ends, [weights, bias]),
                                    opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path/"other.onnx")
        return Rival(name="other", file=str(tmp_path/"other.onnx"), classes=CLASSES, size=48, **words)
    return rival


SURE, BLACK, GREY = [0.94, *[0.01]*6], np.zeros((48, 48), np.uint8), np.full((48, 48), 99, np.uint8)


def test_a_rivals_logits_are_not_taken_for_probabilities(rival):
    assert open_rival(rival(SURE))(GREY).argmax() == 0
    for raw in ([3.1, -1, 0.2, 0, 0, 0, 0], [2.0, *[0.0]*6], [0.5, *[0.0]*6], [1.1, -0.1, *[0.0]*5]):
        with pytest.raises(GateError, match=r"^other: answers a face .* are no probabilities: give gives: logits$"): open_rival(rival(raw))
        assert np.exp(open_rival(rival(raw, gives="logits"))(GREY)).sum() == pytest.approx(1)
    open_rival(rival([0.9405, *[0.0105]*5, -0.0005]))  # rounded by eight bits
    ask = open_rival(rival(SURE, light=1e-3))  # a black face's answer is right
    with pytest.raises(GateError, match="give gives: logits"): ask(GREY)


def test_a_rival_that_answers_with_no_number_is_named(rival):
    for raw in ([np.nan]*7, [np.inf, *[0.0]*6], [-np.inf, np.inf, *[0.0]*5]):
        for gives in ("logits", "probabilities"):
            with pytest.raises(GateError, match=r"^other: answers a face with (nan|inf|-inf), which is no number: look at scale"):
                open_rival(rival(raw, gives=gives))
    ask = open_rival(rival(np.ones(7), light=-1e-3, last="Log", gives="logits"))  # the logarithm of what is below 0 for all but dark faces
    assert np.isfinite(ask(BLACK)).all()
    with pytest.raises(GateError, match="other: answers a face with nan"): ask(GREY)


def test_a_race_is_refused_before_anybody_has_answered_every_row(rival, tmp_path, monkeypatch):
    manifest_dir, _ = embedded_data(tmp_path/"data", n=80, seed=4)
    rival(SURE, light=1e-3)
    (tmp_path/"rivals.yaml").write_text(yaml.safe_dump([{"name": "other", "file": "other.onnx", "classes": list(CLASSES), "size": 48}]))
    asked = []
    class Counted(Predictor):
        def __call__(self, pictures, *args, **kwargs):
            asked.append(len(pictures))
            return super().__call__(pictures, *args, **kwargs)
    monkeypatch.setattr("fer_nb.race.Predictor", Counted)
    with pytest.raises(GateError, match="^other: .* give gives: logits"):
        race(["fer2013"], tmp_path/"rivals.yaml", manifest_dir, convention="synthetic", progress=False)
    assert sum(asked) <= 8


@pytest.mark.parametrize(("words", "told"), [
    ("scale: .nan", "scale Input should be a finite number"), ("scale: .inf", "scale Input should be a finite number"),
    ("scale: 0", "scale is 0: every face would look the same"), ("shift: -.inf", "shift Input should be a finite number")])
def test_a_list_of_models_has_numbers_that_a_pixel_can_be_scaled_by(words, told, tmp_path):
    (tmp_path/"m.onnx").write_bytes(b"")
    (tmp_path/"rivals.yaml").write_text(f"[{{name: a, file: m.onnx, size: 48, classes: [{', '.join(CLASSES)}], {words}}}]")
    with pytest.raises(UsageError, match=f"rivals.yaml: model 1: {told}"): read_rivals(tmp_path/"rivals.yaml")


@pytest.mark.parametrize("terminal", [False, True])
def test_bench_draws_its_bar_in_a_terminal_alone(terminal, tmp_path, monkeypatch):
    hidden = []
    def drawn(*args, disable=False, delay=0, **kwargs):
        hidden.append(disable)
        return tqdm(*args, disable=True, **kwargs)
    monkeypatch.setattr("fer_nb.timing.tqdm", drawn)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    assert cli.main(["bench", "fer2013", "--runs", "1", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert hidden == [not terminal]
