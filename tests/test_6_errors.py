"""Errors: whatever cannot work gets one line that names it and says what to do, no traceback."""
import os
import pickle
import subprocess
import sys

import pytest
import torch

from conftest import (SMALL, SMALL_BIGRAM, SMALL_OF, TEXT, copy_script, import_script, new_folder,
                      posix_only, randomize_, run_here, start)

EARLIER = b'an earlier model'
each_script = pytest.mark.parametrize('script', ['bigram.py', 'gpt.py'])


def error_line(script, *arguments):
    """Runs a script that must refuse: the one line it says. An existing gpt.pt must survive."""
    path = script.with_name('gpt.pt')
    if not path.exists():
        path.write_bytes(EARLIER)
    before = path.read_bytes()
    out, err, status = run_here(script, *arguments)
    assert status == 1, out + err
    assert len(err.splitlines()) == 1 and err.startswith(script.name + ': '), err
    assert path.read_bytes() == before
    return err


def exit_message(folder, script, **hyperparameters):
    """What a script ends with on import: Python prints it as one line, and exits with status 1."""
    with pytest.raises(SystemExit) as end:
        import_script(folder, script, **{**SMALL_OF[script], **hyperparameters})
    message = end.value.code
    assert len(message.splitlines()) == 1 and message.startswith(script + ': ')
    return message


def with_checkpoint(folder, **hyperparameters):
    """A gpt.py with a gpt.pt beside it, though an untrained one."""
    import_script(folder, 'gpt.py', **{**SMALL, **hyperparameters}).save()
    return folder / 'gpt.py'


@each_script
@pytest.mark.parametrize('text, words', [
    pytest.param(None, 'No such file', id='missing'),
    pytest.param('', 'too short', id='empty'),
    pytest.param('To be', 'too short', id='short'),
    pytest.param('x' * 160, 'has 16 characters', id='short in the last tenth'),
    pytest.param(b'caf\xe9 ' * 200, 'UTF-8', id='not UTF-8'),
])
def test_an_input_txt_that_cannot_be_used_is_named_before_training(tmp_path, script, text, words):
    path = copy_script(tmp_path, script, text, **SMALL_OF[script])
    err = error_line(path)
    assert 'input.txt' in err and words in err and 'step 0' not in run_here(path)[0]


class Written:
    """A value with a repr that Python can read, which nan and inf lack."""

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return f"float('{self.value}')" if type(self.value) is float else repr(self.value)


@pytest.mark.parametrize('script, name', [
    *[('bigram.py', name) for name in SMALL_BIGRAM if name != 'device'],
    *[('gpt.py', name) for name in SMALL if name != 'device'], ('gpt.py', 'top_k')])
def test_a_size_or_a_number_of_steps_is_a_whole_number_above_0(tmp_path, script, name):
    values = [0, -1, 1.5, 1e4, float('nan'), float('inf'), '8', True, 10**9, 10**30]
    for value in values if name == 'top_k' else [*values, None]:  # top_k = None has a meaning
        message = exit_message(tmp_path, script, **{name: Written(value)})
        assert f'{name} = {value!r}: use a whole number above 0' in message and '10_000' in message


@each_script
@pytest.mark.parametrize('value', ['x', None, 1.5, True, 2**70, 10**9])
def test_a_seed_is_a_whole_number(tmp_path, script, value):
    assert f'seed = {value!r}: use a whole number' in exit_message(tmp_path, script, seed=value)


@each_script
def test_a_seed_may_be_0_or_negative(tmp_path, script):
    for seed in (0, -1):
        import_script(tmp_path, script, **SMALL_OF[script], seed=seed)


NOT_NUMBERS = ['x', None, True, -0.1, float('nan'), float('inf'), 1e38, 10**30]


@pytest.mark.parametrize('script, name, values', [
    ('bigram.py', 'learning_rate', [*NOT_NUMBERS, 0]),
    ('gpt.py', 'learning_rate', [*NOT_NUMBERS, 0]),
    ('gpt.py', 'weight_decay', NOT_NUMBERS),
    ('gpt.py', 'dropout', [*NOT_NUMBERS, 1, 1.5]),
    ('gpt.py', 'temperature', [*NOT_NUMBERS, 0, 1e-45])])
def test_a_number_of_a_wrong_type_or_out_of_range(tmp_path, script, name, values):
    for value in values:
        message = exit_message(tmp_path, script, **{name: Written(value)})
        assert f'{name} = {value!r}: use a number' in message


def test_an_embedding_that_the_heads_do_not_divide(tmp_path):
    message = exit_message(tmp_path, 'gpt.py', n_embd=16, n_head=3)
    assert 'n_embd = 16' in message and 'multiple of n_head = 3' in message


def is_absent(device):
    """Whether torch has no such device here. A test of an absent GPU needs this."""
    try:
        torch.zeros(1, device=device).item()
    except Exception:
        return True
    return False


@each_script
@pytest.mark.parametrize('device', ['gpu', 'CUDA', 0, 1.5, None, '', 'mps', 'cuda', 'cuda:1',
                                    'meta'])
def test_a_device_that_torch_cannot_use(tmp_path, script, device):
    if device in (0, 'mps', 'cuda', 'cuda:1') and not is_absent(device):
        pytest.skip('this machine has the device that should be absent')
    message = exit_message(tmp_path, script, device=device)
    assert f'device = {device!r}: ' in message and "use 'cpu'" in message


@each_script
def test_a_loss_that_is_not_a_number_ends_training(tmp_path, script):
    module = import_script(tmp_path, script, **SMALL_OF[script])
    (tmp_path / 'gpt.pt').write_bytes(EARLIER)
    with torch.no_grad():
        next(module.model.parameters()).fill_(float('nan'))
    with pytest.raises(SystemExit) as end:
        module.train()
    assert end.value.code == f'{script}: the loss is not a number: lower learning_rate'
    assert (tmp_path / 'gpt.pt').read_bytes() == EARLIER


def test_a_learning_rate_that_overflows_in_training_keeps_the_earlier_gpt_pt(tmp_path):
    script = copy_script(tmp_path, 'gpt.py', **{
        **SMALL, 'learning_rate': 1e6, 'max_iters': 40, 'eval_interval': 40}, weight_decay=1e6)
    assert 'the loss is not a number: lower learning_rate' in error_line(script)


def test_a_gpt_pt_that_is_a_folder_is_found_before_training(tmp_path):
    script = copy_script(tmp_path, 'gpt.py', **SMALL)
    (tmp_path / 'gpt.pt').mkdir()
    out, err, status = run_here(script)
    assert (out, status) == ('', 1) and err == 'gpt.py: gpt.pt is a folder: move it away\n'


def test_a_folder_that_cannot_be_written_to_is_found_before_training(tmp_path):
    """Root may write anywhere; a folder in the place of the temporary file stops root too."""
    script = copy_script(tmp_path, 'gpt.py', **SMALL)
    (tmp_path / 'gpt.pt.tmp').mkdir()
    assert 'cannot write' in error_line(script)
    assert 'step 0' not in run_here(script)[0]


@posix_only
def test_a_read_only_folder_is_found_before_training(tmp_path):
    if os.geteuid() == 0:
        pytest.skip('root may write anywhere')
    script = copy_script(tmp_path, 'gpt.py', **SMALL)
    tmp_path.chmod(0o500)
    try:
        out, err, status = run_here(script)
    finally:
        tmp_path.chmod(0o700)
    assert (out, status) == ('', 1) and 'cannot write' in err and len(err.splitlines()) == 1


def test_a_prompt_that_is_empty_or_has_unknown_characters(tmp_path):
    script = with_checkpoint(tmp_path)
    assert 'empty' in error_line(script, '--prompt', '')
    err = error_line(script, '--prompt', 'The king \u00e9 and \U0001f600')
    named = err.split('leave out')[1]
    assert '\u00e9' in named and '\U0001f600' in named and 'k' not in named


def test_a_prompt_without_a_checkpoint(tmp_path):
    out, err, status = run_here(copy_script(tmp_path, 'gpt.py', **SMALL), '--prompt', 'The king')
    assert (out, status) == ('', 1) and len(err.splitlines()) == 1
    assert 'gpt.pt' in err and 'without --prompt' in err


@pytest.mark.parametrize('name, value', [
    ('n_head', 4), ('n_layer', 1), ('block_size', 8), ('n_embd', 32)])
def test_a_checkpoint_of_other_sizes_says_which(tmp_path, name, value):
    """n_head changes the meaning of the weights but not their shapes: torch would not notice."""
    with_checkpoint(tmp_path)
    script = copy_script(tmp_path, 'gpt.py', **{**SMALL, name: value})
    err = error_line(script, '--prompt', 'The king')
    assert f"'{name}': {SMALL[name]}" in err and 'train again' in err


@pytest.mark.parametrize('old, new, words', [
    ('self.ffwd = FeedForward(n_embd)\n',
     'self.ffwd = FeedForward(n_embd)\n        self.more = FeedForward(n_embd)\n', 'blocks.0.more'),
    ('self.ln_f = nn.LayerNorm(n_embd)', 'self.ln_f = nn.Identity()', 'ln_f'),
    ('nn.Linear(n_embd, 4 * n_embd)', 'nn.Linear(n_embd, 4 * n_embd, bias=False)', 'ffwd.0.bias'),
])
def test_a_checkpoint_of_an_edited_model_says_what_did_not_fit(tmp_path, old, new, words):
    script = with_checkpoint(tmp_path)
    source = script.read_text(encoding='utf-8')
    assert source.count(old) == 1
    script.write_text(source.replace(old, new), 'utf-8')
    assert words in error_line(script, '--prompt', 'The king')


class Trap:
    """What a hostile file could hold: an order that loading it would carry out."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('damage', ['truncated', 'text', 'empty', 'weights only', 'a list',
                                    'of other shapes', 'hostile'])
def test_a_damaged_or_foreign_gpt_pt(tmp_path, damage):
    script = with_checkpoint(tmp_path)
    path = tmp_path / 'gpt.pt'
    saved = torch.load(path, weights_only=True)
    if damage == 'truncated':
        path.write_bytes(path.read_bytes()[:5000])
    elif damage in ('text', 'empty'):
        path.write_text(TEXT if damage == 'text' else '', 'utf-8')
    elif damage in ('weights only', 'a list'):
        torch.save(saved['model'] if damage == 'weights only' else [1, 2], path)
    elif damage == 'of other shapes':
        torch.save({**saved, 'chars': saved['chars'][1:]}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(tmp_path / 'sprung'), protocol=2))
    err = error_line(script, '--prompt', 'The king')
    assert 'cannot use gpt.pt' in err and 'without --prompt' in err
    assert not (tmp_path / 'sprung').exists()


def test_a_checkpoint_of_unusual_weights_is_loaded_as_it_is(tmp_path):
    """The counterpart of the tests above: not everything is refused."""
    gpt = import_script(tmp_path, 'gpt.py', **SMALL)
    randomize_(gpt.model)
    gpt.save()
    model, chars = gpt.load()
    assert chars == gpt.chars
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), gpt.model.parameters()))


@each_script
def test_text_of_any_kind_trains_and_generates(tmp_path, script):
    """Windows line ends, a byte-order mark, Chinese, emoji: all of it is characters."""
    line = '\u5b50\u66f0\uff1a\u5b78\u800c\u6642\u7fd2\u4e4b\r\n\U0001f600 caf\u00e9\r\n'
    out, err, status = run_here(copy_script(tmp_path, script, '\ufeff' + 60 * line,
                                            **SMALL_OF[script]))
    assert (err, status) == ('', 0)
    assert '\u5b50' in out and '\ufeff' not in out and '\r' not in out


@each_script
def test_a_text_of_one_single_character_trains_and_generates(tmp_path, script):
    out, err, status = run_here(copy_script(tmp_path, script, 'a' * 400, **SMALL_OF[script]))
    assert (err, status) == ('', 0) and out.endswith('a' * 501 + '\n')


@each_script
def test_an_output_that_is_no_file_as_in_idle_or_a_notebook(tmp_path, script):
    """It cannot be reconfigured, and calls itself a terminal though it cannot rewrite a line."""
    copy = copy_script(tmp_path, script, **SMALL_OF[script])
    code = f'''
import io, runpy, sys
class Window(io.StringIO):
    def isatty(self):
        return True
real, sys.stdout, sys.argv = sys.stdout, Window(), [{str(copy)!r}]
runpy.run_path({str(copy)!r}, run_name='__main__')
real.write(sys.stdout.getvalue())
'''
    (tmp_path / 'window.py').write_text(code, 'utf-8')
    out, err, status = run_here(tmp_path / 'window.py')
    assert (err, status) == ('', 0)
    assert 'step 20: train loss' in out and ' of 20,' not in out and '\r' not in out


def run_side_by_side(commands):
    """(script, arguments, options) for each: standard output, standard error, exit status."""
    processes = [start(script, *arguments, **options) for script, arguments, options in commands]
    return [(*process.communicate(timeout=120), process.returncode) for process in processes]


def test_a_terminal_that_knows_only_ascii_gets_question_marks(tmp_path):
    ascii_only = {'env': {**os.environ, 'PYTHONIOENCODING': 'ascii'}}
    commands = [(copy_script(new_folder(tmp_path), script, 60 * '\u5b50 \u66f0\n', **small), [],
                 ascii_only) for script, small in SMALL_OF.items()]
    for out, err, status in run_side_by_side(commands):
        assert (err, status) == ('', 0) and '?' in out


def test_numpy_is_not_needed(tmp_path):
    commands = []
    for script, small in SMALL_OF.items():
        copy = copy_script(new_folder(tmp_path), script, **small)
        (copy.parent / 'numpy.py').write_text(
            "raise ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')", 'utf-8')
        commands.append((copy, [], {}))
    for out, err, status in run_side_by_side(commands):
        assert status == 0 and 'step 20' in out and 'Traceback' not in err


def test_sizes_that_do_not_fit_in_memory(tmp_path):
    """Terabytes, which no machine gives, so that nothing is filled before the refusal."""
    long = 'ab' * 1_000_000
    huge = dict(batch_size=5_000_000, block_size=100_000)  # 4 TB of positions
    commands = [(copy_script(new_folder(tmp_path), script, text, **{**small, **sizes}), [], {})
                for script, small, text, sizes in [
                    ('bigram.py', SMALL_BIGRAM, long, huge), ('gpt.py', SMALL, long, huge),
                    ('gpt.py', SMALL, 'ab' * 1000, dict(n_embd=10**6))]]  # 12 TB of weights
    for (script, *_), (out, err, status) in zip(commands, run_side_by_side(commands)):
        assert status == 1 and err.startswith(f'{script.name}: out of memory: lower batch_size')
        assert len(err.splitlines()) == 1


@each_script
def test_an_error_in_the_code_itself_still_gets_its_traceback(tmp_path, script):
    """A learner who breaks the script must see where."""
    copy = copy_script(tmp_path, script, **SMALL_OF[script])
    source = copy.read_text(encoding='utf-8')
    copy.write_text(source.replace('loss.backward()', 'loss.backwards()'), 'utf-8')
    _, err, status = run_here(copy)
    assert status == 1 and 'Traceback' in err and 'backwards' in err


@posix_only
def test_a_reader_that_closes_the_pipe_ends_the_script_in_silence(tmp_path):
    """As in python gpt.py | head -1"""
    processes = []
    for script, small in SMALL_OF.items():
        copy = copy_script(new_folder(tmp_path), script, **{**small, 'max_iters': 1000})
        processes.append(start(copy))
    for process in processes:
        assert process.stdout.readline()
        process.stdout.close()
    for process in processes:
        assert process.stderr.read() == '' and process.wait(timeout=60) == 130
        process.stderr.close()


def test_a_closed_pipe_ends_the_help_in_silence(tmp_path):
    copy = copy_script(tmp_path, 'gpt.py', **SMALL)
    process = subprocess.Popen([sys.executable, str(copy), '--help'], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, encoding='utf-8')
    process.stdout.close()
    assert process.stderr.read() == ''
    process.wait(timeout=60)
    process.stderr.close()
