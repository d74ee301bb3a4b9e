"""tinyllm: how an LLM works, in one file that you can read from top to bottom.

It trains a small GPT from scratch, on an ordinary CPU, until it does school arithmetic and writes out
its working line by line as a pupil does:

    (12+3)*4-6=15*4-6=60-6=54

The problem ends at the first "=". Everything after it is written by the model, one character at a time:
no calculator stands between the model and its answer. Every step is a true equation, so every line can
be checked exactly - when the training data are made, and again after the model has answered.

    python tinyllm.py train                learn (the README says how long it took, and on what)
    python tinyllm.py eval                 how good is it, on problems that it never saw?
    python tinyllm.py ask "12*34"          ask it something (--latex: to be printed)
    python tinyllm.py look "12+39"         see which characters it looked at while it wrote
    python tinyllm.py serve                the same in a browser
    python tinyllm.py data --kind mul      look at what it learns from
    python tinyllm.py bench                how fast is this machine?

The map of this file, which is also a plan for learning the subject:

    Step 1  PyTorch in five facts           tensors, NumPy, autograd, nn.Module, the optimizer
    Step 2  What an LLM is                  next-token prediction, embedding, attention
    Step 3  The model                       tokenizer, embeddings, attention, MLP, block, TinyLLM
    Step 4  The data                        rewriting rules, letters, the x / y / counted table, the loader
    Step 5  Training                        loss, optimizers, schedule, the loop, monitoring, saving
    Step 6  Evaluation                      held-out problems, greedy decoding, what "right" means
    Step 7  Going further                   LaTeX and MathML, a picture of attention, the page, the commands

Glossary, each short name with an example of its value:

    problem    "345*7"                      what is asked; it never contains "="
    line       "345*7=2100+315=2415"        problem, "=", the steps; the last step is the answer
    node       ("+", 12, ("*", 3, "x"))     a problem as a tree: an int, a letter, or an operator and its operands
    kind       "add", "sub", "mul", "div", "expr", "algebra"     the kinds of problem; each has a size
    ids        [2, 3, 11, 4]                token numbers: "21+3" as the model reads it (see Step 3-1)
    B, T, C    64, 32, 128                  batch (rows), time (tokens in a row), channels (n_embd)
    H, D       6, 32                        attention heads (n_head), channels of one head (head_dim)
    V          21                           size of the vocabulary
    logits     (B, T, V)                    one score for each possible next token
"""

import argparse
import dataclasses
import functools
import html
import http.server
import ipaddress
import itertools
import json
import math
import os
import platform
import random
import re
import secrets
import signal
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
import webbrowser
import zlib
from collections import Counter
from fractions import Fraction

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")   # NumPy is welcome, not needed
import torch                                                              # noqa: E402
import torch.distributed as dist                                          # noqa: E402
import torch.nn as nn                                                     # noqa: E402
import torch.nn.functional as F                                           # noqa: E402
from torch.utils.data import DataLoader, IterableDataset                  # noqa: E402


class InputError(ValueError):
    """Something a person gave us cannot be used. The message is one sentence: what was wrong, what to do."""


######## Step 1: PyTorch in five facts ########################################################################

def five_facts():
    """Everything about PyTorch that the rest of this file needs. The tests run each line.

    Fact 1. A tensor is a block of numbers with a shape and one dtype for all of them.

    >>> torch.empty(2, 3).shape               # memory that is not set yet: only the shape is certain
    torch.Size([2, 3])
    >>> bool((torch.rand(1000) < 1).all())    # uniform in [0, 1)
    True
    >>> torch.zeros(2, dtype=torch.long)      # long, 64-bit integers: the dtype of token ids
    tensor([0, 0])
    >>> torch.tensor([5.5, 3]).dtype          # one float makes all of them float; 32 bits are enough and fast
    torch.float32

    Fact 2. A CPU tensor and a NumPy array can share their memory, so turning one into the other copies nothing.

    >>> try:
    ...     import numpy
    ...     array = torch.ones(2).numpy()
    ...     array += 1                        # changes the tensor too; from_numpy goes the other way
    ...     print(torch.from_numpy(array).tolist())
    ... except ImportError:
    ...     print([2.0, 2.0])                 # NumPy is not installed: skipped; nothing below needs it
    [2.0, 2.0]

    Fact 3. Autograd: PyTorch records what is done to a tensor that requires_grad; backward() walks back through
    the record by the chain rule. By hand: the derivative of w^2 + 3w is 2w + 3, which is 7 at w = 2.

    >>> w = torch.tensor(2.0, requires_grad=True)
    >>> (w ** 2 + 3 * w).backward()
    >>> w.grad
    tensor(7.)

    Fact 4. An nn.Module holds the state that is learned (the weights), so a network inherits from it: whatever
    is assigned to self - a layer, a Parameter - is found by parameters() and state_dict().

    >>> layer = nn.Linear(3, 2, bias=False)   # y = x W^T, with W of shape (2, 3)
    >>> [(name, tuple(p.shape)) for name, p in layer.named_parameters()]
    [('weight', (2, 3))]

    Fact 5. A loss says how wrong the network is; an optimizer moves each weight a little against its gradient.

    >>> optimizer = torch.optim.SGD([w], lr=0.1)
    >>> loss = (w - 5) ** 2                   # 9.0: w is 2 and should be 5
    >>> optimizer.zero_grad(); loss.backward(); optimizer.step()
    >>> bool((w - 5) ** 2 < loss)
    True
    """


######## Step 2: what an LLM is ###############################################################################
#
# A language model does one thing: it looks at the tokens so far and gives a probability to each token that may
# come next. The probability of a text is the product of these:
#
#     P(t1 t2 ... tn) = P(t1) P(t2 | t1) P(t3 | t1 t2) ... P(tn | t1 ... tn-1)
#
# Training makes the texts of the training data probable, by gradient descent on the mean of -ln P(next token).
# Writing is: take the likeliest token, append it, ask again. ChatGPT does this with words; we do it with digits.
#
#     ids    (B, T)      "12+3="  as numbers
#       |
#     embedding          each id becomes a vector of C numbers, the row of a table. The rows are learned: tokens
#       |                that behave alike end up with vectors that are alike.
#     block  x n_layer   attention: a token LOOKS at earlier tokens and takes what it needs from them. Each sends
#       |                  a query ("I write the tens digit: where are the tens?"), each shows a key ("I am a
#       |                  tens digit") and a value ("I am a 7"). Where query and key agree, the value flows.
#       |                MLP: then each token THINKS about what it took, by itself.
#       |                Both ADD their result to the token's vector: x = x + attention(x); x = x + mlp(x).
#     head               C numbers become V scores, the logits; softmax makes them probabilities.
#       |
#     logits (B, T, V)   at every position at once, which is why training is fast
#
# Why it writes its working: a model with n_layer blocks has n_layer moments of thought for each token, no more.
# Whatever takes more thought than that must be written down and read again. `train --no-working` learns the answer
# alone: the README shows what that does to sums, which need one step, and to expressions, which need several.

def untrained_loss(vocab_size):
    """The loss, in nats a token, of a model that knows nothing: it gives each token the probability 1/V.

    >>> logits = torch.zeros(1, 21)                                    # the same score for all 21 tokens
    >>> round(F.cross_entropy(logits, torch.tensor([7])).item(), 3), round(untrained_loss(21), 3)
    (3.045, 3.045)
    """
    return math.log(vocab_size)


def knob(default, help):
    """A field of Config with the sentence that --help shows for it."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Config:
    """Every number that defines a run. Each is a flag of `train`: --n_layer 2, --no-place ... Raises InputError."""
    n_layer: int = knob(4, "blocks, one after the other")
    n_head: int = knob(6, "attention heads of a block")
    head_dim: int = knob(32, "channels of one head")
    n_embd: int = knob(128, "channels C: the length of a token's vector")
    block_size: int = knob(320, "longest line, in tokens")
    n_place: int = knob(64, "places with an embedding of their own: ones, tens, hundreds ...")
    n_slot: int = knob(40, "slots with an embedding of their own: up to the first sign of a step, up to the next ...")
    place: bool = knob(True, "tell the model step, slot and place of each token; --no-place: its column alone")
    gap: int = knob(2, "in training, places are numbered with gaps: the next is 1 to this higher")
    ones_first: bool = knob(True, "write numbers from the ones place")
    working: bool = knob(True, "learn to write the working; --no-working learns problem=answer alone")
    muon: bool = knob(True, "train the blocks' matrices with Muon; --no-muon trains everything with AdamW")
    kinds: str = knob("add sub mul div expr algebra", "kinds of problem to learn")
    steps: int = knob(11000, "optimizer steps")
    batch_tokens: int = knob(2048, "tokens of a batch, about")
    lr: float = knob(0.02, "highest learning rate of Muon")
    adam_lr: float = knob(0.003, "highest learning rate of AdamW")
    weight_decay: float = knob(0.01, "pull of the weights towards zero")
    warmup: int = knob(100, "steps in which the learning rates rise")
    flat: float = knob(0.4, "part of the run after which the learning rates fall, below 1")
    seed: int = knob(0, "chooses the first weights and the training problems")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            number = getattr(self, field.name)
            if field.name not in ("seed", "weight_decay", "flat") and field.type in (int, float) and not number > 0:
                raise InputError(f"--{field.name} {number} must be more than 0")
        if self.head_dim % 8:
            raise InputError(f"--head_dim {self.head_dim} must be a multiple of 8")
        unknown = [kind for kind in self.kinds.split() if kind not in KINDS]
        if unknown or not self.kinds.split():
            raise InputError(f"--kinds '{self.kinds}' must name some of: {' '.join(KINDS)}")
        if not 0 <= self.flat < 1:
            raise InputError(f"--flat {self.flat} must be at least 0 and below 1")


######## Step 3-1: the tokenizer ##############################################################################
#
# One token is one character. Numbers are turned round at this door, and only here: the model reads and writes
# 408 as 8, 0, 4. Carries run from the ones upward, so each digit can be written when all it depends on is known.
# (Lee et al. 2023, "Teaching Arithmetic to Small Transformers", found the same for addition.) Letters turn with
# their number: 48x is read as x, 8, 4, so that each digit is known to count x, and finds the digits it goes with.

VOCAB = "\n0123456789+-*/()=xy^"        # token 0, the newline, ends a line and fills up short rows
ID = {ch: i for i, ch in enumerate(VOCAB)}
TERM = "[0-9xy^]+"                      # what is turned round as one: a number, its letters, their ^2
END, EQUALS, DIGITS = ID["\n"], ID["="], (ID["0"], ID["9"])


def reverse_terms(text):
    """Turn each number round, with the letters behind it. Doing it twice gives the text back.

    >>> reverse_terms("12*34=408"), reverse_terms("48x^2-7x")
    ('21*43=804', '2^x84-x7')
    """
    return re.sub(TERM, lambda match: match[0][::-1], text)


def encode(text, ones_first=True):
    """Text to a list of token ids.

    >>> encode("12+3")
    [3, 2, 11, 4]
    """
    return [ID[ch] for ch in (reverse_terms(text) if ones_first else text)]


def decode(ids, ones_first=True):
    """Token ids to text, the inverse of encode.

    >>> decode(encode("12*34=408"))
    '12*34=408'
    """
    text = "".join(VOCAB[i] for i in ids)
    return reverse_terms(text) if ones_first else text


######## Step 3-2: embeddings #################################################################################
#
# A token's first vector says what it is (token embedding) and where in the text that is. A plain LLM numbers its tokens
# 1, 2, 3. But a character of a calculation has an ADDRESS, like a cell of a spreadsheet:
#   step    how many "=" stand before it;
#   slot    how many signs and letters stand before it in its step. A number and the sign that ends it fill one slot;
#   place   which character of its slot it is: the ones have place 1, the tens place 2 (the idea of the abacus
#           embedding, McLeish et al. 2024, "Transformers Can Do Arithmetic with the Right Embeddings").
# An address is counted from the tokens to the left alone. So nothing about the future leaks in, and the address of the
# token that is to be written next is known before it is written.

def positions(ids):
    """The address of each token and of the one to come: ids (B, T) -> step, slot, place, each (B, T + 1) long.

    >>> step, slot, place = positions(torch.tensor([encode("12+345=35")]))
    >>> for name, numbers in ("step", step), ("slot", slot), ("place", place): print(f"{name:5}", *numbers[0].tolist())
    step  0 0 0 0 0 0 0 1 1 1
    slot  0 0 0 1 1 1 1 0 0 0
    place 1 2 3 1 2 3 4 1 2 3
    """
    is_sign, is_equals = (ids < DIGITS[0]) | (ids > DIGITS[1]), ids == EQUALS         # (B, T)
    column = torch.arange(ids.shape[1] + 1, device=ids.device)                        # (T + 1,)
    last_sign = torch.where(is_sign, column[:-1], -1).cummax(1).values                # (B, T) its column, -1 for none
    n_signs = is_sign.cumsum(1)
    slot = n_signs - torch.where(is_equals, n_signs, 0).cummax(1).values              # signs since the last "="
    return F.pad(is_equals.cumsum(1), (1, 0)), F.pad(slot, (1, 0)), column - F.pad(last_sign, (1, 0), value=-1)


def with_gaps(place, gap):
    """Number the places of each row anew, each 1 to `gap` above the one before: (B, T) long -> (B, T) long.

    A model that has only seen numbers of ten digits learns that they end at the tenth place, and fails at the eleventh.
    Numbered 1, 2, 3 or 1, 3, 4 or 1, 3, 5, differently for each row, a place says nothing but "the same" and "higher",
    which is all that adding needs, and which is as true of numbers that are longer. (Random positions: Ruoss et al. 2023,
    "Randomized Positional Encodings Boost Length Generalization of Transformers".) A row draws its own largest gap
    first, so that many rows are numbered as they will be when the model is used: without gaps.

    >>> with_gaps(torch.tensor([[1, 2, 3, 1, 2, 3, 4]]), gap=1).tolist()
    [[1, 2, 3, 1, 2, 3, 4]]
    """
    largest = torch.randint(1, gap + 1, (len(place), 1), device=place.device)         # (B, 1)
    skipped = (torch.rand(place.shape, device=place.device) * largest).long()         # (B, T) 0 to largest - 1
    skipped[:, 0] = 0                                                                 # nothing before the ones
    return place + skipped.cumsum(1).gather(1, place - 1)


# Distance comes from RoPE (Su et al. 2021, "RoFormer"): query and key are cut into pairs of channels, each pair is
# read as one complex number and turned by an angle proportional to where its token stands. A dot product then depends
# on the DIFFERENCE of two positions only. We turn some pairs by the step, some by the slot and the rest by the place,
# as image models do with x and y: so "the same place, one slot to the left" or "the same slot, one step before" is
# learned once, for all places and slots. A key is turned by the address of its own token, a query by the address of
# the token to be written: asking for the digit of the same place means asking at a distance of 0.

def rotations(where, n_pairs, base):
    """The turns of RoPE: where (..., T) long -> complex (..., T, n_pairs), e^(i * where * speed).

    Each pair has a speed of its own, from 2 (neighbours are far apart) down to about 2 / base (far ones are near).
    """
    speed = 2 * base ** (-torch.arange(n_pairs, device=where.device) / n_pairs)       # (n_pairs,)
    angle = where[..., None] * speed                                                  # (..., T, n_pairs)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x, turns):
    """Turn x (..., T, D) by turns (..., T, D/2): pairs of channels as complex numbers, one multiplication."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))                   # (..., T, D/2)
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)                   # (..., T, D)


######## Step 3-3: attention, MLP, block ######################################################################

def attention(q, k, v):
    """Causal attention written out: q (B, H, T, D), k and v (B, H, S, D) -> y (B, H, T, D), weights (B, H, T, S).

    (Vaswani et al. 2017, "Attention Is All You Need".) The T queries are the last T of the S columns. PyTorch has
    the same in one call, F.scaled_dot_product_attention, and a test compares both. What is read here is what runs. With
    our short lines it is the faster one in bfloat16 (45,000 tokens a second against 27,000: a loop over ready batches,
    4 heads, Zen 5) and the slower one in float32 (13 ms against 6 for 64 lines of 32 tokens, forward and backward, Zen 3;
    torch 2.13.0, the machines in the README).
    """
    T, S = q.shape[-2], k.shape[-2]
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)                       # (B, H, T, S) agreement
    future = torch.full((T, S), float("-inf"), device=q.device).triu(S - T + 1)       # 0, right of the diagonal -inf
    weights = scores.add_(future).softmax(-1)                                         # e^-inf = 0; each row sums to 1
    return weights @ v, weights                                                       # (B, H, T, D) mix of values


class CausalSelfAttention(nn.Module):
    """Tokens look at earlier tokens: x (B, T, C) -> (B, T, C).

    cache is None in training. In decoding it is a list that keeps keys and values of earlier columns, so that
    each is computed once: empty at first, then [k, v], each (B, H, S, D).

    The heads need not share C between them: six of 32 channels look at more places at once than four, and an MLP of 3 C
    instead of 4 C leaves them the weights.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head, self.head_dim = config.n_head, config.head_dim
        heads = config.n_head * config.head_dim
        self.qkv = nn.Linear(config.n_embd, 3 * heads, bias=False)                    # query, key, value in one
        self.out = nn.Linear(heads, config.n_embd, bias=False)
        self.gain = nn.Parameter(torch.full((config.n_head, 1, 1), 2.0))
        nn.init.zeros_(self.out.weight)       # a new block adds nothing at first, so that gradients pass freely

    def forward(self, x, turns, cache=None):
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, self.head_dim).transpose(1, 3)   # (B, H, 3, T, D)
        # QK-norm (Henry et al. 2020): queries and keys of fixed length, so that no score can run away; how sharply
        # a head may look is one learned number, its gain
        qk, v = qkv.split((2, 1), dim=2)
        q, k = rotate(F.layer_norm(qk, (self.head_dim,)), turns).unbind(2)            # each (B, H, T, D)
        q, v = q * self.gain, v.squeeze(2)
        if cache is not None:
            if cache:
                k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)      # (B, H, S, D)
            cache[:] = [k, v]
        y, weights = attention(q, k, v)                                               # (B, H, T, D)
        self.weights = weights.detach()                                               # what it looked at, for `look`
        return self.out(y.transpose(1, 2).reshape(B, T, -1))                          # heads side by side again


class MLP(nn.Module):
    """Each token thinks by itself: x (B, T, C) -> (B, T, C), through a hidden layer three times as wide."""

    def __init__(self, config):
        super().__init__()
        self.hidden = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(3 * config.n_embd, config.n_embd, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        return self.out(F.relu(self.hidden(x)))                                       # (B, T, 3C) in between


class Block(nn.Module):
    """Look, then think: x (B, T, C) -> (B, T, C).

    Pre-norm: the norm stands before each part, not after the sum as in the figure of the 2017 paper, so that the
    sums form an unbroken path from the embedding to the head (Xiong et al. 2020).
    """

    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attention, self.mlp = CausalSelfAttention(config), MLP(config)

    def forward(self, x, turns, cache=None):
        x = x + self.attention(self.norm1(x), turns, cache)
        return x + self.mlp(self.norm2(x))


######## Step 3-4: the model ##################################################################################

class TinyLLM(nn.Module):
    """A decoder-only Transformer: ids (B, T) -> logits (B, T, V).

    >>> model = TinyLLM(Config(n_layer=2))
    >>> model(torch.tensor([encode("12+3=15")])).shape           # 7 tokens, 21 scores for what follows each
    torch.Size([1, 7, 21])
    >>> sum(p.numel() for p in TinyLLM(Config()).parameters())
    807448
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(len(VOCAB), config.n_embd)
        self.place = nn.Embedding(config.n_place, config.n_embd)
        self.slot = nn.Embedding(config.n_slot, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, len(VOCAB), bias=False)
        for layer in (self.token, self.place, self.slot, self.head):
            nn.init.normal_(layer.weight, std=0.02)              # small: all logits start near 0, the loss near ln V

    def forward(self, ids, cache=None):
        """ids (B, T) -> logits (B, T, V). With a cache (one list per block), only of the columns not in it yet.

        In training mode (model.train(), as it is when new), places have random gaps; model.eval() leaves them out.
        """
        start = cache[0][0].shape[2] if cache and cache[0] else 0
        n_pairs = self.config.head_dim // 2
        x = self.token(ids[:, start:])                                                # (B, T, C)
        if self.config.place:
            step, slot, place = (where[:, start:] for where in positions(ids))        # (B, T + 1) each
            if self.training:
                place = with_gaps(place, self.config.gap)
            x = x + self.place(place[:, 1:].clamp(max=self.config.n_place - 1))       # where the next token goes
            x = x + self.slot(slot[:, 1:].clamp(max=self.config.n_slot - 1))
            n = 3 * n_pairs // 8                                                      # of 16 pairs 4, 6 and 6
            turns = torch.cat((rotations(place, n_pairs - 2 * n, 16), rotations(slot, n, 16),
                               rotations(step, n, 16)), -1)                           # (B, T + 1, D/2)
        else:
            column = torch.arange(start, ids.shape[1] + 1, device=ids.device)         # (T + 1,)
            turns = rotations(column, n_pairs, 1000)[None]                            # (1, T + 1, D/2)
        turns = torch.stack((turns[:, 1:], turns[:, :-1]), 1)[:, None]                # (B, 1, 2, T, D/2) of q, of k
        for i, block in enumerate(self.blocks):
            x = block(x, turns, None if cache is None else cache[i])                  # (B, T, C)
        return self.head(self.norm(x))                                                # (B, T, V)


######## Step 4-1: making the data ############################################################################
#
# We need endless problems with their working. The machine that makes them is one idea: a problem is a tree, and
# a step REWRITES it. Every operation whose operands are plain numbers is rewritten at once; what is left when
# nothing changes any more is the answer. A new kind of problem needs one more rule, and nothing else.

MAX_DEPTH, MAX_LENGTH = 40, 400                      # brackets within brackets, characters: bounds for any input
LOOKALIKES = str.maketrans({"\u00d7": "*", "\u22c5": "*", "\u00f7": "/", "\u2215": "/", "\u2212": "-", "\u00b2": "^2"})


def normalize(text):
    """What people type, as the characters of VOCAB. Raises InputError that names the first unknown character.

    >>> normalize(" 12 \\u00d7 (3 + 007) = ")
    '12*(3+7)'
    """
    if re.search(r"[0-9]\s+[0-9]", text):
        raise InputError("there is a space inside a number; write the number without it")
    clean = ""
    for ch in text:
        plain = unicodedata.normalize("NFKC", LOOKALIKES.get(ord(ch), ch)).translate(LOOKALIKES)
        if plain.isspace():                          # also the ideographic one
            continue
        if not all(c in ID for c in plain) or (plain.isdigit() and unicodedata.category(ch) == "No"):    # a raised 3
            raise InputError(f"unknown character {describe(ch)}; write digits, + - * / ^2, brackets, the letters x and y")
        clean += plain
    clean = clean[:-1] if clean.endswith("=") else clean
    if not clean:
        raise InputError("the problem is empty; write something like 12*34")
    if "=" in clean:
        raise InputError("a problem has no '=' inside; write only what stands before it")
    return re.sub("(?<![0-9])0+(?=[0-9])", "", clean)                                 # 007 is 7


def describe(ch):
    """A character's name in ASCII, for messages on any console."""
    return f"'{ch}'" if ch.isascii() and ch.isprintable() else f"U+{ord(ch):04X} {unicodedata.name(ch, '')}".strip()


@functools.lru_cache(maxsize=8)                       # who draws or checks a line asks for its steps more than once
def parse(text, brackets=False):
    """Text to tree: school precedence, left to right. Raises InputError that says where it breaks off.

    >>> parse("1+2*3-4")
    ('-', ('+', 1, ('*', 2, 3)), 4)
    >>> parse("-(1+2)/3")
    ('/', ('neg', ('+', 1, 2)), 3)
    >>> parse("(x+1)*2", brackets=True)              # brackets as nodes of their own, for typesetting
    ('*', ('()', ('+', 'x', 1)), 2)
    """
    if len(text) > MAX_LENGTH:
        raise InputError(f"the problem has {len(text)} characters, {MAX_LENGTH} at most can be read; write less")
    tokens, at = re.findall("[0-9]+|.", text), 0
    letters = "x" in text or "y" in text

    def peek():
        return tokens[at] if at < len(tokens) else ""

    def take():
        nonlocal at
        at += 1
        return tokens[at - 1]

    def fail(wanted):
        place = f"at {describe(peek()[0])}, character {len(''.join(tokens[:at])) + 1}" if peek() else "at the end"
        raise InputError(f"{wanted} {place} of {text[:40]}")

    def number(depth):                               # a number, a letter, or something in brackets
        if peek().isdigit():
            return int(take())
        if peek() in ("x", "y"):
            return power(take())
        if peek() != "(":
            fail("a number or an opening bracket is missing")
        if depth == MAX_DEPTH:
            raise InputError(f"brackets are nested deeper than {MAX_DEPTH}; write the problem in several parts")
        take()
        node = terms(depth + 1)
        if peek() != ")":
            fail("a closing bracket is missing")
        take()
        return power(("()", node) if brackets else node)

    def power(base):
        if peek() != "^":
            return base
        take()
        if peek() != "2" or not letters:
            raise InputError("only letters and brackets with letters can be squared; write a product instead")
        take()
        return ("^", base, 2)

    def factors(node, depth):                        # numbers joined by * and /, or simply side by side as in 3x
        while peek() and peek() in "*/(xy":
            if peek() in "*/":
                op = take()
            elif (op := "*") and isinstance(node, tuple) and node[0] == "/":
                raise InputError(f"{text[:40]} can be read in two ways; write a * or brackets after the division")
            node = (op, node, number(depth))
        return node

    def terms(depth):                                # a sign, perhaps; then factors joined by + and -
        if peek() == "-":
            take()
            node = number(depth)
            node = factors(-node if isinstance(node, int) else ("neg", node), depth)
        else:
            node = factors(number(depth), depth)
        while peek() and peek() in "+-":
            node = (take(), node, factors(number(depth), depth))
        return node

    node = terms(0)
    if peek():
        fail("an operator is missing" if peek() != ")" else "an opening bracket is missing for the one")
    if letters and degree(node) > 2:
        raise InputError(f"{text[:40]} multiplies more than two letters; only products up to x^2, xy and y^2 are known")
    return node


def degree(node):
    """How many letters are multiplied with one another: 0 for a number, 2 for xy. Raises InputError for a division."""
    if not isinstance(node, tuple):
        return int(isinstance(node, str))
    if node[0] == "^":
        return 2 * degree(node[1])
    degrees = [degree(child) for child in node[1:]]
    if node[0] == "/" and max(degrees) > 0:
        raise InputError("letters cannot be divided here; write the problem without the division")
    return sum(degrees) if node[0] == "*" else max(degrees)


STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2, "factors": 2, "fraction": 2, "^": 3}      # the stronger operator binds first


def to_text(node, first=True, spare=lambda: False):
    """Tree to text, the inverse of parse, with no brackets but those that are needed.

    first: node is the first thing written after "(" or "=", where -3 needs no brackets.
    spare: asked at every operation whether to put brackets that are not needed, as people do.

    >>> to_text(("-", ("*", -3, ("+", 1, 2)), ("neg", ("/", 8, 4))))
    '-3*(1+2)-(-(8/4))'
    """
    if isinstance(node, str):
        return node
    if isinstance(node, int):
        return str(node) if first or node >= 0 else f"({node})"
    if node[0] in ("factors", "fraction"):           # 2*2*3/(3*7), 4/7: see divide
        _, sign, above, below = node
        text = ("-" if sign < 0 else "") + "*".join(map(str, above or [1])) + "/"
        text += str(below[0]) if len(below) == 1 else f"({'*'.join(map(str, below))})"
        return text if first or sign > 0 else f"({text})"
    op, left, right = (*node, None)[:3]

    def side(child, first, weakest):
        if not isinstance(child, tuple) or child[0] == "neg" or (STRENGTH[child[0]] >= weakest and not spare()):
            return to_text(child, first, spare)
        return f"({to_text(child, True, spare)})"

    if op == "neg":
        text = "-" + (side(left, True, 3) if isinstance(left, str) or left[0] == "^" else f"({to_text(left)})")
        return text if first else f"({text})"
    if op == "^":
        return side(left, False, 4) + "^2"
    if op == "*" and degree(node):                   # 3x and 2(x+1), the number first
        if isinstance(right, int):
            left, right = right, left
        return side(left, first, 2) + side(right, False, 3)
    return side(left, first, STRENGTH[op]) + op + side(right, False, STRENGTH[op] + 1)


def split_places(n):
    """345 -> [300, 40, 5]: the number by place value, without zeros."""
    return [int(digit) * 10 ** i for i, digit in enumerate(reversed(str(n))) if digit != "0"][::-1]


def multiply(a, b):
    """One digit, with zeros behind or not, times two is one step; anything larger is split by place value.

    >>> [to_text(multiply(*factors)) for factors in ((45, 20), (345, 20), (345, 27), (27, 345), (-345, 27), (345, 10))]
    ['900', '6000+900', '345*20+345*7', '20*345+7*345', '-(345*20+345*7)', '3450']
    """
    if a < 0 or b < 0:
        product = multiply(abs(a), abs(b))
        return product if (a < 0) == (b < 0) else -product if isinstance(product, int) else ("neg", product)
    parts_a, parts_b = split_places(a), split_places(b)
    few, many = sorted((parts_a, parts_b), key=len)
    if not few or len(few) == 1 and (len(many) <= 2 or str(few[0])[0] == "1"):
        return a * b                                 # 45*20; 345*10, which only adds a zero; 345*0
    if len(few) == 1:                                # 345*7 = 300*7 + 45*7
        return ("+", many[0] * few[0], multiply(sum(many[1:]), few[0]))
    if len(parts_a) < len(parts_b):
        products = [("*", part, b) for part in parts_a]
    else:
        products = [("*", a, part) for part in parts_b]
    return functools.reduce(lambda total, product: ("+", total, product), products)


def prime_factors(n):
    """84 -> [2, 2, 3, 7], 1 -> []."""
    factors, p = [], 2
    while n > 1:
        if n % p:
            p += 1
        else:
            factors.append(p)
            n //= p
    return factors


def cancel(sign, above, below):
    """Cancel what two lists of primes have in common; multiply out where nothing is, or little is left.

    >>> [to_text(cancel(1, *lists)) for lists in (([2, 7], [23]), ([2, 2, 3], [2, 3, 3]), ([2, 2, 2, 3], [2, 3, 3]))]
    ['14/23', '2/3', '2*2/3']
    """
    common = Counter(above) & Counter(below)
    above, below = (sorted((Counter(side) - common).elements()) for side in (above, below))
    if common and (len(above) > 1 or len(below) > 1):
        return ("factors", sign, above, below)
    return ("fraction", sign, [math.prod(above)], [math.prod(below)])


def divide(a, b):
    """Take off a multiple of the divisor, "digit x power of ten"; a proper fraction is taken apart into primes.

    >>> [to_text(divide(*pair)) for pair in ((56, 7), (534, 7), (1831, 23), (23, 23), (12, 18), (3, 7))]
    ['8', '70+(534-490)/7', '70+(1831-1610)/23', '1', '2*2*3/(2*3*3)', '3/7']
    """
    if b < 0:
        return ("/", -a, -b)
    sign, a = (-1, -a) if a < 0 else (1, a)
    if a == 0:
        return 0
    if a < b:
        above, below = prime_factors(a), prime_factors(b)
        return ("factors", sign, above, below) if len(above) > 1 or len(below) > 1 else ("fraction", sign, [a], [b])
    if a == b or b == 1:
        return sign * a // b
    # From 20 on nobody knows the tables. A pupil rounds up, 23 to 25, and takes a digit that is sure to fit.
    unit = 1 if b < 20 else 5 if b < 50 else 10
    digits = str(max(1, a // (-(-b // unit) * unit)))
    taken = int(digits[0]) * 10 ** (len(digits) - 1)
    if b < 10 and a == taken * b:
        return sign * taken
    return ("+" if sign > 0 else "-", sign * taken, ("/", ("-", a, taken * b), b))


RULES = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": multiply, "/": divide, "neg": lambda a: -a}


def rewrite(node):
    """One step of working: each operation on plain numbers is rewritten, all of them at once.

    >>> node = parse("(12+3)*4-6-15/18")
    >>> while rewrite(node) != node: node = rewrite(node); print(to_text(node))
    15*4-6-3*5/(2*3*3)
    60-6-5/(2*3)
    54-5/6
    """
    match node:
        case int() | ("fraction", *_):
            return node
        case ("factors", sign, above, below):
            return cancel(sign, above, below)
    op, *old = node
    if all(isinstance(child, int) for child in old):
        return RULES[op](*old)
    new = [rewrite(child) for child in old]
    if op == "neg":
        return -new[0] if isinstance(new[0], int) else (op, new[0])
    match old[1], new[1]:
        case ("*" | "/", _, _), ("+", a, b) if op in "+-" and not (isinstance(a, int) and isinstance(b, int)):
            return (op, (op, new[0], a), b)          # 70+221/23 -> 70+9+(221-207)/23, without brackets
    return (op, *new)


# With letters, a step is one of three, for the whole line at once: multiply out, sort, add what is alike. All of them
# work on a list of terms: 3x-2 is [(3, "x"), (-2, "")].

MONOMIALS = ("xx", "xy", "yy", "x", "y", "")         # in the order in which an answer has them


def write_out(node):
    """Multiply out every bracket: a tree with letters -> its terms, in the order in which they come.

    >>> write_out(parse("3(2x-1)-2(x+4)"))
    [(6, 'x'), (-3, ''), (-2, 'x'), (-8, '')]
    """
    if isinstance(node, int):
        return [(node, "")]
    if isinstance(node, str):
        return [(1, node)]
    op, left, right = (*node, None)[:3]
    if op == "neg":
        return [(-n, letters) for n, letters in write_out(left)]
    if op in "+-":
        return write_out(left) + write_out(right if op == "+" else ("neg", right))
    right = left if op == "^" else right
    return [(a * b, "".join(sorted(m + n))) for a, m in write_out(left) for b, n in write_out(right)]


def join(terms):
    """Terms to text.

    >>> join([(1, "xx"), (-1, "x"), (-6, "")]), join([])
    ('x^2-x-6', '0')
    """
    text = "".join(f"{n:+d}{letters}" for n, letters in terms).replace("xx", "x^2").replace("yy", "y^2")
    return re.sub("(?<=[+-])1(?=[xy])", "", text).removeprefix("+") or "0"


def rewrite_letters(node):
    """One step of working with letters: the first of the three that changes anything.

    >>> node = parse("3(2x-1)-2(x+4)")
    >>> while rewrite_letters(node) != node: node = rewrite_letters(node); print(to_text(node))
    6x-3-2x-8
    6x-2x-3-8
    4x-11
    """
    terms = write_out(node)
    in_order = sorted(terms, key=lambda term: MONOMIALS.index(term[1]))
    added = []                                       # of terms that are alike, the first two: 5x-5x+2x is 0x+2x
    for letters, alike in itertools.groupby(in_order, lambda term: term[1]):
        numbers = [n for n, _ in alike]              # a 0x that is left alone is dropped
        added += [(n, letters) for n in (sum(numbers[:2]), *numbers[2:]) if n or len(numbers) > 1]
    for step in (terms, in_order, added):
        if (new := parse(join(step))) != node:
            return new
    return node


@functools.lru_cache(maxsize=8)                       # who draws a problem asks for its line more than once
def solve_by_rules(problem, working=True):
    """The line that the model should write for a problem. This makes training data; no answer passes through it.

    >>> for p in ("345*27", "162/7", "36/84", "(36/9)-31", "(x+2)(x-3)"): print(solve_by_rules(p))
    345*27=345*20+345*7=6000+900+(2100+315)=6900+2415=9315
    162/7=20+(162-140)/7=20+22/7=20+3+(22-21)/7=23+1/7
    36/84=2*2*3*3/(2*2*3*7)=3/7
    (36/9)-31=4-31=-27
    (x+2)(x-3)=x^2-3x+2x-6=x^2-x-6
    """
    rule = rewrite_letters if "x" in problem or "y" in problem else rewrite
    steps = [rule(parse(problem))]
    while (node := rule(steps[-1])) != steps[-1]:
        steps.append(node)
    texts = [text for text, _ in itertools.groupby(map(to_text, steps))]              # 1/2 is the same when done
    return "=".join([problem, *(texts if working else texts[-1:])])


def value(node, x=0, y=0):
    """The exact value of a tree for an x and a y, a Fraction. Raises InputError for a division by zero."""
    if not isinstance(node, tuple):
        return Fraction({"x": x, "y": y}.get(node, node))
    op, *children = node
    numbers = [value(child, x, y) for child in children]
    if op == "/":
        if numbers[1] == 0:
            raise InputError("a division by zero has no answer; change the divisor")
        return numbers[0] / numbers[1]
    if op == "^":
        return numbers[0] ** 2
    return RULES[op](*numbers) if op != "*" else numbers[0] * numbers[1]


def test_points(line):
    """The (x, y) at which the steps of a line are compared.

    Nine points prove it for all x and y: two steps differ by a polynomial of degree 2 or less in each letter, and one
    that is 0 for three values of x and three of y is 0 everywhere.
    """
    return [(x, y) for x in range(3) for y in range(3)] if "x" in line or "y" in line else [(0, 0)]


def is_true(line):
    """Is every step of a line equal to the problem? Exact, by Fraction; what cannot be read is not true.

    >>> is_true("10/4=2+2/4=2+1/2"), is_true("10/4=2+2/4=3"), is_true("10/4=2+"), is_true("2(x+1)-2x=2x+2-2x=2")
    (True, False, False, True)
    """
    try:
        steps = [parse(step) for step in line.split("=")]
        return len(steps) > 1 and all(len({value(step, x, y) for step in steps}) == 1 for x, y in test_points(line))
    except InputError:
        return False


def is_simple(text):
    """Is this an answer: a number, a proper fraction or mixed number in lowest terms, or a sum of unlike terms?

    >>> [is_simple(text) for text in ("-17", "3+1/2", "-2/3", "3+2/4", "5/2", "1+2", "")]
    [True, True, True, False, False, False, False]
    >>> [is_simple(text) for text in ("x^2-x-6", "10x-5y-4", "-y", "3-x", "1x", "x+0", "2x+3x")]
    [True, True, True, False, False, False, False]
    """
    match = re.fullmatch("(?:-?[0-9]+|(?:-?[0-9]+[-+]|-?)([0-9]+)/([0-9]+))", text)
    if match:
        above, below = int(match[1] or 1), int(match[2] or 2)
        return 0 < above < below and math.gcd(above, below) == 1
    many = "[2-9]|[1-9][0-9]+"                       # a factor before letters: 0 and 1 are not written
    terms = "".join(f"([-+]({many})?{letters})?" for letters in (r"x\^2", "xy", r"y\^2", "x", "y")) + "([-+][1-9][0-9]*)?"
    return text[:1] not in ("", "+") and bool(re.fullmatch(terms, text if text[0] == "-" else "+" + text))


# Held out by construction. A problem is never trained on if a number computed from its text says so: the same on
# every machine, for every seed, for any amount of data. Twins share their fate: 12+39 and 39+12 are one problem.

def canonical(node):
    """One text for all problems that differ only in the order of terms or factors.

    >>> canonical(parse("12+39*2")) == canonical(parse("2*39+12")), canonical(parse("-3x+5")) == canonical(parse("5-3x"))
    (True, True)
    """
    def signed(node):                                # (sign, text without it): all minus signs move to the front
        if not isinstance(node, tuple):
            return (-1, str(-node)) if isinstance(node, int) and node < 0 else (1, str(node))
        op, left, right = (*node, None)[:3]
        if op == "/":
            (a, above), (b, below) = signed(left), signed(right)
            return a * b, f"{above}/{below}"
        parts = []

        def collect(node, sign, ops):                # flatten a chain of + and -, or of *
            if not isinstance(node, tuple) or node[0] not in ops:
                part = signed(node)
                parts.append((part[1], sign * part[0]))
            elif node[0] == "neg":
                collect(node[1], -sign, ops)
            else:
                collect(node[1], sign, ops)
                collect(node[1] if node[0] == "^" else node[2], -sign if node[0] == "-" else sign, ops)

        if op in ("*", "^"):
            collect(node, 1, ("*", "^"))
            return math.prod(sign for _, sign in parts), f"({'*'.join(text for text, _ in sorted(parts))})"
        collect(node, 1, ("+", "-", "neg"))
        parts.sort()
        sign = parts[0][1]
        return sign, "(" + "".join("-+"[s == sign] + text for text, s in parts) + ")"

    sign, text = signed(node)
    return ("-" if sign < 0 else "") + text


def is_held_out(problem):
    """Is this problem (text) kept for evaluation? One in ten is. Raises InputError if it cannot be read.

    >>> is_held_out("12+39"), is_held_out("39+12"), is_held_out("12+42"), is_held_out("42+12")
    (False, False, True, True)
    """
    return zlib.crc32(canonical(parse(problem)).encode("ascii")) % 10 == 0


# The kinds of problem. Each has a function draw(rng, top, practice) -> text, which draws a problem no larger than
# `top`, and a size: digits of the longest number, or operators. Lengths are drawn evenly, not values: nearly all
# numbers below 10^10 have ten digits, and who has never seen short ones cannot do them. practice: a pupil practises
# what is hard, so the problems to train on have more of it than those of the test; anything in one is in the other.

def number(rng, n_digits):
    """A number of n digits (one digit: 0 to 9)."""
    return rng.randrange(10 ** (n_digits - 1) if n_digits > 1 else 0, 10 ** n_digits)


def draw_count(rng, top, practice):
    """How many operators or terms, 2 to top: evenly, for practice the larger of two draws."""
    return max(rng.randint(2, top) for _ in range(1 + practice))


def draw_sum(op):
    """Sums or differences; some are made hard on purpose: equal lengths, equal beginnings, long carries."""
    def draw(rng, top, practice):
        a, b = number(rng, rng.randint(1, top)), number(rng, rng.randint(1, top))
        dice, digits = rng.random(), str(a)
        keep = rng.randrange(len(digits))
        if dice < 0.3:
            b = number(rng, len(digits))
        if dice < (0.5 if practice else 0.1):        # 48213-48179: which is larger?
            b = int(digits[:keep] + str(number(rng, len(digits) - keep)).zfill(len(digits) - keep))
        elif dice > 0.9:                             # 48213+51786: one more, and every place carries
            b = int("".join(str(9 - int(d)) for d in digits[keep:])) + rng.randint(0, 1)
        return f"{'-' if rng.random() < (0.15 if practice else 0.05) else ''}{a}{op}{b}"
    return draw


def draw_product(rng, top, practice):
    return f"{number(rng, rng.randint(1, top))}*{number(rng, rng.randint(1, top))}"


def draw_quotient(rng, top, practice):
    """Three in ten (practice: four) are proper fractions; half of the others (practice: a third) come out even."""
    a, b = number(rng, rng.randint(1, top)), max(1, number(rng, rng.randint(1, 2)))
    if rng.random() < (0.4 if practice else 0.3):    # short, so they cost little: half of them can be cancelled
        common = rng.choice((1, rng.randint(2, 24)))
        b = common * rng.randint(2, max(2, 99 // common))
        return f"{rng.randrange(common, b, common)}/{b}" if b > common else "1/2"
    if rng.random() < (0.35 if practice else 0.5):
        a = max(1, a // b) * b
    return f"{a}/{b}"


def draw_expression(rng, top, practice):
    """2 operators or more, all four operations; every value within four digits, divisions even."""
    def tree(n):                                     # n operators -> (node, its value)
        if n == 0:
            leaf = number(rng, rng.choices((1, 2, 3, 4), (48, 39, 11, 2))[0]) * (-1 if rng.random() < 0.04 else 1)
            return leaf, leaf
        while True:
            op, n_left = rng.choice("+-*/"), rng.randrange(n)
            (left, a), (right, b) = tree(n_left), tree(n - 1 - n_left)
            if op == "/":
                if isinstance(left, int):            # choose the dividend to suit the divisor
                    left = a = b * number(rng, rng.choice((1, 1, 2)))
                elif isinstance(right, int):         # or the divisor to suit the dividend
                    right = b = rng.choice([d for d in range(1, 100) if a % d == 0])
                if not 0 < abs(b) < 100 or a % b:
                    continue
            result = a // b if op == "/" else RULES[op](a, b) if op != "*" else a * b
            if abs(result) <= 9999 and abs(a) <= 9999:
                break
        if rng.random() < 0.03:
            return ("neg", (op, left, right)), -result
        return (op, left, right), result

    while True:
        problem = to_text(tree(draw_count(rng, top, practice))[0], spare=lambda: rng.random() < 0.06)
        if len(solve_by_rules(problem)) <= 128:      # no longer than a line in a notebook
            return problem


def draw_algebra(rng, top, practice):
    """Like terms, brackets to multiply out, products of two brackets; `top` signs between terms at most."""
    def term(letters, largest=9):
        return rng.choice((-1, 1)) * rng.randint(1, largest), letters

    def bracket():                                   # (2x-1), (x+y), (5-3x)
        pair = rng.choice((("x", ""), ("x", ""), ("y", ""), ("x", "y"), ("", "x"), ("y", "x")))
        (n, first), second = map(term, pair)
        return f"({join([(n if rng.random() < (0.2 if practice else 0.1) else abs(n), first), second])})"

    def like_terms():                                # 8x+3-5y+2x-7
        mixtures = [("x", ""), ("x", "y"), ("x", "y", ""), ("xx", "x", "")] + [MONOMIALS] * (3 if practice else 1)
        letters, largest = rng.choice(mixtures), (9, 99) if practice else (9, 9, 99)
        terms = [term(rng.choice(letters), rng.choice(largest)) for _ in range(draw_count(rng, top + 1, practice))]
        for i in range(1, len(terms)):
            if rng.random() < 0.08:                  # cancels an earlier one
                n, letters = rng.choice(terms[:i])
                terms[i] = -n, letters
        return join(terms)

    def brackets():                                  # 3(2x-1)-2(x+4)-(x-2)+7
        count, factors = rng.randint(1, 3), ["", *"23456789"] + ["", ""] * practice      # practice: more without a factor
        parts = [rng.choice("++-") + rng.choice(factors) + bracket() for _ in range(count)]
        if count < 3 and rng.random() < 0.3:
            n, letters = term(rng.choice(("x", "y", "")))
            parts.insert(rng.randint(0, count), "-+"[n > 0] + join([(abs(n), letters)]))
        return "".join(parts).removeprefix("+")

    def product():                                   # (x+2)(x-3), (2x-1)^2
        return bracket() + ("^2" if rng.random() < 0.3 else bracket())

    while True:
        problem = rng.choices((like_terms, brackets, product), (10, 6, 4) if practice else (4, 4, 3))[0]()
        kind, size = kind_and_size(problem)
        if kind == "algebra" and size <= top:
            return problem


@dataclasses.dataclass
class Kind:
    draw: object        # draw(rng, top, practice) -> problem
    sizes: range        # sizes that are trained on; top is the last one
    share: float        # how often it is drawn


KINDS = {
    "add": Kind(draw_sum("+"), range(1, 11), 0.5),
    "sub": Kind(draw_sum("-"), range(1, 11), 1.6),
    "mul": Kind(draw_product, range(1, 4), 0.9),
    "div": Kind(draw_quotient, range(1, 6), 1.8),
    "expr": Kind(draw_expression, range(2, 5), 2.0),
    "algebra": Kind(draw_algebra, range(1, 6), 2.8),
}


def kind_and_size(problem):
    """The kind of a problem, and its size: digits of the longest number, or how many operators are written.

    >>> kind_and_size("123*45"), kind_and_size("1+2*3"), kind_and_size("-7"), kind_and_size("2x+3x-1")
    (('mul', 3), ('expr', 2), ('expr', 0), ('algebra', 2))
    """
    ops = re.findall("(?<=[0-9)xy])[-+*/]", problem)
    if "x" in problem or "y" in problem:
        return "algebra", len(ops)
    if len(ops) == 1 and re.fullmatch("-?[0-9]+[-+*/][0-9]+", problem):
        return {"+": "add", "-": "sub", "*": "mul", "/": "div"}[ops[0]], max(map(len, re.findall("[0-9]+", problem)))
    return "expr", len(ops)


def draw_problem(kind, rng, held_out, top=None):
    """Draw a problem of a kind, no larger than top (None: as large as they come), from one side of the split."""
    while True:
        problem = KINDS[kind].draw(rng, top or KINDS[kind].sizes[-1], not held_out)
        if is_held_out(problem) == held_out:
            return problem


######## Step 4-2: from a line to x and y #####################################################################

def to_example(line, ones_first=True):
    """A line to (x, y): two lists of ids. y is x one token later, or -100 where the token is not counted.

    At each position the model reads x up to there and should say y. Only what it must write counts: everything
    after the first "=". Nothing leaks: the token in column y is never in x at or before the same row.

    >>> x, y = to_example("7+8=15")
    >>> for i, (a, b) in enumerate(zip(x, y)):
    ...     print(i, "reads", repr(VOCAB[a]), "should say", repr(VOCAB[b]) if b >= 0 else "(not counted)")
    0 reads '7' should say (not counted)
    1 reads '+' should say (not counted)
    2 reads '8' should say (not counted)
    3 reads '=' should say '5'
    4 reads '5' should say '1'
    5 reads '1' should say '\\n'
    """
    ids = encode(line + "\n", ones_first)
    n_given = ids.index(EQUALS) + 1
    return ids[:-1], [-100] * (n_given - 1) + ids[n_given:]


######## Step 4-3: the data loader ############################################################################

def largest_size(kind, done, rng):
    """The largest size to draw when the part `done` (0 to 1) of a run is over: a curriculum, small problems first.

    In the first fifth of the run the sizes open up one after the other (Bengio et al. 2009, "Curriculum Learning");
    one problem in ten may be of any size from the start.

    >>> rng = random.Random(0)
    >>> [max(largest_size("mul", done, rng) for _ in range(5)) for done in (0.0, 0.07, 0.14, 1.0)]
    [1, 2, 3, 3]
    """
    sizes = KINDS[kind].sizes
    if rng.random() < 0.1:
        return sizes[-1]
    return sizes[min(len(sizes) - 1, int(5 * done * len(sizes)))]


class ProblemStream(IterableDataset):
    """An endless stream of batches: x (B, T) long, y (B, T) long with -100 where nothing counts.

    Problems are drawn in pools, sorted by length and cut into batches of about config.batch_tokens, so that hardly
    any padding is computed. A row is as long as the longest line of its batch, rounded up to a multiple of 4, and the
    number of rows follows from that: PyTorch prepares its matrix products for each new shape, and a few dozen shapes
    that come again and again are a quarter faster than a new one every time (24,000 tokens a second became 30,000 with
    4 layers, without autocast; torch 2.13.0, on the machine in the README).
    Pool n depends on (seed, n, progress) alone, so a resumed run can start at any batch.

    start: number of the first batch. progress: batch number -> the part of the run that is over, 0 to 1.
    rank, world_size: of `world_size` processes that train together, this is number `rank`: each takes its own pools.
    """

    def __init__(self, config, start=0, progress=None, rank=0, world_size=1, pool_batches=64):
        self.config, self.start, self.pool_batches = config, start, pool_batches
        self.rank, self.world_size = rank, world_size
        self.progress = progress or (lambda batch: batch / config.steps)

    def pool(self, n):
        rng = random.Random(f"{self.config.seed}/{n * self.world_size + self.rank}")
        done = self.progress(n * self.pool_batches)
        kinds = self.config.kinds.split()
        shares = [KINDS[kind].share for kind in kinds]
        examples, n_tokens, size = [], 0, self.config.batch_tokens
        while n_tokens < 1.05 * self.pool_batches * size:       # a little more than needed, as rows are rounded
            kind = rng.choices(kinds, shares)[0]
            problem = draw_problem(kind, rng, False, largest_size(kind, done, rng))
            examples.append(to_example(solve_by_rules(problem, self.config.working), self.config.ones_first))
            n_tokens += len(examples[-1][0])
        examples.sort(key=lambda example: len(example[0]), reverse=True)
        batches = []
        while examples:
            T = math.ceil(len(examples[0][0]) / 4) * 4
            n_rows = max(1, size // T)
            batches.append((T, examples[:n_rows]))
            examples = examples[n_rows:]
        rng.shuffle(batches)
        return batches[:self.pool_batches]           # as many in every pool: a batch number says which pool it is in

    def __iter__(self):
        n, skip = divmod(self.start, self.pool_batches)
        while True:
            for T, batch in self.pool(n)[skip:]:
                yield (torch.tensor([x + [END] * (T - len(x)) for x, _ in batch]),
                       torch.tensor([y + [-100] * (T - len(y)) for _, y in batch]))
            n, skip = n + 1, 0


######## Step 5-1: loss, optimizers, schedule #################################################################

def has_fast_bfloat16(device):
    """Does this device multiply bfloat16, numbers of half the bits, faster than float32?"""
    able = torch.cpu.get_capabilities()              # of an x86 processor of about 2021 or newer, not of all
    return device == "cuda" or device == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def loss_of(model, x, y):
    """Mean of -ln P(y) over the tokens that count: x, y (B, T) -> a scalar, in nats a token."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=has_fast_bfloat16(x.device.type)):
        logits = model(x)                                                             # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), ignore_index=-100)  # (B*T, V), (B*T,)


def orthogonal(matrix):
    """Make all singular values of a matrix about 1 and leave its directions as they are: (R, C) -> (R, C).

    A matrix turns and stretches what it is multiplied with; its singular values say how much, direction by direction.
    Newton-Schulz iteration: five times, every singular value s becomes s * (3.4445 - 4.775 s^2 + 2.0315 s^4), which lifts
    the small ones fast and holds the others between 0.7 and 1.2. That needs no decomposition, only products; and since
    the five factors depend on matrix @ matrix.T alone, they are collected in `lift`, which is small.

    >>> matrix = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.1, 0.0]])           # its singular values are 3 and 0.1
    >>> [round(s, 1) for s in torch.linalg.svdvals(orthogonal(matrix)).tolist()]
    [1.1, 0.7]
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonal(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)                                               # (R, C), no s is above 1
    gram = x @ x.T                                                                    # (R, R) its eigenvalues are s^2
    for i in range(5):
        if i > 0:
            gram = factor @ gram @ factor                                             # that of lift @ x
        factor = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        factor.diagonal().add_(3.4445)
        lift = factor @ lift if i > 0 else factor
    return lift @ x


class Muon(torch.optim.Optimizer):
    """Gradient descent with momentum whose steps are made orthogonal (Jordan et al. 2024).

    The gradient of a matrix is strong in the few directions that most examples ask for. An orthogonal step goes as far
    in all the others, so that what is rare is learned, too. PyTorch has the same as torch.optim.Muon, and a test compares
    both. That one multiplies in bfloat16, in which many processors are very slow: on 2 cores of an AMD EPYC of the Zen 3
    generation a step of the default model took it 630 ms, and takes this one 15 to 23, by the hour (torch 2.13.0).
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:                                                 # (R, C)
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                mean = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(mean, group["momentum"])                          # Nesterov: the mean one step later
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonal(ahead), alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def make_optimizers(model, config):
    """Muon for the blocks' matrices, AdamW for the rest: embeddings, norms, head.

    AdamW (Loshchilov and Hutter 2017) scales each weight's step by itself, Muon a whole matrix's.
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2] if config.muon else []
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)]
    if matrices:
        optimizers.append(Muon(matrices, lr=config.lr, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step, done, config):
    """What the learning rates are multiplied by at this step, when the part `done` (0 to 1) of the run is over.

    Warm up, stay, then fall in a straight line to 2%. The fall is where most of the accuracy is won.

    >>> [round(lr_factor(step, step / 1000, Config()), 2) for step in (0, 49, 99, 400, 700, 1000)]
    [0.01, 0.5, 1.0, 1.0, 0.51, 0.02]
    """
    fall = min(1.0, (1 - done) / (1 - config.flat))
    return min(1.0, (step + 1) / config.warmup) * (0.02 + 0.98 * fall)


######## Step 5-2: the training loop ##########################################################################

def train(config, out, minutes=None, resume=None, device="cpu", compile=False, report=print):
    """Train a model and return it. Saves to `out` at every tenth of the run and when Ctrl-C is pressed.

    minutes: how long to train; None trains for config.steps steps, which gives the same result every time.
    resume: a checkpoint as read_checkpoint returns it, to go on from. report: called with each line of text.
    compile: let torch.compile fuse the operations. Where torchrun has started several processes, all of them run this
    together, and `total` (below) is how they agree; a reader may take RANK for 0 and WORLD_SIZE for 1.
    Raises KeyboardInterrupt after saving, InputError when the loss is no longer a number.
    """
    torch.manual_seed(config.seed)
    # For speed: a large block, freed at once, tells the C library of Linux to keep freed memory of that size for us
    # instead of handing it back to the system at every step.
    torch.empty(31 * 2 ** 20, dtype=torch.uint8)
    model = TinyLLM(config).to(device)
    optimizers = make_optimizers(model, config)
    step, seconds, history, loss = 0, 0.0, [], None
    if resume:
        model.load_state_dict(resume["model"])
        for optimizer, state in zip(optimizers, resume["optimizers"]):
            optimizer.load_state_dict(state)
        step, seconds, history = resume["step"], resume["seconds"], resume["history"]

    forward = torch.compile(model) if compile else model                              # what computes the logits
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        forward = nn.parallel.DistributedDataParallel(forward, find_unused_parameters=not config.place)

    def save():
        save_checkpoint(out, model, optimizers, step, seconds, history)

    def done():                                      # the part of the run that is over, 0 to 1
        return min(1.0, seconds / (60 * minutes) if minutes else step / config.steps)

    monitor = Monitor(report, config.kinds.split()) if RANK == 0 else None
    stop = []                                        # Ctrl-C must not strike in the middle of an optimizer step
    previous = catch_interrupt(stop)
    progress = (lambda batch: done()) if minutes else None
    batches = iter(DataLoader(ProblemStream(config, step, progress, RANK, WORLD_SIZE), batch_size=None))
    if step:                                         # at step 0 everything is as in a new run
        torch.set_rng_state(resume["random_state"])  # last, because iter() draws a number too
    try:
        while True:
            began = time.perf_counter()
            x, y = (tensor.to(device) for tensor in next(batches))                    # (B, T) each
            n_counted = (y >= 0).sum().item()
            all_counted, stops, clock = total(n_counted, len(stop), seconds)
            seconds = clock / WORLD_SIZE             # one clock and one decision for all processes
            before = done()
            if stops or before == 1:
                break
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * lr_factor(step, before, config)

            # the five lines that are all of deep learning
            loss = loss_of(forward, x, y) * (n_counted * WORLD_SIZE / all_counted)    # times 1, for one process
            model.zero_grad(set_to_none=True)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()

            step += 1
            if not math.isfinite(loss.item()):
                raise InputError(f"the loss is {loss.item()} at step {step}: training stopped, {out} keeps the last "
                                 "good state; try a smaller --lr")
            seconds += time.perf_counter() - began
            if RANK > 0:
                continue                             # one process shows and saves
            monitor.progress(step, seconds, done(), loss.item(), x.numel())
            if int(100 * done()) > int(100 * before):
                history.append(monitor.point(step, seconds))
            if int(10 * done()) > int(10 * before):
                began = time.perf_counter()
                history[-1]["exact"] = monitor.row(model.eval(), history[-1], done())
                model.train()
                save()
                seconds += time.perf_counter() - began
    finally:
        if previous is not None:
            signal.signal(signal.SIGINT, previous)
    stopped = total(len(stop))[0] > 0
    if WORLD_SIZE > 1:
        del forward, loss                            # they hold on to the group
        dist.destroy_process_group()
    if stopped:
        if RANK == 0:
            save()
        raise KeyboardInterrupt
    return model.eval()


def catch_interrupt(stop):
    """Let Ctrl-C append to `stop` instead of raising; returns the handler before, None outside the main thread."""
    try:
        return signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    except ValueError:
        return None


# On several GPUs or machines: `torchrun --nproc_per_node=2 tinyllm.py train` starts two processes with one model each.
# Both work on batches of their own, the gradients are averaged after each backward pass (Li et al. 2020, "PyTorch
# Distributed"), so that all take the same step and stay equal: one run with a larger batch.

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))     # which process, of how many


def total(*numbers):
    """The sums of numbers over all processes; for a single process, the numbers themselves."""
    if WORLD_SIZE == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(sums)
    return sums.tolist()


######## Step 5-3: monitoring #################################################################################

class Monitor:
    """Shows how a run is going: one live line on a terminal, a row of held-out results at every tenth."""

    N_PROBLEMS = 100                                 # of each kind, at every row

    def __init__(self, report, kinds):
        self.report, self.live = report, report is print and sys.stdout.isatty()
        self.problems = {kind: held_out_problems(kind, self.N_PROBLEMS) for kind in kinds}
        self.losses, self.tokens, self.began, self.shown = [], 0, time.perf_counter(), 0.0
        report("    step   done     loss  tokens/s  minutes" + "".join(f"{kind:>8}" for kind in kinds))

    def progress(self, step, seconds, done, loss, n_tokens):
        """Count a step; on a terminal, show the live line twice a second."""
        self.losses.append(loss)
        self.tokens += n_tokens
        now = time.perf_counter()
        if self.live and now - self.shown > 0.5:
            self.shown = now
            print(f"\r{step:8d} {done:6.0%} {sum(self.losses) / len(self.losses):8.4f} "
                  f"{self.tokens / (now - self.began):9,.0f}  {seconds / done * (1 - done) / 60:.1f} minutes left ",
                  end="", flush=True)

    def point(self, step, seconds):
        """A point of the loss curve, for the history: the mean loss since the point before."""
        point = {"step": step, "seconds": seconds, "loss": sum(self.losses) / len(self.losses),
                 "tokens_per_second": self.tokens / (time.perf_counter() - self.began)}
        self.losses, self.tokens, self.began = [], 0, time.perf_counter()
        return point

    def row(self, model, point, done):
        """Print a row; returns the part of the held-out answers that are right, per kind."""
        exact = {kind: evaluate(model, problems)["answers"] / len(problems) for kind, problems in self.problems.items()}
        if self.live:
            print("\r" + " " * 70 + "\r", end="")
        self.report(f"{point['step']:8d} {done:6.0%} {point['loss']:8.4f} {point['tokens_per_second']:9,.0f} "
                    f"{point['seconds'] / 60:8.1f}" + "".join(f"{part:8.0%}" for part in exact.values()))
        self.began = time.perf_counter()
        return exact


def plot(history, width=60, height=10):
    """The loss of a run as text; each column is a part of the run, the scale is logarithmic.

    >>> print(plot([{"loss": 2.0}, {"loss": 0.2}, {"loss": 0.02}], width=3, height=3))
      2.0000 |*
      0.2000 | *
      0.0200 |  *
             +---
    """
    losses = [max(row["loss"], 1e-6) for row in history]
    columns = [math.log(losses[i * len(losses) // width]) for i in range(width)]
    top, bottom = max(columns), min(columns)
    level = [round((height - 1) * (top - c) / (top - bottom or 1)) for c in columns]
    lines = []
    for i in range(height):
        label = math.exp(top - (top - bottom) * i / (height - 1))
        lines.append(f"{label:8.4f} |" + "".join("*" if n == i else " " for n in level).rstrip())
    return "\n".join([*lines, " " * 9 + "+" + "-" * width])


######## Step 5-4: saving #####################################################################################

FORMAT = 4              # of the checkpoint file; a later program that writes it differently counts up


def is_finite(weights):
    """Are all of the weights (name -> tensor) numbers, neither infinite nor "not a number"?"""
    return all(tensor.isfinite().all() for tensor in weights.values())


def save_checkpoint(path, model, optimizers=(), step=0, seconds=0.0, history=()):
    """Write a checkpoint: beside it first, then renamed, so that `path` is always whole. Raises InputError."""
    if not is_finite(model.state_dict()):
        raise InputError(f"the weights are no longer numbers: {path} keeps the last good state; try a smaller --lr")
    checkpoint = {
        "format": FORMAT, "vocabulary": VOCAB, "config": dataclasses.asdict(model.config),
        "model": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "random_state": torch.get_rng_state(), "step": step, "seconds": seconds, "history": list(history),
    }
    beside = None
    try:
        handle, beside = tempfile.mkstemp(prefix=os.path.basename(path) + ".", suffix=".tmp",
                                          dir=os.path.dirname(os.path.abspath(path)))
        with os.fdopen(handle, "wb") as file:
            torch.save(checkpoint, file)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:         # torch reports a full disk as a RuntimeError
        if beside and os.path.exists(beside):
            os.remove(beside)
        raise InputError(f"cannot write {path} ({type(error).__name__}); give --out a file in a folder that exists "
                         "and that you may write to") from error


def read_checkpoint(path):
    """Read a checkpoint into a dict, on the CPU; runs no code from it. Raises InputError if it is none of ours."""
    if not os.path.isfile(path):
        raise InputError(f"there is no checkpoint {path}; make one with: python tinyllm.py train --out {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        known = (checkpoint["format"], checkpoint["vocabulary"]) == (FORMAT, VOCAB)
        if known:
            TinyLLM(Config(**checkpoint["config"])).load_state_dict(checkpoint["model"])
    except Exception as error:                       # a damaged file fails in a dozen ways inside torch.load
        raise InputError(f"{path} is damaged or is no tinyllm checkpoint; train again, or give another file") from error
    if not known:
        raise InputError(f"{path} was written by another version of tinyllm; train again with this one")
    if not is_finite(checkpoint["model"]):
        raise InputError(f"{path} holds weights that are not numbers; train again")
    return checkpoint


def load_checkpoint(path, device="cpu"):
    """Read a trained model: path -> TinyLLM, ready to answer. Raises InputError."""
    checkpoint = read_checkpoint(path)
    model = TinyLLM(Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    model.history = checkpoint["history"]            # of its training, for the page
    return model.to(device).eval()


######## Step 6-1: held-out problems ##########################################################################

def held_out_problems(kind, count, seed=1, size=None, tries=200):
    """Up to `count` different problems that no training run has ever seen; fewer where there are no more.

    >>> problems = held_out_problems("mul", 100, size=1)
    >>> len(problems), all(is_held_out(problem) for problem in problems)     # of 55 products up to 9*9
    (6, True)
    """
    rng, found = random.Random(f"{seed}/{kind}/{size}"), {}
    for _ in range(count * tries):
        problem = KINDS[kind].draw(rng, size or KINDS[kind].sizes[-1], False)
        if (size is None or kind_and_size(problem)[1] == size) and is_held_out(problem):
            found.setdefault(canonical(parse(problem)), problem)
            if len(found) == count:
                break
    return list(found.values())


######## Step 6-2: decoding and evaluation ####################################################################

@torch.inference_mode()
def generate(model, prompts, max_tokens=None, use_cache=True):
    """Greedy decoding: lists of ids -> lists of ids, each prompt continued with the likeliest token until END.

    All rows start at column 0. While a row is inside its prompt, its next token comes from there, after that from
    the model; rows that have ended leave the batch. This knows nothing of arithmetic: it would serve any model.
    """
    device = model.head.weight.device
    limit = min(max_tokens or model.config.block_size, model.config.block_size)
    ids = torch.full((len(prompts), limit), END, device=device)                       # (B, limit)
    for i, prompt in enumerate(prompts):
        ids[i, :len(prompt)] = torch.tensor(prompt, device=device)
    n_given = torch.tensor([len(prompt) for prompt in prompts], device=device)        # (B,)
    ends = torch.full_like(n_given, limit)
    rows = torch.arange(len(prompts), device=device)                                  # those that still go on
    cache = [[] for _ in model.blocks] if use_cache else None
    for t in range(1, limit):
        logits = model(ids[rows, :t], cache)                                          # (B, 1 or t, V)
        chosen = torch.where(t < n_given[rows], ids[rows, t], logits[:, -1].argmax(-1))
        ids[rows, t] = chosen
        going = (chosen != END) | (t < n_given[rows])
        ends[rows[~going]] = t
        if not going.any():
            break
        if not going.all():
            rows = rows[going]
            cache = cache and [[tensor[going] for tensor in layer] for layer in cache]
    return [row[:end] for row, end in zip(ids.tolist(), ends.tolist())]


def solve(model, problems, batch_size=500):
    """The full line that the model writes for each problem (text, as normalize returns it), in the same order.

    Raises InputError for a problem that leaves the model no room to answer.
    """
    ones_first, room = model.config.ones_first, model.config.block_size
    for problem in problems:
        if len(problem) + 2 > room // 2:
            raise InputError(f"the problem has {len(problem)} characters, the model has room for {room // 2 - 2}; "
                             "write it in several parts")
    order = sorted(range(len(problems)), key=lambda i: len(problems[i]))              # like lengths side by side
    lines = [""] * len(problems)
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        written = generate(model, [encode(problems[i] + "=", ones_first) for i in batch])
        for i, ids in zip(batch, written):
            lines[i] = decode(ids, ones_first)
    return lines


def check(line):
    """Was a line that the model wrote right? (answer, working): the exact check, made after the fact.

    The answer is right if the last step is simple and equals the problem; the working if every step is true too.

    >>> check("2+3*4=2+12=14"), check("2+3*4=5*4=14"), check("2+3*4=2+12")
    ((True, True), (True, False), (False, False))
    """
    problem, *steps = line.split("=")
    answer = bool(steps) and is_simple(steps[-1]) and is_true(f"{problem}={steps[-1]}")
    return answer, answer and is_true(line)


def explain(line):
    """A sentence that names the first step of a line that is not true, or that says what else is wrong with it.

    >>> explain("2+3*4=5*4=20")
    '2+3*4=5*4=20: step 1, 5*4, is 20 and should be 14'
    """
    problem, *steps = line.split("=")
    for i, step in enumerate(steps, 1):
        if not is_true(f"{problem}={step}"):
            try:
                for x, y in test_points(line):
                    found, wanted = value(parse(step), x, y), value(parse(problem), x, y)
                    if found != wanted:
                        at = f" for x = {x} and y = {y}" if len(test_points(line)) > 1 else ""
                        return f"{line}: step {i}, {step}, is {found} and should be {wanted}{at}"
            except InputError as error:
                return f"{line}: step {i} cannot be read, {error}"
    return f"{line}: every step is true, but the last one is not simple"


def evaluate(model, problems):
    """How many answers and workings are right: a dict with counts, the mean length, and the lines that failed."""
    lines = solve(model, problems)
    checks = [check(line) for line in lines]
    return {
        "problems": len(problems),
        "answers": sum(answer for answer, _ in checks),
        "workings": sum(working for _, working in checks),
        "mean_length": sum(map(len, lines)) / max(1, len(lines)),
        "wrong": [line for line, (_, working) in zip(lines, checks) if not working],
    }


def table(results):
    """The results of evaluate, by name, as text."""
    rows = [f"{'':10} problems  answers right  workings right  mean length"]
    for name, r in results.items():
        n = r["problems"]
        rows.append(f"{name:10} {n:8d}  {r['answers'] / n:13.2%}  {r['workings'] / n:14.2%}  {r['mean_length']:11.1f}"
                    if n else f"{name:10} {n:8d}")
    return "\n".join(rows)


######## Step 7-1: mathematics as it is printed ###############################################################
#
# The line of equations is all there is; what follows are views of it. One table says how each construct is written in
# LaTeX, for papers, and in MathML, which browsers show by themselves.

CONSTRUCTS = {
    "number":   ("{}", "<mn>{}</mn>"),
    "letter":   ("{}", "<mi>{}</mi>"),
    "+":        ("{}+{}", "<mrow>{}<mo>+</mo>{}</mrow>"),
    "-":        ("{}-{}", "<mrow>{}<mo>&#x2212;</mo>{}</mrow>"),
    "neg":      ("-{}", "<mrow><mo>&#x2212;</mo>{}</mrow>"),
    "*":        (r"{} \times {}", "<mrow>{}<mo>&#xD7;</mo>{}</mrow>"),
    "side by side": ("{}{}", "<mrow>{}{}</mrow>"),
    "/":        (r"{} \div {}", "<mrow>{}<mo>&#xF7;</mo>{}</mrow>"),
    "fraction": (r"\frac{{{}}}{{{}}}", "<mfrac>{}{}</mfrac>"),
    "mixed":    ("{}{}", "<mrow>{}{}</mrow>"),
    "^":        ("{}^{{{}}}", "<msup>{}{}</msup>"),
    "()":       ("({})", "<mrow><mo>(</mo>{}<mo>)</mo></mrow>"),
    "tall":     (r"\left({}\right)", "<mrow><mo>(</mo>{}<mo>)</mo></mrow>"),        # around a fraction
    "step":     ("{}&={}", "<mtr><mtd>{}</mtd><mtd><mo>=</mo></mtd><mtd>{}</mtd></mtr>"),
    "between":  (r" \\" + "\n", ""),
    "unread":   (r"\mathtt{{{}}}", "<mtext>{}</mtext>"),                              # not mathematics
    "line":     ("\\begin{{align*}}\n{}\n\\end{{align*}}", '<math display="block"><mtable>{}</mtable></math>'),
}


def write(language, construct, *parts):
    return CONSTRUCTS[construct][language].format(*parts)


def typeset(text, language):
    """A step, typeset: text -> LaTeX (language 0) or MathML (language 1).

    >>> print(typeset("-3-1/2", 0), typeset("70+(1831-1610)/23", 0), typeset("2*7/23", 0), typeset("2x^2", 0))
    -3\\frac{1}{2} 70+(1831-1610) \\div 23 \\frac{2 \\times 7}{23} 2x^{2}
    >>> typeset("2x^2", 1)
    '<mrow><mn>2</mn><msup><mi>x</mi><mn>2</mn></msup></mrow>'
    """
    def numbers(node):                               # the numbers of a product; none if it is not one
        if isinstance(node, int):
            return [node]
        parts = [numbers(child) for child in node[1:]] if node[0] in ("*", "()") else [[]]
        return sum(parts, []) if all(parts) else []

    def is_fraction(node):                           # 221/23 is a division, 3/7 and 2*7/23 are fractions
        above, below = map(numbers, node[1:]) if isinstance(node, tuple) and node[0] == "/" else ([], [])
        return bool(above and below) and 0 < abs(math.prod(above)) < math.prod(below)

    def has_fraction(node):
        return isinstance(node, tuple) and (is_fraction(node) or any(map(has_fraction, node[1:])))

    def show(node):
        if isinstance(node, str):
            return write(language, "letter", node)
        if isinstance(node, int):
            return write(language, "number", node) if node >= 0 else write(language, "neg", show(-node))
        op, *children = node
        if is_fraction(node):
            above, below = (child[1] if isinstance(child, tuple) and child[0] == "()" else child for child in children)
            if isinstance(above, int) and above < 0:
                return write(language, "neg", write(language, "fraction", show(-above), show(below)))
            return write(language, "fraction", show(above), show(below))
        if op in "+-" and isinstance(children[0], int) and is_fraction(children[1]):
            whole, fraction = children[0], show(children[1])
            if whole and (whole > 0) == (op == "+"):
                mixed = write(language, "mixed", show(abs(whole)), fraction)
                return mixed if whole > 0 else write(language, "neg", mixed)
        if op == "()" and has_fraction(node):
            op = "tall"
        if op == "*" and degree(node):
            op = "side by side"
        return write(language, op, *map(show, children))

    try:
        return show(parse(text, brackets=True))
    except InputError:
        return write(language, "unread", html.escape(text) if language else text.replace("^", r"\hat{\ }"))


def typeset_line(line, language):
    """A line, typeset a step a row: problem and first step, then only the steps."""
    problem, *steps = line.split("=")
    rows = [write(language, "step", "" if i else typeset(problem, language), typeset(step, language))
            for i, step in enumerate(steps)]
    return write(language, "line", write(language, "between").join(rows))


def to_latex(line):
    r"""A line as an align* block of LaTeX. A step that cannot be read is set as plain text.

    >>> print(to_latex("10/4=2+(10-8)/4=2+2/4=2+2/(2*2)=2+1/2"))
    \begin{align*}
    10 \div 4&=2+(10-8) \div 4 \\
    &=2\frac{2}{4} \\
    &=2\frac{2}{2 \times 2} \\
    &=2\frac{1}{2}
    \end{align*}
    """
    return typeset_line(line, 0)


def to_mathml(line):
    """A line as a table of presentation MathML, a row a step.

    >>> to_mathml("2+3=5")[22:74]
    '<mtable><mtr><mtd><mrow><mn>2</mn><mo>+</mo><mn>3</m'
    """
    return typeset_line(line, 1)


######## Step 7-2: what the model looked at #####################################################################

def watch(model, line):
    """What happened while a line was written: text (T,) as the model reads it, weights (n_layer, H, T, T), logits (T, V)."""
    ids = encode(line, model.config.ones_first)
    with torch.inference_mode():
        logits = model(torch.tensor([ids], device=model.head.weight.device))[0]
    weights = torch.stack([block.attention.weights[0] for block in model.blocks])
    return "".join(VOCAB[i] for i in ids), weights.cpu(), logits.cpu()


def levels(weights):
    """Weights of 0 to 1 on a scale of ten steps, 0 to 9, for showing: (T,) -> a list."""
    return (10 * weights).int().clamp(max=9).tolist()


def look(model, line, layer=None, head=None):
    """A picture of attention: a row for each character that was written, a column for each that stood before it.

    The darker the sign, of " .:-=+*#%@", the larger the weight with which the model looked there when it wrote; the
    largest one of all layers (1, 2 ...) and heads, or of those that were chosen. Terms stand as the model reads
    them, turned round. Raises InputError for a layer or head that is not there.
    """
    for name, chosen, count in (("layer", layer, model.config.n_layer), ("head", head, model.config.n_head)):
        if chosen is not None and not 1 <= chosen <= count:
            raise InputError(f"--{name} {chosen}: this model has {name}s 1 to {count}")
    text, weights, _ = watch(model, line)
    weights = weights[slice(None) if layer is None else [layer - 1]]
    weights = weights[:, slice(None) if head is None else [head - 1]].amax((0, 1))    # (T, T)
    rows = [f"     {text}"]
    for t in range(text.index("=") + 1, len(text) + 1):
        shades = "".join(" .:-=+*#%@"[level] for level in levels(weights[t - 1, :t]))
        rows.append(f"{text[t] if t < len(text) else 'end':>3}  {shades}")
    return "\n".join(rows)


######## Step 7-3: the page #####################################################################################
#
# The same in a browser, for people who would rather look than read: a server from the standard library, and one page
# (the string PAGE at the end of this file) that loads nothing from anywhere else.

def chart(title, minutes, series, ticks):
    """A line chart as inline SVG. series: name -> points of 0 (bottom) to 1 (top); ticks: label -> height."""
    def at(x, y):
        return f"{60 + 500 * x / max(minutes, default=1):.1f},{220 - 200 * y:.1f}"

    rows = []
    for label, y in ticks.items():
        rows.append(f'<path class="grid" d="M{at(0, y)} H560"/><text x="52" y="{224 - 200 * y:.0f}" text-anchor="end">{label}</text>')
    for i, (name, points) in enumerate(series.items()):
        line = " ".join(at(x, y) for x, y in zip(minutes, points))
        rows.append(f'<polyline class="line c{i}" points="{line}"/><path class="line c{i}" d="M572 {30 + 24 * i} h30"/>'
                    f'<text x="608" y="{34 + 24 * i}">{name}</text>')
    rows.append(f'<text x="60" y="244">0</text><text x="560" y="244" text-anchor="end">{max(minutes, default=0):.1f} minutes</text>')
    return f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 680 250" role="img" aria-label="{title}">' \
           + "".join(rows) + "</svg></figure>"


def charts(history):
    """How a run went, from the history in its checkpoint, as two charts."""
    if not history:
        return "<p>This checkpoint holds no history of its training.</p>"
    logs = [math.log10(max(point["loss"], 1e-6)) for point in history]
    bottom, top = math.floor(min(logs)), math.ceil(max(logs))
    loss = chart("Loss, in nats a token", [point["seconds"] / 60 for point in history],
                 {"loss": [(log - bottom) / (top - bottom) for log in logs]},
                 {f"{10.0 ** n:g}": (n - bottom) / (top - bottom) for n in range(bottom, top + 1)})
    rows = [point for point in history if "exact" in point]
    exact = {kind: [row["exact"][kind] for row in rows] for kind in (rows[0]["exact"] if rows else ())}
    return loss + chart("Held-out answers right", [row["seconds"] / 60 for row in rows], exact,
                        {f"{n}%": n / 100 for n in range(0, 101, 20)})


class Waiting:
    """Problems of several threads, decoded one batch at a time: those that come meanwhile wait, and are the next batch."""

    def __init__(self, model):
        self.model, self.lock, self.queue = model, threading.Lock(), []

    def ask(self, problem):
        """Returns the line and what watch says of it."""
        mine = {"problem": problem}
        self.queue.append(mine)
        with self.lock:
            if "line" not in mine:                   # nobody has done it for us while we waited: do all that wait
                batch = [self.queue.pop(0) for _ in range(len(self.queue))]
                for one, line in zip(batch, solve(self.model, [one["problem"] for one in batch])):
                    one["line"] = line
            return mine["line"], watch(self.model, mine["line"])


def reply_to(model, text, waiting):
    """What the page shows for a problem, as a dict for JSON. Raises InputError."""
    problem = prepare(text, model)
    line, (read, weights, logits) = waiting.ask(problem)
    start, (answer, _) = read.index("=") + 1, check(line)
    likeliest = logits.softmax(-1).topk(3)
    spans = [match.span() for match in re.finditer(TERM, line)] if model.config.ones_first else []
    place = list(range(len(line) + 1))               # where each token stands in the line as people read it
    for a, b in spans:
        place[a:b] = place[a:b][::-1]
    return {
        "line": line, "problem": typeset(problem, 1), "right": answer, "latex": to_latex(line), "place": place,
        "steps": [{"mathml": typeset(step, 1), "true": is_true(f"{problem}={step}")} for step in line.split("=")[1:]],
        "note": "This problem is outside the range that the model was trained on." if outside(problem, model.config) else "",
        "start": start,
        # for each character written, for each layer and head: a digit 0 to 9 for the weight of each earlier character
        "weights": [[["".join(map(str, levels(head[t - 1, :t]))) for head in layer]
                     for layer in weights] for t in range(start, len(read) + 1)],
        "next": [[["end" if i == END else VOCAB[i], round(p, 4)] for i, p in zip(ids, ps)] for ids, ps in
                 zip(likeliest.indices[start - 1:].tolist(), likeliest.values[start - 1:].tolist())],
    }


def make_server(model, history, host="127.0.0.1", port=8000):
    """An HTTP server for the page, ready for serve_forever(); port 0 takes a free one. Raises InputError.

    It answers GET / with the page and POST /solve {"problem": text} with JSON, nothing else. It refuses requests that a
    page from elsewhere has sent (Origin), or that came by a name that is not ours (Host; "DNS rebinding").
    """
    waiting, figure = Waiting(model), charts(history)

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10                                 # seconds that a client may stall
        server_version, sys_version, error_content_type = "tinyllm", "", "application/json"

        def log_message(self, *_):
            pass

        def send(self, status, kind, body, policy="default-src 'none'"):
            data = body.encode("utf-8")
            self.send_response(status)
            for name, text in (("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", len(data)),
                               ("Content-Security-Policy", policy + "; base-uri 'none'; frame-ancestors 'none'"),
                               ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
                               ("Cache-Control", "no-store"), ("Connection", "close")):
                self.send_header(name, str(text))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def send_error(self, code, message=None, explain=None):
            self.close_connection = True
            self.send(code, "application/json", json.dumps({"error": message or http.HTTPStatus(code).description}))

        def refused(self):
            """Is the request not for us? Then it has been answered."""
            name, _, _ = (self.headers.get("Host") or "").rpartition(":")
            try:
                known = name in ("localhost", host) or bool(ipaddress.ip_address(name.strip("[]")))
            except ValueError:
                known = False
            if not known or self.headers["Host"] != f"{name}:{self.server.server_port}":
                self.send_error(403, "this server is asked by another name than its own; use the address that it printed")
            elif self.headers.get("Origin", f"http://{self.headers['Host']}") != f"http://{self.headers['Host']}":
                self.send_error(403, "this request comes from another page; open the address that the server printed")
            else:
                return False
            return True

        def do_GET(self):
            if self.refused():
                return
            if self.path.partition("?")[0] != "/":
                return self.send_error(404, "there is nothing at this address; the page is at /")
            nonce = secrets.token_urlsafe(16)
            page = PAGE.replace("NONCE", nonce).replace("FIGURE", figure)
            for name, count in (("LAYERS", model.config.n_layer), ("HEADS", model.config.n_head)):
                page = page.replace(name, "".join(f"<option value={i}>{i + 1}</option>" for i in range(count)))
            self.send(200, "text/html", page, f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
                                              "connect-src 'self'; form-action 'none'")

        def do_POST(self):
            if self.refused():
                return
            if self.path != "/solve":
                return self.send_error(404, "there is nothing at this address; problems go to /solve")
            length = self.headers.get("Content-Length", "")
            if not re.fullmatch("[0-9]{1,9}", length):
                return self.send_error(411, "the request does not say how long it is (Content-Length)")
            if int(length) > 4096:
                return self.send_error(413, "the request is longer than 4096 bytes; write a shorter problem")
            try:
                asked = json.loads(self.rfile.read(int(length)))
                text, preview = asked["problem"], asked.get("preview", False)
                if not isinstance(text, str):
                    raise TypeError
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                return self.send_error(400, 'the request is not of the form {"problem": "12*34"}')
            try:
                reply = {"problem": typeset(prepare(text, model), 1)} if preview else reply_to(model, text, waiting)
            except InputError as error:
                return self.send_error(422, str(error))
            self.send(200, "application/json", json.dumps(reply))

        do_HEAD = do_GET

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128
        allow_reuse_address = os.name != "nt"        # on Windows it would let two servers share a port

        def handle_error(self, request, client_address):
            pass                                     # a client that went away harms no other

    try:
        return Server((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot serve on {host}, port {port} ({error}); give another --port") from error


######## Step 7-4: the commands #################################################################################

def prepare(text, model):
    """What a person typed, as a problem that the model can be asked. Raises InputError."""
    problem = normalize(text)
    room = model.config.block_size // 2 - 2
    if len(problem) > room:
        raise InputError(f"the problem has {len(problem)} characters, the model has room for {room}; "
                         "write it in several parts")
    node = parse(problem)
    value(node)                                      # raises for a missing bracket or a division by zero
    if re.search(r"[xy]|[0-9)]\(", problem):         # 2*x and x*2 are asked as 2x, 2(3+4) as 2*(3+4)
        problem = to_text(node)
    return problem


def outside(problem, config):
    """Is this problem larger than those that the model was trained on, or of another kind?

    >>> [outside(problem, Config()) for problem in ("12*34", "1234*5678", "1+2+3+4+5+6", "123x+4x")]
    [False, True, True, True]
    """
    kind, size = kind_and_size(problem)
    if kind not in config.kinds.split():
        return True
    longest = max(map(len, re.findall("[0-9]+", problem)), default=0)
    return size > KINDS[kind].sizes[-1] or longest > {"expr": 4, "algebra": 2}.get(kind, 99) or \
        (kind == "div" and len(problem.split("/")[1]) > 2)


def show(line, config):
    """A line as a notebook shows it, a step a line, with the exact check of each step."""
    problem, *steps = line.split("=")
    width = max(map(len, steps), default=0)
    for i, step in enumerate(steps):
        verdict = "true" if is_true(f"{problem}={step}") else "NOT TRUE"
        print(f"{problem if i == 0 else '':{len(problem)}} = {step:{width}}   check: {verdict}")
    if steps and not is_simple(steps[-1]):
        print("check: the last step is not simple, so this is NOT AN ANSWER")
    if outside(problem, config):
        print("note: this problem is outside the range that the model was trained on")


def command_train(args):
    """Train a model from scratch."""
    chosen = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config) if field.name in args}
    resume = read_checkpoint(args.out) if args.resume else None
    if resume:
        extra = set(chosen) - {"steps"}
        if extra:
            raise InputError(f"--resume goes on with the run as it was: leave out --{min(extra)}")
        chosen = {**resume["config"], **chosen}
    elif RANK > 0:
        pass                                         # process 0 looks after the file
    elif os.path.isdir(args.out):
        raise InputError(f"--out {args.out} is a folder; give it the name of a file")
    elif os.path.exists(args.out) and not args.force:
        raise InputError(f"{args.out} exists: give --resume to go on with it, --force to replace it, or another --out")
    if args.minutes is not None and not 0 < args.minutes < float("inf"):
        raise InputError(f"--minutes {args.minutes} must be more than 0")
    config = Config(**chosen)
    device = pick_device(args.device)
    torch.manual_seed(config.seed)
    model = TinyLLM(config).to(device).eval()
    if RANK > 0:
        train(config, args.out, args.minutes, resume, device, args.compile)
        return 0
    if not resume:
        save_checkpoint(args.out, model)             # now, not in ten minutes, is the time to learn that it fails
        print("Before training, the model answers:")
        for kind in config.kinds.split():
            problem = held_out_problems(kind, 1)[0]
            written = decode(generate(model, [encode(problem + "=", config.ones_first)], len(problem) + 12)[0])
            print("   ", written.replace("\n", " "))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}, {torch.get_num_threads()} threads, "
          + (f"{WORLD_SIZE} processes, " if WORLD_SIZE > 1 else "")
          + (f"{args.minutes:g} minutes" if args.minutes else f"{config.steps:,} steps")
          + f", seed {config.seed}, torch {torch.__version__}", flush=True)
    began = time.perf_counter()
    model = train(config, args.out, args.minutes, resume, device, args.compile)
    print(f"Trained in {(time.perf_counter() - began) / 60:.1f} minutes, saved as {args.out}. On held-out problems:")
    print(table({kind: evaluate(model, held_out_problems(kind, 500, seed=2)) for kind in config.kinds.split()}))
    print("The loss, from start to end:")
    print(plot(read_checkpoint(args.out)["history"]))
    given = "" if args.out == "tinyllm.pt" else f" --checkpoint {args.out}"
    print(f'Now try:\n    python tinyllm.py ask "12*34"{given}\n    python tinyllm.py eval{given}')
    return 0


def command_eval(args):
    """Measure a model on held-out problems."""
    model = load_checkpoint(args.checkpoint, pick_device(args.device))
    if args.problems < 1:
        raise InputError("--problems must be at least 1")
    kinds = model.config.kinds.split()
    results = {kind: evaluate(model, held_out_problems(kind, args.problems)) for kind in kinds}
    print(f"Held-out problems, greedy decoding, {args.checkpoint}:")
    print(table(results))
    by_size = {}
    for kind in kinds:
        top = KINDS[kind].sizes[-1]
        for size in [*KINDS[kind].sizes, top + 1]:
            name = f"{kind} {size}" + ("*" if size > top else "")
            by_size[name] = evaluate(model, held_out_problems(kind, max(1, args.problems // 5), size=size))
    print("By size: digits of the longest number, or operators. * is one size past what was trained on:")
    print(table(by_size))
    beyond = {}
    if args.beyond:
        sizes = {"add": range(11, 21), "sub": range(11, 21), "mul": [4], "div": [], "expr": [5, 6], "algebra": [6, 7]}
        for kind in kinds:
            for size in sizes[kind]:
                problems = held_out_problems(kind, 2 * max(1, args.problems // 5), size=size)
                if kind == "mul":                    # 4 x 4 digits, not 4 x 1
                    problems = [problem for problem in problems if len(problem) == 9]
                beyond[f"{kind} {size}"] = evaluate(model, problems[:max(1, args.problems // 5)])
        print("Beyond what it was trained on:")
        print(table(beyond))
    pairs = {}
    if args.pairs:
        asked = [f"{a}{op}{b}" for op in "+-*/" for a in range(100) for b in range(100) if (op, b) != ("/", 0)]
        pairs["pairs"] = evaluate(model, asked)
        print("All of a+b, a-b, a*b, a/b with numbers below 100, those of the training data among them:")
        print(table(pairs))
    wrong = [line for result in results.values() for line in result["wrong"][:10 // len(results)]]
    print(f"{sum(len(result['wrong']) for result in results.values())} wrong workings" + (", some of each kind:" if wrong else ""))
    for line in wrong:
        print("   ", explain(line))
    if args.json:
        try:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump({"kinds": results, "sizes": by_size, "beyond": beyond, **pairs}, file, indent=1)
        except OSError as error:
            raise InputError(f"cannot write {args.json} ({type(error).__name__}); give --json another file") from error
    low = [kind for kind, r in results.items() if args.target is not None and r["answers"] < args.target * r["problems"]]
    if low:
        print(f"below the target of {args.target}: {', '.join(low)}")
    return 1 if low else 0


def command_ask(args):
    """Ask the model."""
    model = load_checkpoint(args.checkpoint, pick_device(args.device))
    if args.plain and args.latex:
        raise InputError("--plain writes the bare lines: leave out --latex, or --plain")
    if args.plain:
        return ask_plain(model, args.problems or sys.stdin)

    def answer(line):
        if args.latex:
            print(to_latex(line))
        else:
            show(line, model.config)

    if args.problems:
        for line in solve(model, [prepare(text, model) for text in args.problems]):
            answer(line)
        return 0
    while True:                                      # a small prompt loop; an empty line or Ctrl-D ends it
        try:
            text = input("problem: " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not text.strip():
            return 0
        try:
            answer(solve(model, [prepare(text, model)])[0])
        except InputError as error:
            print(f"error: {error}")


def ask_plain(model, texts, batch_size=1000):
    """One line in, one full line out, in the same order; what is no problem becomes an error line."""
    status, texts = 0, iter(texts)
    while batch := [text for _, text in zip(range(batch_size), texts)]:
        answers, problems = [], {}
        for i, text in enumerate(batch):
            try:
                problems[i] = prepare(text, model)
                answers.append("")
            except InputError as error:
                answers.append(f"error: {error}")
                status = 2
        for i, line in zip(problems, solve(model, list(problems.values()))):
            answers[i] = line
        print("\n".join(answers), flush=True)
    return status


def command_look(args):
    """See what the model looked at while it wrote."""
    model = load_checkpoint(args.checkpoint, pick_device(args.device))
    line = solve(model, [prepare(args.problem, model)])[0]
    chosen = f"layer {args.layer or 'any'}, head {args.head or 'any'}, the largest weight"
    print(f"{line}\n{chosen}; terms stand turned round, as the model reads them:")
    print(look(model, line, args.layer, args.head))
    return 0


def command_serve(args):
    """A page in the browser to talk to the model."""
    model = load_checkpoint(args.checkpoint, pick_device(args.device))
    server = make_server(model, model.history, args.host, args.port)
    address = f"http://{args.host}:{server.server_port}/"
    if args.host not in ("127.0.0.1", "localhost"):
        print("warning: with --host, everyone who can reach this machine can use this page")
    print(f"{address} (Ctrl-C ends it)", flush=True)
    if args.open:
        webbrowser.open(address)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nended")
    return 0


def command_bench(args):
    """Measure this machine: training and decoding speed, memory."""
    device = pick_device(args.device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = re.search("model name[^:]*: *(.*)", file.read())[1]
    except (OSError, TypeError):                     # not Linux, or a processor without a name
        cpu = platform.processor() or platform.machine()
    if not 0 < args.seconds < float("inf"):
        raise InputError(f"--seconds {args.seconds} must be more than 0")
    print(f"machine            {torch.cuda.get_device_name() if device == 'cuda' else cpu}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")

    def seconds(work, at_least):                     # of one call, when called for a while
        work()
        began, calls = time.perf_counter(), 0
        while time.perf_counter() - began < at_least or calls == 0:
            work()
            calls += 1
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / calls

    n = 1024
    matrix = torch.rand(n, n, device=device)
    rate = 2 * n ** 3 / seconds(lambda: matrix @ matrix, 2.0)                         # n*n times n products and n sums
    print(f"float32 product    {rate / 1e9:,.0f} GFLOP/s, matrices of {n} x {n}")

    config, counts = Config(), []
    model = TinyLLM(config).to(device)
    optimizers = make_optimizers(model, config)
    batches = iter(ProblemStream(config, start=config.steps // 2))                    # of all sizes

    def step():                                      # as in train, with making the data
        x, y = (tensor.to(device) for tensor in next(batches))
        loss = loss_of(model, x, y)
        model.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        counts.append(x.numel())

    took = seconds(step, args.seconds)
    speed, n_parameters = sum(counts) / len(counts) / took, sum(p.numel() for p in model.parameters())
    model.eval()
    # Forward, each parameter is multiplied once and added once for each token: 2. Backward it is twice that, for the
    # gradient of the input and of the parameter: 6 in all. Attention and the optimizers come on top, uncounted.
    print(f"training           {speed:,.0f} tokens/s; 6 x {n_parameters:,} parameters x tokens = "
          f"{6 * n_parameters * speed / rate:.0%} of that rate")

    prompts = [encode(problem + "=") for problem in held_out_problems("expr", 200)]
    for name, use_cache in (("with", True), ("without", False)):
        took = seconds(lambda: generate(model, prompts, 64, use_cache), 1.0)
        print(f"decoding           {len(prompts) / took:,.0f} problems/s {name} the key/value cache, 64 tokens each")
    try:
        import resource                              # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        peak = None
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak
    print(f"peak memory        {f'{peak / 2 ** 20:,.0f} MiB' if peak else 'not known on this system'}")
    return 0


def command_data(args):
    """Print examples of the data."""
    rng = random.Random(args.seed)
    for _ in range(args.count):
        kind = args.kind or rng.choice(list(KINDS))
        print(solve_by_rules(draw_problem(kind, rng, held_out=args.split == "test"), working=args.working))
    return 0


def pick_device(name):
    """'auto' is a CUDA GPU where there is one, else the CPU. Raises InputError for one that is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = ("cuda" if there["cuda"] else "cpu") if name == "auto" else name
    if not there[name]:
        raise InputError(f"--device {name}: there is no such device here; use --device cpu")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))                   # a GPU for each process
    return name


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help")


def make_parser():
    parser = Parser(prog="tinyllm.py", description="A small GPT that learns school arithmetic and writes its working.")
    commands = parser.add_subparsers(title="commands", metavar="train | eval | ask | look | serve | bench | data")

    def command(name, function):
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(function=function)
        if name != "data":
            sub.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
        return sub

    sub = command("train", command_train)
    sub.add_argument("--minutes", type=float, help="train for a given time instead of a number of steps")
    sub.add_argument("--out", default="tinyllm.pt", help="checkpoint to write")
    sub.add_argument("--resume", action="store_true", help="go on with the run in --out")
    sub.add_argument("--force", action="store_true", help="replace --out if it exists")
    sub.add_argument("--compile", action="store_true", help="let torch.compile make it faster (needs a C++ compiler)")
    for field in dataclasses.fields(Config):         # SUPPRESS: only flags that were given reach command_train
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        text = field.metadata["help"] + f" (default: {field.default})"
        sub.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **kind)

    sub = command("eval", command_eval)
    sub.add_argument("--checkpoint", default="tinyllm.pt", help="model to measure")
    sub.add_argument("--problems", type=int, default=1000, help="held-out problems of each kind")
    sub.add_argument("--pairs", action="store_true", help="also ask all 39,900 problems with two numbers below 100")
    sub.add_argument("--beyond", action="store_true", help="also ask problems much larger than those of the training")
    sub.add_argument("--target", type=float, help="exit with status 1 if a kind has a smaller part of answers right")
    sub.add_argument("--json", help="file to write everything to, as JSON")

    sub = command("ask", command_ask)
    sub.add_argument("problems", nargs="*", help='such as "12*34"; none: a prompt')
    sub.add_argument("--plain", action="store_true", help="one line in (standard input), one full line out")
    sub.add_argument("--latex", action="store_true", help="the working as LaTeX")
    sub.add_argument("--checkpoint", default="tinyllm.pt", help="model to ask")

    sub = command("look", command_look)
    sub.add_argument("problem", help='such as "12+39"')
    sub.add_argument("--layer", type=int, help="one layer, 1 or more; none: the largest weight of all")
    sub.add_argument("--head", type=int, help="one head, 1 or more; none: the largest weight of all")
    sub.add_argument("--checkpoint", default="tinyllm.pt", help="model to look into")

    sub = command("serve", command_serve)
    sub.add_argument("--port", type=int, default=8000, help="port to listen on")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on")
    sub.add_argument("--open", action="store_true", help="open the page in the browser")
    sub.add_argument("--checkpoint", default="tinyllm.pt", help="model to talk to")

    sub = command("bench", command_bench)
    sub.add_argument("--seconds", type=float, default=15.0, help="how long to train")

    sub = command("data", command_data)
    sub.add_argument("--kind", choices=list(KINDS), help="kind of problem; none: all of them")
    sub.add_argument("--split", default="train", choices=["train", "test"], help="side of the split")
    sub.add_argument("--count", type=int, default=10, help="lines to print")
    sub.add_argument("--seed", type=int, default=0, help="chooses the problems")
    sub.add_argument("--working", action=argparse.BooleanOptionalAction, default=True, help="with the working")
    return parser


def main(argv=None):
    """Run a command; returns the exit status: 0 fine, 1 below --target, 2 bad input, 130 Ctrl-C."""
    try:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # a byte that is no text is an unknown character, not a crash
        parser = make_parser()
        args = parser.parse_args(argv)
        if "function" not in args:
            parser.print_help()
            return 0
        return args.function(args)
    except InputError as error:
        print(f"tinyllm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntinyllm: stopped; a training run was saved, go on with it by --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:                          # the reader has gone, as in `ask --plain | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


######## The page of Step 7-3 ###################################################################################

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tinyllm</title>
<style nonce="NONCE">
:root { color-scheme: light; --paper: #fbfaf7; --ink: #1d1d1f; --soft: #5c5c63; --line: #d8d5cc; --accent: #0b57a4;
  --good: #17652a; --bad: #a8161b; --look: 214 120 0;
  --c0: #0b57a4; --c1: #b3400a; --c2: #17652a; --c3: #8a1f7a; --c4: #6b5b00; --c5: #a8161b; }
@media (prefers-color-scheme: dark) { :root { color-scheme: dark; --paper: #17181b; --ink: #ececec; --soft: #a5a7ae; --line: #3a3c42;
  --accent: #86b9f5; --good: #7fd193; --bad: #ff9a94; --look: 255 170 60;
  --c0: #86b9f5; --c1: #ffab7a; --c2: #7fd193; --c3: #e6a0dc; --c4: #dcc95c; --c5: #ff9a94; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 46rem; background: var(--paper); color: var(--ink);
  font: 1.05rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0; } .soft, figcaption { color: var(--soft); font-size: .95rem; }
form { display: flex; gap: .5rem; margin: 1.2rem 0 .3rem; }
input, button, select { font: inherit; color: inherit; background: transparent; border: 1px solid var(--soft); border-radius: .4rem;
  padding: .45rem .7rem; }
input { flex: 1; min-width: 0; font-size: 1.25rem; } button { cursor: pointer; } form button { background: var(--accent); color: var(--paper); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.few { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; } .few button { padding: .15rem .6rem; font-size: .95rem; }
#preview { min-height: 2.4rem; margin-top: .6rem; font-size: 1.3rem; } math { font-size: 1.15em; } mfrac > * { padding: .12em; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; } td { padding: .25rem .35rem; vertical-align: baseline; white-space: nowrap; }
td:first-child { text-align: right; } .true { color: var(--good); } .false { color: var(--bad); font-weight: 700; }
.verdict { font-size: .9rem; padding-left: 1.2rem; position: sticky; right: 0; background: var(--paper); } #answer { font-size: 2.4rem; margin: .6rem 0 0; }
#written { font: 1.15rem/2 ui-monospace, monospace; } #written span { padding: .2rem .08rem; border-radius: .2rem; }
#written [tabindex] { cursor: pointer; border-bottom: 2px solid var(--line); } #written .now { border-color: var(--accent); font-weight: 700; }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; font: 15px system-ui, sans-serif; fill: var(--ink); }
.grid { stroke: var(--line); } .line { fill: none; stroke-width: 2.5; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); stroke-dasharray: 8 3; } .c2 { stroke: var(--c2); stroke-dasharray: 2 3; }
.c3 { stroke: var(--c3); stroke-dasharray: 12 4; } .c4 { stroke: var(--c4); stroke-dasharray: 8 3 2 3; } .c5 { stroke: var(--c5); stroke-dasharray: 4 4; }
@media (max-width: 36rem) { #steps, #steps tbody { display: block; } #steps tr { display: flex; flex-wrap: wrap; align-items: baseline; }
  #steps td:first-child { width: 100%; text-align: left; } #steps td:first-child:empty { display: none; }
  #steps td:nth-child(3) { flex: 1; overflow-x: auto; } svg { font-size: 19px; } }
</style>
</head>
<body>
<main>
<h1>tinyllm</h1>
<p class="soft">A small language model that learned school arithmetic from examples. It writes one character after another;
no calculator helps it. Whether a step is true is checked afterwards, exactly.</p>
<form id="form"><input id="problem" aria-label="Problem" autocomplete="off" autocapitalize="off" spellcheck="false" maxlength="400" autofocus
  placeholder="(12+3)*4-6"><button>Ask</button></form>
<div id="preview" aria-hidden="true"></div>
<div class="few" id="examples"><span class="soft">Try</span></div>
<p id="message" role="alert" class="false"></p>
<section id="result" hidden aria-live="polite">
  <p id="answer"></p><p id="judgement"></p><p id="note" class="soft"></p>
  <h2>Its working</h2>
  <div class="scroll" tabindex="0" role="region" aria-label="Working, a step a line"><table id="steps"></table></div>
  <p class="few"><button id="latex" type="button">Copy LaTeX</button><button id="text" type="button">Copy text</button>
    <span id="copied" role="status" class="soft"></span></p>
  <h2>What it looked at</h2>
  <p class="soft">Point at a character that it wrote, or move with the arrow keys: the darker an earlier character, the more the model
    looked at it while it wrote this one. Numbers are written from the ones place, terms from their letter.</p>
  <p class="few"><label>Layer <select id="layer"><option value="">all</option>LAYERS</select></label>
    <label>Head <select id="head"><option value="">all</option>HEADS</select></label></p>
  <p id="written" role="group" aria-label="The line, character by character"></p>
  <p id="choice" role="status"></p>
</section>
<section id="past" hidden><h2>Asked before</h2><div class="few" id="asked"></div></section>
<section><h2>How it learned</h2>FIGURE</section>
</main>
<script nonce="NONCE">
"use strict";
const $ = id => document.getElementById(id), input = $("problem"), asked = [];
let reply = null, now = 0, walk = 0, typed = 0;

async function post(body) {
  const answer = await fetch("/solve", {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});
  const data = await answer.json();
  if (!answer.ok) throw new Error(data.error);
  return data;
}

function add(parent, tag, text, attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent.append(element);
  return element;
}

function button(parent, problem) {
  add(parent, "button", problem, {type: "button"}).onclick = () => { input.value = problem; ask(problem); input.focus(); };
}

async function ask(problem, remember = true) {
  $("message").textContent = "";
  typed++;
  try { reply = await post({problem}); } catch (error) {
    $("result").hidden = true;
    $("message").textContent = error.message;
    return;
  }
  if (remember) history.pushState(null, "", "/?q=" + encodeURIComponent(problem));
  if (!asked.includes(problem)) { asked.push(problem); button($("asked"), problem); }
  walk = asked.length;
  $("past").hidden = false;
  const last = reply.steps[reply.steps.length - 1];
  $("preview").innerHTML = `<math>${reply.problem}</math>`;
  $("answer").innerHTML = `<math>${last ? last.mathml : ""}</math>`;
  $("judgement").textContent = reply.right ? "Check: the answer is right." : "Check: this is NOT the right answer.";
  $("judgement").className = String(reply.right);
  $("note").textContent = reply.note;
  $("steps").replaceChildren();
  reply.steps.forEach((step, i) => {
    const row = $("steps").insertRow();
    row.insertCell().innerHTML = i ? "" : `<math>${reply.problem}</math>`;
    row.insertCell().textContent = "=";
    row.insertCell().innerHTML = `<math displaystyle="true">${step.mathml}</math>`;
    add(row, "td", step.true ? "true" : "NOT TRUE", {class: "verdict " + step.true});
  });
  $("written").replaceChildren();
  now = reply.start;
  const shown = [...reply.line, "\\u2190end"], tokens = shown.map((_, i) => reply.place.indexOf(i));
  shown.forEach((character, i) => {
    const t = tokens[i], span = add($("written"), "span", character);
    span.dataset.t = t;
    if (t < reply.start) return;
    span.tabIndex = t === now ? 0 : -1;
    span.onmouseenter = span.onfocus = () => point(t);
  });
  $("result").hidden = false;
  point(now);
}

function point(t) {
  now = t;
  const rows = reply.weights[t - reply.start], layer = $("layer").value, head = $("head").value;
  const some = rows.filter((_, i) => layer === "" || i == layer).flatMap(heads => heads.filter((_, i) => head === "" || i == head));
  for (const span of $("written").children) {
    const s = +span.dataset.t, weight = s < t ? Math.max(...some.map(row => +row[s])) : 0;
    span.style.backgroundColor = `rgb(var(--look) / ${weight / 12})`;
    span.className = s === t ? "now" : "";
    if (s >= reply.start) span.tabIndex = s === t ? 0 : -1;
  }
  $("choice").textContent = "Likeliest here: " + reply.next[t - reply.start].map(([c, p]) => `${c} ${(100 * p).toFixed(p < 0.9995 && p > 0.0005 ? 1 : 0)}%`).join(", ");
}

$("written").onkeydown = event => {
  const spans = [...$("written").querySelectorAll("[tabindex]")], at = spans.findIndex(span => +span.dataset.t === now);
  const next = spans[at + ({ArrowRight: 1, ArrowLeft: -1}[event.key] || 0)];
  if (next && next !== spans[at]) { event.preventDefault(); next.focus(); }
};
$("layer").onchange = $("head").onchange = () => point(now);
$("form").onsubmit = event => { event.preventDefault(); ask(input.value); };
input.onkeydown = event => {
  if (!["ArrowUp", "ArrowDown"].includes(event.key)) return;
  event.preventDefault();
  walk = Math.min(asked.length, Math.max(0, walk + (event.key === "ArrowUp" ? -1 : 1)));
  input.value = asked[walk] || "";
  input.oninput();
};
input.oninput = async () => {
  const turn = ++typed;
  let shown = "";
  try { shown = `<math>${(await post({problem: input.value, preview: true})).problem}</math>`; } catch (error) { /* not finished yet */ }
  if (turn === typed) $("preview").innerHTML = shown;
};
for (const [id, key] of [["latex", "latex"], ["text", "line"]]) $(id).onclick = async () => {
  try { await navigator.clipboard.writeText(reply[key]); $("copied").textContent = "copied"; }
  catch (error) { $("copied").textContent = "the browser does not allow it here"; }
};
function fromAddress() {
  const problem = new URLSearchParams(location.search).get("q");
  if (problem) { input.value = problem; ask(problem, false); }
}
window.onpopstate = fromAddress;
["(12+3)*4-6", "345*27", "1831/23", "48213-51786", "10/4", "3(2x-1)-2(x+4)", "(x+2)(x-3)"].forEach(problem => button($("examples"), problem));
fromAddress();
</script>
</body>
</html>
"""


if __name__ == "__main__":
    sys.exit(main())
