"Categorical metadata: each option by what it governs, and `aam predict` against `val_predictions.tsv`."
import numpy as np
import pandas as pd
import pytest
import torch

from aam.checkpoint import build_model, load_checkpoint
from aam.config import AamError, CategoryOptions, EncoderOptions, HeadOptions, fusion_names
from aam.fusion import CategoryAttention, Conditioning, fusions
from aam.inference import load_predictor
from aam.metadata import category_ids, category_vocabulary, read_metadata
from aam.predictor import SampleStates, TargetHead
from aam.table import read_table
from aam.train import train

torch.set_num_threads(1)
width = dict(embedding_dim=16, attention_layers=1, attention_heads=2, kmer_dim=8, unifrac_branches=12, max_bp=40)
alone = dict(penalty=0, nuc_penalty=0, count_penalty=0)
vocabulary = dict(habitat=['forest', 'wetland'], season=['autumn', 'spring', 'summer'])


def options(**more): return CategoryOptions(categorical_columns='habitat,season', **more)


def head_of(seed=0, outputs=1, quantiles=(), **more):
    "A head whose every weight says something."
    torch.manual_seed(seed)
    head = TargetHead(EncoderOptions(**width), outputs, categories=options(**more), vocabulary=vocabulary, head=HeadOptions(), quantiles=quantiles)
    with torch.no_grad():
        for p in head.parameters(): p.add_(0.3*torch.randn_like(p))
    return head.eval()


@pytest.fixture(scope='module')
def states():
    torch.manual_seed(1)
    mask = torch.ones(4, 6).bool()
    mask[0, 4:] = False
    return SampleStates(torch.randn(4, 6, 16), mask, torch.rand(4, 6)*mask, torch.randn(4, 2, 8))


ids = torch.tensor([[1, 1], [2, 3], [0, 2], [1, 0]])


# fusions

@pytest.mark.parametrize('name', fusion_names)
def test_prediction_follows_each_column(states, name):
    head = head_of(categorical_fusion=name)
    plain = head(states, categories=ids)
    for column in 0, 1:
        other = ids.clone()
        other[0, column] = (other[0, column] + 1) % 3
        changed = (head(states, categories=other) - plain).abs()[:, 0]
        assert changed[0] > 1e-4 and changed[1:].max() == 0


def test_each_fusion_is_another_one(states):
    kinds = [type(head_of(categorical_fusion=name).conditioning.fusion) for name in fusion_names]
    assert kinds == list(fusions.values()) and len(set(kinds)) == len(fusion_names)


@pytest.mark.parametrize('name', ['concat', 'add', 'cross-attention', 'perceiver'])
def test_start_leaves_states_as_they_are(states, name):
    conditioning = Conditioning(options(categorical_fusion=name), vocabulary, 16, 2, 1).eval()
    assert torch.equal(conditioning.fuse(states.states, states.mask, ids), states.states)


def test_concat_is_a_projection_of_states_and_categories_side_by_side(states):
    conditioning = head_of(categorical_fusion='concat').conditioning
    project, vectors = conditioning.fusion.project, conditioning.embeddings(ids).flatten(1)
    weight = project.weight + torch.cat([torch.eye(16), torch.zeros(16, 32)], 1)
    wanted = torch.cat([states.states, vectors[:, None].expand(-1, 6, -1)], -1) @ weight.T + project.bias
    torch.testing.assert_close(conditioning.fuse(states.states, states.mask, ids)[states.mask], wanted[states.mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('columns', [1, 3])
def test_cross_attention_gives_each_asv_its_own_weights(columns):
    torch.manual_seed(0)
    fusion = CategoryAttention(16, columns, 4, heads=2)
    weights = fusion.weights(torch.randn(2, 7, 16), torch.randn(2, columns, 4))
    assert weights.shape == (2, 2, 7, columns + 1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 7))
    assert weights.std(2).min() > 1e-3 and weights.max() < 1


def test_add_puts_the_same_on_every_asv_and_cross_attention_does_not(states):
    for name, same in dict(add=True, concat=False, **{'cross-attention': False}).items():
        conditioning = head_of(categorical_fusion=name).conditioning
        moved = (conditioning.fuse(states.states, states.mask, ids) - states.states)[1]
        assert (moved.std(0).max() < 1e-5) == same, name


# embeddings and the unknown row

def test_embedding_width():
    for dim in 4, 9: assert head_of(categorical_embed_dim=dim).conditioning.embeddings.table.weight.shape == (7, dim)


def test_unknown_rows_are_trained_by_dropping_categories(states):
    known = torch.tensor([[1, 1], [2, 3], [1, 2], [2, 1]])
    head = head_of(conditional_output_scaling='season')
    rows = head.conditioning.embeddings.first
    seen = torch.zeros(2)
    for seed in range(40):
        torch.manual_seed(seed)
        head.train().zero_grad()
        head(states, categories=known).square().sum().backward()
        seen += head.conditioning.embeddings.table.weight.grad[rows].abs().sum(1) > 0
    assert (seen > 5).all() and (seen < 40).all()      # a tenth of the values, four samples: a third of the steps
    head.eval().zero_grad()
    head(states, categories=known).square().sum().backward()
    assert head.conditioning.embeddings.table.weight.grad[rows].abs().max() == 0
    assert head.conditioning.scaling.shift.grad[0].abs().max() == 0


def test_vocabulary_of_numbers():
    frame = pd.DataFrame(dict(plate=['2', '10', None, '1.0']), index=list('abcd'), dtype='str')
    words = category_vocabulary(frame.iloc[:3], ['plate'])
    assert words == dict(plate=['2', '10']) and category_ids(frame, words)[:, 0].tolist() == [1, 2, 0, 0]


# scaling of the output

def test_conditional_scaling_by_category(states):
    plain, scaled = head_of(), head_of(conditional_output_scaling='season')
    assert plain.conditioning.scaling is None and scaled.conditioning.scaling.shift.shape == (4, 1)
    scaled.load_state_dict(plain.state_dict() | {k: torch.zeros_like(v) for k, v in scaled.state_dict().items() if '.scaling.' in k})
    before = plain(states, categories=ids)
    assert torch.equal(scaled(states, categories=ids), before)          # scales of 1, shifts of 0
    with torch.no_grad():
        scaled.conditioning.scaling.log_scale[3] = np.log(2.); scaled.conditioning.scaling.shift[3] = .5
    after = scaled(states, categories=ids)
    torch.testing.assert_close(after[1], 2*before[1] + .5)              # the one summer sample
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])


def test_scaling_keeps_the_order_of_quantiles(states):
    out = head_of(outputs=2, quantiles=(.1, .5, .9), conditional_output_scaling='habitat,season')(states, categories=ids)
    assert out.shape == (4, 2, 3) and (out.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize('more, says', [
    (dict(categorical_columns='season', conditional_output_scaling='habitat'), '--conditional-output-scaling habitat: not among --categorical-columns (season)'),
    (dict(conditional_output_scaling='habitat'), 'none given'),
    (dict(categorical_columns='season', categorical_fusion='gum'), 'did you mean gmu?'),
    (dict(categorical_columns='season,season'), 'named twice'),
    (dict(categorical_columns='season', categorical_embed_dim=0), '--categorical-embed-dim 0'),
    (dict(categorical_columns='seasn'), 'season'),
    (dict(categorical_columns='soil_ph'), '--categorical-columns soil_ph: is the target'),
    (dict(categorical_fusion='gmu'), '--categorical-fusion: does nothing without --categorical-columns'),
])
def test_contradictions(survey, tmp_path, more, says):
    with pytest.raises(AamError) as error: run(survey, tmp_path/'run', **more)
    assert says in str(error.value) and '\n' not in str(error.value) and not (tmp_path/'run').exists()


# training

def run(survey, folder, metadata='metadata.tsv', column='soil_ph', **more):
    return train(**dict(table=survey/'table.biom', metadata=survey/metadata, metadata_column=column, output_dir=folder, device='cpu', epochs=2, lr=1e-2,
                        **(alone if 'pretrained_encoder' not in more else {}), **({} if 'pretrained_encoder' in more else width)) | more)


def category_weights(path):
    return {k.split('conditioning.')[1]: v for k, v in load_checkpoint(path)['weights'].items() if '.conditioning.' in k}


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder/'tensorboard'))
    events.Reload()
    return [e.value for e in events.Scalars(tag)] if tag in events.Tags()['scalars'] else []


@pytest.mark.parametrize('fusion, tag', {'gmu': 'gmu/gate_mean', 'cross-attention': 'cross_attn/weight_mean'}.items())
def test_tensorboard_shows_the_fusion(survey, tmp_path, fusion, tag):
    run(survey, tmp_path/'run', categorical_columns='habitat,season', categorical_fusion=fusion, linear_start=False)
    values = scalars(tmp_path/'run', tag)
    assert len(values) == 10 and len(set(values)) > 1 and all(0 < v < 1 for v in values) # 2 epochs of 5 batches


def test_categorical_lr_is_of_category_weights_alone(survey, tmp_path):
    ends = []
    for name, rate in dict(none=0., usual=None, fast=.1).items():
        out = run(survey, tmp_path/name, categorical_columns='season', conditional_output_scaling='season', categorical_lr=rate, average_decay=0, epochs=1, weight_decay=0, linear_start=False)
        ends.append(category_weights(out.paths['best_model']))
    still, usual, fast = (w['scaling.shift'].abs().max() for w in ends)
    assert still == 0 and 0 < usual < fast
    training = load_checkpoint(tmp_path/'fast'/'checkpoints'/'last.pt', part='training')['training']
    assert sorted({g['base'] for g in training['optimizer']['param_groups']}) == [.01, .1]


@pytest.mark.parametrize('fusion', fusion_names)
def test_predict_says_what_training_said(aam, survey, tmp_path, fusion):
    "With a category that training never saw, and one that is missing, among the validation samples."
    frame = pd.read_csv(survey/'metadata.tsv', sep='\t', dtype=str, keep_default_na=False)
    held = list(frame.sample_id[~frame.soil_ph.isin(['', 'NA'])][::5])
    frame.loc[frame.sample_id == held[0], 'season'] = 'monsoon'
    frame.loc[frame.sample_id == held[1], 'season'] = ''
    frame['plate'] = np.arange(len(frame)) % 3 + 1      # looks like a number
    frame.to_csv(tmp_path/'metadata.tsv', sep='\t', index=False)
    (tmp_path/'val.txt').write_text('\n'.join(held) + '\n')
    out = run(survey, tmp_path/'run', metadata=tmp_path/'metadata.tsv', val_samples=tmp_path/'val.txt', categorical_columns='season,plate', categorical_fusion=fusion,
              conditional_output_scaling='plate', linear_start=fusion in ('concat', 'gmu'))
    state = load_checkpoint(out.paths['best_model'])
    assert 'monsoon' not in state['vocabulary']['season'] and state['vocabulary']['plate'] == ['1', '2', '3']
    assert build_model(state).categories.categorical_fusion == fusion
    said = pd.read_csv(out.paths['predictions'], sep='\t', dtype={'sample_id': str}).set_index('sample_id')
    if fusion == 'concat':                              # through the command once
        aam('predict', '--model', out.paths['best_model'], '--table', survey/'table.biom', '--metadata', tmp_path/'metadata.tsv', '--output', tmp_path/'out.tsv')
        again = pd.read_csv(tmp_path/'out.tsv', sep='\t', dtype={'sample_id': str}).set_index('sample_id').prediction[said.index]
    else: again = load_predictor(state).predict(read_table(survey/'table.biom'), read_metadata(tmp_path/'metadata.tsv'), list(said.index))[:, 0]
    np.testing.assert_allclose(said.prediction, again, rtol=0, atol=1e-5*np.ptp(said.actual.dropna()))
    shuffled = read_metadata(tmp_path/'metadata.tsv')
    shuffled['season'] = shuffled.season.map(dict(zip(state['vocabulary']['season'], np.roll(state['vocabulary']['season'], 1)))).fillna('winter')
    other = load_predictor(state).predict(read_table(survey/'table.biom'), shuffled, list(said.index))[:, 0]
    assert np.abs(other - said.prediction).max() > 1e-5


def test_linear_path_reads_categories(survey, tmp_path):
    "A target that depends on a category alone; fitted out of fold; an unknown category adds nothing."
    frame, rng = pd.read_csv(survey/'metadata.tsv', sep='\t', dtype=str, keep_default_na=False), np.random.default_rng(0)
    meter = rng.integers(0, 3, len(frame))
    frame['meter'], frame['reading'] = np.array(['a', 'b', 'c'])[meter], (np.array([0., 1., 5.])[meter] + rng.normal(0, .1, len(frame))).round(4)
    frame.to_csv(tmp_path/'metadata.tsv', sep='\t', index=False)
    told, blind = (run(survey, tmp_path/name, metadata=tmp_path/'metadata.tsv', column='reading', epochs=1, lr=1e-12, **more) for name, more in dict(told=dict(categorical_columns='meter'), blind={}).items())
    assert told.scores['validation']['r2'] > .9 and blind.scores['validation']['r2'] < .5
    start = load_checkpoint(told.paths['best_model'])['start']
    weight = start['weights'][2*len(start['known']):, 0]
    assert start['sizes'] == [3] and len(weight) == 3 and weight[2] > weight[1] > weight[0]
    other = read_metadata(tmp_path/'metadata.tsv').assign(meter='never seen')
    unknown = told.model.predict(read_table(survey/'table.biom'), other)[:, 0]
    assert np.ptp(unknown) < 2 and 1 < unknown.mean() < 3          # near the mean of the three


def test_predict_needs_the_columns(aam, survey, tmp_path):
    out = run(survey, tmp_path/'run', categorical_columns='habitat,season', epochs=1)
    words = ['predict', '--model', out.paths['best_model'], '--table', survey/'table.biom', '--output', tmp_path/'out.tsv']
    asked = aam(*words, fails=True)
    assert asked.returncode == 2 and asked.err.strip().splitlines() == ['aam: --metadata is needed: this model reads the columns habitat, season']
    frame = pd.read_csv(survey/'metadata.tsv', sep='\t', dtype=str, keep_default_na=False)
    frame.drop(columns='season').to_csv(tmp_path/'less.tsv', sep='\t', index=False)
    asked = aam(*words, '--metadata', tmp_path/'less.tsv', fails=True)
    assert asked.returncode == 2 and 'season' in asked.err and not (tmp_path/'out.tsv').exists()
    frame.iloc[:20].to_csv(tmp_path/'half.tsv', sep='\t', index=False)
    asked = aam(*words, '--metadata', tmp_path/'half.tsv')
    assert len((tmp_path/'out.tsv').read_text().splitlines()) == 49 and 'predicted as unknown' in asked.err


def test_frozen_encoder_with_categories(survey, pretrained, tmp_path):
    path = pretrained/'checkpoints'/'best_model.pt'
    out = run(survey, tmp_path/'run', categorical_columns='season', categorical_fusion='gmu', pretrained_encoder=path, freeze_base=True, conditional_output_scaling='season')
    before, after = load_checkpoint(path)['weights'], load_checkpoint(out.paths['best_model'])['weights']
    encoder = [k for k in before if k.startswith('encoder.')]
    assert encoder and all(torch.equal(before[k], after[k]) for k in encoder)
    last = load_checkpoint(tmp_path/'run'/'checkpoints'/'last.pt', part='training')['training']['model']
    assert last['heads.target.conditioning.scaling.shift'].abs().max() > 0
    assert len(scalars(tmp_path/'run', 'gmu/gate_mean')) == 10


def test_classes_with_categories(survey, tmp_path):
    out = run(survey, tmp_path/'run', column='habitat', classifier=True, categorical_columns='season', conditional_output_scaling='season', categorical_embed_dim=5, linear_start=False)
    said = pd.read_csv(out.paths['predictions'], sep='\t', dtype={'sample_id': str}).set_index('sample_id')
    again = out.model.predict(read_table(survey/'table.biom'), read_metadata(survey/'metadata.tsv'), list(said.index))
    np.testing.assert_allclose(said.filter(like='p_'), again, atol=1e-5)
    assert category_weights(out.paths['best_model'])['scaling.log_scale'].shape[1] == 3
    assert category_weights(out.paths['best_model'])['embeddings.table.weight'].shape[1] == 5


def test_help_on_categories(aam):
    said = aam('train', '--categorical-help').out
    assert all(name in said for name in fusion_names) and '--conditional-output-scaling' in said and '--categorical-lr' in said
    assert aam('evaluate', '--categorical-help').out == said


@pytest.mark.parametrize('name', fusion_names)
def test_half_precision(states, name):
    "As on a GPU: states keep their precision, and every weight gets a gradient."
    head = head_of(categorical_fusion=name, conditional_output_scaling='season').train()
    with torch.autocast('cpu', torch.bfloat16): out = head(states, categories=ids)
    assert out.dtype == torch.float32
    out.square().sum().backward()
    assert [n for n, p in head.named_parameters() if p.grad is None] == []
    exact = Conditioning(options(categorical_fusion='concat'), vocabulary, 16, 2, 1).eval()
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(exact.fuse(states.states, states.mask, ids), states.states)
