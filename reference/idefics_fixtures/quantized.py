"""What bitsandbytes makes of given numbers, and two small checkpoints that transformers and bitsandbytes wrote.

`quantize.json` holds, for `uniform(name, shape, 0, 0.3)` in each element type, the SHA-256 of what bitsandbytes'
CPU code gives: packed codes, scales, and with double quantization the codes and scales of the scales and their mean;
and the map of those codes. One thread: torch's mean of 32768 and more scales depends on how many there are.

`tiny-nf4` (double quantization) and `tiny-nf4-plain` are checkpoints whose dimensions are multiples of 64, since
bitsandbytes needs that: every linear layer but the heads is NF4. `expected.safetensors` holds the logits of
`logits` after loading the directory again, computed in f32:

    C.input_ids [T]   C.images [n], rows of pixel_values   C.image_index [T], -1 for none   C.logits [T, V + A]
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from transformers import BitsAndBytesConfig, IdeficsConfig, IdeficsForVisionText2Text

from .common import FIXTURES, SEED, write_json, write_tensors
from .golden import pixel_values, uniform
from .tiny import random_model

# Scales: 1, 3, 7, 15, 64, 255, 257, 4096 and 33,792; the last is past the size from which threads would share a sum.
SHAPES = [(1, 64), (3, 64), (7, 64), (5, 192), (64, 64), (15, 1088), (257, 64), (256, 1024), (1056, 2048)]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

VOCAB, ADDITIONAL = 90, 3
# name, token ids, rows of pixel_values, image of each token (-1 for none)
CASES = [
    ("images", [1, 5, 91, 90, 7, 8, 9, 90, 11, 12], [0, 1], [-1, -1, 0, 0, 0, 0, 1, 1, 1, 1]),
    ("text_first", [1, 30, 31, 32, 90, 40], [2], [-1, -1, -1, -1, 0, 0]),
    ("text_only", [1, 60, 61, 62, 63], [], [-1] * 5),
]


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def double_state(weight: torch.Tensor) -> tuple[torch.Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)


def write_quantize() -> None:
    cases = []
    for shape in SHAPES:
        for dtype, torch_dtype in DTYPES.items():
            name = f"weight {list(shape)}"
            weight = uniform(name, shape, 0.0, 0.3)
            # Blocks of very different sizes, one of zeros: their scales spread over the whole map.
            factors = 2.0 ** -(torch.arange(weight.numel() // 64) % 13)
            factors[5::31] = 0
            weight = (weight.view(-1, 64) * factors[:, None]).view(shape).to(torch_dtype)
            codes, plain = bnb.quantize_4bit(weight, quant_type="nf4")
            same, double = double_state(weight)
            assert torch.equal(codes, same)
            cases.append({
                "name": name,
                "shape": list(shape),
                "dtype": dtype,
                "codes": digest(codes),
                "absmax": digest(plain.absmax),
                "nested_codes": digest(double.absmax),
                "nested_absmax": digest(double.state2.absmax),
                "nested_offset": double.offset.item(),
            })
    _, double = double_state(uniform("map", (1, 64), 0.0, 1.0))
    write_json(FIXTURES / "quantize.json", {
        "cases": cases,
        "nested_quant_map": [float(np.float32(value)) for value in double.state2.code],
        "quant_map": [float(value) for value in double.code],
    })


def config() -> IdeficsConfig:
    return IdeficsConfig(
        vocab_size=VOCAB,
        additional_vocab_size=ADDITIONAL,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        cross_layer_interval=2,
        qk_layer_norms=True,
        use_resampler=True,
        alpha_type="float",
        freeze_text_layers=False,
        freeze_vision_layers=False,
        max_position_embeddings=64,
        vision_config=dict(
            embed_dim=64, image_size=16, patch_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=128, hidden_act="gelu",
        ),
        perceiver_config=dict(
            use_resampler=True, resampler_n_latents=4, resampler_depth=1, resampler_n_heads=2,
            resampler_head_dim=32, qk_layer_norms_perceiver=True,
        ),
    )


def load(directory: Path, quantization=None) -> IdeficsForVisionText2Text:
    """A checkpoint in f32 with its packed weights.

    On processors with bf16 instructions bitsandbytes 0.50 rounds activations and scales to bf16, whatever the compute
    type says (`Linear4bit.forward`, `_convert_weight_packed_for_cpu`): logits move by some hundredths. Turned off, it
    computes in f32 as it does on all other processors.
    """
    model = IdeficsForVisionText2Text.from_pretrained(
        directory, dtype=torch.float32, device_map="cpu", quantization_config=quantization
    ).eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def logits(model: IdeficsForVisionText2Text) -> dict[str, torch.Tensor]:
    """Logits of all cases, each run alone and without padding."""
    side = model.config.vision_config.image_size
    pictures = pixel_values("pixel_values", (3, 3, side, side))
    expected = {}
    for name, ids, images, index in CASES:
        mask = torch.zeros(1, len(ids), max(1, len(images)), dtype=torch.long)
        for token, image in enumerate(index):
            if image >= 0:
                mask[0, token, image] = 1
        expected[f"{name}.logits"] = model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pixel_values=pictures[images or [0]][None] * (1.0 if images else 0.0),
            image_attention_mask=mask,
            use_cache=False,
        ).logits[0]
        expected[f"{name}.input_ids"] = torch.tensor(ids)
        expected[f"{name}.images"] = torch.tensor(images, dtype=torch.long)
        expected[f"{name}.image_index"] = torch.tensor(index)
    return expected


def write_dense(directory: Path, dtype: torch.dtype = torch.float32, seed: int = SEED) -> None:
    """The checkpoint that both are made from."""
    random_model(config(), "tiny-nf4", seed).to(dtype).save_pretrained(directory)


def write_tiny_nf4() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        write_dense(Path(temporary))
        for name, double in (("tiny-nf4", True), ("tiny-nf4-plain", False)):
            directory = FIXTURES / name
            shutil.rmtree(directory, ignore_errors=True)
            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=double,
                bnb_4bit_compute_dtype=torch.float32,
            )
            load(Path(temporary), quantization).save_pretrained(directory)
            (directory / "generation_config.json").unlink(missing_ok=True)
            sort_keys(directory / "config.json")
            write_tensors(directory / "expected.safetensors", logits(load(directory)))


def sort_keys(path: Path) -> None:
    """Lists that transformers builds from sets have no order of their own."""
    value = json.loads(path.read_text())
    skipped = value["quantization_config"].get("llm_int8_skip_modules")
    if skipped:
        value["quantization_config"]["llm_int8_skip_modules"] = sorted(skipped)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
