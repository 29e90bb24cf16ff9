"""The report: what is missing stops it, what changed changes it, nothing is typed, both engines say the same, and it fits a telephone."""
import base64
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from fontTools.ttLib import TTFont

from fer_nb.artifacts import FerError, GateError, UsageError, read_json, write_json, write_text
from fer_nb.cli import main
from fer_nb.material import Material, name_all
from fer_nb.pack import _pandoc, html_page, pdf_page, render_pack, sources, the_last_run, write_sources
from fer_nb.pack_blocks import verdict_zh
from fer_nb.references import NO_BREAK, filled, typed_numbers
from fer_nb.surprises import mixed_sizes, odd_times, odd_verdicts, outside_bars, provenance_surprises, session_surprises

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT/"runs"/"reference"
GPU, OLDER = REFERENCE/"gpu", REFERENCE/"fer2013"
PARTS = ("manifests", "ensembles/four_ferplus", "teachers/LITE0_ferplus", "teachers/LITE2_ferplus", "onnx",
         "students/mobilenetv3_large_100_ferplus_img80_seed1337_KD_from_KD_from_KD_from_KD")
STUDENT = f"{PARTS[-1]}/"
DOT = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")  # a PNG


@pytest.fixture
def run(tmp_path):
    "A small copy of the reference run, to spoil."
    for part in PARTS: shutil.copytree(GPU/part, tmp_path/"run"/part)
    return tmp_path/"run"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "The filled sources of the runs that `make report` names."
    runs = re.search(r"fer-nb report --runs (.+?) --out", (ROOT/"Makefile").read_text(encoding="utf-8"))[1].split()
    return write_sources(Material(*(ROOT/r for r in runs)), tmp_path_factory.mktemp("pack"))


def text_of(run, out):
    "The filled sources; their figures are drawn, and not saved."
    with pytest.MonkeyPatch.context() as p:
        p.setattr("fer_nb.pack_blocks.small_png", lambda fig, dpi=0: DOT)
        return write_sources(Material(run), out).read_text(encoding="utf-8")


@pytest.mark.parametrize("gone", [f"{STUDENT}reliability_metrics.json", f"{STUDENT}calibration.json", f"{STUDENT}hash_manifest.json",
                                  f"{STUDENT}history.json",
                                  "ensembles/four_ferplus/ensemble_metrics.json", "ensembles/four_ferplus/reliability_metrics.json",
                                  "manifests/dataset_index.json",
                                  "manifests/leakage_report.json", "onnx/onnx_parity.json", "onnx/onnx_export_report.json",
                                  "onnx/latency_benchmarks.csv",
                                  "teachers/LITE0_ferplus/metrics_by_source.csv"])
def test_a_missing_artifact_stops_the_report_and_is_named(run, tmp_path, gone, capsys):
    (run/gone).unlink()
    assert main(["report", "--runs", str(run), "--out", str(tmp_path/"out")]) == 1
    assert f"'run/{gone}' is missing" in capsys.readouterr().err
    assert not list((tmp_path/"out").glob("report.*")) if (tmp_path/"out").exists() else True


def test_a_lost_key_stops_the_report_and_is_named(run, tmp_path):
    path = run/STUDENT/"reliability_metrics.json"
    metrics = read_json(path)
    del metrics["uncalibrated"]["ece"]
    write_json(path, metrics)
    with pytest.raises(FerError, match="reference '.*' is missing: .*reliability_metrics.json has no "
                       "(uncalibrated.)?ece"): text_of(run, tmp_path)


@pytest.mark.parametrize(("file", "key", "value", "shown"), [
    (f"{STUDENT}reliability_metrics.json", ("accuracy", "value"), 0.1234, "0.123 ["),
    (f"{STUDENT}reliability_metrics.json", ("macro_f1", "low"), 0.1234, "[0.123,"),
    ("manifests/dataset_index.json", ("usable_count",), 54321, "54,321 usable"),
    ("onnx/onnx_parity.json", ("variants", "w8", "argmax_agreement"), 0.4321, "43.21%"),
    ("manifests/leakage_report.json", ("remaining_leaks",), 17, "gate counts what remains (17 rows)")])
def test_a_changed_number_changes_the_report(run, tmp_path, file, key, value, shown):
    assert shown not in text_of(run, tmp_path/"before")
    content = at = read_json(run/file)
    for k in key[:-1]: at = at[k]
    at[key[-1]] = value
    write_json(run/file, content)
    assert shown in text_of(run, tmp_path/"after")


def test_a_broken_artifact_is_not_left_out_in_silence(run, tmp_path):
    path = run/"teachers"/"LITE2_ferplus"/"calibration.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(FerError, match="LITE2_ferplus/calibration.json"): text_of(run, tmp_path)


def test_a_lost_column_stops_the_report(run, tmp_path):
    path = run/"onnx"/"latency_benchmarks.csv"
    pd.read_csv(path).drop(columns="p50_ms").to_csv(path, index=False)
    with pytest.raises(GateError, match="p50_ms"): text_of(run, tmp_path)


def test_a_broken_seal_is_no_go_in_the_report(run, tmp_path):
    path = run/STUDENT/"reliability_metrics.json"
    write_json(path, read_json(path) | {"resamples": 999})
    assert "**NO-GO**" in text_of(run, tmp_path)


def test_a_report_begins_without_torch():
    code = "import sys, fer_nb.pack; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_number_is_typed_in_the_sources():
    for name, text in sources().items(): assert typed_numbers(text) == [], name


@pytest.mark.parametrize("text", ["Accuracy is 0.83.", "Accuracy is 83%.", "準確率為 0.83。", "準確率0.83", "it gains 3 points",
                                  "n = 3,402", "|a|0.7|", "+3.2 points", "**0.715**"])
def test_a_typed_number_is_refused(text, written):
    with pytest.raises(UsageError, match="page.qmd, line 2: '.*' is typed"): filled(f"Fine.\n{text}\n", None, {}, source="page.qmd")


@pytest.mark.parametrize("text", ["FER2013 and F1", "(Hinton et al., 2015)", "$T^2$", "`--cores 2`", "1. first",
                                  "{{< number a.b .3f >}}",
                                  "MobileNetV3-Large", "# Head {#sec-1}"])
def test_a_name_with_digits_is_no_number(text):
    assert typed_numbers(text) == []


def test_stages_that_never_ran_are_said_in_a_sentence(tmp_path):
    for part in ("manifests", "teachers/LITE0_ferplus"): shutil.copytree(GPU/part, tmp_path/"run"/part)
    text = text_of(tmp_path/"run", tmp_path/"out")
    for said in ("No student has been trained", "No ensemble stands", "No model has been exported", "No session of the demo has been "
                 "scored", "was judged behind a detector",
                 "No run of nested learning", "No model was adapted", "No study of label noise"): assert said in text, said
    assert html_page(tmp_path/"out"/"pack"/"report.qmd", tmp_path/"p.html").is_file() and pdf_page(tmp_path/"out"/"pack"/"report.qmd",
                                                                                                   tmp_path/"p.pdf").is_file()


def test_both_engines_say_the_same(written, tmp_path):
    text = written.read_text(encoding="utf-8")
    page = html_page(written, tmp_path/"report.html").read_text(encoding="utf-8")
    _pandoc(written.resolve(), "typst", tmp_path/"report.typ")
    printed = (tmp_path/"report.typ").read_text(encoding="utf-8")
    plain = unescape(re.sub(r"<[^>]+>", "", page))
    flat = {"html": re.sub(r"\s+", " ", plain), "typst": re.sub(r"\s+", " ", printed.replace("\\", "").replace("~", " "))}
    headings = re.findall(r"^#+ (.+?)(?: \{.*\})?$", text, re.MULTILINE)
    assert len(headings) > 25 and not [(k, h) for k, where in flat.items() for h in headings if h not in where]
    numbers = set(re.findall(rf"\d\.\d{{3}} \[\d\.\d{{3}},{NO_BREAK}\d\.\d{{3}}\]", text))
    def has(where, n): return re.sub(r"\s", " ", n) in where
    assert len(numbers) > 50 and not [(k, n) for k, where in flat.items() for n in numbers if not has(where, n)]
    figures = re.findall(r"\]\(figures/(.+?\.png)\)", text)
    assert page.count("<img") == printed.count("image(\"figures/") == len(figures) > 15
    assert page.count("<table") == printed.count("#table(") > 10


def test_the_page_is_one_small_file_without_scripts(written, tmp_path):
    page = html_page(written, tmp_path/"report.html")
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 3_000_000
    assert not re.search(r"<script|<link|<iframe|src=\"(?!data:image)|url\((?!data:)", text)
    assert str(ROOT) not in text and "/tmp/" not in text


def test_tables_in_the_body_fit_a_screen(written):
    body = written.read_text(encoding="utf-8").split("\n# Appendix")[0]
    parts = dict(zip(re.findall(r"^# (.+)$", body, re.MULTILINE), re.split(r"^# .+$", body, flags=re.MULTILINE)[1:]))
    assert "Interim report" in parts
    for name, part in parts.items():
        for table in re.findall(r"(?:^\|.*\n)+", part,
                                re.MULTILINE): assert len(table.splitlines()) - 2 <= (60 if name.startswith("Go or")
                                                                                      else 14), (name, table[:80])


def test_interval_cells_do_not_break(written):
    assert not re.search(r"\[[−+\d.]+, [−+\d.]+\]", "\n".join(x for x in written.read_text(encoding="utf-8").splitlines()
                                                              if x.startswith("|")).split("# Every number")[0].split("what is shown")[0])


def test_every_number_of_the_text_is_accounted_for(written):
    numbers = pd.read_csv(written.parents[1]/"numbers.csv", keep_default_na=False)
    assert set(numbers.columns) == {"section", "shown", "file", "key", "name"}
    for file in set(numbers["file"]):
        folder, _, rest = file.partition("/")
        assert (GPU.parent/folder/rest).is_file(), file
    named = numbers[numbers["name"] != ""]
    used = set(re.findall(r"\{\{< number ([\w.]+)", "\n".join(sources().values())))
    assert {"student.macro_f1", "kd.macro_f1.difference"} <= set(named["name"]) <= used | set(named["name"])


def test_the_manifest_lists_every_artifact_with_its_hash(written):
    from fer_nb.artifacts import sha256_file
    told = read_json(written.parents[1]/"reproducibility_manifest.json")
    some = sorted(told["files"])[::25]
    assert len(told["files"]) > 300 and all(sha256_file(GPU/f) == told["files"][f] for f in some)
    owed = {p.relative_to(GPU).as_posix() for p in GPU.rglob("reliability_metrics.json")}
    assert owed <= set(told["files"])
    assert set(told["beside"]) == {"fer2013", "label_noise", "nl_matrix", "corruption"}
    assert told["beside"]["corruption"]["gap_closure.json"] == sha256_file(REFERENCE/"corruption"/"gap_closure.json")


def test_the_kept_report_is_that_of_the_kept_runs(written):
    "Made again by `make report`."
    kept = ROOT/"report"/"reference"
    new = written.parents[1]
    for name in ("numbers.csv",
                 "reproducibility_manifest.json"):
        assert (kept/name).read_text(encoding="utf-8") == (new/name).read_text(encoding="utf-8"), name
    assert (kept/"report.html").stat().st_size < 3_000_000 and (kept/"report.pdf").read_bytes()[:5] == b"%PDF-"
    page = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", "", (kept/"report.html").read_text(encoding="utf-8"))))
    told = re.findall(r"\*\*(?:Figure|Table) \d+\.\*\* ([^\]\n]+)", written.read_text(encoding="utf-8"))
    assert len(told) > 30 and not [t for t in told if re.sub(r"[`*]", "", t)[:60] not in page.replace("*", "")]


@pytest.mark.parametrize(("words", "said"), [(["report", "--runs", "nowhere"], "'nowhere' is no folder"),
                                             (["report", "x.ipynb"], "give a notebook and the HTML page"),
                                             (["report", "--engine", "quarto", "--runs", str(GPU)], "Quarto is not on the PATH")])
def test_wrong_words_are_answered(words, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("PATH", "/nowhere")
    assert main([*words, *(["--out", str(tmp_path/"out")] if "--runs" in words else [])]) == 2
    assert said in capsys.readouterr().err


def test_without_runs_it_is_the_last_below_the_current_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 2 and f"'{tmp_path/'runs'}' holds no run" in capsys.readouterr().err
    for name in ("older", "newer"): write_text(tmp_path/"runs"/name/"manifests"/"dataset_index.json", "{}")
    os.utime(tmp_path/"runs"/"older"/"manifests", (0, 0))
    assert the_last_run() == tmp_path/"runs"/"newer"


def test_quarto_is_used_where_it_is_there(run, tmp_path, monkeypatch):
    (tmp_path/"bin").mkdir()
    quarto = tmp_path/"bin"/"quarto"
    quarto.write_text(f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n"
                      "Path(sys.argv[sys.argv.index('--output') + 1]).write_text(Path(sys.argv[2]).read_text())\n")
    quarto.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path/"bin"))
    made = render_pack(run, "html", tmp_path/"out")
    assert "{{<" not in made[0].read_text() and "figures/" in made[0].read_text()


def test_a_telephone_shows_it_without_scrolling_sideways(written, tmp_path):
    sync = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser: pytest.skip("no browser is installed")
    page = html_page(written, tmp_path/"report.html").resolve()
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for width in (400, 1280):
            tab = b.new_page(viewport={"width": width, "height": 900})
            tab.goto(page.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.evaluate("Math.min(...[...document.images].map(i => i.getBoundingClientRect().width))") > 0.85*min(width, 576) - 40
            assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 800)")
        b.close()


def changed(path, *key, to):
    "Write another value into an artifact."
    content = read_json(path)
    at = content
    for k in key[:-1]: at = at[k]
    at[key[-1]] = to
    write_json(path, content)


def test_each_surprise_has_its_sentence_and_none_of_them_where_nothing_surprises(run, tmp_path):
    "int8 beside GO, ECE that rises at T*, one file with two times, no commit, an empty table: what readers of the report stumbled over."
    told = ("is outside its bar", "it can be GO beside this", "Higher ECE after calibration", "One file, two times", "No commit",
            "Nothing was left out")
    latency = run/"onnx"/"latency_benchmarks.csv"
    t = pd.read_csv(latency).query("not model.str.endswith(' again')")
    once = t[t["model"] == t["model"].iloc[0]]
    for calm in (True, False):
        changed(run/"onnx"/"onnx_parity.json", "variants", "int8", "pass", to=calm)
        for path in run.rglob("reliability_metrics.json"): changed(path, "uncalibrated", "ece", to=0.5 if calm else 0.001)
        control = once.assign(model=once["model"] + " again", p50_ms=once["p50_ms"]*(1 if calm else 3))
        pd.concat([t, control]).to_csv(latency, index=False)
        for path in run.rglob("environment.json"): changed(path, "commit", to="0123456789abcdef" if calm else None)
        changed(run/"manifests"/"dataset_index.json", "excluded", to={"a broken file": 3} if calm else {})
        text = text_of(run, tmp_path/f"pack {calm}")
        assert [x for x in told if x in text] == ([] if calm else list(told))
        assert ("Rows that stay in the manifest and are not used: none." in text) != calm


@pytest.mark.parametrize(("gain", "low", "high", "said"), [
    (-0.02, -0.05, 0.01, "an interval that holds zero"), (-0.02, -0.03, -0.01, "costs"), (-0.02, None, None, "costs"),
    (0.02, -0.01, 0.05, "")])
def test_a_stabiliser_that_costs_is_told(gain, low, high, said):
    score = {"gain_macro_f1": {"value": gain, "low": low, "high": high}, "source": "video: talk.mp4", "scored_segments": 30}
    ledger = SimpleNamespace(names={"demo.gain": SimpleNamespace(path="score")}, value=lambda path, key: score[key],
                             number=lambda name: name, note=lambda *a: None)
    found = session_surprises(SimpleNamespace(ledger=ledger, runs=[]))
    assert [said in x and "Stabilising costs accuracy here" in x for x in found] == [True]*bool(said)


def test_runs_of_several_input_sizes_are_told():
    def one(size): return SimpleNamespace(args=SimpleNamespace(parameters={"img_size": size, "arch": f"net{size}"}), folder=Path("x"))
    def found(*sizes): return mixed_sizes(SimpleNamespace(runs=[one(s) for s in sizes], ledger=SimpleNamespace(note=lambda *a: None)))
    assert found(64, 64) == [] and "64 px: net64; 224 px: net224" in found(64, 224)[0]


@pytest.mark.parametrize(("name", "said"), [
    ("_summary.qmd", ("of the model <demo.model>", "The live session is from another run folder", "in this report are its checkpoint's",
                      "changes macro-F1 by <export.macro_f1_change> points")),
    ("_summary_zh.qmd", ("模型為 <demo.model>", "取自另一個執行資料夾", "都屬於匯出前的原模型",
                         "F1 變動 <export.macro_f1_change> 個百分點"))])
def test_the_summary_says_whose_session_and_whose_scores_it_shows(name, said):
    def text(*there):
        ledger = SimpleNamespace(number=lambda n, form="": f"<{n}>", section="")
        return filled(sources()[name], ledger, {"verdict": str, "verdict_zh": str}, there)
    assert [x in text("demo", "lent.session", "onnx", "onnx.change") for x in said] == [True]*4
    assert [x in text("demo", "onnx") for x in said] == [True, False, True, False] and not any(x in text() for x in said)


@pytest.mark.parametrize(("kind", "said"), [("session", "The live session comes from `older`"), ("training", "Training runs come from"),
                                            ("export", "The exported files come from")])
def test_what_comes_from_another_folder_is_told_in_good_grammar(kind, said):
    assert said in provenance_surprises(SimpleNamespace(runs=[], lent={kind: Path("older")}))[0]


def part(verdict, value, lower, upper, ece=0.0):
    return {"seeds": [1, 2, 3], "macro_f1_difference": value, "lower": lower, "upper": upper, "ece_difference": ece, "verdict": verdict}


@pytest.mark.parametrize(("shown", "judged", "said"), [
    ("+2.7 [+1.5, +3.9]", part("not shown", 0.0202, -0.0127, 0.0531), f"is not shown: +2.02 [−1.27,{NO_BREAK}+5.31] over 3 seeds."),
    ("−0.1 [−0.9, +1.1]", part("inferior", -0.011, -0.0163, -0.0057), f"is inferior: −1.10 [−1.63,{NO_BREAK}−0.57] over 3 seeds."),
    ("+2.7 [+1.5, +3.9]", part("inferior", 0.02, 0.01, 0.03, ece=0.0123), "with ECE +0.0123."),
    ("−2.0 [−3.0, −1.0]", part("non-inferior", 0.02, 0.01, 0.03), "is non-inferior"),
    ("+2.7 [+1.5, +3.9]", part("non-inferior", 0.02, 0.01, 0.03), ""), ("−0.1 [−0.9, +1.1]", part("not shown", 0.0, -0.01, 0.01), ""),
    ("−2.0 [−3.0, −1.0]", part("inferior", -0.02, -0.03, -0.01), ""), ("", part("inferior", -0.02, -0.03, -0.01), "")])
def test_a_verdict_beside_an_interval_that_says_otherwise_is_told(shown, judged, said):
    table = pd.DataFrame({"points of macro-F1": ["", shown]}, index=["AdamW", "Deep+NegL"])
    found = odd_verdicts("KD", table, {"margin": 0.005, "parts": {"Deep+NegL": judged}})
    assert [said in x and "Deep + NegL" in x and "margin of 0.5 points" in x for x in found] == [True]*bool(said)


def test_times_of_one_arm_that_contradict_each_other_are_told():
    def found(smoked, joined, longest):
        table = pd.DataFrame({"time": ["1.00×", "1.50×", "1.04×", f"{joined:.2f}×"]}, index=["AdamW", "Deep", "NegL", "Deep+NegL"])
        epochs = pd.DataFrame({"arm": ["AdamW", "AdamW", "Deep", "Deep"], "seed": [1, 2, 1, 2], "train_seconds": [10, 10, 20, longest]})
        smoke = {"epochs": 3, "rows": 640, "arms": {"AdamW": {"time_ratio": 1}, "NegL": {"time_ratio": smoked}}}
        return odd_times("KD", table, epochs, smoke)
    assert found(2.0, 1.6, 90) == []
    smoked, joined = found(9.06, 1.6, 90)[0], found(1.1, 9.62, 30)[0]
    assert "NegL takes 9.06× in the smoke test and 1.04× in the matrix" in smoked
    assert "Runs of Deep that differ in the seed alone took 20 to 90 s" in smoked
    assert "Deep + NegL takes 9.62×, its parts 1.50× and 1.04×" in joined and "seed alone" not in joined and "smoke test and" not in joined


@pytest.mark.parametrize(("go", "failed", "aside"), [(True, ("int8", "w8"), True), (False, ("int8",), False), (True, (), False)])
def test_the_chinese_verdict_names_the_files_that_must_not_ship(go, failed, aside):
    files = {p: {"file": f"model_{p}.onnx", "pass": p not in failed} for p in ("fp32", "w8", "int8")}
    m = SimpleNamespace(checklist=SimpleNamespace(lines=[SimpleNamespace(go=go)]), exports=[Path("onnx")],
                        ledger=SimpleNamespace(read=lambda path: {"variants": files}))
    told = verdict_zh(SimpleNamespace(m=m))
    assert ("2 個輸出檔案（model_w8.onnx、model_int8.onnx）" in told and "不得交付" in told) == aside and ("model_" in told) == aside


def test_sentences_stand_beside_the_tables_of_nested_and_negative_learning(written):
    text = written.read_text(encoding="utf-8")
    learned = text.split("Nested and negative learning, smoke test")[1].split("# ")[0]
    for said in ("**Verdicts beside other intervals.** KD", "**Verdicts beside other intervals.** DKD", "NegL_replace takes 9.06×",
                 "DeepMomentum + NegL takes 9.62×"): assert said in learned, said
    assert not re.search(r"\| -\d", learned)


# ---- files that are whole, and of something else ----

ARMS = tuple(f"students/mobilenetv3_large_100_ferplus_img80_seed{s}_{stage}" for s in (42, 1337, 2025) for stage in ("CE", "KD", "DKD"))


@pytest.fixture
def compared(run):
    "The same with the students that were compared, and the comparison of their convention."
    for part in ARMS: shutil.copytree(GPU/part, run/part)
    for name in ("results_summary_students.csv", "comparisons_students.csv", "class_gains_students.csv"):
        t = pd.read_csv(GPU/"students"/name)
        t[t["convention"] == "ferplus"].to_csv(run/"students"/name, index=False)
    return run


def refused(run):
    "What is said of a run folder that can't be reported."
    with pytest.raises(GateError) as e: name_all(Material(run))
    return str(e.value)


def spoil(run, name, change):
    path = run/"students"/name
    change(pd.read_csv(path)).to_csv(path, index=False)
    return refused(run)


def test_a_comparison_is_of_the_runs_that_stand_here(compared):
    assert "kd" in name_all(Material(compared))
    shutil.rmtree(compared/ARMS[0])
    assert "results_summary_students.csv' is of other runs: no students here have" in refused(compared)


@pytest.mark.parametrize("name, change, says", [
    ("results_summary_students.csv", lambda t: pd.read_csv(GPU/"students"/"results_summary_students.csv"), "is of other runs"),
    ("results_summary_students.csv", lambda t: t.assign(mean=t["mean"] + 0.01), "is of other runs"),
    ("results_summary_students.csv", lambda t: t.drop(columns="mean"), "the table has no mean"),
    ("comparisons_students.csv", lambda t: t.head(0), "it lacks CE"),
    ("comparisons_students.csv", lambda t: t.head(len(t)//2), "it lacks"),
    ("comparisons_students.csv", lambda t: t.assign(low=float("nan")), "holds no number as low"),
    ("comparisons_students.csv", lambda t: t.assign(low="oops"), "holds no number as low"),
    ("comparisons_students.csv", lambda t: t.assign(n_seeds="three"), "can't be read"),
    ("comparisons_students.csv", lambda t: t.assign(difference=t["difference"] + 0.01), "is not their difference"),
    ("comparisons_students.csv", lambda t: t.assign(high=t["low"]), "is not their difference")])
def test_a_table_that_was_changed_is_refused_by_name(compared, name, change, says):
    text = spoil(compared, name, change)
    assert says in text and name in text


def test_what_ships_is_a_file_within_its_bar(run):
    changed(run/"onnx"/"onnx_parity.json", "variants", "w8", "pass", to=False)
    m = Material(run)
    name_all(m)
    assert m.ledger.number("export.precision") == "model_fp32.onnx"
    assert any("**model_w8.onnx is outside its bar.**" in s and "points; its bar is" in s for s in outside_bars(m))


def test_scores_behind_a_detector_are_of_the_export(run):
    shutil.copy(GPU/"onnx_fer2013"/"through_detector.json", run/"onnx")
    m = Material(run)
    assert "is of the weights" in {x.file: x.reason for x in m.checklist.lines if not x.go}["through_detector.json"]
    with pytest.raises(GateError, match="onnx/through_detector.json' is of another model"): name_all(m)


def test_a_sessions_scores_are_those_of_its_frames(run):
    session = shutil.copytree(OLDER/"demo"/"first", run/"demo"/"first")
    name_all(Material(run))
    scores = read_json(session/"score_results.json")
    scores["confusion"][3][3] += 1
    write_json(session/"score_results.json", scores)
    with pytest.raises(GateError, match="score_results.json#confusion' is not what the session's frames say"): name_all(Material(run))


def test_the_detector_of_the_summary_is_that_which_misses_least(run):
    path = run/"onnx"/"through_detector.json"
    seen = read_json(path)
    for rows in (seen["rows"], seen["rows"][::-1]):
        write_json(path, seen | {"rows": rows})
        m = Material(run)
        name_all(m)
        assert m.ledger.number("through.missed") == str(min(r["missed"] for r in rows)) and m.ledger.number("through.detector") == "yunet"


def test_the_chinese_font_has_every_character_of_the_page():
    text = "".join((ROOT/p).read_text(encoding="utf-8") for p in ("report/_summary_zh.qmd", "fer_nb/pack_blocks.py"))
    for path in (ROOT/"fer_nb"/"static").glob("*.otf"):
        held = TTFont(path).getBestCmap()
        assert [c for c in sorted(set(text)) if ord(c) >= 0x2E80 and ord(c) not in held] == [], f"{path.name}: run workflow/font.py"


def test_what_no_block_can_use_is_told_with_the_block(run, tmp_path):
    path = run/"onnx"/"latency_benchmarks.csv"
    pd.read_csv(path).assign(p50_ms="fast").to_csv(path, index=False)
    with pytest.raises(GateError, match="the report's reference '.*' can't be made of what its artifacts hold"): text_of(run, tmp_path)
