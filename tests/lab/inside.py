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
from pathlib import Path

import torch
import torch.nn.functional as F

from runs import comparable_runs
from scripts import PROJECT, find_checkpoint, load_checkpoint
from watch import token_embeddings, watch

SHADES, NEWLINE, BAR = '·░▒▓█', '↵', '█'
LIMITS = (0.05, 0.2, 0.4, 0.7)  # the weights at which the next darker shade begins
BY_HAND = 8  # characters at most of a text whose attention is printed as numbers
SHORT, FIRST = 16, 32  # characters of the validation text: in the terminal, and on the page
CONTEXT = 64  # characters that the page reads at most: with more, it would become slow
LARGEST = 20_000_000  # parameters: the file of a larger model would be too large for a browser


def check(condition, message):
    """Exits with one line, unless the condition is true."""
    if not condition:
        sys.exit(f'Error: {message}')


# --- In the terminal
def print_table(title, numbers, labels, hidden='-inf'):
    """Prints numbers (T, T), with the characters at their sides; hidden stands for -inf."""
    print(title, ' ' + ''.join(f'{label:>8}' for label in labels), sep='\n')
    for label, row in zip(labels, numbers.tolist()):
        print(label + ''.join(f'{number:8.2f}' for number in row).replace('-inf', f'{hidden:>4}'))
    print()


def print_by_hand(seen, layer, head, labels, head_size):
    """Prints how one head arrives at its attention weights."""
    products, scores, weights = (
        tensors[layer - 1, head - 1] for tensors in (seen.products, seen.scores, seen.weights))
    masked = scores == -math.inf
    which = 'what softmax is given'
    for divisor, words in ((1, ''), (math.sqrt(head_size), f', / sqrt({head_size})')):
        if torch.allclose((products / divisor)[~masked], scores[~masked]):
            which = f"dot product of the row's query and the column's key{words}"
    print(f'Attention by hand: layer {layer}, head {head}\n'
          'A row is a character that reads, a column one that is read.\n')
    print_table(f'1. Scores: {which}', scores, labels, '-')
    if weights.triu(1).any():
        print('2. There is no causal mask: a character may read what comes later\n')
    else:
        print_table('2. After the causal mask: nobody reads what comes later', scores, labels)
    print_table('3. Attention weights, by softmax: they are positive, and each row sums to 1',
                weights, labels)


def picture(weights, labels, title):
    """The lines of one head's picture, from weights (T, T): nothing where a mask makes them 0."""
    lines = [title, '  ' + labels]
    for label, row in zip(labels, weights.tolist()):
        lines.append(f'{label} ' + ''.join(
            SHADES[sum(weight >= limit for limit in LIMITS)] if weight else ' ' for weight in row))
    return [line.ljust(max(map(len, lines))) for line in lines]


def print_pictures(seen, labels, width):
    """Prints the pictures of all heads, as many of a layer side by side as fit the width."""
    fit = max((width + 2) // (max(len(labels) + 2, len('layer 1, head 1')) + 2), 1)
    for layer, heads in enumerate(seen.weights, 1):
        pictures = [picture(weights, labels, f'layer {layer}, head {head}')
                    for head, weights in enumerate(heads, 1)]
        for first in range(0, len(pictures), fit):
            for row in zip(*pictures[first:first + fit]):
                print('  '.join(row).rstrip())
            print()
    shades = ', '.join(f'{shade} from {limit}' for shade, limit in zip(SHADES, (0,) + LIMITS))
    print(f'Weights: {shades}. _ is a space, {NEWLINE} a new line.\n')


def print_without_heads(gpt, text, seen):
    """Prints the mean loss of a text, and what it is if one head is switched off."""
    loss = seen.losses.mean().item()
    print(f'Mean loss of this text: {loss:.2f}. With one head switched off:')
    for layer in range(1, len(seen.lens)):
        for head in range(1, gpt.n_head + 1):
            other = watch(gpt, text, [(layer, head)]).losses.mean().item()
            rise = round(other, 2) - round(loss, 2)  # as printed
            print(f'layer {layer}, head {head}: {other:.2f} ({rise:+.2f})')
    print()


def print_layers(seen, labels, names):
    """Prints the most probable next characters if the model stopped after a layer."""
    print(f'The next character after {labels}, if the model stopped early')
    for layer, logits in enumerate(seen.lens[:, -1]):
        ps, ids = logits.softmax(dim=-1).topk(min(5, len(names)))
        print(f'after layer {layer}:' if layer else 'after no layer:', '  '.join(
            f'{names[i]} {p:.2f}' for i, p in zip(ids.tolist(), ps.tolist())))
    print()


def print_bars(logits, labels, names):
    """Prints the ten most probable next characters at three temperatures."""
    print(f'The next character after {labels}, and its probability')
    temperatures = (0.5, 1, 1.5)
    print('  ' + ''.join(f'temperature {temperature:<10}' for temperature in temperatures).rstrip())
    columns = [(logits / temperature).softmax(dim=-1) for temperature in temperatures]
    for i in logits.argsort(descending=True)[:10].tolist():
        print(names[i], ''.join(f'{BAR * round(12 * p[i].item())} {p[i]:.2f}'.strip().ljust(22)
                                for p in columns).rstrip())


def print_nearest(gpt, asked, names):
    """Prints the characters whose token embeddings point most nearly the same way."""
    vectors = F.normalize(token_embeddings(gpt))  # each of length 1
    asked = gpt.chars.index(asked)
    cosines = vectors @ vectors[asked]  # (vocab_size)
    others = [i for i in cosines.argsort(descending=True).tolist() if i != asked]
    print(f'cosine similarity with {names[asked]}:')
    for i in others[:10]:
        print(f'{names[i]} {cosines[i]:.2f}')


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


def write_page(gpt, path, text, layer, head, runs=()):
    """Writes the page into a file, if the model is not too large for it."""
    size = sum(parameter.numel() for parameter in gpt.model.parameters())
    check(size <= LARGEST, f'the model has {size:,} parameters, and a browser can hold about '
          f'{LARGEST:,}: leave out --page, for pictures in the terminal')
    path.write_text(page_html(gpt, text, layer, head, runs), encoding='utf-8')
    print(f'The page is in {path}: open it in a browser. (It knows the design of our gpt.py, with '
          'any sizes. If you changed the design, leave out --page.)')


def validation_text(gpt, project):
    """The last tenth of input.txt, without the characters that the model does not know."""
    try:
        text = (project / 'input.txt').read_text(encoding='utf-8-sig')
    except (OSError, UnicodeError):
        return ''
    text = ''.join(c for c in text[len(text) * 9 // 10:] if c in gpt.stoi)
    return text.partition('\n\n')[2] or text  # begin after the first empty line


def main(argv=None, project=PROJECT):
    parser = argparse.ArgumentParser(description='Looks inside a saved model.')
    parser.add_argument('text', nargs='?', help='the text to show (default: some of input.txt)')
    parser.add_argument('--page', action='store_true', help='write gpt.html, for the browser: '
                        'pictures to play with, and how the model learned')
    parser.add_argument('--layer', type=int, default=1, help='the layer whose numbers are shown, '
                        f'for a text of up to {BY_HAND} characters, and on the page (default: 1)')
    parser.add_argument('--head', type=int, default=1, help='the head, likewise (default: 1)')
    parser.add_argument('--nearest', metavar='CHARACTER',
                        help='print the characters with the most similar token embeddings instead')
    parser.add_argument('--checkpoint', type=Path, default=project,
                        help='use this file, or the newest run in this folder')
    arguments = parser.parse_args(argv)
    checkpoint = find_checkpoint(arguments.checkpoint)
    gpt = load_checkpoint(checkpoint)
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')  # ? for what the terminal cannot show
    names = {c: c if c.isprintable() and unicodedata.east_asian_width(c) not in 'WF'
             and not unicodedata.combining(c) else '?' for c in ''.join(gpt.chars)}
    names.update({'\n': NEWLINE, ' ': '_'})  # what is shown for each character: one column wide
    in_order = [''.join(names[c] for c in token) for token in gpt.chars]

    if arguments.nearest is not None:
        check(arguments.nearest in gpt.chars, f'--nearest: {arguments.nearest!r} is not one of '
              'the characters that the model knows')
        print_nearest(gpt, arguments.nearest, in_order)
        return

    check(all(len(token) == 1 for token in gpt.chars), 'the tokens of this model are longer than '
          'a character, and inside.py draws one column for each: try --nearest')
    text = arguments.text
    if text is None:
        length = min(gpt.block_size, FIRST if arguments.page else SHORT)
        text = validation_text(gpt, project)[:length]
    unknown = sorted(set(text) - set(gpt.chars))
    check(text, 'there is no text to show: give some')
    check(not unknown, f'the model does not know {unknown}: leave them out')
    shown = text[-min(gpt.block_size, CONTEXT):] if arguments.page else text
    check(len(shown) <= gpt.block_size,
          f'the text has {len(text)} characters: use at most {gpt.block_size}')
    seen, labels = watch(gpt, shown), ''.join(names[c] for c in shown)
    for name, number in (('layer', len(seen.lens) - 1), ('head', gpt.n_head)):
        check(1 <= getattr(arguments, name) <= number, f'--{name} is a number from 1 to {number}')
    if arguments.page:
        path = checkpoint.absolute().with_name('gpt.html')
        write_page(gpt, path, text, arguments.layer, arguments.head, comparable_runs(checkpoint))
        return

    width = shutil.get_terminal_size().columns  # 80 where there is no terminal
    check(len(text) + 2 <= width, f'the text has {len(text)} characters, which needs a terminal '
          f'{len(text) + 2} columns wide: this one has {width}')
    if seen.weights is None:
        print('No pictures: not each block of this model has one softmax that turns scores into '
              'weights. (Torch\'s own attention, as in exercise 24, shows neither.)\n')
    else:
        if len(text) <= BY_HAND:
            print_by_hand(seen, arguments.layer, arguments.head, labels, gpt.n_embd // gpt.n_head)
        print_pictures(seen, labels, width)
    if len(text) > 1:
        print_without_heads(gpt, text, seen)
    print_layers(seen, labels, in_order)
    print_bars(seen.logits[-1], labels, in_order)


if __name__ == '__main__':
    main()
