"""The pair: what the two scripts share, in which order they are read, what stands beside them."""
import fnmatch
import os
import re
import sys

import pytest

from scripts import PROJECT

BIGRAM, GPT = ((PROJECT / name).read_text(encoding='utf-8') for name in ('bigram.py', 'gpt.py'))
each_source = pytest.mark.parametrize('source', [BIGRAM, GPT], ids=['bigram.py', 'gpt.py'])


def between(source, first, after):
    """The part of a source from the words `first` to just before the words `after`."""
    return source[source.index(first):source.index(after, source.index(first))]


@pytest.mark.parametrize('first, after', [
    ('# --- Hyperparameters', '  # where the model runs'),
    ('# --- Text and tokenizer', '    generator = torch.Generator'),
    ('    generator = torch.Generator', '    model.train()'),
    ('    def forward(self, idx, targets', '        """\n'),
    ('        if targets is None', '    @torch.no_grad()\n    def generate'),
    ('            idx_next =', '        self.train('),
    ('    started = time.time()', '            context = '),
    ('        if step == max_iters:', '        if in_terminal'),
    ('# --- Housekeeping', "        check(False, 'out of memory"),
    ('try:\n    torch.zeros', 'in_terminal ='),
    ('# --- Build the model', 'model = m ='),
])
def test_what_the_two_scripts_share_is_the_same_text(first, after):
    """So that `diff bigram.py gpt.py` shows what a transformer adds, and nothing else."""
    shared = [line for line in between(GPT, first, after).splitlines() if 'model.eval()' not in line]
    assert '\n'.join(shared).rstrip() in BIGRAM


def test_both_end_with_the_same_two_lines():
    for source in (BIGRAM, GPT):
        context, last = source.rstrip('\n').split('\n')[-2:]
        assert context.strip() == 'context = torch.zeros((1, 1), dtype=torch.long, device=device)'
        assert last == '    print(decode(m.generate(context, max_new_tokens=500)[0].tolist()))'


@each_source
def test_the_lesson_comes_before_the_housekeeping(source):
    marks = ['"""', '\nimport ', '# --- Hyperparameters', '# --- Text and tokenizer',
             'def get_batch(', 'def estimate_loss(', '# --- Model', '# --- Training', 'def train(',
             '# --- Housekeeping', 'def check(', '# --- Build the model', 'context = torch.zeros']
    places = [source.index(mark) for mark in marks[:-1]] + [source.rindex(marks[-1])]
    assert places == sorted(places)


@each_source
def test_each_script_stands_alone(source):
    imported = set(re.findall(r'(?m)^\s*(?:import|from) (\w+)', source))
    assert imported <= {'torch', *sys.stdlib_module_names}


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
