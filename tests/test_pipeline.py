"pretrain -> train -> predict -> rf-baseline through the installed command, on simulated and on real tables."
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from aam.checkpoint import load_checkpoint

real = Path(__file__).resolve().parents[2]/'shared'/'data'/'moving_pictures'
regression_scores, class_scores = {'r2', 'mae', 'rmse'}, {'accuracy', 'precision', 'recall', 'f1'}


def read(path):
    return pd.read_csv(path, sep='\t', dtype={'sample_id': str, 'prediction': object, 'actual': object}, keep_default_na=True).set_index('sample_id')


def ids(path): return path.read_text().split()


def expect_files(run, *more):
    for name in ['checkpoints/best_model.pt', 'checkpoints/last.pt', 'train_samples.txt', 'val_samples.txt', 'config.json', 'scores.json', 'metrics.jsonl',
                 'training.log', 'dropped_samples.tsv', 'plots/loss_curves.png', *more]:
        assert (run/name).stat().st_size > 0, name
    assert list((run/'tensorboard').glob('events*')) and not list(run.rglob('*.part'))
    epochs = [json.loads(line)['epoch'] for line in (run/'metrics.jsonl').read_text().splitlines()]
    assert epochs == list(range(1, len(epochs) + 1))
    assert len(re.findall(r'first optimizer step \d+\.\d s after the start', (run/'training.log').read_text())) == 1


def expect_scores(run, wanted, parts=('validation',)):
    scores = json.loads((run/'scores.json').read_text())
    assert set(scores) == set(parts)
    for part in parts:
        found = {k: v for k, v in scores[part].items() if isinstance(v, (int, float))}
        assert wanted <= set(found) and np.isfinite(list(found.values())).all(), scores
        for name in wanted & (class_scores | {'unifrac_correlation'}): assert 0 <= found[name] <= 1, (name, found)
        for name in wanted & {'mae', 'rmse'}: assert found[name] > 0
    return scores


def expect_same_predictions(validated, predicted):
    "`val_predictions.tsv` says what `aam predict` says of those samples."
    for column in [c for c in validated if not c.startswith('actual')]:
        a, b = validated[column], predicted.loc[validated.index, column]
        if column == 'prediction' and not any(c.startswith('p_') for c in validated): a, b = a.astype(float), b.astype(float)
        if a.dtype == object: assert (a == b).all(), column
        else:
            scale = 1 if column.startswith('p_') else np.ptp(validated[column.replace('prediction', 'actual')].astype(float).dropna())
            assert np.abs(a - b).max() <= 1e-5*scale, (column, a, b)


def expect_forest(aam, tmp_path, run, table, metadata, column, wanted, *more):
    out = tmp_path/'forest.tsv'
    said = aam('rf-baseline', '--table', table, '--metadata', metadata, '--metadata-column', column, '--train-samples', run/'train_samples.txt',
               '--val-samples', run/'val_samples.txt', '--output', out, '--n-estimators', 20, '--n-jobs', 1, *more)
    forest, ours = read(out), read(run/'val_predictions.tsv')
    assert set(forest.index) == set(ours.index) and (forest.loc[ours.index, 'actual'].astype(str) == ours['actual'].astype(str)).all()
    assert list(tmp_path.glob('forest*.png')) and all(word in (said.out + said.err).lower() for word in wanted), said.out + said.err


def test_pretrain(pretrained):
    expect_files(pretrained, 'plots/unifrac.png')
    expect_scores(pretrained, {'val_loss', 'unifrac_r2', 'unifrac_correlation', 'unifrac_bias', 'unifrac_reachable_r2', 'nuc_accuracy', 'nuc_majority_accuracy'})


def test_two_targets_on_a_frozen_encoder(aam, tmp_path, survey, pretrained, trained):
    expect_files(trained, 'val_predictions.tsv', 'test_predictions.tsv', 'test_samples.txt', 'plots/val_predicted_soil_ph.png', 'plots/val_predicted_soil_moisture.png')
    expect_scores(trained, regression_scores, ('validation', 'test'))
    parts = {part: ids(trained/f'{part}_samples.txt') for part in ('train', 'val', 'test')}

    # groups stay on one side, the test samples are those that were asked for, every sample is in one part or listed as dropped
    metadata = pd.read_csv(survey/'metadata.tsv', sep='\t', dtype=str, keep_default_na=False).set_index('sample_id')
    subjects = [set(metadata.loc[p, 'subject_id']) for p in parts.values()]
    assert not (subjects[0] & subjects[1] or subjects[0] & subjects[2] or subjects[1] & subjects[2])
    dropped = list(read(trained/'dropped_samples.tsv').index)
    assert sorted(dropped + parts['train'] + parts['val'] + parts['test']) == sorted(metadata.index)
    assert set(parts['test']) == set(ids(survey/'test_samples.txt')) - set(dropped)
    assert set(dropped) == set(metadata.index[(metadata.soil_ph == '') & (metadata.soil_moisture == '')])

    # what was true, joined by ID
    for part in 'val', 'test':
        frame = read(trained/f'{part}_predictions.tsv')
        assert sorted(frame.index) == sorted(parts[part])
        assert list(frame) == [f'{kind}_{c}' for c in ('soil_ph', 'soil_moisture') for kind in ('prediction', 'actual')]
        for column in 'soil_ph', 'soil_moisture':
            np.testing.assert_array_equal(frame[f'actual_{column}'], pd.to_numeric(metadata.loc[frame.index, column]))

    # predict agrees
    out = tmp_path/'predictions.tsv'
    aam('predict', '--model', trained/'checkpoints'/'best_model.pt', '--table', survey/'table.biom', '--output', out, '--batch-size', 5)
    predicted = read(out)
    assert len(predicted) == 48
    for part in 'val', 'test': expect_same_predictions(read(trained/f'{part}_predictions.tsv'), predicted)

    # frozen means frozen, statistics included
    before, after = (load_checkpoint(run/'checkpoints'/'best_model.pt')['weights'] for run in (pretrained, trained))
    encoder = [k for k in after if k.startswith('encoder.')]
    assert encoder and set(encoder) == {k for k in before if k.startswith('encoder.')}
    assert [k for k in encoder if not torch.equal(before[k], after[k])] == []


def test_one_target_and_forest(aam, tmp_path, survey, inputs):
    run = tmp_path/'run'
    aam.cold('train', *inputs, '--metadata-column', 'soil_ph', '--output-dir', run, *aam.tiny, '--epochs', 2, launcher=aam.module)
    expect_files(run, 'val_predictions.tsv', 'plots/val_predicted.png')
    expect_scores(run, regression_scores)
    assert list(read(run/'val_predictions.tsv')) == ['prediction', 'actual']
    expect_forest(aam, tmp_path, run, survey/'table.biom', survey/'metadata.tsv', 'soil_ph', ['r2', 'mae', 'rmse'])


def test_classes_with_a_matrix(aam, tmp_path, survey, pretrained):
    run, out = tmp_path/'run', tmp_path/'out.tsv'
    files = ['--table', survey/'table.biom', '--metadata', survey/'metadata.tsv', '--unifrac-matrix', survey/'unifrac.h5']
    aam('train', *files, '--metadata-column', 'habitat', '--classifier', '--output-dir', run, *aam.tiny, '--epochs', 3, '--lr', '3e-3', '--best-metric', 'f1',
        '--pretrained-encoder', pretrained/'checkpoints'/'best_model.pt', '--train-samples', pretrained/'train_samples.txt', '--val-samples', pretrained/'val_samples.txt')
    expect_files(run, 'val_predictions.tsv', 'plots/val_confusion.png')
    expect_scores(run, class_scores)
    validated = read(run/'val_predictions.tsv')
    assert list(validated) == ['prediction', 'actual', 'p_forest', 'p_grassland', 'p_wetland']
    metadata = pd.read_csv(survey/'metadata.tsv', sep='\t', dtype=str).set_index('sample_id')
    assert (validated.actual == metadata.loc[validated.index, 'habitat']).all()
    chances = validated.filter(like='p_')
    np.testing.assert_allclose(chances.sum(axis=1), 1, atol=1e-6)
    assert ('p_' + validated.prediction == chances.idxmax(axis=1)).all()
    assert set(ids(run/'train_samples.txt')) <= set(ids(pretrained/'train_samples.txt'))
    aam.cold('predict', '--model', run/'checkpoints'/'best_model.pt', '--table', survey/'table.biom', '--output', out, launcher=aam.torchrun)
    expect_same_predictions(validated, read(out))
    expect_forest(aam, tmp_path, run, survey/'table.biom', survey/'metadata.tsv', 'habitat', ['accuracy', 'f1'], '--classifier')


def test_python_call(survey, tmp_path):
    from aam.train import train
    small = dict(embedding_dim=16, attention_layers=1, attention_heads=2, kmer_dim=16, max_bp=60, device='cpu', epochs=1)
    run = train(table=survey/'table.biom', metadata=str(survey/'metadata.tsv'), metadata_column='soil_ph', output_dir=tmp_path/'run', **small)
    assert run.folder == tmp_path/'run' and regression_scores <= set(run.scores['validation'])
    assert all(Path(path).exists() for path in run.paths.values()) and {'best_model', 'last', 'plots', 'predictions'} <= set(run.paths)
    assert json.loads((run.folder/'scores.json').read_text())['validation']['r2'] == run.scores['validation']['r2']
    from aam.table import read_table
    frame = read(run.paths['predictions'])
    again = run.model.predict(read_table(survey/'table.biom'), sample_ids=list(frame.index))
    np.testing.assert_allclose(again[:, 0], frame.prediction.astype(float), atol=1e-5)


@pytest.mark.skipif(not real.exists(), reason='the real tables are not here')
def test_real_table(aam, tmp_path):
    first, run, out = tmp_path/'first', tmp_path/'run', tmp_path/'out.tsv'
    table, metadata = real/'table.biom', real/'metadata.tsv'
    aam('pretrain', '--table', table, '--unifrac-matrix', real/'unifrac.h5', '--output-dir', first, *aam.tiny, '--epochs', 1)
    aam('train', '--table', table, '--tree', real/'tree.nwk', '--metadata', metadata, '--metadata-column', 'body_habitat', '--classifier', '--output-dir', run,
        *aam.tiny, '--epochs', 2, '--lr', '1e-3', '--pretrained-encoder', first/'checkpoints'/'best_model.pt')
    expect_files(run, 'val_predictions.tsv', 'plots/val_confusion.png')
    scores = expect_scores(run, class_scores)
    assert scores['validation']['accuracy'] >= 0.4 # three habitats, half of the samples palm
    truth = pd.read_csv(metadata, sep='\t', dtype=str).set_index('sample_id').body_habitat
    validated = read(run/'val_predictions.tsv')
    assert (validated.actual == truth[validated.index]).all()
    aam('predict', '--model', run/'checkpoints'/'best_model.pt', '--table', table, '--output', out)
    assert len(read(out)) == 34
    expect_same_predictions(validated, read(out))
    expect_forest(aam, tmp_path, run, table, metadata, 'body_habitat', ['accuracy', 'f1'], '--classifier')
