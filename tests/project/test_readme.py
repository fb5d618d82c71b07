"""The README cannot rot: whatever it names or quotes is held to the code."""
import ast
import re
import types

import pytest
import torch

from committed import needs_committed_text
from conftest import PROJECT

README = (PROJECT / 'README.md').read_text(encoding='utf-8')
SOURCE = {name: (PROJECT / name).read_text(encoding='utf-8') for name in ('bigram.py', 'gpt.py')}
COMMANDS = [line for block in re.findall(r'(?ms)^```sh\n(.*?)^```', README)
            for line in block.splitlines()]
PROSE = re.sub(r'(?ms)^```.*?^```', '', README)
SPANS = re.findall(r'`([^`\n]+)`', PROSE)


def defaults(gpu):
    """The hyperparameters of gpt.py as a machine with or without a GPU sees them."""
    lines = SOURCE['gpt.py'].split('# --- Hyperparameters')[1].split('# --- Text')[0]
    machine = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: gpu))
    values = {'torch': machine}
    exec('#' + lines, values)
    return {name: values[name] for name in re.findall(r'(?m)^(\w+) = ', lines)}


def test_the_first_two_commands_are_the_ones_a_newcomer_needs():
    assert COMMANDS[0] == 'python -m pip install -r requirements.txt && python gpt.py'
    assert COMMANDS[1] == 'python -m pip install -r requirements.txt pytest && python -m pytest'


@pytest.mark.parametrize('command', COMMANDS)
def test_a_command_names_what_exists(command):
    for file in re.findall(r'(?<=\s)[\w/]+\.(?:py|txt)(?=\s|$)', command):
        assert (PROJECT / file).exists()
    for option in re.findall(r'(?<=gpt\.py )--\w+', command):
        assert f"add_argument('{option}'" in SOURCE['gpt.py']


@pytest.mark.parametrize('span', sorted(set(SPANS)))
def test_a_name_in_code_type_is_a_name_in_the_code(span):
    """A file that exists, a command, or names and words of the scripts, or of torch's Muon."""
    known = SOURCE['gpt.py'] + SOURCE['bigram.py'] + torch.optim.Muon.__doc__
    known = set(re.findall(r'\w+', known))
    words = set(re.findall(r'\b[a-zA-Z_]\w*', span))
    assert (PROJECT / span).exists() or span.startswith('python ') or words <= known, words - known


@pytest.mark.parametrize('name', list(defaults(gpu=False)))
def test_the_table_of_hyperparameters_gives_every_one_its_true_values(name):
    if name == 'gpu':
        return  # not one to set: it only tells the two columns apart
    row = re.search(rf'(?m)^\| `{name}` \| (.*?) \| (.*?) \|', README)
    assert row, f'the table leaves out {name}'
    assert [ast.literal_eval(value) for value in row.groups()] == \
        [defaults(gpu=True)[name], defaults(gpu=False)[name]]


@needs_committed_text
def test_the_transcript_is_of_the_defaults_on_the_text_that_is_here():
    text = (PROJECT / 'input.txt').read_text(encoding='utf-8')
    cpu = defaults(gpu=False)
    C, vocabulary = cpu['n_embd'], len(set(text))
    block = 4 * C + 3 * C * C + C * C + C + 8 * C * C + 5 * C
    parameters = (2 * vocabulary * C + cpu['block_size'] * C + vocabulary + 2 * C
                  + cpu['n_layer'] * block)
    assert (f'{len(text):,} characters, {vocabulary} different; {cpu["max_iters"]:,} steps on cpu; '
            f'{parameters:,} parameters') in README
    assert re.search(rf'(?m)^step {cpu["max_iters"]}: train loss ', README)


def test_the_results_name_the_size_that_is_the_default():
    cpu = defaults(gpu=False)
    size = (f'| defaults: context {cpu["block_size"]}, batch {cpu["batch_size"]}, '
            f'{cpu["n_layer"]} layers, {cpu["n_head"]} heads, {cpu["n_embd"]} dimensions, '
            f'{cpu["max_iters"]:,} steps |')
    assert size in README


def test_every_link_of_a_part_of_the_readme_is_whole():
    for link in re.findall(r'\]\(([^)]+)\)', README):
        assert re.fullmatch(r'https://[\w./?=&%-]+', link)
