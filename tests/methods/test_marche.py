"""MARché on a tiny MAR: it is MAR where it must be, and what it says elsewhere, composed anew here."""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import fastops
from fastops.methods import Marche, MarcheConfig
from fastops.methods.marche import CachedStack, generate, rows_computed
from fastops.models import Mar, MarConfig
from fastops.models.mar import random_places, tokens_a_step
from fastops.testing import available

TINY = MarConfig(width=32, depth=4, heads=4, head_width=24, head_depth=2, tokens=24, token_dim=3, buffer=6, classes=7)
ROWS = TINY.buffer + TINY.tokens
SMALL = MarcheConfig(active=9, encoder_active=8, refresh=3)


def tiny(seed=0, config=TINY):
    torch.manual_seed(seed)
    mar = Mar(config)
    for name, parameter in mar.named_parameters():
        if "pos_embed" in name or name in ("mask_token", "fake_latent"):
            parameter.data.normal_()  # large enough to matter
        if name.endswith("qkv.weight"):
            parameter.data.mul_(3)  # attention that prefers some tokens
    return mar.eval().requires_grad_(False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(mar, config=None, cfg=2.0, steps=8, batch=3, seed=5):
    """Images of MAR, or of MARché where there is a config."""
    labels = torch.arange(batch) % TINY.classes
    options = dict(steps=steps, cfg=cfg, head_steps=4, generator=generator(seed))
    return mar.generate(labels, **options) if config is None else generate(mar, labels, config=config, **options)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("halves", ["each", "conditional", "sum"])
def test_refreshing_every_step_is_mar(cfg, halves):
    mar = tiny()
    config = dataclasses.replace(SMALL, refresh=1, halves=halves)
    assert torch.equal(images(mar, config, cfg), images(mar, cfg=cfg))


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("refresh", [2, 3, 100])
@pytest.mark.parametrize("layer", [1, 2, 4, 9])
def test_an_active_set_of_all_is_mar(layer, refresh, cfg, poison):
    mar = tiny()
    config = MarcheConfig(
        active=ROWS, encoder_active=ROWS, refresh=refresh, selection_layer=layer, encoder_selection_layer=layer
    )
    want = images(mar, cfg=cfg)
    torch.testing.assert_close(images(mar, config, cfg), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


@pytest.mark.parametrize("backend", [b for b, device in available("split_attn") if device.type == "cpu"])
def test_backends_agree(backend, poison):
    """Tokens of a step on each backend of the operators, those of the reference apart."""
    mar, config = tiny(), dataclasses.replace(SMALL, active=14)
    tokens, places = torch.randn(2, 24, 3, generator=generator()), random_places(2, 24, generator(1))
    condition = mar.class_emb(torch.tensor([1, 2]))

    def step(name):
        marche = Marche(mar, config)
        with contextlib.ExitStack() as stack:
            for op in ("split_attn", "attn_received", "kv_scatter"):
                if name in fastops._registry.registry[op].available("cpu"):
                    stack.enter_context(fastops.use_backend(op, name))
            return [marche.predict(tokens[:, :n], condition, places, 3) for n in (0, 3, 6)]

    for got, want in zip(step(backend), step("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [0, 12, ROWS])
def test_nothing_is_lost_while_nothing_changes(size, poison):
    """With the input of the last refresh, remembered and computed rows are the same, whatever the active set."""
    mar, x = tiny(), torch.randn(3, ROWS, TINY.width, generator=generator())
    stack = CachedStack(mar.decoder_blocks, 2, ROWS, "each")
    want = stack.refresh(x).clone()
    got = stack.update(x, range(8, 11), [range(6, 11)], size)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class PlainStack:
    """CachedStack with joined keys and one softmax; `seen` collects the active sets."""

    def __init__(self, blocks, whole):
        self.blocks, self.whole, self.seen = list(blocks), whole, []

    def refresh(self, x):
        self.memory = []
        for block in self.blocks:
            self.memory.append(block.project(x)[1:])
            x = block(x)
        self.out = x

    def update(self, x, asking, must, size):
        for i, block in enumerate(self.blocks[: self.whole]):
            q, k, _ = block.project(x)
            if i == self.whole - 1:
                p = (q[:, :, list(asking)] @ k.mT / q.shape[-1] ** 0.5).softmax(-1).sum((1, 2))
                p[:, must] = 1e9
                active = p.topk(max(size, len(must)), dim=1).indices
            x = block(x)
        self.seen.append(active)
        rows = torch.arange(x.shape[0])[:, None]
        x = x[rows, active]
        for i, block in enumerate(self.blocks[self.whole :], self.whole):
            q, *new = block.project(x)
            mixed = []
            for old, fresh in zip(self.memory[i], new, strict=True):
                old = old.clone()
                old[rows, :, active] = fresh.transpose(1, 2)
                mixed.append(old)
            self.memory[i] = tuple(mixed)
            x = block.finish(x, F.scaled_dot_product_attention(q, *mixed))
        self.out = self.out.clone()
        self.out[rows, active] = x


@pytest.mark.parametrize("whole", [1, 2, 3])
@pytest.mark.parametrize("size", [3, 9, 20])
def test_updates_equal_the_plain_composition(whole, size, poison):
    """Several updates in a row, each with new inputs for some rows."""
    mar, x = tiny(), torch.randn(2, ROWS, TINY.width, generator=generator())
    ours, plain = CachedStack(mar.decoder_blocks, whole, ROWS, "each"), PlainStack(mar.decoder_blocks, whole)
    ours.refresh(x)
    plain.refresh(x)
    for step in range(3):
        must = [*range(10 + 2 * step, 15 + 2 * step)]
        x[:, must] += torch.randn(2, 5, TINY.width, generator=generator(step + 1))
        asking = range(must[2], must[-1] + 1)
        got = ours.update(x, asking, [range(must[0], must[-1] + 1)], size)
        plain.update(x, asking, must, size)
        torch.testing.assert_close(got, plain.out, rtol=1e-4, atol=1e-4)
    assert plain.seen[0].shape[1] == max(size, 5)


def test_rows_of_a_growing_set(poison):
    """As in the encoder: rows beyond the known ones hold NaN, and new ones join."""
    mar, x = tiny(), torch.randn(2, ROWS, TINY.width, generator=generator())
    ours, plain = CachedStack(mar.encoder_blocks, 2, ROWS, "each"), PlainStack(mar.encoder_blocks, 2)
    ours.refresh(x[:, :10])
    plain.refresh(x[:, :10])
    for n in (12, 15):
        before = plain.out.shape[1]
        plain.memory = [tuple(F.pad(t, (0, 0, 0, n - before)) for t in pair) for pair in plain.memory]
        plain.out = F.pad(plain.out, (0, 0, 0, n - before))
        must = range(before, n)
        got = ours.update(x[:, :n], must, [must], 7)
        plain.update(x[:, :n], must, [*must], 7)
        assert got.shape[1] == n
        torch.testing.assert_close(got, plain.out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("halves", ["each", "conditional", "sum"])
def test_halves(halves):
    generator_ = generator()
    q, k = (torch.randn(4, 2, rows, 8, generator=generator_) for rows in (3, 20))
    stack = CachedStack([], 0, 20, halves)
    active = stack._select(q, k, [range(0, 2), range(5, 9)], 4)
    assert active.shape == (4, 10)
    assert active[:, :6].tolist() == [[0, 1, 5, 6, 7, 8]] * 4
    p = (q @ k.mT / 8**0.5).softmax(-1).sum((1, 2))
    if halves != "each":
        p = (p[:2] if halves == "conditional" else p[:2] + p[2:]).repeat(2, 1)
    p[:, [0, 1, 5, 6, 7, 8]] = -1
    for got, want in zip(active[:, 6:], p.topk(4).indices, strict=True):
        assert set(got.tolist()) == set(want.tolist())


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(SMALL, encoder=False),
        dataclasses.replace(SMALL, encoder_buffer=True, refresh=4),
        dataclasses.replace(SMALL, active=0, encoder_active=0),
        dataclasses.replace(SMALL, selection_layer=9, encoder_selection_layer=1),
        dataclasses.replace(SMALL, active=100, encoder_active=100),
    ],
    ids=str,
)
def test_it_computes_the_rows_that_it_says(config, poison):
    mar, rows = tiny(), []
    for block in [*mar.encoder_blocks, *mar.decoder_blocks]:
        block.mlp.register_forward_hook(lambda module, given, out: rows.append(given[0].shape[1]))
    got = images(mar, config, cfg=1.0, batch=1)
    assert got.isfinite().all()
    computed, rows[:] = sum(rows), []
    images(mar, cfg=1.0, batch=1)
    assert rows_computed(TINY, 8, config) == (sum(rows), computed)


def test_the_bound_of_the_official_sizes():
    """Rows bound the gain for MAR-H at 64 steps to 1.76; the paper's best is about 1.7."""
    from fastops.models import MAR_BASE, MAR_HUGE

    ratio = {c: (lambda a, b: a / b)(*rows_computed(c, 64)) for c in (MAR_BASE, MAR_HUGE)}
    assert 1.65 < ratio[MAR_BASE] < 1.68
    assert 1.75 < ratio[MAR_HUGE] < 1.77


def test_it_differs_from_mar_by_little_and_not_by_nothing():
    mar = tiny()
    want, got = images(mar), images(mar, SMALL)
    assert not torch.equal(got, want)
    assert (got - want).norm() < 0.5 * want.norm()


def test_one_object_for_many_generations():
    mar = tiny()
    marche = Marche(mar, SMALL)
    for batch, inference in ((2, False), (5, False), (5, True), (5, False)):
        options = dict(steps=8, head_steps=4)
        labels = torch.arange(batch)
        with torch.inference_mode(inference):
            got = mar.generate(labels, predict=marche.predict, generator=generator(batch), **options)
        want = generate(mar, labels, config=SMALL, generator=generator(batch), **options)
        assert torch.equal(got, want)


def test_half_precision():
    mar, labels = tiny().bfloat16(), torch.tensor([1, 2])
    options = dict(steps=8, head_steps=4, places=random_places(2, 24, generator(1)))
    want = mar.generate(labels, generator=generator(3), **options)
    config = MarcheConfig(active=ROWS, encoder_active=ROWS)
    got = generate(mar, labels, config=config, generator=generator(3), **options)
    assert (got - want).norm() < 0.1 * want.norm()


def test_under_autocast():
    """Keys and values are bf16 there, the rows fp32."""
    mar, labels = tiny(), torch.tensor([1, 2])
    options = dict(steps=8, head_steps=4, places=random_places(2, 24, generator(1)))
    with torch.autocast("cpu", torch.bfloat16):
        want = mar.generate(labels, generator=generator(3), **options)
        for config in (dataclasses.replace(SMALL, refresh=1), MarcheConfig(active=ROWS, encoder_active=ROWS)):
            got = generate(mar, labels, config=config, generator=generator(3), **options)
            assert (got - want).norm() < 0.1 * want.norm()


def test_bad_arguments():
    for changes, message in (
        (dict(refresh=0), "refresh must be at least 1, got 0"),
        (dict(selection_layer=0), "selection_layer must be at least 1, got 0"),
        (dict(active=-1), "active must not be negative, got -1"),
        (dict(halves="both"), "halves must be one of each, conditional, sum, got 'both'"),
    ):
        with pytest.raises(ValueError, match=message):
            MarcheConfig(**changes)
    mar = tiny()
    marche, condition, places = Marche(mar), mar.class_emb(torch.tensor([0])), random_places(1, 24)
    marche.predict(torch.zeros(1, 0, 3), condition, places, 2)
    marche.predict(torch.zeros(1, 2, 3), condition, places, 2)
    with pytest.raises(ValueError, match="tokens must be more than the last step's 2, got 2"):
        marche.predict(torch.zeros(1, 2, 3), condition, places, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_runs_on_a_gpu(graphs):
    mar = tiny().cuda()
    options = dict(steps=8, cfg=2.0, head_steps=4)
    labels = torch.arange(3, device="cuda")
    want = mar.generate(labels, generator=generator(), **options)
    for config in (dataclasses.replace(SMALL, refresh=1), MarcheConfig(active=ROWS, encoder_active=ROWS)):
        config = dataclasses.replace(config, graphs=graphs)
        got = generate(mar, labels, config=config, generator=generator(), **options)
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * want.abs().max().item())


@pytest.mark.gpu
def test_graphs_change_nothing():
    """Also for a second generation by the same object, and for one of another batch."""
    mar = tiny().cuda()
    plain, graphed = (Marche(mar, dataclasses.replace(SMALL, graphs=graphs)) for graphs in (False, True))
    for batch in (3, 3, 2):
        labels, options = torch.arange(batch, device="cuda"), dict(steps=8, head_steps=4)
        want = mar.generate(labels, predict=plain.predict, generator=generator(batch), **options)
        got = mar.generate(labels, predict=graphed.predict, generator=generator(batch), **options)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
    assert graphed.decoder._graphs._captured


def test_the_schedule_leaves_no_step_without_tokens():
    assert all(min(tokens_a_step(TINY.tokens, steps)) >= 1 for steps in range(1, TINY.tokens + 1))
