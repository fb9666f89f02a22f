"""The network against transformers' GPT2LMHeadModel, and the properties of GPT-2 that it must have."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2 import hf
from gpt2.config import GPTConfig, preset
from gpt2.inference.kv_cache import KVCache
from gpt2.model import GPT, Packing, causal_mask, explicit_attention, flash_attention, flops_per_token

SMALL = GPTConfig(vocab_size=300, n_ctx=16, n_layer=3, n_head=4, n_embd=32)


def perturbed(config: GPTConfig, seed: int = 0) -> GPT:
    """A network in which no bias and no layer norm is trivial; the padding stays 0."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.wte.weight[config.vocab_size :] = 0
        model.lm_head.weight[config.vocab_size :] = 0
    return model


def oracle(model: GPT) -> GPT2LMHeadModel:
    """transformers' network with the same weights."""
    values = hf.config_to_hf(model.config, model.config.vocab_size - 1)
    for name in ("architectures", "dtype", "torch_dtype", "model_type"):
        del values[name]
    theirs = GPT2LMHeadModel(GPT2Config(**values, attn_implementation="eager"))
    missing, unexpected = theirs.load_state_dict(hf.to_hf(model.state_dict(), model.config), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs.train()  # its dropouts are 0


def batch(config: GPTConfig, B: int, T: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def their_loss(theirs: GPT2LMHeadModel, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = theirs(idx).logits
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


CASES = [
    (replace(SMALL, n_ctx=1), 3, 1),
    (replace(SMALL, n_ctx=7), 2, 7),
    (replace(SMALL, n_ctx=1024, n_layer=2), 1, 1024),
    (SMALL, 4, 16),
    (SMALL, 2, 5),  # shorter than the context
    (replace(SMALL, pad_vocab_to=1), 2, 16),
    (replace(SMALL, tie_embeddings=False), 2, 16),
]


def assert_gradients_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every tensor, by the norm of the difference in parts of its own norm."""
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        difference, norm = torch.linalg.norm(ours[name] - gradient), torch.linalg.norm(gradient)
        assert norm > 1e-6, name  # a trivial gradient would show nothing
        assert difference / norm < 1e-4, name


@pytest.mark.parametrize("attention", ["explicit", "flash"])
@pytest.mark.parametrize(("config", "B", "T"), CASES)
def test_equals_transformers(config: GPTConfig, B: int, T: int, attention: str) -> None:
    model = perturbed(replace(config, attention=attention))
    theirs = oracle(model)
    idx, targets = batch(config, B, T)
    logits, loss = model(idx, targets)
    expected_logits, expected_loss = their_loss(theirs, idx, targets)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    assert abs(loss.item() - expected_loss.item()) < 1e-5
    loss.backward()
    expected_loss.backward()
    ours = hf.to_hf({name: p.grad for name, p in model.named_parameters()}, config)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert ours.keys() == expected.keys()
    assert_gradients_equal(ours, expected)


def test_their_own_loss_and_ignored_targets_equal_transformers() -> None:
    """They shift inside, from labels."""
    model = perturbed(SMALL)
    idx, _ = batch(SMALL, 3, 16)
    labels = idx.clone()
    labels[0, 4:9] = -100
    targets = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)
    assert abs(model(idx, targets)[1].item() - oracle(model)(idx, labels=labels).loss.item()) < 1e-5


def test_dropout_falls_where_theirs_does() -> None:
    """After the embeddings, on the attention weights, before each addition: with one seed the same numbers."""
    config = replace(SMALL, dropout=0.3, attention="explicit")
    model = perturbed(config)
    theirs = oracle(model)
    idx, targets = batch(config, 2, 16)
    torch.manual_seed(3)
    logits, loss = model(idx, targets)
    torch.manual_seed(3)
    expected_logits, expected_loss = their_loss(theirs, idx, targets)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    loss.backward()
    expected_loss.backward()
    ours = hf.to_hf({name: p.grad for name, p in model.named_parameters()}, config)
    assert_gradients_equal(ours, {name: p.grad for name, p in theirs.named_parameters()})


@pytest.mark.parametrize("tied", [True, False])
def test_ten_adamw_steps_equal_transformers(tied: bool) -> None:
    model = perturbed(replace(SMALL, tie_embeddings=tied))
    theirs = oracle(model)
    ours = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    other = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(10):
        idx, targets = batch(SMALL, 4, 16, seed=step)
        loss = model(idx, targets)[1]
        expected = their_loss(theirs, idx, targets)[1]
        assert abs(loss.item() - expected.item()) < 1e-4
        for value, optimizer in ((loss, ours), (expected, other)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        # The padding: its gradient is exactly 0 and weight decay takes nothing from 0.
        for weight in (model.wte.weight, model.lm_head.weight):
            assert torch.count_nonzero(weight.grad[300:]) == 0
            assert torch.count_nonzero(weight[300:]) == 0
    expected_weights = {name: p.detach() for name, p in theirs.named_parameters()}
    for name, tensor in hf.to_hf(model.state_dict(), model.config).items():
        wanted = expected_weights[name]
        if name.endswith("attn.c_attn.bias"):
            # Softmax takes no notice of what all keys have in common: the gradient of the keys' bias is 0 but for
            # rounding, and AdamW makes steps of any size out of that. Queries and values are compared.
            tensor, wanted = tensor.clone(), wanted.clone()
            tensor[32:64] = wanted[32:64] = 0
        # By the norm: AdamW divides a gradient by its own size, so single weights drift apart by rounding.
        assert torch.linalg.norm(tensor - wanted) / torch.linalg.norm(wanted) < 1e-4, name
    for block in model.h:
        queries, keys, values = block.attn.c_attn.bias.grad.split(32)
        assert keys.abs().max() < 1e-5 * min(queries.abs().max(), values.abs().max())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-350m", 354_823_168),
        ("gpt2-774m", 774_030_080),
        ("gpt2-1558m", 1_557_611_200),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert GPT(preset(name).model).num_parameters() == parameters


@pytest.mark.parametrize(("T", "S"), [(1, 1), (9, 9), (1, 9), (4, 9)])
def test_explicit_equals_flash_attention_forward_and_backward(T: int, S: int) -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, T, 8), (2, 3, S, 8), (2, 3, S, 8)]
    first = [torch.randn(shape, requires_grad=True) for shape in shapes]
    second = [t.detach().clone().requires_grad_() for t in first]
    a, b = explicit_attention(*first), flash_attention(*second)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    weight = torch.randn_like(a)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("T", [1, 7, 16])
def test_the_network_is_the_same_with_either_attention(T: int) -> None:
    explicit = perturbed(replace(SMALL, attention="explicit"))
    flash = perturbed(replace(SMALL, attention="flash"))
    idx, targets = batch(SMALL, 2, T)
    outputs = []
    for model in (explicit, flash):
        logits, loss = model(idx, targets)
        loss.backward()
        outputs.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=0, atol=1e-5)
    for name, gradient in outputs[0][1].items():
        torch.testing.assert_close(outputs[1][1][name], gradient, rtol=0, atol=1e-5, msg=name)


def test_auto_takes_the_explicit_formula_for_bf16_on_a_cpu_only() -> None:
    attention = GPT(SMALL).h[0].attn
    q = torch.zeros(1, 1, 1, 1)
    assert not attention._is_explicit(q)
    assert attention._is_explicit(q.bfloat16())
    assert not attention._is_explicit(q.bfloat16().to("meta"))
    assert not GPT(replace(SMALL, attention="flash")).h[0].attn._is_explicit(q.bfloat16())


def test_the_mask_lets_a_query_see_itself_and_what_is_before() -> None:
    mask = causal_mask(2, 5, torch.device("cpu"))
    assert mask.tolist() == [[True, True, True, True, False], [True] * 5]


def test_the_future_changes_nothing_before_it() -> None:
    model = perturbed(SMALL).eval()
    idx, _ = batch(SMALL, 1, 16)
    changed = idx.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 300
    torch.testing.assert_close(model(idx)[0][0, :10], model(changed)[0][0, :10], rtol=0, atol=1e-6)


def test_logits_have_no_padding_and_equal_an_unpadded_network() -> None:
    padded, plain = perturbed(SMALL), GPT(replace(SMALL, pad_vocab_to=1))
    plain.load_state_dict(hf.from_hf(hf.to_hf(padded.state_dict(), SMALL), plain.config))
    assert padded.wte.weight.shape == (384, 32)
    assert plain.wte.weight.shape == (300, 32)
    idx, targets = batch(SMALL, 2, 16)
    logits, loss = padded(idx, targets)
    assert logits.shape == (2, 16, 300)
    torch.testing.assert_close(logits, plain(idx)[0], rtol=0, atol=1e-5)
    assert loss.item() == pytest.approx(plain(idx, targets)[1].item(), abs=1e-6)


def test_ignored_targets_do_not_count() -> None:
    model = perturbed(SMALL)
    idx, targets = batch(SMALL, 2, 16)
    targets[0] = -100
    torch.testing.assert_close(model(idx, targets)[1], model(idx[1:], targets[1:])[1])


def test_without_targets_there_is_no_loss() -> None:
    assert GPT(SMALL)(torch.zeros(1, 3, dtype=torch.int64))[1] is None


def test_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens do not fit into the context of 16"):
        GPT(SMALL)(torch.zeros(1, 17, dtype=torch.int64))


def test_initial_weights_follow_the_table() -> None:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=1000, n_ctx=256, n_layer=8, n_head=4, n_embd=128)
    model = GPT(config)
    std = {name: p.std().item() for name, p in model.named_parameters()}
    assert model.wte.weight[:1000].std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.count_nonzero(model.wte.weight[1000:]) == 0
    assert std["wpe.weight"] == pytest.approx(0.01, rel=0.03)
    for name, parameter in model.named_parameters():
        if name.endswith(("c_attn.weight", "c_fc.weight")):
            assert std[name] == pytest.approx(0.02, rel=0.03), name
        elif name.endswith("c_proj.weight"):
            assert std[name] == pytest.approx(0.02 / math.sqrt(16), rel=0.03), name
        elif name.endswith(".bias"):
            assert torch.count_nonzero(parameter) == 0, name
        elif "ln_" in name:
            assert torch.all(parameter == 1), name
    assert model.lm_head.weight is model.wte.weight


def test_an_untied_head_is_drawn_on_its_own() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1000, n_ctx=8, n_layer=1, n_head=4, n_embd=128, tie_embeddings=False))
    head, wte = model.lm_head.weight[:1000], model.wte.weight[:1000]
    assert head.std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(head, wte)
    assert torch.count_nonzero(model.lm_head.weight[1000:]) == 0
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) - 2 * 24 * 128


def test_scaling_of_the_residual_projections_is_a_switch() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=10, n_ctx=8, n_layer=8, n_head=4, n_embd=128, scale_residual_init=False))
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name


def test_initial_weights_are_decided_by_the_seed_and_drawn_again_by_initialize() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(GPT(SMALL).state_dict())
    first, second, third = states
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["h.0.attn.c_attn.weight"], third["h.0.attn.c_attn.weight"])
    model = perturbed(SMALL)
    torch.manual_seed(1)
    model.initialize()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, first[name]), name


def test_initial_weights_do_not_depend_on_the_padding() -> None:
    models = []
    for pad in (1, 128, 512):
        torch.manual_seed(5)
        models.append(GPT(replace(SMALL, pad_vocab_to=pad)))
    first = hf.to_hf(models[0].state_dict(), SMALL)
    for model in models[1:]:
        for name, tensor in hf.to_hf(model.state_dict(), SMALL).items():
            assert torch.equal(tensor, first[name]), name


def test_an_initial_network_guesses_evenly() -> None:
    torch.manual_seed(0)
    idx, targets = batch(SMALL, 8, 16)
    assert GPT(SMALL)(idx, targets)[1].item() == pytest.approx(math.log(300), abs=0.05)


@pytest.mark.parametrize("attention", ["explicit", "flash"])
def test_dropout_acts_in_training_only(attention: str) -> None:
    model = perturbed(replace(SMALL, dropout=0.5, attention=attention))
    idx, _ = batch(SMALL, 1, 16)
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])
    torch.testing.assert_close(model(idx)[0], perturbed(SMALL).eval()(idx)[0], rtol=0, atol=1e-5)


def test_attention_drops_weights_and_keeps_their_mean() -> None:
    torch.manual_seed(0)
    q = k = torch.zeros(1, 1, 400, 4)  # equal scores: query t weighs t + 1 keys evenly
    v = torch.ones(1, 1, 400, 4)
    for attend in (explicit_attention, flash_attention):
        y = attend(q, k, v, dropout=0.25)[0, 0, 200:, 0]
        assert y.std() > 0.01
        assert y.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("attention", ["explicit", "flash"])
def test_a_cache_changes_no_logits(attention: str) -> None:
    model = perturbed(replace(SMALL, attention=attention)).eval()
    idx, _ = batch(SMALL, 1, 16)
    expected = model(idx)[0]
    cache = KVCache(SMALL, 1, torch.device("cpu"), torch.float32)
    parts = []
    for start, stop in ((0, 6), (6, 7), (7, 12), (12, 16)):  # prefill, one token, several, the rest
        parts.append(model(idx[:, start:stop], cache=cache.of_one(0, start))[0])
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["explicit", "flash"])
def test_packed_texts_give_their_own_logits(attention: str) -> None:
    """Two texts in a row longer than the context; the head at chosen places only."""
    model = perturbed(replace(SMALL, attention=attention)).eval()
    idx, _ = batch(SMALL, 2, 16)
    own = torch.arange(20) < 12  # the first text's 12 tokens, then the second's 8
    mask = causal_mask(20, 20, idx.device) & (own[:, None] == own[None, :])
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    row = torch.cat([idx[0, :12], idx[1, :8]])[None]
    packing = Packing(positions, mask[None, None])
    expected = torch.cat([model(idx[:1, :12])[0], model(idx[1:, :8])[0]], dim=1)  # (1, 20, vocab_size)
    torch.testing.assert_close(model(row, packing=packing)[0], expected, rtol=0, atol=1e-5)
    at = torch.tensor([19, 3, 3])
    logits, loss = model(row, torch.tensor([1, 2, -100]), packing=packing, at=at)
    torch.testing.assert_close(logits, expected[0, at], rtol=0, atol=1e-5)
    assert loss.item() == pytest.approx(F.cross_entropy(expected[0, at[:2]], torch.tensor([1, 2])).item(), abs=1e-5)


def test_a_cache_that_is_full_is_refused() -> None:
    model = GPT(SMALL).eval()
    cache = KVCache(SMALL, 1, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="17 tokens do not fit into the context of 16"):
        model(torch.zeros(1, 7, dtype=torch.int64), cache=cache.of_one(0, 10))


def test_flops_as_torch_counts_them() -> None:
    """Its counter sees the matrix products only, so N is without biases and layer norms."""
    from torch.utils.flop_counter import FlopCounterMode

    config = replace(SMALL, pad_vocab_to=1, attention="explicit")
    model = GPT(config)
    idx, targets = batch(config, 2, config.n_ctx)
    with FlopCounterMode(display=False) as counter:
        model(idx, targets)[1].backward()
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert counter.get_total_flops() == (flops_per_token(config) - 6 * vectors) * idx.numel()


def test_flops_by_hand() -> None:
    """Two per weight and token forward, four backward; attention's two T x T products beside them."""
    config = replace(SMALL, pad_vocab_to=1)
    model = GPT(config)
    weights = sum(p.numel() for name, p in model.named_parameters() if name != "wpe.weight")
    attention = 3 * 2 * 2 * config.n_layer * config.n_embd * config.n_ctx  # (1 + 2) passes x 2 products x 2 FLOPs
    assert flops_per_token(config) == 6 * weights + attention
    assert flops_per_token(replace(config, pad_vocab_to=128)) == flops_per_token(
        config
    )  # padding is no work of the model
    # GPT-2 small: 6 x (124,439,808 - 786,432 of wpe) + 12 x 12 x 768 x 1,024.
    assert flops_per_token(GPTConfig()) == 6 * 123_653_376 + 113_246_208
