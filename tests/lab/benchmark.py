"""Speed and memory: python tests/lab/benchmark.py (three minutes; run nothing else meanwhile).

Three programs take turns, each in a process of its own: bigram.py, gpt.py, and gpt.py as one would
first write it. That version has a module for each head, with the attention spelled out, the
default AdamW (not fused), and a generate that switches off neither dropout nor gradients. Sizes,
data and everything else are the same. Not for Windows, which has no `resource` module.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from scripts import PROJECT, load

PROGRAMS = ('bigram.py', 'gpt.py', 'head by head')
CONTEXTS = (64, 128, 256)
ROUNDS = 3


def head_by_head(gpt):
    """Replaces attention and generate in gpt.py by their first, slower versions."""
    class Head(nn.Module):
        def __init__(self, head_size):
            super().__init__()
            self.query, self.key, self.value = (
                nn.Linear(gpt.n_embd, head_size, bias=False) for _ in range(3))
            self.dropout = nn.Dropout(gpt.dropout)
            self.register_buffer('past', torch.ones(gpt.block_size, gpt.block_size).tril())

        def forward(self, x):
            T = x.shape[1]
            query, key, value = self.query(x), self.key(x), self.value(x)
            scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
            scores = scores.masked_fill(self.past[:T, :T] == 0, float('-inf'))
            return self.dropout(scores.softmax(dim=-1)) @ value

    class HeadByHead(nn.Module):
        def __init__(self, n_head, head_size):
            super().__init__()
            self.heads = nn.ModuleList(Head(head_size) for _ in range(n_head))
            self.proj = nn.Linear(n_head * head_size, gpt.n_embd)
            self.dropout = nn.Dropout(gpt.dropout)

        def forward(self, x):
            return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], dim=-1)))

    def generate(model, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            logits, _ = model(idx[:, -gpt.block_size:])
            idx_next = torch.multinomial((logits[:, -1] / gpt.temperature).softmax(dim=-1), 1)
            idx = torch.cat((idx, idx_next), dim=1)
        return idx

    gpt.MultiHeadAttention = HeadByHead
    gpt.GPTLanguageModel.generate = generate
    gpt.model = gpt.m = gpt.GPTLanguageModel().to(gpt.device)


def synchronize(device):
    """Waits until a GPU has done what it was given: calls return before that."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def measure(program, seconds=5, characters=100, **hyperparameters):
    """Trains and generates a little in this process. Returns milliseconds per step and per
    character, characters per step, and the largest memory so far in MiB.
    """
    script = load(PROJECT / ('bigram.py' if program == 'bigram.py' else 'gpt.py'),
                  **hyperparameters)
    if program == 'head by head':
        head_by_head(script)
    optimizer = torch.optim.AdamW(script.model.parameters(), fused=program == 'gpt.py')
    steps, end = [], time.perf_counter() + seconds
    while len(steps) < 8 or (time.perf_counter() < end and len(steps) < 300):
        began = time.perf_counter()
        x, y = script.get_batch('train')
        logits, loss = script.model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        synchronize(script.device)
        steps.append(time.perf_counter() - began)
    context = torch.zeros((1, script.block_size), dtype=torch.long, device=script.device)
    script.model.generate(context, 5)  # the first ones are slower, as are the first steps
    synchronize(script.device)
    began = time.perf_counter()
    script.model.generate(context, characters)
    synchronize(script.device)
    return {'step': 1000 * statistics.median(steps[3:]),
            'char': 1000 * (time.perf_counter() - began) / characters,
            'batch': script.batch_size * script.block_size,
            'memory': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            / (2**20 if sys.platform == 'darwin' else 2**10)}  # macOS counts bytes, Linux KiB


def measure_all():
    """Measures every program at every context length, and prints the medians as a table."""
    columns = ('context', 'ms a step', 'characters/s', 'ms a character', 'MiB')
    print(f'{"":14}' + ''.join(f'{column:>16}' for column in columns))
    for context in CONTEXTS:
        runs = {program: [] for program in PROGRAMS}
        for _ in range(ROUNDS):
            for program in PROGRAMS:
                done = subprocess.run([sys.executable, __file__, '--program', program,
                                       '--context', str(context)],
                                      stdout=subprocess.PIPE, text=True)
                if done.returncode:  # it has said why
                    sys.exit(done.returncode)
                runs[program].append(json.loads(done.stdout))
        middle = {program: {key: statistics.median(run[key] for run in runs[program])
                            for key in runs[program][0]} for program in PROGRAMS}
        for program, run in middle.items():
            print(f'{program:14}{context:16}{run["step"]:16.2f}'
                  f'{1000 * run["batch"] / run["step"]:16,.0f}'
                  f'{run["char"]:16.2f}{run["memory"]:16.0f}')
        step, char = (middle['gpt.py'][key] / middle['head by head'][key]
                      for key in ('step', 'char'))
        print(f'{"gpt.py / head by head":30}{step:16.2f}{"":16}{char:16.2f}', flush=True)


def main():
    parser = argparse.ArgumentParser(
        description='Measures speed and memory of the scripts (about three minutes).')
    parser.add_argument('--program', choices=PROGRAMS, help='only this one, once, as JSON')
    parser.add_argument('--context', type=int, default=CONTEXTS[0],
                        help='with --program: its block_size (default: %(default)s)')
    arguments = parser.parse_args()
    if arguments.program:
        print(json.dumps(measure(arguments.program, block_size=arguments.context)))
    else:
        measure_all()


if __name__ == '__main__':
    main()
