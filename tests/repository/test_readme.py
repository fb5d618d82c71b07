"""Both READMEs agree with the code: commands, names, values, and the code that they show."""
import argparse
import importlib
import re
import shlex
import sys

import pytest
import torch
from packaging.requirements import Requirement  # comes with pytest

from conftest import import_script, is_committed
from measure import DEFAULTS
from scripts import PROJECT, load
from solutions import EXERCISES, library_in_our_characters, python_library, sums

README, LAB = PROJECT / 'README.md', PROJECT / 'tests' / 'lab' / 'README.md'
TEXT = {path: path.read_text(encoding='utf-8') for path in (README, LAB)}
CODE = {path: path.read_text(encoding='utf-8')
        for path in [PROJECT / 'gpt.py', PROJECT / 'bigram.py', *LAB.parent.glob('*.py')]}
SHELL = re.compile(r'(python3?|pip|py|uv|git|curl|sudo|source|torchrun|diff|%run|OMP_NUM_THREADS'
                   r'|\.venv)\b|\.venv')


def blocks(path, language):
    """The lines of all blocks of code in a language."""
    found = re.findall(r'(?ms)^```(\w*)\n(.*?)^```$', TEXT[path])
    return [line for name, block in found if name == language for line in block.splitlines()]


def spans(path):
    """What stands in code type in the prose: names, files, commands."""
    prose = re.sub(r'(?ms)^```.*?^```', '', TEXT[path])
    return sorted({' '.join(span.split())  # one may go on in the next line
                   for paragraph in prose.split('\n\n') for span in paragraph.split('`')[1::2]})


COMMANDS = [(path, command) for path in TEXT
            for command in [*blocks(path, 'sh'), *(s for s in spans(path) if SHELL.match(s)),
                            *(line[2:] for line in blocks(path, '') if line.startswith('$ '))]]


def test_the_first_two_commands_are_the_ones_a_newcomer_needs():
    """Each is complete: it makes the virtual environment, installs what it needs, and runs."""
    install = 'python3 -m venv .venv && .venv/bin/python -m pip install -r requirements.txt'
    assert blocks(README, 'sh')[0] == f'{install} && .venv/bin/python gpt.py'
    assert blocks(README, 'sh')[1] == f'{install} pytest && .venv/bin/python -m pytest'


def test_each_python_gets_one_torch_and_the_readme_names_it():
    lines = (PROJECT / 'requirements.txt').read_text(encoding='utf-8').splitlines()
    torches = [Requirement(line) for line in lines if line.startswith('torch')]
    oldest, newest = re.search(r'You need Python 3\.(\d+) to 3\.(\d+)\b', TEXT[README]).groups()
    for minor in range(int(oldest), int(newest) + 1):
        here = {'python_version': f'3.{minor}'}
        assert [torch.marker.evaluate(here) for torch in torches].count(True) == 1, here
    releases = [str(torch.specifier).removeprefix('==') for torch in torches]
    named = re.findall(r'torch(?:==| )(\d+\.\d+\.\d+)', TEXT[README])
    assert named and set(named) <= set(releases)


def test_the_workflow_runs_these_commands_as_they_stand():
    workflow = (PROJECT / '.github/workflows/tests.yml').read_text(encoding='utf-8')
    for command in blocks(README, 'sh')[:2] + blocks(README, 'powershell')[:2]:
        assert f'run: {command}\n' in workflow


@pytest.mark.parametrize('path, command', COMMANDS)
def test_a_command_names_files_that_exist(path, command):
    for file in re.findall(r'(?<=\s)(?!try/)[\w/]+\.(?:py|txt)(?=\s|$)', command):
        assert (PROJECT / file).exists()


@pytest.mark.parametrize('path, command', [
    (path, command) for path, command in COMMANDS if 'tests/lab/' in command])
def test_a_program_of_the_lab_takes_the_arguments_of_each_command(path, command, monkeypatch):
    """Its own parser says so; nothing is run."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, argv):
        parse_args(parser, argv)
        raise StopIteration

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_and_stop)
    program, *arguments = shlex.split(command.partition('tests/lab/')[2])
    with pytest.raises(StopIteration):
        importlib.import_module(program.removesuffix('.py')).main(arguments)


@pytest.mark.parametrize('path, span', [(path, span) for path in TEXT for span in spans(path)
                                        if not SHELL.match(span) and '--' not in span])
def test_a_name_in_code_type_is_a_name_in_the_code(path, span):
    """Of the scripts or the programs: a word with an underscore, or one that gets a value."""
    known = set(re.findall(r'\w+', ' '.join(CODE.values()))) | set(dir(torch))
    names = re.findall(r'\b[a-z]\w*_\w*', span)
    assert [name for name in names if name not in known] == [] or (PROJECT / span).exists()
    given = set(re.findall(r'\b(\w+) = ', ' '.join(CODE.values())))
    assert [name for name in re.findall(r'\b(\w+) = ', span) if name not in given] == []


def test_the_code_that_goes_on_with_a_saved_model_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    code = next(code for code in re.findall(r'(?ms)^```python\n(.*?)^```', TEXT[README])
                if 'import gpt' in code)
    gpt = import_script(tmp_path, 'gpt.py', TEXT[README] * 2)
    assert set(re.findall(r'gpt\.(\w+)', code)) <= set(vars(gpt))  # what it sets exists
    gpt.train()
    [saved] = tmp_path.glob('gpt-*.pt')
    saved.rename(tmp_path / re.search(r'gpt-[\d-]+\.pt', code)[0])
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'gpt', raising=False)
    names = {}
    exec(code.replace('1000', '20'), names)  # a shorter run
    monkeypatch.delitem(sys.modules, 'gpt')
    out = capsys.readouterr().out
    assert f"{names['saved']['settings']} {gpt.history[-1]}\n" in out
    written, loss = re.search(r'\n(FLINT:(?s:.*?))\n(\d+\.\d+)\n[\d,]+ parameters', out).groups()
    assert len(written) == 206 and 0 < float(loss) < 10
    assert 'step 20 of 20' in out and len(list(tmp_path.glob('gpt-*.pt'))) == 2
    assert names['gpt'].learning_rate == 3e-4


def test_the_code_for_other_texts_writes_those_of_the_solutions(tmp_path, monkeypatch):
    """The blocks of exercises 27 and 28, as they stand."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'try').mkdir()
    ours = 'Some words.\n' * 9000
    (tmp_path / 'input.txt').write_text(ours, encoding='utf-8')
    (tmp_path / 'other.txt').write_text(python_library(ours), encoding='utf-8')
    codes = re.findall(r'(?ms)^```python\n(.*?)^```', TEXT[LAB])
    for code, solution in zip(codes, (sums, library_in_our_characters), strict=True):
        exec(code, {})
        assert (tmp_path / 'try/input.txt').read_text(encoding='utf-8') == solution(ours)


def test_the_snippet_for_generation_is_the_end_of_both_scripts():
    snippet = [code.strip() for code in CODE[PROJECT / 'bigram.py'].splitlines()[-2:]]
    assert 'max_new_tokens=500' in snippet[1]
    assert '\n'.join(['```python', *snippet, '```']) in TEXT[README]


def test_the_titles_of_the_exercises_are_those_of_the_solutions():
    titles = re.findall(r'(?m)^\*\*(\d+)\. (.*?)\.?\*\*', TEXT[LAB])
    assert [(int(number), title) for number, title in titles] == \
        [(number, exercise.title) for number, exercise in EXERCISES.items()]
    chosen = re.findall(r'Exercise (\d+), (.*?):', TEXT[README])
    assert chosen
    for number, title in chosen:
        assert EXERCISES[int(number)].title.lower() == title.lower()


def test_the_results_name_the_settings_that_they_were_measured_with():
    assert ('context {block_size}, batch {batch_size}, {n_layer} layers, {n_head} heads, '
            '{n_embd} dimensions, {max_iters:,} steps').format(**DEFAULTS) \
        in ' '.join(TEXT[README].split())


def test_these_settings_are_the_defaults_of_gpt_py():
    if not is_committed('gpt.py', 'input.txt'):
        pytest.skip('gpt.py or input.txt is edited, or there is no git to tell')
    gpt = load(PROJECT / 'gpt.py', device='cpu')
    assert {name: getattr(gpt, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize('path', TEXT, ids=lambda path: path.parent.name)
def test_every_link_is_whole(path):
    for link in re.findall(r'\]\(([^)]+)\)', TEXT[path]):
        if link.startswith('https:'):
            assert re.fullmatch(r'https://[\w./?=&%-]+', link), link
            continue
        file, _, anchor = link.partition('#')
        target = path.parent / file if file else path
        assert target.exists(), link
        titles = [re.sub(r'[^\w -]', '', title).lower().replace(' ', '-')
                  for title in re.findall(r'(?m)^#+ (.*)', target.read_text(encoding='utf-8'))] \
            if anchor else ['']
        assert anchor in titles, link
