"""A large table: time and peak memory of simulating, writing, loading, preparing and rarefying it, each stage in a process of its own.

    python benchmarks/large_table.py [--samples 100000] [--asvs 500000] [--richness 300] [--folder runs/large] [--rival]

`load` is `read_table`; `prepare` makes what batches are made from (tokens, 6-mers, keys); `rarefy` draws every sample at one depth; `batch` makes batches of 8.
With --rival, `biom.load_table` and `np.unique(axis=0)`, which this replaced, do the same with the same file. Peak memory is that of the whole process (`ru_maxrss`), imports included.
The stages are checked against each other: what was loaded has the reads, sequences and samples that were written.
"""
import argparse, json, resource, subprocess, sys, time
from pathlib import Path

import numpy as np

def simulated(samples:int, asvs:int, richness:int, bases:int=150, seed:int=0):
    "A `Table` of distinct DNA, `richness` ASVs in each sample, some common and some rare; ASVs stand in no order."
    from scipy import sparse
    from aam.table import Table
    rng = np.random.default_rng(seed)
    stratum = asvs//richness
    chosen = np.arange(richness, dtype=np.int32)*stratum + (stratum*rng.random((samples, richness), np.float32)**2).astype(np.int32).clip(max=stratum - 1)
    counts = sparse.csr_matrix((rng.geometric(0.02, chosen.size), chosen.ravel(), np.arange(samples + 1)*richness), (samples, asvs))
    letters = np.frombuffer(b'ACGT', np.uint8)[rng.integers(0, 4, (asvs, bases), np.uint8)]
    return Table(counts, [f's{i:07}' for i in range(samples)], letters.view(f'S{bases}')[:, 0].astype(str).tolist(), np.arange(asvs))

def facts(table) -> dict:
    "What must survive: reads by sample, and by sequence."
    import hashlib
    by_asv = np.bincount(table.counts.indices, weights=table.counts.data, minlength=len(table.sequences)).astype(np.int64)
    present = sorted((s, int(n)) for s, n in zip(table.sequences, by_asv) if n)
    return dict(samples=len(table), asvs=len(present), reads=hashlib.md5(table.reads.tobytes()).hexdigest(), sequences=hashlib.md5(repr(present).encode()).hexdigest())

def write(path, args, clock):
    from aam.table import write_table
    table = simulated(args.samples, args.asvs, args.richness)
    clock('simulate')
    write_table(table, path)
    clock('write')
    return facts(table)

def load(path, args, clock):
    from aam.data import Plan, SampleData
    from aam.table import default_depth, rarefy, read_table
    clock('import')
    table = read_table(path)
    clock('load')
    data = SampleData(table, default_depth(table.reads))
    clock('prepare')
    plan = Plan(data, list(range(min(len(table), 400))), ('target', 'count'), True, 8, True)
    for k in range(len(plan)): plan.batch(0, k)
    clock('batch', f'{len(plan)} batches of 8')
    del data, plan
    rarefy(table, default_depth(table.reads), 42)
    clock('rarefy')
    return facts(table)

def rival(path, args, clock):
    import biom
    from aam.table import make_table
    from aam.tokens import encode_sequences
    clock('import')
    loaded = biom.load_table(str(path))
    table = make_table(loaded.matrix_data.T, loaded.ids(), list(loaded.ids('observation')))
    clock('load')
    np.unique(encode_sequences(table.sequences, 150), axis=0, return_inverse=True)
    clock('np.unique')
    return facts(table)

parts = dict(write=write, load=load, rival=rival)

def run_part(name, path, args):
    "Runs a part here; prints a JSON line for each stage and one for the facts."
    start = time.perf_counter()
    def clock(stage, note=''):
        nonlocal start
        now = time.perf_counter()
        print(json.dumps(dict(part=name, stage=stage, seconds=now - start, peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20, note=note)), flush=True)
        start = now
    print(json.dumps(dict(facts=parts[name](path, args, clock))))

def measure(names, path, args) -> tuple:
    "Stages of the parts `names`, each part in a fresh process, and their facts."
    stages, found = [], []
    for name in names:
        command = [sys.executable, __file__, '--part', name, '--folder', str(path.parent), '--samples', str(args.samples), '--asvs', str(args.asvs), '--richness', str(args.richness)]
        lines = [json.loads(line) for line in subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()]
        for line in lines[:-1]: show(line); stages.append(line)
        found.append(lines[-1]['facts'])
    return stages, found

def show(s): print(f"{s['part']:<8} {s['stage']:<10} {s['seconds']:8.1f} s   peak {s['peak_gb']:6.2f} GB   {s['note']}", flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--samples', type=int, default=100_000); p.add_argument('--asvs', type=int, default=500_000); p.add_argument('--richness', type=int, default=300)
    p.add_argument('--folder', type=Path, default=Path('runs/large')); p.add_argument('--rival', action='store_true'); p.add_argument('--part', choices=parts)
    args = p.parse_args()
    path = args.folder/'table.biom'
    if args.part: return run_part(args.part, path, args)
    args.folder.mkdir(parents=True, exist_ok=True)
    print(f'{args.samples:,} samples, {args.richness} ASVs each of {args.asvs:,}', flush=True)
    stages, found = measure(['write', 'load'] + ['rival']*args.rival, path, args)
    assert all(f == found[0] for f in found), found
    loading = [s for s in stages if s['part'] == 'load' and s['stage'] in ('load', 'prepare')]
    print(f"\nfile {path.stat().st_size/2**30:.2f} GB; loaded and ready for batches in {sum(s['seconds'] for s in loading):.1f} s, peak {max(s['peak_gb'] for s in loading):.2f} GB")

if __name__ == '__main__': main()
