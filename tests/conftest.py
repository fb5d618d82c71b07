"""What all tests use: a copy of a script with other hyperparameters, imported or run."""
import io
import os
import runpy
import shutil
import subprocess
import sys
import time
import traceback
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')  # for small models one thread is the fastest
import torch

sys.path.insert(0, str(Path(__file__).parent / 'lab'))
from scripts import PROJECT, edited, load

each_script = pytest.mark.parametrize('script', ['bigram.py', 'gpt.py'])

# A text of our own, so that the tests do not depend on what input.txt holds.
TEXT = (Path(__file__).parent / 'sample.txt').read_text(encoding='utf-8')

# All hyperparameters of a GPT that is small enough to train in a second, and of a bigram model.
# So the tests do not depend on those at the top of the scripts, which are there to be edited.
SMALL_BIGRAM = dict(device='cpu', batch_size=4, block_size=16, max_iters=20, eval_interval=10,
                    eval_iters=2, learning_rate=0.1, seed=1337)
SMALL = SMALL_BIGRAM | dict(learning_rate=1.5e-3, warmup_iters=5, weight_decay=0.3, n_embd=16,
                            n_head=2, n_layer=2, dropout=0.0, temperature=0.8, top_k=None)
SMALL_OF = {'bigram.py': SMALL_BIGRAM, 'gpt.py': SMALL}


def is_committed(*files):
    """Whether these files are as they were committed; False where there is no git to tell."""
    git = ['git', '-C', PROJECT, 'diff', '--quiet', 'HEAD', '--', *files]
    return bool(shutil.which('git')) and not subprocess.run(git, capture_output=True).returncode


def copy_script(folder, script, text=TEXT, *edits, **hyperparameters):
    """Copies a script into a folder, edits the copy, puts a text (str, bytes or None) beside it."""
    source = edited((PROJECT / script).read_text(encoding='utf-8'), *edits, **hyperparameters)
    folder.mkdir(exist_ok=True)
    (folder / script).write_text(source, encoding='utf-8')
    if text is not None:
        (folder / 'input.txt').write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / script


def import_script(folder, script, text=TEXT, *edits, **hyperparameters):
    """A script as a module: copied, edited, and small, but for the hyperparameters given here."""
    values = {**SMALL_OF[script], **hyperparameters}
    return load(copy_script(folder, script, text, *edits, **values))


def random_model(folder, text=TEXT, *edits, **hyperparameters):
    """A small gpt.py as a module, whose weights are all random: so each of them matters."""
    gpt = import_script(folder, 'gpt.py', text, *edits, **hyperparameters)
    torch.manual_seed(1)
    randomize_(gpt.model)
    return gpt


def save(gpt):
    """Saves the weights that the model has now, as those of a run of its own; the file's path."""
    losses, started = {'train': 1.0, 'val': 1.0}, time.time()
    for step in (0, 1):
        gpt.save(step, losses, started)
    return max(gpt.folder.glob('gpt-*.pt'))


def run_here(script, *arguments, encoding='utf-8'):
    """Runs a script like a process of its own, but in this one: it saves the seconds in which
    Python and torch start. Returns standard output, standard error, exit status.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, newline='\n', write_through=True)
                for _ in range(2))
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'stdout', out)
        patch.setattr(sys, 'stderr', err)
        patch.setattr(sys, 'argv', [str(script), *arguments])
        try:
            runpy.run_path(str(script), run_name='__main__')
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                print(status, file=err)
                status = 1
        except Exception:
            traceback.print_exc()
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
def bigram(tmp_path):
    return import_script(tmp_path, 'bigram.py')


@pytest.fixture
def gpt(tmp_path):
    return import_script(tmp_path, 'gpt.py')


@pytest.fixture(params=['bigram.py', 'gpt.py'])
def module(request, tmp_path):
    """bigram.py and gpt.py in turn: a test with `module` holds for both."""
    return import_script(tmp_path, request.param)


@pytest.fixture
def in_one_process(monkeypatch):
    """What exercises.py measures, it measures in this process: here it can be patched."""
    import exercises
    monkeypatch.setattr(exercises, 'Pool', lambda *_: ThreadPool(1))
    monkeypatch.setattr(exercises.os, 'environ', {})
