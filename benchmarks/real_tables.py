"""aam beside Random Forest on real tables, on samples that nothing was fitted to or selected on.

    python benchmarks/real_tables.py --data ../shared/data --output runs/real [--tasks mouse_age,body_site] [--seeds 1] [--jobs 4]

For each task and seed: a fifth of the samples, whole subjects, is kept out as test; the rest is split into fit and stop,
and the same lists go to `pretrain`, `train` and `rf-baseline` (which is fitted on fit + stop). Prints one line per fit and a table,
and appends every figure to OUTPUT/results.jsonl. `--options` takes further options by fit, as JSON: {"pretrain": {"epochs": 8}}.
"""
import argparse, json, subprocess, sys, time
from pathlib import Path

tasks = {
    'mouse_age': dict(folder='mouse_age', column='age_weeks', group='host_id', classifier=False),
    'body_site': dict(folder='mackerel_body_site', column='body_site', group='host_id', classifier=True),
    'water_temp': dict(folder='mackerel_body_site', column='water_temp_c', group='host_id', classifier=False),
}

def write_lists(task:dict, data:Path, seed:int, out:Path) -> dict:
    "Sample lists of the three parts, whole groups together."
    from aam.metadata import hold_out, read_metadata, write_ids
    frame = read_metadata(data/task['folder']/'metadata.tsv')
    frame = frame[frame[task['column']].notna()]
    groups = frame[task['group']].to_dict()
    classes = frame[task['column']].to_dict() if task['classifier'] else None
    rest, test = hold_out(frame.index, 0.2, seed, groups, classes)
    fit, stop = hold_out(rest, 0.2, seed, groups, classes)
    for name, ids in dict(train=fit, val=stop, test=test).items(): write_ids(ids, out/f'{name}.txt')
    return {f'{name}_samples': out/f'{name}.txt' for name in ('train', 'val', 'test')}

def one(name:str, seed:int, args):
    "All fits of one task and seed; prints a JSON line each."
    import torch
    from aam.pretrain import pretrain
    from aam.train import train
    task, out = tasks[name], Path(args.output)/f'{name}_{seed}'
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(args.data)/task['folder']
    lists = write_lists(task, Path(args.data), seed, out)
    inputs = dict(table=folder/'table.biom', tree=folder/'tree.nwk')
    target = dict(metadata=folder/'metadata.tsv', metadata_column=task['column'], classifier=task['classifier'])
    more = dict(preset='small', seed=seed, overwrite=True)
    def tell(fit, **values): print('RESULT ' + json.dumps(dict(task=name, seed=seed, fit=fit, **values)), flush=True)

    def timed(fit, function, **options):
        if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run = function(**inputs, **lists, **more, output_dir=out/fit, **options)
        lines = [json.loads(line) for line in (out/fit/'metrics.jsonl').read_text().splitlines()]
        scores = run.scores.get('test', run.scores['validation'])
        tell(fit, seconds=time.perf_counter() - start, epochs=len(lines), seconds_per_epoch=sorted(line['seconds'] for line in lines)[len(lines)//2],
             peak_gb=torch.cuda.max_memory_allocated()/2**30 if torch.cuda.is_available() else None, **scores)
        return run

    if 'rf' in args.fits:
        from aam.rf_baseline import rf_baseline
        run = rf_baseline(table=inputs['table'], **target, **lists, output=out/'rf.tsv', overwrite=True, n_jobs=2)
        tell('rf', **run.scores)
    if 'pretrain' in args.fits: timed('pretrain', pretrain, **args.options.get('pretrain', {}))
    if 'tuned' in args.fits: timed('tuned', train, **args.options.get('tuned', {}), **target, pretrained_encoder=out/'pretrain/checkpoints/best_model.pt')
    if 'frozen' in args.fits: timed('frozen', train, **args.options.get('frozen', {}), **target, pretrained_encoder=out/'pretrain/checkpoints/best_model.pt', freeze_base=True)
    if 'scratch' in args.fits: timed('scratch', train, **args.options.get('scratch', {}), **target)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default='../shared/data'); p.add_argument('--output', required=True)
    p.add_argument('--tasks', default='mouse_age,body_site'); p.add_argument('--seeds', type=int, default=1); p.add_argument('--jobs', type=int, default=2)
    p.add_argument('--fits', default='rf,pretrain,tuned'); p.add_argument('--options', type=json.loads, default={})
    p.add_argument('--one', help=argparse.SUPPRESS)
    args = p.parse_args()
    args.fits = args.fits.split(',')
    if args.one:
        name, seed = args.one.split(':')
        return one(name, int(seed), args)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    waiting, running, results = [f'{t}:{s}' for s in range(args.seeds) for t in args.tasks.split(',')], [], []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            job = waiting.pop(0)
            log = open(Path(args.output)/f"{job.replace(':', '_')}.log", 'w')
            running.append((job, log.name, subprocess.Popen([sys.executable, *sys.argv, '--one', job], stdout=log, stderr=subprocess.STDOUT)))
        for r in [r for r in running if r[2].poll() is not None]:
            running.remove(r)
            text = Path(r[1]).read_text()
            if r[2].returncode: print(f'{r[0]} failed:\n{text[-2000:]}')
            results += [json.loads(line.removeprefix('RESULT ')) for line in text.splitlines() if line.startswith('RESULT ')]
        time.sleep(0.2)
    with open(Path(args.output)/'results.jsonl', 'a') as f: f.writelines(json.dumps(r) + '\n' for r in results)
    shown = 'r2', 'mae', 'accuracy', 'f1', 'unifrac_r2', 'unifrac_reachable_r2', 'nuc_accuracy', 'nuc_majority_accuracy', 'epochs', 'seconds_per_epoch', 'peak_gb', 'seconds'
    for r in sorted(results, key=lambda r: (r['task'], r['seed'], r['fit'])):
        print(f"{r['task']:<11}{r['seed']:>2} {r['fit']:<9}" + '  '.join(f'{k} {r[k]:.3f}' for k in shown if isinstance(r.get(k), (int, float))))

if __name__ == '__main__': main()
