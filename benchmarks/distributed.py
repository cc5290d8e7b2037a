"""Training steps on several GPUs by each strategy, beside one GPU, in the same run.

    python benchmarks/distributed.py [--ranks N] [--sizes default,large] [--compile on] [--pool 3000]        # all GPUs of the machine
    python benchmarks/distributed.py --device cpu --ranks 2 --sizes tiny                                      # to try it

Each rank takes 8 samples in a step, with 2,175 ASV occurrences of 1,200 distinct ASVs of 150 bases (weak scaling); a step is forward, backward and optimizer of `aam pretrain`.
The samples of different ranks draw their ASVs from --pool: with 3,000, sixteen samples have 0.80 of the ASVs that two batches of eight have together (0.64 in the mouse data of the
study, 0.94 in the mackerel data), so that dealing them out evenly can at best make a step of two ranks 1/0.80 times as fast. ASVs/s count occurrences, of each GPU.
`of one GPU` is ASVs/s per GPU as a share of those of one GPU training by itself, in the way that is fastest there (recorded steps); memory is the peak of the fullest GPU.
"""
import argparse, gc, json, os, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
import torch
from speed import batch_size, bases, occurrences, sizes, tree_branches

from aam.config import EncoderOptions, TrainingOptions, launched
from aam.data import Plan, SampleData
from aam.distributed import Group, single, start_ranks
from aam.losses import Objective
from aam.monitor import Meter
from aam.predictor import Model, prime
from aam.simulate import yule_tree
from aam.table import make_table
from aam.trainer import Training, compile_model, train_step

sizes = sizes | dict(tiny=(32, 2, 1))
ways = {'DDP': ('distributed', False), 'DDP, shared ASVs': ('distributed', True), 'FSDP': ('fsdp', False), 'FSDP, shared ASVs': ('fsdp', True)}

def simulated_data(groups:int, pool:int, distinct:int=1200, seed:int=0) -> SampleData:
    "`groups` times 8 samples of one depth; each group has `occurrences` of `distinct` ASVs out of `pool`."
    rng = np.random.default_rng(seed)
    counts = np.zeros((groups*batch_size, pool), np.int64)
    for g in range(groups):
        asvs = rng.permutation(pool)[:distinct]
        for s, own in enumerate(np.array_split(asvs, batch_size)): # each ASV of the group once, and then some of them again
            more = occurrences*distinct//1200//batch_size - len(own)
            mine = np.concatenate([own, rng.choice(np.setdiff1d(asvs, own), more, replace=False)])
            counts[g*batch_size + s, mine] = rng.geometric(0.02, len(mine))
    counts[np.arange(len(counts)), counts.argmax(1)] += counts.sum(1).max() - counts.sum(1)
    used = counts.any(0)
    sequences = [''.join(s) for s in np.array(list('ACGT'))[rng.integers(0, 4, (pool, bases))]]
    table = make_table(counts[:, used], [f's{i:03}' for i in range(len(counts))], [s for s, u in zip(sequences, used) if u])
    tree = yule_tree(len(table.sequences), rng)
    return SampleData(table, depth=int(table.reads.min()), max_bp=bases, branches=tree_branches(tree, table.sequences))

def make_training(data, size, ranks, gpus, args, shared=False):
    "A `Training` of the pretrain tasks over batches of 8 samples for each of `gpus`."
    width, heads, layers = sizes[size]
    o = TrainingOptions(compile_model=args.compile)
    plan = Plan(data, list(range(len(data.table))), ('count', 'unifrac'), True, batch_size*gpus)
    torch.manual_seed(0)
    model = Model(EncoderOptions(embedding_dim=width, attention_heads=heads, attention_layers=layers), ('unifrac', 'nuc', 'count'), checkpointing=o.gradient_checkpointing, chunk_size=o.asv_chunk_size)
    prime(model.to(args.device), plan.batch(0, 0).to(args.device))
    if args.compile == 'on': compile_model(model)
    plan.spread(ranks.deal(shared, True))
    return Training(model, Objective(dict(unifrac=1., nuc=1., count=1.), unifrac_variance=0.01), plan, plan, o, device=args.device, ranks=ranks, all_pairs=True)

def measure(data, size, ranks, gpus, args, shared=False) -> dict:
    "Steps over batches that are already there, one after the other without waiting; the slowest rank counts."
    cuda = args.device == 'cuda'
    t = make_training(data, size, ranks, gpus, args, shared)
    batches = [t.train.batch(0, k) for k in range(len(t.train))]
    if cuda: batches = [b.pin_memory() for b in batches]
    t.model.train()
    if cuda:
        for i in range(torch.cuda.device_count() if ranks.size == 1 else 1): torch.cuda.reset_peak_memory_stats(i if ranks.size == 1 else None)
    def run(steps):
        if cuda: torch.cuda.synchronize()
        ranks.barrier()
        start = time.perf_counter()
        for i in range(steps): train_step(t, [batches[i % len(batches)]], Meter())
        if cuda: torch.cuda.synchronize()
        return (time.perf_counter() - start)/steps
    first = run(1)
    for _ in range(args.warm): run(len(batches)) # all shapes
    seconds = run(args.steps)
    if not cuda: memory = float('nan')
    elif ranks.size > 1: memory = torch.cuda.max_memory_allocated()/2**30
    else: memory = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))/2**30
    slowest, fullest = [-ranks.smallest(-int(x*1e6))/1e6 for x in (seconds, memory if cuda else 0.)]
    read = sum(b.asvs_read for b in batches)*ranks.size/len(batches)/2 # two views
    encoded = sum(sum(n for n, *_ in b.groups) for b in batches)/len(batches) # token rows of a rank, masked copies among them
    return dict(seconds=slowest, memory=fullest if cuda else memory, asvs=read/slowest/gpus, encoded=encoded/(1 if ranks.size > 1 else gpus), first=first)

def each(rows, args):
    "Measures, one after the other; writes what was found as it comes."
    data = simulated_data(4*args.ranks, args.pool, args.distinct)
    for size, name, ranks, gpus, shared in rows:
        try: found = measure(data, size, ranks, gpus, args, shared)
        except torch.OutOfMemoryError: found = dict(failed='does not fit')
        gc.collect()
        if args.device == 'cuda': torch.cuda.empty_cache()
        if ranks.lead:
            with open(args.found, 'a') as f: f.write(json.dumps(dict(size=size, name=name, **found)) + '\n')

def worker(args):
    "In a process of its own, or in each of the ranks."
    torch.backends.cudnn.allow_tf32 = False
    every = args.sizes.split(',')
    if launched()[1] == 1:
        each([(size, 'one GPU', single, 1, False) for size in every], args)
        if args.device == 'cuda' and args.ranks > 1: each([(size, 'DataParallel', start_ranks('data-parallel', 'cuda'), torch.cuda.device_count(), False) for size in every], args)
        return
    there = start_ranks('distributed', args.device)
    kind = lambda strategy: Group(there.rank, there.size, there.local_rank, there.device, strategy)
    each([(size, name, kind(strategy), there.size, shared) for size in every for name, (strategy, shared) in ways.items()], args)
    there.close()

def show(row, one):
    "One line."
    if 'failed' in row: return print(f"{row['size']:<8} {row['name']:<20} {row['failed']}", flush=True)
    share = f"{100*row['asvs']/one['asvs']:6.1f} % of one GPU" if one and 'asvs' in one else ''
    print(f"{row['size']:<8} {row['name']:<20} {1000*row['seconds']:9.1f} ms a step {row['asvs']:9.0f} ASVs/s per GPU {share:<20} {row['encoded']:6.0f} rows encoded per GPU {row['memory']:7.2f} GB  first step {row['first']:.1f} s", flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--ranks', type=int)
    p.add_argument('--sizes'); p.add_argument('--compile', default='off', choices=['on', 'off']); p.add_argument('--pool', type=int); p.add_argument('--distinct', type=int)
    p.add_argument('--steps', type=int); p.add_argument('--warm', type=int); p.add_argument('--minutes', type=float, default=5., help='after which what is unfinished is left out'); p.add_argument('--found', help=argparse.SUPPRESS)
    args = p.parse_args()
    cuda = args.device == 'cuda'
    args.ranks = args.ranks or (torch.cuda.device_count() if cuda else 2)
    args.sizes, args.steps, args.warm = args.sizes or ('default,large' if cuda else 'tiny'), args.steps or (20 if cuda else 4), 2 if args.warm is None and cuda else args.warm or 0
    args.pool, args.distinct = args.pool or (3000 if cuda else 150), args.distinct or (1200 if cuda else 60)
    if args.found: return worker(args)
    name = torch.cuda.get_device_name() if cuda else 'CPU'
    print(f'{args.ranks} x {name}, torch {torch.__version__}, compiled {args.compile}, {batch_size} samples a rank, {args.distinct} distinct ASVs out of {args.pool}', flush=True)
    began, one, shown = time.monotonic(), {}, 0
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder)/'found.jsonl'
        own = ['--device', args.device, '--sizes', args.sizes, '--compile', args.compile, '--found', str(found)]
        for option in 'ranks', 'pool', 'distinct', 'steps', 'warm': own += [f'--{option}', str(getattr(args, option))]
        for launcher in ([sys.executable], [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={args.ranks}']):
            process = subprocess.Popen([*launcher, __file__, *own], env=os.environ | dict(OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1')))
            while True:
                over, late = process.poll() is not None, time.monotonic() - began > 60*args.minutes
                rows = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
                for row in rows[shown:]:
                    if row['name'] == 'one GPU': one[row['size']] = row
                    show(row, one.get(row['size']))
                shown = len(rows)
                if over or late: break
                time.sleep(0.2)
            if late: process.terminate(); print(f'{args.minutes:g} minutes are over; the rest is left out')
            if process.wait() and not late: sys.exit('a process failed; see above')
            if late: break

if __name__ == '__main__': main()
