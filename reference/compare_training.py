"""Times the full training step of `training_speed full` in transformers on torch, in turns with the project's own.

    cargo build --release -p idefics-train --example training_speed
    python reference/compare_training.py --binary target/release/examples/training_speed [--dtype f32|bf16] [--rounds N]

The same shapes: 104 M parameters, one sequence of 512 tokens, 4 pictures, AdamW. Each turn is a process of its own,
so that the peak of its memory is its own. Prints medians, peaks and their ratios.
"""

import argparse
import re
import resource
import statistics
import subprocess
import sys
import time


def torch_step(dtype: str, steps: int) -> None:
    import torch
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    config = IdeficsConfig(
        vocab_size=8000, additional_vocab_size=2, hidden_size=640, intermediate_size=1728, num_hidden_layers=8,
        num_attention_heads=10, cross_layer_interval=4, qk_layer_norms=True, use_resampler=True,
        freeze_text_layers=False, freeze_vision_layers=False, freeze_lm_head=False,
        vision_config=dict(embed_dim=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
                           image_size=224, patch_size=14, hidden_act="gelu"),
        perceiver_config=dict(use_resampler=True, resampler_n_latents=64, resampler_depth=2, resampler_n_heads=8,
                              resampler_head_dim=64),
    )
    torch.manual_seed(0)
    model = IdeficsForVisionText2Text(config).requires_grad_(True)
    if dtype == "bf16":
        model = model.bfloat16()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens, images = 512, 4
    ids = torch.tensor([[3 + t * 7919 % 7997 for t in range(tokens)]])
    mask = torch.zeros(1, tokens, images, dtype=torch.long)
    for t in range(tokens):
        mask[0, t, t * images // tokens] = 1
    pixels = torch.randn(1, images, 3, 224, 224).to(model.dtype)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
                       image_attention_mask=mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    # The first step warms up.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"torch {torch.__version__} {dtype}: median {statistics.median(times[1:]):.3f} s, peak {peak:.2f} GB")


def figures(command: list[str]) -> tuple[float, float]:
    """Seconds and gigabytes from the last line that a command prints."""
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]
    seconds, peak = re.search(r"median ([\d.]+) s, peak ([\d.]+) GB", line).groups()
    return float(seconds), float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="bf16")
    parser.add_argument("--tape", choices=["keep", "recompute"], default="keep")
    parser.add_argument("--moments", choices=["f32", "8bit"], default="f32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-torch", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_torch:
        return torch_step(args.dtype, 3)
    peer = [sys.executable, __file__, "--only-torch", "--dtype", args.dtype]
    ours = [args.binary, "full", args.dtype, args.tape] + (["8bit"] if args.moments == "8bit" else [])
    turns = [(figures(ours), figures(peer)) for _ in range(args.rounds)]
    (own_s, own_gb), (peer_s, peer_gb) = (
        tuple(statistics.median(turn[who][what] for turn in turns) for what in (0, 1)) for who in (0, 1)
    )
    print(f"idefics {args.dtype}, tape {args.tape}, moments {args.moments}: {own_s:.3f} s a step, peak {own_gb:.2f} GB")
    print(f"torch {args.dtype}: {peer_s:.3f} s a step, peak {peer_gb:.2f} GB")
    print(f"ratio: {peer_s / own_s:.2f}x as fast, {own_gb / peer_gb:.2f}x the memory")


if __name__ == "__main__":
    main()
