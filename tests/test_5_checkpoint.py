"""gpt-DATE.pt: each run has a file of its own, and whatever happens, no saved model is lost."""
import os
import re
import subprocess
import sys
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch

from conftest import (PROJECT, SMALL, SMALL_OF, TEXT, copy_script, each_script, edited,
                      import_script, run_here)

# Each value differs from all others, so that none can stand in the place of another.
DISTINCT = dict(batch_size=4, block_size=13, max_iters=20, eval_iters=2, learning_rate=0.01,
                warmup_iters=5, weight_decay=0.2, n_embd=18, n_head=3, n_layer=1, dropout=0.1,
                seed=7)


def saved_runs(folder):
    """What the files of all runs hold, in the order of their names. An error if one is not whole.
    """
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob('*.pt'))]


def train_with(gpt, *val_losses):
    """Trains with these val losses in the reports; the weights at each report.

    The train losses fall, whatever the val losses do: 1, 1/2, 1/3 and so on.
    """
    losses, weights = iter(val_losses), []

    def estimate_loss():
        weights.append({name: w.clone() for name, w in gpt.model.state_dict().items()})
        return {'train': 1 / len(weights), 'val': next(losses)}

    gpt.estimate_loss, gpt.eval_interval = estimate_loss, gpt.max_iters // (len(val_losses) - 1)
    gpt.train()
    return weights


def assert_same_weights(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- What is saved
def test_a_run_is_saved_with_its_settings_by_name_and_the_vocabulary(tmp_path):
    gpt = import_script(tmp_path, 'gpt.py', **DISTINCT)
    gpt.train()
    [saved] = saved_runs(tmp_path)
    assert DISTINCT.items() <= saved['settings'].items()
    assert saved['settings']['text_length'] == len(TEXT)
    assert saved['chars'] == gpt.chars


def test_the_weights_are_those_with_the_lowest_val_loss_and_the_history_goes_on(gpt, tmp_path):
    """Untrained weights do not count, however good they are; of two as good, the first ones do."""
    weights = train_with(gpt, 0.5, 2.0, 1.23456, 1.23456, 1.5)
    [saved] = saved_runs(tmp_path)
    assert_same_weights(saved['model'], weights[2])
    assert saved['history'] == gpt.history == [
        (0, 1, 0.5), (5, 1/2, 2.0), (10, 1/3, 1.23456), (15, 1/4, 1.23456), (20, 1/5, 1.5)]


def test_training_again_in_one_session_is_another_run(gpt, tmp_path):
    """As in a notebook: it has a file and a history of its own, and other settings count."""
    train_with(gpt, 4.0, 1.0, 0.5)
    [first] = tmp_path.glob('*.pt')
    content = first.read_bytes()
    gpt.learning_rate = 0.005
    weights = train_with(gpt, 4.0, 3.0, 3.5)
    assert first.read_bytes() == content
    _, second = saved_runs(tmp_path)
    assert second['history'] == gpt.history == [(0, 1, 4.0), (10, 1/2, 3.0), (20, 1/3, 3.5)]
    assert_same_weights(second['model'], weights[1])
    assert second['settings']['learning_rate'] == 0.005


def test_the_best_weights_generate_the_text_not_the_last(tmp_path):
    """Those of step 10 are the best, by losses that are made up. At each report, a bias makes the
    model write one character only, the one whose id is the step.
    """
    edit = ('    losses = estimate_loss()', """
    model.lm_head.bias.data[step] = 1e6 * (step + 1)
    losses = {'train': 1.0, 'val': 1.0 + abs(step - 10)}""")
    out, _, _ = run_here(copy_script(tmp_path, 'gpt.py', TEXT, edit, **SMALL))
    assert out.endswith(f'The best weights generate:\n\n{500 * sorted(set(TEXT))[10]}\n')


# --- Where
def test_a_file_is_named_for_the_moment_at_which_its_run_began(gpt, tmp_path, monkeypatch, capsys):
    """To the microsecond, so that runs that begin in the same second differ."""
    began = datetime(2026, 2, 3, 14, 5, 6, 789_000).timestamp()
    for now in (began, began + 0.001):
        monkeypatch.setattr(gpt, 'time', SimpleNamespace(time=lambda: now))
        gpt.train()
    names = ['gpt-2026-02-03-140506-789000.pt', 'gpt-2026-02-03-140506-790000.pt']
    assert sorted(path.name for path in tmp_path.glob('gpt-*')) == names
    printed = capsys.readouterr().out
    assert all(f'from the next report on, saved in {name}\n' in printed for name in names)


# --- Nothing is lost
def test_ctrl_c_before_the_first_save_ends_training_and_the_text_is_generated(tmp_path):
    edit = ('        optimizer.step()', """
        if step == 9:
            raise KeyboardInterrupt
        optimizer.step()""")
    out, err, status = run_here(copy_script(tmp_path, 'gpt.py', TEXT, edit, **SMALL))
    assert (err, status) == ('', 0) and 'step 10' not in out
    assert re.search('\nThe last, unsaved weights generate:\n(?s:.{501})\n$', out)
    assert saved_runs(tmp_path) == []


def copy_that_stops(folder, save, stop):
    """A copy of gpt.py that does this in the middle of its first, or second, save."""
    save_half = f"""
import os
def save_half(checkpoint, path):
    torch.save(checkpoint, path)
    if len(history) == {save} + 1:  # step 0 is in the history, too, but not saved
        os.truncate(path, os.path.getsize(path) // 2)
        {stop}
"""
    edits = [('torch.save(', 'save_half('), ('\n# --- Training', f'{save_half}\n# --- Training')]
    return copy_script(folder, 'gpt.py', TEXT, *edits, **SMALL)


@pytest.mark.parametrize('save', [1, 2])
@pytest.mark.parametrize('stop', ['raise KeyboardInterrupt', "raise OSError('disk full')"])
def test_a_save_that_stops_half_way_leaves_all_models_as_they_were(tmp_path, stop, save):
    """Those of other runs, and what this one has saved before."""
    import_script(tmp_path, 'gpt.py').train()
    [earlier] = tmp_path.glob('*.pt')
    before = earlier.read_bytes()
    out, err, status = run_here(copy_that_stops(tmp_path, save, stop))
    assert earlier.read_bytes() == before and len(saved_runs(tmp_path)) == save
    if 'disk full' in stop:
        assert status == 1 and err.endswith('OSError: disk full\n')
    else:
        assert (err, status) == ('', 0) and 'The best weights generate:' in out


def test_a_process_that_is_killed_while_it_saves_again_leaves_what_it_saved_before(tmp_path):
    """Nothing in the script can react to that. In a pipe, what it has printed has arrived."""
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    script = copy_that_stops(tmp_path, 2, 'os.kill(os.getpid(), 9)')
    run = subprocess.run([sys.executable, script], capture_output=True, env=env)
    assert run.returncode != 0 and run.stderr == b'' and b'\nstep 20 of 20' in run.stdout
    [saved] = saved_runs(tmp_path)
    assert [step for step, _, _ in saved['history']] == [0, 10]


def test_two_runs_at_once_keep_two_models(tmp_path, monkeypatch):
    """Here one of them trains from its first step to its last while the other one saves."""
    one, other = (import_script(tmp_path, 'gpt.py', seed=seed) for seed in (1, 2))
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


# --- Where people run it
@each_script
def test_a_notebook_cell_trains_and_generates(tmp_path, monkeypatch, capsys, script):
    """There, no __file__ tells where the script is, and the arguments are the notebook's own."""
    copy_script(tmp_path, script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['ipykernel_launcher.py', '-f', 'kernel.json'])
    cell = {'__name__': '__main__'}
    exec(edited((PROJECT / script).read_text(encoding='utf-8'), **SMALL_OF[script]), cell)
    out = capsys.readouterr().out
    assert 'step 20 of 20' in out and len(out) > 500
    ids = torch.tensor([cell['encode']('The ')])
    assert cell['decode'](cell['model'].generate(ids, 20)[0].tolist()).startswith('The ')
    assert len(saved_runs(tmp_path)) == (script == 'gpt.py')
