"""Looks inside a saved model: what its attention reads, and what it predicts.

    python tests/lab/inside.py "the k"        numbers and pictures, in the terminal
    python tests/lab/inside.py --page         the model in a page for the browser: gpt.html
    python tests/lab/inside.py --nearest .    the characters with the most similar embeddings

Without a text, it takes some of the validation text. The page, gpt.html, lies beside the model. It
consists of a template, page.html, of model.js, which computes in the browser, and of the weights.
"""
import argparse
import base64
import json
import math
import shutil
import sys
import unicodedata
from array import array
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F

from scripts import PROJECT, find_checkpoint, load_checkpoint

SHADES, NEWLINE, BAR = '·░▒▓█', '↵', '█'
LIMITS = (0.05, 0.2, 0.4, 0.7)  # the weights at which the next darker shade begins
BY_HAND = 8  # characters at most of a text whose attention is printed as numbers
SHORT, FIRST = 16, 32  # characters of the validation text: in the terminal, and on the page
CONTEXT = 64  # characters that the page reads at most: with more, it would become slow
LARGEST = 20_000_000  # parameters: the file of a larger model would be too large for a browser

# Of one text with T characters: scores and attention weights (n_layer, n_head, T, T); lens, the
# logits if the model stopped after the embeddings or a block (n_layer + 1, T, vocab_size); losses,
# that of each character but the first (T - 1).
Inside = namedtuple('Inside', 'scores weights lens losses')


def check(condition, message):
    """Exits with one line, unless the condition is true."""
    if not condition:
        sys.exit(f'Error: {message}')


def masked(scores):
    """Scores (..., T, T) after the causal mask: -inf where the column comes after the row."""
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)


@torch.no_grad()
def compute(gpt, text, off=()):
    """What the unedited gpt.py computes for a text, step by step, as an Inside.

    off has heads, as pairs (layer, head) counted from 1: each of them is switched off, so its
    output counts as 0.
    """
    weights, ids = gpt.model.state_dict(), torch.tensor(gpt.encode(text))
    T, nh, hs = len(ids), gpt.n_head, gpt.n_embd // gpt.n_head  # time, heads, head size

    def linear(name, x):
        return F.linear(x, weights[f'{name}.weight'], weights.get(f'{name}.bias'))

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], weights[f'{name}.weight'], weights[f'{name}.bias'])

    x = weights['token_embedding_table.weight'][ids]  # (T, C)
    x = x + weights['position_embedding_table.weight'][:T]  # (T, C)
    stream, all_scores, all_weights = [x], [], []
    for layer in range(gpt.n_layer):
        block = f'blocks.{layer}'
        out = norm(f'{block}.ln1', x)  # (T, C)
        q, k, v = (linear(f'{block}.sa.{name}', out).view(T, nh, hs).transpose(0, 1)
                   for name in ('query', 'key', 'value'))  # (nh, T, hs) each
        scores = q @ k.transpose(-2, -1) / math.sqrt(hs)  # (nh, T, T)
        att = masked(scores).softmax(dim=-1)  # (nh, T, T)
        out = att @ v  # (nh, T, hs)
        for head in (head for number, head in off if number == layer + 1):
            out[head - 1] = 0
        x = x + linear(f'{block}.sa.proj', out.transpose(0, 1).flatten(1))  # (T, C)
        out = linear(f'{block}.ffwd.fc', norm(f'{block}.ln2', x)).relu()  # (T, 4C)
        x = x + linear(f'{block}.ffwd.proj', out)  # (T, C)
        stream.append(x)
        all_scores.append(scores)
        all_weights.append(att)
    lens = linear('lm_head', norm('ln_f', torch.stack(stream)))  # (n_layer + 1, T, vocab_size)
    losses = F.cross_entropy(lens[-1, :-1], ids[1:], reduction='none')  # (T - 1)
    return Inside(torch.stack(all_scores), torch.stack(all_weights), lens, losses)


@torch.no_grad()
def look(gpt, text):
    """What the model in gpt computes for a text, as an Inside; exits if compute finds another."""
    try:
        inside = compute(gpt, text)
        logits = gpt.model.eval()(torch.tensor([gpt.encode(text)]))[0][0]  # (T, vocab_size)
        same = torch.allclose(inside.lens[-1], logits, rtol=0, atol=1e-3)
        same = same and all(len(token) == 1 for token in gpt.chars)  # a picture has characters
    except Exception:  # a model with other parts raises errors of many types
        same = False
    check(same, 'this model computes something else than the unedited gpt.py, or it has no '
          'attention: inside.py cannot show it')
    return inside


# --- In the terminal
def table(numbers, labels):
    """The lines of a table of numbers (T, T), with the characters at its sides."""
    rows = [''.join(f'{number:8.2f}' for number in row) for row in numbers.tolist()]
    return [' ' + ''.join(f'{label:>8}' for label in labels),
            *(label + row for label, row in zip(labels, rows))]


def by_hand(inside, layer, head, labels, head_size):
    """The lines that show how one head arrives at its attention weights."""
    scores, weights = inside.scores[layer - 1, head - 1], inside.weights[layer - 1, head - 1]
    return [f'Attention by hand: layer {layer}, head {head}',
            'A row is a character that reads, a column one that is read.',
            '',
            f"1. Scores: dot product of the row's query and the column's key, / sqrt({head_size})",
            *table(scores, labels),
            '',
            '2. After the causal mask: nobody reads what comes later',
            *table(masked(scores), labels),
            '',
            '3. Attention weights, by softmax: they are positive, and each row sums to 1',
            *table(weights, labels),
            '']


def picture(weights, labels, title):
    """The lines of one head's picture, from weights (T, T); nothing above the diagonal."""
    lines = [title, '  ' + labels]
    for i, label in enumerate(labels):
        levels = [sum(w >= limit for limit in LIMITS) for w in weights[i, :i + 1].tolist()]
        lines.append(f'{label} ' + ''.join(SHADES[level] for level in levels))
    return [line.ljust(max(map(len, lines))) for line in lines]


def triangles(inside, labels, width):
    """The lines of the pictures of all heads, as many of a layer side by side as fit the width."""
    fit = max((width + 2) // (max(len(labels) + 2, len('layer 1, head 1')) + 2), 1)
    lines = []
    for layer, heads in enumerate(inside.weights, 1):
        pictures = [picture(weights, labels, f'layer {layer}, head {head}')
                    for head, weights in enumerate(heads, 1)]
        for first in range(0, len(pictures), fit):
            lines += ['  '.join(row).rstrip() for row in zip(*pictures[first:first + fit])] + ['']
    return lines + ['Weights: ' + ', '.join(f'{shade} from {limit}'
                                            for shade, limit in zip(SHADES, (0,) + LIMITS)), '']


def without_heads(gpt, text, inside):
    """The lines with the mean loss of a text if one head is switched off."""
    loss = inside.losses.mean().item()
    lines = [f'Mean loss of this text: {loss:.2f}. With one head switched off:']
    for layer in range(1, gpt.n_layer + 1):
        for head in range(1, gpt.n_head + 1):
            other = compute(gpt, text, [(layer, head)]).losses.mean().item()
            rise = round(other, 2) - round(loss, 2)  # as printed
            lines.append(f'layer {layer}, head {head}: {other:.2f} ({rise:+.2f})')
    return lines + ['']


def bars(logits, names):
    """The lines with the ten most probable next characters at three temperatures."""
    temperatures = (0.5, 1, 1.5)
    lines = ['  ' + ''.join(f'temperature {temperature:<10}' for temperature in temperatures)]
    columns = [(logits / temperature).softmax(dim=-1) for temperature in temperatures]
    for i in logits.argsort(descending=True)[:10].tolist():
        lines.append(f'{names[i]} ' + ''.join(
            f'{BAR * round(12 * p[i].item())} {p[i]:.2f}'.strip().ljust(22) for p in columns))
    return [line.rstrip() for line in lines]


def nearest(gpt, asked, names):
    """The lines with the characters whose token embeddings point most nearly the same way."""
    vectors = F.normalize(gpt.model.token_embedding_table.weight.detach())  # each of length 1
    asked = gpt.chars.index(asked)
    cosines = vectors @ vectors[asked]  # (vocab_size)
    others = [i for i in cosines.argsort(descending=True).tolist() if i != asked]
    return [f'cosine similarity with {names[asked]}:',
            *(f'{names[i]} {cosines[i]:.2f}' for i in others[:10])]


# --- The page
def packed(tensor):
    """The numbers of a tensor, 32 bits each, as text: JSON cannot hold them in less space."""
    return base64.b64encode(array('f', tensor.flatten().tolist())).decode()


@torch.no_grad()
def page_html(gpt, text, layer, head, runs=()):
    """The page: its template with model.js and the data in it.

    The data have torch's logits for the text: the page compares its own with them. runs has the
    losses of the model's own run and then of those that can be compared with it, as dictionaries:
    name, and history, (step, train loss, val loss) of each report.
    """
    folder, ids = Path(__file__).parent, gpt.encode(text)[-min(gpt.block_size, CONTEXT):]
    data = json.dumps({
        'chars': gpt.chars,
        'sizes': [gpt.block_size, gpt.n_embd, gpt.n_head, gpt.n_layer],
        'context': CONTEXT,
        'text': text,
        'ids': ids,
        'logits': packed(gpt.model.eval()(torch.tensor([ids]))[0]),
        'weights': {name: packed(weight) for name, weight in gpt.model.state_dict().items()},
        'layer': layer,
        'head': head,
        'temperature': gpt.temperature,
        'top_k': gpt.top_k,
        'runs': list(runs),
    })
    page = (folder / 'page.html').read_text(encoding='utf-8')
    page = page.replace('/* model.js */', (folder / 'model.js').read_text(encoding='utf-8'))
    # The data come last, because they may look like a marker. No < in them can end the script.
    return page.replace('DATA', data.replace('<', r'\u003c'))


def write_page(gpt, path, text, layer, head):
    """Writes the page into a file, if the model is not too large for it."""
    size = sum(parameter.numel() for parameter in gpt.model.parameters())
    check(size <= LARGEST, f'the model has {size:,} parameters, and a browser can hold about '
          f'{LARGEST:,}: leave out --page, for pictures in the terminal')
    try:
        path.write_text(page_html(gpt, text, layer, head), encoding='utf-8')
    except OSError as error:
        check(False, f'cannot write {path} ({error.strerror})')
    print(f'The page is in {path}: open it in a browser')


def validation_text(gpt):
    """The last tenth of input.txt, without the characters that the model does not know."""
    try:
        text = (PROJECT / 'input.txt').read_text(encoding='utf-8-sig')
    except (OSError, UnicodeError):
        return ''
    text = ''.join(c for c in text[len(text) * 9 // 10:] if c in gpt.stoi)
    return text.partition('\n\n')[2] or text  # begin after the first empty line


def main():
    parser = argparse.ArgumentParser(description='Looks inside a saved model.')
    parser.add_argument('text', nargs='?', help='the text to show (default: some of input.txt)')
    parser.add_argument('--page', action='store_true', help='write gpt.html, for the browser')
    parser.add_argument('--layer', type=int, default=1, help='choose this layer (default: 1)')
    parser.add_argument('--head', type=int, default=1, help='choose this head (default: 1)')
    parser.add_argument('--nearest', metavar='CHARACTER',
                        help='print the characters with the most similar token embeddings instead')
    parser.add_argument('--checkpoint', type=Path, default=PROJECT,
                        help='use this file, or the newest run in this folder')
    arguments = parser.parse_args()
    checkpoint = find_checkpoint(arguments.checkpoint)
    gpt = load_checkpoint(checkpoint)
    sys.stdout.reconfigure(errors='replace')  # ? for a character that the terminal cannot show
    names = {c: c if c.isprintable() and unicodedata.east_asian_width(c) not in 'WF'
             and not unicodedata.combining(c) else '?' for c in gpt.chars}
    names.update({'\n': NEWLINE, ' ': '_'})  # what is shown for each character: one column wide
    in_order = [names[c] for c in gpt.chars]

    if arguments.nearest is not None:
        check(arguments.nearest in gpt.chars, f'--nearest: {arguments.nearest!r} is not one of '
              'the characters that the model knows')
        print(*nearest(gpt, arguments.nearest, in_order), sep='\n')
        return

    text = arguments.text
    if text is None:
        text = validation_text(gpt)[:min(gpt.block_size, FIRST if arguments.page else SHORT)]
    unknown = sorted(set(text) - set(gpt.chars))
    check(text, 'there is no text to show: give some')
    check(not unknown, f'the model does not know {unknown}: leave them out')
    shown = text[-min(gpt.block_size, CONTEXT):] if arguments.page else text
    check(len(shown) <= gpt.block_size,
          f'the text has {len(text)} characters: use at most {gpt.block_size}')
    inside, labels = look(gpt, shown), ''.join(names[c] for c in shown)
    for name, number in (('layer', gpt.n_layer), ('head', gpt.n_head)):
        check(1 <= getattr(arguments, name) <= number, f'--{name} is a number from 1 to {number}')
    if arguments.page:
        path = checkpoint.absolute().with_name('gpt.html')
        write_page(gpt, path, text, arguments.layer, arguments.head)
        return

    width = shutil.get_terminal_size().columns  # 80 where there is no terminal
    check(len(text) + 2 <= width, f'the text has {len(text)} characters, which needs a terminal '
          f'{len(text) + 2} columns wide: this one has {width}')
    if len(text) <= BY_HAND:
        print(*by_hand(inside, arguments.layer, arguments.head, labels, gpt.n_embd // gpt.n_head),
              sep='\n')
    print(*triangles(inside, labels, width), sep='\n')
    if len(text) > 1:
        print(*without_heads(gpt, text, inside), sep='\n')
    print(f'The next character after {labels}, and its probability')
    print(*bars(inside.lens[-1, -1], in_order), sep='\n')


if __name__ == '__main__':
    main()
