"""Prediction of many samples, beside a padded per-occurrence baseline on the same machine in the same run.

    python benchmarks/predict.py [--gpu] [--size default|medium|large] [--batch-size 64]

With --gpu 5,000 samples of 300 ASVs each, of 20,000 distinct ones of 150 bases; on a CPU a small fraction of that. Then more samples of the same ASVs, and more distinct ASVs.
`predict` is `Predictor.predict`, the table in memory, one rarefaction, in fp32; `encode` the part of it that encodes ASVs. On a CPU the peak is that of the process so far. The baseline runs every occurrence, padded to --token-limit 1024, through `torch.nn.TransformerEncoder`
of the same size in chunks of 256, in fp32, and then the samples; it is timed on a few samples and scaled to all, its table already on the device as tokens.
"""
import argparse, resource, statistics, time
import numpy as np
import torch
import torch.nn as nn
from scipy import sparse

from aam.config import EncoderOptions
from aam.inference import Predictor, Target
from aam.predictor import Model
from aam.session import pick_device
from aam.table import make_table
from aam.transforms import make_transform
from aam.vectors import encode_asvs

sizes = dict(default=(128, 4, 4), medium=(768, 6, 4), large=(1152, 12, 8))
richness, bases, token_limit = 300, 150, 1024

def simulated_table(samples:int, distinct:int, seed:int=0):
    "`samples` times 300 of `distinct` ASVs, some common and some rare; about 15,000 reads each."
    rng = np.random.default_rng(seed)
    stratum = distinct//richness
    asvs = np.arange(richness)*stratum + (stratum*rng.random((samples, richness))**2).astype(np.int64)
    counts = sparse.csr_matrix((rng.geometric(0.02, asvs.size), asvs.ravel(), np.arange(samples + 1)*richness), (samples, distinct))
    letters = np.frombuffer(b'ACGT', np.uint8)[rng.integers(0, 4, (distinct, bases))]
    return make_table(counts, [f's{i:05}' for i in range(samples)], letters.view(f'S{bases}')[:, 0].astype(str).tolist())

def make_predictor(size:str) -> Predictor:
    "An untrained model of one numeric column."
    torch.manual_seed(0)
    width, heads, layers = sizes[size]
    model = Model(EncoderOptions(embedding_dim=width, attention_heads=heads, attention_layers=layers), ('target',), 1)
    target = Target(['y'], transform=make_transform('zscore').fit(np.array([[0.], [1.]])), reference=[0.])
    return Predictor(model, target, dict(depth=5000, token_limit=token_limit, asv_sampling='abundance', rarefy_seed=42, seed=42))

class Padded(nn.Module):
    "Every occurrence encoded for itself."
    def __init__(self, width, heads, layers, chunk=256):
        super().__init__()
        stack = lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(width, heads, 4*width, 0., 'gelu', batch_first=True, norm_first=True), layers, enable_nested_tensor=False)
        self.embedding, self.position, self.chunk = nn.Embedding(7, width, 0), nn.Parameter(torch.randn(bases, width)*.02), chunk
        self.nucleotides, self.samples, self.encoder, self.out = stack(), stack(), stack(), nn.Linear(width, 1)

    def forward(self, tokens, mask): # (B, S, L), (B, S)
        x = torch.cat([self.nucleotides(self.embedding(c) + self.position).mean(1) for c in tokens.flatten(0, 1).split(self.chunk)]).unflatten(0, mask.shape)
        for stack in self.samples, self.encoder: x = stack(x, src_key_padding_mask=~mask)
        return self.out((x*mask[..., None]).sum(1)/mask.sum(1, keepdim=True))

def wait(device):
    if device == 'cuda': torch.cuda.synchronize()

def timed(run, device, repeats=1) -> float:
    "Median seconds of `run()`."
    seconds = []
    for _ in range(repeats):
        wait(device); start = time.perf_counter()
        run()
        wait(device); seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)

@torch.no_grad()
def baseline_seconds(size, data, device, samples) -> float:
    "Seconds of a sample of the padded baseline, from `samples` of them."
    model = Padded(*sizes[size]).to(device).eval()
    tokens = torch.from_numpy(data.tokens).to(device).int()
    def run():
        for i in range(0, samples, 8):
            rows = [torch.from_numpy(data.token_row[data.table.row(s)[0]]) for s in range(i, min(i + 8, samples))]
            padded, mask = torch.zeros(len(rows), token_limit, bases, dtype=torch.int, device=device), torch.zeros(len(rows), token_limit, dtype=torch.bool, device=device)
            for k, r in enumerate(rows): padded[k, :len(r)] = tokens[r.to(device)]; mask[k, :len(r)] = True
            model(padded, mask).cpu()
    if device == 'cuda': run() # warm
    return timed(run, device)/samples

def peak_gb(device): return torch.cuda.max_memory_allocated()/2**30 if device == 'cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20

def row(predictor, table, device, batch_size, baseline, repeats):
    "One line of the table."
    data = predictor.data(table)
    if device == 'cuda': torch.cuda.reset_peak_memory_stats()
    whole = timed(lambda: predictor.predict(table, batch_size=batch_size, device=device, passes=1), device, repeats)
    memory = peak_gb(device)
    encoding = timed(lambda: encode_asvs(predictor.model, data, np.arange(len(table)), device=device), device, repeats)
    padded = baseline*len(table)
    print(f'{len(table):>8,} {len(np.unique(table.counts.indices)):>9,} {whole:>10.2f} {encoding:>10.2f} {len(table)/whole:>11,.0f} {memory:>9.2f} {padded:>13,.1f} {padded/whole:>9.1f} x', flush=True)
    return padded/whole

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--gpu', action='store_true'); p.add_argument('--size', choices=sizes, default='default'); p.add_argument('--batch-size', type=int, default=64)
    args = p.parse_args()
    device = pick_device('cuda' if args.gpu else 'cpu')
    samples, distinct, timed_samples, repeats = (5000, 20_000, 32, 3) if args.gpu else (160, 1500, 1, 1)
    predictor = make_predictor(args.size)
    name = torch.cuda.get_device_name() if args.gpu else f'CPU, {torch.get_num_threads()} threads'
    print(f'{name}, torch {torch.__version__}, size {args.size} {sizes[args.size]}, fp32, batches of {args.batch_size}', flush=True)
    table = simulated_table(samples, distinct)
    if args.gpu: predictor.predict(table.select(table.sample_ids[:500]), batch_size=args.batch_size, device=device, passes=1) # warm
    baseline = baseline_seconds(args.size, predictor.data(table.select(table.sample_ids[:timed_samples])), device, timed_samples)
    print(f'padded baseline: {1000*baseline:.1f} ms a sample, timed on {timed_samples} and scaled to all\n')
    print(f"{'samples':>8} {'ASVs':>9} {'predict, s':>10} {'encode, s':>10} {'samples/s':>11} {'peak, GB':>9} {'baseline, s':>13} {'ratio':>11}")
    target = row(predictor, table, device, args.batch_size, baseline, repeats)
    print('batches of 8, as `aam predict` has them without --batch-size')
    row(predictor, table, device, 8, baseline, repeats)
    print('more samples of the same ASVs')
    for factor in (1/4, 1/2, 1, 2, 4): row(predictor, simulated_table(round(factor*samples), distinct), device, args.batch_size, baseline, 1)
    print('more distinct ASVs in as many samples')
    for factor in (1/4, 1/2, 1, 2): row(predictor, simulated_table(samples, round(factor*distinct)), device, args.batch_size, baseline, 1)
    print(f'\n{samples:,} samples, {richness} ASVs each of {distinct:,}: {target:.1f} times the baseline')

if __name__ == '__main__': main()
