"""A bigram language model: the simplest program that learns to write.

    python bigram.py

It reads input.txt and learns one thing: which character tends to follow which. In a few seconds
the loss falls from 4.17 to about 2.4, and the text it writes has believable pairs of letters and
nothing longer. That is the baseline. gpt.py is the same script with a better model in the middle:
`diff bigram.py gpt.py` shows what a transformer adds.
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Hyperparameters: change them, run again, and see.
device = 'cuda' if torch.cuda.is_available() else 'cpu'  # where the arithmetic happens
batch_size = 64  # how many pieces of text one training step looks at
block_size = 32  # how many characters long each piece is
max_iters = 800  # training steps
eval_interval = 200  # steps from one loss estimate to the next
eval_iters = 10  # batches that one estimate averages, for each split
learning_rate = 0.1  # size of the first step; from there it falls to 0
seed = 1337  # same seed, same machine: same losses, same text


# --- Settings that cannot work end the run here, with one line that says what to do.
def need(fact, remedy):
    """Unless fact is true, exits with status 1 and the remedy on standard error."""
    if not fact:
        sys.exit(f'{Path(__file__).name}: {remedy}')


for name in ('batch_size', 'block_size', 'max_iters', 'eval_interval', 'eval_iters'):
    value = globals()[name]
    need(isinstance(value, int) and value > 0, f'{name} = {value}: use a whole number above 0')
need(learning_rate > 0, f'learning_rate = {learning_rate}: use a number above 0')
need(device != 'cuda' or torch.cuda.is_available(), "device = 'cuda': there is none, use 'cpu'")
torch.manual_seed(seed)

# --- The text, and a tokenizer that turns it into numbers.
try:
    text = Path(__file__).with_name('input.txt').read_text(encoding='utf-8-sig')
except (OSError, UnicodeError) as problem:
    need(False, f'cannot read input.txt ({problem}): put a UTF-8 text file of that name beside me')
need(text, 'input.txt is empty: put some text into it')

chars = sorted(set(text))  # the vocabulary: every character that occurs
vocab_size = len(chars)
itos = dict(enumerate(chars))  # integer to string
stoi = {character: i for i, character in itos.items()}  # string to integer


def encode(string):
    """The token ids of a string, as a list; KeyError for a character that the text lacks."""
    return [stoi[character] for character in string]


def decode(ids):
    """The string that a list of token ids stands for."""
    return ''.join(itos[i] for i in ids)


# Nothing trains on the last tenth. How well it is predicted tells learning from memorising.
data = torch.tensor(encode(text), dtype=torch.long)
boundary = len(data) * 9 // 10
train_data, val_data = data[:boundary], data[boundary:]


def get_batch(split, generator=None):
    """Random pieces of the 'train' or 'val' text: inputs x, targets y, (batch_size, block_size).

    y is x moved on by one: y[b, t] is what comes after x[b, :t + 1]. So one piece is block_size
    exercises in prediction, from a context of one character up to block_size of them.
    """
    windows = (train_data if split == 'train' else val_data).unfold(0, block_size + 1, 1)
    starts = torch.randint(len(windows), (batch_size,), generator=generator)
    pieces = windows[starts].to(device)  # (batch_size, block_size + 1)
    return pieces[:, :-1], pieces[:, 1:]


@torch.no_grad()
def estimate_loss():
    """The loss of the model below, in nats per character: {'train': ..., 'val': ...}.

    One batch is a noisy witness; this is the mean over eval_iters. They are the same ones each
    time, from a generator of their own, so that estimates compare and training is not disturbed.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    losses = {}
    for split in ('train', 'val'):
        batches = [get_batch(split, generator) for _ in range(eval_iters)]
        losses[split] = sum(model(x, y)[1].item() for x, y in batches) / eval_iters
    model.train(was_training)
    return losses


# --- The model.
class BigramLanguageModel(nn.Module):
    """Predicts the next character from the present one and nothing else.

    All it has is a table: a row for each character, in it a score (a logit) for each character
    that could come next. Softmax makes a row into probabilities, and training moves these to the
    frequencies in the text. Counting would find them too; here gradient descent does.
    """

    def __init__(self, vocab_size=vocab_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)
        nn.init.zeros_(self.token_embedding_table.weight)  # no opinion yet: all equally likely

    def forward(self, idx, targets=None):
        """Token ids (B, T) to logits (B, T, vocab_size), and with targets (B, T) to the loss too.

        The loss is the cross-entropy in nats per character: the mean of -ln(p), p being the
        probability that the right character got. Blind guessing costs ln(vocab_size), and least
        of all costs to give every character the share of cases in which it really comes next.
        """
        logits = self.token_embedding_table(idx)  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # B * T cases

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        """Writes on from idx (B, T), one character at a time: (B, T + max_new_tokens)."""
        was_training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -block_size:])  # never more than it was trained on
            logits = logits[:, -1]  # scores for what follows the last one: (B, vocab_size)
            drawn = torch.multinomial(logits.softmax(dim=-1), num_samples=1)  # (B, 1)
            idx = torch.cat((idx, drawn), dim=1)
        self.train(was_training)
        return idx


model = BigramLanguageModel()
m = model.to(device)

# --- Training: guess, see how wrong, change every weight a little for the better; then again.
if __name__ == '__main__':
    # Show each line at once, and a ? for a letter that the terminal does not have.
    sys.stdout.reconfigure(line_buffering=True, errors='replace')
    need(min(len(train_data), len(val_data)) > block_size,
         f'input.txt is too short: its last tenth has {len(val_data)} characters; block_size = '
         f'{block_size} needs one more than that: add text, or lower block_size')
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    # Long strides first, short ones last: it settles, rather than circle around the best.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=max_iters)

    for step in range(max_iters + 1):
        if step % eval_interval == 0 or step == max_iters:
            losses = estimate_loss()
            print(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        if step == max_iters:
            break
        x, y = get_batch('train')
        logits, loss = model(x, y)
        optimizer.zero_grad()  # or the gradients would add to those of the last batch
        loss.backward()  # how the loss would change with each weight: the gradients
        optimizer.step()  # every weight a little, against its gradient
        schedule.step()

    # --- Generation: from a single first character, token 0.
    context = torch.zeros((1, 1), dtype=torch.long, device=device)
    print(decode(m.generate(context, max_new_tokens=500)[0].tolist()))
