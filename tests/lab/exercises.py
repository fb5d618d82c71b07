"""The exercises in tests/lab/README.md, worked: makes the changes in solutions.py, and measures.

    python tests/lab/exercises.py             lists them
    python tests/lab/exercises.py 3           trains a copy of gpt.py for each change of exercise 3
    python tests/lab/exercises.py 3 --show    prints the changes instead, as diffs
    python tests/lab/exercises.py --all       measures all (about 70 minutes): a line for each
    python tests/lab/exercises.py --parts     measures what each part of gpt.py is worth: a table

Everything runs on the CPU and in temporary folders: your gpt.py and your models are never touched.
It starts from the gpt.py here, which must be unedited. --steps 100 trains for 100 steps only.
"""
import argparse
import difflib
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from scripts import PROJECT, edited, find_checkpoint, load, load_checkpoint
from exact_loss import exact_loss
from solutions import EXERCISES, PARTS, change

# The hyperparameters with which the figures in tests/lab/README.md were measured.
DEFAULTS = dict(batch_size=8, block_size=128, max_iters=10_000, eval_interval=500, eval_iters=30,
                learning_rate=1.5e-3, warmup_iters=100, weight_decay=0.3, n_embd=128, n_head=4,
                n_layer=3, dropout=0.0, temperature=0.8, top_k=None, seed=1337)


def solution(variant, source, steps=None, **settings):
    """The source of gpt.py with a variant's edits; ValueError where they do not fit."""
    steps = steps or variant.steps
    values = {**({'max_iters': steps} if steps else {}), **variant.settings, **settings}
    try:
        return edited(source, *variant.edits, **values)
    except ValueError as error:
        raise ValueError(f'gpt.py must be unedited: undo your edits ({error})') from None


def refuse_edits(source):
    """ValueError if gpt.py has other hyperparameters, or other lines where an exercise edits it."""
    gpt = load(PROJECT / 'gpt.py', device='cpu')
    for name, value in DEFAULTS.items():
        if getattr(gpt, name) != value:
            raise ValueError(f'gpt.py must be unedited: undo your edits (the figures are for '
                             f'{name} = {value}, not {getattr(gpt, name)})')
    for variants in [PARTS, *(exercise.variants for exercise in EXERCISES.values())]:
        for variant in variants.values():
            solution(variant, source)


def prepare(folder, variant, source, text, steps=None, **settings):
    """Writes a variant's gpt.py, for the CPU, and its input.txt into a folder; returns the text."""
    if variant.text:
        text = variant.text(text)
    (folder / 'input.txt').write_text(text, encoding='utf-8')
    source = solution(variant, source, steps, device='cpu', **settings)
    (folder / 'gpt.py').write_text(source, encoding='utf-8')
    return text


def sample_arguments(variant):
    """The arguments of sample.py, with a variant's settings."""
    return ['The ', *(text for name, value in variant.settings.items()
                      for text in (f'--{name.replace("_", "-")}', str(value)))]


def measure(variant, source, steps=None, echo=False, **settings):
    """Runs a variant in a folder of its own; a dictionary of results."""
    saved = find_checkpoint(PROJECT) if variant.run in ('sample', 'cache') else None
    text = (PROJECT / 'input.txt').read_text(encoding='utf-8-sig')
    if variant.run == 'sample':
        program = Path(__file__).with_name('sample.py')  # it only reads
        command = [program, *sample_arguments(variant), '--checkpoint', saved]
        return describe(run_python(command, echo), text)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text = prepare(folder, variant, source, text, steps, **settings)
        if variant.run == 'cache':
            shutil.copy(saved, folder)
            return compare_caches(saved, folder / saved.name)
        if variant.run == 'speed':
            plain = change(run='speed', **variant.settings)
            (folder / 'plain.py').write_text(solution(plain, source, device='cpu', **settings),
                                             encoding='utf-8')
            return compare_steps(folder / 'plain.py', folder / 'gpt.py', steps or 100)
        torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
        command = [*(torchrun if variant.run == 'torchrun' else []), folder / 'gpt.py']
        out = run_python(command, echo)
        longer = longer_contexts(folder) if variant.run == 'longer' else 'not possible'
    return {**read_results(out, text), 'longer': longer}


def run_python(arguments, echo=False):
    """Runs Python with these arguments; what it prints. ValueError if it fails."""
    out = ''
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, encoding='utf-8',
                          env={**os.environ, 'PYTHONIOENCODING': 'utf-8'}) as process:
        for line in process.stdout:
            out += line
            if echo:
                print('   ', line, end='', flush=True)
    if process.returncode and 'AssertionError: the loss is not finite' not in out:
        raise ValueError(f'python {" ".join(map(str, arguments))} failed: {out.strip()[-1000:]}')
    return out


def read_results(out, text):
    """What a training run on this text printed, in figures; ValueError if it printed no losses.

    train, val, best and letters are losses in nats per character; letters is what a model scores
    that knows only how frequent each character is.
    """
    found = re.findall(r'(?m)^step (\d+) of \d+: train loss (\S+), val loss (\S+), \d+ s$', out)
    if not found:
        raise ValueError(f'gpt.py printed no losses: {out.strip()[-1000:]}')
    _, train_loss, val_loss = found[-1]
    best, best_step = min((float(val), int(step)) for step, _, val in found)
    train, val = text[:len(text) * 9 // 10], text[len(text) * 9 // 10:]
    counts = Counter(train + ''.join(set(text)))  # no character has a count of 0
    letters = -sum(n * math.log(counts[c] / counts.total()) for c, n in Counter(val).items())
    return {'train': float(train_loss), 'val': float(val_loss), 'best': best,
            'best_step': best_step, 'letters': letters / len(val),
            **describe(out.partition('weights generate:\n')[2], text)}


def describe(generated, text):
    """The beginning of a generated text, and which part of its words occurs in this text."""
    words, known = (re.findall("[A-Za-z']+", string) for string in (generated, text))
    known = set(known)
    return {'sample': ' / '.join(generated.split('\n')).replace('`', "'").strip()[:60],
            'words': sum(word in known for word in words) / max(len(words), 1)}


def longer_contexts(folder):
    """The exact losses of a trained model that reads once, twice and four times block_size."""
    gpt, saved = load(folder / 'gpt.py'), load_checkpoint(folder)
    return ', '.join(f'{exact_loss(saved.model, gpt.val_data, n * gpt.block_size):.2f}'
                     for n in (1, 2, 4))


def compare_caches(*checkpoints):
    """Generates without the cache and with it, and compares text and time: the same model in two
    places, each with its gpt.py.
    """
    torch.set_num_threads(1)
    texts, times = [], []
    for path in checkpoints:
        gpt = load_checkpoint(path)
        gpt.top_k = 1  # nothing is left to chance
        start = torch.zeros((1, 1), dtype=torch.long)
        gpt.model.generate(start, 10)  # the first call is slower
        started = time.time()
        texts.append(gpt.model.generate(start, 500)[0, 1:].tolist())
        times.append(time.time() - started)
    same = next((i for i, (a, b) in enumerate(zip(*texts)) if a != b), 500)
    return {'same': same, 'total': 500, 'ratio': times[1] / times[0]}


def compare_steps(plain, fused, pairs):
    """Trains with two versions of gpt.py in turn, and compares logits and the time of a step.

    In turn, so that it does not matter if the machine is slower for a while.
    """
    torch.set_num_threads(1)
    versions = [load(path) for path in (plain, fused)]  # from the same seed: the same weights
    x, y = versions[0].get_batch('train')
    logits = [gpt.model(x)[0] for gpt in versions]
    optimizers = [torch.optim.AdamW(gpt.model.parameters(), lr=gpt.learning_rate, fused=True)
                  for gpt in versions]
    times = [[], []]
    for _ in range(3 + pairs):
        for gpt, optimizer, seconds in zip(versions, optimizers, times):
            started = time.perf_counter()
            loss = gpt.model(x, y)[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - started)
    plain_time, fused_time = (statistics.median(seconds[3:]) for seconds in times)  # 3 to warm up
    return {'difference': (logits[0] - logits[1]).abs().max().item(),
            'ratio': fused_time / plain_time}


def show(number, source):
    """Prints an exercise's variants as diffs of gpt.py."""
    for name, variant in EXERCISES[number].variants.items():
        print(f'# {name}')
        if variant.run == 'sample':
            prompt, *options = sample_arguments(variant)
            print(f'python tests/lab/sample.py "{prompt}"', *options)
            continue
        if variant.text:
            print(f'# input.txt: {variant.text.__doc__}')
        solved = solution(variant, source)
        print(*difflib.unified_diff(source.splitlines(), solved.splitlines(), 'gpt.py',
                                    'gpt.py', lineterm=''), '', sep='\n')


def work(number, source, steps=None):
    """Measures an exercise's variants, and what they are compared with."""
    exercise = EXERCISES[number]
    print(f'{number}. {exercise.title}\n')
    first = next(iter(exercise.variants.values()))
    as_it_is = change(steps=first.steps, run='sample' if first.run == 'sample' else 'train')
    runs = {**({'gpt.py as it is': as_it_is} if exercise.compare else {}), **exercise.variants}
    lines = ['\nvalidation loss, in nats per character' if '{val' in exercise.report else '']
    for name, variant in runs.items():
        print(f'{name}:', flush=True)
        result = measure(variant, source, steps, echo=True)
        lines.append(f'{name}: {exercise.report.format(**result)}')
    if steps and first.steps:
        lines.append(f'(after {steps} steps; the figures in tests/lab/README.md are of full runs)')
    print(*lines, f'\nWhat to expect, and why: exercise {number} in tests/lab/README.md', sep='\n')


def work_all(source, steps=None):
    """Measures everything, two at a time where times do not count; prints a line for each."""
    os.environ['OMP_NUM_THREADS'] = '1'
    started = time.time()
    jobs = [(f'gpt.py as it is, {steps:,} steps', '{val:.2f}', change(steps=steps))
            for steps in (1000, 2000, 3000)]
    jobs += [(f'{number}. {exercise.title}: {name}', exercise.report, variant)
             for number, exercise in EXERCISES.items()
             for name, variant in exercise.variants.items()]

    def work_one(job):
        name, report, variant = job
        try:
            print(f'{name}: {report.format(**measure(variant, source, steps))}', flush=True)
        except (ValueError, SystemExit) as error:  # SystemExit: of load_checkpoint
            print(f'{name}: failed: {error}', flush=True)

    alone = [job for job in jobs if job[2].run in ('cache', 'torchrun', 'speed')]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work_one, [job for job in jobs if job not in alone]))
    for job in alone:
        work_one(job)
    print(f'measured in {(time.time() - started) / 60:.0f} minutes')


def work_parts(source, steps=None, seeds=3):
    """Measures gpt.py without each of its parts, two at a time; prints a table in Markdown."""
    os.environ['OMP_NUM_THREADS'] = '1'
    started = time.time()
    jobs = [(part, seed) for part in PARTS for seed in [1337, *range(1, seeds)]]

    def loss(job):
        part, seed = job
        return measure(PARTS[part], source, steps, seed=seed)['val']

    print('| without | loss, mean | with each seed |\n|---|---|---|')
    with ThreadPoolExecutor(2) as pool:
        losses = pool.map(loss, jobs)
        for part in PARTS:
            these = [next(losses) for _ in range(seeds)]
            each = ', '.join(f'{loss:.3f}' for loss in these)
            print(f'| {part} | {statistics.mean(these):.3f} | {each} |', flush=True)
    print(f'\nmeasured in {(time.time() - started) / 60:.0f} minutes')


def main():
    parser = argparse.ArgumentParser(
        description='The exercises in tests/lab/README.md, worked. Without a number: lists them.')
    parser.add_argument('number', nargs='?', type=int, help='the exercise')
    parser.add_argument('--show', action='store_true', help='print its solution as a diff')
    parser.add_argument('--all', action='store_true', help='measure all (about 70 minutes)')
    parser.add_argument('--parts', action='store_true', help='measure gpt.py without each part')
    parser.add_argument('--seeds', type=int, default=3, help='runs of each row of --parts')
    parser.add_argument('--steps', type=int, help='train for this many steps')
    arguments = parser.parse_args()
    number, steps = arguments.number, arguments.steps
    if number is not None and number not in EXERCISES:
        parser.error(f'the exercises have the numbers 0 to {len(EXERCISES) - 1}')
    if (steps is not None and steps < 1) or arguments.seeds < 1:
        parser.error('--steps and --seeds: use a whole number above 0')
    if arguments.show and not number:
        parser.error('--show needs the number of an exercise, 1 or more')
    source = (PROJECT / 'gpt.py').read_text(encoding='utf-8')
    if arguments.show:
        show(number, source)
    elif arguments.all:
        refuse_edits(source)
        work_all(source, steps)
    elif arguments.parts:
        refuse_edits(source)
        work_parts(source, steps, arguments.seeds)
    elif number is None:
        print(*(f'{i:2}. {exercise.title}' for i, exercise in EXERCISES.items()), sep='\n')
    elif not EXERCISES[number].variants:
        print(f'Nothing to run: do exercise {number} as tests/lab/README.md says')
    else:
        refuse_edits(source)
        work(number, source, steps)


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
