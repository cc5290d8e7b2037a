"""`aam evaluate`: nothing leaks between folds, what was stopped goes on, and the statistics are those of others.

Leakage is looked for from outside: with labels that nothing can predict, with a signal that only known subjects have, and by changing what no fit may see."""
import dataclasses
import itertools
import json
import os
import re
import signal
import time
import types
import typing
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from aam.baselines import Task, fit_baselines, rarefied_counts
from aam.checkpoint import load_checkpoint
from aam.comparison import difference, gather
from aam.config import AamError, build_options, unifrac_metric_names
from aam.evaluate import evaluate
from aam.fits import make_jobs, read_records
from aam.folds import Evaluation, EvaluationOptions, make_features, pretrain_given, train_given
from aam.metadata import Fold, read_metadata
from aam.pretrain import pretrain
from aam.simulate import simulate
from aam.table import make_table, read_table, write_table
from aam.train import train
from aam.unifrac import unifrac_distances

torch.set_num_threads(1)
width = dict(embedding_dim=8, attention_heads=2, kmer_dim=8, unifrac_branches=16, max_bp=40, epochs=2, device='cpu', n_estimators=25)


@pytest.fixture(scope='session')
def fields(once):
    "Folder with 24 sites of four visits, and metadata with columns that only tests have."
    def build(folder):
        simulate(output_dir=folder, samples=96, asvs=60, subjects=24)
        frame, rng = read_metadata(folder/'metadata.tsv'), np.random.default_rng(0)
        planted = dict(zip(sorted(set(frame.subject_id)), rng.normal(size=24)))
        frame['planted'] = [f'{planted[s]:.4f}' for s in frame.subject_id] # says which site it is, and nothing else
        frame['season'] = [('spring', 'summer', 'autumn', 'winter')[int(s[-1]) - 1] for s in frame.index]
        frame['shuffled'] = frame.season.groupby(frame.subject_id).transform(lambda s: rng.permutation(s))
        frame['rare'] = np.where(frame.subject_id == 'site01', 'bog', frame.habitat.fillna('forest')) # a class that lives in one group
        frame.to_csv(folder/'metadata.tsv', sep='\t')
    return once('fields', build)


def run(fields, folder, **options):
    "The results of an evaluation in this process."
    if 'leave_one_out_column' not in options: options = {'folds': 3, **options}
    return evaluate(table=fields/'table.biom', metadata=fields/'metadata.tsv', tree=fields/'tree.nwk', pretrain=False, penalty=0, nuc_penalty=0, count_penalty=0, output_dir=folder, **{**width, **options}).scores


# ---- chance is chance, and a signal is found

def test_signal_that_only_known_subjects_have(fields, tmp_path):
    "A number for each site, drawn at random: known sites are recognised, new ones cannot be. The latter are also labels permuted between groups."
    known = run(fields, tmp_path/'random', metadata_column='planted')['methods']
    new = run(fields, tmp_path/'grouped', metadata_column='planted', group_column='subject_id')['methods']
    for name in ('aam', 'Random Forest', 'ExtraTrees', 'linear, log abundance', 'best baseline', 'aam + trees'): assert known[name]['r2'] > .25, name
    assert {name: row['r2'] for name, row in new.items() if row['r2'] > .1} == {}
    assert known['depth and richness']['r2'] < .1


def test_labels_permuted_within_groups(fields, tmp_path):
    "Seasons are found; seasons that were dealt anew among the visits of each site are not."
    true = run(fields, tmp_path/'true', metadata_column='season', classifier=True, group_column='subject_id', refit=False)['methods']
    shuffled = run(fields, tmp_path/'shuffled', metadata_column='shuffled', classifier=True, group_column='subject_id')['methods']
    for name in ('aam', 'linear, log abundance', 'linear, 6-mers', 'best baseline', 'aam + trees'): assert true[name]['accuracy'] > .45, name
    chance = stats.binom(96, 1/4).ppf(.9995)/96
    assert {name: row['accuracy'] for name, row in shuffled.items() if row['accuracy'] > chance} == {}


# ---- what no fit may see changes nothing

@pytest.fixture(scope='module')
def two_worlds(fields, tmp_path_factory):
    "The survey, and one in which the test samples of the first fold have other labels, and one of them as many reads of other ASVs."
    other = tmp_path_factory.mktemp('other')
    def options(folder): return build_options(evaluate.groups, dict(table=folder/'table.biom', metadata=folder/'metadata.tsv', tree=fields/'tree.nwk', metadata_column='soil_moisture', group_column='subject_id', folds=3, output_dir=other/'out', technical_columns='sequencing_run', **width))
    fold = Evaluation(options(fields)).plan[0]
    table, frame = read_table(fields/'table.biom'), read_metadata(fields/'metadata.tsv')
    counts, rng = table.counts.toarray(), np.random.default_rng(1)
    row = table.sample_ids.index(fold.test[0])
    counts[row] = rng.permutation(counts[row])
    write_table(make_table(counts, table.sample_ids, table.sequences), other/'table.biom')
    frame.loc[fold.test, 'soil_moisture'] = rng.permutation(frame.loc[fold.test, 'soil_moisture'])
    frame.to_csv(other/'metadata.tsv', sep='\t')
    assert (read_metadata(fields/'metadata.tsv').soil_moisture != read_metadata(other/'metadata.tsv').soil_moisture).sum() > 10
    return Evaluation(options(fields)), Evaluation(options(other))


def test_baselines_see_no_test_sample(two_worlds):
    one, other = two_worlds
    found = []
    for e in two_worlds:
        fold = one.plan[0]
        assert e.plan[0] == fold
        groups = np.array([e.groups[s] for s in e.ids])
        found.append(fit_baselines(make_features(e), e.y, e.at(fold.fit + fold.stop), e.at(fold.test), groups, Task(trees=10)))
    assert list(found[0]) == list(found[1]), 'the best baseline is another'
    changed = []
    for name, a in found[0].items():
        b = found[1][name]
        assert a.variant == b.variant and a.score == b.score, name
        np.testing.assert_allclose(a.inner, b.inner, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(a.predicted[1:], b.predicted[1:], rtol=1e-5, err_msg=name)
        changed.append(a.predicted[0] != b.predicted[0])
    assert sum(changed) > 3 # the sample whose reads differ is predicted otherwise


def lists_of(job, folder):
    "Files with the samples of a fit, as options of train."
    folder.mkdir()
    lists = {f'{name}_samples': folder/f'{name}.txt' for name in ('train', 'val', 'test')}
    for path, ids in zip(lists.values(), (job.fold.fit, job.fold.stop, job.fold.test)): path.write_text('\n'.join(ids))
    return lists


def test_folds_within_a_fit_keep_groups_whole(fields, tmp_path):
    "What only known sites have is no skill of a start, which chooses its penalty and networks by folds of its own, either."
    e = Evaluation(build_options(evaluate.groups, dict(table=fields/'table.biom', metadata=fields/'metadata.tsv', metadata_column='planted', group_column='subject_id', folds=3, pretrain=False, penalty=0, nuc_penalty=0, count_penalty=0, output_dir=tmp_path/'out', **width)))
    job = make_jobs(e, ['aam'])[0]
    def left_out(**given): return load_checkpoint(train(**{**job.training, 'epochs': 1, **given}, output_dir=tmp_path/'run', overwrite=True).paths['best_model'])['start']['unexplained']
    lists = lists_of(job, tmp_path/'lists')
    assert left_out(**lists) > .9
    assert left_out(**lists, group_column=None) < .8


def test_aam_sees_no_test_sample(two_worlds, tmp_path):
    "Weights of the encoder and of the model, everything fitted beside them, and the chosen epoch are the same."
    kept = []
    for i, e in enumerate(two_worlds):
        job = next(j for j in make_jobs(e, ['aam'], tmp_path/str(i)))
        lists = lists_of(job, tmp_path/f'lists{i}')
        encoder = pretrain(**job.pretraining, train_samples=lists['train_samples'], val_samples=lists['val_samples'], output_dir=tmp_path/f'encoder{i}', seed=job.seed).paths['best_model']
        model = train(**{**job.training, 'epochs': 4}, **lists, pretrained_encoder=encoder, output_dir=tmp_path/f'model{i}', seed=job.seed).paths['best_model']
        kept.append([load_checkpoint(encoder), load_checkpoint(model), pd.read_csv(tmp_path/f'model{i}'/'test_predictions.tsv', sep='\t')])
    for one, other in zip(*(k[:2] for k in kept)):
        assert one['epoch'] == other['epoch'] and one['weights'].keys() == other['weights'].keys()
        for name in one['weights']: assert torch.equal(one['weights'][name], other['weights'][name]), name
        for fact in ('depth', 'units', 'target', 'training_ids'): assert one.get(fact) == other.get(fact), fact
        assert one.get('start', {}).get('known') == other.get('start', {}).get('known') and all(torch.equal(one['start'][k], other['start'][k]) for k in ('weights', 'bias') if 'start' in one)
    a, b = (k[2] for k in kept)
    assert (a.actual != b.actual).sum() > 10
    np.testing.assert_array_equal(a.prediction[1:], b.prediction[1:])
    assert a.prediction[0] != b.prediction[0]


def test_stack_and_best_baseline_do_not_look_at_the_test_samples(two_worlds):
    "With the same predictions, other true values of the test samples change no combined prediction."
    one, rng = two_worlds[0], np.random.default_rng(0)
    def records(e):
        rng = np.random.default_rng(0)
        for f in e.plan:
            noisy = lambda ids: (e_true[e.at(ids)] + rng.normal(0, 5, len(ids))).tolist()
            yield dict(kind='baselines', repeat=0, fold=f.fold, seed=42, best='Random Forest', stop=noisy(f.stop), methods={n: dict(variant='', inner=0, predicted=noisy(f.test)) for n in ('Random Forest', 'ExtraTrees')})
            yield dict(kind='aam', repeat=0, fold=f.fold, seed=42, predicted=noisy(f.test), stop=noisy(f.stop))
    e_true = one.y.copy()
    found, weights = gather(one, list(records(one)))
    assert 0 < np.nanmin(weights) and np.nanmax(weights) < 1
    kept = one.y
    try:
        one.y = kept.copy()
        one.y[one.at(one.plan[0].test)] = rng.permutation(one.y[one.at(one.plan[0].test)])
        again, weights_again = gather(one, list(records(one)))
    finally: one.y = kept
    here = one.at(one.plan[0].test)
    assert weights[0, 0, 0] == weights_again[0, 0, 0]
    for name in ('aam + trees', 'best baseline'): np.testing.assert_array_equal(found[name][0, 0, here], again[name][0, 0, here])


@pytest.mark.parametrize('metric', unifrac_metric_names)
def test_neighbours_are_those_of_the_metric(fields, metric):
    "Distances between rarefied samples by the metric that aam learns; Faith's diversity has none, then they are unweighted."
    e = Evaluation(build_options(evaluate.groups, dict(table=fields/'table.biom', metadata=fields/'metadata.tsv', tree=fields/'tree.nwk', metadata_column='soil_ph', output_dir='out', unifrac_metric=metric, **width)))
    drawn = rarefied_counts(e.inputs.table, e.inputs.depth, 42)
    expected = unifrac_distances(drawn, e.inputs.branches, 'unweighted' if metric == 'faith_pd' else metric)
    np.testing.assert_allclose(e.features.distances, expected, atol=1e-5)


# ---- classes that a fold cannot know

def test_class_absent_from_a_training_fold_counts_as_wrong(fields, tmp_path):
    results = run(fields, tmp_path/'out', metadata_column='rare', classifier=True, group_column='subject_id', refit=False)
    assert results['unfitted_classes'] == {'bog': 1}
    found = pd.read_csv(tmp_path/'out'/'predictions.tsv', sep='\t')
    bog = found[found.actual == 'bog']
    assert len(bog) == 4 and (bog[list(results['methods'])] != 'bog').all(axis=None)
    for name, row in results['methods'].items(): assert row['accuracy'] == pytest.approx((found[name] == found.actual).mean()), name
    assert 'bog (1 fold)' in (tmp_path/'out'/'report.html').read_text() and found.groupby('subject_id').fold.nunique().max() == 1


# ---- statistics beside those of others

def fake(groups, folds):
    "As much of an evaluation as its statistics need: `groups` and `folds` of each sample."
    ids = [f's{i}' for i in range(len(groups))]
    part = lambda chosen: [s for s, c in zip(ids, chosen) if c]
    folds = np.array(folds)
    plan = [Fold(part(folds != f), [], part(folds == f), 0, f) for f in np.unique(folds)]
    return types.SimpleNamespace(ids=ids, groups=dict(zip(ids, groups)), plan=plan, at=lambda some: np.array([ids.index(s) for s in some], int))


def test_interval_and_p_of_a_difference():
    rng = np.random.default_rng(3)
    groups, folds = np.repeat(np.arange(12), 5), np.repeat(np.arange(12) % 4, 5)
    ours, theirs = rng.normal(.3, 1, 60), rng.normal(0, 1, 60)
    found = difference(fake([f'g{g}' for g in groups], folds), ours[None], theirs[None])
    by_fold = [np.mean((ours - theirs)[folds == f]) for f in range(4)]
    half = stats.t.ppf(.975, 3)*np.sqrt((1/4 + 15/45)*np.var(by_fold, ddof=1)) # Nadeau and Bengio 2003, equation 7 with n2/n1 = 15/45
    np.testing.assert_allclose([found['difference'], found['low'], found['high']], [np.mean(ours - theirs), np.mean(by_fold) - half, np.mean(by_fold) + half])
    totals = np.array([(ours - theirs)[groups == g].sum() for g in range(12)])
    sums = np.array([np.dot(signs, totals) for signs in itertools.product([-1, 1], repeat=12)])
    assert found['p'] == pytest.approx((np.abs(sums) >= abs(totals.sum()) - 1e-9).mean(), abs=1e-9)


def test_too_few_groups_for_an_interval():
    rng = np.random.default_rng(0)
    found = difference(fake(['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i'] * 4, [0, 1, 2]*12), rng.normal(size=(1, 36)), rng.normal(size=(1, 36)))
    assert found['low'] is found['high'] is found['p'] is None and np.isfinite(found['difference'])


def test_false_alarms_are_rare():
    "Two methods that differ by chance alone, with errors that a group shares: one interval in twenty, or fewer, leaves 0 out."
    alarms, e = [], fake(np.repeat(np.arange(20), 5).tolist(), np.repeat(np.arange(20) % 5, 5))
    for seed in range(200):
        rng = np.random.default_rng(seed)
        gain = np.repeat(rng.normal(size=20), 5) + rng.normal(size=100)
        found = difference(e, gain[None], np.zeros((1, 100)))
        alarms.append([found['low'] > 0 or found['high'] < 0, found['p'] <= .05])
    assert (np.mean(alarms, 0) <= .09).all() and np.mean(alarms, 0)[1] > .01


def test_scores_are_those_of_scikit_learn(fields, tmp_path):
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
    results = run(fields, tmp_path/'out', metadata_column='season', classifier=True, seeds=2, repeats=2, folds=2, n_estimators=5, linear_start=False)
    found = pd.read_csv(tmp_path/'out'/'predictions.tsv', sep='\t')
    assert len(found) == 2*96 and found.groupby('repeat').sample_id.nunique().tolist() == [96, 96]
    for name in ('Random Forest', 'aam, seeds averaged'): # one prediction a repeat
        for score, function in dict(accuracy=accuracy_score, balanced_accuracy=balanced_accuracy_score, f1=lambda y, p: f1_score(y, p, average='macro')).items():
            assert results['methods'][name][score] == pytest.approx(np.mean([function(r.actual, r[name]) for _, r in found.groupby('repeat')])), (name, score)
    row = results['methods']['aam']
    assert row['seed_sd'] >= 0 and row['repeat_sd'] >= 0 and len(row['folds']) == 4 and row['accuracy'] == pytest.approx(np.mean(row['folds']))
    records = read_records(tmp_path/'out'/'fits.jsonl')
    assert sorted((r['kind'], r['repeat'], r['fold'], r['seed']) for r in records if r['kind'] == 'aam') == [('aam', r, f, 42 + 1000*r + s) for r in range(2) for f in range(2) for s in range(2)]


# ---- the command: stopped, refused, continued

def given(fields, folder): return dict(table=fields/'table.biom', metadata=fields/'metadata.tsv', tree=fields/'tree.nwk', metadata_column='soil_ph', group_column='subject_id', folds=2, seeds=2, output_dir=folder, **width)
def words(*where, more=()): return ['evaluate', *(w for k, v in given(*where).items() for w in ('--' + k.replace('_', '-'), v)), *more]


def test_killed_evaluation_goes_on(aam, fields, tmp_path, capsys):
    "Killed with a fit finished, and continued with two fits side by side: every prediction is that of an evaluation that was left alone."
    process = aam.start(*words(fields, tmp_path/'killed'))
    path = tmp_path/'killed'/'fits.jsonl'
    deadline = time.time() + 120
    while time.time() < deadline and not (path.exists() and path.read_text().count('"kind": "aam"') >= 1): time.sleep(.05)
    os.kill(process.pid, signal.SIGKILL); process.communicate()
    before = path.read_text()
    with open(path, 'a') as f: f.write('{"kind": "aam", "repeat": 0, "fo') # as a crash leaves it
    assert 1 <= before.count('\n') < 6 and not (tmp_path/'killed'/'report.html').exists()
    said = aam(*words(fields, tmp_path/'killed', more=['--jobs', 2])).err
    assert f"6 fits, {before.count(chr(10))} of them finished before" in said and path.read_text().startswith(before)
    aam(*words(fields, tmp_path/'whole'))
    one, other = ({(r['kind'], r['fold'], r['seed']): r for r in read_records(tmp_path/name/'fits.jsonl')} for name in ('killed', 'whole'))
    assert len(one) == 6 == len(other) == len(read_records(path))
    for key, record in one.items():
        drop = {'seconds', 'pretraining'}
        assert {k: v for k, v in record.items() if k not in drop} == {k: v for k, v in other[key].items() if k not in drop}, key
    assert not (tmp_path/'killed'/'encoders').exists() and not list((tmp_path/'killed').rglob('*.pt'))
    check_refusals(fields, tmp_path/'killed', path, capsys)


def check_refusals(fields, folder, path, capsys):
    "Other options, other files: nothing is mixed; the same: the page is written again, in no time, from what is there."
    there, other = path.read_text(), folder/'metadata.tsv'
    other.write_text((fields/'metadata.tsv').read_text() + '\n\n')
    for more, expected in ((dict(folds=3), '--folds 2, not --folds 3; give another folder'), (dict(lr=.1), 'with no --lr, not --lr 0.1'), (dict(metadata=other), 'other input files')):
        with pytest.raises(AamError, match=expected): evaluate(**{**given(fields, folder), **more})
    (folder/'report.html').unlink()
    evaluate(**given(fields, folder), num_workers=0)
    assert '6 fits, 6 of them finished before' in capsys.readouterr().err
    assert path.read_text() == there and (folder/'report.html').exists()


@pytest.mark.parametrize('options,expected', [
    (dict(metadata_column='soil_ph,soil_moisture'), 'compares one column'), (dict(leave_one_out_column='habitat', folds=3), 'its values are the folds'),
    (dict(transductive=True, pretrain=False), 'choose one'), (dict(pretrain_options='{"lrr": 1}'), 'did you mean lr?'), (dict(freeze_base=True, pretrain=False), 'no encoder worth freezing'),
    (dict(group_column='season', folds=5), 'has 4 values'), (dict(metadata_column='soil_ph', folds=999), 'samples; give at most as many folds'), (dict(metadata_column='habitat', classifier=True, folds=999), 'the largest class has'), (dict(leave_one_out_column='season', group_column='subject_id'), 'both sides'), (dict(technical_columns='plate'), "no column 'plate'"),
    (dict(pretrained_encoder='e.pt', transductive=True), 'give one of them')])
def test_contradictions(fields, tmp_path, options, expected):
    with pytest.raises(AamError, match=re.escape(expected)):
        evaluate(**{**dict(table=fields/'table.biom', metadata=fields/'metadata.tsv', tree=fields/'tree.nwk', metadata_column='soil_ph', output_dir=tmp_path/'out'), **options})
    assert not (tmp_path/'out').exists()


def test_folder_of_a_run_is_left_alone(aam, fields, trained):
    done = aam(*words(fields, trained), fails=True)
    assert done.returncode == 2 and 'holds a run of train or pretrain' in done.err


# ---- options

together = { # options that need others beside them
    'quantiles': dict(loss_type='quantile', quantiles='0.1,0.5'), 'over_penalty': dict(loss_type='asymmetric', over_penalty=2.), 'under_penalty': dict(loss_type='asymmetric', under_penalty=3.), 'loss_type': dict(loss_type='mse'),
    'loss_config': dict(loss_config='{"0": "mae"}'), 'normalize_by': dict(target_transform='zscore-category', normalize_by='season'), 'target_transform': dict(target_transform='log-zscore'), 'class_weights': dict(class_weights='balanced', classifier=True),
    'best_metric': dict(best_metric='r2'), 'unifrac_alpha': dict(unifrac_metric='generalized', unifrac_alpha=.5), 'unifrac_metric': dict(unifrac_metric='weighted'), 'attention_heads': dict(attention_heads=8), 'regressor_hidden_dims': dict(regressor_hidden_dims='7,3'),
    'output_activation': dict(output_activation='relu'), 'categorical_columns': dict(categorical_columns='season'), 'conditional_output_scaling': dict(categorical_columns='season', conditional_output_scaling='season'),
    'scheduler_eta_min': dict(scheduler_eta_min=1e-5), 'embedding_dim': dict(embedding_dim=32), 'gradient_accumulation_steps': dict(gradient_accumulation_steps=3), 'gradient_checkpointing': dict(gradient_checkpointing=True),
    'average_decay': dict(average_decay=.5), 'compile_model': dict(compile_model='auto'), 'metadata_column': dict(metadata_column='soil_moisture'), 'out_dim': dict(out_dim=1),
    **{name: dict(scheduler='cosine_restarts', **{name: 3}) for name in ('scheduler_t0', 'scheduler_t_mult')}, 'scheduler_patience': dict(scheduler='plateau', scheduler_patience=3), 'scheduler_factor': dict(scheduler='plateau', scheduler_factor=.25),
    **{name: dict(categorical_columns='season', **{name: value}) for name, value in dict(categorical_embed_dim=5, categorical_fusion='gmu', categorical_lr=.01).items()},
    **{name: {name: f'{name}.file'} for name in ('table', 'sequences', 'metadata', 'tree', 'unifrac_matrix', 'pretrained_encoder')},
    'faith_pd': dict(unifrac_metric='faith_pd', faith_pd='faith.file'), 'trust_unifrac': dict(unifrac_matrix='unifrac_matrix.file', trust_unifrac=True),
}
evaluation_options = {f.name for f in dataclasses.fields(EvaluationOptions)}
handed_on = sorted({name for name in train.__signature__.parameters if name in evaluate.__signature__.parameters} - evaluation_options)
needed = dict(table='t.biom', metadata='m.tsv', metadata_column='soil_ph', tree='t.nwk', output_dir='out')


def another(name):
    "A value that is not the default, with what belongs to it."
    default, annotation = train.__signature__.parameters[name].default, typing.get_args(train.__signature__.parameters[name].annotation)
    if name in together: return together[name]
    if isinstance(default, bool): return {name: not default}
    choices = next((m['choices'] for m in annotation if isinstance(m, dict) and 'choices' in m), None)
    if choices: return {name: next(c for c in choices if c != default)}
    return {name: annotation[0](default/2) if default else annotation[0](3) if annotation[0] is int else .25}


def resolved(groups, given):
    return {name: o.to_dict() for name, o in build_options(groups, given).items() if name not in ('run', 'split')}


@pytest.mark.parametrize('name', handed_on)
def test_options_reach_the_fits(name):
    "An option of train means in each fit, and in its pre-training, what it means when train or pretrain is given it."
    given = {**needed, **another(name)}
    usual = resolved(train.groups, {**needed, 'preset': 'small'})
    meant = resolved(train.groups, {**given, 'preset': 'small'})
    assert meant != usual
    options = build_options(evaluate.groups, given)
    assert resolved(train.groups, {**train_given(options), 'output_dir': 'out'}) == meant
    shared = {k: v for k, v in given.items() if k in pretrain.__signature__.parameters and k != 'metadata'}
    assert resolved(pretrain.groups, {**pretrain_given(options), 'output_dir': 'out'}) == resolved(pretrain.groups, {**shared, 'preset': 'small'})
    if name in pretrain.__signature__.parameters and name != 'epochs': return
    other = build_options(evaluate.groups, {**given, 'pretrain_options': {'epochs': 17}})
    assert build_options(pretrain.groups, {**pretrain_given(other), 'output_dir': 'out'})['training'].epochs == 17 != build_options(train.groups, {**train_given(other), 'output_dir': 'out'})['training'].epochs


def test_options_of_the_evaluation(fields, tmp_path, monkeypatch):
    from sklearn.ensemble import RandomForestRegressor
    trees, fit = set(), RandomForestRegressor.fit
    monkeypatch.setattr(RandomForestRegressor, 'fit', lambda self, X, y: (trees.add(self.n_estimators), fit(self, X, y))[1])
    def plan(**options):
        run(fields, tmp_path/'out', metadata_column='soil_ph', overwrite=True, **{'folds': 2, 'n_estimators': 10, 'linear_start': False, 'epochs': 1, **options})
        config = json.loads((tmp_path/'out'/'fits'/f"r1f1_seed{options.get('seed', 42)}"/'config.json').read_text())
        return json.loads((tmp_path/'out'/'evaluation.json').read_text())['plan'], config['options']
    one, config = plan()
    assert trees == {2, 10} and [(f['fold'], f['repeat']) for f in one] == [(0, 0), (1, 0)] and [len(f['stop'])/len(f['fit'] + f['stop']) for f in one] == pytest.approx([.2]*2, abs=.03)
    assert config['training']['lr'] == 1e-3 and config['training']['batch_size'] == 16 and config['run']['preset'] == 'small', 'the preset is small unless told otherwise'
    other, config = plan(seed=7, test_size=.4, preset='medium', batch_size=9, folds=3)
    assert len(other) == 3 and [len(f['stop'])/len(f['fit'] + f['stop']) for f in other] == pytest.approx([.4]*3, abs=.03)
    assert config['training']['batch_size'] == 9 and config['training']['gradient_accumulation_steps'] == 16 and config['run']['seed'] == 7
    assert len(read_records(tmp_path/'out'/'fits.jsonl')) == 6, 'the evaluation before is replaced'


# ---- where the encoder comes from

def test_encoders(fields, tmp_path):
    "One for each fold, from its training samples; with --transductive one for all, from all samples; or one that is given. The page says which."
    def encoders(name, **options):
        evaluate(table=fields/'table.biom', metadata=fields/'metadata.tsv', tree=fields/'tree.nwk', metadata_column='soil_ph', group_column='subject_id', folds=2, output_dir=tmp_path/name, **{'pretrain_options': {'epochs': 1}, **width, 'n_estimators': 5, **options})
        page = re.sub('<[^>]+>', '', (tmp_path/name/'report.html').read_text())
        logs = '\n'.join(p.read_text() for p in sorted((tmp_path/name/'fits').glob('*_seed*.log')))
        return page, re.findall(r'(\d+) samples to fit on, (\d+) to validate and stop on, (\d+) to test on', logs)
    page, parts = encoders('inductive')
    assert "pre-trained on that fold's training samples alone" in page
    assert len(parts) == 4 and [parts[0][:2], parts[2][:2]] == [parts[1][:2], parts[3][:2]] and {p[2] for p in parts[::2]} == {'0'} # pretrain, train, pretrain, train: the same lists
    page, parts = encoders('transductive', transductive=True)
    assert 'Transductive: the encoder was pre-trained once, on all samples' in page
    assert len(parts) == 3 and sum(map(int, parts[0])) == 96
    made = pretrain(table=fields/'table.biom', tree=fields/'tree.nwk', output_dir=tmp_path/'given', preset='small', **{k: v for k, v in width.items() if k != 'n_estimators'})
    fit_on = (tmp_path/'given'/'train_samples.txt').read_text().split()
    page, parts = encoders('brought', pretrained_encoder=made.paths['best_model'], pretrain_options=None)
    ids = json.loads((tmp_path/'brought'/'evaluation.json').read_text())['plan'][0]
    n = len(set(fit_on) & {*ids['fit'], *ids['stop'], *ids['test']})
    assert len(parts) == 2 and f'{n} of the' in page and 'samples tested here were in its training' in page


# ---- what is written

class Page(HTMLParser):
    "Tags, and everything that could be fetched."
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.open = [], [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ('meta', 'img', 'br', 'html', 'body'): self.open.append(tag)
        self.sources += [v for k, v in attrs if k in ('src', 'href')]
    def handle_endtag(self, tag):
        if tag in ('html', 'body'): return
        while self.open and self.open[-1] != tag and self.open[-1] in ('li', 'p', 'th', 'td', 'tr'): self.open.pop()
        assert self.open and self.open.pop() == tag, tag


def test_report_needs_nothing_else(fields, tmp_path):
    results = run(fields, tmp_path/'out', metadata_column='soil_ph', leave_one_out_column='habitat', technical_columns='sequencing_run')
    text = (tmp_path/'out'/'report.html').read_text()
    page = Page(text)
    assert page.open == [] and page.tags.count('h1') == 1 and page.tags.count('table') == 2
    assert len(page.sources) == 1 and page.sources[0].startswith('data:image/png;base64,') and 'http' not in text
    assert results['verdicts']['aam'] in text.replace('&#x27;', "'") and 'too few groups for an interval' in results['verdicts']['aam'] and 'technical columns' in text
    scores = pd.read_csv(tmp_path/'out'/'scores.tsv', sep='\t').set_index('method')
    assert scores.R2.is_monotonic_decreasing and set(scores.index) == set(results['methods']) and {'technical columns', 'best baseline', 'aam', 'aam + trees', 'mean'} <= set(scores.index)
    predictions = pd.read_csv(tmp_path/'out'/'predictions.tsv', sep='\t')
    assert predictions.groupby('habitat').fold.nunique().eq(1).all() and predictions[list(scores.index)].notna().all(axis=None)
    groups = pd.read_csv(tmp_path/'out'/'groups.tsv', sep='\t')
    assert sorted(groups.habitat) == ['forest', 'grassland', 'wetland'] and np.average(groups['aam'], weights=groups.samples) == pytest.approx(scores.MAE['aam'])
    found = predictions.set_index('sample_id')
    for r in read_records(tmp_path/'out'/'fits.jsonl'):
        if r['kind'] != 'baselines': continue
        assert r['best'] == max(r['methods'], key=lambda name: r['methods'][name]['inner']), 'the best baseline is that of the inner folds'
        np.testing.assert_array_equal(found.loc[r['test'], 'best baseline'], found.loc[r['test'], r['best']])
