"""Time, memory and arithmetic of a training step, beside a padded baseline on the same machine in the same run.

    python benchmarks/speed.py [--device cuda] [--sizes default,medium,large] [--what baseline,eager,fast,memory,frozen,limits,tree] [--profile FOLDER]

A batch is 8 samples with 2,175 ASV occurrences of 1,200 distinct ASVs of 150 bases, a tenth of them masked; a step is forward, backward and optimizer of
`aam pretrain`. `model TFLOP/s` counts the matrix products that the batch needs (no padding, no recomputing); its share is that of an 8192 x 8192 bf16 product timed here.
The baseline encodes every occurrence, padded to --token-limit 1024, by `torch.nn.TransformerEncoder` in chunks of 256 with checkpointing, at the same precision.
"""
import argparse, json, re, resource, statistics, tempfile, time
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.sparse import coo_matrix
from torch.utils.checkpoint import checkpoint

from aam.config import EncoderOptions, TrainingOptions
from aam.data import Plan, SampleData, draws_to_csr, true_unifrac, view_draw
from aam.losses import Objective
from aam.monitor import Meter
from aam.predictor import Model, prime
from aam.session import pick_device
from aam.simulate import newick, yule_tree
from aam.states import KeptStates
from aam.table import make_table
from aam.trainer import Training, compile_model, train_epoch, train_step
from aam.unifrac import Distances, read_tree, unifrac_distances

sizes = dict(default=(128, 4, 4), medium=(768, 6, 4), large=(1152, 12, 8))
batch_size, occurrences, distinct, bases = 8, 2175, 1200, 150

def tree_branches(tree, sequences):
    "Branches of a simulated tree, by way of a file."
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder)/'tree.nwk').write_text(newick(tree, sequences))
        return read_tree(Path(folder)/'tree.nwk', sequences)

def simulated_data(groups:int=4, seed:int=0, **how) -> SampleData:
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
    return SampleData(table, depth=int(table.reads.min()), max_bp=bases, branches=tree_branches(tree, table.sequences), **how)

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
    "Floating-point operations of the matrix products of a mean step, backward twice the forward; of an ASV's last block the last product is taken once, of the mean of its bases."
    total = 0.
    for b in batches:
        asvs = int((b.asv_weight > 0).sum())
        copies = sum(masked for _, masked, _ in b.groups)
        lengths = b.mask[b.rows('count')].sum(1).float()
        block = lambda tokens, squares: layers*(24*width**2*tokens + 4*width*squares)
        total += block((asvs + copies)*bases, (asvs + copies)*bases**2) - 8*width**2*asvs*(bases - 1) + 2*block(float(lengths.sum()), float(lengths.square().sum()))
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

def peak_gb(device): return torch.cuda.max_memory_allocated()/2**30 if device == 'cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20 # on a CPU that of the whole process

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
    used = time.process_time()
    steady = pipelined(step, device, repeats)
    used = (time.process_time() - used)/repeats
    return dict(cpu=used, seconds=steady, alone=seconds, memory=peak_gb(device), tflops=flops/steady/1e12, share=flops/steady/1e12/rate, asvs=distinct/steady, first=first)

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

def epochs(size, device, frozen, data, **options) -> dict:
    "Seconds of an epoch of `aam train` over 256 samples after the first two, loading and all; and the share of it spent waiting for batches."
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
        found.append(train_epoch(t, 'regression')); t.next_epoch()
    best = min(found[2:], key=lambda line: line['seconds'])
    return dict(seconds=best['seconds'], waited=best['waited'])

def large_tree(tips:int, samples:int=256, asvs:int=300) -> SampleData:
    "Samples of `asvs` of the tips of a large tree."
    rng = np.random.default_rng(0)
    sequences = [''.join(s) for s in np.array(list('ACGT'))[rng.integers(0, 4, (tips, bases))]]
    rows, columns = np.repeat(np.arange(samples), asvs), np.concatenate([rng.choice(tips, asvs, replace=False) for _ in range(samples)])
    counts = coo_matrix((rng.geometric(0.02, len(rows)), (rows, columns)), shape=(samples, tips)).tocsr()
    table = make_table(counts, [f's{i:03}' for i in range(samples)], sequences)
    tree = yule_tree(len(table.sequences), rng)
    return SampleData(table, depth=int(table.reads.min()), max_bp=bases, branches=tree_branches(tree, table.sequences))

def tree_cost(size, device, tips:int=20_000, samples:int=256, **options):
    "An epoch of all tasks with distances from a large tree, beside the same with distances from a file; and a batch of distances by itself."
    data = large_tree(tips, samples)
    draws = [view_draw(data, 'unifrac', i, 0, True) for i in range(batch_size)]
    began = time.perf_counter()
    for _ in range(20): true_unifrac(data, range(batch_size), draws)
    alone = (time.perf_counter() - began)/20
    counts = draws_to_csr([view_draw(data, 'unifrac', i, 0, True) for i in range(len(data.table))], tips)
    matrix = unifrac_distances(counts, data.branches).astype(np.float32)
    from_tree = epochs(size, device, False, data, **options)
    from_file = epochs(size, device, False, replace(data, branches=None, distances=Distances(list(data.table.sample_ids), matrix)), **options)
    steps = -(-len(data.table) // batch_size)
    print(f"{size:<8} an epoch of {len(data.table)} samples, distances from a tree of {tips:,} tips {from_tree['seconds']:.3f} s ({100*from_tree['waited']:.1f} % waiting), from a file {from_file['seconds']:.3f} s "
          f"({100*from_file['waited']:.1f} %): {100*(from_tree['seconds']/from_file['seconds'] - 1):+.1f} %; distances of a batch {1000*alone:.2f} ms on one core, a step {1000*from_tree['seconds']/steps:.1f} ms", flush=True)

def show(size, name, row, base=None):
    "One line."
    more = f"{row['tflops']:7.1f} TFLOP/s {100*row['share']:5.1f} %" if 'tflops' in row else ' '*24
    ratio = f"{base['seconds']/row['seconds']:6.1f} x" if base else ' '*8
    if 'cpu' in row and not torch.cuda.is_available(): more += f" {row['cpu']:.1f} CPU-s"
    print(f"{size:<8} {name:<44} {1000*row['seconds']:9.1f} ms (alone {1000*row['alone']:8.1f}) {row['asvs']:9.0f} ASVs/s {row['memory']:7.2f} GB {more} {ratio}" + (f"  first step {row['first']:.1f} s" if 'first' in row else ''), flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--sizes', default='default,medium,large')
    p.add_argument('--what', default='baseline,fast,memory'); p.add_argument('--repeats', type=int); p.add_argument('--profile')
    p.add_argument('--compile', default=None)
    args = p.parse_args()
    device, what = pick_device(args.device), args.what.split(',')
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
        if 'fast' in what:
            row = step_row(data, size, device, rate, warm, repeats, compile_model=on, **free)
            show(size, f'aam, the same, --compile-model {on}', row, base)
        if 'memory' in what: show(size, f'aam, checkpointing, chunk 256, compile {on}', step_row(data, size, device, rate, warm, repeats, compile_model=on), base)
        if 'frozen' in what:
            whole, frozen = epochs(size, device, False, simulated_data(32), compile_model=on), epochs(size, device, True, simulated_data(32))
            print(f"{size:<8} an epoch of 256 samples, guide's defaults, compile {on}: {whole['seconds']:.3f} s ({100*whole['waited']:.1f} % waiting for batches); frozen {frozen['seconds']:.3f} s: {whole['seconds']/frozen['seconds']:.0f} x", flush=True)
        if 'limits' in what:
            for limit in 512, 1024, 4096, 16384: show(size, f'aam, compile {on}, --token-limit {limit}', step_row(simulated_data(token_limit=limit), size, device, rate, warm, repeats, compile_model=on, **free))
        if 'tree' in what: tree_cost(size, device, compile_model=on)
        if args.profile and 'fast' in what: profile(data, size, device, args.profile, row, rate, compile_model=on, **free)

kinds = {
    'attention': 'sdpa|flash|fmha|_forward|_backward_kernel|^_backward|dot_do_o|dq_to_16',
    'optimizer': 'multi_tensor_apply|adam',
    'matrix products': 'nvjet|gemm|cublas|splitk|xmma|gemv',
    'norms, activations, sums (fused)': 'triton_',
    'look-ups and their gradients': 'embedding|index|scatter|gather|sort|compute_grad|sum_and',
    'copies and fills': 'memcpy|memset|copy|fill',
}

def kernel_times(events) -> dict:
    "Milliseconds on the GPU by kind of kernel."
    found = dict.fromkeys([*kinds, 'other'], 0.)
    for e in events:
        if e.device_type.name == 'CUDA' and not e.is_user_annotation:
            kind = next((kind for kind, pattern in kinds.items() if re.search(pattern, e.key, re.IGNORECASE)), 'other')
            found[kind] += e.self_device_time_total/1000
    return found

def profile(data, size, device, folder, row, rate, **options):
    "Kernels that take longest, as text; and time by kind of kernel beside the step's arithmetic in FOLDER/profile.json, which the docs show."
    from torch.profiler import ProfilerActivity, profile as profiler
    t, steps = make_training(data, size, device, **options), 4
    batches = [t.train.batch(0, k).pin_memory() for k in range(len(t.train))]
    t.model.train()
    for i in range(8): train_step(t, [batches[i % len(batches)]], Meter())
    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        for i in range(steps): train_step(t, [batches[i % len(batches)]], Meter())
        torch.cuda.synchronize()
    events = prof.key_averages()
    (Path(folder)/f'{size}.txt').write_text(events.table(sort_by='self_cuda_time_total', row_limit=70, max_name_column_width=120))
    width, _, layers = sizes[size]
    path = Path(folder)/'profile.json'
    known = json.loads(path.read_text()) if path.exists() else {}
    known[size] = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, step_ms=1000*row['seconds'], tflops=row['tflops'], matrix_rate=rate, copy_rate=copy_rate(device),
                       bytes_gb=least_bytes(width, layers, batches)/1e9, kernels_ms={k: v/steps for k, v in kernel_times(events).items()})
    path.write_text(json.dumps(known, indent=1) + '\n')

def copy_rate(device) -> float:
    "TB/s of a large copy, bytes read and written."
    x = torch.randn(2**28, device=device)
    y = torch.empty_like(x)
    return 2*x.nbytes/timed(lambda i: y.copy_(x), device)/1e12

def least_bytes(width, layers, batches) -> float:
    "Bytes that blocks read and write if each of their operations takes a pass of its own over bf16 numbers: forward 38 widths a token and layer, backward twice that."
    tokens = sum((int((b.asv_weight > 0).sum()) + sum(masked for _, masked, _ in b.groups))*bases + 2*int(b.mask[b.rows('count')].sum()) for b in batches)/len(batches)
    return 3*38*width*2*tokens*layers

if __name__ == '__main__': main()
