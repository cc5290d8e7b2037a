"Faith's phylogenetic diversity in place of UniFrac distances, through the installed command: from a tree or a file, resumed, fine-tuned, checked, refused."
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_formats import write_artifact
from test_resume import epochs, expect_equal, kill_after

from aam.checkpoint import build_model, load_checkpoint
from aam.cli import main
from aam.config import AamError, EncoderOptions, InputOptions
from aam.data import make_batch
from aam.inputs import read_inputs, sample_data
from aam.table import read_table
from aam.unifrac import read_faith_pd

mouse = Path(__file__).parents[2]/'shared'/'data'/'mouse_age'
faith = ['--unifrac-metric', 'faith_pd']


@pytest.fixture(scope='module')
def files(aam, survey, once):
    "Folder with diversities of the survey: of a rarefaction, which its record names, and of all reads."
    def build(folder):
        folder.mkdir()
        words = 'unifrac', '--table', survey/'table.biom', '--tree', survey/'tree.nwk', '--metric', 'faith_pd'
        aam(*words, '--rarefy-depth', 1500, '--rarefy-seed', 9, '--output', folder/'pd.tsv')
        aam(*words, '--output', folder/'all.csv')
    return once('faith_pd', build)


@pytest.fixture(scope='module')
def learned(aam, survey, once):
    "Folder of a pretrain run from the tree."
    words = ['pretrain', '--table', survey/'table.biom', '--tree', survey/'tree.nwk', *faith, '--metadata', survey/'metadata.tsv', '--group-column', 'subject_id', *aam.tiny]
    return once('learned_faith_pd', lambda folder: aam(*words, '--output-dir', folder, '--epochs', 12, '--lr', 3e-3))


def batch_of(survey, max_bp=150, **given):
    "A batch of all samples of the survey, and the data that it was made of."
    options = InputOptions(table=survey/'table.biom', **given)
    inputs = read_inputs(options)
    data = sample_data(inputs, options, EncoderOptions(unifrac_metric='faith_pd', max_bp=max_bp), 42, unifrac_metric='faith_pd')
    return make_batch(data, range(len(data.table)), ('unifrac',), epoch=3), data


def test_batch_holds_the_diversities_of_its_reads(survey, files):
    "From the tree, of the draw of that epoch; from a file, of the rarefaction that the file is about; the same for the same draw."
    from skbio import TreeNode
    from skbio.diversity import alpha_diversity
    tree = TreeNode.read(str(survey/'tree.nwk'))
    def expected(batch, data):
        assert len(batch.token_row) == len(data.table.sequences) # all ASVs of the table, in their order
        counts = np.zeros((len(batch), len(batch.token_row)), int)
        for row, (index, mask) in enumerate(zip(batch.index, batch.mask)): counts[row, index[mask]] = 1
        return alpha_diversity('faith_pd', counts, batch.sample_ids, taxa=data.table.sequences, tree=tree).to_numpy()
    of_tree, data = batch_of(survey, tree=survey/'tree.nwk')
    deep = data.table.reads >= data.depth
    assert of_tree.unifrac.shape == (48,) and (of_tree.unifrac.isfinite().numpy() == deep).all() and 40 < deep.sum() < 48
    np.testing.assert_allclose(of_tree.unifrac[deep], expected(of_tree, data)[deep], rtol=1e-5)
    of_file, data = batch_of(survey, faith_pd=files/'pd.tsv')
    assert of_file.unifrac.isfinite().all()
    np.testing.assert_allclose(of_file.unifrac, expected(of_file, data), rtol=1e-5)
    np.testing.assert_allclose(of_file.unifrac, read_faith_pd(files/'pd.tsv')[of_file.sample_ids], rtol=1e-5)
    given = dict(rarefy_depth=1500, rarefy_seed=9)
    options = InputOptions(table=survey/'table.biom', tree=survey/'tree.nwk', **given)
    data = sample_data(read_inputs(options), options, EncoderOptions(), 42, unifrac_metric='faith_pd')
    np.testing.assert_allclose(make_batch(data, range(48), ('unifrac',)).unifrac, of_file.unifrac, rtol=1e-5) # the first draw has the same seed


def test_it_is_learned(learned):
    from test_training_options import events
    scores = json.loads((learned/'scores.json').read_text())['validation']
    assert scores['faith_pd_r2'] > .6 and scores['faith_pd_mae'] < .6*scores['faith_pd_mean_mae'] and 0 < scores['faith_pd_reachable_r2'] < 1
    assert not [k for k in scores if k.startswith('unifrac')]
    lines = [json.loads(line) for line in (learned/'metrics.jsonl').read_text().splitlines()]
    assert lines[-1]['val_unifrac_loss'] < .5 and max(line['val_faith_pd_r2'] for line in lines) >= scores['faith_pd_r2'] - 1e-3
    assert {p.name for p in (learned/'plots').iterdir()} == {'faith_pd.png', 'loss_curves.png'}
    found = events(learned)
    assert {'train/unifrac_loss', 'val/unifrac_loss', 'val/faith_pd_r2', 'val/faith_pd_mae'} <= set(found.Tags()['scalars']) and set(found.Tags()['images']) == {'faith_pd', 'loss_curves'}
    assert re.search(r"Faith's PD of validation samples: R2 0\.\d+, correlation .*, MAE 0\.\d+ \(R2 between two rarefactions 0\.\d+; MAE of the training mean 0\.\d+\)", (learned/'training.log').read_text())


def test_loss_is_of_standardised_logarithms(learned, survey):
    "By hand, from the checkpoint: the head's output in branch lengths against the truth, over the variance of the training samples."
    state = load_checkpoint(learned/'checkpoints'/'best_model.pt')
    _, data = batch_of(survey, state['encoder']['max_bp'], tree=survey/'tree.nwk')
    fit, stop = ([data.position[s] for s in state['split'][part]] for part in ('fit', 'stop'))
    logs = lambda samples: make_batch(data, samples, ('unifrac',)).unifrac.log1p()
    model, held = build_model(state).eval(), make_batch(data, stop, ('unifrac',))
    with torch.no_grad(): predicted = model(held)['unifrac']
    variance, known = logs(fit)[logs(fit).isfinite()].var(correction=0), logs(stop).isfinite()
    assert known.sum() > 5 and predicted.shape == (len(stop),) and (predicted > 0).all()
    line = json.loads((learned/'metrics.jsonl').read_text().splitlines()[state['epoch'] - 1])
    expected = ((predicted.log1p() - logs(stop))[known]**2).mean() / variance
    np.testing.assert_allclose(line['val_unifrac_loss'], float(expected), rtol=1e-4)
    np.testing.assert_allclose(line['val_faith_pd_mae'], float((predicted - held.unifrac)[known].abs().mean()), rtol=1e-4)


def test_files_of_every_kind_train_alike(aam, survey, files, tmp_path):
    "What aam unifrac wrote, an artifact of QIIME 2, a column of metadata: one result."
    values = pd.read_csv(files/'all.csv', dtype=str).set_index('sample_id').faith_pd
    write_artifact(tmp_path/'pd.qza', "SampleData[AlphaDiversity] % Properties('phylogenetic')", '\tfaith_pd\n' + ''.join(f'{s}\t{v}\n' for s, v in values.items()), 'alpha-diversity.tsv')
    (tmp_path/'metadata.tsv').write_text('#SampleID\tsite\tfaith_pd\n#q2:types\tcategorical\tnumeric\n' + ''.join(f'{s}\tx\t{v}\n' for s, v in reversed(list(values.items()))))
    found = []
    for i, path in enumerate([files/'all.csv', tmp_path/'pd.qza', tmp_path/'metadata.tsv']):
        assert (read_faith_pd(path)[values.index] == values.astype(float)).all()
        aam('pretrain', '--table', survey/'table.biom', '--faith-pd', path, *faith, '--output-dir', tmp_path/str(i), *aam.tiny, '--epochs', 1)
        found.append(json.loads((tmp_path/str(i)/'scores.json').read_text()))
    assert found[0] == found[1] == found[2] and found[0]['validation']['faith_pd_reachable_r2'] is None


def test_train_goes_on_with_the_head(aam, survey, learned, tmp_path):
    "It starts where pre-training ended, and keeps the metric without being told."
    tree = ['--tree', survey/'tree.nwk']
    words = ['train', '--table', survey/'table.biom', '--metadata', survey/'metadata.tsv', '--metadata-column', 'soil_ph', '--device', 'cpu', '--train-samples', learned/'train_samples.txt',
             '--val-samples', learned/'val_samples.txt', '--pretrained-encoder', learned/'checkpoints'/'best_model.pt']
    aam(*words, *tree, '--output-dir', tmp_path/'run', '--epochs', 1, '--lr', 0)
    before, after = (load_checkpoint(folder/'checkpoints'/'best_model.pt') for folder in (learned, tmp_path/'run'))
    assert after['encoder']['unifrac_metric'] == 'faith_pd' and before['weights'].keys() >= {k for k in after['weights'] if '.unifrac.' in k} > set()
    assert all(torch.equal(w, before['weights'][k]) for k, w in after['weights'].items() if '.unifrac.' in k)
    line = json.loads((tmp_path/'run'/'metrics.jsonl').read_text().splitlines()[0])
    np.testing.assert_allclose(line['val_faith_pd_r2'], before['scores']['val_faith_pd_r2'], atol=.05)
    aam(*words, *tree, '--output-dir', tmp_path/'frozen', '--epochs', 1, '--freeze-base')
    assert 'val_faith_pd_r2' not in json.loads((tmp_path/'frozen'/'metrics.jsonl').read_text().splitlines()[0])
    assert "no --tree and no --faith-pd: the diversity loss is off" in aam(*words, '--output-dir', tmp_path/'off', '--epochs', 1).err


def test_resumed_run_ends_as_the_undisturbed_one(aam, survey, files, tmp_path):
    words = ['pretrain', '--table', survey/'table.biom', '--faith-pd', files/'pd.tsv', *faith, *aam.tiny, '--epochs', epochs]
    aam(*words, '--output-dir', tmp_path/'whole')
    kill_after(aam, [*words, '--output-dir', tmp_path/'run'], tmp_path/'run', 2, 0)
    aam(*words, '--output-dir', tmp_path/'run', '--resume-from', 'auto')
    expect_equal(tmp_path/'run', tmp_path/'whole')


def test_check(aam, survey, files, tmp_path):
    said = aam('check', '--table', survey/'table.biom', '--faith-pd', files/'pd.tsv', *faith, '--device', 'cpu').out
    assert re.search(r"Faith's phylogenetic diversity\n  pd.tsv  rank correlation with the number of ASVs 0\.\d\d \(48 samples", said) and 'ready to train: 0 errors, 0 warnings' in said
    said = aam('check', '--table', survey/'table.biom', '--tree', survey/'tree.nwk', *faith, '--device', 'cpu').out
    assert "Faith's phylogenetic diversity\n  tree.nwk: computed from each rarefaction" in said
    said = aam('check', '--table', survey/'table.biom', '--tree', survey/'tree.nwk', '--faith-pd', files/'all.csv', *faith, '--device', 'cpu').out
    assert re.search(r'warning: all.csv: its values are 1\.\d\d times those of the reads that the model sees \(median over samples\): of another depth', said)
    values = pd.read_csv(files/'pd.tsv', sep='\t', dtype=str)
    values.assign(faith_pd=np.random.default_rng(0).permutation(values.faith_pd)).to_csv(tmp_path/'mixed.tsv', sep='\t', index=False)
    wrong = r"mixed.tsv: its values are not about the samples of the table \(rank correlation with the number of ASVs -?0\.\d\d; shuffled at random 0\.\d\d\): compute it again from this table"
    said = aam('check', '--table', survey/'table.biom', '--faith-pd', tmp_path/'mixed.tsv', *faith, '--device', 'cpu', fails=True)
    assert said.returncode == 1 and re.search('^error: ' + wrong, said.out, re.M)
    said = aam('pretrain', '--table', survey/'table.biom', '--faith-pd', tmp_path/'mixed.tsv', *faith, *aam.tiny, '--output-dir', tmp_path/'run', fails=True)
    assert said.returncode == 2 and re.search('^aam: --faith-pd ' + wrong, said.err, re.M) and not (tmp_path/'run').exists()


def test_check_drops_what_pretrain_drops(aam, survey, tmp_path):
    "A file of a deep rarefaction lacks the shallow samples; with the same depth nothing is amiss."
    words = ['--table', survey/'table.biom', '--rarefy-depth', 2000]
    aam('unifrac', *words, '--tree', survey/'tree.nwk', '--metric', 'faith_pd', '--output', tmp_path/'pd.tsv')
    assert aam('check', *words, '--faith-pd', tmp_path/'pd.tsv', *faith, '--device', 'cpu').returncode == 0
    aam('pretrain', *words, '--faith-pd', tmp_path/'pd.tsv', *faith, *aam.tiny, '--epochs', 1, '--output-dir', tmp_path/'run')
    aam('pretrain', *words[:2], '--faith-pd', tmp_path/'pd.tsv', *faith, *aam.tiny, '--epochs', 1, '--output-dir', tmp_path/'same') # the file says its depth
    (tmp_path/'pd.tsv.json').unlink() # and this one does not
    said = aam('pretrain', *words[:2], '--faith-pd', tmp_path/'pd.tsv', *faith, *aam.tiny, '--epochs', 1, '--output-dir', tmp_path/'other', fails=True)
    lost = 48 - len(read_table(tmp_path/'pd.tsv.rarefied.biom'))
    assert said.returncode == 2 and f'pd.tsv: lacks {lost} of 48 samples (' in said.err and 'or drop samples with few reads by the same --rarefy-depth' in said.err


@pytest.mark.parametrize('words,line', [
    (['--faith-pd', 'PD'], '--faith-pd PD: belongs to --unifrac-metric faith_pd, not unweighted; leave it out or change the metric'),
    (['--faith-pd', 'PD', '--unifrac-metric', 'weighted'], '--faith-pd PD: belongs to --unifrac-metric faith_pd, not weighted; leave it out or change the metric'),
    ([*faith, '--unifrac-matrix', 'MATRIX'], '--unifrac-matrix MATRIX: holds distances, and --unifrac-metric faith_pd has none; give --tree or --faith-pd instead, or change the metric'),
    (faith, "--tree or --faith-pd is needed for Faith's diversities (or --penalty 0 to learn without)"),
    ([*faith, '--tree', 'TREE', '--unifrac-head', 'euclid'], '--unifrac-head euclid: gives distances, and --unifrac-metric faith_pd has none; leave it out or change the metric'),
    ([*faith, '--tree', 'TREE', '--unifrac-alpha', '0.5'], '--unifrac-alpha 0.5: belongs to --unifrac-metric generalized, not faith_pd; leave it out or change the metric'),
    ([*faith, '--faith-pd', 'absent.tsv'], '--faith-pd absent.tsv: no such file'),
    ([*faith, '--faith-pd', 'TREE'], "TREE: not a kind of file for Faith's diversities; give one of .tsv, .txt, .csv, .qza"),
])
def test_refused(survey, files, tmp_path, capsys, words, line):
    places = dict(PD=files/'pd.tsv', MATRIX=survey/'unifrac.h5', TREE=survey/'tree.nwk')
    for name in set(places) & set(words): line = line.replace(name, str(places[name]))
    for command in ('pretrain', 'train'):
        if command == 'train' and words == faith: continue # which learns without
        target = [] if command == 'pretrain' else ['--metadata', survey/'metadata.tsv', '--metadata-column', 'soil_ph']
        assert main([command, *map(str, ['--table', survey/'table.biom', *target, *[places.get(w, w) for w in words], '--output-dir', tmp_path/'run', '--device', 'cpu'])]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f'aam: {line}' and not (tmp_path/'run').exists()


@pytest.mark.parametrize('text,line', [
    ('a\tfaith_pd\ns1\t1.5\ns1\t2\n', 'sample s1 occurs twice; name each sample once'),
    ('a\tfaith_pd\ns1\tmany\n', "'many' for sample s1 is no diversity, which is a length of branches; compute it again"),
    ('a\tfaith_pd\ns1\t-2\n', "'-2' for sample s1 is no diversity, which is a length of branches; compute it again"),
    ('a\tfaith_pd\ns1\t\n', "'nothing' for sample s1 is no diversity, which is a length of branches; compute it again"),
    ('a\tfaith_pd\n', 'holds no samples; give two columns, sample ID and value'),
    ('', 'not readable as diversities (No columns to parse from file); give two columns, sample ID and value'),
    ('s1,1.5\ns2,2\n', 'not readable as diversities (1 column, 0 of them called faith_pd); give two columns, sample ID and value'),
    ('a\tb\tc\ns1\t1\t2\n', 'not readable as diversities (3 columns, 0 of them called faith_pd); give two columns, sample ID and value'),
])
def test_wrong_files(tmp_path, text, line):
    (tmp_path/'pd.tsv').write_text(text)
    with pytest.raises(AamError) as error: read_faith_pd(tmp_path/'pd.tsv')
    assert str(error.value) == f"{tmp_path/'pd.tsv'}: {line}"


def test_ids_stay_text(tmp_path):
    for text in '001\t2.5\n1\t0\n', 'sample name\tanything\n001\t2.5\n1\t0\n', '\ufeff\tfaith_pd\r\n001\t2.5\r\n1\t0\r\n':
        (tmp_path/'pd.txt').write_text(text, newline='', encoding='utf-8')
        assert dict(read_faith_pd(tmp_path/'pd.txt')) == {'001': 2.5, '1': 0.}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_gpu(aam, survey, tmp_path):
    "Recorded steps in bf16 learn it as well; the final scores are those of fp32."
    tiny = [w for w in aam.tiny if w not in ('--device', 'cpu')]
    said = aam('pretrain', '--table', survey/'table.biom', '--tree', survey/'tree.nwk', *faith, *tiny, '--epochs', 12, '--lr', 3e-3, '--output-dir', tmp_path/'run')
    assert 'cannot be recorded' not in said.err
    scores = json.loads((tmp_path/'run'/'scores.json').read_text())['validation']
    assert scores['faith_pd_r2'] > .6 and scores['faith_pd_mae'] < .6*scores['faith_pd_mean_mae']


@pytest.mark.slow
@pytest.mark.skipif(not mouse.exists(), reason='the real data are not here')
def test_mouse_age(aam, tmp_path):
    "Of mice that no fit has seen, in a few epochs of a small encoder."
    aam('pretrain', '--table', mouse/'table.biom', '--tree', mouse/'tree.nwk', '--metadata', mouse/'metadata.tsv', '--group-column', 'host_id', *faith, '--preset', 'small', '--embedding-dim', 16,
        '--attention-heads', 2, '--max-bp', 60, '--nuc-penalty', 0, '--count-penalty', 0, '--epochs', 3, '--device', 'cpu', '--output-dir', tmp_path/'run')
    scores = json.loads((tmp_path/'run'/'scores.json').read_text())['validation']
    assert scores['faith_pd_r2'] > .95 and scores['faith_pd_mae'] < .25*scores['faith_pd_mean_mae']
