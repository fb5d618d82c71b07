"""A bigram language model, the baseline: it predicts each character from the one before it.

Run it with: python bigram.py
The loss says how wrong the predictions are. With the input.txt here, it falls within seconds
from 4.17 to about 2.4, and the text has plausible letter pairs. gpt.py has the same sections,
with a transformer.
"""
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Hyperparameters: change them, run again, and compare.
device = 'cuda' if torch.cuda.is_available() else 'cpu'  # where the model runs
batch_size = 64  # sequences per training step
block_size = 32  # characters per sequence; each position predicts from one of them only
max_iters = 800  # training steps
eval_interval = 200  # steps between loss estimates
eval_iters = 10  # batches averaged in each loss estimate, for each split
learning_rate = 0.1  # a step moves a weight by about this or less; it decays to 0
seed = 1337  # random seed: repeats the script's run (same CPU, number of threads, torch)

# --- Text and tokenizer: a token is one character, and its id is its place in the vocabulary.
# To train on a text of your own, put it into input.txt.
folder = Path(globals().get('__file__', '')).parent  # in a notebook: the current folder
text = (folder / 'input.txt').read_text(encoding='utf-8-sig')  # -sig: without a byte order mark
chars = sorted(set(text))  # the vocabulary: every character that occurs in the text
vocab_size = len(chars)
stoi = {character: i for i, character in enumerate(chars)}  # string to integer: its id


def encode(string):
    """The token ids of a string, as a list; KeyError for a character not in the vocabulary."""
    return [stoi[character] for character in string]


def decode(ids):
    """The reverse of encode: the string for a list of token ids."""
    return ''.join(chars[i] for i in ids)


# --- Batches. A tensor is torch's array. A remark such as (B, T) shows the shape of one.
data = torch.tensor(encode(text), dtype=torch.long)  # (len(text))
n_train = len(data) * 9 // 10
train_data, val_data = data[:n_train], data[n_train:]  # val, the last tenth: never trained on
assert len(val_data) > block_size, f'put more than {10 * block_size} characters into input.txt'


def get_batch(split, generator=None):
    """Random sequences from the 'train' or 'val' split: inputs x and targets y, each (B, T).

    B = batch_size sequences of T = block_size positions ("time"). The target y[b, t] is the
    character that follows x[b, t] in the text: each position is one prediction to learn from.
    generator: the source of random numbers; None: torch's own, for which seed is set below.
    """
    ids = train_data if split == 'train' else val_data
    starts = torch.randint(len(ids) - block_size, (batch_size, 1),
                           generator=generator)  # (B, 1)
    indices = starts + torch.arange(block_size)  # (B, 1) + (T) -> (B, T): start + 0, 1, ...
    x, y = ids[indices], ids[indices + 1]  # (B, T) each: y is x shifted by one
    return x.to(device), y.to(device)


# --- Model
# A module holds the weights of all its parts, and model(idx, targets) calls its forward. Torch
# records each operation in it, so that training can go back from the loss to the weights.
class BigramLanguageModel(nn.Module):
    """Predicts the next character from the current one, by a table with a row per character.

    Row i holds a score, called a logit, for each character that may follow character i. Softmax
    turns the logits of a row into probabilities: exp(logit) / the sum of all exp(logit).
    """

    def __init__(self):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)  # row i: its logits
        nn.init.zeros_(self.token_embedding_table.weight)  # equal logits: equal probabilities

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size); with targets (B, T), the loss as well.

        The loss is the cross-entropy in nats per character: the mean of -ln(p), where p is the
        probability of the actual next character. For 65 equally likely ones it is ln 65 = 4.17.
        """
        logits = self.token_embedding_table(idx)  # (B, T, vocab_size): looks up the rows
        if targets is None:
            return logits, None
        # cross_entropy applies the softmax; it takes (B * T, vocab_size) and (B * T).
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()  # torch records nothing: only training needs that
    def generate(self, idx, max_new_tokens):
        """Appends sampled tokens to each row of idx: (B, T) -> (B, T + max_new_tokens)."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -1:])  # (B, 1, vocab_size): only the last character matters
            logits = logits[:, -1]  # (B, vocab_size): for the next token
            probs = logits.softmax(dim=-1)  # (B, vocab_size): probabilities, which sum to 1
            idx_next = torch.multinomial(probs, num_samples=1)  # (B, 1): drawn at random
            idx = torch.cat((idx, idx_next), dim=1)  # (B, T + 1): one longer each time
        return idx


torch.manual_seed(seed)
model = m = BigramLanguageModel().to(device)  # m: for short


# --- Training
@torch.no_grad()
def estimate_loss():
    """An estimate of the loss on each split, {'train': ..., 'val': ...}, in nats per character.

    It averages eval_iters batches, always the same ones, so that the estimates of a run can be
    compared, and those of two runs with the same batch_size, block_size, eval_iters and text.
    If the train loss falls while the val loss rises, the model memorises: it is overfitting.
    """
    model.eval()  # evaluation mode: no dropout, in models that use it
    generator = torch.Generator().manual_seed(1)  # whatever seed is, the same batches
    losses = {}
    for split in ('train', 'val'):
        total = 0.0
        for _ in range(eval_iters):
            x, y = get_batch(split, generator)  # (B, T) each
            logits, loss = model(x, y)
            total += loss.item()  # the number in a tensor that holds one number
        losses[split] = total / eval_iters
    model.train()  # training mode: dropout on
    return losses


def report(step, started):
    """Prints losses and a sample of the text; AssertionError for a loss that is not finite."""
    losses = estimate_loss()
    print(f"step {step} of {max_iters}: train loss {losses['train']:.4f}, "
          f"val loss {losses['val']:.4f}, {time.time() - started:.0f} s", flush=True)
    assert math.isfinite(sum(losses.values())), 'the loss is not finite: lower learning_rate'
    # start from token 0: the first of chars, a new line in most texts
    context = torch.zeros((1, 1), dtype=torch.long, device=device)
    with torch.random.fork_rng():  # restores the random state, so that samples change no run
        sample = decode(m.generate(context, max_new_tokens=80)[0].tolist())
    print('    ' + sample.strip().replace('\n', ' / '), flush=True)


def train():
    """Adjusts the weights, step by step, to make the actual next characters more probable."""
    # AdamW moves a weight against the average of its recent gradients, divided by their usual
    # size: so it mostly moves by less than learning_rate, however small they are.
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    # learning_rate is multiplied by a number that falls from 1 to 0, so that the weights settle
    # instead of following each batch.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max_iters)

    print(f'{sum(p.numel() for p in model.parameters()):,} parameters')
    started = time.time()
    for step in range(max_iters):
        if step % eval_interval == 0:
            report(step, started)
        x, y = get_batch('train')  # (B, T) each
        logits, loss = model(x, y)
        optimizer.zero_grad()  # otherwise the gradients would add to those of earlier steps
        loss.backward()  # the gradient of each weight: how fast the loss rises with it
        optimizer.step()  # moves each weight a little, so that the loss should fall
        scheduler.step()  # sets the learning rate for the next step
    report(max_iters, started)


# --- Train, and let it write.
if __name__ == '__main__':
    train()
    context = torch.zeros((1, 1), dtype=torch.long, device=device)
    print(decode(m.generate(context, max_new_tokens=500)[0].tolist()))
