"""Times llama.cpp beside `idefics bench` on the text model alone, in turns within one run.

    npm install --prefix DIR node-llama-cpp          # llama.cpp, built for this processor
    python reference/compare_llama_cpp.py --binary target/release/idefics --modules DIR/node_modules --scratch DIR

Writes a LLaMA of the 7B shape with random weights in Q4_0 to the scratch directory (3.8 GB, `--keep` leaves it there)
and times a prompt and decode steps of it; then the same of `idefics bench` in NF4 on a configuration of that shape. It
has one gated block, since a configuration has at least one; what counts is tokens per gigabyte of weights read, and
tokens of prompt a second. Needs the packages `gguf` and `numpy`, and node.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np

HIDDEN, INNER, HEADS, VOCABULARY = 4096, 11008, 32, 32000
Q4_0 = gguf.GGMLQuantizationType.Q4_0

NODE = """
const [, , modules, file, prompt, steps, threads] = process.argv;
const { getLlama } = await import(modules + "/node-llama-cpp/dist/index.js");
const llama = await getLlama({ gpu: false, build: "never", progressLogs: false, maxThreads: Number(threads) });
const model = await llama.loadModel({ modelPath: file });
const context = await model.createContext({ contextSize: 1024, batchSize: 512, threads: Number(threads) });
const sequence = context.getSequence();
const tokens = Array.from({ length: Number(prompt) }, (_, i) => 100 + i);
await sequence.evaluateWithoutGeneratingNewTokens(tokens.slice(0, 8));
await sequence.clearHistory();
let start = performance.now();
await sequence.evaluateWithoutGeneratingNewTokens(tokens);
const prefill = (performance.now() - start) / 1000;
let times = [];
let next = [200];
for (let step = 0; step < Number(steps); step++) {
    start = performance.now();
    await sequence.evaluateWithoutGeneratingNewTokens([200 + step]);
    times.push((performance.now() - start) / 1000);
}
times.sort((a, b) => a - b);
console.log(JSON.stringify({ prefill, step: times[times.length >> 1] }));
process.exit(0);
"""


def write_gguf(path: Path, layers: int) -> None:
    """A LLaMA whose weights are one block of random codes, repeated."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    # llama.cpp asks for the line feed among the bytes.
    known, rest = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)], VOCABULARY - 259
    writer.add_token_list(known + [f"t{i}" for i in range(rest)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * rest)
    elements, size = gguf.GGML_QUANT_SIZES[Q4_0]
    block = np.random.default_rng(0).integers(0, 256, (1 << 16, size), dtype=np.uint8)
    block[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)  # the scale of a block

    def linear(name, n, k):
        blocks = n * k // elements
        data = np.resize(block, (blocks, size)).reshape(n, -1)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=Q4_0)

    def norm(name):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))

    linear("token_embd", VOCABULARY, HIDDEN)
    linear("output", VOCABULARY, HIDDEN)
    norm("output_norm")
    for index in range(layers):
        layer = f"blk.{index}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            linear(f"{layer}.{name}", HIDDEN, HIDDEN)
        linear(f"{layer}.ffn_gate", INNER, HIDDEN)
        linear(f"{layer}.ffn_up", INNER, HIDDEN)
        linear(f"{layer}.ffn_down", HIDDEN, INNER)
        norm(f"{layer}.attn_norm")
        norm(f"{layer}.ffn_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_bytes(path: Path) -> int:
    """Bytes of a file that a decode step reads: all tensors but the table of embeddings."""
    return sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors if tensor.name != "token_embd.weight")


def our_config(layers: int) -> dict:
    """The same text model as an IDEFICS with one gated block and a small tower."""
    return dict(
        model_type="idefics", vocab_size=VOCABULARY, additional_vocab_size=2, hidden_size=HIDDEN,
        intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=HEADS, cross_layer_interval=layers,
        rms_norm_eps=1e-6, hidden_act="silu", alpha_type="float", use_resampler=False, qk_layer_norms=False,
        max_position_embeddings=2048, tie_word_embeddings=False,
        vision_config=dict(embed_dim=64, image_size=28, patch_size=14, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=64, hidden_act="gelu"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--modules", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    model = arguments.scratch / f"llama-{arguments.layers}-q4_0.gguf"
    if not model.is_file():
        write_gguf(model, arguments.layers)
    gigabytes = read_bytes(model) * 1e-9
    # llama.cpp rounds activations to 8 bits, as `int8` does.
    ways = {"idefics NF4": "bf16", "idefics NF4 int8": "int8"}
    rounds = {who: [] for who in ["llama.cpp Q4_0", *ways]}
    with tempfile.TemporaryDirectory() as directory:
        config, script = Path(directory, "config.json"), Path(directory, "time.mjs")
        config.write_text(json.dumps(our_config(arguments.layers)))
        script.write_text(NODE)
        for _ in range(arguments.rounds):
            theirs = json.loads(subprocess.run(
                ["node", script, arguments.modules.resolve(), model.resolve(), str(arguments.tokens),
                 str(arguments.steps), str(arguments.threads)],
                check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            rounds["llama.cpp Q4_0"].append({
                "prompt tokens/s": arguments.tokens / theirs["prefill"], "decode tokens/s": 1 / theirs["step"],
                "decode GB/s": gigabytes / theirs["step"]})
            for who, dtype in ways.items():
                ours = json.loads(subprocess.run(
                    [arguments.binary, "bench", "--shape", config, "--format", "nf4", "--dtype", dtype,
                     "--prefill", str(arguments.tokens), "--batches", "1", "--images", "0", "--rounds", "1",
                     "--threads", str(arguments.threads), "--json"],
                    check=True, capture_output=True, text=True).stdout)
                rounds[who].append({
                    "prompt tokens/s": ours["prefill"][0]["tokens_per_s"],
                    "decode tokens/s": ours["decode"][0]["tokens_per_s"],
                    "decode GB/s": ours["decode"][0]["weight_gb_per_s"]})
    if not arguments.keep:
        model.unlink()
    medians = {who: {what: statistics.median(found[what] for found in all_found) for what in all_found[0]}
               for who, all_found in rounds.items()}
    if arguments.json:
        print(json.dumps(medians))
        return
    theirs = medians["llama.cpp Q4_0"]
    for what, value in theirs.items():
        cells = [f"{who} {medians[who][what]:8.2f} ({medians[who][what] / value:.2f}x)" for who in ways]
        print(f"{what:18} llama.cpp Q4_0 {value:8.2f}   {'   '.join(cells)}")


if __name__ == "__main__":
    main()
