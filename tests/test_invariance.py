"What must not matter (order, company, memory settings), and what must (each ablation switch)."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from aam.checkpoint import load_checkpoint
from aam.config import EncoderOptions
from aam.data import SampleData, make_batch
from aam.inference import load_predictor
from aam.layers import RunningStandardise, update_statistics
from aam.predictor import Model, prime
from aam.table import read_table, write_table
from aam.train import train
from aam.unifrac import read_tree

torch.set_num_threads(1)
width = dict(embedding_dim=16, attention_layers=1, attention_heads=2, kmer_dim=16, max_bp=60)
views = 'target', 'count', 'unifrac'


@pytest.fixture(scope='module')
def table(survey): return read_table(survey/'table.biom')


@pytest.fixture(scope='module')
def shuffled(survey, table, tmp_path_factory):
    "The survey with samples, ASVs, matrix and metadata rows in another order."
    from aam.unifrac import Distances, read_distances, write_distances
    folder, rng = tmp_path_factory.mktemp('shuffled'), np.random.default_rng(0)
    samples = list(rng.permutation(table.sample_ids))
    write_table(replace(table.select(samples), file_order=rng.permutation(len(table.sequences))), folder/'table.biom')
    frame = pd.read_csv(survey/'metadata.tsv', sep='\t', dtype=str, keep_default_na=False)
    frame.sample(frac=1, random_state=1).to_csv(folder/'metadata.tsv', sep='\t', index=False)
    others = list(rng.permutation(samples))
    write_distances(Distances(others, read_distances(survey/'unifrac.h5').align(others)), folder/'unifrac.h5')
    (folder/'tree.nwk').write_text((survey/'tree.nwk').read_text())
    return folder


@pytest.fixture(scope='module')
def data(survey, table):
    return SampleData(table, 1500, 60, branches=read_tree(survey/'tree.nwk', table.sequences), target=np.zeros((len(table), 1), np.float32))


@pytest.fixture(scope='module')
def predictor(trained): return load_predictor(load_checkpoint(trained/'checkpoints'/'best_model.pt') | dict(share=.5)) # both parts of a prediction matter here


def model_of(data, tasks=(*views, 'nuc'), seed=0, memory=None, **options):
    "A model whose heads answer: zero weights of the wide path are made random."
    torch.manual_seed(seed)
    model = Model(EncoderOptions(**width, unifrac_branches=32, **options), tasks, 1, **(memory or {}))
    prime(model, make_batch(data, range(8), tuple(v for v in views if v in tasks), True))
    for name, p in model.named_parameters():
        if '.wide.' in name: torch.nn.init.normal_(p)
    return model


# what must not matter

readings = {'below the limit': {}, 'abundance': dict(token_limit=12, asv_sampling='abundance'), 'random': dict(token_limit=12, asv_sampling='random')}

@pytest.mark.parametrize('reading', readings.values(), ids=readings)
def test_order_of_table_changes_no_prediction(shuffled, table, predictor, reading):
    predictor = replace(predictor, reading=predictor.reading | reading)
    other = read_table(shuffled/'table.biom')
    assert other.sample_ids != table.sample_ids and (other.file_order != table.file_order).any()
    a, b = predictor.predict(table), predictor.predict(other, sample_ids=table.sample_ids)
    np.testing.assert_allclose(a, b, atol=1e-5*np.ptp(a, axis=0).min())
    assert np.ptp(a, axis=0).min() > 0


def test_first_above_the_limit_follows_the_file(shuffled, table, predictor):
    predictor = replace(predictor, reading=predictor.reading | dict(token_limit=12, asv_sampling='first'))
    a, b = predictor.predict(table), predictor.predict(read_table(shuffled/'table.biom'), sample_ids=table.sample_ids)
    assert np.abs(a - b).max() > 1e-3*np.ptp(a, axis=0).min()


@pytest.mark.parametrize('more', [dict(tree='tree.nwk'), dict(unifrac_matrix='unifrac.h5', token_limit=12, asv_sampling='abundance')], ids=['tree', 'matrix above the limit'])
def test_order_of_files_changes_no_training(survey, shuffled, tmp_path, more):
    weights, predictions = [], []
    for name, folder in dict(a=survey, b=shuffled).items():
        files = {k: folder/v if isinstance(v, str) and '.' in v else v for k, v in more.items()}
        run = train(table=folder/'table.biom', metadata=folder/'metadata.tsv', metadata_column='soil_ph', output_dir=tmp_path/name, group_column='subject_id',
                    epochs=2, lr=1e-3, unifrac_branches=32, device='cpu', **width, **files)
        weights.append(load_checkpoint(run.paths['best_model'])['weights'])
        predictions.append(pd.read_csv(run.paths['predictions'], sep='\t', index_col='sample_id'))
    assert weights[0].keys() == weights[1].keys() and [k for k, w in weights[0].items() if not torch.equal(w, weights[1][k])] == []
    pd.testing.assert_frame_equal(predictions[0], predictions[1].loc[predictions[0].index])


def test_company_changes_no_prediction(table, predictor):
    together, alone = (predictor.predict(table, batch_size=n) for n in (8, 1))
    np.testing.assert_allclose(together, alone, atol=1e-5*np.ptp(together, axis=0).min())
    some = table.sample_ids[3:40:7]
    np.testing.assert_allclose(predictor.predict(table.select(some)), together[[table.sample_ids.index(s) for s in some]], atol=1e-5*np.ptp(together, axis=0).min())


@torch.no_grad()
def outputs_of_batches(predictor, table, passes):
    "Readable predictions from whole batches through the whole model, pass by pass: the plain way."
    data, model = predictor.data(table), predictor.model.eval()
    head, starts = model.heads['target'], torch.from_numpy(predictor.starts(data, np.arange(len(table))))
    assert 0 < head.share < 1

    def outputs(i, draw):
        batch = make_batch(data, [i], ('target',), epoch=draw)
        return head(model.states(batch), batch.categories, starts[i:i + 1])

    return [predictor.target.readable(torch.cat([outputs(i, draw) for i in range(len(table))])) for draw in range(passes)]


@pytest.mark.parametrize('reading', [{}, dict(token_limit=12, asv_sampling='random')], ids=['all', 'limit'])
def test_predictions_are_those_of_the_plain_way(table, predictor, reading):
    predictor = replace(predictor, reading=predictor.reading | reading, before=None) # one model for all samples
    plain = np.mean(outputs_of_batches(predictor, table, 3), 0)
    for how in dict(), dict(batch_size=1), dict(batch_size=64), *(dict(asv_chunk_size=n) for n in (0, 1, 7, 10_000)):
        found = predictor.predict(table, passes=3, **how)
        assert np.abs(found - plain).max() < 1e-5*np.ptp(plain, axis=0).min(), how


@pytest.mark.parametrize('chunk', [0, 16])
def test_prediction_encodes_each_distinct_row_once(table, predictor, chunk):
    "Whatever the number of samples and passes, without padding, and never more at a time than asked for."
    read = []
    hook = predictor.model.encoder.asvs.nucleotides.register_forward_hook(lambda module, given, out: read.append(given[0].clone()))
    some = table.select(table.sample_ids[:9])
    predictor.predict(some, passes=4, asv_chunk_size=chunk)
    hook.remove()
    rows = [tuple(row.tolist()) for tokens in read for row in tokens]
    sequences = {some.sequences[a][:predictor.model.options.max_bp] for a in np.unique(some.counts.indices)}
    assert len(rows) == len(set(rows)) == len(sequences) and not any(0 in row for row in rows)
    assert chunk == 0 or max(map(len, read)) == chunk


def test_memory_options_of_the_command(aam, survey, trained, table, tmp_path):
    "Samples in the order of the table, the same numbers whatever is computed at a time."
    found = []
    for i, more in enumerate([[], ['--asv-chunk-size', 7, '--batch-size', 3], ['--asv-chunk-size', 0, '--batch-size', 100]]):
        aam('predict', '--model', trained/'checkpoints'/'best_model.pt', '--table', survey/'table.biom', '--output', tmp_path/f'{i}.tsv', '--device', 'cpu', *more)
        found.append(pd.read_csv(tmp_path/f'{i}.tsv', sep='\t', dtype={'sample_id': str}))
    assert all(list(f.sample_id) == table.sample_ids for f in found)
    first, *others = [f.select_dtypes('number').to_numpy() for f in found]
    for other in others: np.testing.assert_allclose(other, first, atol=1e-5*np.ptp(first, axis=0).min())
    assert first.size and np.ptp(first, axis=0).min() > 0


@pytest.mark.gpu
def test_prediction_on_gpu(table, predictor):
    "With the vectors on the GPU, or on the host."
    from aam.vectors import draw_states, encode_asvs
    on_cpu, on_gpu = (predictor.predict(table, device=d) for d in ('cpu', 'cuda'))
    assert np.abs(on_cpu - on_gpu).max() < 1e-4*np.ptp(on_cpu, axis=0).min()
    model, data = predictor.model.to('cuda').eval(), predictor.data(table)
    vectors = encode_asvs(model, data, range(8), device='cuda')
    kept = replace(vectors, projected=vectors.projected.cpu(), kmers=vectors.kmers.cpu())
    a, b = (draw_states(model, data, v, range(8), device='cuda') for v in (vectors, kept))
    model.to('cpu')
    for name in 'states', 'sums': torch.testing.assert_close(getattr(a, name), getattr(b, name))


def test_every_output_of_a_sample_alone(data):
    model = model_of(data).eval()
    with torch.no_grad():
        together, batch = model(make_batch(data, range(6), views)), make_batch(data, range(6), views)
        for i in range(6):
            alone = model(one := make_batch(data, [i], views))
            torch.testing.assert_close(alone['target'][0], together['target'][i], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(alone['unifrac_embedding'][0], together['unifrac_embedding'][i], rtol=1e-4, atol=1e-5)
            n = int(one.candidate_weight.sum())
            assert n == batch.candidate_weight[i].sum()
            torch.testing.assert_close(alone['count'][0, :n], together['count'][i, :n], rtol=1e-4, atol=1e-5)


def test_duplicated_asvs_are_encoded_once(data):
    batch = make_batch(data, range(16), views, True)
    sequences = [s[:60] for s in data.table.sequences]
    rows = batch.index[batch.mask].unique()
    copies = sum(masked for _, masked, _ in batch.groups)
    clean = batch.tokens[batch.token_row.unique()]
    assert len(batch.tokens) == len(clean) + copies and len(clean) == len(clean.unique(dim=0)) and len(batch.kmers) == len(batch.token_row)
    present = np.unique(np.concatenate([data.table.row(i)[0] for i in range(16)]))
    assert len(rows) <= len(batch.token_row) <= len(data.table.sequences)
    assert len(clean) <= len({sequences[a] for a in present} | {sequences[a] for a in range(len(sequences))})
    plain = make_batch(data, range(16), ('target',))
    drawn = set()
    from aam.table import target_draw
    for i in range(16):
        asvs, counts = data.table.row(i)
        drawn |= set(asvs[target_draw(counts, data.depth, data.rarefy_seed, 0, data.table.sample_ids[i], False) > 0])
    assert len(plain.token_row) == len(drawn) < plain.mask.sum()
    assert len(plain.tokens) == len({sequences[a] for a in drawn})
    encoded = []
    model = model_of(data)
    model.encoder.asvs.nucleotides.register_forward_hook(lambda module, given, out: encoded.append(len(given[0])))
    model.eval()(plain)
    assert sum(encoded) == len(plain.tokens)


def statistics_and_gradients(data, checkpointing, chunk_size):
    model = model_of(data, memory=dict(checkpointing=checkpointing, chunk_size=chunk_size)).train()
    for part in range(0, 16, 8): # two micro-batches, one update
        torch.manual_seed(part)
        out = model(make_batch(data, range(part, part + 8), views, True, training=True))
        sum(v.square().mean() for k, v in out.items()).backward()
    update_statistics(model)
    statistics = {f'{n}.{k}': v.clone() for n, m in model.named_modules() if isinstance(m, RunningStandardise) for k, v in m.named_buffers()}
    return statistics, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('chunk_size', [0, 7, 32, 10_000])
def test_memory_settings_change_no_statistics_and_no_gradients(data, chunk_size):
    (plain, gradients), (kept, others) = statistics_and_gradients(data, False, 0), statistics_and_gradients(data, True, chunk_size)
    assert plain and gradients.keys() == others.keys()
    assert all(float(v) == 2 for k, v in plain.items() if k.endswith('updates')) # one of `prime`, one of the step
    for k, v in plain.items(): torch.testing.assert_close(kept[k], v, rtol=1e-5, atol=1e-6)
    largest = max(float(g.abs().max()) for g in gradients.values())
    for k, v in gradients.items(): torch.testing.assert_close(others[k], v, rtol=1e-3, atol=1e-5*largest)


# what must matter

def answers(model, batch):
    with torch.no_grad(): return model(batch)


def test_abundance_input(data):
    batch = make_batch(data, range(8), views)
    other = replace(batch, abundance=batch.abundance.flip(0).roll(1, 1).clamp_min(0.05) * batch.mask)
    with_, without = model_of(data).eval(), model_of(data, abundance_input=False).eval()
    for name in 'target', 'unifrac_embedding', 'count': torch.testing.assert_close(answers(without, batch)[name], answers(without, other)[name], rtol=0, atol=0)
    assert (answers(with_, batch)['target'] - answers(with_, other)['target']).abs().max() > 1e-3
    torch.testing.assert_close(answers(with_, batch)['unifrac_embedding'], answers(with_, other)['unifrac_embedding']) # presence alone


def test_local_view_and_wide_path(data):
    names = lambda **options: set(model_of(data, **options).state_dict())
    everything = names()
    for switch, word in dict(local_view='.around.', wide_path='.wide.', standardise='asvs.standardise').items():
        less = names(**{switch: False})
        assert less < everything and not [n for n in less if word in n] and [n for n in everything if word in n], switch


def test_local_view_reads_neighbours(data):
    "Beside the attention, which an attention-free stack lets us see."
    batch = make_batch(data, range(4), ('target',))
    def neighbours(**options):
        model = model_of(data, **options).eval()
        model.encoder.asvs.nucleotides.stack = torch.nn.Identity()
        model.encoder.asvs.nucleotides.stack.forward = lambda x, mask=None, mean=False: x
        changed = batch.tokens.clone()
        changed[:, 30] = changed[:, 30] % 4 + 1
        a, b = (model.encoder.asvs.nucleotides(t) for t in (batch.tokens, changed))
        return (a - b).abs().amax((0, 2)).nonzero().flatten().tolist()
    assert neighbours(local_view=False) == [30] and neighbours() == list(range(26, 35))


def test_unifrac_head(data):
    union, euclid = model_of(data).eval(), model_of(data, unifrac_head='euclid').eval()
    batch = make_batch(data, range(8), views)
    a, b = answers(union, batch), answers(euclid, batch)
    assert a['unifrac_embedding'].shape == (8, 32) and b['unifrac_embedding'].shape == (8, 16)
    for d in (a['unifrac'], b['unifrac']):
        assert d.shape == (8, 8) and (d >= -1e-6).all() and (d <= 1).all()
        torch.testing.assert_close(d, d.T)
    assert (a['unifrac'] - b['unifrac']).abs().max() > 1e-3


@pytest.mark.parametrize('head', ['union', 'euclid'])
@pytest.mark.parametrize('clean', [True, False])
def test_what_unifrac_sees(survey, table, head, clean):
    "Masks and dropout reach the UniFrac embedding only where that was asked for."
    data = SampleData(table, 1500, 60, branches=read_tree(survey/'tree.nwk', table.sequences), mask_in_place=not clean)
    model = model_of(data, tasks=('count', 'unifrac', 'nuc'), unifrac_head=head, clean_unifrac=clean, dropout=0.5)
    def embedding(step, seed):
        torch.manual_seed(seed)
        return answers(model, make_batch(data, range(4), ('count', 'unifrac'), True, step=step))['unifrac_embedding']
    model.eval()
    assert torch.equal(embedding(0, 0), embedding(1, 0)) == clean
    model.train()
    assert torch.equal(embedding(0, 0), embedding(0, 1)) == clean


def test_switches_on_the_command_line(aam, tmp_path, inputs):
    run, off = tmp_path/'run', ['abundance-input', 'standardise', 'local-view', 'wide-path', 'clean-unifrac']
    aam('train', *inputs, '--metadata-column', 'soil_ph', '--output-dir', run, *aam.tiny, '--epochs', 1, *[f'--no-{name}' for name in off],
        '--unifrac-head', 'euclid', '--count-penalty', 0, '--average-decay', 0)
    state = load_checkpoint(run/'checkpoints'/'best_model.pt')
    assert [state['encoder'][name.replace('-', '_')] for name in off] == [False]*5 and state['encoder']['unifrac_head'] == 'euclid'
    assert {k.split('.')[1] for k in state['weights'] if k.startswith('heads.')} == {'target', 'unifrac', 'nuc'} and state['tasks'] == ['target', 'unifrac', 'nuc']
    assert not [k for k in state['weights'] if '.local.' in k or '.wide.' in k or 'asvs.standardise' in k]
    assert 'train_count' not in (run/'metrics.jsonl').read_text() and 'train_nuc' in (run/'metrics.jsonl').read_text()
