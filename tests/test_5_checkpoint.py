"""gpt-DATE.pt: each run has a file of its own, and whatever happens, no saved model is lost."""
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime

import pytest
import torch

from conftest import (PROJECT, SMALL, SMALL_OF, TEXT, copy_script, edited, import_script,
                      run_here)

# Each value is another one, so that none can stand in the place of another.
SETTINGS = dict(batch_size=4, block_size=13, max_iters=20, eval_iters=2, learning_rate=0.01,
                warmup_iters=5, weight_decay=0.2, n_embd=18, n_head=3, n_layer=1, dropout=0.1,
                seed=7)


def saved_runs(folder):
    """What the files of all runs hold, in the order of their names. Each is whole, or this fails.
    """
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob('*.pt'))]


def train_with(gpt, *val_losses):
    """Trains with these val losses in the reports; the weights at each report."""
    losses, weights = iter(val_losses), []

    def estimate_loss():
        weights.append({name: w.clone() for name, w in gpt.model.state_dict().items()})
        loss = next(losses)
        return {'train': loss / 2, 'val': loss}

    gpt.estimate_loss, gpt.eval_interval = estimate_loss, gpt.max_iters // (len(val_losses) - 1)
    gpt.train()
    return weights


def assert_same_weights(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- What is saved
def test_a_run_is_saved_with_its_settings_by_name_and_the_vocabulary(tmp_path):
    gpt = import_script(tmp_path, 'gpt.py', **SMALL | SETTINGS)
    gpt.train()
    [saved] = saved_runs(tmp_path)
    assert SETTINGS.items() <= saved['settings'].items()
    assert saved['settings']['text_length'] == len(TEXT)
    assert saved['chars'] == gpt.chars


def test_the_weights_are_those_with_the_lowest_val_loss_and_the_history_goes_on(gpt, tmp_path):
    """Untrained weights do not count, however good they are; of two as good, the first ones do."""
    weights = train_with(gpt, 0.5, 2.0, 1.0, 1.0, 1.5)
    [saved] = saved_runs(tmp_path)
    assert_same_weights(saved['model'], weights[2])
    assert saved['history'] == gpt.history == [
        (0, 0.25, 0.5), (5, 1.0, 2.0), (10, 0.5, 1.0), (15, 0.5, 1.0), (20, 0.75, 1.5)]


def test_the_history_has_the_losses_that_are_printed(gpt, tmp_path, capsys):
    gpt.train()
    printed = re.findall(r'step (\d+) of 20: train loss (\S+), val loss (\S+),',
                         capsys.readouterr().out)
    assert [(str(step), f'{train:.4f}', f'{val:.4f}') for step, train, val in gpt.history] == printed
    assert saved_runs(tmp_path)[0]['history'] == gpt.history and len(printed) == 3


def test_training_again_in_one_session_is_another_run(gpt, tmp_path):
    """As in a notebook: it has a file and a history of its own, and other settings count."""
    train_with(gpt, 4.0, 1.0, 0.5)
    [first] = tmp_path.glob('*.pt')
    content = first.read_bytes()
    gpt.learning_rate = 0.005
    weights = train_with(gpt, 4.0, 3.0, 3.5)
    assert first.read_bytes() == content
    _, second = saved_runs(tmp_path)
    assert second['history'] == gpt.history == [(0, 2.0, 4.0), (10, 1.5, 3.0), (20, 1.75, 3.5)]
    assert_same_weights(second['model'], weights[1])
    assert second['settings']['learning_rate'] == 0.005


def test_the_best_weights_generate_the_text_not_the_last(tmp_path):
    """That a and b alternate is ever less true of the last tenth: its loss falls, then rises."""
    text = 'ab' * 450 + 'aabb' * 25
    out, _, status = run_here(copy_script(tmp_path, 'gpt.py', text, **{
        **SMALL, 'max_iters': 60, 'eval_interval': 4, 'learning_rate': 0.02, 'top_k': 1}))
    [saved] = saved_runs(tmp_path)
    val_losses = [val for step, _, val in saved['history'] if step > 0]
    assert status == 0 and min(val_losses) < val_losses[-1]
    gpt = import_script(tmp_path, 'gpt.py', text, **SMALL, top_k=1)
    gpt.model.load_state_dict(saved['model'])
    assert gpt.estimate_loss()['val'] == pytest.approx(min(val_losses))
    written = gpt.decode(gpt.model.generate(torch.zeros(1, 1, dtype=torch.long), 500)[0].tolist())
    assert out.endswith(f'The best weights generate:\n{written}\n')


# --- Where
def test_the_file_is_named_for_the_moment_at_which_the_run_began(gpt, tmp_path, capsys):
    """To the microsecond, so that runs that begin in the same second differ."""
    began = datetime(2026, 2, 3, 14, 5, 6, 789_000).timestamp()
    for started in (began, began + 0.001):
        gpt.report(0, started)
        gpt.report(5, started)
    names = ['gpt-2026-02-03-140506-789000.pt', 'gpt-2026-02-03-140506-790000.pt']
    assert sorted(path.name for path in tmp_path.glob('gpt-*')) == names
    assert all(name in capsys.readouterr().out for name in names[1:])


def test_a_run_says_which_file_is_its_own(tmp_path):
    out, _, _ = run_here(copy_script(tmp_path, 'gpt.py', **SMALL))
    [path] = tmp_path.glob('*.pt')
    assert f'from the next report on, saved in {path.name}\n' in out
    assert abs(datetime.strptime(path.stem, 'gpt-%Y-%m-%d-%H%M%S-%f').timestamp()
               - time.time()) < 60


# --- Nothing is lost
def stop_training(step):
    """An edit that stops the training at a step, as Ctrl-C does."""
    return ('        loss.backward()',
            f'        if step == {step}: raise KeyboardInterrupt\n        loss.backward()')


@pytest.mark.parametrize('step, which, models', [
    (0, 'last, unsaved', 0), (9, 'last, unsaved', 0), (10, 'best', 1), (19, 'best', 1)])
def test_ctrl_c_before_and_after_the_first_save(tmp_path, step, which, models):
    """It ends the training, and the text is generated all the same."""
    script = copy_script(tmp_path, 'gpt.py', TEXT, stop_training(step),
                         **{**SMALL, 'eval_interval': 5 if models else 10})
    out, err, status = run_here(script)
    assert (err, status) == ('', 0) and 'step 20' not in out
    assert re.search(f'\nThe {which} weights generate:\n(?s:.{{501}})\n$', out)
    assert len(saved_runs(tmp_path)) == models


@pytest.mark.parametrize('stop', [KeyboardInterrupt(), OSError(28, 'No space left on device')],
                         ids=['Ctrl-C', 'full disk'])
@pytest.mark.parametrize('at', [1, 2])
def test_a_save_that_stops_half_way_leaves_all_models_as_they_were(tmp_path, monkeypatch, stop, at):
    """Those of other runs, and what this one has saved before."""
    import_script(tmp_path, 'gpt.py', **SMALL).train()
    [earlier] = tmp_path.glob('*.pt')
    before, save, saves = earlier.read_bytes(), torch.save, []

    def save_half(checkpoint, path):
        saves.append(path)
        save(checkpoint, path)
        if len(saves) == at:
            os.truncate(path, os.stat(path).st_size // 2)
            raise stop

    monkeypatch.setattr(torch, 'save', save_half)
    out, err, status = run_here(copy_script(tmp_path, 'gpt.py', **SMALL))
    assert earlier.read_bytes() == before and len(saved_runs(tmp_path)) == at
    if isinstance(stop, KeyboardInterrupt):
        assert (err, status) == ('', 0) and 'The best weights generate:' in out
    else:
        assert status == 1 and str(stop) in err.splitlines()[-1]


def test_two_runs_at_once_keep_two_models(tmp_path, monkeypatch):
    """Here one of them trains from its first step to its last while the other one saves."""
    one, other = (import_script(tmp_path, 'gpt.py', **SMALL, seed=seed) for seed in (1, 2))
    save = torch.save

    def save_and_let_the_other_run(checkpoint, path):
        save(checkpoint, path)
        monkeypatch.setattr(torch, 'save', save)
        other.train()

    monkeypatch.setattr(torch, 'save', save_and_let_the_other_run)
    one.train()
    for gpt, saved in zip((one, other), saved_runs(tmp_path), strict=True):
        assert saved['settings']['seed'] == gpt.seed and saved['history'] == gpt.history


def test_the_weights_are_safe_before_the_sample_is_made(gpt, tmp_path, monkeypatch):
    """It may fail, or take long."""
    monkeypatch.setattr(gpt.model, 'generate', lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpt.report(10, 0.0)
    assert len(saved_runs(tmp_path)) == 1


posix_only = pytest.mark.skipif(os.name != 'posix', reason='needs the signals of Unix')


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
    assert len(out.partition('weights generate:\n')[2]) == 502


@posix_only
def test_kill_while_two_runs_in_one_folder_save_again_and_again(tmp_path, start):
    """Their files are large, so that writing takes a while. One is killed in the middle of it."""
    script = copy_script(tmp_path, 'gpt.py', TEXT, ('max_new_tokens=80', 'max_new_tokens=1'), **{
        **SMALL, 'n_embd': 256, 'max_iters': 10_000, 'eval_interval': 1, 'eval_iters': 1})
    runs = [start(script, 'step 2 ') for _ in range(2)]  # what step 1 gave is saved
    for run in runs:
        end = time.monotonic() + 60
        while not list(tmp_path.glob('*.new')) and time.monotonic() < end:
            pass
        run.kill()
        run.wait(timeout=60)
        assert len(saved_runs(tmp_path)) == 2
    assert [run['history'][0][0] for run in saved_runs(tmp_path)] == [0, 0]


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
    assert len(saved_runs(tmp_path)) == (script == 'gpt.py')
