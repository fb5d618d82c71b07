"""gpt.pt: the best weights are saved, and whatever happens, no model that was saved is lost."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from conftest import (PROJECT, SMALL, SMALL_OF, TEXT, copy_script, edited, import_script,
                      run_here)

# A run that saves twice, after one step and after two, and generates little: it takes no time.
SHORT = {**SMALL, 'max_iters': 2, 'eval_interval': 1, 'warmup_iters': 1, 'learning_rate': 0.01}
FEW = [('max_new_tokens=80', 'max_new_tokens=2'), ('max_new_tokens=500', 'max_new_tokens=5')]


def checkpoint(folder):
    return torch.load(folder / 'gpt.pt', weights_only=True)


def kept(folder):
    """The models of earlier runs, the oldest first."""
    return [path.read_bytes() for path in sorted(folder.glob('gpt-*.pt'))]


def train_with(gpt, *val_losses):
    """Trains with these val losses in the estimates at steps 0, 5, 10, 15, 20; counts the saves."""
    gpt.eval_interval = 5
    gpt.estimate_loss = Mock(side_effect=[{'train': 3 - loss, 'val': loss} for loss in val_losses])
    gpt.save = Mock(wraps=gpt.save)
    gpt.train()
    return gpt.save.call_count


# --- What is saved
def test_gpt_pt_holds_the_weights_the_vocabulary_and_the_sizes(tmp_path):
    sizes = dict(block_size=12, n_embd=18, n_head=3, n_layer=1)
    gpt = import_script(tmp_path, 'gpt.py', **{**SMALL, **sizes})
    gpt.train()
    assert sorted(os.listdir(tmp_path)) == ['gpt.pt', 'gpt.py', 'input.txt']
    saved = checkpoint(tmp_path)
    assert saved.keys() == {'model', 'chars', 'sizes'}
    assert saved['chars'] == gpt.chars and saved['sizes'] == tuple(sizes.values())
    weights = gpt.model.state_dict()  # the last estimate was the best
    assert saved['model'].keys() == weights.keys()
    assert all(torch.equal(saved['model'][name], weights[name]) for name in weights)


def test_weights_are_saved_if_their_val_loss_is_the_lowest_of_this_run(gpt):
    """Untrained weights do not count, however good they are."""
    assert train_with(gpt, 0.5, 2.0, 1.0, 1.0, 1.5) == 2


def test_training_again_in_one_session_is_another_run(gpt, tmp_path):
    """As in a notebook: the second run keeps the model of the first, and saves its own."""
    assert train_with(gpt, 4.0, 3.0, 2.0, 1.0, 1.1) == 3
    first = (tmp_path / 'gpt.pt').read_bytes()
    assert train_with(gpt, 4.0, 2.0, 2.1, 2.2, 2.3) == 1
    assert kept(tmp_path) == [first] and (tmp_path / 'gpt.pt').read_bytes() != first


def test_the_best_weights_generate_the_text_not_the_last(tmp_path):
    """That a and b alternate is ever less true of the last tenth: its loss falls, then rises."""
    text = 'ab' * 450 + 'aabb' * 25
    out, _, status = run_here(copy_script(tmp_path, 'gpt.py', text, FEW[0], **{
        **SMALL, 'max_iters': 60, 'eval_interval': 4, 'learning_rate': 0.02, 'top_k': 1}))
    losses = [float(loss) for loss in re.findall(r'step \d+ .*val loss (\d+\.\d+)', out)]
    assert status == 0 and min(losses[1:]) < losses[-1]
    gpt = import_script(tmp_path, 'gpt.py', text, **SMALL, top_k=1)
    gpt.model.load_state_dict(checkpoint(tmp_path)['model'])
    assert abs(gpt.estimate_loss()['val'] - min(losses[1:])) < 1e-3
    context = torch.zeros(1, 1, dtype=torch.long)
    assert out.endswith(gpt.decode(gpt.model.generate(context, 500)[0].tolist()) + '\n')


def test_the_weights_are_safe_before_the_sample_is_made(gpt, tmp_path):
    """It may fail, or take long."""
    gpt.model.generate = Mock(side_effect=RuntimeError('no sample'))
    with pytest.raises(RuntimeError, match='no sample'):
        gpt.report(10, 0.0)
    assert checkpoint(tmp_path)['chars'] == gpt.chars


# --- Earlier runs
def test_a_run_renames_the_model_of_the_run_before_and_says_so(tmp_path):
    models = []
    for run in range(4):
        script = copy_script(tmp_path, 'gpt.py', TEXT, *FEW, **SHORT, seed=run)
        out, err, status = run_here(script)
        assert (err, status) == ('', 0)
        assert kept(tmp_path) == models and len(set(models)) == run
        names = sorted(path.name for path in tmp_path.glob('gpt-*.pt'))
        said = re.findall(r'The model of an earlier run is now in (\S+)\n', out)
        assert said == names[-1:]
        assert all(re.fullmatch(r'gpt-\d{4}-\d\d-\d\d-\d{6}-\d{6}\.pt', name) for name in names)
        models.append((tmp_path / 'gpt.pt').read_bytes())


def test_a_gpt_pt_that_is_a_folder_is_renamed_too(tmp_path):
    (tmp_path / 'gpt.pt').mkdir()
    (tmp_path / 'gpt.pt' / 'notes.txt').write_text('mine')
    out, err, status = run_here(copy_script(tmp_path, 'gpt.py', TEXT, *FEW, **SHORT))
    [renamed] = tmp_path.glob('gpt-*.pt')
    assert (err, status) == ('', 0) and (renamed / 'notes.txt').read_text() == 'mine'
    assert (tmp_path / 'gpt.pt').is_file()


# --- Nothing is lost
class Killed(BaseException):
    """The end of the process at this instant, as by kill -9: nothing catches it."""


class Files:
    """Numbers the operations on files, and stops the one with the number `at`: before it, in the
    middle of it (which leaves half a file) or after it. Notes which models have been saved.
    """

    def __init__(self, folder, monkeypatch, at, moment, stop):
        self.path, self.at, self.moment, self.stop = folder / 'gpt.pt', at, moment, stop
        self.names, self.first, self.last = [], self.path.read_bytes(), None
        for owner, name in [(Path, 'rename'), (Path, 'replace'), (Path, 'unlink'), (torch, 'save')]:
            monkeypatch.setattr(owner, name, self.watched(name, getattr(owner, name)))

    def watched(self, name, operation):
        def watched(*arguments, **options):
            if name == 'rename' and arguments[1].exists():
                raise FileExistsError(arguments[1])  # as on Windows
            self.names.append(name)
            here = len(self.names) - 1 == self.at
            if here and self.moment == 'before':
                raise self.stop
            operation(*arguments, **options)
            if here and self.moment == 'middle':
                os.truncate(arguments[1], arguments[1].stat().st_size // 2)
                raise self.stop
            if self.path.exists() and self.path.read_bytes() != self.first:
                self.last = self.path.read_bytes()
            if here:
                raise self.stop
        return watched


def models(folder):
    """All models in a folder: each can be loaded, else this fails."""
    paths = list(folder.glob('gpt*.pt'))
    for path in paths:
        assert torch.load(path, weights_only=True).keys() == {'model', 'chars', 'sizes'}
    return {path.read_bytes() for path in paths}


OPERATIONS = ['rename', 'save', 'replace', 'save', 'replace']  # of a run that saves twice


@pytest.mark.parametrize('stop', [
    KeyboardInterrupt(), Killed(), OSError(28, 'No space left on device')],
    ids=['Ctrl-C', 'kill', 'full disk'])
@pytest.mark.parametrize('at, moment', [
    *[(at, moment) for at in range(5) for moment in ('before', 'after')],
    (1, 'middle'), (3, 'middle'), (5, 'never')])
def test_whatever_stops_a_run_at_any_file_operation_no_model_is_lost(
        tmp_path, monkeypatch, at, moment, stop):
    """Neither the model of the run before nor the last one that this run has saved."""
    import_script(tmp_path, 'gpt.py', **SHORT, seed=1).save()
    script = copy_script(tmp_path, 'gpt.py', TEXT, *FEW, **SHORT, seed=2)
    with monkeypatch.context() as patch:
        files = Files(tmp_path, patch, at, moment, stop)
        try:
            out, err, status = run_here(script)
        except Killed:
            out, err, status = '', '', 'killed'
    assert files.names == OPERATIONS[:at + 1]
    assert models(tmp_path) == {files.first, files.last} - {None}
    assert (files.last is not None) == (at > 2 or (at, moment) == (2, 'after'))

    generated = 'They generate:' in out
    if moment == 'never' or isinstance(stop, KeyboardInterrupt) and files.last:
        assert (err, status) == ('', 0) and generated  # with the best weights so far
    elif isinstance(stop, Exception):  # the last line says what is wrong
        assert status == 1 and str(stop) in err.splitlines()[-1] and not generated
    elif isinstance(stop, KeyboardInterrupt) and (at, moment) != (0, 'before'):
        assert (err, status) == ('Stopped by Ctrl-C: nothing is saved yet.\n', 1) and not generated

    run_here(copy_script(tmp_path, 'gpt.py', TEXT, *FEW, **SHORT, seed=3))  # the next one, too
    assert models(tmp_path) >= {files.first, files.last} - {None}


@pytest.fixture
def start():
    """Starts a script as a process, in another folder than its own, and reads what it prints up to
    a line with these words.
    """
    processes = []

    def start(script, words):
        env = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
        # A test run in the background ignores Ctrl-C, and its children would inherit that.
        processes.append(subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding='utf-8', cwd=os.path.expanduser('~'), env=env,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)))
        assert any(words in line for line in processes[-1].stdout), processes[-1].stderr.read()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


posix_only = pytest.mark.skipif(os.name != 'posix', reason='needs the signals of Unix')


@posix_only
def test_ctrl_c_as_the_system_sends_it(tmp_path, start):
    """In a pipe, too, what is printed arrives at once: here, before the script goes to sleep."""
    sleep = ('        loss.backward()',
             '        time.sleep(60 if step == 25 else 0)\n        loss.backward()')
    process = start(copy_script(tmp_path, 'gpt.py', TEXT, sleep, **{**SMALL, 'max_iters': 30}),
                    'step 20 ')
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (err, process.returncode) == ('', 0) and 'step 30' not in out
    assert len(out.partition('They generate:\n')[2]) == 502


@posix_only
def test_kill_as_the_system_sends_it_in_the_middle_of_a_save(tmp_path, start):
    """The file is large, so that writing it takes a while, and each estimate is the best so far."""
    better = ('    model.train()  #', "    losses['val'] = -time.time()\n    model.train()  #")
    script = copy_script(tmp_path, 'gpt.py', TEXT, better, **{
        **SMALL, 'n_embd': 256, 'max_iters': 10_000, 'eval_interval': 1})
    (tmp_path / 'gpt.pt').write_bytes(b'the model of an earlier run')
    process = start(script, 'step 2 ')  # what step 1 gave is saved
    end = time.monotonic() + 60
    while not (tmp_path / 'gpt.pt.new').exists() and time.monotonic() < end:
        pass
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert kept(tmp_path) == [b'the model of an earlier run']
    assert checkpoint(tmp_path)['sizes'] == (16, 256, 2, 2)


# --- Where people run it
@pytest.mark.parametrize('script', ['bigram.py', 'gpt.py'])
def test_a_notebook_cell_trains_and_generates(tmp_path, monkeypatch, capsys, script):
    """There, no __file__ tells where the script is, and the arguments are the notebook's own."""
    copy_script(tmp_path, script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['ipykernel_launcher.py', '-f', 'kernel.json'])
    cell = {'__name__': '__main__'}
    exec(edited((PROJECT / script).read_text(encoding='utf-8'), **SMALL_OF[script]), cell)
    out = capsys.readouterr().out
    assert 'step 20 of 20' in out and len(out) > 500
    assert cell['model'] is cell['m']
    ids = torch.tensor([cell['encode']('The ')])
    assert cell['decode'](cell['model'].generate(ids, 20)[0].tolist()).startswith('The ')
