"""runs.py: which run was which, and which ones can be compared."""
import time

import pytest
import torch

import runs
from conftest import TEXT, exit_message, import_script, save
from exact_loss import exact_loss
from runs import comparable_runs


@pytest.fixture
def table_of(tmp_path, capsys):
    """What runs.py prints with these arguments, line by line, each as a list of words."""
    def table_of(*arguments):
        capsys.readouterr()
        runs.main(list(map(str, arguments)), tmp_path)
        return [line.split() for line in capsys.readouterr().out.splitlines()]
    return table_of


def run_of(folder, *val_losses, text=TEXT, **settings):
    """A run with these val losses in its reports, at steps 0, 1, 2, ...; the path of its file."""
    gpt = import_script(folder, 'gpt.py', text, **settings)
    started = time.time()
    for step, val in enumerate(val_losses):
        gpt.save(step, {'train': 1 / (step + 1), 'val': val}, started)
    return max(folder.glob('gpt-*.pt'))


def test_a_line_says_what_differs_in_the_settings_how_many_steps_and_the_best_loss(
        tmp_path, table_of):
    first = run_of(tmp_path, 2.0, 3.5, 3.25, learning_rate=0.5)  # untrained, and better by chance
    second = run_of(tmp_path, 4.0, 2.5, 3.0, 3.5, dropout=0.25, n_layer=1, learning_rate=0.125)
    head, one, two, _, same, note, _ = table_of()
    assert ' '.join(head) == \
        'run parameters learning_rate n_layer dropout steps best val loss at step'
    assert one[0] == first.name and one[2:] == ['0.5', '2', '0.0', '2', 'of', '20', '3.2500', '2']
    assert two[0] == second.name
    assert two[2:] == ['0.125', '1', '0.25', '3', 'of', '20', '2.5000', '1']
    parameters = [sum(weight.numel() for weight in torch.load(path)['model'].values())
                  for path in (first, second)]
    assert [one[1], two[1]] == [f'{number:,}' for number in parameters]
    assert 'block_size = 16, max_iters = 20' in ' '.join(same) and 'dropout' not in same
    assert 'seeds alone make a difference of up to' in ' '.join(note)


@pytest.mark.parametrize('settings', [
    {'batch_size': 5}, {'block_size': 15}, {'eval_iters': 3}, {'text': TEXT[:-1]},
    {'text': TEXT.replace('e', 'é')}], ids=lambda settings: next(iter(settings)))
def test_losses_stand_in_one_table_only_if_they_were_estimated_on_the_same_passages(
        tmp_path, table_of, settings):
    paths = [run_of(tmp_path, 4.0, 3.0), run_of(tmp_path, 4.0, 3.0, **settings),
             run_of(tmp_path, 4.0, 3.0, seed=5)]
    lines = table_of()
    names = [line[0] for line in lines if line and line[0].startswith(('run', 'gpt-'))]
    assert names == ['run', paths[1].name, 'run', paths[0].name, paths[2].name]  # the newest last
    assert 'cannot be compared' in ' '.join(lines[-3])
    assert [run['name'] for run in comparable_runs(paths[0])] == [paths[0].name, paths[2].name]


def test_the_exact_loss_is_added_and_a_model_that_no_longer_is_what_was_saved_is_named(
        tmp_path, table_of):
    gpt = import_script(tmp_path, 'gpt.py')
    gpt.train()
    exact = exact_loss(gpt.model, gpt.val_data, gpt.block_size)
    [path] = tmp_path.glob('gpt-*.pt')
    saved = torch.load(path)
    torch.save({**saved, 'history': [*saved['history'], (20, 1.0, 9.0)]}, path)  # it went on badly
    import_script(tmp_path, 'gpt.py', block_size=12)  # the file's settings count
    line = table_of('--exact')[1]
    assert float(line[7]) == pytest.approx(exact, abs=6e-5) and len(line) == 8
    for text, edits, words in [
            (TEXT, [('F.relu(out)', 'F.gelu(out) + 1')], 'no longer reaches the loss'),
            (TEXT[::-1], [], 'no longer reaches the loss'),
            (TEXT.lower(), [], 'not measured: its text has changed'),
            (TEXT, [('nn.Linear(n_embd, 4 * n_embd)', 'nn.Linear(n_embd, 4 * n_embd, bias=False)')],
             'it does not fit the gpt.py beside it')]:
        import_script(tmp_path, 'gpt.py', text, *edits)
        assert words in ' '.join(table_of('--exact')[1])


def test_folders_and_files_are_named_and_what_is_no_run_is_left_out(tmp_path, table_of, capsys):
    one, other = run_of(tmp_path / 'one', 4.0, 3.0), run_of(tmp_path / 'other', 4.0, 3.0)
    (tmp_path / 'one' / 'gpt-2026-01-01-000000-000000.pt').write_bytes(b'half a file')
    assert [line[0] for line in table_of(tmp_path / 'one', other)[1:3]] == [str(one), str(other)]
    runs.main([str(tmp_path / 'one')], tmp_path)
    assert 'gpt-2026-01-01-000000-000000.pt is left out' in capsys.readouterr().err
    assert 'there is no run' in exit_message(runs.main, [], tmp_path)


def test_a_gpt_pt_of_the_older_format_comes_first_and_has_no_losses(tmp_path, table_of):
    path, other = run_of(tmp_path, 4.0, 3.0), run_of(tmp_path, 4.0, 3.0, seed=5)
    saved = torch.load(path)
    torch.save({'model': saved['model'], 'chars': saved['chars'], 'sizes': (16, 16, 2, 2)},
               tmp_path / 'gpt.pt')
    lines = [line for line in table_of() if line and line[0].startswith('gpt')]
    assert lines[0][0] == 'gpt.pt' and lines[0][-4:] == ['-'] * 4 and lines[1][0] == path.name
    assert [run['name'] for run in comparable_runs(path)] == [path.name, other.name]
