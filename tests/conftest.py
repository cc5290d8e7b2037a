"What several guards share: the command in a subprocess, a small simulated survey, and runs made once for all workers."
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

installed = Path(sys.executable).with_name('aam')
tiny = '--embedding-dim 16 --attention-layers 1 --attention-heads 2 --kmer-dim 16 --unifrac-branches 32 --batch-size 8 --max-bp 60 --device cpu'.split()
environment = {**{k: v for k, v in os.environ.items() if k not in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK')}, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}


class Commands:
    "Starts `aam` as a user does; `tiny` are options of a model that trains in a second."
    tiny, environment = tiny, environment

    module = (sys.executable, '-m', 'aam.cli')
    usual = (str(installed),) if installed.exists() else module # where only the sources are, on a GPU machine

    def start(self, *words, launcher=usual, env=None, **how):
        return subprocess.Popen([*launcher, *map(str, words)], env=environment | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)

    def __call__(self, *words, fails=False, **how):
        "Runs to the end; asserts the exit code unless `fails`."
        process = self.start(*words, **how)
        process.out, process.err = process.communicate(timeout=300)
        assert fails or process.returncode == 0, f'{words}\n{process.out}\n{process.err}'
        return process

    torchrun = (str(installed.with_name('torchrun')), '--nproc_per_node=1', '-m', 'aam.cli')


@pytest.fixture(scope='session')
def aam():
    return Commands()


@pytest.fixture(scope='session')
def once(tmp_path_factory):
    "A function that has a folder made by one worker and shares it with the others."
    root = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: root = root.parent

    def make(name, build):
        with open(root/f'{name}.lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root/f'{name}.made').exists():
                build(root/name)
                (root/f'{name}.made').touch()
        return root/name
    return make


@pytest.fixture(scope='session')
def survey(aam, once):
    "Folder with table.biom, tree.nwk, unifrac.h5, metadata.tsv and test_samples.txt of 48 simulated samples."
    return once('survey', lambda folder: aam('simulate', '--output-dir', folder, '--samples', 48, '--asvs', 60, '--subjects', 12))


@pytest.fixture(scope='session')
def inputs(survey):
    "The survey as options: table, metadata and tree."
    return ['--table', survey/'table.biom', '--metadata', survey/'metadata.tsv', '--tree', survey/'tree.nwk']


@pytest.fixture(scope='session')
def pretrained(aam, survey, once):
    "Folder of a pretrain run on the survey."
    files = ['--table', survey/'table.biom', '--tree', survey/'tree.nwk', '--metadata', survey/'metadata.tsv']
    return once('pretrained', lambda folder: aam('pretrain', *files, '--output-dir', folder, *tiny, '--epochs', 2, '--group-column', 'subject_id'))


@pytest.fixture(scope='session')
def trained(aam, survey, inputs, pretrained, once):
    "Folder of a train run: two targets, on the frozen pre-trained encoder, subjects kept together, some held out as test."
    return once('trained', lambda folder: aam('train', *inputs, '--metadata-column', 'soil_ph,soil_moisture', '--output-dir', folder, *tiny, '--epochs', 2,
                                              '--pretrained-encoder', pretrained/'checkpoints'/'best_model.pt', '--freeze-base', '--lr', '1e-2',
                                              '--group-column', 'subject_id', '--test-samples', survey/'test_samples.txt'))
