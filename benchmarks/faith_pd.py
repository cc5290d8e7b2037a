"""Faith's phylogenetic diversity as a pre-training target, beside what the number of ASVs and their presence tell of it, on held-out hosts.

    python benchmarks/faith_pd.py --data ../shared/data --tables mouse_age [--epochs 8]

`aam pretrain --unifrac-metric faith_pd --preset small` with its other tasks. The rivals read the same first rarefaction of the samples to fit on and to
validate: a straight line from log ASVs to log diversity, and ridge regression of log diversity on which ASVs are present, its penalty chosen on the samples to fit on.
"""
import argparse, tempfile
from pathlib import Path

import numpy as np
from sklearn.linear_model import LinearRegression, RidgeCV

from aam.config import EncoderOptions, InputOptions
from aam.data import all_unifrac, draws_to_csr, view_draw
from aam.inputs import read_inputs, sample_data
from aam.metadata import read_ids
from aam.metrics import distance_scores
from aam.pretrain import pretrain

def rivals(folder:Path, run:Path) -> dict:
    "R2 and mean absolute error in branch lengths, by method."
    options = InputOptions(table=folder/'table.biom', tree=folder/'tree.nwk')
    data = sample_data(read_inputs(options), options, EncoderOptions(unifrac_metric='faith_pd'), 42, unifrac_metric='faith_pd')
    true = all_unifrac(data, range(len(data.table)))
    present = draws_to_csr([view_draw(data, 'unifrac', i, 0, False) for i in range(len(true))], len(data.table.sequences)).toarray() > 0
    fit, held = (np.array([i for s in read_ids(run/f'{part}_samples.txt') if np.isfinite(true[i := data.position[s]])]) for part in ('train', 'val'))
    features = {'line through the number of ASVs': np.log(present.sum(1, keepdims=True)), 'ridge on the presence of ASVs': present.astype(float)}
    models = LinearRegression(), RidgeCV(np.logspace(-1, 4, 11))
    return {name: distance_scores(np.expm1(m.fit(X[fit], np.log1p(true[fit])).predict(X[held])), true[held]) for m, (name, X) in zip(models, features.items())}

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, default=Path('../shared/data')); p.add_argument('--tables', nargs='+', default=['mouse_age']); p.add_argument('--epochs', type=int, default=8)
    args = p.parse_args()
    for name in args.tables:
        folder = args.data/name
        with tempfile.TemporaryDirectory() as scratch:
            run = pretrain(table=folder/'table.biom', tree=folder/'tree.nwk', metadata=folder/'metadata.tsv', group_column='host_id', unifrac_metric='faith_pd', preset='small', max_bp=100,
                           epochs=args.epochs, output_dir=Path(scratch)/'run')
            ours = {k.removeprefix('faith_pd_'): v for k, v in run.scores['validation'].items()}
            for method, scores in {'aam': ours, **rivals(folder, run.folder)}.items(): print(f"{name:20}{method:34}R2 {scores['r2']:.3f}  MAE {scores['mae']:.3f}", flush=True)
            print(f"{name:20}{'another rarefaction':34}R2 {ours['reachable_r2']:.3f}\n{name:20}{'training mean':34}          MAE {ours['mean_mae']:.3f}")
