"""Time, memory and arithmetic of a training step, beside a padded baseline on the same machine in the same run.

    python benchmarks/speed.py [--device cuda] [--sizes default,medium,large] [--what baseline,eager,fast,memory,frozen] [--profile FOLDER]

A batch is 8 samples with 2,175 ASV occurrences of 1,200 distinct ASVs of 150 bases, a tenth of them masked; a step is forward, backward and optimizer of
`aam pretrain`. `model TFLOP/s` counts the matrix products that the batch needs (no padding, no recomputing); its share is that of an 8192 x 8192 bf16 product timed here.
The baseline encodes every occurrence, padded to --token-limit 1024, by `torch.nn.TransformerEncoder` in chunks of 256 with checkpointing, at the same precision.
"""
import argparse, statistics, tempfile, time
from pathlib import Path
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from aam.config import EncoderOptions, TrainingOptions
from aam.data import Plan, SampleData
from aam.losses import Objective
from aam.monitor import Meter
from aam.predictor import Model, prime
from aam.simulate import newick, yule_tree
from aam.states import KeptStates
from aam.table import make_table
from aam.trainer import Training, compile_model, train_epoch, train_step
from aam.unifrac import read_tree

sizes = dict(default=(128, 4, 4), medium=(768, 6, 4), large=(1152, 12, 8))
batch_size, occurrences, distinct, bases = 8, 2175, 1200, 150

def simulated_data(groups:int=4, seed:int=0) -> SampleData:
    "`groups` times 8 samples of one depth; each group has `occurrences` of the same `distinct` ASVs."
    rng = np.random.default_rng(seed)
    counts = np.zeros((groups*batch_size, distinct), np.int64)
    for g in range(groups):
        sizes = np.full(batch_size, occurrences // batch_size) + rng.permutation(np.repeat([-60, -30, 0, 0, 0, 0, 30, 60], 1))
        sizes[0] += occurrences - sizes.sum()
        asvs = [a.tolist() for a in np.split(rng.permutation(distinct), np.cumsum(sizes * distinct // occurrences)[:-1])] # each ASV once
        for s, (mine, size) in enumerate(zip(asvs, sizes)):
            mine = mine[:size] + rng.choice(np.setdiff1d(np.arange(distinct), mine), max(size - len(mine), 0), replace=False).tolist()
            counts[g*batch_size + s, mine] = rng.geometric(0.02, len(mine))
    counts[np.arange(len(counts)), counts.argmax(1)] += counts.sum(1).max() - counts.sum(1)
    sequences = [''.join(s) for s in np.array(list('ACGT'))[rng.integers(0, 4, (distinct, bases))]]
    table = make_table(counts, [f's{i:03}' for i in range(len(counts))], sequences)
    tree = yule_tree(len(table.sequences), rng)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder)/'tree.nwk').write_text(newick(tree, table.sequences))
        branches = read_tree(Path(folder)/'tree.nwk', table.sequences)
    return SampleData(table, depth=int(table.reads.min()), max_bp=bases, branches=branches)

class Padded(nn.Module):
    "Every occurrence encoded for itself, padded to the token limit."
    def __init__(self, width, heads, layers, token_limit=1024, chunk=256):
        super().__init__()
        stack = lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(width, heads, 4*width, 0., 'gelu', batch_first=True, norm_first=True), layers, enable_nested_tensor=False)
        self.token_limit, self.chunk = token_limit, chunk
        self.embedding, self.position = nn.Embedding(7, width, 0), nn.Parameter(torch.randn(bases, width)*.02)
        self.nucleotides, self.samples, self.encoder = stack(), stack(), stack()
        self.bases, self.out = nn.Linear(width, 7), nn.Linear(width, width)

    def chunk_states(self, tokens): return self.nucleotides(self.embedding(tokens) + self.position)

    def forward(self, tokens, mask): # (B, S, L), (B, S)
        states, nuc = [], 0.
        for c in tokens.flatten(0, 1).split(self.chunk):
            x = checkpoint(self.chunk_states, c, use_reentrant=False)
            nuc = nuc + F.cross_entropy(self.bases(x).float().flatten(0, 1), c.flatten(), ignore_index=0, reduction='sum')
            states.append(x.mean(1))
        x = torch.cat(states).unflatten(0, mask.shape)
        for stack in self.samples, self.encoder: x = checkpoint(lambda x, s=stack: s(x, src_key_padding_mask=~mask), x, use_reentrant=False)
        x = self.out((x*mask[..., None]).sum(1)/mask.sum(1, keepdim=True)).float()
        return torch.tanh(torch.cdist(x, x)/10), nuc/tokens.numel()

def padded_batch(batch, width=1024):
    "Tokens of each slot of the UniFrac view (B, S, L) and the mask (B, S)."
    rows = batch.rows('unifrac')
    index, mask = batch.index[rows], batch.mask[rows]
    tokens = batch.tokens[batch.token_row[index]].long() * mask[..., None]
    pad = width - mask.shape[1]
    return F.pad(tokens, (0, 0, 0, pad)), F.pad(mask, (0, pad))

def needed_flops(width, layers, batches) -> float:
    "Floating-point operations of the matrix products of a mean step, backward twice the forward."
    total = 0.
    for b in batches:
        asvs = int((b.asv_weight > 0).sum())
        copies = sum(masked for _, masked, _ in b.groups)
        lengths = b.mask[b.rows('count')].sum(1).float()
        block = lambda tokens, squares: layers*(24*width**2*tokens + 4*width*squares)
        total += block((asvs + copies)*bases, (asvs + copies)*bases**2) + 2*block(float(lengths.sum()), float(lengths.square().sum()))
    return 3*total/len(batches)

def timed(step, device, warm=6, repeats=20) -> float:
    "Median seconds of `step(i)`."
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    for i in range(warm): step(i)
    times = []
    for i in range(repeats):
        wait(); start = time.perf_counter()
        step(i)
        wait(); times.append(time.perf_counter() - start)
    return statistics.median(times)

def pipelined(step, device, repeats=20) -> float:
    "Seconds of a step when steps follow one another without waiting for the GPU."
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    wait(); start = time.perf_counter()
    for i in range(repeats): step(i)
    wait()
    return (time.perf_counter() - start)/repeats

def peak_gb(device): return torch.cuda.max_memory_allocated()/2**30 if device == 'cuda' else float('nan')

def matrix_rate(device) -> float:
    "TFLOP/s of a bf16 product on random data (fp32 on a CPU)."
    n, dtype = (8192, torch.bfloat16) if device == 'cuda' else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2*n**3/timed(lambda i: a @ b, device)/1e12

def make_training(data, size, device, **options):
    "A `Training` of the pretrain tasks, as `aam pretrain` makes it."
    width, heads, layers = sizes[size]
    o = TrainingOptions(**options)
    plan = Plan(data, list(range(len(data.table))), ('count', 'unifrac'), True, batch_size)
    torch.manual_seed(0)
    model = Model(EncoderOptions(embedding_dim=width, attention_heads=heads, attention_layers=layers), ('unifrac', 'nuc', 'count'), checkpointing=o.gradient_checkpointing, chunk_size=o.asv_chunk_size)
    prime(model.to(device), plan.batch(0, 0).to(device))
    if o.compile_model == 'on': compile_model(model)
    return Training(model, Objective(dict(unifrac=1., nuc=1., count=1.), unifrac_variance=0.01), plan, plan, o, device=device)

def step_row(data, size, device, rate, warm, repeats, **options):
    "Times `train_step` on batches that are already there."
    t = make_training(data, size, device, **options)
    batches = [t.train.batch(0, k) for k in range(len(t.train))]
    flops = needed_flops(sizes[size][0], sizes[size][2], batches)
    if device == 'cuda': batches = [b.pin_memory() for b in batches]
    t.model.train()
    if device == 'cuda': torch.cuda.reset_peak_memory_stats() # the first step is not a replay: it takes its memory where it is counted
    start = time.perf_counter()
    step = lambda i: train_step(t, [batches[i % len(batches)]], Meter())
    step(0)
    if device == 'cuda': torch.cuda.synchronize()
    first = time.perf_counter() - start
    for i in range(warm): step(i)
    seconds = timed(step, device, 1, repeats)
    steady = pipelined(step, device, repeats)
    return dict(seconds=steady, alone=seconds, memory=peak_gb(device), tflops=flops/steady/1e12, share=flops/steady/1e12/rate, asvs=distinct/steady, first=first)

def baseline_row(data, size, device, rate, warm, repeats):
    "Times the padded baseline."
    width, heads, layers = sizes[size]
    torch.manual_seed(0)
    model = Padded(width, heads, layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == 'cuda')
    batch = Plan(data, list(range(batch_size)), ('count', 'unifrac'), True, batch_size).batch(0, 0).to(device)
    tokens, mask = padded_batch(batch)
    truth = torch.nan_to_num(batch.unifrac)
    def step(i):
        with torch.autocast(device, torch.bfloat16, enabled=device == 'cuda'): distance, nuc = model(tokens, mask)
        ((distance - truth).square().mean() + nuc).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step(); optimizer.zero_grad(set_to_none=True)
    for i in range(warm): step(i)
    if device == 'cuda': torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, device, 0, repeats)
    return dict(seconds=seconds, alone=seconds, memory=peak_gb(device), asvs=distinct/seconds)

def epochs(size, device, frozen, groups=32, **options) -> dict:
    "Seconds of an epoch of `aam train` over 256 samples after the first two, loading and all; and the share of it spent waiting for batches."
    data = simulated_data(groups)
    data.target = np.random.default_rng(0).normal(size=(len(data.table), 1)).astype(np.float32)
    width, heads, layers = sizes[size]
    o = TrainingOptions(**options)
    tasks = ('target',) if frozen else ('target', 'count', 'unifrac', 'nuc')
    torch.manual_seed(0)
    model = Model(EncoderOptions(embedding_dim=width, attention_heads=heads, attention_layers=layers), tasks, 1, checkpointing=o.gradient_checkpointing, chunk_size=o.asv_chunk_size).to(device)
    plan = Plan(data, list(range(len(data.table))), tuple(v for v in ('target', 'count', 'unifrac') if v in tasks), not frozen, batch_size, training=True)
    prime(model, plan.batch(0, 0).to(device))
    if frozen: plan = KeptStates(plan, model.freeze_base(), device)
    if o.compile_model == 'on': compile_model(model)
    t = Training(model, Objective(dict.fromkeys(tasks, 1.), target_deviation=torch.ones(1), unifrac_variance=0.01), plan, plan, o, device=device)
    found = []
    for _ in range(2 + (4 if device == 'cuda' else 1)):
        found.append(train_epoch(t, 'regression')); t.epoch += 1
    best = min(found[2:], key=lambda line: line['seconds'])
    return dict(seconds=best['seconds'], waited=best['waited'])

def show(size, name, row, base=None):
    "One line."
    more = f"{row['tflops']:7.1f} TFLOP/s {100*row['share']:5.1f} %" if 'tflops' in row else ' '*24
    ratio = f"{base['seconds']/row['seconds']:6.1f} x" if base else ' '*8
    print(f"{size:<8} {name:<44} {1000*row['seconds']:9.1f} ms (alone {1000*row['alone']:8.1f}) {row['asvs']:9.0f} ASVs/s {row['memory']:7.2f} GB {more} {ratio}" + (f"  first step {row['first']:.1f} s" if 'first' in row else ''), flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--sizes', default='default,medium,large')
    p.add_argument('--what', default='baseline,fast,memory'); p.add_argument('--repeats', type=int); p.add_argument('--profile')
    p.add_argument('--compile', default=None)
    args = p.parse_args()
    device, what = args.device, args.what.split(',')
    warm, repeats = (5, args.repeats or 20) if device == 'cuda' else (0, args.repeats or 2)
    rate = matrix_rate(device)
    name = torch.cuda.get_device_name() if device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    print(f'{name}, torch {torch.__version__}: {rate:.0f} TFLOP/s measured in one matrix product', flush=True)
    data = simulated_data()
    on = args.compile or ('on' if device == 'cuda' else 'off')
    for size in args.sizes.split(','):
        base = None
        if 'baseline' in what: base = baseline_row(data, size, device, rate, min(warm, 1), 3 if device == 'cuda' else 1); show(size, 'padded baseline', base)
        free = dict(gradient_checkpointing=False, asv_chunk_size=0)
        if 'eager' in what: show(size, 'aam, --no-gradient-checkpointing, chunk 0', step_row(data, size, device, rate, warm, repeats, **free), base)
        if 'fast' in what: show(size, f'aam, the same, --compile-model {on}', step_row(data, size, device, rate, warm, repeats, compile_model=on, **free), base)
        if 'memory' in what: show(size, f'aam, checkpointing, chunk 256, compile {on}', step_row(data, size, device, rate, warm, repeats, compile_model=on), base)
        if 'frozen' in what:
            whole, frozen = epochs(size, device, False, compile_model=on), epochs(size, device, True)
            print(f"{size:<8} an epoch of 256 samples, guide's defaults, compile {on}: {whole['seconds']:.3f} s ({100*whole['waited']:.1f} % waiting for batches); frozen {frozen['seconds']:.3f} s: {whole['seconds']/frozen['seconds']:.0f} x", flush=True)
        if args.profile: profile(data, size, device, args.profile, compile_model=on, **free)

def profile(data, size, device, folder, **options):
    "Prints the kernels that take longest."
    from torch.profiler import ProfilerActivity, profile as profiler
    t = make_training(data, size, device, **options)
    batches = [t.train.batch(0, k).pin_memory() for k in range(len(t.train))]
    t.model.train()
    for i in range(8): train_step(t, [batches[i % len(batches)]], Meter())
    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        for i in range(4): train_step(t, [batches[i % len(batches)]], Meter())
        torch.cuda.synchronize()
    open(f'{folder}/{size}.txt', 'w').write(prof.key_averages().table(sort_by='self_cuda_time_total', row_limit=70, max_name_column_width=120) + '\n' +
                                            prof.key_averages().table(sort_by='self_cpu_time_total', row_limit=30, max_name_column_width=80))

if __name__ == '__main__': main()
