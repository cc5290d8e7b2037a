"Files as QIIME 2 and its users have them: artifacts, md5 IDs, several tables. What they hold is read as from plain files, what they may not hold is refused."
import gzip
import hashlib
import logging
import os
import re
import tempfile
import zipfile

import biom
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from aam.config import AamError, InputOptions
from aam.inputs import read_inputs
from aam.metadata import get_column, is_text_column, read_metadata
from aam.table import read_sequences, read_table, write_table
from aam.unifrac import branch_presence, faith_pd, read_distances, read_tree, unifrac_distances, write_distances

uuid = '8d9bf1fe-7e2c-4d0a-9d3c-0b7b9f2f1a55'
members = {'FeatureTable[Frequency]': 'feature-table.biom', 'FeatureData[Sequence]': 'dna-sequences.fasta', 'Phylogeny[Rooted]': 'tree.nwk', 'DistanceMatrix': 'distance-matrix.tsv'}


def md5(sequence): return hashlib.md5(sequence.encode()).hexdigest()


def write_artifact(path, kind, content, member=None, more=None, metadata=None):
    "An artifact with `content` (bytes), laid out as by QIIME 2; `more` members by full name."
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f'{uuid}/VERSION', 'QIIME 2\narchive: 5\nframework: 2023.9.1\n')
        archive.writestr(f'{uuid}/metadata.yaml', metadata or f'uuid: {uuid}\ntype: {kind}\nformat: DirectoryFormat\n')
        archive.writestr(f'{uuid}/data/{member or members.get(kind, "file")}', content)
        archive.writestr(f'{uuid}/provenance/metadata.yaml', f'uuid: {uuid}\ntype: Other\n')
        for name, text in (more or {}).items(): archive.writestr(name, text)
    return path


def write_biom(path, counts, sample_ids, observation_ids):
    "`counts` is samples x observations."
    with h5py.File(path, 'w') as f: biom.Table(np.asarray(counts, float).T, observation_ids, sample_ids).to_hdf5(f, 'test')
    return path


def hash_tips(newick): return re.sub('[ACGT]{10,}', lambda m: md5(m[0]), newick)


@pytest.fixture(scope='module')
def table(survey): return read_table(survey/'table.biom')


@pytest.fixture(scope='module')
def qiime(survey, once):
    "The survey as QIIME 2 has it: artifacts, features and tips called by md5 sums."
    def build(folder):
        folder.mkdir()
        table = read_table(survey/'table.biom')
        in_file = [table.sequences[i] for i in np.argsort(table.file_order)]
        counts = table.counts[:, np.argsort(table.file_order)].toarray()
        hashed = write_biom(folder/'hashed.biom', counts, table.sample_ids, [md5(s) for s in in_file])
        fasta = ''.join(f'>{md5(s)}\n{s}\n' for s in reversed(in_file))
        newick = (survey/'tree.nwk').read_text()
        write_distances(read_distances(survey/'unifrac.h5'), folder/'unifrac.tsv')
        (folder/'seqs.fasta').write_text(fasta)
        (folder/'hashed.nwk').write_text(hash_tips(newick))
        write_artifact(folder/'named_table.qza', 'FeatureTable[Frequency]', (survey/'table.biom').read_bytes())
        write_artifact(folder/'table.qza', 'FeatureTable[Frequency]', hashed.read_bytes())
        write_artifact(folder/'seqs.qza', 'FeatureData[Sequence]', fasta)
        write_artifact(folder/'named_tree.qza', 'Phylogeny[Rooted]', newick)
        write_artifact(folder/'tree.qza', 'Phylogeny[Rooted]', hash_tips(newick))
        write_artifact(folder/'unrooted.qza', 'Phylogeny[Unrooted]', newick)
        write_artifact(folder/'unifrac.qza', "DistanceMatrix % Properties('phylogenetic')", (folder/'unifrac.tsv').read_bytes(), 'distance-matrix.tsv')
    return once('qiime', build)


def same_table(a, b):
    return a.sample_ids == b.sample_ids and a.sequences == b.sequences and (a.counts != b.counts).nnz == 0 and (a.file_order == b.file_order).all()


def same_branches(a, b): return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ('place', 'start', 'end', 'lengths'))


def refused(read, *says):
    "The message of the `AamError` that `read` ends with."
    with pytest.raises(AamError) as error: read()
    message = str(error.value)
    assert '\n' not in message and len(message) < 500
    for word in says: assert word in message, (word, message)
    return message


def test_artifacts_equal_plain_files(survey, qiime, table):
    assert same_table(read_table(qiime/'named_table.qza'), table)
    assert same_branches(read_tree(qiime/'named_tree.qza', table.sequences), read_tree(survey/'tree.nwk', table.sequences))
    ours, plain = read_distances(qiime/'unifrac.qza'), read_distances(qiime/'unifrac.tsv')
    assert ours.sample_ids == plain.sample_ids and (ours.matrix == plain.matrix).all()


@pytest.mark.parametrize('sequences', ['seqs.fasta', 'seqs.qza'])
@pytest.mark.parametrize('name', ['table.qza', 'hashed.biom'])
def test_md5_ids_become_sequences(qiime, table, name, sequences):
    assert same_table(read_table(qiime/name, read_sequences(qiime/sequences)), table)


@pytest.mark.parametrize('tree', ['tree.qza', 'hashed.nwk', 'named_tree.qza'])
def test_inputs_are_joined_through_sequences(survey, qiime, tree):
    ours = read_inputs(InputOptions(table=qiime/'table.qza', sequences=qiime/'seqs.qza', tree=qiime/tree), survey/'metadata.tsv')
    plain = read_inputs(InputOptions(table=survey/'table.biom', tree=survey/'tree.nwk'), survey/'metadata.tsv')
    assert same_table(ours.table, plain.table) and ours.depth == plain.depth and ours.frame.equals(plain.frame)
    assert same_branches(ours.branches, plain.branches)
    assert (unifrac_distances(ours.table.counts, ours.branches) == unifrac_distances(plain.table.counts, plain.branches)).all()


@pytest.mark.parametrize('kind', ['FeatureTable[Frequency]', "FeatureTable[Frequency] % Properties('uniform-sampling')",
                                  "FeatureTable[Frequency % Properties(['uniform-sampling'])]", "'FeatureTable[Frequency]'"])
@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_spellings_of_a_type(tmp_path, survey, table, kind, end):
    path = write_artifact(tmp_path/'t.qza', kind, (survey/'table.biom').read_bytes(), 'feature-table.biom', metadata=end.join([f'uuid: {uuid}', f'type: {kind}', 'format: BIOMV210DirFmt', '']))
    assert same_table(read_table(path), table)


def test_versions_of_biom_in_an_artifact(tmp_path, table):
    sequences = [table.sequences[i] for i in np.argsort(table.file_order)]
    text = biom.Table(table.counts[:, np.argsort(table.file_order)].T.astype(float).toarray(), sequences, table.sample_ids).to_json('test')
    for content in text, gzip.compress(text.encode()):
        assert same_table(read_table(write_artifact(tmp_path/'t.qza', 'FeatureTable[Frequency]', content)), table)


readers = {'table': (read_table, 'FeatureTable[Frequency]'), 'sequences': (read_sequences, 'FeatureData[Sequence]'),
           'tree': (lambda path: read_tree(path, ['AAAA']), 'Phylogeny[Rooted]'), 'distances': (read_distances, 'DistanceMatrix')}
other_types = [
    ('table', 'FeatureTable[RelativeFrequency]', 'raw counts'), ('table', 'FeatureTable[PresenceAbsence]', 'give one of that type'), ('table', 'FeatureData[Sequence]', ''),
    ('tree', 'Phylogeny[Unrooted]', 'qiime phylogeny midpoint-root'), ('tree', 'Hierarchy', ''), ('sequences', 'FeatureData[AlignedSequence]', ''),
    ('sequences', 'FeatureTable[Frequency]', ''), ('distances', 'PCoAResults', ''), ('distances', 'Phylogeny[Rooted]', ''),
]

@pytest.mark.parametrize('reader,kind,remedy', other_types)
def test_artifact_of_another_type(tmp_path, reader, kind, remedy):
    read, wanted = readers[reader]
    path = write_artifact(tmp_path/'x.qza', kind, b'x')
    refused(lambda: read(path), f'{path}: an artifact of type {kind}, not {wanted}; ', remedy)


@pytest.mark.parametrize('reader', readers)
def test_damaged_archives(tmp_path, reader):
    read, kind = readers[reader]
    path = tmp_path/'x.qza'
    whole = write_artifact(path, kind, os.urandom(5000)).read_bytes()
    for content in b'', b'no archive', whole[:len(whole)//2], whole[:-10], whole.replace(whole[400:600], bytes(200)):
        path.write_bytes(content)
        refused(lambda: read(path), f'{path}: ')
    write_artifact(path, kind, b'x', 'other.txt')
    refused(lambda: read(path), 'not a readable artifact', members[kind])
    refused(lambda: read(write_artifact(path, kind, b'', metadata='uuid: x\n')), 'type unknown')
    refused(lambda: read(tmp_path/'absent.qza'), 'no such file')
    with zipfile.ZipFile(path, 'w') as archive: archive.writestr('readme.txt', 'a zip file')
    refused(lambda: read(path), 'not an artifact of QIIME 2')
    write_artifact(path, kind, b'x', more={'second/metadata.yaml': 'type: x\n'})
    refused(lambda: read(path), 'not an artifact of QIIME 2')


@pytest.mark.parametrize('name', ['../evil', f'{uuid}/data/../../../evil', '/ABSOLUTE/evil', '..\\evil', f'{uuid}\\..\\..\\evil', 'C:\\evil', 'c:/evil', '\\\\server\\evil'])
@pytest.mark.parametrize('reader', readers)
def test_no_path_escapes(tmp_path, monkeypatch, reader, name):
    read, kind = readers[reader]
    scratch = tmp_path/'scratch'
    scratch.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(scratch))
    monkeypatch.chdir(scratch)
    name = name.replace('/ABSOLUTE', str(tmp_path))
    path = write_artifact(tmp_path/'x.qza', kind, b'x', more={name: 'evil'})
    refused(lambda: read(path), 'leads out of it')
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['scratch', 'x.qza']


@pytest.mark.parametrize('reader', readers)
def test_links_are_refused(tmp_path, reader):
    "A member that is a symbolic link is neither followed nor read, be it the data or another."
    read, kind = readers[reader]
    (tmp_path/'secret').write_text('secret')
    for name in f'{uuid}/data/{members[kind]}', f'{uuid}/data/other':
        path = write_artifact(tmp_path/'x.qza', kind, b'x', None if name.endswith('other') else 'unused')
        with zipfile.ZipFile(path, 'a') as archive:
            link = zipfile.ZipInfo(name)
            link.external_attr = 0o120777 << 16
            archive.writestr(link, str(tmp_path/'secret'))
        refused(lambda path=path: read(path), 'symbolic link', name, 'do not trust it')


def test_capital_ending(tmp_path, survey, table):
    assert same_table(read_table(write_artifact(tmp_path/'TABLE.QZA', 'FeatureTable[Frequency]', (survey/'table.biom').read_bytes())), table)


def test_nothing_stays_behind(tmp_path, monkeypatch, qiime, table):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    read_table(qiime/'named_table.qza')
    read_tree(qiime/'named_tree.qza', table.sequences)
    read_distances(qiime/'unifrac.qza')
    refused(lambda: read_table(qiime/'table.qza'), '--sequences')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('reader', readers)
def test_bombs(tmp_path, monkeypatch, reader):
    read, kind = readers[reader]
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path/'nowhere')) # nothing may be unpacked
    (tmp_path/'nowhere').mkdir()
    path = tmp_path/'bomb.qza'
    write_artifact(path, kind, bytes(2**27 + 1))
    refused(lambda: read(path), 'would unpack from', '134,217,729 bytes')
    assert not list((tmp_path/'nowhere').iterdir())


def test_bomb_that_lies_about_its_size(tmp_path):
    path = write_artifact(tmp_path/'bomb.qza', 'Phylogeny[Rooted]', bytes(10_000_000))
    content = path.read_bytes()
    path.write_bytes(content.replace((10_000_000).to_bytes(4, 'little'), (1000).to_bytes(4, 'little')))
    refused(lambda: read_tree(path, ['AAAA']), 'not a readable artifact')


fasta_files = {
    'as QIIME 2 writes it': '>f1\nACGT\n>f2\nTTGA\n',
    'wrapped, described, Windows': '>f1 Bacteria; size=3\r\nAC\r\nGT\r\n\r\n>f2\tx\r\nTTGA\r\n',
    'lower case, RNA, byte-order mark, no last line end': '\ufeff>f1\nacgu\n>f2\nuuga',
    'empty rows above, a record twice': '\n\n>f1\nACGT\n>f2\nTTGA\n>f1\nACGT\n',
}

@pytest.mark.parametrize('text', fasta_files.values(), ids=fasta_files.keys())
def test_spellings_of_fasta(tmp_path, text):
    (tmp_path/'s.fasta').write_text(text, encoding='utf-8', newline='')
    (tmp_path/'s.fasta.gz').write_bytes(gzip.compress(text.encode()))
    write_artifact(tmp_path/'s.qza', 'FeatureData[Sequence]', text)
    for name in 's.fasta', 's.fasta.gz', 's.qza': assert read_sequences(tmp_path/name) == {'f1': 'ACGT', 'f2': 'TTGA'}


@pytest.mark.parametrize('text,message', [
    ('', 'not FASTA'), ('f1\tACGT\n', 'not FASTA'), ('ACGT\n>f1\nACGT\n', 'not FASTA'), ('>\nACGT\n', 'without an ID'), ('>f1\n>f2\nACGT\n', 'sequence of f1 is not DNA (it is empty)'),
    ('>f1\nAC-T\n', 'unaligned'), ('>f1\nMKLV\n', 'not DNA (MKLV)'), ('>f1\nACGT\n>f1\nACGA\n', 'f1 has two sequences')])
def test_wrong_fasta(tmp_path, text, message):
    (tmp_path/'s.fasta').write_text(text)
    refused(lambda: read_sequences(tmp_path/'s.fasta'), f"{tmp_path/'s.fasta'}: ", message)
    for content in b'\xff\xfe\x00', b'\x1f\x8b\x08 cut':
        (tmp_path/'s.fasta').write_bytes(content)
        refused(lambda: read_sequences(tmp_path/'s.fasta'), 'not readable as FASTA')


def sha1(sequence): return hashlib.sha1(sequence.encode()).hexdigest()


named = { # how a table and a tree call a feature; the header of its record
    'md5': (md5, md5), 'md5 in capitals, in the table': (lambda s: md5(s).upper(), md5), 'md5 in capitals, in the FASTA': (md5, lambda s: md5(s).upper()),
    'sha1': (sha1, sha1), 'sha256': (lambda s: hashlib.sha256(s.encode()).hexdigest().upper(), lambda s: hashlib.sha256(s.encode()).hexdigest()),
    'taxon behind': (md5, lambda s: f'{md5(s)} d__Bacteria; p__Firmicutes; size=3'), 'size, as vsearch writes it': (md5, lambda s: f'{md5(s)};size=12;'),
    'size and taxon': (md5, lambda s: f'{md5(s)};size=12;tax=d:Bacteria,p:Firmicutes;'), 'size on both sides': (lambda s: f'{md5(s)};size=3', lambda s: f'{md5(s)};size=3'),
    'number': (lambda s: f'ASV_{int(md5(s)[:6], 16)}', lambda s: f'ASV_{int(md5(s)[:6], 16)}'),
}

@pytest.mark.parametrize('of_table,of_record', named.values(), ids=named.keys())
def test_names_of_features(tmp_path, survey, table, of_table, of_record):
    "Table, tree and FASTA, Windows line ends too, meet whatever they call a sequence."
    order = np.argsort(table.file_order)
    sequences = [table.sequences[i] for i in order]
    path = write_biom(tmp_path/'t.biom', table.counts[:, order].toarray(), table.sample_ids, [of_table(s) for s in sequences])
    (tmp_path/'t.nwk').write_text(re.sub('[ACGT]{10,}', lambda m: f"'{of_table(m[0])}'", (survey/'tree.nwk').read_text()))
    (tmp_path/'s.fasta').write_text(''.join(f'>{of_record(s)}\r\n{s[:40]}\r\n{s[40:]}\r\n' for s in sequences), newline='')
    sequence_of = read_sequences(tmp_path/'s.fasta')
    assert same_table(read_table(path, sequence_of), table)
    assert same_branches(read_tree(tmp_path/'t.nwk', table.sequences, sequence_of), read_tree(survey/'tree.nwk', table.sequences))


def test_sizes_do_not_hide_two_sequences(tmp_path):
    (tmp_path/'s.fasta').write_text('>f1;size=3;\nACGT\n>f1;size=5;\nACGA\n')
    refused(lambda: read_sequences(tmp_path/'s.fasta'), 'f1 has two sequences')


def test_ids_without_a_sequence(tmp_path):
    path = write_biom(tmp_path/'t.biom', np.ones((2, 5)), ['a', 'b'], ['f1', 'f2', 'f3', 'f4', 'f5'])
    known = {'f1': 'ACGT'}
    assert refused(lambda: read_table(path, known), '4 of 5 observation IDs are not in --sequences (f2, f3, f4); ').count('f5') == 0
    assert refused(lambda: read_table(path), '5 of 5 observation IDs are not DNA', '--sequences', '--p-no-hashed-feature-ids')
    assert refused(lambda: read_table(path, {}), '5 of 5 observation IDs are not in --sequences')


def test_two_ids_of_one_sequence(tmp_path, caplog):
    path = write_biom(tmp_path/'t.biom', [[1, 2, 4, 8], [0, 1, 0, 3]], ['a', 'b'], ['f1', 'f2', 'f3', 'AAAA'])
    with caplog.at_level(logging.WARNING, 'aam'): table = read_table(path, dict(f1='ACGT', f2='CCCC', f3='acgt'))
    assert table.sequences == ['AAAA', 'ACGT', 'CCCC'] and (table.counts.toarray() == [[8, 5, 2], [3, 0, 1]]).all()
    assert [r.levelname for r in caplog.records] == ['WARNING'] and '1 of 4 ASVs repeat the sequence of another' in caplog.text
    caplog.clear()
    (tmp_path/'t.nwk').write_text('((f1:1,f3:2):1,(f2:1,AAAA:1):1);')
    with caplog.at_level(logging.WARNING, 'aam'): branches = read_tree(tmp_path/'t.nwk', table.sequences, dict(f1='ACGT', f2='CCCC', f3='ACGT'))
    assert list(faith_pd(branch_presence(sparse.identity(3, int, 'csr'), branches), branches.lengths)) == [2, 2, 2] # from tip to root
    assert len(caplog.records) == 1 and '1 tips have the sequence of another' in caplog.text


def test_tips_without_a_sequence(tmp_path):
    (tmp_path/'t.nwk').write_text('((f1:1,f2:2):1,(f3:1,f4:1):1);')
    refused(lambda: read_tree(tmp_path/'t.nwk', ['ACGT', 'CCCC']), '2 of 2 ASVs are not tips', '--sequences')
    refused(lambda: read_tree(tmp_path/'t.nwk', ['ACGT', 'CCCC'], dict(f1='ACGT')), '1 of 2 ASVs are not tips', 'CCCC')
    (tmp_path/'t.nwk').write_text('((f1:1,f1:2):1,f3:1);')
    refused(lambda: read_tree(tmp_path/'t.nwk', ['ACGT'], dict(f1='ACGT')), 'tip f1 occurs twice')


def split_table(table, folder, parts):
    "Files with some samples each, of the ASVs that these samples have."
    paths = []
    for i, ids in enumerate(parts):
        part = table.select(ids)
        has = np.asarray(part.counts.sum(0)).ravel() > 0
        counts, sequences = part.counts[:, has].toarray(), [s for s, h in zip(part.sequences, has) if h]
        paths.append(write_biom(folder/f'part{i}.biom', counts, ids, sequences))
    return paths


def test_tables_are_merged(tmp_path, table):
    ids = table.sample_ids
    paths = split_table(table, tmp_path, [ids[:10], ids[10:11], ids[11:]])
    for names in ','.join(map(str, paths)), ', '.join(map(str, paths)) + ',':
        merged = read_table(names)
        assert merged.sample_ids == ids and merged.sequences == table.sequences and (merged.counts != table.counts).nnz == 0
    order = [merged.sequences[i] for i in np.argsort(merged.file_order)]
    first = read_table(paths[0])
    assert order[:len(first.sequences)] == [first.sequences[i] for i in np.argsort(first.file_order)] # the first file comes first
    other_way = read_table(','.join(map(str, reversed(paths)))).select(ids)
    assert other_way.sequences == table.sequences and (other_way.counts != table.counts).nnz == 0


def test_kinds_of_table_are_merged(tmp_path, survey, qiime, table, caplog):
    ids = table.sample_ids
    first = split_table(table, tmp_path, [ids[:10]])[0]
    hashed = read_table(qiime/'table.qza', read_sequences(qiime/'seqs.qza')).select(ids[10:])
    write_artifact(tmp_path/'rest.qza', 'FeatureTable[Frequency]', write_biom(tmp_path/'rest.biom', hashed.counts.toarray(), hashed.sample_ids, [md5(s) for s in hashed.sequences]).read_bytes())
    with caplog.at_level(logging.WARNING, 'aam'):
        inputs = read_inputs(InputOptions(table=f"{first},{tmp_path/'rest.qza'}", sequences=qiime/'seqs.qza', tree=qiime/'tree.qza'), survey/'metadata.tsv')
    plain = read_inputs(InputOptions(table=survey/'table.biom'), survey/'metadata.tsv')
    assert inputs.table.sequences == plain.table.sequences and (inputs.table.counts != plain.table.counts).nnz == 0
    assert 'repeat' not in caplog.text # an ASV in two tables is nothing to warn of


def test_samples_in_two_tables(tmp_path, table):
    ids = table.sample_ids
    paths = split_table(table, tmp_path, [ids[:10], ids[6:]])
    refused(lambda: read_table(f'{paths[0]},{paths[1]}'), '4 samples are in more than one table', ', '.join(ids[6:9]), '--table')
    refused(lambda: read_table(f'{paths[0]},{paths[0]}'), '10 samples')
    refused(lambda: read_table(f'{paths[0]},{tmp_path}/absent.biom'), f'{tmp_path}/absent.biom: no such file')
    refused(lambda: read_inputs(InputOptions(table=f'{paths[0]},{tmp_path}/absent.biom')), f'--table {tmp_path}/absent.biom: no such file')


def test_a_file_with_a_comma_in_its_name(tmp_path, table):
    write_table(table, tmp_path/'a.biom,b.biom')
    assert same_table(read_table(tmp_path/'a.biom,b.biom'), table)
    refused(lambda: read_table(','), 'no such file')


spellings = [w for name in ('id', 'sampleid', 'sample id', 'sample-id', 'featureid', 'feature id', 'feature-id') for w in (name, name.upper(), name.title())]

@pytest.mark.parametrize('header', [*spellings, '#SampleID', '#Sample ID', '#OTUID', '#OTU ID', 'sample_name', 'sample_id', 'Sample_ID'])
def test_metadata_as_excel_saves_it(tmp_path, header):
    "Byte-order mark, Windows line ends, every cell quoted; as scikit-bio reads it, which does not know `sample_id`."
    from skbio.metadata import SampleMetadata
    rows = [(header, 'age', 'site', 'plate'), ('#q2:types', 'numeric', 'categorical', 'categorical'), ('001', '3.5', 'gut, left', '1'), ('1', '', 'a ""wall""', '2')]
    text = '\ufeff' + ''.join('\t'.join(f'"{cell}"' for cell in row) + '\r\n' for row in rows)
    (tmp_path/'m.tsv').write_text(text, encoding='utf-8', newline='')
    frame = read_metadata(tmp_path/'m.tsv')
    assert list(frame.index) == ['001', '1'] and frame['site'].tolist() == ['gut, left', 'a "wall"'] and frame['age'].isna().tolist() == [False, True]
    assert [is_text_column(get_column(frame, c)) for c in frame.columns] == [False, True, True]
    if header.lower() == 'sample_id': return
    theirs = SampleMetadata.load(str(tmp_path/'m.tsv')).to_dataframe()
    assert list(theirs.index) == list(frame.index) and theirs['site'].tolist() == frame['site'].tolist() and theirs['plate'].tolist() == frame['plate'].tolist()


def last_line(process):
    assert process.returncode == 2 and 'Traceback' not in process.out + process.err, process.err
    return process.err.strip().splitlines()[-1]


def test_commands_read_artifacts(aam, survey, qiime, tmp_path):
    "The whole way in files of QIIME 2, with the results of plain files."
    plain = dict(table=survey/'table.biom', tree=survey/'tree.nwk')
    ours = dict(table=qiime/'table.qza', tree=qiime/'tree.qza', sequences=qiime/'seqs.qza')
    predictions, forests = [], []
    for name, files in dict(plain=plain, ours=ours).items():
        typed = [w for option in files for w in (f'--{option}', files[option])]
        table = [w for option in files if option != 'tree' for w in (f'--{option}', files[option])]
        target = ['--metadata', survey/'metadata.tsv', '--metadata-column', 'soil_ph']
        aam('pretrain', *typed, '--output-dir', tmp_path/f'{name}_pretrain', *aam.tiny, '--epochs', 1)
        aam('train', *typed, *target, '--output-dir', tmp_path/name, *aam.tiny, '--epochs', 1, '--pretrained-encoder', tmp_path/f'{name}_pretrain/checkpoints/best_model.pt')
        aam('predict', '--model', tmp_path/name/'checkpoints/best_model.pt', *table, '--output', tmp_path/f'{name}.tsv', '--device', 'cpu')
        aam('rf-baseline', *table, *target, '--output', tmp_path/f'{name}_forest.tsv', '--n-estimators', 20, '--n-jobs', 1)
        predictions.append(pd.read_csv(tmp_path/f'{name}.tsv', sep='\t', index_col=0))
        forests.append((tmp_path/f'{name}_forest.tsv').read_text())
    pd.testing.assert_frame_equal(*predictions)
    assert forests[0] == forests[1]


def test_mistakes_as_users_see_them(aam, survey, qiime, trained, tmp_path):
    target = ['--metadata', survey/'metadata.tsv', '--metadata-column', 'soil_ph']
    found = last_line(aam('rf-baseline', '--table', qiime/'table.qza', *target, '--output', tmp_path/'f.tsv', fails=True))
    assert found.startswith(f"aam: {qiime/'table.qza'}: ") and 'not DNA sequences' in found and 'give their sequences with --sequences (FASTA or .qza)' in found
    found = last_line(aam('train', '--table', qiime/'table.qza', '--sequences', qiime/'seqs.qza', '--tree', qiime/'unrooted.qza', *target, '--output-dir', tmp_path/'run', fails=True))
    assert found == f"aam: {qiime/'unrooted.qza'}: an artifact of type Phylogeny[Unrooted], not Phylogeny[Rooted]; root it, for example at its midpoint (qiime phylogeny midpoint-root; aam unifrac --root-midpoint)"
    found = last_line(aam('predict', '--model', trained/'checkpoints/best_model.pt', '--table', qiime/'table.qza', '--sequences', tmp_path/'none.fasta', '--output', tmp_path/'p.tsv', fails=True))
    assert found == f"aam: --sequences {tmp_path/'none.fasta'}: no such file; give FASTA or .qza"
    assert list(tmp_path.iterdir()) == []


def test_every_command_takes_every_kind(aam, survey, qiime, table, tmp_path):
    "Several tables, one of them gzipped JSON and one an artifact, with checksums for names: check, pretrain, train, predict and rf-baseline read them alike."
    ids, sequences = table.sample_ids, table.sequences
    text = biom.Table(table.select(ids[:20]).counts.T.astype(float).toarray(), [md5(s).upper() for s in sequences], ids[:20]).to_json('test')
    (tmp_path/'a.biom').write_bytes(gzip.compress(text.encode()))
    rest = write_biom(tmp_path/'rest.biom', table.select(ids[20:]).counts.toarray(), ids[20:], [md5(s) for s in sequences])
    write_artifact(tmp_path/'b.qza', 'FeatureTable[Frequency]', rest.read_bytes())
    files = ['--table', f"{tmp_path/'a.biom'},{tmp_path/'b.qza'}", '--sequences', qiime/'seqs.fasta']
    distances, target = ['--unifrac-matrix', qiime/'unifrac.qza'], ['--metadata', survey/'metadata.tsv', '--metadata-column', 'soil_ph']
    checked = aam('check', *files, *distances, *target, '--device', 'cpu').out
    assert re.search(r'\n  in 2 tables +48 +60\n', checked), checked
    aam('pretrain', *files, *distances, '--output-dir', tmp_path/'pre', *aam.tiny, '--epochs', 1)
    aam('train', *files, *distances, *target, '--output-dir', tmp_path/'run', *aam.tiny, '--epochs', 1)
    aam('predict', '--model', tmp_path/'run/checkpoints/best_model.pt', *files, '--output', tmp_path/'p.tsv', '--device', 'cpu')
    aam('rf-baseline', *files, *target, '--output', tmp_path/'f.tsv', '--n-estimators', 10, '--n-jobs', 1)
    assert len(pd.read_csv(tmp_path/'p.tsv', sep='\t')) == 48
