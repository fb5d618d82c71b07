"""The exercises in tests/lab/README.md, worked: makes the changes in solutions.py, and measures.

    python tests/lab/exercises.py             lists them
    python tests/lab/exercises.py 3           trains a copy of gpt.py for each change of exercise 3
    python tests/lab/exercises.py 3 --show    prints the changes instead, as diffs
    python tests/lab/exercises.py --all       measures all (about 70 minutes): a line for each
    python tests/lab/exercises.py --parts     measures what each part of gpt.py is worth: a table

Everything runs on the CPU and in temporary folders: your gpt.py and your models are never touched.
Each change is made in a copy of your gpt.py, with the settings that the figures were measured with.
--steps 100 trains for 100 steps only.
"""
import argparse
import difflib
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from measure import (DEFAULTS, compare_caches, compare_steps, sample, solution, train,
                     train_in_two_processes)
from scripts import PROJECT, load
from solutions import EXERCISES, PARTS, change


def sample_command(variant):
    """The command that does what a variant of exercise 6 does."""
    options = (f'--{name.replace("_", "-")} {value}' for name, value in variant.settings.items())
    return ' '.join(['python tests/lab/sample.py "The "', *options])


def show(number, project):
    """Prints an exercise's variants as diffs of gpt.py."""
    source = (project / 'gpt.py').read_text(encoding='utf-8')
    for name, variant in EXERCISES[number].variants.items():
        print(f'# {name}')
        if variant.measure is sample:
            print(sample_command(variant))
            continue
        if variant.text:
            print(f'# input.txt: {variant.text.__doc__}')
        steps = {'max_iters': variant.steps} if variant.steps else {}
        solved = solution(variant, source, **steps, **variant.settings)
        print(*difflib.unified_diff(source.splitlines(), solved.splitlines(), 'gpt.py',
                                    'gpt.py', lineterm=''), '', sep='\n')


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
        print('In the copies, as our figures were measured:', ', '.join(others), '\n')
    for variant in exercise.variants.values():  # does each fit?
        solution(variant, (project / 'gpt.py').read_text(encoding='utf-8'))
    lines = ['\nvalidation loss, in nats per character' if '{val' in exercise.report else '']
    for name, variant in runs.items():
        print(f'{name}:', flush=True)
        result = variant.measure(variant, project, steps, echo=True)
        lines.append(f'{name}: {exercise.report.format(**result)}')
    if steps and first.steps:
        lines.append(f'(after {steps} steps; the figures in tests/lab/README.md are of full runs)')
    print(*lines, f'\nWhat to expect, and why: exercise {number} in tests/lab/README.md', sep='\n')


def work_all(project, steps=None):
    """Measures everything, two at a time where times do not count; prints a line for each."""
    os.environ['OMP_NUM_THREADS'] = '1'
    started = time.time()
    jobs = [(f'gpt.py as it is, {number:,} steps', '{val:.2f}', change(steps=number))
            for number in ([steps] if steps else [1000, 2000, 3000])]
    jobs += [(f'{number}. {exercise.title}: {name}', exercise.report, variant)
             for number, exercise in EXERCISES.items()
             for name, variant in exercise.variants.items()]

    def work_one(job):
        name, report, variant = job
        try:
            result = variant.measure(variant, project, steps)
            print(f'{name}: {report.format(**result)}', flush=True)
        except (ValueError, SystemExit) as error:  # SystemExit: of find_checkpoint
            print(f'{name}: failed: {error}', flush=True)

    alone = [job for job in jobs if job[2].measure in (
        compare_caches, compare_steps, train_in_two_processes)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work_one, [job for job in jobs if job not in alone]))
    for job in alone:
        work_one(job)
    print(f'measured in {(time.time() - started) / 60:.0f} minutes')


def work_parts(project, steps=None, seeds=3):
    """Measures gpt.py without each of its parts, two at a time; prints a table in Markdown."""
    os.environ['OMP_NUM_THREADS'] = '1'
    started = time.time()
    jobs = [(part, seed) for part in PARTS for seed in [1337, *range(1, seeds)]]

    def loss(job):
        part, seed = job
        return PARTS[part].measure(PARTS[part], project, steps, seed=seed)['val']

    print('| without | loss, mean | with each seed |\n|---|---|---|')
    with ThreadPoolExecutor(2) as pool:
        losses = pool.map(loss, jobs)
        for part in PARTS:
            these = [next(losses) for _ in range(seeds)]
            each = ', '.join(f'{loss:.3f}' for loss in these)
            print(f'| {part} | {statistics.mean(these):.3f} | {each} |', flush=True)
    print(f'\nmeasured in {(time.time() - started) / 60:.0f} minutes')


def main(argv=None, project=PROJECT):
    parser = argparse.ArgumentParser(
        description='The exercises in tests/lab/README.md, worked. Without a number: lists them.')
    parser.add_argument('number', nargs='?', type=int, help='the exercise')
    parser.add_argument('--show', action='store_true', help='print its solution as a diff')
    parser.add_argument('--all', action='store_true', help='measure all (about 70 minutes)')
    parser.add_argument('--parts', action='store_true', help='measure gpt.py without each part')
    parser.add_argument('--seeds', type=int, default=3, help='runs of each row of --parts')
    parser.add_argument('--steps', type=int, help='train for this many steps')
    arguments = parser.parse_args(argv)
    number, steps = arguments.number, arguments.steps
    if number is not None and number not in EXERCISES:
        parser.error(f'the exercises have the numbers 0 to {len(EXERCISES) - 1}')
    if (steps is not None and steps < 1) or arguments.seeds < 1:
        parser.error('--steps and --seeds: use a whole number above 0')
    if arguments.show and not number:
        parser.error('--show needs the number of an exercise, 1 or more')
    if arguments.show:
        show(number, project)
    elif arguments.all:
        work_all(project, steps)
    elif arguments.parts:
        work_parts(project, steps, arguments.seeds)
    elif number is None:
        print(*(f'{i:2}. {exercise.title}' for i, exercise in EXERCISES.items()), sep='\n')
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
