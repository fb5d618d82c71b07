"""The pair: what the two scripts share, in which order they are read, what stands beside them."""
import ast
import difflib
import re
import shutil
import subprocess
import sys

import pytest

from scripts import PROJECT

BIGRAM, GPT = ((PROJECT / name).read_text(encoding='utf-8') for name in ('bigram.py', 'gpt.py'))
needs_git = pytest.mark.skipif(
    not (shutil.which('git') and (PROJECT / '.git').exists()), reason='needs git')
each_source = pytest.mark.parametrize('source', [BIGRAM, GPT], ids=['bigram.py', 'gpt.py'])


def test_outside_the_hyperparameters_and_the_model_the_gpt_adds_a_few_lines():
    """So that `diff bigram.py gpt.py` shows what a transformer adds, and nothing else."""
    shared = []
    for source in (BIGRAM, GPT.replace('GPTLanguageModel()', 'BigramLanguageModel()')):
        for first, after in [('"""', 'import '), ('# --- Hyper', '# --- Text'),
                             ('# --- Model', 'torch.manual_seed'), ('history = ', 'def report'),
                             ('    # AdamW moves', '    print')]:  # up to the schedule
            source = re.sub(f'(?s){first}.*?(?={after})', '', source, count=1)
        shared.append(source.splitlines())
    changes = [line for line in difflib.ndiff(*shared) if line[0] in '-+']
    removed = [line for line in changes if line[0] == '-']
    assert removed == ['-     train()']  # it is indented, in a try
    # Two imports, the call of save, and seven lines at the end: for Ctrl-C and the best weights.
    assert len(changes) - len(removed) == 10, changes


def test_inside_them_the_same_lines_are_the_same_text():
    models = [source[source.index('    def forward(self, idx, targets'):
                     source.index('torch.manual_seed')].splitlines() for source in (BIGRAM, GPT)]
    removed = [line for line in difflib.ndiff(*models) if line[0] == '-']
    assert len(removed) == 3, removed  # logits from the table; in generate, of the last character
    for pattern in ('device = .*(#.*)', 'seed = .*(#.*)', '    (# AdamW moves .*\n.*)'):
        assert len(set(re.findall(f'(?m)^{pattern}', BIGRAM + GPT))) == 1


@each_source
def test_each_name_is_defined_above_its_first_use(source):
    """Also in functions, where Python would not mind: a reader goes from the top to the bottom."""
    tree, defined = ast.parse(source), {}
    for statement in tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            defined.setdefault(statement.name, statement.lineno)
        elif isinstance(statement, ast.Assign):
            for node in ast.walk(ast.Tuple(statement.targets)):
                if isinstance(node, ast.Name):
                    defined.setdefault(node.id, statement.lineno)
    assert {'seed', 'val_data', 'model', 'm', 'report', 'train'} <= defined.keys()
    early = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)
             and node.lineno < defined.get(node.id, 0)]
    assert early == []


@each_source
def test_each_script_stands_alone(source):
    imports = [node for node in ast.walk(ast.parse(source))
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [getattr(node, 'module', alias.name) for node in imports for alias in node.names]
    assert {name.partition('.')[0] for name in names} <= {'torch', *sys.stdlib_module_names}


@needs_git
def test_the_top_level_holds_what_it_should_and_nothing_else():
    """In git: a learner's own files are welcome beside them."""
    paths = subprocess.run(['git', 'ls-files'], cwd=PROJECT, capture_output=True, text=True,
                           check=True).stdout.splitlines()
    found = {path.partition('/')[0] for path in paths if not path.startswith('.')}
    assert found == {'README.md', 'bigram.py', 'gpt.py', 'input.txt', 'requirements.txt', 'tests'}


@needs_git
def test_git_ignores_saved_models_and_what_a_stop_leaves_of_a_save():
    names = [f'gpt-2026-02-03-140506-789000.pt{end}' for end in ('', '.new')]
    found = subprocess.run(['git', 'check-ignore', '--no-index', *names], cwd=PROJECT,
                           capture_output=True, text=True).stdout.split()
    assert found == names


def test_git_keeps_the_line_ends_of_unix():
    """On Windows, too: otherwise input.txt would have other bytes there."""
    assert '* text=auto eol=lf' in (PROJECT / '.gitattributes').read_text('utf-8').split('\n')
    for name in ('bigram.py', 'gpt.py', 'README.md'):
        assert b'\r' not in (PROJECT / name).read_bytes()
