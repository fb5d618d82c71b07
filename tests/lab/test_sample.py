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
def text_of(tmp_path, capsys):
    """What sample.py prints with these arguments, without the last newline."""
    def text_of(*arguments):
        capsys.readouterr()
        sample.main(list(map(str, arguments)), tmp_path)
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
def test_without_chance_it_writes_what_gpt_py_wrote(tmp_path, text_of):
    out, _, _ = run_here(copy_script(tmp_path, 'gpt.py', **{**SMALL, 'top_k': 1}))
    assert text_of() + '\n' == out.partition('weights generate:\n')[2]


@pytest.mark.parametrize('text', [''.join(map(chr, range(65, 105))) * 5, 'x' * 171])
def test_the_file_decides_the_vocabulary_and_the_settings_but_for_the_seed(tmp_path, text_of, text):
    """Here of 40 characters, 4 * 40 = 10 * block_size, and of one. An edited seed counts, so that
    it gives another text.
    """
    gpt, path = saved(tmp_path, text, batch_size=3, n_embd=24, n_head=3, n_layer=1)
    copy_script(tmp_path, 'gpt.py', **{**SMALL, 'seed': 6})
    assert_same_model(gpt, path)
    loaded = load_checkpoint(path)
    assert (loaded.batch_size, loaded.seed) == (3, 6)
    assert len(text_of('--checkpoint', path)) == 501


def test_the_code_is_that_of_the_gpt_py_beside_the_file_and_runs_on_the_cpu(tmp_path):
    edit = ('F.relu(out)', 'F.gelu(out)')
    gpt, path = saved(tmp_path, TEXT, edit)
    copy_script(tmp_path, 'gpt.py', TEXT, edit, device='meta')
    assert_same_model(gpt, path)


@pytest.mark.parametrize('text', ['Another text: éèê. ' * 20, b'\xff' * 200, None])
def test_input_txt_does_not_matter(tmp_path, text):
    gpt, path = saved(tmp_path)
    (tmp_path / 'input.txt').unlink()
    copy_script(tmp_path, 'gpt.py', text, **SMALL)
    assert_same_model(gpt, path)


def test_a_file_without_a_gpt_py_beside_it_opens_with_the_code_of_the_project(tmp_path):
    gpt, path = saved(tmp_path)
    (tmp_path / 'alone').mkdir()
    assert_same_model(gpt, path.rename(tmp_path / 'alone' / path.name))


def in_the_older_format(saved):
    """What a gpt.pt holds: sizes by position, and queries, keys and values in one matrix."""
    weights = dict(saved['model'])
    for name in [name for name in weights if name.endswith('.query.weight')]:
        weights[name.replace('query', 'qkv')] = torch.cat(
            [weights.pop(name.replace('query', part)) for part in ('query', 'key', 'value')])
    settings = saved['settings']
    return {'model': weights, 'chars': saved['chars'], 'sizes': tuple(
        settings[name] for name in ('block_size', 'n_embd', 'n_head', 'n_layer'))}


def test_a_gpt_pt_of_the_older_format_opens(tmp_path):
    gpt, path = saved(tmp_path, block_size=15, n_embd=24, n_head=3, n_layer=1)
    torch.save(in_the_older_format(torch.load(path)), tmp_path / 'gpt.pt')
    assert_same_model(gpt, tmp_path / 'gpt.pt')
    # And with the gpt.py of that time beside it.
    edits = [('self.key = nn', 'self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)\n        # '),
             ('        self.query = ', '        # '), ('        self.value = ', '        # '),
             ('self.query(x), self.key(x), self.value(x)', 'self.qkv(x).chunk(3, dim=-1)')]
    copy_script(tmp_path, 'gpt.py', TEXT, *edits, **SMALL)
    assert_same_model(gpt, tmp_path / 'gpt.pt')


def test_a_hyperparameter_more_or_less_closes_no_file(tmp_path):
    gpt, path = saved(tmp_path, block_size=15, n_embd=24, n_head=3, n_layer=1)
    source = (tmp_path / 'gpt.py').read_text(encoding='utf-8')
    for old, new in [('warmup_iters', 'rising'), ('n_layer = ', 'grad_clip = 1.0\nn_layer = ')]:
        source = source.replace(old, new)
    (tmp_path / 'gpt.py').write_text(source, encoding='utf-8')
    assert_same_model(gpt, path)
    # Without a size, too: the script that has this one no longer knows it by itself.
    source = re.sub(r'(?m)^n_layer = .*\n', '', source).replace('range(n_layer)', 'range(1)')
    (tmp_path / 'gpt.py').write_text(source, encoding='utf-8')
    assert_same_model(gpt, path)


def test_values_are_set_below_the_last_hyperparameter_and_only_those_that_there_are():
    source = ('n_layer = 3\nn_layer, n_head = 6, 4\n\n# --- Text and tokenizer\n'
              'sizes = n_layer, n_head')
    names = {}
    exec(edited(source, n_layer=2), names)
    assert names['sizes'] == (2, 4)
    with pytest.raises(ValueError, match='no hyperparameter n_layers'):
        edited(source, n_layers=2)


def test_a_size_that_is_set_again_below_is_an_error_and_not_another_model(tmp_path):
    _, path = saved(tmp_path)
    copy_script(tmp_path, 'gpt.py', TEXT, ('\n# --- Model', '\nn_head = 4\n# --- Model'), **SMALL)
    assert 'n_head is set again' in exit_message(load_checkpoint, path)


def test_without_a_checkpoint_it_is_the_newest_run_in_the_folder_which_it_names(tmp_path, capsys):
    """By its name: what was copied or saved last does not matter, nor do other files."""
    older, older_path = saved(tmp_path, n_layer=1)
    torch.save(in_the_older_format(torch.load(older_path)), tmp_path / 'gpt.pt')
    gpt, path = saved(tmp_path)
    older_path.rename(tmp_path / 'gpt-mine.pt')
    new = path.rename(tmp_path / 'gpt-2031-01-02-030405-000001.pt')
    old = tmp_path / 'gpt-2031-01-02-030405-000000.pt'
    for name in (old.name, 'gpt-2031-01-02-030405-000002.pt.new'):
        torch.save('another model', tmp_path / name)
    (tmp_path / 'gpt-2032-01-02-030405-000000.pt').mkdir()
    for model, file in ((gpt, new), (older, tmp_path / 'gpt.pt')):
        capsys.readouterr()
        assert_same_model(model, tmp_path)
        sample.main(['--length', '5'], tmp_path)
        assert capsys.readouterr().err == f'The newest run: {file}\n' * 2
        sample.main(['--length', '5', '--checkpoint', str(file)], tmp_path)
        assert capsys.readouterr().err == ''
        new.unlink(missing_ok=True)
        old.unlink(missing_ok=True)


@pytest.mark.parametrize('block_size', [16, 67])  # with 67, the text takes all its characters
def test_an_edited_tokenizer_may_have_tokens_of_two_characters(tmp_path, text_of, block_size):
    gpt, path = saved(tmp_path, TEXT, *EXERCISES[12].variants['300 pairs'].edits,
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
def test_a_prompt_comes_back_whole(tmp_path, text_of, prompt):
    saved(tmp_path, prompt + TEXT)
    text = text_of(prompt)
    assert text.startswith(prompt) and len(text) == len(prompt) + 500


@pytest.mark.parametrize('options', [{}, {'temperature': 2.0}, {'top_k': 1}, {'seed': 0}])
def test_an_option_counts_instead_of_the_value_in_gpt_py(tmp_path, text_of, options):
    gpt, _ = saved(tmp_path, temperature=1.1, top_k=20, seed=5)
    vars(gpt).update(options)
    torch.manual_seed(gpt.seed)
    expected = gpt.decode(gpt.model.generate(torch.tensor([gpt.encode('The ')]), 30)[0].tolist())
    arguments = [part for name, value in options.items()
                 for part in (f'--{name.replace("_", "-")}', value)]
    assert text_of('The ', '--length', 30, *arguments) == expected


def test_python_i_goes_on_with_the_names_of_the_script(tmp_path, monkeypatch, capsys):
    _, path = saved(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['sample.py', '--length', '5', '--checkpoint', str(path)])
    names = runpy.run_path(sample.__file__, run_name='__main__')
    assert names['decode'](names['encode']('The king')) == 'The king'
    assert names['model'].generate(torch.tensor([[0]]), 5).shape == (1, 6)


# --- Mistakes
@pytest.mark.parametrize('arguments, words', [
    ([''], 'the text is empty'), (['The é and 😀'], "does not know ['é', '😀']"),
    (['--checkpoint', 'nowhere.pt'], 'no saved model in nowhere.pt: train with python gpt.py'),
    (['--checkpoint', __file__], 'is not a saved model: name a file such as gpt-DATE.pt')])
def test_a_mistake_gets_one_line(tmp_path, arguments, words):
    saved(tmp_path)
    assert words in exit_message(sample.main, arguments, tmp_path)


@pytest.mark.parametrize('name, value', [
    ('--temperature', '0'), ('--temperature', 'nan'), ('--top-k', '0')])
def test_a_wrong_option_is_named(name, value, capsys):
    with pytest.raises(SystemExit, match='2'):
        sample.main([name, value])
    assert f'{name}: use a' in capsys.readouterr().err


@pytest.mark.parametrize('old, new, words', [
    ('self.ffwd = FeedForward(n_embd)\n',
     'self.ffwd = FeedForward(n_embd)\n        self.more = FeedForward(n_embd)\n', 'blocks.0.more'),
    ('self.ln_f = nn.LayerNorm(n_embd)', 'self.ln_f = nn.Identity()', 'ln_f'),
    ('import math\n', 'import maths\n', 'maths')])
def test_a_checkpoint_that_does_not_fit_the_code_says_why(tmp_path, old, new, words):
    _, path = saved(tmp_path)
    copy_script(tmp_path, 'gpt.py', TEXT, (old, new), **SMALL)
    message = exit_message(load_checkpoint, path)
    assert words in message and 'undo your edits, or train again' in message


@pytest.mark.parametrize('damage', [
    lambda path: path.write_bytes(path.read_bytes()[:5000]),
    lambda path: path.write_text(TEXT, encoding='utf-8'),
    lambda path: torch.save(torch.load(path)['model'], path),
    lambda path: torch.save({**torch.load(path), 'sizes': (16, 16, 2, 2, 1)}, path),
    lambda path: torch.save({**torch.load(path), 'chars': []}, path),
], ids=['truncated', 'text', 'weights only', 'too many sizes', 'no vocabulary'])
def test_a_damaged_or_foreign_file_is_refused(tmp_path, damage):
    _, path = saved(tmp_path)
    damage(path)
    assert f'cannot use {path}' in exit_message(load_checkpoint, path)
