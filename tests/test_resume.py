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


@pytest.fixture(scope='module', params=list(commands))
def undisturbed(request, aam, survey, once):
    name = request.param
    return name, once(f'undisturbed_{name}', lambda folder: aam(*command(aam, survey, name, folder)))


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
    timeless = [[{k: v for k, v in json.loads(line).items() if k != 'seconds'} for line in lines(f)] for f in (folder, other)]
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


def test_killed_twice_and_resumed(aam, survey, undisturbed, tmp_path):
    "By the folder of the run, then by 'auto'."
    name, whole = undisturbed
    folder, rng = tmp_path/'run', random.Random(name)
    was_killed = kill_after(aam, command(aam, survey, name, folder), folder, rng.randint(1, 2), rng.uniform(0, 0.3))
    done = load_checkpoint(folder/'checkpoints'/'last.pt', part='training')['training']['counters']['epoch'] if (folder/'checkpoints'/'last.pt').exists() else 0
    assert was_killed and done < epochs
    resumed = command(aam, survey, name, folder, '--resume-from', folder if done else 'auto')
    assert kill_after(aam, resumed, folder, max(done + 1, 3), rng.uniform(0, 0.3))
    aam(*command(aam, survey, name, folder, '--resume-from', 'auto'))
    expect_equal(folder, whole)
    steps = recorded_steps(whole)
    assert recorded_steps(folder) == steps == sorted(set(steps)) # the curves were cut back, nothing is shown twice
    assert 'resuming' in (folder/'training.log').read_text()


def test_killed_before_the_first_epoch(aam, survey, undisturbed, tmp_path):
    name, whole = undisturbed
    if name == 'pretrain': pytest.skip('as train')
    folder = tmp_path/'run'
    process, deadline = aam.start(*command(aam, survey, name, folder)), time.time() + 120
    while not (folder/'config.json').exists() and time.time() < deadline: time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not lines(folder)
    refused = aam(*command(aam, survey, name, folder), fails=True)
    assert refused.returncode == 2 and '--resume-from' in refused.err
    aam(*command(aam, survey, name, folder, '--resume-from', 'auto'))
    expect_equal(folder, whole)


def test_resumed_from_a_file_into_another_folder(aam, survey, undisturbed, tmp_path):
    name, whole = undisturbed
    if name == 'train': pytest.skip('as pretrain')
    first, second = tmp_path/'first', tmp_path/'second'
    assert kill_after(aam, command(aam, survey, name, first), first, 2, 0.1)
    kept = {p: p.read_bytes() for p in first.rglob('*') if p.is_file()}
    aam(*command(aam, survey, name, second, '--resume-from', first/'checkpoints'/'last.pt'))
    expect_equal(second, whole)
    assert kept == {p: p.read_bytes() for p in first.rglob('*') if p.is_file()}


def test_a_finished_run_can_go_on(aam, survey, undisturbed, tmp_path):
    "Resuming a finished run changes nothing, other options than its own are refused."
    name, whole = undisturbed
    if name == 'pretrain': pytest.skip('as train')
    folder = tmp_path/'run'
    shutil.copytree(whole, folder)
    aam(*command(aam, survey, name, folder, '--resume-from', 'auto'))
    expect_equal(folder, whole)
    refused = aam(*command(aam, survey, name, folder, '--resume-from', 'auto', '--dropout', 0.3), fails=True)
    assert refused.returncode == 2 and '--dropout 0.3' in refused.err
