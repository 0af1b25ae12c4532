"""The ledger compared with sums made by hand, the memory of the loss and of layers, and sampling with a KV cache."""
import gc
import json
import weakref

import pytest
import torch
from conftest import make_data, make_folder
from runs import no_picture, run
from torch import nn

import data
import generate
import lora
import memory
from errors import UserError
from files import weights
from techniques import loss

FAMILIES = ("gpt2", "llama", "phi")
KB = 4 * 256  # a float32 tensor of 256 numbers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {f: str(make_folder(tmp_path_factory.mktemp("m") / f, f)) for f in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def talker(request, tmp_path_factory):
    """A random model that does not repeat one token for ever, as one with a tied head does: that would hide cache bugs."""
    model = weights.load(make_folder(tmp_path_factory.mktemp("talker"), request.param, tie_word_embeddings=False))
    if request.param == "gpt2":
        with torch.no_grad():
            model.ln_f.bias.sub_(1)  # the same change of logits at every position
            model.wpe.weight.mul_(12)
    if request.param == "phi":
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n.endswith("bias"):
                    p.sub_(1)
    return model


@pytest.fixture
def ledger():
    return memory.Ledger(nn.Module())


def made(ledger) -> int:
    """Bytes made and not freed. In forward nothing tells yet which tensors are activations."""
    return ledger.live["activations"] + ledger.live["temporaries"]


# ---------------------------------------------------------------------------------------------- the ledger

def test_peak_of_a_program_done_by_hand(ledger):
    before = torch.ones(256)  # made outside, so it is not counted
    with ledger:
        a = torch.ones(256)  # 1
        b = a * 2  # 2
        c = b.view(16, 16).t()[3:]  # a view: still 2
        del b  # its storage lives on in c
        assert made(ledger) == 2 * KB
        d = torch.cat([a, a])  # 4
        assert made(ledger) == ledger.peak == 4 * KB
        del a  # 3
        e = before + 1  # 4
        assert made(ledger) == ledger.peak == 4 * KB
        del d, c  # 1
        e += 1  # in place: still 1
        assert made(ledger) == KB
        f = torch.ones(3 * 256, dtype=torch.bfloat16)  # 1 + 1.5
        assert made(ledger) == 2.5 * KB
        del e, f
        assert ledger.live == dict.fromkeys(memory.CATEGORIES, 0) and not ledger.numbers
    assert ledger.peak == 4 * KB and ledger.at_peak == {**dict.fromkeys(memory.CATEGORIES, 0), "temporaries": 4 * KB}
    assert [sum(now.values()) / KB for now in ledger.splits()] == [1, 2, 4, 3, 4, 2, 1, 2.5, 1.5, 0]


def test_what_autograd_saves_is_counted_until_backward_frees_it(ledger):
    x = torch.ones(256, requires_grad=True)
    with ledger:
        y = (x.exp() * 2).exp()  # both exp keep their outputs; x.exp() * 2 lives only while the line runs
        assert made(ledger) == 2 * KB and ledger.peak == 3 * KB
        assert ledger.live["activations"] == 0  # it could still be freed before any backward
        y.sum().backward()
        assert ledger.live == {**dict.fromkeys(memory.CATEGORIES, 0), "activations": KB, "temporaries": KB}  # y and x.grad
        del y
        assert sum(ledger.live.values()) == KB  # x.grad
    assert 2 * KB < ledger.at_peak["activations"] <= 2 * KB + 8  # the two outputs, and a sum
    assert 4 * KB <= ledger.peak <= 5 * KB  # 2 saved, the gradients that come in and go out, a few scalars


class Two(nn.Module):
    """Two matrices; the first may be frozen."""

    def __init__(self, frozen=False):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)  # 1 KB each
        self.a.requires_grad_(not frozen)


def test_categories():
    model = Two()
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.ones(16, 16)

    def step(zero=True):
        model.b(model.a(x)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=zero)

    nothing = dict.fromkeys(memory.CATEGORIES, 0)
    wanted = {**nothing, "weights": 2 * KB, "gradients": 2 * KB, "optimizer": 4 * KB + 8}
    step(zero=False)  # AdamW's moments (and a step count, 4 bytes, for each matrix) and the gradients exist
    with memory.Ledger(model, optimizer) as found:
        assert found.live == wanted
    step()
    with memory.Ledger(model, optimizer) as ledger:
        model.b(model.a(x)).sum().backward()
        assert ledger.live == wanted
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert ledger.live["gradients"] == 0
    frozen = Two(frozen=True)
    with memory.Ledger(frozen) as ledger:
        frozen.b(frozen.a(x)).sum().backward()
        assert ledger.live == {**nothing, "weights": KB, "adapters": KB, "gradients": KB}


def test_the_split_at_the_peak_sums_to_the_peak(folders):
    for family in FAMILIES:
        for adapters in (True, False):
            model = weights.load(folders[family])
            if adapters:
                lora.inject(model)
            ledger = step_under_ledger(model)
            assert sum(ledger.at_peak.values()) == ledger.peak > 0 and min(ledger.at_peak.values()) >= 0
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert ledger.live["gradients"] == 4 * trainable  # beside the weights only these are left
            assert made(ledger) == ledger.live["loss"] == 0


def test_frozen_weights_and_adapters_are_the_bytes_that_count_counts(folders):
    for family in FAMILIES:
        for bits in (32, 16):
            model = weights.load(folders[family], bits=bits)
            stored = memory.count(model)["bytes"]  # a tied head once
            lora.inject(model, r=4)
            counted = memory.count(model)
            ledger = step_under_ledger(model, amp=bits == 16)
            assert ledger.at_peak["weights"] == stored
            assert ledger.at_peak["adapters"] == 4 * counted["trainable"] == counted["bytes"] - stored


def batch(rows=4, T=64):
    ids = torch.randint(0, 4096, (rows, T), generator=torch.Generator().manual_seed(0))
    return ids, torch.where(torch.arange(T) % 4 == 0, ids, loss.IGNORE)


def step_under_ledger(model, amp=False) -> memory.Ledger:
    model.train()
    ids, targets = batch()
    with memory.Ledger(model) as ledger:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            total = loss.sum_loss(model.hidden(ids), model.head, targets)
        total.backward()
        del total
    return ledger


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_layers_lowers_the_activations(family, folders, on_device):
    on_device(logits_chunk=4 * 4096)  # small, so that the layers make the peak, not the logits
    found = {}
    for n in (0, 1, 2, 3):
        model = lora.inject(weights.load(folders[family]))
        model.ckpt_every = n
        found[n] = step_under_ledger(model).at_peak["activations"]
    # N = 3 recomputes only the last layer. Backward begins there, while the other layers' activations still exist.
    assert found[1] < 0.6 * found[0] and found[1] < found[2] < 0.9 * found[0] and found[3] <= found[0], found


def test_the_ledger_keeps_nothing_alive():
    model = Two()
    with memory.Ledger(model) as ledger:
        t = torch.ones(256)
        storage, tensor = weakref.ref(t.untyped_storage()), weakref.ref(t)
        del t
        assert storage() is None and tensor() is None and made(ledger) == 0
        model.b(model.a(torch.ones(16, 16))).sum().backward()
        model.zero_grad(set_to_none=True)
        assert ledger.live["gradients"] == made(ledger) == 0
    parameter = weakref.ref(model.a.weight)
    model.a = model.b
    ledger.model = None
    gc.collect()
    assert parameter() is None


def test_the_ledger_changes_no_number_and_takes_its_hooks_away(folders):
    grads = []
    for watched in (False, True):
        model = lora.inject(weights.load(folders["llama"]), targets="all")
        torch.manual_seed(1)
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p)
        ids, targets = batch()
        with memory.Ledger(model) if watched else torch.enable_grad():
            loss.sum_loss(model.hidden(ids), model.head, targets).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        assert not [p for p in model.parameters() if p._post_accumulate_grad_hooks]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---------------------------------------------------------------------------------------------- counting, reading, saying

def test_count():
    model = Two(frozen=True)
    assert memory.count(model) == {"total": 512, "trainable": 256, "percent": 50.0, "bytes": 2048}
    model.a.to(torch.bfloat16)
    assert memory.count(model)["bytes"] == 1536
    model.b.weight = model.a.weight  # tied: counted once
    assert memory.count(model) == {"total": 256, "trainable": 0, "percent": 0.0, "bytes": 512}


def test_rss_peak_is_this_process():
    before = memory.rss_peak()
    assert 50e6 < before < 100e9
    block = torch.ones(int(before) // 4 + 10_000_000)  # more than has ever been resident
    assert memory.rss_peak() >= before + 40e6
    del block


def test_cuda_peak_is_none_elsewhere():
    assert memory.cuda_peak("cpu") is None


@pytest.mark.parametrize("n,said", [(None, "not measured"), (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"),
                                    (2_500_000, "2.50 MB"), (13_476_839_424, "13.48 GB"), (1_234 * 10**9, "1,234.00 GB")])
def test_human(n, said):
    assert memory.human(n) == said


def test_the_loss_never_holds_the_logits(on_device):
    """The logits of 256 positions x 4,096 words take 4 MB in float32. In chunks of 16 the peak is below a third of this."""
    head = nn.Linear(32, 4096, bias=False).requires_grad_(False)
    hidden, labels = torch.randn(1, 256, 32, requires_grad=True), torch.arange(256)[None]
    on_device(logits_chunk=16 * 4096)
    with memory.Ledger(head) as ledger:
        loss.sum_loss(hidden, head, labels).backward()
    rows = 4 * 16 * 4096  # a chunk of logits; the peak also has, for a moment, what a comparison or a copy takes
    assert rows < ledger.at_peak["loss"] < 4 * 256 * 4096 / 3 and ledger.peak < 4 * 256 * 4096 / 3


def test_a_run_measures_its_second_step(tmp_path, monkeypatch, folders):
    no_picture(monkeypatch)
    rows = make_data(tmp_path / "d.jsonl", 12)
    peaks = {}
    for n in (0, 1):
        run(tmp_path / f"ckpt{n}", folders["gpt2"], rows, steps=2, ckpt_every=n, full=True)
        found = json.loads((tmp_path / f"ckpt{n}" / "summary.json").read_text())["memory"]
        split, peaks[n] = found["by_category"], found["measured_peak"]
        assert split["optimizer"] >= 2 * split["weights"] > 0  # AdamW has states in the second step
    assert peaks[1] <= peaks[0]


# ---------------------------------------------------------------------------------------------- sampling

PROMPT = [5, 17, 300, 4000, 2, 9]


def test_greedy_with_a_cache_is_the_argmax_of_the_whole_forward(talker):
    model = talker
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(30):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert len(set(ids[len(PROMPT):])) > 5  # not one token for ever
    for prompt in (PROMPT, torch.tensor(PROMPT), torch.tensor([PROMPT])):
        assert generate.generate(model, prompt, max_new_tokens=30, temperature=0) == ids  # the prompt and what follows


def test_the_cache_holds_what_the_whole_forward_computes(talker):
    model = talker.eval()
    ids = torch.tensor([PROMPT * 5])
    cache = generate.KVCache(model.config, ids.shape[1])
    with torch.no_grad():
        whole = model(ids)
        parts = [model(ids[:, :7], cache=cache)] + [model(ids[:, i:i + 1], cache=cache) for i in range(7, ids.shape[1])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4 * whole.std().item())
    assert cache.length == ids.shape[1]
    with pytest.raises(ValueError, match="has room for 30 tokens, not for 32"):
        cache.extend(0, torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8))


def test_sampling(talker):
    model = talker

    def sample(**more):
        return generate.generate(model, PROMPT, **{"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9, **more})

    greedy = sample(temperature=0)
    assert sample(top_p=1e-6) == sample(temperature=1e-4) == greedy  # only the likeliest token is left
    assert sample(seed=1) == sample(seed=1) != sample(seed=2) and sample(seed=1) != greedy
    state = torch.get_rng_state()
    sample()
    assert torch.equal(torch.get_rng_state(), state)  # sampling has its own generator, so it does not change training
    assert sample(max_new_tokens=0) == PROMPT


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.2, 0.5, 0.05, 0.25]).log()
    rng = torch.Generator().manual_seed(0)

    def drawn(top_p, temperature=1.0):
        return [generate.choose(logits, temperature, top_p, rng) for _ in range(1000)]

    for top_p, wanted in ((0.4, {1}), (0.6, {1, 3}), (0.8, {0, 1, 3}), (1.0, {0, 1, 2, 3})):
        assert set(drawn(top_p)) == wanted
    assert abs(drawn(1.0).count(1) / 1000 - 0.5) < 0.05
    assert abs(drawn(0.6).count(1) / 1000 - 2 / 3) < 0.05  # the probabilities that are left sum to 1
    assert drawn(1.0, 0.5).count(1) / 1000 > 0.65  # 0.25 / (0.04 + 0.25 + 0.0025 + 0.0625)


def test_it_stops(talker):
    model = talker.train()
    free = generate.generate(model, PROMPT, max_new_tokens=20, temperature=0)
    stop = free[len(PROMPT) + 3]
    end = free.index(stop, len(PROMPT))
    assert generate.generate(model, PROMPT, max_new_tokens=20, temperature=0, stop_ids={stop}) == free[:end + 1]
    assert len(generate.generate(model, PROMPT, max_new_tokens=7)) == len(PROMPT) + 7
    full = generate.generate(model, PROMPT * 20, max_new_tokens=500, temperature=0)  # 120 of 128 positions
    assert len(full) == model.config.n_positions == 128
    assert model.training  # as it was found
    for ids, more, wanted in (([], {}, "empty"), (PROMPT * 22, {}, "positions"), (PROMPT, {"top_p": 0}, "--top-p"),
                              (PROMPT, {"top_p": 1.1}, "--top-p"), (PROMPT, {"temperature": -1}, "--temperature")):
        with pytest.raises(UserError, match=wanted):
            generate.generate(model, ids, **more)


def test_reply_streams_its_text(folders):
    model, tokenizer = weights.load(folders["gpt2"]), data.load_tokenizer(folders["gpt2"])
    pieces = []
    text = generate.reply(model, tokenizer, PROMPT, pieces.append, max_new_tokens=20, temperature=0)
    ids = generate.generate(model, PROMPT, max_new_tokens=20, temperature=0, stop_ids=tokenizer.stop_ids)[len(PROMPT):]
    assert text == tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids])
    assert text.startswith("".join(pieces)) and pieces
