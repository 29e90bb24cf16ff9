"""Calibration against second implementations (scikit-learn, torchmetrics, formulas written out), invariants, and refusals."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize_scalar
from scipy.stats import binom
from sklearn import metrics as sk
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError, MulticlassConfusionMatrix

from fer_nb import calibration as cal
from fer_nb.artifacts import CLASSES, Calibration, GateError, ReliabilityMetrics, UsageError

GRID = [(n, k, spread, seed) for n in (1, 13, 200, 1500) for k in (2, 7) for spread in (0.1, 2.0, 8.0) for seed in (0, 1)]
HARD = [*cal.METRICS.values()]


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
    for metric in (cal.ece, cal.ece_equal_mass, cal.classwise_ece, cal.accuracy, cal.macro_f1):
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
    assert cal.same_predictions(z, t)
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
    assert not cal.same_predictions(z, 2.0)


@pytest.mark.parametrize("grid", [[], [0, 1], [1, np.nan], [-1]])
def test_a_bad_grid_is_refused(grid):
    with pytest.raises(UsageError, match="grid"): cal.select_temperature(*cal.simulate_logits(100), grid)


def test_bootstrap_equals_a_plain_loop():
    z, y = cal.simulate_logits(150, 2.0)
    rng = np.random.default_rng(9)
    draws = rng.integers(150, size=(200, 150))
    for metric in (cal.ece, cal.macro_f1, cal.ece_equal_mass, cal.brier):
        slow = [metric(z[d], y[d]) for d in draws]
        got = cal.bootstrap_interval(metric, z, y, resamples=200, seed=9)
        assert [got.low, got.high] == pytest.approx(np.quantile(slow, [0.025, 0.975]).tolist(), abs=1e-9)


def test_bootstrap_covers():
    "95% intervals of accuracy hold the truth in about 95 of 100 draws (300 draws, n = 200)."
    z, y = cal.simulate_logits(200_000, seed=0)
    truth, inside = cal.accuracy(z, y), []
    for s in range(300):
        part = slice(200*s, 200*(s + 1))
        got = cal.bootstrap_interval(cal.accuracy, z[part], y[part], resamples=400, seed=s)
        inside.append(got.low <= truth <= got.high)
    assert 0.90 <= np.mean(inside) <= 0.98


def test_chunks_do_not_change_the_number_of_resamples():
    assert sum(len(w) for w in cal.weight_chunks(100, 1000, seed=0, entries=700)) == 1000
    w = np.concatenate(list(cal.weight_chunks(100, 1000, seed=0, entries=700)))
    assert (w.sum(1) == 100).all() and w.std() == pytest.approx(np.sqrt(0.99), abs=0.01)


def test_paired_intervals_find_a_small_true_difference():
    z, y = cal.simulate_logits(2000, 2.0)
    got = cal.paired_interval(cal.nll, z, z, y, (1.0, 2.0), resamples=300)
    assert got.value == pytest.approx(cal.nll(z, y, 2) - cal.nll(z, y)) and got.high < 0
    with pytest.raises(UsageError, match="the same rows"): cal.paired_interval(cal.nll, z, z[1:], y)


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
    reports = [cal.fit_vector_temperature(*cal.simulate_logits(500, 2.5, seed=s), seed=s) for s in range(60)]
    assert sum(r.accepted for r in reports) <= 2
    loose = [r.cv_nll_scalar - r.cv_nll_vector > r.cv_gain_se for r in reports]
    assert sum(loose) > sum(r.accepted for r in reports)
    assert all(r.temperatures == [r.scalar]*7 for r in reports if not r.accepted)


def test_a_vector_that_is_there_is_found():
    true = np.array([1, 1.5, 2, 2.5, 3, 1.2, 1.8])
    z, y = cal.simulate_logits(3000, seed=3)
    z = (z - z.mean(1, keepdims=True))*true
    got = cal.fit_vector_temperature(z, y)
    assert got.accepted and got.temperatures == got.fitted
    assert got.cv_nll_vector < got.cv_nll_scalar - 2*got.cv_gain_se
    centred = z - z.mean(1, keepdims=True)
    assert got.argmax_flips == ((centred/got.fitted).argmax(1) != z.argmax(1)).sum() > 0
    assert got.macro_f1_vector == pytest.approx(sk.f1_score(y, (centred/got.fitted).argmax(1), average="macro"))
    assert got.macro_f1_scalar == pytest.approx(sk.f1_score(y, z.argmax(1), average="macro"))
    for folds in (1, 10_000):
        with pytest.raises(UsageError, match="folds"): cal.fit_vector_temperature(z, y, folds=folds)


def test_stratified_folds_are_even_in_every_class():
    y = np.random.default_rng(0).choice(7, 503, p=[.4, .02, .1, .2, .1, .1, .08])
    fold = cal.stratified_folds(y, 5, seed=1)
    for c in range(7):
        counts = np.bincount(fold[y == c], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert (fold != cal.stratified_folds(y, 5, seed=2)).any()


NAMES = dict(model_name="m", dataset_index_id="d-000000000000", resamples=50)


def test_calibrate_writes_what_it_measured(tmp_path):
    zv, yv = cal.simulate_logits(800, 20, seed=1)
    zt, yt = cal.simulate_logits(700, 20, seed=2)
    votes = np.full(zt.shape, np.nan)
    votes[:300] = cal.softmax(zt[:300], 20)
    calibration, reliability = cal.calibrate(zv, yv, zt, yt, votes=votes, **NAMES)
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
    again = cal.calibrate(zv, yv, zt, yt, votes=votes, **NAMES)
    assert again[1] == reliability and again[0].selected_temperature == calibration.selected_temperature


def test_the_same_rows_are_refused():
    zv, yv = cal.simulate_logits(300, 2, seed=1)
    zt, yt = cal.simulate_logits(300, 2, seed=2)
    ids, others = [f"a/{i}" for i in range(300)], [f"b/{i}" for i in range(299)] + ["a/7"]
    with pytest.raises(GateError, match="1 rows stand in validation and test, for instance a/7"):
        cal.calibrate(zv, yv, zt, yt, val_ids=ids, test_ids=others, **NAMES)
    with pytest.raises(GateError, match="100% of the test rows"): cal.calibrate(zv, yv, zv[::-1], yv[::-1], **NAMES)
    with pytest.raises(UsageError, match="repeats"): cal.calibrate(zv, yv, zt, yt, val_ids=["x"]*300, **NAMES)
    with pytest.raises(UsageError, match="2 test_ids for 300 rows"): cal.calibrate(zv, yv, zt, yt, test_ids=["x", "y"], **NAMES)


def test_cross_fitting_never_uses_a_rows_own_label():
    "Each fold's rows are divided by the temperature of the others, and scrambling a fold's own labels doesn't move it."
    z, y = cal.simulate_logits(400, 3)
    fold, out = cal.stratified_folds(y, 5, 1337), cal.cross_fitted_logits(z, y, 5, 1337)
    temperatures = set()
    for f in range(5):
        own, others = fold == f, fold != f
        t = cal.fit_temperature(z[others], y[others]).temperature
        np.testing.assert_allclose(out[own], z[own]/t, rtol=1e-9)
        temperatures.add(round(t, 9))
    assert len(temperatures) == 5
    _, crossed = cal.calibrate(z, y, **NAMES)
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
    (lambda z, y: cal.evaluate(z, y, votes=z[:, :3]), "votes have shape"),
    (lambda z, y: cal.evaluate(z, y, [1.0]*7), "takes one temperature"),
    (lambda z, y: cal.calibrate(z[:, :5], y % 5, **NAMES), "give 7, in the order"),
])
def test_wrong_arguments_get_one_clear_line(call, says):
    with pytest.raises(UsageError, match=says) as e: call(*cal.simulate_logits(50))
    assert e.value.exit_code == 2 and "\n" not in str(e.value)


def test_plots_draw_what_the_metrics_say():
    z, y = cal.simulate_logits(500, 2)
    fig = cal.reliability_diagram(z, y, (1, 2), "t")
    assert f"ECE {cal.ece(z, y):.4f}" in fig.axes[0].get_title() and f"ECE {cal.ece(z, y, 2):.4f}" in fig.axes[1].get_title()
    assert "n = 500" in fig.axes[0].get_title() and "null ECE" in fig.axes[0].get_title()
    counts = fig.axes[2].patches
    assert sum(b.get_height() for b in counts) == 500
    panels = [a for a in cal.classwise_diagram(z, y).axes if a.get_title()]
    assert len(panels) == 7 and all(name in a.get_title() for name, a in zip(CLASSES, panels))
    texts = [t.get_text().split("\n")[0] for t in cal.confusion_plot(cal.confusion(z, y)).axes[0].texts]
    assert texts == [str(v) for v in cal.confusion(z, y).ravel()]


def test_the_module_stays_light():
    code = "import sys, fer_nb.calibration; print([m for m in ('torch', 'fastai', 'cv2', 'sklearn') if m in sys.modules])"
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
    assert (z/3).argmax(1) == [0] and cal.predictions(z, 3) == [1] and cal.same_predictions(z, 3)
    assert cal.accuracy(z, [1], 3) == 1


def test_small_and_lopsided_sets_still_draw():
    z, y = cal.simulate_logits(5)
    assert len(cal.reliability_diagram(z, y).axes) == 2
    ax = cal.reliability_diagram(z, y).axes[0].figure.add_subplot()
    cal.draw_confusion(ax, np.zeros((7, 7), int), "share")
    assert [t.get_text() for t in ax.texts] == ["0%"]*49
    with pytest.raises(UsageError, match="both, count, share"): cal.draw_confusion(ax, np.eye(7), "percent")
