"""A bigram language model, the baseline: it predicts each character from the one before.

Run it with: python bigram.py
Within seconds the loss, which says how wrong the predictions are, falls from 4.17 to about 2.4,
and the text has plausible letter pairs. gpt.py has the same sections, with a transformer.
"""
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Hyperparameters: change them, run again, and compare.
device = 'cuda' if torch.cuda.is_available() else 'cpu'  # where the model runs
batch_size = 64  # sequences per training step
block_size = 32  # characters per sequence
max_iters = 800  # training steps
eval_interval = 200  # steps between loss estimates
eval_iters = 10  # batches averaged in each loss estimate, for each split
learning_rate = 0.1  # how far a step moves a weight at first; it decays to 0
seed = 1337  # random seed: the same run again, on the same machine with the same torch

# --- Text and tokenizer: a token is one character, and its id is its place in the vocabulary.
folder = Path(globals().get('__file__', '')).parent  # the script's folder, or the notebook's
try:
    text = (folder / 'input.txt').read_text(encoding='utf-8-sig')
except (OSError, UnicodeError):
    text = ''  # the last section reports it
chars = sorted(set(text))  # the vocabulary: every character that occurs in the text
vocab_size = len(chars)
stoi = {character: i for i, character in enumerate(chars)}  # string to integer: its id


def encode(string):
    """The token ids of a string, as a list; KeyError for a character not in the vocabulary."""
    return [stoi[character] for character in string]


def decode(ids):
    """The reverse of encode: the string for a list of token ids."""
    return ''.join(chars[i] for i in ids)


data = torch.tensor(encode(text), dtype=torch.long)  # a tensor (array): (number of characters)
n_train = len(data) * 9 // 10
train_data, val_data = data[:n_train], data[n_train:]  # val, the last tenth: never trained on


def get_batch(split, generator=None):
    """Random sequences from the 'train' or 'val' split: inputs x and targets y, each (B, T).

    B = batch_size sequences of T = block_size positions ("time"). The target y[b, t] is the
    character that follows x[b, t] in the text: each position is one prediction to learn from.
    """
    ids = train_data if split == 'train' else val_data
    start = torch.randint(len(ids) - block_size, (batch_size, 1), generator=generator)  # (B, 1)
    positions = start + torch.arange(block_size)  # (B, 1) + (T) -> (B, T): start + 0, 1, ...
    x, y = ids[positions], ids[positions + 1]  # (B, T) each: y is x shifted by one
    return x.to(device), y.to(device)


@torch.no_grad()  # records nothing for backward(), which only training needs
def estimate_loss():
    """The model's mean loss on each split, {'train': ..., 'val': ...}, in nats per character.

    It averages eval_iters batches, always the same ones, so that estimates can be compared.
    If the train loss falls while the val loss rises, the model memorises: it is overfitting.
    """
    generator = torch.Generator().manual_seed(seed)
    losses = {}
    for split in ('train', 'val'):
        batches = [get_batch(split, generator) for _ in range(eval_iters)]
        losses[split] = sum(model(x, y)[1].item() for x, y in batches) / eval_iters
    return losses


# --- Model
# A module knows the weights of all its parts, and model(x, y) calls its forward. Torch records
# the operations on them, so that backward() can go back and give each weight its gradient.
class BigramLanguageModel(nn.Module):
    """Predicts the next character from the current one, by a table with a row per character.

    Row i holds a score, called a logit, for each character that may follow character i. Softmax
    turns the logits of a row into probabilities: exp(logit) / the sum of all exp(logit).
    """

    def __init__(self, vocab_size=vocab_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)  # row i: its logits
        nn.init.zeros_(self.token_embedding_table.weight)  # equal logits: equal probabilities

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size); with targets (B, T), the loss as well.

        The loss is the cross-entropy in nats per character: the mean of -ln(p), where p is the
        probability of the actual next character. For 65 equally likely ones it is ln 65 = 4.17.
        """
        logits = self.token_embedding_table(idx)  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        # cross_entropy applies the softmax; it takes (B * T, vocab_size) and (B * T).
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        """Appends sampled tokens to each row of idx: (B, T) -> (B, T + max_new_tokens)."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -1:])  # (B, 1, vocab_size): only the last character matters
            logits = logits[:, -1]  # (B, vocab_size): for the next token
            idx_next = torch.multinomial(logits.softmax(dim=-1), num_samples=1)  # (B, 1), drawn
            idx = torch.cat((idx, idx_next), dim=1)  # (B, T + 1)
        return idx


# --- Training
def train():
    """Adjusts the weights, step by step, to make the actual next characters more probable."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    # A factor of learning_rate, from 1 to 0: weights settle instead of following every batch.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max_iters)
    started = time.time()
    for step in range(max_iters + 1):
        if step % eval_interval == 0 or step == max_iters:
            losses = estimate_loss()
            print(f"step {step}: train loss {losses['train']:.4f}, "
                  f"val loss {losses['val']:.4f}, {time.time() - started:.0f} s")
            check(sum(losses.values()) < float('inf'),
                  'the loss is not finite: lower learning_rate')
        if step == max_iters:
            break
        x, y = get_batch('train')  # (B, T) each
        logits, loss = model(x, y)
        optimizer.zero_grad()  # otherwise the gradients would add to those of earlier steps
        loss.backward()  # the gradient of each weight: how fast the loss rises with it
        optimizer.step()  # moves each weight against its gradient, about learning_rate at most
        scheduler.step()  # sets the learning rate for the next step


# --- Housekeeping. On a first reading, skip to the last section.
def check(condition, message):
    """Exits with status 1 and this message, unless the condition is true."""
    if not condition:
        sys.exit(f'Error: {message}')


def excepthook(kind, error, traceback):
    """Ends the script: no traceback for Ctrl-C, a closed pipe or too little memory."""
    if kind is KeyboardInterrupt:
        print('Stopped by Ctrl-C.', file=sys.stderr)
    if kind in (KeyboardInterrupt, BrokenPipeError):  # a closed pipe, as in `... | head -1`
        os._exit(130)  # not sys.exit: it would flush stdout, into the closed pipe
    if kind in (MemoryError, torch.OutOfMemoryError) or 'DefaultCPUAllocator' in str(error):
        check(False, 'out of memory: lower batch_size or block_size')
    sys.__excepthook__(kind, error, traceback)


for name in ('batch_size', 'block_size', 'max_iters', 'eval_interval', 'eval_iters'):
    value = globals()[name]
    check(type(value) is int and 0 < value < 1e9,
          f'{name} = {value!r}: use a whole number above 0, and below 1e9')
check(type(seed) is int and abs(seed) < 1e9, f'seed = {seed!r}: use a whole number')
check(type(learning_rate) in (int, float) and 1e-9 <= learning_rate <= 1000,
      f'learning_rate = {learning_rate!r}: use a number from 1e-9 to 1000')
try:
    torch.zeros(1, device=torch.device(device)).item()
except Exception:  # torch raises errors of many types here
    check(False, f"device = {device!r}: torch cannot use that here; use 'cpu'")
if __name__ == '__main__':
    if not sys.flags.interactive:  # after `python -i`, Ctrl-C must not end the session
        sys.excepthook = excepthook
    if hasattr(sys.stdout, 'reconfigure'):  # not in IDLE or a notebook
        # Print each line at once, and ? for a character that the terminal cannot show.
        sys.stdout.reconfigure(line_buffering=True, errors='replace')

# --- Build the model, train it, and let it write.
torch.manual_seed(seed)
model = m = BigramLanguageModel().to(device)

if __name__ == '__main__':
    check(len(val_data) > block_size, 'put a UTF-8 text of more than '
          f'{10 * block_size} characters into {folder / "input.txt"}')
    train()
    # start from token 0: in our input.txt, that is the newline
    context = torch.zeros((1, 1), dtype=torch.long, device=device)
    print(decode(m.generate(context, max_new_tokens=500)[0].tolist()))
