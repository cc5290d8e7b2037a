"""The linear start by itself in grouped cross-validation, beside ExtraTrees on log abundances.

    python benchmarks/linear_start.py --data ../shared/data [--tasks temperature,age,site,diet]

Five folds of whole groups. Of each training part a fifth, whole groups again, stops training of `aam train`; the linear start is fitted to the rest, and refitted to both. ExtraTrees (300 trees) is fitted to both.
Scores are pooled over the folds; the reference of R2 is the mean of each training part.
"""
import argparse
import time
from pathlib import Path

import numpy as np
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from aam.config import EncoderOptions, InputOptions
from aam.data import view_draw
from aam.inputs import read_inputs, sample_data
from aam.linear import Landmarks, choose_landmarks, fit_linear, identify, known_asvs, linear_features
from aam.metadata import class_targets, hold_out, numeric_targets

tasks = {'temperature': ('mackerel_body_site', 'water_temp_c', False, 'sampling_event', {}),
         'age': ('mouse_age', 'age_weeks', False, 'age_weeks', {'study': 'longitudinal'}),
         'site': ('mackerel_body_site', 'body_site', True, 'sampling_event', {}),
         'diet': ('mouse_age', 'diet', True, 'host_id', {'study': 'dietary'})}

def read(folder:Path, column:str, classes:bool, where:dict):
    "Samples with a value of the target."
    options = InputOptions(table=folder/'table.biom')
    inputs = read_inputs(options, folder/'metadata.tsv')
    left = inputs.frame[column].isna()
    for name, value in where.items(): left |= inputs.frame[name] != value
    if column == 'diet': left |= ~(inputs.frame['diet_day'].astype(float) > 0)
    inputs.drop(inputs.frame.index[left], 'not of this task')
    y, names = class_targets(inputs.frame, column) if classes else (numeric_targets(inputs.frame, [column]), [])
    return inputs, sample_data(inputs, options, EncoderOptions(), 42), y, names

def start(data, z, samples, groups, classes:int, landmarks:int):
    "Outputs of all samples by the linear start of some."
    known, more, sizes = known_asvs(data, samples), None, []
    data.identity = identify(data.table.sequences, known)
    if landmarks:
        chosen = choose_landmarks(samples, landmarks, 42)
        more = Landmarks(len(known), len(chosen)); more.place(data, chosen)
        sizes = [more.combine.shape[1]]
    X = linear_features(data, range(len(z)), (), more)
    weights, bias, *_ = fit_linear(X[samples], z[samples], classes, groups[samples], 42, sizes)
    return X @ weights + bias

def trees(data, z, samples, classes:int):
    "Outputs of all samples by ExtraTrees of some."
    X = np.zeros((len(z), len(data.table.sequences)), np.float32)
    for i in range(len(z)): draw = view_draw(data, 'target', i, 0, False); X[i, draw.asvs] = draw.abundance
    if not classes: return ExtraTreesRegressor(300, max_features=1/3, min_samples_leaf=2, random_state=0).fit(X[samples], z[samples, 0]).predict(X)[:, None]
    fitted, chances = ExtraTreesClassifier(300, random_state=0).fit(X[samples], z[samples]), np.zeros((len(z), classes))
    chances[:, fitted.classes_] = fitted.predict_proba(X)
    return chances

variants = {'known ASVs, fit': (0, False), 'and landmarks': (1000, False), 'known ASVs, refit': (0, True), 'and landmarks, refit': (1000, True)}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, default=Path('../shared/data')); p.add_argument('--tasks', default=','.join(tasks))
    args = p.parse_args()
    for task in args.tasks.split(','):
        folder, column, classes, group, where = tasks[task]
        inputs, data, y, names = read(args.data/folder, column, classes, where)
        groups = inputs.frame[group].to_numpy()
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=42) if classes else GroupKFold(5, shuffle=True, random_state=42)
        found, reference, seconds = {v: np.zeros((len(y), len(names) or 1)) for v in (*variants, 'ExtraTrees')}, np.zeros(len(y)), dict.fromkeys((*variants, 'ExtraTrees'), 0.)
        for rest, test in splitter.split(np.zeros(len(y)), y if classes else None, groups):
            fit = [data.position[s] for s in hold_out([inputs.sample_ids[i] for i in rest], 0.2, 42, inputs.frame[group].to_dict(), inputs.frame[column].to_dict() if classes else None)[0]]
            centre, scale = (0, 1) if classes else (y[rest].mean(), y[rest].std())
            reference[test] = 0 if classes else centre
            z = y if classes else (y - centre)/scale
            for v in found:
                began = time.process_time()
                out = trees(data, z, rest, len(names)) if v == 'ExtraTrees' else start(data, z, list(rest) if variants[v][1] else fit, groups, len(names), variants[v][0])
                seconds[v] += (time.process_time() - began)/5
                found[v][test] = out[test]*scale + centre
        for v, p in found.items():
            score = (p.argmax(1) == y).mean() if classes else 1 - ((p[:, 0] - y[:, 0])**2).sum()/((y[:, 0] - reference)**2).sum()
            print(f"{task:<12}{'accuracy' if classes else 'R2':<10}{v:<22}{score:.3f}   {seconds[v]:.1f} CPU-s a fold", flush=True)

if __name__ == '__main__': main()
