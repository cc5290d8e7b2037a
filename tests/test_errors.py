"Each mistake: one line on standard error, exit code 2, nothing overwritten, nothing executed."
import hashlib
import json
import pickle
import re
import resource
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from aam.cli import commands, load_command
from aam.table import make_table, read_table, write_table

heavy = 'torch', 'pandas', 'biom', 'skbio', 'sklearn'


def contents(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob('*')) if p.is_file()}


def refused(run, *words, says=(), **how):
    "The one line that `words` end with."
    process = run(*words, fails=True, **how)
    assert process.returncode == 2, process.out + process.err
    assert 'Traceback' not in process.out + process.err
    line = process.err.strip().splitlines()
    errors = [text for text in line if text.startswith('aam: ')]
    assert len(errors) == 1 and line[-1] == errors[0], process.err # notices may come before it, nothing after it
    for word in says: assert word in errors[0], (word, errors[0])
    return errors[0]


@pytest.fixture(scope='module')
def folder(survey, once):
    "The survey and damaged versions of its files."
    return once('damaged', lambda path: damage(survey, path))


def damage(survey, path):
    path.mkdir(parents=True)
    whole = (survey/'table.biom').read_bytes()
    (path/'truncated.biom').write_bytes(whole[:len(whole)//2])
    (path/'empty.biom').write_bytes(b'')
    table = read_table(survey/'table.biom')

    import biom
    import h5py

    def write(name, matrix, observations):
        with h5py.File(path/name, 'w') as f: biom.Table(matrix, observations, table.sample_ids).to_hdf5(f, 'test')
    counts = table.counts.toarray().T.astype(float)
    write('md5.biom', counts, [hashlib.md5(s.encode()).hexdigest() for s in table.sequences])
    write('fractions.biom', counts/counts.sum(0), table.sequences)
    write('half.biom', counts + 0.5*(counts > 0), table.sequences)
    write('negative.biom', np.where(counts > 1000, -1, counts), table.sequences)
    write_table(make_table(table.counts, [f'x{s}' for s in table.sample_ids], table.sequences), path/'others.biom')
    write_table(make_table(table.counts, table.sample_ids, ['ACGT' + s for s in table.sequences]), path/'longer.biom')

    from aam.unifrac import Distances, read_distances, write_distances
    distances = read_distances(survey/'unifrac.h5')
    write_distances(Distances(distances.sample_ids[4:], distances.matrix[4:, 4:]), path/'lacking.h5')
    (path/'truncated.h5').write_bytes((survey/'unifrac.h5').read_bytes()[:1000])
    np.save(path/'small.npy', distances.matrix[:5, :5])
    np.save(path/'objects.npy', np.array([Boom(path/'npy_was_executed')], object), allow_pickle=True)
    (path/'broken.nwk').write_text((survey/'tree.nwk').read_text()[:200])

    frame = pd.read_csv(survey/'metadata.tsv', sep='\t', dtype=str, keep_default_na=False)
    frame['single'] = ['odd', *['even']*(len(frame) - 1)]
    frame['constant'] = 'same'
    frame['negative'] = np.linspace(-3, 3, len(frame)).round(3)
    frame['hopeless'] = ''
    frame['own_group'] = ['a' if h == 'forest' else 'b' for h in frame.habitat]
    frame.to_csv(path/'metadata.tsv', sep='\t', index=False)
    pd.concat([frame, frame[:1]]).to_csv(path/'twice.tsv', sep='\t', index=False)
    (path/'foreign_ids.txt').write_text('nobody\nnothing\n')

    (path/'text.pt').write_text('not a checkpoint')
    torch.save({'weights': {}}, path/'foreign.pt')
    (path/'malicious.pt').write_bytes(pickle.dumps(Boom(path/'pickle_was_executed')))
    torch.save({'format': 1, 'kind': 'train', 'weights': Boom(path/'archive_was_executed')}, path/'malicious_archive.pt')


class Boom:
    "Leaves a file behind when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return (eval, (f'open({str(self.path)!r}, "w").write("executed")',))


base = {
    'train': dict(table='SURVEY/table.biom', metadata='HERE/metadata.tsv', metadata_column='soil_ph', output_dir='OUT/run'),
    'pretrain': dict(table='SURVEY/table.biom', tree='SURVEY/tree.nwk', output_dir='OUT/run'),
    'predict': dict(model='TRAINED/checkpoints/best_model.pt', table='SURVEY/table.biom', output='OUT/predictions.tsv'),
    'rf-baseline': dict(table='SURVEY/table.biom', metadata='HERE/metadata.tsv', metadata_column='soil_ph', output='OUT/forest.tsv'),
}
classes = dict(metadata_column='habitat', classifier=True)
foreign = 'not a checkpoint of aam'
inputs_wrong = [ # command, options, what the message names
    ('train', dict(table='OUT/none.biom'), ['--table', 'none.biom', 'no such file']),
    ('train', dict(metadata='OUT/none.tsv'), ['none.tsv', 'no such file']),
    ('train', dict(tree='OUT/none.nwk'), ['--tree', 'none.nwk', 'no such file']),
    ('pretrain', dict(tree=None, unifrac_matrix='OUT/none.h5'), ['--unifrac-matrix', 'none.h5', 'no such file']),
    ('train', dict(train_samples='OUT/none.txt'), ['none.txt', 'no such file']),
    ('predict', dict(table='OUT/none.biom'), ['none.biom', 'no such file']),
    ('predict', dict(model='OUT/none.pt'), ['none.pt', 'no such']),
    ('rf-baseline', dict(table='OUT/none.biom'), ['none.biom', 'no such file']),
    ('train', dict(table='HERE/truncated.biom'), ['truncated.biom']),
    ('train', dict(table='HERE/empty.biom'), ['empty.biom']),
    ('predict', dict(table='HERE/truncated.biom'), ['truncated.biom']),
    ('train', dict(table='HERE/md5.biom'), ['md5.biom', 'not DNA', 'export the table with the sequences as IDs']),
    ('pretrain', dict(table='HERE/half.biom'), ['half.biom', 'integer|whole|count']),
    ('train', dict(table='HERE/negative.biom'), ['negative.biom', 'negative']),
    ('train', dict(table='HERE/others.biom'), ['no sample ID is common', 'xsite']),
    ('rf-baseline', dict(table='HERE/others.biom'), ['no sample ID is common', 'xsite']),
    ('pretrain', dict(table='HERE/longer.biom'), ['tree', 'tip|ASV']),
    ('pretrain', dict(tree='HERE/broken.nwk'), ['broken.nwk']),
    ('train', dict(metadata_column='soil_pH'), ["no column 'soil_pH'", 'soil_ph', 'habitat', 'season']),
    ('train', dict(group_column='subject'), ["no column 'subject'", 'subject_id']),
    ('rf-baseline', dict(metadata_column='soil_pH'), ["no column 'soil_pH'", 'soil_ph', 'habitat']),
    ('train', dict(metadata_column='habitat'), ["'habitat'", 'not a number', '--classifier']),
    ('train', dict(metadata_column='hopeless'), ["'hopeless'", 'no value']),
    ('train', classes | dict(metadata_column='single'), ["'odd'", 'one sample']),
    ('train', classes | dict(metadata_column='constant'), ["'constant'", "'same'"]),
    ('train', classes | dict(group_column='own_group'), ["'forest'", 'group']),
    ('train', dict(metadata_column='negative', target_transform='log-minmax'), ['negative', 'log']),
    ('train', dict(metadata='HERE/twice.tsv'), ['two rows']),
    ('train', dict(val_samples='HERE/foreign_ids.txt'), ['--val-samples', 'nobody']),
    ('train', dict(train_samples='TRAINED/train_samples.txt', val_samples='TRAINED/train_samples.txt'), ['--train-samples', '--val-samples', 'in common']),
    ('train', dict(unifrac_matrix='HERE/lacking.h5'), ['lack|not in|missing']),
    ('pretrain', dict(tree=None, unifrac_matrix='HERE/truncated.h5'), ['truncated.h5']),
    ('pretrain', dict(tree=None, unifrac_matrix='HERE/small.npy'), ['small.npy', '5']),
    ('pretrain', dict(tree=None, unifrac_matrix='HERE/objects.npy'), ['objects.npy']),
    ('train', dict(rarefy_depth=10**6), ['--rarefy-depth 1000000']),
    ('train', dict(pretrained_encoder='HERE/text.pt'), ['text.pt', foreign]),
    ('train', dict(pretrained_encoder='HERE/malicious.pt'), ['malicious.pt', foreign]),
    ('train', dict(pretrained_encoder='FIRST/checkpoints/last.pt'), ['last.pt', 'best_model.pt']),
    ('train', dict(pretrained_encoder='FIRST/checkpoints/best_model.pt', embedding_dim=32), ['--embedding-dim 32', '16']),
    ('predict', dict(model='HERE/text.pt'), ['text.pt', foreign]),
    ('predict', dict(model='HERE/foreign.pt'), ['foreign.pt', foreign]),
    ('predict', dict(model='HERE/malicious.pt'), ['malicious.pt', foreign]),
    ('predict', dict(model='HERE/malicious_archive.pt'), ['malicious_archive.pt', foreign]),
    ('predict', dict(model='SURVEY/table.biom'), ['table.biom', foreign]),
    ('predict', dict(model='FIRST/checkpoints/best_model.pt'), ['best_model.pt', 'pretrain', 'train']),
    ('train', dict(resume_from='HERE/malicious.pt'), ['malicious.pt', foreign]),
    ('train', dict(resume_from='OUT/none'), ['none', 'no such']),
]
usage_wrong = [ # these are found before any file is read
    ('train', dict(embedding_dim=30), ['--embedding-dim 30', '--attention-heads 4']),
    ('train', dict(metadata_colum='x'), ['--metadata-colum:', '--metadata-column']),
    ('train', dict(token_limt=3), ['--token-limt', '--token-limit']),
    ('predict', dict(modle='x'), ['--modle', '--model']),
    ('rf-baseline', dict(n_estimator=3), ['--n-estimator', '--n-estimators']),
    ('train', dict(embed=3), ['--embed:']), # no abbreviations
    ('train', dict(optimizer='adamv'), ['--optimizer', 'adamv', 'adamw', 'sgd']),
    ('train', dict(target_transform='min-max'), ['--target-transform', 'min-max', 'minmax']),
    ('train', dict(asv_sampling='abundant'), ['--asv-sampling', 'abundance']),
    ('train', dict(epochs='many'), ['--epochs', 'many']),
    ('train', dict(epochs=2.5), ['--epochs', '2.5']),
    ('train', dict(seed=-1), ['--seed -1', 'between 0 and']),
    ('rf-baseline', dict(seed=-1), ['--seed -1', 'between 0 and']),
    ('train', dict(batch_size=0), ['--batch-size 0', 'at least 1']),
    ('train', dict(lr='fast'), ['--lr', 'fast']),
    ('train', dict(test_size=1.5), ['--test-size 1.5']),
    ('train', dict(table=None), ['--table']),
    ('train', dict(freeze_base=True), ['--freeze-base', '--pretrained-encoder']),
    ('train', dict(normalize_by='habitat'), ['--normalize-by', 'zscore-category']),
    ('train', dict(preset='huge'), ['--preset', 'huge', 'small']),
]


def typed(command, options, places):
    "The words of a command line."
    words = [command]
    for name, value in (base[command] | options).items():
        if value is None: continue
        words.append('--' + name.replace('_', '-'))
        if value is not True:
            for place, path in places.items(): value = str(value).replace(place + '/', f'{path}/')
            words.append(value)
    return words


def expect_refusal(run, command, options, says, places):
    before = {place: contents(path) for place, path in places.items()}
    line = refused(run, *typed(command, options, places))
    for pattern in says: assert re.search(pattern if '|' in pattern else re.escape(pattern), line), (pattern, line)
    assert before == {place: contents(path) for place, path in places.items()}


def name_of(case): return case if isinstance(case, str) else '-'.join(map(str, case.values())).replace('/', '.') if isinstance(case, dict) else ''


@pytest.mark.parametrize('command,options,says', inputs_wrong, ids=name_of)
def test_wrong_input(aam, survey, pretrained, trained, folder, tmp_path, command, options, says):
    small = {} if command in ('predict', 'rf-baseline') else dict(embedding_dim=16, attention_layers=1, epochs=1)
    expect_refusal(aam, command, small | options, says, dict(SURVEY=survey, HERE=folder, OUT=tmp_path, TRAINED=trained, FIRST=pretrained))
    assert not list(folder.glob('*executed'))


@pytest.mark.parametrize('command,options,says', usage_wrong, ids=name_of)
def test_wrong_usage(aam, survey, folder, tmp_path, command, options, says):
    expect_refusal(aam.cold, command, options, says, dict(SURVEY=survey, HERE=folder, OUT=tmp_path))


def checkable():
    "The mistakes of pretrain and train that `aam check` has the options to see."
    from dataclasses import fields
    from aam.check import CheckOptions
    from aam.config import EncoderOptions, InputOptions, SplitOptions
    known = {f.name for options in (CheckOptions, EncoderOptions, InputOptions, SplitOptions) for f in fields(options)}
    return known, [case for case in inputs_wrong + usage_wrong if case[0] in ('pretrain', 'train') and set(case[1]) <= known]


@pytest.mark.parametrize('command,options,says', checkable()[1], ids=name_of)
def test_check_finds_what_runs_refuse(aam, survey, pretrained, trained, folder, tmp_path, command, options, says):
    "As an error of the report (exit 1), or, where a file cannot be read, as the command itself would say it (2)."
    small = dict(attention_layers=1) | ({} if options.get('pretrained_encoder') or 'embedding_dim' in options else dict(embedding_dim=16))
    known, _ = checkable()
    wanted = {k: v for k, v in (base[command] | small | options).items() if k in known}
    words = []
    for name, value in wanted.items():
        if value is None: continue
        for place, path in dict(SURVEY=survey, HERE=folder, OUT=tmp_path, TRAINED=trained, FIRST=pretrained).items(): value = str(value).replace(place + '/', f'{path}/') if value is not True else True
        words += ['--' + name.replace('_', '-'), *([] if value is True else [value])]
    process = aam('check', *words, '--device', 'cpu', fails=True)
    said = process.out + process.err
    lines = [line for line in said.splitlines() if line.startswith(('error: ', 'aam: '))]
    assert process.returncode in (1, 2) and 'Traceback' not in said, said
    assert process.returncode == 1 or len(lines) == 1 and lines[0].startswith('aam: '), said
    for pattern in says: assert any(re.search(pattern if '|' in pattern else re.escape(pattern), line) for line in lines), (pattern, lines)
    assert not list(folder.glob('*executed')) and not contents(tmp_path)


def random_inputs(survey, folder, seed):
    "A few samples of the survey, some shallow or empty, with gaps in the metadata; and options that may or may not go with them."
    from aam.unifrac import read_distances
    rng = np.random.default_rng(seed)
    table, frame = read_table(survey/'table.biom'), pd.read_csv(survey/'metadata.tsv', sep='\t', dtype=str, keep_default_na=False, index_col=0)
    ids = sorted(rng.choice(table.sample_ids, rng.choice([2, 3, 4, 5, 6, 8, 12, 20, 48]), replace=False))
    counts = table.select(ids).counts.toarray()
    if rng.random() < .3: counts[1:][rng.random(len(ids) - 1) < .3] = 0
    if rng.random() < .3: counts[1:][rng.random(len(ids) - 1) < .4] //= 200
    write_table(make_table(counts, ids, table.sequences), folder/'table.biom')
    frame['few'], frame['numbers'] = rng.choice(['a', 'b', 'c'], len(frame), p=[.8, .15, .05]), rng.integers(-1, 5, len(frame)).astype(str)
    for column in 'soil_ph', 'few', 'habitat', 'season', 'subject_id', 'numbers': frame.loc[rng.random(len(frame)) < rng.choice([0, .2, .9]), column] = ''
    frame.sample(frac=1, random_state=seed).to_csv(folder/'metadata.tsv', sep='\t')
    np.save(folder/'ordered.npy', read_distances(survey/'unifrac.h5').align(ids))
    maybe = lambda p, *words: list(words) if rng.random() < p else []
    distances = ['--tree', survey/'tree.nwk'], ['--unifrac-matrix', survey/'unifrac.h5'], ['--unifrac-matrix', folder/'ordered.npy'], []
    words = [*distances[rng.integers(4)], '--metadata-column']
    if rng.random() < .5: words += [rng.choice(['few', 'habitat', 'season', 'numbers']), '--classifier']
    else:
        words += [rng.choice(['soil_ph', 'soil_ph,soil_moisture', 'numbers']), '--target-transform', rng.choice(['minmax', 'none', 'zscore', 'log-minmax'])]
        if rng.random() < .2: words[-1:] = ['zscore-category', '--normalize-by', 'season']
    words += maybe(.4, '--group-column', rng.choice(['subject_id', 'habitat'])) + maybe(.3, '--categorical-columns', rng.choice(['habitat', 'season', 'few'])) + maybe(.3, '--rarefy-depth', rng.choice([5, 500, 2000, 4000]))
    order = rng.permutation(ids)
    (folder/'fit.txt').write_text('\n'.join(order[:len(order)//2])); (folder/'val.txt').write_text('\n'.join(order[len(order)//2:]))
    if rng.random() < .4: words += ['--train-samples', folder/'fit.txt', *maybe(.7, '--val-samples', folder/'val.txt')]
    return ['--table', folder/'table.biom', '--metadata', folder/'metadata.tsv', *words]


@pytest.mark.parametrize('seed', [*range(12), *[pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 60)]])
def test_ready_means_that_it_trains(aam, survey, tmp_path, seed):
    "Whatever check calls ready trains; what train refuses, check has found."
    words = random_inputs(survey, tmp_path, seed)
    checked = aam('check', *words, *aam.tiny, fails=True)
    code, said = checked.returncode, checked.out + checked.err
    run = aam('train', *words, *aam.tiny, '--epochs', 1, '--output-dir', tmp_path/'run', fails=True)
    assert 'Traceback' not in said + run.err, said + run.err
    assert (code == 0) == (run.returncode == 0) or 'nothing to predict' in said or 'its rows' in said, (words, said[-600:], run.err[-600:])


def test_wrong_command(aam):
    assert refused(aam.cold, 'trian', says=['trian', 'aam train'])
    assert refused(aam.cold, 'rf_baseline', says=['aam rf-baseline'])


@pytest.mark.parametrize('command,options,says', [inputs_wrong[0], ('train', dict(table='HERE/md5.biom'), ['not DNA']), ('predict', dict(model='HERE/malicious.pt'), [foreign])], ids=name_of)
def test_wrong_input_cold(aam, survey, folder, tmp_path, command, options, says):
    "As the installed command does it, imports and all."
    expect_refusal(aam.cold, command, options, says, dict(SURVEY=survey, HERE=folder, OUT=tmp_path))
    assert not list(folder.glob('*executed'))


def test_several_processes(aam, survey, tmp_path):
    refused(aam.cold, *typed('train', {}, dict(SURVEY=survey, HERE=survey, OUT=tmp_path)), env={'WORLD_SIZE': '2'}, says=['2 processes'])
    assert not contents(tmp_path)


def test_debug_shows_the_traceback(aam, survey, tmp_path):
    process = aam.cold(*typed('train', dict(table='OUT/none.biom', debug=True), dict(SURVEY=survey, HERE=survey, OUT=tmp_path)), fails=True)
    assert process.returncode != 0 and 'Traceback' in process.err and 'AamError' in process.err


def test_finished_run_survives(aam, survey, trained, folder, tmp_path):
    "Refused without --overwrite; kept when the replacement fails; replaced when it does not."
    import shutil
    run = tmp_path/'run'
    shutil.copytree(trained, run)
    (run/'notes.txt').write_text('mine')
    before = contents(run)
    places = dict(SURVEY=survey, HERE=folder, OUT=tmp_path)
    assert before
    refused(aam, *typed('train', {}, places), says=['--output-dir', 'holds a run', '--overwrite', '--resume-from'])
    assert contents(run) == before
    for wrong in (dict(table='HERE/md5.biom'), dict(metadata_column='soil_pH'), dict(pretrained_encoder='HERE/text.pt'), dict(unifrac_matrix='HERE/lacking.h5')):
        refused(aam, *typed('train', wrong | dict(overwrite=True), places))
        assert contents(run) == before, wrong
    aam(*typed('train', dict(overwrite=True, embedding_dim=16, attention_layers=1, kmer_dim=16, max_bp=60, epochs=1, penalty=0, count_penalty=0), places))
    assert json.loads((run/'config.json').read_text())['options']['training']['epochs'] == 1
    assert (run/'notes.txt').read_text() == 'mine' and not (run/'test_predictions.tsv').exists()


def test_existing_output_survives(aam, survey, trained, folder, tmp_path):
    places = dict(SURVEY=survey, HERE=folder, OUT=tmp_path, TRAINED=trained)
    for command, name in dict(predict='predictions.tsv', **{'rf-baseline': 'forest.tsv'}).items():
        (tmp_path/name).write_text('mine')
        refused(aam, *typed(command, {}, places), says=[name, '--overwrite'])
        refused(aam, *typed(command, dict(overwrite=True, table='HERE/truncated.biom'), places), says=['truncated.biom'])
        assert (tmp_path/name).read_text() == 'mine'
    (tmp_path/'run').write_text('a file')
    refused(aam, *typed('train', {}, places), says=['--output-dir', 'is a file'])
    refused(aam, *typed('predict', dict(output='OUT/no/where.tsv'), places), says=['--output', 'does not exist'])


def built(name):
    try: return load_command(name) is not None
    except ModuleNotFoundError: return False


@pytest.mark.parametrize('name', commands)
def test_help_is_light(aam, name):
    if not built(name): pytest.skip(f'aam {name} is not built yet')
    code = f"import sys; from aam.cli import main; code = main([{name!r}, '--help']); print([m for m in {heavy} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    used = []
    for _ in range(3): # a busy machine inflates CPU time: the quickest of three counts
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.run([sys.executable, '-c', code], env=aam.environment, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process.returncode == 0 and process.stderr.strip() == '[]', process.stderr
        assert f'usage: aam {name}' in process.stdout and '--debug' in process.stdout
        used.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        if used[-1] < 0.5: return
    pytest.fail(f'{min(used):.2f} CPU-s')


@pytest.mark.parametrize('words', [['train', '--help'], ['--help'], ['check', '--table', 'none.biom']], ids=['longer than a buffer', 'shorter', 'an error'])
def test_reader_that_leaves(aam, words):
    "As `head` does: no traceback, and the exit code is that of a program ended by SIGPIPE."
    process = aam.start(*words)
    process.stdout.close()
    said = process.stderr.read()
    assert (process.wait(timeout=60), said.count('\n')) == ((2, 1) if words[0] == 'check' else (128 + signal.SIGPIPE, 0)), said


def test_overview(aam):
    for words in [], ['--help'], ['help']: assert all(name in aam.cold(*words).out for name in commands)
    assert re.fullmatch(r'aam \d+\.\d+\S*', aam.cold('--version').out.strip())
