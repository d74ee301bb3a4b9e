"""tinyllm: how an LLM works, in one file that you can read from top to bottom.

It trains a small GPT from scratch, on an ordinary CPU, until it does school arithmetic and writes
out its working as a pupil does:

    (12+3)*4-6=15*4-6=60-6=54

You give it the problem, up to the first "=". The model writes the rest, one character at a time. No
calculator stands between the model and its answer. All the parts between "=" are worth the same,
so a line can be checked exactly: when training data are made, and after the model has answered.

    python tinyllm.py train --quick        a first taste: sums, in seconds
    python tinyllm.py train                learn everything (the README says how long that takes)
    python tinyllm.py eval                 how good is it on problems that it never saw?
    python tinyllm.py ask "12*34"          ask it something
    python tinyllm.py look "12+39"         see which characters it looked at while it wrote
    python tinyllm.py serve                ask and look, as a page in the browser
    python tinyllm.py data --kind mul      look at what it learns from

The tutorial needs Python and a little linear algebra, and no machine learning. Its map:

    Step 1  PyTorch in five facts     tensors, NumPy, gradients, modules, the optimizer
    Step 2  What an LLM is            it predicts the next token; the smallest language model
    Step 3  The model                 tokenizer, embeddings, attention, the Transformer
    Step 4  The data                  problems and their working, and what is learned from a line
    Step 5  Training                  the loss, the optimizers, the loop, saving
    Step 6  Evaluation                writing an answer, and what "right" means
    Behind it: Step 7 (pictures, LaTeX, the page, the commands) and the school arithmetic.

Glossary, to come back to when a name is new, each with an example:

    problem    "345*7"                     what is asked; it has no "=" in it
    line       "345*7=2100+315=2415"       the problem and its working
    stage      "2100+315"                  a part of a line, cut at "="; the last is the answer
    kind       "mul"                       add, sub, mul, div, expr (longer), algebra (letters)
    ids        [8, 11, 9, 17]              a text as numbers, one for each token: "7+8="
    B, T, C    128, 32, 128                rows of a batch, tokens of a row, numbers for each token
    H, D       6, 32                       attention heads, and numbers for each token in a head
    V          21                          how many different tokens there are
    logits     (B, T, V)                   a score for each token that might come next
"""

import argparse
import contextlib
import dataclasses
import functools
import html
import http.server
import inspect
import itertools
import math
import os
import random
import re
import sys
import threading
import time
import unicodedata
import urllib.parse
import warnings
import zlib
from fractions import Fraction

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")     # NumPy is not needed
os.environ.setdefault("GOMP_SPINCOUNT", "1000")      # idle threads soon free the CPU
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")             # and less memory is kept
import torch                                                                      # noqa: E402
import torch.distributed as dist                                                  # noqa: E402
import torch.nn as nn                                                             # noqa: E402
import torch.nn.functional as F                                                   # noqa: E402

IS_SHARED = dist.is_available() and dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if IS_SHARED else 0   # this process's number (Step 5-2)
DEVICE = "cpu"                                                   # or a GPU, if there is one
if torch.cuda.is_available():
    DEVICE = f"cuda:{os.environ['LOCAL_RANK'] if IS_SHARED else 0}"

######## Step 1: PyTorch in five facts #############################################################
def five_facts():
    """PyTorch computes with tensors and finds gradients. Here is nearly all that you need of it.
    (This function does nothing; the tests run the examples in it, so they are true.)

    Fact 1. A tensor is a block of numbers with a shape, one type (dtype) and a device (CPU or GPU).

    >>> a = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> a.shape, a.dtype, torch.zeros(2, dtype=torch.long)       # long: whole numbers, such as ids
    (torch.Size([2, 3]), torch.float32, tensor([0, 0]))
    >>> (a @ a.T).shape         # matrix product, of the last two axes: (2, 3) @ (3, 2) -> (2, 2)
    torch.Size([2, 2])
    >>> a + torch.tensor([10.0, 0.0, 0.0])      # broadcasting: shapes are aligned at the right
    tensor([[11.,  2.,  3.],
            [14.,  5.,  6.]])
    >>> (a * torch.ones(2, 1)).shape                  # and an axis of size 1 is repeated
    torch.Size([2, 3])
    >>> a.transpose(0, 1).shape, a.flatten().shape, a.unsqueeze(1).shape    # last: a new axis
    (torch.Size([3, 2]), torch.Size([6]), torch.Size([2, 1, 3]))
    >>> a[..., 1:].unflatten(-1, (2, 1)).shape        # ...: all axes before; the last: from 1 on
    torch.Size([2, 2, 1])
    >>> torch.tensor([1.0, 2.0, 3.0]).softmax(-1)     # each e^x over their sum; -1: the last axis
    tensor([0.0900, 0.2447, 0.6652])
    >>> a.add_(1).sum()                               # a name that ends in _ changes the tensor
    tensor(27.)

    Fact 2. A tensor and a NumPy array can share their memory: torch.from_numpy(array) and
    tensor.numpy() copy nothing. (Nothing below needs NumPy.)

    Fact 3. The gradient says how a result changes when a tensor changes a little. Mark the tensor
    with requires_grad. Then PyTorch keeps a record of what you compute from it, and backward()
    follows the record from the result back to the tensor. By hand: the derivative of w^2 + 3w is
    2w + 3, which is 7 at w = 2. (Under no_grad() and inference_mode() nothing is recorded.)

    >>> w = torch.tensor(2.0, requires_grad=True)
    >>> (w ** 2 + 3 * w).backward()
    >>> w.grad
    tensor(7.)

    Fact 4. A network is a class, an nn.Module. Its __init__ assigns layers and Parameters to self.
    They hold the weights: numbers that will be learned, mostly random at first. You write its
    forward(x); module(x) calls it. Two layers do most of the work:

    >>> layer = nn.Linear(3, 2, bias=False)           # y = x W^T (bias: + b); W has shape (2, 3)
    >>> table = nn.Embedding(21, 128)                 # a table: number i becomes row i
    >>> layer(a).shape, table(torch.tensor([8, 11])).shape, [p.shape for p in layer.parameters()]
    (torch.Size([2, 2]), torch.Size([2, 128]), [torch.Size([2, 3])])

    Fact 5. A loss says how wrong the network is. An optimizer moves each weight a little against
    its gradient, so that the loss gets smaller. The learning rate (lr) says how far.

    >>> optimizer = torch.optim.SGD([w], lr=0.1)      # plain gradient descent
    >>> loss = (w - 5) ** 2                           # w is 2 and should be 5
    >>> optimizer.zero_grad()                  # backward adds to w.grad, so the old 7 must go
    >>> loss.backward()
    >>> optimizer.step()
    >>> round(w.item(), 2)                            # the gradient is -6, so w moves up by 0.6
    2.6
    """

######## Step 2: what an LLM is ####################################################################
# A text is cut into tokens; here a token is one character. The vocabulary is the list of all
# tokens. The place of a token in it, counted from 0, is its id.

VOCAB = "\n0123456789+-*/()=xy^"        # the newline, token 0, ends a line and pads short ones
ID = {character: i for i, character in enumerate(VOCAB)}

# A language model does one thing: it reads the tokens so far and gives each token of the vocabulary
# a probability to come next. The probability of a whole text is the product of these:
#
#     P(t1 t2 t3) = P(t1) * P(t2 after t1) * P(t3 after t1 t2)
#
# To write, it takes the likeliest token, appends it, and asks again. That is greedy decoding.
#
# To train it, we show it some texts at a time, a batch, and look, at each position, how probable it
# found the token that really came next. The loss is -ln P, averaged over the positions (the
# logarithm turns the product into a sum). It is called cross-entropy, and its unit is the nat. If P
# is 1, the loss is 0. A model that knows nothing gives each of our 21 tokens P = 1/21, and its loss
# is ln 21 = 3.04. Training changes the weights against the gradient of the loss, batch after batch.
#
# Writing goes one token at a time, because the next one is not known yet. In training the whole
# text is known. So all positions are predicted at once, and a mask hides from each what follows.

def smallest_model():
    r"""The smallest language model is a table of 21 x 21 scores. The softmax of row i says how
    probable each token is after token i.

    >>> text = "".join(f"{a}+{b}={a + b}\n" for a in range(10) for b in range(a, 10))
    >>> ids = torch.tensor([ID[character] for character in text])
    >>> table = nn.Embedding(21, 21)
    >>> _ = nn.init.zeros_(table.weight)              # at first all scores are 0
    >>> optimizer = torch.optim.SGD(table.parameters(), lr=10)         # the gradients are tiny
    >>> for step in range(201):
    ...     loss = F.cross_entropy(table(ids[:-1]), ids[1:])   # softmax, then -ln P of the next
    ...     if step % 100 == 0:
    ...         print(f"step {step}: loss {loss.item():.2f}")
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    step 0: loss 3.04
    step 100: loss 1.68
    step 200: loss 1.66
    >>> written = "7+8="
    >>> while written[-1] != "\n" and len(written) < 12:
    ...     scores = table.weight[ID[written[-1]]]
    ...     written += VOCAB[scores.argmax()]         # argmax: the position of the largest
    >>> written
    '7+8=1+9=1+9='

    It has learned what may follow what, but not to add: it sees the last token alone. To add it
    must look back, at the 7 and the 8. That is what attention is for.
    """

# What happens inside an LLM, with the shape of the numbers at each place:
#
#     ids    (B, T)      B texts of T tokens each: "7+8=" is 8, 11, 9, 17
#       |
#     embedding          Each id becomes a vector of C numbers, a row of a table. The rows are
#       |                learned: tokens that behave alike end up with vectors that are alike.
#     n_layer blocks     Attention: a token LOOKS at itself and at earlier ones and takes what it
#       |                needs. It asks a query ("I write the tens: where are the tens?"). A token
#       |                shows a key ("I am a tens digit") and a value ("I am a 7"). Where query and
#       |                key agree, the value flows to the asker. Each is D numbers: the
#       |                token's vector times a learned matrix. (A fourth makes them C again.)
#       |                MLP (multi-layer perceptron): then each token THINKS about it, by itself.
#       |                Both ADD their result to the token's vector: x = x + attention(x), then
#       |                x = x + mlp(x). This sum through all blocks is the residual stream.
#     output layer       C numbers become V scores, the logits. Softmax makes them probabilities.
#       |
#     logits (B, T, V)   at every position
#
# This is a decoder-only Transformer, a GPT: it only continues a text. With n_layer blocks it can
# look and think n_layer times for each token. What takes more must be written down and read again.
# So our model writes its working.
#
# A chat model such as ChatGPT is the same machine, first trained with the same loss. But its tokens
# are pieces of words, some 100,000 of them; it has many thousand times more weights and data; it is
# trained again on instructions and on what people liked; and it draws the next token at random by
# its probability (sampling), where ours takes the likeliest.

######## Step 3-1: the tokenizer ###################################################################
# Only encode and decode reverse numbers: the model reads and writes 408 as 8, 0, 4. A carry
# runs from the ones upward. So each digit of a sum is written when all that it depends on is known.
# (Lee et al. 2023, "Teaching Arithmetic to Small Transformers".) Letters are reversed with their
# number: 48x is x, 8, 4. So when the 8 is read, it is known to be a number of x's.

END = ID["\n"]
EQUALS = ID["="]
DIGITS = range(ID["0"], ID["9"] + 1)

def reverse_numbers(text):
    """Reverse each number, with the letters after it. Doing it twice gives the text back.

    >>> reverse_numbers("12*34=408"), reverse_numbers("48x^2-7x")
    ('21*43=804', '2^x84-x7')
    """
    return re.sub("[0-9xy^]+", lambda match: match[0][::-1], text)

def encode(text):
    """Text to a list of token ids.

    >>> encode("7+8="), encode("12+3")                # 12 is read as 2, 1
    ([8, 11, 9, 17], [3, 2, 11, 4])
    """
    return [ID[character] for character in reverse_numbers(text)]

def decode(ids):
    """Token ids to text, the inverse of encode."""
    return reverse_numbers("".join(VOCAB[i] for i in ids))

######## Step 3-2: embeddings: what a token is, and where it stands ################################
# Attention sees what stands before a token, but not how far away: it must be told. Most LLMs number
# the tokens of a text. For a calculation there is something better, an address as in a table:
#
#     stage   how many "=" stand before the token
#     slot    how many non-digits stand before it in its stage (each ends a slot)
#     place   which character of its slot it is: in a number the ones have place 1, the tens place 2
#             (McLeish et al. 2024, "Transformers Can Do Arithmetic with the Right Embeddings")
#
# So a number and the sign behind it share a slot: in 12+345 the "+" has slot 0 and place 3. An
# address depends on the tokens to the left alone, so the next token's is known beforehand.

def next_address(address, token):
    """A token's address (stage, slot, place) and its id -> the next token's address."""
    stage, slot, place = address
    if token == EQUALS:
        return stage + 1, 0, 1
    if token in DIGITS:
        return stage, slot, place + 1
    return stage, slot + 1, 1

def find_addresses(ids):
    """The address of each token and of the one to come: T ids -> T + 1 addresses.

    >>> ids = encode("12+345=357")
    >>> print("token ", *(VOCAB[i] for i in ids), "(next)")
    token  2 1 + 5 4 3 = 7 5 3 (next)
    >>> for name, numbers in zip(("stage", "slot", "place"), zip(*find_addresses(ids))):
    ...     print(f"{name:6}", *numbers)
    stage  0 0 0 0 0 0 0 1 1 1 1
    slot   0 0 0 1 1 1 1 0 0 0 0
    place  1 2 3 1 2 3 4 1 2 3 4
    """
    return list(itertools.accumulate(ids, next_address, initial=(0, 0, 1)))

# The model uses addresses in two ways, and both ask about the NEXT token, the one that is wanted.
# First, slot and place have embeddings: those of the next token's address are added to each token's
# vector. Second, attention compares addresses. A query has the address of the token that is to be
# written, a key that of its own token, and a head can learn to look where stage, slot or place is
# equal. Here the 7 has been read, and the 5 is to be written, at place 2:
#
#     token   2  1  +  5  4  3  =  7     the query asks for place 2
#     place   1  2  3  1  2  3  4  1
#                ^        ^              the keys with place 2: the tens of both numbers, 1 and 4
#
# How can a dot product compare addresses? By RoPE, rotary position embedding (Su et al. 2021,
# "RoFormer"). The numbers of a query or key are taken in pairs, each pair as a point of the plane,
# and turned round the origin: a key at place a by a * speed, a query at place b by b * speed. To
# turn both by the same angle would not change their dot product. So the places count only by their
# distance b - a. Where the unturned pairs point the same way, the product is largest at distance 0.
# Some pairs turn by place, some by slot, some by stage, each at its own speed: a fast one tells
# neighbours apart but soon comes full circle, a slow one tells near from far.

def angles(where, n_pairs, base):
    """How far pairs turn by stage, slot or place: where (...) -> (..., n_pairs). The first turns
    by 2 radians a step, each next one by less, towards 2 / base.
    """
    speed = 2 * base ** (-torch.arange(n_pairs, device=where.device) / n_pairs)   # (n_pairs,)
    return where.unsqueeze(-1) * speed                                            # (..., n_pairs)

def rotate(x, turns):
    """Turn the pairs of vectors: x (..., D), turns (2, ..., D/2), cosines and sines -> (..., D).

    Numbers i and i + D/2 are a pair. The point (1, 0), turned by a right angle, is (0, 1):

    >>> right_angle = torch.tensor([[0.0], [1.0]])    # its cosine and its sine
    >>> rotate(torch.tensor([1.0, 0.0]), right_angle)
    tensor([0., 1.])
    """
    a, b = x.chunk(2, dim=-1)                         # the first and the second half
    cos, sin = turns
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

# A model that has only seen up to ten digits learns that a number ends at place 10, and fails at
# place 11. So in training each line numbers its places in its own way, with gaps: 1, 2, 3 or 1, 3,
# 4 or 1, 3, 5. Ten digits then reach up to place 19, and a place means little but "the same" and
# "higher". That is enough: digits of the same place are added, and the carry comes from the nearest
# lower place, the one just written. (Ruoss et al. 2023, "Randomized Positional Encodings".)

def with_gaps(addresses, gap, rng):
    """Number the places of a line anew, for all its numbers alike: each 1 to `largest` above the
    one before. `largest` is 1 (no gaps, as in answers) to `gap`. rng: Python's random generator.
    """
    largest = rng.randint(1, gap)
    new = [0, 1]                                      # there is no place 0, and place 1 stays 1
    for _ in range(max(place for *_, place in addresses)):
        new.append(new[-1] + rng.randint(1, largest))
    return [(stage, slot, new[place]) for stage, slot, place in addresses]

######## Step 3-3: attention, MLP, block ###########################################################
def attention(q, k, v):
    """Causal attention: queries q, keys k and values v, each (..., T, D) -> y (..., T, D) and what
    each query looked at, looks (..., T, T).

    The score of a query and a key is their dot product: how well they agree. A sum of D products,
    some positive, some negative, is of about the size sqrt(D). So it is divided by that: with large
    scores a token would look at one alone. A causal mask sets the scores of later tokens to minus
    infinity. Softmax turns a row of scores into looks, numbers with the sum 1. A row of y is the
    sum of the values, each times its look. (Vaswani et al. 2017.) Three tokens, D = 2:

    >>> q = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
    >>> k = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    >>> v = torch.tensor([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]])
    >>> q @ k.T / math.sqrt(2)                        # scores: query 1 likes key 1, query 2 key 0
    tensor([[0.0000, 0.0000, 0.0000],
            [0.0000, 1.4142, 0.0000],
            [2.8284, 0.0000, 0.0000]])
    >>> torch.full((3, 3), float("-inf")).triu(1)     # the mask; triu(1): above the diagonal
    tensor([[0., -inf, -inf],
            [0., 0., -inf],
            [0., 0., 0.]])
    >>> y, looks = attention(q, k, v)
    >>> looks                                         # token 0 can only look at itself
    tensor([[1.0000, 0.0000, 0.0000],
            [0.1956, 0.8044, 0.0000],
            [0.8943, 0.0529, 0.0529]])
    >>> y
    tensor([[10.0000,  0.0000],
            [ 1.9557,  8.0443],
            [ 9.2071,  0.7929]])
    """
    T, S = q.shape[-2], k.shape[-2]                   # S is T here; Step 6-1 has more keys
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])                     # (..., T, S)
    mask = torch.full((T, S), float("-inf"), dtype=scores.dtype, device=scores.device)
    scores = scores + mask.triu(S - T + 1)
    looks = scores.softmax(-1)                                                    # (..., T, S)
    return looks @ v, looks                                                       # (..., T, D)

class CausalSelfAttention(nn.Module):
    """Attention with H heads side by side: x (B, T, C) -> (B, T, C). Each has queries, keys and
    values of its own: one may find the tens, another the sign.

    turns (2, B, 1, T + 1, D/2): cosines and sines for each address (Step 3-4).
    cache: None, or a list that Step 6-1 keeps keys and values in.
    """

    def __init__(self, config):
        super().__init__()
        inner = config.n_head * config.head_dim       # H * D, which need not be C (see Config)
        self.n_head = config.n_head
        self.query = nn.Linear(config.n_embd, inner, bias=False)
        self.key = nn.Linear(config.n_embd, inner, bias=False)
        self.value = nn.Linear(config.n_embd, inner, bias=False)
        self.out = nn.Linear(inner, config.n_embd, bias=False)   # what was found, as C numbers
        self.gain = nn.Parameter(torch.full((config.n_head, 1, 1), 2.0))         # one a head
        nn.init.zeros_(self.out.weight)    # at first a block adds 0; out's gradient is not 0

    def forward(self, x, turns, cache=None):
        # H * D numbers are cut into H heads of D (-1: the rest): (B, T, H, D) -> (B, H, T, D)
        q = self.query(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        k = self.key(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        v = self.value(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        with torch.autocast(x.device.type, enabled=False):       # keep q's type (Step 5-1)
            # layer_norm brings a vector (last axis, D) to mean 0 and standard deviation 1, so to
            # the length sqrt(D): no score can run away (QK-norm, Henry et al. 2020). How sharply a
            # head looks is then one learned number, its gain.
            q = F.layer_norm(q, q.shape[-1:]) * self.gain.type_as(q)
            k = F.layer_norm(k, k.shape[-1:])
            turns = turns.type_as(q)
            q = rotate(q, turns[..., 1:, :])          # by the address of the next token
            k = rotate(k, turns[..., :-1, :])         # by the address of its own token
            if cache is not None:
                k, v = extend(cache, k, v)
            y, looks = attention(q, k, v)                                         # (B, H, T, D)
        self.looks = None if self.training else looks            # not needed in training
        return self.out(y.transpose(1, 2).flatten(2))    # flatten from axis 2 on: (B, T, H * D)

class Block(nn.Module):
    """Look, then think: x (B, T, C) -> (B, T, C).

    The MLP lets each token think by itself: two layers, and between them ReLU, which sets to 0 what
    is below 0, and a square (So et al. 2021, "Primer"). Without something like that, two layers
    could do no more than one: a product of matrices is a matrix. The 3 C numbers in the middle
    detect things, such as "a 9 and a carry". LayerNorm is layer_norm with a learned scale and shift
    for each number. It keeps a layer's input at one size, however much was added before. (Pre-norm,
    Xiong et al. 2020.)
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.norm1 = nn.LayerNorm(C)
        self.attention = CausalSelfAttention(config)
        self.norm2 = nn.LayerNorm(C)
        self.wide = nn.Linear(C, 3 * C, bias=False)
        self.narrow = nn.Linear(3 * C, C, bias=False)
        nn.init.zeros_(self.narrow.weight)            # a new block adds 0, as above

    def forward(self, x, turns, cache=None):
        x = x + self.attention(self.norm1(x), turns, cache)
        detected = self.wide(self.norm2(x)).relu().square()                       # (B, T, 3 C)
        return x + self.narrow(detected)

######## Step 3-4: the model #######################################################################
@dataclasses.dataclass
class Config:
    """All that defines a run; each is a flag of `train`. Steps 4 and 5 explain the lower half."""
    n_layer: int = 4            # blocks, one after the other
    n_head: int = 6             # attention heads H of a block
    head_dim: int = 32          # numbers D for each token in a head, even
    n_embd: int = 128           # numbers C for each token
    block_size: int = 448       # longest line, in tokens (it has nothing to do with blocks)
    n_place: int = 64           # places that have an embedding (place 0 is no token's)
    n_slot: int = 40            # slots that have an embedding
    gap: int = 2                # in training each place is 1 to this above the last
    kinds: str = "add sub mul div expr algebra"      # kinds of problem to learn
    steps: int = 7500           # optimizer steps
    batch_tokens: int = 4096    # tokens of a batch, about; a batch is one optimizer step
    lr: float = 0.02            # highest learning rate of Muon (Step 5-1)
    adam_lr: float = 0.003      # highest learning rate of AdamW (Step 5-1)
    weight_decay: float = 0.01  # how strongly the weights are pulled towards zero
    warmup: int = 100           # steps in which the learning rates rise
    flat: float = 0.4           # part of the run after which the learning rates fall
    seed: int = 0               # chooses the first weights and the training problems

class TinyLLM(nn.Module):
    """A decoder-only Transformer: ids (B, T) -> logits (B, T, V). One example all the way: 4 tokens
    become 4 vectors of C = 128 numbers, a block keeps the shape, and each becomes 21 scores.

    >>> model = TinyLLM(Config())
    >>> ids = torch.tensor([encode("7+8=")])
    >>> addresses = torch.tensor([find_addresses(ids[0].tolist())])
    >>> x, turns = model.embed(ids, addresses), model.turns(addresses)
    >>> [list(tensor.shape) for tensor in (ids, x, model.blocks[0](x, turns), model(ids))]
    [[1, 4], [1, 4, 128], [1, 4, 128], [1, 4, 21]]

    The last row of scores is for the token after "=": a 5, the ones of 15. A new model guesses:

    >>> logits = model(ids)[0, -1]                    # (V,)
    >>> loss = F.cross_entropy(logits, torch.tensor(ID["5"]))          # -ln of the softmax at "5"
    >>> 0.01 < logits.softmax(-1)[ID["5"]].item() < 0.15, 2 < loss.item() < 4     # 1/21 and ln 21
    (True, True)
    >>> sum(p.numel() for p in model.parameters())    # weights in all
    807448
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_table = nn.Embedding(len(VOCAB), config.n_embd)
        self.slot_table = nn.Embedding(config.n_slot, config.n_embd)
        self.place_table = nn.Embedding(config.n_place, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.output = nn.Linear(config.n_embd, len(VOCAB), bias=False)
        for layer in (self.token_table, self.slot_table, self.place_table, self.output):
            nn.init.normal_(layer.weight, std=0.02)   # small random numbers

    def embed(self, ids, addresses):
        """What each token is and where the next one goes: ids (B, T) -> x (B, T, C)."""
        # 1: skips to the NEXT token; clamp: what is beyond a table takes its last row
        slots = addresses[:, 1:, 1].clamp(max=self.config.n_slot - 1)             # (B, T)
        places = addresses[:, 1:, 2].clamp(max=self.config.n_place - 1)           # (B, T)
        return self.token_table(ids) + self.slot_table(slots) + self.place_table(places)

    def turns(self, addresses):
        """How keys and queries turn: addresses (B, T + 1, 3) -> cosines and sines
        (2, B, 1, T + 1, D/2); unsqueeze adds the 1 for the heads, which turn alike.
        """
        stages, slots, places = addresses.unbind(-1)                              # (B, T + 1) each
        n_pairs = self.config.head_dim // 2
        n = 3 * n_pairs // 8          # of 16 pairs 6, 6 and 4; a choice, as the bases are
        by_stage = angles(stages, n, base=16)
        by_slot = angles(slots, n, base=16)
        by_place = angles(places, n_pairs - 2 * n, base=100)
        angle = torch.cat((by_stage, by_slot, by_place), dim=-1)                  # (B, T + 1, D/2)
        return torch.stack((angle.cos(), angle.sin())).unsqueeze(2)

    def forward(self, ids, addresses=None, caches=None):
        """ids (B, T) -> logits (B, T, V). addresses (B, T + 1, 3); None: they are counted here.

        caches: a list for each block (Step 6-1); then ids holds only the newest token.
        """
        if addresses is None:
            addresses = [find_addresses(row) for row in ids.tolist()]
            addresses = torch.tensor(addresses, device=ids.device)                # (B, T + 1, 3)
        x = self.embed(ids, addresses)                                            # (B, T, C)
        turns = self.turns(addresses)                                     # (2, B, 1, T + 1, D/2)
        for i, block in enumerate(self.blocks):
            x = block(x, turns, caches[i] if caches else None)                    # (B, T, C)
        return self.output(self.norm(x))                                          # (B, T, V)

######## Step 4-1: making the data #################################################################
# The model learns from lines like these, one of each kind. They are drawn at random and worked out
# by the rules of school arithmetic, in the appendix.
#     add      48213+51786=99999
#     sub      150-144=6
#     mul      345*27=345*20+345*7=6000+900+(2100+315)=6900+2415=9315
#     div      162/7=20+(162-140)/7=20+22/7=20+3+(22-21)/7=23+1/7
#     expr     (12+3)*4-6=15*4-6=60-6=54
#     algebra  3(2x-1)-2(x+4)=6x-3-2x-8=6x-2x-3-8=4x-11
#
# A problem has a size: the digits of its longest number in the first four kinds, its operators in
# the others. Lengths are drawn evenly, not values, or nine in ten numbers would have ten digits.
# What is hard is drawn more often, as a pupil practises it.

def draw_number(rng, n_digits):
    """A number of n digits (one digit: 0 to 9)."""
    return rng.randrange(10 ** (n_digits - 1) if n_digits > 1 else 0, 10 ** n_digits)

def write(rng, a, sign, b):
    """A problem of two numbers, each negative one time in eight: -12+5, 12-(-7)."""
    a = -a if rng.random() < 0.12 else a
    b = -b if rng.random() < 0.12 else b
    return f"{a}{sign}{b}" if b >= 0 else f"{a}{sign}({b})"

def draw_sum(rng, top, sign):
    """A sum or difference; numbers of about `top` digits or less."""
    a = draw_number(rng, rng.randint(1, top))
    b = draw_number(rng, rng.randint(1, top))
    dice, n_digits = rng.random(), len(str(a))
    if dice < 0.15:                                   # two numbers of one length
        b = draw_number(rng, n_digits)
    elif dice < 0.6:                                  # often near: 150-144, 1993-2015
        b = abs(a - draw_number(rng, rng.randint(1, n_digits)))
        a, b = rng.sample((a, b), 2)
    elif dice < 0.7:                                  # 48213+51786 is all nines, +51787 all carries
        b = 10 ** n_digits - 1 - a + rng.randint(0, 1)
    return write(rng, a, sign, b)

def draw_product(rng, top):
    """A product of up to 4 x 2 or 3 x 3 digits; some of round numbers, such as 300*27."""
    n_digits = rng.randint(1, top)
    a = draw_number(rng, n_digits)
    b = draw_number(rng, rng.randint(1, 2 if n_digits == 4 else min(3, top)))
    if rng.random() < 0.25:
        b = draw_number(rng, 1) * 10 ** (len(str(b)) - 1)
    return write(rng, a, "*", b) if rng.random() < 0.5 else write(rng, b, "*", a)

PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)         # hard to see as divisors

def draw_quotient(rng, top):
    """About `top` digits or less, divided by 1 or 2 digits."""
    a = draw_number(rng, rng.randint(1, top))
    b = draw_number(rng, rng.randint(1, 2)) or 1
    dice = rng.random()
    if dice < 0.4:                                    # a fraction below 1; many can be cancelled
        common = rng.choice((1, 1, rng.randint(2, 9), rng.randint(2, 49), rng.choice(PRIMES)))
        rest = rng.randint(2, max(2, 99 // common))
        a, b = rng.randrange(1, rest) * common, rest * common
    elif dice < 0.55:                                 # a quotient of one digit
        a = rng.randint(1, 9) * b + rng.randrange(b)
    elif dice < 0.75:                                 # no remainder
        a = a // b * b or b
    return write(rng, a, "/", b)

@dataclasses.dataclass
class Kind:
    """What this program knows of a kind of problem."""
    draw: callable              # draw(rng, top) -> a problem of about size `top` or less
    top: int                    # the largest size to train on
    share: float                # how often it is drawn, compared with the others (tried out)

KINDS = {
    "add": Kind(draw=functools.partial(draw_sum, sign="+"), top=10, share=0.6),
    "sub": Kind(draw=functools.partial(draw_sum, sign="-"), top=10, share=2.6),
    "mul": Kind(draw=draw_product, top=4, share=1.0),
    "div": Kind(draw=draw_quotient, top=5, share=2.4),
}                               # the appendix adds expr and algebra

# One problem in ten is held out: never given in training, so that we can ask what the model cannot
# have learned by heart. (A small one may be a stage of a longer line.) A checksum decides.

def twin_key(problem):
    """A key that a problem shares with its mirror image: both are held out, or neither.

    >>> twin_key("12-39+7"), twin_key("7-39+12"), twin_key("(x+1)^2"), twin_key("(1+x)(x+1)")
    ('- 12 39 7', '- 12 39 7', '1 1 x x', '1 1 x x')
    """
    written_out = re.sub(r"(\([^()]*\)|[xy])\^2", r"\1\1", problem)      # (x+1)^2 is (x+1)(x+1)
    return " ".join(sorted(re.findall("[0-9]+|[^0-9()+]", written_out)))    # no brackets and no +

def is_held_out(problem):
    """Is this problem kept for evaluation?

    >>> is_held_out("12+60"), is_held_out("60+12"), is_held_out("12+61")
    (True, True, False)
    """
    return zlib.crc32(twin_key(problem).encode("utf-8")) % 10 == 0

def draw_problem(kind, rng, held_out, top=None):
    """Draw a problem of a kind, of about size `top` or less, held out or not."""
    while True:
        problem = KINDS[kind].draw(rng, top or KINDS[kind].top)
        if is_held_out(problem) == held_out:
            return problem

######## Step 4-2: from a line to x and y ##########################################################
def to_example(line):
    """A line to (x, y): two lists of ids. y is x one token later, or -100, which the loss skips.

    At each position the model reads x up to there and should say y. Only what it must write counts:
    everything behind the first "=". Nothing leaks: what it should say it has not read yet.

    >>> x, y = to_example("7+8=15")
    >>> for i, (a, b) in enumerate(zip(x, y)):
    ...     wanted = repr(VOCAB[b]) if b >= 0 else "(not counted)"
    ...     print(i, "reads", repr(VOCAB[a]), "should say", wanted)
    0 reads '7' should say (not counted)
    1 reads '+' should say (not counted)
    2 reads '8' should say (not counted)
    3 reads '=' should say '5'
    4 reads '5' should say '1'
    5 reads '1' should say '\\n'
    """
    ids = encode(line + "\n")
    n_given = ids.index(EQUALS) + 1
    return ids[:-1], [-100] * (n_given - 1) + ids[n_given:]      # both one shorter than ids

######## Step 4-3: the data loader #################################################################
# The rows of a batch are computed together, so they must be equally long. Short ones are filled up
# at the right (padding): no earlier token looks there, and y is -100. That is wasted work. So a
# pool of many lines is drawn and sorted by length, and lines of like length go into one batch. Pool
# n depends on n, config and RANK alone, so that a stopped run goes on as it would have.

POOL = 64                               # batches of a pool

def pad(row, length, filler):
    """A list, filled up at the right: pad([3, 2], 4, END) is [3, 2, 0, 0]."""
    return row + [filler] * (length - len(row))

def draw_example(config, rng, done):
    """x, addresses and y of one line; `done` is the part of the run that is over, 0 to 1."""
    kinds = config.kinds.split()
    kind = rng.choices(kinds, [KINDS[name].share for name in kinds])[0]
    top = KINDS[kind].top
    # Curriculum (Bengio et al. 2009): for nine in ten, `top` grows in the first fifth of a run
    if rng.random() < 0.9:
        top = min(top, int(5 * done * top) + 1)
    line = work_out(draw_problem(kind, rng, False, top))         # in the appendix
    if len(line) >= config.block_size:                           # too long: draw another
        return draw_example(config, rng, done)
    x, y = to_example(line)
    return x, with_gaps(find_addresses(x), config.gap, rng), y

def make_pool(config, n):
    """Pool n, a list of POOL batches: x (B, T), addresses (B, T + 1, 3), y (B, T)."""
    rng = random.Random(f"{config.seed}/{n}/{RANK}")
    examples, n_tokens = [], 0
    while n_tokens < 1.1 * POOL * config.batch_tokens:           # some will be left over
        examples.append(draw_example(config, rng, n * POOL / config.steps))
        n_tokens += len(examples[-1][0])
    examples.sort(key=lambda example: len(example[0]), reverse=True)
    batches = []
    while examples:
        T = 8 * math.ceil(len(examples[0][0]) / 8)               # a multiple of 8: few shapes
        B = max(1, config.batch_tokens // T)
        xs = [pad(x, T, END) for x, _, _ in examples[:B]]
        addresses = [pad(row, T + 1, row[-1]) for _, row, _ in examples[:B]]
        ys = [pad(y, T, -100) for _, _, y in examples[:B]]
        if len(xs) == B:
            batches.append((torch.tensor(xs), torch.tensor(addresses), torch.tensor(ys)))
        examples = examples[B:]
    rng.shuffle(batches)
    return batches[:POOL]

def stream_batches(config, first_step):
    """The batches of a run, from one step on."""
    first_pool, n_skip = divmod(first_step, POOL)
    for n in itertools.count(first_pool):
        yield from make_pool(config, n)[n_skip:]
        n_skip = 0                                               # only in the first pool

######## Step 5-1: the loss and the optimizers #####################################################
def loss_of(model, x, addresses, y):
    """Cross-entropy: the mean of -ln P(y) over the tokens that count."""
    # autocast: if HALF (Step 7-6), nn.Linear works in bfloat16, half the bits, where that is faster
    with torch.autocast(x.device.type, torch.bfloat16, enabled=HALF):
        logits = model(x, addresses)                                              # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())      # (B*T, V) and (B*T,)

# Adam (Kingma and Ba 2014) improves on plain gradient descent in two ways. It follows the mean of
# the last gradients, called momentum, for one batch alone is mere chance. And it divides by how
# large a weight's gradients usually are, so that all weights move equally fast. AdamW (Loshchilov
# and Hutter 2017) also shrinks all weights a little, so that one of no use fades away: weight
# decay. Muon (Jordan et al. 2024) is for matrices. A matrix stretches some directions more. Muon
# makes a gradient stretch all alike, so that what is rare is learned, too. (See Step 7-5.)

def make_optimizers(model, config):
    """Muon for the matrices of the blocks, AdamW for the rest: embeddings, norms, gains, output."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    # betas: how much of both means, of the gradients and of their squares, is kept at each step
    adam = {"lr": config.adam_lr, "betas": (0.9, 0.98), "weight_decay": config.weight_decay}
    muon = {"lr": config.lr, "weight_decay": config.weight_decay}
    return [torch.optim.AdamW(others, **adam), Muon(matrices, **muon)]

def lr_factor(step, config):
    """What the learning rates are multiplied by at a step of the run.

    They rise while the optimizers' means are still empty (warm-up), stay, then fall in a straight
    line to 2%: small steps settle what large ones leave shaking.

    >>> [round(lr_factor(step, Config(steps=1000)), 2) for step in (0, 49, 99, 400, 700, 1000)]
    [0.01, 0.5, 1.0, 1.0, 0.51, 0.02]
    """
    rise = min(1.0, (step + 1) / config.warmup)
    fall = min(1.0, (1 - step / config.steps) / (1 - config.flat))
    return rise * (0.02 + 0.98 * fall)

######## Step 5-2: the training loop ###############################################################
def learn(model, optimizers, x, addresses, y):
    """One optimizer step on one batch: the five lines that are all of deep learning. -> the loss"""
    loss = loss_of(model, x, addresses, y)
    model.zero_grad()                                 # forget the gradients of the batch before
    loss.backward()                                   # the gradient of the loss for every weight
    for optimizer in optimizers:
        optimizer.step()                              # every weight moves a little against it
    return loss.detach()                              # without its record

def fit(model, optimizers, first_step, history, path):
    """Train from first_step to the end. At each hundredth of the run, report what was reached, add
    it to history, and save the state to `path`.
    """
    config, losses = model.config, []
    began = time.perf_counter() - (60 * history[-1]["minutes"] if history else 0)
    # torchrun starts several processes, each with batches of its own. Then this wrapper averages
    # their gradients (Li et al. 2020, "PyTorch Distributed"): one step, of a larger batch.
    shared = nn.parallel.DistributedDataParallel(model) if IS_SHARED else model
    model.train()                                     # until model.eval(), heads keep no looks
    batches = stream_batches(config, first_step)
    for step, batch in zip(range(first_step, config.steps), batches):
        for optimizer in optimizers:                  # defaults: what it was made with
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * lr_factor(step, config)
        losses.append(learn(shared, optimizers, *[tensor.to(DEVICE) for tensor in batch]))
        n_done = step + 1
        if 100 * n_done // config.steps > 100 * step // config.steps and RANK == 0:
            minutes = (time.perf_counter() - began) / 60
            report(model.eval(), n_done, torch.stack(losses).mean().item(), minutes, history)
            save_or_warn(path, model, optimizers, n_done, history)
            losses.clear()
            model.train()

# `report` (Step 7-6) prints a row at each tenth of a run, and a terminal shows a live one between:
#
#       step done    loss   min  left     add     sub     mul     div    expr algebra
#        750  10%  0.3104   4.4  39.5     51%     37%     20%     19%      9%     27%
#
# The loss, the minutes so far and those that are left, and the share of 100 held-out problems of
# each kind that is answered right. The loss falls first: one wrong token spoils an answer.

######## Step 5-3: saving and loading ##############################################################
def score_sample(model):
    """The logits for one line. They are saved with a model. Other logits after loading mean that
    this file's model has been changed, so that the saved one does not fit it.
    """
    with torch.inference_mode():
        return model(torch.tensor([encode("(12+3)*4-6=15*4-6")], device=DEVICE)).cpu()

def save_checkpoint(path, model, optimizers=(), step=0, history=()):
    """Write all that is needed to ask the model, and to go on training it. The file is whole at any
    moment: it is written under another name first, then renamed. Raises InputError (Step 7-3).
    """
    beside = f"{path}.tmp"
    try:
        torch.save({"config": dataclasses.asdict(model.config), "model": model.state_dict(),
                    "sample": score_sample(model), "step": step, "history": list(history),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, beside)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:          # torch reports a full disk as a RuntimeError
        raise InputError(f"cannot write {path}; give --out a file that can be written") from error
    finally:
        with contextlib.suppress(OSError):            # what is left of a failed try
            os.remove(beside)

def load_checkpoint(path):
    """Read a checkpoint: path -> (model, all that is in the file). Raises InputError."""
    try:
        state = torch.load(path, map_location=DEVICE, weights_only=True)          # runs no code
        model = TinyLLM(Config(**state["config"])).to(DEVICE).eval()
        model.load_state_dict(state["model"])
        fits = torch.allclose(score_sample(model), state["sample"].cpu(), atol=0.01)
    except FileNotFoundError as error:
        raise InputError(f"{path} is not there; give another checkpoint, or train one") from error
    except Exception as error:                        # a damaged file fails in a dozen ways
        raise InputError(f"{path} is damaged, or of another version; train again") from error
    if not fits:
        raise InputError(f"{path} was trained by another tinyllm.py than this one; train again")
    return model, state

######## Step 6-1: writing an answer ###############################################################
@torch.inference_mode()
def generate(model, prompt, max_tokens):
    """Greedy decoding: continue a list of ids with the likeliest token, again and again, until END.
    max_tokens counts the prompt, too.
    """
    ids = list(prompt)
    while len(ids) < max_tokens:
        logits = model(torch.tensor([ids], device=DEVICE))                        # (1, T, V)
        token = logits[0, -1].argmax().item()
        if token == END:
            break
        ids.append(token)
    return ids

# That computes the whole line again for every token. But no token sees later ones, so its keys and
# values stay. A cache keeps them, and only the newest token is computed: in attention q has T = 1
# row, k and v have S, and the one row of the mask is all 0.

def extend(cache, k, v):
    """Append keys and values (B, H, 1, D) to a cache, at first empty -> all so far (B, H, S, D)"""
    if cache:
        k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
    cache[:] = k, v
    return k, v

@torch.inference_mode()
def generate_batch(model, prompts, max_tokens):
    """generate for many prompts: lists of ids -> lists of ids. At each moment every row reads one
    token: the next one of its prompt or, when that is over, the one that it has just written:

        moment               0  1  2  3  4  5  6
        "7+8=" reads         7  +  8  =  5  1        and writes 5, 1, END
        "12+3=" reads        2  1  +  3  =  5  1     and writes 5, 1, END
    """
    rows = [list(prompt) for prompt in prompts]
    addresses = [find_addresses(row[:1]) for row in rows]        # of the newest token and the next
    going = list(range(len(rows)))                               # the rows that have not ended
    caches = [[] for _ in model.blocks]
    for moment in range(max_tokens - 1):
        ids = torch.tensor([[rows[i][moment]] for i in going], device=DEVICE)     # (B, 1)
        where = torch.tensor([addresses[i] for i in going], device=DEVICE)        # (B, 2, 3)
        likeliest = model(ids, where, caches)[:, -1].argmax(-1).tolist()          # B tokens
        for i, token in zip(going, likeliest):
            if len(rows[i]) == moment + 1:                       # the prompt is over
                rows[i].append(token)
            newest = addresses[i][1]
            addresses[i] = [newest, next_address(newest, rows[i][moment + 1])]    # one further
        kept = [j for j, i in enumerate(going) if rows[i][-1] != END]
        if not kept:
            break
        if len(kept) < len(going):                               # rows that have ended leave
            going = [going[j] for j in kept]
            caches = [[k[kept], v[kept]] for k, v in caches]     # k[kept]: these rows
    return [row[:-1] if row[-1] == END else row for row in rows]

def solve(model, problems, batch_size=500, max_tokens=None):
    """The full line that the model writes for each problem, in the same order."""
    order = sorted(range(len(problems)), key=lambda i: len(problems[i]))
    lines = [""] * len(problems)
    for start in range(0, len(order), batch_size):               # like lengths side by side
        batch = order[start:start + batch_size]
        prompts = [encode(problems[i] + "=") for i in batch]
        written = generate_batch(model, prompts, max_tokens or model.config.block_size)
        for i, ids in zip(batch, written):
            lines[i] = decode(ids)
    return lines

######## Step 6-2: what "right" means ##############################################################
def check(line):
    """Is the answer of a line right, and is each of its stages worth what the problem is?

    The answer is right if it is the exact value, written in the one form that an answer has.

    >>> check("2+3*4=2+12=14"), check("2+3*4=5*4=14"), check("2+3*4=2+12"), check("7-7=-0")
    ((True, [True, True]), (True, [False, True]), (False, [True]), (False, [True]))
    """
    problem, *stages = line.split("=")
    value = exact_value(problem)                      # as a text; in the appendix
    return stages[-1:] == [value], [is_worth(stage, value) for stage in stages]

def is_worth(text, value):
    try:
        return exact_value(text) == value
    except InputError:                                # it cannot even be read
        return False

def evaluate(model, problems):
    """Ask problems: the share of right answers and workings, and the wrong lines. As a new model
    does not end its lines, it is stopped soon after the length of the longest right one.
    """
    longest = max((len(work_out(problem)) for problem in problems), default=0)
    lines = solve(model, problems, max_tokens=min(model.config.block_size, longest + 20))
    checks = [check(line) for line in lines]
    n = max(1, len(problems))
    return {"problems": len(problems), "answers": sum(right for right, _ in checks) / n,
            "workings": sum(right and all(stages) for right, stages in checks) / n,
            "wrong": [line for line, (right, _) in zip(lines, checks) if not right]}

####################################################################################################
#   The tutorial ends here. What follows are views, commands and school arithmetic: you may stop.
####################################################################################################

######## Step 7-1: what the model looked at ########################################################
def watch(model, line):
    """What happened while a line was written: the line as the model reads it (T characters), the
    looks of all heads (n_layer, H, T, T) and the probabilities of the next token (T, V).
    """
    ids = encode(line)
    with torch.inference_mode():
        logits = model(torch.tensor([ids], device=DEVICE))[0]
    looks = torch.stack([block.attention.looks[0] for block in model.blocks])
    return "".join(VOCAB[i] for i in ids), looks.cpu(), logits.softmax(-1).cpu()

def shades(looks, marks):
    """Numbers of 0 to 1 as one of ten marks each: 0, 0.15, 1 is "019" with "0123456789"."""
    return "".join(marks[min(9, int(10 * look))] for look in looks.tolist())

def draw_looks(model, line, width=74):
    """A picture of the head that looks sharply at most places: a row for each character that was
    written, a column for each before it. Long lines come in blocks of `width` columns.
    """
    text, looks, _ = watch(model, line)
    start = text.index("=")
    # tril(-2): a look at itself or at its neighbour does not count
    sharpness = looks.tril(-2)[:, :, start:].amax(2).sum(-1)                      # (n_layer, H)
    layer, head = divmod(sharpness.argmax().item(), sharpness.shape[1])
    rows = [f"layer {layer + 1}, head {head + 1}; a look of 0 to 1 is one of these: ' .:-=+*#%@'"]
    for left in range(0, len(text), width):
        rows.append("     " + text[left:left + width])
        for t in range(max(start, left), len(text)):
            row = shades(looks[layer, head, t, :t + 1], " .:-=+*#%@")[left:left + width]
            rows.append(f"{(text + ' ')[t + 1]:>3}  {row}".rstrip())
    return "\n".join(rows)

######## Step 7-2: mathematics as it is printed ####################################################
# LaTeX, for papers, and MathML, for browsers, are two views of a line. Each is a list of
# replacements, made one after the other; {1|2} is a fraction by then.

LATEX = (
    ("{", r"\\frac{"), (r"\|", "}{"), (r"\*", r" \\times "), ("/", r" \\div "), ("\u00b2", "^{2}"),
)
MATHML = (
    ("/", "\u00f7"), (r"\*", "\u00d7"), ("-", "\u2212"),
    ("[0-9]+", r"<mn>\g<0></mn>"), ("[xy]", r"<mi>\g<0></mi>"),
    ("[+()=^\u00f7\u00d7\u2212]", r"<mo>\g<0></mo>"),
    ("(<m.>[^<]+</m.>)\u00b2", r"<msup>\1<mn>2</mn></msup>"),
    ("{", "<mfrac><mrow>"), (r"\|", "</mrow><mrow>"), ("}", "</mrow></mfrac>"),
)

def mark_fraction(above, below):
    return f"{{{'*'.join(map(str, above))}|{'*'.join(map(str, below))}}}"

def typeset(stage, language):
    """A stage as LaTeX or MathML."""
    marked = each_fraction(mark_fraction, stage.replace("^2", "\u00b2"))
    shown = replace_all(language, marked)
    return shown.replace("(", r"\left(").replace(")", r"\right)") if r"\frac" in shown else shown

def to_latex(line):
    """A line as an align* block of LaTeX."""
    problem, *stages = [typeset(stage, LATEX) for stage in line.split("=")]
    rows = " \\\\\n".join("&=" + stage for stage in stages)
    return "\\begin{align*}\n" + problem + rows + "\n\\end{align*}"

######## Step 7-3: what a person types, and what is said about the answer ##########################
class InputError(ValueError):
    """What a person gave cannot be used. The message says what was wrong, and what to do."""

LOOKALIKES = str.maketrans(
    "\u00d7\u22c5\u00b7\u2217\u2022\u2219\u2715\u2716\u2a2f" "\u00f7\u2215\u2044\u2797:"
    "\u2212\u2796\u2795[{]}", "*********" "/////" "--+(())")
LATEX_TYPED = (
    (r"\\left|\\right", ""), (r"\\(times|cdot)\b", "*"), (r"\\div\b", "/"), (r"\^\{2\}", "^2"),
    (r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"),
)

def plain(character):
    """Dashes as "-"; a long one is what a phone makes of "--"; signs that cannot be seen go."""
    if unicodedata.category(character) == "Pd":
        return "--" if character in "\u2014\u2015" else "-"
    return "" if unicodedata.category(character) == "Cf" else character

def normalize(text):
    """What people type, in the characters of VOCAB. Raises InputError for what cannot be meant."""
    if re.search(r"[0-9]\s*\\frac|[0-9]\s+[0-9]", text):
        raise InputError("there is a space inside a number; write 1 1/2 as 1+1/2")
    text = replace_all(LATEX_TYPED, text.replace("\u00b2", "^2").replace("**", "^"))
    clean = unicodedata.normalize("NFKC", text).translate(LOOKALIKES).lower()
    clean = "".join(map(plain, clean))
    unknown = [c for c in text if unicodedata.category(c) in ("No", "Lm")]       # raised
    unknown += [c for c in clean if c not in VOCAB + "," and not c.isspace()]
    if unknown:
        name = unicodedata.name(unknown[0], "")
        raise InputError(f"unknown character {ascii(unknown[0])} {name}; write these, in UTF-8: "
                         f"{VOCAB[1:]}")
    if re.search(r"[0-9)]\s*x\s*[0-9]|[0-9)]\s+x\s+\(", clean):
        raise InputError("is this x a letter, or does it mean times? write * for times")
    clean = re.sub(r"^\+|\s|=$", "", clean.strip())              # +5 is 5
    thousands = r"\b[1-9][0-9]{0,2}(,[0-9]{3})+\b"
    clean = re.sub(thousands, lambda match: match[0].replace(",", ""), clean)
    if not clean or "=" in clean or "," in clean:
        raise InputError("write one problem, such as 12*34, without = and decimals in it")
    clean = re.sub("(?<![0-9])0+(?=[0-9])", "", clean).replace("(+", "(")        # 007 is 7
    return re.sub(r"(?<=[-+*/])-((?:[0-9]|[xy](?:\^2)?)+)", r"(-\1)", clean)      # 5--3 is 5-(-3)

START = r"(?:^|(?<=\())"                              # where a sum begins
LONE = r"[0-9]+|[0-9]*(?:[xy](?:\^2)?|xy|yx)"         # a number or a term: 7, 3x, xy
INNER = "[^()]"
for _ in range(4):
    INNER = rf"(?:[^()]|\({INNER}*\))"                # brackets in brackets in brackets ...
BRACKETS = (                                          # those that do nothing go
    (rf"(?<=[0-9xy)])\(({LONE})\)(?!\^)", r"*\1"),               # 4(3x) is 4*3x
    (rf"\(({LONE})\)(?=[0-9xy(])", r"\1*"),                      # (7)(x+1) is 7*(x+1)
    (rf"\(({LONE})\)(?!\^)", r"\1"),                             # (7)+5 is 7+5
    (r"\(([xy])\)", r"\1"),                                      # (x)^2 is x^2
    (rf"^\(({INNER}*)\)$|\((\({INNER}*\))\)", r"\1\2"),          # ((3+8))*2 is (3+8)*2
    (rf"{START}\((-(?:{LONE}))\)(?![\^xy(])", r"\1"),            # (-8)+3 is -8+3
)
NUMBERS = ((r"(?<=[0-9xy)])\(", "*("), (r"\)(?=[0-9xy])", ")*"))           # 2(3+4) is 2*(3+4)
LETTERS = (
    (r"(?<![0-9])1\*?(?=[xy])", ""),                             # 1x is x
    (r"y\*?x(?!\^)", "xy"),
    (r"([xy])\*?\1(?!\^)", r"\1^2"),                             # x*x is x^2
    (rf"(?<![0-9xy)^*])(\({INNER}*\)|[xy]|[xy]\^2)\*([0-9]+)(?![0-9xy(^*])", r"\2\1"),   # x*3: 3x
    (r"(?<=[0-9xy)])\*(?=[xy(])", ""),                           # 3*(x+1) is 3(x+1)
)

def prepare(text, model):
    """What a person typed, in the form in which problems are drawn. Raises InputError."""
    problem = normalize(text)
    room = model.config.block_size // 2 - 2
    if len(problem) > room:
        raise InputError(f"the problem is longer than {room} characters; write it in parts")
    exact_value(problem)                              # raises where it cannot be read
    has_letters = re.search("[xy]", problem) and "/" not in problem
    before = ""
    while before != problem:
        before = problem
        problem = replace_all(BRACKETS + (LETTERS if has_letters else NUMBERS), problem)
    return problem

OUTSIDE = "this problem is outside the range that the model was trained on"
RIGHT = "the answer is right"

def explain(line):
    """The check in words: of each stage, up to the first that is false, and of the answer."""
    right, checks = check(line)
    value = exact_value(line.split("=")[0])
    n_true = [*checks, False].index(False)
    words = ["true"] * n_true + [f"NOT TRUE: it should be {value}"] + [""] * len(checks)
    sentence = "this is NOT the right answer"
    if checks and checks[-1]:
        sentence = f"it is true but not in its form, {value}, so this is NOT AN ANSWER"
    return words[:len(checks)], RIGHT if right else sentence

######## Step 7-4: the page ########################################################################
# A problem is an address, /?q=12*34, for which Python writes a whole document on each visit. So the
# browser itself takes care of links, Back and reload. Only the colours need a script.
EXAMPLES = ("12+39", "(12+3)*4-6", "345*27", "1831/23", "48213-51786", "3(2x-1)-2(x+4)",
            "(x+2)(x-3)", "1/2+1/3", "99999*99999")
STYLE = """
:root { color-scheme: light dark; --look: light-dark(#8a4b00, #ffb347); }
body { max-width: 50rem; margin: auto; padding: 1rem; font: 1rem/1.4 system-ui, sans-serif; }
h1, h2 { font-size: 1.1rem; margin: .8rem 0 .2rem; }
form, .few { display: flex; flex-wrap: wrap; gap: .4rem 1rem; margin: .4rem 0; }
input, button { font: inherit; padding: .3rem .6rem; } form input { flex: 1; min-width: 0; }
.soft { color: light-dark(#5c5c63, #a5a7ae); font-size: .9rem; }
.true { color: light-dark(#17652a, #7fd193); }
.false { color: light-dark(#a8161b, #ff9a94); font-weight: bold; }
.scroll { overflow: auto hidden; margin: .4rem 0; } #answer { font-size: 1.7rem; }
td { padding: .1rem .6rem .1rem 0; } @media (max-width: 40rem) { td { display: block; } }
#tokens { display: flex; flex-wrap: wrap; font: 1.1rem ui-monospace, monospace; }
.token { min-width: 1.5rem; padding: .2rem 0; text-align: center; text-shadow: 0 0 4px Canvas; }
label { border-bottom: 2px solid #888; cursor: pointer; }
label input { appearance: none; margin: 0; padding: 0; outline: 0; }
label:has(:checked) { outline: 2px solid LinkText; }
label:has(:focus-visible) { outline-width: 4px; }
.moment { order: 1; width: 100%; } label:not(:has(:checked)) + .moment { display: none; }
#grid div { display: flex; width: max-content; font: .75rem ui-monospace, monospace; }
#grid b { width: 4.2rem; position: sticky; left: 0; background: Canvas; }
#grid i { width: 1.5rem; border: 1px solid #8884; } #grid .sharp { color: var(--look); }
#grid i, .token { print-color-adjust: exact; forced-color-adjust: none; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
svg { max-width: 38rem; font: 14px system-ui; fill: currentColor; }
path { fill: none; stroke: LinkText; stroke-width: 2; }
"""
SCRIPT = """
const tokens = document.querySelectorAll(".token");
const paint = (element, digit = 0) =>
  element.style.background = `color-mix(in srgb, var(--look) ${9 * digit}%, transparent)`;

function makeRow(text) {                              // "head 1.3: 0190": a cell for each digit
  const [name, digits] = text.split(": ");
  const row = document.createElement("div");
  row.innerHTML = `<b>${name}</b>` + "<i></i>".repeat(digits.length);
  row.querySelectorAll("i").forEach((cell, i) => paint(cell, digits[i]));
  row.onmouseenter = row.onfocus = () => tokens.forEach((token, i) => paint(token, digits[i]));
  const most = tokens[digits.indexOf(Math.max(...digits))].textContent;
  const className = /[89]/.test(digits) ? "sharp" : "";
  return Object.assign(row, {className, tabIndex: 0, role: "img", ariaLabel: `${name}: ${most}`});
}
onchange = onpageshow = () => {                       // a token was chosen
  const heads = document.querySelector("label:has(:checked) + .moment pre");
  document.querySelector("#grid").replaceChildren(...heads.textContent.split("\\n").map(makeRow));
  heads.hidden = true;
  tokens.forEach(token => paint(token));
};
"""
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}tinyllm</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style>
<h1>tinyllm</h1>
<p class="soft">A small language model that learned school arithmetic from examples. It writes one
character after another, and no calculator helps it. The check of each step is made afterwards.</p>
<form action="/"><input name="q" value="{typed}" aria-label="Problem" maxlength="400" required
  autofocus autocomplete="off" autocapitalize="off" spellcheck="false"><button>Ask</button></form>
<p class="few">{examples}</p>
<main>{result}</main>
{learned}
"""
HEADERS = {                                           # nothing may come from the network
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store"}

def render_chart(title, history, values):
    """A chart as SVG, of values(point) -> {name: 0 to 1} for each point of a history."""
    end = history[-1]["minutes"] or 1
    curves = {}
    for point in history:
        x = 20 + 320 * point["minutes"] / end
        for name, y in values(point).items():
            curves.setdefault(name, []).append(f"{x:.1f},{170 - 160 * y:.1f}")
    drawn = ""
    for i, (name, curve) in enumerate(curves.items()):           # dashes "0 0" are a whole line
        drawn += (f'<path stroke-dasharray="{2 * i} {3 if i else 0}" d="M{" ".join(curve)} '
                  f'M356,{16 + 22 * i}h36"/><text x="398" y="{20 + 22 * i}">'
                  f'{html.escape(name)}</text>')
    return f"""<h2>{title}</h2><svg viewBox="0 0 460 190" role="img" aria-label="{title}">
{drawn}<text x="0" y="16">1</text><text x="0" y="174">0</text>
<text x="270" y="188">{end:.1f} minutes</text></svg>"""

def render_tokens(model, line):
    """Each token, and after a written one what led to it. The style hides that of all but one."""
    text, looks, probabilities = watch(model, line)
    start = text.index("=") + 1
    parts = [f'<span class="token">{token}</span>' for token in text[:start]]
    for t, token in enumerate([*text[start:], "end"], start):
        bars = ""
        for p, i in zip(*probabilities[t - 1].topk(3)):
            likely = VOCAB[i].replace("\n", "end")
            bars += f'<span>{likely} {p:.1%} <meter value="{p:.3f}"></meter></span>'
        rows = [f"head {layer}.{n}: {shades(head[t - 1, :t], '0123456789')}"
                for layer, heads in enumerate(looks, 1) for n, head in enumerate(heads, 1)]
        parts.append(f'''<label class="token"><input type="radio" name="token">{token}</label>
<div class="moment"><p class="few">{bars}</p><pre>{"&#10;".join(rows)}</pre></div>''')
    return "".join(parts).replace('name="token"', 'name="token" checked', 1)      # the first one

def render_answer(model, problem):
    """Ask the model. -> the title, and all that the page says about the line that it wrote."""
    def math(text):
        return f'<math displaystyle="true">{typeset(text, MATHML)}</math>'
    line = solve(model, [problem])[0]
    words, sentence = explain(line)
    answer = f"{problem}={line.split('=')[-1]}"
    rows = []
    for stage, word in zip(re.split("(?==)", line), ["", *words]):       # cut before each "="
        mark = {"t": "true", "N": "false"}.get(word[:1], "soft")
        rows.append(f'<tr><td>{math(stage)}<td class="{mark}">{word}')
    return f"{answer} - ", f"""<div id="answer" class="scroll">{math(answer)}</div>
<p><span class="{"true" if sentence == RIGHT else "false"}">Check: {sentence}.</span>
<span class="soft">{f"Note: {OUTSIDE}." if is_outside(problem, model.config) else ""}</span></p>
<div class="scroll" tabindex="0"><table aria-label="Working">{"".join(rows)}</table></div>
<h2>How it wrote this</h2>
<p class="soft">Choose a token that it wrote (in the order in which it reads and writes), or step
with the arrow keys: below are the likeliest there, and where each head looked, from 0 to 9. Heads
that looked at one place stand out. Point at a row to see it above.</p>
<div id="tokens" role="radiogroup" aria-label="Tokens">{render_tokens(model, line)}</div>
<div id="grid" class="scroll"></div>
<h2>To copy</h2><pre>{line}</pre><pre>{to_latex(line)}</pre><script>{SCRIPT}</script>"""

def read_query(query):
    """The problem in an address. There "+" is a blank if a form wrote it (which writes %2B for a
    plus), or if it has not two sides. In /?q=1+2 it is a plus."""
    is_form = re.search("%2[89BF]|%5E", query)                   # a form's ( ) + / ^
    query = re.sub(r"\+" if is_form else r"(?<![\w)])\+|\+(?![\w(%])", " ", query)
    return urllib.parse.unquote(query.encode("latin-1")).strip()

class Handler(http.server.BaseHTTPRequestHandler):
    timeout = 10                                      # seconds that a client may stall
    error_message_format = "<!doctype html><title>tinyllm</title><p>%(message)s: %(explain)s"
    log_message = lambda *_: None                     # it is silent

    def end_headers(self):
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def do_GET(self):
        """Another site (Sec-Fetch-Site) or another name of this computer (Host) is refused."""
        path, _, query = self.path.partition("?q=")
        is_ours = self.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
        name = r"(localhost\.?|127(\.[0-9]+){3}|\[::1\])(:[0-9]*)?"
        if not (is_ours and re.fullmatch(name, self.headers.get("Host", "").lower())):
            return self.send_error(403, explain="type the address that the server printed")
        if len(self.path) > 2000:
            return self.send_error(414, explain="the address is longer than 2000 characters")
        if path != "/":
            return self.send_error(404, explain="a problem has an address such as /?q=12*34")
        typed, status, title, result = read_query(query), 200, "", ""
        try:
            if typed:
                problem = prepare(typed, self.server.model)
                with self.server.lock:
                    title, result = render_answer(self.server.model, problem)
        except InputError as error:
            status, result = 422, f'<p role="alert" class="false">{html.escape(str(error))}</p>'
        page = PAGE.format(title=title, style=STYLE, typed=html.escape(typed), result=result,
                           examples=self.server.examples, learned=self.server.learned)
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(page.encode("utf-8", "replace"))
    do_HEAD = do_GET

class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128                          # browsers that may wait
    handle_error = lambda *_: None                    # a client that went away harms no other

def make_server(model, history, port):
    """A server of the page, for this computer alone; port 0 takes a free one. Raises InputError."""
    try:
        server = Server(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot serve on --port {port}: {error}") from error
    server.model, server.lock = model, threading.Lock()          # heads keep looks: one at a time
    server.examples = server.learned = ""
    examples = [problem for problem in EXAMPLES if kind_of(problem) in model.config.kinds.split()]
    for problem, line in zip(examples, solve(model, examples, max_tokens=160)):
        mark = "" if explain(line)[1] == RIGHT else " (it fails here)"
        address = "/?q=" + urllib.parse.quote(problem, safe="*()")
        server.examples += f'<span><a href="{address}">{problem}</a>{mark}</span>'
    if history:
        server.learned = render_chart("How it learned: the loss, in nats", history,
                                      lambda point: {"loss": min(1, point["loss"])})
        server.learned += render_chart("The part of held-out answers that was right", history,
                                       lambda point: point.get("right", {}))
    return server

######## Step 7-5: Muon ############################################################################
def orthogonal(matrix):
    """A matrix of the same directions, all stretched about equally: (rows, columns) -> the same.

    (Orthogonal means that all are stretched by 1.) Its singular values s say how much it stretches
    along each. Five times, each s becomes a s + b s^3 + c s^5, with a = 3.4445, b = -4.775 and
    c = 2.0315, and ends between 0.7 and 1.2, if it was not tiny. Matrix products suffice: for a
    matrix x, x @ x.T @ x has the same directions and s^3 (Newton-Schulz iteration).

    >>> matrix = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.1, 0.0]])      # singular values 3 and 0.1
    >>> [round(s, 1) for s in orthogonal(matrix).diagonal().tolist()]
    [0.7, 1.1]
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonal(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)    # norm: the root of the sum of squares; no s is above 1
    for _ in range(5):
        gram = x @ x.T                                                            # (rows, rows)
        # addmm(m, p, q, beta=b, alpha=c) is b m + c p @ q, in one call
        factor = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, factor, x, beta=3.4445, alpha=1)
    return x

class Muon(torch.optim.Optimizer):
    """Gradient descent with momentum and orthogonal steps. (torch.optim's is slow on many CPUs.)"""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups                   # what was given to __init__
        keep = group["momentum"]
        for p in group["params"]:
            # state: what the optimizer keeps for each Parameter, at first zeros
            momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - keep)          # a.lerp(b, w) is (1 - w) a + w b
            ahead = p.grad.lerp(momentum, keep)       # the newest counts more (Nesterov)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            stretch = max(1, len(p) / p.shape[1]) ** 0.5         # more rows than columns: longer
            p.sub_(orthogonal(ahead), alpha=group["lr"] * stretch)

######## Step 7-6: the commands ####################################################################
ABILITIES = getattr(torch.cpu, "get_capabilities", dict)()       # came with torch 2.11
HALF = DEVICE != "cpu" or any(ABILITIES.get(name) for name in ("avx512_bf16", "amx_bf16"))

def held_out_problems(kind, count, size=None, seed=1):
    """Up to `count` different held-out problems, of any size or of one; fewer if few exist."""
    rng = random.Random(f"{seed}/{kind}/{size}")
    found = {}                                        # keeps the order, as a set does not
    for _ in range(200 * count):
        problem = KINDS[kind].draw(rng, size or KINDS[kind].top)
        if is_held_out(problem) and size in (None, size_of(problem)):
            found[problem] = True
        if len(found) == count:
            break
    return list(found)

def measure(model, count, size=None, seed=1):
    """Ask held-out problems of each kind -> {kind: what evaluate says of them}"""
    return {kind: evaluate(model, held_out_problems(kind, count, size, seed))
            for kind in model.config.kinds.split()}

def report(model, n_done, loss, minutes, history):
    """Print a row, a full one at each tenth of the run, and add what it says to history."""
    steps = model.config.steps
    left = minutes * (steps - n_done) / n_done
    if not score_sample(model).isfinite().all():
        raise InputError("weights are no numbers; the file keeps the state before; lower --lr")
    row = f"{n_done:7,} {n_done / steps:4.0%} {loss:7.4f} {minutes:5.1f} {left:5.1f}"
    point = {"step": n_done, "loss": loss, "minutes": minutes}
    if 10 * n_done // steps > (10 * n_done - 10) // steps:
        results = measure(model, 100)
        point["right"] = {kind: result["answers"] for kind, result in results.items()}
        print(row + "".join(f"{part:8.0%}" for part in point["right"].values()), flush=True)
    elif sys.stdout.isatty():
        print(row, end="\r", flush=True)
    history.append(point)

def save_or_warn(path, model, optimizers, n_done, history):
    """A disk may be away for a while: only the last save must not fail."""
    try:
        save_checkpoint(path, model, optimizers, n_done, history)
    except InputError as error:
        if n_done == model.config.steps:
            raise
        print(f"tinyllm: {error}; the run goes on and tries again", file=sys.stderr)

def new_model(config):
    """A model with random weights, chosen by the seed. Raises InputError for what cannot work."""
    for name, value in dataclasses.asdict(config).items():
        least = 0 if name in ("seed", "weight_decay", "flat") else 1e-9
        if name != "kinds" and not least <= value < 2 ** 63:
            raise InputError(f"--{name} {value} must be more than 0, and not too large")
    kinds = config.kinds.split()
    if not kinds or len(set(kinds)) < len(kinds) or set(kinds) - set(KINDS):
        raise InputError(f"--kinds '{config.kinds}' must name some of: {' '.join(KINDS)}")
    if config.head_dim % 2 or config.flat >= 1:
        raise InputError("--head_dim must be even, and --flat below 1")
    if not 32 <= config.block_size <= config.batch_tokens:
        raise InputError("--block_size must be at least 32, and --batch_tokens at least that")
    torch.manual_seed(config.seed)
    try:
        return TinyLLM(config).to(DEVICE)
    except RuntimeError as error:
        raise InputError("there is no memory for such a model; make it smaller") from error

def command_train(args):
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config)
             if hasattr(args, field.name)}
    path = args.out or ("quick.pt" if args.quick else "tinyllm.pt")
    if args.quick:                                    # a first taste: one layer learns sums
        given = {"n_layer": 1, "kinds": "add", "steps": 600, "batch_tokens": 2048, **given}
    may_replace = args.resume or args.force or RANK > 0 or args.quick and not args.out
    if os.path.exists(path) and not (may_replace and os.path.isfile(path)):
        raise InputError(f"{path} exists: give --resume to go on, --force to replace it if it is a "
                         "plain file, or another --out")
    if args.resume:
        model, state = load_checkpoint(path)
        if set(given) - {"steps"} or given.get("steps", model.config.steps) <= state["step"]:
            raise InputError(f"{path} has had {state['step']:,} of {model.config.steps:,} steps; "
                             "--resume takes --steps, a larger number, and nothing else")
        model.config.steps = given.get("steps", model.config.steps)
    else:
        model, state = new_model(Config(**given)), {"step": 0, "history": [], "optimizers": []}
    config, kinds = model.config, model.config.kinds.split()
    optimizers = make_optimizers(model, config)
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    if IS_SHARED:
        dist.init_process_group()
    some = [held_out_problems(kind, 1)[0] for kind in kinds]
    if RANK == 0:                                     # process 0 speaks and saves
        if not args.resume:
            save_checkpoint(path, model)              # now, not in ten minutes, is the time to fail
            print("Before training, the model answers:")
            print(*solve(model.eval(), some, max_tokens=40), sep="\n")
        print(f"{sum(p.numel() for p in model.parameters()):,} weights on {DEVICE}, "
              f"{torch.get_num_threads()} threads, steps {state['step']:,} to {config.steps:,}, "
              f"seed {config.seed}, torch {torch.__version__}")
        print("   step done    loss   min  left" + "".join(f"{kind:>8}" for kind in kinds))
    try:
        fit(model, optimizers, state["step"], state["history"], path)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{path} holds the run up to its last hundredth; go on with: "
                                f'python tinyllm.py train --resume --out "{path}"') from None
    if IS_SHARED:
        dist.destroy_process_group()
    if RANK == 0:
        print(f"Saved as {path}. Held-out problems, never given in training:")
        print_results(measure(model.eval(), 500, seed=2))
        print("Now it answers:", *solve(model, some), "Now try:", sep="\n")
        problem = "123+456" if args.quick else some[-1]
        print(f'    python tinyllm.py ask --checkpoint "{path}" "{problem}"')

def print_results(results):
    """A row for each kind, then two wrong lines of each, with their first slip."""
    print("kind     problems  answers right  workings right")
    for kind, result in results.items():
        if result["problems"] == 0:
            print(f"{kind:9}{0:8}  there are no such problems, or they are hardly ever drawn")
            continue
        print(f"{kind:9}{result['problems']:8}  {result['answers']:13.2%}  "
              f"{result['workings']:14.2%}")
    for result in results.values():
        for line in result["wrong"][:2]:
            words, sentence = explain(line)
            slip = next((word for word in words if word != "true"), sentence)
            print(f"wrong: {line[:300]}\n       {slip}")

def command_eval(args):
    if args.problems < 1 or args.size is not None and args.size < 1:
        raise InputError("--problems and --size must be at least 1")
    model, _ = load_checkpoint(args.checkpoint)
    print(f"Held-out problems, never given in training; greedy decoding; {args.checkpoint}")
    print_results(measure(model, args.problems, args.size, seed=2))

def read_input():
    """Lists of lines: typed at a prompt until an empty one, or from a pipe all that wait."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            __import__("readline")                    # line editing, where it exists
        # the prompt is no part of what may be written to a file
        screen = sys.stdout if sys.stdout.isatty() else sys.stderr
        with contextlib.redirect_stdout(screen), contextlib.suppress(EOFError):
            while text := input("problem (Enter ends): ").strip():
                yield [text]
        return
    rest = b""
    while data := sys.stdin.buffer.read1(1 << 16):
        *lines, rest = (rest[:10_000] + data).split(b"\n")       # what is longer is refused anyway
        yield [line.decode("utf-8", "replace") for line in lines]
    yield [rest.decode("utf-8", "replace")] if rest else []

def command_ask(args):
    if args.plain and args.latex:
        raise InputError("give --plain or --latex, not both")
    model, _ = load_checkpoint(args.checkpoint)
    alone = len(args.problem) == 1 or not args.problem and sys.stdin.isatty()
    status, n_read = 0, 0
    for texts in [args.problem] if args.problem else read_input():
        asked = []                                    # a problem, or what is wrong with it
        for text in texts:
            try:
                asked.append(prepare(text, model))
            except InputError as error:
                asked.append(error)
        lines = iter(solve(model, [problem for problem in asked if isinstance(problem, str)]))
        for n_read, problem in enumerate(asked, n_read + 1):
            where = "" if alone else f"{'problem' if args.problem else 'line'} {n_read}: "
            if isinstance(problem, str):
                show(next(lines), model.config, args, where)
            else:
                status = 2
                print(f"tinyllm: {where}{problem}", file=sys.stderr)
                print(f"error: {problem}\n" if args.plain else "", end="", flush=True)
    return status

def show(line, config, args, where):
    """Print a line, plain, as LaTeX or as a notebook shows it: a stage a row, with its check."""
    problem, *stages = line.split("=")
    words, sentence = explain(line)
    remarks = [f"note: {OUTSIDE}"] if is_outside(problem, config) else []
    remarks += [f"check: {sentence}"] if sentence != RIGHT and not args.plain else []
    if args.plain or args.latex:
        print(line if args.plain else to_latex(line), flush=True)
    else:
        width = max(map(len, stages), default=0)
        for stage, word in zip(stages, words):
            print(f"{problem} = {stage:{width}}   {word and 'check: ' + word}".rstrip())
            problem = " " * len(problem)
    for remark in remarks:
        print(f"{where}{remark}", file=sys.stderr if where or args.latex else sys.stdout)

def command_look(args):
    model, _ = load_checkpoint(args.checkpoint)
    problems = [prepare(text, model) for text in args.problem or ["12+39"]]
    for line in solve(model, problems):
        print(f"{line}\nThe line stands as the model reads it.\n{draw_looks(model, line)}")

def command_serve(args):
    model, state = load_checkpoint(args.checkpoint)
    with make_server(model, state["history"], args.port) as server:
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()

def command_data(args):
    if args.count < 1:
        raise InputError("--count must be at least 1")
    rng = random.Random(args.seed)
    for _ in range(args.count):
        kind = args.kind or rng.choice(list(KINDS))
        print(work_out(draw_problem(kind, rng, args.split == "test")))

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help")

COMMANDS = {
    "train": (command_train, "Train a model from scratch."),
    "eval": (command_eval, "Measure a model on held-out problems."),
    "ask": (command_ask, "Ask the model."),
    "look": (command_look, "See what the model looked at while it wrote."),
    "serve": (command_serve, "Ask and look in the browser."),
    "data": (command_data, "Print examples of what the model learns from."),
}
FLAGS = (                               # commands, flag, what argparse needs to know
    ("train", "--out", {"help": "checkpoint to write (default: tinyllm.pt)"}),
    ("train", "--quick", {"action": "store_true", "help": "a first taste: sums, into quick.pt"}),
    ("train", "--resume", {"action": "store_true", "help": "go on with the run in --out"}),
    ("train", "--force", {"action": "store_true", "help": "replace --out if it exists"}),
    ("ask look", "problem", {"nargs": "*", "help": 'such as "12+39"; for ask also a pipe'}),
    ("ask", "--plain", {"action": "store_true", "help": "one line in, one full line out"}),
    ("ask", "--latex", {"action": "store_true", "help": "the working as LaTeX"}),
    ("eval ask look serve", "--checkpoint", {"default": "tinyllm.pt", "help": "file of the model"}),
    ("eval", "--problems", {"type": int, "default": 1000, "help": "problems of each kind"}),
    ("eval", "--size", {"type": int, "help": "exactly so many digits, or operators"}),
    ("serve", "--port", {"type": int, "default": 8000, "help": "the port (default: 8000)"}),
    ("data", "--kind", {"choices": KINDS, "help": "kind of problem; none: all of them"}),
    ("data", "--split", {"choices": ("train", "test"), "default": "train", "help": "which side"}),
    ("data", "--count", {"type": int, "default": 10, "help": "lines to print"}),
    ("data", "--seed", {"type": int, "default": 0, "help": "chooses the problems"}),
)

def make_parser():
    """The command line: COMMANDS with their FLAGS, and for train each field of Config."""
    parser = Parser(prog="tinyllm.py", description="A small GPT that learns school arithmetic.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    about = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for name, (function, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        for names, flag, how in FLAGS:
            if name in names.split():
                command.add_argument(flag, **how)
        for field in dataclasses.fields(Config) if name == "train" else ():
            command.add_argument(f"--{field.name}", type=field.type, default=argparse.SUPPRESS,
                                 help=f"{about[field.name]} (default: {field.default})")
    return parser

def main(argv=None):
    """Run a command; returns the exit status: 0 fine, 2 bad input, 130 Ctrl-C."""
    for name in ("stdin", "stdout", "stderr"):        # a stream can be closed
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))
    if hasattr(sys.stdout, "reconfigure"):            # what a console cannot show is a "?"
        sys.stdout.reconfigure(errors="replace")
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub("^(?=-(?!-[a-z]|-$|h$))", " ", text) for text in argv]     # -5+3 is no flag
    try:
        args = make_parser().parse_args(argv)
        return args.function(args) or 0
    except InputError as error:
        print(f"tinyllm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\ntinyllm: stopped; {stop}".rstrip("; "), file=sys.stderr)
        return 130
    except OSError as error:                          # a full disk, or a reader that has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):        # as `head -1` does
            return 0
        print(f"tinyllm: input or output failed: {error}", file=sys.stderr)
        return 2

######## Appendix 1: what a stage is worth #########################################################
MONOMIALS = ("xx", "xy", "yy", "x", "y", "")          # in the order in which an answer has them

def read(text):
    """A text as its terms, multiplied out: 3(2x-1)-y is [(6, "x"), (-3, ""), (-1, "y")].

    Each line of this grammar is a function below (recursive descent). Raises InputError.

        sum      a minus or nothing, a product, then any number of + product or - product
        product  a power, then any number of * power, / power, or power alone: 3x, 2(x+1)
        power    a number, a letter or a sum in brackets, then ^2 or nothing
    """
    if len(text) > 400 or text.count("(") > 80:
        raise InputError("the problem is too long, or has too many brackets; write it in parts")
    tokens = re.findall(r"\^2(?![0-9])|[0-9]+|.", text) + ["the end"]

    def accept(*wanted):
        return tokens.pop(0) if tokens[0] in wanted else ""

    def read_sum():
        terms, sign = [], accept("-") or "+"
        while sign:
            factor = -1 if sign == "-" else 1
            terms += [(factor * n, letters) for n, letters in read_product()]
            sign = accept("+", "-")
        return terms

    def read_product():
        terms, sign = read_power(), "*"
        while tokens[0] in ("*", "/", "x", "y", "("):
            if sign == "/" and tokens[0] not in ("*", "/"):
                raise InputError("6/2(1+2) has two meanings; write a * behind a division")
            sign = accept("*", "/")
            combine = divide_terms if sign == "/" else multiply_terms
            terms = combine(terms, read_power())
        return terms

    def read_power():
        token = tokens.pop(0)
        if token in ("x", "y"):
            terms = [(1, token)]
        elif re.fullmatch("[0-9]+", token):
            terms = [(int(token), "")]
        elif token == "(":
            terms = read_sum()
            if not accept(")"):
                raise InputError("a bracket is not closed; see that each has its partner")
        else:
            rest = "".join([token, *tokens]).removesuffix("the end")[:20]
            raise InputError(f"something is missing before {rest or 'the end'}; each sign has two "
                             "sides, and each bracket its partner")
        if accept("^2"):
            if not any(letters for _, letters in terms):
                raise InputError("only letters can be squared, also in brackets; write 3*3")
            terms = multiply_terms(terms, terms)
        return terms

    terms = read_sum()
    if tokens != ["the end"]:
        raise InputError(f"{''.join(tokens[:-1])[:20]} cannot be read; write * for times, 3x for "
                         "x3, only x^2 as a power, and see that each bracket has its partner")
    return terms

def add_up(terms):
    """A sum without letters as one number; others as they are."""
    has_letters = any(letters for _, letters in terms)
    return terms if has_letters else [(sum(n for n, _ in terms), "")]

def multiply_terms(a, b):
    products = [(n * m, "".join(sorted(some + more)))
                for n, some in add_up(a) for m, more in add_up(b)]
    if any(letters not in MONOMIALS for _, letters in products):
        raise InputError("only products up to x^2, xy and y^2 are known; write fewer letters")
    return products

def divide_terms(a, b):
    [(above, letters), *more_above], [(below, more), *more_below] = add_up(a), add_up(b)
    if letters or more or more_above or more_below:
        raise InputError("letters cannot be divided here; write it without the division")
    if below == 0:
        raise InputError("a division by zero has no answer; change the divisor")
    return [(Fraction(above) / below, "")]

def write_terms(terms):
    """Terms to text: [(1, "xx"), (-1, "x")] is x^2-x, and [] is 0."""
    text = "".join(f"{'' if n < 0 else '+'}{n}{letters}" for n, letters in terms)
    text = text.replace("xx", "x^2").replace("yy", "y^2")
    return re.sub("(?<=[+-])1(?=[xy])", "", text).removeprefix("+") or "0"

def exact_value(text):
    """What a text is worth, for all x and y, in the one form of an answer. Raises InputError.

    >>> exact_value("2*11/8"), exact_value("-7/2"), exact_value("(x+1)^2-x^2")
    ('2+3/4', '-3-1/2', '2x+1')
    """
    total = dict.fromkeys(MONOMIALS, 0)
    for n, letters in read(text):
        total[letters] += n
    number = total.pop("")
    if any(n % 1 for n in total.values()):
        raise InputError("letters with fractions are not known; write it without the division")
    terms = [(n, letters) for letters, n in total.items()]
    terms += [(int(number), ""), (number - int(number), "")]
    return write_terms([term for term in terms if term[0]])

######## Appendix 2: the working ###################################################################
# A stage with numbers is written again by a list of replacements, each wherever it fits. A number
# that was found keeps its brackets till the end of the list: so a stage takes one step everywhere.

def replace_all(replacements, text):
    for pattern, new in replacements:
        text = re.sub(pattern, new, text)
    return text

def do_sum(match):
    return str(int(match[1]) + int(match[2]))

def do_product(match):
    sign, a, operation, b, behind = match.groups()
    a, b = int(a), int(b)
    if operation == "*":
        summands = multiply(a, b)
        return sign + (f"({'+'.join(summands)})" if len(summands) > 1 else summands[0])
    if a == 0 or a == b or b == 1:
        return f"{sign}{a // b}"
    if a < b:                                         # 3/7*2: nothing to be done
        return match[0]
    taken = first_part(a, b)
    if behind:                                        # 1831/23*2 is (70+(1831-1610)/23)*2
        return f"{sign}({taken}+({a}-{taken * b})/{b})"
    return f"{sign}{taken}{sign or '+'}({a}-{taken * b})/{b}"

def turn_sign(match):
    sign, factors, number = match.groups()
    return ("+" if sign == "-" else "-") + factors + number

RULES = (
    (rf"{START}(-?[0-9]+)([-+][0-9]+)(?![0-9*/])", do_sum),        # (12+3)*4 is (15)*4
    (r"(?<=[0-9)])[-+]0/[0-9]+(?![0-9*/])", ""),                   # 8+0/7 is 8
    (rf"([-+]|{START})([0-9]+)([*/])([0-9]+)(?=([*/]?))", do_product),       # 5+3*4 is 5+12
    (rf"([-+]|{START})((?:[0-9]+[*/])*)\(-([0-9]+)\)", turn_sign),           # 5-2*(-3) is 5+2*3
    (r"\(([0-9]+)\)", r"\1"),                                      # (15)*4 is 15*4
    (rf"{START}\+", ""),                                           # +7 is 7
    (rf"{START}-0(?![0-9])", "0"),                                 # -0 is 0
    (rf"{START}\(((?:[^()]|\([^()]*\))*)\)(?![*/])", r"\1"),       # (6000+900)+5 is 6000+900+5
)

def places(n):
    """345 -> [300, 40, 5], and 306 -> [300, 6]"""
    return [int(digit) * 10 ** i for i, digit in enumerate(str(n)[::-1]) if digit != "0"][::-1]

def multiply(a, b):
    """The summands of a product. One digit times two, with zeros behind or not, is done at once;
    the rest is split by place: 345*27 is 345*20+345*7, and 345*20 is 6000+900.
    """
    first, second = places(a), places(b)
    few, many = sorted((first, second), key=len)
    if not few or len(few) == 1 and (len(many) <= 2 or str(few[0])[0] == "1"):
        return [str(a * b)]
    if len(few) == 1:
        rest = multiply(sum(many[1:]), few[0])
        return [str(many[0] * few[0]), rest[0] if len(rest) == 1 else f"({'+'.join(rest)})"]
    if len(first) < len(second):
        return [f"{part}*{b}" for part in first]
    return [f"{a}*{part}" for part in second]

def first_part(a, b):
    """What is taken off a quotient first, a digit with zeros: of 1831/23 it is 70. (From 11 on
    nobody knows the tables: a pupil takes 25 for 23.)
    """
    unit = 5 if b < 50 else 10
    rounded = b if b <= 10 else (b // unit + 1) * unit
    digits = str(max(1, a // rounded))
    return int(digits[0]) * 10 ** (len(digits) - 1)

FACTORS = r"[0-9]+(?:\*[0-9]+)*"
FRACTION = rf"(?<![0-9*/)]){FACTORS}/(?:[0-9]+|\({FACTORS}\))(?![0-9*/(])"       # 3/7, 2*3/(3*3)

def each_fraction(change, text):
    """The text with change(above, below) for each fraction below 1; 7/2 stays a division."""
    def one(match):
        sides = [re.findall("[0-9]+", side) for side in match[0].split("/")]
        above, below = [list(map(int, side)) for side in sides]
        is_below_1 = 0 < math.prod(above) < math.prod(below)
        return change(above, below) if is_below_1 else match[0]
    return re.sub(FRACTION, one, text)

def prime_factors(n):
    """84 -> [2, 2, 3, 7], 1 -> []. What has no factor below 10,000 stays whole."""
    p = next((p for p in range(2, min(n, 10_000)) if n % p == 0), n)
    return [p, *prime_factors(n // p)] if n > 1 else []

SHIELD = str.maketrans("0123456789*/()", "abcdefghijklmn")
OPEN = str.maketrans("abcdefghijklmn", "0123456789*/()")

def simplify(above, below):
    """Take a fraction apart into primes, or cancel one that is above and below, or multiply out:
    12/18 is 2*2*3/(2*3*3) is 2*3/(3*3) is 2/3. Its characters become letters for a while, so that
    no other rule sees it.
    """
    common = [p for p in above if p in below]
    if len(above) == len(below) == 1:
        above, below = prime_factors(above[0]), prime_factors(below[0])
    elif common:
        above.remove(min(common))
        below.remove(min(common))
    else:
        above, below = [math.prod(above)], [math.prod(below)]
    top, bottom = ("*".join(map(str, side)) for side in (above or [1], below))
    return (f"{top}/({bottom})" if len(below) > 1 else f"{top}/{bottom}").translate(SHIELD)

def rewrite_letters(text):
    """The next stage with letters: multiply out, or sort, or add what is alike; the first that
    changes anything. Of terms that are alike two are added: 5x-5x+2x is 0x+2x. A lone 0x goes.
    """
    terms = read(text)
    in_order, added = [], []
    for letters in MONOMIALS:
        numbers = [n for n, some in terms if some == letters]
        in_order += [(n, letters) for n in numbers]
        if numbers not in ([], [0]):
            added += [(n, letters) for n in (sum(numbers[:2]), *numbers[2:])]
    return next((new for new in map(write_terms, (terms, in_order, added)) if new != text), text)

def next_stage(text):
    """The text written again; the same text at the end."""
    if re.search("[xy]", text):
        return rewrite_letters(text)
    return replace_all(RULES, each_fraction(simplify, text)).translate(OPEN)

@functools.lru_cache(maxsize=8)                       # who draws a problem asks for its line, too
def work_out(problem):
    """The line that the model should write. This makes training data; no answer passes through it.

    >>> work_out("36/84"), work_out("7-(-5)")
    ('36/84=2*2*3*3/(2*2*3*7)=2*3*3/(2*3*7)=3*3/(3*7)=3/7', '7-(-5)=7+5=12')
    """
    stages = [problem, next_stage(problem)]
    while stages[-1] not in stages[:-1]:
        stages.append(next_stage(stages[-1]))
    if len(stages) > 2 and (stages[-1] == stages[-2] or "*" in stages[-1]):      # 4/7 was 2*2/7
        stages.pop()
    return "=".join(stages)

######## Appendix 3: the kind of a problem, and problems with brackets ############################
def kind_of(problem):
    """The name of a problem's kind.

    >>> kind_of("123*45"), kind_of("12-(-7)"), kind_of("1+2*3"), kind_of("2x+3x-1")
    ('mul', 'sub', 'expr', 'algebra')
    """
    if re.search("[xy]", problem):
        return "algebra"
    two_numbers = re.fullmatch(r"-?[0-9]+([-+*/])(?:[0-9]+|\(-[0-9]+\))", problem)
    if two_numbers is None:
        return "expr"
    return {"+": "add", "-": "sub", "*": "mul", "/": "div"}[two_numbers[1]]

def size_of(problem):
    """The digits of the longest number, or the operators that stand between two things.

    >>> size_of("12-(-345)"), size_of("-1+2*(-3)"), size_of("3(2x-1)+x")
    (3, 2, 2)
    """
    if kind_of(problem) in ("expr", "algebra"):
        return len(re.findall("(?<=[0-9)xy])[-+*/]", problem))
    return max(map(len, re.findall("[0-9]+", problem)))

def draw_tree(rng, n, signs, lengths, negative):
    """n operators -> (text, how strongly it binds: 1 a sum, 2 a product, 3 all else, value).

    lengths: how often a number has 1, 2, 3, 4 digits; negative: how often it is below 0.
    """
    if n == 0:
        value = draw_number(rng, rng.choices((1, 2, 3, 4), lengths)[0])
        return (f"(-{value})", 3, -value) if rng.random() < negative else (str(value), 3, value)
    while True:
        sign, n_left = rng.choice(signs), rng.randrange(n)
        left, left_binds, a = draw_tree(rng, n_left, signs, lengths, negative)
        right, right_binds, b = draw_tree(rng, n - 1 - n_left, signs, lengths, negative)
        if sign == "/" and n_left == 0:               # choose the dividend to suit the divisor
            a = b * draw_number(rng, rng.choice((1, 1, 2)))
            left = str(a) if a >= 0 else f"({a})"
        elif sign == "/" and n_left == n - 1:         # or the divisor to suit the dividend
            b = rng.choice([d for d in range(1, 100) if a % d == 0])
            right = str(b)
        if sign == "/" and (not 0 < abs(b) < 100 or a % b):
            continue                                  # it must come out even
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // (b or 1)}[sign]
        if abs(value) <= 9999:
            break
    binds = 1 if sign in "+-" else 2
    # brackets where they are needed, and now and then, as people write, where they are not
    if left_binds < binds or left_binds < 3 and rng.random() < 0.1:
        left = f"({left})"
    if right_binds <= binds or right.startswith("-") or right_binds < 3 and rng.random() < 0.06:
        right = f"({right})"
    text = left + sign + right
    return (f"-({text})", 3, -value) if rng.random() < 0.03 else (text, binds, value)

def draw_chain(rng, n):
    """n one-digit numbers in a row, in brackets: (5*(-5)+6-3)"""
    numbers = [rng.randint(-9, 9) for _ in range(n)]
    chain = "".join(rng.choice("+-*") + (str(m) if m >= 0 else f"({m})") for m in numbers)
    return f"({chain[1:]})"

CHAIN = r"\(-?[0-9](?:[-+*](?:[0-9]|\(-[0-9]\))){3}\)"
TOO_LARGE = r"[0-9]{5}|/[0-9]{3}|/\(-[0-9]{3}\)"      # what draw_tree does not draw

def is_neat(problem):
    """Is the working of an expression short, with small numbers, and its answer whole?"""
    line = work_out(problem)
    return len(line) <= 200 and not re.search("[0-9]{6}", line) and re.search("=-?[0-9]+$", line)

def draw_expression(rng, top):
    """2 to `top` operators, or two chains with seven."""
    while True:
        dice, n = rng.random(), rng.randint(2, max(2, top))
        if dice < 0.12 and top > 5:
            problem = draw_chain(rng, 4) + rng.choice("+-*") + draw_chain(rng, 4)
        elif dice < 0.3:                              # many negative numbers
            problem = draw_tree(rng, n, "+-*/", (4, 4, 2, 0), 0.5)[0]
        elif dice < 0.4:                              # long sums
            problem = draw_tree(rng, n, "++-", (1, 1, 3, 0), 0.04)[0]
        else:
            problem = draw_tree(rng, n, "+-*/", (48, 39, 11, 2), 0.04)[0]
        problem = re.sub(r"(^|\()\((-[0-9]+)\)", r"\1\2", problem)         # (-3)+5 is -3+5
        if size_of(problem) > 1 and is_neat(problem):
            return problem

KINDS["expr"] = Kind(draw=draw_expression, top=6, share=2.0)

######## Appendix 4: problems with letters #########################################################
# Problems with letters grow from a grammar: each capital letter becomes one of its words until none
# is left. Then the small letters are filled in: v and w are x and y, or y and x; u and o are "", w,
# v^2 or other letters; n is 1 to 9 or 1 to 99, c 1 to 9, d 2 to 9, e 10 to 99, i one number
# throughout; s is a sign. A new shape is a new word: "O" with one more "d(v+w+c)", for example.

GRAMMAR = {
    "P": "S S S M M M F F F F F Q Q Q O O N N",                        # a problem
    "S": "TsT TsTsT TsTsTsT TsTsTsTsT TsTsTsTsTsT -TsT -TsTsT -TsTsTsT -TsTsTsTsTsT",   # like terms
    "T": "nv nv nv n n nu nu no iv i",
    "M": "UsUsU UsUsUsU UsUsUsUsU UsUsUsUsUsU -UsUsUsU -UsUsUsUsU -UsUsUsUsUsU",
    "U": "nv nw n nv^2 nw^2 nxy ixy iv^2",                             # letters of all kinds
    "F": "D DsD DsD DsDsD DsDsD DsT TsD DsTsD TsDsD DsDsT "            # with brackets
         "-DsD -DsDsT -DsDsD -DsT -DsTsD -TsD -TsDsD -TsDsT",
    "D": "dB dB dB B B",                                               # 3(2x-1)-2(x+4)-(x-2)+7
    "B": "(cvsc) (cvsc) (cwsc) (vsc) (cvscw) (vscw) (cwsv) (cscv) (cscv) (-cscv) (-cvsc) (-cvscw)",
    "Q": "BB BB BB B^2 (-cvsc)(-cvsc) (cv+i)(cv-i) (v+i)(v-i) (v-i)(v+i) (i+v)(i-v) (dv-i)(dv+i)",
    "O": "vB -vB vBswB dvB dvB -dvB Bv Bw BvsT eB -eB eBseB A -A dA -dA dAsdA AsA dAsew vA",
    "A": "(vse)",                                                      # with a large number
    "N": "dvs(-dv) -dvs(-dw) (dv)^2 (-dv)^2 dv*ew dv*ev d*ev dv*d dv(csc) "
         "Rsn R Z Zsn dvs0 vs0 0vsT",
    "R": "dv*dv v*dw v*dv dv*w dv*dw",                                 # letters times letters
    "Z": "d*dv d*dvsdv d*dvsdw dvs0w",
}
GRAMMAR = {letter: words.split() for letter, words in GRAMMAR.items()}
OTHERS = r"(?:[xy]|[xy]\^2|xy)?"
FILLINGS = {"v": "[xy]", "w": "[xy]", "u": OTHERS, "o": OTHERS, "n": "[0-9]{0,2}", "c": "[0-9]?",
            "d": "[2-9]", "e": "[1-9][0-9]", "i": "[0-9]{0,2}", "s": "[-+]"}

def draw_algebra(rng, top):
    """A problem with letters and at most `top` operators."""
    largest = rng.choice((9, 99))
    v, w = rng.sample("xy", 2)
    others = ["", w, v + "^2", "xy", w + "^2"]
    same = {"v": v, "w": w, "u": rng.choice(others), "o": rng.choice(others),
            "i": str(rng.randint(1, largest))}
    numbers = {"n": (1, largest), "c": (1, 9), "d": (2, 9), "e": (10, 99)}

    def fill(match):
        letter = match[0]
        if letter == "s":
            return rng.choice("+-")
        return same[letter] if letter in same else str(rng.randint(*numbers[letter]))

    while True:
        problem = "P"
        while re.search("[A-Z]", problem):
            problem = re.sub("[A-Z]", lambda match: rng.choice(GRAMMAR[match[0]]), problem)
        problem = re.sub("[a-w]", fill, problem)
        problem = re.sub("(?<![0-9])1(?=[xy(])", "", problem)              # 1x is x
        if re.search("[xy]", problem) and size_of(problem) <= top:
            return problem

@functools.cache
def algebra_pattern():
    """The grammar as a regular expression, which fits what it can make, and little else."""
    pattern = "P"
    while re.search("[A-Z]", pattern):
        pattern = re.sub("[A-Z]", lambda match: "(?:" + "|".join(
            map(re.escape, GRAMMAR[match[0]])) + ")", pattern)
    return re.compile(re.sub("[a-w]", lambda match: FILLINGS[match[0]], pattern))

KINDS["algebra"] = Kind(draw=draw_algebra, top=5, share=3.6)

def is_outside(problem, config):
    """Is this problem of a kind that was not learned, or one that could not have been drawn?"""
    kind = kind_of(problem)
    n_digits = [len(number) for number in re.findall("[0-9]+", problem)]
    if kind not in config.kinds.split():
        return True
    if kind == "algebra":
        return size_of(problem) > KINDS[kind].top or not algebra_pattern().fullmatch(problem)
    if kind == "expr" and re.fullmatch(rf"{CHAIN}[-+*]{CHAIN}", problem):
        return not is_neat(problem)
    if kind == "expr":
        is_large = not 2 <= size_of(problem) <= KINDS[kind].top or max(n_digits) > 4
        return is_large or not is_neat(problem) or bool(re.search(TOO_LARGE, work_out(problem)))
    too_long = max(n_digits) > KINDS[kind].top
    return too_long or kind == "mul" and sum(n_digits) > 6 or kind == "div" and n_digits[1] > 2

if __name__ == "__main__":
    sys.exit(main())
