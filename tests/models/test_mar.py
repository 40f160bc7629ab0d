"""Mar against the same model composed anew in the test: raster order, boolean masks, torch's own attention module."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from fastops.models import MAR_BASE, MAR_HUGE, MAR_LARGE, Mar, MarConfig
from fastops.models._diffusion import Schedule, cosine_signal
from fastops.models.mar import random_places, tokens_a_step

TINY = MarConfig(width=32, depth=3, heads=4, head_width=24, head_depth=2, tokens=16, token_dim=3, buffer=5, classes=7)


def tiny(seed=0, config=TINY, dtype=torch.float32):
    torch.manual_seed(seed)
    mar = Mar(config)
    for name, parameter in mar.named_parameters():
        if "pos_embed" in name or name in ("mask_token", "fake_latent"):
            parameter.data.normal_()  # large enough to matter
    return mar.to(dtype).eval().requires_grad_(False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# What the official checkpoints hold: name -> shape


def official(width, depth, head_width, head_depth):
    """Written down from the published checkpoints' listing."""
    rows = {
        "fake_latent": [1, width], "encoder_pos_embed_learned": [1, 320, width], "mask_token": [1, 1, width],
        "decoder_pos_embed_learned": [1, 320, width], "diffusion_pos_embed_learned": [1, 256, width],
        "class_emb.weight": [1000, width],
    }  # fmt: skip

    def linear(name, outputs, inputs):
        rows[f"{name}.weight"], rows[f"{name}.bias"] = [outputs, inputs], [outputs]

    def norm(name, size):
        rows[f"{name}.weight"], rows[f"{name}.bias"] = [size], [size]

    linear("z_proj", width, 16)
    norm("z_proj_ln", width)
    linear("decoder_embed", width, width)
    for side in ("encoder", "decoder"):
        norm(f"{side}_norm", width)
        for i in range(depth):
            block = f"{side}_blocks.{i}"
            norm(f"{block}.norm1", width)
            norm(f"{block}.norm2", width)
            linear(f"{block}.attn.qkv", 3 * width, width)
            linear(f"{block}.attn.proj", width, width)
            linear(f"{block}.mlp.fc1", 4 * width, width)
            linear(f"{block}.mlp.fc2", width, 4 * width)
    net = "diffloss.net"
    linear(f"{net}.time_embed.mlp.0", head_width, 256)
    linear(f"{net}.time_embed.mlp.2", head_width, head_width)
    linear(f"{net}.cond_embed", head_width, width)
    linear(f"{net}.input_proj", head_width, 16)
    for i in range(head_depth):
        norm(f"{net}.res_blocks.{i}.in_ln", head_width)
        linear(f"{net}.res_blocks.{i}.mlp.0", head_width, head_width)
        linear(f"{net}.res_blocks.{i}.mlp.2", head_width, head_width)
        linear(f"{net}.res_blocks.{i}.adaLN_modulation.1", 3 * head_width, head_width)
    linear(f"{net}.final_layer.linear", 32, head_width)
    linear(f"{net}.final_layer.adaLN_modulation.1", 2 * head_width, head_width)
    return rows


SIZES = {
    "base": (MAR_BASE, (768, 12, 1024, 6), 364, 208),
    "large": (MAR_LARGE, (1024, 16, 1280, 8), 476, 478),
    "huge": (MAR_HUGE, (1280, 20, 1536, 12), 604, 942),
}


@pytest.mark.parametrize("size", SIZES)
def test_official_state_dicts_load_strictly(size):
    config, sizes, names, millions = SIZES[size]
    state = {name: torch.empty(shape, device="meta") for name, shape in official(*sizes).items()}
    assert len(state) == names
    assert round(sum(t.numel() for t in state.values()) / 1e6) == millions
    with torch.device("meta"):
        mar = Mar(config)
    mar.load_state_dict(state, strict=True, assign=True)
    assert {name: list(t.shape) for name, t in mar.state_dict().items()} == official(*sizes)


# The same model, composed anew


class Plain:
    """MAR in raster order: `mask` [B, tokens] is True where a token is not known."""

    def __init__(self, mar):
        self.mar, self.config = mar, mar.config
        self.weights = {name: t.double() for name, t in mar.state_dict().items()}

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6)

    def linear(self, x, name):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def block(self, x, name):
        attention = nn.MultiheadAttention(x.shape[-1], self.config.heads, batch_first=True, dtype=torch.float64)
        attention.load_state_dict({
            "in_proj_weight": self.weights[f"{name}.attn.qkv.weight"],
            "in_proj_bias": self.weights[f"{name}.attn.qkv.bias"],
            "out_proj.weight": self.weights[f"{name}.attn.proj.weight"],
            "out_proj.bias": self.weights[f"{name}.attn.proj.bias"],
        })  # fmt: skip
        h = self.norm(x, f"{name}.norm1")
        x = x + attention(h, h, h, need_weights=False)[0]
        h = self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        return x + self.linear(F.gelu(h), f"{name}.mlp.fc2")

    def conditions(self, image, mask, condition):
        """[B, tokens, width] of an image [B, tokens, token_dim] of which some tokens are masked."""
        w, size, batch = self.weights, self.config.buffer, image.shape[0]
        x = torch.cat([torch.zeros(batch, size, image.shape[2], dtype=torch.float64), image.double()], 1)
        x = self.linear(x, "z_proj")
        x[:, :size] = condition[:, None]
        x = self.norm(x + w["encoder_pos_embed_learned"], "z_proj_ln")
        hidden = torch.cat([torch.zeros(batch, size, dtype=torch.bool), mask], 1)
        x = x[~hidden].reshape(batch, -1, self.config.width)
        for i in range(self.config.depth):
            x = self.block(x, f"encoder_blocks.{i}")
        x = self.linear(self.norm(x, "encoder_norm"), "decoder_embed")
        whole = w["mask_token"].repeat(batch, size + self.config.tokens, 1)
        whole[~hidden] = x.reshape(-1, self.config.width)
        whole = whole + w["decoder_pos_embed_learned"]
        for i in range(self.config.depth):
            whole = self.block(whole, f"decoder_blocks.{i}")
        return self.norm(whole, "decoder_norm")[:, size:] + w["diffusion_pos_embed_learned"]

    def head(self, x, time, z):
        """Predicted (noise, variance) of the diffusion head."""
        angle = time * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        t = torch.cat([angle.cos(), angle.sin()])[None]
        net = "diffloss.net"
        t = self.linear(F.silu(self.linear(t, f"{net}.time_embed.mlp.0")), f"{net}.time_embed.mlp.2")
        y = F.silu(t + self.linear(z, f"{net}.cond_embed"))
        h = self.linear(x, f"{net}.input_proj")
        for i in range(self.config.head_depth):
            name = f"{net}.res_blocks.{i}"
            shift, scale, gate = self.linear(y, f"{name}.adaLN_modulation.1").chunk(3, -1)
            inner = self.norm(h, f"{name}.in_ln") * (1 + scale) + shift
            h = h + gate * self.linear(F.silu(self.linear(inner, f"{name}.mlp.0")), f"{name}.mlp.2")
        shift, scale = self.linear(y, f"{net}.final_layer.adaLN_modulation.1").chunk(2, -1)
        h = F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.linear(h, f"{net}.final_layer.linear").chunk(2, -1)

    def sample(self, z, steps, cfg, temperature, noise):
        """DDPM with betas of the kept steps; z is conditional and then unconditional where cfg is not None."""
        alpha_bar = cosine_signal()
        times = [round(i * 999 / (steps - 1)) for i in range(steps)]
        betas, last = [], 1.0
        for time in times:
            betas.append(1 - float(alpha_bar[time]) / last)
            last = float(alpha_bar[time])
        x = next(noise).double()
        for i in reversed(range(steps)):
            bar, bar_before = float(alpha_bar[times[i]]), float(alpha_bar[times[i - 1]]) if i else 1.0
            if cfg is None:
                eps, spread = self.head(x, times[i], z)
            else:
                half = z.shape[0] // 2
                (eps, spread), (free, _) = (self.head(x, times[i], part) for part in (z[:half], z[half:]))
                eps = free + cfg * (eps - free)
            start = x / math.sqrt(bar) - math.sqrt(1 / bar - 1) * eps
            mean = betas[i] * math.sqrt(bar_before) / (1 - bar) * start
            mean = mean + (1 - bar_before) * math.sqrt(1 - betas[i]) / (1 - bar) * x
            x = mean
            if i:
                least = math.log(betas[i] * (1 - bar_before) / (1 - bar))
                part = (spread + 1) / 2
                variance = (part * math.log(betas[i]) + (1 - part) * least).exp()
                x = x + variance.sqrt() * next(noise).double() * temperature
        return x

    def generate(self, labels, places, steps, cfg, cfg_schedule, temperature, head_steps, seed):
        """As the published code goes about it: masks shrink along an order whose first tokens stay masked longest."""
        draw, total, batch = generator(seed), self.config.tokens, labels.shape[0]
        image, mask = torch.zeros(batch, total, self.config.token_dim).double(), torch.ones(batch, total).bool()
        order = places.flip(1)
        for step in range(steps):
            length = max(1, min(int(mask[0].sum()) - 1, math.floor(total * math.cos(math.pi / 2 * (step + 1) / steps))))
            after = torch.zeros_like(mask).scatter_(1, order[:, :length], True)
            new = mask if step == steps - 1 else mask & ~after
            condition = self.weights["class_emb.weight"][labels]
            if cfg == 1.0:
                z, strength = self.conditions(image, mask, condition), None
            else:
                free = self.weights["fake_latent"].expand_as(condition)
                z = torch.cat([self.conditions(image, mask, c) for c in (condition, free)])
                strength = 1 + (cfg - 1) * (total - length) / total if cfg_schedule == "linear" else cfg
            # Rows in the order of generation, which is the order in which Mar draws its noise.
            ranks = places.argsort(1)
            chosen = [[p for p in places[b].tolist() if new[b, p]] for b in range(batch)]
            assert all(sorted(c, key=lambda p, b=b: ranks[b, p]) == c for b, c in enumerate(chosen))
            rows = torch.stack([z[b, chosen[b % batch]] for b in range(z.shape[0])])
            noise = torch.randn(head_steps, batch * len(chosen[0]), self.config.token_dim, generator=draw)
            got = self.sample(rows.flatten(0, 1), head_steps, strength, temperature, iter(noise))
            for b in range(batch):
                image[b, chosen[b]] = got.unflatten(0, (batch, -1))[b]
            mask = after
        return image.detach()


@pytest.mark.parametrize("known", [0, 1, 7, 15])
def test_predict_equals_the_plain_composition(known):
    mar = tiny()
    places, image = random_places(3, 16, generator(1)), torch.randn(3, 16, 3, generator=generator(2))
    condition = mar.class_emb(torch.tensor([0, 3, 6]))
    tokens = image.gather(1, places[:, :known, None].expand(-1, -1, 3))
    got = mar.predict(tokens, condition, places, 16 - known)
    mask = torch.ones(3, 16).bool().scatter_(1, places[:, :known], False)
    want = Plain(mar).conditions(image, mask, condition.double())
    want = want.gather(1, places[:, known:, None].expand(-1, -1, 32))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("steps", "cfg", "cfg_schedule", "temperature"),
    [(16, 1.0, "linear", 1.0), (5, 2.5, "linear", 0.9), (4, 1.8, "constant", 1.0), (1, 3.0, "linear", 1.0)],
)
def test_generate_equals_the_plain_composition(steps, cfg, cfg_schedule, temperature):
    mar, labels = tiny(), torch.tensor([2, 5, 0])
    places = random_places(3, 16, generator(1))
    options = dict(cfg=cfg, cfg_schedule=cfg_schedule, temperature=temperature, head_steps=6)
    got = mar.generate(labels, steps=steps, places=places, generator=generator(7), **options)
    assert got.dtype == torch.float32
    want = Plain(mar).generate(labels, places, steps, seed=7, **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_guidance_of_one_is_none():
    mar, labels = tiny(), torch.tensor([2, 5])
    options = dict(steps=4, head_steps=5, places=random_places(2, 16, generator(1)))
    plain = mar.generate(labels, generator=generator(3), **options)
    almost = mar.generate(labels, generator=generator(3), cfg=1 + 1e-7, **options)
    torch.testing.assert_close(plain, almost, rtol=1e-3, atol=1e-3)


def test_orders_are_the_sample_s_own():
    """What a sample becomes depends on its own label, order and noise, not on its neighbours'."""
    mar = tiny()
    places, draw = random_places(2, 16, generator(1)), torch.randn(64, 2, 3, generator=generator(2))
    tokens = draw[:5].transpose(0, 1)
    condition = mar.class_emb(torch.tensor([1, 4]))
    both = mar.predict(tokens, condition, places, 3)
    for b in range(2):
        alone = mar.predict(tokens[b : b + 1], condition[b : b + 1], places[b : b + 1], 3)
        torch.testing.assert_close(both[b : b + 1], alone)


@pytest.mark.parametrize(("tokens", "steps"), [(256, 64), (256, 256), (256, 1), (16, 5), (1, 1), (64, 63)])
def test_the_schedule_spends_every_token(tokens, steps):
    counts = tokens_a_step(tokens, steps)
    assert sum(counts) == tokens
    assert min(counts) >= 1
    assert len(counts) == steps


def test_the_schedule_of_the_paper():
    counts = tokens_a_step(256, 64)
    assert counts[:13] == [1] * 13
    assert max(counts) == 7


def test_bad_arguments():
    mar, labels = tiny(), torch.tensor([0])
    with pytest.raises(ValueError, match="steps must be from 1 to tokens = 16, got 17"):
        mar.generate(labels, steps=17)
    with pytest.raises(ValueError, match="cfg_schedule must be one of linear, constant, got 'cosine'"):
        mar.generate(labels, steps=4, cfg_schedule="cosine")
    with pytest.raises(ValueError, match="steps must be from 2 to 1000, got 1"):
        mar.generate(labels, steps=4, head_steps=1)


@pytest.mark.parametrize("steps", [2, 100, 1000])
def test_the_diffusion_schedule(steps):
    plan = Schedule(steps)
    assert plan.times[0] == 0
    assert plan.times[-1] == 999
    assert (plan.signal.diff() < 0).all()
    # Noise with the posterior's mean and variance leaves the marginals as they are: x_i = sqrt(s) data + noise.
    before = torch.cat([torch.ones(1).double(), plan.signal[:-1]])
    torch.testing.assert_close(plan.from_data + plan.from_noisy * plan.signal.sqrt(), before.sqrt())
    variance = plan.from_noisy.square() * (1 - plan.signal) + plan.log_posterior.exp() * (before < 1)
    torch.testing.assert_close(variance[1:], 1 - before[1:])


def test_a_perfect_denoiser_recovers_the_data():
    """With the true noise predicted, DDPM ends on the data, whatever the noise was."""
    mar, data = tiny(), torch.tensor([0.3, -1.2, 2.0])
    head, plan, states = mar.diffloss, Schedule(20), []

    class Perfect(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.time_embed, self.cond_embed, self.input_proj = net.time_embed, net.cond_embed, net.input_proj

        def forward(self, x, embedding):
            signal = float(plan.signal[19 - len(states)])
            states.append(x)
            eps = (x - signal**0.5 * data) / (1 - signal) ** 0.5
            return torch.cat([eps, torch.zeros_like(eps)], 1)

    head.net = Perfect(head.net)
    got = head.sample(torch.randn(4, 32), steps=20, generator=generator())
    torch.testing.assert_close(got, data.expand(4, 3), rtol=0, atol=1e-4)


def test_compiled_glue_is_shared_by_all_blocks():
    mar, labels = tiny(), torch.tensor([2, 5, 6])
    options = dict(steps=6, cfg=2.0, head_steps=5, places=random_places(3, 16, generator(1)))
    want, names = mar.generate(labels, generator=generator(3), **options), list(mar.state_dict())
    compiler = CompileCounter()
    assert mar.compile_glue(backend=compiler) is mar
    got = mar.generate(labels, generator=generator(3), **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert list(mar.state_dict()) == names
    assert compiler.frame_count <= 4  # two halves of six blocks, and the head: not one for each size and layer


def test_half_precision_stays_near():
    labels, options = torch.tensor([2, 5]), dict(steps=4, head_steps=5, places=random_places(2, 16, generator(1)))
    want = tiny().generate(labels, generator=generator(3), **options)
    got = tiny(dtype=torch.bfloat16).generate(labels, generator=generator(3), **options)
    assert got.dtype == torch.float32
    assert (got - want).norm() < 0.1 * want.norm()


def test_a_copy_captures_its_own_graphs():
    mar = tiny()
    for other in (copy.deepcopy(mar), pickle.loads(pickle.dumps(mar))):
        assert other.diffloss._graphs is not mar.diffloss._graphs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_of_the_head_change_nothing(dtype):
    """Also with weights that have moved since a capture, and under autocast."""
    mar, z = tiny(dtype=dtype).cuda(), torch.randn(10, 32, device="cuda")
    head = mar.diffloss
    for cfg in (None, 2.0):
        for cast in (False, True):
            results = []
            for head.graphs in (False, True, True):
                with torch.autocast("cuda", torch.bfloat16, enabled=cast):
                    results.append(head.sample(z, steps=7, cfg=cfg, temperature=0.9, generator=generator(5)))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    assert len(head._graphs._captured) == 4
    before = head.sample(z, steps=7, generator=generator(5))
    for p in mar.parameters():
        p.data = p.data * 2
    assert not torch.equal(head.sample(z, steps=7, generator=generator(5)), before)


@pytest.mark.gpu
def test_runs_on_a_gpu():
    mar, labels = tiny(), torch.tensor([2, 5])
    options = dict(steps=4, cfg=2.0, head_steps=5, places=random_places(2, 16, generator(1)))
    want = mar.generate(labels, generator=generator(3), **options)
    options["places"] = options["places"].cuda()
    got = mar.cuda().generate(labels.cuda(), generator=generator(3), **options)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-2, atol=1e-2 * float(want.abs().max()))
