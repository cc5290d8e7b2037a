"""What a prediction starts from (linear model, networks on ASVs, their mean) by itself in grouped cross-validation, beside ExtraTrees on log abundances.

    python benchmarks/start.py --data ../shared/data [--tasks temperature,age,site] [--recipes | --kmers]
    python benchmarks/start.py --study [--tasks "water_temp_c by event"] [--repeats 5]
    python benchmarks/start.py --large

Five folds of whole groups; scores are pooled over them; the reference of R2 is the mean of each training part. Networks by themselves are
one each; in the start there are four. With `--recipes`, ways to fit a network are compared instead, and for each task that recipe is shown
which has the best mean rank over the *other* tasks. With `--kmers`, starts are compared in which 6-mers never take part, or as soon as
out-of-fold outputs are better with them, or much better; on moving_pictures and surveys of `aam simulate` (`simulated SEED SAMPLES`), too. `--study` fits what `aam evaluate` would, on the folds of study.py, and compares it with
the best baseline there (no GPU needed). `--large` times a start of a large simulated table.
"""
import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import log_softmax, softmax
from scipy.stats import rankdata
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

from aam.config import InputOptions
from aam.inputs import read_inputs
from aam.linear import fit_linear, known_asvs, linear_features
from aam.metadata import class_targets, numeric_targets
from aam.simulate import simulate_community
from aam.start import fit_networks, fit_start, network_outputs, shallower
from aam.table import make_table

tasks = { # folder, column, classes, group, where
    'temperature': ('mackerel_body_site', 'water_temp_c', False, 'sampling_event', {}),
    'age': ('mouse_age', 'age_weeks', False, 'age_weeks', {'study': 'longitudinal'}),
    'site': ('mackerel_body_site', 'body_site', True, 'sampling_event', {}),
    'diet': ('mouse_age', 'diet', True, 'host_id', {'study': 'dietary', 'diet_day': '>0'}),
    'diet day': ('mouse_age', 'diet_day', False, 'host_id', {'study': 'dietary'}),
    'age by cage': ('mouse_age', 'age_weeks', False, 'cage', {'study': 'longitudinal'}),
    'season': ('mackerel_body_site', 'season', True, 'sampling_event', {}),
    'temperature by fish': ('mackerel_body_site', 'water_temp_c', False, 'host_id', {}),
    'site by fish': ('mackerel_body_site', 'body_site', True, 'host_id', {}),
}
more_tasks = { # those of --kmers alone; without groups
    'moving pictures': ('moving_pictures', 'body_habitat', True, None, {}),
    'moving pictures site': ('moving_pictures', 'body_site', True, None, {}),
    **{f'simulated {what} {seed} {samples}': (None, column, classes, 'subject', {}) for seed, samples in ((1, 80), (2, 80), (3, 160), (4, 160), (5, 300))
       for what, column, classes in (('pH', 'ph', False), ('moisture', 'moisture', False), ('habitat', 'habitat', True), ('season', 'season', True))}}
tasks_and_more = tasks | more_tasks
recipes = {'as it is': {}, 'all reads': dict(least=None), 'from 10 reads': dict(least=10), 'from 1000 reads': dict(least=1000), '30 epochs': dict(epochs=30), '120 epochs': dict(epochs=120), 'dropout 0': dict(dropout=0.), 'dropout 0.5': dict(dropout=0.5)}

def read(folder:Path, column:str, classes:bool, where:dict):
    "Samples with a value of the target."
    inputs = read_inputs(InputOptions(table=folder/'table.biom'), folder/'metadata.tsv')
    left = inputs.frame[column].isna()
    for name, value in where.items(): left |= ~(inputs.frame[name].astype(float) > 0) if value == '>0' else inputs.frame[name] != value
    inputs.drop(inputs.frame.index[left], 'not of this task')
    y, names = class_targets(inputs.frame, column) if classes else (numeric_targets(inputs.frame, [column]), [])
    return inputs, y, names

def simulated(name:str):
    "Table, targets, class names and sites of a survey."
    _, what, seed, samples = name.split()
    community = simulate_community(int(samples), seed=int(seed))
    there, survey = community.counts.sum(0) > 0, community.survey
    y = getattr(survey, tasks_and_more[name][1])
    names = sorted(set(y.tolist())) if tasks_and_more[name][2] else []
    table = make_table(community.counts[:, there], community.sample_ids, [s for s, t in zip(community.sequences, there) if t])
    order = [community.sample_ids.index(s) for s in table.sample_ids]
    return table, np.searchsorted(names, y[order]) if names else y[order][:, None].astype(float), names, survey.subject[order]

def trees(table, z, rest, test, classes:int):
    X = np.log1p(1e4*table.counts/table.reads[:, None]) if not hasattr(table.counts, 'toarray') else np.log1p(1e4*table.counts.toarray()/table.reads[:, None])
    if not classes: return ExtraTreesRegressor(300, max_features=1/3, random_state=0).fit(X[rest], z[rest, 0]).predict(X[test])[:, None]
    fitted, chances = ExtraTreesClassifier(300, random_state=0).fit(X[rest], z[rest]), np.zeros((len(test), classes))
    chances[:, fitted.classes_] = fitted.predict_proba(X[test])
    return np.log(chances.clip(1e-3))

def linear(table, z, rest, test, groups, classes:int):
    known = known_asvs(table, rest)
    weights, bias, _ = fit_linear(linear_features(table, rest, known), z[rest], classes, groups[rest])
    return linear_features(table, test, known) @ weights + bias

def network(table, z, rest, test, classes:int, least:int=100, **how):
    known = known_asvs(table, rest)
    def drawn(rng): return linear_features(shallower(table, rest, rng, least), range(len(rest)), known)
    return network_outputs(fit_networks(linear_features(table, rest, known), z[rest], np.ones((1, len(rest))), classes, drawn=drawn if least else None, **how), linear_features(table, test, known))[0]

def start(table, z, rest, test, groups, classes:int, said:list=None, **how):
    found, _ = fit_start(table, rest, z[rest], classes, known_asvs(table, rest), None if groups is None else groups[rest], **how)
    if said is not None: said.append(str(found))
    return found.outputs(table, test)

def large(samples:int=3000, asvs:int=20_000, each:int=150):
    "CPU-seconds of a start for numbers and for classes."
    rng, prevalence = np.random.default_rng(0), np.arange(1, asvs + 1)**-0.8
    held = rng.choice(asvs, samples*each, p=prevalence/prevalence.sum())
    counts = csr_matrix((rng.geometric(0.05, len(held)), (np.repeat(np.arange(samples), each), held)), (samples, asvs))
    sequences = sorted({''.join(s) for s in rng.choice(list('ACGT'), (asvs, 100))})
    table = make_table(counts, [f's{i:04}' for i in range(samples)], sequences)
    known, numbers = known_asvs(table, range(samples)), np.log1p(table.counts.toarray()) @ rng.normal(size=len(table.sequences))
    numbers = (numbers - numbers.mean())/numbers.std()
    print(f'{samples} samples of {len(table.sequences)} ASVs, {len(known)} of them known')
    for what, y, classes in ('numbers', numbers[:, None], 0), ('four classes', np.digitize(numbers, np.quantile(numbers, [.25, .5, .75])), 4):
        began = time.process_time()
        fit_linear(linear_features(table, range(samples), known), y, classes)
        linear, began = time.process_time() - began, time.process_time()
        fit_start(table, range(samples), y, classes, known)
        print(f'{what}: {time.process_time() - began:.0f} CPU-s, the linear model alone {linear:.0f}', flush=True)

def summary(said:list) -> str: # of starts
    "Which they were, and how many."
    return '; '.join(f'{said.count(s)} x {s}' for s in sorted(set(said)))

def as_evaluated(e, fold): # `Evaluation`, a fold of it
    "Outputs, or probabilities, of the test samples by the start as `aam evaluate` fits it, once more to the samples to stop on, too; and the shares of its parts."
    table, classes, at = e.inputs.table, len(e.classes), {s: i for i, s in enumerate(e.inputs.table.sample_ids)}
    ids = sorted(fold.fit + fold.stop, key=at.get)
    y, samples, centre, scale = e.y[e.at(ids)], [at[s] for s in ids], 0, 1
    if not classes:
        centre, scale = y.mean(), y.std()
        y = (y[:, None] - centre)/scale
    start, _ = fit_start(table, samples, y, classes, known_asvs(table, samples), np.array([e.groups[s] for s in ids]), seed=42 + 1000*fold.repeat)
    outputs = start.outputs(table, [at[s] for s in fold.test])
    return softmax(outputs, 1) if classes else outputs[:, 0]*scale + centre, str(start)

def on_study(args):
    "The start in the folds of the study, and its difference to the best baseline among the study's records."
    import study
    from aam.comparison import difference, sample_scores, training_means
    cells = study.Study(argparse.Namespace(data=args.data, tasks=study.here/'tasks.json', results=study.here, work=Path('runs/study'), device='cpu'))
    there = {cell.task: cell for cell in cells.part('repeats')}
    for task in args.tasks.split(',') if args.tasks else there:
        if task not in there: raise SystemExit(f"--tasks: {task!r} is no task of the study's repeats; they are {', '.join(there)}")
        cell = there[task]
        cell = study.Cell(cells, 'repeats', cell.task, cell.variant, repeats=args.repeats)
        e, shares = cell.evaluation, []
        found, means = np.full((args.repeats, len(e.ids), *([len(e.classes)] if e.classes else [])), np.nan), None if e.classes else training_means(e)
        for fold in e.plan:
            found[fold.repeat, e.at(fold.test)], share = as_evaluated(e, fold)
            shares.append(share)
        each, best = np.array([sample_scores(e, p, None if means is None else means[r]) for r, p in enumerate(found)]), cell.each('best baseline')
        print(f"{cell.task:<22}{study.score_names[e.score]:<9} {args.repeats} repeats: start {each.mean():.3f}, best baseline {best.mean():.3f}, {study.with_interval(difference(e, each, best))}; {summary(shares)}", flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, default=Path('../shared/data')); p.add_argument('--tasks'); p.add_argument('--recipes', action='store_true'); p.add_argument('--kmers', action='store_true'); p.add_argument('--large', action='store_true')
    p.add_argument('--study', action='store_true'); p.add_argument('--repeats', type=int, default=5)
    args, scores = p.parse_args(), {}
    if args.large: return large()
    if args.study: return on_study(args)
    for task in args.tasks.split(',') if args.tasks else tasks_and_more if args.kmers else tasks:
        folder, column, classes, group, where = tasks_and_more[task]
        if folder:
            inputs, y, names = read(args.data/folder, column, classes, where)
            table, groups = inputs.table, None if group is None else inputs.frame[group].astype(str).to_numpy()
        else: table, y, names, groups = simulated(task)
        C, said, n = len(names), [], 5 if groups is None else min(5, len(set(groups)))
        splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold if classes else GroupKFold)(n, shuffle=True, random_state=42)
        methods = {name: partial(network, classes=C, **how) for name, how in recipes.items()} if args.recipes else {
            f'6-mers {name}': partial(start, groups=groups, classes=C, kmer_gain=gain) for name, gain in {'never': 1, 'if better': 0, 'by a twentieth': .05, 'by a tenth': .1}.items()} if args.kmers else dict(
            linear=partial(linear, groups=groups, classes=C), network=partial(network, classes=C), start=partial(start, groups=groups, classes=C, said=said), ExtraTrees=partial(trees, classes=C))
        found, reference, seconds = {v: np.zeros((len(y), C or 1)) for v in methods}, np.zeros(len(y)), dict.fromkeys(methods, 0.)
        for rest, test in splitter.split(np.zeros(len(y)), y if classes else None, groups):
            centre, scale = (0, 1) if classes else (y[rest].mean(), y[rest].std())
            reference[test] = 0 if classes else centre
            z = y if classes else (y - centre)/scale
            for v, method in methods.items():
                began = time.process_time()
                found[v][test] = method(table, z, list(rest), list(test))*scale + centre
                seconds[v] += (time.process_time() - began)/n
        scores[task] = {v: (p.argmax(1) == y).mean() if classes else 1 - ((p[:, 0] - y[:, 0])**2).sum()/((y[:, 0] - reference)**2).sum() for v, p in found.items()}
        log_loss = {v: f'log loss {-log_softmax(p, 1)[np.arange(len(y)), y].mean():.3f}, ' if classes else '' for v, p in found.items()}
        print(f"{task:<24}{'accuracy' if classes else 'R2':<9}" + ', '.join(f'{v} {s:.3f} ({log_loss[v]}{seconds[v]:.1f} CPU-s)' for v, s in scores[task].items()) + (f'; {summary(said)}' if said else ''), flush=True)
    if args.recipes and len(scores) > 1:
        ranks = {task: dict(zip(s, rankdata([-x for x in s.values()]))) for task, s in scores.items()}
        print('mean rank: ' + ', '.join(f'{r} {np.mean([k[r] for k in ranks.values()]):.2f}' for r in recipes))
        for task in scores:
            best = min(recipes, key=lambda r: np.mean([k[r] for t, k in ranks.items() if t != task]))
            print(f'{task:<20}best on the others: {best}, here {scores[task][best]:.3f} ({scores[task]["as it is"]:.3f} as it is)')

if __name__ == '__main__': main()
