"""Calibration against second implementations (scikit-learn, torchmetrics, formulas written out), invariants, and refusals."""
import subprocess
import sys
from math import ceil, comb

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize_scalar
from scipy.stats import binom
from sklearn import metrics as sk
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError, MulticlassConfusionMatrix

from fer_nb import adaptation, manifests, reliability, resampling, run_report, selective
from fer_nb import calibration as cal
from fer_nb.artifacts import CLASSES, GateError, UsageError, write_npz
from fer_nb.leaves import check_run_seal, seal_folder
from fer_nb.records import Calibration, HashManifest, ReliabilityMetrics, SelectiveReport

GRID = [(n, k, spread, seed) for n in (1, 13, 200, 1500) for k in (2, 7) for spread in (0.1, 2.0, 8.0) for seed in (0, 1)]
HARD = [*reliability.METRICS.values(), selective.aurc, selective.excess_aurc]


def draw(n, k, spread, seed):
    "Logits and labels without any relation between them, some classes absent in small draws."
    rng = np.random.default_rng(seed)
    return rng.normal(0, spread, (n, k)), rng.integers(k, size=n)


@pytest.mark.parametrize(("n", "k", "spread", "seed"), GRID)
def test_metrics_equal_scikit_learn(n, k, spread, seed):
    z, y = draw(n, k, spread, seed)
    p, pred, every = cal.softmax(z), z.argmax(1), np.arange(k)
    assert cal.accuracy(z, y) == pytest.approx(sk.accuracy_score(y, pred), abs=1e-12)
    assert cal.macro_f1(z, y) == pytest.approx(sk.f1_score(y, pred, labels=every, average="macro", zero_division=0), abs=1e-12)
    np.testing.assert_array_equal(cal.confusion(z, y), sk.confusion_matrix(y, pred, labels=every))
    table = cal.per_class(z, y)
    expected = sk.precision_recall_fscore_support(y, pred, labels=every, zero_division=0)
    for column, values in zip(("precision", "recall", "f1", "support"), expected):
        np.testing.assert_allclose(table[column], values, atol=1e-12)
    assert cal.nll(z, y) == pytest.approx(torch.nn.functional.cross_entropy(torch.tensor(z), torch.tensor(y)).item(), abs=1e-9)
    if p.min() > np.finfo(float).eps:  # scikit-learn clips smaller probabilities, which hides how wrong a sure model is
        assert cal.nll(z, y) == pytest.approx(sk.log_loss(y, p, labels=every), abs=1e-9)
        assert cal.brier(z, y) == pytest.approx(sk.brier_score_loss(y, p, labels=every, scale_by_half=False), abs=1e-9)
    assert cal.brier(z, y) == pytest.approx(((p - np.eye(k)[y])**2).sum()/n, abs=1e-12)


@pytest.mark.parametrize(("n", "k", "spread", "seed"), GRID)
@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_errors_equal_torchmetrics(n, k, spread, seed, bins):
    z, y = draw(n, k, spread, seed)
    z += 1e-3*np.arange(k)  # away from the bins' edges, where the two bin differently
    p, ty = torch.tensor(cal.softmax(z)), torch.tensor(y)
    theirs = MulticlassCalibrationError(num_classes=k, n_bins=bins, norm="l1")(p, ty)
    assert cal.ece(z, y, bins=bins) == pytest.approx(float(theirs), abs=2e-6)
    each = [float(BinaryCalibrationError(n_bins=bins, norm="l1")(p[:, c], (ty == c).int())) for c in range(k)]
    assert cal.classwise_ece(z, y, bins=bins) == pytest.approx(np.mean(each), abs=2e-6)
    np.testing.assert_array_equal(cal.confusion(z, y), MulticlassConfusionMatrix(num_classes=k)(p, ty).numpy())


@pytest.mark.parametrize(("n", "k", "spread", "seed"), [g for g in GRID if g[0] % 15 == 0 and g[2] < 8])
def test_equal_mass_ece_equals_sorting_and_splitting(n, k, spread, seed):
    "Without equal confidences, and with n a multiple of the bins, equal mass means sorting and cutting."
    z, y = draw(n, k, spread, seed)
    p = cal.softmax(z)
    order = np.argsort(p.max(1))
    gap = (p.max(1) - (p.argmax(1) == y))[order]
    assert len(set(p.max(1))) == n
    assert cal.ece_equal_mass(z, y) == pytest.approx(sum(abs(g.sum()) for g in np.array_split(gap, 15))/n, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_soft_metrics_equal_their_formulas(seed):
    rng = np.random.default_rng(seed)
    z, votes = rng.normal(0, 2, (300, 7)), rng.multinomial(10, [1/7]*7, size=300)
    p, q = cal.softmax(z), votes/10
    assert cal.soft_nll(z, votes) == pytest.approx(-np.mean([sum(q[i]*np.log(p[i])) for i in range(300)]), abs=1e-12)
    total = 0.0
    for b in range(15):
        rows = [i for i in range(300) if b/15 < p[i].max() <= (b + 1)/15]
        total += abs(sum(p[i].max() - q[i, p[i].argmax()] for i in rows))
    assert cal.soft_ece(z, votes) == pytest.approx(total/300, abs=1e-12)
    assert cal.soft_nll(z, votes) >= -(q*np.log(np.where(q > 0, q, 1))).sum(1).mean()


finite = st.floats(-30, 30, allow_nan=False, width=32)


@st.composite
def rows(draw, min_rows=1, max_rows=30):
    n, k = draw(st.integers(min_rows, max_rows)), draw(st.integers(2, 8))
    z = draw(hnp.arrays(np.float64, (n, k), elements=finite))
    return z, draw(hnp.arrays(np.int64, n, elements=st.integers(0, k - 1)))


@settings(deadline=None, max_examples=60)
@given(rows())
def test_values_stay_in_range(data):
    z, y = data
    for metric in (cal.ece, cal.ece_equal_mass, cal.classwise_ece, cal.accuracy, cal.macro_f1, selective.aurc, selective.excess_aurc):
        assert -1e-12 <= metric(z, y) <= 1 + 1e-12
    assert 0 <= cal.brier(z, y) <= 2 + 1e-12 and cal.nll(z, y) >= -1e-12
    np.testing.assert_allclose(cal.softmax(z).sum(1), 1, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(rows(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(data, random):
    z, y = data
    order = list(range(len(y)))
    random.shuffle(order)
    for metric in HARD: assert metric(z[order], y[order]) == pytest.approx(metric(z, y), abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(rows(), st.data())
def test_weights_are_repeated_rows(data, more):
    z, y = data
    w = np.array(more.draw(st.lists(st.integers(0, 4), min_size=len(y), max_size=len(y)).filter(any)))
    again = np.repeat(np.arange(len(y)), w)
    for metric in HARD:
        assert metric(z, y, weights=w[None].astype(float))[0] == pytest.approx(metric(z[again], y[again]), abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(rows(), st.floats(0.05, 50))
def test_a_global_temperature_only_rescales(data, t):
    z, y = data
    np.testing.assert_array_equal(cal.predictions(z, t), cal.predictions(z))
    assert cal._same_predictions(z, t)
    assert cal.macro_f1(z, y, t) == cal.macro_f1(z, y)
    assert cal.nll(z, y, t) == pytest.approx(cal.nll(z/t, y), abs=1e-9)
    assert cal.nll(z + 5, y, t) == pytest.approx(cal.nll(z, y, t), abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(rows(), st.randoms(use_true_random=False))
def test_renaming_classes_changes_nothing(data, random):
    z, y = data
    z = z + 1e-4*np.arange(z.shape[1])/7  # ties go to the first class, and renaming moves the first
    renamed = list(range(z.shape[1]))
    random.shuffle(renamed)
    other = np.empty_like(z)
    other[:, renamed] = z
    ties = (np.sort(z, 1)[:, -1] == np.sort(z, 1)[:, -2]).any()
    for metric in (cal.nll, cal.brier, cal.classwise_ece) + (() if ties else (cal.accuracy, cal.macro_f1, cal.ece)):
        assert metric(other, np.array(renamed)[y]) == pytest.approx(metric(z, y), abs=1e-9)


def test_softmax_is_float64_and_finite_for_float16_and_extremes():
    z = np.array([[60000, -60000, 0]], dtype=np.float16)
    assert cal.softmax(z).dtype == np.float64
    assert cal.nll(z, [1]) == pytest.approx(119936.0, rel=1e-3)
    assert np.isfinite(cal.log_softmax(z, 0.01)).all()


@pytest.mark.parametrize("factor", [0.2, 0.5, 1.7, 2.5, 12.0, 30.0])
def test_a_known_factor_comes_back(factor):
    z, y = cal.simulate_logits(2000, seed=5)
    base = cal.fit_temperature(z, y)
    scaled = cal.fit_temperature(z*factor, y)
    assert scaled.temperature/base.temperature == pytest.approx(factor, abs=1e-3)
    assert abs(scaled.gradient) < 1e-9


@pytest.mark.parametrize(("seed", "n", "factor"), [(0, 50, 2.5), (1, 500, 0.7), (2, 5000, 20)])
def test_the_temperature_is_scipys_minimum(seed, n, factor):
    z, y = cal.simulate_logits(n, factor, seed=seed)
    found = minimize_scalar(lambda log_t: sk.log_loss(y, cal.softmax(z/np.exp(log_t)), labels=range(7)),
                            bounds=(-4, 6), method="bounded", options={"xatol": 1e-9})
    assert cal.fit_temperature(z, y).temperature == pytest.approx(np.exp(found.x), rel=1e-4)


def test_calibrated_labels_give_the_factor_within_sampling_error():
    fits = [cal.fit_temperature(*cal.simulate_logits(4000, 2.5, seed=s)).temperature for s in range(20)]
    assert np.mean(fits) == pytest.approx(2.5, abs=3*np.std(fits)/np.sqrt(20))


@pytest.mark.parametrize(("z", "y", "says"), [
    (np.eye(7)*9, np.arange(7), "NLL falls without end as T goes to 0"),
    (np.eye(7)*9, (np.arange(7) + 1) % 7, "check the class order"),
    (np.zeros((5, 7)), np.zeros(5, int), "no temperature changes anything"),
    (np.full((5, 7), np.nan), np.zeros(5, int), "in 5 of 5 rows"),
])
def test_no_minimum_is_refused(z, y, says):
    with pytest.raises(GateError, match=says) as e: cal.fit_temperature(z, y)
    assert e.value.exit_code == 1 and "\n" not in str(e.value)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_a_minimum_outside_the_bounds_is_refused(factor):
    z, y = cal.simulate_logits(500)
    with pytest.raises(GateError, match="below 0.01" if factor < 1 else "above 1000"): cal.fit_temperature(z*factor, y)


@pytest.mark.parametrize(("factor", "grid"), [(0.1, cal.PLAN_GRID), (2.5, cal.PLAN_GRID), (60, cal.PLAN_GRID), (3, [1.0]), (3, [9, 8])])
def test_the_grid_grows_until_the_optimum_is_inside(factor, grid):
    z, y = cal.simulate_logits(1000, factor)
    got = cal.select_temperature(z, y, grid)
    scores = got.table.set_index("T").NLL.drop(got.fit.temperature)
    assert scores.index[0] < scores.idxmin() < scores.index[-1]
    assert not got.at_grid_bound and got.grid_grown == (len(scores) > len(grid))
    assert set(grid) <= set(got.table["T"]) and got.fit.temperature in set(got.table["T"])
    assert got.temperature == pytest.approx(got.fit.temperature, rel=1e-2)


def test_a_grid_that_may_not_grow_says_where_it_stands():
    z, y = cal.simulate_logits(1000, 30)
    got = cal.select_temperature(z, y, grow=False)
    assert got.at_grid_bound and not got.grid_grown


def test_macro_f1_that_changes_with_t_is_refused(monkeypatch):
    z, y = cal.simulate_logits(200)
    monkeypatch.setattr(cal, "macro_f1", lambda z, y, t: sk.f1_score(y, z.argmax(1), average="macro") + 0.01*t)
    with pytest.raises(GateError, match="changed predictions"): cal.select_temperature(z, y)


def test_predictions_that_change_with_t_are_refused(monkeypatch):
    z, y = cal.simulate_logits(200)
    monkeypatch.setattr(cal, "log_softmax", lambda z, t=1.0: -np.abs(np.asarray(z) - t))
    assert not cal._same_predictions(z, 2.0)


@pytest.mark.parametrize("grid", [[], [0, 1], [1, np.nan], [-1]])
def test_a_bad_grid_is_refused(grid):
    with pytest.raises(UsageError, match="grid"): cal.select_temperature(*cal.simulate_logits(100), grid)


def test_bootstrap_equals_a_plain_loop():
    z, y = cal.simulate_logits(150, 2.0)
    rng = np.random.default_rng(9)
    draws = rng.integers(150, size=(200, 150))
    for metric in (cal.ece, cal.macro_f1, cal.ece_equal_mass, cal.brier):
        slow = [metric(z[d], y[d]) for d in draws]
        got = resampling.bootstrap_interval(metric, z, y, resamples=200, seed=9)
        assert [got.low, got.high] == pytest.approx(np.quantile(slow, [0.025, 0.975]).tolist(), abs=1e-9)


def test_bootstrap_covers():
    "95% intervals of accuracy hold the truth in about 95 of 100 draws (300 draws, n = 200)."
    z, y = cal.simulate_logits(200_000, seed=0)
    truth, inside = cal.accuracy(z, y), []
    for s in range(300):
        part = slice(200*s, 200*(s + 1))
        got = resampling.bootstrap_interval(cal.accuracy, z[part], y[part], resamples=400, seed=s)
        inside.append(got.low <= truth <= got.high)
    assert 0.90 <= np.mean(inside) <= 0.98


def test_chunks_do_not_change_the_number_of_resamples():
    assert sum(len(w) for w in resampling.weight_chunks(100, 1000, seed=0, entries=700)) == 1000
    w = np.concatenate(list(resampling.weight_chunks(100, 1000, seed=0, entries=700)))
    assert (w.sum(1) == 100).all() and w.std() == pytest.approx(np.sqrt(0.99), abs=0.01)


def test_paired_intervals_find_a_small_true_difference():
    z, y = cal.simulate_logits(2000, 2.0)
    got = resampling.paired_interval(cal.nll, z, z, y, (1.0, 2.0), resamples=300)
    assert got.value == pytest.approx(cal.nll(z, y, 2) - cal.nll(z, y)) and got.high < 0
    with pytest.raises(UsageError, match="the same rows"): resampling.paired_interval(cal.nll, z, z[1:], y)


@pytest.mark.parametrize(("n", "c"), [(1, 0.3), (20, 0.9), (100, 0.5)])
def test_null_ece_equals_the_binomial(n, c):
    "With one confidence there is one bin, and the mean of |hits/n - c| has a closed form."
    hits = np.arange(n + 1)
    exact = (np.abs(hits/n - c)*binom.pmf(hits, n, c)).sum()
    assert cal.null_ece(np.full(n, c), resamples=20_000).mean == pytest.approx(exact, rel=0.02)


def test_null_ece_p95_rejects_a_calibrated_model_one_time_in_twenty():
    beyond = []
    for s in range(300):
        z, y = cal.simulate_logits(300, seed=s)
        beyond.append(cal.ece(z, y) > cal.null_ece(cal.softmax(z).max(1), resamples=300, seed=s).p95)
    assert 0.02 <= np.mean(beyond) <= 0.09


def test_the_vector_is_rarely_accepted_where_one_temperature_is_the_truth():
    "Two standard errors: 0 to 0.5% of 200 draws each at n = 500, 1,000, 3,589; one standard error: 12 to 18%."
    reports = [adaptation.fit_vector_temperature(*cal.simulate_logits(500, 2.5, seed=s), seed=s) for s in range(60)]
    assert sum(r.accepted for r in reports) <= 2
    loose = [r.cv_nll_scalar - r.cv_nll_vector > r.cv_gain_se for r in reports]
    assert sum(loose) > sum(r.accepted for r in reports)
    assert all(r.temperatures == [r.scalar]*7 for r in reports if not r.accepted)


def test_a_vector_that_is_there_is_found():
    true = np.array([1, 1.5, 2, 2.5, 3, 1.2, 1.8])
    z, y = cal.simulate_logits(3000, seed=3)
    z = (z - z.mean(1, keepdims=True))*true
    got = adaptation.fit_vector_temperature(z, y)
    assert got.accepted and got.temperatures == got.fitted
    assert got.cv_nll_vector < got.cv_nll_scalar - 2*got.cv_gain_se
    centred = z - z.mean(1, keepdims=True)
    assert got.argmax_flips == ((centred/got.fitted).argmax(1) != z.argmax(1)).sum() > 0
    assert got.macro_f1_vector == pytest.approx(sk.f1_score(y, (centred/got.fitted).argmax(1), average="macro"))
    assert got.macro_f1_scalar == pytest.approx(sk.f1_score(y, z.argmax(1), average="macro"))
    for folds in (1, 10_000):
        with pytest.raises(UsageError, match="folds"): adaptation.fit_vector_temperature(z, y, folds=folds)


def test_stratified_folds_are_even_in_every_class():
    y = np.random.default_rng(0).choice(7, 503, p=[.4, .02, .1, .2, .1, .1, .08])
    fold = resampling.stratified_folds(y, 5, seed=1)
    for c in range(7):
        counts = np.bincount(fold[y == c], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert (fold != resampling.stratified_folds(y, 5, seed=2)).any()


NAMES = dict(model_name="m", dataset_index_id="d-000000000000", resamples=50)


def test_calibrate_writes_what_it_measured(tmp_path):
    zv, yv = cal.simulate_logits(800, 20, seed=1)
    zt, yt = cal.simulate_logits(700, 20, seed=2)
    votes = np.full(zt.shape, np.nan)
    votes[:300] = cal.softmax(zt[:300], 20)
    calibration, reliability = run_report.calibrate(zv, yv, zt, yt, votes=votes, **NAMES)
    assert calibration.grid_grown and not calibration.at_grid_bound and calibration.n == 800
    assert calibration.metrics["NLL"][calibration.grid.index(calibration.selected_temperature)] == min(calibration.metrics["NLL"])
    assert reliability.n == 700 and reliability.n_votes == 300 and reliability.split == "test"
    assert reliability.temperature == calibration.selected_temperature
    assert reliability.ece.value == pytest.approx(cal.ece(zt, yt, reliability.temperature), abs=1e-12)
    assert reliability.uncalibrated["nll"] == pytest.approx(cal.nll(zt, yt))
    assert reliability.soft_nll.value == pytest.approx(cal.soft_nll(zt[:300], votes[:300], reliability.temperature))
    assert np.sum(reliability.confusion) == 700 and [c.name for c in reliability.per_class] == list(CLASSES)
    for artifact, cls in ((calibration, Calibration), (reliability, ReliabilityMetrics)):
        artifact.save(tmp_path)
        assert cls.load(tmp_path) == artifact
    again = run_report.calibrate(zv, yv, zt, yt, votes=votes, **NAMES)
    assert again[1] == reliability and again[0].selected_temperature == calibration.selected_temperature


def test_the_same_rows_are_refused():
    zv, yv = cal.simulate_logits(300, 2, seed=1)
    zt, yt = cal.simulate_logits(300, 2, seed=2)
    ids, others = [f"a/{i}" for i in range(300)], [f"b/{i}" for i in range(299)] + ["a/7"]
    with pytest.raises(GateError, match="1 rows stand in validation and test, for instance a/7"):
        run_report.calibrate(zv, yv, zt, yt, val_ids=ids, test_ids=others, **NAMES)
    with pytest.raises(GateError, match="100% of the test rows"): run_report.calibrate(zv, yv, zv[::-1], yv[::-1], **NAMES)
    with pytest.raises(UsageError, match="repeats"): run_report.calibrate(zv, yv, zt, yt, val_ids=["x"]*300, **NAMES)
    with pytest.raises(UsageError, match="2 test_ids for 300 rows"): run_report.calibrate(zv, yv, zt, yt, test_ids=["x", "y"], **NAMES)


def test_cross_fitting_never_uses_a_rows_own_label():
    "Each fold's rows are divided by the temperature of the others, and scrambling a fold's own labels doesn't move it."
    z, y = cal.simulate_logits(400, 3)
    fold, out = resampling.stratified_folds(y, 5, 1337), selective.cross_fitted_logits(z, y, 5, 1337)
    temperatures = set()
    for f in range(5):
        own, others = fold == f, fold != f
        t = cal.fit_temperature(z[others], y[others]).temperature
        np.testing.assert_allclose(out[own], z[own]/t, rtol=1e-9)
        temperatures.add(round(t, 9))
    assert len(temperatures) == 5
    _, crossed = run_report.calibrate(z, y, **NAMES)
    assert crossed.split == "val, cross-fitted in 5 folds"
    assert crossed.nll.value == pytest.approx(cal.nll(out, y)) and crossed.nll.value > cal.fit_temperature(z, y).nll


@pytest.mark.parametrize(("call", "says"), [
    (lambda z, y: cal.nll(z[0], y), "shape"),
    (lambda z, y: cal.nll(z[:0], y[:0]), "N >= 1"),
    (lambda z, y: cal.nll(z, y[:-1]), "one class number for each row"),
    (lambda z, y: cal.nll(z, y - 1), "whole numbers from 0 to 6"),
    (lambda z, y: cal.nll(z, y.astype(float)), "whole numbers"),
    (lambda z, y: cal.nll(z, y, -1), "above 0"),
    (lambda z, y: cal.nll(z, y, [1, 2]), "give one number, or 7"),
    (lambda z, y: cal.soft_nll(z, z), "votes of row"),
    (lambda z, y: reliability.evaluate(z, y, votes=z[:, :3]), "votes have shape"),
    (lambda z, y: reliability.evaluate(z, y, [1.0]*7), "takes one temperature"),
    (lambda z, y: run_report.calibrate(z[:, :5], y % 5, **NAMES), "give 7, in the order"),
    (lambda z, y: selective.accuracy_at_coverage(z, y, coverages=[0.5, 1.1]), "above 0 and up to 1"),
    (lambda z, y: selective.conformal_threshold(z, y, miss=0), "miss 0: give a share"),
    (lambda z, y: selective.prediction_sets(z, np.nan), "threshold nan: give a probability"),
    (lambda z, y: resampling.mcnemar(y, z, z[:-1]), "one class number for each row"),
    (lambda z, y: resampling.mcnemar(y % 6, z, z[:, :6]), "the same classes"),
    (lambda z, y: selective.selective_report(z[:, :5], y % 5, z, y, 1.0, **NAMES), "give 7, in the order"),
    (lambda z, y: selective.selective_report(z, y, z + 1, y, [1.0]*7, **NAMES), "takes one temperature"),
    (lambda z, y: selective.selective_report(z, y, z + 1, y, 1.0, val_ids=["x"]*50, **NAMES), "val_ids hold repeats"),
])
def test_wrong_arguments_get_one_clear_line(call, says):
    with pytest.raises(UsageError, match=says) as e: call(*cal.simulate_logits(50))
    assert e.value.exit_code == 2 and "\n" not in str(e.value)


def test_plots_draw_what_the_metrics_say():
    z, y = cal.simulate_logits(500, 2)
    fig = reliability.reliability_diagram(z, y, (1, 2), "t")
    assert f"ECE {cal.ece(z, y):.4f}" in fig.axes[0].get_title() and f"ECE {cal.ece(z, y, 2):.4f}" in fig.axes[1].get_title()
    assert "n = 500" in fig.axes[0].get_title() and "null ECE" in fig.axes[0].get_title()
    counts = fig.axes[2].patches
    assert sum(b.get_height() for b in counts) == 500
    panels = [a for a in reliability.classwise_diagram(z, y).axes if a.get_title()]
    assert len(panels) == 7 and all(name in a.get_title() for name, a in zip(CLASSES, panels))
    texts = [t.get_text().split("\n")[0] for t in reliability.confusion_plot(cal.confusion(z, y)).axes[0].texts]
    assert texts == [str(v) for v in cal.confusion(z, y).ravel()]


def test_the_module_stays_light():
    code = "import sys, fer_nb.calibration; print([m for m in ('torch', 'fastai', 'cv2', 'sklearn', 'scipy.stats') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_bins_are_closed_above_as_in_the_paper():
    edges = np.linspace(0, 1, 16)
    np.testing.assert_array_equal(cal.bin_index(edges), [0, *range(15)])
    np.testing.assert_array_equal(cal.bin_index(np.nextafter(edges[1:-1], 2)), range(1, 15))


@pytest.mark.parametrize("t", [0.3, 1.0, 4.0])
def test_the_slope_is_the_derivative_by_log_t(t):
    z, y = cal.simulate_logits(300, 2)
    log_t = torch.tensor(np.log(t), requires_grad=True)
    torch.nn.functional.cross_entropy(torch.tensor(z)/log_t.exp(), torch.tensor(y)).backward()
    assert cal.nll_slope(z, y, t) == pytest.approx(log_t.grad.item(), abs=1e-10)


def test_a_division_that_makes_a_tie_changes_no_prediction():
    z = np.array([[1.75, np.nextafter(1.75, 2)]])
    assert (z/3).argmax(1) == [0] and cal.predictions(z, 3) == [1] and cal._same_predictions(z, 3)
    assert cal.accuracy(z, [1], 3) == 1


def test_small_and_lopsided_sets_still_draw():
    z, y = cal.simulate_logits(5)
    assert len(reliability.reliability_diagram(z, y).axes) == 2
    ax = reliability.reliability_diagram(z, y).axes[0].figure.add_subplot()
    reliability.draw_confusion(ax, np.zeros((7, 7), int), "share")
    assert [t.get_text() for t in ax.texts] == ["0%"]*49
    with pytest.raises(UsageError, match="both, count, share"): reliability.draw_confusion(ax, np.eye(7), "percent")


def slow_curve(z, y, t=1.0):
    "Risk at each coverage, O(N^2): for each count, the errors above the last confidence, and that confidence's mean error for the rest."
    c, wrong = cal.softmax(z, t)[np.arange(len(y)), z.argmax(1)].tolist(), (z.argmax(1) != y).tolist()
    ranked, risk = sorted(c, reverse=True), []
    for k in range(1, len(c) + 1):
        last = ranked[k - 1]
        above = [w for v, w in zip(c, wrong) if v > last]
        tied = [w for v, w in zip(c, wrong) if v == last]
        risk.append((sum(above) + (k - len(above))*sum(tied)/len(tied))/k)
    return risk


def slow_best(risk_at_all, n):
    "Area of the best order: the right rows first."
    wrong = [0]*(n - round(risk_at_all*n)) + [1]*round(risk_at_all*n)
    return sum(sum(wrong[:k])/k for k in range(1, n + 1))/n


@st.composite
def tied_rows(draw):
    "Rows drawn from a few different ones, so that many confidences are equal, under labels of their own."
    z, _ = draw(rows(max_rows=4))
    pick = draw(st.lists(st.integers(0, len(z) - 1), min_size=1, max_size=25))
    return z[pick], draw(hnp.arrays(np.int64, len(pick), elements=st.integers(0, z.shape[1] - 1)))


@settings(deadline=None, max_examples=60)
@given(st.one_of(rows(), tied_rows()), st.sampled_from([0.3, 1.0, 4.0]))
def test_risk_coverage_equals_counting(data, t):
    z, y = data
    slow, curve = slow_curve(z, y, t), selective.risk_coverage(z, y, t)
    np.testing.assert_allclose(curve.coverage, [k/len(y) for k in range(1, len(y) + 1)], rtol=1e-12)
    np.testing.assert_allclose(curve.risk, slow, atol=1e-12)
    assert selective.aurc(z, y, t) == pytest.approx(np.mean(slow), abs=1e-12)
    assert selective.excess_aurc(z, y, t) == pytest.approx(np.mean(slow) - slow_best(slow[-1], len(y)), abs=1e-12)
    at = selective.accuracy_at_coverage(z, y, t)
    tenths = range(5, 11)
    assert list(at.values()) == pytest.approx([1 - slow[-(-k*len(y)//10) - 1] for k in tenths]) and list(at) == [str(k/10) for k in tenths]


@settings(deadline=None, max_examples=60)
@given(tied_rows(), st.randoms(use_true_random=False))
def test_the_order_of_tied_rows_does_not_matter_to_the_last_bit(data, random):
    z, y = data
    order = list(range(len(y)))
    random.shuffle(order)
    np.testing.assert_array_equal(selective.risk_coverage(z[order], y[order]).risk, selective.risk_coverage(z, y).risk)
    for metric in (selective.aurc, selective.excess_aurc): assert metric(z[order], y[order]) == metric(z, y)


@settings(deadline=None, max_examples=30)
@given(tied_rows(), st.data())
def test_counts_of_tied_rows_are_repeated_rows(data, more):
    z, y = data
    w = more.draw(hnp.arrays(np.int64, (2, 3, len(y)), elements=st.integers(0, 4)).filter(lambda w: w.sum(-1).all()))
    for metric in (selective.aurc, selective.excess_aurc):
        got = metric(z, y, weights=w)
        assert got.shape == (2, 3)
        for i in np.ndindex(2, 3):
            again = np.repeat(np.arange(len(y)), w[i])
            assert got[i] == pytest.approx(metric(z[again], y[again]), abs=1e-12)


def test_tied_rows_are_the_mean_over_their_orders():
    "Eight rows in two groups of equal confidence: the expectation over 4,000 random orders of the file, broken by position."
    z = np.log(np.repeat([[0.9, 0.1], [0.6, 0.4]], [3, 5], axis=0))
    y, rng, areas = np.array([0, 1, 0, 1, 1, 0, 0, 1]), np.random.default_rng(0), []
    for _ in range(4000):
        wrong = np.concatenate([rng.permutation(y[:3]), rng.permutation(y[3:])])
        areas.append((wrong.cumsum()/np.arange(1, 9)).mean())
    assert selective.aurc(z, y) == pytest.approx(np.mean(areas), abs=4*np.std(areas)/np.sqrt(4000))


def test_the_bootstrap_of_aurc_equals_a_plain_loop():
    z, y = cal.simulate_logits(150, 2.0)
    draws = np.random.default_rng(9).integers(150, size=(200, 150))
    for metric in (selective.aurc, selective.excess_aurc):
        got = resampling.bootstrap_interval(metric, z, y, resamples=200, seed=9)
        slow = [metric(z[d], y[d]) for d in draws]
        assert [got.low, got.high] == pytest.approx(np.quantile(slow, [0.025, 0.975]).tolist(), abs=1e-9)


def test_a_model_that_knows_when_it_errs_has_no_excess():
    "Errors at the lowest confidences, at random, and at the highest: excess 0, in between, and more."
    rng = np.random.default_rng(3)
    confidence = np.sort(rng.uniform(0.5, 1, 500))[::-1]
    z, wrong = np.log(np.stack([confidence, 1 - confidence], 1)), np.zeros((3, 500), int)
    wrong[0, 400:], wrong[1, rng.choice(500, 100, replace=False)], wrong[2, :100] = 1, 1, 1
    best, chance, worst = (selective.excess_aurc(z, y) for y in wrong)
    assert best == pytest.approx(0, abs=1e-12) and 0.1 < chance < 0.3 < worst


@settings(deadline=None, max_examples=60)
@given(tied_rows(), st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.9]), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_threshold_is_the_highest_that_enough_calibration_rows_reach(data, miss, t):
    z, y = data
    true = cal.softmax(z, t)[np.arange(len(y)), y]
    needed = ceil((len(y) + 1)*(1000 - round(1000*miss))/1000)  # whole thousandths: no rounding
    enough = [q for q in true if (true >= q).sum() >= needed]
    threshold = selective.conformal_threshold(z, y, t, miss)
    assert threshold == max(enough, default=0.0)
    sets = selective.prediction_sets(z, threshold, t)
    assert sets[np.arange(len(y)), z.argmax(1)].all() and (sets | (cal.softmax(z, t) < threshold)).all()
    assert sets[np.arange(len(y)), y].sum() >= min(needed, len(y))


@pytest.mark.parametrize(("n", "miss"), [(1, 0.1), (8, 0.1), (18, 0.05), (98, 0.01), (2, 0.3)])
def test_too_few_rows_give_sets_of_all_classes(n, miss):
    z, y = cal.simulate_logits(500, 20)
    threshold = selective.conformal_threshold(z[:n], y[:n], miss=miss)
    assert threshold == 0 and selective.prediction_sets(z, threshold).all() and selective.set_coverage(z, y, threshold=threshold) == 1
    enough = round(1/miss) - 1 if miss != 0.3 else 3  # the first n at which ceil((n+1)(1-miss)) is at most n
    lowest = cal.softmax(z)[np.arange(enough), y[:enough]].min()
    assert enough > n and selective.conformal_threshold(z[:enough], y[:enough], miss=miss) == lowest


@pytest.mark.parametrize(("n", "miss"), [(99, 0.1), (99, 0.6), (45, 0.1)])
def test_coverage_is_what_was_promised(n, miss):
    "500 draws of n calibration rows and 100 new ones: ceil((n+1)(1-miss))/(n+1) reach the threshold, within 4 standard errors."
    z, y = cal.simulate_logits(500*(n + 100), 2.5, seed=n)
    reached, covered = [], []
    for zs, ys in zip(z.reshape(500, -1, 7), y.reshape(500, -1)):
        threshold = selective.conformal_threshold(zs[:n], ys[:n], 2.5, miss)
        reached.append((cal.softmax(zs[n:], 2.5)[np.arange(100), ys[n:]] >= threshold).mean())
        covered.append(selective.set_coverage(zs[n:], ys[n:], 2.5, threshold=threshold))
    promised, error = -(-(n + 1)*round(10 - 10*miss)//10)/(n + 1), np.std(reached)/np.sqrt(500)
    assert promised >= 1 - miss - 1e-12 and error < 0.004
    assert np.mean(reached) == pytest.approx(promised, abs=4*error)
    gained = np.array(covered) - reached  # by the predicted class, where no class reaches the threshold
    assert (gained >= 0).all() and gained.any() == (miss > 0.5)


def test_coverage_holds_where_the_same_rows_choose_the_temperature():
    covered = []
    for s in range(100):
        z, y = cal.simulate_logits(1100, 2.5, seed=s)
        t = cal.fit_temperature(z[:100], y[:100]).temperature
        covered.append(selective.set_coverage(z[100:], y[100:], t, threshold=selective.conformal_threshold(z[:100], y[:100], t)))
    assert np.mean(covered) == pytest.approx(91/101, abs=4*np.std(covered)/np.sqrt(100))


def test_a_poor_model_pays_with_larger_sets():
    sizes = []
    for noise in (0, 2, 6):
        z, y = cal.simulate_logits(4000, seed=1)
        z = z + np.random.default_rng(0).normal(0, noise, z.shape)
        sets = selective.prediction_sets(z[2000:], selective.conformal_threshold(z[:2000], y[:2000]))
        assert sets[np.arange(2000), y[2000:]].mean() == pytest.approx(0.9, abs=4*np.sqrt(0.09/1000))
        sizes.append(sets.sum(1).mean())
    assert sizes[0] < sizes[1] < sizes[2] < 7


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5), st.integers(0, 5))
def test_mcnemar_equals_the_binomial_sum(only_a, only_b, both, none):
    right_a = np.repeat([1, 0, 1, 0], [only_a, only_b, both, none + 1])
    right_b = np.repeat([0, 1, 1, 0], [only_a, only_b, both, none + 1])
    y, n = np.arange(len(right_a)) % 7, only_a + only_b
    za, zb = (np.eye(7)[np.where(right, y, (y + 1) % 7)] for right in (right_a, right_b))
    tail = sum(comb(n, i) for i in range(min(only_a, only_b) + 1))
    got = resampling.mcnemar(y, za, zb)
    assert got[:2] == (only_a, only_b) and got.p_value == pytest.approx(min(1, 2*tail/2**n), rel=1e-9)
    assert resampling.mcnemar(y, zb, za) == (only_b, only_a, got.p_value)


def manifest_rows(y, name):
    "The columns of a manifest that a report asks for."
    return pd.DataFrame({"id": [f"{name}/{i}" for i in range(len(y))], "label": np.array(CLASSES)[y], "votes": None,
                         "source": np.where(np.arange(len(y)) % 2, "wild", "studio")})


def test_a_run_leaves_a_selective_report(tmp_path):
    zv, yv = cal.simulate_logits(400, 2.5, seed=1)
    zt, yt = cal.simulate_logits(300, 2.5, seed=2)
    got = run_report.report_run(tmp_path, zv, manifest_rows(yv, "val"), zt, manifest_rows(yt, "test"), sources=["wild"], **NAMES)
    assert [type(a) for a in got] == [Calibration, ReliabilityMetrics]
    left, t = SelectiveReport.load(tmp_path), got[0].selected_temperature
    assert (left.n, left.n_calibration, left.temperature, left.split, left.miss) == (300, 200, t, "test", 0.1)
    assert left.threshold == selective.conformal_threshold(zv[1::2], yv[1::2], t)
    sets = cal.softmax(zt, t) >= left.threshold
    sets[np.arange(300), zt.argmax(1)] = True
    assert left.coverage.value == pytest.approx(sets[np.arange(300), yt].mean()) and left.mean_size == pytest.approx(sets.sum(1).mean())
    assert left.aurc.value == pytest.approx(np.mean(slow_curve(zt, yt, t))) and left.aurc.low < left.aurc.value < left.aurc.high
    assert left.excess_aurc == pytest.approx(selective.excess_aurc(zt, yt, t))
    assert left.accuracy_at_coverage["1.0"] == pytest.approx(got[1].accuracy.value) and list(left.by_class) == list(CLASSES)
    for c, name in enumerate(CLASSES):
        assert left.by_class[name].n == (yt == c).sum()
        assert left.by_class[name].coverage == pytest.approx(sets[yt == c, c].mean())
        assert left.by_class[name].mean_size == pytest.approx(sets[yt == c].sum(1).mean())


def test_sets_are_not_reported_on_the_rows_that_chose_them():
    z, y = cal.simulate_logits(300, 2)
    ids = [f"a/{i}" for i in range(300)]
    with pytest.raises(GateError, match="100% of the test rows"): selective.selective_report(z, y, z[::-1], y[::-1], 2.0, **NAMES)
    with pytest.raises(GateError, match="300 rows stand in validation and test"):
        selective.selective_report(z, y, z + 1, y, 2.0, val_ids=ids, test_ids=ids, **NAMES)


def test_selective_plots_draw_what_the_report_says():
    (zv, yv), (zt, yt) = cal.simulate_logits(400, 2, seed=1), cal.simulate_logits(300, 2, seed=2)
    ax = selective.risk_coverage_plot({"a": (zt, yt, 2), "b": (-zt, yt, 2)}).axes[0]
    drawn, best = (line.get_ydata() for line in ax.lines[:2])
    np.testing.assert_allclose(drawn, selective.risk_coverage(zt, yt, 2).risk)
    texts = [t.get_text() for t in ax.legend_.get_texts()]
    assert texts == [f"{name}: AURC {selective.aurc(z, yt, 2):.4f}, n = 300" for name, z in (("a", zt), ("b", -zt))]
    assert best.mean() == pytest.approx(selective.aurc(zt, yt, 2) - selective.excess_aurc(zt, yt, 2)) and (best <= drawn + 1e-12).all()
    no_fear = yt != 2
    report = selective.selective_report(zv, yv, zt[no_fear], yt[no_fear], 2.0, **NAMES)
    size, covered = selective.set_size_plot(report).axes
    np.testing.assert_allclose([b.get_width() for b in size.patches][::-1], [c.mean_size or np.nan for c in report.by_class.values()])
    np.testing.assert_allclose(covered.lines[0].get_xdata()[::-1], [np.nan if c.n == 0 else c.coverage for c in report.by_class.values()])
    assert list(covered.lines[1].get_xdata()) == [0.9, 0.9]


# --- pictures


def twice(n, seed=0):
    "Logits and labels of n pictures that stand in two rows each, with two labels that need not agree; the pictures' numbers."
    rng = np.random.default_rng(seed)
    z, y = cal.simulate_logits(n, 2.0, seed=seed)
    other = np.where(rng.random(n) < 0.4, rng.integers(7, size=n), y)
    return np.repeat(z, 2, 0), np.stack([y, other], 1).ravel(), np.repeat(rng.permutation(n), 2)


def test_the_bootstrap_of_pictures_equals_a_plain_loop():
    "Pictures of one to four rows, drawn one by one, each with all of its rows."
    z, y = cal.simulate_logits(150, 2.0)
    groups = np.sort(np.random.default_rng(1).integers(70, size=150)).astype(str)
    names = list(dict.fromkeys(groups.tolist()))
    rows = {g: np.flatnonzero(groups == g) for g in names}
    draws = np.random.default_rng(9).integers(len(names), size=(200, len(names)))
    taken = [np.concatenate([rows[names[i]] for i in d]) for d in draws]
    assert len({len(t) for t in taken}) > 1  # a resample has as many pictures, not as many rows
    for metric in HARD:
        got = resampling.bootstrap_interval(metric, z, y, resamples=200, seed=9, groups=groups)
        slow = [metric(z[t], y[t]) for t in taken]
        assert [got.low, got.high] == pytest.approx(np.quantile(slow, [0.025, 0.975]).tolist(), abs=1e-9), metric.__name__


def test_every_row_its_own_picture_changes_no_bit():
    z, y = cal.simulate_logits(300, 2.0)
    alone = reliability.evaluate(z, y, resamples=50)
    assert reliability.evaluate(z, y, resamples=50, groups=np.arange(300)[::-1]) == alone | {"pictures": 300}
    w = [resampling.bootstrap_weights(300, 20, np.random.default_rng(4), c) for c in (None, np.arange(300))]
    assert np.array_equal(*w)


@pytest.mark.parametrize("copies", [2, 3])
def test_rows_written_down_again_are_no_evidence(copies):
    z, y = cal.simulate_logits(400, 2.0)
    once = reliability.evaluate(z, y, resamples=200)
    again = reliability.evaluate(np.tile(z, (copies, 1)), np.tile(y, copies), resamples=200, groups=np.tile(np.arange(400), copies))
    for name in reliability.METRICS:
        assert (again[name].low, again[name].high) == pytest.approx((once[name].low, once[name].high), abs=1e-9), name
    assert again["null_ece"] == pytest.approx(once["null_ece"], rel=0.1)
    gain = resampling.paired_interval(cal.nll, z, z, y, (1.0, 2.0), 200)
    assert resampling.paired_interval(cal.nll, *[np.tile(z, (copies, 1))]*2, np.tile(y, copies), (1.0, 2.0), 200,
                               groups=np.tile(np.arange(400), copies)).low == pytest.approx(gain.low, abs=1e-9)


def test_intervals_by_picture_cover_and_those_by_row_do_not():
    "Two rows a picture: over 300 draws the interval by picture holds the truth in about 95 of 100, that by row far less often."
    z, y, _ = twice(100_000)
    truth, inside = cal.accuracy(z, y), {"picture": [], "row": []}
    for s in range(300):
        part, groups = slice(400*s, 400*(s + 1)), np.arange(400)//2
        for how, g in (("picture", groups), ("row", None)):
            got = resampling.bootstrap_interval(cal.accuracy, z[part], y[part], resamples=300, seed=s, groups=g)
            inside[how].append(got.low <= truth <= got.high)
    assert 0.90 <= np.mean(inside["picture"]) <= 0.98 and np.mean(inside["row"]) < 0.90


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_mcnemar_counts_a_picture_once(rows):
    "Each picture for the model that gets more of its rows right, whatever the order of the rows."
    groups, right_a, right_b = (np.array(c) for c in zip(*rows))
    y = np.arange(len(rows)) % 7
    za, zb = (np.eye(7)[np.where(right, y, (y + 1) % 7)] for right in (right_a, right_b))
    lead = [int(right_b[groups == g].sum()) - int(right_a[groups == g].sum()) for g in set(groups.tolist())]
    got, order = resampling.mcnemar(y, za, zb, groups), np.random.default_rng(0).permutation(len(rows))
    assert got[:2] == (sum(x < 0 for x in lead), sum(x > 0 for x in lead))
    assert resampling.mcnemar(y[order], za[order], zb[order], groups[order]) == got
    assert got.p_value == pytest.approx(binom_two_sided(got.only_a_right, got.only_b_right), rel=1e-9)


def binom_two_sided(a, b):
    tail = sum(comb(a + b, i) for i in range(min(a, b) + 1))
    return min(1, 2*tail/2**(a + b))


def test_folds_keep_pictures_whole_and_classes_even():
    rng = np.random.default_rng(0)
    groups = rng.integers(400, size=900)
    label = rng.choice(7, 400, p=[.14, .04, .13, .25, .17, .10, .17])
    y = label[groups]
    fold = resampling.stratified_folds(y, 5, 1, groups)
    assert all(len(set(fold[groups == g].tolist())) == 1 for g in set(groups.tolist()))
    firsts = np.unique(groups, return_index=True)[1]
    counts = np.array([np.bincount(fold[firsts][y[firsts] == c], minlength=5) for c in range(7)])
    assert (counts.max(1) - counts.min(1) <= 1).all()


def test_a_temperature_is_never_judged_by_another_row_of_its_picture():
    "Cross-fitted logits of the two rows of a picture are divided by one temperature, which neither has chosen."
    z, y, groups = twice(150)
    fitted = selective.cross_fitted_logits(z, y, 5, seed=1, groups=groups)
    np.testing.assert_allclose(fitted[0::2], fitted[1::2])
    apart = selective.cross_fitted_logits(z, y, 5, seed=1)
    assert not np.allclose(apart[0::2], apart[1::2])


@pytest.mark.parametrize("call", [
    lambda z, y: resampling.bootstrap_interval(cal.nll, z, y, groups=["a"]),
    lambda z, y: resampling.mcnemar(y, z, z, groups=np.zeros((50, 1))),
    lambda z, y: cal.null_ece(np.full(50, 0.5), groups=list("ab")), lambda z, y: resampling.stratified_folds(y, 5, 1, groups=["a"]),
    lambda z, y: reliability.evaluate(z, y, groups=[None]*50)])
def test_bad_groups_are_refused(call):
    z, y = cal.simulate_logits(50)
    with pytest.raises(UsageError, match="groups"): call(z, y)


# --- promises


@pytest.mark.parametrize(("covered", "m", "n", "miss"), [(0, 3, 9, 0.1), (2, 3, 9, 0.1), (15, 20, 19, 0.1), (30, 40, 24, 0.2)])
def test_the_chance_of_a_coverage_is_the_beta_binomial_sum(covered, m, n, miss):
    "Ranks among n + 1 exchangeable scores, counted by hand: urns with k and n + 1 - k balls, one more of the same kind after each draw."
    k = ceil((n + 1)*(1000 - round(1000*miss))/1000)
    def chance(j):
        up = np.prod([k + i for i in range(j)], dtype=float)*np.prod([n + 1 - k + i for i in range(m - j)], dtype=float)
        return comb(m, j)*up/np.prod([n + 1 + i for i in range(m)], dtype=float)
    assert selective.coverage_chance(covered, m, n, miss) == pytest.approx(sum(chance(j) for j in range(covered + 1)), rel=1e-9)


def test_a_promise_that_is_kept_is_rarely_called_broken():
    "Over 2,000 simulated pairs of calibration and test the p-value is small as rarely as it says, and never for more than chance."
    rng, p = np.random.default_rng(0), []
    for _ in range(2000):
        threshold = np.sort(rng.random(200))[200 - selective.conformal_rank(200, 0.1)]
        p.append(selective.coverage_chance(int((rng.random(300) >= threshold).sum()), 300, 200))
    for level in (0.01, 0.05, 0.2): assert np.mean(np.array(p) < level) <= level + 3*np.sqrt(level*(1 - level)/2000)
    assert 0.03 <= np.mean(np.array(p) < 0.05) <= 0.07


def test_class_conditional_sets_keep_their_promise_to_each_class():
    "A class that the model underrates: one threshold leaves it out, one a class does not; both keep 90% on average."
    covered = {"one": [], "each": []}
    for s in range(60):
        z, y = cal.simulate_logits(3000, 1.0, seed=s)
        z = z - 2.0*(np.arange(7) == 2)
        rules = {"one": selective.conformal_threshold, "each": selective.conformal_thresholds}
        for how, q in ((k, rule(z[:1500], y[:1500])) for k, rule in rules.items()):
            sets = selective.prediction_sets(z[1500:], q)
            inside, later = sets[np.arange(1500), y[1500:]], y[1500:]
            covered[how].append([inside[later == c].mean() for c in range(7)] + [inside.mean()])
    one, each = (np.mean(covered[k], 0) for k in ("one", "each"))
    assert one[-1] == pytest.approx(0.9, abs=0.01) and one[2] < 0.8
    assert (each[:-1] > 0.89).all() and (each < 0.93).all()


def mixed_conventions(n=600, seed=1):
    "Pictures under two conventions that agree on two thirds: logits, rows of a manifest for validation and for test."
    zv, yv = cal.simulate_logits(n, 2.5, seed=seed)
    zt, yt = cal.simulate_logits(n, 2.5, seed=seed + 100)
    def rows(y, split):
        other = np.where(np.arange(len(y)) % 3, y, (y + 1) % 7)
        parts = [pd.DataFrame({"id": [f"{s}/{split}/{i}" for i in range(len(y))], "label": np.array(CLASSES)[labels], "source": s,
                               "convention": s, "group": [f"{split}{i}" for i in range(len(y))], "votes": None, "split": split,
                               "excluded": ""}) for s, labels in (("ours", y), ("theirs", other))]
        return pd.concat(parts, ignore_index=True)
    return np.tile(zv, (2, 1)), rows(yv, "val"), np.tile(zt, (2, 1)), rows(yt, "test")


def test_a_run_promises_for_its_own_convention_alone(tmp_path):
    "The fault: threshold from one convention, coverage counted over two, so that a kept promise of 90% looked like 77%."
    data = mixed_conventions()
    run_report.report_run(tmp_path, *data, sources=["ours"], convention="ours", **NAMES)
    s = SelectiveReport.load(tmp_path)
    assert (s.convention, s.calibrated_on, s.n, s.pictures, s.sources) == ("ours", "ours", 600, 600, ["ours"])
    assert s.promise.kept and s.promise.pictures == 600 and s.promise.calibration_pictures == s.n_calibration == 600
    assert s.coverage.value == pytest.approx(0.9, abs=0.04)
    other, = s.others
    assert (other.convention, other.n, other.promise) == ("theirs", 600, None) and other.coverage.high < 0.8
    assert s.accuracy_at_coverage["1.0"] == pytest.approx(cal.accuracy(data[2][:600], manifests.labels_of(data[3][:600])))


def test_a_run_keeps_which_rows_show_one_picture(tmp_path):
    zv, val, zt, test = mixed_conventions()
    _, metrics = run_report.report_run(tmp_path, zv, val, zt, test, **NAMES)
    z = np.load(tmp_path/"evaluation.npz")
    assert (z["test_groups"][:600] == z["test_groups"][600:]).all() and not set(z["val_groups"]) & set(z["test_groups"])
    assert (metrics.n, metrics.pictures) == (1200, 600)
    table = pd.read_csv(tmp_path/"metrics_by_source.csv")
    assert table["pictures"].tolist() == [600, 600]


def test_class_thresholds_travel_with_the_report(tmp_path):
    data = mixed_conventions()
    run_report.report_run(tmp_path, *data, sources=["ours"], convention="ours", class_conditional=True, **NAMES)
    s, first = SelectiveReport.load(tmp_path), data[0][:600]
    t = Calibration.load(tmp_path).selected_temperature
    assert s.class_thresholds == pytest.approx(selective.conformal_thresholds(first, manifests.labels_of(data[1][:600]), t).tolist())
    assert s.promise.p_value == pytest.approx(min(1, 7*min(c.p_value for c in s.by_class.values())))
    assert s.mean_size > 1 and all(c.p_value is None for c in s.others[0].by_class.values())


def test_a_picture_in_several_calibration_rows_chooses_once():
    z, y = cal.simulate_logits(300, 2.5, seed=1)
    many = np.repeat(np.arange(300), np.random.default_rng(0).integers(1, 5, 300))
    rule = selective.set_rule(z[many], y[many], 2.5, groups=many)
    assert rule.threshold == selective.conformal_threshold(z, y, 2.5) and rule.n == 300
    assert rule.pictures.tolist() == np.bincount(y, minlength=7).tolist()


# --- counted again


def small_copy(folder):
    "What travels of a sealed run."
    z = dict(np.load(folder/"evaluation.npz"))
    (folder/"best.pt").unlink()
    write_npz(folder/"evaluation.npz", test_ids=z["test_ids"], test_labels=z["test_labels"].astype("int8"),
              test_logits=z["test_logits"].astype("float16"))


@pytest.fixture
def old_run(tmp_path):
    "A sealed run as they were before pictures and conventions, and the rows of its manifest."
    zv, val, zt, test = mixed_conventions()
    plain = [r.drop(columns=["group", "convention"]) for r in (val, test)]
    run_report.report_run(tmp_path, zv, plain[0], zt, plain[1], sources=["ours"], **NAMES)
    (tmp_path/"best.pt").write_bytes(b"weights")
    seal_folder(tmp_path, NAMES["dataset_index_id"])
    return tmp_path, pd.concat([val, test], ignore_index=True), (zv, val, zt, test)


@pytest.mark.parametrize("small", [False, True])
def test_an_old_run_counted_again_is_a_new_one(old_run, tmp_path_factory, small):
    folder, manifest, data = old_run
    before, old_threshold = HashManifest.load(folder), SelectiveReport.load(folder).threshold
    if small: small_copy(folder)
    run_report.recount_run(folder, manifest)
    fresh = tmp_path_factory.mktemp("fresh")
    run_report.report_run(fresh, *data, sources=["ours"], convention="ours", **NAMES)
    got, want = ReliabilityMetrics.load(folder), ReliabilityMetrics.load(fresh)
    for k in ("accuracy", "macro_f1", "nll", "ece"):
        assert getattr(got, k).value == pytest.approx(getattr(want, k).value, abs=1e-12)  # from the table by source, in full precision
        assert getattr(got, k).low == pytest.approx(getattr(want, k).low, abs=2e-3 if small else 1e-12)
    assert (got.n, got.pictures, got.convention) == (600, 600, "ours")
    sets, new = SelectiveReport.load(folder), SelectiveReport.load(fresh)
    assert sets.threshold == old_threshold and (sets.promise.covered, len(sets.others)) == (new.promise.covered, 1)
    seal = HashManifest.load(folder)
    assert check_run_seal(folder) == small and ("half precision" in got.recomputed) == small
    assert seal.rewritten["selective.json"] == before.files["selective.json"] != seal.files["selective.json"]
    assert seal.files["best.pt"] == before.files["best.pt"]
    assert run_report.recount_run(folder, manifest)
    assert HashManifest.load(folder).rewritten == seal.rewritten  # the run's own stay on record


@pytest.mark.parametrize(("spoil", "says"), [
    ("logits", "confusion matrix"), ("labels", "other labels"), ("row", "holds no row"), ("seal", "was changed"),
    ("val", "chose its threshold")])
def test_what_does_not_fit_is_not_counted_again(old_run, spoil, says):
    folder, manifest, _ = old_run
    small_copy(folder)
    z = dict(np.load(folder/"evaluation.npz"))
    match spoil:
        case "logits": write_npz(folder/"evaluation.npz", **z | {"test_logits": np.roll(z["test_logits"], 1, 1)})
        case "labels": manifest = manifest.assign(label="Sad")
        case "row": manifest = manifest[manifest["source"] == "ours"]
        case "seal": (folder/"calibration.json").write_text((folder/"calibration.json").read_text() + "\n")
        case "val": manifest = manifest[(manifest["split"] == "test") | (manifest.index % 2 == 0)]
    kept = (folder/"selective.json").read_bytes()
    with pytest.raises(GateError, match=says): run_report.recount_run(folder, manifest)
    assert (folder/"selective.json").read_bytes() == kept
