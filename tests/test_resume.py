"A run killed anywhere and resumed ends as the run that nobody disturbed, bit for bit."
import json
import random
import shutil
import signal
import time

import pytest
import torch

from aam.checkpoint import load_checkpoint

epochs = 5
commands = {
    'train': ['--metadata-column', 'soil_ph', '--lr', '1e-3'],
    'pretrain': [],
}


def command(aam, survey, name, folder, *more):
    files = ['--table', survey/'table.biom', '--tree', survey/'tree.nwk', '--metadata', survey/'metadata.tsv', '--group-column', 'subject_id']
    return [name, *files, *commands[name], '--output-dir', folder, *aam.tiny, '--epochs', epochs, '--gradient-accumulation-steps', 2, *more]


@pytest.fixture(scope='session')
def undisturbed(aam, survey, once):
    "The folder of a run that nobody disturbed."
    return lambda name: once(f'undisturbed_{name}', lambda folder: aam(*command(aam, survey, name, folder)))


def lines(folder):
    path = folder/'metrics.jsonl'
    return path.read_text().splitlines() if path.exists() else []


def kill_after(aam, words, folder, epoch, pause):
    "Runs `words` until `epoch` epochs are written, `pause` seconds more, then kill -9; returns whether it was still at work."
    process, deadline = aam.start(*words), time.time() + 120
    while len(lines(folder)) < epoch and process.poll() is None and time.time() < deadline: time.sleep(0.005)
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def equal(a, b):
    "Nested dictionaries of tensors and plain values, equal bit for bit?"
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b or (a != a and b != b)


def expect_equal(folder, other):
    "Weights, optimizer, counters, metrics, predictions, scores of two runs."
    for part, keys in dict(weights=['weights', 'split', 'scores', 'epoch'], training=['training', 'split']).items():
        a, b = (load_checkpoint(f/'checkpoints'/('best_model.pt' if part == 'weights' else 'last.pt'), part=part) for f in (folder, other))
        for key in keys: assert equal(a[key], b[key]), (part, key)
    timeless = [[{k: v for k, v in json.loads(line).items() if k not in ('seconds', 'waited')} for line in lines(f)] for f in (folder, other)]
    assert timeless[0] == timeless[1] and len(timeless[0]) == epochs
    for name in 'scores.json', 'val_predictions.tsv', 'train_samples.txt', 'val_samples.txt':
        assert (folder/name).exists() == (other/name).exists()
        if (folder/name).exists(): assert (folder/name).read_bytes() == (other/name).read_bytes(), name
    assert not list(folder.rglob('*.part'))


def recorded_steps(folder):
    "Steps of the training loss that TensorBoard shows."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder/'tensorboard'), size_guidance={'scalars': 0})
    events.Reload()
    return [e.step for e in events.Scalars('train/total_loss')]


def test_train_killed_twice_and_resumed(aam, survey, undisturbed, tmp_path):
    "By the folder of the run, then by 'auto'."
    whole, folder, rng = undisturbed('train'), tmp_path/'run', random.Random(1)
    assert kill_after(aam, command(aam, survey, 'train', folder), folder, rng.randint(1, 2), rng.uniform(0, 0.3))
    last = folder/'checkpoints'/'last.pt'
    done = load_checkpoint(last, part='training')['training']['counters']['epoch'] if last.exists() else 0
    resumed = command(aam, survey, 'train', folder, '--resume-from', folder if done else 'auto')
    kill_after(aam, resumed, folder, min(max(done + 1, 3), epochs), rng.uniform(0, 0.3))
    aam(*command(aam, survey, 'train', folder, '--resume-from', 'auto'))
    expect_equal(folder, whole)
    steps = recorded_steps(whole)
    assert recorded_steps(folder) == steps == sorted(set(steps)) # the curves were cut back, nothing is shown twice
    assert 'resuming' in (folder/'training.log').read_text()


def test_train_killed_before_its_first_epoch(aam, survey, undisturbed, tmp_path):
    whole, folder = undisturbed('train'), tmp_path/'run'
    process, deadline = aam.start(*command(aam, survey, 'train', folder)), time.time() + 120
    while not (folder/'config.json').exists() and time.time() < deadline: time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not lines(folder)
    refused = aam(*command(aam, survey, 'train', folder), fails=True)
    assert refused.returncode == 2 and '--resume-from' in refused.err
    aam(*command(aam, survey, 'train', folder, '--resume-from', 'auto'))
    expect_equal(folder, whole)


def test_pretrain_killed_and_resumed_elsewhere(aam, survey, undisturbed, tmp_path):
    "From a file into another folder; the killed run stays as it was."
    whole, first, second = undisturbed('pretrain'), tmp_path/'first', tmp_path/'second'
    assert kill_after(aam, command(aam, survey, 'pretrain', first), first, 2, random.Random(2).uniform(0, 0.3))
    kept = {p: p.read_bytes() for p in first.rglob('*') if p.is_file()}
    aam(*command(aam, survey, 'pretrain', second, '--resume-from', first/'checkpoints'/'last.pt'))
    expect_equal(second, whole)
    assert kept == {p: p.read_bytes() for p in first.rglob('*') if p.is_file()}


def test_finished_run_resumed(aam, survey, undisturbed, tmp_path):
    "Nothing changes, and options other than its own are refused."
    whole, folder = undisturbed('train'), tmp_path/'run'
    shutil.copytree(whole, folder)
    aam(*command(aam, survey, 'train', folder, '--resume-from', 'auto'))
    expect_equal(folder, whole)
    refused = aam(*command(aam, survey, 'train', folder, '--resume-from', 'auto', '--dropout', 0.3), fails=True)
    assert refused.returncode == 2 and '--dropout 0.3' in refused.err
