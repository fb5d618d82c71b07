"""gpt.pt: the best weights are saved, survive the next run and Ctrl-C, and continue a prompt."""
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from conftest import (PROJECT, SMALL, SMALL_OF, TEXT, copy_script, edited, exit_message, import_script,
                      posix_only, result_of, run_here)

# An edit that stops training in its 15th step, after the first save, as Ctrl-C does.
CTRL_C = ('        loss.backward()', '        if step == 15:\n            raise KeyboardInterrupt\n'
          '        loss.backward()')


def checkpoint(folder):
    return torch.load(folder / 'gpt.pt', weights_only=True)


def kept(folder):
    """The models of earlier runs, the oldest first."""
    return sorted(folder.glob('gpt-*.pt'))


# --- What is saved
def test_gpt_pt_holds_the_weights_the_vocabulary_and_the_sizes(tmp_path):
    out, err, status = run_here(copy_script(tmp_path, 'gpt.py', **SMALL))
    assert (err, status) == ('', 0)
    assert sorted(os.listdir(tmp_path)) == ['gpt.pt', 'gpt.py', 'input.txt']
    saved, gpt = checkpoint(tmp_path), import_script(tmp_path, 'gpt.py', **SMALL)
    assert saved['chars'] == gpt.chars and saved['sizes'] == (16, 16, 2, 2)
    gpt.model.load_state_dict(saved['model'])
    assert f'val loss {gpt.estimate_loss()["val"]:.4f}, are in gpt.pt. They generate:' in out


def test_the_best_weights_are_saved_and_generate_the_text_not_the_last(tmp_path):
    """That a and b alternate is ever less true of the last tenth: its loss falls, then rises."""
    text = 'ab' * 450 + 'aabb' * 25
    out, _, status = run_here(copy_script(tmp_path, 'gpt.py', text, **{
        **SMALL, 'max_iters': 60, 'eval_interval': 4, 'learning_rate': 0.02, 'top_k': 1}))
    losses = [float(loss) for loss in re.findall(r'step \d+: .*val loss (\d+\.\d+)', out)]
    assert status == 0 and min(losses[1:]) < losses[-1]
    gpt = import_script(tmp_path, 'gpt.py', text, **SMALL, top_k=1)
    gpt.load(tmp_path / 'gpt.pt')
    assert abs(gpt.estimate_loss()['val'] - min(losses[1:])) < 1e-3
    context = torch.zeros(1, 1, dtype=torch.long)
    assert out.endswith(gpt.decode(gpt.model.generate(context, 500)[0].tolist()) + '\n')


def test_gpt_pt_is_replaced_only_by_a_whole_file(gpt, tmp_path, monkeypatch):
    """Whatever ends the write half-way: what stood in gpt.pt still stands there."""
    gpt.save()
    before = (tmp_path / 'gpt.pt').read_bytes()

    def half_a_save(_, path):
        path.write_bytes(before[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', half_a_save)
    with pytest.raises(KeyboardInterrupt):
        gpt.save()
    assert (tmp_path / 'gpt.pt').read_bytes() == before


def test_a_save_works_where_renaming_onto_an_existing_file_is_an_error(gpt, tmp_path, monkeypatch):
    """As on Windows."""
    rename = os.rename

    def rename_of_windows(old, new, **options):
        if os.path.exists(new):
            raise FileExistsError(new)
        rename(old, new, **options)

    monkeypatch.setattr(os, 'rename', rename_of_windows)
    for _ in range(2):
        gpt.save()
    assert checkpoint(tmp_path)['chars'] == gpt.chars


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'),
                                   RuntimeError('PytorchStreamWriter failed writing file')])
def test_a_save_that_fails_ends_training_with_one_line_and_keeps_the_last_gpt_pt(
        gpt, tmp_path, monkeypatch, error):
    save, saved = torch.save, []

    def fail_at_the_second(checkpoint, path):
        if saved:
            path.write_bytes(b'half a file')
            raise error
        save(checkpoint, path)
        saved.append(path.read_bytes())

    monkeypatch.setattr(torch, 'save', fail_at_the_second)
    losses = iter([4.0, 3.0, 2.0])  # every evaluation is the best so far
    monkeypatch.setattr(gpt, 'estimate_loss', lambda: dict.fromkeys(('train', 'val'), next(losses)))
    assert 'cannot save' in exit_message(gpt.train)
    assert (tmp_path / 'gpt.pt').read_bytes() == saved[0]


# --- Running again
def test_running_again_keeps_the_model_of_every_earlier_run(tmp_path):
    script, models = copy_script(tmp_path, 'gpt.py', **SMALL), []
    for run in range(4):
        out, err, status = run_here(script)
        assert (err, status) == ('', 0)
        assert [path.read_bytes() for path in kept(tmp_path)] == models
        assert out.count('The model of an earlier run') == (1 if run else 0)
        assert all(path.name in out for path in kept(tmp_path)[-1:])
        models.append((tmp_path / 'gpt.pt').read_bytes())


def test_training_again_in_one_session_is_another_run(gpt, tmp_path):
    """As in a notebook: the second run keeps the model of the first, and saves its own."""
    gpt.train()
    first = (tmp_path / 'gpt.pt').read_bytes()
    gpt.load(tmp_path / 'gpt.pt')
    gpt.train()
    assert [path.read_bytes() for path in kept(tmp_path)] == [first]
    assert (tmp_path / 'gpt.pt').read_bytes() != first


def test_a_run_keeps_nothing_of_its_own_when_it_saves_again(tmp_path):
    out, _, _ = run_here(copy_script(tmp_path, 'gpt.py', **{**SMALL, 'eval_interval': 2}))
    losses = [float(loss) for loss in re.findall(r'val loss (\d\.\d+), \d', out)]
    assert sum(a > b for a, b in zip(losses[1:], losses[2:])) > 3  # it saved that often, or more
    assert kept(tmp_path) == []


@pytest.mark.parametrize('edit', [
    (CTRL_C[0], CTRL_C[1].replace('15', '5')),
    ("losses['val'] < best_val_loss:", "losses['val'] < best_val_loss:\n"
     "                raise KeyboardInterrupt")], ids=['in step 5', 'at the first save'])
def test_ctrl_c_before_the_first_save_leaves_gpt_pt_as_it_was_and_generates_nothing(tmp_path, edit):
    script = copy_script(tmp_path, 'gpt.py', **SMALL)
    run_here(script)
    before = (tmp_path / 'gpt.pt').read_bytes()
    script = copy_script(tmp_path, 'gpt.py', None, edit, **SMALL)
    out, err, status = run_here(script)
    assert (err, status) == ('Stopped by Ctrl-C.\n', 130) and 'generate' not in out
    assert (tmp_path / 'gpt.pt').read_bytes() == before and kept(tmp_path) == []


def test_ctrl_c_after_a_save_goes_on_with_the_best_weights_of_this_run(tmp_path):
    out, err, status = run_here(copy_script(tmp_path, 'gpt.py', TEXT, CTRL_C, **SMALL))
    assert (err, status) == ('', 0) and 'step 20' not in out
    [loss] = re.findall(r'step 10: .*val loss (\S+),', out)
    _, text = out.split(f'The best weights, val loss {loss}, are in gpt.pt. They generate:\n')
    assert len(text) == 1 + 500 + 1


def wait_for(process, words):
    """Reads what a process prints, up to a line that starts with these words."""
    for line in process.stdout:
        if line.startswith(words):
            return
    raise AssertionError(f'it ended without printing {words}: {process.stderr.read()}')


@posix_only
@pytest.mark.parametrize('script, interval, words', [
    ('bigram.py', 100_000, 'step 0:'), ('gpt.py', 100_000, 'step 0:'), ('gpt.py', 10, 'step 20:')])
def test_ctrl_c_as_the_system_sends_it(tmp_path, start, script, interval, words):
    """After step 20, gpt.py has something to generate with. In a pipe, a line comes at once."""
    process = start(copy_script(tmp_path, script, **{
        **SMALL_OF[script], 'max_iters': 100_000, 'eval_interval': interval}))
    wait_for(process, words)
    process.send_signal(signal.SIGINT)
    out, err, status = result_of(process)
    if words == 'step 20:':
        assert (err, status) == ('', 0) and len(out.split('They generate:\n')[1]) == 502
    else:
        assert (err, status) == ('Stopped by Ctrl-C.\n', 130)


def test_ctrl_c_while_the_text_is_generated_gives_one_line(tmp_path):
    import_script(tmp_path, 'gpt.py', **SMALL).save()
    interrupted = ('idx = torch.cat((idx, idx_next), dim=1)', 'raise KeyboardInterrupt')
    script = copy_script(tmp_path, 'gpt.py', TEXT, interrupted, **SMALL)
    assert run_here(script, '--prompt', 'The') == ('', 'Stopped by Ctrl-C.\n', 130)


# --- A prompt
def test_a_prompt_is_continued_without_training_whatever_input_txt_is_now(tmp_path):
    script = copy_script(tmp_path, 'gpt.py', **SMALL)
    run_here(script)
    before = (tmp_path / 'gpt.pt').read_bytes()
    for text in ('Something else, with other letters: éèê.', '!', '', None):
        (tmp_path / 'input.txt').unlink()
        if text is not None:
            (tmp_path / 'input.txt').write_text(text, encoding='utf-8')
        out, err, status = run_here(script, '--prompt', 'The king')
        assert (err, status) == ('', 0)
        assert out.startswith('The king') and len(out) == len('The king') + 500 + 1
        assert 'step' not in out and (tmp_path / 'gpt.pt').read_bytes() == before
    assert kept(tmp_path) == []


@pytest.mark.parametrize('prompt', ['  The king  ', 'x', 'A prompt that is longer than the context '])
def test_a_prompt_comes_back_whole(tmp_path, prompt):
    import_script(tmp_path, 'gpt.py', prompt + 'The king', **SMALL).save()
    out, err, status = run_here(tmp_path / 'gpt.py', '--prompt', prompt)
    assert (err, status) == ('', 0) and out.startswith(prompt) and len(out) == len(prompt) + 501


def test_the_checkpoint_decides_the_sizes(tmp_path):
    """A model goes on to be useful whatever the hyperparameters at the top say by now."""
    gpt = import_script(tmp_path, 'gpt.py', **SMALL)
    gpt.save()
    other = import_script(tmp_path, 'gpt.py', 'abc', **{
        **SMALL, 'block_size': 8, 'n_embd': 24, 'n_head': 3, 'n_layer': 1})
    other.load(tmp_path / 'gpt.pt')
    assert other.model is other.m and other.vocab_size == gpt.vocab_size
    context = torch.tensor([gpt.encode('The king and the')])
    assert torch.equal(context, torch.tensor([other.encode('The king and the')]))
    texts = [module.decode(module.model.generate(context, 40, top_k=1)[0].tolist())
             for module in (gpt, other)]
    assert texts[0] == texts[1]


def test_another_checkpoint_can_be_named(tmp_path):
    script = copy_script(tmp_path, 'gpt.py', **SMALL)
    run_here(script)
    (tmp_path / 'gpt.pt').rename(tmp_path / 'other.pt')
    for arguments, first in ((['--prompt', 'The'], 'The'), ([], '\n')):
        out, err, status = run_here(script, '--checkpoint', str(tmp_path / 'other.pt'), *arguments)
        assert (err, status) == ('', 0) and len(out) == len(first) + 501 and out.startswith(first)
    assert not (tmp_path / 'gpt.pt').exists()


def test_a_checkpoint_from_a_gpu_opens_without_one(gpt, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
        gpt.save()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError):  # the file does say that it is from a GPU
            torch.load(tmp_path / 'gpt.pt', weights_only=True)
    weights = list(gpt.model.parameters())
    gpt.load(tmp_path / 'gpt.pt')
    assert all(torch.equal(a, b) for a, b in zip(gpt.model.parameters(), weights, strict=True))


# --- Where people run it
@pytest.mark.parametrize('script, edits', [('bigram.py', []), ('gpt.py', []), ('gpt.py', [CTRL_C])],
                         ids=['bigram.py', 'gpt.py', 'gpt.py, interrupted'])
def test_a_notebook_cell_trains_and_generates(tmp_path, monkeypatch, capsys, script, edits):
    """There, no __file__ tells where the script is, and the arguments are the notebook's own."""
    copy_script(tmp_path, script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['ipykernel_launcher.py', '-f', 'kernel.json'])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    cell = {'__name__': '__main__'}
    source = (PROJECT / script).read_text(encoding='utf-8')
    exec(edited(source, *edits, **SMALL_OF[script]), cell)
    out = capsys.readouterr().out
    assert ('step 20' in out) == (not edits) and len(out) > 500
    assert cell['model'] is cell['m']
    ids = torch.tensor([cell['encode']('The ')])
    assert cell['decode'](cell['model'].generate(ids, 20)[0].tolist()).startswith('The ')


def test_a_mistyped_option_is_refused(tmp_path):
    out, err, status = run_here(copy_script(tmp_path, 'gpt.py', **SMALL), '--promt', 'The')
    assert (out, status) == ('', 2) and '--promt' in err


@posix_only
def test_ctrl_c_at_the_python_prompt_does_not_end_the_session(tmp_path, start):
    """As after: python -i gpt.py --prompt "The " """
    import_script(tmp_path, 'gpt.py', **SMALL).save()
    process = start('-i', tmp_path / 'gpt.py', '--prompt', 'The ', stdin=subprocess.PIPE)
    process.stdin.write('print("ready")\n')
    process.stdin.flush()
    wait_for(process, 'ready')
    process.send_signal(signal.SIGINT)
    process.stdin.write('\n\n')  # Ctrl-C may cost the line that is read next
    process.stdin.write('print(decode(encode("The ")) + "still here", model is m)\n')
    out, err = process.communicate(timeout=60)
    assert 'The still here True' in out and process.returncode == 0


@posix_only
def test_a_progress_line_rewrites_itself_on_a_terminal_only(tmp_path, start):
    import pty
    script = copy_script(tmp_path, 'gpt.py', **SMALL)
    assert ' s left' not in run_here(script)[0]
    ours, its = pty.openpty()
    process = start(script, stdout=its)
    os.close(its)
    seen = b''
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # how a terminal says that the other side has hung up
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert re.search(rb'step 7 of 20, \d+ s left *\r(?!\n)', seen)
