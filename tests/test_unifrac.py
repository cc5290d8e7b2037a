"Guards of aam.unifrac: scikit-bio as the reference, distance files joined by ID."
import gzip
import io
import logging
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import sparse
from skbio import TreeNode
from skbio.diversity import alpha_diversity, beta_diversity

from aam.config import AamError
from aam.table import make_table, rarefy, read_table
from aam.unifrac import (Distances, StoredMatrix, branch_presence, faith_pd, make_branches, parse_newick, read_distances, read_tree,
                         unifrac_distances, unweighted_unifrac, write_distances)

data = Path(__file__).parents[2]/'shared'/'data'


def one_line(error):
    return '\n' not in str(error.value)


def names(n):
    "n different sequences."
    return [''.join('ACGT'[i >> 2*b & 3] for b in range(4)) for i in range(n)]


def random_newick(tips, rng, longest=5):
    "A rooted tree with polytomies below its root and branches of length 0."
    def length(): return rng.choice([0, .1, 1, rng.exponential()])
    trees = [f'{tips[0]}:0.5'] + [f'{t}:{length():.4f}' for t in tips[1:]]
    while len(trees) > 2:
        rng.shuffle(trees)
        k = min(int(rng.integers(2, longest + 1)), len(trees) - 1)
        trees = [f"({','.join(trees[:k])}):{length():.4f}", *trees[k:]]
    return f"({','.join(trees)});"


def community(tmp_path, n_tips, n_samples, seed, extra=0):
    "A table, its branches and the tree, which has `extra` more tips than the table."
    rng = np.random.default_rng(seed)
    tips = names(n_tips + extra)
    newick = random_newick(tips, rng)
    (tmp_path/'tree.nwk').write_text(newick)
    counts = rng.poisson(rng.choice([.1, 1]), (n_samples, n_tips))
    counts[0] = 1 # every ASV is in the table
    counts[-1] = counts[-2]
    table = make_table(counts, [f's{i}' for i in range(n_samples)], tips[:n_tips])
    return table, read_tree(tmp_path/'tree.nwk', table.sequences), TreeNode.read(io.StringIO(newick))


@settings(max_examples=60, deadline=None)
@given(n_tips=st.integers(2, 40), n_samples=st.integers(2, 12), seed=st.integers(0, 10**6), extra=st.integers(0, 10))
def test_unifrac_is_that_of_scikit_bio(tmp_path_factory, n_tips, n_samples, seed, extra):
    table, branches, tree = community(tmp_path_factory.mktemp('u'), n_tips, n_samples, seed, extra)
    counts, reference = table.counts.toarray(), dict(taxa=table.sequences, tree=tree)
    ours = unifrac_distances(table.counts, branches)
    assert np.abs(ours - beta_diversity('unweighted_unifrac', counts, table.sample_ids, **reference).data).max() <= 1e-6
    presence = branch_presence(table.counts, branches)
    np.testing.assert_allclose(faith_pd(presence, branches.lengths), alpha_diversity('faith_pd', counts, **reference), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(n_tips=st.integers(2, 40), n_samples=st.integers(2, 12), seed=st.integers(0, 10**6))
def test_unifrac_is_a_distance(tmp_path_factory, n_tips, n_samples, seed):
    table, branches, _ = community(tmp_path_factory.mktemp('u'), n_tips, n_samples, seed)
    presence = branch_presence(table.counts, branches)
    d = unweighted_unifrac(presence, branches.lengths)
    assert (d >= 0).all() and (d <= 1).all() and (d.diagonal() == 0).all() and np.abs(d - d.T).max() <= 1e-6
    assert d[-1, -2] <= 1e-6 # the two are the same
    assert (d[:, None] <= d[:, :, None].transpose(0, 2, 1) + d[None] + 1e-5).all() # triangle inequality
    deeper = branch_presence(table.counts * 7, branches)
    assert (deeper == presence).all() # reads do not matter, presence does


def test_a_batch_is_part_of_the_whole(tmp_path):
    table, branches, _ = community(tmp_path, 60, 20, seed=1, extra=30)
    whole, ids = unifrac_distances(table.counts, branches), ['s7', 's19', 's3']
    batch, rows = unifrac_distances(table.select(ids).counts, branches), [table.sample_ids.index(s) for s in ids]
    assert np.abs(whole[np.ix_(rows, rows)] - batch).max() <= 1e-6


def test_order_of_asvs_does_not_matter(tmp_path):
    table, branches, _ = community(tmp_path, 30, 9, seed=2)
    order = np.random.default_rng(0).permutation(30)
    again = read_tree(tmp_path/'tree.nwk', [table.sequences[i] for i in order])
    a = unweighted_unifrac(branch_presence(table.counts, branches), branches.lengths)
    b = unweighted_unifrac(branch_presence(sparse.csr_matrix(table.counts[:, order]), again), again.lengths)
    assert np.abs(a - b).max() <= 1e-6


def test_a_gzipped_tree(tmp_path):
    table, branches, _ = community(tmp_path, 20, 3, seed=3)
    (tmp_path/'tree.nwk.gz').write_bytes(gzip.compress((tmp_path/'tree.nwk').read_bytes()))
    again = read_tree(tmp_path/'tree.nwk.gz', table.sequences)
    assert (again.start == branches.start).all() and (again.lengths == branches.lengths).all()


def test_a_deep_tree_does_not_exhaust_the_stack(tmp_path):
    rng = np.random.default_rng(0)
    tips = sorted({''.join(s) for s in rng.choice(list('ACGT'), (3000, 12))})
    newick = f'{tips[0]}:1'
    for t in tips[1:]: newick = f'({newick},{t}:1):1'
    (tmp_path/'tree.nwk').write_text(newick + ';')
    assert len(read_tree(tmp_path/'tree.nwk', tips[:10]).place) == 10


def test_the_work_does_not_grow_with_depth():
    "A caterpillar of 50,000 tips has 1.25 billion pairs of a branch and a tip below it."
    n = 50_000
    nodes = np.arange(2*n - 1) # tip, tip, fork, tip, fork, ...
    parents = np.where(nodes == 0, 2, np.where(nodes % 2 == 1, nodes + 1, nodes + 2))
    parents[-1] = -1
    begun = time.process_time()
    branches = make_branches(np.r_[0, np.arange(1, 2*n - 1, 2)], parents, (parents >= 0)*1.)
    assert len(branches.lengths) == 2*n - 2
    counts = sparse.csr_matrix(([3, 1, 2, 2], [0, 9, 0, n - 1], [0, 2, 4]), (2, n)) # the last tip hangs from the root
    assert unifrac_distances(counts, branches)[0, 1] == pytest.approx(2/(n + 1)) # the two branches to single tips
    assert unifrac_distances(counts, branches, 'weighted_unnormalized')[0, 1] == pytest.approx(9*.25 + (n - 10)*.5 + .25 + .5)
    assert time.process_time() - begun < 5


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_newick_is_read_as_scikit_bio_reads_it(data):
    "Quoted names with any letters, comments, blanks, missing lengths, inner names, single children."
    blank = st.sampled_from(['', ' ', '\n', '[a (comment), with: marks;]', ' \t'])
    bare, quoted = st.text('ACGT_.-|0', max_size=4), st.text("A(),:;' []_é", max_size=5).map(lambda s: "'q" + s.replace("'", "''") + "'") # a q, for scikit-bio takes ',' for a comma
    length = st.one_of(st.just(''), st.sampled_from([':0', ':1.5', ':1e-3', ' : 2']))
    node = st.tuples(blank, st.one_of(bare, quoted), length, blank).map(''.join)
    tree = st.recursive(node, lambda inner: st.tuples(st.lists(inner, min_size=1, max_size=4), node).map(lambda x: f"({','.join(x[0])}){x[1]}"), max_leaves=12)
    text = f"({','.join(data.draw(st.lists(tree, min_size=1, max_size=3)))});"
    nodes = list(TreeNode.read(io.StringIO(text), format='newick', verify=False, convert_underscores=False).postorder())
    place = {id(n): i for i, n in enumerate(nodes)}
    names, parents, lengths = parse_newick(text)
    assert names == [n.name or '' for n in nodes] and list(lengths) == [n.length or 0 for n in nodes]
    assert list(parents) == [-1 if n.parent is None else place[id(n.parent)] for n in nodes]


def test_tip_names_are_normalised(tmp_path):
    (tmp_path/'tree.nwk').write_text("(('aaau':1,AAAC:1):1,acgu:2);")
    branches = read_tree(tmp_path/'tree.nwk', ['AAAC', 'AAAT', 'ACGT'])
    assert list(branches.place) == [1, 0, 2] and len(branches.lengths) == 4


@pytest.mark.parametrize('newick, message', [
    ('(AAAA:1,AAAC:1,AAAG:1);', 'unrooted'),
    ('((AAAA:1,AAAC:1):1,AAAT:1);', '1 of 3 ASVs are not tips'),
    ('((AAAA,AAAC),AAAG);', 'no branch lengths'),
    ('((AAAA:1,AAAC:-1):1,AAAG:1);', 'negative'),
    ('((AAAA:1,AAAA:1):1,AAAG:1);', 'occurs twice'),
    ('((AAAA:1,AAAC:1):1,AAAG', 'not a readable newick tree'),
    ('((AAAA:1,AAAC:nan):1,AAAG:1);', 'no numbers'),
    ('((AAAA:1,AAAC:inf):1,AAAG:1);', 'no numbers'),
    ('((AAAA:1,AAAC:one):1,AAAG:1);', 'not a readable newick tree'),
    ('((AAAA:1 AAAC:1):1,AAAG:1);', 'not a readable newick tree'),
    ('((AAAA:1,AAAC:1):1,AAAG:1));', 'not a readable newick tree'),
    ('', 'not a readable newick tree'),
])
def test_trees_that_are_refused(tmp_path, newick, message):
    (tmp_path/'tree.nwk').write_text(newick)
    with pytest.raises(AamError, match=message) as error: read_tree(tmp_path/'tree.nwk', ['AAAA', 'AAAC', 'AAAG'])
    assert one_line(error)


@pytest.mark.skipif(not data.exists(), reason='needs ../shared/data')
def test_moving_pictures_is_that_of_scikit_bio():
    table = rarefy(read_table(data/'moving_pictures'/'table.biom'), 1172, seed=42)
    path = data/'moving_pictures'/'tree.nwk'
    ours = unifrac_distances(table.counts, read_tree(path, table.sequences))
    tree = TreeNode.read(str(path), format='newick', convert_underscores=False)
    reference = beta_diversity('unweighted_unifrac', table.counts.toarray(), table.sample_ids, taxa=table.sequences, tree=tree)
    assert len(ours) == 34 and np.abs(ours - reference.data).max() <= 1e-6
    file = read_distances(data/'moving_pictures'/'unifrac.h5').align(table.sample_ids)
    upper = np.triu_indices(34, 1)
    assert np.corrcoef(file[upper], ours[upper])[0, 1] > .95 # another draw at the same depth


# --- files ---

@pytest.fixture
def distances():
    points = np.random.default_rng(0).random((6, 2))
    return Distances([f'{i:03}' for i in range(5)] + ['NA'], np.linalg.norm(points[:, None] - points, axis=-1).astype(np.float32))


@pytest.mark.parametrize('extension', ['.h5', '.npy', '.csv', '.tsv'])
def test_files_are_joined_by_id_whatever_their_order(tmp_path, distances, extension):
    order = np.random.default_rng(1).permutation(6)
    shuffled = Distances([distances.sample_ids[i] for i in order], distances.matrix[np.ix_(order, order)])
    write_distances(shuffled, tmp_path/f'd{extension}')
    read = read_distances(tmp_path/f'd{extension}', distances.sample_ids)
    assert (read.align(distances.sample_ids) == distances.matrix).all()
    with pytest.raises(AamError, match=r'lacks 2 of 3 samples \(x, 3\)') as error: read.align(['x', '3', '003'])
    assert one_line(error)


def test_npy_without_ids(tmp_path, distances, caplog):
    np.save(tmp_path/'d.npy', distances.matrix.astype(float))
    with caplog.at_level(logging.WARNING, 'aam'): read = read_distances(tmp_path/'d.npy', distances.sample_ids)
    assert read.sample_ids == distances.sample_ids and read.matrix.dtype == np.float32
    assert len(caplog.records) == 1 and 'd.ids.txt' in caplog.text
    for ids in [None, distances.sample_ids[:5]]:
        with pytest.raises(AamError, match='d.ids.txt') as error: read_distances(tmp_path/'d.npy', ids)
        assert one_line(error)
    (tmp_path/'d.ids.txt').write_text('a\r\nb\r\n')
    with pytest.raises(AamError, match='2 sample IDs for 6 rows'): read_distances(tmp_path/'d.npy', distances.sample_ids)


def test_pickles_are_not_opened(tmp_path):
    ran = tmp_path/'ran'
    class Trap:
        def __reduce__(self): return Path.touch, (ran,)
    np.save(tmp_path/'d.npy', np.array([[Trap()]], object), allow_pickle=True)
    with pytest.raises(AamError, match='not a readable distance matrix') as error: read_distances(tmp_path/'d.npy', ['a'])
    assert one_line(error) and not ran.exists()


@pytest.mark.parametrize('damage, message', [
    (lambda m: m.__setitem__((0, 1), m[0, 1] + .01), 'not symmetric'),
    (lambda m: m.__setitem__((2, 2), 1), 'diagonal'),
    (lambda m: m.__setitem__((0, 1), np.nan), 'no numbers'),
    (lambda m: m.__setitem__((0, 1), -1), 'negative'),
])
def test_matrices_that_are_refused(tmp_path, distances, damage, message):
    damage(distances.matrix)
    for extension, in_memory in [('.h5', 2**30), ('.tsv', 2**30), ('.h5', 0), ('.npy', 0)]:
        write_distances(distances, tmp_path/f'd{extension}')
        with pytest.raises(AamError, match=message) as error: read_distances(tmp_path/f'd{extension}', in_memory=in_memory)
        assert one_line(error)


# --- files larger than memory ---

@pytest.mark.parametrize('extension', ['.h5', '.npy'])
@pytest.mark.parametrize('kind', ['f4', 'f8'])
def test_large_matrices_stay_in_their_file(tmp_path, extension, kind):
    "Joined by ID as from memory, in this process and in workers."
    from aam.data import Plan, SampleData, loader
    rng, n = np.random.default_rng(0), 40
    points = rng.random((n, 3)).astype(np.float32)
    matrix = np.linalg.norm(points[:, None] - points, axis=-1).astype(kind)
    ids = [f's{i}' for i in rng.permutation(n)]
    write_distances(Distances(ids, matrix), tmp_path/f'd{extension}')
    stored, kept = (read_distances(tmp_path/f'd{extension}', in_memory=b) for b in (0, 2**30))
    assert isinstance(stored.matrix, StoredMatrix) and isinstance(kept.matrix, np.ndarray)
    some = ids[5:30:3]
    assert (stored.align(some) == kept.align(some)).all() and kept.align(some).dtype == stored.align(some).dtype == np.float32
    table = make_table(rng.integers(1, 9, (30, 4)), sorted(ids)[:30], names(4)) # fewer samples, in another order
    plans = [Plan(SampleData(table, 1, distances=d), list(range(30)), ('unifrac',), False, 4, True) for d in (stored, kept)]
    for workers in 0, 2:
        for epoch in 0, 1:
            found, wanted = [[b.unifrac.numpy() for b in loader(plans[i], epoch, workers if i == 0 else 0)] for i in (0, 1)]
            assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found, wanted, strict=True))


def test_checks_go_over_every_part(distances):
    "A fault anywhere is found, however the matrix is cut into parts."
    from aam.unifrac import _check_distances
    n = len(distances.matrix)
    for numbers in 1, n, 2*n, 4*n, 1000:
        assert _check_distances(Path('d.h5'), distances.sample_ids, distances.matrix, numbers=numbers).sample_ids == distances.sample_ids
        for i in range(n):
            for j in range(n):
                for value in (.3 if i == j else distances.matrix[i, j] + .01), -1., np.nan:
                    wrong = distances.matrix.copy(); wrong[i, j] = value
                    with pytest.raises(AamError): _check_distances(Path('d.h5'), distances.sample_ids, wrong, numbers=numbers)


def test_damage_behind_the_first_rows(tmp_path):
    "Of a file that is cut short, or has chunks that cannot be read."
    matrix = np.zeros((300, 300), np.float32)
    write_distances(Distances([str(i) for i in range(300)], matrix), tmp_path/'d.h5')
    content = (tmp_path/'d.h5').read_bytes()
    (tmp_path/'d.h5').write_bytes(content[:len(content)//2])
    np.save(tmp_path/'d.npy', matrix)
    (tmp_path/'d.npy').write_bytes((tmp_path/'d.npy').read_bytes()[:-100])
    for name in 'd.h5', 'd.npy':
        for in_memory in 0, 2**30:
            with pytest.raises(AamError, match='not a readable distance matrix') as error: read_distances(tmp_path/name, [str(i) for i in range(300)], in_memory)
            assert one_line(error)


@pytest.mark.parametrize('text, message', [
    ('\ta\tb\na\t0\t1\nc\t1\t0\n', 'rows and columns differ'),
    ('\ta\ta\na\t0\t1\na\t1\t0\n', 'occurs twice'),
    ('\ta\tb\na\t0\tfar\nb\tfar\t0\n', 'not a readable'),
    ('\ta\tb\na\t0\t\nb\t\t0\n', 'not a readable'),
    ('\ta\tb\na\t0\t1\n', 'rows and columns differ'),
    ('', 'not a readable'),
])
def test_text_that_is_refused(tmp_path, text, message):
    (tmp_path/'d.tsv').write_text(text)
    with pytest.raises(AamError, match=message) as error: read_distances(tmp_path/'d.tsv')
    assert one_line(error)


def test_other_files(tmp_path):
    (tmp_path/'d.h5').write_bytes(b'\x89HDF\r\n\x1a\n')
    with h5py.File(tmp_path/'e.h5', 'w') as f: f['matrix'] = np.zeros((2, 2))
    (tmp_path/'d.npy').write_bytes(b'no array')
    np.save(tmp_path/'flat.npy', np.zeros(4))
    (tmp_path/'d.txt').write_text('x')
    for name in ['d.h5', 'e.h5', 'd.npy', 'flat.npy', 'd.txt', 'absent.h5', 'absent.nwk']:
        with pytest.raises(AamError) as error: read_distances(tmp_path/name, list('abcd'))
        assert one_line(error)
    with pytest.raises(AamError): read_tree(tmp_path/'absent.nwk', ['A'])
    with pytest.raises(AamError): write_distances(Distances([], np.zeros((0, 0))), tmp_path/'d.txt')
