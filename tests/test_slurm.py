"The scripts in slurm/ on a real SLURM of one node: a job that is taken away again and again ends as one that nobody disturbed, bit for bit."
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from test_resume import expect_equal, lines, stopped

root = Path(__file__).parents[1]
programs = 'slurmctld', 'slurmd', 'munged', 'sbatch'
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not all(map(shutil.which, programs)) or os.geteuid(), reason='needs slurm-wlm and munge, and root')]
options = '--embedding-dim 16 --attention-layers 1 --attention-heads 2 --kmer-dim 16 --unifrac-branches 32 --batch-size 2 --max-bp 60 --device cpu --group-column subject_id --epochs 12 --patience 12'
epochs = 12


class Cluster:
    "SLURM's own commands, on a cluster that lives in `folder`."
    def __init__(self, folder):
        self.folder, self.environment = folder, {**os.environ, 'SLURM_CONF': str(folder/'slurm.conf')}

    def __call__(self, *words, **variables):
        done = subprocess.run(list(map(str, words)), env=self.environment | {k: str(v) for k, v in variables.items()}, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, f'{words}\n{done.stdout}\n{done.stderr}'
        return done.stdout.strip()

    def submit(self, script, *words, **variables):
        "The number of a job."
        return self('sbatch', '--parsable', f'--output={self.folder}/%j.log', *words, root/'slurm'/script, **variables)

    def said(self, job): return (self.folder/f'{job}.log').read_text() if (self.folder/f'{job}.log').exists() else ''
    def facts(self, job): return dict(word.split('=', 1) for word in self('scontrol', 'show', 'job', job).split() if '=' in word)

    def wait(self, job, until, seconds=300):
        "Waits until `until(facts of the job)`."
        deadline = time.time() + seconds
        while not until(facts := self.facts(job)):
            assert time.time() < deadline, f'{facts}\n{self.said(job)}'
            time.sleep(0.1)
        return facts

    def finish(self, job): return self.wait(job, lambda facts: facts['JobState'] in ('COMPLETED', 'FAILED', 'CANCELLED', 'NODE_FAIL', 'TIMEOUT'))


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp('slurm')
    started = subprocess.run(['bash', root/'tests'/'slurm'/'start.sh', folder], capture_output=True, text=True)
    try:
        assert started.returncode == 0, started.stderr
        yield Cluster(folder)
    finally: subprocess.run(['bash', root/'tests'/'slurm'/'stop.sh', folder])


@pytest.fixture(scope='module')
def given(aam, survey, tmp_path_factory):
    "Variables of the scripts; AAM_ENV has the `aam` of this checkout."
    environment = tmp_path_factory.mktemp('environment')/'bin'
    environment.mkdir()
    (environment/'aam').symlink_to(aam.usual[0])
    return dict(TABLE=survey/'table.biom', TREE=survey/'tree.nwk', METADATA=survey/'metadata.tsv', OPTIONS=options, SAVE_EVERY=7, MODULES='', AAM_ENV=environment.parent, OMP_NUM_THREADS=1)


@pytest.fixture(scope='module')
def whole(cluster, given, tmp_path_factory):
    "The folder of a job that nobody disturbed."
    folder = tmp_path_factory.mktemp('whole')/'run'
    job = cluster.submit('pretrain.sbatch', OUT=folder, **given)
    facts = cluster.finish(job)
    assert (facts['JobState'], facts['ExitCode'], facts['Restarts']) == ('COMPLETED', '0:0', '0'), cluster.said(job)
    return folder


def running(cluster, job, folder, epoch):
    "Waits until the job has finished that many epochs and is at work on the next one."
    return cluster.wait(job, lambda facts: facts['JobState'] == 'RUNNING' and len(lines(folder)) >= epoch)


def same(folder, whole, monkeypatch):
    monkeypatch.setattr('test_resume.epochs', epochs)
    expect_equal(folder, whole)


def test_pretraining_that_is_taken_away_twice(cluster, given, whole, tmp_path, monkeypatch):
    "By `scontrol requeue`, which is what pre-emption does, and by `scancel --signal=USR1`, for which the script requeues itself."
    folder = tmp_path/'run'
    job = cluster.submit('pretrain.sbatch', OUT=folder, **given)
    running(cluster, job, folder, 1)
    cluster('scontrol', 'requeue', job)
    cluster.wait(job, lambda facts: facts['Restarts'] == '1')
    running(cluster, job, folder, len(lines(folder)) + 2)
    cluster('scancel', '--signal=USR1', job)
    cluster.wait(job, lambda facts: facts['Restarts'] == '2')
    facts, said = cluster.finish(job), cluster.said(job)
    assert (facts['JobState'], facts['ExitCode'], facts['Restarts']) == ('COMPLETED', '0:0', '2'), said
    assert 'stopped by SIGTERM' in said and 'stopped by SIGUSR1' in said and said.count('resuming') == 2 and said.count(f'Exited with exit code {stopped}') == 2, said
    print(said)
    same(folder, whole, monkeypatch)


def test_time_limit(cluster, given, whole, tmp_path, monkeypatch):
    "What `#SBATCH --signal=B:USR1@120` does two minutes before the time limit, sent by hand: to the shell alone, which tells the step."
    folder = tmp_path/'run'
    job = cluster.submit('pretrain.sbatch', OUT=folder, **given)
    running(cluster, job, folder, 2)
    cluster('scancel', '--batch', '--signal=USR1', job)
    facts, said = cluster.finish(job), cluster.said(job)
    assert (facts['JobState'], facts['Restarts']) == ('COMPLETED', '1') and 'stopped by SIGUSR1' in said, said
    same(folder, whole, monkeypatch)


def test_told_before_there_is_anything_to_save(cluster, given, whole, tmp_path, monkeypatch):
    folder = tmp_path/'run'
    job = cluster.submit('pretrain.sbatch', OUT=folder, **given)
    cluster.wait(job, lambda facts: facts['JobState'] == 'RUNNING')
    time.sleep(1)
    assert not folder.exists()
    cluster('scancel', '--signal=USR1', job)
    facts, said = cluster.finish(job), cluster.said(job)
    assert (facts['JobState'], facts['Restarts']) == ('COMPLETED', '1'), said
    same(folder, whole, monkeypatch)


def test_cancelled_job_stays_cancelled(cluster, given, tmp_path):
    folder = tmp_path/'run'
    job = cluster.submit('pretrain.sbatch', OUT=folder, **given)
    running(cluster, job, folder, 1)
    cluster('scancel', job)
    time.sleep(12) # longer than a requeued job waits
    facts = cluster.facts(job)
    assert (facts['JobState'], facts['Restarts']) == ('CANCELLED', '0') and (folder/'checkpoints'/'last.pt').exists(), cluster.said(job)


@pytest.mark.parametrize('strategy', ['distributed', 'fsdp'])
def test_two_tasks(cluster, given, tmp_path, monkeypatch, strategy):
    "Started by srun, on one node; told to stop, and compared with two that were not."
    shape = '--ntasks-per-node=2', '--gpus-per-node=2'
    undisturbed, folder = tmp_path/'undisturbed', tmp_path/'run'
    first = cluster.submit('pretrain.sbatch', *shape, OUT=undisturbed, STRATEGY=strategy, **given)
    assert cluster.finish(first)['JobState'] == 'COMPLETED', cluster.said(first)
    assert '2 ranks' in cluster.said(first)
    job = cluster.submit('pretrain.sbatch', *shape, OUT=folder, STRATEGY=strategy, **given)
    running(cluster, job, folder, 2)
    cluster('scancel', '--signal=USR1', job)
    facts, said = cluster.finish(job), cluster.said(job)
    assert (facts['JobState'], facts['Restarts']) == ('COMPLETED', '1'), said
    same(folder, undisturbed, monkeypatch)


def test_sweep(cluster, given, survey, tmp_path):
    (tmp_path/'sweep.txt').write_text('--lr 1e-3\n--lr 1e-2\n')
    words = dict(given, OPTIONS=options.replace('12', '1'), SWEEP=tmp_path/'sweep.txt', COLUMN='soil_ph', OUT=tmp_path/'runs')
    job = cluster.submit('array_sweep.sbatch', '--array=1-2', **words)
    for task in 1, 2: assert cluster.finish(f'{job}_{task}')['JobState'] == 'COMPLETED'
    said = [(tmp_path/'runs'/str(task)/'config.json').read_text() for task in (1, 2)]
    assert '"lr": 0.001' in said[0] and '"lr": 0.01' in said[1]
