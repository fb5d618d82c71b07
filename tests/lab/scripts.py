"""The one way in which tests and programs edit or load bigram.py, gpt.py and a saved model."""
import re
import sys
import tempfile
import types
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parents[2]


def edited(source, *edits, **hyperparameters):
    """The source of a script after edits, (old, new) pairs of text, and with other values at its
    top. ValueError if an old text or a hyperparameter does not occur exactly once.
    """
    for old, new in edits:
        if source.count(old) != 1:
            raise ValueError(f'the script has this {source.count(old)} times: {old.strip()}')
        source = source.replace(old, new)
    for name, value in hyperparameters.items():
        line = rf'(?m)^{name} *= *[^#\n]*?(?= *(#.*)?$)'  # up to its comment
        source, found = re.subn(line, lambda _: f'{name} = {value!r}', source)
        if found != 1:
            raise ValueError(f'the script has {found} lines that set {name}, not one')
    return source


def load(path, *edits, folder=None, **hyperparameters):
    """A script as a module, edited on the way: the file at this path stays as it is.

    folder: where the module reads input.txt, and saves; None: where the script lies.
    """
    source = edited(path.read_text(encoding='utf-8'), *edits, **hyperparameters)
    module = types.ModuleType(path.stem)
    module.__file__ = str((folder or path.parent) / path.name)
    exec(compile(source, str(path), 'exec'), module.__dict__)
    return module


def load_checkpoint(path):
    """The model in a checkpoint: gpt.py as a module, with the weights, sizes and vocabulary of the
    file, on the CPU. The code is that of the gpt.py beside the file, if there is one.

    input.txt does not matter, so the module's data mean nothing. SystemExit, with one line, if
    there is no such file, or if it does not fit the code.
    """
    if not path.is_file():
        sys.exit(f'Error: there is no {path}: train with python gpt.py, or name another file '
                 'with --checkpoint')
    script = path.absolute().with_name('gpt.py')
    if not script.exists():
        script = PROJECT / 'gpt.py'
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        chars = checkpoint['chars']
        sizes = dict(zip(('block_size', 'n_embd', 'n_head', 'n_layer'), checkpoint['sizes'],
                         strict=True))
        with tempfile.TemporaryDirectory() as folder:
            # Each script reads a text. This one has the characters of the vocabulary, and is
            # long enough for any block_size, even if all tokens are as long as the longest.
            text = ''.join(chars)
            text *= 10 * sizes['block_size'] * max(map(len, chars)) // len(text) + 1
            (Path(folder) / 'input.txt').write_text(text, encoding='utf-8')
            gpt = load(script, folder=Path(folder), device='cpu', **sizes)
        # An edited tokenizer may have tokens of more than one character.
        gpt.chars, gpt.vocab_size = chars, len(chars)
        gpt.stoi = {token: i for i, token in enumerate(chars)}
        gpt.model = gpt.m = gpt.GPTLanguageModel()
        gpt.model.load_state_dict(checkpoint['model'])
    except Exception as error:  # torch and an edited gpt.py raise errors of many types
        sys.exit(f'Error: cannot use {path} with {script} ({error!r:.200}): undo your edits, or '
                 'train again')
    return gpt
