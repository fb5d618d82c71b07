"""The pair: what the two share, how they are laid out, and what stands beside them."""
import fnmatch
import os
import re

import pytest

from conftest import PROJECT

BIGRAM, GPT = ((PROJECT / name).read_text(encoding='utf-8') for name in ('bigram.py', 'gpt.py'))


def between(text, first, after):
    """The part of a text from the words `first` to just before the words `after`."""
    return text[text.index(first):text.index(after, text.index(first))]


@pytest.mark.parametrize('first, after', [
    ('# --- Settings that', 'for name in ('),
    ('torch.manual_seed(seed)', '# --- The model'),
    ('    def forward(self, idx, targets', '        """Token ids'),
    ('        """Token ids', '        """\n'),
    ('        if targets is None', '    @torch.no_grad()\n    def generate'),
    ('            logits, _ = self(idx', '            logits = logits[:, -1]'),
    ('            drawn =', '\n\n\nmodel ='),
    ('    need(min(len(train_data)', '         f\'{block_size}'),
])
def test_what_the_two_scripts_share_is_the_same_text(first, after):
    """So that `diff bigram.py gpt.py` shows what a transformer adds, and nothing else."""
    assert between(BIGRAM, first, after) == between(GPT, first, after)


def test_a_training_step_is_the_same_in_both():
    first, after = "x, y = get_batch('train')", 'schedule.step()'
    assert between(BIGRAM, first, after).split() == between(GPT, first, after).split()


def test_both_end_with_the_same_generation():
    end = '    # --- Generation'
    assert BIGRAM[BIGRAM.index(end):] == GPT[GPT.index(end):]
    assert GPT.endswith('''
    context = torch.zeros((1, 1), dtype=torch.long, device=device)
    print(decode(m.generate(context, max_new_tokens=500)[0].tolist()))
''')


def test_each_script_stands_alone():
    for script in (BIGRAM, GPT):
        imported = re.findall(r'(?m)^(?:import|from) (\w+)', script)
        assert set(imported) <= {'argparse', 'math', 'sys', 'time', 'warnings', 'pathlib', 'torch'}


def test_a_hyperparameter_is_one_line_with_a_remark_at_the_left_margin():
    for script in (BIGRAM, GPT):
        section = between(script, '# --- Hyperparameters', '# --- Settings').strip().split('\n')
        assert all(re.fullmatch(r'[a-z_]+ = \S.*?  # \S.*', line) for line in section[1:]), section


def test_lines_are_short():
    assert all(len(line) < 100 for script in (BIGRAM, GPT) for line in script.split('\n'))


def test_the_top_level_holds_what_it_should_and_nothing_else():
    ignored = (PROJECT / '.gitignore').read_text().split()
    found = [name for name in os.listdir(PROJECT) if not name.startswith('.')
             and not any(fnmatch.fnmatch(name, pattern.rstrip('/')) for pattern in ignored)]
    assert sorted(found) == ['README.md', 'bigram.py', 'gpt.py', 'input.txt', 'requirements.txt',
                             'tests']
