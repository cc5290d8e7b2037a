"Metadata against scikit-bio's reader of QIIME 2 files, and splits against what they promise."
import csv
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from skbio.metadata import SampleMetadata
from skbio.metadata.io import MetadataFileError

from aam.config import AamError
from aam.metadata import (category_ids, category_vocabulary, class_targets, get_column, is_text_column, numeric_targets,
                          read_ids, read_metadata, split_samples, write_ids)

data = Path(__file__).resolve().parents[2] / 'shared' / 'data'
body = 'S1\t3\tgut\nS2\t-4.5e1\tpalm\nS3\t\t\n'

qiime_files = {
    **{f'header {name}': f'{name}\tage\tsite\n{body}' for name in
       ['id', 'sampleid', 'sample id', 'sample-id', 'SAMPLE-ID', 'featureid', 'feature-id', '#SampleID', '#Sample ID', '#OTUID', '#OTU ID', 'sample_name']},
    'types': f'id\tage\tsite\n#q2:types\tcategorical\tcategorical\n{body}',
    'types of skbio, upper case': f'id\tage\tsite\n#sk:types\tCategorical\t\n{body}',
    'missing scheme': f'id\tage\tsite\n#q2:types\tnumeric\tcategorical\n#q2:missing\tINSDC:missing\tINSDC:missing\n{body}S4\tnot collected\tmissing\n',
    'word that is a value': 'id\tage\tsite\n#q2:missing\t\tno-missing\nS1\t3\tgut\nS2\t4\tmissing\n',
    'comments': f'# above\n#also above\nid\tage\tsite\n# between\n{body}# below\twith\tcells\n',
    'quotes': 'id\tage\tsite\nS1\t"3"\t"gut\twith tab"\nS2\t4\t"a ""quoted"" word"\nS3\t5\t"two\nlines"\n',
    'hash inside a cell': 'id\tage\tsite\nS1\t3\tpalm #2\n',
    'Windows line ends': f'id\tage\tsite\n{body}'.replace('\n', '\r\n'),
    'byte-order mark': f'\ufeffid\tage\tsite\n{body}',
    'space around cells': 'id \t age\tsite\n S1\t 3 \t gut \n',
    'empty rows': f'\n\t\t\nid\tage\tsite\n\n{body}\n\t\t\n\n',
    'short and long rows': 'id\tage\tsite\t\t\nS1\nS2\t4\nS3\t5\tgut\t\t\t\n',
    'IDs like numbers': 'id\tage\tsite\n001\t3\tgut\n1\t4\tgut\n1.0\t5\tgut\n1e3\t5\tgut\n',
    'not ASCII': 'id\tage\tsite\nÅ1\t3\tPerú\n',
}

@pytest.mark.parametrize('text', qiime_files.values(), ids=qiime_files.keys())
def test_same_as_skbio(text, tmp_path):
    path = tmp_path / 'metadata.tsv'
    path.write_text(text, encoding='utf-8', newline='')
    ours, theirs = read_metadata(path), SampleMetadata.load(str(path))
    expected = theirs.to_dataframe()
    assert list(ours.index) == list(expected.index) and list(ours.columns) == list(expected.columns)
    for name, column in theirs.columns.items():
        assert is_text_column(get_column(ours, name)) == (column.type == 'categorical')
        if column.type == 'categorical':
            assert ours[name].fillna('').tolist() == expected[name].astype(object).fillna('').tolist()
        elif expected[name].notna().any():
            np.testing.assert_array_equal(numeric_targets(ours, [name])[:, 0], expected[name])

refused = {
    'no header': (body, "first column is called 'S1'"),
    'empty': ('', 'no header'),
    'only comments': ('# nothing\n', 'no header'),
    'no samples': ('id\tage\n', 'no samples'),
    'column twice': ('id\tage\tage\nS1\t1\t2\n', "'age' appears twice"),
    'nameless column': ('id\t\tage\nS1\t1\t2\n', 'column 2 has no name'),
    'ID twice': ('id\tage\nS1\t1\nS1\t2\n', 'sample S1 has two rows'),
    'row without ID': ('id\tage\n\t1\n', 'without a sample ID'),
    'stray tab': ('id\tage\nS1\t1\t2\n', 'more cells than the header'),
    'header twice': ('id\tage\nS1\t1\nid\tage\n', 'below the header'),
    'unknown type': ('id\tage\n#q2:types\tinteger\nS1\t1\n', "'integer'; it can be numeric, categorical"),
    'unknown directive': ('id\tage\n#q2:units\tweeks\nS1\t1\n', 'not understood'),
    'two rows of types': ('id\tage\n#q2:types\tnumeric\n#q2:types\tcategorical\nS1\t1\n', 'two #q2:types rows'),
    'unclosed quote': ('id\tage\nS1\t"1\nS2\t2\n', 'not a tab-separated table'),
}

@pytest.mark.parametrize('text,message', refused.values(), ids=refused.keys())
def test_refused_as_by_skbio(text, message, tmp_path):
    path = tmp_path / 'metadata.tsv'
    path.write_text(text)
    with pytest.raises((MetadataFileError, csv.Error)): SampleMetadata.load(str(path))
    with pytest.raises(AamError) as error: read_metadata(path)
    assert str(error.value).startswith(f'{path}: ') and message in str(error.value) and '\n' not in str(error.value)

def test_types_anywhere_below_the_header(tmp_path):
    "QIIME 2 wants the row right below the header; behind comments or among the samples it is read as well, not taken for a comment."
    for text in 'id\tage\n# a comment\n\n#q2:types\tcategorical\nS1\t1\n', 'id\tage\n#q2:missing\tblank\n#q2:types\tcategorical\nS1\t1\n', 'id\tage\nS1\t1\n#q2:types\tcategorical\n':
        (tmp_path / 'm.tsv').write_text(text)
        frame = read_metadata(tmp_path / 'm.tsv')
        assert list(frame.index) == ['S1'] and is_text_column(get_column(frame, 'age'))

def test_files_that_cannot_be_read(tmp_path):
    for read in (read_metadata, read_ids):
        with pytest.raises(AamError, match='no such file'): read(tmp_path / 'absent.tsv')
        with pytest.raises(AamError, match='cannot be read'): read(tmp_path)
        (tmp_path / 'excel.tsv').write_text('id\tage\nS1\t1\n', encoding='utf-16')
        with pytest.raises(AamError, match='not UTF-8'): read(tmp_path / 'excel.tsv')
    (tmp_path / 'latin.tsv').write_text('id\tsite\nS1\tgut\nS2\tPerú\n', encoding='latin-1')
    with pytest.raises(AamError, match=r'not UTF-8 text \(line 3\); save the metadata as tab-separated text in UTF-8'): read_metadata(tmp_path / 'latin.tsv')
    (tmp_path / 'empty.txt').write_text('\n')
    with pytest.raises(AamError, match='holds no sample ID'): read_ids(tmp_path / 'empty.txt')

@pytest.mark.parametrize('name', ['mouse_age', 'mackerel_body_site', 'moving_pictures'])
def test_real_tables_as_skbio(name, tmp_path):
    path = data / name / 'metadata.tsv'
    if not path.exists(): pytest.skip(f'{path} is absent')
    renamed = tmp_path / 'metadata.tsv' # skbio refuses `sample_id`
    renamed.write_text(path.read_text().replace('sample_id', 'sample-id', 1))
    ours, theirs = read_metadata(path), SampleMetadata.load(str(renamed))
    for column, properties in theirs.columns.items():
        assert is_text_column(get_column(ours, column)) == (properties.type == 'categorical')
        if properties.type == 'numeric': np.testing.assert_array_equal(numeric_targets(ours, [column])[:, 0], theirs.to_dataframe()[column])

def text_frame(**columns):
    n = len(next(iter(columns.values())))
    return pd.DataFrame(columns, index=[f's{i}' for i in range(n)], dtype=object)

@pytest.mark.parametrize('value', ['inf', '-Infinity', '1e999', '1_000', '3,5', '0x10', 'young', '٣'])
def test_values_that_are_not_numbers(value):
    with pytest.raises(AamError) as error: numeric_targets(text_frame(age=['1', value, 'x']), ['age'])
    assert repr(value) in str(error.value) and 's1' in str(error.value) and "'age'" in str(error.value) and '--classifier' in str(error.value)

def test_column_without_values_and_declared_types():
    frame = text_frame(age=[np.nan, np.nan], year=['2001', '2002'])
    with pytest.raises(AamError, match="'age' has no value"): numeric_targets(frame, ['age'])
    with pytest.raises(AamError, match="'age' has no value"): class_targets(frame, 'age')
    frame.attrs['q2_types'] = dict(year='categorical')
    with pytest.raises(AamError, match='declared categorical'): numeric_targets(frame, ['year'])

def test_classes_that_look_like_numbers():
    indices, names = class_targets(text_frame(day=['10', '2', np.nan, '1', '1.0']), 'day')
    assert names == ['1', '1.0', '2', '10'] and indices.tolist() == [3, 2, -1, 0, 1]
    with pytest.raises(AamError, match="only the value 'a'"): class_targets(text_frame(day=['a', 'a']), 'day')

def test_categories_of_new_samples():
    vocabulary = category_vocabulary(text_frame(site=['b', 'a', np.nan]), ['site'])
    assert category_ids(text_frame(site=['a', 'b', 'c', np.nan]), vocabulary)[:, 0].tolist() == [1, 2, 0, 0]

# splits

@pytest.fixture
def study():
    "300 samples of 60 subjects of uneven size and three classes of uneven frequency, in random order."
    rng = np.random.default_rng(7)
    subject = pd.Series(rng.choice(60, size=300, p=rng.dirichlet(np.ones(60) * 2)).astype(str), index=[f'S{i}' for i in range(300)])
    site = pd.Series(rng.choice(['gut', 'palm', 'tongue'], size=300, p=[.7, .2, .1]), index=subject.index)
    return subject, site

@pytest.mark.parametrize('grouped', [False, True])
@pytest.mark.parametrize('stratified', [False, True])
@pytest.mark.parametrize('test_size', [.05, .2, .3, .5, .75])
def test_split(study, grouped, stratified, test_size):
    subject, site = study
    options = dict(test_size=test_size, groups=subject if grouped else None, classes=site if stratified else None)
    ids = list(subject.index)
    split = split_samples(ids, seed=3, **options)
    assert sorted(split.fit + split.stop) == sorted(ids) and split.test == []
    assert abs(len(split.stop) / 300 - test_size) < .02
    if grouped: assert not set(subject[split.fit]) & set(subject[split.stop])
    if stratified:
        shares = site[split.stop].value_counts() / site.value_counts()
        assert (shares - test_size).abs().max() < .06
    shuffled = list(np.random.default_rng(0).permutation(ids))
    assert split_samples(shuffled, seed=3, **options) == split
    assert split_samples(ids, seed=4, **options) != split

def test_values_in_the_order_of_the_ids(study):
    subject, site = study
    by_position = split_samples(list(subject.index), groups=subject.tolist(), classes=site.to_numpy())
    assert by_position == split_samples(list(subject.index), groups=subject.to_dict(), classes=site)

def test_one_huge_group():
    "A subject with most of the samples stays in the fit part."
    ids = [f'S{i:03}' for i in range(100)]
    split = split_samples(ids, groups=['huge'] * 80 + [f'g{i}' for i in range(20)])
    assert len(split.stop) == 20

@pytest.mark.parametrize('ids,options,message', [
    (['a'], {}, 'at least two'),
    (['a', 'b'], dict(groups=['g', 'g']), 'are in one group'),
    (['a', 'b', 'c'], dict(classes=['x', 'x', 'lonely']), "'lonely' has one sample"),
    (['a', 'b', 'c', 'd'], dict(classes=['x', 'x', 'y', 'y'], groups=['1', '2', '3', '3']), "'y' are in one group"),
    (['a', 'b', 'c', 'd'], dict(classes=['x', 'x', 'y', 'y'], test=['a']), "'x' has one sample"),
    (['a', 'b', 'c'], dict(train=['a', 'b'], val=['b']), '--train-samples and --val-samples have samples in common (1: b)'),
    (['a', 'b', 'c'], dict(val=['x']), '--val-samples: no ID of the list (1: x) is among the samples of the data (3: a, b, c)'),
    (['a', 'b', 'c'], dict(val=['a', 'b'], test=['c']), 'leave no sample to fit on'),
])
def test_splits_that_are_refused(ids, options, message):
    with pytest.raises(AamError) as error: split_samples(ids, **options)
    assert message in str(error.value)

def test_lists(caplog, tmp_path):
    caplog.set_level(logging.INFO, 'aam')
    ids = [f'S{i}' for i in range(10)]
    write_ids(ids[:5] + ['x', 'y'], tmp_path / 'train.txt')
    split = split_samples(ids, train=read_ids(tmp_path / 'train.txt'), val=ids[5:8])
    assert (split.fit, split.stop, split.test) == (ids[:5], ids[5:8], [])
    assert [r.getMessage() for r in caplog.records] == [
        '--train-samples: left out are IDs that the data lack (2: x, y), 5 remain', 'not used are samples that no list names (2: S8, S9)']
    assert split_samples(ids, train=ids[:6], test=ids[6:8]).stop == ids[8:]
    assert split_samples(ids, val=ids[:6], test=ids[6:8]).fit == ids[8:]
    split = split_samples(ids, train=ids[:8], test=ids[8:], test_size=.25)
    assert len(split.stop) == 2 and sorted(split.fit + split.stop) == ids[:8]

def warnings_of(caplog): return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

def test_lists_that_cut_through_groups(caplog):
    ids, groups = [f'S{i}' for i in range(12)], [str(i // 2) for i in range(12)]
    split_samples(ids, groups=groups, test=['S0', 'S2', 'S4', 'S5'])
    assert len(warnings_of(caplog)) in (1, 2) # both may be in fit, or one each in fit and stop
    assert all('in both the' in message and 'and the test part' in message for message in warnings_of(caplog))
    caplog.clear()
    split_samples(ids, groups=groups, train=ids[:3], val=ids[3:])
    assert warnings_of(caplog) == ['groups with samples in both the fit and the stop part (1: 1): scores there are not scores of new groups']
    caplog.clear()
    split_samples(ids, groups=groups, test=ids[:4])
    assert warnings_of(caplog) == []

def test_classes_that_lists_keep_from_fitting(caplog):
    split_samples(['a', 'b', 'c', 'd'], classes=['x', 'x', 'y', 'y'], train=['a', 'b'])
    assert warnings_of(caplog) == ['classes without a sample to fit on (1: y): they cannot be predicted']

def test_samples_without_a_group(caplog):
    ids = [f'S{i}' for i in range(10)]
    split = split_samples(ids, groups=['g'] * 5 + [np.nan] * 5, test_size=.3)
    assert len(split.stop) == 3 and not set(split.stop) & set(ids[:5])
    assert warnings_of(caplog) == ['samples without a value in the group column (5: S5, S6, S7, ...): each counts as a group of its own']
