"""How long the whole report of one test set takes: n = 3,589, 1,000 resamples, every metric."""
from fer_nb import calibration as cal
from fer_nb import reliability


def test_evaluate_a_fer2013_sized_test_set(benchmark):
    z, y = cal.simulate_logits(3589, 2.5)
    votes = cal.softmax(z, 2.5)
    record = benchmark.pedantic(reliability.evaluate, (z, y), {"votes": votes}, rounds=3, warmup_rounds=1)
    assert record["n"] == record["n_votes"] == 3589
    assert benchmark.stats.stats.min < 15  # seconds; about 1 on one core


def test_choose_a_temperature(benchmark):
    z, y = cal.simulate_logits(3589, 20)
    assert benchmark(cal.select_temperature, z, y).grid_grown
