"""Generation: against transformers, its filters against their definitions, and what ends it."""

import pytest
import torch
import transformers
from mamba_ssm_vim.models.mixer_seq_simple import MambaConfig, MambaLMHeadModel
from mamba_ssm_vim.utils import generation
from mamba_ssm_vim.utils.generation import decode, sample


@pytest.fixture(scope="module")
def model() -> MambaLMHeadModel:
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(d_model=24, n_layer=2, vocab_size=61)).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.tensor([[5, 9, 14, 3], [1, 2, 60, 7], [8, 8, 8, 8]])


@pytest.mark.parametrize("penalty", [1.0, 1.8])
def test_greedy_tokens_and_scores_are_those_of_transformers(model, prompts, penalty, tmp_path):
    model.save_pretrained(tmp_path, layout="transformers")
    other = transformers.MambaForCausalLM.from_pretrained(tmp_path)
    expected = other.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_length=24, do_sample=False, eos_token_id=None,
        repetition_penalty=penalty, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    found = model.generate(prompts, 24, repetition_penalty=penalty, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(found.sequences, expected.sequences)
    # float32 sums in another order, 24 steps of a state that decays.
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.logits), rtol=5e-5, atol=5e-5)
    assert torch.equal(found["sequences"], found[0])
    assert len(found[:]) == 2


def test_rows_of_a_batch_do_not_meet(model, prompts):
    together = model.generate(prompts, 16)
    alone = [model.generate(prompt[None], 16) for prompt in prompts]
    assert torch.equal(together, torch.cat(alone))
    assert isinstance(together, torch.Tensor)


def test_sequences_end_with_eos(model, prompts):
    free = model.generate(prompts, 24)
    eos = int(free[0, 7])
    found = model.generate(prompts, 24, eos_token_id=eos)
    for row, expected in zip(found, free, strict=True):
        new = expected[4:].tolist()
        length = 4 + (new.index(eos) + 1 if eos in new else len(new))
        assert row[:length].tolist() == expected[: len(row)][:length].tolist()
        assert (row[length:] == eos).all()
    alone = model.generate(prompts[:1], 24, eos_token_id=eos)
    assert alone.shape[1] <= 8
    assert alone[0, -1] == eos


def test_drawing_is_reproducible(model, prompts):
    def draw(seed, **settings):
        torch.manual_seed(seed)
        return model.generate(prompts, 24, **settings)

    for settings in ({"top_k": 0}, {"top_k": 9, "top_p": 0.9, "temperature": 1.5}, {"top_k": 0, "min_p": 0.01}):
        assert torch.equal(draw(1, **settings), draw(1, **settings))
        assert not torch.equal(draw(1, **settings), draw(2, **settings))
    # Nothing is left to chance where one token remains.
    for settings in ({"top_k": 0, "temperature": 1e-4}, {"top_k": 0, "top_p": 1e-6}, {"top_k": 5, "min_p": 1.0 - 1e-6}):
        assert torch.equal(draw(1, **settings), model.generate(prompts, 24))


def test_filters_keep_what_their_definitions_keep():
    probabilities = torch.tensor([[0.05, 0.4, 0.25, 0.2, 0.1], [0.9, 0.04, 0.03, 0.02, 0.01]])

    def kept(name, value):
        logits = probabilities.log()
        getattr(generation, f"modify_logits_for_{name}_filtering")(logits, value)
        return [row.isfinite().nonzero().flatten().tolist() for row in logits]

    assert kept("top_k", 2) == [[1, 2], [0, 1]]
    assert kept("top_k", 9) == [[0, 1, 2, 3, 4]] * 2
    assert kept("top_p", 0.6) == [[1, 2], [0]]
    assert kept("top_p", 0.7) == [[1, 2, 3], [0]]
    assert kept("top_p", 0.0) == kept("top_p", 1.0) == kept("min_p", 0.0) == [[0, 1, 2, 3, 4]] * 2
    assert kept("min_p", 0.45) == [[1, 2, 3], [0]]
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    generation.modify_logit_for_repetition_penalty(logits, torch.tensor([[0, 1, 1]]), 2.0)
    assert logits.tolist() == [[1.0, -4.0, 1.0]]


def test_draws_have_the_distribution_of_the_scores():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0]).expand(40_000, 4).contiguous()
    before = logits.clone()
    for settings, support in (
        ({"top_k": 0}, [0, 1, 2, 3]),
        ({"top_k": 2}, [1, 2]),
        ({"top_k": 3, "top_p": 0.8}, [1, 2]),
    ):
        expected = torch.full((4,), -torch.inf)
        expected[support] = before[0, support] / 2.0
        found = sample(logits, temperature=2.0, **settings).bincount(minlength=4) / 40_000
        # A frequency of 40,000 draws has a deviation of at most 0.0025; four of them.
        torch.testing.assert_close(found, expected.softmax(0), rtol=0, atol=0.01)
    assert torch.equal(logits, before)


def test_teacher_outputs_are_taken(model, prompts):
    teacher = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(3))
    teacher[:, :4] = prompts
    found = decode(prompts, model, 12, teacher_outputs=teacher)
    assert torch.equal(found.sequences[:, :9], teacher)
    with torch.no_grad():
        scores = model(found.sequences).logits
    torch.testing.assert_close(torch.stack(found.scores, 1), scores[:, 3:-1], rtol=5e-5, atol=5e-5)
    assert torch.equal(found.sequences[:, 9:], scores[:, 8:-1].argmax(-1))


def test_vocab_size_leaves_out_padding(model, prompts):
    assert model.config.padded_vocab_size == 64
    with torch.no_grad():
        model.lm_head.weight[61:] += 1.0
    found = decode(prompts, model, 24, vocab_size=61)
    assert found.scores[0].shape == (3, 61)
    assert (found.sequences < 61).all()


def test_streamer_gets_prompt_and_tokens(model, prompts, capsys):
    class Streamer:
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value)

        def end(self):
            self.got.append(None)

    streamer = Streamer()
    found = model.generate(prompts, 8, streamer=streamer, cg=True, enable_timing=True)
    assert streamer.got[-1] is None
    assert torch.equal(torch.cat([t.view(3, -1) for t in streamer.got[:-1]], dim=1), found)
    assert capsys.readouterr().out.startswith("Prompt processing + decoding time: ")


def test_bfloat16(prompts):
    torch.manual_seed(0)
    exact = MambaLMHeadModel(MambaConfig(d_model=24, n_layer=2, vocab_size=61)).eval()
    rounded = MambaLMHeadModel(exact.config, dtype=torch.bfloat16).eval()
    rounded.load_state_dict(exact.state_dict())
    found = decode(prompts, rounded, 24)
    assert found.scores[0].dtype is torch.bfloat16
    with torch.no_grad():
        expected = exact(found.sequences).logits[:, 3:-1]
    # Weights and activations are rounded to 2^-9 of their size; some ten roundings on the way to scores below 1 add up.
    assert expected.abs().max() < 1.0
    torch.testing.assert_close(torch.stack(found.scores, 1).float(), expected, rtol=0, atol=10 * 2**-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 4}, "max_length is 4, expected more than the 4 tokens of the prompt"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"max_length": 9.5}, "max_length is 9.5, expected a whole number"),
        ({"eos_token_id": [1, 2]}, "eos_token_id is"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"top_p": 1.5}, "top_p is 1.5, expected a probability"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"temperature": 0.0}, "temperature is 0.0, expected more than 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"teacher_outputs": torch.zeros(2, 9, dtype=torch.long)}, "teacher_outputs must be"),
    ],
)
def test_settings_that_mean_nothing(model, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, **({"max_length": 9} | settings))
    for tokens, words in (
        (prompts[:, :0], "input_ids must be"),
        (prompts.float(), "input_ids is of torch.float32, expected a tensor of int64"),
        ([[1, 2]], "input_ids is of list"),
        (prompts + 10**6, "outside the vocabulary, 0 to"),
        (prompts - 10**6, "outside the vocabulary, 0 to"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(tokens, 9)
