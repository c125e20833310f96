"""The language model on a GPU: decoding by CUDA graphs and layer by layer against the CPU."""

import pytest
import torch
from mamba_ssm_vim import MambaLMHeadModel
from mamba_ssm_vim.models.config_mamba import MambaConfig
from mamba_ssm_vim.utils.generation import decode


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The CPU, where cg=True changes nothing, or the GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return request.param


@pytest.mark.parametrize("cg", [True, False])
def test_tokens_and_scores_are_the_references(device, cg):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(d_model=64, n_layer=3, vocab_size=90)).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(20)
    prompts = [torch.randint(0, 90, (batch, 7)) for batch in (3, 1, 3)]
    with torch.inference_mode():
        expected = [decode(ids, model, 20) for ids in prompts]
        whole = [model(e.sequences).logits[:, 6:-1] for e in expected]
    model = model.to(device)
    for ids, reference, scores in zip(prompts, expected, whole, strict=True):
        # The reference's tokens are given, so that scores that are nearly equal cannot lead to other sequences.
        teacher = reference.sequences.to(device)
        found = decode(ids.to(device), model, 20, cg=cg, teacher_outputs=teacher)
        assert torch.equal(found.sequences, teacher)
        # float32 sums in another order, 20 steps of a state that decays; scores are below 20.
        torch.testing.assert_close(torch.stack(found.scores, 1).cpu(), scores, rtol=1e-4, atol=1e-3)
