"Guards of `aam unifrac`: scikit-bio and ssu as references, files of every kind, the draw that training sees, refusals."
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import sparse
from skbio import TreeNode
from skbio.diversity import alpha_diversity, beta_diversity

from aam.blocks import Block, block_distances, block_faith_pd, block_size
from aam.cli import main
from aam.config import AamError, EncoderOptions, InputOptions
from aam.data import SampleData, all_unifrac, view_draw
from aam.distances import unifrac
from aam.inputs import read_inputs, sample_data
from aam.table import read_table, write_table
from aam.unifrac import branch_proportions, generalized_unifrac, read_distances, read_record, read_tree, weighted_unnormalized_unifrac
from test_unifrac import names, random_newick

mouse_age = Path(__file__).parents[2]/'shared'/'data'/'mouse_age'
ssu = shutil.which('ssu', path=f"{os.environ.get('PATH', '')}:/usr/bin")
needs_ssu = pytest.mark.skipif(not ssu or not mouse_age.exists(), reason='needs ssu (Debian: unifrac-tools) and ../shared/data/mouse_age')


def whole(tables, branches, **how):
    n = tables[0].shape[0]
    found = np.full((n, n), np.nan)
    for rows, columns, d in block_distances(tables, branches, **how): found[rows, columns], found[columns, rows] = d, d.T
    return found


def generalized_by_hand(proportions, lengths, alpha):
    "Chen et al. 2012, pair by pair and branch by branch."
    found = np.zeros((len(proportions),)*2)
    for i, a in enumerate(proportions):
        for j, b in enumerate(proportions):
            terms = [(x, y, length) for x, y, length in zip(a, b, lengths) if x + y > 0]
            most = sum(length*(x + y)**alpha for x, y, length in terms)
            found[i, j] = sum(length*(x + y)**alpha * abs(x - y)/(x + y) for x, y, length in terms)/most if most else 0
    return found


@settings(max_examples=10, deadline=None)
@given(n_tips=st.integers(2, 40), n_samples=st.integers(2, 12), seed=st.integers(0, 10**6), extra=st.integers(0, 10), block=st.integers(1, 13), alpha=st.sampled_from([0, .3, .5, 1]))
def test_every_metric_is_that_of_scikit_bio(tmp_path_factory, n_tips, n_samples, seed, extra, block, alpha):
    "On trees with polytomies, branches of length 0 and tips that the table lacks, with identical samples, in blocks of any size."
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp('u')/'tree.nwk'
    tips = names(n_tips + extra)
    path.write_text(random_newick(tips, rng))
    counts = rng.poisson(rng.choice([.1, 1]), (n_samples, n_tips))*rng.integers(1, 50, (n_samples, n_tips))
    counts[0] = 1
    counts[-1] = counts[-2]
    order = rng.permutation(n_tips)
    taxa = [tips[i] for i in order]
    table, branches, tree = sparse.csr_matrix(counts[:, order]), read_tree(path, taxa), TreeNode.read(str(path))
    reference = dict(taxa=taxa, tree=tree)
    heights = np.array([sum(node.length or 0 for node in (tip, *tip.ancestors())) for tip in map(tree.find, taxa)])
    nowhere = counts[:, order] @ heights == 0 # no reads, or all on tips as high as the root
    def of_skbio(metric, **how):
        found = np.array(beta_diversity(metric, counts[:, order], **reference, **how).data)
        assert not np.isnan(found[~(nowhere[:, None] & nowhere)]).any()
        return np.where(nowhere[:, None] & nowhere, 0, found) # of two such samples scikit-bio divides 0 by 0
    for metric, wanted in dict(unweighted=of_skbio('unweighted_unifrac'), weighted_normalized=of_skbio('weighted_unifrac', normalized=True), weighted_unnormalized=of_skbio('weighted_unifrac')).items():
        ours = whole([table], branches, metric=metric, block=block)
        assert np.abs(ours - wanted).max() <= 1e-5 and (ours == ours.T).all() and (ours.diagonal() == 0).all(), metric
    np.testing.assert_allclose(block_faith_pd(Block(table, branches, dtype='float64')), alpha_diversity('faith_pd', counts[:, order], **reference), rtol=1e-5, atol=1e-6)
    proportions = branch_proportions(table, branches)
    by_hand = generalized_by_hand(proportions, branches.lengths, alpha)
    assert np.abs(whole([table], branches, metric='generalized', alpha=alpha, block=block) - by_hand).max() <= 1e-5
    assert np.abs(generalized_unifrac(proportions, branches.lengths, alpha) - by_hand).max() <= 1e-5
    assert np.abs(weighted_unnormalized_unifrac(proportions, branches.lengths) - of_skbio('weighted_unifrac')).max() <= 1e-5


def random_community(n_samples, n_tips, seed=0):
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix(rng.poisson(.2, (n_samples, n_tips))*rng.integers(1, 90, (n_samples, n_tips)))


@pytest.mark.parametrize('metric', ['unweighted', 'weighted_normalized', 'weighted_unnormalized', 'generalized'])
def test_odd_blocks_agree(tmp_path, metric):
    "More samples than a tile, more branches than a chunk."
    tips = [''.join('ACGT'[i >> 2*b & 3] for b in range(6)) for i in range(900)]
    (tmp_path/'tree.nwk').write_text(random_newick(tips, np.random.default_rng(0), longest=3))
    branches, counts = read_tree(tmp_path/'tree.nwk', tips), random_community(301, 900)
    one = whole([counts], branches, metric=metric, alpha=.5, block=301)
    assert len(branches.lengths) > 1024
    for block in 1, 77, 150:
        if block > 1: assert np.abs(whole([counts], branches, metric=metric, alpha=.5, block=block) - one).max() <= 1e-5
        else: assert np.abs(whole([counts[:20]], branches, metric=metric, alpha=.5, block=1) - one[:20, :20]).max() <= 1e-5
    double = whole([counts], branches, metric=metric, alpha=.5, block=301, dtype='float64')
    assert np.abs(double - one).max() <= 1e-5


def test_blocks_fit_into_the_memory_given():
    for samples, tips, memory in (500, 5000, 4), (307_000, 400_000, 4), (10_000, 50_000, .5), (10, 10, .01):
        n = block_size(samples, tips, memory)
        assert 1 <= n <= samples
        assert n == 1 or n*(12*(tips + 1) + 32*1024) + 36*n*n <= memory*2**30 * 1.01


# --- ssu ---

@needs_ssu
@pytest.mark.parametrize('metric, alpha', [('unweighted', None), ('weighted_normalized', None), ('weighted_unnormalized', None), ('generalized', 0), ('generalized', .5), ('generalized', 1)])
def test_mouse_age_is_that_of_ssu(tmp_path, metric, alpha):
    some = read_table(mouse_age/'table.biom')
    write_table(some.select(some.sample_ids[:120]), tmp_path/'some.biom')
    command = [ssu, '-i', tmp_path/'some.biom', '-t', mouse_age/'tree.nwk', '-m', f'{metric}_fp64', '-o', tmp_path/'ssu.h5', '--format', 'hdf5_fp64', '--pcoa', '0']
    subprocess.run([*command, *([] if alpha is None else ['-a', str(alpha)])], check=True, capture_output=True)
    unifrac(table=tmp_path/'some.biom', tree=mouse_age/'tree.nwk', output=tmp_path/'aam.h5', metric=metric, **({} if alpha is None else dict(alpha=float(alpha))))
    theirs, ours = read_distances(tmp_path/'ssu.h5'), read_distances(tmp_path/'aam.h5')
    assert len(ours.sample_ids) == 120 and np.abs(ours.align(theirs.sample_ids) - theirs.matrix).max() <= 1e-5


@needs_ssu
def test_files_of_ssu_and_aam_are_laid_out_alike(tmp_path, aam):
    "The same datasets, of the same types, with the same IDs and numbers."
    subprocess.run([ssu, '-i', mouse_age/'table.biom', '-t', mouse_age/'tree.nwk', '-m', 'unweighted', '-o', tmp_path/'ssu.h5', '--format', 'hdf5', '--pcoa', '0'], check=True, capture_output=True)
    done = aam('unifrac', '--table', mouse_age/'table.biom', '--tree', mouse_age/'tree.nwk', '--output', tmp_path/'aam.h5')
    assert 'unweighted of 837 samples and 858 ASVs' in done.err
    with h5py.File(tmp_path/'ssu.h5') as theirs, h5py.File(tmp_path/'aam.h5') as ours:
        assert set(ours) == {'order', 'matrix', 'format', 'version'} <= set(theirs)
        for name in ours:
            assert ours[name].shape == theirs[name].shape and ours[name].dtype == theirs[name].dtype, name
            assert ours[name].chunks is None and ours[name].compression is None
        assert (ours['order'][:] == theirs['order'][:]).all() and (ours['format'][:] == theirs['format'][:]).all() and (ours['version'][:] == theirs['version'][:]).all()
        assert np.abs(ours['matrix'][:] - theirs['matrix'][:]).max() <= 1e-5


# --- the command ---

@pytest.fixture
def files(survey):
    return dict(table=survey/'table.biom', tree=survey/'tree.nwk')


@pytest.mark.parametrize('end', ['.h5', '.npy', '.tsv', '.csv', '.qza'])
@pytest.mark.parametrize('dtype', ['float32', 'float64', 'float16'])
def test_every_kind_of_file_is_read_back(tmp_path, files, end, dtype):
    unifrac(**files, output=tmp_path/f'd{end}', dtype=dtype, metric='weighted_normalized')
    table = read_table(files['table'])
    read = read_distances(tmp_path/f'd{end}') # with its own IDs
    wanted = whole([table.counts], read_tree(files['tree'], table.sequences), metric='weighted_normalized')
    assert np.abs(read.align(table.sample_ids) - wanted).max() <= (1e-3 if dtype == 'float16' else 1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f'd{end}', *(['d.ids.txt'] if end == '.npy' else []), *([f'd{end}.json'] if end != '.h5' else [])])
    assert read_record(tmp_path/f'd{end}') == dict(metric='weighted_normalized')
    if end == '.npy': assert np.load(tmp_path/'d.npy').dtype == dtype
    if end == '.qza':
        with zipfile.ZipFile(tmp_path/'d.qza') as archive: folder, = {n.split('/')[0] for n in archive.namelist()}
        assert len(folder) == 36
    if end == '.h5':
        with h5py.File(tmp_path/'d.h5') as f: assert f['matrix'].dtype == dtype


def test_little_memory_gives_the_same(tmp_path, files):
    for name, memory in ('a', 4.), ('b', .01): unifrac(**files, output=tmp_path/f'{name}.npy', memory=memory)
    assert np.abs(np.load(tmp_path/'a.npy') - np.load(tmp_path/'b.npy')).max() <= 1e-6


@pytest.mark.parametrize('end', ['.h5', '.tsv'])
def test_the_draw_is_that_of_training(tmp_path, files, end):
    "Distances, rarefied table and hash are those of the UniFrac view with a matrix; the view has the reads of the rarefied table."
    out = tmp_path/f'd{end}'
    unifrac(**files, output=out, rarefy_depth=400, rarefy_seed=7)
    drawn = tmp_path/f'd{end}.rarefied.biom'
    if end == '.h5':
        with h5py.File(out) as f: noted = dict(f.attrs)
    else: noted = json.loads(Path(f'{out}.json').read_text())
    assert noted['rarefied_table'] == drawn.name and noted['rarefied_sha256'] == hashlib.sha256(drawn.read_bytes()).hexdigest()
    assert (noted['rarefy_depth'], noted['rarefy_seed']) == (400, 7)
    read, table = read_distances(out), read_table(files['table'])
    deep = [s for s, n in zip(table.sample_ids, table.reads) if n >= 400]
    assert sorted(read.sample_ids) == sorted(deep)
    data = SampleData(table.select(deep), 400, rarefy_seed=7, branches=read_tree(files['tree'], table.sequences))
    wanted = all_unifrac(data, range(len(deep)))
    ours = read.align(deep)
    np.fill_diagonal(ours, np.nan)
    assert np.nanmax(np.abs(ours - wanted)) <= 1e-5 and np.isfinite(wanted).any()

    ids = tmp_path/'deep.biom'
    write_table(table.select(deep), ids)
    options = InputOptions(table=ids, unifrac_matrix=out, rarefy_seed=1) # another seed: the reads come from the file
    found = sample_data(read_inputs(options), options, EncoderOptions(), 0)
    for i in range(len(deep)):
        seen, sample = view_draw(found, 'unifrac', i, 5, True), found.table.sample_ids[i]
        asvs, counts = read_table(drawn).row(read_table(drawn).sample_ids.index(sample))
        assert [found.table.sequences[a] for a in seen.asvs] == [read_table(drawn).sequences[a] for a in asvs] and (seen.counts == counts).all()


def test_training_knows_the_rarefied_table(tmp_path, aam, files, caplog, monkeypatch):
    "With it, with another one in its place, and without it."
    table = read_table(files['table'])
    unifrac(**files, output=tmp_path/'d.h5', rarefy_depth=int(table.reads.min()))
    words = [str(w) for w in ['pretrain', '--table', files['table'], '--unifrac-matrix', tmp_path/'d.h5', *aam.tiny, '--epochs', 1, '--output-dir', tmp_path/'run']]
    done = aam(*words)
    assert 'UniFrac is about the reads in the rarefied table beside d.h5' in done.out + done.err
    drawn = tmp_path/'d.h5.rarefied.biom'
    write_table(table, drawn)
    done = aam(*words, '--overwrite', fails=True)
    assert done.returncode == 2 and done.err.splitlines()[-1] == f'aam: {drawn}: not the table that d.h5 was computed from, or changed since; restore it, compute both again with aam unifrac, or remove it'
    drawn.unlink()
    options = InputOptions(table=files['table'], unifrac_matrix=tmp_path/'d.h5')
    caplog.clear()
    monkeypatch.setattr(logging.getLogger('aam'), 'propagate', True) # commands turn it off
    with caplog.at_level('WARNING', 'aam'): assert read_inputs(options).drawn is None
    assert [m for m in caplog.messages if 'rarefied' in m] == ['d.h5: its rarefied table d.h5.rarefied.biom is not beside it; reads are drawn anew, and are not quite those that it is about']


def test_the_depth_is_that_of_the_file(tmp_path, aam, files):
    "With one draw, and with the mean of several; samples that the matrix lacks for their depth are dropped without further options."
    reads = read_table(files['table']).reads
    depth = int(np.sort(reads)[4]) # four samples have fewer
    for draws in 1, 2:
        unifrac(**files, output=tmp_path/'d.h5', rarefy_depth=depth, draws=draws, overwrite=True)
        words = [str(w) for w in ['pretrain', '--table', files['table'], '--unifrac-matrix', tmp_path/'d.h5', *aam.tiny, '--epochs', 1, '--output-dir', tmp_path/'run', '--overwrite']]
        done = aam(*words)
        said = (done.out + done.err).splitlines()
        assert f'--rarefy-depth {depth}, as d.h5 was computed from so many reads per sample' in said
        assert [line for line in said if f'4 of {len(reads)} samples dropped: fewer reads than --rarefy-depth {depth}' in line]
        assert 'ready to train: 0 errors' in aam('check', '--table', files['table'], '--unifrac-matrix', tmp_path/'d.h5', '--device', 'cpu').out
        assert 'ready to train: 0 errors' in aam('check', '--table', files['table'], '--unifrac-matrix', tmp_path/'d.h5', '--rarefy-depth', depth, '--device', 'cpu').out
        for command in words, ['check', '--table', files['table'], '--unifrac-matrix', tmp_path/'d.h5']:
            done = aam(*command, '--rarefy-depth', 100, fails=True)
            assert done.returncode == 2 and done.err.splitlines()[-1] == f'aam: --rarefy-depth 100: d.h5 was computed from {depth} reads per sample; leave it out, or compute the file again with aam unifrac --rarefy-depth 100'


@pytest.mark.parametrize('end', ['.h5', '.tsv'])
@pytest.mark.parametrize('made, asked, line', [
    (['weighted_normalized'], ['weighted'], None),
    (['generalized', '--alpha', .5], ['generalized', '--unifrac-alpha', .5], None),
    (['weighted_normalized'], ['unweighted'], 'holds weighted_normalized and --unifrac-metric is unweighted; say --unifrac-metric weighted, or compute it again with aam unifrac --metric unweighted'),
    (['unweighted'], ['weighted'], 'holds unweighted and --unifrac-metric is weighted; say --unifrac-metric unweighted, or compute it again with aam unifrac --metric weighted_normalized'),
    (['generalized', '--alpha', .5], ['generalized'], 'was computed with alpha 0.5 and --unifrac-alpha is 1; say --unifrac-alpha 0.5, or compute it again with aam unifrac --alpha 1'),
])
def test_another_metric_than_the_file_holds(tmp_path, aam, files, end, made, asked, line):
    out = tmp_path/f'd{end}'
    aam('unifrac', '--table', files['table'], '--tree', files['tree'], '--output', out, '--metric', *made)
    words = ['--table', files['table'], '--unifrac-matrix', out, '--unifrac-metric', *asked]
    checked = aam('check', *words, '--device', 'cpu', fails=line is not None)
    assert [s for s in checked.out.splitlines() if s.startswith('error')] == ([] if line is None else [f'error: d{end}: {line}']) and checked.returncode == int(line is not None)
    done = aam('pretrain', *words, *aam.tiny, '--epochs', 1, '--output-dir', tmp_path/'run', fails=line is not None)
    if line: assert done.returncode == 2 and done.err.splitlines()[-1] == f'aam: --unifrac-matrix d{end}: {line}' and not (tmp_path/'run').exists()


@pytest.mark.parametrize('scale, line', [(1., None), (1e5, 'the largest distance is 3.07e+05, and float16 holds at most 65504; choose float32'), (1e-5, 'the largest distance is 3.07e-05, and float16 holds numbers under 0.00006 with few digits or none; choose float32')])
def test_distances_that_float16_cannot_hold(tmp_path, aam, scale, line):
    files = small(tmp_path, f'((AAAA:{scale},AAAC:{2*scale}):{scale},(AAAG:{scale},AAAT:{scale}):{2*scale});')
    words = ['unifrac', '--table', files['table'], '--tree', files['tree'], '--output', tmp_path/'d.npy', '--metric', 'weighted_unnormalized', '--dtype']
    done = aam(*words, 'float16', fails=line is not None)
    if line: assert done.returncode == 2 and done.err.splitlines()[-1] == f'aam: --dtype float16: {line}' and not (tmp_path/'d.npy').exists()
    else: assert np.isfinite(np.load(tmp_path/'d.npy')).all()


def test_messages_are_those_of_other_commands(tmp_path, aam):
    "Warnings are called so, and what was done is said."
    files = small(tmp_path, '(AAAA:1,AAAC:2,AAAG:3);', ((3, 1, 0), (0, 5, 2), (0, 0, 0)))
    done = aam('unifrac', '--table', files['table'], '--tree', files['tree'], '--output', tmp_path/'d.npy', '--root-midpoint')
    said = done.err.splitlines()
    assert said[0].endswith('tree.nwk: rooted at its midpoint') and said[1] == 'warning: 1 of 3 samples dropped: no reads (s2)'
    assert said[-1].startswith(f"{tmp_path/'d.npy'}: unweighted of 2 samples and 3 ASVs, ") and done.out == ''


def test_mean_of_draws(tmp_path, files):
    "The mean of single draws; no table is written, since it would be that of one draw."
    from aam.table import rarefy
    unifrac(**files, output=tmp_path/'mean.npy', rarefy_depth=200, draws=3, dtype='float64')
    table = read_table(files['table'])
    branches = read_tree(files['tree'], table.sequences)
    single = [whole([rarefy(table, 200, 42, k).counts], branches) for k in range(3)]
    assert np.abs(np.load(tmp_path/'mean.npy') - np.mean(single, 0)).max() <= 1e-6 and np.abs(single[0] - single[1]).max() > 1e-3
    assert sorted(p.name for p in tmp_path.iterdir()) == ['mean.ids.txt', 'mean.npy', 'mean.npy.json']
    assert read_record(tmp_path/'mean.npy') == dict(metric='unweighted', rarefy_depth=200, rarefy_seed=42, draws=3)


def test_faith_pd(tmp_path, files):
    unifrac(**files, output=tmp_path/'f.tsv', metric='faith_pd')
    table, tree = read_table(files['table']), TreeNode.read(str(files['tree']), convert_underscores=False)
    wanted = alpha_diversity('faith_pd', table.counts.toarray(), table.sample_ids, taxa=table.sequences, tree=tree)
    lines = [line.split('\t') for line in (tmp_path/'f.tsv').read_text().splitlines()]
    assert lines[0] == ['sample_id', 'faith_pd'] and [line[0] for line in lines[1:]] == table.sample_ids
    np.testing.assert_allclose([float(line[1]) for line in lines[1:]], wanted, rtol=1e-5)


def small(folder, newick='((AAAA:1,AAAC:2):1,(AAAG:1,AAAT:1):2);', counts=((3, 1, 0), (0, 5, 2), (9, 0, 1)), ids=('AAAA', 'AAAC', 'AAAG')):
    "A table of three samples and a tree."
    import biom
    (folder/'tree.nwk').write_text(newick)
    with h5py.File(folder/'t.biom', 'w') as f: biom.Table(np.array(counts).T, list(ids), [f's{i}' for i in range(len(counts))]).to_hdf5(f, 'test')
    return dict(table=folder/'t.biom', tree=folder/'tree.nwk')


def test_unrooted_trees(tmp_path):
    files = small(tmp_path, '(AAAA:1,AAAC:2,(AAAG:5,AAAT:1):2);')
    with pytest.raises(AamError) as error: unifrac(**files, output=tmp_path/'d.h5')
    assert str(error.value) == (f"{tmp_path/'tree.nwk'}: the tree is unrooted (3 branches at its root); root it, for example at its midpoint "
                                '(qiime phylogeny midpoint-root; aam unifrac --root-midpoint)')
    unifrac(**files, output=tmp_path/'d.h5', root_midpoint=True)
    rooted = TreeNode.read(str(tmp_path/'tree.nwk')).root_at_midpoint()
    table = read_table(files['table'])
    wanted = beta_diversity('unweighted_unifrac', table.counts.toarray(), taxa=table.sequences, tree=rooted).data
    assert np.abs(read_distances(tmp_path/'d.h5').matrix - wanted).max() <= 1e-6


@pytest.mark.parametrize('kind', ['Rooted', 'Unrooted'])
def test_trees_of_qiime(tmp_path, kind):
    newick = '(AAAA:1,AAAC:2,(AAAG:4,AAAT:1):2);' if kind == 'Unrooted' else '((AAAA:1,AAAC:2):1,AAAG:4);'
    files = small(tmp_path, newick)
    with zipfile.ZipFile(tmp_path/'tree.qza', 'w') as archive:
        archive.writestr('u/VERSION', 'QIIME 2\narchive: 5\n')
        archive.writestr('u/metadata.yaml', f'uuid: u\ntype: Phylogeny[{kind}]\nformat: NewickDirectoryFormat\n')
        archive.writestr('u/data/tree.nwk', newick)
    unifrac(**files, output=tmp_path/'a.h5', root_midpoint=True)
    unifrac(**files | dict(tree=tmp_path/'tree.qza'), output=tmp_path/'b.h5', root_midpoint=True)
    assert (read_distances(tmp_path/'a.h5').matrix == read_distances(tmp_path/'b.h5').matrix).all()
    if kind == 'Unrooted':
        with pytest.raises(AamError, match='root it'): unifrac(**files | dict(tree=tmp_path/'tree.qza'), output=tmp_path/'c.h5')


def test_hashed_ids(tmp_path):
    names_ = [hashlib.md5(s.encode()).hexdigest() for s in ('AAAA', 'AAAC', 'AAAG')]
    plain, hashed = tmp_path/'plain', tmp_path/'hashed'
    for folder in plain, hashed: folder.mkdir()
    a, newick = small(plain), '((AAAA:1,AAAC:2):1,(AAAG:1,AAAT:1):2);'
    for name, s in zip(names_, ('AAAA', 'AAAC', 'AAAG')): newick = newick.replace(s, name)
    b = small(hashed, newick, ids=names_)
    (tmp_path/'s.fasta').write_text(''.join(f'>{n}\n{s}\n' for n, s in zip(names_, ('AAAA', 'AAAC', 'AAAG'))))
    unifrac(**a, output=tmp_path/'a.h5')
    unifrac(**b, output=tmp_path/'b.h5', sequences=tmp_path/'s.fasta')
    assert (read_distances(tmp_path/'a.h5').matrix == read_distances(tmp_path/'b.h5').matrix).all()


def test_samples_without_reads_are_dropped(tmp_path, aam):
    files = small(tmp_path, counts=((3, 1, 0), (0, 0, 0), (9, 0, 1)))
    done = aam('unifrac', '--table', files['table'], '--tree', files['tree'], '--output', tmp_path/'d.tsv')
    assert '1 of 3 samples dropped: no reads (s1)' in done.err and 'unweighted of 2 samples and 3 ASVs' in done.err
    assert read_distances(tmp_path/'d.tsv').sample_ids == ['s0', 's2']


def test_nothing_is_overwritten_or_left_behind(tmp_path, monkeypatch):
    files = small(tmp_path)
    out = tmp_path/'d.npy'
    unifrac(**files, output=out, rarefy_depth=4)
    written = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(written) == {'t.biom', 'tree.nwk', 'd.npy', 'd.ids.txt', 'd.npy.json', 'd.npy.rarefied.biom'}
    with pytest.raises(AamError) as error: unifrac(**files, output=out)
    assert str(error.value) == f'--output {out}: d.npy is there already; choose another name or add --overwrite'
    import aam.blocks
    def broken(*args, **how):
        yield slice(0, 1), slice(0, 1), np.zeros((1, 1))
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt): # the run is cut off half-way
        patch.setattr(aam.blocks, 'block_distances', broken)
        unifrac(**files, output=out, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == written
    unifrac(**files, output=out, overwrite=True) # the record of the earlier draw goes with it
    assert {p.name for p in tmp_path.iterdir()} == {'t.biom', 'tree.nwk', 'd.npy', 'd.ids.txt', 'd.npy.json'} and read_record(out) == dict(metric='unweighted')


@pytest.mark.parametrize('words, line', [
    (['--output', 'd.txt'], '--output d.txt: not a kind of file for --metric unweighted; choose one of .h5, .hdf5, .npy, .tsv, .csv, .qza'),
    (['--output', 'd.h5', '--metric', 'faith_pd'], '--output d.h5: not a kind of file for --metric faith_pd; choose one of .tsv, .csv'),
    (['--output', 'd.h5', '--alpha', '0.5'], '--alpha 0.5: belongs to --metric generalized, not unweighted; leave it out or change the metric'),
    (['--output', 'd.h5', '--metric', 'generalized', '--alpha', '2'], '--alpha 2.0: must be between 0 and 1'),
    (['--output', 'd.h5', '--metric', 'weighted'], "argument --metric: invalid choice: 'weighted' (choose from 'unweighted', 'weighted_normalized', 'weighted_unnormalized', 'generalized', 'faith_pd') (see aam unifrac --help)"),
    (['--output', 'd.tsv', '--metric', 'faith_pd', '--dtype', 'float16'], '--dtype float16: belongs to distance matrices, not to --metric faith_pd; leave it out'),
    (['--output', 'd.h5', '--draws', '3'], '--draws 3: does nothing without --rarefy-depth; give a depth or leave it out'),
    (['--output', 'd.h5', '--rarefy-seed', '3'], '--rarefy-seed 3: does nothing without --rarefy-depth; give a depth or leave it out'),
    (['--output', 'none/d.h5'], '--output none/d.h5: no such folder; make it first'),
    (['--output', 'd.h5', '--rarefy-depth', '100'], 'rarefaction depth 100: no sample has as many reads; choose at most 10'),
    (['--output', 'd.h5', '--rarefy-depth', '10'], '--table t.biom: 1 sample left; distances need two, give more samples or a lower --rarefy-depth'),
    (['--output', 'd.h5', '--tree', 'gone.nwk'], '--tree gone.nwk: no such file'),
    (['--output', 'd.h5', '--tree', 'other.nwk'], 'other.nwk: 1 of 3 ASVs are not tips of the tree (AAAG...); build the tree from the sequences of this table, '
                                                  'filter the table to the tips of the tree, or give --sequences if its tips have other names'),
    (['--output', 'd.h5', '--device', 'cuda'], '--device cuda: PyTorch finds no GPU here; use --device cpu or auto'),
])
def test_refusals(tmp_path, monkeypatch, capsys, words, line):
    import torch
    if 'cuda' in words and torch.cuda.is_available(): pytest.skip('there is a GPU')
    small(tmp_path)
    (tmp_path/'other.nwk').write_text('((AAAA:1,AAAC:2):1,AAAT:1);')
    before = sorted(tmp_path.iterdir())
    words = words if '--tree' in words else ['--tree', 'tree.nwk', *words]
    monkeypatch.chdir(tmp_path)
    assert main(['unifrac', '--table', 't.biom', *words]) == 2
    out, err = capsys.readouterr()
    assert out == '' and [s for s in err.splitlines() if 'dropped' not in s] == [f'aam: {line}']
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize('device', ['cpu:0', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('metric', ['unweighted', 'weighted_normalized', 'weighted_unnormalized', 'generalized'])
def test_tensors_give_what_arrays_give(tmp_path, monkeypatch, metric, device):
    "The code that runs on a GPU, there and (as cpu:0, which is not taken for the CPU of NumPy) here."
    from aam import blocks
    monkeypatch.setitem(blocks.chunk, 'cpu:0', 500)
    tips = [''.join('ACGT'[i >> 2*b & 3] for b in range(5)) for i in range(400)]
    (tmp_path/'tree.nwk').write_text(random_newick(tips, np.random.default_rng(0), longest=3))
    branches, counts = read_tree(tmp_path/'tree.nwk', tips), random_community(90, 400)
    for alpha in (0., .5) if metric == 'generalized' else (1.,):
        one, other = (whole([counts], branches, metric=metric, alpha=alpha, block=40, device=d) for d in ('cpu', device))
        assert np.abs(one - other).max() <= 1e-5
    pd = [block_faith_pd(Block(counts, branches, d, 'float64')) for d in ('cpu', device)]
    np.testing.assert_allclose(*pd, rtol=1e-6)


def test_a_run_on_a_cpu_loads_no_pytorch(tmp_path, files):
    "Nor scikit-bio, pandas or SciPy's statistics: they would take most of the time of a small table."
    words = ['unifrac', '--table', files['table'], '--tree', files['tree'], '--output', tmp_path/'d.h5', '--device', 'cpu', '--metric', 'weighted_normalized']
    code = f'import sys; from aam.cli import main; assert main({[str(w) for w in words]}) == 0; print(sorted({{"torch", "skbio", "pandas", "scipy.stats", "scipy.spatial"}} & set(sys.modules)))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == '[]', done.stdout + done.stderr
