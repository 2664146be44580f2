"""Builds models with `idefics init` from random text models and towers and compares them in transformers.

    python reference/check_init.py --binary target/release/idefics [--seed N]

For text models with and without shared key and value heads, tied and untied, in f32 and bf16, and towers saved as
`CLIPVisionModel` and as `CLIPModel`:

- transformers loads the result with no missing, unexpected or misshapen tensor, and so does its processor;
- without pictures the logits over the text model's tokens are equal to the text model's own, and the tower's
  hidden states to CLIP's, in f32 within 1e-5;
- the standard deviation of every kind of new weight is m4's within four standard errors.
"""

import argparse
import json
import math
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import (  # noqa: E402
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    IdeficsForVisionText2Text,
    LlamaConfig,
    LlamaForCausalLM,
)

from idefics_fixtures.common import rng  # noqa: E402
from idefics_fixtures.tiny import VOCAB_SIZE  # noqa: E402
from idefics_fixtures.tokenizer import train_sentencepiece, write_tokenizer  # noqa: E402
from idefics_fixtures.unimodal import random_weights  # noqa: E402

LIMIT = 1e-5
# name, fields of LlamaConfig, element type, interval
TEXTS = [
    ("shared heads, tied, bf16", dict(num_key_value_heads=2, tie_word_embeddings=True, rope_theta=5e5), torch.bfloat16, 2),
    ("one shared head, f32", dict(num_key_value_heads=1, rms_norm_eps=1e-5), torch.float32, 4),
    ("plain attention, padded vocabulary, f32", dict(vocab_size=VOCAB_SIZE + 64), torch.float32, 1),
]


def write_text(directory: Path, fields: dict, dtype: torch.dtype, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(**{
        **dict(
            vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8,
            max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        **fields,
    })
    random_weights(LlamaForCausalLM(config), f"{seed}/text").to(dtype).save_pretrained(directory)
    write_tokenizer(directory, train_sentencepiece(VOCAB_SIZE), [])
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def write_tower(directory: Path, whole: bool, seed: int):
    """The directory, and the tower to compare with."""
    vision = dict(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
    )
    if not whole:
        config = CLIPVisionConfig(**vision, hidden_act="gelu")
        random_weights(CLIPVisionModel(config), f"{seed}/tower").save_pretrained(directory)
        return CLIPVisionModel.from_pretrained(directory).eval()
    text = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    random_weights(CLIPModel(config), f"{seed}/tower").save_pretrained(directory)
    return CLIPModel.from_pretrained(directory).eval().vision_model


def check_deviations(model: IdeficsForVisionText2Text) -> int:
    """Counts the kinds of new weights whose deviation is not m4's."""
    config = model.config
    width = config.vision_config.embed_dim
    values: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        fan_in = parameter.shape[-1]
        if ".alpha_" in name or parameter.dim() == 1:
            continue
        if "gated_cross_attn_layers" in name:
            factor = 2 * config.num_hidden_layers if "down_proj" in name else 1
            std = math.sqrt(0.4 / (fan_in * factor))
        elif name.endswith("latents"):
            std = math.sqrt(1 / width)
        elif "perceiver" in name:
            std = math.sqrt(0.4 / (width * (2 * config.num_hidden_layers if "c_proj" in name else 1)))
        elif "additional_embedding" in name:
            std = math.sqrt(1 / config.hidden_size)
        elif "additional_fc" in name:
            std = math.sqrt(1 / fan_in)
        else:
            continue
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        values.setdefault(kind, []).append(parameter.detach().flatten() / std)
    bad = 0
    for kind, parts in values.items():
        value = torch.cat(parts).double()
        error = 4 / math.sqrt(2 * value.numel())
        if abs(value.std(correction=0).item() - 1) > error or abs(value.mean().item()) > 4 / math.sqrt(value.numel()):
            print(f"{kind}: {value.numel()} values with deviation {value.std():.4f} of m4's, mean {value.mean():.4f}")
            bad += 1
    print(f"  {len(values)} kinds of new weights, {bad} with another deviation than m4's")
    return bad


@torch.no_grad()
def check(binary: Path, directory: Path, case: tuple, whole: bool, seed: int) -> bool:
    name, fields, dtype, interval = case
    text = write_text(directory / "text", fields, dtype, seed)
    tower = write_tower(directory / "tower", whole, seed)
    out = directory / "out"
    command = [
        str(binary), "init", "--text", str(directory / "text"), "--vision", str(directory / "tower"), "--out", str(out),
        "--cross-layer-interval", str(interval), "--seed", str(seed), "--dtype", "f32", "--resampler-n-heads", "2",
        "--resampler-head-dim", "16", "--resampler-n-latents", "8", "--resampler-depth", "3",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    model, info = IdeficsForVisionText2Text.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    model.eval()
    clean = not any(info.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    generator = rng("check_init", seed)
    ids = torch.tensor([[1, *generator.integers(3, VOCAB_SIZE, 30).tolist()]])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    picture = torch.from_numpy(generator.standard_normal((1, 3, 32, 32))).float()
    none = torch.zeros(1, ids.shape[1], 1, dtype=torch.long)
    logits = model(**inputs, pixel_values=torch.zeros(1, 1, 3, 32, 32), image_attention_mask=none).logits
    text_error = (logits[..., :VOCAB_SIZE] - text(**inputs).logits[..., :VOCAB_SIZE]).abs().max().item()
    hidden = model.model.vision_model(picture).last_hidden_state
    tower_error = (hidden - tower(picture).last_hidden_state).abs().max().item()
    tokens = json.loads((out / "added_tokens.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    known = all(tokenizer.convert_tokens_to_ids(token) == id for token, id in tokens.items())
    good = clean and known and len(tokens) == 2 and text_error < LIMIT and tower_error < LIMIT
    good &= logits.shape[-1] == VOCAB_SIZE + 2
    print(f"{name}, {'CLIPModel' if whole else 'CLIPVisionModel'}: {'clean' if clean else info}, text differs by "
          f"{text_error:.1e}, tower by {tower_error:.1e}: {'ok' if good else 'FAILED'}")
    return check_deviations(model) == 0 and good


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
    good = True
    for index, case in enumerate(TEXTS):
        with tempfile.TemporaryDirectory() as temporary:
            good &= check(arguments.binary.resolve(), Path(temporary), case, index % 2 == 0, seed + index)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
