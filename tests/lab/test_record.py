"""results.json: which code a result is from; the figures of the READMEs are results in it."""
import re
import statistics
from dataclasses import replace

import pytest

import exercises
from conftest import PROJECT, TEXT, copy_script, is_committed
from exercises import SEEDS, conditions, tables
from measure import DEFAULTS, prepared
from record import Record, code_hash
from solutions import EXERCISES, GROUPS, RESULTS

RECORD = Record()
READMES = {name: (PROJECT / name).read_text(encoding='utf-8').splitlines()
           for name in ('README.md', 'tests/lab/README.md')}

# Other groups whose results stand in the text of an exercise.
ALSO = {15: ['our text', 7], 21: ['our text', 'classic corpus', 'full length']}

# Figures that exercises.py cannot measure, by exercise: those in its text, with the command that
# shows them.
SHOWN_BY_OTHERS = {
    0: ('python tests/lab/inside.py --page', '0.80 1.58 2.42 0.06 0.08 0.36 0.58'),
}

SCRIPT = '''\
"""Says what it is."""
n_layer = 3  # blocks
n_layer = 5


def half(x):
    """The half."""
    if x < 0:
        x = 0
    return x / 2  # half of it
'''


# --- The record
@pytest.mark.parametrize('old, new', [
    ('"""Says what it is."""\n', ''), ('The half', 'Half'), ('  # half of it', ''), ('= 3', '= 4')])
def test_comments_docstrings_and_what_is_set_again_do_not_change_the_code(old, new):
    assert SCRIPT.count(old) == 1
    assert code_hash(SCRIPT.replace(old, new), ['n_layer']) == code_hash(SCRIPT, ['n_layer'])


@pytest.mark.parametrize('old, new', [
    ('= 5', '= 6'), ('x / 2', 'x / 3'), ('    return', '        return'), ('x = 0', 'x = 1')])
def test_what_runs_changes_the_code(old, new):
    assert SCRIPT.count(old) == 1
    assert code_hash(SCRIPT.replace(old, new), ['n_layer']) != code_hash(SCRIPT, ['n_layer'])


def test_only_hyperparameters_that_are_set_again_do_not_count():
    assert code_hash(SCRIPT, []) != code_hash(SCRIPT.replace('= 3', '= 4'), [])


def test_a_record_has_one_row_for_each_run_sorted_one_line_each(tmp_path):
    record = Record(tmp_path / 'results.json')
    for exercise, seed, val in ((10, 1, 1.0), (9, 1, 2.0), (10, 1, 3.0), ('parts', 1, 4.0)):
        record.add({'exercise': exercise, 'variant': 'a', 'seed': seed, 'results': {'val': val}})
    again = Record(record.path)
    assert [(row['exercise'], row['results']['val']) for row in again.rows] == [
        (9, 2.0), (10, 3.0), ('parts', 4.0)]
    assert again.find(exercise=10, seed=1) == [again.rows[1]] and not again.find(exercise=8)
    lines = record.path.read_text(encoding='utf-8').splitlines()
    assert len(lines) == 2 + len(again.rows) and '"val": 3.0' in lines[2]


def test_a_result_of_the_default_stays_beside_those_of_other_processors(tmp_path):
    record = Record(tmp_path / 'results.json')
    for exercise in ('our text', 3):
        for code, processor, exact in (('a', 'old', 1.0), ('a', 'new', 2.0), ('a', 'new', 3.0)):
            record.add({'exercise': exercise, 'variant': 'a', 'seed': 1, 'code': code,
                        'processor': processor, 'results': {'exact': exact}})
    def losses(exercise):
        return [row['results']['exact'] for row in record.find(exercise=exercise)]
    assert losses('our text') == [1.0, 3.0] and losses(3) == [3.0]
    record.add({**record.find(exercise='our text')[0], 'code': 'b', 'results': {'exact': 4.0}})
    assert losses('our text') == [4.0]  # of other code, none stays


def test_the_default_is_measured_on_each_processor(project, monkeypatch):
    monkeypatch.setattr(exercises, 'processor', lambda: 'another one')
    default = '`gpt.py`, the default'
    assert conditions('our text', default, 1, project)['processor'] == 'another one'
    assert 'processor' not in conditions('plain', '1,000 steps', 1, project)


@pytest.fixture
def project(tmp_path):
    copy_script(tmp_path / 'project', 'gpt.py', TEXT)
    return tmp_path / 'project'


@pytest.fixture
def measured(in_one_process, monkeypatch, project, tmp_path):
    """Calls exercises.py with --record for exercise 3; the calls of its measurement so far."""
    calls = []

    def measure(variant, project, steps=None, **settings):
        calls.append(settings['seed'])
        if settings['seed'] == 2:
            raise ValueError('gpt.py was stopped after step 0 of 1000')
        return {'val': 1.5 + len(calls)}
    monkeypatch.setattr(GROUPS[3]['plain mean'], 'measure', measure)

    def measured(*arguments):
        exercises.main(['3', '--record', *arguments], project, tmp_path / 'results.json')
        return calls
    return measured


def test_what_the_record_has_from_the_same_code_is_not_measured_again(measured, project, capsys):
    assert measured() == [1337]
    assert 'plain mean, seed 1337: 2.50' in capsys.readouterr().out
    assert measured('--seeds', '2') == [1337, 1]
    assert 'plain mean, seed 1337: 2.50' in capsys.readouterr().out
    copy_script(project, 'gpt.py', TEXT, n_layer=7)
    assert measured() == [1337, 1]  # the learner's own settings do not count
    with open(project / 'gpt.py', 'a', encoding='utf-8') as script:
        script.write('\nBlock.forward = lambda self, x: x\n')
    assert measured() == [1337, 1, 1337]
    copy_script(project, 'gpt.py', TEXT * 2)
    assert measured() == [1337, 1, 1337, 1337]  # another text


def test_a_run_that_failed_or_was_short_is_not_recorded(measured, tmp_path, capsys):
    measured('--steps', '5')
    assert not (tmp_path / 'results.json').exists()
    measured('--seeds', '3')
    assert 'seed 2: failed: gpt.py was stopped after step 0 of 1000' in capsys.readouterr().out
    rows = Record(tmp_path / 'results.json').rows
    assert sorted(row['seed'] for row in rows) == [1, 1337]
    assert {'exercise', 'variant', 'steps', 'text', 'code', 'threads', 'torch', 'processor',
            'seconds', 'results'} <= rows[0].keys()


def test_an_exercise_that_does_not_fit_stops_no_other(measured, project, tmp_path, capsys):
    copy_script(project, 'gpt.py', TEXT, ('scores = scores + causal_mask', 'pass'))
    measured()
    assert 'failed: gpt.py was changed where this exercise edits it' in capsys.readouterr().out
    assert Record(tmp_path / 'results.json').rows == []


def test_a_run_that_another_exercise_has_made_is_not_made_again(in_one_process, project, tmp_path):
    record = Record(tmp_path / 'results.json')
    record.add({'exercise': 'plain', 'variant': '3,000 steps', 'results': {'val': 1.25},
                **conditions('plain', '3,000 steps', 1, project)})
    [row] = exercises.measure_all([('parts', 'nothing', 1)], project, record)
    assert row['results'] == {'val': 1.25}
    assert [row['exercise'] for row in record.rows] == ['parts', 'plain']


def test_the_list_says_which_figures_are_from_older_code(project, tmp_path, capsys):
    copy_script(project, 'bigram.py', TEXT)
    record = Record(tmp_path / 'results.json')
    for name in EXERCISES[2].variants:
        record.add({'exercise': 2, 'variant': name, 'results': {},
                    **conditions(2, name, 1337, project)})
    exercises.main([], project, record.path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == ' 2. Take the positions away'
    assert lines[3] == ' 3. The plain mean of the past (our figures are from older code)'
    copy_script(project, 'gpt.py', TEXT, *EXERCISES[2].variants['no positions'].edits)
    exercises.main([], project, record.path)
    assert 'was changed where this exercise edits it' in capsys.readouterr().out.splitlines()[2]


# --- The figures
def test_the_record_has_all_runs_and_none_from_older_code():
    older = [group for group in GROUPS if not all(
        RECORD.find(exercise=group, variant=name) for name in GROUPS[group])]
    if is_committed('gpt.py', 'bigram.py'):  # whoever edits them keeps our record
        for row in RECORD.rows:
            variant = replace(GROUPS[row['exercise']][row['variant']], text=None)
            _, source = prepared(variant, PROJECT, seed=row['seed'])
            if row['code'] != code_hash(source, DEFAULTS):
                older.append(row)
    assert older == []


def test_the_table_of_results_has_them_cell_by_cell():
    rows = [line for line in READMES['README.md'] if line.startswith('| `gpt.py`, the default')]
    end = READMES['README.md'].index(rows[0]) + 1
    assert READMES['README.md'][end - len(RESULTS):end] == tables(RECORD)['results']


def test_a_result_is_the_mean_with_the_lowest_and_the_highest_of_its_seeds(tmp_path):
    record = Record(tmp_path / 'results.json')
    for seed, exact in ((1, 1.5), (2, 1.25), (3, 1.6)):
        record.add({'exercise': 'our text', 'variant': '`gpt.py`, the default', 'seed': seed,
                    'results': {'exact': exact}})
    record.add({'exercise': 'classic corpus', 'variant': '`gpt.py`, the default', 'seed': 1,
                'results': {'exact': 1.75}})
    assert tables(record)['results'][-1] == (
        '| `gpt.py`, the default | 1.450 (1.250 to 1.600) | 1.750 |')
    assert set(tables(record)['results'][0].split(' | ')[1:]) == {'?', '? |'}


def test_the_rows_of_the_results_are_those_of_the_main_readme():
    labels = [line.split(' | ')[0][2:] for line in READMES['README.md']]
    assert [label for label in labels if label in RESULTS][-len(RESULTS):] == list(RESULTS)


def text_of(number):
    """The lines of an exercise in tests/lab/README.md."""
    lines = READMES['tests/lab/README.md']
    start = next(i for i, line in enumerate(lines) if line.startswith(f'**{number}. '))
    return lines[start:start + lines[start:].index('</details>')]


@pytest.mark.parametrize('number', [number for number in tables(RECORD) if number in EXERCISES])
def test_a_table_has_the_results_cell_by_cell(number):
    table = [line for line in text_of(number) if line.startswith('|')]
    assert table[2:] == tables(RECORD)[number]  # below its head and a line


def test_how_far_runs_of_one_version_differ_is_what_the_readme_says():
    found = re.search(r'differ by ([\d.]+) after 1,000 steps, ([\d.]+) after 3,000, and ([\d.]+)'
                      r' after 10,000', ' '.join(READMES['README.md']))
    default = '`gpt.py`, the default'
    for figure, group, name, key in zip(found.groups(), ('plain', 'plain', 'classic corpus'),
                                        ('1,000 steps', '3,000 steps', default),
                                        ('val', 'val', 'exact')):
        losses = [row['results'][key] for row in RECORD.find(exercise=group, variant=name)]
        digits = len(figure.partition('.')[2])
        assert len(losses) >= len(SEEDS) and figure == f'{max(losses) - min(losses):.{digits}f}'
    in_lab = ' '.join(READMES['tests/lab/README.md'])
    assert re.search(r'its mean is larger than (\d\.\d+)', in_lab)[1] == found[2]


def test_what_else_was_tried_has_its_results():
    text = ' '.join(READMES['README.md'])
    text = text[text.index('**Can you do better?**'):text.index('How it was measured')]
    losses = [row['results']['exact'] for row in RECORD.find(exercise='full length')]
    figures = re.findall(r'1\.\d+', text)
    assert figures and [figure for figure in figures if not shown(figure, losses)] == []


def test_the_parts_have_the_results_cell_by_cell():
    parts = {line.split(' | ')[0]: line for line in tables(RECORD)['parts']}
    rows = [line for line in READMES['tests/lab/README.md'] if line.split(' | ')[0] in parts]
    assert [' | '.join(row.split(' | ')[:3]) + ' |' for row in rows] == list(parts.values())


@pytest.mark.parametrize('number', EXERCISES)
def test_a_quoted_sample_is_one_that_was_written(number):
    samples = ' '.join(row['results'].get('sample', '') for row in RECORD.find(exercise=number))
    quotes = re.findall(r'"([^"]*)"', re.sub('`[^`]*`', '', ' '.join(text_of(number)[1:])))
    assert [quote for quote in quotes if quote not in samples] == []


def shown(figure, values):
    """Whether a figure in a text is one of these values, in the digits that it shows."""
    if figure.endswith('%'):
        return any(f'{100 * value:.0f} %' == figure for value in values)
    if ' of ' in figure:
        return any(f'{value:,}' == figure.split(' of ')[0] for value in values)
    if 'e-' in figure:
        return any(f'{value:.0e}' == figure for value in values)
    digits = len(figure.partition('.')[2])
    return any(f'{value:.{digits}f}' == figure for value in values)


def results_of(number):
    """All numbers that the runs of an exercise gave, those of gpt.py as it is, and the means of
    several seeds.
    """
    values = []
    for group in (number, 'plain', *ALSO.get(number, ())):
        for name in GROUPS[group]:
            rows = RECORD.find(exercise=group, variant=name)
            for key in rows[0]['results'] if rows else ():
                results = [row['results'][key] for row in rows]
                if isinstance(results[0], str):
                    values += map(float, re.findall(r'\d+\.\d+', ' '.join(results)))
                else:
                    values += [*results, statistics.mean(results)]
    return values


@pytest.mark.parametrize('number', EXERCISES)
def test_a_figure_in_the_text_of_an_exercise_is_one_of_its_results(number):
    text = ' '.join(line for line in text_of(number)[1:] if not line.startswith('|'))
    text = re.sub(r'`[^`]*`|\]\([^)]*\)|"[^"]*"', '', text)  # no settings, addresses, samples
    figures = re.findall(r'\d+e-\d+|\d[\d,]* of \d+|\d+ %|\d+\.\d+', text)
    wrong = [figure for figure in figures if not shown(figure, results_of(number))
             and figure not in SHOWN_BY_OTHERS.get(number, ('', ''))[1].split()]
    assert not wrong
