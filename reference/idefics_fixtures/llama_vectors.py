"""Hard strings with their LLaMA token ids, from llama.cpp's tokenizer tests (MIT).

They come from the source archive of the Python package llama-cpp-python, which is kept under target/ between runs.
The ids are those of the plain vocabulary, without `<s>`.
"""

import subprocess
import sys
import tarfile

from .common import FIXTURES, REPOSITORY, sha256, write_json

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
MEMBER = "vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf"
SEPARATOR = "\n__ggml_vocab_test__\n"
SHA256 = {
    ".inp": "be0a11f7071f0c67d3053a2d377d8f35f0dbcb77ff11a60300fb57d36b477cf0",
    ".out": "ad6905c925c49c022974fe67e030382e8a4f56eb4489a0b9481dcedb1ec73b29",
}


def archive():
    cache = REPOSITORY / "target" / "reference-cache"
    path = cache / f"llama_cpp_python-{VERSION}.tar.gz"
    if not path.exists():
        command = ["-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, "-d", str(cache), f"{PACKAGE}=={VERSION}"]
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return path


def write_llama_vectors() -> None:
    texts = {}
    with tarfile.open(archive()) as tar:
        for member in tar:
            for suffix in SHA256:
                if member.name.endswith(MEMBER + suffix):
                    data = tar.extractfile(member).read()
                    assert sha256(data) == SHA256[suffix], f"{member.name} changed"
                    texts[suffix] = data.decode()
    inputs = texts[".inp"].split(SEPARATOR)
    outputs = [[int(id) for id in line.split()] for line in texts[".out"].split("\n")]
    # Both files end with a separator: what follows the last one is nothing.
    pairs = list(zip(inputs, outputs))[:46]
    assert len(pairs) == 46
    write_json(FIXTURES / "llama_tokenizer.json", {
        "source": f"llama.cpp, models/ggml-vocab-llama-spm.gguf.inp and .out, in {PACKAGE} {VERSION}",
        "licence": "MIT, Copyright (c) 2023-2026 The ggml authors",
        "vectors": [{"text": text, "token_ids": ids} for text, ids in pairs],
    })
