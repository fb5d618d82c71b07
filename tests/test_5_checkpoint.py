"""The checkpoint: the best weights are saved in gpt.pt, survive Ctrl-C, and continue a prompt."""
import math
import os
import re
import signal
import sys

import pytest
import torch

from conftest import (SMALL, SMALL_BIGRAM, copy_script, generate_less, import_script, new_folder,
                      posix_only, run_here, start)

# Training that takes about 0.1 s: evaluations, each with a save, after steps 1, 2 and 3.
TINY = {**SMALL, 'max_iters': 3, 'eval_interval': 1, 'eval_iters': 1, 'n_layer': 1}
TINY_OF = {'gpt.py': TINY, 'bigram.py': {name: TINY[name] for name in SMALL_BIGRAM}}


def checkpoint(folder):
    return torch.load(folder / 'gpt.pt', weights_only=True)


def val_loss(folder, **hyperparameters):
    """The validation loss of the weights in gpt.pt."""
    source = (folder / 'gpt.py').read_bytes()
    gpt = import_script(folder, 'gpt.py', **hyperparameters)
    (folder / 'gpt.py').write_bytes(source)
    gpt.model.load_state_dict(checkpoint(folder)['model'])
    return gpt.estimate_loss()['val']


def announced_loss(out):
    """The loss that the last lines of a training give to the weights in gpt.pt."""
    return float(re.search(r'The best weights, val loss (.*), are in gpt.pt', out).group(1))


def test_gpt_pt_holds_the_weights_the_vocabulary_and_the_sizes(tmp_path):
    out, err, status = run_here(copy_script(tmp_path, 'gpt.py', **SMALL))
    assert (err, status) == ('', 0)
    assert sorted(os.listdir(tmp_path)) == ['gpt.pt', 'gpt.py', 'input.txt']
    saved = checkpoint(tmp_path)
    gpt = import_script(tmp_path, 'gpt.py', **SMALL)
    assert set(saved) == {'model', 'config', 'chars'} and saved['chars'] == gpt.chars
    assert saved['config'] == {k: SMALL[k] for k in ('block_size', 'n_embd', 'n_head', 'n_layer')}
    gpt.model.load_state_dict(saved['model'])
    assert f'{gpt.estimate_loss()["val"]:.4f}' == f'{announced_loss(out):.4f}'


def test_the_best_weights_are_saved_and_generate_the_text_not_the_last(tmp_path):
    """That a and b alternate is ever less true of the last tenth: its loss falls, then rises."""
    text = 'ab' * 450 + 'aabb' * 25
    out, _, status = run_here(copy_script(tmp_path, 'gpt.py', text, **{
        **SMALL, 'max_iters': 60, 'eval_interval': 4, 'learning_rate': 0.02, 'top_k': 1}))
    losses = [float(loss) for loss in re.findall(r'step \d+: .*val loss (\d+\.\d+)', out)]
    assert status == 0 and min(losses[1:]) < losses[-1]
    gpt = import_script(tmp_path, 'gpt.py', text, **SMALL, top_k=1)
    gpt.model.load_state_dict(checkpoint(tmp_path)['model'])
    assert abs(gpt.estimate_loss()['val'] - min(losses[1:])) < 1e-3
    context = torch.zeros(1, 1, dtype=torch.long)
    assert out.endswith(gpt.decode(gpt.model.generate(context, 500)[0].tolist()) + '\n')


def test_a_prompt_is_continued_without_training_whatever_input_txt_is_now(tmp_path):
    script = copy_script(tmp_path, 'gpt.py', **SMALL)
    run_here(script)
    before = (tmp_path / 'gpt.pt').read_bytes()
    for text in ('Something else, with other letters: \u00e9\u00e8\u00ea.', '!', None):
        (tmp_path / 'input.txt').unlink()
        if text:
            (tmp_path / 'input.txt').write_text(text, encoding='utf-8')
        out, err, status = run_here(script, '--prompt', 'The king')
        assert (err, status) == ('', 0)
        assert out.startswith('The king') and len(out) == len('The king') + 500 + 1
        assert 'step' not in out and (tmp_path / 'gpt.pt').read_bytes() == before


def test_the_help_needs_no_input_txt(tmp_path):
    out, err, status = run_here(copy_script(tmp_path, 'gpt.py', None, **SMALL), '--help')
    assert (err, status) == ('', 0) and '--prompt' in out


def test_cpu_0_trains_and_loads_its_own_checkpoint(tmp_path):
    script = copy_script(tmp_path, 'gpt.py', **{**TINY, 'device': 'cpu:0'})
    for arguments in ([], ['--prompt', 'The king']):
        _, err, status = run_here(script, *arguments)
        assert (err, status) == ('', 0)


def test_gpt_pt_is_replaced_only_by_a_whole_file(tmp_path, monkeypatch):
    """Whatever ends the write half-way: what stood in gpt.pt still stands there."""
    gpt = import_script(tmp_path, 'gpt.py', **SMALL)
    gpt.save()
    before = (tmp_path / 'gpt.pt').read_bytes()

    def half_a_save(_, path):
        path.write_bytes(before[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', half_a_save)
    with pytest.raises(KeyboardInterrupt):
        gpt.save()
    assert (tmp_path / 'gpt.pt').read_bytes() == before


@pytest.mark.parametrize('failure', ['the disk is full', 'torch cannot write',
                                     'the file cannot be moved'])
def test_a_save_that_fails_ends_training_with_one_line_and_keeps_the_last_gpt_pt(
        tmp_path, monkeypatch, capsys, failure):
    gpt = import_script(tmp_path, 'gpt.py', **TINY)
    real_save, calls = torch.save, []

    def fail_at_the_third(checkpoint, path):  # the trial, the first evaluation, this one
        calls.append(path)
        if len(calls) == 3 and failure == 'the disk is full':
            raise OSError(28, 'No space left on device')
        if len(calls) == 3 and failure == 'torch cannot write':
            raise RuntimeError('PytorchStreamWriter failed writing file')
        real_save(checkpoint, path)
        if len(calls) == 3:
            path.unlink()  # as another run in the same folder would do
        if len(calls) == 2:
            saved.append(path.read_bytes())

    saved = []
    monkeypatch.setattr(torch, 'save', fail_at_the_third)
    losses = iter([4.0, 3.0, 2.0, 1.0])  # every evaluation is the best so far
    monkeypatch.setattr(gpt, 'estimate_loss', lambda: dict.fromkeys(('train', 'val'), next(losses)))
    with pytest.raises(SystemExit) as end:
        gpt.train()
    assert re.fullmatch(r'gpt\.py: cannot write .*gpt\.pt\.tmp: .*', end.value.code)
    assert 'step 2' in capsys.readouterr().out and len(calls) == 3
    assert (tmp_path / 'gpt.pt').read_bytes() == saved[0]


def test_ctrl_c_in_the_first_save_does_not_announce_an_older_gpt_pt(tmp_path, monkeypatch, capsys):
    (tmp_path / 'gpt.pt').write_bytes(b'an earlier model')
    gpt = import_script(tmp_path, 'gpt.py', **TINY)
    real_save, calls = torch.save, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:  # the first is the trial before training
            raise KeyboardInterrupt
        real_save(*arguments)

    monkeypatch.setattr(torch, 'save', interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpt.train()
    assert 'best' not in capsys.readouterr().out
    assert (tmp_path / 'gpt.pt').read_bytes() == b'an earlier model'


def test_ctrl_c_in_a_later_save_announces_the_loss_that_is_in_gpt_pt(tmp_path, monkeypatch, capsys):
    gpt = import_script(tmp_path, 'gpt.py', **TINY)
    real_save, calls, estimates = torch.save, [], []
    losses = iter([4.0, 3.0, 2.0, 1.0])

    def interrupted(checkpoint, path):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real_save(checkpoint, path)

    def falling_loss():
        estimates.append(next(losses))
        return {'train': estimates[-1], 'val': estimates[-1]}

    monkeypatch.setattr(torch, 'save', interrupted)
    monkeypatch.setattr(gpt, 'estimate_loss', falling_loss)
    gpt.train()
    assert estimates == [4.0, 3.0, 2.0]
    assert announced_loss(capsys.readouterr().out) == 3.0


def lines_run(script, *arguments):
    """The numbers of the script's lines that run once it handles Ctrl-C, in their order."""
    seen = []

    def trace(frame, event, _):
        if frame.f_code.co_filename == str(script):
            if event == 'line' and sys.excepthook.__module__ != 'sys':
                seen.append(frame.f_lineno)
            return trace

    sys.settrace(trace)
    try:
        assert run_here(script, *arguments)[1:] == ('', 0)
    finally:
        sys.settrace(None)
    return seen


def interrupt(script, moment, *arguments):
    """Runs a script with Ctrl-C before the line of this moment: as run_here, what it gave."""
    left = moment

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename == str(script):
            if event == 'line' and sys.excepthook.__module__ != 'sys':
                left -= 1
                if left < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

    sys.settrace(trace)
    try:
        return run_here(script, *arguments)
    finally:
        sys.settrace(None)


@pytest.mark.parametrize('name, arguments', [
    ('bigram.py', []), ('gpt.py', []), ('gpt.py', ['--prompt', 'The king'])])
def test_ctrl_c_at_any_line_gives_one_line_or_the_text_of_the_best_weights(
        tmp_path, name, arguments):
    """Before the first and before the last time that each line of the script runs."""
    script = generate_less(copy_script(tmp_path, name, **{
        **TINY_OF[name], 'max_iters': 2}))
    if arguments:
        run_here(script)
    lines = lines_run(script, *arguments)
    moments = sorted({lines.index(line) for line in lines}
                     | {len(lines) - 1 - lines[::-1].index(line) for line in lines})
    assert len(moments) > 20
    for moment in moments:
        if name == 'gpt.py' and not arguments:
            (tmp_path / 'gpt.pt').unlink(missing_ok=True)
        out, err, status = interrupt(script, moment, *arguments)
        where = f'line {lines[moment]}: {out[-200:]} {err}'
        assert status in (0, 130), where
        if status == 130:
            assert err == f'{name}: stopped by Ctrl-C\n', where
        else:
            assert err == '' and name == 'gpt.py' and not arguments, where
            assert 'Stopped by Ctrl-C.' in out, where
            assert out.split('They generate:\n')[1], where
            # A hair better, where Ctrl-C came between a new gpt.pt and the note of its loss.
            assert val_loss(tmp_path, **TINY) < announced_loss(out) + 1e-4, where


def wait_for(process, words):
    """Reads what the process prints, up to a line that starts with these words."""
    for line in process.stdout:
        if line.startswith(words):
            return
    raise AssertionError(f'it ended without printing {words}: {process.stderr.read()}')


@posix_only
def test_ctrl_c_as_the_system_sends_it(tmp_path):
    """Before and after the first save, in bigram.py, and while a prompt is continued."""
    long = {**SMALL, 'max_iters': 1_000_000, 'eval_iters': 1}
    folders = {name: new_folder(tmp_path) for name in ('early', 'late', 'bigram', 'prompt')}
    early = copy_script(folders['early'], 'gpt.py', **{**long, 'eval_interval': 1_000_000})
    late = copy_script(folders['late'], 'gpt.py', **{**long, 'eval_interval': 10})
    bigram = copy_script(folders['bigram'], 'bigram.py', max_iters=1_000_000, device='cpu')
    import_script(folders['prompt'], 'gpt.py', **SMALL).save()
    prompt = folders['prompt'] / 'gpt.py'
    last_line = '    print(decode(m.generate(context, max_new_tokens='
    source = prompt.read_text(encoding='utf-8')
    prompt.write_text(source.replace(
        last_line + '500', f"    print('Now:')\n{last_line}1_000_000"), 'utf-8')
    processes = {early: start(early), late: start(late), bigram: start(bigram),
                 prompt: start(prompt, '--prompt', 'The king')}
    ends = {}
    for script, words in ((early, '    '), (late, 'step 20:'), (bigram, 'step 200:'),
                          (prompt, 'Now:')):
        wait_for(processes[script], words)
        processes[script].send_signal(signal.SIGINT)
        out, err = processes[script].communicate(timeout=60)
        ends[script] = out, err, processes[script].returncode
    for script in (early, bigram, prompt):
        assert ends[script][1:] == (f'{script.name}: stopped by Ctrl-C\n', 130)
        assert 'generate' not in ends[script][0]
    out, err, status = ends[late]
    assert (err, status) == ('', 0) and 'Stopped by Ctrl-C.' in out
    assert len(out.split('They generate:\n')[1]) == 1 + 500 + 1


@posix_only
def test_a_progress_line_rewrites_itself_on_a_terminal_only(tmp_path):
    import pty
    script = copy_script(tmp_path, 'gpt.py', **SMALL)
    assert 'step 7 of 20' not in run_here(script)[0]
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
    assert process.communicate()[1] == '' and process.returncode == 0
    assert b'step 7 of 20' in seen and re.search(rb'step 7 of 20[^\r\n]*\r', seen)


def test_training_without_a_save_yet_has_no_best_loss(gpt):
    """Weights of step 0 are random, so they are not saved: best stays at infinity."""
    assert gpt.evaluate(0, math.inf) == math.inf
    assert not gpt.checkpoint_path.exists()
