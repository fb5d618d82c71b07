"""The runs in a folder: what their settings were, how far they came.

    python tests/lab/runs.py                  the runs in this folder, the newest last
    python tests/lab/runs.py try old/gpt.pt   those in these folders, and these files
    --exact                                   with the exact loss of each, which compares them all

Each run of gpt.py keeps its settings and losses in its file, gpt-DATE.pt.
"""
import argparse
import sys
from pathlib import Path

from exact_loss import exact_loss_per_character, load_with_text, reaches_saved_loss
from scripts import PROJECT, find_runs, read_checkpoint

# Runs that share these estimate their losses on the same passages, so their losses can be compared.
SHARED = ('batch_size', 'block_size', 'eval_iters', 'text_length')


def read_runs(paths):
    """What the files of runs hold, as dictionaries, with their path; without what is no run."""
    runs = []
    for path in paths:
        try:
            runs.append({**read_checkpoint(path), 'path': path})
        except Exception as error:  # torch raises errors of many types
            print(f'{path} is left out, it is not of a run: {error!r:.100}', file=sys.stderr)
    return runs


def passages(run):
    """What decides on which passages a run estimates its losses, as text."""
    return str([*(run['settings'].get(name) for name in SHARED), run['chars']])


def comparable_runs(path):
    """Name, path and history of a run, and then of those beside it that can be compared with it."""
    beside = [other for other in find_runs(path.absolute().parent) if other.name != path.name]
    runs = read_runs([path, *beside])
    return [{'name': run['path'].name, 'path': str(run['path']), 'history': run['history']}
            for run in runs if passages(run) == passages(runs[0])]


def measured(run):
    """The exact loss of a run, and a remark if its model no longer has the loss that was saved."""
    try:
        gpt = load_with_text(run['path'])
    except (SystemExit, OSError, AssertionError):
        return '-', 'not measured: it does not fit the gpt.py beside it, or there is no text'
    if gpt.chars != run['chars']:
        return '-', 'not measured: its text has changed'
    return f'{exact_loss_per_character(gpt):.4f}', (
        '' if reaches_saved_loss(gpt, run) else
        'no longer reaches the loss that it was saved with: its code or its text has changed')


def row(name, run, differing, exact):
    """What the table says of a run, as a list of texts."""
    history, settings = run['history'], run['settings']
    parameters = sum(weight.numel() for weight in run['model'].values())
    trained = [report for report in history if report[0] > 0]
    step, _, best = min(trained, key=lambda report: report[2], default=('-', None, None))
    # Of a run that was stopped, or is still going on, the last report is not the end.
    return [name, f'{parameters:,}', *(str(settings.get(setting, '-')) for setting in differing),
            f"{history[-1][0]} of {settings['max_iters']}" if history else '-',
            f'{best:.4f}' if trained else '-', str(step),
            *(measured(run) if exact else ('', ''))]


def print_table(rows):
    """Prints numbers to the right, names and remarks to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *numbers, remark in rows:
        numbers = map(str.rjust, numbers, widths[1:])
        print('  '.join([name.ljust(widths[0]), *numbers, remark]).rstrip())
    print()


def main(argv=None, project=PROJECT):
    parser = argparse.ArgumentParser(description='The runs in a folder: their settings and losses.')
    parser.add_argument('paths', nargs='*', type=Path, metavar='path', default=[project],
                        help='a folder, or the file of a run (default: this project)')
    parser.add_argument('--exact', action='store_true',
                        help='add the exact validation loss of each run')
    arguments = parser.parse_args(argv)
    runs = read_runs([file for path in arguments.paths
                      for file in (find_runs(path) if path.is_dir() else [path])])
    if not runs:
        sys.exit('Error: there is no run: train with python gpt.py, or name another folder')
    runs.sort(key=lambda run: (run['path'].name != 'gpt.pt', run['path'].name))

    names = dict.fromkeys(name for run in runs for name in run['settings'])
    differing = [name for name in names if len({
        run['settings'][name] for run in runs if name in run['settings']}) > 1]
    same = [f'{name} = {value}' for name, value in runs[-1]['settings'].items()
            if name not in differing]
    differing = [name for name in differing if name not in SHARED]  # those stand above each table
    one_folder = len({run['path'].parent for run in runs}) == 1
    head = ['run', 'parameters', *differing, 'steps', 'best val loss', 'at step',
            'exact loss' if arguments.exact else '', '']
    groups = {}  # runs whose losses can be compared; the group of the newest run comes last
    for run in runs:
        groups[passages(run)] = [*groups.pop(passages(run), []), run]
    for group in groups.values():
        if len(groups) > 1:
            print('Estimated on the same passages, with ' + ', '.join(
                f"{name} = {group[0]['settings'].get(name, '?')}" for name in SHARED) + ':')
        print_table([head, *(row(run['path'].name if one_folder else str(run['path']), run,
                                 differing, arguments.exact) for run in group)])
    print(f'The same in all: {", ".join(same)}')
    if len(groups) > 1:
        print('Losses of different tables cannot be compared' + (
            ', only exact ones of the same text.' if arguments.exact else ': --exact helps.'))
    print('With the default settings, seeds alone make a difference of up to 0.02 after 10,000 '
          'steps, of 0.04\nafter 1,000, and of more before that: less may be chance.')


if __name__ == '__main__':
    main()
