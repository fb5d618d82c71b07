"""The two things that the tests do with the scripts: import a copy, or run one, as people do."""
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PLAY = (PROJECT / 'input.txt').read_text(encoding='utf-8')[:20_000]

# A GPT that learns in a second what can be learned in a second.
SMALL = dict(batch_size=4, block_size=16, max_iters=20, eval_interval=10, eval_iters=2,
             warmup_iters=5, n_embd=16, n_head=2, n_layer=2, device='cpu')


def put(folder, script, text=PLAY, **hyperparameters):
    """A copy of a script, its hyperparameter lines edited by name, and an input.txt beside it."""
    source = (PROJECT / script).read_text(encoding='utf-8')
    for name, value in hyperparameters.items():
        source, found = re.subn(rf'(?m)^{name} = .*$', f'{name} = {value!r}', source)
        assert found == 1, f'{script} has {found} lines that set {name}, not one'
    (folder / script).write_text(source, encoding='utf-8')
    if isinstance(text, str):
        text = text.encode()
    if text is not None:
        (folder / 'input.txt').write_bytes(text)
    return folder / script


def start(script, *arguments, **options):
    """The script as a process of its own, from another directory than the script's."""
    usual = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8',
                 # A test run in the background would hand down its deafness to Ctrl-C.
                 preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
                 cwd=os.path.expanduser('~'), env={**os.environ, 'PYTHONIOENCODING': 'utf-8'})
    return subprocess.Popen([sys.executable, str(script), *arguments], **{**usual, **options})


def run(script, *arguments, **options):
    """start, and wait for the end: what it printed, its complaints, its exit status."""
    process = start(script, *arguments, **options)
    out, err = process.communicate(timeout=120)
    return out, err, process.returncode


def run_all(scripts):
    """run, for several scripts at the same time."""
    processes = [start(script) for script in scripts]
    return [(*process.communicate(timeout=120), process.returncode) for process in processes]


def fresh(folder):
    """A new folder inside a folder."""
    return Path(tempfile.mkdtemp(dir=folder))


def load(folder, script, text=PLAY, **hyperparameters):
    """A script, copied and edited, as an imported module."""
    path = put(folder, script, text, **hyperparameters)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpt(tmp_path):
    """gpt.py, small, on a piece of our plays."""
    return load(tmp_path, 'gpt.py', **SMALL)


@pytest.fixture(params=['bigram.py', 'gpt.py'])
def either(request, tmp_path):
    """bigram.py and gpt.py in turn: what a test says of `either` is true of both."""
    small = SMALL if request.param == 'gpt.py' else dict(batch_size=4, block_size=16, eval_iters=2)
    return load(tmp_path, request.param, **small)
