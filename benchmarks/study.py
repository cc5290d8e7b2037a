"""Is aam better than the best baseline, what does each of its parts bring, and does pre-training save labels?

    python benchmarks/study.py --data ../shared/data --part main --jobs 8 --minutes 25
    python benchmarks/study.py --data ../shared/data --part main ablations labels repeats --jobs 32 --minutes 25 # all, in this order
    python benchmarks/study.py --data ../shared/data --part main --what baselines      # no GPU needed
    python benchmarks/study.py --data ../shared/data --page                            # only writes the page again

Tasks, folds, seeds, variants and label shares are in `study/tasks.json`. Folds, baselines and statistics are those of `aam evaluate`.
Each finished fit is a line of `study/results.jsonl`; what is there is not fitted again, unless its options have changed, or
`recipe` in the tasks, which is to be raised when the same options mean another model. A fit is only
started if it should end within `--minutes`. `study/results.md`, its pictures and `scores.json`, which the docs draw, are written at the end; what is missing is "not run".
`--jobs` are all fits at a time; where there are several GPUs they are dealt over these, and cores over the fits, so one command does it.
`--results FOLDER` writes elsewhere, going on from what `study/` holds. Files of runs and encoders go to `--work`.
"""
import argparse, hashlib, json, logging, shutil, time
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from aam.config import build_options
from aam.comparison import aam_name, averaged_name, compare_methods, difference, gather, part_names, sample_scores, score_names, stacked_name, training_means
from aam.fits import add_record, make_jobs, movable, read_records, record_key, run_jobs
from aam.folds import Evaluation, option_groups, pretrain_given
from aam.metadata import read_metadata
from aam.pretrain import pretrain

here = Path(__file__).parent/'study'
paths = {'table', 'tree', 'unifrac_matrix', 'sequences', 'metadata', 'output_dir', 'pretrained_encoder'}


def chosen_rows(frame, where:dict):
    "The samples that a task is about: a column equals a word, or is above a number."
    for column, wanted in where.items():
        values = frame[column]
        frame = frame[values.astype(float) > float(wanted[1:])] if wanted.startswith('>') else frame[values == wanted]
    return frame

def few_labels(fold, share:float, classes:dict, seed:int):
    "`fold` with a share of the labels of each class, at least two in all; a smaller share is part of a larger one."
    def some(ids):
        ids = [ids[i] for i in np.random.default_rng(seed + fold.fold).permutation(len(ids))]
        members, place = {}, {}
        for s in ids: members.setdefault(classes.get(s), []).append(s)
        for same in members.values(): place |= {s: (i + .5)/len(same) for i, s in enumerate(same)}
        return sorted(sorted(ids, key=place.get)[:max(2, round(share*len(ids)))])
    return fold if share == 1 else replace(fold, fit=some(fold.fit), stop=some(fold.stop))

def digest(*made_of) -> str: return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:12]

def unusual(options:dict) -> dict:
    "Resolved options that differ from the defaults: new options of later versions do not make old results stale."
    return {f.name: getattr(o, f.name) for o in options.values() for f in fields(o) if f.name not in movable | paths | {'preset'} and getattr(o, f.name) != f.default}


class Cell:
    "One variant of aam on one task, with a share of the labels; and the baselines of that task."
    def __init__(self, study, part:str, task:str, variant:str, share:float=1., repeats:int=None):
        self.study, self.part, self.task, self.variant, self.share = study, part, task, variant, share
        self.plan, self.about = study.tasks['parts'][part], study.tasks['tasks'][task]
        self.repeats = repeats or self.plan['repeats']

    @cached_property
    def options(self):
        a, folder = self.about, self.study.args.data/self.about['folder']
        given = dict(self.study.tasks['options'], table=folder/'table.biom', tree=folder/'tree.nwk', metadata=self.study.metadata(self.task), metadata_column=a['column'], classifier=a.get('classifier', False),
                     group_column=a['group'], technical_columns=a.get('technical'), folds=min(self.plan['folds'], a.get('folds', 99)), repeats=self.repeats, seeds=self.plan['seeds'],
                     output_dir=self.folder, device=self.study.args.device)
        given |= self.plan['variants'][self.variant]
        return build_options(option_groups, {k: v for k, v in given.items() if v is not None})

    @property
    def folder(self): return self.study.args.work/digest(self.part, self.task, self.variant, self.share)
    @cached_property
    def stamps(self) -> dict:
        "What a record must have been made of to count; baselines do not depend on how aam is fitted."
        everything = unusual(self.options)
        own = {k: everything.get(k) for k in ('metadata_column', 'classifier', 'group_column', 'technical_columns', 'folds', 'seed', 'test_size', 'n_estimators', 'rarefy_depth', 'rarefy_seed', 'unifrac_metric', 'categorical_columns')}
        for name in ('repeats', 'seeds', 'pretrain_options'): everything.pop(name, None) # more of the first two leave the first as they are; the third is resolved here
        pretraining = pretrain_given(self.options) if self.options['evaluation'].pretrain else None
        if pretraining: pretraining = unusual(build_options(pretrain.groups, {**pretraining, 'output_dir': self.folder}))
        about = {k: v for k, v in self.about.items() if k != 'primary'}
        return dict(baselines=digest(own, about, self.share), aam=digest(everything, pretraining, about, self.share, self.study.tasks.get('recipe')))

    @cached_property
    def evaluation(self):
        e = Evaluation(self.options)
        names = {s: e.classes[c] for s, c in zip(e.ids, e.y)} if e.classes else {}
        e.plan = [few_labels(f, self.share, names, e.options['evaluation'].seed) for f in e.whole]
        return e

    def records(self, all_records) -> list: return [r for r in all_records if r['stamp'] == self.stamps[r['kind']] and r['task'] == self.task]

    def finished(self, all_records):
        "The same with the repeats of which all fits are there; None if that is none."
        there = {record_key(r)[:3] for r in self.records(all_records)}
        whole = [all((k, r, f) in there for k in ('aam', 'baselines') for f in range(self.plan['folds'])) for r in range(self.repeats)]
        n = (whole + [False]).index(False)
        return Cell(self.study, self.part, self.task, self.variant, self.share, n) if n else None

    def jobs(self, kinds, all_records) -> list:
        done = {record_key(r) for r in self.records(all_records)}
        wanted = len(self.evaluation.plan)*(self.plan['seeds']*('aam' in kinds) + ('baselines' in kinds)) if kinds else 0
        return [j for j in make_jobs(self.evaluation, kinds, self.folder, self.study.args.work/'encoders') if j.key not in done] if wanted else []

    @cached_property
    def rows(self) -> dict:
        "Scores by method, as far as their fits are there."
        return compare_methods(self.evaluation, self.predictions)
    @cached_property
    def predictions(self): return gather(self.evaluation, self.records(self.study.records))[0]

    def each(self, name:str):
        "Scores by repeat and sample of one method, (R, N); None if fits are missing."
        p, e = self.predictions.get(name), self.evaluation
        if p is None or not np.isfinite(p).all(): return None
        means = None if e.classes else training_means(e)
        return np.array([np.mean([sample_scores(e, one, None if means is None else means[r]) for one in repeat], 0) for r, repeat in enumerate(p)])


class Study:
    def __init__(self, args):
        self.args, self.tasks = args, json.loads(args.tasks.read_text())
        args.results.mkdir(parents=True, exist_ok=True); args.work.mkdir(parents=True, exist_ok=True)
        self.path = args.results/'results.jsonl'
        if not self.path.exists() and (here/'results.jsonl').exists(): shutil.copy(here/'results.jsonl', self.path)
        self.records, self.cells = read_records(self.path), {}

    def metadata(self, task:str) -> Path:
        "The metadata of the samples that a task is about, as a file."
        about = self.tasks['tasks'][task]
        path = self.args.work/f'{digest(about["folder"], about.get("where"))}.tsv'
        if not path.exists(): chosen_rows(read_metadata(self.args.data/about['folder']/'metadata.tsv'), about.get('where', {})).to_csv(path, sep='\t')
        return path

    def part(self, part:str) -> list:
        "The cells of a part: task by task, shares within variants."
        plan = self.tasks['parts'][part]
        keys = [(part, t, v, s) for s in plan.get('shares', [1.]) for v in plan['variants'] for t in plan.get('tasks', self.tasks['tasks'])]
        for k in keys: self.cells.setdefault(k, Cell(self, *k))
        return [self.cells[k] for k in keys]

    def run(self):
        "Fits what is missing, within the time."
        args, stop_at, took = self.args, time.time() + 60*self.args.minutes, {}
        jobs, cell_of, begun = [], {}, set()
        kinds = args.what.split(',')
        for kind in [k for k in ('aam', 'baselines') if k in kinds]: # a GPU does not wait for forests
            for cell in [cell for part in args.part for cell in self.part(part)]:
                if args.only and cell.task not in args.only.split(','): continue
                for job in cell.jobs([kind], self.records):
                    fit = cell.task, cell.stamps[kind], job.key # which cells share
                    if fit in begun: continue
                    begun.add(fit); cell_of[job.key, job.folder] = cell
                    jobs.append(job)
        print(f'{len(jobs)} fits to do', flush=True)
        def expected(job): return max(took.get(job.kind, [self.tasks['guess_seconds'][job.kind]]))
        def may_start(job): return time.time() + 1.15*expected(job) < stop_at
        def finished(job, record):
            cell = cell_of[job.key, job.folder]
            if isinstance(record, Exception): return print(f'FAILED {cell.task}, {cell.variant}, {job.name}: {record}', flush=True)
            took.setdefault(job.kind, []).append(record['seconds'])
            record = dict(part=cell.part, task=cell.task, variant=cell.variant if job.kind == 'aam' else None, share=cell.share, stamp=cell.stamps[job.kind], **record)
            add_record(self.path, record); self.records.append(record)
            print(f"{cell.task}, {cell.variant if job.kind == 'aam' else 'baselines'}, {100*cell.share:g} % of labels, fold {job.fold.fold + 1}: {record['seconds']:.0f} s, {(stop_at - time.time())/60:.1f} min left", flush=True)
        run_jobs(jobs, args.jobs, finished, may_start, go_on=True)
        left = len(jobs) - sum(map(len, took.values()))
        if left: print(f'{left} fits left (no time, or failed): the same command goes on', flush=True)


# ---- the page

def shown(value, digits='.3f'): return 'not run' if value is None else format(value, digits)

def with_interval(d) -> str:
    if d is None: return 'not run'
    return f"{d['difference']:+.3f}" + (' (too few groups for an interval)' if d['low'] is None else f" ({d['low']:+.3f} to {d['high']:+.3f}), p {d['p']:.2g}")

def judged(row, score:str) -> str:
    "What the interval says of the aim: better, or within 0.03 accuracy or 0.05 R2 by its lower end."
    margin = dict(accuracy=.03, r2=.05)[score]
    if row['low'] is None: return 'too few groups'
    if row['low'] > 0: return '**better**'
    return f'within {margin}' if row['low'] > -margin else '**missed**'

def markdown(head, rows) -> str: return '\n'.join('| ' + ' | '.join(map(str, r)) + ' |' for r in [head, ['---']*len(head), *rows])

def main_page(study) -> str:
    lines, all_rows = [], []
    for cell in study.part('main'):
        rows, score = cell.rows, cell.evaluation.score
        base = rows.get('best baseline')
        name = cell.task if cell.about.get('primary') else f'{cell.task} (secondary)'
        for method in (aam_name, stacked_name):
            row = rows.get(method)
            there = row is not None and base is not None
            lines.append([name, method, score_names[score], shown(row and row[score]), shown(base and base[score]), with_interval(row if there else None), judged(row, score) if there else 'not run'])
        all_rows.append((cell, rows))
    methods = list(dict.fromkeys(m for _, rows in all_rows for m in sorted(rows, key=lambda m: -rows[m][cell_score(rows[m])])))
    table = [[m, *(shown(rows[m][c.evaluation.score]) if m in rows else 'not run' if m in (aam_name, stacked_name) or not rows else '-' for c, rows in all_rows)] for m in methods]
    return '\n\n'.join(['## Main study', markdown(['task', 'method', 'score', 'its score', 'best baseline', 'difference (95 %)', 'aim'], lines), '![](main.png)',
                        'All methods (accuracy or R2):', markdown(['method', *(c.task for c, _ in all_rows)], table)])

def repeats_page(study) -> str:
    "Tasks whose samples are dealt into folds several times, with the repeats that are finished."
    lines = []
    for cell in study.part('repeats'):
        found, score = cell.finished(study.records), cell.evaluation.score
        for method in (aam_name, stacked_name):
            row = found and found.rows.get(method)
            lines.append([cell.task, method, found.repeats if found else 0, *([score_names[score], shown(row[score]), shown(found.rows['best baseline'][score]), with_interval(row), judged(row, score)] if row else [score_names[score], *['not run']*4])])
    return '## Repeats\n\n' + markdown(['task', 'method', 'repeats', 'score', 'its score', 'best baseline', 'difference (95 %)', 'aim'], lines)

learnt = dict(unifrac_r2='R2 of distances', nuc_accuracy='masked bases')

def pretrained(cell) -> dict:
    "Means over the fits of `cell`, if none is missing, of what all of them learnt in pre-training."
    found = [r['pretraining'] for r in cell.records(cell.study.records) if r.get('pretraining')] if cell.each(aam_name) is not None else []
    return {k: float(np.mean([p[k] for p in found])) for k in [*learnt, 'unifrac_reachable_r2'] if found and all(p.get(k) is not None for p in found)}

def pretraining_page(study) -> str:
    "How well distances between samples of other groups are predicted, over the folds."
    lines = []
    for cell in study.part('main'):
        means = pretrained(cell)
        lines.append([cell.task, sum(r['kind'] == 'aam' for r in cell.records(study.records)), *(shown(means.get(key)) for key in ('unifrac_r2', 'unifrac_reachable_r2', 'nuc_accuracy'))])
    return '## Pre-training\n\nR2 of UniFrac distances between the samples that stop training (whole groups that it is not fitted on), encoder and tree seeing the same rarefaction; what another rarefaction of the same samples reaches; share of the masked bases that are right. Means over folds.\n\n' + \
        markdown(['task', 'folds', 'R2', 'another rarefaction', 'masked bases'], lines)

def cell_score(row): return 'accuracy' if 'accuracy' in row else 'r2'

def variants_table(study, part:str, method:str) -> str:
    "Scores of `method` in each variant beside the first, which has everything on."
    cells, plan, lines = study.part(part), study.tasks['parts'][part], []
    base = next(iter(plan['variants']))
    def each(cell): return cell.each(method if cell.options['target'].linear_start else aam_name) # without a start there is one part
    for variant in plan['variants']:
        line = [variant]
        for task in plan['tasks']:
            whole, cell = (next(c for c in cells if (c.task, c.variant) == (task, v)) for v in (base, variant))
            ours, theirs = each(cell), each(whole)
            line.append(shown(None if ours is None else ours.mean()))
            line.append('' if variant == base else with_interval(None if ours is None or theirs is None else difference(cell.evaluation, theirs, ours)))
        lines.append(line)
    return markdown(['variant', *(h for task in plan['tasks'] for h in (task, f'{base} - variant (95 %)'))], lines)

def pretraining_table(study, part:str) -> str:
    plan, lines = study.tasks['parts'][part], []
    cells = {(c.task, c.variant): c for c in study.part(part)}
    for variant in plan['variants']:
        found = [pretrained(cells[task, variant]) for task in plan['tasks']]
        lines.append([variant, *(shown(f[k]) if k in f else '-' for f in found for k in learnt)])
    return markdown(['variant', *(f'{task}: {name}' for task in plan['tasks'] for name in learnt.values())], lines)

def variants_page(study, part:str, title:str) -> str:
    plan = study.tasks['parts'][part]
    return '\n\n'.join([f'## {title}', f"A difference above 0 means that what the variant lacks helps. {plan['folds']} folds, {plan['seeds']} seed{'s'*(plan['seeds'] > 1)}. What aam predicts:", variants_table(study, part, aam_name),
                        'What it learnt from sequences, by itself:', variants_table(study, part, part_names['sequences']),
                        'What was learnt in pre-training, as above:', pretraining_table(study, part)])

def labels_page(study) -> str:
    plan, texts = study.tasks['parts']['labels'], []
    cells = {(c.task, c.variant, c.share): c for c in study.part('labels')}
    variants, full = [*plan['variants']], plan['shares'][0]
    def mean(cell, method): return None if (each := cell.each(method)) is None else each.mean()
    for task in plan['tasks']:
        rows = [[f'{100*share:g} %', *(shown(mean(cells[task, v, share], method)) for method in (aam_name, part_names['sequences']) for v in variants), shown(mean(cells[task, variants[0], share], 'best baseline'))] for share in sorted(plan['shares'])]
        score = score_names[cells[task, variants[0], full].evaluation.score]
        texts.append(f'{task}, {score}:\n\n' + markdown(['labels', *variants, *(f'{v}: sequences by itself' for v in variants), 'best baseline'], rows))
    return '\n\n'.join(['## Labels', f"{plan['folds']} folds.", *texts, '![](labels.png)'])

def numbers(study) -> dict:
    "The scores of the page, for the docs: one row for each task (and repeat count), variant, or share of the labels."
    def row(cell, methods):
        found = dict(task=cell.task, score=score_names[cell.evaluation.score])
        return found | {m: round(float(each.mean()), 6) for m in methods if (each := cell.each(m)) is not None}
    def compared(cell):
        keep = lambda r: {k: r[k] and round(float(r[k]), 6) for k in ('difference', 'low', 'high', 'p') if k in r}
        return dict(row(cell, list(cell.rows)), primary=bool(cell.about.get('primary')), compared={m: keep(cell.rows[m]) for m in (aam_name, stacked_name) if m in cell.rows})
    ours = [aam_name, averaged_name, part_names['sequences']]
    def learning(cell): return {k: round(v, 6) for k, v in pretrained(cell).items() if k in learnt}
    return dict(main=[compared(c) | learning(c) for c in study.part('main')],
                repeats=[dict(compared(f), repeats=f.repeats) for c in study.part('repeats') if (f := c.finished(study.records))],
                ablations=[dict(row(c, ours), variant=c.variant, **learning(c)) for c in study.part('ablations')],
                labels=[dict(row(c, [*ours, 'best baseline']), variant=c.variant, share=c.share) for c in study.part('labels')])

def main_figure(study):
    "aam and aam + trees against the best baseline, with intervals."
    from matplotlib.figure import Figure
    from aam.figures import blue, grey, vermillion
    cells = study.part('main')
    figure = Figure((8.5, 1 + .55*len(cells)), layout='constrained')
    axes = figure.add_subplot()
    for i, cell in enumerate(cells):
        for name, colour, shift in ((aam_name, blue, -.12), (stacked_name, vermillion, .12)):
            row = cell.rows.get(name)
            if not row or 'difference' not in row:
                axes.annotate('not run', (0, i + shift), (4, 0), textcoords='offset points', va='center', fontsize=8, color=grey)
                continue
            if row['low'] is not None: axes.plot([row['low'], row['high']], [i + shift]*2, color=colour, linewidth=2)
            axes.plot(row['difference'], i + shift, 'o', color=colour, label=name)
    axes.axvline(0, color=grey, linestyle='--', linewidth=1, zorder=0)
    axes.set_yticks(range(len(cells)), [f'{c.task}\n({score_names[c.evaluation.score]})' for c in cells], fontsize=9)
    axes.set_ylim(len(cells) - .5, -.5)
    axes.set_xlabel('difference to the best baseline (95 % interval)')
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1]))
    if handles: figure.legend(handles.values(), handles.keys(), loc='outside upper right', ncols=2, frameon=False, fontsize=9)
    axes.spines[['top', 'right']].set_visible(False)
    return figure

def labels_figure(study):
    "Scores by share of the labels."
    from matplotlib.figure import Figure
    plan = study.tasks['parts']['labels']
    cells = {(c.task, c.variant, c.share): c for c in study.part('labels')}
    figure = Figure((4.6*len(plan['tasks']), 3.8), layout='constrained')
    for i, task in enumerate(plan['tasks']):
        axes = figure.add_subplot(1, len(plan['tasks']), i + 1)
        score = score_names[cells[task, next(iter(plan['variants'])), plan['shares'][0]].evaluation.score]
        axes.set_title(task, fontsize=10, loc='left')
        for v, style in zip([*plan['variants'], 'best baseline'], ('o-', 's-', '^-', 'D--')):
            variant, method = (next(iter(plan['variants'])), v) if v == 'best baseline' else (v, aam_name)
            points = [(100*s, each.mean()) for s in sorted(plan['shares']) if (each := cells[task, variant, s].each(method)) is not None]
            axes.plot(*zip(*points), style, label=v) if points else axes.plot([], [], style, label=f'{v} (not run)')
        axes.set_xlabel('labels used (%)'); axes.set_ylabel(score)
        axes.spines[['top', 'right']].set_visible(False); axes.legend(fontsize=8, frameon=False)
    return figure

def write_page(study):
    "`results.md` and its pictures, and the numbers for the docs."
    from aam.figures import save_figure
    fits = len(study.records)
    hours = sum(r['seconds'] for r in study.records)/3600
    texts = ['# Study\n\nWritten by `python benchmarks/study.py` from `results.jsonl`; tasks, folds and options are in `tasks.json`. ' + f'{fits} fits, {hours:.1f} hours of fitting, side by side.',
             'The best baseline is in each fold the method with the best score in the *inner* cross-validation. Intervals: Nadeau and Bengio (2003) over folds; p: signs of whole groups flipped. '
             'The aim: better than the best baseline with an interval above 0 on two of the four primary tasks, and within 0.03 accuracy or 0.05 R2 of it by the lower end of the interval on the others.',
             *([study.tasks['note']] if 'note' in study.tasks else []),
             main_page(study), pretraining_page(study)]
    if 'repeats' in study.tasks['parts']: texts.insert(-1, repeats_page(study))
    if 'ablations' in study.tasks['parts']: texts.append(variants_page(study, 'ablations', 'Ablations'))
    if 'labels' in study.tasks['parts']: texts.append(labels_page(study))
    (study.args.results/'results.md').write_text('\n\n'.join(texts) + '\n')
    (study.args.results/'scores.json').write_text('{\n' + ',\n'.join(f'"{part}": [\n' + ',\n'.join(map(json.dumps, rows)) + ']' for part, rows in numbers(study).items()) + '}\n')
    save_figure(main_figure(study), study.args.results/'main.png')
    if 'labels' in study.tasks['parts']: save_figure(labels_figure(study), study.args.results/'labels.png')
    print(f"{study.args.results/'results.md'}")

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, default=Path('../shared/data')); p.add_argument('--tasks', type=Path, default=here/'tasks.json')
    p.add_argument('--results', type=Path, default=here); p.add_argument('--work', type=Path, default=Path('runs/study'))
    p.add_argument('--part', nargs='+', choices=['main', 'ablations', 'labels', 'repeats'], default=['main']); p.add_argument('--what', default='aam,baselines'); p.add_argument('--only', help='tasks, separated by commas')
    p.add_argument('--jobs', type=int, default=1); p.add_argument('--minutes', type=float, default=1e6); p.add_argument('--device', default='auto'); p.add_argument('--page', action='store_true')
    args = p.parse_args()
    logging.getLogger('aam').setLevel(logging.ERROR) # each cell would say what it reads; the fits' own logs are in --work
    study = Study(args)
    if not args.page: study.run()
    write_page(study)

if __name__ == '__main__': main()
