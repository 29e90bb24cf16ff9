"""What RESULTS.md says, rebuilt from the evaluation files that the repository keeps: by picture, and by the labels that a model learned."""
import re
import zipfile

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support

from fer_nb import arms, ensembles, reliability, resampling, run_report, selective, summary
from fer_nb import calibration as cal
from fer_nb.artifacts import CLASSES, read_npz, sha256_file
from fer_nb.deploy import Predictor, prepared
from fer_nb.evidence import EnsembleConfig, EnsembleGate, EnsembleMetrics, OnnxParity
from fer_nb.gates import gates
from fer_nb.integrity import load_softlabels, own_test_rows, run_convention
from fer_nb.leaves import check_run_seal
from fer_nb.geometry import normalise
from fer_nb.records import Calibration, HashManifest, ReliabilityMetrics, RunArgs, SelectiveReport
from fer_nb.starts import open_start
from fer_nb.synthetic import render_faces
from tests.conftest import ROOT

REFERENCE = ROOT/"runs"/"reference"/"fer2013"
RUNS = sorted(p.parent for p in REFERENCE.rglob("selective.json"))
NOW = ROOT/"runs"/"reference"/"gpu"  # what ships, and what taught it; REFERENCE is what processors trained before
RESULTS = (ROOT/"runs"/"reference"/"RESULTS.md").read_text(encoding="utf-8").replace("−", "-")
PAGE, BEFORE = RESULTS.split("## Before, on processors: FERPlus")
SHIPS = {"ferplus": ("MODEL_CARD.md", "student.onnx", "onnx/answers_w8.npz"),
         "fer2013": ("MODEL_CARD_fer2013.md", "student_fer2013.onnx", "onnx_fer2013/answers_w8.npz")}
MODELS = {  # first cell of the page's row -> folder
    "LITE1, seed 1337": "teachers/LITE1_seed1337_stageA_img80", "LITE1, seed 2025": "teachers/LITE1_seed2025_stageA_img80",
    "LITE0, seed 1337": "teachers/LITE0_seed1337_stageA_img80", "RN18, seed 1337": "teachers/RN18_seed1337_stageA_img48",
    "RN18, seed 1337, stage B": "teachers/RN18_seed1337_stageB_img64", "B3, seed 1337": "teachers/B3_seed1337_stageA_img48",
    "CNXT, seed 1337": "teachers/CNXT_seed1337_stageA_img48", "VIT, seed 1337": "teachers/VIT_seed1337_stageA_img48",
    "pairwise": "ensembles/pairwise", "four_way": "ensembles/four_way", "searched": "ensembles/searched", "adjusted": "ensembles/adjusted"}
ARMS = {"CE": "CE", "CE from CE": "CE_from_CE", "KD from CE": "KD", "CE from CE from CE": "CE_from_CE_from_CE", "DKD from KD": "DKD"}


def rows_of(first: str) -> list[str]:
    "The cells of the one row of the tables of models that begins so."
    of_models = BEFORE.split("### What ensembles gain")[0] if first.startswith("[") else BEFORE
    line, = (x for x in of_models.splitlines() if x.startswith(f"| {first}"))
    return [c.strip() for c in line.strip("|").split("|")]


def answers(folder):
    "Logits, labels, pictures and sources of all kept test rows, and which of them judge."
    z = read_npz(folder/"evaluation.npz", ["test_ids", "test_logits", "test_labels"])
    groups = run_report.kept_groups(folder, z["test_ids"], Calibration.load(folder).dataset_index_id)
    sources = np.array([i.split("/")[0] for i in z["test_ids"].tolist()])
    return z["test_logits"].astype(float), z["test_labels"].astype(int), groups, sources, own_test_rows(folder, z)


def shown(interval) -> str: return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


# --- the kept files


def test_the_kept_index_names_the_pictures(real_data):
    "400 pictures of the test rows, read from the zips: the rows of one picture look alike, and those of two don't."
    z = read_npz(REFERENCE/"manifests"/run_report.ROW_GROUPS, ["ids", "groups", "dataset_index_id"])
    tested = set(read_npz(RUNS[0]/"evaluation.npz")["test_ids"].tolist())
    rows = pd.DataFrame({"id": z["ids"], "group": z["groups"]})
    rows = rows[rows["id"].isin(tested)].sample(frac=1, random_state=0)
    groups = [part["id"].tolist() for _, part in rows.groupby("group", sort=False)][:400]
    archives = {s: zipfile.ZipFile(real_data/f"{s}.zip") for s in ("fer2013", "ferplus")}
    names = {s: {n.rsplit("/", 1)[-1]: n for n in a.namelist()} for s, a in archives.items()}
    def pixels(row):
        source = row.split("/")[0]
        data = archives[source].read(names[source][row.rsplit("/", 1)[-1]])
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE).ravel().astype(float)
    faces = [[pixels(i) for i in g] for g in groups]
    def alike(a, b): return np.corrcoef(a, b)[0, 1]
    same = [alike(f[0], x) for f in faces for x in f[1:]]
    others = [alike(f[0], g[0]) for f, g in zip(faces, faces[1:])]
    assert len(same) > 350 and min(same) > 0.9 and np.quantile(others, 0.99) < 0.9


def test_rows_and_pictures_are_as_many_as_the_page_says():
    _, _, groups, sources, _ = answers(RUNS[0])
    count = {s: ((sources == s).sum(), len(set(groups[sources == s].tolist()))) for s in ("ferplus", "fer2013")}
    assert len(groups) == 6991 and len(set(groups.tolist())) == 3540 and count == {"ferplus": (3402, 3354), "fer2013": (3589, 3540)}
    assert "3,589 rows of FER2013 show 3,540 pictures; 3,402 rows of FERPlus show 3,354 pictures" in PAGE


@pytest.mark.parametrize("folder", RUNS, ids=lambda p: p.relative_to(REFERENCE).as_posix())
def test_what_was_written_again_is_sealed_and_says_so(folder):
    assert check_run_seal(folder)
    seal, m, s = HashManifest.load(folder), ReliabilityMetrics.load(folder), SelectiveReport.load(folder)
    assert {"reliability_metrics.json", "selective.json", "metrics_by_source.csv"} <= set(seal.rewritten)
    assert all("by convention and picture, from logits in half precision" in a.recomputed for a in (m, s))
    assert m.convention == s.convention == s.calibrated_on == run_convention(folder) and m.pictures == s.pictures


@pytest.mark.parametrize("name", ["teachers/LITE0_seed1337_stageA_img80", "ensembles/adjusted",
                                  "students/mobilenetv3_large_100_img64_seed1337_CE_from_KD_on_fer2013"])
def test_kept_intervals_come_out_again(name):
    "Every interval that needs no votes, from the kept logits; values in full precision stay within what half precision moves."
    folder = REFERENCE/name
    z, y, groups, sources, own = answers(folder)
    m, table = ReliabilityMetrics.load(folder), pd.read_csv(folder/"metrics_by_source.csv").set_index("source")
    for at, kept in ((own, m), *((sources == s, table.loc[s]) for s in table.index)):
        again = reliability.evaluate(z[at], y[at], m.temperature, groups=groups[at])
        for k in reliability.METRICS:
            low, high = (getattr(kept, k).low, getattr(kept, k).high) if at is own else (kept[f"{k}_low"], kept[f"{k}_high"])
            assert (again[k].low, again[k].high) == pytest.approx((low, high), abs=1e-6), (name, k)
            assert again[k].value == pytest.approx(getattr(kept, k).value if at is own else kept[k], abs=2e-3)


# --- prediction sets


@pytest.mark.parametrize("folder", RUNS, ids=lambda p: p.relative_to(REFERENCE).as_posix())
def test_sets_cover_what_they_promise_on_their_own_convention(folder):
    "Counted from the kept logits, one row a picture: 90% within three standard errors of the two draws."
    z, y, groups, _, own = answers(folder)
    s = SelectiveReport.load(folder)
    first = np.flatnonzero(own)[resampling.one_a_picture(cal.group_codes(groups[own], own.sum()), own.sum())]
    sets = selective.prediction_sets(z[first], s.threshold, s.temperature)
    covered, n = int(sets[np.arange(len(first)), y[first]].sum()), s.promise.calibration_pictures
    assert (covered, len(first)) == (s.promise.covered, s.promise.pictures)
    assert abs(covered/len(first) - 0.9) < 3*np.sqrt(0.09*(1/len(first) + 1/n))
    assert s.promise.p_value == pytest.approx(selective.coverage_chance(covered, len(first), n, s.miss)) and s.promise.kept


def test_what_was_promised_for_one_convention_fails_by_the_other():
    "The fault that this keeps out: 0.77 of all rows, where 0.89 of the own and 0.66 of the others were covered."
    folder = REFERENCE/"students"/"mobilenetv3_large_100_img64_seed1337_CE_from_CE_from_CE"
    z, y, _, sources, _ = answers(folder)
    s = SelectiveReport.load(folder)
    def share(at): return selective.set_coverage(z[at], y[at], s.temperature, threshold=s.threshold)
    assert [round(share(at), 2) for at in (sources == "ferplus", sources == "fer2013", np.full(len(y), True))] == [0.89, 0.66, 0.77]
    other, = s.others
    assert other.promise is None and other.by_class["Fear"].coverage < 0.15


def test_the_checklist_has_a_line_for_every_run():
    lines = [x for x in gates(REFERENCE).lines if x.question == "prediction sets keep their promise"]
    assert len(lines) == len(RUNS) == 29 and all(x.go for x in lines)


def test_the_page_tells_the_range_of_coverage():
    reports = [s for s in (SelectiveReport.load(f) for f in RUNS) if s.convention == "ferplus"]
    shares = [s.promise.covered/s.promise.pictures for s in reports]
    assert f"cover {min(shares):.3f} to {max(shares):.3f} of the test pictures" in BEFORE
    assert f"p ≥ {min(s.promise.p_value for s in reports):.3f} in each" in BEFORE and f"stops at p < {selective.CHANCE:g}" in BEFORE
    by_others = [o.coverage.value for s in reports for o in s.others]
    assert f"they cover {min(by_others):.2f} to {max(by_others):.2f}." in BEFORE
    shipped = SelectiveReport.load(NOW/"students"/"mobilenetv3_large_100_ferplus_img80_seed1337_KD_from_KD_from_KD_from_KD").by_class
    assert f"| coverage | {' | '.join(f'{shipped[c].coverage:.2f}' for c in CLASSES)} |" in PAGE


# --- the page's tables


@pytest.mark.parametrize(("first", "name"), MODELS.items())
def test_the_page_has_the_kept_numbers(first, name):
    table, cells = pd.read_csv(REFERENCE/name/"metrics_by_source.csv").set_index("source"), rows_of(f"[{first}](")
    def interval(s, k): return "{:.3f} [{:.3f}, {:.3f}]".format(*(table.loc[s, f"{k}{end}"] for end in ("", "_low", "_high")))
    scaled = [f"{table.loc['ferplus', f'raw_{k}']:.3f} → {table.loc['ferplus', k]:.3f}" for k in ("nll", "ece")]
    rare = [f"{table.loc['ferplus', f'f1_{c}']:.2f}" for c in ("Disgust", "Fear")]
    assert cells[2:] == [interval("ferplus", "accuracy"), interval("ferplus", "macro_f1"), *rare, *scaled, interval("fer2013", "accuracy"),
                         interval("fer2013", "macro_f1")]


@pytest.mark.parametrize("first", ["RN18, seed 1337, stage B", "adjusted", "VIT, seed 1337"])
def test_the_page_has_numbers_that_the_logits_give(first):
    z, y, groups, sources, _ = answers(REFERENCE/MODELS[first])
    cells = rows_of(f"[{first}](")
    for column, source, metric in ((2, "ferplus", cal.accuracy), (3, "ferplus", cal.macro_f1), (8, "fer2013", cal.accuracy)):
        at = sources == source
        got = resampling.bootstrap_interval(metric, z[at], y[at], groups=groups[at])
        told = [float(x) for x in re.findall(r"\d\.\d+", cells[column])]
        assert told == pytest.approx([got.value, got.low, got.high], abs=1.1e-3)


@pytest.mark.parametrize(("first", "stage"), ARMS.items())
def test_the_page_has_the_students_means(first, stage):
    tables = [pd.read_csv(REFERENCE/"students"/f"mobilenetv3_large_100_img64_seed{s}_{stage}"/"metrics_by_source.csv").set_index("source")
              for s in (1337, 2025, 42)]
    def told(source, k):
        v = [t.loc[source, k] for t in tables]
        return f"{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}"
    own, others = ("accuracy", "macro_f1", "f1_Disgust", "f1_Fear", "nll", "ece"), ("accuracy", "macro_f1")
    assert rows_of(f"{first} | 12")[4:] == [*(told("ferplus", k) for k in own), *(told("fer2013", k) for k in others)]


def points(value, low, high) -> str: return f"{100*value:+.1f} [{100*low:+.1f}, {100*high:+.1f}]"


@pytest.fixture(scope="module")
def students(): return arms.find_students(REFERENCE/"students", "ferplus")


def test_what_distillation_gains_comes_out_again(students):
    "The page's claims, the kept table, and the kept logits say the same, by picture."
    kept = pd.read_csv(REFERENCE/"students"/summary.COMPARISONS)
    again, _ = summary.compare_arms([r for r in students if r.arm.start in ("", "CE", "KD")], 10_000)
    keys = ["arm_a", "arm_b", "source", "metric"]
    both = again.merge(kept, on=keys, suffixes=("", "_kept"))
    assert len(both) >= 10 and set(both["pictures"]) == {3354}
    for k in ("difference", "low", "high"): assert np.abs(both[k] - both[f"{k}_kept"]).max() < 1e-9
    at = kept.set_index(keys)
    for a, b in (("CE", "KD adjusted"), ("CE", "DKD adjusted"), ("CE from CE", "KD adjusted"), ("CE from CE from CE", "DKD adjusted")):
        for metric in ("accuracy", "macro_f1"):
            assert points(*at.loc[(a, b, "all", metric), ["difference", "low", "high"]]) in rows_of(f"{a} | {b} |"), (a, b, metric)


def test_one_seed_does_not_tell_dkd_from_ce(students):
    "By row the gain of seed 1337 over both sources seemed clear of 0; by picture it is not."
    folders = [REFERENCE/"students"/f"mobilenetv3_large_100_img64_seed1337_{k}" for k in ("CE", "DKD")]
    (za, y, groups, sources, own), (zb, *_) = map(answers, folders)
    by_row = resampling.paired_interval(cal.macro_f1, za, zb, y, resamples=2000)
    by_picture = resampling.paired_interval(cal.macro_f1, za, zb, y, resamples=2000, groups=groups)
    assert by_row.low > 0.005 and by_picture.low < 0.001 and by_row.value == by_picture.value
    alone = resampling.paired_interval(cal.macro_f1, za[own], zb[own], y[own], resamples=10_000, groups=groups[own])
    assert f"seed 1337's DKD is {points(alone.value, alone.low, alone.high)} points of macro-F1 above its CE" in BEFORE


# --- gains of ensembles


def member_name(over: str) -> str:
    return {"tf_efficientnet_lite0": "LITE0, seed 1337", "tf_efficientnet_lite1": "LITE1, seed 1337", "RN18": "RN18, seed 1337",
            "LITE1_seed1337_stageA_img80": "LITE1, seed 1337", "LITE1_seed2025_stageA_img80": "LITE1, seed 2025"}[over]


@pytest.mark.parametrize("name", ["adjusted", "searched", "pairwise", "four_way"])
def test_the_page_has_the_gains_of_every_source(name):
    m = EnsembleMetrics.load(REFERENCE/"ensembles"/name)
    assert {g.source for g in m.gains} == {"all", "ferplus", "fer2013"} and "recomputed" in m.model_dump()
    lines = [x for x in BEFORE.split("### What ensembles gain")[1].splitlines() if x.startswith(f"| [{name}](")]
    for g in (g for g in m.gains if g.source != "all"):
        judge = "FERPlus" if g.source == "ferplus" else "*FER2013: no judgement*"
        line, = (x for x in lines if f"| {judge} | {member_name(g.over)} (" in x)
        assert line.split("|")[4 if g.metric == "accuracy" else 5].strip() == points(g.gain.value, g.gain.low, g.gain.high)
        assert (g.convention, g.pictures) == (g.source, 3354 if g.source == "ferplus" else 3540)


def test_gains_come_out_again_from_the_members_logits():
    folder = REFERENCE/"ensembles"/"adjusted"
    z, y, groups, sources, own = answers(folder)
    ids = read_npz(folder/"evaluation.npz")["test_ids"]
    members, m = ensembles.member_logits(folder, EnsembleConfig.load(folder), ids), EnsembleMetrics.load(folder)
    for source, at in (("all", own), ("fer2013", sources == "fer2013")):
        theirs = {k: v[at] for k, v in members.items()}
        again = ensembles.gains(z[at], theirs, y[at], m.benchmark, m.resamples, m.seed, groups[at], source=source)
        kept = [g for g in m.gains if g.source == source]
        for a, b in zip(again, kept, strict=True):
            assert (a.metric, a.over, a.chosen_on, a.n, a.pictures) == (b.metric, b.over, b.chosen_on, b.n, b.pictures)
            assert (a.gain.value, a.gain.low, a.gain.high) == pytest.approx((b.gain.value, b.gain.low, b.gain.high), abs=1e-9)


# --- the card


@pytest.mark.parametrize("learned", SHIPS)
def test_the_card_tells_of_the_file_that_ships(learned):
    "Its tables are what the very file answers, as kept beside its export, and not its fp32 parent."
    *names, answers = SHIPS[learned]
    card, model = (ROOT/"fer_nb"/"models"/name for name in names)
    z = read_npz(NOW/answers)
    assert str(z["sha256"]) == sha256_file(model)
    y, said, text = z["test_labels"], z["test_logits"].argmax(1), card.read_text(encoding="utf-8")
    found = evaluate_shipped(z, Predictor(model).temperature)
    row, = (x for x in text.splitlines() if x.startswith(f"| {learned} ") and "yunet" not in x and "haar" not in x)
    assert [c.strip() for c in row.strip("|").split("|")] == [learned, f"{len(y):,}", *found]
    for name, precision, recall, _, n in zip(CLASSES, *precision_recall_fscore_support(y, said, labels=range(7), zero_division=0)):
        cells = [c.strip() for c in text.split(f"| {name} ")[1].split("|")[1:4]]
        assert cells == [str(n), f"{precision:.3f}", f"{recall:.3f}"]


def evaluate_shipped(z, temperature) -> list[str]:
    "Accuracy, macro-F1 and ECE with their intervals by picture, as the card prints them."
    logits, labels = z["test_logits"].astype(float), z["test_labels"].astype(int)
    record = reliability.evaluate(logits, labels, temperature, None, 1000, 1337, z["test_groups"])
    return [shown(record[k]) for k in ("accuracy", "macro_f1", "ece")]


@pytest.mark.parametrize("learned", SHIPS)
def test_the_kept_answers_are_the_shipped_files_own(real_data, learned):
    "A sample of the kept logits, computed again from the pictures."
    model, z = Predictor(learned), read_npz(NOW/SHIPS[learned][2])
    at = np.sort(np.random.default_rng(0).choice(len(z["test_ids"]), 100, replace=False))
    archive = zipfile.ZipFile(real_data/f"{learned}.zip")
    members = {"/".join(n.split("/")[-2:]): n for n in archive.namelist()}
    names = [members["/".join(i.split("/")[-2:])] for i in z["test_ids"][at].tolist()]
    pictures = [cv2.imdecode(np.frombuffer(archive.read(n), np.uint8), cv2.IMREAD_UNCHANGED) for n in names]
    z_now = model.logits(prepared(pictures, model.geometry))
    assert np.abs(z_now - z["test_logits"][at]).max() < 0.5 and np.mean(z_now.argmax(1) == z["test_logits"][at].argmax(1)) >= 0.97


# --- what ships, and what taught it


@pytest.mark.parametrize("folder", sorted(p.parent for p in NOW.rglob("selective.json")), ids=lambda p: p.relative_to(NOW).as_posix())
def test_the_small_copy_is_whole_and_gives_its_sealed_scores(folder):
    assert check_run_seal(folder)
    z, m = read_npz(folder/"evaluation.npz"), ReliabilityMetrics.load(folder)
    own, T = own_test_rows(folder, z), Calibration.load(folder).selected_temperature
    logits, labels = z["test_logits"].astype(float)[own], z["test_labels"].astype(int)[own]
    assert cal.accuracy(logits, labels) == pytest.approx(m.accuracy.value, abs=1e-3)
    assert cal.macro_f1(logits, labels) == pytest.approx(m.macro_f1.value, abs=2e-3)
    assert cal.nll(logits, labels, T) == pytest.approx(m.nll.value, abs=2e-3)


@pytest.mark.parametrize("learned", SHIPS)
def test_arms_of_one_convention_cost_the_same(learned):
    runs = [p for p in (NOW/"students").iterdir() if f"_{learned}_" in p.name and "_from_" not in p.name]
    same = ("epochs", "batch_size", "lr", "init_sha256", "img_size", "mixup")
    told = [{k: RunArgs.load(p).parameters.get(k) for k in same} for p in runs]
    assert len(runs) == 9 and all(t == told[0] for t in told)


@pytest.mark.parametrize("learned", SHIPS)
def test_distillation_can_be_repeated_without_the_teachers(learned):
    "The small softlabels have every training row, and say what the ensemble's own evaluation says of its temperature."
    soft, name = load_softlabels(NOW/"teaching"/f"four_{learned}"), f"ensembles/four_{learned}"
    assert (soft.convention, soft.views, set(soft.splits.tolist())) == (learned, ("identity", "hflip"), {"train"})
    assert len(soft.ids) == EnsembleGate.load(NOW/name).rows["train"] == len(set(soft.ids.tolist()))
    assert soft.temperature == Calibration.load(NOW/name).selected_temperature == EnsembleConfig.load(NOW/name).temperature
    assert soft.dataset_index_id == Calibration.load(NOW/name).dataset_index_id
    if learned == "fer2013":  # its ids name the class: the ensemble knows its training pictures
        known = np.array([CLASSES.index(i.split("/")[2].capitalize()) for i in soft.ids.tolist()])
        assert np.mean(soft.probs().mean(1).argmax(1) == known) > 0.7


@pytest.mark.parametrize("learned", SHIPS)
def test_trainable_weights_answer_as_the_exported_file(learned):
    network, meta, path = open_start(learned)
    assert path.suffix == ".safetensors" and path.stat().st_size < 10e6 and meta["convention"] == learned
    model = Predictor(learned)
    faces = prepared(list(render_faces(32, size=64, seed=3)[0]), model.geometry, order="RGB")
    with torch.no_grad(): ours = network(torch.from_numpy(normalise(faces, model.geometry))).numpy()
    answers = NOW/SHIPS[learned][2]
    apart = OnnxParity.load(answers.parent).variants[answers.stem.removeprefix("answers_")].max_logit_diff
    assert np.abs(ours - model.logits(faces)).max() < max(0.2, apart)  # the file keeps its weights, or all, in eight bits
