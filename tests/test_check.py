"What `aam check` says of each bad input, word for word, and its exit code."
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aam.cli import main
from aam.diagnosis import iupac_pattern, locate_sequence, matrix_facts, matrix_findings, primers, reverse_complement, technical_columns
from aam.table import make_table, read_table, write_table
from aam.unifrac import Distances, read_distances, read_tree, unifrac_distances, write_distances

mouse = Path(__file__).parents[2]/'shared/data/mouse_age'
tiny = '--embedding-dim', '16', '--attention-layers', '1', '--kmer-dim', '8'
v4_start = 'TACGGAGGGTGCAAGCGTTAATCGGAATTACTGGGCGTAAAG'


@pytest.fixture(scope='module')
def v4(survey, tmp_path_factory):
    "The survey with sequences that begin as V4 reads do, and files with one mistake each."
    folder = tmp_path_factory.mktemp('v4')
    table = read_table(survey/'table.biom')
    reads = [v4_start + s[:60] for s in table.sequences]
    ids = table.sample_ids

    def write(name, sequences): write_table(make_table(table.counts, ids, sequences), folder/name)
    write('table.biom', reads)
    write('turned.biom', map_all(reverse_complement, reads))
    write('half.biom', [reverse_complement(s) if i % 2 else s for i, s in enumerate(reads)])
    write('primer.biom', ['GTGCCAGCAGCCGCGGTAA' + s for s in reads])
    write('both_primers.biom', ['GTGTCAGCCGCCGCGGTAA' + s + reverse_complement('GGACTACCAGGGTATCTAAT') for s in reads])
    write('from_806R.biom', ['GGACTACCAGGGTATCTAAT' + reverse_complement(s) for s in reads])
    write('27F.biom', ['AGAGTTTGATCATGGCTCAG' + 'GATGAACGCTGGCGGCGTGC' + s[45:] for s in reads])
    write('341F.biom', ['CCTACGGGAGGCTGCAG' + 'TGGGGAATATTGCACAATGG' + s[45:] for s in reads])
    write('two_regions.biom', ['TGGGGAATATTGCACAATGG' + s[45:] if i % 2 else s for i, s in enumerate(reads)])

    distances = read_distances(survey/'unifrac.h5')
    matrix, n = distances.align(ids), len(ids)

    def save(name, order): np.save(folder/name, matrix[np.ix_(order, order)])
    save('honest.npy', np.arange(n))
    save('permuted.npy', np.random.default_rng(1).permutation(n))
    save('sorted.npy', np.argsort(ids))
    part = np.arange(n)
    part[:16] = np.random.default_rng(2).permutation(16)
    save('partly.npy', part)
    save('halves.npy', np.r_[n//2:n, :n//2])
    shuffled = np.random.default_rng(3).permutation(n) # the order of shuffled.tsv
    save('as_metadata.npy', shuffled)
    order = np.random.default_rng(1).permutation(n)
    write_distances(Distances(ids, matrix[np.ix_(order, order)]), folder/'permuted.h5')

    frame = pd.read_csv(survey/'metadata.tsv', sep='\t', dtype=str, keep_default_na=False, index_col=0)
    known = pd.to_numeric(frame.soil_ph).fillna(6)
    frame['prep_plate'] = pd.qcut(known, 4, labels=list('abcd')).astype(str)
    frame['robot'] = frame.prep_plate
    frame['lane'] = [f'lane{i}' for i in range(len(frame))]
    frame['same'] = '7'
    frame['three'] = [str(i % 3) for i in range(len(frame))]
    frame['of_subject'] = frame.groupby('subject_id').ngroup().astype(str)
    frame['of_some'] = [v if int(v) < 6 else str(100 + i) for i, v in enumerate(frame.of_subject)]
    frame['rare'] = ['odd'] * 4 + ['even'] * (len(frame) - 4)
    frame['negative'] = '-1'
    frame.loc[sorted(frame.index)[3:], 'negative'] = [str(i) for i in range(len(frame) - 3)]
    frame['empty'] = ''
    order = sorted(frame.index)
    frame['late'] = ['' if s in order[:30] else '5' + s[-1] for s in frame.index]
    frame['halved'] = ['early' if s in order[:30] else 'late' for s in frame.index]
    frame['own_group'] = ['a' if h == 'forest' else 'b' for h in frame.habitat]
    frame.to_csv(folder/'metadata.tsv', sep='\t')
    frame[5:].to_csv(folder/'fewer.tsv', sep='\t')
    frame.loc[[ids[i] for i in shuffled]].to_csv(folder/'shuffled.tsv', sep='\t')
    first = sorted(frame.index)
    (folder/'fit.txt').write_text('\n'.join(first[:30]))
    (folder/'val.txt').write_text('\n'.join(first[30:]))
    (folder/'two.txt').write_text('\n'.join([s for s, n in zip(ids, table.reads) if n >= 4500][:2]))
    return folder


def map_all(function, items): return [function(item) for item in items]


@pytest.fixture
def check(v4, capsys):
    "Runs the command; returns the exit code and the lines of findings, or the line of an error."
    def run(*words, table='table.biom', meta='metadata.tsv', json_wanted=False):
        typed = ['check', '--table', v4/table, *(['--metadata', v4/meta] if meta else []), *words, *tiny, '--device', 'cpu', *(['--json'] if json_wanted else [])]
        capsys.readouterr()
        code = main([str(word) for word in typed])
        out, err = capsys.readouterr()
        if json_wanted: return code, json.loads(out)
        assert (err == '') == (code != 2), err
        return code, re.findall('^(?:note|warning|error): .*', out, re.M) if code != 2 else err.strip()
    return run


grouped = '--group-column', 'subject_id'


def test_good_inputs(check, survey):
    code, lines = check('--unifrac-matrix', survey/'unifrac.h5', '--metadata-column', 'soil_ph', *grouped, meta='metadata.tsv')
    assert code == 0 and len(lines) == 1 and lines[0].startswith('warning: prep_plate predicts soil_ph: ') # which it was made to do
    assert check(meta=None) == (0, [])


@pytest.mark.parametrize('table,expected', [
    ('primer.biom', [f"warning: primer 515F ({primers['515F']}) is still in 100.0 % of the reads: trim it (cutadapt) and denoise again; other tables will not match this one"]),
    ('27F.biom', [f"warning: primer 27F ({primers['27F']}) is still in 100.0 % of the reads: trim it (cutadapt) and denoise again; other tables will not match this one"]),
    ('341F.biom', [f"warning: primer 341F ({primers['341F']}) is still in 100.0 % of the reads: trim it (cutadapt) and denoise again; other tables will not match this one"]),
    ('both_primers.biom', [f"warning: primer {name} ({primers[name]}) is still in 100.0 % of the reads: trim it (cutadapt) and denoise again; other tables will not match this one" for name in ('515F', '806R')]),
    ('from_806R.biom', [f"warning: primer 806R ({primers['806R']}) is still in 100.0 % of the reads: trim it (cutadapt) and denoise again; other tables will not match this one",
                        'warning: the sequences are reverse complements: turn them round; tables in the usual orientation will not match this one']),
    ('turned.biom', ['warning: the sequences are reverse complements: turn them round; tables in the usual orientation will not match this one']),
])
def test_sequences(check, table, expected):
    assert check(table=table, meta=None) == (0, expected)


def test_merged_tables_without_a_common_asv(check, v4):
    "Trimmed to other lengths, of another region, and with another table between."
    table = read_table(v4/'table.biom')
    parts = {'a': (0, 20, lambda s: s), 'same': (20, 48, lambda s: s), 'shorter': (20, 48, lambda s: s[:70]), 'v3': (20, 48, lambda s: 'TGGGGAATATTGCACAATGG' + s[45:])}
    for name, (first, last, change) in parts.items():
        some = table.select(table.sample_ids[first:last])
        here = np.unique(some.counts.indices)
        write_table(make_table(some.counts[:, here], some.sample_ids, [change(table.sequences[i]) for i in here], name), v4/f'{name}.biom')
    several = lambda *names: ','.join(str(v4/f'{name}.biom') for name in names)
    n, longer = (len(read_table(v4/f'{name}.biom').sequences) for name in ('a', 'shorter'))
    lengths = [len(read_table(v4/f'{name}.biom').sequences[0]) for name in ('a', 'shorter', 'v3')]
    assert check(table=several('a', 'same'), meta=None) == (0, [])
    code, (line,) = check(table=several('a', 'shorter'), meta=None)
    assert code == 0 and re.fullmatch(rf'warning: a.biom: none of its {n} ASVs is in the other table; \d+ of them begin with the same 70 bases as one there: trimmed to different lengths \({lengths[0]} and 70 bases\); trim all to one length and denoise again', line)
    code, (line, mixed) = check(table=several('a', 'v3'), meta=None)
    assert code == 0 and line == (f'warning: a.biom: none of its {n} ASVs is in the other table; another region, other primers or the other strand ({lengths[0]} and {lengths[2]} bases in the median); '
                                  'an organism counts as several ASVs, so give tables of one region') and 'reads of several regions' in mixed
    some = table.select(table.sample_ids[:3])
    write_table(make_table(some.counts, ['x', 'y', 'z'], [reverse_complement(s) for s in table.sequences], 'strand'), v4/'strand.biom')
    code, lines = check(table=several('a', 'same', 'strand'), meta=None)
    assert code == 0 and [line.split(';')[0] for line in lines if 'none of its' in line] == [f'warning: strand.biom: none of its {len(np.unique(some.counts.indices))} ASVs is in the other tables']


def test_whole_genes(check, v4):
    "Reads from 27F to 1492R begin as V1-V2 does, but are not V1-V2."
    table, rng = read_table(v4/'table.biom'), np.random.default_rng(0)
    rest = ''.join(rng.choice(list('ACGT'), 1400))
    write_table(make_table(table.counts, table.sample_ids, ['GATGAACGCTGGCGGCGTGC' + s + rest for s in table.sequences], 'whole'), v4/'whole.biom')
    write_table(make_table(table.counts, table.sample_ids, ['GATGAACGCTGGCGGCGTGC' + s for s in table.sequences], 'v1'), v4/'v1.biom')
    for name, region in ('whole', 'full-length'), ('v1', 'V1-V2'):
        code, found = check(table=f'{name}.biom', meta=None, json_wanted=True)
        assert code == 0 and found['sequences']['regions'] == {region: 1.} and found['sequences']['reversed'] == 0


def test_mixed_sequences(check, survey):
    code, (line,) = check(table='half.biom', meta=None)
    assert code == 0 and re.fullmatch(r'warning: \d\d\.\d % of the reads are reverse complements, the others are not: turn them round; an organism now counts as two ASVs', line)
    code, (line,) = check(table='two_regions.biom', meta=None)
    assert code == 0 and re.fullmatch(r'warning: reads of several regions in one table \((V4|V3-V4) \d\d\.\d %, (V4|V3-V4) \d\d\.\d %\): an organism counts as several ASVs; train on one region', line)
    code, (line,) = check(table=survey/'table.biom', meta=None)
    assert (code, line) == (0, 'note: 100.0 % of the reads begin like none of V4, V3-V4, V1-V2; region and orientation of these were not checked')


def test_limits(check):
    code, (line,) = check('--max-bp', 42, meta=None)
    assert code == 0 and re.fullmatch(r'note: 53 of 53 ASVs \(100\.0 % of the reads\) begin with the same 42 bases \(--max-bp\) as another: the nucleotide stack sees them alike; --max-bp \d+ tells all apart', line)
    code, (line,) = check('--token-limit', 10, meta=None)
    assert code == 0 and re.fullmatch(r"warning: 48 samples have more than --token-limit 10 ASVs: 'first' ignores \d\d\.\d % of their reads, --asv-sampling abundance would ignore the rarest", line)
    code, found = check('--token-limit', 10, '--asv-sampling', 'abundance', meta=None, json_wanted=True)
    assert code == 0 and found['sequences']['token_limit']['samples_over'] == 48 and 0 < found['sequences']['token_limit']['reads_lost'] < .8


def test_matrix(check, v4, survey):
    no_ids = ('warning: {0}.npy: .npy has no sample IDs, its rows are taken to be the samples of the table in their order; {0}.ids.txt beside it would name them').format
    assert check('--unifrac-matrix', v4/'honest.npy', meta=None) == (0, [no_ids('honest')])
    code, (warned, line) = check('--unifrac-matrix', v4/'permuted.npy', meta=None)
    assert (code, warned) == (1, no_ids('permuted'))
    assert re.fullmatch(r'error: permuted\.npy: its rows are not the samples of the table in their order \(rank correlation with Jaccard -?0\.\d\d; rows shuffled at random reach 0\.\d\d\): '
                        r'write the IDs of its rows to permuted\.ids\.txt, one a line; if it is right all the same, add --trust-unifrac', line), line
    code, (_, line) = check('--unifrac-matrix', v4/'sorted.npy', meta=None)
    assert code == 1 and re.fullmatch(r'error: sorted\.npy: its rows are not in the order of the table; they fit sorted by ID \(rank correlation with Jaccard 0\.\d\d instead of -?0\.\d\d\): '
                                      r'write the IDs of its rows to sorted\.ids\.txt, one a line; if it is right all the same, add --trust-unifrac', line), line
    code, (_, line) = check('--unifrac-matrix', v4/'partly.npy', meta=None)
    assert code == 1 and re.fullmatch(r'error: partly\.npy: part of its rows are not the samples of the table in their order \(rank correlation with Jaccard 0\.\d\d, with its rows rearranged 0\.\d\d\): write the IDs of its rows to partly\.ids\.txt, one a line; if it is right all the same, add --trust-unifrac', line), line
    code, (_, line) = check('--unifrac-matrix', v4/'halves.npy', meta=None)
    assert code == 1 and re.fullmatch(r'error: halves\.npy: (part of )?its rows are not the samples of the table in their order \(rank correlation with \S+ -?0\.\d\d.*\): write the IDs of its rows to halves\.ids\.txt, one a line; if it is right all the same, add --trust-unifrac', line), line
    code, lines = check('--unifrac-matrix', v4/'as_metadata.npy', meta='shuffled.tsv')
    line, = [line for line in lines if line.startswith('error')]
    assert code == 1 and re.fullmatch(r'error: as_metadata\.npy: its rows are not in the order of the table; they fit the order of the metadata \(rank correlation with Jaccard 0\.\d\d instead of -?0\.\d\d\): write the IDs of its rows to as_metadata\.ids\.txt, one a line; if it is right all the same, add --trust-unifrac', line), line
    code, lines = check('--unifrac-matrix', survey/'unifrac.h5', '--tree', survey/'tree.nwk', '--unifrac-metric', 'weighted', table=survey/'table.biom', meta=None)
    line, = [line for line in lines if line.startswith('warning')]
    assert code == 0 and re.fullmatch(r'warning: unifrac\.h5: follows presence, not abundances \(rank correlation with unweighted UniFrac from the tree 0\.\d\d, with weighted UniFrac from the tree 0\.\d\d\); '
                                      r'if it is unweighted UniFrac, say --unifrac-metric unweighted', line), line
    code, (line,) = check('--unifrac-matrix', v4/'permuted.h5', meta=None)
    assert code == 1 and line.startswith('error: permuted.h5: its rows are not the samples of the table in their order') and line.endswith('compute it again from this table; if it is right all the same, add --trust-unifrac')
    trusted = check('--unifrac-matrix', v4/'permuted.h5', '--trust-unifrac', meta=None)
    assert trusted == (0, ['warning: ' + line.removeprefix('error: ').removesuffix('; if it is right all the same, add --trust-unifrac')])


def test_technical_columns(check):
    code, lines = check('--metadata-column', 'soil_ph', *grouped)
    assert code == 0 and len(lines) == 1
    assert re.fullmatch(r'warning: prep_plate predicts soil_ph: the mean of each reaches R2 0\.\d\d, leave-one-out; a model may learn the laboratory: validate with --group-column prep_plate', lines[0])
    code, (line,) = check('--metadata-column', 'soil_ph', '--technical-columns', 'robot', *grouped)
    assert code == 0 and line.startswith('warning: robot predicts soil_ph: ')
    code, lines = check('--metadata-column', 'prep_plate', '--classifier', '--technical-columns', 'robot', *grouped)
    assert code == 0 and lines[-1] == ('warning: robot predicts prep_plate: the most frequent class of each is right for 100.0 % of the samples (of all: 25.0 %), leave-one-out; '
                                       'a model may learn the laboratory: validate with --group-column robot')
    facts = check('--metadata-column', 'soil_ph', *grouped, json_wanted=True)[1]['technical']
    assert set(facts) == {'sequencing_run', 'prep_plate', 'lane'}
    assert facts['lane']['predicts']['soil_ph']['score'] < 0 # a value of its own for each sample


def test_groups(check, v4):
    quiet = '--technical-columns', 'habitat'
    code, lines = check('--metadata-column', 'of_subject', *grouped, '--train-samples', v4/'fit.txt', '--val-samples', v4/'val.txt', *quiet)
    assert code == 0 and [line for line in lines if 'groups with samples' in line] == [
        'warning: groups with samples in both the fit and the stop part (1: site08): scores there are not scores of new groups']
    assert 'warning: each group of subject_id has a single value of of_subject: a score is one over 12 groups, not over 48 samples' in lines
    assert 'note: 6 of 12 groups of subject_id with several samples have a single value of of_some' in check('--metadata-column', 'of_some', *grouped, *quiet)[1]
    assert ("note: column 'subject_id' names 12 subjects for 48 samples; without --group-column subject_id a score may be one on subjects seen in training"
            in check('--metadata-column', 'of_some', *quiet)[1])
    assert check('--metadata-column', 'soil_ph', '--train-samples', v4/'fit.txt', '--val-samples', v4/'val.txt', *quiet)[1][1:] == [
        "warning: column 'subject_id': 1 of 12 subjects have samples in the list to fit on and in another; scores there are not scores of new subjects"]
    code, lines = check('--metadata-column', 'habitat', '--classifier', '--group-column', 'own_group', *quiet)
    assert code == 1 and [line for line in lines if line.startswith('error')] == [
        "error: all samples of class 'forest' are in one group (a); --group-column needs classes in at least two groups: leave the class out or group by another column"]


def test_target(check, v4):
    none = *grouped, '--technical-columns', 'robot'
    code, lines = check('--metadata-column', 'habitat', *none)
    assert code == 1 and any(re.fullmatch(r"error: column 'habitat' has the value '\w+' \(sample \S+\), which is not a number; correct it, leave it empty, or predict classes with --classifier", line) for line in lines)
    code, lines = check('--metadata-column', 'same', *none)
    assert code == 1 and "error: column 'same' has the value 7 for all samples: nothing to predict; choose another column" in lines
    code, lines = check('--metadata-column', 'same', '--classifier', *none)
    assert code == 1 and "error: column 'same' has only the value '7'; a classifier needs at least two classes" in lines
    assert "note: column 'three' has only 3 different values; if these are classes, add --classifier" in check('--metadata-column', 'three', *none)[1]
    code, lines = check('--metadata-column', 'negative', '--target-transform', 'log-minmax', *none)
    assert code == 1 and [line for line in lines if line.startswith('error')] == [
        "error: --target-transform log-minmax: negative values in column 'negative' (site01.visit1: -1, site01.visit2: -1, site01.visit3: -1); correct them or choose minmax or zscore"]
    code, lines = check('--metadata-column', 'soil_ph', '--categorical-columns', 'empty', *none)
    assert code == 1 and 'error: --categorical-columns empty: no sample to fit on has a value; leave it out' in lines
    code, lines = check('--metadata-column', 'soil_ph', '--categorical-columns', 'lane', *none)
    assert code == 0 and any(re.fullmatch(r'warning: lane has (\d+) values in \1 samples to fit on: hardly a category', line) for line in lines)
    code, lines = check('--metadata-column', 'soil_ph,late', '--train-samples', v4/'fit.txt', '--val-samples', v4/'val.txt', *none)
    assert code == 1 and "error: none of the 29 samples to fit on has a value of 'late'; change the lists of samples, or predict this column by itself" in lines
    code, lines = check('--metadata-column', 'halved', '--classifier', '--train-samples', v4/'fit.txt', '--val-samples', v4/'val.txt', *none)
    assert code == 1 and "error: the samples to fit on are all of class 'early'; a classifier needs at least two classes there: change --train-samples, or the seed of the split" in lines
    code, lines = check('--rarefy-depth', 4500, '--unifrac-matrix', v4/'honest.npy', '--train-samples', v4/'two.txt', *grouped)
    assert code == 1 and 'error: fewer than three samples to fit on reach the rarefaction depth of 4500 reads, too few for UniFrac: lower --rarefy-depth' in lines
    code, lines = check('--metadata-column', 'rare', '--classifier', *none)
    assert code == 0 and "warning: column 'rare': classes with fewer than 10 samples (odd 4); their scores rest on chance" in lines


def test_losses_and_depth(check):
    code, found = check('--metadata-column', 'soil_ph', '--rarefy-depth', 3000, meta='fewer.tsv', json_wanted=True)
    first, *rest = found['losses']
    assert code == 0 and (first['samples'], first['asvs']) == (48, 53)
    assert rest[0]['step'].startswith('not in ') and rest[0]['samples'] == 43 and [row['step'] for row in rest[1:]] == ['fewer reads than --rarefy-depth 3000', 'no value of soil_ph'] # as train drops them
    chosen = next(row for row in found['depth']['depths'] if row['chosen'])
    assert chosen['depth'] == 3000 and chosen['samples'] == rest[1]['samples']
    assert found['cost']['seconds_per_epoch'] > 0 and found['cost']['memory_gb'] > 0


def test_depth_that_costs_one_class():
    from types import SimpleNamespace
    from aam.check import Report, check_depth
    table = make_table(np.array([[9], [9], [99], [99], [99], [9]]), list('abcdef'), ['ACGT'])
    report = Report()
    check_depth(report, SimpleNamespace(table=table, depth=50), pd.Series(['gut', 'gut', 'gut', 'skin', 'skin', 'gut']), asked=50)
    assert [str(f) for f in report.findings] == ['warning: --rarefy-depth 50 keeps classes unequally (25 % of gut, 100 % of skin); a lower depth, or none, loses less']


@pytest.mark.parametrize('words,how,expected', [
    (['--metadata-column', 'soil_ph'], dict(meta=None), 'aam: --metadata-column soil_ph: needs --metadata'),
    (['--group-column', 'subject_id'], dict(meta=None), 'aam: --group-column subject_id: needs --metadata'),
    ([], dict(table='none.biom'), 'aam: --table HERE/none.biom: no such file'),
    ([], dict(meta='none.tsv'), 'aam: HERE/none.tsv: no such file; give the sample metadata as tab-separated text'),
    (['--trust-unifrac'], {}, 'aam: --trust-unifrac: does nothing without --unifrac-matrix or --faith-pd; leave it out'),
    (['--classifier'], {}, 'aam: --classifier predicts one column: give one with --metadata-column'),
    (['--val-samples', 'HERE/none.txt'], {}, 'aam: HERE/none.txt: no such file; give a file with one sample ID a line'),
    (['--metadata-column', 'soil_pH'], {}, "aam: the metadata has no column 'soil_pH'; its columns are soil_ph, soil_moisture, own_group, season, sequencing_run, of_some, subject_id, prep_plate, lane, same, late, robot, three, empty, halved, habitat, negative, of_subject, rare"),
    (['--technical-columns', 'robo'], {}, "aam: the metadata has no column 'robo'; its columns are robot, of_some, own_group, of_subject, rare, three, season, habitat, soil_ph, subject_id, prep_plate, soil_moisture, sequencing_run, lane, same, negative, empty, late, halved"),
    (['--tree', 'HERE/none.nwk'], {}, 'aam: --tree HERE/none.nwk: no such file'),
    (['--categorical-columns', 'habitat'], {}, 'aam: --categorical-columns habitat: needs --metadata-column'),
    (['--target-transform', 'zscore'], {}, 'aam: --target-transform zscore: needs --metadata-column'),
    (['--metadata-column', 'soil_ph', '--normalize-by', 'habitat'], {}, 'aam: --target-transform zscore-category and --normalize-by COLUMN go together: give both or neither'),
    (['--metadata-column', 'habitat', '--classifier', '--target-transform', 'zscore'], {}, 'aam: --target-transform zscore: is for regression; leave it out or drop --classifier'),
    (['--metadata-column', 'habitat,season', '--classifier'], {}, 'aam: --classifier predicts one column: give one with --metadata-column'),
    (['--metadata-column', 'soil_ph', '--categorical-columns', 'soil_ph'], {}, 'aam: --categorical-columns soil_ph: is the target; leave it out'),
    (['--pretrained-encoder', 'HERE/fit.txt'], {}, 'aam: HERE/fit.txt: not a checkpoint of aam, or damaged (BadZipFile); give the best_model.pt or last.pt of a run'),
    (['--rarefy-depth', '1000000'], {}, 'aam: all 48 samples would be dropped: fewer reads than --rarefy-depth 1000000 (site01.visit1, site01.visit2, site01.visit3, ...)'),
])
def test_unreadable(check, v4, words, how, expected):
    code, line = check(*[w.replace('HERE', str(v4)) for w in words], **how)
    assert code == 2 and line == expected.replace('HERE', str(v4))


def test_train_and_pretrain_look_first(aam, v4, tmp_path):
    words = ['--table', v4/'primer.biom', '--unifrac-matrix', v4/'permuted.npy', '--output-dir', tmp_path/'run', *tiny, '--epochs', 1]
    for more in ['pretrain'], ['train', '--metadata', v4/'metadata.tsv', '--metadata-column', 'soil_ph']:
        run = aam(more[0], *words, *more[1:], fails=True)
        assert run.returncode == 2 and not (tmp_path/'run').exists()
        assert re.search(r'^aam: --unifrac-matrix permuted\.npy: its rows are not the samples of the table in their order .*: write the IDs of its rows to permuted\.ids\.txt, one a line; if it is right all the same, add --trust-unifrac$', run.err, re.M), run.err
    run = aam('pretrain', *words, '--trust-unifrac', '--max-bp', 30, '--unifrac-branches', 8)
    assert re.search(r'^warning: permuted\.npy: its rows are not the samples of the table in their order .*: write the IDs of its rows to permuted\.ids\.txt, one a line$', run.err, re.M), run.err
    words[words.index(v4/'permuted.npy')] = v4/'honest.npy'
    words.append('--overwrite')
    run = aam('pretrain', *words, '--max-bp', 30, '--unifrac-branches', 8)
    assert 'warning: primer 515F (GTGYCAGCMGCCGCGGTAA) is still in 100.0 % of the reads' in run.err


@pytest.mark.skipif(not mouse.exists(), reason='the data set mouse_age is not here')
def test_mouse_age(aam, tmp_path):
    "The matrix that trains on noise without a word, caught; the same file in order, without IDs, passes."
    distances, table = read_distances(mouse/'unifrac.h5'), read_table(mouse/'table.biom')
    honest = distances.align(table.sample_ids)
    order = np.random.default_rng(0).permutation(len(honest))
    for name, matrix in dict(honest=honest, permuted=honest[np.ix_(order, order)]).items(): np.save(tmp_path/f'{name}.npy', matrix)
    words = ['--table', mouse/'table.biom', '--metadata', mouse/'metadata.tsv', '--metadata-column', 'age_weeks', '--group-column', 'host_id', *tiny]
    good = aam('check', *words, '--unifrac-matrix', tmp_path/'honest.npy')
    assert good.err == '' and good.out.rstrip().splitlines()[-1] == 'ready to train: 0 errors, 1 warning, 1 note'
    bad = aam('check', *words, '--unifrac-matrix', tmp_path/'permuted.npy', fails=True)
    assert bad.returncode == 1 and bad.err == ''
    line, = re.findall('^error: .*', bad.out, re.M)
    assert re.fullmatch(r'error: permuted\.npy: its rows are not the samples of the table in their order \(rank correlation with Jaccard -?0\.0\d; rows shuffled at random reach 0\.0\d\): '
                        r'write the IDs of its rows to permuted\.ids\.txt, one a line; if it is right all the same, add --trust-unifrac', line)
    assert bad.out.rstrip().splitlines()[-1].startswith('training would fail or mislead: 1 error, ')


data = mouse.parent
sets = {'mouse_age': ('age_weeks', 'host_id'), 'mackerel_body_site': ('body_site', 'host_id', '--classifier'), 'moving_pictures': ('body_habitat', 'subject', '--classifier')}


@pytest.mark.skipif(not mouse.exists(), reason='the data sets are not here')
@pytest.mark.parametrize('name', sets)
def test_real_sets(capsys, name):
    "Honest files pass, and what is said of them can be read by a machine."
    column, group, *more = sets[name]
    files = {f: data/name/f for f in ('table.biom', 'unifrac.h5', 'metadata.tsv')}
    words = ['check', '--table', files['table.biom'], '--unifrac-matrix', files['unifrac.h5'], '--metadata', files['metadata.tsv'], '--metadata-column', column, '--group-column', group, *more, *tiny, '--json']
    assert main([str(w) for w in words]) == 0
    refuse = lambda word: pytest.fail(f'{word} is not JSON')
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert not [f for f in found['findings'] if f['level'] == 'error'] and found['sequences']['regions']['V4'] > .99 and found['sequences']['primers'] == {}
    assert found['matrix']['correlation'] > .7 and found['matrix']['rearranged']['after'] - found['matrix']['rearranged']['before'] < .035


def rows_of(name):
    table = read_table(data/name/'table.biom')
    return table, read_distances(data/name/'unifrac.h5').align(table.sample_ids)


def levels_of(table, matrix, **more):
    return [f.level for f in matrix_findings(matrix_facts(table, Distances(table.sample_ids, matrix), permutations=199, **more), 'd.npy')]


@pytest.mark.skipif(not mouse.exists(), reason='the data sets are not here')
@pytest.mark.parametrize('name', sets)
def test_orders_of_real_rows(name):
    "Rows in their order raise nothing; shuffled, reversed, shifted, or with blocks exchanged they are errors."
    table, matrix = rows_of(name)
    n = len(table)
    assert levels_of(table, matrix) == []
    orders = {f'shuffled {seed}': np.random.default_rng(seed).permutation(n) for seed in range(3)}
    orders |= dict(reversed=np.arange(n)[::-1], one_down=np.roll(np.arange(n), 1), one_up=np.roll(np.arange(n), -1), halves=np.r_[n//2:n, :n//2],
                   quarters=np.r_[n//2:3*(n//4), n//4:n//2, :n//4, 3*(n//4):n])
    a, b, rng = n//4, n//2, np.random.default_rng(5)
    orders |= dict(first_quarters=np.r_[a:b, :a, b:n], five_down=np.roll(np.arange(n), 5), third=np.r_[rng.permutation(n//3), n//3:n])
    if n > 100: orders |= dict(fifth=np.r_[rng.permutation(n//5), n//5:n], tenth=np.r_[rng.permutation(n//10), n//10:n])
    by_id = np.argsort(table.sample_ids)
    if (by_id != np.arange(n)).any(): orders['sorted'] = by_id # on mouse_age, most rows stay where they were
    for what, order in orders.items():
        assert sorted(order) == list(range(n))
        assert levels_of(table, matrix[np.ix_(order, order)]) == ['error'], what


@pytest.mark.skipif(not mouse.exists(), reason='the data sets are not here')
@pytest.mark.parametrize('name', sets)
def test_other_honest_matrices(name):
    "Weighted distances, and unweighted ones of the whole reads; with the tree the metric is told as well."
    table, _ = rows_of(name)
    table = table.select(table.sample_ids[:200])
    branches = read_tree(data/name/'tree.nwk', table.sequences)
    order = np.random.default_rng(0).permutation(len(table))
    for metric in 'unweighted', 'weighted':
        matrix = unifrac_distances(table.counts, branches, metric)
        for tree in None, branches:
            assert levels_of(table, matrix, branches=tree) == []
            assert levels_of(table, matrix[np.ix_(order, order)], branches=tree) == ['error']
        facts = matrix_facts(table, Distances(table.sample_ids, matrix), branches, permutations=199)
        said = {m: [f.text for f in matrix_findings(facts, 'd.h5', m)] for m in ('unweighted', 'weighted')}
        assert said.pop(metric) == [] and all(f'say --unifrac-metric {metric}' in text for texts in said.values() for text in texts) and all(said.values())


@pytest.mark.skipif(not mouse.exists(), reason='the data sets are not here')
@pytest.mark.parametrize('name,column', [('mackerel_body_site', 'body_site'), ('mackerel_body_site', 'season'), ('mouse_age', 'diet'), ('mouse_age', 'cage')])
def test_samples_of_one_kind(name, column):
    "The harder case: one body site, one diet. Rows in their order are no error, and quarters that changed places are."
    table, matrix = rows_of(name)
    kind = pd.read_csv(data/name/'metadata.tsv', sep='\t', dtype=str, index_col=0)[column].loc[table.sample_ids].to_numpy()
    for value in pd.unique(kind[~pd.isna(kind)]):
        rows = np.flatnonzero(kind == value)
        if (n := len(rows)) < 80: continue
        part, distances, swapped = table.select([table.sample_ids[i] for i in rows]), matrix[np.ix_(rows, rows)], np.r_[n//4:n//2, :n//4, n//2:n]
        assert 'error' not in levels_of(part, distances), value
        assert levels_of(part, distances[np.ix_(swapped, swapped)]) == ['error'], value


@pytest.mark.skipif(not mouse.exists(), reason='the data sets are not here')
@pytest.mark.parametrize('name', sets)
def test_few_samples(name):
    "Twelve samples: never an error for rows in their order, never silence for shuffled ones."
    table, matrix = rows_of(name)
    shuffled = []
    for seed in range(12):
        rows, order = np.random.default_rng(seed).choice(len(table), 12, replace=False), np.random.default_rng(seed).permutation(12)
        few, distances = table.select([table.sample_ids[i] for i in rows]), matrix[np.ix_(rows, rows)]
        assert 'error' not in levels_of(few, distances), seed
        shuffled += levels_of(few, distances[np.ix_(order, order)])
    assert len(shuffled) == 12 and shuffled.count('error') >= 6


@pytest.mark.parametrize('name,forward', [('515F', True), ('341F', True), ('27F', True), ('806R', False)])
def test_primers_in_reads(name, forward):
    "Any bases that a primer stands for, behind what sequencing adds, either way round; not one mismatch, not far inside a read."
    rng = np.random.default_rng(0)
    bases = {letter: [b for b in 'ACGT' if iupac_pattern(letter).fullmatch(b)] for letter in 'ACGTRYSWKMBDHVN'}
    for _ in range(20):
        primer = ''.join(rng.choice(bases[letter]) for letter in primers[name])
        before, after = (''.join(rng.choice(list('ACGT'), n)) for n in (rng.integers(0, 40), 80))
        read = before + primer + after
        assert name in locate_sequence(read)[2] and name in locate_sequence(reverse_complement(read))[2]
        assert locate_sequence(read)[1] is not forward
        unsure = before + primer[:4] + 'N' + primer[5:] + after
        assert name in locate_sequence(unsure)[2]
        assert name not in locate_sequence(after + primer + after)[2]
        at = list(primers[name]).index('C') # no degenerate base
        assert name not in locate_sequence(before + primer[:at] + 'G' + primer[at+1:] + after)[2]


def test_pretrained_encoder(check, pretrained, survey):
    "As train: another width is refused, and it is said which samples the encoder knows."
    encoder, column = pretrained/'checkpoints/best_model.pt', ('--metadata-column', 'soil_ph')
    code, line = check('--pretrained-encoder', encoder, *column, '--kmer-dim', 8, table=survey/'table.biom', meta=survey/'metadata.tsv')
    assert code == 2 and line.startswith('aam: --kmer-dim 8: the pretrained encoder has 16')
    main(words := [str(w) for w in ('check', '--table', survey/'table.biom', '--metadata', survey/'metadata.tsv', *column, '--pretrained-encoder', encoder, '--seed', 7)])
    assert main(words) == 0


@pytest.mark.parametrize('name', ['run', 'Run', 'RunID', 'run_id', 'seq_run', 'seqrun', 'run prefix', 'run2', 'plate', 'extraction_plate', 'PlateNumber', 'batch', 'batchid', 'Batch.No', 'lane', 'center_name', 'Sequencing Centre', 'prep', 'prep_date', 'library_name'])
def test_names_of_technical_columns(name): assert technical_columns([name]) == [name]


@pytest.mark.parametrize('name', ['age', 'prune', 'planet', 'template', 'airplane', 'prepared_meal', 'concentration', 'grunts', 'carbatch2'])
def test_names_of_other_columns(name): assert technical_columns([name]) == []


@pytest.mark.slow
@pytest.mark.parametrize('words', [[], ['--no-gradient-checkpointing']])
def test_memory_is_as_estimated(aam, tmp_path, words):
    "Of a whole run on a CPU, half of it activations."
    aam('simulate', '--output-dir', tmp_path/'s', '--samples', 20, '--asvs', 800, '--subjects', 10)
    words = ['--table', tmp_path/'s'/'table.biom', '--tree', tmp_path/'s'/'tree.nwk', '--embedding-dim', 96, '--attention-layers', 2, '--max-bp', 60, '--device', 'cpu', *words]
    estimate = json.loads(aam('check', *words, '--json').out)['cost']['memory_gb']
    run = [sys.executable, '-m', 'aam.cli', 'pretrain', *words, '--epochs', 1, '--output-dir', tmp_path/'run']
    code = f'import resource, subprocess; subprocess.run({[str(w) for w in run]}, check=True, capture_output=True); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss/2**20)'
    peak = float(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout)
    assert .65 < peak/estimate < 1.2 and estimate > .8, (peak, estimate)
