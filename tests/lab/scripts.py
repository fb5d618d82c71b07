"""The one way in which tests and programs edit or load bigram.py and gpt.py."""
import re
import types
from pathlib import Path

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
        line = rf'(?m)^{name} = [^#\n]*?(?=(  #.*)?$)'  # up to its comment
        source, found = re.subn(line, lambda _: f'{name} = {value!r}', source)
        if found != 1:
            raise ValueError(f'the script has {found} lines that set {name}, not one')
    return source


def load(path, *edits, **hyperparameters):
    """A script as a module, edited on the way: the file at this path stays as it is."""
    source = edited(path.read_text(encoding='utf-8'), *edits, **hyperparameters)
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    exec(compile(source, str(path), 'exec'), module.__dict__)
    return module
