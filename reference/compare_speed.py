"""Times PyTorch and transformers beside `idefics bench`, in turns within one run.

    python reference/compare_speed.py --binary target/release/idefics [--rounds 3] [--layers 8] [--nf4] [--json]

Prints, as medians over the rounds: bf16 products of two shapes, the ViT-H/14 tower on one picture, and a decode step
and a prompt of IDEFICS at a published shape with `--layers` layers of the text model and of the tower (transformers'
time grows by the layer, and all of them do not fit beside ours). A whole answer is a prompt with a picture and 32
decode steps. With `--nf4`, transformers runs with bitsandbytes' NF4 layers too, which take minutes. Weights are random;
nothing depends on what they are.
"""

import argparse
import json
import statistics
import subprocess
import time

import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text

SHAPES = {
    "9b": dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32),
    "80b": dict(hidden_size=8192, intermediate_size=22016, num_attention_heads=64),
}
NEW_TOKENS = 32
PRODUCTS = [(512, 4096, 4096), (257, 1280, 5120)]


def seconds(work, repeats=3):
    """The median time of a call, after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def reference_model(shape, layers):
    """IDEFICS of a published shape cut to `layers`, bf16, with one block of normal numbers everywhere."""
    config = IdeficsConfig(
        **SHAPES[shape], vocab_size=32000, additional_vocab_size=2, num_hidden_layers=layers, cross_layer_interval=4, qk_layer_norms=True, use_resampler=True, alpha_type="float",
        vision_config=dict(embed_dim=1280, image_size=224, patch_size=14, num_hidden_layers=layers,
                           num_attention_heads=16, intermediate_size=5120, hidden_act="gelu"),
        perceiver_config=dict(use_resampler=True, resampler_n_latents=64, resampler_depth=6, resampler_n_heads=16,
                              resampler_head_dim=96, qk_layer_norms_perceiver=True))
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    block = (torch.randn(1 << 22) * 0.02).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                end = min(start + block.numel(), flat.numel())
                flat[start:end] = block[: end - start]
        for name, buffer in model.named_buffers():
            if "position_ids" in name:
                buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
            elif "inv_freq" in name:
                width = buffer.numel() * 2
                buffer.copy_((10000.0 ** (-torch.arange(0, width, 2).float() / width)).to(buffer.dtype))
    return model


def packed(model):
    """The model with its text layers and gated blocks in bitsandbytes' NF4, in place."""
    import bitsandbytes

    for part in (model.model.layers, model.model.gated_cross_attn_layers):
        for parent in part.modules():
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    layer = bitsandbytes.nn.Linear4bit(
                        child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16,
                        quant_type="nf4", device="meta")
                    layer.weight = bitsandbytes.nn.Params4bit(child.weight.data, requires_grad=False,
                                                              quant_type="nf4", compress_statistics=False).to("cpu")
                    setattr(parent, name, layer)
    return model


def reference_round(model, tokens, steps, products):
    """Products in GFLOP/s, the tower per layer, a prompt and a decode step in seconds."""
    found = {}
    for m, n, k in products:
        x, weight = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
        found[f"product {m}x{n}x{k}"] = 2e-9 * m * n * k / seconds(lambda: torch.nn.functional.linear(x, weight), 5)
    pixels = torch.randn(1, 1, 3, 224, 224).bfloat16()
    found["vision"] = seconds(lambda: model.model.vision_model(pixel_values=pixels[0]), 1)
    ids = torch.randint(5, 31000, (1, tokens))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
                  image_attention_mask=torch.ones(1, tokens, 1, dtype=torch.long))
    prompt = seconds(lambda: model(**inputs, use_cache=True), 1)
    start = time.perf_counter()
    model.generate(**inputs, max_new_tokens=steps + 1, min_new_tokens=steps + 1, do_sample=False)
    found["decode step"] = (time.perf_counter() - start - prompt) / steps
    found["prompt with picture"] = prompt
    found["answer"] = prompt + NEW_TOKENS * found["decode step"]
    return found


def our_round(binary, shape, layers, tokens, form, dtype):
    """The same of `idefics bench` at one round."""
    report = json.loads(subprocess.run(
        [binary, "bench", "--shape", shape, "--format", form, "--dtype", dtype, "--layers", str(layers),
         "--prefill", str(tokens), "--batches", "1", "--images", "1", "--rounds", "1", "--json"],
        check=True, capture_output=True, text=True).stdout)
    found = {f"product {p['m']}x{p['n']}x{p['k']}": p["gflops"] for p in report["products"]}
    found["vision"] = report["vision"]["seconds_per_image"]
    found["decode step"] = 1 / report["decode"][0]["tokens_per_s"]
    found["prompt with picture"] = (report["prefill"][0]["tokens"] / report["prefill"][0]["tokens_per_s"]
                                    + report["vision"]["seconds_per_image"]
                                    + report["perceiver"]["seconds_per_image"])
    found["answer"] = found["prompt with picture"] + NEW_TOKENS * found["decode step"]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="9b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--nf4", action="store_true", help="transformers with bitsandbytes, too")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    dense = reference_model(arguments.shape, arguments.layers)
    ways = {"idefics bf16": ("bf16", "bf16"), "idefics nf4": ("nf4", "bf16"), "idefics nf4 int8": ("nf4", "int8")}
    rounds = {who: [] for who in ["transformers bf16", *ways]}

    def ours(who):
        rounds[who].append(
            our_round(arguments.binary, arguments.shape, arguments.layers, arguments.tokens, *ways[who]))

    with torch.inference_mode():
        for _ in range(arguments.rounds):
            rounds["transformers bf16"].append(reference_round(dense, arguments.tokens, arguments.steps, PRODUCTS))
            for who in ways:
                ours(who)
        if arguments.nf4:
            model = packed(dense)  # both do not fit
            rounds["transformers nf4"] = []
            for _ in range(arguments.rounds):
                rounds["transformers nf4"].append(reference_round(model, arguments.tokens, arguments.steps, []))
                ours("idefics nf4")
    medians = {who: {what: statistics.median(found[what] for found in all_found) for what in all_found[0]}
               for who, all_found in rounds.items()}
    if arguments.json:
        print(json.dumps(medians))
        return
    print(f"{arguments.shape}, {arguments.layers} layers, {torch.get_num_threads()} threads of torch "
          f"{torch.__version__}, medians of {arguments.rounds} rounds; in brackets how many times faster than "
          f"transformers in bf16")
    reference = medians["transformers bf16"]
    for what in reference:
        unit = "GFLOP/s" if what.startswith("product") else "s"
        cells = [f"{what:24}"]
        for who, found in medians.items():
            if what in found:
                times = found[what] / reference[what] if unit == "GFLOP/s" else reference[what] / found[what]
                cells.append(f"{who} {found[what]:8.3f} {unit} ({times:.2f}x)")
        print("   ".join(cells))


if __name__ == "__main__":
    main()
