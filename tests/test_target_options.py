"Each option of the target, its loss and its predictions, by what it changes; contradictions; predict = val_predictions.tsv in every mode."
import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk
from sklearn.metrics import log_loss, mean_pinball_loss
from sklearn.utils.class_weight import compute_class_weight

from aam.checkpoint import load_checkpoint
from aam.cli import main
from aam.config import target_transform_names
from aam.inference import load_predictor
from aam.metrics import shown_names
from aam.predict import predict
from aam.table import make_table, read_table, write_table
from aam.train import train
from aam.transforms import TargetTransform

torch.set_num_threads(1)
tiny = dict(embedding_dim=16, attention_layers=1, attention_heads=2, kmer_dim=8, max_bp=40, device='cpu', epochs=1, lr=1e-2, penalty=0, nuc_penalty=0, count_penalty=0,
            gradient_checkpointing=False, rarefy_depth=300)
plain = dict(linear_start=False, val_prediction_passes=1) # its val_predictions.tsv are of the pass whose loss is recorded


@pytest.fixture(scope='module')
def folder(survey, tmp_path_factory):
    "Metadata with gaps, a class imbalance, and regions of which one is only among the validation samples, whose IDs are listed."
    path, rng = tmp_path_factory.mktemp('targets'), np.random.default_rng(0)
    frame = pd.read_csv(survey/'metadata.tsv', sep='\t', dtype=str, keep_default_na=False)
    frame['age'] = rng.gamma(2, 30, len(frame)).round(2)
    frame['weight'] = (frame.age*.1 + rng.uniform(0, 2, len(frame))).round(3)
    frame.loc[rng.choice(len(frame), 8, replace=False), 'weight'] = np.nan
    frame['rare'] = np.where(np.arange(len(frame)) % 5, 'common', 'rare')
    stop = np.arange(len(frame)) % 4 == 0
    frame['region'] = np.where(np.arange(len(frame)) % 2, 'north', 'south')
    frame.loc[np.flatnonzero(stop)[:3], 'region'] = ['west', 'west', '']
    frame['signed'] = np.linspace(-3, 3, len(frame)).round(3)
    frame.to_csv(path/'metadata.tsv', sep='\t', index=False)
    (path/'stop.txt').write_text('\n'.join(frame.sample_id[stop]) + '\n')
    return path


@pytest.fixture(scope='module')
def run(survey, folder, tmp_path_factory):
    "A function that trains a tiny model and returns its `Run`."
    def run(column, **options):
        files = dict(table=survey/'table.biom', metadata=folder/'metadata.tsv', val_samples=folder/'stop.txt', output_dir=tmp_path_factory.mktemp('run')/'run')
        return train(**files, metadata_column=column, **{**tiny, **options})
    return run


def read(path): return pd.read_csv(path, sep='\t', dtype={'sample_id': str}).set_index('sample_id')
def validated(r): return read(r.paths['predictions'])
def recorded_loss(r): return json.loads((r.folder/'metrics.jsonl').read_text().splitlines()[-1])['val_loss']
def weights(r): return load_checkpoint(r.paths['best_model'])['weights']


def training_values(r, folder, column):
    values = pd.to_numeric(read(folder/'metadata.tsv')[column])
    return values[(r.folder/'train_samples.txt').read_text().split()].dropna()


def errors(r, folder, column='age', suffix=''):
    "Prediction minus truth in units of the training deviation."
    frame = validated(r)
    e = (frame[f'prediction{suffix}'] - frame[f'actual{suffix}']) / training_values(r, folder, column).std(ddof=0)
    return e.dropna().to_numpy()


def huber(e): return np.where(np.abs(e) < 1, e**2/2, np.abs(e) - .5)
costs = [
    (dict(), huber),
    (dict(loss_type='mse'), np.square),
    (dict(loss_type='mae'), np.abs),
    (dict(loss_type='asymmetric', over_penalty=.5, under_penalty=3.), lambda e: np.where(e > 0, .5*e, -3*e)),
]


@pytest.mark.parametrize('options,cost', costs, ids=['huber', 'mse', 'mae', 'asymmetric'])
def test_loss(run, folder, options, cost):
    r = run('age', **plain, **options)
    np.testing.assert_allclose(recorded_loss(r), cost(errors(r, folder)).mean(), rtol=1e-4)


def test_loss_of_each_target(run, folder):
    "By position and by name; a value missing in one target leaves the other."
    r = run('age,weight', **plain, loss_config='{"1": "mae", "age": "mse"}')
    age, weight = errors(r, folder, 'age', '_age'), errors(r, folder, 'weight', '_weight')
    assert len(weight) < len(age)
    np.testing.assert_allclose(recorded_loss(r), np.concatenate([age**2, np.abs(weight)]).mean(), rtol=1e-4)


def test_quantile_loss_and_scores(run, folder):
    r = run('age', **plain, loss_type='quantile', quantiles='.9,.1,.3,.6')
    frame, levels = validated(r), [.1, .3, .6, .9]
    assert list(frame) == ['prediction', 'actual', 'q0.1', 'q0.3', 'q0.6', 'q0.9']
    assert (np.diff(frame.filter(like='q'), axis=1) >= 0).all()
    np.testing.assert_allclose(frame.prediction, frame['q0.3']/3 + frame['q0.6']*2/3) # 0.5 is not among them
    loss = np.mean([mean_pinball_loss(frame.actual, frame[f'q{q}'], alpha=q) for q in levels])
    np.testing.assert_allclose(recorded_loss(r), loss/training_values(r, folder, 'age').std(ddof=0), rtol=1e-4)
    scores = r.scores['validation']
    np.testing.assert_allclose(scores['pinball'], loss)
    np.testing.assert_allclose(scores['coverage'], frame.actual.between(frame['q0.1'], frame['q0.9']).mean())
    np.testing.assert_allclose(scores['mae'], (frame.prediction - frame.actual).abs().mean())


@pytest.mark.parametrize('how', ['none', 'balanced', 'sqrt', '1,4'])
def test_class_weights(run, folder, how):
    r = run('rare', classifier=True, **plain, class_weights=how)
    frame, truth = validated(r), read(folder/'metadata.tsv').rare
    fitted = truth[(r.folder/'train_samples.txt').read_text().split()]
    balanced = compute_class_weight('balanced', classes=np.array(['common', 'rare']), y=fitted)
    weight = dict(none=np.ones(2), balanced=balanced, sqrt=balanced**.5).get(how, np.array([1., 4.]))
    chances = frame[['p_common', 'p_rare']].to_numpy()
    expected = log_loss(frame.actual, chances/chances.sum(1, keepdims=True), labels=['common', 'rare'], sample_weight=weight[(frame.actual == 'rare').astype(int)])
    np.testing.assert_allclose(recorded_loss(r), expected, rtol=1e-4)


def test_class_weights_reach_the_linear_path(run, survey):
    "Weights of 1 and 4 move the odds of the linear model by 4."
    def said(w):
        state = load_checkpoint(run('rare', classifier=True, class_weights=w, refit=False).paths['best_model'])
        return load_predictor(state | dict(share=1.)).predict(read_table(survey/'table.biom'), passes=1)
    even, skewed = said('1,1'), said('1,4')
    odds = lambda p: p[:, 1]/p[:, 0]
    np.testing.assert_allclose(odds(skewed)/odds(even), 4, rtol=1e-3)


def wild_predictions(r, table, size=300):
    "Of the model of `r` when its head says anything, and the opposite."
    predictor, found = load_predictor(load_checkpoint(r.paths['best_model']) | dict(share=0.5)), []
    for sign in 1, -1:
        torch.manual_seed(0)
        for p in predictor.model.heads['target'].deep[-1].parameters(): torch.nn.init.normal_(p, std=size).data.mul_(sign)
        found.append(predictor.predict(table, passes=1))
    return np.concatenate(found)


@pytest.mark.parametrize('options,low,high', [(dict(bounded_targets=True), True, True), *[(dict(output_activation=a), True, False) for a in ('relu', 'softplus', 'exp')], (dict(), False, False)],
                         ids=['bounded', 'relu', 'softplus', 'exp', 'none'])
@pytest.mark.parametrize('quantiles', [None, '0.1,0.5,0.9'], ids=['point', 'quantiles'])
def test_range(run, survey, folder, options, low, high, quantiles):
    "With minmax, 0 and 1 are the extremes of the training values, whatever the weights; and quantiles never cross."
    r = run('age', **options, **(dict(loss_type='quantile', quantiles=quantiles) if quantiles else {}))
    values = training_values(r, folder, 'age')
    with np.errstate(over='ignore', invalid='ignore'): wild = wild_predictions(r, read_table(survey/'table.biom'))
    span = np.ptp(values)
    assert (wild.min() >= values.min() - 1e-5*span) == low
    assert (wild.max() <= values.max() + 1e-5*span) == high
    if quantiles: assert wild.shape == (96, 1, 3) and (wild[..., 1:] >= wild[..., :-1]).all()


def test_training_starts_at_the_mean(run, folder):
    "Also behind a sigmoid."
    for options in dict(), dict(bounded_targets=True), dict(output_activation='softplus'):
        r = run('age', **options, **plain, lr=1e-12)
        head = r.model.model.heads['target']
        start = r.model.target.transform.decode(head.link.forward(head.units()[0])[None].detach().numpy())
        np.testing.assert_allclose(start, training_values(r, folder, 'age').mean(), rtol=1e-3)


def test_linear_floor_survives_the_options(run, survey):
    "A range or quantiles change predictions of the linear path only where it leaves the range."
    def said(**options): return load_predictor(load_checkpoint(run('age', refit=False, **options).paths['best_model']) | dict(share=1.)).predict(read_table(survey/'table.biom'))
    base = said()[:, 0]
    shift = said(loss_type='quantile', quantiles='0.1,0.5,0.9')[:, 0] - base[:, None] # those of its out-of-fold errors
    np.testing.assert_allclose(shift, np.tile(shift[0], (len(shift), 1)), atol=1e-3*np.ptp(base))
    assert shift[0, 0] < shift[0, 1] < shift[0, 2]
    assert np.abs(said(bounded_targets=True)[:, 0] - base).mean() < .05*np.ptp(base)


def test_linear_floor_leans_to_the_cheaper_side(run, survey):
    "An asymmetric loss shifts the linear path to the quantile of its out-of-fold errors that costs least."
    def said(**options): return load_predictor(load_checkpoint(run('age', refit=False, **options).paths['best_model']) | dict(share=1.)).predict(read_table(survey/'table.biom'))[:, 0]
    low, high = (said(loss_type='asymmetric', over_penalty=o, under_penalty=u) for o, u in ((4., 1.), (1., 4.)))
    shift = high - low
    np.testing.assert_allclose(shift, shift[0], atol=1e-3*np.ptp(low))
    assert shift[0] > .1*np.ptp(low)


def test_range_that_targets_leave(run):
    "Is said, with the number of samples."
    said = (run('age', target_transform='zscore', output_activation='softplus').folder/'training.log').read_text()
    assert '--output-activation softplus' in said and 'training values of age are not above 0' in said
    assert '--bounded-targets' not in (run('age', bounded_targets=True).folder/'training.log').read_text()


def test_learnable_output_scale(run):
    names = {'heads.target.log_output_scale', 'heads.target.output_bias'}
    assert not names & set(weights(run('age,weight')))
    learned = weights(run('age,weight', learnable_output_scale=True, linear_start=False))
    for name in names: assert learned[name].shape == (2,) and learned[name].abs().min() > 0


def test_hidden_layers(run):
    r = run('age', regressor_hidden_dims='24,12', regressor_dropout=.25)
    layers = [tuple(w.shape) for name, w in weights(r).items() if name.startswith('heads.target.deep') and name.endswith('weight')]
    assert layers == [(24, 32), (12, 24), (1, 12)]
    dropouts = [m.p for m in load_predictor(load_checkpoint(r.paths['best_model'])).model.heads['target'].deep if isinstance(m, torch.nn.Dropout)]
    assert dropouts[1:] == [.25, .25]


def test_out_dim_that_agrees(run):
    assert list(validated(run('rare', classifier=True, out_dim=2)).filter(like='p_')) == ['p_common', 'p_rare']


def test_scores_stand_beside_guessing(run, folder):
    "scores.json and the line on the terminal, recomputed with scikit-learn from val_predictions.tsv."
    r = run('rare', classifier=True)
    frame, names = validated(r), ['common', 'rare']
    fitted = read(folder/'metadata.tsv').rare[(r.folder/'train_samples.txt').read_text().split()]
    shares, truth = [(fitted == n).mean() for n in names], (frame.actual == 'rare').astype(int)
    scores, said = json.loads((r.folder/'scores.json').read_text())['validation'], (r.folder/'training.log').read_text()
    for prefix, p in {'': frame[['p_common', 'p_rare']].to_numpy(), 'majority_': np.tile(shares, (len(frame), 1))}.items():
        p = p/p.sum(1, keepdims=True)
        called = p.argmax(1)
        confidence, bins = p.max(1), np.digitize(p.max(1), np.linspace(0, 1, 11), right=True)
        wanted = dict(accuracy=sk.accuracy_score(truth, called), balanced_accuracy=sk.balanced_accuracy_score(truth, called), auroc=sk.roc_auc_score(truth, p[:, 1]), log_loss=sk.log_loss(truth, p),
                      mcc=sk.matthews_corrcoef(truth, called), calibration_error=sum((bins == b).mean()*abs((called == truth)[bins == b].mean() - confidence[bins == b].mean()) for b in set(bins)),
                      **{k: f(truth, called, average='macro', zero_division=0) for k, f in dict(precision=sk.precision_score, recall=sk.recall_score, f1=sk.f1_score).items()})
        for name, value in wanted.items(): np.testing.assert_allclose(scores[prefix + name], value, atol=1e-6, err_msg=prefix + name)
    for name, label in shown_names.items():
        if name in wanted: assert f"{label} {scores[name]:.3f} ({scores['majority_' + name]:.3f})" in said
    r = run('age,weight')
    frame, scores, said = validated(r), json.loads((r.folder/'scores.json').read_text())['validation'], (r.folder/'training.log').read_text()
    for c in 'age', 'weight':
        known = frame.dropna(subset=f'actual_{c}')
        truth, mean = known[f'actual_{c}'], training_values(r, folder, c).mean()
        for prefix, p in {'': known[f'prediction_{c}'], 'mean_': np.full(len(known), mean)}.items():
            wanted = dict(r2=sk.r2_score(truth, p), mae=sk.mean_absolute_error(truth, p), mse=sk.mean_squared_error(truth, p), rmse=sk.mean_squared_error(truth, p)**.5)
            for name, value in wanted.items(): np.testing.assert_allclose(scores[f'{prefix}{name}_{c}'], value, rtol=1e-6)
        assert f"{c}: R2 {scores[f'r2_{c}']:.3f} ({scores[f'mean_r2_{c}']:.3f}), MAE {scores[f'mae_{c}']:.4g} ({scores[f'mean_mae_{c}']:.4g})" in said


@pytest.fixture
def predicted(survey, folder, tmp_path):
    "A function that runs `aam predict` and returns its table."
    def predicted(r, **options):
        out = tmp_path/'out.tsv'
        predict(model=r.paths['best_model'], table=survey/'table.biom', output=out, overwrite=True, device='cpu', **options)
        return read(out)
    return predicted


def expect_same(r, found):
    "val_predictions.tsv says what predict says."
    frame = validated(r)
    assert list(found) == [c for c in frame if not c.startswith('actual')]
    for c in found:
        a, b = frame[c], found.loc[frame.index, c]
        if c == 'prediction' and 'p_common' in found: assert (a == b).all()
        else: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5*max(np.ptp(b), 1e-3), err_msg=c)


modes = {
    'quantiles by category': ('age,weight', dict(loss_type='quantile', quantiles='0.1,0.5,0.9', target_transform='zscore-category', normalize_by='region')),
    'quantiles log-zscore': ('age', dict(loss_type='quantile', quantiles='0.25,0.75', target_transform='log-zscore')),
    'two targets log-minmax': ('age,weight', dict(target_transform='log-minmax', bounded_targets=True)),
    'by category': ('age', dict(target_transform='zscore-category', normalize_by='region', learnable_output_scale=True)),
    'classes': ('rare', dict(classifier=True, class_weights='sqrt', regressor_hidden_dims='8')),
}


@pytest.mark.parametrize('mode', modes)
def test_predict_agrees(run, predicted, folder, mode):
    column, options = modes[mode]
    r = run(column, **options, val_prediction_passes=2)
    found = predicted(r, **(dict(metadata=folder/'metadata.tsv') if 'normalize_by' in options else {}))
    assert len(found) == 48
    expect_same(r, found)
    for c in [c for c in found if c.startswith('q0.5')]: np.testing.assert_array_equal(found[c.replace('q0.5', 'prediction')], found[c]) # the median is the prediction
    if mode == 'quantiles by category':
        assert list(found) == [f'{kind}_{c}' for c in ('age', 'weight') for kind in ('prediction', 'q0.1', 'q0.5', 'q0.9')]
        stop = (folder/'stop.txt').read_text().split()
        assert 'west' not in set(read(folder/'metadata.tsv').region.drop(stop)) and found.loc[stop].notna().all(axis=None)


@pytest.mark.parametrize('name', target_transform_names)
def test_transform_of_the_targets(run, predicted, folder, name):
    "The model learns on the scale of this transform, fitted on the training samples; and predict goes all the way back."
    r = run('age', target_transform=name, **(dict(normalize_by='region') if name == 'zscore-category' else {}))
    fitted = training_values(r, folder, 'age')
    logged = np.log1p(fitted) if name.startswith('log') else fitted
    if name == 'zscore-category': groups = logged.groupby(read(folder/'metadata.tsv').region[logged.index])
    low, high = {'none': (fitted.min(), fitted.max()), 'zscore-category': ((logged - groups.transform('mean'))/groups.transform('std', ddof=0)).agg(['min', 'max']) if name == 'zscore-category' else None,
                 **dict.fromkeys(('minmax', 'log-minmax'), (0, 1)), **dict.fromkeys(('zscore', 'log-zscore'), ((logged - logged.mean())/logged.std(ddof=0)).agg(['min', 'max']))}[name]
    state = load_checkpoint(r.paths['best_model'])
    transform = TargetTransform.from_dict(state['target']['transform'])
    scale = transform.encode(fitted.to_numpy()[:, None], read(folder/'metadata.tsv').region[fitted.index].to_numpy())
    np.testing.assert_allclose([scale.min(), scale.max()], [low, high], atol=1e-9)
    np.testing.assert_allclose([float(state['weights']['heads.target.centre'][0]), float(state['weights']['heads.target.scale'][0])], [scale.mean(), scale.std()], rtol=1e-5, atol=1e-6)
    found = predicted(r, **(dict(metadata=folder/'metadata.tsv') if name == 'zscore-category' else {}))
    expect_same(r, found)
    assert found.prediction.between(fitted.min() - np.ptp(fitted), fitted.max() + np.ptp(fitted)).all()


def test_passes_and_variance(run, predicted):
    "The model's number of passes is predict's; two passes and one give the second, and so the variance."
    r = run('age', val_prediction_passes=2, linear_start=False)
    two, one = predicted(r, output_variance=True), predicted(r, prediction_passes=1)
    assert list(two) == ['prediction', 'variance'] and list(one) == ['prediction']
    expect_same(r, two[['prediction']])
    second = 2*two.prediction - one.prediction
    assert (two.variance > 0).mean() > .9
    np.testing.assert_allclose(two.variance, (one.prediction - second)**2/2, rtol=1e-4, atol=1e-9)
    assert r.model.passes == 2 and not np.allclose(two.prediction, predicted(r, prediction_passes=4).prediction)


def test_variance_of_classes_and_of_several_targets(run, predicted):
    classes, several = run('rare', classifier=True), run('age,weight', loss_type='quantile', quantiles='.1,.9')
    found = predicted(classes, output_variance=True)
    assert list(found) == ['prediction', 'p_common', 'p_rare', 'var_common', 'var_rare']
    np.testing.assert_allclose(found.var_common, found.var_rare, rtol=1e-3, atol=1e-12) # probabilities of two classes mirror each other
    assert [c for c in predicted(several, output_variance=True, prediction_passes=3) if c.startswith('variance')] == ['variance_age', 'variance_weight']


def test_curves_of_several_targets(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    r = run('age,weight', loss_type='quantile', quantiles='0.1,0.9')
    events = EventAccumulator(str(r.folder/'tensorboard')).Reload()
    wanted = {'r2', 'mae', 'mse', 'pinball', 'coverage'}
    assert {f'val/{name}{c}' for name in wanted for c in ('', '_age', '_weight')} <= set(events.Tags()['scalars'])
    assert wanted <= set(r.scores['validation'])
    assert {p.name for p in (r.folder/'plots').glob('val_*')} == {'val_predicted_age.png', 'val_predicted_weight.png'}


age, classes = dict(metadata_column='age'), dict(metadata_column='rare', classifier=True)
quantile = dict(loss_type='quantile', quantiles='0.1,0.9')
contradictions = [
    (age | dict(loss_type='quantile'), ['--loss-type quantile', '--quantiles']),
    (age | dict(quantiles='0.1,0.9'), ['--loss-type quantile', '--quantiles']),
    (age | dict(loss_type='quantile', quantiles='0,0.5'), ['--quantiles 0.0,0.5', 'between 0 and 1']),
    (age | dict(loss_type='quantile', quantiles='low,high'), ['--quantiles low,high', 'numbers']),
    (age | dict(loss_type='hubert'), ['--loss-type', 'hubert', 'huber']),
    (age | dict(over_penalty=2.), ['--over-penalty', '--loss-type asymmetric']),
    (age | dict(loss_config='{"age": "hubert"}'), ['--loss-config', 'hubert', 'huber, mse, mae, asymmetric']),
    (age | dict(loss_config='{"height": "mse"}'), ['--loss-config', 'height', 'age']),
    (age | dict(loss_config='{"1": "mse"}'), ['--loss-config', '1 is no target']),
    (age | dict(loss_config='{"0": "mse", "age": "mae"}'), ['--loss-config', 'one target']),
    (age | dict(loss_config='mse'), ['--loss-config mse', 'JSON']),
    (age | quantile | dict(loss_config='{"age": "mse"}'), ['--loss-config', '--loss-type quantile']),
    (age | dict(bounded_targets=True, output_activation='exp'), ['--bounded-targets', '--output-activation exp']),
    (age | dict(regressor_hidden_dims='64,0'), ['--regressor-hidden-dims 64,0', 'at least 1']),
    (age | dict(regressor_hidden_dims='wide'), ['--regressor-hidden-dims wide', 'whole numbers']),
    (age | dict(target_transform='zscore-category'), ['--target-transform zscore-category', '--normalize-by']),
    (age | dict(class_weights='balanced'), ['--class-weights balanced', '--classifier']),
    (age | dict(out_dim=3), ['--out-dim 3', '1 column']),
    (dict(metadata_column='signed', target_transform='log-zscore'), ['log-zscore', 'signed', 'negative', 'site']),
    (classes | dict(loss_type='mse'), ['--loss-type mse', '--classifier']),
    (classes | quantile, ['--classifier']),
    (classes | dict(out_dim=3), ['--out-dim 3', '2 classes', 'common, rare']),
    (classes | dict(class_weights='even'), ['--class-weights even', 'balanced', 'sqrt']),
    (classes | dict(class_weights='1,2,3'), ['--class-weights 1,2,3', '3 numbers for 2 classes', 'common, rare']),
    (classes | dict(class_weights='-1,2'), ['--class-weights -1,2', 'negative']),
    (classes | dict(bounded_targets=True), ['--bounded-targets', '--classifier']),
]


@pytest.mark.parametrize('options,says', contradictions, ids=lambda x: '-'.join(map(str, x.values())) if isinstance(x, dict) else '')
def test_contradiction(survey, folder, tmp_path, capsys, options, says):
    files = dict(table=survey/'table.biom', metadata=folder/'metadata.tsv', output_dir=tmp_path/'run')
    words = [w for name, value in (files | options).items() for w in [f"--{name.replace('_', '-')}" + ('' if value is True else f'={value}')]]
    assert main(['train', *words]) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith('aam: ')]
    assert len(lines) == 1 and not (tmp_path/'run').exists()
    for text in says: assert text in lines[0], (text, lines[0])


def test_variance_of_one_pass_is_refused(run, survey, tmp_path, capsys):
    r = run('age', val_prediction_passes=1)
    words = ['predict', '--model', r.paths['best_model'], '--table', survey/'table.biom', '--output', tmp_path/'out.tsv', '--output-variance']
    assert main(list(map(str, words))) == 2
    assert '--prediction-passes of at least 2' in capsys.readouterr().err and not (tmp_path/'out.tsv').exists()


def test_relatives_of_known_asvs_tell(tmp_path):
    "Each site has ASVs of its own, of two families, so that 6-mers alone say anything of new sites; from the checkpoint, on a table without the old ones."
    rng, sites = np.random.default_rng(0), np.arange(120)//3
    ancestors = rng.integers(4, size=(2, 60))
    sequences = [''.join('ACGT'[b] for b in np.where(rng.random(60) < .05, rng.integers(4, size=60), ancestors[i % 2])) for i in range(800)]
    first = rng.uniform(.1, .9, 120) # share of the first family
    counts = (np.arange(800)//20 == sites[:, None])*(rng.random((120, 800)) < np.stack([first, 1 - first], 1)[:, np.arange(800) % 2])*100
    ids = np.array([f's{i:03}' for i in range(120)])
    for name, some in dict(old=sites < 30, new=sites >= 30).items():
        held = np.flatnonzero(counts[some].sum(0))
        write_table(make_table(counts[some][:, held], list(ids[some]), [sequences[i] for i in held]), tmp_path/f'{name}.biom')
    pd.DataFrame(dict(sample_id=ids, first=first.round(4), site=sites)).to_csv(tmp_path/'metadata.tsv', sep='\t', index=False)
    run = train(table=tmp_path/'old.biom', metadata=tmp_path/'metadata.tsv', metadata_column='first', group_column='site', output_dir=tmp_path/'run', **tiny)
    assert ', 0% 6-mers' not in (run.folder/'training.log').read_text()
    said = load_predictor(load_checkpoint(run.paths['best_model'])).predict(read_table(tmp_path/'new.biom'))[:, 0]
    assert sk.r2_score(first[sites >= 30], said) > .4, said


def test_no_asv_is_in_two_samples(tmp_path):
    "Nothing is known by name; there are predictions all the same."
    rng, ids = np.random.default_rng(0), [f's{i:02}' for i in range(40)]
    sequences = sorted({''.join(rng.choice(list('ACGT'), 60)) for _ in range(200)})
    write_table(make_table(np.repeat(np.eye(40, dtype=int), 5, 1)*rng.integers(1, 50, 200), ids, sequences), tmp_path/'table.biom')
    pd.DataFrame(dict(sample_id=ids, y=rng.normal(size=40).round(3), kind=['a', 'b']*20)).to_csv(tmp_path/'metadata.tsv', sep='\t', index=False)
    for column, classifier in dict(y=False, kind=True).items():
        run = train(table=tmp_path/'table.biom', metadata=tmp_path/'metadata.tsv', metadata_column=column, classifier=classifier, output_dir=tmp_path/column, **{**tiny, 'rarefy_depth': 5})
        assert len(validated(run).dropna()) == 8
