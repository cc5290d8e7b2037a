"Guards of aam.table: both BIOM versions, damaged input, draws that belong to a sample."
import gzip
import logging
from pathlib import Path

import biom
import h5py
import numpy as np
import pytest
from scipy import sparse

from aam.config import AamError
from aam.table import (asv_samplings, choose_asvs, default_depth, draw_rng, make_table, rarefy, read_table, target_draw,
                       unifrac_draw, write_table)


def random_sequences(n, rng, length=30):
    return [''.join(row) for row in rng.choice(list('ACGT'), (n, length))]


def write_biom(path, counts, sample_ids, observation_ids):
    "`counts` is samples x observations."
    with h5py.File(path, 'w') as f:
        biom.Table(np.asarray(counts, float).T, observation_ids, sample_ids).to_hdf5(f, 'test')
    return path


@pytest.fixture
def community():
    rng = np.random.default_rng(0)
    counts = rng.negative_binomial(.2, .005, (30, 80))
    return counts, [f'{i:03}' for i in range(30)], random_sequences(80, rng)


def one_line(error):
    return '\n' not in str(error.value)


def test_json_equals_hdf5(tmp_path, community):
    counts, samples, sequences = community
    hdf5 = read_table(write_biom(tmp_path/'t.biom', counts, samples, sequences))
    text = biom.Table(counts.T.astype(float), sequences, samples).to_json('test')
    (tmp_path/'v1.biom').write_text(text)
    with gzip.open(tmp_path/'v1.biom.gz', 'wt') as f: f.write(text)
    for name in ['v1.biom', 'v1.biom.gz']:
        table = read_table(tmp_path/name)
        assert table.sample_ids == hdf5.sample_ids == samples
        assert table.sequences == hdf5.sequences
        assert (table.counts != hdf5.counts).nnz == 0
        assert (table.file_order == hdf5.file_order).all()


def test_reading_keeps_every_count(tmp_path, community):
    counts, samples, sequences = community
    table = read_table(write_biom(tmp_path/'t.biom', counts, samples, sequences))
    order = [sequences.index(s) for s in table.sequences]
    assert (table.counts.toarray() == counts[:, order]).all()
    assert (table.file_order == order).all() and table.counts.dtype == np.int64
    asvs, reads = table.row(3)
    assert (np.diff(asvs) > 0).all() and (table.counts[3].toarray()[0, asvs] == reads).all() and reads.sum() == counts[3].sum()


def test_spellings_empty_samples_and_empty_asvs(tmp_path, caplog):
    path = write_biom(tmp_path/'t.biom', [[1, 2, 0, 4], [0, 0, 0, 0]], ['full', 'empty'], ['acgu', 'ACGT', 'GGGG', 'AAAA'])
    with caplog.at_level(logging.WARNING, 'aam'): table = read_table(path)
    assert table.sequences == ['AAAA', 'ACGT'] and table.sample_ids == ['full', 'empty']
    assert (table.counts.toarray() == [[4, 3], [0, 0]]).all() and list(table.file_order) == [3, 0]
    assert [r.levelname for r in caplog.records] == ['WARNING'] and '1 of 4 ASVs repeat' in caplog.text


def test_written_table_reads_back_with_the_same_first_asvs(tmp_path, community):
    counts, samples, sequences = community
    table = read_table(write_biom(tmp_path/'t.biom', counts, samples, sequences))
    write_table(rarefy(table, 100, seed=1), tmp_path/'again.biom')
    again, rarefied = read_table(tmp_path/'again.biom'), rarefy(table, 100, seed=1)
    firsts = []
    for t in [again, rarefied]:
        asvs, reads = t.row(0)
        firsts.append([t.sequences[asvs[i]] for i in choose_asvs(reads, asvs, 5, 'first', t.file_order)])
    assert firsts[0] == firsts[1]
    assert not list(tmp_path.glob('*.part'))


@pytest.mark.parametrize('share', [0, .0001, .01, .3, .9, .999])
def test_truncated_file(tmp_path, community, share):
    whole = write_biom(tmp_path/'t.biom', *community).read_bytes()
    (tmp_path/'cut.biom').write_bytes(whole[:int(share*len(whole))])
    with pytest.raises(AamError, match='not a readable BIOM table') as error: read_table(tmp_path/'cut.biom')
    assert one_line(error)


@pytest.mark.parametrize('share', [.01, .5, .99])
def test_truncated_json(tmp_path, community, share):
    counts, samples, sequences = community
    text = biom.Table(counts.T.astype(float), sequences, samples).to_json('test')
    (tmp_path/'cut.biom').write_text(text[:int(share*len(text))])
    with pytest.raises(AamError) as error: read_table(tmp_path/'cut.biom')
    assert one_line(error)


def test_ids_that_are_no_sequences(tmp_path):
    md5 = [f'{i:032x}' for i in range(2**90, 2**90 + 5)]
    path = write_biom(tmp_path/'t.biom', np.ones((2, 5)), ['a', 'b'], md5)
    with pytest.raises(AamError, match='5 of 5 observation IDs are not DNA') as error: read_table(path)
    assert one_line(error) and all(m in str(error.value) for m in md5[:3]) and md5[3] not in str(error.value)


@pytest.mark.parametrize('value', [.5, -1, np.nan, np.inf])
def test_values_that_are_no_counts(tmp_path, value):
    path = write_biom(tmp_path/'t.biom', [[1, 2], [3, value]], ['a', 'b'], ['ACGT', 'AAAA'])
    with pytest.raises(AamError, match='raw counts') as error: read_table(path)
    assert one_line(error)


def test_other_input(tmp_path):
    (tmp_path/'notes.txt').write_text('no table\n')
    with h5py.File(tmp_path/'other.h5', 'w') as f: f['x'] = [1]
    write_biom(tmp_path/'zero.biom', np.zeros((2, 2)), ['a', 'b'], ['ACGT', 'AAAA'])
    for path in [tmp_path, tmp_path/'absent.biom', tmp_path/'notes.txt', tmp_path/'other.h5', tmp_path/'zero.biom']:
        with pytest.raises(AamError) as error: read_table(path)
        assert one_line(error)


def test_draws_do_not_depend_on_the_table(community):
    counts, samples, sequences = community
    rng = np.random.default_rng(1)
    rows, columns = rng.permutation(30)[:17], rng.permutation(80)
    table = make_table(counts, samples, sequences)
    other = make_table(counts[np.ix_(rows, columns)], [samples[i] for i in rows], [sequences[i] for i in columns])
    depth = int(np.median(table.reads))
    drawn, again = rarefy(table, depth, seed=42), rarefy(other, depth, seed=42)
    assert 0 < len(again) < 17
    for s in again.sample_ids:
        reads = dict(zip(table.sequences, drawn.select([s]).counts.toarray()[0]))
        other_reads = dict(zip(other.sequences, again.select([s]).counts.toarray()[0]))
        assert {k: v for k, v in reads.items() if v} == {k: v for k, v in other_reads.items() if v}
    assert (rarefy(table, depth, seed=42, epoch=1).counts != drawn.counts).nnz > 0
    assert (rarefy(table, depth, seed=43).counts != drawn.counts).nnz > 0


def test_chosen_asvs_do_not_depend_on_the_table(community):
    counts, samples, sequences = community
    columns = np.random.default_rng(1).permutation(80)
    tables = [make_table(counts, samples, sequences), make_table(counts[:, columns], samples, [sequences[i] for i in columns])]
    for how in ['abundance', 'random']:
        chosen = []
        for t in tables:
            asvs, reads = t.row(5)
            keep = choose_asvs(np.minimum(reads, 3), asvs, 10, how, t.file_order, draw_rng('asvs', 0, 0, '005'))
            chosen.append([t.sequences[i] for i in asvs[keep]])
        assert chosen[0] == chosen[1] == sorted(chosen[0]) and len(chosen[0]) == 10
    assert set(asv_samplings) == {'first', 'abundance', 'random'}


def test_views_at_the_edges():
    counts = np.array([3, 0, 1])
    for draw in [lambda d: unifrac_draw(counts, d, 0, 0, 's'), lambda d: target_draw(counts, d, 0, 0, 's', training=True)]:
        assert draw(1).sum() == 1 and (draw(100) == counts).all()
    empty = np.zeros(0, np.int64)
    assert len(unifrac_draw(empty, 10, 0, 0, 's')) == len(target_draw(empty, 10, 0, 0, 's', True)) == 0


@pytest.mark.parametrize('n', [1, 7, 10, 30, 70, 633])
def test_default_depth_is_the_largest_that_nine_in_ten_reach(n):
    reads = np.random.default_rng(n).integers(1, 6000, n)
    depth = default_depth(reads)
    assert 10*(reads >= depth).sum() >= 9*n
    assert depth == 5000 or 10*(reads >= depth + 1).sum() < 9*n


def test_sample_ids_that_occur_twice(tmp_path):
    path = write_biom(tmp_path/'t.biom', np.ones((2, 2)), ['a', 'b'], ['ACGT', 'AAAA'])
    with h5py.File(path, 'a') as f: f['sample/ids'][1] = 'a'
    with pytest.raises(AamError) as error: read_table(path)
    assert one_line(error)


# HDF5 files are read without biom; it is the oracle

def as_biom_reads(path):
    "The table in `path` as `biom.load_table` and `make_table` give it."
    loaded = biom.load_table(str(path))
    return make_table(loaded.matrix_data.T, loaded.ids(), list(loaded.ids('observation')))


def same_table(a, b):
    return (a.sample_ids == b.sample_ids and a.sequences == b.sequences and (a.file_order == b.file_order).all() and a.counts.shape == b.counts.shape
            and (a.counts != b.counts).nnz == 0 and a.counts.has_sorted_indices and a.counts.dtype == b.counts.dtype == np.int64)


@pytest.mark.parametrize('samples, asvs, filled', [(1, 1, 1), (1, 40, .5), (40, 1, .5), (30, 80, .01), (30, 80, .3), (7, 7, 1)])
@pytest.mark.parametrize('kind', ['f8', 'f4', 'i4', 'i8', 'u2'])
def test_hdf5_is_read_as_biom_reads_it(tmp_path, samples, asvs, filled, kind):
    rng = np.random.default_rng(samples + asvs)
    counts = rng.integers(1, 60_000, (samples, asvs)) * (rng.random((samples, asvs)) < filled)
    counts[0, 0], counts[1:2] = 3, 0 # some reads, and a sample without
    sequences = random_sequences(asvs, rng)
    path = write_biom(tmp_path/'t.biom', counts, [str(i) for i in rng.permutation(samples)], sequences)
    with h5py.File(path, 'a') as f:
        matrix = f['sample/matrix']
        values, starts, columns = matrix['data'][:].astype(kind), matrix['indptr'][:], matrix['indices'][:]
        for i in range(samples): # biom keeps the ASVs of a sample in any order
            row, order = slice(starts[i], starts[i + 1]), rng.permutation(starts[i + 1] - starts[i])
            values[row], columns[row] = values[row][order], columns[row][order]
        del matrix['data'], matrix['indices']
        matrix['data'], matrix['indices'] = values, columns
    table = read_table(path)
    assert same_table(table, as_biom_reads(path))
    assert (table.counts.toarray() == counts[:, table.file_order]).all()


def test_version_2_0_and_names_of_fixed_width(tmp_path, community):
    counts, samples, sequences = community
    path = write_biom(tmp_path/'t.biom', counts, [f'é{s}' for s in samples], sequences)
    table = read_table(path)
    with h5py.File(path, 'a') as f:
        for axis in 'sample', 'observation': # v2.0 has the matrix in the group itself
            for name in 'data', 'indices', 'indptr': f.move(f'{axis}/matrix/{name}', f'{axis}/{name}')
            del f[f'{axis}/matrix']
            ids = [i.encode() for i in f[f'{axis}/ids'].asstr()[:]]
            del f[f'{axis}/ids']
            f.create_dataset(f'{axis}/ids', data=np.array(ids, h5py.string_dtype('utf-8', max(map(len, ids)))))
    assert same_table(read_table(path), table) and table.sample_ids == [f'é{s}' for s in samples]


def damage(path, name, change):
    with h5py.File(path, 'a') as f:
        values = change(f[name][:])
        del f[name]
        f[name] = values


@pytest.mark.parametrize('name, change', [
    ('sample/matrix/indices', lambda x: x + 1), ('sample/matrix/indices', lambda x: x - 1), ('sample/matrix/indices', lambda x: x[:-1]), ('sample/matrix/indices', lambda x: x.astype(float)/2),
    ('sample/matrix/indptr', lambda x: x[:-1]), ('sample/matrix/indptr', lambda x: x[::-1].copy()), ('sample/matrix/indptr', lambda x: x + 1), ('sample/matrix/indptr', lambda x: x*2),
    ('sample/matrix/data', lambda x: x.astype('S9')), ('sample/matrix/data', lambda x: x.astype(complex)), ('sample/matrix/data', lambda x: x[:-2]),
    ('sample/ids', lambda x: x[:-1]), ('observation/ids', lambda x: x[:-1]), ('observation/ids', lambda x: np.repeat(x[:1], len(x))), ('sample/ids', lambda x: np.arange(len(x))),
    ('observation/ids', lambda x: np.append(x, b'ACGTACGTACGT'))])
def test_damaged_hdf5(tmp_path, community, name, change):
    path = write_biom(tmp_path/'t.biom', *community)
    damage(path, name, change)
    with pytest.raises(AamError, match='t.biom: not a readable BIOM table') as error: read_table(path)
    assert one_line(error)


@pytest.mark.parametrize('missing', ['sample', 'observation', 'sample/ids', 'sample/matrix/data'])
def test_incomplete_hdf5(tmp_path, community, missing):
    path = write_biom(tmp_path/'t.biom', *community)
    with h5py.File(path, 'a') as f: del f[missing]
    with pytest.raises(AamError, match='not a readable BIOM table') as error: read_table(path)
    assert one_line(error)


def test_real_tables_are_read_as_biom_reads_them():
    files = sorted((Path(__file__).resolve().parents[2]/'shared/data').glob('*/*.biom'))
    if not files: pytest.skip('the real tables are not here')
    for path in files: assert same_table(read_table(path), as_biom_reads(path)), path


def test_make_table_leaves_its_input_alone(community):
    counts, samples, sequences = community
    given = sparse.csr_matrix(counts[:, ::-1].astype(np.int64))
    before = given.copy()
    names = [*sequences[:-1], sequences[0]] # two columns of one sequence
    table = make_table(given, samples, names)
    assert (given.indices == before.indices).all() and (given.data == before.data).all() and (given.indptr == before.indptr).all()
    assert len(table.sequences) == len(sequences) - 1 and table.counts.sum() == counts.sum()
    assert (table.counts[:, table.sequences.index(sequences[0])].toarray()[:, 0] == counts[:, -1] + counts[:, 0]).all()


@pytest.mark.slow
def test_large_table_stays_sparse(tmp_path):
    "Memory in proportion to what the file holds, and no slower than biom and NumPy at the same; the benchmark checks that nothing is lost."
    from argparse import Namespace
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location('large_table', Path(__file__).resolve().parents[1]/'benchmarks/large_table.py')
    benchmark = module_from_spec(spec); spec.loader.exec_module(benchmark)
    size = Namespace(samples=20_000, asvs=100_000, richness=300)
    stages, found = benchmark.measure(['write', 'load', 'rival'], tmp_path/'table.biom', size)
    assert found[0] == found[1] == found[2]
    part = {(s['part'], s['stage']): s for s in stages}
    grown = max(part['load', name]['peak_gb'] for name in ('load', 'prepare', 'batch', 'rarefy')) - part['load', 'import']['peak_gb']
    held = (12*size.samples*size.richness + 450*size.asvs)/2**30 # reads and indices; sequences, tokens and 6-mers
    assert grown < 6*held < 0.05*8*size.samples*size.asvs/2**30 # the dense table would be twenty times larger than even that
    ours, rivals = (sum(part[p, name]['seconds'] for name in names) for p, names in (('load', ('load', 'prepare')), ('rival', ('load', 'np.unique'))))
    assert ours < 1.5*rivals
