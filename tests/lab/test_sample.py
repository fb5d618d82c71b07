"""sample.py and load_checkpoint: a saved model goes on to be useful, whatever changed beside it."""
import re
import runpy
import sys

import pytest
import torch

import sample
from conftest import SMALL, TEXT, copy_script, exit_message, random_model, run_here, save
from scripts import edited, load_checkpoint
from solutions import EXERCISES


@pytest.fixture
def here(tmp_path):
    """A folder with a small gpt.py."""
    copy_script(tmp_path, 'gpt.py', **SMALL)
    return tmp_path


@pytest.fixture
def text_of(here, capsys):
    """What sample.py prints with these arguments, without the last newline."""
    def text_of(*arguments):
        capsys.readouterr()
        sample.main(list(map(str, arguments)), here)
        return capsys.readouterr().out[:-1]
    return text_of


def saved(*arguments, **hyperparameters):
    """A random model, which is saved, and the path of the file."""
    gpt = random_model(*arguments, **hyperparameters)
    return gpt, save(gpt)


def assert_same_model(gpt, path):
    """The one in this file: the same tokens and the same logits, in evaluation mode."""
    other = load_checkpoint(path)
    assert other.model is other.m and other.device == 'cpu'
    assert not any(module.training for module in other.model.modules())
    assert other.chars == gpt.chars and other.vocab_size == gpt.vocab_size
    some_text = gpt.text[:gpt.block_size]
    ids = gpt.encode(some_text)
    assert other.encode(some_text) == ids and other.decode(ids) == some_text
    idx = torch.tensor([ids])
    assert torch.equal(other.model(idx)[0], gpt.model(idx)[0])


# --- Which model it is
def test_without_chance_it_writes_what_gpt_py_wrote(here, text_of):
    out, _, _ = run_here(copy_script(here, 'gpt.py', **{**SMALL, 'top_k': 1}))
    assert text_of() + '\n' == out.partition('weights generate:\n')[2]


@pytest.mark.parametrize('text', [''.join(map(chr, range(65, 105))) * 5, 'x' * 171])
def test_the_file_decides_the_sizes_and_the_vocabulary(here, text_of, text):
    """Here of 40 characters, 4 * 40 = 10 * block_size, and of one."""
    gpt, path = saved(here / 'other', text, block_size=16, n_embd=24, n_head=3, n_layer=1)
    moved = path.rename(here / 'moved.pt')
    assert_same_model(gpt, moved)
    assert len(text_of('--checkpoint', moved)) == 501


def test_the_code_is_that_of_the_gpt_py_beside_the_file(here):
    gpt, path = saved(here / 'other', TEXT, ('F.relu(out)', 'F.gelu(out)'), device='cpu')
    assert_same_model(gpt, path)
    copy_script(here / 'other', 'gpt.py', TEXT, ('F.relu(out)', 'F.gelu(out)'), device='meta')
    assert_same_model(gpt, path)  # always on the CPU


@pytest.mark.parametrize('text', ['Other letters: éèê. ' * 20, '', b'\xff' * 200, None])
def test_input_txt_does_not_matter(here, text_of, text):
    gpt, path = saved(here)
    (here / 'input.txt').unlink()
    copy_script(here, 'gpt.py', text, **SMALL)
    assert_same_model(gpt, path)
    assert text_of('The king').startswith('The king')


def test_a_file_without_a_gpt_py_beside_it_opens_with_the_code_of_the_project(here):
    gpt, path = saved(here)
    (here / 'alone').mkdir()
    assert_same_model(gpt, path.rename(here / 'alone' / path.name))


def in_the_older_format(saved):
    """What a gpt.pt holds: sizes by position, and queries, keys and values in one matrix."""
    weights = dict(saved['model'])
    for name in [name for name in weights if name.endswith('.query.weight')]:
        weights[name.replace('query', 'qkv')] = torch.cat(
            [weights.pop(name.replace('query', part)) for part in ('query', 'key', 'value')])
    settings = saved['settings']
    return {'model': weights, 'chars': saved['chars'], 'sizes': tuple(
        settings[name] for name in ('block_size', 'n_embd', 'n_head', 'n_layer'))}


def test_a_gpt_pt_of_the_older_format_opens(here):
    gpt, path = saved(here / 'other', block_size=15, n_embd=24, n_head=3, n_layer=1)
    older = in_the_older_format(torch.load(path))
    torch.save(older, here / 'gpt.pt')
    assert_same_model(gpt, here / 'gpt.pt')
    # And with the gpt.py of that time beside it.
    edits = [('self.key = nn', 'self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)\n        # '),
             ('        self.query = ', '        # '), ('        self.value = ', '        # '),
             ('self.query(x), self.key(x), self.value(x)', 'self.qkv(x).chunk(3, dim=-1)')]
    copy_script(here, 'gpt.py', TEXT, *edits, **SMALL)
    assert_same_model(gpt, here / 'gpt.pt')


def test_a_hyperparameter_more_or_less_closes_no_file(here):
    gpt, path = saved(here, block_size=15, n_embd=24, n_head=3, n_layer=1)
    source = (here / 'gpt.py').read_text(encoding='utf-8')
    for old, new in [('warmup_iters', 'rising'), ('n_layer = ', 'grad_clip = 1.0\nn_layer = ')]:
        source = source.replace(old, new)
    (here / 'gpt.py').write_text(source, encoding='utf-8')
    assert_same_model(gpt, path)
    # Without a size, too: the script that has this one no longer knows it by itself.
    source = re.sub(r'(?m)^n_layer = .*\n', '', source).replace('range(n_layer)', 'range(1)')
    (here / 'gpt.py').write_text(source, encoding='utf-8')
    assert_same_model(gpt, path)


def test_values_are_set_below_the_last_hyperparameter_and_only_those_that_there_are():
    source = ('n_layer = 3\nn_layer, n_head = 6, 4\n\n# --- Text and tokenizer\n'
              'sizes = n_layer, n_head')
    names = {}
    exec(edited(source, n_layer=2), names)
    assert names['sizes'] == (2, 4)
    with pytest.raises(ValueError, match='no hyperparameter n_layers'):
        edited(source, n_layers=2)


def test_the_settings_are_those_of_the_run_but_for_the_seed(here):
    """So that an edited seed gives another text."""
    _, path = saved(here, batch_size=3, seed=5)
    copy_script(here, 'gpt.py', **{**SMALL, 'seed': 6})
    gpt = load_checkpoint(path)
    assert (gpt.batch_size, gpt.seed) == (3, 6)


def test_a_size_that_is_set_again_below_is_an_error_and_not_another_model(here):
    _, path = saved(here)
    copy_script(here, 'gpt.py', TEXT, ('\n# --- Model', '\nn_head = 4\n# --- Model'), **SMALL)
    assert 'n_head is set again' in exit_message(load_checkpoint, path)


def test_without_a_checkpoint_it_is_the_newest_run_in_the_folder_which_it_names(here, capsys):
    """By its name: what was copied or saved last does not matter, nor do other files."""
    gpt, path = saved(here)
    new, old = here / 'gpt-2031-01-02-030405-000001.pt', here / 'gpt-2031-01-02-030405-000000.pt'
    path.rename(new)
    torch.save(in_the_older_format(torch.load(new)), here / 'gpt.pt')
    for number, other in enumerate([old, here / 'gpt-mine.pt', here / f'{new.stem[:-1]}2.pt.new']):
        torch.save({'of another model': number}, other)
    (here / 'gpt-2032-01-02-030405-000000.pt').mkdir()
    for file in (new, here / 'gpt.pt'):  # the second one when all others are gone
        capsys.readouterr()
        assert_same_model(gpt, here)
        assert capsys.readouterr().err == f'The newest run: {file}\n'
        for arguments, words in (([], f'The newest run: {file}\n'), (['--checkpoint', file], '')):
            sample.main(['--length', '5', *map(str, arguments)], here)
            assert capsys.readouterr().err == words
        new.unlink(missing_ok=True)
        old.unlink(missing_ok=True)


@pytest.mark.parametrize('block_size', [16, 67])  # with 67, the text takes all its characters
def test_an_edited_tokenizer_may_have_tokens_of_two_characters(here, text_of, block_size):
    gpt, path = saved(here, TEXT, *EXERCISES[12].variants['300 pairs'].edits,
                      block_size=block_size)
    assert max(map(len, gpt.chars)) == 2
    assert_same_model(gpt, path)
    assert text_of('The king').startswith('The king')


def test_a_checkpoint_from_a_gpu_opens_without_one(gpt, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
        path = save(gpt)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError):  # the file does say that it is from a GPU
            torch.load(path, weights_only=True)
    assert_same_model(gpt, path)


# --- Prompts and options
@pytest.mark.parametrize('prompt', ['  The king  ', 'x', 'One that is longer than the context '])
def test_a_prompt_comes_back_whole(here, text_of, prompt):
    saved(here, prompt + TEXT)
    text = text_of(prompt)
    assert text.startswith(prompt) and len(text) == len(prompt) + 500


@pytest.mark.parametrize('options', [
    {}, {'temperature': 2.0}, {'temperature': 0.001}, {'top_k': 1}, {'top_k': 5}, {'seed': 0},
    {'temperature': 0.5, 'top_k': 7, 'seed': 2}])
def test_an_option_counts_instead_of_the_value_in_gpt_py(here, text_of, options):
    gpt, _ = saved(here, temperature=1.1, top_k=20, seed=5)
    vars(gpt).update(options)
    torch.manual_seed(gpt.seed)
    expected = gpt.decode(gpt.model.generate(torch.tensor([gpt.encode('The ')]), 30)[0].tolist())
    arguments = [part for name, value in options.items()
                 for part in (f'--{name.replace("_", "-")}', value)]
    assert text_of('The ', '--length', 30, *arguments) == expected


def test_python_i_goes_on_with_the_names_of_the_script(here, monkeypatch, capsys):
    _, path = saved(here)
    monkeypatch.setattr(sys, 'argv', ['sample.py', '--length', '5', '--checkpoint', str(path)])
    names = runpy.run_path(sample.__file__, run_name='__main__')
    assert names['decode'](names['encode']('The king')) == 'The king'
    assert names['model'].generate(torch.tensor([[0]]), 5).shape == (1, 6)


# --- Mistakes
@pytest.mark.parametrize('arguments, words', [
    ([''], 'the text is empty'), (['The é and 😀'], "does not know ['é', '😀']"),
    (['--checkpoint', 'nowhere.pt'], 'no saved model in nowhere.pt: train with python gpt.py')])
def test_a_mistake_gets_one_line(here, arguments, words):
    saved(here)
    assert words in exit_message(sample.main, arguments, here)


@pytest.mark.parametrize('arguments', [
    ['--temperature', '0'], ['--temperature', 'nan'], ['--top-k', '0'], ['--promt']])
def test_a_wrong_option_is_named(here, arguments, capsys):
    with pytest.raises(SystemExit, match='2'):
        sample.main(arguments, here)
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize('old, new, words', [
    ('self.ffwd = FeedForward(n_embd)\n',
     'self.ffwd = FeedForward(n_embd)\n        self.more = FeedForward(n_embd)\n', 'blocks.0.more'),
    ('self.ln_f = nn.LayerNorm(n_embd)', 'self.ln_f = nn.Identity()', 'ln_f'),
    ('import math\n', 'import maths\n', 'maths')])
def test_a_checkpoint_that_does_not_fit_the_code_says_why(here, old, new, words):
    _, path = saved(here)
    copy_script(here, 'gpt.py', TEXT, (old, new), **SMALL)
    message = exit_message(load_checkpoint, path)
    assert words in message and 'undo your edits, or train again' in message


DAMAGED = {
    'truncated': lambda file, saved: file[:5000],
    'text': lambda file, saved: TEXT.encode(),
    'weights only': lambda file, saved: saved['model'],
    'of too many sizes': lambda file, saved: {**saved, 'sizes': (16, 16, 2, 2, 1)},
    'of other shapes': lambda file, saved: {**saved, 'chars': saved['chars'][1:]},
    'without a vocabulary': lambda file, saved: {**saved, 'chars': []},
}


@pytest.mark.parametrize('damage', DAMAGED)
def test_a_damaged_or_foreign_file_is_refused(here, damage):
    _, path = saved(here)
    damaged = DAMAGED[damage](path.read_bytes(), torch.load(path, weights_only=True))
    if isinstance(damaged, bytes):
        path.write_bytes(damaged)
    else:
        torch.save(damaged, path)
    assert f'cannot use {path}' in exit_message(load_checkpoint, path)
