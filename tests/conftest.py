"""What all tests use: a copy of a script with other hyperparameters, imported or run."""
import importlib.util
import io
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')  # for small models one thread is the fastest
import torch

POSIX = hasattr(os, 'geteuid')  # Windows has neither this nor terminals and signals as in Unix
posix_only = pytest.mark.skipif(not POSIX, reason='needs signals or terminals as in Unix')
# Two copies of a script that differ in a value of equal length, made in the same second, look the
# same to Python's cache of compiled modules: it would import the first one twice.
sys.dont_write_bytecode = True

PROJECT = Path(__file__).resolve().parent.parent
TEXT = (PROJECT / 'input.txt').read_text(encoding='utf-8')[:20_000]

# A GPT that is small enough to train in a second.
SMALL = dict(batch_size=4, block_size=16, max_iters=20, eval_interval=10, eval_iters=2,
             warmup_iters=5, n_embd=16, n_head=2, n_layer=2, device='cpu')
SMALL_BIGRAM = dict(batch_size=4, block_size=16, max_iters=20, eval_interval=10, eval_iters=2,
                    device='cpu')
SMALL_OF = {'bigram.py': SMALL_BIGRAM, 'gpt.py': SMALL}


def copy_script(folder, script, text=TEXT, **hyperparameters):
    """Copies a script into a folder, sets hyperparameters in it, puts an input.txt beside it."""
    source = (PROJECT / script).read_text(encoding='utf-8')
    for name, value in hyperparameters.items():
        source, found = re.subn(rf'(?m)^{name} = .*$', lambda _: f'{name} = {value!r}', source)
        assert found == 1, f'{script} has {found} lines that set {name}, not one'
    (folder / script).write_text(source, encoding='utf-8')
    if isinstance(text, str):
        text = text.encode()
    if text is not None:
        (folder / 'input.txt').write_bytes(text)
    return folder / script


def generate_less(script):
    """Edits a copied script to generate 5 tokens for a text or a sample, to take less time."""
    source = script.read_text(encoding='utf-8')
    source, found = re.subn(r'(?m)(max_new_tokens=)500|(device\), )80(?=\))', r'\1\g<2>5', source)
    assert found == (2 if script.name == 'gpt.py' else 1)
    script.write_text(source, encoding='utf-8')
    return script


def import_script(folder, script, text=TEXT, **hyperparameters):
    """A script, copied and edited, as an imported module."""
    path = copy_script(folder, script, text, **hyperparameters)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(script, *arguments, **options):
    """The script as a process of its own, started in another directory than the script's."""
    usual = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8',
                 cwd=os.path.expanduser('~'), env={**os.environ, 'PYTHONIOENCODING': 'utf-8'})
    if POSIX:
        # A test run in the background ignores Ctrl-C, and its children would inherit that.
        usual['preexec_fn'] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen([sys.executable, str(script), *arguments], **{**usual, **options})


def run(script, *arguments, **options):
    """Starts the script and waits for its end: standard output, standard error, exit status."""
    process = start(script, *arguments, **options)
    out, err = process.communicate(timeout=120)
    return out, err, process.returncode


def run_here(script, *arguments):
    """Like run, but in this process: without the seconds in which Python and torch start."""
    out, err = (io.TextIOWrapper(io.BytesIO(), 'utf-8', write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'stdout', out)
        patch.setattr(sys, 'stderr', err)
        patch.setattr(sys, 'argv', [str(script), *arguments])
        patch.setattr(sys, 'excepthook', sys.excepthook)
        patch.setattr(os, '_exit', sys.exit)
        status = 0
        try:
            try:
                runpy.run_path(str(script), run_name='__main__')
            except SystemExit:
                raise
            except BaseException as error:  # as Python does with an error that nobody catches
                status = 1
                sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                print(status, file=err)
                status = 1
    return *(stream.buffer.getvalue().decode() for stream in (out, err)), status


def run_all(scripts):
    """Like run, for several scripts at the same time."""
    processes = [start(script) for script in scripts]
    return [(*process.communicate(timeout=120), process.returncode) for process in processes]


def new_folder(folder):
    """A new folder inside a folder."""
    return Path(tempfile.mkdtemp(dir=folder))


def tokens(module, length, batch=3):
    """A batch of random token ids (batch, length)."""
    return torch.randint(module.vocab_size, (batch, length))


def randomize_(model):
    """Adds noise to every parameter, the zero ones too, so that each affects the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def gpt(tmp_path):
    """A small gpt.py as a module, with the beginning of our text."""
    return import_script(tmp_path, 'gpt.py', **SMALL)


@pytest.fixture(params=['bigram.py', 'gpt.py'])
def module(request, tmp_path):
    """bigram.py and gpt.py in turn, small: a test with `module` holds for both."""
    return import_script(tmp_path, request.param, **SMALL_OF[request.param])
