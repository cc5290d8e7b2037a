"A run killed or told to stop anywhere and resumed ends as the run that nobody disturbed, bit for bit."
import json
import os
import random
import shutil
import signal
import socket
import sys
import time

import pytest
import torch

from aam.checkpoint import load_checkpoint

epochs = 5
commands = {
    'train': ['--metadata-column', 'soil_ph', '--lr', '1e-3'],
    'pretrain': [],
}
stopped = 75 # exit status of a run that was told to stop


def command(aam, survey, name, folder, *more):
    files = ['--table', survey/'table.biom', '--tree', survey/'tree.nwk', '--metadata', survey/'metadata.tsv', '--group-column', 'subject_id']
    return [name, *files, *commands[name], '--output-dir', folder, *aam.tiny, '--epochs', epochs, '--gradient-accumulation-steps', 2, *more]


@pytest.fixture(scope='session')
def undisturbed(aam, survey, once):
    "The folder of a run that nobody disturbed, and what more than the name it was given."
    return lambda name, *more, **how: once(f"undisturbed_{name}{'_'.join(map(str, more)).replace('/', '_')[-60:]}", lambda folder: (aam.cold if how else aam)(*command(aam, survey, name, folder, *more), **how))


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


def wait_for(path, process, seconds=120):
    deadline = time.time() + seconds
    while not path.exists() and process.poll() is None and time.time() < deadline: time.sleep(0.002)
    assert path.exists(), process.communicate()[1]


def last_of(folder): return next(p for name in ('last.pt', 'last.dcp') if (p := folder/'checkpoints'/name).exists())
def state(folder, name='last.pt'): return load_checkpoint(folder/'checkpoints'/name, part='training')['training']


def damage(path):
    "Turns one bit in the middle of the file."
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)


def equal(a, b):
    "Nested dictionaries of tensors and plain values, equal bit for bit?"
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b or (a != a and b != b)


def expect_equal(folder, other):
    "Weights, optimizer, counters, metrics, predictions, scores of two runs."
    for part, keys in dict(weights=['weights', 'split', 'scores', 'epoch'], training=['training', 'split']).items():
        a, b = (load_checkpoint(f/'checkpoints'/'best_model.pt' if part == 'weights' else last_of(f), part=part) for f in (folder, other))
        for state in (a, b): [state.get('training', {}).get('progress', {}).pop(k, None) for k in ('seconds', 'waited')]
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
    assert kill_after(aam, command(aam, survey, 'train', folder), folder, rng.randint(1, 2), rng.uniform(0, 0.1))
    last = folder/'checkpoints'/'last.pt'
    done = load_checkpoint(last, part='training')['training']['counters']['epoch'] if last.exists() else 0
    resumed = command(aam, survey, 'train', folder, '--resume-from', folder if done else 'auto')
    kill_after(aam, resumed, folder, min(max(done + 1, 3), epochs), rng.uniform(0, 0.1))
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
    assert kill_after(aam, command(aam, survey, 'pretrain', first), first, 2, random.Random(2).uniform(0, 0.1))
    kept = {p: p.read_bytes() for p in first.rglob('*') if p.is_file()}
    aam(*command(aam, survey, 'pretrain', second, '--resume-from', first/'checkpoints'/'last.pt'))
    expect_equal(second, whole)
    assert kept == {p: p.read_bytes() for p in first.rglob('*') if p.is_file()}


def test_finished_run_resumed(aam, survey, undisturbed, tmp_path):
    "Nothing changes, in place or in another folder, and options other than its own are refused."
    whole, folder = undisturbed('train'), tmp_path/'run'
    shutil.copytree(whole, folder)
    aam(*command(aam, survey, 'train', folder, '--resume-from', 'auto'))
    expect_equal(folder, whole)
    aam(*command(aam, survey, 'train', tmp_path/'other', '--resume-from', folder))
    expect_equal(tmp_path/'other', whole)
    refused = aam(*command(aam, survey, 'train', folder, '--resume-from', 'auto', '--dropout', 0.3), fails=True)
    assert refused.returncode == 2 and '--dropout 0.3' in refused.err


# ---- within an epoch

def test_killed_within_an_epoch(aam, survey, undisturbed, tmp_path):
    "By force, as soon as there is a state: `--save-every-steps` is all that there is to go on from."
    whole, folder, last = undisturbed('train'), tmp_path/'run', tmp_path/'run'/'checkpoints'/'last.pt'
    process = aam.start(*command(aam, survey, 'train', folder, '--save-every-steps', 1))
    wait_for(last, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    saved = state(folder)
    assert saved['counters']['epoch'] == 0 and 0 < saved['progress']['batches'] == 2*saved['counters']['step'] and not lines(folder)
    aam(*command(aam, survey, 'train', folder, '--resume-from', 'auto'))
    expect_equal(folder, whole)
    assert recorded_steps(folder) == recorded_steps(whole)
    assert f"after epoch 0, step {saved['counters']['step']}" in (folder/'training.log').read_text()


@pytest.mark.parametrize('name, number, more', [('train', signal.SIGTERM, ()), ('pretrain', signal.SIGUSR1, ('--num-workers', 1))])
def test_told_to_stop(aam, survey, undisturbed, tmp_path, name, number, more):
    "All processes of the run get the signal, and then once more, as clusters do; it saves and ends by itself."
    whole, folder = undisturbed(name), tmp_path/'run'
    process = aam.start(*command(aam, survey, name, folder, '--save-every-steps', 1, *more), start_new_session=True)
    wait_for(folder/'checkpoints'/'last.pt', process)
    for again in range(3):
        os.killpg(process.pid, number)
        time.sleep(0.02*again)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == stopped, said
    step = state(folder)['counters']['step']
    assert f'stopped by {number.name} after step {step}' in said and 'Traceback' not in said and not (folder/'scores.json').exists()
    aam(*command(aam, survey, name, folder, '--resume-from', 'auto'))
    expect_equal(folder, whole)


def test_frozen_encoder_told_to_stop(aam, survey, undisturbed, pretrained, tmp_path):
    more = '--pretrained-encoder', pretrained/'checkpoints'/'best_model.pt', '--freeze-base', '--dropout', 0.1, '--batch-size', 2
    whole, folder = undisturbed('train', *more), tmp_path/'run'
    process = aam.start(*command(aam, survey, 'train', folder, *more, '--save-every-steps', 1))
    wait_for(folder/'checkpoints'/'last.pt', process)
    process.send_signal(signal.SIGUSR1)
    process.communicate()
    assert process.returncode == stopped
    aam(*command(aam, survey, 'train', folder, *more, '--resume-from', 'auto'))
    expect_equal(folder, whole)


@pytest.mark.dist
@pytest.mark.parametrize('strategy, last', [('--distributed', 'last.pt'), ('--fsdp', 'last.dcp')])
def test_ranks_agree_to_stop(aam, survey, tmp_path, strategy, last):
    "One of two ranks is told; both end after the same step, and go on together."
    def two(folder, *more):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        shared = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2')
        words = command(aam, survey, 'pretrain', folder, strategy, '--resume-from', 'auto', *more)
        return [aam.start(*words, env=shared | dict(RANK=str(r), LOCAL_RANK=str(r))) for r in range(2)]
    def ends(processes): return [(p.communicate(timeout=200), p.returncode)[1] for p in processes]
    assert ends(two(tmp_path/'whole')) == [0, 0]
    processes = two(tmp_path/'run', '--save-every-steps', 1)
    wait_for(tmp_path/'run'/'checkpoints'/last, processes[0])
    processes[1].send_signal(signal.SIGUSR1)
    assert ends(processes) == [stopped, stopped]
    assert ends(two(tmp_path/'run')) == [0, 0]
    expect_equal(tmp_path/'run', tmp_path/'whole')


@pytest.mark.gpu
def test_told_to_stop_on_a_gpu(aam, survey, tmp_path):
    "Steps are recorded and replayed there; before and after, the losses are those of a run that nobody disturbed, but for rounding."
    folders = tmp_path/'whole', tmp_path/'run'
    words = [command(aam, survey, 'pretrain', folder, '--device', 'cuda', '--batch-size', 2, '--mixed-precision', 'none', '--save-every-steps', 3, '--resume-from', 'auto') for folder in folders]
    aam(*words[0])
    process = aam.start(*words[1])
    wait_for(folders[1]/'checkpoints'/'last.pt', process)
    process.send_signal(signal.SIGUSR1)
    assert (process.communicate(), process.returncode)[1] == stopped
    aam(*words[1])
    a, b = ([json.loads(line) for line in lines(folder)] for folder in folders)
    assert len(a) == len(b) == epochs
    for key in 'step', 'train_total', 'val_loss', 'lr': assert [x[key] for x in b] == pytest.approx([x[key] for x in a], rel=1e-3), key


# ---- several states

def test_damaged_state_is_passed_over(aam, survey, undisturbed, tmp_path):
    whole, folder = undisturbed('train'), tmp_path/'run'
    shutil.copytree(whole, folder)
    assert [state(folder, name)['counters']['epoch'] for name in ('last.pt', 'last-1.pt')] == [epochs, epochs - 1]
    damage(folder/'checkpoints'/'last.pt')
    said = aam(*command(aam, survey, 'train', folder, '--resume-from', 'auto')).err
    assert f'warning: {folder}/checkpoints/last.pt: damaged, passed over\n' in said and f'resuming {folder}/checkpoints/last-1.pt after epoch {epochs - 1}' in said
    expect_equal(folder, whole)
    for path in folder.glob('checkpoints/last*.pt'): damage(path)
    refused = aam(*command(aam, survey, 'train', folder, '--resume-from', folder), fails=True)
    assert refused.returncode == 2 and 'no intact last.pt' in refused.err
    said = aam(*command(aam, survey, 'train', folder, '--resume-from', 'auto')).err
    assert said.count('damaged, passed over') == 2 and 'starting afresh' in said
    expect_equal(folder, whole)


@pytest.mark.dist
@pytest.mark.parametrize('file', ['__1_0.distcp', '.metadata', 'state.pt'])
def test_damaged_shards_are_passed_over(aam, survey, undisturbed, tmp_path, file):
    "A turned bit in any file of the folder is noticed, by one process and by two."
    two = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'aam.cli')
    whole, folder = undisturbed('pretrain', '--fsdp', launcher=two), tmp_path/'run'
    shutil.copytree(whole, folder)
    last = folder/'checkpoints'/'last.dcp'
    damage(last/file)
    refused = aam(*command(aam, survey, 'pretrain', folder, '--resume-from', last), fails=True)
    assert refused.returncode == 2 and refused.err.count('\n') == 1 and f'{last}: not a checkpoint of aam, or damaged' in refused.err
    if file != '__1_0.distcp': return
    said = aam.cold(*command(aam, survey, 'pretrain', folder, '--fsdp', '--resume-from', 'auto'), launcher=two).err
    assert said.count('damaged, passed over') == 1 and f'warning: {last}: damaged, passed over\n' in said and f'resuming {folder}/checkpoints/last-1.dcp after epoch {epochs - 1}' in said
    expect_equal(folder, whole)


def test_states_kept(aam, survey, tmp_path):
    "As many as asked for, the newest ones; with `--save-every-steps` also from within an epoch."
    aam(*command(aam, survey, 'pretrain', tmp_path/'run', '--epochs', 2, '--batch-size', 4, '--gradient-accumulation-steps', 1, '--save-every-steps', 4, '--keep-checkpoints', 3))
    assert sorted(p.name for p in tmp_path.glob('run/checkpoints/*')) == ['best_model.pt', 'last-1.pt', 'last-2.pt', 'last.pt']
    kept = [state(tmp_path/'run', name) for name in ('last.pt', 'last-1.pt', 'last-2.pt')]
    steps = kept[0]['counters']['step']//2
    assert [(k['counters']['epoch'], k['counters']['step'], k['progress']['batches']) for k in kept] == [(2, 2*steps, 0), (1, (2*steps - 1)//4*4, (2*steps - 1)//4*4 - steps), (1, (2*steps - 1)//4*4 - 4, (2*steps - 1)//4*4 - 4 - steps)]


def test_earlier_state(aam, survey, undisturbed, tmp_path):
    "Going back on purpose: the best model, from later than that, does not count, and without epochs to come there would be none."
    whole, folder = undisturbed('pretrain', '--keep-checkpoints', epochs), tmp_path/'run'
    best = load_checkpoint(whole/'checkpoints'/'best_model.pt')['epoch']
    earlier = whole/'checkpoints'/f'last-{epochs - best + 1}.pt'
    assert best > 1 and load_checkpoint(earlier, part='training')['training']['counters']['epoch'] == best - 1
    words = command(aam, survey, 'pretrain', folder, '--resume-from', earlier)
    refused = aam(*words, '--epochs', best - 1, fails=True)
    assert refused.returncode == 2 and f'is of epoch {best}, later than the state that is resumed' in refused.err
    shutil.rmtree(folder)
    assert f'best_model.pt is of epoch {best}' in aam(*words).err
    expect_equal(folder, whole)
