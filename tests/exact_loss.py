"""The exact validation loss of a model, in nats per character.

    python tests/exact_loss.py           the model in gpt.pt
    python tests/exact_loss.py bigram    bigram.py, trained again, beside the table found by counting
    python tests/exact_loss.py ngram     no network: counts of sequences of up to five characters

Exact means: over the whole last tenth of input.txt, cut into consecutive windows of block_size.
The scripts themselves estimate the loss from a few random windows.
"""
import contextlib
import io
import math
import runpy
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

PROJECT = Path(__file__).resolve().parent.parent


@torch.no_grad()
def exact_loss(model, data, block_size, device):
    """The mean loss over consecutive windows; the last few characters may be left out."""
    model.eval()
    count = (len(data) - 1) // block_size
    x = data[:count * block_size].view(count, block_size)
    y = data[1:count * block_size + 1].view(count, block_size)
    losses = [model(a.to(device), b.to(device))[1].item() * len(a)
              for a, b in zip(x.split(64), y.split(64))]
    return sum(losses) / count


def ngram_loss(train, val, n=5, discount=0.8):
    """The loss of counts alone: interpolated, with absolute discounting (Ney et al. 1994).

    Every count gives up a little probability, which is shared out as a context that is one
    character shorter predicts. n and discount are about the best for this text.
    """
    counts, totals, kinds = Counter(), Counter(), Counter()  # kinds: different next characters
    for length in range(1, n + 1):
        counts.update(train[i:i + length] for i in range(len(train) - length + 1))
    for gram, count in counts.items():
        totals[gram[:-1]] += count
        kinds[gram[:-1]] += 1
    loss = 0.0
    for i in range(n - 1, len(val)):
        p = 1 / kinds['']  # before any count: equal probabilities
        for length in range(n):
            context = val[i - length:i]
            if totals[context]:
                discounted = max(counts[context + val[i]] - discount, 0)
                p = (discounted + discount * kinds[context] * p) / totals[context]
        loss -= math.log(p)
    return loss / (len(val) - n + 1)


if __name__ == '__main__':
    if sys.argv[1:] == ['ngram']:
        text = (PROJECT / 'input.txt').read_text(encoding='utf-8-sig')
        n_train = len(text) * 9 // 10
        print(f'exact validation loss: {ngram_loss(text[:n_train], text[n_train:]):.4f}')
        sys.exit()
    if sys.argv[1:] == ['bigram']:
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
            script = runpy.run_path(str(PROJECT / 'bigram.py'), run_name='__main__')
        model = script['model']
        pairs = torch.stack((script['train_data'][:-1], script['train_data'][1:]))
        counts = torch.ones(script['vocab_size'], script['vocab_size'])
        counts.index_put_(tuple(pairs), torch.ones(pairs.shape[1]), accumulate=True)
        table = (counts / counts.sum(dim=1, keepdim=True)).log()
        best = F.cross_entropy(table[script['val_data'][:-1]], script['val_data'][1:])
        print(f'counts plus one, normalised: {best:.4f}')
    else:
        script = runpy.run_path(str(PROJECT / 'gpt.py'))
        model, chars = script['load']()
        if chars != script['chars']:
            sys.exit('exact_loss.py: the characters of gpt.pt and input.txt differ: put the text '
                     'that it was trained on into input.txt, or train again')
    loss = exact_loss(model, script['val_data'], script['block_size'], script['device'])
    print(f'exact validation loss: {loss:.4f}')
