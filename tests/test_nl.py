"""Deep momentum and multi-frequency updates: equal to what they generalise, whole when resumed, unharmed by what is broken."""
import copy
import io

import pytest
import torch
from fastai.callback.core import Callback
from torch import nn
from torch.nn import functional as F

from fer_nb.artifacts import UsageError
from fer_nb.callbacks import TrainConfig, load_checkpoint, make_optimizer, seed_everything
from fer_nb.distillation import make_student
from fer_nb.loading import FaceBatches, eval_loader
from fer_nb.nl import DeepMomentum, GradientMemory, MultiFrequency, OptimizerLog, check_scaler, depth_periods, memory_verdict, state_bytes
from fer_nb.training import train
from tests.test_training import Faces, ce, small_net


def net(seed=0):
    seed_everything(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False),  # before a norm a bias has no gradient but rounding
                         nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(288, 7))


def batches(n, seed=1, size=16):
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        x = torch.randn(size, 3, 8, 8, generator=g)
        yield x, x.mean((2, 3)).argmax(-1)


def fit(model, optimizer, n=30, seed=1, after=lambda: None):
    for x, y in batches(n, seed):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()
    return flat(model)


def flat(model): return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a, b):
    "Whether two nested states are equal, bit for bit."
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def deep(model, **kw): return DeepMomentum(model.parameters(), **{"lr": 3e-3, "gamma": 0.5, "ramp": 10, "memory_lr": 1e-2, **kw})
def multi(model): return MultiFrequency({4: model[:2].parameters(), 2: model[3].parameters(), 1: model[5].parameters()}, 3e-3)


# ---- the limits ----

@pytest.mark.parametrize("lr, weight_decay, betas", [(3e-3, 0.05, (0.9, 0.999)), (1e-2, 0.0, (0.8, 0.99)), (1e-4, 0.5, (0.0, 0.9))])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gamma_zero_and_periods_of_one_are_adamw(lr, weight_decay, betas, layout):
    how = dict(lr=lr, weight_decay=weight_decay, betas=betas)
    makers = (lambda ps: torch.optim.AdamW(ps, **how), lambda ps: DeepMomentum(ps, gamma=0, **how),
              lambda ps: MultiFrequency({1: ps}, **how))
    models = [net().to(memory_format=layout) for _ in makers]
    want, *got = [fit(m, make(m.parameters())) for m, make in zip(models, makers)]
    for g in got: torch.testing.assert_close(g, want, rtol=1e-6, atol=1e-6)


def test_groups_and_schedulers_act_as_on_adamw():
    def groups(m): return [{"params": [p for p in m.parameters() if p.ndim > 1], "weight_decay": 0.3},
                           {"params": [p for p in m.parameters() if p.ndim < 2], "weight_decay": 0.0, "lr": 1e-2}]
    ends = []
    for make in (lambda g: torch.optim.AdamW(g, 3e-3), lambda g: DeepMomentum(g, 3e-3, gamma=0), lambda g: MultiFrequency({1: g}, 3e-3)):
        model = net()
        optimizer = make(groups(model))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        ends.append(fit(model, optimizer, after=schedule.step))
    for e in ends[1:]: torch.testing.assert_close(e, ends[0], rtol=0, atol=1e-6)


def test_a_linear_frozen_memory_without_sizes_is_sgd_with_momentum():
    w, v = (nn.Parameter(torch.ones(6, 5)) for _ in range(2))
    ours = DeepMomentum([w], lr=0.05, weight_decay=0, gamma=1, ramp=0, memory_lr=0, precondition=False)
    theirs = torch.optim.SGD([v], lr=0.05, momentum=0.9)
    g = torch.Generator().manual_seed(0)
    for t in range(1, 61):
        w.grad = torch.randn(6, 5, generator=g)
        v.grad = w.grad.clone()
        theirs.param_groups[0]["lr"] = 0.05*(1 - 0.9)/(1 - 0.9**t)  # the average's bias, and a sum in place of an average
        ours.step(); theirs.step()
    torch.testing.assert_close(w, v, rtol=0, atol=1e-6)


def test_slow_weights_owe_the_sum_of_their_steps():
    "Under gradients that don't depend on the weights, and without decay, a slow weight ends where AdamW's does."
    w, v = (nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    ours, theirs = MultiFrequency({4: [w]}, 1e-2, 0.0), torch.optim.AdamW([v], 1e-2, weight_decay=0)
    for t in range(12):
        w.grad = v.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(t))
        before = w.detach().clone()
        ours.step(); theirs.step()
        if t % 4 == 3: torch.testing.assert_close(w, v, rtol=0, atol=1e-6)
        else: assert torch.equal(w, before)


def test_slow_weights_are_bit_identical_inside_a_period():
    model = net()
    seen = {k: [] for k in ("0.weight", "1.bias", "3.weight", "5.weight")}
    def keep():
        for k, v in seen.items(): v.append(model.get_parameter(k).detach().clone())
    fit(model, multi(model), 9, after=keep)
    moved = {k: [bool((a != b).any()) for a, b in zip(v, v[1:])] for k, v in seen.items()}  # from step 1 to 2, 2 to 3, ...
    assert moved["0.weight"] == moved["1.bias"] == [i % 4 == 0 for i in range(2, 10)]
    assert moved["3.weight"] == [i % 2 == 0 for i in range(2, 10)] and all(moved["5.weight"])


# ---- the memory ----

@pytest.mark.parametrize("hidden, layers, weights", [(32, 1, 164), (64, 2, 4484)])
def test_the_memory_begins_as_momentum_and_has_its_size(hidden, layers, weights):
    memory, keys = GradientMemory(hidden, layers), torch.randn(50, 3)
    assert sum(p.numel() for p in memory.parameters()) == weights
    assert torch.equal(memory(keys), keys[:, 1])
    assert torch.equal(memory.read(keys, 7), memory.read(keys))


def stream(optimizer, steps, rho, seed=0):
    (w,), g = optimizer.param_groups[0]["params"], torch.Generator().manual_seed(seed)
    now = torch.randn(w.shape, generator=g)
    for _ in range(steps):
        now = rho*now + (1 - rho**2)**0.5*torch.randn(w.shape, generator=g)
        w.grad = now.clone()
        optimizer.step()
    return optimizer.drain()


@pytest.mark.parametrize("hidden, layers", [(32, 1), (64, 2)])
def test_surprise_falls_on_gradients_that_resemble_the_last_one(hidden, layers):
    optimizer = DeepMomentum([nn.Parameter(torch.zeros(80, 80))], hidden=hidden, layers=layers, memory_lr=1e-2)
    early, _, late = stream(optimizer, 30, 0.8), stream(optimizer, 200, 0.8, 1), stream(optimizer, 30, 0.8, 2)
    assert late["surprise"] < 0.7*early["surprise"] and late["r2"] > 0.5 > early["r2"]


def test_a_fixed_gradient_proves_nothing_and_noise_is_not_foretold():
    fixed = DeepMomentum([w := nn.Parameter(torch.zeros(20, 20))], memory_lr=0)
    for _ in range(20): w.grad = torch.ones(20, 20); fixed.step()
    told = fixed.drain()
    assert told["surprise"] < 1e-9 and told["r2"] > 0.999999  # without learning anything
    noise = DeepMomentum([nn.Parameter(torch.zeros(80, 80))], memory_lr=1e-2)
    stream(noise, 100, 0.0)
    assert abs(stream(noise, 50, 0.0, 1)["r2"]) < 0.05


def test_a_hostile_memory_stops_the_weights_and_cannot_turn_them():
    optimizer = DeepMomentum([w := nn.Parameter(torch.randn(9, 9))], lr=0.1, weight_decay=0, gamma=0.5, ramp=0, memory_lr=0)
    with torch.no_grad(): optimizer.memory.a.copy_(torch.tensor([0.0, -1.0, 0.0]))
    before = w.detach().clone()
    for t in range(10):
        w.grad = torch.randn(9, 9, generator=torch.Generator().manual_seed(t)); optimizer.step()
    torch.testing.assert_close(w.detach(), before, rtol=0, atol=1e-6)


def test_the_read_out_is_as_long_as_the_base():
    for seed in range(3):
        optimizer = DeepMomentum([w := nn.Parameter(torch.zeros(30, 10))], lr=1.0, weight_decay=0, gamma=1, ramp=0, memory_lr=0)
        twin = torch.optim.AdamW([v := nn.Parameter(torch.zeros(30, 10))], lr=1.0, weight_decay=0)
        with torch.no_grad():
            for p in optimizer.memory.out.parameters(): p.normal_(generator=torch.Generator().manual_seed(seed))
        w.grad = v.grad = torch.randn(30, 10)
        optimizer.step(); twin.step()
        torch.testing.assert_close(w.norm(), v.norm())
        assert (w - v).abs().max() > 1e-3


def test_gamma_rises_from_zero():
    optimizer = DeepMomentum([w := nn.Parameter(torch.ones(3, 3))], gamma=0.4, ramp=4)
    seen = []
    for _ in range(6): w.grad = torch.ones(3, 3); optimizer.step(); seen.append(optimizer.risen)
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_state_is_exactly_what_is_promised():
    model = net()
    matrices, vectors = (sum(p.numel() for p in model.parameters() if (p.ndim > 1) == wide) for wide in (True, False))
    fit(model, optimizer := deep(model), 9)
    assert state_bytes(optimizer) == 12*matrices + 8*vectors
    fit(model, plain := torch.optim.AdamW(model.parameters()), 1)
    assert state_bytes(plain) == 8*(matrices + vectors)
    slow = sum(p.numel() for i in (0, 1, 3) for p in model[i].parameters())
    fit(model, several := multi(model), 5)
    assert state_bytes(several) == 8*(matrices + vectors) + 4*slow


# ---- what is broken, and what is refused ----

@pytest.mark.parametrize("make", [deep, multi])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_changes_nothing(make, value):
    model = net()
    fit(model, optimizer := make(model), 7)
    state, weights = copy.deepcopy(optimizer.state_dict()), flat(model)
    for p in model.parameters(): p.grad = torch.ones_like(p)
    model[0].weight.grad.view(-1)[3] = value
    optimizer.step()
    now = optimizer.state_dict()
    assert torch.equal(flat(model), weights) and optimizer.skipped == 1
    if "memory" in now: now["memory"]["skipped"] = 0
    assert same(now, state)


def test_what_is_refused():
    model = net()
    with pytest.raises(UsageError, match=r"shape \(8, 3, 3, 3\) stands in the group of period 1 and in the group of period 16"):
        MultiFrequency({1: model.parameters(), 16: model[0].parameters()})
    with pytest.raises(UsageError, match="twice in the group of period 4"): MultiFrequency({4: [model[0].weight, model[0].weight]})
    with pytest.raises(UsageError, match="a period is 0"): MultiFrequency({0: model.parameters()})
    with pytest.raises(UsageError, match="no dictionary"): MultiFrequency(model.parameters())
    for bad, told in ((dict(gamma=0.6), "gamma is 0.6"), (dict(lr=-1), "lr is -1"), (dict(layers=3), "layers 1 or 2"),
                      (dict(samples=0), "samples is 0"), (dict(slow_every=0), "slow_every is 0"), (dict(ramp=-1), "ramp is -1")):
        with pytest.raises(UsageError, match=told): DeepMomentum(model.parameters(), **bad)
    with pytest.raises(UsageError, match="keep weights in float32"): DeepMomentum(net().bfloat16().parameters())
    with pytest.raises(UsageError, match="keep weights in float32"): MultiFrequency({1: net().half().parameters()})
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match="sparse"): DeepMomentum(table.parameters()).step()
    for amp in ("bf16", torch.bfloat16):
        with pytest.raises(UsageError, match="GradScaler together with bf16"): check_scaler(torch.amp.GradScaler("cpu"), amp)
    with pytest.raises(UsageError, match="need a stem, a middle and a head"): depth_periods(nn.Sequential(nn.Linear(2, 2)))


# ---- state ----

@pytest.mark.parametrize("make", [deep, multi])
def test_a_run_that_is_resumed_from_a_file_goes_on_bit_for_bit(make):
    whole = net()
    optimizer = make(whole)
    fit(whole, optimizer, 13, 1)  # inside every period
    weights, state = copy.deepcopy(whole.state_dict()), through_file(optimizer.state_dict())
    end = fit(whole, optimizer, 14, 2)
    again = net(5)
    again.load_state_dict(weights)
    resumed = make(again)
    resumed.load_state_dict(state)
    assert torch.equal(fit(again, resumed, 14, 2), end)
    assert same(resumed.state_dict(), optimizer.state_dict())


def test_a_copy_is_whole_and_its_own():
    model = net()
    fit(model, optimizer := deep(model), 5)
    twin = copy.deepcopy(optimizer)
    assert same(twin.state_dict(), optimizer.state_dict()) and twin.memory.a is not optimizer.memory.a
    assert twin.learner.param_groups[0]["params"][0] is next(twin.memory.parameters())


def test_another_optimisers_state_is_refused():
    model = net()
    fit(model, optimizer := deep(model), 2)
    with pytest.raises(UsageError, match="holds no memory"): optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    with pytest.raises(UsageError, match="same hidden and layers"): deep(model, hidden=64).load_state_dict(optimizer.state_dict())


# ---- precision, accumulation, closures ----

@pytest.mark.parametrize("make", [deep, multi])
def test_a_gradient_scaler_changes_no_bit_and_skips_what_overflows(make):
    plain, scaled = net(), net()
    want = fit(plain, make(plain), 12)
    optimizer, scaler = make(scaled), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for x, y in batches(12):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(scaled(x), y)).backward()
        scaler.unscale_(optimizer); scaler.step(optimizer); scaler.update()
    torch.testing.assert_close(flat(scaled), want, rtol=0, atol=1e-6)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(scaled(x), y)*float("inf")).backward()
    scaler.unscale_(optimizer); scaler.step(optimizer); scaler.update()
    assert same(optimizer.state_dict(), state) and scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("make", [deep, multi])
def test_bf16_autocast_around_the_step_does_not_reach_it(make):
    models = net(), net()
    for model, inside in zip(models, (True, False)):
        optimizer = make(model)
        for t in range(6):
            for i, p in enumerate(model.parameters()): p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100*t + i))
            with torch.autocast("cpu", torch.bfloat16, enabled=inside): optimizer.step()
    assert torch.equal(flat(models[0]), flat(models[1]))


@pytest.mark.parametrize("make", [deep, multi])
def test_four_accumulated_batches_are_one_large_batch(make):
    models = net().eval(), net().eval()  # batch statistics would differ
    for model, parts in zip(models, (1, 4)):
        optimizer = make(model)
        for x, y in batches(8, size=32):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts)): (F.cross_entropy(model(a), b)/parts).backward()
            optimizer.step()
    torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [deep, multi])
def test_a_closure_is_called_with_gradients_on(make):
    model, calls = net(), []
    optimizer = make(model)
    x, y = next(batches(1))

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        calls.append(loss.item())
        return loss
    first = optimizer.step(closure)
    for _ in range(20): optimizer.step(closure)
    assert len(calls) == 21 and calls[-1] < calls[0] == first.item()


def test_weights_without_a_gradient_stay_and_come_in_later():
    model = net()
    for p in model[0].parameters(): p.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    for make in (deep, multi):
        fit(model, optimizer := make(model), 5)
        assert torch.equal(model[0].weight, frozen)
    for p in model[0].parameters(): p.requires_grad_(True)
    fit(model, optimizer := deep(model), 5)
    assert not torch.equal(model[0].weight, frozen) and optimizer.drain()["surprise"] is not None


# ---- in the loop ----

ARGS = {"deep_momentum": {"gamma": 0.5, "ramp": 4, "memory_lr": 1e-2}, "multi_frequency": None}


def run(out, name, cut=None, epochs=2, amp="no", accumulate=2):
    data, model = Faces(72), small_net()
    config = TrainConfig(epochs, 3e-3, accumulate=accumulate, amp=amp, warmup_epochs=0, seed=1, optimizer=name, optimizer_args=ARGS[name])
    extras = [OptimizerLog(), *([cut] if cut else [])]
    history = train(model, FaceBatches(data, 12, train=True, seed=1), eval_loader(data), ce, config, out, {}, callbacks=extras, bar=False)
    return model, history


class Cut(Callback):
    order = 5
    def before_batch(self):
        if self.training and self.epoch == 1 and self.iter == 3: raise ConnectionError("power cut")


@pytest.mark.parametrize("name", list(ARGS))
def test_the_loop_resumes_bit_equal_and_logs(tmp_path, name):
    whole, history = run(tmp_path/"whole", name)
    with pytest.raises(ConnectionError): run(tmp_path/"cut", name, Cut())
    again, resumed = run(tmp_path/"cut", name)
    assert torch.equal(flat(whole), flat(again))
    a, b = (load_checkpoint(tmp_path/d/"checkpoint_last.pt", ("optimizer",))["optimizer"] for d in ("whole", "cut"))
    assert same(a, b)
    timed = ("seconds", "per_second", "fraction")
    def steady(rows): return [{k: v for k, v in r.items() if not any(t in k for t in timed)} for r in rows]
    assert steady(history.rows) == steady(resumed.rows)
    last = history.rows[-1]
    assert last["steps"] == 6 and last["grad_norm"] > 0 and last["optimizer_state_mb"] > 0
    assert history.rows[-1]["train_loss"] < history.rows[0]["train_loss"]
    if name == "deep_momentum":
        assert last["memory_surprise"] > 0 and last["memory_r2"] < 1 and last["memory_gamma"] == 0.5
        assert "R²" in memory_verdict(history)
    else: assert "memory_r2" not in last and memory_verdict(history) == ""


@pytest.mark.parametrize("name", list(ARGS))
def test_the_loop_runs_in_bf16(tmp_path, name):
    _, history = run(tmp_path, name, amp="bf16", accumulate=4, epochs=1)
    assert history.rows[0]["skipped_steps"] == 0 and history.rows[0]["steps"] == 2


def test_the_config_makes_the_student_s_optimisers():
    student = make_student()
    deep_, several = (make_optimizer(student, TrainConfig(weight_decay=0.1, optimizer=n)).opt for n in ("deep_momentum", "multi_frequency"))
    assert {g["weight_decay"] for g in deep_.param_groups} == {0.0, 0.1}
    for opt in (deep_, several):
        assert sum(p.numel() for g in opt.param_groups for p in g["params"]) == sum(p.numel() for p in student.parameters())
        assert all(p.ndim > 1 for g in opt.param_groups if g["weight_decay"] for p in g["params"])
    period = {p: g["period"] for g in several.param_groups for p in g["params"]}
    parts = student.conv_stem, student.blocks[0][0].conv_dw, student.blocks[3][0].conv_dw, student.blocks[5][0].conv_dw, student.classifier
    assert [period[m.weight] for m in parts] == [16, 16, 4, 1, 1]
    own = make_optimizer(student, TrainConfig(optimizer="multi_frequency", optimizer_args={"periods": [8, 2, 1]})).opt
    assert {g["period"] for g in own.param_groups} == {8, 2, 1}
    for name, wrong in (("deep_momentum", {"depth": 3}), ("multi_frequency", {"gamma": 0.1})):
        with pytest.raises(UsageError, match="optimizer_args"): make_optimizer(student, TrainConfig(optimizer=name, optimizer_args=wrong))
    with pytest.raises(UsageError, match="optimizer_args are for the optimisers of 07_nl"):
        make_optimizer(student, TrainConfig(optimizer_args={"gamma": 0.1}))
    prints = {TrainConfig(optimizer="deep_momentum", optimizer_args=a).fingerprint() for a in (None, {"gamma": 0.1}, {"gamma": 0.2})}
    assert len(prints) == 3
