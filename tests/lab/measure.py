"""How a change of gpt.py is measured: by training a copy of it, or with the newest run."""
import contextlib
import io
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
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from exact_loss import exact_loss, load_with_text, ngram_loss
from scripts import (SIZES, edited, find_checkpoint, hyperparameters_of, load, load_checkpoint,
                     read_checkpoint)

# The hyperparameters with which the figures in tests/lab/README.md were measured. They are set in
# the copy, so that it does not matter which ones gpt.py has at the moment.
DEFAULTS = dict(batch_size=8, block_size=128, max_iters=10_000, eval_interval=500, eval_iters=30,
                learning_rate=1.5e-3, warmup_iters=100, weight_decay=0.3, n_embd=128, n_head=4,
                n_layer=3, dropout=0.0, temperature=0.8, top_k=None, seed=1337, device='cpu')


@dataclass
class Variant:
    """One change of a script, and how it is measured."""
    edits: tuple  # (old text, new text): each old text occurs once, and is code without comment
    settings: dict  # hyperparameters, by name
    steps: int  # training steps
    measure: object  # one of the functions below
    text: object  # a function that makes another input.txt from ours, or None
    script: str = 'gpt.py'


def solution(variant, source, **settings):
    """The source of a script, edited as a variant says; ValueError where that does not fit."""
    try:
        return edited(source, *variant.edits, **{**variant.settings, **settings})
    except ValueError as error:
        raise ValueError(f'{variant.script} was changed where this exercise edits it ({error}): '
                         'put that back, or do the exercise by hand') from None


def prepared(variant, project, steps=None, **settings):
    """The text and the source with which a variant is measured."""
    text = (project / 'input.txt').read_text(encoding='utf-8-sig')
    source = (project / variant.script).read_text(encoding='utf-8')
    values = {}
    if variant.script == 'gpt.py':
        # A hyperparameter that your gpt.py no longer has needs no value.
        values = {name: DEFAULTS[name] for name in DEFAULTS if name in hyperparameters_of(source)}
        values['max_iters'] = steps or variant.steps or DEFAULTS['max_iters']
    source = solution(variant, source, **{**values, **variant.settings, **settings})
    return variant.text(text) if variant.text else text, source


def prepare(folder, variant, project, steps=None, **settings):
    """Writes a variant's script and its input.txt into a folder; returns the text."""
    text, source = prepared(variant, project, steps, **settings)
    (folder / 'input.txt').write_text(text, encoding='utf-8')
    (folder / variant.script).write_text(source, encoding='utf-8')
    return text


@contextlib.contextmanager
def trained(variant, project, steps=None, echo=False, launcher=(), start=None, **settings):
    """Trains a variant in a folder of its own: what it printed, in figures, and its saved model.

    start: the file of a run, from which the variant goes on; its sizes are those of the variant.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if start:
            shutil.copy(start, folder / 'start.pt')
            sizes = read_checkpoint(start)['settings']
            settings.update((name, sizes[name]) for name in SIZES)
        text = prepare(folder, variant, project, steps, **settings)
        results = read_results(run_python([*launcher, folder / variant.script], echo), text)
        # Without a second report, or where the loss was not finite, nothing was saved.
        yield results, max(folder.glob('gpt-*.pt'), default=None)


# --- Each of these measures a variant, and returns a dictionary of results.
def train(variant, project, steps=None, echo=False, **settings):
    """Trains it."""
    with trained(variant, project, steps, echo, **settings) as (results, _):
        return results


def train_in_two_processes(variant, project, steps=None, echo=False, **settings):
    """Trains it with a command that starts it twice."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    return train(variant, project, steps, echo, launcher=torchrun, **settings)


def train_and_read_further(variant, project, steps=None, echo=False, **settings):
    """Trains it; the exact losses if it reads once, twice and four times block_size, too."""
    with trained(variant, project, steps, echo, **settings) as (results, path):
        gpt = load_with_text(path)
        losses = [exact_loss(gpt.model, gpt.val_data, n * gpt.block_size) for n in (1, 2, 4)]
    return {**results, 'further': ', '.join(f'{loss:.2f}' for loss in losses)}


def train_and_add(variant, project, steps=None, echo=False, **settings):
    """Trains it on sums, and lets it work out the last 300: none of them, nor the same two numbers
    in the other order, was in the training text.
    """
    with trained(variant, project, steps, echo, **settings) as (results, path):
        gpt = load_with_text(path)
    def terms(line):
        return line.partition('=')[0]

    lines = gpt.text.splitlines()[-300:]
    seen = {frozenset(terms(line).split('+')) for line in gpt.text[:gpt.n_train].splitlines()}
    assert not any(frozenset(terms(line).split('+')) in seen for line in lines)
    gpt.top_k = 1  # nothing is left to chance
    idx = torch.tensor([gpt.encode(f'\n{terms(line)}=') for line in lines])  # (B, T)
    written = [gpt.decode(ids)[1:] for ids in gpt.model.generate(idx, 6).tolist()]
    right = sum(text.partition('\n')[0] == line for text, line in zip(written, lines))
    return {**results, 'right': right, 'asked': len(lines)}


def fine_tune(variant, project, steps=None, echo=False, **settings):
    """Trains it in a folder with the newest run as start.pt: the exact losses on the text of that
    run (old) and on its own (new), after training and before it, by start.pt.
    """
    start = find_checkpoint(project)
    with trained(variant, project, steps, echo, start=start, **settings) as (results, path):
        gpt = load_with_text(path)
    old = torch.tensor(gpt.encode((project / 'input.txt').read_text(encoding='utf-8-sig')))
    texts = {'old': old[len(old) * 9 // 10:], 'new': gpt.val_data}
    for when in ('', '_before'):
        if when:
            gpt.model.load_state_dict(read_checkpoint(start)['model'])
        for name, ids in texts.items():
            results[name + when] = exact_loss(gpt.model, ids, gpt.block_size)
    return results


def train_with_reward(variant, project, steps=None, echo=False, count=480, **settings):
    """Trains it in a folder with the newest run as start.pt: the mean reward of new texts and the
    exact loss, after training and before it, by start.pt; and the first of the texts.
    """
    start = find_checkpoint(project)
    with trained(variant, project, steps, echo, start=start, **settings) as (results, path):
        gpt = load_with_text(path)
    for when in ('', '_before'):
        if when:
            gpt.model.load_state_dict(read_checkpoint(start)['model'])
        torch.manual_seed(0)
        texts = [gpt.decode(ids) for ids in gpt.write(count)[:, 1:].tolist()]
        results['reward' + when] = statistics.mean(map(gpt.reward, texts))
        results['exact' + when] = exact_loss(gpt.model, gpt.val_data, gpt.block_size)
        results['sample' + when] = describe(texts[0], gpt.text)['sample']
    return results


def train_bigram(variant, project, steps=None, echo=False, **settings):
    """The exact loss of a bigram.py, before and after training."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), variant, project, **settings)
        bigram = load(Path(folder) / 'bigram.py')
    before = exact_loss(bigram.model, bigram.val_data, bigram.block_size)
    with contextlib.redirect_stdout(sys.stdout if echo else io.StringIO()):
        bigram.train()
    return {'before': before,
            'exact': exact_loss(bigram.model, bigram.val_data, bigram.block_size)}


def train_exactly(variant, project, steps=None, echo=False, **settings):
    """Trains it; the exact loss, too."""
    with trained(variant, project, steps, echo, **settings) as (results, path):
        gpt = load_with_text(path)
        return {**results, 'exact': exact_loss(gpt.model, gpt.val_data, gpt.block_size)}


def count_ngrams(variant, project, steps=None, echo=False, **settings):
    """The exact loss of counts alone."""
    text, _ = prepared(variant, project)
    n_train = len(text) * 9 // 10
    return {'exact': ngram_loss(text[:n_train], text[n_train:])}


@torch.no_grad()
def measure_positions(variant, project, steps=None, echo=False, stride=16, **settings):
    """The loss of the newest run at the positions 1, 2, 4, ... of its context, each the mean over
    passages of the validation text that begin stride characters apart.
    """
    gpt = load_with_text(find_checkpoint(project))
    windows = gpt.val_data.unfold(0, gpt.block_size + 1, stride)  # (passages, block_size + 1)
    total = torch.zeros(gpt.block_size)
    for ids in windows.split(64):
        logits = gpt.model(ids[:, :-1])[0]  # (B, T, vocab_size)
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction='none')  # (B, T)
        total += losses.sum(dim=0)
    positions = [2 ** n for n in range(gpt.block_size.bit_length())]
    return {f'position {n}': total[n - 1].item() / len(windows) for n in positions}


def sample(variant, project, steps=None, echo=False, length=500, **settings):
    """Lets the newest run write, with a variant's settings."""
    gpt = load_checkpoint(project)
    for name in ('temperature', 'top_k', 'seed'):
        setattr(gpt, name, {**DEFAULTS, **variant.settings, **settings}[name])
    torch.manual_seed(gpt.seed)
    context = torch.tensor([gpt.encode('The ')])  # (1, T)
    text = (project / 'input.txt').read_text(encoding='utf-8-sig')
    return describe(gpt.decode(gpt.model.generate(context, length)[0].tolist()), text)


def compare_caches(variant, project, steps=None, echo=False, **settings):
    """Lets the newest run write without the cache and with it, and compares text and time."""
    saved = find_checkpoint(project)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder, variant, project, **settings)
        shutil.copy(saved, folder)
        torch.set_num_threads(1)
        texts, times = [], []
        for path in (saved, folder / saved.name):
            gpt = load_checkpoint(path)
            gpt.top_k = 1  # nothing is left to chance
            start = torch.zeros((1, 1), dtype=torch.long)
            gpt.model.generate(start, 10)  # the first call is slower
            started = time.time()
            texts.append(gpt.model.generate(start, 500)[0, 1:].tolist())
            times.append(time.time() - started)
    same = next((i for i, (a, b) in enumerate(zip(*texts)) if a != b), 500)
    return {'same': same, 'total': 500, 'ratio': times[1] / times[0]}


def compare_steps(variant, project, steps=None, echo=False, **settings):
    """Trains gpt.py and the variant in turn, ten steps each, and compares logits and time.

    In turn, so that it does not matter if the machine is slower for a while.
    """
    torch.set_num_threads(1)
    versions = []  # from the same seed: the same weights
    with tempfile.TemporaryDirectory() as folder:
        for edits in ((), variant.edits):
            version = Variant(edits, variant.settings, 10, None, None)
            prepare(Path(folder), version, project, **settings)
            versions.append(load(Path(folder) / 'gpt.py'))
    x, _ = versions[0].get_batch('train')
    with torch.no_grad():
        logits = [gpt.model(x)[0] for gpt in versions]
    times = [[], []]
    for _ in range(1 + math.ceil((steps or 100) / 10)):
        for gpt, seconds in zip(versions, times):
            gpt.report = lambda *_: None  # only the steps are measured
            started = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                gpt.train()
            seconds.append(time.perf_counter() - started)
    plain_time, other_time = (statistics.median(seconds[1:]) for seconds in times)  # 1 to warm up
    return {'difference': (logits[0] - logits[1]).abs().max().item(),
            'ratio': other_time / plain_time}


# --- Running gpt.py, and reading what it prints
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

    train, val, best and unigram are losses in nats per character; unigram is what a model scores
    that knows only how frequent each character is.
    """
    found = [(int(step), int(steps), float(train), float(val)) for step, steps, train, val in
             re.findall(r'(?m)^step (\d+) of (\d+): train loss (\S+), val loss (\S+), \d+ s$', out)]
    if not found:
        raise ValueError(f'gpt.py printed no losses: {out.strip()[-1000:]}')
    step, steps, train_loss, val_loss = found[-1]
    if step < steps and math.isfinite(train_loss + val_loss):
        raise ValueError(f'gpt.py was stopped after step {step} of {steps}')
    best, best_step = min((val, step) for step, _, _, val in found)
    train, val = text[:len(text) * 9 // 10], text[len(text) * 9 // 10:]
    counts = Counter(train + ''.join(set(text)))  # no character has a count of 0
    unigram = -sum(n * math.log(counts[c] / counts.total()) for c, n in Counter(val).items())
    return {'train': train_loss, 'val': val_loss, 'best': best,
            'best_step': best_step, 'unigram': unigram / len(val),
            **describe(out.partition('weights generate:\n')[2], text)}


def describe(generated, text):
    """The beginning of a generated text, and which part of its words occurs in this text."""
    words, known = (re.findall("[A-Za-z']+", string) for string in (generated, text))
    known = set(known)
    return {'sample': ' / '.join(generated.split('\n')).replace('`', "'").strip()[:60],
            'words': sum(word in known for word in words) / max(len(words), 1)}
