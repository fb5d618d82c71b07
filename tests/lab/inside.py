"""Looks inside the model in gpt.pt: what its attention reads, and what it predicts.

    python tests/lab/inside.py "the k"           numbers and pictures, in the terminal
    python tests/lab/inside.py "the k" --page    a page for the browser: gpt.html, beside gpt.pt
    python tests/lab/inside.py --nearest .       the characters with the most similar embeddings

Without a text, it takes some of the validation text. Everything shown is computed by the layers of
the trained model; the template of the page, page.html, draws it.
"""
import argparse
import json
import math
import shutil
import sys
import unicodedata
from collections import Counter, namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F

from scripts import PROJECT, load_checkpoint

SHADES, NEWLINE, BAR = '·░▒▓█', '↵', '█'
ASCII_SHADES, ASCII_NEWLINE, ASCII_BAR = '.:+*#', '/', '#'
LIMITS = (0.05, 0.2, 0.4, 0.7)  # the weights at which the next darker shade begins
BY_HAND = 8  # characters at most of a text whose attention is printed as numbers
PAGE = 64  # characters at most of a text on the page
# What the page shows at most, so that its file stays small, however large the model is:
HEADS, STEPS, GUESSES, LOGITS = 48, 16, 5, 100

# Of one text with T characters: scores and attention weights (n_layer, n_head, T, T); lens, the
# logits if the model stopped after the embeddings or a block (n_layer + 1, T, vocab_size); losses,
# that of each character but the first (T - 1).
Inside = namedtuple('Inside', 'scores weights lens losses')


def check(condition, message):
    """Exits with status 1 and this message, unless the condition is true."""
    if not condition:
        sys.exit(f'Error: {message}')


def attention(sa, x):
    """What an attention module does with x, spelled out as in gpt.py: scores, weights, output."""
    B, T, C = x.shape
    q, k, v = sa.qkv(x).chunk(3, dim=-1)  # (B, T, C) each
    hs = C // sa.n_head
    q, k, v = (z.view(B, T, sa.n_head, hs).transpose(1, 2) for z in (q, k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(hs)  # (B, nh, T, T)
    weights = masked(scores).softmax(dim=-1)  # (B, nh, T, T)
    return scores, weights, sa.proj((weights @ v).transpose(1, 2).flatten(2))


def masked(scores):
    """Scores (..., T, T) after the causal mask: -inf where the column comes after the row."""
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)


@torch.no_grad()
def look(gpt, text):
    """What the model in gpt computes for a text, as an Inside; exits if it is not what we draw."""
    edited = 'gpt.py is edited: its {} is not the one that this program draws'
    ids = torch.tensor(gpt.encode(text))
    heads, stream = [], []  # of each layer: scores and weights; x after embeddings and each block

    def keep_attention(sa, inputs, output):
        scores, weights, expected = attention(sa, *inputs)
        check(torch.allclose(output, expected, rtol=1e-3, atol=1e-4),
                  edited.format('attention'))
        heads.append((scores[0], weights[0]))

    model = gpt.model.eval()
    try:
        hooks = [block.sa.register_forward_hook(keep_attention) for block in model.blocks]
        hooks += [block.register_forward_hook(lambda block, inputs, x: stream.append(x[0]))
                  for block in model.blocks]
        hooks.append(model.blocks[0].register_forward_pre_hook(
            lambda block, inputs: stream.append(inputs[0][0])))
        logits = model(ids[None])[0][0]  # (T, vocab_size)
    except (AttributeError, RuntimeError, ValueError):  # it has other parts, of other shapes
        check(False, edited.format('attention'))
    for hook in hooks:
        hook.remove()
    lens = model.lm_head(model.ln_f(torch.stack(stream)))  # the last two layers, applied early
    check(heads, edited.format('attention'))
    check(torch.allclose(lens[-1], logits, rtol=1e-3, atol=1e-4), edited.format('output'))
    scores, weights = (torch.stack(tensors) for tensors in zip(*heads))
    return Inside(scores, weights, lens, F.cross_entropy(logits[:-1], ids[1:], reduction='none'))


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


def picture(weights, labels, title, shades):
    """The lines of one head's picture, from weights (T, T); nothing above the diagonal."""
    lines = [title, '  ' + labels]
    for i, label in enumerate(labels):
        levels = [sum(w >= limit for limit in LIMITS) for w in weights[i, :i + 1].tolist()]
        lines.append(f'{label} ' + ''.join(shades[level] for level in levels))
    return [line.ljust(max(map(len, lines))) for line in lines]


def triangles(inside, labels, shades, width):
    """The lines of the pictures of all heads, as many of a layer side by side as fit the width."""
    fit = max((width + 2) // (max(len(labels) + 2, len('layer 1, head 1')) + 2), 1)
    lines = []
    for layer, heads in enumerate(inside.weights, 1):
        pictures = [picture(weights, labels, f'layer {layer}, head {head}', shades)
                    for head, weights in enumerate(heads, 1)]
        for first in range(0, len(pictures), fit):
            lines += ['  '.join(row).rstrip() for row in zip(*pictures[first:first + fit])] + ['']
    return lines + ['Weights: ' + ', '.join(f'{shade} from {limit}'
                                            for shade, limit in zip(shades, (0,) + LIMITS)), '']


def bars(logits, names, bar):
    """The lines with the ten most probable next characters at three temperatures."""
    temperatures = (0.5, 1, 1.5)
    lines = ['  ' + ''.join(f'temperature {temperature:<10}' for temperature in temperatures)]
    columns = [(logits / temperature).softmax(dim=-1) for temperature in temperatures]
    for i in logits.argsort(descending=True)[:10].tolist():
        lines.append(f'{names[i]} ' + ''.join(
            f'{bar * round(12 * p[i].item())} {p[i]:.2f}'.strip().ljust(22) for p in columns))
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
def page_name(character):
    """What the page shows for a character: something to see for those that show nothing."""
    if character in '\n ':
        return {'\n': '↵', ' ': '␣'}[character]
    if unicodedata.category(character).startswith('M'):  # an accent needs a letter to sit on
        return '◌' + character
    return character if character.isprintable() else f'U+{ord(character):04X}'


def guesses(logits, names):
    """The most probable characters of each row of logits, with p in thousandths."""
    ps, ids = logits.softmax(dim=-1).topk(min(GUESSES, len(names)))
    return [[[names[i], round(1000 * p)] for p, i in zip(*row)]
            for row in zip(ps.tolist(), ids.tolist())]


def page_data(gpt, text, layer, head):
    """What page.html shows of a text, and no more: weights and probabilities in thousandths."""
    inside = look(gpt, text)
    thousandths = (inside.weights * 1000).round().int()
    heads = [(i, j) for i in range(1, gpt.n_layer + 1) for j in range(1, gpt.n_head + 1)]
    if len(heads) > HEADS:
        heads = [pair for pair in heads if pair[0] == layer]
    if len(heads) > HEADS:
        heads = [(layer, head)]
    # A model with many layers: steps from the first to the last, at equal distances.
    steps = sorted({round(i * gpt.n_layer / (STEPS - 1)) for i in range(STEPS)})
    names = [page_name(character) for character in gpt.chars]
    # Logits with how often they occur, in falling order. Those of the tail, which have no bars but
    # share in the sum, are grouped by hundredths.
    logits, ids = inside.lens[-1, -1].sort(descending=True)
    tail = Counter(round(logit, 2) for logit in logits[LOGITS:].tolist())
    return {
        'sizes': [gpt.n_layer, gpt.n_head, gpt.n_embd, len(gpt.chars)],
        'text': [page_name(character) for character in text],
        'heads': [{'layer': i, 'head': j, 'weights': [
            row[:n] for n, row in enumerate(thousandths[i - 1, j - 1].tolist(), 1)]}
            for i, j in heads],
        'chosen': heads.index((layer, head)),
        'steps': steps,
        'guesses': [guesses(logits, names) for logits in inside.lens[steps]],
        'losses': [round(loss, 4) for loss in inside.losses.tolist()],
        'mean_loss': round(inside.losses.mean().item(), 4) if len(text) > 1 else None,
        'logits': [[logit, 1] for logit in logits[:LOGITS].tolist()] + [*map(list, tail.items())],
        'names': [names[i] for i in ids[:LOGITS].tolist()],
        'temperature': gpt.temperature,
        'top_k': gpt.top_k,
    }


def page_html(data):
    """The page: its template with the data in it, in which nothing can end the script element."""
    template = Path(__file__).with_name('page.html').read_text(encoding='utf-8')
    return template.replace('DATA', json.dumps(data, separators=(',', ':')).replace('<', r'\u003c'))


def main():
    parser = argparse.ArgumentParser(description='Looks inside the model in gpt.pt.')
    parser.add_argument('text', nargs='?', help='the text to show (default: some of input.txt)')
    parser.add_argument('--page', action='store_true', help='write gpt.html, for the browser')
    parser.add_argument('--layer', type=int, help='choose this layer (default: 1; on the page 2)')
    parser.add_argument('--head', type=int, help='choose this head (default: 1; on the page 2)')
    parser.add_argument('--nearest', metavar='CHARACTER',
                        help='print the characters with the most similar token embeddings instead')
    parser.add_argument('--checkpoint', type=Path, help='use this file instead of gpt.pt')
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint or PROJECT / 'gpt.pt'
    gpt = load_checkpoint(checkpoint)
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(line_buffering=True, errors='replace')
    val_text = (PROJECT / 'input.txt').read_text(encoding='utf-8-sig')
    val_text = val_text[len(val_text) * 9 // 10:]

    try:
        (SHADES + NEWLINE + BAR).encode(sys.stdout.encoding or 'ascii')
        shades, newline, bar = SHADES, NEWLINE, BAR
    except UnicodeError:
        shades, newline, bar = ASCII_SHADES, ASCII_NEWLINE, ASCII_BAR
    names = {c: c if c.isprintable() and unicodedata.east_asian_width(c) not in 'WF'
             and not unicodedata.combining(c) else '?' for c in gpt.chars}
    names.update({'\n': newline, ' ': '_'})  # what is shown for each character: one column wide
    in_order = [names[c] for c in gpt.chars]

    if arguments.nearest is not None:
        check(arguments.nearest in gpt.chars, f'--nearest: {arguments.nearest!r} is not one of the '
              'characters that the model knows')
        print(*nearest(gpt, arguments.nearest, in_order), sep='\n')
        return

    text, most = arguments.text, min(gpt.block_size, PAGE) if arguments.page else gpt.block_size
    if text is None:  # begin after the first empty line
        val_text = ''.join(c for c in val_text if c in gpt.stoi)
        length = most if arguments.page else min(most, 16)
        text = (val_text.partition('\n\n')[2] or val_text)[:length]
    unknown = sorted(set(text) - set(gpt.chars))
    check(text, 'there is no text to show: give some')
    check(not unknown, f'the model does not know {unknown}: leave them out')
    check(len(text) <= most, f'the text has {len(text)} characters: use at most {most}')
    for name, number in (('layer', gpt.n_layer), ('head', gpt.n_head)):
        if getattr(arguments, name) is None:  # the page begins where there is more to see
            setattr(arguments, name, min(2, number) if arguments.page else 1)
        check(1 <= getattr(arguments, name) <= number, f'--{name} is a number from 1 to {number}')

    if arguments.page:
        path = checkpoint.absolute().with_name('gpt.html')
        html = page_html(page_data(gpt, text, arguments.layer, arguments.head))
        try:
            path.write_text(html, encoding='utf-8')
        except OSError as error:
            check(False, f'cannot write {path} ({error.strerror})')
        print(f'The page is in {path}: open it in a browser')
        return

    width = shutil.get_terminal_size().columns  # 80 where there is no terminal
    check(len(text) + 2 <= width, f'the text has {len(text)} characters, which needs a terminal '
          f'{len(text) + 2} columns wide: this one has {width}')
    inside, labels = look(gpt, text), ''.join(names[c] for c in text)
    if len(text) <= BY_HAND:
        print(*by_hand(inside, arguments.layer, arguments.head, labels, gpt.n_embd // gpt.n_head),
              sep='\n')
    print(*triangles(inside, labels, shades, width), sep='\n')
    print(f'The next character after {labels}, and its probability')
    print(*bars(inside.lens[-1, -1], in_order, bar), sep='\n')


if __name__ == '__main__':
    main()
