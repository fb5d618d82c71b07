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

from exact_loss import exact_loss
from scripts import edited, find_checkpoint, hyperparameters_of, load, load_checkpoint

# The hyperparameters with which the figures in tests/lab/README.md were measured. They are set in
# the copy, so that it does not matter which ones gpt.py has at the moment.
DEFAULTS = dict(batch_size=8, block_size=128, max_iters=10_000, eval_interval=500, eval_iters=30,
                learning_rate=1.5e-3, warmup_iters=100, weight_decay=0.3, n_embd=128, n_head=4,
                n_layer=3, dropout=0.0, temperature=0.8, top_k=None, seed=1337, device='cpu')


@dataclass
class Variant:
    """One change of gpt.py, and how it is measured."""
    edits: tuple  # (old text, new text): each old text occurs once, and is code without comment
    settings: dict  # hyperparameters, by name
    steps: int  # training steps
    measure: object  # one of the functions below
    text: object  # a function that makes another input.txt from ours, or None


def solution(variant, source, **settings):
    """The source of gpt.py, edited as a variant says; ValueError where that does not fit."""
    try:
        return edited(source, *variant.edits, **{**variant.settings, **settings})
    except ValueError as error:
        raise ValueError(f'gpt.py was changed where this exercise edits it ({error}): put that '
                         'back, or do the exercise by hand') from None


def prepare(folder, variant, project, steps=None, **settings):
    """Writes a variant's gpt.py and its input.txt into a folder; returns the text."""
    text = (project / 'input.txt').read_text(encoding='utf-8-sig')
    text = variant.text(text) if variant.text else text
    (folder / 'input.txt').write_text(text, encoding='utf-8')
    source = (project / 'gpt.py').read_text(encoding='utf-8')
    # A hyperparameter that your gpt.py no longer has needs no value.
    values = {name: DEFAULTS[name] for name in DEFAULTS if name in hyperparameters_of(source)}
    values['max_iters'] = steps or variant.steps or DEFAULTS['max_iters']
    source = solution(variant, source, **{**values, **variant.settings, **settings})
    (folder / 'gpt.py').write_text(source, encoding='utf-8')
    return text


# --- Each of these measures a variant, and returns a dictionary of results.
def train(variant, project, steps=None, echo=False, launcher=(), **settings):
    """Trains it in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text = prepare(folder, variant, project, steps, **settings)
        return read_results(run_python([*launcher, folder / 'gpt.py'], echo), text)


def train_in_two_processes(variant, project, steps=None, echo=False, **settings):
    """Trains it with a command that starts it twice."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    return train(variant, project, steps, echo, launcher=torchrun, **settings)


def train_and_read_further(variant, project, steps=None, echo=False, **settings):
    """Trains it; the exact losses if it reads once, twice and four times block_size, too."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text = prepare(folder, variant, project, steps, **settings)
        results = read_results(run_python([folder / 'gpt.py'], echo), text)
        gpt, [path] = load(folder / 'gpt.py'), folder.glob('gpt-*.pt')
        model = load_checkpoint(path).model
        losses = [exact_loss(model, gpt.val_data, n * gpt.block_size) for n in (1, 2, 4)]
    return {**results, 'further': ', '.join(f'{loss:.2f}' for loss in losses)}


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
