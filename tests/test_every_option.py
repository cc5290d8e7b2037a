"""Every option that `--help` shows changes what it governs, in each command that has it.

A few runs of the real command line, each with many options away from their defaults, are watched from outside (PyTorch's hooks, the files of the run).
One test per command and option then looks at what that option governs alone. What other files test thoroughly is listed in `elsewhere`."""
import argparse
import io
import json
import logging
import math
import multiprocessing
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.modules import module as hooks

from aam.checkpoint import load_checkpoint, save_checkpoint
from aam.cli import load_command, main, run_command
from aam.config import AamError, TrainingOptions, command_parser
from aam.encoder import Encoder, NucleotideEncoder
from aam.inference import load_predictor
from aam.layers import Block
from aam.start import Start, start_share
from aam.optim import Schedule
from aam.predictor import Model, TargetHead
from aam.table import read_table
from aam.train import train
from aam.unifrac import read_distances, read_faith_pd

torch.set_num_threads(1)
here = Path(__file__).parent


class Watch:
    "What a command does, seen through PyTorch's own hooks: batches, chunks, memory kept for the backward pass."
    def __init__(self):
        self.trained, self.validated, self.weights_seen, self.chunks, self.encoded, self.workers, self.autocast, self.zeroed, self.read, self.judged, self.saved = [], [], [], [], [], [], set(), {}, [], [], 0
        self.learning = False

    def before(self, module, inputs):
        if isinstance(module, Model):
            self.learning = module.training and torch.is_grad_enabled()
            if self.learning:
                self.trained.append(inputs[0])
                self.learner = module
                if len(self.trained) == 1: self.start = module.encoder.project.weight.detach().clone()
                self.workers.append(len(multiprocessing.active_children()) - self.helpers)
                self.autocast.add(torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None)
            elif not module.training:
                self.validated.append(inputs[0])
                self.weights_seen.append(module.encoder.project.weight.detach().clone())
            self.model = module
        if isinstance(module, NucleotideEncoder): (self.chunks if torch.is_grad_enabled() else self.read).append(len(inputs[0]))
        if isinstance(module, Block) and torch.is_grad_enabled():
            kept = inputs[2] if len(inputs) > 2 else None # factors of dropout
            self.zeroed.setdefault(module, []).append(0. if kept is None else float((kept == 0).float().mean()))
        if isinstance(module, TargetHead) and not module.training: self.judged.append(len(inputs[0].states))
        if isinstance(module, Encoder): self.encoded += inputs[0].sample_ids

    def after(self, module, inputs, output):
        if isinstance(module, Model): self.learning = False

    def keep(self, tensor):
        if self.learning: self.saved += tensor.numel()*tensor.element_size()
        return tensor

    def run(self, *words):
        self.helpers = len(multiprocessing.active_children())
        handles = hooks.register_module_forward_pre_hook(self.before), hooks.register_module_forward_hook(self.after)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda t: t): self.result = run_command(list(map(str, words)))
        finally:
            for handle in handles: handle.remove()
        return self


class Files:
    "What a run left behind."
    def __init__(self, folder):
        self.folder = folder
        self.best, self.last = load_checkpoint(folder/'checkpoints'/'best_model.pt'), load_checkpoint(folder/'checkpoints'/'last.pt', part='training')['training']
        self.weights, self.lines = self.best['weights'], [json.loads(line) for line in (folder/'metrics.jsonl').read_text().splitlines()]
        self.said = (folder/'training.log').read_text()

    def ids(self, part): return (self.folder/f'{part}_samples.txt').read_text().split()
    def shape(self, name): return next(tuple(w.shape) for k, w in self.weights.items() if k.endswith(name))
    def named(self, part): return [k for k in self.weights if part in k]

    def rates(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(str(self.folder/'tensorboard'), size_guidance={'scalars': 0}).Reload()
        return np.array([e.value for e in events.Scalars('train/learning_rate')])


width = '--embedding-dim 8 --attention-heads 2 --attention-layers 1 --kmer-dim 4 --unifrac-branches 6 --max-bp 16 --device cpu'
base = f'{width} --epochs 2'
profiles = {
    'base': base,
    'a': '''--embedding-dim 12 --attention-heads 3 --attention-layers 2 --kmer-dim 5 --unifrac-branches 9 --max-bp 30 --dropout 0.3 --no-abundance-input --no-standardise --no-local-view --no-wide-path
            --token-limit 7 --asv-sampling abundance --rarefy-depth 2000 --penalty 3 --nuc-penalty 0.5 --count-penalty 2 --nuc-mask-ratio 0.4 --nuc-mask-strategy span
            --batch-size 5 --epochs 3 --lr 0.01 --optimizer sgd --weight-decay 0 --max-grad-norm 0.001 --scheduler cosine_restarts --warmup-steps 2 --scheduler-t0 3 --scheduler-t-mult 3 --scheduler-eta-min 0.001
            --average-decay 0.5 --gradient-accumulation-steps 2 --asv-chunk-size 5 --mixed-precision bf16 --test-size 0.4 --group-column subject_id --device cpu''',
    'b': f'''{width} --unifrac-matrix MATRIX --unifrac-head euclid --no-clean-unifrac --scheduler plateau --scheduler-patience 1 --scheduler-factor 0.25 --lr 1 --epochs 40 --patience 9
            --train-samples LISTS/train.txt --val-samples LISTS/val.txt --test-samples LISTS/test.txt''',
    'c': f'{base} --num-workers 1 --unifrac-metric weighted --token-limit 7 --rarefy-depth 2000 --auto-batch-size --tf32',
    'd': f'{base} --rarefy-seed 7 --no-gradient-checkpointing',
    'e': f'{base} --seed 7',
    'f': f'{base} --unifrac-metric generalized --unifrac-alpha 0.25',
    'g': f'{base} --unifrac-metric faith_pd --faith-pd DIVERSITIES',
    'preset': '--preset small --embedding-dim 8 --attention-heads 2 --kmer-dim 4 --max-bp 16 --epochs 1 --device cpu',
}
files = {'pretrain': '--table SURVEY/table.biom --metadata SURVEY/metadata.tsv --tree SURVEY/tree.nwk',
         'train': '--table SURVEY/table.biom --metadata SURVEY/metadata.tsv --metadata-column soil_ph --tree SURVEY/tree.nwk --target-penalty 1.75'}


@pytest.fixture(scope='module')
def place(survey, tmp_path_factory):
    folder = tmp_path_factory.mktemp('options')
    ids = read_table(survey/'table.biom').sample_ids
    for name, part in dict(train=ids[:24], val=ids[24:34], test=ids[34:40]).items(): (folder/f'{name}.txt').write_text('\n'.join(part) + '\n')
    return lambda text: text.replace('SURVEY', str(survey)).replace('MATRIX', str(survey/'unifrac.h5')).replace('DIVERSITIES', str(survey/'faith_pd.tsv')).replace('LISTS', str(folder)).split()


@pytest.fixture(scope='module')
def runs(place, tmp_path_factory):
    "A function of command and profile: how it went, and its files. Each runs once."
    done = {}

    def runs(command, profile):
        if (command, profile) not in done:
            folder = tmp_path_factory.mktemp('run')/profile
            given = place(files[command] + ' ' + profiles[profile])
            if profile in 'bg': del given[given.index('--tree'):given.index('--tree') + 2]
            watch = Watch().run(command, *given, '--output-dir', folder)
            done[command, profile] = types.SimpleNamespace(**vars(watch), **vars(Files(folder)), files=Files(folder))
        return done[command, profile]
    return runs


# ---- what each option governs, given a function from a profile to its run

def widest(r): return max(int(b.mask.sum(1).max()) for b in r.trained)
def blocks(r): return [m for m in r.model.modules() if isinstance(m, Block)]
def stacks(r): return {k.split('.blocks.')[0]: max(int(x.split('.blocks.')[1].split('.')[0]) for x in r.weights if x.startswith(k.split('.blocks.')[0] + '.blocks.')) + 1 for k in r.weights if '.blocks.' in k}
def dropped(r, part): return float(np.mean([share for m in r.learner.encoder.get_submodule(part).modules() for share in r.zeroed.get(m, [])]))
def about(shares, wanted): return np.allclose(shares, wanted, atol=.02) and all((s == 0) == (w == 0) for s, w in zip(shares, wanted))
def copies(batch): return sum(group[1] for group in batch.groups)
def sizes(r): return [len(b) for b in r.trained]


def runs_of_masked(r):
    "Masked bases of each copy, and stretches of them."
    length, found = 30, []
    for batch in r.trained:
        hidden = torch.zeros(copies(batch), length, dtype=torch.bool)
        hidden.view(-1)[batch.nuc_positions] = True
        found.append(torch.stack([hidden.sum(1), (hidden & ~torch.nn.functional.pad(hidden, (1, 0))[:, :-1]).sum(1)], 1))
    return torch.cat(found)


def losses_add_up(run):
    weights = dict(unifrac=3, nuc=.5, count=2, **({'target': 1.75} if 'val_target_loss' in run('a').lines[0] else {}))
    for line in run('a').lines:
        parts = {k: w*line[f'val_{k}_loss'] for k, w in weights.items()}
        assert min(parts.values()) > 1e-3 and np.isclose(line['val_total_loss'], sum(parts.values()), rtol=1e-6)
    return True


def rates_follow(r, **options):
    schedule = Schedule(TrainingOptions(**options), len(r.files.rates()))
    np.testing.assert_allclose(r.files.rates(), [options['lr']*schedule.share(s) for s in range(schedule.total)], rtol=1e-5)
    return len(set(np.round(r.files.rates(), 9))) > 3


def restarts(run): return rates_follow(run('a'), lr=.01, scheduler='cosine_restarts', warmup_steps=2, scheduler_t0=3, scheduler_t_mult=3, scheduler_eta_min=.001, epochs=3)


def plateau(run):
    "The recorded rates fall after epochs as the recorded validation losses say."
    r = run('b')
    schedule, per_epoch, expected = Schedule(TrainingOptions(lr=1., scheduler='plateau', scheduler_patience=1, scheduler_factor=.25, epochs=40), 40*(steps := r.lines[0]['step'])), r.lines[0]['step'], []
    for line in r.lines:
        expected += [schedule.share(line['step'] - per_epoch + i) for i in range(steps)]
        schedule.watch(line['val_loss'])
    np.testing.assert_allclose(r.files.rates(), expected, rtol=1e-5)
    return schedule.falls > 0


def groups_whole(run, place_of):
    subject = pd.read_csv(place_of('SURVEY/metadata.tsv')[0], sep='\t', dtype=str).set_index('sample_id').subject_id
    shared = lambda r: set(subject[r.files.ids('train')]) & set(subject[r.files.ids('val')])
    return not shared(run('a')) and bool(shared(run('base')))


def seeds_order(run):
    "Split, order and the weights before the first step."
    a, b = run('base'), run('e')
    return a.files.ids('val') != b.files.ids('val') and a.trained[0].sample_ids != b.trained[0].sample_ids and not torch.equal(a.start, b.start)


def buffers(r): return [s['momentum_buffer'] for s in r.last['optimizer']['state'].values() if s.get('momentum_buffer') is not None]


def of_matrix(run, place_of):
    matrix, r = read_distances(Path(place_of('MATRIX')[0])), run('b')
    at = {s: i for i, s in enumerate(matrix.sample_ids)}
    def same(r):
        batch = r.trained[-1] # of another epoch than the first: a tree gives the distances of this epoch's rarefaction
        where, known = [at[s] for s in batch.sample_ids], batch.unifrac.isfinite().numpy()
        return known.any() and np.allclose(batch.unifrac.numpy()[known], matrix.matrix[np.ix_(where, where)][known], atol=1e-6)
    return same(r), same(run('base'))


def of_file(run, place_of):
    batch, values = run('g').trained[-1], read_faith_pd(place_of('DIVERSITIES')[0])
    known = batch.unifrac.isfinite().numpy()
    return known.any() and np.allclose(batch.unifrac.numpy()[known], values[batch.sample_ids][known], rtol=1e-5) and type(run('g').model.heads['unifrac']).__name__ == 'DiversityHead'


def drawn(run):
    "Reads of a validation sample at another seed."
    a, b = run('base'), run('d')
    assert a.files.ids('val') == b.files.ids('val')
    reads = lambda r: torch.cat([x.abundance.flatten() for x in r.validated[:3]])
    x, y = reads(a), reads(b)
    return len(x) != len(y) or not torch.equal(x, y)


def shares_read(r):
    "Mean abundance of the ASVs that the training batches hold."
    return float(torch.cat([b.abundance[b.mask] for b in r.trained]).mean())


def three_parts(run, place_of, part):
    wanted = set(Path(place_of(f'LISTS/{part}.txt')[0]).read_text().split())
    return wanted >= set(run('b').files.ids(part)) and len(wanted - set(run('b').files.ids(part))) <= 2


effects = { # option: (profiles to be compared) -> whether it has its effect
    'table': lambda run, place: len(run('base').files.ids('train')) + len(run('base').files.ids('val')) in (47, 48),
    'tree': lambda run, place: not of_matrix(run, place)[1],
    'unifrac-matrix': lambda run, place: of_matrix(run, place)[0],
    'faith-pd': of_file,
    'metadata': groups_whole,
    'token-limit': lambda run, place: widest(run('a')) == 7 < widest(run('base')),
    'asv-sampling': lambda run, place: shares_read(run('a')) > 1.05*shares_read(run('c')),
    'rarefy-depth': lambda run, place: run('a').best['depth'] == 2000 < run('base').best['depth'] and 'fewer reads than --rarefy-depth 2000' in (run('a').folder/'dropped_samples.tsv').read_text(),
    'rarefy-seed': lambda run, place: drawn(run),
    **{name: lambda run, place: losses_add_up(run) for name in ('penalty', 'nuc-penalty', 'count-penalty', 'target-penalty')},
    'nuc-mask-ratio': lambda run, place: set(runs_of_masked(run('a'))[:, 0].tolist()) == {12} and set(len(b.nuc_positions)/copies(b) for b in run('base').trained) == {2.},
    'nuc-mask-strategy': lambda run, place: runs_of_masked(run('a'))[:, 1].float().mean() < 2.5, # twelve single bases of thirty make about seven stretches
    'embedding-dim': lambda run, place: [run(p).files.shape('encoder.project.weight') for p in ('a', 'base')] == [(12, 17), (8, 12)],
    'attention-heads': lambda run, place: {m.heads for m in blocks(run('a'))} == {3},
    'attention-layers': lambda run, place: set(stacks(run('a')).values()) == {2} and len(stacks(run('a'))) == 3 and set(stacks(run('base')).values()) == {1},
    'max-bp': lambda run, place: [run(p).trained[0].tokens.shape[1] for p in ('a', 'base')] == [30, 16],
    'dropout': lambda run, place: about([dropped(run(p), part) for p in ('a', 'base') for part in ('asvs', 'sample_stack', 'encoder_stack')], [0., .3, .3, 0., .1, .1]),
    'unifrac-branches': lambda run, place: [run(p).files.shape('heads.unifrac.length') for p in ('a', 'base')] == [(9,), (6,)],
    'kmer-dim': lambda run, place: [run(p).files.shape('kmers.weight')[1] for p in ('a', 'base')] == [5, 4],
    'abundance-input': lambda run, place: not run('a').files.named('encoder.amount') and run('base').files.named('encoder.amount'),
    'standardise': lambda run, place: not run('a').files.named('asvs.standardise') and run('base').files.named('asvs.standardise'),
    'local-view': lambda run, place: [run(p).model.encoder.asvs.nucleotides.bases.around is None for p in ('a', 'base')] == [True, False],
    'unifrac-head': lambda run, place: [type(run(p).model.heads['unifrac']).__name__ for p in ('b', 'base')] == ['EuclidHead', 'UnionHead'],
    'unifrac-alpha': lambda run, place: [run(p).model.heads['unifrac'].alpha for p in ('f',)] == [.25] and run('f').best['encoder']['unifrac_alpha'] == .25,
    'unifrac-metric': lambda run, place: type(run('c').model.heads['unifrac']).__name__ == 'ShareHead' and run('c').best['encoder']['unifrac_metric'] == 'weighted',
    'clean-unifrac': lambda run, place: about([dropped(run(p), 'asvs') for p in ('b', 'base')], [.1, 0.]),
    'batch-size': lambda run, place: [max(sizes(run(p))) for p in ('a', 'base')] == [5, 8],
    'epochs': lambda run, place: [len(run(p).lines) for p in ('a', 'base')] == [3, 2],
    'patience': lambda run, place: len(run('b').lines) < 40 and run('b').last['counters']['waited'] == 9 == len(run('b').lines) - run('b').last['counters']['best_epoch'],
    'optimizer': lambda run, place: bool(buffers(run('a'))) and 'exp_avg' in run('base').last['optimizer']['state'][0],
    'weight-decay': lambda run, place: [{g['weight_decay'] for g in run(p).last['optimizer']['param_groups']} for p in ('a', 'base')] == [{0.}, {0., .01}],
    'max-grad-norm': lambda run, place: 0 < torch.stack([b.square().sum() for b in buffers(run('a'))]).sum().sqrt() < .0101, # a sum of 0.9^k times steps of 0.001
    **{name: lambda run, place: restarts(run) for name in ('lr', 'scheduler', 'warmup-steps', 'scheduler-t0', 'scheduler-t-mult', 'scheduler-eta-min')},
    'scheduler-patience': lambda run, place: plateau(run),
    'scheduler-factor': lambda run, place: plateau(run),
    'average-decay': lambda run, place: [any(torch.equal(w, run(p).last['model']['encoder.project.weight']) for w in run(p).weights_seen) for p in ('a', 'base')] == [False, True],
    'gradient-accumulation-steps': lambda run, place: run('a').last['counters']['step'] == 3*math.ceil(math.ceil(len(run('a').files.ids('train'))/5)/2),
    'gradient-checkpointing': lambda run, place: run('base').saved/len(run('base').trained) < .6 * run('d').saved/len(run('d').trained),
    'asv-chunk-size': lambda run, place: max(run('a').chunks) == 5 < max(run('base').chunks),
    'num-workers': lambda run, place: max(run('base').workers) <= 0 < min(run('c').workers),
    'mixed-precision': lambda run, place: [run(p).autocast for p in ('a', 'base')] == [{torch.bfloat16}, {None}],
    'tf32': lambda run, place: '--tf32: has no effect on a CPU' in run('c').files.said,
    'auto-batch-size': lambda run, place: 'no GPU memory to measure; --batch-size 8 is kept' in run('c').files.said,
    'test-size': lambda run, place: [round(len(run(p).files.ids('val'))/(len(run(p).files.ids('val')) + len(run(p).files.ids('train'))), 1) for p in ('a', 'base')] == [.4, .2],
    'group-column': groups_whole,
    'train-samples': lambda run, place: three_parts(run, place, 'train'),
    'val-samples': lambda run, place: three_parts(run, place, 'val'),
    'test-samples': lambda run, place: three_parts(run, place, 'test') and not set(run('b').files.ids('test')) & {s for b in run('b').trained for s in b.sample_ids},
    'output-dir': lambda run, place: run('a').folder != run('base').folder and run('a').best != run('base').best,
    'preset': lambda run, place: set(stacks(run('preset')).values()) == {1} and max(sizes(run('preset'))) == 16 and about([dropped(run('preset'), 'sample_stack')], [.2]) and run('preset').files.shape('encoder.project.weight')[0] == 8,
    'seed': lambda run, place: seeds_order(run),
}
of_one = {'target-penalty': 'train', 'metadata': 'pretrain'}


@pytest.mark.parametrize('command,option', [(c, o) for c in ('pretrain', 'train') for o in effects if of_one.get(o, c) == c])
def test_option_has_its_effect(runs, place, command, option):
    assert effects[option](lambda profile: runs(command, profile), place)


# ---- options that need a run, or an error, of their own

def test_wide_path(runs, place, tmp_path):
    "A pre-trained encoder brings the choice along; a model from nothing makes it itself."
    assert not runs('train', 'a').files.named('.wide.') and runs('train', 'base').files.named('.wide.')
    run_command(['train', *place(files['train']), '--pretrained-encoder', str(runs('pretrain', 'a').folder/'checkpoints'/'best_model.pt'), '--epochs', '1', '--device', 'cpu', '--output-dir', str(tmp_path/'run')])
    assert not Files(tmp_path/'run').named('.wide.')


@pytest.mark.parametrize('command', ['pretrain', 'train'])
def test_compile_model_needs_a_compiler(place, tmp_path, monkeypatch, capsys, command):
    for name in 'CC', 'CXX': monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert main([command, *place(files[command] + ' ' + base), '--compile-model', 'on', '--output-dir', str(tmp_path/'run')]) == 2
    assert 'module load gcc' in capsys.readouterr().err and not (tmp_path/'run').exists()


def test_rocm(place, tmp_path, monkeypatch, capsys, caplog):
    "Where PyTorch is built for ROCm, compiling is refused and attention runs without the flash kernels, each with a line that says why."
    from aam.session import pick_device
    flash, log = torch.backends.cuda.flash_sdp_enabled(), logging.getLogger('aam')
    monkeypatch.setattr(torch.version, 'hip', '6.3.0')
    for command in 'pretrain', 'train':
        assert main([command, *place(files[command] + ' ' + base), '--compile-model', 'on', '--output-dir', str(tmp_path/'run')]) == 2
        assert '--compile-model on: not supported with ROCm (6.3.0)' in capsys.readouterr().err and not (tmp_path/'run').exists()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(log, 'propagate', True)
    caplog.set_level('INFO', 'aam')
    try:
        assert pick_device('cpu') == 'cpu' and torch.backends.cuda.flash_sdp_enabled() == flash
        assert pick_device('auto') == 'cuda' and not torch.backends.cuda.flash_sdp_enabled()
        assert [m for m in caplog.messages if 'flash' in m] == ['attention without the flash kernels: they are not available with ROCm (6.3.0) on these GPUs']
        assert torch.nn.functional.scaled_dot_product_attention(*torch.rand(3, 1, 2, 4, 8)).isfinite().all()
    finally: torch.backends.cuda.enable_flash_sdp(flash)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
@pytest.mark.parametrize('command', ['pretrain', 'train', 'predict'])
def test_device(runs, place, tmp_path, capsys, command):
    words = {'predict': ['--model', str(runs('train', 'base').folder/'checkpoints'/'best_model.pt'), *place('--table SURVEY/table.biom'), '--output', str(tmp_path/'run')]}.get(
        command) or [*place(files[command] + ' ' + base), '--output-dir', str(tmp_path/'run')]
    assert main([command, *words, '--device', 'cuda']) == 2
    assert '--device cuda: PyTorch finds no GPU here' in capsys.readouterr().err and not (tmp_path/'run').exists()


def epochs_by(run, metric):
    "Epochs that have the best recorded score; in a tie the first counts."
    scores = [line['val_loss' if metric == 'val_loss' else f'val_{metric}'] for line in run.lines]
    return 1 + int(np.argmin(scores) if metric in ('val_loss', 'mae') else np.argmax(scores))


@pytest.mark.parametrize('metric', ['val_loss', 'r2', 'mae', 'accuracy', 'f1'])
def test_best_metric(place, tmp_path, metric):
    "The kept weights are of the epoch that this score calls the best, and its score is what is compared. (test_best_epoch has scores that disagree.)"
    classes = metric in ('accuracy', 'f1')
    column = '--metadata-column habitat --classifier' if classes else '--metadata-column soil_moisture --loss-type ' + ('mae' if metric == 'r2' else 'mse')
    given = place(f'--table SURVEY/table.biom --metadata SURVEY/metadata.tsv {column} {width} --penalty 0 --nuc-penalty 0 --count-penalty 0 --no-linear-start --val-prediction-passes 1')
    run_command(['train', *given, '--lr', '0.1' if metric == 'r2' else '0.05', '--average-decay', '0', '--epochs', '5', '--patience', '12', '--best-metric', metric, '--output-dir', str(tmp_path/'run')])
    r = Files(tmp_path/'run')
    chosen = re.search(r'best epoch (\d+) of \d+: (\w+) (-?[\d.]+)', (tmp_path/'run'/'training.log').read_text())
    assert r.best['epoch'] == epochs_by(r, metric) == int(chosen[1]) and chosen[2] == metric
    np.testing.assert_allclose(float(chosen[3]), r.lines[r.best['epoch'] - 1][metric if metric == 'val_loss' else f'val_{metric}'], atol=1e-4)
    scores = json.loads((tmp_path/'run'/'scores.json').read_text())['validation']
    if metric != 'val_loss': np.testing.assert_allclose(scores[metric], r.lines[r.best['epoch'] - 1][f'val_{metric}'], rtol=1e-4)


def test_linear_start(runs, place, tmp_path):
    run_command(['train', *place(files['train'] + ' ' + base), '--no-linear-start', '--output-dir', str(tmp_path/'run')])
    without, r = Files(tmp_path/'run'), runs('train', 'base').files
    assert r.best['start']['known'] and 0 <= r.best['share'] <= 1 and without.best['share'] == 0 and 'start' not in without.best


def test_linear_start_has_its_share(place, tmp_path):
    "A prediction is the mean that the checkpoint's share says, which follows from the skill of both paths on the validation samples; epochs are judged without it."
    given = [*place(files['train'] + ' ' + base), '--epochs', '2', '--average-decay', '0', '--no-refit']
    for name, more in dict(run=[], none=['--no-linear-start']).items(): run_command(['train', *given, *more, '--output-dir', str(tmp_path/name)])
    r, none, table = Files(tmp_path/'run'), Files(tmp_path/'none'), read_table(place('SURVEY/table.biom')[0])
    learnt, start, mean = (load_predictor(r.best | dict(share=share)).predict(table, sample_ids=r.ids('val')) for share in (0., 1., r.best['share']))
    assert np.abs(learnt - start).max() > 1e-3
    np.testing.assert_allclose(mean, learnt + r.best['share']*(start - learnt), rtol=1e-4)
    values = pd.read_csv(place('SURVEY/metadata.tsv')[0], sep='\t', index_col=0).soil_ph
    actual, fitted = (values[r.ids(part)].to_numpy()[:, None] for part in ('val', 'train'))
    assert r.best['share'] == pytest.approx(start_share(learnt, start, actual, fitted, r.best['start']['unexplained'], r.best['start']['judged']), rel=1e-3)
    assert [line['val_loss'] for line in r.lines] == [line['val_loss'] for line in none.lines]


def test_asv_networks(place, tmp_path):
    "As many networks as asked for, each its own, take part in what a prediction starts from."
    given, table = [*place(files['train'] + ' ' + base), '--epochs', '1', '--no-refit', '--asv-networks'], read_table(place('SURVEY/table.biom')[0])
    starts = {}
    for asked in '0', '2':
        run_command(['train', *given, asked, '--output-dir', str(tmp_path/asked)])
        starts[asked] = Start.from_dict(Files(tmp_path/asked).best['start'])
    assert starts['0'].networks is None and starts['2'].share > 0
    one, two = starts['2'].networks.vectors.unbind(1)
    assert not torch.equal(one, two) and starts['0'].share == 0 and np.array_equal(starts['0'].weights, starts['2'].weights)
    linear, mixed = (replace(starts['2'], share=share).outputs(table, range(8)) for share in (0., 1.))
    np.testing.assert_allclose(linear, starts['0'].outputs(table, range(8)), rtol=1e-5)
    assert np.abs(mixed - linear).max() > 1e-3
    with pytest.raises(AamError, match='--asv-networks 9: is of the linear start'): run_command(['train', *given, '9', '--no-linear-start', '--output-dir', str(tmp_path/'none')])


def test_refit(place, tmp_path):
    "The final model starts from all samples but the test samples; what is said of validation samples is of the start before, also after a resumed run."
    given = [*place(files['train'] + ' ' + base), '--epochs', '2', '--output-dir', str(tmp_path/'run')]
    run_command(['train', *given])
    run_command(['train', *given[:-1], str(tmp_path/'plain'), '--no-refit'])
    read = lambda name: pd.read_csv(tmp_path/name/'val_predictions.tsv', sep='\t', index_col=0)
    r, plain = Files(tmp_path/'run'), Files(tmp_path/'plain')
    pd.testing.assert_frame_equal(read('run'), read('plain'))
    before, start = r.best['before_refit']['start'], plain.best['start']
    assert before['known'] == start['known'] and torch.equal(before['weights'], start['weights']) and plain.best['before_refit'] is None
    assert r.best['training_ids'] == sorted([*r.ids('train'), *r.ids('val')], key=r.best['training_ids'].index)
    assert all(torch.equal(w, plain.weights[k]) for k, w in r.weights.items())
    table = read_table(place('SURVEY/table.biom')[0])
    new, old = (load_predictor(x.best).predict(table)[:, 0] for x in (r, plain))
    seen = np.isin(table.sample_ids, r.ids('val'))
    np.testing.assert_allclose(new[seen], old[seen], rtol=1e-5)
    assert (np.abs(new - old)[~seen] > 1e-6).mean() > .9
    run_command(['train', *given, '--resume-from', str(tmp_path/'run')])
    again = Files(tmp_path/'run')
    pd.testing.assert_frame_equal(read('run'), read('plain'))
    assert all(torch.equal(w, again.weights[k]) for k, w in r.weights.items()) and torch.equal(again.best['start']['weights'], r.best['start']['weights'])


def test_frozen_encoder_costs_one_pass(runs, place, tmp_path):
    "Each ASV is encoded once, however many epochs there are, and once more for the final predictions of the samples validated on, however many rarefactions are averaged."
    encoder = runs('pretrain', 'base').folder/'checkpoints'/'best_model.pt'
    table = read_table(place('SURVEY/table.biom')[0])
    distinct = lambda ids: len({table.sequences[a][:16] for a in table.select(ids).counts.indices}) # the encoder reads 16 bases
    for epochs in 1, 4:
        folder = tmp_path/str(epochs)
        watch = Watch().run('train', *place(files['train']), '--pretrained-encoder', encoder, '--freeze-base', '--epochs', epochs, '--val-prediction-passes', 3, '--device', 'cpu', '--output-dir', folder)
        r = Files(folder)
        assert sum(watch.read) == distinct(r.ids('train') + r.ids('val')) + distinct(r.ids('val')) and not watch.encoded and not watch.chunks
        assert len(watch.trained) == epochs * -(-len(r.ids('train')) // 8) and all(b.tokens is None for b in watch.trained)
        for name, w in load_checkpoint(encoder)['weights'].items():
            if name.startswith('encoder.'): assert torch.equal(w, r.weights[name]) and torch.equal(w, r.last['model'][name])


# ---- predict and rf-baseline

@pytest.fixture(scope='module')
def predicted(runs, place, tmp_path_factory):
    folder = tmp_path_factory.mktemp('predict')
    model = folder/'model.pt' # in which both parts of a prediction count
    save_checkpoint(runs('train', 'base').files.best | dict(share=.5), model)
    def predicted(name, *words):
        watch = Watch().run('predict', *place('--table SURVEY/table.biom'), '--model', model, '--output', folder/name, *words)
        return watch, pd.read_csv(folder/name, sep='\t', index_col=0)
    return predicted


def test_predict_batch_size_and_passes(predicted):
    watch, found = predicted('base.tsv')
    small, again = predicted('small.tsv', '--batch-size', 5, '--prediction-passes', 1, '--asv-chunk-size', 4)
    assert max(watch.read) > 4 == max(small.read)
    assert max(watch.judged) == 8 and max(small.judged) == 5
    assert len(found) == 48 and sum(small.judged) == 48 and sum(watch.judged) > 3*44
    assert list(found) == ['prediction'] and list(predicted('spread.tsv', '--output-variance')[1]) == ['prediction', 'variance']
    assert not np.allclose(found.prediction, again.prediction, rtol=1e-6)


def test_predict_refuses_to_replace(predicted, runs, place, capsys):
    watch, _ = predicted('twice.tsv')
    words = ['predict', *place('--table SURVEY/table.biom'), '--model', str(runs('train', 'base').folder/'checkpoints'/'best_model.pt'), '--output', str(watch.result.paths['predictions'])]
    assert main(words) == 2 and '--overwrite' in capsys.readouterr().err
    assert main([*words, '--overwrite']) == 0


@pytest.fixture
def forest(place, tmp_path, monkeypatch):
    "A function that runs rf-baseline; what scikit-learn's forest was told, and on what it was fitted."
    from sklearn.ensemble import RandomForestRegressor
    seen, fit = [], RandomForestRegressor.fit
    monkeypatch.setattr(RandomForestRegressor, 'fit', lambda self, X, y: (seen.append((self.get_params(), X.toarray())), fit(self, X, y))[1])
    def forest(name, *words):
        result = run_command(['rf-baseline', *place('--table SURVEY/table.biom --metadata SURVEY/metadata.tsv --metadata-column soil_ph'), '--output', str(tmp_path/name), *map(str, words)])
        return *seen[-1], result.predictions
    return forest


def test_forest_options(forest, place):
    few = '--n-estimators', 5, '--n-jobs', 1
    told, shares, found = forest('a.tsv', *few)
    assert (told['n_estimators'], told['n_jobs'], told['max_features'], told['random_state']) == (5, 1, 'sqrt', 42)
    other = forest('b.tsv', '--n-estimators', 3, '--n-jobs', 2, '--max-features', 4, '--random-seed', 9)[0]
    assert (other['n_estimators'], other['n_jobs'], other['max_features'], other['random_state']) == (3, 2, 4, 9)
    assert not np.array_equal(forest('c.tsv', *few, '--rarefy-seed', 7)[1], shares)
    assert len(forest('d.tsv', *few, '--rarefy-depth', 2000)[1]) < len(shares)
    assert set(forest('e.tsv', *few, '--seed', 7)[2].sample_id) != set(found.sample_id)
    assert len(forest('f.tsv', *few, '--test-size', .4)[2]) > 1.5*len(found)
    held = set(forest('g.tsv', *few, '--group-column', 'subject_id')[2].sample_id)
    frame = pd.read_csv(place('SURVEY/metadata.tsv')[0], sep='\t', dtype=str).set_index('sample_id').dropna(subset='soil_ph')
    divided = lambda held: set(frame.subject_id[frame.index.isin(held)]) & set(frame.subject_id[~frame.index.isin(held)])
    assert not divided(held) and divided(set(found.sample_id))


# ---- the list is complete

elsewhere = { # tested where it belongs
    'sequences': 'test_formats.py::test_inputs_are_joined_through_sequences', 'trust-unifrac': 'test_check.py::test_train_and_pretrain_look_first', 'overwrite': 'test_errors.py::test_finished_run_survives', 'resume-from': 'test_resume.py::test_finished_run_resumed', 'save-every-steps': 'test_resume.py::test_states_kept', 'keep-checkpoints': 'test_resume.py::test_states_kept',
    'distributed': 'test_distributed.py::test_one_process_goes_on_with_ddp', 'fsdp': 'test_distributed.py::test_fsdp_goes_on_in_one_process', 'data-parallel': 'test_distributed.py::test_one_process_says_so',
    'gather-unifrac': 'test_distributed.py::test_two_ranks_are_one_process', 'share-asvs': 'test_distributed.py::test_two_ranks_are_one_process',
    'debug': 'test_errors.py::test_debug_shows_the_traceback', 'device': f'{Path(__file__).name}::test_device', 'compile-model': f'{Path(__file__).name}::test_compile_model_needs_a_compiler',
    'wide-path': f'{Path(__file__).name}::test_wide_path', 'best-metric': f'{Path(__file__).name}::test_best_metric', 'linear-start': f'{Path(__file__).name}::test_linear_start', 'asv-networks': f'{Path(__file__).name}::test_asv_networks', 'refit': f'{Path(__file__).name}::test_refit',
    'freeze-base': f'{Path(__file__).name}::test_frozen_encoder_costs_one_pass', 'pretrained-encoder': f'{Path(__file__).name}::test_frozen_encoder_costs_one_pass',
    'batch-size': f'{Path(__file__).name}::test_predict_batch_size_and_passes', 'prediction-passes': f'{Path(__file__).name}::test_predict_batch_size_and_passes',
    'output-variance': f'{Path(__file__).name}::test_predict_batch_size_and_passes', 'output': f'{Path(__file__).name}::test_predict_refuses_to_replace', 'model': f'{Path(__file__).name}::test_predict_refuses_to_replace',
    'metadata': 'test_categories.py::test_predict_needs_the_columns', 'metadata-column': 'test_target_options.py::test_predict_agrees', 'classifier': 'test_target_options.py::test_class_weights',
    'out-dim': 'test_target_options.py::test_contradiction', 'class-weights': 'test_target_options.py::test_class_weights', 'target-transform': 'test_target_options.py::test_transform_of_the_targets',
    'normalize-by': 'test_target_options.py::test_transform_of_the_targets', 'loss-type': 'test_target_options.py::test_loss', 'quantiles': 'test_target_options.py::test_quantile_loss_and_scores',
    'over-penalty': 'test_target_options.py::test_loss', 'under-penalty': 'test_target_options.py::test_loss', 'loss-config': 'test_target_options.py::test_loss_of_each_target',
    'val-prediction-passes': 'test_target_options.py::test_passes_and_variance', 'bounded-targets': 'test_target_options.py::test_range', 'output-activation': 'test_target_options.py::test_range',
    'learnable-output-scale': 'test_target_options.py::test_learnable_output_scale', 'regressor-hidden-dims': 'test_target_options.py::test_hidden_layers',
    'regressor-dropout': 'test_target_options.py::test_hidden_layers', 'categorical-columns': 'test_categories.py::test_predict_says_what_training_said',
    'categorical-embed-dim': 'test_categories.py::test_classes_with_categories', 'categorical-fusion': 'test_categories.py::test_predict_says_what_training_said',
    'conditional-output-scaling': 'test_categories.py::test_frozen_encoder_with_categories', 'categorical-lr': 'test_categories.py::test_categorical_lr_is_of_category_weights_alone',
    'categorical-help': 'test_categories.py::test_help_on_categories',
}
forest_options = {'n-estimators', 'n-jobs', 'max-features', 'random-seed', 'rarefy-seed', 'rarefy-depth', 'seed', 'test-size', 'group-column'}
elsewhere_of = {
    'rf-baseline': {o: f'{Path(__file__).name}::test_forest_options' for o in forest_options} | {'classifier': 'test_rf_baseline.py::test_numbers_as_classes_when_asked',
        'overwrite': 'test_errors.py::test_existing_output_survives', 'output': 'test_errors.py::test_existing_output_survives', 'table': 'test_rf_baseline.py::test_order_of_the_table_does_not_matter',
        'metadata': 'test_rf_baseline.py::test_missing_values_are_masked_column_by_column', 'metadata-column': 'test_rf_baseline.py::test_numbers_as_sklearn',
        **{f'{part}-samples': 'test_rf_baseline.py::test_numbers_as_sklearn' for part in ('train', 'val', 'test')}},
    'evaluate': {o.replace('_', '-'): 'test_evaluate.py::test_options_reach_the_fits' for o in train.__signature__.parameters} | {
        'categorical-help': 'test_categories.py::test_help_on_categories', 'overwrite': 'test_evaluate.py::test_options_of_the_evaluation', 'output-dir': 'test_evaluate.py::test_killed_evaluation_goes_on',
        'jobs': 'test_evaluate.py::test_killed_evaluation_goes_on', 'technical-columns': 'test_evaluate.py::test_report_needs_nothing_else', 'leave-one-out-column': 'test_evaluate.py::test_report_needs_nothing_else',
        'group-column': 'test_evaluate.py::test_signal_that_only_known_subjects_have', 'repeats': 'test_evaluate.py::test_scores_are_those_of_scikit_learn', 'seeds': 'test_evaluate.py::test_scores_are_those_of_scikit_learn',
        **{o: 'test_evaluate.py::test_options_of_the_evaluation' for o in ('folds', 'test-size', 'n-estimators', 'preset', 'seed')}, **{o: 'test_evaluate.py::test_encoders' for o in ('pretrain', 'transductive', 'pretrain-options')}},
    'predict': {'asv-chunk-size': f'{Path(__file__).name}::test_predict_batch_size_and_passes', 'table': 'test_invariance.py::test_company_changes_no_prediction', 'overwrite': f'{Path(__file__).name}::test_predict_refuses_to_replace'},
}


@pytest.mark.parametrize('command', ['pretrain', 'train', 'predict', 'rf-baseline', 'evaluate'])
def test_no_option_is_without_a_test(command):
    shown = {s.removeprefix('--') for a in command_parser(load_command(command), command)._actions for s in a.option_strings[:1] if s.startswith('--') and a.help != argparse.SUPPRESS}
    own = {o for o in effects if of_one.get(o, command) == command} if command in ('pretrain', 'train') else set()
    places = elsewhere | elsewhere_of.get(command, {})
    assert sorted(o for o in shown - own if o not in places) == []
    for option in shown - own:
        file, test = places[option].split('::')
        assert re.search(rf'^def {test}\(', (here/file).read_text(encoding='utf-8'), re.M), places[option]


# ---- what the terminal shows

@pytest.mark.parametrize('command,more,labels', [('pretrain', '', 'TL LR UL NL NA'), ('train', '', 'TL LR RL UL'), ('train', '--classifier --metadata-column habitat', 'TL LR CL UL')], ids=['pretraining', 'regression', 'classification'])
def test_progress_labels_are_those_of_the_guide(place, tmp_path, monkeypatch, command, more, labels):
    "As a terminal gets them, step by step; without one there is no bar."
    class Terminal(io.StringIO):
        def isatty(self): return True
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stderr', terminal)
    given = place(files[command].replace('--metadata-column soil_ph', '--metadata-column soil_ph' if not more else '') + f' {width} --epochs 1 {more}')
    run_command([command, *given, '--output-dir', str(tmp_path/'run')])
    shown = re.findall(r'(?:it/s|s/it), ((?:[A-Z]{2} \S+(?:, |\]))+)', terminal.getvalue())
    assert len(shown) >= 4 and {' '.join(re.findall(r'([A-Z]{2}) [\d.e+%-]+', text)) for text in shown} == {labels}, terminal.getvalue()[-500:]
