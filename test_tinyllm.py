"""The tests of tinyllm.py, in the order of the file. Each says which idea it pins; break the idea and it fails.

    python -m pytest                    within a minute and a half on two cores
    TINYLLM_SLOW=1 python -m pytest     also the long tests
"""

import doctest
import http.client
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F

import tinyllm
from tinyllm import Config, InputError, TinyLLM, encode, decode

HERE = Path(__file__).parent
slow = pytest.mark.skipif(not os.environ.get("TINYLLM_SLOW"), reason="set TINYLLM_SLOW=1 to run the long tests")
SMALL = dict(n_layer=2, n_head=2, head_dim=24, n_embd=32, block_size=128)


def small_model(**changes):
    """An untrained model with random weights everywhere: fresh blocks add nothing, which would hide mistakes."""
    torch.manual_seed(0)
    model = TinyLLM(Config(**{**SMALL, **changes})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def lines(kind, count, seed=0):
    rng = random.Random(seed)
    return [tinyllm.solve_by_rules(tinyllm.draw_problem(kind, rng, held_out=i % 2 == 0)) for i in range(count)]


def command(*args, stdin="", **environment):
    """Run the program as a person does; returns exit status, stdout, stderr."""
    done = subprocess.run([sys.executable, str(HERE / "tinyllm.py"), *map(str, args)], input=stdin.encode("utf-8"),
                          capture_output=True, env={**os.environ, **environment}, timeout=120)
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


######## Steps 1 and 2 ########

def test_every_example_in_the_file_is_true():
    """Documentation that is run cannot be wrong: all doctests, Step 1's five facts among them."""
    result = doctest.testmod(tinyllm)
    assert result.attempted > 40 and result.failed == 0


def test_an_untrained_model_knows_nothing():
    """The first loss is ln(vocabulary): each token is as likely as any other."""
    torch.manual_seed(0)
    x, y = next(iter(tinyllm.ProblemStream(Config())))
    loss = tinyllm.loss_of(TinyLLM(Config()), x, y).item()
    assert abs(loss - math.log(len(tinyllm.VOCAB))) < 0.15


def test_config_explains_itself():
    """A size that cannot work is refused with a sentence, not with a stack of shapes."""
    with pytest.raises(InputError, match="multiple of"):
        Config(head_dim=20)
    with pytest.raises(InputError, match="n_layer 0"):
        Config(n_layer=0)
    with pytest.raises(InputError, match="add sub mul div expr algebra"):
        Config(kinds="add calculus")


######## Step 3: the model ########

@pytest.mark.parametrize("kind", tinyllm.KINDS)
@pytest.mark.parametrize("ones_first", [True, False])
def test_tokenizer_round_trip(kind, ones_first):
    """Nothing is lost between text and tokens."""
    for line in lines(kind, 200):
        assert decode(encode(line, ones_first), ones_first) == line


def test_numbers_are_read_from_the_ones_place():
    """The tokens of 408 are 8, 0, 4, those of 48x^2 are 2, ^, x, 8, 4; signs and brackets stay where they are."""
    assert [tinyllm.VOCAB[i] for i in encode("-408*(12-7)")] == list("-804*(21-7)")
    assert [tinyllm.VOCAB[i] for i in encode("3(48x^2-xy+12)")] == list("3(2^x84-yx+21)")
    assert encode("408", ones_first=False) == encode("804")


def test_addresses_know_no_future():
    """The address of a token does not depend on it or on what follows, and no two tokens of a line share one."""
    for kind in tinyllm.KINDS:
        ids = torch.tensor([encode(line)[:60] + [0] * (60 - len(line)) for line in lines(kind, 50)])
        for whole, part in zip(tinyllm.positions(ids), tinyllm.positions(ids[:, :17])):
            assert torch.equal(whole[:, :18], part)
        addresses = torch.stack(tinyllm.positions(ids), -1).tolist()                   # (B, T + 1, 3)
        assert all(len(set(map(tuple, row))) == 61 for row in addresses)


def test_places_have_gaps_in_training():
    """Each row has a numbering of its own, in which equal places stay equal and higher ones higher; a third has no gaps."""
    torch.manual_seed(0)
    place = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 5]] * 3000)
    new = tinyllm.with_gaps(place, 3)
    assert torch.equal(new[:, :4], new[:, 4:8]) and (new[:, 0] == 1).all()
    assert set((new[:, 5:] - new[:, 4:-1]).flatten().tolist()) == {1, 2, 3}
    plain = (new == place).all(1).float().mean().item()
    assert 0.33 < plain < 0.45                       # largest gap 1: always; 2: one in 16; 3: one in 81
    assert torch.equal(tinyllm.with_gaps(place, 1), place)


def test_gaps_are_for_training_alone():
    """In training mode two passes differ, as the gaps do; a model in use is certain; without gaps there is no difference."""
    ids = torch.tensor([encode("123*456=")] * 8)
    model = small_model()
    assert torch.equal(model(ids), model(ids)) and (model(ids) == model(ids)[0]).all()
    assert not torch.allclose(model.train()(ids), model(ids), atol=1e-3)
    plain = small_model(gap=1)
    assert torch.equal(plain(ids), plain.train()(ids))


def test_half_the_bits_are_enough():
    """Where the processor is fast with bfloat16, the loss of a batch is that of float32 but for rounding."""
    torch.manual_seed(0)
    model = small_model()
    x, y = next(iter(tinyllm.ProblemStream(Config(**SMALL, batch_tokens=512))))
    exact = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100)
    assert abs(tinyllm.loss_of(model, x, y).item() / exact.item() - 1) < 0.02
    assert not tinyllm.has_fast_bfloat16("mps")


def test_rope_depends_on_distance_alone():
    """Moving query and key by the same number of columns does not change how well they agree."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 32).expand(2, 50, 32)
    turns = tinyllm.rotations(torch.arange(50), 16, 1000)
    scores = tinyllm.rotate(q, turns) @ tinyllm.rotate(k, turns).T                     # (50, 50)
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)
    assert not torch.allclose(scores[0, 0], scores[0, 7], atol=1e-2)


def test_attention_written_out_is_what_the_model_runs():
    """The formula of Step 3-3, which the model runs, is PyTorch's fused attention; for one cached token as well."""
    q, k, v = torch.randn(3, 2, 4, 9, 16)
    y, weights = tinyllm.attention(q, k, v)
    assert torch.allclose(y, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 9)) and weights.triu(1).max() == 0
    last = F.scaled_dot_product_attention(q[:, :, -1:], k, v)
    assert torch.allclose(tinyllm.attention(q[:, :, -1:], k, v)[0], last, atol=1e-5)


def test_causality():
    """A later token changes no earlier logit: the model cannot read the answer it is asked for."""
    model = small_model()
    ids = torch.tensor([encode("12*34=12*30+12*4")])
    changed = ids.clone()
    changed[0, 9] = encode("7")[0]
    before, after = model(ids), model(changed)
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-5)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-2)


def test_cache_changes_nothing():
    """Keys and values that are kept give the logits of the whole row, column by column."""
    model = small_model()
    ids = torch.tensor([encode("12*34=12*30+12*4"), encode("987-6543=-5556+1")])
    cache = [[] for _ in model.blocks]
    one_by_one = torch.cat([model(ids[:, :t], cache) for t in range(1, ids.shape[1] + 1)], dim=1)
    assert torch.allclose(one_by_one, model(ids), atol=1e-3)


######## Step 4: the data ########

def to_fraction(step):
    """The exact value of a step by Python's own parser: a second opinion, independent of tinyllm.parse."""
    assert re.fullmatch("[-+*/()0-9]+", step)
    return eval(re.sub("([0-9]+)", r"Fraction(\1)", step), {"Fraction": Fraction})


NUMERIC = [kind for kind in tinyllm.KINDS if kind != "algebra"]


@pytest.mark.parametrize("kind", NUMERIC)
def test_every_generated_line_is_true(kind):
    """10,000 lines of each kind: every step equals the problem, the last one is simple, and it fits the model."""
    for line in lines(kind, 10_000):
        problem, *steps = line.split("=")
        right = to_fraction(problem)
        assert steps and all(to_fraction(step) == right for step in steps), line
        assert re.fullmatch(r"-?[0-9]+([+-][0-9]+/[0-9]+)?|-?[0-9]+/[0-9]+", steps[-1]), line
        assert tinyllm.check(line) == (True, True), line
        assert len(line) < Config().block_size, line
        assert to_fraction(steps[-1]) == int(right) or Fraction(right).denominator > 1


class Polynomial(dict):
    """Letters -> factor, as in {"xx": 1, "": -4} for x^2-4; just enough arithmetic for a second opinion."""
    def __add__(self, other):
        total = {m: self.get(m, 0) + other.get(m, 0) for m in {*self, *other}}
        return Polynomial({m: n for m, n in total.items() if n})

    def __mul__(self, other):
        products = (Polynomial({"".join(sorted(m + k)): a * b}) for m, a in self.items() for k, b in other.items())
        return sum(products, Polynomial())

    def __neg__(self):
        return self * Polynomial({"": -1})

    def __sub__(self, other):
        return self + -other

    def __pow__(self, exponent):
        return self * self if exponent == 2 else None


def to_polynomial(step):
    """The exact polynomial of a step by Python's own parser, independent of tinyllm.parse."""
    assert re.fullmatch("[-+*()0-9xy^]+", step) and "^2" in step or "^" not in step
    tokens = re.findall(r"\^2|[0-9]+|.", step)
    python = []
    for before, token in zip([""] + tokens, tokens):
        if token in ("x", "y", "(") and re.fullmatch(r"[0-9]+|[xy)]|\^2", before):
            python.append("*")
        python.append({"^2": "**2"}.get(token, f'P({{"": {token}}})' if token.isdigit() else token))
    return eval("".join(python), {"P": Polynomial, "x": Polynomial(x=1), "y": Polynomial(y=1)})


def test_every_line_with_letters_is_true():
    """10,000 lines: every step is the same polynomial as the problem, and the answer is in canonical order."""
    zero = forms = 0
    for i, line in enumerate(lines("algebra", 10_000)):
        problem, *steps = line.split("=")
        right = {m: n for m, n in to_polynomial(problem).items() if n}
        assert steps and all({m: n for m, n in to_polynomial(step).items() if n} == right for step in steps), line
        assert len(line) < Config().block_size and (i % 10 or tinyllm.check(line) == (True, True)), line
        found = re.findall(r"(\d*)((?:[xy](?:\^2)?)+)|(\d+)", steps[-1])
        order = [tinyllm.MONOMIALS.index(re.sub(r"(.)\^2", r"\1\1", letters)) for _, letters, _ in found]
        assert order == sorted(set(order)) and not re.search("(?<![0-9])1[xy]|[+]-|[-]-", line), line
        zero += steps[-1] == "0"
        forms += "^2" in problem.split(")")[-1]
    assert zero > 20 and forms > 500


def test_nine_points_are_a_proof():
    """Two steps that agree at x, y = 0, 1, 2 agree everywhere; one wrong factor anywhere is noticed."""
    assert tinyllm.is_true("(x+y)^2=x^2+2xy+y^2") and tinyllm.is_true("x-x=0")
    for wrong in ("x^2+xy+y^2", "x^2+2xy+y^2+1", "x^2+2xy-y^2", "2x^2+2xy+y^2", "x^2+2xy+y^2+x", "0"):
        assert not tinyllm.is_true(f"(x+y)^2={wrong}")


def test_answers_are_in_lowest_terms():
    """A mixed number is simple only with a proper fraction that cannot be cancelled."""
    assert all(tinyllm.is_simple(text) for text in ("5", "-5", "0", "1/2", "-1/2", "3+1/2", "-3-1/2"))
    assert not any(tinyllm.is_simple(text) for text in ("2/4", "5/2", "3+2/4", "3+5/2", "4/2", "1+2", "2*3", "", "1+", "5/0"))


@pytest.mark.parametrize("line", [
    "(12+3)*4-6=15*4-6=60-6=54",
    "345*27=345*20+345*7=6000+900+(2100+315)=6900+2415=9315",
    "27*345=20*345+7*345=6000+900+(2100+315)=6900+2415=9315",
    "345*276=345*200+345*70+345*6=60000+9000+(21000+3150)+(1800+270)=69000+24150+2070=93150+2070=95220",
    "16*8=128",
    "-12*34=-(12*30+12*4)=-(360+48)=-408",
    "1831/23=70+(1831-1610)/23=70+221/23=70+8+(221-184)/23=78+37/23=78+1+(37-23)/23=79+14/23=79+2*7/23=79+14/23",
    "96/32=2+(96-64)/32=2+32/32=2+1=3",
    "1400/40=30+(1400-1200)/40=30+200/40=30+5+(200-200)/40=35+0/40=35+0=35",
    "162/7=20+(162-140)/7=20+22/7=20+3+(22-21)/7=23+1/7",
    "56/7=8",
    "5-1831/23=5-70-(1831-1610)/23=-65-221/23=-65-8-(221-184)/23=-73-37/23=-73-1-(37-23)/23=-74-14/23=-74-2*7/23=-74-14/23",
    "10/4=2+(10-8)/4=2+2/4=2+2/(2*2)=2+1/2",
    "4/8=2*2/(2*2*2)=1/2",
    "48/84=2*2*2*2*3/(2*2*3*7)=2*2/7=4/7",
    "-4/6=-2*2/(2*3)=-2/3",
    "3/8=3/(2*2*2)=3/8",
    "3/7=3/7",
    "(36/9)-31=4-31=-27",
    "5=5",
    "-(3+4)*2=-7*2=-14",
    "-7/2=-3-(7-6)/2=-3-1/2",
    "2*(4-7)=2*(-3)=-6",
    "8x+3-5y+2x-7=8x+2x-5y+3-7=10x-5y-4",
    "3(2x-1)-2(x+4)=6x-3-2x-8=6x-2x-3-8=4x-11",
    "(x+2)(x-3)=x^2-3x+2x-6=x^2-x-6",
    "(x+1)^2=x^2+x+x+1=x^2+2x+1",
    "(2x-1)^2=4x^2-2x-2x+1=4x^2-4x+1",
    "-(x-2)=-x+2",
    "3x-3x=0x=0",
    "5x-5x+2x-y+1=0x+2x-y+1=2x-y+1",
    "(x+y)(y-x)=xy-x^2+y^2-xy=-x^2+xy-xy+y^2=-x^2+0xy+y^2=-x^2+y^2",
    "x+2=x+2",
])
def test_the_notebook(line):
    """The working a pupil would write, for each rule."""
    assert tinyllm.solve_by_rules(line.split("=")[0]) == line


def test_text_and_tree_are_inverse():
    """Brackets are written where precedence needs them and nowhere else."""
    for line in lines("expr", 500) + lines("algebra", 500):
        for step in line.split("=")[1:]:
            assert tinyllm.to_text(tinyllm.parse(step)) == step
    assert tinyllm.to_text(tinyllm.parse("((1-(2-3)))")) == "1-(2-3)"


@pytest.mark.parametrize("text, words", [
    ("12+a", "unknown character 'a'.* x and y"), ("12+x\u00b3", "U\\+00B3 SUPERSCRIPT THREE"), ("(1+2", "closing bracket is missing"),
    ("1+2)", "opening bracket is missing"), ("1+", "at the end"), ("1++2", "character 3"), ("x2", "operator is missing"),
    ("3^2", "operator is missing"), ("(1+2)\u00b2", "only letters"), ("x^3", "only letters"), ("x*x*x", "more than two letters"),
    ("(2x+4)/2", "letters cannot be divided"), ("6/2(1+2)", "two ways"), ("(x+1)(", "at the end"),
    ("", "empty"), ("1 2+3", "space inside a number"), ("1/0", "division by zero"), ("3*(1/(2-2))", "division by zero"),
    ("1=1", "no '=' inside"), ("(" * 60 + "1" + ")" * 60, "nested deeper"), ("1+" * 200 + "1", "characters"),
    ("\u0661+1", "unknown character"), ("\ud800", "unknown character"), ("9" * 10_000, "characters"),
])
def test_bad_input_is_a_sentence(text, words):
    """What cannot be read is refused with the reason and the place."""
    with pytest.raises(InputError, match=words):
        tinyllm.prepare(text, small_model(block_size=256))


@pytest.mark.parametrize("text", ["12*34", " 12 * 34 = ", "12\u00d734", "\uff11\uff12\uff0a\uff13\uff14\uff1d", "012*0034"])
def test_forgiving_input(text):
    """Spaces, a trailing =, typographic signs and full-width forms leave no doubt about what is meant."""
    assert tinyllm.normalize(text) == "12*34"


@pytest.mark.parametrize("text, problem", [
    ("2*x", "2x"), ("x*2", "2x"), ("3 x", "3x"), ("x\u00b2 + \uff58", "x^2+x"), ("(x+2)*(x-3)", "(x+2)(x-3)"), ("2(3+4)", "2*(3+4)"),
    ("(x+1)*3", "3(x+1)"), ("(36/9)-31", "(36/9)-31"), ("x*y", "xy"), ("-1*(x-2)", "-1(x-2)"),
])
def test_letters_are_asked_as_they_were_learned(text, problem):
    """3*x, x*3 and 3 x are all the 3x of the training data."""
    assert tinyllm.prepare(text, small_model()) == problem


@pytest.mark.parametrize("a, b", [("12+39", "39+12"), ("7*8", "8*7"), ("5-3", "-3+5"), ("(1+2)*3+4", "4+3*(2+1)"),
                                  ("2*3*4", "4*2*3"), ("9-(2-1)", "9-2+1"), ("6/3+1", "1+6/3"), ("5-3x", "-3x+5"),
                                  ("(x+2)(x-3)", "(-3+x)(2+x)"), ("(x+1)^2", "(1+x)(x+1)"), ("-2*3+10", "10-3*2")])
def test_twins_share_their_side(a, b):
    """Held out means held out: a problem and its mirror image are never on different sides."""
    assert tinyllm.canonical(tinyllm.parse(a)) == tinyllm.canonical(tinyllm.parse(b))
    assert tinyllm.is_held_out(a) == tinyllm.is_held_out(b)


def test_training_never_sees_a_held_out_problem():
    """The stream itself, as it goes into the model, holds no problem of the evaluation, nor its twin."""
    by_kind = [tinyllm.held_out_problems(kind, 200) for kind in tinyllm.KINDS]
    assert all(len(set(problems)) == 200 for problems in by_kind)
    held_out = {tinyllm.canonical(tinyllm.parse(problem)) for problems in by_kind for problem in problems}
    seen, batches = set(), iter(tinyllm.ProblemStream(Config(kinds=" ".join(tinyllm.KINDS))))
    for x, _ in (next(batches) for _ in range(128)):
        for row in x.tolist():
            problem = decode(row).split("=")[0]
            assert not tinyllm.is_held_out(problem)
            seen.add(tinyllm.canonical(tinyllm.parse(problem)))
    assert len(held_out) > 1190 and len(seen) > 2000 and not seen & held_out


def test_split_is_the_same_everywhere():
    """The split is a property of the text: these stay on their sides on every machine and version, for ever."""
    sides = "".join(str(int(tinyllm.is_held_out(f"{a}*{b}"))) for a in range(10) for b in range(10))
    assert sides == "1010000000000000010010010000000010100010000100000000000000000000000000010000000000010000000000000000"


@pytest.mark.parametrize("kind", ["expr", "algebra"])
def test_practice_is_harder_than_the_test(kind):
    """Training draws more of what is hard than the evaluation asks, from the same problems."""
    def mean_size(practice):
        problems = [tinyllm.KINDS[kind].draw(random.Random(i), 4, practice) for i in range(1000)]
        assert max(tinyllm.kind_and_size(problem)[1] for problem in problems) <= 4
        return sum(tinyllm.kind_and_size(problem)[1] for problem in problems) / 1000
    assert mean_size(True) > mean_size(False) + 0.2


def test_lengths_are_even():
    """Short numbers are as common as long ones; carries, borrows and negative results are common too."""
    rng = random.Random(0)
    problems = [tinyllm.draw_problem("sub", rng, False) for _ in range(2000)]
    lengths = [len(re.findall("[0-9]+", problem)[0]) for problem in problems]
    assert all(150 < lengths.count(n) < 260 for n in range(2, 11))
    assert 0.3 < sum(to_fraction(problem) < 0 for problem in problems) / 2000 < 0.7


def test_x_y_and_what_counts():
    """y is x one token later, and only what stands after the first = counts."""
    x, y = tinyllm.to_example("12*34=360+48=408")
    whole = encode("12*34=360+48=408\n")
    assert x == whole[:-1] and y == [-100] * 5 + whole[6:]


def test_batches_hold_whole_lines_and_little_padding():
    """Rows of a batch are of like length, about batch_tokens in all; hardly any of it is padding."""
    batches = iter(tinyllm.ProblemStream(Config(), progress=lambda batch: 1.0))
    sizes, padding, shapes = [], 0, set()
    for x, y in (next(batches) for _ in range(64)):
        sizes.append(x.numel())
        padding += x.numel() - sum(len(decode(row).split("\n")[0]) for row in x.tolist())
        assert x.shape == y.shape
        shapes.add(x.shape)
    assert 0.9 * 2048 < sum(sizes) / 64 <= 2048 and padding / sum(sizes) < 0.1
    assert len(shapes) < 45                          # few, so that PyTorch meets them again


def test_small_problems_come_first():
    """The curriculum: pools early in the run hold mostly small problems, later ones all sizes."""
    def mean_size(pool):
        sizes = [tinyllm.kind_and_size(decode(x).split("=")[0])[1] for _, batch in pool for x, _ in batch]
        return sum(sizes) / len(sizes)
    stream = tinyllm.ProblemStream(Config())
    assert mean_size(stream.pool(0)) < 0.6 * mean_size(stream.pool(120))


def test_the_stream_can_start_anywhere():
    """Batch number n is the same whether the run got there in one go or was resumed; another seed is another stream."""
    whole = iter(tinyllm.ProblemStream(Config()))
    for _ in range(70):
        expected = next(whole)
    resumed = next(iter(tinyllm.ProblemStream(Config(), start=69)))
    assert all(torch.equal(a, b) for a, b in zip(expected, resumed))
    other = next(iter(tinyllm.ProblemStream(Config(seed=1), start=69)))
    assert expected[0].shape != other[0].shape or not torch.equal(expected[0], other[0])


######## Step 5: training ########

def test_one_batch_is_learned_by_heart():
    """The first thing to try with any network: if it cannot overfit one batch, something is broken."""
    torch.manual_seed(0)
    config = Config(n_layer=2, n_head=2, n_embd=64, batch_tokens=256)
    model = TinyLLM(config)
    optimizers = tinyllm.make_optimizers(model, config)
    x, y = next(iter(tinyllm.ProblemStream(config)))
    for _ in range(200):
        loss = tinyllm.loss_of(model, x, y)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert loss.item() < 0.02


def test_every_weight_is_trained_once():
    """Muon and AdamW share the parameters between them: none twice, none forgotten; without Muon AdamW has all."""
    for config in (Config(**SMALL), Config(**SMALL, muon=False)):
        model = TinyLLM(config)
        trained = [p for optimizer in tinyllm.make_optimizers(model, config)
                   for group in optimizer.param_groups for p in group["params"]]
        assert len(trained) == len(set(map(id, trained))) == len(list(model.parameters()))


def test_muon_is_pytorchs():
    """Our Muon takes the steps of torch.optim.Muon, which rounds to bfloat16: tall, wide and square matrices, three steps."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (8, 24), (8, 8))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    before = [p.detach().clone() for p in ours]
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    optimizers = tinyllm.Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, before):
        assert (a - b).norm() < 0.02 * (b - start).norm()


def test_an_orthogonal_step_is_as_long_in_all_directions():
    """Singular values from 0.003 to 1 come out between 0.6 and 1.3, and a gradient of zeros stays one."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 6)).Q for n in (20, 10))
    matrix = left @ torch.diag(torch.tensor([1.0, 0.5, 0.1, 0.03, 0.01, 0.003])) @ right.T       # (20, 10)
    made = tinyllm.orthogonal(matrix)
    lengths = torch.diag(left.T @ made @ right)
    assert 0.6 < lengths.min() and lengths.max() < 1.3
    assert torch.allclose(left @ torch.diag(lengths) @ right.T, made, atol=2e-3)                 # the same directions
    assert not tinyllm.orthogonal(torch.zeros(4, 6)).any()


@pytest.fixture
def only_short_sums(monkeypatch):
    """Sums of two numbers of one or two digits, and nothing else."""
    def draw(rng, top, practice):
        return f"{rng.randrange(10 ** top)}+{rng.randrange(10 ** top)}"
    monkeypatch.setattr(tinyllm, "KINDS", {"add": tinyllm.Kind(draw, range(1, 3), 1.0)})


def test_a_small_model_learns_addition(only_short_sums, tmp_path):
    """From nothing to 100% of the held-out one-digit sums, which it never saw, in half a minute."""
    began = time.perf_counter()
    config = Config(n_layer=2, n_head=4, head_dim=16, n_embd=64, steps=1000, batch_tokens=512, kinds="add")
    model = tinyllm.train(config, str(tmp_path / "model.pt"), report=lambda text: None)
    problems = tinyllm.held_out_problems("add", 10, size=1)
    before = tinyllm.evaluate(TinyLLM(config).eval(), problems)
    after = tinyllm.evaluate(model, problems)
    assert len(problems) > 3 and before["answers"] == 0
    assert after["answers"] == after["workings"] == len(problems), after["wrong"]
    assert time.perf_counter() - began < 60          # 8 s on a quiet machine


@slow
def test_the_default_model_learns_every_kind(tmp_path, monkeypatch):
    """A fifth of the default run answers most held-out sums, many longer than any it saw, and something of every kind."""
    monkeypatch.setattr(tinyllm.Monitor, "N_PROBLEMS", 3)                                        # its rows are not asked for
    model = tinyllm.train(Config(steps=2150), str(tmp_path / "model.pt"), report=lambda text: None)
    right = {kind: tinyllm.evaluate(model, tinyllm.held_out_problems(kind, 200, seed=2))["answers"] / 200
             for kind in tinyllm.KINDS}
    right["12 digits"] = tinyllm.evaluate(model, tinyllm.held_out_problems("add", 200, size=12))["answers"] / 200
    assert right["add"] > 0.7 and right["12 digits"] > 0.4 and min(right.values()) > 0.1, right


def test_resume_is_the_same_run(only_short_sums, tmp_path, monkeypatch):
    """Stopped after 0 or 20 of 40 steps and resumed, a run ends with bit for bit the weights of one that never stopped."""
    monkeypatch.setattr(tinyllm.Monitor, "N_PROBLEMS", 3)
    config = Config(**SMALL, steps=40, batch_tokens=128, kinds="add")
    whole = tinyllm.train(config, str(tmp_path / "whole.pt"), report=lambda text: None)
    path = tmp_path / "half.pt"
    save = tinyllm.save_checkpoint

    def save_and_stop(*args):
        save(*args)
        if args[3] == 20:
            raise KeyboardInterrupt
    monkeypatch.setattr(tinyllm, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        tinyllm.train(config, str(path), report=lambda text: None)
    monkeypatch.setattr(tinyllm, "save_checkpoint", save)
    half = tinyllm.read_checkpoint(path)
    assert half["step"] == 20
    resumed = tinyllm.train(Config(**half["config"]), str(path), resume=half, report=lambda text: None)
    torch.manual_seed(config.seed)
    tinyllm.save_checkpoint(path, TinyLLM(config))   # what the command saves before the first step
    begun = tinyllm.train(config, str(path), resume=tinyllm.read_checkpoint(path), report=lambda text: None)
    for (name, a), b, c in zip(whole.state_dict().items(), resumed.state_dict().values(), begun.state_dict().values()):
        assert torch.equal(a, b) and torch.equal(a, c), name


def test_saved_and_loaded_it_gives_the_same_answers(tmp_path):
    """A checkpoint is the whole model."""
    model, path = small_model(), tmp_path / "model.pt"
    tinyllm.save_checkpoint(path, model)
    problems = [line.split("=")[0] for line in lines("mul", 20)]
    assert tinyllm.solve(tinyllm.load_checkpoint(path), problems) == tinyllm.solve(model, problems)
    assert os.listdir(tmp_path) == ["model.pt"]


def damaged_checkpoints(good, folder):
    """Every way in which a file can be no checkpoint of ours: name -> bytes."""
    data, checkpoint = good.read_bytes(), torch.load(good)
    files = {"empty.pt": b"", "text.pt": b"hello" * 100, "random.pt": random.Random(0).randbytes(5000)}
    files.update({f"cut{i}.pt": data[:len(data) * i // 21] for i in range(1, 21)})
    weights = checkpoint["model"]
    for name, value in {
        "evil.pt": {"format": 1, "x": Evil(folder / "ran")},
        "list.pt": [1, 2, 3],
        "config.pt": {**checkpoint, "config": {"n_layer": "many"}},
        "shapes.pt": {**checkpoint, "config": {**checkpoint["config"], "n_embd": 64}},
        "half.pt": {**checkpoint, "model": dict(list(weights.items())[:5])},
        "newer.pt": {**checkpoint, "format": 99, "config": {"a_new_idea": 1}},
        "letters.pt": {**checkpoint, "vocabulary": "abc"},
        "nan.pt": {**checkpoint, "model": {name: tensor * float("nan") for name, tensor in weights.items()}},
    }.items():
        torch.save(value, folder / "some.pt")
        files[name] = (folder / "some.pt").read_bytes()
    return files


def test_what_is_no_checkpoint_is_refused(tmp_path):
    """Missing, empty, cut off anywhere, foreign, newer, of other shapes, NaN, or a pickle that would run code: a sentence each."""
    good = tmp_path / "good.pt"
    tinyllm.save_checkpoint(good, small_model())
    for name, data in damaged_checkpoints(good, tmp_path).items():
        (tmp_path / name).write_bytes(data)
        words = {"newer.pt": "another version", "letters.pt": "another version", "nan.pt": "not numbers"}.get(name, "damaged")
        with pytest.raises(InputError, match=f"{name} .*{words}"):
            tinyllm.load_checkpoint(tmp_path / name)
    with pytest.raises(InputError, match="there is no checkpoint"):
        tinyllm.load_checkpoint(tmp_path / "missing.pt")
    assert not (tmp_path / "ran").exists()


class Evil:
    """Unpickling this would create a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    """A run that blows up stops with a sentence, and the file keeps the last good state."""
    path, model = tmp_path / "model.pt", small_model()
    tinyllm.save_checkpoint(path, model)
    before = path.read_bytes()
    model.head.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="keeps the last good state"):
        tinyllm.save_checkpoint(path, model)
    with pytest.raises(InputError, match="training stopped"):
        tinyllm.train(Config(**SMALL, steps=50, batch_tokens=128, lr=1e30, adam_lr=1e30), path, report=lambda text: None)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files as Linux and macOS do")
def test_a_full_disk_loses_nothing(tmp_path):
    """No room for the new file, or a folder that is not ours: a sentence, status 2, and the old file is whole."""
    path = tmp_path / "model.pt"
    tinyllm.save_checkpoint(path, small_model())
    before = path.read_bytes()
    limited = f"""import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.path.insert(0, {str(HERE)!r})
import tinyllm
sys.exit(tinyllm.main(["train", "--force", "--steps", "1", "--out", {str(path)!r}]))"""
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.startswith("tinyllm: cannot write") and done.stderr.count("\n") == 1
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.pt"]


def run_that_saves_all_the_time(path, **size):
    """A process that trains and saves at every step, over and over."""
    program = f"""import sys
sys.path.insert(0, {str(HERE)!r})
import tinyllm
tinyllm.Monitor.N_PROBLEMS = 0
tinyllm.Monitor.row = lambda *_: {{}}
for start in range(10, 10 ** 6, 10):
    config = tinyllm.Config(**{size!r}, steps=start, batch_tokens=128, kinds="add")
    resume = tinyllm.read_checkpoint({str(path)!r}) if start > 10 else None
    tinyllm.train(config, {str(path)!r}, resume=resume, report=lambda text: None)
    print(start, flush=True)"""
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@slow
def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    """SIGKILL at 30 random moments of a run that saves all the time: each time the file loads, and the run can go on."""
    path, rng, steps = tmp_path / "model.pt", random.Random(0), set()
    for _ in range(30):
        process = run_that_saves_all_the_time(path, **SMALL)
        assert process.stdout.readline() == "10\n", process.stderr.read()
        time.sleep(rng.random())
        process.kill()
        process.wait()
        checkpoint = tinyllm.read_checkpoint(path)
        steps.add(checkpoint["step"])
        config = Config(**{**checkpoint["config"], "steps": checkpoint["step"] + 1})
        tinyllm.train(config, str(path), resume=checkpoint, report=lambda text: None)
        assert tinyllm.read_checkpoint(path)["step"] == checkpoint["step"] + 1
    assert len(steps) > 10                           # the moments did differ


@slow
def test_two_runs_with_one_file_do_not_damage_it(tmp_path):
    """Two processes save to the same --out at once: whoever comes last wins, and the file is whole at every moment."""
    path = tmp_path / "model.pt"
    runs = [run_that_saves_all_the_time(path, **SMALL) for _ in range(2)]
    try:
        for run in runs:
            assert run.stdout.readline() == "10\n"
        began = time.perf_counter()
        while time.perf_counter() - began < 5:
            assert tinyllm.read_checkpoint(path)["step"] > 0
        assert all(run.poll() is None for run in runs)
    finally:
        for run in runs:
            run.kill()


@pytest.mark.skipif(os.name == "nt", reason="sends Ctrl-C as Linux and macOS do")
def test_ctrl_c_saves(tmp_path):
    """Ctrl-C while it trains: saved, status 130, and --resume goes on with the next step."""
    path = tmp_path / "model.pt"
    program = [sys.executable, str(HERE / "tinyllm.py"), "train", "--out", str(path), "--n_layer", "1", "--n_embd", "16",
               "--n_head", "2", "--batch_tokens", "128", "--kinds", "add"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().lstrip().startswith("step"):
        pass
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    step = tinyllm.read_checkpoint(path)["step"]
    assert process.returncode == 130 and "--resume" in err and "Traceback" not in err and step > 0
    status, _, err = command("train", "--resume", "--steps", step + 1, "--out", path)
    assert status == 0 and tinyllm.read_checkpoint(path)["step"] == step + 1, err


PART = """import os, sys, torch
sys.path.insert(0, {here!r})
import tinyllm
loss_of, x_and_y = tinyllm.loss_of, []
def note(model, x, y):
    x_and_y.append((x, y))
    return loss_of(model, x, y)
tinyllm.loss_of = note
config = tinyllm.Config(**{size!r}, steps=3, batch_tokens=256, gap=1)
model = tinyllm.train(config, {folder!r} + "/model.pt", report=lambda text: None)
torch.save((model.state_dict(), x_and_y), {folder!r} + f"/rank{{tinyllm.RANK}}.pt")
"""


@slow
def test_two_processes_are_one_run_with_a_larger_batch(tmp_path, monkeypatch):
    """torchrun: both end with the same weights, those of one process with the joint batches; neither sees a held-out problem."""
    script = tmp_path / "part.py"
    script.write_text(PART.format(here=str(HERE), size=SMALL, folder=str(tmp_path)), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)],
                          capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    (a, seen_a), (b, seen_b) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    joint = []
    for batches in zip(seen_a, seen_b):
        T = max(x.shape[1] for x, _ in batches)
        joint.append([torch.cat([F.pad(part, (0, T - part.shape[1]), value=fill) for part in parts])
                      for parts, fill in zip(zip(*batches), (tinyllm.END, -100))])
    problems = [{decode(row).split("=")[0] for x, _ in seen for row in x.tolist()} for seen in (seen_a, seen_b)]
    assert not any(tinyllm.is_held_out(problem) for problem in problems[0] | problems[1])
    assert len(problems[0] & problems[1]) < 0.1 * len(problems[0])
    monkeypatch.setattr(tinyllm.ProblemStream, "__iter__", lambda self: iter(joint * 2))
    config = Config(**SMALL, steps=3, batch_tokens=256, gap=1)
    one = tinyllm.train(config, str(tmp_path / "one.pt"), report=lambda text: None).state_dict()
    assert all(torch.allclose(one[name], a[name], atol=2e-4) for name in a)


@slow
def test_torchrun_from_the_command_line(tmp_path):
    """`torchrun tinyllm.py train`: one process prints and saves, and the checkpoint is like any other."""
    path = tmp_path / "model.pt"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(HERE / "tinyllm.py"), "train", "--steps", "10", "--out", str(path), "--n_layer", "1", "--n_embd", "16",
                           "--n_head", "2", "--batch_tokens", "128"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.count("Before training") == 1 and "2 processes" in done.stdout, done.stderr
    assert tinyllm.read_checkpoint(path)["step"] == 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
def test_a_gpu_gives_the_same_answers(tmp_path):
    """Trained on a GPU in bfloat16, saved, and asked on both: the same text."""
    path = tmp_path / "model.pt"
    model = tinyllm.train(Config(steps=30), str(path), device="cuda", report=lambda text: None)
    problems = tinyllm.held_out_problems("add", 50, size=2)
    same = [a == b for a, b in zip(tinyllm.solve(model, problems), tinyllm.solve(tinyllm.load_checkpoint(path), problems))]
    assert sum(same) >= 45                           # near a tie, rounding may choose the other digit


######## Step 6: evaluation ########

def test_greedy_decoding_by_hand():
    """generate, with its cache and its shrinking batch, writes token for token what the plain loop writes."""
    model = small_model()
    prompts = [encode(text) for text in ("1+2=", "12*34=", "7=", "99999-1=")]
    for prompt, written in zip(prompts, tinyllm.generate(model, prompts, 40)):
        ids = list(prompt)
        while len(ids) < 40:
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
            if ids[-1] == tinyllm.END:
                ids.pop()
                break
        assert written == ids


def test_answers_do_not_depend_on_company_or_order():
    """A problem gets the same line alone, among others, and in any order."""
    model = small_model()
    problems = [line.split("=")[0] for kind in tinyllm.KINDS for line in lines(kind, 6) if len(line) < 90]
    together = tinyllm.solve(model, problems)
    assert together == [tinyllm.solve(model, [problem])[0] for problem in problems]
    assert together[::-1] == tinyllm.solve(model, problems[::-1], batch_size=7)
    assert all(line.startswith(problem + "=") for line, problem in zip(together, problems))


def test_no_calculator():
    """Decoding never touches the rules: with every rule broken, the model writes the same line."""
    model, problems = small_model(), ["12*34", "7/2", "5-9"]
    expected = tinyllm.solve(model, problems)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("rewrite", "value", "solve_by_rules", "parse", "is_true"):
            patch.setattr(tinyllm, name, None)
        assert tinyllm.solve(model, problems) == expected


def test_check_is_strict():
    """An answer is right only if it is simple and equal; a working only if every step is."""
    assert tinyllm.check("12+39=51") == (True, True)
    for line in ("12+39=41", "12+39=", "12+39", "12+39=50+1", "12+39=51=", "10/4=5/2", "12+39=51=51+", "1/0=0"):
        assert tinyllm.check(line)[0] is False, line
    assert tinyllm.check("12+39=50=51") == (True, False)


######## Step 7: going further ########

@pytest.mark.parametrize("step, latex", [
    ("-408", "-408"), ("12*34", r"12 \times 34"), ("1831/23", r"1831 \div 23"), ("14/23", r"\frac{14}{23}"), ("-2/3", r"-\frac{2}{3}"),
    ("79+14/23", r"79\frac{14}{23}"), ("-3-1/2", r"-3\frac{1}{2}"), ("5-3+1/2", r"5-3+\frac{1}{2}"), ("5-1/2", r"5-\frac{1}{2}"),
    ("70+(1831-1610)/23", r"70+(1831-1610) \div 23"), ("70+221/23", r"70+221 \div 23"), ("(36/9)-31", r"(36 \div 9)-31"),
    ("2*(3+1/2)", r"2 \times \left(3\frac{1}{2}\right)"), ("((1/2))", r"\left(\left(\frac{1}{2}\right)\right)"), ("5*(-3)", r"5 \times (-3)"),
    ("2*2*3/(3*7)", r"\frac{2 \times 2 \times 3}{3 \times 7}"), ("79+2*7/23", r"79\frac{2 \times 7}{23}"),
    ("3x^2-xy", "3x^{2}-xy"), ("(2x-1)^2", "(2x-1)^{2}"), ("2(x+3)(y-1)", "2(x+3)(y-1)"), ("-(x-2)", "-(x-2)"), ("-x", "-x"),
])
def test_latex_of_every_construct(step, latex):
    """What a teacher would write on the board, for each construct."""
    assert tinyllm.typeset(step, 0) == latex


def test_latex_and_mathml_of_any_working_are_well_formed():
    """1,000 workings: braces and tags balance, no raw * or /, nothing is lost on the way."""
    for line in (line for kind in tinyllm.KINDS for line in lines(kind, 200)):
        latex, mathml = tinyllm.to_latex(line), tinyllm.to_mathml(line)
        assert latex.count("{") == latex.count("}") and latex.count(r"\left(") == latex.count(r"\right)")
        assert not re.search("[*/]", latex.replace("{align*}", "")) and latex.count("&=") == line.count("=") and latex.isascii()
        root = ElementTree.fromstring(mathml)
        assert len(root.findall("./mtable/mtr")) == line.count("=") and not re.search("[*/]", "".join(root.itertext()))
        assert [node.text for node in root.iter("mn")] == re.findall("[0-9]+", line), line
        for fraction in root.iter("mfrac"):
            assert len(fraction) == 2
        for square in root.iter("msup"):
            assert len(square) == 2 and square[1].text == "2"


def test_what_cannot_be_read_is_still_typeset():
    """A model may write nonsense; it is shown as it is, in both languages."""
    assert tinyllm.to_latex("1+2=3+^=3").count("&=") == 2
    ElementTree.fromstring(tinyllm.to_mathml("1+2=3+^=3"))


def test_look_shows_the_weights_of_the_model():
    """Each row of the picture is a distribution over the characters before it; one head shows less than all."""
    model = small_model()
    line = "12+39=51"
    picture = tinyllm.look(model, line).splitlines()
    assert picture[0].strip() == "21+93=15" and [row[:3].strip() for row in picture[1:]] == ["1", "5", "end"]
    assert [len(row) for row in picture[1:]] == [5 + 6, 5 + 7, 5 + 8]
    one = tinyllm.look(model, line, layer=1, head=2).splitlines()
    ramp = " .:-=+*#%@"
    assert all(ramp.index(a) >= ramp.index(b) for row, other in zip(picture[1:], one[1:]) for a, b in zip(row[5:], other[5:]))
    weights = model.blocks[0].attention.weights[0, 1]                                  # (T, T) of that head
    assert [ramp[min(9, int(10 * w))] for w in weights[5, :6].tolist()] == list(one[1][5:])
    with pytest.raises(InputError, match="layers 1 to 2"):
        tinyllm.look(model, line, layer=3)


@pytest.fixture(scope="module")
def page():
    """A served page with a small untrained model, on a free port: (host:port, request function)."""
    history = [{"step": i, "seconds": 6.0 * i, "loss": 2 / i, "exact": {kind: i / 10 for kind in tinyllm.KINDS}} for i in range(1, 11)]
    server = tinyllm.make_server(small_model(), history, port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"

    def request(method, path, body=None, **headers):
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request(method, path, body, {**headers})
        answer = connection.getresponse()
        text = answer.read().decode("utf-8")
        connection.close()
        return answer.status, answer.headers, text
    yield address, request
    server.shutdown()
    server.server_close()


def solve_body(problem, **more):
    return json.dumps({"problem": problem, **more})


def test_the_page_loads_nothing_from_elsewhere(page):
    """One document with a nonce for its own script and style; every other source is forbidden."""
    status, headers, text = page[1]("GET", "/?q=12%2B34")
    nonce = re.search("script-src 'nonce-([^']+)'", headers["Content-Security-Policy"])[1]
    assert status == 200 and text.count(f'nonce="{nonce}"') == 2 and "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.search("(src|href)=|https?://|@import|NONCE|FIGURE|LAYERS", text) and "12%2B34" not in text
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert page[1]("GET", "/")[1]["Content-Security-Policy"] != headers["Content-Security-Policy"]
    for chart in re.findall("<figure>.*?</figure>", text):
        ElementTree.fromstring(chart)
    assert text.count("<polyline") == 1 + len(tinyllm.KINDS)


@pytest.mark.parametrize("scheme", [0, 1])
def test_the_page_can_be_read(scheme):
    """Contrast as WCAG 2.1 AA asks, computed for the light and the dark colours: text 4.5 to 1, lines of a chart 3 to 1."""
    def luminance(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts))

    blocks = re.findall(r":root \{(.*?)\}", tinyllm.PAGE, re.S)
    colours = {}
    for block in blocks[:scheme + 1]:                # the dark colours replace the light ones
        colours.update(re.findall(r"--(\w+): (#\w{6})", block))
    paper = luminance(colours["paper"])
    contrast = {name: (max(luminance(c), paper) + 0.05) / (min(luminance(c), paper) + 0.05) for name, c in colours.items()}
    assert len(blocks) == 2 and len(colours) >= 13
    assert min(contrast[name] for name in ("ink", "soft", "accent", "good", "bad")) >= 4.5
    assert min(contrast[f"c{i}"] for i in range(6)) >= 3


def test_the_page_answers_a_problem(page):
    """What the page shows is the model's line, its exact check, and the weights and likeliest tokens behind it."""
    status, headers, text = page[1]("POST", "/solve", solve_body("48x \u2212 53x"))
    reply = json.loads(text)
    assert status == 200 and headers["Content-Type"].startswith("application/json")
    assert reply["line"] == tinyllm.solve(small_model(), ["48x-53x"])[0] and reply["right"] is False
    assert len(reply["steps"]) == reply["line"].count("=") and not all(step["true"] for step in reply["steps"])
    n_written = len(reply["line"]) + 1 - reply["start"]
    assert len(reply["weights"]) == len(reply["next"]) == n_written
    read = "".join(reply["line"][i] for i in reply["place"][:-1])
    assert tinyllm.reverse_terms(read) == reply["line"]
    for t, (layers, likeliest) in enumerate(zip(reply["weights"], reply["next"]), reply["start"]):
        assert [[len(head) for head in layer] for layer in layers] == [[t, t], [t, t]]
        if t < len(read):                            # greedy: what was written is what was likeliest
            assert likeliest[0][0] == read[t]
    assert json.loads(page[1]("POST", "/solve", solve_body("48x-53x", preview=True))[2]) == {"problem": tinyllm.typeset("48x-53x", 1)}


@pytest.mark.parametrize("method, path, body, headers, status", [
    ("GET", "/etc/passwd", None, {}, 404), ("POST", "/", "{}", {}, 404), ("PUT", "/", "{}", {}, 501),
    ("GET", "/", None, {"Host": "evil.example:8000"}, 403), ("GET", "/", None, {"Host": "evil.example"}, 403),
    ("GET", "/", None, {"Host": ""}, 403), ("POST", "/solve", "{}", {"Origin": "http://evil.example"}, 403),
    ("POST", "/solve", "{}", {"Origin": "null"}, 403), ("POST", "/solve", solve_body("1+1") + " " * 5000, {}, 413),
    ("POST", "/solve", "[" * 4000, {}, 400), ("POST", "/solve", "12+34", {}, 400), ("POST", "/solve", '{"problem": 12}', {}, 400),
    ("POST", "/solve", "{}", {"Content-Length": "-1"}, 411), ("POST", "/solve", b"\xff\xfe", {}, 400),
    ("POST", "/solve", solve_body("12+"), {}, 422), ("POST", "/solve", solve_body("1+" * 150 + "1"), {}, 422),
    ("POST", "/solve", solve_body("<script>"), {}, 422), ("POST", "/solve", solve_body("1/0"), {}, 422),
])
def test_the_page_refuses(page, method, path, body, headers, status):
    """Foreign hosts and origins, other paths, long or broken requests, and what is no problem: a JSON sentence each."""
    found, answer_headers, text = page[1](method, path, body, **headers)
    assert found == status and set(json.loads(text)) == {"error"} and "<" not in text.replace("'<'", "")
    assert answer_headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_serves_many_at_once_and_survives_garbage(page, monkeypatch):
    """32 clients at once get their own answers, from few batches, while others stall, go away or send noise."""
    address, request = page
    solve, batches = tinyllm.solve, []

    def count(model, problems):
        batches.append(len(problems))
        return solve(model, problems)
    monkeypatch.setattr(tinyllm, "solve", count)
    host, port = address.split(":")
    stalled = [socket.create_connection((host, int(port))) for _ in range(8)]
    stalled[0].sendall(b"POST /solve HTTP/1.1\r\nHost: " + address.encode() + b"\r\nContent-Length: 50\r\n\r\nabc")
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda i: json.loads(request("POST", "/solve", solve_body(f"{i}+{i}"))[2]), range(32)))
    assert [reply["line"].split("=")[0] for reply in replies] == [f"{i}+{i}" for i in range(32)]
    assert sum(batches) == 32 and len(batches) < 32
    rng = random.Random(0)
    for i in range(500):
        noise = rng.randbytes(rng.randint(1, 300))
        with socket.create_connection((host, int(port))) as client:
            if i % 2:
                noise = b"POST /solve HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n" % (address.encode(), len(noise)) + noise
            client.sendall(noise if i % 2 else noise + b"\r\n\r\n")
            client.shutdown(socket.SHUT_WR)
            if i % 2:
                assert client.recv(1000).split()[1] == b"400"
    assert request("POST", "/solve", solve_body("1+1"))[0] == 200
    for client in stalled:
        client.close()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
def test_the_page_in_a_real_browser(page, tmp_path):
    """A browser that opens /?q=12%2B34 shows the model's answer in MathML, and the loss curve."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--disable-quic", f"--user-data-dir={tmp_path}"]
    done = subprocess.run([CHROMIUM, *flags, "--virtual-time-budget=8000", "--dump-dom", f"http://{page[0]}/?q=12%2B34"],
                          capture_output=True, timeout=100)
    dom = done.stdout.decode("utf-8")
    answer = tinyllm.solve(small_model(), ["12+34"])[0].split("=")[-1]
    assert re.search('<p id="answer"><math>(.*?)</math>', dom)[1] == tinyllm.typeset(answer, 1).replace("&#x2212;", "\u2212") \
        .replace("&#xD7;", "\u00d7").replace("&#xF7;", "\u00f7")
    assert "NOT the right answer" in dom and "<polyline" in dom and dom.count("data-t=") == 6 + len(answer) + 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    tinyllm.save_checkpoint(path, small_model(block_size=64))
    return path


def test_plain_in_order_with_errors_in_place(checkpoint):
    """One line in, one line out; a line that is no problem is an error there, and the others go on."""
    status, out, _ = command("ask", "--plain", "--checkpoint", checkpoint, stdin="1+2\n1/0\n\uff13\u00d74\nz\n5-6\n")
    rows = out.splitlines()
    assert status == 2 and [row.split("=")[0].split(":")[0] for row in rows] == ["1+2", "error", "3*4", "error", "5-6"]


def test_ask_shows_and_checks_each_step(checkpoint):
    """The working a step a line, each with a check that is labelled as one; an untrained model is found out."""
    status, out, _ = command("ask", "12+39", "--checkpoint", checkpoint)
    assert status == 0 and out.startswith("12+39 = ") and "check: NOT TRUE" in out


@pytest.mark.parametrize("args, words", [
    (["ask", "12+\u00b3"], "U+00B3"), (["ask", "(1+2"], "closing bracket"), (["ask", "1/(2-2)"], "division by zero"),
    (["ask", ""], "empty"), (["ask", "1+" * 30 + "1"], "characters"), (["ask", "1", "--checkpoint", "no.pt"], "no checkpoint"),
    (["train", "--minutes", "0"], "--minutes"), (["train", "--steps", "0"], "--steps 0"), (["frobnicate"], "invalid choice"),
    (["train", "--out", "no/such/folder/x.pt"], "cannot write"), (["train", "--steps", "many"], "invalid int"),
    (["eval", "--checkpoint", str(HERE / "README.md")], "damaged"), (["train", "--out", str(HERE)], "folder"),
])
def test_errors_are_sentences(args, words, checkpoint, capsys):
    """Bad input: one line on stderr, in ASCII for any console, that says what to do; status 2, no exception."""
    if args[0] == "ask" and "--checkpoint" not in args:
        args = [*args, "--checkpoint", str(checkpoint)]
    try:
        status = tinyllm.main(args)
    except SystemExit as stop:                       # how argparse ends
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2 and words in err and err.count("\n") == 1 and err.isascii()


def test_an_error_ends_the_process(checkpoint):
    """The same from outside, on a Japanese console: the status of the process, and no traceback."""
    status, out, err = command("ask", "12+\u00b3", "--checkpoint", checkpoint, PYTHONIOENCODING="cp932")
    assert status == 2 and not out and "U+00B3" in err and err.count("\n") == 1


ALPHABET = "0123456789+-*/()=xy^. \t\0\u00d7\u00b2\uff11\u0661\u2460\ud800\U0001f600"


def random_text(rng):
    """What nobody should type: any Unicode, near-misses of real problems, very long ones."""
    dice = rng.random()
    if dice < 0.3:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(30)))
    if dice < 0.6:
        return "".join(rng.choices(ALPHABET, k=rng.randrange(40)))
    text = list(tinyllm.draw_problem(rng.choice(list(tinyllm.KINDS)), rng, held_out=False))
    for _ in range(rng.randrange(4)):
        text[rng.randrange(len(text))] = rng.choice(ALPHABET)
    return "".join(text) * (rng.choice((100, 10_000)) if dice > 0.999 else 1)


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=slow)])
def test_any_text_is_a_problem_or_a_sentence(count):
    """Thousands of random texts: each becomes a problem that the parser reads back, or an InputError; nothing else."""
    rng, model, problems = random.Random(0), small_model(), []
    for text in [random_text(rng) for _ in range(count)] + ["(" * 10_000, "9" * 100_000, "-" * 100_000, "\0", "x" * 400]:
        try:
            problem = tinyllm.prepare(text, model)
        except InputError as error:
            assert "\n" not in str(error) and str(error).isascii() and len(str(error)) < 300
            continue
        assert tinyllm.prepare(problem, model) == problem and tinyllm.is_held_out(problem) in (True, False)
        problems.append(problem)
    assert len(problems) > count / 20
    some = problems[:count // 20]
    for problem, line in zip(some, tinyllm.solve(model, some)):
        assert line.startswith(problem + "=") and len(line) <= 128
        tinyllm.check(line), tinyllm.explain(line), tinyllm.to_latex(line), tinyllm.to_mathml(line)


@slow
def test_any_text_through_the_command(checkpoint, tmp_path):
    """20,000 random lines into `ask --plain`: a line for a line, no traceback; and a reader that leaves early harms nothing."""
    rng = random.Random(1)
    rows = [re.sub(r"[\r\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", " ", random_text(rng)) for _ in range(20_000)]
    data = "\n".join(rows).encode("utf-8", "surrogatepass") + b"\n\xff\xfe\n"
    ask = [sys.executable, str(HERE / "tinyllm.py"), "ask", "--plain", "--checkpoint", str(checkpoint)]
    done = subprocess.run(ask, input=data, capture_output=True, timeout=300)
    assert done.returncode == 2 and done.stdout.count(b"\n") == 20_001 and done.stderr == b""
    if os.name != "nt":
        done = subprocess.run(f"{' '.join(map(shlex.quote, ask))} | head -1", shell=True, input=data, capture_output=True, timeout=300)
        assert done.stdout.count(b"\n") == 1 and b"Traceback" not in done.stderr


def test_a_checkpoint_is_never_silently_replaced(checkpoint):
    """train refuses an --out that exists, and leaves it as it was."""
    before = checkpoint.read_bytes()
    status, _, err = command("train", "--steps", 1, "--out", checkpoint)
    assert status == 2 and "--resume" in err and "--force" in err and checkpoint.read_bytes() == before


def test_train_and_eval_as_a_person_runs_them(tmp_path):
    """A tiny run through the command line: before, rows, table, plot, next commands; eval and its target; resume."""
    path, size = tmp_path / "tiny.pt", ["--n_layer", 1, "--n_embd", 16, "--n_head", 2, "--batch_tokens", 128,
                                         "--block_size", 128, "--no-working", "--kinds", "sub mul", "--device", "cpu"]
    status, out, err = command("train", "--steps", 10, "--out", path, *size)
    assert status == 0, err
    for words in ("Before training", "parameters on cpu", "100%", "answers right", "+-----", "Now try", "tiny.pt"):
        assert words in out
    assert "\r" not in out and out.isascii()
    losses = [row["loss"] for row in tinyllm.read_checkpoint(path)["history"]]
    assert command("train", "--steps", 10, "--out", path, "--force", *size)[0] == 0
    assert losses == [row["loss"] for row in tinyllm.read_checkpoint(path)["history"]]
    status, out, err = command("train", "--steps", 12, "--out", path, "--resume")
    assert status == 0 and tinyllm.read_checkpoint(path)["step"] == 12, err
    status, out, _ = command("eval", "--checkpoint", path, "--problems", 3, "--target", 0.99, "--json", tmp_path / "e.json",
                             "--beyond")
    assert status == 1 and "sub 20" in out and "below the target" in out and "mul 4*" in out and "expr" not in out
    assert (tmp_path / "e.json").stat().st_size > 100


@slow
def test_bench_measures_this_machine():
    """The share of the machine's rate that training reaches, decoding with and without the cache, memory."""
    status, out, err = command("bench", "--seconds", 2)
    assert status == 0 and re.findall("^[a-z0-9]+", out, re.M) == ["machine", "float32", "training", "decoding", "decoding", "peak"], err


def test_data_is_what_the_model_learns_from():
    """`data` prints true lines of the side and kind that was asked for."""
    status, out, _ = command("data", "--kind", "mul", "--split", "test", "--count", 5)
    rows = out.split()
    assert status == 0 and len(rows) == 5
    assert all(tinyllm.is_true(row) and tinyllm.is_held_out(row.split("=")[0]) for row in rows)


######## README ########

def test_line_numbers_in_the_readme():
    """The README's plan names the line at which each step of the file begins."""
    source = (HERE / "tinyllm.py").read_text(encoding="utf-8").splitlines()
    plan = re.findall(r"\[line (\d+)\]\(tinyllm\.py#L(\d+)\) \| Step ([0-9-]+)", (HERE / "README.md").read_text(encoding="utf-8"))
    starts = {match[1]: str(i) for i, text in enumerate(source, 1) if (match := re.match(r"######## Step ([0-9-]+):", text))}
    assert {step: number for number, link, step in plan if number == link} == starts
