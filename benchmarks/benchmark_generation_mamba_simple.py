"""Time of a prompt and its continuation, with the command line of the original's script of this name.

    python benchmarks/benchmark_generation_mamba_simple.py --model-name FOLDER --prompt "Once upon" --topk 1 --genlen 50

The model is a folder or a hub id, in the layout of mamba_ssm or transformers. Its class is imported from `mamba_ssm`,
as code written for the original does, and `mamba_ssm_vim.compat` serves it. It runs on the GPU in float16, or on the
CPU in float32.
"""

import argparse
import sys
import time

import mamba_ssm_vim.compat  # noqa: F401
import torch
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

REPEATS = 3
# Of the models published as state-spaces/mamba-*, which come without one.
TOKENIZER = "EleutherAI/gpt-neox-20b"


def flags() -> argparse.ArgumentParser:
    """The original's flags and defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-name", default="state-spaces/mamba-130m", help="folder or hub id")
    parser.add_argument("--prompt", default=None, help="text to continue; without it random tokens are")
    parser.add_argument("--promptlen", type=int, default=100, help="random tokens")
    parser.add_argument("--genlen", type=int, default=100, help="new tokens")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--topk", type=int, default=1)
    parser.add_argument("--topp", type=float, default=1.0)
    parser.add_argument("--minp", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=1, help="sequences, all with the same prompt")
    return parser


def load_tokenizer(model_name: str):
    """The model's tokenizer, from its own files or the one of the published models.

    Raises:
        ValueError: it cannot be had.
    """
    from transformers import AutoTokenizer  # here: only prompts need it

    name = TOKENIZER if model_name.startswith("state-spaces/mamba-") and not model_name.endswith("-hf") else model_name
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # network errors and missing or damaged files raise errors of many types
        raise ValueError(
            f"--prompt needs the tokenizer of {name}, which cannot be loaded ({type(error).__name__}): put its files "
            "into the model's folder, or leave --prompt out for random tokens"
        ) from error


def run(args: argparse.Namespace) -> None:
    """Generate once, print the text if there is a prompt, then time it.

    Raises:
        ValueError: no such model or tokenizer, or settings that mean nothing.
    """
    if min(args.batch, args.promptlen, args.genlen) < 1:
        raise ValueError("--batch, --promptlen and --genlen must be at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    tokenizer = None if args.prompt is None else load_tokenizer(args.model_name)
    model = MambaLMHeadModel.from_pretrained(args.model_name, device=device, dtype=dtype).eval()
    print(f"Number of parameters: {sum(p.numel() for p in model.parameters() if p.requires_grad)}")
    torch.random.manual_seed(0)
    if tokenizer is None:
        high = min(1000, model.config.vocab_size)
        input_ids = torch.randint(1, high, (args.batch, args.promptlen), dtype=torch.long, device=device)
    else:
        input_ids = tokenizer(args.prompt, return_tensors="pt").input_ids.to(device).repeat(args.batch, 1)
    max_length = input_ids.shape[1] + args.genlen

    def generate():
        return model.generate(
            input_ids=input_ids, max_length=max_length, cg=True, return_dict_in_generate=True, output_scores=True,
            enable_timing=False, temperature=args.temperature, top_k=args.topk, top_p=args.topp, min_p=args.minp,
            repetition_penalty=args.repetition_penalty,
        )  # fmt: skip

    out = generate()
    if tokenizer is not None:
        print(tokenizer.batch_decode(out.sequences.tolist()))
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.time()
    for _ in range(REPEATS):
        generate()
    if device == "cuda":
        torch.cuda.synchronize()
    length = input_ids.shape[1]
    print(f"Prompt length: {length}, generation length: {out.sequences.shape[1] - length}")
    print(f"{args.model_name} prompt processing + decoding time: {(time.time() - started) / REPEATS * 1000:.0f}ms")


def main() -> int:
    """Run, with one line and status 2 for what the user can fix."""
    try:
        run(flags().parse_args())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
