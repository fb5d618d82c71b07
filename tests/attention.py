"""What the heads of the trained model look at: text pictures of their attention weights.

    python tests/attention.py                       a short piece of the validation text
    python tests/attention.py "FLINT:"              this text
    python tests/attention.py --layer 2 --head 3    one head only
    python tests/attention.py --nearest e           the characters with the most similar embeddings

A row is a character that asks, a column a character that it reads. Below the pictures, one line for
each head says in figures what it does in the validation text.
"""
import argparse
import runpy
import shutil
import sys
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F

PROJECT = Path(__file__).resolve().parent.parent
SHADES, NEWLINE = '·░▒▓█', '↵'
ASCII_SHADES, ASCII_NEWLINE = '.:+*#', '/'
LIMITS = (0.05, 0.2, 0.4, 0.7)  # the weights at which the next darker shade begins
MEASURED = 4096  # characters of the validation text that the figures are means over
LEGEND = """
Not of the text above: means over {:,} characters of the validation text
that have half a context before them:
distance  how many characters back its weight lies
previous  share of the weight on the character just before it
itself    share on the character itself
line      share on the start of its line and the newline before that
speech    share on the start of its speech and the blank line before that
position  overlap of its weights with the mean weights at each distance:
          1 if the head goes by position alone, less if it goes by content
entropy   in nats: 0 if all weight is on one character, ln n if equal on n
"""


def attention_weights(sa, x):
    """What the attention module sa does with x, spelled out as in gpt.py: weights and values."""
    B, T, C = x.shape
    nh, hs = sa.n_head, C // sa.n_head
    q, k, v = sa.qkv(x).chunk(3, dim=-1)  # (B, T, C) each
    q, k, v = (z.view(B, T, nh, hs).transpose(1, 2) for z in (q, k, v))  # (B, nh, T, hs) each
    scores = q @ k.transpose(-2, -1) / hs ** 0.5  # (B, nh, T, T)
    causal_mask = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)  # (T, T)
    return scores.masked_fill(causal_mask, -torch.inf).softmax(dim=-1), v


@torch.no_grad()
def look(model, idx):
    """The attention weights of each layer for token ids (B, T): a list of (B, nh, T, T)."""
    seen = []
    hooks = [block.sa.register_forward_pre_hook(
        lambda sa, inputs: seen.append(attention_weights(sa, *inputs)[0].float().cpu()))
        for block in model.blocks]
    model.eval()
    model(idx)
    for hook in hooks:
        hook.remove()
    return seen


def figures(att, string):
    """For one layer's weights (B, nh, T, T) on B strings: each figure's name, and it (nh)."""
    T = att.shape[-1]
    rows = torch.arange(T // 2, T)  # only those that have half a context before them
    att = att[:, :, rows]  # (B, nh, rows, T)
    back = rows[:, None] - torch.arange(T)  # (rows, T): how far back each column lies

    def share_from(end, first):
        """The share on the character after the last `end` before a row, from `first` on."""
        ends = torch.tensor([[s[:j + 1].endswith(end) for j in range(T)] for s in string])  # (B, T)
        last = torch.where(ends, torch.arange(T), -T).cummax(dim=1).values[:, rows - 1]  # (B, rows)
        offset = torch.arange(T) - last[:, :, None]  # (B, rows, T)
        return (att * ((first <= offset) & (offset <= 1))[:, None]).sum(-1)  # (B, nh, rows)

    by_distance = att.gather(-1, back.clamp(min=0).expand(att.shape)) * (back >= 0)
    average = by_distance.sum(dim=(0, 2), keepdim=True) / (back >= 0).sum(0)  # (1, nh, 1, T)
    expected = F.normalize(average * (back >= 0), p=1, dim=-1)  # (1, nh, rows, T)
    result = {
        'distance': (att * back).sum(-1),
        'previous': (att * (back == 1)).sum(-1),
        'itself': (att * (back == 0)).sum(-1),
        'line': share_from('\n', 0),
        'speech': share_from('\n\n', -1),
        'position': torch.minimum(by_distance, expected).sum(-1),
        'entropy': torch.special.entr(att).sum(-1),
    }
    return {name: values.mean(dim=(0, 2)) for name, values in result.items()}


def picture(att, labels, title, shades):
    """The lines of one head's picture, from weights (T, T); nothing above the diagonal."""
    lines = [title, '  ' + labels]
    for i, label in enumerate(labels):
        levels = [sum(weight >= limit for limit in LIMITS) for weight in att[i, :i + 1].tolist()]
        lines.append(f'{label} ' + ''.join(shades[level] for level in levels))
    return [line.ljust(max(map(len, lines))) for line in lines]


def check(condition, message):
    """Unless the condition is true, exits with status 1 and the message on standard error."""
    if not condition:
        sys.exit(f'{Path(__file__).name}: {message}')


def main():
    parser = argparse.ArgumentParser(description='Shows what the heads in gpt.pt look at.')
    parser.add_argument('text', nargs='?', help='the text to show (default: some of input.txt)')
    parser.add_argument('--layer', type=int, help='this layer only; the first is 1')
    parser.add_argument('--head', type=int, help='this head only; the first is 1')
    parser.add_argument('--nearest', metavar='CHARACTER',
                        help='print the characters with the most similar token embeddings instead')
    arguments = parser.parse_args()
    check((PROJECT / 'gpt.pt').exists(), 'there is no gpt.pt yet: run python gpt.py first')
    gpt = runpy.run_path(str(PROJECT / 'gpt.py'))
    model, chars = gpt['load']()

    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(line_buffering=True, errors='replace')
    sys.excepthook = gpt['excepthook']  # no traceback for Ctrl-C or `| head`
    try:
        (SHADES + NEWLINE).encode(sys.stdout.encoding or 'ascii')
        shades, newline = SHADES, NEWLINE
    except UnicodeError:
        shades, newline = ASCII_SHADES, ASCII_NEWLINE
    names = {c: c if c.isprintable() and unicodedata.east_asian_width(c) not in 'WF'
             and not unicodedata.combining(c) else '?' for c in chars}
    names.update({'\n': newline, ' ': '_'})  # what is shown for each character: one column wide

    if arguments.nearest is not None:
        check(arguments.nearest in chars, f'--nearest: {arguments.nearest!r} is not one of the '
              'characters that the model knows')
        vectors = F.normalize(model.token_embedding_table.weight.detach().float())  # length 1
        asked = chars.index(arguments.nearest)
        cosines = vectors @ vectors[asked]  # (vocab_size)
        others = [i for i in cosines.argsort(descending=True).tolist() if i != asked]
        print(f'cosine similarity with {names[arguments.nearest]}:')
        for i in others[:10]:
            print(f'{names[chars[i]]} {cosines[i]:.2f}')
        return

    val_text = ''.join(c for c in gpt['decode'](gpt['val_data'].tolist()) if c in names)
    text, T = arguments.text, gpt['block_size']
    if text is None:
        text = val_text[max(val_text.find('\n\n') - 4, 0):][:min(16, T)]
    width = shutil.get_terminal_size().columns  # 80 where there is no terminal
    unknown = sorted(set(text) - set(chars))
    check(text, 'there is no text to show: give some')
    check(not unknown, f'the model never saw these characters: leave out {unknown}')
    check(len(text) <= T, f'the text has {len(text)} characters: at most block_size = {T} will do')
    check(len(text) + 2 <= width, f'the text has {len(text)} characters, which needs a terminal '
          f'{len(text) + 2} columns wide: this one has {width}')
    for name, chosen, number in (('layer', arguments.layer, gpt['n_layer']),
                                 ('head', arguments.head, gpt['n_head'])):
        check(chosen is None or 1 <= chosen <= number, f'--{name} is a number from 1 to {number}')
    layers = [arguments.layer] if arguments.layer else range(1, gpt['n_layer'] + 1)
    heads = [arguments.head] if arguments.head else range(1, gpt['n_head'] + 1)

    labels = ''.join(names[c] for c in text)
    seen = look(model, torch.tensor([[chars.index(c) for c in text]], device=gpt['device']))
    fit = max((width + 2) // (max(len(text) + 2, len('layer 1, head 1')) + 2), 1)
    for layer in layers:
        for first in range(0, len(heads), fit):
            pictures = [picture(seen[layer - 1][0, head - 1], labels,
                                f'layer {layer}, head {head}', shades)
                        for head in heads[first:first + fit]]
            print(*('  '.join(line).rstrip() for line in zip(*pictures)), '', sep='\n')
    print('Weights: ' + ', '.join(f'{shade} from {limit}'
                                  for shade, limit in zip(shades, (0,) + LIMITS)))

    half = T // 2
    starts = range(0, len(val_text) - T + 1, max(half, 1))[:max(MEASURED // (T - half), 1)]
    strings = [val_text[start:start + T] for start in starts]
    check(strings, f'the validation text is too short for the figures: they need {T} characters')
    idx = torch.tensor([[chars.index(c) for c in string] for string in strings])
    seen = look(model, idx.to(gpt['device']))
    print(LEGEND.format(len(strings) * (T - half)))
    for row, layer in enumerate(layers):
        columns = figures(seen[layer - 1], strings)
        if row == 0:
            print('layer head' + ''.join(f'{name:>10}' for name in columns))
        for head in heads:
            print(f'{layer:5} {head:4}' + ''.join(f'{values[head - 1]:10.2f}'
                                                  for values in columns.values()))


if __name__ == '__main__':
    main()
