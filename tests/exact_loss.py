"""The exact validation loss of a model, in nats per character.

    python tests/exact_loss.py           the model in gpt.pt
    python tests/exact_loss.py bigram    bigram.py, trained again, beside the table found by counting

Exact means: over the whole last tenth of input.txt, cut into consecutive windows of block_size.
The scripts themselves estimate the loss from a few random windows.
"""
import contextlib
import io
import runpy
import sys
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


if __name__ == '__main__':
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
