"""Adapters of PEFT in `idefics`, and of `idefics` in PEFT: the same logits, and the same merged weights.

    python reference/check_adapters.py --binary target/release/idefics [--seed N] [--example target/release/examples/random_adapter]

On a fresh random checkpoint, for several LoRA configurations:

- what PEFT saves gives the same log-probabilities in `idefics score --adapter` as in PEFT (f32, within 1e-4), and
  `idefics merge` the same weights as `merge_and_unload` (within 1e-6 of the largest), which transformers loads;
- what this project writes (the example `random_adapter`) loads in PEFT with no missing or unexpected tensor, and
  gives the same log-probabilities in both.
"""

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import PeftModel, get_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import IdeficsForVisionText2Text  # noqa: E402

from check_quantized import ours  # noqa: E402
from idefics_fixtures.adapters import save_adapter, with_adapter  # noqa: E402
from idefics_fixtures.common import rng  # noqa: E402
from idefics_fixtures.tiny import VOCAB_SIZE, random_model, tiny_config, write_checkpoint  # noqa: E402
from idefics_fixtures.tokenizer import INSTRUCT_TOKENS, train_sentencepiece  # noqa: E402

LIMIT = 1e-4
CASES = {
    "list": dict(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"]),
    "expression": dict(r=3, lora_alpha=7, target_modules=r".*(?<!encoder)\.layers\.\d+\.mlp\.(gate|down)_proj", use_rslora=True),
    "patterns": dict(
        r=4, lora_alpha=8, target_modules=["o_proj", "up_proj", "fc1", "fc2", "fc", "c_proj"],
        rank_pattern={"up_proj": 2, r"gated_cross_attn_layers\.\d+\.cross_attn\.o_proj": 6}, alpha_pattern={"fc": 1},
    ),
    "whole modules": dict(r=2, lora_alpha=2, target_modules=["out_proj"], modules_to_save=["input_layernorm"]),
}


@torch.no_grad()
def logprobs(model, lines: list[list[int]]) -> list[torch.Tensor]:
    """`[T, V + A]` for each line, without pictures."""
    side = model.config.vision_config.image_size
    result = []
    for ids in lines:
        logits = model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pixel_values=torch.zeros(1, 1, 3, side, side),
            image_attention_mask=torch.zeros(1, len(ids), 1, dtype=torch.long),
            use_cache=False,
        ).logits[0]
        result.append(logits.double().log_softmax(-1))
    return result


def largest(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """`got` has no first position."""
    return max((table[: len(own)] - own).abs().max().item() for table, own in zip(expected, got))


def base(directory: Path) -> IdeficsForVisionText2Text:
    return IdeficsForVisionText2Text.from_pretrained(directory, dtype=torch.float32).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, required=True)
    parser.add_argument("--example", type=Path, help="the example `random_adapter`, built")
    parser.add_argument("--seed", type=int, help="default: a new one each time")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seed = secrets.randbelow(1 << 31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}")
    binary = arguments.binary.resolve()
    vocab = VOCAB_SIZE + len(INSTRUCT_TOKENS)
    generator = rng("check_adapters", seed)
    lines = [[1, *generator.integers(3, VOCAB_SIZE, int(generator.integers(3, 40))).tolist()] for _ in range(8)]
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        source = root / "base"
        model = random_model(tiny_config(), "check_adapters", seed)
        write_checkpoint(source, model, train_sentencepiece(VOCAB_SIZE), INSTRUCT_TOKENS)
        plain = logprobs(base(source), lines)
        for name, options in CASES.items():
            directory = root / name
            model = with_adapter(base(source), f"{seed}/{name}", **options).eval()
            for key, parameter in model.named_parameters():
                if "lora_B" in key or "modules_to_save" in key:
                    noise = rng(f"{seed}/{name}/{key}").standard_normal(tuple(parameter.shape))
                    parameter.data = parameter.data + 0.3 * torch.from_numpy(noise).float()
            save_adapter(model, directory)
            expected = logprobs(model, lines)
            moved = largest([table[:-1] for table in plain], expected)
            beside = largest(ours(binary, source, lines, vocab, "--adapter", str(directory)), expected)
            merged = root / f"{name} merged"
            subprocess.run([str(binary), "merge", str(source), str(directory), str(merged)], check=True, capture_output=True)
            reference = model.merge_and_unload().state_dict()
            state = base(merged).state_dict()
            worst = max((state[key] - value).abs().max().item() / (value.abs().max().item() + 1e-30)
                        for key, value in reference.items())
            close = beside < LIMIT and worst < 1e-6 and moved > 0.01 and state.keys() == reference.keys()
            good &= close
            print(f"PEFT's {name}: log-probabilities differ by {beside:.1e}, merged weights by {worst:.1e} of the largest "
                  f"(it moves them by {moved:.2f}): {'ok' if close else 'FAILED'}")
            if arguments.example:
                if "modules_to_save" in options:
                    continue
                own = root / f"{name} own"
                command = [str(arguments.example.resolve()), str(source), str(own), str(directory / "adapter_config.json")]
                subprocess.run(command, check=True)
                model = PeftModel.from_pretrained(base(source), own).eval()
                written = load_file(own / "adapter_model.safetensors")
                loaded = get_peft_model_state_dict(model)
                same = written.keys() == loaded.keys() and all(torch.equal(written[key], loaded[key]) for key in written)
                expected = logprobs(model, lines)
                moved = largest([table[:-1] for table in plain], expected)
                difference = largest(ours(binary, source, lines, vocab, "--adapter", str(own)), expected)
                close = same and difference < LIMIT and moved > 0.01
                good &= close
                print(f"our {name} in PEFT: {len(written)} tensors, log-probabilities differ by {difference:.1e}: "
                      f"{'ok' if close else 'FAILED'}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
