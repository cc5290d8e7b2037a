"Each option of training does what it says: one test per option, that would fail if the option were ignored."
import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn as nn
from torch.optim import lr_scheduler

from aam.cli import load_command
from aam.config import AamError, EncoderOptions, InputOptions, TrainingOptions, build_options, optimizer_names, parse_command, scheduler_names
from aam.data import Plan, SampleData, draws_to_csr, loader, make_batch, view_draw
from aam.graphs import Graphed, pad_batch
from aam.inputs import read_inputs
from aam.losses import Objective, learnt_unifrac
from aam.metadata import numeric_targets
from aam.monitor import Meter, Record
from aam.optim import AveragedWeights, Schedule, optimizers
from aam.predictor import Model, prime
from aam.session import find_compiler, largest_batch, measured_batch_size, peak_memory, pick_compile, tf32
from aam.table import make_table
from aam.trainer import Training, autocast, compile_model, fit, gradients, train_step, validate
from aam.unifrac import Branches

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
small = dict(embedding_dim=16, attention_layers=1, attention_heads=2, kmer_dim=8, unifrac_branches=12, max_bp=40, dropout=0.)


def sample_data(**how):
    rng = np.random.default_rng(0)
    sequences = sorted({''.join(rng.choice(list('ACGT'), 40)) for _ in range(10)})
    counts = rng.integers(1, 30, (12, 10)) * (rng.random((12, 10)) < .7)
    target = (counts[:, :1] / counts.sum(1, keepdims=True)).astype(np.float32)
    branches = Branches(np.arange(10), np.arange(10), np.arange(10) + 1, np.ones(10))
    return SampleData(make_table(counts, [f's{i:02}' for i in range(12)], sequences), depth=40, branches=branches, target=target, **how)


def training(tasks=('target',), batch_size=4, device='cpu', data=None, rates=None, **options):
    "Twelve samples, eight of them to fit on; a model for `tasks`."
    torch.manual_seed(0)
    data = data or sample_data()
    model = Model(EncoderOptions(**small), tasks, outputs=1)
    views = tuple(v for v in ('target', 'count', 'unifrac') if v in tasks)
    train, stop = (Plan(data, list(range(*part)), views, 'nuc' in tasks, batch_size, training=part[0] == 0) for part in ((0, 8), (8, 12)))
    model.to(device)
    prime(model, train.batch(0, 0).to(device))
    objective = Objective(dict.fromkeys(tasks, 1.), target_deviation=torch.tensor(data.target.std(0)))
    return Training(model, objective, train, stop, TrainingOptions(**options), device=device, rates=rates)


def rates(t, steps):
    "Learning rates of the first steps, as the optimizer had them."
    found = []
    for _ in range(steps):
        train_step(t, [t.train.batch(0, 0)], Meter())
        found.append(t.optimizer.param_groups[0]['lr'])
    return found


# ---- the learning rate, point by point against PyTorch

def torch_curve(scheduler, steps, **how):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=.1)
    course = scheduler(optimizer, **how)
    found = [optimizer.param_groups[0]['lr']]
    for _ in range(steps - 1): # some refuse to step past their total
        optimizer.step()
        course.step()
        found.append(optimizer.param_groups[0]['lr'])
    return found


def curve(steps, **options):
    schedule = Schedule(TrainingOptions(lr=.1, **options), steps)
    return [.1 * schedule.share(s) for s in range(steps)]


@pytest.mark.parametrize('eta_min', [0., .01])
def test_cosine_restarts(eta_min):
    ours = curve(100, scheduler='cosine_restarts', warmup_steps=0, scheduler_t0=7, scheduler_t_mult=2, scheduler_eta_min=eta_min)
    np.testing.assert_allclose(ours, torch_curve(lr_scheduler.CosineAnnealingWarmRestarts, 100, T_0=7, T_mult=2, eta_min=eta_min), rtol=1e-9)
    equal = curve(100, scheduler='cosine_restarts', warmup_steps=10, scheduler_t0=9, scheduler_t_mult=1, scheduler_eta_min=eta_min)
    np.testing.assert_allclose(equal[10:], torch_curve(lr_scheduler.CosineAnnealingWarmRestarts, 90, T_0=9, eta_min=eta_min), rtol=1e-9)


@pytest.mark.parametrize('eta_min', [0., .01])
def test_warmup_cosine(eta_min):
    ours = curve(60, warmup_steps=10, scheduler_eta_min=eta_min)
    np.testing.assert_allclose(ours[10:], torch_curve(lr_scheduler.CosineAnnealingLR, 50, T_max=50, eta_min=eta_min), rtol=1e-9)
    np.testing.assert_allclose(ours[:10], eta_min + (.1 - eta_min) * np.arange(1, 11)/11)


@pytest.mark.parametrize('steps', [10, 57, 1000])
def test_onecycle(steps):
    np.testing.assert_allclose(curve(steps, scheduler='onecycle'), torch_curve(lr_scheduler.OneCycleLR, steps, max_lr=.1, total_steps=steps), rtol=1e-7)
    ours = curve(steps, scheduler='onecycle', warmup_steps=steps//2)
    np.testing.assert_allclose(ours, torch_curve(lr_scheduler.OneCycleLR, steps, max_lr=.1, total_steps=steps, pct_start=(steps//2)/steps), rtol=1e-7)
    assert min(curve(steps, scheduler='onecycle', scheduler_eta_min=.02)) >= .02


@pytest.mark.parametrize('patience,factor', [(1, .5), (3, .1)])
def test_plateau(patience, factor):
    losses = np.random.default_rng(0).choice([3., 2., 1.9999, 1.5, 1.], 60, p=[.3, .3, .3, .08, .02])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=.1)
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, factor=factor, patience=patience, eps=0)
    ours = Schedule(TrainingOptions(lr=.1, scheduler='plateau', warmup_steps=0, scheduler_patience=patience, scheduler_factor=factor), 1000)
    for loss in losses:
        theirs.step(loss)
        ours.watch(loss)
        assert math.isclose(ours.share(999) * .1, optimizer.param_groups[0]['lr'])
    assert ours.falls > 3


@pytest.mark.parametrize('name', scheduler_names)
def test_three_steps_and_beyond(name):
    for steps in 1, 2, 3, 4:
        schedule = Schedule(TrainingOptions(lr=.1, scheduler=name), steps)
        shares = [schedule.share(s) for s in range(steps + 3)]
        assert shares[0] > 0 and all(0 <= s <= 1 for s in shares)
        assert shares[steps:] == [shares[steps - 1]]*3 # never past the total


@pytest.mark.parametrize('name', scheduler_names)
def test_schedule_is_applied_each_optimizer_step(name):
    options = dict(scheduler=name, lr=.01, epochs=3, gradient_accumulation_steps=2)
    t = training(**options) # eight samples, batches of four, two to a step: three steps
    assert t.total_steps == 3
    expected = [.01 * Schedule(t.options, 3).share(s) for s in range(3)]
    assert rates(t, 3) == expected


def test_plateau_listens_to_validation_and_resumes(tmp_path):
    options = dict(scheduler='plateau', scheduler_patience=1, lr=.01, epochs=6, warmup_steps=0, patience=99)
    t = training(**options)
    t.objective.weights = dict(target=0.) # nothing learns: no epoch is better
    states = []
    fit(t, 'regression', lambda v: {}, save_last=lambda s: states.append(torch.save(s, tmp_path/f'{len(states)}.pt')))
    assert t.schedule.falls == 2 and t.rate == .01/4
    again = training(**options)
    again.objective.weights = dict(target=0.)
    again.load_state_dict(torch.load(tmp_path/'2.pt', weights_only=True))
    assert again.schedule.falls == 1
    fit(again, 'regression', lambda v: {})
    assert again.schedule.state_dict() == t.schedule.state_dict() and again.rate == t.rate


def refused(**given):
    with pytest.raises(AamError) as error: build_options(dict(training=TrainingOptions), given)
    return str(error.value)


def test_options_of_another_scheduler_are_refused():
    assert '--scheduler-t0 5: belongs to --scheduler cosine_restarts, not warmup_cosine' in refused(scheduler_t0=5)
    assert 'not onecycle' in refused(scheduler='onecycle', scheduler_patience=3)
    assert '--scheduler-eta-min' in refused(scheduler='plateau', scheduler_eta_min=1e-6)
    assert 'must not be above --lr' in refused(lr=1e-4, scheduler_eta_min=1e-3)
    build_options(dict(training=TrainingOptions), dict(scheduler='plateau', preset='large')) # the preset's own are not the user's


# ---- the optimizer

@pytest.mark.parametrize('name', optimizer_names)
def test_optimizer(name):
    t = training(optimizer=name, lr=1e-2, warmup_steps=0, average_decay=0.)
    assert type(t.optimizer) is optimizers[name]
    group = t.optimizer.param_groups[0]
    before = group['params'][0].detach().clone()
    train_step(t, [t.train.batch(0, 0)], Meter())
    moved = (group['params'][0] - before*(1 - (group['lr']*group['weight_decay'] if name == 'adamw' else 0))).abs()
    if name != 'sgd': assert moved.max() <= 1.001e-2 # Adam's first step is lr times a sign
    assert moved.max() > 0


def test_weight_decay():
    t = training(weight_decay=.3)
    names = {id(p): n for n, p in t.model.named_parameters()}
    decayed, free = ([names[id(p)] for g in t.optimizer.param_groups if (g['weight_decay'] == .3) == yes for p in g['params']] for yes in (True, False))
    assert 'encoder.project.weight' in decayed and 'encoder.project.bias' in free and 'encoder.norm.weight' in free
    assert len(decayed) + len(free) == len(names) and all(t.model.get_parameter(n).ndim > 1 for n in decayed)
    off = training(weight_decay=0.)
    train_step(t, [t.train.batch(0, 0)], Meter())
    train_step(off, [off.train.batch(0, 0)], Meter())
    w = lambda t: t.model.encoder.project.weight.norm()
    assert w(t) < w(off)


def test_rates_of_their_own():
    t = training(lr=1e-3, rates={'heads.target': 1e-2}, scheduler='warmup_cosine', warmup_steps=2, epochs=10)
    train_step(t, [t.train.batch(0, 0)], Meter())
    head = {id(p) for p in t.model.heads['target'].parameters()}
    for g in t.optimizer.param_groups:
        mine = {id(p) in head for p in g['params']}
        assert len(mine) == 1 and math.isclose(g['lr'], (1e-2 if mine == {True} else 1e-3)/3)
    assert math.isclose(t.rate, 1e-3/3) # what is shown is --lr's


@pytest.mark.parametrize('limit', [1e-3, 0.])
def test_max_grad_norm(limit):
    t = training(optimizer='sgd', lr=1., warmup_steps=0, max_grad_norm=limit, weight_decay=0., average_decay=0.)
    before = [p.detach().clone() for p in t.model.parameters()]
    _, norm = train_step(t, [t.train.batch(0, 0)], Meter())
    moved = math.sqrt(sum(float((p - b).detach().square().sum()) for p, b in zip(t.model.parameters(), before)))
    assert norm > .01
    assert math.isclose(moved, limit or float(norm), rel_tol=1e-2)


@pytest.mark.parametrize('decay', [0., .3, .9])
def test_averaged_weights(decay):
    "An exponential mean whose decay grows to `average_decay`, against NumPy."
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average, expected = AveragedWeights(model, decay), model.weight.detach().numpy().copy()
    for step in range(1, 30):
        with torch.no_grad(): model.weight.add_(torch.randn(2, 3))
        average.update()
        d = min(decay, (1 + step)/(10 + step))
        expected = d*expected + (1 - d)*model.weight.detach().numpy()
    with average.swapped_in(model): np.testing.assert_allclose(model.weight.detach(), expected, rtol=1e-4, atol=1e-6)
    assert np.allclose(model.weight.detach(), expected, rtol=1e-4, atol=1e-6) == (decay == 0)


@pytest.mark.parametrize('metric,best', dict(val_loss=None, r2=2, mae=3, accuracy=4, f1=1).items())
def test_best_epoch(metric, best):
    "Scores that disagree, epoch by epoch: the one that `metric` calls best is kept."
    scripts = dict(r2=[.1, .9, .3, .2], mae=[5., 4., 3., 4.], accuracy=[.7, .6, .5, .9], f1=[.9, .1, .2, .3])
    t, kept, losses = training(epochs=4, lr=1e-3), [], []
    fit(t, 'regression', lambda v: {name: values[t.epoch] for name, values in scripts.items()}, metric,
        save_best=lambda model, scores: kept.append(t.best_epoch), report=lambda t, line: losses.append(line['val_loss']))
    assert len(losses) == 4 and kept[-1] == t.best_epoch == (best or 1 + int(np.argmin(losses)))


# ---- accumulation

@pytest.mark.parametrize('sizes', [[4, 4], [3, 3, 2]])
def test_accumulated_batches_are_one_batch(sizes):
    "Clipped too, and the last group is a smaller one."
    def head(sizes):
        t = training(optimizer='sgd', lr=.1, warmup_steps=0, max_grad_norm=.1)
        t.model.eval() # statistics move by batch
        starts = np.cumsum([0, *sizes])
        loss, norm = train_step(t, [make_batch(t.train.data, range(a, b), ('target',)) for a, b in zip(starts, starts[1:])], Meter())
        return [loss, norm, *t.model.state_dict().values()]
    for a, b in zip(head(sizes), head([8])): torch.testing.assert_close(a, b)


def test_last_partial_accumulation():
    t = training(batch_size=3, gradient_accumulation_steps=2, epochs=2, max_grad_norm=1e-3, optimizer='sgd', lr=1., weight_decay=0., warmup_steps=0)
    steps, before = [], [p.detach().clone() for p in t.model.parameters()]
    class Steps(Record):
        def __init__(self): pass
        def step(self, values, step): steps.append((step, values['grad_norm']))
        def epoch(self, *a): pass
    fit(t, 'regression', lambda v: {}, record=Steps())
    assert [s for s, _ in steps] == [1, 2, 3, 4] # three batches: a step of two and a step of one, twice
    moved = math.sqrt(sum(float((p - b).detach().square().sum()) for p, b in zip(t.model.parameters(), before)))
    speed = np.array([1, 1.9, 2.71, 3.439])*1e-3 # of SGD with momentum 0.9, each gradient clipped to 1e-3
    assert all(n > 1e-3 for _, n in steps) and moved <= (speed * [t.schedule.share(k) for k in range(4)]).sum() * 1.001


# ---- precision, compiling, memory

def test_bf16_on_a_cpu():
    t, full = training(mixed_precision='bf16'), training()
    assert full.precision == 'none'
    outputs = []
    for x in t, full:
        seen = []
        x.model.encoder.project.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.dtype))
        outputs.append(validate(x.model, x.stop, x.objective, precision=x.precision).target)
        assert set(seen) == {torch.bfloat16 if x is t else torch.float32}
    assert not torch.equal(*outputs) and torch.allclose(*outputs, rtol=.1, atol=.05)
    loss, _ = train_step(t, [t.train.batch(0, 0)], Meter())
    assert torch.isfinite(loss) and all(p.dtype == torch.float32 for p in t.model.parameters())


def test_fp16_on_a_cpu_is_refused(aam, inputs, tmp_path):
    table = [w for w in inputs if w not in ('--metadata', inputs[3])]
    said = aam('pretrain', *table, '--output-dir', tmp_path/'run', *aam.tiny, '--mixed-precision', 'fp16', fails=True)
    assert said.returncode == 2 and '--mixed-precision fp16' in said.err and len(said.err.strip().splitlines()) == 1


def test_scaled_losses_give_the_same_step(tmp_path):
    "The scaler of fp16, here on fp32; its state is part of the training state."
    scaled, plain = training(optimizer='sgd', lr=.1, warmup_steps=0), training(optimizer='sgd', lr=.1, warmup_steps=0)
    scaled.scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)
    norms = [train_step(t, [t.train.batch(0, 0)], Meter())[1] for t in (scaled, plain)]
    torch.testing.assert_close(*norms)
    for a, b in zip(scaled.model.state_dict().values(), plain.model.state_dict().values()): torch.testing.assert_close(a, b)
    torch.save(scaled.state_dict(), tmp_path/'last.pt')
    assert torch.load(tmp_path/'last.pt', weights_only=True)['scaler']['scale'] == 2.**10


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize('precision', ['bf16', 'fp16', 'none'])
def test_precision_on_a_gpu(precision):
    t = training(tasks=('target', 'count', 'unifrac', 'nuc'), device='cuda', mixed_precision=precision, lr=1e-3)
    losses = [float(train_step(t, [t.train.batch(0, 0)], Meter())[0]) for _ in range(20)]
    assert losses[-1] < losses[0] and t.scaler.is_enabled() == (precision == 'fp16')
    with autocast('cuda', t.precision): dtype = (torch.ones(8, 8, device='cuda') @ torch.ones(8, 8, device='cuda')).dtype
    assert dtype == dict(bf16=torch.bfloat16, fp16=torch.float16, none=torch.float32)[precision]
    state = t.state_dict()
    assert bool(state['scaler']) == (precision == 'fp16')
    t.load_state_dict(state)


def test_tf32():
    flags = lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    before = flags()
    for on in True, False:
        with tf32(on): assert flags() == (on, on)
        assert flags() == before


@pytest.mark.gpu
@gpu
def test_tf32_rounds():
    x = torch.rand(1024, 1024, device='cuda')
    with tf32(False): exact = x @ x
    with tf32(True): rounded = x @ x
    assert not torch.equal(exact, rounded)


@pytest.mark.parametrize('words,value', [(['--compile-model'], 'on'), (['--compile-model', 'auto'], 'auto'), ([], None)])
def test_compile_model_by_itself(words, value):
    "As the guide has it, without a value."
    given = parse_command(load_command('pretrain'), ['--table', 't.biom', '--output-dir', 'o', *words, '--epochs', '3'], 'aam pretrain')
    assert given.get('compile_model') == value and given['epochs'] == 3


def test_compile_choices(monkeypatch, tmp_path):
    for name in 'CC', 'CXX': monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('PATH', str(tmp_path)) # no compiler
    for device in 'cpu', 'cuda':
        assert find_compiler(device) is None and not pick_compile('auto', device) and not pick_compile('off', device)
        with pytest.raises(AamError, match='module load gcc'): pick_compile('on', device)
    for name in 'gcc', 'g++':
        (tmp_path/name).write_text('')
        os.chmod(tmp_path/name, 0o755)
    assert pick_compile('on', 'cpu') and pick_compile('on', 'cuda') and pick_compile('auto', 'cuda') and not pick_compile('auto', 'cpu')
    monkeypatch.setattr(torch.version, 'hip', '6.3.0')
    assert not pick_compile('auto', 'cuda')
    with pytest.raises(AamError, match='ROCm'): pick_compile('on', 'cuda')


def test_compiled_blocks_keep_their_names_and_results():
    "The graphs that would be compiled, run by PyTorch itself."
    t, plain = training(), training()
    names, graphs = list(t.model.state_dict()), []
    compile_model(t.model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for _ in range(3):
        torch.testing.assert_close(train_step(t, [t.train.batch(0, 0)], Meter())[0], train_step(plain, [plain.train.batch(0, 0)], Meter())[0])
    assert graphs and list(t.model.state_dict()) == names and list(t.average.values) == list(plain.average.values)


@pytest.mark.slow
def test_compile_on(aam, inputs, tmp_path):
    aam('pretrain', *inputs[:2], *inputs[4:], '--output-dir', tmp_path/'run', *aam.tiny, '--epochs', 1, '--compile-model', 'on')
    weights = torch.load(tmp_path/'run'/'checkpoints'/'best_model.pt', weights_only=True)['weights']
    assert not [k for k in weights if '_orig_mod' in k]


def survey_training(survey, **how):
    "All tasks on the simulated survey, which has more to it than twelve random samples."
    inputs = read_inputs(InputOptions(table=survey/'table.biom', tree=survey/'tree.nwk'), survey/'metadata.tsv')
    target = numeric_targets(inputs.frame, ['soil_ph']).astype(np.float32)
    target = np.nan_to_num((target - np.nanmean(target)) / np.nanstd(target))
    t = training(('target', 'count', 'unifrac', 'nuc'), 16, data=SampleData(inputs.table, inputs.depth, max_bp=40, branches=inputs.branches, target=target), **how)
    t.train = replace(t.train, samples=list(range(16)))
    prime(t.model, t.train.batch(0, 0).to(t.device))
    return t


def first_gradient(t, plain=False):
    "Losses and all gradients of the first batch: computed plainly, or by the third call, a replay."
    t.model.train()
    for _ in range(1 if plain else 3):
        torch.manual_seed(0)
        t.optimizer.zero_grad(set_to_none=False)
        found = gradients(t, t.train.batch(0, 0).to(t.device)) if plain else t.gradients(t.train.batch(0, 0))
    losses = torch.stack([total/count for total, count in ([x.cpu() for x in pair] for pair in found.values())])
    return losses, torch.cat([p.grad.flatten() for p in t.model.parameters()]).clone()


def test_padding_for_a_gpu_changes_nothing(survey):
    "What a recorded step reads, worked on here: the same losses and gradients."
    t = survey_training(survey, mixed_precision='none')
    batch = t.train.batch(0, 0)
    padded = pad_batch(batch, Graphed(None, 'cpu').room(batch))
    assert len(padded.tokens) > len(batch.tokens) and padded.index.shape[1] > batch.index.shape[1] and len(padded.nuc_truth) > len(batch.nuc_truth)
    losses, found = [], []
    for b in batch, padded:
        t.model.train(); torch.manual_seed(0); t.optimizer.zero_grad()
        losses.append({name: float(total/count) for name, (total, count) in gradients(t, b).items()})
        found.append(torch.cat([p.grad.flatten() for p in t.model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (found[0] - found[1]).norm() < 1e-4*found[0].norm()


@pytest.mark.gpu
@gpu
def test_recorded_and_compiled_on_a_gpu(survey):
    "Speed changes nothing: losses and gradients are those of plain steps; in bf16 no further from fp32 than plain bf16 is."
    plain, fast, short, fast_short = (survey_training(survey, device='cuda', mixed_precision=p) for p in ('none', 'none', 'bf16', 'bf16'))
    for t in fast, fast_short: compile_model(t.model)
    (losses, gradient), (fast_losses, fast_gradient) = first_gradient(plain, plain=True), first_gradient(fast)
    torch.testing.assert_close(fast_losses, losses, rtol=1e-5, atol=1e-5)
    apart = lambda g: float((g - gradient).norm()/gradient.norm())
    assert apart(fast_gradient) < 1e-4, apart(fast_gradient)
    (short_losses, short_gradient), (fast_short_losses, fast_short_gradient) = first_gradient(short, plain=True), first_gradient(fast_short)
    torch.testing.assert_close(fast_short_losses, short_losses, rtol=1e-2, atol=1e-2)
    assert apart(fast_short_gradient) < 1.2*apart(short_gradient), (apart(fast_short_gradient), apart(short_gradient))
    assert fast.gradients.replays and all(replay.graph is not None for t in (fast, fast_short) for _, replay in t.gradients.replays.values())


def test_auto_batch_size():
    tried = []
    def measure(n):
        tried.append(n)
        return 5. + 2*n + .01*n*n if n < 64 else math.inf
    assert largest_batch(measure, 1000, 1e9) == 32 and tried[-1] == 64 # out of memory is an answer too
    assert largest_batch(measure, 31, 1e9) == 16
    tried.clear()
    assert largest_batch(measure, 1000, 50.) == 16 and tried == [1, 2, 4, 8, 16] # 32 is foreseen to take 75


def test_auto_batch_size_on_a_cpu(aam, inputs, tmp_path):
    said = aam('pretrain', *inputs[:2], *inputs[4:], '--output-dir', tmp_path/'run', *aam.tiny, '--epochs', 1, '--auto-batch-size', '--tf32')
    assert 'no GPU memory to measure; --batch-size 8 is kept' in said.err and '--tf32: has no effect on a CPU' in said.err
    assert json.loads((tmp_path/'run'/'config.json').read_text())['options']['training']['batch_size'] == 8


@pytest.mark.gpu
@gpu
def test_measured_batch_size():
    t = training(tasks=('target', 'count', 'unifrac', 'nuc'))
    before = {k: v.clone() for k, v in t.model.state_dict().items()}
    size = measured_batch_size(t.model, t.objective, t.train, t.options)
    assert size == 8 # all there are
    assert all(torch.equal(v.cpu(), before[k]) for k, v in t.model.state_dict().items())
    assert peak_memory(t.model, t.objective, t.train, t.options) > 0


@pytest.mark.gpu
@gpu
def test_commands_on_a_gpu(aam, survey, inputs, tmp_path):
    "Pre-train, train, freeze and predict on a GPU; what is predicted there and on the CPU agrees."
    tiny, files = [w for w in aam.tiny if w not in ('--device', 'cpu')], ['--table', survey/'table.biom', '--tree', survey/'tree.nwk']
    said = aam('pretrain', *files, '--output-dir', tmp_path/'pre', *tiny, '--epochs', 1, '--mixed-precision', 'fp16', '--tf32', '--auto-batch-size')
    assert json.loads((tmp_path/'pre'/'config.json').read_text())['options']['training']['batch_size'] == 32 and 'auto-batch-size: 32' in said.err # 38 samples to fit on
    for name, more, devices in (('whole', ['--compile-model', 'on'], ['cuda', 'cpu']), ('frozen', ['--freeze-base'], ['cuda'])):
        said = aam('train', *inputs, '--metadata-column', 'soil_ph', '--output-dir', tmp_path/name, *tiny, '--epochs', 2, '--pretrained-encoder', tmp_path/'pre'/'checkpoints'/'best_model.pt', *more)
        assert 'cannot be recorded' not in said.err
        expected = pd.read_csv(tmp_path/name/'val_predictions.tsv', sep='\t', index_col=0)
        for device in devices:
            aam('predict', '--model', tmp_path/name/'checkpoints'/'best_model.pt', '--table', survey/'table.biom', '--output', tmp_path/f'{name}.{device}.tsv', '--device', device)
            found = pd.read_csv(tmp_path/f'{name}.{device}.tsv', sep='\t', index_col=0).loc[expected.index]
            assert (found.prediction - expected.prediction).abs().max() < 1e-5 * (expected.actual.max() - expected.actual.min()) * (1 if device == 'cuda' else 20)


def test_num_workers():
    t = training(tasks=('target', 'count', 'unifrac', 'nuc'), batch_size=3)
    def epochs(workers): return [b for epoch, start in ((2, 0), (3, 0), (3, 1), (5, 0)) for b in loader(t.train, epoch, workers, start=start)]
    alone, helped = epochs(0), epochs(2)
    t.train.close()
    assert len(alone) == len(helped) == 3 + 3 + 2 + 3
    for a, b in zip(alone, helped):
        assert a.sample_ids == b.sample_ids
        for name in 'tokens', 'index', 'abundance', 'unifrac', 'candidates', 'nuc_positions', 'target': torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True)


# ---- tasks without labels

@pytest.mark.parametrize('strategy', ['random', 'span'])
@pytest.mark.parametrize('ratio', [.1, .4])
def test_masks(strategy, ratio):
    data = sample_data(nuc_mask_ratio=ratio, nuc_mask_strategy=strategy, nuc_share=.999)
    batch = make_batch(data, range(12), ('target',), nucleotides=True, step=3)
    copies = batch.tokens[:batch.groups[0][1]]
    hidden = torch.zeros_like(copies, dtype=torch.bool)
    hidden.view(-1)[batch.nuc_positions] = True
    assert (hidden.sum(1) == round(40*ratio)).all() and len(hidden) >= 9
    stretches = (hidden & ~hidden.roll(1, 1)).sum(1).float().mean()
    assert stretches <= max(1, round(4*ratio)) if strategy == 'span' else stretches > 40*ratio/2


def test_validation_has_fixed_masks_and_every_sample():
    t = training(tasks=('count', 'nuc', 'unifrac'), batch_size=3)
    first, second = (validate(t.model, t.stop, t.objective) for _ in range(2))
    assert first.sample_ids == [f's{i:02}' for i in range(8, 12)] and first.means == second.means
    a, b = (list(loader(t.stop, epoch=0)) for _ in range(2))
    assert [x.nuc_positions.tolist() for x in a] == [x.nuc_positions.tolist() for x in b]
    train = [next(iter(loader(t.train, epoch=e))).nuc_positions.tolist() for e in (0, 1)]
    assert train[0] != train[1]


@pytest.mark.parametrize('metric', ['unweighted', 'weighted', 'weighted_unnormalized', 'generalized'])
def test_unifrac_metric(metric):
    "True distances of a batch against scikit-bio; a head of the same form."
    from skbio import TreeNode
    from skbio.diversity import beta_diversity
    data = sample_data(unifrac_metric=metric)
    *most, last = data.table.sequences
    tree = TreeNode.read([f"(({','.join(f'{s}:1' for s in most)}):0,{last}:1);"])
    counts = draws_to_csr([view_draw(data, 'unifrac', i, 5, False) for i in range(12)], 10).toarray().astype(int)
    how = dict(normalized=True) if metric in ('weighted', 'generalized') else {} # with alpha 1, generalized is weighted
    expected = beta_diversity('unweighted_unifrac' if metric == 'unweighted' else 'weighted_unifrac', counts, data.table.sample_ids, taxa=data.table.sequences, tree=tree, **how).data
    found, deep = make_batch(data, range(12), ('unifrac',), epoch=5).unifrac.numpy(), data.table.reads >= data.depth
    assert (np.isnan(found) == (~np.outer(deep, deep) | np.eye(12, dtype=bool))).all() and deep.sum() > 5
    assert np.nanmax(np.abs(found - expected)) <= 1e-5
    model = Model(EncoderOptions(**small, unifrac_metric=metric), ('unifrac',))
    assert type(model.heads['unifrac']).__name__ == dict(unweighted='UnionHead', weighted='ShareHead', weighted_unnormalized='MovedHead', generalized='GeneralizedHead')[metric]


def test_alpha_of_generalized_unifrac():
    "It reaches the true distances and the head, and belongs to this metric alone."
    with pytest.raises(AamError, match='--unifrac-alpha 0.5: belongs to --unifrac-metric generalized'): build_options(dict(encoder=EncoderOptions), dict(unifrac_alpha=.5))
    distances = [make_batch(sample_data(unifrac_metric='generalized', unifrac_alpha=alpha), range(12), ('unifrac',)).unifrac for alpha in (0., .5, 1.)]
    assert all((a - b).nan_to_num().abs().max() > .01 for a, b in zip(distances, distances[1:]))
    heads = [Model(EncoderOptions(**small, unifrac_metric='generalized', unifrac_alpha=alpha), ('unifrac',)).heads['unifrac'] for alpha in (0., 1.)]
    b = torch.rand(4, 12)
    assert (heads[0].distance(b, b) - heads[1].distance(b, b)).abs().max() > .01


@pytest.mark.parametrize('metric,alpha', [('weighted', 1.), ('weighted_unnormalized', 1.), ('generalized', .5), ('faith_pd', 1.)])
def test_head_learns_its_metric(metric, alpha):
    data = sample_data(unifrac_metric=metric, unifrac_alpha=alpha)
    torch.manual_seed(0)
    model = Model(EncoderOptions(**small | dict(unifrac_branches=64), unifrac_metric=metric, unifrac_alpha=alpha), ('unifrac',))
    plan = Plan(data, list(range(12)), ('unifrac',), False, 12, training=True)
    prime(model, plan.batch(0, 0))
    spread = float(np.nanvar(learnt_unifrac(plan.batch(0, 0).unifrac).numpy()))
    t = Training(model, Objective(dict(unifrac=1.), unifrac_variance=spread), plan, plan, TrainingOptions(lr=1e-2, epochs=200, warmup_steps=0))
    losses = [float(train_step(t, [plan.batch(0, 0)], Meter())[0]) for _ in range(150)]
    assert losses[-1] < min(.2, losses[0]/3)


def test_pretrained_metric_must_agree(aam, inputs, pretrained, tmp_path):
    said = aam('train', *inputs, '--metadata-column', 'soil_ph', '--output-dir', tmp_path/'run', *aam.tiny, '--unifrac-metric', 'weighted',
               '--pretrained-encoder', pretrained/'checkpoints'/'best_model.pt', fails=True)
    assert said.returncode == 2 and '--unifrac-metric weighted' in said.err


# ---- what is shown

def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder/'tensorboard'), size_guidance={'scalars': 0, 'images': 0})
    found.Reload()
    return found


speed = {'train/learning_rate', 'train/gradient_norm', 'train/samples_per_second', 'train/asvs_per_second'}


def test_tensorboard_of_pretrain(pretrained):
    found = events(pretrained)
    assert {'train/total_loss', 'train/unifrac_loss', 'train/nuc_loss', 'val/loss', 'val/unifrac_r2', 'val/nuc_accuracy'} | speed <= set(found.Tags()['scalars'])
    assert set(found.Tags()['images']) == {'loss_curves', 'unifrac'}
    assert all(e.value > 0 for e in found.Scalars('train/gradient_norm'))


def test_tensorboard_of_regression_and_classes(aam, inputs, tmp_path):
    wanted = {'soil_ph': ({'val/mae', 'val/mse', 'val/r2'}, {'loss_curves', 'val_predicted'}),
              'habitat': ({'val/accuracy', 'val/precision', 'val/recall', 'val/f1'}, {'loss_curves', 'val_confusion'})}
    for column, (scalars, images) in wanted.items():
        run, epochs = tmp_path/column, 2
        aam('train', *inputs, '--metadata-column', column, '--output-dir', run, *aam.tiny, '--epochs', epochs, '--lr', 1e-3, *(['--classifier'] if column == 'habitat' else []))
        found = events(run)
        assert {'train/total_loss', 'train/target_loss', 'train/unifrac_loss', 'train/nuc_loss'} | scalars | speed <= set(found.Tags()['scalars'])
        assert set(found.Tags()['images']) == images
        shown = [e.value for e in found.Scalars('train/learning_rate')]
        schedule = Schedule(TrainingOptions(lr=1e-3), len(shown))
        np.testing.assert_allclose(shown, [1e-3 * schedule.share(s) for s in range(len(shown))], rtol=1e-5)


def test_asvs_are_counted_without_padding():
    t = training(batch_size=8)
    batch = t.train.batch(0, 0)
    meter = Meter()
    train_step(t, [batch], meter)
    real = sum(int((batch.abundance[i] > 0).sum()) for i in range(8))
    assert meter.asvs == batch.asvs_read == real < batch.index.numel() and meter.samples == 8


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='another C library keeps memory in its own way')
def test_freed_memory_is_kept():
    "How many pages Linux clears for four small training steps, after four others, with and without it."
    def pages(prepare):
        said = subprocess.run([sys.executable, '-c', f"""
import resource, torch
from aam.session import pick_device
{prepare}
x, w = torch.randn(32768, 256, requires_grad=True), torch.randn(256, 1024)
for step in range(8):
    if step == 4: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    (torch.nn.functional.silu(x @ w) @ w.T).square().sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""], capture_output=True, text=True, check=True)
        return int(said.stdout)
    assert pages("pick_device('cpu')") < pages('')/3
