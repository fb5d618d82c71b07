"""Mistakes: each gets one line that names it and says what to do, and costs nothing."""
import os
import pickle

import pytest
import torch

from conftest import PLAY, SMALL, fresh, load, put, run, start

GPT, BIGRAM = ('gpt.py', SMALL), ('bigram.py', {})
BOTH = [pytest.param(*GPT, id='gpt'), pytest.param(*BIGRAM, id='bigram')]
OLD = b'the model of an earlier run'


def complaint(folder, script, *arguments):
    """Runs a script that must refuse: the one line it says. An existing gpt.pt must survive."""
    if not (folder / 'gpt.pt').exists():
        (folder / 'gpt.pt').write_bytes(OLD)
    before = (folder / 'gpt.pt').read_bytes()
    out, err, status = run(script, *arguments)
    assert status == 1, out + err
    assert len(err.splitlines()) == 1 and err.startswith(script.name + ': '), err
    assert (folder / 'gpt.pt').read_bytes() == before
    return err


def last_words(folder, script, hyperparameters):
    """What a script ends with on import: Python prints one such line, and exits with status 1."""
    with pytest.raises(SystemExit) as end:
        load(folder, script, **hyperparameters)
    words = end.value.code
    assert len(words.splitlines()) == 1 and words.startswith(script + ': ')
    return words


@pytest.mark.parametrize('script, small', BOTH)
@pytest.mark.parametrize('text, words', [
    pytest.param(None, 'No such file', id='missing'),
    pytest.param('', 'empty', id='empty'),
    pytest.param('To be', 'too short', id='short'),
    pytest.param('x' * 160, '16 characters', id='short in the last tenth'),
    pytest.param(b'caf\xe9 ' * 200, 'UTF-8', id='not UTF-8'),
])
def test_an_input_txt_that_cannot_be_used(tmp_path, script, small, text, words):
    err = complaint(tmp_path, put(tmp_path, script, text, **{**small, 'block_size': 16}))
    assert 'input.txt' in err and words in err


@pytest.mark.parametrize('script, small', BOTH)
@pytest.mark.parametrize('name, value', [
    ('batch_size', 0), ('block_size', -1), ('max_iters', 0), ('eval_interval', 0),
    ('eval_iters', 1.5), ('learning_rate', 0), ('learning_rate', -1e-3)])
def test_a_hyperparameter_out_of_range(tmp_path, script, small, name, value):
    assert f'{name} = {value}: use' in last_words(tmp_path, script, {**small, name: value})


@pytest.mark.parametrize('name, value', [
    ('n_embd', 0), ('n_head', -2), ('n_layer', 0), ('warmup_iters', 0), ('top_k', 0),
    ('dropout', 1.5), ('dropout', -0.1), ('temperature', 0), ('temperature', -1.0)])
def test_a_hyperparameter_of_the_gpt_out_of_range(tmp_path, name, value):
    assert f'{name} = {value}: use' in last_words(tmp_path, 'gpt.py', {**SMALL, name: value})


def test_heads_that_do_not_divide_the_embedding(tmp_path):
    err = complaint(tmp_path, put(tmp_path, 'gpt.py', **{**SMALL, 'n_embd': 16, 'n_head': 3}))
    assert 'n_embd = 16' in err and 'n_head' in err


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has what the test must lack')
@pytest.mark.parametrize('script, small', BOTH)
def test_a_gpu_that_is_not_there(tmp_path, script, small):
    assert "device = 'cuda'" in last_words(tmp_path, script, {**small, 'device': 'cuda'})


def test_a_loss_that_leaves_the_numbers(tmp_path):
    """Weights that became NaN never come back: stop, and keep the last good ones."""
    script = put(tmp_path, 'gpt.py', **{**SMALL, 'learning_rate': 1e30, 'max_iters': 50})
    err = complaint(tmp_path, script)
    assert 'the loss' in err and 'lower learning_rate' in err


def test_a_folder_that_cannot_be_written_to_is_noticed_before_training(tmp_path):
    """Root may write anywhere; a folder in the half-written file's place stops root too."""
    script = put(tmp_path, 'gpt.py', **SMALL)
    (tmp_path / 'gpt.pt.tmp').mkdir()
    assert 'cannot write' in complaint(tmp_path, script)
    assert 'step 0' not in run(script)[0]
    (tmp_path / 'gpt.pt.tmp').rmdir()
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        assert 'cannot write' in complaint(tmp_path, script)
        tmp_path.chmod(0o700)


def trained(folder):
    """A folder with a gpt.pt, though an untrained one."""
    gpt = load(folder, 'gpt.py', **SMALL)
    gpt.save()
    gpt.unfinished.replace(gpt.kept)
    return folder / 'gpt.py'


def test_prompts_that_cannot_be_continued(tmp_path):
    script = trained(tmp_path)
    assert 'empty' in complaint(tmp_path, script, '--prompt', '')
    err = complaint(tmp_path, script, '--prompt', 'The king \u00e9 and \U0001f600')
    named = err.split('has')[1].split('which')[0]
    assert '\u00e9' in named and '\U0001f600' in named and 'k' not in named


def test_a_prompt_without_a_model(tmp_path):
    script = put(tmp_path, 'gpt.py', **SMALL)
    out, err, status = run(script, '--prompt', 'The king')
    assert status == 1 and len(err.splitlines()) == 1 and 'gpt.pt' in err and '--prompt' in err


def test_a_prompt_to_a_model_of_other_hyperparameters(tmp_path):
    """n_head changes the meaning of the weights but not their shapes: torch would not notice."""
    trained(tmp_path)
    for name, value in (('n_head', 4), ('n_layer', 1), ('block_size', 8)):
        script = put(tmp_path, 'gpt.py', **{**SMALL, name: value})
        err = complaint(tmp_path, script, '--prompt', 'The king')
        assert f'{name} = {SMALL[name]}' in err and str(value) in err
        assert sum(other in err for other in ('n_head', 'n_layer', 'n_embd', 'block_size')) == 1


class Trap:
    """What a hostile file could hold: an order that loading it would carry out."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('foreign', ['truncated', 'text', 'weights only', 'of other shapes',
                                     'hostile'])
def test_a_damaged_or_foreign_gpt_pt(tmp_path, foreign):
    script = trained(tmp_path)
    path = tmp_path / 'gpt.pt'
    saved = torch.load(path, weights_only=True)
    if foreign == 'truncated':
        path.write_bytes(path.read_bytes()[:5000])
    elif foreign == 'text':
        path.write_text(PLAY)
    elif foreign == 'weights only':
        torch.save(saved['model'], path)
    elif foreign == 'of other shapes':
        torch.save({**saved, 'chars': saved['chars'][1:]}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(tmp_path / 'sprung')))
    assert 'gpt.pt is damaged' in complaint(tmp_path, script, '--prompt', 'The king')
    assert not (tmp_path / 'sprung').exists()


@pytest.mark.parametrize('script, small', BOTH)
def test_text_of_any_kind_trains_and_generates(tmp_path, script, small):
    """Windows line ends, a byte-order mark, Chinese, emoji: all of it is characters."""
    line = '\u5b50\u66f0\uff1a\u5b78\u800c\u6642\u7fd2\u4e4b\r\n\U0001f600 caf\u00e9\r\n'
    small = {**small, 'max_iters': 20, 'block_size': 16}
    path = put(tmp_path, script, '\ufeff' + 60 * line, **small)
    other = put(fresh(tmp_path), script, '\ufeff' + 60 * line, **small)
    ascii_only = start(other, env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    out, err, status = run(path)
    assert (err, status) == ('', 0) and '\u5b50' in out and '\ufeff' not in out
    out, err = ascii_only.communicate(timeout=60)
    assert (err, ascii_only.returncode) == ('', 0) and '?' in out


def test_a_text_of_one_single_character(tmp_path):
    out, err, status = run(put(tmp_path, 'gpt.py', 'a' * 400, **SMALL))
    assert (err, status) == ('', 0) and out.endswith('a' * 501 + '\n')
