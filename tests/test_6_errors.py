"""What a user may get wrong: each mistake gets one line that names it and says what to do."""
import io
import os
import pickle
import runpy
import sys

import pytest
import torch

from conftest import (SMALL, SMALL_OF, TEXT, copy_script, each_script, exit_message, import_script,
                      posix_only, run_here)

EARLIER = b'the model of an earlier run'


def error_line(script, *arguments):
    """The one line of a run that must be refused; a gpt.pt from before must survive it."""
    gpt_pt = script.with_name('gpt.pt')
    if not gpt_pt.exists():
        gpt_pt.write_bytes(EARLIER)
    before = gpt_pt.read_bytes()
    out, err, status = run_here(script, *arguments)
    assert status == 1 and len(err.splitlines()) == 1 and err.startswith('Error: '), out + err
    assert gpt_pt.read_bytes() == before
    return err


class Written:
    """A value with a repr that Python can read, which nan and inf lack."""

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return f"float('{self.value}')" if type(self.value) is float else repr(self.value)


def message_for(folder, script, name, value):
    """The line with which a script refuses a value of a hyperparameter."""
    return exit_message(import_script, folder, script, TEXT,
                        **{**SMALL_OF[script], name: Written(value)})


# --- Text
@each_script
@pytest.mark.parametrize('text', [None, '', 'To be', 'x' * 160, b'caf\xe9 ' * 200],
                         ids=['missing', 'empty', 'short', 'one too short', 'not UTF-8'])
def test_an_input_txt_that_cannot_be_used_is_named_before_training(tmp_path, script, text):
    path = copy_script(tmp_path, script, text, **SMALL_OF[script])
    err = error_line(path)
    assert 'UTF-8 text of more than 160 characters' in err and str(tmp_path / 'input.txt') in err
    assert 'step 0' not in run_here(path)[0]


@each_script
@pytest.mark.parametrize('text', [
    161 * 'x', '\ufeff' + 60 * '子曰:學而時習之\r\n😀 café\r\n', 30 * 'if x:\n\treturn "<b>"\n'],
    ids=['one character, just long enough', 'Chinese, emoji, Windows line ends', 'source code'])
def test_any_other_text_trains_and_generates(tmp_path, script, text):
    out, err, status = run_here(copy_script(tmp_path, script, text, **SMALL_OF[script]))
    assert (err, status) == ('', 0)
    generated = out[-501:-1]
    assert set(generated) <= set(text) - {'\ufeff', '\r'}


# --- Hyperparameters
WHOLE = ['batch_size', 'block_size', 'max_iters', 'eval_interval', 'eval_iters', 'warmup_iters',
         'n_embd', 'n_head', 'n_layer']
NOT_WHOLE = [1.5, 1e4, float('nan'), float('inf'), '8', True, 10**9, 10**30]
NOT_NUMBERS = ['x', None, True, -0.1, float('nan'), float('inf'), 1001, 10**30]


@pytest.mark.parametrize('script, name', [
    *[(script, name) for script in SMALL_OF for name in WHOLE if name in SMALL_OF[script]],
    ('gpt.py', 'top_k')])
def test_a_size_or_a_number_of_steps_is_a_whole_number_above_0(tmp_path, script, name):
    for value in [0, -1, *NOT_WHOLE] + ([] if name == 'top_k' else [None]):
        message = message_for(tmp_path, script, name, value)
        assert f'{name} = {value!r}: use a whole number above 0' in message


@each_script
def test_a_seed_is_any_whole_number(tmp_path, script):
    for value in ['x', None, *NOT_WHOLE]:
        message = message_for(tmp_path, script, 'seed', value)
        assert f'seed = {value!r}: use a whole number' in message
    for value in (0, -1):
        import_script(tmp_path, script, **SMALL_OF[script], seed=value)


@pytest.mark.parametrize('script, name, values', [
    ('bigram.py', 'learning_rate', [*NOT_NUMBERS, 0]),
    ('gpt.py', 'learning_rate', [*NOT_NUMBERS, 0]),
    ('gpt.py', 'weight_decay', NOT_NUMBERS),
    ('gpt.py', 'dropout', [*NOT_NUMBERS, 1, 1.5]),
    ('gpt.py', 'temperature', [*NOT_NUMBERS, 1e-45])])
def test_a_number_has_a_type_and_a_range(tmp_path, script, name, values):
    for value in values:
        assert f'{name} = {value!r}: use a number' in message_for(tmp_path, script, name, value)


@pytest.mark.parametrize('script, name, values', [
    ('bigram.py', 'learning_rate', [1e-9, 1, 1000]), ('gpt.py', 'learning_rate', [1e-9, 1, 1000]),
    ('gpt.py', 'weight_decay', [0, 0.0, 1, 1000]), ('gpt.py', 'dropout', [0, 0.0, 0.6, 0.99]),
    ('gpt.py', 'temperature', [0.01, 1, 3, 100]), ('gpt.py', 'top_k', [1, 1000, None]),
    ('gpt.py', 'warmup_iters', [1, 1000]), ('bigram.py', 'eval_interval', [1, 1000])])
def test_the_ends_of_a_range_and_whole_numbers_are_accepted(tmp_path, script, name, values):
    for value in values:
        out, err, status = run_here(copy_script(tmp_path, script, **{
            **SMALL_OF[script], 'max_iters': 2, 'eval_iters': 1, name: value}))
        if name == 'learning_rate' and value == 1000:  # accepted, though it cannot end well
            assert 'step 0' in out
        else:
            assert (err, status) == ('', 0), value


def test_who_sets_the_temperature_to_0_is_told_of_top_k(tmp_path):
    assert 'top_k = 1' in message_for(tmp_path, 'gpt.py', 'temperature', 0)


def test_an_embedding_that_the_heads_do_not_divide(tmp_path):
    message = message_for(tmp_path, 'gpt.py', 'n_head', 3)
    assert 'n_embd = 16: use a multiple of n_head = 3' in message


@each_script
@pytest.mark.parametrize('device', ['gpu', 'CUDA', 0, 1.5, None, '', 'mps', 'cuda', 'cuda:99',
                                    'meta'])
def test_a_device_that_torch_cannot_use(tmp_path, script, device):
    try:
        torch.zeros(1, device=torch.device(device)).item()
        pytest.skip('this machine has the device that should be absent')
    except Exception:
        message = message_for(tmp_path, script, 'device', device)
    assert f'device = {device!r}: ' in message and "use 'cpu'" in message


def test_a_learning_rate_that_overflows_keeps_the_earlier_gpt_pt(tmp_path):
    script = copy_script(tmp_path, 'gpt.py', **{
        **SMALL, 'learning_rate': 1000, 'max_iters': 40, 'eval_interval': 40}, weight_decay=1000)
    assert 'the loss is not finite: lower learning_rate' in error_line(script)


# --- Files and prompts
def test_a_folder_that_cannot_be_written_to_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    script = copy_script(tmp_path, 'gpt.py', **SMALL)
    assert f'cannot write into {tmp_path}' in error_line(script)
    assert 'step 0' not in run_here(script)[0]


def test_a_gpt_pt_that_is_a_folder(tmp_path):
    script = copy_script(tmp_path, 'gpt.py', **SMALL)
    (tmp_path / 'gpt.pt').mkdir()
    for arguments, words in (([], 'cannot save'), (['--prompt', 'The'], 'cannot use')):
        out, err, status = run_here(script, *arguments)
        assert status == 1 and words in err and len(err.splitlines()) == 1


def test_a_prompt_that_is_empty_or_has_unknown_characters(tmp_path):
    import_script(tmp_path, 'gpt.py', **SMALL).save()
    script = tmp_path / 'gpt.py'
    assert 'empty' in error_line(script, '--prompt', '')
    err = error_line(script, '--prompt', 'The king é and 😀')
    assert "['é', '😀']" in err


def test_a_prompt_without_a_checkpoint(tmp_path):
    out, err, status = run_here(copy_script(tmp_path, 'gpt.py', **SMALL), '--prompt', 'The king')
    assert (out, status) == ('', 1) and len(err.splitlines()) == 1
    assert f'there is no {tmp_path / "gpt.pt"}' in err and 'python gpt.py' in err


@pytest.mark.parametrize('old, new, words', [
    ('self.ffwd = FeedForward(n_embd)\n',
     'self.ffwd = FeedForward(n_embd)\n        self.more = FeedForward(n_embd)\n', 'blocks.0.more'),
    ('self.ln_f = nn.LayerNorm(n_embd)', 'self.ln_f = nn.Identity()', 'ln_f'),
    ('nn.Linear(n_embd, 4 * n_embd)', 'nn.Linear(n_embd, 4 * n_embd, bias=False)', 'ffwd.fc.bias')])
def test_a_checkpoint_of_an_edited_model_says_what_did_not_fit(tmp_path, old, new, words):
    import_script(tmp_path, 'gpt.py', **SMALL).save()
    script = copy_script(tmp_path, 'gpt.py', TEXT, (old, new), **SMALL)
    assert words in error_line(script, '--prompt', 'The king')


class Trap:
    """What a hostile file could hold: an order that loading it would carry out."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('damage', ['truncated', 'text', 'empty', 'weights only', 'a list',
                                    'of an older version', 'of other shapes', 'hostile'])
def test_a_damaged_or_foreign_gpt_pt(tmp_path, damage):
    import_script(tmp_path, 'gpt.py', **SMALL).save()
    path = tmp_path / 'gpt.pt'
    saved = torch.load(path, weights_only=True)
    if damage == 'hostile':
        path.write_bytes(pickle.dumps(Trap(tmp_path / 'sprung'), protocol=2))
    elif damage in ('truncated', 'text', 'empty'):
        path.write_bytes({'truncated': path.read_bytes()[:5000], 'text': TEXT.encode(),
                          'empty': b''}[damage])
    else:
        torch.save({'weights only': saved['model'], 'a list': [1, 2],
                    'of an older version': {**saved, 'sizes': None, 'config': {}},
                    'of other shapes': {**saved, 'chars': saved['chars'][1:]}}[damage], path)
    err = error_line(tmp_path / 'gpt.py', '--prompt', 'The king')
    assert f'cannot use {path}' in err and 'train again' in err
    assert not (tmp_path / 'sprung').exists()


# --- Memory, pipes and terminals
def allocation_error():
    """The error of torch's CPU allocator, for more bytes than a processor can address."""
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        return str(error)


@each_script
@pytest.mark.parametrize('error', ['MemoryError()', 'torch.OutOfMemoryError("CUDA out of memory")',
                                   'RuntimeError(MESSAGE)'])
def test_too_little_memory_gets_one_line(tmp_path, script, error):
    error = error.replace('MESSAGE', repr(allocation_error()))
    path = copy_script(tmp_path, script, TEXT, ('loss.backward()', f'raise {error}'),
                       **SMALL_OF[script])
    assert 'out of memory: lower batch_size' in error_line(path)


@each_script
@pytest.mark.parametrize('line', ['loss.backwards()', 'preallocate()'])
def test_an_error_in_the_code_itself_still_gets_its_traceback(tmp_path, script, line):
    """A learner who breaks the script must see where."""
    path = copy_script(tmp_path, script, TEXT, ('loss.backward()', line), **SMALL_OF[script])
    _, err, status = run_here(path)
    assert status == 1 and 'Traceback' in err and line in err


@each_script
def test_a_terminal_that_knows_only_ascii_gets_question_marks(tmp_path, script):
    path = copy_script(tmp_path, script, 60 * '子 曰\n', **SMALL_OF[script])
    out, err, status = run_here(path, encoding='ascii')
    assert (err, status) == ('', 0) and '?' in out


@each_script
def test_an_output_that_is_no_file_as_in_idle(tmp_path, monkeypatch, script):
    """It cannot be reconfigured, and calls itself a terminal though it cannot rewrite a line."""
    window = io.StringIO()
    window.isatty = lambda: True
    path = copy_script(tmp_path, script, **SMALL_OF[script])
    monkeypatch.setattr(sys, 'stdout', window)
    monkeypatch.setattr(sys, 'argv', [script])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    runpy.run_path(str(path), run_name='__main__')
    assert 'step 20: train loss' in window.getvalue() and ' left' not in window.getvalue()


@posix_only
@each_script
def test_a_reader_that_closes_the_pipe_ends_the_script_in_silence(tmp_path, start, script):
    """As in python gpt.py | head -1"""
    process = start(copy_script(tmp_path, script, **{**SMALL_OF[script], 'max_iters': 100_000}))
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == '' and process.wait(timeout=60) == 130


def test_the_help_needs_no_input_txt(tmp_path):
    out, err, status = run_here(copy_script(tmp_path, 'gpt.py', None, **SMALL), '--help')
    assert (err, status) == ('', 0) and '--prompt' in out and '--checkpoint' in out
