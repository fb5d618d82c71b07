"""A bigram language model, the simplest baseline. Run it with: python bigram.py

Within seconds the loss (lower is better) falls from 4.17 to about 2.4, and the generated text
has plausible letter pairs. `diff bigram.py gpt.py` shows what a transformer adds to this script.
"""
import os
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Hyperparameters: change them, run again, and compare.
device = 'cuda' if torch.cuda.is_available() else 'cpu'  # where the model runs
batch_size = 64  # sequences per training step
block_size = 32  # characters per sequence
max_iters = 800  # training steps
eval_interval = 200  # steps from one loss estimate to the next
eval_iters = 10  # batches that one estimate averages, for each split
learning_rate = 0.1  # initial learning rate; it decays linearly to 0, so that the weights settle
seed = 1337  # random seed: on the same CPU, the same seed gives the same losses and text

# --- Text and tokenizer: a token is one character, and its id is its place in the vocabulary.
text, text_error = '', None
try:
    text = Path(__file__).with_name('input.txt').read_text(encoding='utf-8-sig')
except (OSError, UnicodeError) as error:
    text_error = f'cannot read input.txt ({error}): put a UTF-8 text file there'
chars = sorted(set(text))  # the vocabulary: every character that occurs in the text
vocab_size = len(chars)
stoi = {character: i for i, character in enumerate(chars)}  # string to integer, a token id


def encode(string):
    """The token ids of a string, as a list; KeyError if a character is not in the vocabulary."""
    return [stoi[character] for character in string]


def decode(ids):
    """The string that a list of token ids stands for."""
    return ''.join(chars[i] for i in ids)


data = torch.tensor(encode(text), dtype=torch.long)  # (number of characters)
train_data, val_data = data.tensor_split([len(data) * 9 // 10])  # last tenth: never trained on


def get_batch(split, generator=None):
    """Random sequences from the 'train' or 'val' split: inputs x and targets y, each (B, T).

    B = batch_size sequences, T = block_size positions in each ("time"). The target y[b, t] is the
    character after x[b, t]: T predictions to learn from, with contexts of 1 to T characters.
    """
    data = train_data if split == 'train' else val_data
    starts = torch.randint(len(data) - block_size, (batch_size, 1), generator=generator)  # (B, 1)
    positions = starts + torch.arange(block_size)  # broadcast: (B, 1) + (T) -> (B, T)
    x, y = data[positions], data[positions + 1]  # (B, T) each: y is x shifted by one
    return x.to(device), y.to(device)


@torch.no_grad()  # no gradients are needed here, and without them it takes less time and memory
def estimate_loss():
    """The model's mean loss on each split, in nats per character: {'train': ..., 'val': ...}.

    One batch gives a noisy loss, so this averages eval_iters of them, the same ones every time.
    The model never trains on val: if the val loss rises while train falls, it is overfitting.
    """
    generator = torch.Generator().manual_seed(seed)
    losses = {}
    for split in ('train', 'val'):
        batch_losses = [model(*get_batch(split, generator))[1].item() for _ in range(eval_iters)]
        losses[split] = sum(batch_losses) / eval_iters
    return losses


# --- Model
class BigramLanguageModel(nn.Module):
    """Predicts the next character from the current one. Row i of a table holds scores, called
    logits, for what may follow character i. Softmax gives probabilities: exp(logit) / sum of exps.
    """

    def __init__(self, vocab_size=vocab_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)
        nn.init.zeros_(self.token_embedding_table.weight)  # equal logits: equal probabilities

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size), and the loss if there are targets (B, T).

        The loss is the cross-entropy in nats per character: the mean of -ln(p), where p is the
        model's probability for the actual next character. 65 equally likely ones give ln 65 = 4.17.
        """
        logits = self.token_embedding_table(idx)  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # mean over B * T

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        """Continues each row of idx by sampled tokens: (B, T) -> (B, T + max_new_tokens)."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -block_size:])  # (B, min(T, block_size), vocab_size)
            logits = logits[:, -1]  # (B, vocab_size): what may follow the last token
            idx_next = torch.multinomial(logits.softmax(dim=-1), num_samples=1)  # (B, 1)
            idx = torch.cat((idx, idx_next), dim=1)  # (B, T + 1)
        return idx


# --- Checks: on a bad setting, the script exits with one line that says how to fix it.
def check(condition, message):
    """If the condition is false, exits with status 1 and the message on standard error."""
    if not condition:
        sys.exit(f'{Path(__file__).name}: {message}')


def excepthook(kind, error, traceback):
    """Handles uncaught errors: no traceback for Ctrl-C, a closed pipe or too little memory."""
    if kind is KeyboardInterrupt:
        print(f'{Path(__file__).name}: stopped by Ctrl-C', file=sys.stderr)
    if kind in (KeyboardInterrupt, BrokenPipeError):  # closed pipe: `| head -1`, for example
        os._exit(130)
    check('allocate' not in str(error), 'out of memory: lower batch_size or block_size')
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = excepthook if __name__ == '__main__' else sys.excepthook
for name in ('batch_size', 'block_size', 'max_iters', 'eval_interval', 'eval_iters', 'seed'):
    value = globals()[name]
    check(type(value) is int and abs(value) < 1e9 and (value > 0 or name == 'seed'),
          f'{name} = {value!r}: use a whole number above 0 and below 1e9, written like 10_000')
check(type(learning_rate) in (int, float) and 0 < learning_rate < 1e6,
      f'learning_rate = {learning_rate!r}: use a number above 0 and below 1e6, such as 1e-3')
try:
    torch.zeros(1, device=torch.device(device)).item()
except Exception:  # torch raises errors of many types here
    check(False, f"device = {device!r}: torch cannot use that here, use 'cpu'")
torch.manual_seed(seed)
model = m = BigramLanguageModel().to(device)


# --- Training
def train():
    """Adjusts the weights, batch by batch, to make the actual next characters more probable."""
    check(len(val_data) > block_size, text_error or f'input.txt is too short: its last tenth has '
          f'{len(val_data)} characters, and needs more than block_size = {block_size}: add text')
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=max_iters)
    for step in range(max_iters + 1):
        if step % eval_interval == 0 or step == max_iters:
            losses = estimate_loss()
            print(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
            check(losses['val'] < float('inf'), 'the loss is not a number: lower learning_rate')
        if step == max_iters:
            break
        x, y = get_batch('train')  # (B, T) each
        logits, loss = model(x, y)
        optimizer.zero_grad()  # otherwise the gradients would add to those of the last step
        loss.backward()  # the gradient: how fast the loss rises with each weight
        optimizer.step()  # moves every weight a little, against its gradient
        scheduler.step()  # sets the learning rate for the next step


if __name__ == '__main__':
    if hasattr(sys.stdout, 'reconfigure'):  # not in IDLE or a notebook
        sys.stdout.reconfigure(line_buffering=True, errors='replace')  # '?' for what it cannot show
    train()
    # --- Generation, starting from token 0: the newline, in our input.txt.
    context = torch.zeros((1, 1), dtype=torch.long, device=device)
    print(decode(m.generate(context, max_new_tokens=500)[0].tolist()))
