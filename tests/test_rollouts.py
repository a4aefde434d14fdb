"""Rollouts: text and log-probs against other programs, the draw against exact probabilities, independent rows."""

import pytest
import torch

from common import chat, lora, model, rollouts
from common.runtime import cache

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = ["How do I make tea?", "Say hi", "Tell me a long story about " * 20, "Why?"]  # the third exceeds the window


def encode(tokenizer, questions=QUESTIONS):
    return [chat.encode(tokenizer, [{"role": "user", "content": q}], add_generation_prompt=True)[0] for q in questions]


def generate(net, prompt, count, **changes):
    """transformers' greedy continuation of one prompt."""
    settings = {"do_sample": False, "max_new_tokens": count, "pad_token_id": chat.PAD} | changes
    ids = torch.tensor([prompt])
    return net.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def adapter(net, noise, name="policy", rank=4):
    torch.manual_seed(3)
    lora.inject(net, name, rank, 8)
    with torch.no_grad():
        for key, parameter in lora.adapter_parameters(net, name).items():
            if "lora_B" in key:
                parameter.copy_(torch.randn_like(parameter) * noise)


def test_greedy_equals_generate_across_the_window(tiny_model):
    net, tokenizer = tiny_model
    prompts = encode(tokenizer)
    assert net.config.sliding_window == 64 and [len(p) > 64 for p in prompts] == [False, False, True, False]
    forced = rollouts.sample(net, prompts, 1, 100, greedy=True, stop=())
    assert not forced["stopped"].any()
    free = rollouts.sample(net, prompts, 1, 100, greedy=True)
    for i, prompt in enumerate(prompts):
        assert forced["completions"][i] == generate(net, prompt, 100, eos_token_id=None), i
        assert free["completions"][i] == generate(net, prompt, 100, eos_token_id=list(chat.STOP_TOKENS)), i


def test_sampled_logprobs_equal_a_teacher_forced_pass(tiny_model):
    net, tokenizer = tiny_model
    for temperature in (1.0, 0.7):
        uniforms = rollouts.uniforms(0, 0, range(16), 80)
        out = rollouts.sample(net, encode(tokenizer), 4, 80, temperature, uniforms)
        lengths = {len(ids) for ids in out["completions"]}
        assert len(lengths) > 3 and out["stopped"].any()  # rows left at different times
        right = model.sequence_logprobs(net, out["tokens"], out["mask"], temperature)
        assert (out["sampled_logprobs"] - right).abs().max() < 1e-5
        assert out["sampled_logprobs"].dtype == torch.float32


def test_each_token_is_the_draw_of_its_own_number(tiny_model):
    net, tokenizer = tiny_model
    uniforms = rollouts.uniforms(2, 0, range(8), 40)
    out = rollouts.sample(net, encode(tokenizer), 2, 40, 0.8, uniforms)
    with torch.no_grad():
        logits = net(out["tokens"], use_cache=False).logits
    for i, ids in enumerate(out["completions"]):
        scores = logits[i, :-1][out["mask"][i].bool()]
        assert rollouts.draw(scores, uniforms[i, : len(ids)], 0.8)[0].tolist() == ids


def test_the_batch_has_the_shape_that_trainers_take(tiny_model):
    net, tokenizer = tiny_model
    prompts = encode(tokenizer)
    out = rollouts.sample(net, prompts, 2, 30, uniforms=rollouts.uniforms(1, 0, range(8), 30))
    tokens, mask, completions = out["tokens"], out["mask"], out["completions"]
    width = max(len(prompts[i // 2]) + len(ids) for i, ids in enumerate(completions))
    assert tokens.shape == out["attention_mask"].shape == (8, width) and tokens.dtype == torch.int64
    assert mask.shape == out["sampled_logprobs"].shape == (8, width - 1) and mask.dtype == torch.float32
    for i, ids in enumerate(completions):
        start, end = len(prompts[i // 2]), len(prompts[i // 2]) + len(ids)
        assert tokens[i, :end].tolist() == prompts[i // 2] + ids and not (tokens[i, end:] != chat.PAD).any()
        assert out["attention_mask"][i].tolist() == [1] * end + [0] * (width - end)
        assert mask[i].nonzero()[:, 0].tolist() == list(range(start - 1, end - 1))
        assert torch.equal(out["sampled_logprobs"][i] != 0, mask[i] != 0)
        stops = [j for j, token in enumerate(ids) if token in (1, 106)]
        assert out["stopped"][i] == bool(stops) and stops in ([], [len(ids) - 1])  # the first one, and it is kept
        assert stops or len(ids) == 30
    assert out["stopped"].any()


def test_pads_and_stops_inside_a_prompt_mean_nothing(tiny_model):
    net, _ = tiny_model
    prompt = [2, 105, 0, 106, 1, 0, 105]
    out = rollouts.sample(net, [prompt], 1, 3, greedy=True, stop=())
    assert out["mask"].tolist() == [[0.0] * 6 + [1.0] * 3] and out["attention_mask"].sum() == 10
    assert out["completions"][0] == generate(net, prompt, 3, eos_token_id=None)
    first = out["completions"][0][0]
    again = rollouts.sample(net, [prompt], 1, 3, greedy=True, stop=(first,))
    assert again["completions"] == [[first]] and again["stopped"].all() and again["mask"].sum() == 1


def test_a_rows_text_depends_on_its_prompt_and_numbers_alone(tiny_model):
    """Alone, in a batch that loses rows, in another order, and in line behind others: the same tokens."""
    net, tokenizer = tiny_model
    prompts = [*encode(tokenizer), *encode(tokenizer, [f"What about {i}?" for i in range(20)])]
    uniforms = rollouts.uniforms(7, 3, range(96), 40)
    every = rollouts.sample(net, prompts, 4, 40, uniforms=uniforms)["completions"]  # 96 rows: more than fit at once
    assert len({len(ids) for ids in every}) > 10
    for row in (0, 5, 9, 70, 95):
        alone = rollouts.sample(net, [prompts[row // 4]], 1, 40, uniforms=uniforms[row : row + 1])
        assert alone["completions"] == [every[row]], row
    back = torch.arange(96).view(24, 4).flip(0)
    turned = rollouts.sample(net, prompts[::-1], 4, 40, uniforms=uniforms[back.flatten()])["completions"]
    assert turned == [every[row] for row in back.flatten()]
    large = rollouts.sample(net, prompts[:1], 80, 8, uniforms=uniforms[:80, :8])["completions"]  # a group in two parts
    again = rollouts.sample(net, prompts[:1], 1, 8, uniforms=uniforms[79:80, :8])["completions"]
    assert large[79] == again[0] and len({tuple(ids) for ids in large}) > 20


def test_uniforms_belong_to_seed_step_and_row():
    numbers = rollouts.uniforms(0, 5, range(40), 64)
    assert numbers.dtype == torch.float64 and numbers.min() >= 0 and numbers.max() < 1
    assert torch.equal(rollouts.uniforms(0, 5, [31, 7], 64), numbers[[31, 7]])  # another rank, another order
    assert torch.equal(rollouts.uniforms(0, 5, range(40), 20), numbers[:, :20])
    others = [rollouts.uniforms(*key, range(40), 64) for key in ((1, 5), (0, 6), (5, 0))]
    assert len(torch.cat([numbers, *others]).unique()) == 4 * 40 * 64
    assert abs(numbers.mean() - 0.5) < 0.02 and torch.corrcoef(numbers).fill_diagonal_(0).abs().max() < 0.6


def test_without_uniforms_torchs_generator_draws(tiny_model):
    net, tokenizer = tiny_model
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(rollouts.sample(net, encode(tokenizer)[:1], 4, 10)["completions"])
    assert texts[0] == texts[1] != texts[2]
    assert len({tuple(ids) for ids in texts[0]}) > 1


def peaked(words=700):
    """Logits of three rows, not a multiple of a block: flat, with holes of -inf at both ends, and one word 40 above."""
    torch.manual_seed(0)
    logits = torch.randn(3, words) * 3
    logits[1, :5] = logits[1, 400:520] = logits[1, -60:] = -torch.inf
    logits[2, 613] = logits[2].max() + 40
    return logits


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("turned", [False, True])
def test_the_draw_is_the_inverse_distribution_function(temperature, turned):
    """An even grid of n uniforms must hit each word n p times, give or take the one at each end of its stretch."""
    n = 8192
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for row in peaked():
        logits = row.expand(n, -1)
        logits = logits.T.contiguous().T if turned else logits
        before = logits.clone()
        tokens, logprobs = rollouts.draw(logits, grid, temperature)
        right = torch.log_softmax(row.double() / temperature, -1)
        counts = torch.bincount(tokens, minlength=len(row))
        assert (counts - n * right.exp()).abs().max() <= 1.001
        assert (logprobs - right[tokens]).abs().max() < 2e-6
        assert torch.equal(logits, before)  # nothing of the caller's is overwritten


def test_the_draw_passes_a_chi_square_test_with_random_numbers():
    limit = 1.2  # chi-square / degrees of freedom of 300 bins is above it once in 100 times
    generator, row = torch.Generator().manual_seed(0), torch.randn(300, generator=torch.Generator().manual_seed(1))
    uniforms = torch.rand(30000, generator=generator, dtype=torch.float64)
    tokens, _ = rollouts.draw(row.expand(len(uniforms), -1), uniforms, 0.8)
    expected = torch.softmax(row.double() / 0.8, -1) * len(uniforms)
    counts = torch.bincount(tokens, minlength=300)
    assert ((counts - expected).square() / expected).sum() / 299 < limit


def test_over_gemmas_vocabulary_in_bf16():
    """One block and one word in it equal the plain search through 262,144 fp64 sums."""
    torch.manual_seed(0)
    logits = (torch.randn(1, 262144) * 4).to(torch.bfloat16).expand(16, -1)
    uniforms = torch.rand(16, dtype=torch.float64)
    tokens, logprobs = rollouts.draw(logits, uniforms, 0.9)
    right = torch.log_softmax(logits[0].double() / 0.9, -1)
    edges = right.exp().cumsum(0)
    plain = torch.searchsorted(edges, uniforms * edges[-1], right=True)
    low, high = edges[tokens] - right[tokens].exp(), edges[tokens]
    assert ((uniforms > low - 1e-7) & (uniforms < high + 1e-7)).all() and (tokens == plain).float().mean() > 0.9
    assert (logprobs - right[tokens]).abs().max() < 2e-6


def test_no_uniform_draws_a_word_of_probability_zero():
    extreme = torch.tensor([0.0, 2**-53, 0.5, 1 - 2**-24, 1 - 2**-53], dtype=torch.float64)
    for words in (3, 512, 513, 700, 5000):
        for live in ([0], [words - 1], [words // 2], [0, words - 1], list(range(1, words - 1))):
            logits = torch.full((words,), -torch.inf)
            logits[live] = torch.randn(len(live), generator=torch.Generator().manual_seed(words))
            tokens, logprobs = rollouts.draw(logits.expand(5, -1), extreme)
            assert set(tokens.tolist()) <= set(live) and torch.isfinite(logprobs).all()
            assert tokens[0] == live[0] and tokens[-1] == live[-1]


def test_a_number_rounded_up_to_one_takes_the_last_word_there_is():
    """What a first search leaves of a number for the second may be 1 after rounding."""
    index, rest = rollouts._invert(
        torch.tensor([[0.0, 1.0, 3.0, 0.0]]).double().expand(3, -1), torch.tensor([0, 0.5, 1])
    )
    assert index.tolist() == [1, 2, 2] and torch.allclose(rest, torch.tensor([0, 1 / 3, 1]).double())


def test_a_diverged_model_is_an_error_and_not_a_token():
    for value in (torch.nan, torch.inf):
        logits = torch.zeros(2, 600)
        logits[1, 7] = value
        with pytest.raises(FloatingPointError, match="diverged"):
            rollouts.draw(logits, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.999, 1e-6])
def test_top_p_allows_what_transformers_allows(top_p):
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits, grid = torch.randn(4, 5000) * 2, (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    right = TemperatureLogitsWarper(0.8)(None, logits.clone())
    right = TopPLogitsWarper(top_p)(None, right)
    ours, chances = rollouts._warped(logits / 0.8, top_p), (logits / 0.8).softmax(1)
    assert (chances * (ours.isfinite() != right.isfinite())).sum(1).max() < 2e-5  # theirs adds up in fp32
    tokens, logprobs = rollouts.draw(logits[:1].expand(4096, -1), grid, 0.8, top_p=top_p)
    counts = torch.bincount(tokens, minlength=5000)
    assert (counts - 4096 * ours[0].double().softmax(-1)).abs().max() <= 1.001
    whole = torch.log_softmax(logits[0].double() / 0.8, -1)  # the log-probs know nothing of the cut
    assert (logprobs - whole[tokens]).abs().max() < 2e-6


def test_greedy_draws_the_most_likely_word_whatever_the_uniform():
    logits = torch.randn(6, 1300, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = rollouts.draw(logits, torch.linspace(0, 0.99, 6), 0.5, greedy=True)
    assert torch.equal(tokens, logits.argmax(1))
    assert (logprobs - torch.log_softmax(logits / 0.5, -1).amax(1)).abs().max() < 1e-5


def test_merged_equals_unmerged_and_the_base_keeps_its_bits(tiny_model):
    net, tokenizer = tiny_model
    prompts, uniforms = encode(tokenizer), rollouts.uniforms(0, 0, range(8), 40)
    bare = rollouts.sample(net, prompts, 2, 40, uniforms=uniforms)
    adapter(net, 0.05)
    before = {name: p.clone() for name, p in net.named_parameters()}
    outs = [rollouts.sample(net, prompts, 2, 40, uniforms=uniforms, merge=merge) for merge in (True, False, "auto")]
    assert outs[0]["completions"] == outs[1]["completions"] == outs[2]["completions"] != bare["completions"]
    assert (outs[0]["sampled_logprobs"] - outs[1]["sampled_logprobs"]).abs().max() < 1e-5
    assert torch.equal(outs[0]["sampled_logprobs"], outs[2]["sampled_logprobs"])  # auto merges in fp32
    right = model.sequence_logprobs(net, outs[0]["tokens"], outs[0]["mask"])
    assert (outs[0]["sampled_logprobs"] - right).abs().max() < 1e-5
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())
    with lora.using(net, None):
        assert rollouts.sample(net, prompts, 2, 40, uniforms=uniforms)["completions"] == bare["completions"]


def test_a_4_bit_base_samples_what_its_trainer_scores(tiny_model):
    net, tokenizer = tiny_model
    model.quantise(net)
    adapter(net, 0.02)
    out = rollouts.sample(net, encode(tokenizer), 2, 20, uniforms=rollouts.uniforms(0, 0, range(8), 20))
    right = model.sequence_logprobs(net, out["tokens"], out["mask"])
    assert (out["sampled_logprobs"] - right).abs().max() < 1e-4
    right.sum().backward()  # sampling must not leave 4-bit kernels behind that know no gradient
    assert all(p.grad is not None and p.grad.any() for p in lora.adapter_parameters(net, "policy").values())


def test_bf16_and_masters_under_autocast_stay_near_the_trainer(tiny_model, tiny_folder):
    net, tokenizer = tiny_model
    small, _ = model.load("tiny", torch.device("cpu"), torch.bfloat16)
    for one, dtype in ((small, None), (net, torch.bfloat16)):
        with model.compute_context(torch.device("cpu"), dtype, True):
            out = rollouts.sample(one, encode(tokenizer), 4, 20, uniforms=rollouts.uniforms(0, 0, range(16), 20))
            right = model.sequence_logprobs(one, out["tokens"], out["mask"])
        gap = (out["sampled_logprobs"] - right)[out["mask"].bool()].abs()
        assert 1e-5 < gap.mean() < 0.05, dtype  # above: these were no fp32 products


def test_merge_survival_by_hand_and_in_its_limits(tiny_model):
    net, _ = tiny_model
    adapter(net, 0.0)
    assert rollouts.merge_survival(net, "policy") == 1.0
    adapter(net, 1e-3)
    assert rollouts.merge_survival(net, "policy") == pytest.approx(1.0, abs=1e-3)  # fp32 loses nothing worth naming
    shares = []
    for noise in (1e-6, 1e-3, 0.3):
        small, _ = model.load("tiny", torch.device("cpu"), torch.bfloat16)
        adapter(small, noise)
        shares.append(rollouts.merge_survival(small, "policy"))
    assert shares[0] < 0.1 and shares[0] < shares[1] < 0.99 < shares[2] < 1.01
    small, _ = model.load("tiny", torch.device("cpu"), torch.bfloat16)
    torch.manual_seed(0)
    lora.inject(small, "policy", 1, 1, ["q_proj"])
    with torch.no_grad():
        for module in lora.lora_modules(small).values():
            module.base.weight.fill_(1.0)  # its neighbours in bf16 lie at 1 - 2^-8 and 1 + 2^-7
            if "policy" in module.lora_A:
                module.lora_A["policy"].fill_(1.0)
                module.lora_B["policy"].fill_(2**-9)  # half way down the larger step: lost
                module.lora_B["policy"][::2] = -(2**-8)  # arrives
    assert rollouts.merge_survival(small, "policy") == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": []},
        {"prompts": [[]]},
        {"prompts": [[2, 105], []]},
        {"group_size": 0},
        {"max_new_tokens": 0},
        {"temperature": 0.0},
    ],
)
def test_nonsense_is_refused(changes, tiny_model):
    arguments = {"prompts": [[2, 105]], "group_size": 1, "max_new_tokens": 2} | changes
    with pytest.raises(ValueError, match="sample needs"):
        rollouts.sample(tiny_model[0], **arguments)


def test_the_real_270m():
    folders = [p for p in cache.root().glob("gemma-3-270m*") if (p / "model.safetensors").is_file()]
    if not folders:
        pytest.skip("no converted Gemma 3 270M in the cache")
    net, tokenizer = model.load(str(folders[0]), torch.device("cpu"), torch.float32)
    prompts = encode(tokenizer, ["How do I store a password?", "Sort a list of dictionaries by a key."])
    out = rollouts.sample(net, prompts, 2, 4, uniforms=rollouts.uniforms(0, 0, range(4), 4))
    right = model.sequence_logprobs(net, out["tokens"], out["mask"])
    assert (out["sampled_logprobs"] - right).abs().max() < 1e-4
    greedy = rollouts.sample(net, prompts, 1, 6, greedy=True, stop=())["completions"]
    assert greedy[0] == generate(net, prompts[0], 6, eos_token_id=None)
