"""The one way in which tests and programs edit or load bigram.py, gpt.py and a saved model."""
import ast
import re
import sys
import tempfile
import types
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parents[2]
BELOW = '# --- Text and tokenizer'  # the line below the hyperparameters
SIZES = ('block_size', 'n_embd', 'n_head', 'n_layer')  # the hyperparameters that make the shapes


def hyperparameters_of(source):
    """The names that a script sets above its text and tokenizer; ValueError if it has no such part.
    """
    if source.count(BELOW) != 1:
        raise ValueError(f'the script has the line "{BELOW}" {source.count(BELOW)} times, not once')
    return {node.id for node in ast.walk(ast.parse(source.partition(BELOW)[0]))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def edited(source, *edits, **hyperparameters):
    """The source of a script after edits, (old, new) pairs of text, and with other values, set
    below its last hyperparameter, however the script sets them. ValueError if an old text does
    not occur exactly once, or if the script has no such hyperparameter.
    """
    for old, new in edits:
        if source.count(old) != 1:
            line = old.strip().splitlines()[0]
            raise ValueError(f'a line occurs {source.count(old)} times, not once: {line}')
        source = source.replace(old, new)
    unknown = hyperparameters.keys() - hyperparameters_of(source)
    if unknown:
        raise ValueError(f'the script has no hyperparameter {", ".join(sorted(unknown))}')
    values = ''.join(f'{name} = {value!r}\n' for name, value in hyperparameters.items())
    return source.replace(f'\n{BELOW}', f'{values}\n{BELOW}')


def load(path, *edits, folder=None, **hyperparameters):
    """A script as a module, edited on the way: the file at this path stays as it is.

    folder: where the module reads input.txt, and saves; None: where the script lies. ValueError if
    the script sets one of these hyperparameters again, further down.
    """
    source = edited(path.read_text(encoding='utf-8'), *edits, **hyperparameters)
    module = types.ModuleType(path.stem)
    module.__file__ = str((folder or path.parent) / path.name)
    exec(compile(source, str(path), 'exec'), module.__dict__)
    for name, value in hyperparameters.items():
        if getattr(module, name) != value:
            raise ValueError(f'{name} is set again, below the hyperparameters')
    return module


def find_runs(folder):
    """The files of all runs in a folder, the newest last: the one that began last, by its name.

    A gpt.pt comes first: it is of an older gpt.py, which did not give each run a file of its own.
    """
    runs = (path for path in folder.glob('gpt-*.pt')
            if re.fullmatch(r'gpt-\d{4}-\d\d-\d\d-\d{6}-\d{6}', path.stem))
    return [path for path in [folder / 'gpt.pt', *sorted(runs)] if path.is_file()]


def find_checkpoint(path):
    """The file of a saved model: the one at this path or, in a folder, that of the newest run.

    SystemExit, with one line, if there is no file, or one of another kind.
    """
    if path.is_file() and path.suffix != '.pt':
        sys.exit(f'Error: {path} is not a saved model: name a file such as gpt-DATE.pt')
    runs = find_runs(path) if path.is_dir() else [path] if path.is_file() else []
    if not runs:
        sys.exit(f'Error: there is no saved model in {path}: train with python gpt.py, or name '
                 'another file or folder with --checkpoint')
    if path.is_dir():
        print(f'The newest run: {runs[-1]}', file=sys.stderr)
    return runs[-1]


def script_beside(path):
    """The gpt.py beside the file of a run, or else that of the project."""
    script = path.absolute().with_name('gpt.py')
    return script if script.exists() else PROJECT / 'gpt.py'


def read_checkpoint(path):
    """What the file of a run holds: model, chars, settings and history."""
    checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    if 'sizes' in checkpoint:  # a gpt.pt
        settings = dict(zip(SIZES, checkpoint.pop('sizes'), strict=True))
        checkpoint = {**checkpoint, 'settings': settings, 'history': []}
    return checkpoint


def settings_for(script, settings):
    """Of the settings of a run, those that this script still has, and the CPU as the device.

    Not seed: that of the script counts.
    """
    known = hyperparameters_of(script.read_text(encoding='utf-8')) - {'seed'}
    return {name: value for name, value in {**settings, 'device': 'cpu'}.items() if name in known}


def load_checkpoint(path):
    """The model in a checkpoint: gpt.py as a module, with the weights, settings and vocabulary of
    the file, on the CPU, in evaluation mode. The code is that of script_beside.

    path: as in find_checkpoint. input.txt does not matter, so the module's data mean nothing.
    SystemExit, with one line, if there is no such file, or if it does not fit the code.
    """
    path = find_checkpoint(path)
    script = script_beside(path)
    try:
        checkpoint = read_checkpoint(path)
        chars, weights, settings = (checkpoint[name] for name in ('chars', 'model', 'settings'))
        with tempfile.TemporaryDirectory() as folder:
            # Each script reads a text. This one has the characters of the vocabulary, and is
            # long enough for any block_size, even if all tokens are as long as the longest.
            text = ''.join(chars)
            text *= 10 * settings.get('block_size', 1) * max(map(len, chars)) // len(text) + 1
            (Path(folder) / 'input.txt').write_text(text, encoding='utf-8')
            gpt = load(script, folder=Path(folder), **settings_for(script, settings))
        # An edited tokenizer may have tokens of more than one character.
        gpt.chars, gpt.vocab_size = chars, len(chars)
        gpt.stoi = {token: i for i, token in enumerate(chars)}
        gpt.model = gpt.m = gpt.GPTLanguageModel().eval()
        for name in weights.keys() - gpt.model.state_dict().keys():
            if name.endswith('.qkv.weight'):  # of a gpt.pt: queries, keys and values in one
                for part, weight in zip(('query', 'key', 'value'), weights.pop(name).chunk(3)):
                    weights[name.replace('qkv', part)] = weight
        gpt.model.load_state_dict(weights)
    except Exception as error:  # torch and an edited gpt.py raise errors of many types
        sys.exit(f'Error: cannot use {path} with {script} ({error!r:.200}): undo your edits, or '
                 'train again')
    return gpt
