"""The exercises in tests/lab/README.md, worked: makes the changes in solutions.py, and measures.

    python tests/lab/exercises.py             lists them, and says from which code our figures are
    python tests/lab/exercises.py 3           trains a copy of gpt.py for each change of exercise 3
    python tests/lab/exercises.py 3 --show    prints the changes instead, as diffs

Everything runs on the CPU and in temporary folders: your gpt.py and your models are never touched.
Each change is made in a copy of the project's gpt.py, with the settings that our figures were
measured with. --steps 100 trains for 100 steps only.

Our figures come from a record, results.json. These commands write it. They skip what it has from
the same code, so they can be stopped, and go on later:

    python tests/lab/exercises.py --all       measures all exercises (more than an hour)
    python tests/lab/exercises.py --parts     measures what each part of gpt.py is worth
    python tests/lab/exercises.py --results   measures the results in the main README, on our text
                                              and on the classic corpus, in try/classic.txt
    python tests/lab/exercises.py 3 --record  measures exercise 3; --seeds 3 with three seeds each
    python tests/lab/exercises.py --tables    measures nothing: prints the tables of the READMEs
"""
import argparse
import difflib
import inspect
import os
import signal
import statistics
import sys
import time
from functools import partial
from multiprocessing import get_context

import torch

from measure import (DEFAULTS, compare_caches, compare_steps, fine_tune, measure_positions,
                     prepared, sample, solution, train, train_in_two_processes, train_with_reward)
from record import ON_EACH_PROCESSOR, RECORD, Record, code_hash, processor, short_hash
from scripts import PROJECT, find_runs, load, read_checkpoint
from solutions import EXERCISES, FULL_LENGTH, GROUPS, RESULTS, TABLES, change

SEEDS = [1337, 1, 2]
FROM_NEWEST_RUN = (sample, compare_caches, measure_positions, fine_tune, train_with_reward)
Pool = get_context('spawn').Pool  # of processes: threads would share the random numbers
ALONE = (compare_caches, compare_steps, train_in_two_processes)  # on the machine: times count


def sample_command(variant):
    """The command that does what a variant of exercise 6 does."""
    options = (f'--{name.replace("_", "-")} {value}' for name, value in variant.settings.items())
    return ' '.join(['python tests/lab/sample.py "The "', *options])


def show(number, project):
    """Prints an exercise's variants as diffs of the script that they change."""
    for name, variant in EXERCISES[number].variants.items():
        print(f'# {name}')
        if variant.measure is sample:
            print(sample_command(variant))
            continue
        if variant.measure is measure_positions:
            print(inspect.getsource(measure_positions))
            continue
        if variant.text:
            text = variant.text if not isinstance(variant.text, partial) else variant.text.func
            print('# input.txt:', *text.__doc__.split())
        source = (project / variant.script).read_text(encoding='utf-8')
        steps = {'max_iters': variant.steps} if variant.steps else {}
        solved = solution(variant, source, **steps, **variant.settings)
        print(*difflib.unified_diff(source.splitlines(), solved.splitlines(), variant.script,
                                    variant.script, lineterm=''), '', sep='\n')


def work(number, project, steps=None):
    """Measures an exercise's variants, and what they are compared with."""
    exercise = EXERCISES[number]
    print(f'{number}. {exercise.title}\n')
    first = next(iter(exercise.variants.values()))
    as_it_is = change(steps=first.steps, measure=sample if first.measure is sample else train)
    runs = {**({'gpt.py as it is': as_it_is} if exercise.compare else {}), **exercise.variants}
    gpt = load(project / 'gpt.py', device='cpu')
    others = [f'{name} = {value!r}' for name, value in DEFAULTS.items()
              if name not in ('max_iters', 'device') and getattr(gpt, name, value) != value]
    if others:
        print(f'In the copies, as our figures were measured: {", ".join(others)}\n')
    for variant in exercise.variants.values():  # does each fit?
        prepared(variant, project)
    lines = ['\nvalidation loss, in nats per character' if '{val' in exercise.report else '']
    for name, variant in runs.items():
        print(f'{name}:', flush=True)
        result = variant.measure(variant, project, steps, echo=True)
        lines.append(f'{name}: {exercise.report.format(**result)}')
    if steps and first.steps:
        lines.append(f'(after {steps} steps; the figures in tests/lab/README.md are of full runs)')
    print(*lines, f'\nWhat to expect, and why: exercise {number} in tests/lab/README.md', sep='\n')


def conditions(group, name, seed, project):
    """What decides on the result of a run, as the fields of a row of the record."""
    variant = GROUPS[group][name]
    text, source = prepared(variant, project, seed=seed)
    fields = {'code': code_hash(source, DEFAULTS), 'seed': seed,
              'measure': variant.measure.__name__,
              'text': f'{len(text):,} characters, {short_hash(text)}'}
    if variant.measure in FROM_NEWEST_RUN and find_runs(project):
        run = read_checkpoint(find_runs(project)[-1])
        fields['newest run'] = f"seed {run['settings'].get('seed')}, last {run['history'][-1:]}"
    if group in ON_EACH_PROCESSOR:
        fields['processor'] = processor()
    return fields


def leave_ctrl_c_to_others():
    """For a worker: Ctrl-C reaches the script that it runs, and the process that will end it."""
    signal.signal(signal.SIGINT, lambda *_: None)


def measure_one(group, name, seed, project, steps):
    """The results of a run, or the reason why there are none, and the seconds that it took."""
    variant, started = GROUPS[group][name], time.time()
    try:
        results = variant.measure(variant, project, steps, seed=seed)
    except (ValueError, SystemExit) as error:  # SystemExit: of find_checkpoint
        return str(error), 0
    return ({key: round(value, 6) if isinstance(value, float) else value
             for key, value in results.items()}, round(time.time() - started))


def measure_all(jobs, project, record, steps=None):
    """Measures jobs, (group, variant, seed), and records them: yields the row of each.

    What the record has from the same code is not measured again. The runs are processes of their
    own, with one thread each: two at a time, or one where times count.
    """
    os.environ['OMP_NUM_THREADS'] = '1'
    for workers in (2, 1):
        with Pool(workers, leave_ctrl_c_to_others) as pool:
            runs, waiting = {}, []  # runs: by their conditions, so that none is made twice
            for job in jobs:
                if (GROUPS[job[0]][job[1]].measure in ALONE) != (workers == 1):
                    continue
                try:
                    same = conditions(*job, project)
                except ValueError as error:  # the code was changed where this one edits it
                    same = {'results': str(error)}
                waiting.append((job, same))
                if 'results' not in same and str(same) not in runs and (
                        steps or not record.find(**same)):
                    runs[str(same)] = pool.apply_async(measure_one, (*job, project, steps))
            for (group, name, seed), same in waiting:
                row = {'exercise': group, 'variant': name, 'seed': seed}
                if 'results' in same:
                    row.update(same)
                elif str(same) in runs:
                    results, seconds = runs[str(same)].get()
                    row.update(same, steps=steps or GROUPS[group][name].steps, threads=1,
                               seconds=seconds, torch=torch.__version__,
                               processor=processor(), results=results)
                else:
                    row = {**record.find(**same)[0], **row}
                if not steps and not isinstance(row['results'], str) and row not in record.rows:
                    record.add(row)
                yield row


def work_all(groups, project, record, steps=None, seeds=1):
    """Measures all variants of these groups; prints a line for each.

    gpt.py as it is always has all seeds: they show how far runs of one version differ.
    """
    started = time.time()
    jobs = [(group, name, seed) for group in groups for name in GROUPS[group]
            for seed in (SEEDS if group == 'plain' else SEEDS[:seeds])]
    for row in measure_all(jobs, project, record, steps):
        print(f"{row['exercise']}. {row['variant']}, seed {row['seed']}: " + (
            f"failed: {row['results']}" if isinstance(row['results'], str) else
            f"{report(row['exercise']).format(**row['results'])} ({row['seconds']} s)"), flush=True)
    print(f'measured in {(time.time() - started) / 60:.0f} minutes')


def report(group):
    """How the results of a group are written."""
    if group in EXERCISES:
        return EXERCISES[group].report
    return '{val:.3f}' if group in ('plain', 'parts') else '{exact:.4f}'


def cell(record, group, name, form):
    """The results of a variant, one for each seed, as they stand in a table; '?' without any."""
    rows = (record.find(exercise=group, variant=name)
            or record.find(exercise='plain', variant=name, seed=SEEDS[0]))
    rows.sort(key=lambda row: SEEDS.index(row['seed']))
    return ', '.join(form.format(**row['results']) for row in rows) or '?'


def spread(record, group, name):
    """The mean of the exact losses of a variant, and the lowest and the highest of several."""
    losses = [row['results']['exact'] for row in record.find(exercise=group, variant=name)]
    if not losses:
        return '?'
    lowest, mean, highest = (f'{loss:.3f}' for loss in (
        min(losses), statistics.mean(losses), max(losses)))
    return mean if lowest == highest else f'{mean} ({lowest} to {highest})'


def tables(record):
    """The lines of each table of the READMEs that the record decides, by group."""
    parts = []
    for name in GROUPS['parts']:
        losses = [row['results']['val'] for row in record.find(exercise='parts', variant=name)]
        mean = f'{statistics.mean(losses):.3f}' if losses else '?'
        parts.append(f"| {name} | {mean} | {cell(record, 'parts', name, '{val:.3f}')} |")
    results = [f"| {name} | {spread(record, 'our text', name)} | "
               f"{spread(record, 'classic corpus', name)} |" for name in RESULTS]
    full_length = [f"| {name} | {spread(record, 'full length', name)} |" for name in FULL_LENGTH]
    unchanged = f"| unchanged | {spread(record, 'classic corpus', '`gpt.py`, the default')} |"
    return {'results': results, 'parts': parts, 21: [unchanged, *full_length]} | {
        number: ['| ' + ' | '.join([label, *(cell(record, number, *each) for each in cells)]) + ' |'
                 for label, cells in rows]
        for number, rows in TABLES.items()}


def state(group, project, record):
    """Which code the figures of an exercise are from."""
    for name in GROUPS[group]:
        try:
            code = conditions(group, name, SEEDS[0], project)['code']
        except ValueError as error:
            return f'({error})'
        if not record.find(exercise=group, variant=name, code=code):
            return '(our figures are from older code)'
    return ''


def main(argv=None, project=PROJECT, record_path=RECORD):
    parser = argparse.ArgumentParser(
        description='The exercises in tests/lab/README.md, worked. Without a number: lists them.')
    parser.add_argument('number', nargs='?', type=int, help='the exercise')
    parser.add_argument('--show', action='store_true', help='print its solution as a diff')
    parser.add_argument('--record', action='store_true', help='measure it for the record')
    parser.add_argument('--all', action='store_true', help='measure all for the record')
    parser.add_argument('--parts', action='store_true', help='measure gpt.py without each part')
    parser.add_argument('--results', action='store_true', help='measure the table of results')
    parser.add_argument('--tables', action='store_true', help="print the READMEs' tables")
    parser.add_argument('--seeds', type=int, choices=[1, 2, 3], help='how many, for the record '
                        '(default: 3 for --parts and --results, otherwise 1)')
    parser.add_argument('--steps', type=int, help='train for this many steps')
    arguments = parser.parse_args(argv)
    number, steps, seeds = arguments.number, arguments.steps, arguments.seeds
    record = Record(record_path)
    if number is not None and number not in EXERCISES:
        parser.error(f'the exercises have the numbers 0 to {len(EXERCISES) - 1}')
    if steps is not None and steps < 1:
        parser.error('--steps: use a whole number above 0')
    if (arguments.show or arguments.record) and not number:
        parser.error('--show and --record need the number of an exercise, 1 or more')
    if arguments.show:
        show(number, project)
    elif arguments.all:
        work_all(['plain', *EXERCISES, 'full length'], project, record, steps, seeds or 1)
    elif arguments.parts:
        work_all(['parts'], project, record, steps, seeds or 3)
        print(*tables(record)['parts'], sep='\n')
    elif arguments.results:
        work_all(['our text', 'classic corpus'], project, record, steps, seeds or 3)
        print(*tables(record)['results'], sep='\n')
    elif arguments.record:
        work_all([number], project, record, steps, seeds or 1)
    elif arguments.tables:
        for group, lines in tables(record).items():
            print(f'{group}:', *lines, '', sep='\n')
    elif number is None:
        print(*(f'{i:2}. {exercise.title} {state(i, project, record)}'.rstrip()
                for i, exercise in EXERCISES.items()), sep='\n')
    elif not EXERCISES[number].variants:
        print(f'Nothing to run: do exercise {number} as tests/lab/README.md says')
    else:
        work(number, project, steps)


if __name__ == '__main__':
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace', line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('Stopped by Ctrl-C.')
    except BrokenPipeError:  # `| head -1`, for example
        os._exit(130)
    except (ValueError, OSError, AssertionError) as error:  # of gpt.py, too: it asserts
        sys.exit(f'Error: {error}')
