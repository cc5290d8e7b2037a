"""The linear path alone beside tree ensembles, on held-out subjects.

    python benchmarks/linear_floor.py --data ../shared/data [--seeds 3]

A fifth of the subjects is test; the trees are fitted on the rest, the linear path on four fifths of it, its penalty chosen on the last fifth.
All read the same rarefied samples: relative abundances (Random Forest) or log abundances (ExtraTrees).
"""
import argparse
from pathlib import Path

import numpy as np
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor

from aam.config import EncoderOptions, InputOptions
from aam.data import view_draw
from aam.inputs import read_inputs, sample_data
from aam.linear import fit_linear, identify, known_asvs, linear_features
from aam.metadata import class_targets, hold_out, numeric_targets

tasks = {'age_weeks': ('mouse_age', False), 'water_temp_c': ('mackerel_body_site', False), 'body_site': ('mackerel_body_site', True)}

def abundances(data, samples):
    "Relative and logarithmic abundances of the evaluation draw, dense (N, A)."
    relative, logged = (np.zeros((len(samples), len(data.table.sequences)), np.float32) for _ in range(2))
    for row, i in enumerate(samples):
        draw = view_draw(data, 'target', i, 0, False)
        relative[row, draw.asvs], logged[row, draw.asvs] = draw.counts/draw.total, draw.abundance
    return relative, logged

def scores(folder:Path, column:str, classes:bool, seed:int) -> dict:
    "Accuracy or R2 on the test subjects, by method."
    options = InputOptions(table=folder/'table.biom')
    inputs = read_inputs(options, folder/'metadata.tsv')
    inputs.drop(inputs.frame.index[inputs.frame[column].isna()], f'no {column}')
    data = sample_data(inputs, options, EncoderOptions(), seed)
    y, names = class_targets(inputs.frame, column) if classes else (numeric_targets(inputs.frame, [column]), [])
    groups, stratify = inputs.frame['host_id'].to_dict(), inputs.frame[column].to_dict() if classes else None
    rest, test = hold_out(inputs.sample_ids, 0.2, seed, groups, stratify)
    fit, stop = hold_out(rest, 0.2, seed, groups, stratify)
    rest, test, fit, stop = ([data.position[s] for s in part] for part in (rest, test, fit, stop))
    relative, logged = abundances(data, range(len(y)))
    def score(predicted): return float((predicted == y[test]).mean()) if classes else float(1 - ((predicted - y[test, 0])**2).sum()/((y[test, 0] - y[test, 0].mean())**2).sum())
    target = y if classes else y[:, 0]
    forest, extra = (RandomForestClassifier, ExtraTreesClassifier) if classes else (RandomForestRegressor, ExtraTreesRegressor)
    how = dict(n_estimators=500, max_features='sqrt', random_state=42, n_jobs=-1)
    data.identity = identify(data.table.sequences, known_asvs(data, fit))
    centre, deviation = (0, 1) if classes else (y[fit].mean(), y[fit].std())
    z = y if classes else (y - centre)/deviation
    X = linear_features(data, range(len(y)))
    weights, bias, _, _ = fit_linear(X[fit], z[fit], X[stop], z[stop], len(names), np.array([groups[inputs.sample_ids[i]] for i in fit]), seed)
    outputs = X[test] @ weights + bias
    return {'Random Forest': score(forest(**how).fit(relative[rest], target[rest]).predict(relative[test])),
            'ExtraTrees, log': score(extra(**how).fit(logged[rest], target[rest]).predict(logged[test])),
            'linear path': score(outputs.argmax(1) if classes else outputs[:, 0]*deviation + centre)}

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, default=Path('../shared/data')); p.add_argument('--seeds', type=int, default=3)
    args = p.parse_args()
    for column, (folder, classes) in tasks.items():
        found = [scores(args.data/folder, column, classes, seed) for seed in range(args.seeds)]
        for method in found[0]: print(f"{column:<14}{'accuracy' if classes else 'R2':<10}{method:<18}{np.mean([f[method] for f in found]):.3f}   ({', '.join(f'{f[method]:.3f}' for f in found)})", flush=True)
