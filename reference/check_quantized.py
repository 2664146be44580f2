"""Loads what `idefics quantize --format nf4` wrote into transformers with bitsandbytes and compares the logits.

    python reference/check_quantized.py --binary target/release/idefics [--seed N]

For f32 and bf16 weights, with and without double quantization, for the default parts and for all, it writes a random
checkpoint, lets the program quantize it, and

- compares every packed weight with bitsandbytes' own quantization of the same tensor: codes, scales and their codes
  must be equal bit for bit;
- loads the directory in transformers and compares its log-probabilities in f32 with `idefics score` on the directory
  and on the original with `--quantize nf4`: mean KL divergence below 1e-4, largest difference below 1e-4.

It also prints what each format costs: the mean KL divergence of nf4 and q8 from the dense model.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

# torch's mean of many scales depends on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import bitsandbytes.functional as bnb  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402

from idefics_fixtures import quantized  # noqa: E402
from idefics_fixtures.common import rng  # noqa: E402
from idefics_fixtures.tiny import VOCAB_SIZE, write_checkpoint, random_model  # noqa: E402
from idefics_fixtures.tokenizer import INSTRUCT_TOKENS, train_sentencepiece  # noqa: E402

KL_LIMIT = 1e-4
DIFFERENCE_LIMIT = 1e-4
STATE = ".quant_state.bitsandbytes__nf4"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def check_bits(source: dict[str, torch.Tensor], written: dict[str, torch.Tensor], double: bool) -> int:
    """Every packed weight against bitsandbytes' own; returns how many there are."""
    names = [name.removesuffix(STATE) for name in written if name.endswith(STATE)]
    for name in names:
        codes, state = bnb.quantize_4bit(source[name], quant_type="nf4", compress_statistics=double)
        expected = {"": codes} | {f".{key}": value for key, value in state.as_dict(packed=True).items()}
        for part, value in expected.items():
            got = written[name + part]
            if part == STATE:
                same = json.loads(bytes(got.numpy())) == json.loads(bytes(value.numpy()))
            else:
                same = got.dtype == value.dtype and torch.equal(got.view(torch.uint8), value.view(torch.uint8))
            if not same:
                sys.exit(f"{name}{part} is not what bitsandbytes makes")
    for name in written:
        if name in source and name not in names and not torch.equal(written[name], source[name]):
            sys.exit(f"{name} was changed")
    return len(names)


@torch.no_grad()
def reference(directory: Path, lines: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities at every position, `[T, V + A]`."""
    model = quantized.load(directory)
    outputs = []
    for ids in lines:
        logits = model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pixel_values=torch.zeros(1, 1, 3, *[model.config.vision_config.image_size] * 2),
            image_attention_mask=torch.zeros(1, len(ids), 1, dtype=torch.long),
            use_cache=False,
        ).logits[0]
        outputs.append(logits.double().log_softmax(-1))
    return outputs


def ours(binary: Path, model: Path, lines: list[list[int]], vocab: int, *options: str) -> list[torch.Tensor]:
    """The same of `idefics score`, by asking for every token of the vocabulary at every position."""
    prompts = "".join(json.dumps({"token_ids": ids}) + "\n" for ids in lines)
    command = [str(binary), "score", "--model", str(model), "--prompts", "-", "--dtype", "f32", "--top", str(vocab), *options]
    run = subprocess.run(command, input=prompts.encode(), stdout=subprocess.PIPE)
    if run.returncode:
        sys.exit(f"{' '.join(command)} ended with {run.returncode}")
    outputs = []
    for line in run.stdout.decode().splitlines():
        result = json.loads(line)
        table = torch.full((len(result["top_logprobs"]), vocab), float("nan"), dtype=torch.double)
        for row, tops in enumerate(result["top_logprobs"]):
            for top in tops:
                table[row, top["token_id"]] = top["logprob"]
        outputs.append(table)
    return outputs


def distance(got: list[torch.Tensor], expected: list[torch.Tensor]) -> tuple[float, float]:
    """Mean KL divergence of `got` from `expected`, and the largest difference. `got` has no first position."""
    p = torch.cat([table[: len(own)] for table, own in zip(expected, got)])
    q = torch.cat(got)
    return float((p.exp() * (p - q)).sum(-1).mean()), float((p - q).abs().max())


def quantize(binary: Path, source: Path, out: Path, *options: str) -> None:
    command = [str(binary), "quantize", str(source), str(out), *options]
    if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        sys.exit(f"{' '.join(command)} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, required=True)
    parser.add_argument("--seed", type=int, help="default: a new one each time")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    seed = secrets.randbelow(1 << 31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}")
    binary = arguments.binary.resolve()

    config = quantized.config()
    config.vocab_size, config.additional_vocab_size = VOCAB_SIZE, len(INSTRUCT_TOKENS)
    vocab = VOCAB_SIZE + len(INSTRUCT_TOKENS)
    generator = rng("check_quantized", seed)
    lines = [[1, *generator.integers(3, VOCAB_SIZE, int(generator.integers(3, 40))).tolist()] for _ in range(12)]
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            source = Path(temporary) / name
            model = random_model(config, "check_quantized", seed)
            write_checkpoint(source, model, train_sentencepiece(VOCAB_SIZE), INSTRUCT_TOKENS, dtype=dtype)
            dense = reference(source, lines)
            for double in (False, True):
                for parts in ("text,cross", "text,cross,vision,perceiver"):
                    out = Path(temporary) / f"{name}-{double}-{parts.count(',')}"
                    flags = ["--double-quant"] if double else []
                    quantize(binary, source, out, "--format", "nf4", "--parts", parts, "--max-shard-gb", "0.0003", *flags)
                    count = check_bits(tensors(source), tensors(out), double)
                    expected = reference(out, lines)
                    kl, difference = distance(ours(binary, out, lines, vocab), expected)
                    close = kl < KL_LIMIT and difference < DIFFERENCE_LIMIT
                    good &= close
                    print(f"{name} nf4{'+dq' if double else ''} {parts}: {count} weights bit-equal; from transformers: mean "
                          f"KL divergence {kl:.2e}, largest difference {difference:.2e}: {'ok' if close else 'FAILED'}")
            kl, difference = distance(ours(binary, source, lines, vocab, "--quantize", "nf4"), reference(Path(temporary) / f"{name}-False-1", lines))
            close = kl < KL_LIMIT and difference < DIFFERENCE_LIMIT
            good &= close
            print(f"{name} --quantize nf4: mean KL divergence {kl:.2e}, largest difference {difference:.2e}: "
                  f"{'ok' if close else 'FAILED'}")
            for form in ("nf4", "q8"):
                kl, _ = distance(ours(binary, source, lines, vocab, "--quantize", form), dense)
                print(f"{name} {form} from the dense model: mean KL divergence {kl:.2e}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
