"""What all tests use: a copy of a script with other hyperparameters, imported or run."""
import io
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')  # for small models one thread is the fastest
import torch

sys.path.insert(0, str(Path(__file__).parent / 'lab'))
from scripts import PROJECT, edited, load

POSIX = os.name == 'posix'
posix_only = pytest.mark.skipif(not POSIX, reason='needs the signals or terminals of Unix')
each_script = pytest.mark.parametrize('script', ['bigram.py', 'gpt.py'])

# A text of our own, so that the tests do not depend on what input.txt holds.
TEXT = (Path(__file__).parent / 'sample.txt').read_text(encoding='utf-8')

# A GPT that is small enough to train in a second, and a bigram model.
SMALL = dict(batch_size=4, block_size=16, max_iters=20, eval_interval=10, eval_iters=2,
             warmup_iters=5, n_embd=16, n_head=2, n_layer=2, device='cpu')
SMALL_BIGRAM = dict(batch_size=4, block_size=16, max_iters=20, eval_interval=10, eval_iters=2,
                    device='cpu')
SMALL_OF = {'bigram.py': SMALL_BIGRAM, 'gpt.py': SMALL}


def copy_script(folder, script, text=TEXT, *edits, **hyperparameters):
    """Copies a script into a folder, edits the copy, puts a text (str, bytes or None) beside it."""
    source = edited((PROJECT / script).read_text(encoding='utf-8'), *edits, **hyperparameters)
    folder.mkdir(exist_ok=True)
    (folder / script).write_text(source, encoding='utf-8')
    if text is not None:
        (folder / 'input.txt').write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / script


def import_script(folder, script, text=TEXT, *edits, **hyperparameters):
    """A script, copied and edited, as an imported module."""
    return load(copy_script(folder, script, text, *edits, **hyperparameters))


@pytest.fixture
def start():
    """Starts a script as a process, in another folder than its own; it ends with the test, or
    after two minutes.
    """
    processes, timers = [], []

    def start(script, *arguments, **options):
        env = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
        usual = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8',
                     cwd=os.path.expanduser('~'), env={**env, 'PYTHONIOENCODING': 'utf-8'})
        if POSIX:
            # A test run in the background ignores Ctrl-C, and its children would inherit that.
            usual['preexec_fn'] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
        processes.append(subprocess.Popen([sys.executable, str(script), *arguments],
                                          **{**usual, **options}))
        timers.append(threading.Timer(120, processes[-1].kill))
        timers[-1].start()
        return processes[-1]

    yield start
    for process, timer in zip(processes, timers):
        timer.cancel()
        process.kill()
        process.wait(timeout=60)
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


def result_of(process):
    """Waits for the end of a process: standard output, standard error, exit status."""
    out, err = process.communicate(timeout=120)
    return out, err, process.returncode


def run_here(script, *arguments, encoding='utf-8'):
    """Runs a script like a process of its own, but in this one: it saves the seconds in which
    Python and torch start. Returns standard output, standard error, exit status.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
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
    return *(stream.buffer.getvalue().decode(encoding) for stream in (out, err)), status


def exit_message(function, *arguments, **options):
    """The one line with which a function exits: Python prints it and returns status 1."""
    with pytest.raises(SystemExit) as end:
        function(*arguments, **options)
    message = end.value.code
    assert isinstance(message, str) and len(message.splitlines()) == 1, message
    assert message.startswith('Error: ')
    return message


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
    """A small gpt.py as a module."""
    return import_script(tmp_path, 'gpt.py', **SMALL)


@pytest.fixture(params=['bigram.py', 'gpt.py'])
def module(request, tmp_path):
    """bigram.py and gpt.py in turn, small: a test with `module` holds for both."""
    return import_script(tmp_path, request.param, **SMALL_OF[request.param])
