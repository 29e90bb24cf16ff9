"""Student summary: numbers against longhand ones, every refusal, small copies, and what may differ inside an arm."""
import itertools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics as sk

from fer_nb import arms, calibration, summary, summary_plots
from fer_nb.artifacts import ArtifactError, GateError, UsageError, read_npz, write_npz
from fer_nb.calibration import predictions
from fer_nb.leaves import seal_folder
from fer_nb.records import HashManifest, ReliabilityMetrics, RunArgs
from fer_nb.resampling import mcnemar, paired_interval
from fer_nb.run_report import write_row_groups
from tests.conftest import ROOT

SEEDS, N = (3, 1, 2), 300
SKILL = {"CE": 1.8, "KD": 2.0, "DKD": 2.4}
START = {"KD": "CE", "DKD": "KD"}


def parameters(stage: str, seed: int, **changes) -> dict:
    "What 05_students writes into args.json, as far as it matters here."
    p = dict(epochs=4, lr=1e-3, batch_size=32, device="cpu", backbone="net", stage=stage, seed=seed, softlabels="", init_from="",
             targets="labels", supervision="fused", train_view="hq_train", train_source="", img_size=48, manifest_dir="/a/manifests")
    if stage in START:
        p |= dict(softlabels="ensembles/four_way/softlabels", softlabels_sha256={"softlabels.npz": "ab12"}, kd_temperature=2.0, alpha=0.5,
                  beta=4.0, init_from=f"students/net_seed{seed}_{START[stage]}/best.pt", init_sha256=f"hash{seed}")
    return p | changes


@pytest.fixture(scope="module")
def nine(tmp_path_factory) -> Path:
    "Three stages by three seeds."
    root = tmp_path_factory.mktemp("summary")/"students"
    for seed in SEEDS:
        for stage, skill in SKILL.items(): arms.simulate_student(root/f"net_seed{seed}_{stage}", parameters(stage, seed), skill, N)
    return root


@pytest.fixture
def folder(nine, tmp_path) -> Path:
    "A copy that a test may spoil."
    return Path(shutil.copytree(nine, tmp_path/"students"))


def change_args(run: Path, drop=(), **changes):
    "Give a sealed run other parameters."
    args = RunArgs.load(run).parameters | changes
    RunArgs(stage="student", parameters={k: v for k, v in args.items() if k not in drop}).save(run)
    seal_folder(run, HashManifest.load(run).dataset_index_id)


def change_rows(run: Path, **arrays):
    "Give a sealed run another evaluation."
    write_npz(run/"evaluation.npz", **read_npz(run/"evaluation.npz") | arrays)
    seal_folder(run, HashManifest.load(run).dataset_index_id)


def shrink(run: Path, **more):
    "Turn a run into a small copy without weights, as the report keeps them."
    z = read_npz(run/"evaluation.npz")
    (run/"best.pt").unlink()
    write_npz(run/"evaluation.npz", test_logits=z["test_logits"].astype("float16"), test_labels=z["test_labels"].astype("int8"), **more)


# --- numbers


@pytest.mark.parametrize("values", [[0.6, 0.7], [0.61, 0.6, 0.64], [0.5]*4, list(np.linspace(0, 1, 11)**2)])
def test_seed_interval_is_students(values):
    got = summary.seed_interval(values)
    with np.errstate(invalid="ignore"): expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert got.mean == pytest.approx(np.mean(values)) and got.sd == pytest.approx(np.std(values, ddof=1))
    if got.sd > 0: assert (got.low, got.high) == pytest.approx(expected, abs=1e-12)
    else: assert got.low == got.high == got.mean


def test_one_seed_has_no_interval():
    got = summary.seed_interval([0.6])
    assert got.mean == 0.6 and np.isnan(got[1:]).all() and "±" not in got.show()
    assert np.isnan(summary.seed_interval([])).all()


def test_results_equal_scikit_learn(nine, tmp_path):
    summary.summarise_students(nine, tmp_path, resamples=20)
    table = pd.read_csv(tmp_path/summary.RESULTS).set_index(["arm", "source", "metric"])
    assert len(table) == 3*3*12 and list(table.columns) == ["convention", "n_seeds", "seeds", "n", "mean", "sd", "low", "high", "raw_mean"]
    for source in ("all", "studio", "wild"):
        values = {k: [] for k in ("accuracy", "macro_f1", "nll", "raw_nll", "f1_Disgust", "brier")}
        for seed in sorted(SEEDS):
            run = arms.read_student(nine/f"net_seed{seed}_KD")
            at = run.at(source)
            z, y = run.logits[at], run.labels[at]
            p = np.exp(z/run.temperature)/np.exp(z/run.temperature).sum(1, keepdims=True)
            raw = np.exp(z)/np.exp(z).sum(1, keepdims=True)
            f1 = sk.f1_score(y, z.argmax(1), labels=range(7), average=None, zero_division=0)
            for k, v in (("accuracy", (z.argmax(1) == y).mean()), ("macro_f1", f1.mean()), ("f1_Disgust", f1[1]),
                         ("nll", sk.log_loss(y, p, labels=range(7))), ("raw_nll", sk.log_loss(y, raw, labels=range(7))),
                         ("brier", ((p - np.eye(7)[y])**2).sum(1).mean())): values[k].append(v)
        for k in ("accuracy", "macro_f1", "nll", "f1_Disgust", "brier"):
            row, v = table.loc[("KD four_way", source, k)], values[k]
            assert (row["mean"], row["sd"]) == pytest.approx((np.mean(v), np.std(v, ddof=1)), abs=1e-9)
            assert (row["low"], row["high"]) == pytest.approx(stats.t.interval(0.95, 2, np.mean(v), stats.sem(v)), abs=1e-9)
            assert (row["n_seeds"], row["seeds"], row["n"]) == (3, "1;2;3", at.sum())
        assert table.loc[("KD four_way", source, "nll")]["raw_mean"] == pytest.approx(np.mean(values["raw_nll"]), abs=1e-9)
        assert np.isnan(table.loc[("KD four_way", source, "accuracy")]["raw_mean"])


def test_comparison_equals_a_plain_loop(folder, tmp_path):
    for run in folder.iterdir():  # 60 rows are enough for a loop
        z = read_npz(run/"evaluation.npz")
        change_rows(run, **{k: z[k][:60] for k in ("test_ids", "test_logits", "test_labels", "test_groups")})
    resamples, seed = 80, 11
    found = summary.summarise_students(folder, tmp_path, resamples, seed).comparisons.set_index(["arm_a", "arm_b", "source", "metric"])
    runs = {(s, k): arms.read_student(folder/f"net_seed{s}_{k}") for s in SEEDS for k in SKILL}
    for source in ("all", "wild"):
        at = np.flatnonzero(runs[1, "CE"].at(source))
        y, rng = runs[1, "CE"].labels[at], np.random.default_rng(seed)
        def scores(rows, key, y=y, at=at):
            pred = runs[key].logits[at].argmax(1)[rows]
            return np.mean(pred == y[rows]), sk.f1_score(y[rows], pred, labels=range(7), average="macro", zero_division=0)
        def difference(rows, scores=scores):
            return np.mean([np.subtract(scores(rows, (s, "DKD")), scores(rows, (s, "CE"))) for s in SEEDS], axis=0)
        drawn = np.array([difference(rng.integers(len(y), size=len(y))) for _ in range(resamples)])
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        for i, metric in enumerate(("accuracy", "macro_f1")):
            row = found.loc[("CE", "DKD four_way", source, metric)]
            here = difference(np.arange(len(y)))[i]
            assert (row["difference"], row["low"], row["high"]) == pytest.approx((here, low[i], high[i]), abs=1e-9)
            assert row["mean_b"] - row["mean_a"] == pytest.approx(here, abs=1e-12)
            assert row["excludes_0"] == (low[i] > 0 or high[i] < 0)


def test_resampling_is_that_of_calibration(nine):
    runs = arms.find_students(nine)
    here, drawn = summary.resampled_scores(runs[0].labels, [predictions(r.logits) for r in runs], 400, 5)
    for name, metric in (("accuracy", calibration.accuracy), ("macro_f1", calibration.macro_f1)):
        i = summary.SCORES.index(name)
        plain = paired_interval(metric, runs[0].logits, runs[-1].logits, runs[0].labels, resamples=400, seed=5)
        assert here[-1, i] - here[0, i] == pytest.approx(plain.value, abs=1e-12)
        assert np.quantile(drawn[-1, :, i] - drawn[0, :, i], [0.025, 0.975]) == pytest.approx((plain.low, plain.high), abs=1e-12)


def test_resampling_has_the_distribution_of_one_multinomial(nine):
    "Rows merged by label and predictions, drawn as one multinomial: the same means and deviations, up to chance."
    runs, resamples = arms.find_students(nine), 4000
    y, pred = runs[0].labels, np.array([predictions(r.logits) for r in runs])
    _, drawn = summary.resampled_scores(y, pred, resamples, 5)
    patterns, count = np.unique(np.vstack([y, pred]), axis=1, return_counts=True)
    assert 20 < len(count) < len(y) and count.sum() == len(y)
    weights = np.random.default_rng(6).multinomial(len(y), count/len(y), size=resamples)
    for run in (0, 4, 8):
        cells = np.eye(49)[patterns[0]*7 + patterns[1 + run]]
        merged, rows = summary.score_counts((weights @ cells).reshape(-1, 7, 7)), drawn[run]
        sd = rows.std(0)
        assert (np.abs(merged.mean(0) - rows.mean(0)) <= 5*sd*np.sqrt(2/resamples) + 1e-12).all()
        assert (np.abs(merged.std(0)/np.maximum(sd, 1e-12) - 1) <= 5*np.sqrt(1/resamples) + 0.02).all()


def test_mcnemar_is_given_seed_by_seed(nine):
    found = summary.compare_arms(arms.find_students(nine), 20)[0].set_index(["arm_a", "arm_b", "source", "metric"])
    row, p = found.loc[("CE", "KD four_way", "studio", "accuracy")], []
    for seed in sorted(SEEDS):
        a, b = (arms.read_student(nine/f"net_seed{seed}_{k}") for k in ("CE", "KD"))
        at = a.at("studio")
        right_a, right_b = ((r.logits.argmax(1) == r.labels)[at] for r in (a, b))
        only_a, only_b = (right_a & ~right_b).sum(), (right_b & ~right_a).sum()
        p.append(min(1.0, 2*stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)))
    assert [float(x) for x in row["mcnemar_p"].split(";")] == pytest.approx(p, rel=6e-3)
    assert row["mcnemar_largest_p"] == pytest.approx(max(p), rel=1e-9)
    assert pd.isna(found.loc[("CE", "KD four_way", "studio", "macro_f1")]["mcnemar_p"])


def test_seed_decides_every_number(nine, tmp_path):
    def bytes_of(name, seed):
        summary.summarise_students(nine, tmp_path/name, 200, seed)
        return [(tmp_path/name/f).read_bytes() for f in (summary.RESULTS, summary.COMPARISONS, summary.CLASS_GAINS)]
    first, again, other = bytes_of("a", 1), bytes_of("b", 1), bytes_of("c", 2)
    assert first == again
    assert first[0] == other[0] and first[1] != other[1] and first[2] != other[2]


def test_class_gains_add_up_to_macro_f1(nine):
    pairs, gains = summary.compare_arms(arms.find_students(nine), 50)
    assert set(gains["metric"]) == set(summary.F1_NAMES) and set(pairs["metric"]) == {"accuracy", "macro_f1"}
    keys = ["arm_a", "arm_b", "source"]
    by_class = gains.groupby(keys)["difference"].mean()
    macro = pairs[pairs["metric"] == "macro_f1"].set_index(keys)["difference"]
    pd.testing.assert_series_equal(by_class.sort_index(), macro.sort_index(), check_names=False)


# --- pictures in several rows


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> Path:
    "Two stages by two seeds; test rows come in pairs that show the same picture."
    root = tmp_path_factory.mktemp("twins")/"students"
    for seed in (1, 2):
        for stage in ("CE", "DKD"):
            arms.simulate_student(root/f"net_seed{seed}_{stage}", parameters(stage, seed), SKILL[stage], N, rows_a_picture=2)
    return root


def test_pictures_are_resampled_with_all_their_rows(twins):
    "Against a plain loop over drawn pictures."
    runs, resamples = arms.find_students(twins), 60
    found = summary.compare_arms(runs, resamples, 11)[0].set_index(["arm_a", "arm_b", "source", "metric"])
    a, b = (next(r for r in runs if (r.arm.stage, r.seed) == (k, 1)) for k in ("CE", "DKD"))
    assert (a.groups[0::2] == a.groups[1::2]).all() and len(set(a.groups.tolist())) == N//2
    rng, drawn = np.random.default_rng(11), []
    def gain(rows): return np.mean([(predictions(r.logits[rows]) == r.labels[rows]).mean()*sign for r in runs
                                    for sign in [1 if r.arm.stage == "DKD" else -1]])*2
    for _ in range(resamples):
        drawn.append(gain(np.concatenate([(2*i, 2*i + 1) for i in rng.integers(N//2, size=N//2)])))
    row = found.loc[("CE", "DKD four_way", "all", "accuracy")]
    assert (row["n"], row["pictures"]) == (N, N//2)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((gain(np.arange(N)), low, high), abs=1e-9)
    only_a, only_b, p = mcnemar(a.labels, a.logits, b.logits, a.groups)
    assert float(row["mcnemar_p"].split(";")[0]) == pytest.approx(p, rel=6e-3) and only_a + only_b < N//2


def test_runs_that_know_no_pictures_say_so(twins):
    runs = arms.find_students(twins)
    for r in runs: r.groups = None
    assert "nothing says which test rows show the same picture" in summary.remarks(runs)[-1]
    assert summary.compare_arms(runs, 20)[0]["pictures"].isna().all()


def test_the_remark_counts_pictures(twins): assert f"{N} test rows show {N//2} pictures" in str(summary.compare_students(twins, 20))


def test_runs_that_disagree_on_pictures_are_refused(twins, tmp_path):
    folder = Path(shutil.copytree(twins, tmp_path/"students"))
    change_rows(folder/"net_seed2_CE", test_groups=np.arange(N))
    with pytest.raises(GateError, match="net_seed2_CE is foreign: pictures of the test rows"): arms.find_students(folder)


def test_a_small_copy_finds_its_pictures_above(twins, tmp_path):
    "The kept copy of a run from before evaluation.npz named pictures: its manifest's small copy does."
    folder = Path(shutil.copytree(twins, tmp_path/"students"))
    z = read_npz(folder/"net_seed1_CE"/"evaluation.npz")
    known = pd.DataFrame({"id": z["test_ids"], "group": z["test_groups"].astype(str)})
    whole = summary.compare_arms(arms.find_students(folder), 50)[0]
    for run in folder.glob("net_*"): shrink(run, test_ids=read_npz(run/"evaluation.npz")["test_ids"])
    assert all(r.groups is None for r in arms.find_students(folder))
    write_row_groups(tmp_path/"manifests", known, "another-1")
    assert all(r.groups is None for r in arms.find_students(folder))
    write_row_groups(tmp_path/"manifests", known, "simulated-0")
    kept = summary.compare_arms(arms.find_students(folder), 50)[0]
    assert kept["pictures"].tolist() == whole["pictures"].tolist() and np.abs(kept["low"] - whole["low"]).max() < 0.02


# --- arms


def test_order_of_arms_and_pairs():
    arm = arms.Arm
    several = [arm("DKD", "pairwise", start="KD"), arm("KD", "pairwise", start="CE"), arm("CE"),
               arm("DKD", "four_way", "split", start="KD"), arm("DKD", "four_way", start="KD"), arm("CE", targets="votes")]
    labels = list(arms.arm_labels(several).values())
    assert labels == ["CE", "CE votes", "KD pairwise", "DKD four_way", "DKD four_way split", "DKD pairwise"]


def test_a_label_says_whatever_sets_an_arm_apart():
    base = dict(stage="KD", teacher="four_way", start="CE", img_size=48, backbone="net")
    changed = [base | c for c in ({}, {"teacher": "RN18_seed1_stageA"}, {"supervision": "split"}, {"targets": "votes"}, {"start": ""},
                                  {"start": "CE votes"}, {"train_source": "ferplus"}, {"train_view": "all"}, {"img_size": 64},
                                  {"backbone": "other"})]
    labels = arms.arm_labels(arms.Arm(**c) for c in changed).values()
    assert len(set(labels)) == len(changed)


def test_runs_without_the_new_arguments_are_read(folder):
    for run in folder.iterdir(): change_args(run, drop=("supervision", "targets", "train_source", "train_view", "alpha", "beta"))
    found = arms.find_students(folder)
    assert list(arms.arm_labels(r.arm for r in found).values()) == ["CE", "KD four_way", "DKD four_way"]
    change_args(folder/"net_seed1_CE", targets="labels")  # said and not said are the same here
    assert len(arms.find_students(folder)) == 9


def test_options_make_arms(folder):
    change_args(folder/"net_seed1_KD", supervision="split")
    change_args(folder/"net_seed2_KD", targets="votes")
    change_args(folder/"net_seed3_KD", init_from="")
    labels = list(arms.arm_labels(r.arm for r in arms.find_students(folder)).values())
    assert set(labels) == {"CE", "KD four_way split", "KD four_way votes", "KD four_way from scratch", "DKD four_way"}


@pytest.mark.parametrize("changes", [
    dict(device="cuda"), dict(manifest_dir="/b/manifests"), dict(init_sha256="other"), dict(cache_dir="c/48"),
    dict(softlabels="/elsewhere/four_way/softlabels")])
def test_paths_and_devices_may_differ(folder, changes):
    change_args(folder/"net_seed1_KD", **changes)
    assert len({r.arm for r in arms.find_students(folder)}) == 3


def test_distillation_does_not_act_on_ce(folder):
    change_args(folder/"net_seed1_CE", kd_temperature=4.0, beta=1.0, supervision="split")
    assert len({r.arm for r in arms.find_students(folder)}) == 3


# --- refusals


@pytest.mark.parametrize(("stage", "key", "value"), [
    ("CE", "epochs", 8), ("CE", "lr", 3e-4), ("CE", "batch_size", 64), ("KD", "kd_temperature", 4.0), ("KD", "alpha", 0.7),
    ("DKD", "beta", 1.0), ("KD", "softlabels_sha256", {"softlabels.npz": "cd34"}), ("CE", "augment", {"erase": 0.0})])
def test_unlike_recipes_in_an_arm_are_refused(folder, stage, key, value):
    change_args(folder/f"net_seed3_{stage}", **{key: value})
    with pytest.raises(GateError, match=rf"net_seed3_{stage}: {key} is .*runs of one arm may differ in nothing but their seed"):
        arms.find_students(folder)


def test_two_runs_of_one_arm_and_seed_are_refused(folder):
    change_args(folder/"net_seed3_KD", seed=1, epochs=9)
    said = r"net_seed3_KD and net_seed1_KD are both 'KD four_way' with seed 1 \(they differ in epochs\): leave one out"
    with pytest.raises(GateError, match=said): arms.find_students(folder)
    change_args(folder/"net_seed3_KD", epochs=4)
    with pytest.raises(GateError, match="both 'KD four_way' with seed 1: leave one out"): arms.find_students(folder)


def spoil(folder: Path, how: str):
    run = folder/"net_seed2_KD"
    z = read_npz(run/"evaluation.npz")
    match how:
        case "unsealed": (run/"hash_manifest.json").unlink()
        case "changed": (run/"calibration.json").write_text((run/"calibration.json").read_text() + "\n")
        case "weights gone": (run/"best.pt").unlink()
        case "truncated": (run/"evaluation.npz").write_bytes((run/"evaluation.npz").read_bytes()[:500])
        case "no args": (run/"args.json").write_text("{")
        case "other ids": change_rows(run, test_ids=np.char.add(z["test_ids"], "x"))
        case "fewer rows": change_rows(run, **{k: z[k][1:] for k in ("test_ids", "test_logits", "test_labels", "test_groups")})
        case "other labels": change_rows(run, test_labels=(z["test_labels"] + 1) % 7)
        case "no seed": change_args(run, drop=("seed",))
        case "other dataset":
            shutil.rmtree(run)
            arms.simulate_student(run, parameters("KD", 2), 2.0, N, "other-9")


@pytest.mark.parametrize(("how", "says"), [
    ("unsealed", "is unfinished"), ("changed", "was changed after its folder was sealed"), ("weights gone", "best.pt: is missing"),
    ("truncated", "evaluation.npz"), ("no args", "is not whole JSON"), ("other ids", "is foreign: test ids"),
    ("fewer rows", "is foreign: test ids"), ("other labels", "is foreign: test labels"), ("no seed", "key 'seed'"),
    ("other dataset", "is foreign: dataset_index_id other-9, not simulated-0")])
def test_a_spoiled_run_is_refused_by_name_and_nothing_is_written(folder, how, says):
    spoil(folder, how)
    with pytest.raises(GateError) as e: summary.summarise_students(folder, resamples=20)
    assert "net_seed2_KD" in str(e.value) and says in str(e.value)
    assert not list(folder.glob("*.csv"))


def test_empty_and_missing_folders(tmp_path):
    for where, says in ((tmp_path, "holds no student run"), (tmp_path/"none", "is no folder")):
        with pytest.raises(UsageError, match=says): summary.summarise_students(where)


def test_too_few_resamples(nine):
    with pytest.raises(UsageError, match="resamples 1: give at least 2"): summary.summarise_students(nine, resamples=1)


def test_other_stages_and_hidden_folders_are_no_students(folder):
    RunArgs(stage="teacher", parameters={"arch": "RN18"}).save(folder/"teacher")
    shutil.copytree(folder/"net_seed1_CE", folder/".cache"/"net_seed1_CE")
    assert len(arms.find_students(folder)) == 9
    assert [r.name for r in arms.find_students(folder/"net_seed1_CE")] == ["net_seed1_CE"]


def test_rows_in_another_order_are_joined_by_id(folder):
    before, run = summary.compare_arms(arms.find_students(folder), 50), folder/"net_seed2_KD"
    z, order = read_npz(run/"evaluation.npz"), np.random.default_rng(0).permutation(N)
    change_rows(run, **{k: z[k][order] for k in ("test_ids", "test_logits", "test_labels", "test_groups")})
    for a, b in zip(before, summary.compare_arms(arms.find_students(folder), 50)): pd.testing.assert_frame_equal(a, b)


# --- seeds that are missing


def test_pairs_are_compared_on_common_seeds(folder):
    shutil.rmtree(folder/"net_seed2_KD")
    found = summary.summarise_students(folder, resamples=50)
    row = found.comparisons.set_index(["arm_a", "arm_b", "source", "metric"]).loc[("CE", "KD four_way", "all", "accuracy")]
    accuracy = {(r.arm.stage, r.seed): (r.logits.argmax(1) == r.labels).mean() for r in found.runs}
    assert (row["seeds"], row["n_seeds"]) == ("1;3", 2)
    assert row["difference"] == pytest.approx(np.mean([accuracy["KD", s] - accuracy["CE", s] for s in (1, 3)]))
    assert row["mean_a"] == pytest.approx(np.mean([accuracy["CE", s] for s in (1, 3)]))
    assert "KD four_way lacks seed 2" in str(found)


def test_arms_without_a_common_seed_say_so(folder):
    for run in ("net_seed2_KD", "net_seed3_KD", "net_seed1_CE", *(f"net_seed{s}_DKD" for s in SEEDS)): shutil.rmtree(folder/run)
    found = summary.summarise_students(folder, resamples=50)
    assert (found.comparisons["n_seeds"] == 0).all() and found.comparisons[["difference", "low", "high"]].isna().all(axis=None)
    assert not found.comparisons["excludes_0"].any() and "CE and KD four_way share no seed" in str(found)


def test_one_seed_leaves_its_columns_empty(folder, tmp_path):
    for s in (2, 3):
        for k in SKILL: shutil.rmtree(folder/f"net_seed{s}_{k}")
    found = summary.summarise_students(folder, tmp_path, resamples=50)
    table, pairs = pd.read_csv(tmp_path/summary.RESULTS), pd.read_csv(tmp_path/summary.COMPARISONS)
    assert table[["sd", "low", "high"]].isna().all(axis=None) and table["mean"].notna().all()
    assert pairs[["low", "high"]].notna().all(axis=None) and pairs[["seeds_low", "seeds_high"]].isna().all(axis=None)
    assert "one seed only" in str(found) and "±" not in str(found).split("Differences")[0].split("\n", 2)[2]


def test_remarks_name_unequal_recipes_and_borrowed_starts(folder):
    for s in SEEDS: change_args(folder/f"net_seed{s}_DKD", epochs=8)
    change_args(folder/"net_seed2_KD", init_from="students/net_seed1_CE/best.pt")
    told = "\n".join(summary.remarks(arms.find_students(folder)))
    assert "epochs (CE: 4, KD four_way: 4, DKD four_way: 8)" in told
    assert "net_seed2_KD starts from weights of seed 1" in told


# --- small copies


def test_small_copies_are_read_like_the_runs(folder):
    whole = summary.summarise_students(folder, resamples=50)
    for run in folder.glob("net_*"): shrink(run, test_ids=read_npz(run/"evaluation.npz")["test_ids"])
    kept = summary.summarise_students(folder, resamples=50)
    assert all(r.kept for r in kept.runs) and "9 of 9 runs are small copies" in str(kept)
    assert np.abs(whole.table["mean"] - kept.table["mean"]).max() < 0.01


def test_small_copies_without_ids_need_their_sources_in_blocks(folder):
    run = folder/"net_seed1_CE"
    shrink(run)
    with pytest.raises(GateError, match="net_seed1_CE: this small copy doesn't say which test row is of which source"):
        arms.read_student(run)


@pytest.mark.parametrize(("spoiled", "says"), [
    ("args.json", "was changed"), ("calibration.json", "is missing"), ("evaluation.npz", "confusion matrix")])
def test_a_spoiled_small_copy_is_refused(folder, spoiled, says):
    run = folder/"net_seed1_CE"
    z = read_npz(run/"evaluation.npz")
    shrink(run, test_ids=z["test_ids"])
    match spoiled:
        case "args.json": RunArgs(stage="student", parameters=parameters("CE", 77)).save(run)
        case "calibration.json": (run/spoiled).unlink()
        case _:
            write_npz(run/spoiled, **read_npz(run/spoiled) | {"test_logits": np.roll(z["test_logits"], 1, 1).astype("float16")})
    with pytest.raises(ArtifactError, match=says): arms.read_student(run)


def test_reference_students(tmp_path):
    "The students that are kept: their sealed metrics come out again."
    folder = ROOT/"runs"/"reference"/"gpu"/"students"
    found = summary.summarise_students(folder, tmp_path, resamples=20)
    assert len(found.parts) == 2  # a convention each
    for part, metric in itertools.product(found.parts, ("accuracy", "macro_f1", "nll", "ece")):
        sealed = {r.name: getattr(ReliabilityMetrics.load(folder/r.name), metric).value for r in part.runs}
        for arm, runs in part.arms.items():
            assert part.get(arm, "all", metric).mean == pytest.approx(np.mean([sealed[r.name] for r in runs]), abs=3e-3)


# --- pictures


def test_pictures_need_what_they_show(folder):
    found = summary.summarise_students(folder, resamples=50)
    axes = summary_plots.stage_plot(found).axes
    assert len(axes) == 2*3 and axes[0].get_title() == f"all, n = {N}"
    gains = summary_plots.class_gain_plot(found)
    assert [t.get_text().split(",")[0] for t in gains.axes[0].get_yticklabels()][0] == "Disgust"  # the rarest
    for run in folder.glob("net_*KD"): shutil.rmtree(run)
    with pytest.raises(UsageError, match="one arm only"): summary_plots.class_gain_plot(summary.summarise_students(folder, resamples=50))
