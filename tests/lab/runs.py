"""The runs in a folder: what their settings were, how far they came.

    python tests/lab/runs.py                  the runs in this folder, the newest last
    python tests/lab/runs.py try old/gpt.pt   those in these folders, and these files
    --exact                                   with the exact loss of each, which compares them all

Each run of gpt.py keeps its settings and losses in its file, gpt-DATE.pt.
"""
import argparse
import sys
from pathlib import Path

import torch

from exact_loss import exact_loss
from scripts import PROJECT, SIZES, find_runs, hyperparameters_of, load, load_checkpoint

# Runs that share these estimate their losses on the same passages, so their losses can be compared.
SHARED = ('batch_size', 'block_size', 'eval_iters', 'text_length')


def read_run(path):
    """What the file of a run says: a dictionary with path, parameters, settings, history, chars."""
    checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    settings = checkpoint.get('settings') or dict(zip(SIZES, checkpoint['sizes']))
    return {'path': path, 'settings': settings, 'history': checkpoint.get('history', []),
            'parameters': sum(weight.numel() for weight in checkpoint['model'].values()),
            'chars': checkpoint['chars']}


def passages(run):
    """What decides on which passages a run estimates its losses."""
    return [*(run['settings'].get(name) for name in SHARED), run['chars']]


def comparable_runs(path):
    """Name and history of the run in this file, and of those beside it that can be compared."""
    own = read_run(path)
    others = [read_run(other) for other in find_runs(path.absolute().parent)
              if other.name != path.name]
    others = [run for run in others if run['history'] and passages(run) == passages(own)]
    return [{'name': run['path'].name, 'path': str(run['path']), 'history': run['history']}
            for run in (own, *others)]


def measured(run):
    """The exact loss of a run, and a remark if its model is no longer what was saved."""
    try:
        model = load_checkpoint(run['path']).model
    except SystemExit:
        return '-', 'not measured: it does not fit the gpt.py beside it'
    script = run['path'].absolute().with_name('gpt.py')
    script = script if script.exists() else PROJECT / 'gpt.py'
    known = hyperparameters_of(script.read_text(encoding='utf-8'))
    settings = {**run['settings'], 'device': 'cpu'}
    gpt = load(script, **{name: value for name, value in settings.items() if name in known})
    if gpt.chars != run['chars']:
        return '-', 'not measured: its text has changed'
    gpt.model = model
    saved = min((val for step, _, val in run['history'] if step > 0), default=None)
    changed = saved is not None and abs(gpt.estimate_loss()['val'] - saved) > 0.001
    return (f'{exact_loss(model, gpt.val_data, gpt.block_size):.4f}',
            'no longer reaches the loss that it was saved with: its code or its text has changed'
            if changed else '')


def row(name, run, differing, exact):
    """What the table says of a run: a dictionary from the head of a column to its text."""
    history, settings = run['history'], run['settings']
    cells = {'run': name, 'parameters': f"{run['parameters']:,}"}
    cells.update((name, str(settings.get(name, '-'))) for name in differing)
    trained = [report for report in history if report[0] > 0]
    step, _, best = min(trained, key=lambda report: report[2], default=('-', None, None))
    # Of a run that was stopped, or is still going on, the last report is not the end.
    cells['steps'] = f"{history[-1][0]} of {settings['max_iters']}" if history else '-'
    cells['best val loss'] = f'{best:.4f}' if trained else '-'
    cells['at step'] = str(step)
    if exact:
        cells['exact loss'], cells[''] = measured(run)
    return cells


def table(rows):
    """The lines of a table: numbers to the right, names and remarks to the left."""
    widths = {name: max(len(name), *(len(cells[name]) for cells in rows)) for name in rows[0]}
    return ['  '.join(cells[name].ljust(width) if name in ('run', '') else cells[name].rjust(width)
                      for name, width in widths.items()).rstrip()
            for cells in [{name: name for name in widths}, *rows]]


def main(argv=None, project=PROJECT):
    parser = argparse.ArgumentParser(description='The runs in a folder: their settings and losses.')
    parser.add_argument('paths', nargs='*', type=Path, metavar='path', default=[project],
                        help='a folder, or the file of a run (default: this project)')
    parser.add_argument('--exact', action='store_true',
                        help='add the exact validation loss of each run')
    arguments = parser.parse_args(argv)
    runs = []
    for path in arguments.paths:
        for file in find_runs(path) if path.is_dir() else [path]:
            try:
                runs.append(read_run(file))
            except Exception as error:  # torch raises errors of many types
                print(f'{file} is left out, it is not of a run: {error!r:.100}', file=sys.stderr)
    if not runs:
        sys.exit('Error: there is no run: train with python gpt.py, or name another folder')
    runs.sort(key=lambda run: (run['path'].name != 'gpt.pt', run['path'].name))

    names = dict.fromkeys(name for run in runs for name in run['settings'])
    differing = [name for name in names if len({
        run['settings'][name] for run in runs if name in run['settings']}) > 1]
    same = [f'{name} = {value}' for name, value in runs[-1]['settings'].items()
            if name not in differing]
    one_folder = len({run['path'].parent for run in runs}) == 1
    groups = []  # of runs whose losses can be compared, in the order of their newest one
    for run in reversed(runs):
        comparable = [group for group in groups if passages(group[0]) == passages(run)]
        comparable[0].insert(0, run) if comparable else groups.insert(0, [run])
    for group in groups:
        if len(groups) > 1:
            print('Estimated on the same passages, with ' + ', '.join(
                f"{name} = {group[0]['settings'].get(name, '?')}" for name in SHARED) + ':')
        print(*table([row(run['path'].name if one_folder else str(run['path']), run, differing,
                          arguments.exact) for run in group]), '', sep='\n')
    print(f'The same in all: {", ".join(same)}')
    if len(groups) > 1:
        print('Losses of different tables cannot be compared' + (
            ', only exact ones of the same text.' if arguments.exact else ': --exact helps.'))
    print('With the default settings, seeds alone make a difference of up to 0.02 after 10,000 '
          'steps, of 0.04\nafter 1,000, and of more before that: less may be chance.')


if __name__ == '__main__':
    main()
