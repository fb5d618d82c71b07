"""Speed and memory: python tests/benchmark.py (about three minutes; run nothing else meanwhile).

Three programs take turns, each in a process of its own: bigram.py, gpt.py, and gpt.py as one would
first write it. That version has a module for each head, with the attention spelled out, the
default AdamW (not fused), and a generate that switches off neither dropout nor gradients. Sizes,
data and everything else are the same. Not for Windows, which has no `resource` module.
"""
import json
import re
import resource
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
CONTEXTS = (64, 128, 256)
ROUNDS = 3


def imported(script, block_size):
    """A script as a module, with another block_size than the one at its top."""
    path = PROJECT / script
    source, found = re.subn(r'(?m)^block_size = .*$', f'block_size = {block_size}',
                            path.read_text('utf-8'))
    assert found == 1
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    exec(compile(source, script, 'exec'), module.__dict__)
    return module


def head_by_head(gpt):
    """Replaces attention and generate in gpt.py by their first, slower versions."""
    import torch
    from torch import nn

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

    gpt.MultiHeadAttention = HeadByHead
    gpt.GPTLanguageModel.generate = generate
    gpt.model = gpt.m = gpt.GPTLanguageModel().to(gpt.device)


def measure(which, block_size):
    """Trains and generates a little in this process, and returns the figures as a dictionary."""
    import torch
    module = imported('bigram.py' if which == 'bigram.py' else 'gpt.py', block_size)
    if which == 'head by head':
        head_by_head(module)
    optimizer = torch.optim.AdamW(module.model.parameters(), fused=which == 'gpt.py')
    steps, wait = [], torch.cuda.synchronize if module.device == 'cuda' else (lambda: None)
    end = time.perf_counter() + 5
    while len(steps) < 8 or (time.perf_counter() < end and len(steps) < 300):
        began = time.perf_counter()
        x, y = module.get_batch('train')
        logits, loss = module.model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wait()
        steps.append(time.perf_counter() - began)
    context = torch.zeros((1, block_size), dtype=torch.long, device=module.device)
    module.model.generate(context, 5)
    began = time.perf_counter()
    module.model.generate(context, 100)
    wait()
    return {'step': 1000 * statistics.median(steps[3:]),
            'char': 1000 * (time.perf_counter() - began) / 100,
            'batch': module.batch_size * block_size,
            'memory': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main():
    names = ('bigram.py', 'gpt.py', 'head by head')
    columns = ('context', 'ms a step', 'characters/s', 'ms a character', 'MiB')
    print(f'{"":14}' + ''.join(f'{column:>16}' for column in columns))
    for context in CONTEXTS:
        runs = {name: [] for name in names}
        for _ in range(ROUNDS):
            for name in names:
                done = subprocess.run([sys.executable, __file__, name, str(context)],
                                      capture_output=True, text=True, check=True)
                runs[name].append(json.loads(done.stdout))
        middle = {name: {key: statistics.median(run[key] for run in runs[name])
                         for key in runs[name][0]} for name in names}
        for name, run in middle.items():
            print(f'{name:14}{context:16}{run["step"]:16.2f}'
                  f'{1000 * run["batch"] / run["step"]:16,.0f}'
                  f'{run["char"]:16.2f}{run["memory"]:16.0f}')
        step, char = (middle['gpt.py'][key] / middle['head by head'][key]
                      for key in ('step', 'char'))
        print(f'{"gpt.py / head by head":30}{step:16.2f}{"":16}{char:16.2f}', flush=True)


if __name__ == '__main__':
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
