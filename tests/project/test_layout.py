"""The pair: what the two scripts share, how they are laid out, and what stands beside them."""
import ast
import fnmatch
import os
import re
import sys

import pytest

from conftest import PROJECT

BIGRAM, GPT = ((PROJECT / name).read_text(encoding='utf-8') for name in ('bigram.py', 'gpt.py'))
each_script = pytest.mark.parametrize('source', [BIGRAM, GPT], ids=['bigram.py', 'gpt.py'])


def between(source, first, after):
    """The part of a source from the words `first` to just before the words `after`."""
    return source[source.index(first):source.index(after, source.index(first))]


@pytest.mark.parametrize('first, after', [
    ('# --- Hyperparameters', '  # where the model runs'),
    ('# --- Text and tokenizer', 'def get_batch('),
    ('def get_batch(', '@torch.no_grad()  #'),
    ('    def forward(self, idx, targets', '        """Token ids'),
    ('        """Token ids', '        """\n'),
    ('        if targets is None', '    @torch.no_grad()\n    def generate'),
    ('            idx_next =', '  # (B, T + 1)'),
    ('# --- Checks', "    check('allocate'"),
    ('    sys.__excepthook__(', '\n'),
    ('    check(len(val_data)', ': add text'),
])
def test_what_the_two_scripts_share_is_the_same_text(first, after):
    """So that `diff bigram.py gpt.py` shows what a transformer adds, and nothing else."""
    assert between(BIGRAM, first, after) == between(GPT, first, after)


def test_estimate_loss_differs_only_in_the_switches_of_dropout():
    bigram, gpt = (between(source, '@torch.no_grad()  #', '# --- Model').split('\n')
                   for source in (BIGRAM, GPT))
    added = [line for line in gpt if line not in bigram]
    assert [line.split('  #')[0].strip() for line in added] == ['model.eval()', 'model.train()']
    assert [line for line in gpt if line not in added] == bigram


def test_a_training_step_is_the_same_in_both():
    steps = [between(source, "x, y = get_batch('train')", 'scheduler.step()  #')
             for source in (BIGRAM, GPT)]
    bigram, gpt = ([line.strip() for line in step.split('\n')] for step in steps)
    assert bigram == gpt and len(bigram) == 6


def test_both_end_with_the_same_two_lines():
    for source in (BIGRAM, GPT):
        context, last = source.rstrip('\n').split('\n')[-2:]
        assert context.strip() == 'context = torch.zeros((1, 1), dtype=torch.long, device=device)'
        assert last == '    print(decode(m.generate(context, max_new_tokens=500)[0].tolist()))'


@each_script
def test_the_sections_follow_the_order_of_reading(source):
    marks = ['"""', '\nimport ', '# --- Hyperparameters', '# --- Text and tokenizer',
             'def get_batch(', 'def estimate_loss(', '# --- Model', '# --- Checks',
             *(['# --- Checkpoint'] if source is GPT else []), '# --- Training', 'def train(',
             "\nif __name__ == '__main__':\n    if hasattr(", '# --- Generation']
    if source is BIGRAM:
        marks[-2] = "\nif __name__ == '__main__':\n"
    places = [source.index(mark) for mark in marks]
    assert places == sorted(places)
    assert places[0] == 0
    headers = [line for line in source.split('\n') if line.lstrip().startswith('# ---')]
    assert len(headers) == sum(mark.startswith('# ---') for mark in marks)


@each_script
def test_each_script_stands_alone(source):
    imported = set(re.findall(r'(?m)^\s*(?:import|from) (\w+)', source))
    assert imported <= {'torch', *sys.stdlib_module_names}


@each_script
def test_a_hyperparameter_is_one_line_at_the_left_margin_with_a_remark(source):
    header, *lines = between(source, '# --- Hyperparameters', '\n\n').split('\n')
    assert len(lines) >= 8
    assert all(re.fullmatch(r'[a-z_]+ = \S.*?  # \S.*', line) for line in lines), lines


@each_script
def test_no_line_is_longer_than_100_characters(source):
    assert all(len(line) <= 100 for line in source.split('\n'))


def test_the_scripts_are_short():
    assert len(GPT.splitlines()) <= 352 and len(BIGRAM.splitlines()) <= 170


@each_script
def test_no_code_is_nested_deeper_than_three_inside_a_function(source):
    """Statements only: a line that goes on inside brackets is indented as it reads best."""
    deepest = 0

    def visit(node, depth):
        nonlocal deepest
        deepest = max(deepest, depth)
        for child in ast.iter_child_nodes(node):
            inner = isinstance(node, (ast.For, ast.While, ast.If, ast.With, ast.Try))
            visit(child, depth + (inner and isinstance(child, ast.stmt)))

    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            visit(function, 0)
    assert deepest <= 3


def test_the_top_level_holds_what_it_should_and_nothing_else():
    ignored = [line for line in (PROJECT / '.gitignore').read_text(encoding='utf-8').split('\n')
               if line and not line.startswith('#')]
    found = [name for name in os.listdir(PROJECT) if not name.startswith('.')
             and not any(fnmatch.fnmatch(name, pattern.rstrip('/')) for pattern in ignored)]
    assert sorted(found) == ['README.md', 'bigram.py', 'gpt.py', 'input.txt', 'requirements.txt',
                             'tests']


def test_git_keeps_the_line_ends_of_unix():
    """On Windows, too: otherwise input.txt would have other bytes there."""
    assert '* text=auto eol=lf' in (PROJECT / '.gitattributes').read_text('utf-8').split('\n')
    for name in ('bigram.py', 'gpt.py', 'README.md'):
        assert b'\r' not in (PROJECT / name).read_bytes()
