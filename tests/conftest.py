"What several guards share: the command in a process of its own, a small simulated survey, and runs made once for all workers."
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

installed = Path(sys.executable).with_name('aam')
tiny = '--embedding-dim 16 --attention-layers 1 --attention-heads 2 --kmer-dim 16 --unifrac-branches 32 --batch-size 8 --max-bp 60 --device cpu'.split()
environment = {**{k: v for k, v in os.environ.items() if k not in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK')}, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONFAULTHANDLER': '1'}

# Imports the libraries once; each command then runs in a process of its own, forked from here.
server = '''
import json, os, signal, sys, traceback
import aam.cli, aam.inference, aam.inputs, aam.rf_baseline, aam.session, skbio, sklearn.ensemble
for line in sys.stdin:
    words, *said = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(300)
        for stream, path in enumerate(said, 1): os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        code = 1
        try: code = aam.cli.main(words)
        except BaseException: traceback.print_exc()
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
'''


class Finished:
    "How a command ended, and what it said; 0 unless it `fails`."
    def __init__(self, words, fails, returncode, out, err):
        self.returncode, self.out, self.err = returncode, out, err
        assert fails or returncode == 0, f'{words}\n{out}\n{err}'


class Commands:
    "Runs `aam`; `tiny` are options of a model that trains in a second."
    tiny, environment = tiny, environment

    def __init__(self, folder):
        self.said, self.server = [folder/'out.txt', folder/'err.txt'], None

    module = (sys.executable, '-m', 'aam.cli')
    usual = (str(installed),) if installed.exists() else module # where only the sources are, on a GPU machine

    def start(self, *words, launcher=usual, env=None, **how):
        "As a user starts it."
        return subprocess.Popen([*launcher, *map(str, words)], env=environment | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)

    def cold(self, *words, fails=False, **how):
        "As a user starts it, to the end; asserts the exit code unless `fails`."
        process = self.start(*words, **how)
        said = process.communicate(timeout=300)
        return Finished(words, fails, process.returncode, *said)

    def __call__(self, *words, fails=False):
        "The same in a process that need not import torch again."
        if shutil.which('nvidia-smi'): return self.cold(*words, fails=fails) # CUDA does not survive a fork
        if self.server is None: self.server = subprocess.Popen([sys.executable, '-c', server], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.server.stdin.write(json.dumps([list(map(str, words)), *map(str, self.said)]) + '\n')
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        return Finished(words, fails, code, *[path.read_text() for path in self.said])

    torchrun = (str(installed.with_name('torchrun')), '--nproc_per_node=1', '-m', 'aam.cli')


@pytest.fixture(scope='session')
def aam(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp('said'))
    yield commands
    if commands.server is not None:
        commands.server.kill() # closing its input would not do: workers that a test left may hold it, too
        commands.server.communicate()


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
