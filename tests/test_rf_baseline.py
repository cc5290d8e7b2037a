"`aam rf-baseline` against scikit-learn used directly, against the published scores of a real table, and with bad input."
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.model_selection import StratifiedKFold

from aam.cli import main
from aam.metadata import write_ids
from aam.rf_baseline import rf_baseline
from aam.table import make_table, write_table

moving_pictures = Path(__file__).resolve().parents[2] / 'shared/data/moving_pictures'
quick = dict(n_estimators=40, n_jobs=1)

@pytest.fixture(autouse=True)
def messages_as_before():
    "A command takes over the messages of aam; other tests want them back."
    log = logging.getLogger('aam')
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before

@pytest.fixture
def soils(tmp_path):
    "Fifty samples of 200 reads each, so that rarefaction keeps them whole; two ASVs follow the pH."
    rng = np.random.default_rng(3)
    ph = rng.uniform(4, 9, 50)
    rates = np.column_stack([9.1 - ph, ph - 3.9, rng.uniform(.5, 2, (50, 18))])
    counts = np.array([rng.multinomial(200, rate / rate.sum()) for rate in rates])
    sequences = sorted(''.join(rng.choice(list('ACGT'), 30)) for _ in range(20))
    ids = [f's{i:02}' for i in range(50)]
    frame = pd.DataFrame(dict(ph=ph.round(3), acid=np.where(ph < 6.5, 'yes', 'no'), one=['only'] + ['rest'] * 49, code=rng.integers(1, 3, 50)), index=pd.Index(ids, name='sample_id'))
    write_table(make_table(counts, ids, sequences), tmp_path / 'table.biom')
    frame.sample(frac=1, random_state=0).to_csv(tmp_path / 'metadata.tsv', sep='\t')
    write_ids(ids[:30], tmp_path / 'train.txt')
    write_ids(ids[30:40], tmp_path / 'val.txt')
    write_ids(ids[40:], tmp_path / 'test.txt')
    return tmp_path, counts, frame

def run(folder, column, **more):
    "One run on the files in `folder`."
    given = dict(table=folder / 'table.biom', metadata=folder / 'metadata.tsv', output=folder / 'rf.tsv', train_samples=folder / 'train.txt', val_samples=folder / 'val.txt')
    return rf_baseline(metadata_column=column, **{**given, **quick, **more})

@pytest.mark.parametrize('with_test', [False, True])
def test_numbers_as_sklearn(soils, with_test):
    folder, counts, frame = soils
    found = run(folder, 'ph', **(dict(test_samples=folder / 'test.txt') if with_test else {})).predictions
    fit, held = (slice(0, 40), slice(40, 50)) if with_test else (slice(0, 30), slice(30, 40))
    shares = csr_matrix(counts / 200) # dense, ties are broken otherwise
    forest = RandomForestRegressor(40, max_features='sqrt', random_state=42).fit(shares[fit], frame.ph[fit])
    assert found.sample_id.tolist() == frame.index[held].tolist()
    np.testing.assert_allclose(found.actual, frame.ph[held])
    np.testing.assert_allclose(found.prediction, forest.predict(shares[held]), rtol=1e-6)

def test_classes_as_sklearn(soils, capsys):
    folder, counts, frame = soils
    found = run(folder, 'acid').predictions
    shares = csr_matrix(counts / 200)
    forest = RandomForestClassifier(40, max_features='sqrt', random_state=42).fit(shares[:30], frame.acid[:30])
    np.testing.assert_allclose(found[['p_no', 'p_yes']], forest.predict_proba(shares[30:40]))
    assert found.actual.tolist() == frame.acid[30:40].tolist()
    shown = capsys.readouterr()
    assert "column 'acid' holds text: its values are predicted as classes" in shown.err
    assert 'macro F1' in shown.out and 'most frequent class' in shown.out

def test_numbers_as_classes_when_asked(soils):
    assert list(run(soils[0], 'code', classifier=True).predictions)[3:] == ['p_1', 'p_2']

def test_order_of_the_table_does_not_matter(soils):
    folder, counts, frame = soils
    first = run(folder, 'ph', rarefy_depth=100).predictions
    rng = np.random.default_rng(0)
    samples, asvs = rng.permutation(50), rng.permutation(20)
    sequences = [''.join(np.random.default_rng(i).choice(list('ACGT'), 30)) for i in range(20)]
    order = np.argsort(sequences)
    for name, rows, columns in (('one', np.arange(50), np.arange(20)), ('other', samples, asvs)):
        table = make_table(counts[rows][:, columns], frame.index[rows].tolist(), [sequences[order[c]] for c in columns])
        write_table(table, folder / f'{name}.biom')
    found = [run(folder, 'ph', rarefy_depth=100, table=folder / f'{name}.biom', output=folder / f'{name}.tsv').predictions for name in ('one', 'other')]
    pd.testing.assert_frame_equal(*found)
    pd.testing.assert_frame_equal(found[0], first) # nor do the sequences themselves, as long as their order is the same

def test_missing_values_are_masked_column_by_column(soils):
    folder, counts, frame = soils
    gappy = frame.assign(other=frame.ph * 10)
    gappy.loc[gappy.index[:15], 'ph'] = np.nan
    gappy.loc[gappy.index[[35, 36]], 'other'] = np.nan
    gappy.loc[gappy.index[36], 'ph'] = np.nan
    gappy.to_csv(folder / 'metadata.tsv', sep='\t')
    found = run(folder, 'ph,other')
    shares = csr_matrix(counts / 200)
    forest = RandomForestRegressor(40, max_features='sqrt', random_state=42).fit(shares[15:30], frame.ph[15:30])
    held = [i for i in range(30, 40) if i != 36] # without any value: dropped
    assert found.predictions.sample_id.tolist() == frame.index[held].tolist()
    np.testing.assert_allclose(found.predictions.prediction_ph, forest.predict(shares[held]), rtol=1e-6)
    assert found.predictions.actual_other.isna().sum() == 1
    assert found.paths['dropped'].read_text().splitlines()[1].startswith('s36\tno value')

def test_shallow_samples_are_dropped_only_when_a_depth_is_given(soils):
    folder, counts, frame = soils
    thin = counts.copy()
    thin[31] = 0
    thin[31, :2] = 5
    sequences = [''.join(np.random.default_rng(i).choice(list('ACGT'), 30)) for i in range(20)]
    write_table(make_table(thin, frame.index.tolist(), sequences), folder / 'table.biom')
    kept = run(folder, 'ph', output=folder / 'kept.tsv')
    assert len(kept.predictions) == 10 and 'dropped' not in kept.paths
    dropped = run(folder, 'ph', rarefy_depth=150)
    assert set(kept.predictions.sample_id) - set(dropped.predictions.sample_id) == {'s31'}
    assert 's31' in dropped.paths['dropped'].read_text()

@pytest.mark.skipif(not moving_pictures.exists(), reason='shared data not here')
def test_published_scores_of_moving_pictures(tmp_path):
    habitat = pd.read_csv(moving_pictures / 'metadata.tsv', sep='\t', index_col='sample_id').body_habitat
    right = []
    for fit, held in StratifiedKFold(5, shuffle=True, random_state=42).split(habitat, habitat):
        for name, members in dict(train=fit, val=held).items(): write_ids(habitat.index[members].tolist(), tmp_path / f'{name}.txt')
        found = rf_baseline(table=moving_pictures / 'table.biom', metadata=moving_pictures / 'metadata.tsv', metadata_column='body_habitat', n_jobs=1, overwrite=True,
                            output=tmp_path / 'rf.tsv', train_samples=tmp_path / 'train.txt', val_samples=tmp_path / 'val.txt')
        right += (found.predictions.prediction == found.predictions.actual).tolist()
    assert len(right) == 34
    assert np.mean(right) == pytest.approx(0.882, abs=0.09) # three samples; the README's forests saw unrarefied counts

bad_input = {
    'missing table': (dict(table='no.biom'), 'no.biom: no such file'),
    'missing metadata': (dict(metadata='no.tsv'), 'no.tsv: no such file'),
    'missing list': (dict(val_samples='no.txt'), 'no.txt: no such file'),
    'unknown column': (dict(metadata_column='pH'), "no column 'pH'; its columns are ph, "),
    'text among several': (dict(metadata_column='ph,acid'), "'acid' has the value"),
    'several classes': (dict(metadata_column='ph,code', classifier=True), '--classifier predicts one column'),
    'class with one sample': (dict(metadata_column='one'), "class 'only' has one sample"),
    'depth of no sample': (dict(rarefy_depth=5000), 'would be dropped'),
    'features': (dict(max_features='many'), '--max-features many: must be sqrt, log2'),
    'no trees': (dict(n_estimators=0), '--n-estimators 0: must be at least 1'),
    'output is input': (dict(output='metadata.tsv', overwrite=True), 'would replace the input'),
    'output is a folder': (dict(output='.'), 'is a folder'),
    'output is a picture': (dict(output='rf.png'), 'call it .tsv'),
    'output exists': (dict(output='old.tsv'), 'old.tsv exists'),
    'plot exists': (dict(output='older.tsv'), 'older.png exists'),
    'mistyped': (dict(n_estimator=5), '--n-estimator: no such option of aam rf-baseline; did you mean --n-estimators?'),
}

@pytest.mark.parametrize('case', bad_input)
def test_bad_input_is_one_line_and_changes_nothing(soils, case, monkeypatch, capsys):
    monkeypatch.chdir(soils[0])
    for name in ('old.tsv', 'older.png'): Path(name).write_text('mine')
    before = {path.name: path.read_bytes() for path in soils[0].iterdir()}
    changed, message = bad_input[case]
    given = dict(table='table.biom', metadata='metadata.tsv', metadata_column='ph', output='rf.tsv', n_estimators=5, n_jobs=1) | changed
    flags = [word for name, value in given.items() for word in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)]))]
    assert main(['rf-baseline', *flags]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith('aam: ') and message in last
    assert {path.name: path.read_bytes() for path in soils[0].iterdir()} == before

def test_help_imports_nothing_heavy():
    code = "import sys; from aam.cli import main; main(['rf-baseline', '--help']); print({'torch', 'pandas', 'biom', 'sklearn', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.endswith('set()\n')
