"""Values that follow from a tensor's name, shared with the Rust tests (`idefics_testing::golden_fill`)."""

import numpy as np
import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from .common import FIXTURES, write_json

MASK = (1 << 64) - 1


def fnv1a_64(name: str) -> int:
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return value


def uniform(name: str, shape: tuple[int, ...], base: float, amp: float) -> torch.Tensor:
    """splitmix64(fnv1a_64(name) + flat index), its upper 24 bits mapped to base ± amp."""
    with np.errstate(over="ignore"):
        z = np.uint64(fnv1a_64(name)) + np.arange(int(np.prod(shape)), dtype=np.uint64)
        z += np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    unit = (z >> np.uint64(40)).astype(np.float64) / 2**24
    return torch.tensor((base + amp * (2 * unit - 1)).astype(np.float32)).view(shape)


def pixel_values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Pictures need not be stored: any name that begins with `pixel_values` gives values in 0 ± 1."""
    assert name.startswith("pixel_values")
    return uniform(name, shape, 0.0, 1.0)


def golden_config(name: str) -> IdeficsConfig:
    a = name == "A"
    return IdeficsConfig(
        vocab_size=40,
        additional_vocab_size=3,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        rms_norm_eps=1e-6,
        cross_layer_interval=2 if a else 1,
        qk_layer_norms=a,
        use_resampler=a,
        alpha_type="float" if a else "vector",
        vision_config=dict(
            embed_dim=12, image_size=8, patch_size=4, num_hidden_layers=2, num_attention_heads=3,
            intermediate_size=20, hidden_act="gelu", layer_norm_eps=1e-5,
        ),
        perceiver_config=dict(
            use_resampler=a, resampler_n_latents=3, resampler_depth=2, resampler_n_heads=2, resampler_head_dim=5,
            qk_layer_norms_perceiver=True,
        ),
    )


def write_golden_keys() -> None:
    """Keys and shapes of the two golden configurations, as the reference model has them."""
    keys = {}
    for name in ("A", "B"):
        state = IdeficsForVisionText2Text(golden_config(name)).state_dict()
        keys[name] = {key: list(state[key].shape) for key in sorted(state)}
    write_json(FIXTURES / "golden_keys.json", keys)
