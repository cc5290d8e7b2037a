"""The linear start by itself in grouped cross-validation: alone, with landmarks, and refitted on fit and stop samples.

    python benchmarks/linear_start.py --data ../shared/data [--tasks temperature,age,site]

Five folds of whole groups; of each training part a fifth, whole groups again, chooses the penalty. Scores are pooled over the folds; the reference of R2 is the mean of each training part.
"""
import argparse
from pathlib import Path

import numpy as np
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from aam.config import EncoderOptions, InputOptions
from aam.inputs import read_inputs, sample_data
from aam.linear import Landmarks, fit_linear, identify, known_asvs, linear_features, refit_linear
from aam.metadata import class_targets, hold_out, numeric_targets

tasks = {'temperature': ('mackerel_body_site', 'water_temp_c', False, 'sampling_event', {}),
         'age': ('mouse_age', 'age_weeks', False, 'age_weeks', {'study': 'longitudinal'}),
         'site': ('mackerel_body_site', 'body_site', True, 'sampling_event', {})}

def read(folder:Path, column:str, classes:bool, where:dict):
    "Samples with a value of the target."
    options = InputOptions(table=folder/'table.biom')
    inputs = read_inputs(options, folder/'metadata.tsv')
    left = inputs.frame[column].isna()
    for name, value in where.items(): left |= inputs.frame[name] != value
    inputs.drop(inputs.frame.index[left], 'not of this task')
    y, names = class_targets(inputs.frame, column) if classes else (numeric_targets(inputs.frame, [column]), [])
    return inputs, sample_data(inputs, options, EncoderOptions(), 42), y, names

def outputs(data, z, fit, stop, groups, classes:int, landmarks:bool, refit:bool):
    "Outputs of all samples by a model of some."
    def features(samples):
        known = known_asvs(data, samples)
        data.identity = identify(data.table.sequences, known)
        if not landmarks: return linear_features(data, range(len(z))), []
        more = Landmarks(len(known), len(samples)); more.place(data, samples)
        return linear_features(data, range(len(z)), (), more), [more.combine.shape[1]]
    X, more = features(fit)
    weights, bias, _, strength = fit_linear(X[fit], z[fit], X[stop], z[stop], classes, groups[fit], 42, more)
    if refit:
        both = sorted([*fit, *stop])
        X, more = features(both)
        weights, bias = refit_linear(X[both], z[both], strength, classes, more)
    return X @ weights + bias

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, default=Path('../shared/data')); p.add_argument('--tasks', default=','.join(tasks))
    args = p.parse_args()
    variants = {'alone': (False, False), 'refitted': (False, True), 'landmarks': (True, False), 'landmarks, refitted': (True, True)}
    for task in args.tasks.split(','):
        folder, column, classes, group, where = tasks[task]
        inputs, data, y, names = read(args.data/folder, column, classes, where)
        groups = inputs.frame[group].to_numpy()
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=42) if classes else GroupKFold(5, shuffle=True, random_state=42)
        found, reference = {v: np.zeros((len(y), len(names) or 1)) for v in variants}, np.zeros(len(y))
        for rest, test in splitter.split(np.zeros(len(y)), y if classes else None, groups):
            fit, stop = ([data.position[s] for s in ids] for ids in hold_out([inputs.sample_ids[i] for i in rest], 0.2, 42, inputs.frame[group].to_dict(), inputs.frame[column].to_dict() if classes else None))
            centre, scale = (0, 1) if classes else (y[rest].mean(), y[rest].std())
            reference[test] = 0 if classes else centre
            for v, how in variants.items(): found[v][test] = outputs(data, y if classes else (y - centre)/scale, fit, stop, groups, len(names), *how)[test]*scale + centre
        for v, p in found.items():
            score = (p.argmax(1) == y).mean() if classes else 1 - ((p[:, 0] - y[:, 0])**2).sum()/((y[:, 0] - reference)**2).sum()
            print(f"{task:<12}{'accuracy' if classes else 'R2':<10}{v:<22}{score:.3f}", flush=True)

if __name__ == '__main__': main()
