"""The README agrees with the code: commands, names, values, and every line of code that it shows."""
import ast
import re
import types

import pytest

from committed import needs_committed_text
from conftest import PROJECT

README = (PROJECT / 'README.md').read_text(encoding='utf-8')
SOURCE = {name: (PROJECT / name).read_text(encoding='utf-8') for name in ('bigram.py', 'gpt.py')}
PROSE = re.sub(r'(?ms)^```.*?^```', '', README)
SPANS = re.findall(r'`([^`\n]+)`', PROSE)
SHELL = re.compile(r'(python3?|pip|uv|git|curl|sudo|source|torchrun|diff|OMP_NUM_THREADS|\.venv)\b|\.venv')


def blocks(language):
    """The lines of all blocks of code in a language."""
    found = re.findall(rf'(?ms)^```{language}\n(.*?)^```', README)
    return [line for block in found for line in block.splitlines()]


COMMANDS = blocks('sh')


def defaults(gpu):
    """The hyperparameters of gpt.py as a machine with or without a GPU sees them."""
    lines = SOURCE['gpt.py'].split('# --- Hyperparameters')[1].split('# --- Text')[0]
    machine = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: gpu))
    values = {'torch': machine}
    exec('#' + lines, values)
    return {name: values[name] for name in re.findall(r'(?m)^(\w+) = ', lines)}


def test_the_first_two_commands_are_the_ones_a_newcomer_needs():
    """Each is complete: it makes the virtual environment, installs what it needs, and runs."""
    install = 'python3 -m venv .venv && .venv/bin/python -m pip install -r requirements.txt'
    assert COMMANDS[0] == f'{install} && .venv/bin/python gpt.py'
    assert COMMANDS[1] == f'{install} pytest && .venv/bin/python -m pytest'


@pytest.mark.parametrize('command', COMMANDS)
def test_a_command_names_what_exists(command):
    for file in re.findall(r'(?<=\s)[\w/]+\.(?:py|txt)(?=\s|$)', command):
        assert (PROJECT / file).exists()
    for option in re.findall(r'(?<=gpt\.py )--\w+', command):
        assert f"add_argument('{option}'" in SOURCE['gpt.py']


@pytest.mark.parametrize('span', sorted(set(SPANS)))
def test_a_name_in_code_type_is_a_name_in_the_code(span):
    """A file, a shell command, the value of a name, or words of the scripts and the exercises."""
    if (PROJECT / span).exists() or SHELL.match(span) or span == ' / ':
        return
    exercises = (PROJECT / 'tests' / 'exercises.py').read_text(encoding='utf-8')
    known = set(re.findall(r'\w+', SOURCE['gpt.py'] + SOURCE['bigram.py'] + exercises))
    assignment = re.fullmatch(r'(\w+) ?= ?\S+', span)
    words = set(re.findall(r'\b[a-zA-Z_]\w*', assignment.group(1) if assignment else span))
    assert words <= known, words - known


@pytest.mark.parametrize('line', blocks('python'))
def test_a_line_of_code_is_a_line_of_the_script(line):
    assert line.strip() in [code.strip() for code in SOURCE['gpt.py'].splitlines()]


def test_the_snippet_for_generation_is_the_end_of_both_scripts():
    snippet = [code.strip() for code in SOURCE['bigram.py'].splitlines()[-2:]]
    assert 'max_new_tokens=500' in snippet[1]
    assert '\n'.join(['```python', *snippet, '```']) in README


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
