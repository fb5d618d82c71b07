"""Continues a text with a saved model.

    python tests/lab/sample.py "FLINT:"        with the model of the newest run
    python -i tests/lab/sample.py "The "       then goes on in Python: model, encode, decode

Without a text it starts from token 0, as gpt.py does. --help lists the options.
"""
import argparse
import sys
from pathlib import Path

import torch

from scripts import PROJECT, load_checkpoint


def main(argv=None, project=PROJECT):
    """Prints the text; the module of the model."""
    parser = argparse.ArgumentParser(description='Continues a text with a saved model.')
    parser.add_argument('prompt', nargs='?', help='the text to continue (default: token 0)')
    parser.add_argument('--checkpoint', type=Path, default=project,
                        help='use this file, or the newest run in this folder')
    parser.add_argument('--temperature', type=float, help='default: the value in gpt.py')
    parser.add_argument('--top-k', type=int, help='default: the value in gpt.py')
    parser.add_argument('--length', type=int, default=500, help='characters to generate')
    parser.add_argument('--seed', type=int, help='default: the value in gpt.py')
    arguments = parser.parse_args(argv)
    if arguments.temperature is not None and not arguments.temperature > 0:
        parser.error('--temperature: use a number above 0, or --top-k 1 for no chance at all')
    if arguments.top_k is not None and arguments.top_k < 1:
        parser.error('--top-k: use a whole number above 0')
    if arguments.prompt == '':
        sys.exit('Error: the text is empty: give it at least one character, or leave it out')

    gpt = load_checkpoint(arguments.checkpoint)
    for name in ('temperature', 'top_k', 'seed'):
        if getattr(arguments, name) is not None:
            setattr(gpt, name, getattr(arguments, name))
    torch.manual_seed(gpt.seed)
    unknown = sorted(set(arguments.prompt or '') - set(gpt.chars))
    if unknown:
        sys.exit(f'Error: the model does not know {unknown}: leave them out')
    ids = [0] if arguments.prompt is None else gpt.encode(arguments.prompt)
    context = torch.tensor([ids])  # (1, T)
    print(gpt.decode(gpt.model.generate(context, arguments.length)[0].tolist()))
    return gpt


if __name__ == '__main__':
    gpt = main()
    model, encode, decode = gpt.model, gpt.encode, gpt.decode
