"""Distance matrices: `aam unifrac` beside scikit-bio and ssu in the same run, how time grows, and what a large table takes.

    OMP_NUM_THREADS=2 python benchmarks/unifrac.py            # 500 samples x 5,000 tips, and the growth curve
    python benchmarks/unifrac.py --gpu                        # 10,000 samples x 50,000 tips, unweighted, on a GPU, with the file

Tables are simulated: a Yule tree, log-normal abundances of ASVs and of ASVs in samples, 1,000 reads a sample (so that a sample has some hundred ASVs, as a
rarefied one does). `compute` is from table and tree in memory to a matrix in memory, for aam and scikit-bio alike; `command` is a whole run from files to a
file, start of Python included, for aam and ssu alike. scikit-bio computes each pair for itself: its time for --pairs-of samples is measured, and taken to all.
"""
import argparse, os, resource, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import h5py
import numpy as np
from scipy import sparse

from aam.blocks import block_distances, block_size, metrics
from aam.simulate import newick, yule_tree
from aam.unifrac import read_tree

threads = int(os.environ.get('OMP_NUM_THREADS', os.cpu_count()))

def community(folder:Path, samples:int, tips:int, reads:int=1000, seed:int=0):
    "Counts (N, A), names of the tips and the tree's file."
    rng = np.random.default_rng(seed)
    names = [''.join('ACGT'[i >> 2*b & 3] for b in range(10)) for i in range(tips)]
    (folder/'tree.nwk').write_text(newick(yule_tree(tips, rng), names))
    common, rows = rng.lognormal(0, 2, tips), []
    for _ in range(samples):
        p = common*rng.lognormal(0, 1.5, tips)
        asvs, counts = np.unique(np.searchsorted(np.cumsum(p), rng.random(reads)*p.sum()).clip(0, tips - 1), return_counts=True)
        rows.append((asvs, counts))
    indptr = np.cumsum([0, *[len(a) for a, _ in rows]])
    counts = sparse.csr_matrix((np.concatenate([c for _, c in rows]), np.concatenate([a for a, _ in rows]), indptr), (samples, tips))
    missing = np.flatnonzero(np.bincount(counts.indices, minlength=tips) == 0) # every tip is in the table
    counts = (counts + sparse.csr_matrix((np.ones(len(missing), int), (missing % samples, missing)), counts.shape)).tocsr()
    return counts, names, folder/'tree.nwk'

def write_biom(counts, names, path:Path):
    import biom
    with h5py.File(path, 'w') as f: biom.Table(counts.T.astype(float), names, [f's{i}' for i in range(counts.shape[0])]).to_hdf5(f, 'benchmark')

def seconds(function, repeats:int=3) -> float:
    "Best of some runs."
    best = np.inf
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begun)
    return best

def compute(counts, branches, metric, device='cpu'):
    n = counts.shape[0]
    found = np.zeros((n, n), np.float32)
    for rows, columns, d in block_distances([counts], branches, metric, .5, block_size(n, counts.shape[1], device=device), device):
        found[rows, columns] = d
        found[columns, rows] = d.T
    return found

def of_scikit_bio(counts, names, tree, metric, some):
    "Seconds for all pairs, from those of `some` samples, and the distances of these."
    from skbio.diversity import beta_diversity
    how = dict(unweighted=('unweighted_unifrac', {}), weighted_normalized=('weighted_unifrac', dict(normalized=True)))[metric]
    n, found = counts.shape[0], None
    def run():
        nonlocal found
        found = beta_diversity(how[0], counts[:some].toarray(), taxa=names, tree=tree, **how[1]).data
    return seconds(run, 1) * n*(n - 1)/(some*(some - 1)), found

def command(*words) -> float:
    return seconds(lambda: subprocess.run(list(map(str, words)), check=True, capture_output=True), 2)

def rivals(folder:Path, samples:int, tips:int, some:int):
    "The table of rivals."
    from skbio import TreeNode
    counts, names, path = community(folder, samples, tips)
    write_biom(counts, names, folder/'table.biom')
    begun = time.perf_counter()
    branches = read_tree(path, names)
    print(f'{samples} samples x {tips:,} tips, {counts.nnz/samples:.0f} ASVs a sample, {threads} threads; tree read in {time.perf_counter() - begun:.2f} s\n')
    tree, ssu = TreeNode.read(str(path), format='newick', convert_underscores=False), shutil.which('ssu') or shutil.which('ssu', path='/usr/bin')
    print('| metric | aam compute | scikit-bio compute | ratio | aam command | ssu command | aam / ssu, commands | aam compute / ssu command | largest difference |\n|---|---|---|---|---|---|---|---|---|')
    for metric in 'unweighted', 'weighted_normalized', 'generalized':
        ours, found = seconds(lambda m=metric: compute(counts, branches, m)), compute(counts, branches, metric)
        theirs, some_found = of_scikit_bio(counts, names, tree, metric, some) if metric != 'generalized' else (None, None)
        words = ['--metric', metric, *(['--alpha', '0.5'] if metric == 'generalized' else [])]
        whole = command(sys.executable, '-m', 'aam.cli', 'unifrac', '--table', folder/'table.biom', '--tree', path, '--output', folder/'aam.h5', '--overwrite', '--device', 'cpu', *words)
        differences = [] if theirs is None else [np.abs(found[:some, :some] - some_found).max()]
        if ssu:
            other = command(ssu, '-i', folder/'table.biom', '-t', path, '-m', metric, '-o', folder/'ssu.h5', '--format', 'hdf5', '--pcoa', '0', *(['-a', '0.5'] if metric == 'generalized' else []))
            with h5py.File(folder/'ssu.h5') as f: differences.append(np.abs(found - f['matrix'][:]).max())
        print(f"| {metric} | {ours:.2f} s | {f'{theirs:.1f} s' if theirs else '-'} | {f'{theirs/ours:.0f}' if theirs else '-'} | {whole:.1f} s | {f'{other:.2f} s' if ssu else '-'} | "
              f"{f'{whole/other:.1f}' if ssu else '-'} | {f'{ours/other:.2f}' if ssu else '-'} | {max(differences, default=np.nan):.0e} |", flush=True)

def growth(folder:Path):
    "Seconds over samples and tips."
    print('\n| samples | tips | branches | unweighted | weighted_normalized |\n|---|---|---|---|---|')
    times = {}
    for samples, tips in (250, 5000), (500, 5000), (1000, 5000), (2000, 5000), (500, 2500), (500, 10_000), (500, 20_000):
        counts, names, path = community(folder, samples, tips)
        branches = read_tree(path, names)
        times[samples, tips] = [seconds(lambda m=m, c=counts, r=branches: compute(c, r, m), 2) for m in ('unweighted', 'weighted_normalized')]
        print(f"| {samples:,} | {tips:,} | {len(branches.lengths):,} | {' | '.join(f'{t:.2f} s' for t in times[samples, tips])} |", flush=True)
    by_samples = [np.log2(times[2000, 5000][k]/times[1000, 5000][k]) for k in (0, 1)]
    by_tips = [np.log2(times[500, 20_000][k]/times[500, 10_000][k]) for k in (0, 1)]
    print(f'\nthe last doubling of samples: time ** {by_samples[0]:.2f} unweighted, {by_samples[1]:.2f} weighted; of tips: {by_tips[0]:.2f} and {by_tips[1]:.2f}.')
    reason_large(times[2000, 5000][0], 2000, 5000, f'{threads} threads')

def reason_large(measured:float, samples:int, tips:int, where:str, many:int=307_000, many_tips:int=400_000):
    "What 307,000 samples would take: the product of matrices grows with samples squared and with branches."
    factor = (many/samples)**2 * many_tips/tips
    print(f'{many:,} samples x {many_tips:,} tips are {factor:,.0f} times the {samples:,} x {tips:,} measured: {measured*factor/3600:,.1f} hours on {where}; '
          f'the file has {many**2*4/2**30:,.0f} GB in float32, {many**2*2/2**30:,.0f} GB in float16 (reasoned from the curve, not measured).')

def on_gpu(folder:Path, samples:int, tips:int, memory:float):
    "A whole table on a GPU, from memory to the file, and by the command."
    import torch
    from aam.distances import DistanceOptions, Output, write_matrix
    from aam.table import Table
    begun = time.perf_counter()
    counts, names, path = community(folder, samples, tips)
    write_biom(counts, names, folder/'table.biom')
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}; {samples:,} samples x {tips:,} tips, {counts.nnz/samples:.0f} ASVs a sample, made in {time.perf_counter() - begun:.0f} s', flush=True)
    begun = time.perf_counter()
    branches = read_tree(path, names)
    print(f'tree read in {time.perf_counter() - begun:.1f} s: {len(branches.lengths):,} branches', flush=True)
    table, output = Table(counts, [f's{i}' for i in range(samples)], names, np.arange(tips)), folder/'d.h5'
    options = DistanceOptions(table=folder/'table.biom', tree=path, output=output, device='cuda', memory=memory)
    torch.zeros(1, device='cuda')
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    with Output(output).writing(): write_matrix([table], branches, Output(output), {}, options)
    took = time.perf_counter() - begun
    print(f'distances and file: {took:.1f} s; peak memory {torch.cuda.max_memory_allocated()/2**30:.1f} GB on the GPU, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20:.1f} GB in the process', flush=True)
    whole = command(sys.executable, '-m', 'aam.cli', 'unifrac', '--table', folder/'table.biom', '--tree', path, '--output', folder/'e.h5', '--overwrite', '--device', 'cuda', '--memory', memory)
    print(f'the command, from files to file: {whole:.1f} s', flush=True)
    some = np.sort(np.random.default_rng(1).permutation(samples)[:200])
    exact = np.zeros((200, 200))
    for rows, columns, d in block_distances([counts[some]], branches, 'unweighted', 1., 200, 'cpu', 'float64'): exact[rows, columns] = d
    with h5py.File(output) as f: found = f['matrix'][some][:, some]
    print(f'largest difference from double precision on a CPU, 200 samples: {np.abs(found - exact).max():.1e}', flush=True)
    for metric in metrics:
        part = counts[:2000]
        print(f'2,000 of the samples, {metric}: {seconds(lambda m=metric, part=part: compute(part, branches, m, "cuda"), 1):.1f} s', flush=True)
    reason_large(took, samples, tips, torch.cuda.get_device_name())

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--samples', type=int, help='samples (500; on a GPU 10,000)')
    parser.add_argument('--tips', type=int, help='tips (5,000; on a GPU 50,000)')
    parser.add_argument('--pairs-of', type=int, default=200, help='samples given to scikit-bio, whose time is taken to all')
    parser.add_argument('--what', default='rivals,growth', help='parts to run on a CPU')
    parser.add_argument('--gpu', action='store_true', help='the large table on a GPU')
    parser.add_argument('--memory', type=float, default=16., help='GB for blocks on a GPU')
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if o.gpu: on_gpu(Path(folder), o.samples or 10_000, o.tips or 50_000, o.memory)
        else:
            if 'rivals' in o.what: rivals(Path(folder), o.samples or 500, o.tips or 5000, o.pairs_of)
            if 'growth' in o.what: growth(Path(folder))
