"""The exact validation loss of a model, in nats per character.

    python tests/lab/exact_loss.py           the model of the newest run
    python tests/lab/exact_loss.py bigram    bigram.py, trained again, and the table of counts
    python tests/lab/exact_loss.py ngram     no network: counts of up to five characters in a row
    --checkpoint FILE                        another saved model; a folder: its newest run

Exact means: every character of the last tenth of the text but the first is predicted exactly once.
The text is the input.txt beside the model, if there is one.
The scripts themselves estimate the loss from a few random sequences.
"""
import argparse
import contextlib
import io
import math
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

from scripts import (PROJECT, find_checkpoint, load, load_checkpoint, read_checkpoint,
                     script_beside, settings_for)


@torch.no_grad()
def exact_loss(model, ids, block_size):
    """The mean loss over consecutive windows, of which the last may be shorter."""
    def batches(ids):
        *windows, last = ids.split(block_size)
        return [torch.stack(windows[i:i + 64]) for i in range(0, len(windows), 64)] + [last[None]]

    model.eval()
    losses = [model(x, y)[1].item() * y.numel()
              for x, y in zip(batches(ids[:-1]), batches(ids[1:]))]
    return sum(losses) / (len(ids) - 1)


def exact_loss_per_character(gpt):
    """The exact loss of gpt.model, also where tokens are longer than a character."""
    loss = exact_loss(gpt.model, gpt.val_data, gpt.block_size)
    return loss * len(gpt.val_data) / len(gpt.decode(gpt.val_data.tolist()))


def load_with_text(path, project=PROJECT):
    """gpt.py as a module, with the text beside a saved model, or else the project's: with the saved
    weights, if that text has the characters that they were trained on.
    """
    saved, script = load_checkpoint(path), script_beside(path)
    folder = path.parent if (path.parent / 'input.txt').exists() else project
    gpt = load(script, folder=folder, **settings_for(script, read_checkpoint(path)['settings']))
    if gpt.chars == saved.chars:
        gpt.model.load_state_dict(saved.model.state_dict())
    return gpt


def reaches_saved_loss(gpt, checkpoint):
    """Whether gpt.model still has the loss that it was saved with: not if the code has changed."""
    saved = [val for step, _, val in checkpoint['history'] if step > 0]
    return not saved or abs(gpt.estimate_loss()['val'] - min(saved)) < 0.001


def table_loss(train, val, vocab_size):
    """The loss of the bigram table found by counting, every count plus one."""
    pairs = train[:-1] * vocab_size + train[1:]  # a number for each pair of token ids
    counts = 1 + pairs.bincount(minlength=vocab_size ** 2).view(vocab_size, vocab_size)
    table = (counts / counts.sum(dim=1, keepdim=True)).log()
    return F.cross_entropy(table[val[:-1]], val[1:]).item()


def ngram_loss(train, val, n=5, discount=0.8):
    """The loss of counts alone: interpolated, with absolute discounting (Ney et al. 1994).

    Every count gives up a little probability, which is shared out as a context that is one
    character shorter predicts. n and discount are about the best for our text.
    """
    counts, totals, kinds = Counter(), Counter(), Counter()  # kinds: different next characters
    for length in range(1, n + 1):
        counts.update(train[i:i + length] for i in range(len(train) - length + 1))
    for gram, count in counts.items():
        totals[gram[:-1]] += count
        kinds[gram[:-1]] += 1
    vocab_size = len(set(train + val))
    loss = 0.0
    for i in range(1, len(val)):
        p = 1 / vocab_size  # before any count: equal probabilities
        for length in range(min(n, i + 1)):
            context = val[i - length:i]
            if totals[context]:
                discounted = max(counts[context + val[i]] - discount, 0)
                p = (discounted + discount * kinds[context] * p) / totals[context]
        loss -= math.log(p)
    return loss / (len(val) - 1)


def main(argv=None, project=PROJECT):
    parser = argparse.ArgumentParser(
        description='The exact validation loss of a model, in nats per character.')
    parser.add_argument('model', nargs='?', choices=['bigram', 'ngram'],
                        help='measure this simpler model, instead of a saved one')
    parser.add_argument('--checkpoint', type=Path,
                        help='use this file, or the newest run in this folder')
    arguments = parser.parse_args(argv)
    if arguments.model and arguments.checkpoint:
        parser.error(f'--checkpoint is for gpt.py, not for {arguments.model}')
    if arguments.model:
        script = load(project / 'bigram.py', device='cpu')
    if arguments.model == 'ngram':
        loss = ngram_loss(script.text[:script.n_train], script.text[script.n_train:])
    elif arguments.model == 'bigram':
        with contextlib.redirect_stdout(io.StringIO()):
            script.train()
        table = table_loss(script.train_data, script.val_data, script.vocab_size)
        print(f'counts plus one, normalised: {table:.4f}')
        loss = exact_loss(script.model, script.val_data, script.block_size)
    else:
        path = find_checkpoint(arguments.checkpoint or project)
        gpt, checkpoint = load_with_text(path, project), read_checkpoint(path)
        length = checkpoint['settings'].get('text_length', len(gpt.text))
        if gpt.chars != checkpoint['chars'] or len(gpt.text) != length:
            sys.exit(f'Error: {gpt.folder / "input.txt"} is not the text that the model was '
                     'trained on: put that there, or train again')
        if not reaches_saved_loss(gpt, checkpoint):
            print('The model no longer reaches the loss that it was saved with: the code of gpt.py '
                  'has changed since', file=sys.stderr)
        loss = exact_loss_per_character(gpt)
    print(f'exact validation loss: {loss:.4f}')


if __name__ == '__main__':
    main()
